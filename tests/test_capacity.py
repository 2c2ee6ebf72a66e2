"""The search for the rate that a hub sustains."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import FaultProxy, every, first, hub_answer, matching
from hub_stress_test import Limit
from known_server import KnownServer
from localhub import LocalHub
from tool import results_in, run_for_results, start_tool, tool_users, wait_until

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
        words += ("--fail-if", "activity.p95 > 150ms", "--samples", str(tmp_path / "s.csv"))
        done, found = run_for_results(tmp_path / "r", *words, env=server.environment)
        assert server.users() == set()
    capacity = found["capacity"]
    assert done.code == 0
    assert 30 <= capacity["rate_per_s"] <= 48
    assert capacity["servers_reporting_every_300_s"] == int(capacity["rate_per_s"] * 300)
    interval = re.search(r"3,000 servers with JUPYTERHUB_ACTIVITY_INTERVAL=(\d+) take at most 10 %", done.summary)
    assert interval and int(interval[1]) == pytest.approx(3000 / (0.1 * capacity["rate_per_s"]), abs=2)
    assert f"this hub sustains {capacity['rate_per_s']:.0f} requests per second" in done.summary.splitlines()[0]
    assert {step["held"] for step in capacity["steps"]} == {None, "activity.p95 > 150ms"}
    assert not capacity["generator_bound"]
    (sustained,) = (step for step in capacity["steps"] if step["rate_per_s"] == capacity["rate_per_s"])
    assert found["operations"]["activity"]["count"] == sustained["sent_per_s"] * 2  # the operations are that step's
    rows = (tmp_path / "s.csv").read_text()
    assert 5 <= found["operations"]["ping"]["count"] <= 15 < rows.count(",ping,")  # and so are the pings, 5 per second
    assert found["conditions"] == []  # which the steps have judged
    sent = round(sum(step["sent_per_s"] * 2 for step in capacity["steps"]))
    assert rows.count(",activity,") == sent  # of all steps


def test_a_throttled_step_does_not_count_against_those_after_it(tmp_path: Path) -> None:
    busy = hub_answer(429, b'{"status": 429, "message": "Too many requests"}')
    with KnownServer() as server, FaultProxy(server.endpoint) as proxy:
        proxy.rule = first(3, REPORTS, busy)  # all in the first step
        words = ("activity-stress-test", "-c", "5", "--find-capacity", "--duration", "1s", "--rate", "8")
        where = server.environment | {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        done, found = run_for_results(tmp_path / "r", *words, "--fail-if", "throttled > 0", env=where)
    steps = found["capacity"]["steps"]
    assert [step["held"] for step in steps] == ["throttled > 0"] + [None] * (len(steps) - 1)
    assert [step["rate_per_s"] for step in steps[:3]] == [8, 4, 6]
    assert done.code == 0 and 7.6 < found["capacity"]["rate_per_s"] < 8
    assert found["http"]["throttled"] == 3  # though the run's own count has them


def test_a_capacity_that_is_not_found_fails_the_run(tmp_path: Path) -> None:
    with KnownServer() as server, FaultProxy(server.endpoint) as proxy:
        proxy.rule = every(REPORTS, hub_answer(500, b'{"status": 500, "message": "database is locked"}'))
        words = ("activity-stress-test", "-c", "5", "--find-capacity", "--duration", "1s", "--rate", "4")
        where = server.environment | {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        done, found = run_for_results(tmp_path / "r", *words, env=where)
        assert server.users() == set()
    assert done.code == 1
    assert done.summary.startswith("FAILED: the capacity was not found: no rate was sustained")
    assert found["warnings"] == ["no rate was sustained, not even 1 request per second: failed > 0 (1 × 500)"]
    assert "are of the last rate tried" in done.summary and found["operations"]["activity"]["failed"] == 1
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
        (
            hst.Capacity(0.7, None, False, [], people_per_minute=42.0),
            "this hub takes 42 people a minute (found with 42 people in 60.0 s): a class of 300 in 7 min 9 s",
        ),
        (
            hst.Capacity(20.0, None, False, [], finished=False, people_per_minute=1200.0),
            "takes at least 1200 people a minute (found with 1,200 people in 60.0 s): a class of 300 in 15.0 s",
        ),
    ],
)
def test_a_search_that_did_not_finish_knows_only_what_it_has_seen(capacity: hst.Capacity, sentence: str) -> None:
    assert sentence in hst._capacity_sentence(capacity, {})


OF_PEOPLE = hst.Capacity(1.0, None, False, [], people_per_minute=60.0)
AT_LEAST = dataclasses.replace(OF_PEOPLE, finished=False)


@pytest.mark.parametrize(
    ("capacity", "asked", "parts"),
    [
        (OF_PEOPLE, {"duration_s": 24.0}, ["takes 60 people", "(found with 24 people in 24.0 s)", "class of 300"]),
        (OF_PEOPLE, {"duration_s": 1.0}, ["(found with 1 person in 1.00 s)"]),
        (AT_LEAST, {"max_servers": 60}, ["takes at least 60 people a minute with at most 60 servers at a time (found"]),
        (
            OF_PEOPLE,
            {"count": 225, "within_s": 300.0},
            ["class of 225", "225 in 5 min 0 s are 45 a minute: fits, 1.3 t"],
        ),
        (OF_PEOPLE, {"count": 300, "within_s": 300.0}, ["are 60 a minute: fits, 1 times"]),
        (OF_PEOPLE, {"count": 301, "within_s": 300.0}, ["are 60.2 a minute: does not fit: 0.9 times"]),
        (AT_LEAST, {"count": 150, "within_s": 300.0}, ["are 30 a minute: fits, at least 2 times"]),
        (AT_LEAST, {"count": 600, "within_s": 300.0}, ["are 120 a minute: not known: at least 0.5 times"]),
    ],
)
def test_the_answer_says_from_how_many_people_it_was_found_and_whether_those_asked_about_fit(
    capacity: hst.Capacity, asked: dict[str, Any], parts: list[str]
) -> None:
    sentence = hst._capacity_sentence(capacity, hst.Plan(find_capacity=True, **asked).options())
    assert [part for part in parts if part not in sentence] == [], sentence
    assert ("at a time" in sentence) is ("max_servers" in asked) and (" are " in sentence) is ("within_s" in asked)


def test_a_rate_of_which_the_hub_let_only_a_part_be_sent_is_not_sustained() -> None:
    plan = hst.Plan(hst.ACTIVITY, rate_per_s=10.0, duration_s=4.0, fail_if=(hst.condition("failed_rate > 1%"),))
    load, seen = hst.Load(plan, "http://x", ("a",)), hst.Recorder()
    for n in range(30):
        seen.add(hst.Event("activity", "a", n / 10, n / 10, n / 10 + 0.01))
    step = hst.judge_step(load, seen, hst.Traffic(), plan, cpu_share=0.1)
    assert (step.held, step.generator_bound) == ("10 of 40 requests could not be sent in time", False)


# ==== People a minute ================================================================================================


@pytest.mark.parametrize(
    ("truth", "tried", "sustained"),
    [
        (0, [6, 3, 2, 1], None),  # people of a step: they are whole
        (1, [6, 3, 2, 1], 1),
        (2.5, [6, 3, 2], 2),
        (7, [6, 12, 9, 8, 7], 7),
        (199, [6, 12, 24, 48, 96, 192, 384, 288, 240, 216, 204, 198], 198),
    ],
)
def test_people_are_whole_in_each_step_and_none_is_tried_twice(
    truth: float, tried: list[int], sustained: int | None
) -> None:
    steps: list[hst.CapacityStep] = []
    grain = 1 / 7  # of steps of 7 s
    while (rate := hst.next_rate(steps, 6.2 * grain, grain)) and len(steps) < 40:
        held = "failed > 0" if rate > (truth + 0.01) * grain else None
        steps.append(hst.CapacityStep(rate, rate, 0.01, 0, held, generator_bound=False))
    assert [step.rate_per_s / grain for step in steps] == pytest.approx(tried)
    found = hst.sustained_rate(steps)
    assert (None if found is None else round(found / grain)) == sustained


@pytest.mark.parametrize(
    ("truth", "tried"),
    [
        (99, [6, 12, 24, 30]),  # 48 are too many
        (24, [6, 12, 24, 30, 27, 26, 25]),
    ],
)
def test_a_search_tries_as_many_people_as_there_may_be_servers(truth: int, tried: list[int]) -> None:
    steps: list[hst.CapacityStep] = []
    while (rate := hst.next_rate(steps, 0.1, 1 / 60, most_per_s=30 / 60)) and len(steps) < 40:
        held = "failed > 0" if round(60 * rate) > truth else None
        steps.append(hst.CapacityStep(rate, rate, 0.01, 0, held, generator_bound=False))
    assert [round(60 * step.rate_per_s) for step in steps] == tried
    capacity = hst.capacity_of(hst.Plan(max_servers=30), steps, finished=True)
    assert capacity.people_per_minute == pytest.approx(min(truth, 30))
    by_option = "--max-servers 30: the hub may take more"
    assert (capacity.finished, capacity.limited_by) == ((False, by_option) if truth == 99 else (True, None))


@pytest.mark.parametrize(
    ("waits_s", "behind"),
    [
        ([], False),
        ([9.0], False),
        ([1.0, 2.1], True),
        ([1.0, 2.0], False),  # not by more than a second
        ([4.0] * 4 + [5.9] * 4, False),  # not by half
        ([4.0] * 4 + [6.1] * 4, True),
        ([1.0, 9.0, 1.0, 1.0] * 10, False),  # some wait long, but not ever longer
        ([1.0] * 30 + [3.0] * 10, True),
        ([3.0] * 10 + [1.0] * 30, False),
    ],
)
def test_a_hub_falls_behind_when_the_last_wait_longer_than_the_first(waits_s: list[float], behind: bool) -> None:
    assert hst.falls_behind(waits_s) is behind


IDLE_HUB = hst.HubFigures(1, 0.2, 0.2, 0, 0, 0, None, 0.05, 0.1, 99, 9, {}, {"success": hst.OwnDurations(9, 1.0)})


BUSY_HUB = {"cpu_share_max": 0.9}
LATE_HUB = {"cpu_share_max": 0.6, "event_loop_lag_p95_s": 0.5}  # on a busy machine


def limit_of(
    waits_s: tuple[float, float, float],
    more: dict[str, Any] | None,
    held: str = "the hub fell behind: …",
    failures: Iterable[hst.Event] = (),
    in_front: bool = False,
) -> str:
    """The limit by how long people waited for a server and for work, and were throttled; and by the hub's figures."""
    ready_s, at_work_s, throttled_s = waits_s
    seen = hst.new_recorder()
    seen.add(hst.Event("start_server", "x", 0.0, 0.0, 5.0, backoff_s=throttled_s))
    seen.add(hst.Event("server_ready", "x", 0.0, 0.0, ready_s))
    seen.add(hst.Event("at_work", "x", 0.0, 0.0, at_work_s))
    for event in failures:
        seen.add(event)
    own = None if more is None else dataclasses.replace(IDLE_HUB, **more)
    return hst.limit_of(hst.CapacityStep(1.0, 1.0, 1.0, 0, held, False), seen, own, in_front)


