"""What a person is told of a trained model, and when nothing."""

from __future__ import annotations

from typing import Any

import pytest

from bahe_models import Epoch, TrainingConfig
from bahe_models.trainer.importance import DEEP, HISTORY, Importance
from materialize.training.advice import advice

RISING = [Epoch(1, 0.6, 0.70, 1.0), Epoch(2, 0.5, 0.72, 1.0)]
FALLING = [Epoch(1, 0.6, 0.72, 1.0), Epoch(2, 0.5, 0.70, 1.0)]


def results(gain: float, low: float | None) -> list[dict[str, Any]]:
    return [
        {"model": model, "split": split, "bahe_gain": sign * gain, "bahe_gain_low": low and sign * low}
        for model, split, sign in [("floor", "test", -1), ("floor", "validation", 1), ("bahe", "test", 1)]
    ]


def worth(name: str, auc_lost: float) -> Importance:
    return Importance(name=name, features=1, auc_lost=auc_lost, alone=None, missing=0.0, warning=None)


def test_a_good_model_gets_none() -> None:
    found = [worth(HISTORY, 0.0001), worth(DEEP, 0.01)]
    assert advice(results(0.02, 0.01), FALLING, found, TrainingConfig(epochs=2)) == []
    assert advice(results(0.02, 0.01), RISING, [], TrainingConfig(epochs=4)) == []


@pytest.mark.parametrize(("gain", "low"), [(-0.01, -0.02), (0.01, -0.001), (0.01, None)])
def test_one_that_is_not_above_the_floor(gain: float, low: float | None) -> None:
    (said,) = advice(results(gain, low), FALLING, [], TrainingConfig(epochs=2))
    assert f"not above the floor's beyond chance ({gain:+.4f})" in said
    assert "`features` in dataset.yaml" in said


def test_deep_layers_that_bring_nothing() -> None:
    (said,) = advice(results(0.02, 0.01), FALLING, [worth(DEEP, 0.0004)], TrainingConfig(epochs=2))
    assert "worth 0.0004 of validation AUC" in said
    assert "`model: {deep: false}`" in said


def test_the_last_epoch_that_was_the_best() -> None:
    (said,) = advice(results(0.02, 0.01), RISING, [], TrainingConfig(epochs=2))
    assert "the last of the 2 allowed epochs" in said
