"""Words, numbers and names: plain values in and out."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

import hub_stress_test as hst


def made(ends: str) -> list[str]:
    """Names of users, from their ends."""
    return [f"hub-stress-test{end}" for end in ends.split()]


TEXTS: dict[Callable[..., str], list[tuple[tuple[Any, ...], str]]] = {
    hst.counted: [
        ((1, "user"), "1 user"),
        ((3000, "user"), "3,000 users"),
        ((1.0, "person", "people"), "1 person"),
        ((1.5, "person", "people"), "1.5 people"),
    ],
    hst.duration_text: [
        ((None,), "–"),
        ((0.0,), "0.0 ms"),
        ((0.00994,), "9.9 ms"),
        ((0.00996,), "10 ms"),
        ((0.99949,), "999 ms"),
        ((0.9996,), "1.00 s"),
        ((9.996,), "10.0 s"),
        ((99.96,), "1 min 40 s"),
        ((3599.7,), "1 h 0 min"),
        ((90061,), "25 h 1 min"),
    ],
    hst.bytes_text: [((40_400,), "40 kB"), ((994_000,), "994 kB"), ((117e6,), "117 MB")],
    hst.utc: [((datetime(2026, 11, 20, 16, 0, 0, 999_999, tzinfo=timezone.utc),), "2026-11-20T16:00:00Z")],
    hst.without_credentials: [
        (("https://me:p@w@hub.example.org/",), "https://hub.example.org/"),
        (("http://[::1]:8000/hub/api",), "http://[::1]:8000/hub/api"),
    ],
    hst.clock_text: [((-3,), "00:00"), ((74.4,), "01:14"), ((3599.6,), "1:00:00"), ((36061,), "10:01:01")],
    hst.moment_text: [
        ((74, 0), "01:14"),
        ((74, 300), "01:14 of 05:00"),
        ((300, 300), "05:00"),
        ((370, 300, 90), "06:10, holding for 01:30 more"),
    ],
    hst.names_text: [
        (([],), ""),
        ((made("-2 -1"),), "hub-stress-test-1 hub-stress-test-2"),
        ((made("-10 -9 -8 -2"),), "hub-stress-test-2 hub-stress-test-8 to -10"),
        ((made("-a-1 -2 -b-3"),), "hub-stress-test-2 hub-stress-test-a-1 hub-stress-test-b-3"),
    ],
    hst.purge_command: [
        ((None,), "hub-stress-test purge"),
        (("night", True), "hub-stress-test purge --own-servers --run night"),
    ],
}


@pytest.mark.parametrize("function", TEXTS, ids=lambda function: function.__name__)
def test_values_become_texts(function: Callable[..., str]) -> None:
    assert [function(*values) for values, _ in TEXTS[function]] == [text for _, text in TEXTS[function]]


NAMES = {
    # name: (of any run, of the unnamed run, of run "a", of run "a-1")
    "hub-stress-test-1": (True, True, False, False),
    "hub-stress-test-0": (True, True, False, False),
    "hub-stress-test-1024": (True, True, False, False),
    "hub-stress-test-a-1": (True, False, True, False),
    "hub-stress-test-a-1-1": (True, False, False, True),
    **dict.fromkeys(
        [
            *("hub-stress-tester", "hub-stress-test", "hub-stress-test-", "hub-stress-test-admin", "alice"),
            *("hub-stress-test-01", "hub-stress-test-1\n", "hub-stress-test-1 ", "hub-stress-test-١"),
            *("hub-stress-test-a_b-1", "hub-stress-test--1", "xhub-stress-test-1", "Hub-stress-test-1"),
        ],
        (False, False, False, False),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_ours_only_if_all_of_it_fits(name: str) -> None:
    assert tuple(hst.is_test_user(name, run) for run in (None, "", "a", "a-1")) == NAMES[name]


@pytest.mark.parametrize("run", ["", "a", "a-1", "7"])
def test_every_name_that_a_run_makes_is_recognised(run: str) -> None:
    for index in (1, 9, 10, 12345):
        name = hst.username(index, run)
        assert hst.index_of(name, run) == index
        assert hst.is_test_user(name) and hst.is_test_user(name, run) and not hst.is_test_user(name, "other")


def test_names_follow_the_highest_index() -> None:
    assert hst.first_free_index([]) == 1
    assert hst.first_free_index(["hub-stress-test-2", "hub-stress-test-7", "alice", "hub-stress-test-a-90"]) == 8
    assert hst.first_free_index(["hub-stress-test-a-90"], "a") == 91


def test_the_second_user_comes_before_the_tenth() -> None:
    ordered = ["alice", *(hst.username(index, run) for run in ("", "a", "b") for index in (1, 2, 9, 10, 11, 100))]
    assert sorted(random.Random(1).sample(ordered, len(ordered)), key=hst.natural) == ordered