@pytest.mark.parametrize(
    ("waits_s", "more", "limit"),
    [
        ((5.0, 5.0, 0.0), BUSY_HUB, Limit.PROCESSOR),
        ((5.0, 5.0, 3.0), BUSY_HUB, Limit.PROCESSOR),  # which makes it throttle, too
        ((5.0, 5.0, 3.0), LATE_HUB, Limit.PROCESSOR),
        ((5.0, 5.0, 3.0), {}, Limit.THROTTLING),
        ((5.0, 5.0, 0.0), {}, Limit.UNKNOWN),  # 4 s that were not the spawner's
        ((1.2, 1.5, 0.0), {}, Limit.SPAWN),
        ((1.2, 9.0, 0.0), {}, Limit.PROXY),
        ((5.0, 5.0, 3.0), None, Limit.THROTTLING),
        ((5.0, 5.0, 0.0), None, Limit.UNKNOWN),
    ],
)
def test_what_kept_a_hub_from_taking_more_people(
    waits_s: tuple[float, float, float], more: dict[str, Any] | None, limit: Limit
) -> None:
    assert limit_of(waits_s, more) == limit.value
    in_front = Limit.FRONT if limit is Limit.THROTTLING else limit
    assert limit_of(waits_s, more, in_front=True) == in_front.value
    step = hst.CapacityStep(1.0, 1.0, 1.0, 0, "the generator could not send this rate", generator_bound=True)
    assert hst.limit_of(step, hst.Recorder(), None) == Limit.GENERATOR.value


