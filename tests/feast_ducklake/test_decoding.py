"""Stored bytes are read as Feast reads them, value by value, whatever the type of the column."""

from __future__ import annotations

import numpy as np
import pytest
from feast.protos.feast.types.Value_pb2 import DoubleList, FloatList, Int64List, StringList, Value
from feast.type_map import feast_value_type_to_python_type
from feast.value_type import ValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from feast_ducklake.online.decoding import python_values

INT64 = st.integers(-(2**63), 2**63 - 1)
KINDS = {
    ValueType.FLOAT: st.floats(width=32).map(lambda v: Value(float_val=v)),
    ValueType.DOUBLE: st.floats().map(lambda v: Value(double_val=v)),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1).map(lambda v: Value(int32_val=v)),
    ValueType.INT64: INT64.map(lambda v: Value(int64_val=v)),
    ValueType.BOOL: st.booleans().map(lambda v: Value(bool_val=v)),
    ValueType.STRING: st.text(st.characters(exclude_categories=["Cs"])).map(lambda v: Value(string_val=v)),
    ValueType.UNIX_TIMESTAMP: st.integers(-(2**33), 2**33).map(lambda v: Value(unix_timestamp_val=v)),
    ValueType.FLOAT_LIST: st.lists(st.floats(width=32)).map(
        lambda v: Value(float_list_val=FloatList(val=v))
    ),
    ValueType.DOUBLE_LIST: st.lists(st.floats()).map(lambda v: Value(double_list_val=DoubleList(val=v))),
    ValueType.INT64_LIST: st.lists(INT64).map(lambda v: Value(int64_list_val=Int64List(val=v))),
    ValueType.STRING_LIST: st.lists(st.sampled_from(["", "x", "ü"])).map(
        lambda v: Value(string_list_val=StringList(val=v))
    ),
}
ANY = st.one_of(*KINDS.values())


@pytest.mark.parametrize("value_type", KINDS, ids=[kind.name for kind in KINDS])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_column_is_what_feast_makes_of_its_values(value_type: ValueType, data: st.DataObject) -> None:
    """Values of another type among them, too: a view's type may have changed since they were written."""
    one = KINDS[value_type] if data.draw(st.booleans()) else ANY
    values = data.draw(st.lists(st.none() | st.just(Value()) | one, max_size=24))
    stored = [None if value is None else value.SerializeToString() for value in values]
    wanted = [
        None if value is None else feast_value_type_to_python_type(value, value_type) for value in values
    ]
    got = python_values(stored, value_type)
    assert [type(value) for value in got] == [type(value) for value in wanted]
    np.testing.assert_equal(got, wanted)
