"""What a retrieval needs from each feature view, checked against its source's columns in the lake."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import duckdb
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.infra.offline_stores import offline_utils

from bahe_core.errors import BadInput, one_line
from bahe_lake.catalogue import columns, tables
from bahe_lake.connection import LAKE
from bahe_lake.sql import sql_identifier

if TYPE_CHECKING:
    from feast.data_source import DataSource
    from feast.infra.registry.base_registry import BaseRegistry

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
_INTEGERS |= {f"U{kind}" for kind in _INTEGERS}


@dataclass(frozen=True, kw_only=True)
class View:
    """A feature view's part of a retrieval. Names are those of the source unless said otherwise."""

    name: str
    """As in feature references."""
    relation: str
    """What stands after FROM."""
    table: str | None
    """The lake's table, when the source is one; its rows then have numbers."""
    keys: dict[str, str]
    """Column of the source for each join key of the entity frame."""
    features: dict[str, str]
    """Column of the source for each feature, by the feature's name."""
    time: str
    created: str | None
    ttl: timedelta
    """Zero when values live for ever."""
    types: dict[str, str]
    """DuckDB's types of the source's columns."""

    @property
    def tie(self) -> str:
        """An integer that orders rows of one key and instant, the same way each time.

        A table's rows by when they were written, a query's by their values.
        """
        if self.table is not None:
            return "rowid"
        values = ", ".join(sql_identifier(column) for column in self.features.values())
        return f"(hash({values}) >> 1)::BIGINT"

    @property
    def wide(self) -> bool:
        """Whether a row carries lists or other large values, which are expensive to sort."""
        kinds = (self.types[column] for column in self.features.values())
        return any(k.endswith("]") or k.startswith(("STRUCT", "MAP", "BLOB", "JSON")) for k in kinds)


def requested_views(
    connection: duckdb.DuckDBPyConnection,
    relation: Callable[[DataSource], str],
    feature_views: list[FeatureView],
    feature_refs: list[str],
    registry: BaseRegistry,
    project: str,
) -> list[View]:
    """The views of these feature references. Raises BadInput when a source has no such column."""
    now = datetime.now(UTC)  # Feast wants bounds; they are taken from the entity frame later
    contexts = offline_utils.get_feature_view_query_context(
        feature_refs, feature_views, registry, project, (now, now)
    )
    by_name = {view.projection.name_to_use(): view for view in feature_views}
    lake_tables = tables(connection)
    return [
        _view(connection, relation, lake_tables, by_name[context.name], context) for context in contexts
    ]


def _view(
    connection: duckdb.DuckDBPyConnection,
    relation: Callable[[DataSource], str],
    lake_tables: set[str],
    view: FeatureView,
    context: Any,
) -> View:
    source = view.batch_source
    shown = source.field_mapping
    features = {shown.get(column, column): column for column in context.features}
    keys = {
        key: selection.removesuffix(f" AS {key}")
        for key, selection in zip(context.entities, context.entity_selections, strict=True)
        if key != DUMMY_ENTITY_ID
    }
    read_from = relation(source)
    created = context.created_timestamp_column or None
    needed = [*keys.values(), *features.values(), context.timestamp_field, *([created] if created else [])]
    types = source_columns(connection, source.name, read_from, needed)
    table = getattr(source, "table", None)
    return View(
        name=context.name,
        relation=read_from,
        table=table if table in lake_tables else None,
        keys=keys,
        features=features,
        time=context.timestamp_field,
        created=created,
        ttl=view.ttl or timedelta(0),
        types=types,
    )


def source_columns(
    connection: duckdb.DuckDBPyConnection, source_name: str, relation: str, needed: Iterable[str] = ()
) -> dict[str, str]:
    """Columns of a data source with DuckDB's types. Raises BadInput when it or a needed one is missing."""
    try:
        types = columns(connection, relation)
    except duckdb.Error as error:
        raise BadInput(
            f"data source {source_name}: {relation.removeprefix(f'{LAKE}.main.')} cannot be read"
            f" ({one_line(error)}); run the job that writes it first."
        ) from None
    for column in needed:
        if column not in types:
            raise BadInput(
                f"data source {source_name} has no column {column} in the lake (any more); it has"
                f" {', '.join(types)}. Run the job that writes it, or change the view and apply it."
            )
    return types


def check_key_types(view: View, entity_columns: dict[str, str]) -> None:
    """Integers must meet integers and text text. Raises BadInput: DuckDB would convert one to the other,
    and lose the last digits of large ids, or fail in the middle."""
    for key, column in view.keys.items():
        mine, theirs = entity_columns[key], view.types[column]
        if _family(mine) != _family(theirs):
            raise BadInput(
                f"entity frame: {key} is {mine}, but feature view {view.name} has {theirs}; convert it."
            )


def _family(kind: str) -> str:
    if kind in _INTEGERS:
        return "integer"
    if kind == "VARCHAR" or kind.startswith("ENUM"):
        return "text"
    return kind
