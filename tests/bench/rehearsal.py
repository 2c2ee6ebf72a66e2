"""What three hundred people at work cost the tool, and how true their times are.

    python tests/bench/rehearsal.py [--count 300] [--within 60] [--hold 60] [--pages 50]

People come through a real proxy to stub labs (tests/singleuser_stub.py), which note when each cell came in and when its
last message went out. Shown are the CPU share and the peak memory of the tool's one process, and how much longer the
tool says that a cell took than the stub does, at the median. Then so many people load a page of 70 requests and 5 MB
each: the tool's CPU beside the proxy's. Nothing is asserted about speed; the exit code is 1 when a run failed, left
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localhub import LocalHub  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
PAGE = [*[40_000] * 60, *[260_000] * 10]  # bytes of each part: 5 MB


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def rehearse(hub: LocalHub, folder: Path, *words: str) -> tuple[whole_run.Process, dict]:
    """One run of the tool: its process, and its results. Raises `RunFailed`."""
    before, file = hub.users().keys(), folder / "results.json"
    command = [sys.executable, str(TOOL), "stress-test", *words, "--results", str(file)]
    process = whole_run.run_client(command, hub.environment)
    if process.exit_code or hub.users().keys() != before:
        raise whole_run.RunFailed(f"exit code {process.exit_code}\n{process.stdout}\n{process.stderr[-2000:]}")
    return process, json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 300), ("within", 60), ("hold", 60), ("pages", 50)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, LocalHub(real_proxy=True, stub_labs=True, spawn_s=1.0) as hub:
        folder = Path(home)
        words = ["--count", str(args.count), "--within", f"{args.within}s", "--work", "--hold", f"{args.hold}s"]
        process, found = rehearse(hub, folder, *words, "--server-timeout", "3m")
        cells = [cell["sent_s"] - cell["received_s"] for cell in hub.truth()["cells"]]
        counted = found["operations"]["cell"]["count"] + found["operations"]["kernel_ready"]["count"]
        seen_s, true_s = found["operations"]["cell"]["latency_s"]["p50"], statistics.median(cells)
        print(f"{found['people']['at_work']} people at work, {counted} cells ({len(cells)} at the stub)")
        share = process.cpu_s / process.wall_s
        print(
            f"the tool: {process.cpu_s:.1f} s of CPU in {process.wall_s:.0f} s, {100 * share:.0f} % of a core, ", end=""
        )
        print(f"{process.peak_mb:.0f} MB at its peak")
        print(f"a cell took {1000 * seen_s:.1f} ms, by the stub {1000 * true_s:.1f} ms (medians)")
        har = folder / "page.har"
        urls = [f"{hub.public_url}user/x/static/lab/{n}.js?bytes={size}" for n, size in enumerate(PAGE)]
        entries = [{"request": {"method": "GET", "url": url}, "response": {"status": 200}} for url in urls]
        har.write_text(json.dumps({"log": {"entries": entries}}))
        proxy_s = cpu_s(hub.proxy.pid)
        words = ["--count", str(args.pages), "--within", "30s", "--page", str(har), "--server-timeout", "3m"]
        process, found = rehearse(hub, folder, *words)
        proxy_s = cpu_s(hub.proxy.pid) - proxy_s
        page_s = found["operations"]["page"]["latency_s"]["p50"]
        print(
            f"{args.pages} pages of {len(PAGE)} requests, {sum(PAGE) / 1e6:.1f} MB: {page_s:.2f} s each (median); ",
            end="",
        )
        print(f"CPU of the tool {process.cpu_s:.1f} s, of the proxy {proxy_s:.1f} s")
        return 0 if counted == len(cells) else 1


if __name__ == "__main__":
    raise SystemExit(main())
