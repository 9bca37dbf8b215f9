"""Feast offline store over DuckLake: point-in-time joins by ASOF JOIN, rows and order kept.

Feast finds both classes by their path in feature_store.yaml and in the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.offline_store import (
    OfflineStore,
    RetrievalJob,
    RetrievalMetadata,
)
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.protos.feast.core.DataSource_pb2 import DataSource as DataSourceProto
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import pa_to_feast_value_type
from feast.value_type import ValueType

from bahe_core.errors import BadInput
from bahe_core.home import Home
from materialize.lake import LAKE, connect, name, quoted

_CLASS = "materialize.feast_offline.DuckLakeSource"
EVENT_TIMESTAMP = "event_timestamp"


class DuckLakeSource(DataSource):
    """A table of the lake (or a query over it) as a Feast data source."""

    def __init__(
        self,
        *,
        name: str,
        table: str | None = None,
        query: str | None = None,
        timestamp_field: str = EVENT_TIMESTAMP,
        created_timestamp_column: str = "",
        field_mapping: dict[str, str] | None = None,
        description: str = "",
        tags: dict[str, str] | None = None,
        owner: str = "",
    ) -> None:
        if (table is None) == (query is None):
            raise BadInput(f"data source {name}: give either `table` or `query`.")
        super().__init__(
            name=name,
            timestamp_field=timestamp_field,
            created_timestamp_column=created_timestamp_column,
            field_mapping=field_mapping,
            description=description,
            tags=tags,
            owner=owner,
        )
        self.table = table
        self.query = query

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DuckLakeSource)
            and super().__eq__(other)
            and (self.table, self.query) == (other.table, other.query)
        )

    def __hash__(self) -> int:
        return hash(self.name)

    @staticmethod
    def from_proto(data_source: DataSourceProto) -> DuckLakeSource:
        """Read from the registry."""
        where = json.loads(data_source.custom_options.configuration)
        return DuckLakeSource(
            name=data_source.name,
            table=where["table"],
            query=where["query"],
            timestamp_field=data_source.timestamp_field,
            created_timestamp_column=data_source.created_timestamp_column,
            field_mapping=dict(data_source.field_mapping),
            description=data_source.description,
            tags=dict(data_source.tags),
            owner=data_source.owner,
        )

    def _to_proto_impl(self) -> DataSourceProto:
        proto = DataSourceProto(
            name=self.name,
            type=DataSourceProto.CUSTOM_SOURCE,
            data_source_class_type=_CLASS,
            field_mapping=self.field_mapping,
            timestamp_field=self.timestamp_field,
            created_timestamp_column=self.created_timestamp_column,
            description=self.description,
            tags=self.tags,
            owner=self.owner,
        )
        proto.custom_options.configuration = json.dumps({"table": self.table, "query": self.query}).encode()
        return proto

    def validate(self, config: RepoConfig) -> None:
        """Raises BadInput when the table is not there."""
        self._schema(config)

    @staticmethod
    def source_datatype_to_feast_value_type() -> Callable[[str], ValueType]:
        """Types are told as Arrow types."""
        convert: Callable[[str], ValueType] = pa_to_feast_value_type
        return convert

    def get_table_column_names_and_types(self, config: RepoConfig) -> Iterable[tuple[str, str]]:
        """Columns and Arrow types of the table, for inference."""
        # Feast's table of type names knows list elements as `item`; DuckDB calls them otherwise.
        return [
            (field.name, f"list<item: {field.type.value_type}>")
            if pa.types.is_list(field.type)
            else (field.name, str(field.type))
            for field in self._schema(config)
        ]

    def get_table_query_string(self) -> str:
        """What stands after FROM."""
        return f"({self.query})" if self.table is None else f"{LAKE}.main.{name(self.table)}"

    @property
    def source_type(self) -> DataSourceProto.SourceType.ValueType:
        """A custom source, in Feast's words."""
        return DataSourceProto.CUSTOM_SOURCE

    def _schema(self, config: RepoConfig) -> pa.Schema:
        connection = connect(_home(config))
        try:
            relation = connection.execute(f"SELECT * FROM {self.get_table_query_string()} LIMIT 0")
            return relation.to_arrow_table().schema
        except duckdb.Error as error:
            where = f"table {self.table}" if self.table else "its query"
            raise BadInput(
                f"data source {self.name}: {where} cannot be read"
                f" ({str(error).splitlines()[0]}); run the job that writes it first."
            ) from None
        finally:
            connection.close()


