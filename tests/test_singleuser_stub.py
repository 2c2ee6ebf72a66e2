"""The stub of a single-user server answers as the real one does, through a real proxy.

Each test does the same to both, and compares what came back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import websocket

from localhub import HubOptions, LocalHub
from singleuser_stub import Behaviour, Outcome, outcome_of
from tool import wait_until

NO_KERNEL = str(uuid.UUID(int=0))
WITHIN_S = 30.0


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody with a running server, and the tokens with which others come to it."""

    hub: LocalHub
    name: str

    def ask(self, method: str, path: str, token: str = "allowed", **more: Any) -> requests.Response:
        """A request to the server, through the proxy; redirects are not followed."""
        url = f"{self.hub.public_url}user/{self.name}/{path}"
        headers = self.sign(token) | more.pop("headers", {})
        return requests.request(method, url, headers=headers, allow_redirects=False, timeout=WITHIN_S, **more)

    def sign(self, token: str) -> dict[str, str]:
        known = {"bad": "0" * 32, "forbidden": self.hub.token, "allowed": self.hub.visit_token}
        return {"Authorization": f"token {known[token]}"} if token in known else {}

    def is_away(self) -> bool:
        return self.ask("GET", "api").status_code != 200

    def start_kernel(self) -> str:
        kernel_id: str = self.ask("POST", "api/kernels", json={}).json()["id"]
        return kernel_id

    def connect(self, kernel_id: str, token: str = "allowed") -> websocket.WebSocket:
        url = f"{self.hub.public_url}user/{self.name}/api/kernels/{kernel_id}/channels".replace("http", "ws", 1)
        return websocket.create_connection(url, header=self.sign(token), timeout=WITHIN_S, redirect_limit=0)

    @contextlib.contextmanager
    def talk(self, kernel_id: str) -> Iterator[websocket.WebSocket]:
        """A websocket to the kernel."""
        socket = self.connect(kernel_id)
        try:
            yield socket
        finally:
            socket.close()
            socket.shutdown()  # when the server has sent a close frame, `close` leaves it open

    def refused_socket(self, kernel_id: str, token: str = "allowed") -> int:
        """The status with which a websocket is refused."""
        with pytest.raises(websocket.WebSocketBadStatusException) as refused:
            self.connect(kernel_id, token)
        status: int = refused.value.status_code
        return status


def start_server(hub: LocalHub, name: str) -> Person:
    hub.call("POST", f"/users/{name}")
    hub.call("POST", f"/users/{name}/server")
    wait_until(lambda: hub.users()[name]["servers"].get("", {}).get("ready"))
    return Person(hub, name)


def people(version: str | None) -> Iterator[dict[str, Person]]:
    with (
        LocalHub(version=version, real_proxy=True, real_servers=True) as real,
        LocalHub(version=version, real_proxy=True, stub_labs=True) as stub,
    ):
        yield {"real": start_server(real, "zoe"), "stub": start_server(stub, "zoe")}


@pytest.fixture(scope="module")
def both() -> Iterator[dict[str, Person]]:
    """Zoe on a hub of real servers, and on one of stubs."""
    yield from people(None)


@pytest.fixture(scope="module")
def both_of_old() -> Iterator[dict[str, Person]]:
    yield from people("4.1.6")


# ==== Who may enter ==================================================================================================

REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "", {}),
    ("GET", "api", {}),
    ("GET", "api/status", {}),
    ("GET", "lab", {}),
    ("GET", "api/kernels", {}),
    ("GET", f"api/kernels/{NO_KERNEL}", {}),
    ("GET", f"api/kernels/{NO_KERNEL}/channels", {}),
    ("DELETE", f"api/kernels/{NO_KERNEL}", {}),
    ("POST", f"api/kernels/{NO_KERNEL}/interrupt", {}),
    ("POST", "api/kernels", {"data": "{bad"}),
    ("POST", "api/kernels", {"json": {"name": "no-such-kernel"}}),
    ("GET", "api/kernelspecs", {}),
    ("GET", "lab/api/settings", {}),
    ("GET", "nonsense", {}),
    *(("GET", path, {"headers": {"Origin": "https://other.example.org"}}) for path in ("api", "api/status", "lab")),
]


