"""What a signal does, wherever the program is: load ends at once, what was made is removed, and the end says so."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hub_stress_test as hst
from fault_proxy import Fault, FaultProxy, Request, Silence, matching
from localhub import LocalHub
from tool import MODULE, Outcome, results_in, start_tool, tool_users, wait_until

SITE = hst.Site(hst.Hub("http://x/hub/api", hst.get_session("x")), hst.Plan(), hst.Recorder())
Match = Callable[[Request], bool]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def interrupt(
    hub: LocalHub, proxy: FaultProxy, words: str, match: Match, number: int = signal.SIGINT, fault: Fault | None = None
) -> Outcome:
    """A run that is sent a signal at the first matching request, to which the fault is done.

    It ends long before its load would, which is longer than anybody waits for it here, and sends no more load.
    """
    struck_s: list[float] = []
    lock = threading.Lock()
    with start_tool(*words.split(), hub=hub, proxy=proxy) as run:

        def rule(request: Request) -> Fault | None:
            with lock:
                if struck_s or not match(request):
                    return None
                struck_s.append(time.monotonic())
                run.send_signal(number)
                return fault

        proxy.rule = rule
        done = run.outcome()
    assert not [entry for entry in proxy.requests if entry.method == "POST" and entry.time > struck_s[0] + 10]
    return done


@pytest.mark.parametrize(("number", "path"), [(signal.SIGINT, "/user$"), (signal.SIGTERM, r"/users\?")])
def test_a_signal_before_anything_was_made_ends_the_program(
    number: int, path: str, new_hub: LocalHub, proxy: FaultProxy
) -> None:
    done = interrupt(new_hub, proxy, "stress-test -c 3", matching("GET", path), number, Silence())
    assert (done.code, done.stdout) == (SIGNALS[number], "")
    assert done.stderr.endswith("hub-stress-test: Interrupted; nothing was changed.\n")


LOADS = {
    "creating users": ("stress-test -c 400 -b 1", "/users$"),
    "starting servers": ('stress-test -c 6 -b 3 -p {"spawn_s":600} --server-timeout 10m', "/server$"),
    "holding servers": ("stress-test -c 2 --hold 10m", "/users/hub-stress-test-[0-9]+$"),
    "one process": ("activity-stress-test -c 5 --rate 20 --duration 10m", "/activity"),
    "two processes": ("activity-stress-test -c 5 --rate 20 --duration 10m --processes 2", "/activity"),
    "a search": ("activity-stress-test -c 5 --find-capacity --duration 10m", "/activity"),
    "a search with people": ("stress-test --find-capacity --max-servers 20 --rate 0.03 --duration 10m", "/server$"),
}


@pytest.mark.parametrize("load", LOADS)
def test_a_signal_ends_every_load_at_once(load: str, new_hub: LocalHub, proxy: FaultProxy) -> None:
    words, path = LOADS[load]
    done = interrupt(new_hub, proxy, words, matching(None, path))
    assert done.code == 130 and done.stdout.startswith("INTERRUPTED: ") and "none left" in done.summary, done
    assert not re.search("refused|would not|did not answer", done.stdout + done.stderr)  # an interrupt is no refusal
    assert not tool_users(new_hub)


def test_a_signal_after_everything_was_removed_changes_nothing(new_hub: LocalHub, proxy: FaultProxy) -> None:
    def last_look(request: Request) -> bool:
        people = [entry for entry in proxy.requests if re.search(r"/users(\?|/[^/]+$)", entry.path)]
        answered = [entry.method for entry in people if entry.status]
        gone = answered.count("DELETE") == 2 and answered[-1] == "GET"  # and the list of users was read again
        return gone and request.path.endswith("/metrics")

    done = interrupt(new_hub, proxy, "stress-test -c 2", last_look)
    assert done.code == 0 and done.stdout.startswith("PASSED: ") and "Interrupted" not in done.stderr
    assert "2 users deleted, none left" in done.summary


def test_a_terminal_that_hangs_up_leaves_nobody(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "3", "--results", str(tmp_path / "r"), "--profile", '{"spawn_s": 600}')
    with start_tool(*words, hub=new_hub) as run:
        wait_until(lambda: any(user["servers"] for user in new_hub.users().values()))
        for _ in range(2):  # of the shell and of the system
            run.send_signal(signal.SIGHUP)
        done = run.outcome()
    assert done.code == 143 and results_in(tmp_path / "r", done)["users"]["deleted"] == 3 and not tool_users(new_hub)


def test_a_terminal_that_hangs_up_is_one_sigterm() -> None:
    interruption = hst.Interruption()
    with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))):
        interruption(signal.SIGHUP, None)
    interruption._site = SITE
    for _ in range(2):
        interruption(signal.SIGHUP, None)
    assert interruption.number == signal.SIGTERM


def test_a_signal_that_is_heard_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    heard_s, left = [10.0, 10.9, 11.1], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: heard_s[0])
    monkeypatch.setattr(hst, "leave_at_once", lambda number, site: left.append(heard_s[0]))
    interruption = hst.Interruption()
    interruption._site = SITE
    while heard_s:
        interruption(signal.SIGTERM, None)
        heard_s.pop(0)
    assert left == [11.1]


def test_a_signal_while_processes_start_sends_nothing(new_hub: LocalHub, proxy: FaultProxy, tmp_path: Path) -> None:
    file = tmp_path / "slow_to_load.py"
    file.write_text(
        "import multiprocessing, pathlib, time\nif multiprocessing.parent_process():\n"
        "    pathlib.Path(__file__).with_name('begun').touch()\n    time.sleep(600)\n"
    )
    words = ("activity-stress-test", "-c", "4", "--processes", "2", "--operations", str(file), "--duration", "5s")
    with start_tool(*words, hub=new_hub, proxy=proxy) as run:
        wait_until((tmp_path / "begun").exists)
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    assert done.code == 130 and not tool_users(new_hub)
    assert not [request for request in proxy.requests if request.path.endswith("/activity")]


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGINT, True), (signal.SIGHUP, False)])
def test_of_ignored_signals_only_the_hang_up_stays_unheard(number: int, heard: bool) -> None:
    before, seen = signal.signal(number, signal.SIG_IGN), list[int]()
    try:
        with hst.on_signals(lambda number, frame: seen.append(number)):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
    assert seen == [number] * heard


def test_a_status_line_that_nobody_reads_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(hst, "STATUS_EVERY_S", 0.0)
    monkeypatch.setattr(hst.LOG, "isEnabledFor", lambda level: True)
    monkeypatch.setattr(sys.stderr, "write", write)
    with hst.progress(lambda: "cleaning up") as tell:
        tell()


def test_a_closed_standard_error_is_no_trouble(new_hub: LocalHub) -> None:
    new_hub.call("POST", "/users", {"usernames": ["hub-stress-test-1"]})
    script = f"{sys.executable} {MODULE} purge 2>&-"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | new_hub.environment, capture_output=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout.startswith(b"PASSED: 1 user removed") and not tool_users(new_hub)


def test_a_purge_that_is_left_at_once_counts_who_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[object]()
    monkeypatch.setattr(os, "write", lambda file, text: said.append(text.decode()))
    monkeypatch.setattr(os, "_exit", said.append)
    states = {"hub-stress-test-1": hst.ServerState.READY, "hub-stress-test-2": hst.ServerState.GONE}
    site = hst.Site(hst.Hub("http://x/hub/api", hst.get_session("x")), hst.Plan(hst.PURGE), hst.Recorder(), states)
    hst.leave_at_once(signal.SIGINT, site)
    assert "Up to 1 user may remain" in str(said[0]) and said[1] == 4


def fill(pipe: int) -> None:
    """Write into a pipe until nobody can who does not read it."""
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 4096)
    os.set_blocking(pipe, True)


def test_leaving_at_once_waits_for_nobody_to_read_why(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, standard_error, (reader, writer) = list[int](), os.dup(2), os.pipe()
    monkeypatch.setattr(os, "_exit", codes.append)
    fill(writer)
    os.dup2(writer, 2)
    try:
        hst.leave_at_once(signal.SIGTERM, SITE)
    finally:
        os.dup2(standard_error, 2)
        for file in (standard_error, reader, writer):
            os.close(file)
    assert codes == [143]


def test_a_signal_while_files_are_written_cuts_none_short(new_hub: LocalHub, tmp_path: Path) -> None:
    report, results = tmp_path / "report", tmp_path / "results"
    os.mkfifo(report)
    with start_tool("stress-test", "-c", "1", "--report", str(report), "--results", str(results), hub=new_hub) as run:
        with report.open("rb") as pipe:
            page = pipe.read(1)
            run.send_signal(signal.SIGINT)
            page += pipe.read()
        done = run.outcome()
    assert done.code == 0 and page.rstrip().endswith(b"</html>")
    assert results_in(results, done)["users"]["deleted"] == 1
