"""Arrow columns to the bytes that Feast's online stores hold, a column at a time.

A value is a serialised `feast.types.Value`, a key what `serialize_entity_key` (version 3) makes of an
entity's join keys: byte for byte what Feast itself writes. Numbers, strings and lists of them are laid out
by numpy; other types go through Feast's own conversion.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.protos.feast.types.Value_pb2 import ValueType as WireType
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType

from bahe_core.errors import BadInput
from feast_ducklake.conversion import ELEMENTS

Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers: https://protobuf.dev/programming-guides/encoding"""

_SMALL_INTEGERS = {pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16()}
_INTEGERS = {*_SMALL_INTEGERS, pa.int64(), pa.uint32()}
_FLOATS = {pa.float32(), pa.float64()}
_STRINGS = {pa.string(), pa.large_string()}

# Arrow types that are laid out here; any other is left to Feast's conversion, which knows more of them.
_ARROW_TYPES: dict[ValueType, set[pa.DataType]] = {
    ValueType.FLOAT: _FLOATS,
    ValueType.DOUBLE: _FLOATS,
    ValueType.INT32: _SMALL_INTEGERS,
    ValueType.INT64: _INTEGERS,
    ValueType.BOOL: {pa.bool_()},
    ValueType.STRING: _STRINGS,
}
_KEY_TYPES: dict[ValueType, int] = {
    ValueType.STRING: WireType.STRING,
    ValueType.INT32: WireType.INT32,
    ValueType.INT64: WireType.INT64,
}
# What Feast puts in the place of a null inside a list.
_NULL_ELEMENT: dict[ValueType, float | int | bool | str] = {
    ValueType.FLOAT: float("nan"),
    ValueType.DOUBLE: float("nan"),
    ValueType.INT32: 0,
    ValueType.INT64: 0,
    ValueType.BOOL: False,
    ValueType.STRING: "",
}


def value_bytes(column: pa.Array | pa.ChunkedArray, value_type: ValueType) -> list[bytes]:
    """Each row's value as Feast writes it; empty bytes are Feast's null.

    NaN in a column of single numbers is a null, as in Feast; inside lists it stays. A null inside a list
    becomes what Feast's conversion of Python lists makes of it: NaN, 0, False or "".
    """
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in value_bytes(chunk, value_type)]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    element = ELEMENTS.get(value_type)
    if element is not None and _is_list(column.type) and column.type.value_type in _ARROW_TYPES[element]:
        return _list_bytes(column, value_type, element)
    if column.type in _ARROW_TYPES.get(value_type, ()):
        return _scalar_bytes(column, value_type)
    return _by_feast(column, value_type)


def entity_keys(
    columns: Mapping[str, pa.Array | pa.ChunkedArray], types: Mapping[str, ValueType]
) -> list[bytes]:
    """Each row's entity key, of one or more columns by join key and the types that Feast has for them.

    Raises BadInput when a key is null, or of a type that cannot be a key.
    """
    names = sorted(columns)
    prefix = _key_prefix(names)
    parts = [_key_parts(name, columns[name], types[name]) for name in names]
    return [prefix + b"".join(row) for row in zip(*parts, strict=True)]


def few_entity_keys(
    columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]], types: Mapping[str, ValueType]
) -> list[bytes] | None:
    """`entity_keys` of Python values, for a request of a few; none where a value is not of its type.

    Arrow takes longer to begin than this for some dozens, and on a busy machine waits for its threads.
    """
    names = sorted(columns)
    prefix, parts = _key_prefix(names), []
    for name in names:
        kind = types[name]
        if kind == ValueType.STRING and all(type(value) is str for value in columns[name]):
            texts = [value.encode() for value in columns[name]]
            parts.append([struct.pack("<II", WireType.STRING, len(text)) + text for text in texts])
        elif kind == ValueType.INT64 and all(type(value) is int for value in columns[name]):
            parts.append([struct.pack("<IIq", WireType.INT64, 8, value) for value in columns[name]])
        else:
            return None
    return [prefix + b"".join(row) for row in zip(*parts, strict=True)]


def varint_fields(numbers: Int64, number: int) -> list[bytes]:
    """A protocol buffer's integer field of each row; zero is left out, as it is by default."""
    packed, bounds = _varints(numbers)
    tag = _varint(number << 3 | _VARINT)
    return _sliced(packed.tobytes(), bounds, lambda _: tag, numbers != 0)


