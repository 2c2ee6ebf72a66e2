"""The session and what it makes of a hub's answers: retries, redirects, lost answers, the simulated hub."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from conftest import run_tool, tool_users
from fault_proxy import (
    Answer,
    AnswerAfter,
    Fault,
    FaultProxy,
    Request,
    ResetAfter,
    ResetBefore,
    Silence,
    every,
    first,
    matching,
)
from localhub import LocalHub

import hub_stress_test as hst


@pytest.fixture
def proxy(new_hub: LocalHub) -> Iterator[FaultProxy]:
    with FaultProxy(new_hub.endpoint) as proxy:
        yield proxy


@pytest.fixture
def endpoint(proxy: FaultProxy) -> str:
    return proxy.url + "/hub/api"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("fault", [Answer(429), Answer(503), Answer(504), ResetBefore()], ids=str)
def test_get_session_retries_on_every_method_and_counts_it(
    method: str, fault: Any, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(1, matching(method, "nobody"), fault)
    session = hst.get_session(new_hub.token, pool_maxsize=7)
    response = session.request(method, endpoint + "/users/nobody/activity", json={})
    assert response.status_code in (404, 405)
    assert len(proxy.requests) == 2
    assert (session.traffic.retries, session.traffic.requests) == (1, 2)


def test_a_request_is_tried_six_times_with_a_back_off_that_doubles(proxy: FaultProxy, endpoint: str) -> None:
    proxy.rule = every(matching("GET", "nobody"), Answer(503))
    session, slept = hst.HubSession("x", retry_window_s=1e9), []
    session.pause = lambda seconds: slept.append(seconds) is None  # type: ignore[method-assign]
    assert session.get(endpoint + "/users/nobody").status_code == 503
    assert (len(proxy.requests), slept) == (6, [0, 1, 2, 4, 8])


def test_the_time_that_the_hub_asks_for_is_slept_and_is_not_latency(
    proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(1, matching("GET", "users"), Answer(429, b"", {"Retry-After": "1"}))
    session = hst.get_session(new_hub.token)
    assert session.ask("GET", endpoint + "/users", operation="list_users").status == 200
    listed = session.metrics.summarise()["list_users"]
    assert 1.0 <= listed["backoff_s"] < 2.5
    assert listed["latency_s"]["max"] < 1.0
    assert session.traffic.summarise()["statuses"] == {"200": 1, "429": 1}


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
    new_hub: LocalHub, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert hst.get_session(new_hub.token).get(new_hub.endpoint + "/user").json()["name"] == "hub-stress-test"


class Wire(hst.SimulatedHub):
    """A simulated hub that remembers with which settings it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        self.seen.append(kwargs)
        return super().send(request, *args, **kwargs)


def test_every_request_has_a_time_out() -> None:
    wire, endpoint = Wire(), "http://x/hub/api"
    session = hst.HubSession("x", wire)
    session.get(endpoint + "/users")
    session.send(session.prepare_request(requests.Request("GET", endpoint + "/user")))
    hst.read_state("alice", endpoint, session)
    list(session.events(endpoint + "/users/alice/server/progress", session.clock() + 5))
    assert len(wire.seen) == 4 and all(settings["timeout"] for settings in wire.seen)


def test_settings_made_on_a_session_after_its_first_request_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    wire, endpoint = Wire(), "https://x/hub/api"
    session = hst.HubSession("x", wire)
    session.get(endpoint + "/user")
    session.verify, session.cert, session.proxies = "/own/ca.pem", "/own/cert.pem", {"https": "http://proxy:3128"}
    session.get(endpoint + "/user")
    hst.read_state("alice", endpoint, session)
    assert wire.seen[0]["verify"] is True and len(wire.seen) == 3
    for settings in wire.seen[1:]:
        assert (settings["verify"], settings["cert"]) == ("/own/ca.pem", "/own/cert.pem")
        assert settings["proxies"]["https"] == "http://proxy:3128"


