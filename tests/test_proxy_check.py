"""What the check of a proxy makes of its answers and of the hub's figures: the rules, without a hub."""

from __future__ import annotations

import dataclasses

import pytest

import hub_stress_test as hst
from hub_stress_test import CLOSED_UNANSWERED, UNANSWERED, Reply, Snapshot
from made_up_results import results_of
from made_up_results import sentences as told
from test_aftermath import FILES, PAGES, looks
from tool import NOWHERE, refused_usage

CLOSED, NOBODY = Reply(0, 0.0, 0.1, message=CLOSED_UNANSWERED), Reply(0, 0.0, 10.0, message=UNANSWERED)


def answered(status: int) -> Reply:
    return Reply(status, 0.0, 0.1)


BEFORE = looks({FILES: 14.0}, {FILES: 20.0})


def after(files: float, pages: float) -> list[Snapshot]:
    return looks({FILES: files, PAGES: pages}, {FILES: files, PAGES: pages})


@pytest.mark.parametrize(
    ("page", "ended", "stopped", "figures", "verdict", "reason"),
    [
        (
            503,
            [CLOSED] * 100,
            [answered(302)] * 20,
            after(120, 100),
            "leaking",
            "still held 100 connections to the hub",
        ),
        (503, [CLOSED] * 100, [answered(302)] * 20, after(114, 101), "leaking", "still held 100 connections"),
        (502, [answered(502)] * 100, [answered(302)] * 20, after(120, 100), "leaking", "still held 100"),
        (503, [answered(503)] * 100, [answered(302)] * 20, after(17, 1), "clean", "kept no connection for them"),
        (503, [answered(503)] * 100, [answered(302)] * 20, after(130, 1), "undecided", "other people's traffic"),
        (503, [answered(503)] * 100, [answered(302)] * 20, after(60, 50), "undecided", "by 40, its error pages by 50"),
        (503, [answered(503)] * 100, [NOBODY] * 3, after(17, 1), "leaking", "never answers websockets"),
        (503, [], [NOBODY] * 3, after(17, 1), "undecided", "noticed after 0 websockets"),
        (
            503,
            [answered(403)] * 100,
            [answered(403)] * 20,
            after(17, 1),
            "undecided",
            "answered: 403. Do websockets pass?",
        ),
        (503, [CLOSED] * 19, [answered(302)] * 20, after(39, 19), "undecided", "noticed after 19 websockets"),
        (
            502,
            [answered(502)] * 100,
            [answered(404)] * 20,
            after(20, 0),
            "undecided",
            "another kind of proxy: it answers 502",
        ),
        (503, [CLOSED] * 100, [answered(302)] * 20, [], "leaking", "closed them without an answer"),
        (503, [answered(503)] * 100, [answered(302)] * 20, [], "undecided", "figures were not read"),
        (502, [answered(502)] * 100, [answered(404)] * 20, [], "undecided", "another kind of proxy"),
        (503, [CLOSED] * 79 + [answered(503)] * 21, [answered(302)] * 20, [], "undecided", "figures were not read"),
    ],
)
def test_a_proxy_is_judged_by_what_it_answers_and_what_the_hub_is_left_with(
    page: int, ended: list[Reply], stopped: list[Reply], figures: list[Snapshot], verdict: str, reason: str
) -> None:
    found = hst.judge_proxy(page, ended, stopped, BEFORE if figures else [], figures)
    leaking = {"clean": 0, "leaking": 1, "undecided": None}
    assert (found.verdict, found.leaking) == (verdict, leaking[verdict])
    assert reason in found.reason and found.handshakes == len(ended) + len(stopped)
    assert (found.open_files is None) == (not figures)


def test_an_undecided_check_meets_only_the_condition_that_asks() -> None:
    undecided = {"proxy_check": {"verdict": "undecided", "leaking": None}}
    assert hst.condition("proxy_check.leaking > 0").judge(undecided, None).held
    for words in ((), ("failed > 0",), ("proxy_check.leaking > 0",)):
        plan = hst.Plan(check_proxy=True, fail_if=tuple(map(hst.condition, words)))
        judged = hst.judgements_of(plan, {"failed": 0} | undecided)
        assert [(one.condition, one.value, one.held) for one in judged if one.held] == (
            [("proxy_check.leaking > 0", None, True)] if "proxy_check.leaking > 0" in words else []
        )


def test_a_leaking_proxy_fails_the_run_whatever_the_conditions() -> None:
    plan = hst.Plan(check_proxy=True)
    assert [one.text for one in plan.conditions] == ["failed > 0", "proxy_check.leaking > 0"]
    assert hst.condition("proxy_check.leaking > 0").judge({"proxy_check": {"leaking": 1}}, None).held
    assert not hst.condition("proxy_check.leaking > 0").judge({"proxy_check": {"leaking": 0}}, None).held
    assert hst.condition("proxy_check.leaking > 0").judge({"proxy_check": None}, None).held
    asked = dataclasses.replace(plan, fail_if=(hst.condition("visit.p95 > 1s"),))
    assert [one.text for one in asked.conditions] == ["visit.p95 > 1s", "proxy_check.leaking > 0"]


def test_a_leak_is_projected_to_300_people_and_the_upgrade_is_advised() -> None:
    found = results_of([], proxy_check=hst.ProxyCheck("leaking", 1, "it is so", 100, 100.0))
    assert told(found, "proxy") == [
        "leaking: it is so. Each failed reconnect of an open tab adds one, for an hour. If 300 open tabs kept "
        "reconnecting twice a minute to ended servers that still have a route, the proxy's 28,000 ports would last 47 "
        "minutes; then every page of the hub answers 503"
    ]
    assert "before 5.1.0" in " ".join(hst.advice(found, ()))


def test_a_check_that_ends_a_server_does_not_keep_all(capsys: pytest.CaptureFixture[str]) -> None:
    said = "--check-proxy ends servers, and --keep leaves them running: give one of them"
    assert said in refused_usage(["stress-test", "--check-proxy", "--keep"], NOWHERE, capsys)
