"""Atoms without a vector, chunk by chunk, through the encoder: in this process or in several.

A chunk is a range of atom ids with about `ATOMS_PER_CHUNK` atoms to encode: what is read, tokenised, sorted
by length and held in memory at a time. Atom ids are hashes, so chunks are alike, and a chunk's content
depends on the lake alone: one process or several, the same batches are made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from bahe_core.errors import BadInput, BaheError
from bahe_core.home import Home
from bahe_core.machine import configure_threads, device, read_ahead, threads
from bahe_lake.connection import connect
from bahe_models import (
    AtomicEncoder,
    Backbone,
    BackboneConfig,
    EncoderConfig,
    encoder_version,
    load_backbone,
)
from materialize.executors import Executor

ATOMS_PER_CHUNK = 8192
"""Large enough for full batches of each length; small enough that a kill loses little."""
_BUCKETS = 2**16
"""Ranges of ids whose atoms are counted; a chunk is made of whole ones."""
_BUCKET_WIDTH = 2**64 // _BUCKETS

_WITHOUT_VECTOR = """
    FROM atoms
    ANTI JOIN (
        SELECT atom_id FROM atomic_behavior_embedding
        WHERE encoder_version = $version AND atom_id BETWEEN $first AND $last
    ) USING (atom_id)
    WHERE atom_id BETWEEN $first AND $last
    """
_ALL = {"first": -(2**63), "last": 2**63 - 1}


@dataclass(frozen=True)
class Chunk:
    """A range of atom ids, and how many atoms in it have no vector yet."""

    first: int
    last: int
    atoms: int


@dataclass(frozen=True)
class Encodings:
    """A chunk's vectors, sorted by atom id, and what they took."""

    atom_ids: pa.Array
    first_seen: pa.Array
    vectors: np.ndarray
    """float32 [atoms, width]."""
    tokens: int
    padded_tokens: int
    """Places in batches: tokens, and what fills shorter texts up."""
    model_seconds: float


@dataclass(frozen=True)
class Texts:
    """A chunk, read and tokenised."""

    atoms: pa.Table
    tokens: list[list[int]]


def missing_chunks(connection: duckdb.DuckDBPyConnection, version: str) -> list[Chunk]:
    """The atoms that have no vector of this version, in chunks by atom id."""
    buckets = connection.execute(
        f"""
        SELECT min(atom_id), max(atom_id), count(*)
        {_WITHOUT_VECTOR}
        GROUP BY floor(atom_id::DOUBLE / {_BUCKET_WIDTH})
        ORDER BY 1
        """,
        {"version": version, **_ALL},
    ).fetchall()
    chunks: list[Chunk] = []
    for first, last, atoms in buckets:
        if chunks and chunks[-1].atoms + atoms <= ATOMS_PER_CHUNK:
            chunks[-1] = Chunk(chunks[-1].first, last, chunks[-1].atoms + atoms)
        else:
            chunks.append(Chunk(first, last, atoms))
    return chunks


class ChunkEncoder:
    """Reads and encodes chunks; holds a model, and a connection of its own to read while another writes."""

    def __init__(
        self, home: Home, halves: Backbone, encoder: EncoderConfig, version: str, device_name: str | None
    ) -> None:
        self._connection = connect(home)
        self._version = version
        self._encoder = AtomicEncoder(halves, encoder, device=device(device_name))

    def read(self, chunk: Chunk) -> Texts:
        """Texts of the chunk's atoms as tokens."""
        atoms = self._connection.execute(
            f"SELECT atom_id, channel, text, first_seen {_WITHOUT_VECTOR} ORDER BY atom_id",
            {"version": self._version, "first": chunk.first, "last": chunk.last},
        ).to_arrow_table()
        tokens = self._encoder.tokenize(atoms["channel"].to_pylist(), atoms["text"].to_pylist())
        return Texts(atoms, tokens)

    def encode(self, texts: Texts, advance: Callable[[int], object] = lambda _: None) -> Encodings:
        """Vectors of the chunk; `advance` is told of each batch's atoms."""
        tokens = texts.tokens
        vectors = np.empty((len(tokens), self._encoder.width), dtype=np.float32)
        padded, start = 0, time.perf_counter()
        for rows in self._encoder.batches(tokens):
            vectors[rows] = self._encoder.encode_tokens([tokens[i] for i in rows])
            padded += len(rows) * len(tokens[rows[-1]])  # the last one is the longest
            advance(len(rows))
        return Encodings(
            texts.atoms["atom_id"].combine_chunks(),
            texts.atoms["first_seen"].combine_chunks(),
            vectors,
            tokens=sum(map(len, tokens)),
            padded_tokens=padded,
            model_seconds=time.perf_counter() - start,
        )

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()


