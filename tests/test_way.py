"""The way to a person's server: where it is, which token enters it, what a page must answer; and kernels behind it."""

from __future__ import annotations

import contextlib
import io
import json
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

import hub_stress_test as hst
from hub_stress_test import Kind, Reason
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, TimeTraveller
from test_hub_setup import refusal
from tool import MODULE, NOWHERE, refused_usage

NO_ROUTE = Reason(Kind.ROUTE, hst.NO_ROUTE)
NOBODY, SILENT = Reason(Kind.ROUTE, "nobody listens there (503)"), Reason(Kind.ROUTE, "no page: no answer in time")
TO_HTTP = Reason(Kind.ROUTE, "a redirect to http: the proxy does not pass X-Forwarded-Proto")
TO_ELSEWHERE = Reason(Kind.ROUTE, "the page redirects elsewhere (302)")
DIED = Reason(Kind.KERNEL, "the kernel died")
LOST = Reason(Kind.WEBSOCKET, "the connection was lost")

# ==== What a visit was answered ======================================================================================


def answer(status: int, location: str | None = None, data: Any = None, version: str = "") -> hst.Reply:
    return hst.Reply(status, 0.0, 0.1, data, "" if status else "refused", location=location, version=version)


def judged(reply: hst.Reply, url: str = "", hub_version: str = "6.1.1") -> tuple[Reason | None, bool]:
    """Why an answer is not the page that was asked for, and whether it is final."""
    try:
        hst.judge_visit(reply, url, hub_version)
    except hst.Failed as failed:
        return failed.reason, failed.final
    return None, True


@pytest.mark.parametrize(
    ("reply", "kind", "text", "final"),
    [
        (answer(0), Kind.ROUTE, "no page: refused", False),
        (answer(302, "/jupyter/hub/user/ann/lab"), Kind.ROUTE, hst.NO_ROUTE, False),
        (answer(302, "https://hub.example.org/hub/user/ann/"), Kind.ROUTE, hst.NO_ROUTE, False),
        (answer(302, "/hub/login?next=%2Fhub%2F"), Kind.ROUTE, hst.NO_ROUTE, False),
        (answer(302, "/jupyter/hub/api/oauth2/authorize?client_id=x"), Kind.REFUSED, "does not know the token", True),
        (answer(302, "https://sso.example.org/auth?next=/hub/"), Kind.ROUTE, "redirects elsewhere (302)", True),
        (answer(307, "https://other.example.org/"), Kind.ROUTE, "redirects elsewhere (307)", True),
        (answer(403, data={"message": "Forbidden"}), Kind.REFUSED, "does not let the token in (403", True),
        (answer(403, version="1.5.1"), Kind.REFUSED, "has JupyterHub 1.5.1, the hub 6.1.1", True),
        (answer(503), Kind.ROUTE, "nobody listens there (503)", False),
        (answer(404), Kind.ROUTE, "was answered 404", False),
        (answer(404, version="6.1.1"), Kind.ROUTE, "was answered 404", True),
        (answer(500), Kind.ROUTE, "was answered 500", False),
        (answer(502), Kind.ROUTE, "was answered 502", False),
        (answer(424), Kind.ROUTE, "was answered 424", False),
    ],
    ids=lambda value: f"{value.status} {value.location or ''}" if isinstance(value, hst.Reply) else None,
)
def test_an_answer_without_a_page_has_a_reason(reply: hst.Reply, kind: Kind, text: str, final: bool) -> None:
    reason, is_final = judged(reply)
    assert reason and reason.kind is kind and text in reason.text and is_final is final
    assert judged(answer(200)) == (None, True)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://hub.example.org/user/ann/lab", TO_HTTP),
        ("http://hub.example.org:8000/user/ann/lab", TO_HTTP),
        ("http://hub.example.org.evil.org/user/ann/lab", TO_ELSEWHERE),
        ("http://hub/user/ann/lab", TO_ELSEWHERE),
        ("https://hub.example.org/", TO_ELSEWHERE),
        ("http://hub.example.org/hub/user/ann/", NO_ROUTE),
    ],
)
def test_a_redirect_to_http_behind_tls_is_told_apart(location: str, reason: Reason) -> None:
    assert judged(answer(302, location), "https://hub.example.org/user/ann/")[0] == reason
    assert judged(answer(302, location), "http://hub.example.org/user/ann/")[0] != TO_HTTP


