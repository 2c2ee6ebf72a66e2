"""What is asked for: conditions, values, options, the environment, logs; refusals; and the plan of a dry run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import golden
import hub_stress_test as hst
from fault_proxy import FaultProxy
from localhub import LocalHub
from tool import HUB, NOWHERE, plan_for, refused_usage, results_in, run_tool

PLANS = Path(__file__).with_name("golden") / "plans.txt"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that options name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text('{"schema": 1}')
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "class.py").write_text("# %%\n1+1\n")
    asked = {"method": "GET", "url": "https://hub.example.org/user/alice/lab"}
    entry = {"request": asked, "response": {"status": 200}}
    (tmp_path / "lab.har").write_text(json.dumps({"log": {"entries": [entry]}}))
    people = {"students": "count = 200\nwithin = '5m'\nwork = true\n", "assistants": "rate = '1:10'\nstay = '5m'\n"}
    groups = [f"[[people]]\nname = '{name}'\n{keys}" for name, keys in people.items()]
    (tmp_path / "class.toml").write_text("\n".join(["hold = '10m'", *groups, "after = '1m'\n"]))
    return tmp_path


# ==== Conditions =====================================================================================================

LATENCY_S = dict(zip(hst.LATENCY_STATISTICS, (1, 2, 2, 3, 4, 5, 6)))
RESULTS: dict[str, Any] = {
    "failed": 3,
    "failed_rate": 0.03,
    "http": {"throttled": 7, "statuses": {"200": 40, "429": 7}, "servers": None},
    "hub": {"metrics": {"cpu_share_max": 0.91, "event_loop_lag_max_s": 0.25}},
    "people": {"until_work_s": {}},  # nobody got to work
    "groups": None,
    "servers": {"reasons": {}},
    "aftermath": {"hub": {"rss_bytes": {"grown": 7.2e6}}},
    "operations": {
        "server_ready[first class]": {"count": 2, "failed": 0, "latency_s": dict.fromkeys(LATENCY_S, 9)},
        "server_ready": {"count": 100, "failed": 3, "rate_per_s": 5.0, "latency_s": LATENCY_S},
        "ping": {"count": 4, "failed": 4, "rate_per_s": None, "latency_s": dict.fromkeys(LATENCY_S)},
    },
}
VALUES = {
    "failed": 3,
    "throttled": 7,
    **{f"server_ready.{name}": value for name, value in LATENCY_S.items()},
    "server_ready.failed": 3,
    "server_ready.count": 100,
    "server_ready.rate_per_s": 5,
    "server_ready[first class].p95": 9,
    "operations.server_ready.latency_s.p95": 4,
    "http.statuses.503": 0,  # which never came
    "servers.reasons.it was lost": 0,
    "hub.metrics.cpu_share_max": 0.91,
}


def test_a_metric_has_the_value_at_its_path() -> None:
    assert {metric: hst.metric_value(RESULTS, metric) for metric in VALUES} == VALUES


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("server_ready.p95 > 3999ms", True),
        ("server_ready.p95>4s", False),
        ("server_ready.p95 >= 4s", True),
        ("server_ready.p95 <= 4s", True),
        ("server_ready.p95 < 0.1m", True),
        ("failed_rate > 2%", True),
        ("hub.metrics.cpu_share_max > 92%", False),
        ("aftermath.hub.rss_bytes.grown > 7199kB", True),
        ("server_ready.p95 > 1.5x", False),
        ("server_ready.p95 > 0.9x", True),
        ("ping.p95 > 1s", True),  # nothing succeeded, so nothing was measured
        ("activity.p95 > 1s", True),  # there was none
        ("people.until_work_s.at_work > 10s", True),
        ("groups.students.failed > 3", True),  # there are no groups
    ],
)
def test_a_condition_has_units_and_is_met_without_data(text: str, met: bool) -> None:
    assert hst.condition(text).judge(RESULTS, RESULTS).held is met


def test_a_multiple_of_what_the_baseline_lacks_is_met() -> None:
    judged = hst.condition("server_ready.p95 > 2x").judge(RESULTS, {"schema": 1})
    assert judged == hst.Judgement("server_ready.p95 > 2x", 4.0, True)


UNITS_OF = {
    "ms s m": ["ping.p95", "hub.metrics.cpu_s", "people.until_work_s.page", "operations.visit.lateness_s.max"],
    "kB MB GB": ["hub.metrics.rss_max_bytes", "aftermath.hub.rss_bytes.grown"],
    "%": ["failed_rate", "hub.metrics.cpu_share_max", "http.observer_share"],
    "": ["failed", "ping.count", "ping.rate_per_s", "http.statuses.503", "servers.phases.new_node"],
}


@pytest.mark.parametrize("units", UNITS_OF)
def test_a_unit_fits_the_key_or_is_refused(units: str) -> None:
    for metric, unit in itertools.product(UNITS_OF[units], hst.UNITS.keys() - {"", "x"}):
        with contextlib.nullcontext() if unit in units.split() else pytest.raises(hst.UsageError, match="does not fit"):
            plan_for("stress-test", "--visit", *HUB, "--fail-if", f"{metric} > 1{unit}")


def test_a_groups_name_has_no_unit() -> None:
    assert hst.unit_of("groups.shared.at_work") == "" and hst.unit_of("hub.metrics.cpu_share_max") == "%"


def test_an_absent_name_counts_0_only_in_mappings_of_counts() -> None:
    records = [kind for kind in vars(hst).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    declared = {field.name for kind in records for field in dataclasses.fields(kind) if field.type == "dict[str, int]"}
    assert {"statuses", "reasons", "errors"} <= declared <= set(hst.COUNTS)


# ==== Values =========================================================================================================

GOOD_VALUES = [
    (hst.whole_number, "0100", 100),
    (hst.positive_number, ".5", 0.5),
    (hst.rate_of, "1:2m, .5:90", hst.Schedule(((1.0, 120.0), (0.5, 90.0)))),
    (hst.duration, "90", 90.0),
    (hst.duration, "1.5m", 90.0),
    (hst.duration, "1h", 3600.0),
    (hst.run_name, "a" * 40, "a" * 40),
    (hst.endpoint_url, "https://hub.example.org/hub/api/", "https://hub.example.org/hub/api"),
    (hst.endpoint_url, "http://me:pw@[::1]:8/hub/api", "http://[::1]:8/hub/api"),
    (hst.token_text, "abc-!~", "abc-!~"),
    (hst.header, "X-Access: a b:c", ("X-Access", "a b:c")),
    (hst.header, "Cookie:a=1; b=2 ", ("Cookie", "a=1; b=2")),
    (hst.header, "~!#$%&'*+.^_`|-9:\t x", ("~!#$%&'*+.^_`|-9", "x")),
    (hst.mix_of, "activity=8, read=.5,own-one=2", {"activity": 8.0, "read": 0.5, "own-one": 2.0}),
    (hst.profile_value, ' {"image": "a:b"}', {"image": "a:b"}),
]
BAD_VALUES: dict[Callable[[str], Any], list[str]] = {
    hst.condition: ["", "failed", "failed > ", "failed = 1", "> 1", "failed > 1 parsec", "a > 1 > 2", "failed > -1"],
    hst.watched: ["", "proxy", "proxy=", "proxy=127.0.0.1:8002", "=http://x/", "hub=http://x/metrics", "a b=http://x/"],
    hst.whole_number: ["", "0", "-1", "1.5", "1e3", "x", "١"],
    hst.positive_number: ["", "0", "0.0", "-1", "1e3", "nan", "inf", "x"],
    hst.rate_of: ["", "0", "1:", ":2m", "1:2m,", "1:2m,5", "1:2m:5", "1;2m"],
    hst.duration: ["", "0", "0s", "5 minutes", "-1s", "1d", "s", "1m30s"],
    hst.samples_file: ["", "s", "s.json", "s.csv.bz2", "csv", "/nowhere/s.csv"],
    hst.run_name: ["", "Big", "-a", "a-", "a_b", "a b", "a" * 41, "a\n"],
    hst.endpoint_url: ["", "hub", "hub.example.org/hub/api", "ftp://x/", "https://", "http://x/?a=1", "http://x/#a"],
    hst.token_text: ["", "abc\ndef", "a b", "ä"],
    hst.header: ["", "X-A", "X-A:", "X-A: ", ": x", "X A: x", "X-Ä: x", "X: ä", "X: a\nb", "X: a\x00", "Host: x"],
    hst.mix_of: ["", "activity", "activity=", "activity=0", "activity=1,", "activity=-1", "activity=1=2"],
    hst.profile_value: ["{broken", "[1]"],
}


@pytest.mark.parametrize(("kind", "text", "value"), GOOD_VALUES)
def test_a_value_is_understood(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_a_wrong_value_is_refused(kind: Callable[[str], Any]) -> None:
    for text in BAD_VALUES[kind]:
        with pytest.raises(hst.UsageError):
            kind(text)


@pytest.mark.parametrize(
    "words",
    [
        *(["--header", text] for text in ("X-A 5ecret", "X-Ä: 5ecret", "Host: 5ecret", "authorization: 5ecret")),
        ["--token", "5ecret \n"],
        ["--endpoint", "ftp://me:5ecret@hub.example.org/"],
    ],
)
def test_a_secret_that_is_refused_is_not_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "5ecret" not in refused_usage(["purge", *words], NOWHERE, capsys)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}'])
def test_a_file_without_results_is_no_baseline(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(hst.UsageError, match="results"):
        hst.results_file(str(tmp_path / "results.json"))


def test_writable_files_are_recognised_without_writing(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(hst.UsageError, match="cannot be written"):
            hst.writable_file(str(bad))
    assert hst.writable_file(str(tmp_path / "new")) == str(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# ==== Options ========================================================================================================

GIVEN: dict[str, tuple[str | None, Any]] = {
    # field: (what is given, what it means)
    "endpoint": ("http://x/hub/api", "http://x/hub/api"),
    "token": ("abc", "abc"),
    "headers": ("X-Access: 5ecret", (("X-Access", "5ecret"),)),
    "dry_run": (None, True),
    "log_to_file": ("run.log", "run.log"),
    "verbose": (None, True),
    "run": ("night", "night"),
    "results": ("r.json", "r.json"),
    "report": ("r.html", "r.html"),
    "fail_if": (" failed  >  2 ", (hst.condition("failed > 2"),)),
    "baseline": ("old.json", {"schema": 1}),
    "count": ("7", 7),
    "batch_size": ("3", 3),
    "keep": (None, True),
    "profile": ("small", "small"),
    "server_timeout_s": ("2m", 120.0),
    "fail_fast": ("3", 3),
    "own_servers": (None, True),
    "rate_per_s": ("2.5", 2.5),
    "hold_s": ("4s", 4.0),
    "workers": ("20", 20),
    "duration_s": ("9s", 9.0),
    "processes": ("2", 2),
    "mix": ("activity=8,read=2", {"activity": 8.0, "read": 2.0}),
    "operations": ("mine.py", "mine.py"),
    "within_s": ("5m", 300.0),
    "seed": ("7", 7),
    "visit": (None, True),
    "visit_timeout_s": ("20", 20.0),
    "page": ("lab.har", hst.Given("lab.har", (("lab", 200),))),
    "work": (None, True),
    "notebook": ("class.py", hst.Given("class.py", (hst.Code("1+1\n"),))),
    "think_s": ("5", 5.0),
    "cell_timeout_s": ("2m", 120.0),
    "stay_s": ("5m", 300.0),
    "check_proxy": (None, True),
    "public_url": ("https://hub.example.org/", "https://hub.example.org"),
    "watch": ("p=http://me:pw@x/metrics", (hst.Given("p=http://x/metrics", ("p", "http://me:pw@x/metrics")),)),
    "find_capacity": (None, True),
    "samples": ("s.csv.gz", "s.csv.gz"),
    "metrics_port": ("9101", 9101),
    "max_servers": ("7", 7),
    "cleanup_timeout_s": ("1m", 60.0),
}
COMPANIONS = {  # options without which these say nothing
    "seed": ["--within", "5m"],
    **dict.fromkeys(("max_servers", "duration_s"), ["--find-capacity"]),
    **dict.fromkeys(("notebook", "think_s", "cell_timeout_s"), ["--work"]),
    **dict.fromkeys(("visit_timeout_s", "public_url"), ["--visit"]),
}


@pytest.mark.parametrize("field", GIVEN)
def test_every_flag_sets_its_field_and_no_other(field: str, files: Path) -> None:
    (value, meaning), row = GIVEN[field], hst.OPTIONS[field]
    default = {field: getattr(hst.Plan(), field)}
    for command, flag in itertools.product({*row.on} & {*hst.COMMANDS}, row.flags):
        words = [*HUB, command, *COMPANIONS.get(field, ())]
        plan = plan_for(*words, flag, *([value] if value else []))
        assert getattr(plan, field) == meaning != default[field]
        assert dataclasses.replace(plan, **default) == dataclasses.replace(plan_for(*words), **default)


@pytest.mark.parametrize("field", COMPANIONS)
def test_an_option_that_says_nothing_alone_is_refused(field: str, files: Path) -> None:
    value, _ = GIVEN[field]
    with pytest.raises(hst.UsageError, match=f"{hst.OPTIONS[field].flag} needs --"):
        plan_for("stress-test", *HUB, hst.OPTIONS[field].flag, *([value] if value else []))


EXCLUDING = {
    "--find-capacity": ["--hold 5m", "--stay 5m", "--keep", "--check-proxy"],
    "--dry-run": ["--results r", "--report r", "--samples s.csv", "--metrics-port 9"],
    "--keep": ["--stay 1m", "--check-proxy"],
    "--hold 1m": ["--stay 1m"],
    "--within 1m": ["--rate 2"],
    "--event class.toml": ["--count 9", "--within 9s", "--rate 9", "--rate 9:1m"],
}


@pytest.mark.parametrize(("first", "other"), [(first, other) for first in EXCLUDING for other in EXCLUDING[first]])
def test_options_that_contradict_each_other_are_refused(first: str, other: str, files: Path) -> None:
    with pytest.raises(hst.UsageError, match=f"{first.split()[0]} and {other.split()[0]} exclude each other"):
        plan_for("stress-test", *HUB, *first.split(), *other.split())


def test_the_table_of_options_is_whole() -> None:
    assert hst.OPTIONS.keys() - GIVEN.keys() == {"event", "once", "group", "after_s", "scale", "visits"}
    assert len(hst.OPTIONS) <= 49
    for row in hst.OPTIONS.values():
        assert {*row.needs.split(), *row.excludes.split()} <= hst.OPTIONS.keys()


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_results_have_the_commands_options_without_secrets_and_baseline(command: str, files: Path) -> None:
    assert plan_for(command, *HUB) == hst.Plan(command, endpoint=HUB[1], token=hst.Secret("t"))
    plan = plan_for(command, *HUB, "--baseline", "old.json", "--fail-if", "failed > 2", "--fail-if", "throttled > 9")
    options = plan.options()
    rows = [row for row in hst.OPTIONS.values() if command in row.on]
    assert options.keys() == {row.key for row in rows} - {"token", "header", "baseline"}
    assert options["fail_if"] == ["failed > 2", "throttled > 9"]
    assert json.loads(json.dumps(options)) == options


def test_what_was_read_from_text_is_reported_as_text(files: Path) -> None:
    words = ["--work", "--notebook", "class.py", "--page", "lab.har", "--watch", "p=http://me:pw@x/m", "--rate", "1:2m"]
    options = plan_for("stress-test", *HUB, *words).options()
    names = ("notebook", "page", "watch", "rate", "count")
    assert [options[name] for name in names] == ["class.py", "lab.har", ["p=http://x/m"], "1:120s", 120]
    assert hst.rate_of(options["rate"]) == hst.rate_of("1:2m")


def test_the_stages_of_a_rate_decide_count_or_duration() -> None:
    people, requests = (plan_for(command, *HUB, "--rate", "1:2m,5:1m") for command in hst.LOADS)
    assert (people.count, people.duration_s) == (420, None)
    assert (requests.count, requests.duration_s) == (100, 180.0)


def test_global_options_stand_before_or_after_the_command() -> None:
    assert plan_for("--run", "x", "stress-test", *HUB) == plan_for(*HUB, "stress-test", "--run", "x")
    assert plan_for("--run", "x", "-v", "stress-test", *HUB, "--run", "y").run == "y"
    plan = plan_for("--fail-if", "failed > 5", *HUB, "purge", "--fail-if", "throttled > 1", "--fail-if", "failed > 6")
    assert [limit.text for limit in plan.fail_if] == ["failed > 5", "throttled > 1", "failed > 6"]
    assert plan_for("stress-test", *HUB, "--fail-fast", "-c", "3").fail_fast == 1
    assert plan_for("--log-to-file", "purge", *HUB).log_to_file is True


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_ENDPOINT")
    for name, value in zip(names, ("http://server/hub/api", "env", "http://env/hub/api")):
        monkeypatch.setenv(name, value)
    assert (plan_for("purge").endpoint, plan_for("purge").token) == ("http://env/hub/api", "env")
    assert (plan_for("purge", *HUB).endpoint, plan_for("purge", *HUB).token) == (HUB[1], "t")
    monkeypatch.delenv("JUPYTERHUB_ENDPOINT")
    assert plan_for("purge").endpoint == "http://server/hub/api"


def test_users_are_removed_as_fast_as_they_came() -> None:
    cases: dict[int, dict[str, Any]] = {
        50: {"count": 300, "batch_size": 50},
        20: {"count": 300, "rate_per_s": 10.0},
        60: {"count": 300, "within_s": 10.0},
        10: {"count": 300, "within_s": 300.0},
        100: {"count": 9000, "within_s": 10.0},
    }
    assert [hst.Plan(**fields).removed_at_once for fields in cases.values()] == list(cases)
    assert hst.Plan(hst.ACTIVITY, rate_per_s=50.0).removed_at_once == 10


# ==== Bad usage ======================================================================================================

BAD_USAGE = {
    "": "COMMAND",
    "stress": "stress",
    "stress-test --witihn=5m": "did you mean --within?",
    "purge --count 3": "stress-test and activity-stress-test",
    "stress-test --coun 3": "did you mean --count?",
    "stress-test 30": "'30'",
    "stress-test --count 0": "--count: expected a whole number",
    "-e hub.example.org/hub/api purge": "expected a URL",
    "purge --log-to-file /nowhere/log": "/nowhere/log: cannot be written",
    "purge --baseline /nowhere.json": "cannot be read as results",
    "purge --results /nowhere/r.json": "cannot be written",
    # conditions
    "stress-test --fail-if 'visit.p95 > 9s'": "with --visit, --page, --work or --check-proxy (see",
    "stress-test --fail-if 'operations.at_work.latency_s.p95 > 9s'": "at_work is measured",
    "stress-test --fail-if 'stay.failed > 9'": "with --hold or --stay (see",
    "stress-test --fail-if 'people.failed > 0'": "with --visit, --page, --work, --check-proxy or --event (see",
    "stress-test --fail-if 'proxy_check.leaking > 0'": "with --check-proxy (see",
    "stress-test --fail-if 'activity.failed > 0'": "stress-test does not measure activity",
    "stress-test --fail-if 'aftermath.proxy.open_files.grown > 9'": "with --watch proxy=URL",
    "stress-test --fail-if 'groups.students.failed > 0'": "no group 'students'",
    "stress-test --fail-if 'failed[students] > 0'": "no 'failed[students]' in the results",
    "stress-test --find-capacity --fail-if 'create_users.p95 > 9s'": "a search does not measure create_users",
    "activity-stress-test --fail-if 'servers.failed > 0'": "does not measure servers",
    "activity-stress-test --fail-if 'read.p95 > 9s'": "does not measure read",
    "stress-test --keep --fail-if 'delete_user.failed > 0'": "does not measure delete_user",
    "purge --fail-if 'create_users.failed > 0'": "purge does not measure create_users",
    "purge --fail-if 'list_users.p95 > 2x'": "needs a --baseline",
    "purge --fail-if 'pong.p95 > 2s'": "nearest is ping.p95",
    "purge --fail-if 'hub.cpu_share_max > 90%'": "is hub.metrics.cpu_share_max",
    "purge --fail-if 'capacity.steps > 2'": "no 'capacity.steps' in the",
    "activity-stress-test --find-capacity --fail-if 'hub.metrics.cpu_share > 90%'": "throttled and OPERATION.STAT",
    # options beside each other
    "stress-test --find-capacity --count 9": "--within too",
    "stress-test --find-capacity --within 5m": "--count too",
    "activity-stress-test --find-capacity --rate 1:2m": "without stages",
    "stress-test --find-capacity --max-servers 5": "the first step has 6 people",
    "stress-test --once": "--once needs --event",
    "stress-test --visit-timeout 5s": "--visit, --page, --work or --check-proxy",
    "stress-test --rate 1:2m,5:1m -c 9": "leave out --count",
    "activity-stress-test --rate 1:2m,5:1m --duration 9s": "leave out --duration",
    "activity-stress-test --processes 200": "more than --workers 100",
    "activity-stress-test --mix dance=1": "no operation 'dance'",
    "activity-stress-test --operations broken.py": "broken.py: ZeroDivisionError: division by zero",
    "stress-test --page class.py": "argument --page: class.py cannot be read as a HAR file",
    "stress-test --work --notebook mine.py": "argument --notebook: mine.py has no code cells",
}


@pytest.mark.parametrize("line", BAD_USAGE)
def test_bad_usage_is_refused_in_one_sentence(line: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is sent: nobody answers at `NOWHERE`, which would be exit code 3."""
    said, command = refused_usage(shlex.split(line), NOWHERE, capsys), [w for w in line.split() if w in hst.COMMANDS]
    assert BAD_USAGE[line] in said and said.endswith(f"(see {' '.join(['hub-stress-test', *command])} --help)\n")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "give --endpoint; and no token: set JUPYTERHUB_API_TOKEN"),
        (NOWHERE | {"JUPYTERHUB_ENDPOINT": "hub"}, "JUPYTERHUB_ENDPOINT"),
        (NOWHERE | {"JUPYTERHUB_API_TOKEN": "a b"}, "JUPYTERHUB_API_TOKEN"),
    ],
)
def test_a_wrong_environment_is_refused(env: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused_usage(["purge"], env, capsys)


def test_a_condition_may_be_on_a_step_that_somebody_takes() -> None:
    words = ["--work at_work.p95", "--visit operations.at_work.latency_s.p95", "--check-proxy visit.failed"]
    words += ["--visit delete_user.max", "--watch=a=http://a/m aftermath.a.x.peak"]
    for option, metric in map(str.split, words):
        assert plan_for("stress-test", *HUB, option, "--fail-if", f"{metric} > 9{hst.unit_of(metric)}").fail_if


# ==== Help, and logs =================================================================================================


@pytest.mark.parametrize("command", ["", *hst.COMMANDS])
def test_help_has_the_commands_own_words_and_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        hst.main([*command.split(), "--help"])
    text, places = capsys.readouterr().out, {command} if command else {*hst.COMMANDS}
    assert end.value.code == 0 and text.startswith("usage: hub-stress-test ") and text.count("in seconds") == 1
    assert hst.COMMANDS.get(command, hst.__doc__ or "no docstring") in text
    rows = [row for row in hst.OPTIONS.values() if places <= {*row.on} - {*row.hidden_on}]
    assert [group for group in hst.HELP_GROUPS if f"\n{group}:\n" in text] == [
        group for group in hst.HELP_GROUPS if any(group == row.about for row in rows)
    ]
    shown = {*re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[a-z-]+)", text, re.M)}
    assert shown == {"--help", "--version", *(row.flag for row in rows)}
    for example in re.findall(r"^example: hub-stress-test (.*)", text, re.M):
        assert plan_for(*shlex.split(example), *HUB).command == command


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hst.main(["--version"])
    assert capsys.readouterr().out == f"hub-stress-test {hst.__version__}\n"


def test_without_requests_the_program_ends_with_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-S", hst.__file__, "--help"], capture_output=True, text=True)
    said = "hub-stress-test: requests is not installed: pip install requests\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_no_log_repr_or_result_shows_a_secret(logging_as_before: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--header", "X-Access: the 1st 5ecret", "purge", *HUB[:3], "t5ecret", "--header", "Cookie: the 2nd 5ecret"]
    args = hst.parse_args(words)
    plan = hst.plan_of(args)
    assert plan.headers == (("X-Access", "the 1st 5ecret"), ("Cookie", "the 2nd 5ecret"))
    assert "5ecret" not in repr(args) + repr(plan) + json.dumps(plan.options())
    hst.setup_logging(args=args)
    try:
        raise ValueError("sent t5ecret, the 1st 5ecret")
    except ValueError:
        hst.LOG.exception("with %s", dict(plan.headers) | {"also": "the 2nd 5ecret", "token": "t5ecret"})
    log = capsys.readouterr().err
    assert "5ecret" not in log and "ValueError: sent ***, ***" in log and "'also': '***'" in log


