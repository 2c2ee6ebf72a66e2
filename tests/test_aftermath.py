"""What a run leaves in the hub and in the processes that were watched: open files, memory, error pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import hub_stress_test as hst
from fault_proxy import Answer, FaultProxy
from hub_stress_test import Change, Snapshot
from localhub import LocalHub
from made_up import results_of, sentences
from tool import run_for_results

FILES, PAGES = ("process_open_fds", ""), ("request_duration_seconds_count", "GET ProxyErrorHandler")


def looks(*figures: dict[tuple[str, str], float]) -> list[Snapshot]:
    return [Snapshot(float(at_s), each) for at_s, each in enumerate(figures)]


GROWN = looks({FILES: 14.0}, {FILES: 120.0, PAGES: 60.0}, {FILES: 114.0, PAGES: 100.0})


@pytest.mark.parametrize(
    ("snapshots", "kept", "changes"),
    [
        (GROWN, False, {"open_files": Change(14, 120, 114, 100), "proxy_error_pages": Change(0, 100, 100, 100)}),
        (GROWN[:1] * 2, True, {"open_files": Change(14, 14, None, None)}),
        (GROWN[:1], False, None),
        ([], False, None),
    ],
)
def test_a_figure_is_told_before_at_its_peak_and_after(
    snapshots: list[Snapshot], kept: bool, changes: dict[str, Change] | None
) -> None:
    assert hst.aftermath_of({"hub": snapshots}, kept) == (changes and {"hub": changes})


@pytest.mark.parametrize(
    ("grown", "pages", "mentioned"),
    [(20.0, 20.0, False), (21.0, 0.0, False), (100.0, 79.0, False), (100.0, 80.0, True)],
)
def test_open_files_are_mentioned_only_where_error_pages_explain_them(
    grown: float, pages: float, mentioned: bool
) -> None:
    files, fetched = Change(10.0, 10.0 + grown, 10.0 + grown, grown), Change(0.0, pages, pages, pages)
    aftermath = {"hub": {"open_files": files, "proxy_error_pages": fetched}, "proxy": {"open_files": files}}
    shown = sentences(results_of(aftermath=aftermath), "aftermath")
    assert [sentence.partition(":")[0] for sentence in shown] == [
        "the hub has 100 open files more than before (10, now 110)"
    ] * mentioned


def test_a_condition_on_the_aftermath_is_judged_by_growth() -> None:
    found = {"aftermath": {"hub": {"open_files": {"before": 1, "peak": 9, "after": 8, "grown": 7}}}}
    for text, met in (("hub.open_files.grown > 6", True), ("hub.open_files.grown > 7", False), ("proxy.x > 7", True)):
        assert hst.condition(f"aftermath.{text}").judge(found, None).held is met  # also if it was not measured


def test_a_watched_process_is_named_without_its_urls_password() -> None:
    plan = hst.Plan(watch=(hst.watched("proxy=http://me:pass@10.0.0.1:8002/metrics"),))
    assert plan.options()["watch"] == ["proxy=http://10.0.0.1:8002/metrics"]


def test_token_and_header_are_not_sent_to_a_watched_process(new_hub: LocalHub, tmp_path: Path) -> None:
    headers: list[Mapping[str, str]] = []
    words = ["stress-test", "-c", "1", "--header", "X-Org: physics", "--watch", "gone=http://127.0.0.1:1/metrics"]
    with FaultProxy("http://127.0.0.1:1") as other:
        other.rule = lambda request: headers.append(request.headers) or Answer(200, b"process_open_fds 7.0\n")
        words += ["--watch", f"other={other.url}/metrics"]
        done, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    assert found["aftermath"]["other"]["open_files"] == {"before": 7.0, "peak": 7.0, "after": 7.0, "grown": 0.0}
    assert headers and not any("Authorization" in each or "X-Org" in each for each in headers)
    before, _, _ = done.stderr.partition("Ctrl-C stops")  # a page that cannot be read is named before the run
    assert done.code == 0 and "WARNING --watch gone=http://127.0.0.1:1/metrics cannot be read: no answer" in before
