"""The pure rules: plain values in and out."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest

import hub_stress_test as hst
from hub_stress_test import ExitCode, Sample, ServerState

NAMES = {
    # name: (of any run, of the unnamed run, of run "a", of run "a-1")
    "hub-stress-test-1": (True, True, False, False),
    "hub-stress-test-1024": (True, True, False, False),
    "hub-stress-test-a-1": (True, False, True, False),
    "hub-stress-test-a-1-1": (True, False, False, True),
    "hub-stress-tester": (False, False, False, False),
    "hub-stress-test": (False, False, False, False),
    "hub-stress-test-": (False, False, False, False),
    "hub-stress-test-admin": (False, False, False, False),
    "hub-stress-test-01": (False, False, False, False),
    "hub-stress-test-1\n": (False, False, False, False),
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
        assert hst.index_of(hst.username(index, run), run) == index


def test_names_follow_the_highest_index_so_that_a_gap_collides_with_nobody() -> None:
    assert hst.first_free_index([]) == 1
    assert hst.first_free_index(["hub-stress-test-2", "hub-stress-test-7", "alice", "hub-stress-test-a-90"]) == 8
    assert hst.first_free_index(["hub-stress-test-a-90"], "a") == 91


@pytest.mark.parametrize(
    ("model", "state"),
    [
        ({"servers": {}}, ServerState.STOPPED),
        ({"servers": None}, ServerState.STOPPED),
        ({"servers": {"": {"pending": "spawn", "ready": False}}}, ServerState.STARTING),
        ({"servers": {"": {"pending": None, "ready": True}}}, ServerState.READY),
        ({"servers": {"": {"pending": "stop", "ready": False}}}, ServerState.STOPPING),
        ({"servers": {"": {"pending": None, "ready": False, "stopped": True}}}, ServerState.STOPPED),
        ({"name": "a token without read:servers sees no servers"}, ServerState.UNKNOWN),
    ],
)
def test_a_user_model_means(model: dict[str, Any], state: ServerState) -> None:
    assert hst.server_state(model) is state


@pytest.mark.parametrize("status", [0, 400, 403, 429, 500, 502, 503])
def test_an_answer_that_is_not_done_means_look_again(status: int) -> None:
    assert hst.state_after_stop(status) is ServerState.UNKNOWN
    assert hst.state_after_delete(status) is ServerState.UNKNOWN


def test_scopes_limited_to_some_users_do_not_count() -> None:
    assert hst.missing_scopes(["servers", "delete:users!user=x"], {"servers", "delete:users"}) == ["delete:users"]
    assert hst.missing_scopes(["start:servers"], {"servers"}) == []


@pytest.mark.parametrize(
    ("endpoint", "location", "guess"),
    [
        ("https://hub.example.org", None, "https://hub.example.org/hub/api"),
        ("https://hub.example.org/hub", None, "https://hub.example.org/hub/api"),
        ("https://example.org/jupyter", None, "https://example.org/jupyter/hub/api"),
        ("http://hub.example.org/hub/api", "https://hub.example.org/hub/api/", "https://hub.example.org/hub/api"),
        ("http://hub.example.org/hub/api", "/login", "http://hub.example.org/hub/api"),
    ],
)
def test_a_likely_endpoint_is_recognised(endpoint: str, location: str | None, guess: str) -> None:
    assert hst.likely_endpoint(endpoint, location) == guess


@pytest.mark.parametrize(
    ("left", "interrupted_by", "failed", "code"),
    [
        ([], None, 0, ExitCode.OK),
        ([], None, 3, ExitCode.FAILED),
        ([], 2, 3, ExitCode.SIGINT),
        ([], 15, 0, ExitCode.SIGTERM),
        (["hub-stress-test-1"], None, 0, ExitCode.LEFT_BEHIND),
        (["hub-stress-test-1"], 2, 3, ExitCode.LEFT_BEHIND),
    ],
)
def test_the_exit_code(left: list[str], interrupted_by: int | None, failed: int, code: ExitCode) -> None:
    assert hst.exit_code(left, interrupted_by, bool(failed)) is code


def test_the_schedule_does_not_move() -> None:
    pace = hst.Pace(rate_per_s=5, started_s=100)
    assert [pace.due_s(n) for n in (0, 1, 5, 50)] == [100, 100.2, 101, 110]


def test_percentiles_are_within_one_percent_of_exact() -> None:
    rng = random.Random(1)
    values = [rng.lognormvariate(-3, 1.5) for _ in range(20_000)]
    folded = hst.Distribution()
    for value in values:
        folded.add(value)
    summary = folded.summary()
    values.sort()
    assert summary["min"] == values[0] and summary["max"] == values[-1]
    assert summary["mean"] == pytest.approx(statistics.fmean(values))
    for percent in (50, 90, 95, 99):
        exact = values[math.ceil(percent / 100 * len(values)) - 1]
        assert summary[f"p{percent}"] == pytest.approx(exact, rel=0.01)


def test_percentiles_of_one_value_are_that_value_and_of_none_are_none() -> None:
    folded = hst.Distribution()
    assert set(folded.summary().values()) == {None}
    folded.add(0.25)
    assert set(folded.summary().values()) == {0.25}


def test_a_failure_is_counted_and_not_averaged_in() -> None:
    metrics = hst.Metrics()
    metrics.add(Sample("activity", "x", 0.0, 0.0, 1.0))
    metrics.add(Sample("activity", "x", 1.0, 1.0, 31.0, error="500"))
    activity = metrics.summarise()["activity"]
    assert (activity["count"], activity["failed"], activity["errors"]) == (2, 1, {"500": 1})
    assert activity["latency_s"]["max"] == 1.0


def test_an_operation_that_only_failed_has_no_latency() -> None:
    metrics = hst.Metrics()
    metrics.add(Sample("activity", "x", 0.0, 0.0, 1.0, error="connection refused"))
    assert metrics.summarise()["activity"]["latency_s"]["p95"] is None


def test_latency_counts_from_when_due_and_leaves_out_what_the_hub_made_us_sleep() -> None:
    sample = Sample("activity", "x", due_s=10, sent_s=12, answered_s=15, backoff_s=1)
    assert (sample.latency_s, sample.lateness_s) == (4, 2)


def test_a_secret_shows_itself_to_no_repr() -> None:
    secret = hst.Secret("abc123")
    assert "abc123" not in repr(secret) + repr({"token": secret}) + repr([secret])
    assert secret == "abc123"


def test_urls_are_shown_without_credentials() -> None:
    assert hst.without_credentials("https://me:pw@hub.example.org:8/hub/api") == "https://hub.example.org:8/hub/api"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.0021, "2.1 ms"), (0.84, "840 ms"), (0.99949, "999 ms"), (1.254, "1.25 s"), (62.06, "62.1 s")],
)
def test_durations_read_with_three_digits_and_a_unit(seconds: float | None, text: str) -> None:
    assert hst.duration_text(seconds) == text
