"""The history of each impression of a frame, by reference: memory-mapped arrays beside the frame.

A frame carries timeline lengths. These files carry what they point at: the timelines themselves once,
where each impression's begins, and the atoms' vectors. All readers of a machine share the same pages, so
neither worker processes nor ranks multiply them.

Shape letters: N impressions of the whole frame, C channels, H behaviors asked for, B behaviors of the log,
A atoms, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from bahe_core.errors import BadInput, NotReady
from bahe_core.files import new_folder, replace_atomically
from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_lake.sql import sql_literal
from bahe_models import Int64
from materialize.config.dataset import home_dataset
from materialize.frames.frame import Frame
from materialize.frames.item_texts import item_texts_shown
from materialize.vectors.stored_atoms import current_encoder
from materialize.vectors.vector_columns import vector_matrix

HISTORY = "history-2"
"""The folder; `history` of earlier versions holds each item's latest text."""

BATCH_ROWS = 122_880
"""Rows that are in memory at a time while the files are written."""


@dataclass(frozen=True)
class FrameHistory:
    """The files' location. Each reader opens them itself, so that this can be sent to other processes."""

    folder: Path
    channels: tuple[str, ...]

    @property
    def atom_ids(self) -> Int64:
        """The id of each atom row, rising [A]."""
        return self._map("atom_ids")

    def vectors(self, encoder_version: str) -> npt.NDArray[np.float32]:
        """The vector of each atom row [A, D], mapped from disk; `write_vectors` has to come first."""
        vectors: npt.NDArray[np.float32] = np.load(self.vectors_file(encoder_version), mmap_mode="r")
        return vectors

    def vectors_file(self, encoder_version: str) -> Path:
        """Where the vectors of an encoder are."""
        return self.folder / f"vectors-{encoder_version}.npy"

    def item_rows(self, rows: Int64) -> Int64:
        """Atom rows of the texts that the items of these impressions had then; -1 for an unknown item."""
        atom_rows: Int64 = self._map("item_row")[rows]
        return atom_rows

    def last(self, rows: Int64, length_NC: Int64, count: int) -> tuple[Int64, Int64]:
        """Atom rows [N, C, H] of the last `count` behaviors before these impressions, oldest first, and how
        many of them there are [N, C]; what is beyond that number is 0."""
        held_NC = np.minimum(length_NC, count)
        first_NC = self._map("start")[rows] + length_NC - held_NC
        place_H = np.arange(count)
        there_NCH = place_H < held_NC[..., None]
        timelines = self._map("timeline")
        atoms_NCH = np.zeros(there_NCH.shape, dtype=np.int64)
        atoms_NCH[there_NCH] = timelines[(first_NC[..., None] + place_H)[there_NCH]]
        return atoms_NCH, held_NC

    def _map(self, name: str) -> Int64:
        mapped: Int64 = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return mapped


def frame_history(home: Home, frame: Frame) -> FrameHistory:
    """The history of a frame, written beside it when first asked for, whole or not at all.

    Timelines are read as of the frame's own snapshot, since lengths point into those. Raises BadInput when
    the snapshot is gone.
    """
    history = FrameHistory(frame.path.parent / HISTORY, tuple(home_dataset(home).channels))
    with _lock(frame):
        if not history.folder.is_dir():
            with new_folder(history.folder) as folder:
                _write_timelines(home, frame, folder, history.channels)
    return history


def write_vectors(home: Home, frame: Frame, history: FrameHistory) -> str:
    """Write the atoms' vectors beside the history unless they are there; returns their encoder_version.

    Vectors never change, so they are read from the lake as it is now: atoms may have been encoded after the
    frame was pulled. Raises NotReady when an atom has none.
    """
    with lake(home) as connection, _lock(frame):
        encoder = current_encoder(connection, home)
        path = history.vectors_file(encoder)
        if path.is_file():
            return encoder
        atom_ids = history.atom_ids
        connection.register("frame_atoms", pa.table({"atom_id": atom_ids}))
        of_the_frame = (
            "FROM atomic_behavior_embedding JOIN frame_atoms USING (atom_id) WHERE encoder_version = ?"
        )
        row = connection.execute(
            f"SELECT count(*), min(len(embedding)) {of_the_frame}", [encoder]
        ).fetchone()
        assert row is not None
        if row[0] != len(atom_ids):
            raise NotReady(
                f"{len(atom_ids) - row[0]} atoms of the frame have no vector under {encoder}; run"
                " `bahe encode` first."
            )
        with replace_atomically(path) as part:
            _stream(
                connection,
                f"SELECT embedding {of_the_frame} ORDER BY atom_id",
                part,
                (row[0], row[1] or 0),
                lambda batch: vector_matrix(pa.chunked_array([batch.column("embedding")])),
                dtype=np.float32,
                values=[encoder],
            )
    return encoder


