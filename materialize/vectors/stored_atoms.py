"""The vectors of one encoder_version, read from the lake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import duckdb
import numpy as np
import pyarrow as pa

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_models import Int64
from materialize.vectors.vector_columns import vector_matrix

NOT_ENCODED = "some atoms have no vector yet; run `bahe encode` first."


@dataclass(frozen=True)
class Atoms:
    """The vectors of one encoder_version; a row number stands for an atom from here on."""

    ids: Int64
    """Sorted atom ids."""
    vectors: np.ndarray
    """float32 [atoms, width]."""
    encoder_version: str

    def rows(self, ids: pa.ChunkedArray | pa.Array) -> Int64:
        """Row of each atom id. Raises NotReady when one has no vector."""
        atom_ids = ids.to_numpy()
        rows = np.searchsorted(self.ids, atom_ids)
        if len(atom_ids) and (
            not len(self.ids) or (self.ids[np.minimum(rows, len(self.ids) - 1)] != atom_ids).any()
        ):
            raise NotReady(NOT_ENCODED)
        return np.asarray(rows, dtype=np.int64)


def current_encoder(connection: duckdb.DuckDBPyConnection, home: Home) -> str:
    """The encoder_version of the last encode. Raises NotReady before it."""
    encoded = runs.last(connection, "encode")
    if encoded is None:
        raise NotReady(f"{home.root} has no atom vectors yet; run `bahe encode` first.")
    return str(encoded.facts["encoder_version"])


def read_atoms(connection: duckdb.DuckDBPyConnection, version: str) -> Atoms:
    """All vectors of an encoder_version."""
    table = connection.execute(
        """
        SELECT atom_id, embedding FROM atomic_behavior_embedding
        WHERE encoder_version = ?
        ORDER BY atom_id
        """,
        [version],
    ).to_arrow_table()
    if not table.num_rows:
        raise NotReady(f"no atom is encoded under {version} yet; run `bahe encode` first.")
    return Atoms(table["atom_id"].to_numpy(), vector_matrix(table["embedding"]), version)


def vectors_of(
    connection: duckdb.DuckDBPyConnection, version: str, atom_ids: Sequence[int]
) -> dict[int, np.ndarray]:
    """The vectors [width] of those of these atoms that are encoded, by atom."""
    table = connection.execute(
        """
        SELECT atom_id, embedding FROM atomic_behavior_embedding
        WHERE encoder_version = ? AND atom_id IN (SELECT unnest(?))
        """,
        [version, list(atom_ids)],
    ).to_arrow_table()
    if not table.num_rows:
        return {}
    return dict(zip(table["atom_id"].to_pylist(), vector_matrix(table["embedding"]), strict=True))


@contextmanager
def stored_atoms(
    connection: duckdb.DuckDBPyConnection, version: str, needed: str, folder: Path, width: int
) -> Iterator[Atoms]:
    """The vectors of the atoms named in the table `needed`; a single zero vector when it is empty.

    They are in a memory-mapped temporary file, so that memory holds only what is being read. Raises
    NotReady when an atom has no vector.
    """
    reader = connection.execute(
        f"""
        SELECT atom_id, embedding FROM atomic_behavior_embedding SEMI JOIN {needed} USING (atom_id)
        WHERE encoder_version = ?
        ORDER BY atom_id
        """,
        [version],
    ).to_arrow_reader(8192)
    folder.mkdir(parents=True, exist_ok=True)
    ids = []
    with TemporaryFile(dir=folder) as file:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            ids.append(batch.column("atom_id").to_numpy())
            file.write(vector_matrix(table["embedding"]).tobytes())
        file.flush()
        count = sum(map(len, ids))
        if scalar(connection, f"SELECT count(*) FROM {needed}") != count:
            raise NotReady(NOT_ENCODED)
        if not count:
            yield Atoms(np.zeros(1, dtype=np.int64), np.zeros((1, width), dtype=np.float32), version)
            return
        vectors = np.memmap(file, dtype=np.float32, mode="r").reshape(count, -1)
        yield Atoms(np.concatenate(ids), vectors, version)


def atoms_of(home: Home, encoder_version: str | None = None) -> Atoms:
    """Ids and vectors of all atoms of a home, of the encoder in use unless another is named."""
    with lake(home) as connection:
        return read_atoms(connection, encoder_version or current_encoder(connection, home))
