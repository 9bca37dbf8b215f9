"""Features of many entities as columns, from whatever online store is configured.

`get_online_features` makes a protocol buffer of every value, of its status and of its time, and Python
values of them again. On our stores a reader goes from the stored bytes to the columns at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from feast import FeatureService, utils
from feast.feature_view import DUMMY_ENTITY_ID
from feast.value_type import ValueType

from feast_ducklake.online.decoding import python_values
from feast_ducklake.online.lookup import checked_entities
from feast_ducklake.online.rows import NO_TIME, Request, StoredValues, within_ttl
from feast_ducklake.online.store import GuardedOnlineStore
from feast_ducklake.online.vectors import encoded_keys, key_types

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView


class FeatureReader:
    """Reads features of stored views; views on demand and other stores are left to Feast."""

    def __init__(self, store: FeatureStore) -> None:
        self._store, self._online = store, store.provider.online_store

    def read(
        self,
        features: list[str] | FeatureService,
        entities: Mapping[str, Sequence[Any]],
        full_feature_names: bool = False,
    ) -> dict[str, list[Any]]:
        """Values by column, those of the join keys among them: `get_online_features(...).to_dict()`.

        One round trip. Raises BadInput as `checked_entities` does, and Feast's errors of unknown features.
        """
        plan = self._plan(features, entities, full_feature_names)
        if plan is None:
            return self._by_feast(features, entities, full_feature_names)
        registry, project = self._store.registry, self._store.project
        columns = checked_entities(registry, project, features, entities, full_feature_names)
        requests, places = [], []
        for view, names in plan:
            keys, place = _distinct(_keys_of(view, columns))
            requests.append(Request(view, keys, names))
            places.append(place)
        assert isinstance(self._online, GuardedOnlineStore)
        answer = {name: list(values) for name, values in columns.items()}
        stored_views = self._online.read_stored(self._store.config, requests)
        for request, place, stored in zip(requests, places, stored_views, strict=True):
            answer |= _columns(request, place, within_ttl(request.view, stored), full_feature_names)
        return answer

    def _plan(
        self,
        features: list[str] | FeatureService,
        entities: Mapping[str, Sequence[Any]],
        full_feature_names: bool,
    ) -> list[tuple[FeatureView, list[str]]] | None:
        """Which features of which views are read; none where Feast has to do it."""
        if not isinstance(self._online, GuardedOnlineStore):
            return None
        context = utils._get_cached_request_context(
            self._store.registry, self._store.project, features, full_feature_names
        )
        references, on_demand, _, _, join_keys, grouped, *_ = context
        versioned = any("@" in str(reference).partition(":")[0] for reference in references)
        # Else a name that Feast takes with a warning, or a value of the request.
        known = all(name in join_keys and name != DUMMY_ENTITY_ID for name in entities)
        keyed = all(column.name != DUMMY_ENTITY_ID for view, _ in grouped for column in view.entity_columns)
        if on_demand or versioned or not known or not keyed:
            return None
        return [(view, list(names)) for view, names in grouped]

    def _by_feast(
        self,
        features: list[str] | FeatureService,
        entities: Mapping[str, Sequence[Any]],
        full_feature_names: bool,
    ) -> dict[str, list[Any]]:
        response = self._store.get_online_features(features, entities, full_feature_names)
        answer: dict[str, list[Any]] = response.to_dict()
        return answer


def _keys_of(view: FeatureView, columns: Mapping[str, Sequence[Any]]) -> list[bytes]:
    renamed = view.projection.join_key_map
    types = key_types(view)
    return encoded_keys(view.name, types, {name: columns[renamed.get(name, name)] for name in types})


def _distinct(keys: list[bytes]) -> tuple[list[bytes], list[int] | None]:
    """Each key once, and the place of each row among them; None when no key repeats."""
    distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    if len(distinct) == len(keys):
        return keys, None
    return list(distinct), [distinct[key] for key in keys]


def _columns(
    request: Request, place: list[int] | None, stored: StoredValues, full_names: bool
) -> dict[str, list[Any]]:
    gone: list[int] = np.flatnonzero(stored.event_us == NO_TIME).tolist()
    types = {field.name: field.dtype.to_value_type() for field in request.view.features}
    prefix = f"{request.view.projection.name_to_use()}__" if full_names else ""
    answer = {}
    for feature in request.features:
        values = python_values(stored.values[feature], types.get(feature, ValueType.UNKNOWN))
        for row in gone:
            values[row] = None
        answer[f"{prefix}{feature}"] = values if place is None else [values[i] for i in place]
    return answer
