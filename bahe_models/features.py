"""Dense features: point-in-time statistics as numbers a network can use.

One function serves training (a frame's columns) and serving (the online store's answer), so the two
cannot drift apart. Shape letters: N impressions, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Columns = Mapping[str, Float]

ENTITIES = ("user", "item")
RATE_BOUND = 1e-3
MOMENT = "_us"
"""The name of a feature that is a moment ends so: microseconds since 1970. A model reads the time since."""
EARLIEST_MOMENT = 1e14
"""Smaller numbers are none: in microseconds this is March 1973."""
LARGEST = 4.0
"""Features are clipped to this many standard deviations: a request long after the log's end must not
carry the network into a range it never saw."""


def needed_columns() -> list[str]:
    """Names of the columns `DenseFeatures` reads, beside the timeline lengths."""
    kinds = ("impressions", "click_rate", "last_impression_us")
    return [f"{entity}_{kind}" for entity in ENTITIES for kind in kinds]


def column_of(reference: str) -> str:
    """The column of a frame, or of an online answer, that holds the feature `view:feature`."""
    return reference.partition(":")[2]


def logit(rate: Float) -> Float:
    """Log-odds, bounded so that a rate of 0 or 1 stays finite."""
    bounded = np.clip(rate, RATE_BOUND, 1 - RATE_BOUND)
    odds: Float = np.log(bounded) - np.log1p(-bounded)
    return odds


@dataclass(frozen=True)
class DenseFeatures:
    """Standardised features; the constants fitted to the training rows are saved in the artifact."""

    channels: tuple[str, ...]
    click_rate: float
    """Click rate of the training rows: the rate of a user or item without statistics."""
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    numeric: tuple[str, ...] = ()
    """Further features, as `view:feature` (`features.numeric` of dataset.yaml)."""
    moments: tuple[str, ...] = ()
    """Those of them that are moments; the network reads how long ago."""
    gaps: tuple[str, ...] = ()
    """Those of them that some training rows have and others lack. Having one is a feature of its own: what
    a user never did has no count and no age."""

    @classmethod
    def fit(
        cls,
        columns: Columns,
        lengths_NC: npt.NDArray[np.int64],
        now_us: npt.NDArray[np.int64],
        *,
        channels: Sequence[str],
        click_rate: float,
        numeric: Sequence[str] = (),
    ) -> DenseFeatures:
        """Learn the standardisation from the training rows."""
        moments = tuple(one for one in numeric if _is_moment(column_of(one), columns))
        unknown = {one: np.isnan(np.asarray(columns[column_of(one)], dtype=np.float64)) for one in numeric}
        gaps = tuple(one for one in numeric if 0 < unknown[one].sum() < len(unknown[one]))
        raw = _raw(columns, lengths_NC, now_us, click_rate, numeric, moments, gaps)
        with warnings.catch_warnings():
            # A column without values in the training rows has neither; 0 and 1 take their place below.
            warnings.simplefilter("ignore", RuntimeWarning)
            mean, deviation = np.nanmean(raw, axis=0), np.nanstd(raw, axis=0)
        return cls(
            channels=tuple(channels),
            click_rate=click_rate,
            mean=tuple(np.nan_to_num(mean).tolist()),
            deviation=tuple(np.where(deviation > 1e-6, deviation, 1.0).tolist()),
            numeric=tuple(numeric),
            moments=moments,
            gaps=gaps,
        )

    @property
    def columns(self) -> list[str]:
        """Names of the columns that `transform` reads."""
        return [*needed_columns(), *map(column_of, self.numeric)]

    @property
    def names(self) -> list[str]:
        """Feature names, in the order of the columns of `transform`."""
        return [
            "floor_logit",
            *(f"{e}_{k}" for e in ENTITIES for k in ("rate_logit", "log_impressions", "log_age")),
            *(f"log_length_{channel}" for channel in self.channels),
            *(f"log_{column_of(reference)}" for reference in self.numeric),
            *(f"has_{column_of(reference)}" for reference in self.gaps),
        ]

    def floor(self, columns: Columns) -> Float:
        """The floor's logits [N]: user log-odds plus item log-odds minus the log's own."""
        return _floor(columns, self.click_rate)

    def transform(
        self,
        columns: Columns,
        lengths_NC: npt.NDArray[np.int64],
        now_us: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Standardised features [N, F]; unknown values are 0, the training mean."""
        raw = _raw(columns, lengths_NC, now_us, self.click_rate, self.numeric, self.moments, self.gaps)
        scaled = (raw - np.array(self.mean)) / np.array(self.deviation)
        features: npt.NDArray[np.float32] = np.clip(np.nan_to_num(scaled), -LARGEST, LARGEST).astype(
            np.float32
        )
        return features


def _rate(columns: Columns, entity: str, click_rate: float) -> Float:
    rate = np.asarray(columns[f"{entity}_click_rate"], dtype=np.float64)
    return np.where(np.isnan(rate), click_rate, rate)


def _floor(columns: Columns, click_rate: float) -> Float:
    parts = [logit(_rate(columns, entity, click_rate)) for entity in ENTITIES]
    total: Float = np.sum(parts, axis=0) - logit(np.array(click_rate))
    return total


def _raw(
    columns: Columns,
    lengths_NC: npt.NDArray[np.int64],
    now_us: npt.NDArray[np.int64],
    click_rate: float,
    numeric: Sequence[str],
    moments: Sequence[str],
    gaps: Sequence[str],
) -> Float:
    features = [_floor(columns, click_rate)]
    for entity in ENTITIES:
        features.append(logit(_rate(columns, entity, click_rate)))
        features.append(np.log1p(np.nan_to_num(columns[f"{entity}_impressions"])))
        features.append(_log_age(columns[f"{entity}_last_impression_us"], now_us))
    features.extend(np.log1p(lengths_NC).T)
    for reference in numeric:  # prices and counts alike span orders of magnitude; unknown stays NaN
        values = np.asarray(columns[column_of(reference)], dtype=np.float64)
        if reference in moments:
            features.append(_log_age(values, now_us))
        else:
            features.append(np.sign(values) * np.log1p(np.abs(values)))
    for reference in gaps:
        values = np.asarray(columns[column_of(reference)], dtype=np.float64)
        features.append((~np.isnan(values)).astype(np.float64))
    return np.stack(features, axis=1)


def _is_moment(column: str, columns: Columns) -> bool:
    """By its name, unless its values say that it only looks so, as a count of the channel `contact_us`."""
    values = np.asarray(columns[column], dtype=np.float64)
    known = values[~np.isnan(values)]
    return column.endswith(MOMENT) and bool((known >= EARLIEST_MOMENT).all())


def _log_age(moment_us: Float, now_us: npt.NDArray[np.int64]) -> Float:
    """Of the seconds since; NaN where there is no moment. Clocks may run back a little."""
    age: Float = np.log1p(np.maximum((now_us - moment_us) / 1e6, 0.0))
    return age
