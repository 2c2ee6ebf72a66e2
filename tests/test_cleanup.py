"""Cleaning up, against hubs that hypothesis makes up: whatever they answer, it ends and touches only what is ours."""

from __future__ import annotations

import functools
import json
import random
import traceback
import urllib.parse
from typing import Any

import pytest
import requests
from conftest import run_tool, tool_users
from fault_proxy import AnswerAfter, Delay, FaultProxy, first, matching
from hypothesis import given, settings
from hypothesis import strategies as st
from localhub import LocalHub

import hub_stress_test as hst
from hub_stress_test import ServerState

OURS = [f"hub-stress-test-{n}" for n in range(1, 5)]
THEIRS = ["alice", "hub-stress-tester", "hub-stress-test-admin", "hub-stress-test-9", "hub-stress-test-x-1"]
MODELS = {
    ServerState.STOPPED: {},
    ServerState.STARTING: {"": {"pending": "spawn", "ready": False}},
    ServerState.READY: {"": {"pending": None, "ready": True}},
    ServerState.STOPPING: {"": {"pending": "stop", "ready": False}},
}
STATES = st.sampled_from(sorted(MODELS, key=str))
STATUSES = st.sampled_from([200, 202, 204, 400, 403, 404, 429, 500, 502, 503])


class MadeUpHub(requests.adapters.BaseAdapter):
    """Users in any state; each request is answered out of `statuses`, and acted on or not, as it comes."""

    def __init__(self, states: dict[str, ServerState], statuses: list[int], seed: int) -> None:
        super().__init__()
        self.states = dict(states)
        self.written_to: set[str] = set()
        self._statuses = list(statuses)
        self._rng = random.Random(seed)

    def close(self) -> None:
        pass

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        response = requests.Response()
        response.request, response.url = request, request.url or ""
        path = urllib.parse.urlsplit(response.url).path.removeprefix("/hub/api/users").strip("/").split("/")
        response.status_code, data = self._answer(request.method or "", *path)
        response._content = json.dumps(data).encode()
        return response

    def _answer(self, method: str, name: str, *rest: str) -> tuple[int, Any]:
        self._drift()
        honest = not self._statuses
        status = 200 if honest else self._statuses.pop()
        if method == "GET":
            models = [{"name": n, "admin": False, "servers": MODELS[s]} for n, s in self.states.items()]
            return status, models if status == 200 else None
        self.written_to.add(name)
        state = self.states.get(name)
        if state is None:
            return 404, None
        if honest or self._rng.random() < 0.5:  # it acts, whatever it then answers
            if rest and state is not ServerState.STARTING:
                self.states[name] = ServerState.STOPPED
            elif not rest and state is ServerState.STOPPED:
                del self.states[name]
            elif honest:
                return 500, None
            return (204 if honest else status), None
        return (status if status not in (204, 404) else 500), None

    def _drift(self) -> None:
        """Servers go on by themselves: what starts becomes ready or fails, what stops has stopped."""
        for name, state in list(self.states.items()):
            if state is ServerState.STARTING and self._rng.random() < 0.3:
                self.states[name] = self._rng.choice([ServerState.READY, ServerState.STOPPED])
            if state is ServerState.STOPPING and self._rng.random() < 0.3:
                self.states[name] = ServerState.STOPPED


class TimeTraveller(hst.HubSession):
    """A session whose pauses take no time but move its clock."""

    def __init__(self, hub: MadeUpHub) -> None:
        super().__init__("x", hub)
        self._now_s = 0.0
        self.clock = lambda: self._now_s
        self.answered_s = 0.0

    def pause(self, seconds: float) -> bool:
        self._now_s += seconds
        return not self.stopping.is_set()


@settings(max_examples=60, deadline=None)
@given(
    states=st.fixed_dictionaries({name: STATES for name in OURS}),
    theirs=st.fixed_dictionaries({name: STATES for name in THEIRS}),
    thought=st.fixed_dictionaries({name: st.sampled_from(sorted(ServerState, key=str)) for name in OURS + THEIRS}),
    statuses=st.lists(STATUSES, max_size=40),
    seed=st.integers(0, 1000),
)
def test_whatever_a_hub_answers_cleaning_up_ends_and_writes_only_to_ours(
    states: dict[str, ServerState],
    theirs: dict[str, ServerState],
    thought: dict[str, ServerState],
    statuses: list[int],
    seed: int,
) -> None:
    hub = MadeUpHub(states | theirs, statuses, seed)
    cleaned = hst.remove_users(thought, set(OURS).__contains__, "http://x/hub/api", TimeTraveller(hub), 1)
    assert hub.written_to <= set(OURS)
    assert hub.states.keys() >= set(THEIRS)
    assert set(cleaned.left) >= hub.states.keys() & set(OURS)


