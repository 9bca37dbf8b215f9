"""Features and scores of the live model, read from the online store through Feast."""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from bahe_core.errors import BadInput, Damaged, NotReady, UnknownEntity, clipped, one_line
from bahe_core.home import Home
from bahe_core.results import Result
from bahe_models import column_of, needed_columns
from bahe_models.artifact_folder import further_features, read_config
from feast_ducklake.online.features import FeatureReader
from feast_ducklake.online.rows import Vectors
from feast_ducklake.online.vectors import VectorReader
from feature_repo.item_keys import UNKNOWN, ItemKeys, item_keys, reference_of
from feature_repo.references import feature_references, view_of
from feature_repo.store import online_errors, open_store
from materialize.release.pointer import DEPLOYMENT
from serving.item_table import ItemTable
from serving.request_log import RequestLog, ServedRequest

if TYPE_CHECKING:
    from feast import FeatureService

    from bahe_models import Artifact
    from bahe_models.context import Value

Identifier = str | int
Vector = npt.NDArray[np.float32]
VECTOR = "embedding"
UnknownUser = Literal["empty", "refuse"]
"""What becomes of a user who is not online: the state of one who has done nothing, or UnknownEntity."""
_KEYS = ("user_id", "item_id")
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
"""As an integer is written by everyone: no sign, blank, underscore or zero that it can do without."""


@dataclass(frozen=True)
class UserFeatures(Result):
    """What the online store holds of one user under the live model."""

    user_id: Identifier
    model_version: str
    cold: bool
    """True when the user has no history; the vector is then the empty state."""
    behaviors: int
    vector: np.ndarray
    statistics: dict[str, float | str | None]
    seen_items: frozenset[str]
    vectors: Mapping[str, Vector | None] = field(default_factory=dict)
    """Those of `features.vectors` that are the user's, by `view:feature`."""
    known: bool = True
    """False where the store has nothing of the user, and these are of one who has done nothing."""


@dataclass(frozen=True)
class Score:
    """One item for one user."""

    item_id: Identifier
    text: str
    probability: float


@dataclass(frozen=True)
class Answer(Result):
    """Scores of one user, best first."""

    user_id: Identifier
    model_version: str
    cold: bool
    scores: list[Score]
    known: bool = True
    """Whether the store has the user."""


@dataclass(frozen=True)
class ItemScores(Result):
    """Scores of one user by item, in the order that they were asked for."""

    user_id: Identifier
    model_version: str
    cold: bool
    item_ids: list[Identifier]
    """As the log has them; as they were given where they are not known."""
    probabilities: list[float | None]
    """None for an item that is not online."""
    known: bool = True
    """Whether the store has the user."""


@dataclass(frozen=True)
class SimilarItem:
    """An item, and how alike it is to the one asked about."""

    item_id: Identifier
    text: str
    cosine: float
    """Of the two item vectors under the live model: 1 for the same direction."""


@dataclass(frozen=True)
class SimilarItems(Result):
    """Items like one, most alike first."""

    item_id: Identifier
    model_version: str
    items: list[SimilarItem]


@dataclass(frozen=True)
class _Inputs:
    """What a model reads of the online store beside vectors."""

    model_version: str
    channels: tuple[str, ...]
    references: Mapping[str, list[str]]
    """Features of `user`, `item`, a `pair` of both and by `attribute` of items, as `view:feature`."""
    categories: tuple[str, ...]
    """Columns of those that are categories; the model's other categories come with the request."""
    vectors: Mapping[str, Mapping[str, VectorReader]]
    """Of each entity, what reads its vectors, by `view:feature`; they are not among `references`."""
    item_keys: ItemKeys
    """Columns of items that views of `attribute` are keyed by."""
    by_keys: Mapping[tuple[str, ...], list[str]]
    """The features of `attribute`, by their join keys."""


