"""Events, and the recorder that folds them: what is measured, and that it stays small and exact."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import threading
import tracemalloc
from collections.abc import Callable

import pytest

import hub_stress_test as hst
from hub_stress_test import Distribution, Event, Kind, Reason, Recorder, Statistics, Traffic

AWAY = Reason(Kind.NO_ANSWER, "connection refused")
REFUSED = Reason(Kind.REFUSED, "500")


def event(step: str = "activity", at_s: float = 0.0, took_s: float = 1.0, reason: Reason | None = None) -> Event:
    return Event(step, "hub-stress-test-1", at_s, at_s, at_s + took_s, reason)


# ==== Event ==========================================================================================================


def test_latency_counts_from_when_due_and_leaves_out_what_the_hub_made_us_sleep() -> None:
    seen = Event("activity", "x", due_s=10, sent_s=12, ended_s=15, backoff_s=1)
    assert (seen.latency_s, seen.lateness_s) == (4, 2)


def test_neither_latency_nor_lateness_is_below_zero() -> None:
    seen = Event("activity", "x", due_s=10, sent_s=9.99, ended_s=10.5, backoff_s=0.6)
    assert (seen.latency_s, seen.lateness_s) == (0, 0)


# ==== Distribution ===================================================================================================


def folded(values: list[float]) -> Distribution:
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    return distribution


def values_of(count: int, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [rng.lognormvariate(-3, 1.5) for _ in range(count)]


def test_percentiles_are_within_half_a_percent_of_exact_and_the_rest_is_exact() -> None:
    values = values_of(20_000)
    summary = folded(values).summary()
    values.sort()
    assert (summary.min, summary.max) == (values[0], values[-1])
    assert summary.mean == pytest.approx(statistics.fmean(values))
    for percent in (50, 90, 95, 99):
        exact = values[math.ceil(percent / 100 * len(values)) - 1]
        assert getattr(summary, f"p{percent}") == pytest.approx(exact, rel=0.005)


def test_statistics_of_one_value_are_that_value_and_of_none_are_none() -> None:
    assert folded([]).summary() == Statistics()
    assert set(vars(folded([0.25]).summary()).values()) == {0.25}


def test_a_duration_of_nothing_is_counted() -> None:
    summary = folded([0.0, 0.0, 1.0]).summary()
    assert (summary.min, summary.p50, summary.max) == (0.0, pytest.approx(0.0, abs=1e-5), 1.0)


def test_distributions_of_neighbouring_spans_merge_into_one() -> None:
    values = [n / 100 for n in range(1, 1000)]
    one, other, both = folded(values[::3]), folded(values[1::3] + values[2::3]), folded(values)
    one.merge(other)
    one.merge(folded([]))
    assert vars(one.summary()) == pytest.approx(vars(both.summary()))
    assert one.buckets == both.buckets and one.count == 999


@pytest.mark.parametrize(
    ("name", "samples", "told"),
    [
        ("p90", 9, False),
        ("p90", 10, True),
        ("p95", 19, False),
        ("p95", 20, True),
        ("p99", 99, False),
        ("p99", 100, True),
    ],
)
def test_a_percentile_of_so_few_that_it_is_but_the_maximum_is_not_told(name: str, samples: int, told: bool) -> None:
    operation = recorded([event(took_s=float(n + 1)) for n in range(samples)]).summarise()["activity"]
    assert (operation.enough(name) is not None) is told
    single = recorded([event()]).summarise()["activity"]
    assert all(single.enough(always) is not None for always in ("min", "mean", "p50", "max"))


# ==== Recorder =======================================================================================================


def test_a_failure_is_counted_and_not_averaged_in() -> None:
    record = Recorder()
    record.add(event(took_s=1.0))
    record.add(event(at_s=1.0, took_s=30.0, reason=REFUSED))
    activity = record.summarise()["activity"]
    assert (activity.count, activity.failed, activity.errors) == (2, 1, {"500": 1})
    assert activity.latency_s.max == 1.0
    assert activity.rate_per_s == 2 / 31


def test_an_operation_that_only_failed_has_no_latency() -> None:
    record = Recorder()
    record.add(event(reason=AWAY))
    activity = record.summarise()["activity"]
    assert activity.latency_s == Statistics() and activity.enough("max") is None
    assert activity.errors == {"connection refused": 1}


def test_a_single_moment_has_no_rate() -> None:
    record = Recorder()
    record.add(event(took_s=0.0))
    assert record.summarise()["activity"].rate_per_s is None


def test_percentiles_are_told_by_how_many_succeeded() -> None:
    record = Recorder()
    for n in range(25):
        record.add(event(reason=None if n < 19 else AWAY))
    assert record.summarise()["activity"].enough("p95") is None
    record.add(event())
    assert record.summarise()["activity"].enough("p95") == 1.0


def test_equal_reasons_are_counted_together_and_told_by_their_text_whatever_their_kind() -> None:
    record = Recorder()
    for reason in (REFUSED, REFUSED, Reason(Kind.SPAWN, "500"), AWAY):
        record.add(event(reason=reason))
    assert record.summarise()["activity"].errors == {"500": 3, "connection refused": 1}
    assert record.kinds() == {Kind.REFUSED, Kind.SPAWN, Kind.NO_ANSWER}


def test_counts_are_asked_by_operation_and_are_nought_for_what_never_was() -> None:
    record = Recorder()
    record.add(event("activity"))
    record.add(event("read", reason=AWAY))
    assert (record.count(["activity", "read", "list"]), record.failures(["activity", "read", "list"])) == (2, 1)
    assert (record.count(["list"]), record.failures(["activity"])) == (0, 0)
    assert record.late_share(["list"]) == 0


def test_the_share_of_late_sends_is_that_of_the_operations_asked_for() -> None:
    record = Recorder()
    for lateness_s in (0.0, 0.0, 0.0, 0.5):
        record.add(Event("activity", "x", 10, 10 + lateness_s, 11))
    record.add(Event("ping", "x", 10, 20, 21))
    assert record.late_share(["activity"]) == 0.25
    assert record.late_share(["activity", "ping"]) == 0.4


def test_each_person_has_a_row_of_those_steps_that_are_kept_in_the_order_in_which_they_came() -> None:
    record = Recorder(people_steps={"server_ready", "stay"})
    for user, step in (("b", "server_ready"), ("a", "start_server"), ("a", "server_ready"), ("b", "stay")):
        record.add(Event(step, user, 0, 0, 1))
    assert list(record.people) == ["b", "a"]
    assert {user: list(row) for user, row in record.people.items()} == {
        "b": ["server_ready", "stay"],
        "a": ["server_ready"],
    }
    assert record.people["b"]["stay"].user == "b"


def test_a_runs_recorder_keeps_the_steps_of_each_persons_way() -> None:
    record = hst.new_recorder()
    for step in hst.STEPS:
        record.add(Event(step, "a", 0, 0, 1))
    of_people = {*hst.PERSONAL, "stop_server", "delete_user"}
    assert record.people["a"].keys() == of_people


def test_every_event_is_handed_on_to_each_listener() -> None:
    first: list[Event] = []
    second: list[Event] = []
    listeners: list[Callable[[Event], None]] = [first.append, second.append]
    record = Recorder(*listeners)
    events = [event(), event(reason=AWAY)]
    for one in events:
        record.add(one)
    assert first == second == events


def random_events(seed: int, count: int) -> list[Event]:
    rng = random.Random(seed)
    events = []
    for n in range(count):
        due_s = rng.uniform(0, 900)
        sent_s = due_s + rng.choice((0.0, 0.3))
        reason = rng.choice((None, None, None, AWAY, REFUSED))
        step = rng.choice(("activity", "read"))
        events.append(Event(step, f"u{n % 7}", due_s, sent_s, sent_s + rng.random(), reason, 1, rng.choice((0.0, 0.1))))
    return events


def recorded(events: list[Event]) -> Recorder:
    record = Recorder()
    for one in events:
        record.add(one)
    return record


def same(a: Recorder, b: Recorder) -> bool:
    """Whether two recorders say the same, but for the last digits of sums."""
    told = [hst.as_json({"operations": one.summarise(), "timeline": one.timeline(0.0)}) for one in (a, b)]
    return told[0] == approximately(told[1])


def approximately(data: object) -> object:
    if isinstance(data, dict):
        return {name: approximately(value) for name, value in data.items()}
    if isinstance(data, list):
        return [approximately(value) for value in data]
    return pytest.approx(data, rel=1e-9) if isinstance(data, float) else data


def test_events_may_come_in_any_order() -> None:
    events = random_events(1, 3000)
    assert same(recorded(events[::2] + events[1::2]), recorded(events))


def test_the_operations_of_another_recorder_are_included() -> None:
    record, other = recorded([event("ping")]), recorded([event("activity"), event("activity", reason=AWAY)])
    record.include(other)
    assert {name: (seen.count, seen.failed) for name, seen in record.summarise().items()} == {
        "ping": (1, 0),
        "activity": (2, 1),
    }


def test_threads_may_record_at_the_same_time() -> None:
    events = random_events(2, 4000)
    record = Recorder()
    threads = [threading.Thread(target=lambda part=part: [*map(record.add, events[part::4])]) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert same(record, recorded(events))


def test_a_timeline_counts_every_event_once_from_when_the_run_began() -> None:
    record = Recorder()
    for n in range(40):
        record.add(event(at_s=100 + n / 4, took_s=0.2, reason=AWAY if n == 39 else None))
    seen = record.timeline(began_s=100.0)["activity"]
    assert (seen["span_s"], seen["at_s"][:2]) == (1, [0.5, 1.5])
    assert (seen["count"], seen["failed"]) == ([4] * 9 + [3], [0] * 9 + [1])
    assert (seen["p50_s"][0], seen["max_s"][0]) == (0.2, 0.2)


def test_a_timeline_is_by_the_second_and_widens_before_it_has_more_than_200_spans() -> None:
    record = recorded([event(at_s=n + 0.5, took_s=0.001 * n, reason=AWAY if n % 4 else None) for n in range(3600)])
    seen = record.timeline(0.0)["activity"]
    assert len(seen["at_s"]) == math.ceil(3600 / 32) and seen["span_s"] == 32
    assert (seen["at_s"][3], seen["count"][3], seen["failed"][3], seen["max_s"][3]) == (112, 8, 24, 0.124)
    whole = folded([0.001 * n for n in range(0, 3600, 4)]).summary()
    assert vars(record.summarise()["activity"].latency_s) == pytest.approx(vars(whole))


def traced(events: int, over_s: float) -> int:
    """Bytes that a recorder holds after so many events in so many seconds."""
    rng = random.Random(1)
    latencies = itertools.cycle([rng.lognormvariate(-3, 1) for _ in range(1000)])
    tracemalloc.start()
    try:
        record = Recorder()
        for n in range(events):
            record.add(event(at_s=n * over_s / events, took_s=next(latencies)))
        assert record.count(["activity"]) == events
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_an_hour_costs_no_more_memory_than_a_few_minutes() -> None:
    few_minutes, hour = traced(20_000, 200), traced(60_000, 3600)
    assert hour < 2 * few_minutes


# ==== Traffic ========================================================================================================


def traffic_of(requests: int, observers: int, statuses: list[int]) -> Traffic:
    traffic = Traffic()
    for n in range(requests):
        traffic.sent(observer=n < observers, again=n % 10 == 9)
    for status in statuses:
        traffic.answered(status)
    return traffic


def test_traffic_counts_every_request_and_every_answer() -> None:
    http = traffic_of(20, 5, [200] * 17 + [429] * 2).summarise()
    assert (http.requests, http.retries, http.throttled) == (20, 2, 2)
    assert http.statuses == {"200": 17, "429": 2}
    assert (http.observer_requests, http.observer_share) == (5, 0.25)


def test_without_a_request_there_is_no_share() -> None:
    assert Traffic().summarise() == hst.Http(0, 0, 0, {}, 0, None)


def test_the_traffic_of_several_processes_adds_up() -> None:
    total = Traffic()
    for part in (traffic_of(10, 1, [200] * 9), traffic_of(20, 2, [200] * 5 + [503])):
        total.add(part.counts)
    assert total.summarise() == hst.Http(30, 3, 0, {"200": 14, "503": 1}, 3, 0.1)
