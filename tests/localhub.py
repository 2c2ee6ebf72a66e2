"""A real JupyterHub on this machine, for tests, benchmarks and trying things out.

As a library: `with LocalHub(spawn_s=1.0) as hub: ...`. As a command it wraps another command:

    python tests/localhub.py --spawn 1.0 -- hub-stress-test stress-test --count 20

which finds the hub in JUPYTERHUB_ENDPOINT and JUPYTERHUB_API_TOKEN. There is no proxy and no container, and servers are
stubs, so that hundreds start on two cores; `--real-servers` starts real ones. The hub ends with its launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from processes import clean_environment, end_now, free_port, start_process

ROLE_SCOPES = ("admin:users", "servers", "read:metrics")  # the role that the README tells operators to paste
PINS = dict.fromkeys("123", ["sqlalchemy<2"])  # which hubs of these versions need beside them
START_TIMEOUT_S = 30.0
# Half of JupyterHub 6's boot goes into a grammar for checking addresses in event schemas, which it can do without.
BOOT = "import sys; sys.modules['rfc3987_syntax'] = None; from jupyterhub.app import main; main()"


def option(flag: str, default: Any, help: str, metavar: str | None = None) -> Any:
    """A field of the options, and how it is written on the command line; without `metavar` a switch."""
    return dataclasses.field(default=default, metadata={"flag": flag, "help": help, "metavar": metavar})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the hub behaves. Shares are exact: of ten spawns at 0.4, four fail. A profile may ask for other values."""

    version: str | None = option(
        "--version", None, "run this JupyterHub, installed on first use (the one beside this interpreter)", "X.Y.Z"
    )
    spawn_s: float = option("--spawn", 0.0, "a server takes so many seconds to start (0)", "SECONDS")
    spawn_jitter_s: float = option(
        "--jitter", 0.0, "a server takes at most so many seconds longer to start, at random (0)", "SECONDS"
    )
    stop_s: float = option("--stop", 0.0, "a server takes so many seconds to stop (0)", "SECONDS")
    fail_rate: float = option("--fail", 0.0, "this share of the spawns, 0 to 1, fails with a reason (0)", "SHARE")
    hang_rate: float = option("--hang", 0.0, "this share of the spawns, 0 to 1, never ends (0)", "SHARE")
    slow_spawn_timeout_s: float = option(
        "--slow-spawn-timeout", 10.0, "the hub answers a start with 202 after so many seconds (10)", "SECONDS"
    )
    slow_stop_timeout_s: float = option(
        "--slow-stop-timeout", 10.0, "the hub answers a stop with 202 after so many seconds (10)", "SECONDS"
    )
    start_timeout_s: float = option(
        "--start-timeout", 60.0, "the hub gives a spawn up after so many seconds (60)", "SECONDS"
    )
    concurrent_spawn_limit: int = option(
        "--spawn-limit", 100, "the hub throttles while so many servers are starting (100; 0 is no limit)", "SERVERS"
    )
    active_server_limit: int = option(
        "--server-limit",
        0,
        "the hub throttles while so many servers are starting or running (0 is no limit)",
        "SERVERS",
    )
    consecutive_failure_limit: int = option(
        "--failure-limit", 0, "the hub exits after so many failed spawns in a row (0 is never)", "SPAWNS"
    )
    bystanders: int = option("--bystanders", 0, "so many users exist beside alice and the look-alikes (0)", "USERS")
    admins: tuple[str, ...] = option("--admin", (), "an admin of this name exists; repeatable (none)", "NAME")
    real_servers: bool = option("--real-servers", False, "servers are jupyterhub-singleuser instead of stubs")
    database: str = option(
        "--database", "memory", "users are kept in this sqlite file, and outlive a restart (memory)", "FILE"
    )
    base_url: str = option("--base-url", "/", "the hub is at this path, which ends in a slash (/)", "PATH")
    scopes: tuple[str, ...] = option(
        "--scope", ROLE_SCOPES, f"the token has this scope; repeatable ({', '.join(ROLE_SCOPES)})", "SCOPE"
    )


