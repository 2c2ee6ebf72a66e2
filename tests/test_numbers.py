"""Numbers that can be believed: the open model, conditions, capacity, the results file."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import MODULE, Outcome, refused_usage, run_tool, tool_users
from known_server import KnownServer, per_second
from localhub import LocalHub

import hub_stress_test as hst

SCHEMA = json.loads(Path(__file__).with_name("results.schema.json").read_text())


def run_with_results(path: Path, *words: str, **where: Any) -> tuple[Outcome, dict[str, Any]]:
    """A run and the results that it wrote, which follow the schema."""
    done = run_tool(*words, "--results", str(path), **where)
    found: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["exit_code"] == done.code
    return done, found


def test_each_command_writes_results_that_follow_the_schema(hub: LocalHub, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    _, stress = run_with_results(file, "stress-test", "-c", "6", "-b", "3", hub=hub)
    assert stress["servers"]["ready"] == 6 == stress["users"]["created"] == stress["users"]["deleted"]
    assert stress["operations"]["server_ready"]["count"] == 6
    assert len(stress["servers"]["slowest"]) == 5
    assert stress["http"]["statuses"]["201"] == 8
    _, activity = run_with_results(file, "activity-stress-test", "-c", "4", hub=hub)
    assert activity["operations"]["activity"]["count"] == 4 and activity["servers"] is None
    _, purge = run_with_results(file, "purge", hub=hub)
    assert purge["users"] == {"created": 0, "deleted": 0, "kept": 0, "left_behind": []}
    assert hub.token not in file.read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_the_number_of_requests_is_the_one_that_the_hub_served(new_hub: LocalHub, tmp_path: Path) -> None:
    _, found = run_with_results(tmp_path / "r", "stress-test", "-c", "20", "-b", "10", hub=new_hub)
    http, pings = found["http"], found["operations"]["ping"]["count"]
    assert http["requests"] == sum(http["statuses"].values())
    assert http["observer_requests"] == pings + 3  # the hub's metrics before, after the load and at the end
    assert http["observer_share"] == http["observer_requests"] / http["requests"]
    assert http["requests"] - http["observer_requests"] == 2 + 2 + 2 + 20 * 3  # checks, lists, creates; three a server


@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.5])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_interrupt_of_all_processes_cleans_up_and_writes_whole_results(
    number: int, code: int, after_s: float, new_hub: LocalHub, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    words = [sys.executable, str(MODULE), "activity-stress-test", "-c", "10", "--rate", "20", "--duration", "60s"]
    words += ["--processes", "2", "--workers", "10", "--results", str(file)]
    run = subprocess.Popen(
        words, env=os.environ | new_hub.environment, stdout=-3, stderr=-1, text=True, start_new_session=True
    )
    while len(tool_users(new_hub)) < 10:
        time.sleep(0.02)
    time.sleep(after_s)
    os.killpg(run.pid, number)  # as a terminal does
    _, stderr = run.communicate(timeout=30)
    assert (run.returncode, "Traceback" in stderr) == (code, False), stderr
    found = json.loads(file.read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["users"]["left_behind"] == [] and not tool_users(new_hub)
    assert after_s < 1 or found["operations"]["activity"]["count"] > 0


def test_an_open_load_sends_every_request_at_its_time_and_counts_each(tmp_path: Path) -> None:
    with KnownServer(service_s=0.01) as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "50", "--duration", "4s")
        _, found = run_with_results(tmp_path / "r", *words, env=server.environment)
        arrivals = server.arrivals()
    assert len(arrivals) == 200 == found["operations"]["activity"]["count"]
    assert all(40 <= number <= 60 for number in per_second(arrivals, 50))  # the bench holds it to 1 %
    assert found["operations"]["activity"]["latency_s"]["min"] >= 0.01


def test_a_load_over_processes_is_one_load(tmp_path: Path) -> None:
    with KnownServer() as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "60", "--duration", "3s", "--processes", "3")
        _, found = run_with_results(tmp_path / "r", *words, env=server.environment)
        arrivals = server.arrivals()
    assert len(arrivals) == 180 == found["operations"]["activity"]["count"]
    assert arrivals[-1] - arrivals[0] < 5  # at the same time, not one after the other


def test_a_closed_load_over_processes_goes_once_through_the_users(hub: LocalHub, tmp_path: Path) -> None:
    words = ("activity-stress-test", "-c", "9", "--workers", "6", "--processes", "2")
    _, found = run_with_results(tmp_path / "r", *words, hub=hub)
    assert found["operations"]["activity"]["count"] == 9
    assert not tool_users(hub)


def test_a_server_that_freezes_is_not_flattered(tmp_path: Path) -> None:
    """A closed loop would report a p90 of 10 ms: people who come during the freeze wait for its end."""
    with KnownServer(service_s=0.01, freeze_s=1, period_s=3) as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "40", "--duration", "6s")
        _, found = run_with_results(tmp_path / "r", *words, env=server.environment)
    latency = found["operations"]["activity"]["latency_s"]
    assert latency["p50"] < 0.3
    assert 0.5 < latency["p90"] < 1.2 and 0.9 < latency["max"] < 1.5


def test_a_generator_that_is_late_says_so_before_any_number(tmp_path: Path) -> None:
    with KnownServer(capacity_per_s=100) as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "700", "--duration", "2s")
        done, found = run_with_results(tmp_path / "r", *words, env=server.environment)
    assert done.stdout.splitlines()[1].startswith("because   THE GENERATOR WAS LATE")
    sent = found["operations"]["activity"]["count"]
    assert f"{1400 - sent} not at all" in found["warnings"][0] and sent < 1400


def test_a_process_that_dies_fails_the_run_and_nothing_is_left(new_hub: LocalHub) -> None:
    words = [sys.executable, str(MODULE), "activity-stress-test", "-c", "5", "--rate", "10", "--duration", "60s"]
    run = subprocess.Popen(
        [*words, "--processes", "2"], env=os.environ | new_hub.environment, stdout=-1, stderr=-1, text=True
    )
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while len(pids := children.read_text().split()) < 3 or not tool_users(new_hub):  # with multiprocessing's own
        time.sleep(0.1)
    time.sleep(1.5)
    os.kill(int(pids[-1]), signal.SIGKILL)
    stdout, _ = run.communicate(timeout=40)
    assert run.returncode == 1 and "a process that sends the load died" in stdout
    assert not tool_users(new_hub)


def test_starts_at_a_rate_count_from_when_each_was_due(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "12", "--rate", "6", "--profile", '{"spawn_s": 0.5}')
    done, found = run_with_results(tmp_path / "r", *words, hub=new_hub)
    assert done.code == 0 and "12 servers, 6 per second, however slow the hub" in done.stdout
    ready = found["operations"]["server_ready"]
    assert ready["count"] == 12 and ready["latency_s"]["min"] >= 0.5
    assert 11 / 6 <= ready["count"] / ready["rate_per_s"] < 11 / 6 + 3


def test_throttling_is_reported_with_the_moment_at_which_it_began(tmp_path: Path) -> None:
    with LocalHub(concurrent_spawn_limit=3, spawn_s=2, slow_spawn_timeout_s=0) as hub:
        words = ("stress-test", "-c", "12", "--rate", "4")
        done, found = run_with_results(tmp_path / "r", *words, hub=hub)
    assert done.code == 0
    assert found["servers"]["throttled"] >= 3
    assert 0.7 <= found["servers"]["throttling_began_s"] < 2  # the fourth start is due after 0.75 s
    assert "throttled, from" in done.stdout


OPERATIONS_FILE = """
from hub_stress_test import operation, user_url

