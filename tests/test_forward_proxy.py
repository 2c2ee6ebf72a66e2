"""This machine's own forward proxy on the way to the hub."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import hub_stress_test as hst
from fault_proxy import FaultProxy, ResetBefore, every, matching
from localhub import LocalHub
from tool import run_for_results, run_tool, tool_users

AROUND = "if this machine reaches 127.0.0.1 without that proxy too, set no_proxy=127.0.0.1"


def through(proxy: str) -> dict[str, str]:
    """The environment of a machine that reaches every host through this proxy, and signs in there."""
    return {"http_proxy": proxy.replace("//", "//me:pa55word@"), "no_proxy": ""}


def test_a_check_behind_a_forward_proxy_is_refused_before_anything_is_made(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        done = run_tool("stress-test", "-c", "1", "--check-proxy", hub=new_hub, env=through(proxy.url))
        assert {entry.method for entry in proxy.requests} == {"GET"}
    assert (done.code, done.stdout) == (3, "")
    said = f"{new_hub.public_url} is reached through the proxy {proxy.url} (http_proxy): {AROUND}. Nothing was changed."
    assert said in done.stderr and "pa55word" not in done.stderr


def test_a_run_names_the_proxy_and_blames_it_for_lost_answers(new_hub: LocalHub, tmp_path: Path) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        proxy.rule = every(matching("GET", "/progress$|/users/[^/]+$"), ResetBefore())
        words = ("stress-test", "-c", "1", "--fail-if", "ping.failed > 0", "--profile", '{"spawn_s": 1}')
        done, found = run_for_results(tmp_path / "r", *words, hub=new_hub, env=through(proxy.url))
    named = f"the proxy {proxy.url} (http_proxy)"
    assert f"on {new_hub.endpoint}, through {named}, as hub-stress-test-<n>" in done.stderr
    assert found["hub"]["proxy"] == named and f"{new_hub.endpoint}, through {named}" in done.summary
    assert f"some requests through {named} got no answer: {AROUND}" in found["advice"]
    assert done.code == 1 and not tool_users(new_hub)


def test_a_proxy_that_is_not_there_is_named_not_the_hub(new_hub: LocalHub) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
        done = run_tool("purge", hub=new_hub, env=through(nowhere))
    assert done.code == 3 and "pa55word" not in done.stderr
    named = f"{new_hub.endpoint}, through the proxy {nowhere} (http_proxy): connection refused"
    assert f"Nothing answers at {named}. Is the proxy right? Else {AROUND}." in done.stderr


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, ""),
        ({"https_proxy": "squid:3128"}, "the proxy http://squid:3128 (https_proxy)"),
        ({"HTTPS_PROXY": "http://me:pw@squid"}, "the proxy http://squid (HTTPS_PROXY)"),
        ({"all_proxy": "socks5://me:pw@squid"}, "the proxy socks5://squid (all_proxy)"),
        ({"https_proxy": "squid:3128", "no_proxy": "localhost,example.org"}, ""),
        ({"http_proxy": "squid:3128"}, ""),
    ],
)
def test_the_proxy_is_known_by_its_variable(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("http", "https", "all", "no"):
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hst.HubSession("x").proxy_to("https://hub.example.org/hub/api") == named
