"""User and item vectors of one model_version, computed only where their source changed.

A user's vector carries a hash of the behaviors it was made from, an item's the atom of its text. Comparing
these shows whether a vector is still right, whether behaviors arrived late, went or were replaced. Which
users to compare comes from the lake's change feed since the last run; where the feed does not reach back
(another model_version, a killed run, expired snapshots, a table created anew), all users are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import duckdb
import numpy as np
import pyarrow as pa
import torch

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_core.progress import progress
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.catalogue import columns, scalar, snapshot
from bahe_lake.connection import lake
from bahe_lake.sql import sql_literal
from bahe_lake.transactions import commit
from bahe_models import Artifact, load, require_servable
from materialize.config.dataset import home_dataset
from materialize.executors import LOCAL, ExecutorConfig, start
from materialize.gate import gated, require_gates
from materialize.ingest import derive
from materialize.vectors.stale_vectors import (
    all_users_into_candidates,
    changed_users_into_candidates,
    deletions,
    items_to_embed,
    users_to_embed,
)
from materialize.vectors.stored_atoms import Atoms
from materialize.vectors.user_embedder import UserEmbedder, atoms_needed, device_of, user_embedder
from materialize.vectors.vector_columns import vector_column

JOB = "embed"
USERS_PER_BATCH = 20_000
BEHAVIORS_PER_BATCH = 250_000
"""A batch of users is what is read, held in memory and committed at a time."""
ITEMS_PER_BATCH = 50_000

_OWN_COLUMNS = {
    "user_embedding": ("timeline_hash", "UBIGINT"),
    "item_embedding": ("atom_id", "BIGINT"),
}
"""What a vector was made from; not a feature."""


@dataclass(frozen=True)
class Embedded(Result):
    """What a run of `embed` did."""

    model_version: str
    users_added: int
    items_added: int
    users: int
    items: int

    @property
    def summary(self) -> list[str]:
        """How many vectors are new."""
        return [
            f"{self.model_version}: {self.users_added:,} of {self.users:,} users and"
            f" {self.items_added:,} of {self.items:,} items embedded"
        ]


@gated("embed")
def embed(
    home: Home,
    *,
    model_version: str | None = None,
    device_name: str | None = None,
    where: ExecutorConfig = LOCAL,
) -> Embedded:
    """Compute the vectors that a model_version (the last trained one) lacks or has from an older log.

    Loads no model when there are none to compute. Raises NotServable, and writes nothing, when the model
    needs more than vectors to score.
    """
    dataset = home_dataset(home)
    with home.exclusive(), lake(home) as connection:
        trained = runs.last(connection, "train")
        version = model_version or (trained.fingerprint if trained else None)
        if version is None or not (home.models / version).is_dir():
            raise NotReady(f"{home.root} has no trained model yet; run `bahe train` first.")
        require_gates(connection, JOB)
        require_servable(home.models / version)
        _add_own_columns(connection)
        sources = ["behaviors", "impressions", *(["users"] if dataset.users is not None else [])]
        last = runs.last(connection, JOB)
        before = last.facts if last is not None and last.fingerprint == version else {}
        now = snapshot(connection)
        stored = scalar(
            connection, f"SELECT count(*) FROM user_embedding WHERE model_version = {sql_literal(version)}"
        )
        followed = (
            before.get("derived") == derive.VERSION
            and before["users"] == stored
            and changed_users_into_candidates(connection, sources, before.get("snapshot"), now)
        )
        if not followed:
            all_users_into_candidates(connection, sources, version)
        users = users_to_embed(connection, sources, version)
        items = items_to_embed(connection, version)
        gone = deletions(connection, version)
        asked = scalar(connection, "SELECT count(*) FROM candidates")
        if followed and not asked and not items.num_rows and not gone:
            return Embedded(version, 0, 0, before["users"], before["items"])
        with runs.record(connection, JOB, version) as run:
            commit(connection, gone)
            if users.num_rows or items.num_rows:
                artifact = load(home.models / version)
                artifact.model.to(device(device_name))
                here = where.kind == "local"
                with atoms_needed(connection, home, artifact, users if here else users[:0], items) as atoms:
                    make: Callable[[], UserEmbedder] = partial(
                        UserEmbedder, connection, artifact, atoms, dataset.channels
                    )
                    if not here:
                        make = partial(
                            user_embedder, home.elsewhere(), version, users, dataset.channels, device_name
                        )
                    _embed_users(connection, artifact, users, make, where)
                    _embed_items(connection, artifact, atoms, items)
                width = artifact.vector_width
            else:
                width = before.get("width") or load(home.models / version).vector_width
            counts = _counts(connection, sources)
            facts = {"snapshot": now, "derived": derive.VERSION, "width": width}
            written = users.num_rows + items.num_rows
            done = run.statement(
                {"model_version": version, **counts, **facts}, rows_read=written, rows_written=written
            )
            commit(connection, [done])
    return Embedded(version, users.num_rows, items.num_rows, **counts)


def _add_own_columns(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the columns that a new home's tables lack; each commit is a snapshot, so only when needed."""
    for table, (column, kind) in _OWN_COLUMNS.items():
        if column not in columns(connection, table):
            commit(connection, [f"ALTER TABLE {table} ADD COLUMN {column} {kind}"])


