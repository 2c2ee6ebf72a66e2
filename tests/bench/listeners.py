"""What it costs that others listen: --samples, and --metrics-port with somebody who looks every second.

    python tests/bench/listeners.py

runs the tool as its user does, without listeners and with each kind, in turns and each on a fresh local hub, all
servers as quick as each other. The cost is a ratio of wall times, and, since those of a busy machine differ by more
than what is to be seen, the CPU time that the tool took more, as a share of the run's time. Nothing is asserted about
speed; the exit code is 1 when a run failed or left users, or when nobody could look.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import whole_run

sys.path.insert(0, str(whole_run.HERE.parent))
from localhub import LocalHub  # noqa: E402
from processes import free_port  # noqa: E402

TOOL = whole_run.HERE.parents[1] / "hub_stress_test.py"
LOOKS_EVERY_S = 1.0


@contextlib.contextmanager
def looking(port: int) -> Iterator[list[int]]:
    """Looks at a page, as Prometheus does, while the block runs; how long each answer was."""
    lengths: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOKS_EVERY_S):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                lengths.append(len(page.read()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lengths
    finally:
        done.set()
        thread.join()


def run(kind: str, count: int, folder: Path) -> whole_run.Process:
    """One run on a fresh hub with a kind of listener. Raises `whole_run.RunFailed`."""
    port = free_port()
    words = {"csv": ["--samples", f"{folder}/s.csv"], "csv.gz": ["--samples", f"{folder}/s.csv.gz"]}
    words |= {"page": ["--metrics-port", str(port)]}
    command = [sys.executable, str(TOOL), "stress-test", "-c", str(count), "-b", "50", *words.get(kind, [])]
    with LocalHub(spawn_s=1.0) as hub:
        users = hub.users().keys()
        with looking(port) if kind == "page" else contextlib.nullcontext([1]) as lengths:
            process = whole_run.run_client(command, hub.environment)
        if process.exit_code or users ^ hub.users().keys() or not lengths:
            raise whole_run.RunFailed(f"{kind}: exit code {process.exit_code}, {process.stdout}{process.stderr}")
    return process


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="runs of each kind (5)")
    parser.add_argument("--count", type=int, default=300, help="servers (300)")
    args = parser.parse_args()
    kinds = ["none", "csv", "csv.gz", "page"]
    runs: dict[str, list[whole_run.Process]] = {kind: [] for kind in kinds}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            for kind in kinds[:: -1 if turn % 2 else 1]:
                try:
                    runs[kind].append(run(kind, args.count, Path(folder)))
                except whole_run.RunFailed as failure:
                    print(f"FAILED: {failure}", file=sys.stderr)
                    return 1
                one = runs[kind][-1]
                print(f"{turn + 1}: {kind}: {one.wall_s:.2f} s, CPU {one.cpu_s:.2f} s", file=sys.stderr, flush=True)
    print(f"{os.cpu_count()} cores with a load of {load:.1f} before; {args.count} servers, {args.turns} turns\n")
    print(f"{'listener':<10}{'wall s':>8}{'CPU s':>8}  more CPU, of the run's time  wall, turn by turn: median (each)")
    bare = runs["none"]
    for kind, some in runs.items():
        walls, cpus = ([getattr(one, name) for one in some] for name in ("wall_s", "cpu_s"))
        share = statistics.median((one.cpu_s - other.cpu_s) / other.wall_s for one, other in zip(some, bare))
        ratios = whole_run.ratios([(one.wall_s, other.wall_s) for one, other in zip(some, bare)])
        print(f"{kind:<10}{statistics.median(walls):>8.2f}{statistics.median(cpus):>8.2f}  {share:>27.1%}  {ratios}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
