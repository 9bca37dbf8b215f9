"""`bahe train` on what cannot be trained on: one sentence, exit code 2, no step taken, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from bahe_core.errors import BaheError
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_models import Checkpoint, baselines
from tests.support.cli import attempt, call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    """A home with everything that training needs."""
    folder = tmp_path_factory.mktemp("ready")
    dataset = write_dataset(folder / "log", small_log(rows=400), tiny_backbone)
    home = Home.at(folder / "home")
    for step in (("ingest", dataset), ("encode",), ("apply",), ("frame",)):
        call(*step, home=home)
    return home


def sql(statement: str) -> Callable[[Home], None]:
    def damage(home: Home) -> None:
        with lake(home) as connection:
            connection.execute(statement)

    return damage


def column(name: str, change: Callable[[pa.ChunkedArray], object]) -> Callable[[Home], None]:
    """One column of the frame, changed."""

    def damage(home: Home) -> None:
        (path,) = home.frames.glob("*/frame.parquet")
        frame = pq.read_table(path)
        place = frame.column_names.index(name)
        pq.write_table(frame.set_column(place, name, change(frame[name])), path)

    return damage


def first(value: object) -> Callable[[pa.ChunkedArray], object]:
    return lambda old: pa.array([value, *old.to_pylist()[1:]], old.type)


def another_encoder(home: Home) -> None:
    """As if dataset.yaml had been read again since `bahe encode`."""
    (path,) = home.root.glob("dataset.yaml")
    settings = yaml.safe_load(path.read_text())
    settings["encoder"] = {"pooling": "last"}
    path.write_text(yaml.safe_dump(settings))


def another_checkpoint(home: Home) -> None:
    Checkpoint(home.checkpoint("any"), "bahe-other").save({})


ONE_ATOM = "(SELECT min(atom_id) FROM user_timeline)"
VECTORS = "atomic_behavior_embedding"
CASES: dict[str, tuple[Callable[[Home], None], str]] = {
    "an atom without a vector": (
        sql(f"DELETE FROM {VECTORS} WHERE atom_id = {ONE_ATOM}"),
        "some atoms have no vector yet; run `bahe encode`",
    ),
    "vectors of two encoders": (
        sql(f"UPDATE {VECTORS} SET encoder_version = 'enc-other' WHERE atom_id = {ONE_ATOM}"),
        "some atoms have no vector yet; run `bahe encode`",
    ),
    "vectors of another encoder alone": (
        sql(f"UPDATE {VECTORS} SET encoder_version = 'enc-other'"),
        "no atom is encoded under enc-",
    ),
    "another encoder than dataset.yaml's": (another_encoder, "dataset.yaml asks for enc-"),
    "a NaN in a vector": (
        sql(
            f"UPDATE {VECTORS} SET embedding = list_transform(embedding, x -> 'nan'::FLOAT)"
            f" WHERE atom_id = {ONE_ATOM}"
        ),
        "1 atom vectors hold NaN or infinity; encode them again",
    ),
    "vectors of two widths": (
        sql(f"UPDATE {VECTORS} SET embedding = embedding[:16] WHERE atom_id = {ONE_ATOM}"),
        "16 to 32 numbers",
    ),
    "a missing label": (column("clicked", first(None)), "clicked is not 0 or 1 everywhere in the train"),
    "one class": (
        column("clicked", lambda old: pc.multiply(old, pa.scalar(0, old.type))),
        "the train split has only one class; move the cut-offs",
    ),
    "an infinite statistic": (
        column("user_click_rate", first(float("inf"))),
        "user_click_rate is infinite in the train split",
    ),
    "an item that is not there": (
        sql("DELETE FROM items WHERE item_id = 3"),
        "items that the log does not have (item 3 among them)",
    ),
    "a shorter timeline": (
        sql("DELETE FROM user_timeline WHERE user_id = 'u1'"),
        "points beyond a timeline's end",
    ),
    "another run's checkpoint": (another_checkpoint, "is the checkpoint of bahe-other, not of bahe-"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_before_any_step(
    case: str, ready: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = CASES[case]
    home = copy_of(ready, tmp_path)
    monkeypatch.setattr(Home, "checkpoint", lambda self, version: self.root / "run.checkpoint")
    damage(home)
    before = sorted(home.root.rglob("*"))

    def train_id_only(*_: object, **__: object) -> None:
        raise AssertionError("the first network was trained before the input was refused")

    monkeypatch.setattr(baselines, "train_id_only", train_id_only)
    result = attempt("train", "--tracker", "none", home=home)
    assert isinstance(result.exception, BaheError), result.exception
    assert result.exception.exit_code == 2
    message = str(result.exception)
    assert words in message
    assert len(message.splitlines()) == 1
    assert sorted(home.root.rglob("*")) == before
