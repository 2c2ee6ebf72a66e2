"""The summary: the verdict, the outcome of servers and people, advice, a but, widths, and golden pages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

import golden
import hub_stress_test as hst
from hub_stress_test import Event, ExitCode, Kind, Reason
from made_up import REFUSED, did, failed, folded, held, hub_with, pings, ready, results_of, sentences, throttled


@pytest.mark.parametrize("page", golden.PAGES)
def test_a_page_is_the_golden_one(page: Callable[[], str]) -> None:
    assert golden.is_golden(page() + "\n", page.__name__)


# ==== The verdict ====================================================================================================


@pytest.mark.parametrize(
    ("code", "word", "colour"),
    [
        (ExitCode.OK, "PASSED", 32),
        (ExitCode.FAILED, "FAILED", 31),
        (ExitCode.LEFT_BEHIND, "LEFT SOMETHING BEHIND", 31),
        (ExitCode.SIGINT, "INTERRUPTED", 33),
        (ExitCode.SIGTERM, "INTERRUPTED", 33),
    ],
)
def test_the_first_word_is_how_the_run_ended(code: ExitCode, word: str, colour: int) -> None:
    results = results_of([ready(1)], exit_code=int(code))
    assert hst.verdict_of(results)[0] == word
    assert hst.render_summary(results).startswith(f"{word}: 1 of 1 server ")
    assert hst.render_summary(results, colour=True).startswith(f"\033[1;{colour}m{word.split()[0]}\033[0m")


REPORT, READ = did("activity", 1, 1.0), did("read", 1, 1.0)
MIXED = hst.Plan(hst.ACTIVITY, mix={"activity": 1.0, "read": 1.0}).options()
OF_LOAD: dict[str, Any] = {"command": hst.ACTIVITY, "servers": None, "options": hst.Plan(hst.ACTIVITY).options()}
OF_PURGE: dict[str, Any] = {"command": hst.PURGE, "servers": None, "users": hst.Users(0, 7)}


@pytest.mark.parametrize(
    ("events", "requested", "more", "numbers"),
    [
        ([], 3, {}, "0 of 3 servers, 0 failed, 3 not begun"),
        ([failed(1)], 1, {}, "0 of 1 server"),
        ([ready(1), failed(2)], 3, {}, "1 of 3 servers, 1 failed, 1 not begun"),
        ([ready(1), ready(2), held(1, lost=True), held(2)], 2, {}, "2 of 2 servers; 1 was lost"),
        ([ready(1), ready(2), held(1, lost=True), held(2, lost=True)], 2, {}, "2 of 2 servers; 2 were lost"),
        ([], 0, OF_PURGE, "7 users removed"),
        ([REPORT] * 3 + [did("activity", 1, 1.0, REFUSED)], 0, OF_LOAD, "3 of 4 activity reports were"),
        ([REPORT], 0, OF_LOAD, "1 of 1 activity report was"),
        ([REPORT, READ, *pings(0.1)], 0, OF_LOAD | {"options": MIXED}, "2 of 2 requests were"),
        ([], 0, OF_LOAD | {"capacity": hst.Capacity(None, None, False, [])}, "no rate was sustained"),
        ([], 0, OF_LOAD | {"capacity": hst.Capacity(42.4, None, True, [])}, "at least 42 requests per second"),
    ],
)
def test_the_verdict_counts_what_was_asked_for(
    events: list[Event], requested: int, more: dict[str, Any], numbers: str
) -> None:
    assert numbers in hst.verdict_of(results_of(events, requested, **more))[1].replace(" became ready", "")


@pytest.mark.parametrize(("good", "bad", "quoted"), [(19, 100, False), (20, 0, True)])
def test_the_verdict_quotes_a_95th_percentile_from_twenty_on(good: int, bad: int, quoted: bool) -> None:
    events = [*(ready(n, n) for n in range(1, good + 1)), *(failed(n) for n in range(101, 101 + bad))]
    sentence = hst.verdict_of(results_of(events))[1]
    assert ("95 %" in sentence) is quoted and sentence.endswith(f", the slowest {good}.0 s")


@pytest.mark.parametrize(
    ("number", "cells"),
    [
        (0, ["–"] * 5),
        (9, ["1.00 s", "1.00 s", "–", "–", "1.00 s"]),
        (20, ["1.00 s", "1.00 s", "1.00 s", "–", "1.00 s"]),
        (100, ["1.00 s"] * 5),
    ],
)
def test_a_percentile_of_too_few_is_a_dash(number: int, cells: list[str]) -> None:
    results = results_of([*(ready(n) for n in range(1, number + 1)), failed(number + 1)])
    latency, comparison = hst.tables_of(results, hst.as_json(results))
    assert list(latency.rows[0]) == ["server ready", str(number + 1), "1", *cells]
    _, p50, p95, *_ = comparison.rows[0]
    assert (p50.startswith("–"), p95.startswith("–")) == (cells[1] == "–", cells[2] == "–")


@pytest.mark.parametrize(
    ("figures", "lag"),
    [
        ({"event_loop_samples": 19}, "; event loop late by ≤ 60 ms (max)"),
        ({"event_loop_samples": 20}, "; event loop late by ≤ 50 ms (p95), ≤ 60 ms (max)"),
        ({"event_loop_lag_p95_s": None, "event_loop_lag_max_s": None, "event_loop_samples": 0}, ""),
    ],
)
def test_the_lag_of_the_event_loop_needs_samples(figures: dict[str, Any], lag: str) -> None:
    (sentence,) = sentences(results_of([ready(1)], hub=hub_with(**figures)), "hub's own")
    assert sentence.endswith(f"memory 110 MB before, 115 MB after{lag}")


# ==== The outcome of servers and people ==============================================================================


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ([12, 7, 1, 30], "(hub-stress-test-1, hub-stress-test-7, hub-stress-test-12, hub-stress-test-30)"),
        ([12, 7, 1, 30, 9], "(hub-stress-test-1, hub-stress-test-7, hub-stress-test-9 and 2 more, all in --results)"),
    ],
)
def test_a_few_users_are_named_for_each_reason(numbers: list[int], named: str) -> None:
    (sentence,) = sentences(results_of([failed(n, "no node is free") for n in numbers]), "failed")
    assert sentence.startswith(f"{len(numbers)} × no node is free {named}, ")


def test_the_commonest_reasons_are_shown_and_the_rest_is_counted() -> None:
    events = [failed(10 * kind + n, f"reason {'abcdefg'[kind - 1]}") for kind in range(1, 8) for n in range(kind)]
    shown = [sentence.partition(" (")[0] for sentence in sentences(results_of(events), "failed")]
    assert shown[:-1] == [f"{kind} × reason {'abcdefg'[kind - 1]}" for kind in (7, 6, 5, 4, 3)]
    assert shown[-1].startswith("3 × something else")


def test_each_failed_or_lost_server_is_named_in_the_results() -> None:
    events = [failed(n, "no node is free", message=f"word {n}") for n in range(1, 9)]
    servers = results_of([*events, ready(9), held(9, lost=True)], requested=12).servers
    assert servers and (servers.ready, servers.failed, servers.lost, servers.not_begun) == (1, 11, 1, 3)
    assert [(each.user, each.message, each.failed_s) for each in servers.failures] == [
        *((hst.username(n), f"word {n}", 1.0) for n in range(1, 9)),
        (hst.username(9), "", 20.0),
    ]
    assert list(servers.reasons.values()) == [8, 3, 1] and servers.reasons["never started"] == 3


def test_an_interrupted_run_counts_who_was_under_way() -> None:
    starting = {hst.username(n) for n in (2, 4, 5)}
    rows = folded([ready(1), ready(2), failed(3)]).people
    servers = hst.servers_of(rows, 12, True, starting=starting)
    assert (servers.under_way, servers.not_begun) == (2, 7)
    assert servers.reasons["never started, or cut short"] == 9
    people = hst.people_of({}, 12, True, starting=starting)
    assert (people.under_way, people.not_begun, people.failed) == (3, 9, 12)


def test_a_message_of_every_server_says_nothing_of_the_slowest() -> None:
    events = [ready(n, n, message="Pulling the image") for n in range(1, 8)]
    assert sentences(results_of(events), "slowest") == []
    assert len(sentences(results_of([*events, ready(8, message="Starting")]), "slowest")) == 1


@pytest.mark.parametrize("text", ["0/3 nodes are available: insufficient memory", "pods is forbidden: quota"])
def test_messages_reveal_kubernetes(text: str) -> None:
    assert hst.on_kubernetes(results_of([failed(7, text)])) and not hst.on_kubernetes(results_of([failed(7)]))


def test_users_who_are_kept_have_their_command() -> None:
    (sentence,) = sentences(results_of([ready(1)], users=hst.Users(20, kept=20)), "cleanup")
    assert sentence.startswith("20 users kept") and sentence.endswith(": hub-stress-test purge")


# ==== What to look at next, and a but ================================================================================


@pytest.mark.parametrize(
    ("kinds", "events", "more", "advised"),
    [
        ({Kind.NO_ANSWER}, [ready(1)], {}, ["got no answer"]),
        ({Kind.SERVER_LIMIT}, [throttled(1), failed(2)], {}, ["c.JupyterHub.active_server_limit", "hub's log for"]),
        ({Kind.TIMED_OUT}, [failed(1, kind=Kind.TIMED_OUT)], {}, ["raise --server-timeout"]),
        ({Kind.SPAWN}, [failed(1)], {}, ["hub's log for the users named above"]),
        ({Kind.SPAWN}, [failed(1, "no node has room")], {}, ["did not fit on the nodes"]),
        ({Kind.SPAWN}, [failed(1), failed(2)], {}, ["--profile", "hub's log for"]),
        ({Kind.SPAWN}, [failed(1, "KeyError: getpwnam()"), failed(2)], {}, ["unix accounts", "hub's log for"]),
        ({Kind.LOST}, [ready(1), held(1, lost=True)], {}, ["hub's log for the users", "idle culler"]),
        (set(), [throttled(1)], {}, ["raise c.JupyterHub.concurrent_spawn_limit"]),
        (set(), [ready(1)], {"hub": hub_with(cpu_share_max=0.93)}, ["CPU-bound: it used 93 % of a processor"]),
        (set(), [ready(1)], {"hub": hst.HubSide("", "", 1, None, None)}, ["the hub restarted: find out why"]),
        (set(), [], {"http": hst.Http(9, 0, 0, {"502": 1}, 0, 0.0, None, {"502": 1})}, ["answered 5xx"]),
        (set(), [], {"http": hst.Http(9, 0, 0, {"429": 1}, 0, 0.0, None, {"429": 1})}, ["(429)"]),
        (set(), [], {"http": hst.Http(9, 0, 0, {"403": 2}, 0, 0.0, None, {"403": 1})}, ["(403)", "denies"]),
        (set(), [ready(1)], {}, []),
    ],
)
def test_advice_follows_from_how_it_failed(
    kinds: set[Kind], events: list[Event], more: dict[str, Any], advised: list[str]
) -> None:
    given = list(hst.advice(results_of(events, **more), kinds))
    assert len(given) == len(advised)
    for sentence, part in zip(given, advised):
        assert part in sentence


STARTS = {number: [throttled(n) if n <= number else ready(n) for n in range(1, 21)] for number in (0, 5, 17)}
P95 = hst.Judgement("server_ready.p95 > 60s", 1.0, False)


@pytest.mark.parametrize(
    ("events", "more", "parts"),
    [
        (pings(*[0.1] * 200), {}, []),
        (pings(*[0.1] * 200, failed=3), {}, ["3 of 203 pings failed"]),
        (pings(*[0.1] * 200, 2.9), {}, []),
        (pings(*[0.1] * 200, 3.1), {}, ["up to 3.10 s"]),
        (pings(*[0.1] * 200, *[1.2] * 3), {}, []),
        (pings(*[0.1] * 20, *[1.2] * 3), {}, ["up to 1.20 s"]),
        (pings(*[0.1] * 16, *[1.2] * 3), {}, []),  # too few for a p95
        (pings(8.3), {"hub": hub_with(cpu_share_max=0.98)}, ["up to 8.30 s: the hub's one thread was full"]),
        (pings(0.1), {"hub": hub_with(cpu_share_max=0.98)}, ["full: it used up to 98 %"]),
        (pings(0.1), {"hub": hub_with(cpu_share_max=0.5)}, []),
        (pings(0.1), {"hub": hub_with(cpu_share_max=0.4, event_loop_lag_p95_s=0.425)}, ["late: by 425 ms"]),
        (STARTS[17], {}, ["17 of 20 starts"]),
        (STARTS[5], {}, []),
        ([ready(1)], {"warnings": ["the hub restarted"]}, ["the hub restarted"]),
        ([ready(1)], {"conditions": [P95, P95]}, ["server_ready.p95 is only the maximum of 1 sample"]),
        (STARTS[0], {"conditions": [P95]}, []),
        (pings(8.3), {"capacity": hst.Capacity(42.4, 12720, False, [])}, []),
        (pings(8.3), {"command": hst.PURGE}, []),
    ],
)
def test_what_makes_a_but(events: list[Event], more: dict[str, Any], parts: list[str]) -> None:
    given = list(hst.but_of(results_of(events, **more)))
    assert len(given) == len(parts)
    for sentence, part in zip(given, parts):
        assert part in sentence


def test_a_warning_that_is_a_but_is_no_cause() -> None:
    results = results_of([ready(1)], but=["it restarted"], warnings=["it restarted", "written too late"])
    assert (sentences(results, "but"), sentences(results, "because")) == (["it restarted"], ["written too late"])


# ==== Goals, and a baseline ==========================================================================================


@pytest.mark.parametrize(
    ("text", "now", "before", "goal"),
    [
        ("server_ready.p50 > 1.2x", 2.54, 1.21, "✗ server_ready.p50 2.54 s, 2.1x the baseline's 1.21 s (fails "),
        ("server_ready.p50 > 1.2x", 2.54, 1.21, "(fails above 1.45 s, 1.2x the baseline)"),
        ("visit.p50 >= 1.2x", 2.0, None, "✗ visit.p50 not measured (fails at 1.2x the baseline or more)"),
        ("failed_rate > 25%", 0.2, None, "✓ failed_rate 20.0 % (fails above 25 %)"),
        ("failed <= 3", 4, None, "✓ failed 4 (fails at 3 or less)"),
        ("server_ready.p50 < 10m", 2.54, None, "✗ server_ready.p50 2.54 s (fails below 10 min 0 s)"),
        ("hub.metrics.cpu_share_max > 100%", 0.914, None, "✓ hub.metrics.cpu_share_max 91.4 % (fails "),
        ("hub.metrics.rss_max_bytes > 1GB", 1.17e8, None, "✓ hub.metrics.rss_max_bytes 117 MB (fails "),
        ("capacity.rate_per_s > 1", 46.5, None, "✗ capacity.rate_per_s 46.5 (fails "),
    ],
)
def test_a_goal_has_its_metrics_unit_and_its_bound(text: str, now: float, before: float | None, goal: str) -> None:
    def results(value: float | None) -> hst.Json:
        figures = {"cpu_share_max": value, "rss_max_bytes": value}
        found = {"failed": value, "failed_rate": value, "hub": {"metrics": figures}, "capacity": {"rate_per_s": value}}
        return found | {"operations": {"server_ready": {"latency_s": {"p50": value}}}}

    assert goal in hst.goal_text(hst.condition(text).judge(results(now), results(before)))


def test_differences_that_make_a_comparison_pointless() -> None:
    then = hst.as_json(results_of([ready(1)]))
    assert hst.differences_to(then, results_of([ready(1)])) == []
    then["options"] |= {"count": 300, "hold": 90.0, "page": "lab.har"}
    groups = ({"name": "staff", "count": 2, "work": True, "within": 60.0, "page": None},)
    now = results_of([ready(1)], options=hst.Plan().options() | {"work": True, "event": groups})
    assert hst.differences_to(then, now) == [
        "--count was 300, and is 100 now",
        "--hold was 90s, and is not given now",
        "--event was not given, and is name staff, count 2, work given, within 60s now",
        "--page was lab.har, and is not given now",
        "--work was not given, and is given now",
    ]
    then["command"] = "purge"
    assert sentences(now, "baseline", then) == ["the command was purge, and is stress-test now"]


# ==== Width, characters and colours ==================================================================================


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_page_fits_the_width_and_wraps_no_number(width: int) -> None:
    steps = [hst.CapacityStep(16.0, 16.0, 0.02, 0, "activity.p95 > 500ms, or " + "so on " * 20, False)]
    events = [ready(n, 62.1, group="students of the first year") for n in range(1, 101)]
    results = results_of(events, capacity=hst.Capacity(16.0, 4800, False, steps))
    lines = hst.render_summary(results, hst.as_json(results), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.count("62.1 s") == 5 for line in lines)
    facts = dataclasses.replace(results, operations={}, capacity=None)
    narrow, wide = (hst.render_summary(facts, width=columns) for columns in (width, 1000))
    assert narrow.split() == wide.split() and max(map(len, narrow.splitlines())) <= width


def test_missing_characters_are_spelled() -> None:
    goals = [hst.Judgement("failed_rate > 25%", 0.2, False), hst.Judgement("failed >= 3", 3.0, True)]
    results = results_of([failed(1, "no node in Zürich ☃")], conditions=goals)
    plain = hst.render_summary(results, encoding="ascii")
    assert plain.isascii() and "ok failed_rate " in plain and "FAIL failed 3 (" in plain
    assert "Zürich" in hst.render_summary(results, encoding="latin-1")


def test_a_pass_does_not_show_its_housekeeping() -> None:
    events = [ready(1), did("create_users", 0, 1.0), *pings(0.1)]

    def rows(events: list[Event]) -> list[str]:
        return [row[0] for row in next(hst.tables_of(results_of(events), None)).rows]

    assert rows(events) == ["server ready", "ping"]
    assert "create users" in rows([*events, failed(2)])
    assert rows([*events, did("list_users", 0, 1.0, REFUSED)]) == ["server ready", "list users", "ping"]


def test_words_that_matter_have_a_colour() -> None:
    results = results_of([failed(1), ready(2)], warnings=["it was cut short"], advice=["look there"])
    plain, coloured = hst.render_summary(results), hst.render_summary(results, colour=True)
    assert re.sub("\033\\[[0-9;]*m", "", coloured) == plain and "\033" not in plain
    words = re.findall("^\033\\[1;([0-9]+)m(\\w+)\033\\[0m", coloured, re.M)
    assert words == [("31", "FAILED"), ("33", "because"), ("31", "failed"), ("36", "next")]


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_the_noun_of_1_is_singular(command: str) -> None:
    of_load = {"servers": None, "options": hst.Plan(command, count=1).options()} if command != hst.STRESS else {}
    events = [ready(1), failed(2), did("activity", 1, 1.0), did("ping", 1, 1.0, Reason(Kind.REFUSED, "500"))]
    users, http = hst.Users(1, 1, stops_failed=1, stopped_while_starting=1), hst.Http(1, 1, 0, {}, 1, 1.0)
    page = hst.render_summary(results_of(events, command=command, users=users, http=http, **of_load))
    assert not re.findall(r"\b1 (?:users|servers|people|activity reports|requests|retries|were|ARE)\b", page)