def _counts(connection: duckdb.DuckDBPyConnection, sources: list[str]) -> dict[str, int]:
    users = " UNION ".join(f"SELECT user_id FROM {table}" for table in sources)
    return {
        "users": scalar(connection, f"SELECT count(*) FROM ({users})"),
        "items": scalar(connection, "SELECT count(DISTINCT item_id) FROM items"),
    }


def _batches(users: pa.Table) -> Iterator[pa.Table]:
    """Users in batches of neighbours by user_id, whose timelines lie together in the files."""
    so_far = np.cumsum(users["behaviors"].to_numpy())
    start = 0
    while start < users.num_rows:
        before = so_far[start - 1] if start else 0
        stop = int(np.searchsorted(so_far, before + BEHAVIORS_PER_BATCH, side="right"))
        stop = min(max(stop, start + 1), start + USERS_PER_BATCH)
        yield users.take(np.arange(start, stop))  # a pickled slice would take the whole table along
        start = stop


def _embed_users(
    connection: duckdb.DuckDBPyConnection,
    artifact: Artifact,
    users: pa.Table,
    make: Callable[[], UserEmbedder],
    where: ExecutorConfig,
) -> None:
    """Embed and commit batch by batch, so that a killed run resumes where it stopped."""
    if not users.num_rows:
        return
    with start(where) as executor, progress("embedding users", users.num_rows) as advance:
        for rows, vectors in executor.map(make, _batches(users)):
            _replace(connection, "user_embedding", "user_id", rows, vectors, artifact)
            advance(rows.num_rows)


def _embed_items(
    connection: duckdb.DuckDBPyConnection, artifact: Artifact, atoms: Atoms, items: pa.Table
) -> None:
    for first in range(0, items.num_rows, ITEMS_PER_BATCH):
        part = items.slice(first, ITEMS_PER_BATCH)
        atoms_ND = torch.from_numpy(atoms.vectors[atoms.rows(part["atom_id"])]).to(device_of(artifact))
        vectors = artifact.item_vectors(atoms_ND, part["item_id"].to_pylist())
        _replace(connection, "item_embedding", "item_id", part, vectors, artifact)


def _replace(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    key: str,
    rows: pa.Table,
    vectors: np.ndarray,
    artifact: Artifact,
) -> None:
    """Replace the vectors of these keys, in one transaction.

    A vector holds what its model learned, so it is not known before the last impression that was read:
    a frame of earlier impressions does not get it.
    """
    connection.register("fresh", rows.append_column("embedding", vector_column(vectors)))
    since = artifact.trained_until
    known = "event_timestamp" if since is None else f"greatest(event_timestamp, {sql_literal(since)})"
    version, now = sql_literal(artifact.model_version), sql_literal(datetime.now(UTC))
    delete = f"DELETE FROM {table} WHERE model_version = {version} AND {key} IN (SELECT {key} FROM fresh)"
    insert = f"""
        INSERT INTO {table} BY NAME
        SELECT
            * REPLACE ({known} AS event_timestamp),
            {version} AS model_version,
            {now} AS created_timestamp
        FROM fresh
        """
    commit(connection, [delete, insert])
    connection.unregister("fresh")
