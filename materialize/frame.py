"""Training frames: every impression with what was known strictly before it, by reference.

A frame carries timeline lengths (pointers into `user_timeline`), never sequences.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from materialize import runs
from materialize.dataset import Split, context_column
from materialize.feature_store import open_store
from materialize.gates import require_gates
from materialize.ingest import home_dataset
from materialize.lake import commit, lake, quoted, snapshot

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

JOB = "frame"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Frame:
    """A frame on disk."""

    path: Path
    """Parquet file, sorted by event_timestamp; see `columns` in its schema."""
    frame_id: str
    rows: dict[str, int]
    """Rows of each split."""
    skipped: bool


def frame(home: Home, *, service: str = "ctr_training") -> Frame:
    """Pull the point-in-time frame of all impressions through Feast, split it by time, write Parquet.

    Does nothing when the lake, the service and the split are those of the last run. Raises NotReady
    before `ingest` and `apply`, BadInput when the service is unknown or a split would be empty.
    """
    dataset = home_dataset(home)
    store = open_store(home)
    with home.exclusive(), lake(home) as connection:
        ingested = runs.last(connection, "ingest")
        if ingested is None:
            raise NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")
        require_gates(connection, JOB)
        features = _service(store, service)
        wanted = [[p.name, [f.name for f in p.features]] for p in features.feature_view_projections]
        facts = [
            ingested.fingerprint,
            wanted,
            dataset.split.model_dump(mode="json"),
        ]
        frame_id = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        path = home.frames / frame_id / "frame.parquet"
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == frame_id and path.is_file():
            return Frame(path, frame_id, last.facts["rows"], skipped=True)
        with runs.record(connection, JOB, frame_id) as run:
            context = dataset.impressions.context
            shown = ["impression_id", "user_id", "item_id", "event_timestamp", "clicked"]
            shown += map(context_column, context)
            entities = connection.execute(
                f"SELECT {', '.join(shown)} FROM impressions ORDER BY event_timestamp, impression_id"
            ).to_arrow_table()
            split = _assign(entities, dataset.split)
            table = store.get_historical_features(
                entity_df=entities.to_pandas(), features=features
            ).to_arrow()
            table = _with_text(table, [context_column(c) for c in context])
            table = table.append_column("split", split)
            rows = {row["values"]: row["counts"] for row in split.value_counts().to_pylist()}
            _write(table, path, {"snapshot": snapshot(connection), "service": service, "context": context})
            commit(connection, [run.statement({"rows": rows, "service": service})])
    return Frame(path, frame_id, rows, skipped=False)


def latest_frame(home: Home) -> Frame:
    """The frame of the last run. Raises NotReady when there is none."""
    with lake(home) as connection:
        last = runs.last(connection, JOB)
    if last is not None:
        path = home.frames / last.fingerprint / "frame.parquet"
        if path.is_file():
            return Frame(path, last.fingerprint, last.facts["rows"], skipped=True)
    raise NotReady(f"{home.root} has no training frame yet; run `bahe frame` first.")


def _service(store: FeatureStore, name: str) -> FeatureService:
    from feast.errors import FeatureServiceNotFoundException

    try:
        return store.get_feature_service(name)
    except FeatureServiceNotFoundException:
        known = ", ".join(s.name for s in store.list_feature_services())
        raise BadInput(f"feature service {name} is not registered; choose from {known}.") from None


def _with_text(table: pa.Table, columns: list[str]) -> pa.Table:
    """The table with these columns as text: a column without any value has lost its type on the way."""
    for column in columns:
        place = table.column_names.index(column)
        table = table.set_column(place, column, table[column].cast(pa.string()))
    return table


def _assign(entities: pa.Table, split: Split) -> pa.Array:
    """The split of each row; rows are sorted by time, and one instant never falls into two splits."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.register("entities", entities)
    if split.validation_from is not None and split.test_from is not None:
        cut = f"TIMESTAMPTZ {quoted(split.validation_from.isoformat())}"
        cut_test = f"TIMESTAMPTZ {quoted(split.test_from.isoformat())}"
    else:
        train = 1 - split.validation - split.test
        listed = f"{train}, {train + split.validation}"
        connection.execute(
            f"CREATE TABLE cuts AS SELECT quantile_disc(event_timestamp, [{listed}]) AS q FROM entities"
        )
        cut, cut_test = "(SELECT q[1] FROM cuts)", "(SELECT q[2] FROM cuts)"
    assigned = connection.execute(
        f"SELECT CASE WHEN event_timestamp < {cut} THEN 'train'"
        f" WHEN event_timestamp < {cut_test} THEN 'validation' ELSE 'test' END FROM entities"
        " ORDER BY event_timestamp, impression_id"
    ).to_arrow_table()
    column = assigned.column(0).combine_chunks()
    present = set(column.unique().to_pylist())
    for name in SPLITS:
        if name not in present:
            raise BadInput(
                f"dataset.yaml: `split` leaves no impressions for {name}; move its cut-offs or shares."
            )
    return column


def _write(table: pa.Table, path: Path, facts: dict[str, object]) -> None:
    """Write beside and rename, so that a frame is whole or not there."""
    temporary = path.parent.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    metadata = {**(table.schema.metadata or {}), b"bahe": json.dumps(facts).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), temporary / path.name)
    shutil.rmtree(path.parent, ignore_errors=True)
    temporary.rename(path.parent)
