"""The outage that open tabs bring about, in a network namespace of its own with 400 ports in place of 28,232.

    python tests/bench/outage.py        as root, with util-linux' unshare

People work behind configurable-http-proxy 4.6.3. Meanwhile the open tab of somebody else asks for a server that has
ended, until the proxy has no port left. Shown is what the run says, in which order, and that a purge leaves nothing
once the proxy was restarted. The exit code is 1 when the run did not end with exit code 4 and the names of its users.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localhub import LocalHub  # noqa: E402

TOOL = HERE.parent.parent / "hub_stress_test.py"
PORTS = "40000 40399"
PORTS_REST_S = 65.0  # until a port that was used can be used again
INSIDE = "HUB_STRESS_TEST_OUTAGE"  # set in the namespace
LOOPBACK_UP = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
SET_FLAGS = 0x8914


def prepare_namespace() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, LOOPBACK_UP)
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(PORTS)


def ask(hub: LocalHub, method: str, path: str, **headers: str) -> int:
    """The status of a request through the proxy; 0 when it was closed without one."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(hub.public_url).netloc, timeout=10)
    try:
        connection.request(method, path, headers={"Authorization": f"token {hub.visit_token}"} | headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
UPGRADE |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}


def use_the_ports_up(hub: LocalHub, began_s: float, run: subprocess.Popen[str]) -> None:
    """Have the tab of alice ask for her server, which has ended, as long as the run lasts.

    Her route is there until the hub looks after her server, every 30 s; then that is done again.
    """
    number, refused = 0, False
    while run.poll() is None:
        with contextlib.suppress(OSError):  # no port for us either
            hub.call("POST", "/users/alice/server")
        until_s = time.monotonic() + 10
        while ask(hub, "POST", "/user/alice/api/shutdown") != 200 and time.monotonic() < until_s:
            time.sleep(0.2)
        while run.poll() is None and (answer := ask(hub, "GET", "/user/alice/api/events/subscribe", **UPGRADE)) != 302:
            number += answer == 0
            if not refused and ask(hub, "GET", "/hub/login") != 200:
                refused = True
                at_s = time.monotonic() - began_s
                print(
                    f"{at_s:6.1f} s  ===== the log-in page is not answered any more, after {number} websockets",
                    flush=True,
                )


def outage() -> int:
    prepare_namespace()
    with LocalHub(real_proxy=True, proxy_version="4.6.3", stub_labs=True) as hub:
        words = ["stress-test", "-c", "10", "--work", "--think", "2s", "--hold", "75s", "--cleanup-timeout", "20s"]
        environment = os.environ | hub.environment
        began_s = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, TOOL, *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

        def relay() -> None:
            assert run.stderr
            for line in run.stderr:
                print(f"{time.monotonic() - began_s:6.1f} s  {line}", end="", flush=True)

        telling = threading.Thread(target=relay)
        telling.start()
        while hub.truth()["open_websockets"] < 10:
            time.sleep(0.2)
        use_the_ports_up(hub, began_s, run)
        assert run.stdout
        summary = run.stdout.read()
        code = run.wait()
        telling.join()
        print(f"{time.monotonic() - began_s:6.1f} s  ===== exit code {code}\n\n{summary}")
        hub.stop_proxy()
        time.sleep(PORTS_REST_S)
        hub.start_proxy()
        purge = subprocess.run([sys.executable, TOOL, "purge"], env=environment, text=True, capture_output=True)
        left = [name for name in hub.users() if re.fullmatch("hub-stress-test-[0-9]+", name)]
        print(f"===== the proxy was restarted; purge: exit code {purge.returncode}, left {left}\n\n{purge.stdout}")
    named = "hub-stress-test-1 to -10" in " ".join(summary.split())
    return 0 if (code, purge.returncode, left, named) == (4, 0, [], True) else 1


if __name__ == "__main__":
    if os.environ.get(INSIDE):
        raise SystemExit(outage())
    os.environ[INSIDE] = "1"
    os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
