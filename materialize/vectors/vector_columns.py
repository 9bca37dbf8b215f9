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


def vectors_or_nan(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """An Arrow column of lists as float32 [rows, width], NaN where there is none.

    Raises BadInput when one has another length.
    """
    known_N = pc.is_valid(column).to_numpy()
    vectors = np.full((len(column), width), np.nan, dtype=np.float32)
    if known_N.any():
        known = vector_matrix(column.drop_null())
        if known.shape[1] != width:
            raise BadInput(
                f"the frame has vectors of {known.shape[1]} numbers instead of {width}; pull it again."
            )
        vectors[known_N] = known
    return vectors
