"""Every distinct atom through the frozen shallow layers, once per encoder_version.

A changed encoder is a new version, built beside the one in use. `runs` names it only when every atom has
its vector; until then whoever asks for the current version gets the old one. While a model in use reads the
old version, new atoms get vectors of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.progress import progress, say
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.catalogue import scalar
from bahe_lake.connection import LAKE, lake
from bahe_lake.sql import sql_literal
from bahe_lake.transactions import commit
from bahe_models import BackboneConfig, EncoderConfig, encoder_version, load_backbone
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import home_dataset
from materialize.executors import LOCAL, ExecutorConfig, start
from materialize.gate import gate, gated, require_gates
from materialize.vectors.chunks import (
    ChunkEncoder,
    Encodings,
    encode_here,
    encode_in_processes,
    encode_on,
    missing_chunks,
)
from materialize.vectors.encoder_versions import other_versions_in_use, vector_identity
from materialize.vectors.vector_columns import vector_column

JOB = "encode"
TABLE = "atomic_behavior_embedding"
ATOMS_PER_COMMIT = 65_536
SECONDS_PER_COMMIT = 20.0
"""A commit is due at the end of the chunk that reaches either; a kill loses what came after it."""

_PARQUET = {"parquet_compression": "zstd", "parquet_version": "2"}
"""Version 2 splits floats into byte streams, which is how vectors of half precision compress well."""


@dataclass(frozen=True)
class Encoded(Result):
    """What a run of `encode` did."""

    encoder_version: str
    width: int
    added: int
    total: int
    tokens: int = 0
    """Tokens of the atoms added."""
    padding: float = 0.0
    """Share of the positions computed that held no token."""
    model_seconds: float = 0.0
    """Time in the model, summed over processes."""

    @property
    def summary(self) -> list[str]:
        """How many atoms got a vector."""
        return [f"{self.encoder_version}: {self.added:,} atoms encoded, {self.total:,} in all"]


@gated("encode")
def encode(
    home: Home,
    *,
    device_name: str | None = None,
    processes: int | None = None,
    compile: bool = False,
    where: ExecutorConfig = LOCAL,
) -> Encoded:
    """Encode the atoms that have no vector under the configured encoder yet.

    Committed as it goes: a killed run loses little, and the next one goes on. When nothing is missing, no
    model is loaded. Where a model in use reads another encoder's vectors, new atoms get those first, and
    pass the gate. `processes` is one for each visible GPU by default, else one; on Ray,
    `where` says how many actors.
    """
    dataset = home_dataset(home)
    backbone, encoder = encoder_settings(dataset)
    encoder = replace(encoder, compile=encoder.compile or compile)
    if where.kind == "ray" and processes is not None:
        raise BadInput("--processes is for --executor local; give --num-actors.")
    devices = [device_name] if where.kind == "ray" else _devices(device_name, processes)
    with lake(home) as connection:
        others = other_versions_in_use(connection, home, vector_identity(backbone, encoder))
        behind = {
            version: other for version, other in others.items() if missing_chunks(connection, version)
        }
    for version, (older_backbone, older_encoder) in behind.items():
        like = replace(older_encoder, compile=encoder.compile, bfloat16=encoder.bfloat16)
        try:
            done = _encode(home, older_backbone, like, devices, where, expected=version)
        except BadInput as error:  # its weights may be gone; that stops its models, not newer ones
            say(f"  {version}, which a model in use reads, gets no vectors of new atoms: {error}")
            continue
        say(f"  {version}, which a model in use reads: {done.added:,} atoms encoded")
        gate(home, JOB)
    return _encode(home, backbone, encoder, devices, where)


def _encode(
    home: Home,
    backbone: BackboneConfig,
    encoder: EncoderConfig,
    devices: Sequence[str | None],
    where: ExecutorConfig,
    *,
    expected: str | None = None,
) -> Encoded:
    """Bring one version up to date and make it the current one.

    Raises BadInput when the settings no longer give the version `expected`.
    """
    identity = vector_identity(backbone, encoder)
    with home.exclusive(), lake(home) as connection:
        require_gates(connection, JOB)
        total = scalar(connection, "SELECT count(*) FROM atoms")
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == identity:
            version, width = str(last.facts["encoder_version"]), int(last.facts["width"])
            if not missing_chunks(connection, version):
                return Encoded(version, width, added=0, total=total)
        halves = load_backbone(backbone)
        version = encoder_version(halves, encoder, backbone.shallow_layers)
        if expected not in (None, version):
            raise BadInput(f"{backbone.path} is not the model of {expected} any more.")
        width = halves.width
        with runs.record(connection, JOB, identity) as run:
            chunks = missing_chunks(connection, version)
            writer = _Writer(connection, version)
            with progress("encoding atoms", sum(chunk.atoms for chunk in chunks)) as advance:
                if where.kind == "ray" and chunks:
                    del halves  # each actor loads its own
                    with start(where) as executor:
                        for encodings in encode_on(
                            executor, home, backbone, encoder, version, chunks, devices[0], advance
                        ):
                            writer.add(encodings)
                elif len(devices) > 1:
                    del halves  # each process loads its own
                    encoded = encode_in_processes(
                        home, backbone, encoder, version, chunks, devices, advance
                    )
                    for encodings in encoded:
                        writer.add(encodings)
                elif chunks:
                    here = ChunkEncoder(home, halves, encoder, version, devices[0])
                    try:
                        for encodings in encode_here(here, chunks, advance):
                            writer.add(encodings)
                    finally:
                        here.close()
            writer.flush()
            facts = {"encoder_version": version, "width": width, "settings": json.loads(identity)}
            done = writer.facts()
            added = done["added"]
            commit(connection, [run.statement({**facts, **done}, rows_read=added, rows_written=added)])
    return Encoded(version, width, total=total, **writer.facts())


class _Writer:
    """Collects encodings and commits them."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, version: str) -> None:
        self._connection, self._version = connection, version
        self._pending: list[Encodings] = []
        self._committed = monotonic()
        self._added = self._tokens = self._padded = 0
        self._model_seconds = 0.0

    def add(self, encodings: Encodings) -> None:
        self._pending.append(encodings)
        self._added += len(encodings.vectors)
        self._tokens += encodings.tokens
        self._padded += encodings.padded_tokens
        self._model_seconds += encodings.model_seconds
        waiting = sum(len(part.vectors) for part in self._pending)
        if waiting >= ATOMS_PER_COMMIT or monotonic() - self._committed >= SECONDS_PER_COMMIT:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            _store(self._connection, self._pending, self._version)
        self._pending, self._committed = [], monotonic()

    def facts(self) -> dict[str, Any]:
        return {
            "added": self._added,
            "tokens": self._tokens,
            "padding": 1 - self._tokens / self._padded if self._padded else 0.0,
            "model_seconds": round(self._model_seconds, 3),
        }


