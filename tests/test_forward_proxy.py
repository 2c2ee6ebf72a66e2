"""This machine's own forward proxy on the way to the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import websocket

import hub_stress_test as hst
from fault_proxy import FaultProxy, ResetBefore, every, matching
from localhub import LocalHub
from test_hub_setup import refusal
from tool import run_for_results, tool_users

AROUND = "set no_proxy=127.0.0.1"


def through(proxy: str) -> dict[str, str]:
    """The environment of a machine that reaches every host through this proxy, and signs in there."""
    return {"http_proxy": proxy.replace("//", "//me:pa55word@"), "no_proxy": ""}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies."""
    for kind in ("http", "https", "all", "no"):
        for name in (f"{kind}_proxy", f"{kind}_proxy".upper()):
            monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_check_behind_a_forward_proxy_is_refused(
    clean: pytest.MonkeyPatch, proxy: FaultProxy, new_hub: LocalHub
) -> None:
    for name, value in through(proxy.url).items():
        clean.setenv(name, value)
    said = refusal(new_hub.endpoint, new_hub.token, check_proxy=True)
    assert f"through the proxy {proxy.url} (http_proxy)" in said and AROUND in said and "pa55word" not in said
    assert {entry.method for entry in proxy.requests} == {"GET"}


def test_a_missing_proxy_is_named_not_the_hub(clean: pytest.MonkeyPatch, new_hub: LocalHub) -> None:
    clean.setenv("http_proxy", "http://me:pa55word@127.0.0.1:1")
    said = refusal(new_hub.endpoint)
    assert "through the proxy http://127.0.0.1:1 (http_proxy): connection refused. Is the proxy right?" in said
    assert AROUND in said and "pa55word" not in said


def test_the_proxy_is_named_and_blamed_for_lost_answers(proxy: FaultProxy, new_hub: LocalHub, tmp_path: Path) -> None:
    proxy.rule = every(matching("GET", "/progress$|/users/[^/]+$"), ResetBefore())
    words = ("stress-test", "-c", "1", "--fail-if", "ping.failed > 0", "--profile", '{"spawn_s": 1}')
    done, results = run_for_results(tmp_path / "r", *words, hub=new_hub, env=through(proxy.url))
    named = f"the proxy {proxy.url} (http_proxy)"
    assert f"on {new_hub.endpoint}, through {named}, as hub-stress-test-<n>" in done.stderr
    assert results["hub"]["proxy"] == named and f"{new_hub.endpoint}, through {named}" in done.summary
    assert any(f"some requests through {named}" in advice and AROUND in advice for advice in results["advice"])
    assert done.code == 1 and not tool_users(new_hub)


@pytest.mark.parametrize(
    ("variable", "proxy", "way"),
    [
        ("no_proxy", "", {"http_no_proxy": ["*"]}),
        ("http_proxy", "squid:3128", {"http_proxy_host": "squid", "http_proxy_port": 3128, "proxy_type": "http"}),
        ("all_proxy", "socks5h://me:p%40w@squid", {"http_proxy_auth": ("me", "p@w"), "proxy_type": "socks5h"}),
    ],
)
def test_websockets_take_the_way_of_the_pages(
    variable: str, proxy: str, way: dict[str, object], clean: pytest.MonkeyPatch
) -> None:
    taken: dict[str, object] = {}

    def connect(socket: object, url: str, **options: object) -> None:
        taken.update(options)
        raise OSError("not today")

    clean.setenv(variable, proxy)
    clean.setattr(websocket.WebSocket, "connect", connect)
    with pytest.raises(hst.Failed, match="not today"):
        hst.open_websocket("ws://hub.example.org/user/ann/api", hst.HubSession("x"), 1.0)
    assert taken == taken | way


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, ""),
        ({"https_proxy": "http://squid:3128"}, "the proxy http://squid:3128 (https_proxy)"),
        ({"https_proxy": "squid:3128"}, "the proxy http://squid:3128 (https_proxy)"),
        ({"HTTPS_PROXY": "http://me:pw@squid"}, "the proxy http://squid (HTTPS_PROXY)"),
        ({"all_proxy": "socks5://me:pw@squid"}, "the proxy socks5://squid (all_proxy)"),
        ({"https_proxy": "squid:3128", "no_proxy": "localhost,example.org"}, ""),
        ({"http_proxy": "squid:3128"}, ""),
    ],
)
def test_the_proxy_is_known_by_its_variable(variables: dict[str, str], named: str, clean: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        clean.setenv(name, value)
    assert hst.HubSession("x").proxy_to("https://hub.example.org/hub/api") == named
