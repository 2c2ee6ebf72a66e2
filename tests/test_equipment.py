"""The doubles behave as what they stand for: a notebook server, a network that fails, a cluster, its processes."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

import fault_proxy
from fault_proxy import Fault, FaultProxy, every, matching
from localhub import LocalHub
from processes import processes_in
from tool import wait_until

TIMEOUT_S = 30.0


def start_server(hub: LocalHub, name: str) -> None:
    hub.call("POST", f"/users/{name}")
    hub.call("POST", f"/users/{name}/server")
    wait_until(lambda: hub.users()[name]["servers"].get("", {}).get("ready"), 150)


# ==== The stub of a notebook server, beside a real one ===============================================================


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[LocalHub, LocalHub]]:
    """Zoe's server on a hub of real servers, and on a hub of stubs, each behind a real proxy."""
    with LocalHub(real_proxy=True, real_servers=True) as real, LocalHub(real_proxy=True, stub_labs=True) as stub:
        start_server(real, "zoe")
        start_server(stub, "zoe")
        yield real, stub


NO_KERNEL = str(uuid.UUID(int=0))
REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    *(("GET", path, {}) for path in ("", "api", "api/status", "lab", "api/kernels", "api/kernelspecs", "nonsense")),
    *(("GET", path, {}) for path in (f"api/kernels/{NO_KERNEL}", f"api/kernels/{NO_KERNEL}/channels")),
    ("DELETE", f"api/kernels/{NO_KERNEL}", {}),
    ("POST", "api/kernels", {"data": "{bad"}),
    ("POST", "api/kernels", {"json": {"name": "no-such-kernel"}}),
    *(("GET", path, {"headers": {"Origin": "https://other.example.org"}}) for path in ("api", "api/status", "lab")),
]


def sign(hub: LocalHub, token: str) -> dict[str, str]:
    known = {"unknown": "0" * 32, "forbidden": hub.token, "allowed": hub.visit_token}
    return {"Authorization": f"token {known[token]}"} if token in known else {}


def ask(hub: LocalHub, method: str, path: str, token: str = "allowed", **more: Any) -> requests.Response:
    """A request to zoe's server, whose redirects are not followed."""
    headers = sign(hub, token) | more.pop("headers", {})
    url = f"{hub.public_url}user/zoe/{path}"
    return requests.request(method, url, headers=headers, allow_redirects=False, timeout=TIMEOUT_S, **more)


def answer(hub: LocalHub, *words: str, **more: Any) -> list[object]:
    """An answer, without what differs from one to the next."""
    reply = ask(hub, *words, **more)
    kind = reply.headers.get("Content-Type", "").partition(";")[0] if reply.content else ""
    message = reply.json()["message"] if reply.status_code >= 400 and kind == "application/json" else ""
    location = re.sub(r"(&code_challenge\w*|state)=[^&]*", "", reply.headers.get("Location", ""))
    cookies = sorted(set(reply.cookies.keys()) - {"_xsrf"})
    return [reply.status_code, kind, message, location, cookies, "X-JupyterHub-Version" in reply.headers]


@pytest.mark.parametrize("token", ["none", "unknown", "forbidden", "allowed"])
def test_the_stub_answers_like_a_real_server(token: str, both: tuple[LocalHub, LocalHub]) -> None:
    real, stub = (
        {f"{method} {path} {more}": answer(hub, method, path, token, **more) for method, path, more in REQUESTS}
        for hub in both
    )
    assert stub == real


CELLS = ["6*7", "import time; time.sleep(0.2)", "raise ValueError('no')", "raise MemoryError", "a = 1"]
DEATH = "import os; os._exit(1)"


def connect(hub: LocalHub, kernel_id: str) -> websocket.WebSocket:
    url = f"{hub.public_url}user/zoe/api/kernels/{kernel_id}/channels".replace("http", "ws", 1)
    return websocket.create_connection(url, header=sign(hub, "allowed"), timeout=TIMEOUT_S)


def messages(socket: websocket.WebSocket, code: str) -> Iterator[dict[str, Any]]:
    """Run a cell, and take its messages; those of a kernel that dies too."""
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "username": "", "session": "s", "date": ""}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": True}
    request = {"header": header | {"version": "5.3"}, "parent_header": {}, "metadata": {}, "content": content}
    socket.send(json.dumps(request | {"channel": "shell", "buffers": []}))
    while True:
        message = json.loads(socket.recv())
        if message["parent_header"].get("msg_id", header["msg_id"]) == header["msg_id"]:
            yield message


def run(socket: websocket.WebSocket, code: str) -> dict[str, list[str]]:
    """The answers to a cell, by channel: a kernel promises no order between the two."""
    answers: dict[str, list[str]] = {"iopub": [], "shell": []}
    for message in messages(socket, code):
        content = message["content"]
        words = [content.get(key, "") for key in ("execution_state", "status", "ename", "evalue")]
        words += [content.get("data", {}).get("text/plain", "")]
        answers[message["channel"]].append(" ".join([message["msg_type"], *filter(None, words)]))
        if answers["iopub"][-1:] == ["status starting"] or (answers["shell"] and "status idle" in answers["iopub"]):
            break
    return answers


