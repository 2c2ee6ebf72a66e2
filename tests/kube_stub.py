"""A stub of Kubernetes, for the real KubeSpawner: pods, volume claims and events, on nodes that run nothing.

`LocalHub(kube=True)` runs it. The API lists, watches, creates and deletes; selectors are ignored, since all pods are
KubeSpawner's. A kubelet takes each pod through its phases, at the pace of the `Setting`. A pod that listens is a lab of
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
import itertools
import json
import math
import random
import resource
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

import singleuser_stub as labs

STEP_S = 0.05  # of the kubelet
TRIGGER_S = 0.2  # until the autoscaler has looked at a pod without a node
GOES_WITHIN_S = (1.0, 2.0)
INIT_IMAGE = "k8s-network-tools"  # a small one
_QUOTA = "requested: requests.memory=1G, used: requests.memory=20G, limited: requests.memory=20G"
REFUSED = {  # how the API refuses pods with an image of this name
    "quota": (403, "Forbidden", f'pods "{{name}}" is forbidden: exceeded quota: users, {_QUOTA}'),
    "webhook": (400, "BadRequest", 'admission webhook "images.example.org" denied the request: {name} has no owner'),
}

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Nodes, and how long everything takes. The first nodes have the image `plain`; without `node_s` no others come."""

    nodes: int = 2
    pods_per_node: int = 50
    node_s: float = 5.0
    image_s: float = 2.0
    spawn_s: float = 0.0
    spawn_jitter_s: float = 0.0
    stop_s: float = 0.0


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        self.response = web.json_response(
            {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
            | {"message": message, "reason": reason, "code": code},
            status=code,
            headers={"Audit-Id": str(uuid.uuid4())},
        )


def stamp(digits: str = "seconds") -> str:
    return datetime.now(timezone.utc).isoformat(timespec=digits).replace("+00:00", "Z")


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

    def drop(self, name: str) -> None:
        self._tell("DELETED", self.objects.pop(name))

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


class Node:
    def __init__(self, number: int) -> None:
        self.name = f"node-{number}"
        self.pods: set[Pod] = set()
        self.images: dict[str, asyncio.Task[None]] = {}  # by name, pulled or being pulled


class Pod:
    """A pod, with what kubelet and scheduler know of it."""

    def __init__(self, manifest: Json) -> None:
        meta = manifest["metadata"] | {"uid": str(uuid.uuid4()), "creationTimestamp": stamp()}
        self.manifest = manifest | {"apiVersion": "v1", "kind": "Pod", "metadata": meta}
        self.name: str = meta["name"]
        self.namespace: str = meta["namespace"]
        self.uid: str = meta["uid"]
        self.spec = manifest["spec"]
        self.image: str = self.spec["containers"][0]["image"]
        self.behaviour = name_of(self.image)
        self.claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in self.spec.get("volumes") or []
            if volume.get("persistentVolumeClaim")
        }
        self.phase, self.ip = "Pending", ""
        self.state: Json = {"waiting": {"reason": "PodInitializing"}}
        self.initialized = not self.spec.get("initContainers")
        self.node: Node | None = None
        self.socket: socket.socket | None = None  # bound from when it has an address: nobody listens there yet
        self.lab: labs.Server | None = None
        self.life: asyncio.Task[None] | None = None
        self.moments: dict[str, float] = {}
        self.reached("created")

    def reached(self, moment: str) -> None:
        self.moments.setdefault(moment, time.monotonic())

    @property
    def ready(self) -> bool:
        return self.phase == "Running" and "running" in self.state

    @property
    def path(self) -> str:
        return f"spec.containers{{{self.spec['containers'][0]['name']}}}"

    def environment(self) -> dict[str, str]:
        return {item["name"]: item.get("value") or "" for item in self.spec["containers"][0]["env"]}

    def model(self) -> Json:
        """As the API describes it; a status that lacks a field makes KubeSpawner fail to stop the pod."""
        at = {"lastTransitionTime": stamp(), "lastProbeTime": None}
        conditions = {
            "PodScheduled": self.node is not None,
            "Initialized": self.initialized,
            "ContainersReady": self.ready,
            "Ready": self.ready,
        }
        status = {
            "phase": self.phase,
            "qosClass": "Burstable",
            "conditions": [{"type": kind, "status": str(value)} | at for kind, value in conditions.items()],
        }
        if self.node:
            self.manifest["spec"] = self.spec | {"nodeName": self.node.name}
            status |= {"hostIP": "10.0.0.1", "startTime": self.manifest["metadata"]["creationTimestamp"]}
            done = {"exitCode": 0, "reason": "Completed", "startedAt": stamp(), "finishedAt": stamp()}
            first = {"terminated": done} if self.initialized else {"waiting": {"reason": "PodInitializing"}}
            status["initContainerStatuses"] = [self._container(spec, first) for spec in self.spec["initContainers"]]
            status["containerStatuses"] = [self._container(spec, self.state) for spec in self.spec["containers"]]
        if self.ip:
            status |= {"podIP": self.ip, "podIPs": [{"ip": self.ip}]}
        return self.manifest | {"status": status}

    def _container(self, spec: Json, state: Json) -> Json:
        return {
            "name": spec["name"],
            "image": spec["image"],
            "imageID": f"{spec['image']}@sha256:{'0' * 64}",
            "containerID": "containerd://" + self.uid.replace("-", ""),
            "ready": "running" in state or state.get("terminated", {}).get("exitCode") == 0,
            "started": "running" in state,
            "restartCount": 0,
            "state": state,
            "lastState": {},
        }

    def truth(self) -> Json:
        return {"name": self.name, "ip": self.ip, "exists": "gone" not in self.moments, "moments": self.moments}


