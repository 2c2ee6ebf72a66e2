"""Before a run: is this a hub, is the token good for the command? Otherwise exit code 3, and nothing has changed."""

from __future__ import annotations

import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import hub_stress_test as hst
from authority import certificate_for_loopback
from fault_proxy import Answer, FaultProxy, every, hub_answer, matching
from localhub import LocalHub
from tool import run_tool, start_tool, tool_users

Make = Callable[..., LocalHub]
EVERYTHING = matching(None, ".*")


def refused(hub: LocalHub, endpoint: str, token: str | None = None, command: str = "stress-test") -> str:
    """The sentence with which a command refuses this endpoint or token, the hub's users untouched."""
    before = hub.users()
    done = run_tool(command, env={"JUPYTERHUB_ENDPOINT": endpoint, "JUPYTERHUB_API_TOKEN": token or hub.token})
    assert (done.code, done.stdout) == (3, "")
    assert done.stderr.startswith("hub-stress-test: ")
    assert hub.users() == before
    return done.stderr


# ==== The endpoint ===================================================================================================


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/"])
def test_an_endpoint_without_hub_api_is_answered_with_the_right_one(hub: LocalHub, path: str) -> None:
    right = hub.endpoint
    said = refused(hub, right.removesuffix("/hub/api") + path)
    assert f"The hub's API is at --endpoint {right}\n" in said and said.count("\n") == 1


def test_a_hub_with_a_prefix_is_found_from_its_start_page(make_hub: Make) -> None:
    hub = make_hub(base_url="/jupyter/")
    said = refused(hub, hub.endpoint.removesuffix("/hub/api"))
    assert f"The hub's API is at --endpoint {hub.endpoint}" in said
    assert run_tool("stress-test", "-c", "2", hub=hub).code == 0
    assert not tool_users(hub)


