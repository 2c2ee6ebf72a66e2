"""Real hubs for every test, and the tool as its user runs it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from localhub import LocalHub

import hub_stress_test as hst

MODULE = Path(hst.__file__)
THEIRS = {"alice", "hub-stress-tester", "hub-stress-test-admin"}
OLD_HUB = "4.1.6"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command line left: its exit code and what it said."""

    code: int
    stdout: str
    stderr: str


def run_tool(*words: str, hub: LocalHub | None = None, env: dict[str, str] | None = None) -> Outcome:
    """Run the tool in a process of its own; the token must be in none of its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTERHUB")}
    environment = clean | (hub.environment if hub else {}) | (env or {})
    done = subprocess.run(
        [sys.executable, "-W", "error", MODULE, *words], env=environment, capture_output=True, text=True, timeout=170
    )
    token = environment.get("JUPYTERHUB_API_TOKEN")
    assert not token or token not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def refused_usage(words: list[str], env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command line is refused, with exit code 2 and nothing on standard output."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        code = hst.main(words)
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.startswith("hub-stress-test: ") and said.err.count("\n") == 1
    return said.err


@pytest.fixture(scope="session")
def new_hub() -> Iterator[LocalHub]:
    """The newest hub, shared: a test leaves it as it found it."""
    with LocalHub(admins=("hub-stress-test-400",)) as hub:
        yield hub


@pytest.fixture(scope="session")
def old_hub() -> Iterator[LocalHub]:
    with LocalHub(version=OLD_HUB, admins=("hub-stress-test-400",)) as hub:
        yield hub


@pytest.fixture(params=["new_hub", "old_hub"])
def hub(request: pytest.FixtureRequest) -> Iterator[LocalHub]:
    """Each of the shared hubs; whatever a test left on it is removed, and was a mistake."""
    found: LocalHub = request.getfixturevalue(request.param)
    yield found
    left = found.users().keys() - THEIRS - {"hub-stress-test-400"}
    for name in left:
        found.call("DELETE", f"/users/{name}/server")
        found.call("DELETE", f"/users/{name}")
    assert not left


@pytest.fixture
def make_hub() -> Iterator[Callable[..., LocalHub]]:
    """Boots hubs with options of the test's own."""
    hubs: list[LocalHub] = []

    def make(**options: object) -> LocalHub:
        hubs.append(LocalHub(**options).__enter__())
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.__exit__()


def tool_users(hub: LocalHub) -> set[str]:
    """The names of the tool's users that the hub lists."""
    return {name for name in hub.users() if hst.is_test_user(name)} - {"hub-stress-test-400"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of faults, if any were tested."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    rows = [tuple(map(str, value)) for r in reports for name, value in r.user_properties if name == "fault"]
    if not rows:
        return
    rows = [("fault", "phase", "exit", "left", "seconds", "said why"), *sorted(rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    terminalreporter.section("faults")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
