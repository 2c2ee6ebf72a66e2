"""A proxy on a real socket that does to HTTP what a healthy hub will not do on demand.

It stands between a client and an upstream on the loopback, passes everything through as it arrives (streams piece by
piece), and lets a rule pick a fault for each request. The whole proxy can also go silent or refuse connections.

Every request goes to the upstream on a connection of its own, so nothing is ever sent twice. When the upstream refuses
or dies in mid-answer, the client's connection is reset, as if there were no proxy.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import select
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException, HTTPResponse, IncompleteRead, responses
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
PIECE_BYTES = 65536
CLOSE_TIMEOUT_S = 5.0
ACCEPT_POLL_S = 0.02
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
HOP_BY_HOP = {"connection", "expect", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}


# ---- Records -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a rule sees. `path` is as sent, with its query."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass
class Entry:
    """A request in the log. `time` is monotonic seconds at arrival.

    `status` is what the client was sent, `None` while or because there was no answer; `fault` is the class name.
    """

    method: str
    path: str
    time: float
    status: int | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Fault:
    """What to do to one request."""


@dataclass(frozen=True)
class Answer(Fault):
    """This answer, at a moment of `time.monotonic` if one is given; the upstream never sees the request."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    at_s: float = 0.0


def hub_answer(status: int, body: bytes = b"", **headers: str) -> Answer:
    """An answer that shows itself to be the hub's."""
    return Answer(status, body, {"X-JupyterHub-Version": "6.1.1", **headers})


@dataclass(frozen=True)
class AnswerAfter(Answer):
    """The upstream acts and answers in full; the client gets this answer instead, as from a gateway's 504."""


@dataclass(frozen=True)
class Delay(Fault):
    """This wait, then the upstream."""

    seconds: float


@dataclass(frozen=True)
class ResetBefore(Fault):
    """A TCP reset; the upstream never sees the request."""


@dataclass(frozen=True)
class ResetAfter(Fault):
    """A TCP reset after the upstream acted and answered in full."""


@dataclass(frozen=True)
class ResetStream(Fault):
    """A TCP reset after this many lines of the upstream's body were passed on (or all of them, if it has fewer)."""

    lines: int = 1


@dataclass(frozen=True)
class HalfBody(Fault):
    """The upstream's head with the full Content-Length, half of its body, and an orderly close."""


@dataclass(frozen=True)
class Silence(Fault):
    """No answer: held until `silence(False)`, the client leaving, or the proxy closing. The upstream sees nothing."""


# ---- Rules ---------------------------------------------------------------------------------------------------------

Rule = Callable[[Request], Fault | None]
Match = Callable[[Request], bool]


def matching(method: str | None, pattern: str) -> Match:
    """True of requests with this method (any, if `None`) and a path, query included, in which the regex is found."""
    return lambda request: method in (None, request.method) and re.search(pattern, request.path) is not None


def every(match: Match, fault: Fault) -> Rule:
    """The fault for each request that matches."""
    return lambda request: fault if match(request) else None


def first(n: int, match: Match, fault: Fault) -> Rule:
    """The fault for the first n requests that match."""
    seen = itertools.count()
    return lambda request: fault if match(request) and next(seen) < n else None


# ---- Sockets -------------------------------------------------------------------------------------------------------


class ClientLeft(Exception):
    """The client's connection has ended, by its own doing or by the proxy's."""


def wait(client: socket.socket, upstream: socket.socket | None = None, seconds: float | None = None) -> None:
    """Return when the upstream can be read or the time is over; raise ClientLeft as soon as the client has ended.

    No client here pipelines, so one that becomes readable while it waits for an answer has hung up.
    """
    poll = select.poll()
    for end_point in filter(None, (client, upstream)):
        poll.register(end_point, select.POLLIN)
    if client.fileno() in dict(poll.poll(None if seconds is None else seconds * 1000)):
        raise ClientLeft


def end(client: socket.socket, *, reset: bool) -> None:
    """Wake the thread that serves this client, so that it closes the connection, with a TCP reset if so asked.

    Closing it from here would not interrupt that thread, and shutting down both directions would say goodbye first.
    """
    with contextlib.suppress(OSError):
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        client.shutdown(socket.SHUT_RD)


