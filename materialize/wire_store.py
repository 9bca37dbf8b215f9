"""What our online stores share: bytes in, bytes out, and Feast's interface on top of both.

A store has only to write rows of bytes under the guard and to read them; types, keys, ttl and vectors are
the same for all.

The guard: a row replaces what is stored when its event time is later, or equal and its created time is not
earlier (where either has none, the last write counts). It holds between processes.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from feast import FeatureView, utils
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig

from bahe_core.errors import BadInput
from materialize.wire import Int64, read_floats

NO_TIME = int(np.iinfo(np.int64).min)
"""Stands for a missing time among microseconds since 1970."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

FeastRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
FeastAnswer = tuple[datetime | None, dict[str, Value] | None]


@dataclass(frozen=True, kw_only=True)
class WireRows:
    """Rows of one view, ready to be stored."""

    keys: list[bytes]
    """Serialised entity keys [N]; one may occur several times."""
    values: dict[str, list[bytes]]
    """Serialised values by feature, [N] each."""
    event_us: Int64
    """Event times [N], microseconds since 1970, UTC."""
    created_us: Int64 | None = None
    """Created times [N], NO_TIME where there is none."""

    def times(self) -> tuple[list[int], list[int | None]]:
        """Event and created times as Python integers."""
        if self.created_us is None:
            return self.event_us.tolist(), [None] * len(self.keys)
        return self.event_us.tolist(), [None if us == NO_TIME else us for us in self.created_us.tolist()]


class Request(NamedTuple):
    """Some features of some entities of one view."""

    view: FeatureView
    keys: Sequence[bytes]
    features: Sequence[str]


@dataclass(frozen=True)
class Found:
    """What is stored for a request, in its order."""

    values: dict[str, list[bytes | None]]
    """By feature; none where it is not stored."""
    event_us: Int64
    """[N]; NO_TIME where nothing is stored, or what is stored has outlived the view's ttl."""


@dataclass(frozen=True)
class Vectors:
    """Embeddings of some entities."""

    vectors_ND: npt.NDArray[np.float32]
    """Zero where nothing is found."""
    found_N: npt.NDArray[np.bool_]
    event_us_N: Int64
    """Microseconds since 1970; NO_TIME where nothing is found."""


def microseconds(moment: datetime) -> int:
    """Since 1970; a time without a zone is UTC, as everywhere in Feast."""
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (aware - _EPOCH) // _MICROSECOND


class WireOnlineStore(OnlineStore):
    """Feast's online store interface over `write_rows` and `read_stored`."""

    @abstractmethod
    def write_rows(self, config: RepoConfig, view: FeatureView, rows: WireRows) -> None:
        """Store rows under the guard."""

    @abstractmethod
    def read_stored(self, config: RepoConfig, requests: Sequence[Request]) -> list[Found]:
        """What is stored for each request, whatever its age, in one round trip."""

    async def read_stored_async(self, config: RepoConfig, requests: Sequence[Request]) -> list[Found]:
        """`read_stored` without blocking the event loop."""
        return await asyncio.to_thread(self.read_stored, config, requests)

    def read_vectors(
        self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes], feature: str
    ) -> Vectors:
        """A feature that is a list of floats, as one array; keys as `wire.entity_keys` makes them.

        Raises BadInput when the stored vectors differ in length.
        """
        (found,) = self.read_stored(config, [Request(view, keys, [feature])])
        return _vectors(view, feature, _within_ttl(view, found))

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
            self.write_rows(config, table, _wire_rows(features, rows))
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
        (found,) = self.read_stored(config, [request])
        return _answers(_within_ttl(table, found))

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[FeastAnswer]:
        """`online_read` without blocking the event loop."""
        request = _request(table, entity_keys, requested_features)
        (found,) = await self.read_stored_async(config, [request])
        return _answers(_within_ttl(table, found))

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
        for request, (rows, count), found in zip(
            requests, places, self.read_stored(config, requests), strict=True
        ):
            utils._populate_response_from_feature_data(
                list(request.features),
                _answers(_within_ttl(request.view, found)),
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
        for request, (rows, count), found in zip(
            requests, places, await self.read_stored_async(config, requests), strict=True
        ):
            utils._populate_response_from_feature_data(
                list(request.features),
                _answers(_within_ttl(request.view, found)),
                rows,
                online_features_response,
                full_feature_names,
                request.view,
                count,
                include_feature_view_version_metadata,
            )


def _wire_rows(features: Sequence[str], rows: Sequence[FeastRow]) -> WireRows:
    created = [NO_TIME if row[3] is None else microseconds(row[3]) for row in rows]
    return WireRows(
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


def _within_ttl(view: FeatureView, found: Found) -> Found:
    """What has outlived the view's ttl counts as not stored; a ttl of zero is forever."""
    if not view.ttl:
        return found
    oldest = time.time_ns() // 1000 - view.ttl // _MICROSECOND
    return Found(found.values, np.where(found.event_us < oldest, NO_TIME, found.event_us))


def _answers(found: Found) -> list[FeastAnswer]:
    features = list(found.values)
    answers: list[FeastAnswer] = []
    for event_us, *row in zip(found.event_us.tolist(), *found.values.values(), strict=True):
        if event_us == NO_TIME:
            answers.append((None, None))
            continue
        values = {
            feature: Value.FromString(value)
            for feature, value in zip(features, row, strict=True)
            if value is not None
        }
        answers.append((_EPOCH + event_us * _MICROSECOND, values))
    return answers


def _vectors(view: FeatureView, feature: str, found: Found) -> Vectors:
    field = next((field for field in view.features if field.name == feature), None)
    if field is None:
        names = ", ".join(field.name for field in view.features)
        raise BadInput(f"view {view.name} has no feature {feature}; it has {names}.")
    values = found.values[feature]
    # A stored null is empty.
    stored_N = (found.event_us != NO_TIME) & np.fromiter(map(bool, values), dtype=np.bool_)
    there = [value for value, stored in zip(values, stored_N.tolist(), strict=True) if stored and value]
    vectors_FD = read_floats(there, field.dtype.to_value_type())
    event_us_N = np.where(stored_N, found.event_us, NO_TIME)
    if len(there) == len(values):
        return Vectors(vectors_FD, stored_N, event_us_N)
    width = vectors_FD.shape[1] if there else field.vector_length
    vectors_ND = np.zeros((len(values), width), dtype=np.float32)
    if there:
        vectors_ND[stored_N] = vectors_FD
    return Vectors(vectors_ND, stored_N, event_us_N)
