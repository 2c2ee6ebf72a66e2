"""Whom a run has made, and who said it: authenticators that rewrite and refuse names, proxies that answer for a hub."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

import hub_stress_test as hst
from authority import certificate_for_loopback
from conftest import OLD_HUB
from fault_proxy import Answer, FaultProxy, Request, every, hub_answer, matching
from localhub import LocalHub
from test_faults import FromThenOn
from tool import THEIRS, run_for_results, run_tool, tool_users

NGINX = {"Server": "nginx/1.22.1", "Content-Type": "text/html"}
AUTHENTICATOR = """
class Mine(DummyAuthenticator):
{}
c.JupyterHub.authenticator_class = Mine
"""
PREFIXES = AUTHENTICATOR.format(
    '    normalize_username = lambda self, name: f"lms_{name}" if "stress-test-" in name else name'
)
REFUSES_FROM_7_ON = AUTHENTICATOR.format("""
    def add_user(self, user):
        if user.name.startswith("hub-stress-test-") and int(user.name.rpartition("-")[2]) >= 7:
            raise ValueError("useradd: no more accounts")
        super().add_user(user)
""")

Make = Callable[..., LocalHub]


# ==== Names that the hub rewrites or refuses =========================================================================


@pytest.mark.parametrize("words", [("stress-test",), ("activity-stress-test",)], ids=str)
def test_rewritten_names_end_the_run_and_are_deleted(words: tuple[str, ...], make_hub: Make) -> None:
    hub = make_hub(config=PREFIXES)
    before = hub.users().keys()
    done = run_tool(*words, "-c", "3", hub=hub)
    assert done.code == 1
    assert "calls hub-stress-test-1 lms_hub-stress-test-1: its authenticator rewrites names" in done.summary
    assert "--own-servers" in done.summary
    assert hub.users().keys() == before


def test_create_users_deletes_rewritten_names_before_it_raises(make_hub: Make) -> None:
    hub = make_hub(config=PREFIXES)
    before = hub.users().keys()
    with pytest.raises(hst.CutShort, match="rewrites names"):
        hst.create_users(3, 3, hub.endpoint, hst.get_session(hub.token))
    assert hub.users().keys() == before


def test_what_a_half_refused_batch_made_is_deleted(make_hub: Make) -> None:
    hub = make_hub(config=REFUSES_FROM_7_ON)
    done = run_tool("stress-test", "-c", "10", hub=hub)
    assert done.code == 1 and not tool_users(hub)
    assert "the hub refused to make users: 400 (Failed to create user hub-stress-test-11" in done.summary


CANNOT_HAVE_SERVERS = {
    "local processes": (
        "from jupyterhub.spawner import LocalProcessSpawner; c.JupyterHub.spawner_class = LocalProcessSpawner",
        "getpwnam(): name not found: '<user>'",
        "the hub's users need unix accounts: make some with these names, or test with --own-servers",
    ),
    "unix accounts": (
        "from jupyterhub.auth import LocalAuthenticator\nc.Authenticator.allowed_users = set()\n"
        "c.JupyterHub.authenticator_class = type('Mine', (LocalAuthenticator, DummyAuthenticator), {})",
        "User hub-stress-test-1 does not exist on the system",
        "the hub's users need unix accounts: make some with these names, or test with --own-servers",
    ),
    "a pattern": (
        "c.Authenticator.username_pattern = '[a-z-]+$'",
        "the hub refused to make users: 400 (Invalid usernames: hub-stress-test-1 to -12)",
        "username_pattern refuses these names: allow hub-stress-test-.* too, or test with --own-servers",
    ),
    "options to choose": (
        "class Mine(StubSpawner):\n    async def start(self):\n        return self.user_options['profile']\n"
        "c.JupyterHub.spawner_class = Mine",
        "× 'profile'",
        "all starts failed alike: if people choose options before a start, choose them with --profile",
    ),
}


@pytest.mark.parametrize("what", CANNOT_HAVE_SERVERS)
def test_a_hub_where_fake_users_cannot_have_servers_is_recognised(what: str, make_hub: Make) -> None:
    config, why, way_out = CANNOT_HAVE_SERVERS[what]
    hub = make_hub(config=config)
    done = run_tool("stress-test", "-c", "12", "-b", "12", hub=hub)
    assert done.code == 1 and why in done.summary and way_out in done.summary, done
    assert not tool_users(hub)


def test_names_that_are_taken_again_and_again_end_the_run(new_hub: LocalHub) -> None:
    """Another run with the same name takes each name a moment earlier."""
    theirs: list[str] = []

    def rule(request: Request) -> None:
        if request.method == "POST" and request.path == "/hub/api/users":
            theirs.extend(json.loads(request.body)["usernames"])
            new_hub.call("POST", "/users", {"usernames": json.loads(request.body)["usernames"]})

    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = rule
        done = run_tool("stress-test", "-c", "2", hub=new_hub, proxy=proxy)
    assert done.code == 1 and "two requests in a row made no user" in done.summary
    assert tool_users(new_hub) == set(theirs) and len(theirs) == 4
    for name in theirs:
        new_hub.call("DELETE", f"/users/{name}")


class Creates(hst.SimulatedHub):
    """A hub that does to each create what is asked of it: makes some of the names, calls them something, answers."""

    def __init__(self, does: list[tuple[int, str, int | None]]) -> None:
        super().__init__()
        self._does = iter(does)
        self.made: set[str] = set()

    def _answer(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        if (method, path) != ("POST", ["users"]):
            return super()._answer(method, path, body)
        share, prefix, status = next(self._does, (2, "", 201))
        asked = body["usernames"][: (0, 1, len(body["usernames"]))[share]]
        called = [*asked, *("lms_" + name for name in asked)] if prefix == "and" else [prefix + name for name in asked]
        named = [name for name in called if name not in self._users]
        _, models = super()._answer(method, path, {"usernames": named})
        self.made.update(named)
        if status is None:  # the answer is lost
            raise requests.ConnectionError("reset")
        return status, models if status == 201 else {"status": status, "message": "no"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["", "lms_", "and"]), st.sampled_from([201, 400, 409, 500, None])),
        max_size=4,
    )
)
def test_whatever_a_create_answers_nobody_is_left_unnamed(does: list[tuple[int, str, int | None]]) -> None:
    """All, some or none of the names are made, under other names, or under both; it says so, refuses, or is lost."""
    wire = Creates(does)
    session = hst.HubSession("x", wire).clone(own_stop=True)
    hub, claims, said = hst.Hub("http://hub.invalid/hub/api", session), hst.Claims(), ""
    claims.known = set()
    try:
        list(hst.make_users(6, 3, hub, hst.Recorder(), claims, [], ""))
    except hst.CutShort as error:
        said = str(error)
    session = hst.HubSession("x", wire).clone(own_stop=True)
    thought = dict.fromkeys(claims.ours, hst.ServerState.UNKNOWN)
    hst.remove_users(thought, thought.__contains__, hst.Hub(hub.endpoint, session), hst.Recorder(), 3)
    left = [name for name in wire.made if name in wire._users]
    honest = all(status != 409 or not share for share, _, status in does)  # a hub says 409 only when it made nobody
    assert not honest or all(name in said or "to -" in said for name in left), (left, said)


class BrokenTls(ssl.SSLContext):
    """A load balancer that ends TLS, whose first answer to a create comes in plain text."""

    broken = False

    def __new__(cls, *_: object) -> BrokenTls:
        return super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)

    def __init__(self, proxy: FaultProxy, certificate: Path, key: Path) -> None:
        self.load_cert_chain(certificate, key)
        self._upstream = proxy.url.removeprefix("http://").split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        plain = socket.socket(fileno=os.dup(client.fileno()))
        with contextlib.suppress(OSError), plain, self.wrap_socket(client, server_side=True) as secure:
            if request := secure.recv(65536):
                creates = request.startswith(b"POST /hub/api/users ")
                while creates and not request.endswith(b"}"):
                    request += secure.recv(65536)
                with socket.create_connection((self._upstream[0], int(self._upstream[1]))) as upstream:
                    upstream.sendall(request.replace(b"Connection: keep-alive", b"Connection: close"))
                    answer = b"".join(iter(lambda: upstream.recv(65536), b""))
                if creates and not self.broken:
                    self.broken = True
                    plain.sendall(b"HTTP/1.1 504 Gateway Time-out\r\n\r\n")
                else:
                    secure.sendall(answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))


# ==== Who said it ====================================================================================================


def denied(status: int, path: str = "") -> Callable[[Request], Answer | None]:
    """As nginx answers for requests that it does not let through."""
    return every(matching("POST", path), Answer(status, b"<html>", NGINX))


@pytest.mark.parametrize("path", ["/users$", "/server$"])
def test_what_nginx_denies_is_not_blamed_on_the_token(path: str, new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = denied(403, path)
        done = run_tool("stress-test", "-c", "2", hub=new_hub, proxy=proxy)
    assert done.code == 1 and not tool_users(new_hub)
    assert "something in front of the hub (nginx/1.22.1) answered 403" in done.summary
    assert "something in front of the hub denies requests" in done.summary
    assert "token" not in done.summary and "scope" not in done.summary


def test_a_limit_of_nginx_is_not_the_hubs_throttling(new_hub: LocalHub, tmp_path: Path) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = denied(429, "/server$")
        words = ("stress-test", "-c", "1", "--server-timeout", "2s")
        where = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        done, found = run_for_results(tmp_path / "r", *words, hub=new_hub, env=where)
    assert found["http"]["throttled"] == 0 and found["http"]["in_front"].keys() == {"429"}
    assert "exempt this machine" in done.summary and "concurrent_spawn_limit" not in done.summary


def test_what_the_hub_denies_is_not_blamed_on_the_token(make_hub: Make) -> None:
    hub = make_hub(
        config="""
