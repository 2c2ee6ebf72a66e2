"""The command line: what is refused, with which sentence and exit code, and that nothing has changed then."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import refused_usage, run_tool, tool_users
from fault_proxy import Answer, FaultProxy, every, matching
from localhub import LocalHub

import hub_stress_test as hst

NOWHERE = {"JUPYTERHUB_ENDPOINT": "http://127.0.0.1:1/hub/api", "JUPYTERHUB_API_TOKEN": "not-a-token"}

BAD_USAGE = {
    "no token": (["--endpoint", "http://127.0.0.1:1/hub/api", "purge"], {}, "no token"),
    "no endpoint": (["--token", "x", "purge"], {}, "no endpoint"),
    "no command": ([], NOWHERE, "COMMAND"),
    "an unknown command": (["stress"], NOWHERE, "stress"),
    "an unknown option": (["purge", "--forec"], NOWHERE, "--forec"),
    "an abbreviated option": (["stress-test", "--coun", "3"], NOWHERE, "--coun"),
    "count 0": (["stress-test", "--count", "0"], NOWHERE, "--count: expected a whole number of at least 1, not '0'"),
    "count -1": (["activity-stress-test", "--count=-1"], NOWHERE, "'-1'"),
    "batch size x": (["stress-test", "--batch-size", "x"], NOWHERE, "--batch-size: expected a whole number"),
    "workers 1.5": (["activity-stress-test", "--workers", "1.5"], NOWHERE, "'1.5'"),
    "broken profile": (["stress-test", "--profile", "{broken"], NOWHERE, "--profile: this is not valid JSON"),
    "a list as profile": (["stress-test", "--profile", "[1]"], NOWHERE, "a JSON object"),
    "a strange duration": (
        ["stress-test", "--server-timeout", "5 minutes"],
        NOWHERE,
        "a duration like 90, 90s, 5m or 1h",
    ),
    "no duration at all": (["stress-test", "--server-timeout", "0s"], NOWHERE, "'0s'"),
    "a run with capitals": (["--run", "Big", "purge"], NOWHERE, "lower-case"),
    "an endpoint without scheme": (["-e", "hub.example.org/hub/api", "purge"], NOWHERE, "expected a URL"),
    "an endpoint in the environment": (["purge"], NOWHERE | {"JUPYTERHUB_ENDPOINT": "hub"}, "JUPYTERHUB_ENDPOINT"),
    "a token with a line end": (["purge", "--token", "abc\ndef"], NOWHERE, "--token: expected a token of printable"),
    "an unwritable log file": (["purge", "--log-to-file", "/nowhere/log"], NOWHERE, "/nowhere/log: cannot be written"),
    "a directory as log file": (["purge", "--log-to-file", "/tmp"], NOWHERE, "/tmp: cannot be written"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_refused_in_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, env, expected = BAD_USAGE[case]
    assert expected in refused_usage(words, env, capsys)


def refused(hub: LocalHub, endpoint: str, token: str | None = None, command: str = "stress-test") -> str:
    """The sentence with which a command refuses this endpoint, the hub's users untouched."""
    before = hub.users()
    done = run_tool(command, env={"JUPYTERHUB_ENDPOINT": endpoint, "JUPYTERHUB_API_TOKEN": token or hub.token})
    assert (done.code, done.stdout) == (3, "")
    assert hub.users() == before
    return done.stderr


@pytest.mark.parametrize("path", ["", "/", "/hub", "/hub/"])
def test_an_endpoint_without_hub_api_is_answered_with_the_right_one(hub: LocalHub, path: str) -> None:
    right = hub.endpoint
    said = refused(hub, right.removesuffix("/hub/api") + path)
    assert f"The hub's API is at --endpoint {right}\n" in said and said.count("\n") == 1