def test_an_html_page_is_no_hub_and_is_asked_without_the_token(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(EVERYTHING, Answer(200, b"<html>Welcome</html>", {"Content-Type": "text/html"}))
        said = refused(new_hub, proxy.endpoint)
        assert "No hub API at" in said and "not JSON but text/html" in said
        assert [entry.path for entry in proxy.requests] == ["/hub/api/"]


def test_json_without_a_version_is_no_hub(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(EVERYTHING, Answer(200, b"{}", {"Content-Type": "application/json"}))
        said = refused(new_hub, proxy.endpoint)
        assert "it answers JSON without a version" in said and "An endpoint ends in /hub/api" in said


def test_a_redirect_to_https_names_the_https_url_and_is_not_followed(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(EVERYTHING, Answer(308, b"", {"Location": "https://hub.example.org/hub/api/"}))
        said = refused(new_hub, proxy.endpoint)
        assert "redirects to https://hub.example.org/hub/api/" in said
        assert f"Use https: --endpoint {proxy.url.replace('http:', 'https:')}/hub/api" in said
        assert len(proxy.requests) == 1


def test_a_redirect_to_another_place_is_named_without_its_credentials(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(EVERYTHING, Answer(302, b"", {"Location": "http://me:pa55word@login.example.org/"}))
        said = refused(new_hub, proxy.endpoint)
        assert "it answers 302 and redirects to http://login.example.org/" in said and "pa55word" not in said


def test_nothing_listening_is_said_at_once(new_hub: LocalHub) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        said = refused(new_hub, f"http://127.0.0.1:{probe.getsockname()[1]}/hub/api")
    assert "Nothing answers at" in said and "connection refused" in said


def test_a_host_that_does_not_exist_is_said(new_hub: LocalHub) -> None:
    assert "host name not found" in refused(new_hub, "http://hub.invalid/hub/api")


# ==== A gateway that demands a header ================================================================================


@pytest.fixture
def gateway(new_hub: LocalHub) -> Iterator[FaultProxy]:
    """In front of the hub, it lets nobody pass without a header."""
    with FaultProxy(new_hub.endpoint) as proxy:
        closed = Answer(403, b"<html>", {"Server": "nginx/1.22.1", "Content-Type": "text/html"})
        proxy.rule = lambda request: None if request.headers.get("X-Access") == "0p3n" else closed
        yield proxy


def test_a_gateway_that_demands_a_header_names_the_option(gateway: FaultProxy, new_hub: LocalHub) -> None:
    said = refused(new_hub, gateway.url + "/hub/api")
    assert "it answers 403 (not JSON but text/html). If a proxy demands a header: --header" in said
    assert len(gateway.requests) == 1


def test_headers_of_ones_own_are_sent_with_every_request(gateway: FaultProxy, new_hub: LocalHub) -> None:
    endpoint, header = gateway.url + "/hub/api", ("X-Access", hst.Secret("0p3n"))
    session, record = hst.get_session(new_hub.token, headers=[header]), hst.Recorder()
    hub = hst.check_hub(endpoint, session, hst.STRESS)
    assert gateway.requests[0].path == "/hub/api/"  # the probe, without the token
    names = sum(hst.create_users(2, 2, endpoint, session), [])
    assert all(event.reason is None for event in hst.start_servers([names], endpoint, session).values())
    assert [event["ready"] for event in hub.progress(names[0], session.clock() + 10)] == [True]
    hst.spread_load(hst.Load(hst.Plan(hst.ACTIVITY, workers=2, processes=2), endpoint, names), session, record)
    assert record.summarise()["activity"].failed == 0
    public = hst.PublicSide(hub, hst.Plan(visit=True))
    browser = public.browser(names[0])
    assert isinstance(browser, hst.HubSession) and browser.ask("GET", endpoint + "/user").status == 200
    assert hst.Monitor(hst.metrics_url(endpoint), session).look()
    assert hst.delete_users(names, endpoint, session.clone(own_stop=True)) and not tool_users(new_hub)
    assert {entry.status for entry in gateway.requests} <= {200, 201, 202, 204, 404}
    assert "0p3n" not in repr(session.headers)


# ==== The token ======================================================================================================


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_a_refused_token_is_said(command: str, hub: LocalHub) -> None:
    said = refused(hub, hub.endpoint, token="0123456789abcdef", command=command)
    assert "refuses the token" in said and "JUPYTERHUB_API_TOKEN" in said


def test_a_token_of_64_characters_is_named_where_the_hub_takes_none() -> None:
    hub = LocalHub(version="6.1.0")
    hub.token = secrets.token_hex(32)
    with hub:
        said = refused(hub, hub.endpoint)
    assert "(GET /user answered 403): JupyterHub 6.1.0 takes none of 64 characters" in said


def test_a_token_is_sent_to_nobody_who_has_not_shown_to_be_a_hub(new_hub: LocalHub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        where = {"JUPYTERHUB_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}/hub/api"}
        with start_tool("purge", hub=new_hub, env=where) as run:
            client, _ = server.accept()
            with client:
                client.settimeout(60)
                head = client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            assert run.outcome().code == 3
    assert head.startswith(b"GET /hub/api/ HTTP/1.1\r\n")
    assert b"uthorization" not in head and new_hub.token.encode() not in head


@pytest.mark.parametrize("version", [None, "4.1.6"])
def test_missing_scopes_are_named_with_the_role_to_paste(version: str | None, make_hub: Make) -> None:
    hub = make_hub(version=version, scopes=("list:users", "read:servers"))
    said = refused(hub, hub.endpoint)
    assert "lacks what stress-test needs: admin:users, delete:servers, delete:users, servers" in said
    assert hst.ROLE_TO_PASTE in said


@pytest.mark.parametrize(
    ("command", "scopes"),
    [
        ("purge", ("list:users", "delete:users", "delete:servers", "read:servers")),
        ("activity-stress-test", ("admin:users", "read:servers")),
        ("stress-test", ("admin:users", "servers")),
    ],
)
def test_the_scopes_that_a_command_asks_for_are_enough(command: str, scopes: tuple[str, ...], make_hub: Make) -> None:
    hub = make_hub(scopes=scopes)
    words = [command] if command == "purge" else [command, "--count", "2"]
    assert run_tool(*words, hub=hub).code == 0
    assert not tool_users(hub)


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_a_hub_that_refuses_to_list_its_users_at_the_start_is_left_as_it_is(command: str, new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        locked = hub_answer(500, b'{"status": 500, "message": "database is locked"}')
        proxy.rule = every(matching("GET", r"/users\?"), locked)
        said = refused(new_hub, proxy.endpoint, new_hub.token, command)
        assert "The hub refused to list its users: 500 (database is locked). Nothing was changed." in said
        assert {entry.method for entry in proxy.requests} == {"GET"}


# ==== TLS, and names =================================================================================================


@pytest.fixture
def tls_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a server that shows a hub's version over TLS, and the certificate of the authority that signed it.

    With a TLS version as parameter it wants certificates of its clients, as a hub's own port with internal_ssl.
    """
    pem, key_pem = certificate_for_loopback(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, key_pem)
    if version := getattr(request, "param", None):
        context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, version
        context.load_verify_locations(pem)

    class Versions(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"version": "6.1.1"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing: whoever does not speak TLS, or does not trust us, is what is tested."""

    server = Server(("127.0.0.1", 0), Versions)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield server.server_address[1], pem
    server.shutdown()
    serving.join()
    server.server_close()


def test_a_certificate_of_ones_own_authority_names_the_variable_that_makes_it_known(tls_hub: tuple[int, Path]) -> None:
    port, pem = tls_hub
    env = {"JUPYTERHUB_ENDPOINT": f"https://127.0.0.1:{port}/hub/api", "JUPYTERHUB_API_TOKEN": "0123456789"}
    refused = run_tool("purge", env=env)
    assert refused.code == 3 and "name the file with its certificate in REQUESTS_CA_BUNDLE" in refused.stderr
    known = run_tool("purge", env=env | {"REQUESTS_CA_BUNDLE": str(pem)})
    assert known.code == 3 and "is not an admin of this hub" in known.stderr  # it has got as far as the token's owner


@pytest.mark.parametrize("tls_hub", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], indirect=True)
def test_a_server_that_wants_a_client_certificate_is_said_to(tls_hub: tuple[int, Path]) -> None:
    port, pem = tls_hub
    env = {"JUPYTERHUB_ENDPOINT": f"https://127.0.0.1:{port}/hub/api", "JUPYTERHUB_API_TOKEN": "0123456789"}
    done = run_tool("purge", env=env | {"REQUESTS_CA_BUNDLE": str(pem)})
    assert done.code == 3 and "TLS failed (" in done.stderr
    assert "At its own port, a hub with internal_ssl lets in only those with a certificate: use its" in done.stderr


def test_plain_http_to_a_port_that_speaks_tls_is_told_to_use_https(tls_hub: tuple[int, Path]) -> None:
    endpoint = f"127.0.0.1:{tls_hub[0]}/hub/api"
    env = {"JUPYTERHUB_ENDPOINT": f"http://{endpoint}", "JUPYTERHUB_API_TOKEN": "0123456789"}
    done = run_tool("purge", env=env)
    assert done.code == 3 and f"Use https: --endpoint https://{endpoint}" in done.stderr


def test_a_name_that_exists_only_inside_the_cluster_is_said_to() -> None:
    env = {"JUPYTERHUB_ENDPOINT": "http://hub:8081/hub/api", "JUPYTERHUB_API_TOKEN": "0123456789"}
    done = run_tool("purge", env=env)
    assert done.code == 3 and "This name exists only inside the cluster" in done.stderr
