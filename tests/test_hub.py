"""The hub as the tool sees it: what answers mean, the transport, lost answers, pages, the simulated hub."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

import hub_stress_test as hst
from fault_proxy import (
    Answer,
    AnswerAfter,
    Fault,
    FaultProxy,
    HalfBody,
    Request,
    ResetAfter,
    ResetBefore,
    Silence,
    every,
    first,
    hub_answer,
    matching,
)
from hub_stress_test import ServerState
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, TimeTraveller
from tool import run_tool, tool_users

NAME = "hub-stress-test-1"


@pytest.fixture
def endpoint(proxy: FaultProxy) -> str:
    return proxy.endpoint


# ==== What answers mean ==============================================================================================


@pytest.mark.parametrize(
    ("model", "state"),
    [
        ({"servers": {}}, ServerState.STOPPED),
        ({"servers": None}, ServerState.STOPPED),
        ({"servers": {"": {"pending": "spawn", "ready": False}}}, ServerState.STARTING),
        ({"servers": {"": {"pending": None, "ready": True}}}, ServerState.READY),
        ({"servers": {"": {"pending": "stop", "ready": False}}}, ServerState.STOPPING),
        ({"servers": {"": {"pending": None, "ready": False, "stopped": True}}}, ServerState.STOPPED),
        ({"servers": {"": {"pending": "check", "ready": False, "stopped": False}}}, ServerState.UNKNOWN),
        ({"servers": {"": {"pending": "rename", "ready": False}}}, ServerState.UNKNOWN),
        ({"servers": {"": {"pending": None, "ready": False}}}, ServerState.STOPPED),
        ({"servers": {"named": {"pending": None, "ready": True}}}, ServerState.STOPPED),
        ({"name": "a token without read:servers sees no servers"}, ServerState.UNKNOWN),
    ],
)
def test_a_user_model_tells_the_state_of_the_server(model: dict[str, Any], state: ServerState) -> None:
    assert hst.server_state(model) is state


@pytest.mark.parametrize("status", [0, 400, 403, 429, 500, 502, 503])
def test_a_stop_or_delete_that_was_not_done_leaves_the_state_unknown(status: int) -> None:
    assert hst.state_after_stop(status) is ServerState.UNKNOWN
    assert hst.state_after_delete(status) is ServerState.UNKNOWN


def test_a_stop_or_delete_that_was_done_tells_the_state() -> None:
    stops = {204: ServerState.STOPPED, 202: ServerState.STOPPING, 404: ServerState.GONE}
    assert {status: hst.state_after_stop(status) for status in stops} == stops
    assert {hst.state_after_delete(status) for status in (204, 404)} == {ServerState.GONE}


def test_a_404_that_is_not_the_hubs_says_nothing_of_a_user(proxy: FaultProxy, endpoint: str, new_hub: LocalHub) -> None:
    """A proxy in front of a hub that is away answers 404 with a page of its own."""
    hub = hst.Hub(endpoint, hst.get_session(new_hub.token))
    assert hub.state("nobody") is ServerState.GONE
    proxy.rule = every(matching("GET", "/users/alice"), Answer(404, b"<html>", {"Content-Type": "text/html"}))
    assert hub.state("alice") is ServerState.UNKNOWN


def test_scopes_limited_to_some_users_do_not_count() -> None:
    assert hst.missing_scopes(["servers", "delete:users!user=x"], {"servers", "delete:users"}) == ["delete:users"]
    assert hst.missing_scopes(["start:servers"], {"servers"}) == []


@pytest.mark.parametrize(
    ("endpoint", "location", "guess"),
    [
        ("https://hub.example.org", None, "https://hub.example.org/hub/api"),
        ("https://hub.example.org/hub", None, "https://hub.example.org/hub/api"),
        ("https://example.org/jupyter", None, "https://example.org/jupyter/hub/api"),
        ("http://hub.example.org/hub/api", "https://hub.example.org/hub/api/", "https://hub.example.org/hub/api"),
        ("http://hub.example.org/hub/api", "/login", "http://hub.example.org/hub/api"),
    ],
)
def test_a_likely_endpoint_is_recognised(endpoint: str, location: str | None, guess: str) -> None:
    assert hst.likely_endpoint(endpoint, location) == guess


@pytest.mark.parametrize("status", [200, 201, 302, 401, 403, 404, 429, 500, 502, 521])
def test_only_an_answer_with_the_hubs_version_is_the_hubs(status: int, proxy: FaultProxy, endpoint: str) -> None:
    session = hst.HubSession("x").clone(own_stop=True)
    assert session.ask("GET", endpoint + "/").status == 200
    proxy.rule = every(matching(None, "users"), Answer(status, b"{}", {"Server": "nginx/1.22"}))
    reply = session.ask("POST", endpoint + "/users", json={})
    assert (reply.status, reply.front, reply.lost) == (0, status, True)
    assert reply.message == f"something in front of the hub (nginx/1.22) answered {status}"
    assert reply.event("x").reason == hst.Reason(hst.Kind.IN_FRONT, reply.message)
    proxy.rule = every(matching(None, "users"), hub_answer(status, b"{}"))
    reply = session.ask("POST", endpoint + "/users", json={})
    assert (reply.status, reply.front, reply.lost) == (status, 0, False)


@pytest.mark.parametrize(("status", "lost"), [(201, False), (403, False), (500, False), (502, True), (503, True)])
def test_where_the_version_is_stripped_only_gateway_errors_are_lost(
    status: int, lost: bool, proxy: FaultProxy, endpoint: str
) -> None:
    session = hst.HubSession("x").clone(own_stop=True)
    session.marked = False
    proxy.rule = every(matching(None, "users"), Answer(status, b"{}"))
    assert session.ask("POST", endpoint + "/users", json={}).lost is lost


@pytest.mark.parametrize(
    ("fault", "said", "kind", "lost"),
    [
        (hub_answer(500, b'{"message": "database is locked"}'), "500 (database is locked)", hst.Kind.REFUSED, False),
        (Answer(418, b""), "418", hst.Kind.REFUSED, False),
        (
            Answer(500, b"<html>", {"Content-Type": "text/html; charset=x"}),
            "500 (not JSON but text/html)",
            hst.Kind.REFUSED,
            False,
        ),
        (ResetBefore(), "connection reset", hst.Kind.NO_ANSWER, True),
        (HalfBody(), "the answer broke off", hst.Kind.NO_ANSWER, True),
        (Silence(), "no answer in time", hst.Kind.NO_ANSWER, True),
    ],
    ids=str,
)
def test_a_reply_says_in_a_few_words_what_came_or_why_nothing_came(
    fault: Fault, said: str, kind: hst.Kind, lost: bool, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = every(matching("GET", "/users"), fault)
    reply = hst.get_session(new_hub.token).ask("GET", endpoint + "/users", call=hst.once(), timeout=1)
    assert (str(reply), reply.lost) == (said, lost)
    event = reply.event("list_users")
    assert event.reason and event.reason.kind is kind


# ==== The transport: retries, time-outs, redirects, cookies, settings ================================================


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("fault", [Answer(429), Answer(503), Answer(504), ResetBefore()], ids=str)
def test_a_request_is_retried_whatever_its_method_and_the_retry_is_counted(
    method: str, fault: Fault, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(1, matching(method, "nobody"), fault)
    session = hst.get_session(new_hub.token, pool_maxsize=7)
    response = session.request(method, endpoint + "/users/nobody/activity", json={})
    assert response.status_code in (404, 405)
    assert len(proxy.requests) == 2
    assert (session.traffic.counts["retries"], session.traffic.counts["requests"]) == (1, 2)


def test_a_request_is_tried_six_times_with_a_back_off_that_doubles(proxy: FaultProxy, endpoint: str) -> None:
    proxy.rule = every(matching("GET", "nobody"), Answer(503))
    session = TimeTraveller()
    assert session.get(endpoint + "/users/nobody").status_code == 503
    assert (len(proxy.requests), session.paused_s) == (6, [0, 1, 2, 4, 8])


def test_no_back_off_outlasts_the_window_for_retries(proxy: FaultProxy, endpoint: str) -> None:
    proxy.rule = every(matching("GET", "nobody"), Answer(503, b"", {"Retry-After": "50"}))
    session = TimeTraveller(retry_window_s=2.0)
    assert session.get(endpoint + "/users/nobody").status_code == 503
    assert (len(proxy.requests), session.paused_s) == (2, [2.0])


def test_the_time_that_the_hub_asks_for_is_slept_and_is_not_latency(
    proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(1, matching("GET", "users"), Answer(429, b"", {"Retry-After": "7"}))
    session = TimeTraveller(token=new_hub.token)  # on whose clock only pauses take time
    listed = session.ask("GET", endpoint + "/users").event("list_users")
    assert (listed.reason, listed.tries, listed.backoff_s, listed.latency_s) == (None, 2, 7.0, 0.0)
    assert session.traffic.summarise().statuses == {"200": 1, "429": 1}


def test_a_stop_ends_a_back_off_at_once_and_nothing_more_is_sent(proxy: FaultProxy, endpoint: str) -> None:
    proxy.rule = every(matching("GET", "users"), Answer(429, b"", {"Retry-After": "100"}))
    session = hst.HubSession("x")
    threading.Timer(0.5, session.stop).start()
    replies = [session.ask("GET", endpoint + "/users") for _ in range(2)]
    assert [reply.message for reply in replies] == ["the run was stopped", "the run was stopped before this was sent"]
    assert len(proxy.requests) == 1


def test_a_redirect_is_not_followed_so_that_the_token_goes_nowhere_else(
    proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    with FaultProxy(new_hub.endpoint) as elsewhere:
        proxy.rule = every(matching(None, "users"), Answer(302, b"", {"Location": elsewhere.url + "/hub/api/users"}))
        session = hst.get_session(new_hub.token)
        for method in ("get", "post", "delete"):
            assert getattr(session, method)(endpoint + "/users").status_code == 302
        assert elsewhere.requests == []


def test_a_netrc_file_does_not_replace_the_token(
    new_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert hst.get_session(new_hub.token).get(new_hub.endpoint + "/user").json()["name"] == "hub-stress-test"


def test_no_cookie_of_the_hub_is_kept(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    assert "Set-Cookie" in session.get(hub.endpoint.removesuffix("/api") + "/login").headers
    assert not session.cookies


def test_every_request_has_a_time_out() -> None:
    wire = HubWithUsers([NAME])
    session = hst.HubSession("x", wire)
    hub = hst.Hub(ENDPOINT, session)
    session.get(ENDPOINT + "/users")
    session.send(session.prepare_request(requests.Request("GET", ENDPOINT + "/user")))
    hub.page_of_users(0)
    hub.create(["hub-stress-test-2"])
    hub.start(NAME, None, session.clock() + 5)
    list(hub.progress(NAME, session.clock() + 5))
    hub.state(NAME)
    hub.stop(NAME)
    hub.delete(NAME)
    assert len(wire.asked) == 9 and all(settings["timeout"] for _, _, settings in wire.asked)


def test_settings_made_on_a_session_after_its_first_request_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    wire, endpoint = HubWithUsers(), "https://x/hub/api"
    session = hst.HubSession("x", wire)
    session.get(endpoint + "/user")
    session.verify, session.cert, session.proxies = "/own/ca.pem", "/own/cert.pem", {"https": "http://proxy:3128"}
    session.get(endpoint + "/user")
    hst.Hub(endpoint, session).state("alice")
    hst.Hub(endpoint, session.clone(own_stop=True)).state("alice")
    assert wire.asked[0][2]["verify"] is True and len(wire.asked) == 4
    for _, _, settings in wire.asked[1:]:
        assert (settings["verify"], settings["cert"]) == ("/own/ca.pem", "/own/cert.pem")
        assert settings["proxies"]["https"] == "http://proxy:3128"


def test_a_certificate_file_that_is_not_there_is_a_reason_and_no_traceback(
    new_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    endpoint = new_hub.endpoint.replace("http:", "https:")
    reply = hst.get_session("x").ask("GET", endpoint + "/", call=hst.once())
    assert reply.status == 0 and "/nowhere/ca.pem" in reply.message


@pytest.mark.parametrize("end", ["stop", "deadline"])
def test_a_silent_progress_stream_is_cut_when_its_time_has_come(end: str, make_hub: Callable[..., LocalHub]) -> None:
    local = make_hub(hang_rate=1.0, slow_spawn_timeout_s=0)
    session = hst.get_session(local.token)
    hub = hst.Hub(local.endpoint, session)
    assert hub.create([NAME]).status == 201 and hub.start(NAME, None, session.clock() + 5).status == 202
    until_s = session.clock() + (60 if end == "stop" else 1)
    threading.Timer(1, session.stop if end == "stop" else lambda: None).start()
    found: list[hst.Kind] = []

    def read() -> None:
        with pytest.raises(hst.Failed) as failed:
            hst.await_ready(NAME, hub, until_s, [])
        found.append(failed.value.reason.kind)

    reading = threading.Thread(target=read)
    reading.start()
    give_up_s = session.clock() + 15  # before the keep-alive's own time-out of 20 s
    while reading.is_alive() and session.clock() < give_up_s:
        session.cut_streams()
        reading.join(0.1)
    assert found == [hst.Kind.TIMED_OUT]
    assert hst.delete_users([NAME], local.endpoint, session.clone(own_stop=True)) and not tool_users(local)


# ==== Answers that were lost =========================================================================================


@pytest.mark.parametrize("fault", [ResetAfter(), *map(AnswerAfter, (502, 503, 504))], ids=str)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/users$"), ("POST", "/server$"), ("DELETE", "/server$"), ("DELETE", r"/users/[^/]+$")],
    ids=["create", "start", "stop", "delete"],
)
def test_an_answer_that_was_lost_is_settled_by_asking_the_hub_and_counted_once(
    method: str, path: str, fault: Fault, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(2, matching(method, path), fault)
    done = run_tool("stress-test", "-c", "6", "-b", "3", hub=new_hub, env={"JUPYTERHUB_ENDPOINT": endpoint})
    assert not tool_users(new_hub)
    assert "6 users deleted, none left" in done.summary
    assert "6 of 6 servers became ready" in done.summary
    assert done.code == 0, done


@pytest.mark.parametrize("status", [502, 503, 504])
def test_users_of_a_batch_that_a_dying_hub_half_made_are_not_left_behind(
    status: int, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    """The hub is killed while it makes three users; the proxy answers for it, also for the retries."""
    creates = itertools.count()

    def rule(request: Request) -> Fault | None:
        if (request.method, request.path) != ("POST", "/hub/api/users"):
            return None
        number = next(creates)
        if number == 0:
            assert new_hub.call("POST", "/users", {"usernames": ["hub-stress-test-2"]})[0] == 201
        return Answer(status, b"<html>", {"Content-Type": "text/html"}) if number < 3 else None

    proxy.rule = rule
    done = run_tool("stress-test", "-c", "3", hub=new_hub, env={"JUPYTERHUB_ENDPOINT": endpoint})
    assert not tool_users(new_hub), done
    assert done.code in (0, 1)


# ==== Pages of users, and the simulated hub ==========================================================================


def test_a_users_page_that_ends_early_is_not_the_last_page() -> None:
    """`next` decides: pages may be short or empty while there is another (state filters do that on real hubs)."""
    pages = {
        0: {"items": [{"name": "hub-stress-test-1"}], "_pagination": {"next": {"offset": 200, "url": "http://wrong"}}},
        200: {"items": [], "_pagination": {"next": {"offset": 400, "url": "http://wrong"}}},
        400: {"items": [{"name": "hub-stress-test-2"}], "_pagination": {"next": None}},
    }

    class Pages(hst.SimulatedHub):
        def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
            response = super().send(request)
            offset = int((request.url or "").partition("offset=")[2].partition("&")[0])
            response._content = json.dumps(pages[offset]).encode()
            return response

    record = hst.Recorder()
    found = hst.find_users(hst.Hub(ENDPOINT, hst.HubSession("x", Pages())), record, None)
    assert [user["name"] for user in found] == ["hub-stress-test-1", "hub-stress-test-2"]
    assert record.summarise()["list_users"].count == 3


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (hub_answer(403, b"{}"), "the hub refused to list its users: it denies this without a reason (403)"),
        (hub_answer(500, b'{"message": "out of memory"}'), "the hub refused to list its users: 500 (out of memory)"),
        (hub_answer(200, b"[1"), "the hub refused to list its users: 200 (not JSON)"),
        (ResetBefore(), "the hub did not answer when asked to list its users: connection reset"),
    ],
    ids=str,
)
def test_a_list_that_the_hub_refuses_says_who_refused_what(
    fault: Fault, sentence: str, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = every(matching("GET", "/users"), fault)
    hub, record = hst.Hub(endpoint, TimeTraveller(token=new_hub.token)), hst.Recorder()
    with pytest.raises(hst.HubRefused) as raised:
        hst.find_users(hub, record, None)
    assert str(raised.value) == sentence
    assert record.summarise()["list_users"].failed == (fault != hub_answer(200, b"[1"))


def test_the_simulated_hub_answers_as_a_real_one_does(hub: LocalHub) -> None:
    """The same calls on both: statuses, and the parts of the answers that the tool reads."""
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/users", {"usernames": [NAME]}),
        ("GET", f"/users/{NAME}", None),
        ("POST", f"/users/{NAME}/activity", {"last_activity": "2026-01-01T00:00:00Z"}),
        ("POST", f"/users/{NAME}/server", None),
        ("GET", f"/users/{NAME}", None),
        ("DELETE", f"/users/{NAME}/server", None),
        ("GET", f"/users/{NAME}", None),
        ("GET", "/users/hub-stress-test-nobody", None),
        ("DELETE", f"/users/{NAME}", None),
        ("GET", f"/users/{NAME}", None),
        ("DELETE", f"/users/{NAME}", None),
    ]

    def seen(session: hst.HubSession, endpoint: str) -> list[tuple[int, int, object]]:
        replies = [session.ask(method, endpoint + path, json=body) for method, path, body in calls]
        return [
            (
                reply.status,
                reply.hub_status,
                hst.server_state(reply.data)
                if isinstance(reply.data, dict) and "servers" in reply.data
                else type(reply.data),
            )
            for reply in replies
        ]

    assert seen(hst.get_session("x", dry_run=True), ENDPOINT) == seen(hst.get_session(hub.token), hub.endpoint)
