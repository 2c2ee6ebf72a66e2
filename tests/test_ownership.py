"""Whom a run has made, and who said it: authenticators that rewrite and refuse names, proxies that answer for a hub."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

import hub_stress_test as hst
from conftest import OLD_HUB
from fault_proxy import Answer, FaultProxy, Request, every, hub_answer, matching
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, TimeTraveller
from test_faults import FromThenOn
from tool import THEIRS, run_for_results, run_tool, tool_users

NGINX = {"Server": "nginx/1.22.1", "Content-Type": "text/html"}
MOODS = """
import pwd
from jupyterhub.auth import LocalAuthenticator
from tornado.web import HTTPError

class Moody(LocalAuthenticator, DummyAuthenticator):
    def normalize_username(self, name):
        return f"lms_{name}" if "-lms-" in name else name

    def add_user(self, user):
        if "-few-" in user.name and int(user.name.rpartition("-")[2]) >= 7:
            raise ValueError("useradd: no more accounts")
        return super().add_user(user) if "-unix-" in user.name else DummyAuthenticator.add_user(self, user)

class MoodySpawner(StubSpawner):
    async def start(self):
        if "-options-" in self.user.name:
            return self.user_options["profile"]
        if "-local-" in self.user.name:  # as a LocalProcessSpawner does
            pwd.getpwnam(self.user.name)
        if "-quota-" in self.user.name:
            raise HTTPError(403, "over quota")
        return await super().start()

c.Authenticator.username_pattern = "(?!hub-stress-test-pattern-).*"
c.JupyterHub.authenticator_class, c.JupyterHub.spawner_class = Moody, MoodySpawner
"""
ACCOUNTS = "the hub's users need unix accounts: make some with these names, or test with --own-servers"
ODD = {  # by the name of the run
    "lms": "calls hub-stress-test-lms-1 lms_hub-stress-test-lms-1: its authenticator rewrites names;--own-servers",
    "few": "the hub refused to make users: 400 (Failed to create user hub-stress-test-few-13",
    "unix": f"User hub-stress-test-unix-1 does not exist on the system;{ACCOUNTS}",
    "local": f"getpwnam(): name not found: '<user>';{ACCOUNTS}",
    "pattern": "the hub refused to make users: 400 (Invalid usernames: hub-stress-test-pattern-1 to -12);"
    "username_pattern refuses these names: allow hub-stress-test-.* too, or test with --own-servers",
    "options": "× 'profile';if people choose options before a start, choose them with --profile",
    "quota": "the hub denies this: over quota (403)",
}


# ==== Names that the hub rewrites or refuses =========================================================================


@pytest.fixture(scope="module")
def moody_hub() -> Iterator[LocalHub]:
    """A hub that treats users by the name of their run."""
    with LocalHub(config=MOODS) as hub:
        yield hub


@pytest.mark.parametrize("run", ODD)
def test_a_hub_where_fake_users_cannot_have_servers_is_recognised(run: str, moody_hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "12", "-b", "12", "--run", run, hub=moody_hub)
    assert done.code == 1 and all(words in done.summary for words in ODD[run].split(";")), done
    assert "no longer accepts" not in done.summary and moody_hub.users().keys() == THEIRS


def test_create_users_deletes_rewritten_names_before_it_raises(moody_hub: LocalHub) -> None:
    with pytest.raises(hst.CutShort, match="rewrites names"):
        hst.create_users(3, 3, moody_hub.endpoint, hst.get_session(moody_hub.token), run="lms")
    assert moody_hub.users().keys() == THEIRS


def test_names_that_are_taken_again_and_again_end_the_run(new_hub: LocalHub, proxy: FaultProxy) -> None:
    """Another run with the same name takes each name a moment earlier."""
    theirs: list[str] = []

    def rule(request: Request) -> None:
        if request.method == "POST" and request.path == "/hub/api/users":
            theirs.extend(json.loads(request.body)["usernames"])
            new_hub.call("POST", "/users", json.loads(request.body))

    proxy.rule = rule
    done = run_tool("stress-test", "-c", "2", hub=new_hub, proxy=proxy)
    assert done.code == 1 and "two requests in a row made no user" in done.summary
    assert tool_users(new_hub) == set(theirs) and len(theirs) == 4
    for name in theirs:
        new_hub.call("DELETE", f"/users/{name}")


BROKEN_TLS = -1


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
        if status == BROKEN_TLS:  # of a balancer that answers in plain text
            error = ssl.SSLError(1, "wrong version")
            error.reason = "WRONG_VERSION_NUMBER"
            raise requests.exceptions.SSLError(error)
        return status, models if status == 201 else {"status": status, "message": "no"}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["", "lms_", "and"]),
            st.sampled_from([201, 400, 409, 500, None, BROKEN_TLS]),
        ),
        max_size=4,
    )
)
def test_whatever_a_create_answers_nobody_is_left_unnamed(does: list[tuple[int, str, int | None]]) -> None:
    """All, some or none of the names are made, under other names, or under both; it says so, refuses, or is lost."""
    wire = Creates(does)
    session = hst.HubSession("x", wire).clone(own_stop=True)
    hub, claims, said = hst.Hub(ENDPOINT, session), hst.Claims(), ""
    claims.known = set()
    try:
        list(hst.make_users(6, 3, hub, hst.Recorder(), claims, [], ""))
    except hst.CutShort as error:
        said = str(error)
    session = hst.HubSession("x", wire).clone(own_stop=True)
    thought = dict.fromkeys(claims.ours, hst.ServerState.UNKNOWN)
    site = hst.Site(hst.Hub(hub.endpoint, session), hst.Plan(), hst.Recorder(), dict(thought))
    hst.remove_users(site, thought.__contains__)
    left = [name for name in wire.made if name in wire._users]
    honest = all(status != 409 or not share for share, _, status in does)  # a hub says 409 only when it made nobody
    assert not honest or all(name in said or "to -" in said for name in left), (left, said)


# ==== Who said it ====================================================================================================


@pytest.mark.parametrize("path", ["/users$", "/server$"])
def test_what_nginx_denies_is_not_blamed_on_the_token(path: str, new_hub: LocalHub, proxy: FaultProxy) -> None:
    proxy.rule = every(matching("POST", path), Answer(403, b"<html>", NGINX))
    done = run_tool("stress-test", "-c", "2", hub=new_hub, proxy=proxy)
    assert done.code == 1 and not tool_users(new_hub)
    assert "something in front of the hub (nginx/1.22.1) answered 403" in done.summary
    assert "something in front of the hub denies requests" in done.summary
    assert "token" not in done.summary and "scope" not in done.summary


def test_a_limit_of_nginx_is_not_the_hubs_throttling(new_hub: LocalHub, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.rule = every(matching("POST", "/server$"), Answer(429, b"<html>", NGINX))
    words = ("stress-test", "-c", "1", "--server-timeout", "10s")
    done, results = run_for_results(tmp_path / "r", *words, hub=new_hub, proxy=proxy)
    assert results["http"]["throttled"] == 0 and results["http"]["in_front"].keys() == {"429"}
    assert "exempt this machine" in done.summary and "concurrent_spawn_limit" not in done.summary


def test_a_hub_that_wants_a_login_first_is_recognised(make_hub: Callable[..., LocalHub]) -> None:
    never = """
