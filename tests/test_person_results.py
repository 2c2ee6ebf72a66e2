"""What happened to each person: counted once each, in the results, the summary, the advice and the report's curves."""

from __future__ import annotations

import pytest

import hub_stress_test as hst
from hub_stress_test import Event, Kind, Reason
from made_up import LOST, NO_NODE, did, folded, results_of, sentences

NOBODY = Reason(Kind.ROUTE, "nobody listens there (503)")
RAISED = Reason(Kind.CELL, "cell 4 raised MemoryError")
REASONS = {reason.text: 1 for reason in (NO_NODE, NOBODY, RAISED, LOST)}


def leaves(number: int, at_s: float) -> Event:
    """A server that its person stops, which takes half a second."""
    return did("stop_server", number, at_s + 0.5, due_s=at_s)


def got_to_work(number: int, at_s: float = 4.0) -> list[Event]:
    steps = {"server_ready": 1.0, "visit": 2.0, "kernel_ready": at_s, "at_work": at_s}
    return [did(step, number, ended_s) for step, ended_s in steps.items()]


PEOPLE: dict[str, list[Event]] = {
    "works": got_to_work(1),
    "works and stays": [*got_to_work(2, 6.0), did("cell", 2, 9.0), did("stay", 2, 20.0)],
    "never ready": [did("start_server", 3, 0.5), did("server_ready", 3, 3.0, NO_NODE)],
    "no page": [did("server_ready", 4, 1.0), did("visit", 4, 31.0, NOBODY, message="not JSON but text/html")],
    "a cell fails": [*got_to_work(5), did("cell", 5, 10.0, RAISED)],
    "lost": [*got_to_work(6), did("stay", 6, 20.0, LOST)],
    "cut short": [did("server_ready", 7, 1.0)],
    "just asked": [did("start_server", 8, 0.5)],
    "only deleted": [did("delete_user", 9, 31.0, due_s=30.0)],
}


def events_of(names: str) -> list[Event]:
    """The events of these people, named with commas between."""
    return [event for name in names.split(", ") if name for event in PEOPLE[name]]


def rehearsed(names: str, expected: int) -> hst.Results:
    """The results of a run in which these people came."""
    events = events_of(names)
    people = hst.people_of(folded(events).people, expected, False)
    return results_of(events, expected, people=people, options=hst.Plan(count=expected, work=True).options())


@pytest.mark.parametrize(
    ("names", "expected", "at_work", "failed", "reasons", "verdict"),
    [
        ("works", 1, 1, 0, {}, "1 of 1 person got to work; half"),
        ("", 3, 0, 3, {"never came": 3}, "0 of 3 people got to work, 0 failed, 3 not begun"),
        ("lost, works", 2, 2, 1, {LOST.text: 1}, "2 of 2 people got to work; 1 failed afterwards"),
        ("works, cut short, just asked", 4, 1, 3, {"never came": 3}, "0 failed, 1 cut short, 2 not begun"),
        ("works, only deleted", 2, 1, 1, {"never came": 1}, "0 failed, 1 not begun"),
        (", ".join(PEOPLE), 10, 4, 8, {"never came": 4} | REASONS, "2 failed, 1 cut short, 3 not begun; 2 failed"),
    ],
)
def test_each_person_is_at_work_or_failed_once(
    names: str, expected: int, at_work: int, failed: int, reasons: dict[str, int], verdict: str
) -> None:
    results = rehearsed(names, expected)
    people = results.people
    assert people and (people.expected, people.at_work, people.failed) == (expected, at_work, failed)
    assert people.reasons == reasons and sum(people.reasons.values()) == people.failed
    assert [people.reasons[failure.reason] for failure in people.failures] == [1] * len(people.failures)
    assert verdict in hst.verdict_of(results)[1]
    assert len(sentences(results, "failed")) == len(people.failures)


def test_a_person_fails_for_the_first_failed_step() -> None:
    people = rehearsed("no page", 1).people
    assert people and people.failures == [hst.Failure(hst.username(4), NOBODY.text, "not JSON but text/html", 31.0)]
    row = {"cell": did("cell", 1, 5.0, RAISED), "stay": did("stay", 1, 9.0, LOST)}
    assert hst.people_of({"x": row}, 1, False).reasons == {RAISED.text: 1}


@pytest.mark.parametrize(
    ("broken", "time_out"),  # how long each had been open, how long silent, and when it broke
    [
        ([(60.1, 9.0, 100.0), (60.0, 1.0, 110.0), (60.2, 5.0, 115.0)], "open for 60 s"),
        ([(66.1, 60.1, 100.0), (60.0, 60.0, 110.0), (70.2, 60.2, 115.0)], "silent for 60 s"),
        ([(60.1, 9.0, 100.0), (60.0, 1.0, 110.0), (45.0, 5.0, 115.0)], None),
        ([(5.1, 5.1, 100.0), (5.2, 5.2, 100.1), (5.0, 5.0, 100.0)], None),  # came together, and broke together
        ([(60.1, 60.1, 100.0), (60.0, 60.0, 110.0)], None),
        ([(2.3, 0.1, 100.0), (5.1, 0.2, 110.0), (3.7, 0.0, 115.0)], None),  # they were at work
    ],
)
def test_websockets_that_break_at_one_age_show_a_time_out(
    broken: list[tuple[float, float, float]], time_out: str | None
) -> None:
    cells = [did("cell", n, at_s, Reason(Kind.WEBSOCKET, "x", lasted)) for n, (*lasted, at_s) in enumerate(broken)]
    said = hst.time_out_in_front(folded(cells).people)
    assert said.startswith(f"{time_out}: something in front has a time-out of 60 s") if time_out else said == ""


def timeline(names: str, more: list[Event]) -> hst.Json:
    return hst.servers_timeline(folded(events_of(names) + more).people, 0.0)


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
