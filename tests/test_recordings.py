"""The files that say what people do: the recording of a page, and a notebook; and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hub_stress_test as hst

OURS = "https://hub.example.org/user/alice/"


def entry(url: str, status: Any = 200, method: str = "GET") -> dict[str, Any]:
    return {"request": {"method": method, "url": url}, "response": {"status": status}}


def har(*entries: Any) -> str:
    return json.dumps({"log": {"entries": entries}})


def cell(source: Any, kind: str = "code", **metadata: Any) -> dict[str, Any]:
    return {"cell_type": kind, "source": source, "metadata": metadata, "outputs": []}


def ipynb(*cells: Any) -> str:
    return json.dumps({"cells": cells, "nbformat": 4})


Read = Callable[..., list[tuple[str, int]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Imports a recording with these entries."""

    def read(*entries: dict[str, Any]) -> list[tuple[str, int]]:
        file = tmp_path / "lab.har"
        file.write_text(har(*entries), encoding="utf-8-sig")  # it may begin with a byte order mark
        return list(hst.recording(str(file)).parts)

    return read


def test_gets_of_a_recording_keep_their_order_and_statuses(read: Read) -> None:
    entries = [entry(OURS + "lab", 302), entry(OURS + "static/lab/main.js?v=1")]
    entries += [entry(OURS + "api/workspaces", 201, "PUT"), entry(OURS + "api/me", 404), entry(OURS, 304)]
    assert read(*entries) == [("lab", 302), ("static/lab/main.js?v=1", 200), ("api/me", 404), ("", 304)]


@pytest.mark.parametrize(
    "left_out",
    [
        entry("https://cdn.example.org/font.woff"),
        entry("https://hub.example.org/hub/user/alice/lab", 302),
        entry("https://hub.example.org/user/bob/lab"),
        entry("https://hub.example.org/user/alice"),
        entry(OURS + "api/contents", 201, "POST"),
        entry(OURS + "api/events/subscribe", 101),
        entry("wss://hub.example.org/user/alice/api/kernels/1/channels", 200),
        entry(OURS + "oauth_callback?code=c0de&state=5tate", 302),
    ],
    ids=lambda left_out: f"{left_out['request']['url']} {left_out['response']['status']}",
)
def test_all_but_gets_of_the_server_is_left_out(left_out: dict[str, Any], read: Read) -> None:
    assert read(entry(OURS + "lab"), left_out, entry(OURS + "api/me")) == [("lab", 200), ("api/me", 200)]


def test_the_server_is_the_one_with_most_files(read: Read) -> None:
    names = ["bob", "b%40x.org", "b%40x.org", "bob", "b%40x.org"]
    base = "http://127.0.0.1:8000/deep/jupyter/user"
    found = read(*(entry(f"{base}/{name}/lab/{n}") for n, name in enumerate(names)))
    assert found == [("lab/1", 200), ("lab/2", 200), ("lab/4", 200)]


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("?code=5ecret&state=5ecret&_xsrf=5ecret", ""),
        ("?a=1&token=5ecret&a=2&empty=", "?a=1&a=2&empty="),
        ("?content=0&path=a%2Fb%20c&_xsrf=5ecret", "?content=0&path=a%2Fb+c"),
        ("#token=5ecret", ""),
    ],
)
def test_no_secret_of_a_recording_is_imported(query: str, kept: str, read: Read) -> None:
    full = entry(OURS + "lab" + query)
    full["request"] |= {"headers": [{"name": "Authorization", "value": "token 5ecret"}], "cookies": [{"v": "5ecret"}]}
    full["response"] |= {"content": {"text": "5ecret"}}
    assert read(full) == [(f"lab{kept}", 200)]


SCRIPT = """\
# ---
# jupyter: {}
# ---
# %% [markdown]
# # A class

# %%
import time
print(1)

# %% a title
# only a comment
# %% [raw]
not_python
# %% [md]
# text
# %% tags=["raises-exception"]
1 / 0
# %%

# %% last
  
"""


@pytest.mark.parametrize(
    ("name", "content", "cells"),
    [
        ("a.ipynb", ipynb(cell(["a = 1\n", "a"])), [("a = 1\na", False)]),
        ("a.ipynb", ipynb(cell("# Title", "markdown"), cell("x", "raw"), cell("2")), [("2", False)]),
        ("a.ipynb", ipynb(cell("1/0", tags=["slow", "raises-exception"])), [("1/0", True)]),
        ("a.py", "\ufeff# %%\n1+1\n# %%\n2", [("1+1\n", False), ("2", False)]),
        ("a.py", "x = 1  # %% not here\n# %%\r\nx\r\n", [("x = 1  # %% not here\n", False), ("x\n", False)]),
        ("a.py", "# the title\n\n#%%\nx\n", [("x\n", False)]),
        ("class.py", SCRIPT, [("import time\nprint(1)\n\n", False), ("# only a comment\n", False), ("1 / 0\n", True)]),
    ],
)
def test_the_code_cells_of_a_notebook_are_read_in_order(
    name: str, content: str, cells: list[tuple[str, bool]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = hst.notebook(str(tmp_path / name))
    assert found == hst.Given(str(tmp_path / name), tuple(hst.Code(*each) for each in cells))


NO_HAR, NO_BOOK = "cannot be read as a HAR file", "cannot be read as a notebook"


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("lab.har", "", f"{NO_HAR} (Expecting value"),
        ("lab.har", "[]", NO_HAR),
        ("lab.har", '{"log": {}}', f"{NO_HAR} ('entries')"),
        ("lab.har", har({"request": {"method": "GET", "url": 7}, "response": {"status": 200}}), NO_HAR),
        ("lab.har", "\xff", NO_HAR),
        ("lab.har", None, f"{NO_HAR} (No such file"),
        ("lab.har", har(), "holds no GET below /user/NAME/: record the page of a person's server"),
        ("lab.har", har(entry(OURS + "oauth_callback", 302)), "holds no GET below /user/NAME/"),
        ("a.ipynb", ipynb(cell("# Title", "markdown"), cell("  ")), "has no code cells"),
        ("a.py", "print(1)\n", "has no code cells (in a Python file, # %% begins one)"),
        ("a.py", "# %% [markdown]\n# text\n", "has no code cells"),
        ("a.ipynb", "", f"{NO_BOOK} (Expecting value"),
        ("a.ipynb", ipynb(cell(7)), NO_BOOK),
        ("a.ipynb", ipynb(cell("1") | {"metadata": None}), NO_BOOK),
        ("a.ipynb", ipynb({"cell_type": "code"}), f"{NO_BOOK} ('source')"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name: str, content: str | None, refusal: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(hst.UsageError) as refused:
        (hst.recording if name.endswith(".har") else hst.notebook)(str(file))
    assert str(refused.value).startswith(f"{file} {refusal}")
