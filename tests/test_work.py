"""People on stubs of real servers, behind a real proxy: they come, open pages, run cells, stay, and leave nothing."""

from __future__ import annotations

import collections
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from localhub import LocalHub
from test_recordings import OURS, entry, har
from tool import THEIR_ADMIN, results_in, run_for_results, run_tool, start_tool, tool_users, wait_until

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
        now, requests = self._hub.truth(), dict[str, dict[int, int]]()
        for request, statuses in now["requests"].items():
            before = self._before["requests"].get(request, {})
            counts = {int(status): n - before.get(status, 0) for status, n in statuses.items()}
            if request != "GET /api" and any(counts.values()):  # with which the hub sees whether a server is up
                requests[request] = {status: n for status, n in counts.items() if n}
        cells, checks = now["cells"][len(self._before["cells"]) :], now["hub_checks"] - self._before["hub_checks"]
        return now | {"cells": cells, "hub_checks": checks, "requests": requests}

    @property
    def log(self) -> str:
        """What the hub logged."""
        return self._hub.log_path.read_bytes()[self._log_before :].decode()

    def cells_of_each(self) -> list[int]:
        """How many cells each kernel ran, sorted."""
        return sorted(collections.Counter(cell["kernel"] for cell in self.truth["cells"]).values())

    def agrees(self, results: dict[str, Any]) -> bool:
        """Whether servers saw the requests that the results have; websockets are not requests, but kept open."""
        seen = collections.Counter[str]()
        for request, statuses in self.truth["requests"].items():
            if not request.endswith("/channels"):
                seen.update({str(status): n for status, n in statuses.items()})
        http = results["http"]["servers"]
        return bool(http["statuses"] == seen and http["requests"] == seen.total())


@pytest.fixture
def witness(labs: LocalHub) -> Iterator[Witness]:
    witness = Witness(labs)
    yield witness
    truth = witness.truth
    assert not tool_users(labs) and {kind: truth[kind] for kind in NOBODY_THERE} == NOBODY_THERE


def script(folder: Path, *cells: str) -> str:
    """A file with these cells; one that begins with a blank has its title in its first line."""
    file = folder / "class.py"
    file.write_text("".join(f"# %%{cell}\n" if cell.startswith(" ") else f"# %%\n{cell}\n" for cell in cells))
    return str(file)


def counts_of(results: dict[str, Any]) -> dict[str, int]:
    return {name: operation["count"] for name, operation in results["operations"].items()}


