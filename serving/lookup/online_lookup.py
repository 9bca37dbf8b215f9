"""Features and scores of the live model, read from the online store through Feast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bahe_core.errors import BadInput, UnknownEntity, clipped
from bahe_core.home import Home
from bahe_models import column_of
from feast_ducklake.online.rows import Vectors
from feast_ducklake.online.vectors import VectorReader
from feature_repo.item_keys import UNKNOWN
from feature_repo.references import view_of
from feature_repo.store import online_errors, open_store
from serving.lookup.answers import Answer, ItemScores, Score, UserFeatures
from serving.lookup.candidates import Candidates, ItemsOfUser, UnknownUser, by_item, candidates
from serving.lookup.catalogue import Catalogue
from serving.lookup.feature_writes import FeatureWrites
from serving.lookup.identifiers import Identifier
from serving.lookup.item_table import ItemTable
from serving.lookup.online_features import OnlineFeatures
from serving.lookup.published_models import PublishedModels
from serving.lookup.request_log import RequestLog, ServedRequest
from serving.lookup.similar import Similar
from serving.lookup.text_encoder import TextEncoder

if TYPE_CHECKING:
    from bahe_models import Artifact
    from bahe_models.context import Value

VECTOR = "embedding"
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
        self.feature_writes = FeatureWrites(home, self._store, self.models)
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
        return self._up_to_date(self._stored_user(user_id, "refuse"))

    def user_or_empty(self, user_id: Identifier) -> UserFeatures:
        """A user's features, or those of one who has done nothing."""
        return self._up_to_date(self._stored_user(user_id, "empty"))

    def _up_to_date(self, user: UserFeatures) -> UserFeatures:
        """The user as answers know them; `user` is as the online store has them."""
        return user

    def _stored_user(self, user_id: Identifier, unknown_user: UnknownUser) -> UserFeatures:
        (user,) = self._stored_users([(user_id, unknown_user)], self.live_version())
        return user

    def _stored_users(
        self, asked: Sequence[tuple[Identifier, UnknownUser]], version: str
    ) -> list[UserFeatures]:
        """Users as the online store has them, in one read; one who is not there is empty, or refused."""
        ids = [self.online.stored_id("user_embedding", "user_id", given) for given, _ in asked]
        distinct = list(dict.fromkeys(one for one in ids if one is not None))
        stored = dict(zip(distinct, self.users(distinct, version), strict=True)) if distinct else {}
        users: list[UserFeatures] = []
        for (given, unknown_user), stored_id in zip(asked, ids, strict=True):
            user = None if stored_id is None else stored[stored_id]
            if user is None and unknown_user == "refuse":
                self.online.as_stored("user_embedding", "user_id", given)
                raise UnknownEntity(
                    f"user {clipped(given)} is not in the online store of {self._home.root}; check the id,"
                    " or ingest, embed and publish the user first."
                )
            users.append(user or self._empty_user(given if stored_id is None else stored_id, version))
        return users

    def _empty_user(self, user_id: Identifier, version: str) -> UserFeatures:
        """What a user is before the first behavior and impression."""
        return UserFeatures(
            user_id=user_id,
            model_version=version,
            cold=True,
            behaviors=0,
            vector=self.models.empty_vector(version),
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
        (answer,) = self._answers([candidates(user, items, vectors, statistics, at, context)])
        return answer

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
        asked = ItemsOfUser(
            user_id=user_id, item_ids=item_ids, at=at, context=context, unknown_user=unknown_user
        )
        return self.score_batch([asked])[0]

    def score_batch(self, requests: Sequence[ItemsOfUser]) -> list[ItemScores]:
        """`score_each` of several users, under one model_version and, without `at`, at one moment.

        Users are read in one go, items once, and so are the pairs of both; the model makes one pass over
        all of them. Raises as `score_each`, for all of them where one is refused.
        """
        version, now = self.live_version(), datetime.now(UTC)
        stored = self._stored_users([(one.user_id, one.unknown_user) for one in requests], version)
        ids = [
            [self.online.stored_id("item_embedding", "item_id", item) for item in one.item_ids]
            for one in requests
        ]
        items = [list(dict.fromkeys(item for item in its if item is not None)) for its in ids]
        found: list[Candidates] = []
        for one, user, its, (vectors, values) in zip(
            requests, stored, items, self._items_of_each(stored, items, version), strict=True
        ):
            user = self._up_to_date(user)
            self._add_sent(values, its, version, self._key_of_pairs(user))
            found.append(candidates(user, its, vectors, values, one.at or now, one.context))
        return [
            by_item(one.item_ids, its, answer)
            for one, its, answer in zip(requests, ids, self._answers(found), strict=True)
        ]

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
        (answer,) = self._answers([candidates(user, items, vectors, statistics, at, context)], best=k)
        return answer

    def _answers(self, asked: Sequence[Candidates], best: int | None = None) -> list[Answer]:
        """The `best` candidates of each user (None: all), best first. All are of one model_version."""
        from bahe_models.context import refuse_unknown  # torch, which a lookup does without
        from serving.lookup.scoring import click_probabilities

        if not asked:
            return []
        version = asked[0].user.model_version
        artifact, categories = self.artifact(version), self.models.inputs(version).categories
        of_requests = [column for column in artifact.context_columns if column not in categories]
        for one in asked:
            refuse_unknown(of_requests, one.context)
        probabilities = click_probabilities(artifact, asked, categories=categories)
        return [self._answer(one, its, best) for one, its in zip(asked, probabilities, strict=True)]

    def _answer(
        self, asked: Candidates, probability_N: npt.NDArray[np.float64], best: int | None
    ) -> Answer:
        user, items = asked.user, asked.items
        if not items:
            return Answer(user.user_id, user.model_version, user.cold, [], user.known)
        texts = self.catalogue()
        order = np.argsort(-probability_N, kind="stable")[:best].tolist()
        if self._log is not None and user.known and self._log.wants(user.user_id):
            self._log.append(
                ServedRequest(
                    served_at=datetime.now(UTC),
                    at=asked.at,
                    model_version=user.model_version,
                    user_id=user.user_id,
                    user={**user.statistics, **user.vectors},
                    user_vector=user.vector,
                    item_ids=[items[i] for i in order],
                    items={name: [values[i] for i in order] for name, values in asked.statistics.items()},
                    item_vectors=asked.vectors_NV[order],
                )
            )
        scores = [Score(items[i], texts.get(items[i], ""), float(probability_N[i])) for i in order]
        return Answer(user.user_id, user.model_version, user.cold, scores, user.known)

    def items(
        self, items: Sequence[Identifier], version: str, user_id: Identifier | None = None
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """Vectors and features of items (ids in the type that the log has), by column.

        With a user also the features of the pairs. Those of `features.vectors` are by `view:feature`.
        """
        vectors, values = self._items_alone(items, version)
        if items and user_id is not None:
            values |= self._of_pairs([user_id] * len(items), items, values, version)
            self._add_sent(values, items, version, user_id)
        return vectors, values

    def _items_alone(
        self, items: Sequence[Identifier], version: str
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """`items` without a user; the values are the caller's own."""
        kept = None
        if self._table is not None:
            inputs = self.models.inputs(version)
            further = [*inputs.references["item"], *inputs.vectors["item"]]
            views = ["item_embedding", *dict.fromkeys(map(view_of, further))]
            with online_errors(self._home):
                kept = self._table.of(items, version, self.catalogue(), views)
        return kept or self._read_items(items, version)

    def _of_pairs(
        self,
        user_ids: Sequence[Identifier],
        items: Sequence[Identifier],
        values: Mapping[str, Sequence[Any]],
        version: str,
    ) -> dict[str, list[Any]]:
        """Features of pairs of a user and an item, a value a pair; `values` are those of the items."""
        references = self.models.inputs(version).references["pair"]
        pairs = {"user_id": user_ids, "item_id": items}
        found: dict[str, list[Any]] = {}
        if references:
            of_pairs = self.online.read(references, pairs)
            found = {name: column for name, column in of_pairs.items() if name not in _KEYS}
        found |= self.models.read_vectors("pair", version, pairs)
        return found | self.models.read_by_attributes(version, {**values, **pairs})

    def _add_sent(
        self,
        values: dict[str, list[Any]],
        items: Sequence[Identifier],
        version: str,
        user_id: Identifier,
    ) -> None:
        """Add to features of pairs, in place, what the user did since the publish."""

    def _items_of_each(
        self, users: Sequence[UserFeatures], items: Sequence[Sequence[Identifier]], version: str
    ) -> list[tuple[Vectors, dict[str, list[Any]]]]:
        """`items` with each of the users, as the online store has them: each item is read once."""
        distinct = list(dict.fromkeys(chain.from_iterable(items)))
        vectors, values = self._items_alone(distinct, version)
        row_of = {item: row for row, item in enumerate(distinct)}
        rows = [[row_of[item] for item in its] for its in items]
        every, whole = list(chain.from_iterable(rows)), list(range(len(distinct)))
        of_pairs: dict[str, list[Any]] = {}
        if every:
            user_ids: list[Identifier] = []
            for one, its in zip(users, items, strict=True):
                user_ids += [self._key_of_pairs(one)] * len(its)
            names = self.models.inputs(version).item_keys
            keys = {name: [values[name][row] for row in every] for name in names}
            of_pairs = self._of_pairs(user_ids, [distinct[row] for row in every], keys, version)
        each: list[tuple[Vectors, dict[str, list[Any]]]] = []
        start = 0
        for its in rows:
            end = start + len(its)
            own_vectors, own = vectors, values
            if its != whole:
                own_vectors = vectors.of_rows(its)
                own = {name: [column[row] for row in its] for name, column in values.items()}
            own = own | {name: column[start:end] for name, column in of_pairs.items()}
            each.append((own_vectors, own))
            start = end
        return each

    def _items_for(
        self, user: UserFeatures, items: Sequence[Identifier]
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """`items` with the user."""
        return self.items(items, user.model_version, self._key_of_pairs(user))

    def _key_of_pairs(self, user: UserFeatures) -> Identifier:
        """The user's id; where it can be none of the log's, a key that nobody has."""
        user_id = self.online.stored_id("user_embedding", "user_id", user.user_id)
        nobody = UNKNOWN[self.online.key_types["user_embedding", "user_id"]]
        return nobody if user_id is None else user_id

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
