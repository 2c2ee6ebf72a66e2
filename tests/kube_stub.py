"""A stub of Kubernetes, for the real KubeSpawner: pods, volume claims and events, on nodes that run nothing.

`LocalHub(kube=True)` runs it. The API lists, watches, creates and deletes; selectors are ignored, since all pods are
KubeSpawner's, and a pod has the parts that KubeSpawner and its client look at. How many nodes there are, and how long
everything takes, say options of localhub.py; the first nodes have the image `plain`. A pod that listens is a lab of
singleuser_stub.py, at an address of its own in 127.0.0.0/8. An image called `unschedulable` finds no node, and those in
`REFUSED` are refused; the tag of an image is the version of JupyterHub in it.

GET /truth says which pods ever were, with moments of `time.monotonic`, and which volume claims are there. POST
/control `{"fault": {"method": "DELETE", "kind": "pods", "status": 500}}` has all such requests fail, `{"clean": true}`
makes everything as at first.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import functools
import http
import json
import math
import random
import socket
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

from aiohttp import ClientSession, web

import singleuser_stub as labs

STEP_S = 0.05
TRIGGER_S = 0.2  # until the autoscaler has looked at a pod without a node
GOES_WITHIN_S = (1.0, 2.0)
INIT_IMAGE = "k8s-network-tools"  # a small one
_QUOTA = "requested: requests.memory=1G, used: requests.memory=20G, limited: requests.memory=20G"
REFUSED = {  # how the API refuses pods with an image of this name
    "quota": (403, "Forbidden", f'pods "{{name}}" is forbidden: exceeded quota: users, {_QUOTA}'),
    "webhook": (400, "BadRequest", 'admission webhook "images.example.org" denied the request: {name} has no owner'),
}

Json = dict[str, Any]


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        status |= {"message": message, "reason": reason, "code": code}
        self.response = web.json_response(status, status=code, headers={"Audit-Id": str(uuid.uuid4())})


def stamp(digits: str = "seconds") -> str:
    return datetime.now(timezone.utc).isoformat(timespec=digits).replace("+00:00", "Z")


def new_metadata(manifest: Json) -> Json:
    return manifest["metadata"] | {"uid": str(uuid.uuid4()), "creationTimestamp": stamp()}


def name_of(image: str) -> str:
    """The image's name, without registry and tag."""
    return image.rpartition("/")[2].partition(":")[0]


# ==== Objects ========================================================================================================


class Store:
    """The objects of one kind, and all changes of them, which watches send on."""

    version = 0  # of the newest object of any kind

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.objects: dict[str, Json] = {}
        self._history: list[tuple[int, bytes]] = []
        self._news = asyncio.Event()

    def put(self, item: Json) -> Json:
        """Add or change."""
        kind = "MODIFIED" if item["metadata"]["name"] in self.objects else "ADDED"
        self.objects[item["metadata"]["name"]] = item
        return self._tell(kind, item)

    def drop(self, name: str) -> Json:
        return self._tell("DELETED", self.objects.pop(name))

    def _tell(self, kind: str, item: Json) -> Json:
        Store.version += 1
        item["metadata"]["resourceVersion"] = str(Store.version)
        self._history.append((Store.version, json.dumps({"type": kind, "object": item}).encode() + b"\n"))
        self._news.set()
        self._news = asyncio.Event()
        return item

    def get(self, name: str) -> Json:
        if name not in self.objects:
            raise Refusal(404, "NotFound", f'{self.kind} "{name}" not found')
        return self.objects[name]

    def all(self) -> Json:
        meta = {"resourceVersion": str(Store.version)}
        return {"kind": "List", "apiVersion": "v1", "metadata": meta, "items": list(self.objects.values())}

    async def watch(self, response: web.StreamResponse, since: int, seconds: float) -> None:
        """Send the changes after this version, old and new ones, until the time is over."""
        until_s = time.monotonic() + seconds
        sent = bisect.bisect(self._history, since, key=lambda change: change[0])
        while True:
            news = self._news
            lines, sent = self._history[sent:], len(self._history)
            if lines:
                await response.write(b"".join(line for _, line in lines))
            try:
                await asyncio.wait_for(news.wait(), max(0, until_s - time.monotonic()))
            except asyncio.TimeoutError:
                return