def _lock(frame: Frame) -> FileLock:
    """Held while writing, because several ranks start at once."""
    return FileLock(frame.path.parent / ".history.lock")


def _write_timelines(home: Home, frame: Frame, folder: Path, channels: tuple[str, ...]) -> None:
    try:
        snapshot, freshness = frame.facts["snapshot"], frame.facts.get("freshness", "live")
    except (KeyError, TypeError):  # without metadata, or with other
        raise BadInput(
            f"{frame.path} does not say which snapshot it is of; pull it again by `bahe frame`."
        ) from None
    with lake(home, as_of=snapshot) as then:
        channel_names = ", ".join(map(sql_literal, channels))
        timelines = f"(SELECT * FROM user_timeline WHERE channel IN ({channel_names}))"
        atoms = then.execute(
            f"""
            SELECT atom_id
            FROM (SELECT atom_id FROM {timelines} UNION SELECT atom_id FROM items)
            ORDER BY atom_id
            """
        ).to_arrow_table()
        atom_ids = atoms["atom_id"].to_numpy()
        np.save(folder / "atom_ids.npy", atom_ids)

        def atom_rows(batch: pa.RecordBatch) -> Int64:
            rows: Int64 = np.searchsorted(atom_ids, batch.column("atom_id").to_numpy())
            return rows

        _stream(
            then,
            f"SELECT atom_id FROM {timelines} ORDER BY user_id, channel, position",
            folder / "timeline.npy",
            (scalar(then, f"SELECT count(*) FROM {timelines}"),),
            atom_rows,
        )
        names = [f"c{i}" for i in range(len(channels))]
        start_of_each = ", ".join(
            f"coalesce(max(start) FILTER (channel = {sql_literal(channel)}), 0)::BIGINT AS {name}"
            for name, channel in zip(names, channels, strict=True)
        )
        then.execute(
            f"""
            CREATE TEMP TABLE starts AS
            SELECT user_id, {start_of_each}
            FROM (
                SELECT
                    user_id,
                    channel,
                    sum(count(*)) OVER (ORDER BY user_id, channel) - count(*) AS start
                FROM {timelines}
                GROUP BY user_id, channel
            )
            GROUP BY user_id
            """
        )
        path = sql_literal(str(frame.path))
        numbered = f"read_parquet({path}, file_row_number = true)"
        rows = scalar(then, f"SELECT count(*) FROM read_parquet({path})")
        start_or_zero = ", ".join(f"coalesce(s.{name}, 0) AS {name}" for name in names)
        _stream(
            then,
            f"""
            SELECT {start_or_zero}
            FROM {numbered} f
            LEFT JOIN temp.starts s USING (user_id)
            ORDER BY file_row_number
            """,
            folder / "start.npy",
            (rows, len(channels)),
            lambda batch: np.stack([batch.column(c).to_numpy() for c in names], axis=1),
        )
        _stream(
            then,
            f"""
            SELECT atom_id IS NOT NULL AS known, coalesce(atom_id, 0) AS atom_id
            FROM ({item_texts_shown(numbered, "file_row_number", freshness)})
            ORDER BY file_row_number
            """,
            folder / "item_row.npy",
            (rows,),
            lambda batch: np.where(
                batch.column("known").to_numpy(zero_copy_only=False), atom_rows(batch), -1
            ),
        )


def _stream(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    path: Path,
    shape: tuple[int, ...],
    convert: Callable[[pa.RecordBatch], npt.NDArray[Any]],
    *,
    dtype: type = np.int64,
    values: list[object] | None = None,
) -> None:
    """Write the rows of a query into a .npy file of this shape, a batch at a time."""
    target = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    done = 0
    for batch in connection.execute(query, values or []).to_arrow_reader(BATCH_ROWS):
        target[done : done + batch.num_rows] = convert(batch)
        done += batch.num_rows
    assert done == shape[0], f"{path.name}: {done} rows instead of {shape[0]}"
    target.flush()
