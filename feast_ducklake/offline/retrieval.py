"""A retrieval that runs when its result is asked for: as frames, Arrow, a stream, or a saved dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.types import from_feast_to_pyarrow_type

from bahe_core.errors import BadInput
from bahe_core.files import replace_atomically
from bahe_lake.catalogue import tables
from feast_ducklake.offline.entities import GIVEN, Dtype
from feast_ducklake.offline.lakes import home_of, open_lake, open_lake_to_write
from feast_ducklake.offline.point_in_time import Shard
from feast_ducklake.offline.sharding import ShardReader, ShardRunner, merged
from feast_ducklake.offline.source import SavedDatasetDuckLakeStorage, local_path
from feast_ducklake.offline.writes import replace_table

if TYPE_CHECKING:
    from feast.on_demand_feature_view import OnDemandFeatureView
    from feast.repo_config import RepoConfig
    from feast.saved_dataset import SavedDatasetStorage, ValidationReference


BATCH_ROWS = 122_880
"""Rows of a batch in a stream: one of DuckDB's own row groups."""


class DuckLakeRetrievalJob(RetrievalJob):
    """A query over one snapshot of the lake; each call runs it on a connection of its own.

    So a job gives the same answer however often and from however many threads it is asked.
    """

    def __init__(
        self,
        *,
        config: RepoConfig,
        query: str,
        snapshot: int,
        shard_query: Callable[..., str] | None = None,
        entities: pa.Table | None = None,
        dtypes: Mapping[str, Dtype] | None = None,
        full_feature_names: bool = False,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        super().__init__()
        self.snapshot = snapshot
        """The lake's snapshot that is read: `offline_store.as_of` gives the same answer again."""
        self._config = config
        self._query = query
        self._shard_query = shard_query
        self._entities = entities
        self._dtypes = dtypes or {}
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._metadata = metadata

    def to_sql(self) -> str:
        """The query; an entity frame that lies in memory stands in it as `__given_entities`."""
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

    def to_arrow_batches(self, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """The result in order, in batches of at most `rows` rows, never all of it in memory.

        What DuckDB needs beyond its memory (BAHE_MEMORY) it keeps on disk. Views on demand are computed
        batch by batch.
        """
        with self._connection() as connection:
            yield from self._with_views_on_demand(connection.execute(self._query).to_arrow_reader(rows))

    def to_arrow_reader(self, rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
        """`to_arrow_batches` with its schema, which Arrow's writers and DuckDB read from."""
        return self._reader(self.to_arrow_batches(rows))

    def to_sharded_reader(self, executor: ShardRunner, key: str) -> pa.RecordBatchReader:
        """`to_arrow_reader`, put together from shards by the hash of a join key, one for each worker.

        The same rows in the same order. Workers attach the lake themselves. Only for an entity frame that
        is a query over the lake.
        """
        assert self._shard_query is not None
        assert self._entities is None
        home, count = home_of(self._config).elsewhere(), executor.workers
        queries = [self._shard_query(shard=Shard(key=key, index=i, count=count)) for i in range(count)]
        read = ShardReader(home, self.snapshot, queries)
        rows = merged(executor.streams(read, count), BATCH_ROWS)
        return self._reader(self._with_views_on_demand(rows))

    def _with_views_on_demand(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if self._on_demand_feature_views:
                table = _TableJob(pa.Table.from_batches([batch]), self).to_arrow()
                yield from self._as_declared(table).combine_chunks().to_batches()
            else:
                yield batch

    def _as_declared(self, table: pa.Table) -> pa.Table:
        """A batch without any value in a column on demand has it in the type of the other batches."""
        declared = {
            name: field.dtype
            for view in self._on_demand_feature_views
            for field in view.features
            for name in (field.name, f"{view.projection.name_to_use()}__{field.name}")
        }
        for place, column in enumerate(table.column_names):
            if column in declared and pa.types.is_null(table.schema.field(column).type):
                with suppress(ValueError):  # a type that Feast has no Arrow type for
                    kind = from_feast_to_pyarrow_type(declared[column])
                    table = table.set_column(place, column, table[column].cast(kind))
        return table

    def _reader(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatchReader:
        first = next(batches, None)
        if first is None:
            return self.to_arrow().to_reader()
        return pa.RecordBatchReader.from_batches(first.schema, chain([first], batches))

    @contextmanager
    def _connection(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with open_lake(self._config, self.snapshot) as connection:
            if self._entities is not None:
                connection.register(GIVEN, self._entities)
            yield connection

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        with self._connection() as connection:
            return connection.execute(self._query).to_arrow_table()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._frame(self._to_arrow_internal(timeout))

    def to_df(
        self, validation_reference: ValidationReference | None = None, timeout: int | None = None
    ) -> pd.DataFrame:
        """The result as a pandas frame.

        Columns of a pandas entity frame keep their dtypes. Of the others, integers and truth values with
        nulls get pandas' nullable dtypes (Int64, boolean), since floats would lose digits.
        """
        return self._frame(self.to_arrow(validation_reference, timeout))

    def _frame(self, table: pa.Table) -> pd.DataFrame:
        columns = {name: _series(table.column(name), self._dtypes.get(name)) for name in table.column_names}
        return pd.DataFrame(columns, copy=False)

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Stream the result into a Parquet file or a table of the lake; whole or not at all.

        Raises SavedDatasetLocationAlreadyExists unless it may be overwritten, BadInput for other storage.
        """
        if isinstance(storage, SavedDatasetFileStorage):
            path = local_path(storage.file_options.uri, self._config)
            if path.exists() and not allow_overwrite:
                raise SavedDatasetLocationAlreadyExists(location=str(path))
            self._write_parquet(path)
        elif isinstance(storage, SavedDatasetDuckLakeStorage):
            with open_lake_to_write(self._config) as connection:
                if storage.table in tables(connection) and not allow_overwrite:
                    raise SavedDatasetLocationAlreadyExists(location=storage.table)
                replace_table(connection, storage.table, self.to_arrow_reader())
        else:
            raise BadInput(
                f"a saved dataset cannot be a {type(storage).__name__}; use SavedDatasetFileStorage or"
                " SavedDatasetDuckLakeStorage."
            )

    def _write_parquet(self, path: Path) -> None:
        with replace_atomically(path) as part:
            with self.to_arrow_reader() as reader, pq.ParquetWriter(part, reader.schema) as writer:
                for batch in reader:
                    writer.write_batch(batch)
            if path.is_dir():
                shutil.rmtree(path)


_NULLABLE: dict[pa.DataType, pd.api.extensions.ExtensionDtype] = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


def _series(column: pa.ChunkedArray, dtype: Dtype | None) -> pd.Series[Any]:
    """A column in the dtype that it had when it was given; None: in the one that keeps all digits."""
    series: pd.Series[Any]
    if dtype is None:
        types = _NULLABLE if column.null_count else {}
        series = column.to_pandas(types_mapper=types.get)
    elif isinstance(dtype, pd.ArrowDtype):
        # DuckDB answers in a type of its own, as string for large_string.
        series = column.cast(dtype.pyarrow_dtype).to_pandas(types_mapper=pd.ArrowDtype)
    elif isinstance(dtype, pd.api.extensions.ExtensionDtype) and hasattr(dtype, "__from_arrow__"):
        series = pd.Series(dtype.__from_arrow__(column))
    else:
        series = column.to_pandas(integer_object_nulls=True).astype(dtype, copy=False)
    return series


class _TableJob(RetrievalJob):
    """Rows that are there already, so that Feast computes a job's views on demand on them."""

    def __init__(self, table: pa.Table, job: DuckLakeRetrievalJob) -> None:
        super().__init__()
        self._table = table
        self._job = job

    @property
    def full_feature_names(self) -> bool:
        return self._job.full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._job.on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._job.metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._table
