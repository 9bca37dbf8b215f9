"""Which users' and items' vectors of a model_version are missing, stale, or of nobody any more.

Three temporary tables carry the answer: `candidates` (whom to ask about), `everyone` (what the log says of
them now), and the rows that are returned.
"""

from __future__ import annotations

import duckdb
import pyarrow as pa

from bahe_lake.catalogue import scalar
from bahe_lake.connection import LAKE
from bahe_lake.sql import sql_literal
from bahe_lake.versions import LATEST_ITEMS


def changed_users_into_candidates(
    connection: duckdb.DuckDBPyConnection, sources: list[str], since: int | None, now: int
) -> bool:
    """Fill `candidates` with the users whom the change feed names after a snapshot.

    False when the feed does not reach back that far, or one of the `sources` was created anew since.
    """
    if since is None or since > now:
        return False
    source_names = ", ".join(sql_literal(f"main.{table}") for table in sources)
    row = connection.execute(
        f"""
        SELECT
            count(*) = $now - $since
            AND NOT coalesce(
                bool_or(list_has_any(coalesce(changes['tables_created'], []), [{source_names}])), false
            )
        FROM {LAKE}.snapshots()
        WHERE snapshot_id > $since AND snapshot_id <= $now
        """,
        {"since": since, "now": now},
    ).fetchone()
    assert row is not None
    if not row[0]:
        return False
    if since == now:
        changes = f"SELECT user_id FROM {sources[0]} LIMIT 0"
    else:
        changes = " UNION ALL ".join(
            f"SELECT user_id FROM {LAKE}.table_changes({sql_literal(table)}, {since + 1}, {now})"
            for table in sources
        )
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE candidates AS
        SELECT DISTINCT user_id FROM ({changes})
        """
    )
    return True


def all_users_into_candidates(
    connection: duckdb.DuckDBPyConnection, sources: list[str], version: str
) -> None:
    """Fill `candidates` with everyone who is in the log or has a vector."""
    in_the_log = " UNION ALL ".join(f"SELECT user_id FROM {table}" for table in sources)
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE candidates AS
        SELECT DISTINCT user_id FROM (
            {in_the_log}
            UNION ALL
            SELECT user_id FROM user_embedding WHERE model_version = {sql_literal(version)}
        )
        """
    )


def users_to_embed(connection: duckdb.DuckDBPyConnection, sources: list[str], version: str) -> pa.Table:
    """The candidates without a vector of their present timeline.

    Columns: user_id, event_timestamp, behaviors and timeline_hash. The timestamp is that of the last
    behavior or, for a user without any, of when the log first names them. It is never earlier than that of
    the vector it replaces, because an online store keeps the later one.
    """
    without_behaviors = "".join(
        f"""
            UNION ALL BY NAME
            SELECT user_id, min(event_timestamp) AS first_named
            FROM {table} SEMI JOIN candidates USING (user_id)
            GROUP BY user_id
            """
        for table in sources[1:]
    )
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE everyone AS
        SELECT
            user_id,
            coalesce(max(last_behavior), min(first_named)) AS event_timestamp,
            coalesce(max(behaviors), 0)::BIGINT AS behaviors,
            coalesce(bit_xor(mixed), 0) AS timeline_hash
        FROM (
            SELECT
                user_id,
                max(event_timestamp) AS last_behavior,
                count(*) AS behaviors,
                bit_xor(hash(channel, atom_id, event_timestamp, item_id::VARCHAR)) AS mixed
            FROM behaviors SEMI JOIN candidates USING (user_id)
            GROUP BY user_id
            UNION ALL BY NAME
            SELECT user_id, bit_xor(hash('clicked', item_id::VARCHAR)) AS mixed
            FROM (
                -- They are among the items seen, which lie beside the vector.
                SELECT DISTINCT user_id, item_id
                FROM impressions SEMI JOIN candidates USING (user_id)
                WHERE clicked = 1
            )
            GROUP BY user_id
            {without_behaviors}
        )
        GROUP BY user_id
        """
    )
    return connection.execute(
        """
        SELECT
            e.user_id,
            greatest(e.event_timestamp, s.event_timestamp) AS event_timestamp,
            e.behaviors,
            e.timeline_hash
        FROM everyone e
        LEFT JOIN (
            SELECT user_id, event_timestamp, behaviors, timeline_hash
            FROM user_embedding WHERE model_version = ?
        ) s USING (user_id)
        WHERE (e.behaviors, e.timeline_hash) IS DISTINCT FROM (s.behaviors, s.timeline_hash)
        ORDER BY e.user_id
        """,
        [version],
    ).to_arrow_table()


def items_to_embed(connection: duckdb.DuckDBPyConnection, version: str) -> pa.Table:
    """item_id, event_timestamp and atom_id of the items without a vector of their present text."""
    return connection.execute(
        f"""
        SELECT
            i.item_id,
            greatest(i.event_timestamp, s.event_timestamp) AS event_timestamp,
            i.atom_id
        FROM {LATEST_ITEMS} i
        LEFT JOIN (
            SELECT item_id, event_timestamp, atom_id FROM item_embedding WHERE model_version = ?
        ) s USING (item_id)
        WHERE i.atom_id IS DISTINCT FROM s.atom_id
        ORDER BY i.item_id
        """,
        [version],
    ).to_arrow_table()


def deletions(connection: duckdb.DuckDBPyConnection, version: str) -> list[str]:
    """Statements that delete the vectors of users and items no longer in the log."""
    of_version = f"model_version = {sql_literal(version)}"
    orphans = [
        f"""
        FROM user_embedding
        WHERE {of_version} AND user_id IN (
            SELECT user_id FROM candidates ANTI JOIN everyone USING (user_id)
        )
        """,
        f"""
        FROM item_embedding
        WHERE {of_version} AND item_id NOT IN (SELECT item_id FROM items)
        """,
    ]
    return [f"DELETE {rows}" for rows in orphans if scalar(connection, f"SELECT count(*) {rows}")]
