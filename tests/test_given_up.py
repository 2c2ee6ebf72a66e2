"""When a start times out: at due + --server-timeout, whatever the hub does meanwhile; and what the hub says of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault_proxy import Delay, Fault, FaultProxy, Request, Silence, matching
from localhub import LocalHub
from tool import run_for_results, tool_users

TIMEOUT_S, SPAWN_S = 3.0, 6.0
WORDS = ("stress-test", "-c", "3", "--server-timeout", "3s")
HANGS = ("--profile", '{"hang_rate": 1}')


@pytest.fixture(scope="module")
def slow_hub() -> Iterator[LocalHub]:
    """A hub whose starts, answered with 202, take twice as long as anybody waits."""
    with LocalHub(spawn_s=SPAWN_S, slow_spawn_timeout_s=0) as hub:
        yield hub


def silent(path: str) -> Callable[[LocalHub], Callable[[Request], Fault | None]]:
    match = matching(None, path)
    return lambda hub: lambda request: Silence() if match(request) and request.method != "DELETE" else None


def delayed(hub: LocalHub) -> Callable[[Request], Fault | None]:
    match = matching("GET", "/users/")
    return lambda request: Delay(0.4) if match(request) else None


def frozen(hub: LocalHub) -> Callable[[Request], Fault | None]:
    """The hub's process is stopped while servers start, and goes on later."""
    seen = threading.Event()

    def rule(request: Request) -> None:
        if request.path.endswith("/progress") and not seen.is_set():
            seen.set()
            threading.Timer(0.5, os.kill, (hub.pid, signal.SIGSTOP)).start()
            threading.Timer(6.0, os.kill, (hub.pid, signal.SIGCONT)).start()

    return rule


CASES = {
    "a 201 that comes too late": ("new_hub", ("--profile", f'{{"spawn_s": {SPAWN_S}}}'), None),
    "a spawn that never ends": ("new_hub", HANGS, None),
    "a 202 and a spawn that takes longer": ("slow_hub", (), None),
    "a 202 and a spawn that never ends": ("slow_hub", HANGS, None),
    "a start without an answer": ("slow_hub", (), silent("/server$")),
    "a silent progress stream": ("slow_hub", (), silent("/progress$")),
    "nothing but silence": ("slow_hub", (), silent("/(server|progress)$|users/[^/]+$")),
    "a frozen hub": ("slow_hub", (), frozen),
    "a slow hub": ("slow_hub", (), delayed),
}


@pytest.mark.parametrize("case", CASES)
def test_a_start_times_out_when_it_is_due_to(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fixture, words, rule = CASES[case]
    hub: LocalHub = request.getfixturevalue(fixture)
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = rule(hub) if rule else None
        done, results = run_for_results(tmp_path / "r", *WORDS, *words, hub=hub, proxy=proxy)
    line = results["timeline"]["servers"]
    waited_s = [ended_s - due_s for due_s, ended_s in zip(line["due_s"], line["ended_s"])]
    assert len(waited_s) == 3 and not any(line["ready"])
    assert min(waited_s) > TIMEOUT_S - 0.05 and max(waited_s) < SPAWN_S - 1  # not when the spawn or silence ends
    assert done.code == 1 and results["servers"]["given_up"] == 3 and not tool_users(hub)


def test_servers_that_became_ready_too_late_are_counted_by_the_hubs_own_clock(
    make_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = make_hub(version="4.1.6", spawn_s=5, slow_spawn_timeout_s=0)  # which cannot cancel a start
    done, results = run_for_results(tmp_path / "r", *WORDS, hub=hub)
    assert results["servers"]["ready"] == 0 and not tool_users(hub)
    assert "3 servers timed out after 3.00 s; by the hub's own clock 3 of them became ready, after " in done.summary
