"""People on real hubs: users made for them, their servers started, throttled, held and lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import hub_stress_test as hst
from hub_stress_test import Kind, ServerState
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, Hurried
from tool import MODULE, THEIRS, results_in, row, run_for_results, run_tool, start_tool, tool_users, wait_until

Make = Callable[..., LocalHub]
FAILS = '{"fail_rate": 1, "spawn_s": 0.1}'


@pytest.fixture(scope="module")
def eager() -> Iterator[LocalHub]:
    """A hub that answers each start at once, with 202."""
    with LocalHub(slow_spawn_timeout_s=0) as hub:
        yield hub


# ==== Servers: started, as many as were requested ====================================================================


def test_25_servers_are_exactly_25_and_leave_only_the_bystanders(hub: LocalHub) -> None:
    before = hub.users()
    done = run_tool("stress-test", "--count", "25", "--batch-size", "10", hub=hub)
    assert done.code == 0, done
    assert done.summary.startswith("PASSED: 25 of 25 servers became ready; half waited ")
    assert row(done.stdout, "server ready") == ["25", "0"]
    assert "create users" not in done.stdout  # which is of interest when something went wrong
    assert hub.users().keys() == before.keys()


def test_a_profile_reaches_the_server(new_hub: LocalHub) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [("big", {"profile": "big"}), ('{"image": "a:b"}', {"image": "a:b"})]
    for profile, options in asked:
        assert run_tool("stress-test", "-c", "1", "-k", "--profile", profile, hub=new_hub).code == 0
        (name,) = tool_users(new_hub)
        assert new_hub.users()[name]["servers"][""]["user_options"] == options
        assert run_tool("purge", hub=new_hub).code == 0


def test_a_real_notebook_server_starts_and_stops(make_hub: Make) -> None:
    hub = make_hub(real_servers=True)
    done = run_tool("stress-test", "-c", "1", hub=hub)
    assert done.code == 0, done
    assert "1 of 1 server became ready" in done.summary
    assert hub.users().keys() == THEIRS


# ==== Servers that fail ==============================================================================================


@pytest.mark.parametrize("fixture", ["new_hub", "old_hub", "eager"])
def test_failing_spawns_are_counted_with_reason_and_names(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub: LocalHub = request.getfixturevalue(fixture)
    words = ("stress-test", "-c", "20", "-b", "20", "--profile", '{"fail_rate": 0.4, "spawn_s": 1}')
    done, found = run_for_results(tmp_path / "r", *words, hub=hub)
    assert done.code == 1 and "12 of 20 servers became ready" in done.summary and not tool_users(hub)
    assert row(done.stdout, "server ready") == ["20", "8"]
    (reason,), failures = found["servers"]["reasons"], found["servers"]["failures"]
    assert "no node has 4 GB of memory free" in reason and {failure["reason"] for failure in failures} == {reason}
    failed = sorted({failure["user"] for failure in failures}, key=hst.natural)
    assert len(failed) == 8 and f"8 × {reason} ({', '.join(failed[:3])} and 5 more" in done.summary
    if fixture == "eager":  # others answer the start when it has failed, and there is no progress
        said = {failure["message"] for failure in failures} - {""}  # of whom it was asked too late
        assert said and said <= {"Looking for a node", "Pulling the image"}


@pytest.mark.parametrize("pace", [("-b", "20"), ("--rate", "1")], ids=" ".join)
def test_after_three_failed_starts_nobody_else_starts(pace: tuple[str, str], new_hub: LocalHub, tmp_path: Path) -> None:
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "20", *pace, "-p", FAILS, hub=new_hub)
    assert done.code == 1 and "20 users deleted, none left" in done.summary and not tool_users(new_hub)
    assert "nothing started: the first three starts failed: no node has 4 GB of memory free" in done.summary
    tried = found["operations"]["server_ready"]["failed"]
    assert tried == 3 if pace[0] == "-b" else 3 <= tried < 10  # those who come at a rate do not wait for others


def test_at_most_three_servers_start_before_one_is_ready(eager: LocalHub) -> None:
    most, ready, words = 0, False, ("-c", "12", "-b", "12", "--hold", "1s", "-p", '{"spawn_s": 0.6}')
    with start_tool("stress-test", *words, hub=eager) as run:
        while run.poll() is None and not ready:
            servers = [server for user in eager.users().values() for server in user["servers"].values()]
            ready = any(server["ready"] for server in servers)
            most = max(most, 0 if ready else len(servers))
        done = run.outcome()
    assert (done.code, most) == (0, 3) and "12 of 12 servers became ready" in done.summary


def test_a_start_that_times_out_is_stopped_before_another_begins(eager: LocalHub) -> None:
    most, words = 0, ("-c", "4", "-b", "2", "--server-timeout", "5s", "-p", '{"hang_rate": 1}')
    with start_tool("stress-test", *words, hub=eager) as run:
        while run.poll() is None:
            most = max(most, sum(len(user["servers"]) for user in eager.users().values()))
        done = run.outcome()
    assert (done.code, most) == (1, 2) and "4 × not ready after 5.00 s" in done.summary and not tool_users(eager)


def test_fail_fast_counts_failures_in_a_row(new_hub: LocalHub) -> None:
    of_three_two_fail = ("stress-test", "-b", "1", "--profile", '{"fail_rate": 0.6666666667}')  # never three in a row
    done = run_tool(*of_three_two_fail, "-c", "6", "--fail-fast", "3", hub=new_hub)
    assert (done.code, row(done.stdout, "server ready")) == (1, ["6", "4"])
    done = run_tool(*of_three_two_fail, "-c", "20", "--fail-fast", "2", hub=new_hub)
    count, failed = map(int, row(done.stdout, "server ready"))
    assert failed >= 2 and count <= 4 and not tool_users(new_hub)
    assert f"{failed} failed, {20 - count} not begun (--fail-fast)" in done.summary


@pytest.mark.parametrize(("ends", "reached"), [("FF", False), ("FFsFFsFF", False), ("sFFFs", True)])
def test_a_person_at_the_goal_ends_a_failure_streak(ends: str, reached: bool) -> None:
    session = hst.get_session("x", dry_run=True)
    crowd, never = hst.Crowd(session, hst.Plan(fail_fast=3)), hst.Crowd(session, hst.Plan())
    for end in ends:
        crowd.count(failed=end == "F")
        never.count(failed=end == "F")
    assert crowd.failed_too_often is reached and not never.failed_too_often


@pytest.mark.parametrize(
    ("wish", "steps"),
    [
        ({"fail_rate": 1.0}, ["start_server", "server_ready", "delete_user"]),
        ({"hang_rate": 1.0}, ["start_server", "server_ready", "stop_server", "delete_user"]),
        ({}, ["start_server", "server_ready", "stay", "stop_server", "delete_user"]),
    ],
    ids=["the spawn fails", "it is never ready", "all goes well"],
)
def test_after_a_failed_start_only_leaving_follows(wish: dict[str, float], steps: list[str], eager: LocalHub) -> None:
    events: list[hst.Event] = []
    session = hst.get_session(eager.token)
    plan = hst.Plan(profile=wish, stay_s=0.1, server_timeout_s=1.0 if "hang_rate" in wish else 20.0)
    site = hst.Site(hst.Hub(eager.endpoint, session), plan, hst.Recorder(events.append))
    assert site.hub.create(["hub-stress-test-1"]).status == 201
    hst.journey(hst.Visitor("hub-stress-test-1", session.clock(), plan, site))
    assert [event.step for event in events] == steps
    assert [event.step for event in events if event.reason] == (["server_ready"] if wish else [])
    assert site.states == {"hub-stress-test-1": ServerState.GONE} and not tool_users(eager)


# ==== Throttling =====================================================================================================


def test_throttled_starts_take_turns_by_when_they_were_due() -> None:
    session = hst.get_session("x", dry_run=True)
    crowd = hst.Crowd(session, hst.Plan())
    order: list[float] = []

    def wait(due_s: float) -> None:
        crowd.wait_for_place(due_s, 0, session.clock() + 60)
        order.append(due_s)

    threads = [threading.Thread(target=wait, args=(due_s,)) for due_s in (3.0, 1.0, 2.0)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(crowd.throttled) == 3)
    for number in (1, 2, 3):
        crowd.start_ended("x", None)
        wait_until(lambda: len(order) == number)  # noqa: B023
    assert order == [1.0, 2.0, 3.0]


def test_a_place_freed_before_a_start_is_no_turn() -> None:
    session = hst.get_session("x", dry_run=True)
    crowd = hst.Crowd(session, hst.Plan())
    crowd.start_ended("x", None)
    began_s = session.clock()
    crowd.wait_for_place(1.0, crowd.freed, began_s + 0.3)
    assert session.clock() - began_s >= 0.3


def test_throttled_starts_are_retried_when_a_place_is_free(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(concurrent_spawn_limit=5, spawn_s=0.2, slow_spawn_timeout_s=0)
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "40", "-b", "50", hub=hub)
    assert done.code == 0 and not tool_users(hub)
    assert re.search(r"40 ready, 0 failed; [1-9]\d* throttled, ", done.summary)
    line = found["timeline"]["servers"]
    waits_s = [asked_s - at_s for at_s, asked_s in zip(line["throttled_s"], line["asked_s"]) if at_s is not None]
    assert 0 < min(waits_s) < 25  # the hub's shortest pause is 30 s


# ==== Servers that are held ==========================================================================================


def test_a_server_stopped_while_held_was_ready_and_is_lost(new_hub: LocalHub, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with start_tool("stress-test", "-c", "4", "--hold", "4s", "--results", str(file), hub=new_hub) as run:
        run.log_up_to("Holding the servers for 4 s")
        users = new_hub.users()
        assert all(users[hst.username(n)]["servers"][""]["ready"] for n in range(1, 5))
        unlucky = hst.username(3)
        new_hub.call("DELETE", f"/users/{unlucky}/server")  # as a culler would
        done = run.outcome()
    assert done.code == 1 and not tool_users(new_hub)
    assert "4 of 4 servers became ready; 1 was lost while held" in done.summary
    reason, found = "the server stopped while it was held", results_in(file, done)
    assert f"1 × {reason} ({unlucky}), at " in done.summary
    servers, operations = found["servers"], found["operations"]
    assert (servers["ready"], servers["failed"], servers["lost"], found["failed"]) == (4, 0, 1, 1)
    (failure,) = servers["failures"]
    assert failure["failed_s"] >= 4 and failure == failure | {"user": unlucky, "reason": reason, "message": ""}
    counts = {step: (operations[step]["count"], operations[step]["failed"]) for step in ("stay", "server_ready")}
    assert counts == {"stay": (4, 1), "server_ready": (4, 0)}
    line = found["timeline"]["servers"]
    ((lost_s, ready_s),) = [(at_s, ended_s) for at_s, ended_s in zip(line["lost_s"], line["ended_s"]) if at_s]
    assert lost_s > ready_s and all(line["ready"])


# ==== People at the same time ========================================================================================


NAMES = [hst.username(n) for n in range(1, 301)]


class OwnStarts(HubWithUsers):
    """A simulated hub that does this at each start of a server, whose URL it is given."""

    def __init__(self, start: Callable[[str], object]) -> None:
        super().__init__(NAMES)
        self._start = start

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if request.method == "POST" and (request.url or "").endswith("/server"):
            self._start(request.url or "")
        return super().send(request, *args, **kwargs)


def simulated_site(start: Callable[[str], object] = str, **plan: Any) -> hst.Site:
    """A simulated hub, and a session for which its time passes quickly."""
    return hst.Site(hst.Hub(ENDPOINT, Hurried(OwnStarts(start))), hst.Plan(**plan), hst.new_recorder())


def ends_of(site: hst.Site, step: str = "server_ready") -> list[hst.Event]:
    return [steps[step] for steps in site.record.people.values() if step in steps]


def wait_until_all_threads_have_ended() -> None:
    wait_until(lambda: not any(thread.name.startswith("hub-stress-test") for thread in threading.enumerate()))


def test_three_hundred_people_stay_together_although_one_raises() -> None:
    def start(url: str) -> None:
        if "hub-stress-test-2/" in url:
            raise LookupError("nobody expected this")

    site, held = simulated_site(start, count=300, batch_size=2, hold_s=60.0), list[int]()
    hst.send_people(NAMES, site, lambda: held.append(site.record.count(["server_ready"]) - site.record.count(["stay"])))
    stays, (failed,) = ends_of(site, "stay"), [end for end in ends_of(site) if end.reason]
    assert max(held) == 300 and len(stays) == 299
    assert all(stay.reason is None and stay.latency_s >= 60.0 for stay in stays)
    assert (failed.user, failed.reason) == (NAMES[1], hst.Reason(Kind.RAISED, "LookupError: nobody expected this"))
    assert site.states[NAMES[1]] is ServerState.STARTING  # as far as anybody knows: it will be stopped
    wait_until_all_threads_have_ended()


def test_without_a_schedule_at_most_the_batch_size_are_starting() -> None:
    places = threading.Semaphore(5)

    def start(url: str) -> None:
        assert places.acquire(blocking=False)
        time.sleep(0.02)
        places.release()

    site = simulated_site(start, count=40, batch_size=5)
    hst.send_people(NAMES[:40], site)
    ends = ends_of(site)
    assert len(ends) == 40 and not any(end.reason for end in ends)
    starting = [sum(other.due_s <= end.due_s < other.ended_s for other in ends) for end in ends]
    assert max(starting) == 5  # nobody is due without a place


def test_arrivals_keep_to_the_schedule_however_long_each_takes() -> None:
    everybody = threading.Barrier(20)  # each waits for the last to come: only an open model gets through
    site = simulated_site(lambda url: everybody.wait(60), count=20, rate_per_s=4.0)
    hst.send_people(NAMES[:20], site)
    ends = ends_of(site)
    dues_s = sorted(end.due_s for end in ends)
    assert [due_s - dues_s[0] for due_s in dues_s] == pytest.approx([n / 4 for n in range(20)])
    assert all(end.sent_s >= end.due_s for end in ends)


@pytest.mark.parametrize(("options", "due_s"), [({}, [0.0, 0.0, 0.0]), ({"rate_per_s": 4.0}, [0.0, 0.25, 0.5])])
def test_people_arrive_at_a_rate_or_at_once(options: dict[str, Any], due_s: list[float]) -> None:
    plan = hst.Plan(count=3, **options)
    assert [at_s for at_s, _ in hst.arrivals(plan)] == due_s and plan.is_open == bool(options)


def test_random_arrivals_depend_on_the_seed_and_fill_their_time() -> None:
    plans = [hst.Plan(count=300, within_s=60.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([at_s for at_s, _ in hst.arrivals(plan)] for plan in plans)
    assert first == again != other and plans[0].is_open
    assert first[:3] == pytest.approx([0.126, 0.343, 0.509], abs=1e-3)  # whatever the version of Python
    assert len(first) == 300 and first == sorted(first) and first[0] >= 0.0 and first[-1] <= 60.0
    assert 130 < sum(at_s < 30.0 for at_s in first) < 170  # about half of them in the first half


def test_what_a_thread_raises_ends_the_run_and_is_raised() -> None:
    session, long = hst.get_session("x", dry_run=True), threading.Event()

    def act(item: int) -> None:
        if item == 3:
            raise hst.CutShort("the hub refused")
        long.wait(30)

    with pytest.raises(hst.CutShort, match="the hub refused"), hst.Team(session) as team:
        for item in range(4):
            team.start(act, item)
    long.set()
    wait_until_all_threads_have_ended()


def test_a_hub_that_is_gone_ends_the_run() -> None:
    """Nothing answers; the session takes the hub for gone after 2 s of its own time."""
    session, long = Hurried(), threading.Event()
    session.gone_after_s = 2.0
    with hst.Team(session) as team:
        for _ in range(3):
            team.start(long.wait, 30)
    assert team.running == 3
    long.set()


FORTY_THREADS = """
import encodings.idna, os, resource
import prometheus_client.parser
import hub_stress_test
if not os.getuid():  # whom no limit stops
    os.setresuid(65534, 65534, 65534)