@settings(max_examples=30, deadline=None)
@given(states=st.fixed_dictionaries({name: STATES for name in OURS}), seed=st.integers(0, 1000))
def test_a_hub_that_comes_to_its_senses_is_left_empty(states: dict[str, ServerState], seed: int) -> None:
    hub = MadeUpHub(states, [500, 502, 503, 400, 429] * 3, seed)
    thought = dict.fromkeys(OURS, ServerState.READY)
    cleaned = hst.remove_users(thought, set(OURS).__contains__, "http://x/hub/api", TimeTraveller(hub), 1)
    assert cleaned == hst.CleanUp(deleted=4) and not hub.states


@settings(max_examples=30, deadline=None)
@given(status=st.sampled_from([400, 403, 429, 500, 502, 503]), seed=st.integers(0, 1000))
def test_a_hub_that_never_does_anything_is_given_up_with_every_name(status: int, seed: int) -> None:
    hub = MadeUpHub(dict.fromkeys(OURS, ServerState.READY), [status] * 100_000, seed)
    hub._rng.random = lambda: 1.0  # type: ignore[method-assign]  # it never acts
    session = TimeTraveller(hub)
    cleaned = hst.remove_users(
        dict.fromkeys(OURS, ServerState.READY), set(OURS).__contains__, "http://x/hub/api", session, 1
    )
    assert set(cleaned.left) == set(OURS)
    assert session.clock() <= hst.CLEANUP_TIMEOUT_S + 300


def test_users_that_the_hub_makes_after_its_answer_was_given_up_are_removed_too(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        endpoint = proxy.url + "/hub/api"
        session, claims = hst.get_session(new_hub.token), hst.Claims()
        proxy.rule = first(1, matching("POST", "/users$"), AnswerAfter(502))
        assert hst.create_users(3, 3, endpoint, session, claims=claims) == [OURS[:3]]
        late = hst.Call(retry_until_s=0)
        claims.ask(["hub-stress-test-4"])
        proxy.rule = first(1, matching("POST", "/users$"), Delay(1))
        body = {"usernames": ["hub-stress-test-4"]}
        assert session.ask("POST", endpoint + "/users", json=body, timeout=0.3, call=late).lost
        states = dict.fromkeys(claims.confirmed, ServerState.STOPPED) | {"hub-stress-test-4": ServerState.UNKNOWN}
        session.pause(hst.LATE_S)
        cleaned = hst.remove_users(states, set(claims.ours).__contains__, endpoint, session, 2)
    assert cleaned.left == () and not tool_users(new_hub)


def test_names_whose_making_was_not_confirmed_are_not_deleted_when_another_run_is_about() -> None:
    claims = hst.Claims()
    claims.ask(["hub-stress-test-1", "hub-stress-test-2"])
    claims.settle(["hub-stress-test-1"], ["hub-stress-test-1"])
    assert claims.ours == ["hub-stress-test-1", "hub-stress-test-2"]
    claims.rivals = True
    assert claims.ours == ["hub-stress-test-1"]


def test_an_admin_of_our_naming_is_never_touched(hub: LocalHub) -> None:
    assert run_tool("purge", hub=hub).code == 0
    assert hub.users()["hub-stress-test-400"]["admin"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1/hub/api", "http://hub.invalid/hub/api"])
def test_the_token_is_in_no_traceback_even_with_locals(endpoint: str) -> None:
    token = "s3cr3t-" + "t0k3n"
    session = hst.HubSession(token, retry_window_s=0)
    commands: list[functools.partial[Any]] = [
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


def test_fifty_starts_at_a_time_get_through_a_hub_that_lets_five() -> None:
    with LocalHub(concurrent_spawn_limit=5, spawn_s=0.2, slow_spawn_timeout_s=0) as hub:
        done = run_tool("stress-test", "-c", "60", "-b", "50", hub=hub)
        assert done.code == 0 and "60 ready, 0 failed" in done.stdout and "were throttled" in done.stdout
        assert not tool_users(hub)
