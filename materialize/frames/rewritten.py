"""Features that change after the fact: what a frame says of an impression, the frame before said otherwise.

A feature that is point-in-time has one value for an impression, whenever it is asked for, but for what
arrived late. One that is written over, or stamped with a time before it was known, tells training what
serving could not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from bahe_lake.sql import sql_identifier, sql_literal

SHARE = 0.05
"""Of the same impressions; what is late of the log changes fewer."""
LEAST = 100
"""Impressions that two frames must share for this to say anything."""


def rewritten(
    connection: duckdb.DuckDBPyConnection, before: Path, after: Path, features: Sequence[str]
) -> dict[str, float]:
    """Columns among `features` that differ in more than SHARE of the impressions of both frames, and in
    how large a share."""
    both = set(pq.read_schema(before).names) & set(pq.read_schema(after).names)
    columns = [name for name in dict.fromkeys(features) if name in both]
    if not columns:
        return {}
    names = list(map(sql_identifier, columns))
    differ = ", ".join(f"avg((a.{name} IS DISTINCT FROM b.{name})::INTEGER)" for name in names)
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
