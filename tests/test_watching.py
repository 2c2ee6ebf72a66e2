"""What is watched while a run goes on: progress, pings, the hub's own figures, and where the time went."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import Answer, Delay, Fault, FaultProxy, Silence, every, hub_answer, matching
from localhub import LocalHub
from made_up import ENDPOINT, FIGURES, NO_NODE, did, hub_with, results_of, sentences
from tool import MODULE, results_in, run_for_results, run_tool, start_tool, tool_users, wait_until

Make = Callable[..., LocalHub]

# ==== Progress =======================================================================================================


def on_a_terminal(*words: str, hub: LocalHub, env: dict[str, str], options: tuple[str, ...] = ()) -> str:
    """What a run writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command, said = [sys.executable, *options, MODULE, *words], b""
    environment = os.environ | hub.environment | {"TERM": "xterm"} | env
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs) as run:
        os.close(theirs)
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                said += os.read(ours, 65536)
    os.close(ours)
    assert run.returncode == 0
    return said.decode()


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_a_terminal_has_a_changing_line_and_coloured_summary(
    with_tqdm: bool, new_hub: LocalHub, bare: dict[str, str]
) -> None:
    words = ("stress-test", "-c", "6", "--profile", '{"spawn_s": 1}', "--hold", "2s")
    env = {} if with_tqdm else bare
    said = on_a_terminal(*words, hub=new_hub, env=env, options=() if with_tqdm else ("-S",))
    assert "\033[1;32mPASSED\033[0m: 6 of 6" in said
    parts = re.split(r"[\r\n]+", re.sub(r"\033\[[\d;]*[A-Z]", "", said))
    people = r"\d\d:\d\d \| \d of 6 came, \d starting", r"\d\d:\d\d, holding for 00:0\d more \| 6 of 6 came, 6 ready"
    for line in ("creating users: ", *people, "cleaning up: "):
        assert any(re.match(line, part) for part in parts), said
    logged = [part for part in parts if " INFO " in part]
    assert logged and not any(" came" in part or "cleaning up:" in part for part in logged)  # each on its own
    assert ("pip install prometheus-client" in said) is not with_tqdm and not tool_users(new_hub)


def test_a_report_without_plotly_is_refused_before_the_run(new_hub: LocalHub, bare: dict[str, str]) -> None:
    command = [sys.executable, "-S", MODULE, "stress-test", "--report", "r.html"]
    done = subprocess.run(command, env=bare | new_hub.environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "") and "pip install plotly" in done.stderr


def test_no_color_is_respected(new_hub: LocalHub) -> None:
    said = on_a_terminal("purge", hub=new_hub, env={"NO_COLOR": "1"})
    assert "PASSED: " in said and "\033[1" not in said


def test_elsewhere_a_line_every_ten_seconds_tells_progress(new_hub: LocalHub) -> None:
    words = ("activity-stress-test", "-c", "3", "--run", "x", "--rate", "10", "--duration", "2m", "--processes", "2")
    with start_tool("-v", *words, hub=new_hub) as run:
        assert run.stderr
        first = next(line for line in run.stderr if " INFO " in line)
        later = next(line for line in run.stderr if " sent (" in line)
        run.send_signal(signal.SIGINT)
        assert run.outcome().code == 130
    for part in (new_hub.endpoint, "as hub-stress-test-x-<n>.", "Ctrl-C"):
        assert part in first
    pattern = r"00:\d\d of 02:00 \| (\d+) sent \(([\d.]+) per second\) \| ping [\d.]+ m?s \| hub \d+ %$"
    line = re.match(pattern, later)
    assert line and int(line[1]) > 0 and 0 < float(line[2]) <= 11, later


def whereabouts(plan: hst.Plan, ways: dict[int, str]) -> dict[str, int]:
    """Where people are who made these steps, of which ! marks those that failed."""
    site = hst.Site(hst.Hub(ENDPOINT, hst.get_session("t")), plan, hst.new_recorder())
    for number, steps in ways.items():
        for step in steps.split():
            site.record.add(did(step.rstrip("!"), number, 1.0, NO_NODE if step.endswith("!") else None))
        if not steps:
            name = hst.username(number)
            site.crowd.starting[name] = hst.Visitor(name, 0.0, plan, site)
    return {name: number for name, number in hst.whereabouts(site, 300).items() if number}


