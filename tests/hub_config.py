"""The configuration of the local hub, loaded inside its process: see local_hub.py for what the options mean."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from json import loads
from types import SimpleNamespace
from typing import Any

import jupyterhub
from jupyterhub.proxy import Proxy
from jupyterhub.spawner import SimpleLocalProcessSpawner, Spawner
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest, ResponseStartLine

OPTIONS = SimpleNamespace(**loads(os.environ["LOCAL_HUB"]))
HAS_ROLES = jupyterhub.version_info[0] >= 2


class NoProxy(Proxy):
    """Routes in a dictionary: everybody asks the hub itself."""

    should_start = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.routes: dict[str, dict[str, Any]] = {}

    async def add_route(self, routespec: str, target: str, data: Any) -> None:
        self.routes[routespec] = {"routespec": routespec, "target": target, "data": data}

    async def delete_route(self, routespec: str) -> None:
        self.routes.pop(routespec, None)

    async def get_all_routes(self) -> dict[str, dict[str, Any]]:
        return self.routes


class Fates:
    """What becomes of each spawn: "fail" and "hang" in exactly their shares, evenly spread, else "ready"."""

    def __init__(self, fail_rate: float, hang_rate: float) -> None:
        self._failing = _chosen(fail_rate)
        self._hanging = _chosen(hang_rate / (1 - fail_rate) if fail_rate < 1 else 0)

    def next(self) -> str:
        if next(self._failing):
            return "fail"
        return "hang" if next(self._hanging) else "ready"


def _chosen(rate: float) -> Iterator[bool]:
    """Whether the n-th is one of the share: n * rate has reached another whole number. Exact, hence the fraction."""
    share = Fraction(rate).limit_denominator(10**6)
    return (int((n + 1) * share) > int(n * share) for n in itertools.count())


class StubSpawner(Spawner):
    """Servers that all are one port of the hub's own process, so that hundreds of them start on two cores."""

    fates = Fates(OPTIONS.fail_rate, OPTIONS.hang_rate)
    listener: HTTPServer | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.running = False
        if StubSpawner.listener is None:
            StubSpawner.listener = HTTPServer(_answer_anything)
            StubSpawner.listener.listen(OPTIONS.stub_port, "127.0.0.1")

    async def start(self) -> tuple[str, int]:
        fate = self.fates.next()
        self.running = True  # the hub takes a pending server that does not run for a failed one
        spawn_s = self.user_options.get("spawn_s", OPTIONS.spawn_s)
        await asyncio.sleep(spawn_s + random.uniform(0, OPTIONS.spawn_jitter_s))
        if fate == "hang":
            await asyncio.Event().wait()
        if fate == "fail":
            self.running = False
            raise RuntimeError("no node has 4 GB of memory free")
        return "127.0.0.1", OPTIONS.stub_port

    async def stop(self, now: bool = False) -> None:
        await asyncio.sleep(OPTIONS.stop_s)
        self.running = False

    async def poll(self) -> int | None:
        return None if self.running else 0

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "running": self.running}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.running = state.get("running", False)


def _answer_anything(request: HTTPServerRequest) -> None:
    headers = HTTPHeaders({"Content-Length": "2", "X-JupyterHub-Version": jupyterhub.__version__})
    assert request.connection
    request.connection.write_headers(ResponseStartLine("", 200, "OK"), headers, b"ok")
    request.connection.finish()


def _end_with_the_launcher() -> None:
    """Wait until the launcher, which holds the other end of standard input, has ended; then end this process group.

    `os.read`, because a thread that sits in `sys.stdin` breaks the hub's own orderly exit.
    """
    os.read(0, 1)
    shutil.rmtree(OPTIONS.directory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=_end_with_the_launcher, daemon=True).start()

c = get_config()  # type: ignore[name-defined]  # noqa: F821

c.JupyterHub.hub_ip = "127.0.0.1"
c.JupyterHub.hub_port = OPTIONS.port
c.JupyterHub.bind_url = f"http://127.0.0.1:1{OPTIONS.base_url}"  # nobody listens there
c.JupyterHub.proxy_class = NoProxy
c.JupyterHub.db_url = OPTIONS.database
c.JupyterHub.cookie_secret = os.urandom(32)
c.JupyterHub.log_level = "INFO"
c.JupyterHub.cleanup_servers = False  # stubs outlive a restart; real servers end with the process group
c.JupyterHub.concurrent_spawn_limit = OPTIONS.concurrent_spawn_limit
c.JupyterHub.active_server_limit = OPTIONS.active_server_limit
c.JupyterHub.tornado_settings = {
    "slow_spawn_timeout": OPTIONS.slow_spawn_timeout_s,
    "slow_stop_timeout": OPTIONS.slow_stop_timeout_s,
}
c.JupyterHub.authenticator_class = "jupyterhub.auth.DummyAuthenticator"
c.Authenticator.allowed_users = {*OPTIONS.users, *OPTIONS.admins}
c.Authenticator.admin_users = set(OPTIONS.admins)

c.Spawner.start_timeout = math.ceil(OPTIONS.start_timeout_s)  # the trait is an integer
c.Spawner.consecutive_failure_limit = OPTIONS.consecutive_failure_limit
c.JupyterHub.spawner_class = StubSpawner
if OPTIONS.real_servers:
    c.JupyterHub.spawner_class = SimpleLocalProcessSpawner
    c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
    c.Spawner.args = ["--allow-root"]
    c.Spawner.environment = {"JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp"}
    c.LocalProcessSpawner.popen_kwargs = {"start_new_session": False}  # in the process group that ends as a whole
    c.SimpleLocalProcessSpawner.home_dir_template = OPTIONS.directory + "/home/{username}"

c.JupyterHub.services = [
    {"name": "oracle", "api_token": OPTIONS.oracle_token, "admin": True},
    {
        "name": "hub-stress-test",
        "api_token": OPTIONS.token,
        "admin": not HAS_ROLES and "admin:users" in OPTIONS.scopes,
    },
]
if HAS_ROLES:
    role = {"name": "hub-stress-test", "scopes": OPTIONS.scopes, "services": ["hub-stress-test"]}
    c.JupyterHub.load_roles = [role]
