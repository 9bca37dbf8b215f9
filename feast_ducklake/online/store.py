"""What our online stores share: bytes in, bytes out, and Feast's interface on top of both.

A store has only to write rows of bytes under the guard and to read them; types, keys, ttl and vectors are
the same for all.

The guard: a row replaces what is stored when its event time is later, or equal and its created time is not
earlier (where either has none, the last write counts). It holds between processes.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from feast import FeatureService, FeatureView, utils
from feast.infra.key_encoding_utils import deserialize_entity_key, serialize_entity_key
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.online_response import OnlineResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig

from bahe_core.errors import BadInput
from feast_ducklake.online.lookup import checked_entities
from feast_ducklake.online.rows import (
    EPOCH,
    MICROSECOND,
    NO_TIME,
    EncodedRows,
    Request,
    StoredValues,
    Vectors,
    as_vectors,
    microseconds,
    within_ttl,
)
from feast_ducklake.online.search import VectorSearch

FeastRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
FeastAnswer = tuple[datetime | None, dict[str, Value] | None]


class GuardedOnlineStore(OnlineStore):
    """Feast's online store interface over `write_rows` and `read_stored`."""

    def __init__(self) -> None:
        self._search = VectorSearch()

    @abstractmethod
    def write_rows(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> None:
        """Store rows under the guard."""

    @abstractmethod
    def read_stored(self, config: RepoConfig, requests: Sequence[Request]) -> list[StoredValues]:
        """What is stored for each request, whatever its age, in one round trip."""

    @abstractmethod
    def scan(self, config: RepoConfig, view: FeatureView, feature: str) -> tuple[list[bytes], StoredValues]:
        """Keys of all entities of a view, and what is stored of one feature."""

    @abstractmethod
    def forget(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> None:
        """Remove the view's values of these entities; those that are not there are passed over."""

    @abstractmethod
    def version(self, config: RepoConfig, view: FeatureView) -> str | None:
        """A token that changes with each write to the view; None when nothing is stored."""

    def versions(self, config: RepoConfig, views: Sequence[FeatureView]) -> list[str | None]:
        """`version` of several views."""
        return [self.version(config, view) for view in views]

    async def read_stored_async(
        self, config: RepoConfig, requests: Sequence[Request]
    ) -> list[StoredValues]:
        """`read_stored` without blocking the event loop."""
        return await asyncio.to_thread(self.read_stored, config, requests)

    def read_vectors(
        self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes], feature: str
    ) -> Vectors:
        """A feature that is a list of floats, as one array; keys as `encoding.entity_keys` makes them.

        Raises BadInput when the stored vectors differ in length.
        """
        (stored,) = self.read_stored(config, [Request(view, keys, [feature])])
        return as_vectors(view, feature, within_ttl(view, stored))

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        """Both directions."""
        return SupportedAsyncMethods(read=True, write=True)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's way to write: rows of protocol buffers, from pushes and other engines."""
        alike: dict[tuple[str, ...], list[FeastRow]] = defaultdict(list)
        for row in data:
            alike[tuple(row[1])].append(row)
        for features, rows in alike.items():
            self.write_rows(config, table, _encoded_rows(features, rows))
        if progress is not None:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """`online_write_batch` without blocking the event loop."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[FeastAnswer]:
        """Feast's way to read: event time and values of each entity, or nothing and nothing."""
        request = _request(table, entity_keys, requested_features)
        (stored,) = self.read_stored(config, [request])
        return _answers(within_ttl(table, stored))

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[FeastAnswer]:
        """`online_read` without blocking the event loop."""
        request = _request(table, entity_keys, requested_features)
        (stored,) = await self.read_stored_async(config, [request])
        return _answers(within_ttl(table, stored))

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """The features' values of each entity. Raises BadInput as `checked_entities` does."""
        entities = checked_entities(registry, project, features, entity_rows, full_feature_names)
        return super().get_online_features(
            config,
            features,
            entities,
            registry,
            project,
            full_feature_names,
            include_feature_view_version_metadata,
        )

    async def get_online_features_async(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """`get_online_features` without blocking the event loop."""
        entities = checked_entities(registry, project, features, entity_rows, full_feature_names)
        return await super().get_online_features_async(
            config,
            features,
            entities,
            registry,
            project,
            full_feature_names,
            include_feature_view_version_metadata,
        )

    def retrieve_online_documents_v2(
        self,
        config: RepoConfig,
        table: FeatureView,
        requested_features: list[str] | None,
        embedding: list[float] | None,
        top_k: int,
        distance_metric: str | None = None,
        query_string: str | None = None,
        filters: Any = None,
        include_feature_view_version_metadata: bool = False,
    ) -> list[tuple[datetime | None, EntityKey, dict[str, Value]]]:
        """The entities whose vectors are nearest, with their features and `distance`, by entity key.

        Raises BadInput for text queries and filters, which these stores do not have.
        """
        if embedding is None or query_string is not None or filters is not None:
            raise BadInput("this online store searches by embedding only; give `query`, and no filter.")
        nearest = self._search.nearest(
            table,
            embedding,
            top_k,
            distance_metric,
            version=self.version(config, table),
            scan=lambda feature: self.scan(config, table, feature),
        )
        request = Request(table, list(nearest), requested_features or [])
        (stored,) = self.read_stored(config, [request])
        answers: list[tuple[datetime | None, EntityKey, dict[str, Value]]] = [
            (event, deserialize_entity_key(key), {**(values or {}), "distance": Value(float_val=distance)})
            for (key, distance), (event, values) in zip(nearest.items(), _answers(stored), strict=True)
        ]
        # Not by distance: FeatureStore.retrieve_online_documents_v2 pairs the i-th answer with the i-th
        # entity in the order of entities.
        return sorted(answers, key=lambda answer: [_key_value(v) for v in answer[1].entity_values])

    def _read_features_per_fv(
        self,
        config: RepoConfig,
        grouped_refs: list[tuple[FeatureView, list[str]]],
        join_key_values: dict[str, Any],
        entity_name_to_join_key_map: dict[str, str],
        online_features_response: Any,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """All views of one `get_online_features` in one round trip."""
        requests, places = _requests(grouped_refs, join_key_values, entity_name_to_join_key_map)
        for request, (rows, count), stored in zip(
            requests, places, self.read_stored(config, requests), strict=True
        ):
            utils._populate_response_from_feature_data(
                list(request.features),
                _answers(within_ttl(request.view, stored)),
                rows,
                online_features_response,
                full_feature_names,
                request.view,
                count,
                include_feature_view_version_metadata,
            )

    async def _read_features_per_fv_async(
        self,
        config: RepoConfig,
        grouped_refs: list[tuple[FeatureView, list[str]]],
        join_key_values: dict[str, Any],
        entity_name_to_join_key_map: dict[str, str],
        online_features_response: Any,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        """All views of one `get_online_features_async` in one round trip."""
        requests, places = _requests(grouped_refs, join_key_values, entity_name_to_join_key_map)
        for request, (rows, count), stored in zip(
            requests, places, await self.read_stored_async(config, requests), strict=True
        ):
            utils._populate_response_from_feature_data(
                list(request.features),
                _answers(within_ttl(request.view, stored)),
                rows,
                online_features_response,
                full_feature_names,
                request.view,
                count,
                include_feature_view_version_metadata,
            )


def _key_value(value: Value) -> Any:
    return getattr(value, str(value.WhichOneof("val")))


def _encoded_rows(features: Sequence[str], rows: Sequence[FeastRow]) -> EncodedRows:
    created = [NO_TIME if row[3] is None else microseconds(row[3]) for row in rows]
    return EncodedRows(
        keys=[serialize_entity_key(row[0], entity_key_serialization_version=3) for row in rows],
        values={feature: [row[1][feature].SerializeToString() for row in rows] for feature in features},
        event_us=np.array([microseconds(row[2]) for row in rows], dtype=np.int64),
        created_us=np.array(created, dtype=np.int64),
    )


def _request(view: FeatureView, keys: Sequence[EntityKey], features: Sequence[str] | None) -> Request:
    return Request(
        view,
        [serialize_entity_key(key, entity_key_serialization_version=3) for key in keys],
        list(features or [field.name for field in view.features]),
    )


def _requests(
    grouped: list[tuple[FeatureView, list[str]]], values: dict[str, Any], join_keys: dict[str, str]
) -> tuple[list[Request], list[tuple[Any, int]]]:
    """Requests of distinct entities, with the rows of the answer that each entity fills."""
    requests, places = [], []
    for view, features in grouped:
        entities, rows, count = utils._get_unique_entities(view, values, join_keys)
        requests.append(_request(view, utils._get_entity_key_protos(entities), features))
        places.append((rows, count))
    return requests, places


def _answers(stored: StoredValues) -> list[FeastAnswer]:
    features = list(stored.values)
    answers: list[FeastAnswer] = []
    for event_us, *row in zip(stored.event_us.tolist(), *stored.values.values(), strict=True):
        if event_us == NO_TIME:
            answers.append((None, None))
            continue
        values = {
            feature: Value.FromString(value)
            for feature, value in zip(features, row, strict=True)
            if value is not None
        }
        answers.append((EPOCH + event_us * MICROSECOND, values))
    return answers
