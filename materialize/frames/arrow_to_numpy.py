"""Arrow columns as NumPy arrays of numbers, which become tensors.

Integers, booleans and times stay whole numbers; text is hashed; lists are padded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from bahe_core.errors import BadInput

Array = npt.NDArray[Any]


def readable(kind: pa.DataType) -> bool:
    """Whether a column of this type can be a tensor."""
    if _is_list(kind):
        return not _is_list(kind.value_type) and readable(kind.value_type)
    return _is_text(kind) or _is_whole(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def arrays_of(column: str, values: pa.Array, nullable: bool) -> dict[str, Array]:
    """A column of a batch as arrays, by the rules of FrameDataset."""
    kind = values.type
    if _is_list(kind):
        return _padded(column, values)
    if _is_text(kind):
        return {column: _hashes(values)}
    if _is_whole(kind):
        if _is_time(kind):
            values = values.cast(pa.timestamp("us"), safe=False)
        whole = values.cast(pa.int64())
        if nullable:
            return {column: whole.to_numpy(zero_copy_only=False).astype(np.float64)}
        return {column: whole.to_numpy(zero_copy_only=False)}
    return {column: values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)}


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_time(kind))


def _padded(column: str, values: pa.Array) -> dict[str, Array]:
    length_N = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = values.flatten()  # without null lists
    whole = _is_whole(flat.type) or _is_text(flat.type)
    if whole and flat.null_count:
        raise BadInput(f"column {column} has nulls inside its lists; fill them.")
    filling = arrays_of(column, flat, nullable=False)[column]
    there_NL = np.arange(length_N.max(initial=0)) < length_N[:, None]
    padded_NL = np.zeros(there_NL.shape, dtype=filling.dtype)
    padded_NL[there_NL] = filling
    return {column: padded_NL, f"{column}_length": length_N}


def _hashes(values: pa.Array) -> Array:
    """64-bit hashes [N], never negative; each distinct text is hashed once."""
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
    hashed = (pd.util.hash_array(distinct, categorize=False) >> np.uint64(1)).astype(np.int64)
    hashed = np.append(hashed, 0)
    hash_N: Array = hashed[pc.fill_null(encoded.indices, len(distinct)).to_numpy(zero_copy_only=False)]
    return hash_N
