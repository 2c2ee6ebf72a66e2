"""A server of known behaviour that speaks enough of the JupyterHub API to check the numbers of `activity-stress-test`.

As a library: `with KnownServer(service_s=0.01) as server: ...`. As a command it wraps another command:

    python tests/known_server.py --service 0.01 -- hub-stress-test activity-stress-test --count 20

which finds the server in JUPYTERHUB_ENDPOINT and JUPYTERHUB_API_TOKEN. It is a process of its own, so that it shares no
interpreter lock with the tool, and ends with its launcher. It takes any token, an activity report for any name, and one
request at a time on a connection, which it never closes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import math
import os
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from array import array
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from localhub import run_beside

SCOPES = ("admin:users", "delete:users", "list:users", "read:servers", "delete:servers", "servers", "users:activity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How activity reports are answered; everything else is answered at once. Nought turns a behaviour off."""

    service_s: float = 0.0  # from arrival to answer, however many are on their way
    freeze_s: float = 0.0  # at the end of every period: what comes then is begun when the period is over
    period_s: float = 10.0  # counted from the first report
    outlier_share: float = 0.0  # exactly every k-th report, k being the whole number nearest to 1 / share
    outlier_s: float = 0.0  # is answered so much later, without holding up the others
    capacity_per_s: float = 0.0  # no more reports than this are begun in a second; the others queue
    fail_share: float = 0.0  # exactly every k-th report is answered with 500
    also_reads: bool = False  # GET /users/NAME is served, frozen and queued like a report


def is_kth(n: int, share: float) -> bool:
    """Whether the n-th request (from 0) is one of every k-th, k being the whole number nearest to 1 / share."""
    return share > 0 and (n + 1) % round(1 / share) == 0


def frozen_s(behaviour: Behaviour, since_first_s: float) -> float:
    """How long a request has to wait for the end of a freeze, given its arrival."""
    left_s = behaviour.period_s - max(0.0, since_first_s) % behaviour.period_s
    return left_s if left_s <= behaviour.freeze_s else 0.0


def begun_to_answer_s(behaviour: Behaviour, n: int) -> float:
    """How long the n-th report (from 0) takes once it is begun."""
    return behaviour.service_s + (behaviour.outlier_s if is_kth(n, behaviour.outlier_share) else 0.0)


def true_latency(behaviour: Behaviour, due: Sequence[float], first_arrival: float) -> list[float]:
    """How long each report waits that arrives exactly when due, were there no limit to capacity."""
    return [
        frozen_s(behaviour, moment_s - first_arrival) + begun_to_answer_s(behaviour, n)
        for n, moment_s in enumerate(due)
    ]


def per_second(arrivals: Sequence[float], rate: float) -> list[int]:
    """How many arrived in each whole second, counted from half a slot (1 / rate) before the first arrival.

    A second is whole when it ends within one slot of the last arrival, so that 30 at 10 a second are 10, 10, 10.
    """
    if not arrivals:
        return []
    began_s = arrivals[0] - 0.5 / rate
    counts = Counter(math.floor(moment_s - began_s) for moment_s in arrivals)
    return [counts[second] for second in range(math.floor(arrivals[-1] + 1 / rate - began_s))]


