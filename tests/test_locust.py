"""The same file under Locust: its users, its options, its web page, and what is left on the hub afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from selenium.webdriver.common.keys import Keys

import hub_stress_test as hst
from browser import browser, complaints
from localhub import LocalHub, free_port
from tool import MODULE, THEIRS, tool_users, wait_until

pytestmark = pytest.mark.locust
LOCUST = [sys.executable, "-m", "locust", "-f", str(MODULE)]


class Locust:
    """Locust processes, whose output is in files; they are killed, if they still run, when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._tokens = folder, set[str]()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("JUPYTERHUB")}
        with (self.folder / name).open("wb") as output:
            files: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "cwd": self.folder}
            process = subprocess.Popen([*LOCUST, *words], env=clean | env, start_new_session=True, **files)
        self.processes[name] = process
        self._tokens |= {env["JUPYTERHUB_API_TOKEN"]} - {""}
        return process

    def said(self, name: str) -> str:
        return (self.folder / name).read_text()

    def run(self, *words: str, env: dict[str, str], name: str = "run") -> tuple[int, str]:
        """Exit code and output."""
        return self.start(name, "--headless", "--only-summary", *words, env=env).wait(90), self.said(name)

    def run_until(
        self, reached: Callable[[dict[str, tuple[int, int]]], bool], *words: str, env: dict[str, str], name: str = "run"
    ) -> tuple[int, str]:
        """Exit code and output of a test that ends when the table, which Locust prints every two seconds, says so."""
        process = self.start(name, "--headless", *words, env=env)
        wait_until(lambda: reached(rows(self.said(name))))
        process.send_signal(signal.SIGTERM)
        return process.wait(90), self.said(name)

    def master_and_workers(self, workers: int, kind: str, *words: str, env: dict[str, str]) -> None:
        port = str(free_port())
        for n in range(workers):
            self.start(f"worker-{n}", "--worker", "--master-port", port, kind, env=env)
        ports = ("--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", port)
        self.start("master", *ports, "--expect-workers", str(workers), "--headless", *words, kind, env=env)

    def end(self) -> None:
        """Kill what still runs; no token and no traceback may be in any output."""
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        for said in map(self.said, self.processes):
            assert not any(token in said for token in self._tokens)
            assert "Traceback" not in said, said


@pytest.fixture
def locust(tmp_path: Path) -> Iterator[Locust]:
    running = Locust(tmp_path)
    yield running
    running.end()


def rows(output: str) -> dict[str, tuple[int, int]]:
    """Requests and failures by the name under which Locust's last table has them."""
    found = re.findall(r"^\S+ +(\w+) +(\d+) +(\d+)\(", output, re.MULTILINE)
    return {name: (int(number), int(failed)) for name, number, failed in found}


def servers_ready(hub: LocalHub) -> list[str]:
    """The tool's users whose servers the hub calls ready."""
    users = hub.users()
    return [name for name in tool_users(hub) & users.keys() if users[name]["servers"].get("", {}).get("ready")]


def failing(rate: float) -> tuple[str, str]:
    return "--hub-profile", json.dumps({"fail_rate": rate})


def test_importing_the_file_imports_no_gevent_and_defines_no_users() -> None:
    code = "import sys, hub_stress_test as h; print('gevent' in sys.modules, hasattr(h, 'Person'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=MODULE.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False False\n"


def test_running_servers_send_the_mix_at_their_interval(locust: Locust, new_hub: LocalHub) -> None:
    (locust.folder / "mine.py").write_text(
        "from hub_stress_test import operation\n\n\n@operation('whoami')\ndef whoami(username, endpoint, session):\n"
        "    return session.get(f'{endpoint}/user')\n"
    )
    words = ("-u", "13", "-r", "13", "-t", "8s", "--hub-scale", "100")
    words += ("--hub-operations", "mine.py", "--hub-mix", "activity=4,whoami=1", "RunningServer")
    code, said = locust.run(*words, env=new_hub.environment)
    assert code == 0 and not tool_users(new_hub)
    found = rows(said)
    assert found.keys() == {"activity", "whoami", "create_users"} and found["create_users"] == (2, 0)
    sent = found["activity"][0] + found["whoami"][0]
    assert 13 * 5 / 3 <= sent <= 13 * 9 / 3  # one every three seconds, after a random part of the first three
    assert 0.02 < found["whoami"][0] / sent < 0.5  # of few, each of which begins somewhere in the mix
    assert "13 users deleted, none left" in said and "ok failed 0 (fails above 0)" in said


def test_all_requests_under_one_name_are_judged_together(locust: Locust, new_hub: LocalHub) -> None:
    (locust.folder / "mine.py").write_text(
        "from hub_stress_test import operation\n\n\n@operation('two')\ndef two(username, endpoint, session):\n"
        "    session.post(f'{endpoint}/nothing')\n    return session.get(f'{endpoint}/user')\n"
    )
    words = (
        "-u",
        "2",
        "-r",
        "2",
        "-t",
        "4s",
        "--hub-scale",
        "300",
        "--hub-operations",
        "mine.py",
        "--hub-mix",
        "two=1",
    )
    code, said = locust.run(*words, "--hub-fail-if", "failed_rate > 40%", "RunningServer", env=new_hub.environment)
    assert code == 1 and "FAIL failed_rate " in said and not tool_users(new_hub), said


def test_people_come_twice_are_ready_stay_and_leave(locust: Locust, make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(spawn_s=0.5, concurrent_spawn_limit=3, slow_spawn_timeout_s=0)
    words = ("-u", "6", "-r", "6", "--hub-stay", "1s", "--hub-visits", "2", "--hub-run", "many", "Person")
    words += ("--hub-fail-if", "throttled < 1")
    code, said = locust.run_until(lambda table: table.get("delete_user") == (12, 0), *words, env=hub.environment)
    assert code == 0 and hub.users().keys() == THEIRS
    found = rows(said)
    for operation in ("create_users", "start_server", "server_ready", "stay", "stop_server", "delete_user"):
        assert found[operation] == (12, 0), said
    assert "hub-stress-test-many-0-<n>" in said and "12 users deleted, none left" in said
    assert re.search(r"ok throttled [1-9]\d* \(fails below 1\)", said)


def test_failed_starts_and_conditions_decide_the_exit_code(locust: Locust, new_hub: LocalHub) -> None:
    words = ("-u", "4", "-r", "4", "--hub-stay", "1s", *failing(0.5), "Person")

    def all_tried(table: dict[str, tuple[int, int]]) -> bool:
        return table.get("server_ready") == (4, 2)

    code, said = locust.run_until(all_tried, *words, env=new_hub.environment)
    assert code == 1 and "FAIL failed 2 (fails above 0)" in said
    found = rows(said)
    assert found["server_ready"] == (4, 2) and found.get("stay", (0, 0)) <= (2, 0)  # who has no server does not stay
    words += ("--hub-fail-if", "failed_rate > 60%")
    code, said = locust.run_until(all_tried, *words, env=new_hub.environment, name="lenient")
    assert code == 0 and "ok failed_rate 50.0 % (fails above 60 %)" in said
    assert not tool_users(new_hub)


def test_after_three_failed_starts_no_other_person_starts(locust: Locust, new_hub: LocalHub) -> None:
    code, said = locust.run("-u", "12", "-r", "2", "-t", "7s", *failing(1.0), "Person", env=new_hub.environment)
    assert code == 1 and "nothing started: the first three starts failed: no node has 4 GB of memory free" in said
    assert 3 <= rows(said)["server_ready"][0] < 8 and not tool_users(new_hub)


def test_a_server_lost_during_a_stay_fails_the_run(locust: Locust, new_hub: LocalHub) -> None:
    words = ("--headless", "--only-summary", "-u", "4", "-r", "4", "-t", "12s", "--hub-stay", "5s", "Person")
    process = locust.start("run", *words, env=new_hub.environment)
    wait_until(lambda: len(servers_ready(new_hub)) == 4)
    new_hub.call("DELETE", f"/users/{servers_ready(new_hub)[0]}/server")
    code, said = process.wait(150), locust.said("run")
    assert rows(said)["server_ready"] == (4, 0) and rows(said)["stay"] == (4, 1), said
    assert "stopped while it was held" in said and "failed 1 (fails above 0)" in said and code == 1
    assert not tool_users(new_hub)


def test_without_admin_rights_people_come_to_named_servers(locust: Locust, make_hub: Callable[..., LocalHub]) -> None:
    hub = make_hub(owner="carol", named_servers=3, spawn_s=0.3)
    words = ("-r", "5", "-t", "7s", "--hub-stay", "3s", "--hub-own-servers")
    code, said = locust.run("-u", "3", *words, "Person", env=hub.environment)
    assert code == 0 and rows(said)["server_ready"] == rows(said)["delete_user"] == (3, 0)
    assert "3 servers removed, none left" in said and "create_users" not in said
    code, said = locust.run("-u", "5", *words, "Person", env=hub.environment, name="more")
    assert code == 1 and rows(said)["server_ready"] == (3, 0) and "the hub allows each user 3 named servers" in said
    code, said = locust.run("-u", "1", *words, env=hub.environment, name="both")
    assert code == 2 and "--hub-own-servers is for a Person alone" in said
    _, carol = hub.call("GET", "/users/carol?include_stopped_servers=1")
    assert not carol["servers"].keys() - {""}


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, str], int, str]] = {
    "a wrong token": ((), {"JUPYTERHUB_API_TOKEN": "5ca1ab1e"}, 3, "refuses the token"),
    "no endpoint and no token": (
        *((), {"JUPYTERHUB_ENDPOINT": "", "JUPYTERHUB_API_TOKEN": ""}, 2),
        "--hub-endpoint; and no token: set JUPYTERHUB_API_TOKEN",
    ),
    "an unknown operation": (("--hub-mix", "walk=1"), {}, 2, "--hub-mix: there is no operation 'walk'"),
    "a path": (("--hub-fail-if", "http.requests > 9"), {}, 2, "'http.requests' among failed, failed_rate, throttled"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_usage_is_refused_before_the_first_user(case: str, locust: Locust, new_hub: LocalHub) -> None:
    words, env, expected_code, sentence = REFUSED[case]
    before = new_hub.users()
    code, said = locust.run("-u", "1", "-t", "5s", *words, env=new_hub.environment | env)
    assert code == expected_code and sentence in said, said
    assert "Ramping" not in said and new_hub.users() == before


def test_a_refused_test_leaves_nothing_running(locust: Locust, new_hub: LocalHub) -> None:
    (locust.folder / "counting.py").write_text(
        "import gc, gevent\n\nruns = [each for each in gc.get_objects() if isinstance(each, gevent.Greenlet)]\n"
        "print('cutting:', ['_cut_streams' in repr(run) for run in runs].count(True), flush=True)\n"
    )
    port, env = str(free_port()), new_hub.environment | {"JUPYTERHUB_API_TOKEN": "5ca1ab1e"}
    words = ("--web-host", "127.0.0.1", "--web-port", port, "--hub-operations", "counting.py", "RunningServer")
    locust.start("web", *words, env=env)
    wait_until(lambda: "Starting web interface" in locust.said("web"))
    form = {"user_count": "1", "spawn_rate": "1", "host": new_hub.endpoint}
    for n in range(1, 4):
        wait_until(lambda: _posted(f"http://127.0.0.1:{port}/swarm", form))
        wait_until(lambda n=n: locust.said("web").count("refuses the token") == n)
    assert set(re.findall(r"cutting: (\d+)", locust.said("web"))) == {"0"}


def _posted(url: str, form: dict[str, str]) -> bool:
    try:
        return requests.post(url, form, timeout=30).ok
    except requests.ConnectionError:
        return False


def test_ctrl_c_at_the_master_deletes_what_every_worker_made(locust: Locust, new_hub: LocalHub) -> None:
    words = ("-u", "30", "-r", "30", "--hub-stay", "60s")
    locust.master_and_workers(3, "Person", *words, env=new_hub.environment)
    wait_until(lambda: len(servers_ready(new_hub)) == 30)
    runs = {re.sub(r"-\d+$", "", name) for name in tool_users(new_hub)}
    assert runs == {f"hub-stress-test-locust-{n}" for n in range(3)}  # no two workers share a name
    os.kill(locust.processes["master"].pid, signal.SIGINT)
    assert locust.processes["master"].wait(150) == 0
    for n in range(3):
        locust.processes[f"worker-{n}"].wait(30)
    assert not tool_users(new_hub)
    assert "30 users deleted, none left" in locust.said("master")


def test_ctrl_c_at_all_processes_of_one_machine_cleans_up(locust: Locust, new_hub: LocalHub) -> None:
    port = str(free_port())
    words = ("--processes", "2", "--master-bind-port", port, "--master-port", port, "--headless")
    people = ("-u", "10", "-r", "10", "--hub-stay", "60s", "Person")
    process = locust.start("all", *words, *people, env=new_hub.environment)
    wait_until(lambda: len(servers_ready(new_hub)) == 10)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(150) == 0
    assert not tool_users(new_hub)
    assert "10 users deleted, none left" in locust.said("all")


def test_a_killed_workers_users_are_named_and_can_be_purged(locust: Locust, new_hub: LocalHub) -> None:
    words = ("-u", "12", "-r", "12", "-t", "14s", "--hub-stay", "60s")
    locust.master_and_workers(3, "Person", *words, env=new_hub.environment)
    wait_until(lambda: len(tool_users(new_hub)) >= 12)
    os.kill(locust.processes["worker-1"].pid, signal.SIGKILL)
    assert locust.processes["master"].wait(150) == 4
    lost = re.search(r"hub-stress-test purge --run (locust-\d)", locust.said("master"))
    assert lost
    left = tool_users(new_hub)
    assert left and all(hst.is_test_user(name, lost[1]) for name in left)
    assert hst.purge_users(new_hub.token, new_hub.endpoint, run=lost[1])["exit_code"] == 0
    assert not tool_users(new_hub)


@pytest.mark.browser
def test_the_web_page_has_options_and_runs_a_test(locust: Locust, new_hub: LocalHub) -> None:
    port = str(free_port())
    words = ("--web-host", "127.0.0.1", "--web-port", port, "--hub-header", "X-Access: 5ecret", "RunningServer")
    locust.start("web", *words, env=new_hub.environment)
    wait_until(lambda: "Starting web interface" in locust.said("web"))
    with browser(height=1600) as page:
        wait_until(lambda: _opens(page, f"http://127.0.0.1:{port}/"))
        wait_until(lambda: page.find_elements("name", "userCount"))
        page.execute_script("[...document.querySelectorAll('.MuiAccordionSummary-root')].forEach(e => e.click())")
        wait_until(lambda: page.find_elements("name", "hubScale"))
        names = {field.get_attribute("name") for field in page.find_elements("css selector", "input")}
        hidden = ("--endpoint", "--token")
        fields = [row for row in hst.LOCUST_OPTIONS.values() if not row.repeatable and row.flag not in hidden]
        assert {"host", *(camel(row.locust_flag[2:]) for row in fields)} <= names
        assert "hubToken" not in names and new_hub.token not in page.page_source
        assert "hubHeader" not in names and "5ecret" not in page.page_source
        assert page.find_element("name", "host").get_attribute("value") == new_hub.endpoint
        for name, value in {"userCount": "15", "spawnRate": "15", "hubScale": "300"}.items():
            field = page.find_element("name", name)
            field.send_keys(Keys.CONTROL + "a")
            field.send_keys(value)
        page.find_element("css selector", "button[type=submit]").click()
        wait_until(lambda: len(tool_users(new_hub)) >= 15)
        wait_until(lambda: "activity" in page.find_element("tag name", "body").text)
        _press(page, "Stop")
        wait_until(lambda: not tool_users(new_hub))
        assert [line for line in complaints(page) if "SEVERE" in line] == []
    assert not tool_users(new_hub)


def camel(name: str) -> str:
    """A hyphenated name as the page's form has it."""
    first, *others = name.split("-")
    return first + "".join(other.capitalize() for other in others)


def _opens(page: Any, url: str) -> bool:
    page.get(url)
    return "Locust" in page.title


def _press(page: Any, text: str) -> None:
    script = (
        "return [...document.querySelectorAll('button, a')]"
        ".filter(e => e.innerText.trim().toUpperCase() == arguments[0])"
    )
    wait_until(lambda: page.execute_script(script, text.upper()))
    page.execute_script("arguments[0].click()", page.execute_script(script, text.upper())[0])
