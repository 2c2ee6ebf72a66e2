#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.29", "urllib3>=1.26.12"]
# ///
"""Will this JupyterHub hold, and how far does it go?

Three commands answer, from a shell or a CI job:

  stress-test            make users, start their servers as people logging in would, measure what each waited,
                         remove them
  activity-stress-test   make users without servers, send the activity reports that running servers send, measure
  purge                  remove what earlier runs left behind

Where one machine is not enough, Locust runs this same file: locust -f hub_stress_test.py.

What it does to a hub. It makes users called hub-stress-test-<n> (with --run NAME: hub-stress-test-NAME-<n>), starts and
stops their servers, and deletes them. It writes to no user that it did not make; purge writes only to users whose whole
name follows that pattern, and never to an admin. Unless --keep is given, every user it made is deleted before it ends,
whatever happened, and the hub is listed once more to be sure; what could not be removed is named, with exit code 4.

What the numbers mean. "Server ready" is what a person waits: from the moment a start was due to the moment the hub
says that the server is ready, throttling included. Every other latency runs from sending a request (with --rate, from
when it was due) to its final answer, without the time the tool slept because the hub asked it to wait. "Ping" is one
user being read five times a second all the while, from when each ping was due: what everybody else on the hub feels.
"Hub's own" is what the hub's metrics page says of its process; "spent" sets it beside what was measured here.
Latencies are of what succeeded; failures are counted beside them, never averaged in. Percentiles are within 1 %.

Exit codes: 0 done and nothing failed (no --fail-if condition held); 1 done, but something failed (one held); 2 bad
usage; 3 no hub there, token refused or too weak (nothing was changed); 4 something this run made is still on the hub;
130 and 143 interrupted by SIGINT and SIGTERM, cleaned up.

What it does not promise: it logs nobody in through a browser and opens no notebook, so what a login page, a proxy or a
user's own server costs is not measured. Two runs at one time on one hub need different --run names.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import dataclasses
import enum
import functools
import html
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import signal
import sys
import textwrap
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timezone
from http.cookiejar import DefaultCookiePolicy
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ReadTimeoutError, SSLError
from urllib3.util.retry import Retry

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# ==== Constants and exit codes =======================================================================================

__version__ = "0.1.0"

LOG = logging.getLogger("hub-stress-test")

USERNAME_PREFIX = "hub-stress-test"
DEFAULT_TIMEOUT = 30  # seconds that one request may take
SERVER_LIFECYCLE_TIMEOUT = 60  # seconds that a server may take to start, or to stop
CLEANUP_TIMEOUT_S = 300.0  # how long cleaning up goes on without getting anywhere
RETRIES = 5  # after 0, 1, 2, 4 and 8 seconds
RETRY_WINDOW_S = 60.0  # no further try of a request so long after its first
LATE_SEND_S = 0.1  # a request sent so much after it was due shows that the generator was too slow
OPEN_STARTS_MAX = 1000  # threads, and so servers that can be starting at one time in the open model
CPU_BOUND = 0.85  # of a processor: a process that used more could hardly send faster
CAPACITY_FIRST_RATE_PER_S = 16.0
CAPACITY_STEP_S = 10.0
DRAIN_S = 20.0  # at most, between two steps
SERVER_REPORTS_EVERY_S = 300  # JupyterHub's default for how often a running server reports its activity
OPEN_GRACE_S = 5.0  # how long after its end an open load may still send what was due before
LATE_S = 2.0  # how long a hub is given to act on a request whose answer was lost, before it is asked what it did
HUB_GONE_S = 120.0  # no further load once the hub has not answered for so long
RETRY_AFTER_MAX_S = 120.0
THROTTLE_PAUSE_S = 5.0  # before a throttled start is asked again when the hub names no time
FIRST_COME_S = 0.02  # the head start of who waited for a place over who comes only now
STREAM_TIMEOUT_S = 20.0  # the hub sends a keep-alive every 8 seconds
PING_RATE_PER_S = 5.0
PROGRESS_EVERY_S = 5.0
METRICS_EVERY_S = 5.0
METRICS_TIMEOUT_S = 5.0
PAGE = 200  # users a page: the most that a hub gives
DRY_RUN_ENDPOINT = "http://dry-run.invalid/hub/api"
LOG_HEADER = "hub-stress-test log"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TIMED_OUT = "no answer in time"

Model = dict[str, Any]  # what the hub says of a user
Results = dict[str, Any]  # what a command found, with the keys of the results file
T = TypeVar("T")
R = TypeVar("R")


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    SETUP = 3
    LEFT_BEHIND = 4
    SIGINT = 130
    SIGTERM = 143


# ==== Errors, by what the user does next =============================================================================


class HubStressError(Exception):
    """Something the user can be told in a sentence."""

    exit_code = ExitCode.FAILED


class UsageError(HubStressError):
    """The command line is wrong: nothing was sent."""

    exit_code = ExitCode.USAGE


class SetupError(HubStressError):
    """No hub there, or its token is refused or too weak: nothing was changed."""

    exit_code = ExitCode.SETUP


class HubRefused(HubStressError):
    """The hub would not do, in the middle of a run, what the run needs to go on."""

    def __init__(self, doing: str, reply: Reply) -> None:
        super().__init__(f"The hub would not {doing}: {reply}")
        self.token_refused = reply.status in (401, 403)


class LoadDied(HubStressError):
    """A process that sends the load is gone, with what it measured."""


class Stopped(Exception):
    """The run was told to stop while this request waited for another try."""


# ==== Records ========================================================================================================


class Secret(str):
    """A string that shows itself to no repr, so that no traceback, debugger or log can print it by accident."""

    def __repr__(self) -> str:
        return "'***'"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One operation on one user, and what came of it. Moments are seconds of a monotonic clock."""

    operation: str
    user: str
    due_s: float
    sent_s: float
    answered_s: float
    error: str | None = None  # a status or a short reason; None when it succeeded
    tries: int = 1
    backoff_s: float = 0.0  # slept because the hub said 429 or 503: not latency

    @property
    def latency_s(self) -> float:
        return self.answered_s - self.due_s - self.backoff_s

    @property
    def lateness_s(self) -> float:
        """How late the tool itself was in sending."""
        return self.sent_s - self.due_s


@dataclasses.dataclass(frozen=True)
class Reply:
    """The final answer to a request, or why there was none."""

    status: int  # 0 when no answer came
    answered_s: float
    data: Any = None  # the body, where it is JSON
    reason: str = ""  # why no answer came, or the hub's own message
    lost: bool = False  # an answer to this request was lost: the hub may have acted on it without our knowing
    tries: int = 1
    backoff_s: float = 0.0
    retry_after_s: float | None = None
    location: str | None = None  # where a redirect, which is not followed, points

    @property
    def hub_status(self) -> int:
        """The status, but 0 for a 404 that is not the hub's (which is JSON): a proxy says so of a hub that is away."""
        return 0 if self.status == 404 and not isinstance(self.data, dict) else self.status

    def __str__(self) -> str:
        if not self.status:
            return self.reason
        return f"{self.status} ({self.reason})" if self.reason else str(self.status)


@dataclasses.dataclass(frozen=True)
class Readiness:
    """How waiting for a server ended."""

    ready_at_s: float | None = None  # the moment, of a monotonic clock; None when it did not become ready
    reason: str = ""  # why it did not, where that is known
    running: bool = True  # whether something may be running on the hub
    message: str = ""  # what the hub said for longest while the server was starting


@dataclasses.dataclass(frozen=True)
class ServerStart:
    """What became of one server. `ready_s` is what its user waited; None when it did not become ready.

    Moments are seconds of a monotonic clock.
    """

    user: str
    ready_s: float | None
    throttled: int = 0
    reason: str = ""
    running: bool = False  # whether something may be running on the hub
    message: str = ""  # what the hub said for longest meanwhile
    due_s: float = 0.0
    throttled_s: float | None = None  # the first 429
    asked_s: float = 0.0  # sending the request that was not throttled, or the last
    ended_s: float = 0.0  # ready, or known to have failed

    @property
    def ready(self) -> bool:
        return self.ready_s is not None

    @property
    def general_reason(self) -> str:
        """The reason without the user's or their pod's name, so that the same ones can be counted."""
        plain = self.reason.replace(self.user, "<user>").replace(self.user.replace("-", "-2d"), "<user>")
        return re.sub(r"(<user>)---[0-9a-f]{8}", r"\1", plain)


@dataclasses.dataclass(frozen=True)
class CleanUp:
    """What cleaning up did: how many users are gone, and who is still there."""

    deleted: int = 0
    left: tuple[str, ...] = ()
    kept: int = 0


class ServerState(enum.Enum):
    """What the hub says of a user and their server."""

    GONE = "no such user"
    STOPPED = "no server"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    UNKNOWN = "not known"


# ==== Pure rules: names ==============================================================================================

RUN_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_ANY_RUN = re.compile(rf"{USERNAME_PREFIX}-(?:{RUN_NAME.pattern}-)?(?:0|[1-9][0-9]*)")


def username(index: int, run: str = "") -> str:
    """The name of a run's n-th user."""
    return f"{USERNAME_PREFIX}-{run}-{index}" if run else f"{USERNAME_PREFIX}-{index}"


def index_of(name: str, run: str = "") -> int | None:
    """The number in a name of this very run; None for any other name."""
    prefix = username(0, run)[:-1]
    digits = name.removeprefix(prefix)
    if digits == name or not re.fullmatch("0|[1-9][0-9]*", digits):
        return None
    return int(digits)


def is_test_user(name: str, run: str | None = None) -> bool:
    """Whether this tool's naming made the name: of one run, or (None) of any."""
    return bool(_ANY_RUN.fullmatch(name)) if run is None else index_of(name, run) is not None


def first_free_index(names: Iterable[str], run: str = "") -> int:
    """One more than the highest index that is in use; gaps are not filled, since a gap may be in use a moment later."""
    return 1 + max((index for name in names if (index := index_of(name, run)) is not None), default=0)


# ==== Pure rules: pacing and metrics =================================================================================


@dataclasses.dataclass(frozen=True)
class Pace:
    """A fixed schedule: the n-th request (from 0) is due n / rate after the start, however slowly the hub answers."""

    rate_per_s: float
    started_s: float

    def due_s(self, n: int) -> float:
        return self.started_s + n / self.rate_per_s


class Distribution:
    """Durations folded into buckets 1 % wide, so that an hour costs no more memory than a minute.

    Count, mean, minimum and maximum are exact; a percentile (nearest rank) is within 0.5 %.
    """

    GROWTH = math.log(1.01)
    SMALLEST_S = 1e-6

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self.min_s = math.inf
        self.max_s = -math.inf
        self.buckets: collections.Counter[int] = collections.Counter()

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total_s += seconds
        self.min_s = min(self.min_s, seconds)
        self.max_s = max(self.max_s, seconds)
        self.buckets[math.floor(math.log(max(seconds, self.SMALLEST_S)) / self.GROWTH)] += 1

    def merge(self, other: Distribution) -> None:
        self.count += other.count
        self.total_s += other.total_s
        self.min_s, self.max_s = min(self.min_s, other.min_s), max(self.max_s, other.max_s)
        self.buckets.update(other.buckets)

    def share_above(self, seconds: float) -> float:
        """The share of durations above a limit, which is rounded to the nearest bucket; 0 when there are none."""
        bucket = math.floor(math.log(seconds) / self.GROWTH)
        return sum(n for b, n in self.buckets.items() if b > bucket) / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float | None:
        """The smallest duration that `percent` of all do not exceed; None when there are none."""
        rank = math.ceil(percent / 100 * self.count)
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return min(max(math.exp((bucket + 0.5) * self.GROWTH), self.min_s), self.max_s)
        return None

    def summary(self) -> dict[str, float | None]:
        """Seconds for each statistic of the results file; each None when nothing was measured."""
        if not self.count:
            return dict.fromkeys(("min", "mean", "p50", "p90", "p95", "p99", "max"))
        percentiles = {f"p{percent}": self.percentile(percent) for percent in (50, 90, 95, 99)}
        return {"min": self.min_s, "mean": self.total_s / self.count, **percentiles, "max": self.max_s}


def rounded(seconds: float | None) -> float | None:
    """To a tenth of a millisecond, which is finer than anything here is measured."""
    return None if seconds is None else round(seconds, 4)


