"""The report in a real browser: nothing is fetched, nothing complains, every plot is drawn, also on narrow screens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser, complaints
from conftest import run_tool
from localhub import LocalHub

import hub_stress_test as hst


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The report of a run in which servers were throttled and failed, beside a baseline; and its results."""
    folder = tmp_path_factory.mktemp("report")
    options = {"spawn_s": 0.8, "slow_spawn_timeout_s": 0, "concurrent_spawn_limit": 6, "fail_rate": 0.1}
    with LocalHub(**options) as hub:
        words = ("stress-test", "-c", "30", "-b", "10", "--fail-if", "server_ready.p95 > 1ms")
        run_tool(*words, "--results", str(folder / "old.json"), hub=hub)
        more = ("--baseline", str(folder / "old.json"), "--results", str(folder / "new.json"))
        done = run_tool(*words, *more, "--report", str(folder / "report.html"), hub=hub)
    assert done.code == 1
    yield folder / "report.html", json.loads((folder / "new.json").read_text())


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (1280, True)])
def test_a_report_opens_without_a_complaint_and_draws_every_plot(
    width: int, dark: bool, reported: tuple[Path, dict[str, Any]]
) -> None:
    path, found = reported
    with browser(width, dark=dark) as page:
        page.get(path.as_uri())
        assert complaints(page) == []
        assert page.execute_script("return performance.getEntriesByType('resource').length") == 0  # nothing fetched
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        plots = page.execute_script(
            "return [...document.querySelectorAll('.plot')].map(p => ({traces: p._fullData.length, "
            "drawn: p.querySelectorAll('.scatterlayer .trace').length, width: p.getBoundingClientRect().width}))"
        )
        # two of servers, one of pings, and two for each operation of which there is enough
        enough = sum(sum(one["often"]) >= hst.ENOUGH_TO_PLOT for one in found["timeline"]["operations"].values())
        assert len(plots) == 3 + 2 * enough
        for plot in plots:
            assert plot["drawn"] == plot["traces"] > 0
            assert 250 < plot["width"] <= width
        ink, paper = page.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        assert (brightness(ink) > brightness(paper)) is dark
        labels = page.execute_script("return getComputedStyle(document.querySelector('.xtick text')).fill")
        assert abs(brightness(labels) - brightness(paper)) > 250


def brightness(colour: str) -> int:
    """The sum of red, green and blue."""
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.browser
def test_the_plots_show_what_the_results_say(reported: tuple[Path, dict[str, Any]]) -> None:
    path, found = reported
    with browser() as page:
        page.get(path.as_uri())
        shown = page.execute_script(
            "return [...document.querySelectorAll('.plot')].map(p => p.data.map(t => "
            "({name: t.name, points: t.x.filter(x => x !== null).length, top: Math.max(...t.y)})))"
        )
        text = page.find_element("tag name", "body").text
    stacked, bars, watched = ({trace["name"]: trace for trace in plot} for plot in shown[:3])
    assert (stacked["ready"]["top"], stacked["failed"]["top"]) == (27, 3)
    assert bars["ready"]["points"] == 2 * 27 and bars["failed"]["points"] == 2 * 3  # a beginning and an end each
    assert bars["throttled"]["points"] == 2 * found["servers"]["throttled"] > 0
    assert watched.keys() == {"ping p50", "ping max", "hub's CPU"}
    assert any(trace["name"] == "baseline p95" for plot in shown for trace in plot)
    assert text.startswith("FAILED 27 of 30 servers became ready")
    for said in (
        "no node has 4 GB of memory free",
        "server_ready.p95 > 1ms",
        "Against the baseline",
        "POST UserServer",
    ):
        assert said in text


@pytest.mark.browser
def test_a_report_of_3000_servers_is_small_and_opens(tmp_path: Path) -> None:
    names = [hst.username(n) for n in range(3000)]
    moments = [
        {"due_s": n / 20, "throttled_s": n / 20 + 0.1, "asked_s": n / 20 + 2, "ended_s": n / 20 + 3.3}
        for n in range(3000)
    ]
    starts = {name: hst.ServerStart(name, 3.3, 1, **moment) for name, moment in zip(names, moments)}
    path = tmp_path / "report.html"
    path.write_text(hst.render_report(_results(starts)))
    assert path.stat().st_size < 10_000_000
    with browser() as page:
        page.get(path.as_uri())
        assert complaints(page) == []
        assert page.execute_script("return document.querySelectorAll('.plot .scatterlayer').length") == 3 + 2 * 5


def _results(starts: dict[str, hst.ServerStart]) -> dict[str, Any]:
    """The results of a run whose servers started so."""
    metrics = hst.Metrics()
    for start in starts.values():
        for operation in ("server_ready", "start_server", "stop_server", "delete_user", "ping"):
            metrics.add(hst.Sample(operation, start.user, start.due_s, start.due_s, start.ended_s))
    return _SKELETON | {
        "servers": hst._server_results(len(starts), starts, False),
        "operations": metrics.summarise(),
        "timeline": {
            "operations": metrics.timeline(0.0),
            "servers": hst._server_timeline(starts, 0.0),
            "hub": None,
            "load_ended_s": 160.0,
        },
    }


def test_what_a_hub_says_cannot_break_out_of_the_page() -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    start = hst.ServerStart("hub-stress-test-1", None, reason=bad, message=bad, due_s=1.0, asked_s=1.0, ended_s=2.0)
    page = hst.render_report(_results({bad: start, start.user: start}))
    assert bad not in page and "<img src=x" not in page and page.count("</script>") == 2


_SKELETON: dict[str, Any] = {
    "schema": 1,
    "tool": {"name": "hub-stress-test", "version": "0"},
    "command": "stress-test",
    "hub": {
        "endpoint": "http://x/hub/api",
        "version": "6.1.1",
        "restarts": 0,
        "metrics": None,
        "metrics_missing": None,
    },
    "started": "2026-11-20T16:00:00Z",
    "finished": "2026-11-20T16:00:10Z",
    "duration_s": 10.0,
    "options": {"dry_run": False, "run": None, "batch_size": 10},
    "users": {"created": 1, "deleted": 1, "kept": 0, "left_behind": []},
    "failed": 0,
    "failed_rate": 0.0,
    "http": {
        "requests": 1,
        "retries": 0,
        "throttled": 0,
        "statuses": {},
        "observer_requests": 0,
        "observer_share": 0.0,
    },
    "capacity": None,
    "conditions": [{"condition": "failed > 0", "value": 0, "held": False}],
    "warnings": [],
    "exit_code": 0,
}
