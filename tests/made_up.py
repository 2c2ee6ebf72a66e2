"""Hubs without sockets, and sessions in which time passes as a test wants it."""

from __future__ import annotations

import json
import random
import time
import urllib.parse
from collections.abc import Iterable
from typing import Any

import requests
from requests.adapters import BaseAdapter

import hub_stress_test as hst
from hub_stress_test import ServerState

ENDPOINT = "http://x/hub/api"
MODELS: dict[ServerState, dict[str, Any]] = {
    ServerState.STOPPED: {},
    ServerState.STARTING: {"": {"pending": "spawn", "ready": False}},
    ServerState.READY: {"": {"pending": None, "ready": True}},
    ServerState.STOPPING: {"": {"pending": "stop", "ready": False}},
}


class TimeTraveller(hst.HubSession):
    """A session whose pauses take no time but move its clock, which stands still otherwise."""

    def __init__(self, wire: BaseAdapter | None = None, token: str = "x", **times: float) -> None:
        super().__init__(token, wire)
        vars(self).update(times)
        self.paused_s: list[float] = []
        self.clock = lambda: sum(self.paused_s)
        self.answered_s = 0.0

    def pause(self, seconds: float) -> bool:
        self.paused_s.append(max(0.0, seconds))
        return not self.stopping.is_set()


class Hurried(hst.HubSession):
    """A session on whose clock a second takes 20 ms; it never takes its hub for gone."""

    FASTER = 50.0

    def __init__(self, wire: BaseAdapter | None = None) -> None:
        super().__init__("x", wire)
        self.gone_after_s = 1e9
        began_s = time.monotonic()
        self.clock = lambda: (time.monotonic() - began_s) * self.FASTER
        self.answered_s = 0.0

    def pause(self, seconds: float) -> bool:
        return super().pause(seconds / self.FASTER)


class HubWithUsers(hst.SimulatedHub):
    """A simulated hub on which these users are, and which remembers each request: method, path and settings."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__()
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self._answer("POST", ["users"], {"usernames": list(names)})

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        self.asked.append((request.method or "", urllib.parse.urlsplit(request.url or "").path, kwargs))
        return super().send(request, *args, **kwargs)


class ErraticHub(BaseAdapter):
    """Users in any state; each request is answered out of `statuses`, and acted on or not, as it comes.

    Once all `statuses` are used up, it is an honest hub.
    """

    def __init__(self, states: dict[str, ServerState], statuses: list[int], seed: int, acts: float = 0.5) -> None:
        super().__init__()
        self.states = dict(states)
        self.written_to: set[str] = set()
        self._statuses, self._acts, self._rng = list(statuses), acts, random.Random(seed)

    def close(self) -> None:
        pass

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        response = requests.Response()
        response.request, response.url = request, request.url or ""
        path = urllib.parse.urlsplit(response.url).path.removeprefix("/hub/api/users").strip("/").split("/")
        response.status_code, data = self._answer(request.method or "", *path)
        response._content = json.dumps(data).encode()
        response.headers["Content-Type"] = "application/json" if data else "text/html"
        return response

    def _answer(self, method: str, name: str, *rest: str) -> tuple[int, Any]:
        self._drift()
        honest = not self._statuses
        status = 200 if honest else self._statuses.pop()
        if method == "GET":
            models = [{"name": n, "admin": False, "servers": MODELS[s]} for n, s in self.states.items()]
            return status, models if status == 200 else None
        self.written_to.add(name)
        state = self.states.get(name)
        if state is None:
            return 404, {"status": 404}
        if honest or self._rng.random() < self._acts:  # it acts, whatever it then answers
            if rest and state is not ServerState.STARTING:
                self.states[name] = ServerState.STOPPED
            elif not rest and state is ServerState.STOPPED:
                del self.states[name]
            elif honest:
                return 500, None
            return (204 if honest else status), None
        return (status if status != 204 else 500), None  # a 404 without a body is a proxy's, and says nothing

    def _drift(self) -> None:
        """Servers go on by themselves: what starts becomes ready or fails, what stops has stopped."""
        for name, state in list(self.states.items()):
            if state is ServerState.STARTING and self._rng.random() < 0.3:
                self.states[name] = self._rng.choice([ServerState.READY, ServerState.STOPPED])
            if state is ServerState.STOPPING and self._rng.random() < 0.3:
                self.states[name] = ServerState.STOPPED
