"""The functions that the seeds document, used as a library on real hubs."""

from __future__ import annotations

import argparse
import logging

import pytest
from conftest import tool_users
from fault_proxy import Answer, FaultProxy, matching
from localhub import LocalHub

import hub_stress_test as hst

RUN = "lib"


def make(hub: LocalHub, session: hst.HubSession, count: int) -> list[list[str]]:
    return hst.create_users(count, 2, hub.endpoint, session, run=RUN)


def test_users_are_made_in_batches_and_found_again(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    users = make(hub, session, 5)
    assert [len(batch) for batch in users] == [2, 2, 1]
    found = hst.find_existing_stress_test_users(hub.endpoint, session)
    assert [user["name"] for user in found] == [name for batch in users for name in batch]
    more = hst.create_users(1, 1, hub.endpoint, session, found, run=RUN)
    assert more == [["hub-stress-test-lib-6"]]
    assert hst.delete_users([user["name"] for user in found] + more[0], hub.endpoint, session)


def test_servers_are_started_waited_for_stopped_and_their_users_deleted(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    users = make(hub, session, 4)
    names = [name for batch in users for name in batch]
    for name in names[:3]:
        assert hst.start_server(name, hub.endpoint, session, profile="small")
    assert not hst.start_server("hub-stress-test-lib-99", hub.endpoint, session)
    ready = hst.wait_for_servers_to_start(users, hub.endpoint, session)
    assert ready == dict(zip(names, [True, True, True, False]))
    assert hst.stop_server(names[0], hub.endpoint, session, wait=True)
    stopped = hst.stop_servers(names, hub.endpoint, session, 2)
    assert stopped == dict.fromkeys(names, True)
    hst.wait_for_servers_to_stop(stopped, hub.endpoint, session)
    assert stopped == dict.fromkeys(names, True)
    assert not any(hub.users()[name]["servers"] for name in names)
    assert not hst.delete_users_after_stopping_servers(stopped | {names[0]: False}, hub.endpoint, session)
    assert tool_users(hub) == {names[0]}
    assert hst.delete_users_after_stopping_servers({names[0]: True}, hub.endpoint, session)
    assert hst.wait_for_server_to_stop(names[0], hub.endpoint, session)  # a user that is gone has no server


def test_start_servers_tells_what_became_of_each(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    users = make(hub, session, 3)
    starts = hst.start_servers(users, hub.endpoint, session, {"fail_rate": 1.0})
    assert [start.ready for start in starts.values()] == [False] * 3
    assert {start.reason for start in starts.values()} == {"no node has 4 GB of memory free"}
    assert hst.delete_users(list(starts), hub.endpoint, session)


def test_running_without_a_command_line_gives_the_results(hub: LocalHub) -> None:
    found = hst.run_stress_test(2, 2, hub.token, hub.endpoint, keep=True)
    assert (found["servers"]["ready"], found["users"]["kept"], found["exit_code"]) == (2, 2, 0)
    activity = hst.notebook_activity_test(3, hub.token, hub.endpoint, 3)
    assert activity["operations"]["activity"]["count"] == 3 and activity["users"]["deleted"] == 1
    assert hst.purge_users(hub.token, hub.endpoint)["users"]["deleted"] == 2
    assert not tool_users(hub)


def test_a_refused_batch_deletes_what_was_made_before_it(new_hub: LocalHub) -> None:
    session = hst.get_session(new_hub.token)
    is_create = matching("POST", "/users$")
    answers = iter([None, Answer(500, b'{"status": 500, "message": "database is locked"}')])
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = lambda request: next(answers, None) if is_create(request) else None
        with pytest.raises(hst.HubRefused, match="would not make users: 500 .database is locked"):
            hst.create_users(3, 1, proxy.url + "/hub/api", session)
        assert [e.status for e in proxy.requests if e.path.endswith("/users")] == [201, 500]
    assert not tool_users(new_hub)


def test_timeit_logs_how_long_even_when_the_function_raises(caplog: pytest.LogCaptureFixture) -> None:
    @hst.timeit
    def fails() -> None:
        raise KeyError("x")

    with caplog.at_level(logging.INFO, hst.LOG.name), pytest.raises(KeyError):
        fails()
    assert "seconds to fails" in caplog.text


def test_validate_takes_what_can_be_used_and_refuses_the_rest() -> None:
    fine = {"command": "stress-test", "count": 1, "batch_size": 1, "token": "x", "endpoint": "http://x/hub/api"}
    hst.validate(argparse.Namespace(**fine))
    for broken in ({"count": 0}, {"batch_size": 0}, {"token": None}, {"endpoint": None}):
        with pytest.raises(hst.UsageError):
            hst.validate(argparse.Namespace(**fine | broken))
