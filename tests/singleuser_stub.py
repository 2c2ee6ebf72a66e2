"""A stub of single-user servers with kernels: one process is the servers of hundreds of people.

`LocalHub(stub_labs=True)` runs it. Each server listens on a port of its own and answers as `jupyterhub-singleuser` with
JupyterLab does: it checks tokens with the hub, shows a start page, and has kernels whose websockets speak the protocol
of Jupyter. test_equipment.py compares the two. It runs no code: `outcome_of` knows a few cells by sight, and any
other cell succeeds without output.

The control port starts, ends and polls servers, and GET /truth says what happened, to compare with what a client saw:
the `cells` with the moments (of `time.monotonic`) at which each was received and its last message sent, the
`requests` by path and status, the `open_websockets`, `kernels` and `servers`, and the `hub_checks` of tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import json
import mimetypes
import os
import re
import resource
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import datetime, timezone
from socket import socket as BoundSocket
from typing import Any
from urllib.parse import unquote, urlencode

from aiohttp import ClientError, ClientSession, ClientTimeout, WSMsgType, web

POST_KERNEL_S, DELETE_KERNEL_S, FIRST_CELL_EXTRA_S = 0.027, 0.12, 0.07  # as measured on real servers
KERNEL_START_S, CELL_S, DEATH_NOTICED_S, RESTART_S = 0.33, 0.01, 2.6, 0.3

PAGE = ("<!doctype html><html><head><title>JupyterLab</title></head><body>" + "x" * 4400 + "</body></html>").encode()
STATIC_BYTES = 112_000  # the mean size of the 44 files that JupyterLab fetches

Json = dict[str, Any]


# ==== Cells ==========================================================================================================


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cell does."""

    takes_s: float = 0.0
    result: str | None = None
    error: tuple[str, str] | None = None
    dies: bool = False


def outcome_of(code: str) -> Outcome:
    """What the code would do, as far as it is one of the few cells that are known."""
    code = code.strip()
    if found := re.fullmatch(r"(\d+) ?\* ?(\d+)", code):
        return Outcome(result=str(int(found[1]) * int(found[2])))
    if found := re.fullmatch(r"import time\s*[;\n]\s*time\.sleep\(([\d.]+)\)", code):
        return Outcome(takes_s=float(found[1]))
    if found := re.fullmatch(r"raise (\w+)(?:\((?:(['\"])(.*)\2)?\))?", code):
        return Outcome(error=(found[1], found[3] or ""))
    if re.fullmatch(r"import os\s*[;\n]\s*os\._exit\(\d+\)", code):
        return Outcome(dies=True)
    return Outcome()


# ==== Truth ==========================================================================================================


class Truth:
    """What happened, on all servers."""

    def __init__(self) -> None:
        self.cells: list[Json] = []
        self.requests: dict[str, Counter[int]] = {}
        self.hub_checks = 0

    def count(self, method: str, parts: list[str], status: int) -> None:
        """Count a request. Kernels have no identity here, and static files no name."""
        if parts[:2] == ["api", "kernels"] and len(parts) > 2:
            parts = [*parts[:2], "ID", *parts[3:]]
        elif parts[0] == "static":
            parts = parts[:1]
        self.requests.setdefault(f"{method} /{'/'.join(parts)}", Counter())[status] += 1


# ==== Kernels ========================================================================================================


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


