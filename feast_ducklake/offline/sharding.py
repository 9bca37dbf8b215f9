"""A retrieval in shards: each read by its own worker, then merged into the order of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from bahe_core.errors import BaheError
from bahe_core.home import Home
from bahe_lake.connection import lake

SHARD_BATCH_ROWS = 61_440
"""Rows of a worker's batch; a multiple of DuckDB's vectors of 2,048, so that batches are all alike."""


class ShardRunner(Protocol):
    """Runs the shards of a query, on this machine or on many."""

    @property
    def workers(self) -> int:
        """How many shards run at once."""
        ...

    def streams(
        self, shard: Callable[[int], Iterator[pa.RecordBatch]], count: int
    ) -> list[Iterator[pa.RecordBatch]]:
        """The streams of `shard(0)` to `shard(count - 1)`, each in order."""
        ...


@dataclass(frozen=True)
class ShardReader:
    """Runs one of several queries over one snapshot, on whatever machine it is called."""

    home: Home
    snapshot: int
    queries: list[str]

    def __call__(self, index: int) -> Iterator[pa.RecordBatch]:
        """The batches of the query with that number, on a connection of its own."""
        with lake(self.home, as_of=self.snapshot, others_queries=True) as connection:
            yield from connection.execute(self.queries[index]).to_arrow_reader(SHARD_BATCH_ROWS)


def merged(streams: list[Iterator[pa.RecordBatch]], rows: int) -> Iterator[pa.RecordBatch]:
    """Rows of all streams in the order of their last column, a row number that is then dropped.

    In batches of `rows` rows, the last one with what is left.
    Each stream is in that order, and together they have every number from 1 on. One batch of each is held.
    Raises BaheError when a row is missing or there twice, which only a bug can cause.
    """
    held: dict[int, pa.RecordBatch] = {}
    waiting: list[pa.Table] = []
    done = 0

    def fill(index: int) -> None:
        batch = next(streams[index], None)
        while batch is not None and not batch.num_rows:
            batch = next(streams[index], None)
        if batch is not None:
            held[index] = batch

    for index in range(len(streams)):
        fill(index)
    while held:
        # Whatever comes later in any stream has a number above the least of the last ones held.
        safe = min(_numbers(batch)[-1] for batch in held.values())
        ready = []
        for index, batch in list(held.items()):
            count = int(np.searchsorted(_numbers(batch), safe, side="right"))
            ready.append(batch.slice(0, count))
            if count == batch.num_rows:
                del held[index]
                fill(index)
            else:
                held[index] = batch.slice(count)
        table = pa.Table.from_batches(ready)
        numbers = table.column(table.num_columns - 1).to_numpy()
        order = np.argsort(numbers, kind="stable")
        if not np.array_equal(numbers[order], np.arange(done + 1, done + 1 + len(order))):
            raise BaheError("shards of a frame do not fit together; run it again with --executor local.")
        done += len(order)
        waiting.append(table.take(pa.array(order)).remove_column(table.num_columns - 1))
        if sum(part.num_rows for part in waiting) >= rows or not held:
            whole = pa.concat_tables(waiting).combine_chunks()
            full = whole.num_rows if not held else whole.num_rows // rows * rows
            yield from whole.slice(0, full).to_batches(max_chunksize=rows)
            waiting = [whole.slice(full)]


def _numbers(batch: pa.RecordBatch) -> np.ndarray:
    numbers: np.ndarray = batch.column(batch.num_columns - 1).to_numpy()
    return numbers
