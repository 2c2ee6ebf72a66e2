"""Every fault in every phase of a run, on real hubs: nothing is left behind, the run ends by itself and says why.

    python -m pytest -m faults -n 8

prints a table: fault, phase, exit code, users left, seconds, whether the summary said why.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

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
    ResetStream,
    Rule,
    Silence,
    first,
    hub_answer,
    matching,
)
from localhub import LocalHub
from tool import PATIENCE_S, THEIRS, Outcome, run_tool, start_tool, tool_users, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]

COUNT = 8
BATCH = 4
WORDS = ["stress-test", "-c", str(COUNT), "-b", str(BATCH), "--hold", "5s"]
SEED = 20261121  # of the moments at which signals are sent
HTML = {"Content-Type": "text/html"}
BAD_GATEWAY = Answer(502, b"<html><h1>502 Bad Gateway</h1></html>", HTML)
UNAVAILABLE = Answer(503, b"<html><h1>503 Service Unavailable</h1></html>", HTML)
NO_BACKEND = Answer(404, b"<html>default backend", HTML)
LIMIT = hub_answer(429, b'{"status": 429, "message": "Active user limit exceeded. Try again in a few minutes."}')
LOCKED = hub_answer(500, b'{"status": 500, "message": "database is locked"}')
REVOKED = hub_answer(403, b'{"status": 403, "message": "Missing or invalid credentials."}')

Match = Callable[[Request], bool]
Record = Callable[[str, object], None]


# ---- Phases ----


@dataclasses.dataclass
class Holding:
    """Recognises reads of one user (a regex of names) that come while all servers are held.

    They are held from the moment on at which the hub calls all of them ready; half a second later the tool knows, too.
    Its log says so: whoever asked it would make it, and the proxy, wait.
    """

    hub: LocalHub
    names: str
    ready_s: float = math.inf

    def __post_init__(self) -> None:
        self._log_before = self.hub.log_path.stat().st_size

    def __call__(self, request: Request) -> bool:
        if request.method != "GET" or not re.search("/users/[^/]+$", request.path):
            return False
        if self.ready_s == math.inf:
            with self.hub.log_path.open() as log:
                log.seek(self._log_before)
                ready = set(re.findall(r"User (\S+) took \S+ seconds to start", log.read()))
            self.ready_s = time.monotonic() if len(ready) == COUNT else math.inf
        named = re.search(f"/users/hub-stress-test-{self.names}$", request.path) is not None
        return named and time.monotonic() > self.ready_s + 0.5


PHASES: dict[str, Callable[[LocalHub], Match]] = {
    "listing": lambda hub: matching("GET", r"/users\?"),
    "creating": lambda hub: matching("POST", "/users$"),
    "starting": lambda hub: matching("POST", "/server$"),
    "waiting": lambda hub: matching("GET", "/progress$"),
    "holding": lambda hub: Holding(hub, "1"),  # whom the pings read
    "looking": lambda hub: Holding(hub, "[2-8]"),  # who are read once, at the end of the hold
    "stopping": lambda hub: matching("DELETE", "/server$"),
    "deleting": lambda hub: matching("DELETE", "/users/[^/]+$"),
}


@dataclasses.dataclass
class FromThenOn:
    """A fault for every request from the first that matches on, for so many seconds.

    The first gets `at_first` instead, if that is given; `act` is done once, before it.
    """

    match: Match
    fault: Fault | None = None
    seconds: float = 0.0
    act: Callable[[], object] = lambda: None
    at_first: Fault | None = None
    began_s: float = math.inf
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def begun(self) -> bool:
        return self.began_s < math.inf

    def __call__(self, request: Request) -> Fault | None:
        with self.lock:
            if not self.begun and self.match(request):
                self.began_s = time.monotonic()
                self.act()
                return self.at_first or self.fault
        return self.fault if self.begun and time.monotonic() < self.began_s + self.seconds else None


# ---- Runs, and what they say ----


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[LocalHub]:
    with LocalHub(slow_spawn_timeout_s=0, spawn_s=0.4) as hub:
        yield hub


@pytest.fixture
def hub(shared_hub: LocalHub) -> Iterator[LocalHub]:
    """The shared hub; it is as before when a test has killed it or had to leave users."""
    hub = shared_hub
    yield hub
    if not hub.running:
        hub.start()
    hst.delete_users(sorted(tool_users(hub)), hub.endpoint, hst.get_session(hub.token))


def any_of(rules: Sequence[Rule]) -> Rule:
    """The fault of the first of these rules that has one for a request."""

    def rule(request: Request) -> Fault | None:
        faults = [one(request) for one in rules]  # each of them counts its requests
        return next(filter(None, faults), None)

    return rule


@dataclasses.dataclass
class Ran:
    """A run through a proxy: what it said, how long it took, and its requests."""

    hub: LocalHub
    done: Outcome
    took_s: float
    requests: list[Request]

    @property
    def faults(self) -> int:
        return sum(entry.fault is not None for entry in self.requests)

    def check(self, record: Record, row: tuple[str, str], codes: set[int], why: str) -> None:
        """The hub is there: nothing is left, all of theirs is, the exit code says how it went, the summary says why."""
        done, said = self.done, self.done.stdout + self.done.stderr
        note(record, row, done, len(tool_users(self.hub)), self.took_s, why)
        assert self.hub.users().keys() == THEIRS and done.code in codes, said
        if done.code == 3:
            assert done.stdout == "", said
        else:
            assert done.stdout.startswith(("PASSED: ", "FAILED: ")[done.code]), said
            assert "users deleted, none left" in rows_of(done, "cleanup"), said

    def check_left(self, record: Record, row: tuple[str, str], code: int, made: int, why: str) -> None:
        """The hub is lost to the run: it names all users that it did not see deleted, and how to purge them."""
        done, said = self.done, self.done.stdout + self.done.stderr
        deletes = [entry for entry in self.requests if entry.method == "DELETE" and entry.status == 204]
        gone = {entry.path.rpartition("/")[2] for entry in deletes if "/server" not in entry.path}
        named = left_according_to(done)
        note(record, row, done, f"{len(named)} named", self.took_s, why)
        assert named == {hst.username(n) for n in range(1, made + 1)} - gone and done.code == code, said
        assert ("hub-stress-test purge" in rows_of(done, "cleanup")) == (code == 4), said


def run_through(
    hub: LocalHub, rule: Rule | None, *more: str, words: Sequence[str] = WORDS, limit_s: float = PATIENCE_S
) -> Ran:
    """A run through a proxy with this rule."""
    began_s = time.monotonic()
    with FaultProxy(hub.endpoint) as proxy:
        proxy.rule = rule
        with start_tool(*words, *more, hub=hub, proxy=proxy) as run:
            done = run.outcome(limit_s)
        return Ran(hub, done, time.monotonic() - began_s, [*proxy.requests])


def rows_of(done: Outcome, *labels: str) -> str:
    """The summary's rows with these labels."""
    facts = done.summary.partition("\n\n")[0].splitlines()
    return "\n".join(line for line in facts if re.match(f"({'|'.join(labels)})  ", line))


