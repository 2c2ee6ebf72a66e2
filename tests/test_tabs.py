"""Tabs that are left open, and what the hub's figures prove of a proxy: the rules, without a hub."""

from __future__ import annotations

import dataclasses
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from authority import certificate_for_loopback
from test_aftermath import FILES, PAGES, looks
from test_summary import results_of, told
from tool import NOWHERE, refused_usage, wait_until

import hub_stress_test as hst
from hub_stress_test import CLOSED_UNANSWERED, UNANSWERED, Change, Event, Kind, Reason, Reply, Snapshot, WayOut

CLOSED, NOBODY = Reply(0, 0.0, 0.1, message=CLOSED_UNANSWERED), Reply(0, 0.0, 10.0, message=UNANSWERED)


def answered(status: int) -> Reply:
    return Reply(status, 0.0, 0.1)


# ==== Who leaves how, and what tabs ask for ==========================================================================


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.75, 1.0])
def test_exactly_a_share_of_the_people_leave_tabs_open_and_half_of_their_servers_end_either_way(share: float) -> None:
    ways = [hst.way_out(number, share) for number in range(120)]
    assert sum(way is not WayOut.LOGS_OUT for way in ways) == round(120 * share)
    assert ways.count(WayOut.BY_ITSELF) - ways.count(WayOut.STOPPED) in (0, 1)


def test_the_first_who_leaves_a_tab_open_has_a_server_that_ends_by_itself() -> None:
    ways = [hst.way_out(number, 0.5) for number in range(4)]
    assert ways == [WayOut.LOGS_OUT, WayOut.BY_ITSELF, WayOut.LOGS_OUT, WayOut.STOPPED]


def requests_within(tab: str, seconds: float) -> list[str]:
    return [what for _, what in itertools.takewhile(lambda one: one[0] <= seconds, hst.tab_requests(tab))]


def test_a_tab_of_lab_4_2_opens_websockets_for_ever() -> None:
    assert requests_within("lab-4.2", 29.0) == ["channels", *["api/events/subscribe"] * 6]
    assert len(requests_within("lab-4.2", 3629.0)) == 7 + 3600 / 30


def test_a_tab_of_lab_4_6_soon_only_asks_for_its_kernel() -> None:
    assert requests_within("lab-4.6", 4.0) == ["channels", *["api/events/subscribe"] * 3]
    assert set(requests_within("lab-4.6", 600.0)[4:]) == {"kernel"}
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(itertools.islice(hst.tab_requests("lab-4.6"), 4, 30))]
    assert all(10.0 <= gap <= 30.0 for gap in gaps)


def test_all_tabs_together_open_at_most_twenty_websockets_per_second() -> None:
    tabs = hst.Tabs()
    places = [tabs.place(100.0) for _ in range(101)]
    assert places[0] == 100.0 and places[-1] == pytest.approx(105.0)
    assert tabs.place(200.0) == 200.0  # what was not used is not made up for


@pytest.mark.parametrize(
    ("reply", "number", "ended"),
    [
        (CLOSED, 99, ""),
        (CLOSED, 100, "after 100 answers that only an affected proxy gives"),
        (NOBODY, 100, "after 100 answers that only an affected proxy gives"),
        (answered(502), 100, "after 100 answers that only an affected proxy gives"),
        (answered(503), 999, ""),
        (answered(302), 1000, "after 1,000"),
        (Reply(0, 0.0, 0.1, message="connection refused"), 999, ""),
    ],
    ids=lambda one: one.message or one.status if isinstance(one, Reply) else None,
)
def test_tabs_stop_asking_when_a_proxy_seems_affected_and_in_any_case(reply: Reply, number: int, ended: str) -> None:
    tabs = hst.Tabs()
    for _ in range(number):
        tabs.note(reply)
    assert tabs.ended == ended


def test_the_hub_is_looked_at_before_the_first_tab_alone() -> None:
    looked: list[int] = []
    tabs = hst.Tabs((), lambda: looked.append(1))
    for _ in range(3):
        tabs.look_first()
    assert looked == [1]


# ==== What proves a leak =============================================================================================


def seen(*rows: tuple[float, float, float]) -> list[Snapshot]:
    """Looks at the hub: moment, open files, error pages."""
    return [Snapshot(at_s, {FILES: files, PAGES: pages}) for at_s, files, pages in rows]


