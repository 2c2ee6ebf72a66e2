"""Events, and the recorder that folds them: what is measured, and that it stays small and exact."""

from __future__ import annotations

import math
import random
import statistics
import threading
from collections.abc import Iterable

import pytest

import hub_stress_test as hst
from hub_stress_test import Distribution, Event, Kind, Reason, Recorder, Statistics, Traffic
from made_up import REFUSED, did, folded

AWAY = Reason(Kind.NO_ANSWER, "connection refused")


def event(step: str = "activity", at_s: float = 0.0, took_s: float = 1.0, reason: Reason | None = None) -> Event:
    return did(step, 1, at_s + took_s, reason, due_s=at_s)


def activity_of(*events: Event) -> hst.Operation:
    return folded(events).summarise()["activity"]


@pytest.mark.parametrize(
    ("sent_s", "ended_s", "backoff_s", "latency_s", "lateness_s"),
    [(12, 15, 1, 4, 2), (9.99, 10.5, 0.6, 0, 0)],  # neither is below zero
)
def test_latency_counts_from_when_due_without_back_off(
    sent_s: float, ended_s: float, backoff_s: float, latency_s: float, lateness_s: float
) -> None:
    seen = Event("activity", "x", due_s=10, sent_s=sent_s, ended_s=ended_s, backoff_s=backoff_s)
    assert (seen.latency_s, seen.lateness_s) == (latency_s, lateness_s)


# ==== Distribution ===================================================================================================


def spread(values: Iterable[float]) -> Distribution:
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    return distribution


def test_percentiles_are_within_half_a_percent_and_the_rest_exact() -> None:
    rng = random.Random(1)
    values = [rng.lognormvariate(-3, 1.5) for _ in range(20_000)]
    summary = spread(values).summary()
    values.sort()
    assert (summary.min, summary.max) == (values[0], values[-1])
    assert summary.mean == pytest.approx(statistics.fmean(values))
    for percent in (50, 90, 95, 99):
        exact = values[math.ceil(percent / 100 * len(values)) - 1]
        assert getattr(summary, f"p{percent}") == pytest.approx(exact, rel=0.005)


def test_no_value_one_value_and_values_of_zero_have_statistics() -> None:
    assert spread([]).summary() == Statistics()
    assert set(vars(spread([0.25]).summary()).values()) == {0.25}
    summary = spread([0.0, 0.0, 1.0]).summary()
    assert (summary.min, summary.p50, summary.max) == (0.0, pytest.approx(0.0, abs=1e-5), 1.0)


@pytest.mark.parametrize(
    ("name", "needed"), [("min", 1), ("mean", 1), ("p50", 1), ("p90", 10), ("p95", 20), ("p99", 100)]
)
def test_a_percentile_needs_enough_samples_that_succeeded(name: str, needed: int) -> None:
    events = [event(took_s=float(n)) for n in range(1, needed)] + [event(reason=AWAY)] * 50
    assert activity_of(*events).enough(name) is None
    assert activity_of(*events, event()).enough(name) is not None


# ==== Recorder =======================================================================================================


def test_failures_are_counted_by_reason_and_not_averaged_in() -> None:
    reasons = (None, REFUSED, REFUSED, Reason(Kind.SPAWN, "500"), AWAY)
    record = folded(event(at_s=n, took_s=29.0 if reason else 1.0, reason=reason) for n, reason in enumerate(reasons))
    activity = record.summarise()["activity"]
    assert (activity.count, activity.failed, activity.errors) == (5, 4, {"500": 3, "connection refused": 1})
    assert (activity.latency_s.max, activity.rate_per_s) == (1.0, 5 / 33)
    assert record.kinds() == {Kind.REFUSED, Kind.SPAWN, Kind.NO_ANSWER}
    nothing = activity_of(event(took_s=0.0, reason=AWAY))
    assert nothing.latency_s == Statistics() and nothing.rate_per_s is None


