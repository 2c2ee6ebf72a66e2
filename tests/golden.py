"""Whole pages of made-up results, each in a file of tests/golden/, to be read in review.

    REWRITE_GOLDEN=1 pytest -k golden

writes the files anew. Wording is reviewed there, and nowhere else: other tests look at labels and numbers.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_stress_test as hst
from hub_stress_test import Event, Kind, Reason
from made_up import did, failed, folded, held, hub_with, pings, ready, results_of, throttled

FOLDER = Path(__file__).with_suffix("")


def is_golden(page: str, name: str) -> bool:
    """Whether a page is the one in the file of this name."""
    file = FOLDER / f"{name}.txt"
    if "REWRITE_GOLDEN" in os.environ:
        file.write_text(page)
    return page == file.read_text()


def judged(*texts: str, results: hst.Results, baseline: hst.Json | None = None) -> list[hst.Judgement]:
    return [hst.condition(text).judge(hst.as_json(results), baseline) for text in texts]


def housekeeping(number: int) -> list[Event]:
    """The requests with which a run of this many users begins and ends."""
    deletes = [did("delete_user", n, 31.0, due_s=30.0) for n in range(1, number + 1)]
    return [did("list_users", 0, 0.05), did("create_users", 0, 0.3), *deletes]


def passing() -> str:
    """300 people come within five minutes, work, and nothing is wrong."""
    events = [*housekeeping(300), *pings(*[0.012] * 300)]
    for n in range(1, 301):
        events += [did("start_server", n, n + 0.2, due_s=n), did("server_ready", n, n + 3 + n / 100, due_s=n)]
        events += [did("visit", n, n + 4 + n / 100, due_s=n + 3 + n / 100)]
        events += [did("kernel_ready", n, n + 6 + n / 100, due_s=n + 4 + n / 100)]
        events += [did("at_work", n, n + 6 + n / 100, due_s=n), did("cell", n, n + 17, due_s=n + 16.5)]
    took = hst.OwnDurations(300, 2.9)
    figures = hub_with(cpu_s=61.0, cpu_share=0.17, cpu_share_max=0.31, spawns={"success": took})
    servers = hst.Http(2412, 3, 0, {"101": 600, "200": 1809, "503": 3}, 0, 0.0)
    http = hst.Http(3306, 0, 0, {"200": 2100, "201": 306, "204": 600, "202": 300}, 1830, 1830 / 3306, servers)
    options = hst.Plan(count=300, within_s=300.0, work=True, fail_if=(hst.condition("at_work.p95 > 60s"),))
    people = hst.people_of(folded(events).people, 300, False)
    results = results_of(events, hub=figures, http=http, people=people, duration_s=362.0, options=options.options())
    return hst.render_summary(dataclasses.replace(results, conditions=judged("at_work.p95 > 60s", results=results)))


def passing_but() -> str:
    """It passed, but people were throttled and others waited, because the hub's thread was full; 80 columns."""
    events = [*(throttled(n, 4 + n / 4) for n in range(1, 18)), *(ready(n, 3.0) for n in range(18, 21))]
    events += [did("start_server", n, 2.0, backoff_s=1.5 * (n < 18)) for n in range(1, 21)]
    events += pings(*[0.4] * 30, 8.3)
    spawns, requests = {"success": hst.OwnDurations(20, 3.4)}, {"GET UserAPIHandler": hst.OwnDurations(31, 0.05)}
    hub = hub_with(cpu_s=9.1, cpu_share=0.7, cpu_share_max=0.98, spawns=spawns, requests=requests)
    options = hst.Plan(count=20, rate_per_s=4.0, fail_if=(hst.condition("server_ready.p99 > 30s"),)).options()
    results = results_of(events, hub=hub, options=options, http=hst.Http(190, 17, 34, {}, 32, 32 / 190))
    results = dataclasses.replace(results, conditions=judged("server_ready.p99 > 30s", results=results))
    results = dataclasses.replace(results, but=list(hst.but_of(results)))
    return hst.render_summary(dataclasses.replace(results, advice=list(hst.advice(results, ()))), width=80)


def failing() -> str:
    """Failures of many kinds, beside a baseline."""
    events = [*housekeeping(5), did("mine", 0, 1.0, Reason(Kind.REFUSED, "RuntimeError: not today"))]
    events += [did("start_server", n, 0.3, Reason(Kind.REFUSED, "500") if n == 9 else None) for n in range(1, 31)]
    events += [ready(n, 2 + n / 10, message="Pulling the image" if n > 18 else "Starting") for n in range(1, 21)]
    events += [throttled(21, 9.0, message="Starting"), held(1, lost=True), *(held(n) for n in range(2, 21))]
    events += [failed(n, waited_s=190.0 + n) for n in range(22, 28)]
    events += [failed(28, "not ready after 60 s", Kind.TIMED_OUT, waited_s=60.0)]
    events += [failed(29, "exec format error")]
    options = hst.Plan(count=30, hold_s=60.0, fail_if=tuple(map(hst.condition, CONDITIONS))).options()
    warnings = ["the hub restarted during the run"]
    results = results_of(events, 30, options=options, warnings=warnings)
    before = hst.as_json(results_of([ready(n, 1.9) for n in range(1, 31)], options=options | {"hold": 0.0}))
    goals = judged(*CONDITIONS, results=results, baseline=before)
    hub = hst.HubSide("http://x/hub/api", "6.1.1", 1, None, hst.NO_METRICS_SCOPE)
    results = dataclasses.replace(results, hub=hub, conditions=goals)
    kinds = {Kind.SPAWN, Kind.TIMED_OUT, Kind.LOST}
    return hst.render_summary(dataclasses.replace(results, advice=list(hst.advice(results, kinds))), before)


