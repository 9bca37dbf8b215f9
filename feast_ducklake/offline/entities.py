"""The entity frame, in whichever form it is given: checked, and as one SQL relation."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from bahe_core.errors import BadInput, one_line
from bahe_lake.catalogue import columns
from bahe_lake.sql import sql_identifier, sql_literal
from feast_ducklake.conversion import arrow_table

EVENT_TIMESTAMP = "event_timestamp"
GIVEN = "__given_entities"
"""The name under which an entity frame that lies in memory is registered."""

EntityFrameLike: TypeAlias = pd.DataFrame | pa.Table | Path | str
"""A pandas frame, an Arrow table, the path of a Parquet file, or an SQL query over the lake."""

Dtype: TypeAlias = np.dtype[Any] | pd.api.extensions.ExtensionDtype

_QUERY = re.compile(r"\s*(select|with|from|values|table|\()", re.IGNORECASE)
_UTC_NAMES = {"UTC", "Etc/UTC", "+00:00", "Z"}


@dataclass(frozen=True, kw_only=True)
class EntityFrame:
    """Rows to find features for."""

    relation: str
    """A SELECT of all columns, the timestamps in UTC, and of the row's number as `row_number`."""
    given: pa.Table | None
    """What has to be registered as GIVEN for the relation to be there."""
    dtypes: dict[str, Dtype]
    """Of the columns of a pandas frame, the timestamp left out, since that becomes UTC."""
    columns: dict[str, str]
    """Names of its columns in their order, with DuckDB's types."""
    timestamp: str
    """The column with the moment of each row."""
    row_number: str
    rows: int
    earliest: datetime
    latest: datetime
    """Bounds of its moments; both now when it has no rows."""

    @property
    def other_columns(self) -> list[str]:
        """All columns but the timestamp: keys and whatever else is carried along."""
        return [column for column in self.columns if column != self.timestamp]


def read_entities(
    connection: duckdb.DuckDBPyConnection, given: EntityFrameLike, keys: dict[str, str]
) -> EntityFrame:
    """Check an entity frame that must have these join keys (each with a view that is looked up by it).

    The moment of a row is in the column `event_timestamp`, else in the only column that holds timestamps,
    as Feast infers it. Times without a zone are taken as UTC, others are converted; Python shows the
    warning of either once. Raises BadInput when the frame cannot be read, or a key or a timestamp is
    missing; a row without a key could have no features, and mostly means a join that went wrong.
    """
    source, table = _source(given)
    if table is not None:
        connection.register(GIVEN, table)
    try:
        types = columns(connection, source)
    except duckdb.Error as error:
        raise BadInput(f"entity frame: {given} cannot be read ({one_line(error)}).") from None
    names = list(types) if table is None else table.column_names  # DuckDB renames what is there twice
    folded = [column.lower() for column in names]
    for column in names:
        if folded.count(column.lower()) > 1:
            raise BadInput(
                f"entity frame: column {column} is there twice (capitals do not count); rename one."
            )
    timestamp = _timestamp_column(types)
    _warn_of_zone(timestamp, types[timestamp], table)
    for key, view in keys.items():
        if key not in types:
            raise BadInput(
                f"entity frame has no column {key}, a join key of {view}; it has {', '.join(types)}."
            )
    time = f"{sql_identifier(timestamp)}::TIMESTAMPTZ"
    needed = [timestamp, *keys]
    counts = ", ".join(f"count({sql_identifier(column)})" for column in needed)
    row = connection.execute(f"""
        SELECT min({time}), max({time}), count(*), {counts}
        FROM {source}
    """).fetchone()
    assert row is not None
    earliest, latest, rows, *present = row
    for column, count in zip(needed, present, strict=True):
        if count < rows:
            raise BadInput(f"entity frame: {rows - count} rows have no {column}; fill or drop them.")
    number = "entity_row"
    while number in folded:
        number += "_"
    now = datetime.now(UTC)
    return EntityFrame(
        relation=(
            f"SELECT * REPLACE ({time} AS {sql_identifier(timestamp)}), row_number() OVER () AS {number}"
            f" FROM {source}"
        ),
        given=table,
        dtypes=_dtypes(given, timestamp),
        columns=types,
        timestamp=timestamp,
        row_number=number,
        rows=rows,
        earliest=earliest or now,
        latest=latest or now,
    )


def _source(given: EntityFrameLike) -> tuple[str, pa.Table | None]:
    """What stands after FROM, and the table that it reads when the frame lies in memory."""
    if isinstance(given, pd.DataFrame):
        return GIVEN, arrow_table(given, "entity frame")
    if isinstance(given, pa.Table):
        return GIVEN, given
    if isinstance(given, str) and _QUERY.match(given):
        return f"({given.rstrip().rstrip(';')})", None
    if isinstance(given, str | Path) and str(given).endswith(".parquet"):
        return f"read_parquet({sql_literal(str(Path(given).expanduser()))})", None
    shown = given if isinstance(given, str | Path) else f"a {type(given).__name__}"
    raise BadInput(
        f"entity frame: {shown} is neither a pandas frame, an Arrow table, a path that ends in .parquet nor"
        " an SQL query."
    )


def _timestamp_column(types: dict[str, str]) -> str:
    timestamps = [column for column, kind in types.items() if kind.startswith("TIMESTAMP")]
    if EVENT_TIMESTAMP in types:
        if EVENT_TIMESTAMP not in timestamps:
            raise BadInput(
                f"entity frame: {EVENT_TIMESTAMP} is {types[EVENT_TIMESTAMP]}, not a timestamp; convert it."
            )
        return EVENT_TIMESTAMP
    if len(timestamps) == 1:
        return timestamps[0]
    which = f"several ({', '.join(timestamps)})" if timestamps else "none"
    raise BadInput(
        f"entity frame has no column {EVENT_TIMESTAMP}; of its columns {', '.join(types)}, exactly one"
        f" would have to be a timestamp, and {which} is."
    )


def _warn_of_zone(column: str, kind: str, table: pa.Table | None) -> None:
    message = None
    if not kind.endswith("WITH TIME ZONE"):
        message = f"entity frame: {column} has no time zone and is taken as UTC."
    elif table is not None:
        zone = table.schema.field(column).type.tz
        if zone not in _UTC_NAMES:
            message = f"entity frame: {column} is in {zone} and is converted to UTC."
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=2)


def _dtypes(given: EntityFrameLike, timestamp: str) -> dict[str, Dtype]:
    if not isinstance(given, pd.DataFrame):
        return {}
    return {str(column): dtype for column, dtype in given.dtypes.items() if column != timestamp}
