"""The real KubeSpawner on the stub of Kubernetes: the double behaves as a cluster does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import requests
from localhub import LocalHub
from tool import wait_until

PHASES = (
    *("FailedScheduling", "TriggeredScaleUp", "Scheduled", "SuccessfulAttachVolume", "Pulled", "Created", "Started"),
    *("Pulling", "Pulled", "Created", "Started"),
)


def start(hub: LocalHub, name: str, profile: str = "plain") -> int:
    """Make a user and ask for their server; the status of the answer."""
    hub.call("POST", "/users", {"usernames": [name]})
    return hub.call("POST", f"/users/{name}/server", {"profile": profile})[0]


def progress(hub: LocalHub, name: str) -> list[dict[str, Any]]:
    """What the hub says while the server starts, until that is over."""
    url, headers = f"{hub.endpoint}/users/{name}/server/progress", {"Authorization": f"token {hub.token}"}
    with requests.get(url, headers=headers, stream=True, timeout=60) as stream:
        return [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith(b"data: ")]


def failed_stops(hub: LocalHub) -> float:
    """How many stops failed, by the hub's metrics."""
    url, headers = hub.endpoint.removesuffix("/api") + "/metrics", {"Authorization": f"token {hub.token}"}
    page = requests.get(url, headers=headers, timeout=30).text
    found = re.search(r'^jupyterhub_server_stop_seconds_count\{status="failure"\} (\S+)', page, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("version", [None, "5.5.0"])
def test_a_start_goes_through_every_phase(make_hub: Callable[..., LocalHub], version: str | None) -> None:
    hub = make_hub(kube=True, version=version, nodes=0, node_s=0.5, image_s=0.5, spawn_s=1.5)
    assert start(hub, "zoe") == 202
    said = progress(hub, "zoe")
    assert said[-1]["ready"]
    events = [message["raw_event"] for message in said if "raw_event" in message]
    assert tuple(event["reason"] for event in events) == PHASES
    paths = [event["involvedObject"].get("fieldPath", "")[:9] for event in events[4:]]
    assert paths == ["spec.init"] * 3 + ["spec.cont"] * 4
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
    start(kube_hub, "zoe")
    assert progress(kube_hub, "zoe")[-1]["ready"]
    before = failed_stops(kube_hub)
    kube_hub.cluster.fault("DELETE", "pods", status=403, times=1)
    assert kube_hub.call("DELETE", "/users/zoe")[0] == 204
    assert failed_stops(kube_hub) == before + 1
    assert (kube_hub.cluster.pods(), kube_hub.cluster.claims()) == (["jupyter-zoe"], ["claim-zoe"])
