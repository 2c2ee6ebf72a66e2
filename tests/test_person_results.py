"""What happened to each person: counted once each, in the results, the summary, the advice and the report's curves."""

from __future__ import annotations

import pytest

import hub_stress_test as hst
from hub_stress_test import Event, Kind, Reason
from made_up import results_of
from made_up import sentences as told

UNREADY = Reason(Kind.SPAWN, "no node is free")
NOBODY = Reason(Kind.ROUTE, "nobody listens there (503)")
RAISED = Reason(Kind.CELL, "cell 4 raised MemoryError")
LOST = Reason(Kind.LOST, "the server stopped while it was held")


def did(step: str, number: int, ended_s: float, reason: Reason | None = None, message: str = "") -> Event:
    """One step of a person, from the beginning of the run."""
    return Event(step, hst.username(number), 0.0, 0.0, ended_s, reason, message=message)


def leaves(number: int, at_s: float) -> Event:
    """A server that its person stops, which takes half a second."""
    return Event("stop_server", hst.username(number), at_s, at_s, at_s + 0.5)


def got_to_work(number: int, at_s: float = 4.0) -> list[Event]:
    steps = {"server_ready": 1.0, "visit": 2.0, "kernel_ready": at_s, "at_work": at_s}
    return [did(step, number, ended_s) for step, ended_s in steps.items()]


PEOPLE: dict[str, list[Event]] = {
    "works": got_to_work(1),
    "works and stays": [*got_to_work(2, 6.0), did("cell", 2, 9.0), did("stay", 2, 20.0)],
    "never ready": [did("start_server", 3, 0.5), did("server_ready", 3, 3.0, UNREADY)],
    "no page": [did("server_ready", 4, 1.0), did("visit", 4, 31.0, NOBODY, message="not JSON but text/html")],
    "a cell fails": [*got_to_work(5), did("cell", 5, 10.0, RAISED)],
    "lost": [*got_to_work(6), did("stay", 6, 20.0, LOST)],
    "cut short": [did("server_ready", 7, 1.0)],
    "just asked": [did("start_server", 8, 0.5)],
}


def recorded(names: str, more: list[Event] | None = None) -> tuple[list[Event], hst.Recorder]:
    """The events of these people, named with commas between."""
    record = hst.new_recorder()
    events = [event for name in names.split(", ") if name for event in PEOPLE[name]] + (more or [])
    for event in events:
        record.add(event)
    return events, record


def rehearsed(names: str, expected: int, cut_short: bool = False, **more: object) -> hst.Results:
    """The results of a run in which these people came."""
    events, record = recorded(names)
    people = hst.people_of(record.people, expected, cut_short)
    plan = hst.Plan(count=expected, work=True, within_s=300.0)
    return results_of(events, expected, people=people, failed=people.failed, options=plan.options(), **more)


@pytest.mark.parametrize(
    ("names", "expected", "at_work", "failed", "reasons"),
    [
        ("works", 1, 1, 0, {}),
        ("works, works and stays", 2, 2, 0, {}),
        ("", 3, 0, 3, {"never came": 3}),
        ("works", 3, 1, 2, {"never came": 2}),
        ("never ready, no page", 2, 0, 2, {UNREADY.text: 1, NOBODY.text: 1}),
        ("a cell fails", 1, 1, 1, {RAISED.text: 1}),
        ("lost, works", 2, 2, 1, {LOST.text: 1}),
        ("works, cut short, just asked", 4, 1, 3, {"never came": 3}),
        (", ".join(PEOPLE), 10, 4, 8, {"never came": 4} | {r.text: 1 for r in (UNREADY, NOBODY, RAISED, LOST)}),
    ],
)
def test_each_person_is_at_work_or_failed_once(
    names: str, expected: int, at_work: int, failed: int, reasons: dict[str, int]
) -> None:
    people = rehearsed(names, expected).people
    assert people and (people.expected, people.at_work, people.failed) == (expected, at_work, failed)
    assert people.reasons == reasons and sum(people.reasons.values()) == people.failed
    assert [people.reasons[failure.reason] for failure in people.failures] == [1] * len(people.failures)


def test_a_person_fails_for_the_first_failed_step_with_its_last_word() -> None:
    people = rehearsed("no page", 1).people
    assert people and people.failures == [hst.Failure(hst.username(4), NOBODY.text, "not JSON but text/html", 31.0)]
    row = {"cell": did("cell", 1, 5.0, RAISED), "stay": did("stay", 1, 9.0, LOST)}
    assert hst.people_of({"x": row}, 1, False).reasons == {RAISED.text: 1}


def test_people_of_a_run_that_was_cut_short_never_came() -> None:
    people = rehearsed("works, cut short", 3, cut_short=True).people
    assert people and people.reasons == {"cut short before getting to work": 2}


@pytest.mark.parametrize(
    ("names", "expected", "verdict"),
    [
        ("works", 1, "1 of 1 person got to work; half waited 4.00 s, the slowest 4.00 s"),
        ("works, works and stays", 2, "2 of 2 people got to work; half waited 4.01 s, the slowest 6.00 s"),
        ("never ready", 1, "0 of 1 person got to work"),
        ("works, no page", 3, "1 of 3 people got to work, 1 failed, 1 not begun; half waited "),
        ("works, lost", 2, "2 of 2 people got to work; 1 failed afterwards; half waited "),
        ("works, cut short", 9, "1 of 9 people got to work, 0 failed, 1 cut short, 7 not begun; half waited "),
    ],
)
def test_the_verdict_of_a_rehearsal_counts_people(names: str, expected: int, verdict: str) -> None:
    assert hst.verdict_of(rehearsed(names, expected))[1].startswith(verdict)