# ==== Nodes ==========================================================================================================


class Cluster:
    """Objects, nodes, the scheduler and the autoscaler."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.pods, self.claims, self.events = Store("pods"), Store("persistentvolumeclaims"), Store("events")
        self.clean()

    def clean(self) -> None:
        """Forget what happened, and begin again."""
        for name in list(self.claims.objects):
            self.claims.drop(name)
        for name in list(self.events.objects):
            self.events.drop(name)
        self.every_pod: list[Pod] = []
        self.nodes: list[Node] = []
        self._coming = 0
        self._waiting: list[tuple[Pod, asyncio.Future[Node]]] = []
        for _ in range(self.setting.nodes):
            self._add_node().images |= {name: asyncio.create_task(asyncio.sleep(0)) for name in ("plain", INIT_IMAGE)}

    # ---- Objects ----------------------------------------------------------------------------------------------------

    def living(self) -> dict[str, Pod]:
        return {pod.name: pod for pod in self.every_pod if "gone" not in pod.moments}

    def add(self, pod: Pod) -> None:
        self.every_pod.append(pod)
        self.publish(pod)

    def publish(self, pod: Pod) -> Json:
        return pod.model() if "gone" in pod.moments else self.pods.put(pod.model())

    def remove(self, pod: Pod) -> None:
        """The pod's end; its room is free."""
        if "gone" in pod.moments:
            return
        pod.reached("gone")
        self.pods.drop(pod.name)
        if pod.node:
            pod.node.pods.discard(pod)
        self._fill()
        for name in pod.claims:
            self.release(name)

    def add_claim(self, manifest: Json) -> Json:
        meta = manifest["metadata"] | {"uid": str(uuid.uuid4()), "creationTimestamp": stamp()}
        status = {"phase": "Bound", "accessModes": manifest["spec"]["accessModes"]}
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": manifest["spec"]}
        return self.claims.put(claim | {"metadata": meta, "status": status})

    def release(self, name: str) -> None:
        """End a claim that was deleted, once no pod uses it any more."""
        claim = self.claims.objects.get(name)
        if not claim or "deletionTimestamp" not in claim["metadata"]:
            return
        if not any(name in pod.claims for pod in self.living().values()):
            self.claims.drop(name)

    def tell(self, pod: Pod, reason: str, message: str, kind: str = "Normal", path: str = "") -> None:
        """Record an event. The scheduler's have an `eventTime`, all others a `lastTimestamp`."""
        scheduler = reason in ("Scheduled", "FailedScheduling")
        component = "default-scheduler" if scheduler else "kubelet"
        self.events.put(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {
                    "name": f"{pod.name}.{uuid.uuid4().hex[:16]}",
                    "namespace": pod.namespace,
                    "uid": str(uuid.uuid4()),
                    "creationTimestamp": stamp(),
                },
                "involvedObject": {
                    "kind": "Pod",
                    "namespace": pod.namespace,
                    "name": pod.name,
                    "uid": pod.uid,
                    "apiVersion": "v1",
                    "resourceVersion": "1",
                    **({"fieldPath": path} if path else {}),
                },
                "reason": reason,
                "message": message,
                "type": kind,
                "count": 1,
                "eventTime": stamp("microseconds") if scheduler else None,
                "firstTimestamp": None if scheduler else stamp(),
                "lastTimestamp": None if scheduler else stamp(),
                "source": {} if scheduler else {"component": component, "host": pod.node.name if pod.node else ""},
                "reportingComponent": component,
                "reportingInstance": "",
            }
        )

    # ---- Room -------------------------------------------------------------------------------------------------------

    async def place(self, pod: Pod) -> Node:
        """A node with room, which is kept for the pod; there may have to come one."""
        found: asyncio.Future[Node] = asyncio.get_running_loop().create_future()
        if pod.behaviour != "unschedulable":
            self._waiting.append((pod, found))
            self._fill()
        if not found.done():
            await self._wait_for_room(pod)
        node = await found
        pod.reached("scheduled")
        self.tell(pod, "Scheduled", f"Successfully assigned {pod.namespace}/{pod.name} to {node.name}")
        self.publish(pod)
        return node

    async def _wait_for_room(self, pod: Pod) -> None:
        count = len(self.nodes)
        none = f"0/{count} nodes are available"
        message = f"{none}: {count} Insufficient memory. preemption: {none}: {count} No preemption victims found."
        self.tell(pod, "FailedScheduling", message, "Warning")
        await asyncio.sleep(TRIGGER_S)
        if pod.node:
            return
        if pod.behaviour == "unschedulable" or not self.setting.node_s:
            self.tell(pod, "NotTriggerScaleUp", "pod didn't trigger scale-up: 1 max node group size reached")
            return
        wanted = math.ceil(len(self._unplaced()) / self.setting.pods_per_node)
        for _ in range(wanted - self._coming):
            self._coming += 1
            asyncio.get_running_loop().call_later(self.setting.node_s, self._arrive)
        change = f"{len(self.nodes)}->{len(self.nodes) + self._coming}"
        self.tell(pod, "TriggeredScaleUp", f"pod triggered scale-up: [{{user-nodes {change} (max: 100)}}]")

    def _arrive(self) -> None:
        if not self._coming:
            return  # it was for pods that were cleaned away
        self._coming -= 1
        self._add_node()
        self._fill()

    def _add_node(self) -> Node:
        self.nodes.append(Node(len(self.nodes) + 1))
        return self.nodes[-1]

    def _unplaced(self) -> list[tuple[Pod, asyncio.Future[Node]]]:
        self._waiting = [each for each in self._waiting if not each[1].done() and "deleted" not in each[0].moments]
        return self._waiting

    def _fill(self) -> None:
        """Give room to those that have waited longest."""
        for pod, found in self._unplaced():
            node = next((node for node in self.nodes if len(node.pods) < self.setting.pods_per_node), None)
            if node is None:
                return
            node.pods.add(pod)
            pod.node = node
            found.set_result(node)


