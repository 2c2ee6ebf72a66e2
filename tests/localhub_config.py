"""The configuration of the local hub, loaded inside the hub's process: see localhub.py for what each option means."""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import os
import random
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from jupyterhub import __version__, version_info
from jupyterhub.auth import DummyAuthenticator
from jupyterhub.proxy import ConfigurableHTTPProxy, Proxy
from jupyterhub.spawner import SimpleLocalProcessSpawner, Spawner
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

OPTIONS: dict[str, Any] = json.loads(os.environ["LOCALHUB_OPTIONS"])
BYSTANDERS = ["alice", "hub-stress-tester", "hub-stress-test-admin"]


class NoProxy(Proxy):
    """Routes in a dictionary: nobody comes through the proxy, they ask the hub directly."""

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


class AnyAnswer(RequestHandler):
    def get(self) -> None:
        self.finish("a server\n")


class StubSpawner(Spawner):
    """Servers that all are one port of the hub's own process, so that hundreds of them start on two cores."""

    port = 0
    spawned = 0
    running = OPTIONS["servers_outlive"]  # in the eyes of a hub that starts again
    takes_s = 0.0

    async def start(self) -> tuple[str, int]:
        number = StubSpawner.spawned
        StubSpawner.spawned += 1
        self.running = True
        wish = OPTIONS | self.user_options  # a profile may ask for a slower server, or one that fails
        self.takes_s = wish["spawn_s"] + random.uniform(0, wish["spawn_jitter_s"])
        await asyncio.sleep(self.takes_s)
        if _is_chosen(number, wish["hang_rate"]):
            await asyncio.Event().wait()
        if _is_chosen(number, wish["fail_rate"]):
            self.running = False
            raise RuntimeError("no node has 4 GB of memory free")
        return "127.0.0.1", await self.listen()

    async def listen(self) -> int:
        """The port at which the server is from now on."""
        return _stub_port()

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """As spawners of clusters do: what is going on, one after the other."""
        yield {"progress": 20, "message": "Looking for a node"}
        await asyncio.sleep(self.takes_s / 4)
        yield {"progress": 60, "message": "Pulling the image"}

    async def stop(self, now: bool = False) -> None:
        wish = OPTIONS | self.user_options
        await asyncio.sleep(wish["stop_s"])
        if wish["stop_fails"]:
            raise RuntimeError("the cluster does not delete pods")
        self.running = False

    async def poll(self) -> int | None:
        return None if self.running else 0


def _is_chosen(number: int, rate: float) -> bool:
    """Exactly the share `rate` of all numbers, evenly spread."""
    share = Fraction(rate).limit_denominator(1000)
    return math.floor((number + 1) * share) > math.floor(number * share)


def _stub_port() -> int:
    if not StubSpawner.port:
        sockets = bind_sockets(0, "127.0.0.1")
        HTTPServer(Application([(".*", AnyAnswer)], log_function=lambda handler: None)).add_sockets(sockets)
        StubSpawner.port = sockets[0].getsockname()[1]
    return StubSpawner.port


class StubLabSpawner(StubSpawner):
    """Servers of another process (singleuser_stub.py), with pages and kernels, each at a port of its own."""

    lab: asyncio.Task[int] | None = None  # its port, once the last start has got that far

    async def listen(self) -> int:
        variables = {name: value for name, value in self.get_env().items() if name.startswith("JUPYTERHUB_")}
        asked = json.dumps({"environment": variables, "hub_version": __version__})
        self.lab = asyncio.create_task(self._start(asked))
        return await asyncio.shield(self.lab)  # it comes up although the hub breaks the start off: see stop

    async def stop(self, now: bool = False) -> None:
        await super().stop(now)
        if self.lab:
            await self._ask("DELETE", f"/{await self.lab}")
            self.lab = None

    async def poll(self) -> int | None:
        if not self.lab:
            return 0
        return None if not self.lab.done() or (await self._ask("GET", f"/{self.lab.result()}")).code == 204 else 0

    async def _start(self, asked: str) -> int:
        return int(json.loads((await self._ask("POST", "", asked)).body)["port"])

    async def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        url = f"{OPTIONS['labs_url']}/servers{path}"
        return await AsyncHTTPClient().fetch(url, method=method, body=body, raise_error=False)


# What a profile does is known by its image's name: see kube_stub.py.
PROFILES = ("plain", "quota", "webhook", "unschedulable")


def image(name: str) -> str:
    """An image with this hub's JupyterHub."""
    return f"quay.io/jupyterhub/{name}:{__version__}"


