"""What a lookup is asked to score, and what it read for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from serving.lookup.answers import Answer, ItemScores, UserFeatures, Vector
from serving.lookup.identifiers import Identifier

if TYPE_CHECKING:
    from bahe_models.context import Value
    from feast_ducklake.online.rows import Vectors

UnknownUser = Literal["empty", "refuse"]
"""What becomes of a user who is not online: the state of one who has done nothing, or UnknownEntity."""


@dataclass(frozen=True, kw_only=True)
class ItemsOfUser:
    """Items to score for a user; the fields are the arguments of `OnlineLookup.score_each`."""

    user_id: Identifier
    item_ids: Sequence[Identifier]
    at: datetime | None = None
    context: Mapping[str, Value] | None = None
    unknown_user: UnknownUser = "empty"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """N items that are online, for one user, with all that was read of them."""

    user: UserFeatures
    items: Sequence[Identifier]
    vectors_NV: Vector
    statistics: Mapping[str, Sequence[Any]]
    """Features of the items, and of the pairs of user and item, by column."""
    at: datetime
    """What features are aged to."""
    context: Mapping[str, Value]


def candidates(
    user: UserFeatures,
    items: Sequence[Identifier],
    vectors: Vectors,
    values: Mapping[str, Sequence[Any]],
    at: datetime | None,
    context: Mapping[str, Value] | None,
) -> Candidates:
    """Those of the items that are online; `at` is now by default, and UTC unless it has a zone."""
    at = at or datetime.now(UTC)
    vectors_NV = vectors.vectors_ND
    if not vectors.found_N.all():
        found = np.flatnonzero(vectors.found_N).tolist()
        values = {name: [column[i] for i in found] for name, column in values.items()}
        items, vectors_NV = [items[i] for i in found], vectors_NV[found]
    return Candidates(
        user=user,
        items=items,
        vectors_NV=vectors_NV,
        statistics=values,
        at=at if at.tzinfo else at.replace(tzinfo=UTC),
        context=context or {},
    )


def by_item(given: Sequence[Identifier], stored: Sequence[Identifier | None], answer: Answer) -> ItemScores:
    """An answer in the order that was asked for; `stored` are the ids as the log has them."""
    probability = {score.item_id: score.probability for score in answer.scores}
    return ItemScores(
        user_id=answer.user_id,
        model_version=answer.model_version,
        cold=answer.cold,
        item_ids=[one if its is None else its for one, its in zip(given, stored, strict=True)],
        probabilities=[None if its is None else probability.get(its) for its in stored],
        known=answer.known,
    )