class Upstream(socket.socket):
    """A connection to the upstream; whoever waits for its answer also notices the client leaving."""

    def __init__(self, address: tuple[str, int], client: socket.socket) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._address = address
        self._client = client

    def send_request(self, request: bytes) -> None:
        self.connect(self._address)
        self.sendall(request)

    def recv_into(self, *args: Any) -> int:
        wait(self._client, self)
        return super().recv_into(*args)


def head(start: str, headers: Iterable[tuple[str, str]], **added: str) -> bytes:
    """A message's head: its first line, its headers but for the hop-by-hop ones, and those added (`_` for `-`)."""
    kept = [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]
    kept += [(name.replace("_", "-"), value) for name, value in added.items()]
    return "\r\n".join([start, *(f"{name}: {value}" for name, value in kept), "\r\n"]).encode("latin-1")


# ---- One connection ------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One client's connection, request after request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    entry: Entry

    def log_message(self, *args: Any) -> None:
        """Nothing: the proxy keeps its own log."""

    def exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # Not self.path, in which the standard library merges leading slashes; a forward proxy is asked for a whole URL.
        path = re.sub("^http://[^/]*", "", self.requestline.split()[1])
        request = Request(self.command, path, body, self.headers)
        self.entry = self.server.proxy.arrived(request)
        try:
            self.hold_if_silent()
            rule = self.server.proxy.rule
            fault = rule(request) if rule else None
            self.entry.fault = type(fault).__name__ if fault else None
            self.act(request, fault)
        except ClientLeft:
            self.close_connection = True
        except (OSError, HTTPException):
            self.reset()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = exchange

    def act(self, request: Request, fault: Fault | None) -> None:
        if isinstance(fault, ResetBefore):
            self.reset()
        elif isinstance(fault, Silence):
            self.hold_if_silent(always=True)
        elif type(fault) is Answer:
            if (seconds := fault.at_s - time.monotonic()) > 0:
                wait(self.connection, seconds=seconds)
            self.answer(fault)
        else:
            if isinstance(fault, Delay):
                wait(self.connection, seconds=fault.seconds)
            with self.forwarded(request) as response:
                self.act_after(response, fault)

    def act_after(self, response: HTTPResponse, fault: Fault | None) -> None:
        if isinstance(fault, AnswerAfter):
            response.read()
            self.answer(fault)
        elif isinstance(fault, ResetAfter):
            response.read()
            self.reset()
        elif isinstance(fault, HalfBody):
            self.half(response)
        elif isinstance(fault, ResetStream):
            self.pass_on(response, itertools.islice(iter(response.readline, b""), fault.lines))
            self.reset()
        else:
            self.pass_on(response, iter(lambda: response.read1(PIECE_BYTES), b""))
            self.finish_body(response)

    @contextlib.contextmanager
    def forwarded(self, request: Request) -> Iterator[HTTPResponse]:
        """The upstream's answer, its head read; the connection is closed on leaving."""
        start = f"{request.method} {request.path} HTTP/1.1"
        with Upstream(self.server.proxy.upstream, self.connection) as upstream:
            upstream.send_request(head(start, self.headers.items(), Connection="close") + request.body)
            with HTTPResponse(upstream, method=request.method) as response:
                response.begin()
                yield response

    def pass_on(self, response: HTTPResponse, pieces: Iterable[bytes]) -> None:
        """Send the upstream's head, then each piece of the body as it comes, in the upstream's kind of framing."""
        framing = {}
        if response.chunked:
            framing["Transfer_Encoding"] = "chunked"
        elif response.length is None:
            framing["Connection"] = "close"
            self.close_connection = True
        headers = [(name, value) for name, value in response.getheaders() if name != self.server.proxy.strips]
        self.send_head(response.status, response.reason, headers, **framing)
        for piece in pieces:
            self.send(b"%x\r\n%b\r\n" % (len(piece), piece) if response.chunked else piece)

    def finish_body(self, response: HTTPResponse) -> None:
        if response.length:
            raise IncompleteRead(b"", response.length)
        if response.chunked and self.command != "HEAD":
            self.send(b"0\r\n\r\n")

    def half(self, response: HTTPResponse) -> None:
        body = response.read()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() != "content-length"]
        self.send_head(response.status, response.reason, headers, Content_Length=str(len(body)))
        self.send(body[: len(body) // 2])
        self.close_connection = True

    def answer(self, answer: Answer) -> None:
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        self.send_head(answer.status, responses.get(answer.status, ""), headers.items())
        if self.command != "HEAD":
            self.send(answer.body)

    def send_head(self, status: int, reason: str, headers: Iterable[tuple[str, str]], **added: str) -> None:
        self.hold_if_silent()
        # Before the client can know it, so that whoever has the answer also finds it in the log.
        self.entry.status = status
        self.send(head(f"HTTP/1.1 {status} {reason}", headers, **added))

    def send(self, data: bytes) -> None:
        self.hold_if_silent()
        self.connection.sendall(data)

    def hold_if_silent(self, *, always: bool = False) -> None:
        """Return at once unless the proxy is silent; otherwise wait for the end of the connection: ClientLeft."""
        if self.server.proxy.holds(self.connection, always=always):
            self.entry.fault = Silence.__name__
            wait(self.connection)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.close_connection = True


class Server(socketserver.ThreadingTCPServer):
    """A bound port with its open connections; it refuses until it is started, and can be started once."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy, port: int) -> None:
        self.proxy = proxy
        self._clients: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__((HOST, port), Handler, bind_and_activate=False)
        self.server_bind()

    def start(self) -> None:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(ACCEPT_POLL_S,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and reset the open connections; return when they are gone. TimeoutError if one is not."""
        self.shutdown()
        self.server_close()
        with self._changed:
            for client in self._clients:
                end(client, reset=True)
            if not self._changed.wait_for(lambda: not self._clients, CLOSE_TIMEOUT_S):
                raise TimeoutError(f"{len(self._clients)} connections to the fault proxy do not end")

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # The inherited method shuts the connection down in an orderly way, which would spoil a reset.
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(RESET_ON_CLOSE)) == RESET_ON_CLOSE:
            request.close()
        else:
            super().shutdown_request(request)
        with self._changed:
            self._clients.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client's broken connection is nothing to report; a bug, such as a rule that raises, is."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


# ---- The proxy -----------------------------------------------------------------------------------------------------


class FaultProxy:
    """A proxy in front of the upstream (a URL of which host and port are used), open until closed.

    `url` is where it listens, and stays the same. `rule` may be replaced at any time; `None` passes everything through.
    """

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or HOST, parts.port or 80)
        self.rule: Rule | None = None
        self.strips = ""  # a header of the upstream's answers
        self._lock = threading.Lock()
        self._log: list[Entry] = []
        self._held: set[socket.socket] = set()
        self._silent = False
        self._refusing = False
        self._server = Server(self, 0)
        self._port: int = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://{HOST}:{self._port}"
        self.endpoint = f"{self.url}/hub/api"  # of a hub behind it
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def requests(self) -> list[Entry]:
        """The requests so far, in order of arrival: a copy, which does not change any more."""
        with self._lock:
            return [replace(entry) for entry in self._log]

    def silence(self, on: bool) -> None:
        """Hold all requests and running streams, or go back to normal and close the connections of those held."""
        with self._lock:
            self._silent = on
            if not on:
                for client in self._held:
                    end(client, reset=False)
                self._held.clear()

    def refuse(self, on: bool) -> None:
        """Close the port and reset all connections, or open the same port again. Returns when it is done."""
        if on and not self._refusing:
            self._server.stop()
            # Bound again at once, so that nobody else takes the port; not listening, so that it refuses.
            self._server = Server(self, self._port)
        elif self._refusing and not on:
            self._server.start()
        self._refusing = on

    def close(self) -> None:
        """Close the port and reset all connections."""
        if self._refusing:
            self._server.server_close()
        else:
            self._server.stop()

    def arrived(self, request: Request) -> Entry:
        """The request's entry in the log."""
        entry = Entry(request.method, request.path, time.monotonic())
        with self._lock:
            self._log.append(entry)
        return entry

    def holds(self, client: socket.socket, *, always: bool) -> bool:
        """Whether the client has to wait in silence; if so, it is among those that the release will close."""
        with self._lock:
            if self._silent or always:
                self._held.add(client)
            return self._silent or always
