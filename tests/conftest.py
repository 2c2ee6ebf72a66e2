"""Real hubs for every test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from localhub import LocalHub
from tool import THEIR_ADMIN, THEIRS

OLD_HUB = "4.1.6"


@pytest.fixture(scope="session")
def new_hub() -> Iterator[LocalHub]:
    """The newest hub, shared: a test leaves it as it found it."""
    with LocalHub(admins=(THEIR_ADMIN,)) as hub:
        yield hub


@pytest.fixture(scope="session")
def old_hub() -> Iterator[LocalHub]:
    with LocalHub(version=OLD_HUB, admins=(THEIR_ADMIN,)) as hub:
        yield hub


@pytest.fixture(params=["new_hub", "old_hub"])
def hub(request: pytest.FixtureRequest) -> Iterator[LocalHub]:
    """Each of the shared hubs; whatever a test left on it is removed, and was a mistake."""
    found: LocalHub = request.getfixturevalue(request.param)
    yield found
    left = found.users().keys() - THEIRS - {THEIR_ADMIN}
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
