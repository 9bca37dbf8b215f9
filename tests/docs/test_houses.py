"""docs/houses.md tells the truth about the folders, and no page names a file that is not there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
ROOMS = PYPROJECT["tool"]["importlinter"]["root_packages"]

ROW = re.compile(r"^\| `([\w/]+)/` \| (.*) \|$", re.MULTILINE)
PATH_IN_CODE = re.compile(r"`([\w./-]+/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def houses() -> dict[str, str]:
    """Each folder of the table, in its order, with what the page calls its job."""
    page = (REPOSITORY / "docs" / "houses.md").read_text()
    table = page.partition("| Folder | Its one job |")[2].partition("\n\n")[0]
    return dict(ROW.findall(table))


def first_line(folder: Path) -> str:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring, f"{folder}/__init__.py does not say what the folder is for"
    return docstring.splitlines()[0]


def floors() -> list[str]:
    """Rooms from the roof down, from the contract that import-linter holds."""
    for contract in PYPROJECT["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers" and "containers" not in contract:
            return [room for floor in contract["layers"] for room in floor.split(" | ")]
    raise AssertionError("pyproject.toml has no contract about the floors")


def test_each_job_is_the_first_line_of_its_folder() -> None:
    packages = [path.parent for room in ROOMS for path in (REPOSITORY / room).rglob("__init__.py")]
    assert houses() == {
        package.relative_to(REPOSITORY).as_posix(): first_line(package) for package in packages
    }


def test_the_table_goes_from_the_roof_down() -> None:
    assert [folder for folder in houses() if "/" not in folder] == floors()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    top_folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()} - {".bahe"}
    named = [path for path in PATH_IN_CODE.findall(text) if path.split("/")[0] in top_folders]
    linked = [page.parent / target for target in LINK.findall(text)]
    missing = [path for path in named if not (REPOSITORY / path).exists()]
    missing += [str(path) for path in linked if not path.exists()]
    assert missing == []
