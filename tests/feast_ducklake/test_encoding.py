"""The bytes are Feast's own: every value type, against Feast's conversion, value by value."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from bahe_core.errors import BadInput
from feast_ducklake.online.encoding import entity_keys, few_entity_keys, read_floats, value_bytes

EXACT = 2**53
FLOAT32 = st.floats(width=32)
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INSTANTS = st.integers(-(2**62), 2**62)
BYTES = st.binary(max_size=12)
UUIDS = st.uuids().map(str)
JSON = st.sampled_from(["{}", "[1, 2]", '{"a": {"b": null}}', '"text"', "3"])

SCALARS: list[tuple[ValueType, pa.DataType, st.SearchStrategy[Any]]] = [
    (ValueType.FLOAT, pa.float32(), FLOAT32),
    (ValueType.FLOAT, pa.float64(), st.floats()),
    (ValueType.DOUBLE, pa.float64(), st.floats()),
    (ValueType.INT32, pa.int32(), INT32),
    (ValueType.INT32, pa.int8(), st.integers(-128, 127)),
    # Feast reads integers beside nulls as doubles; `test_large_integers_beside_nulls` has the rest.
    (ValueType.INT64, pa.int64(), st.integers(-EXACT, EXACT)),
    (ValueType.INT64, pa.int32(), INT32),
    (ValueType.BOOL, pa.bool_(), st.booleans()),
    (ValueType.STRING, pa.string(), TEXT),
    (ValueType.STRING, pa.large_string(), TEXT),
    (ValueType.BYTES, pa.binary(), BYTES),
    (ValueType.IMAGE_BYTES, pa.binary(), BYTES),
    (ValueType.PDF_BYTES, pa.binary(), BYTES),
    (ValueType.UNIX_TIMESTAMP, pa.timestamp("us", tz="UTC"), INSTANTS),
    (ValueType.UNIX_TIMESTAMP, pa.timestamp("ns"), INSTANTS),
    (ValueType.UNIX_TIMESTAMP, pa.timestamp("s"), st.integers(-(2**40), 2**40)),
    (ValueType.UUID, pa.string(), UUIDS),
    (ValueType.TIME_UUID, pa.string(), UUIDS),
    (ValueType.DECIMAL, pa.string(), st.decimals(allow_nan=False, allow_infinity=False).map(str)),
    (ValueType.JSON, pa.string(), JSON),
]
LISTS: list[tuple[ValueType, pa.DataType, st.SearchStrategy[Any]]] = [
    (ValueType.FLOAT_LIST, pa.float32(), FLOAT32),
    (ValueType.FLOAT_LIST, pa.float64(), st.floats()),
    (ValueType.DOUBLE_LIST, pa.float64(), st.floats()),
    (ValueType.DOUBLE_LIST, pa.float32(), FLOAT32),
    (ValueType.INT32_LIST, pa.int32(), INT32),
    (ValueType.INT64_LIST, pa.int64(), INT64),
    (ValueType.INT64_LIST, pa.int32(), INT32),
    (ValueType.BOOL_LIST, pa.bool_(), st.booleans()),
    (ValueType.STRING_LIST, pa.string(), TEXT),
    (ValueType.BYTES_LIST, pa.binary(), BYTES),
    (ValueType.UNIX_TIMESTAMP_LIST, pa.timestamp("us"), st.integers(-(2**45), 2**45)),
    (ValueType.UUID_LIST, pa.string(), UUIDS),
    (ValueType.TIME_UUID_LIST, pa.string(), UUIDS),
    (ValueType.DECIMAL_LIST, pa.string(), st.integers().map(str)),
    (ValueType.JSON_LIST, pa.string(), JSON),
    (ValueType.FLOAT_SET, pa.float32(), st.floats(width=32, allow_nan=False)),
    (ValueType.DOUBLE_SET, pa.float64(), st.floats(allow_nan=False)),
    (ValueType.INT32_SET, pa.int32(), INT32),
    (ValueType.INT64_SET, pa.int64(), INT64),
    (ValueType.STRING_SET, pa.string(), TEXT),
    (ValueType.BOOL_SET, pa.bool_(), st.booleans()),
    (ValueType.BYTES_SET, pa.binary(), st.binary(min_size=1, max_size=12)),
    (ValueType.UUID_SET, pa.string(), UUIDS),
    (ValueType.TIME_UUID_SET, pa.string(), UUIDS),
    (ValueType.DECIMAL_SET, pa.string(), st.integers().map(str)),
    (ValueType.UNIX_TIMESTAMP_SET, pa.timestamp("us"), st.integers(-(2**45), 2**45)),
]
NESTED: list[tuple[ValueType, pa.DataType, list[Any]]] = [
    (ValueType.VALUE_LIST, pa.list_(pa.list_(pa.float64())), [[[1.0, 2.0], []], None, [[3.5]]]),
    (ValueType.VALUE_SET, pa.list_(pa.list_(pa.int64())), [[[1], [2, 3]], None]),
    (ValueType.MAP, pa.struct([("a", pa.int64()), ("b", pa.string())]), [{"a": 1, "b": "x"}, None]),
    (ValueType.STRUCT, pa.struct([("a", pa.float64())]), [{"a": 0.5}, {"a": None}, None]),
    (ValueType.MAP_LIST, pa.string(), ['[{"a": 1}, {}]', None]),
    (ValueType.STRUCT_LIST, pa.string(), ['[{"a": 1}]', None]),
    (ValueType.ZONED_TIMESTAMP, pa.null(), [None, None]),
    (ValueType.SCALAR_MAP, pa.null(), [None, None]),
]


def by_feast(column: pa.Array, value_type: ValueType) -> list[bytes]:
    """As Feast's own materialization converts a column."""
    values = python_values_to_proto_values(column.to_numpy(zero_copy_only=False), value_type)
    return [value.SerializeToString() for value in values]


