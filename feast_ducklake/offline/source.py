"""Tables of the lake as Feast sees them: data source, saved dataset, destination of logs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from feast.data_source import DataSource
from feast.feature_logging import LoggingDestination
from feast.feature_view import FeatureView
from feast.infra.offline_stores.file_source import FileSource
from feast.protos.feast.core.DataSource_pb2 import DataSource as DataSourceProto
from feast.protos.feast.core.FeatureService_pb2 import LoggingConfig as LoggingConfigProto
from feast.protos.feast.core.SavedDataset_pb2 import SavedDatasetStorage as SavedDatasetStorageProto
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import pa_to_feast_value_type
from feast.value_type import ValueType

from bahe_core.errors import BadInput
from bahe_lake.connection import LAKE
from bahe_lake.sql import sql_identifier, sql_literal
from feast_ducklake.offline.entities import EVENT_TIMESTAMP
from feast_ducklake.offline.lakes import open_lake
from feast_ducklake.offline.views import source_columns

# Registries name classes by these paths, so they stay.
_SOURCE_CLASS = "feast_ducklake.DuckLakeSource"
_DESTINATION_KIND = "ducklake"


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
        options = data_source.bigquery_options
        table, query = options.table or None, options.query or None
        if table is None and query is None:  # a registry older than `bigquery_options`
            older = json.loads(data_source.custom_options.configuration)
            table, query = older["table"], older["query"]
        return DuckLakeSource(
            name=data_source.name,
            table=table,
            query=query,
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
            data_source_class_type=_SOURCE_CLASS,
            field_mapping=self.field_mapping,
            timestamp_field=self.timestamp_field,
            created_timestamp_column=self.created_timestamp_column,
            description=self.description,
            tags=self.tags,
            owner=self.owner,
        )
        # Feast knows tables and queries by these options; `feast ui` and its lineage show no others.
        proto.bigquery_options.table = self.table or ""
        proto.bigquery_options.query = self.query or ""
        return proto

    def _set_timestamps_in_proto(self, data_source_proto: DataSourceProto) -> None:
        # The time of each definition's loading; with it `feast plan` would show every source as changed.
        pass

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
        return f"({self.query})" if self.table is None else f"{LAKE}.main.{sql_identifier(self.table)}"

    @property
    def source_type(self) -> DataSourceProto.SourceType.ValueType:
        """A custom source, in Feast's words."""
        return DataSourceProto.CUSTOM_SOURCE

    def _schema(self, config: RepoConfig) -> pa.Schema:
        with open_lake(config) as connection:
            relation = self.get_table_query_string()
            source_columns(connection, self.name, relation)
            return connection.execute(f"SELECT * FROM {relation} LIMIT 0").to_arrow_table().schema


# Feast writes the class of a view's source by where it is defined.
DuckLakeSource.__module__, DuckLakeSource.__qualname__ = _SOURCE_CLASS.rsplit(".", 1)


def relation_of(source: DataSource, config: RepoConfig) -> str:
    """What stands after FROM for a data source: a table of the lake, or Parquet files of a saved dataset.

    Raises BadInput for any other kind of source.
    """
    if isinstance(source, DuckLakeSource):
        return source.get_table_query_string()
    if isinstance(source, FileSource) and "://" not in source.path:
        return f"read_parquet({sql_literal(str(local_path(source.path, config)))})"
    raise BadInput(
        f"data source {source.name} is a {type(source).__name__}; the lake answers for a DuckLakeSource or"
        " local Parquet files."
    )


def readable(view: FeatureView, config: RepoConfig) -> FeatureView:
    """The view with a source that Feast can name in SQL: Parquet files become a query over them."""
    source = view.batch_source
    if not isinstance(source, FileSource):
        return view
    view = copy.copy(view)
    view.batch_source = DuckLakeSource(
        name=source.name,
        query=f"SELECT * FROM {relation_of(source, config)}",
        timestamp_field=source.timestamp_field,
        created_timestamp_column=source.created_timestamp_column or "",
        field_mapping=dict(source.field_mapping),
    )
    return view


def local_path(path: str, config: RepoConfig) -> Path:
    """A path of the repository: a relative one is relative to feature_store.yaml."""
    return Path(config.repo_path or "", Path(path).expanduser())


class SavedDatasetDuckLakeStorage(SavedDatasetStorage):
    """A saved dataset as a table of the lake; it must hold `event_timestamp` to be read back."""

    _proto_attr_name = "custom_storage"

    def __init__(self, table: str) -> None:
        self.table = table

    @staticmethod
    def from_proto(storage_proto: SavedDatasetStorageProto) -> SavedDatasetDuckLakeStorage:
        """Read from the registry."""
        return SavedDatasetDuckLakeStorage(json.loads(storage_proto.custom_storage.configuration)["table"])

    def to_proto(self) -> SavedDatasetStorageProto:
        """For the registry."""
        options = DataSourceProto.CustomSourceOptions(
            configuration=json.dumps({"table": self.table}).encode()
        )
        proto: SavedDatasetStorageProto = self._custom_storage_proto(options)
        return proto

    def to_data_source(self) -> DuckLakeSource:
        """What it is read back from."""
        return DuckLakeSource(name=self.table, table=self.table)


class DuckLakeLoggingDestination(LoggingDestination):
    """A table of the lake that the features a service has answered with are appended to."""

    _proto_kind = _DESTINATION_KIND

    def __init__(self, *, table: str) -> None:
        self.table = table

    @classmethod
    def from_proto(cls, config_proto: LoggingConfigProto) -> DuckLakeLoggingDestination:
        """Read from the registry."""
        return cls(table=config_proto.custom_destination.config["table"])

    def to_proto(self) -> LoggingConfigProto:
        """For the registry."""
        destination: dict[str, Any] = {"kind": _DESTINATION_KIND, "config": {"table": self.table}}
        return LoggingConfigProto(custom_destination=LoggingConfigProto.CustomDestination(**destination))

    def to_data_source(self) -> DuckLakeSource:
        """What logs are read back from."""
        return DuckLakeSource(name=self.table, table=self.table, timestamp_field="__log_timestamp")
