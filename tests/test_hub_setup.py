"""Before a run: is this a hub, is the token good for the command? Otherwise exit code 3, and nothing has changed."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import Answer, FaultProxy, Request, every, hub_answer, matching
from localhub import LocalHub
from nginx import certificate_for_loopback
from tool import THEIR_ADMIN, run_tool, tool_users

EVERYTHING = matching(None, ".*")
HTML = {"Content-Type": "text/html"}


def refusal(endpoint: str, token: str = "0123456789abcdef", command: str = hst.STRESS, **options: Any) -> str:
    """The sentence with which a plan is refused before anything is made."""
    session = hst.get_session(token)
    with contextlib.closing(session), pytest.raises(hst.SetupError) as error:
        hst.check_hub(
            hst.Plan(command, endpoint=hst.endpoint_url(endpoint), token=hst.Secret(token), **options), session
        )
    assert token not in str(error.value)
    return str(error.value)


def token_with(hub: LocalHub, *scopes: str) -> str:
    """A token of the hub's other admin that has these scopes alone."""
    status, model = hub.call("POST", f"/users/{THEIR_ADMIN}/tokens", {"scopes": scopes, "expires_in": 600})
    assert status == 201, model
    token: str = model["token"]
    return token


# ==== The endpoint ===================================================================================================


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/"])
def test_an_endpoint_without_hub_api_is_corrected(hub: LocalHub, path: str) -> None:
    said = refusal(hub.endpoint.removesuffix("/hub/api") + path)
    assert said.endswith(f"The hub's API is at --endpoint {hub.endpoint}")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(200, b"<html>Welcome</html>", HTML), "No hub API at;not JSON but text/html"),
        (Answer(200, b"{}"), "it answers JSON without a version;An endpoint ends in /hub/api"),
        (Answer(403, b"<html>", HTML), "it answers 403 (not JSON but text/html);If a proxy demands a header: --header"),
        (
            Answer(308, b"", {"Location": "https://hub.example.org/hub/api/"}),
            "redirects to https://hub.example.org/hub/api/;Use https: --endpoint https://127.0.0.1",
        ),
        (
            Answer(302, b"", {"Location": "http://me:pa55word@login.example.org/"}),
            "it answers 302 and redirects to http://login.example.org/;An endpoint ends in /hub/api",
        ),
    ],
    ids=str,
)
def test_what_is_no_hub_never_sees_the_token(answer: Answer, words: str, proxy: FaultProxy) -> None:
    requests: list[Request] = []
    proxy.rule = lambda request: requests.append(request) or answer
    said = refusal(proxy.endpoint)
    assert all(part in said for part in words.split(";")) and "pa55word" not in said, said
    assert [request.path for request in requests] == ["/hub/api/"] and "Authorization" not in requests[0].headers


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://127.0.0.1:1/hub/api", "Nothing answers at;connection refused;Is the hub running"),
        ("http://hub.invalid/hub/api", "host name not found;Is the hub running"),
        ("http://hub:8081/hub/api", "host name not found;This name exists only inside the cluster"),
    ],
)
def test_an_endpoint_where_nothing_answers_is_named_with_a_remedy(endpoint: str, words: str) -> None:
    said = refusal(endpoint)
    assert all(part in said for part in words.split(";")), said


def test_a_refused_run_has_code_3_and_changes_nothing(new_hub: LocalHub) -> None:
    before = new_hub.users()
    done = run_tool("stress-test", hub=new_hub, env={"JUPYTERHUB_API_TOKEN": "0123456789abcdef"})
    assert (done.code, done.stdout) == (3, "") and done.stderr.startswith("hub-stress-test: The hub at ")
    assert new_hub.users() == before


# ==== A gateway that demands a header ================================================================================