# ==== Pods' lives ====================================================================================================


class Kubelet:
    """Runs pods."""

    def __init__(self, cluster: Cluster, hub: ClientSession) -> None:
        self._cluster, self._setting, self._hub = cluster, cluster.setting, hub
        self._truth = labs.Truth()
        self._addresses = itertools.count(random.randrange(1 << 24))

    # ---- Start ------------------------------------------------------------------------------------------------------

    async def live(self, pod: Pod) -> None:
        """From its creation to a server that listens."""
        node = await self._cluster.place(pod)
        await self._attach(pod)
        for container in pod.spec.get("initContainers") or []:
            await self._start_container(pod, node, container, f"spec.initContainers{{{container['name']}}}")
        pod.initialized = True
        pod.reached("initialized")
        self._cluster.publish(pod)
        await self._start_container(pod, node, pod.spec["containers"][0], pod.path)
        pod.reached("started")
        pod.phase, pod.state = "Running", {"running": {"startedAt": stamp()}}
        self._cluster.publish(pod)
        await self._listen(pod)

    async def _attach(self, pod: Pod) -> None:
        """Give it its volumes and its address."""
        await asyncio.sleep(STEP_S)
        for name in sorted(pod.claims):
            volume = self._cluster.claims.get(name)["metadata"]["uid"]
            message = f'AttachVolume.Attach succeeded for volume "pvc-{volume}"'
            self._cluster.tell(pod, "SuccessfulAttachVolume", message)
        pod.reached("attached")
        self._give_address(pod)

    def _give_address(self, pod: Pod) -> None:
        port = pod.spec["containers"][0]["ports"][0]["containerPort"]
        while not pod.ip:
            pod.socket = socket.socket()
            number = next(self._addresses) % (1 << 24)
            address = f"127.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            try:
                pod.socket.bind((address, port))
                pod.ip = address
            except OSError:  # another stub's pod has it, or it is 127.0.0.0
                pod.socket.close()

    async def _start_container(self, pod: Pod, node: Node, container: Json, path: str) -> None:
        tell = functools.partial(self._cluster.tell, pod, path=path)
        await self._pull(pod, node, container["image"], tell)
        tell("Created", f"Created container: {container['name']}")
        await asyncio.sleep(STEP_S)
        tell("Started", f"Started container {container['name']}")

    async def _pull(self, pod: Pod, node: Node, image: str, tell: Callable[..., None]) -> None:
        name = name_of(image)
        pull = node.images.get(name)
        if pull and pull.done():
            tell("Pulled", f'Container image "{image}" already present on machine')
            return
        began_s = time.monotonic()
        if image == pod.image:
            pod.reached("pulling")
        tell("Pulling", f'Pulling image "{image}"')
        if not pull:
            seconds = self._setting.image_s * (0.1 if name == INIT_IMAGE else 1)
            pull = node.images[name] = asyncio.create_task(asyncio.sleep(seconds))
        await asyncio.shield(pull)
        took = f"{time.monotonic() - began_s:.3f}s"
        size = "Image size: 912345678 bytes."
        tell("Pulled", f'Successfully pulled image "{image}" in {took} ({took} including waiting). {size}')
        if image == pod.image:
            pod.reached("pulled")

    async def _listen(self, pod: Pod) -> None:
        await asyncio.sleep(self._setting.spawn_s + random.uniform(0, self._setting.spawn_jitter_s))
        tag = pod.image.rpartition(":")[2]
        pod.lab = labs.Server(pod.environment(), tag, self._truth, self._hub)
        await pod.lab.start(pod.socket)
        pod.reached("listens")
        labs.in_background(pod.lab.announce())

    # ---- End --------------------------------------------------------------------------------------------------------

    def end(self, pod: Pod, grace_s: float) -> Json:
        """Begin to delete it; it is gone a little later, or at once without grace or a node."""
        if "deleted" in pod.moments:
            return pod.model()
        pod.reached("deleted")
        pod.manifest["metadata"] |= {"deletionTimestamp": stamp(), "deletionGracePeriodSeconds": int(grace_s)}
        labs.in_background(self.kill(pod, at_once=grace_s == 0 or pod.node is None))
        return self._cluster.publish(pod)

    async def kill(self, pod: Pod, at_once: bool) -> None:
        """End it: nothing more happens by itself, and nobody listens."""
        if pod.ready:
            self._cluster.tell(pod, "Killing", "Stopping container notebook", path=pod.path)
        if pod.life:
            pod.life.cancel()
        if pod.lab:
            await pod.lab.end()
        if pod.socket:
            pod.socket.close()
        if not at_once:
            await asyncio.sleep(random.uniform(*GOES_WITHIN_S) + self._setting.stop_s)
        self._cluster.remove(pod)


