"""The hub as the tool sees it: what answers mean, the transport, lost answers, pages, the simulated hub."""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

import hub_stress_test as hst
from fault_proxy import (
    Answer,
    AnswerAfter,
    Delay,
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
from hub_stress_test import Kind, ServerState
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, TimeTraveller
from tool import run_tool, tool_users, wait_until

NAME = "hub-stress-test-1"
HTML = {"Content-Type": "text/html; charset=x"}
JSON = {"Content-Type": "application/json"}
READY, STOPPED, UNKNOWN = ServerState.READY, ServerState.STOPPED, ServerState.UNKNOWN


@pytest.fixture
def endpoint(proxy: FaultProxy) -> str:
    return proxy.endpoint


# ==== What answers mean ==============================================================================================


@pytest.mark.parametrize(
    ("servers", "state"),
    [
        ({}, STOPPED),
        (None, STOPPED),
        ({"": {"pending": "spawn", "ready": False}}, ServerState.STARTING),
        ({"": {"pending": None, "ready": True}}, READY),
        ({"": {"pending": "stop", "ready": False}}, ServerState.STOPPING),
        ({"": {"pending": None, "ready": False, "stopped": True}}, STOPPED),
        ({"": {"pending": "check", "ready": False, "stopped": False}}, UNKNOWN),
        ({"": {"pending": "rename", "ready": False}}, UNKNOWN),
        ({"": {"pending": None, "ready": False}}, STOPPED),
        ({"named": {"pending": None, "ready": True}}, STOPPED),
    ],
)
def test_a_user_model_tells_the_state_of_the_server(servers: dict[str, Any] | None, state: ServerState) -> None:
    assert hst.server_state({"servers": servers}) is state
    assert hst.server_state({"name": "seen with a token without read:servers"}) is UNKNOWN


def test_scopes_limited_to_some_users_do_not_count() -> None:
    assert hst.missing_scopes(["servers", "delete:users!user=x"], {"servers", "delete:users"}) == ["delete:users"]
    assert hst.missing_scopes(["start:servers"], {"servers"}) == []


@pytest.mark.parametrize(
    ("status", "headers", "marked", "hubs"),
    [(status, {}, True, False) for status in (200, 201, 302, 401, 403, 404, 429, 500, 502, 521)]
    + [(status, {"X-JupyterHub-Version": "6.1.1"}, True, True) for status in (200, 404, 429, 500, 502)]
    + [(status, {}, False, True) for status in (201, 403, 500)]
    + [(404, JSON, False, True), (404, HTML, False, False), (502, {}, False, False), (503, JSON, False, False)],
)
def test_an_answer_is_the_hubs_by_version_or_by_status(
    status: int, headers: dict[str, str], marked: bool, hubs: bool, proxy: FaultProxy, endpoint: str
) -> None:
    session = hst.HubSession("x").clone(own_stop=True)
    session.marked = marked
    proxy.rule = every(matching(None, "users"), Answer(status, b"{}", headers | {"Server": "nginx/1.22"}))
    reply = session.ask("POST", endpoint + "/users", json={})
    assert (reply.status, reply.front, reply.call.lost) == ((status, 0, False) if hubs else (0, status, True))
    if not hubs:
        assert reply.message == f"something in front of the hub (nginx/1.22) answered {status}"
        assert reply.event("x").reason == hst.Reason(Kind.IN_FRONT, reply.message)


@pytest.mark.parametrize(
    ("fault", "text", "kind", "lost"),
    [
        (hub_answer(500, b'{"message": "database is locked"}'), "500 (database is locked)", Kind.REFUSED, False),
        (hub_answer(418), "418", Kind.REFUSED, False),
        (hub_answer(500, b"<html>", **HTML), "500 (not JSON but text/html)", Kind.REFUSED, False),
        (ResetBefore(), "connection reset", Kind.NO_ANSWER, True),
        (HalfBody(), "the answer broke off", Kind.NO_ANSWER, True),
        (Silence(), "no answer in time", Kind.NO_ANSWER, True),
    ],
    ids=str,
)
def test_a_reply_tells_what_came_or_why_nothing_did(
    fault: Fault, text: str, kind: Kind, lost: bool, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = every(matching("GET", "/users"), fault)
    timeout_s = 1 if isinstance(fault, Silence) else 30
    reply = hst.get_session(new_hub.token).ask("GET", endpoint + "/users", call=hst.Call(once=True), timeout=timeout_s)
    assert (str(reply), reply.call.lost) == (text, lost)
    event = reply.event("list_users")
    assert event.reason and event.reason.kind is kind


# ==== The transport: retries, time-outs, redirects, cookies, settings ================================================


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("fault", [Answer(429), Answer(503), Answer(504), ResetBefore()], ids=str)
def test_a_request_of_any_method_is_retried_and_counted(
    method: str, fault: Fault, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(1, matching(method, "nobody"), fault)
    session = hst.get_session(new_hub.token, pool_maxsize=7)
    assert session.request(method, endpoint + "/users/nobody/activity", json={}).status_code in (404, 405)
    assert (session.traffic.counts["retries"], session.traffic.counts["requests"]) == (1, 2) == (1, len(proxy.requests))


@pytest.mark.parametrize(
    ("headers", "window_s", "paused_s"),
    [({}, 60.0, [0, 1, 2, 4, 8]), ({"Retry-After": "50"}, 2.0, [2.0])],
    ids=["six times with a back-off that doubles", "within the window for retries"],
)
def test_a_request_is_retried(
    headers: dict[str, str], window_s: float, paused_s: list[float], proxy: FaultProxy, endpoint: str
) -> None:
    proxy.rule = every(matching("GET", "nobody"), Answer(503, b"", headers))
    session = TimeTraveller(retry_window_s=window_s)
    assert session.get(endpoint + "/users/nobody").status_code == 503
    assert (len(proxy.requests), session.paused_s) == (len(paused_s) + 1, paused_s)


def test_the_time_a_hub_asks_for_is_no_latency(proxy: FaultProxy, endpoint: str, new_hub: LocalHub) -> None:
    proxy.rule = first(1, matching("GET", "users"), Answer(429, b"", {"Retry-After": "7"}))
    session = TimeTraveller(token=new_hub.token)  # on whose clock only pauses take time
    event = session.ask("GET", endpoint + "/users").event("list_users")
    assert (event.reason, event.tries, event.backoff_s, event.latency_s) == (None, 2, 7.0, 0.0)
    assert session.traffic.summarise().statuses == {"200": 1, "429": 1}


def test_a_stop_ends_a_back_off_and_all_sending(proxy: FaultProxy, endpoint: str) -> None:
    proxy.rule = every(matching("GET", "users"), Answer(429, b"", {"Retry-After": "100"}))
    session = hst.HubSession("x")
    threading.Timer(0.5, session.stop).start()
    replies = [session.ask("GET", endpoint + "/users") for _ in range(2)]
    assert [reply.message for reply in replies] == ["the run was stopped", "the run was stopped before this was sent"]
    assert len(proxy.requests) == 1


def test_the_token_survives_a_netrc_and_leaves_with_no_redirect(
    proxy: FaultProxy, endpoint: str, new_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    session = hst.get_session(new_hub.token)
    assert session.get(new_hub.endpoint + "/user").json()["name"] == "hub-stress-test"
    with FaultProxy(new_hub.endpoint) as elsewhere:
        proxy.rule = every(matching(None, "users"), Answer(302, b"", {"Location": elsewhere.url + "/hub/api/users"}))
        for method in ("get", "post", "delete"):
            assert getattr(session, method)(endpoint + "/users").status_code == 302
        assert elsewhere.requests == []


def test_no_cookie_of_the_hub_is_kept(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    assert "Set-Cookie" in session.get(hub.endpoint.removesuffix("/api") + "/login").headers
    assert not session.cookies


def test_whoever_asks_of_the_token_meanwhile_waits(proxy: FaultProxy) -> None:
    session, proxy.rule = hst.get_session("revoked"), every(matching("GET", "/user$"), Delay(1.0))
    with ThreadPoolExecutor(1) as others:
        first = others.submit(session.token_is_refused, proxy.endpoint)
        wait_until(lambda: proxy.requests)
        assert session.token_is_refused(proxy.endpoint) and first.result() and len(proxy.requests) == 1


def test_every_request_has_a_time_out() -> None:
    wire = HubWithUsers([NAME])
    session = TimeTraveller(wire)  # whose clock stands still
    hub = hst.Hub(ENDPOINT, session)
    session.get(ENDPOINT + "/users")
    session.send(session.prepare_request(requests.Request("GET", ENDPOINT + "/user")))
    hub.page_of_users(0)
    hub.create(["hub-stress-test-2"])
    hub.start(NAME, None, session.clock() + 5)
    list(hub.progress(NAME, session.clock() + 5))
    hub.state(NAME, until_s=session.clock() + 5)
    hub.state(NAME)
    hub.stop(NAME)
    hub.delete(NAME)
    timeouts = [settings["timeout"] for _, _, settings in wire.asked]
    assert [round(timeout_s, 1) for timeout_s in timeouts] == [30, 30, 60, 30, 5, 5, 5, 30, 30, 30]


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


def test_a_missing_certificate_file_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    reply = hst.get_session("x").ask("GET", "https://127.0.0.1:1/hub/api/", call=hst.Call(once=True))
    assert reply.status == 0 and "/nowhere/ca.pem" in reply.message


def test_a_stop_cuts_a_silent_progress_stream(proxy: FaultProxy, new_hub: LocalHub) -> None:
    session = hst.get_session(new_hub.token)
    hub = hst.Hub(proxy.endpoint, session)
    assert hub.create([NAME]).status == 201
    once = hst.Call(once=True)
    assert session.ask("POST", hub.server_url(NAME), json={"hang_rate": 1}, call=once, timeout=0.5).call.lost
    reading = threading.Thread(target=lambda: list(hub.progress(NAME, session.clock() + 60)))
    reading.start()
    wait_until(lambda: any(entry.path.endswith("/progress") for entry in proxy.requests))
    session.stop()
    stopped_s = time.monotonic()
    while reading.is_alive() and time.monotonic() < stopped_s + 15:  # before the keep-alive's own time-out of 20 s
        session.cut_streams()
        reading.join(0.1)
    assert not reading.is_alive()
    assert hst.delete_users([NAME], new_hub.endpoint, session.clone(own_stop=True)) and not tool_users(new_hub)


# ==== Answers that were lost =========================================================================================


def test_lost_answers_are_settled_with_the_hub_and_counted_once(proxy: FaultProxy, new_hub: LocalHub) -> None:
    """Of each kind of request two answers get lost, each kind in another way."""
    rules = [
        first(2, matching("POST", "/users$"), ResetAfter()),
        first(2, matching("POST", "/server$"), AnswerAfter(502)),
        first(2, matching("DELETE", "/server$"), AnswerAfter(503)),
        first(2, matching("DELETE", r"/users/[^/]+$"), AnswerAfter(504)),
    ]
    proxy.rule = lambda request: next(filter(None, (rule(request) for rule in rules)), None)
    done = run_tool("stress-test", "-c", "6", "-b", "3", hub=new_hub, proxy=proxy)
    assert done.code == 0 and not tool_users(new_hub), done
    assert "6 users deleted, none left" in done.summary and "6 of 6 servers became ready" in done.summary
    assert sum(entry.fault is not None for entry in proxy.requests) == 8


@pytest.mark.parametrize("status", [502, 503])  # the second of which is retried
def test_a_batch_that_a_dying_hub_half_made_goes(status: int, proxy: FaultProxy, new_hub: LocalHub) -> None:
    """The hub is killed while it makes three users; the proxy answers for it, also for the retries."""
    creates = itertools.count()

    def rule(request: Request) -> Fault | None:
        if (request.method, request.path) != ("POST", "/hub/api/users"):
            return None
        number = next(creates)
        if number == 0:
            assert new_hub.call("POST", "/users", {"usernames": ["hub-stress-test-2"]})[0] == 201
        return Answer(status, b"<html>", HTML) if number < 3 else None

    proxy.rule = rule
    done = run_tool("stress-test", "-c", "3", hub=new_hub, proxy=proxy)
    assert not tool_users(new_hub), done
    assert done.code in (0, 1)


# ==== Pages of users, and the simulated hub ==========================================================================


def test_a_short_page_of_users_is_not_the_last(proxy: FaultProxy, endpoint: str) -> None:
    """`next` decides: pages may be short or empty while there is another (state filters do that on real hubs)."""
    names = {0: [NAME], 200: [], 400: ["hub-stress-test-2"]}

    def page(request: Request) -> Answer:
        offset = int(request.path.partition("offset=")[2].partition("&")[0])
        following = {"offset": offset + 200, "url": "http://wrong"} if offset < 400 else None
        items = [{"name": name} for name in names[offset]]
        return hub_answer(200, json.dumps({"items": items, "_pagination": {"next": following}}).encode())

    proxy.rule = page
    listed = hst.list_users(hst.Hub(endpoint, hst.HubSession("x")), hst.Recorder())
    assert [user["name"] for user in hst.test_users(listed, None)] == [NAME, "hub-stress-test-2"]
    assert len(proxy.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason", "failed"),
    [
        (hub_answer(403, b"{}"), "refused to list its users: it denies this without a reason (403)", 1),
        (hub_answer(500, b'{"message": "out of memory"}'), "refused to list its users: 500 (out of memory)", 1),
        (hub_answer(200, b"[1"), "refused to list its users: 200 (not JSON)", 0),
        (ResetBefore(), "did not answer when asked to list its users: connection reset", 1),
    ],
    ids=str,
)
def test_a_list_that_the_hub_refuses_names_who_refused_what(
    fault: Fault, reason: str, failed: int, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = every(matching("GET", "/users"), fault)
    hub, record = hst.Hub(endpoint, TimeTraveller(token=new_hub.token)), hst.Recorder()
    with pytest.raises(hst.HubRefused) as raised:
        list(hst.list_users(hub, record))
    assert str(raised.value) == f"the hub {reason}"
    assert record.summarise()["list_users"].failed == failed


def test_the_simulated_hub_answers_as_a_real_one_does(hub: LocalHub) -> None:
    """The same calls on both: statuses, and the parts of the answers that the tool reads."""
    user, server = f"/users/{NAME}", f"/users/{NAME}/server"
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/users", {"usernames": [NAME]}),
        ("GET", user, None),
        ("POST", user + "/activity", {"last_activity": "2026-01-01T00:00:00Z"}),
        ("POST", server, None),
        ("GET", user, None),
        ("DELETE", server, None),
        ("GET", user, None),
        ("GET", "/users/hub-stress-test-nobody", None),
        ("DELETE", user, None),
        ("GET", user, None),
        ("DELETE", user, None),
    ]

    def answers(session: hst.HubSession, endpoint: str) -> list[tuple[int, object]]:
        replies = [session.ask(method, endpoint + path, json=body) for method, path, body in calls]
        return [
            (reply.status, hst.server_state(reply.data) if isinstance(reply.data, dict) else type(reply.data))
            for reply in replies
        ]

    assert answers(hst.get_session("x", dry_run=True), ENDPOINT) == answers(hst.get_session(hub.token), hub.endpoint)
