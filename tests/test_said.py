"""What is said while a server starts: where its time went, and why it failed."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest

import hub_stress_test as hst
from made_up import results_of

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


def test_phases_add_up_whatever_is_lost_repeated_or_out_of_order() -> None:
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
        ([text(0.0, "requested")], "requested"),
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
        ("Spawn failed: ", [], 300.7, "did not start in 300 s"),
        ("Spawn failed: pod jhub/jupyter-x did not start in 300 seconds!", [], 296.0, "did not start in 300 s"),
        ("Spawn failed: ", [said(1, "Pulling", MAIN)], 300.7, "did not start in 300 s: Pulling it"),
        ("", [said(1, "Failed", MAIN, "Warning")], 300.7, "did not start in 300 s: Failed it"),
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
def test_what_differs_from_server_to_server_is_no_part_of_a_reason(one: str, other: str) -> None:
    assert hst.without_name(one, "hub-stress-test-7") == hst.without_name(other, "hub-stress-test-12")


def test_the_means_of_starts_and_how_many_waited_for_a_new_node() -> None:
    cold, warm = phases(*ON_A_NEW_NODE), phases(said(1, "Scheduled"), said(2, "Started", MAIN), ready_s=4.0)
    assert cold and warm
    mean = hst.mean_phases([cold, warm])
    assert seconds(mean) == [1, 10, 1.5, 4.5, 1, 2] and mean and (mean.new_node, mean.images_pulled) == (1, 1)
    assert hst.mean_phases([]) is None


def test_spawn_failures_that_differ_in_what_they_count_are_one_reason() -> None:
    def failed(n: int, text: str, kind: hst.Kind) -> hst.Event:
        return hst.Event("server_ready", f"hub-stress-test-{n}", 0.0, 0.0, 1.0, hst.Reason(kind, text))

    texts = ["used: memory=20G (403)", "used: memory=21G (403)", "used: memory=20G (429)"]
    events = [failed(n, text, hst.Kind.SPAWN) for n, text in enumerate(texts)]
    events += [failed(n, f"cell {n} raised", hst.Kind.CELL) for n in (3, 4)]
    reasons = hst.servers_of({event.user: {"server_ready": event} for event in events}, 5, False).reasons
    assert reasons == {texts[0]: 2, texts[2]: 1, "cell 3 raised": 1, "cell 4 raised": 1}


# ==== The page =======================================================================================================


def on_kubernetes(ready: int, new_node: int = 0, pulled: int = 0, **options: Any) -> hst.Results:
    """The results of a run whose servers were ready, of which so many waited for a new node, or for an image."""
    events = []
    for n in range(ready):
        start = hst.Phases(1.0, 20.0, 1.0, 8.0, 1.0, 2.0, int(n < new_node), int(n < pulled))
        events.append(hst.Event("server_ready", hst.username(n), 0.0, 0.0, 33.0, phases=start))
    return results_of(events, options=hst.Plan(count=ready, **options).options())


def test_the_phases_of_a_start_say_where_the_time_went() -> None:
    assert list(hst.time_spent(on_kubernetes(3, new_node=2))) == [
        "of 33.0 s until ready, 1.00 s before Kubernetes said anything, 20.0 s waiting for a node (2 of 3 for a new "
        "one), 1.00 s attaching volumes, 8.00 s pulling the image, 1.00 s starting the container, 2.00 s the server's "
        "own start"
    ]


@pytest.mark.parametrize(
    ("results", "settings"),
    [
        (on_kubernetes(60, new_node=40), ["scheduling.userPlaceholder.replicas: 40"]),
        (on_kubernetes(60, pulled=30), ["prePuller.hook.enabled"]),
        (on_kubernetes(60, new_node=1, pulled=5), []),
    ],
)
def test_what_servers_waited_for_names_the_value_to_change(results: hst.Results, settings: list[str]) -> None:
    sentences = [*hst.advice(results, set())]
    assert len(sentences) == len(settings)
    assert all(setting in sentence for setting, sentence in zip(settings, sentences))


def test_a_page_of_kubernetes_says_how_to_find_volumes_that_stay() -> None:
    (cleanup, volumes) = [text for label, text in hst.facts(on_kubernetes(2)).rows if label == "cleanup"]
    assert "none left" in cleanup and "kubectl get pods,pvc" in volumes


def failed_starts(number: int, text: str, **more: Any) -> hst.Results:
    reason = hst.Reason(hst.Kind.SPAWN, text)
    events = [hst.Event("server_ready", hst.username(n), 0.0, 0.0, 1.0, reason) for n in range(number)]
    return results_of(events, **more)


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("did not start in 300 s: 0/3 nodes are available: 3 Insufficient memory", "singleuser.memory.guarantee"),
        ("did not start in 300 s", "c.Spawner.start_timeout"),
        ("exceeded quota: users (403)", "kubectl get events"),
        ("sbatch: error: Batch job submission failed", "squeue"),
    ],
)
def test_failed_starts_name_where_to_look(reason: str, setting: str) -> None:
    assert setting in " ".join(hst.advice(failed_starts(3, reason), {hst.Kind.SPAWN}))


def test_a_hub_that_exited_after_failed_starts_is_named_as_such() -> None:
    hub = hst.HubSide("http://x/hub/api", "6.1.1", 1, None, None)
    said = " ".join(hst.advice(failed_starts(6, "exceeded quota: users (403)", hub=hub), {hst.Kind.SPAWN}))
    assert "hub.consecutiveFailureLimit" in said and "--fail-fast 4" in said and "6 starts" in said


def test_throttling_names_the_limit_that_would_do() -> None:
    throttled = [hst.Event("start_server", "x", 0.0, 0.0, 35.0, backoff_s=20.0)]
    ready = hst.Event("server_ready", "x", 0.0, 0.0, 35.0, throttled=2, throttled_s=1.0)
    results = results_of([*throttled, ready], options=hst.Plan(rate_per_s=2.0).options())
    assert "c.JupyterHub.concurrent_spawn_limit: 94 is" in " ".join(hst.advice(results, set()))


def test_a_full_thread_is_said_first_and_its_spawn_time_is_not_the_spawners() -> None:
    own = hst.HubFigures(9, 0.9, 0.98, 0, 0, 0, None, 0.5, 2.0, 99, 9, {}, {"success": hst.OwnDurations(9, 10.7)})
    hub = hst.HubSide("http://x/hub/api", "6.1.1", 0, own, None)
    sentences = list(hst.time_spent(results_of([hst.Event("server_ready", "x", 0.0, 0.0, 11.0)], hub=hub)))
    assert sentences == ["the hub's one thread was full: it used up to 98 % of a processor"]
