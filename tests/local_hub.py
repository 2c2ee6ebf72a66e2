"""A real JupyterHub on this machine, for tests, benchmarks, and trying the tool without a cluster.

As a library: `with LocalHub(HubOptions(spawn_s=1.0)) as hub: ...`. As a command it wraps another one,

    python tests/local_hub.py --spawn 1.0 -- hub-stress-test stress-test --count 20

which finds the hub in JUPYTERHUB_ENDPOINT and JUPYTERHUB_API_TOKEN; the exit code is that of the wrapped command.
Without one, the hub stays up until Ctrl-C. It listens on 127.0.0.1 only, has no proxy and no containers, keeps its
files in a temporary directory, and never outlives this process. Servers are stubs, of which hundreds start on two
cores; `--real-servers` starts notebook servers (that needs jupyter-server).
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from json import dumps, loads
from pathlib import Path
from typing import Any, NoReturn

ROLE_SCOPES = ("admin:users", "servers", "read:metrics")  # the role that the README tells operators to paste
PREFIX = "hub-stress-test-"  # of the users that the tool makes
FIXED_BYSTANDERS = ("alice", "hub-stress-tester", "hub-stress-test-admin")  # always there; two look like the tool's
BOOT_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0

# What a JupyterHub of this major version needs on Python 3.11 beside what its own metadata asks for.
PINS = {1: ("sqlalchemy<2",), 2: ("sqlalchemy<2",), 3: ("sqlalchemy<2",)}

# Half of JupyterHub 6's boot is a grammar for the checking of addresses in event schemas, which it can do without.
BOOT = "import sys; sys.modules['rfc3987_syntax'] = None; from jupyterhub.app import main; main()"


# ---------------------------------------------------------------------------------------------------------- options


def _option(default: Any, help: str, flag: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How the hub behaves. Shares are exact and spread evenly: of the first ten spawns at 0.4, four.

    Raises `ValueError` with a sentence for what cannot be.
    """

    version: str | None = _option(None, "JupyterHub to run, installed on first use; else that of this interpreter")
    spawn_s: float = _option(0.0, "how long a server takes to start, unless its user_options name another spawn_s")
    spawn_jitter_s: float = _option(0.0, "at most this much longer, uniformly at random", "--jitter")
    stop_s: float = _option(0.0, "how long a server takes to stop")
    fail_rate: float = _option(0.0, "share of spawns that fail, with a reason")
    hang_rate: float = _option(0.0, "share of spawns that never finish")
    slow_spawn_timeout_s: float = _option(10.0, "a start that takes longer is answered with 202")
    slow_stop_timeout_s: float = _option(10.0, "a stop that takes longer is answered with 202")
    start_timeout_s: float = _option(60.0, "the hub gives a spawn up after this, rounded up to whole seconds")
    concurrent_spawn_limit: int = _option(100, "spawns at a time, more get 429; 0: no limit", "--spawn-limit")
    active_server_limit: int = _option(0, "servers at a time, more get 429; 0: no limit", "--server-limit")
    consecutive_failure_limit: int = _option(0, "failures in a row that end the hub; 0: never", "--failure-limit")
    bystanders: int = _option(0, "ordinary users bystander-0001 and so on, beside the three that are always there")
    admins: tuple[str, ...] = _option((), "admin users, with commas between")
    real_servers: bool = _option(False, "start jupyterhub-singleuser instead of stubs")
    database: str = _option("memory", "or the path of an sqlite file, which a later hub can take up")
    base_url: str = _option("/", "where the hub lives below its address")
    scopes: tuple[str, ...] | None = _option(None, f"of the tool's token, instead of {','.join(ROLE_SCOPES)}")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"{flag_of(name)} takes a number that is not negative, not {value}")
        if self.fail_rate + self.hang_rate > 1:
            raise ValueError(f"--fail {self.fail_rate} and --hang {self.hang_rate} are more than all spawns")
        if self.version is not None and not re.fullmatch(r"\d+(\.\d+)+\w*", self.version):
            raise ValueError(f"--version takes one like 4.1.6, not {self.version!r}")
        if not (self.base_url.startswith("/") and self.base_url.endswith("/")):
            raise ValueError(f"--base-url takes a path like / or /jupyter/, not {self.base_url!r}")
        stub_only = ("version", "spawn_s", "spawn_jitter_s", "stop_s", "fail_rate", "hang_rate")
        if self.real_servers and (given := [flag_of(name) for name in stub_only if getattr(self, name)]):
            raise ValueError(f"--real-servers takes its servers as they are, without {', '.join(given)}")