def test_the_summary_has_each_failure_once_and_the_requests_to_servers() -> None:
    servers = hst.Http(1234, 5, 0, {"101": 3, "200": 1226, "503": 5}, 0, 0.0)
    results = rehearsed(", ".join(PEOPLE), 10, http=hst.Http(100, 0, 0, {"200": 100}, 20, 0.2, servers))
    rows = {label: told(results, label) for label in ("servers", "people", "failed", "errors", "requests")}
    assert rows["servers"] == [
        "10 requested, at random moments within 5 min 0 s; 6 ready, 1 failed, 3 not begun, 1 lost"
    ]
    assert rows["people"] == ["10 expected; 4 at work, 4 failed, 1 cut short, 3 not begun"]
    assert f"1 × {RAISED.text} (hub-stress-test-5), at 10.0 s of the run" in rows["failed"]
    assert f"1 × {UNREADY.text} (hub-stress-test-3), at 3.00 s of the run" in rows["failed"]
    assert len(rows["failed"]) == 4 and not rows["errors"]
    assert rows["requests"][0].startswith("100 to the hub (")
    assert rows["requests"][1:] == ["1,234 to servers (5 retries): 3 × 101, 1,226 × 200, 5 × 503"]


def test_the_time_until_work_is_told_step_by_step() -> None:
    parts = "the server 1.00 s, the start page 2.00 s, the kernel 5.00 s"
    sentence = f"people waited 5.00 s on average until they could work: {parts}"
    assert told(rehearsed("works, works and stays", 2), "where the time went") == [sentence]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Kind.ROUTE, "the proxy's log"), (Kind.WEBSOCKET, "has to pass upgrades"), (Kind.KERNEL, "memory limit")],
)
def test_the_kind_of_failure_decides_what_to_look_at(kind: Kind, words: str) -> None:
    results = rehearsed("works", 1)
    assert not list(hst.advice(results, []))
    assert any(words in sentence for sentence in hst.advice(results, [kind]))


@pytest.mark.parametrize(
    ("broken", "time_out_s"),  # how long each had been open, and when it broke
    [
        ([(60.1, 100.0), (60.0, 110.0), (60.2, 115.0)], 60.1),
        ([(60.1, 100.0), (60.0, 110.0)], None),
        ([(60.1, 100.0), (60.0, 110.0), (45.0, 115.0)], None),
        ([(5.1, 100.0), (5.2, 100.1), (5.0, 100.0)], None),  # came together, and broke together
        ([(60.1, 100.0), (60.0, 110.0), (None, 115.0)], None),
    ],
)
def test_websockets_that_break_at_one_age_show_a_time_out(
    broken: list[tuple[float | None, float]], time_out_s: float | None
) -> None:
    people = {
        str(n): {"cell": Event("cell", str(n), ended_s, ended_s, ended_s, Reason(Kind.WEBSOCKET, "x", open_s))}
        for n, (open_s, ended_s) in enumerate(broken)
    }
    assert hst.time_out_in_front(people) == time_out_s


def timeline(names: str, more: list[Event] | None = None) -> hst.Json:
    return hst.servers_timeline(recorded(names, more)[1].people, 0.0)


def test_the_timeline_has_the_moments_of_each_person() -> None:
    line = timeline("works, no page, a cell fails, lost, never ready", [did("page", 1, 3.0), leaves(1, 11.0)])
    assert line["user"] == [hst.username(n) for n in (1, 4, 5, 6, 3)]
    assert line["opened_s"] == [2.0, None, 2.0, 2.0, None]
    assert line["loaded_s"] == [3.0, None, None, None, None]
    assert line["works_s"] == [4.0, None, 4.0, 4.0, None]
    assert line["failed_s"] == [None, 31.0, 10.0, None, None]  # after they were ready
    assert line["lost_s"] == [None, None, None, 20.0, None]
    assert line["left_s"] == [11.0, None, None, None, None]


LEFT = [leaves(n, 15.0) for n in (1, 3)]  # with --stay all do, those who failed too


@pytest.mark.parametrize(
    ("names", "more", "rows"),
    [
        # at 0.5, 1.5, 5, 16 and 25 s: starting, ready, at work, failed, lost
        ("works", [], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 1 0 0", "0 0 1 0 0"]),
        ("works", LEFT[:1], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 0 0 0", "0 0 0 0 0"]),
        ("lost", [], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 1 0 0", "0 0 0 0 1"]),
        ("lost", [leaves(6, 21.0)], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 1 0 0", "0 0 0 0 1"]),
        ("never ready", LEFT[1:], ["1 0 0 0 0", "1 0 0 0 0", "0 0 0 1 0", "0 0 0 1 0", "0 0 0 1 0"]),
        ("no page", [], ["1 0 0 0 0", "0 1 0 0 0", "0 1 0 0 0", "0 1 0 0 0", "0 1 0 0 0"]),
        ("works, lost, never ready, no page", LEFT, ["4 0 0 0 0", "1 3 0 0 0", "0 1 2 1 0", "0 1 1 1 0", "0 1 0 1 1"]),
    ],
)
def test_curves_count_each_person_in_one_state(names: str, more: list[Event], rows: list[str]) -> None:
    curves = hst.server_curves(timeline(names, more), 30.0, points=60)
    kinds = ("starting", "ready", "at work", "failed", "lost")
    found = [" ".join(str(curves[kind][round(at_s * 2)]) for kind in kinds) for at_s in (0.5, 1.5, 5.0, 16.0, 25.0)]
    assert found == rows and min(min(curves[kind]) for kind in kinds) >= 0
