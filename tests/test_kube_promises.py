"""Runs on the real KubeSpawner: what passed has run, what is left is said, and the hub stays up."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from localhub import LocalHub
from tool import run_for_results, run_tool, start_tool, tool_users, wait_until


@pytest.mark.parametrize("profile", ["TYPO", "quota", "webhook"])
def test_three_failed_starts_leave_the_hub_up(profile: str, kube_hub: LocalHub, tmp_path: Path) -> None:
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "10", "-p", profile, hub=kube_hub)
    assert done.code == 1 and "nothing started: the first three starts failed: " in done.summary
    assert found["operations"]["server_ready"]["failed"] == 3 and kube_hub.running
    assert "10 users deleted, none left" in done.summary and not tool_users(kube_hub)


@pytest.mark.parametrize(("command", "status"), [("stress-test", 403), ("purge", 500)])
def test_pods_that_outlive_their_users_are_counted(command: str, status: int, kube_hub: LocalHub) -> None:
    words = ("stress-test", "-c", "4", "--run", "ci")
    if command == "purge":
        assert run_tool(*words, "--keep", hub=kube_hub).code == 0
        words = ("purge", "--run", "ci")
    kube_hub.cluster.fault("DELETE", "pods", status=status)
    done = run_tool(*words, hub=kube_hub)
    assert done.code == 4 and not tool_users(kube_hub) and len(kube_hub.cluster.pods()) == 4
    assert "none left on the hub the hub failed to stop 4 servers during this run" in done.summary
    assert "kubectl get pods,pvc -n NAMESPACE | grep -E 'hub-(2d)?stress-(2d)?test-(2d)?ci'" in done.summary


def test_pods_that_never_ran_fail_when_the_hub_restarts(make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(kube=True, servers_outlive=True, http_timeout_s=10.0)
    with start_tool("stress-test", "-c", "3", "-p", "unschedulable", hub=hub) as run:
        wait_until(lambda: len(hub.cluster.pods()) == 3)
        hub.restart()
        wait_until(lambda: any(user["servers"] for user in hub.users().values()))
        pending = {server["pending"] for user in hub.users().values() for server in user["servers"].values()}
        done = run.outcome()
    assert "check" in pending and "pending check" not in hub.log()
    assert done.code == 1 and "0 of 3 servers became ready" in done.summary
    assert "3 users deleted, none left" in done.summary and not tool_users(hub) and not hub.cluster.pods()


def test_options_without_a_profile_key_are_a_warning(kube_hub: LocalHub, tmp_path: Path) -> None:
    done, found = run_for_results(tmp_path / "r", "stress-test", "-c", "1", "-p", '{"image": "r"}', hub=kube_hub)
    assert done.code == 0 and any("without the key `profile`" in warning for warning in found["warnings"])


@pytest.mark.parametrize("version", [None, "5.5.0"])
def test_the_phases_of_starts_are_those_of_the_pods(
    make_hub: Callable[..., LocalHub], version: str | None, tmp_path: Path
) -> None:
    hub = make_hub(kube=True, version=version, nodes=0, pods_per_node=3, node_s=4.0, image_s=3.0, spawn_s=2.0)
    words = ("stress-test", "-c", "6", "-b", "6", "-p", "plain")
    done, found = run_for_results(tmp_path / "r", *words, hub=hub)
    phases, pods = found["servers"]["phases"], [pod["moments"] for pod in hub.cluster.truth()["pods"]]

    def mean(begin: str, end: str) -> float:
        return statistics.mean(pod[end] - pod[begin] for pod in pods)

    assert done.code == 0 and phases["new_node"] == phases["images_pulled"] == 6
    assert phases["node_s"] == pytest.approx(mean("created", "scheduled"), abs=1.5)
    assert phases["volumes_s"] == pytest.approx(mean("scheduled", "attached"), abs=1.5)
    assert phases["image_s"] == pytest.approx(mean("pulling", "pulled"), abs=1.5)
    assert phases["container_s"] == pytest.approx(mean("pulled", "started"), abs=1.5)
    assert phases["server_s"] > mean("started", "listens") - 1.5  # and until a hub, which may be busy, has noticed
    earlier_s = phases["silent_s"] + mean("created", "started")
    whole_s = found["operations"]["server_ready"]["latency_s"]["mean"]
    assert phases["server_s"] == pytest.approx(whole_s - earlier_s, abs=1.5)
    assert "waiting for a node (6 of 6 for a new one)" in done.summary
