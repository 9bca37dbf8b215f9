"""Feast compute engine that materializes Arrow batches as the online store's own bytes.

The result is that of Feast's local engine, which still does what goes beyond copying a view's newest
values: transformations, aggregations, validation and offline writes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureView
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _convert_arrow_to_proto, _get_column_names, _validate_vector_field_lengths

from bahe_core.errors import BadInput
from bahe_core.machine import read_ahead
from bahe_core.progress import progress
from feast_ducklake.conversion import arrow_type, converted_table
from feast_ducklake.online.encoding import Int64, entity_keys, value_bytes
from feast_ducklake.online.rows import EPOCH, NO_TIME, EncodedRows
from feast_ducklake.online.store import GuardedOnlineStore

_EVERY_NIGHT = "`feast materialize --disable-event-timestamp`"

ROWS_PER_BATCH = 10_000
"""Unless `materialization.online_write_batch_size` says otherwise."""


class ArrowEngineConfig(FeastConfigBaseModel):
    """The `batch_engine` section of feature_store.yaml."""

    type: Literal[
        "feast_ducklake.ArrowEngine",
        "materialize.feast_engine.ArrowEngine",  # as version 0.1 wrote it
    ] = "feast_ducklake.ArrowEngine"


class ArrowEngine(LocalComputeEngine):
    """Materializes a batch of rows at a time, two in memory; memory does not grow with the view."""

    _rows = 0

    def take_rows(self) -> int:
        """Rows written since the last call."""
        rows, self._rows = self._rows, 0
        return rows

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        _warn_of_the_future(task)
        if not _is_copy(task):
            return super()._materialize_one(registry, task, **kwargs)
        job_id = f"{task.feature_view.name}-{task.start_time}-{task.end_time}"
        try:
            self._copy(registry, task)
        except Exception as error:
            return LocalMaterializationJob(job_id, MaterializationJobStatus.ERROR, error)
        return LocalMaterializationJob(job_id, MaterializationJobStatus.SUCCEEDED)

    def _copy(self, registry: BaseRegistry, task: MaterializationTask) -> None:
        view, config = task.feature_view, self.repo_config
        job = self._latest_rows(registry, task, task.start_time)
        size = config.materialization_config.online_write_batch_size or ROWS_PER_BATCH
        if any(field.vector_index and field.vector_length for field in view.features):
            for batch in _batches(job, size):  # all of them, before the first one is written
                _validate_vector_field_lengths(_as_view(view, batch), view)
        rows = 0
        with progress(f"materializing {view.name}", None) as advance:
            for batch in read_ahead(_as_view(view, batch) for batch in _batches(job, size)):
                self._write(view, batch)
                rows += batch.num_rows
                advance(batch.num_rows)
        self._rows += rows
        if not rows and not view.materialization_intervals:
            all_rows = self._latest_rows(registry, task, EPOCH)
            if any(batch.num_rows for batch in _batches(all_rows, size)):
                _warn(
                    f"view {view.name}: nothing was materialized, since all its rows are from before"
                    f" {task.start_time:%Y-%m-%d}; {_EVERY_NIGHT} reads all rows."
                )

    def _latest_rows(
        self, registry: BaseRegistry, task: MaterializationTask, start: datetime
    ) -> RetrievalJob:
        """The latest row of each key from `start` to the task's end."""
        view = task.feature_view
        entities = [registry.get_entity(name, task.project) for name in view.entities]
        join_keys, features, timestamp, created = _get_column_names(view, entities)
        return self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=view.batch_source,
            join_key_columns=join_keys,
            feature_name_columns=features,
            timestamp_field=timestamp,
            created_timestamp_column=created,
            start_date=start,
            end_date=task.end_time,
        )

    def _write(self, view: FeatureView, batch: pa.RecordBatch) -> None:
        if isinstance(self.online_store, GuardedOnlineStore):
            self.online_store.write_rows(self.repo_config, view, _encoded_rows(view, batch))
            return
        rows = _convert_arrow_to_proto(batch, view, _join_key_types(view))
        self.online_store.online_write_batch(self.repo_config, view, rows, None)


