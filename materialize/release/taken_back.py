"""Statistics online of a moment at which, as the log turns out, nothing happened.

A click that is told with its time counts from then, no longer from when it was presumed known: the row
of that moment leaves the lake. So do counts by category where a version of an item comes late, with another
category. Online such rows would stay, since the guard of the online store keeps the later of two, and with
them counts that lack whatever else came late.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from bahe_lake.catalogue import scalar, tables, written_since
from bahe_lake.sql import sql_identifier, sql_literal
from feature_repo.behavior_counts import with_items_of_a_column
from feature_repo.by_item_columns import column_and_span, is_by_item_column
from materialize.ingest.statistics import WINDOW_DAYS

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

VIEWS = {
    f"{entity}_stats{window}": f"{entity}_id"
    for entity in ("user", "item")
    for window in ("", *(f"_{days}d" for days in WINDOW_DAYS))
}
"""Views whose rows may leave the lake, each of the table of its name, and their keys."""


def forget(
    store: FeatureStore,
    connection: duckdb.DuckDBPyConnection,
    since: int,
    views: Sequence[str],
    end: datetime,
) -> int:
    """Take out of the online store what was the latest of a key at a snapshot and is no more; how many.

    The latest is up to `end`, to which the views are written next. A store without a guard keeps no row.
    """
    from feast_ducklake.online.store import GuardedOnlineStore
    from feast_ducklake.online.vectors import view_keys

    online = store.provider.online_store
    if not isinstance(online, GuardedOnlineStore):
        return 0
    count, there = 0, tables(connection)
    for view in map(store.get_feature_view, views):
        if view.name in VIEWS and view.name not in there:
            continue
        gone = _gone(view, connection, since, end)
        if gone is not None and len(gone):
            online.forget(store.config, view, view_keys(view, gone.to_pydict()))
            count += len(gone)
    return count


def _gone(
    view: FeatureView, connection: duckdb.DuckDBPyConnection, since: int, end: datetime
) -> pa.Table | None:
    """The keys of which the latest row has left a view; None where none can have."""
    if view.name in VIEWS:
        written = written_since(connection, view.name, since)
        keys = VIEWS[view.name]
        # Wherever a row was taken away, another of the key came or changed: the click is at another time.
        rows = f"{view.name} {{version}} SEMI JOIN (SELECT {keys} FROM {written}) USING ({keys})"
        then, now = rows.format(version=f"AT (VERSION => {since})"), rows.format(version="")
    elif is_by_item_column(view):
        written = written_since(connection, "items", since)
        if written is not None and not scalar(connection, f"SELECT count(*) FROM {written}"):
            return None
        column, span = column_and_span(view.name)
        keys = f"user_id, {sql_identifier(column)}"
        then, now = (f"({with_items_of_a_column(column, span, at)})" for at in (since, None))
    else:
        return None
    if written is None:  # the snapshot has expired
        return None

    def latest(rows: str) -> str:
        return f"""
            SELECT {keys}, max(event_timestamp) AS moment
            FROM {rows}
            WHERE event_timestamp <= {sql_literal(end)}
            GROUP BY {keys}"""

    try:
        return connection.execute(
            f"""
            SELECT {keys}
            FROM ({latest(then)}) t
            LEFT JOIN ({latest(now)}) n USING ({keys})
            WHERE n.moment IS NULL OR n.moment < t.moment
            """
        ).to_arrow_table()
    except (duckdb.BinderException, duckdb.CatalogException):
        return None  # the table or column came after that snapshot
