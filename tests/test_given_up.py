"""When a start times out: at due + --server-timeout, whatever the hub does meanwhile; and what the hub says of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault_proxy import Delay, Fault, FaultProxy, Silence
from localhub import LocalHub
from tool import run_for_results, tool_users

WORDS = ("stress-test", "-c", "3", "--server-timeout", "3s")


@pytest.fixture(scope="module")
def hanging_hub() -> Iterator[LocalHub]:
    """A hub whose starts, answered with 202, never end."""
    with LocalHub(hang_rate=1.0, slow_spawn_timeout_s=0) as hub:
        yield hub


CASES: dict[str, tuple[str, str, Fault | None]] = {  # the hub; what happens to requests for these paths
    "a start without a 201": ("new_hub", "", None),
    "a 202 and a spawn that never ends": ("hanging_hub", "", None),
    "a start without an answer": ("hanging_hub", "/server$", Silence()),
    "a silent progress stream": ("hanging_hub", "/progress$", Silence()),
    "nothing but silence": ("hanging_hub", "/(server|progress)$|users/[^/]+$", Silence()),
    "a slow hub": ("hanging_hub", "/users/", Delay(0.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_start_times_out_when_it_is_due_to(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fixture, path, fault = CASES[case]
    limit_s = 9 if "202" in case else 3  # time for the hub to say something
    hub: LocalHub = request.getfixturevalue(fixture)
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = lambda request: fault if request.method != "DELETE" and re.search(path, request.path) else None
        words = (*WORDS[:-1], f"{limit_s}s", "--profile", '{"hang_rate": 1}')
        done, results = run_for_results(tmp_path / "r", *words, hub=hub, proxy=proxy)
    line = results["timeline"]["servers"]
    waited_s = [ended_s - due_s for due_s, ended_s in zip(line["due_s"], line["ended_s"])]
    assert len(waited_s) == 3 and not any(line["ready"])
    assert min(waited_s) > limit_s - 0.05 and max(waited_s) < 25  # a request alone times out after 30 s
    assert done.code == 1 and results["servers"]["given_up"] == 3 and not tool_users(hub)
    assert "--server-timeout" in done.summary and "nothing started" not in done.summary
    if "202" in case:
        assert "not ready after 9.00 s; the hub said: Pulling the image" in done.summary


def test_servers_ready_too_late_are_counted_by_the_hub(make_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = make_hub(version="4.1.6", spawn_s=5, slow_spawn_timeout_s=0)  # which cannot cancel a start
    done, results = run_for_results(tmp_path / "r", *WORDS, hub=hub)
    assert results["servers"]["ready"] == 0 and not tool_users(hub)
    assert "3 servers timed out after 3.00 s; by the hub's own clock 3 of them became ready, after " in done.summary