def set_up_kubespawner(kube: Any, url: str) -> None:
    """As Zero to JupyterHub does, on a cluster at this URL."""
    context = {"name": "stub", "context": {"cluster": "stub", "user": "hub"}}
    access = {"clusters": [{"name": "stub", "cluster": {"server": url}}], "users": [{"name": "hub", "user": {}}]}
    path = Path(tempfile.gettempdir(), "kubeconfig")
    path.write_text(json.dumps(access | {"contexts": [context], "current-context": "stub"}))
    os.environ["KUBECONFIG"] = str(path)
    os.environ.pop("KUBERNETES_SERVICE_HOST", None)  # of a cluster in which the tests run
    kube.namespace = "jhub"
    kube.image = image("plain")
    kube.mem_guarantee = "1G"
    kube.storage_pvc_ensure = True
    kube.storage_capacity = "10Gi"
    kube.storage_access_modes = ["ReadWriteOnce"]
    kube.pvc_name_template = "claim-{user_server}"
    kube.volumes = {"home": {"name": "home", "persistentVolumeClaim": {"claimName": "{pvc_name}"}}}
    kube.volume_mounts = {"home": {"name": "home", "mountPath": "/home/jovyan"}}
    blocker = {"name": "block-cloud-metadata", "image": "quay.io/jupyterhub/k8s-network-tools:4.3.5"}
    kube.init_containers = {"block-cloud-metadata": blocker}
    kube.profile_list = [
        {"display_name": slug, "slug": slug, "kubespawner_override": {"image": image(slug)}} for slug in PROFILES
    ]


class RealSpawner(SimpleLocalProcessSpawner):
    """Real notebook servers, in a temporary home, that end with the hub."""

    cmd = [OPTIONS["server_python"] or sys.executable, "-m", "jupyterhub.singleuser"]

    def make_preexec_fn(self, name: str) -> Callable[[], None]:
        prepare = super().make_preexec_fn(name)
        return lambda: prepare() or ctypes.CDLL(None).prctl(1, signal.SIGKILL) and None  # 1: PR_SET_PDEATHSIG


c = get_config()  # type: ignore[name-defined]  # noqa: F821
c.JupyterHub.bind_url = OPTIONS["public_url"]
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{OPTIONS['port']}/"
c.JupyterHub.proxy_class = ConfigurableHTTPProxy if OPTIONS["real_proxy"] else NoProxy
if OPTIONS["real_proxy"]:
    c.ConfigurableHTTPProxy.should_start = False
    c.ConfigurableHTTPProxy.api_url = OPTIONS["proxy_api_url"]
    c.ConfigurableHTTPProxy.auth_token = OPTIONS["proxy_token"]
c.JupyterHub.db_url = "sqlite://" if OPTIONS["database"] == "memory" else f"sqlite:///{OPTIONS['database']}"
c.JupyterHub.cookie_secret = b"0" * 32
c.JupyterHub.log_level = "INFO"
c.JupyterHub.last_activity_interval = 3600  # then it also gives routes back that a test has taken away
c.JupyterHub.concurrent_spawn_limit = OPTIONS["concurrent_spawn_limit"]
c.JupyterHub.active_server_limit = OPTIONS["active_server_limit"]
c.JupyterHub.tornado_settings = {
    "slow_spawn_timeout": OPTIONS["slow_spawn_timeout_s"],
    "slow_stop_timeout": OPTIONS["slow_stop_timeout_s"],
}
c.JupyterHub.authenticator_class = DummyAuthenticator
c.Authenticator.allowed_users = {*BYSTANDERS, *OPTIONS["admins"]}
if OPTIONS["owner"]:
    c.Authenticator.allowed_users.add(OPTIONS["owner"])
    c.JupyterHub.api_tokens = {OPTIONS["owner_token"]: OPTIONS["owner"]}
c.JupyterHub.allow_named_servers = OPTIONS["named_servers"] > 0
c.JupyterHub.named_server_limit_per_user = OPTIONS["named_servers"]
c.Authenticator.admin_users = set(OPTIONS["admins"])
stub_class = StubLabSpawner if OPTIONS["stub_labs"] else StubSpawner
c.JupyterHub.spawner_class = RealSpawner if OPTIONS["real_servers"] else stub_class
if OPTIONS["kube"]:
    c.JupyterHub.spawner_class = "kubespawner.KubeSpawner"
    set_up_kubespawner(c.KubeSpawner, OPTIONS["kubernetes_url"])
if OPTIONS["servers_outlive"]:
    c.JupyterHub.init_spawners_timeout = 0
c.Spawner.http_timeout = int(OPTIONS["http_timeout_s"])
c.Spawner.start_timeout = OPTIONS["start_timeout_s"]
c.Spawner.consecutive_failure_limit = OPTIONS["consecutive_failure_limit"]
c.SimpleLocalProcessSpawner.home_dir_template = tempfile.gettempdir() + "/{username}"
c.Spawner.args = ["--allow-root"] if OPTIONS["real_servers"] else []
if not OPTIONS["real_proxy"]:  # nobody sees its pages
    c.Spawner.environment = {"JUPYTERHUB_SINGLEUSER_APP": "jupyter_server.serverapp.ServerApp"}
c.JupyterHub.services = [
    {"name": "oracle", "api_token": OPTIONS["oracle_token"], "admin": True},
    {"name": "hub-stress-test", "api_token": OPTIONS["token"], "admin": version_info[0] < 2},
]
SCOPES = {"hub-stress-test": list(OPTIONS["scopes"])}
if OPTIONS["real_proxy"]:
    c.JupyterHub.services += [{"name": "hub-stress-test-visits", "api_token": OPTIONS["visit_token"]}]
    SCOPES["hub-stress-test-visits"] = ["access:servers"]
if version_info[0] >= 2:
    c.JupyterHub.load_roles = [{"name": name, "scopes": scopes, "services": [name]} for name, scopes in SCOPES.items()]
exec(OPTIONS["config"])