def answer(person: Person, method: str, path: str, token: str, more: dict[str, Any]) -> dict[str, object]:
    """What an answer is, without what differs from one to the next."""
    got = person.ask(method, path, token, **more)
    kind = got.headers.get("Content-Type", "").partition(";")[0]
    location = re.sub(r"(&code_challenge\w*|state)=[^&]*", "", got.headers.get("Location", ""))
    return {
        "status": got.status_code,
        "body": kind if got.content else "",
        "message": got.json()["message"] if got.status_code >= 400 and kind == "application/json" else "",
        "location": location,
        "cookies": sorted(set(got.cookies.keys()) - {"_xsrf"}),
        "from a server": "X-JupyterHub-Version" in got.headers,
    }


@pytest.mark.parametrize("token", ["none", "bad", "forbidden", "allowed"])
def test_the_stub_answers_as_the_real_server_whatever_the_token(token: str, both: dict[str, Person]) -> None:
    said = {
        kind: {f"{method} {path} {more}": answer(person, method, path, token, more) for method, path, more in REQUESTS}
        for kind, person in both.items()
    }
    assert said["stub"] == said["real"]


@pytest.mark.parametrize("token", ["none", "bad", "forbidden", "allowed"])
def test_a_kernel_is_started_and_reached_only_with_a_token_that_may(token: str, both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        started = answer(person, "POST", "api/kernels", token, {"json": {}})
        unknown = person.refused_socket(NO_KERNEL, token)
        said[kind] = re.sub(r"[0-9a-f-]{36}", "ID", str(started)), unknown
    assert said["stub"] == said["real"]


def test_the_start_page_is_reached_by_following_its_redirects(both: dict[str, Person]) -> None:
    pages = {}
    for kind, person in both.items():
        got = requests.get(f"{person.hub.public_url}user/zoe/", headers=person.sign("allowed"), timeout=WITHIN_S)
        pages[kind] = got
        assert [step.status_code for step in got.history] == [302] and got.status_code == 200
    sizes = [len(page.content) for page in pages.values()]
    assert max(sizes) < 2 * min(sizes)


def test_the_token_may_be_sent_in_each_of_the_usual_ways(both: dict[str, Person]) -> None:
    for person in both.values():
        url = f"{person.hub.public_url}user/zoe/api/status"
        ways = ("token", "Token", "Bearer", "bearer")
        headers = [{"Authorization": f"{way} {person.hub.visit_token}"} for way in ways]
        assert [requests.get(url, headers=header, timeout=WITHIN_S).status_code for header in headers] == [200] * 4


def test_a_token_of_the_users_own_may_enter_their_server_and_no_other(both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        person.hub.call("POST", "/users/eve")
        statuses = []
        for owner in ("zoe", "eve"):
            token = person.hub.call("POST", f"/users/{owner}/tokens", {})[1]["token"]
            url = f"{person.hub.public_url}user/zoe/api/status"
            statuses.append(
                requests.get(url, headers={"Authorization": f"token {token}"}, timeout=WITHIN_S).status_code
            )
        said[kind] = statuses
    assert said["stub"] == said["real"] == [200, 403]


# ==== Kernels ========================================================================================================


def execute_request(code: str) -> dict[str, Any]:
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "username": "", "session": "s", "date": ""}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": True}
    whole = {"header": header | {"version": "5.3"}, "parent_header": {}, "metadata": {}, "content": content}
    return whole | {"channel": "shell", "buffers": []}


def gist(message: dict[str, Any]) -> str:
    """A message in few words."""
    content = message["content"]
    match message["msg_type"]:
        case "status":
            return f"status {content['execution_state']}"
        case "execute_result":
            return f"result {content['data']['text/plain']}"
        case "stream":
            return f"{content['name']} {content['text'][:20]!r}"
        case "error":
            return f"error {content['ename']} {content['evalue']}"
        case "execute_reply":
            return f"reply {content['status']} {content.get('ename', '')}"
    return str(message["msg_type"])


def frames(socket: websocket.WebSocket) -> Iterator[str]:
    """What comes; an empty one when the connection is closed. The test fails when the time is up."""
    until_s = time.monotonic() + WITHIN_S
    socket.settimeout(1)  # for each read, which a ping starts anew
    while time.monotonic() < until_s:
        with contextlib.suppress(websocket.WebSocketTimeoutException):
            yield socket.recv()
    pytest.fail("what was waited for did not come in time")


def messages(socket: websocket.WebSocket) -> Iterator[dict[str, Any]]:
    return map(json.loads, frames(socket))


def run(socket: websocket.WebSocket, code: str) -> dict[str, list[str]]:
    """What a cell is answered with, in order, on each channel: a kernel promises no order between them.

    Foreign messages, which come before, are reduced to their types.
    """
    request = execute_request(code)
    socket.send(json.dumps(request))
    said: dict[str, list[str]] = {"iopub": [], "shell": []}
    foreign = set()
    for message in messages(socket):
        if message["parent_header"].get("msg_id") == request["header"]["msg_id"]:
            said[message["channel"]].append(gist(message))
        else:
            foreign.add(message["msg_type"])
        if said["shell"] and "status idle" in said["iopub"]:
            break
    return said | {"foreign": sorted(foreign)}


CELLS = [
    "6*7",
    "import time; time.sleep(0.2)",
    "raise ValueError('no')",
    "raise MemoryError",
    "input()",
    "print('x' * 5)",
    "print('x' * 4_000_000)",
    "a = 1",
]


def test_each_cell_is_answered_with_the_same_messages(both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        with person.talk(person.start_kernel()) as socket:
            said[kind] = {code: run(socket, code) for code in CELLS}
    assert said["stub"] == said["real"]
    assert said["stub"]["6*7"]["shell"] == ["reply ok "]
    assert said["stub"]["6*7"]["iopub"] == ["status busy", "execute_input", "result 42", "status idle"]


def test_an_interrupt_ends_a_cell_with_an_error(both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        kernel_id = person.start_kernel()
        with person.talk(kernel_id) as socket:
            run(socket, "6*7")
            socket.send(json.dumps(execute_request("import time; time.sleep(60)")))
            gists: list[str] = []
            for message in messages(socket):
                gists.append(gist(message))
                if gists[-1] == "execute_input":
                    assert person.ask("POST", f"api/kernels/{kernel_id}/interrupt").status_code == 204
                if gists[-1] == "reply error KeyboardInterrupt":
                    break
            said[kind] = [one for one in gists if one.startswith("error")]
    assert said["stub"] == said["real"] == ["error KeyboardInterrupt "]


def test_a_kernel_that_dies_is_restarted_without_an_answer_to_its_cell(both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        with person.talk(person.start_kernel()) as socket:
            run(socket, "6*7")
            request = execute_request("import os; os._exit(1)")
            socket.send(json.dumps(request))
            seen = []
            for message in messages(socket):
                ours = message["parent_header"].get("msg_id") == request["header"]["msg_id"]
                seen.append((gist(message), ours))
                if seen[-1][0] == "status starting":
                    break
            after = run(socket, "6*7")
        said[kind] = [one for one in seen if one[0].startswith("status re")], after["iopub"]
    assert said["stub"] == said["real"]
    assert said["stub"][0] == [("status restarting", False)]


def test_a_deleted_kernel_says_goodbye_and_is_gone(both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        kernel_id = person.start_kernel()
        path = f"api/kernels/{kernel_id}"
        before = person.ask("GET", path).json()
        with person.talk(kernel_id) as socket:
            run(socket, "6*7")
            during = person.ask("GET", path).json()
            deleted = person.ask("DELETE", path).status_code
            next(message for message in messages(socket) if message["msg_type"] == "shutdown_reply")
        again = [person.ask(method, path).status_code for method in ("DELETE", "GET")]
        states = [(model["execution_state"], sorted(model)) for model in (before, during)]
        said[kind] = [states, during["connections"], deleted, *again, person.refused_socket(kernel_id)]
    assert said["stub"] == said["real"]
    assert said["stub"][1:] == [1, 204, 404, 404, 404]


def test_what_is_no_message_ends_the_connection(both: dict[str, Person]) -> None:
    for person in both.values():
        with person.talk(person.start_kernel()) as socket:
            run(socket, "6*7")
            socket.send("hello")
            assert ends(socket)


def ends(socket: websocket.WebSocket) -> bool:
    """Whether the connection ends, with a goodbye or without."""
    try:
        return any(frame == "" for frame in frames(socket))
    except (websocket.WebSocketConnectionClosedException, ConnectionError):
        return True


# ==== The end of a server ============================================================================================


@pytest.mark.parametrize("way", ["stopped by the hub", "ends by itself"])
def test_when_a_server_ends_its_connections_end_and_its_address_is_away(way: str, both: dict[str, Person]) -> None:
    said = {}
    for kind, person in both.items():
        leaver = start_server(person.hub, f"leaver-{way.split()[0]}")
        with leaver.talk(leaver.start_kernel()) as socket:
            run(socket, "6*7")
            if way == "ends by itself":
                asked = leaver.ask("POST", "api/shutdown").status_code
            else:
                asked = leaver.hub.call("DELETE", f"/users/{leaver.name}/server")[0]
            gone = ends(socket)
        wait_until(leaver.is_away)
        still_listed = bool(leaver.hub.users()[leaver.name]["servers"])
        said[kind] = [asked, gone, answer(leaver, "GET", "api", "none", {}), still_listed]
    assert said["stub"] == said["real"]
    assert said["stub"][2]["status"] == (503 if way == "ends by itself" else 302)


# ==== An older hub ===================================================================================================


def test_on_an_older_hub_too_people_get_a_page_and_a_result(both_of_old: dict[str, Person]) -> None:
    said = {}
    for kind, person in both_of_old.items():
        with person.talk(person.start_kernel()) as socket:
            said[kind] = [
                person.ask("GET", "").headers["Location"],
                person.ask("GET", "lab").status_code,
                person.ask("GET", "lab", "forbidden").status_code,
                run(socket, "6*7"),
            ]
    assert said["stub"] == said["real"]


# ==== The stub alone =================================================================================================


def test_the_truth_has_each_cell_between_its_sending_and_its_result() -> None:
    with LocalHub(real_proxy=True, stub_labs=True, kernel_start_s=0, cell_s=0.05) as hub:
        person = start_server(hub, "zoe")
        kernel_id = person.start_kernel()
        with person.talk(kernel_id) as socket:
            seen = []
            for _ in range(3):
                sent_s = time.monotonic()
                run(socket, "6*7")
                seen.append((sent_s, time.monotonic()))
            truth = hub.truth()
        assert (truth["servers"], truth["kernels"], truth["open_websockets"]) == (1, 1, 1)
        for cell, (sent_s, came_s) in zip(truth["cells"], seen, strict=True):
            assert (cell["server"], cell["kernel"]) == ("zoe", kernel_id)
            assert sent_s < cell["received_s"] < cell["sent_s"] < came_s
            assert cell["sent_s"] - cell["received_s"] >= 0.05
        wait_until(lambda: hub.truth()["open_websockets"] == 0)


def test_the_truth_counts_requests_and_how_often_the_hub_was_asked() -> None:
    with LocalHub(real_proxy=True, stub_labs=True) as hub:
        person = start_server(hub, "zoe")
        before = hub.truth()["hub_checks"]
        for token in ("none", "bad", "bad", "forbidden", "allowed", "allowed"):
            person.ask("GET", "api/status", token)
        person.ask("GET", "static/lab/main.0123.js")
        person.ask("GET", f"api/kernels/{NO_KERNEL}")
        truth = hub.truth()
        assert truth["requests"]["GET /api/status"] == {"200": 2, "403": 4}
        assert truth["requests"]["GET /static"] == {"200": 1}
        assert truth["requests"]["GET /api/kernels/ID"] == {"404": 1}
        assert truth["hub_checks"] - before == 3


def test_the_stub_labs_outlive_a_crash_of_the_hub_and_are_found_by_the_next(tmp_path: Any) -> None:
    with LocalHub(real_proxy=True, stub_labs=True, database=str(tmp_path / "hub.sqlite")) as hub:
        person = start_server(hub, "zoe")
        assert person.ask("GET", "lab").status_code == 200
        hub.kill()
        assert person.ask("GET", "lab").status_code == 200  # the token is known
        unknown = person.ask("GET", "api/status", "forbidden")
        assert (unknown.status_code, unknown.json()["message"]) == (500, "Failed to connect to Hub API")
        hub.start()
        assert hub.users()["zoe"]["servers"][""]["ready"]
        assert person.ask("GET", "api/status", "forbidden").status_code == 403


def test_with_any_token_the_hub_is_not_asked() -> None:
    with LocalHub(real_proxy=True, stub_labs=True, any_token=True) as hub:
        person = start_server(hub, "zoe")
        assert person.ask("GET", "api/status", "bad").status_code == 200
        assert person.ask("GET", "api/status", "none").status_code == 403
        assert hub.truth()["hub_checks"] == 0


def test_the_options_of_the_hub_have_the_defaults_of_the_stub() -> None:
    options = HubOptions()
    assert dataclasses.asdict(Behaviour()) == {name: getattr(options, name) for name in dataclasses.asdict(Behaviour())}


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (" 6*7\n", Outcome(result="42")),
        ("import time\ntime.sleep(1.5)", Outcome(takes_s=1.5)),
        ('raise RuntimeError("gone")', Outcome(error=("RuntimeError", "gone"))),
        ("raise MemoryError", Outcome(error=("MemoryError", ""))),
        ("import os; os._exit(1)", Outcome(dies=True)),
        ("print('ab' * 3)", Outcome()),
        ("import numpy", Outcome()),
    ],
)
def test_cells_are_known_by_sight(code: str, outcome: Outcome) -> None:
    assert outcome_of(code) == outcome
