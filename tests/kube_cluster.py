"""A stub of Kubernetes (kube_stub.py) beside a hub, as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from processes import clean_environment, end_now, start_process


class Cluster:
    """A running stub: what it is told to do, and what it has seen."""

    def __init__(self, setting: dict[str, Any], labs: dict[str, Any], log_path: Path) -> None:
        words = json.dumps([setting, labs])
        command = [sys.executable, Path(__file__).with_name("kube_stub.py"), words]
        self._process = start_process(command, clean_environment(), log_path, stdout=subprocess.PIPE)
        assert self._process.stdout
        port = self._process.stdout.readline().decode().strip()
        if not port:
            raise RuntimeError(f"the stub of Kubernetes did not start:\n{log_path.read_text(errors='replace')[-3000:]}")
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        end_now(self._process)

    def truth(self) -> dict[str, Any]:
        """What happened: see kube_stub.py."""
        return self._ask("/truth")

    def pods(self) -> list[str]:
        """The names of the pods that exist."""
        return [pod["name"] for pod in self.truth()["pods"] if pod["exists"]]

    def claims(self) -> list[str]:
        """The names of the volume claims that exist."""
        return [name for name, made in self.truth()["claims"].items() if "gone" not in made[-1]]

    def control(self, **what: Any) -> dict[str, Any]:
        """Change the weather: see kube_stub.py."""
        return self._ask("/control", json.dumps(what).encode())

    def fault(self, method: str | None = None, kind: str | None = None, **rest: Any) -> None:
        """Let the API answer such requests wrongly or late: see `kube_stub.Fault`."""
        self.control(fault={"method": method, "kind": kind} | rest)

    def calm(self) -> None:
        """No more faults."""
        self.control(calm=True)

    def clean(self) -> None:
        """As at first: no faults, pods and claims, and nothing seen."""
        self.control(clean=True)

    def happen(self, fate: str, *pods: str) -> list[str]:
        """Let it happen to these running pods, or to all: evicted, node-lost, oom, crash, mute. Returns their names."""
        hit: list[str] = self.control(happen=fate, **({"pods": pods} if pods else {}))["pods"]
        return hit

    def _ask(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with directly.open(urllib.request.Request(self.url + path, body), timeout=30) as response:
            found: dict[str, Any] = json.load(response)
        return found
