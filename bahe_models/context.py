"""Context of an impression: what is known at request time (device, slot, hour), hashed and embedded.

A value is identified by a 64-bit hash of its column and text, the same in every process and release, so
that training and serving agree without a table of values. Shape letters: N impressions, X context
columns, Y width of all their embeddings together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from bahe_core.errors import BadInput, clipped
from bahe_models.timelines import Int64

Value = str | int | float | bool | None
"""A context value; numbers and booleans are hashed as text, None means unknown."""

MISSING = 0
"""The hash of a value that is not known."""

_LARGEST_WHOLE = 1e16  # from here on Python and DuckDB both write floats with an exponent


def hash_values(column: str, values: Sequence[object]) -> Int64:
    """Hashes [N] of one column's values; `MISSING` for None, NaN and blank text.

    Raises BadInput on a value that is neither text, number, boolean nor None.
    """
    return np.array([_hash(column, value) for value in values], dtype=np.int64)


def hash_context(columns: Sequence[str], context: Mapping[str, Sequence[object]], count: int) -> Int64:
    """Hashes [N, X] of `count` values for each of the columns, in their order.

    Raises BadInput when a column is missing, is not one of `columns`, or has the wrong number of values.
    """
    refuse_unknown(columns, context)
    for column in columns:
        if column not in context:
            raise BadInput(
                f"context column {column} is missing; give it a value for each row, None where unknown."
            )
        if len(context[column]) != count:
            raise BadInput(
                f"context column {column} has {len(context[column])} values, not {count}; give one a row."
            )
    hashed = np.empty((count, len(columns)), dtype=np.int64)
    for place, column in enumerate(columns):
        hashed[:, place] = hash_values(column, context[column])
    return hashed


def refuse_unknown(columns: Sequence[str], given: Mapping[str, object]) -> None:
    """Raises BadInput when a name is not one of the context columns."""
    for name in given:
        if name not in columns:
            hint = f"choose from {', '.join(columns)}" if columns else "the model has none"
            raise BadInput(f"{clipped(name)} is not a context column of the model; {hint}.")


def _hash(column: str, value: object) -> int:
    text = _text(column, value)
    if text is None:
        return MISSING
    data = f"{column}\x1f{text}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1  # 0 means missing


def _text(column: str, value: object) -> str | None:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # A column of integers with gaps often comes as floats.
        whole = value.is_integer() and abs(value) < _LARGEST_WHOLE
        return str(int(value)) if whole else repr(value)
    if isinstance(value, int | str):
        return str(value).strip() or None
    raise BadInput(
        f"context column {column} has a value of type {type(value).__name__}; give text, a number,"
        " a boolean or None."
    )


class ContextEmbedding(nn.Module):
    """One table of embeddings: for each column a row for a missing value, then its buckets.

    All rows start at zero: the first predictions are those without context, and a value whose bucket
    training never met adds nothing.
    """

    def __init__(self, columns: Sequence[str], *, buckets: int, width: int, dropout: float) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.buckets, self.dropout = buckets, dropout
        self.weight = nn.Parameter(torch.zeros(len(self.columns) * (buckets + 1), width))

    @property
    def width(self) -> int:
        """Width of what `forward` returns."""
        return len(self.columns) * self.weight.shape[1]

    def rows(self, hashed_NX: torch.Tensor) -> torch.Tensor:
        """Rows [N, X] of the table for hashes [N, X]."""
        first_X = torch.arange(len(self.columns), device=hashed_NX.device) * (self.buckets + 1)
        bucket_NX = 1 + hashed_NX.remainder(self.buckets)
        return first_X + bucket_NX.masked_fill(hashed_NX == MISSING, 0)

    def forward(self, hashed_NX: torch.Tensor) -> torch.Tensor:
        """Embeddings [N, Y] of hashed values; some are hidden in training, so that missing is learned."""
        if self.training and self.dropout:
            hidden_NX = torch.rand(hashed_NX.shape, device=hashed_NX.device) < self.dropout
            hashed_NX = hashed_NX.masked_fill(hidden_NX, MISSING)
        return nn.functional.embedding(self.rows(hashed_NX), self.weight).flatten(1)