class Kernel:
    """A kernel that runs nothing: it takes cells one after the other, and tells all its websockets."""

    def __init__(self, server: str, truth: Truth) -> None:
        self.id = str(uuid.uuid4())
        self.state = "starting"
        self.sockets: set[web.WebSocketResponse] = set()
        self.listens = asyncio.Event()
        self._server, self._truth = server, truth
        self._session = uuid.uuid4().hex
        self._executed = 0
        self._requests: asyncio.Queue[tuple[web.WebSocketResponse, Json, Json]] = asyncio.Queue()
        self._life = asyncio.create_task(self._live())

    def model(self) -> Json:
        return {"id": self.id, "name": "python3", "execution_state": self.state, "connections": len(self.sockets)}

    async def greet(self, socket: web.WebSocketResponse) -> None:
        """Send what the server's own question to the kernel leaves on every new websocket."""
        self.state = "idle"
        for state in ("busy", "idle"):
            content = {"execution_state": state}
            await self._send([socket], "status", "iopub", content, self._servers_own("kernel_info_request"))

    def receive(self, socket: web.WebSocketResponse, text: str) -> None:
        """Queue a cell."""
        cell = {"server": self._server, "kernel": self.id, "received_s": time.monotonic(), "sent_s": None}
        self._truth.cells.append(cell)
        self._requests.put_nowait((socket, json.loads(text), cell))

    async def end(self) -> None:
        """Stop for good; websockets stay open, and hear nothing any more."""
        self._life.cancel()
        parent = self._servers_own("shutdown_request")
        await self._tell_state("busy", parent)
        await self._tell("shutdown_reply", {"status": "ok", "restart": False}, parent)
        await self._tell_state("idle", parent)

    async def _live(self) -> None:
        await asyncio.sleep(KERNEL_START_S)
        self.listens.set()
        while True:
            await self._execute(*await self._requests.get())

    async def _execute(self, socket: web.WebSocketResponse, request: Json, cell: Json) -> None:
        header, code = request["header"], request["content"]["code"]
        outcome = outcome_of(code)
        self._executed += 1
        self.state = "busy"
        numbered: Json = {"execution_count": self._executed}
        await self._tell_state("busy", header)
        await self._tell("execute_input", {"code": code} | numbered, header)
        if outcome.dies:
            await self._die()
            return
        await asyncio.sleep(outcome.takes_s + CELL_S + (FIRST_CELL_EXTRA_S if self._executed == 1 else 0.0))
        reply = {"status": "ok", "user_expressions": {}, "payload": []} | numbered
        if outcome.error:
            name, text = outcome.error
            error = {"ename": name, "evalue": text, "traceback": [f"{name}: {text}"]}
            await self._tell("error", error, header)
            reply |= {"status": "error"} | error
        elif outcome.result is not None:
            shown = {"data": {"text/plain": outcome.result}, "metadata": {}}
            await self._tell("execute_result", shown | numbered, header)
        self.state = "idle"
        first, last = [self._send([socket], "execute_reply", "shell", reply, header), self._tell_state("idle", header)][
            :: 1 if self._executed % 2 else -1
        ]  # a real kernel keeps to neither order
        await first
        cell["sent_s"] = time.monotonic()
        await last

    async def _die(self) -> None:
        """Be restarted by the server, which takes a while to notice; what was asked for meanwhile is lost."""
        for state, after_s in (("restarting", DEATH_NOTICED_S), ("starting", RESTART_S)):
            await asyncio.sleep(after_s)
            self.state = state
            await self._tell_state(state, {})
        self._executed = 0
        while not self._requests.empty():
            self._requests.get_nowait()

    def _servers_own(self, kind: str) -> Json:
        """The header of a request that the server makes by itself."""
        return {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": self._session}

    async def _tell_state(self, state: str, parent: Json) -> None:
        await self._tell("status", {"execution_state": state}, parent)

    async def _tell(self, kind: str, content: Json, parent: Json) -> None:
        await self._send(list(self.sockets), kind, "iopub", content, parent)

    async def _send(
        self, sockets: list[web.WebSocketResponse], kind: str, channel: str, content: Json, parent: Json
    ) -> None:
        """Send a message of the kernel protocol to these websockets."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "username": "username", "session": self._session}
        identity = {"msg_id": header["msg_id"], "msg_type": kind, "channel": channel}
        rest = {"parent_header": parent, "metadata": {}, "content": content, "buffers": []}
        frame = json.dumps(identity | {"header": header | {"date": now(), "version": "5.4"}} | rest)
        for socket in sockets:
            with contextlib.suppress(ConnectionError, RuntimeError):  # it has gone
                await socket.send_str(frame)


# ==== Servers ========================================================================================================


Access = enum.Enum("Access", "UNKNOWN FORBIDDEN ALLOWED")  # of a token: not known, not allowed here, allowed


class Refusal(Exception):
    """A response in place of the one that was asked for."""

    def __init__(self, response: web.Response) -> None:
        self.response = response


class Server:
    """One person's server, as JupyterHub's variables describe it. It speaks to its hub through the session."""

    def __init__(self, environment: dict[str, str], hub_version: str, truth: Truth, hub: ClientSession) -> None:
        self.port = 0  # until it listens
        self.kernels: dict[str, Kernel] = {}
        self.started = now()
        self.name = environment["JUPYTERHUB_USER"]
        self.prefix = unquote(environment["JUPYTERHUB_SERVICE_PREFIX"])
        self._environment, self._hub_version = environment, hub_version
        self._truth, self._hub = truth, hub
        self._access_of: dict[str, Access] = {}  # by token
        self._http = web.Server(self._answer, access_log=None)
        self._listener: asyncio.Server | None = None

    @property
    def listening(self) -> bool:
        return self._listener is not None

    # ---- Life -------------------------------------------------------------------------------------------------------

    async def start(self, bound: BoundSocket | None = None) -> None:
        """Listen at a port of its own, or with this socket."""
        loop = asyncio.get_running_loop()
        where: Json = {"sock": bound} if bound else {"host": "127.0.0.1", "port": 0}
        self._listener = await loop.create_server(self._http, backlog=1024, **where)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def announce(self) -> None:
        """Tell the hub what a real server tells it when it starts."""
        token = self._environment["JUPYTERHUB_API_TOKEN"]
        named = self._environment.get("JUPYTERHUB_SERVER_NAME", "")
        activity = {"last_activity": self.started, "servers": {named: {"last_activity": self.started}}}
        with contextlib.suppress(ClientError, asyncio.TimeoutError):
            await self._ask_hub("GET", self._environment["JUPYTERHUB_API_URL"], token)
            await self._ask_hub("POST", self._environment["JUPYTERHUB_ACTIVITY_URL"], token, activity)

    async def end(self) -> None:
        """Close the port and every connection, without a goodbye."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        for kernel in self.kernels.values():
            kernel.sockets.clear()
            await kernel.end()
        self.kernels.clear()
        for connection in self._http.connections:
            connection.force_close()
        await self._http.shutdown(0.1)

    # ---- Tokens -----------------------------------------------------------------------------------------------------

    async def _access(self, request: web.BaseRequest) -> Access:
        """What the request may do; the hub is asked once for each token, and refusals are remembered too."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() not in ("token", "bearer") or not token:
            return Access.UNKNOWN
        if token not in self._access_of:
            self._access_of[token] = await self._check(token)
        return self._access_of[token]

    async def _check(self, token: str) -> Access:
        self._truth.hub_checks += 1
        try:
            status, owner = await self._ask_hub("GET", self._environment["JUPYTERHUB_API_URL"] + "/user", token)
        except (ClientError, asyncio.TimeoutError) as error:
            raise Refusal(_refused(500, "Failed to connect to Hub API")) from error
        if status >= 500:
            raise Refusal(_refused(502, "Failed to check authorization (upstream problem)"))
        if status != 200:
            return Access.UNKNOWN
        if "scopes" not in owner:  # a hub before 2.0
            return Access.ALLOWED if owner["name"] == self.name else Access.FORBIDDEN
        listed = self._environment.get("JUPYTERHUB_OAUTH_ACCESS_SCOPES") or self._environment["JUPYTERHUB_OAUTH_SCOPES"]
        enough = {"access:servers", *json.loads(listed)}
        return Access.ALLOWED if enough & set(owner["scopes"]) else Access.FORBIDDEN

    async def _ask_hub(self, method: str, url: str, token: str, body: Json | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"token {token}"}
        async with self._hub.request(method, url, json=body, headers=headers, allow_redirects=False) as response:
            content = await response.read()
            return response.status, json.loads(content) if response.status == 200 and content else None

    # ---- Requests ---------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        parts = path.removeprefix(self.prefix).split("/") if path.startswith(self.prefix) else ["?"]
        try:
            response = await self._route(request, parts)
        except Refusal as refusal:
            response = refusal.response
        if isinstance(response, web.WebSocketResponse):
            return response  # which is over, and was counted when it was opened
        if parts != [""] and parts[-1] != "channels":  # as it is
            response.headers["X-JupyterHub-Version"] = self._hub_version
        self._truth.count(request.method, parts, response.status)
        return response

    async def _route(self, request: web.BaseRequest, parts: list[str]) -> web.StreamResponse:
        match request.method, parts:
            case "GET", [""]:
                return _redirect(self.prefix + "lab?")
            case "GET", ["static", *_, name]:
                kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
                return web.Response(body=bytes(STATIC_BYTES), content_type=kind)
        access = await self._access(request)
        match request.method, parts:
            case "GET", ["lab"]:
                if access is Access.ALLOWED:
                    return web.Response(body=PAGE, content_type="text/html")
                return self._login() if access is Access.UNKNOWN else self._forbidden()
            case _, ["api", *_] if access is Access.UNKNOWN and _is_foreign(request):
                return _refused(404, "Not Found")
            case "GET", ["api"]:
                return web.json_response({"version": "2.0.0"})
            case "GET", ["api", "kernels", kernel_id, "channels"]:
                if access is not Access.ALLOWED:
                    return _page(403, "Forbidden")
                return await self._channels(request, kernel_id)
            case method, ["api", "kernels" | "status" | "shutdown" | "kernelspecs", *_] if access is not Access.ALLOWED:
                unsafe = access is Access.UNKNOWN and method != "GET"
                return _refused(403, f"'_xsrf' argument missing from {method}" if unsafe else "Forbidden")
            case "GET", ["api", "status"]:
                return web.json_response({"started": self.started, "kernels": len(self.kernels)})
            case "GET", ["api", "kernelspecs"]:
                return web.json_response({"kernelspecs": {}})
            case "POST", ["api", "shutdown"]:
                asyncio.get_running_loop().call_later(0.05, in_background, self.end())
                return web.Response()
            case "GET", ["api", "kernels"]:
                return web.json_response([kernel.model() for kernel in self.kernels.values()])
            case "POST", ["api", "kernels"]:
                return await self._start_kernel(await request.text())
            case _, ["api", "kernels", kernel_id] if kernel_id not in self.kernels:
                return _refused(404, f"Kernel does not exist: {kernel_id}")
            case "GET", ["api", "kernels", kernel_id]:
                return web.json_response(self.kernels[kernel_id].model())
            case "DELETE", ["api", "kernels", kernel_id]:
                await self.kernels.pop(kernel_id).end()
                await asyncio.sleep(DELETE_KERNEL_S)
                return web.Response(status=204)
        return _page(404, "Not Found")

    def _login(self) -> web.Response:
        state = uuid.uuid4().hex
        query = {
            "client_id": self._environment["JUPYTERHUB_CLIENT_ID"],
            "redirect_uri": self._environment["JUPYTERHUB_OAUTH_CALLBACK_URL"],
            "response_type": "code",
            "state": state,
        }
        base = self._environment["JUPYTERHUB_BASE_URL"]
        response = _redirect(f"{base}hub/api/oauth2/authorize?{urlencode(query)}")
        self._set_state(response, state)
        return response

    def _forbidden(self) -> web.Response:
        response = _page(403, "Forbidden")
        self._set_state(response, uuid.uuid4().hex)
        return response

    def _set_state(self, response: web.Response, state: str) -> None:
        response.set_cookie(f"{self._environment['JUPYTERHUB_CLIENT_ID']}-oauth-state", state, path=self.prefix)

    # ---- Kernels ----------------------------------------------------------------------------------------------------

    async def _start_kernel(self, body: str) -> web.Response:
        try:
            wanted = json.loads(body or "{}")
        except ValueError:
            return _refused(400, "Invalid JSON in body of request")
        if wanted.get("name", "python3") != "python3":
            return _refused(500, "Unhandled error")
        await asyncio.sleep(POST_KERNEL_S)
        kernel = Kernel(self.name, self._truth)
        self.kernels[kernel.id] = kernel
        return web.json_response(
            kernel.model(), status=201, headers={"Location": f"{self.prefix}api/kernels/{kernel.id}"}
        )

    async def _channels(self, request: web.BaseRequest, kernel_id: str) -> web.StreamResponse:
        """A websocket, which is granted when the kernel listens."""
        if kernel_id not in self.kernels:
            return _page(404, "Not Found")
        kernel = self.kernels[kernel_id]
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(status=400, text='Can "Upgrade" only to "WebSocket".', content_type="text/html")
        await kernel.listens.wait()
        socket = web.WebSocketResponse(compress=False)
        socket.headers["X-JupyterHub-Version"] = self._hub_version
        await socket.prepare(request)
        self._truth.count("GET", ["api", "kernels", kernel.id, "channels"], 101)
        kernel.sockets.add(socket)
        await kernel.greet(socket)
        async for frame in socket:
            if frame.type == WSMsgType.TEXT:
                kernel.receive(socket, frame.data)
        kernel.sockets.discard(socket)
        return socket


_running: set[asyncio.Task[None]] = set()


def in_background(work: Coroutine[Any, Any, None]) -> None:
    """Run it beside the rest, and keep it until it is over."""
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)


def _is_foreign(request: web.BaseRequest) -> bool:
    """Whether a browser sent it for a page of another site, by the Host header."""
    return request.headers.get("Origin", "//").partition("//")[2] not in ("", request.headers.get("Host"))


def _redirect(location: str) -> web.Response:
    return web.Response(status=302, headers={"Location": location}, content_type="text/html")


def _refused(status: int, reason: str) -> web.Response:
    return web.json_response({"message": reason, "reason": None}, status=status)


def _page(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"<html>{status} : {text}</html>", content_type="text/html")


# ==== The process ====================================================================================================


class Stub:
    """All servers, and the control port."""

    def __init__(self, hub: ClientSession) -> None:
        self._hub = hub
        self._truth = Truth()
        self._servers: dict[str, Server] = {}  # by port

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/truth", self.tell)
        app.router.add_post("/servers", self.start)
        app.router.add_get("/servers/{port}", self.poll)
        app.router.add_delete("/servers/{port}", self.end)
        return app

    async def start(self, request: web.Request) -> web.Response:
        asked = await request.json()
        server = Server(asked["environment"], asked["hub_version"], self._truth, self._hub)
        await server.start()
        self._servers[str(server.port)] = server
        in_background(server.announce())
        return web.json_response({"port": server.port}, status=201)

    async def poll(self, request: web.Request) -> web.Response:
        server = self._servers.get(request.match_info["port"])
        return web.Response(status=204 if server and server.listening else 404)

    async def end(self, request: web.Request) -> web.Response:
        if server := self._servers.pop(request.match_info["port"], None):
            await server.end()
        return web.Response(status=204)

    async def tell(self, request: web.Request) -> web.Response:
        """What happened: see the module."""
        servers = [server for server in self._servers.values() if server.listening]
        kernels = [kernel for server in servers for kernel in server.kernels.values()]
        truth = {
            "cells": self._truth.cells,
            "requests": self._truth.requests,
            "hub_checks": self._truth.hub_checks,
            "servers": len(servers),
            "kernels": len(kernels),
            "open_websockets": sum(len(kernel.sockets) for kernel in kernels),
        }
        return web.json_response(truth)


async def serve(application: Callable[[ClientSession], web.Application]) -> None:
    """Serve an application, which may ask a hub, at a port, which is printed, until the launcher ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    async with ClientSession(timeout=ClientTimeout(total=20)) as hub:
        runner = web.AppRunner(application(hub), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        print(runner.addresses[0][1], flush=True)
        threading.Thread(target=end_with_launcher, daemon=True).start()
        await asyncio.Event().wait()


def end_with_launcher() -> None:
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(serve(lambda hub: Stub(hub).application()))