def _warn_of_the_future(task: MaterializationTask) -> None:
    """`feast materialize-incremental` goes on where a view's last interval ended, whenever that is."""
    view, now = task.feature_view.name, datetime.now(UTC)
    if task.start_time > now:
        _warn(
            f"view {view} was materialized up to {task.start_time:%Y-%m-%d %H:%M}, which is in the future,"
            f" so `feast materialize-incremental` brings nothing online until then; {_EVERY_NIGHT} does."
        )
    elif task.end_time > now + timedelta(hours=1):
        _warn(
            f"view {view} is materialized up to {task.end_time:%Y-%m-%d %H:%M}, which is in the future,"
            " so `feast materialize-incremental` will bring nothing more online until then;"
            f" {_EVERY_NIGHT} will."
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)


def _is_copy(task: MaterializationTask) -> bool:
    view = task.feature_view
    more = ("feature_transformation", "aggregations", "source_views", "enable_validation", "offline")
    return (
        type(view) is FeatureView
        and view.online
        and task.only_latest
        and not any(getattr(view, attribute, None) for attribute in more)
    )


def _batches(job: RetrievalJob, size: int) -> Iterator[pa.RecordBatch]:
    stream = getattr(job, "to_arrow_batches", None)  # our offline store's; no other has one
    if stream is not None:
        yield from stream(size)
    else:
        yield from job.to_arrow().to_batches(max_chunksize=size)


def _as_view(view: FeatureView, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the view's column names and types. Raises BadInput when one does not fit."""
    mapping = view.batch_source.field_mapping or {}
    batch = batch.rename_columns([mapping.get(name, name) for name in batch.schema.names])
    if DUMMY_ENTITY_ID in _join_key_types(view) and DUMMY_ENTITY_ID not in batch.schema.names:
        batch = batch.append_column(DUMMY_ENTITY_ID, pa.repeat(DUMMY_ENTITY_VAL, batch.num_rows))
    missing = [name for name in _value_types(view) if name not in batch.schema.names]
    if missing:
        raise BadInput(
            f"view {view.name}: its source has no column {missing[0]}; it has"
            f" {', '.join(batch.schema.names)}."
        )
    types = {name: arrow_type(kind) for name, kind in _value_types(view).items()}
    convertible = {name: kind for name, kind in types.items() if kind is not None}
    table = converted_table(pa.Table.from_batches([batch]), convertible, f"view {view.name}")
    return table.combine_chunks().to_batches()[0] if table.num_rows else batch


def _value_types(view: FeatureView) -> dict[str, Any]:
    """Types of the join keys and features."""
    return {field.name: field.dtype.to_value_type() for field in [*view.entity_columns, *view.features]}


def _join_key_types(view: FeatureView) -> dict[str, Any]:
    return {column.name: column.dtype.to_value_type() for column in view.entity_columns}


def _encoded_rows(view: FeatureView, batch: pa.RecordBatch) -> EncodedRows:
    types, source = _join_key_types(view), view.batch_source
    event_us = _microseconds(view, batch, source.timestamp_field)
    if (event_us == NO_TIME).any():
        raise BadInput(
            f"view {view.name}: {(event_us == NO_TIME).sum()} rows have no {source.timestamp_field};"
            " give each row its event time."
        )
    created = source.created_timestamp_column
    return EncodedRows(
        keys=entity_keys({key: batch.column(key) for key in types}, types),
        values={
            field.name: value_bytes(batch.column(field.name), field.dtype.to_value_type())
            for field in view.features
        },
        event_us=event_us,
        created_us=_microseconds(view, batch, created) if created else None,
    )


def _microseconds(view: FeatureView, batch: pa.RecordBatch, column: str) -> Int64:
    times = batch.column(column)
    if not (pa.types.is_timestamp(times.type) or pa.types.is_date(times.type)):
        raise BadInput(f"view {view.name}: {column} is {times.type}, not a timestamp.")
    whole = times.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    filled: Int64 = pc.fill_null(whole, NO_TIME).to_numpy(zero_copy_only=False).astype(np.int64)
    return filled
