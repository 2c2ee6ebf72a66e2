"""The three commands on real hubs, judged by what the hub says afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import MODULE, THEIRS, run_tool, tool_users
from localhub import LocalHub

import hub_stress_test as hst

Make = Callable[..., LocalHub]


def row(summary: str, title: str) -> list[str]:
    """Count and failures of an operation in the summary's table."""
    found = re.search(rf"^{title} +(\d+) +(\d+) ", summary, re.MULTILINE)
    assert found, summary
    return list(found.groups())


def test_25_servers_in_batches_of_10_are_exactly_25_and_leave_only_the_bystanders(hub: LocalHub) -> None:
    before = hub.users()
    done = run_tool("stress-test", "--count", "25", "--batch-size", "10", hub=hub)
    assert done.code == 0, done
    assert "25 of 25 servers became ready" in done.stdout
    assert row(done.stdout, "server ready") == ["25", "0"]
    assert row(done.stdout, "create users") == ["3", "0"]
    assert hub.users().keys() == before.keys()


def test_kept_users_are_exactly_as_many_as_asked_and_their_servers_run(hub: LocalHub) -> None:
    assert run_tool("stress-test", "-c", "13", "-b", "5", "--keep", hub=hub).code == 0
    kept = tool_users(hub)
    users = hub.users()
    assert len(kept) == 13
    assert all(users[name]["servers"][""]["ready"] for name in kept)
    done = run_tool("purge", hub=hub)
    assert done.code == 0 and "13 users" in done.stdout
    assert not tool_users(hub)


def test_350_kept_users_are_seen_and_purged_and_nobody_else_is(hub: LocalHub) -> None:
    names = [f"hub-stress-test-{n}" for n in range(1, 351)]
    assert hub.call("POST", "/users", {"usernames": names})[0] == 201
    theirs = {name: user for name, user in hub.users().items() if name not in names}
    done = run_tool("purge", "--batch-size", "20", hub=hub)
    assert done.code == 0 and "350 users removed" in done.stdout
    after = hub.users()
    assert after.keys() == theirs.keys() >= THEIRS
    assert after["hub-stress-test-400"]["admin"]
    assert {n: u["last_activity"] for n, u in after.items()} == {n: u["last_activity"] for n, u in theirs.items()}


def test_purge_that_finds_nothing_succeeds(hub: LocalHub) -> None:
    done = run_tool("purge", hub=hub)
    assert done.code == 0 and "0 users removed" in done.stdout


def test_purge_of_one_run_leaves_the_other_runs_users(hub: LocalHub) -> None:
    hub.call("POST", "/users", {"usernames": ["hub-stress-test-1", "hub-stress-test-a-1", "hub-stress-test-a-1-1"]})
    assert run_tool("purge", "--run", "a", hub=hub).code == 0
    assert tool_users(hub) == {"hub-stress-test-1", "hub-stress-test-a-1-1"}
    assert run_tool("--run", "a-1", "purge", hub=hub).code == 0
    assert tool_users(hub) == {"hub-stress-test-1"}
    assert run_tool("purge", hub=hub).code == 0


def test_a_gap_in_the_names_collides_with_nobody(hub: LocalHub) -> None:
    hub.call("POST", "/users", {"usernames": ["hub-stress-test-1", "hub-stress-test-3"]})
    assert run_tool("stress-test", "-c", "3", hub=hub).code == 0
    assert tool_users(hub) == {"hub-stress-test-1", "hub-stress-test-3"}
    run_tool("purge", hub=hub)


def test_names_that_turn_out_to_be_taken_are_skipped_and_never_deleted(hub: LocalHub) -> None:
    hub.call("POST", "/users", {"usernames": ["hub-stress-test-2", "hub-stress-test-3", "hub-stress-test-4"]})
    session, claims = hst.get_session(hub.token), hst.Claims()
    users = hst.create_users(5, 2, hub.endpoint, session, [], claims=claims)  # as if it had looked before they came
    made = [name for batch in users for name in batch]
    assert made == [f"hub-stress-test-{n}" for n in (1, 5, 6, 7, 8)]
    assert claims.ours == made and claims.rivals
    assert hst.delete_users(made, hub.endpoint, session)
    assert tool_users(hub) == {"hub-stress-test-2", "hub-stress-test-3", "hub-stress-test-4"}
    run_tool("purge", hub=hub)


