"""The rehearsal: what people do is read from files and options, judged, counted and told; then twelve do it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

import hub_stress_test as hst
from hub_stress_test import Event, Kind, Reason
from localhub import LocalHub
from made_up import ENDPOINT, HubWithUsers, TimeTraveller
from made_up_results import results_of
from made_up_results import sentences as told
from tool import (
    MODULE,
    NOWHERE,
    THEIR_ADMIN,
    refused_usage,
    results_in,
    run_for_results,
    run_tool,
    start_tool,
    tool_users,
    wait_until,
)

# ==== The recording of a page ========================================================================================

OURS = "https://hub.example.org/user/alice/"


def entry(url: str, status: Any = 200, method: str = "GET") -> dict[str, Any]:
    return {"request": {"method": method, "url": url}, "response": {"status": status}}


def har(*entries: Any) -> str:
    return json.dumps({"log": {"entries": entries}})


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., list[tuple[str, int]]]:
    """What is taken over of a recording with these entries."""

    def read(*entries: dict[str, Any]) -> list[tuple[str, int]]:
        file = tmp_path / "lab.har"
        file.write_text(har(*entries))
        found = hst.recording(str(file))
        assert found.text == str(file)
        return list(found.parts)

    return read


Recorded = Callable[..., list[tuple[str, int]]]


def test_the_gets_of_a_recording_are_taken_over_in_their_order_with_the_statuses_they_got(recorded: Recorded) -> None:
    entries = [
        entry(OURS + "lab", 302),
        entry(OURS + "static/lab/main.js?v=1"),
        entry(OURS + "api/workspaces", 201, "PUT"),
        entry(OURS + "api/me", 404),
        entry(OURS, 304),
    ]
    assert recorded(*entries) == [("lab", 302), ("static/lab/main.js?v=1", 200), ("api/me", 404), ("", 304)]


@pytest.mark.parametrize(
    "left_out",
    [
        entry("https://cdn.example.org/font.woff"),
        entry("https://hub.example.org/hub/home"),
        entry("https://hub.example.org/hub/user/alice/lab", 302),
        entry("https://hub.example.org/hub/api/users/alice/server/progress"),
        entry("https://hub.example.org/user/bob/lab"),
        entry("https://hub.example.org/user/alice"),
        entry(OURS + "api/contents", 201, "POST"),
        entry(OURS + "api/events/subscribe", 101),
        entry(OURS + "static/blocked.js", 0),
        entry("wss://hub.example.org/user/alice/api/kernels/1/channels", 200),
        entry(OURS + "oauth_callback?code=c0de&state=5tate", 302),
        entry("data:font/woff;base64,/user/alice/x"),
    ],
    ids=lambda one: f"{one['request']['method']} {one['request']['url']} {one['response']['status']}",
)
def test_what_is_not_a_get_of_the_persons_server_is_left_out(left_out: dict[str, Any], recorded: Recorded) -> None:
    assert recorded(entry(OURS + "lab"), left_out, entry(OURS + "api/me")) == [("lab", 200), ("api/me", 200)]


def test_the_server_is_the_one_of_whose_files_there_are_most_wherever_the_hub_is(recorded: Recorded) -> None:
    base = "http://127.0.0.1:8000/deep/jupyter/user/"
    names = ["bob", "b%40x.org", "b%40x.org", "bob", "b%40x.org"]
    entries = [entry(f"{base}{name}/lab/{n}") for n, name in enumerate(names)]
    assert recorded(*entries) == [("lab/1", 200), ("lab/2", 200), ("lab/4", 200)]


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("", ""),
        ("?token=5ecret", ""),
        ("?code=5ecret&state=5ecret&_xsrf=5ecret", ""),
        ("?a=1&token=5ecret&a=2&empty=", "?a=1&a=2&empty="),
        ("?content=0&path=a%2Fb%20c&_xsrf=5ecret", "?content=0&path=a%2Fb+c"),
        ("?1700000000000", "?1700000000000="),
        ("#token=5ecret", ""),
    ],
)
def test_no_secret_of_a_recording_is_taken_over(query: str, kept: str, recorded: Recorded) -> None:
    full = entry(OURS + "lab" + query)
    full["request"] |= {"headers": [{"name": "Authorization", "value": "token 5ecret"}], "cookies": [{"v": "5ecret"}]}
    full["response"] |= {"content": {"text": "5ecret"}}
    assert recorded(full) == [(f"lab{kept}", 200)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read as a HAR file (Expecting value"),
        ("{", "cannot be read as a HAR file (Expecting property name"),
        ("[]", "cannot be read as a HAR file"),
        ('{"log": {}}', "cannot be read as a HAR file ('entries')"),
        ('{"schema": 1}', "cannot be read as a HAR file ('log')"),
        (har({"request": {}}), "cannot be read as a HAR file"),
        (har("nonsense"), "cannot be read as a HAR file"),
        (har(entry(OURS, None)), "cannot be read as a HAR file"),
        (har(entry(OURS, "200")), "cannot be read as a HAR file"),
        (har({"request": {"method": "GET", "url": 7}, "response": {"status": 200}}), "cannot be read as a HAR file"),
        (har(entry("http://[/user/x/")), "cannot be read as a HAR file"),
        (har(), "holds no GET below /user/NAME/: record the page of a person's server"),
        (har(entry("https://www.example.org/")), "holds no GET below /user/NAME/"),
        (har(entry(OURS + "lab", 200, "POST")), "holds no GET below /user/NAME/"),
        (har(entry(OURS + "oauth_callback", 302)), "holds no GET below /user/NAME/"),
        ("\xff", "cannot be read as a HAR file"),
        (None, "cannot be read as a HAR file (No such file"),
    ],
)
def test_a_file_that_is_no_recording_of_a_server_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "lab.har"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        hst.recording(str(file))
    assert str(refused.value).startswith(f"{file} {said}")


def test_a_recording_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "lab.har").write_text(har(entry(OURS + "lab")), encoding="utf-8-sig")
    assert hst.recording(str(tmp_path / "lab.har")).parts == (("lab", 200),)


# ==== Notebooks ======================================================================================================


def cell(source: Any, kind: str = "code", **metadata: Any) -> dict[str, Any]:
    return {"cell_type": kind, "source": source, "metadata": metadata, "outputs": []}


def ipynb(*cells: Any) -> str:
    return json.dumps({"cells": cells, "nbformat": 4})


SCRIPT = """\
# ---
# jupyter: {}
# ---
# %% [markdown]
# # A class

# %%
import time
print(1)

# %% a title
# only a comment
# %% [raw]
not_python
# %% [md]
# text
# %% tags=["raises-exception"]
1 / 0
# %%

# %% last
  
