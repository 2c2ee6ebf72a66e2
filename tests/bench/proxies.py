"""Which proxies lose connections when servers end, as the tool finds out: real hubs, proxies and servers.

    python tests/bench/proxies.py check   --check-proxy: four proxies, two hubs, behind nginx, without read:metrics
    python tests/bench/proxies.py others  --check-proxy on a healthy proxy while other people use the hub

A row for each run; `--runs N` of each case, `--at-once N` runs at the same time. The exit code is 1 when a run came to
another verdict than its case has, or left users.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import random
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import whole_run

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localhub import ROLE_SCOPES, LocalHub  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
LEAKING, HEALTHY = ("4.6.3", "5.0.1"), ("5.1.0", "5.3.0")
WITHOUT_METRICS = tuple(scope for scope in ROLE_SCOPES if scope != "read:metrics")


@dataclasses.dataclass(frozen=True)
class Case:
    """A deployment, and the verdicts that a check of its proxy may come to."""

    proxy: str
    expected: tuple[str, ...]
    hub: str | None = None
    behind_nginx: bool = False
    metrics: bool = True
    others: bool = False

    def __str__(self) -> str:
        more = [", behind nginx"] * self.behind_nginx + [", without read:metrics"] * (not self.metrics)
        more += [", other people"] * self.others
        return f"hub {self.hub or 'newest'}, proxy {self.proxy}{''.join(more)}"


def check_cases() -> list[Case]:
    cases = [
        Case(proxy, (verdict,), hub)
        for hub in (None, "4.1.6")
        for verdict, proxies in (("leaking", LEAKING), ("clean", HEALTHY))
        for proxy in proxies
    ]
    cases += [Case("4.6.3", ("leaking",), behind_nginx=True), Case("5.3.0", ("clean",), behind_nginx=True)]
    cases += [Case(proxy, ("leaking",), metrics=False) for proxy in LEAKING]
    return cases + [Case(proxy, ("undecided",), metrics=False) for proxy in HEALTHY]


CASES = {"check": check_cases, "others": lambda: [Case("5.3.0", ("clean", "undecided"), others=True)]}


@contextlib.contextmanager
def other_people(hub: LocalHub, per_second: float = 20.0, idle: int = 30) -> Iterator[None]:
    """So many requests per second through the proxy, and so many idle connections that come and go."""
    place, done = urllib.parse.urlsplit(hub.public_url), threading.Event()

    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", "/hub/login")
        connection.getresponse().read()

    def asking() -> None:
        while not done.wait(1 / per_second):
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(place.netloc, timeout=10)
                ask(connection)
                connection.close()

    def idling() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(place.netloc, timeout=10)
                ask(connection)
                done.wait(random.uniform(1, 20))
                connection.close()

    threads = [threading.Thread(target=asking), *(threading.Thread(target=idling) for _ in range(idle))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def run(case: Case) -> tuple[bool, str]:
    """Whether a run of the case came to what it has to, and its row."""
    began_s = time.monotonic()
    scopes = ROLE_SCOPES if case.metrics else WITHOUT_METRICS
    deployment: dict[str, Any] = {"scopes": scopes, "version": case.hub, "real_servers": True}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(LocalHub(real_proxy=True, proxy_version=case.proxy, **deployment))
        environment = hub.environment
        if case.behind_nginx:
            from nginx import nginx

            url, authority = stack.enter_context(nginx(hub.public_url, folder))
            environment |= {"JUPYTERHUB_ENDPOINT": f"{url}hub/api", "REQUESTS_CA_BUNDLE": str(authority)}
        if case.others:
            stack.enter_context(other_people(hub))
        before, file = hub.users().keys(), folder / "results.json"
        command = [sys.executable, str(TOOL), "stress-test", "--count", "1", "--check-proxy", "--results", str(file)]
        process = whole_run.run_client(command, environment)
        left = hub.users().keys() - before
        if not file.exists():
            raise whole_run.RunFailed(f"{case}: exit code {process.exit_code}\n{process.stderr[-2000:]}")
        found = json.loads(file.read_text())
    check = found["proxy_check"]
    verdict = check["verdict"]
    files = ((found["aftermath"] or {}).get("hub") or {}).get("open_files")
    seen = files and f"files {files['before']:.0f} → {files['peak']:.0f} → {files['after']:.0f}"
    fails = process.exit_code == int(verdict == "leaking")
    row = f"{case}: {verdict}, exit {process.exit_code}, {seen}, {time.monotonic() - began_s:.0f} s; {check['reason']}"
    return verdict in case.expected and fails and not left, row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--runs", type=int, default=1, help="(1)")
    parser.add_argument("--at-once", type=int, default=1, help="(1; real servers take a processor each to start)")
    args = parser.parse_args()
    cases = [case for case in CASES[args.what]() for _ in range(args.runs)]
    as_expected = True
    with ThreadPoolExecutor(args.at_once) as pool:
        for good, row in pool.map(run, cases):
            as_expected &= good
            print("    " if good else "BAD ", row, sep="", flush=True)
    return 0 if as_expected else 1


if __name__ == "__main__":
    raise SystemExit(main())
