"""Negative sampling and click weights, and the correction of predictions for them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bahe_models.timelines import Int64


def sampled_rows(
    clicked_N: npt.NDArray[np.float32], negative_rate: float, rng: np.random.Generator
) -> Int64:
    """Rows of one epoch, in order: all clicked ones and a share of the others."""
    if negative_rate == 1:  # draws nothing, so steps are planned as without sampling
        return np.arange(len(clicked_N))
    kept: Int64 = np.flatnonzero((clicked_N > 0) | (rng.random(len(clicked_N)) < negative_rate))
    return kept


def logit_shift(negative_rate: float, positive_weight: float) -> float:
    """What is added to a logit to correct it for sampling and weights.

    Keeping a share w of the unclicked impressions multiplies the learned odds by 1 / w; the correction
    q = p / (p + (1 - p) / w) of He et al. 2014, "Practical lessons from predicting clicks on ads at
    Facebook", section 6.3, is the shift log(w) of the logit. A weight on the clicks multiplies the odds
    in the same way.
    """
    return math.log(negative_rate) - math.log(positive_weight)
