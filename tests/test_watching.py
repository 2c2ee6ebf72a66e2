"""What is seen while a run goes on and after it: progress, summary, the hub's own figures, where the time went."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import site
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MODULE, run_tool, tool_users
from fault_proxy import Delay, FaultProxy, every, matching
from localhub import LocalHub

import hub_stress_test as hst

SLOW = ("--profile", '{"spawn_s": 6}')


def run_and_read(path: Path, *words: str, hub: LocalHub, **more: Any) -> tuple[str, dict[str, Any]]:
    """The summary and the results of a run."""
    done = run_tool(*words, "--results", str(path), hub=hub, **more)
    return flat(done.stdout), json.loads(path.read_text())


def flat(summary: str) -> str:
    """The summary with its long lines in one piece."""
    return re.sub(r"\n {10}(?=\S)", " ", summary)


def on_a_terminal(*words: str, hub: LocalHub, env: dict[str, str] | None = None) -> tuple[str, str]:
    """What a run wrote to standard output and to standard error, both terminals."""
    ends = [pty.openpty() for _ in range(2)]
    for _, theirs in ends:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    said: list[list[bytes]] = [[], []]

    def listen(end: int, into: list[bytes]) -> None:
        while True:
            try:
                into.append(os.read(end, 65536))
            except OSError:  # the other end is closed
                return

    environment = os.environ | hub.environment | {"TERM": "xterm"} | (env or {})
    process = subprocess.Popen(
        [sys.executable, MODULE, *words], env=environment, stdin=-3, stdout=ends[0][1], stderr=ends[1][1]
    )
    listeners = [threading.Thread(target=listen, args=(ends[n][0], said[n])) for n in range(2)]
    for (_, theirs), listener in zip(ends, listeners):
        os.close(theirs)
        listener.start()
    assert process.wait(60) == 0
    for (ours, _), listener in zip(ends, listeners):
        listener.join()
        os.close(ours)
    return b"".join(said[0]).decode(), b"".join(said[1]).decode()


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, Any]:
    """An environment in which Python finds requests and urllib3 with what they need, and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("requests", "urllib3", "idna", "certifi", "charset_normalizer"):
        (folder / name).symlink_to(next(Path(p) / name for p in site.getsitepackages() if (Path(p) / name).exists()))
    return {"PYTHONPATH": str(folder), "python": ("-S",)}


# -- progress --


def test_on_a_terminal_each_phase_has_a_bar_and_the_summary_a_colour(new_hub: LocalHub) -> None:
    stdout, stderr = on_a_terminal("stress-test", "-c", "12", hub=new_hub)
    assert stdout.startswith("\033[1;32mPASSED\033[0m: 12 of 12")
    for phase in ("creating users", "starting servers", "removing users"):
        assert re.search(rf"\r{phase}: 100%\|.*12/12", stderr), stderr
    logged = [line for line in re.split(r"[\r\n]", stderr) if " INFO " in line]
    assert logged and not any("|" in line for line in logged)  # log lines and bars keep out of each other's way


def test_no_color_is_respected_and_a_pipe_gets_none(new_hub: LocalHub) -> None:
    stdout, _ = on_a_terminal("purge", hub=new_hub, env={"NO_COLOR": "1"})
    assert stdout.startswith("PASSED") and "\033" not in stdout
    done = run_tool("purge", hub=new_hub)
    assert "\033" not in done.stdout + done.stderr


def test_without_a_terminal_a_calm_line_says_how_far_it_is(new_hub: LocalHub) -> None:
    done = run_tool("stress-test", "-c", "1", *SLOW, hub=new_hub)
    lines = [line for line in done.stderr.splitlines() if line.startswith("starting servers")]
    assert lines == ["starting servers: 0 of 1 done after 5 s, 0.0 per second"]
    assert done.stdout.startswith("PASSED")


def test_a_load_over_processes_tells_how_far_it_is(new_hub: LocalHub) -> None:
    words = ("--rate", "10", "--duration", "7s", "--processes", "2", "--workers", "4", "--log-to-file")
    done = run_tool("activity-stress-test", "-c", "3", *words, hub=new_hub, env={"TMPDIR": "/tmp"})
    line = re.search(r"^sending 10 per second: (\d+) of 70 done after 5 s, [\d.]+ per second, about", done.stderr, re.M)
    assert line and 30 <= int(line[1]) <= 60


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (("x", 300, 120, 3, 12.0), "x: 120 of 300 done, 3 failed after 12 s, 10.0 per second, about 18 s left"),
        (("x", None, 1200, 0, 10.0), "x: 1,200 done after 10 s, 120.0 per second"),
        (("x", 300, 0, 0, 5.0), "x: 0 of 300 done after 5 s, 0.0 per second"),
    ],
)
def test_progress_line(said: tuple[str, int | None, int, int, float], line: str) -> None:
    assert hst.progress_line(*said) == line


