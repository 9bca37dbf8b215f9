"""Vectors of the lake in memory, of one live version, so that they can be searched.

They are read when they are first asked for, and once more when another publish has changed what is live.
What is read is the lake as the publish found it, so that they are as fresh as what the online store has.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from bahe_core.errors import BadInput, BaheError
from bahe_core.home import Home
from bahe_lake.connection import connect, damaged_files_named
from materialize.release import counted
from materialize.vectors.vector_columns import vector_matrix
from serving.lookup.directions import BYTES_EACH, Directions, Float32
from serving.lookup.identifiers import Identifier
from serving.lookup.lake_pause import LakePause
from serving.lookup.tolerances import in_turn

MOST_BYTES = 2**30
"""Of one kind of vectors and what is kept beside them, in each process; of more there is no answer."""
_ROWS = 4096
"""Read at a time."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a query of vectors gave; a row stands for one of them."""

    directions: Directions
    columns: pa.Table
    """Those beside the vectors."""

    def row_of(self, column: str, value: Identifier) -> int | None:
        """The row that has this value; None where none has."""
        found: int = self.columns[column].index(value).as_py()
        return None if found < 0 else found

    def value(self, column: str, row: int) -> Any:
        """What stands beside the vector of a row."""
        return self.columns[column][row].as_py()


class KeptVectors:
    """Safe to use from several threads; one of them reads."""

    def __init__(self, home: Home, what: str, query: str) -> None:
        """`query` is SQL of `embedding` and columns beside it; `what` says of whom they are."""
        self._home, self._what, self._query = home, what, query
        self._kept: tuple[str, Mapping[Identifier, str], Kept] | None = None
        self._reading, self._pause = threading.Lock(), LakePause()

    def of(self, version: str, catalogue: Mapping[Identifier, str], parameters: Mapping[str, Any]) -> Kept:
        """What the query gives with the parameters of a model_version; `catalogue` is another object after
        each publish.

        Raises Busy while another request reads, NotReady, Unreachable, Damaged or NotWritable when the lake
        cannot be read, and BadInput where there are more than MOST_BYTES.
        """
        kept = self._current(version, catalogue)
        if kept is not None:
            return kept
        with in_turn(self._reading, f"the vectors of all {self._what}"):
            kept = self._current(version, catalogue)
            if kept is None:
                self._kept = None  # so that memory never holds those of two versions
                kept = self._read(parameters)
                self._kept = version, catalogue, kept
            return kept

    def _current(self, version: str, catalogue: Mapping[Identifier, str]) -> Kept | None:
        kept = self._kept
        return kept[2] if kept is not None and kept[0] == version and kept[1] is catalogue else None

    def _read(self, parameters: Mapping[str, Any]) -> Kept:
        self._pause.require_off(self._home)
        try:
            with _as_published(self._home) as connection:
                reader = connection.execute(self._query, parameters).to_arrow_reader(_ROWS)
                beside = [name for name in reader.schema.names if name != "embedding"]
                parts = [reader.schema.empty_table().select(beside)]
                directions = Directions.of(self._vectors(reader, beside, parts))
        except BadInput:
            raise
        except BaheError:
            self._pause.begin()
            raise
        return Kept(directions=directions, columns=pa.concat_tables(parts))

    def _vectors(
        self, reader: pa.RecordBatchReader, beside: list[str], parts: list[pa.Table]
    ) -> Iterator[Float32]:
        """The vectors as they are read; what is beside them goes to `parts`."""
        size = 0
        for batch in reader:
            table = pa.Table.from_batches([batch])
            # Copied, since a column of a batch keeps all of the batch in memory.
            parts.append(table.select(beside).take(np.arange(table.num_rows)))
            vectors = vector_matrix(table["embedding"])
            size += parts[-1].nbytes + BYTES_EACH * vectors.size
            if size > MOST_BYTES:
                raise BadInput(
                    f"the vectors of all {self._what} take more than the {MOST_BYTES / 2**30:g} GiB that a"
                    " service keeps of them; search them in the lake or in an index of your own."
                )
            yield vectors


@contextmanager
def _as_published(home: Home) -> Iterator[duckdb.DuckDBPyConnection]:
    """The lake as the last publish found it; as it is where that is not known any more."""
    said = counted.read(home)
    try:
        connection = connect(home, as_of=None if said is None else said.snapshot)
    except BadInput:  # the lake has let go of that snapshot
        connection = connect(home)
    try:
        with damaged_files_named(home):
            yield connection
    finally:
        connection.close()
