"""The pointer: which model_version answers. Flipping it is all that a publish or a rollback shows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import duckdb

from bahe_core.errors import BaheError
from bahe_lake.catalogue import tables
from bahe_lake.sql import sql_literal
from bahe_lake.transactions import commit

if TYPE_CHECKING:
    from feast import FeatureStore

DEPLOYMENT = "default"
VIEW = "live_model"


@dataclass(frozen=True)
class Pointer:
    """One publication."""

    model_version: str
    second: int
    """When, in seconds since 1970: an online store that says otherwise is not the one published to."""


def recorded(connection: duckdb.DuckDBPyConnection) -> list[Pointer]:
    """Every publication and rollback that the lake knows of, the newest first."""
    if "publications" not in tables(connection):
        return []
    rows = connection.execute(
        f"""
        SELECT live_model_version, epoch_us(event_timestamp) // 1000000
        FROM publications
        WHERE deployment = {sql_literal(DEPLOYMENT)}
        ORDER BY event_timestamp DESC
        """
    ).fetchall()
    return [Pointer(version, second) for version, second in rows]


def live(connection: duckdb.DuckDBPyConnection) -> str | None:
    """The model_version that answers, as far as the lake knows."""
    publications = recorded(connection)
    return publications[0].model_version if publications else None


def online(store: FeatureStore) -> Pointer | None:
    """The pointer as the online store has it."""
    response = store.get_online_features([f"{VIEW}:live_model_version"], [{"deployment": DEPLOYMENT}])
    values = response.to_dict(include_event_timestamps=True)
    version = values["live_model_version"][0]
    return None if version is None else Pointer(str(version), int(values["live_model_version__ts"][0]))


def flip(
    store: FeatureStore, connection: duckdb.DuckDBPyConnection, version: str, statements: list[str]
) -> None:
    """Make a version live: first online, then in the lake, in one transaction with the statements.

    Raises BaheError when the online store names another version afterwards.
    """
    import pandas as pd

    earlier = connection.execute(
        "SELECT max(event_timestamp) FROM publications WHERE deployment = ?", [DEPLOYMENT]
    ).fetchone()
    now = datetime.now(UTC)
    if earlier is not None and earlier[0] is not None:
        # Stores refuse older values: a clock that was set back must not hold up a publish.
        now = max(now, earlier[0] + timedelta(seconds=1))
    row = {
        "deployment": [DEPLOYMENT],
        "live_model_version": [version],
        "event_timestamp": [now],
        "created_timestamp": [now],
    }
    store.write_to_online_store(VIEW, pd.DataFrame(row))
    answered = online(store)
    if answered is None or answered.model_version != version:
        named = answered.model_version if answered else "no model"
        raise BaheError(
            f"the online store names {named} as live after {version} was written; something else"
            " writes to it, so give this home a store of its own."
        )
    stamp = sql_literal(now)
    publication = f"""
        INSERT INTO publications (deployment, live_model_version, event_timestamp, created_timestamp)
        VALUES ({sql_literal(DEPLOYMENT)}, {sql_literal(version)}, {stamp}, {stamp})
        """
    commit(connection, [publication, *statements])
