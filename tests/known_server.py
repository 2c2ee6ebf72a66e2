"""A hub of known behaviour, to check the numbers of `activity-stress-test`.

It is a fault proxy without an upstream, which answers every request as the simulated hub does, and says when.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import requests

import hub_stress_test as hst
from fault_proxy import Answer, FaultProxy, Request, hub_answer

SCOPES = ["admin:users", "delete:users", "list:users", "read:servers", "delete:servers", "servers", "users:activity"]
ABOUT = {"/hub/api/": {"version": "6.1.1"}, "/hub/api/user": {"name": "t", "scopes": SCOPES}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How activity reports are answered; everything else is answered at once. Nought turns a behaviour off."""

    service_s: float = 0.0  # from arrival to answer, however many are on their way
    freeze_s: float = 0.0  # at the end of every period: a report that comes then is begun when the period is over
    period_s: float = 10.0  # counted from the first report
    capacity_per_s: float = 0.0  # no more reports than this are begun in a second; the others queue


def frozen_s(behaviour: Behaviour, since_first_s: float) -> float:
    """How long a report has to wait for the end of a freeze, given its arrival."""
    left_s = behaviour.period_s - max(0.0, since_first_s) % behaviour.period_s
    return left_s if left_s <= behaviour.freeze_s else 0.0


def per_second(arrivals: Sequence[float], rate: float) -> list[int]:
    """How many arrived in each whole second, counted from half a slot (1 / rate) before the first arrival.

    A second is whole when it ends within one slot of the last arrival, so that 30 at 10 a second are 10, 10, 10.
    """
    began_s = arrivals[0] - 0.5 / rate
    counts = Counter(math.floor(moment_s - began_s) for moment_s in arrivals)
    return [counts[second] for second in range(math.floor(arrivals[-1] + 1 / rate - began_s))]


class KnownServer(FaultProxy):
    """Takes any token, and an activity report for any name."""

    def __init__(self, **behaviour: Any) -> None:
        super().__init__("http://127.0.0.1:1")
        self.behaviour = Behaviour(**behaviour)
        self.environment = {"JUPYTERHUB_ENDPOINT": self.endpoint, "JUPYTERHUB_API_TOKEN": "known"}
        self._hub = hst.SimulatedHub()
        self._arrivals: list[float] = []
        self._next_begin_s = 0.0

    def arrivals(self) -> list[float]:
        """The moment (of `time.monotonic`) at which each activity report arrived, in order."""
        return self._arrivals[:]

    def users(self) -> set[str]:
        return {user["name"] for user in json.loads(self._answer("GET", "/hub/api/users").body)}

    async def fault_for(self, request: Request) -> Answer:
        if request.path.endswith("/activity"):
            return dataclasses.replace(hub_answer(200), at_s=self._report())
        if request.path in ABOUT:
            return hub_answer(200, json.dumps(ABOUT[request.path]).encode())
        return self._answer(request.method, request.path, request.body)

    def _answer(self, method: str, path: str, body: bytes = b"") -> Answer:
        reply = self._hub.send(requests.Request(method, self.url + path, data=body).prepare())
        return hub_answer(reply.status_code, reply.content)

    def _report(self) -> float:
        """When to answer the report that has just arrived; it takes its place in the queue."""
        self._arrivals.append(time.monotonic())
        begin_s = max(self._arrivals[-1], self._next_begin_s)
        begin_s += frozen_s(self.behaviour, begin_s - self._arrivals[0])
        if self.behaviour.capacity_per_s:
            self._next_begin_s = begin_s + 1 / self.behaviour.capacity_per_s
        return begin_s + self.behaviour.service_s
