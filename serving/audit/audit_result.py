"""What an audit found, as values that people and machines read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from bahe_core.results import Result
from serving.lookup.identifiers import Identifier

EXAMPLES = 10
"""Rows that differ that are kept of each feature."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row that differs. Of a vector, the largest difference of a number stands for it."""

    user_id: Identifier
    item_id: Identifier
    moment: datetime
    model_version: str
    served: Any
    offline: Any
    cause: str


@dataclass(frozen=True, kw_only=True)
class FeatureAudit:
    """One feature, over all rows."""

    feature: str
    """`view:feature`."""
    rows: int
    differing: int
    missing: int
    """Rows for which training has a value, and serving had none."""
    extra: int
    """Rows for which serving had a value, and training has none."""
    largest_difference: float | None
    """Of numbers, and of the numbers of vectors."""
    smape: float | None
    """Symmetric mean absolute percentage error of numbers, 0 to 2, over rows with both values."""
    edit_distance: float | None
    """Of histories: mean number of behaviors to add, drop or change."""
    causes: dict[str, int]
    """Likely causes of the rows that differ."""
    examples: list[Difference] = field(default_factory=list)

    @property
    def equal(self) -> float:
        """Share of rows whose values are equal."""
        return 1 - self.differing / self.rows if self.rows else 1.0


@dataclass(frozen=True, kw_only=True)
class Audit(Result):
    """What an audit found."""

    source: str
    """`requests`, or `impressions` whose pairs were asked about now."""
    freshness: str
    rows: int
    """Pairs of a user and an item."""
    features: list[FeatureAudit]
    staleness_p50_s: float
    """Seconds since the publish that answered, median over rows."""
    staleness_p99_s: float

    @property
    def consistent(self) -> bool:
        """Whether every feature of every row was equal."""
        return all(not feature.differing for feature in self.features)

    @property
    def summary(self) -> list[str]:
        """Rows, staleness and the verdict."""
        differing = [feature for feature in self.features if feature.differing]
        verdict = (
            f"{len(differing)} of {len(self.features)} features differ"
            if differing
            else f"all {len(self.features)} features equal what training sees"
        )
        return [
            f"{self.rows:,} pairs of {self.source}, freshness {self.freshness}; published"
            f" {_duration(self.staleness_p50_s)} before (median), {_duration(self.staleness_p99_s)} (99 %)",
            verdict,
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        shown = [{**asdict(feature), "equal": feature.equal} for feature in self.features]
        return {**asdict(self), "features": shown, "consistent": self.consistent}


def together(parts: Sequence[FeatureAudit]) -> FeatureAudit:
    """One feature under several model_versions."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.rows for part in parts)

    def mean(name: str) -> float | None:
        known = [(getattr(part, name), part.rows) for part in parts if getattr(part, name) is not None]
        return sum(value * n for value, n in known) / sum(n for _, n in known) if known else None

    differences = [p.largest_difference for p in parts if p.largest_difference is not None]
    causes: Counter[str] = Counter()
    for part in parts:
        causes.update(part.causes)
    return FeatureAudit(
        feature=parts[0].feature,
        rows=rows,
        differing=sum(part.differing for part in parts),
        missing=sum(part.missing for part in parts),
        extra=sum(part.extra for part in parts),
        largest_difference=max(differences) if differences else None,
        smape=mean("smape"),
        edit_distance=mean("edit_distance"),
        causes=dict(causes),
        examples=[example for part in parts for example in part.examples][:EXAMPLES],
    )


def _duration(seconds: float) -> str:
    if np.isnan(seconds):
        return "an unknown time"
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
