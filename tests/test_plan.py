"""What is asked for: conditions, values, options, the environment; what is refused, before anything is sent."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst
from fault_proxy import FaultProxy
from localhub import LocalHub
from tool import NOWHERE, refused_usage, run_for_results, run_tool, tool_users

# ==== Conditions =====================================================================================================

RESULTS: dict[str, Any] = {
    "failed": 3,
    "failed_rate": 0.03,
    "http": {"throttled": 7, "statuses": {"200": 40, "429": 7}, "servers": None},
    "hub": {"metrics": {"cpu_share_max": 0.91, "event_loop_lag_max_s": 0.25}},
    "people": {"at_work": 0, "failed": 3, "reasons": {}, "until_work_s": {}},  # nobody got to work
    "groups": None,
    "servers": {"lost": 1, "reasons": {}},
    "aftermath": {"hub": {"rss_bytes": {"grown": 7.2e6}, "open_files": {"grown": 60}}},
    "operations": {
        "server_ready[first class]": {"count": 2, "failed": 0, "latency_s": dict.fromkeys(hst.LATENCY_STATISTICS, 9)},
        "server_ready": {
            "count": 100,
            "failed": 3,
            "rate_per_s": 5.0,
            "latency_s": {"min": 1, "mean": 2, "p50": 2, "p90": 3, "p95": 4, "p99": 5, "max": 6},
        },
        "ping": {
            "count": 4,
            "failed": 4,
            "rate_per_s": None,
            "latency_s": dict.fromkeys(hst.LATENCY_STATISTICS),
            "errors": {},
        },
    },
}
VALUES = {
    "failed": 3,
    "failed_rate": 0.03,
    "throttled": 7,
    "server_ready.min": 1,
    "server_ready.mean": 2,
    "server_ready.p50": 2,
    "server_ready.p90": 3,
    "server_ready.p95": 4,
    "server_ready.p99": 5,
    "server_ready.max": 6,
    "server_ready.failed": 3,
    "server_ready.count": 100,
    "server_ready.rate_per_s": 5,
    "server_ready[first class].p95": 9,
    "operations.server_ready.latency_s.p95": 4,
    "http.statuses.429": 7,
    "http.statuses.503": 0,  # which never came
    "servers.reasons.it was lost": 0,
    "people.reasons.no page": 0,
    "operations.ping.errors.502": 0,
    "servers.lost": 1,
    "hub.metrics.cpu_share_max": 0.91,
    "aftermath.hub.open_files.grown": 60,
}


@pytest.mark.parametrize(("metric", "comparison"), list(itertools.product(VALUES, hst.COMPARISONS)))
def test_every_metric_with_every_operator_is_met_or_not(metric: str, comparison: str) -> None:
    value = VALUES[metric]
    for limit in (value * 0.5, value, value * 1.5):
        judged = hst.condition(f"{metric} {comparison} {limit:g}").judge(RESULTS, None)
        expected = {">": value > limit, ">=": value >= limit, "<": value < limit, "<=": value <= limit}[comparison]
        assert (judged.held, judged.value) == (expected, value)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("server_ready.p95 > 3999ms", True),
        ("server_ready.p95 > 4s", False),
        ("server_ready.p95 < 0.1m", True),
        ("failed_rate > 2%", True),
        ("failed_rate>=3.1%", False),
        ("ping.p95 > 1s", True),  # nothing succeeded, so nothing was measured
        ("activity.p95 > 1s", True),  # there was none
        ("server_ready.p95 > 1.5x", False),
        ("server_ready.p95 > 0.9x", True),
        ("activity.p95 > 2x", True),  # neither run has any
        ("hub.metrics.cpu_share_max > 90%", True),
        ("hub.metrics.cpu_share_max > 92%", False),
        ("hub.metrics.event_loop_lag_max_s > 249ms", True),
        ("aftermath.hub.rss_bytes.grown > 7199kB", True),
        ("aftermath.hub.rss_bytes.grown>0.008GB", False),
        ("people.failed > 3", False),
        ("people.until_work_s.at_work > 10s", True),
        ("groups.students.failed > 3", True),  # there are no groups
        ("http.servers.requests < 1", True),
        ("hub.metrics.cpu_s > 1m", True),
    ],
)
def test_a_condition_has_units_and_is_met_where_nothing_was_measured(text: str, met: bool) -> None:
    assert hst.condition(text).judge(RESULTS, RESULTS).held is met


def test_a_multiple_of_what_the_baseline_has_not_measured_is_met() -> None:
    judged = hst.condition("server_ready.p95 > 2x").judge(RESULTS, {"schema": 1})
    assert judged == hst.Judgement("server_ready.p95 > 2x", 4.0, True)


def test_a_condition_is_told_as_it_was_written_with_single_blanks() -> None:
    assert hst.condition("  server_ready.p95  >   30s ").text == "server_ready.p95 > 30s"


@pytest.mark.parametrize(
    "text", ["", "failed", "failed > ", "failed = 1", "> 1", "failed > 1 parsec", "failed > 1 > 2", "failed > -1"]
)
def test_a_condition_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        hst.condition(text)


UNITS_OF = {
    "ms s m": ["ping.p95", "hub.metrics.cpu_s", "people.until_work_s.page", "operations.visit.lateness_s.max"],
    "kB MB GB": ["hub.metrics.rss_max_bytes", "aftermath.hub.rss_bytes.grown"],
    "%": ["failed_rate", "hub.metrics.cpu_share_max", "http.observer_share"],
    "": ["failed", "ping.count", "ping.rate_per_s", "capacity.rate_per_s", "capacity.servers_reporting_every_300_s"],
}


@pytest.mark.parametrize("units", UNITS_OF)
def test_a_unit_fits_the_key_or_is_refused(units: str) -> None:
    for metric, unit in itertools.product(UNITS_OF[units], hst.UNITS.keys() - {"", "x"}):
        with contextlib.nullcontext() if unit in units.split() else pytest.raises(hst.UsageError, match="does not fit"):
            plan_for("purge", *HUB, "--fail-if", f"{metric} > 1{unit}")


def numbers(value: Any, path: str = "") -> Iterator[str]:
    """The path of every number in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def test_every_number_of_a_results_file_may_be_in_a_condition_by_its_path(new_hub: LocalHub, tmp_path: Path) -> None:
    words = ("stress-test", "-c", "3", "--fail-if", "failed > 3", "--profile", '{"fail_rate": 0.5}')
    _, found = run_for_results(tmp_path / "r", *words, hub=new_hub)
    ruled_out = {"schema", "exit_code", *numbers({key: found[key] for key in ("options", "timeline")})}
    paths = set(numbers(found)) - ruled_out
    assert {"hub.metrics.cpu_share", "servers.failed", "http.statuses.200", "aftermath.hub.rss_bytes.peak"} <= paths
    assert {path: hst.nearest_metric(path) for path in paths} == dict.fromkeys(paths, "")
    assert all(hst.metric_value(found, path) is not None for path in paths)
    assert all(hst.nearest_metric(path) for path in ruled_out)
    assert {path for path in paths if not hst.nearest_metric(path, paths=False)} == {"failed", "failed_rate"}