WAYS = {
    1: "",
    2: "server_ready!",
    3: "server_ready",
    4: "server_ready visit!",
    5: "server_ready visit at_work cell cell!",
    6: "server_ready visit at_work cell",
    7: "server_ready at_work stay stop_server!",
    8: "server_ready at_work stay!",
}


@pytest.mark.parametrize(
    ("plan", "ways", "places"),
    [
        (hst.Plan(work=True, stay_s=60.0), WAYS, {"starting": 1, "ready": 1, "at work": 1, "done": 1, "failed": 4}),
        (hst.Plan(hold_s=60.0), dict.fromkeys((1, 2, 3), "server_ready"), {"ready": 3}),
        (hst.Plan(hold_s=60.0), {1: "server_ready stay", 2: "server_ready"}, {"ready": 1, "done": 1}),
    ],
)
def test_people_are_counted_where_they_are(plan: hst.Plan, ways: dict[int, str], places: dict[str, int]) -> None:
    assert whereabouts(plan, ways) == {"of 300 came": len(ways)} | places


@pytest.mark.parametrize(
    ("words", "number", "risk"),
    [
        ("-c 4", "At most 4 servers", ""),
        ("-c 5", "At most 5 servers", "--batch-size 4 --fail-fast"),
        ("-c 5 --own-servers", "At most 5 servers", ""),
        ("-c 300 --within 5m", "At most 300 servers", "give --fail-fast 4"),
        ("-c 300 --within 5m --fail-fast 4", "At most 300 servers", "--fail-fast ends no starts"),
        ("-c 4 --within 5m -b 4", "At most 4 servers", "--batch-size does not limit"),
        ("-c 60 --rate 1 --server-timeout 5s --stay 5s", "At most 10 servers", "give --fail-fast 4"),
        ("--find-capacity", "--max-servers bounds that", "give --fail-fast 4"),
        ("--find-capacity --max-servers 50", "At most 50 servers", "give --fail-fast 4"),
    ],
)
def test_a_run_begins_with_its_cost_and_its_risk(words: str, number: str, risk: str) -> None:
    plan = hst.plan_of(hst.parse_args(["stress-test", *words.split()]))
    cost, *risks = hst.costs_and_risks(plan)
    assert number in cost and "volume" in cost
    assert [risk in line for line in risks] == [True] * bool(risk)


# ==== Regularly, and pings ===========================================================================================


def test_pings_are_due_five_times_a_second_regardless(new_hub: LocalHub, proxy: FaultProxy) -> None:
    events: list[hst.Event] = []
    pings = itertools.count()
    proxy.rule = lambda request: Answer(503) if next(pings) else Delay(2.0)
    session, record = hst.get_session(new_hub.token), hst.Recorder(events.append)
    with hst.pinging("alice", proxy.endpoint, session, record):
        wait_until(lambda: any(event.latency_s >= 2.0 for event in events))
        session.stop()
        sent = session.traffic.counts["requests"]
        time.sleep(0.6)
    assert session.traffic.counts["requests"] <= sent + 1  # one may have been on its way
    events.sort(key=lambda event: event.due_s)
    steps_s = [after.due_s - before.due_s for before, after in zip(events, events[1:])]
    assert steps_s == pytest.approx([0.2] * len(steps_s))
    late = max(events, key=lambda event: event.latency_s)  # of the first to arrive, which need not be the first due
    others = [event for event in events if event is not late]
    assert late.reason is None and late.latency_s >= 2.0 and all(event.reason for event in others)
    assert sum(event.ended_s < late.ended_s for event in others) >= 5
    http = session.traffic.summarise()
    wait_until(lambda: len(proxy.requests) >= http.requests)
    assert (http.retries, http.requests, http.observer_share) == (0, len(proxy.requests), 1.0)


def test_no_ping_waits_for_the_answer_to_another() -> None:
    under_way, answered = list[float](), threading.Event()
    with hst.Regularly("test", 0.02, lambda due_s: under_way.append(due_s) or answered.wait(), hst.PINGS_AT_MOST):
        wait_until(lambda: len(under_way) == hst.PINGS_AT_MOST == hst.DEFAULT_TIMEOUT * hst.PING_RATE_PER_S)
        answered.set()
    assert len(set(under_way)) == len(under_way)