def test_a_file_that_is_no_log_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine\n")
    said = refused_usage(["purge", "--log-to-file", str(tmp_path / "notes.txt")], NOWHERE, capsys)
    assert "not a log of hub-stress-test" in said and (tmp_path / "notes.txt").read_text() == "mine\n"


def test_runs_in_one_second_do_not_share_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_as_before: None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert [hst.main(["--dry-run", "--log-to-file", "purge"]) for _ in range(3)] == [0, 0, 0]
    assert len(list(tmp_path.glob("hub-stress-test-*.log"))) == 3


# ==== The plan, and a run of it ======================================================================================


def test_a_dry_run_prints_the_golden_plan(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_VISIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (files / "class.py").write_text("# %%\n1\n# %%\n2\n# %%\n3\n")
    lines, pages = re.findall(r"^\$ (.*)\n", (golden.FOLDER / "plans.txt").read_text(), re.M), ""
    for line in lines:
        assert hst.main(["--dry-run", *shlex.split(line)]) == 0
        pages += f"$ {line}\n{capsys.readouterr().out}\n"
    assert golden.is_golden(pages, "plans")


def test_the_moments_of_a_plan_are_those_of_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "stress-test", "--within", "1h"]
    assert hst.main(words) == 0
    page = capsys.readouterr().out
    seed = re.search(r"--seed (\d+)\)", page)
    assert seed and hst.main([*words, "--seed", seed[1]]) == 0 and capsys.readouterr().out == page


