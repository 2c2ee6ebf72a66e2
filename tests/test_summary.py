"""The summary: the verdict, what came of the servers and why, the slowest, what to look at next, colours."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from hub_stress_test import Event, ExitCode, Kind, Reason
from localhub import LocalHub
from tool import run_for_results, run_tool, tool_users

Make = Callable[..., LocalHub]


def ready(number: int, waited_s: float = 1.0, **more: Any) -> Event:
    """A server that became ready after so long, or did not, for a reason."""
    return Event("server_ready", hst.username(number), 0.0, 0.0, waited_s, **more)


def held(number: int, lost: bool) -> Event:
    """A server that was held from second 10 to second 20."""
    gone = Reason(Kind.LOST, "it became ready, and was gone while it was held")
    return Event("stay", hst.username(number), 10.0, 10.0, 20.0, gone if lost else None)


def failed(number: int, text: str = "no node is free", kind: Kind = Kind.SPAWN, message: str = "") -> Event:
    return ready(number, reason=Reason(kind, text), message=message)


def results_of(events: Iterable[Event], requested: int = 0, **more: Any) -> hst.Results:
    """The results of a stress test that left these events; `more` are fields that differ."""
    record = hst.new_recorder()
    for event in events:
        record.add(event)
    servers = hst.servers_of(record.people, requested or len(record.people), False)
    bad = servers.failed + servers.lost
    found = hst.Results(
        schema=1,
        tool={"name": "hub-stress-test", "version": "0"},
        command=hst.STRESS,
        hub=hst.HubSide("http://x/hub/api", "6.1.1", 0, None, None),
        started="2026-11-20T16:00:00Z",
        finished="2026-11-20T16:00:30Z",
        duration_s=30.0,
        options=hst.Plan().options(),
        users=hst.Users(servers.requested, servers.requested, 0, []),
        failed=bad,
        failed_rate=bad / servers.requested if servers.requested else None,
        servers=servers,
        people=None,
        groups=None,
        operations=record.summarise(),
        http=hst.Http(100, 0, 0, {"200": 100}, 20, 0.2),
        capacity=None,
        aftermath=None,
        proxy_check=None,
        warnings=[],
        advice=[],
        timeline={"operations": {}, "servers": None, "hub": None, "watched": {}, "load_ended_s": 30.0},
        exit_code=ExitCode.FAILED if bad else ExitCode.OK,
    )
    return dataclasses.replace(found, **more)


def told(results: hst.Results, label: str, baseline: hst.Json | None = None) -> list[str]:
    """The sentences that the summary has behind a label."""
    return [row[1] for row in hst.facts(results, baseline).rows if row[0] == label]


# ==== The verdict ====================================================================================================


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (ExitCode.OK, "PASSED"),
        (ExitCode.FAILED, "FAILED"),
        (ExitCode.LEFT_BEHIND, "LEFT SOMETHING BEHIND"),
        (ExitCode.SIGINT, "INTERRUPTED"),
        (ExitCode.SIGTERM, "INTERRUPTED"),
    ],
)
def test_the_first_word_is_how_the_run_ended(code: ExitCode, word: str) -> None:
    results = results_of([ready(1)], exit_code=int(code))
    assert hst.verdict_of(results)[0] == word
    assert hst.render_summary(results).startswith(f"{word}: 1 of 1 server became ready; ")


@pytest.mark.parametrize(
    ("events", "requested", "verdict"),
    [
        ([], 3, "0 of 3 servers became ready, 0 failed, 3 not begun"),
        ([failed(1)], 1, "0 of 1 server became ready"),
        (
            [ready(1, 0.5), failed(2)],
            3,
            "1 of 3 servers became ready, 1 failed, 1 not begun; half waited 500 ms, the slowest 500 ms",
        ),
        (
            [ready(1), ready(2), held(1, lost=True), held(2, lost=False)],
            2,
            "2 of 2 servers became ready; 1 was lost while held; half waited 1.00 s, the slowest 1.00 s",
        ),
        (
            [ready(1), ready(2), held(1, lost=True), held(2, lost=True)],
            2,
            "2 of 2 servers became ready; 2 were lost while held; half waited 1.00 s, the slowest 1.00 s",
        ),
    ],
)
def test_the_verdict_counts_servers(events: list[Event], requested: int, verdict: str) -> None:
    assert hst.verdict_of(results_of(events, requested))[1] == verdict


def test_the_verdict_of_a_purge_and_of_a_load_counts_what_they_did() -> None:
    purge = results_of([], command=hst.PURGE, servers=None, users=hst.Users(0, 7, 0, []))
    assert hst.verdict_of(purge)[1] == "7 users removed"
    reports = [Event("activity", "x", 0.0, 0.0, 1.0) for _ in range(3)]
    reports.append(Event("activity", "x", 0.0, 0.0, 1.0, Reason(Kind.REFUSED, "500")))
    load = results_of(reports, command=hst.ACTIVITY, servers=None, options=hst.Plan(hst.ACTIVITY).options())
    assert hst.verdict_of(load)[1] == "3 of 4 activity reports were accepted"
    mix = hst.Plan(hst.ACTIVITY, mix={"activity": 1.0, "read": 1.0}).options()
    reads = [Event("read", "x", 0.0, 0.0, 1.0), Event("ping", "x", 0.0, 0.0, 1.0)]
    mixed = results_of(reports + reads, command=hst.ACTIVITY, servers=None, options=mix)
    assert hst.verdict_of(mixed)[1] == "4 of 5 requests were accepted"


@pytest.mark.parametrize(
    ("rate_per_s", "servers", "bound", "verdict"),
    [
        (None, None, False, "the capacity was not found: no rate was sustained"),
        (
            42.4,
            12720,
            False,
            "this hub sustains 42 requests per second: "
            "the activity reports of 12,720 running servers, one every 300 s each",
        ),
        (42.4, None, True, "this hub sustains at least 42 requests per second"),
    ],
)
def test_the_verdict_of_a_search_is_the_capacity(
    rate_per_s: float | None, servers: int | None, bound: bool, verdict: str
) -> None:
    capacity = hst.Capacity(rate_per_s, servers, bound, [])
    assert hst.verdict_of(results_of([], command=hst.ACTIVITY, servers=None, capacity=capacity))[1] == verdict


# ==== Percentiles of too few =========================================================================================


@pytest.mark.parametrize(("number", "quoted"), [(6, False), (19, False), (20, True)])
def test_the_verdict_quotes_no_95th_percentile_of_fewer_than_twenty_servers(number: int, quoted: bool) -> None:
    sentence = hst.verdict_of(results_of(ready(n, waited_s=float(n)) for n in range(1, number + 1)))[1]
    assert ("95 %" in sentence) is quoted
    assert sentence.endswith(f", the slowest {number:.{2 if number < 10 else 1}f} s")


def test_a_percentile_counts_only_those_that_succeeded() -> None:
    events = [*(ready(n) for n in range(1, 20)), *(failed(n) for n in range(20, 120))]
    assert "95 %" not in hst.verdict_of(results_of(events))[1]


@pytest.mark.parametrize(
    ("number", "cells"),
    [
        (0, ["–"] * 5),
        (9, ["1.00 s", "1.00 s", "–", "–", "1.00 s"]),
        (20, ["1.00 s", "1.00 s", "1.00 s", "–", "1.00 s"]),
        (100, ["1.00 s"] * 5),
    ],
)
def test_the_table_shows_a_dash_for_a_percentile_of_too_few(number: int, cells: list[str]) -> None:
    events = [*(ready(n) for n in range(1, number + 1)), failed(number + 1)]
    (row,) = hst.latency_section(results_of(events).operations).rows
    assert list(row) == ["server ready", str(number + 1), "1", *cells]


FIGURES = hst.HubFigures(
    cpu_s=1.25,
    cpu_share=0.2,
    cpu_share_max=0.4,
    rss_before_bytes=110e6,
    rss_max_bytes=120e6,
    rss_after_bytes=115e6,
    rss_per_server_bytes=400e3,
    event_loop_lag_p95_s=0.05,
    event_loop_lag_max_s=0.6,
    event_loop_samples=500,
    running_servers_max=20,
    requests={},
    spawns={},
)


def own(**more: Any) -> hst.HubSide:
    figures = dataclasses.replace(FIGURES, **more)
    return hst.HubSide("http://x/hub/api", "6.1.1", 0, figures, None)


@pytest.mark.parametrize(
    ("intervals", "lag"),
    [(19, "event loop late by 600 ms (max)"), (20, "event loop late by ≤ 50 ms (p95), 600 ms (max)")],
)
def test_the_lag_of_the_hubs_event_loop_has_no_95th_percentile_of_fewer_than_twenty_intervals(
    intervals: int, lag: str
) -> None:
    (sentence,) = told(results_of([ready(1)], hub=own(event_loop_samples=intervals)), "hub's own")
    assert sentence == (
        "CPU 1.2 s, 20 % of a processor, under load up to 40 %; memory 110 MB before, 115 MB after; " + lag
    )


def test_a_hub_that_does_not_tell_its_lag_has_none() -> None:
    silent = own(event_loop_lag_p95_s=None, event_loop_lag_max_s=None, event_loop_samples=0, rss_per_server_bytes=None)
    (sentence,) = told(results_of([ready(1)], hub=silent), "hub's own")
    assert sentence.endswith("memory 110 MB before, 115 MB after")


def test_too_few_samples_show_no_percentile_in_a_real_run(new_hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "20", "-b", "20", hub=new_hub)
    row = next(line for line in done.stdout.splitlines() if line.startswith("server ready"))
    mean, p50, p95, p99, most = re.split("  +", row)[3:]
    assert p99 == "–" and "–" not in mean + p50 + p95 + most
    assert ", 95 % at most " in done.summary.splitlines()[0]
    assert not tool_users(new_hub)


# ==== What came of the servers, and why ==============================================================================


def test_the_servers_line_says_what_was_requested_and_what_came_of_it() -> None:
    events = [ready(1), ready(2, throttled=2, throttled_s=0.8), failed(3)]
    assert told(results_of(events, 4), "servers") == [
        "4 requested, 10 at a time; 2 ready, 1 failed, 1 not begun; 1 throttled, from 800 ms after the first start on"
    ]
    rate = hst.Plan(rate_per_s=2.5).options()
    assert told(results_of([ready(1), held(1, lost=True)], options=rate), "servers") == [
        "1 requested, 2.5 per second, however slow the hub; 1 ready, 0 failed, 1 lost"
    ]


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ([7], "(hub-stress-test-7)"),
        ([12, 7, 1], "(hub-stress-test-1, hub-stress-test-7, hub-stress-test-12)"),
        (
            [12, 7, 1, 30, 100],
            "(hub-stress-test-1, hub-stress-test-7, hub-stress-test-12 and 2 more, all in --results)",
        ),
    ],
)
def test_up_to_three_users_are_named_for_each_reason(numbers: list[int], named: str) -> None:
    results = results_of([*(failed(n, "no node is free") for n in numbers), failed(2, "the image is not there")])
    assert set(told(results, "failed")) == {
        f"{len(numbers)} × no node is free {named}, after 1.00 s",
        "1 × the image is not there (hub-stress-test-2), after 1.00 s",
    }


def test_every_server_that_failed_or_was_lost_is_named_in_the_results_with_reason_and_message() -> None:
    events = [failed(n, "no node is free", message=f"word {n}") for n in range(1, 9)]
    servers = results_of([*events, ready(9), held(9, lost=True)], requested=12).servers
    assert servers and servers.failures == [
        *(hst.Failure(hst.username(n), "no node is free", f"word {n}", 1.0) for n in range(1, 9)),
        hst.Failure("hub-stress-test-9", "it became ready, and was gone while it was held", "", 20.0),
    ]
    assert servers.reasons == {
        "no node is free": 8,
        "never started": 3,
        "it became ready, and was gone while it was held": 1,
    }
    assert (servers.ready, servers.failed, servers.lost) == (1, 11, 1)


def test_servers_that_never_started_are_counted_and_are_no_failures() -> None:
    results = results_of([failed(1)], requested=41)
    assert told(results, "failed") == ["1 × no node is free (hub-stress-test-1), after 1.00 s"]
    assert told(results, "servers")[0].endswith("; 0 ready, 1 failed, 40 not begun")


def test_an_interrupted_run_says_how_many_were_under_way() -> None:
    record = hst.new_recorder()
    for event in (ready(1), ready(2), failed(3)):
        record.add(event)
    starting = {hst.username(n) for n in (2, 4, 5)}
    servers = hst.servers_of(record.people, 12, True, starting=starting)
    assert (servers.under_way, servers.not_begun) == (2, 7)
    assert servers.reasons["never started, or cut short"] == 9
    verdict = hst.verdict_of(results_of([ready(1)], servers=servers, exit_code=130))
    assert verdict[0] == "INTERRUPTED"
    assert verdict[1].startswith("2 of 12 servers became ready, 1 failed, 2 under way, 7 not begun; ")
    people = hst.people_of({}, 12, True, starting=starting)
    assert (people.under_way, people.not_begun, people.failed) == (3, 9, 12)


def test_each_reason_has_its_first_and_last_moment_and_all_a_command() -> None:
    early, late = (dataclasses.replace(failed(n), ended_s=at_s) for n, at_s in ((4, 190.0), (2, 240.0)))
    results = results_of([late, early, failed(9, "another")])
    assert told(results, "failed")[0].endswith("-4), first after 3 min 10 s, last after 4 min 0 s")
    (command,) = told(results, "hub's log")
    assert command.startswith("grep -w hub-stress-test-2 LOG") and results.started in command


@pytest.mark.parametrize("words", ["0/3 nodes are available: insufficient memory", "pods is forbidden: quota"])
def test_on_kubernetes_the_command_asks_kubectl(words: str) -> None:
    (command,) = told(results_of([failed(7, words)]), "hub's log")
    assert command.startswith("kubectl logs deploy/hub -n NAMESPACE ")
    assert command.endswith(" | grep -w hub-stress-test-7")


def test_an_interrupted_start_is_not_told_from_one_that_never_was() -> None:
    servers = hst.servers_of({}, 3, cut_short=True)
    assert servers.reasons == {"never started, or cut short": 3}


def test_the_commonest_reasons_are_told_and_the_rest_is_counted() -> None:
    events = [failed(10 * kind + n, f"reason {'abcdefg'[kind - 1]}") for kind in range(1, 8) for n in range(kind)]
    sentences = told(results_of(events), "failed")
    assert [sentence.partition(" (")[0] for sentence in sentences] == [
        *(f"{kind} × reason {'abcdefg'[kind - 1]}" for kind in (7, 6, 5, 4, 3)),
        "3 × something else: see the results file",
    ]


def test_errors_of_requests_are_told_by_operation_in_the_order_of_the_steps() -> None:
    bad = Reason(Kind.REFUSED, "500")
    events = [Event(step, "x", 0.0, 0.0, 1.0, bad) for step in ("ping", "mine", "start_server", "start_server")]
    assert told(results_of([*events, failed(1)]), "errors") == [
        "start request: 2 × 500",
        "ping: 1 × 500",
        "mine: 1 × 500",
    ]


# ==== The slowest ====================================================================================================


def test_a_message_that_the_hub_says_of_every_server_tells_nothing_of_the_slowest() -> None:
    events = [ready(n, waited_s=float(n), message="Pulling the image") for n in range(1, 8)]
    results = results_of(events)
    assert results.servers and results.servers.usual_message == "Pulling the image"
    assert told(results, "slowest") == []


def test_a_message_that_tells_servers_apart_says_where_the_slowest_took_long() -> None:
    events = [ready(n, waited_s=float(n), message="Pulling the image" if n > 5 else "Starting") for n in range(1, 8)]
    results = results_of(events)
    assert results.servers and results.servers.usual_message == ""
    assert told(results, "slowest") == [
        "7.00 s, hub-stress-test-7: longest at: Pulling the image; "
        "6.00 s, hub-stress-test-6: longest at: Pulling the image; "
        "5.00 s, hub-stress-test-5: longest at: Starting"
    ]


def test_the_slowest_say_how_often_they_were_throttled() -> None:
    events = [ready(1, 1.0, message="Pulling"), ready(2, 5.0, throttled=3, throttled_s=1.0, message="Pulling")]
    assert told(results_of(events), "slowest") == ["5.00 s, hub-stress-test-2: throttled 3 ×"]


# ==== A whole page ===================================================================================================


def test_a_throttled_and_failing_run_says_what_was_slow_and_what_to_look_at_next(
    make_hub: Make, tmp_path: Path
) -> None:
    hub = make_hub(spawn_s=1.6, slow_spawn_timeout_s=0, concurrent_spawn_limit=3, fail_rate=0.2)
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "10", "-b", "10", hub=hub)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) <= 45
    assert done.summary.startswith("FAILED: 8 of 10 servers became ready; half waited ")
    named = ", ".join(sorted((one["user"] for one in found["servers"]["failures"]), key=hst.natural))
    assert re.search(rf"^failed +2 × no node has 4 GB of memory free \({named}\), first after ", done.summary, re.M)
    slow = found["servers"]["slowest"]
    assert [one["message"] for one in slow] == ["Pulling the image"] * 5 and slow[0]["throttled"]
    first = f"{hst.duration_text(slow[0]['ready_s'])}, {slow[0]['user']}: throttled {slow[0]['throttled']} ×"
    assert re.search(rf"^slowest +{first}", done.summary, re.M) and "longest at" not in done.summary
    assert re.search("^next +the hub throttled starts: raise c.JupyterHub.concurrent_spawn_limit", done.summary, re.M)
    assert re.search("until ready, .* throttling, ", done.summary)
    assert not tool_users(hub)


def test_a_label_stands_once_before_all_that_it_tells() -> None:
    results = results_of([failed(1, "a"), failed(2, "b"), ready(3)], warnings=["the hub restarted during the run"])
    page = hst.render_summary(results, width=60)
    prose = page.partition("\n\n")[0].splitlines()[2:]  # the verdict has two lines
    labels = [line.split()[0] for line in prose if not line.startswith(" ")]
    assert labels == ["because", "hub", "servers", "failed", "hub's", "requests", "duration", "cleanup"]
    indents = {len(line) - len(line.lstrip()) for line in prose if line.startswith(" ")}
    assert indents == {len("hub's log") + 2}
    assert max(map(len, page.splitlines())) <= 80


def test_why_a_run_failed_comes_before_everything_else() -> None:
    met = hst.Judgement("server_ready.p95 > 1ms", 1.5, True)
    unmet = hst.Judgement("failed_rate > 25%", 0.2, False)
    default = hst.Judgement("failed > 0", 3, True)
    results = results_of([ready(1)], warnings=["it was cut short"], conditions=[met, unmet, default])
    rows = [tuple(row) for row in hst.facts(results).rows]
    assert rows[:2] == [
        ("because", "it was cut short"),
        ("goals", "✗ server_ready.p95 1.50 s, of 1 sample (fails above 1 ms)"),
    ]
    assert told(results, "goals")[1:] == ["✓ failed_rate 20.0 % (fails above 25 %)"]


@pytest.mark.parametrize(
    ("users", "run", "sentences"),
    [
        (hst.Users(20, 20, 0, []), None, ["20 users deleted, none left"]),
        (hst.Users(20, 0, 20, []), None, ["20 users kept, as asked; remove them with: hub-stress-test purge"]),
        (
            hst.Users(20, 18, 0, ["hub-stress-test-ci-2", "hub-stress-test-ci-10"]),
            "ci",
            [
                "18 users deleted; 2 ARE STILL THERE:",
                "hub-stress-test-ci-2 hub-stress-test-ci-10",
                "remove them with: hub-stress-test purge --run ci",
            ],
        ),
    ],
)
def test_what_became_of_the_users_is_told(users: hst.Users, run: str | None, sentences: list[str]) -> None:
    results = results_of([ready(1)], users=users, options=hst.Plan(run=run).options())
    assert told(results, "cleanup") == sentences


def test_the_requests_line_says_how_much_was_monitoring_and_retried() -> None:
    http = hst.Http(1234, 5, 0, {"200": 1234}, 270, 270 / 1234)
    assert told(results_of([ready(1)], http=http), "requests") == ["1,234, of which 22 % monitoring, 5 retries"]


# ==== What to look at next ===========================================================================================


@pytest.mark.parametrize(
    ("kinds", "events", "more", "advised"),
    [
        ({Kind.NO_ANSWER}, [ready(1)], {}, ["some requests got no answer"]),
        (
            {Kind.SERVER_LIMIT},
            [failed(1, kind=Kind.SERVER_LIMIT)],
            {},
            ["raise c.JupyterHub.active_server_limit", "hub's log for"],
        ),
        ({Kind.TIMED_OUT}, [failed(1, kind=Kind.TIMED_OUT)], {}, ["raise --server-timeout"]),
        ({Kind.SPAWN}, [failed(1)], {}, ["see the hub's log for the users named above"]),
        (
            {Kind.LOST},
            [ready(1), held(1, lost=True)],
            {},
            ["see the hub's log for the users", "servers were lost (idle culler?"],
        ),
        (set(), [ready(1, throttled=1, throttled_s=0.5)], {}, ["raise c.JupyterHub.concurrent_spawn_limit"]),
        (set(), [ready(1)], {"hub": own(cpu_share_max=0.93)}, ["the hub is CPU-bound: it used 93 % of a processor"]),
        (set(), [ready(1)], {"hub": hst.HubSide("", "", 1, None, None)}, ["the hub restarted: find out why it ended"]),
        (set(), [ready(1)], {"http": hst.Http(9, 0, 0, {"502": 1}, 0, 0.0, None, {"502": 1})}, ["answered 5xx"]),
        (set(), [ready(1)], {}, []),
    ],
)
def test_what_to_look_at_next_follows_from_how_it_failed(
    kinds: set[Kind], events: list[Event], more: dict[str, Any], advised: list[str]
) -> None:
    said = list(hst.advice(results_of(events, **more), kinds))
    assert len(said) == len(advised)
    for sentence, part in zip(said, advised):
        assert part in sentence


# ==== A run that passed, but =========================================================================================


def pings(*latencies_s: float, failed: int = 0) -> list[Event]:
    """Pings of these latencies, and some that failed."""
    bad = Reason(Kind.REFUSED, "503")
    good = [Event("ping", "x", 0.0, 0.0, latency_s) for latency_s in latencies_s]
    return good + [Event("ping", "x", 0.0, 0.0, 1.0, bad) for _ in range(failed)]


def throttled_starts(number: int) -> list[Event]:
    return [ready(n, throttled=int(n <= number), throttled_s=0.5 if n <= number else None) for n in range(1, 21)]


SEARCH = hst.Capacity(42.4, 12720, False, [])
P95 = hst.Judgement("server_ready.p95 > 60s", 1.0, False)


@pytest.mark.parametrize(
    ("events", "more", "parts"),
    [
        (pings(*[0.1] * 200), {}, []),
        (pings(*[0.1] * 200, failed=3), {}, ["3 of 203 pings failed"]),
        (pings(*[0.1] * 200, 2.9), {}, []),
        (pings(*[0.1] * 200, 3.1), {}, ["everybody else waited up to 3.10 s"]),
        (pings(*[0.1] * 200, *[1.2] * 3), {}, ["everybody else waited up to 1.20 s"]),
        (pings(*[0.1] * 20, *[1.2] * 3), {}, []),  # too few for a p99
        (pings(8.3), {"hub": own(cpu_share_max=0.98)}, ["up to 8.30 s: the hub's one thread was full"]),
        (pings(0.1), {"hub": own(cpu_share_max=0.98)}, ["thread was full: it used up to 98 %"]),
        (pings(0.1), {"hub": own(cpu_share_max=0.5)}, []),
        (pings(0.1), {"hub": own(event_loop_lag_p95_s=0.425)}, ["thread was busy: its event loop was late by 425 ms"]),
        (throttled_starts(17), {}, ["17 of 20 starts were throttled"]),
        (throttled_starts(5), {}, []),
        ([ready(1)], {"warnings": ["the hub restarted"]}, ["the hub restarted"]),
        ([ready(1)], {"warnings": ["THE GENERATOR WAS LATE"]}, ["THE GENERATOR WAS LATE"]),
        ([ready(1)], {"conditions": [P95]}, ["server_ready.p95 is only the maximum of 1 sample"]),
        (throttled_starts(0), {"conditions": [P95]}, []),
        (pings(8.3), {"capacity": SEARCH}, []),
        (pings(8.3), {"command": hst.PURGE}, []),
    ],
)
def test_what_makes_a_but(events: list[Event], more: dict[str, Any], parts: list[str]) -> None:
    found = [*hst.but_of(results_of(events, **more))]
    assert len(found) == len(parts)
    for sentence, part in zip(found, parts):
        assert part in sentence


def test_a_but_stands_below_the_verdict_and_its_warnings_are_no_cause() -> None:
    results = results_of([ready(1)], but=["it restarted"], warnings=["it restarted", "written too late"])
    assert hst.render_summary(results).splitlines()[1].split(maxsplit=1) == ["but", "it restarted"]
    assert told(results, "because") == ["written too late"]


# ==== Width and characters ===========================================================================================


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_fit_the_width(width: int) -> None:
    steps = [hst.CapacityStep(16.0, 16.0, 0.02, 0, "activity.p95 > 500ms, or " + "so on " * 20, False)]
    events = [dataclasses.replace(ready(n, 62.1), group="students of the first year") for n in range(1, 101)]
    results = results_of(events, capacity=hst.Capacity(16.0, 4800, False, steps))
    lines = hst.render_summary(results, hst.as_json(results), width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.count("62.1 s") == 5 for line in lines)  # no number was wrapped


def test_what_an_encoding_cannot_show_is_spelled() -> None:
    judged = [hst.Judgement("failed_rate > 25%", 0.2, False), hst.Judgement("failed >= 3", 3.0, True)]
    results = results_of([failed(1, "no node in Zürich ☃")], conditions=judged)
    plain = hst.render_summary(results, encoding="ascii")
    assert plain.isascii() and "ok failed_rate 20.0 %" in plain and "FAIL failed 3 (fails at 3 or more)" in plain
    assert "Zürich" in hst.render_summary(results, encoding="latin-1")


def test_the_housekeeping_of_a_pass_is_not_shown() -> None:
    events = [ready(1), Event("create_users", "", 0.0, 0.0, 1.0), *pings(0.1)]

    def rows(results: hst.Results) -> list[str]:
        return [row[0] for row in hst.tables_of(results, None)[0].rows]

    assert rows(results_of(events)) == ["server ready", "ping"]
    assert "create users" in rows(results_of([*events, failed(2)]))
    bad = Event("list_users", "", 0.0, 0.0, 1.0, Reason(Kind.REFUSED, "500"))
    assert rows(results_of([*events, bad])) == ["server ready", "list users", "ping"]


# ==== Colours ========================================================================================================


def test_in_colour_the_first_words_that_matter_have_one_and_the_rest_is_the_same() -> None:
    results = results_of([failed(1), ready(2)], warnings=["it was cut short"], advice=["look there"])
    plain, coloured = hst.render_summary(results), hst.render_summary(results, colour=True)
    assert re.sub("\033\\[[0-9;]*m", "", coloured) == plain and "\033" not in plain
    words = re.findall("^\033\\[1;([0-9]+)m(\\w+)\033\\[0m", coloured, re.M)
    assert words == [("31", "FAILED"), ("33", "because"), ("31", "failed"), ("36", "next")]


@pytest.mark.parametrize(("code", "colour"), [(0, 32), (1, 31), (4, 31), (130, 33)])
def test_the_verdict_has_the_colour_of_its_word(code: int, colour: int) -> None:
    assert hst.render_summary(results_of([ready(1)], exit_code=code), colour=True).startswith(f"\033[1;{colour}m")


# ==== Against a baseline =============================================================================================


def test_what_makes_a_comparison_pointless_is_named_before_it() -> None:
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
    assert told(now, "baseline", then) == ["the command was purge, and is stress-test now"]  # with other options


def test_a_relative_condition_tells_ratio_and_limit() -> None:
    judged = hst.condition("server_ready.p50 > 1.2x").judge(
        {"operations": {"server_ready": {"latency_s": {"p50": 2.54}}}},
        {"operations": {"server_ready": {"latency_s": {"p50": 1.21}}}},
    )
    assert judged.held
    results = dataclasses.replace(results_of([ready(1)]), conditions=[judged])
    assert told(results, "goals") == [
        "✗ server_ready.p50 2.54 s, 2.1x the baseline's 1.21 s (fails above 1.45 s, 1.2x the baseline)"
    ]
    unread = hst.condition("visit.p50 >= 1.2x").judge({}, {})
    assert hst.goal_text(unread) == "✗ visit.p50 not measured (fails at 1.2x the baseline or more)"


def test_the_value_of_a_condition_has_its_metrics_unit() -> None:
    hub = {"cpu_share_max": 0.914, "event_loop_lag_max_s": 0.25, "rss_max_bytes": 1.17e8}
    capacity = {"rate_per_s": 46.5, "servers_reporting_every_300_s": 13950}
    found = {"hub": {"metrics": hub}, "capacity": capacity}
    paths = [*(f"hub.metrics.{key}" for key in hub), *(f"capacity.{key}" for key in capacity)]
    judged = [hst.condition(f"{path} > 1").judge(found, None) for path in paths]
    values = ["91.4 %", "250 ms", "117 MB", "46.5", "13950"]
    for path, one, value in zip(paths, judged, values):
        assert hst.goal_text(one).startswith(
            f"✓ {path} {value} (fails " if not one.held else f"✗ {path} {value} (fails "
        )


def test_the_comparison_shows_a_dash_for_a_percentile_of_too_few() -> None:
    few = results_of([ready(n) for n in range(1, 7)])
    rows = {row[0]: row for row in hst.comparison_section(hst.as_json(few), few).rows}
    assert rows["server ready"][2] == "–→–" and "–" not in rows["server ready"][1]
