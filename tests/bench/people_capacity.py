"""Is the capacity in people right? The tool's answer beside what two hubs are known to take.

    python tests/bench/people_capacity.py

One hub starts at most 10 servers at the same time, of 3 s each: 200 people a minute. The other's one thread is busy for
a quarter of a second with each start; it takes what a bare client (bare_client.py) gets from it, which asks for as many
at one time as the hub allows, measured before and after. All takes some twenty-five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localhub import LocalHub  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
COUNT, AT_ONE_TIME = 120, 20  # servers of the bare client


def bare_rate(hub: LocalHub) -> float:
    """How many servers a minute a bare client gets to start."""
    command = [sys.executable, str(HERE / "bare_client.py"), "--count", str(COUNT)]
    command += ["--batch-size", str(AT_ONE_TIME)]
    said = subprocess.run(command, env=os.environ | hub.environment, check=True, capture_output=True, text=True).stdout
    return 60 * COUNT / float(json.loads(said)["phases_s"]["start"])


def found(hub: LocalHub, *words: str) -> dict[str, Any]:
    """What the tool says of the hub's capacity."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, str(TOOL), "stress-test", "--find-capacity", *words, "--results", str(file)]
        subprocess.run(command, env=os.environ | hub.environment, check=True, capture_output=True, timeout=3600)
        capacity: dict[str, Any] = json.loads(file.read_text())["capacity"]
    return capacity


def show(hub: str, truth: float, capacity: dict[str, Any]) -> None:
    people = capacity["people_per_minute"]
    steps = ", ".join(f"{60 * step['rate_per_s']:.4g}{'' if step['held'] else ' ok'}" for step in capacity["steps"])
    print(f"{hub}: {people:.0f} people a minute, truth {truth:.0f}: {people / truth:.2f} times", flush=True)
    print(f"    limit: {capacity['limited_by']}\n    tried: {steps}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with LocalHub(concurrent_spawn_limit=10, spawn_s=3.0, slow_spawn_timeout_s=0.0) as hub:
        show("10 at a time, 3 s each", 200.0, found(hub, "--rate", "1"))
    with LocalHub(concurrent_spawn_limit=AT_ONE_TIME, busy_s=0.25) as hub:
        before = bare_rate(hub)
        capacity = found(hub, "--rate", "1")
        after = bare_rate(hub)
        print(f"a bare client: {before:.0f} servers a minute before, {after:.0f} after", flush=True)
        show("bound by its processor", (before + after) / 2, capacity)


if __name__ == "__main__":
    main()