def test_a_search_for_capacity_minds_failures_and_how_long_the_requests_of_its_mix_take() -> None:
    assert [one.text for one in hst.Plan().conditions] == ["failed > 0"]
    search = hst.Plan(hst.ACTIVITY, find_capacity=True)
    assert [one.text for one in search.conditions] == ["failed > 0", "activity.p95 > 500ms"]
    of_people = hst.Plan(hst.STRESS, find_capacity=True)
    assert [one.text for one in of_people.conditions] == ["failed > 0", "server_ready.p95 > 30s"]
    mixed = dataclasses.replace(search, mix={"read": 1.0, "list": 2.0})
    assert [one.text for one in mixed.conditions] == ["failed > 0", "read.p95 > 500ms", "list.p95 > 500ms"]
    asked = hst.condition("throttled > 9")
    assert dataclasses.replace(search, fail_if=(asked,)).conditions == (asked,)


def test_names_count_nothing_only_in_mappings_of_counts() -> None:
    records = [kind for kind in vars(hst).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    declared = {field.name for kind in records for field in dataclasses.fields(kind) if field.type == "dict[str, int]"}
    assert {"statuses", "reasons", "errors"} <= declared <= set(hst.COUNTS)


# ==== What a value may be ============================================================================================

GOOD_VALUES = [
    (hst.whole_number, "1", 1),
    (hst.whole_number, "0100", 100),
    (hst.positive_number, "0.5", 0.5),
    (hst.positive_number, ".5", 0.5),
    (hst.positive_number, "20", 20.0),
    (hst.rate_of, "2.5", 2.5),
    (hst.rate_of, "1:2m, .5:90", hst.Schedule(((1.0, 120.0), (0.5, 90.0)))),
    (hst.duration, "90", 90.0),
    (hst.duration, "90s", 90.0),
    (hst.duration, "1.5m", 90.0),
    (hst.duration, "1h", 3600.0),
    (hst.run_name, "night-7", "night-7"),
    (hst.run_name, "a" * 40, "a" * 40),
    (hst.endpoint_url, "https://hub.example.org/hub/api/", "https://hub.example.org/hub/api"),
    (hst.endpoint_url, "http://me:pw@[::1]:8/hub/api", "http://[::1]:8/hub/api"),
    (hst.token_text, "abc-!~", "abc-!~"),
    (hst.header, "X-Access: a b:c", ("X-Access", "a b:c")),
    (hst.header, "Cookie:a=1; b=2 ", ("Cookie", "a=1; b=2")),
    (hst.header, "~!#$%&'*+.^_`|-9:\t x", ("~!#$%&'*+.^_`|-9", "x")),
    (hst.mix_of, "activity=8, read=.5,own-one=2", {"activity": 8.0, "read": 0.5, "own-one": 2.0}),
    (hst.profile_value, "small", "small"),
    (hst.profile_value, ' {"image": "a:b"}', {"image": "a:b"}),
]
BAD_VALUES = {
    hst.watched: ["", "proxy", "proxy=", "proxy=127.0.0.1:8002", "=http://x/", "hub=http://x/metrics", "a b=http://x/"],
    hst.whole_number: ["", "0", "-1", "1.5", "1e3", "x", "١"],
    hst.positive_number: ["", "0", "0.0", "-1", "1e3", "nan", "inf", "x"],
    hst.rate_of: ["", "0", "1:", ":2m", "1:2m,", "1:2m,5", "1:2m:5", "1;2m"],
    hst.duration: ["", "0", "0s", "5 minutes", "-1s", "1d", "s", "1m30s"],
    hst.samples_file: ["", "s", "s.json", "s.csv.bz2", "csv", "/nowhere/s.csv"],
    hst.run_name: ["", "Big", "-a", "a-", "a_b", "a b", "a" * 41, "a\n"],
    hst.endpoint_url: ["", "hub", "hub.example.org/hub/api", "ftp://x/", "https://", "http://x/?a=1", "http://x/#a"],
    hst.token_text: ["", "abc\ndef", "a b", "ä"],
    hst.header: [
        "",
        "X-Access",
        "X-Access:",
        "X-Access: ",
        ": x",
        "X Access: x",
        "X-Ä: x",
        "X: ä",
        "X: a\nb",
        "X: a\x00",
    ],
    hst.mix_of: ["", "activity", "activity=", "activity=0", "activity=1,", "activity=-1", "activity=1=2"],
    hst.profile_value: ["{broken", "[1]"],
}


@pytest.mark.parametrize(("parse", "text", "value"), GOOD_VALUES)
def test_a_value_is_understood(parse: Callable[[str], Any], text: str, value: Any) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(("parse", "text"), [(parse, text) for parse, bad in BAD_VALUES.items() for text in bad])
def test_a_value_that_cannot_be_meant_is_refused(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse(text)


def test_an_endpoint_that_is_refused_is_shown_without_its_password() -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        hst.endpoint_url("ftp://me:pa55word@hub.example.org/")
    assert "ftp://hub.example.org/" in str(refused.value) and "pa55word" not in str(refused.value)


@pytest.mark.parametrize("name", ["Authorization", "authorization", "Host", "HOST", "Content-Length"])
def test_a_header_that_the_tool_sets_itself_is_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"the header {name} cannot be set: .*(token|own)"):
        hst.header(f"{name}: 5ecret")


def test_a_header_that_is_refused_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["X-Access 5ecret"], ["X-Ä: 5ecret"], ["Host: 5ecret"], ["X-Access: 5ecret\x07"]):
        assert "5ecret" not in refused_usage(["purge", "--header", *words], NOWHERE, capsys)


