"""User and item vectors of one model_version; only where what they are made from changed.

A user's vector carries a hash of the behaviors that it was made from, and an item's the atom of its text,
so that it can be told whether it is still right, whatever changed: behaviors that came late, went, or were
replaced. Whom to ask about is known from the lake's change feed since the last run; where that does not
reach back (another model_version, a killed run, expired snapshots, a table made anew), everyone is asked
about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

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
from bahe_lake.catalogue import scalar, snapshot
from bahe_lake.connection import LAKE, connect, lake
from bahe_lake.sql import sql_literal
from bahe_lake.transactions import commit
from bahe_lake.vector_columns import vector_column
from bahe_lake.versions import LATEST_ITEMS
from bahe_models.artifact import Artifact, load, require_servable
from bahe_models.timelines import Timelines
from materialize.config.dataset import home_dataset
from materialize.executors import LOCAL, ExecutorConfig, start
from materialize.gate import gated, require_gates
from materialize.ingest import derive
from materialize.vectors.stored_atoms import Atoms, stored_atoms
from materialize.vectors.timelines import read_timelines

JOB = "embed"
USERS_PER_BATCH = 20_000
BEHAVIORS_PER_BATCH = 250_000
"""A batch of users is what is read, held in memory and committed at a time."""
ITEMS_PER_BATCH = 50_000
SEEN_ITEMS = 1000
"""How many of the latest items a user acted on are stored with the vector."""

_NO_ITEMS = pa.table({"atom_id": pa.array([], pa.int64())})
_OWN_COLUMNS = {
    "user_embedding": ("timeline_hash", "UBIGINT"),
    "item_embedding": ("atom_id", "BIGINT"),
}
"""What a vector was made from; none of the features' business."""


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
    """Compute the vectors that the model_version (the last trained one) lacks, or has of an older log.

    When there are none, no model is loaded. Raises NotServable, and writes nothing, when vectors do not
    suffice to score with the model.
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
            and _changed_users(connection, sources, before.get("snapshot"), now)
        )
        if not followed:
            _all_users(connection, sources, version)
        users = _users_to_embed(connection, sources, version)
        items = _items_to_embed(connection, version)
        gone = _gone(connection, version)
        asked = scalar(connection, "SELECT count(*) FROM candidates")
        if followed and not asked and not items.num_rows and not gone:
            return Embedded(version, 0, 0, before["users"], before["items"])
        with runs.record(connection, JOB, version) as run:
            commit(connection, gone)
            if users.num_rows or items.num_rows:
                artifact = load(home.models / version)
                artifact.model.to(device(device_name))
                here = where.kind == "local"
                with _atoms_of(connection, home, artifact, users if here else users[:0], items) as atoms:
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
    """Homes are made without; each commit is a snapshot, so only where they are missing."""
    for table, (column, kind) in _OWN_COLUMNS.items():
        known = connection.execute(f"SELECT column_name FROM (DESCRIBE {table})").fetchall()
        if (column,) not in known:
            commit(connection, [f"ALTER TABLE {table} ADD COLUMN {column} {kind}"])


def _changed_users(
    connection: duckdb.DuckDBPyConnection, sources: list[str], since: int | None, now: int
) -> bool:
    """Fill `candidates` from the change feed after that snapshot; False when the feed does not reach."""
    if since is None or since > now:
        return False
    listed = ", ".join(sql_literal(f"main.{table}") for table in sources)
    whole = connection.execute(
        f"SELECT count(*) = $now - $since AND NOT coalesce(bool_or("
        f" list_has_any(coalesce(changes['tables_created'], []), [{listed}])), false)"
        f" FROM {LAKE}.snapshots() WHERE snapshot_id > $since AND snapshot_id <= $now",
        {"since": since, "now": now},
    ).fetchone()
    assert whole is not None
    if not whole[0]:
        return False
    feeds = [
        f"SELECT user_id FROM {LAKE}.table_changes({sql_literal(table)}, {since + 1}, {now})"
        for table in sources
    ]
    if since == now:
        feeds = [f"SELECT user_id FROM {sources[0]} LIMIT 0"]
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE candidates AS SELECT DISTINCT user_id"
        f" FROM ({' UNION ALL '.join(feeds)})"
    )
    return True


def _all_users(connection: duckdb.DuckDBPyConnection, sources: list[str], version: str) -> None:
    """Fill `candidates` with whoever the log knows or has a vector."""
    known = " UNION ALL ".join(f"SELECT user_id FROM {table}" for table in sources)
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE candidates AS SELECT DISTINCT user_id FROM ({known}"
        f" UNION ALL SELECT user_id FROM user_embedding WHERE model_version = {sql_literal(version)})"
    )


def _users_to_embed(connection: duckdb.DuckDBPyConnection, sources: list[str], version: str) -> pa.Table:
    """user_id, event_timestamp, behaviors and timeline_hash of the candidates whose vector is not right.

    The vector speaks of the last behavior, or for a user without any of the moment they became known; never
    of an earlier moment than the one it replaces, which an online store would keep.
    """
    known = " ".join(
        f"UNION ALL BY NAME SELECT user_id, min(event_timestamp) AS known FROM {table}"
        " SEMI JOIN candidates USING (user_id) GROUP BY user_id"
        for table in sources[1:]
    )
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE everyone AS SELECT user_id,"
        " coalesce(max(last_behavior), min(known)) AS event_timestamp,"
        " coalesce(max(behaviors), 0)::BIGINT AS behaviors, coalesce(max(mixed), 0) AS timeline_hash FROM ("
        " SELECT user_id, max(event_timestamp) AS last_behavior, count(*) AS behaviors,"
        " bit_xor(hash(channel, atom_id, event_timestamp, item_id::VARCHAR)) AS mixed"
        f" FROM behaviors SEMI JOIN candidates USING (user_id) GROUP BY user_id {known}) GROUP BY user_id"
    )
    return connection.execute(
        "SELECT e.user_id, greatest(e.event_timestamp, s.event_timestamp) AS event_timestamp, e.behaviors,"
        " e.timeline_hash FROM everyone e LEFT JOIN (SELECT user_id, event_timestamp, behaviors,"
        " timeline_hash FROM user_embedding WHERE model_version = ?) s USING (user_id)"
        " WHERE (e.behaviors, e.timeline_hash) IS DISTINCT FROM (s.behaviors, s.timeline_hash)"
        " ORDER BY e.user_id",
        [version],
    ).to_arrow_table()


def _items_to_embed(connection: duckdb.DuckDBPyConnection, version: str) -> pa.Table:
    """item_id, event_timestamp and atom_id of the items whose text the vector is not of."""
    return connection.execute(
        "SELECT i.item_id, greatest(i.event_timestamp, s.event_timestamp) AS event_timestamp, i.atom_id"
        f" FROM {LATEST_ITEMS} i LEFT JOIN (SELECT item_id, event_timestamp, atom_id FROM item_embedding"
        " WHERE model_version = ?) s USING (item_id) WHERE i.atom_id IS DISTINCT FROM s.atom_id"
        " ORDER BY i.item_id",
        [version],
    ).to_arrow_table()


def _gone(connection: duckdb.DuckDBPyConnection, version: str) -> list[str]:
    """Statements that delete the vectors of users and items that the log no longer knows."""
    rows = {
        "user_embedding": "user_id IN (SELECT user_id FROM candidates ANTI JOIN everyone USING (user_id))",
        "item_embedding": "item_id NOT IN (SELECT item_id FROM items)",
    }
    of_version = {
        table: f"{table} WHERE model_version = {sql_literal(version)} AND {r}" for table, r in rows.items()
    }
    return [
        f"DELETE FROM {which}"
        for which in of_version.values()
        if scalar(connection, f"SELECT count(*) FROM {which}")
    ]


def _counts(connection: duckdb.DuckDBPyConnection, sources: list[str]) -> dict[str, int]:
    known = " UNION ".join(f"SELECT user_id FROM {table}" for table in sources)
    return {
        "users": scalar(connection, f"SELECT count(*) FROM ({known})"),
        "items": scalar(connection, "SELECT count(DISTINCT item_id) FROM items"),
    }


def _atoms_of(
    connection: duckdb.DuckDBPyConnection, home: Home, artifact: Artifact, users: pa.Table, items: pa.Table
) -> Any:
    """The vectors that these users and items need, on disk (a context manager)."""
    connection.register("users_to_embed", users)
    connection.register("items_to_embed", items)
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE needed_atoms AS"
        " SELECT DISTINCT atom_id FROM user_timeline SEMI JOIN users_to_embed USING (user_id)"
        " UNION SELECT atom_id FROM items_to_embed"
    )
    connection.unregister("users_to_embed")
    connection.unregister("items_to_embed")
    width = artifact.model.aggregator.start_D.numel()
    return stored_atoms(connection, artifact.encoder_version, "needed_atoms", home.spill, width)


def _batches(users: pa.Table) -> Iterator[pa.Table]:
    """Neighbours by user_id, which lie together in the timelines' files."""
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
    """Batch by batch, each committed: a killed run goes on where it stopped."""
    if not users.num_rows:
        return
    with start(where) as executor, progress("embedding users", users.num_rows) as advance:
        for rows, vectors in executor.map(make, _batches(users)):
            _replace(connection, "user_embedding", "user_id", rows, vectors, artifact)
            advance(rows.num_rows)


