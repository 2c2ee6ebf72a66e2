"""How close a whole run of the tool comes to what the hub itself allows.

    python tests/bench/whole_run.py

runs, in alternating order and each on a fresh local hub, the tool as its user runs it and a bare client that sends only
the requests without which no server starts (bare_client.py), at the same concurrency; once on a hub that lets a start
wait for its server (slow_spawn_timeout 10) and once on one that answers at once and is followed (0). Wall time is from
spawning the process to its end; requests and CPU seconds are the hub's own count. Nothing is asserted about speed; the
exit code is 1 when a run failed, left users, removed others, or counted its requests otherwise than the hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localhub import LocalHub  # noqa: E402

SLOW_SPAWN_TIMEOUTS_S = (10.0, 0.0)
PATIENCE_S = 600.0


class RunFailed(Exception):
    """A run that cannot be compared, and why."""


@dataclasses.dataclass(frozen=True)
class Process:
    """What a client's process cost, and what it said."""

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    stdout: str
    stderr: str
    results: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a client says of its own run."""

    requests: int
    pings: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run, as the machine, the hub and the client saw it."""

    process: Process
    hub_requests: int
    hub_cpu_s: float
    report: Report


def tool_report(process: Process) -> Report:
    """From the tool's results; readings of the metrics page apart."""
    found = json.loads(process.results)
    metrics = len(found["timeline"]["hub"]["at_s"])  # readings of the hub's metrics page
    return Report(found["http"]["requests"] - metrics, found["operations"]["ping"]["count"])


def bare_report(process: Process) -> Report:
    said = json.loads(process.stdout)
    return Report(said["requests"], 0)


