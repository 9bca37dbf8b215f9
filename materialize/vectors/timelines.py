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
from materialize.vectors.stored_atoms import NOT_ENCODED, Atoms, vectors_of


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
    table = connection.execute(
        """
        SELECT list_position(?, channel) AS c, atom_id, epoch_us(event_timestamp) AS time_us
        FROM user_timeline
        WHERE user_id = ? AND c IS NOT NULL
        ORDER BY c, position
        """,
        [list(channels), user_id],
    ).to_arrow_table()
    # Beside each behavior DuckDB would sort the vectors too, which takes five times as long.
    distinct, place_L = np.unique(table["atom_id"].to_numpy(), return_inverse=True)
    stored = vectors_of(connection, version, distinct.tolist()) if len(distinct) else {}
    if len(stored) < len(distinct):
        raise NotReady(NOT_ENCODED)
    known_AD = (
        np.stack([stored[atom] for atom in distinct.tolist()]) if stored else np.empty((0, 0), np.float32)
    )
    ends = np.searchsorted(table["c"].to_numpy(), np.arange(1, len(channels)), side="right")
    vectors, times, ids = (
        np.split(column, ends)
        for column in (known_AD[place_L], table["time_us"].to_numpy(), table["atom_id"].to_numpy())
    )
    return vectors, times, ids
