"""The results: what is in the file, what decides the exit code, and how they become text and HTML."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import hub_stress_test as hst
from bench.whole_run import hub_counts
from fault_proxy import Answer, AnswerAfter, FaultProxy, Request, hub_answer, matching
from hub_stress_test import ExitCode
from localhub import LocalHub
from tool import MODULE, SCHEMA, results_in, run_for_results, run_tool, start_tool, tool_users, wait_until

Make = Callable[..., LocalHub]

# ==== The results file ===============================================================================================


def test_each_command_writes_results_that_follow_the_schema(hub: LocalHub, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    _, stress = run_for_results(file, "stress-test", "-c", "6", "-b", "3", hub=hub)
    assert stress["servers"]["ready"] == 6 == stress["users"]["created"] == stress["users"]["deleted"]
    assert stress["operations"]["server_ready"]["count"] == 6
    assert len(stress["servers"]["slowest"]) == 5
    assert stress["http"]["statuses"]["201"] == 8
    _, activity = run_for_results(file, "activity-stress-test", "-c", "4", hub=hub)
    assert activity["operations"]["activity"]["count"] == 4 and activity["servers"] is None
    _, purge = run_for_results(file, "purge", hub=hub)
    nothing = {"created": 0, "deleted": 0, "kept": 0, "stopped_while_starting": 0, "stops_failed": 0}
    assert purge["users"] == nothing | {"left_behind": [], "in_the_way": ""}
    assert hub.token not in file.read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_servers_that_failed_are_named_with_their_reason(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "10", "--profile", '{"fail_rate": 0.2}')
    done, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    servers = found["servers"]
    assert (done.code, found["failed"], found["failed_rate"]) == (1, 2, 0.2)
    assert (servers["ready"], servers["failed"], servers["lost"]) == (8, 2, 0)
    assert servers["reasons"] == {"no node has 4 GB of memory free": 2}
    assert len(servers["failures"]) == 2
    named = ", ".join(sorted((one["user"] for one in servers["failures"]), key=hst.natural))
    assert f"2 × no node has 4 GB of memory free ({named})" in done.summary
    assert found["timeline"]["servers"]["ready"].count(False) == 2
    assert not tool_users(new_hub)


def test_throttling_is_reported_with_the_moment_at_which_it_began(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(concurrent_spawn_limit=3, spawn_s=2, slow_spawn_timeout_s=0)
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "12", "--rate", "4", hub=hub)
    servers = found["servers"]
    assert done.code == 0
    assert servers["throttled"] >= 3
    assert 0.7 <= servers["throttling_began_s"] < 2  # the fourth start is due after 0.75 s
    since = hst.duration_text(servers["throttling_began_s"])
    assert f"; {servers['throttled']} throttled, from {since} after the first start on" in done.summary


@pytest.mark.parametrize("words", [("stress-test", "-c", "20", "-b", "10"), ("activity-stress-test", "-c", "9")])
def test_the_number_of_requests_is_the_one_that_the_hub_served(
    words: tuple[str, ...], make_hub: Make, tmp_path: Path
) -> None:
    hub = make_hub()
    before, _ = hub_counts(hub)
    _, found = run_for_results(tmp_path / "r", *words, hub=hub)
    served = hub_counts(hub)[0] - before
    http, readings = found["http"], len(found["timeline"]["hub"]["at_s"])  # of the metrics page, which are not counted
    assert http["requests"] - readings == served
    assert http["requests"] == sum(http["statuses"].values())
    pings = found["operations"].get("ping", {"count": 0})["count"]
    assert http["observer_requests"] == pings + readings
    assert http["observer_share"] == http["observer_requests"] / http["requests"]


def test_the_results_name_neither_the_token_nor_the_baseline_among_their_options(
    new_hub: LocalHub, tmp_path: Path
) -> None:
    before = tmp_path / "before.json"
    words = ("purge", "--token", new_hub.token, "--endpoint", new_hub.endpoint)
    run_for_results(before, *words)
    _, found = run_for_results(tmp_path / "r", *words, "--baseline", str(before))
    assert not {"token", "baseline"} & found["options"].keys()
    assert new_hub.token not in (tmp_path / "r").read_text()
    library = hst.purge_users(new_hub.token, new_hub.endpoint, baseline=json.loads(before.read_text()))
    assert not {"token", "baseline"} & library["options"].keys()
    assert new_hub.token not in json.dumps(library)


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("what was there")
    hst.write_whole(str(file), "what is new")
    assert file.read_text() == "what is new" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError):
        hst.write_whole(str(tmp_path), "over a folder")
    assert file.read_text() == "what is new"


# ==== Interrupted ====================================================================================================


@pytest.mark.parametrize("moment", ["at once", "after 0.3 s", "while both send"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_interrupt_of_all_processes_cleans_up_and_writes_whole_results(
    number: int, code: int, moment: str, new_hub: LocalHub, tmp_path: Path
) -> None:
    def reported() -> int:
        return sum(bool(user["last_activity"]) for name, user in new_hub.users().items() if hst.is_test_user(name))

    words = ["activity-stress-test", "-c", "10", "--rate", "20", "--duration", "60s", "--processes", "2"]
    with start_tool(*words, "--workers", "10", "--results", str(tmp_path / "r"), hub=new_hub) as run:
        wait_until(lambda: len(tool_users(new_hub)) == 10)
        if moment == "while both send":
            wait_until(lambda: reported() == 10)
        time.sleep(0.3 if moment == "after 0.3 s" else 0)
        os.killpg(run.pid, number)  # as a terminal does
        done = run.outcome(60)
    found = results_in(tmp_path / "r", done)
    assert done.code == code and done.stdout.startswith("INTERRUPTED: ")
    assert found["users"]["left_behind"] == [] and not tool_users(new_hub)
    assert moment != "while both send" or found["operations"]["activity"]["count"] >= 10


# ==== The exit code ==================================================================================================

EXIT_CODES = [
    # left on the hub, interrupted, cut short, failed
    (True, None, False, False, ExitCode.LEFT_BEHIND),
    (True, None, True, True, ExitCode.LEFT_BEHIND),
    (True, signal.SIGINT, False, True, ExitCode.LEFT_BEHIND),
    (True, signal.SIGTERM, True, False, ExitCode.LEFT_BEHIND),
    (False, signal.SIGINT, False, False, ExitCode.SIGINT),
    (False, signal.SIGINT, True, True, ExitCode.SIGINT),
    (False, signal.SIGTERM, False, True, ExitCode.SIGTERM),
    (False, signal.SIGTERM, True, False, ExitCode.SIGTERM),
    (False, None, True, False, ExitCode.FAILED),
    (False, None, True, True, ExitCode.FAILED),
    (False, None, False, True, ExitCode.FAILED),
    (False, None, False, False, ExitCode.OK),
]


@pytest.mark.parametrize(("left", "interrupted_by", "cut_short", "failed", "code"), EXIT_CODES)
def test_the_exit_code(left: bool, interrupted_by: int | None, cut_short: bool, failed: bool, code: ExitCode) -> None:
    assert hst.exit_code(left, interrupted_by, cut_short, failed) is code


def test_the_table_of_exit_codes_is_the_one_in_the_docstring() -> None:
    """Each combination is decided by the first row that it fits."""
    lines = re.findall(r"^ *\| (.*) \|$", hst.exit_code.__doc__ or "", re.MULTILINE)
    header, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    assert header == ["left on the hub", "interrupted", "cut short", "failed", "code"] and len(rows) == 6
    words: list[dict[str, Any]] = [
        {"yes": True, "no": False},
        {"no": None, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM},
        {"yes": True, "no": False},
        {"yes": True, "no": False},
    ]
    for said in itertools.product(*words):
        fitting = (row for row in rows if all(cell in ("any", word) for cell, word in zip(row, said)))
        assert hst.exit_code(*(meaning[word] for meaning, word in zip(words, said))) == int(next(fitting)[-1])


def test_conditions_decide_the_exit_code_and_replace_the_default(new_hub: LocalHub) -> None:
    failing = ("stress-test", "-c", "10", "--profile", '{"fail_rate": 0.2}')
    assert run_tool(*failing, hub=new_hub).code == 1
    allowed = run_tool(*failing, "--fail-if", "failed_rate > 25%", hub=new_hub)
    assert allowed.code == 0 and "✓ failed_rate 20.0 % (fails above 25 %)" in allowed.summary
    refused = run_tool("--fail-if", "failed > 5", *failing, "--fail-if", "server_ready.p95 > 1ms", hub=new_hub)
    assert refused.code == 1
    assert "✓ failed 2 (fails above 5)" in refused.summary
    assert re.search(r"✗ server_ready\.p95 \d.* \(fails above 1 ms\)", refused.summary)


def test_a_run_that_was_cut_short_has_failed_whatever_fail_if_says(new_hub: LocalHub, tmp_path: Path) -> None:
    """The answer to a request for users is lost, and the hub will not say which of them there are."""
    creates, lists = matching("POST", "/users$"), matching("GET", r"/users\?")
    lost: list[Request] = []

    def rule(request: Request) -> Answer | None:
        if creates(request) and not lost:
            lost.append(request)
            return AnswerAfter(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})
        if lists(request) and len(lost) == 1:
            lost.append(request)
            return hub_answer(500, b'{"status": 500, "message": "database is locked"}')
        return None

    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = rule
        words = ("stress-test", "-c", "3", "--fail-if", "list_users.p95 > 100s")
        where = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        done, found = run_for_results(tmp_path / "r", *words, hub=new_hub, env=where)
    assert done.code == 1
    assert "the hub refused to list its users: 500 (database is locked)" in done.summary
    assert [(one["condition"], one["held"]) for one in found["conditions"]] == [("list_users.p95 > 100s", False)]
    assert found["users"]["deleted"] == 3 and found["users"]["left_behind"] == [] and not tool_users(new_hub)


# ==== The baseline ===================================================================================================


def test_a_baseline_is_set_beside_the_run(new_hub: LocalHub, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    run_for_results(before, "stress-test", "-c", "3", hub=new_hub)
    words = ("stress-test", "-c", "3", "--baseline", str(before))
    done = run_tool(*words, "--fail-if", "server_ready.p95 > 1000x", hub=new_hub)
    assert done.code == 0
    assert re.search(r"^against baseline +p50 +p95 +max +failed$", done.stdout, re.MULTILINE)
    assert re.search(r"^server ready +\S+→\S+ \d+\.\d\dx .* 0→0$", done.stdout, re.MULTILINE)
    assert run_tool(*words, "--fail-if", "server_ready.p95 > 0.001x", hub=new_hub).code == 1


# ==== As text and as HTML ============================================================================================


def run_here(hub: LocalHub, **plan: Any) -> hst.Results:
    """Results of a run in this process."""
    return hst.carry_out(hst.Plan(token=hst.Secret(hub.token), endpoint=hub.endpoint, **plan))


@pytest.fixture(scope="module")
def passed(new_hub: LocalHub) -> hst.Results:
    return run_here(new_hub, count=3)


def test_results_made_without_a_command_line_say_how_many_servers_started_at_a_time(new_hub: LocalHub) -> None:
    for asked, batch_size in (({"batch_size": 2}, 2), ({}, 10)):
        results = run_here(new_hub, count=3, **asked)
        text = hst.render_summary(results)
        assert f"3 requested, {batch_size} at a time; 3 ready, 0 failed" in text and "None" not in text
        assert results.options["batch_size"] == batch_size
    found = hst.run_stress_test(3, 2, new_hub.token, new_hub.endpoint)
    assert found["options"]["batch_size"] == 2 and found["servers"]["ready"] == 3
    jsonschema.validate(found, SCHEMA)


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_one_of_anything_is_singular(command: str, new_hub: LocalHub) -> None:
    page = hst.render_summary(run_here(new_hub, command=command, count=1, keep=command == hst.ACTIVITY))
    hst.purge_users(new_hub.token, new_hub.endpoint)
    assert not re.findall(r"\b1 (?:users|servers|people|activity reports|requests|retries|were|ARE)\b", page)


@pytest.fixture
def slow_results(passed: hst.Results) -> hst.Results:
    """Results with an operation of an awkward name that took 1,234 s."""
    record = hst.Recorder()
    for name, took_s in (("two  blanks", 1234.0), ("activity", 0.0123), ("<b>&", 1.5)):
        record.add(hst.Event(name, "x", 0.0, 0.0, took_s))
    return dataclasses.replace(passed, operations=record.summarise())


def test_a_tables_columns_are_aligned_whatever_is_in_its_cells(slow_results: hst.Results) -> None:
    section = hst.latency_section(slow_results.operations)
    lines = hst.render_summary(slow_results).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("operation "))
    ends = [lines[at].index(column) + len(column) for column in section.header]
    assert "20 min 34 s" in section.rows[-1] and section.rows[-1][0] == "two  blanks"
    assert len(lines[at + 1 :]) == len(section.rows) == 3
    for line, cells in zip(lines[at + 1 :], section.rows):
        assert line.startswith(cells[0] + "  ")
        for cell, end in zip(cells[1:], ends[1:]):
            assert line[:end].endswith("  " + cell) and line[end : end + 2].strip() == ""


def test_a_table_in_html_has_each_cell_once_and_whole(slow_results: hst.Results) -> None:
    section = hst.latency_section(slow_results.operations)
    page = hst.section_html(section)
    rows = re.findall("<tr>(.*?)</tr>", page)
    shown = [tuple(map(html.unescape, re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row))) for row in rows]
    assert shown == [tuple(section.header), *map(tuple, section.rows)]
    assert "&lt;b&gt;&amp;" in page


def test_the_summary_is_wrapped_between_words_only_and_says_the_same_in_any_width(passed: hst.Results) -> None:
    facts = dataclasses.replace(passed, operations={})  # whose table is not wrapped
    narrow, wide = (hst.render_summary(facts, width=width) for width in (60, 1000))
    assert narrow.split() == wide.split()
    assert max(map(len, narrow.splitlines())) <= 60 < max(map(len, wide.splitlines()))


def test_a_file_that_cannot_be_written_any_more_does_not_cost_the_summary(new_hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with start_tool("stress-test", "-c", "2", "--hold", "3s", "--results", str(folder / "r"), hub=new_hub) as run:
        wait_until(lambda: len(tool_users(new_hub)) == 2)
        folder.rmdir()
        done = run.outcome(60)
    assert done.code == 1 and done.stdout.startswith("FAILED: 2 of 2")
    said = f"--results {folder}/r could not be written: No such file or directory"
    assert f"because {said}" in re.sub(" +", " ", done.summary) and said in done.stderr
    assert not tool_users(new_hub)


@pytest.mark.parametrize("code", [0, 4, 130, 143])
def test_a_file_that_cannot_be_written_keeps_the_worse_code(code: int, passed: hst.Results, tmp_path: Path) -> None:
    plan = hst.Plan(report=str(tmp_path / "gone" / "r.html"), results=str(tmp_path / "r.json"))
    found = hst.write_files(plan, dataclasses.replace(passed, exit_code=code))
    written = json.loads((tmp_path / "r.json").read_text())  # the other file
    assert written["exit_code"] == found.exit_code == (code or 1)
    assert written["warnings"] == [f"--report {plan.report} could not be written: No such file or directory"]


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


@pytest.mark.parametrize("closing", ["| head -1", ">&-", "| true"])
def test_a_closed_standard_output_is_no_bug(closing: str) -> None:
    words = f"{sys.executable} {MODULE} --dry-run stress-test -c 1"
    script = f"set -o pipefail; {words} {closing}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Error" not in done.stderr
