"""Features that change after the fact: what a frame says of an impression, the frame before said otherwise.

A feature that is point-in-time has one value for an impression, whenever it is asked for, but for what
arrived late. One that is written over, or stamped with a time before it was known, tells training what
serving could not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from bahe_lake.sql import sql_identifier, sql_literal

SHARE = 0.05
"""Of the same impressions; what is late of the log changes fewer."""
TOLERANCE = 0.01
"""Of the larger of two numbers, within which they are the same."""
LEAST = 100
"""Impressions that two frames must share for this to say anything."""


def rewritten(
    connection: duckdb.DuckDBPyConnection, before: Path, after: Path, features: Sequence[str]
) -> dict[str, float]:
    """Columns among `features` that differ in more than SHARE of the impressions of both frames, and in
    how large a share."""
    then, now = pq.read_schema(before), pq.read_schema(after)
    columns = [
        name
        for name in dict.fromkeys(features)
        if name in then.names and name in now.names and then.field(name).type == now.field(name).type
    ]
    if not columns:
        return {}

    def differs(name: str) -> str:
        a, b = f"a.{sql_identifier(name)}", f"b.{sql_identifier(name)}"
        if pa.types.is_floating(now.field(name).type):
            # Rates are smoothed by the whole log's, which one late event moves a little for everyone.
            apart = f"abs({a} - {b}) > {TOLERANCE} * greatest(abs({a}), abs({b}))"
            return f"avg(coalesce({apart}, ({a} IS NULL) <> ({b} IS NULL))::INTEGER)"
        return f"avg(({a} IS DISTINCT FROM {b})::INTEGER)"

    differ = ", ".join(map(differs, columns))
    row = connection.execute(
        f"""
        SELECT count(*), {differ}
        FROM read_parquet({sql_literal(str(after))}) a
        JOIN read_parquet({sql_literal(str(before))}) b USING (impression_id, event_timestamp)
        """
    ).fetchone()
    assert row is not None
    shared, *shares = row
    if shared < LEAST:
        return {}
    return {name: round(share, 4) for name, share in zip(columns, shares, strict=True) if share > SHARE}