"""


@pytest.mark.parametrize(
    ("name", "content", "cells"),
    [
        ("a.ipynb", ipynb(cell("1+1")), [("1+1", False)]),
        ("a.ipynb", ipynb(cell(["a = 1\n", "a"])), [("a = 1\na", False)]),
        ("a.ipynb", ipynb(cell("# Title", "markdown"), cell("x", "raw"), cell("2")), [("2", False)]),
        ("a.ipynb", ipynb(cell(""), cell(" \n"), cell([]), cell("3")), [("3", False)]),
        ("a.ipynb", ipynb(cell("1/0", tags=["slow", "raises-exception"])), [("1/0", True)]),
        ("a.ipynb", ipynb(cell("1/0", tags=["slow"]), cell("2")), [("1/0", False), ("2", False)]),
        ("a.ipynb", ipynb({"cell_type": "code", "source": "4"}), [("4", False)]),
        ("a.py", "# %%\n1+1\n", [("1+1\n", False)]),
        ("a.py", "\ufeff# %%\n1+1\n# %%\n2", [("1+1\n", False), ("2", False)]),
        ("a.py", "x = 1  # %% not here\n# %%\r\nx\r\n", [("x = 1  # %% not here\n", False), ("x\n", False)]),
        ("a.py", "# the title\n\n#%%\nx\n", [("x\n", False)]),
        ("class.py", SCRIPT, [("import time\nprint(1)\n\n", False), ("# only a comment\n", False), ("1 / 0\n", True)]),
    ],
)
def test_the_code_cells_of_a_notebook_are_read_in_order(
    name: str, content: str, cells: list[tuple[str, bool]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = hst.notebook(str(tmp_path / name))
    assert found == hst.Given(str(tmp_path / name), tuple(hst.Code(*each) for each in cells))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.ipynb", ipynb(), "has no code cells"),
        ("a.ipynb", ipynb(cell("# Title", "markdown"), cell("  ")), "has no code cells"),
        ("a.py", "print(1)\n", "has no code cells (in a Python file, # %% begins one)"),
        ("a.py", "# %% [markdown]\n# text\n", "has no code cells"),
        ("a.py", "", "has no code cells"),
        ("a.ipynb", "", "cannot be read as a notebook (Expecting value"),
        ("a.ipynb", "{", "cannot be read as a notebook (Expecting property name"),
        ("a.ipynb", "[]", "cannot be read as a notebook"),
        ("a.ipynb", "{}", "cannot be read as a notebook ('cells')"),
        ("a.ipynb", '{"cells": [7]}', "cannot be read as a notebook"),
        ("a.ipynb", '{"cells": null}', "cannot be read as a notebook"),
        ("a.ipynb", ipynb(cell(7)), "cannot be read as a notebook"),
        ("a.ipynb", ipynb(cell("1") | {"metadata": None}), "cannot be read as a notebook"),
        ("a.ipynb", ipynb({"cell_type": "code"}), "cannot be read as a notebook ('source')"),
        ("a.py", "\xff", "cannot be read as a notebook"),
        ("a.py", None, "cannot be read as a notebook (No such file"),
    ],
)
def test_a_file_without_code_cells_is_refused(name: str, content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        hst.notebook(str(file))
    assert str(refused.value).startswith(f"{file} {said}")


# ==== The way to a person's server ===================================================================================

NO_ROUTE = Reason(Kind.ROUTE, hst.NO_ROUTE)


def answer(status: int, location: str | None = None, data: Any = None, message: str = "") -> hst.Reply:
    return hst.Reply(status, 0.0, 0.1, data, message, location=location)


@pytest.mark.parametrize(
    ("reply", "reason", "final"),
    [
        (answer(200), None, True),
        (answer(0, message="connection refused"), Reason(Kind.ROUTE, "no page: connection refused"), False),
        (answer(302, "/jupyter/hub/user/ann/lab"), NO_ROUTE, False),
        (answer(302, "https://hub.example.org/hub/user/ann/"), NO_ROUTE, False),
        (answer(302, "/hub/login?next=%2Fhub%2F"), NO_ROUTE, False),
        (
            answer(302, "/jupyter/hub/api/oauth2/authorize?client_id=jupyterhub-user-ann&state=x"),
            Reason(Kind.REFUSED, "the server does not know the token (302 to log in)"),
            True,
        ),
        (
            answer(302, "https://sso.example.org/auth?next=/hub/"),
            Reason(Kind.ROUTE, "the page redirects elsewhere (302)"),
            True,
        ),
        (answer(307, "https://other.example.org/"), Reason(Kind.ROUTE, "the page redirects elsewhere (307)"), True),
        (
            answer(403, data={"message": "Forbidden"}, message="Forbidden"),
            Reason(Kind.REFUSED, "the server does not let the token in (403: does it have access:servers?)"),
            True,
        ),
        (answer(503, message="not JSON but text/html"), Reason(Kind.ROUTE, "nobody listens there (503)"), False),
        (answer(404), Reason(Kind.ROUTE, "the server's page was answered 404"), False),
        (
            dataclasses.replace(answer(404), version="6.1.1"),
            Reason(Kind.ROUTE, "the server's page was answered 404"),
            True,
        ),
        (
            answer(500, message="Failed to connect to Hub API"),
            Reason(Kind.ROUTE, "the server's page was answered 500"),
            False,
        ),
        (answer(502), Reason(Kind.ROUTE, "the server's page was answered 502"), False),
        (answer(504), Reason(Kind.ROUTE, "the server's page was answered 504"), False),
        (answer(424), Reason(Kind.ROUTE, "the server's page was answered 424"), False),
    ],
    ids=lambda one: f"{one.status} {one.location or ''}" if isinstance(one, hst.Reply) else None,
)
def test_what_a_visit_was_answered_is_a_page_or_a_reason_and_final_or_tried_again(
    reply: hst.Reply, reason: Reason | None, final: bool
) -> None:
    assert judged(reply) == (reason, final)


def judged(reply: hst.Reply, url: str = "", hub_version: str = "") -> tuple[Reason | None, bool]:
    """Why an answer is not the page that was asked for, and whether it is final."""
    try:
        hst.judge_visit(reply, url, hub_version)
    except hst.Failed as failed:
        return failed.reason, failed.final
    return None, True


IN_TLS = "https://hub.example.org/user/ann/"
TO_HTTP = Reason(Kind.ROUTE, "a redirect to http: the proxy does not pass X-Forwarded-Proto")
TO_ELSEWHERE = Reason(Kind.ROUTE, "the page redirects elsewhere (302)")


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
    assert judged(answer(302, location), IN_TLS, "6.1.1")[0] == reason
    assert judged(answer(302, location), "http://hub.example.org/user/ann/")[0] != TO_HTTP


def public_side(endpoint: str, **options: Any) -> hst.PublicSide:
    return hst.PublicSide(hst.Hub(endpoint, hst.HubSession("t", HubWithUsers())), hst.Plan(**options))


def model(url: str | None, **more: Any) -> hst.Reply:
    server = {"pending": None, "ready": True} | ({} if url is None else {"url": url})
    return answer(200, data={"name": "ann", "servers": {"": server}} | more)


HUB_URL = "https://hub.example.org/hub/api"


@pytest.mark.parametrize(
    ("endpoint", "public_url", "reply", "url"),
    [
        (HUB_URL, None, model("/user/ann/"), "https://hub.example.org/user/ann/"),
        (HUB_URL, None, model("/user/b%40x.org/"), "https://hub.example.org/user/b%40x.org/"),
        ("http://h:8000/deep/hub/api", None, model("/deep/user/ann/"), "http://h:8000/deep/user/ann/"),
        (HUB_URL, None, model("https://ann.hub.example.org/user/ann/"), "https://ann.hub.example.org/user/ann/"),
        (HUB_URL, None, model(None, server="/user/ann/"), "https://hub.example.org/user/ann/"),  # hubs of old
        (HUB_URL, None, model("https://evil.example.org/user/ann/"), None),
        (HUB_URL, None, model("//evil.example.org/user/ann/"), None),
        (HUB_URL, None, model("https://evilhub.example.org/user/ann/"), None),
        (HUB_URL, None, model("https://hub.example.org.evil.org/user/ann/"), None),
        (HUB_URL, None, model("http://hub.example.org/user/ann/"), None),  # the token is not sent in clear
        (HUB_URL, None, model("https://hub.example.org@evil.org/user/ann/"), None),
        (HUB_URL, None, model(None, server=None), None),
        (HUB_URL, None, model(None), None),
        ("http://hub:8081/hub/api", "http://proxy-public", model("/user/ann/"), "http://proxy-public/user/ann/"),
        ("http://hub:8081/hub/api", None, model("/user/ann/"), "http://hub:8081/user/ann/"),
        ("http://hub:8081/jh/hub/api", "https://x.org/jh", model("/jh/user/ann/"), "https://x.org/jh/user/ann/"),
        (
            "http://hub:8081/hub/api",
            "https://x.org",
            model("https://ann.x.org/user/ann/"),
            "https://ann.x.org/user/ann/",
        ),
        (HUB_URL, None, answer(200, data={"name": "ann", "servers": {}}), None),
        (HUB_URL, None, answer(200, data={"servers": {"": {"pending": "spawn", "url": "/user/ann/"}}}), None),
        (HUB_URL, None, answer(404, data={"status": 404}), None),
        (HUB_URL, None, answer(0), None),
    ],
)
def test_the_servers_url_is_what_the_hub_says_below_the_public_base_and_on_no_other_host(
    endpoint: str, public_url: str | None, reply: hst.Reply, url: str | None
) -> None:
    with contextlib.nullcontext() if url else pytest.raises(hst.Failed):
        assert public_side(endpoint, public_url=public_url).server_in(reply) == url


class HubThatMakesTokens(HubWithUsers):
    """A simulated hub that makes tokens for users, or (status) does not."""

    def __init__(self, status: int) -> None:
        super().__init__(["ann"])
        self.status = status

    def _answer(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        if path == ["users", "ann", "tokens"]:
            return self.status, {"token": "anns-own"}
        return super()._answer(method, path, body)


@pytest.mark.parametrize(
    ("version", "visit_token", "status", "token"),
    [
        ("6.1.1", None, 201, "the-first"),
        ("6.1.1", "the-second", 201, "the-second"),
        ("1.5.1", None, 200, "anns-own"),
        ("1.5.1", "the-second", 201, "anns-own"),
    ],
)
def test_servers_are_entered_with_the_token_for_visits_and_on_1x_with_one_of_the_users_own(
    version: str, visit_token: str | None, status: int, token: str
) -> None:
    hub = hst.Hub(ENDPOINT, hst.HubSession("the-first", HubThatMakesTokens(status)), version)
    plan = hst.Plan(visit=True, visit_token=hst.Secret(visit_token) if visit_token else None)
    public = hst.PublicSide(hub, plan)
    browser = public.browser("ann")
    assert (browser.token, browser.headers["Authorization"]) == (token, f"token {token}")
    assert browser.traffic is public.traffic is not hub.session.traffic
    assert browser.stopping is hub.session.stopping


@pytest.mark.parametrize(
    ("status", "said"), [(403, "403"), (500, "500"), (503, "something in front of the hub answered 503")]
)
def test_on_1x_nobody_elses_token_enters_a_server_when_the_hub_makes_none(status: int, said: str) -> None:
    hub = hst.Hub(ENDPOINT, hst.HubSession("the-first", HubThatMakesTokens(status)).clone(own_stop=True), "1.5.1")
    public = hst.PublicSide(hub, hst.Plan(visit=True, visit_token=hst.Secret("the-second")))
    with pytest.raises(hst.Failed) as failed:
        public.browser("ann")
    assert failed.value.reason == Reason(Kind.REFUSED, f"the hub made no token for the user ({said})")


class Site(HubWithUsers):
    """A hub with ann, and the pages of her server: answers by path, and with which token each was asked for."""

    def __init__(self, pages: dict[str, tuple[int, str]]) -> None:
        super().__init__(["ann"])
        self._users["ann"]["servers"] = {"": {"ready": True, "pending": None, "url": "/user/ann/"}}
        self.pages, self.came = pages, list[str]()

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        url = request.url or ""
        if "/hub/api/" in url:
            return super().send(request, *args, **kwargs)
        self.came.append(url)
        response = super().send(request, *args, **kwargs)
        response.status_code, location = self.pages[url.removeprefix("http://x")]
        headers = {"X-JupyterHub-Version": "6.1.1"} | ({"Location": location} if location else {})
        response.headers = requests.structures.CaseInsensitiveDict(headers)
        return response


@pytest.mark.parametrize(
    ("pages", "came", "reason"),
    [
        ({"/user/ann/": (302, "/user/ann/lab?"), "/user/ann/lab": (200, "")}, 2, None),
        ({"/user/ann/": (302, "lab"), "/user/ann/lab": (302, "tree"), "/user/ann/tree": (200, "")}, 3, None),
        ({"/user/ann/": (302, "//evil.org/user/ann/")}, 1, Reason(Kind.ROUTE, "the page redirects elsewhere (302)")),
        ({"/user/ann/": (302, "/user/annabel/")}, 1, Reason(Kind.ROUTE, "the page redirects elsewhere (302)")),
        ({"/user/ann/": (302, "/user/ann/")}, 5, Reason(Kind.ROUTE, "the page redirects elsewhere (302)")),
        ({"/user/ann/": (302, "/hub/user/ann/")}, 1, NO_ROUTE),
    ],
    ids=["to the page", "twice", "to another host", "to another user", "in a circle", "to the hub"],
)
def test_only_redirects_below_the_servers_url_are_followed(
    pages: dict[str, tuple[int, str]], came: int, reason: Reason | None
) -> None:
    wire = Site(pages)
    site = hst.Site(hst.Hub(ENDPOINT, hst.HubSession("x", wire), "6.1.1"), hst.Plan(visit=True), hst.new_recorder())
    person, found = hst.Visitor("ann", 0.0, site.plan, site), None
    try:
        hst.open_page(person, hst.Event("visit", "ann", 0.0, 0.0), person.clock() + 30.0)
    except hst.Failed as failed:
        found = failed.reason
    assert (len(wire.came), found) == (came, reason)
    assert all(url.startswith("http://x/user/ann/") for url in wire.came)


# ==== Kernels ========================================================================================================


def message(kind: str, parent: str = "mine", **content: Any) -> hst.Json:
    return {"msg_type": kind, "parent_header": {"msg_id": parent}, "content": content}


IDLE = message("status", execution_state="idle")
BUSY = message("status", execution_state="busy")
OK = message("execute_reply", status="ok")
ERROR = message("error", ename="ZeroDivisionError", evalue="division by zero")
FAILED = message("execute_reply", status="error", ename="ZeroDivisionError")


class Socket:
    """A websocket on which these frames come: (opcode, data), or an error; then nothing, until the time is up."""

    def __init__(self, clock: TimeTraveller, *frames: tuple[int, bytes] | Exception) -> None:
        self.frames, self.sent = list(frames), list[hst.Json]()
        self.closed = False
        self.broken: Exception | None = None
        self._clock, self._timeout_s = clock, 0.0

    def recv_data(self, control_frame: bool) -> tuple[int, bytes]:
        """The next frame; a cell is called as the last one that was sent where a frame says `mine`."""
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
        if self.broken:
            raise self.broken
        self.sent.append(json.loads(text))

    def send_close(self) -> None:
        if self.broken:
            raise self.broken

    def shutdown(self) -> None:
        self.closed = True


def text(one: Any) -> tuple[int, bytes]:
    return hst.TEXT, json.dumps(one).encode()


def kernel_on(*frames: tuple[int, bytes] | Exception) -> tuple[hst.Kernel, Socket]:
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
        ([BUSY, message("status", "theirs", execution_state="idle"), message("execute_reply", "theirs"), OK], None, ""),
        ([message("status", "theirs", execution_state="idle"), OK, IDLE], 3, ""),
        ([OK, IDLE, message("status", execution_state="idle")], 2, ""),
        ([BUSY, ERROR, FAILED, IDLE], 4, "ZeroDivisionError"),
        ([BUSY, ERROR, IDLE, FAILED], 4, "ZeroDivisionError"),
        ([BUSY, FAILED, IDLE], 3, "ZeroDivisionError"),
        ([message("execute_reply", status="aborted"), IDLE], 2, "aborted"),
        ([message("error", "theirs", ename="ValueError"), OK, IDLE], 3, ""),
        ([{"msg_type": "status", "content": {"execution_state": "idle"}}, OK, IDLE], 3, ""),
        ([{}, OK, IDLE], 3, ""),
    ],
)
def test_a_cell_has_ended_when_the_kernel_has_replied_and_is_idle_in_whatever_order(
    messages: list[hst.Json], ends_with: int | None, error: str
) -> None:
    kernel, socket = kernel_on(*map(text, messages))
    expected = pytest.raises(TimeoutError) if ends_with is None else contextlib.nullcontext()
    if error:
        expected = pytest.raises(hst.Failed, match=f"cell 4 raised {error}")
    with expected:
        kernel.run(hst.Code("1/0"), 4, until_s=60.0)
    assert len(socket.frames) == len(messages) - (ends_with or len(messages))


def test_a_cell_that_may_raise_has_not_failed() -> None:
    kernel, _ = kernel_on(text(FAILED), text(IDLE))
    kernel.run(hst.Code("1/0", may_raise=True), 4, until_s=60.0)


DIED = Reason(Kind.KERNEL, "the kernel died")
CONNECTION_LOST = Reason(Kind.WEBSOCKET, "the connection was lost")


@pytest.mark.parametrize(
    ("frames", "trouble"),
    [
        ([], None),
        ([text(message("status", "theirs", execution_state="starting"))], None),
        ([text({"header": {"msg_type": "status"}, "content": {"execution_state": "restarting"}})], DIED),
        ([text(message("status", "", execution_state="restarting"))], DIED),
        ([text(message("status", "", execution_state="autorestarting"))], DIED),
        ([text(message("status", "", execution_state="dead"))], DIED),
        (
            [text(message("shutdown_reply", "theirs", restart=False))],
            Reason(Kind.CELL, "somebody shut the kernel down"),
        ),
        ([(hst.CLOSED, b"\x03\xe8")], CONNECTION_LOST),
        ([ConnectionResetError()], CONNECTION_LOST),
        ([RuntimeError("whatever websocket-client raises")], CONNECTION_LOST),
        ([(hst.TEXT, b"no JSON")], CONNECTION_LOST),
        ([text([])], CONNECTION_LOST),
        ([(2, b"binary frames are not asked for"), text(message("status", execution_state="dead"))], DIED),
        ([(9, b"a ping"), text(message("status", execution_state="dead"))], DIED),
        ([text(message("status", "", execution_state="dead")), (hst.CLOSED, b"")], DIED),  # the first one counts
    ],
)
def test_a_kernel_that_died_or_a_connection_that_was_lost_is_noticed_by_who_thinks_or_waits(
    frames: list[tuple[int, bytes] | Exception], trouble: Reason | None
) -> None:
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


def test_a_cell_is_sent_to_the_kernel_with_an_id_of_its_own() -> None:
    kernel, socket = kernel_on(text(OK), text(IDLE), text(OK), text(IDLE))
    kernel.run(hst.SIX_TIMES_SEVEN, 1, 60.0)
    kernel.run(hst.SIX_TIMES_SEVEN, 2, 60.0)
    sent, other = socket.sent
    assert sent["header"]["msg_type"] == "execute_request" and sent["header"]["msg_id"] != other["header"]["msg_id"]
    assert (sent["channel"], sent["content"]["code"], sent["content"]["allow_stdin"]) == ("shell", "6*7", False)


def test_a_cell_that_cannot_be_sent_has_lost_its_connection() -> None:
    kernel, socket = kernel_on()
    socket.broken = BrokenPipeError()
    with pytest.raises(hst.Failed, match="the connection was lost"):
        kernel.run(hst.SIX_TIMES_SEVEN, 1, 60.0)


def test_websockets_trust_the_authorities_that_requests_would(tmp_path: Path) -> None:
    ours = requests.utils.DEFAULT_CA_BUNDLE_PATH
    (tmp_path / "bundle.pem").write_bytes(Path(ours).read_bytes())
    known = hst.tls_context(True).cert_store_stats()["x509_ca"]
    assert hst.tls_context(str(tmp_path / "bundle.pem")).cert_store_stats()["x509_ca"] == known > 0
    in_folder = hst.tls_context(str(tmp_path))  # REQUESTS_CA_BUNDLE may name a folder, which is read when needed
    assert in_folder.cert_store_stats()["x509_ca"] == 0
    assert {hst.tls_context(True).verify_mode, in_folder.verify_mode} == {ssl.CERT_REQUIRED}
    assert hst.tls_context(False).verify_mode == ssl.CERT_NONE


@pytest.mark.parametrize("broken", [None, BrokenPipeError()])
def test_a_connection_can_be_closed_also_when_it_is_broken(broken: Exception | None) -> None:
    kernel, socket = kernel_on()
    socket.broken = broken
    kernel.close()
    kernel.abort()  # of which this one knows nothing
    assert socket.closed


# ==== What became of the people ======================================================================================


def did(step: str, number: int, ended_s: float, reason: Reason | None = None, message: str = "") -> Event:
    """One step of a person, from the beginning of the run."""
    return Event(step, hst.username(number), 0.0, 0.0, ended_s, reason, message=message)


def leaves(number: int, at_s: float) -> Event:
    """A server that its person stops, which takes half a second."""
    return Event("stop_server", hst.username(number), at_s, at_s, at_s + 0.5)


def got_to_work(number: int, at_s: float = 4.0) -> list[Event]:
    """Somebody whose server was ready after one second, opened after two, and who works since so many."""
    steps = {"server_ready": 1.0, "visit": 2.0, "kernel_ready": at_s, "at_work": at_s}
    return [did(step, number, ended_s) for step, ended_s in steps.items()]


UNREADY = Reason(Kind.SPAWN, "no node is free")
NOBODY = Reason(Kind.ROUTE, "nobody listens there (503)")
RAISED = Reason(Kind.CELL, "cell 4 raised MemoryError")
LOST = Reason(Kind.LOST, "it became ready, and was gone while it was held")
PEOPLE: dict[str, list[Event]] = {
    "works": got_to_work(1),
    "works and stays": [*got_to_work(2, 6.0), did("cell", 2, 9.0), did("stay", 2, 20.0)],
    "never ready": [did("start_server", 3, 0.5), did("server_ready", 3, 3.0, UNREADY)],
    "no page": [did("server_ready", 4, 1.0), did("visit", 4, 31.0, NOBODY, message="not JSON but text/html")],
    "a cell fails": [*got_to_work(5), did("cell", 5, 10.0, RAISED)],
    "lost": [*got_to_work(6), did("stay", 6, 20.0, LOST)],
    "cut short": [did("server_ready", 7, 1.0)],
    "just asked": [did("start_server", 8, 0.5)],
}


def rehearsed(*who: str, expected: int = 0, cut_short: bool = False, **more: Any) -> hst.Results:
    """The results of a run in which these came."""
    events = [event for each in who for event in PEOPLE[each]]
    record = hst.new_recorder()
    for event in events:
        record.add(event)
    people = hst.people_of(record.people, expected or len(who), cut_short)
    plan = hst.Plan(count=people.expected, work=True, within_s=300.0)
    return results_of(events, people.expected, people=people, failed=people.failed, options=plan.options(), **more)


@pytest.mark.parametrize(
    ("who", "expected", "at_work", "failed", "reasons"),
    [
        (["works"], 1, 1, 0, {}),
        (["works", "works and stays"], 2, 2, 0, {}),
        ([], 3, 0, 3, {"never came": 3}),
        (["works"], 3, 1, 2, {"never came": 2}),
        (["never ready", "no page"], 2, 0, 2, {UNREADY.text: 1, NOBODY.text: 1}),
        (["a cell fails"], 1, 1, 1, {RAISED.text: 1}),
        (["lost", "works"], 2, 2, 1, {LOST.text: 1}),
        (["works", "cut short", "just asked"], 4, 1, 3, {"never came": 3}),
        (list(PEOPLE), 10, 4, 8, {"never came": 4} | {one.text: 1 for one in (UNREADY, NOBODY, RAISED, LOST)}),
    ],
)
def test_people_are_at_work_or_failed_once_each_and_both_when_they_failed_afterwards(
    who: list[str], expected: int, at_work: int, failed: int, reasons: dict[str, int]
) -> None:
    people = rehearsed(*who, expected=expected).people
    assert people
    assert (people.expected, people.at_work, people.failed) == (expected, at_work, failed)
    assert people.reasons == reasons and sum(people.reasons.values()) == people.failed
    assert [people.reasons[one.reason] for one in people.failures] == [1] * len(people.failures)


def test_a_person_with_several_failed_steps_fails_for_the_first_of_them_with_its_last_word() -> None:
    people = rehearsed("no page").people
    assert people and people.failures == [hst.Failure(hst.username(4), NOBODY.text, "not JSON but text/html", 31.0)]
    row = {"cell": did("cell", 1, 5.0, RAISED), "stay": did("stay", 1, 9.0, LOST)}
    assert hst.people_of({"x": row}, 1, False).reasons == {RAISED.text: 1}


def test_of_a_run_that_was_cut_short_people_may_never_have_come() -> None:
    people = rehearsed("works", "cut short", expected=3, cut_short=True).people
    assert people and people.reasons == {"cut short before getting to work": 2}


@pytest.mark.parametrize(
    ("who", "expected", "verdict"),
    [
        (["works"], 1, "1 of 1 person got to work; half waited 4.00 s, the slowest 4.00 s"),
        (["works", "works and stays"], 2, "2 of 2 people got to work; half waited 4.01 s, the slowest 6.00 s"),
        (["never ready"], 1, "0 of 1 person got to work"),
        (
            ["works", "no page"],
            3,
            "1 of 3 people got to work, 1 failed, 1 not begun; half waited 4.00 s, the slowest 4.00 s",
        ),
        (
            ["works", "lost"],
            2,
            "2 of 2 people got to work; 1 failed afterwards; half waited 4.00 s, the slowest 4.00 s",
        ),
        (
            ["works", "cut short"],
            9,
            "1 of 9 people got to work, 0 failed, 1 under way, 7 not begun; half waited 4.00 s, the slowest 4.00 s",
        ),
    ],
)
def test_the_verdict_of_a_rehearsal_counts_people(who: list[str], expected: int, verdict: str) -> None:
    assert hst.verdict_of(rehearsed(*who, expected=expected))[1] == verdict


def test_the_summary_of_a_rehearsal_tells_of_people_each_failure_once_and_of_requests_to_servers() -> None:
    servers = hst.Http(1234, 5, 0, {"101": 3, "200": 1226, "503": 5}, 0, 0.0)
    http = hst.Http(100, 0, 0, {"200": 100}, 20, 0.2, servers)
    results = rehearsed(*PEOPLE, expected=10, http=http)
    assert told(results, "servers") == [
        "10 requested, at random moments within 5 min 0 s; 6 ready, 1 failed, 3 not begun, 1 lost"
    ]
    assert told(results, "people") == ["10 expected; 4 at work, 4 failed, 1 under way, 3 not begun"]
    failures = told(results, "failed")
    assert f"1 × {RAISED.text} (hub-stress-test-5), after 10.0 s" in failures
    assert f"1 × {UNREADY.text} (hub-stress-test-3), after 3.00 s" in failures
    assert len(failures) == 4 and not told(results, "errors")
    to_hub, to_servers = told(results, "requests")
    assert to_hub.startswith("100 to the hub (")
    assert to_servers == "1,234 to servers (5 retries): 3 × 101, 1,226 × 200, 5 × 503"


def test_where_the_time_until_work_went_is_told_step_by_step() -> None:
    (sentence,) = told(rehearsed("works", "works and stays"), "where the time went")
    parts = "the server 1.00 s, the start page 2.00 s, the kernel 5.00 s"
    assert sentence == f"people waited 5.00 s on average until they could work: {parts}"


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Kind.ROUTE, "the proxy's log"), (Kind.WEBSOCKET, "has to pass upgrades"), (Kind.KERNEL, "memory limit")],
)
def test_what_to_look_at_next_is_told_by_the_kind_of_failure(kind: Kind, words: str) -> None:
    results = rehearsed("works")
    assert not list(hst.advice(results, []))
    assert any(words in sentence for sentence in hst.advice(results, [kind]))


# ==== The way of each person, for the report =========================================================================


def timeline(*who: str, more: list[Event] | None = None) -> hst.Json:
    record = hst.new_recorder()
    for event in [*(event for each in who for event in PEOPLE[each]), *(more or [])]:
        record.add(event)
    return hst.servers_timeline(record.people, 0.0)


@pytest.mark.parametrize(
    ("broken", "time_out_s"),  # how long each had been open, and when it broke
    [
        ([(60.1, 100.0), (60.0, 110.0), (60.2, 115.0)], 60.1),
        ([(60.1, 100.0), (60.0, 110.0)], None),
        ([(60.1, 100.0), (60.0, 110.0), (45.0, 115.0)], None),
        ([(5.1, 100.0), (5.2, 100.1), (5.0, 100.0)], None),  # came together, and broke together
        ([(60.1, 100.0), (60.0, 110.0), (None, 115.0)], None),
    ],
)
def test_websockets_that_break_equally_old_reveal_a_time_out(
    broken: list[tuple[float | None, float]], time_out_s: float | None
) -> None:
    people = {
        str(n): {"cell": Event("cell", str(n), ended_s, ended_s, ended_s, Reason(Kind.WEBSOCKET, "x", open_s))}
        for n, (open_s, ended_s) in enumerate(broken)
    }
    assert hst.time_out_in_front(people) == time_out_s


def test_the_timeline_has_the_moments_of_each_person() -> None:
    page = [did("page", 1, 3.0), leaves(1, 11.0)]
    line = timeline("works", "no page", "a cell fails", "lost", "never ready", more=page)
    assert line["user"] == [hst.username(n) for n in (1, 4, 5, 6, 3)]
    assert line["opened_s"] == [2.0, None, 2.0, 2.0, None]
    assert line["loaded_s"] == [3.0, None, None, None, None]
    assert line["works_s"] == [4.0, None, 4.0, 4.0, None]
    assert line["failed_s"] == [None, 31.0, 10.0, None, None]  # after they were ready
    assert line["lost_s"] == [None, None, None, 20.0, None]
    assert line["left_s"] == [11.0, None, None, None, None]


LEFT = [leaves(n, 15.0) for n in (1, 3)]  # with --stay all do, those who failed too


@pytest.mark.parametrize(
    ("who", "more", "rows"),
    [
        # at 0.5, 1.5, 5, 16 and 25 s: starting, ready, at work, failed, lost
        (["works"], [], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 1 0 0", "0 0 1 0 0"]),
        (["works"], LEFT[:1], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 0 0 0", "0 0 0 0 0"]),
        (["lost"], [], ["1 0 0 0 0", "0 1 0 0 0", "0 0 1 0 0", "0 0 1 0 0", "0 0 0 0 1"]),
        (["never ready"], LEFT[1:], ["1 0 0 0 0", "1 0 0 0 0", "0 0 0 1 0", "0 0 0 1 0", "0 0 0 1 0"]),
        (["no page"], [], ["1 0 0 0 0", "0 1 0 0 0", "0 1 0 0 0", "0 1 0 0 0", "0 1 0 0 0"]),
        (
            ["works", "lost", "never ready", "no page"],
            LEFT[:2],
            ["4 0 0 0 0", "1 3 0 0 0", "0 1 2 1 0", "0 1 1 1 0", "0 1 0 1 1"],
        ),
    ],
)
def test_curves_count_each_person_in_one_state_at_any_moment(
    who: list[str], more: list[Event], rows: list[str]
) -> None:
    curves = hst.server_curves(timeline(*who, more=more), 30.0, points=60)
    kinds = ("starting", "ready", "at work", "failed", "lost")
    found = [" ".join(str(curves[kind][round(at_s * 2)]) for kind in kinds) for at_s in (0.5, 1.5, 5.0, 16.0, 25.0)]
    assert found == rows
    assert min(min(curves[kind]) for kind in kinds) >= 0


def test_somebody_who_leaves_after_their_server_was_lost_is_counted_once() -> None:
    curves = hst.server_curves(timeline("lost", more=[leaves(6, 21.0)]), 30.0, points=30)
    last = {kind: values[-1] for kind, values in curves.items() if kind != "at_s"}
    assert last == {"waiting": 0, "starting": 0, "ready": 0, "at work": 0, "failed": 0, "lost": 1}


# ==== What is asked for ==============================================================================================

HUB = ["--endpoint", "http://hub.example.org/hub/api", "--token", "t"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recording and a notebook, and some that are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab.har").write_text(har(entry(OURS + "lab")))
    (tmp_path / "class.py").write_text("# %%\n1+1\n")
    (tmp_path / "other.har").write_text(har(entry("https://www.example.org/")))
    (tmp_path / "text.ipynb").write_text(ipynb(cell("# Title", "markdown")))
    return tmp_path


def plan_for(*words: str) -> hst.Plan:
    args = hst.parse_args([*HUB, "stress-test", *words])
    hst.validate(args)
    return hst.plan_of(args)


@pytest.mark.parametrize(
    ("words", "opens"),
    [
        ([], False),
        (["--within", "5m", "--stay", "5m"], False),
        (["--visit"], True),
        (["--page", "lab.har"], True),
        (["--work"], True),
    ],
)
def test_people_open_their_servers_when_a_visit_is_asked_for_or_implied(
    words: list[str], opens: bool, files: Path
) -> None:
    plan = plan_for(*words)
    assert plan.opens is opens
    wanted = {step.name for step in hst.STEPS.values() if step.act and step.wanted(plan)}
    assert ({"visit", "at_work"} <= wanted) is opens
    assert ("page" in wanted, "kernel_ready" in wanted) == ("--page" in words, "--work" in words)


@pytest.mark.parametrize(
    ("options", "due_s"),
    [
        ({}, [0.0, 0.0, 0.0]),
        ({"rate_per_s": 4.0}, [0.0, 0.25, 0.5]),
        ({"within_s": 60.0, "seed": 1}, [8.06, 45.83, 50.85]),
    ],
)
def test_people_arrive_at_a_rate_at_random_moments_or_when_there_is_a_place(
    options: dict[str, Any], due_s: list[float]
) -> None:
    plan = hst.Plan(count=3, **options)
    assert [at_s for at_s, _ in hst.arrivals(plan)] == pytest.approx(due_s, abs=0.01)
    assert plan.is_open == bool(options)


def test_the_options_in_the_results_name_the_files_and_hold_no_token(files: Path) -> None:
    words = ["--page", "lab.har", "--work", "--notebook", "class.py", "--within", "1m", "--seed", "7"]
    plan = dataclasses.replace(plan_for(*words), visit_token=hst.Secret("5ecret"))
    options = json.loads(json.dumps(plan.options()))
    files_named = {"page": "lab.har", "notebook": "class.py"}
    others = {"work": True, "visit": False, "within": 60.0, "seed": 7, "stay": None, "public_url": None}
    assert options | files_named | others == options
    assert "5ecret" not in json.dumps(options) + repr(plan) and "token" not in "".join(options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stay", "1m", "--hold", "1m"], "--stay says when each leaves, and --hold when all do: give one of them"),
        (["--stay", "1m", "--keep"], "--stay ends servers, and --keep leaves them running: give one of them"),
        (["--within", "1m", "--rate", "2"], "--within and --rate both say when people come: give one of them"),
        (["--seed", "7"], "--seed has a meaning only with --within"),
        (["--notebook", "class.py"], "--notebook has a meaning only with --work"),
        (["--think", "10s"], "--think has a meaning only with --work"),
        (["--public-url", "http://x"], "only with --visit, --page, --work or --check-proxy"),
        (["--work", "--notebook", "text.ipynb"], "argument --notebook: text.ipynb has no code cells"),
        (["--work", "--notebook", "none.ipynb"], "argument --notebook: none.ipynb cannot be read as a notebook"),
        (["--page", "other.har"], "argument --page: other.har holds no GET below /user/NAME/"),
        (["--page", "class.py"], "argument --page: class.py cannot be read as a HAR file"),
        (["--public-url", "hub.example.org"], "argument --public-url: expected a URL"),
        (["--within", "soon"], "argument --within: expected a duration"),
        (["--seed", "0", "--within", "1m"], "argument --seed: expected a whole number of at least 1"),
        (["--cell-timeout", "0s"], "argument --cell-timeout: expected a duration"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(
    words: list[str], said: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused_usage(["stress-test", *words], NOWHERE, capsys)


def test_a_visit_token_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused = refused_usage(["stress-test", "--visit"], NOWHERE | {"JUPYTERHUB_VISIT_TOKEN": "a b"}, capsys)
    assert "environment variable JUPYTERHUB_VISIT_TOKEN: expected a token" in refused


def test_work_without_websocket_client_is_refused_with_the_line_that_mends_it(
    bare: dict[str, str], new_hub: LocalHub
) -> None:
    before = new_hub.users()
    command = [sys.executable, "-S", str(MODULE), "stress-test", "-c", "2", "--work"]
    environment = bare | new_hub.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "") and "pip install websocket-client" in done.stderr
    assert new_hub.users() == before


def test_the_log_shows_neither_token(logging_as_before: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTERHUB_VISIT_TOKEN", "the-second")
        args = hst.parse_args([*HUB[:3], "the-first", "stress-test", "--visit"])
    hst.setup_logging(args=args)
    hst.LOG.warning("sent %s and then %s", {"Authorization": "token the-first"}, "the-second")
    said = capsys.readouterr().err
    assert "sent {'Authorization': 'token ***'} and then ***" in said
    assert "the-second" not in repr(args) + repr(hst.plan_of(args))


# ==== The token for visits, checked before anything is made ==========================================================


def check_visits(hub: LocalHub, *words: str, token: str | None = None, visit_token: str | None = None) -> str:
    """The sentence with which the rehearsal is refused, the hub's users untouched."""
    before = hub.users()
    env = {"JUPYTERHUB_VISIT_TOKEN": visit_token} if visit_token else {}
    done = run_tool("stress-test", "-c", "2", *(words or ("--visit",)), hub=hub, env=env)
    assert (done.code, done.stdout) == (3, "")
    assert done.stderr.startswith("hub-stress-test: ") and hub.users() == before
    return done.stderr


