"""When a person gives up: at due + --server-timeout, whatever the hub does meanwhile; and what the hub says of it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from fault_proxy import Delay, FaultProxy, Request, Silence, every, matching
from localhub import LocalHub
from tool import run_for_results, tool_users

TIMEOUT_S = 3.0
WORDS = ("stress-test", "-c", "3", "--server-timeout", "3s")


def given_up(found: dict[str, Any]) -> list[float]:
    """How long each person waited before they gave up."""
    line = found["timeline"]["servers"]
    assert not any(line["ready"]) and len(line["user"]) == 3
    return [ended - due for due, ended in zip(line["due_s"], line["ended_s"])]


SLOW: dict[str, dict[str, Any]] = {
    "a 201 that comes too late": {"spawn_s": 6, "slow_spawn_timeout_s": 10},
    "a 202 and a spawn that takes longer": {"spawn_s": 6, "slow_spawn_timeout_s": 0},
    "a spawn that never ends": {"hang_rate": 1.0, "slow_spawn_timeout_s": 1, "start_timeout_s": 8},
}


@pytest.mark.parametrize("case", SLOW)
def test_a_person_gives_up_a_slow_server_in_time(case: str, tmp_path: Path) -> None:
    with LocalHub(**SLOW[case]) as hub:
        done, found = run_for_results(tmp_path / "r", *WORDS, hub=hub)
        assert done.code == 1 and not tool_users(hub)
    assert given_up(found) == pytest.approx([TIMEOUT_S] * 3, abs=0.3)
    assert found["servers"]["given_up"] == 3


@pytest.mark.parametrize("path", ["/server$", "/progress$", "/(server|progress)$|users/[^/]+$"])
def test_a_person_gives_up_a_hub_that_is_silent_in_time(path: str, tmp_path: Path) -> None:
    silent = matching(None, path)

    def rule(request: Request) -> Any:
        return Silence() if silent(request) and request.method != "DELETE" else None

    with LocalHub(spawn_s=6, slow_spawn_timeout_s=0) as hub, FaultProxy(hub.endpoint) as proxy:
        proxy.rule = rule
        env = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        done, found = run_for_results(tmp_path / "r", *WORDS, hub=hub, env=env)
        assert done.code == 1 and not tool_users(hub)
    assert given_up(found) == pytest.approx([TIMEOUT_S] * 3, abs=0.3)


def test_a_person_gives_up_a_hub_that_is_frozen_in_time(tmp_path: Path) -> None:
    with LocalHub(spawn_s=6, slow_spawn_timeout_s=0) as hub, FaultProxy(hub.endpoint) as proxy:
        seen = threading.Event()

        def rule(request: Request) -> None:
            if request.path.endswith("/progress") and not seen.is_set():
                seen.set()
                threading.Timer(0.5, os.kill, (hub.pid, signal.SIGSTOP)).start()
                threading.Timer(6.0, os.kill, (hub.pid, signal.SIGCONT)).start()

        proxy.rule = rule
        env = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        done, found = run_for_results(tmp_path / "r", *WORDS, hub=hub, env=env)
        assert done.code == 1 and not tool_users(hub)
    assert given_up(found) == pytest.approx([TIMEOUT_S] * 3, abs=0.3)


def test_servers_that_became_ready_after_everybody_had_given_up_are_told_by_the_hubs_own_clock(tmp_path: Path) -> None:
    with LocalHub(version="4.1.6", spawn_s=5, slow_spawn_timeout_s=0) as hub:  # which cannot cancel a start
        done, found = run_for_results(tmp_path / "r", *WORDS, hub=hub)
        assert not tool_users(hub)
    assert found["servers"]["ready"] == 0
    assert "3 servers timed out after 3.00 s; by the hub's own clock 3 of them became ready, after 5." in done.summary


def test_a_delayed_hub_is_no_reason_to_give_up_late(tmp_path: Path) -> None:
    with LocalHub(spawn_s=6, slow_spawn_timeout_s=0) as hub, FaultProxy(hub.endpoint) as proxy:
        proxy.rule = every(matching("GET", "/users/"), Delay(0.4))
        env = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        _, found = run_for_results(tmp_path / "r", *WORDS, hub=hub, env=env)
    assert given_up(found) == pytest.approx([TIMEOUT_S] * 3, abs=0.3)