def read_floats(values: Sequence[bytes], value_type: ValueType) -> npt.NDArray[np.float32]:
    """Vectors from the wire bytes of lists of floats or doubles; [N, D] float32.

    Raises BadInput when they are not all of one length, or hold something else.
    """
    dtype = np.dtype("<f4" if value_type == ValueType.FLOAT_LIST else "<f8")
    if not values:
        return np.empty((0, 0), dtype=np.float32)
    size = len(values[0])
    joined = b"".join(values)
    header = list_header(value_type, size)
    if header is None or len(joined) != size * len(values) or (size - len(header)) % dtype.itemsize:
        raise BadInput(
            "these vectors differ in length, or are no lists of floats; read them as features instead."
        )
    table = np.frombuffer(joined, dtype=np.uint8).reshape(len(values), size)
    if table[:, : len(header)].tobytes() != header * len(values):
        raise BadInput("these vectors are not stored as the list type that their view declares.")
    # A copy, since torch refuses arrays that are read-only or begin within a float.
    return table[:, len(header) :].copy().view(dtype).astype(np.float32, copy=False)


def _key_prefix(names: Sequence[str]) -> bytes:
    prefix = struct.pack("<I", len(names))
    for name in names:
        encoded = name.encode()
        prefix += struct.pack("<II", WireType.STRING, len(encoded)) + encoded
    return prefix


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _by_feast(column: pa.Array, value_type: ValueType) -> list[bytes]:
    if _is_list(column.type) and pa.types.is_timestamp(column.type.value_type):
        # Feast takes nanoseconds inside lists for seconds.
        column = column.cast(pa.list_(pa.timestamp("us", tz=column.type.value_type.tz)), safe=False)
    values = column.to_numpy(zero_copy_only=False)
    return [value.SerializeToString() for value in python_values_to_proto_values(values, value_type)]


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


@cache
def _tag(value_type: ValueType, wire_type: int) -> bytes:
    field = Value.DESCRIPTOR.fields_by_name[f"{value_type.name.lower()}_val"]
    return _varint(field.number << 3 | wire_type)


def number_tag(value_type: ValueType) -> bytes:
    """What precedes a single number or truth value."""
    wire_type = {ValueType.FLOAT: _FIXED32, ValueType.DOUBLE: _FIXED64}.get(value_type, _VARINT)
    return _tag(value_type, wire_type)


def _list_header(value_type: ValueType, packed: int) -> bytes:
    """What precedes the packed elements: the value's field and length, the list's field and length."""
    inner = b"\x0a" + _varint(packed) if packed else b""
    return _tag(value_type, _LENGTH) + _varint(len(inner) + packed) + inner


@cache
def list_header(value_type: ValueType, size: int) -> bytes | None:
    """The header of a list whose wire form has `size` bytes; none when no list has."""
    for packed in range(size - 2, max(size - 24, -1), -1):
        header = _list_header(value_type, packed)
        if len(header) + packed == size:
            return header
    return None


def _sliced(
    data: bytes | memoryview,
    bounds: Int64,
    header: Callable[[int], bytes],
    valid: npt.NDArray[np.bool_] | None = None,
) -> list[bytes]:
    """Rows `data[bounds[i]:bounds[i + 1]]` behind the header of their length; nulls are empty."""
    headers: dict[int, bytes] = {n: header(n) for n in np.unique(np.diff(bounds)).tolist()}
    edges = bounds.tolist()
    rows = [headers[end - start] + data[start:end] for start, end in pairwise(edges)]
    if valid is not None:
        for row in np.flatnonzero(~valid).tolist():
            rows[row] = b""
    return rows


def _valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return mask


def _packed(elements: pa.Array, kind: ValueType, edges: Int64) -> tuple[Bytes, Int64]:
    """The elements' bytes one after another, and where among them the element of each edge begins."""
    if kind in (ValueType.FLOAT, ValueType.DOUBLE):
        dtype = np.dtype("<f4" if kind == ValueType.FLOAT else "<f8")
        with np.errstate(over="ignore"):  # a double beyond float32 is infinite, as in C
            numbers = elements.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        return numbers.view(np.uint8), edges * dtype.itemsize
    if kind == ValueType.BOOL:
        return elements.cast(pa.uint8()).to_numpy(zero_copy_only=False), edges
    packed, starts = _varints(elements.cast(pa.int64()).to_numpy(zero_copy_only=False))
    return packed, starts[edges]


