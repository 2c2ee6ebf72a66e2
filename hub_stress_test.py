#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.29", "urllib3>=1.26.12"]
# ///
"""Will this JupyterHub hold, and how far does it go?

Three commands answer, from a shell or a CI job:

  question                                         command                                           takes
  What would it do? (no request is sent)           --dry-run stress-test --count 30                  a second
  Do three servers start?                          stress-test --count 3                             a start
  What if 30 people come within a minute?          stress-test --count 30 --rate 0.5                 1 to 3 min
  Can 300 people work, who come in five minutes?   stress-test --count 300 --within 5m --work        6 to 15 min
  Does the proxy lose connections of open tabs?    stress-test --count 3 --check-proxy               3 min
  How many people a minute does it take?           stress-test --find-capacity --max-servers 200     10 to 20 min
  Do 100 servers stay up for ten minutes?          stress-test --count 100 --hold 10m --visit        15 min
  Does it bear the reports of 3,000 servers?       activity-stress-test --rate 10 --duration 5m      5 min
  How many reports per second does it sustain?     activity-stress-test --find-capacity              1 to 4 min
  What did earlier runs leave?                     purge                                             seconds
  What can I find out without being an admin?      stress-test --count 5 --own-servers               a start

stress-test starts a server for each fake user, which costs what servers cost; with --visit, --page and --work it
follows each person through the proxy to the results of their cells; with --own-servers it needs no admin rights, and
starts named servers of whoever the token belongs to instead. activity-stress-test makes users alone, and sends
the activity reports that running servers send; purge removes what earlier runs left behind.

Where one machine is not enough, Locust runs this same file: locust -f hub_stress_test.py.

What it does to a hub. It makes users called hub-stress-test-<n> (with --run NAME: hub-stress-test-NAME-<n>), starts and
stops their servers, and deletes them. It writes to users that it made; purge and activity-stress-test also to those of
earlier runs, whose whole name follows that pattern, and never to an admin. Unless --keep is given, every user it made
is deleted before it ends, whatever happened, and the hub is listed once more to be sure; what could not be removed is
named, with exit code 4. What a hub keeps of users that it deletes (unix accounts, home directories, volumes) stays.
With --check-proxy, a proxy that loses connections keeps those it lost for an hour, which no cleanup can take back: that
is reported, and fails the run. With --own-servers it makes no users, but named servers of the token's owner, of which
all this is true; the owner's other servers are left alone.

What the numbers mean. "Server ready" is what a person waits: from the moment a start was due to the moment the hub says
that the server is ready, throttling included. "Stay" is a server that was held: it failed if the server was lost, by
the hub's word or, with --visit, because it no longer answers. "Visit" runs from ready to the page. Every other latency
runs from sending a request (with --rate, from when it was due) to its final answer, without the time that the tool
slept because the hub asked it to wait. "Ping" reads one user five times a second, and counts from when each ping was
due: it is what everybody else on the hub feels. "At work" is what a person waits who wants to work: from the moment
they were due to the page of their server, or to the result of their first cell. "Hub's own" comes from the hub's
metrics page. Latencies are of what succeeded; failures are counted beside them, never averaged in. Percentiles are
within 1 %.

Exit codes: 0 done and no --fail-if condition was met (by default: nothing failed); 1 a condition was met, or the run
could not do what it set out to do; 2 bad usage; 3 no hub there, token refused or too weak (nothing was changed);
4 something that this run made is still on the hub, or the hub failed to stop servers; 130 and 143 interrupted by SIGINT
and SIGTERM, cleaned up.

What it does not promise: it logs nobody in through a browser. Without --visit it opens no server, so what a proxy, a
page or a kernel costs is not measured. Two runs at the same time on one hub need different --run names.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import csv
import dataclasses
import difflib
import enum
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
import signal
import socket
import ssl
import sys
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
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import requests
from requests.adapters import BaseAdapter, HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError
from urllib3.util.retry import Retry

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# ==== Constants and exit codes =======================================================================================

__version__ = "0.1.0"

LOG = logging.getLogger("hub-stress-test")

USERNAME_PREFIX = "hub-stress-test"
DEFAULT_TIMEOUT = 30  # seconds that one request may take
SERVER_LIFECYCLE_TIMEOUT = 60  # seconds that a server may take to start, or to stop
CLEANUP_TIMEOUT_S = 300.0  # cleanup gives up after so long without progress
RETRIES = 5  # after 0, 1, 2, 4 and 8 seconds
RETRY_WINDOW_S = 60.0  # no retry so long after the first try
RETRY_AFTER_MAX_S = 120.0
HUB_GONE_S = 120.0  # the load ends when the hub has not answered for so long
TOKEN_CHECK_EVERY_S = 30.0  # at most so often is the hub asked whether it still accepts the token
LATE_ACT_S = 2.0  # how long a hub may take to act on a request whose answer was lost
THROTTLE_PAUSE_S = 5.0  # before a throttled start is retried, when the hub names no time
HEAD_START_S = 0.02  # of throttled starts before new ones
FIRST_STARTS = 3  # at most so many fail before any server is ready: a hub may exit after five in a row
STREAM_TIMEOUT_S = 20.0  # the hub sends a keep-alive every 8 seconds
LATE_SEND_S = 0.1  # a request sent so long after it was due shows that the generator was too slow
OPEN_GRACE_S = 5.0  # an open load may still send so long after its end what was due before
BUSY = 0.85  # of a processor: a process that used more could hardly do more
IDLE = 0.3  # of a processor: a hub that never used more made nobody wait, whatever its machine did
LATE_LOOP_S = 0.2
CAPACITY_FIRST_RATE_PER_S = 16.0
CAPACITY_STEP_S = 10.0
CAPACITY_FIRST_PEOPLE_PER_S = 0.1
CAPACITY_PEOPLE_STEP_S = 60.0
DRAIN_S = 20.0  # at most, between two steps
SERVER_REPORTS_EVERY_S = 300  # JupyterHub's default for how often a running server reports its activity
REPORTS_SHARE = 0.1  # of what a hub sustains: the rest is for people
MANY_SERVERS = 3000
SILENT_S = 3.0  # before it is said that the hub does not answer
PING_RATE_PER_S = 5.0
PINGS_AT_MOST = 20  # under way at the same time
PROGRESS_EVERY_S = 5.0
METRICS_EVERY_S = 5.0
SAMPLES_EVERY_S = 1.0  # so many seconds of events may be lost when the program is killed
VISIT_TIMEOUT_S = 30.0
FIRST_VISIT_S = 10.0  # the first visit comes through within this time, or the public side is somewhere else
CONNECTIONS_OF_A_BROWSER = 6
REDIRECTS_MAX = 5
HANDSHAKES_PER_S = 20.0  # of the check of the proxy
UNANSWERED_S = 10.0
SHUTDOWN_S = 15.0  # that a server may take to end by itself
SEND_TIMEOUT_S = 5.0  # of a cell, during which no other websocket is read if this one takes nothing
METRICS_TIMEOUT_S = 5.0
PAGE = 200  # users a page: the most that a hub gives
SERVER_NAME_MAX = 30  # characters that hubs from 6.0 take
MANY = 9999  # named servers of one's own, where nobody knows how many it will be
LOG_HEADER = "hub-stress-test log"
SIGNALS = (signal.SIGINT, signal.SIGTERM)

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


class CutShort(HubStressError):
    """The run cannot go on to its end; what was made is cleaned up, and the run has failed."""


class HubRefused(CutShort):
    """The hub refused what the run needs to go on, or did not answer; see `Hub.denial`."""

    def __init__(self, task: str, reply: Reply, denial: str = "") -> None:
        self.denied = bool(denial)
        refused = "refused" if reply.status else "did not answer when asked"
        super().__init__(f"the hub {refused} to {task}: {f'it {denial}' if denial else reply}")


class Stopped(Exception):
    """The run was told to stop."""


# ==== Pure rules: words and numbers ==================================================================================


class Secret(str):
    """A string that shows itself to no repr, so that no traceback, debugger or log can print it by accident."""

    def __repr__(self) -> str:
        return "'***'"


def duration_text(seconds: float | None) -> str:
    """Three digits and a unit, from 100 s on in minutes: 840 ms, 1.25 s, 62.1 s, 20 min 35 s; a dash for None."""
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


def bytes_text(number: float | None) -> str:
    """117 MB, 40 kB; a dash for None."""
    if number is None:
        return "–"
    return f"{number / 1e6:.0f} MB" if number >= 9.95e5 else f"{number / 1e3:.0f} kB"


def rounded(seconds: float | None) -> float | None:
    """To a tenth of a millisecond, which is finer than anything here is measured."""
    return None if seconds is None else round(seconds, 4)


def utc(moment: datetime, timespec: str = "seconds") -> str:
    """The moment as 2026-11-20T16:00:00Z, or finer."""
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def without_credentials(url: str) -> str:
    """The URL without the user and password that it may carry."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def counted(number: float, noun: str, plural: str = "") -> str:
    """A number with its noun: 1 user, 3,000 users, 2 people, 1.5 people."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    return f"{shown} {noun if shown == '1' else plural or f'{noun}s'}"


def progress_line(phase: str, total: int | None, done: int, failed: int, elapsed_s: float) -> str:
    """Phase, done, failed, rate, and how long the rest takes at that rate."""
    of, left = (f" of {total:,}", "") if total else ("", "")
    if total and 0 < done < total:
        left_s = elapsed_s / done * (total - done)
        left = f", about {f'{left_s:.0f} s' if left_s < 100 else duration_text(left_s)} left"
    some_failed = f", {failed:,} failed" if failed else ""
    return f"{phase}: {done:,}{of} done{some_failed} after {elapsed_s:.0f} s, {done / elapsed_s:.1f} per second{left}"


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
    """One more than the highest index in use; gaps are not filled, since a gap may be in use a moment later."""
    return 1 + max((index for name in names if (index := index_of(name, run)) is not None), default=0)


def natural(name: str) -> tuple[str, int]:
    """A sort key by which the second user comes before the tenth."""
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)


def names_text(names: Iterable[str]) -> str:
    """Names in natural order, three and more in a row as the first `to` the last: hub-stress-test-1 to -60."""
    groups: list[list[str]] = []
    for name in sorted(names, key=natural):
        text, number = natural(name)
        if groups and natural(groups[-1][-1]) == (text, number - 1):
            groups[-1].append(name)
        else:
            groups.append([name])
    shown = ((f"{one[0]} to -{natural(one[-1])[1]}",) if len(one) > 2 else one for one in groups)
    return " ".join(name for group in shown for name in group)


def with_few_names(text: str) -> str:
    """A text in which a list of our names, as a hub gives those that it refuses, is written as `names_text` does."""
    name = rf"{USERNAME_PREFIX}-[a-z0-9-]*[0-9]"
    return re.sub(rf"{name}(?:, {name})+", lambda found: names_text(found[0].split(", ")), text)


def thing(own_servers: bool) -> str:
    """What a run makes and removes, one of them."""
    return "server" if own_servers else "user"


def things(own_servers: bool) -> str:
    """What a run makes and removes."""
    return f"{thing(own_servers)}s"


def purge_command(run: str | None, own_servers: bool = False) -> str:
    """The command that removes what a run left behind."""
    return "hub-stress-test purge" + " --own-servers" * own_servers + (f" --run {run}" if run else "")


def pods_command(run: str | None, own_servers: bool = False) -> str:
    """The command that finds the pods and volumes of a run's servers on Kubernetes, whose names may be cut.

    KubeSpawner calls them jupyter-hub-stress-test-1 and claim-hub-stress-test-1, before 7.0 with -2d for each hyphen.
    """
    name = USERNAME_PREFIX if own_servers or not run else username(0, run)[:-2][:36]
    return f"kubectl get pods,pvc -n NAMESPACE | grep -E '{name.replace('-', '-(2d)?')}'"


def still_starting(number: int) -> str:
    """What may be left of so many servers that were stopped while they were starting."""
    they, their = ("it was", "its") if number == 1 else ("they were", "their")
    return (
        f"{counted(number, 'server was', 'servers were')} still starting when {they} stopped: {their} spawner may have "
        "left jobs, pods or containers (squeue, kubectl, docker ps)"
    )


# ==== Pure rules: conditions =========================================================================================

LATENCY_STATISTICS = ("min", "mean", "p50", "p90", "p95", "p99", "max")
STATISTICS = (*LATENCY_STATISTICS, "failed", "count", "rate_per_s")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
UNITS = {"": 1.0, "x": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9}
FITTING = {"s": ("ms", "s", "m"), "bytes": ("kB", "MB", "GB"), "%": ("%",)}
KEYS_IN = {"s": r".*(?<!_per)(?<!_300)_s", "bytes": ".*_bytes", "%": ".*(share.*|_rate)"}
COUNTS = (
    "errors",
    "in_front",
    "reasons",
    "statuses",
)  # mappings of the results in which an absent name counts 0


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

    def judge(self, found: Json, baseline: Json | None) -> Judgement:
        """Whether results meet the condition; where nothing was measured, they do."""
        value, before = metric_value(found, self.metric), None
        limit: float | None = self.limit
        if self.unit == "x":
            before = metric_value(baseline or {}, self.metric)
            limit = None if before is None else before * self.limit
        held = value is None or limit is None or COMPARISONS[self.comparison](value, limit)
        return Judgement(self.text, value, held, limit, before)


def metric_value(found: Json, metric: str) -> float | None:
    """The value of a condition's metric in results, by its path or a short form; None when nothing was measured.

    Where counts are kept by name, as in `http.statuses`, an absent name counts 0.
    """
    name, _, statistic = metric.rpartition(".")
    of_operation = ["operations", name, *["latency_s"] * (statistic in LATENCY_STATISTICS), statistic]
    for path in (["http", metric] if metric == "throttled" else metric.split("."), of_operation):
        value: Any = found
        for above, key in zip(("", *path), path):
            value = value.get(key, 0 if above in COUNTS else None) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)):
            return float(value)
    return None


def unit_of(metric: str) -> str:
    """What a metric's value is in, by its keys: seconds (s), bytes, a share of 1 (%), or nothing for a plain number."""
    *_, above, key = ("", *metric.split("."))
    if key in STATISTICS:
        return "s" if key in LATENCY_STATISTICS else ""
    units = (unit for name in (key, above) for unit, keys in KEYS_IN.items() if re.fullmatch(keys, name))
    return next(units, "")


def value_text(value: float, metric: str) -> str:
    """A metric's value with its unit."""
    texts: dict[str, Callable[[float], str]] = {"s": duration_text, "bytes": bytes_text, "%": "{:.1%}".format}
    return texts.get(unit_of(metric), "{:g}".format)(value).replace("%", " %")


# ==== The plan, made from one table of options =======================================================================
#
# The fields of Plan are the table: each says how it is written on the command line, for which commands, and under
# Locust. Parser, help, the results' `options` and Locust's options are made from it. First, what a value may be.


def whole_number(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A number above 0."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return float(text)


def duration(text: str) -> float:
    """Seconds in a duration like 90, 90s, 5m or 1h."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|)", text)
    if not match or not (seconds := float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]):
        raise argparse.ArgumentTypeError(f"expected a duration like 90, 90s, 5m or 1h, not {text!r}")
    return seconds


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When the n-th (from 0) of many is due, in seconds since the first one, however slowly the hub answers.

    Its stages follow each other: so many per second, for so many seconds. A fixed rate is a stage that need not end.
    """

    stages: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, rate: float | Schedule | None, for_s: float = math.inf) -> Schedule | None:
        """So many per second, for so long; stages as they are; None without a rate."""
        return rate if isinstance(rate, Schedule) else cls(((rate, for_s),)) if rate else None

    def __str__(self) -> str:
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
    """So many per second, or stages of that, from R:DURATION,…"""
    if ":" not in text:
        return positive_number(text)
    stages = [part.strip().partition(":") for part in text.split(",")]
    return Schedule(tuple((positive_number(rate), duration(lasts)) for rate, _, lasts in stages))


def fastest(rate: float | Schedule | None) -> float:
    """The highest rate per second; 0 where there is none."""
    return max(each for each, _ in rate.stages) if isinstance(rate, Schedule) else rate or 0.0


def rate_text(rate: float | Schedule) -> str:
    """2.5 per second; stages follow each other: 1 per second for 60.0 s, then 5 per second for 30.0 s."""
    stages = rate.stages if isinstance(rate, Schedule) else ((rate, 0.0),)
    return ", then ".join(
        f"{each:.4g} per second" + f" for {duration_text(s)}" * bool(s) for each, s in stages
    )


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


def mix_of(text: str) -> dict[str, float]:
    """Weights by operation, from NAME=WEIGHT,…"""
    parts = [re.fullmatch(r"([\w-]+)=([0-9]*\.?[0-9]+)", part.strip()) for part in text.split(",")]
    mix = {part[1]: float(part[2]) for part in parts if part}
    if len(mix) != len(parts) or not all(mix.values()):
        raise argparse.ArgumentTypeError(f"expected NAME=WEIGHT,… like activity=8,read=2, not {text!r}")
    return mix


def profile_value(text: str) -> str | Json:
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
class Watched:
    """Another process of the deployment, and where it shows its figures."""

    name: str
    url: str

    def __str__(self) -> str:
        return f"{self.name}={without_credentials(self.url)}"


def watched(text: str) -> Watched:
    """A process to watch, from NAME=URL."""
    name, _, url = text.partition("=")
    if not re.fullmatch(r"\w+", name) or name == "hub" or not re.match("https?://[^/]", url):
        raise argparse.ArgumentTypeError(
            f"expected NAME=URL, like proxy=http://proxy:8002/metrics (not hub=…), not {without_credentials(text)!r}"
        )
    return Watched(name, url)


def results_file(text: str) -> Json:
    """The results that an earlier run wrote."""
    try:
        with open(text, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read as results ({error})") from None
    if not isinstance(found, dict) or found.get("schema") != 1:
        raise argparse.ArgumentTypeError(f"{text} does not hold results of this tool")
    return found


def writable_file(text: str) -> str:
    """The path of a file that can be written; nothing is written yet."""
    folder = os.path.dirname(os.path.realpath(text))
    if os.path.isdir(text) or not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return text


def samples_file(text: str) -> str:
    """The path of a file of samples that can be written; its name says whether it is compressed."""
    if not text.endswith((".csv", ".csv.gz")):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .csv or .csv.gz, not {text}")
    return writable_file(text)


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a browser fetched when it opened a page: paths below the server's own, and the statuses that it got."""

    file: str
    requests: tuple[tuple[str, int], ...]


SECRET = re.compile(
    "token|code|state|auth|key|xsrf|secret", re.IGNORECASE
)  # parameters that stay in the recording
BELOW_A_SERVER = re.compile("(?<!/hub)/user/([^/]+)/(.*)")  # /hub/user/NAME/ is the hub's own page about it


def recording(text: str) -> Recording:
    """The GETs below one person's server in a HAR file, in order; cookies, tokens and bodies are not taken over."""
    try:
        with open(text, encoding="utf-8-sig") as file:
            entries = [
                (one["request"], one["response"]["status"]) for one in json.load(file)["log"]["entries"]
            ]
        urls = [
            (urllib.parse.urlsplit(asked["url"]), status)
            for asked, status in entries
            if asked["method"] == "GET"
        ]
        below = [(BELOW_A_SERVER.search(url.path), url, status) for url, status in urls if status >= 200]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be read as a HAR file ({_in_words(error)})"
        ) from None
    owners = collections.Counter(
        (url.netloc, match[1]) for match, url, _ in below if match and "http" in url.scheme
    )
    rows = [
        (match[2] + _without_secrets(url.query), status)
        for match, url, status in below
        if match and "http" in url.scheme and (url.netloc, match[1]) in dict(owners.most_common(1))
        if not {"..", "oauth_callback", "logout"} & set(match[2].split("/"))
    ]
    if not rows:
        raise argparse.ArgumentTypeError(
            f"{text} holds no GET below /user/NAME/: record the page of a person's server"
        )
    return Recording(text, tuple(rows))


def _in_words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)  # which does not name the file once more


def _without_secrets(query: str) -> str:
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    kept = urllib.parse.urlencode([(name, value) for name, value in pairs if not SECRET.search(name)])
    return f"?{kept}" if kept else ""


@dataclasses.dataclass(frozen=True)
class Code:
    """A cell of a notebook."""

    source: str
    may_raise: bool = False


@dataclasses.dataclass(frozen=True)
class Notebook:
    """The code cells of a file."""

    file: str
    cells: tuple[Code, ...]


SIX_TIMES_SEVEN = Code("6*7")


def notebook(text: str) -> Notebook:
    """The code cells of a notebook, or of a Python file in percent format; one tagged raises-exception may raise."""
    try:
        with open(text, encoding="utf-8-sig") as file:
            content = file.read()
        cells = list(
            _cells_of_notebook(json.loads(content)) if text.endswith(".ipynb") else _cells_of_script(content)
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be read as a notebook ({_in_words(error)})"
        ) from None
    cells = [cell for cell in cells if cell.source.strip()]
    if not cells:
        raise argparse.ArgumentTypeError(f"{text} has no code cells (in a Python file, # %% begins one)")
    return Notebook(text, tuple(cells))


def _cells_of_notebook(content: Json) -> Iterator[Code]:
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            yield Code(
                "".join(cell["source"]), "raises-exception" in cell.get("metadata", {}).get("tags", [])
            )


def _cells_of_script(content: str) -> Iterator[Code]:
    beginning, *parts = re.split(r"^# ?%%", content, flags=re.MULTILINE)
    if parts and re.search(r"^[^#\s]", beginning, re.MULTILINE):  # more than comments
        yield Code(beginning)
    for part in parts:
        title, _, source = part.partition("\n")
        if not re.search(r"\[(markdown|md|raw)\]", title):
            yield Code(source, "raises-exception" in title)


@dataclasses.dataclass(frozen=True)
class EventFile:
    """Who comes to an event, when, and what they do: a file's text, and what it says as TOML."""

    path: str
    text: str
    above: Json
    people: list[Json]


def event_file(text: str) -> EventFile:
    """An event's file, whose keys nobody has looked at yet."""
    toml = optional("tomllib") or optional("tomli")  # the first from Python 3.11 on
    if not toml:
        raise argparse.ArgumentTypeError("this needs tomli, which is not installed: pip install tomli")
    try:
        with open(text, encoding="utf-8") as file:
            content = file.read()
        above = toml.loads(content)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read as TOML ({_in_words(error)})") from None
    people = above.pop("people", None)
    if not isinstance(people, list) or not people or not all(isinstance(group, dict) for group in people):
        raise argparse.ArgumentTypeError(f"{text}: expected groups of people, each below a line [[people]]")
    return EventFile(text, content, above, people)


def group_name(text: str) -> str:
    """What a group is called, as in server_ready[students]."""
    if not re.fullmatch(r"[\w-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits and hyphens, not {text!r}")
    return text


def condition(text: str) -> Condition:
    """The condition METRIC OP VALUE; raises `argparse.ArgumentTypeError`."""
    number = rf"([0-9]*\.?[0-9]+)\s*({'|'.join(UNITS)})"
    match = re.fullmatch(rf"\s*([^<>]*[^<>\s])\s*(>=|<=|>|<)\s*{number}\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"expected METRIC OP VALUE, like 'server_ready.p95 > 30s', not {text!r}"
        )
    metric, comparison, limit, unit = match.groups()
    return Condition(" ".join(text.split()), metric, comparison, float(limit) * UNITS[unit], unit)


