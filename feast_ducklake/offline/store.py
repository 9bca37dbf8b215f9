"""Feast's offline store interface over DuckLake."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import compute_non_entity_date_range
from pydantic import Field, model_validator

from bahe_core.errors import BadInput
from bahe_core.lake_location import LakeConfig
from bahe_lake.catalogue import snapshot
from bahe_lake.sql import sql_identifier, sql_literal
from feast_ducklake.offline.entities import EVENT_TIMESTAMP, EntityFrame, EntityFrameLike, read_entities
from feast_ducklake.offline.lakes import open_lake, open_lake_to_write
from feast_ducklake.offline.point_in_time import point_in_time_query
from feast_ducklake.offline.pull import pull
from feast_ducklake.offline.retrieval import DuckLakeRetrievalJob
from feast_ducklake.offline.source import (
    DuckLakeLoggingDestination,
    DuckLakeSource,
    readable,
    relation_of,
)
from feast_ducklake.offline.views import View, check_key_types, requested_views, source_columns
from feast_ducklake.offline.writes import append, append_logs


class DuckLakeOfflineStoreConfig(FeastConfigBaseModel):
    """The `offline_store` section of feature_store.yaml: `catalogue` and `data`, or a bahe `home`.

    Relative paths are relative to feature_store.yaml.
    """

    type: Literal[
        "feast_ducklake.DuckLakeOfflineStore",
        "materialize.feast_offline.DuckLakeOfflineStore",  # as version 0.1 wrote it
    ] = "feast_ducklake.DuckLakeOfflineStore"
    catalogue: str | None = None
    """The lake's catalogue: an SQLite file, or `postgresql://user@host:port/database` (the password comes
    from PGPASSWORD or ~/.pgpass)."""
    postgres_schema: str = Field(default="bahe", alias="schema")
    """The schema of a catalogue in PostgreSQL; one for each lake."""
    data: str | None = None
    """The lake's Parquet files: a folder, or `s3://bucket/prefix`."""
    home: str | None = None
    """The home folder of a bahe dataset, which knows where its lake lies."""
    join: Literal["strict", "inclusive"] = "strict"
    """`strict`: a training row sees only values from before its timestamp, which is what makes a log
    of events safe from leakage; `inclusive`: also values at that very instant, as stock Feast does."""
    as_of: int | None = None
    """A snapshot of the lake (`job.snapshot`, or what `bahe frame` prints): everything is read as it was
    then, so an old frame comes back bit for bit. Of an open store: `store.config.offline_store.as_of`."""
    changed_since: int | None = None
    """A snapshot of the lake: only keys that got rows after it are materialized, as far as the lake can
    tell. For a store that is known to hold everything older: `bahe publish` sets it."""

    @model_validator(mode="after")
    def _names_one_lake(self) -> DuckLakeOfflineStoreConfig:
        if (self.home is None) == (self.catalogue is None) or (self.data is None) != (
            self.catalogue is None
        ):
            raise ValueError("offline_store: give `catalogue` and `data`, or the `home` of a bahe dataset")
        if self.catalogue is not None and "://" in self.catalogue:
            LakeConfig(catalogue=self.catalogue, schema=self.postgres_schema, data=self.data)
        return self


