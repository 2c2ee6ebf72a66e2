"""A real JupyterHub on this machine, for tests, benchmarks and trying things out.

As a library: `with LocalHub(spawn_s=1.0) as hub: ...`. As a command it wraps another command:

    python tests/localhub.py --spawn 1.0 -- hub-stress-test stress-test --count 20

which finds the hub in JUPYTERHUB_ENDPOINT and JUPYTERHUB_API_TOKEN. There is no proxy and no container, and servers are
stubs, so that hundreds start on two cores. `--real-proxy` puts a configurable-http-proxy in front, through which people
reach their servers; `--real-servers` starts real ones, and `--stub-labs` starts stubs with pages and kernels. `--kube`
starts such stubs as pods of the real KubeSpawner, on a stub of Kubernetes, with the hub set up as Zero to JupyterHub
does. The hub ends with its launcher, and all that belongs to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from cache import installed
from fork_server import Forked, fork_hub
from processes import DIRECTLY, Stub, clean_environment, free_port, kill_all, processes_in
from real_proxy import RealProxy

ROLE_SCOPES = ("admin:users", "servers", "read:metrics")  # the role that the README tells operators to paste
PINS = dict.fromkeys("123", ["sqlalchemy<2"])  # which hubs of these versions need beside them
SERVER_PINS = {  # which servers go with these versions, in place of the newest
    "1": (
        *("jupyterlab==3.2.9", "notebook==6.4.*", "jupyter-server==1.13.*", "ipykernel==6.15.*", "tornado==6.2.*"),
        *("jupyter-client<8", "pyzmq<25", "six"),
    ),
    "2": ("jupyterlab==3.6.8", "notebook==6.5.*", "jupyter-server==1.24.*", "ipykernel==6.29.*", "tornado==6.4.*"),
}
CHART = {  # the defaults with --kube: the values of Zero to JupyterHub, with named servers allowed
    "start_timeout_s": 300.0,
    "slow_spawn_timeout_s": 0.0,
    "concurrent_spawn_limit": 64,
    "consecutive_failure_limit": 5,
    "named_servers": 5,
}
START_TIMEOUT_S = 60.0
PAGE = 200  # users: the most that hubs hand out at once


def option(flag: str, default: Any, help: str, metavar: str | None = None) -> Any:
    """A field of the options, and how it is written on the command line; without `metavar` a switch."""
    return dataclasses.field(default=default, metadata={"flag": flag, "help": help, "metavar": metavar})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the hub behaves. Shares are exact: of ten spawns at 0.4, four fail. A profile may ask for other values."""

    version: str | None = option("--version", None, "this JupyterHub, installed on first use (the tests')", "X.Y.Z")
    spawn_s: float = option("--spawn", 0.0, "a server takes this long to start (0)", "SECONDS")
    spawn_jitter_s: float = option("--jitter", 0.0, "or takes up to this much longer, at random (0)", "SECONDS")
    stop_s: float = option("--stop", 0.0, "a server takes this long to stop (0)", "SECONDS")
    fail_rate: float = option("--fail", 0.0, "this share of the spawns, 0 to 1, fails with a reason (0)", "SHARE")
    hang_rate: float = option("--hang", 0.0, "this share of the spawns, 0 to 1, never ends (0)", "SHARE")
    stop_fails: bool = option("--stop-fails", False, "the spawner fails to stop servers; the hub keeps that to itself")
    servers_outlive: bool = option("--servers-outlive", False, "a hub that starts again looks for its servers")
    http_timeout_s: float = option("--http-timeout", 120.0, "patience with a server's first answer (120)", "SECONDS")
    slow_spawn_timeout_s: float = option("--slow-spawn-timeout", 10.0, "a start is answered 202 then (10)", "SECONDS")
    slow_stop_timeout_s: float = option("--slow-stop-timeout", 10.0, "a stop is answered 202 then (10)", "SECONDS")
    start_timeout_s: float = option("--start-timeout", 60.0, "a spawn times out after this time (60)", "SECONDS")
    concurrent_spawn_limit: int = option("--spawn-limit", 100, "servers starting at a time (100; 0: any)", "SERVERS")
    active_server_limit: int = option("--server-limit", 0, "servers starting or running (0: any number)", "SERVERS")
    consecutive_failure_limit: int = option(
        "--failure-limit", 0, "the hub exits after this many failed spawns in a row (0: never)", "SPAWNS"
    )
    admins: tuple[str, ...] = option("--admin", (), "an admin of this name exists; repeatable (none)", "NAME")
    owner: str = option("--owner", "", "a user of this name, whose token the command gets (none)", "NAME")
    named_servers: int = option("--named-servers", 0, "named servers that each user may have (0)", "SERVERS")
    real_servers: bool = option("--real-servers", False, "servers are jupyterhub-singleuser instead of stubs")
    server_version: str | None = option(
        "--server-version", None, "with --real-servers: of this JupyterHub, as an old image is (the hub's)", "X.Y.Z"
    )
    stub_labs: bool = option("--stub-labs", False, "servers are stubs with start pages, kernels and websockets")
    kube: bool = option("--kube", False, "servers are pods of the real KubeSpawner, on a stub of Kubernetes")
    nodes: int = option("--nodes", 2, "nodes that the stub of Kubernetes has at first (2)", "NODES")
    pods_per_node: int = option("--pods-per-node", 50, "pods that fit on a node (50)", "PODS")
    node_s: float = option("--node", 5.0, "a node that is needed comes after this time (5; 0: never)", "SECONDS")
    image_s: float = option("--image", 2.0, "a node pulls an image for this long (2)", "SECONDS")
    real_proxy: bool = option("--real-proxy", False, "people come through configurable-http-proxy, a real one")
    proxy_version: str = option(
        "--proxy-version", "5.3.0", "of the real proxy, installed on first use (5.3.0)", "X.Y.Z"
    )
    database: str = option("--database", "memory", "users outlive a restart in this sqlite file (memory)", "FILE")
    config: str = option("--config", "", "more of the hub's configuration, read last (none)", "PYTHON")
    scopes: tuple[str, ...] = option(
        "--scope", ROLE_SCOPES, "the token has this scope; repeatable (the role's)", "SCOPE"
    )