class Mine(DummyAuthenticator):
    async def refresh_user(self, user, handler=None):
        return False
c.JupyterHub.authenticator_class = Mine
c.Authenticator.refresh_pre_spawn = True
"""
    hub = make_hub(version=OLD_HUB, config=never)
    done = run_tool("stress-test", "-c", "2", hub=hub)
    assert "2 × the hub denies this: auth has expired for <user>, login again (403)" in done.summary
    assert "refresh_pre_spawn" in done.summary and not tool_users(hub)


def test_a_token_that_expires_meanwhile_is_named(new_hub: LocalHub, proxy: FaultProxy) -> None:
    proxy.rule = FromThenOn(matching("POST", "/server$"), hub_answer(403, b"{}"), seconds=1e9)
    done = run_tool("stress-test", "-c", "2", "--cleanup-timeout", "2s", hub=new_hub, proxy=proxy)
    assert done.code == 4 and "the hub no longer accepts the token (403)" in done.summary
    assert "the token was revoked, or has expired: make another" in done.summary
    assert run_tool("purge", hub=new_hub).code == 0


def test_a_hub_whose_version_is_stripped_is_measured_as_before(new_hub: LocalHub, proxy: FaultProxy) -> None:
    proxy.strips = "X-JupyterHub-Version"
    done = run_tool("stress-test", "-c", "3", hub=new_hub, proxy=proxy)
    assert done.code == 0 and not tool_users(new_hub)
    assert "something in front" not in done.summary


def test_a_name_stays_claimed_after_a_lost_answer() -> None:
    """The hub may act late: it lists nobody yet."""

    class Lossy(HubWithUsers):
        def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
            if request.method == "POST":
                raise requests.ConnectionError("reset")
            return super().send(request, *args, **kwargs)

    hub, claims = hst.Hub(ENDPOINT, TimeTraveller(Lossy())), hst.Claims()
    with pytest.raises(hst.HubRefused):
        hst.make_batch(["hub-stress-test-1"], hub, hst.Recorder(), claims)
    assert claims.ours == ["hub-stress-test-1"]
