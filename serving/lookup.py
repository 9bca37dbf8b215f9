"""Features and scores of the live model, read from the online store through Feast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bahe_core.errors import BadInput, UnknownEntity, clipped
from bahe_core.home import Home
from bahe_models import column_of
from feast_ducklake.online.rows import Vectors
from feast_ducklake.online.vectors import VectorReader
from feature_repo.item_keys import UNKNOWN
from feature_repo.references import view_of
from feature_repo.store import online_errors, open_store
from serving.answers import Answer, ItemScores, Score, UserFeatures, Vector
from serving.catalogue import Catalogue
from serving.identifiers import Identifier
from serving.item_table import ItemTable
from serving.online_features import OnlineFeatures
from serving.published_models import PublishedModels
from serving.request_log import RequestLog, ServedRequest
from serving.similar import Similar
from serving.text_encoder import TextEncoder

if TYPE_CHECKING:
    from bahe_models import Artifact
    from bahe_models.context import Value

VECTOR = "embedding"
UnknownUser = Literal["empty", "refuse"]
"""What becomes of a user who is not online: the state of one who has done nothing, or UnknownEntity."""
_KEYS = ("user_id", "item_id")


class OnlineLookup:
    """Reads the live pointer on every request, so that a publish takes effect at once."""

    def __init__(self, home: Home, log: RequestLog | None = None, *, keep_items: bool = False) -> None:
        """`log` keeps what answers were made of. `keep_items` keeps vectors and features of all items in
        memory, for a service; they are read again when the store's tokens say that they changed."""
        self._home, self._log = home, log
        self._store = open_store(home)
        self.online = OnlineFeatures(home, self._store)
        self.models = PublishedModels(home, self._store, self.online, self._read_beside)
        self._catalogue = Catalogue(home)
        self._table = ItemTable(self._store, self._read_items) if keep_items else None
        self.texts = TextEncoder(home)
        self.similar = Similar(home, self)

    def live_version(self) -> str:
        """The model_version that answers now. Raises NotReady before the first publish."""
        return self.models.live_version()

    def artifact(self, version: str) -> Artifact:
        """The artifact of a model_version. Raises Damaged when it is not there whole."""
        return self.models.artifact(version)

    def catalogue(self) -> Mapping[Identifier, str]:
        """Text of every item that can be recommended, by id."""
        return self._catalogue.texts()

    def _read_beside(self, references: Sequence[str]) -> list[str]:
        """What is read with a user's or an item's features although the model does not read it."""
        return []

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
        version = self.live_version()
        vector = self.models.empty_vector(version)
        stored_id = self.online.stored_id("user_embedding", "user_id", user_id)
        return UserFeatures(
            user_id=user_id if stored_id is None else stored_id,
            model_version=version,
            cold=True,
            behaviors=0,
            vector=vector,
            statistics={column_of(one): None for one in self.models.inputs(version).references["user"]},
            seen_items=frozenset(),
            known=False,
        )

    def users(self, user_ids: Sequence[Identifier], version: str) -> list[UserFeatures | None]:
        """Features of users under a model_version, in one read; None for one that is not online."""
        ids = [self.online.as_stored("user_embedding", "user_id", user_id) for user_id in user_ids]
        statistics = self.models.inputs(version).references["user"]
        values = self.online.read(
            [
                f"user_embedding:{VECTOR}",
                "user_embedding:behaviors",
                "user_embedding:seen_items",
                *statistics,
            ],
            {"user_id": ids, "model_version": [version] * len(ids)},
        )
        named = [column_of(reference) for reference in statistics]
        vectors = self.models.read_vectors("user", version, {"user_id": ids})

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
        items = [self.online.as_stored("item_embedding", "item_id", item) for item in item_ids]
        vectors, statistics = self._items_for(user, items)
        missing = [item for item, stored in zip(items, vectors.found_N, strict=True) if not stored]
        if missing:
            raise self.unknown_items(missing)
        return self._answer(user, items, vectors.vectors_ND, statistics, at, context)

    def unknown_items(self, missing: Sequence[Identifier]) -> UnknownEntity:
        """The error that names items which are not online."""
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
        stored_ids = [self.online.stored_id("item_embedding", "item_id", item) for item in item_ids]
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

    def _answer(
        self,
        user: UserFeatures,
        items: list[Identifier],
        vectors_NV: Vector,
        statistics: dict[str, list[Any]],
        at: datetime | None,
        context: Mapping[str, Value] | None,
        best: int | None = None,
    ) -> Answer:
        """The `best` items (None: all), best first."""
        from bahe_models.context import refuse_unknown  # torch, which a lookup does without
        from serving.scoring import click_probabilities

        artifact = self.artifact(user.model_version)
        categories = self.models.inputs(user.model_version).categories
        given = context or {}
        refuse_unknown([c for c in artifact.context_columns if c not in categories], given)
        if not items:
            return Answer(user.user_id, user.model_version, user.cold, [], user.known)
        now = at or datetime.now(UTC)
        if now.tzinfo is None:
            now = now.replace(tzinfo=UTC)
        probability = click_probabilities(
            artifact, user, vectors_NV, statistics, given, now, categories=categories
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
        references = self.models.inputs(version).references
        kept = None
        if self._table is not None:
            further = [*references["item"], *self.models.inputs(version).vectors["item"]]
            views = ["item_embedding", *dict.fromkeys(map(view_of, further))]
            with online_errors(self._home):
                kept = self._table.of(items, version, self.catalogue(), views)
        vectors, values = kept or self._read_items(items, version)
        if items and user_id is not None:
            pairs = {"user_id": [user_id] * len(items), "item_id": items}
            if references["pair"]:
                of_pairs = self.online.read(references["pair"], pairs)
                values |= {name: column for name, column in of_pairs.items() if name not in _KEYS}
            values |= self.models.read_vectors("pair", version, pairs)
            values |= self.models.read_by_attributes(version, {**values, **pairs})
        return vectors, values

    def _items_for(
        self, user: UserFeatures, items: Sequence[Identifier]
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """`items` with the user; where the id can be none of the log's, with a key that nobody has."""
        user_id = self.online.stored_id("user_embedding", "user_id", user.user_id)
        nobody = UNKNOWN[self.online.key_types["user_embedding", "user_id"]]
        return self.items(items, user.model_version, nobody if user_id is None else user_id)

    def _read_items(
        self, items: Sequence[Identifier], version: str
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """One read of the vectors, one of the features."""
        vectors = self._read_item_vectors(items, version)
        if not items:
            return vectors, {}
        values = self.online.read(self.models.inputs(version).references["item"], {"item_id": items})
        found = {name: column for name, column in values.items() if name not in _KEYS}
        return vectors, found | self.models.read_vectors("item", version, {"item_id": items})

    def item_vectors(self, items: Sequence[Identifier], version: str) -> Vectors:
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


def _found(
    items: list[Identifier], vectors: Vectors, statistics: dict[str, list[Any]]
) -> tuple[list[Identifier], Vector, dict[str, list[Any]]]:
    """Ids, vectors and features of those items that are online."""
    if vectors.found_N.all():
        return items, vectors.vectors_ND, statistics
    found = np.flatnonzero(vectors.found_N).tolist()
    kept = {name: [values[i] for i in found] for name, values in statistics.items()}
    return [items[i] for i in found], vectors.vectors_ND[found], kept