class OtherHub(HubWithUsers):
    """A simulated hub with ann's server; some paths are answered with a status, and JSON or the place to go to."""

    def __init__(self, others: dict[str, tuple[int, Any]]) -> None:
        super().__init__(["ann"])
        self._users["ann"]["servers"] = {"": {"ready": True, "pending": None, "url": "/user/ann/"}}
        self._others = others

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        response = super().send(request, *args, **kwargs)
        response.status_code, other = self._others.get(self.asked[-1][1], (response.status_code, None))
        if isinstance(other, str):
            response.headers.update({"Location": other, "X-JupyterHub-Version": "6.1.1"})
        elif other is not None:
            response.raw = io.BytesIO(json.dumps(other).encode())
        return response


@pytest.mark.parametrize(
    ("pages", "visited", "reason"),
    [
        ({"/user/ann/": (302, "/user/ann/lab?"), "/user/ann/lab": (200, "")}, 2, None),
        ({"/user/ann/": (302, "lab"), "/user/ann/lab": (302, "tree"), "/user/ann/tree": (200, "")}, 3, None),
        ({"/user/ann/": (302, "//evil.org/user/ann/")}, 1, TO_ELSEWHERE),
        ({"/user/ann/": (302, "/user/annabel/")}, 1, TO_ELSEWHERE),
        ({"/user/ann/": (302, "/user/ann/")}, 5, TO_ELSEWHERE),
        ({"/user/ann/": (302, "/hub/user/ann/")}, 1, NO_ROUTE),
    ],
    ids=["to the page", "twice", "to another host", "to another user", "in a circle", "to the hub"],
)
def test_only_redirects_below_the_servers_url_are_followed(
    pages: dict[str, tuple[int, str]], visited: int, reason: Reason | None
) -> None:
    wire = OtherHub(pages)
    site = hst.Site(hst.Hub(ENDPOINT, hst.HubSession("x", wire), "6.1.1"), hst.Plan(visit=True), hst.new_recorder())
    person = hst.Visitor("ann", 0.0, site.plan, site)
    with pytest.raises(hst.Failed) if reason else contextlib.nullcontext() as failed:
        hst.open_page(person, hst.Event("visit", "ann", 0.0, 0.0), person.clock() + 30.0)
    asked = [path for _, path, _ in wire.asked if not path.startswith("/hub/api/")]
    assert len(asked) == visited and (failed.value.reason if failed else None) == reason
    assert all(path.startswith("/user/ann/") for path in asked)


