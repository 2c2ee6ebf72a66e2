#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.29", "urllib3>=1.26.12"]
# ///
"""Will this JupyterHub hold, and how far does it go?

Three commands answer, from a shell or a CI job:

  question                                      command                                         takes
  What would it do? (no request is sent)        --dry-run stress-test --count 30                a second
  Do three servers start?                       stress-test --count 3                           a start
  What if 30 people come within a minute?       stress-test --count 30 --rate 0.5               1 to 3 min
  Can 300 people work, who come in 5 minutes?   stress-test --count 300 --within 5m --work      6 to 15 min
  Does the proxy lose connections of tabs?      stress-test --count 3 --check-proxy             3 min
  How many people a minute does it take?        stress-test --find-capacity --max-servers 200   10 to 20 min
  Do 100 servers stay up for ten minutes?       stress-test --count 100 --hold 10m --visit      15 min
  Can it take the reports of 3,000 servers?     activity-stress-test --rate 10 --duration 5m    5 min
  How many reports per second does it sustain?  activity-stress-test --find-capacity            1 to 4 min
  What did earlier runs leave?                  purge                                           seconds
  What can I find out without being an admin?   stress-test --count 5 --own-servers             a start

stress-test starts a server for each fake user; --visit, --page and --work follow each person through the
proxy to the results of their cells. activity-stress-test makes users without servers, and sends the activity
reports that running servers send. purge removes what earlier runs left behind. Where one machine is not
enough, Locust runs this same file: locust -f hub_stress_test.py.

What it does to a hub. It makes users called hub-stress-test-<n> (with --run NAME: hub-stress-test-NAME-<n>),
starts and stops their servers, and deletes them. It writes only to users that it made; purge and
activity-stress-test also to those of earlier runs, whose whole name follows that pattern; never to an admin.
Unless --keep is given, it deletes every user that it made, however the run ends, then lists the hub's users
again; it names those that remain, with exit code 4. A hub may keep unix accounts, home directories and
volumes of deleted users. With --check-proxy, a proxy that loses connections keeps them for an hour, which no
cleanup can undo: this is reported, and fails the run. With --own-servers all of this is true of named servers
of the token's owner; the owner's other servers are not touched, and no admin rights are needed.

What the numbers mean. "Server ready" is what a person waits: from when a start was due until the hub says
that the server is ready, throttling included. "Visit" runs from ready to the page. "At work" runs from when a
person was due to the page of their server, or to the result of their first cell. "Stay" fails if the hub says
that the server is gone or, with --visit, if the server no longer answers. "Ping" reads one user five times a
second, from when each ping was due: it is what everybody else on the hub feels. Every other latency runs from
sending a request (with --rate, from when it was due) to its final answer, without the pauses for which the
hub asked. "Hub's own" comes from the hub's metrics page. Latencies are those of successes; failures are
counted beside them, never averaged in. Percentiles are within 1 %.

Exit codes: 0 done and no --fail-if condition was met (by default: nothing failed); 1 a condition was met, or
the run could not do what it was asked to do; 2 bad usage; 3 no hub there, token refused or too weak (nothing
was changed); 4 something that this run made is still on the hub, or the hub failed to stop servers; 130 and
143 interrupted by SIGINT and SIGTERM (or a terminal that hung up), cleaned up.

What it does not promise: it logs nobody in through a browser. Without --visit it opens no server, and does
not measure a proxy, a page or a kernel. Two runs at the same time on one hub need different --run names.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import enum
import errno
import functools
import gzip
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
import select
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import textwrap
import threading
import time
import types
import typing
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from http.cookiejar import DefaultCookiePolicy
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

try:
    import requests
    from requests.adapters import BaseAdapter, HTTPAdapter
    from requests.exceptions import ChunkedEncodingError, ContentDecodingError
    from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError
    from urllib3.util.retry import Retry
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"hub-stress-test: {error.name} is not installed: pip install requests\n")
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# ==== Constants and exit codes ==============================================================================

__version__ = "0.1.0"

LOG = logging.getLogger("hub-stress-test")

USERNAME_PREFIX = "hub-stress-test"
DEFAULT_TIMEOUT = 30  # seconds that one request may take
SERVER_LIFECYCLE_TIMEOUT = 60  # seconds that a server may take to start, or to stop
CLEANUP_TIMEOUT_S = 300.0  # cleanup times out after this long without progress
RETRIES = 5  # after 0, 1, 2, 4 and 8 seconds
RETRY_WINDOW_S = 60.0  # no retry later than this after the first try
RETRY_AFTER_MAX_S = 120.0
HUB_GONE_S = 120.0  # the load ends after this much silence from the hub
TOKEN_CHECK_EVERY_S = 30.0  # the least time between two checks that the hub still accepts the token
LATE_ACT_S = 2.0  # how long a hub may take to act on a request whose answer was lost
THROTTLE_PAUSE_S = 5.0  # before a throttled start is retried, when the hub names no time
HEAD_START_S = 0.02  # of throttled starts before new ones
FIRST_STARTS = 3  # starts before any server is ready: a hub may exit after five failures in a row
STREAM_TIMEOUT_S = 20.0  # the hub sends a keep-alive every 8 seconds
LATE_SEND_S = 0.1  # the generator was too slow if it sent a request later than this after it was due
OPEN_GRACE_S = 5.0  # after the end of an open load, for requests that were due before
BUSY = 0.85  # of a processor: a process that used more could hardly do more
IDLE = 0.3  # of a processor: a hub that never used more made nobody wait, whatever its machine did
LATE_LOOP_S = 0.2
DRAIN_S = 20.0  # at most, between two steps
SERVER_REPORTS_EVERY_S = 300  # JupyterHub's default for how often a running server reports its activity
REPORTS_SHARE = 0.1  # of what a hub sustains: the rest is for people
MANY_SERVERS = 3000
SILENT_S = 3.0  # before a warning that the hub does not answer
PING_RATE_PER_S = 5.0
PINGS_AT_MOST = 150  # under way at the same time: until the first of them times out
STATUS_EVERY_S, STATUS_IN_PLACE_EVERY_S = 10.0, 0.5
METRICS_EVERY_S = 5.0
SAMPLES_EVERY_S = 1.0  # between two writes: what a killed program may lose
FIRST_VISIT_S = 10.0  # the first visit comes through within this time, or the public side is somewhere else
CONNECTIONS_OF_A_BROWSER = 6
REDIRECTS_MAX = 5
HANDSHAKES_PER_S = 20.0  # of the check of the proxy
UNANSWERED_S = 10.0
SHUTDOWN_S = 15.0  # that a server may take to end by itself
SEND_TIMEOUT_S = 5.0  # that a websocket may take to accept a cell
METRICS_TIMEOUT_S = 5.0
PAGE = 200  # users a page: the most that a hub gives
SERVER_NAME_MAX = 30  # characters that hubs from 6.0 take
MANY = 9999  # named servers of one's own, where nobody knows how many it will be
ONE_SIGNAL_S = 1.0  # timeout(1), `uv run` and others send one signal twice
LOG_HEADER = "hub-stress-test log"
TOKEN_REFUSED = "no longer accepts the token"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Json = dict[str, Any]  # what was just read from JSON, or is about to be written
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


# ==== Errors, by what the user does next ====================================================================


class HubStressError(Exception):
    """A problem that one sentence explains to the user."""

    exit_code = ExitCode.FAILED


class UsageError(HubStressError, argparse.ArgumentTypeError):
    """The command line, or a value in it, is wrong: nothing was sent."""

    exit_code = ExitCode.USAGE


class SetupError(HubStressError):
    """No hub there, or its token is refused or too weak: nothing was changed."""

    exit_code = ExitCode.SETUP


class CutShort(HubStressError):
    """The run cannot go on to its end; what was made is cleaned up, and the run has failed."""


class HubRefused(CutShort):
    """The hub refused what the run needs to go on, or did not answer; see `Hub.denial`."""

    def __init__(self, task: str, reply: Reply, denial: str = "") -> None:
        self.denied = bool(denial)
        refused = "refused" if reply.status else "did not answer when asked"
        super().__init__(f"the hub {refused} to {task}: {f'it {denial}' if denial else reply}")


class Stopped(Exception):
    """A stop of the run was requested."""


# ==== Pure rules: words and numbers =========================================================================


class Secret(str):
    """A string that no repr shows, so that no traceback, debugger or log can print it by accident."""

    def __repr__(self) -> str:
        return "'***'"


def duration_text(seconds: float | None) -> str:
    """Three digits and a unit, from 100 s on in minutes: 840 ms, 1.25 s, 62.1 s, 20 min 35 s; else –."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.{1 if seconds < 0.00995 else 0}f} ms"
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def share_text(share: float) -> str:
    """A share of 1: 27 %."""
    return f"{100 * share:.0f} %"


def bytes_text(number: float) -> str:
    """117 MB, 40 kB."""
    return f"{number / 1e6:.0f} MB" if number >= 9.95e5 else f"{number / 1e3:.0f} kB"


def rounded(seconds: float | None) -> float | None:
    """To a tenth of a millisecond, which is finer than anything here is measured."""
    return None if seconds is None else round(seconds, 4)


def utc(moment: datetime, timespec: str = "seconds") -> str:
    """The moment as 2026-11-20T16:00:00Z, or finer."""
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def without_credentials(url: str) -> str:
    """The URL, or a text with one, without the user and password that it may carry."""
    return re.sub("(?<=//)[^/?#]*@", "", url)


def counted(number: float, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 user, 3,000 users, 2 people, 1.5 people."""
    digits = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    return f"{digits} {noun if digits == '1' else plural or f'{noun}s'}"


def clock_text(seconds: float) -> str:
    """01:14, from an hour on 1:02:03; what is less than nothing is 00:00."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"


def moment_text(passed_s: float, last_s: float, hold_s: float = 0.0) -> str:
    """01:14 of 05:00 until the last is due, then 05:10; a hold counts down."""
    if hold_s > 0:
        return f"{clock_text(passed_s)}, holding for {clock_text(hold_s)} more"
    return clock_text(passed_s) + f" of {clock_text(last_s)}" * (passed_s < last_s)


def optional(module: str) -> Any:
    """A module of the extra `full`; None when it is not installed."""
    return importlib.import_module(module) if importlib.util.find_spec(module.partition(".")[0]) else None


def as_json(value: Any) -> Any:
    """The same as JSON has it: records become objects."""
    if dataclasses.is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(inner) for name, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# ==== Pure rules: names =====================================================================================

RUN_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_ANY_RUN = re.compile(rf"{USERNAME_PREFIX}-(?:{RUN_NAME.pattern}-)?(?:0|[1-9][0-9]*)")


def username(index: int, run: str = "") -> str:
    """The name of a run's n-th user."""
    return f"{USERNAME_PREFIX}-{run}-{index}" if run else f"{USERNAME_PREFIX}-{index}"


def index_of(name: str, run: str = "") -> int | None:
    """The index in one of this run's user names, else None."""
    match = re.fullmatch(f"{re.escape(username(0, run)[:-1])}(0|[1-9][0-9]*)", name)
    return int(match[1]) if match else None


def is_test_user(name: str, run: str | None = None) -> bool:
    """Whether this tool's naming made the name: of one run, or (None) of any."""
    return bool(_ANY_RUN.fullmatch(name)) if run is None else index_of(name, run) is not None


def first_free_index(names: Iterable[str], run: str = "") -> int:
    """One more than the highest index in use; gaps are not filled, since others may be about to use them."""
    return 1 + max((index_of(name, run) or 0 for name in names), default=0)


def natural(name: str) -> tuple[str, int]:
    """A sort key by which the second user comes before the tenth."""
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)


def names_text(names: Iterable[str]) -> str:
    """Names in natural order, three or more in a row as first `to` last: hub-stress-test-1 to -60."""
    rows: list[list[str]] = []
    for name in sorted(names, key=natural):
        text, number = natural(name)
        if rows and natural(rows[-1][-1]) == (text, number - 1):
            rows[-1].append(name)
        else:
            rows.append([name])
    texts = (f"{row[0]} to -{natural(row[-1])[1]}" if len(row) > 2 else " ".join(row) for row in rows)
    return " ".join(texts)


def thing(own_servers: bool) -> str:
    """What a run makes and removes, in the singular."""
    return "server" if own_servers else "user"


def purge_command(run: str | None, own_servers: bool = False) -> str:
    """The command that removes what a run left behind."""
    return "hub-stress-test purge" + " --own-servers" * own_servers + (f" --run {run}" if run else "")


def pods_command(run: str | None, own_servers: bool = False) -> str:
    """The command that lists the pods and volumes of a run's servers on Kubernetes, whose names may be cut.

    KubeSpawner calls them jupyter-hub-stress-test-1 and claim-hub-stress-test-1, before 7.0 with -2d for -.
    """
    name = USERNAME_PREFIX if own_servers or not run else username(0, run)[:-2][:36]
    return f"kubectl get pods,pvc -n NAMESPACE | grep -E '{name.replace('-', '-(2d)?')}'"


def still_starting(number: int) -> str:
    """What may remain of this many servers that were stopped while they were starting."""
    stopped = counted(number, "server was stopped while it was", "servers were stopped while they were")
    return f"{stopped} still starting: see squeue, kubectl or docker ps for jobs, pods or containers"


# ==== Pure rules: conditions ================================================================================

LATENCY_STATISTICS = ("min", "mean", "p50", "p90", "p95", "p99", "max")
STATISTICS = (*LATENCY_STATISTICS, "failed", "count", "rate_per_s")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
UNITS = {"": 1.0, "x": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9}
FITTING = {"s": ("ms", "s", "m"), "bytes": ("kB", "MB", "GB"), "%": ("%",)}
KEYS_IN = {"s": r".*(?<!_per)(?<!_300)_s", "bytes": ".*_bytes", "%": ".*_(share(_max)?|rate)"}
COUNTS = ("errors", "in_front", "reasons", "statuses")  # mappings in results where an absent name counts 0


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A condition, the value of its metric, and whether it was met."""

    condition: str
    value: float | None
    held: bool
    limit: float | None = None
    baseline: float | None = None  # the metric's value there, for a condition that is relative to it


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition under which a run has failed, like `server_ready.p95 > 30s`."""

    text: str
    metric: str
    comparison: str
    limit: float  # seconds, a share, a number, or a multiple of the baseline's value
    unit: str  # as it was written; x for such a multiple

    def judge(self, results: Json, baseline: Json | None) -> Judgement:
        """Whether the condition is met. A metric without data meets every condition."""
        value, before = metric_value(results, self.metric), None
        limit: float | None = self.limit
        if self.unit == "x":
            before = metric_value(baseline or {}, self.metric)
            limit = None if before is None else before * self.limit
        met = value is None or limit is None or COMPARISONS[self.comparison](value, limit)
        return Judgement(self.text, value, met, limit, before)


def metric_value(results: Json, metric: str) -> float | None:
    """The value of a condition's metric, by its path or a short form; None when nothing was measured."""
    name, _, statistic = metric.rpartition(".")
    in_operation = ["operations", name, *["latency_s"] * (statistic in LATENCY_STATISTICS), statistic]
    for path in (["http", metric] if metric == "throttled" else metric.split("."), in_operation):
        value: Any = results
        for above, key in zip(("", *path), path):
            value = value.get(key, 0 if above in COUNTS else None) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            return float(value)
    return None


def unit_of(metric: str) -> str:
    """The unit of a metric, by its keys: seconds (s), bytes, a share of 1 (%), or "" for a plain number."""
    *_, above, key = ("", *metric.split("."))
    if key in STATISTICS:
        return "s" if key in LATENCY_STATISTICS else ""
    units = (unit for name in (key, above) for unit, keys in KEYS_IN.items() if re.fullmatch(keys, name))
    return next(units, "")


def value_text(value: float, metric: str) -> str:
    """A metric's value with its unit."""
    texts: dict[str, Callable[[float], str]] = {"s": duration_text, "bytes": bytes_text, "%": "{:.1%}".format}
    return texts.get(unit_of(metric), "{:g}".format)(value).replace("%", " %")


# ==== The plan, made from one table of options ==============================================================
#
# A field of Plan is a row of the table: how its option is written, where it can stand, and its rules. The
# command line, an event's file, the results' `options` and Locust's options are made from these rows. First,
# the kinds of values: functions of a text that raise `UsageError`.


def matching(
    pattern: str, expected: str, value_of: Callable[[str], T], secret: bool = False
) -> Callable[[str], T]:
    """A kind of value: a text that fits the pattern, and its value, which must not be 0."""

    def parse(text: str) -> T:
        """The value of a text."""
        if not re.fullmatch(pattern, text) or not (value := value_of(text)):
            raise UsageError(f"expected {expected}" + f", not {without_credentials(text)!r}" * (not secret))
        return value

    return parse


whole_number = matching("[0-9]+", "a whole number of at least 1", int)
positive_number = matching(r"[0-9]*\.?[0-9]+", "a number above 0", float)
duration = matching(
    r"[0-9]+(\.[0-9]+)?[smh]?",
    "a duration like 90, 90s, 5m or 1h",
    lambda text: float(text.rstrip("smh")) * {"m": 60, "h": 3600}.get(text[-1], 1),
)
run_name = matching(  # hubs lower-case user names
    f"(?=.{{1,40}}$){RUN_NAME.pattern}", "at most 40 lower-case letters, digits and inner hyphens", str
)
group_name = matching(r"[\w-]+", "letters, digits and hyphens", str)
token_text = matching("[!-~]+", "a token of printable characters without blanks", Secret, secret=True)
endpoint_url = matching(
    "(?i:https?)://([^/?#]*@)?[^/?#@:][^/?#@]*(/[^?#]*)?",
    "a URL like https://hub.example.org/hub/api",
    lambda text: without_credentials(text).rstrip("/"),
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the n-th (from 0) of many is due, in seconds since the first one, however slowly the hub answers.

    Each stage is a rate per second and its duration in seconds. A fixed rate is a stage that need not end.
    """

    stages: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, rate: float | Schedule | None, for_s: float = math.inf) -> Schedule | None:
        """A rate as a schedule; stages as they are; None without a rate."""
        return rate if isinstance(rate, Schedule) else cls(((rate, for_s),)) if rate else None

    @property
    def text(self) -> str:
        return ",".join(f"{rate_per_s:g}:{for_s:g}s" for rate_per_s, for_s in self.stages)

    @property
    def count(self) -> int:
        """How many are due before the end."""
        return sum(_due_within(*stage) for stage in self.stages)

    @property
    def lasts_s(self) -> float:
        return sum(for_s for _, for_s in self.stages)

    def due_s(self, n: int) -> float:
        began_s = 0.0
        for rate_per_s, for_s in self.stages[:-1]:
            if n < (number := _due_within(rate_per_s, for_s)):
                return began_s + n / rate_per_s
            began_s, n = began_s + for_s, n - number
        return began_s + n / self.stages[-1][0]


def _due_within(rate_per_s: float, for_s: float) -> int:
    return math.ceil(rate_per_s * for_s - 1e-6)  # since 0.1 * 30 is a little more than 3


def rate_of(text: str) -> float | Schedule:
    """A rate per second, or stages from R:DURATION,…"""
    if ":" not in text:
        return positive_number(text)
    stages = [part.strip().partition(":") for part in text.split(",")]
    return Schedule(tuple((positive_number(rate), duration(for_s)) for rate, _, for_s in stages))


def fastest(rate: float | Schedule | None) -> float:
    """The highest rate per second; 0 where there is none."""
    return max(each for each, _ in rate.stages) if isinstance(rate, Schedule) else rate or 0.0


def rate_text(rate: float | Schedule) -> str:
    """2.5 per second; stages follow each other: 1 per second for 60.0 s, then 5 per second for 30.0 s."""
    if not isinstance(rate, Schedule):
        return f"{rate:.4g} per second"
    return ", then ".join(f"{each:.4g} per second for {duration_text(for_s)}" for each, for_s in rate.stages)


def header(text: str) -> tuple[str, Secret]:
    """A header's name (RFC 9110's token) and value, from 'Name: value', which is a secret like the token."""
    match = re.fullmatch(r"([\w!#$%&'*+.^`|~-]+):[ \t]*([!-~](?:[ -~]*[!-~])?)[ \t]*", text, re.ASCII)
    if not match:
        raise UsageError("expected a header like 'Name: value', of printable characters")
    if match[1].lower() in ("authorization", "content-length", "host"):
        raise UsageError(f"the header {match[1]} cannot be set: each request has its own")
    return match[1], Secret(match[2])


def mix_of(text: str) -> dict[str, float]:
    """Weights by operation, from NAME=WEIGHT,…"""
    parts = [re.fullmatch(r"([\w-]+)=([0-9]*\.?[0-9]+)", part.strip()) for part in text.split(",")]
    mix = {part[1]: float(part[2]) for part in parts if part}
    if len(mix) != len(parts) or not all(mix.values()):
        raise UsageError(f"expected NAME=WEIGHT,… like activity=8,read=2, not {text!r}")
    return mix


def profile_value(text: str) -> str | Json:
    """A profile's slug, or an object of user options in JSON."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        options = json.loads(text)
    except ValueError as error:
        raise UsageError(f"this is not valid JSON ({error}): {text}") from None
    if not isinstance(options, dict):
        raise UsageError(f"expected a profile's slug or a JSON object, not {text}")
    return options


@dataclasses.dataclass(frozen=True)
class Given(typing.Generic[T]):
    """What an option's text stands for."""

    text: str  # as results show it; of a file, its path
    parts: tuple[T, ...]


watched = matching(  # the name and the URL of a process
    r"(?!hub=)\w+=https?://[^/].*",
    "NAME=URL, like proxy=http://proxy:8002/metrics (not hub)",
    lambda text: Given(without_credentials(text), tuple(text.split("=", 1))),
)


def condition(text: str) -> Condition:
    """The condition METRIC OP VALUE."""
    number = rf"([0-9]*\.?[0-9]+)\s*({'|'.join(UNITS)})"
    match = re.fullmatch(rf"\s*([^<>]*[^<>\s])\s*(>=|<=|>|<)\s*{number}\s*", text)
    if not match:
        raise UsageError(f"expected METRIC OP VALUE, like 'server_ready.p95 > 30s', not {text!r}")
    metric, comparison, limit, unit = match.groups()
    units = FITTING.get(unit_of(metric), ())
    if not unit and float(limit) >= (1.0 if "%" in units else 1e-9) and units:
        raise UsageError(f"{metric} needs a unit: {' or '.join(f'{limit}{each}' for each in units)}")
    return Condition(" ".join(text.split()), metric, comparison, float(limit) * UNITS[unit], unit)


# ---- Files ---------------------------------------------------------------------------------------


def writable_file(text: str) -> str:
    """The path of a file that can be written; nothing is written yet."""
    folder = os.path.dirname(os.path.realpath(text))
    if os.path.isdir(text) or not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise UsageError(f"{text} cannot be written")
    return text


samples_file = matching(r".*\.csv(\.gz)?", "a name that ends in .csv or .csv.gz", writable_file)


@contextlib.contextmanager
def reading(path: str, kind: str) -> Iterator[str]:
    """The text of a file, for a `with` block that reads it, whose errors refuse the file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file.read()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or error  # without the file's name
        raise UsageError(f"{path} cannot be read as {kind} ({why})") from None


def results_file(text: str) -> Json:
    """The results that an earlier run wrote."""
    with reading(text, "results") as content:
        results = json.loads(content)
    if not isinstance(results, dict) or results.get("schema") != 1:
        raise UsageError(f"{text} does not hold results of this tool")
    return results


SECRET = re.compile("token|code|state|auth|key|xsrf|secret", re.IGNORECASE)  # query parameters to leave out
BELOW_A_SERVER = re.compile("(?<!/hub)/user/([^/]+)/(.*)")  # /hub/user/NAME/ is the hub's own page about it
Recording = Given[tuple[str, int]]  # a browser's requests: the path below the server, and the status


def recording(text: str) -> Recording:
    """The GETs below one person's server in a HAR file, in order, without cookies, tokens and bodies."""
    requests_below: dict[tuple[str, str], list[tuple[str, int]]] = collections.defaultdict(list)
    with reading(text, "a HAR file") as content:
        for entry in json.loads(content)["log"]["entries"]:
            method, url = entry["request"]["method"], urllib.parse.urlsplit(entry["request"]["url"])
            status, below = entry["response"]["status"], BELOW_A_SERVER.search(url.path)
            if method == "GET" and status >= 200 and below and url.scheme in ("http", "https"):
                pairs = urllib.parse.parse_qsl(url.query, keep_blank_values=True)
                query = urllib.parse.urlencode([pair for pair in pairs if not SECRET.search(pair[0])])
                path = f"{below[2]}?{query}" if query else below[2]
                requests_below[url.netloc, below[1]].append((path, status))
    most = max(requests_below.values(), key=len, default=[])
    ends = {"..", "oauth_callback", "logout"}
    requests = [(path, status) for path, status in most if not ends & set(path.partition("?")[0].split("/"))]
    if not requests:
        raise UsageError(f"{text} holds no GET below /user/NAME/: record the page of a person's server")
    return Given(text, tuple(requests))


@dataclasses.dataclass(frozen=True)
class Code:
    """A cell of a notebook."""

    source: str
    may_raise: bool = False


SIX_TIMES_SEVEN = Code("6*7")
NO_CODE = re.compile(r"\[(markdown|md|raw)\]")  # in the title of a cell of a # %% file
Notebook = Given[Code]


def notebook(text: str) -> Notebook:
    """The code cells of an .ipynb or a # %% file in order; those tagged raises-exception may raise."""
    with reading(text, "a notebook") as content:
        if text.endswith(".ipynb"):
            code = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
            tags = [cell.get("metadata", {}).get("tags", []) for cell in code]
            pairs = [("".join(cell["source"]), tag) for cell, tag in zip(code, tags)]
        else:  # a title stands behind # %%; what stands before the first one may be only comments
            beginning, *parts = re.split(r"^# ?%%", content, flags=re.MULTILINE)
            before = [f"\n{beginning}"] if parts and re.search(r"^[^#\s]", beginning, re.MULTILINE) else []
            titled = [part.partition("\n") for part in before + parts]
            pairs = [(source, title) for title, _, source in titled if not NO_CODE.search(title)]
        cells = tuple(Code(source, "raises-exception" in tags) for source, tags in pairs if source.strip())
    if not cells:
        raise UsageError(f"{text} has no code cells (in a Python file, # %% begins one)")
    return Given(text, cells)


@dataclasses.dataclass(frozen=True)
class EventFile:
    """An event's file: its text, and its tables as TOML has them: what stands above the groups, then each."""

    path: str
    text: str
    tables: list[Json]

    def error(self, n: int, key: str, sentence: str) -> UsageError:
        """What is wrong with a key of the n-th table, or with the whole table, with its line."""
        table, has_key = 0, rf"[\s\[]*[\"']?{re.escape(key)}[\"']?\s*[\]=.]"
        for number, line in enumerate(self.text.splitlines(), 1):
            begins = re.match(r"\s*\[\[\s*people\s*\]\]", line)
            table += bool(begins)
            if table == n and (re.match(has_key, line) if key else begins):
                return UsageError(f"--event {self.path}, line {number}: {sentence}")
        return UsageError(f"--event {self.path}: {sentence}")


def event_file(text: str) -> EventFile:
    """An event's file, whose keys nobody has looked at yet."""
    toml = optional("tomllib") or optional("tomli")  # the first from Python 3.11 on
    if not toml:
        raise UsageError("this needs tomli, which is not installed: pip install tomli")
    with reading(text, "TOML") as content:
        above = toml.loads(content)
        people = above.pop("people", None)
    if not isinstance(people, list) or not people or not all(isinstance(group, dict) for group in people):
        raise UsageError(f"{text}: expected groups of people, each below a line [[people]]")
    return EventFile(text, content, [above, *people])


# ---- Options -------------------------------------------------------------------------------------

FAILED, PROXY_LEAKING = map(condition, ("failed > 0", "proxy_check.leaking > 0"))
COMMANDS = {
    "stress-test": """\
Starts a server for each fake user, and with --visit, --page or --work follows
each person to their page, and to the results of their cells.

example: hub-stress-test stress-test --count 300 --within 5m --work""",
    "activity-stress-test": """\
Makes users without servers, and sends the reports that running servers send.

example: hub-stress-test activity-stress-test --rate 10 --duration 5m""",
    "purge": """\
Removes the users, and their servers, that earlier runs left on the hub.

example: hub-stress-test purge --run night""",
}
STRESS, ACTIVITY, PURGE = COMMANDS
LOADS = (STRESS, ACTIVITY)
EVENT, GROUP = "the table above the groups", "a group"  # of an event's file, where options can stand too
ARRIVALS, ACTIONS, FAILS, OUTPUT = "who comes", "what they do", "when it fails", "where results go"
CAPACITY, CONNECTION, RARE = "capacity", "connection", "rare"
HELP_GROUPS = (ARRIVALS, ACTIONS, FAILS, OUTPUT, CAPACITY, CONNECTION, RARE)
OPENING = "visit page work check_proxy"  # fields of the plan by which people open their servers
DEFAULT_MIX: Mapping[str, float] = {"activity": 1.0}


@dataclasses.dataclass(frozen=True)
class Option:
    """How a field of the plan is written, and the rules that it brings with it."""

    flags: tuple[str, ...]
    flag: str  # the long one
    name: str  # in an event's file
    key: str  # in the results' `options`
    metavar: str
    help: str
    kind: Callable[[str], Any] | None  # makes its value from text; None: a switch
    default: str  # as text; "" where there is none, or where it needs no help
    on: Collection[str]  # where it can stand: commands, and the tables of an event's file
    about: str = RARE  # its group in --help
    hidden_on: Collection[str] = ()  # commands that take it and have no use for it
    needs: str = ""  # fields: without any of them it has no meaning
    excludes: str = ""  # fields that cannot be given beside it
    rules_on: Collection[str] = tuple(COMMANDS)  # the commands in which it needs and excludes them
    package: tuple[str, str] = ("", "")  # what has to be installed, and its module
    repeatable: bool = False
    const: Any = None  # what it means without a value, if that is allowed
    compared: bool = False  # a baseline with another value is no fair comparison
    reported: bool = True  # in results and log
    locust: bool | str = False  # whether Locust has it; text: with another default
    locust_flag: str = ""

    def add_to(self, parser: argparse._ActionsContainer, dest: str, shown: bool) -> None:
        settings: Json = {"help": self.help if shown else argparse.SUPPRESS, "dest": dest}
        if self.kind:
            settings |= {"type": self.kind, "metavar": self.metavar}
            settings |= {"nargs": "?", "const": self.const} if self.const else {}
        action = "append" if self.repeatable else "store" if self.kind else "store_true"
        parser.add_argument(*self.flags, action=action, **settings)

    def add_to_locust(self, parser: Any) -> None:
        """As --hub-…, whose values stay text, which a web form holds and Locust sends to workers."""

        def check(text: str) -> str:
            if text and self.kind:
                self.kind(text)
            return text

        if not self.kind:
            parser.add_argument(self.locust_flag, help=self.help, action="store_true")
            return
        default = self.locust if isinstance(self.locust, str) else self.default
        settings: Json = {"action": "append"} if self.repeatable else {"default": default}
        if self.repeatable or self.flag in ("--endpoint", "--token"):  # which a page is not to change
            settings["include_in_web_ui"] = False
        parser.add_argument(self.locust_flag, help=self.help, metavar=self.metavar, type=check, **settings)

    def from_toml(self, value: Any, folder: str) -> Any:
        """The value of a key of an event's file; paths begin in its folder. Raises `UsageError`."""
        if isinstance(value, bool) and (self.const or not self.kind):
            return value and (self.const or True)
        if isinstance(value, bool) or not self.kind:
            raise UsageError(f"expected {self.metavar or 'true or false'}, not {value!r}")
        values = value if self.repeatable and isinstance(value, list) else [value]
        texts = [each if isinstance(each, str) else json.dumps(each, default=str) for each in values]
        if self.metavar.startswith("FILE"):
            texts = [os.path.join(folder, text) for text in texts]
        return tuple(map(self.kind, texts)) if self.repeatable else self.kind(texts[0])


def option(
    usage: str,
    help: str,
    kind: Callable[[str], Any] | None = None,
    default: Any = None,
    on: Collection[str] = (*COMMANDS, EVENT),
    **rules: Any,
) -> Any:
    """A field of the plan with its option. A default that is text is shown, and read like a value."""
    flags = tuple(word for word in usage.split() if word.startswith("-"))
    flag, text = flags[-1], default if isinstance(default, str) else ""
    name, metavar = flag[2:], usage.partition(f"{flag} ")[2]
    package, _ = rules.get("package", ("", ""))
    help += f" ({text})" * bool(text) + f" (needs {package})" * bool(package)
    rules = {"locust_flag": f"--hub-{name}"} | rules
    row = Option(flags, flag, name, name.replace("-", "_"), metavar, help, kind, text, on, **rules)
    value = kind(text) if kind and text else default if kind else False
    return dataclasses.field(default=value, metadata={"option": row})


for_loads = functools.partial(option, on=(*LOADS, EVENT))
for_requests = functools.partial(option, on=(ACTIVITY,))
for_people = functools.partial(option, on=(STRESS, EVENT))
for_groups = functools.partial(option, on=(STRESS, EVENT, GROUP), compared=True, locust=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for: whom, how many, how they arrive, what is sent, when the run has failed."""

    command: str = STRESS
    # A row for each option: how it is written, what it does, its value and default, its rules.
    # fmt: off
    endpoint: str | None = option("-e --endpoint URL",
        "the hub's API; else JUPYTERHUB_ENDPOINT, else JUPYTERHUB_API_URL", endpoint_url, locust=True,
        about=CONNECTION)
    token: Secret | None = option("-t --token TOKEN",
        "else JUPYTERHUB_API_TOKEN (better: arguments show in the process list)", token_text, on=COMMANDS,
        reported=False, locust=True, about=CONNECTION)
    headers: tuple[tuple[str, Secret], ...] = option("--header 'Name: value'",
        "send this header to the hub too, for a proxy that wants it; repeatable", header, (), on=COMMANDS,
        repeatable=True, reported=False, locust=True, about=CONNECTION)
    dry_run: bool = option("--dry-run", "send no request; print the plan: who, when, what, and what it costs",
        excludes="results report samples metrics_port", about=OUTPUT)
    log_to_file: bool | str = option("--log-to-file FILE",
        "log to FILE, or to a new file in the temporary directory", str, const=True, about=OUTPUT)
    verbose: bool = option("-v --verbose", "debug log, one line for each request with its response time",
        about=OUTPUT)
    run: str | None = option("--run NAME",
        "call the users hub-stress-test-NAME-<n>, so that two jobs never meet", run_name, locust="locust",
        about=ARRIVALS)
    results: str | None = option("--results FILE", "write the results as JSON", writable_file, about=OUTPUT)
    report: str | None = option("--report FILE", "write a report as one HTML page", writable_file,
        package=("plotly", "plotly"), about=OUTPUT, hidden_on=(PURGE,))
    fail_if: tuple[Condition, ...] = option("--fail-if CONDITION",
        "fail if METRIC OP VALUE, like 'server_ready.p95 > 30s'; repeatable; replaces failed > 0", condition,
        (), repeatable=True, locust=True, about=FAILS, hidden_on=(PURGE,))
    baseline: Json | None = option("--baseline FILE", "results of an earlier run: print old, new and ratio",
        results_file, reported=False, about=FAILS, hidden_on=(PURGE,))
    count: int = option("-c --count N", "users, in stress-test each with a server", whole_number, "100",
        on=(*LOADS, GROUP), compared=True, about=ARRIVALS)
    batch_size: int = option("-b --batch-size N", "servers starting, users made or removed at the same time",
        whole_number, "10", on=(STRESS, PURGE, EVENT), compared=True, about=ARRIVALS)
    keep: bool = for_loads("-k --keep", "leave the users, and their servers, on the hub",
        excludes="stay_s check_proxy", about=ACTIONS)
    profile: str | Json | None = for_groups("-p --profile P",
        "a profile's slug, or a JSON object of user options", profile_value, about=ACTIONS)
    own_servers: bool = option("--own-servers",
        "no admin rights needed: start named servers of your own, instead of making users",
        on=(STRESS, PURGE, EVENT), compared=True, locust=True, about=ARRIVALS)
    server_timeout_s: float = for_groups("--server-timeout DURATION", "how long a person waits for a server",
        duration, "60s", about=FAILS)
    fail_fast: int = for_people("--fail-fast N", "start no more servers after N failures in a row (1)",
        whole_number, 0, const=1, about=FAILS)
    rate_per_s: float | Schedule | None = option("--rate R",
        "start R servers, or send R requests, per second, however slow the hub; or R:DURATION,…", rate_of,
        on=(*LOADS, GROUP), compared=True, about=ARRIVALS)
    hold_s: float = for_people("--hold DURATION",
        "keep the servers this long, then check that all are still there", duration, 0.0, compared=True,
        excludes="stay_s", about=ACTIONS)
    within_s: float | None = option("--within DURATION",
        "people come at random moments within this time, however slow the hub", duration, on=(STRESS, GROUP),
        compared=True, excludes="rate_per_s", about=ARRIVALS)
    event: tuple[Plan, ...] = option("--event FILE.toml",
        "who comes, when, and what they do, in groups: see README", event_file, (), on=(STRESS,),
        compared=True, excludes="count within_s rate_per_s", about=ARRIVALS)
    once: bool = option("--once", "with --event: one person of each group, at once, to try it",
        on=(STRESS,), compared=True, needs="event", about=ARRIVALS)
    group: str = option("--name NAME", "of a group", group_name, "", on=(GROUP,))
    after_s: float = option("--after DURATION", "how long after the run a group begins", duration, 0.0,
        on=(GROUP,))
    seed: int | None = for_people("--seed N", "draw the moments of --within as this seed did", whole_number,
        needs="within_s")
    visit: bool = for_groups("--visit", "each person opens the start page of their server",
        locust_flag="--hub-open", about=ACTIONS)
    visit_timeout_s: float = for_people("--visit-timeout DURATION", "how long a person tries to open it",
        duration, "30s", needs=OPENING, locust=True, about=FAILS)
    page: Recording | None = for_groups("--page FILE.har",
        "each person fetches what a browser did that this HAR file recorded", recording, about=ACTIONS)
    work: bool = for_groups("--work", "each person starts a kernel and runs cells",
        package=("websocket-client", "websocket"), about=ACTIONS)
    notebook: Notebook | None = for_groups("--notebook FILE",
        "with --work: the code cells of this .ipynb or # %%%% file, once; without it 6*7, again and again",
        notebook, needs="work", about=ACTIONS)
    think_s: float = for_groups("--think DURATION", "between the result of a cell and the next cell",
        duration, "10s", needs="work", about=ACTIONS)
    cell_timeout_s: float = for_people("--cell-timeout DURATION",
        "how long a person waits for a kernel or a cell", duration, "60s", needs="work", locust=True,
        about=FAILS)
    stay_s: float | None = for_groups("--stay DURATION",
        "each person leaves this long after starting to work; without it all stay until the last has come",
        duration, locust="60s", about=ACTIONS)
    check_proxy: bool = for_people("--check-proxy",
        "after the load: does the proxy lose connections when servers end? Takes some three minutes",
        about=ACTIONS)
    public_url: str | None = for_people("--public-url URL",
        "where people reach the hub, if not at the endpoint", endpoint_url,
        needs=OPENING, locust=True, about=CONNECTION)
    workers: int = for_requests("--workers N", "threads that send; with --rate up to 200, as the rate needs",
        whole_number, "100")
    duration_s: float | None = option("--duration DURATION",
        "send this long, without it once for each user; of a search, a step (10s, people 60s)", duration,
        on=LOADS, compared=True, needs="find_capacity", rules_on=(STRESS,), about=ACTIONS)
    processes: int = for_requests("--processes N", "spread the threads over N processes", whole_number, "1")
    mix: Mapping[str, float] | None = for_requests("--mix NAME=WEIGHT,…",
        "operations by weight (activity=1); read and list are there too", mix_of, compared=True,
        locust="activity=1", about=ACTIONS)
    operations: str | None = for_requests("--operations FILE", "a file that registers operations of your own",
        str, locust=True)
    find_capacity: bool = option("--find-capacity",
        "raise the rate until a condition is met: what does the hub sustain? How many people a minute? "
        "Do --count N fit --within DURATION?",
        on=LOADS, rules_on=(STRESS,), excludes="event hold_s stay_s keep check_proxy", compared=True,
        about=CAPACITY)
    max_servers: int | None = option("--max-servers N",
        "with --find-capacity: no more than N servers at one time", whole_number, on=(STRESS,),
        needs="find_capacity", about=CAPACITY)
    cleanup_timeout_s: float = option("--cleanup-timeout DURATION",
        "cleanup times out after this long without progress (5m)", duration, CLEANUP_TIMEOUT_S, about=FAILS)
    watch: tuple[Given[str], ...] = for_loads("--watch NAME=URL",
        "read this Prometheus page of another process too, without the token; repeatable", watched, (),
        repeatable=True)
    samples: str | None = for_loads("--samples FILE",
        "write each event as it happens; FILE ends in .csv or .csv.gz", samples_file, about=OUTPUT)
    metrics_port: int | None = for_loads("--metrics-port N",
        "serve the run to Prometheus on this port of all interfaces", whole_number,
        package=("prometheus-client", "prometheus_client"), about=OUTPUT)
    scale: float = option("--scale R", "a RunningServer sends R times as often as every 300 s",
        positive_number, "1", on=(), locust=True)
    visits: int = option("--visits N", "how many times a Person comes", whole_number, "1", on=(), locust=True)
    # fmt: on
    visit_token: Secret | None = None  # for visits, which test servers see; else the token

    @property
    def groups(self) -> tuple[Plan, ...]:
        """The groups of an event; without one, all people are of one."""
        return self.event or (self,)

    @property
    def load(self) -> Mapping[str, float]:
        """The operations that the load consists of, by weight."""
        return {"server_ready": 1.0} if self.command == STRESS else self.mix or DEFAULT_MIX

    @property
    def opens(self) -> bool:
        """Whether people open their servers: whatever else they do there begins with that."""
        return any(getattr(group, name) for group in self.groups for name in OPENING.split())

    @property
    def rehearses(self) -> bool:
        """Whether people are followed until they can work, those of an event if only to a ready server."""
        return self.opens or bool(self.event or self.group)

    @property
    def goal(self) -> str:
        """The step with which a person has what they came for."""
        return "at_work" if self.rehearses else "server_ready"

    @property
    def is_open(self) -> bool:
        """Whether people come when they are due, however slow the hub: the open model."""
        return any(group.rate_per_s or group.within_s for group in self.groups)

    @property
    def removed_at_once(self) -> int:
        """How many users are removed at the same time: as fast as they came, if each takes two seconds."""
        if self.command != STRESS:
            return self.batch_size
        paces = (fastest(each.rate_per_s) or each.count / (each.within_s or math.inf) for each in self.groups)
        return max(self.batch_size, min(100, math.ceil(2 * sum(paces))))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What fails the run: a proven leak always does; in a search, by default, also slow requests."""
        limit = "30s" if self.command == STRESS else "500ms"
        limits = [condition(f"{name}.p95 > {limit}") for name in self.load if self.find_capacity]
        leaks = [PROXY_LEAKING] if self.check_proxy else []
        return tuple(dict.fromkeys((*(self.fail_if or (FAILED, *limits)), *leaks)))

    def options(self) -> Json:
        """The options of the command, or of a group, with their values, for results and log."""
        place = GROUP if self.group else self.command
        rows = {name: row for name, row in OPTIONS.items() if place in row.on and row.reported}
        return {row.key: _reported(getattr(self, name)) for name, row in rows.items()}


def _reported(value: Any) -> Any:
    """An option's value as JSON has it: a group by its options, what was read from a text by that text."""
    if isinstance(value, tuple):
        return [_reported(each) for each in value]
    return value.options() if isinstance(value, Plan) else getattr(value, "text", value)


OPTIONS: dict[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(Plan) if "option" in field.metadata
}
LOCUST_OPTIONS = {name: row for name, row in OPTIONS.items() if row.locust}


def judgements_of(plan: Plan, results: Json) -> list[Judgement]:
    """Each condition of a plan, judged by results; default ones only if something was measured."""
    judged = [(each, each.judge(results, plan.baseline)) for each in plan.conditions]
    return [result for each, result in judged if each in plan.fail_if or result.value is not None]


# ==== Events, and the recorder that folds them ==============================================================


class Kind(enum.Enum):
    """Kinds of failure, by what an operator does next."""

    NO_ANSWER = "no answer"
    IN_FRONT = "answered by something in front of the hub"
    REFUSED = "refused"
    SPAWN = "the spawn failed"
    TIMED_OUT = "not ready in time"
    THROTTLED = "still throttled"
    SERVER_LIMIT = "no more servers allowed"
    VANISHED = "gone while starting"
    LOST = "gone while held"
    ROUTE = "no way to the server"
    WEBSOCKET = "the websocket broke"
    KERNEL = "the kernel ended"
    CELL = "the cell failed"
    RAISED = "the operation raised"


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why something failed. The text names no user, so that equal reasons can be counted."""

    kind: Kind
    text: str
    lasted_s: Sequence[float] = dataclasses.field(default=(), compare=False)  # a websocket open, and silent


@dataclasses.dataclass
class Event:
    """One step for one person, and its outcome. Moments are seconds of a monotonic clock."""

    step: str
    user: str
    due_s: float
    sent_s: float
    ended_s: float = 0.0  # 0 while it is under way
    reason: Reason | None = None  # None when it succeeded
    tries: int = 1
    backoff_s: float = 0.0  # slept because the hub said 429 or 503: not latency
    throttled: int = 0  # how often the hub answered 429
    throttled_s: float | None = None  # the first 429
    asked_s: float | None = None  # when the last try was sent
    message: str = ""  # what the hub said for longest meanwhile; of a failure, what it said last
    group: str = ""  # the person's group of an event
    phases: Phases | None = None  # of a start, by the events of Kubernetes

    @property
    def outcome(self) -> str:
        """ok, or the kind of its failure: refused, spawn, timed_out, …"""
        return self.reason.kind.name.lower() if self.reason else "ok"

    @property
    def latency_s(self) -> float:
        return max(0.0, self.ended_s - self.due_s - self.backoff_s)

    @property
    def lateness_s(self) -> float:
        """How late the tool itself was in sending."""
        return max(0.0, self.sent_s - self.due_s)


People = Mapping[str, Mapping[str, Event]]  # by name, and by step


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Seconds; each None when nothing was measured."""

    min: float | None = None
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class Distribution:
    """Durations in buckets 1 % wide: memory does not grow with time, and percentiles are within 0.5 %."""

    GROWTH = math.log(1.01)

    def __init__(self) -> None:
        self.count, self.total_s, self.min_s, self.max_s = 0, 0.0, math.inf, -math.inf
        self.buckets = collections.Counter[int]()
        self.failed = 0  # events that have no latency, since they failed

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total_s += seconds
        self.min_s, self.max_s = min(self.min_s, seconds), max(self.max_s, seconds)
        self.buckets[math.floor(math.log(max(seconds, 1e-6)) / self.GROWTH)] += 1

    def merge(self, other: Distribution) -> None:
        self.count += other.count
        self.failed += other.failed
        self.total_s += other.total_s
        self.min_s, self.max_s = min(self.min_s, other.min_s), max(self.max_s, other.max_s)
        self.buckets.update(other.buckets)

    def summary(self) -> Statistics:
        """Percentiles are nearest ranks; the other statistics are exact."""
        if not self.count:
            return Statistics()
        buckets = sorted(self.buckets)
        up_to = list(itertools.accumulate(self.buckets[bucket] for bucket in buckets))

        def percentile(percent: int) -> float:
            bucket = buckets[bisect.bisect_left(up_to, math.ceil(percent / 100 * self.count))]
            return min(max(math.exp((bucket + 0.5) * self.GROWTH), self.min_s), self.max_s)

        p50, p90, p95, p99 = map(percentile, (50, 90, 95, 99))
        return Statistics(self.min_s, self.total_s / self.count, p50, p90, p95, p99, self.max_s)


ENOUGH = {"p90": 10, "p95": 20, "p99": 100}  # samples; of fewer, a percentile is but the maximum


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation in the results."""

    count: int
    failed: int
    rate_per_s: float | None
    latency_s: Statistics  # of those that succeeded
    lateness_s: Statistics
    backoff_s: float
    errors: dict[str, int]
    skipped: int  # were due, and not sent since too many before them were under way

    def enough(self, statistic: str) -> float | None:
        """A statistic of the latency; None for a percentile of too few samples."""
        value: float | None = getattr(self.latency_s, statistic)
        return value if self.count - self.failed >= ENOUGH.get(statistic, 1) else None


class Fold:
    """The events of one operation, by spans of time in which they were due.

    Beyond `SPANS`, neighbours merge, so that an hour takes no more memory than minutes.
    """

    SPANS = 200

    def __init__(self) -> None:
        self.span_s, self.spans = 1.0, collections.defaultdict[int, Distribution](Distribution)
        self.count = self.failed = self.late = self.skipped = 0
        self.lateness, self.backoff_s = Distribution(), 0.0
        self.reasons = collections.Counter[Reason]()  # of the failures
        self.first_due_s, self.last_ended_s = math.inf, -math.inf

    def add(self, event: Event) -> None:
        span = self.spans[int(event.due_s // self.span_s)]
        self.count += 1
        if event.reason is None:
            span.add(event.latency_s)
        else:
            span.failed += 1
            self.failed += 1
            self.reasons[event.reason] += 1
        self.late += event.lateness_s > LATE_SEND_S
        self.lateness.add(event.lateness_s)
        self.backoff_s += event.backoff_s
        self.first_due_s = min(self.first_due_s, event.due_s)
        self.last_ended_s = max(self.last_ended_s, event.ended_s)
        if len(self.spans) > self.SPANS:
            narrow, self.span_s = self.spans, 2 * self.span_s
            self.spans = collections.defaultdict(Distribution)
            for number, span in narrow.items():
                self.spans[number // 2].merge(span)

    def summary(self) -> Operation:
        latency, took_s = Distribution(), self.last_ended_s - self.first_due_s
        for span in self.spans.values():
            latency.merge(span)
        errors = collections.Counter[str]()
        for reason, number in self.reasons.items():
            errors[reason.text] += number
        return Operation(
            count=self.count,
            failed=self.failed,
            rate_per_s=self.count / took_s if took_s > 0 else None,
            latency_s=latency.summary(),
            lateness_s=self.lateness.summary(),
            backoff_s=self.backoff_s,
            errors=dict(errors),
            skipped=self.skipped,
        )

    def timeline(self, began_s: float) -> Json:
        """Columns: counts and latencies of each span of time, in seconds since the run began."""
        numbers = sorted(self.spans)
        spans = [self.spans[number] for number in numbers]
        latencies = [span.summary() for span in spans]
        return {
            "span_s": self.span_s,
            "at_s": [rounded(max(0.0, (number + 0.5) * self.span_s - began_s)) for number in numbers],
            "count": [span.count for span in spans],
            "failed": [span.failed for span in spans],
            "p50_s": [rounded(latency.p50) for latency in latencies],
            "p95_s": [rounded(latency.p95) for latency in latencies],
            "max_s": [rounded(latency.max) for latency in latencies],
        }


class Recorder:
    """Takes events from any thread: folds them, keeps those of `people_steps`, calls the listeners with each.

    Events of a group are folded for the group too, as server_ready[students].
    """

    def __init__(self, *listeners: Callable[[Event], None], people_steps: Collection[str] = ()) -> None:
        self._lock = threading.Lock()
        self._folds = collections.defaultdict[str, Fold](Fold)
        self.people: dict[str, dict[str, Event]] = {}  # in the order of their first events
        self.listeners, self._people_steps = [*listeners], people_steps

    def add(self, event: Event) -> None:
        with self._lock:
            self._folds[event.step].add(event)
            if event.group:
                self._folds[f"{event.step}[{event.group}]"].add(event)
            if event.step in self._people_steps:
                self.people.setdefault(event.user, {})[event.step] = event
        for listener in self.listeners:
            listener(event)

    def skip(self, step: str) -> None:
        """Note that a step was due and was not tried."""
        with self._lock:
            self._folds[step].skipped += 1

    def include(self, other: Recorder) -> None:
        """Add the operations of another recorder that this one does not have."""
        with self._lock:
            self._folds = other._folds | self._folds

    def _of(self, names: Iterable[str]) -> list[Fold]:
        return [self._folds[name] for name in {*names} if name in self._folds]

    def count(self, names: Iterable[str]) -> int:
        return sum(fold.count for fold in self._of(names))

    def failures(self, names: Iterable[str]) -> int:
        return sum(fold.failed for fold in self._of(names))

    def latest_s(self, name: str) -> float | None:
        """The median latency of those due in the last span of time that has any."""
        with self._lock:
            spans = self._folds[name].spans if name in self._folds else {}
            measured = [number for number, span in spans.items() if span.count]
            return spans[max(measured)].summary().p50 if measured else None

    def late_share(self, names: Collection[str]) -> float:
        """The share of these operations' requests that were sent too late; see `LATE_SEND_S`."""
        return sum(fold.late for fold in self._of(names)) / max(1, self.count(names))

    def kinds(self) -> set[Kind]:
        """All kinds of failure that there were."""
        with self._lock:
            return {reason.kind for fold in self._folds.values() for reason in fold.reasons}

    def summarise(self) -> dict[str, Operation]:
        with self._lock:
            return {name: fold.summary() for name, fold in self._folds.items()}

    def timeline(self, began_s: float) -> dict[str, Json]:
        with self._lock:
            return {name: fold.timeline(began_s) for name, fold in self._folds.items()}


@dataclasses.dataclass(frozen=True)
class Http:
    """The requests of a run to the hub in the results; those to servers are apart."""

    requests: int
    retries: int
    throttled: int  # by the hub itself
    statuses: dict[str, int]
    observer_requests: int
    observer_share: float | None
    servers: Http | None = None
    in_front: dict[str, int] = dataclasses.field(default_factory=dict)  # of the statuses, not by the hub


class Traffic:
    """All requests to the hub, counted as they are sent; those of an observer are sent only to watch.

    The keys of `counts`: "requests", "retries", "observer_requests", an answer's status, and the negative of
    the status if something in front of the hub gave the answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts = collections.Counter[str | int]()

    def add(self, counts: Mapping[str | int, int]) -> None:
        with self._lock:
            self.counts.update(counts)

    def sent(self, observer: bool, again: bool = False) -> None:
        self.add({"requests": 1, "retries": int(again), "observer_requests": int(observer)})

    def answered(self, status: int, in_front: bool = False) -> None:
        self.add({status: 1, -status: int(in_front)})

    @property
    def throttled(self) -> int:
        """How often the hub itself answered 429."""
        return self.counts[429] - self.counts[-429]

    def summarise(self) -> Http:
        with self._lock:
            counts, throttled = self.counts.copy(), self.throttled
        statuses = sorted(status for status in counts if isinstance(status, int) and status > 0)
        return Http(
            requests=counts["requests"],
            retries=counts["retries"],
            throttled=throttled,
            statuses={str(status): counts[status] for status in statuses},
            in_front={str(status): counts[-status] for status in statuses if counts[-status]},
            observer_requests=counts["observer_requests"],
            observer_share=counts["observer_requests"] / counts["requests"] if counts["requests"] else None,
        )


# ==== Pure rules: what the hub's answers mean ===============================================================


class ServerState(enum.Enum):
    """What the hub says of a user and their server."""

    GONE = "no such user"
    STOPPED = "no server"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    UNKNOWN = "not known"


# The states after these answers to `DELETE server` and `DELETE user`. After any other, read the user again:
# a hub answers 400 or 500 while a server starts or stops.
AFTER_STOP = {204: ServerState.STOPPED, 202: ServerState.STOPPING, 404: ServerState.GONE}
AFTER_DELETE = {204: ServerState.GONE, 404: ServerState.GONE}


def server_state(model: Json) -> ServerState:
    """What a user model means. One without `servers` comes from a token that may not read servers: not known.

    After a restart, a hub checks each server for up to 30 s ("pending": "check"), and cannot stop it (500).
    """
    if "servers" not in model:
        return ServerState.UNKNOWN
    server = (model["servers"] or {}).get("")
    if server is None or server.get("stopped"):
        return ServerState.STOPPED
    if server.get("pending"):
        pending = {"spawn": ServerState.STARTING, "stop": ServerState.STOPPING}
        return pending.get(server["pending"], ServerState.UNKNOWN)
    return ServerState.READY if server.get("ready") else ServerState.STOPPED


VERSION_HEADER = "X-JupyterHub-Version"  # every answer of a hub and of a server has it


def missing_scopes(granted: Iterable[str], needed: Iterable[str], user: str = "") -> list[str]:
    """The scopes that a token lacks; a hub lists those it has in full (`servers` with all its parts).

    A scope that is limited to some users or groups (`users!user=x`) counts only if it is limited to `user`.
    """
    full = {scope.removesuffix(f"!user={user}") for scope in granted}
    full = {scope for scope in full if "!" not in scope}
    if "start:servers" in full:  # hubs from 6.0
        full.add("servers")
    return sorted(set(needed) - full)


def named_server_limit(reply: Reply) -> int | None:
    """How many named servers a user may have (0: none are allowed), if the hub refused a start for that."""
    refusal = r"Named servers are not enabled|.*already has the maximum of (\d+) named servers"
    match = re.match(refusal, reply.message) if reply.status == 400 else None
    return int(match[1] or 0) if match else None


ROLE_TO_PASTE = """\
c.JupyterHub.load_roles.append({
    "name": "hub-stress-test", "services": ["hub-stress-test"],
    "scopes": ["admin:users", "servers", "read:metrics"],
})"""

VISIT_ROLE_TO_PASTE = """\
c.JupyterHub.load_roles.append({
    "name": "hub-stress-test-visits", "services": ["hub-stress-test-visits"], "scopes": ["access:servers"],
})"""


# ==== Pure rules: messages while a server starts ============================================================

Said = Sequence[tuple[float, Json]]  # the events of a progress stream, and when each arrived


@dataclasses.dataclass(frozen=True)
class Phases:
    """Where a start spent its time, by the events of Kubernetes, in order; or the means of many starts."""

    silent_s: float
    node_s: float
    volumes_s: float
    image_s: float
    container_s: float
    server_s: float
    new_node: int  # whether it waited for a new node, or how many did
    images_pulled: int
    starts: int = 1  # how many these are the means of


PHASES = {
    "silent_s": "before Kubernetes said anything",
    "node_s": "waiting for a node",
    "volumes_s": "attaching volumes",
    "image_s": "pulling the image",
    "container_s": "starting the container",
    "server_s": "the server's own start",
}


def mean_phases(starts: Sequence[Phases]) -> Phases | None:
    """The mean of each phase, and how many waited for a new node or an image; None without starts."""
    totals: Json = {name: sum(getattr(start, name) for start in starts) for name in Phases.__annotations__}
    return Phases(**totals | {name: totals[name] / len(starts) for name in PHASES}) if starts else None


def kube_events(said: Said) -> list[tuple[float, float, Json]]:
    """Events of Kubernetes in a progress stream, in order: the cluster's time, when it arrived, the event.

    KubeSpawner hands them over late, some twice, and out of order; some it loses.
    """
    events = []
    for arrived_s, message in said:
        if raw := message.get("raw_event"):
            moment = raw.get("lastTimestamp") or raw.get("eventTime") or raw.get("firstTimestamp")
            with contextlib.suppress(ValueError, AttributeError):  # an event without a time shows no phase
                cluster_s = datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
                events.append((cluster_s, arrived_s, raw))
    return sorted(events, key=lambda event: int(event[0]))  # the kubelet's are whole seconds


def phases_of(said: Said, asked_s: float, ready_s: float) -> Phases | None:
    """Where a start spent the time until it was ready, or had failed; None without events of Kubernetes.

    The event that arrived soonest sets the cluster's clock. A phase without its last event ends with the last
    event of all.
    """
    events = kube_events(said)
    if not events:
        return None
    behind_s = min(arrived_s - cluster_s for cluster_s, arrived_s, _ in events)
    first_s, pulling, image_s, pulled = dict[str, float](), dict[str, float](), 0.0, 0
    for cluster_s, _, raw in events:
        at_s = min(max(cluster_s + behind_s, asked_s), ready_s)
        path, reason = str(raw.get("involvedObject", {}).get("fieldPath")), str(raw.get("reason"))
        first_s.setdefault(reason, at_s)
        if reason == "Pulling":
            pulling[path] = at_s
        elif reason == "Pulled" and path in pulling:
            image_s, pulled = image_s + at_s - pulling.pop(path), 1
        elif reason == "Started" and path.startswith("spec.containers"):
            break
    begin_s = min(first_s.values())
    of_containers = [first_s[name] for name in ("Pulling", "Pulled", "Created", "Started") if name in first_s]
    waits = "FailedScheduling" in first_s and not of_containers
    scheduled_s = first_s.get("Scheduled", ready_s if waits else begin_s)
    if not first_s.keys() & {"Created", "Started"}:
        image_s += sum(ready_s - began_s for began_s in pulling.values())
    containers_s = max(scheduled_s, min(of_containers, default=at_s))
    started_s = max(at_s, containers_s + image_s)
    return Phases(
        silent_s=begin_s - asked_s,
        node_s=scheduled_s - begin_s,
        volumes_s=containers_s - scheduled_s,
        image_s=image_s,
        container_s=started_s - containers_s - image_s,
        server_s=ready_s - started_s,
        new_node=int("TriggeredScaleUp" in first_s),
        images_pulled=pulled,
    )


def longest_wait(said: Said, phases: Phases | None, ready_s: float) -> str:
    """What took most of a start: its longest phase, or the message that stood longest; "" if none."""
    if phases:
        name = max(PHASES, key=lambda name: getattr(phases, name))
        return f"{PHASES[name]}, {duration_text(getattr(phases, name))}"
    ends = [at_s for at_s, _ in said[1:]] + [ready_s]
    lasted = [(end_s - at_s, str(message["message"])) for (at_s, message), end_s in zip(said, ends)]
    return max(lasted, default=(0.0, ""))[1]


def last_word(said: Said) -> str:
    """What a start waits for: the last warning of Kubernetes that still holds, or else the last message.

    What follows a failure is the hub's own clean-up; a node that was found ends the warnings about nodes.
    """
    events = [raw for _, _, raw in kube_events(said) if raw.get("reason") != "Killing"]
    over = {"FailedScheduling"} if any(raw.get("reason") == "Scheduled" for raw in events) else ()
    warnings = [raw for raw in events if raw.get("type") == "Warning" and raw.get("reason") not in over]
    last = (warnings or events or [message for _, message in said] or [{"message": ""}])[-1]
    return str(last.get("message"))


API_ERROR = re.compile(r"\((\d{3})\)\s*Reason: .*HTTP response body: (\{.*\})", re.DOTALL)
NOT_IN_TIME = re.compile(r"pod \S+ did not start in (\d+) seconds!")
PASSING = (  # what differs from server to server
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z \[\w+\] ", ""),
    (r"(<user>)---[0-9a-f]{8}", r"\1"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uid>"),
    (r"\b\d{1,3}(\.\d{1,3}){3}\b", "<ip>"),
)


def spawn_failure(message: str, said: Said, lasted_s: float) -> str:
    """Why a start failed after this time: the hub's reason, and what the start was waiting for.

    The hub's own time-out comes without words, that of KubeSpawner with some: both read the same here.
    """
    text = message.removeprefix("Spawn failed:").strip()
    if error := API_ERROR.search(text):
        with contextlib.suppress(ValueError):
            return f"{json.loads(error[2]).get('message')} ({error[1]})"
    in_time = NOT_IN_TIME.search(text)
    if text and not in_time:
        return text
    seconds = int(in_time[1]) if in_time else round(lasted_s, -1 if lasted_s > 100 else None)
    waiting = last_word(said)
    if not in_time and not waiting and lasted_s < 5:
        return "the hub gives no reason"
    return f"did not start in {seconds:.0f} s" + (f": {waiting}" if waiting else "")


def without_name(text: str, user: str) -> str:
    """A reason without the user's or their pod's name, and all else that differs from server to server."""
    plain = text.replace(user, "<user>").replace(user.replace("-", "-2d"), "<user>")
    for pattern, replacement in PASSING:
        plain = re.sub(pattern, replacement, plain)
    return plain


# ==== The hub: session and transport ========================================================================

RETRIED = frozenset({429, 503, 504})
BROKEN = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError, ContentDecodingError)
# After these errors the hub has not acted.
NEVER_SENT = (NewConnectionError, ConnectTimeoutError, ssl.SSLCertVerificationError)
TIMED_OUT = "no answer in time"
NO_SUCH_HOST = "host name not found"
NOT_ACCEPTED = "the certificate was not accepted"
WHY: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (ConnectionRefusedError, "connection refused"),
    ((ReadTimeoutError, requests.Timeout, TimeoutError), TIMED_OUT),
    (ssl.SSLCertVerificationError, f"{NOT_ACCEPTED} ({{}})"),
    (ConnectionError, "connection reset"),
    (ChunkedEncodingError, "the answer broke off"),
    (socket.gaierror, NO_SUCH_HOST),
)


@dataclasses.dataclass
class Call:
    """How to send one request, and what happened to it on the way."""

    observer: bool = False  # sent only to watch
    handled: frozenset[int] = frozenset()  # statuses that the caller handles: not retried
    until_s: float | None = None  # to be answered by then; None: retries within the session's window
    once: bool = False  # no retries
    tries: int = 0
    backoff_s: float = 0.0
    lost: bool = False  # an answer was lost: the hub may have acted without our knowing


@dataclasses.dataclass(frozen=True)
class Reply:
    """The final answer to a request, or why there was none."""

    status: int  # 0 when no answer came, or only one from something in front of the hub
    sent_s: float
    answered_s: float
    data: Any = None  # what the body holds as JSON, or else its bytes
    message: str = ""  # why no answer came, or the hub's own message
    call: Call = dataclasses.field(default_factory=Call)
    retry_after_s: float | None = None
    location: str | None = None  # where a redirect, which is not followed, points
    front: int = 0  # the status that something in front of the hub answered with
    version: str = ""  # of the JupyterHub that answered, be it the hub or a server; "" of anything else

    @property
    def seen_status(self) -> int:
        """The status of whatever answered; 0 when nothing did."""
        return self.status or self.front

    def __str__(self) -> str:
        if not self.status or not self.message:
            return self.message or str(self.status)
        name = rf"{USERNAME_PREFIX}-[a-z0-9-]*[0-9]"  # the hub may list hundreds of them
        names = re.compile(rf"{name}(?:, {name})+")
        return f"{self.status} ({names.sub(lambda match: names_text(match[0].split(', ')), self.message)})"

    def event(self, step: str, user: str = "", ok: Collection[int] = (200, 201, 202, 204)) -> Event:
        """The event of a request, which succeeded if its status is among `ok`."""
        kind = Kind.REFUSED if self.status else Kind.IN_FRONT if self.front else Kind.NO_ANSWER
        failure = None if self.status in ok else Reason(kind, str(self.status or self.message))
        times = (self.sent_s, self.sent_s, self.answered_s)
        return Event(step, user, *times, failure, self.call.tries, self.call.backoff_s)


class HubSession(requests.Session):
    """The session that talks to the hub: it retries and counts, follows no redirect and keeps no cookie.

    Threads share it. `stop()` ends back-offs, pauses and progress streams at once; nothing more is sent then.
    """

    def __init__(self, token: str, wire: BaseAdapter | None = None, pool_maxsize: int = 100) -> None:
        super().__init__()
        self.token = token = Secret(token)
        self.headers["Authorization"] = Secret(f"token {token}")
        self.auth = lambda request: request  # so that neither a .netrc file nor the URL replaces the header
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.clock = time.monotonic
        self.retry_window_s, self.gone_after_s = RETRY_WINDOW_S, HUB_GONE_S
        self.answered_s, self._silence_reported = self.clock(), False
        self.marked = False  # whether the hub's answers have `VERSION_HEADER`
        self.of_others = False  # whether it asks others than the hub: there all answers count as they are
        self._token_checked_s, self._token_refused, self._token_lock = -math.inf, False, threading.Lock()
        self.traffic = Traffic()
        self.stopping = threading.Event()
        self._streams: dict[requests.Response, float] = {}
        self._wire, self._pool_maxsize = wire, pool_maxsize
        for scheme in ("http://", "https://"):
            self.mount(scheme, wire or HTTPAdapter(pool_maxsize=pool_maxsize))

    def clone(
        self, *, token: str | None = None, wire: BaseAdapter | None = None, own_stop: bool = False
    ) -> HubSession:
        """A session on the same hub with the same settings, headers, counts and stop, but for what is given.

        With a stop of its own it is for cleaning up, after this one was stopped: it tries each request once,
        since cleanup reads users again anyway, and soon checks whether a silent hub is there at all.
        """
        other = HubSession(token or self.token, self._wire or wire, self._pool_maxsize)
        other.headers.update(self.headers, Authorization=Secret(f"token {other.token}"))
        for setting in ("verify", "cert", "proxies", "hooks", "trust_env", "marked", "traffic"):
            setattr(other, setting, getattr(self, setting))
        if own_stop:
            other.retry_window_s, other.gone_after_s = 0.0, 20.0
        else:
            other.stopping = self.stopping
        return other

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: never follow a redirect, since the token must not leave this hub."""

    def send(
        self, request: requests.PreparedRequest, *, call: Call | None = None, **settings: Any
    ) -> requests.Response:
        """The response to a request. Connection failures, 429, 503 and 504 are retried, on every method.

        Repeating a POST or DELETE is safe on a hub: a second create answers 409, a second start 202 or 400, a
        second stop 204 or 202, a second delete 404; see `Call.lost`. Raises as requests does, or `Stopped`.
        Response and error have the `call`, for `perform`.
        """
        call = call or Call()
        until_s = self.clock() + self.retry_window_s if call.until_s is None else call.until_s
        settings["timeout"] = settings.get("timeout") or DEFAULT_TIMEOUT
        if self.stopping.is_set():
            raise Stopped("the run was stopped before this was sent")
        while True:
            call.tries += 1
            self.traffic.sent(call.observer, again=call.tries > 1)
            try:
                response = super().send(request, **settings)
            except OSError as error:  # which requests' own errors are too
                call.lost |= not any(isinstance(cause, NEVER_SENT) for cause in _causes(error))
                if not isinstance(error, BROKEN) or not self._back_off(call, until_s):
                    error.call = call  # type: ignore[attr-defined]
                    raise
                continue
            hubs = self.is_hubs(response)
            self.traffic.answered(response.status_code, in_front=not hubs)
            call.lost |= not hubs
            if hubs:
                self.answered_s = self.clock()
                if self._silence_reported:
                    LOG.warning("The hub answers again")
                self._silence_reported = False
            retried = response.status_code in (RETRIED - call.handled if hubs else RETRIED)
            if not retried or not self._back_off(call, until_s, _retry_after_s(response)):
                response.call = call  # type: ignore[attr-defined]
                return response
            response.close()

    def _back_off(self, call: Call, until_s: float, asked_s: float | None = None) -> bool:
        """Wait for the next try, as long as the hub asks or for 0, 1, 2, 4, 8 s; False if there is none."""
        began_s = self.clock()
        if call.once or call.tries > RETRIES or began_s >= until_s:
            return False
        seconds = asked_s or (0.5 * 2 ** (call.tries - 1) if call.tries > 1 else 0.0)
        was_stopped = not self.pause(min(seconds, RETRY_AFTER_MAX_S, until_s - began_s))
        call.backoff_s += self.clock() - began_s
        if was_stopped:
            raise Stopped("the run was stopped")
        return True

    def exchange(
        self, method: str, url: str, call: Call, stream: bool = False, timeout: float = 0.0, **parts: Any
    ) -> requests.Response:
        """The response to one call; `parts` are those of a `requests.Request`. Raises as `send` does."""
        if call.until_s is not None:
            timeout = max(0.05, min(timeout or DEFAULT_TIMEOUT, call.until_s - self.clock()))
        request = self.prepare_request(requests.Request(method, url, **parts))
        settings = self.merge_environment_settings(request.url, {}, stream, None, None)
        return self.send(request, call=call, timeout=timeout, **settings)

    def ask(self, method: str, url: str, *, call: Call | None = None, **parts: Any) -> Reply:
        """The final answer, or why there is none; never raises. `parts` are those of `exchange`."""
        sent_s, call = self.clock(), call or Call()
        try:
            response = self.exchange(method, url, call, **parts)
            content = _content_of(response, self.is_hubs(response))
        except (Stopped, OSError) as error:
            content = {"status": 0, "message": str(error) if isinstance(error, Stopped) else why(error)}
        return Reply(sent_s=sent_s, answered_s=self.clock(), call=call, **content)

    def events(self, url: str, until_s: float) -> Iterator[Json]:
        """Events of a progress stream as they arrive, until it ends, breaks or is cut at `until_s`."""
        call = Call(observer=True, until_s=until_s)
        try:
            with self.exchange("GET", url, call, stream=True, timeout=STREAM_TIMEOUT_S) as response:
                if response.status_code != 200 or not self.is_hubs(response):
                    return
                self._streams[response] = until_s
                try:
                    for line in response.iter_lines():
                        self.answered_s = self.clock()  # a keep-alive, too, shows that the hub is there
                        if line.startswith(b"data:"):
                            yield json.loads(line.removeprefix(b"data:"))
                finally:
                    del self._streams[response]
        except (requests.RequestException, ValueError, Stopped) as error:
            LOG.debug("Progress stream of %s broke: %s", url, why(error))

    def cut_streams(self) -> None:
        """End the streams whose time has come, or all when stopping; their readers go on at once."""
        for response, until_s in list(self._streams.items()):
            if self.stopping.is_set() or self.clock() >= until_s:
                raw: Any = response.raw
                with contextlib.suppress(RuntimeError, ValueError, OSError, AttributeError):  # just ended
                    if hasattr(raw, "shutdown"):
                        raw.shutdown()
                    else:  # urllib3 before 2.3
                        raw._fp.fp.raw._sock.shutdown(socket.SHUT_RD)

    def is_hubs(self, response: requests.Response) -> bool:
        """Whether the hub, or one of its servers, gave this answer, and not something in front of it.

        Where something strips the header that tells, only 502, 503, 504 and a 404 without JSON count as a
        proxy's own answers.
        """
        if VERSION_HEADER in response.headers:
            self.marked = True
            return True
        is_json = "json" in response.headers.get("Content-Type", "")
        of_proxy = response.status_code in (502, 503, 504) or (response.status_code == 404 and not is_json)
        return self.of_others or not (self.marked or of_proxy)

    def token_is_refused(self, endpoint: str) -> bool:
        """Whether the hub refuses the token even for `GET /user`, which is sent at most every 30 s."""
        with self._token_lock:  # others wait for what is being found out
            if self.clock() > self._token_checked_s + TOKEN_CHECK_EVERY_S:
                reply = self.ask("GET", f"{endpoint}/user", call=Call(once=True))
                self._token_refused, self._token_checked_s = reply.status in (401, 403), self.clock()
            return self._token_refused

    def say_if_silent(self, reason: str) -> None:
        """Warn, once, when the hub has not answered for some seconds."""
        silent_s = self.clock() - self.answered_s
        if silent_s > SILENT_S and not self._silence_reported:
            self._silence_reported = True
            since = datetime.now().astimezone() - timedelta(seconds=silent_s)
            LOG.warning("The hub has not answered since %s (%s)", since.strftime("%H:%M:%S"), reason)

    @property
    def hub_is_gone(self) -> bool:
        """Whether the hub has been silent too long to go on sending."""
        return self.clock() - self.answered_s > self.gone_after_s

    def pause(self, seconds: float) -> bool:
        """Wait; False when told to stop meanwhile. The only sleep of the program."""
        return not (self.stopping.wait(seconds) if seconds > 0 else self.stopping.is_set())

    def stop(self) -> None:
        """No further request; everything that waits goes on at once."""
        self.stopping.set()
        self.cut_streams()

    def proxy_for(self, url: str) -> str:
        """The URL of this machine's own proxy for a URL; else ""."""
        proxies = self.merge_environment_settings(url, {}, None, None, None)["proxies"]
        proxy = requests.utils.select_proxy(url, proxies) or ""
        return proxy if "://" in proxy or not proxy else f"http://{proxy}"

    def proxy_to(self, url: str) -> str:
        """This machine's own proxy for a URL, like `the proxy http://squid:3128 (https_proxy)`; else ""."""
        if not (proxy := self.proxy_for(url)):
            return ""
        given = (proxy, proxy.removeprefix("http://"))
        names = (f"{urllib.parse.urlsplit(url).scheme}_proxy", "all_proxy")
        variables = (name for lower in names for name in (lower, lower.upper()))
        variable = next((f" ({name})" for name in variables if os.environ.get(name) in given), "")
        return f"the proxy {without_credentials(proxy)}{variable}"


def without_proxy(url: str) -> str:
    """How to reach a URL without this machine's own proxy."""
    host = urllib.parse.urlsplit(url).hostname
    return f"if this machine reaches {host} without that proxy too, set no_proxy={host}"


def in_front(response: requests.Response) -> str:
    """A sentence that names what answered in place of the hub."""
    name = response.headers.get("Server", "")[:40]
    return f"something in front of the hub{f' ({name})' if name else ''} answered {response.status_code}"


def _content_of(response: requests.Response, hubs: bool) -> Json:
    """The fields of a `Reply` in an answer of the hub's, or (else) of something in front of it."""
    status, headers = response.status_code, response.headers
    content: Json = {"status": status, "location": headers.get("Location")}
    if not hubs:
        return content | {"status": 0, "message": in_front(response), "front": status}
    content |= {"version": headers.get(VERSION_HEADER, ""), "retry_after_s": _retry_after_s(response)}
    try:
        data = response.json() if response.content else None
    except ValueError:
        kind = headers.get("Content-Type", "").partition(";")[0]
        return content | {"data": response.content, "message": f"not JSON but {kind}" if kind else "not JSON"}
    message = data.get("message") if isinstance(data, dict) else ""
    return content | {"data": data, "message": message or ""}


def _retry_after_s(response: requests.Response) -> float | None:
    try:
        return Retry().parse_retry_after(response.headers["Retry-After"])
    except Exception:  # absent, or one that urllib3 cannot read (an error type of its own)
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised for, as far down as requests and urllib3 have wrapped it."""
    while error is not None:
        yield error
        inner = [getattr(error, "reason", None), *error.args, error.__cause__, error.__context__]
        error = next((e for e in inner if isinstance(e, BaseException)), None)


def why(error: BaseException) -> str:
    """Why no answer came, in a few words without addresses or objects."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLCertVerificationError):
            return f"TLS failed ({(cause.reason or str(cause)).lower().replace('_', ' ')})"
        for kind, words in WHY:
            if isinstance(cause, kind):
                return words.format(cause)
        if str(cause).startswith("Tunnel connection failed: "):
            return f"this machine's proxy refused ({str(cause).partition(': ')[2]})"
    return type(error).__name__ if isinstance(error, requests.RequestException) else str(error)


def log_response_time(resp: requests.Response, *args: Any, **kwargs: Any) -> None:
    """A response hook: one debug line with method, path, status and seconds."""
    method, path, seconds = resp.request.method, resp.request.path_url, resp.elapsed.total_seconds()
    LOG.debug("%s %s: %d in %.3f s", method, path, resp.status_code, seconds)


def get_session(
    token: str, dry_run: bool = False, pool_maxsize: int = 100, *, headers: Sequence[tuple[str, str]] = ()
) -> HubSession:
    """A session with a token. It retries connection failures, 429, 503 and 504 on every method, and counts.

    With `dry_run` a simulated hub answers and nothing is sent. `pool_maxsize` connections are kept open.
    `headers` go with every request, even with one that goes without the token.
    """
    session = HubSession(token, SimulatedHub() if dry_run else None, pool_maxsize)
    session.headers.update(headers)
    if LOG.isEnabledFor(logging.DEBUG):
        session.hooks["response"].append(log_response_time)
    return session


class SimulatedHub(HTTPAdapter):
    """Answers as an empty hub would, and sends nothing: every server is ready at once."""

    def __init__(self) -> None:
        super().__init__()
        self._users: dict[str, Json] = {}

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.url or "").path).partition("/hub/api/")[2]
        status, data = self._answer(request.method or "", path.split("/"), json.loads(request.body or "null"))
        response = requests.Response()
        response.status_code, response.url, response.request = status, request.url or "", request
        response.headers["Content-Type"] = "application/json"
        response.raw = io.BytesIO(b"" if data is None else json.dumps(data).encode())
        return response

    def _answer(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        users, (_, name, below) = self._users, (*path, "", "")[:3]
        if path == ["users"] and method == "GET":
            return 200, list(users.values())
        if path == ["users"]:
            users.update({name: {"name": name, "admin": False, "servers": {}} for name in body["usernames"]})
            return 201, [users[name] for name in body["usernames"]]
        if name not in users or below not in ("", "server", "activity"):
            return 404, {"status": 404, "message": None}
        if method == "GET" or below == "activity":
            return 200, users[name] if method == "GET" else None
        if below == "server":
            users[name]["servers"] = {"": {"pending": None, "ready": True}} if method == "POST" else {}
        else:
            del users[name]
        return 201 if method == "POST" else 204, None


# ==== The hub: its API ======================================================================================


def user_url(endpoint: str, name: str, *rest: str) -> str:
    """The URL of a user, or of what follows below it."""
    return "/".join([f"{endpoint}/users", urllib.parse.quote(name, safe=""), *rest])


@dataclasses.dataclass(frozen=True)
class Hub:
    """A hub's API: a method for each request, with the answers to expect."""

    endpoint: str
    session: HubSession
    version: str = ""
    owner: str = ""  # whose named servers take the place of users; "": nobody's
    reading: ClassVar[dict[str, int]] = {}  # parameters of reading a user

    def page_of_users(self, offset: int) -> Reply:
        """`GET /users`: a page on hubs from 2.0 (`items`, `_pagination`), a plain list of all users on 1.x.

        Hubs from 2.3 filter by name.
        """
        params = {"offset": offset, "limit": PAGE, "name_filter": f"{USERNAME_PREFIX}-"}
        parts: Json = {"params": params, "headers": {"Accept": "application/jupyterhub-pagination+json"}}
        return self.session.ask("GET", f"{self.endpoint}/users", timeout=2 * DEFAULT_TIMEOUT, **parts)

    def create(self, names: Sequence[str]) -> Reply:
        """`POST /users`: 201 with the new ones; 409 when all exist; 500 when some may have been made."""
        body, timeout_s = {"usernames": list(names)}, max(len(names), DEFAULT_TIMEOUT)
        return self.session.ask("POST", f"{self.endpoint}/users", json=body, timeout=timeout_s)

    def read(self, name: str, observer: bool = False, until_s: float | None = None) -> Reply:
        """`GET /users/{name}`, tried until `until_s`: 200 with the model, 404 when gone; see `state_in`."""
        call, url = Call(observer, until_s=until_s), user_url(self.endpoint, name)
        return self.session.ask("GET", url, call=call, params=self.reading)

    def state(self, name: str, observer: bool = False, until_s: float | None = None) -> ServerState:
        """What the hub says of a user and their server."""
        return state_in(self.read(name, observer, until_s))

    def server_url(self, name: str, *rest: str) -> str:
        """The URL of a server, or of what follows below it."""
        place = (self.owner, "servers", name) if self.owner else (name, "server")
        return user_url(self.endpoint, *place, *rest)

    def ask_server(self, method: str, name: str, **parts: Any) -> Reply:
        """The answer to a request about a server; `parts` are those of `HubSession.ask`."""
        return self.session.ask(method, self.server_url(name), **parts)

    def start(self, name: str, profile: str | Json | None, until_s: float) -> Reply:
        """`POST server`: 201 ready, 202 starting, 429 throttled, 400 running, 500 failed."""
        options = {"profile": profile} if isinstance(profile, str) else profile or None
        call = Call(handled=frozenset({429}), until_s=until_s)
        return self.ask_server("POST", name, call=call, json=options, timeout=math.inf)

    def progress(self, name: str, until_s: float) -> Iterator[Json]:
        """`GET server/progress`: events, of which the last is `ready` or `failed`."""
        return self.session.events(self.server_url(name, "progress"), until_s)

    def stop(self, name: str) -> Reply:
        """`DELETE server`: see `AFTER_STOP`."""
        return self.ask_server("DELETE", name)

    def delete(self, name: str) -> Reply:
        """`DELETE /users/{name}`: see `AFTER_DELETE`."""
        return self.session.ask("DELETE", user_url(self.endpoint, name))

    def make_token(self, name: str) -> Reply:
        """`POST /users/{name}/tokens`: 200 (1.x) or 201 with the `token`, which goes with the user."""
        url = user_url(self.endpoint, name, "tokens")
        return self.session.ask("POST", url, json={"note": USERNAME_PREFIX})

    def denial(self, reply: Reply) -> str:
        """What the hub does, by a 401 or 403; else "". The token is blamed only if `GET /user` does so."""
        if reply.status not in (401, 403):
            return ""
        if self.session.token_is_refused(self.endpoint):
            return f"{TOKEN_REFUSED} ({reply.status})"
        return f"denies this{f': {reply.message}' if reply.message else ' without a reason'} ({reply.status})"


@dataclasses.dataclass(frozen=True)
class OwnServers(Hub):
    """The hub of somebody without admin rights: each of their named servers looks like a user with a server.

    A start makes a named server, even one that is throttled or fails; it exists until it is removed.
    Hubs before 3.0 do not list it while it is stopped: `there` are those not known to be gone.
    """

    there: set[str] = dataclasses.field(default_factory=set)
    reading = {"include_stopped_servers": 1}

    def page_of_users(self, offset: int) -> Reply:
        """All named servers in `GET /users/{owner}`."""
        reply = super().read(self.owner)
        servers = self._servers_in(reply)
        return dataclasses.replace(reply, data=None if servers is None else list(servers.values()))

    def read(self, name: str, observer: bool = False, until_s: float | None = None) -> Reply:
        """A named server in `GET /users/{owner}`; 404 when it is not there, but not when its owner is not."""
        reply = super().read(self.owner, observer, until_s)
        servers = self._servers_in(reply)
        if servers is not None and name not in servers:
            return dataclasses.replace(reply, status=404, data={})
        return dataclasses.replace(reply, data=servers and servers[name])

    def _servers_in(self, reply: Reply) -> dict[str, Json] | None:
        """A user model for each named server in the owner's model; None if that lists no servers."""
        if reply.status != 200 or not isinstance(reply.data, dict) or "servers" not in reply.data:
            return None
        servers: dict[str, Json] = {name: {} for name in self.there.copy()}
        for name, server in (reply.data["servers"] or {}).items():
            if name:  # hubs before 3.0 do not say `stopped`
                stopped = not server.get("ready") and not server.get("pending")
                servers[name] = {"": server | {"stopped": stopped}}
        return {name: {"name": name, "admin": False, "servers": own} for name, own in servers.items()}

    def ask_server(self, method: str, name: str, **parts: Any) -> Reply:
        """The answer about `/users/{owner}/servers/{name}`: as for a user; 404 when it is gone."""
        self.there.add(name)
        reply = super().ask_server(method, name, **parts)
        if reply.status == 404 or named_server_limit(reply) is not None:
            self.there.discard(name)
        return reply

    def delete(self, name: str) -> Reply:
        """`DELETE` the named server for good: 204, 404 when gone; 202 if it has yet to stop."""
        reply = self.ask_server("DELETE", name, json={"remove": True})
        if reply.status == 204:
            self.there.discard(name)
        return reply


def state_in(reply: Reply) -> ServerState:
    """What the answer to `Hub.read` says; anything but a model or the hub's own 404 is not known."""
    if reply.status == 404:
        return ServerState.GONE
    if reply.status != 200 or not isinstance(reply.data, dict):
        return ServerState.UNKNOWN
    return server_state(reply.data)


def public_url(hub: Hub, plan: Plan) -> str:
    """Where people reach the hub."""
    return f"{plan.public_url or hub.endpoint.removesuffix('/hub/api')}/"


# ==== Progress, and many things at the same time ============================================================


@contextlib.contextmanager
def progress(line: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """What to call often within the `with` block: it shows the line on standard error when it is time.

    On a terminal that is twice a second, in place; elsewhere every ten seconds; below INFO never.
    """
    enabled, in_place = LOG.isEnabledFor(logging.INFO), sys.stderr.isatty()
    every_s, width = (STATUS_IN_PLACE_EVERY_S if in_place else STATUS_EVERY_S), None
    next_s = time.monotonic() + (0.0 if in_place else every_s)
    write: Callable[[str], object] = functools.partial(print, file=sys.stderr, flush=True)

    def show(text: str) -> None:
        with contextlib.suppress(OSError):  # `tee` has ended, or the terminal: what goes on goes on
            write(text)

    with contextlib.ExitStack() as closing:
        if enabled and in_place:
            width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
            if tqdm := optional("tqdm"):
                redirect = importlib.import_module("tqdm.contrib.logging").logging_redirect_tqdm
                closing.enter_context(redirect())
                bar = closing.enter_context(tqdm.tqdm(bar_format="{desc}", file=sys.stderr, leave=False))
                write = bar.set_description_str
            else:  # a log line overwrites this one, since the cursor is at its beginning
                write = functools.partial(print, end="\033[K\r", file=sys.stderr, flush=True)
                closing.callback(show, "")

        def tell() -> None:
            nonlocal next_s
            if enabled and time.monotonic() >= next_s:
                next_s = time.monotonic() + every_s
                show(line()[:width])

        yield tell


def start_thread(name: str, act: Callable[..., object], *args: Any) -> threading.Thread:
    """Do this in a daemon thread. Raises `CutShort` where the system starts no more."""
    thread = threading.Thread(target=act, args=args, name=name, daemon=True)
    try:
        thread.start()
        return thread
    except RuntimeError:
        raise no_more_threads() from None


def no_more_threads() -> CutShort:
    """The error of a run for which the system starts no more threads."""
    return CutShort(
        f"this machine starts no more threads than {threading.active_count():,}: raise its limit (ulimit -u, "
        "or a container's limit of processes), or spread the people over several machines with Locust"
    )


class Team:
    """Threads that work at the same time, and the loop that waits for them, ticking ten times a second.

    The end of a `with` block waits for all of them, or for the end of the run. `changed` announces that a
    thread has ended, and what else is waited for.
    """

    def __init__(
        self,
        session: HubSession,
        on_tick: Callable[[], None] = lambda: None,
        changed: threading.Condition | None = None,
    ) -> None:
        self.running, self._changed = 0, changed or threading.Condition()
        self._session, self._on_tick, self._tick_s = session, on_tick, session.clock()
        self._error: Exception | None = None
        session.answered_s = session.clock()

    def start(self, act: Callable[..., object], *args: Any) -> None:
        """Do this in a thread of its own. Raises `CutShort` where the system starts no more threads."""
        start_thread("hub-stress-test", self._do, act, *args)
        with self._changed:
            self.running += 1  # the thread may have ended already: only who starts threads waits for them

    def wait_for(self, ready: Callable[[], bool], at_s: float = math.inf) -> bool:
        """Wait until `ready`, asked after each change and at `at_s`; False when the run ends before.

        It ends when told to stop, or when the hub is gone. Raises what a thread raised.
        """
        session = self._session
        while not session.stopping.is_set() and not session.hub_is_gone:
            if session.clock() >= self._tick_s:
                self._tick_s = session.clock() + 0.1
                session.cut_streams()
                self._on_tick()
            with self._changed:
                left_s = max(0.0, min(at_s, self._tick_s) - session.clock())
                is_ready = self._changed.wait_for(lambda: self._error or ready(), left_s)
            if self._error:
                raise self._error
            if is_ready:
                return True
        return False

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait_for(lambda: not self.running)
            self._on_tick()

    def _do(self, act: Callable[..., object], *args: Any) -> None:
        try:
            act(*args)
        except Stopped:
            pass
        except Exception as error:
            self._error = self._error or error
        finally:
            with self._changed:
                self.running -= 1
                self._changed.notify_all()


class Regularly:
    """While the `with` block runs, does something at fixed moments, with the moment at which it was due.

    Up to `at_most` threads take turns, as many as are late and one that waits. Where all are late, `skip` is
    called for what they missed.
    """

    def __init__(
        self,
        name: str,
        period_s: float,
        act: Callable[[float], object],
        at_most: int = 1,
        skip: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._period_s, self._act, self._at_most, self._skip = name, period_s, act, at_most, skip
        self._ended, self._numbers = threading.Event(), itertools.count(1)
        self._threads, self._busy, self._growing = list[threading.Thread](), set[int](), threading.Lock()

    def __enter__(self) -> None:
        self._began_s = time.monotonic()
        with self._growing:
            self._threads.append(start_thread(self._name, self._run))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        until_s = time.monotonic() + 1.0  # a silent hub may hold some up for longer
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    def _run(self) -> None:
        for n in self._numbers:
            due_s = self._began_s + n * self._period_s
            if self._ended.wait(max(0.0, due_s - time.monotonic())):
                return
            if time.monotonic() >= due_s + self._period_s:
                self._skip()
                continue
            with self._growing:
                self._busy.add(threading.get_ident())
                if len(self._busy) == len(self._threads) < self._at_most:
                    with contextlib.suppress(CutShort):  # where no more start, those that are there go on
                        self._threads.append(start_thread(self._name, self._run))
            self._act(due_s)
            self._busy.discard(threading.get_ident())


# ==== The hub's own figures =================================================================================

CPU, MEMORY, FILES = "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"
LOOP, BEGAN = "event_loop_interval_seconds_bucket", "process_start_time_seconds"
_OWN_FIGURES = re.compile(  # behind whatever prefix the hub's operator has chosen
    f"(?:.*_)?({CPU}|{MEMORY}|{FILES}|{LOOP}|{BEGAN}|server_stop_seconds_count|running_servers|"
    "nodejs_active_handles_total|(?:request|server_spawn)_duration_seconds_(?:count|sum))"
)
AFTERMATH = {
    "open_files": (FILES, ""),
    "rss_bytes": (MEMORY, ""),
    "proxy_error_pages": ("request_duration_seconds_count", "GET ProxyErrorHandler"),
    "active_handles": ("nodejs_active_handles_total", ""),
}
FILES_TO_MENTION = 20  # open files more than before
NO_METRICS_SCOPE = "the token lacks the scope read:metrics"
LOOP_INTERVAL_S = 0.05  # the resolution of a hub's event-loop lag


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A process's own figures at one moment of our monotonic clock, by name and label."""

    at_s: float
    figures: Mapping[tuple[str, str], float]

    def get(self, name: str, label: str = "") -> float:
        return self.figures.get((name, label), 0.0)

    def labels(self, name: str) -> list[str]:
        """The labels that this figure has."""
        return [label for known, label in self.figures if known == name]


def metrics_url(endpoint: str) -> str:
    """The URL of a hub's own figures."""
    return endpoint.removesuffix("/api") + "/metrics"


def snapshot(samples: Iterable[tuple[str, Mapping[str, str], float]], at_s: float) -> Snapshot:
    """The figures that matter here, among the samples (name, labels, value) of a metrics page."""
    figures: collections.defaultdict[tuple[str, str], float] = collections.defaultdict(float)
    for full_name, labels, value in samples:
        match = _OWN_FIGURES.fullmatch(full_name)
        if match and labels.get("code", "2").startswith("2"):  # the time of a refusal would mislead
            label = labels.get("le") or labels.get("reason") or labels.get("status") or ""
            if "handler" in labels:
                label = f"{labels['method']} {labels['handler'].rpartition('.')[2]}"
            figures[match[1], label] += value
    return Snapshot(at_s, dict(figures))


class Monitor(Regularly):
    """While the `with` block runs, reads a process's own metrics: at once, and every 5 seconds.

    `GET /hub/metrics`: 200 with Prometheus' text; 403 without the scope read:metrics (on 1.x any token will
    do). The page of another process is read without the token and other headers that are meant for the hub.
    """

    def __init__(self, url: str, session: HubSession, is_hub: bool = True) -> None:
        super().__init__("monitor", METRICS_EVERY_S, lambda due_s: self.look())
        self.snapshots: list[Snapshot] = []
        self.missing = ""  # why there are no snapshots
        self._url, self._looking = url, threading.Lock()
        # a session of its own, so that it sees the hub also after the load was stopped
        self._session = session.clone(own_stop=True)
        if not is_hub:
            self._session.headers.clear()  # which are for the hub alone
            self._session.traffic, self._session.of_others = Traffic(), True
        if optional("prometheus_client"):
            self._parser = importlib.import_module("prometheus_client.parser")
        else:
            self.missing = "prometheus-client is not installed: pip install prometheus-client"
            LOG.info("The hub's own figures are not read, since %s", self.missing)

    def __enter__(self) -> None:
        self.look()
        super().__enter__()

    def look(self) -> Snapshot | None:
        """Take a snapshot; None when the page could not be read."""
        with self._looking:
            if self.missing:
                return None
            reply = self._session.ask("GET", self._url, call=Call(observer=True), timeout=METRICS_TIMEOUT_S)
            if reply.status == 200:
                page = reply.data.decode(errors="replace") if isinstance(reply.data, bytes) else ""
                families = self._parser.text_string_to_metric_families(page)
                with contextlib.suppress(ValueError):  # this is no such page
                    samples = [sample[:3] for family in families for sample in family.samples]
                    self.snapshots.append(snapshot(samples, (reply.sent_s + reply.answered_s) / 2))
                    return self.snapshots[-1]
            elif reply.status == 403:
                self.missing = NO_METRICS_SCOPE
            elif reply.seen_status and not self.snapshots:
                answered = reply.message if reply.front else f"answered {reply.status}"
                self.missing = f"GET {urllib.parse.urlsplit(self._url).path}: {answered}"
            return None


def grown(snapshots: Sequence[Snapshot], name: str, label: str = "") -> float:
    """How much a counter has grown; after a restart it began at 0 again."""
    total = 0.0
    for before, after in zip(snapshots, snapshots[1:]):
        restarted = before.get(BEGAN) != after.get(BEGAN)
        total += after.get(name, label) - (0.0 if restarted else before.get(name, label))
    return total


@dataclasses.dataclass(frozen=True)
class OwnDurations:
    """How often the hub did something, and how long it took by its own clock."""

    count: float
    mean_s: float


@dataclasses.dataclass(frozen=True)
class HubFigures:
    """The hub's own figures between the first and the last snapshot."""

    cpu_s: float
    cpu_share: float  # of a processor
    cpu_share_max: float  # over some 5 seconds of the load, without cleaning up
    rss_before_bytes: float
    rss_max_bytes: float
    rss_after_bytes: float
    rss_per_server_bytes: float | None
    event_loop_lag_p95_s: float | None
    event_loop_lag_max_s: float | None
    event_loop_samples: int
    running_servers_max: float
    requests: dict[str, OwnDurations]
    spawns: dict[str, OwnDurations]

    @property
    def late_s(self) -> float | None:
        """The event loop's lag, if it is long: p95, also of few samples, since a very late loop takes few."""
        lag_s = self.event_loop_lag_p95_s
        return lag_s if lag_s and lag_s > LATE_LOOP_S else None

    @property
    def fullness(self) -> str:
        """How full the hub's one thread, or how late its event loop was; "" if neither held requests up."""
        used = f"used up to {share_text(self.cpu_share_max)} of a processor"
        if self.cpu_share_max > BUSY:
            return f"the hub's one thread was full: it {used}"
        if self.cpu_share_max > IDLE and self.late_s:
            return f"the hub's event loop was late: by {duration_text(self.late_s)}, while it {used}"
        return ""


def hub_figures(snapshots: Sequence[Snapshot], load_ended_s: float, servers_ready: int) -> HubFigures | None:
    """The hub's own figures; None without two snapshots."""
    if len(snapshots) < 2:
        return None
    first, last = snapshots[0], snapshots[-1]
    rss = [shot.get(MEMORY) for shot in snapshots]
    loop = sorted((float(bound), grown(snapshots, LOOP, bound)) for bound in last.labels(LOOP))
    lags = [quantile(loop, share) for share in (0.95, 1.0)]
    lag_p95_s, lag_max_s = (None if lag is None else max(lag, LOOP_INTERVAL_S) for lag in lags)
    cpu_s = grown(snapshots, CPU)
    cpu_share = cpu_s / (last.at_s - first.at_s)
    under_load = [shot for shot in snapshots if shot.at_s < load_ended_s + 1.0]
    return HubFigures(
        cpu_s=cpu_s,
        cpu_share=cpu_share,
        cpu_share_max=max((share for _, share in cpu_shares(under_load)), default=cpu_share),
        rss_before_bytes=rss[0],
        rss_max_bytes=max(rss),
        rss_after_bytes=rss[-1],
        rss_per_server_bytes=(max(rss) - rss[0]) / servers_ready if servers_ready else None,
        event_loop_lag_p95_s=lag_p95_s,
        event_loop_lag_max_s=lag_max_s,
        event_loop_samples=int(loop[-1][1]) if loop else 0,
        running_servers_max=max(0.0, *(shot.get("running_servers") for shot in snapshots)),
        requests=_own_durations(snapshots, "request_duration_seconds"),
        spawns=_own_durations(snapshots, "server_spawn_duration_seconds"),
    )


def restarts_in(snapshots: Sequence[Snapshot]) -> int:
    """How often a process began anew."""
    began = [shot.get(BEGAN) for shot in snapshots]
    return sum(map(operator.ne, began, began[1:]))


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """A quantile of a histogram (upper bounds, counts up to there), linear between bounds; None if empty."""
    rank = share * buckets[-1][1] if buckets else 0.0
    lower, below = 0.0, 0.0
    for upper, count in buckets:
        if count >= rank > 0:
            within = (rank - below) / (count - below)
            return lower if math.isinf(upper) else lower + (upper - lower) * within
        lower, below = upper, count
    return None


def _own_durations(snapshots: Sequence[Snapshot], name: str) -> dict[str, OwnDurations]:
    durations = {}
    for label in snapshots[-1].labels(f"{name}_count"):
        if (count := grown(snapshots, f"{name}_count", label)) > 0:
            durations[label] = OwnDurations(count, grown(snapshots, f"{name}_sum", label) / count)
    return durations


def cpu_shares(snapshots: Sequence[Snapshot]) -> list[tuple[float, float]]:
    """The share of a processor used up to each moment, over stretches of at least 1 s if possible."""
    shares: list[tuple[float, float]] = []
    since = 0
    for at in range(1, len(snapshots)):
        stretch = snapshots[since : at + 1]
        took_s = stretch[-1].at_s - stretch[0].at_s
        if took_s >= 1.0 or (at == len(snapshots) - 1 and not shares):
            shares.append((stretch[-1].at_s, grown(stretch, CPU) / max(took_s, 1e-3)))
            since = at
    return shares


def process_timeline(snapshots: Sequence[Snapshot], began_s: float) -> Json | None:
    """Columns: CPU share, memory and open files, in seconds since the run began; None without snapshots."""
    if not snapshots:
        return None
    shares = cpu_shares(snapshots)
    running = [max(0.0, shot.get("running_servers")) for shot in snapshots]  # hubs miscount at times
    return {
        "cpu_at_s": [rounded(at_s - began_s) for at_s, _ in shares],
        "cpu_share": [rounded(share) for _, share in shares],
        "at_s": [rounded(shot.at_s - began_s) for shot in snapshots],
        "rss_bytes": [shot.get(MEMORY) for shot in snapshots],
        "running_servers": running,
        "open_files": [shot.get(FILES) for shot in snapshots],
    }


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure before a run, at its most, and after cleaning up; `after` is None when users were kept."""

    before: float
    peak: float
    after: float | None
    grown: float | None


Aftermath = Mapping[str, Mapping[str, Change]]  # by process, and by figure


def aftermath_of(snapshots_of: Mapping[str, Sequence[Snapshot]], kept: bool) -> Aftermath | None:
    """What a run left in the processes that were watched; None without two snapshots of any."""
    aftermath: dict[str, dict[str, Change]] = {}
    for process, snapshots in snapshots_of.items():
        for key, figure in AFTERMATH.items() if len(snapshots) > 1 else ():
            values = [shot.get(*figure) for shot in snapshots]
            rest = (None, None) if kept else (values[-1], values[-1] - values[0])
            if any(shot.labels(figure[0]) for shot in snapshots):
                aftermath.setdefault(process, {})[key] = Change(values[0], max(values), *rest)
    return aftermath or None


# ==== Users: found, claimed, made ===========================================================================


TO_LIST = "list its "


def list_users(hub: Hub, record: Recorder) -> Iterator[Json]:
    """Every user with our prefix in the name; hubs that do not filter list others too.

    Raises `HubRefused` or `Stopped`. `next.offset` leads to the next page, since `next.url` may be wrong
    behind a proxy. A page may be short.
    """
    offset: int | None = 0
    while offset is not None:
        reply = hub.page_of_users(offset)
        if not reply.status and hub.session.stopping.is_set():
            raise Stopped
        record.add(reply.event("list_users"))
        page = {"items": reply.data} if isinstance(reply.data, list) else reply.data
        if reply.status != 200 or not isinstance(page, dict) or "items" not in page:
            raise HubRefused(f"{TO_LIST}{thing(bool(hub.owner))}s", reply, hub.denial(reply))
        yield from page["items"]
        offset = (page.get("_pagination", {}).get("next") or {}).get("offset")


def test_users(listed: Iterable[Json], run: str | None) -> list[Json]:
    """The listed users that this tool's naming made (of one run, if named), except admins."""
    return [user for user in listed if is_test_user(user["name"], run) and not user.get("admin")]


class Claims:
    """The users that this run has made, or may have made: all that it will delete, and nothing else.

    A name is claimed before the request for it, and dropped if the hub says that it was taken or is absent.
    After a lost answer the claim stands, even when the name is not there yet, since the hub may act late: the
    name was free just before. Only a run with the same --run name at the same time could make it too. It
    is noticed when names that we did not create are taken: with `rivals`, only confirmed names are deleted.
    """

    def __init__(self) -> None:
        self.confirmed: dict[str, None] = {}  # in order
        self.unconfirmed: dict[str, None] = {}
        self.rivals = False
        self.in_vain = 0  # creates in a row that made nobody
        self.known: set[str] | None = None  # names that the hub listed before the first create

    def ask(self, names: Iterable[str]) -> None:
        self.unconfirmed.update(dict.fromkeys(names))

    def settle(self, asked: Iterable[str], made: Collection[str]) -> None:
        self.confirmed.update(dict.fromkeys(made))  # first, so that at no moment it is in neither
        for name in asked:
            self.unconfirmed.pop(name, None)

    @property
    def ours(self) -> list[str]:
        return list(self.confirmed if self.rivals else self.confirmed | self.unconfirmed)


def make_users(
    count: int, batch_size: int, hub: Hub, record: Recorder, claims: Claims, taken: Iterable[str], run: str
) -> Iterator[list[str]]:
    """The names of exactly `count` new users, in batches of at most `batch_size`, numbered after those taken.

    Names that turn out to be taken are skipped. Raises `CutShort` or `Stopped`; `claims` has those made.
    """
    names = (username(index, run) for index in itertools.count(first_free_index(taken, run)))
    made = 0
    with progress(lambda: f"creating users: {made:,} of {count:,}") as tell:
        while made < count:
            wanted = list(itertools.islice(names, min(batch_size, count - made)))
            if batch := make_batch(wanted, hub, record, claims):
                made += len(batch)
                yield batch
            tell()


def make_batch(wanted: list[str], hub: Hub, record: Recorder, claims: Claims) -> list[str]:
    """Create users, and return those of the wanted that this call made. Raises `CutShort` or `Stopped`.

    A 201 lists the users that it made, under whatever names the authenticator gave them. None was made by a
    409, by a request that was never sent, nor with a token that the hub refuses. After any other answer, and
    after a lost one, some of them may have been made: then the hub's list of users decides.
    """
    if hub.owner:  # a start makes and claims them
        return wanted
    claims.ask(wanted)
    reply = hub.create(wanted)
    if not reply.status and hub.session.stopping.is_set():
        raise Stopped
    record.add(reply.event("create_users", ok=(201, 409)))
    lost, session = reply.call.lost, hub.session
    created = reply.data if reply.status == 201 and isinstance(reply.data, list) else []
    renamed = [user["name"] for user in created if user["name"] not in wanted and not user.get("admin")]
    claims.settle([], renamed)

    token_refused = reply.status in (401, 403) and session.token_is_refused(hub.endpoint)
    not_done = not lost and (not reply.status or token_refused)
    unsure = lost or not (created or reply.status == 409 or not_done)
    users = list_users(hub, record) if unsure else created
    existing = {user["name"] for user in users if not user.get("admin")}
    made = [name for name in wanted if name in existing]
    claims.rivals |= not (unsure or not_done or renamed or len(made) == len(wanted))
    claims.settle(made if lost else wanted, made)
    claims.in_vain = 0 if made else claims.in_vain + 1

    if renamed:
        asked = next((name for name in wanted if name not in made), wanted[0])
        rewrites = "its authenticator rewrites names; test with --own-servers"
        raise CutShort(f"the hub calls {asked} {renamed[0]}: {rewrites}")
    new = existing - claims.known if unsure and claims.known is not None else set[str]()
    if strange := {name for name in new if USERNAME_PREFIX in name and not is_test_user(name)}:
        since = f"Since then it has {names_text(strange)}, which may be this run's"
        raise CutShort(f"the hub was asked for users: {reply}. {since}")
    if not made and reply.status not in (201, 409):
        raise HubRefused("make users", reply, hub.denial(reply))
    if claims.in_vain > 1:
        rival = "is another run with this --run name under way?"
        raise CutShort(f"two requests in a row made no user ({reply}): {rival}")
    return made


# ==== The way to a person's server: the public side, and kernels behind websockets ==========================


def trusted(session: requests.Session, url: str) -> bool | str:
    """The certificates that a session trusts: a file or folder, those of requests (True), or any (False)."""
    verify = session.merge_environment_settings(url, {}, None, None, None)["verify"]
    return True if verify is None else verify


@functools.lru_cache
def tls_context(verify: bool | str) -> ssl.SSLContext:
    """What requests would use: the authorities of a file or folder, its own, or (False) none."""
    path = verify if isinstance(verify, str) else requests.utils.DEFAULT_CA_BUNDLE_PATH
    authorities: Json = {"capath" if os.path.isdir(path) else "cafile": path}
    context = ssl.create_default_context(**authorities)
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class BrowserWire(HTTPAdapter):
    """The connections of one browser; all share their trusted certificates, which take long to read."""

    def __init__(self, verify: bool | str) -> None:
        self._verify = verify
        super().__init__(pool_maxsize=CONNECTIONS_OF_A_BROWSER)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=tls_context(self._verify), **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=tls_context(self._verify), **kwargs)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        return super().send(request, *args, **(kwargs | {"verify": self._verify is not False}))

    def cert_verify(self, conn: Any, url: str, verify: bool | str, cert: Any) -> None:
        """The context already has the certificates."""
        conn.cert_reqs = "CERT_REQUIRED" if verify else "CERT_NONE"
        conn.ca_certs = conn.ca_cert_dir = None


class Failed(Exception):
    """A step of a person has failed; `final` when trying again is no use."""

    def __init__(self, kind: Kind, text: str, final: bool = False, lasted_s: Sequence[float] = ()) -> None:
        super().__init__(text)
        self.reason, self.final = Reason(kind, text, lasted_s), final


class PublicSide:
    """The way that people take to their servers: where it begins, its traffic, and the open kernels."""

    def __init__(self, hub: Hub, plan: Plan) -> None:
        self.url = public_url(hub, plan)
        self.traffic, self.kernels = Traffic(), set[Kernel]()
        self.reached = False  # whether any visit has succeeded
        self.browser_tried = threading.Lock()  # held once somebody has tried what a browser sends
        self.warnings: list[str] = []
        self._hub, self._token = hub, plan.visit_token

    def browser(self, name: str) -> HubSession:
        """A session with this person's own connections, which tries once. Raises `Failed`.

        On 1.x its token is the user's.
        """
        token: str | None = self._token
        if self._hub.version.startswith("1.") and not self._hub.owner:
            made = self._hub.make_token(name)
            if made.status not in (200, 201) or not isinstance(made.data, dict):
                answer = made.status or made.message
                raise Failed(Kind.REFUSED, f"the hub made no token for the user ({answer})")
            token = made.data["token"]
        wire = BrowserWire(trusted(self._hub.session, self.url))
        browser = self._hub.session.clone(token=token, wire=wire)
        browser.traffic, browser.of_others, browser.retry_window_s = self.traffic, True, 0.0
        return browser

    def server_in(self, reply: Reply) -> str:
        """The URL of the server in a user model; the token goes to no other host. Raises `Failed`."""
        if (state := state_in(reply)) is ServerState.UNKNOWN:
            kind = Kind.REFUSED if reply.status else Kind.IN_FRONT if reply.front else Kind.NO_ANSWER
            raise Failed(kind, f"the hub does not say where the server is: {reply}")
        if state is not ServerState.READY:
            raise Failed(Kind.VANISHED, "the hub no longer says that the server is ready")
        path = reply.data["servers"][""].get("url") or reply.data.get("server")
        url = urllib.parse.urljoin(self.url, str(path))
        there, here = urllib.parse.urlsplit(url), urllib.parse.urlsplit(self.url)
        same_host = there.hostname == here.hostname or (there.hostname or "").endswith(f".{here.hostname}")
        if not path or not same_host or there.scheme not in (here.scheme, "https"):
            text = "the hub places the server on another host than people come to (see --public-url)"
            raise Failed(Kind.ROUTE, text, final=True)
        return url

    def close_kernels(self) -> None:
        """Break the connections to all kernels, so that all who wait for one go on at once."""
        for kernel in list(self.kernels):
            kernel.abort()


NO_ROUTE = "the proxy has no route (302 to the hub)"
NO_SERVER = "something else answers there (200 to anybody, without X-JupyterHub-Version)"


def judge_visit(reply: Reply, url: str = "", hub_version: str = "") -> None:
    """Raises `Failed` if an answer is not the page at `url`.

    A server of JupyterHub 1.x lets in nobody but its user, whatever the version of the hub. A proxy that has
    just started answers 404 until the hub has given it its routes.
    """
    if reply.status == 200:
        return
    status, version, route, refused = reply.status, reply.version, Kind.ROUTE, Kind.REFUSED
    here, there = urllib.parse.urlsplit(url), urllib.parse.urlsplit(reply.location or "")
    to_http = (here.scheme, there.scheme, there.hostname) == ("https", "http", here.hostname)
    is_old = status in (302, 403) and version.startswith("1.") and not hub_version.startswith("1.")
    image = f"the server's image has JupyterHub {version}, the hub {hub_version}"
    unknown, not_let_in = "the server does not know the token", "the server does not let the token in"
    rules = (
        (not status, route, False, f"no page: {reply.message}"),
        (is_old, refused, True, f"{image}: such a server lets in its own user only ({status})"),
        ("/hub/api/oauth2/authorize" in there.path, refused, True, f"{unknown} (302 to log in)"),
        ("/hub/" in there.path, route, False, NO_ROUTE),
        (to_http, route, True, "a redirect to http: the proxy does not pass X-Forwarded-Proto"),
        (reply.location, route, True, f"the page redirects elsewhere ({status})"),
        (status == 403, refused, True, f"{not_let_in} (403: does it have access:servers?)"),
        (status == 503, route, False, "nobody listens there (503)"),
        (True, route, status == 404 and version != "", f"the server's page was answered {status}"),
    )
    raise next(Failed(kind, text, final) for applies, kind, final, text in rules if applies)


TEXT, CLOSED = 1, 8  # opcodes of RFC 6455


def open_websocket(url: str, browser: HubSession, timeout_s: float) -> Any:
    """An open websocket of websocket-client; no redirect is followed. Raises `Failed`, or `TimeoutError`."""
    websocket = importlib.import_module("websocket")
    context = tls_context(trusted(browser, url.replace("ws", "http", 1)))
    socket = websocket.WebSocket(sslopt={"context": context}, skip_utf8_validation=True)
    usual, failure = requests.utils.default_headers(), ""
    headers = {name: value for name, value in browser.headers.items() if usual.get(name) != value}
    way: Json = {"http_no_proxy": ["*"]}  # the one of requests: websocket-client would choose its own
    if proxy := browser.proxy_for(url.replace("ws", "http", 1)):
        place = urllib.parse.urlsplit(proxy)
        way = {"http_proxy_host": place.hostname, "http_proxy_port": place.port or 80, "http_no_proxy": [""]}
        way |= {"proxy_type": place.scheme if place.scheme.startswith("socks") else "http"}
        if place.username:
            account = (place.username, place.password or "")
            way["http_proxy_auth"] = tuple(map(urllib.parse.unquote, account))
    try:
        socket.connect(url, header=headers, timeout=timeout_s, redirect_limit=0, **way)
        status = socket.handshake_response.status
    except websocket.WebSocketBadStatusException as error:
        status = error.status_code
    except (TimeoutError, websocket.WebSocketTimeoutException) as error:
        raise TimeoutError from error
    except (OSError, websocket.WebSocketException) as error:
        failure = f"the websocket could not be opened: {why(error)}"
        status = getattr(socket.handshake_response, "status", 0)  # of a redirect
    if status == 101:
        return socket
    socket.shutdown()
    hint = ": does the proxy pass upgrades?" if status == 400 else ""
    raise Failed(Kind.WEBSOCKET, f"the websocket was refused ({status}{hint})" if status else failure)


class Kernel:
    """A kernel behind its websocket, which runs one cell at a time. What goes wrong raises `Failed`."""

    def __init__(self, socket: Any, clock: Callable[[], float]) -> None:
        self._socket, self._clock = socket, clock
        self._opened_s = self._used_s = clock()
        self._timeouts = (TimeoutError, importlib.import_module("websocket").WebSocketTimeoutException)

    def run(self, code: Code, number: int, until_s: float) -> None:
        """Run a cell, the person's n-th: it has ended when the kernel has replied and is idle again.

        Raises `TimeoutError`.
        """
        request = os.urandom(16).hex()
        content = {"code": code.source, "silent": False, "store_history": False, "allow_stdin": False}
        header = {"msg_id": request, "msg_type": "execute_request", "version": "5.3"}
        header |= {"session": USERNAME_PREFIX, "username": ""}
        parts = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
        try:
            self._socket.settimeout(SEND_TIMEOUT_S)
            self._socket.send(json.dumps(parts | {"channel": "shell"}))
            self._used_s = self._clock()
        except Exception:  # of websocket-client, ssl or the socket
            raise self._lost() from None
        awaited, raised = {"execute_reply", "idle"}, ""  # in whatever order
        while awaited:
            kind, answer = self._next(until_s)
            if not kind:
                raise TimeoutError
            content = answer.get("content", {})
            if answer.get("parent_header", {}).get("msg_id") == request:
                awaited.discard(content.get("execution_state", "") if kind == "status" else kind)
                if content.get("status", "ok") != "ok" or kind == "error":
                    raised = str(content.get("ename") or content.get("status"))
                    raised += f": {value[:80]}" if (value := str(content.get("evalue") or "")) else ""
        if raised and not code.may_raise:
            raise Failed(Kind.CELL, f"cell {number} raised {raised}")

    def listen(self, until_s: float) -> None:
        """Keep the connection until then: answer pings, and notice the end of the kernel."""
        while self._next(until_s)[0]:
            pass

    def close(self) -> None:
        """Close the connection; the kernel stays."""
        for end in (self._socket.send_close, self._socket.shutdown):
            with contextlib.suppress(Exception):  # the other side may be gone
                end()

    def abort(self) -> None:
        """Break the connection, so that all who wait for the kernel go on at once."""
        with contextlib.suppress(Exception):  # it may be closed already
            self._socket.abort()

    def _next(self, until_s: float) -> tuple[str, Json]:
        """The type of the next message, which is "" if none has come until then, and the message."""
        while (left_s := until_s - self._clock()) > 0:
            try:
                self._socket.settimeout(left_s)
                opcode, data = self._socket.recv_data(control_frame=True)
                message = json.loads(data) if opcode == TEXT else {}
                kind = str(message.get("msg_type") or message.get("header", {}).get("msg_type") or "")
                state = message.get("content", {}).get("execution_state")
            except self._timeouts:
                continue
            except Exception:  # of websocket-client, ssl, the socket, or a frame that is no message
                raise self._lost() from None
            if opcode == CLOSED:
                raise self._lost()
            self._used_s = self._clock()
            if kind == "status" and state in ("restarting", "autorestarting", "dead"):
                raise Failed(Kind.KERNEL, "the kernel died")
            if kind == "shutdown_reply":
                raise Failed(Kind.CELL, "somebody shut the kernel down")
            if kind:
                return kind, message
        return "", {}

    def _lost(self) -> Failed:
        lasted_s = [self._clock() - since_s for since_s in (self._opened_s, self._used_s)]
        return Failed(Kind.WEBSOCKET, "the connection was lost", lasted_s=lasted_s)


# ==== Steps of a person, each a function ====================================================================
#
# A person is a thread, or under Locust a greenlet, that runs plain, blocking steps.


class Crowd:
    """The people of a run, as far as they wait for each other; `changed` announces what they wait for.

    Until one server is ready, at most three start at the same time, and three failures end the run: a hub may
    exit after a few failed spawns in a row (Zero to JupyterHub's after five), with everybody on it. A start
    that merely takes long does not count, nor one that is throttled or gets no answer.

    Each start that ends frees a place on the hub, and the throttled start that was due first takes it:
    sleeping for the whole of the hub's Retry-After (30 to 60 s) would leave the place empty.

    People without a stay of their own leave when the last of all has settled, and the hold is over.
    """

    def __init__(self, session: HubSession, plan: Plan) -> None:
        self.changed, self._session, self._plan = threading.Condition(), session, plan
        self.starting: dict[str, Visitor] = {}
        self.one_is_ready, self._failures, self._failed_in_a_row = False, list[str](), 0
        self.throttled: list[float] = []  # when the starts that wait for a place were due
        self.freed = self._taken = 0
        self.leave_s, self.leave_known = math.inf, threading.Event()  # the moment to leave
        self._settled, self._expected = set[str](), math.inf

    @property
    def has_place(self) -> bool:
        """Whether one more may start in the closed model."""
        limit, first = self._plan.batch_size, FIRST_STARTS - len(self._failures)
        return len(self.starting) < (limit if self.one_is_ready else min(limit, first))

    @property
    def nothing_starts(self) -> str:
        """What to say when three starts have failed before anything was ready; else ""."""
        failed = not self.one_is_ready and len(self._failures) >= FIRST_STARTS
        return f"nothing started: the first three starts failed: {self._failures[0]}" if failed else ""

    def check(self) -> None:
        """Raises `CutShort` when nothing starts; in a search, those who are starting may be all that fit."""
        if (reason := self.nothing_starts) and not self._plan.find_capacity:
            raise CutShort(reason)

    def start_ended(self, name: str, failure: Reason | None) -> None:
        """How a start ended. Raises `CutShort` when nobody else is to start."""
        kind = failure.kind if failure else None
        with self.changed:
            self.one_is_ready |= failure is None
            if failure and kind in (Kind.SPAWN, Kind.REFUSED):
                self._failures.append(failure.text)
            self.freed += kind not in (Kind.THROTTLED, Kind.SERVER_LIMIT)
            self.changed.notify_all()
        self._session.pause(HEAD_START_S if self.throttled else 0.0)
        with self.changed:
            self.starting.pop(name, None)
            self.changed.notify_all()
        self.check()

    def count(self, failed: bool) -> None:
        """Count a person who has failed, or has what they came for."""
        with self.changed:
            if not self.failed_too_often:
                self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0

    @property
    def failed_too_often(self) -> bool:
        """Whether as many people have failed in a row as --fail-fast allows, for good; or nothing starts."""
        return bool(self.nothing_starts) or 0 < self._plan.fail_fast <= self._failed_in_a_row

    def wait_for_place(self, due_s: float, freed_before: int, until_s: float) -> None:
        """Wait for a place, freed after `freed_before`, for which no earlier start waits; else `until_s`."""
        session = self._session
        with self.changed:
            self._taken = max(self._taken, freed_before)
            self.throttled.append(due_s)
            try:
                while (left_s := until_s - session.clock()) > 0 and not session.stopping.is_set():
                    if self.freed > self._taken and due_s == min(self.throttled):
                        self._taken += 1
                        break
                    self.changed.wait(min(left_s, 0.2))
            finally:  # also when the waiting thread is killed, as Locust does to its users
                self.throttled.remove(due_s)

    def settle(self, name: str = "", expected: float | None = None) -> None:
        """This person has done what the others wait for, or has left; or `expected` people are to do so."""
        hold_s = self._plan.hold_s
        with self.changed:
            self._expected = self._expected if expected is None else expected
            self._settled |= {name} if name else set()
            if len(self._settled) >= self._expected and not self.leave_known.is_set():
                if hold_s and self._expected:
                    LOG.info("Holding the servers for %g s", hold_s)
                self.leave_s = self._session.clock() + hold_s
                self.leave_known.set()


@dataclasses.dataclass
class Site:
    """What the people of one run share."""

    hub: Hub
    plan: Plan
    record: Recorder
    states: dict[str, ServerState] = dataclasses.field(default_factory=dict)  # each user's, as far as known
    claims: Claims = dataclasses.field(default_factory=Claims)
    interrupted: set[str] = dataclasses.field(default_factory=set)  # whose server was stopped while starting
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)  # the hub's last to remove each user

    def __post_init__(self) -> None:
        self.public = PublicSide(self.hub, self.plan)
        self.crowd = Crowd(self.hub.session, self.plan)


class Visitor:
    """A person with a user of their own, who is due at a moment, and acts by a plan."""

    browser: HubSession  # is there once they have a `url`
    kernel: Kernel  # is there once they have a `kernel_url`

    def __init__(self, name: str, due_s: float, plan: Plan, site: Site) -> None:
        self.name, self.due_s, self.plan, self.site = name, due_s, plan, site
        self.since_s = self.works_s = 0.0  # when their last step ended, and when they got to work
        self.url = self.kernel_url = ""
        self.said: list[tuple[float, Json]] = []  # while their server was starting
        self.clock = site.hub.session.clock

    @contextlib.contextmanager
    def step(self, name: str, due_s: float | None = None) -> Iterator[Event]:
        """Time a step and record it. Raise `Failed` inside to fail it; a stop records nothing.

        A `TimeoutError` is that of a cell, or of its kernel.
        """
        now_s = self.clock()
        event = Event(name, self.name, now_s if due_s is None else due_s, now_s)
        try:
            yield event
        except (Failed, TimeoutError) as error:
            timed_out = f"no result after {duration_text(self.plan.cell_timeout_s)}"
            failure = error if isinstance(error, Failed) else Failed(Kind.CELL, timed_out)
            text = without_name(failure.reason.text, self.name)
            event.reason = failure.reason = dataclasses.replace(failure.reason, text=text)
            self.record(event)
            raise failure from None
        self.record(event)

    def record(self, event: Event) -> None:
        """Record a step, which ends now unless it has ended. Raises `Stopped` if it was we who ended it."""
        if self.site.hub.session.stopping.is_set():
            raise Stopped
        event.ended_s, event.group = event.ended_s or self.clock(), self.plan.group
        self.since_s = event.ended_s
        self.site.record.add(event)

    def sleep(self, seconds: float) -> None:
        """Wait; raises `Stopped` when told to stop meanwhile."""
        if not self.site.hub.session.pause(min(seconds, threading.TIMEOUT_MAX)):
            raise Stopped

    @property
    def leaves_s(self) -> float:
        """When they leave: at the end of their own stay, or when all do."""
        return self.works_s + self.plan.stay_s if self.plan.stay_s else self.site.crowd.leave_s

    def go_home(self) -> None:
        """Close what they have open."""
        if not self.site.hub.session.stopping.is_set():  # else `still_waiting` tells of it
            self.site.crowd.starting.pop(self.name, None)
        self.site.crowd.settle(self.name)
        if self.kernel_url:
            self.site.public.kernels.discard(self.kernel)
            self.kernel.close()
        if self.url:
            self.browser.close()


def come(person: Visitor) -> None:
    """Ask for a server, as often as the hub throttles, and follow it until it is ready or has failed.

    Records `start_server`, unless no answer came, and `server_ready`. Raises `Failed` or `CutShort`.
    """
    site, name, crowd, failure = person.site, person.name, person.site.crowd, None
    crowd.check()
    site.states[name] = ServerState.STARTING  # from now on something may be running
    try:
        with person.step("server_ready", person.due_s) as event:
            reply = ask_for_server(person, event)
            try:
                event.ended_s = await_answered(person, reply)
            finally:
                event.message = last_word(person.said)
                ended_s = event.ended_s or person.clock()
                event.phases = phases_of(person.said, event.asked_s or person.due_s, ended_s)
            site.states[name] = ServerState.READY
            event.message = longest_wait(person.said, event.phases, event.ended_s)
    except Failed as error:
        failure = error
        if failure.reason.kind is Kind.TIMED_OUT:  # one that the hub gives up would count towards its exit
            ask_to_stop(person)
        if failure.reason.kind in (Kind.SPAWN, Kind.VANISHED, Kind.THROTTLED, Kind.SERVER_LIMIT):
            site.states[name] = ServerState.STOPPED
    crowd.start_ended(name, failure.reason if failure else None)
    if failure:
        raise failure


def ask_for_server(person: Visitor, event: Event) -> Reply:
    """The hub's answer other than 429, or its last 429; a named server of one's own is claimed.

    Records `start_server`, unless no answer came. Raises `CutShort` when the hub allows no more servers.
    """
    site, name, hub, session = person.site, person.name, person.site.hub, person.site.hub.session
    until_s, backoff_s = person.due_s + person.plan.server_timeout_s, 0.0
    if hub.owner:
        site.claims.ask([name])
    while True:
        freed, event.asked_s = site.crowd.freed, session.clock()
        reply = hub.start(name, person.plan.profile, until_s)
        backoff_s += reply.call.backoff_s
        if reply.status == 429:
            event.throttled += 1
            event.throttled_s = event.throttled_s or reply.answered_s
            pause_s = reply.retry_after_s or THROTTLE_PAUSE_S
            site.crowd.wait_for_place(person.due_s, freed, min(until_s, reply.answered_s + pause_s))
            backoff_s += session.clock() - reply.answered_s
        if reply.status != 429 or session.clock() >= until_s or session.stopping.is_set():
            break
    event.tries = event.throttled + 1
    limit = named_server_limit(reply) if hub.owner else None
    if limit is not None:
        site.claims.settle([name], [])
        raise CutShort(too_many(limit, site.plan.count))
    if hub.owner and reply.status in (201, 202, 429):
        site.claims.settle([name], [name])
    if reply.seen_status:
        asked = reply.event("start_server", name, ok=(201, 202))
        asked.due_s, asked.sent_s, asked.backoff_s = event.due_s, event.sent_s, backoff_s
        asked.tries, asked.throttled = event.throttled + reply.call.tries, event.throttled
        person.record(asked)
    return reply


def too_many(limit: int, count: int) -> str:
    """Why that many named servers cannot be started, and what to do."""
    if not limit:
        return "the hub allows no named servers (allow_named_servers is off), and --own-servers needs them"
    wanted = f", and this run is to start {count}" if count else ""
    return (
        f"the hub allows each user {counted(limit, 'named server')}, your others included{wanted}: start "
        "fewer, remove some of yours, or have an admin raise named_server_limit_per_user"
    )


def await_answered(person: Visitor, reply: Reply) -> float:
    """When the server was ready whose start the hub answered with `reply`. Raises `Failed`."""
    hub, waited = person.site.hub, f"after {duration_text(person.plan.server_timeout_s)}"
    if reply.status == 201:
        return reply.answered_s
    if reply.status == 429:
        kind = Kind.SERVER_LIMIT if reply.message.startswith("Active user limit") else Kind.THROTTLED
        raise Failed(kind, f"still throttled {waited}: {reply.message.partition('.')[0] or 429}")
    if reply.status == 404:
        raise Failed(Kind.VANISHED, "the hub no longer knows the user: it may have restarted")
    if denial := hub.denial(reply):
        raise Failed(Kind.REFUSED, f"the hub {denial}")
    try:
        return await_ready(person.name, hub, person.due_s + person.plan.server_timeout_s, person.said)
    except Failed as failure:
        waiting = last_word(person.said)
        if failure.reason.kind is Kind.SPAWN:
            raise
        if reply.front:
            raise Failed(Kind.IN_FRONT, reply.message) from None
        if reply.status not in (0, 202):
            raise Failed(Kind.REFUSED, f"the hub answered the start with {reply}") from None
        if not reply.status and reply.message != TIMED_OUT:
            raise Failed(Kind.NO_ANSWER, f"no answer to the start: {reply}") from None
        if failure.reason.kind is Kind.VANISHED:
            raise
        said = f"; the hub said: {waiting}" if waiting else ""
        raise Failed(Kind.TIMED_OUT, f"not ready {waited}{said}") from None


def await_ready(name: str, hub: Hub, until_s: float, said: list[tuple[float, Json]]) -> float:
    """When a server that is starting was ready. Raises `Failed`, with `Kind.TIMED_OUT` at `until_s`.

    The progress stream ends with an event `ready` or `failed`; its other events go to `said`. Where there is
    no stream, the user model is read, which gives no reason.
    """
    session = hub.session
    began_s, pause_s, stopped = session.clock(), 0.1, False
    while session.clock() < until_s and not session.stopping.is_set():
        ended_s, end = until_s, Json()
        for event in hub.progress(name, until_s):  # to its end, so that its connection can be used again
            if not end and (event.get("ready") or event.get("failed")):
                ended_s, end = session.clock(), event
            elif not end and event.get("message") and event.get("progress") != 0:  # 0: "Server requested"
                said.append((session.clock(), event))
        if end.get("ready"):
            return ended_s
        if end:
            raise Failed(Kind.SPAWN, spawn_failure(str(end.get("message") or ""), said, ended_s - began_s))
        state = hub.state(name, observer=True, until_s=until_s)
        if state is ServerState.READY:
            return session.clock()
        if state is ServerState.GONE or (stopped and state is ServerState.STOPPED):
            raise Failed(Kind.VANISHED, "it vanished while starting")
        stopped = state is ServerState.STOPPED  # the hub may give the reason a moment later
        session.pause(min(pause_s, until_s - session.clock()))
        pause_s = min(pause_s * 1.2, 1.0)
    raise Failed(Kind.TIMED_OUT, "not ready in time")


def still_waiting(starting: Iterable[Visitor]) -> Iterator[str]:
    """What servers that were starting when a run was interrupted waited for."""
    words = (without_name(last_word(person.said), person.name) for person in starting)
    waits = collections.Counter(word or "the hub said nothing of it" for word in words)
    for word, number in waits.most_common(3):
        servers = counted(number, "server was", "servers were")
        yield f"{servers} still starting when the run was interrupted: {word}"


def visit(person: Visitor) -> None:
    """Open the start page of the server, tried again until it comes or time is up. Raises `CutShort` too."""
    public = person.site.public
    with person.step("visit", person.since_s) as event:
        get_in(person, event, person.since_s + person.plan.visit_timeout_s)
    if public.browser_tried.acquire(blocking=False):
        refused = why_browsers_are_refused(person.url, person.browser)
        if refused and any(group.work for group in person.site.plan.groups):
            raise CutShort(refused)
        public.warnings += [refused] if refused else []


def get_in(person: Visitor, event: Event, until_s: float) -> None:
    """Try the start page until it comes; raises `Failed` when nothing else can come, or time is up.

    A last try that had no time for an answer says less than the one before it.
    """
    site, pause_s, first_s, before = person.site, 0.1, person.clock(), None
    for event.tries in itertools.count(1):
        tried_s = person.clock()
        try:
            event.ended_s = open_page(person, event, until_s).answered_s
            site.public.reached = True
            return
        except Failed as failure:
            late = person.clock() + pause_s >= until_s
            nobody_came = not site.public.reached and (late or person.clock() > first_s + FIRST_VISIT_S)
            no_route = failure.reason.text == NO_ROUTE
            if no_route and nobody_came and site.hub.state(person.name) is ServerState.READY:
                raise CutShort(
                    f"the hub itself answers at {person.url}, where a server is ready. Is the endpoint "
                    "the hub's own port? Then name where people reach the hub with --public-url. Or has the "
                    "proxy no route to the server?"
                ) from None
            if failure.final or late:
                cut = TIMED_OUT in failure.reason.text and person.clock() < tried_s + UNANSWERED_S
                raise (before if before and cut else failure) from None
            before = failure
        person.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 1.0)


def open_page(person: Visitor, event: Event, until_s: float) -> Reply:
    """The start page; raises `Failed`. Redirects below the server's URL are followed, others are answers."""
    hub, public = person.site.hub, person.site.public
    if not person.url:
        url = public.server_in(hub.read(person.name, until_s=until_s))
        person.browser, person.url = public.browser(person.name), url
    url = person.url
    for _ in range(REDIRECTS_MAX):
        left_s = max(1.0, min(DEFAULT_TIMEOUT, until_s - person.clock()))
        reply = person.browser.ask("GET", url, call=Call(tries=int(event.tries > 1)), timeout=left_s)
        target = urllib.parse.urljoin(url, reply.location or "")
        if not reply.location or not target.startswith(person.url):
            break
        url = target
    event.message = reply.message if isinstance(reply.data, dict) else ""
    judge_visit(reply, url, hub.version)
    anonymous = {"Authorization": None}
    if not reply.version and person.browser.ask("GET", url, headers=anonymous).status == 200:
        raise Failed(Kind.ROUTE, NO_SERVER, final=True)
    return reply


def why_browsers_are_refused(url: str, browser: HubSession) -> str:
    """Why a server refuses what browsers send, though it takes the same with a token; "" when it does not.

    A server answers 404 if the Origin of a browser's request is not the Host that it sees, unless the site
    allows that origin. With a token it does not check that, so only browsers notice a proxy that loses the
    Host header.
    """
    place = urllib.parse.urlsplit(url)
    origin = f"{place.scheme}://{place.netloc.rpartition('@')[2]}".lower()
    origin = origin.removesuffix({"http": ":80", "https": ":443"}[place.scheme])

    def status(**headers: str) -> int:
        anonymous = headers | {"Authorization": None}
        return browser.ask("GET", f"{url}api/status", call=Call(observer=True), headers=anonymous).status

    if status(Origin=origin) != 404 or (otherwise := status()) not in (200, 403):
        return ""
    return (
        f"no browser gets a kernel: servers refuse what a page at {origin} sends (404, and {otherwise} "
        "without its Origin), since the proxy does not pass on the Host header. In nginx: proxy_set_header "
        "Host $http_host; or have the servers allow that origin (allow_origin)"
    )


def load_page(person: Visitor) -> None:
    """Fetch what a browser fetched, in its order and over as many connections, up to the first failure."""
    browser, failures = person.browser, list[tuple[str, str]]()  # each with its path

    def fetch(part: tuple[str, int]) -> None:
        """Read the body without keeping it. A failure ends the page; so does a stop."""
        path, before = part
        if failures or browser.stopping.is_set():
            return
        try:
            until_s = browser.clock() + DEFAULT_TIMEOUT
            with browser.exchange("GET", person.url + path, Call(), stream=True) as response:
                for _ in response.raw.stream(1 << 16, decode_content=False):
                    if browser.clock() > until_s:  # each piece comes in time, and there is no end of them
                        raise requests.ReadTimeout
                if response.raw.length_remaining:  # which urllib3 before 2 says nobody
                    raise ChunkedEncodingError
            status = response.status_code
            if status >= 500 or (status >= 400 > before) or (response.is_redirect and before < 300):
                failures.append((f"a part of the page was answered {status}", path))
        except (OSError, Stopped, HTTPError) as error:  # of requests, and of reading on
            broke = isinstance(error, HTTPError) and not isinstance(error, ReadTimeoutError)
            reason = why(ChunkedEncodingError() if broke else error)  # not how many bytes came
            failures.append((f"a part of the page did not come: {reason}", path))

    with person.step("page") as event:
        try:
            with ThreadPoolExecutor(CONNECTIONS_OF_A_BROWSER) as connections:
                list(connections.map(fetch, person.plan.page.parts if person.plan.page else ()))
        except RuntimeError:
            raise no_more_threads() from None
        for text, path in failures[:1]:
            event.message = path.partition("?")[0]
            raise Failed(Kind.ROUTE, text)


def start_kernel(person: Visitor) -> None:
    """Ask for a kernel, open its websocket, which waits for the kernel, and run the first cell."""
    browser, timeout_s = person.browser, person.plan.cell_timeout_s
    with person.step("kernel_ready") as event:
        until_s = event.sent_s + timeout_s
        reply = browser.ask("POST", f"{person.url}api/kernels", json={}, timeout=timeout_s)
        if reply.status != 201 or not isinstance(reply.data, dict):
            event.message = reply.message
            if reply.message == TIMED_OUT:
                raise TimeoutError
            text = f"the server did not start a kernel ({reply.status or reply.message})"
            no_jupyter = "the server is no Jupyter (404 for kernels): use --visit and --page"
            raise Failed(Kind.REFUSED, no_jupyter if reply.status == 404 else text)
        url = f"{person.url}api/kernels/{urllib.parse.quote(str(reply.data.get('id')), safe='')}"
        address = f"ws{url.removeprefix('http')}/channels"
        websocket = open_websocket(address, browser, max(0.1, until_s - person.clock()))
        person.kernel, person.kernel_url = Kernel(websocket, browser.clock), url
        person.site.public.kernels.add(person.kernel)
        person.kernel.run(cells_of(person.plan)[0], 1, until_s)


def cells_of(plan: Plan) -> Sequence[Code]:
    """The cells that a person runs, first to last."""
    return plan.notebook.parts if plan.notebook else (SIX_TIMES_SEVEN,)


def get_to_work(person: Visitor) -> None:
    """What a person waits before they can work: everything up to here."""
    person.works_s = person.since_s
    person.record(Event("at_work", person.name, person.due_s, person.due_s, person.since_s))


def work(person: Visitor) -> None:
    """Run the cells after the first one, thinking before each; then stay, connected, until it is time.

    Without a notebook a person works on until they leave, and the others do not wait for that.
    """
    plan, cells, crowd = person.plan, cells_of(person.plan), person.site.crowd
    if not plan.notebook or plan.find_capacity:
        crowd.settle(person.name)
    for number, code in enumerate(cells[1:] if plan.notebook else itertools.repeat(cells[0]), 2):
        think(person, person.clock() + plan.think_s)
        if person.clock() >= person.leaves_s:
            break
        with cell(person) as event:
            person.kernel.run(code, number, event.sent_s + plan.cell_timeout_s)
    crowd.settle(person.name)
    think(person, math.inf)
    if plan.stay_s:
        person.browser.ask("DELETE", person.kernel_url)


def think(person: Visitor, until_s: float) -> None:
    """Listen to the kernel until then, or until it is time to leave. A failure is that of a cell."""
    while (now_s := person.clock()) < (due_s := min(until_s, person.leaves_s)):
        try:
            person.kernel.listen(due_s if math.isfinite(person.leaves_s) else min(due_s, now_s + 1.0))
        except Failed as failure:
            with cell(person):
                raise failure


@contextlib.contextmanager
def cell(person: Visitor) -> Iterator[Event]:
    """The step of a cell. If its connection broke, find out whether the server has ended."""
    with person.step("cell") as event:
        try:
            yield event
        except (Failed, TimeoutError) as failure:
            if isinstance(failure, Failed) and failure.reason.kind not in (Kind.WEBSOCKET, Kind.KERNEL):
                raise
            state = person.site.hub.state(person.name)
            urls = f"{person.url}api", f"{person.site.public.url}hub/api/"
            page, front = (
                person.browser.ask("GET", url, call=Call(observer=True)).seen_status for url in urls
            )
            if state in (ServerState.STOPPED, ServerState.STOPPING, ServerState.GONE):
                cause = "the hub has stopped it, or noticed that it ended (culled, evicted, its node lost?)"
            elif state is ServerState.READY and (page, front) == (503, 200):
                cause = (
                    "nobody answers there, and the hub has not noticed (evicted, out of memory, node lost?)"
                )
            else:
                raise
            raise Failed(Kind.LOST, f"the server ended while it was in use: {cause}") from None


def stay(person: Visitor) -> None:
    """Keep the server, then check that it is there, and answers if it was visited. Raises `HubRefused`."""
    hub, crowd = person.site.hub, person.site.crowd
    person.works_s = person.works_s or person.since_s
    with person.step("stay") as event:
        event.due_s = event.sent_s = person.works_s
        crowd.settle(person.name)
        if not person.plan.stay_s:
            crowd.leave_known.wait()
        person.sleep(person.leaves_s - person.clock())
        look_until_s = person.clock() + RETRY_WINDOW_S
        while (state := state_in(reply := hub.read(person.name))) is ServerState.UNKNOWN:
            if person.clock() > look_until_s or reply.status in (401, 403):
                task = "say whether the servers that were held are still there"
                raise HubRefused(task, reply, hub.denial(reply))
            person.sleep(1.0)
        if state is not ServerState.READY:
            raise Failed(Kind.LOST, "the server stopped while it was held")
        if person.url:
            try:
                get_in(person, event, person.clock() + person.plan.visit_timeout_s)
            except Failed as failure:
                if failure.reason.kind is Kind.REFUSED:
                    raise
                text = f"it no longer answered at the end of the hold: {failure.reason.text}"
                raise Failed(Kind.LOST, text) from None


def stop(person: Visitor) -> None:
    """Stop the server, if there is one, and wait until it has stopped."""
    ask_to_stop(person)
    if (states := person.site.states).get(person.name) is ServerState.STOPPING:
        states[person.name] = await_stopped(person.name, person.site.hub)


def await_stopped(name: str, hub: Hub) -> ServerState:
    """What the hub says of a server when it has stopped, or after `SERVER_LIFECYCLE_TIMEOUT` seconds."""
    session, until_s = hub.session, hub.session.clock() + SERVER_LIFECYCLE_TIMEOUT
    while (state := hub.state(name)) not in (ServerState.STOPPED, ServerState.GONE):
        if session.clock() >= until_s or not session.pause(0.5):
            break
    return state


def ask_to_stop(person: Visitor) -> None:
    """Have the hub stop the server, if there is one.

    A start cannot be stopped on hubs before 5.1, which answer 400; then nobody knows the server's state.
    Where it can, the spawner may have begun what outlives it: a pod, a job in a queue.
    """
    site, name = person.site, person.name
    if site.states.get(name) is ServerState.STARTING:
        site.states[name] = site.hub.state(name)  # it may be ready by now
    if (state := site.states.get(name)) in (ServerState.STARTING, ServerState.READY):
        reply = site.hub.stop(name)
        site.states[name] = AFTER_STOP.get(reply.status, ServerState.UNKNOWN)
        note_refusal(site, name, reply, "stop servers")
        if state is ServerState.STARTING and reply.status in (0, 202, 204):
            site.interrupted.add(name)
        person.record(reply.event("stop_server", name, ok=(202, 204, 404)))


def delete(person: Visitor) -> None:
    """Delete the user, if there is no server; else it is left to cleaning up."""
    site, name = person.site, person.name
    if site.states.get(name) is ServerState.STOPPED:
        reply = site.hub.delete(name)
        site.states[name] = AFTER_DELETE.get(reply.status, ServerState.UNKNOWN)
        note_refusal(site, name, reply, f"delete {thing(bool(site.hub.owner))}s")
        person.record(reply.event("delete_user", name, ok=(202, 204, 404)))  # 202: an own server stops first


def note_refusal(site: Site, name: str, reply: Reply, task: str) -> None:
    """Keep why a user is still there, by the hub's answer to the request that was to remove them."""
    site.refusals.pop(name, None)
    if reply.front:
        site.refusals[name] = reply.message
    elif reply.status >= 400:
        verb = "fails" if reply.status >= 500 else "refuses"
        message = f": {without_name(reply.message, name)}" if reply.message else ""
        site.refusals[name] = f"the hub {verb} to {task} ({reply.status}){message}"


# ==== The table of steps, and a person's journey through them ===============================================


Act = Callable[[Visitor], None]


@dataclasses.dataclass(frozen=True)
class Step:
    """What is measured under a name: in results, conditions, tables and Locust."""

    name: str
    title: str
    act: Act | None = None  # what a person does; None: it is measured elsewhere
    by: str = ""  # fields of the plan: with any of them a person takes it; "": always
    always: bool = False  # also after an earlier step has failed
    waits_for: str = ""  # what a person waits for meanwhile
    did: str = ""  # what somebody who has taken it did
    meaning: str = ""

    def wanted(self, plan: Plan) -> bool:
        """Whether people take it by this plan."""
        return not self.by or any(getattr(plan, name) for name in self.by.split())


# fmt: off
STEPS = {
    step.name: step
    for step in (
        Step("server_ready", "server ready", come, waits_for="the server", did="started a server",
            meaning="from the moment a start was due until the hub said that the server was ready"),
        Step("start_server", "start request",
            meaning="from requesting a server until the hub accepted the start, without throttling"),
        Step("visit", "visit", visit, OPENING, waits_for="the start page", did="opened its page",
            meaning="from ready until the server's start page was loaded"),
        Step("page", "page", load_page, "page", waits_for="the rest of it",
            meaning="from the first request of a recorded page to its last answer"),
        Step("kernel_ready", "kernel ready", start_kernel, "work", waits_for="the kernel",
            did="started a kernel", meaning="from requesting a kernel until the first cell had its result"),
        Step("at_work", "at work", get_to_work, f"{OPENING} event group",
            meaning="from the moment a person was due until they could work"),
        Step("cell", "cell", work, "work", did="ran cells",
            meaning="from sending a later cell until its result"),
        Step("stay", "stay", stay, "hold_s stay_s", did="stayed", meaning="how long the server was held"),
        Step("stop_server", "stop request", stop, "stay_s", always=True,
            meaning="from requesting the stop of a server until the hub accepted it"),
        Step("create_users", "create users", meaning="from sending the names of a batch until they existed"),
        Step("delete_user", "delete user", delete, "stay_s", always=True,
            meaning="from sending the request until its answer"),
        Step("list_users", "list users",
            meaning="from sending the request for a page of users until it came"),
        Step("activity", "activity report", meaning="what a running server sends the hub, one every 300 s"),
        Step("read", "read user"),
        Step("list", "list page"),
        Step("ping", "ping",
            meaning="reading one user, five times a second: what everybody else on the hub feels"),
    )
}
# fmt: on
PERSONAL = tuple(step.name for step in STEPS.values() if step.act and not step.always)
SCOPES = {  # that the token needs for a command
    STRESS: {"admin:users", "list:users", "delete:users", "servers", "read:servers", "delete:servers"},
    ACTIVITY: {"admin:users", "list:users", "delete:users", "read:servers", "users:activity"},
    PURGE: {"list:users", "delete:users", "read:servers", "delete:servers"},
}


def needed_scopes(command: str, own_servers: bool = False) -> set[str]:
    """The scopes that a token needs for a command; for one's own servers, only those about servers."""
    return {scope for scope in SCOPES[command] if scope.endswith("servers") or not own_servers}


def new_recorder(*listeners: Callable[[Event], None]) -> Recorder:
    """A recorder that keeps each person's steps."""
    return Recorder(*listeners, people_steps={step.name for step in STEPS.values() if step.act})


def title_of(name: str, own_servers: bool = False) -> str:
    """An operation's title, with its group if it has one; an operator's own operation has its name."""
    step, bracket, group = name.partition("[")
    title = STEPS[step].title + f" {bracket}{group}".rstrip() if step in STEPS else name
    return title.replace("user", "server") if own_servers else title


def journey(person: Visitor) -> None:
    """Take a person through the steps of their plan up to the first that fails; leaving always follows.

    A stop ends it without a record: it was we who cut the step short. Raises `Stopped` or `CutShort`.
    """
    failed = False
    try:
        for step in STEPS.values():
            if step.act and step.wanted(person.plan) and (step.always or not failed):
                failed |= not take(step.name, step.act, person)
                if step.name == person.site.plan.goal or (failed and not step.always):
                    person.site.crowd.count(failed)
    finally:
        person.go_home()


def take(name: str, act: Act, person: Visitor) -> bool:
    """Take one step; whether it succeeded. An unexpected error is a failure of this person."""
    began_s = person.clock()
    try:
        act(person)
        return True
    except Failed:
        return False
    except (HubStressError, Stopped):
        raise
    except Exception as error:
        LOG.exception("The step %s failed for %s", name, person.name)
        reason = Reason(Kind.RAISED, f"{type(error).__name__}: {error}")
        person.record(Event(name, person.name, person.due_s, began_s, reason=reason))
        return False


def send_people(names: Sequence[str], site: Site, on_tick: Callable[[], None] = lambda: None) -> None:
    """Send people through their journeys, and wait for all of them. Raises `CutShort`.

    They start when they are due (open model), or while fewer than the plan's batch size are starting (closed
    model).
    """
    plan, session, crowd, begun = site.plan, site.hub.session, site.crowd, 0
    began_s = session.clock()

    def goes_on(due_s: float) -> bool:
        may_start = session.clock() >= due_s if plan.is_open else crowd.has_place
        return may_start or crowd.failed_too_often

    try:
        with Team(session, on_tick, crowd.changed) as team:
            for name, (after_s, group) in zip(names, arrivals(plan)):
                due_s = began_s + after_s if plan.is_open else math.inf  # else when there is a place
                if not team.wait_for(functools.partial(goes_on, due_s), due_s) or crowd.failed_too_often:
                    break
                person = Visitor(name, min(due_s, session.clock()), group, site)
                crowd.starting[name] = person
                begun += 1
                team.start(journey, person)
            crowd.settle(expected=begun)
    finally:
        crowd.leave_known.set()  # those who wait for it when a run ends early go on


def arrivals(plan: Plan) -> list[tuple[float, Plan]]:
    """Who arrives: when, in seconds since the beginning (0 in the closed model), and by which plan.

    The same seed gives the same moments, each group its own. Uniform ones are what a Poisson process looks
    like once one knows how many came.
    """
    people = []
    for group in plan.groups:
        draw = random.Random(f"{plan.seed} {group.group}" if group.group else plan.seed)
        schedule, within_s = Schedule.of(group.rate_per_s), group.within_s or 0.0
        for n in range(group.count):
            at_s = schedule.due_s(n) if schedule else within_s * draw.random()
            people.append((group.after_s + at_s, group))
    return sorted(people, key=lambda person: person[0])


USUAL_START_S = 10.0  # assumed of servers: a plan does not know how long a hub's servers take
Presence = tuple[float, float, Plan]  # arrival and departure, in seconds since the first start; group


def timetable(plan: Plan, at_worst: bool = False) -> list[Presence]:
    """When each person is there, if servers start in `USUAL_START_S` and all else takes no time.

    At worst, every step takes as long as its time-out allows.
    """
    people, first = [], min(plan.batch_size, FIRST_STARTS)  # as many start until one server is ready
    for n, (due_s, group) in enumerate(arrivals(plan)):
        start_s = group.server_timeout_s if at_worst else min(USUAL_START_S, group.server_timeout_s)
        rounds = n // first if at_worst or n < first else 1 + (n - first) // plan.batch_size
        arrives_s = due_s if plan.is_open else rounds * start_s
        parts = len(group.page.parts) if group.page else 0
        parts_s = at_worst * DEFAULT_TIMEOUT * math.ceil(parts / CONNECTIONS_OF_A_BROWSER)
        look_s = at_worst * (group.opens * group.visit_timeout_s + group.work * group.cell_timeout_s)
        works_s = arrives_s + start_s + look_s + parts_s
        later = len(cells_of(group)) - 1 if group.work and not group.find_capacity else 0
        cells_s = later * (group.think_s + at_worst * group.cell_timeout_s)
        cells_s = min(cells_s, group.stay_s or math.inf)
        last_look_s = look_s if STEPS["stay"].wanted(group) else 0.0
        people.append((arrives_s, works_s, works_s + cells_s, last_look_s, group))
    all_leave_s = plan.hold_s + max(done_s for _, _, done_s, _, _ in people)
    return [
        (arrives_s, look_s + (works_s + group.stay_s if group.stay_s else all_leave_s), group)
        for arrives_s, works_s, _, look_s, group in people
    ]


def most_at_one_time(people: Sequence[Presence]) -> int:
    """How many of these people are there at one time, at most."""
    changes = [(arrives_s, 1) for arrives_s, _, _ in people] + [(leaves_s, -1) for _, leaves_s, _ in people]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def at_one_time(people: Sequence[Presence], noun: str) -> str:
    """The most of something that these people have at one time; about, where that depends on starts."""
    about = "about " if any(group.stay_s for _, _, group in people) else ""
    return f"{about}{counted(most_at_one_time(people), noun)}" if people else f"no {noun}s"


def costs_and_risks(plan: Plan) -> Iterator[str]:
    """What starting these servers costs at most, and what the hub risks."""
    most = most_at_one_time(timetable(plan, at_worst=True)) if plan.is_open else plan.count
    servers = f"At most {counted(plan.max_servers or most, 'server')} at one time"
    if plan.find_capacity and not plan.max_servers:
        servers = "As many servers as a step has people (--max-servers bounds that)"
    yield f"{servers}, each with a volume where the hub gives one (Zero to JupyterHub: 10 GiB)"
    by_the_clock = plan.is_open or plan.find_capacity
    if by_the_clock and plan.batch_size != Plan.batch_size:
        yield "--batch-size does not limit starts here: people arrive when they are due"
    advice = f"give {'--fail-fast 4' if by_the_clock else '--batch-size 4 --fail-fast'}"
    if plan.fail_fast and by_the_clock:
        advice = "--fail-fast ends no starts that are under way when it sees a failure"
    if plan.count > 4 and not plan.own_servers and (by_the_clock or not plan.fail_fast):
        yield f"A hub may exit after five failed starts in a row (Zero to JupyterHub does): {advice}"


# ==== The hub: checks before a run ==========================================================================


def check_hub(plan: Plan, session: HubSession) -> Hub:
    """The plan's hub, if it shows its version and accepts the tokens for what is planned; else `SetupError`.

    `GET /` (200 with `version`, without a token), then `GET /user` (200; 403 for a bad token).
    """
    endpoint, own_servers = plan.endpoint or "", plan.own_servers
    reply, version = _probe(endpoint, session)
    if not version:
        raise SetupError(_no_hub(endpoint, reply, session))
    hub = Hub(endpoint, session, version)
    own_token = f"one that you make at {endpoint.removesuffix('/api')}/token"
    owner = _owner_of_token(hub, own_token if own_servers else "the token of the hub-stress-test service")
    _check_owner(owner, plan.command, own_servers, own_token)
    hub = OwnServers(endpoint, session, version, owner["name"]) if own_servers else hub
    url = public_url(hub, plan)
    if plan.check_proxy and (proxy := session.proxy_to(url)):  # which its websockets bypass
        raise SetupError(
            f"--check-proxy cannot be done from here, where {url} is reached through {proxy}: "
            f"{without_proxy(url)}. Nothing was changed."
        )
    check_visits(hub, plan)
    return hub


def _probe(endpoint: str, session: HubSession) -> tuple[Reply, str]:
    """What `GET /` answers, and the hub's version in it. Sent without the token, which only a hub may see."""
    reply = session.ask("GET", f"{endpoint}/", call=Call(once=True), headers={"Authorization": None})
    return reply, str(reply.data.get("version") or "") if isinstance(reply.data, dict) else ""


def _no_hub(endpoint: str, reply: Reply, session: HubSession) -> str:
    """What answers in place of a hub, and what to do."""
    proxy = session.proxy_to(endpoint)
    where = f"{endpoint}, through {proxy}" if proxy else endpoint
    remedy = next(remedy for symptom, remedy in _remedies(endpoint, reply, session) if symptom)
    if reply.message.startswith(NOT_ACCEPTED):
        return f"The certificate at {where} is not trusted: {reply.message}. {remedy}"
    if not reply.seen_status:
        return f"Nothing answers at {where}: {reply.message}. {remedy}"
    answers = reply.message if reply.front else f"it answers {reply}"
    if reply.status == 200 and not reply.message:
        answers = "it answers JSON without a version"
    if reply.location:
        answers = f"it answers {reply.seen_status} and redirects to {without_credentials(reply.location)}"
    return f"No hub API at {where}: {answers}. {remedy}{f'; {without_proxy(endpoint)}' if proxy else ''}"


def _remedies(endpoint: str, reply: Reply, session: HubSession) -> Iterator[tuple[object, str]]:
    """Symptoms of an endpoint without a hub, each with its remedy; the first that is true counts."""
    reason, silent, plain = reply.message, not reply.seen_status, endpoint.startswith("http:")
    https, host = f"https:{endpoint.removeprefix('http:')}", urllib.parse.urlsplit(endpoint).hostname or ""
    to_https = plain and (reply.location or "").startswith("https:")
    with_path = (https if to_https else endpoint).removesuffix("/hub/api").removesuffix("/hub") + "/hub/api"

    def is_hub(url: str) -> bool:
        other, version = _probe(url, session)
        return bool(version) or other.message.startswith(NOT_ACCEPTED)

    yield (
        reason.startswith(NOT_ACCEPTED),
        "If an authority of your own has signed it, name the file with its certificate in "
        "REQUESTS_CA_BUNDLE. Of a hub with internal_ssl use the public URL.",
    )
    yield (  # alerts of TLS 1.3 and 1.2; both get lost when the server closes the connection at once
        silent and re.search("certificate required|handshake failure|eof occurred", reason),
        "At its own port, a hub with internal_ssl lets in only those with a certificate: use its public URL.",
    )
    yield silent and session.proxy_to(endpoint), f"Is the proxy right? Else {without_proxy(endpoint)}."
    yield (
        reason == NO_SUCH_HOST and "." not in host,
        "This name exists only inside the cluster: from outside, use the hub's public URL.",
    )
    yield to_https, f"Use https: --endpoint {with_path}"
    yield plain and (silent or reply.status == 400) and is_hub(https), f"Use https: --endpoint {https}"
    yield silent, "Is the hub running, and is this its URL?"
    yield with_path != endpoint and is_hub(with_path), f"The hub's API is at --endpoint {with_path}"
    yield reply.seen_status in (401, 403, 407), "If a proxy demands a header: --header 'Name: value'"
    yield True, "An endpoint ends in /hub/api, like https://hub.example.org/hub/api"


def _owner_of_token(hub: Hub, right: str, variable: str = "JUPYTERHUB_API_TOKEN") -> Json:
    """Whose token it is, by `GET /user`. Raises `SetupError`, naming the right token and its variable."""
    reply = hub.session.ask("GET", f"{hub.endpoint}/user", call=Call(once=True))
    if reply.status in (401, 403):
        reason = f"it is wrong, has expired, or belongs to another hub. Put {right} into {variable}."
        if len(hub.session.token) == 64 and hub.version in ("5.5.3", "6.1.0"):
            reason = f"JupyterHub {hub.version} takes none of 64 characters. Make a shorter one, or upgrade."
        answered = f"refuses the token (GET /user answered {reply.status})"
        raise SetupError(f"The hub at {hub.endpoint} {answered}: {reason}")
    if reply.status != 200 or not isinstance(reply.data, dict):
        raise SetupError(f"The hub at {hub.endpoint} could not say whose token this is: GET /user: {reply}.")
    return reply.data


def _check_owner(owner: Json, command: str, own_servers: bool, own_token: str) -> None:
    """Raise `SetupError` if the owner of a token may not do with it what a command needs.

    Hubs from 2.0 list its scopes. Before that its owner has to be an admin, but may do all with own servers.
    """
    name, scopes = str(owner.get("name")), owner.get("scopes")
    needed = needed_scopes(command, own_servers)
    missing = [] if scopes is None else missing_scopes(scopes, needed, name if own_servers else "")
    not_admin = "If you are not an admin, test with servers of your own: --own-servers."
    otherwise = "" if command == ACTIVITY else f" {not_admin}"
    if own_servers and owner.get("kind") == "service":
        raise SetupError(
            f"The token belongs to the service {name}, which has no servers of its own: put {own_token} into "
            "JUPYTERHUB_API_TOKEN."
        )
    if own_servers and missing:
        own_missing = ", ".join(f"{scope}!user={name}" for scope in missing)
        raise SetupError(
            f"The token lacks what {command} --own-servers needs: {own_missing}. Put {own_token}, without "
            "restrictions, into JUPYTERHUB_API_TOKEN."
        )
    if missing:
        raise SetupError(
            f"The token lacks what {command} needs: {', '.join(missing)}.{otherwise} As an admin, put this "
            "into the hub's configuration, beside the service that owns the token, and restart the hub:\n\n"
            f"{ROLE_TO_PASTE}"
        )
    if not own_servers and scopes is None and not owner.get("admin"):
        needs = f"The token's owner, {name}, is not an admin of this hub; only admins can make users."
        raise SetupError(needs + otherwise)


def check_visits(hub: Hub, plan: Plan) -> None:
    """Raise `SetupError` if the token for visits may not enter servers. On 1.x nothing tells."""
    if not plan.opens or hub.version.startswith("1."):
        return
    variable = "JUPYTERHUB_VISIT_TOKEN" if plan.visit_token else "JUPYTERHUB_API_TOKEN"
    with hub.session.clone(token=plan.visit_token) as session:
        visiting = dataclasses.replace(hub, session=session)
        owner = _owner_of_token(visiting, "the token that opens servers", variable)
    if missing_scopes(owner.get("scopes", ()), {"access:servers"}, hub.owner):
        lacks = (
            f"The token{f' in {variable}' * bool(plan.visit_token)} lacks what visits need: access:servers"
        )
        if hub.owner:
            raise SetupError(f"{lacks}!user={hub.owner}.")
        raise SetupError(
            f"{lacks}. Test servers see the token that opens them: give a second service this scope alone, "
            "restart the hub, and put that service's token into JUPYTERHUB_VISIT_TOKEN.\n\n"
            f"{VISIT_ROLE_TO_PASTE}"
        )


def check_server_names(hub: Hub, plan: Plan, taken: Iterable[str]) -> None:
    """Raise `SetupError` if the hub refuses names of own servers: from 6.0 it takes 30 characters."""
    major, run = hub.version.partition(".")[0], plan.run or ""
    if not hub.owner or plan.command == PURGE or not major.isdigit() or int(major) < 6:
        return
    count = plan.count + plan.check_proxy if plan.count and not plan.find_capacity else MANY
    longest = username(first_free_index(taken, run) + count - 1, run)
    if len(longest) > SERVER_NAME_MAX or "--" in longest:
        left = SERVER_NAME_MAX - len(longest) + len(run)
        raise SetupError(
            f"A hub {hub.version} takes server names of at most {SERVER_NAME_MAX} characters without double "
            f"hyphens, unlike {longest}: --run NAME may have at most {left} characters here. Nothing was "
            "changed."
        )


# ==== Cleaning up ===========================================================================================


@dataclasses.dataclass(frozen=True)
class Users:
    """The users that a run made, removed and left; with --own-servers, the servers have these numbers."""

    created: int = 0
    deleted: int = 0
    kept: int = 0
    left_behind: Sequence[str] = ()
    in_the_way: str = ""  # why some cannot be removed; this and the next two also with --own-servers
    stopped_while_starting: int = 0  # servers, which may have left something that the hub does not know
    stops_failed: int | None = None  # servers that the hub failed to stop, by its metrics; None: unknown


def remove_users(site: Site, ours: Callable[[str], bool]) -> Users:
    """Remove users until the hub lists none that are `ours`, or nothing has moved for the plan's time-out.

    The site's states are what this program knows of each user; after every round the hub's own list corrects
    them. `UNKNOWN` users are looked for first. Nothing is done to a user for whom `ours` is not true, nor to
    an admin.
    """
    hub, session, states, timeout_s = site.hub, site.hub.session, site.states, site.plan.cleanup_timeout_s
    existing = {name for name in states if ours(name) and states[name] is not ServerState.UNKNOWN}
    left = {name for name in states if ours(name) and states[name] is not ServerState.GONE}
    pause_s, until_s, refusals = 0.2, session.clock() + timeout_s, 0
    refused = ""  # why the hub did not list its users
    stopping_s: dict[str, float] = {}  # since when the hub has been stopping a user's server
    least = (len(left) + 1, 0)  # users, and their servers

    def gone(name: str) -> bool:
        return states[name] is ServerState.GONE

    def line() -> str:
        removed, noun = sum(map(gone, existing)), thing(bool(hub.owner))
        return f"cleaning up: {removed:,} of {len(existing):,} {noun}s removed"

    with progress(line) as tell:
        while True:
            let_go(site, left, tell)
            try:
                listed = {user["name"]: user for user in list_users(hub, site.record)}
                people = [name for name, user in listed.items() if ours(name) and not user.get("admin")]
                found = {name: server_state(listed[name]) for name in people}
                # A list may lack renamed users, and those who move to another page while others are deleted.
                for name in [name for name in left - listed.keys() if not gone(name)]:
                    tell()
                    in_time = session.clock() < until_s and not session.hub_is_gone
                    found[name] = hub.state(name) if in_time else ServerState.UNKNOWN
                states |= dict.fromkeys(left, ServerState.GONE) | found
                left = {name for name in found if not gone(name)}
                existing |= left
                stopping = [name for name in left if states[name] is ServerState.STOPPING]
                stopping_s = {name: stopping_s.get(name, session.clock()) for name in stopping}
                refusals, refused, done = 0, "", not left
            except (HubRefused, Stopped) as error:
                left = {name for name in left if not gone(name)}
                if isinstance(error, HubRefused):
                    LOG.log(logging.DEBUG if refused else logging.WARNING, "Cleaning up: %s", error)
                    refused = str(error)
                    refusals += error.denied or not left
                done = refusals == 3
            running = sum(states[name] is not ServerState.STOPPED for name in left)
            if (len(left), running) < least:
                least, pause_s, until_s = (len(left), running), 0.2, session.clock() + timeout_s
            if done or session.clock() >= until_s or not session.pause(pause_s):
                named = tuple(sorted(left, key=natural))
                reason = refused or in_the_way(site, named, stopping_s)
                return Users(deleted=len(existing - left), left_behind=named, in_the_way=reason)
            pause_s = min(pause_s * 1.5, 5.0)


def in_the_way(site: Site, left: Iterable[str], stopping_s: Mapping[str, float]) -> str:
    """Why these users are still there, by what the hub said, and since when it has been stopping servers."""
    refusals = [site.refusals[name] for name in left if name in site.refusals.keys() - stopping_s]
    reasons = [reason for reason, _ in collections.Counter(refusals).most_common(2)]
    if stopping_s:
        lasts = duration_text(site.hub.session.clock() - min(stopping_s.values()))
        reasons.insert(0, f"the hub has been stopping servers for {lasts}")
    return "; ".join(reasons)


def let_go(site: Site, names: Iterable[str], on_tick: Callable[[], None]) -> None:
    """One round: stop and delete each of these users as far as that goes at once.

    Servers that are starting are stopped last: meanwhile some become ready, and leave nothing that the hub
    forgets.
    """
    session, states = site.hub.session, site.states

    def leave(name: str) -> None:
        person = Visitor(name, session.clock(), site.plan, site)
        if take("stop_server", ask_to_stop, person):
            take("delete_user", delete, person)

    with Team(session, on_tick) as team:
        for name in sorted(names, key=lambda name: (states[name] is ServerState.STARTING, natural(name))):
            if not team.wait_for(lambda: team.running < site.plan.removed_at_once):
                break
            try:
                team.start(leave, name)
            except CutShort:  # no thread is left: one after the other, then
                with contextlib.suppress(Stopped):
                    leave(name)


# ==== Load: operations, closed and open model; pings ========================================================

Send = Callable[[str, str, HubSession], requests.Response]
OPERATIONS: dict[str, Send] = {}


def operation(name: str) -> Callable[[Send], Send]:
    """A decorator that names a function `(username, endpoint, session) -> requests.Response` for --mix."""

    def register(function: Send) -> Send:
        OPERATIONS[name] = function
        return function

    return register


@operation("activity")
def report_activity(username: str, endpoint: str, session: HubSession) -> requests.Response:
    """`POST /users/{name}/activity`, as a running server sends it every 300 s: 200, 404 without the user."""
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
    """Run a file that registers operations; it can import this module by name, however that was started."""
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
    step: str,
    send: Send,
    user: str,
    endpoint: str,
    session: HubSession,
    record: Recorder,
    due_s: float | None = None,
    fine: Collection[int] = (),
) -> Reason | None:
    """Do one operation on a user and record it, whatever it raises; from when it was due, or (None) from now.

    The reason for which it failed. Statuses from 400 on are failures, unless they are `fine`; so is every
    answer that something in front of the hub gave.
    """
    sent_s, call, reason = session.clock(), Call(tries=1), None
    try:
        response = send(user, endpoint, session)
        call = getattr(response, "call", call)
        if str(response.url).startswith(endpoint) and not session.is_hubs(response):
            reason = Reason(Kind.IN_FRONT, in_front(response))
        elif not response.ok and response.status_code not in fine:
            reason = Reason(Kind.REFUSED, str(response.status_code))
    except Stopped:
        return None
    except requests.RequestException as error:
        reason, call = Reason(Kind.NO_ANSWER, why(error)), getattr(error, "call", call)
    except BaseException as error:  # also a SystemExit, which nobody else would see in a thread
        LOG.debug("The operation %s failed on %s", step, user, exc_info=True)
        reason = Reason(Kind.RAISED, f"{type(error).__name__}: {error}")
    due_s = sent_s if due_s is None else due_s
    record.add(Event(step, user, due_s, sent_s, session.clock(), reason, call.tries, call.backoff_s))
    return reason


@dataclasses.dataclass(frozen=True)
class Load:
    """The load that a plan sends for users: by an open model with a rate, else by a closed one."""

    plan: Plan
    endpoint: str
    users: Sequence[str]

    @property
    def schedule(self) -> Schedule | None:
        """When each request of an open load is due."""
        rate = self.plan.rate_per_s
        return Schedule.of(rate, self.plan.duration_s or len(self.users) / (fastest(rate) or 1.0))

    @property
    def planned(self) -> int:
        """How many requests a load consists of, once through the users in the closed model."""
        return self.schedule.count if self.schedule else len(self.users)

    @property
    def workers(self) -> int:
        """Threads in each process; an open load needs enough to go on through 3 seconds of silence.

        More than 200 get into each other's way: then more processes are what helps.
        """
        processes = self.plan.processes
        needed = min(200, math.ceil(3 * fastest(self.plan.rate_per_s) / processes))
        return max(math.ceil(self.plan.workers / processes), needed)


def send_load(
    load: Load,
    part: int,
    started_s: float,
    session: HubSession,
    record: Recorder,
    on_tick: Callable[[], None],
) -> float:
    """Send one process's part of a load, from `started_s` on; the share of a processor that it took."""
    plan, schedule, clock = load.plan, load.schedule, session.clock
    numbers, threads = itertools.count(part, plan.processes), load.workers
    planned: float = load.planned
    last_s = started_s + (schedule.lasts_s + OPEN_GRACE_S if schedule else plan.duration_s or math.inf)
    if not schedule:
        threads = min(threads, math.ceil(len(load.users) / plan.processes))
        planned = math.inf if plan.duration_s else planned

    def send() -> None:
        """Take the next number; its request is due at its time (open model), or in 0 to 1 s (closed)."""
        while (n := next(numbers)) < planned:
            due_s = started_s + schedule.due_s(n) if schedule else None
            if not session.pause(random.random() if due_s is None else due_s - clock()) or clock() >= last_s:
                return
            name, user = choose(plan.load, n), load.users[n % len(load.users)]
            perform(name, OPERATIONS[name], user, load.endpoint, session, record, due_s)

    cpu_s = time.process_time()
    session.pause(started_s - clock())
    with Team(session, on_tick) as team:
        for _ in range(threads):
            team.start(send)
    return (time.process_time() - cpu_s) / max(clock() - started_s, 1e-3)


def spread_load(
    load: Load, session: HubSession, record: Recorder, on_tick: Callable[[], None] = lambda: None
) -> float:
    """Send a load from its processes; the busiest one's share of a processor while it sent.

    Events go to `record`, counts to the session. Raises `CutShort` when a process dies.
    """
    if load.plan.processes == 1:
        return send_load(load, 0, session.clock(), session, record, on_tick)
    import multiprocessing.connection  # imported where it is needed: --help is to be there at once
    from multiprocessing import resource_tracker

    context, headers = multiprocessing.get_context("spawn"), list(session.headers.items())
    children: dict[Any, Any] = {}  # by our end of the pipe to each
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # Ctrl-C reaches children too: not theirs
    try:
        resource_tracker.ensure_running()  # or the first child would start it, which unblocks the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for part in range(load.plan.processes):
            if session.stopping.is_set():
                break
            ours, theirs = context.Pipe()
            shared = (theirs, load, part, session.token, headers)
            child = context.Process(target=_send_in_process, args=shared, daemon=True)
            child.start()
            children[ours] = child
            theirs.close()
    except OSError as error:
        for child in children.values():
            child.kill()
        raise CutShort(f"this machine starts no more than {len(children)} processes: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    try:
        for pipe in children:
            while not pipe.poll(0.1):
                if session.stopping.is_set():
                    return 0.0
            pipe.recv()  # it is ready
        if session.stopping.is_set():
            return 0.0
        for pipe in children:
            pipe.send(session.clock() + 0.2)
        sending, busiest = set(children), 0.0
        while sending:
            awaited: list[Any] = multiprocessing.connection.wait(sending, timeout=0.1)
            for pipe in awaited:
                events, counts, cpu_share = pipe.recv()
                for event in events:
                    record.add(event)
                pipe.send(session.stopping.is_set() or session.hub_is_gone)
                if counts is not None:
                    session.traffic.add(counts)
                    busiest = max(busiest, cpu_share)
                    sending.remove(pipe)
            on_tick()
        return busiest
    except (EOFError, OSError):
        raise CutShort("a process that sends the load died") from None
    finally:
        for child in children.values():
            child.join(0.0 if session.stopping.is_set() else 1.0)
            child.kill()


def _send_in_process(
    pipe: Connection, load: Load, part: int, token: str, headers: Sequence[tuple[str, str]]
) -> None:
    """Send a part of a load from a process that leaves signals to the one that started it, and ends with it.

    Ten times a second it hands its events on, and asks whether to stop; at the end also counts and CPU share.
    """
    load_operations(load.plan.operations)
    session, events = get_session(token, pool_maxsize=load.workers, headers=headers), list[Event]()
    session.gone_after_s = math.inf  # whose pings see that is the process that started this one

    def report(counts: Mapping[str | int, int] | None = None, cpu_share: float = 0.0) -> None:
        number = len(events)
        pipe.send((events[:number], counts, cpu_share))
        del events[:number]
        if pipe.recv():
            session.stop()

    with contextlib.suppress(EOFError, OSError):  # the process that started this one has ended
        pipe.send("ready")
        cpu_share = send_load(load, part, pipe.recv(), session, Recorder(events.append), report)
        report(session.traffic.counts, cpu_share)


def pinging(user: str, endpoint: str, session: HubSession, record: Recorder) -> Regularly:
    """Reads one user five times a second: what everybody else on the hub feels."""

    def read(user: str, endpoint: str, session: HubSession) -> requests.Response:
        """`GET /users/{name}`, once: a retry would hide what it is there to see."""
        return session.exchange("GET", user_url(endpoint, user), Call(observer=True, once=True))

    def ping(due_s: float) -> None:
        if session.stopping.is_set():
            return
        gone = {404}  # the user has left: that is an answer, too
        if reason := perform("ping", read, user, endpoint, session, record, due_s, gone):
            session.say_if_silent(reason.text)

    return Regularly("ping", 1 / PING_RATE_PER_S, ping, PINGS_AT_MOST, functools.partial(record.skip, "ping"))


# ==== Checking the proxy: does it lose connections when servers end? ========================================

CHECK_ENDED, CHECK_STOPPED = 100, 20  # handshakes to a server that ended by itself, and to a stopped one
CHECK_LEAST, CHECK_UNANSWERED = 20, 3
CHECK_COSTS = f"some three minutes, and up to {CHECK_ENDED + CHECK_STOPPED} connections that an affected "
CHECK_COSTS += "proxy keeps for an hour"
CHECK_USUALLY_S = 180.0
CHECK_CALM_S = 10.0  # until the connections of the load have come to rest
CHECK_AGAIN_S = 60.0  # a connection that is still open this long afterwards is lost
PROOF_SHARE, CLEAN_SHARE = 0.8, 0.1  # lost connections per handshake that prove a leak, or that there is none
EVENTS = "api/events/subscribe"  # a websocket of every server
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
}
CLOSED_UNANSWERED, UNANSWERED = "connection reset", TIMED_OUT  # as `why` calls them
CLEAN, LEAKING, UNDECIDED = "clean", "leaking", "undecided"


@dataclasses.dataclass(frozen=True)
class ProxyCheck:
    """Whether the proxy loses connections when servers end: `verdict` is clean, leaking or undecided."""

    verdict: str
    leaking: int | None  # 1 when it does, None when that is undecided
    reason: str
    handshakes: int = 0
    open_files: float | None = None  # by how many the hub's have grown; None when its figures were not read


def judge_proxy(
    page: int,
    ended: Sequence[Reply],
    stopped: Sequence[Reply],
    before: Sequence[Snapshot],
    after: Sequence[Snapshot],
) -> ProxyCheck:
    """What a proxy showed when asked for a server that had ended by itself, and for one that was stopped.

    `page` is the status of a plain page of the ended server; `ended` and `stopped` are the answers to
    websockets; `before` and `after` (right after those to the ended server, and a minute later) are the hub's
    figures. Of these, the open files and the error pages drawn for the proxy count connections. A lost
    connection may be one that the proxy had kept ready for reuse, so files count from the lowest look before.
    """
    files, pages = AFTERMATH["open_files"], AFTERMATH["proxy_error_pages"]
    number, read = len(ended), bool(before and after)
    more_files = [look.get(*files) - before[-1].get(*files) for look in after] if read else [0.0]
    more_pages = [look.get(*pages) - before[-1].get(*pages) for look in after] if read else [0.0]
    reused = before[-1].get(*files) - min(look.get(*files) for look in before) if read else 0.0
    lost = min(min(more_files) + reused, *more_pages)
    answers = [str(reply.status or reply.message) for reply in ended]
    refused = sum(map(answers.count, ("502", "503", CLOSED_UNANSWERED)))  # as if nobody listens there
    telling = sum(map(answers.count, ("502", "504", CLOSED_UNANSWERED, UNANSWERED)))
    most, proof = max(answers, key=answers.count, default=""), PROOF_SHARE * number
    sent, still_open = counted(number, "websocket"), counted(round(lost), "connection")
    asked = f"{sent} asked for a server that had ended"
    rules = (
        (read and number >= CHECK_LEAST and lost >= proof, LEAKING,
            f"{asked}; a minute later the proxy still held {still_open} to the hub for them"),
        (refused and unanswered(stopped), LEAKING,  # where some are refused, websockets pass at all
            "it never answers websockets that ask for a stopped server, and keeps their connections"),
        (number < CHECK_LEAST, UNDECIDED,
            f"the hub noticed after {sent} that the server had ended, too few to tell"),
        (page != 503, UNDECIDED, f"another kind of proxy: it answers {page} for a server that has ended"),
        (not read and telling >= proof, LEAKING,
            f"{asked}, and the proxy closed them without an answer, as one does that loses them"),
        (not read, UNDECIDED, "the hub's own figures were not read"),
        (refused < proof, UNDECIDED, f"{asked}, and most were answered: {most}. Do websockets pass?"),
        (telling and max(more_files + more_pages) < proof, UNDECIDED,
            f"{asked}; {telling} were closed without an answer, and most were answered: {most}. Does "
            "something in front of the proxy limit requests?"),
        (max(more_files + more_pages) < CLEAN_SHARE * number, CLEAN,
            f"{asked}, and the proxy kept no connection for them"),
        (True, UNDECIDED, f"{asked}; the hub's open files grew by {max(more_files):.0f}, its error pages by "
            f"{max(more_pages):.0f}: other people's traffic counts too"),
    )  # fmt: skip
    verdict, reason = next((verdict, reason) for applies, verdict, reason in rules if applies)
    leaking = None if verdict == UNDECIDED else int(verdict == LEAKING)
    return ProxyCheck(verdict, leaking, reason, number + len(stopped), max(more_files) if read else None)


def check_proxy(person: Visitor, monitor: Monitor) -> ProxyCheck:
    """Ask over websockets for a server that ended by itself, then for one stopped. Raises `CutShort`.

    If the hub notices soon that the server has ended, nothing can be seen: then try once more.
    """
    site, ended, page, before = person.site, list[Reply](), 0, list[Snapshot]()
    for _ in range(2):
        person.due_s = person.since_s = person.clock()
        is_ready = site.states.get(person.name) is ServerState.READY or take("server_ready", come, person)
        if not (is_ready and take("visit", visit, person)):
            return ProxyCheck(UNDECIDED, None, "no server became ready to try it with")
        person.sleep(CHECK_CALM_S)
        monitor.look()
        before = [*monitor.snapshots]
        page = shut_down(person)
        if page in (0, 200):
            return ProxyCheck(UNDECIDED, None, "the server did not end by itself when it was asked to")
        replies = open_websockets(person, CHECK_ENDED - len(ended), lambda replies: noticed(replies[-1]))
        ended = [reply for reply in replies if not noticed(reply)]
        site.hub.state(person.name, observer=True)  # which shows that the hub is there
        site.states[person.name] = ServerState.STOPPED
        if len(ended) >= CHECK_LEAST:
            break
    soon = monitor.look()
    person.sleep(CHECK_AGAIN_S if before else 0.0)
    later = monitor.look()
    site.states[person.name] = AFTER_STOP.get(site.hub.stop(person.name).status, ServerState.UNKNOWN)
    stopped = open_websockets(person, CHECK_STOPPED, unanswered)
    return judge_proxy(page, ended, stopped, before, [soon, later] if soon and later else [])


def noticed(reply: Reply) -> bool:
    """Whether the hub has noticed that the server has ended: the proxy has no route to it any more."""
    return reply.status == 302 or reply.message == UNANSWERED


def unanswered(replies: Sequence[Reply]) -> bool:
    """Whether it is clear that nobody answers."""
    return sum(reply.message == UNANSWERED for reply in replies) >= CHECK_UNANSWERED


def shut_down(person: Visitor) -> int:
    """Have the server end by itself; its page's status then: 0 if it did not, 200 if it is still there."""
    browser, until_s = person.browser, person.clock() + SHUTDOWN_S
    if browser.ask("POST", f"{person.url}api/shutdown").status != 200:
        return 0
    while True:
        page = browser.ask("GET", f"{person.url}api")
        if page.status != 200 or person.clock() > until_s:
            return page.status
        person.sleep(0.5)


def open_websockets(person: Visitor, at_most: int, enough: Callable[[Sequence[Reply]], bool]) -> list[Reply]:
    """The answers to websockets to a server that is gone, each on its own connection, until enough."""
    replies, next_s = list[Reply](), 0.0
    while len(replies) < at_most and not (replies and enough(replies)):
        person.sleep(next_s - person.clock())
        next_s = person.clock() + 1 / HANDSHAKES_PER_S
        url = f"{person.url}{EVENTS}"
        replies.append(person.browser.ask("GET", url, timeout=UNANSWERED_S, headers=UPGRADE))
        person.browser.close()
        if person.clock() - person.site.hub.session.answered_s > RETRY_WINDOW_S:  # which nothing else asks
            person.site.hub.state(person.name)
    return replies


# ==== Listeners: every event, as it happens =================================================================


def sample_of(event: Event, run: Run) -> Json:
    """A row of --samples, moments in seconds since the run began; `utc` is when the step ended."""
    since_s = {name: getattr(event, name) - run.began_s for name in ("due_s", "sent_s", "ended_s")}
    taken_s = {name: getattr(event, name) for name in ("latency_s", "backoff_s")}
    return {
        "utc": utc(run.started + timedelta(seconds=since_s["ended_s"]), "milliseconds"),
        **{name: getattr(event, name) for name in ("step", "user", "group", "outcome", "tries", "throttled")},
        **{name: rounded(seconds) for name, seconds in (since_s | taken_s).items()},
        "reason": " ".join(event.reason.text.split()) if event.reason else "",
        "message": " ".join(event.message.split()),
    }


class Samples(Regularly):
    """Writes each event to --samples, once a second in one piece, so that no line is ever cut.

    A .gz file has a member for each second, and so can be read even when the program was killed.
    """

    def __init__(self, run: Run) -> None:
        super().__init__("samples", SAMPLES_EVERY_S, lambda due_s: self._write())
        self.run, self._path, self._mode = run, str(run.plan.samples), "wb"
        self._events = collections.deque[Event]()

    def __call__(self, event: Event) -> None:
        self._events.append(event)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._write()

    def _write(self) -> None:
        rows = [sample_of(self._events.popleft(), self.run) for _ in range(len(self._events))]
        if not rows or not self._mode:
            return
        text, written = io.StringIO(), 0
        lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if self._mode == "wb":
            lines.writeheader()
        lines.writerows(rows)
        data = text.getvalue().encode()
        data = gzip.compress(data) if self._path.endswith(".gz") else data
        try:
            with open(self._path, self._mode, buffering=0) as file:
                written = file.tell()
                while data:
                    data = data[file.write(data) :]
            self._mode = "ab"
        except OSError as error:
            self._mode = ""
            self.run.troubles.append(f"--samples {self._path} could not be written: {error.strerror}")
            with contextlib.suppress(OSError):
                os.truncate(self._path, written)


PAGE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
BECOMES = {"start_server": "starting", "server_ready": "ready", "at_work": "at_work", "delete_user": "left"}


class LivePage:
    """Serves the run to Prometheus while the `with` block runs. Raises `UsageError` if the port is taken."""

    def __init__(self, run: Run) -> None:
        from http.server import ThreadingHTTPServer

        self._run, self._states = run, dict[str, str]()
        self._prometheus = prometheus = importlib.import_module("prometheus_client.core")
        registry, name = prometheus.CollectorRegistry(), "hub_stress_test_{}_seconds"
        both: Json = {"registry": registry, "buckets": PAGE_BUCKETS_S}
        labels = ("operation", "outcome")
        self._latency = prometheus.Histogram(name.format("latency"), "of operations", labels, **both)
        self._lateness = prometheus.Histogram(name.format("lateness"), "of the tool in sending", **both)
        registry.register(self)
        handler = importlib.import_module("prometheus_client").MetricsHandler.factory(registry)
        try:
            self._server = ThreadingHTTPServer(("", run.plan.metrics_port or 0), handler)
            self._server.handle_error = lambda *request: None  # type: ignore[method-assign]  # a scraper left
        except (OSError, OverflowError) as error:
            why_not = getattr(error, "strerror", None) or error
            raise UsageError(f"--metrics-port {run.plan.metrics_port}: {why_not}") from None

    def __enter__(self) -> None:
        start_thread("metrics page", self._server.serve_forever, 0.1)

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, event: Event) -> None:
        self._latency.labels(event.step, event.outcome).observe(event.latency_s)
        self._lateness.observe(event.lateness_s)
        failed = event.reason is not None and event.step in PERSONAL
        state = "failed" if failed else "" if event.reason else BECOMES.get(event.step)
        if state and self._states.get(event.user) != "failed":
            self._states[event.user] = state

    def collect(self) -> Iterator[Any]:
        """The figures that are read whenever Prometheus scrapes; the registry calls this."""
        throttled = self._run.session.traffic.throttled
        yield self._prometheus.CounterMetricFamily("hub_stress_test_throttled", "429 answers", throttled)
        states = collections.Counter(list(self._states.values()))
        if self._run.plan.command == STRESS:
            expected = 0 if self._run.plan.find_capacity else self._run.plan.count
            states["expected"] = max(0, expected - states.total())
            gauge = self._prometheus.GaugeMetricFamily("hub_stress_test_people", "by state", labels=["state"])
            for state in ("expected", *dict.fromkeys(BECOMES.values()), "failed"):
                gauge.add_metric([state], states[state])
            yield gauge


LISTENERS: dict[str, Callable[[Run], Any]] = {"samples": Samples, "metrics_port": LivePage}  # by their option


# ==== A run =================================================================================================


def seeded(plan: Plan) -> Plan:
    """The plan with a seed, if people arrive at random moments; the same seed gives the same moments."""
    at_random = plan.seed is None and any(group.within_s for group in plan.groups)
    return dataclasses.replace(plan, seed=random.randrange(1, 1 << 32)) if at_random else plan


def whereabouts(site: Site, count: int) -> dict[str, int]:
    """How many of these people have come, and where they are now."""
    record, throttled = site.record, len(site.crowd.throttled)
    starting = sum("server_ready" not in record.people.get(name, ()) for name in list(site.crowd.starting))
    tried = {name: record.count([name]) for name in PERSONAL}
    failed = {name: record.failures([name]) for name in PERSONAL}
    ready, works = (tried[name] - failed[name] for name in ("server_ready", "at_work"))
    opening = ready - works - sum(failed[name] for name in PERSONAL[1 : PERSONAL.index("at_work") + 1])
    return {
        f"of {count:,} came": tried["server_ready"] + starting,
        "starting": max(0, starting - throttled),
        "throttled": throttled,
        "ready": max(0, opening if site.plan.rehearses else ready - tried["stay"]),
        "at work": max(0, works - failed["cell"] - tried["stay"]),
        "done": tried["stay"] - failed["stay"],
        "failed": sum(failed.values()),
    }


@contextlib.contextmanager
def on_signals(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """While the `with` block of a main thread runs, signals call this handler; under nohup all but SIGHUP."""
    before: dict[int, Any] = {}
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    heard = [number for number in SIGNALS if number != signal.SIGHUP or hangs_up]
    with contextlib.suppress(ValueError):  # this is not the main thread
        before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Interruption:
    """A handler of signals: the first sets a flag, and the second exits at once.

    What comes within a second of the first is the same one, which a parent has passed on as well.
    A terminal that hangs up, which a shell and the system may both say, counts as one SIGTERM.
    A handler runs between any two lines of the main thread, whatever locks that holds. So it takes none: a
    thread sees the flag within a tenth of a second, and ends the load. Until `watch`, nothing has been made,
    and the first signal raises `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal since `watch`
        self.ended = threading.Event()  # the run: a signal changes nothing any more
        self._site: Site | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if (hung_up := number == signal.SIGHUP) else number
        if self._site is None:
            raise KeyboardInterrupt(number)
        if self.number is None:
            self._heard_s, self.number = time.monotonic(), number
        elif not hung_up and time.monotonic() > self._heard_s + ONE_SIGNAL_S:
            leave_at_once(number, self._site)

    def watch(self, site: Site) -> None:
        """From now on, the first signal ends the load on this site, so that cleaning up begins."""
        self._site = site
        start_thread("interruption", self._stop_when_told, site)

    def _stop_when_told(self, site: Site) -> None:
        while self.number is None and not self.ended.wait(0.1):
            pass
        if not self.ended.is_set():
            what_to_do = "Interrupt once more to exit at once, and leave users on the hub."
            removes_nothing = site.plan.command == PURGE or site.plan.keep
            site.hub.session.stop()  # first, since a log that nobody reads may hold this thread up
            LOG.warning("Interrupted: %s", "ending." if removes_nothing else f"cleaning up. {what_to_do}")


def leave_at_once(number: int, site: Site) -> None:
    """End the program, saying what remains and how to remove it. A signal's handler may call this."""
    plan, states = site.plan, site.states
    names = list(states) if plan.command == PURGE else site.claims.ours
    remain = sum(states.get(name) is not ServerState.GONE for name in names)
    sentence = f"Exiting now. Up to {counted(remain, thing(plan.own_servers))} may remain on the hub."
    remedy = purge_command(plan.run, plan.own_servers)
    with contextlib.suppress(OSError):  # nobody reads it any more
        if select.select([], [2], [], 0.0)[1]:  # or this would wait for somebody to read it
            os.write(2, f"\n{sentence} Remove them with: {remedy}\n".encode())
    os._exit(int(ExitCode.LEFT_BEHIND) if remain else 128 + number)


def open_site(plan: Plan, session: HubSession, record: Recorder) -> tuple[Site, list[Json]]:
    """The site of a run, and the users that this tool's naming made there before.

    Raises `SetupError` when the hub, the token or its rights will not do; nothing has been changed then.
    """
    hub = check_hub(plan, session)
    try:
        listed = list(list_users(hub, record))
    except HubRefused as error:
        raise SetupError(f"{str(error)[:1].upper()}{str(error)[1:]}. Nothing was changed.") from None
    existing = test_users(listed, plan.run if plan.command == PURGE else plan.run or "")
    check_server_names(hub, plan, [user["name"] for user in existing])
    site = Site(hub, plan, record)
    site.claims.known = {user["name"] for user in listed}
    return site, existing


def remove_made(site: Site, record: Recorder) -> Users:
    """Remove all users that were made on a site, also after its session was stopped."""
    ours, unsure = site.claims.ours, site.claims.unconfirmed.copy()
    with site.hub.session.clone(own_stop=True) as session:  # urllib3 before 2 closes nothing by itself
        session.pause(LATE_ACT_S if unsure else 0)
        site = copy.copy(site)
        site.hub, site.record = dataclasses.replace(site.hub, session=session), record
        site.states |= {name: ServerState.STOPPED for name in ours if name not in site.states}
        site.states |= dict.fromkeys(unsure, ServerState.UNKNOWN)
        return remove_users(site, set(ours).__contains__)


class Run:
    """One run of a plan: the hub it talks to, what it has made and measured, what went wrong.

    It raises `SetupError` as `open_site` does. From then on the first signal ends the load, so that cleaning
    up begins.
    """

    def __init__(self, plan: Plan, closing: contextlib.ExitStack, interruption: Interruption) -> None:
        self.plan = plan = seeded(plan)
        connections = max(plan.workers, plan.batch_size) + 2
        self.session = session = get_session(plan.token or "", pool_maxsize=connections, headers=plan.headers)
        self.started, self.began_s = datetime.now(timezone.utc), session.clock()
        self.record = new_recorder() if plan.command == STRESS else Recorder()
        self.troubles: list[str] = []  # what cut the run short
        self.warnings: list[str] = []
        for listener in (make(self) for name, make in LISTENERS.items() if getattr(plan, name)):
            closing.enter_context(listener)
            self.record.listeners.append(listener)
        self.site, self.existing = open_site(plan, session, self.record)
        self.hub, self.claims = self.site.hub, self.site.claims
        self.monitor = Monitor(metrics_url(self.hub.endpoint), session)
        self.monitors = {"hub": self.monitor}
        watched = (each.parts for each in plan.watch)
        self.monitors |= {name: Monitor(url, session, is_hub=False) for name, url in watched}
        self.cleaned = Users()
        self.capacity: Capacity | None = None
        self.proxy_check: ProxyCheck | None = None
        self.interrupted_by: int | None = None  # a signal that came before cleaning up had ended
        self._interruption = interruption
        self.load_ended_s = self.began_s
        for monitor in self.monitors.values():
            closing.enter_context(monitor)
        for watch in plan.watch:
            if not (monitor := self.monitors[watch.parts[0]]).snapshots:
                LOG.warning("--watch %s cannot be read: %s", watch.text, monitor.missing or "no answer")
        interruption.watch(self.site)

    def look(self) -> None:
        """Have all monitors look once more."""
        for monitor in self.monitors.values():
            monitor.look()

    def announce(self, load: str) -> None:
        """Log what begins, what it costs, and what it risks."""
        names = username(0, self.plan.run or "")[:-1] + "<n>"
        owner = f" of {self.hub.owner}" if self.plan.own_servers else ""
        proxy = self.session.proxy_to(self.hub.endpoint)
        where = f"{self.hub.endpoint}, through {proxy}" if proxy else self.hub.endpoint
        LOG.info("%s, on %s, as %s%s. Ctrl-C stops and cleans up.", load, where, names, owner)
        for line in costs_and_risks(self.plan) if self.plan.command == STRESS else ():
            LOG.info("%s", line)

    def make_users(self, count: int) -> list[str]:
        """The names of exactly `count` new users. Raises `HubRefused`, or `Stopped`."""
        taken, run = [*(user["name"] for user in self.existing), *self.claims.confirmed], self.plan.run or ""
        batches = make_users(count, self.plan.batch_size, self.hub, self.record, self.claims, taken, run)
        return [name for batch in batches for name in batch]

    def start_servers(self, names: Sequence[str]) -> None:
        """Take the people through their journeys. Raises `CutShort`."""
        site, plan, session, began_s = self.site, self.site.plan, self.session, self.session.clock()
        last_s = arrivals(plan)[-1][0]

        def line() -> str:
            now_s, leave_s = session.clock(), site.crowd.leave_s
            hold_s = leave_s - now_s if leave_s < math.inf else 0.0
            return self.status(moment_text(now_s - began_s, last_s, hold_s), whereabouts(site, len(names)))

        with progress(line) as tell:
            send_people(names, site, tell)

    def send_requests(self, load: Load) -> float:
        """Send a load; the busiest process's share of a processor. Raises `CutShort`."""
        session, record, began_s = self.session, self.site.record, self.session.clock()
        lasts_s = load.schedule.lasts_s if load.schedule else load.plan.duration_s

        def line() -> str:
            passed_s = session.clock() - began_s
            sent, failed = record.count(load.plan.load), record.failures(load.plan.load)
            numbers = {f"sent ({sent / passed_s:.1f} per second)": sent}
            numbers |= {f"failed ({failed / passed_s:.1f} per second)": failed}
            return self.status(moment_text(passed_s, lasts_s or 0.0), numbers)

        with progress(line) as tell:
            return spread_load(load, session, record, tell)

    def send(self, load: Load) -> float:
        """Have the load's people come, or send its requests, pinging meanwhile: the share of a processor.

        Raises `CutShort`.
        """
        cpu_s, began_s = time.process_time(), self.session.clock()
        with pinging(self.hub.owner or load.users[0], self.hub.endpoint, self.session, self.site.record):
            if load.plan.command == ACTIVITY:
                return self.send_requests(load)
            self.start_servers(load.users)
        return (time.process_time() - cpu_s) / (self.session.clock() - began_s)

    def status(self, moment: str, numbers: Mapping[str, int]) -> str:
        """01:14 of 05:00 | 61 came, 2 failed | ping 24 ms | hub 31 %: no number of 0 but the first."""
        first, silent_s = next(iter(numbers)), self.session.clock() - self.session.answered_s
        counts = (f"{number:,} {noun}" for noun, number in numbers.items() if number or noun == first)
        parts = [moment, ", ".join(counts)]
        if silent_s > SILENT_S:
            return " | ".join([*parts, f"no answer from the hub for {clock_text(silent_s)}"])
        if (ping_s := self.site.record.latest_s("ping")) is not None:
            parts.append(f"ping {duration_text(ping_s)}")
        parts += [f"hub {share_text(share)}" for _, share in cpu_shares(self.monitor.snapshots[-2:])]
        return " | ".join(parts)

    def check_proxy(self, names: Sequence[str]) -> None:
        """Whether the proxy loses connections when a server ends. Raises `CutShort`."""
        LOG.info("Checking the proxy: %s", CHECK_COSTS)
        rows, states = self.record.people, self.site.states
        good = {
            name for name, row in rows.items() if "at_work" in row and not any(e.reason for e in row.values())
        }
        working = (name for name in names if name in good and states.get(name) is ServerState.READY)
        name = next(working, None) or self.make_users(1)[0]
        site = copy.copy(self.site)
        site.record = Recorder()  # the check is no part of the load's results
        person = Visitor(name, self.session.clock(), self.plan.groups[0], site)

        def check() -> None:
            try:
                result = check_proxy(person, self.monitor)
                self.proxy_check = None if self.session.stopping.is_set() else result
            finally:
                person.go_home()

        clock, until_s = self.session.clock, self.session.clock() + CHECK_USUALLY_S
        with (
            progress(lambda: f"checking the proxy: about {clock_text(until_s - clock())} left") as tell,
            Team(self.session, tell) as team,
        ):
            team.start(check)
        if self.proxy_check and self.proxy_check.verdict == UNDECIDED:
            self.warnings.append(f"the check of the proxy is undecided: {self.proxy_check.reason}")

    def warn_if_late(self, names: Collection[str], unsent: int, cause: str) -> None:
        """Warn if this tool, and not the hub, set the pace."""
        late = self.record.late_share(names)
        if late > 0.01 or unsent:
            self.warnings.append(
                f"THE GENERATOR WAS LATE: {share_text(late)} of the requests were sent more than "
                f"{LATE_SEND_S:g} s after they were due, {unsent} not at all; {cause}. Latencies count from "
                "when a request was due"
            )

    def clean_up(self) -> None:
        """Remove what this run made."""
        self.load_ended_s = self.session.clock()
        if self.session.hub_is_gone:
            silence = duration_text(HUB_GONE_S)
            self.troubles.append(f"the hub did not answer for {silence}: no more load was sent")
        if self.session.stopping.is_set():
            self.warnings += still_waiting([*self.site.crowd.starting.values()])
        if self.plan.command != PURGE:
            self.session.stop()  # threads that the hub holds up send nothing more
        self.site.public.close_kernels()
        self.look()
        ours = self.claims.ours
        if self.plan.keep:
            self.cleaned = Users(kept=len(ours))
        elif ours:
            LOG.info("Cleaning up %s", counted(len(ours), thing(self.plan.own_servers)))
            self.cleaned = remove_made(self.site, self.record)
        self._interruption.ended.set()
        self.interrupted_by = self._interruption.number


def pace_text(options: Json) -> str:
    """How people arrive, from the options of a run or a group."""
    if groups := len(options.get("event") or ()):
        return f"in {counted(groups, 'group')}"
    later = f", from {duration_text(options['after'])} on" if options.get("after") else ""
    if options.get("within"):
        return f"at random moments within {duration_text(options['within'])}{later}"
    rate = rate_of(options["rate"]) if isinstance(options["rate"], str) else options["rate"]
    return f"{rate_text(rate)}{later}, however slow the hub" if rate else f"{options['batch_size']} at a time"


# ==== Capacity ==============================================================================================

FIRST_STEPS = {STRESS: (0.1, 60.0), ACTIVITY: (16.0, 10.0)}  # people or requests per second, and for how long


@dataclasses.dataclass(frozen=True)
class CapacityStep:
    """What one rate showed."""

    rate_per_s: float
    sent_per_s: float
    p95_s: float | None
    failed: int
    held: str | None  # the condition that was met, or why the rate was not reached
    generator_bound: bool
    limited_by: str | None = None  # of people: why no more got through


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The highest rate at which no condition was met, and the steps to it."""

    rate_per_s: float | None
    servers_reporting_every_300_s: int | None
    generator_bound: bool
    steps: list[CapacityStep]
    finished: bool = True  # whether the search came to its end
    people_per_minute: float | None = None
    limited_by: str | None = None


def first_step(plan: Plan) -> Plan:
    """The plan of the first step of a search for capacity."""
    usual_per_s, usual_s = FIRST_STEPS[plan.command]
    rate_per_s, for_s = fastest(plan.rate_per_s) or usual_per_s, plan.duration_s or usual_s
    count = max(1, round(rate_per_s * for_s)) if plan.command == STRESS else plan.count
    when: Json = {"rate_per_s": rate_per_s, "duration_s": for_s, "within_s": None}
    return dataclasses.replace(plan, count=count, **when)


def sustained_rate(steps: Iterable[CapacityStep]) -> float | None:
    """The highest rate at which no condition was met."""
    return max((step.rate_per_s for step in steps if not step.held), default=None)


def next_rate(
    steps: Sequence[CapacityStep], first_per_s: float, grain_per_s: float = 0.0, most_per_s: float = math.inf
) -> float | None:
    """The rate to try next: doubling until a condition is met, then halving the interval to within 5 %.

    None when the answer is known as well as it can be: where the generator could not send a rate, nothing is
    known of higher ones. With a grain, rates are its multiples: people are whole.
    """
    low = sustained_rate(steps) or 0.0
    high = min((step.rate_per_s for step in steps if step.held), default=math.inf)
    hopeless = not low and not grain_per_s and high <= 1
    if hopeless or high <= 1.05 * low or any(step.generator_bound for step in steps):
        return None
    rate = (low + high) / 2 if high < math.inf else min(2 * low or first_per_s, most_per_s)
    rate = max(1, round(rate / grain_per_s)) * grain_per_s if grain_per_s else rate
    return None if any(math.isclose(rate, step.rate_per_s) for step in steps) else rate


def without_cold_start(steps: list[CapacityStep]) -> list[CapacityStep]:
    """The steps, but for a first one that was held when now a lower rate is sustained: it is tried again.

    Its people may have waited for nodes and images, which are there by now.
    """
    return steps[1:] if len(steps) == 2 and steps[0].held and not steps[1].held else steps


def search(run: Run, users: Sequence[str] = ()) -> None:
    """Search for the highest rate at which no condition is met; `run` has the answer, however this ends.

    Requests are sent for `users`; people who come are new ones in each step.
    """
    plan, session, of_people = run.plan, run.session, run.plan.command == STRESS
    first, steps, best, tried = first_step(plan), list[CapacityStep](), Recorder(), ""
    grain_per_s = 1 / first.duration_s if of_people and first.duration_s else 0.0
    most_per_s = plan.max_servers * grain_per_s if plan.max_servers else math.inf
    try:
        while rate := next_rate(steps, fastest(first.rate_per_s), grain_per_s, most_per_s):
            count = round(rate / grain_per_s) if of_people else plan.count
            users = run.make_users(count) if of_people else users
            step, record = try_rate(run, dataclasses.replace(first, rate_per_s=rate, count=count), users)
            if session.stopping.is_set() or session.hub_is_gone:
                break
            if of_people and (reason := run.site.crowd.nothing_starts):
                raise CutShort(reason)
            steps.append(step)
            steps = without_cold_start(steps) if of_people else steps
            people = f"{counted(60 * rate, 'person', 'people')} a minute"
            tried = people if of_people else f"{counted(rate, 'request')} per second"
            LOG.info("At %s: %s", tried, step.held or "sustained")
            best = record if not step.held or sustained_rate(steps) is None else best
            if of_people:
                run.cleaned = remove_made(run.site, run.record)
                session.answered_s = session.clock()  # another session has talked to the hub meanwhile
                if run.cleaned.left_behind and not session.stopping.is_set():
                    remain = counted(len(run.cleaned.left_behind), thing(plan.own_servers))
                    raise CutShort(f"{remain} could not be removed before others come")
                run.monitor.look()
                if restarts_in(run.monitor.snapshots):
                    raise CutShort("the hub restarted, which ends a search")
                if grown(run.monitor.snapshots, "server_stop_seconds_count", "failure"):
                    raise CutShort("the hub fails to stop servers, which take the room of those to come")
            until_s, quick = session.clock() + DRAIN_S, 0  # until the hub answers at once, twice in a row
            while quick < 2 and session.clock() < until_s and session.pause(0.5):
                sent_s = session.clock()
                run.hub.state(users[0])
                quick = quick + 1 if session.clock() - sent_s < 0.1 else 0
    finally:
        run.record.include(best)
        run.capacity = capacity_of(plan, steps, finished=rate is None)
        run.warnings += doubts(first, steps, best, tried)


def doubts(first: Plan, steps: Sequence[CapacityStep], best: Recorder, tried: str) -> Iterator[str]:
    """Why a search sustained no rate, `tried` being the last one, or why its answer is doubtful."""
    operations = best.summarise()
    if steps and sustained_rate(steps) is None:  # then each rate was lower than the one before it
        judged, errors = {*first.load, *PERSONAL}, collections.Counter[str]()
        for name, operation in operations.items():
            errors.update(operation.errors if name in judged else {})
        usual = "".join(f" ({number:,} × {reason})" for reason, number in errors.most_common(1))
        yield f"no rate was sustained, not even {tried}: {steps[-1].held}{usual}"
    broken = sorted((step for step in steps if step.held), key=lambda step: step.rate_per_s)
    slow = [step.p95_s or 0.0 for step in broken]
    if any(later < before / 2 for before, later in zip(slow, slow[1:])):
        yield "the steps contradict each other (a higher rate was faster): search again"
    ready = operations.get("server_ready")
    if ready and first.duration_s and first.duration_s < 5 * (ready.latency_s.p50 or 0.0):
        lasts = f"steps of {duration_text(first.duration_s)}"
        start = f"a start takes {duration_text(ready.latency_s.p50)}, so that people hardly queue"
        yield f"{lasts} are too short: {start}. Give a longer --duration"


def capacity_of(plan: Plan, steps: list[CapacityStep], finished: bool) -> Capacity:
    """What the steps of a search have shown; it has not finished if nothing but --max-servers ended it."""
    sustained, bound = sustained_rate(steps), any(step.generator_bound for step in steps)
    if plan.command == ACTIVITY:
        reports_per_s = (sustained or 0) * plan.load.get("activity", 0) / sum(plan.load.values())
        servers = int(reports_per_s * SERVER_REPORTS_EVERY_S) or None
        return Capacity(sustained, servers, bound, steps, finished)
    broken = min((step for step in steps if step.held), key=lambda step: step.rate_per_s, default=None)
    limit = broken.limited_by if broken else None
    if finished and not broken:
        finished, limit = False, f"--max-servers {plan.max_servers}: the hub may take more"
    return Capacity(sustained, None, bound, steps, finished, sustained and 60 * sustained, limit)


def try_rate(run: Run, plan: Plan, users: Sequence[str]) -> tuple[CapacityStep, Recorder]:
    """Have these people come, or send requests for these users: the step, and its events alone."""
    session, monitor, record = run.session, run.monitor, new_recorder(*run.record.listeners)
    load, site = Load(plan, run.hub.endpoint, users), run.site
    site.plan, site.record, site.crowd = plan, record, Crowd(session, plan)
    earlier, before, traffic = len(monitor.snapshots), session.traffic.counts.copy(), Traffic()
    monitor.look()
    cpu_share = run.send(load)
    monitor.look()
    traffic.add(session.traffic.counts - before)
    step = judge_step(load, record, traffic, cpu_share)
    if step.held and plan.command == STRESS:
        own = hub_figures(monitor.snapshots[earlier:], math.inf, 0)
        limit = limit_of(step, record, own, in_front=traffic.counts[-429] > traffic.throttled)
        step = dataclasses.replace(step, limited_by=limit)
    return step, record


def judge_step(load: Load, record: Recorder, traffic: Traffic, cpu_share: float) -> CapacityStep:
    """Judge one rate by its own requests alone."""
    plan, of_people = load.plan, load.plan.command == STRESS
    count, failed = record.count(plan.load), record.failures({*plan.load, *PERSONAL})
    results = as_json({"operations": record.summarise(), "http": traffic.summarise(), "failed": failed})
    results["failed_rate"] = failed / count if count else None
    held = next((judged.condition for judged in judgements_of(plan, results) if judged.held), None)
    unsent = load.planned - count
    late = record.late_share(plan.load) > 0.01 or (unsent > 0 and not of_people)  # people come late, but come
    bound = late and cpu_share > BUSY
    ends = [row[plan.goal] for row in record.people.values() if plan.goal in row]
    waits_s = [end.latency_s for end in sorted(ends, key=lambda end: end.due_s) if end.reason is None]
    if bound:
        held = "the generator could not send this rate"
    elif not held and unsent > 0:
        noun = ("person", "people") if of_people else ("request",)
        why_not = "never came, after failures in a row" if of_people else "could not be sent in time"
        held = f"{unsent:,} of {counted(load.planned, *noun)} {why_not}"
    elif not held and falls_behind(waits_s):
        held = "the hub fell behind: the last waited longer than the first"
    p95_s = metric_value(results, next(iter(plan.load)) + ".p95")
    sent_per_s = count / (plan.duration_s or math.nan)
    return CapacityStep(fastest(plan.rate_per_s), sent_per_s, p95_s, failed, held, bound)


def falls_behind(waits_s: Sequence[float]) -> bool:
    """Whether the last waited longer than those who came first: by half, and by more than a second.

    By the medians of the last and the first quarter. If people kept coming, they would wait ever longer.
    """
    quarter = max(1, len(waits_s) // 4)
    parts = (waits_s[:quarter] or [0.0], waits_s[-quarter:] or [0.0])
    first_s, last_s = (sorted(part)[len(part) // 2] for part in parts)
    return last_s > max(1.5 * first_s, first_s + 1.0)


NO_ROOM = re.compile(r"Insufficient [\w./-]*\w|no node has [^.,;]+|Too many pods|exceeded quota")
LIMITED_IN_FRONT = (
    "something in front of the hub limits requests (429): exempt this machine, or run inside the cluster"
)
UNKNOWN_LIMIT = "the hub's figures do not tell what the limit was"


def limit_of(step: CapacityStep, record: Recorder, own: HubFigures | None, in_front: bool = False) -> str:
    """What kept people from getting through, by the condition that broke the step and the hub's own figures.

    Failures are their own reason; only time-outs are judged like other waits for the same step.
    """
    broken, _, statistic = re.split("[ <>]", step.held or "", maxsplit=1)[0].rpartition(".")
    operations, otherwise = record.summarise(), UNKNOWN_LIMIT
    if statistic in ("failed", "failed_rate") or "never came" in (step.held or ""):
        ends = [end for row in record.people.values() for end in row.values() if end.step in PERSONAL]
        failures = [(end.step, end.reason) for end in ends if end.reason and broken in ("", end.step)]
        if usual := collections.Counter(failures).most_common(1):
            (broken, reason), number = usual[0]
            otherwise = f"what failed most often: {number} × {reason.text}"
            if reason.kind not in (Kind.TIMED_OUT, Kind.THROTTLED) or NO_ROOM.search(reason.text):
                return otherwise
    means = {name: operation.latency_s.mean or 0.0 for name, operation in operations.items()}
    ready_s, starts = means.get("server_ready", 0.0), operations.get("start_server")
    of_starts = broken in ("start_server", "server_ready") or statistic == "throttled"
    whole_s = ready_s if of_starts else means.get("at_work", ready_s)
    spawn_s = own.spawns["success"].mean_s if own and "success" in own.spawns else 0.0
    throttled = statistic == "throttled" or bool(starts and starts.backoff_s / starts.count > ready_s / 10)
    at_the_server = broken in PERSONAL[1:] and broken != "at_work"
    rules: dict[str, object] = {
        "this machine could not send more": step.generator_bound,
        "the hub is CPU-bound: use a faster core, or reduce its load": own and own.cpu_share_max > BUSY,
        f"{own.fullness if own else ''} (a slow disk or database, or a busy machine)": own and own.fullness,
        UNKNOWN_LIMIT: broken == "ping",
        "servers were ready, but people waited to work there: see the proxy, and the servers "
        "themselves": at_the_server or whole_s - ready_s > whole_s / 2,
        LIMITED_IN_FRONT: throttled and in_front,
        "the hub throttled starts: see its concurrent_spawn_limit, and how long a server takes to "
        "start": throttled,
        "servers took long to start, by the hub's own clock: see images, nodes and storage": (
            spawn_s > whole_s / 2
        ),
    }
    return next((limit for limit, applies in rules.items() if applies), otherwise)


# ==== What it means: where the time went, and what to look at next ==========================================

HANDLERS = {"activity": "POST ActivityAPIHandler", "ping": "GET UserAPIHandler"}  # by operation
NEGLIGIBLE_S = 0.02  # too little to mention
SLOW_PING_S = 0.1  # as a mean; a faster one is no news


def where_time_went(whole_s: float, inside_s: float, hub: HubFigures) -> str:
    """Where a request that took `whole_s`, of which `inside_s` by the hub's own clock, spent most of it.

    A request that waits for the hub's one thread is not on the hub's clock.
    """
    outside_s, waiting = whole_s - inside_s, "most of that time was spent waiting for the hub"
    if outside_s < whole_s / 2:
        return "most of that time was spent in the hub"
    if outside_s < NEGLIGIBLE_S:
        return "the rest is too little to matter"
    if hub.cpu_share_max > BUSY:
        return f"{waiting}'s one thread"
    if hub.late_s and hub.late_s > outside_s / 2:
        return f"{waiting}, whose event loop was late: a slow disk or database, or a busy machine"
    if hub.cpu_share_max < IDLE:
        return "most of that time was spent between this machine and the hub: network, proxy or TLS"
    return "the hub's figures do not tell where the rest was spent"


def start_parts(results: Results, wait_s: float) -> dict[str, float]:
    """The parts of the mean wait for a server, in seconds; empty if nothing is known of them.

    Kubernetes' events tell most. While the hub's thread was busy, its time of a spawn is not the spawner's.
    """
    own, servers = results.hub.metrics, results.servers
    parts = {"throttling": servers.throttling_s if servers else 0.0}
    if servers and (phases := servers.phases):
        known = phases.starts / servers.ready  # of the others, nothing is known
        new = f" ({phases.new_node} of {servers.ready} for a new one)" * (phases.new_node > 0)
        for name, title in PHASES.items():
            parts[title + new * (name == "node_s")] = known * getattr(phases, name)
    elif own and not own.fullness and (start := own.spawns.get("success")):
        title = "the spawner" + " or the hub, whose event loop was late" * bool(own.late_s)
        parts[title] = min(start.mean_s, wait_s - parts["throttling"])
    else:
        return {}
    return parts | {"everything else": wait_s - sum(parts.values())}


def time_spent(results: Results) -> Iterator[str]:
    """Sentences that say, from the client's times and the hub's own, on which side the time was spent."""
    own, operations = results.hub.metrics, results.operations
    if own and own.fullness and own.fullness not in results.but:
        yield own.fullness
    if results.people and (means := results.people.until_work_s):
        steps = [step for step in STEPS.values() if step.waits_for and step.name in means]
        waits = [f"{step.waits_for} {duration_text(means[step.name])}" for step in steps]
        at_work = f"people waited {duration_text(means['at_work'])} on average until they could work"
        yield f"{at_work}: {', '.join(waits)}"
    if results.capacity:  # operations are of one step, the hub's figures of all
        return
    ready = operations.get("server_ready")
    if ready and (wait_s := ready.latency_s.mean):
        least_s = max(NEGLIGIBLE_S, wait_s / 100)
        parts = start_parts(results, wait_s).items()
        if shown := [f"{duration_text(seconds)} {title}" for title, seconds in parts if seconds > least_s]:
            yield f"of {duration_text(wait_s)} until ready, {', '.join(shown)}"
    for name, handler in HANDLERS.items():
        operation, inside = operations.get(name), own and own.requests.get(handler)
        whole_s = operation.latency_s.mean if operation else None
        slow = whole_s and (name != "ping" or whole_s > SLOW_PING_S)
        if own and inside and whole_s and slow and not results.hub.restarts:
            took = f" took {duration_text(inside.mean_s)} by the hub's own clock"
            took = took if inside.mean_s <= whole_s else ""  # the hub also counts other people's requests
            where = where_time_went(whole_s, inside.mean_s, own)
            yield f"a mean {title_of(name)} of {duration_text(whole_s)}{took}: {where}"


def time_out_in_front(people: People) -> str:
    """How long all broken websockets were open, or silent; "" when that differs, or they broke together."""
    ends = [end for row in people.values() for end in row.values() if end.reason and end.reason.lasted_s]
    moments_s = [end.ended_s for end in ends]
    for column, state in enumerate(("open", "silent") if len(ends) > 2 else ()):
        lasted_s = sorted(end.reason.lasted_s[column] for end in ends if end.reason)
        differ_s, usual_s = lasted_s[-1] - lasted_s[0], lasted_s[len(lasted_s) // 2]
        apart = max(moments_s) - min(moments_s) > max(1.0, 2 * differ_s)
        if apart and differ_s < min(max(0.5, 0.02 * lasted_s[-1]), usual_s / 4):
            return f"{state} for {usual_s:.0f} s: something in front has a time-out of {usual_s:.0f} s"
    return ""


KUBERNETES = re.compile(
    r"nodes are available|ImagePull|Back-off|exceeded quota|admission webhook|No such profile|\bpods?\b"
)


def on_kubernetes(results: Results) -> bool:
    """Whether the servers of a run were pods, as the hub's messages reveal."""
    servers = results.servers
    messages = [f"{end.reason} {end.message}" for end in servers.failures] if servers else []
    starts = (results.timeline["servers"] or {}).get("phases", ())  # also of those that failed
    messages += [step.limited_by or "" for step in (results.capacity.steps if results.capacity else ())]
    return any(starts) or any(map(KUBERNETES.search, results.warnings + messages))


def starts_at_once(results: Results) -> int:
    """How many servers would start at the same time, unthrottled, and a third more; 0 if that is not known.

    It is not known in the closed model, nor when starts failed: then only those that were quick are known.
    Nor where more did start at the same time: the first may have waited for nodes.
    """
    rates = [
        fastest(rate_of(rate) if isinstance(rate := group.get("rate"), str) else rate)
        or group.get("count", 0) / (group.get("within") or math.inf)
        for group in results.options.get("event") or [results.options]
    ]
    ready = results.operations.get("server_ready")
    if not ready or not (servers := results.servers) or servers.failed:
        return 0
    at_once = sum(rates) * ((ready.latency_s.mean or 0.0) - servers.throttling_s)
    number, line = math.ceil(min(at_once, servers.requested) * 4 / 3), results.timeline["servers"]
    began_s = (asked_s or due_s for asked_s, due_s in zip(line["asked_s"], line["due_s"]))
    starts = [each for each in zip(began_s, line["ended_s"], line["user"]) if each[1] is not None]
    return number if number > most_at_one_time(starts) else 0


RESERVED = {
    "memory": ("singleuser.memory.guarantee", "Spawner.mem_guarantee"),
    "cpu": ("singleuser.cpu.guarantee", "Spawner.cpu_guarantee"),
    "storage": ("singleuser.storage.capacity", "KubeSpawner.storage_capacity"),
}
REFUSED_NAMES = {  # advice by a pattern of the hub's message
    "getpwnam|does not exist on the system": "the hub's users need unix accounts: make some with these names",
    "login again": "this hub starts servers only for people who have logged in (refresh_pre_spawn)",
    "Invalid username": "the hub's username_pattern refuses these names: allow hub-stress-test-.* too",
}


def advice(results: Results, kinds: Collection[Kind], time_out: str = "") -> Iterator[str]:
    """What to do next, with the setting's name.

    The settings are those of Zero to JupyterHub's values.yaml if servers are pods, else the hub's own.
    """
    servers, hub, in_front = results.servers, results.hub, results.http.in_front
    failures = servers.failures if servers else []
    reasons = {failure.reason for failure in failures}
    words, pods = "; ".join([*results.warnings, *reasons]), on_kubernetes(results)

    def setting(value: str, trait: str) -> str:
        """A setting's name in values.yaml, or in jupyterhub_config.py."""
        return value if pods else f"c.{trait}"

    exit_limit = setting("hub.consecutiveFailureLimit", "Spawner.consecutive_failure_limit")
    in_a_row = f"it exits after {exit_limit} failed starts in a row"
    if Kind.NO_ANSWER in kinds and hub.proxy:
        yield f"some requests through {hub.proxy} got no answer: {without_proxy(hub.endpoint)}"
    elif Kind.NO_ANSWER in kinds and not hub.restarts:
        yield f"some requests got no answer: does the hub run ({in_a_row})?"
    if Kind.SERVER_LIMIT in kinds:
        limit = setting("hub.activeServerLimit", "JupyterHub.active_server_limit")
        yield f"the hub allows no more servers: raise {limit}"
    elif servers and servers.throttled:
        limit = setting("hub.concurrentSpawnLimit", "JupyterHub.concurrent_spawn_limit")
        if number := starts_at_once(results):
            yield f"the hub throttled starts: {limit}: {number} is a third more than these arrivals need"
        else:
            yield f"the hub throttled starts: raise {limit}, or slow the arrivals (--rate, or a smaller -b)"
    if servers and (phases := servers.phases):
        many, nodes, images = max(2, servers.ready // 10), phases.new_node, phases.images_pulled
        if nodes >= many:
            room = (
                f"scheduling.userPlaceholder.replicas: {nodes} (with podPriority.enabled) keeps room for them"
            )
            yield f"{nodes} servers waited for a new node: {room}, or add nodes before the event"
        if images >= many and phases.image_s > 5:
            pull = "prePuller.hook.enabled and prePuller.continuous.enabled pull it before"
            yield f"{images} servers waited for their image: {pull}; a smaller image is faster"
    no_room = NO_ROOM.search(words)
    refused = re.search(r"\([45]\d\d\)|Could not create", words)  # by the API of Kubernetes
    chosen = any(group.get("profile") for group in results.options.get("event") or [results.options])
    alike = servers and not servers.ready and len(failures) > len(reasons) == 1
    if cause := next((cause for cause in REFUSED_NAMES if re.search(cause, words)), ""):
        yield f"{REFUSED_NAMES[cause]}, or test with --own-servers"
    elif Kind.SPAWN in kinds and alike and not chosen and not no_room and not refused:
        yield "all starts failed alike: if people choose options before a start, choose them with --profile"
    if no_room:
        lack = r"(Insufficient |no node has .*|requested: \S*)"
        lacking = words if "quota" in no_room[0] else no_room[0]
        less = [names for what, names in RESERVED.items() if re.search(lack + what, lacking)]
        place, maximum = "on the nodes", "the node pool's maximum"
        if "quota" in no_room[0]:
            place, maximum = "into the namespace", "its quota"
        room = f"raise {maximum}"
        room += "".join(f", or reserve less for each ({setting(*names)})" for names in less[:1])
        yield f"servers did not fit {place} ({no_room[0]}): {room}"
    elif in_time := re.search(r"did not start in (\d+) s", words):
        more_time = f"raise {setting('singleuser.startTimeout', 'Spawner.start_timeout')}"
        below = "keep --server-timeout below it: such failures count towards the hub's exit"
        yield f"starts timed out after {in_time[1]} s: if they need more time, {more_time}, and {below}"
    if Kind.TIMED_OUT in kinds and not no_room:
        log = "see the hub's log and the spawner's events, or raise --server-timeout"
        yield f"some servers were still starting: {log}"
    elif failures and not no_room:
        log = "where the spawner runs them (squeue, sacct, docker ps, journalctl)"
        log = "the events of their pods: kubectl get events -n NAMESPACE" if pods else log
        yield f"see the hub's log for the {thing(results.own_servers)}s named above, and {log}"
    if NO_SUCH_HOST in words:
        yield "a host name per user does not resolve: the hub's subdomains need a wildcard DNS entry"
    if Kind.CELL in kinds:
        yield "cells failed: see their errors above; a package that the image lacks? too little time?"
    if Kind.LOST in kinds:
        yield "servers were lost (idle culler? memory limit? lost node?): the hub's log says who stopped them"
    if Kind.ROUTE in kinds:
        yield "some pages did not load: see the proxy's log and routes, and the servers' own logs"
    if time_out:
        yield f"all websockets that broke had been {time_out}"
    elif Kind.WEBSOCKET in kinds:
        yield "websockets broke: what is in front of the hub has to pass upgrades and keep connections open"
    if results.leaking:
        yield "the proxy loses connections when servers end: configurable-http-proxy before 5.1.0: upgrade it"
    if Kind.KERNEL in kinds:
        memory = setting("singleuser.memory", "Spawner.mem_limit")
        yield f"kernels died, as under a memory limit: see the servers' logs, and {memory}"
    if hub.metrics and (cpu_share := hub.metrics.cpu_share_max) > BUSY:
        used = f"it used {share_text(cpu_share)} of a processor, and can use only one"
        interval = f"JUPYTERHUB_ACTIVITY_INTERVAL in {setting('singleuser.extraEnv', 'Spawner.environment')}"
        yield f"the hub is CPU-bound: {used}: use a faster core, or reduce its load ({interval})"
    failed = len(failures) + sum(step.failed for step in (results.capacity.steps if results.capacity else ()))
    if hub.restarts and failed > 4:
        test = "test with --fail-fast 4, or " * (not results.options.get("fail_fast"))
        test += "set that limit to 0 for the test"
        yield f"the hub restarted after {failed} starts had failed: {in_a_row}; {test}"
    elif hub.restarts:
        yield "the hub restarted: find out why it ended (its memory limit? its liveness probe?)"
    denied = results.http.statuses.get("403", 0) - in_front.get("403", 0)
    if TOKEN_REFUSED in f"{words} {results.cleaned.in_the_way}":
        yield "the token was revoked, or has expired: make another"
    elif denied > (hub.metrics_missing == NO_METRICS_SCOPE):
        yield "the hub denied requests (403): a hook, a quota, or a missing scope; its log says which"
    if "429" in in_front:
        yield LIMITED_IN_FRONT
    if in_front.keys() & {"401", "403"}:
        yield "something in front of the hub denies requests: let this machine, POST and DELETE through"
    if any(status >= "500" for status in in_front):
        yield "something in front of the hub answered 5xx: see the logs of the proxy and the ingress"


# ==== Results: a fold over the events =======================================================================


@dataclasses.dataclass(frozen=True)
class HubSide:
    """The hub, in the results."""

    endpoint: str
    version: str
    restarts: int | None
    metrics: HubFigures | None
    metrics_missing: str | None
    proxy: str | None = None  # this machine's own, on the way to the hub


@dataclasses.dataclass(frozen=True)
class Failure:
    """A server or person that failed, and the hub's last message about it."""

    user: str
    reason: str
    message: str
    failed_s: float  # since the run began


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What servers and people have in common.

    Of a run that ended early, `failed` also counts those that were under way or had not begun.
    """

    failed: int
    reasons: dict[str, int]
    failures: list[Failure]
    under_way: int
    not_begun: int


@dataclasses.dataclass(frozen=True)
class Servers(Outcome):
    """The outcome of the servers: of the `ready` ones, `lost` stopped while they were held."""

    requested: int
    ready: int
    lost: int
    given_up: int  # of those that failed: they timed out
    throttled: int
    throttling_began_s: float | None
    throttling_s: float  # the mean that those that became ready waited because of it
    slowest: list[Json]  # each with user, ready_s, throttled, and the message that stood longest
    usual_message: str  # the message of all servers that have one; "" when they differ
    phases: Phases | None  # the means of those that became ready; None without Kubernetes' events
    removed: int = 0  # with --own-servers, like the next two; else see the users
    kept: int = 0
    left_behind: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Rehearsed(Outcome):
    """The outcome of a rehearsal's people: `failed` are those with any failed step, also after `at_work`."""

    expected: int
    at_work: int
    until_work_s: dict[str, float]  # the mean of each step, of those who got to work


@dataclasses.dataclass(frozen=True)
class Results:
    """All that there is to say of a run, with the keys of the results file."""

    schema: int
    tool: dict[str, str]
    command: str
    hub: HubSide
    started: str
    finished: str
    duration_s: float
    options: Json
    users: Users
    failed: int
    failed_rate: float | None
    servers: Servers | None
    people: Rehearsed | None  # of a rehearsal
    groups: dict[str, Rehearsed] | None  # of an event
    operations: dict[str, Operation]
    http: Http
    capacity: Capacity | None
    aftermath: Aftermath | None  # of the hub and each process that was watched
    proxy_check: ProxyCheck | None
    timeline: Json  # what the report draws: operations, servers, hub, watched, load_ended_s
    warnings: list[str] = dataclasses.field(default_factory=list)
    conditions: list[Judgement] = dataclasses.field(default_factory=list)
    but: list[str] = dataclasses.field(default_factory=list)  # what to know of a run that passed
    advice: list[str] = dataclasses.field(default_factory=list)  # if it failed, or has a but
    exit_code: int = 0

    @property
    def leaking(self) -> bool:
        """Whether the proxy was shown to lose connections."""
        return bool(self.proxy_check and self.proxy_check.leaking)

    @property
    def own_servers(self) -> bool:
        """Whether servers, and not users, were made and removed."""
        return bool(self.options.get("own_servers"))

    @property
    def cleaned(self) -> Users:
        """The outcome of cleaning up users, or with --own-servers servers."""
        servers, numbers = self.servers, Json()
        if self.own_servers and servers:
            numbers = {"deleted": servers.removed, "kept": servers.kept, "left_behind": servers.left_behind}
        return dataclasses.replace(self.users, **numbers)


def numbers_in(kind: Any, within: tuple[Any, ...] = ()) -> Iterator[str]:
    """The path of each number in records of this type, with NAME for any key of a mapping, behind a dot."""
    inner: Mapping[str, Any] = {}
    if kind in (int, float):
        yield ""
    elif dataclasses.is_dataclass(kind) and within.count(kind) < 2:  # Http has Http, which has no further one
        inner = typing.get_type_hints(kind, globals())
    elif typing.get_origin(kind) in (dict, Mapping):
        inner = {"NAME": typing.get_args(kind)[1]}
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        for each in typing.get_args(kind):
            yield from numbers_in(each, within)
    for key, value in inner.items():
        yield from (f".{key}{rest}" for rest in numbers_in(value, (*within, kind)))


def nearest_metric(metric: str, paths: bool = True) -> str:
    """The known metric that is most like this one, a path only if `paths`; "" if this one is known."""
    known = ["failed", "failed_rate", "throttled"]
    known += (f"{name}.{statistic}" for name in STEPS | OPERATIONS for statistic in STATISTICS)
    if paths:
        known += (path[1:] for path in numbers_in(Results) if path not in (".schema", ".exit_code"))
    of_all = re.sub(r"\[[^]]*\]\.", ".", metric)  # server_ready.p95 for a group's server_ready[students].p95
    if any(re.fullmatch(re.escape(name).replace("NAME", "[^.]+"), of_all) for name in known):
        return ""
    return difflib.get_close_matches(metric, known, 1, 0.0)[0]


def exit_code(left: bool, interrupted_by: int | None, cut_short: bool, failed: bool) -> ExitCode:
    """The one decision on how a run ends. `failed`: a condition was met.

    | left on the hub | interrupted | cut short | failed | code |
    | yes             | any         | any       | any    | 4    |
    | no              | SIGINT      | any       | any    | 130  |
    | no              | SIGTERM     | any       | any    | 143  |
    | no              | no          | yes       | any    | 1    |
    | no              | no          | no        | yes    | 1    |
    | no              | no          | no        | no     | 0    |
    """
    if left:
        return ExitCode.LEFT_BEHIND
    if interrupted_by is not None:
        return ExitCode(128 + interrupted_by)
    return ExitCode.FAILED if cut_short or failed else ExitCode.OK


LONG_PINGS_S = {"p95": 1.0, "max": 3.0}  # longer ones make people doubt the hub
MANY_THROTTLED = 0.25  # of the starts


def but_of(results: Results) -> Iterator[str]:
    """What to know of a run that passed: its warnings, and what its numbers say.

    A search takes the hub to where it is slow, and a purge is no load: of these, the warnings are all.
    """
    yield from results.warnings
    if results.command == PURGE or results.capacity:
        return
    ping, servers = results.operations.get("ping"), results.servers
    full = results.hub.metrics.fullness if results.hub.metrics else ""
    if ping and ping.failed:
        yield f"everybody else saw errors: {ping.failed} of {counted(ping.count, 'ping')} failed"
    if ping and any((ping.enough(name) or 0.0) > limit_s for name, limit_s in LONG_PINGS_S.items()):
        cause = full and f": {full.partition(':')[0]}"
        yield f"everybody else waited up to {duration_text(ping.latency_s.max)}{cause}"
    elif full:
        yield full
    if servers and servers.throttled > MANY_THROTTLED * servers.requested:
        starts = counted(servers.requested, "start was", "starts were")
        yield f"{servers.throttled} of {starts} throttled: people arrived faster than the hub starts servers"
    metrics = dict.fromkeys(condition(judged.condition).metric for judged in results.conditions)
    for metric in () if results.options.get("once") else metrics:
        if (number := too_few(metric, results.operations)) is not None:
            yield f"{metric} is only the maximum of {counted(number, 'sample')}: too few for a percentile"


def too_few(metric: str, operations: Mapping[str, Operation]) -> int | None:
    """The number of samples behind a condition's percentile, if it is too small; else None."""
    name, _, statistic = metric.removeprefix("operations.").replace(".latency_s", "").rpartition(".")
    operation = operations.get(name)
    number = operation.count - operation.failed if operation else 0
    return number if operation and number < ENOUGH.get(statistic, 0) else None


def outcome_of(
    ends: Mapping[str, Event | None], expected: int, never: str, began_s: float, starting: Collection[str]
) -> Json:
    """What servers and people have in common, from how each user's way ended; None: it has not.

    Those still `starting` may have no event. Those that have not ended count under the reason `never`.
    Reasons of spawns that differ only in numbers, like 2/3 nodes and 1/3 nodes, count as the first of them.
    """
    failures, alike = list[Failure](), dict[str, str]()
    for end in ends.values():
        if end and end.reason:
            text, of_spawn = end.reason.text, end.reason.kind in (Kind.SPAWN, Kind.TIMED_OUT)
            text = alike.setdefault(re.sub(r"\d+(?![\d)])", "#", text), text) if of_spawn else text
            failures.append(Failure(end.user, text, end.message, round(end.ended_s - began_s, 4)))
    unfinished = [name for name, end in ends.items() if end is None]
    under_way = len({*unfinished, *starting} - (ends.keys() - unfinished))
    not_begun = max(0, expected - len(ends) + len(unfinished) - under_way)
    reasons = collections.Counter(failure.reason for failure in failures)
    reasons[never] = under_way + not_begun
    counts = {reason: count for reason, count in reasons.most_common() if count}
    return {"reasons": counts, "failures": failures, "under_way": under_way, "not_begun": not_begun}


def people_of(
    rows: People,
    expected: int,
    cut_short: bool,
    group: str = "",
    *,
    began_s: float = 0.0,
    starting: Collection[str] = (),
) -> Rehearsed:
    """The outcome of all people, or of a group; who fails after getting to work counts as both."""
    ends = dict[str, Event | None]()
    at_work = []
    for user, row in rows.items():
        came = [row[step] for step in PERSONAL if step in row]  # the others were only deleted
        if came and (not group or any(end.group == group for end in came)):
            failed = [event for event in came if event.reason]
            ends[user] = failed[0] if failed else row.get("at_work")
            at_work += [row] * ("at_work" in row)
    never = "cut short before getting to work" if cut_short else "never came"
    outcome = outcome_of(ends, expected, never, began_s, starting)
    steps = ("at_work", *PERSONAL[: PERSONAL.index("at_work")])
    took_s = {step: sum(row[step].latency_s for row in at_work if step in row) for step in steps}
    means = {step: total_s / len(at_work) for step, total_s in took_s.items() if total_s}
    number = sum(outcome["reasons"].values())
    return Rehearsed(expected=expected, at_work=len(at_work), failed=number, until_work_s=means, **outcome)


def servers_of(
    people: People, requested: int, cut_short: bool, *, began_s: float = 0.0, starting: Collection[str] = ()
) -> Servers:
    """The outcome of all servers, some of which may still be `starting` at the end."""
    starts = {user: row["server_ready"] for user, row in people.items() if "server_ready" in row}
    lost = {end.user: end for row in people.values() for end in row.values() if end.outcome == "lost"}
    never = "never started, or cut short" if cut_short else "never started"
    ready = sorted((end for end in starts.values() if not end.reason), key=lambda end: -end.latency_s)
    throttled_s = [end.throttled_s for end in starts.values() if end.throttled_s is not None]
    first_due_s = min((end.due_s for end in starts.values()), default=0.0)
    waits_s = [(end.asked_s or end.due_s) - end.due_s for end in ready if end.throttled]
    messages = {end.message for end in starts.values() if end.message}
    return Servers(
        requested=requested,
        ready=len(ready),
        failed=requested - len(ready),
        lost=len(lost),
        given_up=sum(end.reason.kind is Kind.TIMED_OUT for end in starts.values() if end.reason),
        throttled=sum(end.throttled > 0 for end in starts.values()),
        throttling_began_s=min(throttled_s) - first_due_s if throttled_s else None,
        throttling_s=sum(waits_s) / len(ready) if ready else 0.0,
        slowest=[
            {"user": end.user, "ready_s": end.latency_s, "throttled": end.throttled, "message": end.message}
            for end in ready[:5]
        ],
        usual_message=messages.pop() if len(messages) == 1 else "",
        phases=mean_phases([end.phases for end in ready if end.phases]),
        **outcome_of(starts | lost, requested, never, began_s, starting),
    )


STARTING = ("due_s", "throttled_s", "asked_s", "ended_s")  # moments of a start


def servers_timeline(people: People, began_s: float, load_ended_s: float = math.inf) -> Json:
    """Columns: moments of each server, in seconds since the run began, in the order of their due moments."""
    rows = [row for row in people.values() if "server_ready" in row]
    rows.sort(key=lambda row: row["server_ready"].due_s)
    starts = [row["server_ready"] for row in rows]
    bad = [[row[step] for step in PERSONAL[1:] if step in row and row[step].reason] for row in rows]

    def since(moments_s: Iterable[float | None]) -> list[float | None]:
        return [None if at_s is None else rounded(max(0.0, at_s - began_s)) for at_s in moments_s]

    def succeeded(step: str) -> list[float | None]:
        return since(row[step].ended_s if step in row and not row[step].reason else None for row in rows)

    def failed(lost: bool) -> list[float | None]:
        ends_s = ([end.ended_s for end in ends if (end.outcome == "lost") is lost] for ends in bad)
        return since(next(iter(moments_s), None) for moments_s in ends_s)

    left = (row["stop_server"].sent_s if "stop_server" in row else math.inf for row in rows)
    phases = [as_json(start.phases) or {} for start in starts]
    return {
        "user": [start.user for start in starts],
        "group": [start.group for start in starts],
        "ready": [start.reason is None for start in starts],
        **{name: since(getattr(start, name) for start in starts) for name in STARTING},
        "opened_s": succeeded("visit"),
        "loaded_s": succeeded("page"),
        "works_s": succeeded("at_work"),
        "failed_s": failed(lost=False),
        "lost_s": failed(lost=True),
        "left_s": since(sent_s if sent_s < load_ended_s else None for sent_s in left),
        "phases": [{name: rounded(took[name]) for name in PHASES if took} or None for took in phases],
    }


def users_of(run: Run) -> Users:
    """The outcome of the users, or with --own-servers of the servers.

    A hub that fails to stop a server answers 204 all the same, forgets the server, and deletes the user: only
    its metrics tell. A run that stopped none is not to blame.
    """
    cleaned, snapshots = run.cleaned, run.monitor.snapshots
    stopped = run.record.count(["stop_server"])
    failures = grown(snapshots, "server_stop_seconds_count", "failure") if stopped else 0.0
    made = max(len(run.claims.confirmed), cleaned.deleted + len(cleaned.left_behind))
    return dataclasses.replace(
        cleaned,
        created=0 if run.plan.command == PURGE else made,
        stopped_while_starting=len(run.site.interrupted),
        stops_failed=int(failures) if len(snapshots) > 1 else None,
    )


def results_of(run: Run) -> Results:
    """The results of a run; its conditions are judged by all the rest."""
    plan, rows, users, snapshots = run.plan, run.record.people, users_of(run), run.monitor.snapshots
    cut_short = bool(run.troubles) or run.interrupted_by is not None
    expected = plan.count if plan.command == STRESS and not plan.find_capacity else 0
    starting = run.site.crowd.starting.copy()
    ends: Json = {"began_s": run.began_s, "starting": starting}
    servers = servers_of(rows, expected, cut_short, **ends) if expected or plan.own_servers else None
    if servers and plan.own_servers:
        numbers: Json = {"removed": users.deleted, "kept": users.kept, "left_behind": users.left_behind}
        servers = dataclasses.replace(servers, **numbers)
        users = dataclasses.replace(users, created=0, deleted=0, kept=0, left_behind=())
    people = people_of(rows, expected, cut_short, **ends) if expected and plan.rehearses else None
    groups = dict[str, Rehearsed]()
    for each in plan.event:
        ends["starting"] = {name for name, person in starting.items() if person.plan.group == each.group}
        groups[each.group] = people_of(rows, each.count, cut_short, each.group, **ends)
    if people:
        failed, tried = people.failed, plan.count
    elif plan.command == PURGE:
        failed, tried = len(run.cleaned.left_behind), len(run.existing)
    elif servers and not plan.find_capacity:
        failed, tried = servers.failed + servers.lost, plan.count
    else:
        failed, tried = run.record.failures(plan.load), run.record.count(plan.load)
    restarts = restarts_in(snapshots)
    warnings = [*run.troubles, *run.warnings, *run.site.public.warnings]
    profiles = [group.profile for group in plan.groups if isinstance(group.profile, dict)]
    if servers and servers.phases and any("profile" not in profile for profile in profiles):
        warnings.append(
            "KubeSpawner ignores a --profile without the key `profile`: servers were the usual ones"
        )
    if restarts:
        warnings.append(f"the hub restarted during the run{f', {restarts} times' if restarts > 1 else ''}")
    shots = {name: monitor.snapshots for name, monitor in run.monitors.items()}
    tables = {name: process_timeline(each, run.began_s) for name, each in shots.items()}
    timeline = {
        "operations": run.record.timeline(run.began_s),
        "servers": servers_timeline(rows, run.began_s, run.load_ended_s) if servers else None,
        "hub": tables.pop("hub"),
        "watched": {name: table for name, table in tables.items() if table},
        "load_ended_s": rounded(run.load_ended_s - run.began_s),
    }
    to_servers = run.site.public.traffic.summarise() if plan.opens else None
    results = Results(
        schema=1,
        tool={"name": "hub-stress-test", "version": __version__},
        command=plan.command,
        hub=HubSide(
            endpoint=run.hub.endpoint,
            version=run.hub.version,
            restarts=restarts if snapshots else None,
            metrics=hub_figures(snapshots, run.load_ended_s, servers.ready if servers else 0),
            metrics_missing=run.monitor.missing or None,
            proxy=run.session.proxy_to(run.hub.endpoint) or None,
        ),
        started=utc(run.started),
        finished=utc(datetime.now(timezone.utc)),
        duration_s=run.session.clock() - run.began_s,
        options=plan.options(),
        users=users,
        failed=failed,
        failed_rate=failed / tried if tried else None,
        servers=servers,
        people=people,
        groups=groups or None,
        operations=run.record.summarise(),
        http=dataclasses.replace(run.session.traffic.summarise(), servers=to_servers),
        capacity=run.capacity,
        aftermath=aftermath_of(shots, bool(run.cleaned.kept)),
        proxy_check=run.proxy_check,
        timeline=timeline,
        warnings=warnings,
    )
    return _judged(results, run)


def _judged(results: Results, run: Run) -> Results:
    """The same results with their conditions, exit code, but and advice."""
    plan, capacity = run.plan, run.capacity
    conditions = [] if capacity else judgements_of(plan, as_json(results))
    bad = any(judgement.held for judgement in conditions) or bool(capacity and capacity.rate_per_s is None)
    not_ours = plan.command == PURGE and run.interrupted_by is not None  # which made none of what is left
    left = bool(results.users.stops_failed or (run.cleaned.left_behind and not not_ours))
    code = exit_code(left, run.interrupted_by, bool(run.troubles), bad)
    results = dataclasses.replace(results, conditions=conditions, exit_code=int(code))
    but = list(but_of(results)) if code is ExitCode.OK else []
    act = but or code in (ExitCode.FAILED, ExitCode.LEFT_BEHIND)
    sentences = advice(results, run.record.kinds(), time_out_in_front(run.record.people)) if act else ()
    return dataclasses.replace(results, but=but, advice=list(sentences))


# ==== Sections, and the summary as text =====================================================================

Row = tuple[str, str]  # a label and a sentence


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and rows of cells, which the summary shows as text and the report as HTML.

    Without a header, rows are a label and a sentence; a label that repeats is shown once.
    """

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    left: Collection[int] = (0,)  # the columns that are aligned to the left


ENTITLED = {ExitCode.OK: "PASSED", ExitCode.FAILED: "FAILED", ExitCode.LEFT_BEHIND: "LEFT SOMETHING BEHIND"}
REASONS_SHOWN = 5
NAMES_SHOWN = 3
ENOUGH_SERVERS = 50  # to divide the hub's memory among them


def verdict_of(results: Results) -> tuple[str, str]:
    """The word and the sentence that a run comes down to."""
    word = ENTITLED.get(ExitCode(results.exit_code), "INTERRUPTED")
    servers, people, operations = results.servers, results.people, results.operations
    if results.command == PURGE:
        return word, f"{counted(results.cleaned.deleted, thing(results.own_servers))} removed"
    if results.capacity:
        return word, _capacity_sentence(results.capacity, results.options)
    outcome: Outcome
    if people:
        outcome, missing = people, people.expected - people.at_work
        sentence = f"{people.at_work:,} of {counted(people.expected, 'person', 'people')} {goal_of(results)}"
        later = f"; {people.failed - missing} failed afterwards" * (people.failed > missing)
    elif servers:
        outcome, missing = servers, servers.failed
        sentence = f"{servers.ready:,} of {counted(servers.requested, 'server')} became ready"
        later = f"; {counted(servers.lost, 'was', 'were')} lost while held" * bool(servers.lost)
    else:
        load = [name for name in operations if name in (results.options.get("mix") or DEFAULT_MIX)]
        count, failed = (sum(getattr(operations[name], key) for name in load) for key in ("count", "failed"))
        requests_text = counted(count, "activity report" if load in ([], ["activity"]) else "request")
        return word, f"{count - failed:,} of {requests_text} {'was' if count == 1 else 'were'} accepted"
    early = unfinished_text(outcome, missing) if outcome.under_way or outcome.not_begun else ""
    if early and word == "FAILED" and results.options.get("fail_fast") and not results.warnings:
        early += " (--fail-fast)"
    sentence += early + later + waits_text(operations.get("at_work" if people else "server_ready"))
    return word, sentence + "; the proxy lost connections afterwards" * results.leaking


def goal_of(results: Results) -> str:
    """What people did when they had what they came for."""
    groups = results.options.get("event") or [results.options]
    goals = {
        "got to work" if group.get("work") else
        "opened their page" if any(map((results.options | group).get, OPENING.split())) else
        "got a server"
        for group in groups
    }  # fmt: skip
    return goals.pop() if len(goals) == 1 else "got what they came for"


def unfinished_text(outcome: Outcome, missing: int) -> str:
    """How many of the missing ones failed, and of a run that ended early, where the others were."""
    numbers = {"cut short": outcome.under_way, "not begun": outcome.not_begun}
    others = "".join(f", {number:,} {place}" for place, number in numbers.items() if number)
    return f", {missing - sum(numbers.values()):,} failed{others}"


def waits_text(operation: Operation | None) -> str:
    """How long half, nearly all, and the slowest of those that succeeded waited; empty if none did."""
    if not operation or operation.latency_s.max is None:
        return ""
    p95_s = operation.enough("p95")
    nearly_all = "" if p95_s is None else f", 95 % at most {duration_text(p95_s)}"
    half, slowest = duration_text(operation.latency_s.p50), duration_text(operation.latency_s.max)
    return f"; half waited {half}{nearly_all}, the slowest {slowest}"


def _capacity_sentence(capacity: Capacity, options: Json) -> str:
    """The result of a search; of people also in which step, and whether --count fits --within."""
    if capacity.rate_per_s is None:
        bound = capacity.generator_bound
        cause = "this tool could not send the first rate" if bound else "no rate was sustained"
        return f"the capacity was not found: {cause if capacity.finished else 'the search did not finish'}"
    at_least = "at least " if capacity.generator_bound or not capacity.finished else ""
    people, servers = capacity.people_per_minute, capacity.servers_reporting_every_300_s
    if not people:
        rate = round(capacity.rate_per_s) if capacity.rate_per_s >= 10 else capacity.rate_per_s
        sustained = f"this hub sustains {at_least}{counted(rate, 'request')} per second"
        reports = f": the activity reports of {servers or 0:,} running servers, one every 300 s each"
        return sustained + reports * bool(servers)
    within_s, for_s = options.get("within"), options.get("duration") or FIRST_STEPS[STRESS][1]
    count, found_with = options["count"] if within_s else 300, round(capacity.rate_per_s * for_s)
    sentence = f"this hub takes {at_least}{counted(people, 'person', 'people')} a minute"
    if found_with == options.get("max_servers"):
        sentence += f" with at most {counted(found_with, 'server')} at a time"
    sentence += f" (found with {counted(found_with, 'person', 'people')} in {duration_text(for_s)})"
    sentence += f": a class of {count} in {duration_text(60 * count / people)}"
    if not within_s:
        return sentence
    needed = 60 * count / within_s
    times = math.floor(10 * people / needed + 1e-6) / 10  # rounded down
    fits = "fits," if times >= 1 else "not known:" if at_least else "does not fit:"
    in_time = f"{count} in {duration_text(within_s)} are {needed:.4g} a minute"
    return f"{sentence}; {in_time}: {fits} {at_least}{times:g} times"


def differences_to(baseline: Json | None, results: Results) -> list[str]:
    """What makes a comparison pointless: another command or hub, other people, or other things they do."""
    if not baseline:
        return []
    hubs = (baseline.get("hub", {}), as_json(results.hub))
    options = (baseline.get("options", {}), results.options)
    pairs: dict[str, Iterable[Any]] = {"the command": (baseline.get("command"), results.command)}
    pairs |= {f"the hub's {key}": [hub.get(key) for hub in hubs] for key in ("endpoint", "version")}
    if baseline.get("command") == results.command:
        for row in OPTIONS.values():
            if row.compared and row.key in results.options:
                pairs[row.flag] = [_option_text(row.key, given.get(row.key)) for given in options]
    return [f"{name} was {old}, and is {new} now" for name, (old, new) in pairs.items() if old != new]


DURATIONS = tuple(row.key for row in OPTIONS.values() if row.kind is duration)


def _option_text(key: str, value: Any) -> str:
    """An option's value in a comparison; of an event the groups with what was given for each."""
    if not value or value is True:
        return "given" if value else "not given"
    if key == "event":
        groups = ([f"{key} {_option_text(key, v)}" for key, v in group.items() if v] for group in value)
        return "; ".join(map(", ".join, groups))
    return f"{value:g}s" if key in DURATIONS else str(value)


def facts(results: Results, baseline: Json | None = None) -> Section:
    """The but, goals, what was tested, its outcome and why, duration, cleanup, and what to do next."""
    hub = results.hub
    through = f", through {hub.proxy}" if hub.proxy else ""
    by_default = not results.options["fail_if"]  # then the other rows say whether anything failed
    goals = [each for each in results.conditions if not (by_default and each.condition == FAILED.text)]
    why = "because" if results.exit_code < ExitCode.SIGINT else "note"
    rows = [
        *(("but", sentence) for sentence in results.but),
        *_tested_rows(results),
        *((why, reason) for reason in results.warnings if reason not in results.but),
        *(("goals", goal_text(goal, results.operations)) for goal in goals),
        *(("baseline", difference) for difference in differences_to(baseline, results)),
        ("hub", f"{hub.version} at {hub.endpoint}{through}"),
        *_server_rows(results),
        *_failed_rows(results),
        *_request_rows(results),
        ("duration", duration_text(results.duration_s)),
        *_hub_rows(results),
        *(("where the time went", sentence) for sentence in time_spent(results)),
        *_cleanup_rows(results),
        *_proxy_rows(results),
        *(("next", sentence) for sentence in results.advice),
    ]
    return Section("Summary", rows)


def _tested_rows(results: Results) -> Iterator[Row]:
    """What a search for capacity tried, and what its result means."""
    capacity = results.capacity
    if not capacity:
        return
    lasts = duration_text(results.options["duration"] or FIRST_STEPS[STRESS][1])
    mix = ", ".join(f"{title_of(name)}s" for name in results.options.get("mix") or DEFAULT_MIX)
    tested = f"{mix} only: starting servers, memory and nodes were not"
    if results.command == STRESS:
        tested = f"people who arrive at a fixed rate for {lasts}, new ones in each step"
    below = "rate sustained" if capacity.rate_per_s else "last rate tried"
    yield "tested", f"{tested}. The latencies below are of the {below}"
    if servers := capacity.servers_reporting_every_300_s:
        usual_s = SERVER_REPORTS_EVERY_S
        every_s = max(usual_s, math.ceil(usual_s * MANY_SERVERS / (REPORTS_SHARE * servers)))
        reports = f"the reports of {MANY_SERVERS:,} servers with JUPYTERHUB_ACTIVITY_INTERVAL={every_s}"
        yield "activity", f"{reports} take at most {share_text(REPORTS_SHARE)} of this"
    if capacity.limited_by:
        yield "limit", capacity.limited_by


BOUNDS = {">": "above {}", ">=": "at {} or more", "<": "below {}", "<=": "at {} or less"}


def goal_text(judged: Judgement, operations: Mapping[str, Operation] | None = None) -> str:
    """A condition as a goal, reached if it was not met: ✓ server_ready.p95 4.60 s (fails above 60 s)."""
    asked = condition(judged.condition)
    number, relative = too_few(asked.metric, operations or {}), asked.unit == "x"
    value = "not measured" if judged.value is None else value_text(judged.value, asked.metric)
    value += f", of {counted(number, 'sample')}" if number is not None else ""
    if judged.value and judged.baseline:
        before = value_text(judged.baseline, asked.metric)
        value += f", {judged.value / judged.baseline:.3g}x the baseline's {before}"
    limit = judged.limit if relative else asked.limit
    limits = [] if limit is None else [re.sub(r"\.0+ ", " ", value_text(limit, asked.metric))]
    limits += [f"{asked.limit:g}x the baseline"] * relative
    mark = "✗" if judged.held else "✓"
    return f"{mark} {asked.metric} {value} (fails {BOUNDS[asked.comparison].format(', '.join(limits))})"


def _server_rows(results: Results) -> Iterator[Row]:
    """The outcome of servers and people."""
    servers, people, options = results.servers, results.people, results.options
    if not servers or not servers.requested:  # of a purge, or a search
        return
    counts = f"{servers.ready} ready{unfinished_text(servers, servers.failed)}"
    counts += f", {servers.lost} lost" * bool(servers.lost)
    if servers.throttled:
        began = duration_text(servers.throttling_began_s)
        counts += f"; {servers.throttled} throttled, from {began} after the first start"
    yield "servers", f"{servers.requested} requested, {pace_text(options)}; {counts}"
    own = results.hub.metrics
    if not servers.ready and servers.given_up and own and (started := own.spawns.get("success")):
        by_the_hub = f"by the hub's own clock {started.count:.0f} of them became ready, after "
        by_the_hub += f"{duration_text(started.mean_s)} on average"
        if started.count > servers.given_up:  # others start servers too
            by_the_hub = f"the hub counted {counted(round(started.count), 'successful start')}"
        after = "" if options.get("event") else f" after {duration_text(options['server_timeout'])}"
        yield "timed out", f"{counted(servers.given_up, 'server')} timed out{after}; {by_the_hub}"
    if options["hold"] and "stay" in results.operations and not people:
        hold = duration_text(options["hold"])
        yield "hold", f"{hold}; the hub says which servers stayed, --visit asks the servers too"
    if people:
        failed = unfinished_text(people, people.failed)
        yield "people", f"{people.expected} expected; {people.at_work} at work{failed}"
    for given, group in zip(options.get("event") or (), (results.groups or {}).values()):
        waits = waits_text(results.operations.get(f"at_work[{given['name']}]"))
        pace = f"{group.expected} expected, {pace_text(options | given | {'event': None})}"
        failed = unfinished_text(group, group.failed)
        yield "people", f"{given['name']}: {pace}; {group.at_work} at work{failed}{waits}"


def _failed_rows(results: Results) -> Iterator[Row]:
    """Why people or servers failed, the commonest reasons first, and what slowed the slowest servers down."""
    outcome = results.people or results.servers
    failures = collections.defaultdict[str, list[Failure]](list)
    for failure in outcome.failures if outcome else ():
        failures[failure.reason].append(failure)
    by_number = sorted(failures.items(), key=lambda item: -len(item[1]))
    for reason, alike in by_number[:REASONS_SHOWN]:
        users = sorted((failure.user for failure in alike), key=natural)
        shown = users[: NAMES_SHOWN if len(users) > NAMES_SHOWN + 1 else None]
        more = f" and {len(users) - len(shown)} more, all in --results" if len(users) > len(shown) else ""
        moments_s = [failure.failed_s for failure in alike]
        first, last = duration_text(min(moments_s)), duration_text(max(moments_s))
        when = f"first at {first} of the run, last at {last}" if first != last else f"at {first} of the run"
        yield "failed", f"{len(users)} × {reason} ({', '.join(shown)}{more}), {when}"
    if others := sum(len(alike) for _, alike in by_number[REASONS_SHOWN:]):
        yield "failed", f"{others} × something else: see the results file"
    if by_number:
        name = min((failure.user for failure in by_number[0][1]), key=natural)
        log = f"kubectl logs deploy/hub -n NAMESPACE --since-time={results.started}"
        pods = f"look with: {log} | grep -w {name}"
        file = f"look for {name}, from {results.started} on"
        yield "hub's log", pods if on_kubernetes(results) else file
    slowest = []
    for server in results.servers.slowest[:NAMES_SHOWN] if results.servers else ():
        causes = [f"throttled {server['throttled']} ×"] * bool(server["throttled"])
        if server["message"] not in ("", results.servers and results.servers.usual_message):
            causes.append(f"longest at: {server['message']}")
        if causes:
            slowest.append(f"{duration_text(server['ready_s'])}, {server['user']}: {', '.join(causes)}")
    if slowest:
        yield "slowest", "; ".join(slowest)


def _request_rows(results: Results) -> Iterator[Row]:
    """Why requests failed, by operation, and how many were sent; people's steps have failed elsewhere."""
    operations, http = results.operations, results.http
    for name in sorted_operations(operations):
        if name not in PERSONAL and "[" not in name:
            for reason, number in list(operations[name].errors.items())[:REASONS_SHOWN]:
                yield "errors", f"{title_of(name, results.own_servers)}: {number} × {reason}"
    monitoring = f"{share_text(http.observer_share or 0)} monitoring"
    to_hub = " to the hub" if http.servers else ""
    retries = counted(http.retries, "retry", "retries")
    yield "requests", f"{http.requests:,}{to_hub} ({monitoring}, {retries})"
    if servers := http.servers:
        answers = ", ".join(f"{number:,} × {status}" for status, number in servers.statuses.items())
        retries = counted(servers.retries, "retry", "retries")
        yield "requests", f"{servers.requests:,} to servers ({retries}): {answers}"


def _hub_rows(results: Results) -> Iterator[Row]:
    """The hub's own figures, or why they were not read."""
    own, missing = results.hub.metrics, results.hub.metrics_missing
    if missing:
        figures = "figures (CPU, memory, event-loop lag, its own request times)"
        yield "hub's own", f"{figures} were not read: {missing}"
    if not own:
        return
    cpu = f"CPU {own.cpu_s:.1f} s, on average {share_text(own.cpu_share)} of a processor"
    if own.cpu_share_max > own.cpu_share:
        cpu += f", at most {share_text(own.cpu_share_max)}"
    memory = f"memory {bytes_text(own.rss_before_bytes)} before, {bytes_text(own.rss_after_bytes)} after"
    if results.servers and results.servers.ready >= ENOUGH_SERVERS and own.rss_per_server_bytes is not None:
        memory += f", {bytes_text(own.rss_per_server_bytes)} a server"
    lags = {"p95": own.event_loop_lag_p95_s, "max": own.event_loop_lag_max_s}
    late = [
        f"{'≤ ' * (name == 'max' or lag_s <= LOOP_INTERVAL_S)}{duration_text(lag_s)} ({name})"
        for name, lag_s in lags.items()
        if lag_s is not None and own.event_loop_samples >= ENOUGH.get(name, 0)
    ]
    yield "hub's own", f"{cpu}; {memory}" + f"; event loop late by {', '.join(late)}" * bool(late)


def _cleanup_rows(results: Results) -> Iterator[Row]:
    """What was removed, what is still there, and what the hub cannot see."""
    cleaned, run = results.cleaned, results.options["run"]
    remedy, noun = purge_command(run, results.own_servers), thing(results.own_servers)
    find = pods_command(run, results.own_servers)
    done = f"{counted(cleaned.deleted, noun)} {'removed' if results.own_servers else 'deleted'}"
    traces = [still_starting(cleaned.stopped_while_starting)] if cleaned.stopped_while_starting else []
    if failed := cleaned.stops_failed:
        they, their = ("it was", "its pod") if failed == 1 else ("they were", "their pods")
        traces.append(
            f"the hub failed to stop {counted(failed, 'server')} during this run, though it said that {they} "
            f"stopped: {their} and volumes may still be there. Look with: {find}"
        )
    elif failed is None and "stop_server" in results.operations:
        unread = "only the hub's own figures tell whether it could stop the servers, and they were not read"
        traces.append(f"{unread}. On Kubernetes look with: {find}")
    if cleaned.kept:
        yield "cleanup", f"{counted(cleaned.kept, noun)} kept, as asked; remove them with: {remedy}"
    elif left := cleaned.left_behind:
        are = "MAY BE" if TO_LIST in cleaned.in_the_way else "IS" if len(left) == 1 else "ARE"
        yield "cleanup", f"{done}; {len(left):,} {are} STILL THERE:"
        yield "cleanup", names_text(left)
        if cleaned.in_the_way:
            yield "cleanup", cleaned.in_the_way
        yield "cleanup", f"{'when that is solved, ' * bool(cleaned.in_the_way)}remove them with: {remedy}"
    else:
        yield "cleanup", f"{done}, none left{' on the hub' * bool(traces)}"
    if on_kubernetes(results) and not cleaned.kept and not failed:
        traces.append(f"volumes stay where delete_pvc is off or their class retains them: {find}")
    yield from (("cleanup", trace) for trace in traces)


PROJECTION = (  # Linux has 28,232 ports for outgoing connections: 28,232 / (300 * 2 per minute) = 47 minutes
    "Each failed reconnect of an open tab adds one, for an hour. If 300 open tabs kept reconnecting twice a "
    "minute to ended servers that still have a route, the proxy's 28,000 ports would last 47 minutes; then "
    "every page of the hub answers 503"
)


def _proxy_rows(results: Results) -> Iterator[Row]:
    """The result of the check of the proxy; connections that it keeps to the hub, as error pages prove."""
    check, changes = results.proxy_check, (results.aftermath or {}).get("hub", {})
    if check and check.verdict != UNDECIDED:  # which is a warning
        yield "proxy", f"{check.verdict}: {check.reason}" + (f". {PROJECTION}" if check.leaking else "")
    files, pages = changes.get("open_files"), changes.get("proxy_error_pages")
    more, fetched = (change.grown or 0.0 if change else 0.0 for change in (files, pages))
    if files and more > FILES_TO_MENTION and fetched >= PROOF_SHARE * more:
        counts = f"{more:.0f} open files more than before ({files.before:.0f}, now {files.after:.0f})"
        kept = "its proxy fetched as many error pages, and keeps these connections open"
        yield "aftermath", f"the hub has {counts}: {kept}"


def sorted_operations(operations: Collection[str]) -> list[str]:
    """Operations in the order of the table of steps, a group's after that of all, custom ones last."""
    places = {name: place for place, name in enumerate(STEPS)}
    return sorted(operations, key=lambda name: (places.get(name.partition("[")[0], len(places)), name))


def comparison_section(baseline: Json, results: Results, names: Iterable[str]) -> Section:
    """Old, new and ratio of these operations, like 840ms→1.25s 1.49x; a dash for too few samples."""
    columns, rows = ("p50", "p95", "max"), []
    for name in names:
        if name not in baseline.get("operations", {}):
            continue
        both, cells = (baseline["operations"][name], as_json(results.operations[name])), []
        for column in columns:
            enough = (run["count"] - run["failed"] >= ENOUGH.get(column, 1) for run in both)
            old, new = (run["latency_s"][column] if many else None for run, many in zip(both, enough))
            ratio = f" {new / old:.{2 if new < 10 * old else 0}f}x" if old and new else ""
            cells.append(f"{duration_text(old)}→{duration_text(new)}".replace(" ", "") + ratio)
        failed = "→".join(str(run["failed"]) for run in both)
        rows.append((title_of(name, results.own_servers), *cells, failed))
    before = (baseline.get("capacity") or {}).get("rate_per_s")
    after = results.capacity and results.capacity.rate_per_s
    if before and after:
        rows.append(("capacity per s", f"{before:.4g}→{after:.4g} {after / before:.2f}x", "", "", ""))
    return Section("Against the baseline", rows, ("against baseline", *columns, "failed"))


HOUSEKEEPING = ("create_users", "list_users", "delete_user")  # of interest only when something went wrong


def tables_of(results: Results, baseline: Json | None) -> Iterator[Section]:
    """The tables below the facts, in summary and report: rates tried, latencies, old beside new."""
    if results.capacity:
        header, unit, rows = ("tried per s", "sent per s", "p95"), 1, []
        if results.command == STRESS:
            header, unit = ("tried a minute", "arrived a minute", "server ready p95"), 60
        for step in results.capacity.steps:
            rates = (f"{unit * rate:.4g}" for rate in (step.rate_per_s, step.sent_per_s))
            outcome = (duration_text(step.p95_s), str(step.failed), step.held or "none: sustained")
            rows.append((*rates, *outcome))
        yield Section("Capacity", rows, (*header, "failed", "condition met"), left=(4,))
    quiet = HOUSEKEEPING if results.exit_code == ExitCode.OK and results.command != PURGE else ()
    columns, shown = ("mean", "p50", "p95", "p99", "max"), {}
    for name in sorted_operations(results.operations):
        operation = results.operations[name]
        if operation.failed or name.partition("[")[0] not in quiet:
            latencies = (duration_text(operation.enough(column)) for column in columns)
            numbers = (str(operation.count), str(operation.failed))
            shown[name] = (title_of(name, results.own_servers), *numbers, *latencies)
    if shown:
        yield Section("Latency", [*shown.values()], ("operation", "count", "failed", *columns))
    if baseline:
        yield comparison_section(baseline, results, shown)


def render_summary(results: Results, baseline: Json | None = None, **look: Any) -> str:
    """The page that an operator reads: the verdict, then facts and tables; `look` as of `render_page`."""
    sections = [facts(results, baseline), *tables_of(results, baseline)]
    return render_page(": ".join(verdict_of(results)), sections, **look)


NO_BREAK = "\N{NO-BREAK SPACE}"
SPELLED = {"✓": "ok", "✗": "FAIL", "×": "x", "–": "-", "→": "->", "≤": "<="}
_COLOURS = {"PASSED": 32, "FAILED": 31, "LEFT": 31, "INTERRUPTED": 33}
_COLOURS |= {"but": 33, "because": 33, "failed": 31, "next": 36}


def render_page(
    headline: str,
    sections: Iterable[Section],
    *,
    colour: bool = False,
    width: int = 100,
    encoding: str = "utf-8",
) -> str:
    """A sentence, and sections below it, with characters that the encoding has; some first words coloured."""
    wrap = functools.partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
    page = wrap(spelled(headline, encoding), subsequent_indent="  ")
    for number, section in enumerate(sections):
        page += [""] if number else []
        rows = [[spelled(cell, encoding) for cell in row] for row in section.rows]
        if section.header:
            page += _table_lines([section.header, *rows], section.left, width)
            continue
        indent = max(len(row[0]) for row in rows) + 2
        for label, sentence in labelled_once(rows):
            page += wrap(label.ljust(indent) + unbroken(sentence), subsequent_indent=" " * indent)
    if colour:
        word = re.compile(rf"^({'|'.join(_COLOURS)})\b")
        page = [
            word.sub(lambda match: f"\033[1;{_COLOURS[match[0]]}m{match[0]}\033[0m", line) for line in page
        ]
    return "\n".join(page).replace(NO_BREAK, " ")


def unbroken(sentence: str) -> str:
    """The sentence with the command at its end in one piece: half of one, pasted, would do something else."""
    command = r"(hub-stress-test purge|kubectl (get|logs)) .*"
    return re.sub(command, lambda match: match[0].replace(" ", NO_BREAK), sentence)


def spelled(text: str, encoding: str) -> str:
    """The text in characters that the encoding has: ok for a ✓."""
    for sign, letters in SPELLED.items():
        text = text if sign.encode(encoding, "ignore") else text.replace(sign, letters)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def labelled_once(rows: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Labels and sentences, a label that repeats left out."""
    for before, (label, sentence) in zip([("", ""), *rows], rows):
        yield ("" if label == before[0] else label, sentence)


def _table_lines(rows: Sequence[Sequence[str]], left: Collection[int], width: int) -> Iterator[str]:
    """Rows in columns; the cells of the widest columns wrap between words until they fit the width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    least = [max(len(word) for cell in column for word in cell.split(" ")) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > width and widths != least:
        widest = max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n]))
        widths[widest] -= 1
    for row in rows:
        cells = [textwrap.wrap(cell, room, break_on_hyphens=False) for cell, room in zip(row, widths)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            sides = [str.ljust if column in left else str.rjust for column in range(len(parts))]
            yield "  ".join(side(part, room) for side, part, room in zip(sides, parts, widths)).rstrip()


# ==== The plan in words, for a dry run ======================================================================

DRY_RUN = "DRY RUN: no request was sent; a run would do this"
MEANWHILE = (
    f"{PING_RATE_PER_S:g} pings per second; with read:metrics, the hub's figures every {METRICS_EVERY_S:g} s"
)


def people_planned(plan: Plan) -> Iterator[Row]:
    """Who arrives when, what they do and send, how long that takes, and what it costs."""
    people = timetable(plan)
    usual, worst = (duration_text(max(row[1] for row in rows)) for rows in (people, timetable(plan, True)))
    for group in plan.groups:
        name = f"{group.group}: " if group.group else ""
        moments_s = [arrives_s for arrives_s, _, their_group in people if their_group is group]
        first, last = (f"after {duration_text(moments_s[n])}" if moments_s[n] else "at once" for n in (0, -1))
        pace = f"{counted(group.count, 'person', 'people')}, {pace_text(group.options())}"
        pace += f" (--seed {plan.seed})" * bool(plan.seed and group.within_s)
        few_first = not plan.is_open and min(group.count, plan.batch_size) > FIRST_STARTS
        pace += f" ({FIRST_STARTS} until one server is ready)" * few_first
        yield "people", f"{name}{pace}: the first {first}, the last {last}"
        book, parts = group.notebook, len(group.page.parts) if group.page else 0
        cells = f"{counted(len(book.parts), 'cell')} of {book.text}" if book else "6*7 again and again"
        cells += f" in a kernel (at most {duration_text(group.cell_timeout_s)} each"
        steps = {
            f"starts a server (at most {duration_text(group.server_timeout_s)})": True,
            f"opens its page (at most {duration_text(group.visit_timeout_s)})": group.opens,
            f"fetches {counted(parts, 'part')} of the page": parts,
            f"runs {cells}, {duration_text(group.think_s)} between two)": group.work,
            f"stays until {duration_text(group.hold_s)} after the last has got this far": (
                group.hold_s and not group.stay_s
            ),
            f"leaves {duration_text(group.stay_s)} after getting to work": group.stay_s,
        }
        yield "each person", name + ", ".join(step for step, planned in steps.items() if planned)
    of = {name: sum(group.count for group in plan.groups if STEPS[name].wanted(group)) for name in PERSONAL}
    again = sum(group.count for group in plan.groups if group.opens and STEPS["stay"].wanted(group))
    creates = 0 if plan.own_servers else math.ceil(plan.count / plan.batch_size)
    removed = 0 if plan.keep else plan.count
    numbers = {"check": 2 + plan.opens, "list": 2 - plan.keep, "create": creates, "start": plan.count}
    numbers |= {"read": of["visit"] + of["stay"], "stop": removed, "delete": removed}
    numbers |= {"visit": of["visit"] + again, "page": of["page"], "kernel": of["kernel_ready"]}
    counts = ", ".join(counted(number, noun) for noun, number in numbers.items() if number)
    yield "requests", f"{counts}; a progress stream for each slow start; {MEANWHILE}"
    expected = f"about {usual} from the first start on if servers start in {USUAL_START_S:g} s"
    yield "duration", f"{expected}, at most {worst} if every step takes as long as it may"
    kernels = at_one_time([row for row in people if row[2].work], "kernel")
    volumes = "each with a volume where the hub gives one"
    yield "cost", f"{at_one_time(people, 'server')}, {volumes}, and {kernels} at one time"
    if plan.check_proxy:
        yield "proxy check", f"after that, with one of the servers or one more: {CHECK_COSTS}"


def load_planned(plan: Plan) -> Iterator[Row]:
    """Which requests are sent for users without servers, and how long that takes."""
    load = Load(plan, "", [""] * plan.count)
    lasts_s = load.schedule.lasts_s if load.schedule else plan.duration_s
    threads, total = load.workers * plan.processes, sum(plan.load.values())
    rounds = 1 if lasts_s else math.ceil(plan.count / threads)
    unlimited = lasts_s and not load.schedule
    number = "as many requests as that allows" if unlimited else counted(load.planned, "request")
    mix = ", ".join(f"{share_text(weight / total)} {name}" for name, weight in plan.load.items())
    pace = f" {rate_text(plan.rate_per_s)}" if plan.rate_per_s else f" for {lasts_s:g} s" if lasts_s else ""
    yield "load", f"sending{pace} from {counted(threads, 'thread')}: {number}, {mix}"
    lists, creates = counted(2 - plan.keep, "list"), counted(math.ceil(plan.count / 10), "create")
    deletes = "" if plan.keep else f", {counted(plan.count, 'delete')}"
    yield "requests", f"besides, 2 checks, {lists}, at most {creates}{deletes}; {MEANWHILE}"
    in_turn = f"{counted(rounds, 'request')} of each thread, after up to 1 s each"
    worst_s = (lasts_s or 0.0) + rounds * (1 + OPEN_GRACE_S + RETRY_WINDOW_S + DEFAULT_TIMEOUT)
    worst = f"at most {duration_text(worst_s)} if the hub answers as slowly as it may"
    yield "duration", f"{duration_text(lasts_s) if lasts_s else in_turn}, {worst}"


def plan_section(plan: Plan) -> Section:
    """What a run of this plan does and costs, as far as that can be known without asking the hub."""
    kind, prefix, step = f"{thing(plan.own_servers)}s", username(0, plan.run or "")[:-1], plan
    rows: list[Row] = [("hub", plan.endpoint or "not given yet")]
    if plan.find_capacity:
        step = first_step(plan)
        bound = f" or {counted(plan.max_servers, 'server')} would run" if plan.max_servers else ""
        steps = f"in steps of {duration_text(step.duration_s)}, usually a dozen"
        rows.append(("search", f"{steps}, until a condition is met{bound}; below is the first step"))
    if plan.command == PURGE:
        every = "" if plan.run else ", and those of every --run"
        requests_text = "2 checks, 2 lists; for each of them a stop if it runs, and a delete"
        rows += [(kind, f"{prefix}<n>{every}"), ("requests", requests_text)]
        rows += [("duration", f"as long as that takes for {plan.batch_size} at a time")]
    else:
        names = names_text(f"{prefix}{n}" for n in range(1, step.count + 1))
        first = "; those that are there come first" if plan.command == ACTIVITY else ""
        rows.append((kind, f"{names}, or as many after the highest number in use{first}"))
        rows += people_planned(step) if plan.command == STRESS else load_planned(step)
    if plan.command != STRESS:
        rows.append(("cost", "no servers, no kernels"))
    removed = f"{kind} are removed; times out after {duration_text(plan.cleanup_timeout_s)} without progress"
    rows.append(("cleanup", f"{kind} are kept" if plan.keep else removed))
    mine = "!user=<owner>" * plan.own_servers
    scopes = sorted(needed_scopes(plan.command, plan.own_servers))
    rows.append(("scopes", ", ".join(scope + mine for scope in scopes)))
    if plan.command == STRESS and plan.opens:
        whose = "the token" if plan.visit_token else "the token, or better a second one"
        rows.append(("scopes", f"access:servers{mine}, for {whose} in JUPYTERHUB_VISIT_TOKEN"))
    rows.append(("conditions", "; ".join(limit.text for limit in plan.conditions)))
    return Section("Plan", rows)


# ==== The report ============================================================================================

STYLE = """
:root { color-scheme: light dark }
body { max-width: 1160px; margin: 0 auto; padding: 1rem; background: Canvas; color: CanvasText;
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.35rem } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
h3 { font-size: .95rem; margin: 1rem 0 0 } summary h2 { display: inline }
h1 b { padding: .1em .5em; border-radius: .3em; color: #fff; background: #b91c1c }
b.PASSED { background: #15803d } b.INTERRUPTED { background: #a16207 }
p, th { color: #777; font-weight: normal }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; white-space: nowrap }
tr { border-bottom: 1px solid #8884 }
.left, .words td { text-align: left; vertical-align: top }
.words td + td { white-space: normal; overflow-wrap: anywhere }
p.but { color: #a16207; font-weight: bold }
@media (max-width: 600px) { .words td:first-child { white-space: normal; max-width: 5em } }
"""
BLUE, AMBER, RED, VIOLET, TEAL = "#3b82f6", "#f59e0b", "#ef4444", "#8b5cf6", "#0f766e"
PHASE_COLOURS = ("#64748b", "#eab308", "#a8763e", "#0ea5e9", "#f472b6", "#84cc16")  # in the order of PHASES
STATES = {  # of a server, by colour; a later one is drawn on top
    "requested": "#94a3b8",
    "throttled": AMBER,
    "starting": BLUE,
    **dict(zip(PHASES.values(), PHASE_COLOURS)),
    "failed": RED,
    "ready": "rgba(34,163,85,.3)",
    "opening": "#06b6d4",
    "loading the page": TEAL,
    "starting a kernel": VIOLET,
    "at work": "#22a355",
    "failed after it was ready": RED,
    "lost": "#a21caf",
}
GROUP_COLOURS = ("#db2777", "#854d0e", "#7c3aed", "#0891b2", "#be123c", "#4d7c0f")
Trace = dict[str, Any]  # of plotly
Span = tuple[int, float, float]  # which server was in a state, from when to when
DETAILS = ("hub", "hold", "slowest", "requests", "duration", "hub's own")  # rows that are folded
WORDS = {step.title: step.meaning for step in STEPS.values() if step.meaning}  # in tables and plots
WORDS |= {
    "count": "how many there were, failures included",
    "throttled": "the hub refused the start for the moment (429), and it was tried again",
    "lost": "the server had become ready, and stopped while it was held",
    "p50": "half of those that succeeded took at most this long",
    "p95": "95 % of those that succeeded took at most this long; a dash: too few samples to say",
}


def render_report(results: Results, baseline: Json | None = None) -> str:
    """One HTML page, which needs no network: the summary's words, and what happened when."""
    word, sentence = verdict_of(results)
    headline = re.sub(r"(?<=\d) (?=ms|s|min|h|%)", NO_BREAK, sentence)
    rows = facts(results, baseline).rows
    first, later = ([row for row in rows if (row[0] in DETAILS) is folded] for folded in (False, True))
    body = [
        element("p", tested_text(results)),
        f"<h1>{element('b', word, word.split()[0])} {html.escape(headline)}</h1>",
        *(element("p", f"but: {sentence}", "but") for sentence in results.but),
        section_html(Section("Summary", [row for row in first if row[0] != "but"])),
        *_server_plots(results.timeline),
        *_ping_plot(results.timeline),
    ]
    for section in tables_of(results, baseline):
        body += [section_html(section), *(_latency_plot(results) if section.title == "Latency" else ())]
    shown = "".join(body)
    legend = [row for row in WORDS.items() if f">{row[0]}<" in shown or f'"{row[0]}"' in shown]
    body += [section_html(Section("Words", legend))] if legend else []
    appendix = [Section("Details", later), *_appendix(results)]
    body += [section_html(section, folded=True) for section in appendix]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>hub-stress-test: {html.escape(f'{word}: {sentence}')}</title><style>{STYLE}</style>"
        f"<script>{importlib.import_module('plotly.offline').get_plotlyjs()}</script></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def element(tag: str, text: str, kind: str = "") -> str:
    """An HTML element with this text, of a class or none."""
    return f"<{tag}{f' class={kind}' if kind else ''}>{html.escape(text)}</{tag}>"


def tested_text(results: Results) -> str:
    """What was tested, on which hub, and when, in a sentence."""
    options, hub = results.options, results.hub
    did = [step.did for name, step in STEPS.items() if step.did and name in results.operations]
    mix = ", ".join(f"{title_of(name)}s" for name in options.get("mix") or DEFAULT_MIX)
    load = f"{mix} for {counted(options.get('count') or 0, 'user')} without servers"
    if results.command == PURGE:
        load = "removing the users of earlier runs"
    elif results.command == STRESS:
        people = f"{counted(options['count'], 'person', 'people')} ({pace_text(options)})"
        did[-2:] = [" and ".join(did[-2:])]
        load = f"{'people' if results.capacity else people} who {', '.join(did) or 'did not come'}"
    search = "the search for what this hub takes: " * bool(results.capacity)
    when = f"{results.started} to {results.finished}, with {results.tool['name']} {results.tool['version']}"
    return f"Tested: {search}{load}, on JupyterHub {hub.version} at {hub.endpoint}, {when}"


def section_html(section: Section, folded: bool = False) -> str:
    """A heading and a table, which scrolls by itself; rows without a header are sentences."""
    rows, lines = "", [section.header, *section.rows] if section.header else labelled_once(section.rows)
    for n, line in enumerate(lines):
        tag = "th" if section.header and n == 0 else "td"
        cells = (element(tag, cell, "left" * (column in section.left)) for column, cell in enumerate(line))
        rows += f"<tr>{''.join(cells)}</tr>"
    kind = "numbers" if section.header else "words"
    table = f'<div class="scroll"><table class="{kind}">{rows}</table></div>'
    heading = element("h2", section.title)
    return f"<details><summary>{heading}</summary>{table}</details>" if folded else heading + table


def _appendix(results: Results) -> Iterator[Section]:
    if own := results.hub.metrics:
        durations = {f"spawn: {name}": took for name, took in own.spawns.items()} | own.requests
        rows = [(name, f"{took.count:.0f}", duration_text(took.mean_s)) for name, took in durations.items()]
        yield Section("The hub's own clock", rows, ("handler", "count", "mean"))
    given = {name: value for name, value in results.options.items() if value not in (None, False, [])}
    given |= {name: ", ".join(given[name]) for name in ("fail_if", "watch") if name in given}
    rows_of_options = [(name.replace("_", "-"), _option_text(name, value)) for name, value in given.items()]
    yield Section("Options", rows_of_options)


def plot(traces: Sequence[Trace], height: int, y_title: str, **layout: Any) -> str:
    """A plot in HTML, whose x axis is the time since the run began."""
    axis = {"rangemode": "tozero", "tickformat": ",", "gridcolor": "#8884", "zerolinecolor": "#8888"}
    usual = {
        "margin": {"l": 52, "r": 12, "t": 26, "b": 42},
        "xaxis": axis | {"title": {"text": "seconds since the run began"}},
        "yaxis": axis | {"title": {"text": y_title}} | layout.pop("yaxis", {}),
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "itemsizing": "constant"},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#777"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "showlegend": True,
    }
    config = {"responsive": True, "displayModeBar": False}
    figure = {"data": traces, "layout": usual | layout, "config": config}
    values = json.dumps(figure, separators=(",", ":")).replace("<", "\\u003c")  # a name may hold </script>
    draw = f"Plotly.newPlot(document.currentScript.previousElementSibling,{values})"
    return f'<div class="plot" style="height:{height}px"></div><script>{draw}</script>'


def trace(name: str, x: Sequence[Any], y: Sequence[Any], colour: str, **more: Any) -> Trace:
    """A line of a plot."""
    return {"name": name, "x": x, "y": y, "mode": "lines", "line": {"color": colour, "width": 1.5} | more}


def spans_of(server: Json) -> Iterator[tuple[str, float | None, float | None]]:
    """The states of a server, and from when to when it was in each; None: never, infinite: to the end."""
    asked_s = server["due_s"] if server["asked_s"] is None else server["asked_s"]
    yield "requested", server["due_s"], asked_s if server["throttled_s"] is None else server["throttled_s"]
    yield "throttled", server["throttled_s"], asked_s
    yield "starting", asked_s, server["ended_s"]
    begin_s = asked_s
    for name, took_s in (server["phases"] or {}).items():
        yield PHASES[name], begin_s, begin_s + took_s if took_s else None
        begin_s += took_s
    if not server["ready"]:
        yield "failed", server["ended_s"], math.inf
        return
    over_s = min(math.inf if server[end] is None else server[end] for end in ("lost_s", "left_s"))
    loaded_s = server["opened_s"] if server["loaded_s"] is None else server["loaded_s"]
    yield "ready", server["ended_s"], over_s
    yield "opening", server["ended_s"], server["opened_s"]
    yield "loading the page", server["opened_s"], loaded_s
    yield "starting a kernel", loaded_s, server["works_s"]
    yield "at work", server["works_s"], over_s
    yield "failed after it was ready", server["failed_s"], over_s
    yield "lost", server["lost_s"], math.inf


def states_of(servers: Json) -> dict[str, list[Span]]:
    """Which server was in which state, from when to when."""
    states: dict[str, list[Span]] = {state: [] for state in STATES}
    for n, cells in enumerate(zip(*servers.values())):
        for state, begin_s, end_s in spans_of(dict(zip(servers, cells))):
            if begin_s is not None and end_s is not None and begin_s < end_s:
                states[state].append((n, begin_s, end_s))
    return states


def server_curves(servers: Json, until_s: float, points: int = 300) -> dict[str, list[float]]:
    """How many servers were waiting, starting, ready, at work, failed and lost at each moment."""
    moments = [until_s * n / points for n in range(points + 1)]
    curves: dict[str, list[float]] = {}
    for state, spans in states_of(servers).items():
        begins, ends = sorted(span[1] for span in spans), sorted(span[2] for span in spans)
        began, ended = ([bisect.bisect_right(row, at_s) for at_s in moments] for row in (begins, ends))
        curves[state] = list(map(operator.sub, began, ended))
    curves["waiting"] = list(map(operator.add, curves["requested"], curves["throttled"]))
    curves["ready"] = list(map(operator.sub, curves["ready"], curves["at work"]))
    curves["at_s"] = [round(at_s, 3) for at_s in moments]
    return {
        name: curves[name] for name in ("at_s", "failed", "lost", "at work", "ready", "starting", "waiting")
    }


def _server_plots(timeline: Json) -> Iterator[str]:
    """How many servers were in each state, and how long each was, in the order in which they were due."""
    servers, until_s = timeline["servers"], timeline["load_ended_s"] or 0.0
    if not servers or not servers["user"]:
        return
    curves, areas = server_curves(servers, until_s), list[Trace]()
    stack: Trace = {"x": curves.pop("at_s"), "stackgroup": "one", "mode": "none"}
    for state, numbers in curves.items():
        colour = STATES.get(state, AMBER)
        areas += [stack | {"name": state, "y": numbers, "fillcolor": colour}] * any(numbers)
    states, colours = states_of(servers), STATES.copy()
    for n, group in enumerate(servers["group"]):
        if group:  # a strip before the first moment
            colours.setdefault(f"[{group}]", GROUP_COLOURS[(len(colours) - len(STATES)) % len(GROUP_COLOURS)])
            states.setdefault(f"[{group}]", []).append((n, -0.02 * until_s, -0.005 * until_s))
    bars, width = [], max(1.0, min(9.0, 380 / len(servers["user"])))
    for state, spans in states.items():
        bar = trace(state, [], [], colours[state], width=width) | {"text": [], "hoverinfo": "text"}
        for n, began_s, end_s in spans:  # one line with gaps: there may be thousands
            end_s = max(began_s, min(end_s, until_s))
            lasted = f" for {duration_text(end_s - began_s)}" if began_s >= 0 else ""
            bar["x"] += (began_s, end_s, None)
            bar["y"] += (n + 1, n + 1, None)
            bar["text"] += (*[f"{servers['user'][n]}: {state}{lasted}"] * 2, "")
        bars += [bar] * bool(spans)
    yield element("h2", "Servers") + plot(areas, 200, "servers")
    yield element("h3", "How long each waited, in the order in which they were due")
    downwards = {"autorange": "reversed", "rangemode": "normal"}
    yield plot(bars, 360, "server", hovermode="closest", yaxis=downwards)


def _latency_lines(title: str, operation: Json, colour: str, high: str) -> Iterator[Trace]:
    """An operation's median and a high statistic over time, in s; marks on the axis where some failed."""
    for statistic, opacity in (("p50", 0.5), (high, 1.0)):
        more = {"mode": "lines+markers", "marker": {"size": 4}, "opacity": opacity}
        yield trace(f"{title} {statistic}", operation["at_s"], operation[f"{statistic}_s"], colour) | more
    failed = {at_s: f"{n} failed" for at_s, n in zip(operation["at_s"], operation["failed"]) if n}
    if failed:
        marks = trace(f"{title} failed", list(failed), [0] * len(failed), RED)
        yield marks | {"mode": "markers", "cliponaxis": False, "text": list(failed.values())}


def _ping_plot(timeline: Json) -> Iterator[str]:
    """What everybody else felt, beside how busy the hub and other processes were."""
    if not (ping := timeline["operations"].get("ping")):
        return
    hub, traces = timeline["hub"], [*_latency_lines("ping", ping, BLUE, "max")]
    most, processes = 105, {"hub's CPU": hub} if hub else {}
    processes |= {f"CPU of {name}": process for name, process in timeline["watched"].items()}
    for (title, process), colour in zip(processes.items(), itertools.cycle((RED, VIOLET, TEAL, "#a8763e"))):
        if share := [round(100 * (share or 0.0)) for share in process["cpu_share"]]:
            moments, most = [process["at_s"][0], *process["cpu_at_s"]], max(most, *share)
            traces.append(trace(title, moments, [share[0], *share], colour, shape="vh") | {"yaxis": "y2"})
    right: Json = {"title": {"text": "CPU, % of a processor"}, "overlaying": "y", "side": "right"}
    right |= {"range": [0, most], "dtick": 25, "showgrid": False, "automargin": True}
    yield element("h2", "What everybody else felt, and how busy the hub was")
    yield plot(traces, 220, "ping, s", yaxis2=right)


def _latency_plot(results: Results) -> Iterator[str]:
    """How long people waited, or how long the requests of the load took, over time."""
    felt, traces = results.options.get("mix") or DEFAULT_MIX, list[Trace]()
    felt = ("server_ready", "at_work") if results.command == STRESS else felt
    for name, colour in zip(felt, itertools.cycle((BLUE, AMBER, VIOLET, TEAL))):
        if operation := results.timeline["operations"].get(name):
            traces += _latency_lines(title_of(name, results.own_servers), operation, colour, "p95")
    if traces:
        yield element("h3", "Over time, by when each was due") + plot(traces, 200, "s")


# ==== Files =================================================================================================


def render_results(results: Results, baseline: Json | None = None) -> str:
    """The results as JSON; the timeline, which nobody reads by eye, on one line."""
    data = as_json(results)
    timeline = json.dumps(data.pop("timeline"))
    return f'{json.dumps(data, indent=2)[:-2]},\n  "timeline": {timeline}\n}}\n'


def write_files(plan: Plan, results: Results) -> Results:
    """Write the files that were asked for; the results, which fail when a file cannot be written any more."""
    files = (("report", plan.report, render_report), ("results", plan.results, render_results))
    for flag, path, render in files:
        try:
            if path:
                write_whole(path, render(results, plan.baseline))
        except OSError as error:
            sentence = f"--{flag} {path} could not be written: {error.strerror or error}"
            LOG.error(sentence)
            code, warnings = results.exit_code or int(ExitCode.FAILED), [*results.warnings, sentence]
            results = dataclasses.replace(results, warnings=warnings, exit_code=code)
    return results


FIXED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)  # nothing may take the place of such a file


def write_whole(path: str, text: str) -> None:
    """Write a file, or the one that a link points to, whole or not at all; stdout and pipes as they are.

    A file that is mounted, or stands in a folder of others, is written in place.
    """
    standard_output = False
    with contextlib.suppress(OSError):
        standard_output = os.path.samestat(os.stat(path), os.fstat(1))
    if standard_output or os.path.exists(path) and not os.path.isfile(path):
        with open(os.dup(1) if standard_output else path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    target = os.path.realpath(path)
    beside = f"{target}.{os.getpid()}.tmp"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if error.errno not in FIXED or not os.path.exists(target):
            raise
        try:
            with open(target, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            os.truncate(target, 0)  # rather nothing than half
            raise


# ==== The three commands ====================================================================================


def stress(run: Run) -> None:
    """Make users, start their servers, hold them."""
    plan = run.plan
    if plan.find_capacity:
        run.announce(f"How many people a minute? In steps of {duration_text(first_step(plan).duration_s)}")
        search(run)
        return
    noun = ("person", "people") if plan.rehearses else ("server",)
    run.announce(f"{counted(plan.count, *noun)}, {pace_text(plan.options())}")
    names = run.make_users(plan.count)
    run.send(Load(plan, run.hub.endpoint, names))
    if plan.is_open:
        run.warn_if_late(["start_server", "visit"], 0, "this machine was too slow")
    if plan.check_proxy and not run.session.stopping.is_set() and not run.session.hub_is_gone:
        run.check_proxy(names)


def activity(run: Run) -> None:
    """Report activity for users without servers; those that are there already come first."""
    plan, session = run.plan, run.session
    run.announce(f"{counted(plan.count, 'user')} without servers")
    users = [user["name"] for user in run.existing][: plan.count]
    users += run.make_users(plan.count - len(users)) if len(users) < plan.count else []
    if plan.find_capacity:
        search(run, users)
        return
    load = Load(plan, run.hub.endpoint, users)
    cpu_share = run.send(load)
    if not session.stopping.is_set():
        slow = "this machine was too slow: spread the load over more --processes"
        waiting = "all threads were waiting for the hub: give more --workers or --processes"
        unsent = load.planned - run.record.count(plan.load) if plan.rate_per_s else 0
        run.warn_if_late(plan.load, unsent, slow if cpu_share > BUSY else waiting)


def purge(run: Run) -> None:
    """Remove the users that earlier runs left behind."""
    LOG.info("Found %s to remove", counted(len(run.existing), thing(run.plan.own_servers)))
    if run.plan.own_servers and run.hub.version.startswith(("1.", "2.")):
        LOG.warning("This hub lists no stopped servers: if any were left, remove them on the hub's home page")
    run.site.states |= {user["name"]: server_state(user) for user in run.existing}
    if run.existing:
        run.cleaned = remove_users(run.site, functools.partial(is_test_user, run=run.plan.run))


def carry_out(plan: Plan) -> Results:
    """What a plan's run found, and wrote, also when something failed.

    Raises `SetupError`; nothing has been changed then.
    """
    interruption = Interruption()
    with on_signals(interruption):
        with contextlib.ExitStack() as closing:
            run = Run(plan, closing, interruption)
            try:
                {STRESS: stress, ACTIVITY: activity, PURGE: purge}[plan.command](run)
            except CutShort as error:
                run.troubles.append(str(error))
            except Stopped:
                LOG.debug("Stopped")
            finally:
                run.clean_up()
            run.session.close()  # so that what is still open on the hub is not ours
            run.look()
        return write_files(plan, results_of(run))


# ==== Command line, and an event's file =====================================================================


class _Parser(argparse.ArgumentParser):
    """Refuses bad usage in one sentence."""

    def error(self, message: str) -> Any:
        raise UsageError(message)


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of all options; its help shows those of a command, else those that all commands have."""
    parser = _Parser(
        prog="hub-stress-test",
        usage=f"hub-stress-test [OPTIONS] {command or 'COMMAND'} [OPTIONS]",
        description=COMMANDS.get(command, __doc__),
        epilog="DURATION: 90s, 5m or 1h; a number alone is in seconds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    commands = f"{', '.join(COMMANDS)}: see COMMAND --help"
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=commands)
    parser.add_argument("--version", action="version", version=f"hub-stress-test {__version__}")
    for about in HELP_GROUPS:
        group = parser.add_argument_group(about)
        for name, row in OPTIONS.items():
            if row.about == about and row.on:
                shown = {*([command] if command else COMMANDS)} <= {*row.on} - {*row.hidden_on}
                row.add_to(group, name, shown)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, completed from the environment. Raises `UsageError`; --help and --version end Python.

    Its `given` are the fields of the plan that the command line or an event's file has set.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for at, (word, following) in enumerate(zip(words, words[1:])):
        if word == "--log-to-file" and following in COMMANDS:  # a command, not the optional FILE
            words[at : at + 2] = [following, word]
            break
    parser = build_parser(next((word for word in words if word in COMMANDS), ""))
    namespace, unknown = parser.parse_known_args(words)
    given, command = vars(namespace), namespace.command
    misplaced = [row.flag for name, row in OPTIONS.items() if name in given and command not in row.on]
    for word in unknown + misplaced:
        if not word.startswith("-"):
            raise UsageError(f"{command} has no use for {word!r}")
        raise no_such(word.partition("=")[0].lstrip("-"), command)
    given |= {name: tuple(given[name]) for name, row in OPTIONS.items() if row.repeatable and name in given}
    if file := given.get("event"):
        unused = OPTIONS["dry_run"].excludes.split() if given.get("dry_run") else ()
        given = {name: value for name, value in read_table(file, 0).items() if name not in unused} | given
        of_groups = {"event", *OPTIONS["event"].excludes.split()}
        above = Plan(**{name: value for name, value in given.items() if name not in of_groups})
        groups = event_groups(file, above)
        if given.get("once"):
            alone: Json = {"count": 1, "after_s": 0.0, "within_s": 1.0, "rate_per_s": None}
            groups = tuple(dataclasses.replace(group, **alone) for group in groups)
        fields = given | {"event": groups, "count": sum(group.count for group in groups)}
    else:
        fields = given | decided_by_stages(command, given.get("rate_per_s"))
    args = argparse.Namespace(**vars(Plan()) | fields, given=given.keys() & OPTIONS.keys())
    args.endpoint = args.endpoint or from_environment(
        endpoint_url, "JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_URL"
    )
    args.token = args.token or from_environment(token_text, "JUPYTERHUB_API_TOKEN")
    args.visit_token = from_environment(token_text, "JUPYTERHUB_VISIT_TOKEN")
    return args


def no_such(name: str, place: str) -> UsageError:
    """The error of an option that a command does not have, or of a key that a table does not have."""
    places, dashes = (COMMANDS, "--") if place in COMMANDS else ((EVENT, GROUP), "")
    others = [other for row in OPTIONS.values() if row.name == name for other in row.on if other in places]
    near = difflib.get_close_matches(name, [row.name for row in OPTIONS.values() if place in row.on], 1, 0.5)
    hint = f": it is one of {' and '.join(others)}" if others else ""
    hint = hint or "".join(f": did you mean {dashes}{each}?" for each in near)
    return UsageError(f"{place} has no {f'option {dashes}{name}' if dashes else 'such key'}{hint}")


def from_environment(kind: Callable[[str], T], *variables: str) -> T | None:
    """The value of the first of these environment variables that is set. Raises `UsageError`."""
    for variable in variables:
        if text := os.environ.get(variable):
            try:
                return kind(text)
            except UsageError as error:
                raise UsageError(f"environment variable {variable}: {error}") from None
    return None


def read_table(file: EventFile, n: int) -> Json:
    """The fields that the n-th group of an event sets, or (0) the table above. Raises `UsageError`."""
    fields, place = Json(), GROUP if n else EVENT
    names = {row.name: name for name, row in OPTIONS.items() if place in row.on}
    for key, value in file.tables[n].items():
        try:
            if key not in names:
                raise no_such(key, place)
            fields[names[key]] = OPTIONS[names[key]].from_toml(value, os.path.dirname(file.path))
        except UsageError as error:
            raise file.error(n, key, f"{key}: {error}") from None
    return fields


def event_groups(file: EventFile, base: Plan) -> tuple[Plan, ...]:
    """The plans of an event's groups, whose keys go before those of all. Raises `UsageError`."""
    groups: list[Plan] = []
    for n in range(1, len(file.tables)):
        given = read_table(file, n)
        fields = decided_by_stages(STRESS, given.get("rate_per_s")) | given
        group = dataclasses.replace(base, **fields)
        for name, sentence in broken_rules(group, {*given} | {"keep"}):
            raise file.error(n, OPTIONS[name].name, sentence)
        needed = {"a name": ("group",), "a count": ("count",), "within or rate": ("within_s", "rate_per_s")}
        for need, names in needed.items():
            if not any(fields.get(name) for name in names):
                raise file.error(n, "", f"a group needs {need}")
        groups.append(group)
    (name, times), *_ = collections.Counter(group.group for group in groups).most_common(1)
    if times > 1:
        raise UsageError(f"--event {file.path}: there are {times} groups called {name}")
    return tuple(groups)


# ---- What can be used together -------------------------------------------------------------------


def decided_by_stages(command: str, rate: float | Schedule | None) -> Json:
    """What the stages of a rate decide: how many people come, or for how long requests are sent."""
    if not isinstance(rate, Schedule):
        return {}
    return {"count": rate.count} if command == STRESS else {"duration_s": rate.lasts_s}


def flags_text(names: str) -> str:
    """The options of these fields that a command line can have: --a, --b or --c."""
    flags = [OPTIONS[name].flag for name in names.split() if name in OPTIONS and STRESS in OPTIONS[name].on]
    return " or ".join(flags).replace(" or ", ", ", len(flags) - 2)


def broken_rules(plan: Plan, given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each given field that breaks a rule, with the sentence that says which."""
    given = [name for name in OPTIONS if name in given and getattr(plan, name)]
    for name in given:
        row = OPTIONS[name]
        needs, excludes = row.needs.split(), row.excludes.split()
        if plan.command not in row.rules_on or (name == "within_s" and plan.find_capacity):
            needs = excludes = []  # in a search, --rate is that of the first step
        if needs and not any(getattr(each, need) for each in (plan, *plan.groups) for need in needs):
            yield name, f"{row.flag} needs {flags_text(row.needs)}"
        for other in (other for other in excludes if other in given):
            yield other, f"{row.flag} and {OPTIONS[other].flag} exclude each other: give one of them"
        package, module = row.package
        if package and not optional(module):
            yield name, f"{row.flag} needs {package}, which is not installed: pip install {package}"
    for name in decided_by_stages(plan.command, plan.rate_per_s):
        row = OPTIONS[name]
        if name in given:
            yield name, f"the stages of --rate decide the {row.key}: leave out {row.flag}"
        if plan.find_capacity:
            yield "rate_per_s", "--find-capacity begins with one rate: --rate R, without stages"
    for name, other in (("count", "within_s"), ("within_s", "count")):
        if plan.command == STRESS and plan.find_capacity and name in given and other not in given:
            flag, too = OPTIONS[name].flag, OPTIONS[other].flag
            yield name, f"--find-capacity says who comes: leave out {flag}, or give {too} too"
    most = plan.max_servers
    if most and (first := first_step(plan).count) > most:
        yield "max_servers", f"--max-servers {most}: the first step has {first} people; lower --rate"
    if (processes := plan.processes) > (workers := plan.workers):
        yield "processes", f"--processes {processes} is more than --workers {workers}: each needs a thread"


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that a command line asks for."""
    fields = {field.name for field in dataclasses.fields(Plan)}
    return Plan(**{name: value for name, value in vars(args).items() if name in fields})


def validate(args: argparse.Namespace, *, paths: bool = True) -> None:
    """Raise `UsageError` unless all goes together. With `paths`, any number of results is a metric."""
    plan = plan_of(args)
    differs = [name for name in OPTIONS if getattr(plan, name) != getattr(Plan, name)]
    for row, value in ((OPTIONS[name], getattr(plan, name)) for name in differs):
        try:
            if row.kind and isinstance(value, (int, str)):  # as it would have to be on the command line
                row.kind(str(value))
        except UsageError as error:
            raise UsageError(f"{row.flag}: {error}") from None
    # The seeds' functions are always called with a count.
    for _, sentence in broken_rules(plan, getattr(args, "given", {*differs} - {"count"})):
        raise UsageError(sentence)
    load_operations(plan.operations)
    if unknown := sorted((plan.mix or {}).keys() - OPERATIONS.keys()):
        names = ", ".join(sorted(OPERATIONS))
        raise UsageError(f"--mix: there is no operation {unknown[0]!r}; there are {names}")
    for each in plan.fail_if:
        if why_not := _why_not_judged(each, plan, paths and not plan.find_capacity):
            raise UsageError(f"--fail-if {each.text!r}: {why_not}")
    needed = {
        "no endpoint: set JUPYTERHUB_ENDPOINT=https://YOUR-HUB/hub/api, or give --endpoint": plan.endpoint,
        "no token: set JUPYTERHUB_API_TOKEN, or give --token": plan.token,
    }
    missing = [sentence for sentence, value in needed.items() if value is None]
    if missing and not plan.dry_run:
        raise UsageError("; and ".join(missing))


PARTS = {"people": f"{OPENING} event", "proxy_check": "check_proxy", "servers": "own_servers", "capacity": ""}


def _measured_by(plan: Plan) -> set[str]:
    """The operations and parts of the results that a run by this plan has, or a step of its search."""
    names = set() if plan.command == PURGE else {*plan.load, "ping"}
    if plan.command == STRESS:
        steps = (step for step in STEPS.values() if step.act and any(map(step.wanted, plan.groups)))
        names |= {"start_server", *(step.name for step in steps)}
    if plan.find_capacity:
        return names - {"cell"}  # nobody works on in a search
    has = {"list_users": True, "create_users": plan.command != PURGE and not plan.own_servers}
    has |= {"delete_user": not plan.keep, "stop_server": not plan.keep and plan.command != ACTIVITY}
    has |= {"people": plan.rehearses, "proxy_check": plan.check_proxy}
    has |= {"servers": plan.command == STRESS or plan.own_servers}
    return names | {part for part in has if has[part]}


def _why_not_judged(limit: Condition, plan: Plan, paths: bool) -> str:
    """Why a run cannot judge a condition; "" when it can."""
    metric, groups = limit.metric, [group.group for group in plan.event]
    if nearest := nearest_metric(metric, paths):
        known = "in the results" if paths else "among failed, failed_rate, throttled and OPERATION.STAT"
        return f"no {metric!r} {known}; nearest is {nearest}"
    part, _, rest = metric.removeprefix("operations.").partition(".")
    part, name = part.partition("[")[0], rest.partition(".")[0]
    named = [*re.findall(r"\[([^]]*)\]", metric), *[name] * (part == "groups")]
    for unknown in (each for each in named if each not in groups):
        return f"there is no group {unknown!r}"
    if part == "aftermath" and name not in ("hub", *(each.parts[0] for each in plan.watch)):
        return f"{name} is measured only with --watch {name}=URL"
    if (paths or plan.find_capacity) and part in STEPS | PARTS and part not in _measured_by(plan):
        by = PARTS | {step.name: step.by for step in STEPS.values() if not step.always}
        flags = flags_text(by.get(part, ""))
        if plan.command == STRESS and flags and not plan.find_capacity:
            return f"{part} is measured only with {flags}"
        return f"{'a search' if plan.find_capacity else plan.command} does not measure {part}"
    if limit.unit not in ("", "x", *FITTING.get(unit_of(metric), ())):
        return f"the unit {limit.unit!r} does not fit {metric}"
    return "a multiple needs a --baseline" if limit.unit == "x" and not plan.baseline else ""


# ---- Logging, and the program --------------------------------------------------------------------


class _Redacting(logging.Formatter):
    """Log lines, tracebacks included, without the secrets of a run."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self._secrets = sorted(filter(None, secrets), key=len, reverse=True)  # one may be part of another

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line


def say(line: str) -> None:
    """Write a line to standard error, if anybody still reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def setup_logging(
    verbose: bool = False, log_to_file: bool | str = False, args: argparse.Namespace | None = None
) -> None:
    """Log to standard error, or to a file, and say where. Raises `UsageError` when that file cannot be used.

    A file that is there already is added to if it is a log of this tool, and refused otherwise.
    """
    plan = plan_of(args) if args else Plan()
    handler: logging.Handler = logging.StreamHandler()
    if log_to_file:
        path = _log_path(log_to_file)
        handler = logging.FileHandler(path, encoding="utf-8")
        say(f"Logging to {path}")
    values = (value for _, value in plan.headers)
    handler.setFormatter(_Redacting((plan.token or "", plan.visit_token or "", *values)))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.raiseExceptions = False  # a full disk would have a traceback for each line
    if log_to_file and args is not None:
        LOG.info("Started with %s", plan.options())
    sys.excepthook = lambda *error: LOG.critical("This is a bug of hub-stress-test", exc_info=error)


def _log_path(log_to_file: bool | str) -> str:
    """The path of a file to which a log may be added, its first line written."""
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
    new = f"{tempfile.gettempdir()}/hub-stress-test-{stamp}.log"
    path = new if log_to_file is True else str(log_to_file)
    try:
        with open(path, "a+", encoding="utf-8", errors="replace") as file:
            if not file.tell():
                file.write(f"{LOG_HEADER}, version {__version__}\n")
            file.seek(0)
            ours = file.readline().startswith(LOG_HEADER)
    except OSError as error:
        raise UsageError(f"--log-to-file {path}: cannot be written ({error.strerror})") from None
    if not ours:
        raise UsageError(f"--log-to-file {path}: this file is not a log of hub-stress-test; name another")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`, whose summary is on standard output."""
    results: Results | None = None
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parse_args(words)
        validate(args)
        setup_logging(args.verbose, args.log_to_file, args)
        plan = plan_of(args)
        if plan.dry_run:
            return show(functools.partial(render_page, DRY_RUN, [plan_section(seeded(plan))]))
        results = carry_out(plan)
        unseen = show(functools.partial(render_summary, results, plan.baseline))
        return results.exit_code or unseen
    except HubStressError as error:
        command = next((f"{word} " for word in words if word in COMMANDS), "")
        help = f" (see hub-stress-test {command}--help)" * isinstance(error, UsageError)
        say(f"hub-stress-test: {error}{help}")
        return int(error.exit_code)
    except KeyboardInterrupt as interrupt:
        if results is None:  # else everything has been removed
            say("hub-stress-test: Interrupted; nothing was changed.")
            return 128 + next(iter(interrupt.args), signal.SIGINT)
    return results.exit_code


def show(render: Callable[..., str]) -> int:
    """Print a page, as far as somebody reads it: `head` closes standard output early; 1 if a disk is full."""
    if not sys.stdout:  # it was closed from the start
        return 0
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    width = min(max(80, shutil.get_terminal_size().columns), 120) if terminal else 100
    try:
        print(render(colour=colour, width=width, encoding=sys.stdout.encoding or "utf-8"), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer
        if error.errno not in (errno.EPIPE, errno.EIO):  # the reader, or the terminal, has gone
            say(f"hub-stress-test: the page could not be printed: {error.strerror}")
            return int(ExitCode.FAILED)
    return 0


def program() -> None:
    """The command line as a program, which ends when `main` does, whatever its threads still wait for."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (it was closed from the start)
    code = main()
    logging.shutdown()
    os._exit(code)  # leaving Python would wait for threads, and so for a request that nobody answers


# ==== The seeds' functions: thin wrappers, for use as a library =============================================

Batches = Sequence[Sequence[str]]  # names of users, which start at the same time


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


def _for_each(work: Callable[[str], R], names: Sequence[str], concurrency: int) -> dict[str, R]:
    """The result for each user, of whom so many are worked on at the same time."""
    with ThreadPoolExecutor(concurrency) as pool:
        return dict(zip(names, pool.map(work, names)))


def find_existing_stress_test_users(
    endpoint: str, session: HubSession, *, run: str | None = None
) -> list[Json]:
    """All users that this tool's naming made (of one run, if named), but admins. Raises `HubRefused`."""
    return test_users(list_users(Hub(endpoint, session), Recorder()), run)


@timeit
def create_users(
    count: int,
    batch_size: int,
    endpoint: str,
    session: HubSession,
    existing_users: Sequence[Json | str] = (),
    *,
    run: str = "",
) -> list[list[str]]:
    """The names of exactly `count` new users, in batches, numbered after `existing_users`.

    Names that turn out to be taken are skipped. Raises `CutShort`; those made by then are deleted first.
    """
    claims = Claims()
    taken = [user if isinstance(user, str) else user["name"] for user in existing_users]
    try:
        return list(make_users(count, batch_size, Hub(endpoint, session), Recorder(), claims, taken, run))
    except CutShort:
        delete_users(claims.ours, endpoint, session, batch_size)
        raise


def start_server(
    username: str, endpoint: str, session: HubSession, profile: str | Json | None = None
) -> bool:
    """Whether the hub took the request to start this user's server; it may still be starting."""
    hub = Hub(endpoint, session)
    reply = hub.start(username, profile, session.clock() + SERVER_LIFECYCLE_TIMEOUT)
    if reply.status in (201, 202):
        return True
    if reply.call.lost and hub.state(username) in (ServerState.STARTING, ServerState.READY):
        return True  # it had taken a request whose answer was lost
    LOG.error("The server of %s did not start: %s", username, reply)
    return False


@timeit
def start_servers(
    users: Batches,
    endpoint: str,
    session: HubSession,
    profile: str | Json | None = None,
    *,
    timeout_s: float = SERVER_LIFECYCLE_TIMEOUT,
    fail_fast: int = 0,
    rate_per_s: float | Schedule | None = None,
) -> dict[str, Event]:
    """The `server_ready` event of each user; its `reason` is None when the server became ready.

    As many start at one time as the largest batch has (closed model), or one every 1 / `rate_per_s` seconds,
    however slow the hub (open model). Users who were not started (after `fail_fast` failures in a row, a
    stop, or three failures before any server was ready) are absent.
    """
    names, largest = [name for batch in users for name in batch], max(map(len, users), default=1)
    how: Json = {"server_timeout_s": timeout_s, "fail_fast": fail_fast, "rate_per_s": rate_per_s}
    plan = Plan(count=len(names), batch_size=largest, profile=profile, **how)
    site = Site(Hub(endpoint, session), plan, new_recorder())
    try:
        send_people(names, site)
    except CutShort as error:
        LOG.error("%s", error)
    return {name: row["server_ready"] for name, row in site.record.people.items() if "server_ready" in row}


def wait_for_servers_to_start(
    users: Batches, endpoint: str, session: HubSession, *, timeout_s: float = SERVER_LIFECYCLE_TIMEOUT
) -> dict[str, bool]:
    """Whether each server, already asked for, was ready within `timeout_s`."""
    hub, until_s = Hub(endpoint, session), session.clock() + timeout_s
    ready = dict.fromkeys((name for batch in users for name in batch), False)

    def wait(name: str) -> None:
        with contextlib.suppress(Failed):
            ready[name] = await_ready(name, hub, until_s, []) <= until_s

    with Team(session) as team:  # which cuts streams whose time has come
        for name in ready:
            team.start(wait, name)
    return ready


def stop_server(username: str, endpoint: str, session: HubSession, wait: bool = False) -> bool:
    """Whether the hub has stopped this server, or (without `wait`) has at least begun to."""
    state = AFTER_STOP.get(Hub(endpoint, session).stop(username).status, ServerState.UNKNOWN)
    if state is ServerState.STOPPING and wait:
        return wait_for_server_to_stop(username, endpoint, session)
    return state is not ServerState.UNKNOWN


@timeit
def stop_servers(
    usernames: Sequence[str], endpoint: str, session: HubSession, batch_size: int
) -> dict[str, bool]:
    """Whether the hub took the request to stop, for each user; `batch_size` are asked at a time."""
    return _for_each(lambda name: stop_server(name, endpoint, session), usernames, batch_size)


def wait_for_server_to_stop(username: str, endpoint: str, session: HubSession) -> bool:
    """Whether the server, or its user, was gone within `SERVER_LIFECYCLE_TIMEOUT` seconds."""
    if await_stopped(username, Hub(endpoint, session)) in (ServerState.STOPPED, ServerState.GONE):
        return True
    LOG.warning("The server of %s did not stop within %d s", username, SERVER_LIFECYCLE_TIMEOUT)
    return False


@timeit
def wait_for_servers_to_stop(stopped: dict[str, bool], endpoint: str, session: HubSession) -> None:
    """Update `stopped`, whether each server is stopping, to whether it has stopped."""
    asked = [name for name, was_asked in stopped.items() if was_asked]
    stopped.update(_for_each(lambda name: wait_for_server_to_stop(name, endpoint, session), asked, 10))


@timeit
def delete_users_after_stopping_servers(
    stopped: Mapping[str, bool], endpoint: str, session: HubSession
) -> bool:
    """Whether every user is gone; those whose server has not stopped are left alone."""
    names = [name for name, has_stopped in stopped.items() if has_stopped]
    return delete_users(names, endpoint, session) and all(stopped.values())


@timeit
def delete_users(usernames: Sequence[str], endpoint: str, session: HubSession, batch_size: int = 10) -> bool:
    """Whether every one of these users is gone, their servers stopped first."""
    states, plan = dict.fromkeys(usernames, ServerState.READY), Plan(PURGE, batch_size=batch_size)
    site = Site(Hub(endpoint, session), plan, Recorder(), states)
    return not remove_users(site, set(usernames).__contains__).left_behind


def run_stress_test(
    count: int,
    batch_size: int,
    token: str,
    endpoint: str,
    dry_run: bool = False,
    keep: bool = False,
    profile: str | Json | None = None,
    **options: Any,
) -> Json:
    """Make `count` users, start their servers, measure, and remove them all; the results, also of failures.

    With `dry_run` nothing is sent, and the result is the plan. `options` are further fields of `Plan`. Raises
    `UsageError` or `SetupError`; nothing has been changed then.
    """
    token = Secret(token)
    options |= {"token": token, "endpoint": endpoint, "dry_run": dry_run, "keep": keep, "profile": profile}
    return _results_as_json(Plan(STRESS, count=count, batch_size=batch_size, **options))


def notebook_activity_test(
    count: int,
    token: str,
    endpoint: str,
    workers: int,
    keep: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Json:
    """Report activity for `count` users without servers, from `workers` threads, and measure; the results.

    `dry_run`, `options` and errors are those of `run_stress_test`.
    """
    token = Secret(token)
    options |= {"token": token, "endpoint": endpoint, "dry_run": dry_run, "keep": keep}
    return _results_as_json(Plan(ACTIVITY, count=count, workers=workers, **options))


def purge_users(token: str, endpoint: str, dry_run: bool = False, **options: Any) -> Json:
    """Remove every user that this tool's naming made (of one `run`, if named), except admins; the results.

    Finding nothing is success. `dry_run`, `options` and errors are those of `run_stress_test`.
    """
    token = Secret(token)
    return _results_as_json(Plan(PURGE, token=token, endpoint=endpoint, dry_run=dry_run, **options))


def _results_as_json(plan: Plan) -> Json:
    """The results of a run, or, with `dry_run`, the plan. Raises `UsageError` as the command line does."""
    visit_token = plan.visit_token or from_environment(token_text, "JUPYTERHUB_VISIT_TOKEN")
    plan = dataclasses.replace(plan, visit_token=visit_token)
    validate(argparse.Namespace(**vars(plan)))
    if plan.dry_run:
        plan = seeded(plan)
        rows = [list(row) for row in plan_section(plan).rows]
        return {"command": plan.command, "options": plan.options(), "plan": rows}
    found: Json = as_json(carry_out(plan))
    return found


# ==== Locust users: the same load from many machines ========================================================
#
# Locust gives every process a greenlet for each user, and patches sockets, sleeps and locks so that they wait
# for each other. The code above works there as it is; below is only what stands between it and Locust.


def locust_is_loading() -> bool:
    """Whether Locust is loading this file, or one that imports it: only then are there user classes."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__") != "locust.util.load_locustfile":
        frame = frame.f_back
    return frame is not None


def locust_results(entries: Iterable[Any], load: Collection[str], throttled: int) -> Json:
    """What conditions are about, from Locust's statistics; its latencies include those of failures."""
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
    failed = sum(operations[name]["failed"] for name in operations.keys() & {*load, *PERSONAL})
    rate = failed / tried if tried else None
    return {"operations": operations, "failed": failed, "failed_rate": rate, "http": {"throttled": throttled}}


if locust_is_loading():
    import gevent  # type: ignore[import-untyped, unused-ignore]
    from locust import FastHttpUser, constant, events, task
    from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner
    from locust.stats import StatsEntry

    LOG.setLevel(logging.WARNING)  # and no progress: Locust shows its own
    SAY = LOG.getChild("locust")
    SAY.setLevel(logging.INFO)

    class FastSession:
        """What operations need of a session, over Locust's fast client, which reports each as `operation`."""

        def __init__(self, client: Any, plan: Plan) -> None:
            self.operation: str | None = None
            self._client = client
            self._headers = {"Authorization": f"token {plan.token}", "Accept-Encoding": "identity"}
            self._headers |= dict(plan.headers)

        def request(
            self, method: str, url: str, headers: Mapping[str, str] | None = None, **kwargs: Any
        ) -> Any:
            """Locust's own, with the token and without redirects."""
            kwargs = {"name": self.operation, "allow_redirects": False} | kwargs
            return self._client.request(method, url, headers=self._headers | dict(headers or {}), **kwargs)

        get = functools.partialmethod(request, "GET")
        post = functools.partialmethod(request, "POST")
        put = functools.partialmethod(request, "PUT")
        patch = functools.partialmethod(request, "PATCH")
        delete = functools.partialmethod(request, "DELETE")

    class LocustSite:
        """What the users of one process share in a test: the hub, the names, and who has to be deleted."""

        def __init__(self, environment: Any, worker: int) -> None:
            plan = locust_plan(environment)
            run = f"{plan.run}-{worker}"
            plan = dataclasses.replace(plan, run=run)
            self.session = get_session(plan.token or "", pool_maxsize=1000, headers=plan.headers)
            self.site, existing = open_site(plan, self.session, Recorder())
            self.site.record = Recorder(self._report)
            taken = [user["name"] for user in existing]
            self._names = (username(n, run) for n in itertools.count(first_free_index(taken, run)))
            self.cut_short = False
            self._fire, self._runner = environment.events.request.fire, environment.runner
            self._spare: list[str] = []
            self._making, self._cleaning = threading.Lock(), threading.Lock()
            self._cleaned: Users | None = None
            self._cutting = gevent.spawn(self._cut_streams)  # last, since what is above may fail

        def _report(self, event: Event) -> None:
            """Hand an event to Locust, in its milliseconds."""
            failure = HubStressError(event.reason.text) if event.reason else None
            times: Json = {"response_time": event.latency_s * 1000, "response_length": 0}
            self._fire(request_type="hub", name=event.step, exception=failure, context={}, **times)

        def _cut_streams(self) -> None:
            while self.session.pause(0.1):
                self.session.cut_streams()

        def new_user(self, batch: int) -> str:
            """The name of a user for this caller alone, made in a batch. Raises `HubRefused`."""
            site = self.site
            with self._making:
                while not self._spare:
                    missing = self._runner.target_user_count - len(site.claims.confirmed)
                    wanted = list(itertools.islice(self._names, max(1, min(batch, missing))))
                    self._spare = make_batch(wanted, site.hub, site.record, site.claims)
                return self._spare.pop(0)

        def clean_up(self) -> Json:
            """Delete the users that this process has made, once; the report for the master."""
            site = self.site
            with self._cleaning, on_signals(lambda number, _: leave_at_once(number, site)):
                if self._cleaned is None:
                    self._cutting.kill()
                    site.public.close_kernels()
                    self._cleaned = remove_made(site, Recorder())
            report: Json = {"deleted": self._cleaned.deleted, "left": list(self._cleaned.left_behind)}
            report |= {"starting": len(site.interrupted), "throttled": self.session.traffic.throttled}
            return report | {"run": site.plan.run, "cut_short": self.cut_short}

    def locust_plan(environment: Any) -> Plan:
        """The plan of a test, from the command line or the web form; raises `UsageError`."""
        options, given = vars(environment.parsed_options), Json()
        for name in LOCUST_OPTIONS.keys() - {"endpoint", "token", "headers"}:
            row = LOCUST_OPTIONS[name]
            kind, value = row.kind or bool, options[row.locust_flag[2:].replace("-", "_")]
            texts = (value or ()) if row.repeatable else [value] if value else ()
            try:
                values = tuple(kind(str(text)) for text in texts)
            except UsageError as error:
                raise UsageError(f"argument {row.locust_flag}: {error}") from None
            given |= {name: values} if row.repeatable else {name: values[0]} if values else {}
        if relative := next((limit for limit in given["fail_if"] if limit.unit == "x"), None):
            raise UsageError(f"--hub-fail-if {relative.text!r}: under Locust there is no baseline")
        people = [issubclass(kind, Person) for kind in environment.user_classes]
        if given.get("own_servers") and not all(people):
            remedy = "name that class at the end of the command line"
            raise UsageError(f"--hub-own-servers is for a Person alone: {remedy}")
        given |= {"endpoint": environment.host and endpoint_url(environment.host)} | environment.hub_secrets
        plan = Plan(STRESS if any(people) else ACTIVITY, **given)
        try:
            validate(argparse.Namespace(**vars(plan)), paths=False)
        except UsageError as error:
            raise UsageError(re.sub("--(?=[a-z])", "--hub-", str(error))) from None
        return dataclasses.replace(plan, count=0)  # which Locust knows

    class HubUser(FastHttpUser):
        """A Locust user with a user of their own on the hub."""

        abstract = True
        batch = 1  # users made by one request
        host = ""
        insecure = False  # certificates are verified
        network_timeout = connection_timeout = float(DEFAULT_TIMEOUT)

        @staticmethod
        def ssl_context_factory() -> ssl.SSLContext:
            """What requests would trust, which goes by REQUESTS_CA_BUNDLE."""
            return tls_context(trusted(requests.Session(), "https://x"))

        def on_start(self) -> None:
            shared: LocustSite | None = self.environment.hub_site
            if shared is None:  # its check has failed, and said why
                self.await_end()
            self.shared, self.site, self.plan = shared, shared.site, shared.site.plan

        def new_user(self) -> str:
            try:
                return self.shared.new_user(self.batch)
            except CutShort as error:
                SAY.error("%s", error)
                self.shared.cut_short = True
                self.await_end()

        def await_end(self) -> typing.NoReturn:
            """Do nothing until the test ends: Locust would replace a user who ends, or log a traceback."""
            while True:
                gevent.sleep(3600)

    class RunningServer(HubUser):
        """Sends what a running server sends, --hub-scale times as often; or the --hub-mix."""

        batch = 10

        def on_start(self) -> None:
            super().on_start()
            self.username, self.session = self.new_user(), FastSession(self.client, self.plan)
            self._interval_s: float = SERVER_REPORTS_EVERY_S / self.plan.scale
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
            name = self.session.operation = choose(self.plan.mix or DEFAULT_MIX, self._number)
            session: Any = self.session
            try:
                OPERATIONS[name](self.username, self.site.hub.endpoint, session)
            except Exception as error:
                now_s, reason = time.monotonic(), Reason(Kind.RAISED, f"{type(error).__name__}: {error}")
                self.site.record.add(Event(name, self.username, now_s, now_s, now_s, reason))

    class Person(HubUser):
        """Logs in, waits for their server, opens it, works, stays for --hub-stay, stops it and leaves."""

        wait_time = constant(0)
        visits = 0

        @task
        def visit(self) -> None:
            if self.visits == self.plan.visits or self.shared.cut_short:
                self.await_end()
            self.visits += 1
            try:
                journey(Visitor(self.new_user(), time.monotonic(), self.plan, self.site))
            except Stopped:
                pass
            except CutShort as error:
                SAY.error("%s", error)
                self.shared.cut_short = True

    def _add_options(parser: Any) -> None:
        for row in LOCUST_OPTIONS.values():
            row.add_to_locust(parser)

    def _begin(environment: Any, runner: Any, **_: Any) -> None:
        options = environment.parsed_options
        token = options.hub_token or os.environ.get("JUPYTERHUB_API_TOKEN")
        visit_token = from_environment(token_text, "JUPYTERHUB_VISIT_TOKEN")
        secrets: Json = {"token": Secret(token) if token else None, "visit_token": visit_token}
        environment.hub_secrets = secrets | {"headers": tuple(map(header, options.hub_header or ()))}
        options.hub_token = options.hub_header = None  # Locust hands options on to workers and pages
        endpoint = from_environment(endpoint_url, "JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_URL")
        environment.host = environment.host or options.hub_endpoint or endpoint
        environment.hub_site, environment.hub_reports = None, {}
        for kind in environment.user_classes:
            kind.host = environment.host or ""
        if isinstance(runner, WorkerRunner):
            runner.register_message("hub-clean-up", lambda **_: runner.stop(), concurrent=True)
            return
        if isinstance(runner, MasterRunner):

            def note(msg: Any, **_: Any) -> None:
                environment.hub_reports[msg.node_id] = msg.data

            runner.register_message("hub-cleaned-up", note)
        if options.headless:
            try:
                _check(environment)
            except HubStressError as error:
                sys.stderr.write(f"hub-stress-test: {error}\n")
                raise SystemExit(int(error.exit_code)) from None

    def _check(environment: Any) -> None:
        """Raise `HubStressError` unless a test could begin."""
        plan = locust_plan(environment)
        open_site(plan, get_session(plan.token or "", headers=plan.headers), Recorder())

    def _start(environment: Any, **_: Any) -> None:
        environment.hub_site, environment.hub_reports = None, {}
        runner = environment.runner
        try:
            if isinstance(runner, MasterRunner):
                _check(environment)
            else:
                environment.hub_site = shared = LocustSite(environment, getattr(runner, "worker_index", 0))
                plan = shared.site.plan
                names = username(0, plan.run or "")[:-1] + "<n>"
                SAY.info("%ss of this process are called %s", thing(plan.own_servers).capitalize(), names)
        except HubStressError as error:
            SAY.error("%s", error)
            environment.hub_reports["local"] = {"cut_short": True}
            environment.process_exit_code = int(error.exit_code)
            if not isinstance(runner, WorkerRunner):
                gevent.spawn(runner.stop)
        if isinstance(runner, WorkerRunner) and environment.parsed_options.processes:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the master too, which tells us

    def _have_workers_clean_up(environment: Any, **_: Any) -> None:
        runner, until_s = environment.runner, time.monotonic() + 2 * CLEANUP_TIMEOUT_S
        if not isinstance(runner, MasterRunner):
            return
        runner.send_message("hub-clean-up")
        awaited = {client.id for client in runner.clients.all}
        while awaited - environment.hub_reports.keys() and time.monotonic() < until_s:
            awaited -= {client.id for client in runner.clients.all if client.state == STATE_MISSING}
            gevent.sleep(0.1)

    def _clean_up(environment: Any, **_: Any) -> None:
        runner, reports = environment.runner, environment.hub_reports
        if environment.hub_site:
            reports["local"] = environment.hub_site.clean_up()
        if isinstance(runner, WorkerRunner):
            runner.send_message("hub-cleaned-up", reports.get("local", {}))

    def _end(environment: Any, **_: Any) -> None:
        """Judge a test in the exit code: the master's for all workers."""
        runner: Any = environment.runner
        if isinstance(runner, WorkerRunner):
            return
        runner.stop()
        reports, options = list(environment.hub_reports.values()), environment.parsed_options
        for report in reports:
            if report.get("left"):
                remedy = purge_command(report["run"], options.hub_own_servers)
                SAY.error("STILL THERE: %s; %s", names_text(report["left"]), remedy)
        if not environment.process_exit_code:
            environment.process_exit_code = _judge(environment, reports)

    def _judge(environment: Any, reports: Sequence[Mapping[str, Any]]) -> int:
        """The exit code of a test, whose outcome is logged."""
        plan, runner = locust_plan(environment), environment.runner
        left = [name for report in reports for name in report.get("left", ())]
        clients = runner.clients.all if isinstance(runner, MasterRunner) else ()
        lost = [client.id for client in clients if client.state == STATE_MISSING]
        for client in lost:
            remedy = purge_command(f"{plan.run}-{runner.get_worker_index(client)}", plan.own_servers)
            SAY.error("A worker is gone, and what it made may still be there: %s", remedy)
        deleted, starting, throttled = (
            sum(report.get(key, 0) for report in reports) for key in ("deleted", "starting", "throttled")
        )
        done = "removed" if plan.own_servers else "deleted"
        SAY.info("%s %s, %s left", counted(deleted, thing(plan.own_servers)), done, len(left) or "none")
        if starting:
            SAY.warning("%s", still_starting(starting))
        load = {*(plan.mix or DEFAULT_MIX), "server_ready"}
        entries: dict[str, Any] = {}  # a name has one for each method, and one for what raised
        for entry in runner.stats.entries.values():
            entries.setdefault(entry.name, StatsEntry(runner.stats, entry.name, "")).extend(entry)
        results = locust_results(entries.values(), load, throttled)
        judged = [limit.judge(results, None) for limit in plan.conditions]
        for judgement in judged:
            SAY.info("%s", spelled(goal_text(judgement), "ascii"))
        cut_short = any(report.get("cut_short") for report in reports)
        failed = any(judgement.held for judgement in judged)
        return int(exit_code(bool(left or lost), None, cut_short, failed))

    hooks: Any = events
    hooks.init_command_line_parser.add_listener(_add_options)
    hooks.init.add_listener(_begin)
    hooks.test_start.add_listener(_start)
    hooks.test_stopping.add_listener(_have_workers_clean_up)
    hooks.test_stop.add_listener(_clean_up)
    hooks.quitting.add_listener(_end)


if __name__ == "__main__":
    program()