class KnownServer:
    """A running server, until the end of the `with` block."""

    endpoint: str

    def __init__(self, **behaviour: Any) -> None:
        self.behaviour = Behaviour(**behaviour)

    def __enter__(self) -> KnownServer:
        options = json.dumps(dataclasses.asdict(self.behaviour))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout
        port = self._process.stdout.readline().decode().strip()
        if not port:
            self.__exit__()
            raise RuntimeError("the known server did not start")
        self._url = f"http://127.0.0.1:{port}"
        self.endpoint = f"{self._url}/hub/api"
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this server."""
        return {"JUPYTERHUB_ENDPOINT": self.endpoint, "JUPYTERHUB_API_TOKEN": "known"}

    def arrivals(self) -> list[float]:
        """The moment (of `time.monotonic`) at which each activity report so far had arrived in full, in order."""
        moments = array("d")
        moments.frombytes(_get(f"{self._url}/arrivals"))
        return moments.tolist()

    def users(self) -> set[str]:
        """The names of the users that exist."""
        return {user["name"] for user in json.loads(_get(f"{self.endpoint}/users"))}


def _get(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as response:
        content: bytes = response.read()
    return content


# ==== In the server's process ========================================================================================


def _response(status: int, content: bytes = b"") -> bytes:
    length = "" if status == 204 else f"Content-Length: {len(content)}\r\n"
    reason = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n{length}\r\n".encode() + content


def _json_response(status: int, data: Any) -> bytes:
    return _response(status, json.dumps(data).encode())


ACCEPTED, FAILED, DONE = _response(200), _response(500), _response(204)
NOT_FOUND = _json_response(404, {"status": 404, "message": None})


class Hub:
    """The users, and what became of their reports."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.users: dict[str, None] = {}
        self.arrivals = array("d")
        self._next_begin_s = 0.0

    def begin_s(self, arrived_s: float) -> float:
        """The moment at which a request is begun, after queue and freeze; it takes its place in the queue."""
        moment_s = max(arrived_s, self._next_begin_s)
        moment_s += frozen_s(self.behaviour, moment_s - self.arrivals[0]) if self.arrivals else 0.0
        if self.behaviour.capacity_per_s:
            self._next_begin_s = moment_s + 1 / self.behaviour.capacity_per_s
        return moment_s

    def report(self) -> tuple[float, bytes]:
        """When to answer the activity report that has just arrived, and how."""
        n, arrived_s = len(self.arrivals), time.monotonic()
        self.arrivals.append(arrived_s)
        answer = FAILED if is_kth(n, self.behaviour.fail_share) else ACCEPTED
        return self.begin_s(arrived_s) + begun_to_answer_s(self.behaviour, n), answer

    def answer(self, method: str, path: list[str], body: bytes) -> bytes:
        """The response to any other request."""
        match method, path:
            case "GET", ["arrivals"]:
                return _response(200, self.arrivals.tobytes())
            case "GET", ["hub", "api"] | ["hub", "api", ""]:
                return _json_response(200, {"version": "5.0.0"})
            case "GET", ["hub", "api", "user"]:
                return _json_response(200, {"name": "t", "scopes": SCOPES})
            case "GET", ["hub", "api", "users"]:
                return _json_response(200, [_model(name) for name in self.users])
            case "POST", ["hub", "api", "users"]:
                new = [name for name in json.loads(body)["usernames"] if name not in self.users]
                self.users.update(dict.fromkeys(new))
                return _json_response(201, [_model(name) for name in new]) if new else _response(409)
            case "GET", ["hub", "api", "users", name] if name in self.users:
                return _json_response(200, _model(name))
            case "DELETE", ["hub", "api", "users", name] if name in self.users:
                del self.users[name]
                return DONE
            case "DELETE", ["hub", "api", "users", _, "server"]:
                return DONE
        return NOT_FOUND


def _model(name: str) -> dict[str, Any]:
    return {"name": name, "admin": False, "servers": {}}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; bodies have a Content-Length."""

    def __init__(self, hub: Hub, loop: asyncio.AbstractEventLoop) -> None:
        self._hub, self._loop = hub, loop
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (head_end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:head_end]
            length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            end = head_end + 4 + int(length or 0)
            if len(self._received) < end:
                return
            body, self._received = self._received[head_end + 4 : end], self._received[end:]
            self._serve(head, body)

    def _serve(self, head: bytes, body: bytes) -> None:
        method, target, _ = head.split(b" ", 2)
        if method == b"POST" and target.endswith(b"/activity"):
            self._send_at(*self._hub.report())
            return
        path = [urllib.parse.unquote(part) for part in target.decode().partition("?")[0].split("/")[1:]]
        answer = self._hub.answer(method.decode(), path, body)
        behaviour = self._hub.behaviour
        if behaviour.also_reads and method == b"GET" and len(path) == 4:
            self._send_at(self._hub.begin_s(time.monotonic()) + behaviour.service_s, answer)
        else:
            self._transport.write(answer)

    def _send_at(self, moment_s: float, answer: bytes) -> None:
        if moment_s <= time.monotonic():
            self._transport.write(answer)
        else:
            self._loop.call_at(moment_s, self._send, answer)

    def _send(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


class PreciseSelector(selectors.DefaultSelector):
    """Waits to the microsecond, where epoll by itself rounds up to the next millisecond."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if (events := super().select(0)) or timeout == 0:
            return events
        select.select([self.fileno()], [], [], timeout)
        return super().select(0)


async def serve(behaviour: Behaviour) -> None:
    """Serve on a free port, which is printed, until the launcher ends."""
    hub, loop = Hub(behaviour), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(hub, loop), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    await server.serve_forever()


def _end_with_launcher() -> None:
    os.read(0, 1)
    os._exit(0)


# ==== Command line ===================================================================================================


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Behaviour):
        flag = "--" + field.name.removesuffix("_s").removesuffix("_per").replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, dest=field.name, action="store_true")
        else:
            parser.add_argument(flag, dest=field.name, type=float, default=field.default, help=f"({field.default})")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what to run beside the server; without one it just stays up"
    )
    return parser.parse_args()


def main() -> int:
    options = vars(_parse_args())
    command, as_json = options.pop("command"), options.pop("serve")
    if as_json:
        gc.disable()
        loop = asyncio.SelectorEventLoop(PreciseSelector())
        loop.run_until_complete(serve(Behaviour(**json.loads(as_json))))
    command = command[1:] if command[:1] == ["--"] else command
    with KnownServer(**options) as server:
        if command:
            return run_beside(server, command)  # type: ignore[arg-type]  # which only needs an environment
        for name, value in server.environment.items():
            print(f"export {name}={value}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
