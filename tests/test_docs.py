"""README, --help, docstring, pyproject and code tell one story."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import hub_stress_test as hst
import localhub
from tool import HUB, MODULE, plan_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = MODULE.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SEEDS = {
    "setup_logging": "verbose log_to_file args",
    "validate": "args",
    "timeit": "f",
    "get_session": "token dry_run pool_maxsize",
    "find_existing_stress_test_users": "endpoint session",
    "create_users": "count batch_size endpoint session existing_users",
    "start_server": "username endpoint session profile",
    "start_servers": "users endpoint session profile",
    "wait_for_servers_to_start": "users endpoint session",
    "stop_server": "username endpoint session wait",
    "stop_servers": "usernames endpoint session batch_size",
    "wait_for_server_to_stop": "username endpoint session",
    "wait_for_servers_to_stop": "stopped endpoint session",
    "delete_users_after_stopping_servers": "stopped endpoint session",
    "delete_users": "usernames endpoint session batch_size",
    "run_stress_test": "count batch_size token endpoint dry_run keep profile",
    "purge_users": "token endpoint dry_run",
    "notebook_activity_test": "count token endpoint workers keep dry_run",
}


def test_the_readme_is_short_and_names_only_options_that_exist() -> None:
    named = set(re.findall(r"`(--[a-z][a-z-]*)", README.partition("## More than one machine")[0]))
    flags = {flag for row in hst.OPTIONS.values() if row.on for flag in row.flags}
    assert named <= {"--help", "--version", *flags}
    assert len(README.splitlines()) <= 300


def test_every_exit_code_stands_in_readme_and_help() -> None:
    table = README.partition("| exit code |")[2].partition("\n## ")[0]
    said = re.sub(r"\s+", " ", (hst.__doc__ or "").partition("Exit codes:")[2])
    for code in hst.ExitCode:
        assert re.search(rf"^\|.*\b{int(code)}\b", table, re.MULTILINE)
        assert re.search(rf"\b{int(code)}\b", said)


def test_the_script_block_and_the_project_name_the_same_needs() -> None:
    block = re.search(r"^# /// script\n(.*?)^# ///$", MODULE.read_text(), re.MULTILINE | re.DOTALL)
    assert block
    script = tomllib.loads(block[1].replace("# ", ""))
    assert script["dependencies"] == PROJECT["dependencies"]
    assert script["requires-python"] == PROJECT["requires-python"]
    assert {re.split("[<>=]", need)[0] for need in PROJECT["dependencies"]} == {"requests", "urllib3"}


def test_the_readme_documents_exactly_the_options_that_locust_gets() -> None:
    flags = {row.locust_flag for row in hst.LOCUST_OPTIONS.values()}
    section = README.partition("\n## More than one machine: Locust\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--hub-[a-z-]+)", section)) == flags


def test_the_manifest_that_the_readme_applies_is_valid_yaml() -> None:
    (manifest,) = re.findall(r"kubectl apply -f (\S+)", README)
    documents = list(yaml.safe_load_all((ROOT / manifest).read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Deployment", "Deployment"]
    for document in documents[1:]:
        pod = document["spec"]["template"]
        assert pod["metadata"]["labels"]["hub.jupyter.org/network-access-hub"] == "true"
        container = pod["spec"]["containers"][0]
        assert container["args"][:2] == ["-f", "/mnt/hub_stress_test.py"]
        assert {variable["name"] for variable in container["env"]} == {"JUPYTERHUB_ENDPOINT", "JUPYTERHUB_API_TOKEN"}


def test_the_canary_is_a_job_whose_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, canary = yaml.safe_load_all((ROOT / "tests/deploy/canary.yaml").read_text())
    assert (canary["kind"], canary["spec"]["concurrencyPolicy"]) == ("CronJob", "Forbid")
    job = canary["spec"]["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never"), "the first failure is the alarm"
    assert job["activeDeadlineSeconds"] + pod["terminationGracePeriodSeconds"] < 600, "cleaned up before the next"
    assert claim["metadata"]["name"] in [v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]]
    (purge,), (work,) = pod["initContainers"], pod["containers"]
    for container in (purge, work):
        assert container["command"] == ["python", "/mnt/hub_stress_test.py"]
        environment = {one["name"]: one.get("value", "of-the-cluster") for one in container["env"]}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        words = [word.replace("/results/", f"{tmp_path}/") for word in container["args"]]
        assert plan_for(*words).run == "canary"
    assert {"--work", "--fail-if=failed > 0", "--results=/results/$(POD_NAME).json"} <= {*work["args"]}


def test_the_readmes_role_is_the_one_printed_and_tested() -> None:
    assert hst.ROLE_TO_PASTE in README and hst.VISIT_ROLE_TO_PASTE in README
    (scopes, visits) = re.findall(r'"scopes": (\[.*\])', "\n".join(readme_blocks("python")))
    assert tuple(ast.literal_eval(scopes)) == localhub.ROLE_SCOPES
    (values, _) = map(yaml.safe_load, readme_blocks("yaml"))
    assert list(values["hub"]["services"]) == ["hub-stress-test", "hub-stress-test-visits"]
    assert values["hub"]["loadRoles"] == {
        "hub-stress-test": {"scopes": list(localhub.ROLE_SCOPES), "services": ["hub-stress-test"]},
        "hub-stress-test-visits": {"scopes": ast.literal_eval(visits), "services": ["hub-stress-test-visits"]},
    }


@pytest.mark.parametrize("there", ([], [{"name": "theirs"}]), ids=("nothing", "something"))
def test_the_readmes_role_is_added_to_what_is_there(there: list[dict[str, str]]) -> None:
    from jupyterhub.app import JupyterHub  # which takes seconds
    from traitlets.config import Config

    config = Config()
    if there:
        config.JupyterHub.services, config.JupyterHub.load_roles = [*there], [*there]
    exec(readme_blocks("python")[0], {"c": config})
    hub = JupyterHub(config=config)
    for found in (hub.services, hub.load_roles):
        ours = ["hub-stress-test", "hub-stress-test-visits"]
        assert [one["name"] for one in found] == [*(one["name"] for one in there), *ours]


def job_in_ci() -> tuple[str, str]:
    """What the README's job runs to load the hub, and to purge."""
    (_, job) = map(yaml.safe_load, readme_blocks("yaml"))
    stress, purge = (step["run"] for step in job["stress"]["steps"] if "hub-stress-test" in step.get("run", ""))
    assert job["stress"]["defaults"]["run"]["shell"] == "bash"  # with -eo pipefail
    return stress, purge


