"""What is said while a server starts: where its time went, and why it failed."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest

import hub_stress_test as hst
from made_up import failed, results_of

NODES = "0/3 nodes are available: 3 Insufficient memory."
BEGAN = datetime(2026, 11, 29, 12, 0, 0, tzinfo=timezone.utc).timestamp()
HERE_S = 1000.0  # of this machine's clock, when the cluster's says BEGAN


def said(after_s: float, reason: str, path: str = "", kind: str = "Normal", late_s: float = 0.0) -> tuple[float, Any]:
    """A Kubernetes event that happened so long after the start, and arrived so late."""
    moment = datetime.fromtimestamp(BEGAN + after_s, timezone.utc).isoformat(timespec="microseconds")
    moment = moment.replace("+00:00", "Z")
    raw = {"reason": reason, "type": kind, "message": f"{reason} it", "lastTimestamp": moment}
    raw["involvedObject"] = {"fieldPath": path} if path else {}
    return HERE_S + after_s + late_s, {"message": f"{moment} [{kind}] {reason} it", "raw_event": raw}


def text(at_s: float, message: str) -> tuple[float, Any]:
    return HERE_S + at_s, {"message": message}


INIT, MAIN = "spec.initContainers{block-cloud-metadata}", "spec.containers{notebook}"
ON_A_NEW_NODE = [
    said(1, "FailedScheduling", kind="Warning", late_s=0.9),
    said(2, "TriggeredScaleUp", late_s=0.4),
    said(21, "Scheduled"),
    said(23, "Pulling", INIT, late_s=0.7),
    said(24, "Pulled", INIT),
    said(24, "Created", INIT),
    said(24.5, "Started", INIT),
    said(25, "Pulling", MAIN),
    said(33, "Pulled", MAIN, late_s=1.2),
    said(33.5, "Created", MAIN),
    said(34, "Started", MAIN, late_s=0.3),
]


def phases(*events: Any, ready_s: float = 36.0) -> hst.Phases | None:
    return hst.phases_of(events, HERE_S, HERE_S + ready_s)


def seconds(found: hst.Phases | None) -> list[float]:
    assert found
    return [round(getattr(found, name), 3) for name in hst.PHASES]


def test_a_start_on_a_new_node_has_all_phases() -> None:
    found = phases(*ON_A_NEW_NODE)
    assert seconds(found) == [1, 20, 2, 9, 2, 2] and found and (found.new_node, found.images_pulled) == (1, 1)
    assert phases() is None and phases(text(1.0, "spawning")) is None  # without events of Kubernetes


def test_phases_add_up_whatever_is_lost_or_repeated() -> None:
    for missing in range(len(ON_A_NEW_NODE)):
        events = ON_A_NEW_NODE[:missing] + ON_A_NEW_NODE[missing + 1 :]
        found = seconds(phases(*reversed(events), *events[:3]))
        assert sum(found) == pytest.approx(36.0) and min(found) >= 0.0


def test_a_start_on_a_warm_node_pulls_nothing() -> None:
    events = [said(0.5, "Scheduled"), said(1, "Pulled", INIT), said(1, "Started", INIT), said(2, "Pulled", MAIN)]
    found = phases(*events, said(3, "Started", MAIN), ready_s=5.0)
    assert seconds(found) == [0.5, 0, 0.5, 0, 2, 2] and found and (found.new_node, found.images_pulled) == (0, 0)


@pytest.mark.parametrize(
    ("events", "longest"),
    [
        ([], ""),
        ([text(0.0, "requested"), text(1.0, "pulling"), text(7.0, "started")], "pulling"),
        ([text(0.0, "requested"), text(1.0, "pulling"), text(2.0, "started")], "started"),
        (ON_A_NEW_NODE, "waiting for a node, 20.0 s"),
    ],
)
def test_the_longest_wait_of_a_start_is_named(events: list[Any], longest: str) -> None:
    ready_s = HERE_S + (36.0 if events is ON_A_NEW_NODE else 8.0)
    assert hst.longest_wait(events, hst.phases_of(events, HERE_S, ready_s), ready_s) == longest


def test_the_last_word_is_the_warning_that_still_holds() -> None:
    starving = [said(1, "FailedScheduling", kind="Warning"), said(2, "NotTriggerScaleUp")]
    assert hst.last_word(starving) == "FailedScheduling it"
    assert hst.last_word([said(1.4, "Scheduled"), said(1, "Pulling", MAIN, late_s=0.6)]) == "Pulling it"
    broken = [*starving, said(3, "Scheduled"), said(4, "Failed", MAIN, "Warning"), said(5, "BackOff", MAIN)]
    assert hst.last_word([*broken, said(6, "Killing", MAIN)]) == "Failed it"
    assert hst.last_word([*starving, said(3, "Scheduled"), said(4, "Pulling", MAIN)]) == "Pulling it"
    assert hst.last_word([text(1, "one"), text(2, "two")]) == "two" and hst.last_word([]) == ""


def api_error(status: int, message: str) -> str:
    body = json.dumps({"kind": "Status", "message": message, "code": status})
    headers = "<CIMultiDictProxy('Audit-Id': 'a9d6d6f0', 'Date': 'Sun, 29 Nov 2026 21:39:53 GMT')>"
    return f"Spawn failed: ({status})\nReason: error\nHTTP response headers: {headers}\nHTTP response body: {body}\n"


@pytest.mark.parametrize(
    ("message", "events", "lasted_s", "reason"),
    [
        (api_error(403, "exceeded quota: users"), [], 0.3, "exceeded quota: users (403)"),
        ("Spawn failed: no such profile", [], 0.3, "no such profile"),
        ("Spawn failed: ", [], 0.3, "the hub gives no reason"),
        ("Spawn failed: ", [], 59.8, "did not start in 60 s"),
        ("Spawn failed: pod jhub/jupyter-x did not start in 300 seconds!", [], 296.0, "did not start in 300 s"),
        ("Spawn failed: ", [said(1, "Pulling", MAIN)], 300.7, "did not start in 300 s: Pulling it"),
    ],
)
def test_a_failed_start_says_why(message: str, events: list[Any], lasted_s: float, reason: str) -> None:
    assert hst.spawn_failure(message, events, lasted_s) == reason


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pod jupyter-hub-stress-test-7---0f3a77c7 pending", "pod jupyter-hub-stress-test-12---0f3a77c2 pending"),
        ("pod jupyter-hub-2dstress-2dtest-2d7 pending", "pod jupyter-hub-2dstress-2dtest-2d12 pending"),
        ("no answer from http://10.1.2.3:8888/user/x", "no answer from http://10.1.20.31:8888/user/x"),
        ("2026-11-29T21:39:53.83Z [Warning] no node", "2026-11-29T21:39:54Z [Warning] no node"),
        ("(f3365dee-34f2-4b7f-bc2a-447bd1d23aa1)", "(00005dee-34f2-4b7f-bc2a-447bd1d23aa1)"),
    ],
)
def test_a_reason_leaves_out_what_differs_between_servers(one: str, other: str) -> None:
    assert hst.without_name(one, "hub-stress-test-7") == hst.without_name(other, "hub-stress-test-12")


def test_the_phases_of_several_starts_have_means() -> None:
    cold, warm = phases(*ON_A_NEW_NODE), phases(said(1, "Scheduled"), said(2, "Started", MAIN), ready_s=4.0)
    assert cold and warm
    mean = hst.mean_phases([cold, warm])
    assert seconds(mean) == [1, 10, 1.5, 4.5, 1, 2] and mean and (mean.new_node, mean.images_pulled) == (1, 1)
    assert hst.mean_phases([]) is None


def test_spawn_failures_that_differ_in_counts_are_one_reason() -> None:
    texts = ["used: memory=20G (403)", "used: memory=21G (403)", "used: memory=20G (429)"]
    events = [failed(n, text) for n, text in enumerate(texts)]
    events += [failed(n, f"cell {n} raised", hst.Kind.CELL) for n in (3, 4)]
    servers = results_of(events).servers
    assert servers and servers.reasons == {texts[0]: 2, texts[2]: 1, "cell 3 raised": 1, "cell 4 raised": 1}