def test_a_hub_with_a_prefix_is_found_from_its_start_page(make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(base_url="/jupyter/")
    said = refused(hub, hub.endpoint.removesuffix("/hub/api"))
    assert f"The hub's API is at --endpoint {hub.endpoint}" in said
    assert run_tool("stress-test", "-c", "2", hub=hub).code == 0


def test_an_html_page_is_no_hub(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        page = Answer(200, b"<html>Welcome</html>", {"Content-Type": "text/html"})
        proxy.rule = every(matching(None, ".*"), page)
        said = refused(new_hub, proxy.url + "/hub/api")
        assert "No hub API at" in said and "not JSON but text/html" in said
        assert all(entry.path.endswith("/hub/api/") for entry in proxy.requests)


def test_a_redirect_to_https_names_the_https_url_and_is_not_followed(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        away = Answer(308, b"", {"Location": "https://hub.example.org/hub/api/"})
        proxy.rule = every(matching(None, ".*"), away)
        said = refused(new_hub, proxy.url + "/hub/api")
        assert "redirects to https://hub.example.org/hub/api/" in said
        assert f"Use https: --endpoint {proxy.url.replace('http:', 'https:')}/hub/api" in said


def test_nothing_listening_is_said_at_once(new_hub: LocalHub) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        said = refused(new_hub, f"http://127.0.0.1:{probe.getsockname()[1]}/hub/api")
    assert "Nothing answers at" in said and "connection refused" in said


def test_a_host_that_does_not_exist_is_said(new_hub: LocalHub) -> None:
    assert "host name not found" in refused(new_hub, "http://hub.invalid/hub/api")


@pytest.mark.parametrize("command", hst.NEEDED_SCOPES)
def test_a_refused_token_is_said(command: str, hub: LocalHub) -> None:
    said = refused(hub, hub.endpoint, token="0123456789abcdef", command=command)
    assert "refuses the token" in said and "JUPYTERHUB_API_TOKEN" in said


@pytest.mark.parametrize("version", [None, "4.1.6"])
def test_missing_scopes_are_named_with_the_role_to_paste(
    version: str | None, make_hub: Callable[..., LocalHub]
) -> None:
    hub = make_hub(version=version, scopes=("list:users", "read:servers"))
    before = hub.users()
    done = run_tool("stress-test", "-c", "2", hub=hub)
    assert done.code == 3
    assert "lacks what stress-test needs: admin:users, delete:servers, delete:users, servers" in done.stderr
    assert hst.ROLE_TO_PASTE in done.stderr
    assert hub.users() == before


@pytest.mark.parametrize(
    ("command", "scopes"),
    [
        ("purge", ("list:users", "delete:users", "delete:servers", "read:servers")),
        ("activity-stress-test", ("admin:users", "read:servers")),
        ("stress-test", ("admin:users", "servers")),
    ],
)
def test_the_scopes_that_a_command_asks_for_are_enough(
    command: str, scopes: tuple[str, ...], make_hub: Callable[..., LocalHub]
) -> None:
    hub = make_hub(scopes=scopes)
    words = [command] if command == "purge" else [command, "--count", "2"]
    assert run_tool(*words, hub=hub).code == 0


def test_global_options_stand_before_and_after_the_command(hub: LocalHub) -> None:
    where = ("--endpoint", hub.endpoint, "--token", hub.token)
    assert run_tool(*where, "--run", "x", "stress-test", "-c", "1", "-k").code == 0
    assert run_tool("stress-test", "-c", "1", "-k", *where, "--run", "x").code == 0
    assert tool_users(hub) == {"hub-stress-test-x-1", "hub-stress-test-x-2"}
    assert run_tool("--endpoint", hub.endpoint, "purge", "--token", hub.token).code == 0


def test_the_endpoint_can_come_from_the_variable_that_a_hub_sets_for_its_own_servers(new_hub: LocalHub) -> None:
    env = {"JUPYTERHUB_API_URL": new_hub.endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token}
    assert run_tool("purge", env=env).code == 0
    assert run_tool("purge", env=env | {"JUPYTERHUB_ENDPOINT": "http://127.0.0.1:1/hub/api"}).code == 3


def test_credentials_in_the_endpoint_are_neither_used_nor_shown(new_hub: LocalHub) -> None:
    endpoint = new_hub.endpoint.replace("//", "//someone:pa55word@")
    done = run_tool("purge", "-v", env={"JUPYTERHUB_ENDPOINT": endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token})
    assert done.code == 0
    assert "pa55word" not in done.stdout + done.stderr


def test_version_and_help_need_no_hub() -> None:
    assert run_tool("--version").stdout == f"hub-stress-test {hst.__version__}\n"
    done = run_tool("--help")
    assert done.code == 0 and "Exit codes: 0 done and nothing failed " in done.stdout


def test_verbose_logs_each_request_with_its_response_time(new_hub: LocalHub) -> None:
    done = run_tool("-v", "stress-test", "-c", "1", hub=new_hub)
    for line in ("POST /hub/api/users: 201 in 0.", "POST /hub/api/users/hub-stress-test-1/server: 201 in "):
        assert line in done.stderr
    assert "DELETE /hub/api/users/hub-stress-test-1: 204 in " in done.stderr


def test_a_log_file_gets_the_log_and_is_added_to(new_hub: LocalHub, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    for _ in range(2):
        done = run_tool("purge", "--log-to-file", str(log), hub=new_hub)
        assert done.code == 0 and done.stderr == f"Logging to {log}\n"
    text = log.read_text()
    assert text.count("Found 0 users") == 2 and text.startswith(hst.LOG_HEADER)
    assert new_hub.token not in text


def test_a_file_that_is_no_log_of_ours_is_not_written_to(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    done = run_tool("purge", "--log-to-file", str(notes), env=NOWHERE)
    assert done.code == 2 and "not a log of ours" in done.stderr
    assert notes.read_text() == "mine\n"


def test_two_runs_in_one_second_do_not_share_a_log(tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path)}
    for _ in range(3):
        assert run_tool("--dry-run", "--log-to-file", "purge", env=env).code == 0  # purge is the command, not the file
    assert len(list(tmp_path.glob("hub-stress-test-*.log"))) == 3


def test_a_dry_run_needs_no_hub_and_sends_nothing(new_hub: LocalHub) -> None:
    for command in ("stress-test", "activity-stress-test", "purge"):
        count = () if command == "purge" else ("--count", "12")
        assert run_tool("--dry-run", command, *count).code == 0
    before = new_hub.users()
    with FaultProxy(new_hub.endpoint) as proxy:
        env = {"JUPYTERHUB_ENDPOINT": proxy.url + "/hub/api", "JUPYTERHUB_API_TOKEN": new_hub.token}
        done = run_tool("stress-test", "--count", "12", "--dry-run", env=env)
        assert done.code == 0 and done.stdout.startswith("DRY RUN: no request was sent")
        assert "12 ready, 0 failed" in done.stdout
        assert proxy.requests == []
    assert new_hub.users() == before
