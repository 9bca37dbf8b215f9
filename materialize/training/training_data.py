"""The arrays that training reads, from a frame on disk and the lake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bahe_core.errors import BadInput
from bahe_models import Impressions, Int64, TrainingData, column_of, needed_columns
from bahe_models.context import MISSING, hash_values
from materialize.config.dataset import context_column
from materialize.frames.frame import SPLITS, Frame
from materialize.frames.item_texts import item_texts_shown
from materialize.vectors.stored_atoms import read_atoms
from materialize.vectors.timelines import read_timelines
from materialize.vectors.vector_columns import vectors_or_nan


def read_training_data(
    connection: duckdb.DuckDBPyConnection, frame: Frame, version: str, channels: list[str]
) -> TrainingData:
    """Everything a training run reads, from the frame on disk and the lake.

    Raises BadInput when it cannot be trained on, NotReady when atoms have no vector of that version.
    """
    atoms = read_atoms(connection, version)
    table = pq.read_table(frame.path)
    users = table["user_id"].combine_chunks().dictionary_encode()
    facts = frame.facts
    items, item_row = _items_shown(connection, table, facts.get("freshness", "live"))
    user_row = users.indices.to_numpy().astype(np.int64)
    lengths = np.stack(
        [table[f"length_{c}"].fill_null(0).to_numpy().astype(np.int64) for c in channels], axis=1
    )
    time_us = table["event_timestamp"].cast(pa.int64()).to_numpy()
    numeric = tuple(facts.get("numeric", ()))
    columns = {c: _numbers(table[c]) for c in (*needed_columns(), *map(column_of, numeric))}
    vectors = facts.get("vectors", {})
    matrices = {one: vectors_or_nan(table[column_of(one)], width) for one, width in vectors.items()}
    clicked = table["clicked"].to_numpy().astype(np.float32)
    context = context_of(facts)
    hashed = None
    if context:
        stored = [context_column(c) if c in facts.get("context", ()) else c for c in context]
        hashed = np.stack([_hashed(table, *names) for names in zip(context, stored, strict=True)], axis=1)

    def part(name: str) -> Impressions:
        rows = np.flatnonzero(pc.equal(table["split"], name).to_numpy())
        return Impressions(
            user_N=user_row[rows],
            item_N=item_row[rows],
            length_NC=lengths[rows],
            time_us_N=time_us[rows],
            clicked_N=clicked[rows],
            columns={c: values[rows] for c, values in columns.items()},
            context_NX=None if hashed is None else hashed[rows],
            vectors={name: values[rows] for name, values in matrices.items()},
        )

    data = TrainingData(
        atoms_AD=atoms.vectors,
        atom_ids=atoms.ids,
        timelines=read_timelines(connection, atoms, users.dictionary, channels),
        item_atom_I=atoms.rows(items["atom_id"]),
        item_ids=tuple(items["item_id"].to_pylist()),
        splits={name: part(name) for name in SPLITS},
        context=context,
        numeric=numeric,
        vectors=vectors,
    )
    data.check()
    return data


def _items_shown(
    connection: duckdb.DuckDBPyConnection, frame: pa.Table, freshness: str
) -> tuple[pa.Table, Int64]:
    """Every text of every item (item_id, atom_id), and of which of them each impression is [N].

    Raises BadInput when an item is unknown.
    """
    shown = frame.select(["item_id", "event_timestamp"])
    shown = shown.append_column("number", pa.array(np.arange(len(shown), dtype=np.int64)))
    connection.register("shown_items", shown)
    items = connection.execute(
        "SELECT DISTINCT item_id, atom_id FROM items ORDER BY item_id, atom_id"
    ).to_arrow_table()
    connection.register("item_texts", items.append_column("row", pa.array(np.arange(len(items)))))
    rows = connection.execute(
        f"""SELECT row FROM ({item_texts_shown("shown_items", "number", freshness)})
            LEFT JOIN item_texts USING (item_id, atom_id) ORDER BY number"""
    ).to_arrow_table()["row"]
    for name in ("shown_items", "item_texts"):
        connection.unregister(name)
    if rows.null_count:
        unknown = frame["item_id"].filter(pc.is_null(rows))[0].as_py()
        raise BadInput(
            f"{rows.null_count} impressions of the frame show items that the log does not have"
            f" (item {unknown} among them); ingest the items, then run `bahe frame` again."
        )
    return items, rows.to_numpy().astype(np.int64)


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Values [N], NaN where unknown."""
    numbers: npt.NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers


def context_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the categories that a model of this frame reads: the impressions' context, then features.

    `facts` are the frame's.
    """
    return (*facts.get("context", ()), *map(column_of, facts.get("categorical", ())))


def _hashed(frame: pa.Table, context: str, column: str) -> Int64:
    """Hashes [N] of a column as a category of this name; each distinct value is hashed once."""
    encoded = frame[column].combine_chunks().dictionary_encode()
    values = np.append(hash_values(context, encoded.dictionary.to_pylist()), MISSING)
    rows: Int64 = values[encoded.indices.fill_null(len(values) - 1).to_numpy()]
    return rows
