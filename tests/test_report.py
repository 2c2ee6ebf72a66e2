"""The report: what it shows; and in a browser: nothing is fetched, nothing complains, every plot is drawn."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from browser import browser, complaints
from hub_stress_test import Event, Kind, Reason, Recorder
from localhub import LocalHub
from tool import results_in, run_for_results, start_tool, wait_until

Found = dict[str, Any]


# ---- Results of runs that never were ----


def visit(
    user: str,
    due_s: float,
    ended_s: float,
    *,
    asked_s: float | None = None,
    reason: Reason | None = None,
    message: str = "",
    left_s: float | None = None,
    lost: Reason | None = None,
) -> Iterator[Event]:
    """What somebody leaves whose server was asked for (throttled until then, if later than due) and became ready.

    Or it failed, for a reason; it was kept up to `left_s`, or was lost.
    """
    throttled_s = None if asked_s is None else due_s + 0.1
    asked_s = due_s if asked_s is None else asked_s
    throttled = {"throttled": int(throttled_s is not None), "throttled_s": throttled_s, "asked_s": asked_s}
    yield Event("start_server", user, due_s, due_s, asked_s + 0.1, **throttled)
    yield Event("server_ready", user, due_s, due_s, ended_s, reason, message=message, **throttled)
    if left_s is not None:
        yield Event("stay", user, ended_s, ended_s, left_s, lost)


def folded(events: Iterable[Event]) -> Recorder:
    record = hst.new_recorder()
    for event in events:
        record.add(event)
    return record


def results(record: Recorder, load_ended_s: float, **more: Any) -> hst.Results:
    """The results of a run of stress-test that left these events."""
    servers = hst.servers_of(record.people, len(record.people), False)
    return hst.Results(
        **{
            "schema": 1,
            "tool": {"name": "hub-stress-test", "version": hst.__version__},
            "command": hst.STRESS,
            "hub": hst.HubSide("http://x/hub/api", "6.1.1", 0, None, None),
            "started": "2026-11-20T16:00:00Z",
            "finished": "2026-11-20T16:00:10Z",
            "duration_s": load_ended_s,
            "options": hst.Plan(count=len(record.people)).options(),
            "users": hst.Users(len(record.people), len(record.people), 0, []),
            "failed": servers.failed + servers.lost,
            "failed_rate": 0.0,
            "servers": servers,
            "people": None,
            "groups": None,
            "operations": record.summarise(),
            "http": hst.Traffic().summarise(),
            "capacity": None,
            "aftermath": None,
            "proxy_check": None,
            "warnings": [],
            "advice": [],
            "timeline": {
                "operations": record.timeline(0.0),
                "servers": hst.servers_timeline(record.people, 0.0),
                "hub": None,
                "watched": {},
                "load_ended_s": load_ended_s,
            },
        }
        | more
    )


def snapshots() -> list[hst.Snapshot]:
    """Two looks at a hub that has served a request and started a server meanwhile."""
    request = {"method": "POST", "handler": "jupyterhub.apihandlers.users.ActivityAPIHandler", "code": "200"}
    return [
        hst.snapshot(
            [
                ("process_cpu_seconds_total", {}, n),
                ("process_resident_memory_bytes", {}, 1e8 + n),
                ("process_start_time_seconds", {}, 1e9),
                ("jupyterhub_event_loop_interval_seconds_bucket", {"le": "0.05"}, 90 * n),
                ("jupyterhub_event_loop_interval_seconds_bucket", {"le": "+Inf"}, 100 * n),
                ("jupyterhub_request_duration_seconds_count", request, n),
                ("jupyterhub_request_duration_seconds_sum", request, n / 100),
                ("jupyterhub_server_spawn_duration_seconds_count", {"status": "success"}, n),
                ("jupyterhub_server_spawn_duration_seconds_sum", {"status": "success"}, n),
            ],
            at_s=5.0 * n,
        )
        for n in range(3)
    ]


LOST = Reason(Kind.LOST, "it became ready, and was gone while it was held")
NO_NODE = Reason(Kind.SPAWN, "no node has 4 GB of memory free")
THREE = [  # one stays, one is lost, one fails
    *visit(hst.username(1), 0.0, 2.0, left_s=10.0),
    *visit(hst.username(2), 0.5, 3.0, asked_s=1.0, left_s=10.0, lost=LOST),
    *visit(hst.username(3), 1.0, 4.0, reason=NO_NODE),
]


def a_failed_run() -> hst.Results:
    """A run with everything that stress-test can say, and a condition that was met."""
    hub = hst.HubSide("http://x/hub/api", "6.1.1", 0, hst.hub_figures(snapshots(), 12.0, 2), None)
    pings = [Event("ping", "", n / 5, n / 5, n / 5 + 0.02) for n in range(50)]
    judged = [hst.Judgement("failed > 0", 2.0, True), hst.Judgement("server_ready.p95 > 30s", 2.5, False)]
    warnings, advice = ["the hub restarted during the run"], ["see the hub's log"]
    more = {"hub": hub, "conditions": judged, "warnings": warnings, "advice": advice, "exit_code": 1}
    return results(folded([*THREE, *pings]), 12.0, **more)


def a_search_for_capacity() -> hst.Results:
    steps = [
        hst.CapacityStep(16.0, 16.0, 0.02, 0, None, False),
        hst.CapacityStep(32.0, 30.1, None, 3, "failed > 0", False),
    ]
    options = hst.Plan(hst.ACTIVITY, find_capacity=True).options()
    record = folded(Event("activity", hst.username(n), n / 16, n / 16, n / 16 + 0.02) for n in range(160))
    more = {"command": hst.ACTIVITY, "options": options, "servers": None}
    return results(record, 20.0, **more, capacity=hst.Capacity(16.0, 4800, False, steps))


# ---- What a page shows, without a browser ----


def plots(page: str) -> list[dict[str, Found]]:
    """The traces of each plot by their names, from the scripts that draw them."""
    decode = json.JSONDecoder().raw_decode
    found = []
    for call in page.split("Plotly.newPlot(document.currentScript.previousElementSibling,")[1:]:
        figure, _ = decode(call)
        found.append({trace["name"]: trace for trace in figure["data"]})
    return found


def spans(trace: Found) -> dict[int, tuple[float, float]]:
    """Where each bar of a waterfall begins and ends, by its row."""
    x, y = trace["x"], trace["y"]
    return {y[at]: (x[at], x[at + 1]) for at in range(0, len(x), 3)}


class Tables(HTMLParser):
    """The rows of each table of a page, each row as its cells' kinds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self._in_heading = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._in_heading = tag == "h2"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(tag)

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def test_a_lost_server_is_ready_until_it_was_found_lost() -> None:
    page = hst.render_report(results(folded(THREE), 12.0))
    stacked, bars = plots(page)[:2]
    assert spans(bars["asked"]) == {1: (0.0, 0.0), 2: (0.5, 0.6), 3: (1.0, 1.0)}
    assert spans(bars["throttled"]) == {2: (0.6, 1.0)}
    assert spans(bars["starting"]) == {1: (0.0, 2.0), 2: (1.0, 3.0), 3: (1.0, 4.0)}
    assert spans(bars["ready"]) == {1: (2.0, 12.0), 2: (3.0, 10.0)}
    assert spans(bars["lost"]) == {2: (10.0, 12.0)}
    assert spans(bars["failed"]) == {3: (4.0, 12.0)}

    def at(moment_s: float) -> dict[str, int]:
        curves = stacked.values()
        return {one["name"]: one["y"][one["x"].index(moment_s)] for one in curves}

    assert at(0.8) == {"waiting": 1, "starting": 1, "ready": 0, "failed": 0, "lost": 0}
    assert at(5.0) == {"waiting": 0, "starting": 0, "ready": 2, "failed": 1, "lost": 0}
    assert at(11.0) == {"waiting": 0, "starting": 0, "ready": 1, "failed": 1, "lost": 1}


