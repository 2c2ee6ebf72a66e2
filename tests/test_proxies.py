"""Tabs left open before real proxies, with real servers: those that lose connections are told from those that do not.

Most of the time these tests wait: for the hub to notice that a server has ended, and for what comes back by itself.
"""

from __future__ import annotations

import os
import signal
import urllib.request
from pathlib import Path

import pytest
from localhub import ROLE_SCOPES, LocalHub
from nginx import nginx
from tool import results_in, run_for_results, start_tool, tool_users, wait_until

import hub_stress_test as hst

CHECK = ("-c", "1", "--check-proxy", "--server-timeout", "3m")  # a real server takes long on a busy machine
CHECK += ("--fail-if", "failed > 0")  # a leak fails the run whatever else does

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(400)]


def open_files(hub: LocalHub) -> int:
    """How many files the hub has open, as its process has it."""
    return len(os.listdir(f"/proc/{hub.pid}/fd"))


def error_pages(hub: LocalHub) -> float:
    """How many error pages the hub drew for the proxy, as it says itself."""
    url, headers = hub.hub_endpoint.removesuffix("/api") + "/metrics", {"Authorization": f"token {hub.token}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "seconds_count" in line and "ProxyErrorHandler" in line)


@pytest.mark.parametrize(
    ("version", "verdict", "said"),
    [
        ("4.6.3", "leaking", "connections to the hub for them"),
        ("5.3.0", "clean", "the proxy kept no connection for them"),
    ],
)
def test_a_check_tells_a_proxy_that_loses_connections_from_one_that_does_not(
    version: str, verdict: str, said: str, tmp_path: Path
) -> None:
    with LocalHub(real_proxy=True, proxy_version=version, real_servers=True) as hub:
        before = open_files(hub)
        done, found = run_for_results(tmp_path / "r", "stress-test", *CHECK, hub=hub)
        held, pages = open_files(hub) - before, error_pages(hub)
        assert not tool_users(hub)
    leaks = verdict == "leaking"
    check = found["proxy_check"]
    assert (check["verdict"], check["leaking"], done.code) == (verdict, leaks, leaks), done
    assert said in check["reason"] and check["handshakes"] <= 120
    assert f"proxy {verdict}: " in " ".join(done.summary.split())
    assert ("upgrade it" in done.stdout) == leaks
    if leaks:  # by what the hub and its process say themselves
        assert held >= 0.8 * 20 and pages >= held - 10
    else:
        assert held < 20 and pages <= 2


def test_without_the_hubs_figures_an_affected_proxy_is_known_by_its_answers_behind_nginx_too(tmp_path: Path) -> None:
    scopes = tuple(scope for scope in ROLE_SCOPES if scope != "read:metrics")
    with (
        LocalHub(real_proxy=True, proxy_version="4.6.3", real_servers=True, scopes=scopes) as hub,
        nginx(hub.public_url, tmp_path) as (url, authority),
    ):
        env = {"JUPYTERHUB_ENDPOINT": f"{url}hub/api", "REQUESTS_CA_BUNDLE": str(authority)}
        done, found = run_for_results(tmp_path / "r", "stress-test", *CHECK, hub=hub, env=env)
        assert not tool_users(hub)
    assert (found["proxy_check"]["verdict"], found["proxy_check"]["open_files"], done.code) == ("leaking", None, 1)
    assert found["aftermath"] is None and "closed them without an answer" in found["proxy_check"]["reason"]


@pytest.mark.parametrize(("version", "leaks"), [("4.6.3", True), ("5.3.0", False)])
def test_people_who_leave_their_tabs_open_fail_the_run_before_a_proxy_that_loses_connections_alone(
    version: str, leaks: bool, tmp_path: Path
) -> None:
    words = ["-c", "12", "-b", "3", "--leave-open", "0.834", "--server-timeout", "5m"]  # ten of them
    kind = "real_servers" if leaks else "stub_labs"
    with LocalHub(real_proxy=True, proxy_version=version, **{kind: True}) as hub:
        done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=hub)
        pages = error_pages(hub)
        assert not tool_users(hub)
    assert (done.code, found["aftermath"]["leaking"], found["failed"]) == (leaks, leaks, 0), done
    assert found["people"]["at_work"] == 12 and found["users"]["deleted"] == 12
    assert (found["tabs"]["ended_by_themselves"], found["tabs"]["stopped"]) == (5, 5)
    answers = found["operations"]["tab_websocket"]["errors"]
    assert answers["302"] >= 5 * 5  # of the five that were stopped
    closed = answers.get(hst.CLOSED_UNANSWERED, 0)
    assert (closed >= 10 and pages == closed + 5) if leaks else (not closed and answers["503"] >= 10 and pages == 5)
    assert found["tabs"]["lost_connections"] in range(closed - 2, closed + 1) if leaks else closed == 0
    assert ("nobody uses" in done.summary) == ("once the leak was proven" in done.summary) == leaks


def test_ctrl_c_closes_every_tab_at_once(tmp_path: Path) -> None:
    words = ["-c", "8", "--leave-open", "1", "--settle", "1m"]
    with LocalHub(real_proxy=True, proxy_version="5.0.1", stub_labs=True) as hub:  # which does not answer half of them
        with start_tool("stress-test", *words, "--results", str(tmp_path / "r"), hub=hub) as run:

            def waiting() -> bool:
                sockets = Path(f"/proc/{run.pid}/fd").iterdir()
                return sum("socket" in os.readlink(one) for one in sockets) >= 4 and error_pages(hub) >= 4

            wait_until(waiting, 120)
            run.send_signal(signal.SIGINT)
            done = run.outcome(30)
        assert done.code == 130 and not tool_users(hub)
    assert results_in(tmp_path / "r", done)["users"]["deleted"] == 8


def test_a_tab_of_lab_4_6_soon_asks_for_its_kernel_alone(tmp_path: Path) -> None:
    words = ["-c", "2", "--leave-open", "1", "--tab", "lab-4.6", "--settle", "40s"]
    with LocalHub(real_proxy=True, stub_labs=True) as hub:
        done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=hub)
        assert done.code == 0 and not tool_users(hub), done
    operations = found["operations"]
    assert operations["tab_websocket"]["count"] >= 8 and operations["tab_poll"]["count"] >= 2
    assert found["tabs"]["lost_connections"] == 0  # though each poll of an ended server drew an error page
    assert set(operations["tab_poll"]["errors"]) <= {"424", "503"}  # through a redirect to the hub, and of its route


def test_tabs_are_left_open_on_a_hub_that_hides_its_figures_and_nothing_is_said_to_be_proven(tmp_path: Path) -> None:
    scopes = tuple(scope for scope in ROLE_SCOPES if scope != "read:metrics")
    words = ["-c", "2", "--leave-open", "1", "--settle", "4s"]
    with LocalHub(real_proxy=True, proxy_version="4.6.3", stub_labs=True, scopes=scopes) as hub:
        done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=hub)
        asked, _ = run_for_results(tmp_path / "r", "stress-test", *words, "--fail-if", "aftermath.leaking > 0", hub=hub)
        assert not tool_users(hub)
    assert done.code == 0 and found["aftermath"] is None and "nothing proves" in done.summary, done
    assert asked.code == 1 and "it is not measured" in asked.summary, asked
