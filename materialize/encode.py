"""Every distinct atom through the frozen shallow layers, once per encoder_version."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_core.progress import progress
from bahe_models.backbone import BackboneConfig, load_backbone
from bahe_models.encoder import AtomicEncoder, EncoderConfig, encoder_version
from materialize import runs
from materialize.dataset import Dataset
from materialize.fetch import backbone_config
from materialize.gates import require_gates
from materialize.ingest import home_dataset
from materialize.lake import commit, lake, scalar

JOB = "encode"
ATOMS_PER_COMMIT = 2048
"""Vectors computed since the last commit are what a kill can cost."""

_MISSING = (
    "FROM atoms ANTI JOIN (SELECT atom_id FROM atomic_behavior_embedding"
    " WHERE encoder_version = ?) USING (atom_id)"
)


@dataclass(frozen=True)
class Encoded:
    """What a run of `encode` did."""

    encoder_version: str
    width: int
    added: int
    total: int


def encode(home: Home, *, device_name: str | None = None) -> Encoded:
    """Encode the atoms that have no vector under the configured encoder yet.

    Committed batch by batch: a killed run loses at most one batch, and the next one goes on. When
    nothing is missing, no model is loaded.
    """
    dataset = home_dataset(home)
    backbone, encoder = encoder_settings(dataset)
    with home.exclusive(), lake(home) as connection:
        require_gates(connection, JOB)
        settings = repr((backbone, encoder))
        total = scalar(connection, "SELECT count(*) FROM atoms")
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == settings:
            version, width = last.facts["encoder_version"], last.facts["width"]
            if not scalar(connection, f"SELECT count(*) {_MISSING}", [version]):
                return Encoded(version, width, added=0, total=total)
        halves = load_backbone(backbone)
        version = encoder_version(halves, encoder, backbone.shallow_layers)
        with runs.record(connection, JOB, settings) as run:
            missing = connection.execute(
                f"SELECT atom_id, channel, text, first_seen {_MISSING} ORDER BY atom_id", [version]
            ).to_arrow_table()
            model = AtomicEncoder(halves, encoder, device=device(device_name))
            tokens = model.tokenize(missing["channel"].to_pylist(), missing["text"].to_pylist())
            with progress("encoding atoms", missing.num_rows) as advance:
                pending: list[tuple[np.ndarray, np.ndarray]] = []
                waiting = 0
                for rows in model.batches(tokens):
                    pending.append((rows, model.encode_tokens([tokens[i] for i in rows])))
                    waiting += len(rows)
                    advance(len(rows))
                    if waiting >= ATOMS_PER_COMMIT:
                        _store(connection, missing, pending, version)
                        pending, waiting = [], 0
                _store(connection, missing, pending, version)
            commit(
                connection,
                [
                    run.statement(
                        {"encoder_version": version, "width": halves.width},
                        rows_read=missing.num_rows,
                        rows_written=missing.num_rows,
                    )
                ],
            )
    return Encoded(version, halves.width, added=missing.num_rows, total=total)


def encoder_settings(dataset: Dataset) -> tuple[BackboneConfig, EncoderConfig]:
    """Backbone and encoder of a dataset, checked."""
    from bahe_models.options import build

    return backbone_config(dataset), build(EncoderConfig, dataset.encoder, "encoder")


def _store(
    connection: duckdb.DuckDBPyConnection,
    atoms: pa.Table,
    batches: list[tuple[np.ndarray, np.ndarray]],
    version: str,
) -> None:
    if not batches:
        return
    rows = np.concatenate([rows for rows, _ in batches])
    vectors = np.concatenate([vectors for _, vectors in batches])
    picked = atoms.take(pa.array(rows))
    connection.register(
        "encoded",
        pa.table(
            {
                "atom_id": picked["atom_id"],
                "embedding": vector_column(vectors),
                "event_timestamp": picked["first_seen"],
            }
        ),
    )
    now = datetime.now(UTC).isoformat()
    commit(
        connection,
        [
            "INSERT INTO atomic_behavior_embedding BY NAME SELECT *,"
            f" '{version}' AS encoder_version, TIMESTAMPTZ '{now}' AS created_timestamp FROM encoded"
        ],
    )
    connection.unregister("encoded")


def vector_column(vectors: np.ndarray) -> pa.ListArray:
    """Vectors [rows, width] as an Arrow column, without a Python object per number."""
    rows, width = vectors.shape
    offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    return pa.ListArray.from_arrays(offsets, flat)


def vector_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """An Arrow column of equally long lists as float32 [rows, width].

    Raises BadInput when they are not equally long.
    """
    lengths = pc.list_value_length(column)
    shortest, longest = pc.min_max(lengths).as_py().values()
    if lengths.null_count or shortest != longest:
        raise BadInput(
            f"the vectors of one version have {shortest} to {longest} numbers, or none at all; restore the"
            " table, or ingest and encode into a new home."
        )
    flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]).to_numpy()
    return np.array(flat, dtype=np.float32).reshape(len(column), -1)
