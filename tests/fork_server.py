"""Hubs forked from a process that has imported JupyterHub, and set up what all have alike: most of the time of a boot.

One such process for each interpreter ends with the process that started it, and takes its hubs and their files along.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any


class Forked:
    """A hub's process: a grandchild, which is reaped by its own parent."""

    def __init__(self, pid: int) -> None:
        self.pid, self._pidfd = pid, os.pidfd_open(pid)

    def has_ended(self, within_s: float = 0.0) -> bool:
        return bool(select.select([self._pidfd], [], [], within_s)[0])

    def end(self) -> None:
        """End it as a crash would."""
        if not self.has_ended():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self.has_ended(within_s=10.0)
        os.close(self._pidfd)


_one_at_a_time = threading.Lock()


@functools.cache
def _server(python: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([python, "-W", "ignore", __file__], text=True, cwd="/", start_new_session=True, **pipes)


def fork_hub(python: str, configuration: Path, directory: Path, environment: dict[str, str]) -> Forked:
    """Boot a hub whose log and temporary files are in this directory."""
    with _one_at_a_time:
        server = _server(python)
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps([str(configuration), str(directory), environment]) + "\n")
        server.stdin.flush()
        return Forked(int(server.stdout.readline()))


def orders() -> list[Any]:
    """Fork a process for each order, and return in that process. At the end of the orders, end all of them."""
    begun: dict[int, str] = {}
    for line in sys.stdin:
        for pid in list(begun):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del begun[pid]
        order: list[Any] = json.loads(line)
        pid = os.fork()
        if not pid:
            return order
        begun[pid] = order[1]
        print(pid, flush=True)
    for pid, directory in begun.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def main() -> None:
    del sys.path[0]  # where the tests' modules are
    # Half of the import of JupyterHub 6 is a grammar for addresses in event schemas, which it can do without.
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    from jupyterhub.app import JupyterHub
    from sqlalchemy.orm import configure_mappers

    configure_mappers()
    JupyterHub()
    configuration, directory, environment = orders()
    os.setsid()
    os.chdir(directory)
    log = os.open("hub.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(target, number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = ["jupyterhub", "-f", configuration]
    JupyterHub.launch_instance()


if __name__ == "__main__":
    main()
