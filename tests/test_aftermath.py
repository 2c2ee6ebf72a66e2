"""What a run leaves in the hub and in the processes that were watched: open files, memory, error pages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import hub_stress_test as hst
from hub_stress_test import Change, Snapshot
from localhub import LocalHub
from test_summary import results_of, told
from tool import run_for_results, run_tool, tool_users

FILES, PAGES = ("process_open_fds", ""), ("request_duration_seconds_count", "GET ProxyErrorHandler")


def looks(*figures: dict[tuple[str, str], float]) -> list[Snapshot]:
    return [Snapshot(float(at_s), each) for at_s, each in enumerate(figures)]


def test_a_figure_is_told_before_at_its_most_and_after_and_by_how_much_it_has_grown() -> None:
    seen = {"hub": looks({FILES: 14.0}, {FILES: 120.0, PAGES: 60.0}, {FILES: 114.0, PAGES: 100.0})}
    found = hst.aftermath_of(seen, kept=False)
    assert found == {
        "hub": {"open_files": Change(14.0, 120.0, 114.0, 100.0), "proxy_error_pages": Change(0.0, 100.0, 100.0, 100.0)}
    }


def test_after_a_run_that_keeps_its_users_nothing_is_said_of_what_is_left() -> None:
    found = hst.aftermath_of({"hub": looks({FILES: 14.0}, {FILES: 50.0})}, kept=True)
    assert found == {"hub": {"open_files": Change(14.0, 50.0, None, None)}}


@pytest.mark.parametrize("seen", [{}, {"hub": []}, {"hub": looks({FILES: 1.0})}])
def test_without_two_looks_there_is_no_aftermath(seen: dict[str, list[Snapshot]]) -> None:
    assert hst.aftermath_of(seen, kept=False) is None


@pytest.mark.parametrize(
    ("grown", "pages", "mentioned"),
    [(20.0, 20.0, False), (21.0, 0.0, False), (100.0, 79.0, False), (100.0, 80.0, True)],
)
def test_open_files_are_mentioned_only_where_error_pages_explain_them(
    grown: float, pages: float, mentioned: bool
) -> None:
    files, drawn = Change(10.0, 10.0 + grown, 10.0 + grown, grown), Change(0.0, pages, pages, pages)
    aftermath = {"hub": {"open_files": files, "proxy_error_pages": drawn}, "proxy": {"open_files": files}}
    explained = (
        "the hub has 100 open files more than before (10, now 110): its proxy fetched as many error "
        "pages, and keeps these connections open"
    )
    assert told(results_of([], aftermath=aftermath), "aftermath") == [explained] * mentioned


def test_a_condition_on_the_aftermath_is_judged_by_what_has_grown() -> None:
    found = {"aftermath": {"hub": {"open_files": {"before": 1, "peak": 9, "after": 8, "grown": 7}}}}
    assert hst.condition("aftermath.hub.open_files.grown > 6").judge(found, None).held
    assert not hst.condition("aftermath.hub.open_files.grown > 7").judge(found, None).held
    unread = hst.condition("aftermath.proxy.open_files.grown > 7").judge(found, None)
    assert unread.held and unread.value is None  # what was not measured has not passed


@pytest.fixture
def hub_behind_proxy() -> Iterator[LocalHub]:
    with LocalHub(real_proxy=True, stub_labs=True) as hub:  # whose servers are no part of the hub
        yield hub


def test_an_ordinary_run_through_a_real_proxy_leaves_next_to_nothing(
    hub_behind_proxy: LocalHub, tmp_path: Path
) -> None:
    hub = hub_behind_proxy
    watch = f"proxy=http://127.0.0.1:{hub.proxy.metrics_port}/metrics"
    words = ["stress-test", "-c", "12", "-b", "6", "--watch", watch, "--fail-if", "aftermath.hub.open_files.grown > 50"]
    done, found = run_for_results(tmp_path / "r", *words, hub=hub)
    assert done.code == 0, done
    after = found["aftermath"]
    assert after.keys() == {"hub", "proxy"} and not tool_users(hub)
    assert {"open_files", "rss_bytes", "proxy_error_pages"} <= after["hub"].keys()
    assert {"open_files", "rss_bytes", "active_handles"} <= after["proxy"].keys()
    files = after["hub"]["open_files"]
    assert files["peak"] >= files["before"] and files["grown"] == files["after"] - files["before"] <= 50
    assert after["hub"]["proxy_error_pages"]["grown"] == 0
    assert "aftermath" not in done.summary.replace("aftermath.hub.open_files.grown", "")


def test_a_process_that_is_watched_is_named_without_the_password_in_its_url() -> None:
    plan = hst.Plan(watch=(hst.watched("proxy=http://me:pass@10.0.0.1:8002/metrics"),))
    assert plan.options()["watch"] == ["proxy=http://10.0.0.1:8002/metrics"]


@contextlib.contextmanager
def other_process() -> Iterator[tuple[str, list[Message]]]:
    """The URL of a page of figures, and the headers of all requests for it."""
    heard: list[Message] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"process_open_fds 7.0\n")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_port}/metrics", heard
        other.shutdown()


def test_the_token_is_not_sent_to_a_process_that_is_watched(hub: LocalHub, tmp_path: Path) -> None:
    with other_process() as (url, heard):
        words = ["stress-test", "-c", "1", "--watch", f"other={url}"]
        _, found = run_for_results(tmp_path / "r", *words, hub=hub)
    assert found["aftermath"]["other"]["open_files"] == {"before": 7.0, "peak": 7.0, "after": 7.0, "grown": 0.0}
    assert heard and not any("authorization" in each or hub.token in str(each) for each in heard)


def test_headers_of_ones_own_go_wherever_the_token_goes() -> None:
    session = hst.get_session("mine", headers=[("X-Org", "physics")])
    with other_process() as (url, heard):
        for other in (session.clone(), session.clone(own_stop=True), session.clone(token="theirs")):
            assert other.ask("GET", url).status == 200
        hst.Monitor(url, session, is_hub=False).look()
    seen = [(each["Authorization"], each["X-Org"]) for each in heard]
    assert seen == [("token mine", "physics")] * 2 + [("token theirs", "physics"), (None, None)]


def test_a_page_to_watch_that_cannot_be_read_is_named_before_the_run(new_hub: LocalHub) -> None:
    words = ("stress-test", "-c", "1", "--watch", "gone=http://127.0.0.1:1/metrics")
    done = run_tool(*words, hub=new_hub)
    before, _, _ = done.stderr.partition("Ctrl-C stops")
    assert done.code == 0 and "WARNING --watch gone=http://127.0.0.1:1/metrics cannot be read: no answer" in before