resource.setrlimit(resource.RLIMIT_NPROC, (40, 40))
hub_stress_test.program()
"""


def test_without_more_threads_the_run_says_so_and_cleans(new_hub: LocalHub) -> None:
    words = ("stress-test", "-c", "80", "--rate", "200", "--profile", '{"spawn_s": 3}')
    where = {"JUPYTERHUB_ENDPOINT": new_hub.endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token}
    command = [sys.executable, "-W", "error", "-c", FORTY_THREADS, *words]
    done = subprocess.run(command, env=os.environ | where, cwd=MODULE.parent, capture_output=True, text=True)
    assert done.returncode == 1 and "this machine starts no more threads than 40" in done.stdout, done
    assert "80 users deleted, none left" in done.stdout and "Traceback" not in done.stderr
    assert not tool_users(new_hub)


# ==== Starts at a rate ===============================================================================================


def test_starts_at_a_rate_count_from_when_each_was_due(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "--rate", "4:1s,8:1s", "--profile", '{"spawn_s": 0.5}')
    done, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    pace = "4 per second for 1.00 s, then 8 per second for 1.00 s, however slow the hub"
    assert done.code == 0 and f"12 requested, {pace}; 12 ready" in done.summary and not tool_users(new_hub)
    due_s, expected = found["timeline"]["servers"]["due_s"], [n / 4 for n in range(4)] + [1 + n / 8 for n in range(8)]
    assert [at_s - due_s[0] for at_s in due_s] == pytest.approx(expected, abs=1e-3)
    assert found["operations"]["server_ready"]["latency_s"]["min"] >= 0.5