@pytest.mark.parametrize(
    ("held", "waits_s", "more", "limit"),
    [
        ("visit.p95 > 5s", (1.2, 1.4, 0.0), {}, Limit.PROXY),  # though servers were ready, and the spawner slow
        ("visit.p95>5s", (1.2, 1.4, 1.0), BUSY_HUB, Limit.PROCESSOR),
        ("at_work.p95 > 5s", (1.2, 9.0, 0.5), {}, Limit.PROXY),  # most of the wait, whatever was throttled
        ("at_work.p95 > 5s", (1.2, 1.5, 0.0), {}, Limit.SPAWN),
        ("server_ready.p95 > 1s", (1.2, 9.0, 0.0), {}, Limit.SPAWN),  # whatever came later
        ("server_ready.p95 > 1s", (1.2, 9.0, 0.5), {}, Limit.THROTTLING),
        ("server_ready.p95 > 1s", (5.0, 9.0, 0.0), {}, Limit.UNKNOWN),
        ("throttled > 0", (1.2, 9.0, 0.01), {}, Limit.THROTTLING),
        ("ping.p95 > 1s", (1.2, 9.0, 3.0), None, Limit.PROCESSOR),
        ("ping.failed > 0", (1.2, 9.0, 3.0), {"cpu_share_max": 0.5}, Limit.PROCESSOR),
        ("ping.p95 > 1s", (1.2, 9.0, 3.0), {"cpu_share_max": 0.1}, Limit.UNKNOWN),  # its thread had little to do
    ],
)
def test_the_condition_that_broke_a_step_has_a_say_in_what_the_limit_was(
    held: str, waits_s: tuple[float, float, float], more: dict[str, Any] | None, limit: Limit
) -> None:
    assert limit_of(waits_s, more, held) == limit.value