def test_a_token_that_may_not_enter_servers_is_refused_with_the_role_and_a_better_way(hub: LocalHub) -> None:
    for words in (["--visit"], ["--work"]):
        said = check_visits(hub, *words)
        assert said.startswith("hub-stress-test: The token lacks what visits need: access:servers. ")
        assert "second service this scope alone" in said and "JUPYTERHUB_VISIT_TOKEN" in said
        assert said.rstrip().endswith(hst.VISIT_ROLE_TO_PASTE)


def test_a_second_token_that_the_hub_refuses_or_that_may_not_enter_servers_is_told_by_its_variable(
    new_hub: LocalHub,
) -> None:
    said = check_visits(new_hub, visit_token="0" * 32)
    assert f"The hub at {new_hub.endpoint} refuses the token (GET /user answered 403)" in said
    assert said.endswith("into JUPYTERHUB_VISIT_TOKEN.\n") and "0" * 32 not in said
    said = check_visits(new_hub, visit_token=new_hub.token)
    assert "The token in JUPYTERHUB_VISIT_TOKEN lacks what visits need: access:servers" in said


class HubOfScopes(HubWithUsers):
    """A simulated hub whose tokens have these scopes."""

    def __init__(self, scopes: list[str] | None) -> None:
        super().__init__()
        self.scopes = scopes

    def _answer(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        if path == ["user"]:
            return 200, {"name": "x"} | ({} if self.scopes is None else {"scopes": self.scopes})
        return super()._answer(method, path, body)


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
def test_the_token_for_visits_has_to_enter_all_servers_when_people_open_theirs(
    version: str, scopes: list[str] | None, options: dict[str, Any], fine: bool
) -> None:
    wire = HubOfScopes(scopes)
    hub = hst.Hub(ENDPOINT, hst.HubSession("x", wire), version)
    before = len(wire.asked)
    if fine:
        hst.check_visits(hub, hst.Plan(**options))
    else:
        with pytest.raises(hst.SetupError, match="lacks what visits need"):
            hst.check_visits(hub, hst.Plan(**options))
    asked = bool(options) and not version.startswith("1.")
    assert len(wire.asked) - before == asked


# ==== People on stubs of real servers, behind a real proxy ===========================================================

NOBODY_THERE = {"servers": 0, "kernels": 0, "open_websockets": 0}
FIVE_CELLS = ["x = 1", "6*7", "y = 2", "3 * 14", "z = 3"]


@pytest.fixture(scope="module")
def labs() -> Iterator[LocalHub]:
    """A hub whose servers have pages and kernels: a test leaves it as it found it."""
    with LocalHub(real_proxy=True, stub_labs=True, spawn_s=0.2, admins=(THEIR_ADMIN,)) as hub:
        yield hub


class Witness:
    """What the stubs and the hub saw from here on."""

    def __init__(self, hub: LocalHub) -> None:
        self._hub = hub
        self._before, self._log_before = hub.truth(), hub.log_path.stat().st_size

    @property
    def truth(self) -> dict[str, Any]:
        now, before = self._hub.truth(), self._before["requests"]
        counted = {
            request: {int(status): n - before.get(request, {}).get(status, 0) for status, n in statuses.items()}
            for request, statuses in now["requests"].items()
        }
        requests = {request: {s: n for s, n in statuses.items() if n} for request, statuses in counted.items()}
        requests.pop("GET /api", None)  # which the hub asks, to see whether a server is up
        return now | {
            "cells": now["cells"][len(self._before["cells"]) :],
            "hub_checks": now["hub_checks"] - self._before["hub_checks"],
            "requests": {request: statuses for request, statuses in requests.items() if statuses},
        }

    @property
    def log(self) -> str:
        """What the hub logged."""
        return self._hub.log_path.read_bytes()[self._log_before :].decode()

    def saw(self, http: dict[str, Any]) -> bool:
        """Whether these are the requests that came to servers; websockets are not requests, but kept open."""
        seen = collections.Counter[str]()
        for request, statuses in self.truth["requests"].items():
            if not request.endswith("/channels"):
                seen.update({str(status): n for status, n in statuses.items()})
        return http["statuses"] == seen and http["requests"] == seen.total()

    def left_nothing(self) -> bool:
        truth = self.truth
        return not tool_users(self._hub) and {kind: truth[kind] for kind in NOBODY_THERE} == NOBODY_THERE


@pytest.fixture
def witness(labs: LocalHub) -> Witness:
    return Witness(labs)


def script(folder: Path, *cells: str) -> str:
    """A file with these cells; one that begins with a blank has its title in its first line."""
    file = folder / "class.py"
    file.write_text("".join(f"# %%{cell}\n" if cell.startswith(" ") else f"# %%\n{cell}\n" for cell in cells))
    return str(file)


def has_arrived_as_drawn(found: dict[str, Any]) -> bool:
    """Whether people were due at the moments that the seed in the results draws."""
    options, due_s = found["options"], found["timeline"]["servers"]["due_s"]
    plan = hst.Plan(count=options["count"], within_s=options["within"], seed=options["seed"])
    moments = [at_s for at_s, _ in hst.arrivals(plan)]
    drawn = [at_s - moments[0] for at_s in moments]
    return [at_s - due_s[0] for at_s in due_s] == pytest.approx(drawn, abs=2e-3)


def test_groups_of_an_event_work_or_just_have_a_server(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    students = "[[people]]\nname = 'students'\ncount = 4\nwithin = '1s'\nwork = true\nthink = 0.2\n"
    guests = "[[people]]\nname = 'guests'\nrate = '3:1s'\nafter = 1\nstay = 1\n"
    (tmp_path / "event.toml").write_text(f"hold = '2s'\n{students}notebook = 'class.py'\n{guests}")
    script(tmp_path, *FIVE_CELLS)
    words = ("stress-test", "--event", str(tmp_path / "event.toml"))
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0, done
    counts = {name: one["count"] for name, one in found["operations"].items()}
    expected = {"server_ready": 7, "visit": 4, "kernel_ready": 4, "cell": 16, "at_work": 7, "stay": 7}
    assert {name: counts[name] for name in expected} == expected
    of_guests = {name: number for name, number in counts.items() if "guests" in name}
    steps = ("start_server", "server_ready", "at_work", "stay", "stop_server", "delete_user")
    assert of_guests == {f"{step}[guests]": 3 for step in steps}
    left_s = [at_s for at_s in found["timeline"]["servers"]["left_s"] if at_s is not None]
    assert len(left_s) == 3  # the guests, while the students stayed
    means = found["people"]["until_work_s"]
    assert means["at_work"] == pytest.approx(sum(means.values()) - means["at_work"], abs=0.2)
    assert sorted(collections.Counter(cell["kernel"] for cell in witness.truth["cells"]).values()) == [5] * 4
    assert witness.left_nothing()


def test_a_search_for_people_follows_them_to_work_and_keeps_to_so_many_servers(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ("--find-capacity", "--duration", "2s", "--rate", "1", "--max-servers", "5", "--work", "--think", "0.2s")
    cells = ("--notebook", script(tmp_path, *FIVE_CELLS))  # nobody waits for more than the first
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, *cells, hub=labs)
    assert done.code == 0, done
    assert done.summary.startswith(
        "PASSED: this hub takes at least 150 people a minute with at most 5 servers at a time"
    )
    assert [round(2 * step["rate_per_s"]) for step in found["capacity"]["steps"]] == [2, 4, 5]
    assert found["capacity"]["limited_by"] == "--max-servers 5: the hub may take more"
    assert found["operations"]["at_work"]["count"] == 5
    truth = witness.truth
    assert truth["requests"]["POST /api/kernels"] == {201: 11}
    assert witness.saw(found["http"]["servers"]) and witness.left_nothing()


def test_twelve_people_run_a_notebook_and_every_cell_is_counted_as_the_servers_count_it(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ["-c", "12", "--within", "2s", "--work", "--notebook", script(tmp_path, *FIVE_CELLS), "--think", "0.2s"]
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=labs)
    assert done.code == 0, done
    assert done.summary.startswith("PASSED: 12 of 12 people got to work; half waited ")
    means = found["people"].pop("until_work_s")
    counts = {"expected": 12, "at_work": 12, "failed": 0, "under_way": 0, "not_begun": 0}
    assert found["people"] == counts | {"reasons": {}, "failures": []}
    assert means["at_work"] == pytest.approx(
        sum(means.values()) - means["at_work"], abs=0.2
    )  # the steps follow each other
    for step, count in {"server_ready": 12, "visit": 12, "kernel_ready": 12, "at_work": 12, "cell": 48}.items():
        assert (found["operations"][step]["count"], found["operations"][step]["failed"]) == (count, 0), step
    truth = witness.truth
    assert sorted(collections.Counter(cell["kernel"] for cell in truth["cells"]).values()) == [5] * 12
    assert {cell["server"] for cell in truth["cells"]} == {hst.username(n) for n in range(1, 13)}
    assert truth["requests"]["GET /api/kernels/ID/channels"] == {101: 12}
    assert truth["requests"]["POST /api/kernels"] == {201: 12}
    assert witness.saw(found["http"]["servers"])
    assert has_arrived_as_drawn(found)  # with a seed that the tool chose
    assert witness.left_nothing()


def test_servers_see_the_token_for_visits_and_never_the_one_that_makes_users(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    done, found = run_for_results(tmp_path / "r", "stress-test", "-v", "-c", "3", "--work", hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == 3
    assert re.search(r" DEBUG +GET /user/hub-stress-test-1/lab\S*: 200 in ", done.stderr), done.stderr
    assert labs.visit_token not in done.stdout + done.stderr + (tmp_path / "r").read_text()
    asked = re.findall(r"200 GET \S*/hub/api/user \(hub-stress-test(\S*)@", witness.log)
    assert sorted(asked) == ["", *["-visits"] * 4]  # each token is checked once, and then the visits are
    assert witness.truth["hub_checks"] == 3  # a server asks the hub once for each token that it sees
    assert witness.left_nothing()


def test_people_fetch_what_a_browser_fetched_and_fail_when_a_part_of_it_does_not_come(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    page = [("lab", 200), ("static/lab/main.js", 200), ("api/kernelspecs?token=5ecret", 200), ("nonsense", 404)]
    file = tmp_path / "lab.har"
    file.write_text(har(*(entry(OURS + path, status) for path, status in page)))
    words = ("stress-test", "-c", "3", "--within", "1s", "--seed", "7", "--page", str(file))
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == found["operations"]["page"]["count"] == 3
    assert witness.truth["requests"] == {
        "GET /": {302: 3},
        "GET /lab": {200: 6},
        "GET /api/status": {403: 1},  # as a browser asks, once in a run
        "GET /static": {200: 3},
        "GET /api/kernelspecs": {200: 3},
        "GET /nonsense": {404: 3},
    }
    assert witness.saw(found["http"]["servers"])
    assert found["options"]["seed"] == 7 and has_arrived_as_drawn(found)
    file.write_text(har(entry(OURS + "lab"), entry(OURS + "nonsense?x=1")))
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 1 and "3 × a part of the page was answered 404" in done.summary
    assert {one["message"] for one in found["people"]["failures"]} == {"nonsense"}
    assert found["options"]["seed"] == 7 and has_arrived_as_drawn(found)  # the same moments again
    assert witness.left_nothing()


def test_each_person_leaves_after_their_stay_without_waiting_for_the_others(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ("stress-test", "-c", "4", "--within", "3s", "--seed", "2", "--work", "--stay", "1s", "--think", "0.3s")
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == 4
    assert {step: found["operations"][step]["count"] for step in ("stay", "stop_server", "delete_user")} == {
        "stay": 4,
        "stop_server": 4,
        "delete_user": 4,
    }
    assert found["operations"]["cell"]["count"] == len(witness.truth["cells"]) - 4 > 0
    assert witness.truth["requests"]["DELETE /api/kernels/ID"] == {204: 4}
    assert witness.saw(found["http"]["servers"])
    line = found["timeline"]["servers"]
    assert all(left_s >= works_s + 1.0 for works_s, left_s in zip(line["works_s"], line["left_s"]))
    assert min(line["left_s"]) < max(line["works_s"])  # the first has left before the last has come
    log = witness.log
    for name in line["user"]:
        assert re.search(rf" 204 DELETE \S*/users/{name}/server ", log) and re.search(
            rf" 204 DELETE \S*/users/{name} ", log
        )
    assert witness.left_nothing()


def test_people_who_are_held_work_on_and_are_visited_once_more_at_the_end(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ("stress-test", "-c", "3", "--work", "--hold", "2s", "--think", "0.5s")
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == 3
    assert (found["operations"]["stay"]["count"], found["operations"]["stay"]["failed"]) == (3, 0)
    cells = found["operations"]["cell"]["count"]
    assert cells == len(witness.truth["cells"]) - 3 and 3 <= cells <= 3 * 5
    assert witness.truth["requests"]["GET /"] == {302: 6}
    assert witness.saw(found["http"]["servers"])
    assert witness.left_nothing()


MAY_RAISE = ' tags=["raises-exception"]\nraise ValueError()'


@pytest.mark.parametrize(
    ("cells", "reason", "done_before"),
    [
        (["1 * 1", MAY_RAISE, "raise MemoryError()", "2 * 2"], "cell 3 raised MemoryError", 2),
        (["raise KeyError()"], "cell 1 raised KeyError", 0),
        (["1 * 1", "import time; time.sleep(20)", "2 * 2"], "no result after 1.50 s", 1),
    ],
)
def test_a_person_whose_cell_fails_has_failed_for_that_and_runs_no_more(
    cells: list[str], reason: str, done_before: int, labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ["-c", "2", "--work", "--notebook", script(tmp_path, *cells), "--think", "0.1s", "--cell-timeout", "1.5s"]
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=labs)
    assert done.code == 1 and f"2 × {reason} (hub-stress-test-1, hub-stress-test-2)" in done.summary
    assert found["people"]["reasons"] == {reason: 2} and found["failed"] == 2
    assert found["people"]["at_work"] == (2 if done_before else 0)
    assert len(witness.truth["cells"]) == 2 * (done_before + 1)
    assert witness.left_nothing()


def test_a_kernel_that_dies_is_noticed_and_told(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    words = ["-c", "2", "--work", "--notebook", script(tmp_path, "1 * 1", "import os; os._exit(1)"), "--think", "0.1s"]
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=labs)
    assert done.code == 1 and done.summary.startswith("FAILED: 2 of 2 people got to work; 2 failed afterwards")
    assert found["people"]["reasons"] == {"the kernel died": 2} and "memory limit" in done.summary
    assert witness.left_nothing()


def test_at_the_hubs_own_port_there_are_no_servers_and_the_option_is_named(labs: LocalHub, witness: Witness) -> None:
    env = {"JUPYTERHUB_ENDPOINT": labs.hub_endpoint}
    words = ("stress-test", "-c", "2", "--visit", "--visit-timeout", "2s")
    done = run_tool(*words, hub=labs, env=env)
    assert done.code == 1 and "--public-url" in done.summary
    assert not witness.truth["requests"] and witness.left_nothing()
    done = run_tool(*words, "--public-url", labs.public_url, hub=labs, env=env)
    assert done.code == 0 and "2 of 2 people got to work" in done.summary
    assert witness.left_nothing()


def test_an_interrupt_while_people_work_cleans_up_and_counts_each_once(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ("stress-test", "-c", "6", "--within", "30s", "--seed", "71", "--work", "--think", "0.2s")
    with start_tool(*words, "--results", str(tmp_path / "r"), hub=labs) as run:
        wait_until(lambda: len(witness.truth["cells"]) >= 2)
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    people = results_in(tmp_path / "r", done)["people"]
    assert done.code == 130 and people["at_work"] >= 1
    assert people["at_work"] + people["failed"] == 6
    assert people["reasons"] == {"cut short before getting to work": people["failed"]}
    assert witness.left_nothing()
