"""A frame as tensors: every row once, whoever reads; the values of the file; histories that end in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bahe_core.errors import BadInput, Damaged, NotReady
from materialize.frames.frame_dataset import FrameDataset

ROWS = 500


def table(rows: int = ROWS) -> pa.Table:
    """A frame of one's own; its splits are not in one piece."""
    number = np.arange(rows)
    time = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(number, unit="us")
    return pa.table(
        {
            "number": number,
            "some": pa.array([None if i % 3 == 0 else int(i) for i in number], pa.int64()),
            "rate": pa.array([None if i % 4 == 0 else i / 8 for i in number], pa.float64()),
            "clicked": pa.array(number % 2 == 0),
            "event_timestamp": pa.array(time, pa.timestamp("us", "UTC")),
            "text": pa.array([None if i % 5 == 0 else f"t{i % 7}" for i in number]),
            "pair": pa.array([[float(i), -float(i)] for i in number], pa.list_(pa.float32())),
            "recent": pa.array([None if i % 6 == 0 else list(range(i % 4)) for i in number]),
            "split": np.where(number % 10 < 8, "train", "test"),
        }
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frame") / "frame.parquet"
    pq.write_table(table(), path, row_group_size=120)
    return path


def rows_of(dataset: FrameDataset, **options: Any) -> list[int]:
    return [
        row for batch in DataLoader(dataset, batch_size=None, **options) for row in batch["row"].tolist()
    ]


def train_rows() -> list[int]:
    return [i for i in range(ROWS) if i % 10 < 8]


def test_columns_become_tensors(file: Path) -> None:
    columns = ["number", "some", "rate", "clicked", "event_timestamp", "text", "pair", "recent"]
    batches = list(FrameDataset(file, columns, batch_rows=150, split=None))
    assert [len(batch["row"]) for batch in batches] == [125] * 4
    got = {name: np.concatenate([b[name].numpy() for b in batches]) for name in columns[:-1]}
    frame = table().to_pandas()
    assert got["number"].dtype == got["clicked"].dtype == np.int64
    np.testing.assert_array_equal(got["number"], frame["number"])
    np.testing.assert_array_equal(got["clicked"], frame["clicked"])
    assert (got["some"].dtype, got["rate"].dtype) == (np.float64, np.float32)
    np.testing.assert_array_equal(got["some"], frame["some"].to_numpy(np.float64, na_value=np.nan))
    np.testing.assert_array_equal(got["rate"], frame["rate"].to_numpy(np.float32))
    np.testing.assert_array_equal(got["event_timestamp"], frame["event_timestamp"].astype(np.int64))
    np.testing.assert_array_equal(got["pair"], np.stack(frame["pair"]))
    # Equal texts have equal hashes, others others; null is 0.
    hashed = pd.Series(got["text"]).groupby(frame["text"]).unique()
    assert all(len(values) == 1 and values[0] > 0 for values in hashed)
    assert len({int(values[0]) for values in hashed}) == 7
    assert not got["text"][frame["text"].isna()].any()
    recent, length = batches[0]["recent"], batches[0]["recent_length"]
    wanted = table()["recent"].to_pylist()[:125]
    assert [r[:n].tolist() for r, n in zip(recent, length, strict=True)] == [w or [] for w in wanted]
    assert recent.shape == (125, 3)
    assert not recent[torch.arange(3) >= length[:, None]].any()


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(1, 4),
    workers=st.integers(1, 3),
    batch_rows=st.integers(2, 400),
    shuffled_rows=st.integers(1, 2_000),
    seed=st.none() | st.integers(0, 9),
    split=st.sampled_from([None, "train", "test"]),
)
def test_readers_share_the_rows(
    file: Path,
    ranks: int,
    workers: int,
    batch_rows: int,
    shuffled_rows: int,
    seed: int | None,
    split: str | None,
) -> None:
    everything: list[int] = []
    counts = set()
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            dataset = FrameDataset(
                file,
                ["number"],
                split=split,
                batch_rows=batch_rows,
                seed=seed,
                shuffled_rows=shuffled_rows,
                rank=rank,
                ranks=ranks,
            )
            for number in range(workers):
                info = type("Info", (), {"num_workers": workers, "id": number})
                patch.setattr("materialize.frames.frame_dataset.get_worker_info", lambda info=info: info)
                batches = list(dataset)
                counts.add(len(batches))
                assert all(1 <= len(batch["row"]) <= batch_rows for batch in batches)
                assert all(torch.equal(batch["row"], batch["number"]) for batch in batches)
                everything += [row for batch in batches for row in batch["row"].tolist()]
    wanted = (
        range(ROWS) if split is None else [i for i in range(ROWS) if (i % 10 < 8) == (split == "train")]
    )
    assert sorted(everything) == list(wanted)
    assert len(counts) == 1  # so that no rank waits for another
    if seed is None:
        assert everything == list(wanted)