FAILED, PROXY_LEAKING = map(condition, ("failed > 0", "proxy_check.leaking > 0"))
STRESS, ACTIVITY, PURGE = COMMANDS = ("stress-test", "activity-stress-test", "purge")
LOADS, NO_COMMAND = (STRESS, ACTIVITY), ()
DEFAULT_MIX: Mapping[str, float] = {"activity": 1.0}
Parse = Callable[[str], Any]
METAVARS: dict[Parse, str] = {
    whole_number: "N",
    positive_number: "R",
    rate_of: "R",
    duration: "DURATION",
    run_name: "NAME",
    endpoint_url: "URL",
    token_text: "TOKEN",
    mix_of: "NAME=WEIGHT,…",
    profile_value: "P",
    condition: "CONDITION",
    results_file: "FILE",
    writable_file: "FILE",
    samples_file: "FILE",
    watched: "NAME=URL",
    recording: "FILE.har",
    notebook: "FILE",
    event_file: "FILE.toml",
    group_name: "NAME",
    str: "FILE",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """How a field of the plan is written: on the command line, and as --hub-… under Locust."""

    flags: str
    help: str
    kind: Parse | None  # None: a switch
    on: Collection[str]  # the commands that have it
    locust: str | None = None  # the default under Locust, as text; None: not an option there
    repeatable: bool = False
    const: Any = None  # what it means without a value, if that is allowed
    locust_name: str = ""  # where it is called otherwise there

    @property
    def flag(self) -> str:
        return self.flags.split()[-1]

    @property
    def key(self) -> str:
        """The name in the results' `options`."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def locust_flag(self) -> str:
        return f"--hub-{self.locust_name or self.flag[2:]}"

    def add_to(self, parser: argparse.ArgumentParser, **settings: Any) -> None:
        settings |= (
            {"type": self.kind, "metavar": METAVARS[self.kind]} if self.kind else {"action": "store_true"}
        )
        settings |= {"nargs": "?", "const": self.const} if self.const else {}
        settings |= {"action": "append"} if self.repeatable else {}
        parser.add_argument(*self.flags.split(), help=self.help, **settings)

    def add_to_locust(self, parser: Any) -> None:
        """As --hub-…, whose values stay text: that is what a web form holds and what Locust sends to workers."""

        def check(text: str) -> str:
            if text and self.kind:
                self.kind(text)
            return text

        if not self.kind:
            parser.add_argument(self.locust_flag, help=self.help, action="store_true")
            return
        settings: Json = {"action": "append"} if self.repeatable else {"default": self.locust}
        secret = self.flag in ("--endpoint", "--token")  # which a page is not to change
        settings |= {"include_in_web_ui": False} if self.repeatable or secret else {}
        parser.add_argument(
            self.locust_flag, help=self.help, metavar=METAVARS[self.kind], type=check, **settings
        )


def option(
    flags: str,
    help: str,
    kind: Parse | None = None,
    default: Any = None,
    on: Collection[str] = COMMANDS,
    **more: Any,
) -> Any:
    """A field of the plan with its option; without `kind` a switch, whose default is False."""
    row = Option(flags, help, kind, on, **more)
    return dataclasses.field(default=default if kind else False, metadata={"option": row})


for_people = functools.partial(option, on=(STRESS,))
for_requests = functools.partial(option, on=(ACTIVITY,))
for_loads = functools.partial(option, on=LOADS)
for_locust = for_groups = functools.partial(option, on=NO_COMMAND)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was asked for: whom, how many, how they arrive, what is sent, when the run has failed."""

    command: str = STRESS
    endpoint: str | None = option(
        "-e --endpoint",
        "the hub's API; else JUPYTERHUB_ENDPOINT, else JUPYTERHUB_API_URL",
        endpoint_url,
        locust="",
    )
    token: Secret | None = option(
        "-t --token",
        "else JUPYTERHUB_API_TOKEN (better: arguments show in the process list)",
        token_text,
        locust="",
    )
    dry_run: bool = option("--dry-run", "send no request; print the plan: who, when, what, and what it costs")
    log_to_file: bool | str = option(
        "--log-to-file", "log to FILE, or to a new file in the temporary directory", str, const=True
    )
    verbose: bool = option("-v --verbose", "debug log, one line for each request with its response time")
    run: str | None = option(
        "--run",
        "call the users hub-stress-test-NAME-<n>, so that two jobs never meet",
        run_name,
        locust="locust",
    )
    results: str | None = option("--results", "write the results as JSON", writable_file)
    report: str | None = option("--report", "write a report as one HTML page (needs plotly)", writable_file)
    fail_if: tuple[Condition, ...] = option(
        "--fail-if",
        "fail if METRIC OP VALUE, like 'server_ready.p95 > 30s'; repeatable; replaces the default, failed > 0",
        condition,
        (),
        locust="",
        repeatable=True,
    )
    baseline: Json | None = option(
        "--baseline", "results of an earlier run: print old, new and ratio", results_file
    )
    count: int = for_loads("-c --count", "users, in stress-test each with a server (100)", whole_number, 100)
    batch_size: int = option(
        "-b --batch-size",
        "servers starting, users made or removed at the same time (10)",
        whole_number,
        10,
        on=(STRESS, PURGE),
    )
    keep: bool = for_loads("-k --keep", "leave the users, and their servers, on the hub")
    profile: str | Json | None = for_people(
        "-p --profile", "a profile's slug, or a JSON object of user options", profile_value, locust=""
    )
    own_servers: bool = option(
        "--own-servers",
        "no admin rights needed: start named servers of your own, instead of making users",
        on=(STRESS, PURGE),
        locust="",
    )
    server_timeout_s: float = for_people(
        "--server-timeout", "how long a person waits for a server (60s)", duration, 60.0, locust="60s"
    )
    fail_fast: int = for_people(
        "--fail-fast", "start no more servers after N failures in a row (1)", whole_number, 0, const=1
    )
    rate_per_s: float | Schedule | None = for_loads(
        "--rate",
        "start R servers, or send R requests, per second, however slow the hub; or R:DURATION,…",
        rate_of,
    )
    hold_s: float = for_people(
        "--hold", "keep the servers for so long, then check that all are still there", duration, 0.0
    )
    within_s: float | None = for_people(
        "--within", "people come at random moments within this time, however slow the hub", duration
    )
    event: tuple[Plan, ...] = for_people(
        "--event", "who comes, when, and what they do, in groups: see README", event_file, ()
    )
    group: str = for_groups("--name", "of a group", group_name, "")
    after_s: float = for_groups("--after", "a group begins to come so long after the run", duration, 0.0)
    seed: int | None = for_people("--seed", "draw the moments of --within as this seed did", whole_number)
    visit: bool = for_people(
        "--visit", "each person opens the start page of their server", locust="", locust_name="open"
    )
    visit_timeout_s: float = for_people(
        "--visit-timeout", "how long a person tries to open it (30s)", duration, VISIT_TIMEOUT_S, locust="30s"
    )
    page: Recording | None = for_people(
        "--page", "each person fetches what a browser did that this HAR file recorded", recording, locust=""
    )
    work: bool = for_people(
        "--work", "each person starts a kernel and runs cells (needs websocket-client)", locust=""
    )
    notebook: Notebook | None = for_people(
        "--notebook",
        "with --work: the code cells of this .ipynb or # %%%% file, once; without it 6*7, again and again",
        notebook,
        locust="",
    )
    think_s: float = for_people(
        "--think", "between the result of a cell and the next cell (10s)", duration, 10.0, locust="10s"
    )
    cell_timeout_s: float = for_people(
        "--cell-timeout", "how long a person waits for a kernel or a cell (60s)", duration, 60.0, locust="60s"
    )
    stay_s: float | None = for_people(
        "--stay",
        "each person leaves so long after starting to work; without it all stay until the last has come",
        duration,
        locust="60s",
    )
    check_proxy: bool = for_people(
        "--check-proxy",
        "after the load: does the proxy lose connections when servers end? Takes some three minutes",
    )
    public_url: str | None = for_people(
        "--public-url", "where people reach the hub, if not at the endpoint", endpoint_url, locust=""
    )
    workers: int = for_requests(
        "--workers", "threads that send (100); with --rate up to 200, as the rate needs", whole_number, 100
    )
    duration_s: float | None = for_loads(
        "--duration",
        "send for so long, without it once for each user; of a search, a step (10s, people 60s)",
        duration,
    )
    processes: int = for_requests("--processes", "spread the threads over N processes (1)", whole_number, 1)
    mix: Mapping[str, float] | None = for_requests(
        "--mix", "operations by weight (activity=1); read and list are there too", mix_of, locust="activity=1"
    )
    operations: str | None = for_requests(
        "--operations", "a file that registers operations of your own", str, locust=""
    )
    find_capacity: bool = for_loads(
        "--find-capacity",
        "raise the rate until a condition is met: what does the hub sustain? How many people a minute?",
    )
    max_servers: int | None = for_people(
        "--max-servers", "with --find-capacity: no more than N servers at one time", whole_number
    )
    cleanup_timeout_s: float = option(
        "--cleanup-timeout",
        "cleanup gives up after so long without progress (5m)",
        duration,
        CLEANUP_TIMEOUT_S,
    )
    watch: Sequence[Watched] = for_loads(
        "--watch",
        "read this Prometheus page of another process too, without the token; repeatable",
        watched,
        (),
        repeatable=True,
    )
    samples: str | None = for_loads(
        "--samples", "write each event as it happens; FILE ends in .csv or .csv.gz", samples_file
    )
    metrics_port: int | None = for_loads(
        "--metrics-port",
        "while it lasts, serve the run to Prometheus on this port, to other machines too (needs prometheus-client)",
        whole_number,
    )
    scale: float = for_locust(
        "--scale", "a RunningServer sends R times as often as every 300 s", positive_number, 1.0, locust="1"
    )
    visits: int = for_locust("--visits", "how many times a Person comes", whole_number, 1, locust="1")
    visit_token: Secret | None = None  # for visits, which test servers see; else the token

    @property
    def groups(self) -> tuple[Plan, ...]:
        """The groups of an event; without one, all people are of one."""
        return self.event or (self,)

    @property
    def opens(self) -> bool:
        """Whether people open their servers: whatever else they do there begins with that."""
        return any(one.visit or one.page or one.work or one.check_proxy for one in self.groups)

    @property
    def works(self) -> bool:
        """Whether some people run cells."""
        return any(group.work for group in self.groups)

    @property
    def goal(self) -> str:
        """The step with which a person has what they came for."""
        return "at_work" if self.rehearses else "server_ready"

    @property
    def rehearses(self) -> bool:
        """Whether people are followed until they can work; those of an event always, if only to a ready server."""
        return self.opens or bool(self.event or self.group)

    @property
    def is_open(self) -> bool:
        """Whether people come when they are due, however slow the hub: the open model."""
        return any(group.rate_per_s or group.within_s for group in self.groups)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What decides whether the run has failed: what was asked for, and always a leak that was proven.

        A search for capacity also minds how long requests take.
        """
        limits = [f"{name}.p95 > 500ms" for name in self.mix or DEFAULT_MIX]
        limits = ["server_ready.p95 > 30s"] if self.command == STRESS else limits
        slow = [condition(limit) for limit in limits] if self.find_capacity else []
        leaks = [PROXY_LEAKING] if self.check_proxy else []
        return tuple(dict.fromkeys((*(self.fail_if or (FAILED, *slow)), *leaks)))

    def options(self) -> Json:
        """Every option of the command, or of a group, with its value, for the results, but token and baseline."""
        of_command = [name for name, row in OPTIONS.items() if self.command in row.on]
        names = [*GROUP_OPTIONS.values()] if self.group else of_command
        return {
            OPTIONS[name].key: told(getattr(self, name))
            for name in names
            if name not in ("token", "baseline")
        }


def told(value: Any) -> Any:
    """The value of an option as the results have it."""
    if isinstance(value, (Recording, Notebook)):
        return value.file
    if isinstance(value, (Watched, Schedule)):
        return str(value)
    if isinstance(value, Condition):
        return value.text
    if isinstance(value, Plan):  # of a group
        return value.options()
    return [told(one) for one in value] if isinstance(value, tuple) else value


OPTIONS: dict[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(Plan) if "option" in field.metadata
}
GROUP_KEYS = (
    *(
        "name",
        "count",
        "within",
        "rate",
        "after",
        "profile",
        "visit",
        "page",
        "work",
        "notebook",
        "think",
        "stay",
    ),
    "server-timeout",
)
GROUP_OPTIONS = {row.flag[2:]: name for name, row in OPTIONS.items() if row.flag[2:] in GROUP_KEYS}
LOCUST_OPTIONS = {name: row for name, row in OPTIONS.items() if row.locust is not None}


# ==== Events, and the recorder that folds them ==============================================================


class Kind(enum.Enum):
    """Kinds of failure, by what an operator does next."""

    AWAY = "no answer"
    FRONT = "answered by something in front of the hub"
    REFUSED = "refused"
    SPAWN = "the spawn failed"
    LATE = "not ready in time"
    THROTTLED = "still throttled"
    FULL = "no more servers allowed"
    VANISHED = "gone while starting"
    LOST = "gone while held"
    ROUTE = "no way to the server"
    WIRE = "the websocket broke"
    KERNEL = "the kernel ended"
    CELL = "the cell failed"
    BROKEN = "the operation raised"


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why something failed. The text names no user, so that equal reasons can be counted."""

    kind: Kind
    text: str
    open_s: float | None = dataclasses.field(default=None, compare=False)  # how long a websocket was open


@dataclasses.dataclass(frozen=True)
class Event:
    """One step for one person, and its outcome. Moments are seconds of a monotonic clock."""

    step: str
    user: str
    due_s: float
    sent_s: float
    ended_s: float
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
        """ok, or the kind of its failure: refused, spawn, late, …"""
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


@dataclasses.dataclass(frozen=True)
class OperationTimeline:
    """Counts and latencies for each span of time, in seconds since the run began."""

    span_s: float
    at_s: list[float | None]
    count: list[int]
    failed: list[int]
    p50_s: list[float | None]
    p95_s: list[float | None]
    max_s: list[float | None]


class Fold:
    """The events of one operation, by spans of time in which they were due.

    Beyond `SPANS`, two neighbours become one, so that an hour takes no more memory than minutes.
    """

    SPANS = 200

    def __init__(self) -> None:
        self.span_s, self.spans = 1.0, collections.defaultdict[int, Distribution](Distribution)
        self.count = self.failed = self.late = self.skipped = 0
        self.lateness, self.backoff_s = Distribution(), 0.0
        self.errors, self.kinds = collections.Counter[str](), set[Kind]()
        self.first_due_s, self.last_ended_s = math.inf, -math.inf

    def add(self, event: Event) -> None:
        span = self.spans[int(event.due_s // self.span_s)]
        self.count += 1
        if event.reason is None:
            span.add(event.latency_s)
        else:
            span.failed += 1
            self.failed += 1
            self.errors[event.reason.text] += 1
            self.kinds.add(event.reason.kind)
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
        return Operation(
            count=self.count,
            failed=self.failed,
            rate_per_s=self.count / took_s if took_s > 0 else None,
            latency_s=latency.summary(),
            lateness_s=self.lateness.summary(),
            backoff_s=self.backoff_s,
            errors=dict(self.errors),
            skipped=self.skipped,
        )

    def timeline(self, began_s: float) -> OperationTimeline:
        numbers = sorted(self.spans)
        spans = [self.spans[number] for number in numbers]
        latencies = [span.summary() for span in spans]
        return OperationTimeline(
            span_s=self.span_s,
            at_s=[rounded(max(0.0, (number + 0.5) * self.span_s - began_s)) for number in numbers],
            count=[span.count for span in spans],
            failed=[span.failed for span in spans],
            p50_s=[rounded(latency.p50) for latency in latencies],
            p95_s=[rounded(latency.p95) for latency in latencies],
            max_s=[rounded(latency.max) for latency in latencies],
        )


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

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Hand every event from now on to this listener too."""
        self.listeners.append(listener)

    def skip(self, step: str) -> None:
        """Note that a step was due and was not tried."""
        with self._lock:
            self._folds[step].skipped += 1

    def take_over(self, other: Recorder) -> None:
        """Import the operations of another recorder that this one does not have."""
        with self._lock:
            self._folds = other._folds | self._folds

    def _of(self, names: Iterable[str]) -> list[Fold]:
        return [self._folds[name] for name in {*names} if name in self._folds]

    def count(self, names: Iterable[str]) -> int:
        return sum(fold.count for fold in self._of(names))

    def failures(self, names: Iterable[str]) -> int:
        return sum(fold.failed for fold in self._of(names))

    def late_share(self, names: Collection[str]) -> float:
        """The share of these operations' requests that were sent too late; see `LATE_SEND_S`."""
        return sum(fold.late for fold in self._of(names)) / max(1, self.count(names))

    def kinds(self) -> set[Kind]:
        """All kinds of failure that there were."""
        with self._lock:
            return set[Kind]().union(*(fold.kinds for fold in self._folds.values()))

    def summarise(self) -> dict[str, Operation]:
        with self._lock:
            return {name: fold.summary() for name, fold in self._folds.items()}

    def timeline(self, began_s: float) -> dict[str, OperationTimeline]:
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


# ==== Pure rules: what the hub's answers mean ========================================================================


class ServerState(enum.Enum):
    """What the hub says of a user and their server."""

    GONE = "no such user"
    STOPPED = "no server"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    UNKNOWN = "not known"


def server_state(model: Json) -> ServerState:
    """What a user model means. One without `servers` comes from a token that may not read servers: not known.

    A hub that has restarted checks each server that it remembers, for up to 30 s ("pending": "check"). Until it has
    found the server or shut it down, it does not know the state either, and answers 500 to a request to stop it.
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


def state_after_stop(status: int) -> ServerState:
    """What `DELETE server` answered: 400 (pending spawn on hubs before 5.1) and 500 mean that one has to look again."""
    known = {204: ServerState.STOPPED, 202: ServerState.STOPPING, 404: ServerState.GONE}
    return known.get(status, ServerState.UNKNOWN)


def state_after_delete(status: int) -> ServerState:
    """What `DELETE user` answered: 400 (still stopping) and 500 (still starting) mean that one has to look again."""
    return ServerState.GONE if status in (204, 404) else ServerState.UNKNOWN


VERSION_HEADER = "X-JupyterHub-Version"  # every answer of a hub and of a server has it


def missing_scopes(granted: Iterable[str], needed: Iterable[str], user: str = "") -> list[str]:
    """The scopes that a token lacks; a hub lists those it has in full (`servers` with all its parts).

    One that is limited to some users or groups (`users!user=x`) does not count, unless it is needed for this user only.
    """
    have = {scope for one in granted if "!" not in (scope := one.removesuffix(f"!user={user}"))}
    if "start:servers" in have:  # hubs from 6.0
        have.add("servers")
    return sorted(set(needed) - have)


def named_server_limit(reply: Reply) -> int | None:
    """How many named servers the hub allows each user, if it refused a start for that; 0 when it allows none."""
    if reply.status == 400 and reply.message.startswith("Named servers are not enabled"):
        return 0
    match = re.search(r"already has the maximum of (\d+) named servers", reply.message)
    return int(match[1]) if reply.status == 400 and match else None


ROLE_TO_PASTE = """\
c.JupyterHub.load_roles.append({
    "name": "hub-stress-test", "services": ["hub-stress-test"],
    "scopes": ["admin:users", "servers", "read:metrics"],
})"""

VISIT_ROLE_TO_PASTE = """\
c.JupyterHub.load_roles.append({
    "name": "hub-stress-test-visits", "services": ["hub-stress-test-visits"], "scopes": ["access:servers"],
})"""


def likely_endpoint(endpoint: str, location: str | None) -> str:
    """The URL that was probably meant: where a redirect to https leads, or with `/hub/api` at its end."""
    if location and endpoint.startswith("http:") and location.startswith("https:"):
        endpoint = "https:" + endpoint.removeprefix("http:")
    if endpoint.endswith("/hub/api"):
        return endpoint
    return endpoint + "/api" if endpoint.endswith("/hub") else endpoint + "/hub/api"


# ==== Pure rules: what is said while a server starts =========================================================

Said = Sequence[tuple[float, Json]]  # the events of a progress stream, and when each arrived


@dataclasses.dataclass(frozen=True)
class Phases:
    """Where the start of a server spent its time, by the events of Kubernetes, in order; or means of many starts."""

    silent_s: float
    node_s: float
    volumes_s: float
    image_s: float
    container_s: float
    server_s: float
    new_node: int  # whether it waited for a new node, or how many did
    images_pulled: int


def mean_phases(starts: Sequence[Phases]) -> Phases | None:
    """The mean of each phase, and how many starts waited for a new node or pulled an image; None without starts."""
    totals = {name: sum(getattr(start, name) for start in starts) for name in Phases.__annotations__}
    means = {
        name: total / len(starts) if name in PHASES else total for name, total in totals.items() if starts
    }
    return Phases(**means) if means else None


PHASES = {
    "silent_s": "before Kubernetes said anything",
    "node_s": "waiting for a node",
    "volumes_s": "attaching volumes",
    "image_s": "pulling the image",
    "container_s": "starting the container",
    "server_s": "the server's own start",
}


def kube_events(said: Said) -> list[tuple[float, Json]]:
    """The Kubernetes events among what was said, by the cluster's own clock in seconds, in its order.

    KubeSpawner hands them over late, some twice, and out of order; some it loses.
    """
    events = []
    for _, message in said:
        if raw := message.get("raw_event"):
            moment = raw.get("lastTimestamp") or raw.get("eventTime") or raw.get("firstTimestamp")
            with contextlib.suppress(ValueError, AttributeError):  # one without a time tells no phase
                events.append((datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp(), raw))
    return sorted(events, key=lambda event: event[0])


def phases_of(said: Said, asked_s: float, ready_s: float) -> Phases | None:
    """Where a start spent its time that was asked for and ready at these moments; None without Kubernetes events.

    The cluster's clock is set by the event that arrived soonest. A phase whose end was not said ends with the last
    event that was.
    """
    events = kube_events(said)
    if not events:
        return None
    arrived = [(at_s, kube_events([(at_s, message)])) for at_s, message in said]
    behind_s = min(at_s - event[0][0] for at_s, event in arrived if event)
    moments = [(min(max(at_s + behind_s, asked_s), ready_s), raw) for at_s, raw in events]
    pulling, image_s, pulled = dict[str, float](), 0.0, 0
    begin_s = scheduled_s = moments[0][0]
    containers_s: float | None = None
    started_s = moments[-1][0]
    for at_s, raw in moments:
        path, reason = str(raw.get("involvedObject", {}).get("fieldPath")), raw.get("reason")
        if reason == "Scheduled":
            scheduled_s = at_s
        elif reason in ("Pulling", "Pulled", "Created", "Started"):
            containers_s = at_s if containers_s is None else containers_s
        if reason == "Pulling":
            pulling[path] = at_s
        elif reason == "Pulled" and path in pulling:
            image_s, pulled = image_s + at_s - pulling.pop(path), 1
        elif reason == "Started" and path.startswith("spec.containers"):
            started_s = at_s
            break
    containers_s = max(scheduled_s, started_s if containers_s is None else containers_s)
    started_s = max(started_s, containers_s + image_s)
    return Phases(
        silent_s=begin_s - asked_s,
        node_s=scheduled_s - begin_s,
        volumes_s=containers_s - scheduled_s,
        image_s=image_s,
        container_s=started_s - containers_s - image_s,
        server_s=ready_s - started_s,
        new_node=int(any(raw.get("reason") == "TriggeredScaleUp" for _, raw in events)),
        images_pulled=pulled,
    )


def longest_wait(said: Said, asked_s: float, ready_s: float) -> str:
    """What a start spent most of its time with: its longest phase, or the message that stood longest; "" if none."""
    if phases := phases_of(said, asked_s, ready_s):
        name = max(PHASES, key=lambda name: getattr(phases, name))
        return f"{PHASES[name]}, {duration_text(getattr(phases, name))}"
    ends = [at_s for at_s, _ in said[1:]] + [ready_s]
    lasted = [(end_s - at_s, str(message["message"])) for (at_s, message), end_s in zip(said, ends)]
    return max(lasted, default=(0.0, ""))[1]


def last_word(said: Said) -> str:
    """What a start was waiting for: the last warning of Kubernetes that still holds, or else the last message.

    What follows a failure is the hub's own clean-up; a node that was found ends the warnings about nodes.
    """
    events = [raw for _, raw in kube_events(said) if raw.get("reason") != "Killing"]
    scheduled = any(raw.get("reason") == "Scheduled" for raw in events)
    warnings = [raw for raw in events if raw.get("type") == "Warning"]
    warnings = [raw for raw in warnings if not (scheduled and raw.get("reason") == "FailedScheduling")]
    if events:
        return str((warnings or events)[-1].get("message"))
    return str(said[-1][1]["message"]) if said else ""


API_ERROR = re.compile(r"\((\d{3})\)\s*Reason: .*HTTP response body: (\{.*\})", re.DOTALL)
NOT_IN_TIME = re.compile(r"pod \S+ did not start in (\d+) seconds!")
PASSING = (  # what differs from server to server
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z \[\w+\] ", ""),
    (r"(<user>)---[0-9a-f]{8}", r"\1"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uid>"),
    (r"\b\d{1,3}(\.\d{1,3}){3}\b", "<ip>"),
)


def spawn_failure(message: str, said: Said, lasted_s: float) -> str:
    """Why a start failed after so long: what the hub says of it, and what it was waiting for.

    The hub's own time-out comes without words, that of KubeSpawner with some: they are one.
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
    for pattern, instead in PASSING:
        plain = re.sub(pattern, instead, plain)
    return plain


# ==== The hub: session and transport =================================================================================

RETRIED = frozenset({429, 503, 504})
NEVER_SENT = (
    NewConnectionError,
    ConnectTimeoutError,
    ssl.SSLCertVerificationError,
)  # and so the hub has not acted


@dataclasses.dataclass
class Call:
    """How one request is to be sent, and what happened to it on the way."""

    observer: bool = False  # made only to watch
    seen: frozenset[int] = frozenset()  # statuses that the caller wants to see itself: not retried
    retry_until_s: float | None = None  # no retry after this moment; None: within the session's window
    tries: int = 0
    backoff_s: float = 0.0
    lost: bool = False  # an answer was lost: the hub may have acted on the request


def once(observer: bool = False, again: bool = False) -> Call:
    """A call without retries; `again` when it is itself a retry."""
    return Call(observer, retry_until_s=0.0, tries=int(again))


def call_of(request: requests.Request | requests.PreparedRequest | None) -> Call:
    """The call that a request is part of; it is kept with the request, so that whoever holds its answer finds it."""
    call: Call = vars(request).setdefault("hub_call", Call()) if request else Call(tries=1)
    return call


@dataclasses.dataclass(frozen=True)
class Reply:
    """The final answer to a request, or why there was none."""

    status: int  # 0 when no answer came, or none of the hub's
    sent_s: float
    answered_s: float
    data: Any = None  # the body, where it is JSON
    message: str = ""  # why no answer came, or the hub's own message
    lost: bool = False  # an answer to this request was lost: the hub may have acted on it without our knowing
    tries: int = 1
    backoff_s: float = 0.0
    retry_after_s: float | None = None
    location: str | None = None  # where a redirect, which is not followed, points
    front: int = 0  # the status that something in front of the hub answered with
    version: str = ""  # of the JupyterHub that answered, be it the hub or a server; "" of anything else

    @property
    def hub_status(self) -> int:
        """The status, but 0 for a 404 that is not the hub's (which is JSON): a proxy says so of a hub that is away."""
        return 0 if self.status == 404 and not isinstance(self.data, dict) else self.status

    @property
    def seen_status(self) -> int:
        """The status, whoever gave it; 0 when no answer came."""
        return self.status or self.front

    def __str__(self) -> str:
        if not self.status:
            return self.message
        return f"{self.status} ({with_few_names(self.message)})" if self.message else str(self.status)

    def event(self, step: str, user: str = "", ok: Collection[int] = (200, 201, 202, 204)) -> Event:
        """What is recorded of a request; `ok` are the statuses with which it succeeded."""
        kind = Kind.REFUSED if self.status else Kind.FRONT if self.front else Kind.AWAY
        failure = None if self.status in ok else Reason(kind, str(self.status or self.message))
        return Event(
            step, user, self.sent_s, self.sent_s, self.answered_s, failure, self.tries, self.backoff_s
        )


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
            hubs = session.is_hubs(response)
            call.lost |= not hubs
            retried = RETRIED - call.seen if hubs else RETRIED
            if response.status_code not in retried or not self._may_retry(call):
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
        self.marked: bool | None = (
            None  # whether the hub's answers have `VERSION_HEADER`; None: not known yet
        )
        self.of_servers = False  # whether it asks servers: there a proxy's answers count as they are
        self._asked_for_token_s, self._token_refused = -math.inf, False
        self._silent = False  # whether that the hub is away was said
        self.traffic = Traffic()
        self.stopping = threading.Event()
        self._streams: dict[requests.Response, float] = {}
        self._simulated, self._pool_maxsize = wire, pool_maxsize
        transport = Transport(wire or HTTPAdapter(pool_maxsize=pool_maxsize), self)
        self.mount("http://", transport)
        self.mount("https://", transport)

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: a redirect is an answer like another, and the token goes nowhere else."""

    def exchange(
        self,
        method: str,
        url: str,
        call: Call,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **parts: Any,
    ) -> requests.Response:
        """The response to one call; `parts` are those of a `requests.Request`. Raises what requests raises."""
        request = self.prepare_request(requests.Request(method, url, **parts))
        vars(request)["hub_call"] = call
        settings = self.merge_environment_settings(request.url, {}, stream, None, None)
        return self.send(request, timeout=timeout, **settings)

    def ask(self, method: str, url: str, *, call: Call | None = None, **parts: Any) -> Reply:
        """The final answer, or why there is none; never raises. `parts` are those of `exchange`."""
        sent_s, call = self.clock(), call or Call()
        if self.stopping.is_set():
            return Reply(0, sent_s, sent_s, message="the run was stopped before this was sent")
        try:
            response = self.exchange(method, url, call, **parts)
            return _read_reply(response, call, sent_s, self.clock(), self.is_hubs(response))
        except Stopped:
            return Reply(0, sent_s, self.clock(), message="the run was stopped", lost=call.lost)
        except OSError as error:  # which requests' own errors are too
            lost = call.lost or not _never_sent(error)
            return Reply(0, sent_s, self.clock(), None, why(error), lost, call.tries, call.backoff_s)

    def events(self, url: str, until_s: float) -> Iterator[Json]:
        """Events of a progress stream as they arrive, until it ends, breaks or is cut at `until_s`."""
        call, timeout_s = (
            Call(observer=True, retry_until_s=until_s),
            min(STREAM_TIMEOUT_S, until_s - self.clock()),
        )
        try:
            with self.exchange("GET", url, call, stream=True, timeout=max(0.05, timeout_s)) as response:
                self._streams[response] = until_s
                try:
                    for line in (
                        response.iter_lines()
                        if response.status_code == 200 and self.is_hubs(response)
                        else ()
                    ):
                        self.answered_s = self.clock()  # a keep-alive, too, shows that the hub is there
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
                with contextlib.suppress(
                    RuntimeError, ValueError, OSError, AttributeError
                ):  # it has just ended
                    _end_reading(response.raw)

    def answered(self, response: requests.Response) -> None:
        """Count an answer, and note the moment if it is the hub's."""
        hubs = self.is_hubs(response)
        self.traffic.answered(response.status_code, in_front=not hubs)
        if hubs:
            self.answered_s = self.clock()
            if self._silent:
                self._silent = False
                LOG.warning("The hub answers again")

    def is_hubs(self, response: requests.Response) -> bool:
        """Whether the hub, or one of its servers, gave this answer, and not something in front of it.

        Where something strips the header by which one can tell, only 502, 503 and 504 are taken for a proxy's: that is
        what proxies answer for a hub that is away.
        """
        if VERSION_HEADER in response.headers:
            self.marked = True if self.marked is None else self.marked
            return True
        return self.of_servers or (not self.marked and response.status_code not in (502, 503, 504))

    def token_is_refused(self, endpoint: str) -> bool:
        """Whether the hub refuses the token even where nothing more is asked of it: `GET /user`, at most every 30 s."""
        if self.clock() > self._asked_for_token_s + TOKEN_CHECK_EVERY_S:
            self._asked_for_token_s = self.clock()
            self._token_refused = self.ask("GET", f"{endpoint}/user", call=once()).status in (401, 403)
        return self._token_refused

    def say_if_silent(self, reason: str) -> None:
        """Say it, once, when the hub has not answered for some seconds."""
        silent_s = self.clock() - self.answered_s
        if silent_s > SILENT_S and not self._silent:
            self._silent = True
            since = datetime.now().astimezone() - timedelta(seconds=silent_s)
            LOG.warning("The hub has not answered since %s (%s)", since.strftime("%H:%M:%S"), reason)

    @property
    def hub_is_gone(self) -> bool:
        """Whether the hub has not answered anything for so long that sending more is no use."""
        return self.clock() - self.answered_s > self.gone_after_s

    def pause(self, seconds: float) -> bool:
        """Wait; False when told to stop meanwhile. The only sleep of the program."""
        return not (self.stopping.wait(seconds) if seconds > 0 else self.stopping.is_set())

    def back_off(self, call: Call, asked_s: float | None) -> None:
        """Wait before the next try, as long as the hub asked or for 0, 1, 2, 4, 8 s; raises `Stopped` when told to."""
        began_s = self.clock()
        seconds = asked_s or (0.5 * 2 ** (call.tries - 1) if call.tries > 1 else 0.0)
        left_s = (call.retry_until_s or 0.0) - began_s
        going_on = self.pause(min(seconds, RETRY_AFTER_MAX_S, left_s))
        call.backoff_s += self.clock() - began_s
        if not going_on:
            raise Stopped

    def stop(self) -> None:
        """No further request; everything that waits goes on at once."""
        self.stopping.set()
        self.cut_streams()

    def sibling(self, traffic: Traffic | None = None, token: str | None = None, **how: Any) -> HubSession:
        """A session on the same hub with the same settings, its own stop, and these counts (None: the same)."""
        how = (
            {"pool_maxsize": self._pool_maxsize}
            | how
            | ({"wire": self._simulated} if self._simulated else {})
        )
        other = HubSession(token or self.token, **how)
        other.traffic = traffic or self.traffic
        other.headers.update(self.headers)
        other.headers["Authorization"] = Secret(f"token {other.token}")
        for setting in ("verify", "cert", "proxies", "hooks", "trust_env", "marked"):
            setattr(other, setting, getattr(self, setting))
        return other

    def proxy_to(self, url: str) -> str:
        """This machine's own proxy on the way to a URL, like `the proxy http://squid:3128 (https_proxy)`; else ""."""
        settings = self.merge_environment_settings(url, {}, None, None, None)
        proxy, scheme = (
            requests.utils.select_proxy(url, settings["proxies"]),
            urllib.parse.urlsplit(url).scheme,
        )
        if not proxy:
            return ""
        variables = [name for kind in (scheme, "all") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())]
        named = next((f" ({name})" for name in variables if os.environ.get(name) == proxy), "")
        return f"the proxy {without_credentials(proxy if '://' in proxy else f'http://{proxy}')}{named}"

    def for_cleaning_up(self) -> HubSession:
        """A session on the same hub, which the stop of this one does not reach.

        It tries once, since cleanup looks again anyway, and soon looks whether a silent hub is there at all.
        """
        return self.sibling(retry_window_s=0.0, gone_after_s=20.0)

    def beside(self, traffic: Traffic | None = None, token: str | None = None, **how: Any) -> HubSession:
        """A session on the same hub with counts of its own (or these), which stops with this one."""
        other = self.sibling(traffic or Traffic(), token, **how)
        other.stopping = self.stopping
        return other


def without_proxy(url: str) -> str:
    """How to reach a URL without this machine's own proxy."""
    host = urllib.parse.urlsplit(url).hostname
    return f"if this machine reaches {host} without that proxy too, set no_proxy={host}"


def _keep_as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _end_reading(raw: Any) -> None:
    """Let whoever reads this body go on at once, as at its end; closing it would wait for them."""
    if hasattr(raw, "shutdown"):
        raw.shutdown()
    else:  # urllib3 before 2.3
        raw._fp.fp.raw._sock.shutdown(socket.SHUT_RD)


def in_front(response: requests.Response) -> str:
    """That something in front of the hub gave an answer, and what it calls itself."""
    name = response.headers.get("Server", "")[:40]
    return f"something in front of the hub{f' ({name})' if name else ''} answered {response.status_code}"


def _read_reply(
    response: requests.Response, call: Call, sent_s: float, answered_s: float, hubs: bool
) -> Reply:
    if not hubs:
        location, status = response.headers.get("Location"), response.status_code
        lost: Json = {"lost": True, "tries": call.tries, "backoff_s": call.backoff_s}
        return Reply(
            0, sent_s, answered_s, message=in_front(response), location=location, front=status, **lost
        )
    try:
        data = response.json() if response.content else None
    except ValueError:
        data = None
    message = data.get("message") if isinstance(data, dict) else None
    if data is None and response.content:
        kind = response.headers.get("Content-Type", "").partition(";")[0]
        message = f"not JSON but {kind}" if kind else "not JSON"
    return Reply(
        response.status_code,
        sent_s,
        answered_s,
        data,
        message or "",
        call.lost,
        call.tries,
        call.backoff_s,
        _retry_after_s(response),
        response.headers.get("Location"),
        version=response.headers.get(VERSION_HEADER, ""),
    )


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


def _never_sent(error: BaseException) -> bool:
    return any(isinstance(cause, NEVER_SENT) for cause in _causes(error))


TIMED_OUT = "no answer in time"
NO_SUCH_HOST = "host name not found"
NOT_ACCEPTED = "the certificate was not accepted"


def why(error: BaseException) -> str:
    """Why no answer came, in a few words without addresses or objects."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, (ReadTimeoutError, requests.Timeout, TimeoutError)):
            return TIMED_OUT
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"{NOT_ACCEPTED} ({cause})"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed ({(cause.reason or str(cause)).lower().replace('_', ' ')})"
        if str(cause).startswith("Tunnel connection failed: "):
            return f"this machine's proxy refused ({str(cause).partition(': ')[2]})"
        if isinstance(cause, ConnectionError):
            return "connection reset"
        if isinstance(cause, requests.exceptions.ChunkedEncodingError):
            return "the answer broke off"
        if "NameResolution" in type(cause).__name__ or type(cause).__name__ == "gaierror":
            return NO_SUCH_HOST
    return type(error).__name__ if isinstance(error, requests.RequestException) else str(error)


def log_response_time(resp: requests.Response, *args: Any, **kwargs: Any) -> None:
    """A response hook: one debug line with method, path, status and seconds."""
    request = resp.request
    LOG.debug(
        "%s %s: %d in %.3f s",
        request.method,
        request.path_url,
        resp.status_code,
        resp.elapsed.total_seconds(),
    )


def get_session(token: str, dry_run: bool = False, pool_maxsize: int = 100) -> HubSession:
    """A session that sends the token, retries connection failures, 429, 503 and 504 on every method, and counts.

    With `dry_run` a simulated hub answers and nothing is sent. `pool_maxsize` connections are kept open.
    """
    session = HubSession(token, SimulatedHub() if dry_run else None, pool_maxsize)
    if LOG.isEnabledFor(logging.DEBUG):
        session.hooks["response"].append(log_response_time)
    return session


class SimulatedHub(BaseAdapter):
    """An adapter of requests that answers as an empty hub would: every server is ready at once, nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._users: dict[str, Json] = {}

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.url or "").path).split("/")
        path = path[path.index("users") :] if "users" in path else path[-1:]
        body = json.loads(request.body or "null")
        with self._lock:
            status, data = self._answer(request.method or "", path, body)
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
                users[name]["servers"] = {"": {"pending": None, "ready": True}}
                return 201, None
            case "DELETE", ["users", name, "server"]:
                return 204, users[name]["servers"].clear()
            case "POST", ["users", _, "activity"]:
                return 200, None
        return unknown


# ==== The hub: its API ===============================================================================================


def user_url(endpoint: str, name: str, *rest: str) -> str:
    """The URL of a user, or of what follows below it."""
    return "/".join([f"{endpoint}/users", urllib.parse.quote(name, safe=""), *rest])


@dataclasses.dataclass(frozen=True)
class Hub:
    """A hub's API: a method for each call, with the answers to expect. It neither measures nor claims nor cleans."""

    endpoint: str
    session: HubSession
    version: str = ""
    reading: ClassVar[dict[str, int]] = {}  # parameters of reading a user

    def owner_of(self, name: str) -> str:
        """The user whose server it is."""
        return name

    def server_url(self, name: str, *rest: str) -> str:
        """The URL of a user's server, or of what follows below it."""
        return user_url(self.endpoint, name, "server", *rest)

    @property
    def needs_users_tokens(self) -> bool:
        """Whether servers let in nobody but their users."""
        return self.version.startswith("1.")

    def page_of_users(self, offset: int) -> Reply:
        """`GET /users`: a page on hubs from 2.0 (`items`, `_pagination`), a plain list of all users on 1.x.

        Hubs from 2.3 filter by name.
        """
        return self.session.ask(
            "GET",
            f"{self.endpoint}/users",
            params={"offset": offset, "limit": PAGE, "name_filter": f"{USERNAME_PREFIX}-"},
            headers={"Accept": "application/jupyterhub-pagination+json"},
            timeout=2 * DEFAULT_TIMEOUT,
        )

    def create(self, names: Sequence[str]) -> Reply:
        """`POST /users`: 201 with the new ones; 409 when all exist; 500 when some may have been made."""
        timeout_s = max(len(names), DEFAULT_TIMEOUT)
        return self.session.ask(
            "POST", f"{self.endpoint}/users", json={"usernames": list(names)}, timeout=timeout_s
        )

    def read(self, name: str, observer: bool = False, until_s: float | None = None) -> Reply:
        """`GET /users/{name}`, tried until `until_s`: 200 with the model, or 404 when gone; see `state_in`."""
        timeout_s = DEFAULT_TIMEOUT if until_s is None else min(DEFAULT_TIMEOUT, self._left_s(until_s))
        call = Call(observer, retry_until_s=until_s)
        url = user_url(self.endpoint, name)
        return self.session.ask("GET", url, call=call, timeout=timeout_s, params=self.reading)

    def state(self, name: str, observer: bool = False, until_s: float | None = None) -> ServerState:
        """What the hub says of a user and their server."""
        return state_in(self.read(name, observer, until_s))

    def start(self, name: str, profile: str | Json | None, until_s: float) -> Reply:
        """`POST /users/{name}/server`: 201 ready, 202 starting, 429 throttled, 400 running or stopping, 500 failed."""
        options = {"profile": profile} if isinstance(profile, str) else profile or None
        call = Call(seen=frozenset({429}), retry_until_s=until_s)
        timeout_s = self._left_s(until_s)
        return self.session.ask("POST", self.server_url(name), call=call, json=options, timeout=timeout_s)

    def progress(self, name: str, until_s: float) -> Iterator[Json]:
        """`GET /users/{name}/server/progress`: events, of which the last is `ready` or `failed`."""
        return self.session.events(self.server_url(name, "progress"), until_s)

    def stop(self, name: str) -> Reply:
        """`DELETE /users/{name}/server`: 204 stopped, 202 stopping, 404 no such user; see `state_after_stop`."""
        return self.session.ask("DELETE", self.server_url(name))

    def denial(self, reply: Reply) -> str:
        """What the hub does with a 401 or 403, the token blamed only if `GET /user` is refused too; "" for others."""
        if reply.status not in (401, 403):
            return ""
        if self.session.token_is_refused(self.endpoint):
            return f"no longer accepts the token ({reply.status})"
        return f"denies this{f': {reply.message}' if reply.message else ' without a reason'} ({reply.status})"

    def make_token(self, name: str) -> Reply:
        """`POST /users/{name}/tokens`: 200 (1.x) or 201 with the `token`, which goes with the user."""
        return self.session.ask(
            "POST", user_url(self.endpoint, name, "tokens"), json={"note": USERNAME_PREFIX}
        )

    def _left_s(self, until_s: float) -> float:
        return max(0.05, until_s - self.session.clock())

    def delete(self, name: str) -> Reply:
        """`DELETE /users/{name}`: 204, or 404 when gone; see `state_after_delete`."""
        return self.session.ask("DELETE", user_url(self.endpoint, name))


@dataclasses.dataclass(frozen=True)
class OwnServers(Hub):
    """The hub of somebody without admin rights: each of their named servers looks like a user with a server.

    A named server is made by its start, also by one that is throttled or fails, and is there until it is removed. Hubs
    before 3.0 do not list it while it is stopped: `there` are those that were asked for and not seen removed.
    """

    owner: str = ""
    there: set[str] = dataclasses.field(default_factory=set)
    reading = {"include_stopped_servers": 1}

    def owner_of(self, name: str) -> str:
        return self.owner

    def server_url(self, name: str, *rest: str) -> str:
        return user_url(self.endpoint, self.owner, "servers", name, *rest)

    @property
    def needs_users_tokens(self) -> bool:
        return False

    def page_of_users(self, offset: int) -> Reply:
        """All named servers in `GET /users/{owner}`."""
        reply, servers = self._read_owner()
        return dataclasses.replace(reply, data=None if servers is None else list(servers.values()))

    def read(self, name: str, observer: bool = False, until_s: float | None = None) -> Reply:
        """A named server in `GET /users/{owner}`, or 404 when it is not there. A 404 for the owner says nothing."""
        reply, servers = self._read_owner(observer, until_s)
        if servers is not None and name not in servers:
            return dataclasses.replace(reply, status=404, data={})
        return dataclasses.replace(reply, data=servers and servers[name])

    def _read_owner(
        self, observer: bool = False, until_s: float | None = None
    ) -> tuple[Reply, dict[str, Json] | None]:
        """`GET /users/{owner}`, and the named servers in it: None when there is no word on them."""
        reply = super().read(self.owner, observer, until_s)
        if reply.status != 200 or not isinstance(reply.data, dict) or "servers" not in reply.data:
            return reply, None
        listed = {name: {"": _or_stopped(one)} for name, one in (reply.data["servers"] or {}).items() if name}
        servers: dict[str, Json] = {name: {} for name in self.there.copy()} | listed
        return reply, {name: {"name": name, "admin": False, "servers": one} for name, one in servers.items()}

    def start(self, name: str, profile: str | Json | None, until_s: float) -> Reply:
        """`POST /users/{owner}/servers/{name}`: as for a user; 400 too if no more are allowed: then none is made."""
        self.there.add(name)
        reply = super().start(name, profile, until_s)
        return self._unless(named_server_limit(reply) is not None, name, reply)

    def stop(self, name: str) -> Reply:
        """`DELETE /users/{owner}/servers/{name}`: as for a user, 404 when it is gone."""
        self.there.add(name)
        reply = super().stop(name)
        return self._unless(reply.hub_status == 404, name, reply)

    def delete(self, name: str) -> Reply:
        """`DELETE /users/{owner}/servers/{name}` for good: 204, or 404 when gone; 202 if it has yet to stop."""
        reply = self.session.ask("DELETE", self.server_url(name), json={"remove": True})
        return self._unless(state_after_delete(reply.hub_status) is ServerState.GONE, name, reply)

    def _unless(self, gone: bool, name: str, reply: Reply) -> Reply:
        if gone:
            self.there.discard(name)
        return reply


def _or_stopped(server: Json) -> Json:
    """A named server with `stopped`, which hubs before 3.0 do not say."""
    return server | {"stopped": not server.get("ready") and not server.get("pending")}


def state_in(reply: Reply) -> ServerState:
    """What the answer to `Hub.read` says; anything but a model or the hub's own 404 is not known."""
    if reply.hub_status == 404:
        return ServerState.GONE
    return (
        server_state(reply.data)
        if reply.status == 200 and isinstance(reply.data, dict)
        else ServerState.UNKNOWN
    )


def check_hub(endpoint: str, session: HubSession, command: str, own_servers: bool = False) -> Hub:
    """The hub at `endpoint`, once it has shown its version and accepted the token for `command`; else `SetupError`.

    `GET /` (200 with `version`, without a token), then `GET /user` (200; 403 for a bad token). Nothing is written.
    """
    version = _hub_version(endpoint, session)
    session.marked = bool(session.marked)  # where the first answer lacks the header, somebody strips it
    reply = session.ask("GET", f"{endpoint}/user", call=once())
    if reply.status in (401, 403):
        right = _own_token(endpoint) if own_servers else "the token of the hub-stress-test service"
        if len(session.token) == 64 and version in ("5.5.3", "6.1.0"):
            raise SetupError(
                f"The hub at {endpoint} refuses the token: JupyterHub {version} takes none of 64 characters. Make a "
                "shorter one, or upgrade the hub."
            )
        raise SetupError(
            f"The hub at {endpoint} refuses the token (GET /user answered {reply.status}): it is wrong, has expired, "
            f"or belongs to another hub. Put {right} into JUPYTERHUB_API_TOKEN."
        )
    if reply.status != 200 or not isinstance(reply.data, dict):
        raise SetupError(f"The hub at {endpoint} could not say whose token this is: GET /user: {reply}.")
    if own_servers:
        _check_rights_to_own_servers(reply.data, endpoint, command)
        return OwnServers(endpoint, session, version, reply.data["name"])
    _check_rights(reply.data, command)
    return Hub(endpoint, session, version)


