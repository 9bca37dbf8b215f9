"""What a project can be asked online: features, scores, recommendations, and what is alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from bahe_core.home import Home

if TYPE_CHECKING:
    from bahe_models.context import Value
    from serving.lookup.answers import (
        Answer,
        ItemScores,
        SimilarAtoms,
        SimilarItems,
        SimilarToText,
        SimilarUsers,
        UserFeatures,
    )
    from serving.lookup.candidates import ItemsOfUser
    from serving.lookup.identifiers import Identifier
    from serving.lookup.online_lookup import OnlineLookup


class Online:
    """The part of a project that asks the live model."""

    home: Home

    def lookup(self, user: Identifier) -> UserFeatures:
        """What the online store holds of a user under the live model."""
        return self._online.user(user)

    def score(
        self,
        user: Identifier,
        items: Sequence[Identifier],
        *,
        at: datetime | None = None,
        context: Mapping[str, Value] | None = None,
    ) -> Answer:
        """Click probabilities of some items for a user, best first; `at` is the moment asked about."""
        return self._online.score(user, list(items), at, context=context)

    def score_batch(self, requests: Sequence[ItemsOfUser]) -> list[ItemScores]:
        """Click probabilities by item for each of many users, who are read in one go, by one model.

        A user who is not online counts as one who has done nothing, an item has no probability then.
        """
        return self._online.score_batch(requests)

    def recommend(
        self,
        user: Identifier,
        k: int = 10,
        *,
        at: datetime | None = None,
        include_seen: bool = False,
        context: Mapping[str, Value] | None = None,
    ) -> Answer:
        """The k items that the user will most likely click, without those acted on before."""
        return self._online.recommend(user, k, at, include_seen=include_seen, context=context)

    def similar_items(self, item: Identifier, k: int = 10) -> SimilarItems:
        """The k items whose vectors under the live model are most alike to an item's, without itself."""
        return self._online.similar.items(item, k)

    def similar_users(self, user: Identifier, k: int = 10) -> SimilarUsers:
        """The k users whose vectors under the live model are most alike to a user's, without themselves."""
        return self._online.similar.users(user, k)

    def similar_atoms(self, atom: int, k: int = 10) -> SimilarAtoms:
        """The k atomic behaviors whose texts are most alike to an atom's to the live model's encoder."""
        return self._online.similar.atoms(atom, k)

    def similar_to_text(self, text: str, k: int = 10) -> SimilarToText:
        """The k items and atomic behaviors whose texts are most alike to one; loads the language model."""
        return self._online.similar.to_text(text, k)

    @cached_property
    def _online(self) -> OnlineLookup:
        from serving.lookup.online_lookup import OnlineLookup

        return OnlineLookup(self.home)
