"""The file keeps to a budget, and reads from top to bottom: a chapter uses only what stands before it."""

from __future__ import annotations

import ast
import bisect
from collections.abc import Iterator

from tool import MODULE

SOURCE = MODULE.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNERS = [number for number, line in enumerate(SOURCE.splitlines(), 1) if line.startswith("# ====")]
BUDGET = {"lines": 7735, "kB": 392, "functions": 501, "classes": 73, "lines over 110 columns": 0}


def chapter_of(node: ast.stmt) -> int:
    return bisect.bisect_right(BANNERS, node.lineno)


def test_the_file_keeps_to_its_budget() -> None:
    nodes = list(ast.walk(TREE))
    size = {
        "lines": len(SOURCE.splitlines()),
        "kB": len(SOURCE.encode()) / 1000,
        "functions": sum(isinstance(node, ast.FunctionDef) for node in nodes),
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "lines over 110 columns": sum(len(line) > 110 for line in SOURCE.splitlines()),
    }
    assert {name: number for name, number in size.items() if number > BUDGET[name]} == {}


def names_bound(node: ast.AST) -> set[str]:
    """The names that code gives to what is its own."""
    inner = list(ast.walk(node))
    own = {each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    own |= {each.arg for each in inner if isinstance(each, ast.arg)}
    return own | {each.name for each in inner if isinstance(each, ast.FunctionDef) and each is not node}


def names_used(node: ast.AST) -> Iterator[str]:
    """The names that code uses, annotations apart."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                yield from names_used(child)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id


def test_a_chapter_uses_only_names_of_chapters_before_it() -> None:
    chapters: dict[str, int] = {}
    for node in TREE.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in [*names, *([node.name] if hasattr(node, "name") else [])]:
            chapters.setdefault(name, chapter_of(node))
    early = {
        f"{getattr(node, 'name', node.lineno)} uses {name}"
        for node in TREE.body
        for name in {*names_used(node)} - names_bound(node)
        if chapters.get(name, 0) > chapter_of(node)
    }
    assert not early, "\n".join(sorted(early))