def _hub_version(endpoint: str, session: HubSession) -> str:
    reply, proxy = _probe(endpoint, session), session.proxy_to(endpoint)
    if version := _version_in(reply):
        return version
    where = f"{endpoint}, through {proxy}" if proxy else endpoint
    if not reply.seen_status:
        what = (
            "The server does not prove who it is"
            if reply.message.startswith(NOT_ACCEPTED)
            else "Nothing answers"
        )
        raise SetupError(f"{what} at {where}: {reply.message}. {_why_nothing(endpoint, reply, session)}")
    remedy = f"; {without_proxy(endpoint)}" if proxy else ""
    raise SetupError(
        f"No hub API at {where}: {_what_came(reply)}. {_remedy(endpoint, reply, session)}{remedy}"
    )


def _wants_certificate(reply: Reply) -> bool:
    """Whether a server ended the handshake as one does that lets in nobody without a certificate.

    TLS 1.3 and 1.2 have an alert for that, which may get lost when the server closes the connection at once.
    """
    return any(end in reply.message for end in ("certificate required", "handshake failure", "eof occurred"))


def _why_nothing(endpoint: str, reply: Reply, session: HubSession) -> str:
    url = urllib.parse.urlsplit(endpoint)
    if reply.message.startswith(NOT_ACCEPTED):
        return (
            "If an authority of your own has signed it, name the file with its certificate in REQUESTS_CA_BUNDLE. Of a "
            "hub with internal_ssl use the public URL."
        )
    if _wants_certificate(reply):
        return "At its own port, a hub with internal_ssl lets in only those with a certificate: use its public URL."
    if session.proxy_to(endpoint):
        return f"Is the proxy right? Else {without_proxy(endpoint)}."
    if reply.message == NO_SUCH_HOST and "." not in (url.hostname or ""):
        return "This name exists only inside the cluster: from outside, use the hub's public URL."
    if _speaks_tls(endpoint, session):
        return f"Use https: --endpoint https:{endpoint.removeprefix('http:')}"
    return "Is the hub running, and is this its URL?"


def _speaks_tls(endpoint: str, session: HubSession) -> bool:
    """Whether an http endpoint is in truth one of https."""
    if not endpoint.startswith("http:"):
        return False
    reply = _probe("https:" + endpoint.removeprefix("http:"), session)
    return bool(_version_in(reply)) or reply.message.startswith(NOT_ACCEPTED)


def _probe(endpoint: str, session: HubSession) -> Reply:
    """What `GET /` answers; sent without the token, which nobody gets before a hub has shown itself."""
    return session.ask("GET", f"{endpoint}/", call=once(), headers={"Authorization": None})


def _version_in(reply: Reply) -> str | None:
    return str(reply.data["version"]) if isinstance(reply.data, dict) and reply.data.get("version") else None


def _what_came(reply: Reply) -> str:
    if reply.location:
        return f"it answers {reply.seen_status} and redirects to {without_credentials(reply.location)}"
    if reply.front:
        return reply.message
    return (
        f"it answers {reply}" if reply.status != 200 or reply.message else "it answers JSON without a version"
    )


def _remedy(endpoint: str, reply: Reply, session: HubSession) -> str:
    guess = likely_endpoint(endpoint, reply.location)
    if guess.startswith("https:") and endpoint.startswith("http:"):
        return f"Use https: --endpoint {guess}"
    if reply.status == 400 and _speaks_tls(endpoint, session):
        return f"Use https: --endpoint https:{endpoint.removeprefix('http:')}"
    if guess != endpoint and _version_in(_probe(guess, session)):
        return f"The hub's API is at --endpoint {guess}"
    return "An endpoint ends in /hub/api, like https://hub.example.org/hub/api"


def _check_rights(owner: Json, command: str) -> None:
    """Hubs from 2.0 list a token's scopes; before that, its owner has to be an admin."""
    otherwise = (
        ""
        if command == ACTIVITY
        else " If you are not an admin, test with servers of your own: --own-servers."
    )
    if "scopes" not in owner:
        if not owner.get("admin"):
            raise SetupError(
                f"The token's owner, {owner.get('name')}, is not an admin of this hub; only admins can make users."
                f"{otherwise}"
            )
        return
    if missing := missing_scopes(owner["scopes"], needed_scopes(command)):
        raise SetupError(
            f"The token lacks what {command} needs: {', '.join(missing)}.{otherwise} As an admin, put this into the "
            f"hub's configuration, beside the service that owns the token, and restart the hub:\n\n{ROLE_TO_PASTE}"
        )


def _check_rights_to_own_servers(owner: Json, endpoint: str, command: str) -> None:
    """A token of 1.x, or without restrictions, may do all that its user may."""
    name = str(owner.get("name"))
    if owner.get("kind") == "service":
        raise SetupError(
            f"The token belongs to the service {name}, which has no servers of its own: put {_own_token(endpoint)} "
            "into JUPYTERHUB_API_TOKEN."
        )
    needed = needed_scopes(command, own_servers=True)
    if "scopes" in owner and (missing := missing_scopes(owner["scopes"], needed, name)):
        raise SetupError(
            f"The token lacks what {command} --own-servers needs: {', '.join(f'{one}!user={name}' for one in missing)}."
            f" Put {_own_token(endpoint)}, without restrictions, into JUPYTERHUB_API_TOKEN."
        )


def _own_token(endpoint: str) -> str:
    return f"one that you make at {endpoint.removesuffix('/api')}/token"


def check_visits(hub: Hub, plan: Plan) -> None:
    """Nothing, if the token for visits may enter servers; else raises `SetupError`. On 1.x nothing tells."""
    if not plan.opens or hub.version.startswith("1."):
        return
    reply = hub.session.beside(hub.session.traffic, plan.visit_token).ask("GET", f"{hub.endpoint}/user")
    whose = "The token in JUPYTERHUB_VISIT_TOKEN" if plan.visit_token else "The token"
    if reply.status in (401, 403):
        raise SetupError(
            f"{whose} is refused by the hub at {hub.endpoint}: GET /user answered {reply.status}."
        )
    if reply.status != 200 or not isinstance(reply.data, dict):
        raise SetupError(
            f"The hub at {hub.endpoint} could not say whose token visits use: GET /user: {reply}."
        )
    owner = hub.owner_of("")
    if missing_scopes(reply.data.get("scopes", ()), {"access:servers"}, owner):
        if owner:
            raise SetupError(f"{whose} lacks what visits need: access:servers!user={owner}.")
        raise SetupError(
            f"{whose} lacks what visits need: access:servers. Test servers see the token that opens them: give a "
            "second service this scope alone, restart the hub, and put that service's token into "
            f"JUPYTERHUB_VISIT_TOKEN.\n\n{VISIT_ROLE_TO_PASTE}"
        )


def public_url(hub: Hub, plan: Plan) -> str:
    """Where people reach the hub."""
    return f"{plan.public_url or hub.endpoint.removesuffix('/hub/api')}/"


def check_server_names(hub: Hub, plan: Plan, taken: Iterable[str]) -> None:
    """Nothing, if the hub takes the names of all servers of one's own that a run will start; else raises `SetupError`.

    Hubs from 6.0 take up to 30 characters, without two hyphens in a row.
    """
    major, run = hub.version.partition(".")[0], plan.run or ""
    if not isinstance(hub, OwnServers) or plan.command == PURGE or not major.isdigit() or int(major) < 6:
        return
    count = MANY if plan.find_capacity else plan.count + plan.check_proxy
    longest = username(first_free_index(taken, run) + count - 1, run)
    if len(longest) > SERVER_NAME_MAX or "--" in longest:
        left = SERVER_NAME_MAX - len(longest) + len(run)
        raise SetupError(
            f"A hub {hub.version} takes server names of at most {SERVER_NAME_MAX} characters without double hyphens, "
            f"unlike {longest}: --run NAME may have at most {left} characters here. Nothing was changed."
        )


def check_way(hub: Hub, plan: Plan) -> None:
    """Nothing, if --check-proxy can be done from this machine; else raises `SetupError`.

    Its websockets bypass a proxy that this machine has of its own.
    """
    url = public_url(hub, plan)
    if plan.check_proxy and (proxy := hub.session.proxy_to(url)):
        raise SetupError(
            f"--check-proxy cannot be done from here, where {url} is reached through {proxy}: {without_proxy(url)}. "
            "Nothing was changed."
        )


# ==== Progress, and many things at the same time =====================================================================


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
            self._closing.enter_context(
                importlib.import_module("tqdm.contrib.logging").logging_redirect_tqdm()
            )
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


def start_thread(name: str, act: Callable[..., object], *args: Any) -> None:
    """Do this in a thread for which the program does not wait. Raises `CutShort` where the system starts no more."""
    try:
        threading.Thread(target=act, args=args, name=name, daemon=True).start()
    except RuntimeError:
        raise CutShort(
            f"this machine starts no more threads than {threading.active_count():,}: raise its limit (ulimit -u, or a "
            "container's limit of processes), or spread the people over several machines with Locust"
        ) from None


class Team:
    """Threads that work at the same time, and the loop that waits for them, ticking ten times a second.

    The end of a `with` block waits for all of them, or for the end of the run. `changed` announces that a thread
    has ended, or that a place is free.
    """

    def __init__(self, session: HubSession, on_tick: Callable[[], None] = lambda: None) -> None:
        self.changed, self.running = threading.Condition(), 0
        self._session, self._on_tick, self._tick_s = session, on_tick, session.clock()
        self._error: Exception | None = None
        session.answered_s = session.clock()

    def start(self, act: Callable[..., object], *args: Any) -> None:
        """Do this in a thread of its own. Raises `CutShort` where the system starts no more threads."""
        with self.changed:
            self.running += 1
        start_thread("hub-stress-test", self._do, act, *args)

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
            with self.changed:
                left_s = max(0.0, min(at_s, self._tick_s) - session.clock())
                is_ready = self.changed.wait_for(lambda: self._error or ready(), left_s)
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
        with self.changed:
            self.running -= 1
            self.changed.notify()


class Regularly:
    """While the `with` block runs, does something at fixed moments, whatever became of it before; told when it was due.

    At most so many are under way at the same time; beyond that they are skipped, and `skip` is called.
    """

    def __init__(
        self,
        what: str,
        period_s: float,
        act: Callable[[float], object],
        at_most: int = 1,
        skip: Callable[[], None] = lambda: None,
    ) -> None:
        self._what, self._period_s, self._act, self._at_most, self._skip = what, period_s, act, at_most, skip
        self._places = threading.Semaphore(at_most)
        self._done = threading.Event()

    def __enter__(self) -> None:
        start_thread(self._what, self._run)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        until_s = time.monotonic() + 1.0  # those that a silent hub holds up longer are left to themselves
        for _place in range(self._at_most):
            self._places.acquire(timeout=max(0.0, until_s - time.monotonic()))

    def _run(self) -> None:
        began_s = time.monotonic()
        for due_s in (began_s + n * self._period_s for n in itertools.count(1)):
            if self._done.wait(max(0.0, due_s - time.monotonic())):
                return
            if not self._places.acquire(blocking=False):
                self._skip()
                continue
            try:
                start_thread(self._what, self._do, due_s)
            except CutShort:
                self._places.release()
                self._skip()

    def _do(self, due_s: float) -> None:
        try:
            self._act(due_s)
        finally:
            self._places.release()


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
        """With which labels the figure is there."""
        return [label for known, label in self.figures if known == name]


def metrics_url(endpoint: str) -> str:
    """Where a hub shows its own figures."""
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
        self._url, self._is_hub = url, is_hub
        self._headers = {} if is_hub else dict.fromkeys(session.headers)  # which are for the hub alone
        # a session of its own, so that it sees the hub also after the load was stopped
        self._session = session.for_cleaning_up() if is_hub else session.sibling(Traffic())
        self._looking = threading.Lock()
        if optional("prometheus_client"):
            self._parser = importlib.import_module("prometheus_client.parser")
        else:
            self.missing = "prometheus-client is not installed: pip install prometheus-client"
            LOG.info("The hub's own figures are not read, since %s", self.missing)

    def __enter__(self) -> None:
        self.look()
        super().__enter__()

    def look(self) -> Snapshot | None:
        """Take one more snapshot; None when the page could not be read."""
        with self._looking:
            if self.missing:
                return None
            sent_s = self._session.clock()
            try:
                response = self._session.exchange(
                    "GET", self._url, once(observer=True), timeout=METRICS_TIMEOUT_S, headers=self._headers
                )
                hubs = not self._is_hub or self._session.is_hubs(response)
                good = response.status_code == 200 and hubs
                families = list(self._parser.text_string_to_metric_families(response.text if good else ""))
            except (requests.RequestException, ValueError) as error:
                LOG.debug("The hub's metrics could not be read: %s", why(error))
                return None
            if good:
                samples = [sample[:3] for family in families for sample in family.samples]
                self.snapshots.append(snapshot(samples, (sent_s + self._session.clock()) / 2))
                return self.snapshots[-1]
            if response.status_code == 403 and hubs:
                self.missing = NO_METRICS_SCOPE
            elif not self.snapshots:
                answered = f"answered {response.status_code}" if hubs else in_front(response)
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
    """What the hub says of itself between the first and the last snapshot."""

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
    def busy(self) -> bool:
        """Whether requests waited for the hub's one thread, which gets less CPU time on a busy machine."""
        return self.cpu_share_max > BUSY or (self.cpu_share_max > IDLE and self.late_s is not None)


def hub_figures(snapshots: Sequence[Snapshot], load_ended_s: float, servers_ready: int) -> HubFigures | None:
    """What the hub says of itself; None without two snapshots."""
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
    """The share of a processor used up to each moment, over stretches of at least 1 s where there is shot."""
    shares: list[tuple[float, float]] = []
    since = 0
    for at in range(1, len(snapshots)):
        stretch = snapshots[since : at + 1]
        took_s = stretch[-1].at_s - stretch[0].at_s
        if took_s >= 1.0 or (at == len(snapshots) - 1 and not shares):
            shares.append((stretch[-1].at_s, grown(stretch, CPU) / max(took_s, 1e-3)))
            since = at
    return shares


@dataclasses.dataclass(frozen=True)
class HubTimeline:
    """A process's CPU share, memory and open files, in seconds since the run began."""

    cpu_at_s: list[float | None]
    cpu_share: list[float | None]
    at_s: list[float | None]
    rss_bytes: list[float]
    running_servers: list[float]
    open_files: list[float]


def hub_timeline(snapshots: Sequence[Snapshot], began_s: float) -> HubTimeline | None:
    """The process at each snapshot; None when there is none."""
    if not snapshots:
        return None
    shares = cpu_shares(snapshots)
    return HubTimeline(
        cpu_at_s=[rounded(at_s - began_s) for at_s, _ in shares],
        cpu_share=[rounded(share) for _, share in shares],
        at_s=[rounded(shot.at_s - began_s) for shot in snapshots],
        rss_bytes=[shot.get(MEMORY) for shot in snapshots],
        running_servers=[
            max(0.0, shot.get("running_servers")) for shot in snapshots
        ],  # hubs miscount at times
        open_files=[shot.get(FILES) for shot in snapshots],
    )


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure before a run, at its most, and after cleaning up; `after` is None when users were kept."""

    before: float
    peak: float
    after: float | None
    grown: float | None


Aftermath = Mapping[str, Mapping[str, Change]]  # by process, and by figure


def aftermath_of(looks: Mapping[str, Sequence[Snapshot]], kept: bool) -> Aftermath | None:
    """What a run left in the processes that were watched; None without two snapshots of any."""
    aftermath: dict[str, dict[str, Change]] = {}
    for process, snapshots in looks.items():
        if len(snapshots) > 1:
            aftermath[process] = changes = {}
            for key, (name, label) in AFTERMATH.items():
                if any(shot.labels(name) for shot in snapshots):
                    values = [shot.get(name, label) for shot in snapshots]
                    rest = (None, None) if kept else (values[-1], values[-1] - values[0])
                    changes[key] = Change(values[0], max(values), *rest)
    return aftermath or None


# ==== Users: found, claimed, made ====================================================================================


def list_users(hub: Hub, record: Recorder) -> Iterator[Json]:
    """Every user whose name contains the tool's prefix, and (from hubs that do not filter) others; else `HubRefused`.

    Pages are followed by `next.offset`, since `next.url` may be wrong behind a proxy; a page may be short while there
    is a next one.
    """
    offset: int | None = 0
    while offset is not None:
        reply = hub.page_of_users(offset)
        _end_if_stopped(hub, reply)
        record.add(reply.event("list_users"))
        page = {"items": reply.data} if isinstance(reply.data, list) else reply.data
        if reply.status != 200 or not isinstance(page, dict) or "items" not in page:
            raise HubRefused(f"list its {things(isinstance(hub, OwnServers))}", reply, hub.denial(reply))
        yield from page["items"]
        offset = (page.get("_pagination", {}).get("next") or {}).get("offset")


def _end_if_stopped(hub: Hub, reply: Reply) -> None:
    """Raise `Stopped` where it was we who gave a request up."""
    if not reply.status and hub.session.stopping.is_set():
        raise Stopped


def find_users(hub: Hub, record: Recorder, run: str | None) -> list[Json]:
    """The models of all users that this tool's naming made (of one run, if named), but admins. Raises `HubRefused`."""
    return test_users(list_users(hub, record), run)


def test_users(listed: Iterable[Json], run: str | None) -> list[Json]:
    """Of these users, those that this tool's naming made (of one run, if named), but admins."""
    return [user for user in listed if is_test_user(user["name"], run) and not user.get("admin")]


class Claims:
    """The users that this run has made, or may have made: all that it will delete, and nothing else.

    A name is claimed before it is asked for, and given up when the hub says that it was taken, or is not there. If the
    answer is lost, the claim stands, even when the name is not there yet, since the hub may act late: the name was free
    when this run looked, just before. Only a run with the same --run name at the same time could make it too, and such
    a run is noticed when names that we did not create are taken: once `rivals` is set, a name whose making was not
    confirmed is not deleted.
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
    """The names of exactly `count` new users, in batches of at most `batch_size`, numbered after those `taken`.

    Names that turn out to be taken are skipped. Raises `HubRefused`, or `Stopped`; those made by then are in `claims`.
    """
    indexes = itertools.count(first_free_index(taken, run))
    made = 0
    with Progress("creating users", count) as progress:
        while made < count:
            wanted = [
                username(index, run) for index in itertools.islice(indexes, min(batch_size, count - made))
            ]
            if batch := make_batch(wanted, hub, record, claims):
                made += len(batch)
                yield batch
            progress.tell(made)


def _strange(listed: Iterable[str], claims: Claims) -> str:
    """The names that look like this tool's, nobody asked for, and were not there before the run."""
    if claims.known is None:
        return ""
    return names_text(
        name for name in {*listed} - claims.known if USERNAME_PREFIX in name and not is_test_user(name)
    )


def make_batch(wanted: list[str], hub: Hub, record: Recorder, claims: Claims) -> list[str]:
    """Those of the wanted users that this call made. Raises `CutShort`, or `Stopped`; see Claims.

    All names in a 201 were made by this call, whatever they are called. After anything but that or a 409 the hub is
    listed, since part of the batch may have been made: after a lost answer, but also after a 400 or 500.
    """
    if isinstance(hub, OwnServers):  # which are made by their start, and claimed by `come`
        return wanted
    claims.ask(wanted)
    reply = hub.create(wanted)
    _end_if_stopped(hub, reply)
    record.add(reply.event("create_users", ok=(201, 409)))
    models = reply.data if reply.status == 201 and isinstance(reply.data, list) else []
    renamed = [user["name"] for user in models if user["name"] not in wanted and not user.get("admin")]
    claims.settle([], renamed)
    no_token = reply.status in (401, 403) and hub.session.token_is_refused(hub.endpoint)
    not_done = not reply.lost and (not reply.status or no_token)  # never sent, or not let in
    unsure = reply.lost or not (models or reply.status == 409 or not_done)
    listed = [
        user["name"] for user in (list_users(hub, record) if unsure else models) if not user.get("admin")
    ]
    made = [name for name in wanted if name in listed]
    claims.rivals |= not (unsure or not_done or renamed or len(made) == len(wanted))
    claims.settle(made if reply.lost else wanted, made)
    claims.in_vain = 0 if made else claims.in_vain + 1
    if renamed:
        asked = next((name for name in wanted if name not in made), wanted[0])
        raise CutShort(
            f"the hub calls {asked} {renamed[0]}: its authenticator rewrites names; test with --own-servers"
        )
    if unsure and (strange := _strange(listed, claims)):
        raise CutShort(
            f"the hub was asked for users: {reply}. Since then it has {strange}, which may be this run's"
        )
    if not made and reply.status not in (201, 409):
        raise HubRefused("make users", reply, hub.denial(reply))
    if claims.in_vain > 1:
        raise CutShort(
            f"two requests in a row made no user ({reply}): is another run with this --run name under way?"
        )
    return made


# ==== The way to a person's server: the public side, and kernels behind websockets ===================================


def trusted(session: requests.Session, url: str) -> bool | str:
    """The certificates that a session trusts: those of a file or folder, those of requests (True), or (False) any."""
    verify = session.merge_environment_settings(url, {}, None, None, None)["verify"]
    return True if verify is None else verify


@functools.lru_cache
def tls_context(verify: bool | str) -> ssl.SSLContext:
    """What requests would use: the authorities of a file or folder, those that it comes with, or (False) none."""
    path = verify if isinstance(verify, str) else requests.utils.DEFAULT_CA_BUNDLE_PATH
    is_folder = os.path.isdir(path)
    context = ssl.create_default_context(
        cafile=None if is_folder else path, capath=path if is_folder else None
    )
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class BrowserWire(HTTPAdapter):
    """The connections of one browser. All browsers share their trusted certificates, which take long to read."""

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
        """The context has them already."""
        conn.cert_reqs, conn.ca_certs, conn.ca_cert_dir = (
            ("CERT_REQUIRED" if verify else "CERT_NONE"),
            None,
            None,
        )


class Failed(Exception):
    """A step of a person has failed; `final` when trying again is no use."""

    def __init__(self, reason: Reason, final: bool = False) -> None:
        super().__init__(reason.text)
        self.reason, self.final = reason, final


class PublicSide:
    """The way that people take to their servers: where it begins, what was sent there, and their open kernels."""

    def __init__(self, hub: Hub, plan: Plan) -> None:
        self.url = public_url(hub, plan)
        self.traffic, self.kernels = Traffic(), set[Kernel]()
        self.reached = False  # whether any visit has come through
        self.browser_tried = threading.Lock()  # held once somebody has tried what a browser sends
        self.warnings: list[str] = []
        self._hub, self._token = hub, plan.visit_token

    def browser(self, name: str) -> HubSession:
        """A session with this person's own connections. On 1.x its token is the user's. Raises `Failed`."""
        token: str | None = self._token
        if self._hub.needs_users_tokens:
            made = self._hub.make_token(name)
            if made.status not in (200, 201) or not isinstance(made.data, dict):  # and nobody else's will do
                text = f"the hub made no token for the user ({made.status or made.message})"
                raise Failed(Reason(Kind.REFUSED, text))
            token = made.data["token"]
        wire = BrowserWire(trusted(self._hub.session, self.url))
        browser = self._hub.session.beside(self.traffic, token, wire=wire)
        browser.of_servers = True
        return browser

    def server_in(self, reply: Reply) -> str:
        """The URL of the server in a user model; the token goes to no other host. Raises `Failed`."""
        if state_in(reply) is not ServerState.READY:
            raise Failed(Reason(Kind.VANISHED, "the hub no longer says that the server is ready"))
        path = reply.data["servers"][""].get("url") or reply.data.get("server")
        url = urllib.parse.urljoin(self.url, str(path))
        there, here = urllib.parse.urlsplit(url), urllib.parse.urlsplit(self.url)
        same_host = there.hostname == here.hostname or (there.hostname or "").endswith(f".{here.hostname}")
        if not path or not same_host or there.scheme not in (here.scheme, "https"):
            text = "the hub places the server on another host than people come to (see --public-url)"
            raise Failed(Reason(Kind.ROUTE, text), final=True)
        return url

    def close_kernels(self) -> None:
        """Break the connections to all kernels, so that whoever waits for one goes on at once."""
        for kernel in list(self.kernels):
            kernel.abort()


NO_ROUTE = Reason(Kind.ROUTE, "the proxy has no route (302 to the hub)")
NO_SERVER = Reason(Kind.ROUTE, "something else answers there (200 to anybody, without X-JupyterHub-Version)")


def judge_visit(reply: Reply, url: str = "", hub_version: str = "") -> None:
    """Raises `Failed` if an answer is not the page that was asked for at `url`.

    A server of JupyterHub 1.x lets in nobody but its user, whatever the version of the hub. A proxy that has just
    begun answers 404 until the hub has given it its routes.
    """
    here, there = urllib.parse.urlsplit(url), urllib.parse.urlsplit(reply.location or "")
    to_http = (here.scheme, there.scheme, there.hostname) == ("https", "http", here.hostname)
    kind, final = Kind.ROUTE, False
    if reply.status == 200:
        return
    if not reply.status:
        text = f"no page: {reply.message}"
    elif reply.status in (302, 403) and reply.version.startswith("1.") and not hub_version.startswith("1."):
        kind, final = Kind.REFUSED, True
        text = f"the server's image has JupyterHub {reply.version}, the hub {hub_version}: "
        text += f"such a server lets in its own user only ({reply.status})"
    elif "/hub/api/oauth2/authorize" in there.path:
        kind, final, text = Kind.REFUSED, True, "the server does not know the token (302 to log in)"
    elif "/hub/" in there.path:
        text = NO_ROUTE.text
    elif to_http:
        final, text = True, "a redirect to http: the proxy does not pass X-Forwarded-Proto"
    elif reply.location:
        final, text = True, f"the page redirects elsewhere ({reply.status})"
    elif reply.status == 403:
        kind, final = Kind.REFUSED, True
        text = "the server does not let the token in (403: does it have access:servers?)"
    elif reply.status == 503:
        text = "nobody listens there (503)"
    else:
        final = reply.status == 404 and bool(reply.version)
        text = f"the server's page was answered {reply.status}"
    raise Failed(Reason(kind, text), final)


TEXT, CLOSED = 1, 8  # opcodes of RFC 6455


def open_websocket(url: str, browser: HubSession, timeout_s: float) -> Any:
    """An open websocket of websocket-client; no redirect is followed. Raises `Failed`, or `TimeoutError`."""
    websocket = importlib.import_module("websocket")
    context = tls_context(trusted(browser, url.replace("ws", "http", 1)))
    socket = websocket.WebSocket(sslopt={"context": context}, skip_utf8_validation=True)
    usual, failure = requests.utils.default_headers(), ""
    headers = {name: value for name, value in browser.headers.items() if name not in usual}
    try:
        socket.connect(url, header=headers, timeout=timeout_s, redirect_limit=0)
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
    passes = ": does the proxy pass upgrades?" if status == 400 else ""
    raise Failed(Reason(Kind.WIRE, f"the websocket was refused ({status}{passes})" if status else failure))


class Kernel:
    """A kernel behind its websocket, which runs one cell at a time. What goes wrong raises `Failed`."""

    def __init__(self, socket: Any, clock: Callable[[], float]) -> None:
        self._socket, self._clock, self._opened_s = socket, clock, clock()
        self._timeouts = (TimeoutError, importlib.import_module("websocket").WebSocketTimeoutException)

    def run(self, code: Code, number: int, until_s: float) -> None:
        """Run a cell, the person's n-th: it has ended when the kernel has replied and is idle again.

        Raises `TimeoutError`.
        """
        request = os.urandom(16).hex()
        content = {"code": code.source, "silent": False, "store_history": False, "allow_stdin": False}
        header = {"msg_id": request, "msg_type": "execute_request", "version": "5.3"}
        header |= {"session": USERNAME_PREFIX, "username": ""}
        message = {
            "channel": "shell",
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": content,
        }
        try:
            self._socket.settimeout(SEND_TIMEOUT_S)
            self._socket.send(json.dumps(message))
        except Exception:  # of websocket-client, ssl or the socket
            raise Failed(self._lost()) from None
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
        if raised and not code.may_raise:
            raise Failed(Reason(Kind.CELL, f"cell {number} raised {raised}"))

    def listen(self, until_s: float) -> None:
        """Keep the connection until then: pings are answered, and the end of the kernel is noticed."""
        while self._next(until_s)[0]:
            pass

    def close(self) -> None:
        """Close the connection; the kernel stays."""
        for end in (self._socket.send_close, self._socket.shutdown):
            with contextlib.suppress(Exception):  # the other side may be gone
                end()

    def abort(self) -> None:
        """Break the connection, so that whoever waits for the kernel goes on at once."""
        with contextlib.suppress(Exception):  # it may be closed already
            self._socket.abort()

    def _next(self, until_s: float) -> tuple[str, Json]:
        """The next message and its type, which is empty when none has come until then."""
        while (left_s := until_s - self._clock()) > 0:
            try:
                self._socket.settimeout(left_s)
                opcode, data = self._socket.recv_data(control_frame=True)
                message = json.loads(data) if opcode == TEXT else {}
                kind = str(message.get("msg_type") or message.get("header", {}).get("msg_type") or "")
                state = message.get("content", {}).get("execution_state")
            except self._timeouts:
                continue
            except Exception:  # of websocket-client, ssl, the socket, or a message that is none
                raise Failed(self._lost()) from None
            if opcode == CLOSED:
                raise Failed(self._lost())
            if kind == "status" and state in ("restarting", "autorestarting", "dead"):
                raise Failed(Reason(Kind.KERNEL, "the kernel died"))
            if kind == "shutdown_reply":
                raise Failed(Reason(Kind.CELL, "somebody shut the kernel down"))
            if kind:
                return kind, message
        return "", {}

    def _lost(self) -> Reason:
        return Reason(Kind.WIRE, "the connection was lost", open_s=self._clock() - self._opened_s)


# ==== Steps of a person, each a function =============================================================================
#
# A person is a thread, or under Locust a greenlet, that runs plain, blocking steps.