class DuckLakeOfflineStore(OfflineStore):
    """Historical features, and the latest values for materialization, from DuckLake."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> DuckLakeRetrievalJob:
        """The newest row of each key with an event time in [start_date, end_date].

        Of rows of one instant the one computed last counts, and of those the one written last.
        """
        return pull(
            config,
            data_source,
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
            latest_of=join_key_columns,
        )

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> DuckLakeRetrievalJob:
        """Every row with an event time in [start_date, end_date]."""
        return pull(
            config,
            data_source,
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
        )

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: EntityFrameLike | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        *,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> DuckLakeRetrievalJob:
        """Point-in-time features of every row of the entity frame, in its order, its columns kept.

        Without an entity frame: of every key and instant in [start_date, end_date] at which one of the
        views got a value, that value included. `filter_by_created_timestamp` leaves out values that were
        computed after a row's moment, and those of which it is not known. Raises BadInput.
        """
        feature_views = [readable(view, config) for view in feature_views]
        with open_lake(config) as connection:
            connection.execute("BEGIN")  # checks and number are of one snapshot
            number = snapshot(connection)
            relation = partial(relation_of, config=config)
            views = requested_views(connection, relation, feature_views, feature_refs, registry, project)
            given: EntityFrameLike
            if entity_df is None:
                given = _instants(
                    views, *compute_non_entity_date_range(feature_views, start_date, end_date)
                )
            else:
                given = entity_df
            frame = read_entities(
                connection, given, {key: view.name for view in views for key in view.keys}
            )
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        _check_names(frame, views, full_feature_names)
        if frame.rows:  # an empty pandas column has no type of its own
            for view in views:
                check_key_types(view, frame.columns)
        query = partial(
            point_in_time_query,
            frame,
            views,
            strict=config.offline_store.join == "strict" and entity_df is not None,
            known_by_then=filter_by_created_timestamp,
            full_feature_names=full_feature_names,
        )
        return DuckLakeRetrievalJob(
            config=config,
            query=query(),
            shard_query=query,
            snapshot=number,
            entities=frame.given,
            dtypes=frame.dtypes,
            full_feature_names=full_feature_names,
            on_demand_feature_views=on_demand,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=frame.other_columns,
                min_event_timestamp=frame.earliest,
                max_event_timestamp=frame.latest,
            ),
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append rows to the table of the view's batch source (`push`, `write_to_offline_store`).

        Raises BadInput when the source is no table, or the rows do not fit it.
        """
        source = feature_view.batch_source
        if not isinstance(source, DuckLakeSource) or source.table is None:
            raise BadInput(
                f"feature view {feature_view.name}: its source {source.name} is no table of the lake, so"
                " rows cannot be added to it."
            )
        in_source = {mapped: column for column, mapped in source.field_mapping.items()}
        table = table.select([c for c in table.column_names if not c.startswith("__index_level_")])
        table = table.rename_columns([in_source.get(column, column) for column in table.column_names])
        with open_lake_to_write(config) as connection:
            source_columns(connection, source.name, source.get_table_query_string())
            append(connection, source.table, table)
        if progress is not None:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Append logs of served features to the table of their DuckLakeLoggingDestination."""
        destination = logging_config.destination
        if not isinstance(destination, DuckLakeLoggingDestination):
            raise BadInput(
                f"logs cannot go to a {type(destination).__name__}; use DuckLakeLoggingDestination."
            )
        with open_lake_to_write(config) as connection:
            append_logs(connection, destination.table, data, source.get_schema(registry))


def _instants(views: list[View], start: datetime, end: datetime) -> str:
    """Every key with every instant of the range at which one of the views got a value. Raises BadInput."""
    first, *others = views
    for other in others:
        if other.keys.keys() != first.keys.keys():
            raise BadInput(
                f"without an entity frame, all views must have the same join keys: {first.name} has"
                f" {', '.join(first.keys)}, {other.name} has {', '.join(other.keys)}."
            )
    keys_and_times = " UNION ALL ".join(_keys_and_times(view, first.keys, start, end) for view in views)
    order = ", ".join([EVENT_TIMESTAMP, *map(sql_identifier, first.keys)])
    return f"SELECT DISTINCT * FROM ({keys_and_times}) ORDER BY {order}"


def _keys_and_times(view: View, keys: Iterable[str], start: datetime, end: datetime) -> str:
    named_keys = [f"{sql_identifier(view.keys[key])} AS {sql_identifier(key)}" for key in keys]
    time = f"{sql_identifier(view.time)}::TIMESTAMPTZ"
    return f"""
        SELECT {", ".join([*named_keys, f"{time} AS {EVENT_TIMESTAMP}"])}
        FROM {view.relation}
        WHERE {time} BETWEEN {sql_literal(start)} AND {sql_literal(end)}
    """


def _check_names(frame: EntityFrame, views: list[View], full_feature_names: bool) -> None:
    """Raises BadInput when a column of the entity frame has the name of a feature that is asked for."""
    for view in views:
        for feature in view.features:
            shown = f"{view.name}__{feature}" if full_feature_names else feature
            if shown in frame.columns:
                raise BadInput(
                    f"entity frame: column {shown} has the name of a feature of {view.name}; rename it, or"
                    " ask for full_feature_names."
                )