def test_the_phases_of_a_start_on_kubernetes_follow_one_another_from_when_it_was_asked_for() -> None:
    phases = hst.Phases(
        silent_s=1.0,
        node_s=20.0,
        volumes_s=0.0,
        image_s=10.0,
        container_s=1.0,
        server_s=2.0,
        new_node=1,
        images_pulled=1,
    )
    first, second = visit(hst.username(1), 0.0, 36.0, asked_s=2.0), visit(hst.username(2), 0.5, 3.0)
    events = [dataclasses.replace(one, phases=phases) if one.step == "server_ready" else one for one in first]
    bars = plots(hst.render_report(results(folded([*events, *second]), 40.0)))[1]
    lasting = {name: title for name, title in hst.PHASES.items() if getattr(phases, name)}
    at_s = 2.0
    for name, title in lasting.items():
        assert spans(bars[title]) == {1: (at_s, at_s + getattr(phases, name))}
        at_s += getattr(phases, name)
    assert at_s == 36.0 and hst.PHASES["volumes_s"] not in bars
    order = list(bars)
    assert order.index("starting") < order.index(hst.PHASES["silent_s"]) < order.index("ready")
    assert len({bars[title]["line"]["color"] for title in lasting.values()}) == len(lasting)


def test_a_report_says_first_what_was_tested_and_explains_only_the_words_that_it_uses() -> None:
    page = hst.render_report(a_failed_run())
    tested = page.partition("<h1>")[0]
    for part in (
        "3 people",
        "10 at a time",
        "who started a server and stayed, on",
        "6.1.1 at http://x/hub/api",
        hst.__version__,
    ):
        assert part in tested
    legend = page.partition("<h2>Words</h2>")[2].partition("</table>")[0]
    words = re.findall('<tr><td class="?left"?>(.*?)</td>', legend)
    assert words == ["throttled", "lost", "server ready", "start request", "stay", "ping", "p95"]


