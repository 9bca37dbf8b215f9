"""`bahe check`: every problem of a dataset.yaml and its files, with its line; nothing is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import bahe
from tests.support import REPOSITORY
from tests.support.cli import call
from tests.support.logs import small_log, write_dataset


def edited(folder: Path, **edits: dict[str, Any]) -> Path:
    path = write_dataset(folder, small_log(rows=60))
    content = yaml.safe_load(path.read_text())
    for table, changes in edits.items():
        content[table].update(changes)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_what_is_in_order_is_counted(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, small_log(rows=60))
    before = sorted(tmp_path.iterdir())
    done = bahe.check(path)
    assert done.rows == {"items": 25, "users": 31, "behaviors": 60, "impressions": 60}
    assert done.files == dict.fromkeys(done.rows, 1)
    assert sorted(tmp_path.iterdir()) == before


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    path = edited(tmp_path, behaviors={"files": "b*.pq"}, items={"files": "gone.parquet"})
    with pytest.raises(bahe.BadInput) as caught:
        bahe.check(path)
    lines = path.read_text().splitlines()
    for table, name in (("behaviors", "b*.pq"), ("items", "gone.parquet")):
        number = lines.index(f"  files: {name}") + 1
        assert f"line {number}: {table}.files: nothing matches {name}" in str(caught.value)


def test_missing_columns_are_all_named(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        behaviors={"columns": {"text": "txt"}},
        impressions={"columns": {"user_id": "customer"}},
    )
    with pytest.raises(bahe.BadInput) as caught:
        bahe.check(path)
    message = str(caught.value)
    assert "2 problems" in message
    assert "txt" in message
    assert "customer" in message
    with pytest.raises(bahe.BadInput, match=r"customer|txt"):  # as an ingest says
        bahe.open(tmp_path / "home").ingest(path)


def test_the_command_prints_and_exits(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, small_log(rows=60))
    said = call("check", path)
    assert said.exit_code == 0
    assert said.stdout.startswith("small is in order: 25 items in 1 file")


def test_a_check_loads_no_model(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, small_log(rows=60))
    heavy = {"torch", "transformers", "feast", "great_expectations", "mlflow"}
    code = f"import sys, bahe; bahe.check({str(path)!r}); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
