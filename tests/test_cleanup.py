"""Cleaning up: whatever a hub answers, it ends and touches only what is ours; the users that are left are named."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hub_stress_test as hst
from fault_proxy import AnswerAfter, Delay, FaultProxy, every, first, hub_answer, matching
from hub_stress_test import ServerState
from localhub import LocalHub
from made_up import ENDPOINT, MODELS, ErraticHub, TimeTraveller
from test_hub_setup import token_with
from tool import THEIR_ADMIN, THEIRS, results_in, run_for_results, run_tool, start_tool, tool_users, wait_until

OURS = [f"hub-stress-test-{n}" for n in range(1, 5)]
NOT_OURS = ["alice", "hub-stress-tester", "hub-stress-test-admin", "hub-stress-test-9", "hub-stress-test-x-1"]
STATES = st.sampled_from(sorted(MODELS, key=str))
THOUGHT = st.sampled_from([state for state in ServerState if state is not ServerState.GONE])  # the hub alone says so
STATUSES = st.sampled_from([200, 202, 204, 400, 403, 404, 429, 500, 502, 503])


def clean_up(thought: dict[str, ServerState], session: hst.HubSession) -> hst.Users:
    site = hst.Site(hst.Hub(ENDPOINT, session), hst.Plan(hst.PURGE, batch_size=1), hst.Recorder(), dict(thought))
    return hst.remove_users(site, set(OURS).__contains__)


def begin(session: hst.HubSession, method: str, url: str, wish: dict[str, float] | None = None) -> None:
    """Ask for something that takes longer than anybody waits."""
    assert session.ask(method, url, json=wish, call=hst.Call(once=True), timeout=0.5).call.lost


# ==== Hubs that are made up ==========================================================================================


@settings(max_examples=60, deadline=None)
@given(
    states=st.fixed_dictionaries({name: STATES for name in OURS}),
    theirs=st.fixed_dictionaries({name: STATES for name in NOT_OURS}),
    thought=st.fixed_dictionaries({name: THOUGHT for name in OURS + NOT_OURS}),
    statuses=st.lists(STATUSES, max_size=40),
    seed=st.integers(0, 1000),
)
def test_whatever_a_hub_answers_cleaning_up_ends_within_ours(
    states: dict[str, ServerState],
    theirs: dict[str, ServerState],
    thought: dict[str, ServerState],
    statuses: list[int],
    seed: int,
) -> None:
    erratic = ErraticHub(states | theirs, statuses, seed)
    cleaned = clean_up(thought, TimeTraveller(erratic))
    assert erratic.written_to <= set(OURS)
    assert erratic.states.keys() >= set(NOT_OURS)
    assert set(cleaned.left_behind) >= erratic.states.keys() & set(OURS)


@settings(max_examples=30, deadline=None)
@given(states=st.fixed_dictionaries({name: STATES for name in OURS}), seed=st.integers(0, 1000))
def test_a_hub_that_comes_to_its_senses_is_left_empty(states: dict[str, ServerState], seed: int) -> None:
    erratic = ErraticHub(states, [500, 502, 503, 400, 429] * 3, seed)
    cleaned = clean_up(dict.fromkeys(OURS, ServerState.READY), TimeTraveller(erratic))
    assert cleaned == hst.Users(deleted=4) and not erratic.states


@pytest.mark.parametrize("status", [400, 403, 429, 500, 502, 503])
def test_an_idle_hub_is_given_up_with_every_name(status: int) -> None:
    erratic = ErraticHub(dict.fromkeys(OURS, ServerState.READY), [status] * 100_000, seed=1, acts=0.0)
    session = TimeTraveller(erratic)
    cleaned = clean_up(dict.fromkeys(OURS, ServerState.READY), session)
    assert set(cleaned.left_behind) == set(OURS)
    assert session.clock() <= hst.CLEANUP_TIMEOUT_S + 300


class OneAtATime(ErraticHub):
    """A hub that deletes a user only when it was asked for the list meanwhile."""

    listed = True

    def _answer(self, method: str, name: str, *rest: str) -> tuple[int, Any]:
        if method == "DELETE" and not self.listed:
            return 500, None
        self.listed = method == "GET"
        return super()._answer(method, name, *rest)


class Slow(TimeTraveller):
    """A session whose pauses all take 200 s."""

    def pause(self, seconds: float) -> bool:
        return super().pause(200.0)


def test_cleaning_up_goes_on_while_there_is_progress() -> None:
    slow = OneAtATime(dict.fromkeys(OURS, ServerState.STOPPED), [], seed=1)
    session = Slow(slow)
    cleaned = clean_up(dict.fromkeys(OURS, ServerState.STOPPED), session)
    assert cleaned == hst.Users(deleted=4) and session.clock() > hst.CLEANUP_TIMEOUT_S


def test_a_long_round_in_which_servers_stopped_is_progress() -> None:
    class SlowStops(ErraticHub):
        def _answer(self, method: str, name: str, *rest: str) -> tuple[int, Any]:
            answer = super()._answer(method, name, *rest)
            if rest:
                session.paused_s.append(hst.CLEANUP_TIMEOUT_S)
            return (503, None) if rest else answer  # so that users are deleted in the next round

    session = TimeTraveller(SlowStops(dict.fromkeys(OURS, ServerState.READY), [], seed=1), retry_window_s=0.0)
    assert clean_up(dict.fromkeys(OURS, ServerState.READY), session) == hst.Users(deleted=4)


def test_users_whom_a_list_lacks_are_asked_for() -> None:
    """Others, who are deleted between two pages, have moved them to a page that was read before."""

    class Moving(ErraticHub):
        def _answer(self, method: str, name: str, *rest: str) -> tuple[int, Any]:
            if method == "GET":
                return (200, {"name": name, "servers": MODELS[self.states[name]]}) if name else (200, [])
            return super()._answer(method, name, *rest)

    moving = Moving(dict.fromkeys(OURS, ServerState.STOPPED), [500] * 100_000, seed=1, acts=0.0)
    cleaned = clean_up(dict.fromkeys(OURS, ServerState.STOPPED), TimeTraveller(moving))
    assert set(cleaned.left_behind) == set(OURS)


def test_without_threads_a_stop_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise hst.CutShort("no more threads")

    def stop(*args: object) -> None:
        raise hst.Stopped

    monkeypatch.setattr(hst, "start_thread", refuse)
    session = TimeTraveller(ErraticHub(dict.fromkeys(OURS, ServerState.STOPPED), [], seed=1))
    assert clean_up(dict.fromkeys(OURS, ServerState.STOPPED), session) == hst.Users(deleted=4)
    monkeypatch.setattr(hst, "take", stop)
    session = TimeTraveller(ErraticHub(dict.fromkeys(OURS, ServerState.STOPPED), [500] * 10, seed=1))
    assert set(clean_up(dict.fromkeys(OURS, ServerState.STOPPED), session).left_behind) == set(OURS)


# ==== Claims =========================================================================================================


def test_unconfirmed_names_are_spared_when_another_run_is_about() -> None:
    claims = hst.Claims()
    claims.ask(["hub-stress-test-1", "hub-stress-test-2"])
    claims.settle(["hub-stress-test-1"], ["hub-stress-test-1"])
    assert claims.ours == ["hub-stress-test-1", "hub-stress-test-2"]
    claims.rivals = True
    assert claims.ours == ["hub-stress-test-1"]


def test_users_made_after_a_lost_answer_are_removed_too(new_hub: LocalHub, proxy: FaultProxy) -> None:
    session, record, claims = hst.get_session(new_hub.token), hst.Recorder(), hst.Claims()
    hub = hst.Hub(proxy.endpoint, session)
    proxy.rule = first(1, matching("POST", "/users$"), AnswerAfter(502))
    assert list(hst.make_users(3, 3, hub, record, claims, [], "")) == [OURS[:3]]
    claims.ask(OURS[3:])
    proxy.rule = first(1, matching("POST", "/users$"), Delay(1))
    body = {"usernames": OURS[3:]}
    assert session.ask("POST", hub.endpoint + "/users", json=body, timeout=0.3, call=hst.Call(once=True)).call.lost
    states = dict.fromkeys(claims.confirmed, ServerState.STOPPED) | {OURS[3]: ServerState.UNKNOWN}
    session.pause(hst.LATE_ACT_S)
    cleaned = hst.remove_users(hst.Site(hub, hst.Plan(), record, states), set(claims.ours).__contains__)
    assert cleaned.left_behind == () and not tool_users(new_hub)


# ==== Kept users, and purge ==========================================================================================


def test_as_many_users_are_kept_as_asked_with_servers(hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "5", "-b", "2", "--keep", hub=hub)
    assert done.code == 0 and "5 users kept, as asked; remove them with: hub-stress-test purge" in done.summary
    kept, users = tool_users(hub), hub.users()
    assert len(kept) == 5 and all(users[name]["servers"][""]["ready"] for name in kept)
    done = run_tool("purge", hub=hub)
    assert done.code == 0 and "5 users removed" in done.summary
    assert not tool_users(hub)


def test_activity_uses_kept_users_and_deletes_only_its_own(new_hub: LocalHub) -> None:
    assert run_tool("activity-stress-test", "-c", "2", "--keep", hub=new_hub).code == 0
    users, kept = new_hub.users(), {"hub-stress-test-1", "hub-stress-test-2"}
    assert tool_users(new_hub) == kept
    assert all(users[name]["last_activity"] and not users[name]["servers"] for name in kept)
    new_hub.call("POST", "/users", {"usernames": ["hub-stress-test-5", "hub-stress-test-a-9"]})
    done = run_tool("activity-stress-test", "-c", "6", "--workers", "6", hub=new_hub)
    assert done.code == 0 and "6 of 6 activity reports were accepted" in done.summary
    assert "3 users deleted, none left" in done.summary
    assert tool_users(new_hub) == kept | {"hub-stress-test-5", "hub-stress-test-a-9"}
    assert run_tool("purge", hub=new_hub).code == 0


def test_several_pages_of_users_are_purged_and_nobody_else(new_hub: LocalHub) -> None:
    names = [f"hub-stress-test-{n}" for n in range(1, hst.PAGE + 6)]
    assert new_hub.call("POST", "/users", {"usernames": names})[0] == 201
    theirs = {name: user for name, user in new_hub.users().items() if name not in names}
    done = run_tool("purge", "--batch-size", "20", hub=new_hub)
    assert done.code == 0 and f"{len(names)} users removed" in done.summary
    after = new_hub.users()
    assert after.keys() == theirs.keys() >= THEIRS and after[THEIR_ADMIN]["admin"]
    assert {n: u["last_activity"] for n, u in after.items()} == {n: u["last_activity"] for n, u in theirs.items()}


def test_a_run_and_its_purge_leave_the_names_of_others(new_hub: LocalHub) -> None:
    ones, others = {"hub-stress-test-1", "hub-stress-test-3"}, {"hub-stress-test-a-1", "hub-stress-test-a-1-1"}
    new_hub.call("POST", "/users", {"usernames": sorted(ones | others)})
    assert run_tool("stress-test", "-c", "2", hub=new_hub).code == 0
    assert tool_users(new_hub) == ones | others
    assert run_tool("purge", "--run", "a", hub=new_hub).code == 0
    assert tool_users(new_hub) == ones | {"hub-stress-test-a-1-1"}
    assert run_tool("--run", "a-1", "purge", hub=new_hub).code == 0
    assert tool_users(new_hub) == ones
    assert run_tool("purge", hub=new_hub).code == 0


def test_a_purge_removes_users_whose_servers_are_in_any_state(new_hub: LocalHub) -> None:
    new_hub.call("POST", "/users", {"usernames": OURS})
    session = hst.get_session(new_hub.token)
    hub = hst.Hub(new_hub.endpoint, session)
    servers = [hst.user_url(hub.endpoint, name, "server") for name in OURS]
    assert hub.start(OURS[0], None, session.clock() + 20).status == 201
    assert hub.start(OURS[1], {"stop_s": 8.0}, session.clock() + 20).status == 201
    begin(session, "DELETE", servers[1])
    begin(session, "POST", servers[2], {"hang_rate": 1.0})
    states = [ServerState.READY, ServerState.STOPPING, ServerState.STARTING, ServerState.STOPPED]
    assert [hub.state(name) for name in OURS] == states
    done = run_tool("purge", hub=new_hub)
    assert done.code == 0 and "4 users removed" in done.summary
    assert not tool_users(new_hub)


def test_servers_that_a_restarted_hub_looks_for_are_not_ready(
    make_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    local = make_hub(
        servers_outlive=True,
        http_timeout_s=10.0,
        slow_spawn_timeout_s=0,
        hang_rate=1.0,
        database=str(tmp_path / "hub.sqlite"),
    )
    session = hst.get_session(local.token)
    hub, until_s = hst.Hub(local.endpoint, session), session.clock() + 60
    assert hub.create(OURS).status == 201
    assert [hub.start(name, None, until_s).status for name in OURS] == [202] * 4
    local.restart()
    assert local.users()[OURS[0]]["servers"][""]["pending"] == "check"
    with start_tool("purge", hub=local) as run:
        for name in OURS:
            with pytest.raises(hst.Failed, match="it vanished while starting"):
                hst.await_ready(name, hub, until_s, [])
        done = run.outcome()
    assert done.code == 0 and "4 users removed" in done.summary and not tool_users(local)
    assert "pending check" not in local.log()  # it was not asked to stop what it looks for


# ==== Runs at the same time ==========================================================================================


def test_parallel_runs_of_different_names_never_touch_each_others_users(new_hub: LocalHub) -> None:
    theirs = {"hub-stress-test-a-1", "hub-stress-test-1"}
    new_hub.call("POST", "/users", {"usernames": sorted(theirs)})
    words = ("stress-test", "-c", "6", "-b", "3", "--run")
    with start_tool(*words, "a", hub=new_hub) as one, start_tool(*words, "b", hub=new_hub) as other:
        ends = [one.outcome(), other.outcome()]
    for done in ends:
        assert done.code == 0, done
        assert "6 of 6 servers became ready" in done.summary and "6 users deleted, none left" in done.summary
    assert tool_users(new_hub) == theirs
    assert run_tool("purge", hub=new_hub).code == 0


def test_two_runs_of_one_name_keep_to_their_own(new_hub: LocalHub) -> None:
    words = ("stress-test", "-c", "15", "-b", "5")
    with start_tool(*words, hub=new_hub) as one, start_tool(*words, hub=new_hub) as other:
        ends = [one.outcome(), other.outcome()]
    for done in ends:  # the one that is always a moment later ends, and says why
        finished = done.code == 0 and "15 of 15 servers became ready" in done.summary
        assert finished or "two requests in a row made no user (409" in done.summary, done
    assert any(done.code == 0 for done in ends) and not tool_users(new_hub)


# ==== What the hub does not know =====================================================================================


@pytest.mark.parametrize(("command", "hub"), [("stress-test", "new_hub"), ("purge", "old_hub")], indirect=["hub"])
def test_servers_that_the_hub_failed_to_stop_are_counted_once(command: str, hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "3", "--run", "ci", "--profile", '{"stop_fails": true}')
    if command == "purge":
        assert run_tool(*words, "--keep", hub=hub).code == 0
        words = ("purge",)
    done, results = run_for_results(tmp_path / "r", *words, hub=hub)
    assert done.code == 4 and results["users"]["stops_failed"] == 3 and not tool_users(hub)
    assert "none left on the hub the hub failed to stop 3 servers during this run" in done.summary
    pods = "hub-(2d)?stress-(2d)?test" + "-(2d)?ci" * (command == "stress-test")
    assert f"kubectl get pods,pvc -n NAMESPACE | grep -E '{pods}'" in done.summary
    done, results = run_for_results(tmp_path / "next", "purge", hub=hub)
    assert (done.code, results["users"]["stops_failed"]) == (0, 0)


def test_without_its_scope_the_hubs_figures_are_unknown(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "2", "--profile", '{"stop_fails": true}')
    env = {"JUPYTERHUB_API_TOKEN": token_with(new_hub, "admin:users", "servers")}
    done, results = run_for_results(tmp_path / "r", *words, hub=new_hub, env=env)
    assert (done.code, results["users"]["stops_failed"]) == (0, None)
    missing = {"metrics": None, "restarts": None, "metrics_missing": hst.NO_METRICS_SCOPE}
    assert results["hub"] == results["hub"] | missing
    assert "only the hub's own figures tell whether it could stop the servers" in done.summary
    assert done.summary.count("read:metrics") == 1 and "CPU, memory, event-loop lag" in done.summary


@pytest.mark.parametrize("how", ["time-out", "SIGINT", "purge"])
def test_servers_stopped_while_starting_may_leave_traces(how: str, new_hub: LocalHub, tmp_path: Path) -> None:
    hub, results = new_hub, tmp_path / "r"
    words = (
        "stress-test",
        "-c",
        "3",
        "--server-timeout",
        "5s" if how == "time-out" else "60s",
        "-p",
        '{"hang_rate": 1}',
    )
    with start_tool(*words, "--results", str(results), *["--keep"] * (how == "purge"), hub=hub) as run:
        if how != "time-out":
            wait_until(lambda: sum(bool(user["servers"]) for user in hub.users().values()) == 3)
            run.send_signal(signal.SIGINT)
        done = run.outcome()
    if how == "purge":
        done = run_tool("purge", "--results", str(results), hub=hub)
    assert results_in(results, done)["users"]["stopped_while_starting"] == 3 and not tool_users(hub)
    assert "none left on the hub 3 servers were stopped while they were still starting: see squeue" in done.summary


def test_ready_servers_are_stopped_before_starting_ones(new_hub: LocalHub) -> None:
    session, record = hst.get_session(new_hub.token), hst.new_recorder()
    hub, until_s = hst.Hub(new_hub.endpoint, session), session.clock() + 60
    assert hub.create(OURS).status == 201
    for name in OURS[:2]:
        begin(session, "POST", hub.server_url(name), {"hang_rate": 1})
    assert [hub.start(name, None, until_s).status for name in OURS[2:]] == [201, 201]
    site = hst.Site(hub, hst.Plan(hst.PURGE, batch_size=1), record, {name: hub.state(name) for name in OURS})
    hst.remove_users(site, set(OURS).__contains__)
    stops = sorted((steps["stop_server"].sent_s, name) for name, steps in record.people.items())
    assert [name for _, name in stops] == [*OURS[2:], *OURS[:2]] and site.interrupted == set(OURS[:2])


# ==== What cannot be removed =========================================================================================


def test_users_that_stay_are_named_with_the_command_for_them(new_hub: LocalHub, proxy: FaultProxy) -> None:
    stubborn = {"hub-stress-test-ci-2", "hub-stress-test-ci-3"}
    locked = hub_answer(500, b'{"message": "database is locked"}')
    proxy.rule = every(matching("DELETE", "/users/hub-stress-test-ci-[23]$"), locked)
    words = ("stress-test", "-c", "4", "--run", "ci", "--cleanup-timeout", "3s")
    done = run_tool(*words, hub=new_hub, proxy=proxy)
    assert done.code == 4 and done.summary.startswith("LEFT SOMETHING BEHIND: ")
    assert "2 users deleted; 2 ARE STILL THERE: hub-stress-test-ci-2 hub-stress-test-ci-3" in done.summary
    assert "the hub fails to delete users (500): database is locked when that is solved, remove" in done.summary
    assert "remove them with: hub-stress-test purge --run ci" in done.summary
    assert tool_users(new_hub) == stubborn
    assert run_tool("purge", "--run", "ci", hub=new_hub).code == 0
    assert not tool_users(new_hub)


def test_servers_that_do_not_stop_are_named_as_the_cause(make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(stop_s=60, slow_stop_timeout_s=0.1)
    done = run_tool("stress-test", "-c", "2", "--cleanup-timeout", "3s", hub=hub)
    assert done.code == 4 and "2 ARE STILL THERE" in done.summary and len(tool_users(hub)) == 2
    reason = r"the hub has been stopping servers for \d+\.\d+ s"
    assert re.search(f"{reason} when that is solved, remove them with: hub-stress-test purge", done.summary)