def test_no_more_take_turns_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, answered, start = list[float](), threading.Event(), hst.start_thread

    def slowly(name: str, act: Callable[[], None]) -> threading.Thread:
        thread = start(name, act)
        time.sleep(0.1)  # meanwhile it takes its turn, and wants the next thread
        return thread

    monkeypatch.setattr(hst, "start_thread", slowly)
    with hst.Regularly("test", 0.02, lambda due_s: under_way.append(due_s) or answered.wait(), 8):
        wait_until(lambda: len(under_way) >= 8)
    assert len(under_way) == 8  # nobody has come to a second turn
    answered.set()


def test_what_is_missed_while_all_are_late_is_skipped() -> None:
    record = hst.Recorder()
    record.skip("ping")
    with hst.Regularly("test", 0.01, lambda due_s: time.sleep(0.2), 3, lambda: record.skip("ping")):
        wait_until(lambda: record.summarise()["ping"].skipped >= 20)


# ==== The hub's own figures ==========================================================================================


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has used, as the system counts them."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_hubs_figures_agree_with_system_and_metrics_page(hub: LocalHub, tmp_path: Path) -> None:
    before_s, began_s = cpu_of(hub.pid), time.monotonic()
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "15", "-b", "5", hub=hub)
    used_s, took_s = cpu_of(hub.pid) - before_s, time.monotonic() - began_s
    rss = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{hub.pid}/status").read_text())[1]) * 1024  # type: ignore[index]
    own = found["hub"]["metrics"]
    assert found["hub"]["restarts"] == 0 and found["hub"]["metrics_missing"] is None
    assert 0.5 * used_s <= own["cpu_s"] <= used_s + 0.05  # the tool's own start is not in it
    assert own["cpu_s"] / took_s <= own["cpu_share"] <= 1.1
    assert abs(own["rss_after_bytes"] - rss) < 0.1 * rss and own["rss_max_bytes"] >= own["rss_before_bytes"]
    assert own["spawns"]["success"]["count"] == 15
    assert own["requests"]["POST UserServerAPIHandler"]["count"] == 15
    assert own["requests"]["DELETE UserServerAPIHandler"]["count"] == 15
    assert own["requests"]["GET UserAPIHandler"]["count"] == found["operations"]["ping"]["count"]
    if found["hub"]["version"] == "4.1.6":
        assert own["event_loop_lag_p95_s"] is None and own["event_loop_samples"] == 0
    else:
        assert 0.05 <= own["event_loop_lag_p95_s"] <= own["event_loop_lag_max_s"]
        assert own["event_loop_samples"] > 0
    assert re.search(rf"^hub's own +CPU {own['cpu_s']:.1f} s, ", done.summary, re.M)
    timeline, servers = found["timeline"], found["timeline"]["servers"]
    assert len(set(servers["user"])) == 15 and all(servers["ready"]) and servers["lost_s"] == [None] * 15
    assert timeline["hub"]["at_s"] == sorted(timeline["hub"]["at_s"])
    for due_s, asked_s, ended_s in zip(servers["due_s"], servers["asked_s"], servers["ended_s"]):
        assert due_s <= asked_s <= ended_s <= timeline["load_ended_s"]
    curves = hst.server_curves(servers, timeline["load_ended_s"], points=50)
    assert [curves[kind][-1] for kind in ("waiting", "starting", "ready", "failed", "lost")] == [0, 0, 15, 0, 0]
    assert max(curves["starting"]) <= 5 and curves["ready"] == sorted(curves["ready"])
    assert not tool_users(hub)


def test_a_hub_that_goes_away_and_comes_back_has_restarted(make_hub: Make, tmp_path: Path) -> None:
    hub, file = make_hub(database=str(tmp_path / "hub.sqlite")), tmp_path / "r"
    words = ("activity-stress-test", "-c", "2", "--rate", "4", "--duration", "2m", "--results", str(file))
    with start_tool(*words, hub=hub) as run:
        wait_until(lambda: tool_users(hub))
        hub.kill()
        run.log_up_to("The hub has not answered since ")
        hub.start()
        run.log_up_to("The hub answers again")
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    found = results_in(file, done)
    assert found["hub"]["restarts"] == 1 and "the hub restarted during the run" in found["warnings"]
    assert found["hub"]["metrics"]["cpu_s"] > 0 and not tool_users(hub)


