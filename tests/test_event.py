"""An event's file: groups of people who come and act differently; what is wrong with such a file."""

from __future__ import annotations

import dataclasses
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from localhub import LocalHub
from tool import (
    HUB,
    NOWHERE,
    plan_for,
    refused_usage,
    results_in,
    run_for_results,
    run_tool,
    start_tool,
    tool_users,
    wait_until,
)

CLASS = """
hold = "5m"
think = 5
visit = true
fail-if = ["failed > 0", "server_ready[students].p95 > 30s"]
watch = "proxy=http://proxy:8002/metrics"

[[people]]
name = "students"
count = 250
within = "5m"
profile = "small"
work = true
visit = false
notebook = "class.py"

[[people]]
name = "assistants"
after = "1m"
rate = "1:3,0.5:4s"
profile = {image = "a:b"}
stay = "20m"
server-timeout = 90
"""
GROUP = '[[people]]\nname = "a"\ncount = 3\nwithin = "2s"\n'


def plan_of(file: Path, *words: str) -> hst.Plan:
    return plan_for("stress-test", "--event", str(file), *HUB, *words)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of an event beside what it names."""
    (tmp_path / "class.py").write_text("# %%\n1+1\n")
    (tmp_path / "class.toml").write_text(CLASS)
    return tmp_path / "class.toml"


def test_each_group_has_its_own_keys_and_those_above(file: Path) -> None:
    plan = plan_of(file)
    assert (plan.count, plan.hold_s, plan.opens, plan.is_open, plan.work) == (255, 300.0, True, True, False)
    assert [limit.text for limit in plan.fail_if] == ["failed > 0", "server_ready[students].p95 > 30s"]
    assert [each.text for each in plan.watch] == ["proxy=http://proxy:8002/metrics"]
    base: Any = {"endpoint": HUB[1], "token": HUB[3], "hold_s": 300.0, "think_s": 5.0}
    base |= {"fail_if": plan.fail_if, "watch": plan.watch}
    cells = hst.Given(str(file.parent / "class.py"), (hst.Code("1+1\n"),))
    students: Any = {"group": "students", "count": 250, "within_s": 300.0, "profile": "small", "notebook": cells}
    assistants: Any = {"group": "assistants", "count": 5, "after_s": 60.0, "stay_s": 1200.0, "server_timeout_s": 90.0}
    rate = hst.Schedule(((1.0, 3.0), (0.5, 4.0)))
    assert plan.event == (
        hst.Plan(**base, **students, work=True, visit=False),
        hst.Plan(**base, **assistants, rate_per_s=rate, profile={"image": "a:b"}, visit=True),
    )


def test_once_one_person_of_each_group_comes_at_once(file: Path) -> None:
    plan, usual = plan_of(file, "--once"), plan_of(file)
    assert plan.count == 2 and plan.options()["once"]
    alone = {"count": 1, "within_s": 1.0, "rate_per_s": None, "after_s": 0.0, "once": True}
    assert plan.event == tuple(dataclasses.replace(group, **alone) for group in usual.event)
    assert all(at_s <= 1.0 for at_s, _ in hst.arrivals(plan))


def test_the_command_line_wins_over_keys_above_the_groups(file: Path) -> None:
    plan = plan_of(file, "--hold", "9s", "--fail-if", "failed > 7", "--think", "2s")
    assert (plan.hold_s, [limit.text for limit in plan.fail_if]) == (9.0, ["failed > 7"])
    assert [group.think_s for group in plan.event] == [2.0, 2.0]


def test_the_same_seed_gives_each_group_the_same_moments(file: Path) -> None:
    first, again, other = (hst.arrivals(plan_of(file, "--seed", seed)) for seed in "778")
    assert first == again and first != other and first == sorted(first, key=lambda person: person[0])
    moments = {name: [at_s for at_s, plan in first if plan.group == name] for name in ("students", "assistants")}
    assert len(moments["students"]) == 250 and moments["students"][0] >= 0 and moments["students"][-1] <= 300
    assert moments["assistants"] == [60, 61, 62, 63, 65]


def test_a_dry_run_writes_no_file_that_an_event_names(file: Path) -> None:
    file.write_text("results = 'r.json'\nsamples = 's.csv'\n" + CLASS)
    words = ("stress-test", "--event", str(file), *HUB)
    plan = plan_for("--dry-run", *words)
    assert (plan.results, plan.samples, plan.hold_s) == (None, None, 300.0) and plan_for(*words).samples


ELEVEN: Any = {"count": 1, "within_s": 1e-9, "think_s": 60.0, "notebook": hst.Given("x.py", (hst.Code("1"),) * 11)}


def lasts_s(*groups: hst.Plan) -> float:
    """How long people are there, the first of whom is due at once, after their servers are ready."""
    plan = groups[0] if len(groups) == 1 else hst.Plan(event=groups)
    return round(max(leaves_s for _, leaves_s, _ in hst.timetable(plan)) - hst.USUAL_START_S, 3)


def test_a_timetable_has_the_cells_that_people_get_to() -> None:
    assert lasts_s(hst.Plan(**ELEVEN, work=True)) == 600.0
    assert lasts_s(hst.Plan(**ELEVEN)) == lasts_s(hst.Plan(**ELEVEN, work=True, find_capacity=True)) == 0.0
    leaves_early = hst.Plan(**ELEVEN, group="a", work=True, stay_s=90.0)
    assert lasts_s(leaves_early) == lasts_s(leaves_early, hst.Plan(group="b", count=1, within_s=1e-9)) == 90.0


WRONG = {
    # what is in the file: (the line that is named, what is said)
    "hold = \n": (None, "TOML (Invalid value (at line 1"),
    "hold = 3\n": (None, "[[people]]"),
    GROUP + GROUP: (None, "2 groups called a"),
    '\n[[people]]\ncount = 3\nwithin = "2s"\n': (2, "a group needs a name"),
    GROUP + '[[people]]\nname = "b"\nrate = 3\n': (5, "a group needs a count"),
    '[[people]]\nname = "a"\ncount = 3\n': (1, "a group needs within or rate"),
    GROUP + 'wihtin = "3s"\n': (5, "did you mean within?"),
    'token = "5ecret"\n' + GROUP: (1, "no such key"),
    '"foo(" = 1\n' + GROUP: (1, "no such key"),
    GROUP + "hold = 3\n": (5, "it is one of the table above the groups"),
    "count = 3\n" + GROUP: (1, "it is one of a group"),
    GROUP.replace("= 3", "= [3]"): (3, "not '[3]'"),
    GROUP.replace("= 3", "= true"): (3, "count: expected N, not True"),
    GROUP.replace('"a"', "{x = 7}"): (2, "name: expected letters"),
    GROUP + 'visit = "yes"\n': (5, "true or false, not 'yes'"),
    GROUP + "work = true\nnotebook = 'nope.py'\n": (6, "nope.py cannot be read"),
    GROUP + "rate = 2\n": (5, "--within and --rate exclude each other"),
    '[[people]]\nname = "a"\ncount = 3\nrate = "1:2"\n': (3, "stages of --rate"),
    '[[people]]\nname = "a"\nrate = "1:2x"\n': (3, "rate: expected a duration"),
    GROUP + "work = false\nthink = 5\n": (6, "--think needs --work"),
    "keep = true\n" + GROUP + "stay = 5\n": (6, "--keep and --stay exclude each other"),
    'fail-if = "server_ready[b].p95 > 3s"\n' + GROUP: (None, "there is no group 'b'"),
    'fail-if = ["failed > 3", "failed"]\n' + GROUP: (1, "fail-if: expected METRIC"),
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_refused_with_the_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, expected = WRONG[text]
    (tmp_path / "class.toml").write_text(text)
    said = refused_usage(["stress-test", "--event", str(tmp_path / "class.toml")], NOWHERE, capsys)
    assert expected in said and "5ecret" not in said
    named = re.search(r"class\.toml, line (\d+): ", said)
    assert (int(named[1]) if named else None) == line


def test_each_group_acts_and_is_reported_apart(new_hub: LocalHub, tmp_path: Path) -> None:
    big, small = (f"[[people]]\nname = {name!r}\ncount = {count}\n" for name, count in (("big", 4), ("small", 6)))
    big += "within = '1s'\nprofile = {spawn_s = 1, size = 'big'}\n"
    small += "rate = 6\nafter = 4\nprofile = {size = 'small', fail_rate = 0.3333}\nserver-timeout = '20s'\n"
    file = tmp_path / "event.toml"
    file.write_text(f"keep = true\nfail-if = ['failed > 3', 'server_ready[big].min < 1s']\nrun = 'e'\n{big}{small}")
    done, found = run_for_results(tmp_path / "r", "stress-test", "--event", str(file), hub=new_hub)
    servers = [user["servers"].get("") for name, user in new_hub.users().items() if hst.is_test_user(name, "e")]
    assert run_tool("purge", "--run", "e", hub=new_hub).code == 0 and not tool_users(new_hub)
    sizes = [server["user_options"]["size"] for server in servers if server]
    assert len(servers) == 10 and sizes.count("big") == 4  # as the hub has them
    assert done.code == 0, done
    operations, groups = found["operations"], found["groups"]
    counts = {name: (each["count"], each["failed"]) for name, each in operations.items() if "server_ready" in name}
    failed = counts["server_ready"][1]
    assert failed in (2, 3, 4) and sizes.count("small") == 6 - failed
    assert counts == {"server_ready": (10, failed), "server_ready[big]": (4, 0), "server_ready[small]": (6, failed)}
    whole, *both = (operations[f"server_ready{group}"]["latency_s"] for group in ("", "[big]", "[small]"))
    assert both[0]["min"] >= 1 and whole["min"] == min(each["min"] for each in both)
    assert {name: (each["expected"], each["at_work"], each["failed"]) for name, each in groups.items()} == {
        "big": (4, 4, 0),
        "small": (6, 6 - failed, failed),
    }
    assert f"{10 - failed} of 10 people got a server" in done.summary.splitlines()[0]
    assert "big: 4 expected" in done.summary and "small: 6 expected" in done.summary


def test_an_interrupted_event_counts_those_who_were_starting_by_group(new_hub: LocalHub, tmp_path: Path) -> None:
    groups = (
        f"[[people]]\nname = '{name}'\ncount = {count}\nwithin = '1s'\nprofile = {{hang_rate = 1}}\n"
        for name, count in (("a", 1), ("b", 2))
    )
    (tmp_path / "event.toml").write_text("".join(groups))
    words = ("stress-test", "--event", str(tmp_path / "event.toml"), "--results", str(tmp_path / "r"))
    with start_tool(*words, hub=new_hub) as run:
        wait_until(lambda: sum(bool(user["servers"]) for user in new_hub.users().values()) == 3)
        run.send_signal(signal.SIGINT)
        done = run.outcome()
    found = results_in(tmp_path / "r", done)
    assert found["people"]["under_way"] == 3 and not tool_users(new_hub)
    assert {name: (each["under_way"], each["not_begun"]) for name, each in found["groups"].items()} == {
        "a": (1, 0),
        "b": (2, 0),
    }
