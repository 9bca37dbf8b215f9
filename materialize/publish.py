"""Vectors and statistics to the online store, through Feast; then one pointer is flipped.

Vectors are keyed by model_version, so a new version is written beside the live one and nobody sees
it before the pointer says so.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow.parquet as pq

from bahe_core.errors import BaheError, NotReady
from bahe_core.home import Home
from bahe_models.artifact import require_servable
from materialize import runs
from materialize.feature_store import open_store
from materialize.gates import require_gates
from materialize.lake import commit, lake, quoted

if TYPE_CHECKING:
    from feast import FeatureStore

JOB = "publish"
DEPLOYMENT = "default"
VIEWS = (
    "user_stats",
    "item_stats",
    "user_timeline",
    "user_recent_atoms",
    "item_attributes",
    "user_embedding",
    "item_embedding",
)
SAMPLE = 50
"""Vectors read back before the pointer is flipped."""


@dataclass(frozen=True)
class Published:
    """What a run of `publish` did."""

    model_version: str
    skipped: bool


def publish(home: Home) -> Published:
    """Write everything online for the last embedded model_version, check it, and flip the pointer.

    Does nothing when that version is live with the log as it is. Raises BaheError, and leaves the
    pointer alone, when what was written does not read back. Raises NotServable when nothing is embedded
    and the last trained model cannot be.
    """
    store = open_store(home)
    with home.exclusive(), lake(home) as connection:
        embedded, ingested = runs.last(connection, "embed"), runs.last(connection, "ingest")
        if embedded is None or ingested is None:
            trained = runs.last(connection, "train")
            if trained is not None:
                require_servable(home.models / trained.fingerprint)
            raise NotReady(f"{home.root} has no vectors yet; run `bahe embed` first.")
        require_gates(connection, JOB)
        version = str(embedded.facts["model_version"])
        fingerprint = f"{version} {embedded.finished.isoformat()} {ingested.fingerprint}"
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == fingerprint and home.online_store.is_file():
            return Published(version, skipped=True)
        with runs.record(connection, JOB, fingerprint) as run:
            newest = connection.execute(
                "SELECT max(event_timestamp) FROM (SELECT event_timestamp FROM behaviors UNION ALL"
                " SELECT event_timestamp FROM impressions UNION ALL"
                " SELECT event_timestamp FROM items)"
            ).fetchone()
            assert newest is not None
            end = max(newest[0], datetime.now(UTC)) + timedelta(seconds=1)
            # Feast prints what it does on standard output, where answers belong.
            with contextlib.redirect_stdout(io.StringIO()):
                store.materialize(
                    start_date=datetime(1970, 1, 2, tzinfo=UTC), end_date=end, feature_views=list(VIEWS)
                )
            sample = connection.execute(
                "SELECT user_id, embedding FROM user_embedding WHERE model_version = ?"
                f" ORDER BY hash(user_id) LIMIT {SAMPLE}",
                [version],
            ).to_arrow_table()
            _read_back(store, sample.to_pydict(), version)
            items = connection.execute("SELECT item_id, text FROM items ORDER BY item_id").to_arrow_table()
            temporary = home.catalogue_of_items.with_suffix(".part")
            pq.write_table(items, temporary)
            temporary.replace(home.catalogue_of_items)
            now = datetime.now(UTC)
            store.write_to_online_store(
                "live_model",
                pd.DataFrame(
                    {
                        "deployment": [DEPLOYMENT],
                        "live_model_version": [version],
                        "event_timestamp": [now],
                        "created_timestamp": [now],
                    }
                ),
            )
            stamp = f"TIMESTAMPTZ {quoted(now.isoformat())}"
            commit(
                connection,
                [
                    f"INSERT INTO publications VALUES ({quoted(DEPLOYMENT)}, {quoted(version)},"
                    f" {stamp}, {stamp})",
                    run.statement({"model_version": version}),
                ],
            )
    return Published(version, skipped=False)


def _read_back(store: FeatureStore, sample: dict[str, list[object]], version: str) -> None:
    rows = [{"user_id": user, "model_version": version} for user in sample["user_id"]]
    answer = store.get_online_features(["user_embedding:embedding"], entity_rows=rows).to_dict()
    for user, wanted, got in zip(sample["user_id"], sample["embedding"], answer["embedding"], strict=True):
        if got != wanted:
            raise BaheError(
                f"user {user} does not read back from the online store as written; the live model"
                " was left as it is, so run `bahe publish` again."
            )
