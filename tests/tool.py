"""The tool as its user runs it: started in a process of its own, with all that it said and wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import FaultProxy
from localhub import LocalHub

MODULE = Path(hst.__file__)
SCHEMA: dict[str, Any] = json.loads(Path(__file__).with_name("results.schema.json").read_text())
THEIRS = {"alice", "hub-stress-tester", "hub-stress-test-admin"}  # users of every hub, which are not the tool's
THEIR_ADMIN = "hub-stress-test-400"  # of the shared hubs: named as the tool would, and an admin
NOWHERE = {"JUPYTERHUB_ENDPOINT": "http://127.0.0.1:1/hub/api", "JUPYTERHUB_API_TOKEN": "not-a-token"}
HUB = ("--endpoint", "http://hub.example.org/hub/api", "--token", "t")  # options for what asks no hub
PATIENCE_S = 170.0  # a test may take 180 s


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command line left: its exit code and what it said."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> str:
        """Standard output, each label of the summary with all its sentences on one line; tables as they are."""
        facts, blank, tables = self.stdout.partition("\n\n")
        return re.sub(r"\n +", " ", facts) + blank + tables


class Running(subprocess.Popen[str]):
    """The tool, running with a session of its own; killed with its processes when a `with` block ends before it."""

    def __init__(self, words: tuple[str, ...], environment: dict[str, str]) -> None:
        self.token = environment.get("JUPYTERHUB_API_TOKEN")
        command = [sys.executable, "-W", "error", "-m", MODULE.stem, *words]  # which, unlike a script, is compiled once
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        super().__init__(command, env=environment, text=True, start_new_session=True, **pipes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(kind, error, traceback)

    def log_up_to(self, words: str) -> None:
        """Read its log up to the line with these words."""
        assert self.stderr and any(words in line for line in self.stderr), f"the log never said {words!r}"

    def outcome(self, within_s: float = PATIENCE_S) -> Outcome:
        """Wait for its end; the token must be in none of its output, and no traceback."""
        stdout, stderr = self.communicate(timeout=within_s)
        assert not self.token or self.token not in stdout + stderr
        assert "Traceback" not in stdout + stderr, stderr
        return Outcome(self.returncode, stdout, stderr)


def start_tool(
    *words: str, hub: LocalHub | None = None, proxy: FaultProxy | None = None, env: dict[str, str] | None = None
) -> Running:
    """Start the tool for a hub, through a proxy if one is given; of JupyterHub its environment has this and `env`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTERHUB", "PYTHON"))}
    environment = kept | {"PYTHONPATH": str(MODULE.parent)} | (hub.environment if hub else {})
    environment |= {"JUPYTERHUB_ENDPOINT": proxy.endpoint} if proxy else {}
    return Running(words, environment | (env or {}))


def run_tool(*words: str, **where: Any) -> Outcome:
    """Run the tool to its end; `where` as of `start_tool`."""
    with start_tool(*words, **where) as run:
        return run.outcome()


def run_for_results(path: Path, *words: str, **where: Any) -> tuple[Outcome, dict[str, Any]]:
    """Run the tool to its end; the results that it wrote to the path as well."""
    done = run_tool(*words, "--results", str(path), **where)
    return done, results_in(path, done)


def check_schema(results: dict[str, Any]) -> None:
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # nine tenths of the import, and unused
    import jsonschema

    jsonschema.validate(results, SCHEMA)


def results_in(path: Path, done: Outcome) -> dict[str, Any]:
    """The results that a run wrote; they follow the schema and name the exit code with which it ended."""
    found: dict[str, Any] = json.loads(path.read_text())
    check_schema(found)
    assert found["exit_code"] == done.code
    return found


def plan_for(*words: str) -> hst.Plan:
    """The plan that a command line stands for."""
    args = hst.parse_args(words)
    hst.validate(args)
    return hst.plan_of(args)


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


def row(stdout: str, title: str) -> list[str]:
    """Count and failures of an operation, from the summary's table of latencies."""
    found = re.search(rf"^{title} +(\d+) +(\d+) ", stdout, re.MULTILINE)
    assert found, stdout
    return list(found.groups())


def tool_users(hub: LocalHub) -> set[str]:
    """The names of the tool's users that the hub lists."""
    return {name for name in hub.users() if hst.is_test_user(name)} - {THEIR_ADMIN}


def wait_until(reached: Callable[[], object], within_s: float = 60.0) -> None:
    """Look again and again until something is true; fail when it takes too long."""
    until_s = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < until_s, "it did not come to that in time"
        time.sleep(0.05)
