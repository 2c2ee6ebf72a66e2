"""Are the numbers true? Reported percentiles beside the truth, and requests sent in each second beside the rate.

    python tests/bench/truth.py

The server's behaviour is known (tests/known_server.py), so what each request waited follows from the schedule alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from known_server import KnownServer, per_second, true_latency  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
PERCENTS = (50, 90, 95, 99)
BEHAVIOURS: dict[str, dict[str, float]] = {
    "constant 20 ms": {"service_s": 0.02},
    "frozen 2 s in every 10": {"service_s": 0.01, "freeze_s": 2.0},
    "every 50th 500 ms late": {"service_s": 0.01, "outlier_share": 0.02, "outlier_s": 0.5},
}

PINGED: dict[str, dict[str, float]] = {
    "answers after 500 ms": {"service_s": 0.5},
    "frozen 2 s in every 10": {"service_s": 0.01, "freeze_s": 2.0},
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the server saw and what the tool reported."""

    arrivals: list[float]
    latency_s: dict[str, float]
    warnings: list[str]


def run(server: KnownServer, rate: int, seconds: int, processes: int) -> Seen:
    """One run of the tool against a server of known behaviour."""
    words = ["activity-stress-test", "-c", "50", "--rate", str(rate), "--duration", str(seconds)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, str(TOOL), *words, "--processes", str(processes), "--results", str(file)]
        env = os.environ | server.environment
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=seconds + 60)
        found: dict[str, Any] = json.loads(file.read_text())
    return Seen(server.arrivals(), found["operations"]["activity"]["latency_s"], found["warnings"])


def show_latency(name: str, rate: int, seconds: int, processes: int) -> None:
    with KnownServer(**BEHAVIOURS[name]) as server:
        seen = run(server, rate, seconds, processes)
        first = seen.arrivals[0]
        truth = sorted(true_latency(server.behaviour, [first + n / rate for n in range(rate * seconds)], first))
    cells = []
    for percent in PERCENTS:
        true_ms = 1000 * truth[math.ceil(percent / 100 * len(truth)) - 1]
        reported_ms = 1000 * seen.latency_s[f"p{percent}"]
        off = (
            f"{reported_ms - true_ms:+.1f} ms"
            if abs(reported_ms - true_ms) <= 3
            else f"{reported_ms / true_ms - 1:+.1%}"
        )
        cells.append(f"{reported_ms:7.1f} /{true_ms:7.1f} {off:>8}")
    late = "  said to be late" if seen.warnings else ""
    print(f"{name:<24}{rate:>5}/s x{processes}  " + "  ".join(cells) + late, flush=True)


def show_pings(name: str, seconds: int) -> None:
    """Pings beside a load that is next to nothing, of a server that treats reads of a user like reports."""
    with KnownServer(**PINGED[name], also_reads=True) as server, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        words = ["activity-stress-test", "-c", "5", "--rate", "1", "--duration", str(seconds), "--results", str(file)]
        env = os.environ | server.environment
        subprocess.run([sys.executable, str(TOOL), *words], env=env, check=True, capture_output=True, timeout=600)
        ping = json.loads(file.read_text())["operations"]["ping"]
        first = server.arrivals()[0]
        truth = sorted(true_latency(server.behaviour, [first + n / 5 for n in range(1, 5 * seconds)], first))
    true_s = {percent: truth[math.ceil(percent / 100 * len(truth)) - 1] for percent in PERCENTS}
    cells = [f"{1000 * ping['latency_s'][f'p{p}']:7.1f} /{1000 * seconds:7.1f}" for p, seconds in true_s.items()]
    most = f"max {1000 * ping['latency_s']['max']:.1f} /{1000 * truth[-1]:7.1f}"
    print(
        f"{name:<24}{ping['count']:>5} sent, {ping['skipped']} skipped  " + "  ".join(cells) + f"  {most}", flush=True
    )


def show_rate(rate: int, seconds: int, processes: int) -> None:
    with KnownServer() as server:
        numbers = per_second(run(server, rate, seconds, processes).arrivals, rate)
    worst = max(abs(number / rate - 1) for number in numbers)
    print(f"{rate:>5}/s x{processes}: {min(numbers)} to {max(numbers)} a second, {worst:.2%} off at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30)
    seconds = parser.parse_args().seconds
    print("reported / true ms and the difference, at " + ", ".join(f"p{percent}" for percent in PERCENTS))
    for rate, processes in ((100, 1), (500, 1), (500, 2)):
        for name in BEHAVIOURS:
            show_latency(name, rate, seconds, processes)
    print("pings: reported / true ms")
    for name in PINGED:
        show_pings(name, 2 * seconds)
    print("requests that arrived in each second")
    for rate, processes in ((50, 1), (200, 1), (1000, 1), (1000, 2)):
        show_rate(rate, seconds, processes)


if __name__ == "__main__":
    main()