def run_in_ci(script: str, folder: Path, tool: str) -> subprocess.CompletedProcess[str]:
    """What GitHub Actions makes of a step, with the shell script `tool` as the tool."""
    (folder / "hub-stress-test").write_text(f"#!/bin/sh\n{tool}\n")
    (folder / "hub-stress-test").chmod(0o755)
    script = script.replace("${{ github.run_id }}", "7").replace("sleep 30", "sleep 0.1")
    words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(folder / "page.md")}
    return subprocess.run(words, cwd=folder, env=environment, text=True, capture_output=True, timeout=60)


def test_a_job_in_ci_purges_until_it_succeeds(tmp_path: Path) -> None:
    stress, purge = job_in_ci()
    (name,) = re.findall(r"--run (\S+ \S+ \S+)", stress)
    assert f"purge --run {name}" in purge
    assert len(hst.username(50, "12345678901")) <= hst.SERVER_NAME_MAX  # and so no longer than a unix account
    assert run_in_ci(purge, tmp_path, "echo tried >> tries; [ $(wc -l < tries) = 3 ]").returncode == 0
    assert (tmp_path / "tries").read_text().count("tried") == 3
    assert run_in_ci(purge.replace("timeout 10m", "timeout 1s"), tmp_path, "exit 1").returncode == 124


@pytest.mark.parametrize("code", (0, 1))
def test_a_job_in_ci_keeps_exit_code_and_summary(code: int, tmp_path: Path) -> None:
    assert run_in_ci(job_in_ci()[0], tmp_path, f"echo the verdict; exit {code}").returncode == code
    (_, job) = map(yaml.safe_load, readme_blocks("yaml"))
    (show,) = (step for step in job["stress"]["steps"] if "GITHUB_STEP_SUMMARY" in step.get("run", ""))
    assert show["if"] == "always()"
    assert run_in_ci(show["run"], tmp_path, "").returncode == 0
    assert (tmp_path / "page.md").read_text() == "    the verdict\n"