CONDITIONS = ("failed_rate > 25%", "server_ready.p50 > 1.2x", "visit.p95 > 5s", "throttled > 3")


def interrupted() -> str:
    """Ctrl-C, while servers were starting; two users could not be removed on their way."""
    events = [ready(1), ready(2, 3.0), failed(3)]
    starting = {hst.username(n) for n in (4, 5)}
    servers = hst.servers_of(folded(events).people, 12, True, starting=starting)
    users = hst.Users(12, 12, stopped_while_starting=2)
    warnings = ["2 servers were still starting after 8 s: Pulling the image"]
    return hst.render_summary(results_of(events, servers=servers, users=users, warnings=warnings, exit_code=130))


def left_behind() -> str:
    """Two users cannot be deleted, and the hub has failed to stop a server."""
    events = [ready(n) for n in range(1, 4)]
    left = ["hub-stress-test-ci-2", "hub-stress-test-ci-3", "hub-stress-test-ci-4", "hub-stress-test-ci-10"]
    solved = "the hub fails to delete users (500): database is locked"
    users = hst.Users(7, 3, 0, left, in_the_way=solved, stops_failed=1)
    options = hst.Plan(count=3, run="ci").options()
    return hst.render_summary(results_of(events, users=users, options=options, exit_code=4))


def search() -> str:
    """How many people a minute, and do 300 come within five minutes?"""
    events = [*(ready(n, 4.0) for n in range(1, 33)), *pings(*[0.02] * 60)]
    steps = [
        hst.CapacityStep(0.1, 0.1, 4.0, 0, None, False),
        hst.CapacityStep(0.8, 0.8, 5.5, 0, None, False),
        hst.CapacityStep(1.6, 1.6, 31.0, 0, "server_ready.p95 > 30s", False, hst.LIMITED_IN_FRONT),
    ]
    options = hst.Plan(count=300, within_s=300.0, find_capacity=True, max_servers=100).options()
    capacity = hst.capacity_of(hst.Plan(find_capacity=True), steps, finished=True)
    return hst.render_summary(results_of(events, options=options, servers=None, capacity=capacity))


def search_for_reports() -> str:
    """How many activity reports a second?"""
    events = [did("activity", n, n / 100 + 0.02, due_s=n / 100) for n in range(1000)]
    steps = [
        hst.CapacityStep(64.0, 64.0, 0.02, 0, None, False),
        hst.CapacityStep(128.0, 120.5, None, 3, "failed > 0", False),
    ]
    plan = hst.Plan(hst.ACTIVITY, find_capacity=True)
    more: dict[str, Any] = {"command": hst.ACTIVITY, "options": plan.options(), "servers": None}
    return hst.render_summary(results_of(events, **more, capacity=hst.capacity_of(plan, steps, finished=True)))


def kubernetes() -> str:
    """Pods: some wait for a node and an image, some fail; a group of staff and one of students."""
    phases = hst.Phases(1.0, 20.0, 1.0, 8.0, 1.0, 2.0, 1, 1)
    events = [ready(n, 33.0, group="staff" if n < 3 else "students", phases=phases) for n in range(1, 9)]
    events += [did("at_work", n, 33.0, group="staff" if n < 3 else "students") for n in range(1, 9)]
    short = "did not start in 300 s: 0/3 nodes are available: 3 Insufficient memory"
    events += [failed(n, short, Kind.TIMED_OUT, waited_s=300.0 + n, group="students") for n in (9, 10)]
    rows = folded(events).people
    staff, students = ({"name": name, "count": n, "within": 60.0} for name, n in (("staff", 2), ("students", 8)))
    options = hst.Plan(count=10, event=(hst.Plan(),)).options() | {"event": [staff, students]}
    groups = {name: hst.people_of(rows, n, False, name) for name, n in (("staff", 2), ("students", 8))}
    results = results_of(events, people=hst.people_of(rows, 10, False), groups=groups, options=options)
    return hst.render_summary(dataclasses.replace(results, advice=list(hst.advice(results, {Kind.TIMED_OUT}))))


PAGES: tuple[Callable[[], str], ...] = (
    passing,
    passing_but,
    failing,
    interrupted,
    left_behind,
    search,
    search_for_reports,
    kubernetes,
)
