"""Model quality on one split: metrics with confidence intervals, paired differences and segments.

Intervals come from a cluster bootstrap over users: impressions of one user depend on each other, so
whole users are drawn with replacement (Field and Welsh 2007). Resampling single impressions would
promise more certainty than there is. Shape letters: N impressions, U users, R replicates, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bahe_models.metrics import (
    Float,
    Reliability,
    auc,
    expected_calibration_error,
    gauc,
    log_loss,
    probability,
    reliability,
    user_aucs,
)
from bahe_models.trainer.impressions import Impressions

REPLICATES = 500
LEVEL = 0.95
REFERENCE = "bahe"
"""The model that the others are compared with."""
SEGMENTS = {"0 (cold)": 0, "1 to 9": 1, "10 to 49": 10, "50 and more": 50}
"""Segments by the length of the user's history before the impression, with their shortest length."""
_AT_ONCE = 16
"""Replicates computed together: enough to fill a cache line, few enough to bound memory."""


class Interval(NamedTuple):
    """A range at level `LEVEL`; NaN where it is undefined."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One model on one split; NaN where a metric is undefined."""

    auc: float
    auc_low: float
    auc_high: float
    gauc: float
    log_loss: float
    ece: float
    """Expected calibration error."""
    bahe_gain: float | None = None
    """AUC of BAHE minus this model's; None for BAHE itself."""
    bahe_gain_low: float | None = None
    bahe_gain_high: float | None = None

    def row(self) -> dict[str, float | None]:
        """The metrics for JSON, which has no NaN: None where undefined; no gain for BAHE itself."""
        is_bahe = self.bahe_gain is None
        return {
            name: None if value is None or np.isnan(value) else value
            for name, value in asdict(self).items()
            if not (is_bahe and name.startswith("bahe_gain"))
        }


@dataclass(frozen=True, kw_only=True)
class SegmentQuality:
    """One model on one segment of a split; NaN where the segment has only one class."""

    segment: str
    model: str
    impressions: int
    auc: float
    auc_low: float
    auc_high: float


@dataclass(frozen=True, kw_only=True)
class SplitEvaluation:
    """All models on one split."""

    quality: Mapping[str, Quality]
    """By model."""
    segments: list[SegmentQuality]
    """In the order of `SEGMENTS`, and within a segment of the models."""
    reliability: Mapping[str, Reliability]
    """By model."""


def evaluate(split: Impressions, logits: Mapping[str, Float]) -> SplitEvaluation:
    """Evaluate models by their click logits [N], in the split's order; one of them is `REFERENCE`.

    Deterministic. Models are compared on the same resamples, so the difficulty of a user cancels out of
    a difference.
    """
    clicked_N, user_N = split.clicked_N, split.user_N
    draws = resampled_aucs(clicked_N, logits, user_N)
    aucs = {model: auc(clicked_N, logit_N) for model, logit_N in logits.items()}
    quality = {}
    for model, logit_N in logits.items():
        low, high = interval(draws[model])
        gain = {}
        if model != REFERENCE:
            gain_low, gain_high = interval(draws[REFERENCE] - draws[model])
            gain = {
                "bahe_gain": aucs[REFERENCE] - aucs[model],
                "bahe_gain_low": gain_low,
                "bahe_gain_high": gain_high,
            }
        quality[model] = Quality(
            auc=aucs[model],
            auc_low=low,
            auc_high=high,
            gauc=gauc(clicked_N, logit_N, user_N),
            log_loss=log_loss(clicked_N, logit_N),
            ece=expected_calibration_error(clicked_N, probability(logit_N)),
            **gain,
        )
    return SplitEvaluation(
        quality=quality,
        segments=[
            row
            for segment, rows in history_segments(split.length_NC).items()
            for row in _segment(segment, split, rows, logits)
        ],
        reliability={m: reliability(clicked_N, probability(z)) for m, z in logits.items()},
    )


