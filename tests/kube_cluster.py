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

    def __init__(self, setting: dict[str, Any], log_path: Path) -> None:
        command = [sys.executable, Path(__file__).with_name("kube_stub.py"), json.dumps(setting)]
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
        names: list[str] = self.truth()["claims"]
        return names

    def fault(self, method: str, kind: str, status: int) -> None:
        """Have the API answer all such requests so."""
        self._ask("/control", {"fault": {"method": method, "kind": kind, "status": status}})

    def clean(self) -> None:
        """As at first: no faults, pods and claims."""
        self._ask("/control", {"clean": True})

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            found: dict[str, Any] = json.load(response)
        return found