def test_the_seeds_functions_have_the_seeds_parameters() -> None:
    for name, expected in SEEDS.items():
        parameters = inspect.signature(getattr(hst, name)).parameters
        assert [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == expected.split(), name
    assert (hst.DEFAULT_TIMEOUT, hst.SERVER_LIFECYCLE_TIMEOUT, hst.USERNAME_PREFIX) == (30, 60, "hub-stress-test")
    assert hst.LOG.name == "hub-stress-test"


def readme_blocks(kinds: str) -> list[str]:
    """The README's blocks of code of these kinds."""
    return re.findall(rf"^```(?:{kinds})\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands_in_readme() -> list[str]:
    """The arguments of every call of the tool in the README, lines that go on in the next one joined."""
    text = re.sub(r" *\\?\n +(?=--)", " ", README)
    plain, quoted = r"[^;&|`'\n]*", r"'[^']*'"  # a condition in quotes may hold any of these
    call = rf"(?<![\w/-])hub-stress-test ((?:--dry|stress|activity|purge){plain}(?:{quoted}{plain})*)"
    found = re.findall(call, text.replace(".venv/bin/", ""))
    assert len(found) >= 18
    return found


def files_in_readme(folder: Path) -> None:
    """Make the files that the README's commands read."""
    (folder / "before.json").write_text('{"schema": 1}')
    (folder / "class.ipynb").write_text('{"cells": [{"cell_type": "code", "source": "6*7"}]}')
    got = {"request": {"method": "GET", "url": "http://x/user/me/lab"}, "response": {"status": 200}}
    (folder / "lab.har").write_text(json.dumps({"log": {"entries": [got]}}))
    (folder / "class.toml").write_text(*readme_blocks("toml"))
    (mine,) = (block for block in readme_blocks("python") if block.startswith("# mine.py"))
    (folder / "mine.py").write_text(mine)


@pytest.mark.parametrize("line", commands_in_readme())
def test_every_command_in_the_readme_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files_in_readme(tmp_path)
    words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "7", line), comments=True)
    assert plan_for(*words, *HUB)


def test_the_event_in_the_readme_is_one(tmp_path: Path) -> None:
    files_in_readme(tmp_path)
    plan = plan_for("stress-test", "--event", str(tmp_path / "class.toml"), *HUB)
    assert [(group.group, group.count) for group in plan.event] == [("students", 240), ("project", 60)]
    (text,) = readme_blocks("toml")
    used = {*re.findall(r"^([a-z-]+) =", text, re.MULTILINE)} - {"fail-if"}
    named = README.partition("A group has a `name`,")[2].partition("Results show")[0]
    in_groups = {row.name for row in hst.OPTIONS.values() if hst.GROUP in row.on}
    assert used | in_groups == {"name", *re.findall(r"`([a-z-]+)`", named)}


def test_every_name_in_the_readmes_python_exists() -> None:
    code = "\n".join(readme_blocks("python"))
    used = {name for line in re.findall(r"from hub_stress_test import (.*)", code) for name in re.findall(r"\w+", line)}
    used |= set(re.findall(r"\bhst\.(\w+)", code))
    assert used and [name for name in used if not hasattr(hst, name)] == []


def test_every_operation_and_statistic_stands_in_the_readme() -> None:
    rows = "\n".join(re.findall(r"^\| .*", README, re.MULTILINE))
    for name, step in hst.STEPS.items():
        assert f"`{name}`" in rows, "which --fail-if takes"
        assert re.search(rf"^\| .*\b{step.title}\b", rows, re.MULTILINE), "which the summary shows"
    assert all(f"`{name}`" in rows for name in (*hst.STATISTICS, *hst.COMPARISONS))


def test_every_public_function_and_class_has_a_docstring() -> None:
    ours = {name: thing for name, thing in vars(hst).items() if isinstance(thing, (type, types.FunctionType))}
    public = {name: thing for name, thing in ours.items() if thing.__module__ == hst.__name__ and name[0] != "_"}
    texts = {name: thing.__doc__ or "" for name, thing in public.items()}
    generated = {name for name, text in texts.items() if text.startswith(f"{name}(")}  # by dataclass
    assert {name for name, text in texts.items() if not text} | generated <= {"ExitCode"}


def test_the_tree_is_the_one_that_was_agreed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {Path(name).parts[0] for name in listed}
    assert top <= {"hub_stress_test.py", "tests", "README.md", "pyproject.toml", ".gitignore", ".ci"}