class Timeline:
    """Durations by the moment at which they began, in equal spans of time: never more than `SPANS`.

    When there are more, two neighbours become one, so that an hour costs no more memory than a few minutes.
    """

    SPANS = 200

    def __init__(self) -> None:
        self.span_s = 1.0
        self.spans: dict[int, Distribution] = {}

    def add(self, at_s: float, seconds: float) -> None:
        span = int(at_s // self.span_s)
        if span not in self.spans:
            self.spans[span] = Distribution()
            if len(self.spans) > self.SPANS:
                self._widen(2 * self.span_s)
                span = int(at_s // self.span_s)
        self.spans[span].add(seconds)

    def merge(self, other: Timeline) -> None:
        self._widen(max(self.span_s, other.span_s))
        for span, distribution in other.spans.items():
            self.spans.setdefault(int(span * other.span_s // self.span_s), Distribution()).merge(distribution)
        while len(self.spans) > self.SPANS:
            self._widen(2 * self.span_s)

    def total(self) -> Distribution:
        total = Distribution()
        for distribution in self.spans.values():
            total.merge(distribution)
        return total

    def widened(self, span_s: float) -> dict[int, Distribution]:
        """The same in wider spans."""
        wider: dict[int, Distribution] = {}
        for span, distribution in self.spans.items():
            wider.setdefault(int(span * self.span_s // span_s), Distribution()).merge(distribution)
        return wider

    def _widen(self, span_s: float) -> None:
        self.spans, self.span_s = self.widened(span_s), span_s


class _Operation:
    """The samples of one operation, folded: how long those took that succeeded, and those that failed."""

    def __init__(self) -> None:
        self.latency, self.failed, self.lateness = Timeline(), Timeline(), Distribution()
        self.count = 0
        self.backoff_s = 0.0
        self.errors: collections.Counter[str] = collections.Counter()
        self.first_due_s, self.last_answered_s = math.inf, -math.inf

    def merge(self, other: _Operation) -> None:
        self.latency.merge(other.latency)
        self.failed.merge(other.failed)
        self.lateness.merge(other.lateness)
        self.count += other.count
        self.backoff_s += other.backoff_s
        self.errors.update(other.errors)
        self.first_due_s = min(self.first_due_s, other.first_due_s)
        self.last_answered_s = max(self.last_answered_s, other.last_answered_s)

    def timeline(self, began_s: float) -> dict[str, Any]:
        """Count, failures and latencies in seconds for each span of time; and how often which latency came."""
        span_s = max(self.latency.span_s, self.failed.span_s)
        good, bad = self.latency.widened(span_s), self.failed.widened(span_s)
        spans = sorted(good.keys() | bad.keys())
        good |= {span: Distribution() for span in spans if span not in good}
        shown = {name: [rounded(good[span].summary()[name]) for span in spans] for name in ("p50", "p95", "max")}
        often: collections.Counter[int] = collections.Counter()
        for bucket, number in self.latency.total().buckets.items():
            often[bucket // 10] += number
        tenths = range(min(often) - 1, max(often) + 2) if often else ()
        return {
            "span_s": span_s,
            "at_s": [rounded(max(0.0, (span + 0.5) * span_s - began_s)) for span in spans],
            "count": [good[span].count for span in spans],
            "failed": [bad[span].count if span in bad else 0 for span in spans],
            **{f"{name}_s": values for name, values in shown.items()},
            "latency_s": [rounded(math.exp((bucket * 10 + 5) * Distribution.GROWTH)) for bucket in tenths],
            "often": [often[bucket] for bucket in tenths],
        }


class _Counting:
    """What threads share through a lock, which stays behind when the rest is sent to another process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class Metrics(_Counting):
    """Samples folded into numbers: `add` from any thread, `merge` from another process, `summarise` at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: dict[str, _Operation] = {}

    def add(self, sample: Sample) -> None:
        with self._lock:
            folded = self._operations.setdefault(sample.operation, _Operation())
            folded.count += 1
            folded.backoff_s += sample.backoff_s
            folded.first_due_s = min(folded.first_due_s, sample.due_s)
            folded.last_answered_s = max(folded.last_answered_s, sample.answered_s)
            folded.lateness.add(max(0.0, sample.lateness_s))
            if sample.error is None:
                folded.latency.add(sample.due_s, max(0.0, sample.latency_s))
            else:
                folded.failed.add(sample.due_s, max(0.0, sample.latency_s))
                folded.errors[sample.error] += 1

    def merge(self, other: Metrics) -> None:
        with self._lock:
            for name, folded in other._operations.items():
                self._operations.setdefault(name, _Operation()).merge(folded)

    def count(self, names: Iterable[str]) -> int:
        return sum(self._operations[name].count for name in self._operations.keys() & set(names))

    def failures(self, names: Iterable[str]) -> int:
        return sum(self._operations[name].errors.total() for name in self._operations.keys() & set(names))

    def late_share(self, names: Iterable[str]) -> float:
        """The share of these operations' requests that were sent more than `LATE_SEND_S` after they were due."""
        lateness = Distribution()
        for name in self._operations.keys() & set(names):
            lateness.merge(self._operations[name].lateness)
        return lateness.share_above(LATE_SEND_S)

    def summarise(self) -> dict[str, dict[str, Any]]:
        """Operation name to count, failures, rate, latency and lateness in seconds."""
        with self._lock:
            return {name: self._summary(folded) for name, folded in self._operations.items()}

    def timeline(self, began_s: float) -> dict[str, dict[str, Any]]:
        """Operation name to what it did in each span of time, in seconds since `began_s`."""
        with self._lock:
            return {name: folded.timeline(began_s) for name, folded in self._operations.items()}

    @staticmethod
    def _summary(folded: _Operation) -> dict[str, Any]:
        span_s = folded.last_answered_s - folded.first_due_s
        return {
            "count": folded.count,
            "failed": sum(folded.errors.values()),
            "rate_per_s": folded.count / span_s if span_s > 0 else None,
            "latency_s": folded.latency.total().summary(),
            "lateness_s": folded.lateness.summary(),
            "backoff_s": folded.backoff_s,
            "errors": dict(folded.errors),
        }


class Traffic(_Counting):
    """Every request that went to the hub, counted where it is sent; `observer` ones only to watch."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.retries = self.observer_requests = 0
        self.statuses: collections.Counter[int] = collections.Counter()

    def merge(self, other: Traffic) -> None:
        with self._lock:
            self.requests += other.requests
            self.retries += other.retries
            self.observer_requests += other.observer_requests
            self.statuses.update(other.statuses)

    def sent(self, observer: bool, again: bool = False) -> None:
        with self._lock:
            self.requests += 1
            self.retries += again
            self.observer_requests += observer

    def answered(self, status: int) -> None:
        with self._lock:
            self.statuses[status] += 1

    def summarise(self) -> dict[str, Any]:
        with self._lock:
            return {
                "requests": self.requests,
                "retries": self.retries,
                "throttled": self.statuses[429],
                "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
                "observer_requests": self.observer_requests,
                "observer_share": self.observer_requests / self.requests if self.requests else None,
            }


# ==== Pure rules: what the hub's answers mean ========================================================================


def is_lost(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a proxy answered for a hub that was away: the hub may have acted, and its answer is lost.

    A proxy answers 502, 503 or 504 when the hub dies in the middle of a request. The hub's own answers carry its
    version in a header.
    """
    return status in (502, 503, 504) and "X-JupyterHub-Version" not in headers


def longest_message(said: Sequence[tuple[float, str]], until_s: float) -> str:
    """Of messages and the moments from which on they stood, the one that stood longest; "" when there are none.

    It tells why a start took long: a spawner says that it pulls an image, or waits for a node, when that begins.
    """
    ends = [at_s for at_s, _ in said[1:]] + [until_s]
    return max(zip(said, ends), key=lambda one: one[1] - one[0][0])[0][1] if said else ""


def progress_line(phase: str, total: int | None, done: int, failed: int, elapsed_s: float) -> str:
    """Phase, done, failed, rate and the time that the rest takes at that rate."""
    of, left = (f" of {total:,}", "") if total else ("", "")
    if total and done:
        left = f", about {elapsed_s / done * (total - done):.0f} s left"
    some_failed = f", {failed:,} failed" if failed else ""
    return f"{phase}: {done:,}{of} done{some_failed} after {elapsed_s:.0f} s, {done / elapsed_s:.1f} per second{left}"


def server_state(model: Mapping[str, Any]) -> ServerState:
    """What a user model means. One without `servers` comes from a token that may not read servers: not known."""
    if "servers" not in model:
        return ServerState.UNKNOWN
    server = (model["servers"] or {}).get("")
    if server is None or server.get("stopped"):
        return ServerState.STOPPED
    if server.get("pending") == "spawn":
        return ServerState.STARTING
    if server.get("pending") == "stop":
        return ServerState.STOPPING
    return ServerState.READY


def state_after_stop(status: int) -> ServerState:
    """What `DELETE server` answered: 400 (pending spawn on hubs before 5.1) and 500 mean that one has to look again."""
    known = {204: ServerState.STOPPED, 202: ServerState.STOPPING, 404: ServerState.GONE}
    return known.get(status, ServerState.UNKNOWN)


def state_after_delete(status: int) -> ServerState:
    """What `DELETE user` answered: 400 (still stopping) and 500 (still starting) mean that one has to look again."""
    return ServerState.GONE if status in (204, 404) else ServerState.UNKNOWN


NEEDED_SCOPES = {
    "stress-test": {"admin:users", "delete:users", "list:users", "servers", "delete:servers", "read:servers"},
    "activity-stress-test": {"admin:users", "delete:users", "list:users", "users:activity", "read:servers"},
    "purge": {"delete:users", "list:users", "delete:servers", "read:servers"},
}


def missing_scopes(granted: Iterable[str], needed: Iterable[str]) -> list[str]:
    """The scopes that a token lacks; a hub lists those it has in full (`servers` with all its parts).

    One that is limited to some users or groups (`users!user=x`) does not count.
    """
    have = {scope for scope in granted if "!" not in scope}
    if "start:servers" in have:  # hubs from 6.0
        have.add("servers")
    return sorted(set(needed) - have)


ROLE_TO_PASTE = """\
c.JupyterHub.load_roles = [
    {
        "name": "hub-stress-test",
        "scopes": ["admin:users", "servers", "read:metrics"],
        "services": ["hub-stress-test"],
    }
]"""


def likely_endpoint(endpoint: str, location: str | None) -> str:
    """The URL that was probably meant: where a redirect to https leads, or with `/hub/api` at its end."""
    if location and endpoint.startswith("http:") and location.startswith("https:"):
        endpoint = "https:" + endpoint.removeprefix("http:")
    if endpoint.endswith("/hub/api"):
        return endpoint
    return endpoint + "/api" if endpoint.endswith("/hub") else endpoint + "/hub/api"


def exit_code(left: Collection[str], interrupted_by: int | None, failed: bool) -> ExitCode:
    """The one decision on how a run ends; it has failed when a condition held.

    | left on the hub | interrupted | failed | code        |
    | yes             | any         | any    | 4           |
    | no              | SIGINT      | any    | 130         |
    | no              | SIGTERM     | any    | 143         |
    | no              | no          | yes    | 1           |
    | no              | no          | no     | 0           |
    """
    if left:
        return ExitCode.LEFT_BEHIND
    if interrupted_by is not None:
        return ExitCode(128 + interrupted_by)
    return ExitCode.FAILED if failed else ExitCode.OK


# ==== Pure rules: words ==============================================================================================

OPERATION_TITLES = {
    "server_ready": "server ready",
    "start_server": "start request",
    "stop_server": "stop request",
    "create_users": "create users",
    "delete_user": "delete user",
    "list_users": "list users",
    "activity": "activity report",
    "read": "read user",
    "list": "list page",
    "ping": "ping",
}


def duration_text(seconds: float | None) -> str:
    """Three digits and a unit: 840 ms, 1.25 s, 62.1 s; a dash for nothing measured."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.{1 if seconds < 0.00995 else 0}f} ms"
    return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"


def bytes_text(number: float | None) -> str:
    """117 MB, 40 kB; a dash for nothing measured."""
    if number is None:
        return "–"
    return f"{number / 1e6:.0f} MB" if number >= 9.95e5 else f"{number / 1e3:.0f} kB"


# ==== Pure rules: the hub's own figures ==============================================================================

_OWN_FIGURES = re.compile(  # with whatever prefix the hub's operator has chosen
    "(?:.*_)?(process_cpu_seconds_total|process_resident_memory_bytes|process_start_time_seconds|running_servers|"
    "event_loop_interval_seconds_bucket|(?:request|server_spawn)_duration_seconds_(?:count|sum))"
)
LAG_RESOLUTION_S = 0.05  # what a hub can tell of its event loop's lag


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The hub's own figures at one moment of our monotonic clock, by name and label."""

    at_s: float
    figures: Mapping[tuple[str, str], float]

    def get(self, name: str, label: str = "") -> float:
        return self.figures.get((name, label), 0.0)


def snapshot(samples: Iterable[tuple[str, Mapping[str, str], float]], at_s: float) -> Snapshot:
    """What matters to us among the samples (name, labels, value) of a hub's metrics page."""
    figures: collections.Counter[tuple[str, str]] = collections.Counter()
    for full_name, labels, value in samples:
        match = _OWN_FIGURES.fullmatch(full_name)
        if not match or not labels.get("code", "2").startswith("2"):  # the time of a refusal would mislead
            continue
        label = labels.get("le") or labels.get("reason") or labels.get("status") or ""
        if "handler" in labels:
            label = f"{labels['method']} {labels['handler'].rpartition('.')[2]}"
        figures[match[1], label] += value  # type: ignore[assignment]
    return Snapshot(at_s, figures)


def grown(snapshots: Sequence[Snapshot], name: str, label: str = "") -> float:
    """How much a counter has grown; after a restart of the hub it began at 0 again."""
    total = 0.0
    for before, after in zip(snapshots, snapshots[1:]):
        total += after.get(name, label) - (0.0 if restarted(before, after) else before.get(name, label))
    return total


def restarted(before: Snapshot, after: Snapshot) -> bool:
    """Whether the hub began anew between two snapshots."""
    return before.get("process_start_time_seconds") != after.get("process_start_time_seconds")


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """A quantile of a histogram's cumulative buckets (upper bound, count), straight between their bounds."""
    total = buckets[-1][1] if buckets else 0.0
    lower, below = 0.0, 0.0
    for upper, count in buckets:
        if total and count >= share * total:
            return lower if math.isinf(upper) else lower + (upper - lower) * (share * total - below) / (count - below)
        lower, below = upper, count
    return None


def hub_metrics(snapshots: Sequence[Snapshot], load_ended_s: float, servers_ready: int) -> dict[str, Any] | None:
    """What the hub says of itself between the first and the last snapshot; None without two of them.

    `cpu_share_max` is the most that it used of a processor over some 5 seconds of the load, cleaning up left out.
    """
    if len(snapshots) < 2:
        return None
    first, last = snapshots[0], snapshots[-1]
    rss = [one.get("process_resident_memory_bytes") for one in snapshots]
    lag = sorted((float(le), grown(snapshots, name, le)) for name, le in last.figures if name.startswith("event_loop"))
    lags = [quantile(lag, share) for share in (0.95, 1.0)]
    cpu_s = grown(snapshots, "process_cpu_seconds_total")
    under_load = cpu_shares([one for one in snapshots if one.at_s < load_ended_s + 1.0])
    return {
        "cpu_s": cpu_s,
        "cpu_share": cpu_s / (last.at_s - first.at_s),
        "cpu_share_max": max((share for _, share in under_load), default=cpu_s / (last.at_s - first.at_s)),
        "rss_before_bytes": rss[0],
        "rss_max_bytes": max(rss),
        "rss_after_bytes": rss[-1],
        "rss_per_server_bytes": max(0.0, max(rss) - rss[0]) / servers_ready if servers_ready else None,
        "event_loop_lag_p95_s": None if lags[0] is None else max(lags[0], LAG_RESOLUTION_S),
        "event_loop_lag_max_s": None if lags[1] is None else max(lags[1], LAG_RESOLUTION_S),
        "running_servers_max": max(0.0, *(one.get("running_servers") for one in snapshots)),
        "requests": _own_durations(snapshots, "request_duration_seconds"),
        "spawns": _own_durations(snapshots, "server_spawn_duration_seconds"),
    }


def _own_durations(snapshots: Sequence[Snapshot], name: str) -> dict[str, dict[str, float]]:
    counts = {
        label: grown(snapshots, f"{name}_count", label) for n, label in snapshots[-1].figures if n == f"{name}_count"
    }
    return {
        label: {"count": count, "mean_s": grown(snapshots, f"{name}_sum", label) / count}
        for label, count in counts.items()
        if count > 0
    }


def cpu_shares(snapshots: Sequence[Snapshot], least_s: float = 1.0) -> list[tuple[float, float]]:
    """The share of a processor that the hub used up to each moment, over stretches of at least `least_s`."""
    shares: list[tuple[float, float]] = []
    since = 0
    for at in range(1, len(snapshots)):
        took_s = snapshots[at].at_s - snapshots[since].at_s
        if took_s >= least_s or (at == len(snapshots) - 1 and not shares):
            stretch = snapshots[since : at + 1]
            shares.append((snapshots[at].at_s, grown(stretch, "process_cpu_seconds_total") / max(took_s, 1e-3)))
            since = at
    return shares


HANDLERS = {"activity": "POST ActivityAPIHandler", "ping": "GET UserAPIHandler"}
BUSY = 0.85  # of a processor: a hub, which has but one, could hardly do more
IN_FRONT_S = 0.02  # on a request, for which the way to the hub and back deserves a mention


def time_spent(results: Mapping[str, Any]) -> Iterator[str]:
    """Sentences that set the client's times beside the hub's own, and so say on which side the time was spent."""
    own, operations = results["hub"]["metrics"], results["operations"]
    if not own:
        return
    wait_s, start_s = metric_value(results, "server_ready.mean"), own["spawns"].get("success", {}).get("mean_s")
    if wait_s and start_s:
        throttled_s = operations["start_server"]["backoff_s"] / operations["start_server"]["count"]
        rest_s = wait_s - throttled_s - start_s
        parts = [f"the hub took {duration_text(min(start_s, wait_s))} to start the server"]
        parts += [f"{duration_text(throttled_s)} passed while it throttled"] if throttled_s > IN_FRONT_S else []
        parts += [f"{duration_text(rest_s)} went to all the rest"] if rest_s > IN_FRONT_S else []
        yield f"of a mean wait of {duration_text(wait_s)}, {', '.join(parts)}"
    for name, handler in HANDLERS.items():
        whole_s, inside_s = metric_value(results, f"{name}.mean"), own["requests"].get(handler, {}).get("mean_s")
        if (
            whole_s and inside_s and (name == "ping" or not results["capacity"])
        ):  # whose steps before are not in whole_s
            outside_s = whole_s - inside_s
            if outside_s < whole_s / 2:
                where = "in the hub"
            elif outside_s < IN_FRONT_S:
                where = "elsewhere, but so little that it does not matter"
            elif own["cpu_share_max"] > BUSY:
                where = f"waiting for the hub, whose process used up to {own['cpu_share_max']:.0%} of a processor"
            else:
                where = "not in the hub but in front of it: network, proxy, TLS or this machine"
            text = f"a mean {OPERATION_TITLES[name]} of {duration_text(whole_s)}"
            yield f"{text} took {duration_text(inside_s)} by the hub's own clock: most of it was spent {where}"


def advice(results: Mapping[str, Any]) -> Iterator[str]:
    """What to look at next, when a run has failed."""
    servers, own, statuses = results["servers"] or {}, results["hub"]["metrics"] or {}, results["http"]["statuses"]
    reasons = " ".join(servers.get("reasons", {}))
    if any("connection refused" in one["errors"] for one in results["operations"].values()):
        yield "the hub was away: is it running? With consecutive_failure_limit it ends itself after failed starts"
    if "Active user limit" in reasons:
        yield "the hub allows no more servers: raise its active_server_limit"
    elif servers.get("throttled"):
        yield "the hub throttled: raise its concurrent_spawn_limit, or slow the arrivals (--rate, or a smaller -b)"
    if "not ready after" in reasons:
        yield "some were still starting: see the hub's log and the spawner's events, or allow more by --server-timeout"
    elif servers.get("failed"):
        yield "see the hub's log for the users named in the results; on Kubernetes, the events of their pods"
    if own.get("cpu_share_max", 0) > BUSY:
        yield (
            f"the hub's process used {own['cpu_share_max']:.0%} of a processor, and it can use only one: "
            "give it a faster one, or less to do"
        )
    if results["hub"]["restarts"]:
        yield "the hub restarted: look at why it ended (memory limit? consecutive_failure_limit?)"
    if statuses.keys() & {"502", "503", "504"}:
        yield "502, 503 and 504 come from what stands in front of the hub: look at the proxy's and the ingress's logs"


# ==== Pure rules: conditions and capacity ============================================================================

LATENCY_STATISTICS = ("min", "mean", "p50", "p90", "p95", "p99", "max")
STATISTICS = (*LATENCY_STATISTICS, "failed", "count", "rate_per_s")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
UNITS = {"": 1.0, "x": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "%": 0.01}


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition under which a run has failed, like `server_ready.p95 > 30s`."""

    text: str
    metric: str
    comparison: str
    limit: float  # seconds, a share, a number, or a multiple of the baseline's value
    relative: bool  # whether it is such a multiple

    def judge(self, results: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Condition, value, and whether it held; where nothing was measured, it did."""
        value = metric_value(results, self.metric)
        limit = self.limit
        if self.relative:
            before = metric_value(baseline or {}, self.metric)
            limit = math.nan if before is None else before * limit
        held = value is None or math.isnan(limit) or COMPARISONS[self.comparison](value, limit)
        return {"condition": self.text, "value": value, "held": held}


def condition(text: str) -> Condition:
    """The condition METRIC OP VALUE; raises `argparse.ArgumentTypeError`."""
    match = re.fullmatch(r"\s*([\w.-]+)\s*(>=|<=|>|<)\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|%|x|)\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected METRIC OP VALUE, like 'server_ready.p95 > 30s', not {text!r}")
    metric, comparison, number, unit = match.groups()
    statistic = metric.rpartition(".")[2]
    if metric not in ("failed", "failed_rate", "throttled") and ("." not in metric or statistic not in STATISTICS):
        raise argparse.ArgumentTypeError(
            f"{metric!r} is not failed, failed_rate, throttled, or OPERATION.STAT, with one of {', '.join(STATISTICS)}"
        )
    fits = {"x": True, "": True, "%": metric == "failed_rate"}.get(unit, statistic in LATENCY_STATISTICS)
    if not fits:
        raise argparse.ArgumentTypeError(f"the unit {unit!r} does not fit {metric} in {text!r}")
    return Condition(" ".join(text.split()), metric, comparison, float(number) * UNITS[unit], unit == "x")


def metric_value(results: Mapping[str, Any], metric: str) -> float | None:
    """The value of a condition's metric in results: seconds, a share or a number; None when nothing was measured."""
    name, _, statistic = metric.rpartition(".")
    if not name:
        value: float | None = results.get("http", {}).get("throttled") if metric == "throttled" else results.get(metric)
        return value
    measured = results.get("operations", {}).get(name, {})
    value = measured.get("latency_s", {}).get(statistic) if statistic in LATENCY_STATISTICS else measured.get(statistic)
    return None if value is None else float(value)


FAILED = condition("failed > 0")


class CapacitySearch:
    """Which rate to try next: doubling until a condition holds, then halving the interval to within 5 %."""

    def __init__(self, first_rate_per_s: float) -> None:
        self.sustained: float | None = None  # the highest rate at which no condition held
        self.broken: float | None = None  # the lowest at which one did
        self.unknown = False  # whether the generator could not send a rate, so that nothing is known of higher ones
        self._first = first_rate_per_s

    def next_rate(self) -> float | None:
        """Requests per second, or None when the answer is known as well as it can be."""
        if self.unknown:
            return None
        if self.broken is None:
            return self._first if self.sustained is None else self.sustained * 2
        if self.sustained is None:
            return self.broken / 2 if self.broken > 1 else None
        middle = (self.sustained + self.broken) / 2
        return middle if self.broken > self.sustained * 1.05 else None

    def tell(self, rate_per_s: float, held: bool | None) -> None:
        """What came of a rate; None when it could not be sent, which says nothing about the hub."""
        if held is None:
            self.unknown = True
        elif held:
            self.broken = rate_per_s
        else:
            self.sustained = rate_per_s


# ==== The hub: session, retry, dry run ===============================================================================


RETRIED = frozenset({429, 503, 504})
NEVER_SENT = (NewConnectionError, ConnectTimeoutError, SSLError)  # the hub has not seen a request that ended so


@dataclasses.dataclass
class Call:
    """How one request is to be sent, and what happened to it on the way."""

    observer: bool = False  # made only to watch
    seen: frozenset[int] = frozenset()  # statuses that the caller wants to see itself: not retried
    retry_until_s: float | None = None  # no more tries after this moment; None: as long as the session's window
    tries: int = 0
    backoff_s: float = 0.0
    lost: bool = False  # an answer was lost: the hub may have acted on the request


def call_of(request: requests.Request | requests.PreparedRequest | None) -> Call:
    """The call that a request is part of; it is kept with the request, so that whoever holds its answer finds it."""
    call: Call = vars(request).setdefault("hub_call", Call()) if request else Call(tries=1)
    return call


class Transport(BaseAdapter):
    """What happens on the wire, around another adapter: a time-out on every request, retries, counts.

    Connection failures and the statuses 429, 503 and 504 are retried, on every method. Repeating a POST or DELETE is
    safe on a hub: a second create answers 409, a second start 202 or 400 "already running", a second stop 204 or 202,
    a second delete 404. `Call.lost` tells the caller to expect that.
    """

    def __init__(self, wire: BaseAdapter, session: HubSession) -> None:
        super().__init__()
        self.wire, self._session = wire, session

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        call, session = call_of(request), self._session
        if call.retry_until_s is None:
            call.retry_until_s = session.clock() + session.retry_window_s
        kwargs["timeout"] = kwargs.get("timeout") or DEFAULT_TIMEOUT
        while True:
            call.tries += 1
            session.traffic.sent(call.observer, again=call.tries > 1)
            try:
                response = self.wire.send(request, *args, **kwargs)
                if not kwargs.get("stream"):
                    response.content  # noqa: B018  # which reads it, and may break off
            except requests.RequestException as error:
                call.lost |= not _never_sent(error)
                if not self._may_retry(call):
                    raise
                session.back_off(call, None)
                continue
            session.answered(response)
            call.lost |= is_lost(response.status_code, response.headers)
            if response.status_code not in RETRIED - call.seen or not self._may_retry(call):
                return response
            session.back_off(call, _retry_after_s(response))
            response.close()

    def close(self) -> None:
        self.wire.close()

    def _may_retry(self, call: Call) -> bool:
        return call.tries <= RETRIES and self._session.clock() < (call.retry_until_s or 0.0)


class HubSession(requests.Session):
    """The session that talks to the hub: its transport retries and counts, no redirect is followed, no cookie is kept.

    Threads share it. `stop()` ends back-offs, pauses and progress streams at once, and lets no further request go.
    """

    def __init__(
        self,
        token: str,
        wire: BaseAdapter | None = None,
        pool_maxsize: int = 100,
        retry_window_s: float = RETRY_WINDOW_S,
        gone_after_s: float = HUB_GONE_S,
    ) -> None:
        super().__init__()
        self.token = token = Secret(token)
        self.headers["Authorization"] = Secret(f"token {token}")
        self.auth = _keep_as_it_is  # so that neither a .netrc file nor the URL replaces the header
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.clock = time.monotonic
        self.retry_window_s, self.gone_after_s = retry_window_s, gone_after_s
        self.answered_s = self.clock()
        self.metrics, self.traffic = Metrics(), Traffic()
        self.stopping = threading.Event()
        self._streams: dict[requests.Response, float] = {}
        self._simulated, self._pool_maxsize = wire, pool_maxsize
        transport = Transport(wire or HTTPAdapter(pool_maxsize=pool_maxsize), self)
        self.mount("http://", transport)
        self.mount("https://", transport)

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: a redirect is an answer like another, and the token goes nowhere else."""

    def exchange(
        self, method: str, url: str, call: Call, *, stream: bool = False, timeout: float | None = None, **parts: Any
    ) -> requests.Response:
        """The response to one call; `parts` are those of a `requests.Request`. Raises what requests raises."""
        request = self.prepare_request(requests.Request(method, url, **parts))
        vars(request)["hub_call"] = call
        settings = self.merge_environment_settings(request.url, {}, stream, None, None)
        return self.send(request, timeout=timeout, **settings)

    def answered(self, response: requests.Response) -> None:
        """Count an answer, and note the moment if it is the hub's."""
        self.traffic.answered(response.status_code)
        if not is_lost(response.status_code, response.headers):
            self.answered_s = self.clock()

    @property
    def hub_is_gone(self) -> bool:
        """Whether the hub has not answered anything for so long that sending more is no use."""
        return self.clock() - self.answered_s > self.gone_after_s

    def ask(
        self,
        method: str,
        url: str,
        *,
        operation: str | None = None,
        user: str = "",
        due_s: float | None = None,
        ok: Collection[int] = (200, 201, 202, 204),
        call: Call | None = None,
        **kwargs: Any,
    ) -> Reply:
        """The final answer, or why there is none; never raises. Measured as `operation`; `ok` are its successes."""
        if self.stopping.is_set():
            return Reply(0, self.clock(), reason="the run was stopped before this was sent")
        call = call or Call()
        sent_s = self.clock()
        try:
            reply = _read_reply(self.exchange(method, url, call, **kwargs), call, self.clock())
        except Stopped:
            return Reply(0, self.clock(), reason="the run was stopped", lost=call.lost)
        except OSError as error:  # which requests' own errors are too
            lost = call.lost or not _never_sent(error)
            reply = Reply(0, self.clock(), None, why(error), lost, call.tries, call.backoff_s)
        if operation:
            error_label = None if reply.status in ok else str(reply.status or reply.reason)
            due_s = sent_s if due_s is None else due_s
            self.metrics.add(
                Sample(operation, user, due_s, sent_s, reply.answered_s, error_label, reply.tries, reply.backoff_s)
            )
        return reply

    def events(self, url: str, until_s: float) -> Iterator[Model]:
        """Events of a progress stream as they arrive, until it ends, breaks or is cut at `until_s`."""
        call = Call(observer=True, retry_until_s=until_s)
        try:
            with self.exchange("GET", url, call, stream=True, timeout=STREAM_TIMEOUT_S) as response:
                self._streams[response] = until_s
                try:
                    for line in response.iter_lines() if response.status_code == 200 else ():
                        if line.startswith(b"data:"):
                            yield json.loads(line.removeprefix(b"data:"))
                finally:
                    del self._streams[response]
        except (requests.RequestException, ValueError, Stopped) as error:
            LOG.debug("Progress stream of %s broke: %s", url, why(error))

    def cut_streams(self) -> None:
        """End the streams whose time has come, or all when stopping; whoever reads them goes on at once."""
        for response, until_s in list(self._streams.items()):
            if self.stopping.is_set() or self.clock() >= until_s:
                with contextlib.suppress(RuntimeError, ValueError, OSError):  # it has just ended by itself
                    getattr(response.raw, "shutdown", response.close)()

    def pause(self, seconds: float) -> bool:
        """Wait; False when told to stop meanwhile. The only sleep of the program."""
        return not (self.stopping.wait(seconds) if seconds > 0 else self.stopping.is_set())

    def back_off(self, call: Call, asked_s: float | None) -> None:
        """Wait before the next try, as long as the hub asked or for 0, 1, 2, 4, 8 s; raises `Stopped` when told to."""
        began_s = self.clock()
        seconds = asked_s or (0.5 * 2 ** (call.tries - 1) if call.tries > 1 else 0.0)
        going_on = self.pause(min(seconds, RETRY_AFTER_MAX_S))
        call.backoff_s += self.clock() - began_s
        if not going_on:
            raise Stopped

    def stop(self) -> None:
        """No further request; everything that waits goes on at once."""
        self.stopping.set()
        self.cut_streams()

    def beside(self) -> HubSession:
        """A session on the same hub with samples of its own, which stops with this one."""
        other = HubSession(self.token, self._simulated, self._pool_maxsize)
        other.traffic, other.hooks, other.stopping = self.traffic, self.hooks, self.stopping
        return other

    def for_cleaning_up(self) -> HubSession:
        """A session on the same hub with the same counts, which the stop of this one does not reach.

        It tries once: cleaning up looks again anyway. And it soon looks whether a silent hub is there at all.
        """
        other = HubSession(self.token, self._simulated, self._pool_maxsize, retry_window_s=0, gone_after_s=20)
        other.metrics, other.traffic, other.hooks = self.metrics, self.traffic, self.hooks
        return other


def _keep_as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _read_reply(response: requests.Response, call: Call, answered_s: float) -> Reply:
    try:
        data = response.json() if response.content else None
    except ValueError:
        data = None
    message = data.get("message") if isinstance(data, dict) else None
    if data is None and response.content:
        message = "not JSON but " + response.headers.get("Content-Type", "something unnamed").partition(";")[0]
    return Reply(
        response.status_code,
        answered_s,
        data,
        message or "",
        call.lost or is_lost(response.status_code, response.headers),
        call.tries,
        call.backoff_s,
        _retry_after_s(response),
        response.headers.get("Location"),
    )


def _retry_after_s(response: requests.Response) -> float | None:
    try:
        return Retry().parse_retry_after(response.headers["Retry-After"])
    except Exception:  # absent, or one that urllib3 cannot read (an error type of its own)
        return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised for, as far down as requests and urllib3 have wrapped it."""
    while error is not None:
        yield error
        inner = [getattr(error, "reason", None), *error.args, error.__cause__, error.__context__]
        error = next((e for e in inner if isinstance(e, BaseException)), None)  # type: ignore[assignment]


def _never_sent(error: BaseException) -> bool:
    return any(isinstance(cause, NEVER_SENT) for cause in _causes(error))


def why(error: BaseException) -> str:
    """Why no answer came, in a few words without addresses or objects."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, (ReadTimeoutError, requests.Timeout, TimeoutError)):
            return TIMED_OUT
        if isinstance(cause, requests.exceptions.SSLError):
            return f"the certificate was not accepted ({cause.args[0].reason if cause.args else cause})"
        if isinstance(cause, ConnectionError):
            return "connection reset"
        if isinstance(cause, requests.exceptions.ChunkedEncodingError):
            return "the answer broke off"
        if "NameResolution" in type(cause).__name__ or type(cause).__name__ == "gaierror":
            return "host name not found"
    return type(error).__name__ if isinstance(error, requests.RequestException) else str(error)


def log_response_time(resp: requests.Response, *args: Any, **kwargs: Any) -> None:
    """A response hook: one debug line with method, path, status and seconds."""
    request = resp.request
    LOG.debug("%s %s: %d in %.3f s", request.method, request.path_url, resp.status_code, resp.elapsed.total_seconds())


def get_session(token: str, dry_run: bool = False, pool_maxsize: int = 100) -> HubSession:
    """A session that sends the token, retries connection failures, 429, 503 and 504 on every method, and counts.

    With `dry_run` a simulated hub answers and nothing is sent. `pool_maxsize` connections are kept open.
    """
    session = HubSession(token, SimulatedHub() if dry_run else None, pool_maxsize)
    if LOG.isEnabledFor(logging.DEBUG):
        session.hooks["response"].append(log_response_time)
    return session


class SimulatedHub(BaseAdapter):
    """A transport of requests that answers as an empty hub would: every server is ready at once, nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._users: dict[str, Model] = {}

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.url or "").path).partition("/hub/api/")[2]
        body = json.loads(request.body or "null")
        with self._lock:
            status, data = self._answer(request.method or "", path.split("/"), body)
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url or "", request
        response.raw = io.BytesIO(b"" if data is None else json.dumps(data).encode())
        return response

    def close(self) -> None:
        pass

    def _answer(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        users, unknown = self._users, (404, {"status": 404, "message": None})
        match method, path:
            case _, ["users", name, *_] if name not in users:
                return unknown
            case "GET", [""]:
                return 200, {"version": "simulated"}
            case "GET", ["user"]:
                return 200, {"name": "dry-run", "scopes": sorted(set().union(*NEEDED_SCOPES.values()))}
            case "GET", ["users"]:
                return 200, list(users.values())
            case "POST", ["users"]:
                users |= {name: {"name": name, "admin": False, "servers": {}} for name in body["usernames"]}
                return 201, [users[name] for name in body["usernames"]]
            case "GET", ["users", name]:
                return 200, users[name]
            case "DELETE", ["users", name]:
                return 204, users.pop(name) and None
            case "POST", ["users", name, "server"]:
                users[name]["servers"][""] = {"pending": None, "ready": True}
                return 201, None
            case "DELETE", ["users", name, "server"]:
                return 204, users[name]["servers"].clear()
            case "POST", ["users", _, "activity"]:
                return 200, None
        return unknown


@dataclasses.dataclass(frozen=True)
class Hub:
    """A hub that has answered, and whose token will do."""

    endpoint: str
    version: str


def check_hub(endpoint: str, session: HubSession, command: str) -> Hub:
    """The hub at `endpoint`, once it has shown its version and accepted the token for `command`; else `SetupError`.

    `GET /` (200 with `version`, without a token), then `GET /user` (200; 403 for a bad token). Nothing is written.
    """
    version = _hub_version(endpoint, session)
    reply = session.ask("GET", f"{endpoint}/user", call=Call(retry_until_s=0))
    if reply.status in (401, 403):
        raise SetupError(
            f"The hub at {endpoint} refuses the token (GET /user answered {reply.status}): it is wrong, has expired, "
            "or belongs to another hub. Put the token of the hub-stress-test service into JUPYTERHUB_API_TOKEN."
        )
    if reply.status != 200 or not isinstance(reply.data, dict):
        raise SetupError(f"The hub at {endpoint} could not say whose token this is: GET /user answered {reply}.")
    _check_rights(reply.data, command)
    return Hub(endpoint, version)


def _hub_version(endpoint: str, session: HubSession) -> str:
    reply = _probe(endpoint, session)
    if version := _version_in(reply):
        return version
    if not reply.status:
        raise SetupError(f"Nothing answers at {endpoint}: {reply.reason}. Is the hub running, and is this its URL?")
    raise SetupError(f"No hub API at {endpoint}: {_what_came(reply)}. {_advice(endpoint, reply, session)}")


def _probe(endpoint: str, session: HubSession) -> Reply:
    """What `GET /` answers; sent without the token, which nobody gets before a hub has shown itself."""
    return session.ask("GET", f"{endpoint}/", call=Call(retry_until_s=0), headers={"Authorization": None})


def _version_in(reply: Reply) -> str | None:
    return str(reply.data["version"]) if isinstance(reply.data, dict) and reply.data.get("version") else None


def _what_came(reply: Reply) -> str:
    if reply.location:
        return f"it answers {reply.status} and redirects to {without_credentials(reply.location)}"
    return f"it answers {reply}" if reply.status != 200 or reply.reason else "it answers JSON without a version"


def _advice(endpoint: str, reply: Reply, session: HubSession) -> str:
    guess = likely_endpoint(endpoint, reply.location)
    if guess.startswith("https:") and endpoint.startswith("http:"):
        return f"Use https: --endpoint {guess}"
    if guess != endpoint and _version_in(_probe(guess, session)):
        return f"The hub's API is at --endpoint {guess}"
    return "An endpoint ends in /hub/api, like https://hub.example.org/hub/api"


def _check_rights(owner: Model, command: str) -> None:
    """Hubs from 2.0 list a token's scopes; before that, its owner has to be an admin."""
    if "scopes" not in owner:
        if not owner.get("admin"):
            raise SetupError(
                f"The token's owner, {owner.get('name')}, is not an admin of this hub; only admins can make users."
            )
        return
    if missing := missing_scopes(owner["scopes"], NEEDED_SCOPES[command]):
        raise SetupError(
            f"The token lacks what {command} needs: {', '.join(missing)}. Put this into the hub's configuration, "
            f"beside the service that owns the token, and restart the hub:\n\n{ROLE_TO_PASTE}"
        )


def without_credentials(url: str) -> str:
    """The URL without the user and password that it may carry."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def user_url(endpoint: str, name: str, *rest: str) -> str:
    return "/".join([f"{endpoint}/users", urllib.parse.quote(name, safe=""), *rest])


# ==== Threads and progress ============================================================================================


def timeit(f: Callable[..., R]) -> Callable[..., R]:
    """The function, logging how long each call took, even when it raises."""

    @functools.wraps(f)
    def timed(*args: Any, **kwargs: Any) -> R:
        began_s = time.monotonic()
        try:
            return f(*args, **kwargs)
        finally:
            LOG.info("Took %.3f seconds to %s", time.monotonic() - began_s, f.__name__)

    return timed


def optional(module: str) -> Any:
    """A module of the extra `full`; None when it is not installed."""
    return importlib.import_module(module) if importlib.util.find_spec(module.partition(".")[0]) else None


class Progress:
    """Says on standard error how far a phase has come: a bar on a terminal (with tqdm), else a line now and then.

    It is silent unless the log shows at least INFO. `total` is None where nobody knows it.
    """

    def __init__(self, phase: str, total: int | None) -> None:
        self._phase, self._total = phase, total
        self._began_s = time.monotonic()
        self._next_s = self._began_s + PROGRESS_EVERY_S
        self._bar: Any = None
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Progress:
        if LOG.isEnabledFor(logging.INFO) and sys.stderr.isatty() and (tqdm := optional("tqdm")):
            self._closing.enter_context(importlib.import_module("tqdm.contrib.logging").logging_redirect_tqdm())
            bar = tqdm.tqdm(total=self._total, desc=self._phase, file=sys.stderr, dynamic_ncols=True)
            self._bar = self._closing.enter_context(bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def tell(self, done: int, failed: int = 0) -> None:
        if self._bar is not None:
            self._bar.set_postfix({"failed": failed} if failed else {}, refresh=False)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()
        elif LOG.isEnabledFor(logging.INFO) and (now_s := time.monotonic()) >= self._next_s:
            self._next_s = now_s + PROGRESS_EVERY_S
            line = progress_line(self._phase, self._total, done, failed, now_s - self._began_s)
            print(line, file=sys.stderr, flush=True)


class Shared(Iterator[T]):
    """An iterator that threads can share."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items, self._lock = iter(items), threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)


def in_threads(workers: Sequence[Callable[[], None]], session: HubSession, on_tick: Callable[[], object]) -> None:
    """Run each worker in a thread of its own until all have returned or the session is told to stop.

    `on_tick` is called ten times a second. Raises what a worker raised.
    """
    session.answered_s = session.clock()
    pool = ThreadPoolExecutor(len(workers), thread_name_prefix="hub-stress-test")
    try:
        running = {pool.submit(worker) for worker in workers}
        while running and not session.stopping.is_set():
            done, running = wait(running, timeout=0.1)
            for future in done:
                future.result()
            session.cut_streams()
            on_tick()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def fan_out(
    work: Callable[[T], R],
    items: Iterable[T],
    concurrency: int,
    session: HubSession,
    on_tick: Callable[[Mapping[T, R | Exception]], None] | None = None,
) -> dict[T, R | Exception]:
    """What `work` gave, or the exception it raised, for each item, from `concurrency` threads.

    Items are taken one by one as threads become free. Absent are those not begun when the hub is gone, and those not
    finished when the session is told to stop. `on_tick` sees the results ten times a second.
    """
    results: dict[T, R | Exception] = {}
    worker = functools.partial(_drain, Shared(items), work, results, session)
    in_threads([worker] * concurrency, session, lambda: on_tick(results) if on_tick else None)
    return dict(results)


def _drain(source: Iterator[T], work: Callable[[T], R], results: dict[T, R | Exception], session: HubSession) -> None:
    """Work on items until there are none left; what each gave is recorded, whatever it raised."""
    for item in source:
        if session.stopping.is_set() or session.hub_is_gone:
            return
        try:
            results[item] = work(item)
        except Exception as error:
            LOG.exception("A worker failed on %s", item)
            results[item] = error


def on_schedule(due: Iterable[tuple[int, float]], last_s: float, session: HubSession) -> Iterator[tuple[int, float]]:
    """Each request when it is due, or as soon after as somebody asks for it; ends at `last_s`, or when told to stop."""
    for n, due_s in due:
        if not session.pause(due_s - session.clock()) or session.clock() > last_s or session.hub_is_gone:
            return
        yield n, due_s


# ==== Users ==========================================================================================================


def list_users(endpoint: str, session: HubSession) -> Iterator[Model]:
    """Every user whose name contains the tool's prefix, and (from hubs that do not filter) others; else `HubRefused`.

    `GET /users`: pages on hubs from 2.0, followed by `next.offset` since `next.url` may be wrong behind a proxy; a
    plain list of all on 1.x. A page may be short while there is a next one.
    """
    offset: int | None = 0
    while offset is not None:
        reply = session.ask(
            "GET",
            f"{endpoint}/users",
            operation="list_users",
            params={"offset": offset, "limit": PAGE, "name_filter": f"{USERNAME_PREFIX}-"},
            headers={"Accept": "application/jupyterhub-pagination+json"},
            timeout=2 * DEFAULT_TIMEOUT,
        )
        page = {"items": reply.data} if isinstance(reply.data, list) else reply.data
        if reply.status != 200 or not isinstance(page, dict) or "items" not in page:
            raise HubRefused("list its users", reply)
        yield from page["items"]
        offset = (page.get("_pagination", {}).get("next") or {}).get("offset")


def find_existing_stress_test_users(endpoint: str, session: HubSession, *, run: str | None = None) -> list[Model]:
    """The models of all users that this tool's naming made (of one run, if named), but admins. Raises `HubRefused`."""
    found = [
        user for user in list_users(endpoint, session) if is_test_user(user["name"], run) and not user.get("admin")
    ]
    LOG.debug("Found %d users of ours", len(found))
    return found


class Claims:
    """The users that this run has made, or may have made: all that it will delete, and nothing else.

    A name is claimed before it is asked for, and given up when the hub says that it was taken. If the answer is lost,
    the claim stands, even when the name is not there yet, since the hub may act late: the name was free when this run
    looked, just before. Only a run with the same --run name at the same time could make it too, and such a run betrays
    itself by taking other names of ours: once `rivals` is set, a name whose making was not confirmed is not deleted.
    """

    def __init__(self) -> None:
        self.confirmed: dict[str, None] = {}  # in order
        self.unconfirmed: dict[str, None] = {}
        self.rivals = False

    def ask(self, names: Iterable[str]) -> None:
        self.unconfirmed.update(dict.fromkeys(names))

    def settle(self, asked: Iterable[str], made: Collection[str]) -> None:
        for name in asked:
            self.unconfirmed.pop(name, None)
        self.confirmed.update(dict.fromkeys(made))

    @property
    def ours(self) -> list[str]:
        return [*self.confirmed, *(() if self.rivals else self.unconfirmed)]


@timeit
def create_users(
    count: int,
    batch_size: int,
    endpoint: str,
    session: HubSession,
    existing_users: Sequence[Model | str] = (),
    *,
    run: str = "",
    claims: Claims | None = None,
) -> list[list[str]]:
    """The names of exactly `count` new users, in batches of at most `batch_size`, numbered after `existing_users`.

    Names that turn out to be taken are skipped. Raises `HubRefused`; those made by then are in `claims`, or, where the
    caller keeps no claims, are deleted first.
    """
    kept = Claims() if claims is None else claims
    taken = [user if isinstance(user, str) else user["name"] for user in existing_users]
    indexes = itertools.count(first_free_index(taken, run))
    batches: list[list[str]] = []
    try:
        with Progress("creating users", count) as progress:
            while missing := count - sum(map(len, batches)):
                wanted = [username(index, run) for index in itertools.islice(indexes, min(batch_size, missing))]
                if made := _create_batch(wanted, endpoint, session, kept):
                    batches.append(made)
                progress.tell(sum(map(len, batches)))
    except HubRefused:
        if claims is None:
            delete_users(kept.ours, endpoint, session, batch_size)
        raise
    return batches


def _create_batch(wanted: list[str], endpoint: str, session: HubSession, claims: Claims) -> list[str]:
    """Those of the wanted users that this call made.

    `POST /users`: 201 with the new ones; 409 when all exist. After a lost answer both mean "look", see Claims; so does
    a 500, since the hub may have made some of the batch before it failed.
    """
    claims.ask(wanted)
    reply = session.ask(
        "POST",
        f"{endpoint}/users",
        operation="create_users",
        json={"usernames": wanted},
        timeout=max(len(wanted), DEFAULT_TIMEOUT),
        ok=(201, 409),
    )
    done = reply.status in (201, 409)
    unsure = reply.lost or reply.status >= 500
    if unsure:
        there = {user["name"] for user in list_users(endpoint, session)}
    else:
        there = {user["name"] for user in reply.data} if reply.status == 201 else set()
        claims.rivals |= done and not there.issuperset(wanted)
    made = [name for name in wanted if name in there]
    claims.settle(made if unsure else wanted, made)
    if not made and not done:
        raise HubRefused("make users", reply)
    return made


def read_state(name: str, endpoint: str, session: HubSession, observer: bool = False) -> ServerState:
    """What the hub says of a user now. `GET /users/{name}`: 200, or 404 when gone; anything else is not known."""
    reply = session.ask("GET", user_url(endpoint, name), call=Call(observer=observer))
    if reply.hub_status == 404:
        return ServerState.GONE
    return server_state(reply.data) if reply.status == 200 and isinstance(reply.data, dict) else ServerState.UNKNOWN


# ==== Servers ========================================================================================================


class Turns:
    """Whose turn it is to ask again, among the starts that the hub has throttled.

    Each start that ends frees a place on the hub, and the start that was due first takes it: sleeping for the whole of
    the hub's Retry-After (30 to 60 s) would leave the place empty.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._freed = self._taken = 0
        self._waiting: list[float] = []

    @property
    def freed(self) -> int:
        return self._freed

    def free(self) -> bool:
        """A place is free; whether somebody waits who will take it."""
        with self._changed:
            self._freed += 1
            self._changed.notify_all()
            return bool(self._waiting)

    def wait(self, due_s: float, freed_before: int, until_s: float, session: HubSession) -> None:
        """Until a place was freed since `freed_before` and nobody due earlier waits for it, or `until_s`, or a stop."""
        with self._changed:
            self._taken = max(self._taken, freed_before)
            self._waiting.append(due_s)
            try:
                while (left_s := until_s - session.clock()) > 0 and not session.stopping.is_set():
                    if self._freed > self._taken and due_s == min(self._waiting):
                        self._taken += 1
                        break
                    self._changed.wait(min(left_s, 0.2))
            finally:  # also when whoever waits here is killed, as Locust does to its users
                self._waiting.remove(due_s)


def profile_options(profile: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The body that asks for a profile: a slug as {"profile": slug}; an object of user options as it is."""
    return {"profile": profile} if isinstance(profile, str) else dict(profile) if profile else None


def ask_to_start(
    name: str, endpoint: str, session: HubSession, profile: str | Mapping[str, Any] | None, until_s: float
) -> Reply:
    """`POST /users/{name}/server`: 201 ready, 202 starting, 429 throttled, 400 running or stopping, 500 failed."""
    timeout_s = max(1.0, until_s - session.clock())
    call = Call(seen=frozenset({429}), retry_until_s=until_s)
    url = user_url(endpoint, name, "server")
    return session.ask("POST", url, call=call, json=profile_options(profile), timeout=timeout_s)


def start_server(
    username: str, endpoint: str, session: HubSession, profile: str | Mapping[str, Any] | None = None
) -> bool:
    """Whether the hub took the request to start this user's server; it may still be starting."""
    reply = ask_to_start(username, endpoint, session, profile, session.clock() + SERVER_LIFECYCLE_TIMEOUT)
    if reply.status not in (201, 202):
        LOG.error("The server of %s did not start: %s", username, reply)
        return False
    LOG.debug("Starting the server of %s", username)
    return True


def await_ready(name: str, endpoint: str, session: HubSession, until_s: float) -> Readiness:
    """How the start of a server ended, or that it had not by `until_s`.

    From `GET /users/{name}/server/progress`, a stream that ends with an event `ready` or `failed` (whose message is
    the hub's reason); where no stream can be had, from the user model, which does not know why.
    """
    pause_s, message = 0.1, ""
    while session.clock() < until_s and not session.stopping.is_set():
        moment_s, event, heard = follow_progress(name, endpoint, session, until_s)
        message = heard or message
        if event.get("ready"):
            return Readiness(moment_s, message=message)
        if event.get("failed"):
            reason = str(event.get("message") or "").removeprefix("Spawn failed: ") or "the hub gives no reason"
            return Readiness(None, reason, running=False)
        state = read_state(name, endpoint, session, observer=True)
        if state is ServerState.READY:
            return Readiness(session.clock(), message=message)
        if state in (ServerState.STOPPED, ServerState.GONE):
            return Readiness(running=False)
        session.pause(min(pause_s, until_s - session.clock()))
        pause_s = min(pause_s * 1.2, 1.0)
    return Readiness(message=message)


def follow_progress(name: str, endpoint: str, session: HubSession, until_s: float) -> tuple[float, Model, str]:
    """The event that ends a progress stream, empty if none did by `until_s`; its moment; and the longest message.

    The stream is read to its end, which follows at once, so that its connection can be used again.
    """
    moment_s, last = until_s, Model()
    said: list[tuple[float, str]] = []
    for event in session.events(user_url(endpoint, name, "server", "progress"), until_s):
        if not last and (event.get("ready") or event.get("failed")):
            moment_s, last = session.clock(), event
        elif not last and event.get("message") and event.get("progress") != 0:  # 0 is the hub's own "Server requested"
            said.append((session.clock(), str(event["message"])))
    return moment_s, last, longest_message(said, min(moment_s, session.clock()))


@dataclasses.dataclass(frozen=True)
class Starter:
    """Starts servers and follows each until it is ready or has failed; threads share it."""

    endpoint: str
    session: HubSession
    profile: str | Mapping[str, Any] | None = None
    timeout_s: float = SERVER_LIFECYCLE_TIMEOUT
    turns: Turns = dataclasses.field(default_factory=Turns)
    failures: list[str] = dataclasses.field(default_factory=list)

    def bring_up(self, name: str, due_s: float | None = None) -> ServerStart:
        """What became of one server, due now or at `due_s`, measured as `start_server` and `server_ready`."""
        sent_s = self.session.clock()
        due_s = sent_s if due_s is None else due_s
        reply, refusals, asked_s = self._ask_until_taken(name, due_s, sent_s)
        start = self._follow(name, reply, due_s)
        if reply.status != 429 and self.turns.free():
            self.session.pause(FIRST_COME_S)
        start = dataclasses.replace(
            start,
            throttled=len(refusals),
            due_s=due_s,
            throttled_s=refusals[0] if refusals else None,
            asked_s=asked_s,
            ended_s=self.session.clock() if start.ready_s is None else due_s + start.ready_s,
        )
        if not self.session.stopping.is_set():
            self._measure(start)
        if not start.ready:
            LOG.debug("The server of %s failed: %s", name, start.reason)
            self.failures.append(name)
        return start

    def bring_up_when_due(self, name_and_due: tuple[str, float]) -> ServerStart:
        return self.bring_up(*name_and_due)

    def _ask_until_taken(self, name: str, due_s: float, sent_s: float) -> tuple[Reply, list[float], float]:
        """The hub's answer other than "later", or its last "later" when time is up; the moments of all "later", and
        that of the last request."""
        until_s = due_s + self.timeout_s
        refusals: list[float] = []
        backoff_s = 0.0
        while True:
            freed, asked_s = self.turns.freed, self.session.clock()
            reply = ask_to_start(name, self.endpoint, self.session, self.profile, until_s)
            backoff_s += reply.backoff_s
            if reply.status == 429:
                refusals.append(reply.answered_s)
            if reply.status != 429 or reply.answered_s >= until_s or self.session.stopping.is_set():
                break
            ask_again_s = min(until_s, reply.answered_s + (reply.retry_after_s or THROTTLE_PAUSE_S))
            self.turns.wait(due_s, freed, ask_again_s, self.session)
            backoff_s += self.session.clock() - reply.answered_s
        if reply.status and not self.session.stopping.is_set():  # when stopping, we ourselves cut it short
            error = None if reply.status in (201, 202) else str(reply.status)
            tries = len(refusals) + reply.tries
            self.session.metrics.add(
                Sample("start_server", name, due_s, sent_s, reply.answered_s, error, tries, backoff_s)
            )
        return reply, refusals, asked_s

    def _follow(self, name: str, reply: Reply, due_s: float) -> ServerStart:
        """What became of a start that was answered with `reply`."""
        if reply.status == 201:
            return ServerStart(name, reply.answered_s - due_s, running=True)
        if reply.status == 429:
            return ServerStart(name, None, reason=f"still throttled after {self.timeout_s:g} s: {reply.reason}")
        if reply.hub_status == 404:
            return ServerStart(name, None, reason="the hub no longer knows the user: it may have restarted")
        if reply.status in (401, 403):
            return ServerStart(name, None, reason=f"the hub no longer accepts the token: {reply}")
        end = await_ready(name, self.endpoint, self.session, due_s + self.timeout_s)
        if end.ready_at_s is not None:
            return ServerStart(name, end.ready_at_s - due_s, running=True, message=end.message)
        reason = end.reason
        if not reason and (reply.status == 202 or reply.reason == TIMED_OUT):
            last_word = f"; the hub said: {end.message}" if end.message else ""
            reason = f"not ready after {self.timeout_s:g} s{last_word}" if end.running else "it vanished while starting"
        return ServerStart(name, None, reason=reason or f"the start was answered {reply}", running=end.running)

    def _measure(self, start: ServerStart) -> None:
        error = None if start.ready else start.general_reason
        self.session.metrics.add(
            Sample("server_ready", start.user, start.due_s, start.due_s, start.ended_s, error, start.throttled + 1)
        )


@timeit
def start_servers(
    users: Sequence[Sequence[str]],
    endpoint: str,
    session: HubSession,
    profile: str | Mapping[str, Any] | None = None,
    *,
    timeout_s: float = SERVER_LIFECYCLE_TIMEOUT,
    fail_fast: bool = False,
    rate_per_s: float | None = None,
) -> dict[str, ServerStart]:
    """What became of each user's server, for batches of users.

    As many start at one time as the largest batch has (closed model), or, with a rate, one every 1 / rate seconds,
    however slowly the hub answers (open model). Users whose start was not begun (after a failure with `fail_fast`, or a
    stop) are absent.
    """
    starter = Starter(endpoint, session, profile, timeout_s)
    names = [name for batch in users for name in batch]
    going_on = functools.partial(itertools.takewhile, lambda _: not (fail_fast and starter.failures))
    with Progress("starting servers", len(names)) as progress:

        def tell(starts: Mapping[Any, ServerStart | Exception]) -> None:
            progress.tell(len(starts), len(starter.failures))

        if rate_per_s is None:
            concurrency = max((len(batch) for batch in users), default=1)
            outcomes = fan_out(starter.bring_up, going_on(names), concurrency, session, tell)
        else:
            pace = Pace(rate_per_s, session.clock())
            schedule = on_schedule(((n, pace.due_s(n)) for n in range(len(names))), math.inf, session)
            due = ((names[n], due_s) for n, due_s in going_on(schedule))
            concurrency = min(len(names), OPEN_STARTS_MAX)
            timed = fan_out(starter.bring_up_when_due, due, concurrency, session, tell)
            outcomes = {name: start for (name, _), start in timed.items()}
    return {
        name: ServerStart(name, None, reason=repr(start), running=True) if isinstance(start, Exception) else start
        for name, start in outcomes.items()
    }


def hold_servers(
    starts: Mapping[str, ServerStart], hold_s: float, endpoint: str, session: HubSession
) -> dict[str, ServerStart]:
    """The same, `hold_s` seconds later: servers that were ready and no longer are have failed. Raises `HubRefused`."""
    LOG.info("Holding the servers for %g s", hold_s)
    session.pause(hold_s)
    if session.stopping.is_set():
        return dict(starts)
    states = {user["name"]: server_state(user) for user in find_existing_stress_test_users(endpoint, session)}
    gone = {name for name, start in starts.items() if start.ready and states.get(name) is not ServerState.READY}
    lost = functools.partial(
        dataclasses.replace, ready_s=None, reason="it became ready, but was gone before the end of --hold"
    )
    return {name: lost(start) if name in gone else start for name, start in starts.items()}


def wait_for_servers_to_start(
    users: Sequence[Sequence[str]], endpoint: str, session: HubSession, *, timeout_s: float = SERVER_LIFECYCLE_TIMEOUT
) -> dict[str, bool]:
    """Whether each server, already asked for, was ready within `timeout_s`."""
    until_s = session.clock() + timeout_s
    names = [name for batch in users for name in batch]
    concurrency = max((len(batch) for batch in users), default=1)
    ends = fan_out(lambda name: await_ready(name, endpoint, session, until_s), names, concurrency, session)
    return {name: isinstance(end := ends.get(name), Readiness) and end.ready_at_s is not None for name in names}


# ==== Stopping and cleaning up =======================================================================================


def ask_to_stop(name: str, endpoint: str, session: HubSession) -> ServerState:
    """The state after `DELETE /users/{name}/server`: 204 stopped, 202 stopping, 404 no such user, else not known."""
    url = user_url(endpoint, name, "server")
    reply = session.ask("DELETE", url, operation="stop_server", user=name, ok=(202, 204, 404))
    return state_after_stop(reply.hub_status)


def ask_to_delete(name: str, endpoint: str, session: HubSession) -> ServerState:
    """The state after `DELETE /users/{name}`: 204 or 404 gone, else not known."""
    url = user_url(endpoint, name)
    reply = session.ask("DELETE", url, operation="delete_user", user=name, ok=(204, 404))
    return state_after_delete(reply.hub_status)


def stop_server(username: str, endpoint: str, session: HubSession, wait: bool = False) -> bool:
    """Whether the hub has stopped this server, or (without `wait`) has at least begun to."""
    state = ask_to_stop(username, endpoint, session)
    if state is ServerState.STOPPING and wait:
        return wait_for_server_to_stop(username, endpoint, session)
    return state is not ServerState.UNKNOWN


@timeit
def stop_servers(usernames: Sequence[str], endpoint: str, session: HubSession, batch_size: int) -> dict[str, bool]:
    """Whether the hub took the request to stop, for each user; `batch_size` are asked at a time."""
    stopped = fan_out(lambda name: stop_server(name, endpoint, session), usernames, batch_size, session)
    return {name: stopped.get(name) is True for name in usernames}


def wait_for_server_to_stop(username: str, endpoint: str, session: HubSession) -> bool:
    """Whether the server, or its user, was gone within `SERVER_LIFECYCLE_TIMEOUT` seconds."""
    until_s = session.clock() + SERVER_LIFECYCLE_TIMEOUT
    pause_s = 0.1
    while session.clock() < until_s:
        if read_state(username, endpoint, session) in (ServerState.STOPPED, ServerState.GONE):
            return True
        if not session.pause(pause_s):
            return False
        pause_s = min(pause_s * 1.5, 1.0)
    LOG.warning("The server of %s did not stop within %d s", username, SERVER_LIFECYCLE_TIMEOUT)
    return False


@timeit
def wait_for_servers_to_stop(stopped: dict[str, bool], endpoint: str, session: HubSession) -> None:
    """Turn `stopped` from "was asked to stop" into "has stopped", for each user."""
    asked = [name for name, was_asked in stopped.items() if was_asked]
    outcomes = fan_out(lambda name: wait_for_server_to_stop(name, endpoint, session), asked, 10, session)
    stopped.update({name: outcomes.get(name) is True for name in asked})


@timeit
def delete_users_after_stopping_servers(stopped: Mapping[str, bool], endpoint: str, session: HubSession) -> bool:
    """Whether every user is gone; those whose server has not stopped are left alone."""
    names = [name for name, has_stopped in stopped.items() if has_stopped]
    states = fan_out(lambda name: ask_to_delete(name, endpoint, session), names, 10, session)
    return all(states.get(name) is ServerState.GONE for name in stopped)


@timeit
def delete_users(usernames: Sequence[str], endpoint: str, session: HubSession, batch_size: int = 10) -> bool:
    """Whether every one of these users is gone, their servers stopped first."""
    states = dict.fromkeys(usernames, ServerState.READY)
    return not remove_users(states, set(usernames).__contains__, endpoint, session, batch_size).left


def remove_user(
    name: str, states: Mapping[str, ServerState], gone: set[str], endpoint: str, session: HubSession
) -> None:
    """The next steps for a user in the state that `states` has: stop the server, delete the user without one.

    A start cannot be stopped on hubs before 5.1, which answer 400; then it is not known, and one has to look again.
    Those that are gone are added to `gone`.
    """
    state = states[name]
    if state in (ServerState.STARTING, ServerState.READY):
        state = ask_to_stop(name, endpoint, session)
    if state is ServerState.STOPPED:
        state = ask_to_delete(name, endpoint, session)
    if state is ServerState.GONE and states[name] is not state:
        gone.add(name)


@timeit
def remove_users(
    states: Mapping[str, ServerState],
    ours: Callable[[str], bool],
    endpoint: str,
    session: HubSession,
    concurrency: int,
    *,
    timeout_s: float = CLEANUP_TIMEOUT_S,
    gone: set[str] | None = None,
) -> CleanUp:
    """Remove users until the hub lists none that are `ours`, or has let us get no further for `timeout_s` seconds.

    `states` are what is thought of each user; after every round the hub's own list corrects that. Users thought to be
    `UNKNOWN` are looked for first. Nothing is done to a user for whom `ours` is not true, nor to an admin. `gone` is
    kept up to date while this goes on.
    """
    gone = set() if gone is None else gone
    left = {name: state for name, state in states.items() if ours(name)}
    existing = {name for name, state in left.items() if state is not ServerState.UNKNOWN}
    pause_s, until_s, refusals = 0.2, session.clock() + timeout_s, 0
    to_do = left
    with Progress("removing users", len(left)) as progress:
        while True:
            step = functools.partial(remove_user, states=to_do, gone=gone, endpoint=endpoint, session=session)
            fan_out(step, to_do, concurrency, session, lambda _: progress.tell(len(gone)))
            before = len(left)
            try:
                found = find_existing_stress_test_users(endpoint, session)
                left = to_do = {user["name"]: server_state(user) for user in found if ours(user["name"])}
                existing |= left.keys()
                gone.difference_update(left)
                done, refusals = not left, 0
            except HubRefused as error:
                LOG.warning("Cleaning up: %s", error)
                left, to_do = {name: state for name, state in left.items() if name not in gone}, {}
                refusals += error.token_refused or not left
                done = refusals == 3
            if done or session.clock() >= until_s or not session.pause(pause_s):
                return CleanUp(len(existing - left.keys()), tuple(left))
            if len(left) < before:
                pause_s, until_s = 0.2, session.clock() + timeout_s
            pause_s = min(pause_s * 1.5, 5.0)


# ==== Load: operations, ping, closed and open model ==================================================================

Operation = Callable[[str, str, HubSession], requests.Response]
OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """A decorator that gives a function `(username, endpoint, session) -> requests.Response` a name for --mix."""

    def register(function: Operation) -> Operation:
        OPERATIONS[name] = function
        return function

    return register


@operation("activity")
def report_activity(username: str, endpoint: str, session: HubSession) -> requests.Response:
    """`POST /users/{name}/activity`, as a running server sends it every 300 s: 200, 404 when there is no such user."""
    now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    body = {"servers": {"": {"last_activity": now}}, "last_activity": now}
    return session.post(user_url(endpoint, username, "activity"), json=body)


@operation("read")
def read_user(username: str, endpoint: str, session: HubSession) -> requests.Response:
    """`GET /users/{name}`: 200, 404 when there is no such user."""
    return session.get(user_url(endpoint, username))


@operation("list")
def list_page(username: str, endpoint: str, session: HubSession) -> requests.Response:
    """`GET /users`: one page of 50 users, on 1.x all of them."""
    headers = {"Accept": "application/jupyterhub-pagination+json"}
    return session.get(f"{endpoint}/users", params={"limit": 50}, headers=headers)


def load_operations(path: str | None) -> None:
    """Run a file that registers operations; it can import this module by its name, however that was started."""
    if path is None:
        return
    import runpy  # imported where it is needed, like a few others: so that --help is there at once

    sys.modules.setdefault("hub_stress_test", sys.modules[__name__])
    try:
        runpy.run_path(path)
    except Exception as error:
        raise UsageError(f"--operations {path}: {type(error).__name__}: {error}") from None


def choose(mix: Mapping[str, float], n: int) -> str:
    """Which operation the n-th request is: by weight, as evenly as a golden-ratio sequence spreads them."""
    point = (n * 0.6180339887498949) % 1 * sum(mix.values())
    reached = zip(mix, itertools.accumulate(mix.values()))
    return next(name for name, end in reached if point < end)


def perform(
    operation: str, send: Operation, user: str, endpoint: str, session: HubSession, due_s: float | None = None
) -> None:
    """Do one operation on a user and measure it, whatever it raises; from when it was due, or (None) from now."""
    sent_s = session.clock()
    error: str | None
    call = Call(tries=1)
    try:
        response = send(user, endpoint, session)
        error, call = None if response.ok else str(response.status_code), call_of(response.request)
    except Stopped:
        return
    except requests.RequestException as failure:
        error, call = why(failure), call_of(failure.request)
    except Exception as failure:
        LOG.debug("The operation %s failed on %s", operation, user, exc_info=True)
        error = f"{type(failure).__name__}: {failure}"
    due_s = sent_s if due_s is None else due_s
    session.metrics.add(Sample(operation, user, due_s, sent_s, session.clock(), error, call.tries, call.backoff_s))


@dataclasses.dataclass(frozen=True)
class Load:
    """What load to send: to whom, what, and by which model (open with a rate, else closed)."""

    users: tuple[str, ...]
    mix: Mapping[str, float]
    workers: int  # threads in each process; in the open model there are more if a slow hub could need them
    rate_per_s: float | None = None
    duration_s: float | None = None  # None: once through the users
    processes: int = 1
    operations_file: str | None = None

    @property
    def planned(self) -> int:
        """How many requests an open load consists of."""
        return round((self.rate_per_s or 0) * self.duration_s) if self.duration_s else len(self.users)

    @property
    def title(self) -> str:
        """What is going on while it is sent."""
        if self.rate_per_s:
            return f"sending {self.rate_per_s:.4g} per second"
        return f"sending for {self.duration_s:g} s" if self.duration_s else "sending"

    @property
    def open_workers(self) -> int:
        """Threads that an open load needs in each process to go on while the hub answers nothing for 3 seconds.

        More than 200 get into each other's way: then more processes are what helps.
        """
        return max(self.workers, min(200, math.ceil(3 * (self.rate_per_s or 0) / self.processes)))

    def due(self, part: int, pace: Pace) -> Iterator[tuple[int, float]]:
        """Number and due moment of each request of an open load that one of the processes sends."""
        return ((n, pace.due_s(n)) for n in range(part, self.planned, self.processes))


def send_load(
    load: Load, part: int, started_s: float, endpoint: str, session: HubSession, tell: Callable[[int, int], None]
) -> None:
    """Send one process's part of a load, from `started_s` on, telling how many requests are done and have failed."""

    def on_tick(_: object = None) -> None:
        tell(session.metrics.count(load.mix), session.metrics.failures(load.mix))

    session.pause(started_s - session.clock())
    if load.rate_per_s:
        last_s = started_s + load.planned / load.rate_per_s + OPEN_GRACE_S
        due = Shared(on_schedule(load.due(part, Pace(load.rate_per_s, started_s)), last_s, session))
        sender = functools.partial(send_when_due, due, load=load, endpoint=endpoint, session=session)
        in_threads([sender] * load.open_workers, session, on_tick)
        return
    until_s = started_s + load.duration_s if load.duration_s else None
    workers = load.workers * load.processes
    shares = [load.users[w::workers] for w in range(part, min(workers, len(load.users)), load.processes)]
    work = functools.partial(work_through, load=load, endpoint=endpoint, session=session, until_s=until_s)
    fan_out(work, shares, load.workers, session, on_tick)


def send_when_due(due: Iterator[tuple[int, float]], load: Load, endpoint: str, session: HubSession) -> None:
    """One worker of the open model: send the next request as soon as it is due, going round the users."""
    for n, due_s in due:
        name = choose(load.mix, n)
        perform(name, OPERATIONS[name], load.users[n % len(load.users)], endpoint, session, due_s)


def work_through(share: Sequence[str], load: Load, endpoint: str, session: HubSession, until_s: float | None) -> None:
    """One worker of the closed model: one request for each user of its share, each after a random 0 to 1 s."""
    for n, user in enumerate(share if until_s is None else itertools.cycle(share)):
        if not session.pause(random.random()) or session.hub_is_gone or session.clock() >= (until_s or math.inf):
            return
        name = choose(load.mix, n)
        perform(name, OPERATIONS[name], user, endpoint, session)


def spread_load(load: Load, endpoint: str, session: HubSession) -> float:
    """Send a load from its processes; the busiest one's share of a processor while it sent.

    Their samples and counts go to the session. Raises `HubStressError` when a process dies.
    """
    with Progress(load.title, None if load.duration_s and not load.rate_per_s else load.planned) as progress:
        if load.processes > 1:
            return _spread_over_processes(load, endpoint, session, progress)
        cpu_s, began_s = time.process_time(), session.clock()
        send_load(load, 0, session.clock(), endpoint, session, progress.tell)
        return (time.process_time() - cpu_s) / max(session.clock() - began_s, 1e-3)


def _spread_over_processes(load: Load, endpoint: str, session: HubSession, progress: Progress) -> float:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(load.processes)]
    children = [
        context.Process(target=_send_in_process, args=(theirs, load, part, endpoint, session.token), daemon=True)
        for part, (_, theirs) in enumerate(pipes)
    ]
    with _signals_blocked():
        for child, (_, theirs) in zip(children, pipes):
            child.start()
            theirs.close()
    try:
        return _lead([ours for ours, _ in pipes], session, progress)
    except (EOFError, OSError):
        raise LoadDied("a process that sends the load died") from None
    finally:
        for child in children:
            child.join(1.0)
            child.kill()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started meanwhile leave Ctrl-C, which reaches them all, to this one, which gets it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or the first process would start it, which unblocks the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _lead(pipes: Sequence[Connection], session: HubSession, progress: Progress) -> float:
    """Start the processes at one moment, pass a stop on, and collect what they measured; the largest CPU share."""
    import multiprocessing.connection

    for pipe in pipes:
        pipe.recv()  # it is ready
    for pipe in pipes:
        pipe.send(session.clock() + 0.2)
    busiest, waiting, told = 0.0, list(pipes), False
    done = dict.fromkeys(pipes, (0, 0))
    while waiting:
        multiprocessing.connection.wait(waiting, timeout=0.1)
        for pipe in [pipe for pipe in waiting if pipe.poll()]:
            news = pipe.recv()
            if isinstance(news, Sent):
                session.metrics.merge(news.metrics)
                session.traffic.merge(news.traffic)
                busiest = max(busiest, news.cpu_share)
                waiting.remove(pipe)
            else:
                done[pipe] = news
        progress.tell(*map(sum, zip(*done.values())))
        session.answered_s = session.clock()
        if session.stopping.is_set() and not told:
            told = True
            for pipe in waiting:
                pipe.send("stop")
    return busiest


@dataclasses.dataclass(frozen=True)
class Sent:
    """What one process measured, and its share of a processor meanwhile."""

    metrics: Metrics
    traffic: Traffic
    cpu_share: float


def _send_in_process(pipe: Connection, load: Load, part: int, endpoint: str, token: str) -> None:
    """One of several processes; it leaves signals to the one that started it, and ends with it."""
    load_operations(load.operations_file)
    session = get_session(token, pool_maxsize=load.open_workers)
    pipe.send("ready")
    started_s = pipe.recv()
    threading.Thread(target=_stop_when_told, args=(pipe, session), daemon=True).start()
    cpu_s = time.process_time()
    send_load(load, part, started_s, endpoint, session, lambda done, failed: pipe.send((done, failed)))
    cpu_share = (time.process_time() - cpu_s) / max(session.clock() - started_s, 1e-3)
    pipe.send(Sent(session.metrics, session.traffic, cpu_share))


def _stop_when_told(pipe: Connection, session: HubSession) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    session.stop()


# ==== Watching: pings, and the hub's own figures =====================================================================


class Ping:
    """While the `with` block runs, reads one user five times a second: what everybody else on the hub feels."""

    def __init__(self, username: str, endpoint: str, session: HubSession) -> None:
        self._username, self._endpoint, self._session = username, endpoint, session
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ping", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(1.0)  # a ping that a silent hub holds up is left to itself

    def _run(self) -> None:
        pace = Pace(PING_RATE_PER_S, self._session.clock())
        for n in itertools.count():
            due_s = pace.due_s(n)
            if self._done.wait(max(0.0, due_s - self._session.clock())) or self._session.stopping.is_set():
                return
            perform("ping", self._read, self._username, self._endpoint, self._session, due_s)

    def _read(self, username: str, endpoint: str, session: HubSession) -> requests.Response:
        """`GET /users/{name}`, once: a retry would hide what it is there to see."""
        return session.exchange("GET", user_url(endpoint, username), Call(observer=True, retry_until_s=0))


class Monitor:
    """While the `with` block runs, reads the hub's own metrics every 5 seconds, and once before and after.

    `GET /hub/metrics`: 200 with Prometheus' text; 403 without the scope read:metrics (on 1.x any token will do).
    """

    def __init__(self, endpoint: str, session: HubSession, wanted: bool) -> None:
        self.snapshots: list[Snapshot] = []
        self.missing = ""  # why there are no snapshots
        self._url = endpoint.removesuffix("/api") + "/metrics"
        self._session = session.for_cleaning_up()  # so that it sees the hub also after the load was stopped
        self._parser = importlib.import_module("prometheus_client.parser") if optional("prometheus_client") else None
        self._done, self._looking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._wanted = wanted
        if wanted and not self._parser:
            self.missing = "prometheus-client is not installed: pip install prometheus-client"
            LOG.info("The hub's own figures are not read, since %s", self.missing)

    def __enter__(self) -> Monitor:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(1.0)

    def look(self) -> None:
        """Take one more snapshot, unless there is a reason why none can be had."""
        with self._looking:
            if not self._wanted or self.missing or not self._parser:
                return
            sent_s = self._session.clock()
            try:
                call = Call(observer=True, retry_until_s=0)
                response = self._session.exchange("GET", self._url, call, timeout=METRICS_TIMEOUT_S)
                page = response.text if response.status_code == 200 else ""
                families = list(self._parser.text_string_to_metric_families(page))
            except (requests.RequestException, ValueError) as error:
                LOG.debug("The hub's metrics could not be read: %s", why(error))
                return
            if response.status_code == 200:
                samples = ((one.name, one.labels, one.value) for family in families for one in family.samples)
                self.snapshots.append(snapshot(samples, (sent_s + self._session.clock()) / 2))
            elif response.status_code == 403:
                self.missing = "the token lacks the scope read:metrics"
            elif not self.snapshots:
                self.missing = f"GET {urllib.parse.urlsplit(self._url).path} was answered {response.status_code}"

    def _run(self) -> None:
        while not self._done.wait(METRICS_EVERY_S):
            self.look()


# ==== The three commands =============================================================================================


@dataclasses.dataclass(frozen=True)
class Terms:
    """How a run is judged and how it ends; and the options it was given, for the record."""

    conditions: Sequence[Condition] = (FAILED,)
    baseline: Mapping[str, Any] | None = None
    cleanup_timeout_s: float = CLEANUP_TIMEOUT_S
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Run:
    """One run on one hub: what it talks through, whom it has made, what went wrong.

    As a context it answers SIGINT and SIGTERM: the first ends the load, so that cleaning up begins; the second leaves.
    """

    def __init__(
        self, command: str, token: str, endpoint: str, dry_run: bool, name: str | None, concurrency: int, terms: Terms
    ) -> None:
        self.command, self.name, self.dry_run, self.terms = command, name, dry_run, terms
        self.session = get_session(token, dry_run, concurrency + 2)
        self.started, self._began_s = datetime.now(timezone.utc), self.session.clock()
        self.hub = check_hub(endpoint, self.session, command)
        self.existing = self._look()
        self.monitor = Monitor(self.hub.endpoint, self.session, wanted=command != "purge" and not dry_run)
        self.claims = Claims()
        self.gone: set[str] = set()
        self.cleaned = CleanUp()
        self.troubles: list[str] = []  # what ended the run early
        self.warnings: list[str] = []
        self.interrupted_by: int | None = None
        self.load_ended_s = self._began_s
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Run:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self.monitor.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.monitor.__exit__()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted_by is not None:
            _leave_at_once(number, len(set(self.claims.ours) - self.gone), self.purge_command)
        self.interrupted_by = number
        LOG.warning("Interrupted: no more load is sent; cleaning up. Interrupt once more to leave at once.")
        self.session.stop()

    @property
    def purge_command(self) -> str:
        return "hub-stress-test purge" + (f" --run {self.name}" if self.name else "")

    def _look(self) -> list[Model]:
        """The users of this run's naming; raises `SetupError`, since nothing has been changed yet."""
        try:
            return find_existing_stress_test_users(self.hub.endpoint, self.session, run=self.name)
        except HubRefused as error:
            raise SetupError(f"{error}. Nothing was changed.") from None

    def remove(self, states: Mapping[str, ServerState], ours: Callable[[str], bool], concurrency: int) -> None:
        """Remove users, for whom `states` are what is thought of their servers, from the hub."""
        session = self.session if self.command == "purge" else self.session.for_cleaning_up()
        session.pause(LATE_S if self.claims.unconfirmed else 0)
        self.cleaned = remove_users(
            states,
            ours,
            self.hub.endpoint,
            session,
            concurrency,
            timeout_s=self.terms.cleanup_timeout_s,
            gone=self.gone,
        )

    def warn_if_late(self, names: Collection[str], unsent: int = 0, cpu_share: float = 0.0) -> None:
        """Say so if this tool, and not the hub, set the pace."""
        late = self.session.metrics.late_share(names)
        if late <= 0.01 and not unsent:
            return
        cause = (
            "this machine was too slow: spread the load over more --processes"
            if cpu_share > CPU_BOUND
            else "all threads were waiting for the hub: give more --workers or --processes"
        )
        self.warnings.append(
            f"THE GENERATOR WAS LATE: {late:.0%} of the requests were sent more than {LATE_SEND_S:g} s after they "
            f"were due, {unsent} not at all; {cause if names != ['start_server'] else 'this machine was too slow'}. "
            "Latencies count from when a request was due"
        )

    def clean_up(self, starts: Mapping[str, ServerStart] | None, keep: bool, concurrency: int) -> None:
        """Remove what this run made; `starts` is what became of the servers, None if none were asked for."""
        self.load_ended_s = self.session.clock()
        self.monitor.look()
        if self.session.hub_is_gone:
            self.troubles.append(f"the hub did not answer for {HUB_GONE_S:.0f} s: no more load was sent")
        ours = self.claims.ours
        if keep:
            self.cleaned = CleanUp(kept=len(ours))
        elif ours:
            LOG.info("Cleaning up %d users", len(ours))
            unseen = ServerState.STOPPED if starts is None else ServerState.READY
            states = dict.fromkeys(self.claims.unconfirmed, ServerState.UNKNOWN)
            states |= dict.fromkeys(self.claims.confirmed, unseen)
            states |= {name: ServerState.STOPPED for name, start in (starts or {}).items() if not start.running}
            self.remove(states, set(ours).__contains__, concurrency)

    def results(
        self,
        failed: int = 0,
        tried: int = 0,
        starts: Mapping[str, ServerStart] | None = None,
        capacity: Mapping[str, Any] | None = None,
    ) -> Results:
        """All that there is to say, with the keys of the results file; the verdict is over the rest."""
        self.monitor.look()
        servers = None if starts is None else _server_results(tried, starts, self.interrupted_by is not None)
        left = sorted(self.cleaned.left)
        failed = failed or len(self.troubles)
        created = max(len(self.claims.confirmed), self.cleaned.deleted + len(left))
        found: Results = {
            "schema": 1,
            "tool": {"name": "hub-stress-test", "version": __version__},
            "command": self.command,
            "hub": self._hub_results(servers["ready"] if servers else 0),
            "started": utc(self.started),
            "finished": utc(datetime.now(timezone.utc)),
            "duration_s": self.session.clock() - self._began_s,
            "options": {"dry_run": self.dry_run, "run": self.name, **self.terms.options},
            "users": {
                "created": 0 if self.command == "purge" else created,
                "deleted": self.cleaned.deleted,
                "kept": self.cleaned.kept,
                "left_behind": left,
            },
            "failed": failed,
            "failed_rate": failed / tried if tried else None,
            "servers": servers,
            "operations": self.session.metrics.summarise(),
            "http": self.session.traffic.summarise(),
            "capacity": capacity,
            "warnings": [*self.troubles, *self.warnings],
            "timeline": self._timeline(starts),
        }
        if times := found["hub"]["restarts"]:
            found["warnings"].append(f"the hub restarted during the run{f', {times} times' if times > 1 else ''}")
        if capacity is None:
            found["conditions"] = [one.judge(found, self.terms.baseline) for one in self.terms.conditions]
            bad = any(one["held"] for one in found["conditions"])
        else:
            found["conditions"], bad = [], capacity["rate_per_s"] is None
        purge_given_up = self.command == "purge" and self.interrupted_by is not None  # not made by this run
        found["exit_code"] = int(exit_code([] if purge_given_up else left, self.interrupted_by, bad))
        return found

    def _hub_results(self, servers_ready: int) -> dict[str, Any]:
        snapshots = self.monitor.snapshots
        return {
            "endpoint": self.hub.endpoint,
            "version": self.hub.version,
            "restarts": sum(map(restarted, snapshots, snapshots[1:])) if snapshots else None,
            "metrics": hub_metrics(snapshots, self.load_ended_s, servers_ready),
            "metrics_missing": self.monitor.missing or None,
        }

    def _timeline(self, starts: Mapping[str, ServerStart] | None) -> dict[str, Any]:
        """What happened when, in seconds since the run began: what the report draws."""
        return {
            "operations": self.session.metrics.timeline(self._began_s),
            "servers": None if starts is None else _server_timeline(starts, self._began_s),
            "hub": _hub_timeline(self.monitor.snapshots, self._began_s),
            "load_ended_s": rounded(self.load_ended_s - self._began_s),
        }


def _leave_at_once(number: int, users: int, purge_command: str) -> None:
    sys.stderr.write(f"\nLeft at once: up to {users} users remain on the hub. Remove them with: {purge_command}\n")
    sys.stderr.flush()
    os._exit(128 + number)


def utc(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def run_stress_test(
    count: int,
    batch_size: int,
    token: str,
    endpoint: str,
    dry_run: bool = False,
    keep: bool = False,
    profile: str | Mapping[str, Any] | None = None,
    *,
    run: str = "",
    server_timeout_s: float = SERVER_LIFECYCLE_TIMEOUT,
    fail_fast: bool = False,
    rate_per_s: float | None = None,
    hold_s: float = 0.0,
    terms: Terms = Terms(),
) -> Results:
    """Make `count` users, start their servers, measure, and remove them all; the results, also of what failed.

    Raises `SetupError` when the hub, the token or its rights will not do; nothing has been changed then.
    """
    token = Secret(token)
    starts: dict[str, ServerStart] | None = None
    with Run("stress-test", token, endpoint, dry_run, run, batch_size, terms) as this:
        hub, session = this.hub.endpoint, this.session
        how: dict[str, Any] = {"timeout_s": server_timeout_s, "fail_fast": fail_fast, "rate_per_s": rate_per_s}
        try:
            users = create_users(count, batch_size, hub, session, this.existing, run=run, claims=this.claims)
            starts = {}
            with Ping(users[0][0], hub, session):
                starts = start_servers(users, hub, session, profile, **how)
                starts = hold_servers(starts, hold_s, hub, session) if hold_s else starts
        except HubRefused as error:
            this.troubles.append(str(error))
        finally:
            this.clean_up(starts, keep, batch_size)
        this.warn_if_late(["start_server"])
        starts = starts or {}
        return this.results(count - sum(start.ready for start in starts.values()), count, starts)


def _server_results(requested: int, starts: Mapping[str, ServerStart], interrupted: bool) -> dict[str, Any]:
    ready = sorted(
        ((start.ready_s, start) for start in starts.values() if start.ready_s is not None), key=lambda w: -w[0]
    )
    reasons = collections.Counter(start.general_reason for start in starts.values() if not start.ready)
    reasons["never started, or cut short" if interrupted else "never started"] = requested - len(starts)
    throttled_s = [start.throttled_s for start in starts.values() if start.throttled_s is not None]
    return {
        "requested": requested,
        "ready": len(ready),
        "failed": requested - len(ready),
        "reasons": {reason: number for reason, number in reasons.most_common() if number},
        "throttled": sum(start.throttled > 0 for start in starts.values()),
        "throttling_began_s": min(throttled_s) - min(start.due_s for start in starts.values()) if throttled_s else None,
        "slowest": [
            {"user": start.user, "ready_s": ready_s, "throttled": start.throttled, "message": start.message}
            for ready_s, start in ready[:5]
        ],
    }


def _server_timeline(starts: Mapping[str, ServerStart], began_s: float) -> dict[str, Any]:
    """The moments of each server's start, in seconds since the run began, as lists in the order in which it was due."""
    inorder = sorted(starts.values(), key=lambda start: start.due_s)
    moments = {
        name: [
            None if (at_s := getattr(start, name)) is None else rounded(max(0.0, at_s - began_s)) for start in inorder
        ]
        for name in ("due_s", "throttled_s", "asked_s", "ended_s")
    }
    return {"user": [start.user for start in inorder], **moments, "ready": [start.ready for start in inorder]}


def _hub_timeline(snapshots: Sequence[Snapshot], began_s: float) -> dict[str, Any] | None:
    """The hub's CPU share and memory, in seconds since the run began."""
    if not snapshots:
        return None
    shares = cpu_shares(snapshots)
    return {
        "cpu_at_s": [rounded(at_s - began_s) for at_s, _ in shares],
        "cpu_share": [rounded(share) for _, share in shares],
        "at_s": [rounded(one.at_s - began_s) for one in snapshots],
        "rss_bytes": [one.get("process_resident_memory_bytes") for one in snapshots],
        "running_servers": [max(0.0, one.get("running_servers")) for one in snapshots],  # hubs miscount at times
    }


def notebook_activity_test(
    count: int,
    token: str,
    endpoint: str,
    workers: int,
    keep: bool = False,
    dry_run: bool = False,
    *,
    run: str = "",
    duration_s: float | None = None,
    rate_per_s: float | None = None,
    processes: int = 1,
    mix: Mapping[str, float] | None = None,
    operations_file: str | None = None,
    find_capacity: bool = False,
    terms: Terms = Terms(),
) -> Results:
    """Report activity for `count` users without servers, from `workers` threads, and measure; the results.

    Closed model, or with `rate_per_s` open model, from `processes`; `find_capacity` looks for the highest rate. Users
    of this run's name that are there already come first; only those made here are deleted. Raises `SetupError`.
    """
    token = Secret(token)
    mix = mix or {"activity": 1.0}
    capacity, cpu_share, unsent = None, 0.0, 0
    with Run("activity-stress-test", token, endpoint, dry_run, run, workers, terms) as this:
        hub, session = this.hub.endpoint, this.session
        users = [user["name"] for user in this.existing][:count]
        try:
            if missing := count - len(users):
                made = create_users(missing, 10, hub, session, this.existing, run=run, claims=this.claims)
                users += [name for batch in made for name in batch]
            processes = 1 if dry_run else processes
            each = math.ceil(workers / processes)
            load = Load(tuple(users), mix, each, rate_per_s, duration_s, processes, operations_file)
            with Ping(users[0], hub, session):
                if find_capacity:
                    capacity = measure_capacity(load, terms, hub, session)
                else:
                    cpu_share = spread_load(load, hub, session)
                    unsent = load.planned - session.metrics.count(mix) if rate_per_s else 0
        except (HubRefused, LoadDied) as error:
            this.troubles.append(str(error))
        finally:
            this.clean_up(None, keep, 10)
        if not find_capacity and not session.stopping.is_set():
            this.warn_if_late(list(mix), unsent, cpu_share)
        return this.results(session.metrics.failures(mix), session.metrics.count(mix), capacity=capacity)


def measure_capacity(load: Load, terms: Terms, endpoint: str, session: HubSession) -> dict[str, Any]:
    """The highest rate at which no condition holds, and the steps to it; the session gets that step's samples."""
    search = CapacitySearch(load.rate_per_s or CAPACITY_FIRST_RATE_PER_S)
    steps: list[dict[str, Any]] = []
    best = Metrics()
    while (rate := search.next_rate()) and not session.stopping.is_set():
        step = session.beside()
        step_load = dataclasses.replace(load, rate_per_s=rate, duration_s=load.duration_s or CAPACITY_STEP_S)
        cpu_share = spread_load(step_load, endpoint, step)
        if session.stopping.is_set():
            break
        steps.append(_capacity_step(step_load, step, terms, cpu_share))
        LOG.info("At %.4g per second: %s", rate, steps[-1]["held"] or "sustained")
        held = None if steps[-1]["generator_bound"] else steps[-1]["held"] is not None
        best = step.metrics if held is False else best
        search.tell(rate, held)
        _drain_hub(load.users[0], endpoint, session)
    session.metrics.merge(best)
    reports_per_s = (search.sustained or 0) * load.mix.get("activity", 0) / sum(load.mix.values())
    return {
        "rate_per_s": search.sustained,
        "servers_reporting_every_300_s": int(reports_per_s * SERVER_REPORTS_EVERY_S) or None,
        "generator_bound": search.unknown,
        "steps": steps,
    }


def _capacity_step(load: Load, step: HubSession, terms: Terms, cpu_share: float) -> dict[str, Any]:
    """What one rate showed; `held` is the condition that held, or that the generator could not send so much."""
    operations = step.metrics.summarise()
    count, failed = step.metrics.count(load.mix), step.metrics.failures(load.mix)
    seen = {
        "operations": operations,
        "http": step.traffic.summarise(),
        "failed": failed,
        "failed_rate": failed / count if count else None,
    }
    held = next((one.text for one in terms.conditions if one.judge(seen, terms.baseline)["held"]), None)
    late = step.metrics.late_share(load.mix) > 0.01 or count < load.planned
    bound = late and cpu_share > CPU_BOUND
    return {
        "rate_per_s": load.rate_per_s,
        "sent_per_s": count / (load.duration_s or math.nan),
        "p95_s": metric_value(seen, next(iter(load.mix)) + ".p95"),
        "failed": failed,
        "held": "the generator could not send this rate" if bound else held,
        "generator_bound": bound,
    }


def _drain_hub(user: str, endpoint: str, session: HubSession) -> None:
    """Give the hub time to get over a step: until it answers within 0.1 s again, twice."""
    until_s, quick = session.clock() + DRAIN_S, 0
    while quick < 2 and session.clock() < until_s and session.pause(0.5):
        asked_s = session.clock()
        read_state(user, endpoint, session)
        quick = quick + 1 if session.clock() - asked_s < 0.1 else 0


def purge_users(
    token: str,
    endpoint: str,
    dry_run: bool = False,
    *,
    run: str | None = None,
    batch_size: int = 10,
    terms: Terms = Terms(),
) -> Results:
    """Remove every user that this tool's naming made (of one run, if named), except admins; the results.

    Finding nothing is success. Raises `SetupError`.
    """
    token = Secret(token)
    with Run("purge", token, endpoint, dry_run, run, batch_size, terms) as this:
        LOG.info("Found %d users to remove", len(this.existing))
        states = {user["name"]: server_state(user) for user in this.existing}
        if states:
            this.remove(states, functools.partial(is_test_user, run=run), batch_size)
        return this.results(len(this.cleaned.left), len(states))


# ==== Reporters ======================================================================================================


def render_summary(
    results: Results, baseline: Mapping[str, Any] | None = None, *, colour: bool = False, width: int = 100
) -> str:
    """The page that an operator reads: the verdict first, then what was asked, what came of it, how long it took."""
    page = [_verdict(results), *(f"because   {reason}" for reason in _because(results)), *_facts(results)]
    if results["exit_code"] in (ExitCode.FAILED, ExitCode.LEFT_BEHIND):
        page += [f"next      {one}" for one in advice(results)]
    page = [one if before[:10] != one[:10] else f"{'':<10}{one[10:]}" for before, one in zip(["", *page], page)]
    page = [line for one in page for line in textwrap.wrap(one, width, subsequent_indent=" " * 10, **_UNBROKEN)]
    if results["capacity"]:
        page += ["", *_capacity_table(results["capacity"])]
    if not results["options"]["dry_run"] and results["operations"]:
        page += ["", *_latency_table(results["operations"])]
    if baseline:
        page += ["", *_comparison_table(baseline, results)]
    return "\n".join(map(_coloured, page) if colour else page)


_UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_COLOURS = {"PASSED": 32, "FAILED": 31, "LEFT": 31, "INTERRUPTED": 33, "because": 33, "failed": 31, "next": 36}


def _coloured(line: str) -> str:
    """The line, its first word in the colour that the word has."""
    word = re.match(r"\w*", line)[0]  # type: ignore[index]
    return f"\033[1;{_COLOURS[word]}m{word}\033[0m{line[len(word) :]}" if word in _COLOURS else line


def _because(results: Results) -> Iterator[str]:
    yield from results["warnings"]
    for one in results["conditions"]:
        if one["held"] and one["condition"] != FAILED.text:
            yield f"{one['condition']}: it is {_value_text(one)}"


def _verdict(results: Results) -> str:
    servers, capacity = results["servers"], results["capacity"]
    words = {0: "PASSED", 1: "FAILED", 4: "LEFT SOMETHING BEHIND"}.get(results["exit_code"], "INTERRUPTED")
    if results["options"]["dry_run"]:
        return "DRY RUN: no request was sent; this is what would be done, on a hub where every server is ready at once."
    if results["command"] == "purge":
        return f"{words}: {results['users']['deleted']} users removed"
    if servers:
        half, most, last = (metric_value(results, f"server_ready.{name}") for name in ("p50", "p95", "max"))
        waited = (
            f"; half waited {duration_text(half)}, 95% at most {duration_text(most)}, the last {duration_text(last)}"
        )
        return f"{words}: {servers['ready']} of {servers['requested']} servers became ready{waited if half else ''}"
    if capacity:
        return f"{words}: {_capacity_sentence(capacity)}"
    load = set(results["operations"]) - {"create_users", "delete_user", "list_users", "stop_server", "ping"}
    count = sum(results["operations"][name]["count"] for name in load)
    what = "activity reports" if load <= {"activity"} else "requests"
    failed = sum(results["operations"][name]["failed"] for name in load)
    return f"{words}: {count - failed} of {count} {what} were accepted"


def _capacity_sentence(capacity: Mapping[str, Any]) -> str:
    rate, servers = capacity["rate_per_s"], capacity["servers_reporting_every_300_s"]
    if rate is None:
        return "the capacity was not found: no rate that was tried was sustained"
    least = "at least " if capacity["generator_bound"] else ""
    meaning = f": {servers:,} running servers that report their activity every 300 s" if servers else ""
    return f"this hub sustains {least}{rate:.0f} requests per second{meaning}"


def _facts(results: Results) -> Iterator[str]:
    servers, http = results["servers"], results["http"]
    yield f"hub       {results['hub']['version']} at {results['hub']['endpoint']}"
    if servers:
        yield from _server_facts(servers, results["options"])
    for name in sorted(results["operations"].keys() - {"server_ready"}):
        for reason, number in list(results["operations"][name]["errors"].items())[:REASONS_SHOWN]:
            yield f"answered  {number} × {reason} to {OPERATION_TITLES.get(name, name)}"
    extra = f"{http['observer_share'] or 0:.0%} of them only to observe, {http['retries']} repeated"
    yield f"took      {duration_text(results['duration_s'])}, {http['requests']:,} requests ({extra})"
    yield from _hub_facts(results)
    yield from _cleaning(results)
    for one in results["conditions"]:
        if not one["held"] and one["condition"] != FAILED.text:
            yield f"condition {one['condition']}: not held, it is {_value_text(one)}"


REASONS_SHOWN = 5


def _server_facts(servers: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    rate, batch_size = options.get("rate"), options.get("batch_size")
    pace = f"{rate:g} per second, however slow the hub" if rate else f"at most {batch_size} starting at a time"
    yield f"asked     {servers['requested']} servers, {pace}"
    throttled = f"; {servers['throttled']} were throttled" if servers["throttled"] else ""
    since = f", from {duration_text(servers['throttling_began_s'])} after the first start on" if throttled else ""
    yield f"came      {servers['ready']} ready, {servers['failed']} failed{throttled}{since}"
    reasons = list(servers["reasons"].items())
    for reason, number in reasons[:REASONS_SHOWN]:
        yield f"failed    {number} × {reason}"
    if others := sum(number for _, number in reasons[REASONS_SHOWN:]):
        yield f"failed    {others} × something else: see the results file"
    slowest = [f"{duration_text(one['ready_s'])}, {one['user']}{_why_slow(one)}" for one in servers["slowest"]]
    remarkable = any(map(_why_slow, servers["slowest"]))
    yield from (f"slowest   {one}" for one in (slowest if remarkable or not slowest else [_in_one_line(slowest)]))


def _in_one_line(parts: Iterable[str]) -> str:
    return "; ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)


def _why_slow(server: Mapping[str, Any]) -> str:
    reasons = [f"throttled {server['throttled']} ×"] if server["throttled"] else []
    reasons += [f"longest at: {server['message']}"] if server["message"] else []
    return ": " + ", ".join(reasons) if reasons else ""


def _hub_facts(results: Results) -> Iterator[str]:
    own, missing = results["hub"]["metrics"], results["hub"]["metrics_missing"]
    if missing:
        yield f"hub's own figures (CPU, memory, event-loop lag, its own request times) were not read: {missing}"
    if not own:
        return
    lag_s, most_s = own["event_loop_lag_p95_s"], own["event_loop_lag_max_s"]
    lag = f"; event loop late by {_lag_text(lag_s)} (p95), {_lag_text(most_s)} (max)" if lag_s else ""
    each = own["rss_per_server_bytes"]
    memory = f"memory {bytes_text(own['rss_before_bytes'])} before, {bytes_text(own['rss_after_bytes'])} after"
    memory += f", {bytes_text(each)} a server" if each is not None else ""
    cpu = (
        f"CPU {own['cpu_s']:.1f} s, {own['cpu_share']:.0%} of a processor, under load up to {own['cpu_share_max']:.0%}"
    )
    yield f"hub's own {cpu}; {memory}{lag}"
    for sentence in time_spent(results):
        yield f"spent     {sentence}"


def _lag_text(seconds: float) -> str:
    return f"≤ {duration_text(seconds)}" if seconds <= LAG_RESOLUTION_S else duration_text(seconds)


def _value_text(judged: Mapping[str, Any]) -> str:
    metric, value = judged["condition"].split()[0], judged["value"]
    if value is None:
        return "not measured"
    if metric.rpartition(".")[2] in LATENCY_STATISTICS:
        return duration_text(value)
    return f"{value:.1%}" if metric == "failed_rate" else f"{value:g}"


def _cleaning(results: Results) -> Iterator[str]:
    users, run = results["users"], results["options"]["run"]
    purge = "hub-stress-test purge" + (f" --run {run}" if run else "")
    if users["kept"]:
        yield f"kept      {users['kept']} users, as asked; remove them with: {purge}"
    elif users["left_behind"]:
        yield f"cleaned   {users['deleted']} users deleted; {len(users['left_behind'])} ARE STILL THERE:"
        yield "          " + " ".join(users["left_behind"])
        yield f"          remove them with: {purge}"
    else:
        yield f"cleaned   {users['deleted']} users deleted, none left"


def _in_order(operations: Mapping[str, Any]) -> list[str]:
    return [name for name in [*OPERATION_TITLES, *sorted(operations.keys() - OPERATION_TITLES)] if name in operations]


ENOUGH = {"p90": 10, "p95": 20, "p99": 100}  # samples below which a percentile is but the maximum


def _latency_table(operations: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = ("mean", "p50", "p95", "p99", "max")
    yield f"{'waited for':<16}{'count':>7}{'failed':>8}" + "".join(f"{column:>9}" for column in columns)
    for name in _in_order(operations):
        measured = operations[name]
        good = measured["count"] - measured["failed"]
        shown = [measured["latency_s"][one] if good >= ENOUGH.get(one, 1) else None for one in columns]
        times = "".join(f"{duration_text(seconds):>9}" for seconds in shown)
        yield f"{OPERATION_TITLES.get(name, name):<16}{measured['count']:>7}{measured['failed']:>8}{times}"


def _capacity_table(capacity: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'tried per s':>12}{'sent per s':>12}{'p95':>9}{'failed':>8}  what held"
    for step in capacity["steps"]:
        p95 = duration_text(step["p95_s"])
        row = f"{step['rate_per_s']:>12.4g}{step['sent_per_s']:>12.4g}{p95:>9}{step['failed']:>8}"
        yield f"{row}  {step['held'] or 'nothing: sustained'}"


def _comparison_table(baseline: Mapping[str, Any], results: Results) -> Iterator[str]:
    """Old, new and ratio of what both runs measured."""
    columns = ("p50", "p95", "max")
    yield f"{'against baseline':<16}" + "".join(f"{name:>20}" for name in columns) + f"{'failed':>10}"
    for name in _in_order(results["operations"]):
        if name in baseline.get("operations", {}):
            cells = "".join(f"{comparison(baseline, results, f'{name}.{column}'):>20}" for column in columns)
            old, new = (metric_value(run, f"{name}.failed") or 0 for run in (baseline, results))
            yield f"{OPERATION_TITLES.get(name, name):<16}{cells}{f'{old:g}→{new:g}':>10}"
    before, after = ((run.get("capacity") or {}).get("rate_per_s") for run in (baseline, results))
    if before and after:
        yield f"capacity: {before:.4g} → {after:.4g} per second, {after / before:.2f}x"


def comparison(baseline: Mapping[str, Any], results: Mapping[str, Any], metric: str) -> str:
    """Old, new and ratio of one metric, like 840ms→1.25s 1.49x."""
    old, new = metric_value(baseline, metric), metric_value(results, metric)
    ratio = f" {new / old:.{2 if new < 10 * old else 0}f}x" if old and new else ""
    return f"{duration_text(old)}→{duration_text(new)}".replace(" ", "") + ratio


# ==== The report =====================================================================================================

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2937; --faint: #6b7280; --line: #e5e7eb; --card: #f8fafc }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f172a; --ink: #e2e8f0; --faint: #94a3b8; --line: #334155; --card: #1e293b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1160px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.35rem; line-height: 1.3; margin: .5rem 0 }
h1 b { padding: .1em .5em; border-radius: .3em; color: #fff }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem } h3 { font-size: .95rem; margin: 1.2rem 0 0 }
p { margin: .3rem 0 } p, figcaption { color: var(--faint) }
.PASSED { background: #15803d } .FAILED, .LEFT { background: #b91c1c } .INTERRUPTED, .DRY { background: #a16207 }
.pair { display: grid; grid-template-columns: 3fr 2fr; gap: 0 1rem }
@media (max-width: 700px) { .pair { display: block } }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child, .words td { text-align: left } .words td { white-space: normal; vertical-align: top }
.words td:first-child { white-space: nowrap }
.words td + td { overflow-wrap: anywhere } th { color: var(--faint); font-weight: normal }
.bad { color: #dc2626 } .plot { width: 100%; min-width: 0 }
.js-plotly-plot .main-svg :is(.xtick, .ytick, .y2tick, .legendtext, .infolayer) text,
.js-plotly-plot .main-svg text.legendtext, .js-plotly-plot .main-svg .annotation text { fill: var(--faint) !important }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important }
"""
BLUE, GREEN, AMBER, RED, GREY, READY = "#3b82f6", "#22a355", "#f59e0b", "#ef4444", "#94a3b8", "rgba(34,163,85,.3)"
LAYOUT: dict[str, Any] = {
    "margin": {"l": 52, "r": 12, "t": 26, "b": 42},
    "xaxis": {"title": {"text": "seconds since the run began"}, "rangemode": "tozero"},
    "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "itemsizing": "constant"},
    "font": {"family": "system-ui, sans-serif", "size": 12},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hovermode": "closest",
    "showlegend": True,
}
ENOUGH_TO_PLOT = 10
Trace = dict[str, Any]  # of plotly


class Page:
    """An HTML page that is being put together, with its plots."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._plots: list[tuple[str, list[Trace], dict[str, Any]]] = []

    def add(self, element: str, text: str, **attributes: str) -> None:
        given = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items())
        self._parts.append(f"<{element}{given}>{html.escape(text)}</{element}>")

    def open(self, tag: str) -> None:
        self._parts.append(tag)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> None:
        """A table that scrolls by itself on a narrow screen; no header where `header` is empty."""
        rows = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{row}</tr>" for row in ([head] if header else []) + rows)
        self._parts.append(f'<div class="scroll"><table class="{kind}">{body}</table></div>')

    def plot(self, traces: Sequence[Trace], height: int, y_title: str, **layout: Any) -> None:
        """A plot whose x axis is the time since the run began, unless `layout` says otherwise."""
        name = f"plot-{len(self._plots)}"
        self._parts.append(f'<div class="plot" id="{name}" style="height:{height}px"></div>')
        own = {"height": height, "yaxis": {"title": {"text": y_title}, "rangemode": "tozero"}}
        self._plots.append((name, list(traces), LAYOUT | own | layout))

    def render(self, title: str, plotly_js: str) -> str:
        draw = "".join(
            f"Plotly.newPlot({_script(name)},{_script(traces)},{_script(layout)},"
            "{responsive: true, displayModeBar: false});"
            for name, traces, layout in self._plots
        )
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(self._parts)}"
            f"<script>{plotly_js}</script><script>{draw}</script></body></html>\n"
        )


def _script(data: Any) -> str:
    """JSON that can stand in a script element, whatever names and messages it holds."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def render_report(results: Results, baseline: Mapping[str, Any] | None = None) -> str:
    """One HTML page, which needs no network: the summary's words, and what happened when."""
    page, timeline = Page(), results["timeline"]
    verdict = _verdict(results)
    page.open(f'<h1><b class="{verdict.split()[0].rstrip(":")}">{html.escape(verdict.partition(":")[0])}</b>')
    page.add("span", verdict.partition(":")[2])
    page.open("</h1>")
    versions = f"{results['tool']['name']} {results['tool']['version']}"
    page.add("p", f"{versions} {results['command']}, {results['started']} to {results['finished']}")
    notes = [f"because   {one}" for one in _because(results)] + list(_facts(results))
    failed = results["exit_code"] in (ExitCode.FAILED, ExitCode.LEFT_BEHIND)
    notes += [f"next      {one}" for one in advice(results)] if failed else []
    page.table((), ((note[:10].strip(), note[10:]) for note in notes), "words")
    if results["capacity"]:
        page.add("h2", "Capacity")
        header, *rows = (re.split(r"  +", line.strip(), maxsplit=4) for line in _capacity_table(results["capacity"]))
        page.table(header, rows)
    if timeline["servers"] and timeline["servers"]["user"]:
        _plot_servers(page, timeline["servers"], timeline["load_ended_s"])
    _plot_watch(page, results)
    if results["operations"]:
        page.add("h2", "What was waited for")
        header, *rows = (re.split(r"  +", line.strip()) for line in _latency_table(results["operations"]))
        page.table(header, rows)
    for name in _in_order(results["operations"]):
        old = ((baseline or {}).get("timeline") or {}).get("operations", {}).get(name)
        if sum(timeline["operations"][name]["often"]) >= ENOUGH_TO_PLOT:
            _plot_operation(page, name, results, timeline["operations"][name], old)
    _add_tables(page, results, baseline)
    return page.render(f"hub-stress-test: {verdict}", importlib.import_module("plotly.offline").get_plotlyjs())


def server_curves(servers: Mapping[str, Any], until_s: float, points: int = 300) -> dict[str, list[float]]:
    """How many servers were waiting (throttled), starting, ready and failed at each of so many moments."""
    due, asked, ended = sorted(servers["due_s"]), sorted(servers["asked_s"]), sorted(servers["ended_s"])
    ready = sorted(end for end, good in zip(servers["ended_s"], servers["ready"]) if good)
    moments = [until_s * n / points for n in range(points + 1)]
    count = functools.partial(bisect.bisect_right)
    return {
        "at_s": [round(at, 3) for at in moments],
        "waiting": [count(due, at) - count(asked, at) for at in moments],
        "starting": [count(asked, at) - count(ended, at) for at in moments],
        "ready": [count(ready, at) for at in moments],
        "failed": [count(ended, at) - count(ready, at) for at in moments],
    }


def _plot_servers(page: Page, servers: Mapping[str, Any], until_s: float) -> None:
    page.add("h2", "Servers")
    curves = server_curves(servers, until_s)
    kinds = {"failed": RED, "ready": GREEN, "starting": BLUE, "waiting": AMBER}
    stack = {"x": curves["at_s"], "stackgroup": "one", "mode": "none"}
    traces = [stack | {"name": kind, "y": curves[kind], "fillcolor": colour} for kind, colour in kinds.items()]
    page.plot(traces, 260, "servers", hovermode="x unified")
    page.add("h3", "How long each waited, in the order in which they were due")
    asked, ended, ready = servers["asked_s"], servers["ended_s"], servers["ready"]
    taken = [at if held is None else held for held, at in zip(servers["throttled_s"], asked)]
    good = [at if is_ready else None for at, is_ready in zip(ended, ready)]
    bars = [
        _bars("asked", GREY, servers["due_s"], taken, servers["user"]),
        _bars("throttled", AMBER, servers["throttled_s"], asked, servers["user"]),
        _bars(
            "starting", BLUE, [at if is_ready else None for at, is_ready in zip(asked, ready)], ended, servers["user"]
        ),
        _bars("failed", RED, [None if is_ready else at for at, is_ready in zip(asked, ready)], ended, servers["user"]),
        _bars("ready", READY, good, [until_s] * len(good), servers["user"]),
    ]
    page.plot(bars, 460, "server", yaxis={"title": {"text": "server"}, "autorange": "reversed"})


def _bars(name: str, colour: str, begins: Sequence[float | None], ends: Sequence[float], users: Sequence[str]) -> Trace:
    """A horizontal bar for each server that has a beginning: one line with gaps, since there may be thousands."""
    shown = [(n, begin, end) for n, (begin, end) in enumerate(zip(begins, ends)) if begin is not None and end >= begin]
    said = [f"{users[n]}: {name} for {duration_text(end - begin)}" for n, begin, end in shown]
    x = [at for _, begin, end in shown for at in (begin, end, None)]
    y = [at for n, _, _ in shown for at in (n + 1, n + 1, None)]
    text = [one for words in said for one in (words, words, "")]
    width = max(1.0, min(9.0, 380 / len(users)))
    return _line(name, x, y, colour, width=width) | {"text": text, "hoverinfo": "text"}


def _line(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, **line: Any) -> Trace:
    return {"name": name, "x": x, "y": y, "mode": "lines", "line": {"color": colour, "width": 1.5} | line}


def _plot_watch(page: Page, results: Results) -> None:
    """What everybody else felt, beside how busy the hub was."""
    ping, hub = results["timeline"]["operations"].get("ping"), results["timeline"]["hub"]
    if not ping:
        return
    page.add("h2", "What everybody else felt, and how busy the hub was")
    for sentence in time_spent(results):
        page.add("p", sentence[:1].upper() + sentence[1:] + ".")
    pings = (("p50", BLUE), ("max", AMBER))
    traces = [_line(f"ping {one}", ping["at_s"], milliseconds(ping[f"{one}_s"]), colour) for one, colour in pings]
    if not hub:
        page.plot(traces, 280, "ping, ms", hovermode="x unified")
        return
    share = [round(100 * one) for one in hub["cpu_share"]]
    busy = _line("hub's CPU", [hub["at_s"][0], *hub["cpu_at_s"]], [*share[:1], *share], RED, shape="vh", width=1)
    busy |= {"yaxis": "y2", "fill": "tozeroy", "fillcolor": "rgba(239,68,68,.15)"}
    right = {"title": {"text": "hub's CPU, % of a processor"}, "overlaying": "y", "side": "right", "showgrid": False}
    right |= {"range": [0, max([105, *share])], "dtick": 25}
    margin = LAYOUT["margin"] | {"r": 56}
    page.plot([*traces, busy], 280, "ping, ms", hovermode="x unified", yaxis2=right, margin=margin)


def milliseconds(seconds: Iterable[float | None]) -> list[float | None]:
    """The same durations in milliseconds; None stays None."""
    return [None if one is None else round(one * 1000, 1) for one in seconds]


def _plot_operation(
    page: Page, name: str, results: Results, seen: Mapping[str, Any], old: Mapping[str, Any] | None
) -> None:
    """Latency over time, and how often each latency came, with its percentiles; the baseline's in grey."""
    page.add("h3", OPERATION_TITLES.get(name, name))
    page.open('<div class="pair">')
    lines = {"p50": BLUE, "p95": AMBER, "max": RED}
    traces = [_line(one, seen["at_s"], milliseconds(seen[f"{one}_s"]), colour) for one, colour in lines.items()]
    traces += [_line("baseline p95", old["at_s"], milliseconds(old["p95_s"]), GREY, dash="dot")] if old else []
    if any(seen["failed"]):
        failed = [(at, number) for at, number in zip(seen["at_s"], seen["failed"]) if number]
        marks = _line("failed", [at for at, _ in failed], [0] * len(failed), RED)
        traces.append(
            marks | {"mode": "markers", "cliponaxis": False, "text": [f"{number} failed" for _, number in failed]}
        )
    page.plot([trace | {"mode": trace["mode"].replace("lines", "lines+markers")} for trace in traces], 230, "ms")
    runs = [("share of all", seen, BLUE), *([("baseline", old, GREY)] if old else [])]
    shares = [(one, run["latency_s"], [100 * n / sum(run["often"]) for n in run["often"]], c) for one, run, c in runs]
    traces = [_line(one, milliseconds(x), y, colour, shape="hvh") | {"fill": "tozeroy"} for one, x, y, colour in shares]
    latency_s, top = results["operations"][name]["latency_s"], max(max(y) for _, _, y, _ in shares)
    for one, dash in (("p50", "solid"), ("p95", "dash"), ("p99", "dot")):
        at_ms = latency_s[one] * 1000
        traces.append(_line(f"{one} {duration_text(latency_s[one])}", [at_ms, at_ms], [0, top], AMBER, dash=dash))
    page.plot(traces, 230, "%", xaxis={"title": {"text": "ms"}, "type": "log", "nticks": 5})
    page.open("</div>")


def _add_tables(page: Page, results: Results, baseline: Mapping[str, Any] | None) -> None:
    if baseline:
        page.add("h2", "Against the baseline")
        header, *rows = (re.split(r"  +", line.strip()) for line in _comparison_table(baseline, results))
        page.table(header, rows)
    if own := results["hub"]["metrics"]:
        page.add("h2", "The hub's own clock")
        durations = [("spawn: " + name, one) for name, one in own["spawns"].items()] + list(own["requests"].items())
        page.table(
            ("handler", "count", "mean"),
            ((name, f"{one['count']:.0f}", duration_text(one["mean_s"])) for name, one in durations),
        )
    if results["conditions"]:
        page.add("h2", "Conditions")
        judged = (
            (one["condition"], "held" if one["held"] else "not held", _value_text(one)) for one in results["conditions"]
        )
        page.table(("the run fails if", "", "it is"), judged)
    page.add("h2", "Options and versions")
    facts = {**results["options"], "hub": results["hub"]["version"], "tool": results["tool"]["version"]}
    page.table(
        (),
        ((name.replace("_", "-"), value) for name, value in facts.items() if value not in (None, False, [])),
        "words",
    )


# ==== Files ==========================================================================================================


def write_results(path: str, results: Results) -> None:
    """Write the results as JSON, whole or not at all; the timeline, which nobody reads by eye, on one line."""
    legible = json.dumps({key: value for key, value in results.items() if key != "timeline"}, indent=2)
    write_whole(path, f'{legible[:-2]},\n  "timeline": {json.dumps(results["timeline"])}\n}}\n')


def write_whole(path: str, text: str) -> None:
    """Write a file, whole or not at all."""
    beside = f"{path}.{os.getpid()}.tmp"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(beside, path)


# ==== Command line ===================================================================================================


class _Parser(argparse.ArgumentParser):
    """Refuses bad usage in one sentence."""

    def error(self, message: str) -> Any:
        raise UsageError(message)


def whole_number(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def duration(text: str) -> float:
    """Seconds in a duration like 90, 90s, 5m or 1h."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|)", text)
    if not match or not (seconds := float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]):
        raise argparse.ArgumentTypeError(f"expected a duration like 90, 90s, 5m or 1h, not {text!r}")
    return seconds


def run_name(text: str) -> str:
    """A run's name: lower-case letters, digits and inner hyphens, since hubs lower-case user names."""
    if not RUN_NAME.fullmatch(text) or len(text) > 40:
        raise argparse.ArgumentTypeError(
            f"expected at most 40 lower-case letters, digits and inner hyphens, not {text!r}"
        )
    return text


def endpoint_url(text: str) -> str:
    """An http or https URL without the slash at its end and without credentials."""
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise argparse.ArgumentTypeError(
            f"expected a URL like https://hub.example.org/hub/api, not {without_credentials(text)!r}"
        )
    return without_credentials(text).rstrip("/")


def token_text(text: str) -> Secret:
    """A token, wrapped so that it cannot be printed by accident."""
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("expected a token of printable characters without blanks")
    return Secret(text)


def positive_number(text: str) -> float:
    """A number above 0."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return float(text)


def mix_of(text: str) -> dict[str, float]:
    """Weights by operation, from NAME=WEIGHT,…"""
    parts = [re.fullmatch(r"([\w-]+)=([0-9]*\.?[0-9]+)", part.strip()) for part in text.split(",")]
    mix = {part[1]: float(part[2]) for part in parts if part}
    if len(mix) != len(parts) or not all(mix.values()):
        raise argparse.ArgumentTypeError(f"expected NAME=WEIGHT,… like activity=8,read=2, not {text!r}")
    return mix


def results_file(text: str) -> dict[str, Any]:
    """The results that an earlier run wrote."""
    try:
        with open(text, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read as results ({error})") from None
    if not isinstance(found, dict) or found.get("schema") != 1:
        raise argparse.ArgumentTypeError(f"{text} holds no results of this tool")
    return found


def writable_file(text: str) -> str:
    """The path of a file that can be written; nothing is written yet."""
    folder = os.path.dirname(os.path.abspath(text))
    if os.path.isdir(text) or not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return text


def profile_value(text: str) -> str | dict[str, Any]:
    """A profile's slug, or an object of user options in JSON."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"this is not valid JSON ({error}): {text}") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"expected a profile's slug or a JSON object, not {text}")
    return options


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of the command line; without a `kind` it is a switch."""

    flags: str
    help: str
    kind: Callable[[str], Any] | None = None
    metavar: str | None = None
    default: Any = None
    const: Any = None  # what it means without a value, if that is allowed
    repeatable: bool = False

    def add_to(self, parser: argparse.ArgumentParser, **overriding: Any) -> None:
        settings: dict[str, Any] = {"help": self.help, "default": self.default}
        settings |= {"type": self.kind, "metavar": self.metavar} if self.kind else {"action": "store_true"}
        settings |= {"nargs": "?", "const": self.const} if self.const else {}
        settings |= {"action": "append"} if self.repeatable else {}
        parser.add_argument(*self.flags.split(), **settings | overriding)


GLOBAL_OPTIONS = (
    Option("-e --endpoint", "the hub's API; else JUPYTERHUB_ENDPOINT, else JUPYTERHUB_API_URL", endpoint_url, "URL"),
    Option("-t --token", "else JUPYTERHUB_API_TOKEN (better: arguments show in the process list)", token_text, "TOKEN"),
    Option("--dry-run", "send no request; show what would be done, on a simulated empty hub"),
    Option("--log-to-file", "log to FILE, or to a new file in the temporary directory", str, "FILE", const=True),
    Option("-v --verbose", "debug log, one line for each request with its response time"),
    Option("--run", "call the users hub-stress-test-NAME-<n>, so that two jobs never meet", run_name, "NAME"),
    Option("--results", "write the results as JSON", writable_file, "FILE"),
    Option("--report", "write a report as one HTML page (needs plotly)", writable_file, "FILE"),
    Option(
        "--fail-if",
        "fail if METRIC OP VALUE, like 'server_ready.p95 > 30s'; repeatable (failed > 0)",
        condition,
        "CONDITION",
        repeatable=True,
    ),
    Option("--baseline", "results of an earlier run: print old, new and ratio", results_file, "FILE"),
)
KEEP = Option("-k --keep", "leave the users, and their servers, on the hub")
CLEANUP_TIMEOUT = Option(
    "--cleanup-timeout",
    "how long cleaning up goes on without getting any further (5m)",
    duration,
    "DURATION",
    CLEANUP_TIMEOUT_S,
)
COMMAND_OPTIONS = {
    "stress-test": (
        Option("-c --count", "how many users and servers (100)", whole_number, "N", 100),
        Option("-b --batch-size", "servers starting at one time, users made at a time (10)", whole_number, "N", 10),
        KEEP,
        Option("-p --profile", "a profile's slug, or a JSON object of user options", profile_value, "P"),
        Option("--server-timeout", "how long a user waits for a server (60s)", duration, "DURATION", 60.0),
        Option("--fail-fast", "start no more servers once one has failed"),
        Option("--rate", "start R servers per second, however slow the hub; without it, see -b", positive_number, "R"),
        Option(
            "--hold", "keep the servers for so long, then check that all are still ready", duration, "DURATION", 0.0
        ),
        CLEANUP_TIMEOUT,
    ),
    "activity-stress-test": (
        Option("-c --count", "how many users (100)", whole_number, "N", 100),
        KEEP,
        Option("--workers", "threads that send (100); with --rate, at least so many", whole_number, "N", 100),
        Option("--rate", "send R requests per second, however slow the hub (open model)", positive_number, "R"),
        Option("--duration", "go round the users for so long; without it, once", duration, "DURATION"),
        Option("--processes", "spread the threads over N processes (1)", whole_number, "N", 1),
        Option("--mix", "operations by weight (activity=1); there are read and list too", mix_of, "NAME=WEIGHT,…"),
        Option("--operations", "a file that registers operations of your own", str, "FILE.py"),
        Option("--find-capacity", "raise the rate until a condition holds: what does the hub sustain?"),
        CLEANUP_TIMEOUT,
    ),
    "purge": (Option("-b --batch-size", "users removed at one time (10)", whole_number, "N", 10), CLEANUP_TIMEOUT),
}
COMMAND_HELP = {
    "stress-test": "make users, start their servers, measure, remove them",
    "activity-stress-test": "send the activity reports of running servers, measure",
    "purge": "remove the users that earlier runs left behind",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Global options stand before or after the command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="hub-stress-test", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hub-stress-test {__version__}")
    for option in GLOBAL_OPTIONS:
        option.add_to(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, options in COMMAND_OPTIONS.items():
        command = commands.add_parser(name, help=COMMAND_HELP[name], allow_abbrev=False)
        for option in options:
            option.add_to(command)
        for option in GLOBAL_OPTIONS:
            again = {"dest": "fail_if_too"} if option.repeatable else {}
            option.add_to(command, default=argparse.SUPPRESS, **again)  # so that it does not undo an earlier one
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, completed from the environment. Raises `UsageError`; --help and --version end the program."""
    words = list(sys.argv[1:] if argv is None else argv)
    for at, (word, following) in enumerate(zip(words, words[1:])):
        if word == "--log-to-file" and following in NEEDED_SCOPES:  # a subcommand, not the optional FILE
            words[at : at + 2] = [following, word]
            break
    args = build_parser().parse_args(words)
    args.fail_if = (args.fail_if or []) + vars(args).pop("fail_if_too", []) or None
    env = os.environ
    if args.endpoint is None and (found := env.get("JUPYTERHUB_ENDPOINT") or env.get("JUPYTERHUB_API_URL")):
        args.endpoint = _from_environment(endpoint_url, found, "JUPYTERHUB_ENDPOINT")
    if args.token is None and (found := env.get("JUPYTERHUB_API_TOKEN")):
        args.token = _from_environment(token_text, found, "JUPYTERHUB_API_TOKEN")
    return args


def _from_environment(convert: Callable[[str], T], text: str, variable: str) -> T:
    try:
        return convert(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"environment variable {variable}: {error}") from None


def validate(args: argparse.Namespace) -> None:
    """Nothing, if the arguments can be used together; else raises `UsageError` with a sentence."""
    for option in ("count", "batch_size", "workers"):
        value = getattr(args, option, None)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: expected a whole number of at least 1")
    if getattr(args, "dry_run", False):
        if getattr(args, "find_capacity", False):
            raise UsageError("--find-capacity measures a hub, and --dry-run sends it nothing: give one of them")
        args.endpoint, args.token = args.endpoint or DRY_RUN_ENDPOINT, args.token or Secret("dry-run")
    if getattr(args, "processes", 1) > getattr(args, "workers", 1):
        raise UsageError(f"--processes {args.processes} is more than --workers {args.workers}: each needs a thread")
    load_operations(getattr(args, "operations", None))
    if unknown := sorted((getattr(args, "mix", None) or {}).keys() - OPERATIONS.keys()):
        raise UsageError(f"--mix: there is no operation {unknown[0]!r}; there are {', '.join(sorted(OPERATIONS))}")
    for one in getattr(args, "fail_if", None) or ():
        name = one.metric.rpartition(".")[0]
        if name and name not in OPERATION_TITLES.keys() | OPERATIONS.keys():
            raise UsageError(f"--fail-if {one.text!r}: there is no operation {name!r}")
        if one.relative and not args.baseline:
            raise UsageError(f"--fail-if {one.text!r}: a multiple needs a --baseline")
    if getattr(args, "report", None) and not optional("plotly"):
        raise UsageError("--report needs plotly, which is not installed: pip install plotly")
    if args.token is None:
        raise UsageError("no token: put it into the environment variable JUPYTERHUB_API_TOKEN, or give --token")
    if args.endpoint is None:
        raise UsageError("no endpoint: give --endpoint https://YOUR-HUB/hub/api, or set JUPYTERHUB_ENDPOINT")


class _Redacting(logging.Formatter):
    """Log lines, tracebacks included, from which the token is taken out."""

    def __init__(self, token: str | None) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self._token = token

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line.replace(self._token, "***") if self._token else line


def setup_logging(
    verbose: bool = False, log_to_file: bool | str = False, args: argparse.Namespace | None = None
) -> None:
    """Log to standard error, or to a file, and say where. Raises `UsageError` when that file cannot be used.

    A file that is there already is added to if it is a log of ours, and refused otherwise.
    """
    token = getattr(args, "token", None)
    handler: logging.Handler = logging.StreamHandler()
    if log_to_file:
        path = _log_path(log_to_file)
        handler = logging.FileHandler(path, encoding="utf-8")
        sys.stderr.write(f"Logging to {path}\n")
    handler.setFormatter(_Redacting(token))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if log_to_file and args is not None:
        LOG.info("Started with %s", options_of(args))
    sys.excepthook = _log_uncaught


def _log_path(log_to_file: bool | str) -> str:
    """The path of a file to which a log may be added, its first line written."""
    import tempfile

    try:
        if log_to_file is True:
            stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
            path = f"{tempfile.gettempdir()}/hub-stress-test-{stamp}.log"
            if os.path.exists(path):
                path = path.replace(".log", f"-{os.urandom(3).hex()}.log")
        else:
            path = str(log_to_file)
        with open(path, "a+", encoding="utf-8", errors="replace") as file:
            if not file.tell():
                file.write(f"{LOG_HEADER}, version {__version__}\n")
            file.seek(0)
            if not file.readline().startswith(LOG_HEADER):
                raise UsageError(
                    f"--log-to-file {path}: this file is there already and is not a log of ours; name another"
                )
    except OSError as error:
        raise UsageError(f"--log-to-file {log_to_file}: cannot be written ({error.strerror})") from None
    return path


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    LOG.critical("This is a bug of hub-stress-test", exc_info=(kind, error, traceback))


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Every option with its value, the token left out."""
    options = {name: value for name, value in vars(args).items() if name not in ("token", "command", "baseline")}
    return options | {"fail_if": [one.text for one in args.fail_if or ()]}


def run_command(args: argparse.Namespace) -> Results:
    """What the command that was asked for found."""
    slow = args.mix or {"activity": 1.0} if getattr(args, "find_capacity", False) else {}
    default = (FAILED, *(condition(f"{name}.p95 > 500ms") for name in slow))
    terms = Terms(args.fail_if or default, args.baseline, args.cleanup_timeout, options_of(args))
    if args.command == "purge":
        return purge_users(
            args.token, args.endpoint, args.dry_run, run=args.run, batch_size=args.batch_size, terms=terms
        )
    if args.command == "stress-test":
        return run_stress_test(
            args.count,
            min(args.batch_size, args.count),
            args.token,
            args.endpoint,
            args.dry_run,
            args.keep,
            args.profile,
            run=args.run or "",
            server_timeout_s=args.server_timeout,
            fail_fast=args.fail_fast,
            rate_per_s=args.rate,
            hold_s=args.hold,
            terms=terms,
        )
    return notebook_activity_test(
        args.count,
        args.token,
        args.endpoint,
        args.workers,
        args.keep,
        args.dry_run,
        run=args.run or "",
        duration_s=args.duration,
        rate_per_s=args.rate,
        processes=args.processes,
        mix=args.mix,
        operations_file=args.operations,
        find_capacity=args.find_capacity,
        terms=terms,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`, whose summary is on standard output."""
    try:
        args = parse_args(argv)
        validate(args)
        setup_logging(args.verbose, args.log_to_file, args)
        results = run_command(args)
    except HubStressError as error:
        sys.stderr.write(f"hub-stress-test: {error}\n")
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.SIGINT)
    if args.results:
        write_results(args.results, results)
    if args.report:
        write_whole(args.report, render_report(results, args.baseline))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print(render_summary(results, args.baseline, colour=colour))
    return int(results["exit_code"])


# ==== Locust users: the same load from many machines =================================================================
#
# Locust gives every process a greenlet for each of its users, and patches sockets, sleeps and locks so that they wait
# for each other. What is above works there as it is; here is only what stands between it and Locust.

LOCUST_RUN = "locust"
LOCUST_OPTIONS = (
    Option(
        "--hub-endpoint", "the hub's API; else --host, JUPYTERHUB_ENDPOINT, JUPYTERHUB_API_URL", endpoint_url, "URL"
    ),
    Option("--hub-token", "else JUPYTERHUB_API_TOKEN (better), on every machine", token_text, "TOKEN"),
    Option("--hub-run", "users are called hub-stress-test-NAME-<worker>-<n>", run_name, "NAME", LOCUST_RUN),
    Option("--hub-mix", "what a RunningServer sends, by weight", mix_of, "NAME=WEIGHT,…", "activity=1"),
    Option("--hub-operations", "a file that registers operations of your own", str, "FILE.py", ""),
    Option("--hub-scale", "a RunningServer sends so many times as often as every 300 s", positive_number, "F", "1"),
    Option("--hub-stay", "how long a Person keeps the server", duration, "DURATION", "60s"),
    Option("--hub-visits", "how many times a Person comes", whole_number, "N", "1"),
    Option("--hub-profile", "a profile's slug, or a JSON object of user options", str, "P", ""),
    Option("--hub-server-timeout", "how long a Person waits for a server", duration, "DURATION", "60s"),
    Option(
        "--hub-fail-if", "the exit code is 1 if METRIC OP VALUE; repeatable", condition, "CONDITION", repeatable=True
    ),
)


def locust_is_loading() -> bool:
    """Whether Locust is loading this file, or one that imports it: only then are there user classes."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__") != "locust.util.load_locustfile":
        frame = frame.f_back
    return frame is not None


def locust_results(entries: Iterable[Any], load: Collection[str], throttled: int) -> Results:
    """What conditions are about, from the entries of Locust's statistics; its latencies include those of failures."""
    operations = {
        entry.name: {
            "count": entry.num_requests,
            "failed": entry.num_failures,
            "rate_per_s": entry.total_rps,
            "latency_s": {
                "min": (entry.min_response_time or 0) / 1000,
                "mean": entry.avg_response_time / 1000,
                **{f"p{n}": entry.get_response_time_percentile(n / 100) / 1000 for n in (50, 90, 95, 99)},
                "max": entry.max_response_time / 1000,
            },
        }
        for entry in entries
        if entry.num_requests
    }
    tried = sum(operations[name]["count"] for name in operations.keys() & set(load))
    failed = sum(operations[name]["failed"] for name in operations.keys() & set(load))
    rate = failed / tried if tried else None
    return {"operations": operations, "failed": failed, "failed_rate": rate, "http": {"throttled": throttled}}


if locust_is_loading():
    import gevent  # type: ignore[import-untyped, unused-ignore]
    from locust import FastHttpUser, constant, events, task
    from locust.exception import StopUser
    from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

    LOG.setLevel(logging.WARNING)  # and no progress: Locust shows its own
    SAY = LOG.getChild("locust")
    SAY.setLevel(logging.INFO)

    class LocustSession:
        """What a HubSession is to the functions above, over Locust's fast client; samples become Locust's requests."""

        def __init__(self, user: FastHttpUser, token: str) -> None:
            self.clock, self.stopping, self.metrics = time.monotonic, threading.Event(), self
            self.operation: str | None = None  # what the next request is reported as
            self._client, self._events = user.client, user.environment.events
            self._headers = {"Authorization": f"token {token}", "Accept-Encoding": "identity"}

        def request(self, method: str, url: str, headers: Mapping[str, str] | None = None, **kwargs: Any) -> Any:
            """Locust's own, with the token and without redirects; reported as `operation`."""
            kwargs = {"name": self.operation, "allow_redirects": False} | kwargs
            return self._client.request(method, url, headers=self._headers | dict(headers or {}), **kwargs)

        get = functools.partialmethod(request, "GET")
        post = functools.partialmethod(request, "POST")
        put = functools.partialmethod(request, "PUT")
        patch = functools.partialmethod(request, "PATCH")
        delete = functools.partialmethod(request, "DELETE")

        def ask(
            self,
            method: str,
            url: str,
            *,
            operation: str | None = None,
            user: str = "",
            ok: Collection[int] = (200, 201, 202, 204),
            call: Call | None = None,
            timeout: float = 0,
            **kwargs: Any,
        ) -> Reply:
            """As a HubSession's, in one try; the time-out is the one that the user class has."""
            sent_s = self.clock()
            response = self.request(method, url, catch_response=True, **kwargs)  # which reports nothing by itself
            if response.status_code:
                reply = _read_reply(response, call or Call(tries=1), self.clock())
            else:
                reply = Reply(0, self.clock(), reason=why(response.error), lost=not _never_sent(response.error))
            if operation:
                error = None if reply.status in ok else str(reply.status or reply.reason)
                self.add(Sample(operation, user, sent_s, sent_s, reply.answered_s, error))
            return reply

        def events(self, url: str, until_s: float) -> Iterator[Model]:
            """Events of a progress stream as they arrive, until it ends, breaks or is cut at `until_s`."""
            response = self.request("GET", url, stream=True, catch_response=True)
            try:
                while response.status_code == 200 and (line := self._line(response, until_s)):
                    if line.startswith(b"data:"):
                        yield json.loads(line.removeprefix(b"data:"))
            except (OSError, ValueError) as error:
                LOG.debug("Progress stream of %s broke: %s", url, why(error))
            finally:
                if response.status_code:
                    response.release()

        def _line(self, response: Any, until_s: float) -> bytes:
            line = b""
            with gevent.Timeout(max(0.001, until_s - self.clock()), False):
                while not line.endswith(b"\n") and (byte := response.read(1)):
                    line += byte
                return line
            return b""

        def add(self, sample: Sample) -> None:
            """Report a sample to Locust, in its milliseconds."""
            error = HubStressError(sample.error) if sample.error else None
            self._events.request.fire(
                request_type="hub",
                name=sample.operation,
                response_time=max(0.0, sample.latency_s) * 1000,
                response_length=0,
                exception=error,
                context={},
            )

        def pause(self, seconds: float) -> bool:
            gevent.sleep(max(0.0, seconds))
            return True

    class Site:
        """What the users of one process share in one test: the hub, the names, and who has to be deleted at its end."""

        def __init__(self, environment: Any, worker: int) -> None:
            self.args = locust_args(environment)
            self.run = f"{self.args.run}-{worker}"
            self.session = get_session(self.args.token)
            self.hub = check_locust_hub(environment, self.args, self.session)
            existing = find_existing_stress_test_users(self.hub.endpoint, self.session, run=self.run)
            self.indexes = itertools.count(first_free_index([user["name"] for user in existing], self.run))
            self.turns, self.claims, self.throttled = Turns(), Claims(), 0
            self.states: dict[str, ServerState] = {}
            self.gone: list[str] = []  # who has left and was deleted
            self._spare: list[str] = []
            self._making, self._cleaning = threading.Lock(), threading.Lock()
            self._cleaned: CleanUp | None = None

        def new_user(self, session: HubSession, batch: int) -> str:
            """The name of a user for this caller alone, made with the next ones in one batch; raises `HubRefused`."""
            with self._making:
                while not self._spare:
                    wanted = [username(index, self.run) for index in itertools.islice(self.indexes, batch)]
                    self._spare = _create_batch(wanted, self.hub.endpoint, session, self.claims)
                return self._spare.pop(0)

        def clean_up(self) -> dict[str, Any]:
            """Delete whom this process has made, once; what to tell the master."""
            with self._cleaning, _second_signal_leaves(self):
                if self._cleaned is None:
                    ours = set(self.claims.ours) - set(self.gone)
                    states = dict.fromkeys(ours, ServerState.STOPPED) | self.states
                    session = self.session.for_cleaning_up()
                    session.pause(LATE_S if self.claims.unconfirmed else 0)
                    self._cleaned = remove_users(
                        {name: states[name] for name in ours}, ours.__contains__, self.hub.endpoint, session, 10
                    )
            deleted = self._cleaned.deleted + len(self.gone)
            told: dict[str, Any] = {"deleted": deleted, "left": list(self._cleaned.left), "throttled": self.throttled}
            return told | {"run": self.run}

    @contextlib.contextmanager
    def _second_signal_leaves(site: Site) -> Iterator[None]:
        """While a test cleans up, another signal leaves at once, saying how to remove the rest."""

        def leave(number: int, _: FrameType | None) -> None:
            _leave_at_once(number, len(site.claims.ours), f"hub-stress-test purge --run {site.run}")

        before = {number: signal.signal(number, leave) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def locust_args(environment: Any) -> argparse.Namespace:
        """The options of a test, from the command line or the web form; raises `UsageError`."""
        options = vars(environment.parsed_options)
        args = argparse.Namespace(baseline=None, token=environment.hub_token)
        for option in LOCUST_OPTIONS[2:]:
            flag = option.flags
            given = options[flag[2:].replace("-", "_")]
            texts = given or [] if option.repeatable else [given]
            try:
                values = [option.kind(str(text)) if text and option.kind else None for text in texts]
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"argument {flag}: {error}") from None
            setattr(args, flag.removeprefix("--hub-").replace("-", "_"), values if option.repeatable else values[0])
        args.profile = profile_value(args.profile) if args.profile else None
        args.operations = args.operations or None
        args.endpoint = environment.host and endpoint_url(environment.host)
        validate(args)
        return args

    def check_locust_hub(environment: Any, args: argparse.Namespace, session: HubSession) -> Hub:
        """The hub, once it has shown that it accepts the token for what the user classes will do."""
        people = any(issubclass(kind, Person) for kind in environment.user_classes)
        return check_hub(args.endpoint, session, "stress-test" if people else "activity-stress-test")

    class HubUser(FastHttpUser):
        """A Locust user with a user of their own on the hub."""

        abstract = True
        batch = 1  # users made by one request
        host = ""
        insecure = False  # certificates are verified
        network_timeout = connection_timeout = float(DEFAULT_TIMEOUT)

        def on_start(self) -> None:
            site: Site | None = getattr(self.environment, "hub_site", None)
            if site is None:  # its check has failed, and said why
                raise StopUser
            self.site, self.session = site, LocustSession(self, site.args.token)

        @property
        def hub_session(self) -> HubSession:
            return self.session  # type: ignore[return-value]

        def new_user(self) -> str:
            try:
                return self.site.new_user(self.hub_session, self.batch)
            except HubRefused as error:
                SAY.error("%s", error)
                raise StopUser from None

    class RunningServer(HubUser):
        """Sends what a running server sends: a report every 300 s, or --hub-scale times as often; or the --hub-mix."""

        batch = 10

        def on_start(self) -> None:
            super().on_start()
            self.username = self.new_user()
            self._interval_s: float = SERVER_REPORTS_EVERY_S / self.site.args.scale
            self._number = random.randrange(1000)  # where in the mix this one begins
            self._due_s: float = time.monotonic() + random.random() * self._interval_s
            gevent.sleep(self._due_s - time.monotonic())  # so that not all send at one time

        def wait_time(self) -> float:
            """Seconds to the next report, which is due at its time however long the last one took."""
            self._due_s += self._interval_s
            return max(0.0, self._due_s - time.monotonic())

        @task
        def send(self) -> None:
            self._number += 1
            name = self.session.operation = choose(self.site.args.mix, self._number)
            try:
                OPERATIONS[name](self.username, self.site.hub.endpoint, self.hub_session)
            except Exception as error:
                now_s = time.monotonic()
                self.session.add(Sample(name, self.username, now_s, now_s, now_s, f"{type(error).__name__}: {error}"))

    class Person(HubUser):
        """Logs in, waits until their server is ready, stays for --hub-stay, stops it and leaves."""

        wait_time = constant(0)

        def on_start(self) -> None:
            super().on_start()
            self._visits = 0

        @task
        def visit(self) -> None:
            args, site = self.site.args, self.site
            if self._visits == args.visits:
                gevent.sleep(3600)  # has left, but stays in Locust's count, which it would otherwise fill up again
                return
            self._visits += 1
            name = self.new_user()
            site.states[name] = ServerState.READY
            starter = Starter(site.hub.endpoint, self.hub_session, args.profile, args.server_timeout, site.turns)
            start = starter.bring_up(name)
            site.throttled += start.throttled
            if start.ready:
                gevent.sleep(args.stay)
            stopped = stop_server(name, site.hub.endpoint, self.hub_session, wait=True)
            if stopped and ask_to_delete(name, site.hub.endpoint, self.hub_session) is ServerState.GONE:
                site.gone.append(name)

    def _add_options(parser: Any) -> None:
        for option in LOCUST_OPTIONS:
            hidden = {"include_in_web_ui": False} if option in LOCUST_OPTIONS[:2] or option.repeatable else {}
            option.add_to(parser, type=_checked(option.kind), **hidden)

    def _checked(kind: Any) -> Callable[[str], str]:
        """Text that `kind` accepts, as text: which is what a web form's field holds, and what Locust can send on."""

        def check(text: str) -> str:
            if text:
                kind(text)
            return text

        return check

    def _begin(environment: Any, runner: Any, **_: Any) -> None:
        options = environment.parsed_options
        token = options.hub_token or os.environ.get("JUPYTERHUB_API_TOKEN")
        options.hub_token = None  # Locust hands options on to workers and pages
        environment.hub_token = Secret(token) if token else None
        found = os.environ.get("JUPYTERHUB_ENDPOINT") or os.environ.get("JUPYTERHUB_API_URL")
        environment.host = environment.host or options.hub_endpoint or found
        environment.hub_reports = {}
        for kind in environment.user_classes:
            kind.host = environment.host or ""
        if isinstance(runner, WorkerRunner):
            runner.register_message("hub-clean-up", lambda **_: runner.stop(), concurrent=True)
        else:
            if isinstance(runner, MasterRunner):
                runner.register_message("hub-cleaned-up", _note_report)
            if options.headless:
                try:
                    args = locust_args(environment)
                    check_locust_hub(environment, args, get_session(args.token))
                except HubStressError as error:
                    sys.stderr.write(f"hub-stress-test: {error}\n")
                    raise SystemExit(int(error.exit_code)) from None

    def _start(environment: Any, **_: Any) -> None:
        environment.hub_site, environment.hub_reports = None, {}
        runner = environment.runner
        try:
            if isinstance(runner, MasterRunner):
                args = locust_args(environment)
                check_locust_hub(environment, args, get_session(args.token))
            else:
                site = Site(environment, getattr(runner, "worker_index", 0))
                environment.hub_site = site
                SAY.info("Users of this process are called %s", username(0, site.run)[:-1] + "<n>")
        except HubStressError as error:
            SAY.error("%s", error)
            environment.process_exit_code = int(error.exit_code)
            if not isinstance(runner, WorkerRunner):
                gevent.spawn(runner.stop)
        if isinstance(runner, WorkerRunner) and environment.parsed_options.processes:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the master too, which tells us

    def _have_workers_clean_up(environment: Any, **_: Any) -> None:
        runner = environment.runner
        if not isinstance(runner, MasterRunner):
            return
        awaited = {client.id for client in runner.clients.all if client.state != STATE_MISSING}
        runner.send_message("hub-clean-up")
        until_s = time.monotonic() + 2 * CLEANUP_TIMEOUT_S
        while awaited - environment.hub_reports.keys() and time.monotonic() < until_s:
            gevent.sleep(0.1)
            awaited -= {client.id for client in runner.clients.all if client.state == STATE_MISSING}

    def _clean_up(environment: Any, **_: Any) -> None:
        runner = environment.runner
        site: Site | None = getattr(environment, "hub_site", None)
        told = site.clean_up() if site else {}
        if isinstance(runner, WorkerRunner):
            runner.send_message("hub-cleaned-up", told)
        elif site:
            environment.hub_reports["local"] = told

    def _note_report(environment: Any, msg: Any, **_: Any) -> None:
        environment.hub_reports[msg.node_id] = msg.data

    def _end(environment: Any, **_: Any) -> None:
        """Judge a test in the exit code: the master's for all workers."""
        runner: Any = environment.runner
        if isinstance(runner, WorkerRunner):
            return
        runner.stop()
        reports = [told for told in environment.hub_reports.values() if told]
        left = [name for told in reports for name in told["left"]]
        for told in reports:
            if told["left"]:
                SAY.error("STILL THERE: %s; hub-stress-test purge --run %s", " ".join(told["left"]), told["run"])
        if not environment.process_exit_code:
            environment.process_exit_code = _judge(environment, reports, left)

    def _judge(environment: Any, reports: Sequence[Mapping[str, Any]], left: list[str]) -> int:
        runner: Any = environment.runner
        args = locust_args(environment)
        lost = (
            [client.id for client in runner.clients.all if client.state == STATE_MISSING]
            if hasattr(runner, "clients")
            else []
        )
        for client in lost:
            run = f"{args.run}-{runner.get_worker_index(client)}"
            SAY.error("A worker is gone, and what it made may still be there: hub-stress-test purge --run %s", run)
        SAY.info("%d users deleted, %s left", sum(told["deleted"] for told in reports), len(left) or "none")
        throttled = sum(told["throttled"] for told in reports)
        results = locust_results(runner.stats.entries.values(), {*args.mix, "server_ready"}, throttled)
        judged = [one.judge(results, None) for one in args.fail_if or (FAILED,)]
        for one in judged:
            SAY.info("%s: %s, it is %s", one["condition"], "HELD" if one["held"] else "not held", _value_text(one))
        return int(exit_code([*left, *lost], None, any(one["held"] for one in judged)))

    hooks: Any = events
    hooks.init_command_line_parser.add_listener(_add_options)
    hooks.init.add_listener(_begin)
    hooks.test_start.add_listener(_start)
    hooks.test_stopping.add_listener(_have_workers_clean_up)
    hooks.test_stop.add_listener(_clean_up)
    hooks.quitting.add_listener(_end)


if __name__ == "__main__":
    raise SystemExit(main())
