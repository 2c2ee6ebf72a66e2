"""Without admin rights: named servers of one's own, on hubs of three versions, beside others of the same owner's."""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import AnswerAfter, Fault, FaultProxy, ResetAfter, ResetBefore, first, hub_answer, matching
from localhub import LocalHub
from test_faults import (
    BAD_GATEWAY,
    NO_BACKEND,
    ONCE,
    RETRIES,
    SEED,
    SIGNALS,
    FromThenOn,
    Match,
    Ran,
    Record,
    any_of,
    expected_once,
    note,
    once_in,
    refused,
    rows_of,
    run_through,
)
from test_hub_setup import refusal
from tool import row, run_for_results, run_tool, start_tool, wait_until

NEWEST_AND_OLDEST = [None, "1.5.1"]  # which list servers that are stopped, and which do not
ALLOWED = 14
THEIR_SERVERS = ["my-notebook", "hub-stress-tester", "hub-stress-test-x"]  # the last one is stopped
WORDS = ["stress-test", "--own-servers", "--count", "6", "--batch-size", "4"]
PURGE = ["purge", "--own-servers"]


class Carol:
    """A hub's user without admin rights, whose default server and some named ones are none of the tool's business."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        for path in ("server", *(f"servers/{name}" for name in THEIR_SERVERS)):
            assert hub.call("POST", f"/users/carol/{path}")[0] in (201, 202)
        wait_until(lambda: sum(one["ready"] for one in self.running().values()) == 4)
        if hub.options.stub_labs:  # which tell the hub of their activity
            wait_until(lambda: len(re.findall(r" POST \S*/users/carol/activity ", hub.log())) == 4)
        hub.call("DELETE", f"/users/carol/servers/{THEIR_SERVERS[-1]}")
        self._before = self._theirs()

    def running(self) -> dict[str, dict[str, Any]]:
        """What the hub says of her servers that are not stopped."""
        servers: dict[str, dict[str, Any]] = self.hub.users()["carol"]["servers"]
        return servers

    def in_database(self) -> set[str]:
        """Every named server that there is, also a stopped one, which hubs before 3.0 do not list."""
        with contextlib.closing(sqlite3.connect(self.hub.options.database)) as database:
            return {name for (name,) in database.execute("select name from spawners where name != ''")}

    def ours(self) -> set[str]:
        """The named servers that the tool made."""
        return self.in_database() - set(THEIR_SERVERS)

    def _theirs(self) -> Any:
        theirs = {name: one for name, one in self.running().items() if name not in self.ours()}
        return theirs, self.hub.users().keys(), self.in_database() & set(THEIR_SERVERS)

    def check(self) -> None:
        """Nothing of the tool's is there, and all of hers is as it was."""
        assert not self.ours()
        assert self._theirs() == self._before


Carols = Callable[..., Carol]


@pytest.fixture(scope="module")
def carol_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Carols]:
    """Carol, on a hub of each version, or with options of the test's own; tests share them."""
    carols: dict[str, Carol] = {}
    with contextlib.ExitStack() as closing:

        def carol(**options: Any) -> Carol:
            if (key := str(options)) not in carols:
                database = tmp_path_factory.mktemp("hub") / "hub.sqlite"
                usual = {"owner": "carol", "named_servers": ALLOWED, "slow_spawn_timeout_s": 0, "spawn_s": 0.2}
                hub = closing.enter_context(LocalHub(database=str(database), **(usual | options)))
                carols[key] = Carol(hub)
            return carols[key]

        yield carol


# ==== Runs ===========================================================================================================


