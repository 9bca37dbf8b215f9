"""User and item vectors of one model_version; only users whose timelines changed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb
import numpy as np
import pyarrow as pa
import torch

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_core.progress import progress
from bahe_models.artifact import Artifact, load, require_servable
from materialize import runs
from materialize.encode import vector_column
from materialize.gates import require_gates
from materialize.ingest import home_dataset
from materialize.lake import commit, lake, quoted
from materialize.training_data import Atoms, read_atoms, read_timelines

JOB = "embed"
USERS_PER_BATCH = 2000
SEEN_ITEMS = 1000
"""How many of the latest items a user acted on are stored with the vector."""

# Everyone the log knows, with the moment their vector speaks of: the last behavior, or for a user
# without any the moment they became known.
_USERS = """
CREATE OR REPLACE TEMP TABLE everyone AS
SELECT user_id, coalesce(max(last_behavior), min(known)) AS event_timestamp,
       coalesce(max(behaviors), 0)::BIGINT AS behaviors, any_value(seen_items) AS seen_items
FROM (
    SELECT user_id, event_timestamp AS known, NULL AS last_behavior, NULL AS behaviors,
           NULL::VARCHAR[] AS seen_items FROM impressions
    {users}
    UNION ALL BY NAME
    SELECT user_id, min(event_timestamp) AS known, max(event_timestamp) AS last_behavior,
           count(*) AS behaviors,
           list_distinct(list(item_id::VARCHAR ORDER BY event_timestamp DESC)
               FILTER (item_id IS NOT NULL))[:{seen}] AS seen_items
    FROM behaviors GROUP BY user_id
) GROUP BY user_id
"""


@dataclass(frozen=True)
class Embedded:
    """What a run of `embed` did."""

    model_version: str
    users_added: int
    items_added: int
    users: int
    items: int


def embed(home: Home, *, model_version: str | None = None, device_name: str | None = None) -> Embedded:
    """Compute the vectors that the model_version (the last trained one) does not have yet.

    Raises NotServable, and writes nothing, when vectors do not suffice to score with the model.
    """
    dataset = home_dataset(home)
    with home.exclusive(), lake(home) as connection:
        trained = runs.last(connection, "train")
        version = model_version or (trained.fingerprint if trained else None)
        if version is None or not (home.models / version).is_dir():
            raise NotReady(f"{home.root} has no trained model yet; run `bahe train` first.")
        require_gates(connection, JOB)
        require_servable(home.models / version)
        connection.execute(
            _USERS.format(
                users="UNION ALL BY NAME SELECT user_id, event_timestamp AS known FROM users"
                if dataset.users is not None
                else "",
                seen=SEEN_ITEMS,
            )
        )
        users = connection.execute(
            "SELECT e.* FROM everyone e ANTI JOIN (SELECT user_id, behaviors FROM user_embedding"
            " WHERE model_version = ?) USING (user_id, behaviors) ORDER BY user_id",
            [version],
        ).to_arrow_table()
        items = connection.execute(
            "SELECT item_id, atom_id, event_timestamp FROM items ANTI JOIN (SELECT item_id FROM"
            " item_embedding WHERE model_version = ?) USING (item_id) ORDER BY item_id",
            [version],
        ).to_arrow_table()
        counts = _counts(connection)
        facts = {"model_version": version, **counts}
        last = runs.last(connection, JOB)
        known = last is not None and {k: last.facts.get(k) for k in facts} == facts
        if not users.num_rows and not items.num_rows and known:
            return Embedded(version, 0, 0, **counts)
        artifact = load(home.models / version)
        artifact.model.to(device(device_name))
        atoms = read_atoms(connection, artifact.encoder_version)
        with runs.record(connection, JOB, version) as run:
            _embed_users(connection, artifact, atoms, users, dataset.channels)
            _embed_items(connection, artifact, atoms, items)
            written = users.num_rows + items.num_rows
            done = run.statement(
                {**facts, "width": artifact.vector_width}, rows_read=written, rows_written=written
            )
            commit(connection, [done])
    return Embedded(version, users.num_rows, items.num_rows, **counts)


def _counts(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    row = connection.execute(
        "SELECT (SELECT count(*) FROM everyone), (SELECT count(*) FROM items)"
    ).fetchone()
    assert row is not None
    return {"users": row[0], "items": row[1]}


def _embed_users(
    connection: duckdb.DuckDBPyConnection,
    artifact: Artifact,
    atoms: Atoms,
    users: pa.Table,
    channels: list[str],
) -> None:
    """Batch by batch, each committed: a killed run goes on where it stopped."""
    atoms_AD = torch.from_numpy(atoms.vectors).to(_device_of(artifact))
    with progress("embedding users", users.num_rows) as advance:
        for start in range(0, users.num_rows, USERS_PER_BATCH):
            part = users.slice(start, USERS_PER_BATCH)
            timelines = read_timelines(connection, atoms, part["user_id"].combine_chunks(), channels)
            vectors = artifact.user_vectors(
                atoms_AD, atoms.ids, timelines, np.arange(part.num_rows), timelines.lengths()
            )
            _replace(connection, "user_embedding", "user_id", part, vectors, artifact)
            advance(part.num_rows)


def _embed_items(
    connection: duckdb.DuckDBPyConnection, artifact: Artifact, atoms: Atoms, items: pa.Table
) -> None:
    if not items.num_rows:
        return
    atoms_ND = torch.from_numpy(atoms.vectors[atoms.rows(items["atom_id"])]).to(_device_of(artifact))
    vectors = artifact.item_vectors(atoms_ND, items["item_id"].to_pylist())
    rows = items.drop_columns(["atom_id"])
    _replace(connection, "item_embedding", "item_id", rows, vectors, artifact)


def _device_of(artifact: Artifact) -> torch.device:
    return next(artifact.model.parameters()).device


def _replace(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    key: str,
    rows: pa.Table,
    vectors: np.ndarray,
    artifact: Artifact,
) -> None:
    """Put the new vectors in place of the same keys' old ones, in one transaction."""
    connection.register("fresh", rows.append_column("embedding", vector_column(vectors)))
    version = quoted(artifact.model_version)
    now = quoted(datetime.now(UTC).isoformat())
    commit(
        connection,
        [
            f"DELETE FROM {table} WHERE model_version = {version} AND {key} IN (SELECT {key} FROM fresh)",
            f"INSERT INTO {table} BY NAME SELECT *, {version} AS model_version,"
            f" TIMESTAMPTZ {now} AS created_timestamp FROM fresh",
        ],
    )
    connection.unregister("fresh")
