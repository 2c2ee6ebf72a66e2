"""What is fast and what is not: everything measured side by side, in one run, with a table at the end.

    python tests/bench/reach.py [--quick]

takes some twenty minutes on two cores: whole runs and purges beside a bare client in alternating pairs (whole_run.py),
senders beside each other (senders.py), the moment of readiness beside the hub's log, start-up beside importing
requests, and the scale from 30 to 3,000 servers. Nothing is asserted about speed; the exit code is 1 when a run failed,
left users, or counted its requests otherwise than the hub did. `--quick` takes fewer and smaller runs, to try it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import senders
import whole_run

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
import hub_stress_test as hst  # noqa: E402
from known_server import KnownServer  # noqa: E402
from localhub import LocalHub  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
Row = tuple[str, str, str]  # what, measured, to reach


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def ratio(values: list[float], others: list[float]) -> str:
    """The median of the ratios of pairs, and each."""
    each = [one / other for one, other in zip(values, others)]
    return f"{statistics.median(each):.2f} times ({', '.join(f'{one:.2f}' for one in each)})"


def settings(count: int, pairs: int, stop_first: bool = False) -> argparse.Namespace:
    """Options of whole_run.py; with `stop_first` the bare client sends the stop that the tool measures, too."""
    fixed = {"batch_size": 50, "spawn": 1.0, "jitter": 0.5, "tool": str(TOOL)}
    return argparse.Namespace(count=count, pairs=pairs, stop_first=stop_first, **fixed)


def whole_runs(args: argparse.Namespace) -> Iterator[Row]:
    count = 30 if args.quick else 300
    for timeout_s, most in ((10.0, 3.1), (0.0, 4.1)):
        runs = whole_run.run_pairs(timeout_s, settings(count, args.pairs))
        tool, bare = runs["tool"], runs["bare"]
        name = f"{count} servers, slow_spawn_timeout {timeout_s:g}"
        walls = [[run.process.wall_s for run in each] for each in (tool, bare)]
        yield f"{name}: whole run / bare client", ratio(*walls), "1.10"
        cpu = [[run.hub_cpu_s for run in each] for each in (tool, bare)]
        yield f"{name}: hub's CPU / bare client's", ratio(*cpu), "1.10"
        requests = statistics.median((run.hub_requests - run.report.pings) / count for run in tool)
        yield f"{name}: requests a server, pings apart", f"{requests:.2f}", f"{most}"
    runs = whole_run.run_pairs(10.0, settings(count, args.pairs, stop_first=True))
    tool, bare = runs["tool"], runs["bare"]
    name = f"{count} servers, bare client that stops each first"
    yield f"{name}: whole run", ratio(*([run.process.wall_s for run in each] for each in (tool, bare))), ""
    yield f"{name}: hub's CPU", ratio(*([run.hub_cpu_s for run in each] for each in (tool, bare))), ""


def purges(args: argparse.Namespace) -> Iterator[Row]:
    count = 1000 if not args.quick else 100
    names = [hst.username(n) for n in range(1, count + 1)]
    commands = {
        "tool": [sys.executable, str(TOOL), "purge", "--batch-size", "10"],
        "bare": [
            sys.executable,
            str(HERE / "bare_client.py"),
            "--only-delete",
            "--count",
            str(count),
            "--batch-size",
            "10",
        ],
    }
    walls: dict[str, list[float]] = {"tool": [], "bare": []}
    with LocalHub() as hub:
        theirs = hub.users().keys()
        for pair in range(args.pairs):
            for what in sorted(commands, reverse=pair % 2 == 0):
                for at in range(0, count, 100):
                    hub.call("POST", "/users", {"usernames": names[at : at + 100]})
                process = whole_run.run_client(commands[what], hub.environment)
                if process.exit_code or hub.users().keys() != theirs:
                    raise whole_run.RunFailed(f"the purge by the {what} left users: {process.stderr}")
                walls[what].append(process.wall_s)
                say(f"purge of {count} by the {what}: {process.wall_s:.2f} s")
    yield f"purge of {count:,} idle users / bare client", ratio(walls["tool"], walls["bare"]), "1.10"


def readiness(args: argparse.Namespace) -> Iterator[Row]:
    """How far our moment of readiness is from the one in the hub's log, which has milliseconds."""
    count = 100 if not args.quick else 20
    for timeout_s in (10.0, 0.0):
        with LocalHub(spawn_s=1.0, spawn_jitter_s=0.5, slow_spawn_timeout_s=timeout_s) as hub:
            session = hst.get_session(hub.token)
            users = hst.create_users(count, 20, hub.endpoint, session)
            wall_minus_clock_s = time.time() - session.clock()
            events = hst.start_servers(users, hub.endpoint, session)
            gone = hst.delete_users(list(events), hub.endpoint, session, 20)
            log = hub.log()
        if not gone or len(events) != count or any(event.reason for event in events.values()):
            raise whole_run.RunFailed(f"servers failed, or users are left: {list(events.values())[:3]}")
        found = re.findall(r"^\[I ([\d-]+ [\d:.]+) .*\] User (\S+) took [\d.]+ seconds to start", log, re.MULTILINE)
        moments = {name: datetime.datetime.fromisoformat(stamp).timestamp() for stamp, name in found}
        away = sorted(abs(event.ended_s + wall_minus_clock_s - moments[name]) for name, event in events.items())
        text = f"p50 {1000 * away[len(away) // 2]:.0f} ms, p99 {1000 * away[int(len(away) * 0.99)]:.0f} ms"
        yield f"ready, ours against the hub's log, timeout {timeout_s:g} ({len(away)} servers)", text, "50 ms, 150 ms"


