"""Click probabilities of items for users: what was read, as the inputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bahe_core.errors import Damaged
from bahe_models import Artifact
from bahe_models.context import hash_values
from serving.lookup.answers import Vector
from serving.lookup.candidates import Candidates


def click_probabilities(
    artifact: Artifact, asked: Sequence[Candidates], *, categories: Sequence[str]
) -> list[npt.NDArray[np.float64]]:
    """Of each user's N candidates, in one pass of the model over all users.

    `categories` are the context columns that the online store has; the others are in the context of a
    request, or unknown.
    """
    bounds = np.cumsum([len(one.items) for one in asked])[:-1]
    asked = [one for one in asked if one.items]
    counts = [len(one.items) for one in asked]
    if not asked:
        return np.split(np.empty(0), bounds)

    def of_pairs(one: Candidates, column: str) -> Sequence[Any]:
        """What the online store has of the items, or of the user for each of them."""
        if column in one.statistics:
            return one.statistics[column]
        return [one.user.statistics[column]] * len(one.items)

    def hashed(column: str) -> npt.NDArray[np.int64]:
        parts = [
            hash_values(column, of_pairs(one, column))
            if column in categories
            else np.repeat(hash_values(column, [one.context.get(column)]), len(one.items))
            for one in asked
        ]
        return np.concatenate(parts)

    def of_users(values: Sequence[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.repeat(np.array(values, dtype=dtype), counts, axis=0)

    def vectors_of(one: Candidates, reference: str) -> Sequence[Vector | None]:
        return one.statistics.get(reference) or [one.user.vectors.get(reference)] * len(one.items)

    columns = {
        name: np.concatenate([np.array(of_pairs(one, name), dtype=np.float64) for one in asked])
        for name in artifact.dense.columns
    }
    hashed_NX = np.empty((sum(counts), len(artifact.context_columns)), dtype=np.int64)
    for place, column in enumerate(artifact.context_columns):
        hashed_NX[:, place] = hashed(column)
    lengths = [f"length_{channel}" for channel in artifact.dense.channels]
    vectors = {
        reference: _matrix([vector for one in asked for vector in vectors_of(one, reference)], width)
        for reference, width in artifact.vectors.items()
    }
    probability_N = artifact.score(
        of_users([one.user.vector for one in asked], np.float32),
        np.concatenate([one.vectors_NV for one in asked]),
        columns,
        of_users([[int(one.user.statistics[name] or 0) for name in lengths] for one in asked], np.int64),
        of_users([int(one.at.timestamp() * 1e6) for one in asked], np.int64),
        hashed_NX,
        vectors,
    )
    return np.split(probability_N, bounds)


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
