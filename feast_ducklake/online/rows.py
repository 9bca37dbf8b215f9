"""Rows on their way into an online store, and what comes back out: bytes and microseconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from feast import FeatureView

from bahe_core.errors import BadInput
from feast_ducklake.online.encoding import Int64, read_floats

NO_TIME = int(np.iinfo(np.int64).min)
"""Stands for a missing time among microseconds since 1970."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Rows of one view, ready to be stored."""

    keys: list[bytes]
    """Serialised entity keys [N]; one may occur several times."""
    values: dict[str, list[bytes]]
    """Serialised values by feature, [N] each."""
    event_us: Int64
    """Event times [N], microseconds since 1970, UTC."""
    created_us: Int64 | None = None
    """Created times [N], NO_TIME where there is none."""

    def times(self) -> tuple[list[int], list[int | None]]:
        """Event and created times as Python integers."""
        if self.created_us is None:
            return self.event_us.tolist(), [None] * len(self.keys)
        return self.event_us.tolist(), [None if us == NO_TIME else us for us in self.created_us.tolist()]


class Request(NamedTuple):
    """Some features of some entities of one view."""

    view: FeatureView
    keys: Sequence[bytes]
    features: Sequence[str]


@dataclass(frozen=True)
class StoredValues:
    """What is stored for a request, in its order."""

    values: dict[str, list[bytes | None]]
    """By feature; none where it is not stored."""
    event_us: Int64
    """[N]; NO_TIME where nothing is stored, or what is stored has outlived the view's ttl."""


@dataclass(frozen=True)
class Vectors:
    """Embeddings of some entities."""

    vectors_ND: npt.NDArray[np.float32]
    """Zero where nothing is stored."""
    found_N: npt.NDArray[np.bool_]
    event_us_N: Int64
    """Microseconds since 1970; NO_TIME where nothing is stored."""

    def of_rows(self, rows: Sequence[int]) -> Vectors:
        """Those of some of the entities, by their places."""
        rows_N = np.array(rows, dtype=np.int64)
        return Vectors(self.vectors_ND[rows_N], self.found_N[rows_N], self.event_us_N[rows_N])


def microseconds(moment: datetime) -> int:
    """Since 1970; a time without a zone is UTC, as everywhere in Feast."""
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (aware - EPOCH) // MICROSECOND


def within_ttl(view: FeatureView, stored: StoredValues) -> StoredValues:
    """What has outlived the view's ttl counts as not stored; a ttl of zero is forever."""
    if not view.ttl:
        return stored
    oldest = time.time_ns() // 1000 - view.ttl // MICROSECOND
    return StoredValues(stored.values, np.where(stored.event_us < oldest, NO_TIME, stored.event_us))


def as_vectors(view: FeatureView, feature: str, stored: StoredValues) -> Vectors:
    """One array of what is stored. Raises BadInput when the vectors differ in length."""
    field = next((field for field in view.features if field.name == feature), None)
    if field is None:
        names = ", ".join(field.name for field in view.features)
        raise BadInput(f"view {view.name} has no feature {feature}; it has {names}.")
    values = stored.values[feature]
    # What follows this, and numpy's own tests, would cost a single read half its time.
    if all(values) and NO_TIME not in stored.event_us.tolist():
        vectors_ND = read_floats(cast("list[bytes]", values), field.dtype.to_value_type())
        return Vectors(vectors_ND, np.ones(len(values), dtype=np.bool_), stored.event_us)
    # A stored null is empty.
    stored_N = (stored.event_us != NO_TIME) & np.fromiter(map(bool, values), dtype=np.bool_)
    there = [value for value, stored in zip(values, stored_N.tolist(), strict=True) if stored and value]
    vectors_FD = read_floats(there, field.dtype.to_value_type())
    event_us_N = np.where(stored_N, stored.event_us, NO_TIME)
    if len(there) == len(values):
        return Vectors(vectors_FD, stored_N, event_us_N)
    width = vectors_FD.shape[1] if there else field.vector_length
    vectors_ND = np.zeros((len(values), width), dtype=np.float32)
    if there:
        vectors_ND[stored_N] = vectors_FD
    return Vectors(vectors_ND, stored_N, event_us_N)