class UserEmbedder:
    """Timelines from the lake through a model."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        artifact: Artifact,
        atoms: Atoms,
        channels: list[str],
        held: object = None,
    ) -> None:
        self._connection, self._artifact = connection, artifact
        self._atoms, self._channels = atoms, channels
        self._held = held  # what the atoms' file lives as long as

    def __call__(self, users: pa.Table) -> tuple[pa.Table, np.ndarray]:
        """Rows of these users as they are stored, and beside them their vectors [users, width]."""
        ids = users["user_id"].combine_chunks()
        timelines = read_timelines(self._connection, self._atoms, ids, self._channels)
        atoms_AD, ids_A, timelines = _used(self._atoms, timelines, self._artifact)
        vectors = self._artifact.user_vectors(
            atoms_AD, ids_A, timelines, np.arange(users.num_rows), timelines.lengths()
        )
        return users.append_column("seen_items", _seen_items(self._connection, users)), vectors


def user_embedder(
    home: Home, model_version: str, users: pa.Table, channels: list[str], device_name: str | None
) -> UserEmbedder:
    """On a worker elsewhere, for any of these users. Raises NotReady where the home's models are not."""
    path = home.models / model_version
    if not path.is_dir():
        raise NotReady(f"{path} is not on every node; put the home on a folder that all of them have.")
    artifact = load(path)
    artifact.model.to(device(device_name))
    connection = connect(home)
    held = ExitStack()  # for as long as the worker is there
    atoms = held.enter_context(_atoms_of(connection, home, artifact, users, _NO_ITEMS))
    return UserEmbedder(connection, artifact, atoms, channels, held)