@pytest.mark.parametrize("version", NEWEST_AND_OLDEST)
def test_servers_start_and_are_removed_beside_the_owners_others(
    version: str | None, carol_on: Carols, tmp_path: Path
) -> None:
    """All of them, then with some that fail, then more than the hub allows."""
    carol = carol_on(version=version)
    done, found = run_for_results(tmp_path / "all.json", *WORDS, hub=carol.hub)
    carol.check()
    assert done.code == 0 and "6 of 6 servers became ready" in done.summary
    assert "6 servers removed, none left" in done.summary and "user" not in done.stdout
    assert not any(found["users"].values())
    servers = found["servers"]
    assert (servers["removed"], servers["kept"], servers["left_behind"]) == (6, 0, [])
    assert row(done.stdout, "start request") == ["6", "0"]
    assert found["operations"]["delete_user"]["count"] == 6
    assert row(done.stdout, "ping")[1] == "0"
    assert ("the token lacks the scope read:metrics" in done.summary) == (version != "1.5.1")

    done = run_tool(*WORDS, "--profile", '{"fail_rate": 0.4}', hub=carol.hub)
    carol.check()
    assert done.code == 1 and re.search("[23] × no node has 4 GB of memory free", done.summary)
    assert "6 servers removed, none left" in done.summary and "answered 403" not in done.summary

    done, found = run_for_results(tmp_path / "more.json", *WORDS[:-3], "15", hub=carol.hub)
    carol.check()
    assert done.code == 1 and found["http"]["retries"] == 0 and found["operations"]["start_server"]["failed"] == 0
    assert (
        "the hub allows each user 14 named servers, your others included, and this run is to start 15:" in done.summary
    )
    assert "servers removed, none left" in done.summary


def test_a_hub_without_named_servers_is_named_at_once(hub: LocalHub) -> None:
    token = hub.call("POST", "/users/alice/tokens", {"expires_in": 600})[1]["token"]
    done = run_tool(*WORDS, hub=hub, env={"JUPYTERHUB_API_TOKEN": token})
    assert done.code == 1 and "the hub allows no named servers" in done.summary
    assert "0 of 6 servers became ready" in done.summary and "0 servers removed, none left" in done.summary
    assert not hub.users()["alice"]["servers"]


@pytest.mark.parametrize(("run", "count", "left"), [("ci-123456789", 10, 11), ("a--b", 2, 12)])
def test_a_new_hub_is_asked_for_no_refused_names(run: str, count: int, left: int, carol_on: Carols) -> None:
    carol, words = carol_on(version=None), ("stress-test", "--own-servers", "--count", str(count))
    assert carol.hub.call("POST", f"/users/carol/servers/hub-stress-test-{run}-{count}")[0] == 400
    done = run_tool(*words, "--run", run, hub=carol.hub)
    assert done.code == 3 and f"--run NAME may have at most {left} characters here" in done.stderr
    carol.check()
    assert run_tool(*words, "--run", "x" * left, hub=carol.hub).code == 0
    carol.check()


@pytest.mark.parametrize("version", NEWEST_AND_OLDEST)
def test_people_work_behind_a_proxy_with_their_owners_token(
    version: str | None, carol_on: Carols, tmp_path: Path
) -> None:
    carol = carol_on(version=version, real_proxy=True, stub_labs=True)
    words = ("--within", "1s", "--work", "--think", "0.2s", "--stay", "1s", "--run", "class")
    done, found = run_for_results(tmp_path / "x.json", *WORDS, *words, hub=carol.hub)
    carol.check()
    assert done.code == 0, done
    assert found["people"]["at_work"] == 6 and not found["people"]["failed"]
    assert found["operations"]["stay"]["count"] == found["servers"]["removed"] == 6
    truth = carol.hub.truth()
    assert (truth["servers"], truth["kernels"], truth["open_websockets"]) == (3, 0, 0)  # hers