def test_a_certificate_file_that_is_not_there_is_a_reason_and_no_traceback(
    new_hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    endpoint = new_hub.endpoint.replace("http:", "https:")
    assert "/nowhere/ca.pem" in hst.get_session("x").ask("GET", endpoint + "/", call=hst.Call(retry_until_s=0)).reason


def test_no_cookie_of_the_hub_is_kept(hub: LocalHub) -> None:
    session = hst.get_session(hub.token)
    assert "Set-Cookie" in session.get(hub.endpoint.removesuffix("/api") + "/login").headers
    assert not session.cookies


@pytest.mark.parametrize("end", ["stop", "deadline"])
def test_a_silent_progress_stream_is_cut_within_a_second(end: str, make_session_hub: LocalHub) -> None:
    hub = make_session_hub
    session = hst.get_session(hub.token)
    hub.call("POST", "/users", {"usernames": ["hub-stress-test-1"]})
    hub.call("POST", "/users/hub-stress-test-1/server")
    began_s = time.monotonic()
    until_s = session.clock() + (60 if end == "stop" else 1)
    threading.Timer(1, session.stop if end == "stop" else lambda: None).start()
    reading = threading.Thread(target=hst.await_ready, args=("hub-stress-test-1", hub.endpoint, session, until_s))
    reading.start()
    while reading.is_alive() and time.monotonic() - began_s < 20:
        session.cut_streams()
        reading.join(0.1)
    assert 1 <= time.monotonic() - began_s < 3
    cleaning = session.for_cleaning_up()
    assert hst.delete_users(["hub-stress-test-1"], hub.endpoint, cleaning)


@pytest.fixture
def make_session_hub() -> Iterator[LocalHub]:
    with LocalHub(hang_rate=1.0, slow_spawn_timeout_s=0) as hub:
        yield hub


@pytest.mark.parametrize("fault", [ResetAfter(), *map(AnswerAfter, (502, 503, 504))], ids=str)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/users$"), ("POST", "/server$"), ("DELETE", "/server$"), ("DELETE", r"/users/[^/]+$")],
    ids=["create", "start", "stop", "delete"],
)
def test_an_answer_that_was_lost_is_settled_by_asking_the_hub_and_counted_once(
    method: str, path: str, fault: Any, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    proxy.rule = first(2, matching(method, path), fault)
    done = run_tool("stress-test", "-c", "6", "-b", "3", hub=new_hub, env={"JUPYTERHUB_ENDPOINT": endpoint})
    assert not tool_users(new_hub)
    assert "6 users deleted, none left" in done.stdout
    assert "6 of 6 servers became ready" in done.stdout
    assert done.code == 0, done


@pytest.mark.parametrize("status", [502, 503, 504])
def test_users_of_a_batch_that_a_dying_hub_half_made_are_not_left_behind(
    status: int, proxy: FaultProxy, endpoint: str, new_hub: LocalHub
) -> None:
    """The hub is killed while it makes three users; the proxy answers for it, also for the repeats."""
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


@pytest.mark.parametrize(
    ("status", "headers", "lost"),
    [
        (502, {}, True),
        (503, {}, True),
        (504, {}, True),
        (503, {"X-JupyterHub-Version": "6.1.1"}, False),
        (500, {}, False),
        (429, {}, False),
        (201, {}, False),
    ],
)
def test_a_gateways_error_without_the_hubs_version_is_a_lost_answer(
    status: int, headers: dict[str, str], lost: bool, proxy: FaultProxy, endpoint: str
) -> None:
    proxy.rule = every(matching(None, "users"), Answer(status, b"{}", headers))
    session = hst.HubSession("x", retry_window_s=0)
    assert session.ask("POST", endpoint + "/users", json={}).lost is lost


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
            response._content = hst.json.dumps(pages[offset]).encode()
            return response

    session = hst.HubSession("x", Pages())
    found = hst.find_existing_stress_test_users("http://x/hub/api", session)
    assert [user["name"] for user in found] == ["hub-stress-test-1", "hub-stress-test-2"]


def test_the_simulated_hub_answers_as_a_real_one_does(hub: LocalHub) -> None:
    """The same calls on both: statuses, and the parts of the answers that the tool reads."""
    name = "hub-stress-test-1"
    calls: list[tuple[str, str, Any]] = [
        ("POST", "/users", {"usernames": [name]}),
        ("GET", f"/users/{name}", None),
        ("POST", f"/users/{name}/activity", {"last_activity": "2026-01-01T00:00:00Z"}),
        ("POST", f"/users/{name}/server", None),
        ("GET", f"/users/{name}", None),
        ("DELETE", f"/users/{name}/server", None),
        ("GET", f"/users/{name}", None),
        ("GET", "/users/hub-stress-test-nobody", None),
        ("DELETE", f"/users/{name}", None),
        ("GET", f"/users/{name}", None),
        ("DELETE", f"/users/{name}", None),
    ]
    seen = []
    for session, endpoint in (
        (hst.get_session(hub.token), hub.endpoint),
        (hst.get_session("x", dry_run=True), "http://x/hub/api"),
    ):
        replies = [session.ask(method, endpoint + path, json=body) for method, path, body in calls]
        seen.append(
            [
                (
                    r.status,
                    hst.server_state(r.data) if isinstance(r.data, dict) and "servers" in r.data else type(r.data),
                )
                for r in replies
            ]
        )
    assert seen[0] == seen[1]


def test_throttled_starts_take_turns_by_when_they_were_due() -> None:
    session, turns = hst.get_session("x", dry_run=True), hst.Turns()
    order: list[float] = []

    def wait(due_s: float) -> None:
        turns.wait(due_s, 0, session.clock() + 30, session)
        order.append(due_s)

    threads = [threading.Thread(target=wait, args=(due,)) for due in (3.0, 1.0, 2.0)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    for expected in itertools.accumulate([1, 1, 1]):
        assert turns.free()  # somebody waits, so that whoever comes only now lets them go first
        while len(order) < expected:
            time.sleep(0.01)
    assert order == [1.0, 2.0, 3.0]
    assert not turns.free()


def test_a_place_freed_before_a_start_was_asked_is_no_turn() -> None:
    session, turns = hst.get_session("x", dry_run=True), hst.Turns()
    turns.free()
    began_s = session.clock()
    turns.wait(1.0, turns.freed, began_s + 0.3, session)
    assert session.clock() - began_s >= 0.3


def test_a_worker_that_raises_is_recorded_and_nothing_hangs(caplog: pytest.LogCaptureFixture) -> None:
    session = hst.get_session("x", dry_run=True)

    def work(item: int) -> int:
        if item == 2:
            raise KeyError("broken")
        return item * 10

    results = hst.fan_out(work, [1, 2, 3], 2, session)
    assert (results[1], results[3]) == (10, 30) and isinstance(results[2], KeyError)


def test_an_operation_that_raises_is_a_failed_sample() -> None:
    session = hst.get_session("x", dry_run=True)

    def broken(username: str, endpoint: str, session: hst.HubSession) -> requests.Response:
        raise ValueError("no such thing")

    hst.perform("mine", broken, "x", "http://x/hub/api", session)
    assert session.metrics.summarise()["mine"]["errors"] == {"ValueError: no such thing": 1}


def test_a_hub_that_stays_silent_is_reported_within_its_time_out(proxy: FaultProxy, endpoint: str) -> None:
    proxy.rule = every(matching(None, "users"), Silence())
    session = hst.get_session("x")
    call = hst.Call(retry_until_s=session.clock() + 1)
    reply = session.ask("GET", endpoint + "/users", call=call, timeout=1)
    assert (reply.status, reply.reason) == (0, hst.TIMED_OUT)
