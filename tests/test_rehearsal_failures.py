"""Every way in which a rehearsal fails, with real parts: it says why, counts each person once, and leaves nothing.

    python -m pytest -m rehearsal -n 4

prints a table: what went wrong, where, exit code, what was left behind, seconds, and the reasons in the summary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import Answer, FaultProxy, Rule, Silence
from localhub import LocalHub
from nginx import nginx
from processes import processes_in
from tool import Outcome, Running, refused_usage, results_in, start_tool, tool_users, wait_until

pytestmark = [pytest.mark.rehearsal, pytest.mark.timeout(200)]

NEVER_CAME = "cut short before getting to work"
NOBODY_LISTENS = "nobody listens there (503)"
LOST = "the connection was lost"
ENDED = "the server ended while it was in use: nobody answers there, and the hub has not noticed"
ENDED += " (evicted, out of memory, its node lost?)"
GONE_WITHIN_S = 20.0  # whatever belongs to a person, after the run: kernels look for their server every second
INTERRUPTED_WITHIN_S = 15.0  # the rest of a run, on a slow machine: nobody waits for what was under way
ELSEWHERE = "127.0.0.2"

Act = Callable[[str], object]
Record = Callable[[str, object], None]


# ==== Hubs, and what is on them ======================================================================================


@pytest.fixture(scope="module")
def labs() -> Iterator[LocalHub]:
    """A hub behind a real proxy whose servers are stubs: for what happens on the way to them."""
    with LocalHub(real_proxy=True, stub_labs=True) as hub:
        yield hub


@pytest.fixture(scope="module")
def servers() -> Iterator[LocalHub]:
    """A hub behind a real proxy whose servers and kernels are real, too."""
    with LocalHub(real_proxy=True, real_servers=True) as hub:
        yield hub


def person(number: int) -> str:
    return hst.username(number)


def home(hub: LocalHub, name: str) -> Path:
    """Where a person's real server and kernels work."""
    return hub.log_path.parent / name


def homes(hub: LocalHub) -> list[Path]:
    return list(hub.log_path.parent.glob(f"{hst.USERNAME_PREFIX}-*"))


def server_of(hub: LocalHub, name: str) -> int:
    """The process that is a person's real server."""
    return _process_of(hub, name, "jupyterhub.singleuser")


def kernel_of(hub: LocalHub, name: str) -> int:
    return _process_of(hub, name, "ipykernel_launcher")


def _process_of(hub: LocalHub, name: str, module: str) -> int:
    (pid,) = [pid for pid in processes_in(home(hub, name)) if module in Path(f"/proc/{pid}/cmdline").read_text()]
    return pid


def kill_server(hub: LocalHub, name: str) -> None:
    os.kill(server_of(hub, name), signal.SIGKILL)


def freeze_server(hub: LocalHub, name: str) -> None:
    os.kill(server_of(hub, name), signal.SIGSTOP)


def freeze_kernel(hub: LocalHub, name: str) -> None:
    os.kill(kernel_of(hub, name), signal.SIGSTOP)


def ask_server(hub: LocalHub, name: str, method: str, path: str) -> Any:
    """The JSON of an answer of a person's server, to somebody else who may enter it."""
    headers = {"Authorization": f"token {hub.visit_token}"}
    request = urllib.request.Request(f"{hub.public_url}user/{name}/{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"null")


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
    (kernel,) = ask_server(hub, name, "GET", "api/kernels")
    ask_server(hub, name, "DELETE", f"api/kernels/{kernel['id']}")


def delete_route(hub: LocalHub, name: str) -> None:
    """Take a person's route away from the proxy, as a proxy that was restarted has lost it."""
    headers = {"Authorization": f"token {hub.proxy.token}"}
    url = f"{hub.proxy.api_url}/api/routes/user/{name}"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="DELETE"), timeout=30):
        assert f"/user/{name}" not in hub.proxy.routes()