def test_workers_read_all_rows_once_and_reproducibly(file: Path) -> None:
    dataset = FrameDataset(file, ["number"], batch_rows=64, seed=3)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)  # heard by workers that are there already
        epochs.append([row for batch in loader for row in batch["row"].tolist()])
    assert all(sorted(rows) == train_rows() for rows in epochs)
    assert epochs[0] == epochs[2] != epochs[1]
    assert epochs[0] != train_rows()
    again = FrameDataset(file, ["number"], batch_rows=64, seed=3)
    assert rows_of(again, num_workers=2) == epochs[0]
    assert rows_of(FrameDataset(file, ["number"], batch_rows=64, seed=4), num_workers=2) != epochs[0]


def test_shuffling_mixes_rows_from_everywhere(tmp_path: Path) -> None:
    pq.write_table(table(8_000), tmp_path / "frame.parquet", row_group_size=500)
    dataset = FrameDataset(
        tmp_path / "frame.parquet", [], split=None, batch_rows=100, seed=0, shuffled_rows=2_000
    )
    spread = [float(batch["row"].double().std()) for batch in dataset]
    assert min(spread) > 1_000  # 2,309 would be perfect, 29 the file's order


def test_ranks_are_torchruns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        rows.append(rows_of(FrameDataset(file, [], batch_rows=50, seed=0)))
    assert sorted(row for mine in rows for row in mine) == train_rows()


def test_memory_does_not_grow_with_the_frame(tmp_path: Path) -> None:
    rows = 400_000
    columns = {f"c{i}": pa.array(np.random.default_rng(i).random(rows)) for i in range(8)}
    pq.write_table(pa.table(columns), tmp_path / "frame.parquet", row_group_size=10_000)
    dataset = FrameDataset(
        tmp_path / "frame.parquet", list(columns), split=None, seed=0, shuffled_rows=20_000
    )
    before, most = pa.total_allocated_bytes(), 0
    for _ in dataset:
        most = max(most, pa.total_allocated_bytes() - before)
    whole = rows * 8 * 8
    assert most < whole / 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": ["nothing"]}, "has no column nothing; it has number, some"),
        ({"split": "tset"}, "no rows of the split tset"),
        ({"batch_rows": 1}, "batch_rows is 1"),
        ({"history": -1}, "history is -1"),
        ({"history": 1}, "not a frame of a home"),
        ({"rank": 2, "ranks": 2}, "rank 2 of 2"),
        ({"rank": 1}, "give both"),
    ],
)
def test_what_cannot_be_read_is_refused(file: Path, options: dict[str, Any], words: str) -> None:
    columns = options.pop("columns", ["number"])
    with pytest.raises(BadInput, match=words):
        FrameDataset(file, columns, **options)


def test_files_that_are_no_frames_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not there"):
        FrameDataset(tmp_path / "gone.parquet", [])
    with pytest.raises(NotReady, match="holds no data yet"):
        FrameDataset(tmp_path / "no-home", [])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(file.read_bytes()[:2_000])
    with pytest.raises(Damaged, match="cannot be read"):
        FrameDataset(broken, ["number"])
    pq.write_table(table().drop_columns("split"), tmp_path / "plain.parquet")
    with pytest.raises(BadInput, match="has no column split"):
        FrameDataset(tmp_path / "plain.parquet", ["number"])
    pq.write_table(pa.table({"s": [{"a": 1}], "n": [[1, None]]}), tmp_path / "nested.parquet")
    with pytest.raises(BadInput, match="column s is struct"):
        FrameDataset(tmp_path / "nested.parquet", ["s"], split=None)
    with pytest.raises(BadInput, match="n has nulls inside"):
        list(FrameDataset(tmp_path / "nested.parquet", ["n"], split=None))
    with pytest.raises(BadInput, match="cannot be shared by 3"):
        list(FrameDataset(tmp_path / "nested.parquet", [], split=None, rank=0, ranks=3))
