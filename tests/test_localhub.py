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
from conftest import THEIRS
from localhub import LocalHub

LAUNCHER = [sys.executable, str(Path(__file__).with_name("localhub.py"))]

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


def test_bystanders_and_look_alikes_and_admins_are_there() -> None:
    with LocalHub(bystanders=201, admins=("root",)) as hub:
        users = hub.users()
        assert len(users) == 201 + len(THEIRS) + 1
        assert {*THEIRS, "root", "bystander-0201"} <= users.keys()
        assert [name for name, user in users.items() if user["admin"]] == ["root"]


def test_spawns_fail_in_exact_shares_and_a_profile_can_ask_for_others() -> None:
    with LocalHub(fail_rate=0.3, slow_spawn_timeout_s=0.2) as hub:
        names = [f"user-{n}" for n in range(20)]
        hub.call("POST", "/users", {"usernames": [*names, "late"]})
        statuses = [hub.call("POST", f"/users/{name}/server")[0] for name in names]
        assert [statuses.count(status) for status in (500, 201)] == [6, 14]
        assert hub.call("POST", "/users/late/server", {"hang_rate": 1.0})[0] == 202


def test_a_restart_keeps_address_and_users_when_the_database_is_a_file(tmp_path: Path) -> None:
    with LocalHub(database=str(tmp_path / "hub.sqlite")) as hub:
        hub.call("POST", "/users", {"usernames": ["zoe"]})
        before = hub.pid
        hub.restart()
        assert hub.pid != before and "zoe" in hub.users()
        hub.kill()
        with pytest.raises(OSError):
            hub.call("GET", "/")


def test_the_wrapped_command_cleans_up_on_an_interrupt_before_the_hub_goes() -> None:
    command = [*LAUNCHER, "--", sys.executable, "-c", ASKS_THE_HUB_WHEN_INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout and launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGINT)
        _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 5
    assert stderr.startswith("JupyterHub ") and stderr.count("\n") == 1


def test_a_killed_launcher_leaves_no_hub_and_no_files(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(LAUNCHER, stdout=subprocess.PIPE, text=True, env=environment, stderr=-3) as launcher:
        assert launcher.stdout
        port = int(launcher.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
        assert listens(port) and list(tmp_path.iterdir())
        launcher.kill()
    until_s = time.monotonic() + 10
    while listens(port) or list(tmp_path.iterdir()):
        assert time.monotonic() < until_s
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
