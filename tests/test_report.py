"""The report: what it shows; and in a browser: nothing is fetched, nothing complains, every plot is drawn."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from browser import browser, complaints
from hub_stress_test import Event
from made_up import LOST, NO_NODE, did, hub_with, pings, results_of

Found = dict[str, Any]


def way(
    number: int, due_s: float, ended_s: float, asked_s: float | None = None, left_s: float | None = None, **more: Any
) -> Iterator[Event]:
    """A start, throttled until it was asked for again, if it was; its server was held up to `left_s`, if it was."""
    again = {} if asked_s is None else {"throttled": 1, "throttled_s": due_s + 0.1}
    again |= {"asked_s": due_s if asked_s is None else asked_s}
    lost = more.pop("lost", None)
    yield did("start_server", number, again["asked_s"] + 0.1, due_s=due_s, **again)
    yield did("server_ready", number, ended_s, due_s=due_s, **again, **more)
    if left_s is not None:
        yield did("stay", number, left_s, lost, due_s=ended_s)


THREE = [  # one stays, one is lost, one fails
    *way(1, 0.0, 2.0, left_s=10.0, group="staff"),
    *way(2, 0.5, 3.0, asked_s=1.0, left_s=10.0, lost=LOST, group="students"),
    *way(3, 1.0, 4.0, reason=NO_NODE, group="students"),
]


def failed_run(events: list[Event] = THREE, load_s: float = 12.0) -> hst.Results:
    """A run with everything that stress-test can say, and a condition that was met."""
    goals = [hst.Judgement("failed > 0", 2.0, True), hst.Judgement("server_ready.p95 > 30s", 2.5, False)]
    took = {"success": hst.OwnDurations(2, 1.0)}
    results = results_of([*events, *pings(*[0.02] * 10)], load_s=load_s, conditions=goals, hub=hub_with(spawns=took))
    shots = [hst.Snapshot(5.0 * n, {(hst.CPU, ""): n, (hst.MEMORY, ""): 1e8}) for n in range(3)]
    table, once = hst.process_timeline(shots, 0.0), hst.process_timeline(shots[:1], 0.0)
    results.timeline.update({"hub": table, "watched": {"proxy": table, "gone": once}})
    return results


def search_for_capacity() -> hst.Results:
    steps = [
        hst.CapacityStep(16.0, 16.0, 0.02, 0, None, False),
        hst.CapacityStep(32.0, 30.1, None, 3, "failed > 0", False),
    ]
    options = hst.Plan(hst.ACTIVITY, find_capacity=True).options()
    events = [did("activity", n, n / 16 + 0.02, due_s=n / 16) for n in range(160)]
    more: Found = {"command": hst.ACTIVITY, "options": options, "servers": None}
    return results_of(events, load_s=20.0, **more, capacity=hst.Capacity(16.0, 4800, False, steps))


# ==== Without a browser ==============================================================================================


def plots(page: str) -> list[dict[str, Found]]:
    """The traces of each plot by their names, from the scripts that draw them."""
    calls = page.split("Plotly.newPlot(document.currentScript.previousElementSibling,")[1:]
    figures = [json.JSONDecoder().raw_decode(call)[0] for call in calls]
    return [{trace["name"]: trace for trace in figure["data"]} for figure in figures]


def spans(trace: Found) -> dict[int, tuple[float, float]]:
    """Where each bar of a waterfall begins and ends, by its row."""
    x, y = trace["x"], trace["y"]
    return {y[at]: (x[at], x[at + 1]) for at in range(0, len(x), 3)}


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows of each table of a page, each row as its cells' kinds, below the table's heading."""
    sections = (section.partition("</h2>") for section in html.unescape(page).split("<h2>")[1:])
    found = {heading: rest.split("<tr>")[1:] for heading, _, rest in sections if "<table" in rest}
    return {heading: [re.findall("<(t[dh])", row) for row in rows] for heading, rows in found.items()}