class Turns:
    """Which of the starts that the hub has throttled retries next.

    Each start that ends frees a place on the hub, and the throttled start that was due first takes it: sleeping
    for the whole of the hub's Retry-After (30 to 60 s) would leave the place empty.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.freed = self._taken = 0
        self._waiting: list[float] = []

    def free(self) -> bool:
        """A place is free; whether a throttled start waits for it."""
        with self._changed:
            self.freed += 1
            self._changed.notify_all()
            return bool(self._waiting)

    def wait(self, due_s: float, freed_before: int, until_s: float, session: HubSession) -> None:
        """Until a place was freed since `freed_before` and nobody due earlier waits for it, or `until_s`, or a stop."""
        with self._changed:
            self._taken = max(self._taken, freed_before)
            self._waiting.append(due_s)
            try:
                while (left_s := until_s - session.clock()) > 0 and not session.stopping.is_set():
                    if self.freed > self._taken and due_s == min(self._waiting):
                        self._taken += 1
                        break
                    self._changed.wait(min(left_s, 0.2))
            finally:  # also when the waiting thread is killed, as Locust does to its users
                self._waiting.remove(due_s)


class FirstStarts:
    """The starts of a run until one server is ready. Three failures before that end the run.

    A hub may exit after a few failed spawns in a row (Zero to JupyterHub's after five), with everybody on it. A
    start that merely takes long does not count, nor one that is throttled or gets no answer.
    """

    def __init__(self) -> None:
        self._ready, self._failures = False, list[str]()

    def places(self, limit: int) -> int:
        """How many servers may be starting at the same time, of the `limit` that holds later."""
        return limit if self._ready else min(limit, FIRST_STARTS - len(self._failures))

    def check(self) -> None:
        """Raises `CutShort` when nobody else is to start."""
        if not self._ready and len(self._failures) >= FIRST_STARTS:
            raise CutShort(f"nothing started: the first three starts failed: {self._failures[0]}")

    def note(self, failure: Reason | None) -> None:
        """How a start ended. Raises `CutShort` when nobody else is to start."""
        self._ready |= failure is None
        if failure and failure.kind in (Kind.SPAWN, Kind.REFUSED):
            self._failures.append(failure.text)
            self.check()


class Gathering:
    """People who stay until the last of them has settled, and for `hold_s` after that."""

    def __init__(self, hold_s: float, clock: Callable[[], float]) -> None:
        self.leave_s, self.known = math.inf, threading.Event()  # the moment to leave, and whether it is known
        self._hold_s, self._clock, self._expected = hold_s, clock, math.inf
        self._settled, self._changing = set[str](), threading.Lock()

    def settle(self, name: str = "", expected: float | None = None) -> None:
        """This person has done what the others wait for, or has left; or so many people are `expected` to."""
        with self._changing:
            self._expected = self._expected if expected is None else expected
            self._settled |= {name} if name else set()
            if len(self._settled) >= self._expected and not self.known.is_set():
                if self._hold_s and self._expected:
                    LOG.info("Holding the servers for %g s", self._hold_s)
                self.leave_s = self._clock() + self._hold_s
                self.known.set()


@dataclasses.dataclass
class Removal:
    """How far users have been removed, and what the hub said."""

    gone: set[str] = dataclasses.field(default_factory=set)
    interrupted: set[str] = dataclasses.field(default_factory=set)  # servers stopped while starting, by user
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)  # the last one, for each user
    stopping_s: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # since when the hub stops a server

    def note(self, name: str, reply: Reply, task: str) -> None:
        """What the hub answered to a request to stop a server or delete a user."""
        self.refusals.pop(name, None)
        if reply.front:
            self.refusals[name] = reply.message
        elif reply.hub_status >= 400:
            verb = "fails" if reply.status >= 500 else "refuses"
            message = f": {without_name(reply.message, name)}" if reply.message else ""
            self.refusals[name] = f"the hub {verb} to {task} ({reply.status}){message}"

    def look(self, left: Mapping[str, ServerState], now_s: float) -> None:
        """What the hub listed."""
        self.gone.difference_update(left)
        stopping = [name for name, state in left.items() if state is ServerState.STOPPING]
        self.stopping_s = {name: self.stopping_s.get(name, now_s) for name in stopping}

    def in_the_way(self, left: Iterable[str], now_s: float) -> str:
        """Why these users are still there, as far as the hub tells."""
        since_s = min((at_s for name, at_s in self.stopping_s.items() if name in left), default=None)
        lasts = duration_text(now_s - since_s) if since_s is not None else ""
        reasons = [f"the hub has been stopping servers for {lasts}"] if lasts else []
        refused = [
            self.refusals[name] for name in left if name in self.refusals and name not in self.stopping_s
        ]
        return "; ".join(reasons + [text for text, _ in collections.Counter(refused).most_common(2)])


@dataclasses.dataclass
class Site:
    """What the people of one run share."""

    hub: Hub
    plan: Plan
    record: Recorder
    turns: Turns = dataclasses.field(default_factory=Turns)
    first_starts: FirstStarts = dataclasses.field(default_factory=FirstStarts)
    states: dict[str, ServerState] = dataclasses.field(default_factory=dict)  # each user's, as far as known
    claims: Claims = dataclasses.field(default_factory=Claims)
    removal: Removal = dataclasses.field(default_factory=Removal)
    starting: dict[str, Said] = dataclasses.field(default_factory=dict)  # what was said to whom until now

    def __post_init__(self) -> None:
        self.public = PublicSide(self.hub, self.plan)
        self.gathering = Gathering(self.plan.hold_s, self.hub.session.clock)


@dataclasses.dataclass
class Attempt:
    """A step under way: what its event will say. Moments are seconds of a monotonic clock."""

    due_s: float
    sent_s: float
    ended_s: float | None = None  # None: when the step's block ends
    reason: Reason | None = None
    tries: int = 1
    backoff_s: float = 0.0
    throttled: int = 0
    throttled_s: float | None = None
    asked_s: float | None = None
    message: str = ""
    phases: Phases | None = None


@dataclasses.dataclass(eq=False)
class Visitor:
    """A person with a user of their own, who is due at a moment, and acts by a plan."""

    name: str
    due_s: float
    plan: Plan
    site: Site
    on_started: Callable[[], None] = lambda: None  # called once, when the start of their server has ended
    since_s: float = 0.0  # when their last step ended
    works_s: float = 0.0  # when they got to work
    url: str = ""  # of their server
    browser: HubSession | None = None
    kernel: Kernel | None = None
    kernel_url: str = ""
    said: list[tuple[float, Json]] = dataclasses.field(
        default_factory=list
    )  # while their server was starting

    @contextlib.contextmanager
    def step(self, name: str, due_s: float | None = None) -> Iterator[Attempt]:
        """Time a step and record it. Raise `Failed` inside to fail it; a stop records nothing.

        A `TimeoutError` is that of a cell, or of its kernel.
        """
        now_s = self.clock()
        attempt, failure = Attempt(now_s if due_s is None else due_s, now_s), None
        try:
            yield attempt
        except TimeoutError:
            lasted = duration_text(self.plan.cell_timeout_s)
            failure = Failed(Reason(Kind.CELL, f"no result after {lasted}"))
        except Failed as error:
            failure = error
        attempt.reason = failure.reason if failure else None
        self.add(name, attempt)
        if failure:
            raise failure

    def add(self, name: str, attempt: Attempt) -> None:
        """Record a step that has ended; see `record`."""
        ended_s = self.clock() if attempt.ended_s is None else attempt.ended_s
        self.record(Event(name, self.name, **vars(attempt) | {"ended_s": ended_s}))

    def record(self, event: Event) -> None:
        """Record what has ended; raises `Stopped` when it was we who cut it short."""
        if self.site.hub.session.stopping.is_set():
            raise Stopped
        self.since_s = event.ended_s
        self.site.record.add(dataclasses.replace(event, group=self.plan.group))

    def clock(self) -> float:
        return self.site.hub.session.clock()

    def sleep(self, seconds: float) -> None:
        """Wait; raises `Stopped` when told to stop meanwhile."""
        if not self.site.hub.session.pause(min(seconds, threading.TIMEOUT_MAX)):
            raise Stopped

    @property
    def leaves_s(self) -> float:
        """When they leave: so long after they got to work, or when all do."""
        return self.works_s + self.plan.stay_s if self.plan.stay_s else self.site.gathering.leave_s

    def go_home(self) -> None:
        """Close what they have open."""
        self.on_started()
        self.site.gathering.settle(self.name)
        if self.kernel:
            self.site.public.kernels.discard(self.kernel)
            self.kernel.close()
        if self.browser:
            self.browser.close()


@dataclasses.dataclass(frozen=True)
class Readiness:
    """How waiting for a server ended."""

    ready_at_s: float | None = None  # None when it did not become ready
    reason: Reason | None = None
    running: bool = True  # whether something may be running on the hub


def come(person: Visitor) -> None:
    """Ask for a server, as often as the hub throttles, and follow it until it is ready or has failed.

    Records `start_server`, unless no answer came, and `server_ready`. Raises `Failed` or `CutShort`.
    """
    site, session = person.site, person.site.hub.session
    site.first_starts.check()
    site.states[person.name] = ServerState.STARTING  # from now on something may be running
    site.starting[person.name] = person.said
    reply, asked = ask_for_server(person)
    if reply.seen_status:
        person.add("start_server", asked)
    end = _follow(person, reply)
    if reply.status != 429 and site.turns.free():
        session.pause(HEAD_START_S)
    if end.ready_at_s is not None or not end.running:
        site.states[person.name] = ServerState.READY if end.running else ServerState.STOPPED
    ready = dataclasses.replace(asked, ended_s=end.ready_at_s, tries=asked.throttled + 1, backoff_s=0.0)
    reason = ready.reason = end.reason and Reason(end.reason.kind, without_name(end.reason.text, person.name))
    if end.ready_at_s is None:
        ready.message = last_word(person.said)
    else:
        moments = (asked.asked_s or person.due_s, end.ready_at_s)
        ready.phases, ready.message = phases_of(person.said, *moments), longest_wait(person.said, *moments)
    person.add("server_ready", ready)
    del site.starting[person.name]
    site.first_starts.note(reason)
    person.on_started()
    if reason:
        raise Failed(reason)


def ask_for_server(person: Visitor) -> tuple[Reply, Attempt]:
    """The hub's answer other than 429, or its last 429 when time is up; a named server of one's own is claimed.

    Raises `CutShort` when the hub allows no more of those.
    """
    claims, own = person.site.claims, isinstance(person.site.hub, OwnServers)
    if own:
        claims.ask([person.name])
    reply, asked = _ask_until_taken(person)
    limit = named_server_limit(reply) if own else None
    if limit is not None:
        claims.settle([person.name], [])
        raise CutShort(too_many(limit, person.site.plan.count))
    if own and reply.status in (201, 202, 429):
        claims.settle([person.name], [person.name])
    return reply, asked


def too_many(limit: int, count: int) -> str:
    """Why so many named servers cannot be started, and what to do."""
    if not limit:
        return (
            "the hub allows no named servers (its allow_named_servers is off), and --own-servers needs them"
        )
    wanted = f", and this run is to start {count}" if count else ""
    return (
        f"the hub allows each user {counted(limit, 'named server')}, your others included{wanted}: start fewer, "
        "remove some of yours, or have an admin raise named_server_limit_per_user"
    )


def _ask_until_taken(person: Visitor) -> tuple[Reply, Attempt]:
    site, session = person.site, person.site.hub.session
    until_s = person.due_s + person.plan.server_timeout_s
    asked = Attempt(person.due_s, session.clock(), tries=0)
    while True:
        freed, asked.asked_s = site.turns.freed, session.clock()
        reply = site.hub.start(person.name, person.plan.profile, until_s)
        asked.backoff_s += reply.backoff_s
        if reply.status == 429:
            asked.throttled += 1
            asked.throttled_s = asked.throttled_s or reply.answered_s
        if reply.status != 429 or reply.answered_s >= until_s or session.stopping.is_set():
            break
        retry_s = min(until_s, reply.answered_s + (reply.retry_after_s or THROTTLE_PAUSE_S))
        site.turns.wait(person.due_s, freed, retry_s, session)
        asked.backoff_s += session.clock() - reply.answered_s
        if session.clock() >= until_s:
            break
    event = reply.event("start_server", ok=(201, 202))
    asked.ended_s, asked.reason, asked.tries = event.ended_s, event.reason, asked.throttled + reply.tries
    return reply, asked


def _follow(person: Visitor, reply: Reply) -> Readiness:
    """What became of a start that was answered with `reply`."""
    hub, timeout_s = person.site.hub, person.plan.server_timeout_s
    waited = f"after {duration_text(timeout_s)}"
    if reply.status == 201:
        return Readiness(reply.answered_s)
    if reply.status == 429:
        kind = Kind.FULL if reply.message.startswith("Active user limit") else Kind.THROTTLED
        text = f"still throttled {waited}: {reply.message.partition('.')[0] or 429}"
        return Readiness(reason=Reason(kind, text), running=False)
    if reply.hub_status == 404:
        text = "the hub no longer knows the user: it may have restarted"
        return Readiness(reason=Reason(Kind.VANISHED, text), running=False)
    if denial := hub.denial(reply):
        return Readiness(reason=Reason(Kind.REFUSED, f"the hub {denial}"), running=False)
    end = await_ready(person.name, hub, person.due_s + timeout_s, person.said)
    if end.ready_at_s is not None or end.reason:
        return end
    if reply.front:
        reason = Reason(Kind.FRONT, reply.message)
    elif reply.status != 202 and reply.message != TIMED_OUT:
        refused = Reason(Kind.REFUSED, f"the hub answered the start with {reply}")
        reason = refused if reply.status else Reason(Kind.AWAY, f"no answer to the start: {reply}")
    elif end.running:
        waiting = last_word(person.said)
        reason = Reason(Kind.LATE, f"not ready {waited}" + (f"; the hub said: {waiting}" if waiting else ""))
    else:
        reason = Reason(Kind.VANISHED, "it vanished while starting")
    return dataclasses.replace(end, reason=reason)


def still_waiting(starting: Mapping[str, Said]) -> Iterator[str]:
    """What servers that were starting when a run was interrupted waited for."""
    words = ((name, last_word(said)) for name, said in starting.items())
    waits = collections.Counter(
        without_name(word, name) if word else "nothing was said of it" for name, word in words
    )
    for word, number in waits.most_common(3):
        yield f"{counted(number, 'server was', 'servers were')} still starting when the run was interrupted: {word}"


def await_ready(
    name: str, hub: Hub, until_s: float, said: list[tuple[float, Json]] | None = None
) -> Readiness:
    """How the start of a server ended, or that it had not by `until_s` (then without a reason).

    From the progress stream, which ends with an event `ready` or `failed`, and whose other events go to `said`;
    where no stream can be had, from the user model, which does not know why.
    """
    session, said = hub.session, [] if said is None else said
    began_s, pause_s, stopped = session.clock(), 0.1, False
    while session.clock() < until_s and not session.stopping.is_set():
        moment_s, event = follow_progress(name, hub, until_s, said)
        if event.get("ready"):
            return Readiness(moment_s)
        if event.get("failed"):
            text = spawn_failure(str(event.get("message") or ""), said, moment_s - began_s)
            return Readiness(reason=Reason(Kind.SPAWN, text), running=False)
        state = hub.state(name, observer=True, until_s=until_s)
        if state is ServerState.READY:
            return Readiness(session.clock())
        if state is ServerState.GONE or (stopped and state is ServerState.STOPPED):
            return Readiness(running=False)
        stopped = state is ServerState.STOPPED  # the hub may tell the reason a moment later
        session.pause(min(pause_s, until_s - session.clock()))
        pause_s = min(pause_s * 1.2, 1.0)
    return Readiness()


def follow_progress(
    name: str, hub: Hub, until_s: float, said: list[tuple[float, Json]]
) -> tuple[float, Json]:
    """The event that ends a progress stream, empty if none did by `until_s`; and its moment.

    The stream is read to its end, which follows at once, so that its connection can be used again.
    """
    moment_s, last = until_s, Json()
    for event in hub.progress(name, until_s):
        if not last and (event.get("ready") or event.get("failed")):
            moment_s, last = hub.session.clock(), event
        elif (
            not last and event.get("message") and event.get("progress") != 0
        ):  # 0: the hub's "Server requested"
            said.append((hub.session.clock(), event))
    return moment_s, last


def visit(person: Visitor) -> None:
    """Open the start page of the server, tried again until it comes or time is up. Raises `CutShort` too."""
    public = person.site.public
    with person.step("visit", person.since_s) as attempt:
        get_in(person, attempt, person.since_s + person.plan.visit_timeout_s)
    if person.browser and public.browser_tried.acquire(blocking=False):
        refused = why_browsers_are_refused(person.url, person.browser)
        if refused and person.site.plan.works:
            raise CutShort(refused)
        public.warnings += [refused] if refused else []


def get_in(person: Visitor, attempt: Attempt, until_s: float) -> None:
    """Try the start page until it comes; raises `Failed` when nothing else can come, or time is up."""
    site, pause_s, first_s = person.site, 0.1, person.clock()
    for attempt.tries in itertools.count(1):
        try:
            reply = open_page(person, attempt, until_s)
            site.public.reached, attempt.ended_s = True, reply.answered_s
            return
        except Failed as failure:
            late = person.clock() + pause_s >= until_s
            nobody_came = not site.public.reached and (late or person.clock() > first_s + FIRST_VISIT_S)
            if (
                failure.reason == NO_ROUTE
                and nobody_came
                and site.hub.state(person.name) is ServerState.READY
            ):
                raise CutShort(
                    f"the hub itself answers at {person.url}, where a server is ready. Is the endpoint the hub's "
                    "own port? Then name where people reach the hub with --public-url. Or has the proxy no route "
                    "to the server?"
                ) from None
            if failure.final or late:
                raise
        person.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 1.0)


def open_page(person: Visitor, attempt: Attempt, until_s: float) -> Reply:
    """The start page; raises `Failed`. Redirects below the server's URL are followed, others are answers."""
    hub, public = person.site.hub, person.site.public
    if not person.browser:
        person.url = public.server_in(hub.read(person.name, until_s=until_s))
        person.browser = public.browser(person.name)
    url = person.url
    for _ in range(REDIRECTS_MAX):
        left_s = max(1.0, min(DEFAULT_TIMEOUT, until_s - person.clock()))
        reply = person.browser.ask("GET", url, call=once(again=attempt.tries > 1), timeout=left_s)
        target = urllib.parse.urljoin(url, reply.location or "")
        if not reply.location or not target.startswith(person.url):
            break
        url = target
    attempt.message = reply.message if isinstance(reply.data, dict) else ""
    judge_visit(reply, url, hub.version)
    anonymous = {"Authorization": None}
    if not reply.version and person.browser.ask("GET", url, call=once(), headers=anonymous).status == 200:
        raise Failed(NO_SERVER, final=True)
    return reply


def why_browsers_are_refused(url: str, browser: HubSession) -> str:
    """Why a server refuses what browsers send, though it takes the same with a token; "" when it does not.

    A server answers 404 if the Origin of a browser's request is not the Host that it sees, unless the site allows
    that origin. Of who has a token it does not ask that, so only browsers notice a proxy that loses the Host header.
    """
    place = urllib.parse.urlsplit(url)
    origin = f"{place.scheme}://{place.netloc.rpartition('@')[2]}".lower()
    origin = origin.removesuffix({"http": ":80", "https": ":443"}[place.scheme])

    def status(**headers: str) -> int:
        anonymous = headers | {"Authorization": None}
        return browser.ask("GET", f"{url}api/status", call=once(observer=True), headers=anonymous).status

    if status(Origin=origin) != 404 or (otherwise := status()) not in (200, 403):
        return ""
    return (
        f"no browser gets a kernel: servers refuse what a page at {origin} sends (404, and {otherwise} without its "
        "Origin), since the proxy does not pass on the Host header. In nginx: proxy_set_header Host $http_host; or "
        "have the servers allow that origin (allow_origin)"
    )


def load_page(person: Visitor) -> None:
    """Fetch what a browser fetched, in its order and over as many connections, up to the first failure."""
    browser, recorded = person.browser, person.plan.page
    if not browser or not recorded:
        return
    bad = list[tuple[str, str]]()  # what failed, and its path

    def fetch(part: tuple[str, int]) -> None:
        """The body is read, not kept. What fails ends the page; so does a stop."""
        path, before = part
        if bad or browser.stopping.is_set():
            return
        try:
            with browser.exchange("GET", person.url + path, once(), stream=True) as response:
                for _ in response.raw.stream(1 << 16, decode_content=False):
                    pass
            status = response.status_code
            if status >= 500 or (status >= 400 > before) or (response.is_redirect and before < 300):
                bad.append((f"a part of the page was answered {status}", path))
        except (OSError, Stopped, HTTPError) as error:  # of requests, and of reading on
            bad.append((f"a part of the page did not come: {why(error)}", path))

    with person.step("page") as attempt:
        with ThreadPoolExecutor(CONNECTIONS_OF_A_BROWSER) as connections:
            list(connections.map(fetch, recorded.requests))
        if bad:
            text, path = bad[0]
            attempt.message = path.partition("?")[0]
            raise Failed(Reason(Kind.ROUTE, text))


def start_kernel(person: Visitor) -> None:
    """Ask for a kernel, open its websocket, which waits for the kernel, and run the first cell."""
    browser, timeout_s = person.browser, person.plan.cell_timeout_s
    if not browser:
        return
    with person.step("kernel_ready") as attempt:
        until_s = attempt.sent_s + timeout_s
        reply = browser.ask("POST", f"{person.url}api/kernels", json={}, call=once(), timeout=timeout_s)
        if reply.status != 201 or not isinstance(reply.data, dict):
            attempt.message = reply.message
            if reply.message == TIMED_OUT:
                raise TimeoutError
            if reply.status == 404:
                text = "the server is no Jupyter (404 for kernels): use --visit and --page"
                raise Failed(Reason(Kind.REFUSED, text))
            text = f"the server did not start a kernel ({reply.status or reply.message})"
            raise Failed(Reason(Kind.REFUSED, text))
        kernel_id = urllib.parse.quote(str(reply.data.get("id")), safe="")
        person.kernel_url = f"{person.url}api/kernels/{kernel_id}"
        url = f"ws{person.kernel_url.removeprefix('http')}/channels"
        websocket = open_websocket(url, browser, max(0.1, until_s - person.clock()))
        person.kernel = Kernel(websocket, browser.clock)
        person.site.public.kernels.add(person.kernel)
        person.kernel.run(cells_of(person.plan)[0], 1, until_s)


def cells_of(plan: Plan) -> Sequence[Code]:
    """The cells that a person runs, first to last."""
    return plan.notebook.cells if plan.notebook else (SIX_TIMES_SEVEN,)


def get_to_work(person: Visitor) -> None:
    """What a person waits before they can work: everything up to here."""
    person.works_s = person.since_s
    person.add("at_work", Attempt(person.due_s, person.due_s, person.since_s))


def work(person: Visitor) -> None:
    """Run the cells after the first one, thinking before each; then stay, with the connection open, until it is time.

    Without a notebook a person works on until they leave, and the others do not wait for that.
    """
    plan, kernel, cells, gathering = person.plan, person.kernel, cells_of(person.plan), person.site.gathering
    if not kernel:
        return
    if not plan.notebook or plan.find_capacity:
        gathering.settle(person.name)
    for number, code in enumerate(cells[1:] if plan.notebook else itertools.repeat(cells[0]), 2):
        think(person, kernel, person.clock() + plan.think_s)
        if person.clock() >= person.leaves_s:
            break
        with person.step("cell") as attempt, knowing_the_server(person):
            kernel.run(code, number, attempt.sent_s + plan.cell_timeout_s)
    gathering.settle(person.name)
    think(person, kernel, math.inf)
    if plan.stay_s and person.browser:
        person.browser.ask("DELETE", person.kernel_url, call=once())


def think(person: Visitor, kernel: Kernel, until_s: float) -> None:
    """Listen to the kernel until then, or until it is time to leave. What goes wrong is the failure of a cell."""
    while (now_s := person.clock()) < (due_s := min(until_s, person.leaves_s)):
        try:
            kernel.listen(due_s if math.isfinite(person.leaves_s) else min(due_s, now_s + 1.0))
        except Failed as failure:
            with person.step("cell"), knowing_the_server(person):
                raise failure


@contextlib.contextmanager
def knowing_the_server(person: Visitor) -> Iterator[None]:
    """Name a connection that breaks as what it is when the server has ended: by the hub, and by the server itself."""
    try:
        yield
    except Failed as failure:
        if failure.reason.kind not in (Kind.WIRE, Kind.KERNEL) or not person.browser:
            raise
        state = person.site.hub.state(person.name)
        page = person.browser.ask("GET", f"{person.url}api", call=once(observer=True))
        if state in (ServerState.STOPPED, ServerState.STOPPING, ServerState.GONE):
            lost = "the hub has stopped it, or noticed that it ended (culled, evicted, its node lost?)"
        elif state is ServerState.READY and page.seen_status in (0, 502, 503, 504):
            lost = (
                "nobody answers there, and the hub has not noticed (evicted, out of memory, its node lost?)"
            )
        else:
            raise
        raise Failed(Reason(Kind.LOST, f"the server ended while it was in use: {lost}")) from None


def stay(person: Visitor) -> None:
    """Keep the server, then look whether it is there, and answers if it was visited. Raises `HubRefused` too."""
    hub, gathering = person.site.hub, person.site.gathering
    person.works_s = person.works_s or person.since_s
    with person.step("stay") as attempt:
        attempt.due_s = attempt.sent_s = person.works_s
        gathering.settle(person.name)
        if not person.plan.stay_s:
            gathering.known.wait()
        person.sleep(person.leaves_s - person.clock())
        look_until_s = person.clock() + RETRY_WINDOW_S
        while (state := state_in(reply := hub.read(person.name))) is ServerState.UNKNOWN:
            if person.clock() > look_until_s or reply.status in (401, 403):
                task = "say whether the servers that were held are still there"
                raise HubRefused(task, reply, hub.denial(reply))
            person.sleep(1.0)
        if state is not ServerState.READY:
            raise Failed(Reason(Kind.LOST, "it became ready, and was gone while it was held"))
        if person.browser:
            try:
                get_in(person, attempt, person.clock() + person.plan.visit_timeout_s)
            except Failed as failure:
                if failure.reason.kind is Kind.REFUSED:
                    raise
                text = f"it no longer answered at the end of the hold: {failure.reason.text}"
                raise Failed(Reason(Kind.LOST, text)) from None


def stop(person: Visitor) -> None:
    """Stop the server, if there is one, and wait until it has stopped."""
    ask_to_stop(person)
    states, until_s = person.site.states, person.clock() + SERVER_LIFECYCLE_TIMEOUT
    while states.get(person.name) is ServerState.STOPPING and person.clock() < until_s:
        person.sleep(0.5)
        states[person.name] = person.site.hub.state(person.name)


def ask_to_stop(person: Visitor) -> None:
    """Have the hub stop the server, if there is one.

    A start cannot be stopped on hubs before 5.1, which answer 400; then nobody knows the server's state. Where it
    can, the spawner may have begun what outlives it: a pod, a job in a queue.
    """
    site, name = person.site, person.name
    if site.states.get(name) is ServerState.STARTING:
        site.states[name] = site.hub.state(name)  # it may be ready by now
    if (state := site.states.get(name)) in (ServerState.STARTING, ServerState.READY):
        reply = site.hub.stop(name)
        site.states[name] = state_after_stop(reply.hub_status)
        site.removal.note(name, reply, "stop servers")
        if state is ServerState.STARTING and reply.hub_status in (0, 202, 204):
            site.removal.interrupted.add(name)
        person.record(reply.event("stop_server", name, ok=(202, 204, 404)))


def delete(person: Visitor) -> None:
    """Delete the user, if there is no server; else it is left to cleaning up."""
    site, name = person.site, person.name
    if site.states.get(name) is ServerState.STOPPED:
        reply = site.hub.delete(name)
        site.states[name] = state_after_delete(reply.hub_status)
        site.removal.note(name, reply, f"delete {things(isinstance(site.hub, OwnServers))}")
        ok = (202, 204, 404)  # 202: a server of one's own has yet to stop
        person.record(reply.event("delete_user", name, ok=ok))


# ==== The table of steps, and a person's journey through them ========================================================


Act = Callable[[Visitor], None]


@dataclasses.dataclass(frozen=True)
class Step:
    """What is measured under a name: in results, conditions, tables and Locust."""

    name: str
    title: str
    scopes: tuple[str, ...] = ()  # that the token needs for it
    act: Act | None = None  # what a person does; None: it is measured elsewhere
    wanted: Callable[[Plan], bool] = lambda plan: True  # whether a person does it
    always: bool = False  # also after an earlier step has failed


STEPS = {
    step.name: step
    for step in (
        Step("server_ready", "server ready", ("read:servers",), come),
        Step("start_server", "start request", ("servers",)),
        Step("visit", "visit", (), visit, lambda plan: plan.opens),
        Step("page", "page", (), load_page, lambda plan: plan.page is not None),
        Step("kernel_ready", "kernel ready", (), start_kernel, lambda plan: plan.work),
        Step("at_work", "at work", (), get_to_work, lambda plan: plan.rehearses),
        Step("cell", "cell", (), work, lambda plan: plan.work),
        Step("stay", "stay", (), stay, lambda plan: bool(plan.hold_s or plan.stay_s)),
        Step(
            "stop_server",
            "stop request",
            ("delete:servers",),
            stop,
            lambda plan: bool(plan.stay_s),
            always=True,
        ),
        Step("create_users", "create users", ("admin:users",)),
        Step(
            "delete_user",
            "delete user",
            ("delete:users",),
            delete,
            lambda plan: bool(plan.stay_s),
            always=True,
        ),
        Step("list_users", "list users", ("list:users", "read:servers")),
        Step("activity", "activity report", ("users:activity",)),
        Step("read", "read user"),
        Step("list", "list page"),
        Step("ping", "ping"),
    )
}
PERSONAL = tuple(step.name for step in STEPS.values() if step.act and not step.always)
STEPS_OF = {
    STRESS: ("create_users", "list_users", "start_server", "server_ready", "stop_server", "delete_user"),
    ACTIVITY: ("create_users", "list_users", "activity", "delete_user"),
    PURGE: ("list_users", "stop_server", "delete_user"),
}


def needed_scopes(command: str, own_servers: bool = False) -> set[str]:
    """The scopes that a token needs for a command; for servers of one's own, only those that are about servers."""
    needed = {scope for name in STEPS_OF[command] for scope in STEPS[name].scopes}
    return {scope for scope in needed if scope.endswith("servers") or not own_servers}


def new_recorder(*listeners: Callable[[Event], None]) -> Recorder:
    """A recorder that keeps each person's way."""
    return Recorder(*listeners, people_steps={step.name for step in STEPS.values() if step.act})


def title_of(name: str, own_servers: bool = False) -> str:
    """An operation's title, with the group, if it is that of a group; one of the operator's own is its name."""
    step, bracket, group = name.partition("[")
    title = STEPS[step].title + f" {bracket}{group}".rstrip() if step in STEPS else name
    return title.replace("user", "server") if own_servers else title


def journey(person: Visitor) -> None:
    """Take a person through the steps of their plan, in order, up to the first that fails; leaving always follows.

    A stop ends it without a record: it was we who cut the step short. Raises `Stopped` or `CutShort`.
    """
    failed = False
    try:
        for step in STEPS.values():
            if step.act and step.wanted(person.plan) and (step.always or not failed):
                failed |= not take(step.name, step.act, person)
    finally:
        person.go_home()


def take(name: str, act: Act, person: Visitor) -> bool:
    """Take one step; whether it succeeded. What nobody expected is a failure of this person."""
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
        reason = Reason(Kind.BROKEN, f"{type(error).__name__}: {error}")
        person.add(name, Attempt(person.due_s, began_s, reason=reason))
        return False


class Streak:
    """Listens for failures in a row: `reached`, for good, once so many people have failed between two at their goal."""

    def __init__(self, length: int, goal: str) -> None:
        self.reached = False
        self._goal, self._failed = goal, collections.deque[bool](maxlen=length or None)

    def __call__(self, event: Event) -> None:
        if event.step == self._goal or (event.step in PERSONAL and event.reason):
            self._failed.append(event.reason is not None)
            if len(self._failed) == self._failed.maxlen and all(self._failed):
                self.reached = True


def send_people(names: Sequence[str], site: Site, on_tick: Callable[[], None] = lambda: None) -> None:
    """Send people through their journeys, and wait for all of them. Raises `CutShort`.

    They start when they are due (open model), or while fewer than the plan's batch size are starting (closed model).
    """
    plan, session, begun = site.plan, site.hub.session, 0
    began_s, streak, starting = session.clock(), Streak(plan.fail_fast, plan.goal), set[str]()
    site.record.listen(streak)

    def has_place(due_s: float) -> bool:
        if plan.is_open:
            return session.clock() >= due_s or streak.reached
        return len(starting) < site.first_starts.places(plan.batch_size) or streak.reached

    def started(name: str) -> None:
        with team.changed:
            starting.discard(name)
            team.changed.notify()

    try:
        with Team(session, on_tick) as team:
            for name, (after_s, group) in zip(names, arrivals(plan)):
                due_s = began_s + after_s
                if not team.wait_for(functools.partial(has_place, due_s), due_s) or streak.reached:
                    break
                due_s = due_s if plan.is_open else session.clock()
                starting.add(name)
                begun += 1
                team.start(journey, Visitor(name, due_s, group, site, functools.partial(started, name)))
            site.gathering.settle(expected=begun)
    finally:
        site.gathering.known.set()  # those who wait for it when a run ends early go on


def arrivals(plan: Plan) -> list[tuple[float, Plan]]:
    """Who arrives: when, in seconds since the beginning (0 in the closed model), and by which plan.

    The same seed gives the same moments. Uniform ones are what a Poisson process looks like once one knows how many
    came.
    """
    people = [(group.after_s + at_s, group) for group in plan.groups for at_s in _moments(group, plan.seed)]
    return sorted(people, key=lambda person: person[0])


def _moments(plan: Plan, seed: int | None) -> list[float]:
    if plan.within_s:
        draw = random.Random(
            f"{seed} {plan.group}" if plan.group else seed
        )  # each group at moments of its own
        return sorted(plan.within_s * draw.random() for _ in range(plan.count))
    schedule = Schedule.of(plan.rate_per_s)
    return [schedule.due_s(n) if schedule else 0.0 for n in range(plan.count)]


# ==== Cleaning up ====================================================================================================


@dataclasses.dataclass(frozen=True)
class CleanUp:
    """What cleaning up did: how many users are gone, who is still there, and why."""

    deleted: int = 0
    left: tuple[str, ...] = ()
    kept: int = 0
    in_the_way: str = ""


@timeit
def remove_users(
    thought: Mapping[str, ServerState],
    ours: Callable[[str], bool],
    hub: Hub,
    record: Recorder,
    concurrency: int,
    timeout_s: float = CLEANUP_TIMEOUT_S,
    removal: Removal | None = None,
) -> CleanUp:
    """Remove users until the hub lists none that are `ours`, or there was no progress for `timeout_s` seconds.

    `thought` is what is thought of each user; after every round the hub's own list corrects that. Users thought to be
    `UNKNOWN` are looked for first. Nothing is done to a user for whom `ours` is not true, nor to an admin. `removal`
    is kept up to date while this goes on.
    """
    session, removal = hub.session, removal or Removal()
    left = {name: state for name, state in thought.items() if ours(name)}
    existing = {name for name, state in left.items() if state is not ServerState.UNKNOWN}
    pause_s, until_s, refusals = 0.2, session.clock() + timeout_s, 0
    to_do = dict(left)
    with Progress(f"removing {things(isinstance(hub, OwnServers))}", len(left)) as progress:
        while True:
            before = len(left)
            let_go(to_do, hub, record, concurrency, removal, lambda: progress.tell(len(removal.gone)))
            try:
                found = [
                    user for user in list_users(hub, record) if ours(user["name"]) and not user.get("admin")
                ]
                left = {user["name"]: server_state(user) for user in found}
                left |= _unlisted(thought.keys() - left.keys() - removal.gone, hub)
                to_do = dict(left)
                existing |= left.keys()
                removal.look(left, session.clock())
                done, refusals = not left, 0
            except (HubRefused, Stopped) as error:
                left, to_do = {name: state for name, state in left.items() if name not in removal.gone}, {}
                if isinstance(error, HubRefused):
                    LOG.warning("Cleaning up: %s", error)
                    refusals += error.denied or not left
                done = refusals == 3
            if done or session.clock() >= until_s or not session.pause(pause_s):
                why = removal.in_the_way(left, session.clock())
                return CleanUp(len(existing - left.keys()), tuple(sorted(left, key=natural)), in_the_way=why)
            if len(left) < before:
                pause_s, until_s = 0.2, session.clock() + timeout_s
            pause_s = min(pause_s * 1.5, 5.0)


def _unlisted(names: Iterable[str], hub: Hub) -> dict[str, ServerState]:
    """Of users whose names are not this tool's, so that no list of it has them, those that are still there."""
    states = {name: hub.state(name) for name in names if f"{USERNAME_PREFIX}-" not in name}
    return {name: state for name, state in states.items() if state is not ServerState.GONE}


def let_go(
    states: dict[str, ServerState],
    hub: Hub,
    record: Recorder,
    concurrency: int,
    removal: Removal,
    on_tick: Callable[[], None],
) -> None:
    """One round: stop and delete each user as far as that goes without waiting; `states` and `removal` tell how far.

    Servers that are starting are stopped last: meanwhile some become ready, and leave nothing that the hub forgets.
    """
    site = Site(hub, Plan(), record, states=states, removal=removal)

    def leave(name: str) -> None:
        was_gone = states[name] is ServerState.GONE
        person = Visitor(name, hub.session.clock(), site.plan, site)
        if take("stop_server", ask_to_stop, person):
            take("delete_user", delete, person)
        if states[name] is ServerState.GONE and not was_gone:
            removal.gone.add(name)

    with Team(hub.session, on_tick) as team:
        for name in sorted(states, key=lambda name: states[name] is ServerState.STARTING):
            if not team.wait_for(lambda: team.running < concurrency):
                break
            try:
                team.start(leave, name)
            except CutShort:  # no thread is left: one after the other, then
                leave(name)


# ==== Load: operations, closed and open model; pings =================================================================

Send = Callable[[str, str, HubSession], requests.Response]
OPERATIONS: dict[str, Send] = {}


def operation(name: str) -> Callable[[Send], Send]:
    """A decorator that gives a function `(username, endpoint, session) -> requests.Response` a name for --mix."""

    def register(function: Send) -> Send:
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

    The reason for which it failed. Statuses from 400 on are failures, unless they are `fine`; so is every answer that
    something in front of the hub gave.
    """
    sent_s, call, reason = session.clock(), Call(tries=1), None
    try:
        response = send(user, endpoint, session)
        call = call_of(response.request)
        if str(response.url).startswith(endpoint) and not session.is_hubs(response):
            reason = Reason(Kind.FRONT, in_front(response))
        elif not response.ok and response.status_code not in fine:
            reason = Reason(Kind.REFUSED, str(response.status_code))
    except Stopped:
        return None
    except requests.RequestException as error:
        reason, call = Reason(Kind.AWAY, why(error)), call_of(error.request)
    except Exception as error:
        LOG.debug("The operation %s failed on %s", step, user, exc_info=True)
        reason = Reason(Kind.BROKEN, f"{type(error).__name__}: {error}")
    due_s = sent_s if due_s is None else due_s
    record.add(Event(step, user, due_s, sent_s, session.clock(), reason, call.tries, call.backoff_s))
    return reason


@dataclasses.dataclass(frozen=True)
class Load:
    """What load to send: to whom, what, and by which model (open with a rate, else closed)."""

    endpoint: str
    users: tuple[str, ...]
    mix: Mapping[str, float]
    workers: int  # threads in each process; in the open model there are more if a slow hub could need them
    rate_per_s: float | Schedule | None = None
    duration_s: float | None = None  # None: once through the users
    processes: int = 1
    operations_file: str | None = None

    @property
    def schedule(self) -> Schedule | None:
        """When each request of an open load is due."""
        return Schedule.of(
            self.rate_per_s, self.duration_s or len(self.users) / (fastest(self.rate_per_s) or 1.0)
        )

    @property
    def planned(self) -> int:
        """How many requests a load consists of, once through the users in the closed model."""
        return self.schedule.count if self.schedule else len(self.users)

    @property
    def title(self) -> str:
        """What is going on while it is sent."""
        if self.rate_per_s:
            return f"sending {rate_text(self.rate_per_s)}"
        return f"sending for {self.duration_s:g} s" if self.duration_s else "sending"

    @property
    def open_workers(self) -> int:
        """Threads that an open load needs in each process to go on while the hub answers nothing for 3 seconds.

        More than 200 get into each other's way: then more processes are what helps.
        """
        return max(self.workers, min(200, math.ceil(3 * fastest(self.rate_per_s) / self.processes)))


def load_of(plan: Plan, endpoint: str, users: Sequence[str]) -> Load:
    """The load that a plan sends for these users."""
    mix, workers = plan.mix or DEFAULT_MIX, math.ceil(plan.workers / plan.processes)
    how = (plan.rate_per_s, plan.duration_s, plan.processes, plan.operations)
    return Load(endpoint, tuple(users), mix, workers, *how)


def send_load(
    load: Load,
    part: int,
    started_s: float,
    session: HubSession,
    record: Recorder,
    on_tick: Callable[[], None],
) -> float:
    """Send one process's part of a load, from `started_s` on; the share of a processor that it took."""
    numbers, schedule, clock = itertools.count(part, load.processes), load.schedule, session.clock
    until_s = started_s + load.duration_s if load.duration_s else math.inf
    last_s = started_s + schedule.lasts_s + OPEN_GRACE_S if schedule else math.inf
    workers = load.workers * load.processes

    def send(n: int, user: str, due_s: float | None = None) -> None:
        name = choose(load.mix, n)
        perform(name, OPERATIONS[name], user, load.endpoint, session, record, due_s)

    def send_when_due(schedule: Schedule) -> None:
        """Take the next number, and send that request when it is due (open model)."""
        while (n := next(numbers)) < load.planned and clock() < last_s:
            due_s = started_s + schedule.due_s(n)
            if not session.pause(due_s - clock()):
                return
            send(n, load.users[n % len(load.users)], due_s)

    def send_share(worker: int) -> None:
        """One request for each user of a share, each after a random 0 to 1 s (closed model)."""
        share = load.users[worker::workers]
        for n, user in enumerate(itertools.cycle(share) if load.duration_s else share):
            if not session.pause(random.random()) or clock() >= until_s:
                return
            send(n, user)

    cpu_s = time.process_time()
    session.pause(started_s - clock())
    with Team(session, on_tick) as team:
        if schedule:
            for _ in range(load.open_workers):
                team.start(send_when_due, schedule)
        else:
            for worker in range(part, min(workers, len(load.users)), load.processes):
                team.start(send_share, worker)
    return (time.process_time() - cpu_s) / max(clock() - started_s, 1e-3)


def spread_load(load: Load, session: HubSession, record: Recorder) -> float:
    """Send a load from its processes; the busiest one's share of a processor while it sent.

    Events go to `record`, counts to the session. Raises `CutShort` when a process dies.
    """
    with Progress(load.title, None if load.duration_s and not load.rate_per_s else load.planned) as progress:

        def on_tick() -> None:
            progress.tell(record.count(load.mix), record.failures(load.mix))

        if load.processes > 1:
            return _spread_over_processes(load, session, record, on_tick)
        return send_load(load, 0, session.clock(), session, record, on_tick)


def _spread_over_processes(
    load: Load, session: HubSession, record: Recorder, on_tick: Callable[[], None]
) -> float:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(load.processes)]
    children = [
        context.Process(target=_send_in_process, args=(theirs, load, part, session.token), daemon=True)
        for part, (_, theirs) in enumerate(pipes)
    ]
    with _signals_blocked():
        for child, (_, theirs) in zip(children, pipes):
            child.start()
            theirs.close()
    try:
        return _lead([ours for ours, _ in pipes], session, record, on_tick)
    except (EOFError, OSError):
        raise CutShort("a process that sends the load died") from None
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