@pytest.mark.parametrize(("waits_s", "reason"), [(5.0, NOBODY), (20.0, SILENT)])
def test_a_last_try_without_time_is_not_the_reason(
    waits_s: float, reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_page(person: hst.Visitor, event: hst.Event, until_s: float) -> hst.Reply:
        if event.tries > 1:
            clock.pause(waits_s)
        raise hst.Failed(reasons[-1].kind, reasons.pop().text)

    reasons, clock = [SILENT, NOBODY], TimeTraveller()
    monkeypatch.setattr(hst, "open_page", open_page)
    site = hst.Site(hst.Hub(ENDPOINT, clock), hst.Plan(visit=True), hst.new_recorder())
    with pytest.raises(hst.Failed) as failed:
        hst.get_in(hst.Visitor("ann", 0.0, site.plan, site), hst.Event("visit", "ann", 0.0, 0.0), 5.0)
    assert failed.value.reason == reason


# ==== Where the server is, and which token enters it =================================================================


def model(url: str | None, **more: Any) -> hst.Reply:
    server = {"pending": None, "ready": True} | ({} if url is None else {"url": url})
    return answer(200, data={"name": "ann", "servers": {"": server}} | more)


HUB_URL, INSIDE = "https://hub.example.org/hub/api", "http://hub:8081/hub/api"


@pytest.mark.parametrize(
    ("endpoint", "public_url", "reply", "url"),
    [
        (HUB_URL, None, model("/user/ann/"), "https://hub.example.org/user/ann/"),
        (HUB_URL, None, model("/user/b%40x.org/"), "https://hub.example.org/user/b%40x.org/"),
        ("http://h:8000/deep/hub/api", None, model("/deep/user/ann/"), "http://h:8000/deep/user/ann/"),
        (HUB_URL, None, model("https://ann.hub.example.org/user/ann/"), "https://ann.hub.example.org/user/ann/"),
        (HUB_URL, None, model(None, server="/user/ann/"), "https://hub.example.org/user/ann/"),  # old hubs
        (HUB_URL, None, model("https://evil.example.org/user/ann/"), None),
        (HUB_URL, None, model("//evil.example.org/user/ann/"), None),
        (HUB_URL, None, model("https://evilhub.example.org/user/ann/"), None),
        (HUB_URL, None, model("https://hub.example.org.evil.org/user/ann/"), None),
        (HUB_URL, None, model("http://hub.example.org/user/ann/"), None),  # the token is not sent in clear
        (HUB_URL, None, model("https://hub.example.org@evil.org/user/ann/"), None),
        (HUB_URL, None, model(None, server=None), None),
        (HUB_URL, None, model(None), None),
        (INSIDE, "http://proxy-public", model("/user/ann/"), "http://proxy-public/user/ann/"),
        (INSIDE, None, model("/user/ann/"), "http://hub:8081/user/ann/"),
        (INSIDE, "https://x.org/jh", model("/jh/user/ann/"), "https://x.org/jh/user/ann/"),
        (INSIDE, "https://x.org", model("https://ann.x.org/user/ann/"), "https://ann.x.org/user/ann/"),
        (HUB_URL, None, answer(200, data={"name": "ann", "servers": {}}), None),
        (HUB_URL, None, answer(200, data={"servers": {"": {"pending": "spawn", "url": "/user/ann/"}}}), None),
        (HUB_URL, None, answer(404, data={"status": 404}), None),
        (HUB_URL, None, answer(0), None),
    ],
)
def test_a_servers_url_is_the_hubs_and_no_others(
    endpoint: str, public_url: str | None, reply: hst.Reply, url: str | None
) -> None:
    public = hst.PublicSide(hst.Hub(endpoint, hst.HubSession("t", HubWithUsers())), hst.Plan(public_url=public_url))
    with contextlib.nullcontext() if url else pytest.raises(hst.Failed):
        assert public.server_in(reply) == url


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (answer(0), Kind.NO_ANSWER),
        (answer(500), Kind.REFUSED),
        (hst.Reply(0, 0.0, 0.1, front=502), Kind.IN_FRONT),
        (answer(200, data={"name": "ann", "servers": {}}), Kind.VANISHED),
    ],
)
def test_a_server_has_vanished_only_if_the_hub_says_so(reply: hst.Reply, kind: Kind) -> None:
    public = hst.PublicSide(hst.Hub(HUB_URL, hst.HubSession("t", HubWithUsers())), hst.Plan())
    with pytest.raises(hst.Failed) as failed:
        public.server_in(reply)
    assert failed.value.reason.kind is kind


def public_side(version: str, visit_token: str | None, status: int) -> hst.PublicSide:
    """The public side of a hub that answers with this status when asked for a token for ann."""
    wire = OtherHub({"/hub/api/users/ann/tokens": (status, {"token": "anns-own"})})
    session = hst.HubSession("the-first", wire)
    plan = hst.Plan(visit=True, visit_token=hst.Secret(visit_token) if visit_token else None)
    return hst.PublicSide(hst.Hub(ENDPOINT, session.clone(own_stop=True), version), plan)