def encode_here(
    encoder: ChunkEncoder, chunks: Sequence[Chunk], advance: Callable[[int], object]
) -> Iterator[Encodings]:
    """Chunk by chunk in this process; a thread reads and tokenises the next one meanwhile."""
    for texts in read_ahead(map(encoder.read, chunks)):
        yield encoder.encode(texts, advance)


def encode_in_processes(
    home: Home,
    backbone: BackboneConfig,
    encoder: EncoderConfig,
    version: str,
    chunks: Sequence[Chunk],
    devices: Sequence[str | None],
    advance: Callable[[int], object],
) -> Iterator[Encodings]:
    """As chunks get ready in one process for each device; on a CPU they share the cores.

    Raises BaheError when one of them dies.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # a forked process can use neither CUDA nor DuckDB
    waiting = context.SimpleQueue()
    for name in devices:
        waiting.put(name)
    share = max(1, threads() // len(devices))
    todo = iter(chunks)
    pool = ProcessPoolExecutor(
        len(devices), context, _begin, (home, backbone, encoder, version, waiting, share)
    )
    try:
        # Two for each process: one that it works on, and one that is ready when that is done.
        running = {pool.submit(_work, chunk) for chunk in islice(todo, 2 * len(devices))}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                encodings = future.result()
                running.update(pool.submit(_work, chunk) for chunk in islice(todo, 1))
                advance(len(encodings.vectors))
                yield encodings
    except BrokenProcessPool:
        raise BaheError(
            "a process of `bahe encode --processes` died (killed, or out of memory?); what was committed is"
            " kept, so run it again, with fewer processes if memory was short."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_on(
    executor: Executor,
    home: Home,
    backbone: BackboneConfig,
    encoder: EncoderConfig,
    version: str,
    chunks: Sequence[Chunk],
    device_name: str | None,
    advance: Callable[[int], object],
) -> Iterator[Encodings]:
    """As chunks get ready on the executor's workers, which attach the lake themselves."""
    make = partial(_encode_chunk, home.elsewhere(), backbone, encoder, version, device_name)
    for encodings in executor.map(make, chunks):
        advance(len(encodings.vectors))
        yield encodings


def _encode_chunk(
    home: Home, backbone: BackboneConfig, encoder: EncoderConfig, version: str, device_name: str | None
) -> Callable[[Chunk], Encodings]:
    halves = load_backbone(backbone)
    if encoder_version(halves, encoder, backbone.shallow_layers) != version:
        raise BadInput(
            f"{backbone.path} is another model on one node than on the first; give all the same."
        )
    here = ChunkEncoder(home, halves, encoder, version, device_name)
    return lambda chunk: here.encode(here.read(chunk))


_here: ChunkEncoder | None = None
"""The encoder of a process of the pool."""


def _begin(
    home: Home, backbone: BackboneConfig, encoder: EncoderConfig, version: str, waiting: Any, share: int
) -> None:
    global _here
    _end_with_parent()
    os.environ["BAHE_THREADS"] = str(share)
    configure_threads()
    _here = ChunkEncoder(home, load_backbone(backbone), encoder, version, waiting.get())


def _work(chunk: Chunk) -> Encodings:
    assert _here is not None
    return _here.encode(_here.read(chunk))


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its pool, whose processes would hold a GPU's memory for ever."""
    import multiprocessing
    import threading
    from multiprocessing.connection import wait as wait_for

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