def proxy_away(hub: LocalHub, seconds: float) -> None:
    """Kill the proxy; it comes back by itself after so long."""
    hub.stop_proxy()
    threading.Timer(seconds, hub.start_proxy).start()


def is_ready(hub: LocalHub, name: str) -> bool:
    _, user = hub.call("GET", f"/users/{name}")
    return bool(user and user["servers"].get("", {}).get("ready"))


def left_behind(hub: LocalHub) -> list[str]:
    """What people have left on the hub, the proxy, the stub labs and this machine."""
    left = sorted(tool_users(hub)) + [route for route in hub.proxy.routes() if "/user/" in route]
    if hub.options.stub_labs:
        truth = hub.truth()
        return left + [f"{truth[what]} {what}" for what in ("servers", "kernels", "open_websockets") if truth[what]]
    return left + [f"process {pid}" for folder in homes(hub) for pid in processes_in(folder)]


# ==== A rehearsal, and what came of it ===============================================================================


def until(run: Running, reached: Callable[[], object], within_s: float = 100.0) -> None:
    """Wait for something to happen in a run, which must not end before."""
    wait_until(lambda: reached() or run.poll() is not None, within_s)
    assert run.poll() is None, run.communicate()


class Moments:
    """Acts at exact moments, as a rule of the proxy before the hub's API: when a ready server is asked for.

    A person asks where their server is before they first go there, and once more at the end of a hold. `acts` are
    by the person's number and how often they have asked. (The first person is also read by pings.)
    """

    def __init__(self, hub: LocalHub, acts: dict[tuple[int, int], Act]) -> None:
        self._hub, self._acts = hub, acts
        self._asked: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> None:
        found = re.search(r"/users/([^/]+-(\d+))$", request.path)
        if request.method != "GET" or not found or not is_ready(self._hub, found[1]):
            return
        with self._lock:
            asked = self._asked[found[1]] = self._asked.get(found[1], 0) + 1
            if act := self._acts.pop((int(found[2]), asked), None):
                act(found[1])


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a rehearsal ended."""

    done: Outcome
    results: dict[str, Any]
    left: list[str]
    seconds: float

    @property
    def reasons(self) -> dict[str, int]:
        found: dict[str, int] = self.results["people"]["reasons"]
        return found


class Stage:
    """Where rehearsals take place: each is written into the table, and judged alike."""

    def __init__(self, record: Record, folder: Path) -> None:
        self._record, self._folder = record, folder

    def rehearse(
        self,
        what: str,
        where: str,
        hub: LocalHub,
        *words: str,
        acts: dict[tuple[int, int], Act] | None = None,
        public: Rule | None = None,
        meanwhile: Callable[[Running], object] = lambda run: None,
        env: dict[str, str] | None = None,
    ) -> Ending:
        """Run the tool. With `acts` it asks the hub through a proxy that acts, with `public` people come through one
        that follows this rule (and passes no websocket on)."""
        path, began_s = self._folder / "results.json", time.monotonic()
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
            done = run.outcome()
            seconds = time.monotonic() - began_s
            with pytest.raises(ProcessLookupError):
                os.killpg(run.pid, 0)  # no process of the tool is left
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not left_behind(hub), GONE_WITHIN_S)
        end = Ending(done, results_in(path, done), left_behind(hub), seconds)
        said = "; ".join(f"{number} × {reason}" for reason, number in end.reasons.items()) or "–"
        self._record("fault", (what, where, done.code, len(end.left), f"{seconds:.1f}", said))
        return end


@pytest.fixture
def stage(record_property: Record, tmp_path: Path) -> Stage:
    return Stage(record_property, tmp_path)


def judge(end: Ending, at_work: int, reasons: dict[str, int], code: int = 1) -> None:
    """The reasons are in the results and the summary, each person counts once, and nothing is left."""
    people = end.results["people"]
    assert end.reasons == reasons, end.done.stdout
    assert (people["at_work"], people["failed"], end.done.code) == (at_work, sum(reasons.values()), code)
    assert end.results["failed"] == people["failed"] <= people["expected"]
    for reason, number in reasons.items():
        shown = "(under way|not begun)" if reason == NEVER_CAME else f"{number} × {re.escape(reason)}"
        assert re.search(shown, end.done.summary)
    assert not end.left and not end.results["users"]["left_behind"]
    assert end.done.stdout.startswith({0: "PASSED", 1: "FAILED", 130: "INTERRUPTED"}[code])


def script(folder: Path, *cells: str) -> str:
    """A Python file with these cells."""
    file = folder / "work.py"
    file.write_text("".join(f"# %%\n{cell}\n" for cell in cells))
    return str(file)


# ==== No way to the server ===========================================================================================


def test_a_server_without_a_route_fails_its_person_and_nobody_else(labs: LocalHub, stage: Stage) -> None:
    acts: dict[tuple[int, int], Act] = {(2, 1): lambda name: delete_route(labs, name)}
    words = ["-c", "3", "-b", "1", "--visit", "--visit-timeout", "3s"]
    end = stage.rehearse("route deleted", "visit", labs, *words, acts=acts)
    judge(end, 2, {"the proxy has no route (302 to the hub)": 1})


def test_when_the_first_server_has_no_route_the_run_ends_and_asks_for_the_public_side(
    labs: LocalHub, stage: Stage
) -> None:
    acts: dict[tuple[int, int], Act] = {(1, 1): lambda name: delete_route(labs, name)}
    end = stage.rehearse("only route deleted", "visit", labs, "-c", "1", "--visit", "--visit-timeout", "3s", acts=acts)
    judge(end, 0, {NEVER_CAME: 1})
    assert "the proxy no route to the server?" in end.done.summary


def test_the_hubs_own_port_has_no_servers_so_the_option_is_named_and_nobody_else_comes(
    labs: LocalHub, stage: Stage
) -> None:
    inside = {"JUPYTERHUB_ENDPOINT": labs.hub_endpoint}
    words = ["-c", "20", "--rate", "1", "--visit", "--visit-timeout", "3s"]
    end = stage.rehearse("endpoint inside the cluster", "visit", labs, *words, env=inside)
    judge(end, 0, {NEVER_CAME: 20})
    assert "name where people reach the hub with --public-url" in end.done.summary
    assert 1 <= end.results["operations"]["start_server"]["count"] < 15


def test_with_the_public_url_an_endpoint_inside_the_cluster_will_do(labs: LocalHub, stage: Stage) -> None:
    inside = {"JUPYTERHUB_ENDPOINT": labs.hub_endpoint}
    words = ["-c", "3", "--work", "--hold", "1s", "--public-url", labs.public_url]
    judge(stage.rehearse("the same, --public-url", "–", labs, *words, env=inside), 3, {}, code=0)


def test_a_proxy_that_is_away_for_a_moment_is_asked_again_and_that_is_counted(labs: LocalHub, stage: Stage) -> None:
    acts: dict[tuple[int, int], Act] = {(1, 1): lambda name: proxy_away(labs, 1.0)}
    end = stage.rehearse("proxy killed, back after 1 s", "visit", labs, "-c", "1", "--work", "--hold", "1s", acts=acts)
    judge(end, 1, {}, code=0)
    assert end.results["http"]["servers"]["retries"] >= 2


def test_a_proxy_that_stays_away_refuses_the_visit(labs: LocalHub, stage: Stage) -> None:
    acts: dict[tuple[int, int], Act] = {(1, 1): lambda name: proxy_away(labs, 5.0)}
    end = stage.rehearse("proxy killed", "visit", labs, "-c", "1", "--visit", "--visit-timeout", "2s", acts=acts)
    judge(end, 0, {"no page: connection refused": 1})


def test_people_at_work_lose_their_connections_with_the_proxy_and_are_counted_once(
    labs: LocalHub, stage: Stage
) -> None:
    def kill_proxy(run: Running) -> None:
        until(run, lambda: labs.truth()["open_websockets"] == 5 and len(labs.truth()["cells"]) >= before + 5)
        time.sleep(0.5)
        proxy_away(labs, 1.0)

    before = len(labs.truth()["cells"])
    words = ["-c", "5", "--work", "--think", "1s", "--hold", "8s"]
    judge(stage.rehearse("proxy killed and back", "work", labs, *words, meanwhile=kill_proxy), 5, {LOST: 5})


def test_who_comes_after_others_have_lost_their_connections_gets_to_work(labs: LocalHub, stage: Stage) -> None:
    acts: dict[tuple[int, int], Act] = {(3, 1): lambda name: proxy_away(labs, 0.5)}
    words = ["-c", "5", "-b", "1", "--work", "--hold", "1s", "--profile", '{"spawn_s": 2}']
    end = stage.rehearse("proxy killed and back", "work, others come", labs, *words, acts=acts)
    judge(end, 5, {LOST: 2})


# ==== TLS in front ===================================================================================================


def behind(url: str, authority: Path) -> dict[str, str]:
    """The environment of a tool that asks the hub through nginx."""
    return {"JUPYTERHUB_ENDPOINT": f"{url}hub/api", "REQUESTS_CA_BUNDLE": str(authority)}


@pytest.mark.parametrize("upgrades", [True, False])
def test_behind_tls_people_work_if_the_ingress_passes_websockets_and_else_are_asked_about_it(
    upgrades: bool, labs: LocalHub, stage: Stage, tmp_path: Path
) -> None:
    with nginx(labs.public_url, tmp_path, upgrades) as (url, authority):
        env = behind(url, authority)
        what = "TLS by nginx" + ", no upgrades" * (not upgrades)
        end = stage.rehearse(what, "kernel", labs, "-c", "3", "--work", "--think", "1s", "--hold", "2s", env=env)
    if upgrades:
        judge(end, 3, {}, code=0)
        assert "cell" in end.results["operations"], end.done.stdout + end.done.stderr
    else:
        judge(end, 0, {"the websocket was refused (400: does the proxy pass upgrades?)": 3})


@pytest.mark.parametrize(("words", "code"), [(["--work", "--hold", "1s"], 1), (["--visit"], 0)])
def test_a_proxy_that_loses_the_host_header_is_found(
    words: list[str], code: int, labs: LocalHub, stage: Stage, tmp_path: Path
) -> None:
    with nginx(labs.public_url, tmp_path, host=False) as (url, authority):
        env = behind(url, authority)
        end = stage.rehearse("no Host header", words[0].strip("-"), labs, "-c", "3", "-b", "1", *words, env=env)
    judge(end, 0 if code else 3, {NEVER_CAME: 3} if code else {}, code)
    refused = f"no browser gets a kernel: servers refuse what a page at {url.rstrip('/')} sends (404, and 403"
    assert end.done.summary.count(refused) == 1 and "proxy_set_header Host $http_host;" in end.done.summary


def test_a_time_out_in_front_is_named(labs: LocalHub, stage: Stage, tmp_path: Path) -> None:
    with nginx(labs.public_url, tmp_path, more="proxy_read_timeout 2s;") as (url, authority):
        words = ["-c", "4", "--rate", "1", "--work", "--think", "30s", "--hold", "4s"]
        end = stage.rehearse("websockets time out", "work", labs, *words, env=behind(url, authority))
    judge(end, 4, {LOST: 4})
    said = "all websockets that broke had been open for 2 s: something in front has a time-out of 2 s"
    assert said in end.done.summary


def test_a_login_page_with_200_is_no_server(labs: LocalHub, stage: Stage, tmp_path: Path) -> None:
    login = 'location /user/ { return 200 "Sign in"; }'
    with nginx(labs.public_url, tmp_path, more=login) as (url, authority):
        env = behind(url, authority)
        end = stage.rehearse("200 from a login page", "visit", labs, "-c", "3", "--visit", env=env)
    judge(end, 0, {hst.NO_SERVER: 3})
    assert end.results["operations"]["visit"]["latency_s"]["max"] is None and end.seconds < 20


def test_a_redirect_to_http_takes_no_token_there(labs: LocalHub, stage: Stage, tmp_path: Path) -> None:
    back = "location /user/ { return 302 http://$host:$server_port$request_uri; }"
    with nginx(labs.public_url, tmp_path, more=back) as (url, authority):
        end = stage.rehearse("redirect to http", "visit", labs, "-c", "2", "--visit", env=behind(url, authority))
    judge(end, 0, {"a redirect to http: the proxy does not pass X-Forwarded-Proto": 2})
    assert end.results["http"]["servers"]["statuses"] == {"302": 2}


def test_a_server_without_kernels_is_no_jupyter(labs: LocalHub, stage: Stage) -> None:
    missing = Answer(404, b"Not Found", {"X-JupyterHub-Version": "6.1.1"})
    end = stage.rehearse(
        "no Jupyter",
        "kernel",
        labs,
        *("-c", "2", "--work"),
        public=lambda request: missing if request.path.endswith("/api/kernels") else None,
    )
    judge(end, 0, {"the server is no Jupyter (404 for kernels): use --visit and --page": 2})


def test_an_image_of_version_1_under_a_newer_hub_is_recognised(stage: Stage) -> None:
    with LocalHub(real_proxy=True, real_servers=True, server_version="1.5.1") as hub:
        end = stage.rehearse("image with JupyterHub 1.5.1", "visit", hub, "-c", "1", "--visit")
        version = hub.call("GET", "/")[1]["version"]
    versions = f"the server's image has JupyterHub 1.5.1, the hub {version}"
    judge(end, 0, {f"{versions}: such a server lets in its own user only (403)": 1})


# ==== Servers and kernels, real ones =================================================================================


def test_servers_that_are_killed_or_frozen_while_the_hub_calls_them_ready(servers: LocalHub, stage: Stage) -> None:
    acts: dict[tuple[int, int], Act] = {
        (2, 1): lambda name: kill_server(servers, name),
        (3, 1): lambda name: freeze_server(servers, name),
        (4, 2): lambda name: kill_server(servers, name),
    }
    words = ["-c", "4", "-b", "2", "--visit", "--visit-timeout", "4s", "--hold", "1s", "--server-timeout", "100s"]
    end = stage.rehearse("server killed ×2, frozen", "visit, hold", servers, *words, acts=acts)
    lost = f"it no longer answered at the end of the hold: {NOBODY_LISTENS}"
    judge(end, 2, {NOBODY_LISTENS: 1, "no page: no answer in time": 1, lost: 1})
    assert end.results["operations"]["visit"]["latency_s"]["max"] < 10
    assert end.results["operations"]["stay"]["errors"] == {lost: 1}
    assert end.results["servers"]["lost"] == 1


def test_what_ends_the_work_of_people_is_told_for_each(servers: LocalHub, stage: Stage, tmp_path: Path) -> None:
    fates: dict[int, Callable[[LocalHub, str], None]] = {
        2: kill_server,
        3: freeze_server,
        4: freeze_kernel,
        5: delete_kernel,
    }

    def act(run: Running) -> None:
        for number, fate in fates.items():
            until(run, (home(servers, person(number)) / "has-begun").exists)
            fate(servers, person(number))

    cells = ["'the kernel is there'", "open('has-begun', 'w').close()", *["6*7"] * 4]
    words = ["-c", "5", "-b", "2", "--work", "--notebook", script(tmp_path, *cells), "--think", "3s"]
    words += ["--cell-timeout", "15s", "--server-timeout", "100s"]
    what = "server killed, frozen, kernel frozen, deleted"
    end = stage.rehearse(what, "work", servers, *words, meanwhile=act)
    reasons = {"no result after 15.0 s": 2, ENDED: 1, "somebody shut the kernel down": 1}
    judge(end, 5, reasons)
    assert end.results["operations"]["cell"]["errors"] == reasons


def test_whatever_a_cell_does_to_its_kernel_is_told_for_each(servers: LocalHub, stage: Stage, tmp_path: Path) -> None:
    fates = {
        "1": "print('x' * 100_000_000)",
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
    words += ["--cell-timeout", "15s", "--server-timeout", "100s"]
    what = "100 MB, os._exit, raises, input, sleeps, stops itself"
    end = stage.rehearse(what, "cell", servers, *words)
    reasons = {
        "no result after 15.0 s": 2,
        "the kernel died": 1,
        "cell 3 raised MemoryError": 1,
        "cell 3 raised StdinNotImplementedError: raw_input was called, but this frontend does not support input "
        "requests.": 1,
    }
    judge(end, 6, reasons)
    operations = end.results["operations"]
    assert operations["kernel_ready"]["count"] == 6
    assert (operations["cell"]["count"], operations["cell"]["failed"]) == (6 + 6 + 1, 5)  # the second, third, fourth


@pytest.mark.parametrize(
    ("what", "cell", "reason"),
    [
        ("os._exit", "import os; os._exit(1)", "the kernel died"),
        ("raises", "raise MemoryError", "cell 1 raised MemoryError"),
        ("sleeps", "import time; time.sleep(60)", "no result after 3.00 s"),
    ],
)
def test_who_fails_in_the_first_cell_never_gets_to_work(
    what: str, cell: str, reason: str, labs: LocalHub, stage: Stage, tmp_path: Path
) -> None:
    words = ["-c", "2", "--work", "--notebook", script(tmp_path, cell, "6*7"), "--cell-timeout", "3s"]
    judge(stage.rehearse(f"first cell {what}", "kernel", labs, *words), 0, {reason: 2})


# ==== Interrupts =====================================================================================================


HANG = {
    "start page": r"/user/[^/]+/(lab.*)?$",
    "page": "/static/",
    "kernel asked for": "/api/kernels$",
    "websocket": "/channels$",
}


def interrupt(run: Running) -> float:
    run.send_signal(signal.SIGINT)
    return time.monotonic()


def ends_soon_after(interrupted_s: float) -> None:
    assert time.monotonic() - interrupted_s < INTERRUPTED_WITHIN_S


@pytest.fixture
def page(tmp_path: Path) -> str:
    """A recording of a page with one file."""
    file = tmp_path / "lab.har"
    entries = [
        {"request": {"method": "GET", "url": f"https://h/user/a/{path}"}, "response": {"status": 200}}
        for path in ("lab", "static/lab/main.js")
    ]
    file.write_text(json.dumps({"log": {"entries": entries}}))
    return str(file)


@pytest.mark.parametrize("where", HANG)
def test_an_interrupt_while_people_wait_for_an_answer_that_never_comes(
    where: str, labs: LocalHub, stage: Stage, page: str
) -> None:
    asked, sent = threading.Event(), list[float]()

    def hang(request: Any) -> Silence | None:
        if re.search(HANG[where], request.path):
            asked.set()
            return Silence()
        return None

    def meanwhile(run: Running) -> None:
        assert asked.wait(60)
        time.sleep(0.5)
        sent.append(interrupt(run))

    words = ["-c", "2", "--work", *(["--page", page] if where == "page" else [])]
    end = stage.rehearse("Ctrl-C", f"no answer: {where}", labs, *words, public=hang, meanwhile=meanwhile)
    judge(end, 0, {NEVER_CAME: 2}, code=130)
    assert end.results["duration_s"] < INTERRUPTED_WITHIN_S
    ends_soon_after(sent[0])


@dataclasses.dataclass(frozen=True)
class Step:
    """A step in which people are interrupted: what is asked for, and how it is seen that they are there."""

    words: tuple[str, ...]
    reached: Callable[[LocalHub, int], bool]  # from the hub, and how many cells there were before
    at_work: int = 2


def cells_run(hub: LocalHub, before: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = hub.truth()["cells"][before:]
    return found


def all_ready(hub: LocalHub, before: int) -> bool:
    return len(tool_users(hub)) == 2 and all(is_ready(hub, name) for name in tool_users(hub))


STEPS = {
    "starting": Step(
        ("--visit", "--profile", '{"spawn_s": 60}'),
        lambda hub, before: any(
            server.get("pending") for name in tool_users(hub) for server in hub.users()[name]["servers"].values()
        ),
        0,
    ),
    "first cell": Step(("--work", "--notebook", "SLEEP"), lambda hub, before: len(cells_run(hub, before)) == 2, 0),
    "thinking": Step(
        ("--work", "--think", "60s", "--hold", "60s"),
        lambda hub, before: len([one for one in cells_run(hub, before) if one["sent_s"]]) == 2,
    ),
    "in a cell": Step(
        ("--work", "--think", "0.2s", "--notebook", "WORK, SLEEP"), lambda hub, before: len(cells_run(hub, before)) == 4
    ),
    "holding": Step(("--visit", "--hold", "60s"), all_ready),
    "staying": Step(
        ("--work", "--stay", "60s", "--think", "0.2s"), lambda hub, before: len(cells_run(hub, before)) > 6
    ),
}


@pytest.mark.parametrize("where", STEPS)
def test_an_interrupt_in_any_step_ends_the_run_and_leaves_nothing(
    where: str, labs: LocalHub, stage: Stage, tmp_path: Path
) -> None:
    step, before, sent = STEPS[where], len(labs.truth()["cells"]), list[float]()
    sleep = "import time; time.sleep(60)"
    files = {"SLEEP": [sleep], "WORK, SLEEP": ["6*7", sleep]}
    words = [script(tmp_path, *files[word]) if word in files else word for word in step.words]

    def meanwhile(run: Running) -> None:
        until(run, lambda: step.reached(labs, before))
        time.sleep(1.0)
        sent.append(interrupt(run))

    end = stage.rehearse("Ctrl-C", where, labs, "-c", "2", *words, meanwhile=meanwhile)
    judge(end, step.at_work, {NEVER_CAME: 2} if not step.at_work else {}, code=130)
    ends_soon_after(sent[0])


def test_an_interrupt_in_a_cell_of_a_real_kernel_leaves_no_process(
    servers: LocalHub, stage: Stage, tmp_path: Path
) -> None:
    def meanwhile(run: Running) -> None:
        until(run, (home(servers, person(1)) / "sleeping").exists)
        interrupt(run)

    file = script(tmp_path, "6*7", "import time; open('sleeping', 'w').close(); time.sleep(60)")
    words = ["-c", "1", "--work", "--notebook", file, "--think", "1s", "--server-timeout", "100s"]
    judge(stage.rehearse("Ctrl-C", "in a real cell", servers, *words, meanwhile=meanwhile), 1, {}, code=130)


# ==== Tokens go nowhere else =========================================================================================


class Trap:
    """A server on another host: it keeps all that it is sent, and answers nothing."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._listener = socket.create_server((ELSEWHERE, 0))
        self.at = f"{ELSEWHERE}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Trap:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.create_connection(self._listener.getsockname()) as own:
            own.sendall(b"the end")
        self._thread.join()
        self._listener.close()

    def _listen(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client:
                client.settimeout(5)
                with contextlib.suppress(TimeoutError):
                    if (data := client.recv(65536)) == b"the end":
                        return
                    self.heard.append(data)


@pytest.fixture
def trap() -> Iterator[Trap]:
    with Trap() as trap:
        yield trap


REDIRECTS = {  # by the number of the person who is sent there
    "1": (301, "http://{elsewhere}/user/x/"),
    "2": (302, "//{elsewhere}/user/x/lab"),
    "3": (307, "http://127.0.0.1:80@{elsewhere}/user/x/"),
}


@pytest.mark.parametrize(
    ("step", "path", "at_work", "reason"),
    [
        ("visit", "/lab$", 0, "the page redirects elsewhere ({})"),
        ("page", "/static/", 0, "a part of the page was answered {}"),
        ("websocket", "/channels$", 0, "the websocket was refused ({})"),
    ],
)
def test_a_redirect_to_another_host_takes_nothing_there(
    step: str, path: str, at_work: int, reason: str, labs: LocalHub, stage: Stage, trap: Trap, page: str
) -> None:
    def away(request: Any) -> Answer | None:
        if not (found := re.search(f"/user/[^/]+-(\\d)/.*{path.lstrip('/')}", request.path)):
            return None
        status, location = REDIRECTS[found[1]]
        return Answer(status, b"", {"Location": location.format(elsewhere=trap.at)})

    words = ["-c", "3", "--page", page, *(["--work"] if step == "websocket" else [])]
    end = stage.rehearse("redirect to another host", step, labs, *words, public=away)
    judge(end, at_work, {reason.format(status): 1 for status, _ in REDIRECTS.values()})
    assert trap.heard == []


# ==== Refused before anything is made ================================================================================


def test_a_token_that_may_not_enter_servers_ends_it_before_anything_is_made(
    labs: LocalHub, record_property: Record
) -> None:
    before = set(labs.users())
    env = labs.environment | {"JUPYTERHUB_VISIT_TOKEN": ""}
    for token in ("", labs.token):
        began_s = time.monotonic()
        with start_tool("stress-test", "-c", "1", "--visit", env=env | {"JUPYTERHUB_VISIT_TOKEN": token}) as run:
            done = run.outcome()
        seconds = f"{time.monotonic() - began_s:.1f}"
        said = done.stderr.partition(". Put")[0].removeprefix("hub-stress-test: ").strip()
        record_property(
            "fault", ("no access:servers", "before", done.code, len(set(labs.users()) - before), seconds, said)
        )
        assert (done.code, done.stdout) == (3, "")
        assert "lacks what visits need: access:servers" in done.stderr
        assert '"scopes"' in done.stderr and "JUPYTERHUB_VISIT_TOKEN" in done.stderr
        assert set(labs.users()) == before


def recorded(url: str) -> str:
    return json.dumps({"log": {"entries": [{"request": {"method": "GET", "url": url}, "response": {"status": 200}}]}})


@pytest.mark.parametrize(
    ("what", "option", "file", "content", "said"),
    [
        (
            "no code cells",
            "--notebook",
            "a.ipynb",
            '{"cells": [{"cell_type": "markdown", "source": "# Hi"}]}',
            "no code",
        ),
        ("no code cells", "--notebook", "a.py", "print(6 * 7)\n", "has no code cells"),
        ("broken notebook", "--notebook", "a.ipynb", '{"cells": [', "cannot be read as a notebook"),
        ("no such notebook", "--notebook", "a.ipynb", None, "cannot be read as a notebook"),
        ("broken HAR", "--page", "a.har", '{"log": {"entries": [', "cannot be read as a HAR file"),
        ("no such HAR", "--page", "a.har", None, "cannot be read as a HAR file"),
        (
            "HAR of another site",
            "--page",
            "a.har",
            recorded("https://www.example.org/"),
            "holds no GET below /user/NAME/",
        ),
    ],
)
def test_a_file_that_is_not_what_was_asked_for_is_refused_and_the_hub_hears_nothing(
    what: str,
    option: str,
    file: str,
    content: str | None,
    said: str,
    trap: Trap,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Record,
) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_text(content)
    env = {"JUPYTERHUB_ENDPOINT": f"http://{trap.at}/hub/api", "JUPYTERHUB_API_TOKEN": "0123456789"}
    told = refused_usage(["stress-test", "--work", option, str(path)], env, capsys)
    assert said in told and str(path) in told
    assert trap.heard == []
    record_property("fault", (what, "usage", 2, 0, "0.0", told.removeprefix("hub-stress-test: ").strip()))