@pytest.mark.parametrize(
    ("version", "visit_token", "status", "token"),
    [
        ("6.1.1", None, 201, "the-first"),
        ("6.1.1", "the-second", 201, "the-second"),
        ("1.5.1", None, 200, "anns-own"),
        ("1.5.1", "the-second", 201, "anns-own"),
    ],
)
def test_the_visit_token_enters_servers_and_on_1x_the_users(
    version: str, visit_token: str | None, status: int, token: str
) -> None:
    public = public_side(version, visit_token, status)
    browser = public.browser("ann")
    assert (browser.token, browser.headers["Authorization"]) == (token, f"token {token}")
    hubs = public._hub.session
    assert browser.traffic is public.traffic is not hubs.traffic and browser.stopping is hubs.stopping


@pytest.mark.parametrize(("status", "text"), [(403, "403"), (503, "something in front of the hub answered 503")])
def test_on_1x_no_other_token_enters_a_server(status: int, text: str) -> None:
    with pytest.raises(hst.Failed) as failed:
        public_side("1.5.1", "the-second", status).browser("ann")
    assert failed.value.reason == Reason(Kind.REFUSED, f"the hub made no token for the user ({text})")


@pytest.mark.parametrize(
    ("version", "scopes", "options", "fine"),
    [
        ("6.1.1", ["access:servers"], {"visit": True}, True),
        ("2.3.1", ["servers", "access:servers"], {"work": True}, True),
        ("6.1.1", ["servers"], {"visit": True}, False),
        ("6.1.1", ["access:servers!group=hst"], {"visit": True}, False),  # servers cannot resolve groups
        ("6.1.1", ["access:servers!user=ann"], {"work": True}, False),
        ("6.1.1", None, {"visit": True}, False),
        ("6.1.1", [], {}, True),  # nobody opens anything
        ("1.5.1", None, {"visit": True}, True),  # where nothing tells
    ],
)
def test_the_token_for_visits_has_to_enter_all_servers(
    version: str, scopes: list[str] | None, options: dict[str, Any], fine: bool
) -> None:
    wire = OtherHub({"/hub/api/user": (200, {"name": "x"} | ({} if scopes is None else {"scopes": scopes}))})
    hub = hst.Hub(ENDPOINT, hst.HubSession("x", wire), version)
    with contextlib.nullcontext() if fine else pytest.raises(hst.SetupError, match="lacks what visits need"):
        hst.check_visits(hub, hst.Plan(**options))
    assert len(wire.asked) == (bool(options) and not version.startswith("1."))


def test_a_token_that_enters_no_servers_is_refused(hub: LocalHub) -> None:
    refusals = {  # by the token for visits
        "": ("The token lacks what visits need: access:servers. ", hst.VISIT_ROLE_TO_PASTE),
        "0" * 32: (f"The hub at {hub.endpoint} refuses the token (GET /user answered 403)", "JUPYTERHUB_VISIT_TOKEN."),
        hub.token: ("The token in JUPYTERHUB_VISIT_TOKEN lacks what visits need: access:servers", ""),
    }
    for token, (begin, end) in refusals.items():
        said = refusal(hub.endpoint, hub.token, work=True, visit_token=hst.Secret(token) if token else None)
        assert said.startswith(begin) and said.endswith(end)
        assert "JUPYTERHUB_VISIT_TOKEN" in said and "0" * 32 not in said


def test_a_visit_token_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused = refused_usage(["stress-test", "--visit"], NOWHERE | {"JUPYTERHUB_VISIT_TOKEN": "a b"}, capsys)
    assert "environment variable JUPYTERHUB_VISIT_TOKEN: expected a token" in refused


