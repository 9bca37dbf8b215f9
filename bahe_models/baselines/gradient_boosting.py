"""Gradient boosting on the features that BAHE reads: what a data scientist would try in an afternoon.

Beside the dense features and the categories it is offered likeness of texts: the cosine of the candidate's
vector and the mean of the user's, by channel, and the first components of both. What pays is told by the
validation split.

Shape letters: N impressions, C channels, A atoms, D their width, K components, F columns, R rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from bahe_models.features import DenseFeatures
from bahe_models.metrics import auc
from bahe_models.timelines import Int64, Timelines
from bahe_models.trainer.ctr_training import Scores, seen_atoms
from bahe_models.trainer.impressions import Impressions, TrainingData

CATEGORIES = 250
"""Rarer values of a category are left out: the histograms have no more bins."""
ROUNDS = 400
COMPONENTS = 8
LEAVES = (15, 31)
SETTINGS = len(LEAVES) * 2
"""Fits that `train_gradient_boosting` chooses from."""

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Best:
    validation_auc: float
    model: Any
    rounds: int
    with_texts: bool


def train_gradient_boosting(
    data: TrainingData,
    dense: DenseFeatures,
    *,
    seed: int = 0,
    on_fit: Callable[[float], None] = lambda validation_auc: None,
) -> Callable[[Impressions], Scores]:
    """Fit scikit-learn's HistGradientBoostingClassifier; returns its scoring function.

    Trees of `LEAVES` leaves, with likeness of texts and without, up to `ROUNDS` rounds: the validation
    split chooses. `on_fit` is told the best validation AUC of each of the `SETTINGS` fits.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    texts = _Texts(data)
    train, validation = data.splits["train"], data.splits["validation"]
    tables = [(_facts(data, dense, part), texts.columns(part)) for part in (train, validation)]
    best: _Best | None = None
    for with_texts, leaves in product((False, True), LEAVES):
        train_NF, validation_NF = (np.hstack(parts) if with_texts else parts[0] for parts in tables)
        model = HistGradientBoostingClassifier(
            max_iter=ROUNDS,
            learning_rate=0.05,
            max_leaf_nodes=leaves,
            early_stopping=False,
            random_state=seed,
        ).fit(train_NF, train.clicked_N)
        aucs_R = [
            auc(validation.clicked_N, logit_N) for logit_N in model.staged_decision_function(validation_NF)
        ]
        rounds = int(np.argmax(aucs_R)) + 1
        on_fit(max(aucs_R))
        if best is None or aucs_R[rounds - 1] > best.validation_auc:
            best = _Best(aucs_R[rounds - 1], model, rounds, with_texts)
    assert best is not None
    chosen = best

    def score(part: Impressions) -> Scores:
        table_NF = _facts(data, dense, part)
        if chosen.with_texts:
            table_NF = np.hstack([table_NF, texts.columns(part)])
        stages = chosen.model.staged_decision_function(table_NF)
        logit_N = next(logit for number, logit in enumerate(stages, 1) if number == chosen.rounds)
        return np.asarray(logit_N, dtype=np.float64).ravel()

    return score


def _facts(data: TrainingData, dense: DenseFeatures, part: Impressions) -> Matrix:
    """Dense features, and places of the categories among the `CATEGORIES` most frequent ones of training,
    NaN for others [N, F].

    As numbers: told that they are categories, the trees rank worse on Complete Journey.
    """
    columns: list[npt.NDArray[Any]] = list(dense.transform(part.columns, part.length_NC, part.time_us_N).T)
    train = data.splits["train"]
    if train.context_NX is not None and part.context_NX is not None:
        for trained_N, hash_N in zip(train.context_NX.T, part.context_NX.T, strict=True):
            known, count = np.unique(trained_N, return_counts=True)
            kept = np.sort(known[np.argsort(-count, kind="stable")[:CATEGORIES]])
            place_N = np.minimum(np.searchsorted(kept, hash_N), len(kept) - 1)
            columns.append(np.where(kept[place_N] == hash_N, place_N, np.nan))
    return np.column_stack(columns).astype(np.float32)


class _Texts:
    """Likeness of the candidate's text to the user's, and what both are about."""

    def __init__(self, data: TrainingData) -> None:
        from sklearn.decomposition import PCA

        known_AD = data.atoms_AD[seen_atoms(data)]
        # Language models have a few huge coordinates, which would decide every cosine.
        self._mean, self._deviation = known_AD.mean(axis=0), known_AD.std(axis=0) + 1e-6
        self._atoms_AD = (data.atoms_AD - self._mean) / self._deviation
        width = min(COMPONENTS, *known_AD.shape)
        pca = PCA(width, svd_solver="randomized", random_state=0)
        pca.fit((known_AD - self._mean) / self._deviation)
        self._components_KD: Matrix = pca.components_.astype(np.float32)
        self._components_AK = self._atoms_AD @ self._components_KD.T
        self._timelines, self._item_atom_I = data.timelines, data.item_atom_I

    def columns(self, part: Impressions) -> Matrix:
        """Cosines by channel, components of the user's mean vector and of the candidate's [N, C + 2 K].

        NaN where the user has done nothing yet.
        """
        candidate_N = self._item_atom_I[part.item_N]
        channels, width = len(self._timelines.channels), len(self._components_KD)
        cosine_NC = np.full((len(part), channels), np.nan, dtype=np.float32)
        sum_NK = np.zeros((len(part), width), dtype=np.float32)
        for rows in _by_user(part.user_N):
            for channel in range(channels):
                length_R = part.length_NC[rows, channel]
                some = np.flatnonzero(length_R)
                if not len(some):
                    continue
                history_LD = self._history(part.user_N[rows[0]], channel, int(length_R.max()))
                sum_RD = history_LD.cumsum(axis=0)[length_R[some] - 1]
                candidate_RD = self._atoms_AD[candidate_N[rows[some]]]
                likeness = (sum_RD * candidate_RD).sum(axis=1)
                norms = np.linalg.norm(sum_RD, axis=1) * np.linalg.norm(candidate_RD, axis=1)
                cosine_NC[rows[some], channel] = likeness / np.maximum(norms, 1e-6)
                sum_NK[rows[some]] += sum_RD @ self._components_KD.T
        behaviors_N = part.length_NC.sum(axis=1)[:, None]
        mean_NK = np.where(behaviors_N > 0, sum_NK / np.maximum(behaviors_N, 1), np.nan)
        return np.hstack([cosine_NC, mean_NK, self._components_AK[candidate_N]]).astype(np.float32)

    def _history(self, user: int, channel: int, length: int) -> Matrix:
        timelines: Timelines = self._timelines
        begin = timelines.offsets[channel][user]
        history_LD: Matrix = self._atoms_AD[timelines.atoms[channel][begin : begin + length]]
        return history_LD


def _by_user(user_N: Int64) -> list[Int64]:
    """The rows of each user."""
    order = np.argsort(user_N, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(user_N[order])) + 1)
