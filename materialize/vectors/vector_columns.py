"""Vectors between a column of the lake and the matrix that models read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bahe_core.errors import BadInput


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