class DuckLakeOfflineStoreConfig(FeastConfigBaseModel):
    """The `offline_store` section of feature_store.yaml."""

    type: Literal["materialize.feast_offline.DuckLakeOfflineStore"] = (
        "materialize.feast_offline.DuckLakeOfflineStore"
    )
    home: str
    """The home folder; a relative one is relative to feature_store.yaml."""
    join: Literal["strict", "inclusive"] = "strict"
    """`strict`: a training row sees only values from before its timestamp, which is what makes a log
    of events safe from leakage; `inclusive`: also values at that very instant, as stock Feast does."""


class DuckLakeRetrievalJob(RetrievalJob):
    """A query that runs when its result is asked for, on a connection of its own."""

    def __init__(
        self,
        *,
        config: RepoConfig,
        query: str,
        entities: pa.Table | None = None,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        super().__init__()
        self._config = config
        self._query = query
        self._entities = entities
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._metadata = metadata

    def to_sql(self) -> str:
        """The query; an entity frame stands in it as `entities`."""
        return self._query

    @property
    def full_feature_names(self) -> bool:
        """Whether feature names carry their view's name."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Views that Feast computes on the result."""
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for."""
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        connection = connect(_home(self._config))
        try:
            if self._entities is not None:
                connection.register("entities", self._entities)
            return connection.execute(self._query).to_arrow_table()
        finally:
            connection.close()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Saved datasets are written by `bahe frame`."""
        raise NotImplementedError("write the frame with `bahe frame`, or .to_arrow() and Parquet")


class DuckLakeOfflineStore(OfflineStore):
    """Historical features, and the latest values for materialization, from DuckLake."""

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
    ) -> RetrievalJob:
        """The newest row of each key with an event time in [start_date, end_date]."""
        order = f"{name(timestamp_field)} DESC"
        if created_timestamp_column:
            order += f", {name(created_timestamp_column)} DESC"
        keys = ", ".join(map(name, join_key_columns)) or "1"
        query = (
            _selection(
                data_source,
                [*join_key_columns, *feature_name_columns],
                timestamp_field,
                created_timestamp_column,
                start_date,
                end_date,
            )
            + f" QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY {order}) = 1"
        )
        return DuckLakeRetrievalJob(config=config, query=query)

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
    ) -> RetrievalJob:
        """Every row with an event time in [start_date, end_date]."""
        query = _selection(
            data_source,
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
        )
        return DuckLakeRetrievalJob(config=config, query=query)

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """Point-in-time features of every row of the entity frame, in its order.

        The frame is a pandas frame (or an Arrow table) with the join keys and `event_timestamp`.
        Raises BadInput when a join key or the timestamp is missing or null.
        """
        entities = _entity_table(entity_df)
        contexts = offline_utils.get_feature_view_query_context(
            feature_refs, feature_views, registry, project, _bounds(entities)
        )
        for context in contexts:
            missing = [key for key in context.entities if key not in entities.column_names]
            if missing:
                raise BadInput(
                    f"entity frame has no column {missing[0]}, a join key of {context.name}; it has"
                    f" {', '.join(entities.column_names)}."
                )
        row_ids = pa.array(np.arange(entities.num_rows))
        store = config.offline_store
        assert isinstance(store, DuckLakeOfflineStoreConfig)
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        return DuckLakeRetrievalJob(
            config=config,
            query=_point_in_time_query(
                entities.column_names,
                contexts,
                strict=store.join == "strict",
                full_feature_names=full_feature_names,
            ),
            entities=entities.append_column("__row", row_ids),
            full_feature_names=full_feature_names,
            on_demand_feature_views=on_demand,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[c for c in entities.column_names if c != EVENT_TIMESTAMP],
                min_event_timestamp=_bounds(entities)[0],
                max_event_timestamp=_bounds(entities)[1],
            ),
        )


