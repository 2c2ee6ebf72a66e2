"""The local hub does what the other tests take for granted."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localhub import HubOptions, LocalHub
from tool import THEIRS, wait_until

LAUNCHER = [sys.executable, str(Path(__file__).with_name("localhub.py"))]
Launch = Callable[..., "subprocess.Popen[str]"]

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

SAYS_WHO_IS_THERE = """
import json, os, urllib.request
url, headers = os.environ["JUPYTERHUB_ENDPOINT"], {"Authorization": "token " + os.environ["JUPYTERHUB_API_TOKEN"]}
users = json.load(urllib.request.urlopen(urllib.request.Request(url + "/users", headers=headers)))
print(url, *(user["name"] for user in users))
"""


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts the launcher; one that still runs when the test ends is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: str, **more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        launcher = subprocess.Popen([*LAUNCHER, *words], env=os.environ | more, stdout=pipe, stderr=pipe, text=True)
        running.append(launcher)
        return launcher

    yield start
    for launcher in running:
        launcher.kill()
        launcher.communicate(timeout=30)


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


def test_the_wrapped_command_cleans_up_on_an_interrupt_before_the_hub_goes(launch: Launch) -> None:
    launcher = launch("--", sys.executable, "-c", ASKS_THE_HUB_WHEN_INTERRUPTED)
    assert launcher.stdout and launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGINT)
    _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 5
    assert stderr.startswith("JupyterHub ") and stderr.count("\n") == 1


def test_a_killed_launcher_leaves_no_hub_and_no_files(launch: Launch, tmp_path: Path) -> None:
    launcher = launch(TMPDIR=str(tmp_path))
    assert launcher.stdout
    port = int(launcher.stdout.readline().partition("127.0.0.1:")[2].partition("/")[0])
    assert listens(port) and list(tmp_path.iterdir())
    launcher.kill()
    wait_until(lambda: not listens(port) and not list(tmp_path.iterdir()))


def test_options_of_the_command_line_reach_the_hub(launch: Launch) -> None:
    words = ("--base-url", "/deep/", "--bystanders", "2", "--admin", "root", "--admin", "boss", "--scope", "list:users")
    launcher = launch(*words, "--", sys.executable, "-c", SAYS_WHO_IS_THERE)
    stdout, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, stderr
    endpoint, *names = stdout.split()
    assert endpoint.endswith("/deep/hub/api")
    assert set(names) == THEIRS | {"root", "boss", "bystander-0001", "bystander-0002"}


def test_help_says_for_each_option_what_it_does_its_unit_and_its_default(launch: Launch) -> None:
    launcher = launch("--help", COLUMNS="200")
    stdout, stderr = launcher.communicate(timeout=30)
    assert (launcher.returncode, stderr) == (0, "")
    said = dict(re.findall(r"^  (--[\w-]+)((?: [A-Z.]+)?\s{2,}\S.*)$", stdout, re.MULTILINE))
    for field in dataclasses.fields(HubOptions):
        text = said.pop(field.metadata["flag"])
        assert len(text.split()) >= 5, text
        if field.name.endswith("_s"):
            assert "SECONDS" in text and "seconds" in text
        if field.name.endswith("_rate"):
            assert "SHARE" in text and "share" in text and "0 to 1" in text
        if field.type in ("int", "float"):
            assert re.search(rf"\({field.default:g}\b", text), text
    assert not said


def test_an_option_that_is_not_there_is_refused_before_a_hub_is_started(launch: Launch) -> None:
    launcher = launch("--spwan", "1", "--", sys.executable, "-c", "print('ran')")
    stdout, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 2 and stdout == "" and "--spwan" in stderr


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