def run_client(command: Sequence[str], environment: dict[str, str]) -> Process:
    """Run a command to its end. Its peak memory is at least that of this process, which therefore stays small."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began_s = time.monotonic()
        client = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | environment)
        limit = threading.Timer(PATIENCE_S, client.kill)
        limit.start()
        _, status, usage = os.wait4(client.pid, 0)
        wall_s = time.monotonic() - began_s
        limit.cancel()
        client.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        cpu_s, peak_mb = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        return Process(client.returncode, wall_s, cpu_s, peak_mb, out.read(), err.read())


def hub_counts(hub: LocalHub) -> tuple[int, float]:
    """Requests served, readings of this page apart, and CPU seconds used, from the hub's Prometheus page."""
    url, headers = hub.endpoint.removesuffix("/api") + "/metrics", {"Authorization": f"token {hub.token}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        page = response.read().decode()
    served = re.findall(r"^jupyterhub_request_duration_seconds_count\{(.*)\} (\S+)$", page, re.MULTILINE)
    cpu = re.search(r"^process_cpu_seconds_total (\S+)$", page, re.MULTILINE)
    assert served and cpu, page
    return int(sum(float(number) for labels, number in served if "MetricsHandler" not in labels)), float(cpu[1])


def measure(what: str, slow_spawn_timeout_s: float, args: argparse.Namespace) -> Measured:
    """One run on a fresh hub. Raises `RunFailed`."""
    command = [args.tool, "stress-test"] if what == "tool" else [str(HERE / "bare_client.py")]
    command = [sys.executable, *command, "--count", str(args.count), "--batch-size", str(args.batch_size)]
    command += ["--stop-first"] if what == "bare" and args.stop_first else []
    options = {"spawn_s": args.spawn, "spawn_jitter_s": args.jitter, "slow_spawn_timeout_s": slow_spawn_timeout_s}
    with LocalHub(concurrent_spawn_limit=100, **options) as hub, tempfile.TemporaryDirectory() as folder:
        users = hub.users().keys()
        results = Path(folder) / "results.json"
        requests, cpu_s = hub_counts(hub)
        process = run_client(command + (["--results", str(results)] if what == "tool" else []), hub.environment)
        requests_after, cpu_after_s = hub_counts(hub)
        changed = users ^ hub.users().keys()
        process = dataclasses.replace(process, results=results.read_text() if results.exists() else "")
    if process.exit_code or changed:
        said = process.stdout[-2000:] + process.stderr[-2000:]
        raise RunFailed(f"the {what} ended with {process.exit_code}; users left or lost: {sorted(changed)}\n{said}")
    report = tool_report(process) if what == "tool" else bare_report(process)
    if report.requests != requests_after - requests:
        raise RunFailed(f"the {what} counted {report.requests} requests, the hub {requests_after - requests}")
    return Measured(process, requests_after - requests, cpu_after_s - cpu_s, report)


def run_pairs(slow_spawn_timeout_s: float, args: argparse.Namespace) -> dict[str, list[Measured]]:
    """The runs of each client, pair by pair; who goes first alternates."""
    runs: dict[str, list[Measured]] = {"tool": [], "bare": []}
    for pair in range(args.pairs):
        for what in sorted(runs, reverse=pair % 2 == 0):
            run = measure(what, slow_spawn_timeout_s, args)
            runs[what].append(run)
            setting = f"timeout {slow_spawn_timeout_s:g} s, pair {pair + 1}, {what}"
            print(f"{setting}: {run.process.wall_s:.2f} s", file=sys.stderr, flush=True)
    return runs


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def render(results: dict[float, dict[str, list[Measured]]], servers: int) -> Iterator[str]:
    """One row for each setting and client, then the ratios; medians, pings left out."""
    yield (
        f"{'slow_spawn_timeout':<20}{'what':<6}{'wall s':>8}{'min-max':>14}{'requests/server':>17}"
        f"{'hub CPU s':>11}{'client CPU s':>14}{'client peak MB':>16}"
    )
    for setting, runs in results.items():
        for what, measured in runs.items():
            walls_s = [run.process.wall_s for run in measured]
            yield (
                f"{setting:<20g}{what:<6}{median(walls_s):>8.2f}{f'{min(walls_s):.2f}-{max(walls_s):.2f}':>14}"
                f"{median([(run.hub_requests - run.report.pings) / servers for run in measured]):>17.2f}"
                f"{median([run.hub_cpu_s for run in measured]):>11.2f}"
                f"{median([run.process.cpu_s for run in measured]):>14.2f}"
                f"{median([run.process.peak_mb for run in measured]):>16.1f}"
            )
    yield "\ntool / bare, pair by pair: median (each pair)"
    for setting, runs in results.items():
        pairs = list(zip(runs["tool"], runs["bare"]))
        yield f"{setting:<20g}wall     " + ratios([(a.process.wall_s, b.process.wall_s) for a, b in pairs])
        yield f"{setting:<20g}hub CPU  " + ratios([(a.hub_cpu_s, b.hub_cpu_s) for a, b in pairs])


def ratios(pairs: Sequence[tuple[float, float]]) -> str:
    each = [a / b for a, b in pairs]
    return f"{median(each):.3f}  (" + ", ".join(f"{ratio:.3f}" for ratio in each) + ")"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = functools.partial(parser.add_argument, type=int)
    add("--pairs", default=3, help="runs of each client on each setting (3)")
    add("--count", default=300, help="servers (300)")
    add("--batch-size", default=50, help="users made by one request, and servers starting at one time (50)")
    add("--spawn", metavar="SECONDS", type=float, default=1.0, help="how long a server takes to start (1)")
    add("--jitter", metavar="SECONDS", type=float, default=0.5, help="at most so much longer, at random (0.5)")
    add("--tool", type=str, default=str(HERE.parents[1] / "hub_stress_test.py"), help="another version of the tool")
    parser.add_argument("--stop-first", action="store_true", help="the bare client stops each server, as the tool does")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    try:
        results = {timeout_s: run_pairs(timeout_s, args) for timeout_s in SLOW_SPAWN_TIMEOUTS_S}
    except RunFailed as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jupyterhub", "requests", "urllib3", "aiohttp"))
    spawn = f"{args.spawn:g} to {args.spawn + args.jitter:g} s"
    print(f"{os.cpu_count()} cores with a load of {load:.1f} before, Python {platform.python_version()}, {libraries}")
    print(f"{args.count} servers of {spawn} each, {args.batch_size} starting at a time, {args.pairs} pairs\n")
    print("\n".join(render(results, args.count)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