def reasons_of(done: Outcome) -> str:
    """Where a run says why: some rows of its summary, or, when nothing was changed, its last sentence."""
    rows = rows_of(done, "but", "because", "servers", "failed", "errors", "requests")
    refusal = re.search("^hub-stress-test: .*", done.stderr, re.MULTILINE)
    return rows or re.sub(r"https?://\S+", "", refusal[0] if refusal else "")


def left_according_to(done: Outcome) -> set[str]:
    """The users that a run says are still there; those in a row it shows as the first `to` the last."""
    rows = re.findall(r"hub-stress-test-(\d+)(?: to -(\d+))?", rows_of(done, "cleanup"))
    return {hst.username(n) for first, last in rows for n in range(int(first), int(last or first) + 1)}


def note(record: Record, row: tuple[str, str], done: Outcome, left: object, took_s: float, why: str) -> None:
    """One line of the table; and the run has to say why."""
    explained = re.search(why, reasons_of(done)) is not None
    record("fault", (*row, done.code, left, f"{took_s:.1f}", "yes" if explained else "NO"))
    assert explained, (why, done.stdout + done.stderr)


# ---- Faults that end ----

RETRIES = r"[1-9]\d* retr"
FRONT = "something in front of the hub answered"


def refused(status: int) -> str:
    """How the summary says that the hub, or what stands in front of it, answered so."""
    return rf"(×|:|with|answered) {status}\b|\({status}\)"


def acted(status: int) -> Fault:
    """A gateway's page in place of an answer of the hub, which has acted."""
    return AnswerAfter(status, b"<html>", HTML)