def hub_python(version: str | None) -> str:
    """The interpreter that has this JupyterHub: this one, or that of an environment made for it on first use."""
    if version is None:
        return sys.executable
    packages = [f"jupyterhub=={version}", *PINS.get(version.partition(".")[0], [])]

    def install(home: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [str(home / "bin/python"), "-m", "pip", "install", "-qq", *packages]
        subprocess.run(pip, check=True, stdout=sys.stderr)

    home = installed(f"jupyterhub-{version}-py{sys.version_info[0]}.{sys.version_info[1]}", install)
    return str(home / "bin/python")


class LocalHub:
    """A running hub, until `stop` or the end of the `with` block. It asks the hub with a token of its own."""

    def __init__(self, **options: Any) -> None:
        self.options = HubOptions(**options)
        self.token, self._oracle_token = secrets.token_hex(16), secrets.token_hex(16)
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}{self.options.base_url}hub/api"
        self._directory = Path(tempfile.mkdtemp(prefix="localhub-"))
        self.log_path = self._directory / "hub.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalHub:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this hub."""
        return {"JUPYTERHUB_ENDPOINT": self.endpoint, "JUPYTERHUB_API_TOKEN": self.token}

    def start(self) -> None:
        """Boot, and return when the hub answers. Raises `RuntimeError` with the end of its log."""
        secret = {"port": self.port, "token": self.token, "oracle_token": self._oracle_token}
        database = (
            self.options.database if self.options.database == "memory" else str(Path(self.options.database).absolute())
        )
        options = json.dumps(dataclasses.asdict(self.options) | secret | {"database": database})
        self._process = start_process(
            [
                hub_python(self.options.version),
                "-W",
                "ignore",
                "-c",
                BOOT,
                "-f",
                Path(__file__).with_name("localhub_config.py"),
            ],
            clean_environment() | {"LOCALHUB_OPTIONS": options, "TMPDIR": str(self._directory)},
            self.log_path,
        )
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if not self.running or time.monotonic() > until_s:
                raise RuntimeError(f"the hub did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return self.call("GET", "/user")[0] == 200  # with its token, so that it is no other hub
        except OSError:
            return False

    def stop(self) -> None:
        """End the hub and its servers: politely, then not."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    def kill(self) -> None:
        """End the hub as a crash would."""
        assert self._process
        end_now(self._process)

    def restart(self) -> None:
        """Crash and boot again, at the same port with the same tokens."""
        self.kill()
        self.start()

    def call(self, method: str, path: str, body: Any = None, accept: str = "application/json") -> tuple[int, Any]:
        """Status and JSON of a request with an admin's token. Raises `OSError` when the hub does not answer."""
        headers = {"Authorization": f"token {self._oracle_token}", "Accept": accept}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint + path, data, headers, method=method)
        try:
            with _DIRECTLY.open(request, timeout=90) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None

    def users(self) -> dict[str, dict[str, Any]]:
        """What the hub says of every user, by name."""
        found: dict[str, dict[str, Any]] = {}
        offset: int | None = 0
        while offset is not None:
            path = f"/users?limit=200&offset={offset}"
            _, data = self.call("GET", path, accept="application/jupyterhub-pagination+json")
            items, following = (data, None) if isinstance(data, list) else (data["items"], data["_pagination"]["next"])
            found |= {user["name"]: user for user in items}
            before, offset = offset, following["offset"] if following else None
            assert offset is None or offset > before, "the hub's pages do not end"
        return found

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def run_beside(hub: LocalHub, command: list[str]) -> int:
    """The exit code of a command that finds the hub in its environment; signals go to it, and the hub outlives it."""
    process = subprocess.Popen(command, env=os.environ | hub.environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(HubOptions):
        flag, text, metavar = (field.metadata[key] for key in ("flag", "help", "metavar"))
        if metavar is None:
            parser.add_argument(flag, dest=field.name, action="store_true", help=text)
        elif isinstance(field.default, tuple):
            parser.add_argument(flag, dest=field.name, action="append", help=text, metavar=metavar)
        else:
            kind = str if field.default is None else type(field.default)
            parser.add_argument(flag, dest=field.name, type=kind, default=field.default, help=text, metavar=metavar)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run beside the hub; without one it just stays up"
    )
    return parser.parse_args()


def main() -> int:
    options = vars(_parse_args())
    command = options.pop("command")
    command = command[1:] if command[:1] == ["--"] else command
    began_s = time.monotonic()
    with LocalHub(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if v is not None}
    ) as hub:
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