def start_up(args: argparse.Namespace) -> Iterator[Row]:
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    commands = {
        "import requests": ["-c", "import requests"],
        "--help": [str(TOOL), "--help"],
        "--version": [str(TOOL), "--version"],
        "--version, installed": ["-c", "import hub_stress_test as h; h.main(['--version'])"],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(5 if args.quick else 21):
        for name, words in commands.items():
            began_s = time.monotonic()
            command = [sys.executable, *words]
            subprocess.run(command, cwd=TOOL.parent, env=env, stdout=subprocess.DEVNULL, timeout=60, check=True)
            took[name].append(time.monotonic() - began_s)
    base = statistics.median(took.pop("import requests"))
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        yield f"start-up: {name} / import requests", f"{middle / base:.2f} times ({1000 * middle:.0f} ms)", "1.3"


def sending(args: argparse.Namespace) -> Iterator[Row]:
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        every = senders.commands(3 if args.quick else 8, Path(name))
        chosen = {one: every[one] for one in ("Locust, plain HttpUser", "Locust, plain FastHttpUser", "the tool")}
        for _ in range(args.pairs):
            for sender, command in chosen.items():
                rates.setdefault(sender, []).append(senders.rate(command, Path(name)))
                say(f"{sender}: {rates[sender][-1]:,.0f} per second")
    http, fast, tool = rates.values()
    yield "reports per second, one process / HttpUser", f"{ratio(tool, http)}, {statistics.median(tool):,.0f}/s", "1.3"
    yield "reports per second, one process / FastHttpUser", ratio(tool, fast), "as near as can be"
    duration_s = 5 if args.quick else 20
    words = ["activity-stress-test", "-c", "10", "--rate", "100", "--duration", f"{duration_s}s"]
    with KnownServer() as server:
        process = whole_run.run_client([sys.executable, str(TOOL), *words], server.environment)
    share = process.cpu_s / duration_s
    yield "CPU while sending 100 per second, start-up included", f"{share:.1%} of a core", "10%"


def scale(args: argparse.Namespace) -> Iterator[Row]:
    """Time, requests and memory per server, from 30 to 3,000 servers; the largest beside the bare client."""
    counts = (30, 100) if args.quick else (30, 100, 300, 1000, 3000)
    for count in counts:
        run = whole_run.measure("tool", 10.0, settings(count, 1))
        own = (run.hub_requests - run.report.pings) / count
        text = f"{run.process.wall_s:.1f} s, {1000 * run.process.wall_s / count:.0f} ms a server, {own:.2f} requests"
        goal = "250 MB" if count == counts[-1] else ""
        yield f"{count:,} servers", f"{text}, {run.process.peak_mb:.0f} MB", goal
    bare = whole_run.measure("bare", 10.0, settings(counts[-1], 1))
    yield f"{counts[-1]:,} servers: whole run / bare client", ratio([run.process.wall_s], [bare.process.wall_s]), "1.15"


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "start_up": start_up,
    "sending": sending,
    "readiness": readiness,
    "purges": purges,
    "whole_runs": whole_runs,
    "scale": scale,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeatable (all)")
    args = parser.parse_args()
    args.pairs = 1 if args.quick else 3
    rows: list[Row] = []
    try:
        for part in args.only or PARTS:
            say(part)
            for row in PARTS[part](args):
                say(" | ".join(row))
                rows.append(row)
    except whole_run.RunFailed as failure:
        say(f"FAILED: {failure}")
        return 1
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in [("what", "measured (each)", "reach"), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