@pytest.mark.parametrize("slow_spawn_timeout_s", [10, 0])
@pytest.mark.parametrize("version", [None, "4.1.6"])
def test_failing_spawns_fail_the_run_with_their_number_and_reason(
    version: str | None, slow_spawn_timeout_s: float, make_hub: Make
) -> None:
    hub = make_hub(version=version, fail_rate=0.4, slow_spawn_timeout_s=slow_spawn_timeout_s)
    done = run_tool("stress-test", "-c", "20", hub=hub)
    assert done.code == 1
    assert "12 of 20 servers became ready" in done.stdout
    assert "8 × no node has 4 GB of memory free" in done.stdout
    assert row(done.stdout, "server ready") == ["20", "8"]
    assert not tool_users(hub)


def test_parallel_runs_of_different_names_never_touch_each_others_users(hub: LocalHub) -> None:
    hub.call("POST", "/users", {"usernames": ["hub-stress-test-a-1", "hub-stress-test-1"]})
    command = [sys.executable, str(MODULE), "stress-test", "-c", "12", "-b", "6"]
    runs = [
        subprocess.Popen(
            [*command, "--run", name], env={**hub.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in ("a", "b")
    ]
    for run in runs:
        stdout, stderr = run.communicate(timeout=60)
        assert run.returncode == 0, stderr
        assert b"12 of 12 servers became ready" in stdout
        assert b"12 users deleted, none left" in stdout
    assert tool_users(hub) == {"hub-stress-test-a-1", "hub-stress-test-1"}
    run_tool("purge", hub=hub)


def test_two_runs_of_the_same_name_each_keep_to_what_they_made(hub: LocalHub) -> None:
    command = [sys.executable, str(MODULE), "stress-test", "-c", "15", "-b", "5"]
    runs = [
        subprocess.Popen(command, env={**hub.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "ab"
    ]
    for run in runs:
        stdout, stderr = run.communicate(timeout=60)
        assert run.returncode == 0, stderr
        assert b"15 of 15 servers became ready" in stdout
    assert not tool_users(hub)


def test_throttled_starts_are_asked_again_when_a_place_is_free_and_not_after_the_hubs_pause(make_hub: Make) -> None:
    hub = make_hub(concurrent_spawn_limit=4, spawn_s=0.3, slow_spawn_timeout_s=0)
    done = run_tool("stress-test", "-c", "24", "-b", "12", hub=hub)
    assert done.code == 0
    assert re.search(r"24 ready, 0 failed; [1-9]\d* were throttled", done.stdout)
    took = re.search(r"took +([\d.]+) s", done.stdout)
    assert took and float(took[1]) < 25  # the hub's shortest pause is 30 s
    assert not tool_users(hub)


@pytest.mark.parametrize("slow_spawn_timeout_s", [10, 0])
@pytest.mark.parametrize("version", [None, "4.1.6"])
def test_a_server_that_never_comes_counts_as_failed_when_its_time_is_up_and_is_not_left(
    version: str | None, slow_spawn_timeout_s: float, make_hub: Make
) -> None:
    hub = make_hub(version=version, hang_rate=0.25, start_timeout_s=6, slow_spawn_timeout_s=slow_spawn_timeout_s)
    done = run_tool("stress-test", "-c", "8", "--server-timeout", "2s", hub=hub)
    assert done.code == 1
    assert "2 × not ready after 2 s" in done.stdout
    assert not tool_users(hub)  # hubs before 5.1 cannot stop a server that is starting: there it was waited for


def test_fail_fast_starts_no_more_once_one_has_failed(hub: LocalHub) -> None:
    words = ("stress-test", "-c", "40", "-b", "2", "--fail-fast", "--profile", '{"fail_rate": 1, "spawn_s": 0.1}')
    done = run_tool(*words, hub=hub)
    assert done.code == 1
    count, failed = map(int, row(done.stdout, "server ready"))
    assert 1 <= failed == count <= 4
    assert f"{40 - count} × never started" in done.stdout


def test_servers_that_are_gone_at_the_end_of_the_hold_have_failed(new_hub: LocalHub) -> None:
    words = [sys.executable, str(MODULE), "stress-test", "-c", "4", "--hold", "4s"]
    run = subprocess.Popen(words, env=new_hub.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stderr
    for line in run.stderr:
        if "Holding the servers for 4 s" in line:
            break
    users = new_hub.users()
    assert all(users[name]["servers"][""]["ready"] for name in tool_users(new_hub)) and len(tool_users(new_hub)) == 4
    new_hub.call("DELETE", f"/users/{min(tool_users(new_hub))}/server")  # as a culler would
    stdout, _ = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "3 of 4 servers became ready" in stdout and "1 × it became ready, but was gone" in stdout
    assert not tool_users(new_hub)


def test_a_profile_reaches_the_server(hub: LocalHub) -> None:
    assert run_tool("stress-test", "-c", "1", "-k", "--profile", "big", hub=hub).code == 0
    (name,) = tool_users(hub)
    assert hub.users()[name]["servers"][""]["user_options"] == {"profile": "big"}
    run_tool("purge", hub=hub)
    assert run_tool("stress-test", "-c", "1", "-k", "--profile", '{"image": "a:b"}', hub=hub).code == 0
    (name,) = tool_users(hub)
    assert hub.users()[name]["servers"][""]["user_options"] == {"image": "a:b"}
    run_tool("purge", hub=hub)


def test_three_real_notebook_servers_start_and_stop(make_hub: Make) -> None:
    hub = make_hub(real_servers=True)
    done = run_tool("stress-test", "-c", "3", hub=hub)
    assert done.code == 0, done
    assert "3 of 3 servers became ready" in done.stdout
    assert hub.users().keys() == THEIRS


def test_activity_is_reported_once_for_each_user_and_moves_the_hubs_record(hub: LocalHub) -> None:
    done = run_tool("activity-stress-test", "-c", "15", "--workers", "15", "--keep", hub=hub)
    assert done.code == 0, done
    assert "15 of 15 activity reports were accepted" in done.stdout
    users = hub.users()
    kept = tool_users(hub)
    assert len(kept) == 15
    assert all(users[name]["last_activity"] for name in kept)
    assert not any(users[name]["servers"] for name in kept)
    run_tool("purge", hub=hub)


def test_activity_uses_kept_users_first_and_deletes_only_those_it_made(hub: LocalHub) -> None:
    hub.call("POST", "/users", {"usernames": ["hub-stress-test-1", "hub-stress-test-5", "hub-stress-test-a-9"]})
    done = run_tool("activity-stress-test", "-c", "6", "--workers", "6", hub=hub)
    assert done.code == 0 and "6 of 6" in done.stdout
    assert "4 users deleted" in done.stdout
    assert tool_users(hub) == {"hub-stress-test-1", "hub-stress-test-5", "hub-stress-test-a-9"}
    run_tool("purge", hub=hub)


def test_activity_with_a_duration_goes_round_again(hub: LocalHub) -> None:
    done = run_tool("activity-stress-test", "-c", "2", "--workers", "2", "--duration", "4s", hub=hub)
    assert done.code == 0
    assert int(row(done.stdout, "activity report")[0]) > 2
    assert int(row(done.stdout, "ping")[0]) >= 15


def test_more_workers_than_users_and_more_batch_than_count_are_fine(hub: LocalHub) -> None:
    assert run_tool("activity-stress-test", "-c", "1", "--workers", "50", hub=hub).code == 0
    assert run_tool("stress-test", "-c", "1", "-b", "50", hub=hub).code == 0