@operation("groups")
def read_groups(username, endpoint, session):
    return session.get(f"{endpoint}/groups")

@operation("self")
def read_self(username, endpoint, session):
    return session.get(user_url(endpoint, username))

@operation("broken")
def broken(username, endpoint, session):
    raise RuntimeError("not today")
"""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_operations_of_ones_own_are_mixed_in_by_weight(processes: str, new_hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OPERATIONS_FILE)
    words = ["activity-stress-test", "-c", "4", "--rate", "40", "--duration", "3s", "--processes", processes]
    words += ["--operations", str(tmp_path / "mine.py"), "--mix", "activity=2,self=1,broken=1"]
    done, found = run_with_results(tmp_path / "r", *words, hub=new_hub)
    counts = {name: found["operations"][name]["count"] for name in ("activity", "self", "broken")}
    assert sum(counts.values()) == 120
    assert all(abs(counts[name] - expected) <= 3 for name, expected in (("activity", 60), ("self", 30), ("broken", 30)))
    assert found["operations"]["broken"]["errors"] == {"RuntimeError: not today": counts["broken"]}
    assert done.code == 1 and found["failed"] == counts["broken"]


def test_a_condition_on_an_operation_of_ones_own(new_hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OPERATIONS_FILE)
    words = ["activity-stress-test", "-c", "2", "--operations", str(tmp_path / "mine.py"), "--mix", "self=1"]
    assert run_tool(*words, "--fail-if", "self.p95 > 10s", hub=new_hub).code == 0
    assert run_tool(*words, "--fail-if", "groups.p95 > 10s", hub=new_hub).code == 1  # nothing measured


RESULTS = {
    "failed": 3,
    "failed_rate": 0.03,
    "http": {"throttled": 7},
    "operations": {
        "server_ready": {
            "count": 100,
            "failed": 3,
            "rate_per_s": 5.0,
            "latency_s": {"min": 1, "mean": 2, "p50": 2, "p90": 3, "p95": 4, "p99": 5, "max": 6},
        },
        "ping": {"count": 4, "failed": 4, "rate_per_s": None, "latency_s": dict.fromkeys(hst.LATENCY_STATISTICS)},
    },
}
VALUES = {
    "failed": 3,
    "failed_rate": 0.03,
    "throttled": 7,
    "server_ready.min": 1,
    "server_ready.mean": 2,
    "server_ready.p50": 2,
    "server_ready.p90": 3,
    "server_ready.p95": 4,
    "server_ready.p99": 5,
    "server_ready.max": 6,
    "server_ready.failed": 3,
    "server_ready.count": 100,
    "server_ready.rate_per_s": 5,
}


@pytest.mark.parametrize(("metric", "comparison"), list(itertools.product(VALUES, hst.COMPARISONS)))
def test_every_metric_with_every_operator_holds_or_not(metric: str, comparison: str) -> None:
    value = VALUES[metric]
    for limit in (value * 0.5, value, value * 1.5):
        judged = hst.condition(f"{metric} {comparison} {limit:g}").judge(RESULTS, None)
        expected = {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}[comparison]
        assert (judged["held"], judged["value"]) == (expected, value)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("server_ready.p95 > 3999ms", True),
        ("server_ready.p95 > 4s", False),
        ("server_ready.p95 < 0.1m", True),
        ("failed_rate > 2%", True),
        ("failed_rate>=3.1%", False),
        ("ping.p95 > 1s", True),  # nothing measured
        ("activity.p95 > 1s", True),  # nothing measured
        ("server_ready.p95 > 1.5x", False),
        ("server_ready.p95 > 0.9x", True),
        ("activity.p95 > 2x", True),  # the baseline has none
    ],
)
def test_units_and_missing_measurements(text: str, held: bool) -> None:
    assert hst.condition(text).judge(RESULTS, RESULTS)["held"] is held


@pytest.mark.parametrize(
    "text",
    ["", "failed", "failed > ", "failed = 1", "speed > 1", "server_ready.p42 > 1s", "failed > 1s", "ping.failed > 1%"],
)
def test_a_condition_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        hst.condition(text)


def test_conditions_decide_the_exit_code_and_replace_the_default(new_hub: LocalHub) -> None:
    failing = ("stress-test", "-c", "10", "--profile", '{"fail_rate": 0.2}')
    assert run_tool(*failing, hub=new_hub).code == 1
    allowed = run_tool(*failing, "--fail-if", "failed_rate > 25%", hub=new_hub)
    assert allowed.code == 0 and "failed_rate > 25%: not held, it is 20.0%" in allowed.stdout
    refused = run_tool("--fail-if", "failed > 5", *failing, "--fail-if", "server_ready.p95 > 1ms", hub=new_hub)
    assert refused.code == 1
    assert "failed > 5: not held, it is 2" in refused.stdout
    assert "\nbecause   server_ready.p95 > 1ms: it is " in refused.stdout


BAD = {
    "a multiple without a baseline": (["purge", "--fail-if", "ping.p95 > 2x"], "needs a --baseline"),
    "an unknown operation": (["purge", "--fail-if", "pong.p95 > 2s"], "no operation 'pong'"),
    "an unknown metric": (["purge", "--fail-if", "speed > 2"], "'speed' is not failed"),
    "a mix of nothing": (["activity-stress-test", "--mix", "activity"], "NAME=WEIGHT"),
    "a mix of the unknown": (["activity-stress-test", "--mix", "dance=1"], "no operation 'dance'"),
    "the capacity of nothing": (["--dry-run", "activity-stress-test", "--find-capacity"], "give one of them"),
    "a rate of 0": (["activity-stress-test", "--rate", "0"], "a number above 0"),
    "more processes than workers": (["activity-stress-test", "--processes", "200"], "more than --workers 100"),
    "no such operations file": (["activity-stress-test", "--operations", "/nowhere.py"], "--operations /nowhere.py"),
    "no such baseline": (["purge", "--baseline", "/nowhere.json"], "cannot be read as results"),
    "results into nowhere": (["purge", "--results", "/nowhere/r.json"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_is_refused_before_anything_is_sent(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = BAD[case]
    env = {"JUPYTERHUB_ENDPOINT": "http://127.0.0.1:1/hub/api", "JUPYTERHUB_API_TOKEN": "0123456789"}
    assert expected in refused_usage(words, env, capsys)


def test_a_baseline_is_set_beside_the_run(new_hub: LocalHub, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    run_with_results(before, "stress-test", "-c", "3", hub=new_hub)
    words = ("stress-test", "-c", "3", "--baseline", str(before))
    done = run_tool(*words, "--fail-if", "server_ready.p95 > 1000x", hub=new_hub)
    assert done.code == 0 and "against baseline" in done.stdout
    assert run_tool(*words, "--fail-if", "server_ready.p95 > 0.001x", hub=new_hub).code == 1


def test_the_capacity_of_a_known_server_is_found(tmp_path: Path) -> None:
    with KnownServer(capacity_per_s=40) as server:
        words = ("activity-stress-test", "-c", "20", "--find-capacity", "--duration", "2s", "--rate", "30")
        done, found = run_with_results(
            tmp_path / "r", *words, "--fail-if", "activity.p95 > 150ms", env=server.environment
        )
    capacity = found["capacity"]
    assert done.code == 0
    assert 30 <= capacity["rate_per_s"] <= 48
    assert capacity["servers_reporting_every_300_s"] == int(capacity["rate_per_s"] * 300)
    assert f"this hub sustains {capacity['rate_per_s']:.0f} requests per second" in done.stdout.splitlines()[0]
    assert any(step["held"] for step in capacity["steps"]) and not capacity["generator_bound"]


def test_a_rate_that_the_generator_cannot_send_is_no_finding_about_the_hub() -> None:
    search = hst.CapacitySearch(100)
    search.tell(100, False)
    assert search.next_rate() == 200
    search.tell(200, None)
    assert (search.next_rate(), search.sustained, search.unknown) == (None, 100, True)


@pytest.mark.parametrize("truth", [3, 17, 128, 131.5, 4000])
def test_the_search_ends_within_five_percent_below_the_truth(truth: float) -> None:
    search = hst.CapacitySearch(16)
    for _ in range(40):
        if (rate := search.next_rate()) is None:
            break
        search.tell(rate, rate > truth)
    assert search.next_rate() is None
    assert search.sustained is not None and search.sustained <= truth < search.sustained * 1.06


def test_operations_are_chosen_by_weight_and_spread_evenly() -> None:
    mix = {"activity": 8.0, "read": 1.0, "list": 1.0}
    chosen = [hst.choose(mix, n) for n in range(1000)]
    assert [chosen.count(name) for name in mix] == pytest.approx([800, 100, 100], abs=3)
    assert all(chosen[n : n + 50].count("read") in (4, 5, 6) for n in range(0, 1000, 50))


def test_an_hour_at_a_thousand_a_second_costs_little_memory_and_stays_exact() -> None:
    rng = random.Random(1)
    values = [rng.lognormvariate(-3, 1) for _ in range(100_000)]
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folded = hst.Distribution()
    for _ in range(36):
        for value in values:
            folded.add(value)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
    assert folded.count == 3_600_000 and grown_kb < 10_000
    values.sort()
    assert folded.percentile(99) == pytest.approx(values[99_000], rel=0.01)


def test_distributions_of_several_processes_merge_into_one() -> None:
    one, other, both = hst.Distribution(), hst.Distribution(), hst.Distribution()
    for n in range(1, 1000):
        (one if n % 3 else other).add(n / 100)
        both.add(n / 100)
    one.merge(other)
    assert one.summary() == pytest.approx(both.summary())
    assert both.share_above(5.0) == pytest.approx(0.5, abs=0.02)