def _lead(
    pipes: Sequence[Connection], session: HubSession, record: Recorder, on_tick: Callable[[], None]
) -> float:
    """Start the processes at one moment, record their events, pass a stop on; the largest share of a processor."""
    import multiprocessing.connection

    for pipe in pipes:
        pipe.recv()  # it is ready
    for pipe in pipes:
        pipe.send(session.clock() + 0.2)
    busiest, waiting, told = 0.0, list(pipes), False
    while waiting:
        multiprocessing.connection.wait(waiting, timeout=0.1)
        for pipe in [pipe for pipe in waiting if pipe.poll()]:
            events, end = pipe.recv()
            for event in events:
                record.add(event)
            if end:
                counts, cpu_share = end
                session.traffic.add(counts)
                busiest = max(busiest, cpu_share)
                waiting.remove(pipe)
        on_tick()
        if session.stopping.is_set() and not told:
            told = True
            for pipe in waiting:
                pipe.send("stop")
    return busiest


def _send_in_process(pipe: Connection, load: Load, part: int, token: str) -> None:
    """One of several processes; it leaves signals to the one that started it, and ends with it."""
    load_operations(load.operations_file)
    session, events = get_session(token, pool_maxsize=load.open_workers), collections.deque[Event]()

    def hand_on(end: tuple[Mapping[str | int, int], float] | None = None) -> None:
        if pipe.poll():  # told to stop, or left alone
            session.stop()
        with contextlib.suppress(OSError):
            pipe.send(([events.popleft() for _ in range(len(events))], end))

    pipe.send("ready")
    cpu_share = send_load(load, part, pipe.recv(), session, Recorder(events.append), hand_on)
    hand_on((session.traffic.counts, cpu_share))


def pinging(user: str, endpoint: str, session: HubSession, record: Recorder) -> Regularly:
    """Reads one user five times a second: what everybody else on the hub feels."""

    def read(user: str, endpoint: str, session: HubSession) -> requests.Response:
        """`GET /users/{name}`, once: a retry would hide what it is there to see."""
        return session.exchange("GET", user_url(endpoint, user), once(observer=True))

    def ping(due_s: float) -> None:
        if not session.stopping.is_set():
            reason = perform(
                "ping", read, user, endpoint, session, record, due_s, fine={404}
            )  # the user has left
            if reason:
                session.say_if_silent(reason.text)

    return Regularly("ping", 1 / PING_RATE_PER_S, ping, PINGS_AT_MOST, functools.partial(record.skip, "ping"))


# ==== Checking the proxy: does it lose connections when servers end? =================================================

CHECK_ENDED, CHECK_STOPPED = (
    100,
    20,
)  # handshakes to a server that has ended by itself, and to one that was stopped
CHECK_LEAST, CHECK_UNANSWERED = 20, 3
CHECK_COSTS = f"some three minutes, and up to {CHECK_ENDED + CHECK_STOPPED} connections that an affected proxy keeps for an hour"
CHECK_CALM_S = 10.0  # until the connections of the load have come to rest
CHECK_AGAIN_S = 60.0  # what is still held so long afterwards is lost
PROOF_SHARE, CLEAN_SHARE = (
    0.8,
    0.1,
)  # of the handshakes: as many connections lost prove a leak, or that there is none
EVENTS = "api/events/subscribe"  # a websocket of every server
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
}
CLOSED_UNANSWERED, UNANSWERED = "connection reset", TIMED_OUT  # as `why` calls them


@dataclasses.dataclass(frozen=True)
class ProxyCheck:
    """Whether the proxy loses connections when servers end: `verdict` is clean, leaking or undecided."""

    verdict: str
    leaking: int | None  # 1 when it does, None when that is undecided
    reason: str
    handshakes: int = 0
    open_files: float | None = None  # by how many the hub's have grown; None when its figures were not read


CLEAN, LEAKING, UNDECIDED = "clean", "leaking", "undecided"


def of_ended_server(reply: Reply) -> bool:
    """Whether a proxy answered so because nobody listens where its route leads: 503, nothing, or 502 behind another."""
    return reply.status in (502, 503) or reply.message == CLOSED_UNANSWERED


def is_telling(reply: Reply) -> bool:
    """Whether only a proxy that loses connections answers a handshake so: nothing, 502 or 504 behind another."""
    return reply.status in (502, 504) or reply.message in (CLOSED_UNANSWERED, UNANSWERED)


def lost_by(before: Sequence[Snapshot], look: Snapshot) -> float:
    """How many connections to the hub a proxy may have lost since: by how many both figures have grown at least.

    These are the hub's open files and the error pages that it drew for the proxy. A lost connection may be one that the
    proxy had kept ready for reuse; so files count from the lowest look before.
    """
    files, pages = (AFTERMATH[name] for name in ("open_files", "proxy_error_pages"))
    more_files = look.get(*files) - min(one.get(*files) for one in before)
    return min(more_files, look.get(*pages) - before[-1].get(*pages))


def judge_proxy(
    page: int,
    ended: Sequence[Reply],
    stopped: Sequence[Reply],
    before: Sequence[Snapshot],
    after: Sequence[Snapshot],
) -> ProxyCheck:
    """What a proxy showed that was asked for a server which had ended by itself, and then for one that was stopped.

    `page` is the status of a plain page of the ended server; `ended` and `stopped` are what websockets were answered;
    `before` and `after` (right after those to the ended server, and a minute later) are looks at the hub's figures.
    """
    number, figures = len(ended), (AFTERMATH["open_files"], AFTERMATH["proxy_error_pages"])
    grown_by = [
        max(look.get(*one) - before[-1].get(*one) for look in after) for one in figures if before and after
    ]
    lost = min((lost_by(before, look) for look in after), default=0.0) if grown_by else None
    asked = f"{counted(number, 'websocket')} asked for a server that had ended"

    def found(verdict: str, reason: str) -> ProxyCheck:
        sent = number + len(stopped)
        leaking = None if verdict == UNDECIDED else int(verdict == LEAKING)
        return ProxyCheck(verdict, leaking, reason, sent, grown_by[0] if grown_by else None)

    if lost is not None and number >= CHECK_LEAST and lost >= PROOF_SHARE * number:
        held = counted(round(lost), "connection")
        return found(LEAKING, f"{asked}; a minute later the proxy still held {held} to the hub for them")
    if unanswered(stopped) and any(map(of_ended_server, ended)):  # so that websockets pass at all
        return found(
            LEAKING, "it never answers websockets that ask for a stopped server, and keeps their connections"
        )
    if number < CHECK_LEAST:
        sent = counted(number, "websocket")
        return found(UNDECIDED, f"the hub noticed after {sent} that the server had ended, too few to tell")
    if page != 503:
        return found(UNDECIDED, f"another kind of proxy: it answers {page} for a server that has ended")
    if lost is None and sum(map(is_telling, ended)) >= PROOF_SHARE * number:
        return found(
            LEAKING, f"{asked}, and the proxy closed them without an answer, as one does that loses them"
        )
    if lost is None:
        return found(UNDECIDED, "the hub's own figures were not read")
    if sum(map(of_ended_server, ended)) < PROOF_SHARE * number:
        ((most, _),) = collections.Counter(str(one.status or one.message) for one in ended).most_common(1)
        return found(UNDECIDED, f"{asked}, and most were answered: {most}. Do websockets pass?")
    if max(grown_by) < CLEAN_SHARE * number:
        return found(CLEAN, f"{asked}, and the proxy kept no connection for them")
    grown_text = f"the hub's open files grew by {grown_by[0]:.0f}, its error pages by {grown_by[1]:.0f}"
    return found(UNDECIDED, f"{asked}; {grown_text}: other people's traffic counts too")


def check_proxy(person: Visitor, monitor: Monitor) -> ProxyCheck:
    """Have a server end by itself and ask for it over websockets, then for one that was stopped. Raises `CutShort`.

    The hub may notice soon that the server has ended, and then nothing can be seen: that is tried once more.
    """
    site, ended, page, before = person.site, list[Reply](), 0, list[Snapshot]()
    for _ in range(2):
        if not reach_server(person):
            return ProxyCheck(UNDECIDED, None, "no server became ready to try it with")
        person.sleep(CHECK_CALM_S)
        monitor.look()
        before = [*monitor.snapshots]
        page = shut_down(person)
        if page in (0, 200):
            return ProxyCheck(UNDECIDED, None, "the server did not end by itself when it was asked to")
        replies = knock(person, CHECK_ENDED - len(ended), lambda replies: noticed(replies[-1]))
        ended = [reply for reply in replies if not noticed(reply)]
        site.hub.state(person.name, observer=True)  # which shows that the hub is there
        site.states[person.name] = ServerState.STOPPED
        if len(ended) >= CHECK_LEAST:
            break
    soon = monitor.look()
    person.sleep(CHECK_AGAIN_S if before else 0.0)
    later = monitor.look()
    site.states[person.name] = state_after_stop(site.hub.stop(person.name).hub_status)
    stopped = knock(person, CHECK_STOPPED, unanswered)
    return judge_proxy(page, ended, stopped, before, [soon, later] if soon and later else [])


def noticed(reply: Reply) -> bool:
    """Whether the hub has noticed that the server has ended: the proxy has no route to it any more."""
    return reply.status == 302 or reply.message == UNANSWERED


def unanswered(replies: Sequence[Reply]) -> bool:
    """Whether it is clear that nobody answers."""
    return sum(one.message == UNANSWERED for one in replies) >= CHECK_UNANSWERED


def reach_server(person: Visitor) -> bool:
    """Start this person's server, if it is not ready, and open its page; whether that worked."""
    person.due_s = person.since_s = person.clock()
    is_ready = person.site.states.get(person.name) is ServerState.READY
    return (is_ready or take("server_ready", come, person)) and take("visit", visit, person)


def shut_down(person: Visitor) -> int:
    """Have the server end by itself; its page's status then: 0 when it did not, 200 when it is still there."""
    browser, until_s = person.browser, person.clock() + SHUTDOWN_S
    if not browser or browser.ask("POST", f"{person.url}api/shutdown", call=once()).status != 200:
        return 0
    while True:
        page = browser.ask("GET", f"{person.url}api", call=once())
        if page.status != 200 or person.clock() > until_s:
            return page.status
        person.sleep(0.5)


def knock(person: Visitor, at_most: int, enough: Callable[[Sequence[Reply]], bool]) -> list[Reply]:
    """What websockets to a server that is gone are answered, each on a connection of its own, until it is enough."""
    browser, replies, next_s = person.browser or person.site.hub.session, list[Reply](), 0.0
    while len(replies) < at_most and not (replies and enough(replies)):
        person.sleep(next_s - person.clock())
        next_s = person.clock() + 1 / HANDSHAKES_PER_S
        url = f"{person.url}{EVENTS}"
        replies.append(browser.ask("GET", url, call=once(), timeout=UNANSWERED_S, headers=UPGRADE))
        browser.close()
    return replies


# ==== Listeners: every event, as it happens ==========================================================================


def sample_of(event: Event, run: Run) -> Json:
    """A row of --samples. Moments are in seconds since the run began; `utc` is the moment at which the step ended."""
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
    """Writes each event to --samples, every second those that came meanwhile, so that no line is ever a part.

    A .gz file has a member for each second, and so can be read, too, when the program was killed.
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
        whole = 0
        try:
            with open(self._path, self._mode, buffering=0) as file:
                whole, data = file.tell(), self._encode(rows)
                while data:
                    data = data[file.write(data) :]
            self._mode = "ab"
        except OSError as error:
            self._mode = ""
            self.run.troubles.append(
                f"--samples {self._path} could not be written any more: {error.strerror}"
            )
            with contextlib.suppress(OSError):
                os.truncate(self._path, whole)

    def _encode(self, rows: Sequence[Json]) -> bytes:
        text = io.StringIO()
        header = [list(rows[0])] if self._mode == "wb" else []
        csv.writer(text, lineterminator="\n").writerows(header + [list(row.values()) for row in rows])
        data = text.getvalue().encode()
        return gzip.compress(data) if self._path.endswith(".gz") else data


PAGE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
BECOMES = {"start_server": "starting", "server_ready": "ready", "at_work": "at_work", "delete_user": "left"}


class LivePage:
    """Serves the run to Prometheus while the `with` block runs. Raises `UsageError` when the port cannot be had."""

    def __init__(self, run: Run) -> None:
        from http.server import ThreadingHTTPServer

        self._run, self._people = run, dict[str, str]()
        self._prometheus = prometheus = importlib.import_module("prometheus_client.core")
        registry = prometheus.CollectorRegistry()
        what: Json = {"registry": registry, "buckets": PAGE_BUCKETS_S}
        labels = ("operation", "outcome")
        self._latency = prometheus.Histogram(
            "hub_stress_test_latency_seconds", "of operations", labels, **what
        )
        self._lateness = prometheus.Histogram(
            "hub_stress_test_lateness_seconds", "of the tool in sending", **what
        )
        registry.register(self)
        handler = importlib.import_module("prometheus_client").MetricsHandler.factory(registry)
        try:
            self._server = ThreadingHTTPServer(("", run.plan.metrics_port or 0), handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"--metrics-port {run.plan.metrics_port}: {_in_words(error)}") from None

    def __enter__(self) -> None:
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics page", daemon=True
        ).start()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, event: Event) -> None:
        self._latency.labels(event.step, event.outcome).observe(event.latency_s)
        self._lateness.observe(event.lateness_s)
        failed = event.reason is not None and event.step in PERSONAL
        state = "failed" if failed else "" if event.reason else BECOMES.get(event.step)
        if state and self._people.get(event.user) != "failed":
            self._people[event.user] = state

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks of a collector: figures that are read when it looks."""
        throttled = self._run.session.traffic.throttled
        yield self._prometheus.CounterMetricFamily(
            "hub_stress_test_throttled", "429 answers", value=throttled
        )
        states = collections.Counter(list(self._people.values()))
        if self._run.plan.command == STRESS:
            states["expected"] = max(0, self._run.plan.count - states.total())
            people = self._prometheus.GaugeMetricFamily(
                "hub_stress_test_people", "by state", labels=["state"]
            )
            for state in ("expected", *dict.fromkeys(BECOMES.values()), "failed"):
                people.add_metric([state], states[state])
            yield people


LISTENERS: dict[str, Callable[[Run], Any]] = {"samples": Samples, "metrics_port": LivePage}  # by their option


# ==== A run, and the three commands ==================================================================================


def seeded(plan: Plan) -> Plan:
    """The plan with a seed, if people arrive at random moments; the same seed gives the same moments."""
    at_random = plan.seed is None and any(group.within_s for group in plan.groups)
    return dataclasses.replace(plan, seed=random.randrange(1, 1 << 32)) if at_random else plan


class Interruption:
    """While the `with` block runs, the first SIGINT or SIGTERM sets a flag, and the second leaves the program at once.

    A handler runs between any two lines of the main thread, whatever locks that holds. So it takes none: a thread sees
    the flag within a tenth of a second, and acts. Until `begin`, nothing has been made, and the first signal raises
    `KeyboardInterrupt`.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal since `begin`
        self._leave: Callable[[int], None] | None = None
        self._handlers: dict[int, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def begin(self, stop: Callable[[], None], leave: Callable[[int], None]) -> None:
        """From now on, `stop` follows the first signal, and `leave` the second."""

        def watch() -> None:
            while self.number is None and not self._ended.wait(0.1):
                pass
            if not self._ended.is_set():
                stop()

        self._leave = leave
        start_thread("interruption", watch)

    def end(self) -> int | None:
        """The signal that came, if any; one that comes later changes nothing, since all is done."""
        self._ended.set()
        return self.number

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._leave is None:
            raise KeyboardInterrupt(number)
        if self.number is not None:
            self._leave(number)
        self.number = number


class Run:
    """One run of a plan: the hub it talks to, what it has made, what it has seen, what went wrong.

    Once it is entered, the first signal ends the load, so that cleaning up begins.
    Raises `SetupError` when the hub, the token or its rights will not do; nothing has been changed then.
    """

    def __init__(self, plan: Plan, closing: contextlib.ExitStack, interruption: Interruption) -> None:
        self.plan = plan = seeded(plan)
        self.session = get_session(plan.token or "", pool_maxsize=max(plan.workers, plan.batch_size) + 2)
        self.started, self.began_s = datetime.now(timezone.utc), self.session.clock()
        self.record = new_recorder() if plan.command == STRESS else Recorder()
        self.troubles: list[str] = []  # what cut the run short
        for listener in (make(self) for name, make in LISTENERS.items() if getattr(plan, name)):
            closing.enter_context(listener)
            self.record.listen(listener)
        self.hub = check_hub(plan.endpoint or "", self.session, plan.command, plan.own_servers)
        check_way(self.hub, plan)
        check_visits(self.hub, plan)
        listed = self._look()
        self.existing = test_users(listed, plan.run if plan.command == PURGE else plan.run or "")
        check_server_names(self.hub, plan, [user["name"] for user in self.existing])
        self.monitor = Monitor(metrics_url(self.hub.endpoint), self.session)
        self.site = Site(self.hub, plan, self.record)
        self.monitors = {"hub": self.monitor}
        self.monitors |= {one.name: Monitor(one.url, self.session, is_hub=False) for one in plan.watch}
        self.claims = self.site.claims
        self.claims.known = {user["name"] for user in listed}
        self.cleaned = CleanUp()
        self.capacity: Capacity | None = None
        self.proxy_check: ProxyCheck | None = None
        self.warnings: list[str] = []
        self.interrupted_by: int | None = None  # a signal that came before cleaning up had ended
        self.load_ended_s = self.began_s
        self._interruption = interruption

    def __enter__(self) -> Run:
        self._interruption.begin(self._stop, self._leave)
        for monitor in self.monitors.values():
            monitor.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for monitor in self.monitors.values():
            monitor.__exit__()

    def _stop(self) -> None:
        LOG.warning("Interrupted: no more load is sent; cleaning up. Interrupt once more to leave at once.")
        self.session.stop()

    def _leave(self, number: int) -> None:
        remain = counted(len(set(self.claims.ours) - self.site.removal.gone), thing(self.plan.own_servers))
        leave_at_once(number, remain, purge_command(self.plan.run, self.plan.own_servers))

    def _look(self) -> list[Json]:
        """The users whose names look like this tool's; raises `SetupError`, since nothing has been changed yet."""
        try:
            return list(list_users(self.hub, self.record))
        except HubRefused as error:
            raise SetupError(f"{str(error)[:1].upper()}{str(error)[1:]}. Nothing was changed.") from None

    def look(self) -> None:
        """Have all monitors look once more."""
        for monitor in self.monitors.values():
            monitor.look()

    def announce(self, what: str) -> None:
        """Say what begins."""
        names = username(0, self.plan.run or "")[:-1] + "<n>"
        owner = f" of {self.hub.owner_of('')}" if self.plan.own_servers else ""
        proxy = self.session.proxy_to(self.hub.endpoint)
        where = f"{self.hub.endpoint}, through {proxy}" if proxy else self.hub.endpoint
        LOG.info("%s, on %s, as %s%s. Ctrl-C stops and cleans up.", what, where, names, owner)

    @timeit
    def make_users(self, count: int, batch_size: int) -> list[str]:
        """The names of exactly `count` new users. Raises `HubRefused`, or `Stopped`."""
        taken = [*(user["name"] for user in self.existing), *self.claims.confirmed]
        batches = make_users(
            count, batch_size, self.hub, self.record, self.claims, taken, self.plan.run or ""
        )
        return [name for batch in batches for name in batch]

    @timeit
    def start_servers(self, names: Sequence[str]) -> None:
        """Take the people through their journeys. Raises `CutShort`."""
        goal, record = self.plan.goal, self.site.record
        title = "people at work" if self.plan.rehearses else "starting servers"
        with Progress(title, len(names)) as progress:
            send_people(
                names, self.site, lambda: progress.tell(record.count([goal]), record.failures(PERSONAL))
            )

    def begin_anew(self, plan: Plan, record: Recorder) -> None:
        """Have other people come, by this plan, and apart from those before them."""
        before, traffic = self.site, self.site.public.traffic
        self.site = dataclasses.replace(before, plan=plan, record=record, turns=Turns())
        self.site.public.traffic = traffic

    def let_leave(self, names: Sequence[str]) -> None:
        """Remove these users now. Raises `CutShort` when some stay."""
        states = self.site.states
        thought = {name: states.get(name, ServerState.STOPPED) for name in names}
        self.remove(thought, thought.__contains__, self.session)
        states |= dict.fromkeys(set(names) - set(self.cleaned.left), ServerState.GONE)
        if self.cleaned.left and not self.session.stopping.is_set():
            left = counted(len(self.cleaned.left), thing(self.plan.own_servers))
            raise CutShort(f"{left} could not be removed before others come")

    def check_proxy(self, names: Sequence[str]) -> None:
        """Whether the proxy loses connections when servers end, found out with one server. Raises `CutShort`."""
        LOG.info("Checking the proxy: %s", CHECK_COSTS)
        name = next(filter(self._is_at_work, names), None) or self.make_users(1, 1)[0]
        site = dataclasses.replace(
            self.site, record=Recorder()
        )  # what the check does is no result of the load
        site.public = self.site.public
        person = Visitor(name, self.session.clock(), self.plan.groups[0], site)

        def check() -> None:
            try:
                result = check_proxy(person, self.monitor)
                self.proxy_check = None if self.session.stopping.is_set() else result
            finally:
                person.go_home()

        with Team(self.session) as team:
            team.start(check)
        if self.proxy_check and self.proxy_check.verdict == UNDECIDED:
            self.warnings.append(f"the check of the proxy is undecided: {self.proxy_check.reason}")

    def _is_at_work(self, name: str) -> bool:
        """Whether this person's server is ready, and nothing was wrong with it."""
        row = self.record.people.get(name, {})
        good = "at_work" in row and not any(end.reason for end in row.values())
        return good and self.site.states.get(name) is ServerState.READY

    def pinging(self, name: str) -> Regularly:
        return pinging(self.hub.owner_of(name), self.hub.endpoint, self.session, self.site.record)

    def warn_if_late(self, names: Collection[str], unsent: int, cause: str) -> None:
        """Say so if this tool, and not the hub, set the pace."""
        late = self.record.late_share(names)
        if late > 0.01 or unsent:
            self.warnings.append(
                f"THE GENERATOR WAS LATE: {share_text(late)} of the requests were sent more than {LATE_SEND_S:g} s "
                f"after they were due, {unsent} not at all; {cause}. Latencies count from when a request was due"
            )

    def remove(
        self, states: Mapping[str, ServerState], ours: Callable[[str], bool], session: HubSession
    ) -> None:
        """Remove users, for whom `states` are what is thought of their servers, from the hub."""
        hub, plan, removal = dataclasses.replace(self.hub, session=session), self.plan, self.site.removal
        self.cleaned = remove_users(
            states, ours, hub, self.record, plan.batch_size, plan.cleanup_timeout_s, removal
        )

    def clean_up(self) -> None:
        """Remove what this run made."""
        self.load_ended_s = self.session.clock()
        if self.session.hub_is_gone:
            self.troubles.append(
                f"the hub did not answer for {duration_text(HUB_GONE_S)}: no more load was sent"
            )
        if self.session.stopping.is_set():
            self.warnings += still_waiting(self.site.starting.copy())
        if self.plan.command != PURGE:
            self.session.stop()  # threads that the hub holds up send nothing more
        self.site.public.close_kernels()
        self.look()
        ours = self.claims.ours
        if self.plan.keep:
            self.cleaned = CleanUp(kept=len(ours))
        elif ours:
            LOG.info("Cleaning up %s", counted(len(ours), thing(self.plan.own_servers)))
            session, unsure = self.session.for_cleaning_up(), self.claims.unconfirmed.copy()
            states = {name: self.site.states.get(name, ServerState.STOPPED) for name in ours}
            states |= dict.fromkeys(unsure, ServerState.UNKNOWN)
            session.pause(LATE_ACT_S if unsure else 0)
            self.remove(states, set(ours).__contains__, session)
        self.interrupted_by = self._interruption.end()


def leave_at_once(number: int, remain: str, remedy: str) -> None:
    """End the program, saying what remains and how to remove it. A signal's handler may call this."""
    os.write(
        2, f"\nLeft at once: up to {remain} may remain on the hub. Remove them with: {remedy}\n".encode()
    )
    os._exit(128 + number)


def pace_text(options: Json) -> str:
    """How people arrive, from the options of a run or a group."""
    if groups := len(options.get("event") or ()):
        return f"in {counted(groups, 'group')}"
    later = f", from {duration_text(options['after'])} on" if options.get("after") else ""
    if options.get("within"):
        return f"at random moments within {duration_text(options['within'])}{later}"
    rate = rate_of(options["rate"]) if isinstance(options["rate"], str) else options["rate"]
    return f"{rate_text(rate)}{later}, however slow the hub" if rate else f"{options['batch_size']} at a time"


def stress(run: Run) -> None:
    """Make users, start their servers, hold them."""
    plan = run.plan
    if plan.find_capacity:
        search_people(run)
        return
    who = counted(plan.count, "person", "people") if plan.rehearses else counted(plan.count, "server")
    run.announce(f"{who}, {pace_text(plan.options())}")
    names = run.make_users(plan.count, plan.batch_size)
    with run.pinging(names[0]):
        run.start_servers(names)
    if plan.is_open:
        run.warn_if_late(["start_server", "visit"], 0, "this machine was too slow")
    if plan.check_proxy and not run.session.stopping.is_set() and not run.session.hub_is_gone:
        run.check_proxy(names)


def activity(run: Run) -> None:
    """Report activity for users without servers; those of this run's name that are there already come first."""
    plan, session = run.plan, run.session
    run.announce(f"{counted(plan.count, 'user')} without servers")
    users = [user["name"] for user in run.existing][: plan.count]
    users += run.make_users(plan.count - len(users), 10) if len(users) < plan.count else []
    load = load_of(plan, run.hub.endpoint, users)
    with run.pinging(users[0]):
        if plan.find_capacity:
            search_requests(run, load)
            return
        cpu_share = spread_load(load, session, run.record)
    if not session.stopping.is_set():
        slow = "this machine was too slow: spread the load over more --processes"
        waiting = "all threads were waiting for the hub: give more --workers or --processes"
        unsent = load.planned - run.record.count(load.mix) if plan.rate_per_s else 0
        run.warn_if_late(load.mix, unsent, slow if cpu_share > BUSY else waiting)


def purge(run: Run) -> None:
    """Remove the users that earlier runs left behind."""
    LOG.info("Found %s to remove", counted(len(run.existing), thing(run.plan.own_servers)))
    if run.plan.own_servers and run.hub.version.startswith(("1.", "2.")):
        LOG.warning("This hub lists no stopped servers: if any were left, remove them on the hub's home page")
    states = {user["name"]: server_state(user) for user in run.existing}
    if states:
        run.remove(states, functools.partial(is_test_user, run=run.plan.run), run.session)


def carry_out(plan: Plan) -> Results:
    """What a plan's run found, and wrote, also when something failed.

    Raises `SetupError`; nothing has been changed then.
    """
    with Interruption() as interruption:
        with contextlib.ExitStack() as closing, Run(plan, closing, interruption) as run:
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
            closing.close()
            results = results_of(run)
        return write_files(plan, results)


# ==== Capacity =======================================================================================================


@dataclasses.dataclass(frozen=True)
class CapacityStep:
    """What one rate showed."""

    rate_per_s: float
    sent_per_s: float
    p95_s: float | None
    failed: int
    held: str | None  # the condition that was met, or that the generator could not send so much
    generator_bound: bool
    limited_by: str | None = None  # of people: why no more of them got through


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


class Limit(enum.Enum):
    """What keeps a hub from taking more people."""

    PROCESSOR = "the hub's one thread was busy: give its process a faster processor, or less to do"
    THROTTLING = (
        "the hub throttled starts: see its concurrent_spawn_limit, and how long a server takes to start"
    )
    FRONT = (
        "something in front of the hub limits requests (429): exempt this machine, or run inside the cluster"
    )
    SPAWN = "servers took long to start, by the hub's own clock: see images, nodes and storage"
    PROXY = "servers were ready, but people waited to work there: see the proxy, and the servers themselves"
    GENERATOR = "this machine could not send more"
    MAX_SERVERS = "--max-servers allows no step with more people"
    UNKNOWN = "the hub's figures do not tell what the limit was"


def sustained_rate(steps: Iterable[CapacityStep]) -> float | None:
    """The highest rate at which no condition was met."""
    return max((step.rate_per_s for step in steps if not step.held), default=None)


def next_rate(
    steps: Sequence[CapacityStep], first_rate_per_s: float, grain_per_s: float = 0.0
) -> float | None:
    """Which rate to try next: doubling until a condition is met, then halving the interval to within 5 %.

    None when the answer is known as well as it can be: a rate that the generator could not send says nothing of the
    hub, and so nothing is known of higher ones. With a grain, rates are its multiples: people are whole.
    """
    sustained = sustained_rate(steps)
    broken = min((step.rate_per_s for step in steps if step.held), default=None)
    rate: float | None = None
    if any(step.generator_bound for step in steps):
        return None
    if broken is None:
        rate = sustained * 2 if sustained else first_rate_per_s
    elif sustained is None:
        rate = broken / 2 if broken > 1 or grain_per_s else None
    elif broken > sustained * 1.05:
        rate = (sustained + broken) / 2
    if rate is None or not grain_per_s:
        return rate
    rate = max(1, round(rate / grain_per_s)) * grain_per_s
    return None if any(math.isclose(rate, step.rate_per_s) for step in steps) else rate


Trial = tuple[CapacityStep, Recorder, Sequence[str]]  # what a rate showed, the events, and the users


def search(run: Run, first_rate_per_s: float, grain_per_s: float, attempt: Callable[[float], Trial]) -> None:
    """Search for the highest rate at which no condition is met; `run` has the answer, however the search ends."""
    plan, session, steps, best = run.plan, run.session, list[CapacityStep](), Recorder()
    most_per_s = plan.max_servers * grain_per_s if plan.max_servers else math.inf
    rate: float | None = first_rate_per_s
    try:
        while not session.stopping.is_set() and not session.hub_is_gone:
            rate = next_rate(steps, first_rate_per_s, grain_per_s)
            if rate is None or rate > most_per_s * 1.0001:
                break
            step, seen, users = attempt(rate)
            if session.stopping.is_set() or session.hub_is_gone:
                break
            steps.append(step)
            LOG.info("At %s: %s", pace_of_step(step, plan), step.held or "sustained")
            best = seen if not step.held or sustained_rate(steps) is None else best
            if plan.command == STRESS:
                run.let_leave(users)
            _drain_hub(run.hub, users[0])
    finally:
        run.record.take_over(best)
        run.capacity = capacity_of(plan, steps, rate, rate is not None and rate > most_per_s)
        if steps and run.capacity.rate_per_s is None:
            run.warnings.append(nothing_sustained(plan, steps, best))


def capacity_of(plan: Plan, steps: list[CapacityStep], next_per_s: float | None, too_many: bool) -> Capacity:
    """What a search has found that would try `next_per_s` next, unless that needs too many servers."""
    sustained, bound = sustained_rate(steps), any(step.generator_bound for step in steps)
    finished = next_per_s is None
    if plan.command == ACTIVITY:
        mix = plan.mix or DEFAULT_MIX
        reports_per_s = (sustained or 0) * mix.get("activity", 0) / sum(mix.values())
        return Capacity(
            sustained, int(reports_per_s * SERVER_REPORTS_EVERY_S) or None, bound, steps, finished
        )
    lowest = min((step for step in steps if step.held), key=lambda step: step.rate_per_s, default=None)
    limit = lowest.limited_by if lowest else None
    limit = Limit.MAX_SERVERS.value if too_many else limit
    return Capacity(sustained, None, bound, steps, finished, sustained and 60 * sustained, limit)


def pace_of_step(step: CapacityStep, plan: Plan) -> str:
    """The rate of a step: 12 people a minute, or 16 requests per second."""
    if plan.command == STRESS:
        return f"{counted(60 * step.rate_per_s, 'person', 'people')} a minute"
    return f"{counted(step.rate_per_s, 'request')} per second"


def nothing_sustained(plan: Plan, steps: Sequence[CapacityStep], seen: Recorder) -> str:
    """What the lowest rate met, and the most usual failure."""
    lowest, failures = min(steps, key=lambda step: step.rate_per_s), collections.Counter[str]()
    names = PERSONAL if plan.command == STRESS else plan.mix or DEFAULT_MIX
    for name, operation in seen.summarise().items():
        failures.update(operation.errors if name in names else {})
    most = "".join(f" ({number:,} × {reason})" for reason, number in failures.most_common(1))
    return f"no rate was sustained, not even {pace_of_step(lowest, plan)}: {lowest.held}{most}"


def search_requests(run: Run, load: Load) -> None:
    """How many requests per second does the hub sustain? `load` says from whom and of what kind."""

    def attempt(rate: float) -> Trial:
        beside, seen = run.session.beside(), Recorder(*run.record.listeners)
        part = dataclasses.replace(load, rate_per_s=rate, duration_s=load.duration_s or CAPACITY_STEP_S)
        cpu_share = spread_load(part, beside, seen)
        run.session.traffic.add(beside.traffic.counts)
        return judge_step(part, seen, beside.traffic, run.plan, cpu_share), seen, load.users

    search(run, fastest(load.rate_per_s) or CAPACITY_FIRST_RATE_PER_S, 0.0, attempt)