def history_segments(length_NC: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of each of `SEGMENTS`, by behaviors before the impression in all channels together."""
    shortest = np.array(list(SEGMENTS.values()))
    segment_N = np.searchsorted(shortest, length_NC.sum(axis=1), side="right") - 1
    return {name: np.flatnonzero(segment_N == index) for index, name in enumerate(SEGMENTS)}


def _segment(
    segment: str, split: Impressions, rows: npt.NDArray[np.int64], logits: Mapping[str, Float]
) -> Iterator[SegmentQuality]:
    clicked_N = split.clicked_N[rows]
    parts = {model: logit_N[rows] for model, logit_N in logits.items()}
    draws = resampled_aucs(clicked_N, parts, split.user_N[rows])
    for model, logit_N in parts.items():
        low, high = interval(draws[model])
        yield SegmentQuality(
            segment=segment,
            model=model,
            impressions=len(rows),
            auc=auc(clicked_N, logit_N),
            auc_low=low,
            auc_high=high,
        )


def interval(draws_R: Float) -> Interval:
    """Percentile interval of a bootstrap's replicates; undefined ones are left out."""
    defined = draws_R[~np.isnan(draws_R)]
    if len(defined) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def resampled_aucs(
    clicked: npt.ArrayLike,
    scores: Mapping[str, Float],
    user: npt.NDArray[Any],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Float]:
    """AUC [R] of each model on the same resamples of users; NaN where a resample has only one class.

    With fewer than two users all is NaN: one cluster does not show how much clusters differ.
    """
    labels = np.asarray(clicked)
    distinct, user_N = np.unique(user, return_inverse=True)
    if len(distinct) < 2 or len(np.unique(labels)) < 2:
        return {model: np.full(replicates, np.nan) for model in scores}
    aucs = {model: Ranking(labels, score_N, user_N).auc for model, score_N in scores.items()}
    return _on_resamples(aucs, len(distinct), replicates, seed)


def resampled_gaucs(
    clicked: npt.ArrayLike,
    scores: Mapping[str, Float],
    user: npt.NDArray[Any],
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Float]:
    """GAUC [R] of each model on the resamples of users that `resampled_aucs` draws, NaN likewise."""
    users = len(np.unique(user))
    if users < 2:
        return {model: np.full(replicates, np.nan) for model in scores}
    gaucs = {
        model: partial(_weighted_gauc, *user_aucs(clicked, score_N, user))
        for model, score_N in scores.items()
    }
    return _on_resamples(gaucs, users, replicates, seed)


def _weighted_gauc(auc_U: Float, size_U: npt.NDArray[np.int64], weight_UR: Float) -> Float:
    """GAUC [R] when each user has these weights; NaN where no user of both classes has any."""
    size_mixed_U = np.where(np.isnan(auc_U), 0, size_U)
    total_R = size_mixed_U @ weight_UR
    summed_R = (np.nan_to_num(auc_U) * size_mixed_U) @ weight_UR
    gauc_R: Float = np.divide(summed_R, total_R, out=np.full_like(summed_R, np.nan), where=total_R > 0)
    return gauc_R


def _on_resamples(
    metrics: Mapping[str, Callable[[Float], Float]], users: int, replicates: int, seed: int
) -> dict[str, Float]:
    """Each model's metric [R], from the users' weights [U, R], on the same resamples."""
    result = {model: np.full(replicates, np.nan) for model in metrics}
    begin = 0
    for weight_UR in resampled_users(users, replicates, seed=seed):
        end = begin + weight_UR.shape[1]
        for model, metric in metrics.items():
            result[model][begin:end] = metric(weight_UR)
        begin = end
    return result


def resampled_users(users: int, replicates: int, *, seed: int) -> Iterator[Float]:
    """How often each user is drawn, [U, R], a few replicates at a time."""
    rng = np.random.default_rng(seed)
    for begin in range(0, replicates, _AT_ONCE):
        count = min(_AT_ONCE, replicates - begin)
        drawn = rng.integers(users, size=(count, users)) + users * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * users).reshape(count, users)
        yield np.ascontiguousarray(times.T, dtype=np.float64)


class Ranking:
    """One model's scores, sorted once, so that its AUC under any weights is a cumulative sum.

    The weighted AUC is the share of click and no-click pairs, weighted by the product of their
    weights, in which the click has the higher score; ties count half (the Mann-Whitney statistic).
    """

    def __init__(self, clicked: npt.NDArray[Any], score_N: Float, group_N: npt.NDArray[np.int64]) -> None:
        order = np.argsort(score_N, kind="stable")
        clicks, others = order[clicked[order] == 1], order[clicked[order] == 0]
        self._click_group, self._other_group = group_N[clicks], group_N[others]
        self._below = np.searchsorted(score_N[others], score_N[clicks], side="left")
        self._not_above = np.searchsorted(score_N[others], score_N[clicks], side="right")
        self._tied = bool((self._below != self._not_above).any())

    def auc(self, weight_GR: Float) -> Float:
        """AUC [R] when each impression has the weight of its group; NaN where a class has no weight."""
        weight_below = np.zeros((len(self._other_group) + 1, weight_GR.shape[1]))
        np.cumsum(weight_GR[self._other_group], axis=0, out=weight_below[1:])
        won = weight_below[self._below]
        if self._tied:
            won = (won + weight_below[self._not_above]) / 2
        click_weight = weight_GR[self._click_group]
        pairs = click_weight.sum(axis=0) * weight_below[-1]
        wins = np.einsum("nr,nr->r", click_weight, won)
        auc_R: Float = np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)
        return auc_R