def failing(step: str, kind: hst.Kind, text: str, number: int) -> list[hst.Event]:
    return [hst.Event(step, f"{text} {n}", 0.0, 0.0, 9.0, hst.Reason(kind, text)) for n in range(number)]


NO_MEMORY = failing("server_ready", hst.Kind.SPAWN, "no memory", 3)
NOT_READY = failing("server_ready", hst.Kind.TIMED_OUT, "not ready", 2)
NO_PAGE = failing("visit", hst.Kind.ROUTE, "503", 1)


@pytest.mark.parametrize(
    ("held", "failures", "more", "limit"),
    [
        ("failed > 0", NO_MEMORY + NO_PAGE, BUSY_HUB, "3 × no memory"),
        ("failed_rate > 1%", NO_MEMORY + NOT_READY, {}, "3 × no memory"),
        ("visit.failed > 0", NO_MEMORY + NO_PAGE, {}, "1 × 503"),
        ("2 of 9 people never came, after failures in a row", NO_MEMORY, {}, "3 × no memory"),
        ("failed > 0", NOT_READY + NO_PAGE, BUSY_HUB, Limit.PROCESSOR.value),  # a time-out is a wait
        ("failed > 0", NOT_READY, None, "2 × not ready"),
        ("server_ready.p95 > 1s", NO_MEMORY, BUSY_HUB, Limit.PROCESSOR.value),
    ],
)
def test_failures_that_break_a_step_are_the_limit(
    held: str, failures: list[hst.Event], more: dict[str, Any] | None, limit: str
) -> None:
    assert limit_of((5.0, 5.0, 0.0), more, held, failures).endswith(limit)


