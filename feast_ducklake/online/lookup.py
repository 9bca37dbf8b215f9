"""What a lookup is asked for: the entity rows of `get_online_features`, checked before anything is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from feast import FeatureService, utils
from feast.feature_view import DUMMY_ENTITY_ID
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.Value_pb2 import Value
from feast.value_type import ValueType

from bahe_core.errors import BadInput, clipped

_BITS = {ValueType.INT32: 32, ValueType.INT64: 64}


def checked_entities(
    registry: BaseRegistry,
    project: str,
    features: list[str] | FeatureService,
    entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    full_feature_names: bool,
) -> Mapping[str, Any]:
    """The entities of a request by column, each value in the type of its join key.

    So are the values that views on demand are computed of. Raises BadInput when a join key of a requested
    view is missing, or a value is none of its type: Feast would answer for user 1 when asked for user 1.7,
    and with nulls where one of two join keys is missing.
    """
    columns = _columns(entity_rows)
    context = utils._get_cached_request_context(registry, project, features, full_feature_names)
    _, on_demand, key_of_entity, types, _, grouped_features, _, request_data, _ = context
    views: dict[str, str] = {}
    for view, _ in grouped_features:
        for column in view.entity_columns:  # not `join_keys`, which typeguard makes slow
            key = column.name
            views.setdefault(view.projection.join_key_map.get(key, key), view.name)
    views.pop(DUMMY_ENTITY_ID, None)
    # Feast also takes an entity's name for its join key, with a warning.
    keys = {name: name if name in views else key_of_entity.get(name, name) for name in columns}
    others = {name for name, key in keys.items() if key not in views and name not in request_data}
    _check_keys(views, keys, others)
    kinds = {
        field.name: field.dtype.to_value_type()
        for view in on_demand
        for source in view.source_request_sources.values()
        for field in source.schema
    } | {name: types.get(key, ValueType.UNKNOWN) for name, key in keys.items() if key in views}

    def is_checked(name: str, values: Any) -> bool:
        # Nulls are for Feast to take, but not among join keys.
        nulls = isinstance(values, Sequence) and None in values
        return name in kinds and (keys[name] in views or not nulls)

    return {
        name: _values(name, values, kinds[name]) if is_checked(name, values) else values
        for name, values in columns.items()
    }


def _columns(entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(entity_rows, Mapping):
        return entity_rows
    if not entity_rows:
        raise BadInput("the lookup has no entity rows; give at least one.")
    names = entity_rows[0].keys()
    for number, row in enumerate(entity_rows, start=1):
        if row.keys() != names:
            raise BadInput(
                f"entity row {number} of the lookup has {_listed(row)}, the first has {_listed(names)};"
                " give all rows the same join keys."
            )
    return {name: [row[name] for row in entity_rows] for name in names}


def _check_keys(views: Mapping[str, str], keys: Mapping[str, str], others: set[str]) -> None:
    """Raises BadInput when a join key is missing, with the name that was probably meant to be it.

    `keys` are the names given, with the join key of each; `others` are those that are none.
    """
    for key, view in views.items():
        if key in keys.values():
            continue
        meant = difflib.get_close_matches(key, others, n=1, cutoff=0.5)
        if meant:
            raise BadInput(f"the lookup gives {meant[0]}, but {view} is looked up by {key}; rename it.")
        raise BadInput(
            f"{view} is looked up by {key}, which the entity rows do not have (they have {_listed(keys)});"
            " add it."
        )


def _values(name: str, values: Any, kind: ValueType) -> Any:
    if not isinstance(values, Sequence) or (values and isinstance(values[0], Value)):
        return values  # protocol buffers, from Feast's servers
    if kind in _BITS:
        bits = _BITS[kind]
        if all(type(value) is int for value in values) and _fit(values, bits):
            return values  # thousands of ids would take as long to look at singly as to read
        return [_integer(name, value, bits) for value in values]
    if kind == ValueType.STRING:
        for value in values:
            if not isinstance(value, str):
                raise BadInput(
                    f"the lookup's {name} is {clipped(repr(value))}, but it is text; put it in quotes."
                )
    if kind in (ValueType.FLOAT, ValueType.DOUBLE):
        for value in values:
            if not isinstance(value, Real) or isinstance(value, bool):
                raise BadInput(
                    f"the lookup's {name} is {clipped(repr(value))}, but it is a number; correct it."
                )
    return values


def _integer(name: str, value: Any, bits: int) -> int:
    """A whole number, which the command line gives as text and pandas, beside nulls, as a float."""
    whole = isinstance(value, (int, Integral))
    whole = whole or (isinstance(value, Real) and float(value).is_integer())
    whole = whole or (isinstance(value, str) and re.fullmatch(r"-?\d+", value, re.ASCII) is not None)
    number = int(value) if whole and not isinstance(value, bool) else None
    if number is None or not _fit([number], bits):
        raise BadInput(
            f"the lookup's {name} is {clipped(repr(value))}, but it is a whole number of {bits} bits;"
            " correct it."
        )
    return number


def _fit(numbers: Sequence[int], bits: int) -> bool:
    return not numbers or (min(numbers) >= -(2 ** (bits - 1)) and max(numbers) < 2 ** (bits - 1))


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
