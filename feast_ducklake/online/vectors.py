"""Embeddings of many entities as one array, from whatever online store is configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from feast.infra.key_encoding_utils import deserialize_entity_key
from feast.value_type import ValueType

from bahe_core.errors import BadInput
from feast_ducklake.online.encoding import entity_keys, few_entity_keys
from feast_ducklake.online.rows import NO_TIME, StoredValues, Vectors, as_vectors, microseconds, within_ttl
from feast_ducklake.online.store import GuardedOnlineStore

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

_ARROW = {ValueType.STRING: pa.string(), ValueType.INT64: pa.int64(), ValueType.INT32: pa.int32()}

_FEW = 200


def view_keys(view: FeatureView, keys: Mapping[str, Sequence[Any] | npt.NDArray[Any]]) -> list[bytes]:
    """Each row's entity key as stores know it, of a column for each join key.

    Raises BadInput when a join key is missing.
    """
    return encoded_keys(view.name, key_types(view), keys)


def key_types(view: FeatureView) -> dict[str, ValueType]:
    """Types of a view's join keys."""
    return {column.name: column.dtype.to_value_type() for column in view.entity_columns}


def encoded_keys(
    view: str, types: Mapping[str, ValueType], keys: Mapping[str, Sequence[Any] | npt.NDArray[Any]]
) -> list[bytes]:
    """`view_keys` where the types are known. Raises BadInput when a join key is missing."""
    for name in types:
        if name not in keys:
            raise BadInput(f"view {view} is keyed by {', '.join(types)}; give {name}.")
    given = {name: keys[name] for name in types}
    few = few_entity_keys(given, types) if all(len(values) <= _FEW for values in given.values()) else None
    if few is not None:
        return few
    return entity_keys(
        {name: pa.array(given[name], _ARROW.get(kind)) for name, kind in types.items()}, types
    )


class VectorReader:
    """Reads one feature of one view; looked up in the registry once, so keep it."""

    def __init__(self, store: FeatureStore, view: str, feature: str = "embedding") -> None:
        self._config = store.config
        self._online = store.provider.online_store
        self._view = store.get_feature_view(view)
        self._feature = feature
        # Once: it would cost each read of a single entity a tenth of its time.
        self._key_types = key_types(self._view)

    def read(self, keys: Mapping[str, Sequence[Any] | npt.NDArray[Any]]) -> Vectors:
        """Vectors of entities given as a column for each join key, in their order.

        On our stores no number becomes a Python object on the way; on others each does.
        Raises BadInput when a join key is missing, or the stored vectors differ in length.
        """
        rows = encoded_keys(self._view.name, self._key_types, keys)
        if isinstance(self._online, GuardedOnlineStore):
            return self._online.read_vectors(self._config, self._view, rows, self._feature)
        return self._by_feast(rows)

    def _by_feast(self, keys: Sequence[bytes]) -> Vectors:
        entities = [deserialize_entity_key(key) for key in keys]
        answers = self._online.online_read(self._config, self._view, entities, [self._feature])
        stored = [(values or {}).get(self._feature) for _, values in answers]
        values = [None if value is None else value.SerializeToString() for value in stored]
        events = [NO_TIME if moment is None else microseconds(moment) for moment, _ in answers]
        stored_values = StoredValues({self._feature: values}, np.array(events, dtype=np.int64))
        return as_vectors(self._view, self._feature, within_ttl(self._view, stored_values))
