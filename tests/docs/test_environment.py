"""docs/environment.md names every variable that the code reads, and no module reads one on import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_houses import REPOSITORY, ROOMS

VARIABLE = re.compile(r"\bBAHE_[A-Z_]+\b")
TESTS_OWN = {"BAHE_TEST_DRIVER"}
"""By which a test finds the processes that it started."""


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for pattern in ("*.py", "*.yaml", "*.sh"):
            yield from (REPOSITORY / folder).rglob(pattern)


def test_the_page_names_the_variables_that_are_read_and_no_other() -> None:
    page = (REPOSITORY / "docs" / "environment.md").read_text()
    files = [
        *sources(*ROOMS, "benchmarks", "examples"),
        *(REPOSITORY / "tests" / "support").rglob("*.py"),
        REPOSITORY / "tests" / "conftest.py",
    ]
    in_code = {name for path in files for name in VARIABLE.findall(path.read_text())} - TESTS_OWN
    in_table = set(re.findall(r"^\| `(BAHE_[A-Z_]+)` \|", page, re.MULTILINE))
    assert in_table == in_code


def run_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that are run when the module is imported: all but the insides of functions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif not isinstance(node, ast.Lambda):
            pending += ast.iter_child_nodes(node)


def lines_that_touch_the_environment(source: str) -> list[int]:
    return [
        node.lineno
        for node in run_on_import(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_module_reads_and_changes_no_environment(room: str) -> None:
    touching = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in (REPOSITORY / room).rglob("*.py")
        for line in lines_that_touch_the_environment(path.read_text())
    ]
    assert touching == []


def test_what_is_looked_for_is_seen() -> None:
    module = "import os\nA = os.environ['A']\ndef f(b=os.getenv('B')):\n    return os.environ['C']\n"
    assert sorted(lines_that_touch_the_environment(module)) == [2, 3]
