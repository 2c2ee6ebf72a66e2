"""Processes that end with their launcher, and ports for them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past the forward proxies of the environment


def start_process(
    command: Sequence[str | Path], environment: Mapping[str, str], log_path: Path, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """Start it, with a session of its own, in the directory of its log.

    Its standard input closes when the launcher ends, which is its sign to end too.
    """
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=log_path.parent,
            stdin=subprocess.PIPE,
            stdout=log if stdout is None else stdout,
            stderr=log,
            start_new_session=True,
        )


def end_now(process: subprocess.Popen[bytes]) -> None:
    """End it as a crash would."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


class Stub:
    """A process beside a hub that serves at the port that it prints; `words` are its arguments."""

    def __init__(self, script: str, log_path: Path, *words: str) -> None:
        command = [sys.executable, Path(__file__).with_name(script), *words]
        self._process = start_process(command, clean_environment(), log_path, stdout=subprocess.PIPE)
        assert self._process.stdout
        port = self._process.stdout.readline().decode().strip()
        if not port:
            raise RuntimeError(f"{script} did not start:\n{log_path.read_text(errors='replace')[-3000:]}")
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        end_now(self._process)

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON of its answer to a GET, or to a POST of the body."""
        data = json.dumps(body).encode() if body else None
        with DIRECTLY.open(self.url + path, data, timeout=30) as response:
            return json.load(response)

    def truth(self) -> dict[str, Any]:
        """What happened: see the script."""
        found: dict[str, Any] = self.ask("/truth")
        return found


def processes_in(directory: Path) -> list[int]:
    """The processes that work in this directory or below it."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            if Path(os.readlink(link).removesuffix(" (deleted)")).is_relative_to(directory):
                found.append(int(link.parent.name))
    return found


def kill_all(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def clean_environment() -> dict[str, str]:
    """The environment without what is meant for other hubs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTERHUB_", "CONFIGPROXY_"))}


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, below those that the system gives out, so that they are still free after a restart."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("there is no free port between 20000 and 32000")


def free_port() -> int:
    return free_ports(1)[0]
