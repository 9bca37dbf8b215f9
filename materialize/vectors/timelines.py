"""Timelines, read from the lake by reference to stored atoms."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bahe_core.errors import NotReady
from bahe_lake.sql import sql_literal
from bahe_models import Int64, Timelines
from materialize.vectors.stored_atoms import NOT_ENCODED, Atoms
from materialize.vectors.vector_columns import vector_matrix


def read_timelines(
    connection: duckdb.DuckDBPyConnection, atoms: Atoms, users: pa.Array, channels: list[str]
) -> Timelines:
    """Timelines of these users, in their order; a user without behaviors has empty ones."""
    connection.register("users_in_order", pa.table({"user_id": users, "u": np.arange(len(users))}))
    # With bounds on user_id DuckDB skips files by their statistics.
    ends = list(pc.min_max(users).as_py().values())
    offsets, rows, times = [], [], []
    for channel in channels:
        table = connection.execute(
            f"""
            SELECT o.u, t.atom_id, epoch_us(t.event_timestamp) AS time_us
            FROM user_timeline t JOIN users_in_order o USING (user_id)
            WHERE t.channel = {sql_literal(channel)} AND t.user_id BETWEEN ? AND ?
            ORDER BY o.u, t.position
            """,
            ends,
        ).to_arrow_table()
        counts = np.bincount(table["u"].to_numpy(), minlength=len(users))
        offsets.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        rows.append(atoms.rows(table["atom_id"]))
        times.append(table["time_us"].to_numpy())
    connection.unregister("users_in_order")
    return Timelines(tuple(channels), tuple(offsets), tuple(rows), tuple(times))


def read_user(
    connection: duckdb.DuckDBPyConnection, version: str, user_id: str | int, channels: Sequence[str]
) -> tuple[list[np.ndarray], list[Int64], list[Int64]]:
    """One user's timelines: per channel the atoms' vectors [L, width], times in microseconds and ids [L].

    A user without behaviors has empty ones. Raises NotReady when an atom has no vector.
    """
    vectors, times, ids = [], [], []
    for channel in channels:
        table = connection.execute(
            """
            SELECT t.atom_id, a.embedding, epoch_us(t.event_timestamp) AS time_us
            FROM user_timeline t
            LEFT JOIN atomic_behavior_embedding a ON a.atom_id = t.atom_id AND a.encoder_version = ?
            WHERE t.user_id = ? AND t.channel = ?
            ORDER BY t.position
            """,
            [version, user_id, channel],
        ).to_arrow_table()
        if table["embedding"].null_count:
            raise NotReady(NOT_ENCODED)
        vectors.append(
            vector_matrix(table["embedding"]) if table.num_rows else np.empty((0, 0), dtype=np.float32)
        )
        times.append(table["time_us"].to_numpy())
        ids.append(table["atom_id"].to_numpy())
    return vectors, times, ids
