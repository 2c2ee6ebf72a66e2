"""The load: when each request is sent and to whom, from threads and processes; operations of one's own."""

from __future__ import annotations

import csv
import gzip
import math
import multiprocessing.context
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests

import hub_stress_test as hst
from hub_stress_test import Kind, Schedule
from known_server import KnownServer
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, Hurried, TimeTraveller
from tool import results_in, row, run_for_results, start_tool, tool_users, wait_until

USERS = tuple(hst.username(n) for n in range(1, 11))

# ==== Which request is due when ======================================================================================


@pytest.mark.parametrize(
    ("stages", "due_s"),
    [
        (((2, 1.0), (4, 0.5), (1, 2.0)), [0, 0.5, 1, 1.25, 1.5, 2.5]),
        (((0.1, 30.0), (10, 0.1)), [0, 10, 20, 30]),  # 0.1 * 30 is a little more than 3
        (((0.3, 5.0), (1, 1.0)), [0, 10 / 3, 5]),  # due before the end of a stage
    ],
)
def test_the_stages_of_a_schedule_follow_each_other(
    stages: tuple[tuple[float, float], ...], due_s: list[float]
) -> None:
    schedule = Schedule(stages)
    assert schedule.count == len(due_s) and schedule.lasts_s == sum(for_s for _, for_s in stages)
    assert [schedule.due_s(n) for n in range(schedule.count)] == pytest.approx(due_s)
    assert [Schedule(((5, math.inf),)).due_s(n) for n in (0, 1, 5, 50)] == [0, 0.2, 1, 10]


def test_operations_are_chosen_by_weight_and_spread_evenly() -> None:
    mix = {"activity": 8.0, "read": 1.0, "list": 1.0}
    chosen = [hst.choose(mix, n) for n in range(1000)]
    assert [chosen.count(name) for name in mix] == pytest.approx([800, 100, 100], abs=3)
    assert all(chosen[n : n + 50].count("read") in (4, 5, 6) for n in range(0, 1000, 50))


def load_of(**settings: Any) -> hst.Load:
    return hst.Load(hst.Plan(hst.ACTIVITY, **settings), ENDPOINT, USERS)


@pytest.mark.parametrize(
    ("settings", "requests", "threads"),
    [
        ({}, 10, 100),
        ({"duration_s": 9.0}, 10, 100),
        ({"rate_per_s": 500, "duration_s": 3.0}, 1500, 200),
        ({"rate_per_s": 180, "duration_s": 1.0, "processes": 4}, 180, 135),
        ({"rate_per_s": Schedule(((10, 2.0), (50, 120.0))), "duration_s": 122.0}, 6020, 150),
    ],
)
def test_a_load_knows_how_many_requests_and_threads(settings: dict[str, Any], requests: int, threads: int) -> None:
    load = load_of(**settings)
    assert (load.planned, load.workers) == (requests, threads)


# ==== The closed model ===============================================================================================


def reported(hub: HubWithUsers) -> list[str]:
    """The users for whom activity was reported, in the order of the requests."""
    return [path.split("/")[4] for method, path, _ in hub.asked if method == "POST"]


def send(part: int, hub: HubWithUsers, **settings: Any) -> None:
    """Send one process's part of a load to a hub without sockets."""
    session, record, load = Hurried(hub), hst.Recorder(), load_of(**settings)
    hst.send_load(load, part, session.clock(), session, record, lambda: None)
    assert record.failures(load.plan.load) == 0


@pytest.mark.parametrize("workers", [3, 12, 300])
def test_a_closed_load_goes_once_through_the_users(workers: int) -> None:
    hub = HubWithUsers(USERS)
    for part in range(3):
        send(part, hub, workers=workers, processes=3)
    assert sorted(reported(hub)) == sorted(USERS)


def test_a_closed_load_with_a_duration_goes_round_the_users() -> None:
    hub = HubWithUsers(USERS)
    send(0, hub, duration_s=100.0)  # 2 s of ours
    counts = Counter(reported(hub))
    assert counts.keys() == set(USERS) and min(counts.values()) > 2


# ==== The open model =================================================================================================