def search_people(run: Run) -> None:
    """How many people does the hub take who come at a rate? New ones come in each step."""
    plan, for_s = run.plan, run.plan.duration_s or CAPACITY_PEOPLE_STEP_S
    run.announce(f"How many people a minute? In steps of {duration_text(for_s)}")

    def attempt(rate: float) -> Trial:
        names = run.make_users(round(rate * for_s), plan.batch_size)
        return *_try_people(run, names, for_s), names

    search(run, fastest(plan.rate_per_s) or CAPACITY_FIRST_PEOPLE_PER_S, 1 / for_s, attempt)


def _try_people(run: Run, names: Sequence[str], for_s: float) -> tuple[CapacityStep, Recorder]:
    session, monitor, rate_per_s = run.session, run.monitor, len(names) / for_s
    seen = new_recorder(*run.record.listeners)
    run.begin_anew(dataclasses.replace(run.plan, count=len(names), rate_per_s=rate_per_s), seen)
    looks, before, traffic = len(monitor.snapshots), session.traffic.counts.copy(), Traffic()
    cpu_s, began_s = time.process_time(), session.clock()
    monitor.look()
    with run.pinging(names[0]):
        run.start_servers(names)
    monitor.look()
    cpu_share = (time.process_time() - cpu_s) / (session.clock() - began_s)
    traffic.add(session.traffic.counts - before)
    load = Load(run.hub.endpoint, tuple(names), {"server_ready": 1.0}, 1, rate_per_s, for_s)
    step = judge_step(load, seen, traffic, run.plan, cpu_share)
    if not step.held and falls_behind(waits_of(seen.people, "at_work" if run.plan.opens else "server_ready")):
        step = dataclasses.replace(step, held="the hub fell behind: the last waited longer than the first")
    if step.held:
        own = hub_figures(monitor.snapshots[looks:], math.inf, 0)
        in_front = traffic.counts[-429] > traffic.throttled
        limit = limit_of(seen.summarise(), own, step.generator_bound, in_front)
        step = dataclasses.replace(step, limited_by=limit.value)
    return step, seen


def judge_step(load: Load, seen: Recorder, traffic: Traffic, plan: Plan, cpu_share: float) -> CapacityStep:
    """Judge one rate by its own requests alone."""
    count, failed = seen.count(load.mix), seen.failures({*load.mix, *PERSONAL})
    found = as_json({"operations": seen.summarise(), "http": traffic.summarise(), "failed": failed})
    found["failed_rate"] = failed / count if count else None
    held = next((one.text for one in plan.conditions if one.judge(found, plan.baseline).held), None)
    unsent, of_people = load.planned - count, plan.command == STRESS  # people come late, but come
    bound = (seen.late_share(load.mix) > 0.01 or (unsent > 0 and not of_people)) and cpu_share > BUSY
    if bound:
        held = "the generator could not send this rate"
    elif not held and unsent > 0 and of_people:
        people = counted(load.planned, "person", "people")
        held = f"{unsent:,} of {people} never came, after failures in a row"
    elif not held and unsent > 0:
        held = f"{unsent:,} of {counted(load.planned, 'request')} could not be sent in time"
    sent_per_s = count / (load.duration_s or math.nan)
    p95_s = metric_value(found, next(iter(load.mix)) + ".p95")
    return CapacityStep(fastest(load.rate_per_s), sent_per_s, p95_s, failed, held, bound)


def waits_of(people: People, goal: str) -> list[float]:
    """How long each person waited who reached the goal, in the order in which they were due."""
    reached = sorted((row[goal] for row in people.values() if goal in row), key=lambda end: end.due_s)
    return [end.latency_s for end in reached if end.reason is None]