def test_counts_are_those_of_the_operations_asked_for() -> None:
    record = folded([event("activity"), event("read", reason=AWAY)])
    assert (record.count(["activity", "read", "list"]), record.failures(["activity", "read", "list"])) == (2, 1)
    assert (record.count(["list"]), record.failures(["activity"]), record.late_share(["list"])) == (0, 0, 0)
    late = folded(Event("activity", "x", 10, 10 + lateness_s, 11) for lateness_s in (0.0, 0.0, 0.0, 0.5))
    late.add(Event("ping", "x", 10, 20, 21))
    assert (late.late_share(["activity"]), late.late_share(["activity", "ping"])) == (0.25, 0.4)


def test_each_person_has_a_row_of_their_steps_in_order() -> None:
    record = Recorder(people_steps={"server_ready", "stay"})
    for user, step in (("b", "server_ready"), ("a", "start_server"), ("a", "server_ready"), ("b", "stay")):
        record.add(Event(step, user, 0, 0, 1))
    rows = {user: list(row) for user, row in record.people.items()}
    assert list(rows.items()) == [("b", ["server_ready", "stay"]), ("a", ["server_ready"])]
    record = hst.new_recorder()
    for step in hst.STEPS:
        record.add(Event(step, "a", 0, 0, 1))
    assert record.people["a"].keys() == {*hst.PERSONAL, "stop_server", "delete_user"}


def random_events(count: int) -> list[Event]:
    """Events whose times are eighths of a second, so that their sums are exact in any order."""
    rng, events = random.Random(1), []
    for n in range(count):
        due_s = rng.randrange(7200) / 8
        sent_s = due_s + rng.choice((0.0, 0.25))
        reason, step = rng.choice((None, None, None, AWAY, REFUSED)), rng.choice(("activity", "read"))
        ended_s, backoff_s = sent_s + rng.randrange(1, 9) / 8, rng.choice((0.0, 0.125))
        events.append(Event(step, f"u{n % 7}", due_s, sent_s, ended_s, reason, 1, backoff_s))
    return events


def test_threads_may_record_events_in_any_order() -> None:
    events, record = random_events(4000), Recorder()
    threads = [threading.Thread(target=lambda part=part: [*map(record.add, events[part::4])]) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    alone = folded(events)
    assert (record.summarise(), record.timeline(0.0)) == (alone.summarise(), alone.timeline(0.0))


def test_a_timeline_counts_every_event_once() -> None:
    events = (event(at_s=100 + n / 4, took_s=0.2, reason=AWAY if n == 39 else None) for n in range(40))
    seen = folded(events).timeline(began_s=100.0)["activity"]
    assert (seen["span_s"], seen["at_s"][:2]) == (1, [0.5, 1.5])
    assert (seen["count"], seen["failed"]) == ([4] * 9 + [3], [0] * 9 + [1])
    assert (seen["p50_s"][0], seen["max_s"][0]) == (0.2, 0.2)


def test_a_timeline_has_at_most_200_spans() -> None:
    """So that an hour takes no more memory than minutes."""
    record = folded(event(at_s=n + 0.5, took_s=0.001 * n, reason=AWAY if n % 4 else None) for n in range(3600))
    seen = record.timeline(0.0)["activity"]
    assert len(seen["at_s"]) == math.ceil(3600 / 32) and seen["span_s"] == 32
    assert (seen["at_s"][3], seen["count"][3], seen["failed"][3], seen["max_s"][3]) == (112, 8, 24, 0.124)
    whole = spread(0.001 * n for n in range(0, 3600, 4)).summary()  # spans that were merged lose nothing
    assert vars(record.summarise()["activity"].latency_s) == pytest.approx(vars(whole))


def test_traffic_adds_up_over_processes() -> None:
    total = Traffic()
    assert total.summarise() == hst.Http(0, 0, 0, {}, 0, None)
    for requests, observers, statuses in ((10, 1, [200] * 9), (20, 4, [200] * 5 + [429] * 2 + [503])):
        part = Traffic()
        for n in range(requests):
            part.sent(observer=n < observers, again=n % 10 == 9)
        for status in statuses:
            part.answered(status, in_front=status == 503)
        total.add(part.counts)
    statuses, in_front = {"200": 14, "429": 2, "503": 1}, {"503": 1}
    assert total.summarise() == hst.Http(30, 3, 2, statuses, 5, 5 / 30, in_front=in_front)