# what is done once; the reason, as the summary has it; whether the tool retries by itself
ONCE: dict[str, tuple[Fault, str, bool]] = {
    "reset before the hub saw it": (ResetBefore(), "connection reset", True),
    "reset after the hub acted": (ResetAfter(), "connection reset", True),
    "504 after the hub acted": (acted(504), f"{FRONT} 504", True),
    "503 after the hub acted": (acted(503), f"{FRONT} 503", True),
    "502 after the hub acted": (acted(502), f"{FRONT} 502", False),
    "half an answer": (HalfBody(), "(the answer broke off|connection reset)", True),
    "a single 500": (LOCKED, "500", False),
    "a single 429": (LIMIT, "429", True),
}
UNHARMED = "8 ready, 0 failed"


def once_in(phase: str, fault: Fault) -> Fault:
    """The fault, as it can be in that phase."""
    if phase == "waiting" and isinstance(fault, (ResetAfter, HalfBody)):
        return ResetStream(3)  # in the middle of the progress stream
    if phase in ("starting", "stopping", "deleting") and isinstance(fault, HalfBody):
        return ResetAfter()  # these answers have no body
    return fault


def expected_once(name: str, phase: str) -> tuple[int, str]:
    """The exit code after a fault that comes once (or a few times) in a phase, and what the summary says of it."""
    fault, reason, retried = ONCE[name]
    is_done = isinstance(fault, AnswerAfter)  # so that there is nothing to do again
    if phase == "waiting" or (phase == "looking" and not retried):
        return 0, "[78] ready, "  # the tool asks in another way, or again
    if phase in ("holding", "stopping", "deleting"):
        title = {"holding": "ping", "stopping": "stop request", "deleting": "delete user"}[phase]
        return 0, rf"{title}: \d × {reason}"
    if phase == "starting" and fault is LIMIT:
        return 0, r"\b[12] throttled"
    if retried:
        return 0, RETRIES
    if phase == "listing":
        return 3, rf"list its users: {reason}\b"
    if phase == "creating":
        return (0, rf"create users: 1 × {reason}") if is_done else (1, rf"make users: {reason}\b")
    return (0, rf"start request: \d × {reason}") if is_done else (1, rf"\d × the hub answered the start with {reason}")


def one_run_each() -> Iterator[tuple[str, list[str]]]:
    """The faults, each with the phases in which one run meets it: a phase in which the run fails comes by itself."""
    for name in ONCE:
        failing = [phase for phase in PHASES if expected_once(name, phase)[0]]
        yield from ((name, [phase]) for phase in failing)
        yield name, [phase for phase in PHASES if phase not in failing]


@pytest.mark.parametrize(("name", "phases"), list(one_run_each()), ids=str)
def test_a_fault_that_comes_once_in_each_phase(
    name: str, phases: list[str], hub: LocalHub, record_property: Record
) -> None:
    codes, reasons = zip(*(expected_once(name, phase) for phase in phases))
    ran = run_through(hub, any_of([first(1, PHASES[phase](hub), once_in(phase, ONCE[name][0])) for phase in phases]))
    assert ran.faults == len(phases)
    for phase, why in zip(phases, reasons):
        ran.check(record_property, (name, phase), {max(codes)}, why)


# how a run may end when the hub is away for some seconds, from each of these phases on
AWHILE: dict[tuple[str, ...], set[int]] = {
    ("listing",): {0, 3},
    ("creating",): {0, 1},
    ("starting",): {0, 1},
    ("waiting",): {0, 1},
    ("holding", "stopping", "deleting"): {0},
}
# what is done for 5 s; what the summary says of it; what is done to the first request instead
FOR_A_WHILE: dict[str, tuple[Fault, str, Fault | None]] = {
    "502 pages": (BAD_GATEWAY, refused(502), None),
    "503 pages": (UNAVAILABLE, f"{refused(503)}|{RETRIES}", None),
    "502 after the hub acted, then pages": (BAD_GATEWAY, f"{refused(502)}|{RETRIES}", acted(502)),
    "503 after the hub acted, then pages": (UNAVAILABLE, f"{refused(503)}|{RETRIES}", acted(503)),
    "404 pages of a proxy": (NO_BACKEND, refused(404), None),
    "429 without Retry-After": (LIMIT, rf"{refused(429)}|\b[1-9]\d* throttled|{RETRIES}", None),
    "database locked": (LOCKED, refused(500), None),
    "connections reset": (ResetBefore(), f"connection reset|{RETRIES}", None),
}


@pytest.mark.parametrize("phases", AWHILE, ids="+".join)
@pytest.mark.parametrize("name", FOR_A_WHILE)
def test_a_fault_for_five_seconds(name: str, phases: tuple[str, ...], hub: LocalHub, record_property: Record) -> None:
    fault, why, at_first = FOR_A_WHILE[name]
    rules = [FromThenOn(PHASES[phase](hub), fault, 5, at_first=at_first) for phase in phases]
    ran = run_through(hub, any_of(rules))
    assert all(rule.begun for rule in rules)
    ran.check(record_property, (f"{name} for 5 s", "+".join(phases)), AWHILE[phases], why)