def test_headers_of_ones_own_are_sent_with_every_request(proxy: FaultProxy, new_hub: LocalHub) -> None:
    closed = Answer(403, b"<html>", HTML)
    proxy.rule = lambda request: None if request.headers.get("X-Access") == "0p3n" else closed
    endpoint, header = proxy.endpoint, ("X-Access", hst.Secret("0p3n"))
    session, record = hst.get_session(new_hub.token, headers=[header]), hst.Recorder()
    hub = hst.check_hub(hst.Plan(endpoint=endpoint), session)
    assert proxy.requests[0].path == "/hub/api/"  # the probe, without the token
    names = sum(hst.create_users(2, 2, endpoint, session), [])
    assert all(event.reason is None for event in hst.start_servers([names], endpoint, session).values())
    assert [event["ready"] for event in hub.progress(names[0], session.clock() + 10)] == [True]
    hst.spread_load(hst.Load(hst.Plan(hst.ACTIVITY, workers=2, processes=2), endpoint, names), session, record)
    assert record.summarise()["activity"].failed == 0
    browser = hst.PublicSide(hub, hst.Plan(visit=True)).browser(names[0])
    assert isinstance(browser, hst.HubSession) and browser.ask("GET", endpoint + "/user").status == 200
    assert hst.Monitor(hst.metrics_url(endpoint), session).look()
    assert hst.delete_users(names, endpoint, session.clone(own_stop=True)) and not tool_users(new_hub)
    assert {entry.status for entry in proxy.requests} <= {200, 201, 202, 204, 404}
    assert "0p3n" not in repr(session.headers)


# ==== The token ======================================================================================================


def test_a_refused_token_is_named_by_its_variable(hub: LocalHub) -> None:
    said = refusal(hub.endpoint)
    assert "refuses the token (GET /user answered 403): it is wrong, has expired" in said
    assert said.endswith("into JUPYTERHUB_API_TOKEN.")


def test_a_long_token_is_named_where_none_is_taken(proxy: FaultProxy) -> None:
    version = hub_answer(200, json.dumps({"version": "6.1.0"}).encode())
    proxy.rule = every(matching("GET", "/hub/api/$"), version)
    assert "403): JupyterHub 6.1.0 takes none of 64 characters." in refusal(proxy.endpoint, token="0" * 64)


def test_missing_scopes_are_named_with_the_role_to_paste(hub: LocalHub) -> None:
    said = refusal(hub.endpoint, token_with(hub, "list:users", "read:servers"))
    assert "lacks what stress-test needs: admin:users, delete:servers, delete:users, servers. If you are not" in said
    assert said.endswith(hst.ROLE_TO_PASTE)


@pytest.mark.parametrize(
    ("command", "scopes"),
    [
        ("purge", ("list:users", "delete:users", "delete:servers", "read:servers")),
        ("activity-stress-test --count 2", ("admin:users", "read:servers")),
        ("stress-test --count 2", ("admin:users", "servers")),
    ],
)
def test_the_scopes_that_a_command_asks_for_are_enough(
    command: str, scopes: tuple[str, ...], new_hub: LocalHub
) -> None:
    done = run_tool(*command.split(), hub=new_hub, env={"JUPYTERHUB_API_TOKEN": token_with(new_hub, *scopes)})
    assert done.code == 0 and not tool_users(new_hub), done


# ==== TLS ============================================================================================================


class Versions(BaseHTTPRequestHandler):
    """Answers every GET with a hub's version."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "6.1.1"}')

    def log_message(self, *args: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients that do not speak TLS, or do not trust us, are what is tested."""


@pytest.fixture
def tls_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The endpoint of a server that shows a hub's version over TLS, and the certificate of the authority behind it.

    With a TLS version as parameter it wants certificates of its clients, as a hub's own port with internal_ssl.
    """
    pem, key_pem = certificate_for_loopback(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_pem)
    if version := getattr(request, "param", None):
        context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, version
        context.load_verify_locations(pem)
    with Server(("127.0.0.1", 0), Versions) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.1,)).start()
        yield f"https://127.0.0.1:{server.server_address[1]}/hub/api", pem
        server.shutdown()


def test_a_certificate_of_ones_own_authority_names_the_variable(
    tls_hub: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, pem = tls_hub
    assert "name the file with its certificate in REQUESTS_CA_BUNDLE" in refusal(endpoint)
    assert f"Use https: --endpoint {endpoint}" in refusal(endpoint.replace("https:", "http:"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
    assert "is not an admin of this hub" in refusal(endpoint)  # it has got as far as the token's owner


@pytest.mark.parametrize("tls_hub", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], indirect=True)
def test_a_server_that_wants_a_client_certificate_is_named(
    tls_hub: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, pem = tls_hub
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
    said = refusal(endpoint)
    assert "TLS failed (" in said and "a hub with internal_ssl lets in only those with a certificate" in said