def falls_behind(waits_s: Sequence[float]) -> bool:
    """Whether those who came last waited longer than those who came first: by half, and by more than a second.

    By the medians of the last and the first quarter. If people kept coming, they would wait ever longer.
    """
    quarter = max(1, len(waits_s) // 4)
    first_s, last_s = (
        sorted(part)[len(part) // 2] for part in (waits_s[:quarter] or [0], waits_s[-quarter:] or [0])
    )
    return last_s > max(1.5 * first_s, first_s + 1.0)


def limit_of(
    seen: Mapping[str, Operation],
    own: HubFigures | None,
    generator_bound: bool,
    limited_in_front: bool = False,
) -> Limit:
    """What kept people from getting through, by the hub's own figures: what took most of the time that they waited."""
    means = {name: one.latency_s.mean or 0.0 for name, one in seen.items()}
    asked, ready_s = seen.get("start_server"), means.get("server_ready", 0.0)
    whole_s = means.get("at_work", ready_s)
    if generator_bound:
        return Limit.GENERATOR
    if own and own.busy:
        return Limit.PROCESSOR
    if asked and asked.backoff_s / asked.count > ready_s / 10:
        return Limit.FRONT if limited_in_front else Limit.THROTTLING
    if own and "success" in own.spawns and own.spawns["success"].mean_s > whole_s / 2:
        return Limit.SPAWN
    return Limit.PROXY if whole_s - ready_s > whole_s / 2 else Limit.UNKNOWN


def _drain_hub(hub: Hub, user: str) -> None:
    """Give the hub time to get over a step: until it answers within 0.1 s again, twice."""
    session = hub.session
    until_s, quick = session.clock() + DRAIN_S, 0
    while quick < 2 and session.clock() < until_s and session.pause(0.5):
        asked_s = session.clock()
        hub.state(user)
        quick = quick + 1 if session.clock() - asked_s < 0.1 else 0


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
class Users:
    """The users that a run made, removed and left."""

    created: int
    deleted: int
    kept: int
    left_behind: list[str]
    in_the_way: str = ""  # why some cannot be removed; this and what follows also with --own-servers
    stopped_while_starting: int = 0  # servers, of which something may go on that the hub does not know
    stops_failed: int | None = None  # servers that the hub failed to stop, by its metrics; None: unknown


@dataclasses.dataclass(frozen=True)
class Slow:
    """A server that took long."""

    user: str
    ready_s: float
    throttled: int
    message: str


@dataclasses.dataclass(frozen=True)
class Failure:
    """A server or person that failed, and the last that the hub said of it."""

    user: str
    reason: str
    message: str


@dataclasses.dataclass(frozen=True)
class Servers:
    """The outcome of the servers: of the `ready` ones, `lost` were gone while they were held."""

    requested: int
    ready: int
    failed: int
    lost: int
    given_up: int  # of those that failed: not ready in time
    reasons: dict[str, int]
    failures: list[Failure]
    throttled: int
    throttling_began_s: float | None
    slowest: list[Slow]
    usual_message: (
        str  # what the hub said of all servers that it said anything of; "" when it told them apart
    )
    removed: int = 0  # with --own-servers, like the next two; else the users say it
    kept: int = 0
    left_behind: Sequence[str] = ()
    phases: Phases | None = None  # the means of those that became ready; None without Kubernetes' events


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """The outcome of a rehearsal's people: `failed` are those with any failed step, also after `at_work`."""

    expected: int
    at_work: int
    failed: int
    reasons: dict[str, int]
    failures: list[Failure]
    until_work_s: dict[str, float]  # the mean of each step, of those who got to work


@dataclasses.dataclass(frozen=True)
class ServersTimeline:
    """The moments of each server, in seconds since the run began, in the order in which they were due."""

    user: list[str]
    due_s: list[float | None]
    throttled_s: list[float | None]
    asked_s: list[float | None]
    ended_s: list[float | None]
    ready: list[bool]
    opened_s: list[float | None]  # of a rehearsal: the start page came
    loaded_s: list[float | None]
    works_s: list[float | None]
    failed_s: list[float | None]  # after it was ready
    lost_s: list[float | None]
    left_s: list[float | None]
    phases: list[dict[str, float] | None]  # of a start on Kubernetes, in their order, in seconds


@dataclasses.dataclass(frozen=True)
class RunTimeline:
    """What happened when: what the report draws."""

    operations: dict[str, OperationTimeline]
    servers: ServersTimeline | None
    hub: HubTimeline | None
    watched: dict[str, HubTimeline]
    load_ended_s: float | None


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
    operations: dict[str, Operation]
    http: Http
    capacity: Capacity | None
    aftermath: Aftermath | None  # of the hub and each process that was watched
    proxy_check: ProxyCheck | None
    warnings: list[str]
    advice: list[str]  # what to look at next, when the run has failed
    timeline: RunTimeline
    groups: dict[str, Rehearsed] | None = None  # of an event
    conditions: list[Judgement] = dataclasses.field(default_factory=list)
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
    def cleaned(self) -> CleanUp:
        """The outcome of cleaning up users, or with --own-servers servers."""
        if self.own_servers and (servers := self.servers):
            return CleanUp(servers.removed, tuple(servers.left_behind), servers.kept, self.users.in_the_way)
        users = self.users
        return CleanUp(users.deleted, tuple(users.left_behind), users.kept, users.in_the_way)


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


def instead_of(metric: str, paths: bool = True) -> str:
    """The known metric that is most like this one, a path only if `paths`; "" where this one is known."""
    known = ["failed", "failed_rate", "throttled"]
    known += (f"{name}.{statistic}" for name in STEPS | OPERATIONS for statistic in STATISTICS)
    if paths:
        known += (path[1:] for path in numbers_in(Results) if path not in (".schema", ".exit_code"))
    of_all = re.sub(r"\[[^]]*\]", "", metric)  # server_ready.p95 for a group's server_ready[students].p95
    if any(re.fullmatch(re.escape(name).replace("NAME", "[^.]+"), of_all) for name in known):
        return ""
    return difflib.get_close_matches(metric, known, 1, 0.0)[0]


def as_json(value: Any) -> Any:
    """The same as JSON has it: records become objects."""
    if dataclasses.is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(inner) for name, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def exit_code(left: bool, interrupted_by: int | None, cut_short: bool, failed: bool) -> ExitCode:
    """The one decision on how a run ends. It has failed when a condition was met, whichever were asked for.

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


def _failures_of(
    ends: Iterable[Event | None], never: str, number: int
) -> tuple[dict[str, int], list[Failure]]:
    """Counts by reason, the most frequent first, and each failure; `number` more have the reason `never`.

    Reasons of spawns that differ in what they count, like 2/3 nodes and 1/3 nodes, are one: the first.
    """
    failures, alike = list[Failure](), dict[str, str]()
    for end in ends:
        if end and end.reason:
            text, of_spawn = end.reason.text, end.reason.kind in (Kind.SPAWN, Kind.LATE)
            text = alike.setdefault(re.sub(r"\d+(?![\d)])", "#", text), text) if of_spawn else text
            failures.append(Failure(end.user, text, end.message))
    reasons = collections.Counter(failure.reason for failure in failures)
    reasons[never] = number
    return {reason: count for reason, count in reasons.most_common() if count}, failures


def people_of(rows: People, expected: int, cut_short: bool, group: str = "") -> Rehearsed:
    """The outcome of all people, or a group's; those who failed after getting to work are counted as both."""
    people = [row for row in rows.values() if not group or any(end.group == group for end in row.values())]
    at_work = [row for row in people if "at_work" in row]
    failed = [[row[step] for step in PERSONAL if step in row and row[step].reason] for row in people]
    ends = [steps[0] if steps else row.get("at_work") for steps, row in zip(failed, people)]
    never = "cut short before getting to work" if cut_short else "never came"
    reasons, failures = _failures_of(ends, never, expected - len(ends) + ends.count(None))
    until_work_s = {}
    for step in ("at_work", *PERSONAL[: PERSONAL.index("at_work")]):
        if took_s := [row[step].latency_s for row in at_work if step in row]:
            until_work_s[step] = sum(took_s) / len(at_work)
    return Rehearsed(expected, len(at_work), sum(reasons.values()), reasons, failures, until_work_s)


def servers_of(people: People, requested: int, cut_short: bool) -> Servers:
    """The outcome of the servers of so many people."""
    ends = [row["server_ready"] for row in people.values() if "server_ready" in row]
    ready = sorted((end for end in ends if end.reason is None), key=lambda end: -end.latency_s)
    lost = [row["stay"] for row in people.values() if "stay" in row and row["stay"].outcome == "lost"]
    never = "never started, or cut short" if cut_short else "never started"
    reasons, failures = _failures_of([*ends, *lost], never, requested - len(ends))
    throttled_s = [end.throttled_s for end in ends if end.throttled_s is not None]
    messages = {end.message for end in ends if end.message}
    return Servers(
        requested=requested,
        ready=len(ready),
        failed=requested - len(ready),
        lost=len(lost),
        given_up=sum(end.reason.kind is Kind.LATE for end in ends if end.reason),
        reasons=reasons,
        failures=failures,
        throttled=sum(end.throttled > 0 for end in ends),
        throttling_began_s=min(throttled_s) - min(end.due_s for end in ends) if throttled_s else None,
        slowest=[Slow(end.user, end.latency_s, end.throttled, end.message) for end in ready[:5]],
        usual_message=messages.pop() if len(messages) == 1 else "",
        phases=mean_phases([end.phases for end in ready if end.phases]),
    )


def servers_timeline(people: People, began_s: float, load_ended_s: float = math.inf) -> ServersTimeline:
    """The moments of each server, in the order in which they were due."""

    def since(at_s: float | None) -> float | None:
        return None if at_s is None else rounded(max(0.0, at_s - began_s))

    def moments(row: Mapping[str, Event]) -> Json:
        start, leaving = row["server_ready"], row.get("stop_server")
        good_s = {name: end.ended_s for name, end in row.items() if end.reason is None}
        bad = [row[name] for name in PERSONAL[1:] if name in row and row[name].reason]
        return {
            "user": start.user,
            "due_s": since(start.due_s),
            "throttled_s": since(start.throttled_s),
            "asked_s": since(start.asked_s),
            "ended_s": since(start.ended_s),
            "ready": start.reason is None,
            "opened_s": since(good_s.get("visit")),
            "loaded_s": since(good_s.get("page")),
            "works_s": since(good_s.get("at_work")),
            "failed_s": since(next((end.ended_s for end in bad if end.outcome != "lost"), None)),
            "lost_s": since(next((end.ended_s for end in bad if end.outcome == "lost"), None)),
            "phases": start.phases and {name: rounded(getattr(start.phases, name)) for name in PHASES},
            "left_s": since(leaving.sent_s if leaving and leaving.sent_s < load_ended_s else None),
        }

    rows = [row for row in people.values() if "server_ready" in row]
    lines = [moments(row) for row in sorted(rows, key=lambda row: row["server_ready"].due_s)]
    names = [field.name for field in dataclasses.fields(ServersTimeline)]
    return ServersTimeline(**{name: [line[name] for line in lines] for name in names})


def judgements_of(plan: Plan, found: Json) -> list[Judgement]:
    """Each condition of a plan, judged by results; default ones only where something was measured."""
    judged = [(each, each.judge(found, plan.baseline)) for each in plan.conditions]
    return [result for each, result in judged if each in plan.fail_if or result.value is not None]


def _users_in(run: Run) -> Users:
    """The outcome of the users; with --own-servers there are none.

    A hub that fails to stop a server answers 204 all the same, forgets the server, and deletes the user: only
    its metrics tell. A run that stopped none is not to blame.
    """
    cleaned, snapshots = run.cleaned, run.monitor.snapshots
    stopped = run.record.count(["stop_server"])
    failures = grown(snapshots, "server_stop_seconds_count", "failure") if stopped else 0.0
    made = max(len(run.claims.confirmed), cleaned.deleted + len(cleaned.left))
    users = Users(
        created=0 if run.plan.command == PURGE else made,
        deleted=cleaned.deleted,
        kept=cleaned.kept,
        left_behind=list(cleaned.left),
        in_the_way=cleaned.in_the_way,
        stopped_while_starting=len(run.site.removal.interrupted),
        stops_failed=int(failures) if len(snapshots) > 1 else None,
    )
    if run.plan.own_servers:
        return dataclasses.replace(users, created=0, deleted=0, kept=0, left_behind=[])
    return users


def _failed_of(run: Run, servers: Servers | None, people: Rehearsed | None) -> tuple[int, int]:
    """How many failed, of how many: people, servers, requests, or what was to be removed."""
    plan = run.plan
    if people:
        return people.failed, plan.count
    if plan.command == PURGE:
        return len(run.cleaned.left), len(run.existing)
    if servers and not plan.find_capacity:
        return servers.failed + servers.lost, plan.count
    mix = ["server_ready"] if plan.command == STRESS else plan.mix or DEFAULT_MIX
    return run.record.failures(mix), run.record.count(mix)


def results_of(run: Run) -> Results:
    """What a run found; the conditions are judged by all the rest."""
    plan, rows, cleaned, snapshots = run.plan, run.record.people, run.cleaned, run.monitor.snapshots
    cut_short = bool(run.troubles) or run.interrupted_by is not None
    expected = plan.count if plan.command == STRESS and not plan.find_capacity else 0
    servers = servers_of(rows, expected, cut_short) if expected or plan.own_servers else None
    if servers and plan.own_servers:
        removed: Json = {"removed": cleaned.deleted, "kept": cleaned.kept, "left_behind": cleaned.left}
        servers = dataclasses.replace(servers, **removed)
    people = people_of(rows, expected, cut_short) if expected and plan.rehearses else None
    groups = {each.group: people_of(rows, each.count, cut_short, each.group) for each in plan.event}
    failed, tried = _failed_of(run, servers, people)
    began = [shot.get(BEGAN) for shot in snapshots]
    restarts = sum(map(operator.ne, began, began[1:]))
    warnings = [*run.troubles, *run.warnings, *run.site.public.warnings]
    if restarts:
        warnings.append(f"the hub restarted during the run{f', {restarts} times' if restarts > 1 else ''}")
    looks = {name: monitor.snapshots for name, monitor in run.monitors.items()}
    lines = {name: hub_timeline(each, run.began_s) for name, each in looks.items()}
    on_the_way = run.site.public.traffic.summarise() if plan.opens else None
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
        users=_users_in(run),
        failed=failed,
        failed_rate=failed / tried if tried else None,
        servers=servers,
        people=people,
        operations=run.record.summarise(),
        http=dataclasses.replace(run.session.traffic.summarise(), servers=on_the_way),
        capacity=run.capacity,
        aftermath=aftermath_of(looks, bool(cleaned.kept)),
        proxy_check=run.proxy_check,
        warnings=warnings,
        advice=[],
        timeline=RunTimeline(
            operations=run.record.timeline(run.began_s),
            servers=servers_timeline(rows, run.began_s, run.load_ended_s) if servers else None,
            hub=lines.pop("hub"),
            watched={name: line for name, line in lines.items() if line},
            load_ended_s=rounded(run.load_ended_s - run.began_s),
        ),
        groups=groups or None,
    )
    return _judged(results, run)


def _judged(results: Results, run: Run) -> Results:
    """The same with its conditions, its exit code, and what to look at next."""
    plan, capacity = run.plan, run.capacity
    conditions = [] if capacity else judgements_of(plan, as_json(results))
    bad = any(judgement.held for judgement in conditions) or bool(capacity and capacity.rate_per_s is None)
    not_ours = plan.command == PURGE and run.interrupted_by is not None  # which made none of what is left
    left = bool(results.users.stops_failed or (run.cleaned.left and not not_ours))
    code = exit_code(left, run.interrupted_by, bool(run.troubles), bad)
    next_steps: list[str] = []
    if code in (ExitCode.FAILED, ExitCode.LEFT_BEHIND):
        next_steps += advice(results, run.record.kinds(), time_out_in_front(run.record.people))
    return dataclasses.replace(results, conditions=conditions, exit_code=int(code), advice=next_steps)


# ==== What it means: where the time went, and what to look at next ===================================================

HANDLERS = {"activity": "POST ActivityAPIHandler", "ping": "GET UserAPIHandler"}
NEGLIGIBLE_S = 0.02  # on a request, for which the way to the hub and back does not deserve a mention


def where_time_went(whole_s: float, inside_s: float, hub: HubFigures) -> str:
    """Where a request that took `whole_s`, of which `inside_s` by the hub's own clock, spent most of its time.

    A request that waits for the hub's one thread is not on the hub's clock.
    """
    outside_s = whole_s - inside_s
    if outside_s < whole_s / 2:
        return "most of it was spent in the hub"
    if outside_s < NEGLIGIBLE_S:
        return "the rest is too little to matter"
    if hub.busy:
        used = f"which used up to {share_text(hub.cpu_share_max)} of a processor"
        return f"most of it was spent waiting for the hub's one thread, {used}"
    if hub.late_s:
        late = (
            f"whose event loop was late by {duration_text(hub.late_s)} though it used little of a processor"
        )
        return f"most of it was spent waiting for the hub, {late}: a busy machine, or a slow disk or database"
    if hub.cpu_share_max < IDLE:
        return "most of it was spent in front of the hub: this machine, network, proxy or TLS"
    return "the hub's figures do not tell where the rest was spent"


def time_spent(results: Results) -> Iterator[str]:
    """Sentences that set the client's times beside the hub's own, and so say on which side the time was spent."""
    own, operations = results.hub.metrics, results.operations
    if results.people:
        yield from _until_work(results.people.until_work_s)
    if not own:
        return
    ready, started = operations.get("server_ready"), own.spawns.get("success")
    # a capacity's operations are those of one step, the hub's figures those of all
    if ready and ready.latency_s.mean and started and not results.capacity:
        wait_s = ready.latency_s.mean
        asked = operations.get("start_server")  # the mean of all, whose servers became ready or not
        throttled_s = min(asked.backoff_s / asked.count if asked else 0.0, max(0.0, wait_s - started.mean_s))
        rest_s = wait_s - throttled_s - started.mean_s
        parts = [f"the hub took {duration_text(min(started.mean_s, wait_s))} to start the server"]
        parts += [f"throttling took {duration_text(throttled_s)}"] if throttled_s > NEGLIGIBLE_S else []
        parts += [f"everything else took {duration_text(rest_s)}"] if rest_s > NEGLIGIBLE_S else []
        yield f"of a mean wait of {duration_text(wait_s)}, {', '.join(parts)}"
    for name, handler in HANDLERS.items():
        seen, inside = operations.get(name), own.requests.get(handler)
        if results.hub.restarts:  # whoever waited for a hub that was away waited in front of nothing
            continue
        if seen and seen.latency_s.mean and inside and (name == "ping" or not results.capacity):
            whole_s = seen.latency_s.mean
            took = f" took {duration_text(inside.mean_s)} by the hub's own clock"
            took = took if inside.mean_s <= whole_s else ""  # its clock has other people's requests, too
            where = where_time_went(whole_s, inside.mean_s, own)
            yield f"a mean {title_of(name)} of {duration_text(whole_s)}{took}: {where}"


def _until_work(means: Mapping[str, float]) -> Iterator[str]:
    parts = {
        "server_ready": "the server",
        "visit": "the start page",
        "page": "the rest of it",
        "kernel_ready": "the kernel",
    }
    took = ", ".join(f"{parts[name]} {duration_text(mean)}" for name, mean in means.items() if name in parts)
    if means:
        yield f"people waited {duration_text(means['at_work'])} on average until they could work: {took}"


def time_out_in_front(people: People) -> float | None:
    """How long all websockets had been open that broke; None when it differs, or they broke at the same moment."""
    ends = [end for row in people.values() for end in row.values()]
    broken = [
        (end.reason.open_s, end.ended_s) for end in ends if end.reason and end.reason.open_s is not None
    ]
    if len(broken) < 3:
        return None
    open_s, moments_s = map(sorted, zip(*broken))
    differ_s = open_s[-1] - open_s[0]
    alike = differ_s < max(0.5, 0.02 * open_s[-1]) and moments_s[-1] - moments_s[0] > max(1.0, 2 * differ_s)
    return open_s[len(open_s) // 2] if alike else None


def advice(results: Results, kinds: Collection[Kind], time_out_s: float | None = None) -> Iterator[str]:
    """What to look at next, when a run has failed in such ways."""
    servers, own, in_front = results.servers, results.hub.metrics, results.http.in_front
    if Kind.AWAY in kinds and results.hub.proxy:
        yield f"some requests through {results.hub.proxy} got no answer: {without_proxy(results.hub.endpoint)}"
    elif Kind.AWAY in kinds and not results.hub.restarts:
        yield "some requests got no answer: does the hub run? It exits after consecutive_failure_limit failed starts"
    if Kind.FULL in kinds:
        yield "the hub allows no more servers: raise its active_server_limit"
    elif servers and servers.throttled:
        yield "the hub throttled: raise its concurrent_spawn_limit, or slow the arrivals (--rate, or a smaller -b)"
    yield from _without_servers(results, kinds)
    if Kind.LATE in kinds:
        yield "some servers were still starting: see the hub's log and the spawner's events, or raise --server-timeout"
    elif servers and servers.failures:
        named = things(results.own_servers)
        yield f"see the hub's log for the {named} named above; on Kubernetes, the events of their pods"
    if Kind.LOST in kinds:
        yield "servers were lost while held: an idle culler? a node that went away? the hub's log says who stopped them"
    if Kind.ROUTE in kinds:
        yield "some pages did not come: look at the proxy's log and its routes, and at the servers' own logs"
    if time_out_s is not None:
        lasted = f"{time_out_s:.0f} s"
        yield f"all websockets that broke had been open for {lasted}: something in front has a time-out of {lasted}"
    elif Kind.WIRE in kinds:
        yield "websockets broke: whatever stands in front of the hub has to pass upgrades and to keep connections open"
    if results.leaking:
        yield "the proxy loses connections when servers end: configurable-http-proxy before 5.1.0 does; upgrade it"
    if Kind.KERNEL in kinds:
        yield "kernels ended: that is what a memory limit does; see the servers' logs, and their memory limit"
    if own and own.cpu_share_max > BUSY:
        yield (
            f"the hub's process used {share_text(own.cpu_share_max)} of a processor, and it can use only one: "
            "give it a faster one, or less to do"
        )
    if results.hub.restarts:
        yield "the hub restarted: look at why it ended (memory limit? consecutive_failure_limit?)"
    denied = results.http.statuses.get("403", 0) - in_front.get("403", 0)
    if denied > (results.hub.metrics_missing == NO_METRICS_SCOPE):
        yield "the hub denied requests (403): a hook, a quota, or a scope that the role lacks; its log says which"
    if in_front.keys() & {"429"}:
        yield "something in front of the hub limits requests (429): exempt this machine, or run inside the cluster"
    if in_front.keys() & {"401", "403"}:
        yield "something in front of the hub denies requests: let this machine, and POST and DELETE, through to the hub"
    if any(status >= "500" for status in in_front):
        yield "errors from 500 on came from what stands in front of the hub: look at the proxy's and the ingress's logs"


def _without_servers(results: Results, kinds: Collection[Kind]) -> Iterator[str]:
    """What to do on a hub where fake users as they are cannot have servers."""
    servers, options = results.servers, results.options
    reasons = {one.reason for one in servers.failures} if servers else set()
    said = " ".join([*results.warnings, *reasons])
    chosen = any(group.get("profile") for group in options.get("event") or [options])
    alike = servers is not None and not servers.ready and len(servers.failures) > len(reasons) == 1
    if re.search("getpwnam|does not exist on the system", said):
        yield "the hub's users need unix accounts: make some with these names, or test with --own-servers"
    elif "login again" in said:
        yield "this hub starts servers only for people who have logged in (refresh_pre_spawn): test with --own-servers"
    elif "Invalid username" in said:
        yield "the hub's username_pattern refuses these names: allow hub-stress-test-.* too, or test with --own-servers"
    elif Kind.SPAWN in kinds and alike and not chosen:
        yield "all starts failed alike: if people choose options before a start, choose them with --profile"


# ==== Sections, and the summary as text ==============================================================================


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
ENOUGH_SERVERS = 50  # before the hub's memory can be divided among them
NAMES_SHOWN = 3


def verdict_of(results: Results) -> tuple[str, str]:
    """The word and the sentence that a run comes down to."""
    servers, capacity = results.servers, results.capacity
    word = ENTITLED.get(ExitCode(results.exit_code), "INTERRUPTED")
    if results.command == PURGE:
        return word, f"{counted(results.cleaned.deleted, thing(results.own_servers))} removed"
    if capacity:
        return word, _capacity_sentence(capacity)
    if people := results.people:
        later = people.failed + people.at_work - people.expected
        afterwards = f"; {later} failed afterwards" if later else ""
        waited = _waited(results.operations.get("at_work"))
        leaks = "; the proxy lost connections afterwards" if results.leaking else ""
        expected = counted(people.expected, "person", "people")
        return word, f"{people.at_work:,} of {expected} got to work{afterwards}{waited}{leaks}"
    if servers:
        lost = f"; {counted(servers.lost, 'was', 'were')} lost while held" if servers.lost else ""
        waited = _waited(results.operations.get("server_ready"))
        return word, f"{servers.ready:,} of {counted(servers.requested, 'server')} became ready{lost}{waited}"
    load = [name for name in results.operations if name in (results.options.get("mix") or DEFAULT_MIX)]
    count, failed = (
        sum(getattr(results.operations[name], key) for name in load) for key in ("count", "failed")
    )
    what = "activity report" if load == ["activity"] or not load else "request"
    return word, f"{count - failed:,} of {counted(count, what)} {'was' if count == 1 else 'were'} accepted"


def _waited(ready: Operation | None) -> str:
    if not ready or ready.latency_s.max is None:
        return ""
    most = ready.enough("p95")
    nearly_all = f", 95 % at most {duration_text(most)}" if most is not None else ""
    return f"; half waited {duration_text(ready.latency_s.p50)}{nearly_all}, the last {duration_text(ready.latency_s.max)}"


def _capacity_sentence(capacity: Capacity) -> str:
    if capacity.rate_per_s is None:
        why_not = (
            "this tool could not send the first rate" if capacity.generator_bound else "no rate was sustained"
        )
        return f"the capacity was not found: {why_not if capacity.finished else 'the search did not finish'}"
    least = "at least " if capacity.generator_bound or not capacity.finished else ""
    if capacity.people_per_minute:
        of_300 = f"a class of 300 in {duration_text(300 * 60 / capacity.people_per_minute)}"
        people = counted(capacity.people_per_minute, "person", "people")
        return f"this hub takes {least}{people} a minute: {of_300}"
    servers = capacity.servers_reporting_every_300_s
    meaning = (
        f": the activity reports of {servers:,} running servers, one every 300 s each" if servers else ""
    )
    return f"this hub sustains {least}{counted(round(capacity.rate_per_s), 'request')} per second{meaning}"


def differences_to(baseline: Json | None, results: Results) -> list[str]:
    """What makes a comparison pointless: another command or hub, other people, or something else that they do."""
    if not baseline:
        return []
    hubs, options = (
        (baseline.get("hub", {}), as_json(results.hub)),
        (baseline.get("options", {}), results.options),
    )
    pairs: dict[str, Iterable[Any]] = {"the command": (baseline.get("command"), results.command)}
    pairs |= {f"the hub's {key}": (hubs[0].get(key), hubs[1][key]) for key in ("endpoint", "version")}
    if baseline.get("command") == results.command:
        keys = [OPTIONS[name].key for name in COMPARED if OPTIONS[name].key in results.options]
        pairs |= {
            f"--{key.replace('_', '-')}": [_option_text(key, one.get(key)) for one in options] for key in keys
        }
    return [f"{what} was {old}, and is {new} now" for what, (old, new) in pairs.items() if old != new]


COMPARED = (
    *(
        "count",
        "batch_size",
        "rate_per_s",
        "within_s",
        "event",
        "profile",
        "visit",
        "page",
        "work",
        "notebook",
    ),
    *("hold_s", "stay_s", "own_servers", "duration_s", "mix"),
)


DURATIONS = tuple(row.key for row in OPTIONS.values() if row.kind is duration)


def _option_text(key: str, value: Any) -> str:
    """An option's value in a comparison; of an event the groups with what was given for each."""
    if not value or value is True:
        return "given" if value else "not given"
    if key == "event":
        groups = (
            [f"{name} {_option_text(name, one)}" for name, one in group.items() if one] for group in value
        )
        return "; ".join(map(", ".join, groups))
    return f"{value:g}s" if key in DURATIONS else str(value)


def facts(results: Results, baseline: Json | None = None) -> Section:
    """What was asked, what came of it, how long it took, why, and what to do next."""
    differences = differences_to(baseline, results)
    through = f", through {results.hub.proxy}" if results.hub.proxy else ""
    http = results.http
    monitoring = (
        f"{share_text(http.observer_share or 0)} monitoring, {counted(http.retries, 'retry', 'retries')}"
    )
    rows = [
        *_tested(results),
        *(("because", reason) for reason in results.warnings),
        *(("because", f"{one.condition}: it is {_value_text(one, results)}") for one in _told(results, True)),
        *(("baseline", difference) for difference in differences),
        ("hub", f"{results.hub.version} at {results.hub.endpoint}" + through),
        *_server_facts(results),
        *_errors(results.operations, results.own_servers),
        ("requests", f"{http.requests:,}{' to the hub' if http.servers else ''}, of which {monitoring}"),
        *_server_requests(http.servers),
        ("duration", duration_text(results.duration_s)),
        *_hub_facts(results),
        *(("where the time went", sentence) for sentence in time_spent(results)),
        *_cleanup_facts(results),
        *_proxy_facts(results.proxy_check),
        *_aftermath_facts(results.aftermath or {}),
        *(
            ("condition", f"{one.condition}: not met, it is {_value_text(one, results)}")
            for one in _told(results, False)
        ),
        *(("next", one) for one in results.advice),
    ]
    return Section("Summary", rows)


def _server_requests(http: Http | None) -> Iterator[tuple[str, str]]:
    if http:
        answers = ", ".join(f"{number:,} × {status}" for status, number in http.statuses.items())
        retries = counted(http.retries, "retry", "retries")
        yield "requests", f"{http.requests:,} to servers, of which {retries}: {answers}"


def _tested(results: Results) -> Iterator[tuple[str, str]]:
    capacity = results.capacity
    if not capacity:
        return
    latencies = (
        f"The latencies below are of the {'rate sustained' if capacity.rate_per_s else 'last rate tried'}"
    )
    if results.command == STRESS:
        lasts = duration_text(results.options["duration"] or CAPACITY_PEOPLE_STEP_S)
        yield "tested", f"people who come at a fixed rate for {lasts}, new ones in each step. {latencies}"
    else:
        sent = ", ".join(f"{title_of(name)}s" for name in results.options.get("mix") or DEFAULT_MIX)
        yield "tested", f"{sent} only: starting servers, memory and nodes were not. {latencies}"
    if reporting := capacity.servers_reporting_every_300_s:
        default_s = SERVER_REPORTS_EVERY_S
        every_s = max(default_s, math.ceil(default_s * MANY_SERVERS / (REPORTS_SHARE * reporting)))
        servers = f"the reports of {MANY_SERVERS:,} servers with JUPYTERHUB_ACTIVITY_INTERVAL={every_s}"
        yield "activity", f"{servers} take at most {share_text(REPORTS_SHARE)} of this"
    if capacity.limited_by:
        yield "limit", capacity.limited_by


def _told(results: Results, held: bool) -> list[Judgement]:
    """The conditions worth a line: all that were asked for; the default one is told by the rest."""
    asked = results.options["fail_if"]
    return [one for one in results.conditions if one.held is held and (asked or one.condition != FAILED.text)]


def _value_text(judged: Judgement, results: Results | None = None) -> str:
    metric = condition(judged.condition).metric
    name, _, statistic = metric.removeprefix("operations.").replace(".latency_s", "").rpartition(".")
    text = functools.partial(value_text, metric=metric)
    if judged.value is None:
        return "not measured"
    seen = results.operations.get(name) if results else None
    few = ""
    if seen and statistic in ENOUGH and (samples := seen.count - seen.failed) < ENOUGH[statistic]:
        few = f" (of {counted(samples, 'sample')})"
    if not judged.baseline or judged.limit is None:
        return f"{text(judged.value)}{few}"
    ratio = f"{judged.value / judged.baseline:.3g}x of {text(judged.baseline)}"
    return f"{text(judged.value)}{few}, {ratio}; the limit is {text(judged.limit)}"


def _server_facts(results: Results) -> Iterator[tuple[str, str]]:
    servers, options = results.servers, results.options
    if not servers or results.command == PURGE or results.capacity:
        return
    throttled = f"; {servers.throttled} throttled" if servers.throttled else ""
    since = (
        f", from {duration_text(servers.throttling_began_s)} after the first start on" if throttled else ""
    )
    counts = (
        f"{servers.ready} ready, {servers.failed} failed{f', {servers.lost} lost' if servers.lost else ''}"
    )
    yield "servers", f"{servers.requested} requested, {pace_text(options)}; {counts}{throttled}{since}"
    if given_up := _given_up(results):
        yield "given up", given_up
    if options["hold"] and "stay" in results.operations and not results.people:
        yield (
            "hold",
            f"{duration_text(options['hold'])}; who stayed is the hub's word, --visit asks the servers too",
        )
    if people := results.people:
        yield "people", f"{people.expected} expected; {people.at_work} at work, {people.failed} failed"
    for group, came in zip(options.get("event") or (), (results.groups or {}).values()):
        waited = _waited(results.operations.get(f"at_work[{group['name']}]"))
        pace = pace_text(options | group | {"event": None})
        came_to = f"{came.expected} expected, {pace}; {came.at_work} at work, {came.failed} failed{waited}"
        yield "people", f"{group['name']}: {came_to}"
    told = people or servers
    for reason, number in list(told.reasons.items())[:REASONS_SHOWN]:
        yield (
            "failed",
            f"{number} × {reason}{_named([one.user for one in told.failures if one.reason == reason])}",
        )
    if others := sum(list(told.reasons.values())[REASONS_SHOWN:]):
        yield "failed", f"{others} × something else: see the results file"
    slowest = [
        f"{duration_text(one.ready_s)}, {one.user}{_why_slow(one, servers)}" for one in servers.slowest
    ]
    if any(_why_slow(one, servers) for one in servers.slowest):
        yield from (("slowest", one) for one in slowest)
    elif slowest:
        yield "slowest", "; ".join(one.replace(" ", "\N{NO-BREAK SPACE}") for one in slowest)


def _given_up(results: Results) -> str:
    """What became of servers that nobody waited for any longer, by the hub's own clock; "" where some became ready."""
    servers, own = results.servers, results.hub.metrics
    came = own.spawns.get("success") if own else None
    if not servers or servers.ready or not servers.given_up or not came:
        return ""
    after = f"{counted(servers.given_up, 'was', 'were')} given up after {duration_text(results.options['server_timeout'])}"
    if came.count > servers.given_up:  # others start servers too
        return f"{after}; the hub counted {counted(round(came.count), 'successful start')}"
    mean = duration_text(came.mean_s)
    return f"{after}; by the hub's own clock {came.count:.0f} of them became ready, after {mean} on average"


def _named(users: Sequence[str]) -> str:
    shown = sorted(users, key=natural)[: NAMES_SHOWN if len(users) > NAMES_SHOWN + 1 else None]
    more = f" and {len(users) - len(shown)} more, all in --results" if len(users) > len(shown) else ""
    return f" ({', '.join(shown)}{more})" if users else ""


def _why_slow(server: Slow, servers: Servers) -> str:
    """How often it was throttled, and what the hub said for longest if that tells it from the other servers."""
    reasons = [f"throttled {server.throttled} ×"] if server.throttled else []
    reasons += (
        [f"longest at: {server.message}"]
        if server.message and server.message != servers.usual_message
        else []
    )
    return ": " + ", ".join(reasons) if reasons else ""


def _errors(operations: Mapping[str, Operation], own_servers: bool) -> Iterator[tuple[str, str]]:
    for name in in_order(operations):
        if name not in PERSONAL and "[" not in name:  # which are told of people, servers and all
            for reason, number in list(operations[name].errors.items())[:REASONS_SHOWN]:
                yield "errors", f"{title_of(name, own_servers)}: {number} × {reason}"


def _hub_facts(results: Results) -> Iterator[tuple[str, str]]:
    own, missing = results.hub.metrics, results.hub.metrics_missing
    if missing:
        yield (
            "hub's own",
            f"figures (CPU, memory, event-loop lag, its own request times) were not read: {missing}",
        )
    if not own:
        return
    most_s = own.event_loop_lag_max_s
    usual_s = own.event_loop_lag_p95_s if own.event_loop_samples >= 20 else None
    usual = f"{_lag_text(usual_s)} (p95), " if usual_s is not None else ""
    lag = f"; event loop late by {usual}{_lag_text(most_s)} (max)" if most_s is not None else ""
    many = results.servers is not None and results.servers.ready >= ENOUGH_SERVERS
    each = (
        f", {bytes_text(own.rss_per_server_bytes)} a server"
        if many and own.rss_per_server_bytes is not None
        else ""
    )
    memory = (
        f"memory {bytes_text(own.rss_before_bytes)} before, {bytes_text(own.rss_after_bytes)} after{each}"
    )
    most = f", under load up to {share_text(own.cpu_share_max)}" if own.cpu_share_max > own.cpu_share else ""
    cpu = f"CPU {own.cpu_s:.1f} s, {share_text(own.cpu_share)} of a processor{most}"
    yield "hub's own", f"{cpu}; {memory}{lag}"


def _lag_text(seconds: float) -> str:
    return f"≤ {duration_text(seconds)}" if seconds <= LOOP_INTERVAL_S else duration_text(seconds)


def _cleanup_facts(results: Results) -> Iterator[tuple[str, str]]:
    cleaned, remedy = results.cleaned, purge_command(results.options["run"], results.own_servers)
    what = thing(results.own_servers)
    done = f"{counted(cleaned.deleted, what)} {'removed' if results.own_servers else 'deleted'}"
    traces = list(_traces(results))
    if cleaned.kept:
        yield "cleanup", f"{counted(cleaned.kept, what)} kept, as asked; remove them with: {remedy}"
    elif cleaned.left:
        yield "cleanup", f"{done}; {counted(len(cleaned.left), 'IS', 'ARE')} STILL THERE:"
        yield "cleanup", names_text(cleaned.left)
        if cleaned.in_the_way:
            yield "cleanup", cleaned.in_the_way
        yield "cleanup", f"{'when that is solved, ' if cleaned.in_the_way else ''}remove them with: {remedy}"
    else:
        yield "cleanup", f"{done}, none left{' on the hub' if traces else ''}"
    yield from (("cleanup", sentence) for sentence in traces)


def _traces(results: Results) -> Iterator[str]:
    """What may be left where the hub does not look."""
    users = results.users
    if users.stopped_while_starting:
        yield still_starting(users.stopped_while_starting)
    if number := users.stops_failed or 0:
        they, their = ("it was", "its pod") if number == 1 else ("they were", "their pods")
        yield (
            f"the hub failed to stop {counted(number, 'server')} during this run, though it said that {they} stopped: "
            f"{their} and volumes may still be there. "
            f"Look with: {pods_command(results.options['run'], results.own_servers)}"
        )


def _whose(name: str) -> str:
    return "the hub" if name == "hub" else name


PORTS = 28_232  # from which a machine takes one for each connection, unless it is told otherwise
TABS_IMAGINED, ASKING_PER_MINUTE = 300, 2
PROJECTION = (
    f"Each failed reconnect of an open tab adds one, for an hour. If {TABS_IMAGINED} open tabs kept reconnecting twice "
    f"a minute to ended servers that still have a route, the proxy's {PORTS // 1000},000 ports would last "
    f"{PORTS / (TABS_IMAGINED * ASKING_PER_MINUTE):.0f} minutes; then every page of the hub answers 503"
)


def _proxy_facts(check: ProxyCheck | None) -> Iterator[tuple[str, str]]:
    """What the check of the proxy has shown."""
    if check and check.verdict != UNDECIDED:  # which is a warning
        yield "proxy", f"{check.verdict}: {check.reason}" + (f". {PROJECTION}" if check.leaking else "")


def _aftermath_facts(aftermath: Aftermath) -> Iterator[tuple[str, str]]:
    """Connections to the hub that its proxy keeps: as many as the error pages that it fetched."""
    changes = aftermath.get("hub", {})
    files, pages = changes.get("open_files"), changes.get("proxy_error_pages")
    number, fetched = (files.grown if files else None) or 0, (pages.grown if pages else None) or 0
    if files and number > FILES_TO_MENTION and fetched >= PROOF_SHARE * number:
        more = f"the hub has {number:.0f} open files more than before ({files.before:.0f}, now {files.after:.0f})"
        yield "aftermath", f"{more}: its proxy fetched as many error pages, and keeps these connections open"


def in_order(operations: Collection[str]) -> list[str]:
    """Operations in the order of the table of steps, those of groups behind that of all, one's own at the end."""
    places = {name: place for place, name in enumerate(STEPS)}
    return sorted(operations, key=lambda name: (places.get(name.partition("[")[0], len(places)), name))


def _label(name: str, own_servers: bool) -> str:
    """What a row of a table is about: an operation, or, below that, one of its groups."""
    _, bracket, group = name.partition("[")
    return f"\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}{group[:-1]}" if bracket else title_of(name, own_servers)


def latency_section(operations: Mapping[str, Operation], own_servers: bool = False) -> Section:
    """A row for each operation, with a dash where too few succeeded for a statistic."""
    columns = ("mean", "p50", "p95", "p99", "max")
    rows = [
        (
            _label(name, own_servers),
            str(operations[name].count),
            str(operations[name].failed),
            *(duration_text(operations[name].enough(column)) for column in columns),
        )
        for name in in_order(operations)
    ]
    return Section("Latency", rows, ("operation", "count", "failed", *columns))


def capacity_section(capacity: Capacity, of_people: bool = False) -> Section:
    """A row for each rate that was tried."""
    unit, factor, goal = ("a minute", 60, "server ready p95") if of_people else ("per s", 1, "p95")
    rows = [
        (
            f"{factor * step.rate_per_s:.4g}",
            f"{factor * step.sent_per_s:.4g}",
            duration_text(step.p95_s),
            str(step.failed),
            step.held or "none: sustained",
        )
        for step in capacity.steps
    ]
    header = (f"tried {unit}", f"{'came' if of_people else 'sent'} {unit}", goal, "failed", "condition met")
    return Section("Capacity", rows, header, left=(4,))


def comparison_section(baseline: Json, results: Results) -> Section:
    """Old, new and ratio of what both runs measured; a dash for a percentile of too few samples."""
    columns, now = ("p50", "p95", "max"), as_json({"operations": results.operations})
    rows = []
    for name in in_order(results.operations):
        if name in baseline.get("operations", {}):
            old, new = (metric_value(run, f"{name}.failed") or 0 for run in (baseline, now))
            cells = (comparison(baseline, now, f"{name}.{column}") for column in columns)
            rows.append((_label(name, results.own_servers), *cells, f"{old:g}→{new:g}"))
    before = (baseline.get("capacity") or {}).get("rate_per_s")
    after = results.capacity and results.capacity.rate_per_s
    if before and after:
        rows.append(("capacity per s", f"{before:.4g}→{after:.4g} {after / before:.2f}x", "", "", ""))
    return Section("Against the baseline", rows, ("against baseline", *columns, "failed"))


def comparison(baseline: Json, results: Json, metric: str) -> str:
    """Old, new and ratio of one metric, like 840ms→1.25s 1.49x."""
    old, new = (_enough(run, metric) for run in (baseline, results))
    ratio = f" {new / old:.{2 if new < 10 * old else 0}f}x" if old and new else ""
    return f"{duration_text(old)}→{duration_text(new)}".replace(" ", "") + ratio


def _enough(run: Json, metric: str) -> float | None:
    name, _, statistic = metric.partition(".")
    measured = run["operations"][name]
    return (
        metric_value(run, metric)
        if measured["count"] - measured["failed"] >= ENOUGH.get(statistic, 1)
        else None
    )


def render_summary(
    results: Results, baseline: Json | None = None, *, colour: bool = False, width: int = 100
) -> str:
    """The page that an operator reads: the verdict first, then what was asked, what came of it, how long it took."""
    word, sentence = verdict_of(results)
    sections = [facts(results, baseline)]
    if results.capacity:
        sections.append(capacity_section(results.capacity, results.command == STRESS))
    if results.operations:
        sections.append(latency_section(results.operations, results.own_servers))
    if baseline:
        sections.append(comparison_section(baseline, results))
    return render_page(f"{word}: {sentence}", sections, colour=colour, width=width)


def render_page(headline: str, sections: Iterable[Section], *, colour: bool = False, width: int = 100) -> str:
    """A sentence, and sections below it."""
    page = textwrap.wrap(headline, width, subsequent_indent="  ", **_UNBROKEN)
    for number, section in enumerate(sections):
        page += [""] * (number > 0) + list(
            _as_table(section) if section.header else _as_prose(section, width)
        )
    return "\n".join(map(_coloured, page) if colour else page)


_UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
_COLOURS = {
    "PASSED": 32,
    "FAILED": 31,
    "LEFT": 31,
    "INTERRUPTED": 33,
    "because": 33,
    "failed": 31,
    "next": 36,
}


def _coloured(line: str) -> str:
    """The line, its first word in the colour that the word has."""
    word = line.partition(" ")[0].rstrip(":")
    return f"\033[1;{_COLOURS[word]}m{word}\033[0m{line[len(word) :]}" if word in _COLOURS else line


def _as_prose(section: Section, width: int) -> Iterator[str]:
    """Sentences behind their labels, a label that repeats left out."""
    indent = max(len(row[0]) for row in section.rows) + 2
    for label, sentence in labelled_once(section.rows):
        head = label.ljust(indent) + sentence
        yield from textwrap.wrap(head, width, subsequent_indent=" " * indent, **_UNBROKEN)


def labelled_once(rows: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Labels and sentences, a label that repeats left out."""
    for before, (label, sentence) in zip([("", ""), *rows], rows):
        yield ("" if label == before[0] else label, sentence)


def _as_table(section: Section) -> Iterator[str]:
    lines = [section.header, *section.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(section.header))]
    for line in lines:
        cells = (
            cell.ljust(width) if column in section.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        yield "  ".join(cells).rstrip()


# ==== The plan in words, for a dry run ===============================================================================

DRY_RUN = "DRY RUN: no request was sent; a run would do this"
USUAL_START_S = 10.0  # assumed of servers: a plan does not know how long a hub's servers take
MEANWHILE = (
    f"{PING_RATE_PER_S:g} pings per second; with read:metrics, the hub's figures every {METRICS_EVERY_S:g} s"
)
Presence = tuple[
    float, float, Plan
]  # when a person arrives and leaves, in seconds since the first start; their group


def timetable(plan: Plan, at_worst: bool = False) -> list[Presence]:
    """When each person is there, if servers start in `USUAL_START_S` and all else takes no time.

    At worst, every step takes as long as its time-out allows.
    """
    people, first = [], min(plan.batch_size, FIRST_STARTS)  # as many start until one server is ready
    for n, (due_s, group) in enumerate(arrivals(plan)):
        start_s = group.server_timeout_s if at_worst else min(USUAL_START_S, group.server_timeout_s)
        rounds = n // first if at_worst or n < first else 1 + (n - first) // plan.batch_size
        arrives_s = due_s if plan.is_open else rounds * start_s
        parts = len(group.page.requests) if group.page else 0
        parts_s = DEFAULT_TIMEOUT * math.ceil(parts / CONNECTIONS_OF_A_BROWSER)
        slow_s = group.opens * group.visit_timeout_s + parts_s + group.work * group.cell_timeout_s
        works_s = arrives_s + start_s + at_worst * slow_s
        cells_s = (len(cells_of(group)) - 1) * (group.think_s + at_worst * group.cell_timeout_s)
        last_s = at_worst * (group.opens * group.visit_timeout_s + group.work * group.cell_timeout_s)
        people.append((arrives_s, works_s, works_s + cells_s, last_s * STEPS["stay"].wanted(group), group))
    all_leave_s = plan.hold_s + max(settled_s for _, _, settled_s, _, _ in people)
    return [
        (arrives_s, last_s + (works_s + group.stay_s if group.stay_s else all_leave_s), group)
        for arrives_s, works_s, _, last_s, group in people
    ]


def at_one_time(people: Sequence[Presence], noun: str) -> str:
    """The most of something that these people have at one time; about, where that depends on how long starts take."""
    changes = sorted(
        change for arrives_s, leaves_s, _ in people for change in ((arrives_s, 1), (leaves_s, -1))
    )
    most = max(itertools.accumulate(number for _, number in changes), default=0)
    return "about " * any(group.stay_s for _, _, group in people) + counted(most, noun)


def numbers_text(numbers: Mapping[str, int]) -> str:
    """Numbers with their nouns, without zeros: 3 starts, 3 stops."""
    return ", ".join(counted(number, noun) for noun, number in numbers.items() if number)


def steps_planned(group: Plan) -> str:
    """What each person of a group does, in order."""
    book, parts = group.notebook, len(group.page.requests) if group.page else 0
    limits = f"at most {duration_text(group.cell_timeout_s)} each, {duration_text(group.think_s)} between two"
    cells = f"{counted(len(book.cells), 'cell')} of {book.file}" if book else "6*7 again and again"
    steps = {
        f"starts a server (at most {duration_text(group.server_timeout_s)})": True,
        f"opens its page (at most {duration_text(group.visit_timeout_s)})": group.opens,
        f"fetches {counted(parts, 'part')} of the page": parts,
        f"runs {cells} in a kernel ({limits})": group.work,
        f"stays until {duration_text(group.hold_s)} after the last has got this far": group.hold_s
        and not group.stay_s,
        f"leaves {duration_text(group.stay_s)} after getting to work": group.stay_s,
    }
    return ", ".join(step for step, planned in steps.items() if planned)


def people_planned(plan: Plan) -> Iterator[tuple[str, str]]:
    """Who arrives when, what they do and send, how long that takes, and what it costs."""
    people, removed, seed = (
        timetable(plan),
        plan.count * (not plan.keep),
        f" (--seed {plan.seed})" * bool(plan.seed),
    )
    for group in plan.groups:
        mine, name = [row for row in people if row[2] is group], f"{group.group}: " * bool(group.group)
        first, last = (f"after {duration_text(mine[n][0])}" if mine[n][0] else "at once" for n in (0, -1))
        pace = f"{counted(len(mine), 'person', 'people')}, {pace_text(group.options())}{seed * bool(group.within_s)}"
        pace += f" ({FIRST_STARTS} until one server is ready)" * (
            len(mine) > FIRST_STARTS < plan.batch_size and not plan.is_open
        )
        yield (
            "people",
            f"{name}{pace}: the first {first}, the last {last}; {at_one_time(mine, 'server')} at one time",
        )
        yield "each person", name + steps_planned(group)
    of = {name: sum(group.count for group in plan.groups if STEPS[name].wanted(group)) for name in PERSONAL}
    again = sum(group.count for group in plan.groups if group.opens and STEPS["stay"].wanted(group))
    creates = math.ceil(plan.count / plan.batch_size) * (not plan.own_servers)
    hub = {"check": 2 + plan.opens, "list": 2 - plan.keep, "create": creates, "start": plan.count}
    hub |= {"read": of["visit"] + of["stay"], "stop": removed, "delete": removed}
    servers = {"visit": of["visit"] + again, "page": of["page"], "kernel": of["kernel_ready"]}
    yield "requests", f"{numbers_text(hub | servers)}; a progress stream for each slow start; {MEANWHILE}"
    ends_s, worst_s = (
        max(leaves_s for _, leaves_s, _ in timetable(plan, at_worst)) for at_worst in (False, True)
    )
    usual = f"from the first start on, about {duration_text(ends_s)} if servers start in {USUAL_START_S:g} s"
    yield "duration", f"{usual}, at most {duration_text(worst_s)} if every step takes as long as it may"
    kernels = [row for row in people if row[2].work]
    some = at_one_time(kernels, "kernel") if kernels else "no kernels"
    yield "cost", f"{at_one_time(people, 'server')} and {some} at one time"
    if plan.check_proxy:
        yield "proxy check", f"after that, with one of the servers or one more: {CHECK_COSTS}"


def load_planned(plan: Plan) -> Iterator[tuple[str, str]]:
    """Which requests are sent for users without servers, and how long that takes."""
    load, total = load_of(plan, "", [""] * plan.count), sum((plan.mix or DEFAULT_MIX).values())
    lasts_s = load.schedule.lasts_s if load.schedule else load.duration_s
    rounds = 1 if lasts_s else math.ceil(plan.count / (load.workers * load.processes))
    number = (
        "as many requests as that allows"
        if lasts_s and not load.schedule
        else counted(load.planned, "request")
    )
    mix = ", ".join(f"{share_text(weight / total)} {name}" for name, weight in load.mix.items())
    yield "load", f"{load.title} from {counted(load.workers * load.processes, 'thread')}: {number}, {mix}"
    numbers = {"create": math.ceil(plan.count / 10), "delete": plan.count * (not plan.keep)}
    yield (
        "requests",
        f"besides, 2 checks, {counted(2 - plan.keep, 'list')}, at most {numbers_text(numbers)}; {MEANWHILE}",
    )
    usual = (
        duration_text(lasts_s)
        if lasts_s
        else f"{counted(rounds, 'request')} of each thread, after up to 1 s each"
    )
    worst_s = (lasts_s or 0.0) + rounds * (1 + OPEN_GRACE_S + RETRY_WINDOW_S + DEFAULT_TIMEOUT)
    yield "duration", f"{usual}, at most {duration_text(worst_s)} if the hub answers as slowly as it may"


def first_step(plan: Plan) -> Plan:
    """The plan of the first step of a search for capacity."""
    people = plan.command == STRESS
    rate_per_s = fastest(plan.rate_per_s) or (
        CAPACITY_FIRST_PEOPLE_PER_S if people else CAPACITY_FIRST_RATE_PER_S
    )
    for_s = plan.duration_s or (CAPACITY_PEOPLE_STEP_S if people else CAPACITY_STEP_S)
    count = max(1, round(rate_per_s * for_s)) if people else plan.count
    return dataclasses.replace(plan, rate_per_s=rate_per_s, duration_s=for_s, count=count)


def plan_section(plan: Plan) -> Section:
    """What a run of this plan does and costs, as far as that can be known without asking the hub."""
    what, prefix, step = things(plan.own_servers), username(0, plan.run or "")[:-1], plan
    rows = [("hub", plan.endpoint or "not given yet")]
    if plan.find_capacity:
        step = first_step(plan)
        bound = f" or {counted(plan.max_servers, 'server')} would run" if plan.max_servers else ""
        how = (
            f"in steps of {duration_text(step.duration_s)}, usually a dozen, until a condition is met{bound}"
        )
        rows.append(("search", f"{how}; below is the first step"))
    names = names_text(f"{prefix}{n}" for n in range(1, step.count + 1))
    if plan.command == PURGE:
        rows.append((what, f"{prefix}<n>" + ("" if plan.run else ", and those of every --run")))
        rows.append(("requests", "2 checks, 2 lists; for each of them a stop if it runs, and a delete"))
        rows.append(("duration", f"as long as that takes for {plan.batch_size} at a time"))
    else:
        first = "; those that are there come first" if plan.command == ACTIVITY else ""
        rows.append((what, f"{names}, or as many after the highest number in use{first}"))
        rows += people_planned(step) if plan.command == STRESS else load_planned(step)
    if plan.command != STRESS:
        rows.append(("cost", "no servers, no kernels"))
    removed = f"{what} are removed; times out after {duration_text(plan.cleanup_timeout_s)} without progress"
    rows.append(("cleanup", f"{what} are kept" if plan.keep else removed))
    mine = "!user=<owner>" * plan.own_servers
    rows.append(
        ("scopes", ", ".join(scope + mine for scope in sorted(needed_scopes(plan.command, plan.own_servers))))
    )
    if plan.command == STRESS and plan.opens:
        whose = "the token" if plan.visit_token else "the token, or better a second one"
        rows.append(("scopes", f"access:servers{mine}, for {whose} in JUPYTERHUB_VISIT_TOKEN"))
    rows.append(("conditions", "; ".join(one.text for one in plan.conditions)))
    return Section("Plan", rows)


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
.PASSED { background: #15803d } .FAILED, .LEFT { background: #b91c1c } .INTERRUPTED { background: #a16207 }
.words td:first-child { white-space: nowrap }
@media (max-width: 700px) { .words td:first-child { white-space: normal }
  .scroll { font-size: .7rem } .scroll td, .scroll th { padding-right: .25rem } }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
.left, .words td { text-align: left } .words td { white-space: normal; vertical-align: top }
.words td + td { overflow-wrap: anywhere } th { color: var(--faint); font-weight: normal }
.plot { width: 100%; min-width: 0 }
.js-plotly-plot .main-svg :is(.xtick, .ytick, .y2tick, .legendtext, .infolayer) text,
.js-plotly-plot .main-svg text.legendtext, .js-plotly-plot .main-svg .annotation text { fill: var(--faint) !important }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important }
"""
BLUE, GREEN, AMBER, RED, GREY, LOST = "#3b82f6", "#22a355", "#f59e0b", "#ef4444", "#94a3b8", "#a21caf"
CYAN, TEAL, VIOLET, BROWN = "#06b6d4", "#0f766e", "#8b5cf6", "#a8763e"
READY = "rgba(34,163,85,.3)"
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
Trace = dict[str, Any]  # of plotly
Moments = Sequence["float | None"]


class Page:
    """An HTML page that is being put together, with its plots."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._plots: list[tuple[str, list[Trace], dict[str, Any]]] = []

    def add(self, element: str, text: str) -> None:
        self._parts.append(f"<{element}>{html.escape(text)}</{element}>")

    def open(self, tag: str) -> None:
        self._parts.append(tag)

    def section(self, section: Section) -> None:
        """A heading and a table, which scrolls by itself; rows without a header are sentences."""
        self.add("h2", section.title)
        lines = [("th", section.header)] if section.header else []
        lines += [("td", row) for row in (section.rows if section.header else labelled_once(section.rows))]
        body = "".join(
            "<tr>"
            + "".join(self._cell(kind, cell, n in section.left) for n, cell in enumerate(row))
            + "</tr>"
            for kind, row in lines
        )
        kind = "" if section.header else "words"
        self._parts.append(f'<div class="scroll"><table class="{kind}">{body}</table></div>')

    @staticmethod
    def _cell(kind: str, text: str, left: bool) -> str:
        return f"<{kind}{' class=left' if left else ''}>{html.escape(text)}</{kind}>"

    def plot(self, traces: Sequence[Trace], height: int, y_title: str, **layout: Any) -> None:
        """A plot whose x axis is the time since the run began, unless `layout` says otherwise."""
        name = f"plot-{len(self._plots)}"
        self._parts.append(f'<div class="plot" id="{name}" style="height:{height}px"></div>')
        own = {
            "height": height,
            "yaxis": {"title": {"text": y_title}, "rangemode": "tozero", "tickformat": ","},
        }
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


def render_report(results: Results, baseline: Json | None = None) -> str:
    """One HTML page, which needs no network: the summary's words, and what happened when."""
    page, timeline = Page(), results.timeline
    word, sentence = verdict_of(results)
    page.open(f'<h1><b class="{word.split()[0]}">{html.escape(word)}</b>')
    page.add("span", " " + re.sub(r"(?<=\d) (?=ms|s|min|h|%)", "\N{NO-BREAK SPACE}", sentence))
    page.open("</h1>")
    versions = f"{results.tool['name']} {results.tool['version']}"
    page.add("p", f"{versions} {results.command}, {results.started} to {results.finished}")
    page.section(facts(results, baseline))
    if results.capacity:
        page.section(capacity_section(results.capacity, results.command == STRESS))
    if timeline.servers and timeline.servers.user:
        _plot_servers(page, timeline.servers, timeline.load_ended_s or 0.0)
    _plot_watch(page, results)
    if results.operations:
        page.section(latency_section(results.operations, results.own_servers))
        _plot_latency(page, results)
    for section in _appendix(results, baseline):
        page.section(section)
    title = f"hub-stress-test: {word}: {sentence}"
    return page.render(title, importlib.import_module("plotly.offline").get_plotlyjs())


def _appendix(results: Results, baseline: Json | None) -> Iterator[Section]:
    if baseline:
        yield comparison_section(baseline, results)
    if own := results.hub.metrics:
        durations = [(f"spawn: {name}", one) for name, one in own.spawns.items()] + list(own.requests.items())
        rows = [(name, f"{one.count:.0f}", duration_text(one.mean_s)) for name, one in durations]
        yield Section("The hub's own clock", rows, ("handler", "count", "mean"))
    if results.conditions:
        judged = [
            (one.condition, "met" if one.held else "not met", _value_text(one, results))
            for one in results.conditions
        ]
        yield Section("Conditions", judged, ("the run fails if", "", "it is"))
    given = {name.replace("_", "-"): value for name, value in results.options.items()}
    for group in given.pop("event", None) or ():
        words = ((key.replace("_", "-"), value) for key, value in group.items() if value and key != "name")
        given[f"group {group['name']}"] = [key if value is True else f"{key} {value}" for key, value in words]
    given |= {"hub": results.hub.version, "tool": results.tool["version"]}
    texts = {
        name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in given.items()
    }
    shown = [(name, texts[name]) for name, value in given.items() if value not in (None, False, [])]
    yield Section("Options and versions", shown)


def server_curves(servers: ServersTimeline, until_s: float, points: int = 300) -> dict[str, list[float]]:
    """How many servers were waiting (throttled), starting, ready, in use, failed and lost at so many moments."""
    due, asked, ended = (
        sorted(at or 0.0 for at in row) for row in (servers.due_s, servers.asked_s, servers.ended_s)
    )
    ready = sorted(end or 0.0 for end, good in zip(servers.ended_s, servers.ready) if good)
    lost, works = (sorted(at for at in row if at is not None) for row in (servers.lost_s, servers.works_s))
    ends = [
        min((at for at in both if at is not None), default=None)
        for both in zip(servers.lost_s, servers.left_s)
    ]
    over = sorted(at for at, good in zip(ends, servers.ready) if at is not None and good)
    gone = sorted(at for at, began in zip(ends, servers.works_s) if at is not None and began is not None)
    moments = [until_s * n / points for n in range(points + 1)]
    count = bisect.bisect_right
    return {
        "at_s": [round(at, 3) for at in moments],
        "waiting": [count(due, at) - count(asked, at) for at in moments],
        "starting": [count(asked, at) - count(ended, at) for at in moments],
        "at work": [count(works, at) - count(gone, at) for at in moments],
        "ready": [count(ready, at) - count(over, at) - count(works, at) + count(gone, at) for at in moments],
        "failed": [count(ended, at) - count(ready, at) for at in moments],
        "lost": [count(lost, at) for at in moments],
    }


def _plot_servers(page: Page, servers: ServersTimeline, until_s: float) -> None:
    page.add("h2", "Servers")
    curves = server_curves(servers, until_s)
    kinds = {
        "failed": RED,
        "lost": LOST,
        "at work": GREEN,
        "ready": READY,
        "starting": BLUE,
        "waiting": AMBER,
    }
    kinds = {kind: colour for kind, colour in kinds.items() if any(curves[kind])}
    stack = {"x": curves["at_s"], "stackgroup": "one", "mode": "none"}
    traces = [
        stack | {"name": kind, "y": curves[kind], "fillcolor": colour} for kind, colour in kinds.items()
    ]
    page.plot(traces, 260, "servers", hovermode="x unified")
    page.add("h3", "How long each waited, in the order in which they were due")
    asked, ended, good = servers.asked_s, servers.ended_s, servers.ready
    taken = [at if held is None else held for held, at in zip(servers.throttled_s, asked)]
    left = [
        min(at for at in (until_s, *ends) if at is not None) for ends in zip(servers.lost_s, servers.left_s)
    ]
    opened, works, failed = servers.opened_s, servers.works_s, servers.failed_s
    loaded = [page or start for page, start in zip(servers.loaded_s, opened)]
    bars = [
        _bars("asked", GREY, servers.due_s, taken, servers.user),
        _bars("throttled", AMBER, servers.throttled_s, asked, servers.user),
        _bars("starting", BLUE, [at if ok else None for at, ok in zip(asked, good)], ended, servers.user),
        _bars("failed", RED, [None if ok else at for at, ok in zip(asked, good)], ended, servers.user),
        _bars("ready", READY, [at if ok else None for at, ok in zip(ended, good)], left, servers.user),
        _bars("opening", CYAN, [at if ok else None for at, ok in zip(ended, good)], opened, servers.user),
        _bars("loading the page", TEAL, opened, loaded, servers.user),
        _bars("starting a kernel", VIOLET, loaded, works, servers.user),
        _bars("at work", GREEN, works, left, servers.user),
        _bars("failed after it was ready", RED, failed, left, servers.user),
        _bars("lost", LOST, servers.lost_s, [until_s] * len(good), servers.user),
    ]
    shown = [bar for bar in bars if bar["x"]]
    page.plot(shown, 460, "server", yaxis={"title": {"text": "server"}, "autorange": "reversed"})


def _bars(name: str, colour: str, begins: Moments, ends: Moments, users: Sequence[str]) -> Trace:
    """A horizontal bar for each server that has a beginning: one line with gaps, since there may be thousands."""
    spans = enumerate(zip(begins, ends))
    shown = [(n, a, b) for n, (a, b) in spans if a is not None and b is not None and b >= a]
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
    ping, hub = results.timeline.operations.get("ping"), results.timeline.hub
    if not ping:
        return
    page.add("h2", "What everybody else felt, and how busy the hub was")
    for sentence in time_spent(results):
        page.add("p", sentence[:1].upper() + sentence[1:] + ".")
    pings = (("ping p50", ping.p50_s, BLUE), ("ping max", ping.max_s, AMBER))
    traces = [_line(name, ping.at_s, milliseconds(values), colour) for name, values, colour in pings]
    traces += _failed_marks("ping", ping)
    if not hub:
        page.plot(traces, 280, "ping, ms", hovermode="x unified")
        return
    watched = {"hub": hub} | results.timeline.watched
    busy = [
        _cpu_line(name, one, colour) for (name, one), colour in zip(watched.items(), itertools.cycle(LINES))
    ]
    busy[0] |= {"fill": "tozeroy", "fillcolor": "rgba(239,68,68,.15)"}
    right = {
        "title": {"text": "CPU, % of a processor"},
        "overlaying": "y",
        "side": "right",
        "showgrid": False,
    }
    right |= {"range": [0, max([105, *(share for line in busy for share in line["y"])])], "dtick": 25}
    margin = LAYOUT["margin"] | {"r": 56}
    page.plot([*traces, *busy], 280, "ping, ms", hovermode="x unified", yaxis2=right, margin=margin)
    page.add("h3", "Open files, connections among them")
    lines = zip(watched.items(), itertools.cycle(LINES))
    files = [_line(_whose(name), one.at_s, one.open_files, colour) for (name, one), colour in lines]
    page.plot(files, 230, "open files", hovermode="x unified")


LINES = (RED, VIOLET, TEAL, BROWN)  # the hub's, and those of whatever else is watched


def _cpu_line(name: str, seen: HubTimeline, colour: str) -> Trace:
    share = [round(100 * (one or 0.0)) for one in seen.cpu_share]
    title = "hub's CPU" if name == "hub" else f"CPU of {name}"
    line = _line(title, [seen.at_s[0], *seen.cpu_at_s], [*share[:1], *share], colour, shape="vh", width=1)
    return line | {"yaxis": "y2"}


def milliseconds(seconds: Moments) -> list[float | None]:
    """The same durations in milliseconds; None stays None."""
    return [None if one is None else round(one * 1000, 1) for one in seconds]


def _failed_marks(title: str, seen: OperationTimeline) -> list[Trace]:
    """Marks on the axis where something failed."""
    failed = [(at, number) for at, number in zip(seen.at_s, seen.failed) if number]
    marks = _line(f"{title} failed", [at for at, _ in failed], [0] * len(failed), RED)
    text = [f"{number} failed" for _, number in failed]
    return [marks | {"mode": "markers", "cliponaxis": False, "text": text}] if failed else []


def _plot_latency(page: Page, results: Results) -> None:
    """How long people waited, or how long the requests of the load took, over time."""
    felt = (
        ("server_ready", "at_work")
        if results.command == STRESS
        else results.options.get("mix") or DEFAULT_MIX
    )
    traces: list[Trace] = []
    for name, colour in zip(felt, itertools.cycle((BLUE, AMBER, *LINES[1:]))):
        if seen := results.timeline.operations.get(name):
            title = title_of(name, results.own_servers)
            for label, values, dash in (("p50", seen.p50_s, "dot"), ("p95", seen.p95_s, "solid")):
                line = _line(f"{title} {label}", seen.at_s, milliseconds(values), colour, dash=dash)
                traces.append(line | {"mode": "lines+markers"})
            traces += _failed_marks(title, seen)
    if traces:
        page.add("h3", "Over time, by when each was due")
        page.plot(traces, 260, "ms")


# ==== Files ==========================================================================================================


def render_results(results: Results, baseline: Json | None = None) -> str:
    """The results as JSON; the timeline, which nobody reads by eye, on one line."""
    data = as_json(results)
    timeline = json.dumps(data.pop("timeline"))
    return f'{json.dumps(data, indent=2)[:-2]},\n  "timeline": {timeline}\n}}\n'


def write_files(plan: Plan, results: Results) -> Results:
    """Write the files that were asked for; the results, which have failed when one could not be written (any more)."""
    files = (("--report", plan.report, render_report), ("--results", plan.results, render_results))
    for flag, path, render in files:
        try:
            if path:
                write_whole(path, render(results, plan.baseline))
        except OSError as error:
            sentence = f"{flag} {path} could not be written: {_in_words(error)}"
            LOG.error(sentence)
            code = results.exit_code or int(ExitCode.FAILED)
            results = dataclasses.replace(results, warnings=[*results.warnings, sentence], exit_code=code)
    return results


def write_whole(path: str, text: str) -> None:
    """Write a file, or the one that a link points to, whole or not at all.

    Standard output, pipes and devices are written to as they are.
    """
    if os.path.exists(path) and not os.path.isfile(path) or _is_standard_output(path):
        with open(os.dup(1) if _is_standard_output(path) else path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    target = os.path.realpath(path)
    beside = f"{target}.{os.getpid()}.tmp"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _is_standard_output(path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


# ==== The seeds' functions: thin wrappers, for use as a library ======================================================


def find_existing_stress_test_users(
    endpoint: str, session: HubSession, *, run: str | None = None
) -> list[Json]:
    """The models of all users that this tool's naming made (of one run, if named), but admins. Raises `HubRefused`."""
    return find_users(Hub(endpoint, session), Recorder(), run)


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
    """The names of exactly `count` new users, in batches of at most `batch_size`, numbered after `existing_users`.

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
    until_s = session.clock() + SERVER_LIFECYCLE_TIMEOUT
    reply = Hub(endpoint, session).start(username, profile, until_s)
    if reply.status not in (201, 202):
        LOG.error("The server of %s did not start: %s", username, reply)
    return reply.status in (201, 202)


@timeit
def start_servers(
    users: Sequence[Sequence[str]],
    endpoint: str,
    session: HubSession,
    profile: str | Json | None = None,
    *,
    timeout_s: float = SERVER_LIFECYCLE_TIMEOUT,
    fail_fast: int = 0,
    rate_per_s: float | Schedule | None = None,
) -> dict[str, Event]:
    """The `server_ready` event of each user, for batches of users; its `reason` is None when the server became ready.

    As many start at one time as the largest batch has (closed model), or, with a rate, one every 1 / rate seconds,
    however slowly the hub answers (open model). Users whose start was not begun (after `fail_fast` failures in a row,
    where True is 1, a stop, or three failures before any server was ready) are absent.
    """
    names = [name for batch in users for name in batch]
    largest = max((len(batch) for batch in users), default=1)
    how: Json = {"server_timeout_s": timeout_s, "fail_fast": fail_fast, "rate_per_s": rate_per_s}
    site = Site(
        Hub(endpoint, session),
        Plan(count=len(names), batch_size=largest, profile=profile, **how),
        new_recorder(),
    )
    try:
        send_people(names, site)
    except CutShort as error:
        LOG.error("%s", error)
    return {name: row["server_ready"] for name, row in site.record.people.items() if "server_ready" in row}


def wait_for_servers_to_start(
    users: Sequence[Sequence[str]],
    endpoint: str,
    session: HubSession,
    *,
    timeout_s: float = SERVER_LIFECYCLE_TIMEOUT,
) -> dict[str, bool]:
    """Whether each server, already asked for, was ready within `timeout_s`."""
    hub, until_s = Hub(endpoint, session), session.clock() + timeout_s
    names = [name for batch in users for name in batch]
    concurrency = max((len(batch) for batch in users), default=1)
    ends = _for_each(lambda name: await_ready(name, hub, until_s), names, concurrency)
    return {name: end.ready_at_s is not None for name, end in ends.items()}


def stop_server(username: str, endpoint: str, session: HubSession, wait: bool = False) -> bool:
    """Whether the hub has stopped this server, or (without `wait`) has at least begun to."""
    state = state_after_stop(Hub(endpoint, session).stop(username).hub_status)
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
    hub, until_s = Hub(endpoint, session), session.clock() + SERVER_LIFECYCLE_TIMEOUT
    pause_s = 0.1
    while session.clock() < until_s:
        if hub.state(username) in (ServerState.STOPPED, ServerState.GONE):
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
    stopped.update(_for_each(lambda name: wait_for_server_to_stop(name, endpoint, session), asked, 10))


@timeit
def delete_users_after_stopping_servers(
    stopped: Mapping[str, bool], endpoint: str, session: HubSession
) -> bool:
    """Whether every user is gone; those whose server has not stopped are left alone."""
    hub, names = Hub(endpoint, session), [name for name, has_stopped in stopped.items() if has_stopped]
    states = _for_each(lambda name: state_after_delete(hub.delete(name).hub_status), names, 10)
    return all(states.get(name) is ServerState.GONE for name in stopped)


@timeit
def delete_users(usernames: Sequence[str], endpoint: str, session: HubSession, batch_size: int = 10) -> bool:
    """Whether every one of these users is gone, their servers stopped first."""
    states, ours = dict.fromkeys(usernames, ServerState.READY), set(usernames).__contains__
    return not remove_users(states, ours, Hub(endpoint, session), Recorder(), batch_size).left


def _for_each(work: Callable[[str], R], names: Sequence[str], concurrency: int) -> dict[str, R]:
    with ThreadPoolExecutor(concurrency) as pool:
        return dict(zip(names, pool.map(work, names)))


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
    """Make `count` users, start their servers, measure, and remove them all; the results, also of what failed.

    With `dry_run` nothing is sent, and the result is the plan. `options` are further fields of `Plan`. Raises
    `UsageError` or `SetupError`; nothing has been changed then.
    """
    token = Secret(token)
    where: Json = {"token": token, "endpoint": endpoint, "dry_run": dry_run}
    plan = Plan(STRESS, count=count, batch_size=batch_size, keep=keep, profile=profile, **where, **options)
    return _results_as_json(plan)


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

    With `dry_run` nothing is sent, and the result is the plan. `options` are further fields of `Plan`. Raises
    `UsageError` or `SetupError`; nothing has been changed then.
    """
    token = Secret(token)
    where: Json = {"token": token, "endpoint": endpoint, "dry_run": dry_run}
    return _results_as_json(Plan(ACTIVITY, count=count, workers=workers, keep=keep, **where, **options))


def purge_users(token: str, endpoint: str, dry_run: bool = False, **options: Any) -> Json:
    """Remove every user that this tool's naming made (of one `run`, if named), except admins; the results.

    Finding nothing is success. With `dry_run` nothing is sent, and the result is the plan. `options` are further
    fields of `Plan`. Raises `UsageError` or `SetupError`.
    """
    token = Secret(token)
    return _results_as_json(Plan(PURGE, token=token, endpoint=endpoint, dry_run=dry_run, **options))


def _results_as_json(plan: Plan) -> Json:
    """The results of a run, or, with `dry_run`, the plan. Raises `UsageError` for what the command line refuses."""
    validate(argparse.Namespace(**vars(plan)))
    if plan.dry_run:
        plan = seeded(plan)
        return {
            "command": plan.command,
            "options": plan.options(),
            "plan": list(map(list, plan_section(plan).rows)),
        }
    found: Json = as_json(carry_out(plan))
    return found


# ==== An event as a file =============================================================================================
#
# Its keys are the command line's options: those of a group below [[people]], all others above.


WHO_COMES = ("count", "within_s", "rate_per_s")  # which the groups say
OF_A_SEARCH = ("find_capacity", "max_servers", "duration_s")
ABOVE_GROUPS = {
    row.flag[2:]: name
    for name, row in OPTIONS.items()
    if STRESS in row.on
    and name not in (*WHO_COMES, *OF_A_SEARCH, "event", "token")  # which has no place in a file
}


def event_of(file: EventFile, given: Json) -> Json:
    """The fields of the plan that an event's file sets, groups included; what is `given` wins. Raises `UsageError`."""
    for name in given.keys() & WHO_COMES:
        raise UsageError(f"the groups of --event say who comes and when: leave out {OPTIONS[name].flag}")
    fields = _fields_in(file.above, file, 0) | given
    groups = tuple(_group_in(table, file, n, Plan(**fields)) for n, table in enumerate(file.people, 1))
    (name, times), *_ = collections.Counter(group.group for group in groups).most_common(1)
    if times > 1:
        raise UsageError(f"--event {file.path}: there are {times} groups called {name}")
    return fields | {"event": groups, "count": sum(group.count for group in groups)}


def _group_in(table: Json, file: EventFile, n: int, base: Plan) -> Plan:
    """The plan of the n-th group, whose keys go before those of all."""
    fields = _fields_in(table, file, n)
    try:
        fields |= _by_stages(fields | {"command": STRESS})
    except UsageError as error:
        raise _refused(file, n, "count", str(error)) from None
    needed = {"a name": {"group"}, "a count": {"count"}, "within or rate": {"within_s", "rate_per_s"}}
    for what in (what for what, names in needed.items() if not names & fields.keys()):
        raise _refused(file, n, "", f"a group needs {what}")
    return dataclasses.replace(base, **fields)


def _fields_in(table: Json, file: EventFile, n: int) -> Json:
    """The fields of the plan that a table sets: that of the n-th group, or (0) what is above all."""
    fields: Json = {}
    for key, value in table.items():
        try:
            name = _field_of(key, in_group=n > 0)
            fields[name] = value_in_toml(value, OPTIONS[name], file.path)
        except argparse.ArgumentTypeError as error:
            raise _refused(file, n, key, f"{key}: {error}") from None
    return fields


def _field_of(key: str, in_group: bool) -> str:
    """The field of the plan that a key sets; raises `argparse.ArgumentTypeError`."""
    known, elsewhere = (GROUP_OPTIONS, ABOVE_GROUPS) if in_group else (ABOVE_GROUPS, GROUP_OPTIONS)
    if key in known:
        return known[key]
    if key in elsewhere:
        raise argparse.ArgumentTypeError(
            f"this key stands {'above the groups' if in_group else 'in a group'}"
        )
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise argparse.ArgumentTypeError(f"there is no such key here: {hint}")


NUMBERS = (whole_number, positive_number, rate_of, duration)


def value_in_toml(value: Any, row: Option, file: str) -> Any:
    """The value of an option, from a file; raises `argparse.ArgumentTypeError`. Paths begin where the file is."""
    if row.repeatable:
        once = dataclasses.replace(row, repeatable=False)
        return tuple(
            value_in_toml(each, once, file) for each in (value if isinstance(value, list) else [value])
        )
    if not row.kind or (row.const and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"expected true or false, not {value!r}")
        return value
    if type(value) in (int, float) and row.kind in NUMBERS:
        value = str(value)
    if isinstance(value, dict) and row.kind is profile_value:
        value = json.dumps(value)
    if not isinstance(value, str):
        raise argparse.ArgumentTypeError(f"expected {METAVARS[row.kind]}, not {value!r}")
    is_path = "FILE" in METAVARS[row.kind]
    return row.kind(os.path.join(os.path.dirname(file), value) if is_path else value)


def _refused(file: EventFile, n: int, key: str, sentence: str) -> UsageError:
    """What is said of a key of the n-th group (0: above all), or of the whole group, with its line."""
    seen = 0
    for number, line in enumerate(file.text.splitlines(), 1):
        header = re.match(r"\s*\[\[\s*people\s*\]\]", line)
        seen += bool(header)
        if seen == n and (
            re.match(rf"[\s\[]*[\"']?{re.escape(key)}[\"']?\s*[\]=.]", line) if key else header
        ):
            return UsageError(f"--event {file.path}, line {number}: {sentence}")
    return UsageError(f"--event {file.path}: {sentence}")


# ==== Command line ===================================================================================================

COMMAND_HELP = {
    STRESS: "make users, start their servers, measure, remove them",
    ACTIVITY: "send the activity reports of running servers, measure",
    PURGE: "remove the users that earlier runs left behind",
}


class _Parser(argparse.ArgumentParser):
    """Refuses bad usage in one sentence."""

    def error(self, message: str) -> Any:
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, which sets only what is given.

    Options of all commands stand before or after the command.
    """
    only_given: Json = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="hub-stress-test", description=__doc__, formatter_class=raw, **only_given)
    parser.add_argument("--version", action="version", version=f"hub-stress-test {__version__}")
    for name, row in OPTIONS.items():
        if row.on == COMMANDS and name != "cleanup_timeout_s":
            row.add_to(parser, dest=name)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command, help=COMMAND_HELP[command], **only_given)
        for name, row in OPTIONS.items():
            if command in row.on:
                row.add_to(sub, dest=f"{name}_too" if row.repeatable else name)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, completed from the environment. Raises `UsageError`; --help and --version end the program."""
    words = list(sys.argv[1:] if argv is None else argv)
    for at, (word, following) in enumerate(zip(words, words[1:])):
        if word == "--log-to-file" and following in COMMANDS:  # a command, not the optional FILE
            words[at : at + 2] = [following, word]
            break
    lists = [name for name, row in OPTIONS.items() if row.repeatable]
    given = vars(build_parser().parse_args(words, argparse.Namespace(**{name: [] for name in lists})))
    for name in lists:
        given[name] = (*given[name], *given.pop(f"{name}_too", ()))
    given = {name: value for name, value in given.items() if value != ()}
    _check_search(given)
    given |= event_of(given.pop("event"), given) if "event" in given else _by_stages(given)
    args = argparse.Namespace(**vars(Plan()) | given)
    args.endpoint = args.endpoint or endpoint_from_environment()
    args.token = args.token or _from_environment(token_text, "JUPYTERHUB_API_TOKEN")
    args.visit_token = _from_environment(token_text, "JUPYTERHUB_VISIT_TOKEN")
    return args


NOT_IN_A_SEARCH = ("count", "within_s", "event", "hold_s", "stay_s", "keep", "check_proxy")


def _check_search(given: Json) -> None:
    """Nothing, if a search for capacity is not told what it finds out or decides; else raises `UsageError`."""
    if "find_capacity" not in given:
        return
    if isinstance(given.get("rate_per_s"), Schedule):
        raise UsageError("--find-capacity begins with one rate: --rate R, without stages")
    for name in NOT_IN_A_SEARCH if given["command"] == STRESS else ():
        if name in given:
            raise UsageError(
                f"--find-capacity says who comes, and when they leave: leave out {OPTIONS[name].flag}"
            )


def _by_stages(given: Json) -> Json:
    """What the stages of a rate decide: for how long requests are sent, or how many people come."""
    stages = given.get("rate_per_s")
    if not isinstance(stages, Schedule):
        return {}
    name, value = ("count", stages.count) if given["command"] == STRESS else ("duration_s", stages.lasts_s)
    if name in given:
        raise UsageError(
            f"the stages of --rate decide the {name.partition('_')[0]}: leave out {OPTIONS[name].flag}"
        )
    return {name: value}


def endpoint_from_environment() -> str | None:
    """The hub's API as the environment has it. Raises `UsageError`."""
    return _from_environment(endpoint_url, "JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_URL")


def _from_environment(convert: Callable[[str], T], *variables: str) -> T | None:
    for variable in variables:
        if text := os.environ.get(variable):
            try:
                return convert(text)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"environment variable {variable}: {error}") from None
    return None


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that a command line asks for."""
    fields = {field.name for field in dataclasses.fields(Plan)}
    return Plan(**{name: value for name, value in vars(args).items() if name in fields})


def validate(args: argparse.Namespace, *, paths: bool = True) -> None:
    """Nothing, if the arguments can be used together; else raises `UsageError` with a sentence.

    `paths` tells whether there will be results, so that conditions can be on any of their numbers.
    """
    plan = plan_of(args)
    for name in ("count", "batch_size", "workers"):
        if (value := getattr(plan, name)) < 1:
            raise UsageError(f"{OPTIONS[name].flag} {value}: expected a whole number of at least 1")
    if files := [OPTIONS[name].flag for name in WRITTEN_BY_A_RUN if plan.dry_run and getattr(plan, name)]:
        raise UsageError(f"--dry-run measures nothing that {files[0]} could show: give one of them")
    _validate_rehearsal(plan, Plan())
    for group in plan.event:
        try:
            _validate_rehearsal(group, dataclasses.replace(plan, group=group.group))
        except UsageError as error:
            raise UsageError(f"--event, group {group.group}: {error}") from None
    if plan.processes > plan.workers:
        raise UsageError(
            f"--processes {plan.processes} is more than --workers {plan.workers}: each needs a thread"
        )
    load_operations(plan.operations)
    if unknown := sorted((plan.mix or {}).keys() - OPERATIONS.keys()):
        raise UsageError(
            f"--mix: there is no operation {unknown[0]!r}; there are {', '.join(sorted(OPERATIONS))}"
        )
    _validate_conditions(plan, paths and not plan.find_capacity)
    _validate_files(plan)
    for flag, given, module, package in (
        ("--report", plan.report, "plotly", "plotly"),
        ("--work", any(group.work for group in plan.groups), "websocket", "websocket-client"),
        ("--metrics-port", plan.metrics_port, "prometheus_client", "prometheus-client"),
    ):
        if given and not optional(module):
            raise UsageError(f"{flag} needs {package}, which is not installed: pip install {package}")
    missing = {
        "no endpoint: set JUPYTERHUB_ENDPOINT=https://YOUR-HUB/hub/api, or give --endpoint": args.endpoint,
        "no token: set JUPYTERHUB_API_TOKEN, or give --token": args.token,
    }
    if None in missing.values() and not plan.dry_run:
        raise UsageError("; and ".join(sentence for sentence, value in missing.items() if value is None))


WRITTEN_BY_A_RUN = ("results", "report", "samples", "metrics_port")


def _validate_files(plan: Plan) -> None:
    """Nothing, if the files that are asked for can be written; else raises `UsageError`."""
    for name, can_be_written in (
        ("results", writable_file),
        ("report", writable_file),
        ("samples", samples_file),
    ):
        try:
            if path := getattr(plan, name):
                can_be_written(path)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{OPTIONS[name].flag}: {error}") from None


def _validate_conditions(plan: Plan, paths: bool) -> None:
    """Nothing, if each condition can be judged; else raises `UsageError`."""
    for one in plan.fail_if:
        if nearest := instead_of(one.metric, paths):
            of = "in the results" if paths else "among failed, failed_rate, throttled and OPERATION.STAT"
            raise UsageError(f"--fail-if {one.text!r}: no {one.metric!r} {of}; nearest is {nearest}")
        for name in set(re.findall(r"\[([^]]*)\]", one.metric)) - {group.group for group in plan.event}:
            raise UsageError(f"--fail-if {one.text!r}: there is no group {name!r}")
        if one.unit not in ("", "x", *FITTING.get(unit_of(one.metric), ())):
            raise UsageError(f"--fail-if {one.text!r}: the unit {one.unit!r} does not fit {one.metric}")
        if one.unit == "x" and not plan.baseline:
            raise UsageError(f"--fail-if {one.text!r}: a multiple needs a --baseline")


def _validate_rehearsal(plan: Plan, usual: Plan) -> None:
    """Nothing, if what differs from what is usual can be used together; else raises `UsageError`."""
    given = [name for name in OPTIONS if getattr(plan, name) != getattr(usual, name)]
    together = {*given, *["keep"] * plan.keep}  # which holds for all groups
    for one, other, why_not in (
        ("stay_s", "hold_s", "says when each leaves, and --hold when all do"),
        ("stay_s", "keep", "lets each leave, and --keep nobody"),
        ("check_proxy", "keep", "lets a server end, and --keep keeps all"),
        ("within_s", "rate_per_s", "and --rate both say when people come"),
    ):
        if {one, other} <= together:
            raise UsageError(f"{OPTIONS[one].flag} {why_not}: give one of them")
    for names, there, others in (
        (("notebook", "think_s", "cell_timeout_s"), any(group.work for group in plan.groups), "--work"),
        (("visit_timeout_s", "public_url"), plan.opens, "--visit, --page or --work"),
        (("max_servers", "duration_s"), plan.find_capacity or plan.command == ACTIVITY, "--find-capacity"),
        (("seed",), any(group.within_s for group in plan.groups), "--within"),
    ):
        for name in names:
            if name in given and not there:
                raise UsageError(f"{OPTIONS[name].flag} has a meaning only with {others}")
    first = (fastest(plan.rate_per_s) or CAPACITY_FIRST_PEOPLE_PER_S) * (
        plan.duration_s or CAPACITY_PEOPLE_STEP_S
    )
    if plan.max_servers and round(first) > plan.max_servers:
        raise UsageError(
            f"--max-servers {plan.max_servers}: the first step has {first:.0f} people; lower --rate"
        )


class _Redacting(logging.Formatter):
    """Log lines, tracebacks included, from which the token is taken out."""

    def __init__(self, *tokens: str | None) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self._tokens = [token for token in tokens if token]

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for token in self._tokens:
            line = line.replace(token, "***")
        return line


def setup_logging(
    verbose: bool = False, log_to_file: bool | str = False, args: argparse.Namespace | None = None
) -> None:
    """Log to standard error, or to a file, and say where. Raises `UsageError` when that file cannot be used.

    A file that is there already is added to if it is a log of ours, and refused otherwise.
    """
    tokens = (getattr(args, "token", None), getattr(args, "visit_token", None))
    handler: logging.Handler = logging.StreamHandler()
    if log_to_file:
        path = _log_path(log_to_file)
        handler = logging.FileHandler(path, encoding="utf-8")
        sys.stderr.write(f"Logging to {path}\n")
    handler.setFormatter(_Redacting(*tokens))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if log_to_file and args is not None:
        LOG.info("Started with %s", plan_of(args).options())
    sys.excepthook = _log_uncaught


def _log_path(log_to_file: bool | str) -> str:
    """The path of a file to which a log may be added, its first line written."""
    import tempfile

    try:
        if log_to_file is True:
            stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
            path = f"{tempfile.gettempdir()}/hub-stress-test-{stamp}.log"
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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`, whose summary is on standard output."""
    results: Results | None = None
    try:
        args = parse_args(argv)
        validate(args)
        setup_logging(args.verbose, args.log_to_file, args)
        plan = plan_of(args)
        if plan.dry_run:
            show(functools.partial(render_page, DRY_RUN, [plan_section(seeded(plan))]))
            return int(ExitCode.OK)
        results = carry_out(plan)
        show(functools.partial(render_summary, results, plan.baseline))
    except HubStressError as error:
        sys.stderr.write(f"hub-stress-test: {error}\n")
        return int(error.exit_code)
    except KeyboardInterrupt as interrupt:
        if results is None:  # else everything has been removed
            sys.stderr.write("hub-stress-test: Interrupted; nothing was changed.\n")
            return 128 + next(iter(interrupt.args), signal.SIGINT)
    return results.exit_code


def show(render: Callable[..., str]) -> None:
    """Print a page, as far as somebody reads it: `head` closes standard output early."""
    if not sys.stdout:  # it was closed from the start
        return
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    try:
        print(render(colour=colour), flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is left in the buffer goes nowhere


def program() -> None:
    """The command line as a program, which ends when `main` does, whatever its threads still wait for."""
    code = main()
    logging.shutdown()
    os._exit(code)  # leaving Python would wait for threads, and so for a request that nobody answers


# ==== Locust users: the same load from many machines =================================================================
#
# Locust gives every process a greenlet for each of its users, and patches sockets, sleeps and locks so that they wait
# for each other. What is above works there as it is; here is only what stands between it and Locust.


def locust_is_loading() -> bool:
    """Whether Locust is loading this file, or one that imports it: only then are there user classes."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_globals.get("__name__") != "locust.util.load_locustfile":
        frame = frame.f_back
    return frame is not None


def locust_results(entries: Iterable[Any], load: Collection[str], throttled: int) -> Json:
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
    failed = sum(operations[name]["failed"] for name in operations.keys() & {*load, *PERSONAL})
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

    class FastSession:
        """What operations need of a session, over Locust's fast client, which reports each request as `operation`."""

        def __init__(self, user: FastHttpUser, token: str) -> None:
            self.operation: str | None = None
            self._client = user.client
            self._headers = {"Authorization": f"token {token}", "Accept-Encoding": "identity"}

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
        """What the users of one process share in one test: the hub, the names, and who has to be deleted at its end."""

        def __init__(self, environment: Any, worker: int) -> None:
            plan = dataclasses.replace(locust_plan(environment), count=0)  # which Locust knows
            self.run = f"{plan.run}-{worker}"
            self.session = get_session(plan.token or "", pool_maxsize=1000)
            hub = check_hub(plan.endpoint or "", self.session, plan.command, plan.own_servers)
            check_visits(hub, plan)
            self._fire, self._runner = environment.events.request.fire, environment.runner
            self.site = Site(hub, plan, Recorder(self._report))
            listed = list(list_users(hub, Recorder()))
            taken = [user["name"] for user in test_users(listed, self.run)]
            check_server_names(hub, dataclasses.replace(plan, run=self.run, count=MANY), taken)
            self.indexes = itertools.count(first_free_index(taken, self.run))
            self.claims, self.throttled, self.cut_short = self.site.claims, 0, False
            self.claims.known = {user["name"] for user in listed}
            self._spare: list[str] = []
            self._making, self._cleaning = threading.Lock(), threading.Lock()
            self._cleaned: CleanUp | None = None
            self._cutting = gevent.spawn(self._cut_streams)  # last, since what is above may fail

        def _report(self, event: Event) -> None:
            """Hand an event to Locust, in its milliseconds."""
            self.throttled += event.throttled if event.step == "server_ready" else 0
            self._fire(
                request_type="hub",
                name=event.step,
                response_time=event.latency_s * 1000,
                response_length=0,
                exception=HubStressError(event.reason.text) if event.reason else None,
                context={},
            )

        def _cut_streams(self) -> None:
            while self.session.pause(0.1):
                self.session.cut_streams()

        def new_user(self, batch: int) -> str:
            """The name of a user for this caller alone, made with the next ones in one batch; raises `HubRefused`."""
            with self._making:
                while not self._spare:
                    batch = max(1, min(batch, self._runner.target_user_count - len(self.claims.confirmed)))
                    wanted = [username(index, self.run) for index in itertools.islice(self.indexes, batch)]
                    self._spare = make_batch(wanted, self.site.hub, self.site.record, self.claims)
                return self._spare.pop(0)

        def clean_up(self) -> Json:
            """Delete whom this process has made, once; what to tell the master."""
            states = self.site.states
            left_already = {name for name, state in states.items() if state is ServerState.GONE}
            with self._cleaning, _second_signal_leaves(self):
                if self._cleaned is None:
                    self._cutting.kill()
                    self.site.public.close_kernels()
                    ours = set(self.claims.ours) - left_already
                    hub = dataclasses.replace(self.site.hub, session=self.session.for_cleaning_up())
                    hub.session.pause(LATE_ACT_S if self.claims.unconfirmed else 0)
                    thought = {name: states.get(name, ServerState.STOPPED) for name in ours}
                    thought |= dict.fromkeys(ours & self.claims.unconfirmed.keys(), ServerState.UNKNOWN)
                    self._cleaned = remove_users(
                        thought, ours.__contains__, hub, Recorder(), 10, removal=self.site.removal
                    )
            deleted = self._cleaned.deleted + len(left_already)
            told: Json = {"deleted": deleted, "left": list(self._cleaned.left), "throttled": self.throttled}
            told["starting"] = len(self.site.removal.interrupted)
            return told | {"run": self.run, "cut_short": self.cut_short}

    @contextlib.contextmanager
    def _second_signal_leaves(shared: LocustSite) -> Iterator[None]:
        """While a test cleans up, another signal leaves at once, saying how to remove the rest."""

        def leave(number: int, _: FrameType | None) -> None:
            own = shared.site.plan.own_servers
            leave_at_once(
                number, counted(len(shared.claims.ours), thing(own)), purge_command(shared.run, own)
            )

        before = {number: signal.signal(number, leave) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def locust_plan(environment: Any) -> Plan:
        """The plan of a test, from the command line or the web form; raises `UsageError`."""
        options, given = vars(environment.parsed_options), Json()
        for name, row in LOCUST_OPTIONS.items():
            if name in ("endpoint", "token"):
                continue
            value = options[row.locust_flag[2:].replace("-", "_")]
            try:
                values = [row.kind(str(one)) for one in (value or ()) if row.kind] if row.repeatable else ()
                if row.repeatable:
                    given[name] = tuple(values)
                elif value:
                    given[name] = row.kind(str(value)) if row.kind else True
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"argument {row.locust_flag}: {error}") from None
        if relative := next((one for one in given.get("fail_if", ()) if one.unit == "x"), None):
            raise UsageError(f"--hub-fail-if {relative.text!r}: under Locust there is no baseline")
        given["fail_if"] = given.get("fail_if") or (FAILED,)  # nothing here sees what is left afterwards
        people = any(issubclass(kind, Person) for kind in environment.user_classes)
        if given.get("own_servers") and not all(
            issubclass(kind, Person) for kind in environment.user_classes
        ):
            raise UsageError(
                "--hub-own-servers is for a Person alone: name that class at the end of the command line"
            )
        endpoint = environment.host and endpoint_url(environment.host)
        given |= {"token": environment.hub_token, "visit_token": environment.hub_visit_token}
        plan = Plan(STRESS if people else ACTIVITY, endpoint=endpoint, **given)
        try:
            validate(argparse.Namespace(**vars(plan)), paths=False)
        except UsageError as error:
            raise UsageError(re.sub("--(?=[a-z])", "--hub-", str(error))) from None
        return plan

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
            shared: LocustSite | None = getattr(self.environment, "hub_site", None)
            if shared is None:  # its check has failed, and said why
                raise StopUser
            self.shared, self.site, self.plan = shared, shared.site, shared.site.plan

        def new_user(self) -> str:
            try:
                return self.shared.new_user(self.batch)
            except CutShort as error:
                SAY.error("%s", error)
                self.shared.cut_short = True
                raise StopUser from None

    class RunningServer(HubUser):
        """Sends what a running server sends: a report every 300 s, or --hub-scale times as often; or the --hub-mix."""

        batch = 10

        def on_start(self) -> None:
            super().on_start()
            self.username, self.session = self.new_user(), FastSession(self, self.plan.token or "")
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
                now_s, reason = time.monotonic(), Reason(Kind.BROKEN, f"{type(error).__name__}: {error}")
                self.site.record.add(Event(name, self.username, now_s, now_s, now_s, reason))

    class Person(HubUser):
        """Logs in, waits until their server is ready, opens it, works, stays for --hub-stay, stops it and leaves."""

        wait_time = constant(0)

        def on_start(self) -> None:
            super().on_start()
            self._visits = 0

        @task
        def visit(self) -> None:
            if self._visits == self.plan.visits or self.shared.cut_short:
                gevent.sleep(
                    3600
                )  # has left, but stays in Locust's count, which it would otherwise fill up again
                return
            self._visits += 1
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
        options.hub_token = None  # Locust hands options on to workers and pages
        environment.hub_token = Secret(token) if token else None
        environment.hub_visit_token = _from_environment(token_text, "JUPYTERHUB_VISIT_TOKEN")
        environment.host = environment.host or options.hub_endpoint or endpoint_from_environment()
        environment.hub_reports, environment.hub_failed = {}, False
        for kind in environment.user_classes:
            kind.host = environment.host or ""
        if isinstance(runner, WorkerRunner):
            runner.register_message("hub-clean-up", lambda **_: runner.stop(), concurrent=True)
        else:
            if isinstance(runner, MasterRunner):
                runner.register_message("hub-cleaned-up", _note_report)
            if options.headless:
                try:
                    _check(environment)
                except HubStressError as error:
                    sys.stderr.write(f"hub-stress-test: {error}\n")
                    raise SystemExit(int(error.exit_code)) from None

    def _check(environment: Any) -> None:
        """Whether the hub accepts the token for what the user classes will do; else raises `HubStressError`."""
        plan = locust_plan(environment)
        session = get_session(plan.token or "")
        check_visits(check_hub(plan.endpoint or "", session, plan.command, plan.own_servers), plan)

    def _start(environment: Any, **_: Any) -> None:
        environment.hub_site, environment.hub_reports, environment.hub_failed = None, {}, False
        runner = environment.runner
        try:
            if isinstance(runner, MasterRunner):
                _check(environment)
            else:
                environment.hub_site = shared = LocustSite(environment, getattr(runner, "worker_index", 0))
                what = things(shared.site.plan.own_servers).capitalize()
                SAY.info("%s of this process are called %s", what, username(0, shared.run)[:-1] + "<n>")
        except HubStressError as error:
            SAY.error("%s", error)
            environment.hub_failed = True
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
        shared: LocustSite | None = getattr(environment, "hub_site", None)
        nothing = {"deleted": 0, "left": [], "throttled": 0, "starting": 0, "run": None, "cut_short": True}
        told = shared.clean_up() if shared else nothing if environment.hub_failed else {}
        if isinstance(runner, WorkerRunner):
            runner.send_message("hub-cleaned-up", told)
        elif shared:
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
        left, own = (
            [name for told in reports for name in told["left"]],
            environment.parsed_options.hub_own_servers,
        )
        for told in reports:
            if told["left"]:
                SAY.error("STILL THERE: %s; %s", names_text(told["left"]), purge_command(told["run"], own))
        if not environment.process_exit_code:
            environment.process_exit_code = _judge(environment, reports, left)

    def _judge(environment: Any, reports: Sequence[Mapping[str, Any]], left: list[str]) -> int:
        runner: Any = environment.runner
        plan = locust_plan(environment)
        lost = (
            [client.id for client in runner.clients.all if client.state == STATE_MISSING]
            if hasattr(runner, "clients")
            else []
        )
        for client in lost:
            run = f"{plan.run}-{runner.get_worker_index(client)}"
            remedy = purge_command(run, plan.own_servers)
            SAY.error("A worker is gone, and what it made may still be there: %s", remedy)
        done = counted(sum(told["deleted"] for told in reports), thing(plan.own_servers))
        SAY.info("%s %s, %s left", done, "removed" if plan.own_servers else "deleted", len(left) or "none")
        if starting := sum(told["starting"] for told in reports):
            SAY.warning("%s", still_starting(starting))
        throttled = sum(told["throttled"] for told in reports)
        load = {*(plan.mix or DEFAULT_MIX), "server_ready"}
        found = locust_results(runner.stats.entries.values(), load, throttled)
        judged = [one.judge(found, None) for one in plan.fail_if]
        for one in judged:
            SAY.info("%s: %s, it is %s", one.condition, "MET" if one.held else "not met", _value_text(one))
        cut_short = any(told["cut_short"] for told in reports)
        return int(exit_code(bool(left or lost), None, cut_short, any(one.held for one in judged)))

    hooks: Any = events
    hooks.init_command_line_parser.add_listener(_add_options)
    hooks.init.add_listener(_begin)
    hooks.test_start.add_listener(_start)
    hooks.test_stopping.add_listener(_have_workers_clean_up)
    hooks.test_stop.add_listener(_clean_up)
    hooks.quitting.add_listener(_end)


if __name__ == "__main__":
    program()
