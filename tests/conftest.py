"""Real hubs for every test, and surroundings that some need."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import site
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault_proxy import FaultProxy
from localhub import LocalHub
from tool import THEIR_ADMIN, THEIRS

OLD_HUB = "4.1.6"

if threading.current_thread() is threading.main_thread():  # shells and nohup ignore these, and hand that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def new_hub() -> Iterator[LocalHub]:
    """The newest hub, shared: a test leaves it as it found it.

    A profile makes its servers slow or failing, as options of the hub would: '{"spawn_s": 2, "fail_rate": 0.5}', also
    spawn_jitter_s, hang_rate, stop_s and stop_fails.
    """
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
def proxy(new_hub: LocalHub) -> Iterator[FaultProxy]:
    """A proxy in front of the newest hub, which does whatever a test's rules say."""
    with FaultProxy(new_hub.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def shared_kube_hub() -> Iterator[LocalHub]:
    with LocalHub(kube=True, nodes=1, pods_per_node=30, node_s=1.0, image_s=0.5, spawn_s=1.0) as hub:
        yield hub


@pytest.fixture
def kube_hub(shared_kube_hub: LocalHub) -> Iterator[LocalHub]:
    """A hub with KubeSpawner, shared; faults, pods, users and failed starts of a test do not outlive it."""
    hub = shared_kube_hub
    logged = len(hub.log())
    yield hub
    hub.cluster.clean()
    if not hub.running or "consecutive spawns failed" in hub.log()[logged:]:  # which the hub counts on and on
        hub.restart()
    for name in hub.users().keys() - THEIRS:
        hub.call("DELETE", f"/users/{name}")


@pytest.fixture
def make_hub() -> Iterator[Callable[..., LocalHub]]:
    """Boots hubs with options of the test's own."""
    with contextlib.ExitStack() as hubs:

        def make(**options: object) -> LocalHub:
            return hubs.enter_context(LocalHub(**options))

        yield make


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which a Python without site-packages finds requests and urllib3 with what they need."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("requests", "urllib3", "idna", "certifi", "charset_normalizer"):
        (folder / name).symlink_to(next(Path(p) / name for p in site.getsitepackages() if (Path(p) / name).exists()))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTERHUB")}
    return clean | {"PYTHONPATH": str(folder)}


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `setup_logging` changes for the whole program is as it was, afterwards."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    root, chatty = logging.getLogger(), logging.getLogger("urllib3")
    before = root.handlers[:], root.level, chatty.level
    root.handlers.clear()  # which it would close
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    chatty.setLevel(before[2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests come first in each worker's share, so that none is left alone with them at the end.

    Those on the older hub are all in the first share: one worker boots it.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    slow = [item for item in items if item.get_closest_marker("faults") or item.get_closest_marker("rehearsal")]
    quick = sorted((item for item in items if item not in slow), key=lambda item: "old_hub" not in item.nodeid)
    share = -(-len(quick) // workers)
    items[:] = [item for n in range(workers) for item in (*slow[n::workers], *quick[n * share : (n + 1) * share])]


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
