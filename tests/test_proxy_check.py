"""What the check of a proxy makes of its answers and of the hub's figures: the rules, without a hub."""

from __future__ import annotations

import pytest

import hub_stress_test as hst
from hub_stress_test import CLOSED_UNANSWERED, UNANSWERED, Reply, Snapshot
from made_up import results_of
from made_up import sentences as told
from test_aftermath import FILES, PAGES, looks

CLOSED, NOBODY = Reply(0, 0.0, 0.1, message=CLOSED_UNANSWERED), Reply(0, 0.0, 10.0, message=UNANSWERED)


def answered(status: int) -> Reply:
    return Reply(status, 0.0, 0.1)


BEFORE = looks({FILES: 14.0}, {FILES: 20.0})


def after(files: float, pages: float) -> list[Snapshot]:
    return looks({FILES: files, PAGES: pages}, {FILES: files, PAGES: pages})


GONE, NO_ROUTE = answered(503), [answered(302)] * 20


@pytest.mark.parametrize(
    ("page", "ended", "stopped", "figures", "verdict", "reason"),
    [
        (503, [CLOSED] * 100, NO_ROUTE, after(120, 100), "leaking", "still held 100 connections to the hub"),
        (503, [CLOSED] * 100, NO_ROUTE, after(114, 101), "leaking", "still held 100 connections"),
        (502, [answered(502)] * 100, NO_ROUTE, after(120, 100), "leaking", "still held 100"),
        (503, [GONE] * 100, NO_ROUTE, after(17, 1), "clean", "kept no connection for them"),
        (503, [GONE] * 92 + [answered(502)] * 8, NO_ROUTE, after(20, 8), "undecided", "8 were closed without"),
        (503, [GONE] * 100, NO_ROUTE, after(130, 1), "undecided", "other people's traffic"),
        (503, [GONE] * 100, NO_ROUTE, after(60, 50), "undecided", "by 40, its error pages by 50"),
        (503, [GONE] * 100, [NOBODY] * 3, after(17, 1), "leaking", "never answers websockets"),
        (503, [], [NOBODY] * 3, after(17, 1), "undecided", "noticed after 0 websockets"),
        (503, [answered(403)] * 100, [answered(403)] * 20, after(17, 1), "undecided", "403. Do websockets pass?"),
        (503, [CLOSED] * 19, NO_ROUTE, after(39, 19), "undecided", "noticed after 19 websockets"),
        (502, [answered(502)] * 100, [answered(404)] * 20, after(20, 0), "undecided", "another kind of proxy: it"),
        (503, [CLOSED] * 100, NO_ROUTE, [], "leaking", "closed them without an answer"),
        (503, [GONE] * 100, NO_ROUTE, [], "undecided", "figures were not read"),
        (502, [answered(502)] * 100, [answered(404)] * 20, [], "undecided", "another kind of proxy"),
        (503, [CLOSED] * 79 + [GONE] * 21, NO_ROUTE, [], "undecided", "figures were not read"),
    ],
)
def test_a_proxy_is_judged_by_answers_and_hub_figures(
    page: int, ended: list[Reply], stopped: list[Reply], figures: list[Snapshot], verdict: str, reason: str
) -> None:
    check = hst.judge_proxy(page, ended, stopped, BEFORE if figures else [], figures)
    leaking = {"clean": 0, "leaking": 1, "undecided": None}
    assert (check.verdict, check.leaking) == (verdict, leaking[verdict])
    assert reason in check.reason and check.handshakes == len(ended) + len(stopped)
    assert (check.open_files is None) == (not figures)


LEAK = "proxy_check.leaking > 0"


@pytest.mark.parametrize(("leaking", "fails"), [(1, True), (0, False), (None, True)])
def test_a_leak_or_no_verdict_meets_the_checks_condition(leaking: int | None, fails: bool) -> None:
    assert hst.condition(LEAK).judge({"proxy_check": {"leaking": leaking}}, None).held is fails
    assert hst.condition(LEAK).judge({"proxy_check": None}, None).held


@pytest.mark.parametrize(
    ("words", "conditions"), [((), ["failed > 0", LEAK]), (("failed > 1",), ["failed > 1", LEAK]), ((LEAK,), [LEAK])]
)
def test_a_leak_fails_the_run_whatever_the_conditions(words: tuple[str, ...], conditions: list[str]) -> None:
    plan = hst.Plan(check_proxy=True, fail_if=tuple(map(hst.condition, words)))
    assert [condition.text for condition in plan.conditions] == conditions
    undecided = {"failed": 0, "proxy_check": {"verdict": "undecided", "leaking": None}}
    met = [judged.condition for judged in hst.judgements_of(plan, undecided) if judged.held]
    assert met == [LEAK] * (LEAK in words)  # an undecided check meets only the condition that asks


def test_a_leak_is_projected_to_300_with_the_upgrade() -> None:
    found = results_of([], proxy_check=hst.ProxyCheck("leaking", 1, "it is so", 100, 100.0))
    (said,) = told(found, "proxy")
    assert said.startswith("leaking: it is so. ") and "300 open tabs" in said
    assert "28,000 ports would last 47 minutes" in said
    assert "before 5.1.0" in " ".join(hst.advice(found, ()))