def test_the_waterfall_shows_each_state_of_each_server() -> None:
    stacked, bars = plots(hst.render_report(failed_run()))[:2]
    assert spans(bars["requested"]) == {2: (0.5, 0.6)}
    assert spans(bars["throttled"]) == {2: (0.6, 1.0)}
    assert spans(bars["starting"]) == {1: (0.0, 2.0), 2: (1.0, 3.0), 3: (1.0, 4.0)}
    assert spans(bars["ready"]) == {1: (2.0, 12.0), 2: (3.0, 10.0)}
    assert spans(bars["lost"]) == {2: (10.0, 12.0)} and spans(bars["failed"]) == {3: (4.0, 12.0)}
    assert spans(bars["[staff]"]).keys() == {1} and spans(bars["[students]"]).keys() == {2, 3}
    assert max(filter(None, bars["[staff]"]["x"])) < 0 and bars["[staff]"]["line"] != bars["[students]"]["line"]
    for moment_s, counts in ((0.8, [0, 0, 0, 1, 1]), (5.0, [1, 0, 2, 0, 0]), (11.0, [1, 1, 1, 0, 0])):
        at = [stacked[name]["y"][stacked[name]["x"].index(moment_s)] for name in stacked]
        assert dict(zip(stacked, at)) == dict(zip(("failed", "lost", "ready", "starting", "waiting"), counts))
    stacked, bars = plots(hst.render_report(results_of(way(1, 0.0, 2.0, left_s=10.0))))[:2]
    assert bars.keys() == {"starting", "ready"} and "lost" not in stacked


def test_the_phases_of_a_start_on_kubernetes_follow_one_another() -> None:
    phases = hst.Phases(1.0, 20.0, 0.0, 10.0, 1.0, 2.0, 1, 1)
    events = [*way(1, 0.0, 36.0, asked_s=2.0, phases=phases), *way(2, 0.5, 3.0)]
    bars = plots(hst.render_report(results_of(events, load_s=40.0)))[1]
    at_s, colours = 2.0, set()
    for name, title in hst.PHASES.items():
        if took_s := getattr(phases, name):
            assert spans(bars[title]) == {1: (at_s, at_s + took_s)}
            at_s += took_s
            colours.add(bars[title]["line"]["color"])
    assert at_s == 36.0 and len(colours) == 5 and hst.PHASES["volumes_s"] not in bars
    order = list(bars)
    assert order.index("starting") < order.index(hst.PHASES["silent_s"]) < order.index("ready")


def test_a_report_says_what_was_tested_and_explains_words() -> None:
    page = hst.render_report(failed_run())
    tested = page.partition("<h1>")[0]
    for part in ("3 people", "10 at a time", "who started a server and stayed, on", "6.1.1 at http://x/hub/api"):
        assert part in tested
    legend = page.partition("<h2>Words</h2>")[2].partition("</table>")[0]
    words = re.findall('<tr><td class="?left"?>(.*?)</td>', legend)
    assert words == ["server ready", "start request", "stay", "ping", "count", "throttled", "lost", "p50", "p95"]


ENDS = ["Against the baseline", "Words", "Details", "Options"]


@pytest.mark.parametrize(
    ("results", "headings", "drawn"),
    [
        (failed_run(), ["Summary", "Latency", *ENDS[:3], "The hub's own clock", ENDS[3]], "server ready"),
        (search_for_capacity(), ["Summary", "Capacity", "Latency", *ENDS], "activity report"),
    ],
)
def test_a_report_has_its_tables_whole_and_its_last_plot(results: hst.Results, headings: list[str], drawn: str) -> None:
    page = hst.render_report(results, hst.as_json(results))
    found = tables(page)
    assert list(found) == headings
    for heading, (header, *rows) in found.items():
        assert (set(header) == {"th"}) == (heading not in ("Summary", "Words", "Details", "Options"))
        assert rows and all(set(row) == {"td"} and len(row) == len(header) for row in rows), heading
    *others, last = plots(page)
    assert list(last)[:2] == [f"{drawn} p50", f"{drawn} p95"]
    if results.servers:
        assert list(others[-1]) == ["ping p50", "ping max", "hub's CPU", "CPU of proxy"]