def test_groups_of_an_event_work_or_just_have_a_server(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    students = "[[people]]\nname = 'students'\ncount = 4\nwithin = '1s'\nwork = true\nthink = 0.2\n"
    guests = "[[people]]\nname = 'guests'\nrate = '3:1s'\nafter = 1\nstay = 1\n"
    (tmp_path / "event.toml").write_text(f"hold = '2s'\n{students}notebook = 'class.py'\n{guests}")
    script(tmp_path, *FIVE_CELLS)
    done, found = run_for_results(tmp_path / "r", "stress-test", "--event", str(tmp_path / "event.toml"), hub=labs)
    counts = counts_of(found)
    expected = {"server_ready": 7, "visit": 4, "kernel_ready": 4, "cell": 16, "at_work": 7, "stay": 7}
    assert done.code == 0 and counts | expected == counts, done
    steps = ("start_server", "server_ready", "at_work", "stay", "stop_server", "delete_user")
    of_guests = {name: number for name, number in counts.items() if "guests" in name}
    assert of_guests == {f"{step}[guests]": 3 for step in steps}
    left_s = [at_s for at_s in found["timeline"]["servers"]["left_s"] if at_s is not None]
    assert len(left_s) == 3  # the guests, while the students stayed
    assert witness.cells_of_each() == [5] * 4


def test_a_search_for_people_keeps_to_the_bound_on_servers(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    words = ("--find-capacity", "--duration", "2s", "--rate", "1", "--max-servers", "5", "--work", "--think", "0.2s")
    cells = ("--notebook", script(tmp_path, *FIVE_CELLS))  # nobody waits for more than the first
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, *cells, hub=labs)
    steps = {round(2 * step["rate_per_s"]): step["held"] for step in found["capacity"]["steps"]}
    behind = "the hub fell behind: the last waited longer than the first"  # as on a busy machine
    best, bound = max((number for number in steps if not steps[number]), default=0), steps.get(5, "") is None
    assert max(steps) <= 5 and {*steps.values()} <= {None, behind} and (bound or behind in steps.values())
    assert done.code == (0 if best else 1) and (counts_of(found)["at_work"] == best or not best)
    assert ("at least 150 people a minute with at most 5 servers at a time" in done.summary) is bound
    assert (found["capacity"]["limited_by"] == "--max-servers 5: the hub may take more") is bound
    assert witness.truth["requests"]["POST /api/kernels"] == {201: sum(steps)} and witness.agrees(found)


def test_servers_count_the_cells_and_requests_of_twelve_people(
    labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    words = ["-v", "-c", "12", "--within", "2s", "--work", "--think", "0.2s"]
    words += ["--notebook", script(tmp_path, *FIVE_CELLS)]
    words += ["--watch", f"proxy=http://127.0.0.1:{labs.proxy.metrics_port}/metrics"]
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=labs)
    assert done.code == 0 and done.summary.startswith("PASSED: 12 of 12 people got to work; half waited ")
    means = found["people"].pop("until_work_s")
    counts = {"expected": 12, "at_work": 12, "failed": 0, "under_way": 0, "not_begun": 0}
    assert found["people"] == counts | {"reasons": {}, "failures": []}
    assert means["at_work"] == pytest.approx(sum(means.values()) - means["at_work"], abs=0.2)  # steps follow each other
    steps = {"server_ready": 12, "visit": 12, "kernel_ready": 12, "at_work": 12, "cell": 48}
    assert counts_of(found) | steps == counts_of(found) and found["failed"] == 0
    truth = witness.truth
    assert witness.cells_of_each() == [5] * 12 and witness.agrees(found)
    assert {cell["server"] for cell in truth["cells"]} == {hst.username(n) for n in range(1, 13)}
    assert truth["requests"]["GET /api/kernels/ID/channels"] == {101: 12}
    assert truth["requests"]["POST /api/kernels"] == {201: 12}
    options, due_s = found["options"], found["timeline"]["servers"]["due_s"]
    drawn_s = [at_s for at_s, _ in hst.arrivals(hst.Plan(count=12, within_s=2.0, seed=options["seed"]))]
    assert [at_s - due_s[0] for at_s in due_s] == pytest.approx([at_s - drawn_s[0] for at_s in drawn_s], abs=2e-3)
    assert re.search(r" DEBUG +GET /user/hub-stress-test-1/lab\S*: 200 in ", done.stderr), done.stderr
    assert labs.visit_token not in done.stdout + done.stderr + (tmp_path / "r").read_text()
    asked = re.findall(r"200 GET \S*/hub/api/user \(hub-stress-test(\S*)@", witness.log)
    assert sorted(asked) == ["", *["-visits"] * 13]  # each token is checked once, and then the visits are
    assert truth["hub_checks"] == 12  # a server asks the hub once for each token that it sees
    after = found["aftermath"]
    assert {"open_files", "rss_bytes", "active_handles"} <= after["proxy"].keys()
    files = after["hub"]["open_files"]
    assert files["peak"] >= files["before"] and files["grown"] == files["after"] - files["before"] <= 50
    assert after["hub"]["proxy_error_pages"]["grown"] == 0 and "aftermath" not in done.summary


def test_people_fetch_what_a_browser_fetched(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    page = {"lab": 200, "static/lab/main.js": 200, "api/kernelspecs?token=5ecret": 200, "nonsense": 404}
    file = tmp_path / "lab.har"
    file.write_text(har(*(entry(OURS + path, status) for path, status in page.items())))
    words = ("stress-test", "-c", "3", "--within", "1s", "--seed", "7", "--page", str(file))
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == counts_of(found)["page"] == 3
    assert witness.truth["requests"] == {
        "GET /": {302: 3},
        "GET /lab": {200: 6},
        "GET /api/status": {403: 1},  # as a browser asks, once in a run
        "GET /static": {200: 3},
        "GET /api/kernelspecs": {200: 3},
        "GET /nonsense": {404: 3},
    }
    assert witness.agrees(found) and found["options"]["seed"] == 7
    file.write_text(har(entry(OURS + "lab"), entry(OURS + "nonsense?x=1")))
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 1 and "3 × a part of the page was answered 404" in done.summary
    assert {failure["message"] for failure in found["people"]["failures"]} == {"nonsense"}


def test_each_person_leaves_after_their_own_stay(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "4", "--within", "9s", "--seed", "2", "--work", "--stay", "1s", "--think", "0.3s")
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == 4
    assert [counts_of(found)[step] for step in ("stay", "stop_server", "delete_user")] == [4, 4, 4]
    assert counts_of(found)["cell"] == len(witness.truth["cells"]) - 4 > 0
    assert witness.truth["requests"]["DELETE /api/kernels/ID"] == {204: 4} and witness.agrees(found)
    line, log = found["timeline"]["servers"], witness.log
    assert all(left_s >= works_s + 1.0 for works_s, left_s in zip(line["works_s"], line["left_s"]))
    assert min(line["left_s"]) < max(line["works_s"])  # the first has left before the last has come
    for path in [f"{name}{server}" for name in line["user"] for server in ("/server", "")]:
        assert re.search(rf" 204 DELETE \S*/users/{path} ", log)


def test_people_who_stay_work_on_and_visit_once_more(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "3", "--work", "--hold", "5s", "--think", "0.5s")
    done, found = run_for_results(tmp_path / "r", *words, hub=labs)
    assert done.code == 0 and found["people"]["at_work"] == counts_of(found)["stay"] == 3 and not found["failed"]
    assert counts_of(found)["cell"] == len(witness.truth["cells"]) - 3 and 3 <= counts_of(found)["cell"] <= 3 * 11
    assert witness.truth["requests"]["GET /"] == {302: 6} and witness.agrees(found)


MAY_RAISE = ' tags=["raises-exception"]\nraise ValueError()'


@pytest.mark.parametrize(
    ("cells", "reason", "done_before"),
    [
        (["raise KeyError()", "2 * 2"], "cell 1 raised KeyError", 0),
        (["1 * 1", MAY_RAISE, "import time; time.sleep(20)", "2 * 2"], "no result after 6.00 s", 2),
        (["1 * 1", "import os; os._exit(1)", "2 * 2"], "the kernel died", 1),
    ],
)
def test_a_person_whose_cell_fails_runs_no_more(
    cells: list[str], reason: str, done_before: int, labs: LocalHub, witness: Witness, tmp_path: Path
) -> None:
    patience = "6s" if "no result" in reason else "30s"  # a kernel's end is noticed after seconds
    words = ["-c", "2", "--work", "--think", "0.1s", "--cell-timeout", patience]
    words += ["--notebook", script(tmp_path, *cells)]
    done, found = run_for_results(tmp_path / "r", "stress-test", *words, hub=labs)
    assert done.code == 1 and f"2 × {reason} (hub-stress-test-" in done.summary
    assert found["people"]["reasons"] == {reason: 2} and found["failed"] == 2
    assert found["people"]["at_work"] == (2 if done_before else 0)
    assert ("2 failed afterwards" in done.summary) == (done_before > 0)
    assert ("memory limit" in done.summary) == ("died" in reason)
    assert len(witness.truth["cells"]) == 2 * (done_before + 1)


def test_at_the_hubs_own_port_the_public_url_is_missing(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    env = {"JUPYTERHUB_ENDPOINT": labs.hub_endpoint}
    words, many = ("stress-test", "--visit"), ("-c", "20", "--rate", "1", "--visit-timeout", "2s")
    done, found = run_for_results(tmp_path / "r", *words, *many, hub=labs, env=env)
    assert done.code == 1 and "name where people reach the hub with --public-url" in done.summary
    assert "the proxy no route to the server?" in done.summary
    assert 1 <= counts_of(found)["start_server"] < 15 and not witness.truth["requests"]  # nobody else comes
    done = run_tool(*words, "-c", "2", "--public-url", labs.public_url, hub=labs, env=env)
    assert done.code == 0 and "2 of 2 people opened their page" in done.summary


def test_an_interrupt_while_people_work_counts_each_once(labs: LocalHub, witness: Witness, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "6", "--within", "30s", "--seed", "71", "--work", "--think", "5m")
    with start_tool(*words, "--results", str(tmp_path / "r"), hub=labs) as run:
        wait_until(lambda: len(witness.truth["cells"]) >= 2)
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    people = results_in(tmp_path / "r", done)["people"]
    assert done.code == 130 and people["at_work"] >= 1 and people["at_work"] + people["failed"] == 6
    assert people["reasons"] == {"cut short before getting to work": people["failed"]}
