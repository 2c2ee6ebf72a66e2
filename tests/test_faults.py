"""Every fault in every phase of a run, on real hubs: nothing is left behind, the run ends by itself and says why.

    python -m pytest -m faults -n 8

prints a table: fault, phase, exit code, users left, seconds, whether the output said why.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import MODULE, tool_users
from fault_proxy import (
    Answer,
    AnswerAfter,
    Fault,
    FaultProxy,
    HalfBody,
    Request,
    ResetAfter,
    ResetBefore,
    ResetStream,
    first,
    matching,
)
from localhub import LocalHub

pytestmark = pytest.mark.faults

COUNT = 8
WORDS = ["stress-test", "-c", str(COUNT), "-b", "4", "--hold", "2s", "--server-timeout", "8s"]
HTML = {"Content-Type": "text/html"}
BAD_GATEWAY = Answer(502, b"<html><h1>502 Bad Gateway</h1></html>", HTML)
UNAVAILABLE = Answer(503, b"<html><h1>503 Service Unavailable</h1></html>", HTML)
LIMIT = Answer(429, b'{"status": 429, "message": "Active user limit exceeded. Try again in a few minutes."}')
LOCKED = Answer(500, b'{"status": 500, "message": "database is locked"}')
REVOKED = Answer(403, b'{"status": 403, "message": "Missing or invalid credentials."}')

Match = Callable[[Request], bool]


class Holding:
    """Recognises the pings that come when all servers are ready and held."""

    def __init__(self) -> None:
        self._streams = 0
        self._last_s = 0.0

    def __call__(self, request: Request) -> bool:
        if request.path.endswith("/progress"):
            self._streams, self._last_s = self._streams + 1, time.monotonic()
        ping = bool(re.search("/users/[^/]+$", request.path)) and request.method == "GET"
        return ping and self._streams >= COUNT and time.monotonic() - self._last_s > 0.9


PHASES: dict[str, Callable[[], Match]] = {
    "listing": lambda: matching("GET", r"/users\?"),
    "creating": lambda: matching("POST", "/users$"),
    "starting": lambda: matching("POST", "/server$"),
    "waiting": lambda: matching("GET", "/progress$"),
    "holding": Holding,
    "stopping": lambda: matching("DELETE", "/server$"),
    "deleting": lambda: matching("DELETE", "/users/[^/]+$"),
}


class FromThenOn:
    """A fault for every request from the first that matches on, for so many seconds.

    The first gets `at_first` instead, if that is given; `act` is done once, before it.
    """

    def __init__(
        self,
        match: Match,
        fault: Fault | None,
        seconds: float,
        act: Callable[[], None] | None = None,
        at_first: Fault | None = None,
    ) -> None:
        self._match, self._fault, self._seconds, self._act, self._at_first = match, fault, seconds, act, at_first
        self._began_s: float | None = None
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Fault | None:
        with self._lock:
            if self._began_s is None and self._match(request):
                self._began_s = time.monotonic()
                if self._act:
                    self._act()
                if self._at_first:
                    return self._at_first
        active = self._began_s is not None and time.monotonic() < self._began_s + self._seconds
        return self._fault if active else None


def run_through(proxy: FaultProxy, hub: LocalHub, *more: str, limit_s: float = 100) -> tuple[int, str, str, float]:
    """Exit code, stdout, both outputs and seconds of a run through the proxy."""
    began_s = time.monotonic()
    env = os.environ | hub.environment | {"JUPYTERHUB_ENDPOINT": proxy.url + "/hub/api"}
    words = [sys.executable, "-W", "error", str(MODULE), *WORDS, *more]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=limit_s)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert hub.token not in said
    return done.returncode, done.stdout, said, time.monotonic() - began_s


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(slow_spawn_timeout_s=0, spawn_s=0.4) as hub:
        yield hub


Record = Callable[[str, object], None]


def check(record: Record, row: tuple[object, ...], hub: LocalHub, ran: tuple[int, str, str, float], why: str) -> None:
    """The hub came back: nothing is left, the exit code says how it went, the output says why."""
    code, stdout, said, took_s = ran
    left = sorted(tool_users(hub))
    explained = re.search(why, said) is not None
    record("fault", (*row, code, len(left), f"{took_s:.1f}", "yes" if explained else "NO"))
    assert not left, said
    assert code in (0, 1, 3), said
    assert code != 3 or row[1] == "listing", said
    assert explained, said


ONCE: dict[str, tuple[Fault, str]] = {
    "reset before the hub saw it": (ResetBefore(), "[1-9] repeated|connection reset"),
    "reset after the hub acted": (ResetAfter(), "[1-9] repeated|connection reset"),
    "504 after the hub acted": (AnswerAfter(504, b"<html>", HTML), "[1-9] repeated|504"),
    "503 after the hub acted": (AnswerAfter(503, b"<html>", HTML), "[1-9] repeated|503"),
    "502 after the hub acted": (AnswerAfter(502, b"<html>", HTML), "502"),
    "half an answer": (HalfBody(), "[1-9] repeated|broke off|connection reset"),
    "a single 500": (LOCKED, "500"),
    "a single 429": (LIMIT, "429|[1-9] repeated|throttled"),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ONCE)
def test_a_single_fault(name: str, phase: str, hub: LocalHub, record_property: Record) -> None:
    fault, why = ONCE[name]
    if phase == "waiting" and fault in (ResetAfter(), HalfBody()):
        fault = ResetStream(3)  # in the middle of the progress stream
    if phase == "waiting":
        why = "8 of 8"  # the moment came from the user model instead
    if phase == "holding":
        why = "answered +1 × .* to ping"
    if phase in ("starting", "stopping", "deleting") and fault == HalfBody():
        fault = ResetAfter()  # these answers have no body
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = first(1, PHASES[phase](), fault)
        ran = run_through(proxy, hub)
        assert any(entry.fault for entry in proxy.requests)
        check(record_property, (name, phase), hub, ran, why)


FOR_A_WHILE: dict[str, tuple[Fault, float, str]] = {
    "502 pages for 5 s": (BAD_GATEWAY, 5, "502"),
    "503 pages for 5 s": (UNAVAILABLE, 5, "503|[1-9]\\d* repeated"),
    "404 pages of a proxy for 5 s": (Answer(404, b"<html>default backend", HTML), 5, "404"),
    "429 without Retry-After for 5 s": (LIMIT, 5, "429|throttled|[1-9]\\d* repeated"),
    "database locked for 5 s": (LOCKED, 5, "500"),
    "connections reset for 5 s": (ResetBefore(), 5, "connection reset|[1-9]\\d* repeated"),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", FOR_A_WHILE)
def test_a_fault_for_a_while(name: str, phase: str, hub: LocalHub, record_property: Record) -> None:
    fault, seconds, why = FOR_A_WHILE[name]
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = FromThenOn(PHASES[phase](), fault, seconds)
        ran = run_through(proxy, hub)
        assert any(entry.fault for entry in proxy.requests)
        check(record_property, (name, phase), hub, ran, why)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("page", [BAD_GATEWAY, UNAVAILABLE], ids=lambda page: str(page.status))
def test_a_hub_that_acts_and_is_away_then(page: Answer, phase: str, hub: LocalHub, record_property: Record) -> None:
    with FaultProxy(hub.endpoint) as proxy:
        acted = AnswerAfter(page.status, page.body, HTML)
        proxy.rule = FromThenOn(PHASES[phase](), page, 4, at_first=acted)
        ran = run_through(proxy, hub)
        assert [entry.fault for entry in proxy.requests if entry.fault][0] == "AnswerAfter"
        name = f"{page.status} after the hub acted, then for 4 s"
        check(record_property, (name, phase), hub, ran, f"{page.status}|[1-9]\\d* repeated")


@pytest.mark.parametrize("phase", PHASES)
def test_two_minutes_of_silence(phase: str, hub: LocalHub, record_property: Record) -> None:
    with FaultProxy(hub.endpoint) as proxy:
        release = threading.Timer(120, lambda: proxy.silence(False))
        proxy.rule = FromThenOn(PHASES[phase](), None, 0, lambda: (proxy.silence(True), release.start()))  # type: ignore[func-returns-value,arg-type]
        ran = run_through(proxy, hub, limit_s=400)
        release.join()
        check(record_property, ("silence for 120 s", phase), hub, ran, "no answer in time|not ready after")


@pytest.mark.parametrize("phase", PHASES)
def test_a_hub_that_restarts_without_its_state(phase: str, hub: LocalHub, record_property: Record) -> None:
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = FromThenOn(PHASES[phase](), None, 0, hub.restart)
        ran = run_through(proxy, hub)
        why = "may have restarted|connection reset|[1-9]\\d* repeated|was gone before the end|PASSED"
        check(record_property, ("the hub restarts, state gone", phase), hub, ran, why)


def check_left(
    record: Record, row: tuple[str, str], proxy: FaultProxy, ran: tuple[int, str, str, float], why: str
) -> None:
    """The hub did not come back: exit code 4 with every name that the hub was not seen to delete."""
    code, stdout, said, took_s = ran
    entries = proxy.requests
    made = any(e.method == "POST" and e.path.endswith("/users") and e.status == 201 for e in entries)
    gone = {
        e.path.rpartition("/")[2]
        for e in entries
        if e.method == "DELETE" and e.status == 204 and "/server" not in e.path
    }
    expected = {f"hub-stress-test-{n}" for n in range(1, COUNT + 1)} - gone if made else set()
    named = set(re.findall(r"hub-stress-test-\d+", stdout))
    explained = re.search(why, said) is not None
    record("fault", (*row, code, f"{len(named)} named", f"{took_s:.1f}", "yes" if explained else "NO"))
    assert explained, said
    if made:
        assert code == 4, said
        assert named >= expected and "hub-stress-test purge" in stdout
    else:
        assert code in ((3,) if row[1] == "listing" else (1, 4)), said


@pytest.mark.parametrize("phase", PHASES)
def test_a_token_that_is_revoked(phase: str, hub: LocalHub, record_property: Record) -> None:
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = FromThenOn(PHASES[phase](), REVOKED, 1e9)
        ran = run_through(proxy, hub)
        check_left(record_property, ("token revoked", phase), proxy, ran, "403")


@pytest.mark.parametrize("phase", PHASES)
def test_a_hub_that_dies_for_good(phase: str, hub: LocalHub, record_property: Record) -> None:
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = FromThenOn(PHASES[phase](), None, 0, hub.kill)
        ran = run_through(proxy, hub, "--cleanup-timeout", "15s")
        check_left(record_property, ("the hub dies for good", phase), proxy, ran, "connection reset|connection refused")


def test_a_hub_that_exits_because_too_many_spawns_failed(record_property: Record) -> None:
    with LocalHub(fail_rate=1, consecutive_failure_limit=3) as hub, FaultProxy(hub.endpoint) as proxy:
        ran = run_through(proxy, hub, "--cleanup-timeout", "10s")
        why = "no node has 4 GB of memory free"
        check_left(record_property, ("exit after failed spawns", "starting"), proxy, ran, why)
        assert not hub.running


def test_an_active_server_limit_ends_the_run_by_itself(record_property: Record) -> None:
    with LocalHub(active_server_limit=3) as hub, FaultProxy(hub.endpoint) as proxy:
        ran = run_through(proxy, hub)
        check(
            record_property,
            ("active_server_limit 3", "starting"),
            hub,
            ran,
            "still throttled after 8 s: Active user limit",
        )
        assert "5 × still throttled" in ran[1]


@pytest.mark.parametrize("version", ["2.3.1", "4.1.6", None])
@pytest.mark.parametrize("phase", ["starting", "stopping", "deleting"])
@pytest.mark.parametrize("name", ["reset after the hub acted", "504 after the hub acted", "a single 500"])
def test_hubs_of_other_versions(name: str, phase: str, version: str | None, record_property: Record) -> None:
    fault, why = ONCE[name]
    with LocalHub(version=version, slow_spawn_timeout_s=0, spawn_s=0.4) as hub, FaultProxy(hub.endpoint) as proxy:
        proxy.rule = first(2, PHASES[phase](), fault)
        check(record_property, (f"{name}, hub {version or 'newest'}", phase), hub, run_through(proxy, hub), why)


@pytest.mark.parametrize("version", ["1.5.1", "2.3.1", "4.1.6", None])
def test_servers_that_take_longer_to_stop_than_the_hub_waits(version: str | None, record_property: Record) -> None:
    with LocalHub(version=version, stop_s=3, slow_stop_timeout_s=1) as hub, FaultProxy(hub.endpoint) as proxy:
        ran = run_through(proxy, hub)
        check(record_property, (f"slow stops, hub {version or 'newest'}", "stopping"), hub, ran, "8 users deleted")
        assert ran[0] == 0


def interrupt(
    hub: LocalHub, number: int, match: Match | None, after_s: float, *more: str
) -> tuple[int, str, str, float]:
    """A run that is sent a signal at the first matching request, or (None) so many seconds after it began its work."""
    with FaultProxy(hub.endpoint) as proxy:
        env = os.environ | hub.environment | {"JUPYTERHUB_ENDPOINT": proxy.url + "/hub/api"}
        words = [sys.executable, "-W", "error", str(MODULE), *WORDS, *more]
        run = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        struck = threading.Event()
        signalled_s: list[float] = []

        def strike() -> None:
            signalled_s.append(time.monotonic())
            run.send_signal(number)
            struck.set()

        begun = matching("POST", "/users$")
        delayed = threading.Timer(after_s, strike)
        proxy.rule = FromThenOn(match or begun, None, 0, strike if match else delayed.start)
        stdout, stderr = run.communicate(timeout=90)
        assert struck.wait(10)
        load = [e for e in proxy.requests if e.method == "POST" and e.time > signalled_s[0] + 1]
        assert not load, "load was sent more than a second after the signal"
        assert "Traceback" not in stderr, stderr
        return run.returncode, stdout, stdout + stderr, time.monotonic() - signalled_s[0]


SIGNALS = {"SIGINT": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "listing"])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_in_each_phase(name: str, phase: str, hub: LocalHub, record_property: Record) -> None:
    number, expected = SIGNALS[name]
    ran = interrupt(hub, number, PHASES[phase](), 0)
    left = tool_users(hub)
    record_property(
        "fault", (name, phase, ran[0], len(left), f"{ran[3]:.1f}", "yes" if "INTERRUPTED" in ran[1] else "NO")
    )
    assert not left
    assert (ran[0], "INTERRUPTED" in ran[1]) == (expected, True)


@pytest.mark.parametrize("version", ["2.3.1", "4.1.6", None])
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_random_moments_twenty_times(name: str, version: str | None, record_property: Record) -> None:
    number, expected = SIGNALS[name]
    rng = random.Random()
    slow_spawn_timeout_s = rng.choice([0, 10])
    with LocalHub(version=version, slow_spawn_timeout_s=slow_spawn_timeout_s, spawn_s=0.4, stop_s=0.1) as hub:
        codes, left, longest_s = set(), 0, 0.0
        for _ in range(20):
            after_s = rng.uniform(0, 3.2)
            code, stdout, said, took_s = interrupt(hub, number, None, after_s)
            left += len(tool_users(hub))
            codes.add(code)
            longest_s = max(longest_s, took_s)
            assert not tool_users(hub), (after_s, said)
            assert code == expected or (code == 0 and "PASSED" in stdout), (after_s, said)
        row = (f"{name} × 20, hub {version or 'newest'}", "random", "/".join(map(str, sorted(codes))), left)
        record_property("fault", (*row, f"{longest_s:.1f} at most", "yes"))


def test_the_second_signal_leaves_at_once_and_says_how_to_purge(record_property: Record) -> None:
    with LocalHub(stop_s=5, slow_spawn_timeout_s=0) as hub:
        run = subprocess.Popen(
            [sys.executable, str(MODULE), *WORDS, "--run", "x"],
            env=os.environ | hub.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stderr
        for line in run.stderr:
            if "Holding" in line:
                break
        run.send_signal(signal.SIGINT)
        for line in run.stderr:
            if "Cleaning up" in line:
                break
        time.sleep(0.5)
        began_s = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate(timeout=10)
        assert time.monotonic() - began_s < 2
        assert run.returncode == 130
        assert "8 users remain on the hub" in stderr and "hub-stress-test purge --run x" in stderr
        record_property("fault", ("SIGINT twice", "stopping", 130, "8 said", "0.1", "yes"))
        env = os.environ | hub.environment
        purge = [sys.executable, str(MODULE), "purge", "--run", "x"]
        assert subprocess.run(purge, env=env, capture_output=True, timeout=60).returncode == 0
        assert not tool_users(hub)
