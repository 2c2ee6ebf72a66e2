"""What shows a run while it lasts: every event in a file, and a page for Prometheus."""

from __future__ import annotations

import collections
import csv
import gzip
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import hub_stress_test as hst
from localhub import LocalHub
from processes import free_port, free_ports
from tool import NOWHERE, PATIENCE_S, refused_usage, run_for_results, start_tool, tool_users, wait_until

HALF_FAIL = ("--profile", '{"fail_rate": 0.5, "spawn_s": 0.3}')
COLUMNS = [
    *("utc", "step", "user", "group", "outcome", "tries", "throttled"),
    *("due_s", "sent_s", "ended_s", "latency_s", "backoff_s", "reason", "message"),
]


def text_of(path: Path) -> str:
    """What a file of samples holds; a .gz has to be whole."""
    data = path.read_bytes() if path.exists() else b""
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def samples_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples, all of whose lines are whole."""
    text = text_of(path)
    assert text.endswith("\n")
    rows = list(csv.DictReader(text.splitlines()))
    for row in rows:
        assert list(row) == COLUMNS and None not in row.values() and float(row["ended_s"]) >= float(row["due_s"])
    return rows


# ==== A file of samples ==============================================================================================


def test_every_event_of_a_run_is_a_row(new_hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_bytes(b"of an earlier run\n")
    words = ("stress-test", "-c", "6", *HALF_FAIL, "--samples", str(path))
    _, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    rows = samples_in(path)
    counts = collections.Counter(row["step"] for row in rows)
    assert counts == {step: operation["count"] for step, operation in found["operations"].items()}
    failed = collections.Counter(row["step"] for row in rows if row["outcome"] != "ok")
    assert failed == {step: seen["failed"] for step, seen in found["operations"].items() if seen["failed"]}
    ready = [row for row in rows if row["step"] == "server_ready"]
    assert collections.Counter(row["reason"] for row in ready if row["reason"]) == found["servers"]["reasons"]
    assert {row["outcome"] for row in ready} == {"ok", "spawn"}
    slowest = max(float(row["latency_s"]) for row in ready if row["outcome"] == "ok")
    assert slowest == pytest.approx(found["operations"]["server_ready"]["latency_s"]["max"], abs=1e-3)
    began = datetime.fromisoformat(found["started"].replace("Z", "+00:00")).timestamp()
    for row in rows:
        ended = datetime.fromisoformat(row["utc"].replace("Z", "+00:00")).timestamp()
        assert 0 <= ended - began - float(row["ended_s"]) < 1.01  # `started` is in whole seconds


def test_all_lines_are_whole_when_the_program_is_killed(new_hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / "s.csv.gz"
    with start_tool("stress-test", "-c", "4", "--hold", "60s", "--samples", str(path), hub=new_hub) as run:
        wait_until(lambda: text_of(path).count("server_ready") == 4)
        seen = text_of(path)
        wait_until(lambda: text_of(path) != seen)  # pings go on being written while nothing else happens
        run.kill()
        assert run.wait(60) != 0
    steps = collections.Counter(row["step"] for row in samples_in(path))
    assert steps["server_ready"] == 4 and steps["ping"]
    assert hst.delete_users(sorted(tool_users(new_hub)), new_hub.endpoint, hst.get_session(new_hub.token))


def test_a_full_disk_fails_the_run_and_leaves_whole_lines(new_hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    words = ("-c", "12", "-b", "2", "--profile", '{"spawn_s": 0.5}', "--samples", str(path))  # not all in one second
    command = [sys.executable, hst.__file__, "stress-test", *words]
    env: Any = {"env": os.environ | new_hub.environment, "preexec_fn": limited}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, **env)
    assert done.returncode == 1, done
    assert "File too large" in " ".join(done.stdout.split())
    text = path.read_text()
    assert text.endswith("\n") and len({line.count(",") for line in text.splitlines()}) == 1


# ==== The page for Prometheus ========================================================================================


def page_at(port: int) -> dict[tuple[str, ...], float]:
    """The figures of a run that serves them, by name and the values of labels; nothing before and after it does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    except OSError:
        return {}
    return {(name, *labels.values()): value for each in families for name, labels, value, *_ in each.samples}


