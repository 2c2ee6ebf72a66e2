"""The check of real proxies, with real servers: those that lose connections are told from those that do not.

Most of the time these tests wait for what the proxy keeps to come back by itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hub_stress_test as hst
from localhub import ROLE_SCOPES, LocalHub
from nginx import nginx
from tool import run_for_results, tool_users

CHECK = ("-c", "1", "--check-proxy", "--server-timeout", "3m")  # a real server takes long on a busy machine
CHECK += ("--fail-if", "failed > 0")  # a leak fails the run whatever else does

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(400)]


def open_files(hub: LocalHub) -> int:
    """How many files the hub has open, as its process has it."""
    return len(os.listdir(f"/proc/{hub.pid}/fd"))


def error_pages(hub: LocalHub) -> float:
    """How many error pages the hub drew for the proxy, as it says itself."""
    url = hub.hub_endpoint.removesuffix("/api") + "/metrics"
    lines = hst.get_session(hub.token).get(url).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if "seconds_count" in line and "ProxyErrorHandler" in line)


@pytest.mark.parametrize(
    ("version", "verdict", "said"),
    [
        ("4.6.3", "leaking", "connections to the hub for them"),
        ("5.3.0", "clean", "the proxy kept no connection for them"),
    ],
)
def test_a_check_finds_the_proxy_that_loses_connections(version: str, verdict: str, said: str, tmp_path: Path) -> None:
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


def test_without_figures_the_answers_show_a_leak_behind_nginx_too(tmp_path: Path) -> None:
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
