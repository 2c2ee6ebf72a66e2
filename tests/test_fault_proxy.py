"""The fault proxy against a small upstream that counts what reaches it: tests on the real clock, bounds only."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from fault_proxy import (
    Answer,
    AnswerAfter,
    Delay,
    Fault,
    FaultProxy,
    HalfBody,
    Request,
    ResetAfter,
    ResetBefore,
    ResetStream,
    Silence,
    every,
    first,
    matching,
    share,
)

SOON_S = 5.0
ANY = matching(None, "")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class Upstream(ThreadingHTTPServer):
    """Counts hits by method and path; its streams wait for `go` and set `left` when their reader has gone."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UpstreamHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.hits: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.go = threading.Event()
        self.left = threading.Event()

    def handle_error(self, *args: Any) -> None:
        """Nothing: a reader that leaves is part of these tests."""


class UpstreamHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *args: Any) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return "Thu, 01 Jan 1970 00:00:00 GMT"

    def act(self) -> None:
        path = self.requestline.split()[1]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.hits[f"{self.command} {path}"] += 1
        {"/stream": self.stream, "/endless": self.endless, "/short": self.short, "/unframed": self.unframed}.get(
            path, lambda: self.echo(body)
        )()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = act

    def head(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status, "As It Is")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def echo(self, body: bytes) -> None:
        answer = b"%s %s %s %s" % (
            self.command.encode(),
            self.path.encode(),
            self.headers.get("Authorization", "-").encode(),
            body,
        )
        cookies = [("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("Location", "/elsewhere")]
        self.head(302 if "redirect" in self.path else 201, ("Content-Length", str(len(answer))), *cookies)
        if self.command != "HEAD":
            self.wfile.write(answer)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def stream(self) -> None:
        self.head(200, ("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"))
        self.chunk(b"data: 1\n\n")
        self.server.go.wait(SOON_S)
        self.chunk(b"data: 2\n\n")
        self.chunk(b"")

    def endless(self) -> None:
        self.head(200, ("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"))
        self.chunk(b"data: 1\n\n")
        if self.connection.recv(1) == b"":
            self.server.left.set()
        self.close_connection = True

    def short(self) -> None:
        self.head(200, ("Content-Length", "100"))
        self.wfile.write(b"x" * 10)
        self.close_connection = True

    def unframed(self) -> None:
        self.head(200)
        self.wfile.write(b"until the end")
        self.close_connection = True


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.go.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy(upstream.url) as proxy:
        yield proxy


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def until(condition: Any) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def outcome(url: str, within_s: float = SOON_S) -> str:
    """What a client that allows so much time meets: a status, or the name of the error."""
    try:
        with requests.get(url, timeout=within_s) as response:
            return str(response.status_code)
    except requests.RequestException as error:
        return type(error).__name__


# ---- Passing through -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["/users/a%20b?state=ready&x=%2F", "/redirect"])
def test_an_answer_through_the_proxy_equals_the_direct_one(
    method: str, path: str, upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    def ask(base: str) -> tuple[Any, ...]:
        answer = session.request(
            method, base + path, data=b"body\x00", headers={"Authorization": "token t"}, allow_redirects=False
        )
        # A client that has a cookie sends it along, which is not under test.
        session.cookies.clear()
        return answer.status_code, answer.reason, answer.content, sorted(answer.raw.headers.items())

    assert ask(proxy.url) == ask(upstream.url)
    assert upstream.hits == {f"{method} {path}": 2}
    (entry,) = proxy.requests
    assert (entry.method, entry.path, entry.fault) == (method, path, None)
    assert entry.status == (302 if path == "/redirect" else 201)


def test_requests_follow_each_other_on_one_connection_and_paths_stay_as_sent(
    upstream: Upstream, proxy: FaultProxy
) -> None:
    with closing(HTTPConnection(urlsplit(proxy.url).netloc)) as connection:
        connection.connect()
        port = connection.sock.getsockname()[1]
        for path in ("//twice", "/a/../b", "//twice"):
            connection.request("GET", path)
            assert connection.getresponse().read().startswith(b"GET ")
        assert connection.sock.getsockname()[1] == port
    assert upstream.hits == {"GET //twice": 2, "GET /a/../b": 1}
    assert [entry.path for entry in proxy.requests] == ["//twice", "/a/../b", "//twice"]


def test_a_body_without_framing_ends_with_the_connection(proxy: FaultProxy, session: requests.Session) -> None:
    assert session.get(f"{proxy.url}/unframed").content == b"until the end"
    assert session.get(f"{proxy.url}/unframed").content == b"until the end"


def test_a_stream_is_delivered_as_it_is_produced(
    upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    with session.get(f"{proxy.url}/stream", stream=True, timeout=SOON_S) as response:
        lines = response.iter_lines(chunk_size=1)
        assert next(lines) == b"data: 1"
        assert not upstream.go.is_set()
        upstream.go.set()
        assert list(lines) == [b"", b"data: 2", b""]


def test_forty_requests_at_once_while_sixty_streams_are_open(upstream: Upstream, proxy: FaultProxy) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(40) as pool:
        streams = [
            stack.enter_context(requests.get(f"{proxy.url}/stream", stream=True, timeout=SOON_S)) for _ in range(60)
        ]
        answers = list(pool.map(lambda n: requests.post(f"{proxy.url}/{n}", data=str(n)).text, range(40)))
        assert answers == [f"POST /{n} - {n}" for n in range(40)]
        upstream.go.set()
        assert {stream.content for stream in streams} == {b"data: 1\n\ndata: 2\n\n"}
    assert len(proxy.requests) == 100


def test_a_client_that_leaves_a_quiet_stream_ends_it_upstream(upstream: Upstream, proxy: FaultProxy) -> None:
    with requests.get(f"{proxy.url}/endless", stream=True, timeout=SOON_S) as response:
        lines = response.iter_lines(chunk_size=1)
        assert next(lines) == b"data: 1"
        assert not upstream.left.is_set()
    assert upstream.left.wait(SOON_S)


def test_an_upstream_that_refuses_is_a_reset(session: requests.Session) -> None:
    with socket.socket() as bound_only:
        bound_only.bind(("127.0.0.1", 0))
        with FaultProxy(f"http://127.0.0.1:{bound_only.getsockname()[1]}") as proxy:
            with pytest.raises(requests.ConnectionError, match="reset by peer"):
                session.get(proxy.url)
            assert [(entry.status, entry.fault) for entry in proxy.requests] == [(None, None)]


def test_an_upstream_that_dies_in_its_answer_is_a_reset(proxy: FaultProxy, session: requests.Session) -> None:
    with pytest.raises(requests.RequestException, match="reset by peer"):
        session.get(f"{proxy.url}/short")


# ---- Faults --------------------------------------------------------------------------------------------------------


def test_an_answer_of_its_own_never_reaches_the_upstream(
    upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    proxy.rule = every(ANY, Answer(429, b"slow down", {"Retry-After": "3"}))
    for method in METHODS:
        answer = session.request(method, proxy.url, data=b"x")
        assert (answer.status_code, answer.reason) == (429, "Too Many Requests")
        assert answer.content == (b"" if method == "HEAD" else b"slow down")
        assert answer.headers["Retry-After"] == "3"
    assert not upstream.hits
    assert {(entry.status, entry.fault) for entry in proxy.requests} == {(429, "Answer")}


def test_another_answer_after_the_upstream_acted(
    upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    proxy.rule = first(1, ANY, AnswerAfter(504, b"<html>"))
    answers = [session.post(f"{proxy.url}/a") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [504, 201]
    assert answers[0].content == b"<html>"
    assert upstream.hits == {"POST /a": 2}


def test_a_delay_comes_before_the_upstream_acts(upstream: Upstream, proxy: FaultProxy) -> None:
    proxy.rule = every(ANY, Delay(0.2))
    start = time.monotonic()
    assert outcome(f"{proxy.url}/a") == "201"
    assert time.monotonic() - start >= 0.2
    proxy.rule = every(ANY, Delay(60))
    assert outcome(f"{proxy.url}/b", 0.5) == "ReadTimeout"
    assert upstream.hits == {"GET /a": 1}


@pytest.mark.parametrize("fault, hits", [(ResetBefore(), 0), (ResetAfter(), 1)])
def test_a_reset_comes_before_or_after_the_upstream_acted(
    fault: Fault, hits: int, upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    proxy.rule = first(1, ANY, fault)
    with pytest.raises(requests.ConnectionError, match="reset by peer"):
        session.post(f"{proxy.url}/a", data=b"x")
    assert upstream.hits["POST /a"] == hits
    assert [(entry.status, entry.fault) for entry in proxy.requests] == [(None, type(fault).__name__)]
    assert session.post(f"{proxy.url}/a", data=b"x").status_code == 201


@pytest.mark.parametrize("path, length", [("/0123", 12), ("/stream", 18)])
def test_half_a_body_and_an_orderly_close(
    path: str, length: int, upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    upstream.go.set()
    proxy.rule = every(ANY, HalfBody())
    broken = rf"IncompleteRead\({length // 2} bytes read, {length // 2} more expected\)"
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match=broken):
        session.get(proxy.url + path, headers={"Accept-Encoding": "identity"})
    assert upstream.hits == {f"GET {path}": 1}


@pytest.mark.parametrize("path", ["/stream", "/endless"])
def test_a_stream_is_reset_in_its_middle(
    path: str, upstream: Upstream, proxy: FaultProxy, session: requests.Session
) -> None:
    proxy.rule = every(ANY, ResetStream(lines=1))
    with session.get(proxy.url + path, stream=True, timeout=SOON_S) as response:
        lines = response.iter_lines(chunk_size=1)
        assert next(lines) == b"data: 1"
        with pytest.raises(requests.RequestException, match="reset by peer"):
            next(lines)
    if path == "/endless":
        assert upstream.left.wait(SOON_S)


def test_a_silent_request_ends_with_its_client_or_with_the_proxy(upstream: Upstream) -> None:
    with FaultProxy(upstream.url) as proxy, ThreadPoolExecutor(1) as pool:
        proxy.rule = every(ANY, Silence())
        assert outcome(f"{proxy.url}/a", 0.5) == "ReadTimeout"
        held = pool.submit(requests.get, proxy.url, timeout=SOON_S)
        until(lambda: len(proxy.requests) == 2)
        proxy.close()
        assert isinstance(held.exception(), requests.ConnectionError)
        assert [entry.fault for entry in proxy.requests] == ["Silence", "Silence"]
        assert not upstream.hits


# ---- The whole proxy -----------------------------------------------------------------------------------------------


def test_silence_holds_requests_and_streams_and_its_release_drops_them(upstream: Upstream, proxy: FaultProxy) -> None:
    with requests.get(f"{proxy.url}/stream", stream=True, timeout=SOON_S) as stream, ThreadPoolExecutor(5) as pool:
        lines = stream.iter_lines(chunk_size=1)
        assert next(lines) == b"data: 1"
        proxy.silence(True)
        upstream.go.set()
        held = [pool.submit(requests.get, f"{proxy.url}/held", timeout=SOON_S) for _ in range(5)]
        until(lambda: [entry.fault for entry in proxy.requests] == ["Silence"] * 6)
        assert not any(future.done() for future in held)
        proxy.silence(False)
        assert {type(future.exception()) for future in held} == {requests.ConnectionError}
        with pytest.raises(requests.RequestException):
            list(lines)
    assert outcome(f"{proxy.url}/after") == "201"
    assert upstream.hits == {"GET /stream": 1, "GET /after": 1}


def test_refusing_resets_connections_and_reopens_the_same_port(upstream: Upstream, proxy: FaultProxy) -> None:
    with requests.Session() as idle, requests.get(f"{proxy.url}/endless", stream=True, timeout=SOON_S) as stream:
        idle.get(proxy.url)
        lines = stream.iter_lines(chunk_size=1)
        assert next(lines) == b"data: 1"
        for _ in range(2):
            proxy.refuse(True)
            with pytest.raises(requests.ConnectionError, match="Connection refused"):
                idle.get(proxy.url)
            proxy.refuse(False)
            assert idle.get(proxy.url).status_code == 201
        with pytest.raises(requests.RequestException, match="reset by peer"):
            list(lines)
    assert upstream.left.wait(SOON_S)


def test_a_proxy_that_refuses_can_be_closed(upstream: Upstream) -> None:
    with FaultProxy(upstream.url) as proxy:
        proxy.refuse(True)


# ---- Rules and the log ---------------------------------------------------------------------------------------------


def hits(rule: Any, asked: list[tuple[str, str]]) -> list[int]:
    return [n for n, (method, path) in enumerate(asked, 1) if rule(Request(method, path, n, b""))]


def test_rules_pick_the_requests_they_name() -> None:
    asked = [("GET", "/users"), ("POST", "/users/a"), ("POST", "/users/b"), ("GET", "/users/a?x=1")] * 2
    posts = matching("POST", r"/users/\w+$")
    assert hits(every(posts, ResetBefore()), asked) == [2, 3, 6, 7]
    assert hits(first(3, posts, ResetBefore()), asked) == [2, 3, 6]
    assert hits(every(matching(None, r"\?x"), ResetBefore()), asked) == [4, 8]
    assert hits(share(0, ANY, ResetBefore()), asked) == []
    assert hits(share(1, posts, ResetBefore()), asked) == [2, 3, 6, 7]


def test_a_share_is_near_its_rate_and_the_same_for_the_same_seed() -> None:
    asked = [("GET", "/")] * 1000
    once, again, other = (hits(share(0.3, ANY, ResetBefore(), seed), asked) for seed in (1, 1, 2))
    assert once == again != other
    assert 200 < len(once) < 400


def test_the_log_is_a_copy_and_numbers_start_again_when_it_is_cleared(
    proxy: FaultProxy, session: requests.Session
) -> None:
    seen: list[Request] = []
    proxy.rule = seen.append
    before = time.monotonic()
    session.post(f"{proxy.url}/a", data=b"x")
    session.get(f"{proxy.url}/b?c")
    log = proxy.requests
    proxy.clear()
    session.get(f"{proxy.url}/d")
    assert seen == [Request("POST", "/a", 1, b"x"), Request("GET", "/b?c", 2, b""), Request("GET", "/d", 1, b"")]
    assert [entry.path for entry in log] == ["/a", "/b?c"]
    assert before <= log[0].time <= log[1].time <= time.monotonic()
    assert [entry.path for entry in proxy.requests] == ["/d"]


def test_a_request_with_a_chunked_body_is_not_understood(proxy: FaultProxy, session: requests.Session) -> None:
    assert session.post(proxy.url, data=iter([b"x"])).status_code == 411