SILENT: dict[str, set[int]] = {"listing": {3}, "creating": {0, 1}, "starting": {1}, "holding": {1}, "stopping": {0}}
SILENCE_S = 70  # longer than requests are retried


@pytest.mark.timeout(450)
@pytest.mark.parametrize("phase", SILENT)
def test_a_long_silence(phase: str, hub: LocalHub, record_property: Record) -> None:
    fault = FromThenOn(PHASES[phase](hub), Silence(), SILENCE_S, at_first=Silence())
    ran = run_through(hub, fault, limit_s=400)
    assert fault.begun
    row = (f"silence for {SILENCE_S} s", phase)
    ran.check(record_property, row, SILENT[phase], "no answer in time|not ready after")


RESTARTED: dict[str, tuple[int, str]] = {
    "listing": (0, UNHARMED),  # nothing was there yet that could be lost
    "creating": (0, UNHARMED),
    "starting": (1, "8 × the hub no longer knows the user: it may have restarted"),
    "waiting": (1, "it vanished while starting|it may have restarted"),
    "holding": (1, "8 × the server stopped while it was held"),
    "stopping": (0, UNHARMED),
    "deleting": (0, UNHARMED),
}


@pytest.mark.parametrize("phase", RESTARTED)
def test_a_hub_that_restarts_without_its_state(phase: str, hub: LocalHub, record_property: Record) -> None:
    code, why = RESTARTED[phase]
    ran = run_through(hub, FromThenOn(PHASES[phase](hub), act=hub.restart))
    ran.check(record_property, ("the hub restarts, state gone", phase), {code}, why)
    noticed = re.search("the hub restarted during the run", rows_of(ran.done, "but", "because")) is not None
    assert noticed == (phase != "listing")  # it looks at the hub's metrics from then on


# ---- Faults that do not end ----


LOST = [phase for phase in PHASES if phase not in ("waiting", "looking")]  # which are like starting and holding


@pytest.mark.parametrize("phase", LOST)
def test_a_token_that_is_revoked(phase: str, hub: LocalHub, record_property: Record) -> None:
    code = {"listing": 3, "creating": 1}.get(phase, 4)
    made = 0 if phase in ("listing", "creating") else COUNT
    ran = run_through(hub, FromThenOn(PHASES[phase](hub), REVOKED, 1e9))
    ran.check_left(record_property, ("token revoked", phase), code, made, refused(403))
    assert tool_users(hub) == left_according_to(ran.done)


@pytest.mark.parametrize("phase", LOST)
def test_a_hub_that_dies_for_good(phase: str, hub: LocalHub, record_property: Record) -> None:
    code, made = {"listing": (3, 0), "creating": (4, BATCH)}.get(phase, (4, COUNT))
    rule = FromThenOn(PHASES[phase](hub), act=hub.kill)
    ran = run_through(hub, rule, "--cleanup-timeout", "10s")
    assert not hub.running
    why = "connection reset|connection refused"
    ran.check_left(record_property, ("the hub dies for good", phase), code, made, why)
    unknown = "to say whether the servers that were held are still there" in ran.done.summary
    assert unknown == (phase == "holding") and " lost" not in rows_of(ran.done, "servers")


# ---- Limits, other versions, slow stops ----


def test_an_active_server_limit_ends_the_run_by_itself(record_property: Record) -> None:
    with LocalHub(active_server_limit=3) as hub:
        why = "5 × still throttled after 10.0 s: Active user limit"
        ran = run_through(hub, None, "--server-timeout", "10s")
        ran.check(record_property, ("active_server_limit 3", "starting"), {1}, why)


@pytest.mark.parametrize("version", ["2.3.1", "4.1.6"])
def test_hubs_of_other_versions(version: str, record_property: Record) -> None:
    phases = ["starting", "stopping", "deleting"]
    with LocalHub(version=version, slow_spawn_timeout_s=0, spawn_s=0.4) as hub:
        for name in ("reset after the hub acted", "504 after the hub acted", "a single 500"):
            codes, reasons = zip(*(expected_once(name, phase) for phase in phases))
            ran = run_through(hub, any_of([first(2, PHASES[phase](hub), ONCE[name][0]) for phase in phases]))
            assert ran.faults == 2 * len(phases)
            for phase, why in zip(phases, reasons):
                ran.check(record_property, (f"{name}, hub {version}", phase), {max(codes)}, why)


