"""Recalibration of click logits on the newest labelled impressions (Platt 1999, "Probabilistic outputs for
support vector machines").

A network that was trained on the past is too sure of itself about the future: what clicks depend on has
moved on, and what it learned of single users and items is partly noise. Two numbers that it was not trained
on set that right; the order of what it predicts stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST = 1_000
"""Impressions below which nothing is fitted: two numbers from fewer would be noise themselves."""
LEAST_OF_EACH = 50
"""Clicks, and others, that they must have."""


@dataclass(frozen=True)
class Calibration:
    """Logits times `slope`, plus `offset`."""

    slope: float = 1.0
    offset: float = 0.0

    def apply(self, logit_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Calibrated logits [N]."""
        return self.slope * logit_N + self.offset


AS_IT_IS = Calibration()


def fit_calibration(clicked_N: npt.ArrayLike, logit_N: npt.ArrayLike) -> Calibration:
    """The calibration under which these clicks are likeliest; none where they are too few to tell, or where
    the logits rank them the wrong way round."""
    from sklearn.linear_model import LogisticRegression

    clicked, logit = np.asarray(clicked_N), np.asarray(logit_N, dtype=np.float64)
    clicks = int(clicked.sum())
    if len(clicked) < LEAST or min(clicks, len(clicked) - clicks) < LEAST_OF_EACH:
        return AS_IT_IS
    fitted = LogisticRegression(C=np.inf).fit(logit[:, None], clicked)
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return Calibration(slope, offset) if slope > 0 else AS_IT_IS