@dataclasses.dataclass(eq=False)
class Node:
    name: str
    images: dict[str, float] = dataclasses.field(default_factory=dict)  # the moments when they are, or will be, there
    pods: set[Pod] = dataclasses.field(default_factory=set)


class Pod:
    def __init__(self, manifest: Json) -> None:
        self.manifest = manifest | {"apiVersion": "v1", "kind": "Pod", "metadata": new_metadata(manifest)}
        self.name: str = manifest["metadata"]["name"]
        self.spec = manifest["spec"]
        self.container: Json = self.spec["containers"][0]
        self.image: str = self.container["image"]
        self.path = f"spec.containers{{{self.container['name']}}}"
        self.ip = ""
        self.node: Node | None = None
        self.socket: socket.socket | None = None  # bound from when it has an address: nobody listens there yet
        self.lab: labs.Server | None = None
        self.life: asyncio.Task[None] | None = None
        self.moments: dict[str, float] = {}
        self.reached("created")

    def reached(self, moment: str) -> None:
        self.moments.setdefault(moment, time.monotonic())

    def give_address(self) -> None:
        while not self.ip:
            self.socket = socket.socket()
            address = f"127.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}"
            try:
                self.socket.bind((address, self.container["ports"][0]["containerPort"]))
                self.ip = address
            except OSError:  # another stub's pod has it
                self.socket.close()

    def model(self) -> Json:
        runs = "started" in self.moments
        state = {"running": {"startedAt": stamp()}} if runs else {"waiting": {"reason": "ContainerCreating"}}
        container = {"name": self.container["name"], "image": self.image, "imageID": "", "restartCount": 0}
        status = {"phase": "Running" if runs else "Pending", "podIP": self.ip or None}
        return self.manifest | {"status": status | {"containerStatuses": [container | {"ready": runs, "state": state}]}}


# ==== The cluster ====================================================================================================


class Cluster:
    """Objects and nodes; scheduler, autoscaler and kubelet; the API."""

    def __init__(self, setting: SimpleNamespace, hub: ClientSession) -> None:
        self._setting, self._hub = setting, hub
        self._pods, self._claims, self._events = Store("pods"), Store("persistentvolumeclaims"), Store("events")
        self._truth = labs.Truth()
        self._set_up()

    def _set_up(self) -> None:
        self._faults: dict[tuple[str, str], int] = {}  # a status, by method and kind
        self._every_pod: list[Pod] = []
        self._coming: set[asyncio.Task[None]] = set()  # nodes
        ready = dict.fromkeys(("plain", INIT_IMAGE), 0.0)
        self._nodes = [Node(f"node-{n}", {**ready}) for n in range(1, self._setting.nodes + 1)]

    async def _clean(self) -> None:
        """Forget what happened, and begin again."""
        for task in self._coming:
            task.cancel()
        for pod in self._living().values():
            await self._kill(pod, at_once=True)
        for store in (self._claims, self._events):
            for name in list(store.objects):
                store.drop(name)
        self._set_up()

    def _living(self) -> dict[str, Pod]:
        return {pod.name: pod for pod in self._every_pod if "gone" not in pod.moments}

    def _tell(self, pod: Pod, reason: str, message: str, kind: str = "Normal", path: str = "") -> None:
        """Record an event. The scheduler's have an `eventTime`, all others a `lastTimestamp`."""
        scheduler = reason in ("Scheduled", "FailedScheduling")
        meta = pod.manifest["metadata"]
        about = {"kind": "Pod", "namespace": meta["namespace"], "name": pod.name, "uid": meta["uid"]}
        event = {"name": f"{pod.name}.{uuid.uuid4().hex[:16]}", "namespace": meta["namespace"]}
        self._events.put(
            {
                "metadata": new_metadata({"metadata": event}),
                "involvedObject": about | {"fieldPath": path or None},
                "reason": reason,
                "message": message,
                "type": kind,
                "eventTime": stamp("microseconds") if scheduler else None,
                "lastTimestamp": None if scheduler else stamp(),
            }
        )

    # ---- Room -------------------------------------------------------------------------------------------------------

    def _has_room(self, pod: Pod) -> bool:
        """Give the pod a place on a node, if there is one."""
        if name_of(pod.image) != "unschedulable":
            pod.node = next((node for node in self._nodes if len(node.pods) < self._setting.pods_per_node), None)
        if pod.node:
            pod.node.pods.add(pod)
        return pod.node is not None

    async def _place(self, pod: Pod) -> None:
        """Return when the pod has a node; there may have to come one."""
        if not self._has_room(pod):
            count = len(self._nodes)
            none = f"0/{count} nodes are available"
            message = f"{none}: {count} Insufficient memory. preemption: {none}: {count} No preemption victims found."
            self._tell(pod, "FailedScheduling", message, "Warning")
            await asyncio.sleep(TRIGGER_S)
            if not self._has_room(pod):
                self._scale_up(pod)
                while not self._has_room(pod):
                    await asyncio.sleep(STEP_S)

    def _scale_up(self, pod: Pod) -> None:
        if name_of(pod.image) == "unschedulable" or not self._setting.node_s:
            self._tell(pod, "NotTriggerScaleUp", "pod didn't trigger scale-up: 1 max node group size reached")
            return
        waiting = [each for each in self._living().values() if not each.node and "deleted" not in each.moments]
        for _ in range(math.ceil(len(waiting) / self._setting.pods_per_node) - len(self._coming)):
            task = asyncio.create_task(self._add_node())
            self._coming.add(task)
            task.add_done_callback(self._coming.discard)
        change = f"{len(self._nodes)}->{len(self._nodes) + len(self._coming)}"
        self._tell(pod, "TriggeredScaleUp", f"pod triggered scale-up: [{{user-nodes {change} (max: 100)}}]")

    async def _add_node(self) -> None:
        await asyncio.sleep(self._setting.node_s)
        self._nodes.append(Node(f"node-{len(self._nodes) + 1}"))

    # ---- A pod's life -----------------------------------------------------------------------------------------------

    async def _live(self, pod: Pod) -> None:
        """From its creation to a server that listens."""
        await self._place(pod)
        assert pod.node
        pod.reached("scheduled")
        self._tell(pod, "Scheduled", f"Successfully assigned {pod.name} to {pod.node.name}")
        await asyncio.sleep(STEP_S)
        for volume in pod.spec["volumes"]:
            if volume.get("persistentVolumeClaim"):
                message = f'AttachVolume.Attach succeeded for volume "{volume["name"]}"'
                self._tell(pod, "SuccessfulAttachVolume", message)
        pod.reached("attached")
        pod.give_address()
        for container in pod.spec["initContainers"]:
            await self._start_container(pod, pod.node, container, f"spec.initContainers{{{container['name']}}}")
        await self._start_container(pod, pod.node, pod.container, pod.path)
        pod.reached("started")
        self._pods.put(pod.model())
        await asyncio.sleep(self._setting.spawn_s + random.uniform(0, self._setting.spawn_jitter_s))
        environment = {item["name"]: item.get("value") or "" for item in pod.container["env"]}
        pod.lab = labs.Server(environment, pod.image.rpartition(":")[2], self._truth, self._hub)
        await pod.lab.start(pod.socket)
        pod.reached("listens")
        labs.in_background(pod.lab.announce())

    async def _start_container(self, pod: Pod, node: Node, container: Json, path: str) -> None:
        tell = functools.partial(self._tell, pod, path=path)
        await self._pull(pod, node, container["image"], tell)
        tell("Created", f"Created container: {container['name']}")
        await asyncio.sleep(STEP_S)
        tell("Started", f"Started container {container['name']}")

    async def _pull(self, pod: Pod, node: Node, image: str, tell: Callable[[str, str], None]) -> None:
        name, began_s = name_of(image), time.monotonic()
        seconds = self._setting.image_s * (0.1 if name == INIT_IMAGE else 1)
        there_s = node.images.setdefault(name, began_s + seconds)
        if there_s <= began_s:
            tell("Pulled", f'Container image "{image}" already present on machine')
            return
        if image == pod.image:
            pod.reached("pulling")
        tell("Pulling", f'Pulling image "{image}"')
        await asyncio.sleep(there_s - began_s)
        took = f"{time.monotonic() - began_s:.3f}s"
        size = "Image size: 912345678 bytes."
        tell("Pulled", f'Successfully pulled image "{image}" in {took} ({took} including waiting). {size}')
        if image == pod.image:
            pod.reached("pulled")

    def _end(self, pod: Pod, grace_s: float) -> Json:
        """Begin to delete it; it is gone a little later, or at once without grace or a node."""
        if "deleted" not in pod.moments:
            pod.reached("deleted")
            pod.manifest["metadata"] |= {"deletionTimestamp": stamp(), "deletionGracePeriodSeconds": int(grace_s)}
            self._pods.put(pod.model())
            labs.in_background(self._kill(pod, at_once=grace_s == 0 or pod.node is None))
        return pod.model()

    async def _kill(self, pod: Pod, at_once: bool) -> None:
        """End it: nothing more happens by itself, nobody listens, and its room is free."""
        if "started" in pod.moments:
            self._tell(pod, "Killing", "Stopping container notebook", path=pod.path)
        if pod.life:
            pod.life.cancel()
        if pod.lab:
            await pod.lab.end()
        if pod.socket:
            pod.socket.close()
        if not at_once:
            await asyncio.sleep(random.uniform(*GOES_WITHIN_S) + self._setting.stop_s)
        if "gone" not in pod.moments:
            pod.reached("gone")
            self._pods.drop(pod.name)
            if pod.node:
                pod.node.pods.discard(pod)

    # ---- The API ----------------------------------------------------------------------------------------------------

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/truth", self.truth)
        app.router.add_post("/control", self.control)
        app.router.add_route("*", "/api/v1/namespaces/{namespace}/{kind}", self.answer)
        app.router.add_route("*", "/api/v1/namespaces/{namespace}/{kind}/{name}", self.answer)
        return app

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """An answer of the API, or of what is wrong with it."""
        method, kind = request.method, request.match_info["kind"]
        body = await request.json() if request.can_read_body else {}
        try:
            if fault := self._faults.get((method, kind)):
                status = http.HTTPStatus(fault)
                raise Refusal(status, status.phrase.replace(" ", ""), "the stub was told to")
            stores = {store.kind: store for store in (self._pods, self._claims, self._events)}
            if kind not in stores:
                raise Refusal(404, "NotFound", "the server could not find the requested resource")
            return await self._act(request, stores[kind], body)
        except Refusal as refusal:
            return refusal.response

    async def _act(self, request: web.Request, store: Store, body: Json) -> web.StreamResponse:
        name = request.match_info.get("name", "")
        match request.method:
            case "GET" if "watch" in request.query:
                return await self._watch(request, store)
            case "GET":
                return web.json_response(store.get(name) if name else store.all())
            case "POST":
                body["metadata"]["namespace"] = request.match_info["namespace"]
                return web.json_response(self._create(store, body), status=201)
            case "DELETE" if store is self._pods and store.get(name):
                grace_s = float(request.query.get("gracePeriodSeconds", body.get("gracePeriodSeconds", 30)))
                return web.json_response(self._end(self._living()[name], grace_s))
            case "DELETE" if store.get(name):
                return web.json_response(store.drop(name))
        raise Refusal(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    async def _watch(self, request: web.Request, store: Store) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the hub has gone
            since = int(request.query.get("resourceVersion") or 0)
            await store.watch(response, since, float(request.query.get("timeoutSeconds", 60)))
        return response

    def _create(self, store: Store, body: Json) -> Json:
        name = body["metadata"]["name"]
        if name in store.objects:
            raise Refusal(409, "AlreadyExists", f'{store.kind} "{name}" already exists')
        if store is self._claims:
            return store.put(body | {"metadata": new_metadata(body), "status": {"phase": "Bound"}})
        pod = Pod(body)
        if refused := REFUSED.get(name_of(pod.image)):
            code, reason, message = refused
            raise Refusal(code, reason, message.format(name=name))
        self._every_pod.append(pod)
        pod.life = asyncio.create_task(self._live(pod))
        return store.put(pod.model())

    # ---- Tests ------------------------------------------------------------------------------------------------------

    async def control(self, request: web.Request) -> web.Response:
        """See the module."""
        match await request.json():
            case {"fault": {"method": method, "kind": kind, "status": status}}:
                self._faults[method, kind] = status
            case {"clean": True}:
                await self._clean()
        return web.json_response({})

    async def truth(self, request: web.Request) -> web.Response:
        """See the module."""
        pods = [
            {"name": pod.name, "ip": pod.ip, "exists": "gone" not in pod.moments, "moments": pod.moments}
            for pod in self._every_pod
        ]
        return web.json_response({"pods": pods, "claims": list(self._claims.objects)})


if __name__ == "__main__":
    setting = SimpleNamespace(**json.loads(sys.argv[1]))
    asyncio.run(labs.serve(lambda hub: Cluster(setting, hub).application()))
