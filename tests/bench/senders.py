"""How many requests per second can be sent? The tool beside Locust, on a server that answers at once, in one run.

    python tests/bench/senders.py [--rounds 3] [--seconds 8]

Every sender posts activity reports as fast as it can to the known server (tests/known_server.py), which could serve
several times as many, and counts them itself: what is shown is what arrived, from the first report to the last. The
senders take turns, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from known_server import KnownServer  # noqa: E402
from localhub import free_port  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
PLAIN_LOCUST = """
import os
from locust import FastHttpUser, HttpUser, constant, task

HEADERS = {"Authorization": "token " + os.environ["JUPYTERHUB_API_TOKEN"]}
BODY = {"last_activity": "2026-11-20T16:00:00Z"}


class Fast(FastHttpUser):
    host, wait_time = os.environ["JUPYTERHUB_ENDPOINT"], constant(0)

    @task
    def report(self):
        self.client.post("/users/someone/activity", json=BODY, headers=HEADERS, name="activity")


class Plain(HttpUser):
    host, wait_time = os.environ["JUPYTERHUB_ENDPOINT"], constant(0)

    @task
    def report(self):
        self.client.post("/users/someone/activity", json=BODY, headers=HEADERS, name="activity")
"""
PLAIN_REQUESTS = """
import os, sys, threading, time, requests

def send():
    session = requests.Session()
    session.headers["Authorization"] = "token " + os.environ["JUPYTERHUB_API_TOKEN"]
    url = os.environ["JUPYTERHUB_ENDPOINT"] + "/users/someone/activity"
    until = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < until:
        session.post(url, json={"last_activity": "2026-11-20T16:00:00Z"}).raise_for_status()

threads = [threading.Thread(target=send) for _ in range(10)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def commands(seconds: int, folder: Path) -> dict[str, list[str]]:
    """What each sender is started with; Locust has ten users a process, the others ten threads."""
    (folder / "locustfile.py").write_text(PLAIN_LOCUST)
    port = str(free_port())
    alone = ["--headless", "--only-summary", "-t", f"{seconds}s"]
    two = ["--processes", "2", "--master-bind-port", port, "--master-port", port]
    locust = [sys.executable, "-m", "locust", "-f"]
    plain, ours = [*locust, str(folder / "locustfile.py")], [*locust, str(TOOL), "--hub-scale", "1000000000"]
    ten, twenty = ["-u", "10", "-r", "10"], ["-u", "20", "-r", "20"]
    tool = [sys.executable, str(TOOL), "activity-stress-test", "-c", "10", "--rate", "30000"]
    tool += ["--duration", f"{seconds}s", "--workers", "10"]
    return {
        "requests in 10 threads": [sys.executable, "-c", PLAIN_REQUESTS, str(seconds)],
        "Locust, plain HttpUser": [*plain, *alone, *ten, "Plain"],
        "Locust, plain FastHttpUser": [*plain, *alone, *ten, "Fast"],
        "this file under Locust": [*ours, *alone, *ten, "RunningServer"],
        "the tool": tool,
        "Locust, plain FastHttpUser, 2 processes": [*plain, *alone, *twenty, *two, "Fast"],
        "this file under Locust, 2 processes": [*ours, *alone, *twenty, *two, "RunningServer"],
        "the tool, 2 processes": [*tool, "--processes", "2"],
    }


def rate(command: list[str], folder: Path) -> float:
    """Reports per second that arrived."""
    with KnownServer() as server:
        env = os.environ | server.environment
        subprocess.run(command, env=env, cwd=folder, capture_output=True, timeout=120, check=True)
        arrivals = sorted(server.arrivals())
    return (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--only", default="", help="only senders whose name contains this")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(args.rounds):
            for sender, command in commands(args.seconds, Path(name)).items():
                if args.only in sender:
                    found.setdefault(sender, []).append(rate(command, Path(name)))
                    print(f"round {number + 1}: {sender}: {found[sender][-1]:,.0f} per second", file=sys.stderr)
    base = statistics.median(next(iter(found.values())))
    print(f"{'reports per second, median':<42}{'':>8}{'times the first':>18}   each")
    for sender, rates in found.items():
        middle = statistics.median(rates)
        print(f"{sender:<42}{middle:>8,.0f}{middle / base:>18.2f}   {', '.join(f'{one:,.0f}' for one in rates)}")


if __name__ == "__main__":
    main()