def test_what_a_hub_says_cannot_break_out_of_the_page() -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    events = [*way(1, 1.0, 2.0, reason=hst.Reason(hst.Kind.SPAWN, bad), message=bad), *way(2, 1.0, 2.0, message=bad)]
    hub = hst.HubSide("http://x/hub/api", bad, 0, None, bad)
    page = hst.render_report(results_of([*events, did(bad, 1, 1.5, group=bad)], hub=hub, warnings=[bad]))
    assert bad not in page and "<img src=x" not in page and page.count("</script>") == 1 + len(plots(page))
    assert html.escape(bad) in page


# ==== In a browser ===================================================================================================


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with 30 servers, of which 5 were throttled, 3 failed, and 1 was lost."""
    events = [event for n in range(1, 22) for event in way(n, n / 2, n / 2 + 2, left_s=30.0)]
    events += [event for n in range(22, 27) for event in way(n, n / 2, n / 2 + 4, asked_s=n / 2 + 2, left_s=30.0)]
    events += [*way(27, 13.5, 15.5, left_s=25.0, lost=LOST)]
    events += [event for n in range(28, 31) for event in way(n, n / 2, n / 2 + 2, reason=NO_NODE)]
    results = failed_run(events, 30.0)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(hst.render_report(results, hst.as_json(results)))
    return path


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (1280, True)])
def test_a_report_opens_without_a_complaint_and_draws_every_plot(width: int, dark: bool, reported: Path) -> None:
    with browser(width, dark=dark) as page:
        page.get(reported.as_uri())
        assert complaints(page) == []
        assert page.execute_script("return performance.getEntriesByType('resource').length") == 0  # nothing fetched
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        height = page.execute_script("return document.documentElement.scrollHeight")
        assert width < 1000 or height <= 2800  # with failures and a baseline; else at most 2,500
        shown = page.execute_script(
            "return [...document.querySelectorAll('.plot')].map(p => ({traces: p._fullData.length, "
            "drawn: p.querySelectorAll('.scatterlayer .trace').length, width: p.getBoundingClientRect().width}))"
        )
        assert len(shown) == 4  # two of servers, one of pings, one of what people felt
        for plot in shown:
            assert plot["drawn"] == plot["traces"] > 0
            assert 250 < plot["width"] <= width
        ink, paper = page.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        assert (brightness(ink) > brightness(paper)) is dark
        labels = page.execute_script("return getComputedStyle(document.querySelector('.xtick text')).fill")
        assert abs(brightness(labels) - brightness(paper)) > 250
        cells = page.execute_script(
            "return [...document.querySelectorAll('table')].map(t => [...t.rows].map(r => r.cells.length))"
        )
        assert cells and all(len(set(rows)) == 1 for rows in cells)
        stacked, bars = page.execute_script(
            "return [...document.querySelectorAll('.plot')].slice(0, 2).map(p => Object.fromEntries(p.data.map(t => "
            "[t.name, {bars: t.x.filter(x => x !== null).length / 2, top: Math.max(...t.y)}])))"
        )
        assert [stacked[name]["top"] for name in ("ready", "failed", "lost")] == [27, 3, 1]
        assert [bars[name]["bars"] for name in ("ready", "failed", "lost", "throttled")] == [27, 3, 1, 5]


def brightness(colour: str) -> int:
    """The sum of red, green and blue."""
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.browser
def test_a_report_of_3000_servers_is_small_and_opens(tmp_path: Path) -> None:
    events = [event for n in range(3000) for event in way(n, n / 20, n / 20 + 3.3, asked_s=n / 20 + 2, left_s=160.0)]
    events += [did(step, n, n / 20 + 0.1, due_s=n / 20) for n in range(3000) for step in ("delete_user", "ping")]
    path = tmp_path / "report.html"
    path.write_text(hst.render_report(results_of(events, load_s=160.0)))
    assert path.stat().st_size < 10_000_000
    with browser() as page:
        page.get(path.as_uri())
        assert complaints(page) == []
        assert page.execute_script("return document.querySelectorAll('.plot .scatterlayer').length") == 4
