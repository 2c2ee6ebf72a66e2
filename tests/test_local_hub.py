"""The local hub does what the other tests take for granted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_hub import FIXED_BYSTANDERS, HubOptions, LocalHub, parse_args

LAUNCHER = [sys.executable, str(Path(__file__).with_name("local_hub.py"))]

ASKS_THE_HUB_WHEN_INTERRUPTED = """
import os, signal, sys, urllib.request
def ask(*_):
    url = os.environ["JUPYTERHUB_ENDPOINT"] + "/users/alice"
    headers = {"Authorization": "token " + os.environ["JUPYTERHUB_API_TOKEN"]}
    sys.exit(urllib.request.urlopen(urllib.request.Request(url, headers=headers)).status - 195)
signal.signal(signal.SIGINT, ask)
print("ready", flush=True)
signal.pause()
"""


def test_bystanders_and_look_alikes_are_there_and_a_user_of_any_name_can_be_made() -> None:
    with LocalHub(bystanders=201, admins=("root",)) as hub:
        assert len(hub.users()) == 201 + len(FIXED_BYSTANDERS) + 1
        assert {*FIXED_BYSTANDERS, "root", "bystander-0201"} <= hub.users().keys()
        assert [name for name, user in hub.users().items() if user["admin"]] == ["root"]
        assert hub.tool_users() == []
        assert hub.call("POST", "/users", {"usernames": ["hub-stress-test-1", "odd name@x"]})[0] == 201
        assert hub.tool_users() == ["hub-stress-test-1"]


def test_spawns_fail_and_hang_in_exact_shares_with_a_reason() -> None:
    with LocalHub(fail_rate=0.3, hang_rate=0.1, slow_spawn_timeout_s=0.1) as hub:
        names = [f"user-{n}" for n in range(20)]
        hub.call("POST", "/users", {"usernames": names})
        statuses = [hub.call("POST", f"/users/{name}/server")[0] for name in names]
        users = hub.users()
        hub.call("POST", "/users/alice/server", {"spawn_s": 0})
        _, progress = hub.call("GET", f"/users/{names[statuses.index(500)]}/server/progress")
    assert [statuses.count(status) for status in (500, 202, 201)] == [6, 2, 12]
    assert sum(user["server"] is not None for user in users.values()) == 12
    assert [user["pending"] for user in users.values()].count("spawn") == 2
    assert "Spawn failed: no node has 4 GB of memory free" in progress


def test_user_options_reach_the_spawner() -> None:
    with LocalHub(slow_spawn_timeout_s=0.2) as hub:
        assert hub.call("POST", "/users/alice/server", {"spawn_s": 60})[0] == 202
        assert hub.call("POST", "/users/hub-stress-tester/server", {"profile": "small"})[0] == 201
        assert hub.users()["hub-stress-tester"]["servers"][""]["user_options"] == {"profile": "small"}


def test_a_restart_keeps_address_tokens_users_and_servers_when_the_database_is_a_file(tmp_path: Path) -> None:
    with LocalHub(database=str(tmp_path / "hub.sqlite"), base_url="/below/") as hub:
        hub.call("POST", "/users/alice/server")
        first_pid = hub.pid
        hub.restart()
        assert hub.pid != first_pid
        assert hub.users()["alice"]["server"] == "/below/user/alice/"
        hub.kill()
        with pytest.raises(OSError):
            hub.call("GET", "/")


def test_the_wrapped_command_finds_the_hub_and_cleans_up_on_an_interrupt_before_the_hub_goes() -> None:
    command = [*LAUNCHER, "--slow-spawn-timeout", "0", "--", sys.executable, "-c", ASKS_THE_HUB_WHEN_INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout and launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGINT)
        _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 5
    assert stderr.startswith("JupyterHub ") and stderr.count("\n") == 1


def test_a_killed_launcher_leaves_no_hub_and_no_files(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(LAUNCHER, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout
        port = int(launcher.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
        assert listens(port)
        assert list(tmp_path.iterdir())
        launcher.kill()
    until_s = time.monotonic() + 10
    while listens(port) or list(tmp_path.iterdir()):
        assert time.monotonic() < until_s
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--spawn", "soon"],
        ["--spawn", "-1"],
        ["--fail", "0.6", "--hang", "0.6"],
        ["--version", "newest"],
        ["--real-servers", "--fail", "0.5"],
        ["--base-url", "below"],
        ["--", "no-such-command"],
    ],
)
def test_bad_usage_is_one_sentence_and_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(words)
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and words[-2 if len(words) > 1 else 0].lstrip("-") in stderr


def test_options_are_read_up_to_the_command() -> None:
    assert parse_args(["--spawn", "1", "--admins", "a,b", "env", "--spawn", "2"]) == (
        HubOptions(spawn_s=1.0, admins=("a", "b")),
        ["env", "--spawn", "2"],
    )
