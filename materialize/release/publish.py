"""Vectors and statistics to the online store, through Feast; then one pointer is flipped.

Vectors are keyed by model_version, so a new version is written beside the live one and nobody sees
it before the pointer says so.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow.parquet as pq
from rich.markup import escape

from bahe_core.errors import BadInput, BaheError, NotReady
from bahe_core.files import replace_atomically
from bahe_core.home import Home
from bahe_core.progress import say
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.versions import LATEST_ITEMS
from bahe_models import require_servable
from bahe_models.artifact_folder import further_features, read_config, vector_widths_of
from feature_repo.references import stored_views
from feature_repo.store import online_errors, open_store
from feature_repo.team import team_content
from feature_repo.vector_widths import vector_widths
from materialize.config.dataset import home_dataset
from materialize.gate import require_gates
from materialize.release import counted, lag, pointer, taken_back
from materialize.release.quality import require_quality

if TYPE_CHECKING:
    from feast import FeatureStore

JOB = "publish"
ROLLBACK = "rollback"
VIEWS = (
    "user_stats",
    "item_stats",
    "user_timeline",
    "user_recent_atoms",
    "item_attributes",
    "user_embedding",
    "item_embedding",
)
SAMPLE = 25
"""How many of the newest and of random entities are read back before the pointer is flipped."""


@dataclass(frozen=True)
class Published(Result):
    """What a run of `publish` did."""

    model_version: str
    skipped: bool
    rows: int = 0
    """Rows written online."""

    @property
    def summary(self) -> list[str]:
        """What is live."""
        wrote = f", {self.rows:,} rows written online" if self.rows else ""
        return [f"live: {self.model_version}{wrote}" + (" (unchanged)" if self.skipped else "")]


def publish(home: Home) -> Published:
    """Write online what is new since the last publish, check a sample, and flip the pointer.

    Everything is written where the online store is not the one that was last published to, or has lost
    something. One that was lost after a rollback gets back what it had, and the version that the rollback
    made live is live again; to publish once more then goes forward. Does nothing when the last embedded
    model_version is live with the log as it is. Raises BaheError, and leaves the pointer alone, when what
    was written does not read back; NotReady when vectors are behind the log, and so behind the statistics;
    NotServable when nothing is embedded and the last trained model cannot be.
    """
    store = open_store(home)
    with home.exclusive(), lake(home) as connection, online_errors(home):
        latest = runs.latest(connection)
        embedded, ingested, last = (latest.get(job) for job in ("embed", "ingest", JOB))
        if embedded is None or ingested is None:
            trained = latest.get("train")
            if trained is not None:
                require_servable(home.models / trained.fingerprint)
            raise NotReady(f"{home.root} has no vectors yet; run `bahe embed` first.")
        require_gates(connection, JOB)
        version = str(embedded.facts["model_version"])
        publications, said = pointer.recorded(connection), pointer.online(store)
        ours = bool(publications) and last is not None and said == publications[0]
        if not ours and _rolled_back(latest, publications, said):
            live = publications[0].model_version
            if (home.models / live / "config.json").is_file():
                return _restored(home, store, connection, live, latest[ROLLBACK].facts["left_version"])
            say(f"  {live} was rolled back to, but its artifact is gone, so {version} is made live")
        require_quality(connection, version)
        fingerprint = lag.publish_fingerprint(embedded, ingested)
        listed = _listed(home.models / version)
        team = team_content(store, listed)
        unchanged = (
            last is not None and last.fingerprint == fingerprint and last.facts.get("team_content") == team
        )
        counts = counted.read(home) is not None  # not of homes that an earlier release published
        if ours and unchanged and counts and publications[0].model_version == version:
            return Published(version, skipped=True)
        users = lag.users_behind(connection, version)
        items = lag.items_behind(connection, version)
        if users or items:
            raise NotReady(
                f"the vectors of {users:,} users and {items:,} items under {version} are behind the log,"
                " and so behind the statistics; run `bahe embed` first."
            )
        with runs.record(connection, JOB, fingerprint) as run:
            since = last.snapshot_read if ours and last else None
            further = _further_views(store, version, home.models / version)
            rows = _write_online(store, connection, since, further)
            rules = home_dataset(home).impressions
            counted.write(home, counted.count(connection, rules, run.snapshot_read))
            unread = _not_reading_back(store, connection, version, run.snapshot_read)
            if unread and since is not None:
                say(f"  {escape(unread)} is not online as it should be, so everything is written anew")
                rows += _materialize(store, connection, None)
                unread = _not_reading_back(store, connection, version, run.snapshot_read)
            if unread:
                raise BaheError(
                    f"{unread} does not read back from the online store as written; the live model was left"
                    " as it is, so run `bahe publish` again."
                )
            texts = connection.execute(f"SELECT item_id, text FROM {LATEST_ITEMS} ORDER BY item_id")
            with replace_atomically(home.catalogue_of_items) as part:
                pq.write_table(texts.to_arrow_table(), part)
            facts = {"model_version": version, "since": since, "team_content": team}
            done = run.statement(facts, rows_read=rows, rows_written=rows)
            pointer.flip(store, connection, version, [done])
    return Published(version, skipped=False, rows=rows)


def _rolled_back(
    latest: Mapping[str, runs.Run], publications: Sequence[pointer.Pointer], said: pointer.Pointer | None
) -> bool:
    """Whether a rollback made live what is live, and no model was embedded since.

    Not where the online store `said` something later: a publish that goes forward was killed there.
    """
    left, embedded = latest.get(ROLLBACK), latest["embed"]
    if not publications or left is None or left.snapshot_read < embedded.snapshot_read:
        return False
    live = publications[0]
    return live.model_version != embedded.facts["model_version"] and (
        said is None or said.second <= live.second
    )


def _restored(
    home: Home, store: FeatureStore, connection: duckdb.DuckDBPyConnection, version: str, left: str
) -> Published:
    """Write to a store what the one before it had, and make a version that was rolled back to live again.

    Raises NotReady when the lake has no vectors of it any more.
    """
    further = _further_views(store, version, home.models / version)
    # A rollback once more: the next publish goes on from what the last one wrote.
    with runs.record(connection, ROLLBACK, version) as run:
        rows, as_published = _materialize_as_published(store, connection, home, [*VIEWS, *further])
        if not as_published:
            rules = home_dataset(home).impressions
            counted.write(home, counted.count(connection, rules, run.snapshot_read))
        if not _is_online(store, connection, version, run.snapshot_read):
            raise NotReady(
                f"the lake has no vectors of {version} any more, which a rollback had made live; run `bahe"
                " train` and `bahe embed` to go on with a newer one."
            )
        facts = {"model_version": version, "left_version": left}
        pointer.flip(store, connection, version, [run.statement(facts, rows_read=rows, rows_written=rows)])
    return Published(version, skipped=False, rows=rows)


def rollback(home: Home, to: str | None = None) -> Published:
    """Make the version that was live before (or the one named) live again; only the pointer is written.

    Raises BadInput when there is no such version or its artifact is gone, NotReady when its vectors are.
    """
    store = open_store(home)
    with home.exclusive(), lake(home) as connection, online_errors(home):
        versions = list(dict.fromkeys(p.model_version for p in pointer.recorded(connection)))
        if not versions:
            raise NotReady(f"{home.root} has nothing published; run `bahe publish` first.")
        live, *others = versions
        if to is None and not others:
            raise BadInput(
                f"{live} is the only version that was ever live, so there is none to go back to."
            )
        version = to or others[0]
        if version not in versions:
            raise BadInput(f"--to {version} was never live; choose from {', '.join(versions)}.")
        said = pointer.online(store)
        if said is not None and said.model_version == version == live:
            return Published(version, skipped=True)
        if not (home.models / version / "config.json").is_file():
            raise BadInput(
                f"the artifact of {version} is no longer in {home.models}, so it cannot answer; the live"
                " model was left as it is."
            )
        require_servable(home.models / version)
        with runs.record(connection, ROLLBACK, version) as run:
            if not _is_online(store, connection, version, run.snapshot_read):
                raise NotReady(
                    f"vectors of {version} are no longer in the online store; the live model was left as it"
                    " is."
                )
            further = _further_views(store, version, home.models / version)
            if further:  # they were written when this version was published last
                _materialize_as_published(store, connection, home, further)
            facts = {"model_version": version, "left_version": live}
            pointer.flip(store, connection, version, [run.statement(facts)])
    return Published(version, skipped=False)


def _listed(artifact: Path) -> list[str]:
    """The further features that a model reads, as `view:feature`."""
    return list(chain.from_iterable(further_features(read_config(artifact)).values()))


def _further_views(store: FeatureStore, version: str, artifact: Path) -> list[str]:
    """The views that the model's further features are of, beside those that are always online.

    Raises NotReady when one of them is not registered to be online, or has vectors of another width than
    the model reads.
    """
    views = sorted(stored_views(store, _listed(artifact)) - set(VIEWS))
    registered = {view.name for view in store.list_feature_views() if view.online}
    for view in views:
        if view not in registered:
            raise NotReady(
                f"{version} reads {view}, which is not registered to be online; run `bahe apply` first."
            )
    reads = vector_widths_of(read_config(artifact))
    for reference, width in vector_widths(store, list(reads)).items():
        if width != reads[reference]:
            raise NotReady(
                f"{version} reads vectors of {reads[reference]} numbers of {reference}, which has {width}"
                " now; run `bahe frame`, `bahe train` and `bahe embed` first."
            )
    return views


def _write_online(
    store: FeatureStore,
    connection: duckdb.DuckDBPyConnection,
    since: int | None,
    further: Sequence[str],
) -> int:
    """Write what changed after a snapshot (None: everything) online, and further views; rows written."""
    if since is not None:
        taken_back.forget(store, connection, since, [*VIEWS, *further], _end(connection))
    rows = _materialize(store, connection, since)
    # Whole: a window also changes when nothing happens.
    return rows + (_materialize(store, connection, None, further) if further else 0)


def _materialize(
    store: FeatureStore,
    connection: duckdb.DuckDBPyConnection,
    since: int | None,
    views: Sequence[str] = VIEWS,
) -> int:
    """Write the newest values of keys changed after a snapshot (None: of all) online; rows written."""
    store.config.offline_store.changed_since = since
    # Feast prints what it does on standard output, where answers belong.
    with contextlib.redirect_stdout(io.StringIO()):
        store.materialize(
            start_date=datetime(1970, 1, 2, tzinfo=UTC),
            end_date=_end(connection),
            feature_views=list(views),
        )
    rows: int = store.provider.batch_engine.take_rows()
    return rows


def _materialize_as_published(
    store: FeatureStore, connection: duckdb.DuckDBPyConnection, home: Home, views: Sequence[str]
) -> tuple[int, bool]:
    """Write views online as of the log that the last publish found; as of now where that cannot be.

    Returns the rows written, and whether they are as of that log.
    """
    said, offline = counted.read(home), store.config.offline_store
    try:
        offline.as_of = said.snapshot if said is not None else None
        return _materialize(store, connection, None, views), said is not None
    except BadInput:  # the lake has forgotten that snapshot, or a view has come since
        offline.as_of = None
        return _materialize(store, connection, None, views), False
    finally:
        offline.as_of = None


def _end(connection: duckdb.DuckDBPyConnection) -> datetime:
    """The moment up to which values are written online: now, and all that the log has."""
    newest = connection.execute(
        """
        SELECT max(event_timestamp) FROM (
            SELECT event_timestamp FROM behaviors
            UNION ALL
            SELECT event_timestamp FROM impressions
            UNION ALL
            SELECT event_timestamp FROM items
        )
        """
    ).fetchone()
    assert newest is not None
    last: datetime = max(newest[0], datetime.now(UTC))
    return last + timedelta(seconds=1)


def _not_reading_back(
    store: FeatureStore, connection: duckdb.DuckDBPyConnection, version: str, seed: int
) -> str | None:
    """The first entity of a sample whose online values differ from the lake's; None when all agree."""
    for entity in ("user", "item"):
        sample = _sample(connection, entity, version, seed)
        keys = sample[f"{entity}_id"]
        features = [f"{entity}_embedding:embedding", f"{entity}_stats:{entity}_impressions"]
        rows = [{f"{entity}_id": key, "model_version": version} for key in keys]
        answer = store.get_online_features(features, entity_rows=rows).to_dict() if rows else {}
        for column in ("embedding", f"{entity}_impressions"):
            for key, in_lake, online in zip(keys, sample[column], answer.get(column, ()), strict=True):
                if online != in_lake:
                    return f"{entity} {key}"
    return None


