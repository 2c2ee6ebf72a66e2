"""Every way in which a rehearsal fails, with real parts: it says why, counts each person once, and leaves nothing.

    python -m pytest -m rehearsal -n 4

prints a table: what went wrong, where, exit code, what was left behind, seconds, and the reasons in the summary.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import Answer, FaultProxy, HalfBody, Request, Rule, Silence, every, matching
from localhub import LocalHub
from nginx import nginx
from processes import processes_in
from test_recordings import OURS, entry, har
from test_work import script
from tool import Outcome, Running, results_in, start_tool, tool_users, wait_until

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(400)]

NEVER_CAME = "cut short before getting to work"
NOBODY_LISTENS = "nobody listens there (503)"
LOST = "the connection was lost"
ENDED = "the server ended while it was in use: nobody answers there, and the hub has not noticed"
ENDED += " (evicted, out of memory, node lost?)"
GONE_WITHIN_S = 20.0  # whatever belongs to a person, after the run: kernels look for their server every second

Act = Callable[[LocalHub, str], None]  # to a person's server
Acts = dict[tuple[int, int], Act]  # by the person's number, and how often they have asked where it is
Record = Callable[[str, object], None]


# ==== Hubs, and what is on them ======================================================================================


@pytest.fixture(scope="module")
def labs() -> Iterator[LocalHub]:
    """A hub behind a real proxy whose servers are stubs: for what happens on the way to them."""
    with LocalHub(real_proxy=True, stub_labs=True) as hub:
        yield hub


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalHub]:
    """A hub behind a real proxy whose servers and kernels are real, too; it does not notice when they end."""
    with LocalHub(real_proxy=True, real_servers=True, config="c.Spawner.poll_interval = 600") as hub:
        yield hub


def home(hub: LocalHub, name: str) -> Path:
    """Where a person's real server and kernels work."""
    return hub.log_path.parent / name


def signal_to(module: str, number: int) -> Act:
    """Sends a signal to a person's real server or kernel, whose command names this module."""

    def send(hub: LocalHub, name: str) -> None:
        (pid,) = [pid for pid in processes_in(home(hub, name)) if module in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(pid, number)

    return send


def thaw_what_ends(hub: LocalHub, run: Running) -> None:
    """While a run goes on, let frozen servers and kernels go on when the hub stops them.

    The hub takes a minute to lose patience with a stopped process, and outside of a container its kernel outlives it.
    """
    while hub.options.real_servers and run.poll() is None:
        for name, user in hub.users().items():
            if user["servers"].get("", {}).get("pending") == "stop":
                for pid in processes_in(home(hub, name)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
        time.sleep(0.5)


def delete_kernel(hub: LocalHub, name: str) -> None:
    kernels, session = f"{hub.public_url}user/{name}/api/kernels", hst.get_session(hub.visit_token)
    (kernel,) = session.get(kernels).json()
    assert session.delete(f"{kernels}/{kernel['id']}").status_code == 204


def delete_route(hub: LocalHub, name: str) -> None:
    """Take a person's route away from the proxy, as a proxy that was restarted has lost it."""
    hst.get_session(hub.proxy.token).delete(f"{hub.proxy.api_url}/api/routes/user/{name}")
    assert f"/user/{name}" not in hub.proxy.routes()


SERVER, KERNEL = "jupyterhub.singleuser", "ipykernel_launcher"
KILL_SERVER, FREEZE_SERVER = signal_to(SERVER, signal.SIGKILL), signal_to(SERVER, signal.SIGSTOP)
FREEZE_KERNEL = signal_to(KERNEL, signal.SIGSTOP)


def proxy_away(seconds: float) -> Act:
    """Kills the proxy, which comes back by itself after this time."""

    def act(hub: LocalHub, name: str) -> None:
        hub.proxy.stop()
        threading.Timer(seconds, hub.start_proxy).start()

    return act


def left_behind(hub: LocalHub) -> list[str]:
    """What people have left on the hub, the proxy, the stub labs and this machine."""
    left = sorted(tool_users(hub)) + [route for route in hub.proxy.routes() if "/user/" in route]
    if hub.options.stub_labs:
        truth = hub.truth()
        return left + [f"{truth[what]} {what}" for what in ("servers", "kernels", "open_websockets") if truth[what]]
    homes = hub.log_path.parent.glob(f"{hst.USERNAME_PREFIX}-*")
    return left + [f"process {pid}" for folder in homes for pid in processes_in(folder)]


# ==== A rehearsal, and what came of it ===============================================================================


def until(run: Running, reached: Callable[[], object], within_s: float = 200.0) -> None:
    """Wait for something to happen in a run, which must not end before."""
    wait_until(lambda: reached() or run.poll() is not None, within_s)
    assert run.poll() is None, run.communicate()


class Moments:
    """Acts at exact moments, as a rule of the proxy before the hub's API: when a ready server is asked for.

    A person asks where their server is before they first go there, and once more at the end of a hold. (The first
    person is also read by pings.)
    """

    def __init__(self, hub: LocalHub, acts: Acts) -> None:
        self._hub, self._acts = hub, acts
        self._asked, self._lock = collections.Counter[str](), threading.Lock()

    def __call__(self, request: Request) -> None:
        found = re.search(r"/users/([^/]+-(\d+))$", request.path)
        if request.method != "GET" or not found:
            return
        name, number = found.groups()
        _, user = self._hub.call("GET", f"/users/{name}")
        if user and hst.server_state(user) is hst.ServerState.READY:
            with self._lock:
                self._asked[name] += 1
                if act := self._acts.pop((int(number), self._asked[name]), None):
                    act(self._hub, name)


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a rehearsal ended, and what it left."""

    done: Outcome
    results: dict[str, Any]
    left: list[str]

    def judge(self, at_work: int, reasons: dict[str, int], code: int = 1) -> None:
        """The reasons are in the results and the summary, each person counts once, and nothing is left."""
        people, done = self.results["people"], self.done
        assert people["reasons"] == reasons, done.stdout
        assert (people["at_work"], people["failed"], done.code) == (at_work, sum(reasons.values()), code)
        assert self.results["failed"] == people["failed"] <= people["expected"]
        for reason, number in reasons.items():
            shown = "(cut short|not begun)" if reason == NEVER_CAME else f"{number} × {re.escape(reason)}"
            assert re.search(shown, done.summary)
        assert not self.left and not self.results["users"]["left_behind"]


@dataclasses.dataclass
class Stage:
    """Where rehearsals take place: each is written into the table."""

    record: Record
    folder: Path

    def rehearse(
        self,
        what: str,
        where: str,
        hub: LocalHub,
        *words: str,
        acts: Acts | None = None,
        public: Rule | None = None,
        meanwhile: Callable[[Running], object] = lambda run: None,
        env: dict[str, str] | None = None,
    ) -> Ending:
        """Run the tool. With `acts` it asks the hub through a proxy that acts, with `public` people come through one
        that follows this rule (and passes no websocket on)."""
        path, began_s = self.folder / "results.json", time.monotonic()
        with contextlib.ExitStack() as stack:
            found = hub.environment | (env or {})
            if acts:
                api = stack.enter_context(FaultProxy(hub.hub_endpoint))
                api.rule = Moments(hub, acts)
                found |= {"JUPYTERHUB_ENDPOINT": f"{api.url}/hub/api"}
                words = (*words, "--public-url", hub.public_url)
            if public:
                side = stack.enter_context(FaultProxy(hub.public_url))
                side.rule = public
                words = (*words, "--public-url", side.url)
            run = stack.enter_context(start_tool("stress-test", *words, "--results", str(path), env=found))
            thawing = threading.Thread(target=thaw_what_ends, args=(hub, run))
            thawing.start()
            stack.callback(thawing.join)
            meanwhile(run)
            done = run.outcome(370)
            took_s = time.monotonic() - began_s
            with pytest.raises(ProcessLookupError):
                os.killpg(run.pid, 0)  # no process of the tool is left
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not left_behind(hub), GONE_WITHIN_S)
        end = Ending(done, results_in(path, done), left_behind(hub))
        said = "; ".join(f"{number} × {reason}" for reason, number in end.results["people"]["reasons"].items()) or "–"
        self.record("fault", (what, where, done.code, len(end.left), f"{took_s:.1f}", said))
        return end


@pytest.fixture
def stage(record_property: Record, tmp_path: Path) -> Stage:
    return Stage(record_property, tmp_path)


# ==== No way to the server ===========================================================================================


def test_a_server_without_a_route_fails_its_person_alone(labs: LocalHub, stage: Stage) -> None:
    words = ["-c", "3", "-b", "1", "--visit", "--visit-timeout", "20s"]
    end = stage.rehearse("route deleted", "visit", labs, *words, acts={(2, 1): delete_route})
    end.judge(2, {"the proxy has no route (302 to the hub)": 1})


def test_a_proxy_that_comes_back_is_asked_again(labs: LocalHub, stage: Stage) -> None:
    words, acts = ["-c", "1", "--work", "--hold", "1s"], {(1, 1): proxy_away(1.0)}
    end = stage.rehearse("proxy killed, back after 1 s", "visit", labs, *words, acts=acts)
    end.judge(1, {}, code=0)
    assert end.results["http"]["servers"]["retries"] >= 2


def test_a_proxy_that_ends_loses_connections_and_lets_others_in(labs: LocalHub, stage: Stage) -> None:
    words = ["-c", "5", "-b", "1", "--work", "--hold", "1s", "--profile", '{"spawn_s": 2}']
    end = stage.rehearse("proxy killed and back", "work", labs, *words, acts={(3, 1): proxy_away(0.5)})
    end.judge(5, {LOST: 2})


# ==== TLS in front ===================================================================================================


WORK, LONG = "--work --think 1s --hold 2s", "--rate 1 --work --think 30s --hold 8s"
HOST = "no browser gets a kernel: servers refuse what a page at {} sends (404, and 403"
TIME_OUT = "something in front has a time-out of 5 s"
TO_HTTP = "a redirect to http: the proxy does not pass X-Forwarded-Proto"
UPGRADES = "the websocket was refused (400: does the proxy pass upgrades?)"
BACK = "location /user/ { return 302 http://$host:$server_port$request_uri; }"
IN_FRONT: dict[str, tuple[dict[str, Any], str, int, dict[str, int], str]] = {
    # how nginx is set up, and what people do: how many get to work, why the others fail, what is said besides
    "TLS": ({}, f"-c 3 {WORK}", 3, {}, ""),
    "no upgrades": ({"upgrades": False}, f"-c 3 {WORK}", 0, {UPGRADES: 3}, ""),
    "no Host header, work": ({"host": False}, "-c 3 -b 1 --work --hold 1s", 0, {NEVER_CAME: 3}, HOST),
    "no Host header, visit": ({"host": False}, "-c 3 -b 1 --visit", 3, {}, HOST),
    "time-out": ({"more": "proxy_read_timeout 5s;"}, f"-c 4 {LONG}", 4, {LOST: 4}, TIME_OUT),
    "login page": ({"more": 'location /user/ { return 200 "Sign in"; }'}, "-c 3 --visit", 0, {hst.NO_SERVER: 3}, ""),
    "redirect to http": ({"more": BACK}, "-c 2 --visit", 0, {TO_HTTP: 2}, ""),
}
NOT_TRIED_AGAIN = {"login page": {"200": 6}, "redirect to http": {"302": 2}}


@pytest.mark.parametrize("what", IN_FRONT)
def test_nginx_in_front_lets_people_work_or_is_blamed(what: str, labs: LocalHub, stage: Stage, tmp_path: Path) -> None:
    setup, words, at_work, reasons, besides = IN_FRONT[what]
    with nginx(labs.public_url, tmp_path, **setup) as (url, authority):
        env = {"JUPYTERHUB_ENDPOINT": f"{url}hub/api", "REQUESTS_CA_BUNDLE": str(authority)}
        end = stage.rehearse("nginx", what, labs, *words.split(), env=env)
    end.judge(at_work, reasons, int(bool(reasons)))
    assert end.done.summary.count(besides.format(url.rstrip("/"))) == 1 or not besides
    assert ("proxy_set_header Host $http_host;" in end.done.summary) == ("Host" in what)
    assert ("cell" in end.results["operations"]) == (what in ("TLS", "time-out"))
    statuses = end.results["http"]["servers"]["statuses"]
    assert NOT_TRIED_AGAIN.get(what, statuses) == statuses


def test_a_server_without_kernels_is_no_jupyter(labs: LocalHub, stage: Stage) -> None:
    missing = Answer(404, b"Not Found", {"X-JupyterHub-Version": "6.1.1"})
    rule = every(matching("POST", "/api/kernels$"), missing)
    end = stage.rehearse("no Jupyter", "kernel", labs, "-c", "2", "--work", public=rule)
    end.judge(0, {"the server is no Jupyter (404 for kernels): use --visit and --page": 2})


def test_half_a_file_of_a_page_is_none(labs: LocalHub, stage: Stage, page: str) -> None:
    rule = every(matching("GET", "/static/"), HalfBody())
    end = stage.rehearse("half a file", "page", labs, "-c", "2", "--page", page, public=rule)
    end.judge(0, {"a part of the page did not come: the answer broke off": 2})


def test_an_old_image_under_a_newer_hub_is_recognised(stage: Stage) -> None:
    with LocalHub(real_proxy=True, real_servers=True, server_version="1.5.1") as hub:
        end = stage.rehearse("image with JupyterHub 1.5.1", "visit", hub, "-c", "1", "--visit")
        version = hub.call("GET", "/")[1]["version"]
    versions = f"the server's image has JupyterHub 1.5.1, the hub {version}"
    end.judge(0, {f"{versions}: such a server lets in its own user only (403)": 1})


# ==== Servers and kernels, real ones =================================================================================


def test_servers_end_while_the_hub_calls_them_ready(servers: LocalHub, stage: Stage) -> None:
    acts = {(2, 1): KILL_SERVER, (3, 1): FREEZE_SERVER, (4, 2): KILL_SERVER}
    words = ["-c", "4", "-b", "2", "--visit", "--visit-timeout", "10s", "--hold", "1s", "--server-timeout", "100s"]
    end = stage.rehearse("server killed ×2, frozen", "visit, hold", servers, *words, acts=acts)
    lost = f"it no longer answered at the end of the hold: {NOBODY_LISTENS}"
    end.judge(2, {NOBODY_LISTENS: 1, "no page: no answer in time": 1, lost: 1})
    assert end.results["operations"]["stay"]["errors"] == {lost: 1}
    assert end.results["servers"]["lost"] == 1


def test_the_end_of_servers_and_kernels_is_told_for_each(servers: LocalHub, stage: Stage, tmp_path: Path) -> None:
    fates = {2: KILL_SERVER, 3: FREEZE_SERVER, 4: FREEZE_KERNEL, 5: delete_kernel}

    def act(run: Running) -> None:
        for number, fate in fates.items():
            until(run, (home(servers, hst.username(number)) / "has-begun").exists)
            fate(servers, hst.username(number))

    cells = ["'the kernel is there'", "open('has-begun', 'w').close()", *["6*7"] * 4]
    words = ["-c", "5", "-b", "2", "--work", "--notebook", script(tmp_path, *cells), "--think", "3s"]
    words += ["--cell-timeout", "30s", "--server-timeout", "100s"]
    what = "server killed, frozen, kernel frozen, deleted"
    end = stage.rehearse(what, "work", servers, *words, meanwhile=act)
    reasons = {"no result after 30.0 s": 2, ENDED: 1, "somebody shut the kernel down": 1}
    end.judge(5, reasons)
    assert end.results["operations"]["cell"]["errors"] == reasons


def test_what_a_cell_does_to_its_kernel_is_told(servers: LocalHub, stage: Stage, tmp_path: Path) -> None:
    fates = {
        "1": "print('x' * 30_000_000)",
        "2": "os._exit(1)",
        "3": "raise MemoryError",
        "4": "input('Your name? ')",
        "5": "import time; time.sleep(60)",
        "6": "os.kill(os.getpid(), 19)",
    }
    cells: list[tuple[str, list[str]]] = [
        (f"import os\nfate = {fates}[os.environ['JUPYTERHUB_USER'][-1]]", []),
        ("1 / 0", ["raises-exception"]),
        ("exec(fate)", []),
        ("6 * 7", []),
    ]
    notebook = {"cells": [{"cell_type": "code", "source": s, "metadata": {"tags": tags}} for s, tags in cells]}
    file = tmp_path / "work.ipynb"
    file.write_text(json.dumps(notebook))
    words = ["-c", "6", "-b", "2", "--work", "--notebook", str(file), "--think", "1s"]
    words += ["--cell-timeout", "25s", "--server-timeout", "100s"]
    what = "30 MB, os._exit, raises, input, sleeps, stops itself"
    end = stage.rehearse(what, "cell", servers, *words)
    reasons = {
        "no result after 25.0 s": 2,
        "the kernel died": 1,
        "cell 3 raised MemoryError": 1,
        "cell 3 raised StdinNotImplementedError: raw_input was called, but this frontend does not support input "
        "requests.": 1,
    }
    end.judge(6, reasons)
    operations = end.results["operations"]
    assert operations["kernel_ready"]["count"] == 6
    assert (operations["cell"]["count"], operations["cell"]["failed"]) == (6 + 6 + 1, 5)  # the second, third, fourth


# ==== Interrupts =====================================================================================================


HANG = {"1": r"/user/[^/]+/(lab.*)?$", "2": "/static/", "3": "/channels$"}  # by the person's number


@pytest.fixture
def page(tmp_path: Path) -> str:
    """A recording of a page with one file."""
    file = tmp_path / "lab.har"
    file.write_text(har(entry(OURS + "lab"), entry(OURS + "static/lab/main.js")))
    return str(file)


def test_an_interrupt_while_answers_never_come(labs: LocalHub, stage: Stage, page: str) -> None:
    asked = set[str]()

    def hang(request: Request) -> Silence | None:
        found = re.search(r"/user/[^/]+-(\d)/", request.path)
        if found and re.search(HANG[found[1]], request.path):
            asked.add(found[1])
            return Silence()
        return None

    def meanwhile(run: Running) -> None:
        until(run, lambda: asked == HANG.keys())
        run.send_signal(signal.SIGINT)

    what = "no answer: start page, page, websocket"
    end = stage.rehearse("Ctrl-C", what, labs, "-c", "3", "--work", "--page", page, public=hang, meanwhile=meanwhile)
    end.judge(0, {NEVER_CAME: 3}, code=130)  # whom nobody waited for: else there were time-outs


def test_an_interrupt_in_a_real_cell_leaves_no_process(servers: LocalHub, stage: Stage, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        until(run, (home(servers, hst.username(1)) / "sleeping").exists)
        run.send_signal(signal.SIGINT)

    file = script(tmp_path, "6*7", "import time; open('sleeping', 'w').close(); time.sleep(60)")
    words = ["-c", "1", "--work", "--notebook", file, "--think", "1s", "--server-timeout", "100s"]
    stage.rehearse("Ctrl-C", "in a real cell", servers, *words, meanwhile=meanwhile).judge(1, {}, code=130)


# ==== Tokens go nowhere else =========================================================================================


@pytest.fixture
def elsewhere() -> Iterator[socket.socket]:
    """A listener on another host: whoever connects waits there to be accepted."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        listener.setblocking(False)
        yield listener


ELSEWHERE_BY = ("http://{}/user/x/", "//{}/user/x/lab", "http://127.0.0.1:80@{}/user/x/")
REDIRECTS = [("/lab$", 301), ("/static/", 302), ("/channels$", 307)]  # of the first, second and third three people


def test_redirects_to_another_host_take_nothing_there(
    labs: LocalHub, stage: Stage, elsewhere: socket.socket, page: str
) -> None:
    address = "{}:{}".format(*elsewhere.getsockname())

    def away(request: Request) -> Answer | None:
        if found := re.search(r"/user/[^/]+-(\d)/", request.path):
            (path, status), location = REDIRECTS[(int(found[1]) - 1) // 3], ELSEWHERE_BY[int(found[1]) % 3]
            if re.search(path, request.path):
                return Answer(status, b"", {"Location": location.format(address)})
        return None

    words = ("-c", "9", "--page", page, "--work")
    end = stage.rehearse("redirect to another host", "visit, page, websocket", labs, *words, public=away)
    refused = {"the page redirects elsewhere (301)": 3, "a part of the page was answered 302": 3}
    end.judge(0, refused | {"the websocket was refused (307)": 3})
    with pytest.raises(BlockingIOError):  # nobody has connected
        elsewhere.accept()