def test_a_run_in_which_no_server_was_lost_does_not_speak_of_lost_ones() -> None:
    page = hst.render_report(results(folded(visit(hst.username(1), 0.0, 2.0, left_s=10.0)), 12.0))
    stacked, bars = plots(page)[:2]
    assert "ready" in stacked.keys() & bars.keys() and "lost" not in stacked.keys() | bars.keys()


@pytest.mark.parametrize("run", [a_failed_run, a_search_for_capacity], ids=["stress", "capacity"])
def test_every_row_of_a_table_has_as_many_cells_as_its_header(run: Any) -> None:
    page = Tables(hst.render_report(run(), hst.as_json(run())))
    ends = ["Against the baseline", "Words", "Details", "Options and versions"]
    expected = {
        a_failed_run: ["Summary", "Latency", *ends[:3], "The hub's own clock", ends[3]],
        a_search_for_capacity: ["Summary", "Capacity", "Latency", *ends],
    }[run]
    assert [heading for heading in page.headings if heading in expected] == expected
    assert len(page.tables) == len(expected)
    for heading, (header, *rows) in zip(expected, page.tables):
        assert header and rows, heading
        assert (set(header) == {"th"}) == (heading not in ("Summary", "Words", "Details", "Options and versions"))
        assert [len(row) for row in rows] == [len(header)] * len(rows), heading
        assert all(set(row) == {"td"} for row in rows), heading


@pytest.mark.parametrize(
    ("run", "drawn"),
    [
        (a_failed_run, ["server ready p50", "server ready p95", "server ready failed"]),
        (a_search_for_capacity, ["activity report p50", "activity report p95"]),
    ],
)
def test_latency_over_time_is_drawn_of_what_people_felt(run: Any, drawn: list[str]) -> None:
    assert list(plots(hst.render_report(run()))[-1]) == drawn


def test_what_a_hub_says_cannot_break_out_of_the_page() -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    said = {"reason": Reason(Kind.SPAWN, bad), "message": bad}
    record = folded([*visit(bad, 1.0, 2.0, **said), *visit(hst.username(1), 1.0, 2.0, message=bad)])
    hub = hst.HubSide("http://x/hub/api", bad, 0, None, bad)
    page = hst.render_report(results(record, 10.0, hub=hub, warnings=[bad]))
    assert bad not in page and "<img src=x" not in page and page.count("</script>") == 1 + len(plots(page))
    assert html.escape(bad) in page  # it is said, nevertheless


