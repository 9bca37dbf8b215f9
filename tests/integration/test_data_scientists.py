"""What a data scientist does with a home: histories of a frame's impressions as tensors, the notebook."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from feature_repo.store import apply
from materialize.frames.frame import Frame, frame
from materialize.frames.frame_dataset import FrameDataset
from materialize.frames.frame_history import HISTORY
from materialize.gate import gate
from materialize.ingest.ingest import ingest
from materialize.vectors.encode import encode
from tests.support.logs import small_log, write_dataset


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Home, Frame]:
    """A home with a frame and vectors, in which u3 has no behavior."""
    folder = tmp_path_factory.mktemp("framed")
    log = small_log(rows=400)
    behaviors = log["behaviors"]
    behaviors = behaviors[(behaviors["user_id"] != "u3") & (np.arange(len(behaviors)) % 7 != 0)]
    log["behaviors"] = behaviors
    home = Home.at(folder / "home")
    ingest(home, write_dataset(folder / "log", log, tiny_backbone))
    gate(home, "ingest")
    encode(home)
    gate(home, "encode")
    apply(home)
    made = frame(home)
    gate(home, "frame")
    return home, made


def test_histories_are_the_last_behaviors_before_the_impression(framed: tuple[Home, Frame]) -> None:
    home, made = framed
    dataset = FrameDataset(home, ["impression_id"], split=None, history=3, vectors=True, seed=1)
    assert dataset.channels == ("liked", "disliked")
    ids, vectors = dataset.atom_ids, dataset.vectors
    with lake(home) as connection:
        behaviors = connection.execute("SELECT * FROM behaviors").df()
        items = connection.execute("SELECT item_id, atom_id FROM items").df().set_index("item_id")
        stored = connection.execute("SELECT atom_id, embedding FROM atomic_behavior_embedding").df()
    stored = stored.set_index("atom_id")["embedding"]
    for row, atom in enumerate(ids.tolist()):
        np.testing.assert_array_equal(vectors[row].numpy(), stored[atom])
    frame = pq.read_table(made.path).to_pandas().set_index("impression_id")
    behaviors = behaviors.sort_values(["event_timestamp", "atom_id"])
    seen = empty = 0
    for batch in DataLoader(dataset, batch_size=None, num_workers=2):
        assert batch["history"].shape[1:] == (2, 3)
        for i, impression in enumerate(batch["impression_id"].tolist()):
            row = frame.loc[impression]
            assert int(ids[batch["item"][i]]) == items.loc[row["item_id"], "atom_id"]
            assert torch.equal(batch["item_vectors"][i], vectors[batch["item"][i]])
            past = behaviors[
                (behaviors["user_id"] == row["user_id"])
                & (behaviors["event_timestamp"] < row["event_timestamp"])
            ]
            for c, channel in enumerate(dataset.channels):
                wanted = past[past["channel"] == channel]["atom_id"].tolist()[-3:]
                count = int(batch["history_length"][i, c])
                assert ids[batch["history"][i, c, :count]].tolist() == wanted
                assert not batch["history"][i, c, count:].any()
                assert torch.equal(
                    batch["history_vectors"][i, c, :count], vectors[batch["history"][i, c, :count]]
                )
                assert not batch["history_vectors"][i, c, count:].any()
                seen, empty = seen + (count == 3), empty + (count == 0)
    assert seen > 100
    assert empty > 10


def test_a_frame_is_found_by_home_by_file_and_by_itself(framed: tuple[Home, Frame]) -> None:
    home, made = framed
    options: dict[str, Any] = {"split": "validation", "history": 2}
    ways = [
        list(FrameDataset(given, ["clicked", "user_id"], **options))
        for given in (home, made, made.path, str(home.root))
    ]
    for batches in ways[1:]:
        for one, other in zip(ways[0], batches, strict=True):
            assert (
                one.keys()
                == other.keys()
                == {"row", "clicked", "user_id", "item", "history", "history_length"}
            )
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(len(batch["row"]) for batch in ways[0]) == made.rows["validation"]


def test_a_dataset_travels_to_other_processes(framed: tuple[Home, Frame]) -> None:
    home, _ = framed
    dataset = FrameDataset(home, ["clicked"], history=2, vectors=True)
    again = pickle.loads(pickle.dumps(dataset))
    for one, other in zip(dataset, again, strict=True):
        assert torch.equal(one["history_vectors"], other["history_vectors"])


def test_histories_stay_those_of_the_frame_whatever_is_ingested_later(
    framed: tuple[Home, Frame], tmp_path: Path, tiny_backbone: Path
) -> None:
    filled, made = framed
    first = FrameDataset(made, [], split=None, history=4)
    before = [batch["history"] for batch in first]
    home = Home.at(tmp_path / "home")
    # As if the history were asked for only afterwards.
    shutil.copytree(filled.root, home.root, ignore=shutil.ignore_patterns("history*"))
    log = small_log(rows=400)  # with behaviors that arrive late, among those that are there
    ingest(home, write_dataset(tmp_path / "log", log, tiny_backbone))
    later = FrameDataset(home.frames / made.frame_id / made.path.name, [], split=None, history=4)
    assert torch.equal(later.atom_ids, first.atom_ids)
    assert all(torch.equal(a, b["history"]) for a, b in zip(before, later, strict=True))
    again = FrameDataset(home.frames / made.frame_id / made.path.name, [], history=4, vectors=True)
    assert torch.equal(again.vectors, FrameDataset(made, [], vectors=True).vectors)


def test_vectors_that_are_not_there_are_missed(framed: tuple[Home, Frame], tmp_path: Path) -> None:
    filled, made = framed
    home = Home.at(tmp_path / "home")
    shutil.copytree(filled.root, home.root, ignore=shutil.ignore_patterns("history*"))
    with lake(home) as connection:
        commit(connection, ["DELETE FROM atomic_behavior_embedding WHERE atom_id % 2 = 0"])
    with pytest.raises(NotReady, match="have no vector under"):
        FrameDataset(home, ["clicked"], vectors=True)
    assert not list(made.path.parent.glob("*.part"))
    unknown = home.frames / "mine" / "frame.parquet"
    unknown.parent.mkdir()
    pq.write_table(pq.read_table(made.path).replace_schema_metadata(), unknown)
    with pytest.raises(BadInput, match="does not say which snapshot"):
        FrameDataset(unknown, ["clicked"], history=2)
    with pytest.raises(BadInput, match="made without history"):
        _ = FrameDataset(home, ["clicked"]).vectors
    assert "history" in next(iter(FrameDataset(home, ["clicked"], history=2)))


NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebooks" / "data_scientist.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(
    framed: tuple[Home, Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, made = framed
    before = {path.name for path in home.root.iterdir()}
    monkeypatch.setenv("BAHE_HOME", str(home.root))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    assert NOTEBOOK.stat().st_size < 500_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (result,) = (o for o in notebook.cells[-2]["outputs"] if o["output_type"] == "execute_result")
    assert "floor" in result["data"]["text/html"]
    assert "small model" in result["data"]["text/html"]
    pictures = [
        o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 1
    assert before == {path.name for path in home.root.iterdir()}
    assert (made.path.parent / HISTORY).is_dir()