def hook(spawner):
    from tornado.web import HTTPError
    raise HTTPError(403, "over quota")
c.Spawner.pre_spawn_hook = hook
"""
    )
    done = run_tool("stress-test", "-c", "2", hub=hub)
    assert done.code == 1 and not tool_users(hub)
    assert "the hub denies this: over quota (403)" in done.summary
    assert "no longer accepts" not in done.summary


def test_a_hub_that_wants_people_to_have_logged_in_is_recognised(make_hub: Make) -> None:
    never = AUTHENTICATOR.format("""
    async def refresh_user(self, user, handler=None):
        return False
""")
    hub = make_hub(version=OLD_HUB, config=f"{never}c.Authenticator.refresh_pre_spawn = True")
    done = run_tool("stress-test", "-c", "2", hub=hub)
    assert "2 × the hub denies this: auth has expired for <user>, login again (403)" in done.summary
    assert "refresh_pre_spawn" in done.summary and not tool_users(hub)


def test_a_token_that_expires_meanwhile_is_named(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        words = ("stress-test", "-c", "2", "--cleanup-timeout", "2s")
        proxy.rule = lambda request: (
            hub_answer(403, b"{}") if any(one.path.endswith("/server") for one in proxy.requests) else None
        )
        done = run_tool(*words, hub=new_hub, proxy=proxy)
    assert done.code == 4 and "the hub no longer accepts the token (403)" in done.summary
    assert run_tool("purge", hub=new_hub).code == 0


@pytest.mark.parametrize("command", ["stress-test", "activity-stress-test"])
def test_a_hub_whose_version_is_stripped_is_measured_as_before(command: str, new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.strips = "X-JupyterHub-Version"
        done = run_tool(command, "-c", "3", hub=new_hub, proxy=proxy)
    assert done.code == 0 and not tool_users(new_hub)
    assert "something in front" not in done.summary


def test_a_hub_behind_a_gateway_with_its_own_errors_is_missed(make_hub: Make) -> None:
    """`error_page 502 504 =521`: today's numbers are not all that proxies answer for a hub that is away."""
    hub = make_hub(slow_spawn_timeout_s=0, spawn_s=6)
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = FromThenOn(matching("GET", "/progress$"), Answer(521, b"<html>", NGINX), seconds=4.5)
        done = run_tool("stress-test", "-c", "3", hub=hub, proxy=proxy)
    assert "The hub has not answered since" in done.stderr and "The hub answers again" in done.stderr
    assert "something in front of the hub (nginx/1.22.1) answered 521" in done.summary
    assert hub.users().keys() == THEIRS


def test_users_behind_a_balancer_that_breaks_tls_are_deleted(new_hub: LocalHub, tmp_path: Path) -> None:
    """It hands each create on, and answers in plain text, as one whose time-out has passed: the users are there."""
    authority, key = certificate_for_loopback(tmp_path)
    with FaultProxy(new_hub.endpoint) as proxy, BrokenTls(proxy, authority, key) as port:
        where = {"JUPYTERHUB_ENDPOINT": f"https://127.0.0.1:{port}/hub/api", "REQUESTS_CA_BUNDLE": str(authority)}
        done = run_tool("stress-test", "-c", "3", hub=new_hub, env=where)
    assert done.code == 0 and not tool_users(new_hub)
    assert any(one.path == "/hub/api/users" for one in proxy.requests)