def test_kept_servers_run_until_their_run_is_purged(carol_on: Carols) -> None:
    carol = carol_on(version=None)
    kept = {f"hub-stress-test-{run}{n}" for run in ("", "a-") for n in range(1, 4)}
    for run in ([], ["--run", "a"]):
        done = run_tool(*WORDS[:-3], "3", "--keep", *run, hub=carol.hub)
        remedy = " ".join(["hub-stress-test purge --own-servers", *run])
        assert f"3 servers kept, as asked; remove them with: {remedy}" in done.summary
    assert carol.ours() == kept and all(carol.running()[name]["ready"] for name in kept)
    assert run_tool(*WORDS[:-3], "2", hub=carol.hub).code == 0  # which takes other names
    assert carol.ours() == kept
    done = run_tool(*PURGE, "--run", "a", hub=carol.hub)
    assert done.code == 0 and done.summary.startswith("PASSED: 3 servers removed")
    carol.hub.call("DELETE", "/users/carol/servers/hub-stress-test-1")  # stopped, and still there
    assert len(carol.ours()) == 3
    assert "3 servers removed, none left" in run_tool(*PURGE, hub=carol.hub).summary
    carol.check()


def test_servers_that_stay_are_named_with_the_command_for_them(carol_on: Carols, tmp_path: Path) -> None:
    carol = carol_on(version="2.3.1")  # which does not list them
    locked = hub_answer(500, b'{"message": "database is locked"}')
    with FaultProxy(carol.hub.endpoint) as proxy:
        proxy.rule = lambda one: locked if one.body == b'{"remove": true}' and one.path.endswith(("-2", "-3")) else None
        words = ("--run", "ci", "--cleanup-timeout", "3s")
        done, found = run_for_results(tmp_path / "x.json", *WORDS, *words, hub=carol.hub, proxy=proxy)
    left = {"hub-stress-test-ci-2", "hub-stress-test-ci-3"}
    assert done.code == 4 and carol.ours() == left == set(found["servers"]["left_behind"])
    assert "4 servers removed; 2 ARE STILL THERE: hub-stress-test-ci-2 hub-stress-test-ci-3" in done.summary
    assert "remove them with: hub-stress-test purge --own-servers --run ci" in done.summary
    for name in left:
        carol.hub.call("DELETE", f"/users/carol/servers/{name}", {"remove": True})
    carol.check()


# ==== Tokens =========================================================================================================


def test_a_token_is_good_that_may_use_its_owners_servers(carol_on: Carols) -> None:
    carol = carol_on(version=None)
    hub = carol.hub

    def token_with(*scopes: str) -> str:
        status, model = hub.call("POST", "/users/carol/tokens", {"scopes": [f"{scope}!user=carol" for scope in scopes]})
        assert status == 201, model
        token: str = model["token"]
        return token

    for words, scopes in (([*WORDS[:-3], "2"], ["servers"]), (PURGE, ["delete:servers", "read:servers"])):
        assert run_tool(*words, hub=hub, env={"JUPYTERHUB_API_TOKEN": token_with(*scopes)}).code == 0
    carol.check()
    needs = "--own-servers needs: delete:servers!user=carol, servers!user=carol. Put"
    for token, options, why in (
        (token_with("read:servers"), {}, needs),
        (token_with("servers"), {"visit": True}, "The token lacks what visits need: access:servers!user=carol."),
        (hub.token, {}, "belongs to the service hub-stress-test, which has no servers of its own: put one that you"),
        ("0123456789", {}, "refuses the token (GET /user answered 403): it is wrong, has expired"),
        ("0123456789", {}, f"Put one that you make at {hub.endpoint.removesuffix('/api')}/token into"),
    ):
        assert why in refusal(hub.endpoint, token, own_servers=True, **options)
    assert "test with servers of your own: --own-servers" in refusal(hub.endpoint, hub.owner_token)


def test_without_scopes_a_token_of_no_admin_is_named(carol_on: Carols) -> None:
    hub = carol_on(version="1.5.1").hub
    assert "test with servers of your own: --own-servers" in refusal(hub.endpoint, hub.owner_token)
    assert "--own-servers" not in refusal(hub.endpoint, hub.owner_token, hst.ACTIVITY)


