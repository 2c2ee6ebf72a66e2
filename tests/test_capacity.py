"""The search for the rate that a hub sustains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fault_proxy import Answer, FaultProxy, every, first, matching
from known_server import KnownServer
from tool import run_for_results

import hub_stress_test as hst

REPORTS = matching("POST", "/activity$")


def searched(first_rate_per_s: float, truth: float, sendable: float = math.inf) -> list[hst.CapacityStep]:
    """The steps of a search on a hub that sustains `truth`, by a generator that can send so much."""
    steps: list[hst.CapacityStep] = []
    while (rate := hst.next_rate(steps, first_rate_per_s)) and len(steps) < 40:
        held = "too slow" if rate > min(truth, sendable) else None
        steps.append(hst.CapacityStep(rate, rate, 0.01, 0, held, generator_bound=rate > sendable))
    return steps


@pytest.mark.parametrize("truth", [1.2, 3, 17, 128, 131.5, 4000])
def test_the_search_ends_within_five_percent_below_the_truth(truth: float) -> None:
    steps = searched(16, truth)
    sustained = hst.sustained_rate(steps)
    assert len(steps) < 40
    assert sustained is not None and sustained <= truth < sustained * 1.06


def test_a_hub_that_sustains_not_even_one_request_a_second_is_given_up() -> None:
    steps = searched(16, 0)
    assert ([step.rate_per_s for step in steps], hst.sustained_rate(steps)) == ([16, 8, 4, 2, 1], None)


def test_a_rate_that_the_generator_cannot_send_is_no_finding_about_the_hub() -> None:
    steps = searched(100, 1000, sendable=150)
    assert ([step.rate_per_s for step in steps], hst.sustained_rate(steps)) == ([100, 200], 100)


def test_the_capacity_of_a_known_server_is_found(tmp_path: Path) -> None:
    with KnownServer(capacity_per_s=40) as server:
        words = ("activity-stress-test", "-c", "20", "--find-capacity", "--duration", "2s", "--rate", "30")
        words += ("--fail-if", "activity.p95 > 150ms", "--samples", str(tmp_path / "s.jsonl"))
        done, found = run_for_results(tmp_path / "r", *words, env=server.environment)
        assert server.users() == set()
    capacity = found["capacity"]
    assert done.code == 0
    assert 30 <= capacity["rate_per_s"] <= 48
    assert capacity["servers_reporting_every_300_s"] == int(capacity["rate_per_s"] * 300)
    intervals = {one["servers"]: one["interval_s"] for one in capacity["activity_intervals"]}
    assert intervals.keys() == {300, 1000, 3000, 10_000} and intervals[300] == intervals[1000] == 300
    assert 600 < intervals[3000] <= 1020 and intervals[10_000] is None  # 40 a second: 750 s and 2,500 s
    table = done.stdout.partition("JUPYTERHUB_ACTIVITY_INTERVAL")[2]
    assert f"3,000  {intervals[3000]} s" in table and "1,000  300 s, the default" in table
    assert "10,000  none up to 1800 s" in table
    assert f"this hub sustains {capacity['rate_per_s']:.0f} requests per second" in done.summary.splitlines()[0]
    assert {step["held"] for step in capacity["steps"]} == {None, "activity.p95 > 150ms"}
    assert not capacity["generator_bound"]
    (sustained,) = (step for step in capacity["steps"] if step["rate_per_s"] == capacity["rate_per_s"])
    assert found["operations"]["activity"]["count"] == sustained["sent_per_s"] * 2  # the operations are that step's
    assert found["conditions"] == []  # which the steps have judged
    sent = round(sum(step["sent_per_s"] * 2 for step in capacity["steps"]))
    assert (tmp_path / "s.jsonl").read_text().count('"step": "activity"') == sent  # of all steps


@pytest.mark.parametrize(
    ("servers", "reports_per_s", "interval_s"),
    [
        (300, 1000.0, 300),  # the default, where 3 s would do
        (3000, 100.0, 300),
        (3000, 99.0, 360),  # in whole minutes
        (3000, 16.7, 1800),
        (3000, 16.6, None),
        (10_000, 0.5, None),
    ],
)
def test_an_activity_interval_takes_a_tenth_of_the_capacity_and_stays_within_bounds(
    servers: int, reports_per_s: float, interval_s: int | None
) -> None:
    assert hst.activity_interval(servers, reports_per_s) == hst.ActivityInterval(servers, interval_s)


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
    assert done.summary.startswith("FAILED: the capacity was not found: no rate was sustained")
    assert [step["rate_per_s"] for step in found["capacity"]["steps"]] == [4, 2, 1]
    assert {step["held"] for step in found["capacity"]["steps"]} == {"failed > 0"}
    assert found["capacity"]["rate_per_s"] is None is found["capacity"]["servers_reporting_every_300_s"]


@pytest.mark.parametrize(
    ("capacity", "sentence"),
    [
        (hst.Capacity(None, None, False, []), "no rate was sustained"),
        (hst.Capacity(None, None, True, []), "this tool could not send the first rate"),
        (hst.Capacity(None, None, False, [], finished=False), "the search did not finish"),
        (hst.Capacity(64.0, None, False, [], finished=False), "sustains at least 64 requests"),
        (hst.Capacity(64.0, None, False, []), "sustains 64 requests"),
    ],
)
def test_a_search_that_did_not_finish_knows_only_what_it_has_seen(capacity: hst.Capacity, sentence: str) -> None:
    assert sentence in hst._capacity_sentence(capacity)


def test_a_rate_of_which_the_hub_let_only_a_part_be_sent_is_not_sustained() -> None:
    load = hst.Load("http://x", ("a",), {"activity": 1.0}, 1, rate_per_s=10.0, duration_s=4.0)
    seen, plan = hst.Recorder(), hst.Plan(hst.ACTIVITY, fail_if=(hst.condition("failed_rate > 1%"),))
    for n in range(30):
        seen.add(hst.Event("activity", "a", n / 10, n / 10, n / 10 + 0.01))
    step = hst._capacity_step(load, seen, hst.Traffic(), plan, cpu_share=0.1)
    assert (step.held, step.generator_bound) == ("10 of 40 requests could not be sent in time", False)
