"""Hubs without sockets, sessions in which time passes as a test wants it, and results of runs that never were."""

from __future__ import annotations

import dataclasses
import json
import random
import time
import urllib.parse
from collections.abc import Iterable
from typing import Any

import requests
from requests.adapters import BaseAdapter

import hub_stress_test as hst
from hub_stress_test import Event, Kind, Reason, ServerState

# ==== Hubs and sessions =============================================================================================

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
        acts = honest or self._rng.random() < self._acts  # whatever it then answers
        if acts and rest and state is not ServerState.STARTING:
            self.states[name] = ServerState.STOPPED
        elif acts and not rest and state is ServerState.STOPPED:
            del self.states[name]
        elif honest or status == 204:  # which would say that it had
            return 500, None
        return (204 if honest else status), None  # a 404 without a body is a proxy's, and says nothing

    def _drift(self) -> None:
        """Servers go on by themselves: what starts becomes ready or fails, what stops has stopped."""
        for name, state in list(self.states.items()):
            if state is ServerState.STARTING and self._rng.random() < 0.3:
                self.states[name] = self._rng.choice([ServerState.READY, ServerState.STOPPED])
            if state is ServerState.STOPPING and self._rng.random() < 0.3:
                self.states[name] = ServerState.STOPPED


# ==== Results: events of made-up people, folded as those of a run are ===============================================

LOST = Reason(Kind.LOST, "the server stopped while it was held")
NO_NODE = Reason(Kind.SPAWN, "no node has 4 GB of memory free")
REFUSED = Reason(Kind.REFUSED, "500")
FIGURES = hst.HubFigures(
    cpu_s=1.25,
    cpu_share=0.2,
    cpu_share_max=0.2,
    rss_before_bytes=110e6,
    rss_max_bytes=120e6,
    rss_after_bytes=115e6,
    rss_per_server_bytes=400e3,
    event_loop_lag_p95_s=0.05,
    event_loop_lag_max_s=0.06,
    event_loop_samples=500,
    running_servers_max=20,
    requests={},
    spawns={},
)


def did(step: str, number: int, ended_s: float, reason: Reason | None = None, due_s: float = 0.0, **more: Any) -> Event:
    """A step of the person with this number, which was due and sent at one moment."""
    return Event(step, hst.username(number), due_s, due_s, ended_s, reason, **more)


def ready(number: int, waited_s: float = 1.0, **more: Any) -> Event:
    """A server that became ready after this time, or failed for a reason."""
    return did("server_ready", number, waited_s, **more)


def failed(number: int, text: str = "the image does not exist", kind: Kind = Kind.SPAWN, **more: Any) -> Event:
    return ready(number, reason=Reason(kind, text), **more)


def throttled(number: int, waited_s: float = 5.0, **more: Any) -> Event:
    """A server whose start was throttled after 0.1 s, requested again after 1 s, and became ready."""
    return ready(number, waited_s, **{"throttled": 2, "throttled_s": 0.1, "asked_s": 1.0} | more)


def held(number: int, lost: bool = False) -> Event:
    """A server that was held from second 10 to second 20."""
    return did("stay", number, 20.0, LOST if lost else None, due_s=10.0)


def pings(*latencies_s: float, failed: int = 0) -> list[Event]:
    """Pings of these latencies, one a second, and some that failed."""
    good = [did("ping", 0, n + latency_s, due_s=float(n)) for n, latency_s in enumerate(latencies_s)]
    return good + [did("ping", 0, 1.0, Reason(Kind.REFUSED, "503"))] * failed


def folded(events: Iterable[Event]) -> hst.Recorder:
    record = hst.new_recorder()
    for event in events:
        record.add(event)
    return record


def hub_with(**figures: Any) -> hst.HubSide:
    """A hub with figures of its own, some of them as given."""
    return hst.HubSide("http://x/hub/api", "6.1.1", 0, dataclasses.replace(FIGURES, **figures), None)


def results_of(events: Iterable[Event] = (), requested: int = 0, load_s: float = 30.0, **more: Any) -> hst.Results:
    """The results of a stress test with these events; `more` are fields that differ."""
    record = folded(events)
    servers = hst.servers_of(record.people, requested or len(record.people), False)
    bad = servers.failed + servers.lost
    found = hst.Results(
        schema=1,
        tool={"name": "hub-stress-test", "version": "0"},
        command=hst.STRESS,
        hub=hst.HubSide("http://x/hub/api", "6.1.1", 0, None, None),
        started="2026-11-20T16:00:00Z",
        finished="2026-11-20T16:00:30Z",
        duration_s=load_s,
        options=hst.Plan(count=servers.requested).options(),
        users=hst.Users(servers.requested, servers.requested),
        failed=bad,
        failed_rate=bad / servers.requested if servers.requested else None,
        servers=servers,
        people=None,
        groups=None,
        operations=record.summarise(),
        http=hst.Http(100, 0, 0, {"200": 100}, 20, 0.2),
        capacity=None,
        aftermath=None,
        proxy_check=None,
        timeline={
            "operations": record.timeline(0.0),
            "servers": hst.servers_timeline(record.people, 0.0),
            "hub": None,
            "watched": {},
            "load_ended_s": load_s,
        },
        exit_code=int(hst.ExitCode.FAILED if bad else hst.ExitCode.OK),
    )
    return dataclasses.replace(found, **more)


def sentences(results: hst.Results, label: str, baseline: hst.Json | None = None) -> list[str]:
    """The sentences that the summary has behind a label."""
    return [row[1] for row in hst.facts(results, baseline).rows if row[0] == label]
