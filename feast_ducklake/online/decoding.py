"""Bytes of online stores to Python values, a column at a time: the way back of `encoding`.

Numbers and lists of floats are read by numpy; other types go through Feast's own conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import feast_value_type_to_python_type
from feast.value_type import ValueType

from feast_ducklake.online.encoding import list_header, number_tag

_Dtypes = dict[ValueType, np.dtype[Any]]
_FIXED: _Dtypes = {
    ValueType.FLOAT: np.dtype("<f4"),
    ValueType.DOUBLE: np.dtype("<f8"),
}
_LISTS: _Dtypes = {
    ValueType.FLOAT_LIST: np.dtype("<f4"),
    ValueType.DOUBLE_LIST: np.dtype("<f8"),
}
_INTEGERS = {ValueType.INT32, ValueType.INT64}
_FEW = 8
"""Values below which numpy takes longer to begin than Feast's conversion to end."""
_MOST_BYTES = 11
"""Of an integer: a tag and ten septets."""


def python_values(stored: Sequence[bytes | None], value_type: ValueType) -> list[Any]:
    """What Feast's `to_dict` gives of a column; None where nothing or a null is stored."""
    there = [value for value in stored if value]
    read = _reader(there, value_type)
    if read is None:
        return [None if not value else _by_feast(value, value_type) for value in stored]
    values = read()
    if len(there) == len(stored):
        return values
    rest = iter(values)
    return [next(rest) if value else None for value in stored]


def _reader(there: list[bytes], value_type: ValueType) -> Callable[[], list[Any]] | None:
    """How to read a whole column; none where one of its values is not what its type says."""
    if value_type in _LISTS:
        dtype = _LISTS[value_type]
        headers = [list_header(value_type, len(value)) for value in there]
        if all(h is not None and v.startswith(h) for h, v in zip(headers, there, strict=True)):
            starts = [len(header or b"") for header in headers]
            return lambda: [
                np.frombuffer(value, dtype, offset=start).tolist() if len(value) > start else []
                for value, start in zip(there, starts, strict=True)
            ]
        return None
    if len(there) < _FEW or not (value_type in _FIXED or value_type in _INTEGERS):
        return None
    tag = number_tag(value_type)
    if not all(value.startswith(tag) for value in there):
        return None
    if value_type in _FIXED:
        size = len(tag) + _FIXED[value_type].itemsize
        table = np.frombuffer(b"".join(there), np.uint8)
        if len(table) != size * len(there):
            return None
        rows = table.reshape(-1, size)[:, len(tag) :]
        return lambda: rows.copy().view(_FIXED[value_type])[:, 0].tolist()
    if max(map(len, there)) > _MOST_BYTES:
        return None
    return lambda: _integers(there, len(tag)).tolist()


def _integers(values: Sequence[bytes], tag: int) -> npt.NDArray[np.int64]:
    """64-bit integers from varints behind a tag."""
    width = max(map(len, values))
    padded = b"".join(value.ljust(width, b"\0") for value in values)
    septets = np.frombuffer(padded, np.uint8).reshape(len(values), width)[:, tag:].astype(np.uint64)
    shifts = np.arange(0, 7 * (width - tag), 7, dtype=np.uint64)
    # Bits beyond the 64th fall off, as they should for negative numbers.
    numbers: npt.NDArray[np.uint64] = ((septets & np.uint64(127)) << shifts).sum(axis=1, dtype=np.uint64)
    return numbers.view(np.int64)


def _by_feast(value: bytes, value_type: ValueType) -> Any:
    return feast_value_type_to_python_type(Value.FromString(value), value_type)
