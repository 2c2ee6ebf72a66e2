"""The search for the rate that a hub sustains."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_proxy import Answer, FaultProxy, every, first, matching
from known_server import KnownServer
from tool import run_for_results

import hub_stress_test as hst

REPORTS = matching("POST", "/activity$")


@pytest.mark.parametrize("truth", [1.2, 3, 17, 128, 131.5, 4000])
def test_the_search_ends_within_five_percent_below_the_truth(truth: float) -> None:
    search = hst.CapacitySearch(16)
    for _ in range(40):
        if (rate := search.next_rate()) is None:
            break
        search.tell(rate, rate > truth)
    assert search.next_rate() is None
    assert search.sustained is not None and search.sustained <= truth < search.sustained * 1.06


def test_a_hub_that_sustains_not_even_one_request_a_second_is_given_up() -> None:
    search = hst.CapacitySearch(16)
    tried = []
    while (rate := search.next_rate()) and len(tried) < 40:
        tried.append(rate)
        search.tell(rate, True)
    assert (tried, search.sustained) == ([16, 8, 4, 2, 1], None)


def test_a_rate_that_the_generator_cannot_send_is_no_finding_about_the_hub() -> None:
    search = hst.CapacitySearch(100)
    search.tell(100, False)
    assert search.next_rate() == 200
    search.tell(200, None)
    assert (search.next_rate(), search.sustained, search.unknown) == (None, 100, True)


def test_the_capacity_of_a_known_server_is_found(tmp_path: Path) -> None:
    with KnownServer(capacity_per_s=40) as server:
        words = ("activity-stress-test", "-c", "20", "--find-capacity", "--duration", "2s", "--rate", "30")
        words += ("--fail-if", "activity.p95 > 150ms")
        done, found = run_for_results(tmp_path / "r", *words, env=server.environment)
        assert server.users() == set()
    capacity = found["capacity"]
    assert done.code == 0
    assert 30 <= capacity["rate_per_s"] <= 48
    assert capacity["servers_reporting_every_300_s"] == int(capacity["rate_per_s"] * 300)
    assert f"this hub sustains {capacity['rate_per_s']:.0f} requests per second" in done.summary.splitlines()[0]
    assert {step["held"] for step in capacity["steps"]} == {None, "activity.p95 > 150ms"}
    assert not capacity["generator_bound"]
    (sustained,) = (step for step in capacity["steps"] if step["rate_per_s"] == capacity["rate_per_s"])
    assert found["operations"]["activity"]["count"] == sustained["sent_per_s"] * 2  # the operations are that step's
    assert found["conditions"] == []  # which the steps have judged


def test_a_throttled_step_does_not_count_against_those_after_it(tmp_path: Path) -> None:
    busy = Answer(429, b'{"status": 429, "message": "Too many requests"}')
    with KnownServer() as server, FaultProxy(server.endpoint) as proxy:
        proxy.rule = first(3, REPORTS, busy)  # all in the first step
        words = ("activity-stress-test", "-c", "5", "--find-capacity", "--duration", "1s", "--rate", "8")
        where = server.environment | {"JUPYTERHUB_ENDPOINT": proxy.url + "/hub/api"}
        done, found = run_for_results(tmp_path / "r", *words, "--fail-if", "throttled > 0", env=where)
    steps = found["capacity"]["steps"]
    assert [step["held"] for step in steps] == ["throttled > 0"] + [None] * (len(steps) - 1)
    assert [step["rate_per_s"] for step in steps[:3]] == [8, 4, 6]
    assert done.code == 0 and 7.6 < found["capacity"]["rate_per_s"] < 8
    assert found["http"]["throttled"] == 3  # though the run's own count has them


def test_a_capacity_that_is_not_found_fails_the_run(tmp_path: Path) -> None:
    with KnownServer() as server, FaultProxy(server.endpoint) as proxy:
        proxy.rule = every(REPORTS, Answer(500, b'{"status": 500, "message": "database is locked"}'))
        words = ("activity-stress-test", "-c", "5", "--find-capacity", "--duration", "1s", "--rate", "4")
        where = server.environment | {"JUPYTERHUB_ENDPOINT": proxy.url + "/hub/api"}
        done, found = run_for_results(tmp_path / "r", *words, env=where)
        assert server.users() == set()
    assert done.code == 1
    assert done.summary.startswith("FAILED: the capacity was not found: no rate that was tried was sustained")
    assert [step["rate_per_s"] for step in found["capacity"]["steps"]] == [4, 2, 1]
    assert {step["held"] for step in found["capacity"]["steps"]} == {"failed > 0"}
    assert found["capacity"]["rate_per_s"] is None is found["capacity"]["servers_reporting_every_300_s"]
