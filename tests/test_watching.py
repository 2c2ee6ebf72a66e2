"""What is watched while a run goes on: progress, pings, the hub's own figures, and where the time went."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hub_stress_test as hst
from fault_proxy import Answer, Delay, FaultProxy, Silence, every, hub_answer, matching
from known_server import KnownServer
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers
from test_summary import results_of, told
from tool import MODULE, run_for_results, run_tool, start_tool, tool_users, wait_until

Make = Callable[..., LocalHub]

# ==== Progress =======================================================================================================


def on_a_terminal(
    *words: str, hub: LocalHub, env: dict[str, str] | None = None, options: tuple[str, ...] = ()
) -> tuple[str, str]:
    """What a run wrote to standard output and to standard error, both terminals."""
    ends = [pty.openpty() for _ in range(2)]
    for _, theirs in ends:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    said: list[list[bytes]] = [[], []]

    def listen(end: int, into: list[bytes]) -> None:
        while True:
            try:
                into.append(os.read(end, 65536))
            except OSError:  # the other end is closed
                return

    environment = os.environ | hub.environment | {"TERM": "xterm"} | (env or {})
    process = subprocess.Popen(
        [sys.executable, *options, MODULE, *words], env=environment, stdin=-3, stdout=ends[0][1], stderr=ends[1][1]
    )
    listeners = [threading.Thread(target=listen, args=(ends[n][0], said[n])) for n in range(2)]
    for (_, theirs), listener in zip(ends, listeners):
        os.close(theirs)
        listener.start()
    assert process.wait(60) == 0
    for (ours, _), listener in zip(ends, listeners):
        listener.join()
        os.close(ours)
    return b"".join(said[0]).decode(), b"".join(said[1]).decode()


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_on_a_terminal_a_line_changes_in_place_and_the_summary_has_a_colour(
    with_tqdm: bool, new_hub: LocalHub, bare: dict[str, str]
) -> None:
    words, env = ("stress-test", "-c", "6", "--profile", '{"spawn_s": 1}'), {} if with_tqdm else bare
    stdout, stderr = on_a_terminal(*words, hub=new_hub, env=env, options=() if with_tqdm else ("-S",))
    assert stdout.startswith("\033[1;32mPASSED\033[0m: 6 of 6")
    parts = re.split(r"[\r\n]+", re.sub(r"\033\[[\d;]*[A-Z]", "", stderr))
    for line in ("creating users: ", "00:01 | 3 of 6 came, 3 starting", "cleaning up: "):
        assert any(part.startswith(line) for part in parts), stderr
    logged = [part for part in parts if " INFO " in part]
    assert logged and not any(" came" in part or "cleaning up:" in part for part in logged)  # each on its own


def test_no_color_is_respected_and_a_pipe_gets_no_colours(new_hub: LocalHub) -> None:
    stdout, _ = on_a_terminal("purge", hub=new_hub, env={"NO_COLOR": "1"})
    assert stdout.startswith("PASSED") and "\033" not in stdout
    done = run_tool("purge", hub=new_hub)
    assert done.stdout.startswith("PASSED") and "\033" not in done.stdout + done.stderr


def test_without_a_terminal_a_line_every_ten_seconds_says_how_far_it_is(new_hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "4", "--profile", '{"spawn_s": 7}', hub=new_hub)
    (line,) = re.findall(r"^00:1.*", done.stderr, re.M)
    assert re.fullmatch(r"00:10 \| 4 of 4 came, 1 starting, 3 ready \| ping [\d.]+ ms \| hub \d+ %", line)
    assert done.stdout.startswith("PASSED")


def test_a_load_over_processes_tells_how_far_it_is(new_hub: LocalHub) -> None:
    words = ("--rate", "10", "--duration", "12s", "--processes", "2", "--workers", "4")
    done = run_tool("activity-stress-test", "-c", "3", *words, hub=new_hub)
    pattern = r"^00:1\d of 00:12 \| (\d+) sent \(([\d.]+) per second\) \| ping [\d.]+ ms \| hub \d+ %$"
    line = re.search(pattern, done.stderr, re.M)
    assert line and 0 < int(line[1]) < 120 and 0 < float(line[2]) < 12


def event(step: str, user: str, failed: bool = False) -> hst.Event:
    return hst.Event(step, user, 0.0, 0.0, 1.0, hst.Reason(hst.Kind.SPAWN, "it failed") if failed else None)


def test_people_are_counted_where_they_are() -> None:
    plan = hst.Plan(work=True, stay_s=60.0)
    site = hst.Site(hst.Hub(ENDPOINT, hst.get_session("t")), plan, hst.new_recorder())
    ways = {
        "a": [],
        "b": [("server_ready", True)],
        "c": [("server_ready", False)],
        "d": [("server_ready", False), ("visit", True)],
        "e": [("server_ready", False), ("visit", False), ("at_work", False), ("cell", False), ("cell", True)],
        "f": [("server_ready", False), ("visit", False), ("at_work", False), ("cell", False)],
        "g": [("server_ready", False), ("at_work", False), ("stay", False), ("stop_server", True)],
        "h": [("server_ready", False), ("at_work", False), ("stay", True)],
    }
    for user, steps in ways.items():
        for step, failed in steps:
            site.record.add(event(step, user, failed))
    site.starting["a"] = []
    found = hst.whereabouts(site, 300)
    first = found.pop("of 300 came")
    assert first == sum(found.values()) == len(ways)
    assert found == {"starting": 1, "throttled": 0, "ready": 1, "at work": 1, "done": 1, "failed": 4}


def test_people_who_only_start_a_server_are_ready_until_their_hold_is_done() -> None:
    site = hst.Site(hst.Hub(ENDPOINT, hst.get_session("t")), hst.Plan(hold_s=60.0), hst.new_recorder())
    for user in "abc":
        site.record.add(event("server_ready", user))
    assert hst.whereabouts(site, 3)["ready"] == 3
    site.record.add(event("stay", "a"))
    assert {name: number for name, number in hst.whereabouts(site, 3).items() if number} == {
        "of 3 came": 3,
        "ready": 2,
        "done": 1,
    }


def test_a_hold_counts_down(new_hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "2", "--rate", "4", "--hold", "14s", hub=new_hub)
    assert re.search(r"^00:10, holding for 00:0[45] more \| 2 of 2 came, 2 ready ", done.stderr, re.M), done.stderr


def test_the_log_names_no_function(new_hub: LocalHub) -> None:
    assert "Took" not in run_tool("-v", "stress-test", "-c", "2", hub=new_hub).stderr


@pytest.mark.parametrize(
    ("words", "number", "risky"),
    [
        (("-c", "4"), "At most 4 servers", False),
        (("-c", "5"), "At most 5 servers", True),
        (("-c", "300", "--within", "5m"), "At most 300 servers", True),
        (("-c", "300", "--within", "5m", "--fail-fast", "4"), "At most 300 servers", False),
        (("-c", "60", "--rate", "1", "--server-timeout", "5s", "--stay", "5s"), "At most 10 servers", True),
        (("--find-capacity",), "--max-servers bounds that", True),
        (("--find-capacity", "--max-servers", "50"), "At most 50 servers", True),
    ],
)
def test_a_run_begins_with_what_it_costs_and_the_risk_that_fits(
    words: tuple[str, ...], number: str, risky: bool
) -> None:
    plan = hst.plan_of(hst.parse_args(["stress-test", *words]))
    cost, *risk = hst.costs_and_risks(plan)
    assert number in cost and "volume" in cost
    assert ["--fail-fast 4" in line for line in risk] == [True] * risky


# ==== Regularly, and pings ===========================================================================================


def test_something_is_done_at_fixed_moments_although_it_takes_long_at_times() -> None:
    dues_s: list[float] = []

    def act(due_s: float) -> None:
        dues_s.append(due_s)
        time.sleep(0.3 if len(dues_s) == 2 else 0)

    began_s = time.monotonic()
    with hst.Regularly("test", 0.05, act, at_most=20):
        wait_until(lambda: len(dues_s) >= 12)
    ended_s, number = time.monotonic(), len(dues_s)
    steps_s = [after - before for before, after in zip(sorted(dues_s), sorted(dues_s)[1:])]
    assert steps_s == pytest.approx([0.05] * len(steps_s)) and began_s < min(dues_s)
    assert max(dues_s) <= ended_s
    time.sleep(0.2)
    assert len(dues_s) == number  # nothing is done after the block


def test_what_is_due_while_too_much_is_under_way_is_skipped_and_counted() -> None:
    released, begun, skipped = threading.Event(), itertools.count(), itertools.count()

    def act(due_s: float) -> None:
        next(begun)
        released.wait(60)

    with hst.Regularly("test", 0.01, act, at_most=3, skip=lambda: next(skipped) and None):
        wait_until(lambda: next(skipped) > 20)
        assert next(begun) == 3
        released.set()


def test_an_act_that_hangs_does_not_keep_the_block_from_ending() -> None:
    hanging, released = threading.Event(), threading.Event()

    def act(due_s: float) -> None:
        hanging.set()
        released.wait(60)

    with hst.Regularly("test", 0.01, act):
        assert hanging.wait(30)
    assert not released.is_set()
    released.set()


def test_pings_are_due_five_times_a_second_and_sent_once_each_only_to_watch(new_hub: LocalHub) -> None:
    dues_s: list[float] = []
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(matching("GET", "/users/alice"), Answer(503, b""))
        session, record = hst.get_session(new_hub.token), hst.Recorder(lambda event: dues_s.append(event.due_s))
        with hst.pinging("alice", proxy.endpoint, session, record):
            wait_until(lambda: record.count(["ping"]) >= 6)
        ping, http = record.summarise()["ping"], session.traffic.summarise()
    assert ping.failed == ping.count >= 6 and ping.errors == {"something in front of the hub answered 503": ping.count}
    assert [after - before for before, after in zip(dues_s, dues_s[1:])] == pytest.approx([0.2] * (len(dues_s) - 1))
    assert (http.retries, http.requests, http.observer_share) == (0, len(proxy.requests), 1.0)


def test_a_ping_that_is_answered_late_holds_up_no_other(new_hub: LocalHub) -> None:
    events: list[hst.Event] = []
    late = iter([Delay(2.0)])
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = lambda request: next(late, None)
        session, record = hst.get_session(new_hub.token), hst.Recorder(events.append)
        with hst.pinging("alice", proxy.endpoint, session, record):
            wait_until(lambda: len(events) >= 14)
    assert all(event.reason is None for event in events)
    first, *others = sorted(events, key=lambda event: event.due_s)
    assert first.latency_s >= 2.0 > 2 * max(event.latency_s for event in others)


def test_pings_beyond_twenty_under_way_are_skipped_and_counted_in_the_results() -> None:
    with KnownServer(service_s=6.0, also_reads=True) as server:
        session, record = hst.get_session("known"), hst.Recorder()
        session.post(f"{server.endpoint}/users", json={"usernames": ["hub-stress-test-1"]})
        with hst.pinging("hub-stress-test-1", server.endpoint, session, record):
            wait_until(lambda: record.count(["ping"]) >= 3, 40)
    ping = record.summarise()["ping"]
    assert ping.skipped >= 3 and ping.latency_s.min is not None and ping.latency_s.min >= 6.0


def test_nobody_is_pinged_once_the_run_was_stopped() -> None:
    wire, record = HubWithUsers(["alice"]), hst.Recorder()
    session = hst.HubSession("x", wire)
    with hst.pinging("alice", ENDPOINT, session, record):
        wait_until(lambda: record.count(["ping"]))
        session.stop()
        asked = len(wire.asked)
        time.sleep(0.6)
    assert len(wire.asked) <= asked + 1  # one may have been on its way


# ==== The hub's own figures ==========================================================================================


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has used, as the system counts them."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_hubs_figures_agree_with_the_systems_and_with_its_metrics_page(hub: LocalHub, tmp_path: Path) -> None:
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
    assert not tool_users(hub)


def test_a_restart_of_the_hub_is_seen(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(database=str(tmp_path / "hub.sqlite"))
    restart = threading.Timer(3.0, hub.restart)
    restart.start()
    words = ("-c", "3", "--rate", "5", "--duration", "8s", "--fail-if", "failed_rate > 90%")
    done, found = run_for_results(tmp_path / "r", "activity-stress-test", *words, hub=hub)
    restart.join()
    assert found["hub"]["restarts"] == 1 and not tool_users(hub)
    assert "the hub restarted during the run" in found["warnings"]
    assert re.search("^but +the hub restarted during the run", done.summary, re.M)
    assert 0 < found["hub"]["metrics"]["cpu_s"] < 8


def test_without_the_scope_the_summary_says_once_what_it_would_add(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(scopes=("admin:users", "servers"))
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "2", hub=hub)
    assert found["hub"]["metrics"] is None and found["hub"]["restarts"] is None
    assert found["hub"]["metrics_missing"] == "the token lacks the scope read:metrics"
    assert done.summary.count("read:metrics") == 1 and done.code == 0
    assert "CPU, memory, event-loop lag" in done.summary


@pytest.mark.parametrize(
    ("answer", "missing", "looks"),
    [
        (hub_answer(403, b"{}"), "the token lacks the scope read:metrics", 1),
        (Answer(404, b"<html>"), "GET /hub/metrics: something in front of the hub answered 404", 1),
        (Answer(200, b"<html>Sign in"), "GET /hub/metrics: something in front of the hub answered 200", 1),
        (Silence(), "", 3),
        (Answer(503, b""), "GET /hub/metrics: something in front of the hub answered 503", 1),
    ],
    ids=str,
)
def test_a_metrics_page_that_cannot_be_read_is_no_trouble(
    answer: Answer, missing: str, looks: int, new_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hst, "METRICS_TIMEOUT_S", 0.3 if isinstance(answer, Silence) else 30.0)
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(matching("GET", "/hub/metrics"), answer)
        session = hst.get_session(new_hub.token)
        session.marked = True
        monitor = hst.Monitor(proxy.url + "/hub/metrics", session)
        with monitor:
            monitor.look()
        monitor.look()
        assert len(proxy.requests) == looks  # where there is a reason, it is not asked again
    assert (monitor.snapshots, monitor.missing) == ([], missing)


def test_the_monitor_looks_before_and_after_and_still_when_the_load_was_stopped(new_hub: LocalHub) -> None:
    session = hst.get_session(new_hub.token)
    monitor = hst.Monitor(hst.metrics_url(new_hub.endpoint), session)
    with monitor:
        assert len(monitor.snapshots) == 1
        session.stop()
    monitor.look()
    first, last = monitor.snapshots[0], monitor.snapshots[-1]
    assert len(monitor.snapshots) >= 2 and first.at_s < last.at_s
    assert 0 < first.get("process_cpu_seconds_total") <= last.get("process_cpu_seconds_total")
    http = session.traffic.summarise()
    assert http.observer_requests == http.requests == len(monitor.snapshots)


def test_with_nothing_but_its_two_needs_it_does_its_whole_job_and_says_what_is_missing(
    new_hub: LocalHub, tmp_path: Path, bare: dict[str, str]
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", str(MODULE), "stress-test", "-c", "2", *words]
        return subprocess.run(command, env=bare | new_hub.environment, capture_output=True, text=True, timeout=100)

    done = run()
    assert done.returncode == 0 and "2 of 2 servers became ready" in done.stdout
    assert "pip install prometheus-client" in done.stdout and not tool_users(new_hub)
    before = new_hub.users()
    report = tmp_path / "report.html"
    done = run("--report", str(report))
    assert (done.returncode, done.stdout) == (2, "") and "pip install plotly" in done.stderr
    assert not report.exists() and new_hub.users() == before


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
def test_a_quantile_of_a_histogram_is_straight_between_the_bounds_of_a_bucket(
    buckets: list[tuple[float, float]], share: float, value: float | None
) -> None:
    assert hst.quantile(buckets, share) == pytest.approx(value)


def shot(at_s: float, started: float, cpu: float, **more: float) -> hst.Snapshot:
    """A look at a metrics page on which a handler was asked as many times as there are seconds of CPU."""
    names = {"process_start_time_seconds": started, "process_cpu_seconds_total": cpu}
    samples = [(name, {}, value) for name, value in (names | more).items()]
    samples.append(("myhub_request_duration_seconds_count", {"handler": "a.B", "method": "GET", "code": "200"}, cpu))
    samples.append(("myhub_request_duration_seconds_count", {"handler": "a.B", "method": "GET", "code": "429"}, 99.0))
    samples.append(("myhub_request_duration_seconds_sum", {"handler": "a.B", "method": "GET", "code": "200"}, cpu / 2))
    return hst.snapshot(samples, at_s)


def test_counters_go_on_after_a_restart() -> None:
    shots = [shot(0, 1, 5.0), shot(5, 1, 8.0), shot(10, 2, 1.0), shot(15, 2, 2.0)]
    assert hst.grown(shots, "process_cpu_seconds_total") == 3 + 1 + 1
    assert hst.cpu_shares(shots) == [(5, 0.6), (10, 0.2), (15, 0.2)]
    found = hst.hub_figures(shots, 6.0, 0)
    assert found and (found.cpu_s, found.cpu_share, found.cpu_share_max) == (5, 5 / 15, 0.6)
    assert found.requests == {"GET B": hst.OwnDurations(5, 0.5)}
    assert (found.event_loop_lag_p95_s, found.event_loop_samples) == (None, 0)


def test_fewer_than_two_looks_are_no_figures() -> None:
    assert hst.hub_figures([], 6.0, 0) is None
    assert hst.hub_figures([shot(0, 1, 5.0)], 6.0, 0) is None


def test_a_short_stretch_of_cpu_is_joined_to_the_next() -> None:
    shots = [shot(0, 1, 0.0), shot(0.1, 1, 0.1), shot(2, 1, 1.0)]
    assert hst.cpu_shares(shots) == [(2, 0.5)]
    assert hst.cpu_shares(shots[:2]) == [(0.1, pytest.approx(1.0))]


def test_the_largest_cpu_share_is_of_the_load_without_the_cleaning_up() -> None:
    shots = [shot(0, 1, 0.0), shot(5, 1, 2.0), shot(10, 1, 4.0), shot(15, 1, 9.0)]
    figures = hst.hub_figures(shots, 10.0, 0)
    assert figures and figures.cpu_share_max == 0.4 and figures.cpu_share == 0.6


def test_memory_is_shared_out_to_the_servers_that_became_ready() -> None:
    shots = [shot(n, 1, n, process_resident_memory_bytes=rss) for n, rss in enumerate((100e6, 130e6, 120e6))]
    for ready, each in ((10, 3e6), (0, None)):
        figures = hst.hub_figures(shots, 2.0, ready)
        assert figures and figures.rss_per_server_bytes == each
        assert (figures.rss_before_bytes, figures.rss_max_bytes, figures.rss_after_bytes) == (100e6, 130e6, 120e6)


# ==== Where the time went ============================================================================================

FIGURES = hst.HubFigures(
    cpu_s=1.0,
    cpu_share=0.2,
    cpu_share_max=0.2,
    rss_before_bytes=1e8,
    rss_max_bytes=1e8,
    rss_after_bytes=1e8,
    rss_per_server_bytes=None,
    event_loop_lag_p95_s=0.05,
    event_loop_lag_max_s=0.05,
    event_loop_samples=1000,
    running_servers_max=0.0,
    requests={},
    spawns={},
)
FRONT = "in front of the hub: this machine, network, proxy or TLS"
WAITING = "most of it was spent waiting for the hub's one thread, which used up to {} of a processor"
UNTOLD = "the hub's figures do not tell where the rest was spent"


@pytest.mark.parametrize(
    ("whole_s", "inside_s", "lag_s", "cpu_share", "where"),
    [
        (0.400, 0.050, 0.05, 0.95, WAITING),
        (0.400, 0.050, 0.30, 0.63, WAITING),  # on a busy machine it gets no more of a processor
        (0.400, 0.050, 0.10, 0.63, UNTOLD),
        (0.205, 0.004, 0.05, 0.10, "most of it was spent " + FRONT),
        # it is the hub that took long, or there is nothing to explain
        (0.400, 0.300, 0.30, 0.95, "most of it was spent in the hub"),
        (0.008, 0.002, 0.05, 0.10, "the rest is too little to matter"),
        # hubs before 5.0, which say nothing of their event loop
        (0.400, 0.050, None, 0.95, WAITING),
        (0.400, 0.050, None, 0.63, UNTOLD),
        (0.205, 0.004, None, 0.10, "most of it was spent " + FRONT),
    ],
)
def test_where_a_request_spent_its_time(
    whole_s: float, inside_s: float, lag_s: float | None, cpu_share: float, where: str
) -> None:
    hub = dataclasses.replace(FIGURES, cpu_share_max=cpu_share, event_loop_lag_p95_s=lag_s)
    assert hst.where_time_went(whole_s, inside_s, hub) == where.format(hst.share_text(cpu_share))


def test_a_ping_did_not_take_longer_inside_the_hub_than_in_all() -> None:
    own = dataclasses.replace(FIGURES, requests={"GET UserAPIHandler": hst.OwnDurations(9, 0.15)})
    pings = [hst.Event("ping", "x", 0.0, 0.0, took_s) for took_s in (0.12, 0.18)]
    for ping, said in zip(pings, ("of 120 ms: most", "of 180 ms took 150 ms by the hub's own clock: most")):
        found = results_of([ping], hub=hst.HubSide("http://x/hub/api", "6.1.1", 0, own, None), servers=None)
        assert told(found, "where the time went") == [f"a mean ping {said} of it was spent in the hub"]


def where_pings_spent_their_time(summary: str) -> str:
    """What is said of that; nothing of pings that were fast."""
    found = re.search(
        r"a mean ping of \S+ m?s(?: took \S+ m?s by the hub's own clock)?: ([^;]*?)(?= a mean |$)", summary, re.M
    )
    return found[1] if found else ""


def test_a_long_way_to_the_hub_is_told_from_a_slow_hub(new_hub: LocalHub) -> None:
    words = ("stress-test", "-c", "4", "--profile", '{"spawn_s": 2}')
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(matching("GET", "/users/[^/]+$"), Delay(0.2))
        behind = run_tool(*words, hub=new_hub, env={"JUPYTERHUB_ENDPOINT": f"{proxy.url}/hub/api"})
    assert where_pings_spent_their_time(behind.summary) == f"most of it was spent {FRONT}"
    direct = (run_tool(*words, hub=new_hub) for _ in range(3))  # on a machine that may be busy, which is in front too
    assert any("spent in front of the hub" not in where_pings_spent_their_time(done.summary) for done in direct)
    assert not tool_users(new_hub)


def test_a_hub_that_works_all_the_time_is_what_requests_wait_for(make_hub: Make, tmp_path: Path) -> None:
    """More lists of users than its one thread can make."""
    hub = make_hub(bystanders=300)
    words = ("activity-stress-test", "-c", "5", "--rate", "150", "--duration", "4s", "--mix", "list=1")
    hub_itself = ("most of it was spent waiting for the hub's one thread", "most of it was spent in the hub")
    for _ in range(3):  # on a machine that may be busy, which is in front too
        done, found = run_for_results(tmp_path / "r", *words, hub=hub)
        if (where := where_pings_spent_their_time(done.summary)).startswith(hub_itself):
            break
    else:
        pytest.fail(where)
    assert not tool_users(hub)


def test_a_mean_wait_for_a_server_is_divided_into_start_throttling_and_the_rest(make_hub: Make) -> None:
    hub = make_hub(concurrent_spawn_limit=2, slow_spawn_timeout_s=0, spawn_s=0.5)
    words = ("stress-test", "-c", "6", "-b", "6")
    with FaultProxy(hub.endpoint) as proxy:
        done = run_tool(*words, hub=hub, env={"JUPYTERHUB_ENDPOINT": f"{proxy.url}/hub/api"})
    sentence = re.search(r"of (\S+ m?s) until ready, (\S+ m?s) throttling, (\S+ m?s) the spawner", done.summary)
    assert sentence, done.summary

    def seconds(text: str) -> float:
        number, unit = text.rstrip(",").split()
        return float(number) / (1000 if unit == "ms" else 1)

    wait_s, throttled_s, start_s = map(seconds, sentence.groups())
    assert start_s >= 0.5 and throttled_s > 0.1 and start_s + throttled_s <= wait_s * 1.01
    assert not tool_users(hub)


# ==== The timeline ===================================================================================================


def test_the_results_show_what_happened_when(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "6", "-b", "2", "--profile", '{"spawn_s": 1.1}')
    _, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    line = found["timeline"]
    servers, ready = line["servers"], line["operations"]["server_ready"]
    assert len(set(servers["user"])) == 6 and all(servers["ready"]) and servers["lost_s"] == [None] * 6
    assert sum(ready["count"]) == 6 and sum(ready["failed"]) == 0
    for due_s, asked_s, ended_s in zip(servers["due_s"], servers["asked_s"], servers["ended_s"]):
        assert due_s is not None and asked_s is not None and ended_s is not None
        assert due_s <= asked_s and ended_s - asked_s >= 1.1 and ended_s <= line["load_ended_s"]
    assert line["hub"]["at_s"] == sorted(line["hub"]["at_s"]) and len(line["hub"]["at_s"]) >= 3
    curves = hst.server_curves(servers, line["load_ended_s"], points=50)
    assert [curves[kind][-1] for kind in ("waiting", "starting", "ready", "failed", "lost")] == [0, 0, 6, 0, 0]
    assert max(curves["starting"]) == 2 and curves["ready"] == sorted(curves["ready"])


# ==== What is said while a run goes on ===============================================================================


def test_the_first_line_of_a_run_says_what_it_will_do(new_hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "2", "--run", "x", hub=new_hub)
    what = f"2 servers, 10 at a time, on {new_hub.endpoint}, as hub-stress-test-x-<n>. Ctrl-C stops and cleans up."
    assert what in done.stderr.splitlines()[0]


def test_a_hub_that_goes_away_and_comes_back_is_said_to(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(database=str(tmp_path / "hub.sqlite"))
    with start_tool("activity-stress-test", "-c", "2", "--rate", "4", "--duration", "14s", hub=hub) as run:
        wait_until(lambda: tool_users(hub))
        hub.kill()
        time.sleep(5)
        hub.start()
        done = run.outcome(60)
    away = re.search(r"The hub has not answered since \d\d:\d\d:\d\d \(connection (refused|reset)\)", done.stderr)
    assert away and done.stderr.index("The hub answers again") > away.end()
    assert not tool_users(hub)
