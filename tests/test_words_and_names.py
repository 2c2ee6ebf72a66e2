"""Words, numbers and names: plain values in and out."""

from __future__ import annotations

import random
from datetime import datetime, timezone

import pytest

import hub_stress_test as hst

DURATIONS = [
    (None, "–"),
    (0.0, "0.0 ms"),
    (0.0021, "2.1 ms"),
    (0.00994, "9.9 ms"),
    (0.00996, "10 ms"),
    (0.84, "840 ms"),
    (0.99949, "999 ms"),
    (0.9996, "1.00 s"),
    (1.254, "1.25 s"),
    (9.996, "10.0 s"),
    (62.06, "62.1 s"),
    (99.94, "99.9 s"),
    (99.96, "1 min 40 s"),
    (125, "2 min 5 s"),
    (1234.6, "20 min 35 s"),
    (3599.7, "1 h 0 min"),
    (6000, "1 h 40 min"),
    (90061, "25 h 1 min"),
]


def test_a_number_has_the_noun_that_fits() -> None:
    assert [hst.counted(number, "user") for number in (0, 1, 3000)] == ["0 users", "1 user", "3,000 users"]
    assert [hst.counted(number, "person", "people") for number in (1.0, 1.5)] == ["1 person", "1.5 people"]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_durations_read_with_three_digits_and_a_unit_and_from_100_seconds_on_in_minutes(
    seconds: float | None, text: str
) -> None:
    assert hst.duration_text(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(None, "–"), (40_400, "40 kB"), (994_000, "994 kB"), (117e6, "117 MB")])
def test_memory_reads_in_kilobytes_or_megabytes(number: float | None, text: str) -> None:
    assert hst.bytes_text(number) == text


def test_measurements_are_kept_to_a_tenth_of_a_millisecond() -> None:
    assert (hst.rounded(1.23456), hst.rounded(None)) == (1.2346, None)


def test_moments_read_as_utc() -> None:
    moment = datetime(2026, 11, 20, 16, 0, 0, 999_999, tzinfo=timezone.utc)
    assert hst.utc(moment) == "2026-11-20T16:00:00Z"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pw@hub.example.org:8/hub/api", "https://hub.example.org:8/hub/api"),
        ("https://me:p@w@hub.example.org/", "https://hub.example.org/"),
        ("http://[::1]:8000/hub/api", "http://[::1]:8000/hub/api"),
    ],
)
def test_urls_are_shown_without_credentials(url: str, shown: str) -> None:
    assert hst.without_credentials(url) == shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "00:00"), (0, "00:00"), (74.4, "01:14"), (3599.6, "1:00:00"), (36061, "10:01:01")]
)
def test_a_moment_of_a_run_reads_as_a_clock(seconds: float, text: str) -> None:
    assert hst.clock_text(seconds) == text


@pytest.mark.parametrize(
    ("moments", "text"),
    [
        ((74,), "01:14"),
        ((74, 300), "01:14 of 05:00"),
        ((74, 300, 360), "01:14 of 05:00"),
        ((300, 300, 360), "05:00 of at most 06:00"),
        ((400, 300, 360), "06:40"),  # what should not be is no reason to say less than nothing
        ((370, 300, 360, 90), "06:10, holding for 01:30 more"),
    ],
)
def test_what_is_left_to_wait_is_never_more_than_the_last_arrival_and_the_time_out(
    moments: tuple[float, ...], text: str
) -> None:
    assert hst.moment_text(*moments) == text


@pytest.mark.parametrize(
    ("numbers", "ping_s", "cpu_share", "text"),
    [
        ({}, None, None, "01:14"),
        ({"came": 0, "failed": 0}, None, None, "01:14 | 0 came"),
        (
            {"came": 1061, "starting": 12, "failed": 2},
            0.024,
            0.31,
            "1,061 came, 12 starting, 2 failed | ping 24 ms | hub 31 %",
        ),
        ({"came": 1, "at work": 1}, None, 0.0, "01:14 | 1 came, 1 at work | hub 0 %"),
    ],
)
def test_the_status_line_has_what_is_known(
    numbers: dict[str, int], ping_s: float | None, cpu_share: float | None, text: str
) -> None:
    assert hst.status_line("01:14", numbers, ping_s, cpu_share).endswith(text)


