"""The floor: what point-in-time click rates alone predict."""

from __future__ import annotations

from bahe_models.features import DenseFeatures
from bahe_models.trainer.ctr_training import Scores
from bahe_models.trainer.impressions import Impressions


def floor_scores(dense: DenseFeatures, split: Impressions) -> Scores:
    """Logit of the item's click rate plus logit of the user's, both strictly point-in-time."""
    return dense.floor(split.columns)
