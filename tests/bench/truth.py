"""Compares the percentiles that the tool reports with the truth, and the requests sent in each second with the rate.

    python tests/bench/truth.py

The server's behaviour is known (tests/known_server.py), so what each request waited follows from the schedule alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
from known_server import KnownServer, frozen_s, per_second  # noqa: E402

PERCENTS = (50, 90, 95, 99)
BEHAVIOURS = {"answers after 20 ms": {"service_s": 0.02}}
BEHAVIOURS |= {"frozen 2 s in every 10": {"service_s": 0.01, "freeze_s": 2.0}}


def show(name: str, rate: int, seconds: int, processes: int) -> None:
    """Run the tool against a server of this behaviour, and print what it reports beside what is true."""
    words = ["activity-stress-test", "-c", "50", "--rate", str(rate), "--duration", str(seconds)]
    with KnownServer(**BEHAVIOURS[name]) as server, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, str(HERE.parents[1] / "hub_stress_test.py"), *words]
        command += ["--processes", str(processes), "--results", str(file)]
        env = os.environ | server.environment
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=seconds + 60)
        found, arrivals = json.loads(file.read_text()), server.arrivals()
    service_s, period = server.behaviour.service_s, range(rate * seconds)
    truth_s = sorted(service_s + frozen_s(server.behaviour, n / rate) for n in period)
    cells = []
    for percent in PERCENTS:
        true_ms = 1000 * truth_s[math.ceil(percent / 100 * len(truth_s)) - 1]
        reported_ms = 1000 * found["operations"]["activity"]["latency_s"][f"p{percent}"]
        cells.append(f"{reported_ms:7.1f} /{true_ms:7.1f}")
    numbers = per_second(arrivals, rate)
    sent = f"{min(numbers)} to {max(numbers)} a second"
    late = "; late, says the tool" if found["warnings"] else ""
    print(f"{name:<24}{rate:>5}/s x{processes}  " + "  ".join(cells) + f"  {sent}{late}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="how long each run lasts (30)")
    seconds = parser.parse_args().seconds
    print(f"reported / true ms at {', '.join(f'p{percent}' for percent in PERCENTS)}; requests that arrived")
    for rate, processes in ((100, 1), (500, 1), (500, 2)):
        for name in BEHAVIOURS:
            show(name, rate, seconds, processes)


if __name__ == "__main__":
    main()
