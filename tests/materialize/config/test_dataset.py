"""dataset.yaml: every problem at once, each with its line; what is right comes back as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bahe_core.errors import BadInput
from bahe_models import BackboneConfig, TrainingConfig
from materialize.config.dataset import json_schema, load_dataset, save_dataset
from tests.support import REPOSITORY
from tests.support.logs import small_log, write_dataset

WRONG = """\
name: shop
channels: [liked, liked]
behaviors:
  files: a.parquet
  colums: {user_id: u}
impressions:
  files: b.parquet
  columns: {clicked: {column: stars, at_leest: 4}}
items: {}
training:
  epochz: 3
  epochs: 0
model: {dropout: much}
window: {size: 10, overlap: 20}
encoder: {pooling: max}
backbone: {shallow_layers: 0, layers: 2}
lake: {catalog: x}
"""
PROBLEMS = {
    2: ["`channels`: names one channel twice"],
    5: ["`behaviors.colums` is not a known field; `columns` is the nearest"],
    8: [
        "`impressions.columns.clicked.at_leest` is not a known field; `at_least` is the nearest",
        "`impressions.columns.clicked.at_least` is missing; add it",
    ],
    9: ["`items`: give either `files` or `sql`"],
    10: ["`training`: `epochs` and `impressions_per_step` must be at least 1"],
    11: ["`training.epochz` is not a known field; `epochs` is the nearest"],
    13: ["`model.dropout`: "],
    14: ["`window`: `overlap` is 20"],
    15: ["`encoder.pooling`: Input should be 'mean' or 'last'"],
    16: ["`backbone.layers` is not a known field", "`backbone`: `shallow_layers` is 0"],
    17: ["`lake.catalog` is not a known field; `catalogue` is the nearest"],
}


def edited(folder: Path, **sections: object) -> Path:
    """A dataset.yaml with these sections."""
    path = write_dataset(folder, small_log(rows=50))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))
    return path


def test_all_problems_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text(WRONG)
    with pytest.raises(BadInput) as caught:
        load_dataset(path)
    first, *lines = str(caught.value).splitlines()
    expected = [(number, words) for number, several in PROBLEMS.items() for words in several]
    assert first == f"{path} has {len(expected)} problems; correct them and run it again:"
    assert len(lines) == len(expected)
    numbers = [int(line.split()[1].rstrip(":")) for line in lines]
    assert numbers == sorted(number for number, _ in expected)
    for number, words in expected:
        assert any(line.startswith(f"  line {number}: {words}") for line in lines), (number, words, lines)


def test_one_problem_is_one_sentence(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, small_log(rows=50))
    content = yaml.safe_load(path.read_text())
    content["training"]["epochz"] = 2
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput) as caught:
        load_dataset(path)
    number = path.read_text().splitlines().index("  epochz: 2") + 1
    assert str(caught.value) == (
        f"{path}, line {number}: `training.epochz` is not a known field; `epochs` is the nearest."
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: [", "line 1 is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("name: a\x00b\n", "is not valid YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    path.write_text(content)
    with pytest.raises(BadInput, match=words):
        load_dataset(path)
    with pytest.raises(BadInput, match="is a folder"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("freshness", ["nightly 24:00", "nightly 2:30", "hourly 02:30", "weekly"])
def test_a_freshness_that_is_none_is_refused(freshness: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"line \d+: `freshness`.*{freshness} is none; write nightly"):
        load_dataset(edited(tmp_path, freshness=freshness))
    assert load_dataset(edited(tmp_path, freshness="nightly 02:30")).freshness == "nightly 02:30"
    assert load_dataset(edited(tmp_path, freshness="nightly 00:00")).freshness == "nightly"


def test_a_dataset_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = edited(
        tmp_path,
        training={"epochs": 7, "seed": 3},
        backbone={"shallow_layers": 4},
        freshness="daily",  # as version 0.1 called it
    )
    dataset = load_dataset(path)
    assert dataset.freshness == "nightly"
    assert dataset.training == TrainingConfig(epochs=7, seed=3)
    assert dataset.backbone == BackboneConfig(shallow_layers=4)
    save_dataset(dataset, tmp_path / "copy.yaml")
    assert load_dataset(tmp_path / "copy.yaml") == dataset


def test_a_model_beside_the_file_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = edited(tmp_path, backbone={"path": "model"})
    assert load_dataset(path).backbone.path == str(tmp_path / "model")
    path = edited(tmp_path, backbone={"path": "Qwen/Qwen3-0.6B"})
    assert load_dataset(path).backbone.path == "Qwen/Qwen3-0.6B"


def test_reading_a_configuration_loads_nothing_heavy(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, small_log(rows=50))
    heavy = {"torch", "duckdb", "feast", "pandas", "pyarrow", "transformers"}
    code = (
        "import sys; from pathlib import Path; from materialize.config.dataset import load_dataset;"
        f"load_dataset(Path({str(path)!r})); print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_schema_for_editors_is_the_model() -> None:
    shipped = (REPOSITORY / "materialize" / "config" / "dataset.schema.json").read_text()
    assert json.loads(shipped) == json_schema(), "run `make schema`"