def test_headers_are_collected_and_shown_to_no_repr_results_or_log(
    logging_as_before: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--header", "X-Access: the 1st 5ecret", "purge", *HUB[:3], "a-token", "--header", "Cookie: the 2nd 5ecret"]
    args = hst.parse_args(words)
    plan = hst.plan_of(args)
    assert plan.headers == (("X-Access", "the 1st 5ecret"), ("Cookie", "the 2nd 5ecret"))
    assert "5ecret" not in repr(args) + repr(plan) + json.dumps(plan.options())
    hst.setup_logging(args=args)
    try:
        raise ValueError("sent the 1st 5ecret")
    except ValueError:
        hst.LOG.exception("with %s", dict(plan.headers) | {"also": "the 2nd 5ecret"})
    log = capsys.readouterr().err
    assert "5ecret" not in log and "ValueError: sent ***" in log and "'also': '***'" in log


def test_a_file_is_read_as_results_only_if_it_holds_some(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for content, said in (
        ("{", "cannot be read as results"),
        ("[]", "not hold results"),
        ('{"schema": 2}', "not hold"),
    ):
        file.write_text(content)
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            hst.results_file(str(file))
    file.write_text('{"schema": 1}')
    assert hst.results_file(str(file)) == {"schema": 1}


def test_a_file_is_writable_or_not_and_nothing_is_written_to_find_out(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
            hst.writable_file(str(bad))
    assert hst.writable_file(str(tmp_path / "new")) == str(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# ==== Options ========================================================================================================

HUB = ["--endpoint", "http://hub.example.org/hub/api", "--token", "t"]
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
    "fail_if": ("failed > 2", (hst.condition("failed > 2"),)),
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
    "page": ("lab.har", hst.Recording("lab.har", (("lab", 200),))),
    "work": (None, True),
    "notebook": ("class.py", hst.Notebook("class.py", (hst.Code("1+1\n"),))),
    "think_s": ("5", 5.0),
    "cell_timeout_s": ("2m", 120.0),
    "stay_s": ("5m", 300.0),
    "check_proxy": (None, True),
    "public_url": ("https://hub.example.org/", "https://hub.example.org"),
    "watch": ("proxy=http://127.0.0.1:8002/metrics", (hst.Watched("proxy", "http://127.0.0.1:8002/metrics"),)),
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


def plan_for(*words: str) -> hst.Plan:
    args = hst.parse_args(words)
    hst.validate(args)
    return hst.plan_of(args)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that `GIVEN` names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text('{"schema": 1}')
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "class.py").write_text("# %%\n1+1\n")
    asked = {"method": "GET", "url": "https://hub.example.org/user/alice/lab"}
    entry = {"request": asked, "response": {"status": 200}}
    (tmp_path / "lab.har").write_text(json.dumps({"log": {"entries": [entry]}}))
    return tmp_path


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_without_options_a_command_has_the_plans_defaults(command: str) -> None:
    assert plan_for(command, *HUB) == hst.Plan(
        command, endpoint="http://hub.example.org/hub/api", token=hst.Secret("t")
    )


@pytest.mark.parametrize(
    ("command", "field"), [(c, field) for field in GIVEN for c in hst.COMMANDS if c in hst.OPTIONS[field].on]
)
def test_every_option_sets_its_field_of_the_plan_by_each_of_its_flags_and_no_other(
    command: str, field: str, files: Path
) -> None:
    value, meaning = GIVEN[field]
    default = {field: getattr(hst.Plan(), field)}
    words = [*HUB, command, *COMPANIONS.get(field, ())]
    for flag in hst.OPTIONS[field].flags:
        plan = plan_for(*words, flag, *([value] if value else []))
        assert getattr(plan, field) == meaning != default[field]
        assert dataclasses.replace(plan, **default) == dataclasses.replace(plan_for(*words), **default)


def test_every_option_is_tried_but_those_of_an_events_file() -> None:
    assert hst.OPTIONS.keys() - GIVEN.keys() == {"event", "once", "group", "after_s", "scale", "visits"}


def test_the_rules_of_an_option_are_about_other_options() -> None:
    for row in hst.OPTIONS.values():
        assert {*row.needs.split(), *row.excludes.split()} <= hst.OPTIONS.keys()
        assert ("{}" in row.because) == bool(row.excludes)
    assert len(hst.OPTIONS) <= 49


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_the_results_options_are_those_of_the_command_without_secrets_and_baseline(command: str, files: Path) -> None:
    plan = plan_for(command, *HUB, "--baseline", "old.json", "--fail-if", "failed > 2", "--fail-if", "throttled > 9")
    options = plan.options()
    rows = [row for row in hst.OPTIONS.values() if command in row.on]
    assert options.keys() == {row.key for row in rows} - {"token", "header", "baseline"}
    assert options["fail_if"] == ["failed > 2", "throttled > 9"]
    assert json.loads(json.dumps(options)) == options


def test_the_stages_of_a_rate_set_how_many_people_come_and_for_how_long_requests_are_sent() -> None:
    people, requests = (plan_for(command, *HUB, "--rate", "1:2m,5:1m") for command in hst.LOADS)
    assert (people.count, people.duration_s) == (420, None)
    assert (requests.count, requests.duration_s) == (100, 180.0)
    assert people.options()["rate"] == "1:120s,5:60s" and hst.rate_of("1:120s,5:60s") == people.rate_per_s


def test_global_options_stand_before_and_after_the_command_and_the_later_wins() -> None:
    assert plan_for("--run", "x", "stress-test", *HUB) == plan_for(*HUB, "stress-test", "--run", "x")
    assert plan_for("--run", "x", "-v", "stress-test", *HUB, "--run", "y").run == "y"
    plan = plan_for("--fail-if", "failed > 5", *HUB, "purge", "--fail-if", "throttled > 1", "--fail-if", "failed > 6")
    assert [one.text for one in plan.fail_if] == ["failed > 5", "throttled > 1", "failed > 6"]


def test_fail_fast_alone_means_the_first_failure() -> None:
    assert plan_for("stress-test", *HUB, "--fail-fast", "-c", "3").fail_fast == 1


def test_a_run_is_named_before_and_after_the_command(hub: LocalHub) -> None:
    where = ("--endpoint", hub.endpoint, "--token", hub.token)
    assert run_tool(*where, "--run", "x", "stress-test", "-c", "1", "-k").code == 0
    assert run_tool("stress-test", "-c", "1", "-k", *where, "--run", "x").code == 0
    assert tool_users(hub) == {"hub-stress-test-x-1", "hub-stress-test-x-2"}
    assert run_tool("--endpoint", hub.endpoint, "purge", "--token", hub.token).code == 0
    assert not tool_users(hub)


# ==== Bad usage ======================================================================================================

BAD_USAGE = {
    "no token": (["--endpoint", "http://127.0.0.1:1/hub/api", "purge"], {}, "no token"),
    "no endpoint": (["--token", "x", "purge"], {}, "no endpoint"),
    "neither endpoint nor token": (["purge"], {}, "or give --endpoint; and no token: set JUPYTERHUB_API_TOKEN"),
    "no command": ([], NOWHERE, "COMMAND"),
    "an unknown command": (["stress"], NOWHERE, "stress"),
    "an unknown option": (["purge", "--forec"], NOWHERE, "--forec"),
    "a misspelt option": (["stress-test", "--witihn=5m"], NOWHERE, "no option --witihn: did you mean --within?"),
    "an option of another command": (["purge", "--count", "3"], NOWHERE, "--count: it is one of stress-test and"),
    "an abbreviated option": (["stress-test", "--coun", "3"], NOWHERE, "did you mean --count?"),
    "a word too many": (["stress-test", "30"], NOWHERE, "stress-test has no use for '30'"),
    **{
        f"a condition on {step} that nobody gets to": (
            ["stress-test", "--fail-if", f"{step}.p95 > 9s"],
            NOWHERE,
            f"{step} is measured only with {flags} (see",
        )
        for step, flags in {
            "visit": "--visit or --page or --work",
            "page": "--page",
            "kernel_ready": "--work",
            "cell": "--work",
            "stay": "--hold or --stay",
        }.items()
    },
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
    "a token in the environment": (["purge"], NOWHERE | {"JUPYTERHUB_API_TOKEN": "a b"}, "JUPYTERHUB_API_TOKEN"),
    "a token with a line end": (["purge", "--token", "abc\ndef"], NOWHERE, "--token: expected a token of printable"),
    "an unwritable log file": (["purge", "--log-to-file", "/nowhere/log"], NOWHERE, "/nowhere/log: cannot be written"),
    "a directory as log file": (["purge", "--log-to-file", "/tmp"], NOWHERE, "/tmp: cannot be written"),
    "a multiple without a baseline": (["purge", "--fail-if", "ping.p95 > 2x"], NOWHERE, "needs a --baseline"),
    "an unknown operation": (["purge", "--fail-if", "pong.p95 > 2s"], NOWHERE, "nearest is ping.p95"),
    "an unknown statistic": (
        ["purge", "--fail-if", "visit.p42 > 1s"],
        NOWHERE,
        "no 'visit.p42' in the results; nearest",
    ),
    "an unknown path": (["purge", "--fail-if", "hub.cpu_share_max > 9"], NOWHERE, "is hub.metrics.cpu_share_max"),
    "a path to what is no number": (
        ["purge", "--fail-if", "capacity.steps > 2"],
        NOWHERE,
        "no 'capacity.steps' in the",
    ),
    "a path for a search": (
        ["activity-stress-test", "--find-capacity", "--fail-if", "hub.metrics.cpu_share > 90%"],
        NOWHERE,
        "among failed, failed_rate, throttled and OPERATION.STAT; nearest is",
    ),
    "a unit that does not fit": (["purge", "--fail-if", "failed > 2s"], NOWHERE, "the unit 's' does not fit failed"),
    "a mix of nothing": (["activity-stress-test", "--mix", "activity"], NOWHERE, "NAME=WEIGHT"),
    "a mix of the unknown": (["activity-stress-test", "--mix", "dance=1"], NOWHERE, "no operation 'dance'"),
    **{
        f"a search with {words[0]}": (["stress-test", "--find-capacity", *words], NOWHERE, f"leave out {words[0]}")
        for words in (["--count", "100"], ["--within", "5m"], ["--hold", "5m"], ["--stay", "5m"], ["--keep"])
    },
    "a search with stages": (["activity-stress-test", "--find-capacity", "--rate", "1:2m"], NOWHERE, "without stages"),
    "too few servers for the first step": (
        ["stress-test", "--find-capacity", "--max-servers", "5"],
        NOWHERE,
        "the first step has 6 people",
    ),
    "a bound without a search": (["stress-test", "--max-servers", "5"], NOWHERE, "a meaning only with --find-capacity"),
    **{
        f"a dry run with {words[0]}": (["--dry-run", "stress-test", *words], {}, f"nothing that {words[0]} could show")
        for words in (["--results", "r"], ["--report", "r"], ["--samples", "s.csv"], ["--metrics-port", "9"])
    },
    "a rate of 0": (["activity-stress-test", "--rate", "0"], NOWHERE, "a number above 0"),
    "stages and a count": (["stress-test", "--rate", "1:2m,5:1m", "-c", "9"], NOWHERE, "leave out --count"),
    "stages and a duration": (
        ["activity-stress-test", "--rate", "1:2m,5:1m", "--duration", "9s"],
        NOWHERE,
        "leave out --duration",
    ),
    "more processes than workers": (["activity-stress-test", "--processes", "200"], NOWHERE, "more than --workers 100"),
    "no such operations file": (
        ["activity-stress-test", "--operations", "/nowhere.py"],
        NOWHERE,
        "--operations /nowhere.py",
    ),
    "no such baseline": (["purge", "--baseline", "/nowhere.json"], NOWHERE, "cannot be read as results"),
    "results into nowhere": (["purge", "--results", "/nowhere/r.json"], NOWHERE, "cannot be written"),
    "a report into nowhere": (["purge", "--report", "/nowhere/r.html"], NOWHERE, "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_refused_in_one_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, env, expected = BAD_USAGE[case]
    assert expected in refused_usage(words, env, capsys)


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_bad_usage_names_the_help_that_fits(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([command, "--nonsense"], [command, "--run", "Big"], [command]):
        assert f"(see hub-stress-test {command} --help)" in refused_usage(words, {}, capsys)
    assert "(see hub-stress-test --help)" in refused_usage(["dance"], NOWHERE, capsys)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("at_work.p95", ["--work"]),
        ("operations.at_work.latency_s.p95", ["--visit"]),
        ("visit.failed", ["--check-proxy"]),
        ("stay.failed", ["--hold", "9s"]),
    ],
)
def test_a_condition_on_a_step_is_taken_where_somebody_gets_to_it(metric: str, words: list[str]) -> None:
    assert plan_for("stress-test", *HUB, *words, "--fail-if", f"{metric} > 9").fail_if
    with pytest.raises(hst.UsageError, match="is measured only with"):
        plan_for("stress-test", *HUB, "--fail-if", f"{metric} > 9")


def test_bad_usage_is_refused_before_anything_is_sent(new_hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        env = {"JUPYTERHUB_ENDPOINT": proxy.endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token}
        for words, _, expected in (case for case in BAD_USAGE.values() if case[1] is NOWHERE):
            assert expected in refused_usage(words, env, capsys)
        assert proxy.requests == []


def test_an_operations_file_with_a_mistake_is_refused_with_the_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("1 / 0")
    said = refused_usage(["activity-stress-test", "--operations", str(tmp_path / "mine.py")], NOWHERE, capsys)
    assert "mine.py: ZeroDivisionError: division by zero" in said


# ==== The environment, logs, dry runs ================================================================================


def test_the_endpoint_can_come_from_the_variable_that_a_hub_sets_for_its_own_servers(new_hub: LocalHub) -> None:
    env = {"JUPYTERHUB_API_URL": new_hub.endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token}
    assert run_tool("purge", env=env).code == 0
    assert run_tool("purge", env=env | {"JUPYTERHUB_ENDPOINT": "http://127.0.0.1:1/hub/api"}).code == 3


def test_the_command_line_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    assert (plan_for("purge").endpoint, plan_for("purge").token) == tuple(NOWHERE.values())
    assert (plan_for("purge", *HUB).endpoint, plan_for("purge", *HUB).token) == ("http://hub.example.org/hub/api", "t")


def test_credentials_in_the_endpoint_are_neither_used_nor_shown(new_hub: LocalHub) -> None:
    endpoint = new_hub.endpoint.replace("//", "//someone:pa55word@")
    done = run_tool("purge", "-v", env={"JUPYTERHUB_ENDPOINT": endpoint, "JUPYTERHUB_API_TOKEN": new_hub.token})
    assert done.code == 0
    assert "pa55word" not in done.stdout + done.stderr


def test_version_and_help_need_no_hub() -> None:
    assert run_tool("--version").stdout == f"hub-stress-test {hst.__version__}\n"
    for words in ((), *((command,) for command in hst.COMMANDS)):
        done = run_tool(*words, "--help")
        assert (done.code, done.stderr) == (0, "") and done.stdout.startswith("usage: hub-stress-test ")
    assert (hst.__doc__ or "x") in run_tool("--help").stdout


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        hst.main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", hst.COMMANDS)
def test_the_help_of_a_command_has_its_own_words_groups_and_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    assert hst.DESCRIPTIONS[command] in text and text.count("in seconds") == 1
    found = [group for group in hst.HELP_GROUPS if f"\n{group}:\n" in text]
    assert found == [each for each in hst.HELP_GROUPS if any(each == row.about for row in shown_on(command))]
    (example,) = re.findall(r"^example: hub-stress-test (.*)", text, re.M)
    assert plan_for(*shlex.split(example), *HUB).command == command


def shown_on(command: str) -> list[hst.Option]:
    return [row for row in hst.OPTIONS.values() if command in row.on and command not in row.hidden_on]


def test_the_help_of_a_purge_has_only_what_a_purge_needs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = set(re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[a-z-]+)", help_of("purge", capsys), re.M)) - {"--help"}
    needed = "endpoint token header run batch-size own-servers cleanup-timeout results log-to-file verbose dry-run"
    assert flags == {f"--{name}" for name in needed.split()}


@pytest.mark.parametrize(("words", "code"), [(["--help"], 2), (["stress-test"], 2)])
def test_without_requests_the_program_ends_with_one_sentence(words: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-S", hst.__file__, *words], capture_output=True, text=True)
    said = "hub-stress-test: requests is not installed: pip install requests\n"
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_verbose_logs_each_request_with_its_response_time(new_hub: LocalHub) -> None:
    done = run_tool("-v", "stress-test", "-c", "1", hub=new_hub)
    for request, status in (
        ("POST /hub/api/users", 201),
        ("POST /hub/api/users/hub-stress-test-1/server", 201),
        ("DELETE /hub/api/users/hub-stress-test-1", 204),
    ):
        assert re.search(rf" DEBUG +{request}: {status} in \d+\.\d{{3}} s$", done.stderr, re.MULTILINE), done.stderr
    assert "DEBUG" not in run_tool("stress-test", "-c", "1", hub=new_hub).stderr


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
    assert done.code == 2 and "not a log of hub-stress-test" in done.stderr
    assert notes.read_text() == "mine\n"


def test_runs_in_one_second_do_not_share_a_log(tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path)}
    for _ in range(3):
        assert run_tool("--dry-run", "--log-to-file", "purge", env=env).code == 0  # purge is the command, not the file
    assert len(list(tmp_path.glob("hub-stress-test-*.log"))) == 3


def test_a_log_shows_no_token_not_even_in_a_traceback(
    logging_as_before: None, capsys: pytest.CaptureFixture[str]
) -> None:
    hst.setup_logging(args=hst.parse_args(["purge", "--token", "abc123", "--endpoint", "http://x/hub/api"]))
    try:
        raise ValueError("with the token abc123 in it")
    except ValueError:
        hst.LOG.exception("The header was %s", {"Authorization": "token abc123"})
    said = capsys.readouterr().err
    assert "ValueError: with the token *** in it" in said and "'token ***'" in said
    assert "abc123" not in said


NOTEBOOK = "# %%\n1\n# %%\n2\n# %%\n3\n"
EVENT = """
hold = "10m"
[[people]]
name = "students"
count = 200
within = "5m"
work = true
[[people]]
name = "assistants"
count = 10
rate = 1
after = "1m"
stay = "5m"
"""
PLANS: dict[str, list[str]] = {
    # command line: what its plan says, each label with its sentence
    "stress-test": [
        "hub not given yet",
        "users hub-stress-test-1 to -100, or as many after the highest number in use",
        "people 100 people, 10 at a time (3 until one server is ready): the first at once, the last after 1 min 40 s",
        "each person starts a server (at most 60.0 s)",
        "requests 2 checks, 2 lists, 10 creates, 100 starts, 100 stops, 100 deletes; a progress stream for each slow "
        "start; 5 pings per second; with read:metrics, the hub's figures every 5 s",
        "duration about 1 min 50 s from the first start on if servers start in 10 s, at most 34 min 0 s if",
        "cost 100 servers, each with a volume where the hub gives one, and no kernels at one time",
        "cleanup users are removed; times out after 5 min 0 s without progress",
        "scopes admin:users, delete:servers, delete:users, list:users, read:servers, servers",
        "conditions failed > 0",
    ],
    "stress-test -c 1 -e http://x/hub/api --run ci --keep --server-timeout 5s": [
        "hub http://x/hub/api",
        "users hub-stress-test-ci-1, or",
        "people 1 person, 10 at a time: the first at once, the last at once",
        "requests 2 checks, 1 list, 1 create, 1 start; a progress stream",
        "about 5.00 s from the first start on if servers start in 10 s, at most 5.00 s if",
        "cleanup users are kept",
    ],
    "stress-test -c 300 --within 5m --seed 7 --work --hold 30m --check-proxy": [
        "people 300 people, at random moments within 5 min 0 s (--seed 7): the first after 70 ms, the last after "
        "4 min 58 s",
        "each person starts a server (at most 60.0 s), opens its page (at most 30.0 s), runs 6*7 again and again in a "
        "kernel (at most 60.0 s each, 10.0 s between two), stays until 30 min 0 s after the last has got this far",
        "requests 3 checks, 2 lists, 30 creates, 300 starts, 600 reads, 300 stops, 300 deletes, "
        "600 visits, 300 kernels; a progress stream",
        "about 35 min 8 s from the first start on if servers start in 10 s, at most 38 min 58 s if",
        "cost 300 servers, each with a volume where the hub gives one, and 300 kernels at one time",
        "proxy check after that, with one of the servers or one more: some three minutes, and up to 120 connections",
        "scopes admin:users, delete:servers, delete:users, list:users, read:servers, servers access:servers, for the "
        "token, or better a second one in JUPYTERHUB_VISIT_TOKEN",
        "conditions failed > 0; proxy_check.leaking > 0",
    ],
    "stress-test -c 60 --rate 1 --visit --stay 10s --own-servers": [  # 20 s each, of which a new one comes each second
        "servers hub-stress-test-1 to -60, or",
        "people 60 people, 1 per second, however slow the hub: the first at once, the last after 59.0 s",
        "opens its page (at most 30.0 s), leaves 10.0 s after getting to work",
        "requests 3 checks, 2 lists, 60 starts, 120 reads, 60 stops, 60 deletes, 120 visits",
        "about 79.0 s from the first start on if",
        "cost about 20 servers, each with a volume where the hub gives one, and no kernels at one time",
        "cleanup servers are removed",
        "scopes delete:servers!user=<owner>, read:servers!user=<owner>, servers!user=<owner> "
        "access:servers!user=<owner>, for the token",
    ],
    "stress-test -c 2 --work --notebook class.py --page lab.har": [
        "fetches 1 part of the page, runs 3 cells of class.py in a kernel (at most 60.0 s each, 10.0 s between two)",
        "2 visits, 2 pages, 2 kernels",
        "about 30.0 s from the first start on if servers start in 10 s, at most 5 min 20 s if",
    ],
    "stress-test --event class.toml --seed 7": [
        "users hub-stress-test-1 to -210, or",
        "people students: 200 people, at random moments within 5 min 0 s (--seed 7): the first after",
        "each person students: starts a server",
        "people assistants: 10 people, 1 per second, from 60.0 s on, however slow the hub: the first after 60.0 s, the "
        "last after 69.0 s each person assistants: starts a server (at most 60.0 s), "
        "leaves 5 min 0 s after getting to work",
        "210 starts, 410 reads, 210 stops, 210 deletes, 400 visits, 200 kernels",
        "cost about 210 servers, each with a volume where the hub gives one, and 200 kernels at one time",
    ],
    "stress-test --find-capacity --rate 0.2 --count 300 --within 5m": [
        "people 12 people, 0.2 per second, however slow the hub: the first at once, the last after 55.0 s"
    ],
    "stress-test --find-capacity --max-servers 200": [
        "search in steps of 60.0 s, usually a dozen, until a condition is met or 200 servers would run",
        "people 6 people, 0.1 per second",
        "conditions failed > 0; server_ready.p95 > 30s",
    ],
    "activity-stress-test": [
        "or as many after the highest number in use; those that are there come first",
        "load sending from 100 threads: 100 requests, 100 % activity",
        "requests besides, 2 checks, 2 lists, at most 10 creates, 100 deletes; 5 pings per second",
        "duration 1 request of each thread, after up to 1 s each, at most 96.0 s if",
        "cost no servers, no kernels",
        "scopes admin:users, delete:users, list:users, read:servers, users:activity",
    ],
    "activity-stress-test --rate 10 --duration 5m --mix activity=3,read=1 --keep": [
        "load sending 10 per second from 100 threads: 3,000 requests, 75 % activity, 25 % read",
        "at most 10 creates; 5 pings",
        "duration 5 min 0 s, at most 6 min 36 s if",
        "cleanup users are kept",
    ],
    "activity-stress-test --duration 9s --workers 3 --processes 2": [
        "load sending for 9 s from 4 threads: as many requests as that allows, 100 % activity"
    ],
    "activity-stress-test --find-capacity": [
        "search in steps of 10.0 s, usually a dozen, until a condition is met; below is the first step",
        "160 requests",
        "conditions failed > 0; activity.p95 > 500ms",
    ],
    "purge -b 4 --run ci": [
        "users hub-stress-test-ci-<n>",
        "requests 2 checks, 2 lists; for each of them a stop if it runs, and a delete",
        "duration as long as that takes for 4 at a time",
        "cost no servers, no kernels",
        "scopes delete:servers, delete:users, list:users, read:servers",
    ],
    "purge --own-servers": ["servers hub-stress-test-<n>, and those of every --run", "cleanup servers are removed"],
}


@pytest.mark.parametrize("line", PLANS)
def test_a_dry_run_prints_the_plan(line: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "class.py").write_text(NOTEBOOK)
    (files / "class.toml").write_text(EVENT)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_VISIT_TOKEN"):
            patch.delenv(name, raising=False)
        assert hst.main(["--dry-run", *line.split()]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("DRY RUN: no request was sent; a run would do this hub ")
    assert [sentence for sentence in PLANS[line] if sentence not in said] == []


def test_the_moments_of_a_plan_are_those_of_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "stress-test", "--within", "1h"]
    assert hst.main(words) == 0
    page = capsys.readouterr().out
    seed = re.search(r"--seed (\d+)\)", page)
    assert seed and hst.main([*words, "--seed", seed[1]]) == 0 and capsys.readouterr().out == page


def test_a_dry_run_sends_nothing(new_hub: LocalHub) -> None:
    before = new_hub.users()
    with FaultProxy(new_hub.endpoint) as proxy:
        env = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        for command in hst.COMMANDS:
            assert run_tool(command, "--dry-run", hub=new_hub, env=env).code == 0
        assert proxy.requests == []
    assert new_hub.users() == before


def test_a_run_sends_as_many_requests_as_its_plan_says(new_hub: LocalHub) -> None:
    words = ["stress-test", "-c", "7", "-b", "3", "--hold", "1s"]
    with FaultProxy(new_hub.endpoint) as proxy:
        env = {"JUPYTERHUB_ENDPOINT": proxy.endpoint}
        planned = run_tool("--dry-run", *words, hub=new_hub, env=env).summary
        assert run_tool(*words, hub=new_hub, env=env).code == 0
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
    assert "7 reads" in planned and {line for line in sent if re.fullmatch("GET .*-[0-9]", line)} == {
        f"GET /hub/api/users/hub-stress-test-{n}" for n in range(1, 8)
    }


@pytest.mark.parametrize(
    ("plan", "number"),
    [
        (hst.Plan(count=300, batch_size=50), 50),
        (hst.Plan(count=300, rate_per_s=10.0), 20),
        (hst.Plan(count=300, within_s=10.0), 60),
        (hst.Plan(count=300, within_s=300.0), 10),
        (hst.Plan(count=9000, within_s=10.0), 100),
        (hst.Plan(hst.ACTIVITY, rate_per_s=50.0), 10),
    ],
)
def test_users_are_removed_as_fast_as_they_came(plan: hst.Plan, number: int) -> None:
    assert plan.removed_at_once == number
