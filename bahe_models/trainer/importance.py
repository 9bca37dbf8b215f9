"""What each feature is worth to a trained model: how much AUC is lost when its values are shuffled.

Permutation importance (Breiman 2001, "Random forests", section 10). Shape letters as in `Batches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from bahe_models.features import column_of, needed_columns
from bahe_models.metrics import auc
from bahe_models.timelines import Int64
from bahe_models.trainer.ctr_training import Batches
from bahe_models.trainer.impressions import Impressions

ROWS = 20_000
"""Impressions that importance is measured on, at most."""
REPEATS = 3
TOO_GOOD = 0.95
"""A feature that alone ranks clicks so well has most likely seen them."""
HISTORY, ITEM = "user history", "item text and ID"
DEEP = "user history, deep part"
"""What the deep layers say of a user, apart from the sums; of a model that has such layers."""
REQUEST = "impressions.context"


@dataclass(frozen=True, kw_only=True)
class Importance:
    """One feature, or one view of them."""

    name: str
    """`view:feature`, a view, or a part of the model."""
    features: int
    """How many features are shuffled together."""
    auc_lost: float
    """Mean over REPEATS shuffles; about 0 where the model does without."""
    alone: float | None
    """AUC of the raw values alone, whichever way round; None of categories, vectors and several
    features."""
    missing: float
    """Share of rows without a value."""
    warning: str | None
    """What is suspicious about it."""


def permutation_importance(
    batches: Batches, split: Impressions, categorical: Sequence[str] = (), *, seed: int = 0
) -> list[Importance]:
    """Importance of every feature, then of every view with several, each the most important first.

    `categorical` are the references (`view:feature`) behind the last context columns; those before are the
    request's. Vectors are computed once, on at most ROWS impressions.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(split))[:ROWS])
    split = split.take(rows)
    parts = _Parts(batches, split)
    columns = _columns(batches, categorical)
    whole = auc(split.clicked_N, parts.scores(split))

    def lost(names: Sequence[str]) -> float:
        shuffled = [parts.scores(*parts.shuffled(split, names, columns, rng)) for _ in range(REPEATS)]
        return whole - float(np.mean([auc(split.clicked_N, scores) for scores in shuffled]))

    of_model = [HISTORY, ITEM] if batches.model.aggregator.deep is None else [HISTORY, DEEP, ITEM]
    single = [_single(name, columns, split, lost([name])) for name in [*columns, *of_model]]
    views: dict[str, list[str]] = {}
    for name in columns:
        views.setdefault(name.partition(":")[0], []).append(name)
    together = [
        Importance(
            name=view,
            features=len(names),
            auc_lost=lost(names),
            alone=None,
            missing=float(np.mean([one.missing for one in single if one.name in names])),
            warning=None,
        )
        for view, names in views.items()
        if len(names) > 1
    ]
    return [
        *sorted(single, key=lambda one: -one.auc_lost),
        *sorted(together, key=lambda one: -one.auc_lost),
    ]