# ==== Faults and signals =============================================================================================

PHASES: dict[str, Match] = {
    "starting": matching("POST", "/servers/"),
    "stopping": lambda request: request.method == "DELETE" and not request.body,
    "deleting": lambda request: request.method == "DELETE" and b"remove" in request.body,
}
FEW = ["stress-test", "--own-servers", "--count", "6", "--batch-size", "3"]


def check_run(carol: Carol, ran: Ran, codes: set[int], why: str, record: Record, row: tuple[str, str]) -> None:
    carol.check()
    note(record, row, ran.done, 0, ran.took_s, why)
    assert ran.done.code in codes, ran.done
    assert "servers removed, none left" in rows_of(ran.done, "cleanup"), ran.done


@pytest.mark.faults
@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("version", NEWEST_AND_OLDEST)
def test_whatever_comes_once_in_each_phase_leaves_nothing(
    version: str | None, name: str, carol_on: Carols, record_property: Record
) -> None:
    carol, (fault, reason, _) = carol_on(version=version), ONCE[name]
    rules = [first(1, match, once_in(phase, fault)) for phase, match in PHASES.items()]
    ran = run_through(carol.hub, any_of(rules), words=FEW)
    assert ran.faults == len(PHASES)
    ends = [expected_once(name, phase) for phase in ("starting", "stopping")]
    for phase, (_, why) in zip(PHASES, [*ends, (0, f"delete server: 1 × {reason}")]):
        row = (f"own servers: {name}, hub {version or 'newest'}", phase)
        check_run(carol, ran, {max(code for code, _ in ends)}, why, record_property, row)


AWAY: dict[str, tuple[Fault, Fault | None]] = {
    "502 pages for 4 s": (BAD_GATEWAY, AnswerAfter(502, b"<html>")),
    "404 pages for 4 s": (NO_BACKEND, None),
    "resets for 4 s": (ResetBefore(), ResetAfter()),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", AWAY)
@pytest.mark.parametrize("version", NEWEST_AND_OLDEST)
def test_a_hub_away_in_any_phase_has_nothing_left(
    version: str | None, name: str, carol_on: Carols, record_property: Record
) -> None:
    carol, (fault, at_first) = carol_on(version=version), AWAY[name]
    rules = [FromThenOn(PHASES[phase], fault, 4, at_first=at_first) for phase in PHASES]
    ran = run_through(carol.hub, any_of(rules), words=FEW)
    assert all(rule.begun for rule in rules)
    why = rf"{refused(502)}|{refused(404)}|connection reset|{RETRIES}"
    row = (f"own servers: {name}, hub {version or 'newest'}", "+".join(PHASES))
    check_run(carol, ran, {0, 1}, why, record_property, row)


@pytest.mark.faults
@pytest.mark.parametrize("version", NEWEST_AND_OLDEST)
def test_signals_at_ten_random_moments_leave_nothing(
    version: str | None, carol_on: Carols, record_property: Record
) -> None:
    rng = random.Random(f"{SEED} {version}")
    carol = carol_on(version=version, stop_s=0.1, slow_spawn_timeout_s=rng.choice([0, 10]))
    codes = set()
    for number, code in [*SIGNALS.values()] * 5:
        with FaultProxy(carol.hub.endpoint) as proxy, start_tool(*FEW, hub=carol.hub, proxy=proxy) as run:
            strike = threading.Timer(rng.uniform(0, 1.6), run.send_signal, [number])
            proxy.rule = FromThenOn(PHASES["starting"], act=strike.start)
            done = run.outcome()
        codes.add(done.code)
        carol.check()
        assert done.code in (code, 0) and "servers removed, none left" in rows_of(done, "cleanup"), done
    row = (f"own servers: 10 signals, hub {version or 'newest'}", "random", "/".join(map(str, sorted(codes))))
    record_property("fault", (*row, 0, "", "yes"))
    assert {130, 143} <= codes
