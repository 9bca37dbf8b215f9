"""What a lookup answers with, as typed values: features, scores, similar items, what was taken in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bahe_core.results import Result
from serving.lookup.identifiers import Identifier

Vector = npt.NDArray[np.float32]


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
    """Of the two item vectors under the live model: 1 for the same direction. Where a text was asked about,
    of the two texts' vectors by the live model's encoder, standardised."""


@dataclass(frozen=True)
class SimilarItems(Result):
    """Items like one, most alike first."""

    item_id: Identifier
    model_version: str
    items: list[SimilarItem]


@dataclass(frozen=True)
class SimilarUser:
    """A user, and how alike they are to the one asked about."""

    user_id: Identifier
    cosine: float
    """Of the two user vectors under the live model, standardised."""


@dataclass(frozen=True)
class SimilarUsers(Result):
    """Users like one, most alike first."""

    user_id: Identifier
    model_version: str
    users: list[SimilarUser]


@dataclass(frozen=True)
class SimilarAtom:
    """An atomic behavior, and how alike it is to what was asked about."""

    atom_id: int
    channel: str
    text: str
    cosine: float
    """Of the two texts' vectors by the live model's encoder, standardised."""


@dataclass(frozen=True)
class SimilarAtoms(Result):
    """Atomic behaviors like one, most alike first."""

    atom_id: int
    model_version: str
    atoms: list[SimilarAtom]


@dataclass(frozen=True)
class SimilarToText(Result):
    """Items and atomic behaviors whose texts are most alike to one, most alike first."""

    model_version: str
    items: list[SimilarItem]
    atoms: list[SimilarAtom]


@dataclass(frozen=True)
class TakenIn(Result):
    """What became of impressions or clicks that were sent."""

    new: int
    known: int
    """Sent before, or published; they count once."""
    refused: dict[int, str]
    """Why, by place."""