def _is_online(store: FeatureStore, connection: duckdb.DuckDBPyConnection, version: str, seed: int) -> bool:
    """Whether a sample of users and items has vectors of the version online."""
    for entity in ("user", "item"):
        keys = _sample(connection, entity, version, seed)[f"{entity}_id"]
        rows = [{f"{entity}_id": key, "model_version": version} for key in keys]
        if not rows:
            return False
        answer = store.get_online_features([f"{entity}_embedding:embedding"], entity_rows=rows).to_dict()
        if None in answer["embedding"]:
            return False
    return True


def _sample(
    connection: duckdb.DuckDBPyConnection, entity: str, version: str, seed: int
) -> dict[str, list[Any]]:
    """The newest vectors of the version and a random few, with the latest statistics of their entities."""
    key, impressions = f"{entity}_id", f"{entity}_impressions"
    vectors = f"FROM {entity}_embedding WHERE model_version = $version"
    table = connection.execute(
        f"""
        WITH picked AS (
            (SELECT {key} {vectors} ORDER BY created_timestamp DESC LIMIT {SAMPLE})
            UNION
            (SELECT {key} {vectors} ORDER BY hash({key}, $seed) LIMIT {SAMPLE})
        )
        SELECT
            {key},
            any_value(embedding) AS embedding,
            arg_max({impressions}, s.event_timestamp) AS {impressions}
        FROM (SELECT {key}, embedding {vectors} AND {key} IN (FROM picked))
        LEFT JOIN {entity}_stats s USING ({key})
        GROUP BY {key}
        """,
        {"version": version, "seed": seed},
    ).to_arrow_table()
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns
