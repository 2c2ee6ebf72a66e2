"""People come to the local hub through a real proxy, which can fail by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from localhub import LocalHub
from processes import processes_in
from tool import wait_until

LAUNCHER = [sys.executable, str(Path(__file__).with_name("localhub.py"))]


def visit(hub: LocalHub, path: str, token: str | None = None) -> requests.Response:
    headers = {"Authorization": f"token {token}"} if token else {}
    return requests.get(hub.public_url + path, headers=headers, allow_redirects=False, timeout=30)


def start_server(hub: LocalHub, name: str) -> None:
    hub.call("POST", f"/users/{name}")
    hub.call("POST", f"/users/{name}/server")
    wait_until(lambda: hub.users()[name]["servers"].get("", {}).get("ready"))


def test_a_server_has_its_route_from_before_it_is_ready_until_it_is_stopped() -> None:
    with LocalHub(real_proxy=True, stub_labs=True, base_url="/deep/", spawn_s=0.5, slow_spawn_timeout_s=0) as hub:
        hub.call("POST", "/users/zoe")
        away = visit(hub, "user/zoe/")
        start_server(hub, "zoe")
        there = visit(hub, "user/zoe/")
        hub.call("DELETE", "/users/zoe/server")
        wait_until(lambda: not hub.users()["zoe"]["servers"])
        gone = visit(hub, "user/zoe/")
        assert [(got.status_code, got.headers["Location"]) for got in (away, there, gone)] == [
            (302, "/deep/hub/user/zoe/"),
            (302, "/deep/user/zoe/lab?"),
            (302, "/deep/hub/user/zoe/"),
        ]
        assert "/deep/user/zoe" not in hub.proxy.routes()


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    """A hub behind a proxy, on which zoe's server runs: a test leaves it so."""
    with LocalHub(real_proxy=True, stub_labs=True) as hub:
        start_server(hub, "zoe")
        yield hub


def test_the_hub_is_reached_through_the_proxy_and_its_own_port_leads_to_no_server(hub: LocalHub) -> None:
    for endpoint in (hub.endpoint, hub.hub_endpoint):
        assert requests.get(f"{endpoint}/", timeout=30).json()["version"]
    assert hub.environment["JUPYTERHUB_ENDPOINT"] == hub.endpoint == f"{hub.public_url}hub/api"
    direct = hub.hub_endpoint.removesuffix("/hub/api") + "/user/zoe/api/status"
    answer = requests.get(direct, allow_redirects=False, timeout=30)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/hub/user/zoe/api/status")


def test_servers_are_entered_with_the_token_for_visits_and_not_with_the_one_that_makes_users(hub: LocalHub) -> None:
    tokens = [hub.environment[name] for name in ("JUPYTERHUB_VISIT_TOKEN", "JUPYTERHUB_API_TOKEN")]
    assert [visit(hub, "user/zoe/lab", token).status_code for token in tokens] == [200, 403]
    users = requests.get(f"{hub.endpoint}/users", headers={"Authorization": f"token {tokens[0]}"}, timeout=30)
    assert users.status_code == 403


def test_a_proxy_that_was_killed_refuses_connections_and_comes_back_with_its_routes(hub: LocalHub) -> None:
    before, routes = hub.proxy.pid, hub.proxy.routes().keys()
    hub.stop_proxy()
    with pytest.raises(requests.ConnectionError):
        visit(hub, "user/zoe/")
    assert hub.users()["zoe"]["servers"]  # the hub itself is there
    hub.start_proxy()
    assert hub.proxy.pid != before and hub.proxy.routes().keys() == routes
    assert visit(hub, "user/zoe/lab", hub.visit_token).status_code == 200


def test_an_older_proxy_can_be_asked_for() -> None:
    with LocalHub(real_proxy=True, stub_labs=True, proxy_version="4.6.3") as hub:
        start_server(hub, "zoe")
        assert visit(hub, "user/zoe/lab", hub.visit_token).status_code == 200
        metrics = requests.get(f"http://127.0.0.1:{hub.proxy.metrics_port}/metrics", timeout=30)
        assert "process_open_fds" in metrics.text


@pytest.mark.parametrize("servers", ["real_servers", "stub_labs"])
def test_nothing_runs_when_the_hub_has_ended(servers: str) -> None:
    with LocalHub(real_proxy=True, **{servers: True}) as hub:
        start_server(hub, "zoe")
        headers = {"Authorization": f"token {hub.visit_token}"}
        kernel = requests.post(f"{hub.public_url}user/zoe/api/kernels", json={}, headers=headers, timeout=30)
        assert kernel.status_code == 201
        directory = hub.log_path.parent
        running = processes_in(directory)
        assert {hub.pid, hub.proxy.pid} < set(running)
        assert len(running) == (4 if servers == "real_servers" else 3)
    assert not processes_in(directory) and not directory.exists()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in running))  # init reaps orphans when it likes


@pytest.mark.parametrize("servers", ["--real-servers", "--stub-labs"])
def test_a_killed_launcher_leaves_no_proxy_and_no_servers(servers: str, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([*LAUNCHER, "--real-proxy", servers], env=environment, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout
        assert launcher.stdout.readline().startswith(b"export JUPYTERHUB_ENDPOINT=")
        assert len(processes_in(tmp_path)) >= 2
        launcher.send_signal(signal.SIGKILL)
    wait_until(lambda: not processes_in(tmp_path))