def test_a_secret_shows_itself_to_no_repr() -> None:
    secret = hst.Secret("abc123")
    plan = hst.Plan(token=secret)
    assert "abc123" not in repr(secret) + repr({"token": secret}) + repr([secret]) + repr(plan)
    assert secret == "abc123"


NAMES = {
    # name: (of any run, of the unnamed run, of run "a", of run "a-1")
    "hub-stress-test-1": (True, True, False, False),
    "hub-stress-test-0": (True, True, False, False),
    "hub-stress-test-1024": (True, True, False, False),
    "hub-stress-test-a-1": (True, False, True, False),
    "hub-stress-test-a-1-1": (True, False, False, True),
    "hub-stress-tester": (False, False, False, False),
    "hub-stress-test": (False, False, False, False),
    "hub-stress-test-": (False, False, False, False),
    "hub-stress-test-admin": (False, False, False, False),
    "hub-stress-test-01": (False, False, False, False),
    "hub-stress-test-1\n": (False, False, False, False),
    "hub-stress-test-1 ": (False, False, False, False),
    "hub-stress-test-١": (False, False, False, False),
    "hub-stress-test-a_b-1": (False, False, False, False),
    "hub-stress-test--1": (False, False, False, False),
    "xhub-stress-test-1": (False, False, False, False),
    "Hub-stress-test-1": (False, False, False, False),
    "alice": (False, False, False, False),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_ours_only_if_the_whole_of_it_follows_the_naming(name: str) -> None:
    assert tuple(hst.is_test_user(name, run) for run in (None, "", "a", "a-1")) == NAMES[name]


@pytest.mark.parametrize("run", ["", "a", "a-1", "7"])
def test_every_name_that_a_run_makes_is_recognised_as_that_runs(run: str) -> None:
    for index in (1, 9, 10, 12345):
        name = hst.username(index, run)
        assert hst.index_of(name, run) == index
        assert hst.is_test_user(name) and hst.is_test_user(name, run) and not hst.is_test_user(name, "other")


def test_names_follow_the_highest_index_so_that_a_gap_collides_with_nobody() -> None:
    assert hst.first_free_index([]) == 1
    assert hst.first_free_index(["hub-stress-test-2", "hub-stress-test-7", "alice", "hub-stress-test-a-90"]) == 8
    assert hst.first_free_index(["hub-stress-test-a-90"], "a") == 91


def test_the_second_user_comes_before_the_tenth() -> None:
    in_order = [hst.username(index, run) for run in ("", "a", "b") for index in (1, 2, 9, 10, 11, 100)]
    shuffled = random.Random(1).sample(in_order, len(in_order))
    assert sorted(shuffled, key=hst.natural) == in_order
    assert sorted(["b", "alice", "a"], key=hst.natural) == ["a", "alice", "b"]


def test_the_command_that_removes_what_is_left_names_the_run() -> None:
    assert hst.purge_command(None) == "hub-stress-test purge"
    assert hst.purge_command("night") == "hub-stress-test purge --run night"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([7], "hub-stress-test-7"),
        ([2, 1], "hub-stress-test-1 hub-stress-test-2"),
        ([*range(1, 61)], "hub-stress-test-1 to -60"),
        ([10, 9, 8, 2], "hub-stress-test-2 hub-stress-test-8 to -10"),
    ],
)
def test_names_in_a_row_are_shown_as_first_and_last(numbers: list[int], text: str) -> None:
    assert hst.names_text(map(hst.username, numbers)) == text


def test_names_of_different_runs_are_no_row() -> None:
    names = ["hub-stress-test-a-1", "hub-stress-test-2", "hub-stress-test-b-3"]
    assert hst.names_text(names) == "hub-stress-test-2 hub-stress-test-a-1 hub-stress-test-b-3"