def _used(
    atoms: Atoms, timelines: Timelines, artifact: Artifact
) -> tuple[torch.Tensor, np.ndarray, Timelines]:
    """The atoms that some timelines name: vectors on the model's device, ids, and timelines that count
    among them."""
    used = np.unique(np.concatenate([*timelines.atoms, [0]]))  # one at least, for users without behaviors
    renumbered = tuple(np.searchsorted(used, rows) for rows in timelines.atoms)
    atoms_AD = torch.from_numpy(atoms.vectors[used]).to(_device_of(artifact))
    fewer = Timelines(timelines.channels, timelines.offsets, renumbered, timelines.time_us)
    return atoms_AD, atoms.ids[used], fewer


def _seen_items(connection: duckdb.DuckDBPyConnection, users: pa.Table) -> pa.ChunkedArray:
    """The latest items of each of these users (sorted by user_id), in their order."""
    connection.register("part", users.select(["user_id"]))
    ends = [users["user_id"][0].as_py(), users["user_id"][-1].as_py()]
    table = connection.execute(
        "SELECT seen_items FROM part LEFT JOIN (SELECT user_id, list_distinct(list(item_id::VARCHAR"
        f" ORDER BY event_timestamp DESC) FILTER (item_id IS NOT NULL))[:{SEEN_ITEMS}] AS seen_items"
        " FROM behaviors SEMI JOIN part USING (user_id) WHERE user_id BETWEEN ? AND ? GROUP BY user_id)"
        " USING (user_id) ORDER BY user_id",
        ends,
    ).to_arrow_table()
    connection.unregister("part")
    return table["seen_items"]


def _embed_items(
    connection: duckdb.DuckDBPyConnection, artifact: Artifact, atoms: Atoms, items: pa.Table
) -> None:
    for first in range(0, items.num_rows, ITEMS_PER_BATCH):
        part = items.slice(first, ITEMS_PER_BATCH)
        atoms_ND = torch.from_numpy(atoms.vectors[atoms.rows(part["atom_id"])]).to(_device_of(artifact))
        vectors = artifact.item_vectors(atoms_ND, part["item_id"].to_pylist())
        _replace(connection, "item_embedding", "item_id", part, vectors, artifact)


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
    version = sql_literal(artifact.model_version)
    now = sql_literal(datetime.now(UTC).isoformat())
    commit(
        connection,
        [
            f"DELETE FROM {table} WHERE model_version = {version} AND {key} IN (SELECT {key} FROM fresh)",
            f"INSERT INTO {table} BY NAME SELECT *, {version} AS model_version,"
            f" TIMESTAMPTZ {now} AS created_timestamp FROM fresh",
        ],
    )
    connection.unregister("fresh")
