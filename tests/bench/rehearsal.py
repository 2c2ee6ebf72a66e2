"""Compares what the tool says of three hundred people at work with what their servers saw, and shows what it costs.

    python tests/bench/rehearsal.py [--count 300] [--within 60] [--hold 60]

People come through a real proxy to stub labs (tests/singleuser_stub.py), which note when each cell came in and when its
last message went out. Shown are the CPU share and the peak memory of the tool's one process, and how long a cell took
at the median, by the tool and by the stub. Nothing is asserted about speed; the exit code is 1 when a run failed, left
users, or counted cells otherwise than the stub.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import whole_run

sys.path.insert(0, str(whole_run.HERE.parent))
from localhub import LocalHub  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 300), ("within", 60), ("hold", 60)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    args = parser.parse_args()
    command = [sys.executable, str(whole_run.TOOL), "stress-test", "--count", str(args.count), "--work"]
    command += ["--within", f"{args.within}s", "--hold", f"{args.hold}s", "--server-timeout", "3m"]
    with tempfile.TemporaryDirectory() as folder, LocalHub(real_proxy=True, stub_labs=True, spawn_s=1.0) as hub:
        before, file = hub.users().keys(), Path(folder) / "results.json"
        process = whole_run.run_client([*command, "--results", str(file)], hub.environment)
        cells_s = [cell["sent_s"] - cell["received_s"] for cell in hub.truth()["cells"]]
        changed = hub.users().keys() ^ before
        if process.exit_code or changed:
            print(f"FAILED: {process.exit_code}, {changed}\n{process.stdout}{process.stderr[-2000:]}", file=sys.stderr)
            return 1
        operations = json.loads(file.read_text())["operations"]
    counted = sum(operations[name]["count"] for name in ("kernel_ready", "cell") if name in operations)
    share = process.cpu_s / process.wall_s
    print(f"{args.count} people at work, {counted} cells ({len(cells_s)} at the stub)")
    print(f"the tool: {process.cpu_s:.1f} s of CPU in {process.wall_s:.0f} s ({share:.0%} of a core), ", end="")
    print(f"{process.peak_mb:.0f} MB at its peak")
    if "cell" in operations:  # the hold was long enough for one
        reported_s, true_s = operations["cell"]["latency_s"]["p50"], statistics.median(cells_s)
        print(f"a cell took {1000 * reported_s:.1f} ms, by the stub {1000 * true_s:.1f} ms (medians)")
    return 0 if counted == len(cells_s) else 1


if __name__ == "__main__":
    raise SystemExit(main())
