"""The results: what is in the file, what decides the exit code, and how files are written."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from bench.whole_run import hub_counts
from localhub import LocalHub
from made_up import ready, results_of
from tool import MODULE, run_for_results, tool_users

Make = Callable[..., LocalHub]


# ==== The results file ===============================================================================================


def test_each_commands_results_count_requests_as_the_hub_does(hub: LocalHub, tmp_path: Path) -> None:
    file = tmp_path / "results.json"

    def run(*words: str) -> hst.Json:
        before, _ = hub_counts(hub)
        _, found = run_for_results(file, *words, hub=hub)
        served, http = hub_counts(hub)[0] - before, found["http"]
        readings = len(found["timeline"]["hub"]["at_s"])  # of the metrics page, which are not counted
        assert http["requests"] - readings == served and http["requests"] == sum(http["statuses"].values())
        assert http["observer_requests"] == found["operations"].get("ping", {"count": 0})["count"] + readings
        assert http["observer_share"] == http["observer_requests"] / http["requests"]
        assert hub.token not in file.read_text()
        return found

    stress = run("stress-test", "-c", "6", "-b", "3")
    assert stress["servers"]["ready"] == 6 == stress["users"]["created"] == stress["users"]["deleted"]
    assert stress["operations"]["server_ready"]["count"] == 6 and len(stress["servers"]["slowest"]) == 5
    assert stress["http"]["statuses"]["201"] == 8
    activity = run("activity-stress-test", "-c", "4")
    assert activity["operations"]["activity"]["count"] == 4 and activity["servers"] is None
    purge = run("purge")
    nothing = {"created": 0, "deleted": 0, "kept": 0, "stopped_while_starting": 0, "stops_failed": 0}
    assert purge["users"] == nothing | {"left_behind": [], "in_the_way": ""}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_throttled_and_failing_run_says_what_was_slow(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(spawn_s=1.6, slow_spawn_timeout_s=0, concurrent_spawn_limit=3, fail_rate=0.2)
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "10", "-b", "10", hub=hub)
    assert (done.code, found["failed"], found["failed_rate"]) == (1, 2, 0.2) and not tool_users(hub)
    servers, line = found["servers"], found["timeline"]["servers"]
    assert (servers["ready"], servers["failed"], servers["lost"], line["ready"].count(False)) == (8, 2, 0, 2)
    throttled_s = [at_s for at_s in line["throttled_s"] if at_s is not None]
    assert servers["throttled"] == len(throttled_s) >= 3
    assert servers["throttling_began_s"] == pytest.approx(min(throttled_s) - min(line["due_s"]), abs=0.001)
    slowest = servers["slowest"]
    assert len(slowest) == 5 and {each["message"] for each in slowest} <= {"Looking for a node", "Pulling the image"}
    first = f"{hst.duration_text(slowest[0]['ready_s'])}, {slowest[0]['user']}: throttled {slowest[0]['throttled']} ×"
    assert slowest[0]["throttled"] and re.search(rf"^slowest +{first}", done.summary, re.M)
    sentence = re.search(r"of (\S+ m?s) until ready, (\S+ m?s) throttling, (\S+ m?s) the spawner", done.summary)
    busy = re.search("event loop was late|was full", done.summary)  # then its time of a spawn may not be the spawner's
    assert sentence or busy, done.summary
    if sentence:
        wait_s, waited_s, start_s = (float(text.split()[0]) * hst.UNITS[text.split()[1]] for text in sentence.groups())
        assert start_s >= 1.6 and waited_s > 0.1 and start_s + waited_s <= wait_s * 1.01


# ==== The exit code ==================================================================================================


def test_the_exit_code_is_the_one_of_its_table() -> None:
    """Each combination is decided by the first row of the docstring that it fits."""
    lines = re.findall(r"^ *\| (.*) \|$", hst.exit_code.__doc__ or "", re.MULTILINE)
    header, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert header == ["left on the hub", "interrupted", "cut short", "failed", "code"]
    assert [row[-1] for row in rows] == ["4", "130", "143", "1", "1", "0"]
    words: list[dict[str, Any]] = [
        {"yes": True, "no": False},
        {"no": None, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM},
        {"yes": True, "no": False},
        {"yes": True, "no": False},
    ]
    for combination in itertools.product(*words):
        fitting = (row for row in rows if all(cell in ("any", word) for cell, word in zip(row, combination)))
        code = hst.exit_code(*(meaning[word] for meaning, word in zip(words, combination)))
        assert code == int(next(fitting)[-1])


def test_a_baseline_is_set_beside_the_run(new_hub: LocalHub, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(hst.render_results(results_of([ready(n, 0.5) for n in range(3)])))
    words = ("stress-test", "-c", "3", "--baseline", str(before), "--fail-if", "server_ready.p95 > 0.001x")
    done, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    assert done.code == 1 and "0.001x the baseline" in done.summary
    assert not {"token", "baseline"} & found["options"].keys() and new_hub.token not in (tmp_path / "r").read_text()
    assert re.search(r"^against baseline +p50 +p95 +max +failed$", done.stdout, re.MULTILINE)
    assert re.search(r"^server ready +\S+→\S+ \d+\.\d\dx .* 0→0$", done.stdout, re.MULTILINE)


# ==== Files ==========================================================================================================


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("what was there")
    hst.write_whole(str(file), "what is new")
    assert file.read_text() == "what is new" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError):
        hst.write_whole(str(tmp_path), "over a folder")
    assert file.read_text() == "what is new"


def test_a_file_that_is_mounted_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", refuse)
    file = tmp_path / "results.json"
    with pytest.raises(OSError):
        hst.write_whole(str(file), "of nothing that is there")
    file.touch()
    hst.write_whole(str(file), "what is new")
    assert file.read_text() == "what is new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("code", [0, 4, 130, 143])
def test_a_file_that_cannot_be_written_keeps_the_worse_code(code: int, tmp_path: Path) -> None:
    plan = hst.Plan(report=str(tmp_path / "gone" / "r.html"), results=str(tmp_path / "r.json"))
    found = hst.write_files(plan, results_of([ready(1)], exit_code=code))
    written = json.loads((tmp_path / "r.json").read_text())  # the other file
    assert written["exit_code"] == found.exit_code == (code or 1)
    assert written["warnings"][0].startswith(f"--report {plan.report} could not be written")


def test_links_stay_links_and_pipes_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    hst.write_whole(str(tmp_path / "link"), "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        hst.write_whole(str(tmp_path / "pipe"), "new")
        assert reader.communicate(timeout=30)[0] == b"new" and (tmp_path / "pipe").is_fifo()


def test_results_on_standard_output_stand_before_the_summary(new_hub: LocalHub, tmp_path: Path) -> None:
    command = [sys.executable, str(MODULE), "stress-test", "-c", "1", "--results", "/dev/stdout"]
    with open(tmp_path / "both", "w+") as both:
        subprocess.run(command, stdout=both, check=True, timeout=60, env=os.environ | new_hub.environment)
        both.seek(0)
        found, end = json.JSONDecoder().raw_decode(text := both.read())
    assert found["exit_code"] == 0 and text[end:].lstrip().startswith("PASSED: ")


def test_a_page_that_a_full_disk_refuses_is_told() -> None:
    words = f"{sys.executable} {MODULE} --dry-run stress-test -c 1 >/dev/full"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    said = "hub-stress-test: the page could not be printed: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_exit_codes_hold_whoever_reads_standard_error() -> None:
    words = f"{sys.executable} {MODULE} purge --nonsense 2>/dev/full"
    assert subprocess.run(["bash", "-c", words], timeout=60).returncode == 2


@pytest.mark.parametrize("closing", ["| head -1", ">&-", "| true"])
def test_a_closed_standard_output_is_no_bug(closing: str) -> None:
    words = f"{sys.executable} {MODULE} --dry-run stress-test -c 1"
    script = f"set -o pipefail; {words} {closing}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Error" not in done.stderr
