"""How far vectors lag behind the log: questions to the lake that jobs and `bahe status` ask."""

from __future__ import annotations

import duckdb

from bahe_lake import runs
from bahe_lake.catalogue import scalar, tables
from bahe_lake.sql import sql_literal


def atoms_without_vectors(connection: duckdb.DuckDBPyConnection, encoder_version: str) -> int:
    """How many atoms the encoder has not read yet."""
    return scalar(
        connection,
        f"""
        SELECT count(*)
        FROM atoms
        ANTI JOIN (
            SELECT atom_id
            FROM atomic_behavior_embedding
            WHERE encoder_version = {sql_literal(encoder_version)}
        ) USING (atom_id)
        """,
    )


def users_behind(connection: duckdb.DuckDBPyConnection, model_version: str) -> int:
    """How many users' vectors know fewer behaviors than the log has, or do not exist."""
    others = [table for table in ("impressions", "users") if table in tables(connection)]
    without_behaviors = "".join(f"UNION ALL SELECT user_id, 0 FROM {table} " for table in others)
    return scalar(
        connection,
        f"""
        SELECT count(*)
        FROM (
            SELECT user_id, sum(behaviors)::BIGINT AS behaviors
            FROM (
                SELECT user_id, count(*) AS behaviors FROM behaviors GROUP BY user_id
                {without_behaviors}
            )
            GROUP BY user_id
        )
        ANTI JOIN (
            SELECT user_id, behaviors FROM user_embedding WHERE model_version = {sql_literal(model_version)}
        ) USING (user_id, behaviors)
        """,
    )


def items_behind(connection: duckdb.DuckDBPyConnection, model_version: str) -> int:
    """How many items have no vector."""
    return scalar(
        connection,
        f"""
        SELECT count(DISTINCT item_id)
        FROM items
        ANTI JOIN (
            SELECT item_id FROM item_embedding WHERE model_version = {sql_literal(model_version)}
        ) USING (item_id)
        """,
    )


def publish_fingerprint(embedded: runs.Run, ingested: runs.Run) -> str:
    """What a publish of these two runs is called, so that the same again is known to be done."""
    return f"{embedded.facts['model_version']} {embedded.finished.isoformat()} {ingested.fingerprint}"
