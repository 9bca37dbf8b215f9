"""Quality of click predictions: ranking (AUC, GAUC) and probabilities (log loss, calibration).

Shape letters: N impressions, U users, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

BINS = 15
"""Bins of a reliability curve, as in Guo et al. 2017."""


def auc(clicked: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the ROC curve; ties count half. NaN unless both classes are present."""
    from sklearn.metrics import roc_auc_score

    labels = np.asarray(clicked)
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, np.asarray(score)))


def gauc(clicked: npt.ArrayLike, score: npt.ArrayLike, user: npt.NDArray[Any]) -> float:
    """AUC within each user, averaged with the user's impressions as weight (Zhou et al. 2018, DIN).

    Users with one class only say nothing about ranking and are left out. NaN when none is left.
    """
    auc_U, size_U = user_aucs(clicked, score, user)
    mixed = ~np.isnan(auc_U)
    return float(np.average(auc_U[mixed], weights=size_U[mixed])) if mixed.any() else float("nan")


def user_aucs(
    clicked: npt.ArrayLike, score: npt.ArrayLike, user: npt.NDArray[Any]
) -> tuple[Float, npt.NDArray[np.int64]]:
    """AUC and impressions of each user [U], in the order of the users' ids; NaN with one class only."""
    labels, scores = np.asarray(clicked, dtype=np.float64), np.asarray(score)
    _, group = np.unique(user, return_inverse=True)
    order = np.lexsort((scores, group))
    labels, scores, group = labels[order], scores[order], group[order]
    first = np.searchsorted(group, group, side="left")
    # Ranks within a user from 1; those of equal scores are their mean.
    starts = np.flatnonzero(np.append(True, (np.diff(group) != 0) | (np.diff(scores) != 0)))
    runs = np.diff(np.append(starts, len(scores)))
    rank = np.repeat(starts + (runs + 1) / 2, runs) - first
    size, clicks = np.bincount(group), np.bincount(group, labels)
    pairs = clicks * (size - clicks)
    # The Mann-Whitney statistic of each user, all users at once.
    wins = np.bincount(group, rank * labels) - clicks * (clicks + 1) / 2
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0), size


def probability(logit: npt.ArrayLike) -> Float:
    """The click probability that a logit stands for (the sigmoid), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64)))


def log_loss(clicked: npt.ArrayLike, logit: npt.ArrayLike) -> float:
    """Mean negative log-likelihood of the clicks, in nats; NaN without impressions.

    Computed from logits, log(1 + exp(z)) - clicked * z, so that confident predictions lose no digits.
    """
    labels, logits = np.asarray(clicked, dtype=np.float64), np.asarray(logit, dtype=np.float64)
    if len(labels) == 0:
        return float("nan")
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability curve: predicted and observed click rates, in bins of rising probability."""

    predicted_B: Float
    """Mean predicted probability."""
    clicked_B: Float
    """Share of the impressions that were clicked."""
    count_B: npt.NDArray[np.int64]
    """Number of impressions."""


def reliability(clicked: npt.ArrayLike, predicted: npt.ArrayLike, bins: int = BINS) -> Reliability:
    """Bins of (nearly) equal count; equal predictions share a bin, so the order of rows has no effect.

    `predicted` holds probabilities. There are fewer bins than `bins` where ties would fill more than one.
    """
    labels, values = np.asarray(clicked, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    labels, values = labels[order], values[order]
    cuts = np.linspace(0, len(values), bins + 1)[:-1].astype(np.int64)
    # A cut within a run of equal predictions moves to the start of the run.
    starts = np.unique(np.searchsorted(values, values[cuts], side="left")) if len(values) else cuts[:0]
    count_B = np.diff(np.append(starts, len(values)))
    return Reliability(
        predicted_B=np.add.reduceat(values, starts) / count_B,
        clicked_B=np.add.reduceat(labels, starts) / count_B,
        count_B=count_B,
    )


def expected_calibration_error(clicked: npt.ArrayLike, predicted: npt.ArrayLike, bins: int = BINS) -> float:
    """Mean distance between predicted probability and click rate over bins, weighted by impressions.

    The expected calibration error (ECE) of Guo et al. 2017, with bins of equal count, because clicks
    crowd into a small range of probabilities. Chance alone makes it a little above 0. NaN without
    impressions.
    """
    curve = reliability(clicked, predicted, bins)
    if len(curve.count_B) == 0:
        return float("nan")
    return float(np.average(np.abs(curve.predicted_B - curve.clicked_B), weights=curve.count_B))
