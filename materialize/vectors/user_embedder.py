"""Users' timelines through a trained model, here or on a worker elsewhere."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_lake.connection import connect
from bahe_models import Artifact, Timelines, load
from materialize.vectors.stored_atoms import Atoms, stored_atoms
from materialize.vectors.timelines import read_timelines

SEEN_ITEMS = 1000
"""How many of the latest items a user acted on, or clicked, are stored with the vector."""


NO_ITEMS = pa.table({"atom_id": pa.array([], pa.int64())})


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
        atoms_AD, ids_A, timelines = _only_used_atoms(self._atoms, timelines, self._artifact)
        vectors = self._artifact.user_vectors(
            atoms_AD, ids_A, timelines, np.arange(users.num_rows), timelines.lengths()
        )
        return users.append_column("seen_items", latest_items(self._connection, users)), vectors


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
    atoms = held.enter_context(atoms_needed(connection, home, artifact, users, NO_ITEMS))
    return UserEmbedder(connection, artifact, atoms, channels, held)


def atoms_needed(
    connection: duckdb.DuckDBPyConnection,
    home: Home,
    artifact: Artifact,
    users: pa.Table,
    items: pa.Table,
    *,
    encoder_version: str | None = None,
) -> Any:
    """The vectors that these users and items need, on disk (a context manager).

    Those of the model's encoder, or of the one named.
    """
    connection.register("users_to_embed", users)
    connection.register("items_to_embed", items)
    connection.execute(
        """
        CREATE OR REPLACE TEMP TABLE needed_atoms AS
        SELECT DISTINCT atom_id FROM user_timeline SEMI JOIN users_to_embed USING (user_id)
        UNION
        SELECT atom_id FROM items_to_embed
        """
    )
    connection.unregister("users_to_embed")
    connection.unregister("items_to_embed")
    width = artifact.model.aggregator.start_D.numel()
    version = encoder_version or artifact.encoder_version
    return stored_atoms(connection, version, "needed_atoms", home.spill, width)


def _only_used_atoms(
    atoms: Atoms, timelines: Timelines, artifact: Artifact
) -> tuple[torch.Tensor, np.ndarray, Timelines]:
    """The atoms that some timelines name: vectors on the model's device, ids, and timelines that count
    among them."""
    used = np.unique(np.concatenate([*timelines.atoms, [0]]))  # one at least, for users without behaviors
    renumbered = tuple(np.searchsorted(used, rows) for rows in timelines.atoms)
    atoms_AD = torch.from_numpy(atoms.vectors[used]).to(device_of(artifact))
    fewer = Timelines(timelines.channels, timelines.offsets, renumbered, timelines.time_us)
    return atoms_AD, atoms.ids[used], fewer


def latest_items(connection: duckdb.DuckDBPyConnection, users: pa.Table) -> pa.ChunkedArray:
    """The latest items that each of these users acted on or clicked, each once, the newest first.

    Users are sorted by user_id.
    """
    connection.register("part", users.select(["user_id"]))
    ends = [users["user_id"][0].as_py(), users["user_id"][-1].as_py()]
    table = connection.execute(
        f"""
        SELECT seen_items
        FROM part
        LEFT JOIN (
            SELECT user_id, list(item ORDER BY latest DESC, item)[:{SEEN_ITEMS}] AS seen_items
            FROM (
                SELECT user_id, item_id::VARCHAR AS item, max(event_timestamp) AS latest
                FROM (
                    SELECT user_id, item_id, event_timestamp FROM behaviors WHERE item_id IS NOT NULL
                    UNION ALL
                    SELECT user_id, item_id, event_timestamp FROM impressions WHERE clicked = 1
                ) SEMI JOIN part USING (user_id)
                WHERE user_id BETWEEN ? AND ?
                GROUP BY ALL
            )
            GROUP BY user_id
        ) USING (user_id)
        ORDER BY user_id
        """,
        ends,
    ).to_arrow_table()
    connection.unregister("part")
    return table["seen_items"]


def device_of(artifact: Artifact) -> torch.device:
    """The device that the artifact's model is on."""
    return next(artifact.model.parameters()).device