def arrow(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An array that is a slice of a longer one, as batches of a table are."""
    if pa.types.is_timestamp(kind):
        whole = pa.array([None, *values, None], pa.int64()).cast(kind)
    elif pa.types.is_floating(kind):
        # Through numpy, since pyarrow refuses to narrow infinite results.
        missing = np.array([True, *(v is None for v in values), True])
        numbers = np.array([0.0, *(0.0 if v is None else v for v in values), 0.0])
        whole = pa.array(numbers.astype(kind.to_pandas_dtype()), mask=missing)
    else:
        whole = pa.array([None, *values, None], kind)
    return whole.slice(1, len(values))


@pytest.mark.parametrize(
    ("value_type", "kind", "values"), SCALARS, ids=[f"{t.name}-{k}" for t, k, _ in SCALARS]
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_scalars(
    value_type: ValueType, kind: pa.DataType, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    column = arrow(data.draw(st.lists(st.none() | values, max_size=12)), kind)
    assert value_bytes(column, value_type) == by_feast(column, value_type)


@pytest.mark.parametrize(
    ("value_type", "kind", "values"), LISTS, ids=[f"{t.name}-{k}" for t, k, _ in LISTS]
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_lists_and_sets(
    value_type: ValueType, kind: pa.DataType, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.none() | st.lists(values, max_size=6), max_size=8))
    flat = arrow([v for row in rows if row is not None for v in row], kind)
    lengths = [0 if row is None else len(row) for row in rows]
    missing = pa.array([row is None for row in rows], pa.bool_())
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    column = pa.ListArray.from_arrays(offsets, flat, mask=missing)
    assert value_bytes(column, value_type) == by_feast(column, value_type)
    assert value_bytes(column.slice(1), value_type) == by_feast(column, value_type)[1:]


@pytest.mark.parametrize(("value_type", "kind", "values"), NESTED, ids=[t.name for t, _, _ in NESTED])
def test_nested_types(value_type: ValueType, kind: pa.DataType, values: list[Any]) -> None:
    column = pa.array(values, kind)
    assert value_bytes(column, value_type) == by_feast(column, value_type)


@given(rows=st.lists(st.tuples(INT64, TEXT), max_size=5))
def test_keys_of_a_few_python_values(rows: list[tuple[int, str]]) -> None:
    types = {"user_id": ValueType.INT64, "version": ValueType.STRING}
    columns = {"version": [text for _, text in rows], "user_id": [number for number, _ in rows]}
    arrow_columns = {
        "version": pa.array(columns["version"], pa.string()),
        "user_id": pa.array(columns["user_id"], pa.int64()),
    }
    assert few_entity_keys(columns, types) == entity_keys(arrow_columns, types)
    if rows:
        assert few_entity_keys({**columns, "user_id": [True] * len(rows)}, types) is None


def test_every_value_type_is_covered() -> None:
    covered = {t for t, _, _ in SCALARS} | {t for t, _, _ in LISTS} | {t for t, _, _ in NESTED}
    assert set(ValueType) - covered == {ValueType.UNKNOWN, ValueType.NULL}


def test_chunks_dictionaries_and_fixed_sizes_change_nothing() -> None:
    rows = [[1.0, 2.0], None, [3.0, float("nan")], [5.0, 6.0]]
    lists = pa.array(rows, pa.list_(pa.float32()))
    wanted = by_feast(lists, ValueType.FLOAT_LIST)
    chunked = pa.chunked_array([lists[:1], lists[1:1], lists[1:]])
    assert value_bytes(chunked, ValueType.FLOAT_LIST) == wanted
    for kind in (pa.list_(pa.float32(), 2), pa.large_list(pa.float32())):
        column = pa.array(rows, kind)
        assert value_bytes(column, ValueType.FLOAT_LIST) == wanted
        assert value_bytes(column[1:], ValueType.FLOAT_LIST) == wanted[1:]
    words = pa.array(["a", None, "ü", "a"])
    assert value_bytes(words.dictionary_encode(), ValueType.STRING) == by_feast(words, ValueType.STRING)


def test_large_integers_beside_nulls_stay_exact() -> None:
    """Where Feast goes through a double and rounds."""
    column = pa.array([2**62 + 1, None])
    assert [Value.FromString(v).int64_val for v in value_bytes(column, ValueType.INT64)] == [2**62 + 1, 0]
    assert Value.FromString(by_feast(column, ValueType.INT64)[0]).int64_val == 2**62


def test_nulls_inside_lists_become_feasts_defaults() -> None:
    """Feast has these defaults, yet fails before it reaches them for integers out of Arrow."""
    for value_type, kind, row in (
        (ValueType.INT64_LIST, pa.int64(), [1, None]),
        (ValueType.BOOL_LIST, pa.bool_(), [True, None]),
        (ValueType.STRING_LIST, pa.string(), ["a", None]),
    ):
        wanted = python_values_to_proto_values([row], value_type)[0].SerializeToString()
        assert value_bytes(pa.array([row], pa.list_(kind)), value_type) == [wanted]


KEYS: list[tuple[ValueType, pa.DataType, str, st.SearchStrategy[Any]]] = [
    (ValueType.INT64, pa.int64(), "int64_val", INT64),
    (ValueType.INT64, pa.int32(), "int64_val", INT32),
    (ValueType.INT32, pa.int32(), "int32_val", INT32),
    (ValueType.STRING, pa.string(), "string_val", TEXT),
    (ValueType.STRING, pa.int64(), "string_val", INT64),
    (ValueType.BYTES, pa.binary(), "bytes_val", st.binary(min_size=1, max_size=9)),
    (ValueType.UNIX_TIMESTAMP, pa.timestamp("s"), "unix_timestamp_val", st.integers(0, 2**40)),
]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_entity_keys(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3))
    names = data.draw(st.lists(TEXT, min_size=len(kinds), max_size=len(kinds), unique=True))
    count = data.draw(st.integers(0, 5))
    drawn = [data.draw(st.lists(values, min_size=count, max_size=count)) for *_, values in kinds]
    columns = {
        name: pa.chunked_array([arrow(rows[:2], kind[1]), arrow(rows[2:], kind[1])])
        for name, kind, rows in zip(names, kinds, drawn, strict=True)
    }
    wanted = [
        serialize_entity_key(
            EntityKey(
                join_keys=names,
                entity_values=[
                    Value(**{kind[2]: str(rows[i]) if kind[2] == "string_val" else rows[i]})
                    for kind, rows in zip(kinds, drawn, strict=True)
                ],
            ),
            entity_key_serialization_version=3,
        )
        for i in range(count)
    ]
    types = {name: kind[0] for name, kind in zip(names, kinds, strict=True)}
    assert entity_keys(columns, types) == wanted


def test_keys_that_cannot_be() -> None:
    with pytest.raises(BadInput, match="1 rows have no user_id"):
        entity_keys({"user_id": pa.array([1, None])}, {"user_id": ValueType.INT64})
    with pytest.raises(BadInput, match="rate is DOUBLE, which cannot be a join key"):
        entity_keys({"rate": pa.array([0.5])}, {"rate": ValueType.DOUBLE})


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 300), st.sampled_from([ValueType.FLOAT_LIST, ValueType.DOUBLE_LIST])
)
def test_vectors_come_back(rows: int, width: int, value_type: ValueType) -> None:
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    stored = value_bytes(pa.array(list(vectors), pa.list_(pa.float32())), value_type)
    back = read_floats(stored, value_type)
    assert back.dtype == np.float32
    assert back.flags.writeable
    assert back.strides == vectors.strides or not vectors.size
    np.testing.assert_array_equal(back, vectors if rows else np.empty((0, 0)))


def test_vectors_that_are_none() -> None:
    one, two = value_bytes(pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32())), ValueType.FLOAT_LIST)
    text = Value(string_val="abc").SerializeToString()
    numbers = Value(int64_list_val={"val": [1, 2, 3]}).SerializeToString()
    for stored in ([one, two], [text], [numbers], [b""], [one[:-1]]):
        with pytest.raises(BadInput, match="these vectors"):
            read_floats(stored, ValueType.FLOAT_LIST)


def test_a_golden_value() -> None:
    """Field 16, length-delimited; inside it field 1, packed; then little-endian floats."""
    value = value_bytes(pa.array([[1.0, -2.0]], pa.list_(pa.float32())), ValueType.FLOAT_LIST)
    assert value == [b"\x82\x01\x0a\x0a\x08" + struct.pack("<2f", 1, -2)]
    (moment,) = value_bytes(pa.array([datetime(2024, 1, 1, tzinfo=UTC)]), ValueType.UNIX_TIMESTAMP)
    assert Value.FromString(moment).unix_timestamp_val == 1704067200