def test_the_log_shows_neither_token(logging_as_before: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTERHUB_VISIT_TOKEN", "the-second")
        args = hst.parse_args(["--endpoint", HUB_URL, "--token", "the-first", "stress-test", "--visit"])
    hst.setup_logging(args=args)
    hst.LOG.warning("sent %s and then %s", {"Authorization": "token the-first"}, "the-second")
    assert "sent {'Authorization': 'token ***'} and then ***" in capsys.readouterr().err
    assert "the-second" not in repr(args) + repr(hst.plan_of(args))


def test_work_without_websocket_client_names_the_remedy(bare: dict[str, str]) -> None:
    command = [sys.executable, "-S", str(MODULE), "stress-test", "-c", "2", "--work"]
    done = subprocess.run(command, env=bare | NOWHERE, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "") and "pip install websocket-client" in done.stderr


# ==== Kernels ========================================================================================================


def message(kind: str, parent: str = "mine", **content: Any) -> hst.Json:
    return {"msg_type": kind, "parent_header": {"msg_id": parent}, "content": content}


def state(state: str, parent: str = "mine") -> hst.Json:
    return message("status", parent, execution_state=state)


IDLE, BUSY, OK = state("idle"), state("busy"), message("execute_reply", status="ok")
ERROR = message("error", ename="ZeroDivisionError", evalue="division by zero")
FAILED = message("execute_reply", status="error", ename="ZeroDivisionError")
Frame = tuple[int, bytes] | Exception


class Socket:
    """A websocket on which these frames come: (opcode, data), or an error; then nothing, until the time is up."""

    def __init__(self, clock: TimeTraveller, *frames: Frame) -> None:
        self.frames, self.sent, self.closed = list(frames), list[hst.Json](), False
        self.broken: Exception | None = None
        self._clock, self._timeout_s = clock, 0.0

    def recv_data(self, control_frame: bool) -> tuple[int, bytes]:
        """The next frame; where a frame says `mine`, it has the id of the cell that was sent last."""
        if not self.frames:
            self._clock.pause(self._timeout_s)
            raise TimeoutError
        frame = self.frames.pop(0)
        if isinstance(frame, Exception):
            raise frame
        mine = self.sent[-1]["header"]["msg_id"] if self.sent else ""
        return frame[0], frame[1].replace(b'"mine"', json.dumps(mine).encode())

    def settimeout(self, seconds: float) -> None:
        self._timeout_s = seconds

    def send(self, text: str) -> None:
        self.send_close()
        self.sent.append(json.loads(text))

    def send_close(self) -> None:
        if self.broken:
            raise self.broken

    def shutdown(self) -> None:
        self.closed = True


def text(content: Any) -> tuple[int, bytes]:
    return hst.TEXT, json.dumps(content).encode()


def kernel_on(*frames: Frame) -> tuple[hst.Kernel, Socket]:
    """A kernel behind a websocket on which these frames come, and that websocket."""
    clock = TimeTraveller()
    socket = Socket(clock, *frames)
    return hst.Kernel(socket, clock.clock), socket


@pytest.mark.parametrize(
    ("messages", "ends_with", "error"),
    [
        ([BUSY, OK, IDLE], 3, ""),
        ([BUSY, IDLE, OK], 3, ""),
        ([BUSY, message("execute_result", data={"text/plain": "42"}), IDLE, OK], 4, ""),
        ([BUSY, message("stream", text="x"), OK], None, ""),
        ([BUSY, IDLE], None, ""),
        ([BUSY, state("idle", "theirs"), message("execute_reply", "theirs"), OK], None, ""),
        ([state("idle", "theirs"), OK, IDLE], 3, ""),
        ([OK, IDLE, IDLE], 2, ""),
        ([BUSY, ERROR, FAILED, IDLE], 4, "ZeroDivisionError"),
        ([BUSY, ERROR, IDLE, FAILED], 4, "ZeroDivisionError"),
        ([BUSY, FAILED, IDLE], 3, "ZeroDivisionError"),
        ([message("execute_reply", status="aborted"), IDLE], 2, "aborted"),
        ([message("error", "theirs", ename="ValueError"), OK, IDLE], 3, ""),
        ([{"msg_type": "status", "content": {"execution_state": "idle"}}, OK, IDLE], 3, ""),
        ([{}, OK, IDLE], 3, ""),
    ],
)
def test_a_cell_ends_with_a_reply_and_an_idle_kernel(
    messages: list[hst.Json], ends_with: int | None, error: str
) -> None:
    kernel, socket = kernel_on(*map(text, messages))
    expected = pytest.raises(TimeoutError) if ends_with is None else contextlib.nullcontext()
    with pytest.raises(hst.Failed, match=f"cell 4 raised {error}") if error else expected:
        kernel.run(hst.Code("1/0"), 4, until_s=60.0)
    assert len(socket.frames) == len(messages) - (ends_with or len(messages))


def test_a_cell_that_may_raise_has_not_failed() -> None:
    kernel, _ = kernel_on(text(FAILED), text(IDLE))
    kernel.run(hst.Code("1/0", may_raise=True), 4, until_s=60.0)


@pytest.mark.parametrize(
    ("frames", "trouble"),
    [
        ([], None),
        ([text(state("starting", "theirs"))], None),
        ([text({"header": {"msg_type": "status"}, "content": {"execution_state": "restarting"}})], DIED),
        ([text(state("restarting", ""))], DIED),
        ([text(state("autorestarting", ""))], DIED),
        ([text(state("dead", ""))], DIED),
        ([text(message("shutdown_reply", "theirs"))], Reason(Kind.CELL, "somebody shut the kernel down")),
        ([(hst.CLOSED, b"\x03\xe8")], LOST),
        ([ConnectionResetError()], LOST),
        ([RuntimeError("whatever websocket-client raises")], LOST),
        ([(hst.TEXT, b"no JSON")], LOST),
        ([text([])], LOST),
        ([(2, b"binary frames are not asked for"), text(state("dead"))], DIED),
        ([(9, b"a ping"), text(state("dead"))], DIED),
        ([text(state("dead", "")), (hst.CLOSED, b"")], DIED),  # the first one counts
    ],
)
def test_a_lost_kernel_is_noticed_while_thinking_and_waiting(frames: list[Frame], trouble: Reason | None) -> None:
    for act in (lambda kernel: kernel.listen(60.0), lambda kernel: kernel.run(hst.SIX_TIMES_SEVEN, 1, 60.0)):
        kernel, _ = kernel_on(*frames)
        found = None
        try:
            act(kernel)
        except hst.Failed as failed:
            found = failed.reason
        except TimeoutError:
            pass
        assert found == trouble


def test_each_cell_is_sent_with_an_id_of_its_own() -> None:
    kernel, socket = kernel_on(*map(text, (OK, IDLE, OK, IDLE)))
    for number in (1, 2):
        kernel.run(hst.SIX_TIMES_SEVEN, number, 60.0)
    sent, other = socket.sent
    assert sent["header"]["msg_type"] == "execute_request" and sent["header"]["msg_id"] != other["header"]["msg_id"]
    assert (sent["channel"], sent["content"]["code"], sent["content"]["allow_stdin"]) == ("shell", "6*7", False)


def test_a_broken_connection_fails_the_next_cell_and_closes() -> None:
    kernel, socket = kernel_on()
    socket.broken = BrokenPipeError()
    with pytest.raises(hst.Failed, match="the connection was lost"):
        kernel.run(hst.SIX_TIMES_SEVEN, 1, 60.0)
    kernel.close()
    kernel.abort()  # of which this one knows nothing
    assert socket.closed


def test_websockets_trust_the_authorities_that_requests_would(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(Path(requests.utils.DEFAULT_CA_BUNDLE_PATH).read_bytes())
    usual, file, folder = map(hst.tls_context, (True, str(bundle), str(tmp_path)))
    assert usual.cert_store_stats()["x509_ca"] == file.cert_store_stats()["x509_ca"] > 0
    assert folder.cert_store_stats()["x509_ca"] == 0  # whose files are read when needed
    assert usual.verify_mode == folder.verify_mode == ssl.CERT_REQUIRED
    assert hst.tls_context(False).verify_mode == ssl.CERT_NONE
