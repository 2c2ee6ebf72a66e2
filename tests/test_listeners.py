"""What is told of a run while it lasts: every event in a file, ."""

from __future__ import annotations

import collections
import csv
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from localhub import LocalHub
from tool import run_for_results, start_tool, tool_users, wait_until

import hub_stress_test as hst

HALF_FAIL = ("--profile", '{"fail_rate": 0.5, "spawn_s": 0.3}')
COLUMNS = [  # as README has them
    *("utc", "step", "user", "outcome", "tries", "throttled"),
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
    rows = list(csv.DictReader(text.splitlines()) if ".csv" in path.name else map(json.loads, text.splitlines()))
    for row in rows:
        assert list(row) == COLUMNS and None not in row.values() and float(row["ended_s"]) >= float(row["due_s"])
    return rows


# ==== A file of samples ==============================================================================================


@pytest.mark.parametrize("name", ["s.csv", "s.jsonl", "s.csv.gz", "s.jsonl.gz"])
def test_every_event_of_a_run_is_a_row(name: str, new_hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"of an earlier run\n")
    words = ("stress-test", "-c", "6", *HALF_FAIL, "--samples", str(path))
    _, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    rows = samples_in(path)
    counts = collections.Counter(row["step"] for row in rows)
    assert counts == {step: operation["count"] for step, operation in found["operations"].items()}
    failed = collections.Counter(row["step"] for row in rows if row["outcome"] != "ok")
    assert failed == {step: one["failed"] for step, one in found["operations"].items() if one["failed"]}
    ready = [row for row in rows if row["step"] == "server_ready"]
    assert collections.Counter(row["reason"] for row in ready if row["reason"]) == found["servers"]["reasons"]
    assert {row["outcome"] for row in ready} == {"ok", "spawn"}
    slowest = max(float(row["latency_s"]) for row in ready if row["outcome"] == "ok")
    assert slowest == pytest.approx(found["operations"]["server_ready"]["latency_s"]["max"], abs=1e-3)
    began = datetime.fromisoformat(found["started"].replace("Z", "+00:00")).timestamp()
    for row in rows:
        ended = datetime.fromisoformat(row["utc"].replace("Z", "+00:00")).timestamp()
        assert 0 <= ended - began - float(row["ended_s"]) < 1.01  # `started` is in whole seconds


def test_the_events_of_several_processes_are_all_there(new_hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl.gz"
    words = ("activity-stress-test", "-c", "30", "--processes", "2", "--rate", "30", "--samples", str(path))
    _, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    reports = [row for row in samples_in(path) if row["step"] == "activity"]
    assert len(reports) == found["operations"]["activity"]["count"] == 30
    assert len({row["user"] for row in reports}) == 30


@pytest.mark.parametrize(("name", "signals"), [("s.csv.gz", ["SIGKILL"]), ("s.jsonl", ["SIGINT", "SIGINT"])])
def test_all_lines_are_whole_when_the_program_is_killed(
    name: str, signals: list[str], new_hub: LocalHub, tmp_path: Path
) -> None:
    path = tmp_path / name
    with start_tool("stress-test", "-c", "4", "--hold", "60s", "--samples", str(path), hub=new_hub) as run:
        wait_until(lambda: text_of(path).count("server_ready") == 4)
        seen = text_of(path)
        wait_until(lambda: text_of(path) != seen)  # pings go on being written while nothing else happens
        for number in signals:
            os.kill(run.pid, getattr(signal, number))
            time.sleep(0.05)
        assert run.wait(60) != 0
    steps = collections.Counter(row["step"] for row in samples_in(path))
    assert steps["server_ready"] == 4 and steps["ping"]
    assert hst.delete_users(sorted(tool_users(new_hub)), new_hub.endpoint, hst.get_session(new_hub.token))


def test_a_disk_that_is_full_fails_the_run_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    words = ["--dry-run", "stress-test", "-c", "40", "--samples", str(path)]
    command = [sys.executable, hst.__file__, *words]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    assert f"--samples {path} could not be written any more: File too large" in re.sub(r"\n +", " ", done.stdout)
    assert not path.stat().st_size