def test_the_stub_runs_cells_like_a_real_kernel(both: tuple[LocalHub, LocalHub]) -> None:
    said = []
    for hub in both:
        kernel_id = ask(hub, "POST", "api/kernels", json={}).json()["id"]
        with contextlib.closing(connect(hub, kernel_id)) as socket:
            answers = {code: run(socket, code) for code in CELLS}
            died = [word for word in run(socket, DEATH)["iopub"] if word.startswith("status re")]
            answers["after its death"] = run(socket, "6*7")
            deleted = ask(hub, "DELETE", f"api/kernels/{kernel_id}").status_code
        again = [ask(hub, method, f"api/kernels/{kernel_id}").status_code for method in ("GET", "DELETE")]
        said.append([answers, died, deleted, again])
    real, stub = said
    assert stub == real and stub[0]["6*7"]["shell"] == ["execute_reply ok"]


def test_a_server_that_ends_itself_is_really_away(both: tuple[LocalHub, LocalHub]) -> None:
    said = []
    for hub in both:
        asked = ask(hub, "POST", "api/shutdown").status_code
        wait_until(lambda hub=hub: ask(hub, "GET", "api").status_code != 200)
        said.append([asked, answer(hub, "GET", "api", "none")])
    real, stub = said
    assert stub == real and stub[1][0] == 503


# ==== The fault proxy, in front of a real hub ========================================================================


def test_without_a_rule_the_proxy_changes_nothing(new_hub: LocalHub, proxy: FaultProxy) -> None:
    volatile = {"Date", "Set-Cookie"}
    pairs = []
    for endpoint in (new_hub.endpoint, proxy.endpoint):
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            reply = requests.request(method, f"{endpoint}/users?limit=2", allow_redirects=False, timeout=TIMEOUT_S)
            headers = {name: value for name, value in reply.headers.items() if name not in volatile}
            pairs.append((reply.status_code, reply.reason, reply.content, headers))
    assert pairs[:4] == pairs[4:]
    assert [(entry.status, entry.fault) for entry in proxy.requests] == [(pair[0], None) for pair in pairs[:4]]


@pytest.mark.parametrize(
    ("fault", "outcome", "acted"),
    [
        (fault_proxy.Answer(429, b"slow down"), "429", False),
        (fault_proxy.AnswerAfter(504), "504", True),
        (fault_proxy.Delay(0.2), "201", True),
        (fault_proxy.ResetBefore(), "ConnectionError", False),
        (fault_proxy.ResetAfter(), "ConnectionError", True),
        (fault_proxy.ResetStream(lines=0), "ChunkedEncodingError", True),
        (fault_proxy.HalfBody(), "ChunkedEncodingError", True),
        (fault_proxy.Silence(), "ReadTimeout", False),
    ],
)
def test_a_fault_shows_before_or_after_the_hub_acted(
    fault: Fault, outcome: str, acted: bool, new_hub: LocalHub, proxy: FaultProxy
) -> None:
    proxy.rule = every(matching("POST", "/users"), fault)
    try:
        headers = {"Authorization": f"token {new_hub.token}"}
        patience_s = 2 if outcome == "ReadTimeout" else TIMEOUT_S
        reply = requests.post(
            f"{proxy.endpoint}/users", json={"usernames": ["zoe"]}, headers=headers, timeout=patience_s
        )
        shown = str(reply.status_code)
    except requests.RequestException as error:
        shown = type(error).__name__
    deleted, _ = new_hub.call("DELETE", "/users/zoe")
    assert (shown, deleted) == (outcome, 204 if acted else 404)
    (entry,) = proxy.requests
    assert entry.fault == type(fault).__name__


# ==== The stub of Kubernetes, under a real KubeSpawner ===============================================================

PHASES = ["FailedScheduling", "TriggeredScaleUp", "Scheduled", "SuccessfulAttachVolume"]
PHASES += ["Pulling", "Pulled", "Created", "Started"] * 2  # of the init container, and of the server


def test_a_pod_goes_through_every_phase_and_leaves_nothing(make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(kube=True, nodes=0, node_s=1.0, image_s=0.5, spawn_s=1.5)
    hub.call("POST", "/users/zoe")
    assert hub.call("POST", "/users/zoe/server", {"profile": "plain"})[0] == 202
    url, headers = f"{hub.endpoint}/users/zoe/server/progress", {"Authorization": f"token {hub.token}"}
    with requests.get(url, headers=headers, stream=True, timeout=60) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines(chunk_size=1) if line.startswith(b"data: ")]
    assert [event["raw_event"]["reason"] for event in events if event.get("raw_event")] == PHASES
    assert events[-1]["ready"]
    assert (
        requests.get(f"http://{hub.cluster.truth()['pods'][0]['ip']}:8888/user/zoe/api", timeout=9).status_code == 200
    )
    assert hub.call("DELETE", "/users/zoe")[0] == 204
    assert (hub.cluster.pods(), hub.cluster.truth()["claims"]) == ([], [])


# ==== The processes of a hub =========================================================================================


def test_a_killed_launcher_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("localhub.py")), "--real-proxy", "--stub-labs"]
    with subprocess.Popen(["env", f"TMPDIR={tmp_path}", *command], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout and launcher.stdout.readline().startswith(b"export JUPYTERHUB_ENDPOINT=")
        assert len(processes_in(tmp_path)) == 3
        launcher.send_signal(signal.SIGKILL)
    wait_until(lambda: not processes_in(tmp_path) and not list(tmp_path.iterdir()))