@contextmanager
def _the_servers_fault() -> Iterator[None]:
    """Reading the live model: that it is not there (yet) is the server's state, not the request's."""
    try:
        yield
    except BadInput as error:
        raise Damaged(f"the live model cannot be read: {error}") from None


@contextmanager
def _the_requests_fault() -> Iterator[None]:
    """Reading features that a request chose: what Feast does not answer, in one sentence."""
    from feast.errors import FeatureNameCollisionError, RequestDataNotFoundInEntityRowsException

    try:
        yield
    except FeatureNameCollisionError:
        raise BadInput(
            "two of the features have the same name; give each once, and `full_feature_names` where views"
            " share a name."
        ) from None
    except RequestDataNotFoundInEntityRowsException as error:
        raise BadInput(
            "a feature that is computed on demand needs a value that the request does not have"
            f" ({clipped(one_line(error), 200)}); give it among `entities`."
        ) from None


class OnlineLookup:
    """Reads the live pointer on every request, so that a publish takes effect at once."""

    def __init__(self, home: Home, log: RequestLog | None = None, *, keep_items: bool = False) -> None:
        """`log` keeps what answers were made of. `keep_items` keeps vectors and features of all items in
        memory, for a service; they are read again when the store's tokens say that they changed."""
        self._home, self._log = home, log
        self._store = open_store(home)
        self._table = ItemTable(self._store, self._read_items) if keep_items else None
        self._artifacts: dict[str, Artifact] = {}
        self._inputs = _Inputs("", (), {}, (), {}, {}, {})
        """Of the last version asked for."""
        self._empty: tuple[str, np.ndarray] = ("", np.empty(0))
        """A model_version, and its vector of a user who has done nothing."""
        self._items: dict[Identifier, str] = {}
        self._items_changed = -1
        self._lock = threading.Lock()

    def live_version(self) -> str:
        """The model_version that answers now. Raises NotReady before the first publish."""
        values = self.read(["live_model:live_model_version"], {"deployment": [DEPLOYMENT]})
        version = values["live_model_version"][0]
        if version is None:
            raise NotReady(f"{self._home.root} has nothing published; run `bahe publish` first.")
        return str(version)

    def artifact(self, version: str) -> Artifact:
        """The artifact of a model_version, kept in memory, with that of the version before.

        Raises Damaged when the models folder does not have it whole, as before it has been copied there.
        """
        from bahe_models import load  # torch, which a lookup does without

        with self._lock:
            if version not in self._artifacts:
                with _the_servers_fault():
                    self._artifacts[version] = load(self._home.models / version)
                # Requests in flight may still need the one before; no one needs those before that.
                for earlier in list(self._artifacts)[:-2]:
                    del self._artifacts[earlier]
            return self._artifacts[version]

    def references(self, version: str) -> Mapping[str, list[str]]:
        """What a model reads beside vectors, as `view:feature`: of `user`, `item`, a `pair` of both, and by
        `attribute` of items.
        """
        return self._inputs_of(version).references

    def item_keys(self, version: str) -> ItemKeys:
        """Columns of items that views of the model's features are keyed by."""
        return self._inputs_of(version).item_keys

    def vectors(self, version: str) -> Mapping[str, list[str]]:
        """What a model reads of `features.vectors`, of `user`, `item` and a `pair` of both."""
        return {entity: list(readers) for entity, readers in self._inputs_of(version).vectors.items()}

    def _inputs_of(self, version: str) -> _Inputs:
        """What the model reads, without reading its weights."""
        inputs = self._inputs  # another request may put another version's in its place
        if inputs.model_version != version:
            with _the_servers_fault():
                config = read_config(self._home.models / version)
                listed = {
                    kind: feature_references(self._store, kind, references)
                    for kind, references in further_features(config).items()
                }
            channels = tuple(config["dense"]["channels"])
            vectors = listed.pop("vectors")
            further = [reference for found in listed.values() for reference in found]
            of_entity = {
                entity: [f"{entity}_stats:{c}" for c in needed_columns() if c.startswith(f"{entity}_")]
                for entity in ("user", "item")
            }
            of_entity["pair"], of_entity["attribute"] = [], []
            by_keys: dict[tuple[str, ...], list[str]] = {}
            of_entity["user"] += [f"user_timeline:length_{channel}" for channel in channels]
            for one in further:
                if str(one) not in of_entity[one.entity]:
                    of_entity[one.entity].append(str(one))
                    if one.entity == "attribute":
                        by_keys.setdefault(one.keys, []).append(str(one))
            for entity in ("user", "item"):
                beside = self._read_beside(of_entity[entity])
                of_entity[entity] += [one for one in beside if one not in of_entity[entity]]
            keys = item_keys(self._store, further)
            of_keys = map(reference_of, keys)
            of_entity["item"] += [one for one in of_keys if one not in of_entity["item"]]
            categories = tuple(reference.feature for reference in listed["categorical"])
            readers: dict[str, dict[str, VectorReader]] = {entity: {} for entity in of_entity}
            for one in vectors:
                readers[one.entity][str(one)] = VectorReader(self._store, one.view, one.feature)
            self._inputs = inputs = _Inputs(
                version, channels, of_entity, categories, readers, keys, by_keys
            )
        return inputs

    def _read_beside(self, references: Sequence[str]) -> list[str]:
        """What is read with a user's or an item's features although the model does not read it."""
        return []

    def freshness(self, version: str) -> dict[str, float]:
        """For how many seconds nothing was written of each view that a model's scores are made of.

        By publishing (or Feast's materialization), of this or another process; what was pushed is newer.
        """
        inputs = self._inputs_of(version)
        read = {view_of(one) for listed in inputs.references.values() for one in listed}
        read |= {view_of(one) for readers in inputs.vectors.values() for one in readers}
        read |= {"user_embedding", "item_embedding"}
        with online_errors(self._home):
            views = self._store.registry.list_feature_views(self._store.project, allow_cache=False)
        now = datetime.now(UTC)
        return {
            view.name: max(0.0, (now - view.most_recent_end_time).total_seconds())
            for view in sorted(views, key=lambda view: view.name)
            if view.name in read and view.most_recent_end_time is not None
        }

    def catalogue(self) -> dict[Identifier, str]:
        """Text of every item that can be recommended, by id."""
        path = self._home.catalogue_of_items
        if not path.is_file():
            raise NotReady(f"{self._home.root} has nothing published; run `bahe publish` first.")
        changed = path.stat().st_mtime_ns
        with self._lock:
            if self._items_changed != changed:
                table = pq.read_table(path)
                ids, texts = table["item_id"].to_pylist(), table["text"].to_pylist()
                self._items = dict(zip(ids, texts, strict=True))
                self._items_changed = changed
            return self._items

    def user(self, user_id: Identifier) -> UserFeatures:
        """A user's features. Raises UnknownEntity when the user is not in the online store."""
        version = self.live_version()
        (user,) = self.users([user_id], version)
        if user is None:
            raise UnknownEntity(
                f"user {clipped(user_id)} is not in the online store of {self._home.root}; check the id, or"
                " ingest, embed and publish the user first."
            )
        return user

    def user_or_empty(self, user_id: Identifier) -> UserFeatures:
        """A user's features, or those of one who has done nothing."""
        try:
            return self.user(user_id)
        except UnknownEntity:
            return self.empty_user(user_id)

    def empty_user(self, user_id: Identifier) -> UserFeatures:
        """What a user is before the first behavior and impression, under the live model."""
        from bahe_models import UserState  # torch, which a lookup does without

        version = self.live_version()
        artifact = self.artifact(version)
        stored_id = self._stored_id("user_embedding", "user_id", user_id)
        with self._lock:
            if self._empty[0] != version:
                state = UserState.empty(artifact.model, artifact.window)
                self._empty = version, state.vector().cpu().numpy()
            vector = self._empty[1]
        return UserFeatures(
            user_id=user_id if stored_id is None else stored_id,
            model_version=version,
            cold=True,
            behaviors=0,
            vector=vector,
            statistics={column_of(one): None for one in self._inputs_of(version).references["user"]},
            seen_items=frozenset(),
            known=False,
        )

    def users(self, user_ids: Sequence[Identifier], version: str) -> list[UserFeatures | None]:
        """Features of users under a model_version, in one read; None for one that is not online."""
        ids = [self._as_stored("user_embedding", "user_id", user_id) for user_id in user_ids]
        statistics = self._inputs_of(version).references["user"]
        values = self.read(
            [
                f"user_embedding:{VECTOR}",
                "user_embedding:behaviors",
                "user_embedding:seen_items",
                *statistics,
            ],
            {"user_id": ids, "model_version": [version] * len(ids)},
        )
        named = [column_of(reference) for reference in statistics]
        vectors = self.read_vectors("user", version, {"user_id": ids})

        def features(place: int) -> UserFeatures | None:
            vector = values[VECTOR][place]
            if vector is None:
                return None
            behaviors = int(values["behaviors"][place] or 0)
            return UserFeatures(
                user_id=ids[place],
                model_version=version,
                cold=behaviors == 0,
                behaviors=behaviors,
                vector=np.asarray(vector, dtype=np.float32),
                statistics={name: values[name][place] for name in named},
                seen_items=frozenset(values["seen_items"][place] or ()),
                vectors={reference: its[place] for reference, its in vectors.items()},
            )

        return [features(place) for place in range(len(ids))]

    def score(
        self,
        user_id: Identifier,
        item_ids: Sequence[Identifier],
        at: datetime | None = None,
        *,
        context: Mapping[str, Value] | None = None,
    ) -> Answer:
        """Click probabilities of some items for a user, best first.

        `at` is the moment of the request (default now; UTC unless it has a zone). It ages features, since
        the time since the last impressions is one, and replays nothing: what the user did after it is
        known all the same. `context` has values of the model's context columns; a column left out counts
        as unknown.
        Raises UnknownEntity when the user or one of the items is not in the online store, BadInput on
        a context column that the model does not have.
        """
        user = self.user(user_id)
        items = [self._as_stored("item_embedding", "item_id", item) for item in item_ids]
        vectors, statistics = self._items_for(user, items)
        missing = [item for item, stored in zip(items, vectors.found_N, strict=True) if not stored]
        if missing:
            raise self._unknown_items(missing)
        return self._answer(user, items, vectors.vectors_ND, statistics, at, context)

    def _unknown_items(self, missing: Sequence[Identifier]) -> UnknownEntity:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return UnknownEntity(
            f"item {clipped(missing[0])}{more} is not in the online store of {self._home.root}; check"
            " the id, or ingest, embed and publish the item first."
        )

    def score_each(
        self,
        user_id: Identifier,
        item_ids: Sequence[Identifier],
        at: datetime | None = None,
        *,
        context: Mapping[str, Value] | None = None,
        unknown_user: UnknownUser = "empty",
    ) -> ItemScores:
        """`score` that answers for each item, also where some are not online, and for any user."""
        user = self.user(user_id) if unknown_user == "refuse" else self.user_or_empty(user_id)
        stored_ids = [self._stored_id("item_embedding", "item_id", item) for item in item_ids]
        items = list(dict.fromkeys(item for item in stored_ids if item is not None))
        vectors, statistics = self._items_for(user, items)
        known, vectors_NV, values = _found(items, vectors, statistics)
        answer = self._answer(user, known, vectors_NV, values, at, context)
        by_item = {score.item_id: score.probability for score in answer.scores}
        return ItemScores(
            user_id=user.user_id,
            model_version=user.model_version,
            cold=user.cold,
            item_ids=[
                given if stored is None else stored
                for given, stored in zip(item_ids, stored_ids, strict=True)
            ],
            probabilities=[None if item is None else by_item.get(item) for item in stored_ids],
            known=user.known,
        )

    def recommend(
        self,
        user_id: Identifier,
        k: int = 10,
        at: datetime | None = None,
        *,
        include_seen: bool = False,
        context: Mapping[str, Value] | None = None,
        unknown_user: UnknownUser = "refuse",
    ) -> Answer:
        """The k items with the highest click probability; those the user acted on are left out.

        `at` and `context` are those of `score`.
        """
        if k < 1:
            raise BadInput(f"k is {k}; it must be at least 1.")
        user = self.user(user_id) if unknown_user == "refuse" else self.user_or_empty(user_id)
        items = [item for item in self.catalogue() if include_seen or str(item) not in user.seen_items]
        vectors, statistics = self._items_for(user, items)
        return self._answer(user, *_found(items, vectors, statistics), at, context, best=k)

    def similar_items(self, item_id: Identifier, k: int = 10) -> SimilarItems:
        """The k items whose vectors under the live model are most alike to an item's, without itself.

        Every item is compared, in one product. Raises UnknownEntity when the item is not online.
        """
        if k < 1:
            raise BadInput(f"k is {k}; it must be at least 1.")
        version, texts = self.live_version(), self.catalogue()
        own_id = self._as_stored("item_embedding", "item_id", item_id)
        item_ids = list(texts)  # in the catalogue's order, in which a service has them in memory
        vectors = self._vectors_of(item_ids, version)
        others_N = vectors.found_N.copy()
        own = item_ids.index(own_id) if own_id in texts else None
        if own is None or not others_N[own]:
            raise self._unknown_items([own_id])
        others_N[own] = False
        norm_N = np.linalg.norm(vectors.vectors_ND, axis=1).clip(1e-12)
        cosine_N = vectors.vectors_ND @ vectors.vectors_ND[own] / (norm_N * norm_N[own])
        cosine_N[~others_N] = -np.inf
        best = np.argsort(-cosine_N, kind="stable")[: min(k, int(others_N.sum()))].tolist()
        found = [SimilarItem(item_ids[i], texts[item_ids[i]], float(cosine_N[i])) for i in best]
        return SimilarItems(own_id, version, found)

    def _answer(
        self,
        user: UserFeatures,
        items: list[Identifier],
        vectors_NV: npt.NDArray[np.float32],
        statistics: dict[str, list[Any]],
        at: datetime | None,
        context: Mapping[str, Value] | None,
        best: int | None = None,
    ) -> Answer:
        """The `best` items (None: all), best first."""
        from bahe_models.context import hash_values, refuse_unknown  # torch, which a lookup does without

        artifact = self.artifact(user.model_version)
        categories = self._inputs_of(user.model_version).categories
        given = context or {}
        refuse_unknown([c for c in artifact.context_columns if c not in categories], given)
        if not items:
            return Answer(user.user_id, user.model_version, user.cold, [], user.known)
        count = len(items)

        def of_pairs(column: str) -> list[Any]:
            """What the online store has of the items, or of the user for each of them."""
            return statistics[column] if column in statistics else [user.statistics[column]] * count

        columns = {name: np.array(of_pairs(name), dtype=np.float64) for name in artifact.dense.columns}
        hashed_NX = np.empty((count, len(artifact.context_columns)), dtype=np.int64)
        for place, column in enumerate(artifact.context_columns):
            values = of_pairs(column) if column in categories else [given.get(column)]
            hashed_NX[:, place] = hash_values(column, values)
        lengths_C = [int(user.statistics[f"length_{c}"] or 0) for c in artifact.dense.channels]
        vectors = {
            reference: _matrix(statistics.get(reference) or [user.vectors.get(reference)] * count, width)
            for reference, width in artifact.vectors.items()
        }
        now = at or datetime.now(UTC)
        if now.tzinfo is None:
            now = now.replace(tzinfo=UTC)
        probability = artifact.score(
            np.tile(user.vector, (count, 1)),
            vectors_NV,
            columns,
            np.tile(np.array(lengths_C, dtype=np.int64), (count, 1)),
            np.full(count, int(now.timestamp() * 1e6), dtype=np.int64),
            hashed_NX,
            vectors,
        )
        texts = self.catalogue()
        order = np.argsort(-probability, kind="stable")[:best].tolist()
        if self._log is not None and user.known and self._log.wants(user.user_id):
            self._log.append(
                ServedRequest(
                    served_at=datetime.now(UTC),
                    at=now,
                    model_version=user.model_version,
                    user_id=user.user_id,
                    user={**user.statistics, **user.vectors},
                    user_vector=user.vector,
                    item_ids=[items[i] for i in order],
                    items={name: [values[i] for i in order] for name, values in statistics.items()},
                    item_vectors=vectors_NV[order],
                )
            )
        scores = [Score(items[i], texts.get(items[i], ""), float(probability[i])) for i in order]
        return Answer(user.user_id, user.model_version, user.cold, scores, user.known)

    def items(
        self, items: Sequence[Identifier], version: str, user_id: Identifier | None = None
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """Vectors and features of items (ids in the type that the log has), by column.

        With a user also the features of the pairs. Those of `features.vectors` are by `view:feature`.
        """
        references = self.references(version)
        kept = None
        if self._table is not None:
            further = [*references["item"], *self._inputs_of(version).vectors["item"]]
            views = ["item_embedding", *dict.fromkeys(map(view_of, further))]
            with online_errors(self._home):
                kept = self._table.of(items, version, self.catalogue(), views)
        vectors, values = kept or self._read_items(items, version)
        if items and user_id is not None:
            pairs = {"user_id": [user_id] * len(items), "item_id": items}
            if references["pair"]:
                of_pairs = self.read(references["pair"], pairs)
                values |= {name: column for name, column in of_pairs.items() if name not in _KEYS}
            values |= self.read_vectors("pair", version, pairs)
            values |= self.read_by_attributes(version, {**values, **pairs})
        return vectors, values

    def _items_for(
        self, user: UserFeatures, items: Sequence[Identifier]
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """`items` with the user; where the id can be none of the log's, with a key that nobody has."""
        user_id = self._stored_id("user_embedding", "user_id", user.user_id)
        nobody = UNKNOWN[self._key_types["user_embedding", "user_id"]]
        return self.items(items, user.model_version, nobody if user_id is None else user_id)

    def _read_items(
        self, items: Sequence[Identifier], version: str
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """One read of the vectors, one of the features."""
        vectors = self._read_item_vectors(items, version)
        if not items:
            return vectors, {}
        values = self.read(self.references(version)["item"], {"item_id": items})
        found = {name: column for name, column in values.items() if name not in _KEYS}
        return vectors, found | self.read_vectors("item", version, {"item_id": items})

    def _vectors_of(self, items: Sequence[Identifier], version: str) -> Vectors:
        """Vectors of items, which a service has in memory."""
        if self._table is not None:
            return self.items(items, version)[0]
        return self._read_item_vectors(items, version)

    def _read_item_vectors(self, items: Sequence[Identifier], version: str) -> Vectors:
        with online_errors(self._home):
            return self._item_vectors.read({"item_id": items, "model_version": [version] * len(items)})

    @cached_property
    def _item_vectors(self) -> VectorReader:
        return VectorReader(self._store, "item_embedding", VECTOR)

    def read_by_attributes(
        self, version: str, columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[Any]]:
        """The model's features of views keyed by columns of items, by column, a value a row.

        `columns` have the user_id, item_id and those columns of the items. Each key is read once.
        """
        inputs, found = self._inputs_of(version), {}
        for names, references in inputs.by_keys.items():
            given = [
                [inputs.item_keys[name] if value is None else value for value in columns[name]]
                if name in inputs.item_keys
                else columns[name]
                for name in names
            ]
            rows = list(zip(*given, strict=True))
            place = {row: number for number, row in enumerate(dict.fromkeys(rows))}
            distinct = dict(zip(names, map(list, zip(*place, strict=True)), strict=True))
            values = self.read(references, distinct)
            for column in map(column_of, references):
                found[column] = [values[column][place[row]] for row in rows]
        return found

    def read_vectors(
        self, entity: str, version: str, keys: Mapping[str, Sequence[Identifier]]
    ) -> dict[str, list[Vector | None]]:
        """The model's `features.vectors` of a `user`, `item` or `pair`, by `view:feature`, one a row."""
        found: dict[str, list[Vector | None]] = {}
        with online_errors(self._home), _the_servers_fault():
            for reference, reader in self._inputs_of(version).vectors[entity].items():
                stored = reader.read(keys)
                found[reference] = [
                    vector if there else None
                    for vector, there in zip(stored.vectors_ND, stored.found_N.tolist(), strict=True)
                ]
        return found

    def read(
        self, features: list[str] | FeatureService, entities: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[Any]]:
        """Any features (`view:feature`) of entities, given as a column for each join key, by column.

        As the online store has them; None where it has nothing.
        """
        with online_errors(self._home):
            return self._features.read(features, entities)

    def features(
        self,
        asked: list[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        version: str,
        full_feature_names: bool = False,
    ) -> dict[str, list[Any]]:
        """`read` of references, or of a feature service by name; `version` where a view wants a model's.

        Raises BadInput on what is not registered.
        """
        features = self._registered(asked)
        columns = self._with_version(features, entities, version)
        with online_errors(self._home), _the_requests_fault():
            return self._features.read(features, columns, full_feature_names)

    def feast_response(
        self,
        asked: list[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        full_feature_names: bool = False,
    ) -> dict[str, Any]:
        """What `feast serve` answers. Raises BadInput on what is not registered."""
        from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

        features = self._registered(asked)
        with online_errors(self._home), _the_requests_fault():
            response = self._store.get_online_features(features, entities, full_feature_names)
        columns, names = response.to_dict(), list(response.proto.metadata.feature_names.val)
        return {
            "metadata": {"feature_names": names},
            "results": [
                {
                    "values": columns[name],
                    "statuses": [FieldStatus.Name(status) for status in result.statuses],
                    "event_timestamps": [moment.ToJsonString() for moment in result.event_timestamps],
                }
                for name, result in zip(names, response.proto.results, strict=True)
            ],
        }

    def _registered(self, asked: list[str] | str) -> list[str] | FeatureService:
        """References that the store has, or the service of that name."""
        if isinstance(asked, str):
            service = {one.name: one for one in self._store.list_feature_services()}.get(asked)
            if service is None:
                raise BadInput(f"no feature service is named {clipped(asked)}; correct it.")
            return service
        for reference in asked:
            view, _, feature = reference.partition(":")
            if feature not in self._view_columns.get(view, {}).get("features", ()):
                raise BadInput(
                    f"{clipped(reference)} is no feature of the store; give each as `view:feature`."
                )
        return asked

    def _with_version(
        self,
        features: list[str] | FeatureService,
        entities: Mapping[str, Sequence[Identifier]],
        version: str,
    ) -> Mapping[str, Sequence[Identifier]]:
        """The entities, with the model's version where a view is keyed by one and none is given."""
        names = (
            list(map(view_of, features))
            if isinstance(features, list)
            else [projection.name for projection in features.feature_view_projections]
        )
        keyed = any("model_version" in self._view_columns.get(name, {}).get("keys", ()) for name in names)
        if not keyed or "model_version" in entities:
            return entities
        rows = len(next(iter(entities.values())))
        return {**entities, "model_version": [version] * rows}

    @cached_property
    def _view_columns(self) -> dict[str, dict[str, set[str]]]:
        """Names of the `features` and `keys` of each view."""
        columns = {
            view.name: {
                "features": {field.name for field in view.features},
                "keys": {column.name for column in view.entity_columns},
            }
            for view in self._store.list_feature_views()
        }
        for view in self._store.list_on_demand_feature_views():
            columns[view.name] = {"features": {field.name for field in view.features}, "keys": set()}
        return columns

    @cached_property
    def _features(self) -> FeatureReader:
        return FeatureReader(self._store)

    def _as_stored(self, view: str, key: str, value: Identifier) -> Identifier:
        """The id in the type it has in the log. Raises UnknownEntity when it cannot be one of them."""
        stored = self._stored_id(view, key, value)
        if stored is None:
            kind = key.removesuffix("_id")
            raise UnknownEntity(
                f"{kind} {clipped(value)} is not an integer, as the {kind} ids of this log are."
                if self._key_types[view, key] == "Int64"
                else f"{kind} {clipped(ascii(value))} is no id."
            )
        return stored

    def _stored_id(self, view: str, key: str, value: Identifier) -> Identifier | None:
        """The id in the type it has in the log; None when it cannot be one of them."""
        return id_as(value, integer=self._key_types[view, key] == "Int64")

    @cached_property
    def _key_types(self) -> dict[tuple[str, str], str]:
        return {
            (view, column.name): str(column.dtype)
            for view in ("user_embedding", "item_embedding")
            for column in self._store.get_feature_view(view).entity_columns
        }


def id_as(value: Identifier, *, integer: bool) -> Identifier | None:
    """An id as an integer or a text; None when it cannot be one.

    An id is exactly what it is: 10 is written "10" or 10, not "1_0", " 10 ", "010" or true.
    """
    if isinstance(value, bool):
        return None
    if integer:
        if isinstance(value, str):
            if len(value) > 20 or not _INTEGER.fullmatch(value):
                return None
            value = int(value)
        number = operator.index(value)  # an int, also of numpy's
        return number if -(2**63) <= number < 2**63 else None
    text = str(value)
    return text if text.isascii() or _encodable(text) else None


def _matrix(vectors: Sequence[Vector | None], width: int) -> npt.NDArray[np.float32]:
    """Vectors [N, width], NaN where there is none. Raises Damaged when one has another width."""
    unknown = np.full(width, np.nan, dtype=np.float32)
    rows = [unknown if vector is None else vector for vector in vectors]
    other = next((len(row) for row in rows if len(row) != width), None)
    if other is not None:
        raise Damaged(
            f"the online store has a vector of {other} numbers where the live model reads {width}; run"
            " `bahe publish`."
        )
    return np.stack(rows)


def _encodable(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _found(
    items: list[Identifier], vectors: Vectors, statistics: dict[str, list[Any]]
) -> tuple[list[Identifier], npt.NDArray[np.float32], dict[str, list[Any]]]:
    """Ids, vectors and features of those items that are online."""
    if vectors.found_N.all():
        return items, vectors.vectors_ND, statistics
    found = np.flatnonzero(vectors.found_N).tolist()
    kept = {name: [values[i] for i in found] for name, values in statistics.items()}
    return [items[i] for i in found], vectors.vectors_ND[found], kept


def parsed_context(given: Sequence[str]) -> dict[str, str]:
    """Context written as `column=value`, once each. Raises BadInput on anything else."""
    context: dict[str, str] = {}
    for one in given:
        column, equals, value = one.partition("=")
        if not equals or column in context:
            raise BadInput(f"context {clipped(one)} is refused; give each column once, as device=phone.")
        context[column] = value
    return context
