"""Click probabilities of items for a user: what was read, as the inputs of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from bahe_core.errors import Damaged
from bahe_models import Artifact
from bahe_models.context import Value, hash_values
from serving.answers import UserFeatures, Vector


def click_probabilities(
    artifact: Artifact,
    user: UserFeatures,
    vectors_NV: Vector,
    statistics: Mapping[str, Sequence[Any]],
    context: Mapping[str, Value],
    now: datetime,
    *,
    categories: Sequence[str],
) -> npt.NDArray[np.float64]:
    """Of N items at least one, by their vectors and `statistics` (features of items and pairs, by column).

    `now` is what features are aged to. `categories` are the context columns that the online store has; the
    others are in `context`, or unknown.
    """
    count = len(vectors_NV)

    def of_pairs(column: str) -> Sequence[Any]:
        """What the online store has of the items, or of the user for each of them."""
        return statistics[column] if column in statistics else [user.statistics[column]] * count

    columns = {name: np.array(of_pairs(name), dtype=np.float64) for name in artifact.dense.columns}
    hashed_NX = np.empty((count, len(artifact.context_columns)), dtype=np.int64)
    for place, column in enumerate(artifact.context_columns):
        values = of_pairs(column) if column in categories else [context.get(column)]
        hashed_NX[:, place] = hash_values(column, values)
    lengths_C = [int(user.statistics[f"length_{c}"] or 0) for c in artifact.dense.channels]
    vectors = {
        reference: _matrix(statistics.get(reference) or [user.vectors.get(reference)] * count, width)
        for reference, width in artifact.vectors.items()
    }
    return artifact.score(
        np.tile(user.vector, (count, 1)),
        vectors_NV,
        columns,
        np.tile(np.array(lengths_C, dtype=np.int64), (count, 1)),
        np.full(count, int(now.timestamp() * 1e6), dtype=np.int64),
        hashed_NX,
        vectors,
    )


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
