"""The summary: the verdict, the outcome of servers and people, advice, a but, widths, and golden pages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

import golden
import hub_stress_test as hst
from hub_stress_test import Event, Kind, Reason
from made_up import REFUSED, did, failed, folded, held, hub_with, pings, ready, results_of, sentences, throttled


@pytest.mark.parametrize("page", golden.PAGES)
def test_a_page_is_the_golden_one(page: Callable[[], str]) -> None:
    assert golden.is_golden(page() + "\n", page.__name__)


# ==== The verdict ====================================================================================================


REPORT, READ = did("activity", 1, 1.0), did("read", 1, 1.0)
MIXED = hst.Plan(hst.ACTIVITY, mix={"activity": 1.0, "read": 1.0}).options()
OF_LOAD: dict[str, Any] = {"command": hst.ACTIVITY, "servers": None, "options": hst.Plan(hst.ACTIVITY).options()}
OF_PURGE: dict[str, Any] = {"command": hst.PURGE, "servers": None, "users": hst.Users(0, 7)}


@pytest.mark.parametrize(
    ("events", "requested", "more", "numbers"),
    [
        ([], 3, {}, "0 of 3 servers, 0 failed, 3 not begun"),
        ([ready(1), ready(2), held(1, lost=True), held(2)], 2, {}, "2 of 2 servers; 1 was lost"),
        ([ready(1), ready(2), held(1, lost=True), held(2, lost=True)], 2, {}, "2 of 2 servers; 2 were lost"),
        ([], 0, OF_PURGE, "7 users removed"),
        ([REPORT] * 3 + [did("activity", 1, 1.0, REFUSED)], 0, OF_LOAD, "3 of 4 activity reports were"),
        ([REPORT], 0, OF_LOAD, "1 of 1 activity report was"),
        ([REPORT, READ, *pings(0.1)], 0, OF_LOAD | {"options": MIXED}, "2 of 2 requests were"),
    ],
)
def test_the_verdict_counts_what_was_asked_for(
    events: list[Event], requested: int, more: dict[str, Any], numbers: str
) -> None:
    assert numbers in hst.verdict_of(results_of(events, requested, **more))[1].replace(" became ready", "")


def test_a_percentile_of_too_few_is_a_dash() -> None:
    results = results_of([*(ready(n) for n in range(1, 10)), failed(10)])
    latency, comparison = hst.tables_of(results, hst.as_json(results))
    assert latency.rows[0] == ("server ready", "10", "1", "1.00 s", "1.00 s", "–", "–", "1.00 s")
    assert [cell.startswith("–") for cell in comparison.rows[0][1:4]] == [False, True, False]


@pytest.mark.parametrize(("samples", "shown"), [(0, ""), (19, "≤ 60 ms (max)")])
def test_the_lag_of_the_event_loop_needs_samples(samples: int, shown: str) -> None:
    lags_s = {} if samples else {"event_loop_lag_p95_s": None, "event_loop_lag_max_s": None}
    results = results_of([ready(1)], hub=hub_with(event_loop_samples=samples, **lags_s))
    assert sentences(results, "hub's own")[0].partition("event loop late by ")[2] == shown


# ==== The outcome of servers and people ==============================================================================


def test_the_commonest_reasons_name_users_the_rest_is_counted() -> None:
    numbers = iter(range(1, 29))
    reasons = [f"reason {kind}" for kind in "abcdefg" for _ in range("_abcdefg".index(kind))]
    given = list(reversed(sentences(results_of([failed(next(numbers), reason) for reason in reasons]), "failed")))
    assert [sentence.partition(" (")[0] for sentence in given[1:]] == [
        f"{number} × reason {kind}" for number, kind in zip(range(3, 8), "cdefg")
    ]
    assert given[0].startswith("3 × something else")
    assert "(hub-stress-test-7, hub-stress-test-8, hub-stress-test-9, hub-stress-test-10), " in given[2]
    assert "hub-stress-test-13 and 2 more, all in --results)" in given[3]


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
    assert people.reasons == {"cut short before getting to work": 12}


def test_a_message_of_every_server_says_nothing_of_the_slowest() -> None:
    events = [ready(n, n, message="Pulling the image") for n in range(1, 8)]
    assert sentences(results_of(events), "slowest") == []
    assert len(sentences(results_of([*events, ready(8, message="Starting")]), "slowest")) == 1


# ==== What to look at next, and a but ================================================================================


IN_SERVERS = {Kind.CELL, Kind.ROUTE, Kind.WEBSOCKET, Kind.KERNEL}


THIRTY = hst.Plan(count=30, within_s=10.0).options()  # fewer than would start at that rate in the time of a start


def pods(number: int, new_node: int, pulled: int) -> list[Event]:
    """Starts of pods, some of which waited for a new node, some for their image."""
    took_s = (1.0, 20.0, 1.0, 8.0, 1.0, 2.0)
    return [ready(n, 33.0, phases=hst.Phases(*took_s, int(n < new_node), int(n < pulled))) for n in range(number)]


@pytest.mark.parametrize(
    ("kinds", "events", "more", "advised"),
    [
        ({Kind.NO_ANSWER}, [ready(1)], {}, ["got no answer"]),
        (
            set(),
            [throttled(n, 26.0) for n in range(30)],
            {"options": THIRTY},
            ["concurrent_spawn_limit: 40 is a third"],
        ),
        (  # where 30 did start at a time, 24 are not enough: the first waited for something
            set(),
            [throttled(n, 6.0) for n in range(30)],
            {"options": THIRTY},
            ["raise c.JupyterHub.concurrent_spawn_limit"],
        ),
        ({Kind.SERVER_LIMIT}, [throttled(1), failed(2)], {}, ["c.JupyterHub.active_server_limit", "hub's log for"]),
        ({Kind.SPAWN}, [failed(1)], {}, ["hub's log for the users named above, and where the spawner"]),
        ({Kind.SPAWN}, [failed(1, "exceeded quota (403)")], {}, ["into the namespace (exceeded quota): raise its"]),
        ({Kind.SPAWN}, [failed(1, phases=hst.Phases(*[1.0] * 6, 0, 0))], {}, ["kubectl get events"]),
        ({Kind.SPAWN}, [failed(1, "boom (504)"), failed(2, "boom (504)")], {}, ["hub's log for"]),
        (
            {Kind.SPAWN},
            [failed(1, "no node has room"), failed(2, "no node has 1 GB")],
            {},
            ["did not fit on the nodes"],
        ),
        *(
            (
                {Kind.SPAWN},
                [failed(1, f"0/2 nodes are available: 1 {lack}, 1 Insufficient memory.")],
                {},
                [f"({lack}): raise {then}"],
            )
            for lack, then in [
                ("Insufficient memory", "the node pool's maximum, or reserve less for each (singleuser.memory.g"),
                ("Insufficient cpu", "the node pool's maximum, or reserve less for each (singleuser.cpu.guarantee)."),
                ("Insufficient nvidia.com/gpu", "the node pool's maximum."),
            ]
        ),
        (
            {Kind.SPAWN},
            [failed(1, "exceeded quota: home, requested: requests.storage=10Gi (403)")],
            {},
            ["raise its quota, or reserve less for each (singleuser.storage.capacity)"],
        ),
        ({Kind.SPAWN}, [failed(1, "did not start in 300 s")], {}, ["raise c.Spawner.start_timeout", "hub's log for"]),
        ({Kind.SPAWN}, [failed(1, "no node has room")], {}, ["did not fit on the nodes"]),
        ({Kind.SPAWN}, [failed(1), failed(2)], {}, ["--profile", "hub's log for"]),
        ({Kind.SPAWN}, [failed(1, "KeyError: getpwnam()"), failed(2)], {}, ["unix accounts", "hub's log for"]),
        (IN_SERVERS, [ready(1)], {}, ["the image lacks", "the proxy's log", "pass upgrades", "memory limit"]),
        (set(), pods(60, new_node=6, pulled=5), {}, ["scheduling.userPlaceholder.replicas: 6 "]),
        (set(), [ready(1)], {"hub": hst.HubSide("", "", 1, None, None)}, ["the hub restarted: find out why"]),
        (set(), [], {"http": hst.Http(9, 0, 0, {"502": 1}, 0, 0.0, None, {"502": 1})}, ["answered 5xx"]),
        (set(), [], {"http": hst.Http(9, 0, 0, {"429": 1}, 0, 0.0, None, {"429": 1})}, ["(429)"]),
        (set(), [], {"http": hst.Http(9, 0, 0, {"403": 2}, 0, 0.0, None, {"403": 1})}, ["(403)", "denies"]),
    ],
)
def test_advice_follows_from_how_it_failed(
    kinds: set[Kind], events: list[Event], more: dict[str, Any], advised: list[str]
) -> None:
    given = list(hst.advice(results_of(events, **more), kinds))
    assert len(given) == len(advised)
    for sentence, part in zip(given, advised):
        assert part in f"{sentence}."


STARTS = {number: [throttled(n) if n <= number else ready(n) for n in range(1, 21)] for number in (0, 5)}
P95 = hst.Judgement("server_ready.p95 > 60s", 1.0, False)


@pytest.mark.parametrize(
    ("events", "more", "parts"),
    [
        (pings(*[0.1] * 200, failed=3), {}, ["3 of 203 pings failed"]),
        (pings(*[0.1] * 200, 2.9), {}, []),
        (pings(*[0.1] * 200, 3.1), {}, ["up to 3.10 s"]),
        (pings(*[0.1] * 20, *[1.2] * 3), {}, ["up to 1.20 s"]),
        (pings(0.1), {"hub": hub_with(cpu_share_max=0.98)}, ["full: it used up to 98 %"]),
        (pings(0.1), {"hub": hub_with(cpu_share_max=0.4, event_loop_lag_p95_s=0.425)}, ["late: by 425 ms"]),
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
    ("text", "goal"),
    [
        ("visit.p50 >= 1.2x", "✗ visit.p50 not measured (fails at 1.2x"),
        ("failed <= 3", "✓ failed 4 (fails at 3"),
        ("server_ready.p50 < 10m", "✗ server_ready.p50 2.54 s (fails below 10 min"),
        ("hub.metrics.cpu_share_max > 100%", "✓ hub.metrics.cpu_share_max 91.4 % (fails "),
        ("hub.metrics.rss_max_bytes > 1GB", "✓ hub.metrics.rss_max_bytes 117 MB (fails "),
        ("capacity.rate_per_s > 1", "✗ capacity.rate_per_s 46.5 (fails "),
    ],
)
def test_a_goal_has_its_metrics_unit_and_its_bound(text: str, goal: str) -> None:
    found = {"failed": 4, "hub": {"metrics": {"cpu_share_max": 0.914, "rss_max_bytes": 1.17e8}}}
    found |= {"operations": {"server_ready": {"latency_s": {"p50": 2.54}}}, "capacity": {"rate_per_s": 46.5}}
    assert goal in hst.goal_text(hst.condition(text).judge(found, None))


def test_differences_that_make_a_comparison_pointless() -> None:
    then = hst.as_json(results_of([ready(1)]))
    assert hst.differences_to(then, results_of([ready(1)])) == []
    then["options"] |= {"count": 300, "hold": 90.0, "page": "lab.har", "find_capacity": True}
    groups = ({"name": "staff", "count": 2, "work": True, "within": 60.0, "page": None},)
    now = results_of([ready(1)], options=hst.Plan().options() | {"work": True, "event": groups})
    changes = hst.differences_to(then, now)
    assert [sentence.split()[0] for sentence in changes] == [
        *("--count", "--hold", "--event", "--page", "--work", "--find-capacity")
    ]
    assert "300, and is 100 " in changes[0] and "name staff, count 2, work given, within 60s" in changes[2]
    then["command"] = "purge"
    assert "purge, and is stress-test" in "".join(hst.differences_to(then, now))


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


def test_a_pass_shows_of_its_housekeeping_only_what_failed() -> None:
    events = [ready(1), did("create_users", 0, 1.0), did("list_users", 0, 1.0, REFUSED), *pings(0.1)]
    latency, *_ = hst.tables_of(results_of(events), None)
    assert [row[0] for row in latency.rows] == ["server ready", "list users", "ping"]


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