# ==== The process ====================================================================================================


class Api:
    """What the hub, and the tests, ask for."""

    def __init__(self, cluster: Cluster, kubelet: Kubelet) -> None:
        self._cluster, self._kubelet = cluster, kubelet
        self._stores = {store.kind: store for store in (cluster.pods, cluster.claims, cluster.events)}
        self._faults: dict[tuple[str, str], int] = {}  # a status, by method and kind

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
            return await self._act(request, self._store(kind), body)
        except Refusal as refusal:
            return refusal.response

    def _store(self, kind: str) -> Store:
        if kind not in self._stores:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        return self._stores[kind]

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
            case "DELETE":
                grace_s = float(request.query.get("gracePeriodSeconds", body.get("gracePeriodSeconds", 30)))
                return web.json_response(self._delete(store, name, grace_s))
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
        if store is self._cluster.claims:
            return self._cluster.add_claim(body)
        pod = Pod(body)
        if pod.behaviour in REFUSED:
            code, reason, message = REFUSED[pod.behaviour]
            raise Refusal(code, reason, message.format(name=name))
        self._cluster.add(pod)
        pod.life = asyncio.create_task(self._kubelet.live(pod))
        return pod.model()

    def _delete(self, store: Store, name: str, grace_s: float) -> Json:
        item = store.get(name)
        if store is self._cluster.pods:
            return self._kubelet.end(self._cluster.living()[name], grace_s)
        item["metadata"]["deletionTimestamp"] = stamp()
        store.put(item)
        self._cluster.release(name)
        return item

    # ---- Tests ------------------------------------------------------------------------------------------------------

    async def control(self, request: web.Request) -> web.Response:
        """See the module."""
        match await request.json():
            case {"fault": {"method": method, "kind": kind, "status": status}}:
                self._faults[method, kind] = status
            case {"clean": True}:
                self._faults.clear()
                for pod in self._cluster.living().values():
                    await self._kubelet.kill(pod, at_once=True)
                self._cluster.clean()
        return web.json_response({})

    async def truth(self, request: web.Request) -> web.Response:
        """See the module."""
        pods = [pod.truth() for pod in self._cluster.every_pod]
        return web.json_response({"pods": pods, "claims": list(self._cluster.claims.objects)})


async def serve(setting: Setting) -> None:
    """Serve at a port, which is printed, until the launcher ends."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    async with ClientSession(timeout=ClientTimeout(total=20)) as hub:
        cluster = Cluster(setting)
        runner = web.AppRunner(Api(cluster, Kubelet(cluster, hub)).application(), access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        threading.Thread(target=labs.end_with_launcher, daemon=True).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Setting(**json.loads(sys.argv[1]))))