def test_the_parts_of_an_open_load_make_up_the_whole() -> None:
    hub, load = HubWithUsers(USERS), load_of(rate_per_s=40.0, duration_s=0.5, processes=3)
    seen: list[hst.Event] = []
    due_s: list[float] = []
    for part in range(3):
        session = hst.HubSession("x", hub)
        started_s = session.clock()
        hst.send_load(load, part, started_s, session, hst.Recorder(seen.append), lambda: None)
        due_s += [event.due_s - started_s for event in seen[len(due_s) :]]
    assert sorted(due_s) == pytest.approx([n / 40 for n in range(20)])
    assert all(event.sent_s >= event.due_s and event.reason is None for event in seen)
    assert Counter(reported(hub)) == dict.fromkeys(USERS, 2)


@pytest.mark.parametrize("processes", ["1", "3"])
def test_an_open_load_sends_every_request_at_its_time(processes: str, tmp_path: Path) -> None:
    with KnownServer(service_s=0.01) as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "50", "--duration", "3s", "--processes", processes)
        words += ("--samples", str(tmp_path / "s.csv.gz"))
        _, found = run_for_results(tmp_path / "r", *words, env=server.environment)
        arrivals = server.arrivals()
    assert len(arrivals) == 150 == found["operations"]["activity"]["count"]
    with gzip.open(tmp_path / "s.csv.gz", "rt") as samples:
        reports = [row for row in csv.DictReader(samples) if row["step"] == "activity"]
    assert all(float(row["sent_s"]) >= float(row["due_s"]) for row in reports)
    due_s = sorted(float(row["due_s"]) for row in reports)
    assert [at_s - due_s[0] for at_s in due_s] == pytest.approx([n / 50 for n in range(150)], abs=0.001)


def test_a_server_that_freezes_is_not_flattered(tmp_path: Path) -> None:
    """A closed loop would report a p90 of 10 ms: people who come during the freeze wait for its end."""
    with KnownServer(service_s=0.01, freeze_s=1, period_s=3) as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "40", "--duration", "6s")
        _, found = run_for_results(tmp_path / "r", *words, env=server.environment)
    latency = found["operations"]["activity"]["latency_s"]
    assert latency["min"] >= 0.01 and latency["p90"] > 0.5 and latency["max"] > 0.9


def test_a_generator_that_is_late_says_so_before_any_number(tmp_path: Path) -> None:
    with KnownServer(capacity_per_s=100) as server:
        words = ("activity-stress-test", "-c", "10", "--rate", "700", "--duration", "2s")
        done, found = run_for_results(tmp_path / "r", *words, env=server.environment)
    sent = found["operations"]["activity"]["count"]
    (warning,) = found["warnings"]
    assert warning.startswith("THE GENERATOR WAS LATE") and f"{1400 - sent} not at all" in warning and sent < 1400
    label, _, sentences = done.summary.splitlines()[1].partition(" ")
    assert (done.code, label) == (0, "but") and sentences.strip().startswith(warning)


# ==== Several processes ==============================================================================================


def all_are_active(hub: LocalHub) -> bool:
    """Whether the activity of all of the tool's users has been reported, the first a while ago."""
    users = hub.users()
    return all(users[name]["last_activity"] for name in tool_users(hub) & users.keys())


@pytest.mark.parametrize(
    ("number", "code", "sending"),
    [(signal.SIGINT, 130, False), (signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGKILL, 1, True)],
)
def test_processes_that_end_early_leave_nobody_on_the_hub(
    number: int, code: int, sending: bool, new_hub: LocalHub, tmp_path: Path
) -> None:
    """A terminal interrupts all of them; only one runs out of memory."""
    words = ["activity-stress-test", "-c", "5", "--rate", "10", "--duration", "60s", "--processes", "2"]
    words += ["--fail-if", "ping.p95 > 100s", "--results", str(tmp_path / "r")]
    with start_tool(*words, hub=new_hub) as run:
        wait_until(lambda: len(tool_users(new_hub)) == 5)
        # multiprocessing's own, which comes first, and the two that send
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait_until(lambda: not sending or len(children.read_text().split()) == 3 and all_are_active(new_hub))
        if number == signal.SIGKILL:
            os.kill(int(children.read_text().split()[-1]), number)
        else:
            os.killpg(run.pid, number)
        done = run.outcome()
    found = results_in(tmp_path / "r", done)
    assert done.code == code and done.stdout.startswith("FAILED: " if code == 1 else "INTERRUPTED: ")
    assert found["warnings"] == ["a process that sends the load died"] * (code == 1)
    if sending:
        assert found["operations"]["activity"]["count"] > 0
        assert [judged["held"] for judged in found["conditions"]] == [False]
    assert found["users"] == found["users"] | {"created": 5, "deleted": 5, "kept": 0, "left_behind": []}
    assert not tool_users(new_hub)