def flag_of(name: str) -> str:
    """The command's flag for a field of `HubOptions`."""
    field = HubOptions.__dataclass_fields__[name]
    return field.metadata["flag"] or "--" + re.sub("_(s|rate)$", "", name).replace("_", "-")


def hub_python(version: str | None) -> Path:
    """The interpreter of an environment with this JupyterHub, made on first use and kept; None: this interpreter.

    Several processes may ask at once. Raises `RuntimeError` when it cannot be installed.
    """
    if version is None:
        return Path(sys.executable)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hub-stress-test"
    cache.mkdir(parents=True, exist_ok=True)
    home = cache / "jupyterhub-{}-py{}.{}".format(version, *sys.version_info)
    with open(f"{home}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            building = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
            try:
                _install(version, building)
                building.rename(home)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    return home / "bin" / "python"


def _install(version: str, home: Path) -> None:
    print(f"installing JupyterHub {version}, once, below {home.parent}", file=sys.stderr, flush=True)
    packages = (f"jupyterhub=={version}", *PINS.get(int(version.partition(".")[0]), ()))
    make = [sys.executable, "-m", "venv", str(home)]
    fill = [str(home / "bin" / "python"), "-m", "pip", "install", "-qq", *packages]
    for command in make, fill:
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise RuntimeError(f"JupyterHub {version} could not be installed: see above")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and below those that outgoing connections are given.

    So it is still free when the hub binds it, and again when the hub is restarted.
    """
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------------------------------------------------- the hub


class LocalHub:
    """A hub that runs between `start` and `stop`, or within a `with` block. Takes `HubOptions`, or its fields.

    `endpoint` and `token` are for the tool. `call` and `users` ask the hub with an admin token of their own, and share
    no code with the tool, so that tests can trust them.
    """

    def __init__(self, options: HubOptions | None = None, **fields: Any) -> None:
        self.options = dataclasses.replace(options or HubOptions(), **fields)
        self.token, self._oracle_token = secrets.token_hex(16), secrets.token_hex(16)
        self.port, self._stub_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}{self.options.base_url.rstrip('/')}/hub/api"
        self.environment = {"JUPYTERHUB_ENDPOINT": self.endpoint, "JUPYTERHUB_API_TOKEN": self.token}
        self.pid = 0
        self._directory = Path(tempfile.gettempdir()) / f"local-hub-{secrets.token_hex(8)}"
        self.log_path = self._directory / "hub.log"
        self._process: subprocess.Popen[bytes] | None = None
        # Without the proxies that this machine's environment may name.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> LocalHub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Boot, and return when the hub answers. Raises `RuntimeError` with the end of its log."""
        python = hub_python(self.options.version)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        try:
            self._launch(python)
            self._await_boot()
        except BaseException:
            self.stop()
            raise

    def _launch(self, python: Path) -> None:
        """The hub as the leader of a process group of its own, holding a pipe whose end tells it that we have ended."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTERHUB_", "CONFIGPROXY_"))}
        config = Path(__file__).with_name("hub_config.py")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", "-c", BOOT, "-f", config],
                env=inherited | {"LOCAL_HUB": dumps(self._config()), "TMPDIR": str(self._directory)},
                cwd=self._directory,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def _config(self) -> dict[str, Any]:
        """What hub_config.py reads: the options with their defaults filled in, and what only this hub has."""
        options, numbered = self.options, (f"bystander-{n:04}" for n in range(1, self.options.bystanders + 1))
        memory = options.database == "memory"
        return dataclasses.asdict(options) | {
            "database": "sqlite:///:memory:" if memory else f"sqlite:///{Path(options.database).absolute()}",
            "scopes": ROLE_SCOPES if options.scopes is None else options.scopes,
            "users": [*FIXED_BYSTANDERS, *numbered],
            "directory": str(self._directory),
            "port": self.port,
            "stub_port": self._stub_port,
            "token": self.token,
            "oracle_token": self._oracle_token,
        }

    def _await_boot(self) -> None:
        until_s = time.monotonic() + BOOT_LIMIT_S
        while not self._answers():
            if not self.running or time.monotonic() > until_s:
                raise RuntimeError(f"the hub did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether this very hub is there: another one at the port would refuse the token."""
        with suppress(OSError):
            return self.call("GET", "/user")[0] == 200
        return False

    def stop(self) -> None:
        """End the hub and its servers: politely first. Its directory goes, with the log."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """End the hub and its servers as a crash would; `start` boots it again."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """End the hub and boot it again: same port, same tokens. Stubs go on, as servers in a cluster do, if the
        database is a file."""
        self._end(signal.SIGTERM)
        self.start()

    def wait(self) -> int:
        """The exit code of the hub, when it ends by itself."""
        assert self._process
        return self._process.wait()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(STOP_LIMIT_S)
        with suppress(ProcessLookupError):  # what is left of the group: single-user servers, or a hub that hangs
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin
        process.stdin.close()

    def call(self, method: str, path: str, json: Any = None) -> tuple[int, Any]:
        """Status, and JSON or text, of a request with an admin's token; `path` is below the endpoint.

        Raises `OSError` when the hub does not answer.
        """
        data = None if json is None else dumps(json).encode()
        headers = {"Authorization": f"token {self._oracle_token}"}
        request = urllib.request.Request(self.endpoint + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=90) as response:
                return response.status, _decoded(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _decoded(error.read())

    def users(self) -> dict[str, dict[str, Any]]:
        """What the hub says of every user, by name."""
        found: dict[str, dict[str, Any]] = {}
        while True:
            status, page = self.call("GET", f"/users?limit=200&offset={len(found)}")
            if status != 200:
                raise RuntimeError(f"the hub does not list its users: {status} {page}")
            new = {user["name"]: user for user in page}
            if new.keys() <= found.keys():  # past the end; 1.x ignores the offset, and lists all at once
                return found
            found |= new

    def tool_users(self) -> list[str]:
        """Names of the users that only the tool can have made."""
        return [name for name in self.users() if name.startswith(PREFIX) and name not in FIXED_BYSTANDERS]

    def log(self) -> str:
        """What the hub has logged; nothing after `stop`."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


def _decoded(body: bytes) -> Any:
    try:
        return loads(body or b"null")
    except ValueError:
        return body.decode(errors="replace")


# ------------------------------------------------------------------------------------------------------ the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_args(argv: list[str] | None) -> tuple[HubOptions, list[str]]:
    """The hub's options and the command to wrap. Ends the process with 2 and a sentence on bad usage."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(HubOptions):
        if isinstance(field.default, bool):
            parser.add_argument(flag_of(field.name), dest=field.name, action="store_true", help=field.metadata["help"])
        else:
            shown = "" if field.default in (None, ()) else f" ({field.default})"
            text = field.metadata["help"] + shown
            parser.add_argument(flag_of(field.name), dest=field.name, type=_reader(field), help=text, metavar="VALUE")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="to run beside the hub")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    command = given.pop("command")
    command = command[1:] if command[:1] == ["--"] else command
    if command and not shutil.which(command[0]):
        parser.error(f"no such command: {command[0]}")
    try:
        return HubOptions(**given), command
    except ValueError as error:
        parser.error(str(error))


def _reader(field: dataclasses.Field[Any]) -> Any:
    """What turns the flag's text into the field's value."""
    if "tuple" in str(field.type):
        return _names
    return str if field.default is None else type(field.default)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def run_beside(hub: LocalHub, command: list[str]) -> int:
    """The exit code of a command that finds the hub in its environment; 128+n when signal n ended it.

    It has a session of its own, so that a Ctrl-C reaches it once: passed on from here, as a SIGTERM is.
    """
    process = subprocess.Popen(command, env=os.environ | hub.environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code


def stay_up(hub: LocalHub) -> int:
    """0 after Ctrl-C, or 1 when the hub ended by itself."""
    for name, value in hub.environment.items():
        print(f"export {name}={value}")
    print("# The hub stays up until Ctrl-C.", flush=True)
    try:
        code = hub.wait()
    except KeyboardInterrupt:
        return 0
    print(f"the hub has ended by itself with {code}:\n{hub.log()[-1000:]}", file=sys.stderr)
    return 1


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    options, command = parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    began_s = time.monotonic()
    try:
        with LocalHub(options) as hub:
            version, took_s = hub.call("GET", "/")[1]["version"], time.monotonic() - began_s
            print(f"JupyterHub {version} at {hub.endpoint}, up in {took_s:.1f} s", file=sys.stderr, flush=True)
            return run_beside(hub, command) if command else stay_up(hub)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    raise SystemExit(main())