@pytest.mark.parametrize("version", ["1.5.1", "2.3.1", "4.1.6", None])
def test_servers_that_take_longer_to_stop_than_the_hub_waits(version: str | None, record_property: Record) -> None:
    with LocalHub(version=version, stop_s=3, slow_stop_timeout_s=1) as hub:
        ran = run_through(hub, None)
        ran.check(record_property, (f"slow stops, hub {version or 'newest'}", "stopping"), {0}, UNHARMED)
        assert rows_of(ran.done, "cleanup").endswith(" 8 users deleted, none left")


# ---- Signals ----


def interrupt(hub: LocalHub, number: int, after_s: float) -> tuple[Outcome, float, bool]:
    """A run that is sent a signal so many seconds after it began its work.

    With the seconds from the signal to its end, and whether it had ended already when the signal was sent.
    """
    with FaultProxy(hub.endpoint) as proxy, start_tool(*WORDS, "--hold", "2s", hub=hub, proxy=proxy) as run:
        struck: list[tuple[float, bool]] = []

        def strike() -> None:
            struck.append((time.monotonic(), run.poll() is not None))
            run.send_signal(number)

        delayed = threading.Timer(after_s, strike)
        proxy.rule = FromThenOn(matching("POST", "/users$"), act=delayed.start)
        done = run.outcome()
        wait_until(lambda: struck)
        struck_s, too_late = struck[0]
        methods = [entry.method for entry in proxy.requests]
        assert "POST" not in methods[methods.index("DELETE") :], "load was sent after cleaning up had begun"
        late = [entry for entry in proxy.requests if entry.method == "POST" and entry.time > struck_s + 5]
        assert not late, "load was sent more than five seconds after the signal"
        return done, time.monotonic() - struck_s, too_late


SIGNALS = {"SIGINT": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143)}


@pytest.mark.parametrize("version", ["2.3.1", "4.1.6", None])
def test_a_signal_at_random_moments_twenty_times(version: str | None, record_property: Record) -> None:
    rng = random.Random(f"{SEED} {version}")
    slow_spawn_timeout_s = rng.choice([0, 10])
    with LocalHub(version=version, slow_spawn_timeout_s=slow_spawn_timeout_s, spawn_s=0.4, stop_s=0.1) as hub:
        codes, longest_s = set(), 0.0
        for number, code in [*SIGNALS.values()] * 10:
            after_s = rng.uniform(0, 3.2)
            done, took_s, too_late = interrupt(hub, number, after_s)
            codes.add(done.code)
            longest_s = max(longest_s, took_s)
            assert hub.users().keys() == THEIRS, (after_s, done)
            assert done.code == code or (too_late and done.code == 0), (after_s, done)
            assert done.stdout.startswith("INTERRUPTED: " if done.code else "PASSED: ")
            assert "users deleted, none left" in rows_of(done, "cleanup")  # and more, of starts that were ended
        row = (f"20 signals, hub {version or 'newest'}", f"random, seed {SEED}", "/".join(map(str, sorted(codes))), 0)
        record_property("fault", (*row, f"{longest_s:.1f} at most", "yes"))
        assert {130, 143} <= codes


def test_a_second_signal_ends_at_once_and_names_purge(hub: LocalHub, record_property: Record) -> None:
    with start_tool(*WORDS, "--run", "x", "--profile", '{"stop_s": 5}', hub=hub) as run:
        run.log_up_to("Holding")
        run.send_signal(signal.SIGINT)
        run.log_up_to("Cleaning up")
        wait_until(lambda: hst.ServerState.STOPPING in map(hst.server_state, hub.users().values()))
        began_s = time.monotonic()
        wait_until(lambda: run.poll() is not None or run.send_signal(signal.SIGINT))  # within a second it is the first
        done = run.outcome()
        took_s = time.monotonic() - began_s
    left = len(tool_users(hub))
    said = "8 users may remain on the hub" in done.stderr and "hub-stress-test purge --run x" in done.stderr
    row = ("SIGINT twice", "stopping", done.code, left, f"{took_s:.1f}", "yes" if said else "NO")
    record_property("fault", row)
    assert (done.code, done.stdout, left) == (4, "", COUNT)  # it has waited for no server to stop
    assert said, done.stderr
    assert run_tool("purge", "--run", "x", hub=hub).code == 0
    assert hub.users().keys() == THEIRS