def test_a_hub_that_starts_two_servers_a_second_takes_120_people_a_minute(
    make_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = make_hub(concurrent_spawn_limit=2, spawn_s=1.0, slow_spawn_timeout_s=0)
    words = ("stress-test", "--find-capacity", "--duration", "5s", "--rate", "1.6", "-c", "60", "--within", "2m")
    done, found = run_for_results(tmp_path / "r", *words, hub=hub)
    assert not tool_users(hub)
    capacity = found["capacity"]
    assert done.code == 0 and 72 <= capacity["people_per_minute"] <= 150, done
    assert done.summary.startswith(f"PASSED: this hub takes {capacity['people_per_minute']:.4g} people a minute (")
    assert "60 in 2 min 0 s are 30 a minute: fits, " in " ".join(done.summary.split())
    assert capacity["people_per_minute"] == pytest.approx(60 * capacity["rate_per_s"])
    people = sum(round(5 * step["rate_per_s"]) for step in capacity["steps"])
    expected = {"created": people, "deleted": people, "kept": 0, "left_behind": []}
    assert found["users"] == found["users"] | expected
    assert found["operations"]["server_ready"]["count"] == round(5 * capacity["rate_per_s"])
    assert (found["servers"], found["people"], found["conditions"], found["failed"]) == (None, None, [], 0)
    held = [step for step in capacity["steps"] if step["held"]]
    assert all(step["held"].startswith("the hub fell behind") for step in held)
    assert {step["limited_by"] for step in held} == {Limit.THROTTLING.value} == {capacity["limited_by"]}
    assert capacity["limited_by"] in done.summary


def test_people_who_never_came_after_failures_in_a_row_are_not_late(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("--find-capacity", "--duration", "2s", "--rate", "2", "--fail-fast", "--fail-if", "failed > 9")
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, "--profile", '{"fail_rate": 1}', hub=new_hub)
    held = found["capacity"]["steps"][0]["held"]
    assert re.fullmatch("[123] of 4 people never came, after failures in a row", held)
    assert held.partition(",")[0] in done.stdout and not tool_users(new_hub)


def test_a_search_for_people_in_which_all_fail_says_why(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("--find-capacity", "--duration", "1s", "--rate", "1", "--profile", '{"fail_rate": 1}')
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=new_hub)
    why = "failed > 0 (1 × no node has 4 GB of memory free)"
    assert found["warnings"] == [f"no rate was sustained, not even 60 people a minute: {why}"]
    assert done.code == 1 and not tool_users(new_hub)


def test_an_interrupted_search_for_people_leaves_nobody_and_says_what_it_knows(
    new_hub: LocalHub, tmp_path: Path
) -> None:
    words = ("--duration", "2s", "--rate", "2", "--profile", '{"spawn_s": 0.3}', "--results", str(tmp_path / "r"))
    with start_tool("stress-test", "--find-capacity", *words, hub=new_hub) as run:
        wait_until(lambda: "hub-stress-test-5" in tool_users(new_hub))  # the second step has begun
        wait_until(lambda: any(new_hub.users()[name]["servers"] for name in tool_users(new_hub)))
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    found = results_in(tmp_path / "r", done)
    assert done.code == 130 and not tool_users(new_hub)
    assert [step["rate_per_s"] for step in found["capacity"]["steps"]] == [2.0]
    assert not found["capacity"]["finished"] and done.summary.startswith("INTERRUPTED: ")