def _point_in_time_query(
    entity_columns: list[str],
    contexts: list[offline_utils.FeatureViewQueryContext],
    *,
    strict: bool,
    full_feature_names: bool,
) -> str:
    """One ASOF LEFT JOIN for each view; see invariant 1 for why strict is the default."""
    comparison = ">" if strict else ">="
    selected = [f"e.{name(column)}" for column in entity_columns]
    joins = []
    for index, context in enumerate(contexts):
        view = f"v{index}"
        time = name(context.timestamp_field)
        inner = [
            *context.entity_selections,
            f"{time} AS __time",
            *(name(f) for f in context.features),
        ]
        right = f"SELECT {', '.join(inner)} FROM {context.table_subquery}"
        if context.created_timestamp_column:
            # Of two values of one key and instant, the one computed last counts.
            source_keys = ", ".join(s.rsplit(" AS ", 1)[0] for s in context.entity_selections)
            right += (
                f" QUALIFY row_number() OVER (PARTITION BY {source_keys or '1'}, {time}"
                f" ORDER BY {name(context.created_timestamp_column)} DESC) = 1"
            )
        on = [f"e.{name(key)} = {view}.{name(key)}" for key in context.entities]
        on.append(f"e.{EVENT_TIMESTAMP} {comparison} {view}.__time")
        joins.append(f"ASOF LEFT JOIN ({right}) {view} ON {' AND '.join(on)}")
        for feature in context.features:
            shown = context.field_mapping.get(feature, feature)
            if full_feature_names:
                shown = f"{context.name}__{shown}"
            value = f"{view}.{name(feature)}"
            if context.ttl:
                fresh = f"e.{EVENT_TIMESTAMP} - {view}.__time <= INTERVAL {context.ttl} SECONDS"
                value = f"CASE WHEN {fresh} THEN {value} END"
            selected.append(f"{value} AS {name(shown)}")
    return f"SELECT {', '.join(selected)} FROM entities e {' '.join(joins)} ORDER BY e.__row"


def _selection(
    data_source: DataSource,
    columns: list[str],
    timestamp_field: str,
    created_timestamp_column: str | None,
    start_date: datetime | None,
    end_date: datetime | None,
) -> str:
    selected = [*columns, timestamp_field]
    if created_timestamp_column:
        selected.append(created_timestamp_column)
    bounds = [
        f"{name(timestamp_field)} {sign} TIMESTAMPTZ {quoted(_utc(moment).isoformat())}"
        for sign, moment in ((">=", start_date), ("<=", end_date))
        if moment is not None
    ]
    where = f" WHERE {' AND '.join(bounds)}" if bounds else ""
    listed = ", ".join(map(name, selected))
    return f"SELECT {listed} FROM {data_source.get_table_query_string()}{where}"


def _entity_table(entity_df: pd.DataFrame | pa.Table | str | None) -> pa.Table:
    if entity_df is None or isinstance(entity_df, str):
        raise BadInput("the entity frame must be a pandas frame with event_timestamp and join keys.")
    table: pa.Table = entity_df
    if isinstance(entity_df, pd.DataFrame):
        table = pa.Table.from_pandas(entity_df, preserve_index=False)
    if EVENT_TIMESTAMP not in table.column_names:
        raise BadInput(
            f"entity frame has no column {EVENT_TIMESTAMP}; it has {', '.join(table.column_names)}."
        )
    times = table[EVENT_TIMESTAMP]
    if times.null_count:
        raise BadInput(f"entity frame: {times.null_count} rows have no {EVENT_TIMESTAMP}.")
    if not pa.types.is_timestamp(times.type):
        raise BadInput(f"entity frame: {EVENT_TIMESTAMP} is {times.type}, not a timestamp.")
    # Naive times are taken as UTC, as Feast does.
    times = times.cast(pa.timestamp("us", tz="UTC"), safe=False)
    return table.set_column(table.column_names.index(EVENT_TIMESTAMP), EVENT_TIMESTAMP, times)


def _bounds(entities: pa.Table) -> tuple[datetime, datetime]:
    times = entities[EVENT_TIMESTAMP]
    if not len(times):
        now = datetime.now(UTC)
        return now, now
    frame = times.to_pandas()
    return frame.min().to_pydatetime(), frame.max().to_pydatetime()


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _home(config: RepoConfig) -> Home:
    store = config.offline_store
    assert isinstance(store, DuckLakeOfflineStoreConfig)
    path = Path(store.home).expanduser()
    if not path.is_absolute() and config.repo_path is not None:
        path = Path(config.repo_path) / path
    return Home(path.resolve())
