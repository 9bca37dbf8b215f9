"""Statistics online of a moment at which, as the log turns out, nothing happened.

A click that is told with its time counts from then, no longer from when it was presumed known: the row
of that moment leaves the lake. Online it would stay, since the guard of the online store keeps the later
of two rows, and with it counts that lack whatever else came late.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import duckdb

from bahe_lake.catalogue import tables, written_since
from bahe_lake.sql import sql_literal
from materialize.ingest.statistics import WINDOW_DAYS

if TYPE_CHECKING:
    from feast import FeatureStore

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
    count = 0
    for name in VIEWS.keys() & set(views) & tables(connection):
        written = written_since(connection, name, since)
        if written is None:  # the snapshot has expired
            continue
        key = VIEWS[name]
        # Wherever a row was taken away, another of the key came or changed: the click is at another time.
        latest = f"""
            SELECT {key}, max(event_timestamp) AS moment
            FROM {name} {{version}} SEMI JOIN (SELECT {key} FROM {written}) USING ({key})
            WHERE event_timestamp <= {sql_literal(end)}
            GROUP BY {key}"""
        then, now = latest.format(version=f"AT (VERSION => {since})"), latest.format(version="")
        try:
            gone = connection.execute(
                f"""
                SELECT {key}
                FROM ({then}) t
                LEFT JOIN ({now}) n USING ({key})
                WHERE n.moment IS NULL OR n.moment < t.moment
                """
            ).to_arrow_table()
        except duckdb.CatalogException:  # the table came after that snapshot
            continue
        if len(gone):
            view = store.get_feature_view(name)
            online.forget(store.config, view, view_keys(view, {key: gone[key].to_pylist()}))
            count += len(gone)
    return count