TEN = [10.0 + n / 10 for n in range(10)]  # moments of handshakes


@pytest.mark.parametrize(
    ("asked_s", "rows", "proof_s"),
    [
        (TEN, [(9, 20, 0), (15, 30, 10), (20, 30, 10), (30, 30, 10)], 30.0),
        (TEN, [(9, 20, 0), (15, 28, 8), (30, 28, 8)], 30.0),
        (TEN, [(9, 20, 0), (15, 27, 10), (30, 27, 10)], None),  # of ten, less than eight files
        (TEN, [(9, 20, 0), (15, 30, 7), (30, 30, 7)], None),
        (TEN, [(9, 20, 0), (15, 30, 10), (25, 30, 10)], None),  # not yet 15 s
        (TEN, [(9, 20, 0), (15, 30, 10), (20, 22, 10), (30, 22, 10)], None),  # they came back
        (TEN, [(9, 20, 0), (15, 30, 10), (20, 22, 10), (25, 30, 10), (40, 30, 10)], 40.0),
        (TEN[:9], [(9, 20, 0), (15, 30, 10), (30, 30, 10)], None),  # too few
        (TEN, [(0, 10, 0), (9, 40, 0), (15, 30, 10), (30, 20, 10)], 30.0),  # of the load's connections some were lost
        (TEN, [(0, 10, 3), (9, 40, 90), (15, 40, 90), (30, 40, 90)], None),  # a healthy proxy: no pages came of it
        (TEN, [(15, 30, 10), (30, 30, 10)], None),  # nobody looked before
        ([], [(9, 20, 0), (15, 30, 10), (30, 30, 10)], None),
        (TEN, [], None),
    ],
)
def test_a_leak_is_proven_by_files_and_pages_that_have_grown_and_stayed(
    asked_s: Sequence[float], rows: list[tuple[float, float, float]], proof_s: float | None
) -> None:
    proof = hst.leak_at(asked_s, seen(*rows))
    assert (proof and proof.at_s) == proof_s


def test_a_hub_that_restarts_meanwhile_proves_nothing() -> None:
    rows = seen((9, 20, 0), (15, 30, 10), (30, 30, 10))
    begun = [
        dataclasses.replace(one, figures={**one.figures, ("process_start_time_seconds", ""): n > 0})
        for n, one in enumerate(rows)
    ]
    assert hst.leak_at(TEN, rows) and not hst.leak_at(TEN, begun)


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


# ==== What is said ===================================================================================================


def leaking(**more: Any) -> hst.Results:
    changes = {"open_files": Change(14.0, 120.0, 114.0, 100.0), "proxy_error_pages": Change(0.0, 97.0, 97.0, 97.0)}
    return results_of([], aftermath={"leaking": 1, "hub": changes}, tabs=hst.OpenTabs(5, 5, 97, ""), **more)


def test_a_leak_is_told_to_people_who_do_not_know_what_a_file_descriptor_is() -> None:
    (sentence,) = told(leaking(), "aftermath")
    assert sentence == (
        "after everybody had left, the proxy still held 97 connections to the hub that nobody uses. Each failed "
        "reconnect of an open tab adds one, for an hour. If 300 open tabs kept reconnecting twice a minute to ended "
        "servers that still have a route, the proxy's 28,000 ports would last 47 minutes; then every page of the hub "
        "answers 503"
    )
    assert "before 5.1.0" in " ".join(hst.advice(leaking(), ()))


def test_what_tabs_were_answered_is_told_with_them_and_fails_nobody() -> None:
    answers = [*["302"] * 2, "503"]
    events = [Event("tab_websocket", "a", 0.0, 0.0, 0.1, Reason(Kind.TAB, text)) for text in answers]
    found = results_of([*events, Event("tab_poll", "a", 0.0, 0.0, 0.1)], tabs=hst.OpenTabs(1, 1, 0, "after 1,000"))
    assert told(found, "tabs")[:3] == [
        "2 left open: 1 server ended by itself, 1 was stopped",
        "they tried to open 3 websockets, and no more after 1,000: 2 × 302, 1 × 503",
        "they asked 1 time for their kernels: 1 × fine",
    ]
    assert not told(found, "errors") and not hst.people_of({"a": {"tab_websocket": events[0]}}, 0, False).failed