def _varints(numbers: Int64) -> tuple[Bytes, Int64]:
    """Varints of 64-bit integers, one after another; negative ones take ten bytes."""
    unsigned = numbers.view(np.uint64)
    lengths = np.ones(len(numbers), dtype=np.int64)
    for bits in range(7, 64, 7):
        lengths += unsigned >> np.uint64(bits) > 0
    starts = np.concatenate([[0], np.cumsum(lengths)])
    out = np.empty(starts[-1], dtype=np.uint8)
    for byte in range(int(lengths.max(initial=0))):
        there = np.flatnonzero(lengths > byte)
        septet = (unsigned[there] >> np.uint64(7 * byte) & np.uint64(127)).astype(np.uint8)
        more = (lengths[there] > byte + 1).astype(np.uint8) << 7
        out[starts[there] + byte] = septet | more
    return out, starts


def _strings(column: pa.Array) -> tuple[bytes, Int64]:
    """The UTF-8 of all rows one after another, and where each begins; nulls are empty."""
    filled = pc.fill_null(column.cast(pa.large_string()), "")
    _, offsets, data = filled.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[filled.offset : filled.offset + len(filled) + 1]
    if data is None or not len(filled):
        return b"", np.zeros(len(filled) + 1, dtype=np.int64)
    # A slice of a column shares the whole column's buffer.
    first, last = int(bounds[0]), int(bounds[-1])
    return data.slice(first, last - first).to_pybytes(), bounds - first


def _scalar_bytes(column: pa.Array, value_type: ValueType) -> list[bytes]:
    valid = _valid(column)
    if value_type == ValueType.STRING:
        tag = _tag(value_type, _LENGTH)
        data, bounds = _strings(column)
        return _sliced(data, bounds, lambda length: tag + _varint(length), valid)
    if value_type in (ValueType.FLOAT, ValueType.DOUBLE):
        valid = valid & ~pc.is_nan(column).fill_null(False).to_numpy(zero_copy_only=False)
    tag = number_tag(value_type)
    filled = pc.fill_null(column, pa.scalar(0).cast(column.type))
    packed, bounds = _packed(filled, value_type, np.arange(len(column) + 1))
    return _sliced(packed.tobytes(), bounds, lambda _: tag, valid)


def _list_bytes(column: pa.Array, value_type: ValueType, element: ValueType) -> list[bytes]:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    rows = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    # Not `.values`, which also holds what lies outside a slice and under nulls.
    elements = column.flatten()
    if elements.null_count:
        elements = pc.fill_null(elements, pa.scalar(_NULL_ELEMENT[element], elements.type))
    if element == ValueType.STRING:
        data, bounds = _strings(elements)
        each = _sliced(data, bounds, lambda length: b"\x0a" + _varint(length))
        tag = _tag(value_type, _LENGTH)
        joined = [b"".join(each[start:end]) for start, end in pairwise(rows.tolist())]
        valid = _valid(column).tolist()
        return [
            tag + _varint(len(row)) + row if there else b""
            for row, there in zip(joined, valid, strict=True)
        ]
    packed, bounds = _packed(elements, element, rows)
    return _sliced(packed.data, bounds, lambda length: _list_header(value_type, length), _valid(column))


def _key_parts(name: str, column: pa.Array | pa.ChunkedArray, value_type: ValueType) -> list[bytes]:
    """Type, length and bytes of one join key, row by row."""
    if isinstance(column, pa.ChunkedArray):
        return [part for chunk in column.chunks for part in _key_parts(name, chunk, value_type)]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        raise BadInput(f"{column.null_count} rows have no {name}, which is a join key; give each row one.")
    if column.type not in _ARROW_TYPES.get(value_type, ()) or value_type not in _KEY_TYPES:
        return _key_parts_by_feast(name, column, value_type)
    kind = _KEY_TYPES[value_type]
    if value_type == ValueType.STRING:
        data, bounds = _strings(column)
        return _sliced(data, bounds, lambda length: struct.pack("<II", kind, length))
    dtype = np.dtype("<i4" if value_type == ValueType.INT32 else "<i8")
    data = column.to_numpy(zero_copy_only=False).astype(dtype).tobytes()
    size, head = dtype.itemsize, struct.pack("<II", kind, dtype.itemsize)
    return [head + data[at : at + size] for at in range(0, len(data), size)]


def _key_parts_by_feast(name: str, column: pa.Array, value_type: ValueType) -> list[bytes]:
    values = python_values_to_proto_values(column.to_numpy(zero_copy_only=False), value_type)
    before = len(_key_prefix([name]))
    try:
        return [
            serialize_entity_key(
                EntityKey(join_keys=[name], entity_values=[value]), entity_key_serialization_version=3
            )[before:]
            for value in values
        ]
    except ValueError:
        raise BadInput(
            f"{name} is {value_type.name}, which cannot be a join key; use an integer or a string."
        ) from None