@pytest.mark.parametrize(
    ("fault", "missing", "readings"),
    [
        (hub_answer(403, b"{}"), hst.NO_METRICS_SCOPE, 1),
        (Answer(404, b"<html>"), "GET /hub/metrics: something in front of the hub answered 404", 1),
        (Answer(200, b"<html>Sign in"), "GET /hub/metrics: something in front of the hub answered 200", 1),
        (Silence(), "", 3),
    ],
    ids=str,
)
def test_a_metrics_page_that_cannot_be_read_is_no_trouble(
    fault: Fault, missing: str, readings: int, new_hub: LocalHub, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hst, "METRICS_TIMEOUT_S", 0.3 if isinstance(fault, Silence) else 30.0)
    proxy.rule = every(matching("GET", "/hub/metrics"), fault)
    session = hst.get_session(new_hub.token)
    session.marked = True
    monitor = hst.Monitor(proxy.url + "/hub/metrics", session)
    with monitor:
        monitor.look()
    monitor.look()
    wait_until(lambda: len(proxy.requests) >= readings)  # which it may see a moment after nobody waits any more
    assert len(proxy.requests) == readings  # where there is a reason, it is not asked again
    assert (monitor.snapshots, monitor.missing) == ([], missing)


def test_the_monitor_looks_also_after_the_load_was_stopped(new_hub: LocalHub) -> None:
    session = hst.get_session(new_hub.token)
    monitor = hst.Monitor(hst.metrics_url(new_hub.endpoint), session)
    with monitor:
        assert len(monitor.snapshots) == 1
        session.stop()
    monitor.look()
    first, last = monitor.snapshots[0], monitor.snapshots[-1]
    assert first.at_s < last.at_s and 0 < first.get(hst.CPU) <= last.get(hst.CPU)
    http = session.traffic.summarise()
    assert http.observer_requests == http.requests == len(monitor.snapshots)


# ==== What is made of the figures ====================================================================================

INFINITY = float("inf")
BUCKETS = [(0.05, 90.0), (0.1, 95.0), (0.5, 100.0), (INFINITY, 100.0)]


@pytest.mark.parametrize(
    ("buckets", "share", "value"),
    [
        ([], 0.5, None),
        ([(0.05, 0.0), (INFINITY, 0.0)], 0.5, None),
        (BUCKETS, 0.45, 0.025),
        (BUCKETS, 0.95, 0.1),
        (BUCKETS, 1.0, 0.5),
        ([(0.05, 1.0), (INFINITY, 2.0)], 1.0, 0.05),
    ],
)
def test_a_quantile_is_linear_within_a_bucket(
    buckets: list[tuple[float, float]], share: float, value: float | None
) -> None:
    assert hst.quantile(buckets, share) == pytest.approx(value)


def shot(at_s: float, cpu: float, started: float = 1.0, rss: float = 1e8) -> hst.Snapshot:
    """A look at a metrics page on which a handler was asked as many times as there are seconds of CPU."""
    names = {hst.BEGAN: started, hst.CPU: cpu, hst.MEMORY: rss}
    handler = {"handler": "a.B", "method": "GET", "code": "200"}
    samples: list[Any] = [(name, {}, value) for name, value in names.items()]
    samples += [("myhub_request_duration_seconds_count", handler, cpu)]
    samples += [("myhub_request_duration_seconds_count", handler | {"code": "429"}, 99.0)]
    samples += [("myhub_request_duration_seconds_sum", handler, cpu / 2)]
    return hst.snapshot(samples, at_s)


def test_counters_go_on_after_a_restart() -> None:
    shots = [shot(0, 5.0), shot(5, 8.0), shot(10, 1.0, started=2), shot(15, 2.0, started=2)]
    assert hst.grown(shots, hst.CPU) == 3 + 1 + 1
    assert hst.cpu_shares(shots) == [(5, 0.6), (10, 0.2), (15, 0.2)]
    found = hst.hub_figures(shots, 6.0, 0)
    assert found and (found.cpu_s, found.cpu_share, found.cpu_share_max) == (5, 5 / 15, 0.6)
    assert found.requests == {"GET B": hst.OwnDurations(5, 0.5)}
    assert (found.event_loop_lag_p95_s, found.event_loop_samples) == (None, 0)


