"""From the type that values came in to the type of the column they go to: each value exactly, or an error.

The one conversion of pushed and materialized rows, whether they go offline or online. Arrow, pandas, DuckDB
and Feast would each convert in their own way: of 3.7 in an integer column they make an error, 3.7, 4 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.value_type import ValueType

from bahe_core.errors import BadInput, one_line

_ARROW_TYPES: dict[ValueType, pa.DataType] = {
    ValueType.FLOAT: pa.float32(),
    ValueType.DOUBLE: pa.float64(),
    ValueType.INT32: pa.int32(),
    ValueType.INT64: pa.int64(),
    ValueType.BOOL: pa.bool_(),
    ValueType.STRING: pa.string(),
}
ELEMENTS: dict[ValueType, ValueType] = {
    ValueType.FLOAT_LIST: ValueType.FLOAT,
    ValueType.DOUBLE_LIST: ValueType.DOUBLE,
    ValueType.INT32_LIST: ValueType.INT32,
    ValueType.INT64_LIST: ValueType.INT64,
    ValueType.BOOL_LIST: ValueType.BOOL,
    ValueType.STRING_LIST: ValueType.STRING,
}
"""The types of lists, with that of their elements."""


def arrow_table(frame: pd.DataFrame, what: str) -> pa.Table:
    """A pandas frame as Arrow, its index dropped.

    Raises BadInput, naming the column, when its values are of several types, or integers beyond 64 bits.
    """
    arrays = []
    for name, values in frame.items():
        try:
            arrays.append(pa.array(values, from_pandas=True))
        except OverflowError:
            raise BadInput(f"{what}: column {name} has an integer beyond 64 bits; make it text.") from None
        except (pa.ArrowException, ValueError) as error:
            raise BadInput(
                f"{what}: column {name} cannot be read ({one_line(error)}); give it values of one type."
            ) from None
    return pa.table(arrays, names=[str(name) for name in frame.columns])


def converted_table(table: pa.Table, types: Mapping[str, pa.DataType], what: str) -> pa.Table:
    """The table with these columns converted; others, and names that it has not, are passed over.

    Raises BadInput as `converted` does.
    """
    for name in types:
        index = table.schema.get_field_index(name)
        if index >= 0:
            column = converted(table.column(index), types[name], f"{what}: column {name}")
            table = table.set_column(index, name, column)
    return table


def converted(
    column: pa.Array | pa.ChunkedArray, kind: pa.DataType, what: str
) -> pa.Array | pa.ChunkedArray:
    """The column in the type, nulls kept; NaN is a null among integers.

    No number is rounded, cut or wrapped, and text or a truth value is no number. Only what is approximate
    by itself may lose digits: a double or decimal on its way to a float, and times beyond microseconds,
    which neither Feast nor the lake keeps. Types without a counterpart here (structs, maps) are returned
    as they are. Raises BadInput, naming the first value that does not fit.
    """
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if column.type == kind or pa.types.is_null(column.type):
        return column if column.type == kind else pc.cast(column, kind)
    given, needed = _family(column.type), _family(kind)
    if needed is None or given is None:
        return column
    if given == "list" and needed == "list":
        return _converted_lists(column, kind, what)
    if given != needed and {given, needed} != {"integer", "real"}:
        raise BadInput(f"{what} has {column.type}, but a column of {kind} is needed; convert it.")
    if pa.types.is_timestamp(kind):
        return pc.cast(column, kind, safe=False)
    if given == "real" and needed == "integer" and pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    cast = _cast(column, kind)
    if cast is None:
        misfit = next(v.as_py() for v in column if _cast(pa.array([v.as_py()], column.type), kind) is None)
        raise BadInput(
            f"{what} has {misfit}, which does not fit a column of {kind}; correct it, or give the column"
            " another type."
        )
    return cast


def _cast(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray | None:
    """The column in the type; None where a value would change, which Arrow does not always notice."""
    try:
        cast = pc.cast(column, kind)
    except pa.ArrowInvalid:
        return None
    if pa.types.is_floating(column.type):
        if kind == pa.float32() and pc.any(pc.not_equal(pc.is_inf(cast), pc.is_inf(column))).as_py():
            return None
        if pa.types.is_decimal(kind) and pc.any(pc.not_equal(pc.cast(cast, column.type), column)).as_py():
            return None
    return cast


def arrow_type(kind: ValueType) -> pa.DataType | None:
    """The Arrow type of a feature or join key; None for those that Feast alone converts (times, maps …)."""
    if kind in _ARROW_TYPES:
        return _ARROW_TYPES[kind]
    element = _ARROW_TYPES.get(ELEMENTS.get(kind, ValueType.UNKNOWN))
    return None if element is None else pa.list_(element)


def _converted_lists(
    column: pa.Array | pa.ChunkedArray, kind: pa.DataType, what: str
) -> pa.Array | pa.ChunkedArray:
    if isinstance(column, pa.ChunkedArray):
        return pa.chunked_array([_converted_lists(chunk, kind, what) for chunk in column.chunks], type=kind)
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths.cast(pa.int64()))])
    elements = converted(column.flatten(), kind.value_type, f"{what}: a list")
    if isinstance(elements, pa.ChunkedArray):
        elements = elements.combine_chunks()
    mask = column.is_null() if column.null_count else None
    lists = pa.LargeListArray.from_arrays(offsets, elements, mask=mask)
    return lists.cast(kind)


def _family(kind: pa.DataType) -> str | None:
    """Types of one family convert into each other; None for those that are not converted here."""
    types = pa.types
    if types.is_integer(kind):
        return "integer"
    if types.is_floating(kind) or types.is_decimal(kind):
        return "real"
    if types.is_boolean(kind):
        return "truth value"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_timestamp(kind) or types.is_date(kind):
        return "time"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "list"
    return None
