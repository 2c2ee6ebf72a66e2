"""The functions that the seeds document, used as a library on real hubs."""

from __future__ import annotations

import argparse
import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import AnswerAfter, FaultProxy, first, hub_answer, matching
from hub_stress_test import Kind
from localhub import LocalHub
from tool import check_schema, tool_users, wait_until

RUN = "lib"


def make(hub: LocalHub, session: hst.HubSession, count: int) -> list[list[str]]:
    return hst.create_users(count, 2, hub.endpoint, session, run=RUN)


# ==== One function at a time =========================================================================================


def test_users_and_servers_come_and_go(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    users = make(hub, session, 4)
    assert [len(batch) for batch in users] == [2, 2]
    names = sum(users, [])
    found = hst.find_existing_stress_test_users(hub.endpoint, session)
    assert [user["name"] for user in found] == names
    assert hst.find_existing_stress_test_users(hub.endpoint, session, run="another") == []
    assert hst.create_users(1, 1, hub.endpoint, session, found, run=RUN) == [["hub-stress-test-lib-5"]]

    for name in names[:3]:
        assert hst.start_server(name, hub.endpoint, session, profile="small")
    assert not hst.start_server("hub-stress-test-lib-99", hub.endpoint, session)
    ready = hst.wait_for_servers_to_start(users, hub.endpoint, session)
    assert ready == dict(zip(names, [True, True, True, False]))

    assert hst.stop_server(names[0], hub.endpoint, session, wait=True)
    stopped = hst.stop_servers(names, hub.endpoint, session, 2)
    hst.wait_for_servers_to_stop(stopped, hub.endpoint, session)
    assert stopped == dict.fromkeys(names, True)
    assert not any(hub.users()[name]["servers"] for name in names)
    assert not hst.delete_users_after_stopping_servers(stopped | {names[0]: False}, hub.endpoint, session)
    assert tool_users(hub) == {names[0], "hub-stress-test-lib-5"}
    assert hst.delete_users([names[0], "hub-stress-test-lib-5"], hub.endpoint, session)
    assert hst.wait_for_server_to_stop(names[0], hub.endpoint, session)  # a user that is gone has no server
    assert not tool_users(hub)


def test_start_servers_returns_events_with_the_reasons_of_failures(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    users = make(hub, session, 3)
    failing = {"fail_rate": 1.0}
    failed = hst.start_servers(users, hub.endpoint, session, failing)
    assert failed.keys() == set(sum(users, []))
    for event in failed.values():
        assert event.step == "server_ready" and event.reason
        assert event.reason.kind in (Kind.SPAWN, Kind.REFUSED) and "no node has 4 GB of memory" in event.reason.text
    first, *_ = names = sum(users, [])
    one_at_a_time = [[name] for name in names]  # as the largest batch
    assert list(hst.start_servers(one_at_a_time, hub.endpoint, session, failing, fail_fast=True)) == [first]
    started = hst.start_servers(users, hub.endpoint, session, {"fail_rate": 0.0}, rate_per_s=20.0)
    assert {name: event.reason for name, event in started.items()} == dict.fromkeys(names)
    due_s = sorted(event.due_s for event in started.values())
    assert [at_s - due_s[0] for at_s in due_s] == pytest.approx([0.0, 0.05, 0.1], abs=1e-6)
    assert all(user["servers"][""]["ready"] for name, user in hub.users().items() if name in started)
    assert hst.delete_users(names, hub.endpoint, session)
    assert not tool_users(hub)


def test_servers_are_waited_for_beside_one_that_hangs(make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(slow_spawn_timeout_s=0)
    session = hst.get_session(hub.token)
    names = sum(make(hub, session, 3), [])
    assert all(hst.start_server(name, hub.endpoint, session, {"hang_rate": float(name == names[0])}) for name in names)
    wait_until(lambda: all(hub.users()[name]["servers"][""]["ready"] for name in names[1:]))
    batches = [[name] for name in names]
    ready = hst.wait_for_servers_to_start(batches, hub.endpoint, session, timeout_s=5.0)
    assert ready == dict(zip(names, [False, True, True])) and hst.delete_users(names, hub.endpoint, session)


def test_a_start_whose_answer_was_lost_is_one(new_hub: LocalHub, proxy: FaultProxy) -> None:
    proxy.rule = first(1, matching("POST", "/server$"), AnswerAfter(503))
    session = hst.get_session(new_hub.token)
    ((name,),) = make(new_hub, session, 1)
    assert hst.start_server(name, proxy.endpoint, session)
    assert hst.delete_users([name], new_hub.endpoint, session) and not tool_users(new_hub)


def test_a_refused_batch_deletes_the_users_made_before_it(new_hub: LocalHub, proxy: FaultProxy) -> None:
    is_create = matching("POST", "/users$")
    answers = iter([None, hub_answer(500, b'{"status": 500, "message": "database is locked"}')])
    proxy.rule = lambda request: next(answers, None) if is_create(request) else None
    with pytest.raises(hst.HubRefused, match=r"make users: 500 \(database is locked\)"):
        hst.create_users(3, 1, proxy.endpoint, hst.get_session(new_hub.token))
    assert [entry.status for entry in proxy.requests if entry.path.endswith("/users")] == [201, 500]
    assert not tool_users(new_hub)


# ==== A whole run ====================================================================================================


def test_runs_return_the_results_as_json_and_write_files(new_hub: LocalHub, tmp_path: Path) -> None:
    where = (new_hub.token, new_hub.endpoint)
    more: dict[str, Any] = {"run": RUN, "hold_s": 1.0, "profile": "small", "keep": True}
    files = {name: str(tmp_path / name) for name in ("results", "report")}
    stress = hst.run_stress_test(2, 2, *where, **more, **files)
    assert (stress["servers"]["ready"], stress["servers"]["lost"], stress["users"]["kept"]) == (2, 0, 2)
    assert stress["operations"]["stay"]["count"] == 2 and stress["exit_code"] == 0
    assert [stress["options"][name] for name in ("run", "hold", "profile", "keep")] == [RUN, 1.0, "small", True]
    assert json.loads(Path(files["results"]).read_text()) == stress
    assert "<title>hub-stress-test: PASSED" in Path(files["report"]).read_text()
    options = [new_hub.users()[name]["servers"][""]["user_options"] for name in tool_users(new_hub)]
    assert options == [{"profile": "small"}] * 2
    activity = hst.notebook_activity_test(3, *where, 3, run=RUN)
    assert activity["operations"]["activity"]["count"] == 3 and activity["users"]["deleted"] == 1
    assert hst.purge_users(*where, run="another")["users"]["deleted"] == 0
    purge = hst.purge_users(*where, run=RUN)
    assert purge["users"]["deleted"] == 2 and not tool_users(new_hub)
    for found in (stress, activity, purge):
        check_schema(found)
        assert new_hub.token not in str(found)


@pytest.mark.parametrize(
    "broken",
    [
        *({"count": 0}, {"batch_size": 0}, {"endpoint": None}, {"endpoint": "hub"}, {"token": None}),
        *({"results": "/nowhere/r"}, {"samples": "s.txt"}, {"stay_s": 1.0, "keep": True}),
    ],
)
def test_the_functions_refuse_what_the_command_line_refuses(broken: dict[str, Any]) -> None:
    fine: dict[str, Any] = {"count": 1, "batch_size": 1, "token": "x", "endpoint": "http://hub.invalid/hub/api"}
    hst.validate(argparse.Namespace(command="stress-test", **fine))
    with pytest.raises(hst.UsageError):
        hst.validate(argparse.Namespace(command="stress-test", **fine | broken))
    if broken != {"token": None}:
        with pytest.raises(hst.UsageError):
            hst.run_stress_test(**fine | broken)


def test_a_dry_run_returns_the_plan() -> None:
    where = {"token": "s3cr3t", "endpoint": "http://hub.invalid/hub/api", "dry_run": True}
    stress, activity, purge = (
        hst.run_stress_test(5, 2, within_s=60.0, **where),
        hst.notebook_activity_test(5, workers=3, **where),
        hst.purge_users(**where),
    )
    assert [one["command"] for one in (stress, activity, purge)] == list(hst.COMMANDS)
    assert stress["options"]["count"] == 5 and f"(--seed {stress['options']['seed']})" in dict(stress["plan"])["people"]
    assert "5 requests" in dict(activity["plan"])["load"]
    assert ["hub", "http://hub.invalid/hub/api"] in purge["plan"]
    assert "s3cr3t" not in json.dumps([stress, activity, purge])


def test_the_token_for_visits_is_the_environments_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTERHUB_VISIT_TOKEN", "not a token")
    with pytest.raises(hst.UsageError, match="JUPYTERHUB_VISIT_TOKEN"):
        hst.run_stress_test(1, 1, "x", "http://hub.invalid/hub/api", dry_run=True, visit=True)


def test_a_session_of_a_dry_run_serves_the_functions() -> None:
    session, endpoint = hst.get_session("x", dry_run=True), "http://hub.invalid/hub/api"
    users = hst.create_users(3, 2, endpoint, session)
    names = sum(users, [])
    assert [event.reason for event in hst.start_servers(users, endpoint, session).values()] == [None] * 3
    assert hst.wait_for_servers_to_start(users, endpoint, session) == dict.fromkeys(names, True)
    hst.wait_for_servers_to_stop(stopped := hst.stop_servers(names, endpoint, session, 2), endpoint, session)
    assert len(hst.find_existing_stress_test_users(endpoint, session)) == 3
    assert hst.delete_users_after_stopping_servers(stopped, endpoint, session)
    assert not hst.find_existing_stress_test_users(endpoint, session)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1/hub/api", "http://hub.invalid/hub/api"])
def test_the_token_is_in_no_traceback_even_with_locals(endpoint: str) -> None:
    token = "s3cr3t-" + "t0k3n"
    session = hst.HubSession(token).clone(own_stop=True)
    commands: list[Callable[[], object]] = [
        functools.partial(hst.run_stress_test, 1, 1, token, endpoint),
        functools.partial(hst.purge_users, token, endpoint),
        functools.partial(hst.notebook_activity_test, 1, token, endpoint, 1),
        functools.partial(hst.create_users, 1, 1, endpoint, session),
    ]
    for command in commands:
        with pytest.raises(hst.HubStressError) as raised:
            command()
        within = raised.value.with_traceback(raised.tb.tb_next)  # without this test's own frame
        assert token not in "".join(traceback.TracebackException.from_exception(within, capture_locals=True).format())
