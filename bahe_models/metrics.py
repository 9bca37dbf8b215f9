"""Ranking quality of click predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def auc(clicked: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the ROC curve; ties count half. NaN when only one class is present."""
    from sklearn.metrics import roc_auc_score

    labels = np.asarray(clicked)
    if labels.min() == labels.max():
        return float("nan")
    return float(roc_auc_score(labels, np.asarray(score)))


def gauc(clicked: npt.ArrayLike, score: npt.ArrayLike, user: npt.NDArray[Any]) -> float:
    """AUC within each user, averaged with the user's impressions as weight (Zhou et al. 2018, DIN).

    Users with one class only say nothing about ranking and are left out. NaN when none is left.
    """
    labels, scores = np.asarray(clicked), np.asarray(score)
    _, group = np.unique(user, return_inverse=True)
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    values = [
        (auc(labels[rows], scores[rows]), len(rows))
        for rows in groups
        if 0 < labels[rows].sum() < len(rows)
    ]
    if not values:
        return float("nan")
    return float(np.average([value for value, _ in values], weights=[weight for _, weight in values]))