# ---- In a browser ----


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Found]]:
    """The report and the results of a run with throttled servers, three that failed and one that was lost."""
    folder = tmp_path_factory.mktemp("report")
    old, new, report = (folder / name for name in ("old.json", "new.json", "report.html"))
    options = {"spawn_s": 0.8, "slow_spawn_timeout_s": 0, "concurrent_spawn_limit": 6, "fail_rate": 0.1}
    words = ("stress-test", "-c", "30", "-b", "10", "--fail-if", "server_ready.p95 > 1ms", "--fail-if", "failed > 9")
    with LocalHub(**options) as hub:
        run_for_results(old, *words, hub=hub)
        more = ("--hold", "4s", "--baseline", str(old), "--results", str(new), "--report", str(report))
        with start_tool(*words, *more, hub=hub) as run:
            wait_until(lambda: len(ready_on(hub)) == 27)
            hub.call("DELETE", f"/users/{ready_on(hub)[0]}/server")
            done = run.outcome()
    found = results_in(new, done)
    servers = found["servers"]
    assert (done.code, servers["ready"], servers["failed"], servers["lost"]) == (1, 27, 3, 1)
    assert servers["throttled"]
    yield report, found


def ready_on(hub: LocalHub) -> list[str]:
    """The users whose servers the hub calls ready."""
    return [name for name, user in hub.users().items() if user["servers"] and user["servers"][""]["ready"]]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, False), (1280, True)])
def test_a_report_opens_without_a_complaint_and_draws_every_plot(
    width: int, dark: bool, reported: tuple[Path, Found]
) -> None:
    path, _ = reported
    with browser(width, dark=dark) as page:
        page.get(path.as_uri())
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


def brightness(colour: str) -> int:
    """The sum of red, green and blue."""
    return sum(int(part) for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.browser
def test_the_plots_show_what_the_results_say(reported: tuple[Path, Found]) -> None:
    path, found = reported
    with browser() as page:
        page.get(path.as_uri())
        shown = page.execute_script(
            "return [...document.querySelectorAll('.plot')].map(p => p.data.map(t => "
            "({name: t.name, points: t.x.filter(x => x !== null).length, top: Math.max(...t.y)})))"
        )
        text = page.find_element("tag name", "body").text
    stacked, bars, watched = ({trace["name"]: trace for trace in plot} for plot in shown[:3])
    assert [stacked[name]["top"] for name in ("ready", "failed", "lost")] == [27, 3, 1]
    drawn = {name: bar["points"] / 2 for name, bar in bars.items()}  # a beginning and an end each
    assert (drawn["ready"], drawn["failed"], drawn["lost"]) == (27, 3, 1)
    assert drawn["throttled"] == found["servers"]["throttled"] > 0
    assert watched.keys() == {"ping p50", "ping max", "hub's CPU"}
    assert [trace["name"] for trace in shown[-1]] == ["server ready p50", "server ready p95", "server ready failed"]
    tested, _, text = text.partition("\n")
    assert tested.startswith("Tested: 30 people (10 at a time) who started a server")
    assert text.lstrip().startswith("FAILED 27 of 30 servers became ready; 1 was lost while held; half waited ")
    for said in (
        "3 × no node has 4 GB of memory free (hub-stress-test-",
        "1 × it became ready, and was gone while it was held (hub-stress-test-",
        "✗ server_ready.p95 ",
        "✓ failed 4 (fails above 9)",
        "Against the baseline",
    ):
        assert said in text
    assert "POST UserServerAPIHandler" in path.read_text(encoding="utf-8")  # among the details, which are folded


@pytest.mark.browser
def test_a_report_of_3000_servers_is_small_and_opens(tmp_path: Path) -> None:
    record = hst.new_recorder()
    for n in range(3000):
        user, due_s = hst.username(n), n / 20
        for event in visit(user, due_s, due_s + 3.3, asked_s=due_s + 2, left_s=160.0):
            record.add(event)
        for step in ("stop_server", "delete_user", "ping"):
            record.add(Event(step, user, due_s, due_s, due_s + 0.1))
    path = tmp_path / "report.html"
    path.write_text(hst.render_report(results(record, 160.0)))
    assert path.stat().st_size < 10_000_000
    with browser() as page:
        page.get(path.as_uri())
        assert complaints(page) == []
        assert page.execute_script("return document.querySelectorAll('.plot .scatterlayer').length") == 4