def _store(connection: duckdb.DuckDBPyConnection, parts: Sequence[Encodings], version: str) -> None:
    """Store them in one commit, ordered by atom id so that file statistics can skip other ranges."""
    atoms = pa.table(
        {
            "atom_id": pa.concat_arrays([part.atom_ids for part in parts]),
            "embedding": vector_column(np.concatenate([part.vectors for part in parts])),
            "event_timestamp": pa.concat_arrays([part.first_seen for part in parts]),
        }
    )
    _set_parquet_options(connection)
    connection.register("encoded", atoms)
    insert = f"""
        INSERT INTO {TABLE} BY NAME
        SELECT
            *,
            {sql_literal(version)} AS encoder_version,
            {sql_literal(datetime.now(UTC))} AS created_timestamp
        FROM encoded
        ORDER BY atom_id
        """
    commit(connection, [insert])
    connection.unregister("encoded")


def _set_parquet_options(connection: duckdb.DuckDBPyConnection) -> None:
    already_set = connection.execute(
        f"SELECT option_name FROM {LAKE}.options() WHERE scope = 'TABLE' AND scope_entry = ?",
        [f"main.{TABLE}"],
    ).fetchall()
    missing = {option: value for option, value in _PARQUET.items() if (option,) not in already_set}
    commit(
        connection,
        [
            f"CALL {LAKE}.set_option({sql_literal(option)}, {sql_literal(value)},"
            f" table_name => {sql_literal(TABLE)})"
            for option, value in missing.items()
        ],
    )


def _devices(device_name: str | None, processes: int | None) -> list[str | None]:
    """A device for each process. Raises BadInput when no process is asked for."""
    if processes is not None and processes < 1:
        raise BadInput(f"--processes is {processes}; it must be at least 1.")
    if device_name is not None or processes == 1:
        return [device_name] * (processes or 1)
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    each: list[str | None] = [*gpus] or [None]
    return [each[index % len(each)] for index in range(processes or len(each))]
