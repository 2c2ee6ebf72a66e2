"""A proxy on a real socket that does to HTTP what a healthy hub will not do on demand.

It stands between a client and an upstream on the loopback, passes everything through as it arrives (streams piece by
piece), and lets a rule pick a fault for each request.

Every request goes to the upstream on a connection of its own, so nothing is ever sent twice. When the upstream refuses
or dies in mid-answer, the client's connection is reset, as if there were no proxy. When the client leaves, what was
going on for it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from aiohttp.http import SERVER_SOFTWARE
from yarl import URL

HOST = "127.0.0.1"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
HOP_BY_HOP = {"connection", "expect", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
ADDED_BY_CLIENTS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
START_TIMEOUT_S, CLOSE_WITHIN_S = 60.0, 0.01
RULES_AT_ONCE = 100  # a rule may take its time


# ---- Records -------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What a rule sees, and the log keeps. `path` is as sent, with its query; `time` is monotonic seconds at arrival.

    `status` is what the client was sent, `None` while or because there was no answer; `fault` is the class name.
    """

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    time: float = field(default_factory=time.monotonic)
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
    """No answer: held until the client leaves, or the proxy closes. The upstream sees nothing."""


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


# ---- The proxy -----------------------------------------------------------------------------------------------------


class FaultProxy:
    """A proxy in front of the upstream (a URL of which host and port are used), open until closed.

    `url` is where it listens. `rule` may be replaced at any time; `None` passes everything through.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = f"http://{urlsplit(upstream).netloc}"
        self.rule: Rule | None = None
        self.strips = ""  # a header of the upstream's answers
        self.requests: list[Request] = []  # so far, in order of arrival
        self._rules = ThreadPoolExecutor(RULES_AT_ONCE)
        started: Future[int] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(started),), daemon=True)
        self._thread.start()
        self.url = f"http://{HOST}:{started.result(START_TIMEOUT_S)}"
        self.endpoint = f"{self.url}/hub/api"  # of a hub behind it

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the port and all connections."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self._rules.shutdown(wait=False)

    async def _serve(self, started: Future[int]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._exchange)
        app.on_response_prepare.append(drop_what_aiohttp_adds)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_WITHIN_S)
        async with ClientSession(
            connector=TCPConnector(force_close=True, limit=0),
            auto_decompress=False,
            cookie_jar=DummyCookieJar(),
            skip_auto_headers=ADDED_BY_CLIENTS,
            timeout=ClientTimeout(),
        ) as self._client:
            await runner.setup()
            await web.TCPSite(runner, HOST, 0).start()
            started.set_result(runner.addresses[0][1])
            await self._closing.wait()
            await runner.cleanup()

    async def fault_for(self, request: Request) -> Fault | None:
        """What the rule says, which may take its time."""
        return await self._loop.run_in_executor(self._rules, self.rule, request) if self.rule else None

    async def _exchange(self, request: web.Request) -> web.StreamResponse:
        path = re.sub("^http://[^/]*", "", request.raw_path)  # a forward proxy is asked for a whole URL
        seen = Request(request.method, path, await request.read(), request.headers)
        self.requests.append(seen)
        fault = await self.fault_for(seen)
        seen.fault = type(fault).__name__ if fault else None
        try:
            return await self._act(request, seen, fault)
        except (ClientError, OSError):
            return await reset(request)

    async def _act(self, request: web.Request, seen: Request, fault: Fault | None) -> web.StreamResponse:
        if isinstance(fault, ResetBefore):
            return await reset(request)
        if isinstance(fault, Silence):
            return await until_cancelled()
        if type(fault) is Answer:
            await asyncio.sleep(fault.at_s - time.monotonic())
            return answer_with(fault, seen)
        if isinstance(fault, Delay):
            await asyncio.sleep(fault.seconds)
        url, headers = URL(self._upstream + seen.path, encoded=True), end_to_end(request.headers)
        async with self._client.request(
            seen.method, url, headers=headers, data=seen.body or None, allow_redirects=False
        ) as answer:
            if isinstance(fault, (AnswerAfter, ResetAfter)):
                await answer.read()
                return answer_with(fault, seen) if isinstance(fault, AnswerAfter) else await reset(request)
            seen.status = answer.status  # before the client can know it
            return await self._pass_on(request, answer, fault)

    async def _pass_on(self, request: web.Request, answer: ClientResponse, fault: Fault | None) -> web.StreamResponse:
        """The upstream's answer, piece by piece as it comes; with a fault, a part of it."""
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=end_to_end(answer.headers))
        response.headers.popall(self.strips, None)
        if isinstance(fault, HalfBody):
            body = await answer.read()
            response.content_length = len(body)
            response.force_close()
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            return response
        await response.prepare(request)
        if isinstance(fault, ResetStream):
            for _ in range(fault.lines):
                await response.write(await answer.content.readline())
            return await reset(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        return response


def end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP]


def answer_with(answer: Answer, seen: Request) -> web.Response:
    seen.status = answer.status
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)


async def drop_what_aiohttp_adds(request: web.Request, response: web.StreamResponse) -> None:
    if response.headers["Server"] == SERVER_SOFTWARE:
        del response.headers["Server"]
    if response.content_type == "application/octet-stream":
        response.headers.popall("Content-Type", None)


async def reset(request: web.Request) -> Any:
    """Reset the client's connection."""
    if request.transport:
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        request.transport.abort()
    return await until_cancelled()


async def until_cancelled() -> Any:
    """Wait for the end of the client's connection, with which its request is cancelled."""
    await asyncio.Event().wait()
