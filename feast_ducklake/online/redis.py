"""Feast online store in Redis, with writes that are guarded inside the server.

The hash of an entity is stock Feast's: any Feast client with `type: redis` reads it.
"""

from __future__ import annotations

import os
import re
import struct
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
from feast import Entity, FeatureView
from feast.feature_view import DUMMY_ENTITY_ID
from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.infra.online_stores.helpers import _mmh3, compute_versioned_name
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from google.protobuf.timestamp_pb2 import Timestamp
from redis.backoff import NoBackoff

from feast_ducklake.online.encoding import varint_fields
from feast_ducklake.online.rows import NO_TIME, EncodedRows, Request, StoredValues
from feast_ducklake.online.store import GuardedOnlineStore

_ROWS_PER_CALL = 256
"""Few, since the server answers no one else while it runs a call of the script."""

_WORTH_A_RETRY = (redis.ConnectionError,)
"""A connection may be from before a restart of the server. A server that says nothing is not asked again,
which would only double the wait."""

# KEYS: entities. ARGV: seconds until a key expires (0: never), number of fields, names of the fields (the
# time's last), then for each entity as many values. Returns how many entities were written.
_WRITE = """
local function parsed(stored)
    local field, position = {0, 0}, 1
    while position <= #stored do
        local number = math.floor(stored:byte(position) / 8)
        local value, complement, scale, length = 0, 0, 1, 0
        repeat
            position = position + 1
            length = length + 1
            local byte = stored:byte(position)
            if length < 10 then
                value = value + byte % 128 * scale
                complement = complement + (127 - byte % 128) * scale
                scale = scale * 128
            end
        until byte < 128
        position = position + 1
        field[number] = length == 10 and -complement - 1 or value
    end
    return field
end

local function replaces(new, old)
    if new[1] ~= old[1] then return new[1] > old[1] end
    if new[2] ~= old[2] then return new[2] > old[2] end
    return not new[3] or not old[3] or new[3] >= old[3]
end

local expires, fields = tonumber(ARGV[1]), tonumber(ARGV[2])
local written = 0
for row, key in ipairs(KEYS) do
    local first = 2 + fields * row
    local time = ARGV[first + fields]
    local stored = redis.call('HGET', key, ARGV[2 + fields])
    if not stored or replaces(parsed(time), parsed(stored)) then
        local pairs = {}
        for i = 1, fields do
            pairs[2 * i - 1] = ARGV[2 + i]
            pairs[2 * i] = ARGV[first + i]
        end
        redis.call('HSET', key, unpack(pairs))
        if expires > 0 then redis.call('EXPIRE', key, expires) end
        written = written + 1
    end
end
return written
"""


class GuardedRedisOnlineStoreConfig(FeastConfigBaseModel):
    """The `online_store` section of feature_store.yaml."""

    type: Literal[
        "feast_ducklake.GuardedRedisOnlineStore",
        "materialize.feast_redis.GuardedRedisOnlineStore",  # as version 0.1 wrote it
    ] = "feast_ducklake.GuardedRedisOnlineStore"
    url: str = "redis://127.0.0.1:6379/0"
    """As redis-py reads it: redis://, rediss:// (TLS) or unix://, with user and password if needed."""
    read_seconds: float = 2.0
    """How long a read waits for the server, to connect as well as for an answer. A server may be there and
    say nothing (stopped, swapping, behind a firewall), and a read without an end holds its caller, too."""
    write_seconds: float = 60.0
    """The same for a write, whose batches are larger."""
    key_ttl_seconds: int = 0
    """Redis drops an entity that was not written for this many seconds; 0 keeps it for ever."""