def test_where_no_more_processes_start_the_load_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
    with pytest.raises(hst.CutShort, match="no more than 0 processes"):
        hst.spread_load(load_of(processes=2), hst.get_session("x"), hst.Recorder())


# ==== One operation ==================================================================================================


def performed(send: hst.Send) -> hst.Event | None:
    """What is recorded of one operation on a user of a hub without sockets."""
    seen: list[hst.Event] = []
    hst.perform("own", send, USERS[0], ENDPOINT, TimeTraveller(HubWithUsers(USERS[:1])), hst.Recorder(seen.append))
    return seen[0] if seen else None


def raising(error: BaseException) -> hst.Send:
    def send(user: str, endpoint: str, session: hst.HubSession) -> requests.Response:
        raise error

    return send


def refused(user: str, endpoint: str, session: hst.HubSession) -> requests.Response:
    return session.get(hst.user_url(endpoint, "nobody"))


@pytest.mark.parametrize(
    ("send", "reason"),
    [
        (hst.report_activity, None),
        (hst.read_user, None),
        (hst.list_page, None),
        (refused, hst.Reason(Kind.REFUSED, "404")),
        (raising(requests.ConnectionError(ConnectionRefusedError())), hst.Reason(Kind.NO_ANSWER, "connection refused")),
        (raising(RuntimeError("not today")), hst.Reason(Kind.RAISED, "RuntimeError: not today")),
        (raising(SystemExit(7)), hst.Reason(Kind.RAISED, "SystemExit: 7")),
    ],
)
def test_an_operation_is_recorded_whatever_it_raises(send: hst.Send, reason: hst.Reason | None) -> None:
    event = performed(send)
    assert event and (event.step, event.user, event.reason) == ("own", USERS[0], reason)
    assert performed(raising(hst.Stopped())) is None  # it was we who cut that short


# ==== Operations of one's own ========================================================================================

OPERATIONS_FILE = """
from hub_stress_test import operation, user_url

@operation("self")
def read_self(username, endpoint, session):
    return session.get(user_url(endpoint, username))

@operation("broken")
def broken(username, endpoint, session):
    raise RuntimeError("not today")

@operation("unused")
def unused(username, endpoint, session):
    return session.get(f"{endpoint}/groups")
"""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_operations_of_ones_own_are_mixed_in_and_judged(processes: str, new_hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OPERATIONS_FILE)
    words = ["activity-stress-test", "-c", "4", "--rate", "40", "--duration", "3s", "--processes", processes]
    words += ["--operations", str(tmp_path / "mine.py"), "--mix", "activity=2,self=1,broken=1"]
    limits = ("self.p95 > 100s", "unused.p95 > 100s", "broken.failed > 99")
    words += [word for limit in limits for word in ("--fail-if", limit)]
    done, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    counts = {name: found["operations"][name]["count"] for name in ("activity", "self", "broken")}
    assert sum(counts.values()) == 120
    assert all(abs(counts[name] - expected) <= 3 for name, expected in (("activity", 60), ("self", 30), ("broken", 30)))
    assert found["operations"]["broken"]["errors"] == {"RuntimeError: not today": counts["broken"]}
    assert found["failed"] == counts["broken"] and row(done.stdout, "self") == [str(counts["self"]), "0"]
    assert f"broken: {counts['broken']} × RuntimeError: not today" in done.summary
    assert done.code == 1  # nothing was measured of `unused`
    assert [judged["held"] for judged in found["conditions"]] == [False, True, False]
    assert not tool_users(new_hub)
