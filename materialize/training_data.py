"""From lake and frame to the arrays that training and embedding read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_models.context import MISSING, hash_values
from bahe_models.data import Impressions, TrainingData
from bahe_models.features import needed_columns
from bahe_models.timelines import Int64, Timelines
from materialize import runs
from materialize.dataset import context_column
from materialize.encode import vector_matrix
from materialize.frame import SPLITS, Frame
from materialize.lake import quoted, scalar

_NOT_ENCODED = "some atoms have no vector yet; run `bahe encode` first."


@dataclass(frozen=True)
class Atoms:
    """The vectors of one encoder_version; a row number stands for an atom from here on."""

    ids: Int64
    """Sorted atom ids."""
    vectors: np.ndarray
    """float32 [atoms, width]."""

    def rows(self, ids: pa.ChunkedArray | pa.Array) -> Int64:
        """Row of each atom id. Raises NotReady when one has no vector."""
        wanted = ids.to_numpy()
        rows = np.searchsorted(self.ids, wanted)
        if len(wanted) and (
            not len(self.ids) or (self.ids[np.minimum(rows, len(self.ids) - 1)] != wanted).any()
        ):
            raise NotReady(_NOT_ENCODED)
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
        "SELECT atom_id, embedding FROM atomic_behavior_embedding WHERE encoder_version = ?"
        " ORDER BY atom_id",
        [version],
    ).to_arrow_table()
    if not table.num_rows:
        raise NotReady(f"no atom is encoded under {version} yet; run `bahe encode` first.")
    return Atoms(table["atom_id"].to_numpy(), vector_matrix(table["embedding"]))


@contextmanager
def stored_atoms(
    connection: duckdb.DuckDBPyConnection, version: str, wanted: str, folder: Path, width: int
) -> Iterator[Atoms]:
    """The vectors of the atoms that the table `wanted` names, in a file that memory is mapped to and that
    is gone afterwards: memory holds only what is being read. One zero vector where none is wanted.

    Raises NotReady when an atom has no vector.
    """
    reader = connection.execute(
        f"SELECT atom_id, embedding FROM atomic_behavior_embedding SEMI JOIN {wanted} USING (atom_id)"
        " WHERE encoder_version = ? ORDER BY atom_id",
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
        found = sum(map(len, ids))
        if scalar(connection, f"SELECT count(*) FROM {wanted}") != found:
            raise NotReady(_NOT_ENCODED)
        if not found:
            yield Atoms(np.zeros(1, dtype=np.int64), np.zeros((1, width), dtype=np.float32))
            return
        vectors = np.memmap(file, dtype=np.float32, mode="r").reshape(found, -1)
        yield Atoms(np.concatenate(ids), vectors)


def read_timelines(
    connection: duckdb.DuckDBPyConnection, atoms: Atoms, users: pa.Array, channels: list[str]
) -> Timelines:
    """Timelines of these users, in their order; a user without behaviors has empty ones."""
    connection.register("wanted_users", pa.table({"user_id": users, "u": np.arange(len(users))}))
    # The files' statistics know the ends of their user ids, and spare what lies outside.
    ends = list(pc.min_max(users).as_py().values())
    offsets, rows, times = [], [], []
    for channel in channels:
        table = connection.execute(
            "SELECT w.u, t.atom_id, epoch_us(t.event_timestamp) AS time_us"
            " FROM user_timeline t JOIN wanted_users w USING (user_id)"
            f" WHERE t.channel = {quoted(channel)} AND t.user_id BETWEEN ? AND ? ORDER BY w.u, t.position",
            ends,
        ).to_arrow_table()
        counts = np.bincount(table["u"].to_numpy(), minlength=len(users))
        offsets.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        rows.append(atoms.rows(table["atom_id"]))
        times.append(table["time_us"].to_numpy())
    connection.unregister("wanted_users")
    return Timelines(tuple(channels), tuple(offsets), tuple(rows), tuple(times))


def read_user(
    connection: duckdb.DuckDBPyConnection, version: str, user_id: str | int, channels: Sequence[str]
) -> tuple[list[np.ndarray], list[Int64], list[Int64]]:
    """One user's timelines: per channel the atoms' vectors [L, width], times in microseconds and ids [L].

    A user without behaviors has empty ones. Raises NotReady when an atom has no vector.
    """
    vectors, times, ids = [], [], []
    for channel in channels:
        table = connection.execute(
            "SELECT t.atom_id, a.embedding, epoch_us(t.event_timestamp) AS time_us FROM user_timeline t"
            " LEFT JOIN atomic_behavior_embedding a ON a.atom_id = t.atom_id AND a.encoder_version = ?"
            " WHERE t.user_id = ? AND t.channel = ? ORDER BY t.position",
            [version, user_id, channel],
        ).to_arrow_table()
        if table["embedding"].null_count:
            raise NotReady(_NOT_ENCODED)
        vectors.append(
            vector_matrix(table["embedding"]) if table.num_rows else np.empty((0, 0), dtype=np.float32)
        )
        times.append(table["time_us"].to_numpy())
        ids.append(table["atom_id"].to_numpy())
    return vectors, times, ids


def read_training_data(
    connection: duckdb.DuckDBPyConnection, frame: Frame, version: str, channels: list[str]
) -> TrainingData:
    """Everything a training run reads, from the frame on disk and the lake.

    Raises BadInput when it cannot be trained on, NotReady when atoms have no vector of that version.
    """
    atoms = read_atoms(connection, version)
    table = pq.read_table(frame.path)
    users = table["user_id"].combine_chunks().dictionary_encode()
    items = connection.execute("SELECT item_id, atom_id FROM items ORDER BY item_id").to_arrow_table()
    item_index = pc.index_in(table["item_id"], value_set=items["item_id"]).combine_chunks()
    if item_index.null_count:
        unknown = table["item_id"].filter(pc.is_null(item_index))[0].as_py()
        raise BadInput(
            f"{item_index.null_count} impressions of the frame show items that the log does not have"
            f" (item {unknown} among them); ingest the items, then run `bahe frame` again."
        )
    user_row = users.indices.to_numpy().astype(np.int64)
    item_row = item_index.to_numpy().astype(np.int64)
    lengths = np.stack(
        [table[f"length_{c}"].fill_null(0).to_numpy().astype(np.int64) for c in channels], axis=1
    )
    time_us = table["event_timestamp"].cast(pa.int64()).to_numpy()
    columns = {c: table[c].to_numpy(zero_copy_only=False).astype(np.float64) for c in needed_columns()}
    clicked = table["clicked"].to_numpy().astype(np.float32)
    context = _context_columns(table)
    hashed = np.stack([_hashed(table, c) for c in context], axis=1) if context else None

    def part(name: str) -> Impressions:
        rows = np.flatnonzero(pc.equal(table["split"], name).to_numpy())
        return Impressions(
            user_N=user_row[rows],
            item_N=item_row[rows],
            length_NC=lengths[rows],
            time_us_N=time_us[rows],
            clicked_N=clicked[rows],
            columns={c: values[rows] for c, values in columns.items()},
            context_NX=None if hashed is None else hashed[rows],
        )

    data = TrainingData(
        atoms_AD=atoms.vectors,
        atom_ids=atoms.ids,
        timelines=read_timelines(connection, atoms, users.dictionary, channels),
        item_atom_I=atoms.rows(items["atom_id"]),
        item_ids=tuple(items["item_id"].to_pylist()),
        splits={name: part(name) for name in SPLITS},
        context=context,
    )
    data.check()
    return data


def _context_columns(frame: pa.Table) -> tuple[str, ...]:
    """Names of a frame's context columns, as it was written with; none in frames of before context."""
    facts = (frame.schema.metadata or {}).get(b"bahe", b"{}")
    return tuple(json.loads(facts).get("context", ()))


def _hashed(frame: pa.Table, context: str) -> Int64:
    """Hashes [N] of a context column; each distinct value is hashed once."""
    encoded = frame[context_column(context)].combine_chunks().dictionary_encode()
    values = np.append(hash_values(context, encoded.dictionary.to_pylist()), MISSING)
    rows: Int64 = values[encoded.indices.fill_null(len(values) - 1).to_numpy()]
    return rows