class GuardedRedisOnlineStore(GuardedOnlineStore):
    """Online store in one Redis server; a script in the server compares event times and writes."""

    def __init__(self) -> None:
        super().__init__()
        self._clients: dict[float, redis.Redis] = {}
        """By the seconds that they wait."""
        self._async_client: redis.asyncio.Redis | None = None
        self._process = 0

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: EncodedRows) -> None:
        """Each row at once or not at all; another client never sees half of one."""
        project, fields = config.project.encode(), _fields(config, view, list(rows.values))
        keys = [key + project for key in rows.keys]
        values: list[list[bytes]] = [*rows.values.values(), _times(rows)]
        head: list[bytes | int] = [_settings(config).key_ttl_seconds, len(fields), *fields]
        client = self._writing(config)
        write = client.register_script(_WRITE)
        with client.pipeline(transaction=False) as pipe:
            for start in range(0, len(keys), _ROWS_PER_CALL):
                some = slice(start, start + _ROWS_PER_CALL)
                each = zip(*(column[some] for column in values), strict=True)
                write(keys[some], [*head, *(value for row in each for value in row)], client=pipe)
            pipe.set(_version_key(config, view), uuid.uuid4().hex)
            pipe.execute()

    def forget(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> None:
        """Remove the view's values of these entities; those that are not there are passed over."""
        client, project = self._writing(config), config.project.encode()
        _delete(client, config, view, [key + project for key in keys])
        client.set(_version_key(config, view), uuid.uuid4().hex)

    def scan(self, config: RepoConfig, view: FeatureView, feature: str) -> tuple[list[bytes], StoredValues]:
        """Keys of all entities of a view, and what is stored of one feature."""
        client, project = self._writing(config), config.project.encode()
        keys = [key[: -len(project)] for key in _entities(client, config, view)]
        (stored,) = self.read_stored(config, [Request(view, keys, [feature])])
        return keys, stored

    def version(self, config: RepoConfig, view: FeatureView) -> str | None:
        """A token that changes with each write to the view; None when nothing is stored."""
        stored: Any = self._reading(config).get(_version_key(config, view))
        return None if stored is None else bytes(stored).decode()

    def versions(self, config: RepoConfig, views: Sequence[FeatureView]) -> list[str | None]:
        """`version` of several views, in one round trip."""
        keys = [_version_key(config, view) for view in views]
        stored: Any = self._reading(config).mget(keys) if keys else []
        return [None if token is None else bytes(token).decode() for token in stored]

    def read_stored(self, config: RepoConfig, requests: Sequence[Request]) -> list[StoredValues]:
        """What is stored for each request, whatever its age, in one round trip."""
        with self._reading(config).pipeline(transaction=False) as pipe:
            _ask(pipe, config, requests)
            return _stored_values(requests, pipe.execute())

    async def read_stored_async(
        self, config: RepoConfig, requests: Sequence[Request]
    ) -> list[StoredValues]:
        """`read_stored` on Redis's own asynchronous client."""
        if self._async_client is None:
            settings = _settings(config)
            self._async_client = redis.asyncio.Redis.from_url(
                settings.url,
                socket_timeout=settings.read_seconds,
                socket_connect_timeout=settings.read_seconds,
                retry=redis.asyncio.retry.Retry(NoBackoff(), 1, _WORTH_A_RETRY),
            )
        async with self._async_client.pipeline(transaction=False) as pipe:
            _ask(pipe, config, requests)
            return _stored_values(requests, await pipe.execute())

    async def close(self) -> None:
        """Close the asynchronous connections."""
        if self._async_client is not None:
            await self._async_client.aclose()
            self._async_client = None

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Forget the values of the views to delete; the others need no preparation."""
        client = self._writing(config)
        for view in tables_to_delete:
            keys = _entities(client, config, view)
            while some := list(islice(keys, 1000)):
                _delete(client, config, view, some)
            client.delete(_version_key(config, view))

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]
    ) -> None:
        """Forget the values of these views."""
        self.update(config, tables, [], [], [], partial=False)

    def _reading(self, config: RepoConfig) -> redis.Redis:
        return self._connected(config, _settings(config).read_seconds)

    def _writing(self, config: RepoConfig) -> redis.Redis:
        return self._connected(config, _settings(config).write_seconds)

    def _connected(self, config: RepoConfig, seconds: float) -> redis.Redis:
        if self._process != os.getpid():
            self._clients, self._process = {}, os.getpid()
        client = self._clients.get(seconds)
        if client is None:
            client = redis.Redis.from_url(
                _settings(config).url,
                socket_timeout=seconds,
                socket_connect_timeout=min(seconds, _settings(config).read_seconds),
                retry=redis.retry.Retry(NoBackoff(), 1, _WORTH_A_RETRY),
            )
            self._clients[seconds] = client
        return client


def _settings(config: RepoConfig) -> GuardedRedisOnlineStoreConfig:
    store = config.online_store
    assert isinstance(store, GuardedRedisOnlineStoreConfig)
    return store


def _fields(config: RepoConfig, view: FeatureView, features: Sequence[str]) -> list[bytes]:
    """The hash fields of these features, then that of the event time."""
    shown = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
    return [*(_mmh3(f"{shown}:{feature}") for feature in features), f"_ts:{shown}".encode()]


def _version_key(config: RepoConfig, view: FeatureView) -> str:
    return f"wire_version:{config.project}:{view.name}"


def _delete(client: redis.Redis, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> None:
    fields = _fields(config, view, [field.name for field in view.features])
    with client.pipeline(transaction=False) as pipe:
        for key in keys:  # Redis forgets a hash with its last field
            pipe.execute_command("HDEL", key, *fields)  # type: ignore[no-untyped-call]
        pipe.execute()


def _times(rows: EncodedRows) -> list[bytes]:
    """Event times as Feast stores them, and created times in a field that other readers pass over."""
    seconds, microseconds = np.divmod(rows.event_us, 1_000_000)
    fields = [varint_fields(seconds, 1), varint_fields(microseconds * 1000, 2)]
    if rows.created_us is not None:
        # Zero is left out, so a value computed in 1970 counts as one without a created time.
        fields.append(varint_fields(np.where(rows.created_us == NO_TIME, 0, rows.created_us), 3))
    return [b"".join(row) for row in zip(*fields, strict=True)]


def _ask(pipe: Any, config: RepoConfig, requests: Sequence[Request]) -> None:
    project = config.project.encode()
    for view, keys, features in requests:
        fields = _fields(config, view, features)
        for key in keys:
            pipe.execute_command("HMGET", key + project, *fields)


def _stored_values(requests: Sequence[Request], answers: list[list[bytes | None]]) -> list[StoredValues]:
    rows = iter(answers)
    return [
        _stored_values_of(request.features, list(islice(rows, len(request.keys)))) for request in requests
    ]


def _stored_values_of(features: Sequence[str], rows: list[list[bytes | None]]) -> StoredValues:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in [*features, "time"]]
    *values, times = columns
    event_us = [NO_TIME if time is None else _event_us(time) for time in times]
    return StoredValues(dict(zip(features, values, strict=True)), np.array(event_us, dtype=np.int64))


def _event_us(stored: bytes) -> int:
    time = Timestamp.FromString(stored)
    return int(time.seconds) * 1_000_000 + int(time.nanos) // 1000


def _entities(client: redis.Redis, config: RepoConfig, view: FeatureView) -> Iterator[bytes]:
    """Redis keys of this project's entities that the view may describe."""
    project = config.project.encode()
    join_keys = sorted(view.join_keys) or [DUMMY_ENTITY_ID]
    prefix = serialize_entity_key_prefix(join_keys)
    pattern = re.sub(rb"([*?\[\]\\^])", rb"\\\1", prefix)
    for key in client.scan_iter(pattern + b"*" + project, count=1000):
        # A longer project name may end like this one.
        if _key_length(key, len(prefix), len(join_keys)) == len(key) - len(project):
            yield key


def _key_length(key: bytes, position: int, values: int) -> int:
    """Bytes of the entity key at the beginning of a Redis key."""
    for _ in range(values):
        if position + 8 > len(key):
            return -1
        position += 8 + int(struct.unpack_from("<I", key, position + 4)[0])
    return position
