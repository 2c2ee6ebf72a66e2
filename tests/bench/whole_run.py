"""Compares a whole run of the tool with what the hub itself allows.

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
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
TOOL = HERE.parents[1] / "hub_stress_test.py"
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


def measure(client: str, slow_spawn_timeout_s: float, args: argparse.Namespace) -> dict[str, float]:
    """One run on a fresh hub, as the machine and the hub saw it; pings left out. Raises `RunFailed`."""
    command = [args.tool, "stress-test"] if client == "tool" else [str(HERE / "bare_client.py")]
    command = [sys.executable, *command, "--count", str(args.count), "--batch-size", str(args.batch_size)]
    options = {"spawn_s": 1.0, "spawn_jitter_s": 0.5, "slow_spawn_timeout_s": slow_spawn_timeout_s}
    with LocalHub(**options) as hub, tempfile.TemporaryDirectory() as folder:
        results, users = Path(folder) / "results.json", hub.users().keys()
        requests, cpu_s = hub_counts(hub)
        process = run_client(command + ["--results", str(results)] * (client == "tool"), hub.environment)
        requests_after, cpu_after_s = hub_counts(hub)
        changed = users ^ hub.users().keys()
        if process.exit_code or changed:
            said = process.stdout[-2000:] + process.stderr[-2000:]
            raise RunFailed(
                f"the {client} ended with {process.exit_code}; users left or lost: {sorted(changed)}\n{said}"
            )
        if client == "tool":
            found = json.loads(results.read_text())
            pings = found["operations"]["ping"]["count"]
            counted = found["http"]["requests"] - len(found["timeline"]["hub"]["at_s"])  # readings of the metrics page
        else:
            counted, pings = json.loads(process.stdout)["requests"], 0
    if counted != requests_after - requests:
        raise RunFailed(f"the {client} counted {counted} requests, the hub {requests_after - requests}")
    return {
        "wall s": process.wall_s,
        "hub CPU s": cpu_after_s - cpu_s,
        "requests": requests_after - requests - pings,
        "client CPU s": process.cpu_s,
        "client peak MB": process.peak_mb,
    }


def compare(slow_spawn_timeout_s: float, args: argparse.Namespace) -> None:
    """Run each client in turn, and print the medians, and the ratios of wall time and of the hub's CPU time."""
    runs: dict[str, list[dict[str, float]]] = {"tool": [], "bare": []}
    for pair in range(args.pairs):
        for client in sorted(runs, reverse=pair % 2 == 0):
            runs[client].append(measure(client, slow_spawn_timeout_s, args))
    print(f"\nslow_spawn_timeout {slow_spawn_timeout_s:g} s: medians")
    for client, measured in runs.items():
        cells = (f"{name} {median(run[name] for run in measured):.2f}" for name in measured[0])
        print(f"  {client}: {', '.join(cells)}")
    for name in ("wall s", "hub CPU s"):
        each = [tool[name] / bare[name] for tool, bare in zip(runs["tool"], runs["bare"])]
        print(f"  {name}, tool / bare: {median(each):.3f} ({', '.join(f'{ratio:.3f}' for ratio in each)})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each client on each setting (3)")
    parser.add_argument("--count", type=int, default=300, help="servers, which take 1 to 1.5 s to start (300)")
    parser.add_argument("--batch-size", type=int, default=50, help="servers starting at one time (50)")
    parser.add_argument("--tool", default=str(TOOL), help="another version of the tool")
    args = parser.parse_args()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jupyterhub", "requests", "urllib3", "aiohttp"))
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores with a load of {load:.1f} before, Python {platform.python_version()}, {libraries}")
    try:
        for timeout_s in SLOW_SPAWN_TIMEOUTS_S:
            compare(timeout_s, args)
    except RunFailed as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