class _Parts:
    """What the head reads of some impressions, the vectors computed once."""

    def __init__(self, batches: Batches, split: Impressions) -> None:
        self._batches = batches
        found: list[tuple[Int64, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        batches.model.eval()
        with torch.no_grad():
            for rows in batches.plan(split):
                found.append((rows, *batches.pair_vectors(split, rows)))
        order = np.argsort(np.concatenate([rows for rows, *_ in found]))
        place = torch.from_numpy(order).to(batches.device)
        self.user_NV = torch.cat([user for _, user, _, _ in found])[place]
        self.item_NV = torch.cat([item for _, _, item, _ in found])[place]
        interests = [interest for *_, interest in found if interest is not None]
        self.interest_NT = torch.cat(interests)[place] if interests else None

    def scores(
        self,
        split: Impressions,
        users: Int64 | None = None,
        items: Int64 | None = None,
        deep: Int64 | None = None,
    ) -> npt.NDArray[np.float64]:
        """Logits [N], with the vectors (of `deep` the deep part of users') of other rows where given."""
        batches, device = self._batches, self._batches.device
        every = np.arange(len(split))
        of_user = torch.from_numpy(every if users is None else users).to(device)
        of_item = torch.from_numpy(every if items is None else items).to(device)
        context = split.context_NX
        user_NV = self.user_NV[of_user]
        if deep is not None:
            width = batches.model.config.deep_width
            user_NV[:, :width] = self.user_NV[torch.from_numpy(deep).to(device), :width]
        with torch.no_grad():
            logits = batches.model.score(
                user_NV,
                self.item_NV[of_item],
                batches.dense_features(split),
                None if context is None else torch.from_numpy(context).to(device),
                None if self.interest_NT is None else self.interest_NT[of_user],
                batches.given_vectors(split, every),
            )
        return np.asarray(logits.double().cpu().numpy())

    def shuffled(
        self,
        split: Impressions,
        names: Sequence[str],
        columns: Mapping[str, str | int],
        rng: np.random.Generator,
    ) -> tuple[Impressions, Int64 | None, Int64 | None, Int64 | None]:
        """The arguments of `scores` with these features of other rows, the same rows for all of them."""
        order = rng.permutation(len(split))
        users = order if HISTORY in names else None
        items = order if ITEM in names else None
        deep = order if DEEP in names else None
        channels = self._batches.dense.channels
        values, lengths = dict(split.columns), split.length_NC.copy()
        vectors = dict(split.vectors)
        context = None if split.context_NX is None else split.context_NX.copy()
        for name in names:
            where = columns.get(name)
            if isinstance(where, int):
                assert context is not None
                context[:, where] = context[order, where]
            elif where is not None and where in split.vectors:
                vectors[where] = vectors[where][order]
            elif where is not None and where in split.columns:
                values[where] = values[where][order]
            elif where is not None:
                channel = channels.index(where)
                lengths[:, channel] = lengths[order, channel]
        shuffled = replace(split, columns=values, length_NC=lengths, context_NX=context, vectors=vectors)
        return shuffled, users, items, deep


def _columns(batches: Batches, categorical: Sequence[str]) -> dict[str, str | int]:
    """Every feature as `view:feature`: its column, its vector, its channel, or its place in the context."""
    found: dict[str, str | int] = {}
    for column in needed_columns():
        found[f"{column.partition('_')[0]}_stats:{column}"] = column
    found |= {f"user_timeline:length_{channel}": channel for channel in batches.dense.channels}
    found |= {reference: column_of(reference) for reference in batches.dense.numeric}
    found |= {reference: reference for reference in batches.data.vectors}
    references = {column_of(reference): reference for reference in categorical}
    for place, column in enumerate(batches.data.context):
        found[references.get(column, f"{REQUEST}:{column}")] = place
    return found


def _single(name: str, columns: Mapping[str, str | int], split: Impressions, auc_lost: float) -> Importance:
    where = columns.get(name)
    alone, missing, warning = None, 0.0, None
    if isinstance(where, int):
        assert split.context_NX is not None
        values = split.context_NX[:, where]
        missing = float((values == 0).mean())
        warning = "is constant" if len(np.unique(values)) == 1 else None
    elif where is not None and where in split.vectors:
        known_N = np.isfinite(split.vectors[where]).all(axis=1)
        missing = float(1 - known_N.mean())
        known_MD = split.vectors[where][known_N]
        if missing == 1:
            warning = "has no value at all"
        elif missing == 0 and (known_MD == known_MD[0]).all():
            warning = "is constant"
    elif where is not None and where in split.columns:
        numbers = split.columns[where]
        missing = float(np.isnan(numbers).mean())
        known = np.nan_to_num(numbers, nan=float(np.nanmean(numbers)) if missing < 1 else 0.0)
        alone = auc(split.clicked_N, known)
        alone = max(alone, 1 - alone)
        if missing == 1:
            warning = "has no value at all"
        elif len(np.unique(known)) == 1 and missing == 0:  # else whether there is one tells something
            warning = "is constant"
        elif alone >= TOO_GOOD:
            warning = f"ranks clicks alone with AUC {alone:.3f}: does it know them?"
    return Importance(
        name=name, features=1, auc_lost=auc_lost, alone=alone, missing=missing, warning=warning
    )