def test_figures_need_two_snapshots_and_shares_a_second() -> None:
    assert hst.hub_figures([], 6.0, 0) is None and hst.hub_figures([shot(0, 5.0)], 6.0, 0) is None
    shots = [shot(0, 0.0), shot(0.1, 0.1), shot(2, 1.0)]
    assert hst.cpu_shares(shots) == [(2, 0.5)] and hst.cpu_shares(shots[:2]) == [(0.1, pytest.approx(1.0))]


def test_cpu_share_is_the_loads_and_memory_by_server() -> None:
    shots = [shot(0, 0.0), shot(5, 2.0, rss=130e6), shot(10, 4.0), shot(15, 9.0, rss=120e6)]
    for ready, each in ((10, 3e6), (0, None)):
        found = hst.hub_figures(shots, 10.0, ready)
        assert found and (found.cpu_share_max, found.cpu_share, found.rss_per_server_bytes) == (0.4, 0.6, each)
        assert (found.rss_before_bytes, found.rss_max_bytes, found.rss_after_bytes) == (100e6, 130e6, 120e6)


# ==== Where the time went ============================================================================================

FRONT, THREAD, LATE = "between this machine and the hub", "the hub's one thread", "whose event loop was late"
UNKNOWN = "the hub's figures do not tell"


@pytest.mark.parametrize(
    ("whole_s", "inside_s", "lag_s", "cpu_share", "where"),
    [
        (0.400, 0.050, 0.05, 0.95, THREAD),
        (0.400, 0.050, 0.30, 0.63, LATE),  # on a busy machine it gets no more of a processor
        (0.400, 0.050, 0.10, 0.63, UNKNOWN),
        (0.900, 0.050, 0.30, 0.63, UNKNOWN),  # more than that was somewhere else
        (0.400, 0.050, 0.30, 0.20, LATE),
        (0.205, 0.004, 0.05, 0.10, FRONT),
        # it is the hub that took long, or there is nothing to explain
        (0.400, 0.300, 0.30, 0.95, "in the hub"),
        (0.008, 0.002, 0.05, 0.10, "too little"),
        # hubs before 5.0, which say nothing of their event loop
        (0.400, 0.050, None, 0.95, THREAD),
        (0.400, 0.050, None, 0.63, UNKNOWN),
        (0.205, 0.004, None, 0.10, FRONT),
    ],
)
def test_where_a_request_spent_its_time(
    whole_s: float, inside_s: float, lag_s: float | None, cpu_share: float, where: str
) -> None:
    hub = hub_with(cpu_share_max=cpu_share, event_loop_lag_p95_s=lag_s).metrics or FIGURES
    assert where in hst.where_time_went(whole_s, inside_s, hub)


def test_a_ping_is_no_longer_inside_the_hub() -> None:
    hub = hub_with(requests={"GET UserAPIHandler": hst.OwnDurations(9, 0.15)})
    for took_s, inside in ((0.12, ""), (0.18, " took 150 ms by the hub's own clock")):
        found = results_of([did("ping", 1, took_s)], hub=hub, servers=None)
        (sentence,) = sentences(found, "where the time went")
        assert sentence.startswith(f"a mean ping of {hst.duration_text(took_s)}{inside}: most of ")


def test_a_long_way_is_told_from_a_slow_hub(new_hub: LocalHub, proxy: FaultProxy) -> None:
    proxy.rule = every(matching("GET", "/users/[^/]+$"), Delay(0.5))
    done = run_tool("stress-test", "-c", "4", "--profile", '{"spawn_s": 2}', hub=new_hub, proxy=proxy)
    busy = "most of that time was spent waiting for the hub, whose event loop was late|the hub's figures do not tell"
    where = f"most of that time was spent {FRONT}|{busy}"  # the last two on a busy machine
    assert re.search(f"a mean ping of .*: ({where})", done.summary), done.summary
    assert not tool_users(new_hub)