def test_an_undecided_check_meets_only_the_condition_that_asks() -> None:
    undecided = {"proxy_check": {"verdict": "undecided", "leaking": None}}
    assert hst.condition("proxy_check.leaking > 0").judge(undecided, None).held
    for words in ((), ("failed > 0",), ("proxy_check.leaking > 0",)):
        plan = hst.Plan(check_proxy=True, fail_if=tuple(map(hst.condition, words)))
        judged = hst.judgements_of(plan, {"failed": 0} | undecided)
        assert [(one.condition, one.value, one.held) for one in judged if one.held] == (
            [("proxy_check.leaking > 0", None, True)] if "proxy_check.leaking > 0" in words else []
        )


def test_a_run_with_open_tabs_or_a_check_fails_by_default_when_the_proxy_leaks() -> None:
    plan = hst.Plan(leave_open=0.5, check_proxy=True)
    assert [one.text for one in plan.conditions] == ["failed > 0", "aftermath.leaking > 0", "proxy_check.leaking > 0"]
    assert hst.condition("aftermath.leaking > 0").judge({"aftermath": {"leaking": 1}}, None).held
    assert not hst.condition("proxy_check.leaking > 0").judge({"proxy_check": {"leaking": 0}}, None).held
    assert hst.condition("proxy_check.leaking > 0").judge({"proxy_check": None}, None).held
    asked = dataclasses.replace(plan, fail_if=(hst.condition("proxy_check.leaking > 0"),))
    assert [one.text for one in asked.conditions] == ["proxy_check.leaking > 0", "aftermath.leaking > 0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--leave-open 1.5", "expected a share from 0 to 1, like 0.5, not '1.5'"),
        ("--leave-open half", "expected a share from 0 to 1"),
        ("--leave-open 0.5 --tab lab-5", "expected lab-4.2 or lab-4.6, not 'lab-5'"),
        ("--tab lab-4.6", "--tab has a meaning only with --leave-open"),
        ("--settle 5s", "--settle has a meaning only with --leave-open"),
        ("--leave-open 0.5 --keep", "--leave-open lets servers end, and --keep keeps them: give one of them"),
        ("--check-proxy --keep", "--check-proxy lets a server end, and --keep keeps all: give one of them"),
    ],
)
def test_options_that_mean_nothing_are_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused_usage(["stress-test", *words.split()], NOWHERE, capsys)


def test_people_leave_by_themselves_when_some_leave_tabs_open() -> None:
    wanted = [step.name for step in hst.STEPS.values() if step.wanted(hst.Plan(leave_open=0.1)) and step.act]
    order = ["server_ready", "visit", "at_work", "stay", "tab_websocket", "stop_server", "delete_user"]
    assert wanted == order and "tab_websocket" not in hst.PERSONAL


def test_error_pages_that_plain_requests_drew_prove_nothing() -> None:
    rows = seen((9, 20, 0), (15, 30, 10), (30, 30, 10))
    assert hst.leak_at(TEN, rows, [11.0] * 2) and not hst.leak_at(TEN, rows, [11.0] * 3)


def test_a_proof_stands_whatever_comes_later() -> None:
    tabs = hst.Tabs(rows := seen((9, 20, 0), (15, 30, 10), (30, 30, 10)))
    tabs.replies += [dataclasses.replace(CLOSED, answered_s=at_s) for at_s in TEN]
    assert tabs.proven() and tabs.proof == rows[-1] and tabs.lost() == 10
    for _ in range(9):
        tabs.drew(answered(503))
    assert tabs.proven() and tabs.lost() == 1


def test_an_answer_in_two_tls_records_is_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem, key_pem = certificate_for_loopback(tmp_path)
    context, rest = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), threading.Event()
    context.load_cert_chain(pem, key_pem)
    session, wires = hst.HubSession("t"), hst.Wires()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with context.wrap_socket(listener.accept()[0], server_side=True) as client:
                client.recv(4096)
                client.sendall(b"HTTP/1.")
                rest.wait(10)
                client.sendall(b"1 503 Service Unavailable\r\n\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        handshake = hst.Handshake(f"https://127.0.0.1:{listener.getsockname()[1]}/", session, lambda: None)
        wires.add(handshake)
        time.sleep(0.2)  # so that the first part has been read
        assert not handshake.reply
        rest.set()
        answering.join()
    wait_until(lambda: handshake.reply)
    wires.end()
    assert handshake.reply and handshake.reply.status == 503