def people(page: dict[tuple[str, ...], float]) -> dict[str, float]:
    """How many people are in each state."""
    return {
        labels[0]: number for (name, *labels), number in page.items() if name == "hub_stress_test_people" and number
    }


def test_a_run_is_served_while_it_lasts(new_hub: LocalHub) -> None:
    port = free_port()
    with pytest.raises(hst.SetupError):  # which leaves the port free
        hst.run_stress_test(1, 1, new_hub.token, NOWHERE["JUPYTERHUB_ENDPOINT"], metrics_port=port)
    words = ("stress-test", "-c", "6", *HALF_FAIL, "--hold", "60s", "--metrics-port", str(port))
    with start_tool(*words, hub=new_hub) as run:
        wait_until(lambda: people(page_at(port)) == {"ready": 3, "failed": 3})
        page = page_at(port)
        run.send_signal(signal.SIGINT)
        assert run.outcome().code == 130
    assert [page["hub_stress_test_latency_seconds_count", "server_ready", end] for end in ("ok", "spawn")] == [3, 3]
    assert page["hub_stress_test_lateness_seconds_count",] >= 14 and page["hub_stress_test_throttled_total",] == 0
    assert page_at(port) == {} and not tool_users(new_hub)


def test_a_port_that_cannot_be_used_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused_usage(["stress-test", "--metrics-port", port], NOWHERE, capsys)
    assert f"--metrics-port {port}: Address already in use" in said
    assert "65535" in refused_usage(["stress-test", "--metrics-port", "65536"], NOWHERE, capsys)


def query_result(port: int, query: str) -> dict[tuple[str, ...], float]:
    """What Prometheus says to a query: each value by those of its labels."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=10) as response:
        found = json.load(response)["data"]["result"]
    return {tuple(each["metric"].values()): float(each["value"][1]) for each in found}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A Prometheus that scrapes a port of this machine four times a second: that port, and its own."""
    scraped, own = free_ports(2)
    jobs = [{"job_name": "test", "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}]}]
    settings = {"global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"}, "scrape_configs": jobs}
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))  # which is YAML too
    flags = {"config.file": tmp_path / "prometheus.yml", "storage.tsdb.path": tmp_path / "data"}
    flags |= {"web.listen-address": f"127.0.0.1:{own}"}
    with (tmp_path / "prometheus.log").open("wb") as log:
        command = ["prometheus", *(f"--{name}={value}" for name, value in flags.items())]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: page_at(own))
        yield scraped, own
    finally:
        process.kill()
        process.wait()


@pytest.mark.prometheus
def test_prometheus_sees_what_the_results_say(
    prometheus: tuple[int, int], make_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    scraped, own = prometheus
    hub = make_hub(spawn_s=2, concurrent_spawn_limit=3, slow_spawn_timeout_s=0, fail_rate=0.25)
    words = ("stress-test", "-c", "12", "-b", "6", "--hold", "5s", "--metrics-port", str(scraped))
    _, found = run_for_results(tmp_path / "r", *words, hub=hub)
    servers, ready = found["servers"], found["operations"]["server_ready"]
    assert (servers["ready"], servers["failed"]) == (9, 3) and found["http"]["throttled"]

    def highest(figure: str) -> dict[tuple[str, ...], float]:
        return query_result(own, f"max by (state, outcome) (max_over_time(hub_stress_test_{figure}[5m]))")

    assert highest("throttled_total") == {(): found["http"]["throttled"]}
    states = highest("people")
    assert (states["ready",], states["failed",]) == (9, 3)
    assert 0 < states["starting",] <= 6
    assert highest('latency_seconds_count{operation="server_ready"}') == {("ok",): 9, ("spawn",): 3}
    of_ready = 'max_over_time(hub_stress_test_latency_seconds_bucket{operation="server_ready",outcome="ok"}[5m])'
    (median,) = query_result(own, f"histogram_quantile(0.5, {of_ready})").values()
    below = max(bound for bound in (0, *hst.PAGE_BUCKETS_S) if bound < ready["latency_s"]["p50"])
    assert below <= median <= min(bound for bound in hst.PAGE_BUCKETS_S if bound >= ready["latency_s"]["p50"])
    (sent,) = query_result(own, "max_over_time(hub_stress_test_lateness_seconds_count[5m])").values()
    assert 12 <= sent <= sum(seen["count"] for seen in found["operations"].values())