def numbers(value: Any, path: str = "") -> Iterator[str]:
    """The path of every number in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def test_a_run_does_what_its_plan_says(new_hub: LocalHub, proxy: FaultProxy, tmp_path: Path) -> None:
    endpoint = proxy.endpoint.replace("//", "//someone:pa55word@")
    env = {"JUPYTERHUB_API_URL": endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token}
    log, results = tmp_path / "run.log", tmp_path / "r.json"
    words = ["stress-test", "-c", "7", "-b", "3", "--hold", "1s"]
    planned = run_tool("--dry-run", *words, env=env).summary
    assert proxy.requests == []
    done = run_tool("-v", "--log-to-file", str(log), *words, "--results", str(results), env=env)
    assert done.code == 0 and done.stderr.startswith(f"Logging to {log}\n")

    # it sends the requests of the plan,
    sent = [f"{request.method} {request.path.partition('?')[0]}" for request in proxy.requests]
    kinds = {
        "check": "GET /hub/api/(user)?",
        "list": "GET /hub/api/users",
        "create": "POST /hub/api/users",
        "start": "POST .*/server",
        "stop": "DELETE .*/server",
        "delete": "DELETE .*[0-9]",
    }
    for noun, pattern in kinds.items():
        number = sum(bool(re.fullmatch(pattern, line)) for line in sent)
        assert f" {hst.counted(number, noun)}" in planned, noun
    reads = {f"GET /hub/api/users/hub-stress-test-{n}" for n in range(1, 8)}
    assert "7 reads" in planned and {line for line in sent if re.fullmatch("GET .*-[0-9]", line)} == reads

    # logs each with its response time, to a log that the next run adds to,
    for request, status in (("POST /hub/api/users", 201), ("DELETE /hub/api/users/hub-stress-test-1", 204)):
        assert re.search(rf" DEBUG +{request}: {status} in \d+\.\d{{3}} s$", log.read_text(), re.MULTILINE)
    before = log.read_text()
    assert run_tool("purge", "--log-to-file", str(log), env=env).code == 0
    added = log.read_text().removeprefix(before)
    assert before.startswith(hst.LOG_HEADER) and "Found 0 users" in added and "DEBUG" not in added
    assert not re.search(f"pa55word|{new_hub.token}", log.read_text() + done.stdout + done.stderr)

    # and every number of its results may be in a condition, by its path
    found = results_in(results, done)
    ruled_out = {"schema", "exit_code", *numbers(found["options"], "options"), *numbers(found["timeline"], "timeline")}
    paths = set(numbers(found)) - ruled_out
    assert {"hub.metrics.cpu_share", "servers.failed", "http.statuses.200", "aftermath.hub.rss_bytes.peak"} <= paths
    assert {path: hst.nearest_metric(path) for path in paths} == dict.fromkeys(paths, "")
    assert all(hst.metric_value(found, path) is not None for path in paths)
    assert all(hst.nearest_metric(path) for path in ruled_out)
    assert {path for path in paths if not hst.nearest_metric(path, paths=False)} == {"failed", "failed_rate"}
