"""The server of known behaviour behaves as it says."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import known_server
from known_server import Behaviour, KnownServer, per_second, true_latency
from tool import run_tool

SLACK_S = 1.0  # how late an answer may be on a busy machine


class Client:
    """One connection, kept alive."""

    def __init__(self, server: KnownServer) -> None:
        self.connection = http.client.HTTPConnection(server.endpoint.split("/")[2], timeout=10)

    def call(self, method: str, path: str, data: object = None) -> tuple[int, object]:
        self.connection.request(method, "/hub/api" + path, None if data is None else json.dumps(data))
        response = self.connection.getresponse()
        return response.status, json.loads(response.read() or b"null")

    def report(self) -> tuple[int, float]:
        """Status and latency of one activity report."""
        began_s = time.monotonic()
        status, _ = self.call("POST", "/users/x/activity", {"last_activity": "now"})
        return status, time.monotonic() - began_s


def waits(server: KnownServer, count: int) -> list[float]:
    """The latencies of reports sent one after the other."""
    client = Client(server)
    found = [client.report() for _ in range(count)]
    client.connection.close()
    assert {status for status, _ in found} == {200}
    return [wait_s for _, wait_s in found]


def test_users_are_made_listed_read_and_deleted() -> None:
    with KnownServer() as server:
        client = Client(server)
        assert client.call("GET", "/")[1] == {"version": "5.0.0"}
        assert "users:activity" in client.call("GET", "/user")[1]["scopes"]
        model = {"name": "a b", "admin": False, "servers": {}}
        assert client.call("POST", "/users", {"usernames": ["a b"]}) == (201, [model])
        assert client.call("POST", "/users", {"usernames": ["a b"]})[0] == 409
        assert client.call("GET", "/users?limit=200") == (200, [model])
        assert client.call("GET", "/users/a%20b") == (200, model)
        assert server.users() == {"a b"}
        assert client.call("DELETE", "/users/a%20b/server")[0] == 204
        assert [client.call("DELETE", "/users/a%20b")[0] for _ in range(2)] == [204, 404]
        assert client.call("GET", "/users/a%20b")[0] == 404
        assert server.users() == set()
        assert server.arrivals() == []
        client.connection.close()


def test_a_request_may_arrive_in_pieces() -> None:
    body = b'{"usernames": ["a"]}'
    request = b"POST /hub/api/users HTTP/1.1\r\nHost: x\r\ncontent-LENGTH: %d\r\n\r\n" % len(body) + body
    with KnownServer() as server, socket.create_connection(server.endpoint.split("/")[2].split(":")) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in range(0, len(request), 7):
            connection.sendall(request[piece : piece + 7])
            time.sleep(0.002)
        assert connection.recv(4096).startswith(b"HTTP/1.1 201 Created\r\n")
        assert server.users() == {"a"}


def test_every_answer_takes_the_service_time_however_many_are_on_their_way() -> None:
    began_s = time.monotonic()
    with KnownServer(service_s=0.2) as server, ThreadPoolExecutor(8) as pool:
        found = [wait_s for (wait_s,) in pool.map(lambda _: waits(server, 1), range(8))]
        assert min(found) >= 0.2
        assert max(found) < 8 * 0.2  # as it would be if they were served one after the other
        arrivals = server.arrivals()
    assert len(arrivals) == 8
    assert arrivals == sorted(arrivals)
    assert began_s < arrivals[0] < arrivals[-1] < time.monotonic()


def test_what_arrives_in_a_freeze_is_answered_after_it() -> None:
    with KnownServer(freeze_s=1.0, period_s=3.0) as server:
        assert waits(server, 1)[0] < SLACK_S
        first_s = server.arrivals()[0]
        time.sleep(max(0.0, first_s + 2.05 - time.monotonic()))
        waits(server, 1)
        answered_s, arrived_s = time.monotonic(), server.arrivals()[1]
        wait_s = true_latency(server.behaviour, [arrived_s], first_s)[0]
        assert wait_s > 0
        assert arrived_s + wait_s <= answered_s < arrived_s + wait_s + SLACK_S


def test_every_kth_report_is_late_and_every_kth_fails() -> None:
    with KnownServer(outlier_share=1 / 4, outlier_s=0.8, fail_share=1 / 3) as server:
        client = Client(server)
        found = [client.report() for _ in range(12)]
        client.connection.close()
    assert [n for n, (_, wait_s) in enumerate(found) if wait_s >= 0.8] == [3, 7, 11]
    assert [n for n, (status, _) in enumerate(found) if status == 500] == [2, 5, 8, 11]


def test_reports_beyond_capacity_queue() -> None:
    with KnownServer(capacity_per_s=50) as server, ThreadPoolExecutor(20) as pool:
        found = sorted(wait_s for (wait_s,) in pool.map(lambda _: waits(server, 1), range(20)))
        spread_s = server.arrivals()[-1] - server.arrivals()[0]
    assert 19 / 50 - spread_s <= found[-1] < 19 / 50 + SLACK_S


def test_reads_behave_only_when_told_to() -> None:
    for also_reads in (False, True):
        with KnownServer(service_s=0.5, also_reads=also_reads) as server:
            client = Client(server)
            began_s = time.monotonic()
            client.call("GET", "/users/x")
            assert (time.monotonic() - began_s >= 0.5) == also_reads
            client.connection.close()


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (Behaviour(), [0, 0, 0, 0]),
        (Behaviour(service_s=0.5), [0.5] * 4),
        (Behaviour(freeze_s=1, period_s=4), [0, 0, 1.0, 0]),
        (Behaviour(freeze_s=2, period_s=4, service_s=0.5), [0.5, 2.5, 1.5, 0.5]),
        (Behaviour(outlier_share=0.5, outlier_s=3), [0, 3, 0, 3]),
        (Behaviour(capacity_per_s=0.01), [0, 0, 0, 0]),
    ],
)
def test_true_latency(behaviour: Behaviour, expected: list[float]) -> None:
    assert true_latency(behaviour, [100, 102, 103, 104], 100) == expected


def test_a_report_due_before_the_first_arrival_is_in_no_freeze() -> None:
    assert true_latency(Behaviour(freeze_s=1), [99.999], 100) == [0]


def test_per_second_counts_whole_seconds() -> None:
    assert per_second([], 10) == []
    assert per_second([5 + n / 10 for n in range(30)], 10) == [10, 10, 10]
    assert per_second([5 + n / 10 for n in range(29)], 10) == [10, 10]
    assert per_second([5.0, 5.1, 7.9], 10) == [2, 0, 1]


def test_the_tool_runs_against_it() -> None:
    with KnownServer() as server:
        done = run_tool("activity-stress-test", "-c", "3", "--workers", "3", env=server.environment)
        assert done.code == 0, done.stderr
        assert len(server.arrivals()) == 3
        assert server.users() == set()


@pytest.fixture
def launched() -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command without a command, and the endpoint that it says."""
    with subprocess.Popen([sys.executable, known_server.__file__], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        try:
            yield launcher, launcher.stdout.readline().strip().partition("=")[2]
        finally:
            launcher.kill()


def test_the_server_ends_with_its_launcher(launched: tuple["subprocess.Popen[str]", str]) -> None:
    launcher, endpoint = launched
    address = endpoint.split("/")[2].split(":")
    socket.create_connection(address).close()
    launcher.kill()
    until_s = time.monotonic() + 10
    with pytest.raises(ConnectionError):
        while time.monotonic() < until_s:
            socket.create_connection(address, timeout=5).close()
            time.sleep(0.05)


def test_the_command_wraps_a_command() -> None:
    script = "import os, sys; print(os.environ['JUPYTERHUB_ENDPOINT']); sys.exit(7)"
    words = [sys.executable, known_server.__file__, "--service", "0.01", "--", sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 7
    assert done.stdout.strip().endswith("/hub/api")
