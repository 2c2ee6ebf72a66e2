"""This machine's own forward proxy on the way to the hub."""

from __future__ import annotations

from fault_proxy import FaultProxy
from localhub import LocalHub
from tool import run_tool


def through(proxy: str) -> dict[str, str]:
    """The environment of a machine that reaches every host through this proxy, and signs in there."""
    return {"http_proxy": proxy.replace("//", "//me:pa55word@"), "no_proxy": ""}


def test_a_check_behind_a_forward_proxy_is_refused_before_anything_is_made(new_hub: LocalHub) -> None:
    with FaultProxy(new_hub.endpoint) as proxy:
        done = run_tool("stress-test", "-c", "1", "--check-proxy", hub=new_hub, env=through(proxy.url))
        assert {entry.method for entry in proxy.requests} == {"GET"}
    assert (done.code, done.stdout) == (3, "")
    assert f"this machine reaches {new_hub.public_url} through the proxy {proxy.url} (http_proxy)" in done.stderr
    assert "set no_proxy=127.0.0.1. Nothing was changed." in done.stderr and "pa55word" not in done.stderr
