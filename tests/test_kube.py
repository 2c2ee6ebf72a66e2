"""The real KubeSpawner on the stub of Kubernetes: the double behaves as a cluster does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from localhub import LocalHub
from tool import wait_until

PHASES = ("FailedScheduling", "TriggeredScaleUp", "Scheduled", "SuccessfulAttachVolume")
PHASES += ("Pulling", "Pulled", "Created", "Started") * 2  # of the init container, and of the server


def start(hub: LocalHub, name: str, profile: str = "plain") -> int:
    """Make a user and ask for their server; the status of the answer."""
    hub.call("POST", "/users", {"usernames": [name]})
    return hub.call("POST", f"/users/{name}/server", {"profile": profile})[0]


def progress(hub: LocalHub, name: str) -> Iterator[dict[str, Any]]:
    """What the hub says while the server starts, until that is over."""
    url, headers = f"{hub.endpoint}/users/{name}/server/progress", {"Authorization": f"token {hub.token}"}
    with requests.get(url, headers=headers, stream=True, timeout=60) as stream:
        yield from (json.loads(line[6:]) for line in stream.iter_lines(chunk_size=1) if line.startswith(b"data: "))


def start_ready(hub: LocalHub, name: str) -> str:
    """The address of a server that has become ready."""
    start(hub, name)
    *_, last = progress(hub, name)
    assert last.get("ready"), last
    return next(
        f"http://{pod['ip']}:8888/user/{name}/api" for pod in hub.cluster.truth()["pods"] if pod["user"] == name
    )


def telling(hub: LocalHub, name: str, pattern: str) -> dict[str, Any]:
    """The first message while the server starts in which the pattern is found."""
    return next(message for message in progress(hub, name) if re.search(pattern, message["message"]))


def failed_stops(hub: LocalHub) -> float:
    """How many stops failed, by the hub's metrics."""
    url, headers = hub.endpoint.removesuffix("/api") + "/metrics", {"Authorization": f"token {hub.token}"}
    page = requests.get(url, headers=headers, timeout=30).text
    found = re.search(r'^jupyterhub_server_stop_seconds_count\{status="failure"\} (\S+)', page, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("version", [None, "5.5.0"])
def test_a_start_goes_through_every_phase(make_hub: Callable[..., LocalHub], version: str | None) -> None:
    hub = make_hub(kube=True, version=version, nodes=0, node_s=1.0, image_s=0.5, spawn_s=1.5)
    assert start(hub, "zoe") == 202
    said = list(progress(hub, "zoe"))
    assert said[-1]["ready"]
    events = [message["raw_event"] for message in said if "raw_event" in message]
    assert tuple(event["reason"] for event in events) == PHASES
    paths = [event["involvedObject"].get("fieldPath", "")[:9] for event in events[4:]]
    assert paths == ["spec.init"] * 4 + ["spec.cont"] * 4
    (pod,) = hub.cluster.truth()["pods"]
    assert pod["listens"] and requests.get(f"http://{pod['ip']}:8888/user/zoe/api", timeout=9).status_code == 200
    assert hub.cluster.claims() == ["claim-zoe"]
    assert hub.call("DELETE", "/users/zoe")[0] == 204
    assert (hub.cluster.pods(), hub.cluster.claims()) == ([], [])


def test_a_hub_with_five_failed_starts_exits_and_comes_back(kube_hub: LocalHub) -> None:
    for number in range(5):
        assert start(kube_hub, f"zoe-{number}", "quota") in (202, 500)
    wait_until(lambda: kube_hub.exits == 1 and kube_hub.answers())
    assert "zoe-4" in kube_hub.users()


def test_a_refused_deletion_leaves_a_pod_that_the_hub_forgets(kube_hub: LocalHub) -> None:
    start_ready(kube_hub, "zoe")
    before = failed_stops(kube_hub)
    kube_hub.cluster.fault("DELETE", "pods", status=403, times=1)
    assert kube_hub.call("DELETE", "/users/zoe")[0] == 204
    assert failed_stops(kube_hub) == before + 1
    assert (kube_hub.cluster.pods(), kube_hub.cluster.claims()) == (["jupyter-zoe"], ["claim-zoe"])


@pytest.mark.parametrize(
    ("profile", "pattern"),
    [
        ("quota", r"Spawn failed: \(403\)(.|\n)*exceeded quota"),
        ("webhook", r"Spawn failed: \(400\)(.|\n)*admission webhook"),
        ("unschedulable", r"\[Warning\] 0/1 nodes are available: 1 Insufficient memory"),
        ("no-image", r"\[Warning\] Error: ImagePullBackOff"),
        ("crash", r"\[Warning\] Back-off restarting failed container"),
        ("typo", r"Spawn failed: No such profile: typo"),
    ],
)
def test_a_profile_fails_as_its_name_says(kube_hub: LocalHub, profile: str, pattern: str) -> None:
    assert start(kube_hub, "zoe", profile) in (202, 400)
    assert telling(kube_hub, "zoe", pattern)
    assert kube_hub.call("DELETE", "/users/zoe/server")[0] in (202, 204)
    wait_until(lambda: not kube_hub.cluster.pods())


@pytest.mark.parametrize(
    ("fate", "phase", "exists"),
    [("oom", "Running", True), ("evicted", "Failed", True), ("node-lost", "Running", False), ("mute", "Running", True)],
)
def test_a_pod_that_ran_answers_no_more(kube_hub: LocalHub, fate: str, phase: str, exists: bool) -> None:
    address = start_ready(kube_hub, "zoe")
    assert requests.get(address, timeout=9).headers["X-JupyterHub-Version"]
    assert kube_hub.cluster.happen(fate) == ["jupyter-zoe"]
    with pytest.raises(requests.ConnectionError):
        requests.get(address, timeout=9)
    (pod,) = kube_hub.cluster.truth()["pods"]
    assert (pod["phase"], pod["exists"]) == (phase, exists)
    assert kube_hub.users()["zoe"]["servers"][""]["ready"]  # the hub has not looked yet


def test_a_creation_answered_504_leaves_a_pod_nobody_knows(kube_hub: LocalHub) -> None:
    before = failed_stops(kube_hub)
    kube_hub.cluster.fault("POST", "pods", status=504, acts=True, times=1)
    start(kube_hub, "zoe")
    assert telling(kube_hub, "zoe", r"Spawn failed: \(504\)")
    wait_until(kube_hub.cluster.pods)
    assert kube_hub.call("DELETE", "/users/zoe")[0] == 204
    assert (kube_hub.cluster.pods(), failed_stops(kube_hub)) == (["jupyter-zoe"], before)


def test_a_slow_api_is_asked_again(kube_hub: LocalHub) -> None:
    kube_hub.cluster.fault("POST", "pods", delay_s=3.5, times=1)  # KubeSpawner waits for 3 s
    start_ready(kube_hub, "zoe")
    wait_until(lambda: kube_hub.cluster.truth()["asked"]["POST pods"] == {"201": 1, "409": 1})


def test_servers_of_a_killed_hub_are_checked_when_it_is_back(kube_hub: LocalHub) -> None:
    start(kube_hub, "zoe", "no-image")
    assert telling(kube_hub, "zoe", "Back-off pulling image")
    kube_hub.restart()
    server = kube_hub.users()["zoe"]["servers"][""]
    assert (server["pending"], server["ready"], server["stopped"]) == ("check", False, False)
    assert kube_hub.cluster.pods() == ["jupyter-zoe"]
