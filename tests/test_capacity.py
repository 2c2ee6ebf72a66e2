"""The search for the rate that a hub sustains."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import FaultProxy, Silence, every, first, hub_answer, matching
from known_server import KnownServer
from localhub import LocalHub
from test_faults import FromThenOn
from tool import results_in, run_for_results, start_tool, tool_users, wait_until

REPORTS = matching("POST", "/activity$")

# ==== Which rates are tried ==========================================================================================


def searched(
    first_per_s: float,
    truth: float,
    grain: float = 0.0,
    most: float = math.inf,
    sendable: float = math.inf,
    cold: int = 0,
) -> tuple[list[float], float | None, list[hst.CapacityStep]]:
    """The rates of a search on a hub that sustains `truth` once it is warm, the one that it finds, and its steps."""
    steps, rates = list[hst.CapacityStep](), list[float]()
    while (rate := hst.next_rate(steps, first_per_s, grain, most)) and len(steps) < 40:
        held = "too slow" if rate > min(truth, sendable) + grain / 100 or len(rates) < cold else None
        rates.append(rate)
        step = hst.CapacityStep(rate, rate, 0.01, 0, held, generator_bound=rate > sendable)
        steps = hst.without_cold_start([*steps, step])
    return rates, hst.sustained_rate(steps), steps


@pytest.mark.parametrize("truth", [1.2, 3, 17, 128, 131.5, 4000])
def test_a_search_ends_within_five_percent_below_the_truth(truth: float) -> None:
    rates, sustained, _ = searched(16, truth)
    assert len(rates) < 40
    assert sustained is not None and sustained <= truth < sustained * 1.06


@pytest.mark.parametrize(
    ("limits", "rates", "sustained"),
    [
        ((16, 0), [16, 8, 4, 2, 1], None),
        ((100, 1000, 0.0, math.inf, 150), [100, 200], 100),  # of what this tool cannot send nothing is known
        # People of a step are whole; the steps here take one second.
        ((6.2, 0, 1.0), [6, 3, 2, 1], None),
        ((6.2, 199, 1.0), [6, 12, 24, 48, 96, 192, 384, 288, 240, 216, 204, 198], 198),
        ((6, 24, 1.0, 30), [6, 12, 24, 30, 27, 26, 25], 24),  # no more than --max-servers
        # The first step is tried again: its people may have waited for nodes and images.
        ((6, 24, 1.0, 30, math.inf, 1), [6, 3, 6, 12, 24, 30, 27, 26, 25], 24),
        ((6, 4, 1.0), [6, 3, 6, 4, 5], 4),
        ((24, 7, 1.0), [24, 12, 6, 9, 8, 7], 7),  # but no other step is
    ],
)
def test_rates_are_doubled_then_halved_between(
    limits: tuple[float, ...], rates: list[float], sustained: float | None
) -> None:
    assert searched(*limits)[:2] == (rates, sustained)


@pytest.mark.parametrize(
    ("truth", "answer"), [(99, (False, 1800, "--max-servers 30: the hub may take more")), (24, (True, 1440, None))]
)
def test_a_search_that_only_max_servers_ended_is_not_finished(truth: int, answer: tuple[Any, ...]) -> None:
    capacity = hst.capacity_of(hst.Plan(max_servers=30), searched(6, truth, 1.0, 30)[2], finished=True)
    assert (capacity.finished, capacity.people_per_minute, capacity.limited_by) == answer


# ==== How a step is judged ===========================================================================================


@pytest.mark.parametrize(
    ("waits_s", "behind"),
    [
        ([], False),
        ([1.0, 2.1], True),
        ([1.0, 2.0], False),  # not by more than a second
        ([4.0] * 4 + [5.9] * 4, False),  # not by half
        ([4.0] * 4 + [6.1] * 4, True),
        ([1.0, 9.0, 1.0, 1.0] * 10, False),  # some wait long, but not ever longer
    ],
)
def test_a_hub_falls_behind_when_the_last_wait_longer(waits_s: list[float], behind: bool) -> None:
    assert hst.falls_behind(waits_s) is behind


@pytest.mark.parametrize(
    ("command", "step", "cpu_share", "held"),
    [
        (hst.ACTIVITY, "activity", 0.1, "10 of 40 requests could not be sent in time"),
        (hst.ACTIVITY, "activity", 0.9, "the generator could not send this rate"),
        (hst.STRESS, "server_ready", 0.9, "10 of 40 people never came, after failures in a row"),  # not late
    ],
)
def test_a_rate_that_was_not_reached_is_not_sustained(command: str, step: str, cpu_share: float, held: str) -> None:
    mix, conditions = {step: 1.0}, (hst.condition("failed_rate > 1%"),)
    plan = hst.Plan(command, rate_per_s=10.0, duration_s=4.0, mix=mix, fail_if=conditions)
    record = hst.Recorder()
    for n in range(30):
        record.add(hst.Event(step, "a", n / 10, n / 10, n / 10 + 0.01))
    judged = hst.judge_step(hst.Load(plan, "http://x", ("a",)), record, hst.Traffic(), cpu_share)
    assert (judged.held, judged.generator_bound) == (held, held.startswith("the generator"))


def test_a_rare_operation_that_was_not_sent_holds_nothing() -> None:
    plan = hst.Plan(
        hst.ACTIVITY, rate_per_s=10.0, duration_s=3.0, mix={"activity": 1000.0, "list": 1.0}, find_capacity=True
    )
    record = hst.Recorder()
    for n in range(30):
        record.add(hst.Event("activity", "a", n / 10, n / 10, n / 10 + 0.01))
    assert hst.judge_step(hst.Load(plan, "http://x", ("a",)), record, hst.Traffic(), 0.1).held is None


@pytest.mark.parametrize(
    ("p95s_s", "ready_s", "doubt"),
    [
        ([(1.0, 0.2, None), (3.0, 4.0, "slow"), (2.0, 3.0, "slow")], 1.0, []),
        ([(1.0, 0.2, None), (3.0, 1.0, "slow"), (2.0, 3.0, "slow")], 1.0, ["the steps contradict each other"]),
        ([(1.0, 0.2, None)], 9.0, ["are too short: a start takes"]),
        ([(1.0, 0.2, "slow")], 1.0, ["no rate was sustained, not even so many: slow"]),
    ],
)
def test_a_search_doubts_what_its_steps_contradict(
    p95s_s: list[tuple[float, float, str | None]], ready_s: float, doubt: list[str]
) -> None:
    steps = [hst.CapacityStep(rate, rate, p95_s, 0, held, False) for rate, p95_s, held in p95s_s]
    record = hst.Recorder()
    record.add(hst.Event("server_ready", "x", 0.0, 0.0, ready_s))
    said = list(hst.doubts(hst.Plan(duration_s=30.0), steps, record, "so many"))
    assert len(said) == len(doubt) and all(part in sentence for part, sentence in zip(doubt, said)), said


# ==== What the limit was =============================================================================================

IDLE_HUB = hst.HubFigures(1, 0.2, 0.2, 0, 0, 0, None, 0.05, 0.1, 99, 9, {}, {"success": hst.OwnDurations(9, 1.0)})
BUSY_HUB = dataclasses.replace(IDLE_HUB, cpu_share_max=0.9)
LATE_HUB = dataclasses.replace(IDLE_HUB, cpu_share_max=0.6, event_loop_lag_p95_s=0.5)  # on a busy machine


def failing(step: str, kind: hst.Kind, text: str, number: int) -> list[hst.Event]:
    return [hst.Event(step, f"{text} {n}", 0.0, 0.0, 9.0, hst.Reason(kind, text)) for n in range(number)]


NO_MEMORY = failing("server_ready", hst.Kind.SPAWN, "no memory", 3)
NOT_READY = failing("server_ready", hst.Kind.TIMED_OUT, "not ready", 2)
NO_ROOM = failing("server_ready", hst.Kind.TIMED_OUT, "not ready; the hub said: 1 Insufficient memory", 2)
NO_PAGE = failing("visit", hst.Kind.ROUTE, "503", 1)
BEHIND = "the hub fell behind: the last waited longer than the first"
NOT_SENT = "the generator could not send this rate"
CPU, THROTTLED, SPAWNS, PROXY, UNKNOWN = (
    "CPU-bound",
    "the hub throttled",
    "servers took long",
    "the proxy",
    "do not tell",
)


@pytest.mark.parametrize(
    ("held", "waits_s", "own", "failures", "limit"),  # waits: for a server, for work; then the time throttled
    [
        (NOT_SENT, (5.0, 5.0, 3.0), BUSY_HUB, [], "this machine"),
        (BEHIND, (5.0, 5.0, 3.0), BUSY_HUB, [], CPU),  # which makes it throttle, too
        (BEHIND, (5.0, 5.0, 3.0), LATE_HUB, [], "event loop was late"),
        (BEHIND, (5.0, 5.0, 0.0), IDLE_HUB, [], UNKNOWN),  # 4 s that were not the spawner's
        (BEHIND, (1.2, 9.0, 0.0), IDLE_HUB, [], PROXY),
        (BEHIND, (5.0, 5.0, 3.0), None, [], THROTTLED),
        ("visit.p95 > 5s", (1.2, 1.4, 0.0), IDLE_HUB, [], PROXY),  # though servers were ready, and the spawner slow
        ("at_work.p95 > 5s", (1.2, 1.5, 0.0), IDLE_HUB, [], SPAWNS),
        ("server_ready.p95 > 1s", (1.2, 9.0, 0.0), IDLE_HUB, [], SPAWNS),  # whatever came later
        ("throttled > 0", (1.2, 9.0, 0.01), IDLE_HUB, [], THROTTLED),
        ("ping.p95 > 1s", (1.2, 9.0, 3.0), None, [], UNKNOWN),
        ("failed_rate > 1%", (5.0, 5.0, 0.0), IDLE_HUB, NO_MEMORY + NOT_READY, "3 × no memory"),
        ("visit.failed > 0", (5.0, 5.0, 0.0), IDLE_HUB, NO_MEMORY + NO_PAGE, "1 × 503"),
        ("2 of 9 people never came, after …", (5.0, 5.0, 0.0), IDLE_HUB, NO_MEMORY, "3 × no memory"),
        ("failed > 0", (5.0, 5.0, 0.0), BUSY_HUB, NOT_READY + NO_PAGE, CPU),  # a time-out is a wait
        ("failed > 0", (5.0, 5.0, 0.0), BUSY_HUB, NO_ROOM, "1 Insufficient memory"),
        ("server_ready.p95 > 1s", (5.0, 5.0, 0.0), BUSY_HUB, NO_MEMORY, CPU),
    ],
)
def test_the_limit_follows_from_condition_waits_and_figures(
    held: str, waits_s: tuple[float, float, float], own: hst.HubFigures | None, failures: list[hst.Event], limit: str
) -> None:
    (ready_s, at_work_s, throttled_s), record = waits_s, hst.new_recorder()
    record.add(hst.Event("start_server", "x", 0.0, 0.0, 5.0, backoff_s=throttled_s))
    record.add(hst.Event("server_ready", "x", 0.0, 0.0, ready_s))
    record.add(hst.Event("at_work", "x", 0.0, 0.0, at_work_s))
    for event in failures:
        record.add(event)
    step = hst.CapacityStep(1.0, 1.0, 1.0, 0, held, generator_bound=held == NOT_SENT)
    assert limit in hst.limit_of(step, record, own)
    in_front = "something in front of the hub" if limit == THROTTLED else limit
    assert in_front in hst.limit_of(step, record, own, in_front=True)


# ==== The answer in a sentence =======================================================================================

NONE = hst.Capacity(None, None, False, [])
REQUESTS, PEOPLE = (
    dataclasses.replace(NONE, rate_per_s=64.0),
    hst.Capacity(1.0, None, False, [], people_per_minute=60.0),
)
AT_LEAST = dataclasses.replace(PEOPLE, finished=False)
CLASS = {"count": 300, "within_s": 300.0}


@pytest.mark.parametrize(
    ("capacity", "options", "parts"),
    [
        (NONE, {}, ["no rate was sustained"]),
        (dataclasses.replace(NONE, generator_bound=True), {}, ["this tool could not send"]),
        (dataclasses.replace(NONE, finished=False), {}, ["the search did not finish"]),
        (dataclasses.replace(REQUESTS, finished=False), {}, ["at least 64 requests"]),
        (dataclasses.replace(REQUESTS, rate_per_s=0.3), {}, ["sustains 0.3 requests"]),
        (PEOPLE, {}, ["60 people a minute (found with 60 people in 60.0 s)", "300 in 5 min"]),
        (PEOPLE, {"duration_s": 1.0}, ["(found with 1 person in 1.00 s)"]),
        (AT_LEAST, {"max_servers": 60}, ["at least 60 people a minute with at most 60 servers at a time"]),
        (PEOPLE, CLASS | {"count": 225}, ["class of 225", "225 in 5 min 0 s are 45 a minute: fits, 1.3 t"]),
        (PEOPLE, CLASS, ["are 60 a minute: fits, 1 times"]),
        (PEOPLE, CLASS | {"count": 301}, ["are 60.2 a minute: does not fit: 0.9 times"]),
        (AT_LEAST, CLASS | {"count": 600}, ["are 120 a minute: not known: at least 0.5 times"]),
    ],
)
def test_the_answer_claims_no_more_than_the_search_saw(
    capacity: hst.Capacity, options: dict[str, Any], parts: list[str]
) -> None:
    sentence = hst._capacity_sentence(capacity, hst.Plan(find_capacity=True, **options).options())
    assert [part for part in parts if part not in sentence] == [], sentence
    assert ("at a time" in sentence) is ("max_servers" in options) and (" are " in sentence) is ("within_s" in options)


# ==== Whole searches =================================================================================================


def test_the_capacity_of_a_known_server_is_found(tmp_path: Path) -> None:
    with KnownServer(capacity_per_s=40) as server:
        words = ("activity-stress-test", "-c", "20", "--find-capacity", "--duration", "2s", "--rate", "30")
        words += ("--fail-if", "activity.p95 > 150ms", "--samples", str(tmp_path / "s.csv"))
        done, found = run_for_results(tmp_path / "r", *words, env=server.environment)
        assert server.users() == set()
    capacity = found["capacity"]
    assert done.code == 0
    assert 8 <= capacity["rate_per_s"] <= 48  # less than 40 on a busy machine
    assert capacity["servers_reporting_every_300_s"] == int(capacity["rate_per_s"] * 300)
    interval = re.search(r"JUPYTERHUB_ACTIVITY_INTERVAL=(\d+)", done.summary)
    assert interval and int(interval[1]) == pytest.approx(3000 / (0.1 * capacity["rate_per_s"]), abs=2)
    assert f"{capacity['rate_per_s']:.0f} requests per second" in done.summary.splitlines()[0]
    assert {step["held"] for step in capacity["steps"]} == {None, "activity.p95 > 150ms"}
    assert not capacity["generator_bound"]
    (sustained,) = (step for step in capacity["steps"] if step["rate_per_s"] == capacity["rate_per_s"])
    assert found["operations"]["activity"]["count"] == sustained["sent_per_s"] * 2  # the operations are that step's
    rows = (tmp_path / "s.csv").read_text()
    assert 0 < found["operations"]["ping"]["count"] < rows.count(",ping,")  # and so are the pings
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


def test_a_capacity_that_is_not_found_fails_the_run(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("--find-capacity", "--duration", "1s", "--rate", "1", "--profile", '{"fail_rate": 1}')
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=new_hub)
    assert done.code == 1 and done.summary.startswith("FAILED: ") and not tool_users(new_hub)
    (warning,) = found["warnings"]
    assert "60 people a minute: failed > 0 (1 × no node has 4 GB of memory free)" in warning
    capacity = found["capacity"]
    assert [(step["rate_per_s"], step["held"]) for step in capacity["steps"]] == [(1, "failed > 0")]
    assert capacity["rate_per_s"] is None and found["operations"]["server_ready"]["failed"] == 1


def test_a_hub_that_throttles_starts_is_limited_by_that(make_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = make_hub(concurrent_spawn_limit=2, spawn_s=1.0, slow_spawn_timeout_s=0)
    words = ("stress-test", "--find-capacity", "--duration", "5s", "--rate", "1.6", "-c", "60", "--within", "2m")
    done, found = run_for_results(tmp_path / "r", *words, hub=hub)
    assert not tool_users(hub)
    capacity = found["capacity"]
    assert done.code == 0 and 12 <= capacity["people_per_minute"] <= 150, done  # fewer on a busy machine
    assert f"{capacity['people_per_minute']:.4g} people a minute (" in done.summary and "fits, " in done.summary
    assert capacity["people_per_minute"] == pytest.approx(60 * capacity["rate_per_s"])
    people = sum(round(5 * step["rate_per_s"]) for step in capacity["steps"])
    made = found["users"]["created"]
    assert made >= people  # of a first step that a stall broke, which is tried again, there is no row
    assert found["users"] == found["users"] | {"deleted": made, "kept": 0, "left_behind": []}
    assert found["operations"]["server_ready"]["count"] == round(5 * capacity["rate_per_s"])
    assert (found["servers"], found["people"], found["conditions"], found["failed"]) == (None, None, [], 0)
    held = [step for step in capacity["steps"] if step["held"]]
    assert all(step["held"].startswith(("the hub fell behind", "server_ready.p95 > ")) for step in held)
    over = [step for step in held if step["rate_per_s"] > 2]  # it starts two a second: a lower rate breaks by a stall
    limits = f"{THROTTLED}|event loop was late|CPU-bound"  # a busy machine has made the hub slow first
    assert all(re.search(limits, step["limited_by"]) for step in over), over
    assert capacity["limited_by"] == min(held, key=lambda step: step["rate_per_s"])["limited_by"]
    assert capacity["limited_by"] in done.summary


FOUR = ("stress-test", "--find-capacity", "--duration", "2s", "--rate", "2")  # people in the first step


def test_a_search_starts_nobody_where_three_starts_have_failed(
    new_hub: LocalHub, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.rule = every(matching("POST", r"-([5-9]|\d\d)/server$"), hub_answer(403, b'{"message": "no pods"}'))
    done, found = run_for_results(tmp_path / "r", *FOUR, hub=new_hub, proxy=proxy)
    capacity = found["capacity"]
    assert done.code == 1 and not capacity["finished"] and not tool_users(new_hub)
    assert {step["held"] for step in capacity["steps"]} == {None} and capacity["people_per_minute"] == 120
    assert "nothing started: the first three starts failed: the hub denies this: no pods (403)" in found["warnings"]


def test_a_search_finds_a_quota_that_refuses_before_anybody_is_ready(
    new_hub: LocalHub, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.rule = every(matching("POST", r"-\d\d/server$"), hub_answer(403, b'{"message": "exceeded quota"}'))
    words = (*FOUR[:-1], "4", "--profile", '{"spawn_s": 5}')  # eight people, and sixteen, of whom nine have room
    done, found = run_for_results(tmp_path / "r", *words, hub=new_hub, proxy=proxy)
    steps = found["capacity"]["steps"]
    assert not tool_users(new_hub) and (steps[0]["rate_per_s"], steps[0]["held"]) == (4, None), done
    assert "never came" in steps[1]["held"] or steps[1]["held"] == "failed > 0"
    assert "exceeded quota" in steps[1]["limited_by"]


def test_a_search_ends_when_the_hub_restarts(make_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = make_hub(database=str(tmp_path / "hub.sqlite"))
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = FromThenOn(matching("DELETE", "-4$"), act=hub.restart)
        done, found = run_for_results(tmp_path / "r", *FOUR, hub=hub, proxy=proxy)
    assert done.code == 1 and "the hub restarted, which ends a search" in found["warnings"] and not tool_users(hub)
    assert len(found["capacity"]["steps"]) == 1 and not found["capacity"]["finished"]


def test_an_interrupted_search_leaves_nobody_and_says_what_it_knows(
    new_hub: LocalHub, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.rule = every(matching("POST", "-5/server$"), Silence())  # the second step does not end
    words = ("--duration", "2s", "--rate", "2", "--profile", '{"spawn_s": 0.3}', "--results", str(tmp_path / "r"))
    with start_tool("stress-test", "--find-capacity", *words, hub=new_hub, proxy=proxy) as run:
        wait_until(lambda: "hub-stress-test-5" in tool_users(new_hub))  # the second step has begun
        wait_until(lambda: any(new_hub.users()[name]["servers"] for name in tool_users(new_hub)))
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    found = results_in(tmp_path / "r", done)
    assert done.code == 130 and not tool_users(new_hub)
    assert [step["rate_per_s"] for step in found["capacity"]["steps"]] == [2.0]
    assert not found["capacity"]["finished"] and done.summary.startswith("INTERRUPTED: ")