# -- the summary --


def test_a_throttled_and_failing_run_says_what_was_slow_and_what_to_look_at_next(
    make_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = make_hub(spawn_s=0.8, slow_spawn_timeout_s=0, concurrent_spawn_limit=3, fail_rate=0.2)
    done = run_tool("stress-test", "-c", "10", "-b", "10", "--results", str(tmp_path / "r"), hub=hub)
    assert max(map(len, done.stdout.splitlines())) <= 100 and done.stdout.count("\n") <= 45
    summary, found = flat(done.stdout), json.loads((tmp_path / "r").read_text())
    assert summary.startswith("FAILED: 8 of 10 servers became ready; half waited ")
    assert "\nfailed    2 × no node has 4 GB of memory free\n" in summary
    slow = found["servers"]["slowest"]
    assert [one["message"] for one in slow] == ["Pulling the image"] * 5 and slow[0]["throttled"]
    assert f"slowest   {hst.duration_text(slow[0]['ready_s'])}, {slow[0]['user']}: throttled " in summary
    assert "\nnext      the hub throttled: raise its concurrent_spawn_limit" in summary
    assert "of a mean wait of" in summary and "passed while it throttled" in summary


def test_a_server_that_is_not_ready_in_time_fails_with_the_hubs_last_word(make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(hang_rate=1.0, slow_spawn_timeout_s=0)
    done = run_tool("stress-test", "-c", "2", "--server-timeout", "2s", hub=hub)
    assert done.code == 1 and not tool_users(hub)
    assert "failed    2 × not ready after 2 s; the hub said: Pulling the image" in done.stdout
    assert "allow more by --server-timeout" in flat(done.stdout)


@pytest.mark.parametrize(
    ("said", "until_s", "longest"),
    [
        ([], 9.0, ""),
        ([(0.0, "asked")], 9.0, "asked"),
        ([(0.0, "asked"), (1.0, "pulling"), (7.0, "started")], 8.0, "pulling"),
        ([(0.0, "asked"), (1.0, "pulling"), (2.0, "started")], 8.0, "started"),
    ],
)
def test_longest_message(said: list[tuple[float, str]], until_s: float, longest: str) -> None:
    assert hst.longest_message(said, until_s) == longest


def test_reasons_that_differ_in_the_pods_name_only_are_one() -> None:
    names = ["hub-stress-test-7", "hub-stress-test-12"]
    pods = ["pod jupyter-hub-stress-test-7---0f3a77c1 pending", "pod jupyter-hub-stress-test-12---9b3a77cf pending"]
    starts = [hst.ServerStart(name, None, reason=pod) for name, pod in zip(names, pods)]
    old = [hst.ServerStart(name, None, reason=f"pod jupyter-{name.replace('-', '-2d')} pending") for name in names]
    assert {start.general_reason for start in starts + old} == {"pod jupyter-<user> pending"}


def test_too_few_samples_show_no_percentile(new_hub: LocalHub) -> None:
    rows = run_tool("stress-test", "-c", "20", "-b", "20", hub=new_hub).stdout.splitlines()
    mean, p50, p95, p99, most = next(row for row in rows if row.startswith("server ready"))[31:].split("  ")[-5:]
    assert p99.strip() == "–" and "–" not in mean + p50 + p95 + most


# -- the hub's own side --


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has used, as the system counts them."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_hubs_figures_agree_with_the_systems_and_with_its_metrics_page(hub: LocalHub, tmp_path: Path) -> None:
    before_s, began_s = cpu_of(hub.pid), time.monotonic()
    summary, found = run_and_read(tmp_path / "r", "stress-test", "-c", "15", "-b", "5", hub=hub)
    used_s, took_s = cpu_of(hub.pid) - before_s, time.monotonic() - began_s
    rss = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{hub.pid}/status").read_text())[1]) * 1024  # type: ignore[index]
    own = found["hub"]["metrics"]
    assert found["hub"]["restarts"] == 0 and found["hub"]["metrics_missing"] is None
    assert 0.5 * used_s <= own["cpu_s"] <= used_s + 0.05  # the tool's own start is not in it
    assert own["cpu_s"] / took_s <= own["cpu_share"] <= 1.1
    assert abs(own["rss_after_bytes"] - rss) < 0.1 * rss and own["rss_max_bytes"] >= own["rss_before_bytes"]
    assert own["spawns"]["success"]["count"] == 15
    assert own["requests"]["POST UserServerAPIHandler"]["count"] == 15
    assert own["requests"]["DELETE UserServerAPIHandler"]["count"] == 15
    assert own["requests"]["GET UserAPIHandler"]["count"] == found["operations"]["ping"]["count"]
    if found["hub"]["version"] == "4.1.6":
        assert own["event_loop_lag_p95_s"] is None
    else:
        assert 0.05 <= own["event_loop_lag_p95_s"] <= own["event_loop_lag_max_s"]
    assert f"hub's own CPU {own['cpu_s']:.1f} s, " in summary


def test_a_restart_of_the_hub_is_seen(make_hub: Callable[..., LocalHub], tmp_path: Path) -> None:
    hub = make_hub(database=str(tmp_path / "hub.sqlite"))
    restart = threading.Timer(3.0, hub.restart)
    restart.start()
    words = ("-c", "3", "--rate", "5", "--duration", "8s", "--fail-if", "failed_rate > 90%")
    summary, found = run_and_read(tmp_path / "r", "activity-stress-test", *words, hub=hub)
    restart.join()
    assert found["hub"]["restarts"] == 1 and not tool_users(hub)
    assert "the hub restarted during the run\n" in summary
    assert 0 < found["hub"]["metrics"]["cpu_s"] < 8


def test_without_the_scope_the_summary_says_once_what_it_would_add(
    make_hub: Callable[..., LocalHub], tmp_path: Path
) -> None:
    hub = make_hub(scopes=("admin:users", "servers"))
    summary, found = run_and_read(tmp_path / "r", "stress-test", "-c", "2", hub=hub)
    assert found["hub"]["metrics"] is None and found["hub"]["restarts"] is None
    assert summary.count("read:metrics") == 1
    assert "CPU, memory, event-loop lag" in summary and found["exit_code"] == 0


def test_with_nothing_but_its_two_needs_it_does_its_whole_job_and_says_what_is_missing(
    new_hub: LocalHub, tmp_path: Path, bare: dict[str, Any]
) -> None:
    python, env = bare.pop("python"), bare
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTERHUB")}
    words = [sys.executable, *python, str(MODULE), "stress-test", "-c", "2"]
    environment = clean | new_hub.environment | env
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "2 of 2 servers" in done.stdout
    assert "pip install prometheus-client" in done.stdout and not tool_users(new_hub)
    before = new_hub.users()
    report = tmp_path / "report.html"
    done = subprocess.run(
        [*words, "--report", str(report)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "") and "pip install plotly" in done.stderr
    assert not report.exists() and new_hub.users() == before


BUCKETS = [(0.05, 90.0), (0.1, 95.0), (0.5, 100.0), (float("inf"), 100.0)]


@pytest.mark.parametrize(
    ("buckets", "share", "value"),
    [
        ([], 0.5, None),
        ([(0.05, 0.0), (float("inf"), 0.0)], 0.5, None),
        (BUCKETS, 0.45, 0.025),
        (BUCKETS, 0.95, 0.1),
        (BUCKETS, 1.0, 0.5),
        ([(0.05, 1.0), (float("inf"), 2.0)], 1.0, 0.05),
    ],
)
def test_quantile(buckets: list[tuple[float, float]], share: float, value: float | None) -> None:
    assert hst.quantile(buckets, share) == pytest.approx(value)


def shot(at_s: float, started: float, cpu: float, **more: float) -> hst.Snapshot:
    names = {"process_start_time_seconds": started, "process_cpu_seconds_total": cpu}
    samples = [(name, {}, value) for name, value in (names | more).items()]
    samples.append(("myhub_request_duration_seconds_count", {"handler": "a.B", "method": "GET", "code": "200"}, cpu))
    samples.append(("myhub_request_duration_seconds_count", {"handler": "a.B", "method": "GET", "code": "429"}, 99.0))
    samples.append(("myhub_request_duration_seconds_sum", {"handler": "a.B", "method": "GET", "code": "200"}, cpu / 2))
    return hst.snapshot(samples, at_s)


def test_counters_go_on_after_a_restart() -> None:
    shots = [shot(0, 1, 5.0), shot(5, 1, 8.0), shot(10, 2, 1.0), shot(15, 2, 2.0)]
    assert hst.grown(shots, "process_cpu_seconds_total") == 3 + 1 + 1
    assert hst.cpu_shares(shots) == [(5, 0.6), (10, 0.2), (15, 0.2)]
    found = hst.hub_metrics(shots, 6.0, 0)
    assert found and (found["cpu_s"], found["cpu_share"], found["cpu_share_max"]) == (5, 5 / 15, 0.6)
    assert found["requests"] == {"GET B": {"count": 5, "mean_s": 0.5}} and found["event_loop_lag_p95_s"] is None
    assert hst.hub_metrics(shots[:1], 6.0, 0) is None


def test_a_short_stretch_of_cpu_is_joined_to_the_next() -> None:
    shots = [shot(0, 1, 0.0), shot(0.1, 1, 0.1), shot(2, 1, 1.0)]
    assert hst.cpu_shares(shots) == [(2, 0.5)]
    assert hst.cpu_shares(shots[:2]) == [(0.1, pytest.approx(1.0))]


# -- on which side the time was spent --


def test_a_slow_way_to_the_hub_is_told_from_a_slow_hub(new_hub: LocalHub, tmp_path: Path) -> None:
    direct, _ = run_and_read(tmp_path / "r", "stress-test", "-c", "4", "--profile", '{"spawn_s": 1}', hub=new_hub)
    assert "not in the hub but in front of it" not in direct and "by the hub's own clock" in direct
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(matching("GET", ".*/users/.*"), Delay(0.15))
        env = {"JUPYTERHUB_ENDPOINT": f"{proxy.url}/hub/api"}
        words = ("stress-test", "-c", "4", "--profile", '{"spawn_s": 1}')
        behind, _ = run_and_read(tmp_path / "r", *words, hub=new_hub, env=env)
    assert "not in the hub but in front of it" in behind


def spent(cpu_share: float, client_s: float, hub_s: float) -> str:
    """What is said of pings that took so long."""
    own = {"cpu_share_max": cpu_share, "spawns": {}, "requests": {"GET UserAPIHandler": {"count": 9, "mean_s": hub_s}}}
    results = {
        "capacity": None,
        "hub": {"metrics": own},
        "operations": {"ping": {"count": 9, "latency_s": {"mean": client_s}}},
    }
    (sentence,) = hst.time_spent(results)
    return sentence.partition(": most of it was spent ")[2]


def test_where_a_request_spent_its_time() -> None:
    assert spent(0.3, 0.100, 0.090) == "in the hub"
    assert spent(0.3, 0.020, 0.006) == "elsewhere, but so little that it does not matter"
    assert spent(0.3, 0.100, 0.010).startswith("not in the hub but in front of it")
    assert spent(0.95, 0.100, 0.010).startswith("waiting for the hub")


# -- the timeline --


def test_a_timeline_keeps_everything_in_few_spans() -> None:
    line, other = hst.Timeline(), hst.Timeline()
    for n in range(10_000):
        (line if n % 2 else other).add(1000 + n * 0.5, 0.1 + n / 10_000)
    line.merge(other)
    assert len(line.spans) <= line.SPANS and line.span_s == 32
    assert line.total().count == 10_000 and line.total().min_s == 0.1
    assert all(span.count <= 64 for span in line.spans.values())
    first, last = line.spans[1000 // 32], line.spans[5999 // 32]
    assert first.max_s < 0.11 and last.min_s > 1.09


def test_the_results_show_what_happened_when(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "6", "-b", "2", "--profile", '{"spawn_s": 1.1}')
    _, found = run_and_read(tmp_path / "r", *words, hub=new_hub)
    line = found["timeline"]
    servers, ready = line["servers"], line["operations"]["server_ready"]
    assert len(set(servers["user"])) == 6 and all(servers["ready"])
    assert sum(ready["count"]) == sum(ready["often"]) == 6 and sum(ready["failed"]) == 0
    for due, asked, ended in zip(servers["due_s"], servers["asked_s"], servers["ended_s"]):
        assert due <= asked and 1.1 <= ended - asked <= 3 and ended <= line["load_ended_s"]
    assert line["hub"]["at_s"] == sorted(line["hub"]["at_s"]) and len(line["hub"]["at_s"]) >= 3
    curves = hst.server_curves(servers, line["load_ended_s"], points=50)
    assert [curves[kind][-1] for kind in ("waiting", "starting", "ready", "failed")] == [0, 0, 6, 0]
    assert max(curves["starting"]) == 2 and curves["ready"] == sorted(curves["ready"])