def hub_python(version: str | None, with_servers: bool = False, with_kube: bool = False) -> str:
    """The interpreter that has this JupyterHub: this one, or that of an environment made for it on first use."""
    if version is None:
        return sys.executable
    major = version.partition(".")[0]
    packages = [f"jupyterhub=={version}", *PINS.get(major, [])]
    if with_servers:
        packages += SERVER_PINS.get(major, ("jupyterlab>=4", "ipykernel"))
    if with_kube:
        packages.append("jupyterhub-kubespawner>=7")

    def install(home: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [str(home / "bin/python"), "-m", "pip", "install", "-qq", *packages]
        subprocess.run(pip, check=True, stdout=sys.stderr)

    python = f"py{sys.version_info[0]}.{sys.version_info[1]}"
    home = installed(f"jupyterhub-{version}-{python}" + "-servers" * with_servers + "-kube" * with_kube, install)
    return str(home / "bin/python")


class Cluster(Stub):
    """The stub of Kubernetes: what it is told to do, and what it has seen."""

    def __init__(self, options: HubOptions, log_path: Path) -> None:
        names = ("nodes", "pods_per_node", "node_s", "image_s", "spawn_s", "spawn_jitter_s", "stop_s")
        super().__init__("kube_stub.py", log_path, json.dumps({name: getattr(options, name) for name in names}))

    def pods(self) -> list[str]:
        """The names of the pods that exist."""
        return [pod["name"] for pod in self.truth()["pods"] if pod["exists"]]

    def fault(self, method: str, kind: str, status: int) -> None:
        """Have the API answer all such requests so."""
        self.ask("/control", {"fault": {"method": method, "kind": kind, "status": status}})

    def clean(self) -> None:
        """As at first: no faults, pods and claims."""
        self.ask("/control", {"clean": True})


class LocalHub:
    """A running hub, until `kill` or the end of the `with` block. It asks the hub with a token of its own.

    A real proxy, the stub labs and the stub of Kubernetes are processes beside the hub: they outlive its crashes, and
    end with the block.
    """

    def __init__(self, **options: Any) -> None:
        self.options = HubOptions(**((CHART if options.get("kube") else {}) | options))
        self.token, self._oracle_token = secrets.token_hex(16), secrets.token_hex(16)
        self.visit_token = secrets.token_hex(16)  # of a service that may enter servers and nothing else
        self.owner_token = secrets.token_hex(16)
        self._directory = Path(tempfile.mkdtemp(prefix="localhub-"))
        self.log_path = self._directory / "hub.log"
        self.port = free_port()
        own_url = f"http://127.0.0.1:{self.port}/"
        self.hub_endpoint = own_url + "hub/api"  # at the hub's own port, as a pod beside the hub reaches it
        self._proxy: RealProxy | None = None
        if self.options.real_proxy:
            self._proxy = RealProxy(self.options.proxy_version, own_url, self._directory / "proxy.log")
        self.public_url = f"http://127.0.0.1:{self.proxy.port}/" if self._proxy else own_url
        self.endpoint = self.public_url + "hub/api"
        self._process: Forked | None = None
        self._labs: Stub | None = None
        self._cluster: Cluster | None = None

    def __enter__(self) -> LocalHub:
        try:
            if self._proxy:
                self._proxy.start()
            if self.options.stub_labs:
                self._labs = Stub("singleuser_stub.py", self._directory / "labs.log")
            if self.options.kube:
                self._cluster = Cluster(self.options, self._directory / "kubernetes.log")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in filter(None, (self._proxy, self._labs, self._cluster)):
            process.stop()
        kill_all(processes_in(self._directory))  # kernels of real servers
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and not self._process.has_ended()

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this hub, and to visit its servers."""
        found = {"JUPYTERHUB_ENDPOINT": self.endpoint, "JUPYTERHUB_API_TOKEN": self.token}
        if self.options.owner:
            return found | {"JUPYTERHUB_API_TOKEN": self.owner_token}
        if self._proxy and not (self.options.version or "").startswith("1."):  # which has no scopes
            found["JUPYTERHUB_VISIT_TOKEN"] = self.visit_token
        return found

    def start(self) -> None:
        """Boot, and return when the hub answers. Raises `RuntimeError` with the end of its log."""
        given = {
            "port": self.port,
            "token": self.token,
            "visit_token": self.visit_token,
            "owner_token": self.owner_token,
            "oracle_token": self._oracle_token,
            "public_url": self.public_url,
            "proxy_api_url": self._proxy.api_url if self._proxy else "",
            "proxy_token": self._proxy.token if self._proxy else "",
            "labs_url": self._labs.url if self._labs else "",
            "kubernetes_url": self._cluster.url if self._cluster else "",
            "database": self._database(),
            "server_python": hub_python(self.options.server_version, True) if self.options.server_version else "",
        }
        options = json.dumps(dataclasses.asdict(self.options) | given)
        python = hub_python(self.options.version, self.options.real_servers, self.options.kube)
        environment = clean_environment() | {"LOCALHUB_OPTIONS": options, "TMPDIR": str(self._directory)}
        configuration = Path(__file__).with_name("localhub_config.py")
        self._process = fork_hub(python, configuration, self._directory, environment)
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self.answers():
            if not self.running or time.monotonic() > until_s:
                raise RuntimeError(f"the hub did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def _database(self) -> str:
        if self.options.database != "memory":
            return str(Path(self.options.database).absolute())
        return str(self._directory / "hub.sqlite") if self.options.kube else "memory"

    def answers(self) -> bool:
        """Whether the hub is up."""
        try:
            return self.call("GET", "/user")[0] == 200  # with its token, so that it is no other hub
        except OSError:
            return False

    def kill(self) -> None:
        """End the hub as a crash would: to end politely costs it as much time as to boot."""
        if self._process:
            self._process.end()
        self._process = None

    def restart(self) -> None:
        """Crash and boot again, at the same port with the same tokens."""
        self.kill()
        self.start()

    # ---- What stands beside the hub ---------------------------------------------------------------------------------

    @property
    def proxy(self) -> RealProxy:
        """The real proxy: its pid, ports, routes and log."""
        assert self._proxy, "there is one with real_proxy=True"
        return self._proxy

    def start_proxy(self) -> None:
        """Boot the proxy again, at the same port, and have the hub give it its routes back."""
        self.proxy.start()
        self.call("POST", "/proxy")

    def truth(self) -> dict[str, Any]:
        """What happened at the stub labs: see singleuser_stub.py."""
        assert self._labs, "there are some with stub_labs=True"
        return self._labs.truth()

    @property
    def cluster(self) -> Cluster:
        assert self._cluster, "there is one with kube=True"
        return self._cluster

    # ---- The oracle -------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of a request with an admin's token. Raises `OSError` when the hub does not answer."""
        headers = {"Authorization": f"token {self._oracle_token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.hub_endpoint + path, data, headers, method=method)
        try:
            with DIRECTLY.open(request, timeout=90) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None

    def users(self) -> dict[str, dict[str, Any]]:
        """What the hub says of every user, by name."""
        found: dict[str, dict[str, Any]] = {}
        while True:
            before = len(found)
            found |= {user["name"]: user for user in self.call("GET", f"/users?limit={PAGE}&offset={before}")[1]}
            if len(found) < before + PAGE:  # a hub before 2.0 has no pages
                return found

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def run_beside(hub: LocalHub, command: list[str]) -> int:
    """The exit code of a command that finds the hub in its environment; signals go to it, and the hub outlives it."""
    process = subprocess.Popen(command, env=os.environ | hub.environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(HubOptions):
        flag, text, metavar = (field.metadata[key] for key in ("flag", "help", "metavar"))
        if metavar is None:
            parser.add_argument(flag, dest=field.name, action="store_true", help=text)
        elif isinstance(field.default, tuple):
            parser.add_argument(flag, dest=field.name, action="append", help=text, metavar=metavar)
        else:
            kind = str if field.default is None else type(field.default)
            parser.add_argument(flag, dest=field.name, type=kind, help=text, metavar=metavar)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run beside the hub; without one it just stays up"
    )
    return parser.parse_args()


def main() -> int:
    options = vars(_parse_args())
    if options.get("kube") and not importlib.util.find_spec("kubespawner"):
        raise SystemExit("--kube needs KubeSpawner: pip install '.[test]'")
    command = options.pop("command")
    command = command[1:] if command[:1] == ["--"] else command
    began_s = time.monotonic()
    with LocalHub(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}) as hub:
        version = hub.call("GET", "/")[1]["version"]
        took_s = time.monotonic() - began_s
        print(f"JupyterHub {version} at {hub.endpoint}, up after {took_s:.1f} s", file=sys.stderr, flush=True)
        if command:
            return run_beside(hub, command)
        for name, value in hub.environment.items():
            print(f"export {name}={value}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
