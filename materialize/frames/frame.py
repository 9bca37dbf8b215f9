"""Training frames: every impression with what was known strictly before it, by reference.

A frame carries timeline lengths (pointers into `user_timeline`), never sequences.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from bahe_core.errors import BadInput, NotReady
from bahe_core.files import new_folder
from bahe_core.home import Home
from bahe_core.progress import progress, say
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.sql import AT_ONCE, known_until, old_enough, sql_literal
from bahe_lake.transactions import commit
from bahe_models import column_of
from feature_repo.item_keys import ItemKeys, item_keys, reference_of, with_item_keys, without_unknown
from feature_repo.references import FeatureReference, feature_references
from feature_repo.store import open_store
from feature_repo.team import team_content
from feature_repo.vector_widths import vector_widths
from materialize.config.dataset import Dataset, Split, context_column, home_dataset
from materialize.executors import LOCAL, ExecutorConfig, start
from materialize.frames.rewritten import rewritten
from materialize.gate import gated, require_gates

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

JOB = "frame"
SPLITS = ("train", "validation", "test")
ROW_GROUP = 16_384
"""Rows that a reader of the file gets at a time; few, so that many readers can share them."""

REWRITTEN = "rewritten"
"""The fact of a run that names columns that change after the fact, each with the share of impressions."""

KEYS = ("impression_id", "user_id", "item_id", "event_timestamp", "clicked")


@dataclass(frozen=True)
class Frame(Result):
    """A frame on disk."""

    path: Path
    """Parquet file, sorted by event_timestamp; see `columns` in its schema."""
    frame_id: str
    rows: dict[str, int]
    """Rows of each split."""
    skipped: bool

    @property
    def facts(self) -> dict[str, Any]:
        """The file's metadata: `snapshot` (of the lake), `service`, `freshness`, `context`, what `features`
        of dataset.yaml lists, of `vectors` with the width of each."""
        facts: dict[str, Any] = json.loads(pq.read_schema(self.path).metadata[b"bahe"])
        return facts

    @property
    def summary(self) -> list[str]:
        """Its id, snapshot and rows."""
        rows = ", ".join(f"{count:,} {split}" for split, count in self.rows.items())
        unchanged = " (unchanged)" if self.skipped else ""
        return [f"frame {self.frame_id}, snapshot {self.facts['snapshot']}: {rows}{unchanged}"]


@gated("frame")
def frame(
    home: Home,
    *,
    service: str = "ctr_training",
    as_of: int | None = None,
    where: ExecutorConfig = LOCAL,
) -> Frame:
    """Pull the point-in-time frame of all impressions through Feast, split it by time, write Parquet.

    An impression sees what was known at the start of its day, or with `freshness: hourly | live` in
    dataset.yaml at the start of its hour or strictly before its own instant. `as_of` reads the lake as it
    was at that snapshot. Several workers of `where` each join the users of one hash. Does nothing when the
    lake, the service, the freshness, the context and the split are those of the last run. Raises NotReady
    before `ingest` and `apply`, BadInput when the service or the snapshot is unknown or a split would be
    empty.
    """
    dataset = home_dataset(home)
    store = open_store(home)
    store.config.offline_store.as_of = as_of
    with (
        home.exclusive(),
        lake(home) as connection,
        nullcontext(connection) if as_of is None else lake(home, as_of=as_of) as then,
    ):
        ingested = runs.last(then, "ingest")
        if ingested is None:
            raise NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")
        require_gates(then, JOB)
        registered = _service(store, service)
        projected = [[p.name, [f.name for f in p.features]] for p in registered.feature_view_projections]
        references = _listed(store, dataset)
        listed = {kind: list(map(str, found)) for kind, found in references.items()}
        further = list(chain.from_iterable(listed.values()))
        keys = item_keys(store, chain.from_iterable(references.values()))
        asked: FeatureService | list[str] = registered
        if further:
            of_service = [f"{view}:{feature}" for view, features in projected for feature in features]
            of_keys = set(map(reference_of, keys))  # columns of the entity frame
            asked = [one for one in dict.fromkeys([*of_service, *further]) if one not in of_keys]
        identity: list[object] = [ingested.fingerprint, projected, dataset.split.model_dump(mode="json")]
        if dataset.freshness != "live":
            # In the words of version 0.1, so that its frames keep their names.
            identity.append("daily" if dataset.freshness == "nightly" else dataset.freshness)
        context, delay_us = dataset.impressions.context, dataset.impressions.label_delay_us
        if context:
            identity.append(context)
        if delay_us:
            identity.append(delay_us)
        vectors = vector_widths(store, listed["vectors"])
        if further:
            identity.append({kind: listed[kind] for kind in ("numeric", "categorical")})
        if vectors:
            identity.append(vectors)
        team = team_content(store, further)
        if team is not None:
            identity.append(team)
        frame_id = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        path = home.frames / frame_id / "frame.parquet"
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == frame_id and path.is_file():
            return Frame(path, frame_id, last.facts["rows"], skipped=True)
        before = last.facts.get("freshness", "live") if last is not None else dataset.freshness
        if before != dataset.freshness:
            say(
                f"  impressions see features as serving has them: {dataset.freshness}, in the last frame"
                f" {before}; `freshness` in dataset.yaml says which"
            )
        with runs.record(connection, JOB, frame_id) as run:
            impressions = old_enough(delay_us)
            entities = _entities(then, impressions, dataset.split, dataset.freshness, context, keys)
            rows = _split_rows(then, entities)
            job = store.get_historical_features(entity_df=entities, features=asked)
            about = {
                "snapshot": job.snapshot,
                "service": service,
                "freshness": dataset.freshness,
                "context": context,
                **listed,
                "vectors": vectors,
                "label_delay_us": delay_us,
                "label_time": ingested.facts.get("label_time", AT_ONCE),
            }
            with start(where) as executor:
                alone = executor.workers == 1
                reader = job.to_arrow_reader() if alone else job.to_sharded_reader(executor, "user_id")
                count = sum(rows.values())
                left_out = [name for name in keys if reference_of(name) not in further]
                _write(reader, path, about, count, [*map(column_of, vectors)], keys, left_out)
            facts: dict[str, Any] = {"rows": rows, "service": service, "freshness": dataset.freshness}
            facts[REWRITTEN] = _rewritten(connection, home, last, path, facts)
            commit(connection, [run.statement(facts, rows_read=count, rows_written=count)])
    return Frame(path, frame_id, rows, skipped=False)


def _rewritten(
    connection: duckdb.DuckDBPyConnection,
    home: Home,
    last: runs.Run | None,
    path: Path,
    facts: Mapping[str, Any],
) -> dict[str, float]:
    """Features of which the last frame, made in the same way, said something else; each is said aloud."""
    if last is None or any(last.facts.get(name) != facts[name] for name in ("service", "freshness")):
        return {}
    before = home.frames / last.fingerprint / "frame.parquet"
    if not before.is_file() or before == path:
        return {}
    features = [name for name in pq.read_schema(path).names if name not in (*KEYS, "split")]
    found = rewritten(connection, before, path, features)
    for name, share in found.items():
        say(
            f"  {name} has another value than in the last frame for {share:.0%} of the same impressions: it"
            " changes after the fact, or much of the log came late",
            feature=name,
        )
    return found


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
        registered = ", ".join(s.name for s in store.list_feature_services())
        raise BadInput(f"feature service {name} is not registered; choose from {registered}.") from None


def _listed(store: FeatureStore, dataset: Dataset) -> dict[str, list[FeatureReference]]:
    """What `features` of dataset.yaml lists, by kind.

    Raises BadInput on what cannot be read, or has the name of a context column or of another one.
    """
    found = {
        kind: feature_references(store, kind, references)
        for kind, references in dataset.features.model_dump().items()
    }
    for reference in found["categorical"]:
        if reference.feature in dataset.impressions.context:
            raise BadInput(
                f"features.categorical: {reference} has the name of a context column; rename one of them."
            )
    named: dict[str, tuple[str, FeatureReference]] = {}
    for kind, references in found.items():
        for reference in references:
            other_kind, other = named.setdefault(reference.feature, (kind, reference))
            if other != reference:
                raise BadInput(
                    f"features.{kind}: {reference} has the name of {other} of features.{other_kind}; rename"
                    " one of them."
                )
    return found


def _entities(
    connection: duckdb.DuckDBPyConnection,
    impressions: str,
    split: Split,
    freshness: str,
    context: Sequence[str],
    keys: ItemKeys,
) -> str:
    """The entity query: impressions in order of time, each with its split, and its item's `keys`.

    `event_timestamp` is the instant whose knowledge an impression gets, `impression_timestamp` its own.
    All impressions of one instant are in the same split. Raises BadInput when there are none.
    """
    if split.validation_from is not None and split.test_from is not None:
        cuts = [split.validation_from, split.test_from]
    else:
        train = 1 - split.validation - split.test
        shares = f"[{train}, {train + split.validation}]"
        row = connection.execute(
            f"SELECT quantile_disc(event_timestamp, {shares}) FROM {impressions}"
        ).fetchone()
        assert row is not None
        if row[0] is None:
            raise BadInput(
                "dataset.yaml: no impression is older than `impressions.label_delay`; shorten it, or ingest"
                " later ones."
            )
        cuts = row[0]
    validation_from, test_from = map(sql_literal, cuts)
    known = known_until(freshness, "i.event_timestamp")
    passed_through = ", ".join(["clicked", *map(context_column, context)])
    rows = f"""
        SELECT
            impression_id,
            user_id,
            item_id,
            {known} AS event_timestamp,
            {passed_through},
            i.event_timestamp AS impression_timestamp,
            CASE
                WHEN i.event_timestamp < {validation_from} THEN 'train'
                WHEN i.event_timestamp < {test_from} THEN 'validation'
                ELSE 'test'
            END AS split
        FROM {impressions} i"""
    return f"{with_item_keys(rows, keys)} ORDER BY impression_timestamp, impression_id"


def _split_rows(connection: duckdb.DuckDBPyConnection, entities: str) -> dict[str, int]:
    counted = connection.execute(f"SELECT split, count(*) FROM ({entities}) GROUP BY split").fetchall()
    rows = dict(counted)
    for name in SPLITS:
        if name not in rows:
            raise BadInput(
                f"dataset.yaml: `split` leaves no impressions for {name}; move its cut-offs or shares."
            )
    return {name: rows[name] for name in SPLITS}


def _write(
    reader: pa.RecordBatchReader,
    path: Path,
    facts: dict[str, object],
    rows: int,
    vectors: Collection[str],
    keys: ItemKeys,
    left_out: Collection[str],
) -> None:
    """Stream the frame to disk, whole or not at all, without the columns `left_out`.

    Columns of `vectors` as lists of float32; `keys` say what stands for an unknown value in theirs.
    """
    others = (*KEYS, "impression_timestamp", "split", *left_out)
    features = [c for c in reader.schema.names if c not in others]
    columns = [*KEYS, *features, "split"]
    source = ["impression_timestamp" if c == "event_timestamp" else c for c in columns]
    fields = [reader.schema.field(c).with_name(n) for c, n in zip(source, columns, strict=True)]
    # Not of a fixed size, since Parquet's reader in Arrow fails where such a list is null.
    fields = [f.with_type(pa.list_(pa.float32())) if f.name in vectors else f for f in fields]
    schema = pa.schema(fields, {b"bahe": json.dumps(facts).encode()})

    with new_folder(path.parent) as folder:
        with (
            pq.ParquetWriter(folder / path.name, schema) as writer,
            progress("impressions", rows) as advance,
        ):
            for batch in reader:
                arrays = [
                    without_unknown(batch.column(c), keys.get(c)).cast(f.type)
                    for c, f in zip(source, fields, strict=True)
                ]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema), ROW_GROUP)
                advance(batch.num_rows)
        shutil.rmtree(path.parent, ignore_errors=True)
