"""Items, users and atomic behaviors that are alike to the live model, and those that are like a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bahe_core.errors import BadInput, Busy, UnknownEntity, clipped
from bahe_core.home import Home
from bahe_lake.versions import LATEST_ITEMS
from serving.lookup.answers import (
    SimilarAtom,
    SimilarAtoms,
    SimilarItem,
    SimilarItems,
    SimilarToText,
    SimilarUser,
    SimilarUsers,
    Vector,
)
from serving.lookup.identifiers import Identifier, id_as
from serving.lookup.kept_vectors import Kept, KeptVectors

if TYPE_CHECKING:
    from bahe_models import Artifact
    from serving.lookup.online_lookup import OnlineLookup

_USERS = "SELECT user_id, embedding FROM user_embedding WHERE model_version = $version AND behaviors > 0"
"""Those who have done nothing are all the same."""
_ATOMS = """
    SELECT atom_id, channel, text, embedding
    FROM atoms JOIN atomic_behavior_embedding e USING (atom_id)
    WHERE e.encoder_version = $encoder AND channel IN (SELECT unnest($channels))
"""
_ITEM_TEXTS = f"""
    SELECT item_id, e.embedding
    FROM {LATEST_ITEMS} JOIN atomic_behavior_embedding e USING (atom_id)
    WHERE e.encoder_version = $encoder
"""
Texts = Mapping[Identifier, str]
"""The catalogue: another object after each publish."""
Found = TypeVar("Found")
_TRIES = 3
_AS_AN_ITEMS = "item"
"""The channel as which an item's text is encoded, and so a text that is searched for."""


class Similar:
    """Safe to use from several threads.

    Users, atoms and texts of items are read from the lake when they are first asked for, then kept.
    """

    def __init__(self, home: Home, lookup: OnlineLookup) -> None:
        self._lookup = lookup
        self._users = KeptVectors(home, "users", _USERS)
        self._atoms = KeptVectors(home, "atomic behaviors", _ATOMS)
        self._item_texts = KeptVectors(home, "texts of items", _ITEM_TEXTS)

    def items(self, item_id: Identifier, k: int = 10) -> SimilarItems:
        """The k items whose vectors under the live model are most alike to an item's, without itself.

        Every item is compared, in one product. Raises UnknownEntity when the item is not online.
        """
        _check(k)
        lookup = self._lookup
        version, texts = lookup.live_version(), lookup.catalogue()
        own_id = lookup.online.as_stored("item_embedding", "item_id", item_id)
        item_ids = list(texts)  # in the catalogue's order, in which a service has them in memory
        vectors = lookup.item_vectors(item_ids, version)
        others_N = vectors.found_N.copy()
        own = item_ids.index(own_id) if own_id in texts else None
        if own is None or not others_N[own]:
            raise lookup.unknown_items([own_id])
        others_N[own] = False
        norm_N = np.linalg.norm(vectors.vectors_ND, axis=1).clip(1e-12)
        cosine_N = vectors.vectors_ND @ vectors.vectors_ND[own] / (norm_N * norm_N[own])
        cosine_N[~others_N] = -np.inf
        best = np.argsort(-cosine_N, kind="stable")[: min(k, int(others_N.sum()))].tolist()
        found = [SimilarItem(item_ids[i], texts[item_ids[i]], float(cosine_N[i])) for i in best]
        return SimilarItems(own_id, version, found)

    def users(self, user_id: Identifier, k: int = 10) -> SimilarUsers:
        """The k users whose vectors under the live model are most alike to a user's, without themselves and
        those who have done nothing.

        What was pushed counts for the user asked about; the others are as published. Raises UnknownEntity
        when the user is not online, and as `KeptVectors.of`.
        """
        _check(k)

        def ask(version: str, texts: Texts) -> SimilarUsers:
            user = self._lookup.user(user_id)
            kept = self._users.of(version, texts, {"version": version})
            found = [
                SimilarUser(kept.value("user_id", row), cosine)
                for row, cosine in kept.directions.nearest(kept.directions.to(user.vector), k + 1)
            ]
            others = [one for one in found if one.user_id != user.user_id]
            return SimilarUsers(user.user_id, version, others[:k])

        return self._of_one_publish(ask)

    def atoms(self, atom_id: Identifier, k: int = 10) -> SimilarAtoms:
        """The k atomic behaviors whose vectors by the live model's encoder are most alike to an atom's.

        Without itself. Raises UnknownEntity when there is no such atom, and as `KeptVectors.of`.
        """
        _check(k)
        version, texts = self._lookup.live_version(), self._lookup.catalogue()
        artifact = self._lookup.artifact(version)
        kept = self._kept_atoms(artifact, texts)
        own_id = id_as(atom_id, integer=True)
        own = None if own_id is None else kept.row_of("atom_id", own_id)
        if own is None:
            raise UnknownEntity(
                f"atom {clipped(ascii(atom_id))} is not among the behaviors that were published; check the"
                " id."
            )
        nearest = self._nearest_atoms(kept, kept.directions.at(own), k + 1)
        others = [one for one in nearest if one.atom_id != own_id]
        return SimilarAtoms(int(kept.value("atom_id", own)), artifact.model_version, others[:k])

    def to_text(self, text: str, k: int = 10) -> SimilarToText:
        """The k items and the k atomic behaviors whose texts are most alike to any text.

        The text is encoded as an item's would be. That takes the language model, which is loaded where it
        is not in memory yet. Raises BadInput on an empty text, and as `TextEncoder.encode` and
        `KeptVectors.of`.
        """
        _check(k)
        lookup = self._lookup
        normal, _ = lookup.texts.atom(_AS_AN_ITEMS, text)
        if not normal:
            raise BadInput("the text is empty; say what to look for.")

        def ask(version: str, texts: Texts) -> SimilarToText:
            artifact = lookup.artifact(version)
            (vector_V,) = lookup.texts.encode(artifact, [_AS_AN_ITEMS], [normal])
            of_items = self._item_texts.of(version, texts, {"encoder": artifact.encoder_version})
            nearest = of_items.directions.nearest(of_items.directions.to(vector_V), k)
            item_ids = [(of_items.value("item_id", row), cosine) for row, cosine in nearest]
            atoms = self._kept_atoms(artifact, texts)
            return SimilarToText(
                version,
                [SimilarItem(item, texts[item], cosine) for item, cosine in item_ids if item in texts],
                list(self._nearest_atoms(atoms, atoms.directions.to(vector_V), k)),
            )

        return self._of_one_publish(ask)

    def _of_one_publish(self, ask: Callable[[str, Texts], Found]) -> Found:
        """What `ask` finds under the live version, once more where a publish or rollback came meanwhile."""
        for _ in range(_TRIES):
            version, texts = self._lookup.live_version(), self._lookup.catalogue()
            found = ask(version, texts)
            if self._lookup.live_version() == version and self._lookup.catalogue() is texts:
                return found
        raise Busy("other models were made live while this was looked up; try again.")

    def _kept_atoms(self, artifact: Artifact, texts: Texts) -> Kept:
        parameters = {"encoder": artifact.encoder_version, "channels": list(artifact.dense.channels)}
        return self._atoms.of(artifact.model_version, texts, parameters)

    def _nearest_atoms(self, kept: Kept, direction_V: Vector, k: int) -> Iterator[SimilarAtom]:
        for row, cosine in kept.directions.nearest(direction_V, k):
            yield SimilarAtom(
                kept.value("atom_id", row), kept.value("channel", row), kept.value("text", row), cosine
            )


def _check(k: int) -> None:
    if k < 1:
        raise BadInput(f"k is {k}; it must be at least 1.")
