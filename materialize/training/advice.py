"""What to do about a trained model that is not worth what it costs, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bahe_models import TrainingConfig
from bahe_models.trainer.importance import DEEP, Importance
from bahe_models.trainer.training_loop import Epoch

WORTH = 0.001
"""AUC below which deep layers are not worth their cost, which is most of a training's."""


def advice(
    results: Sequence[Mapping[str, Any]],
    history: Sequence[Epoch],
    importance: Sequence[Importance],
    config: TrainingConfig,
) -> list[str]:
    """All by the validation split, on which such choices are made; empty where there is nothing to say.

    `results` are the rows of the results table, `history` is that of BAHE.
    """
    said = []
    floor = next(row for row in results if row["model"] == "floor" and row["split"] == "validation")
    gain, low = floor["bahe_gain"], floor["bahe_gain_low"]
    if gain <= 0 or low is None or low <= 0:
        said.append(
            f"BAHE's validation AUC is not above the floor's beyond chance ({gain:+.4f}): the two click"
            " rates alone do as well; it takes more impressions, longer histories or features of your own"
            " (`features` in dataset.yaml)."
        )
    deep = next((one for one in importance if one.name == DEEP), None)
    if deep is not None and deep.auc_lost < WORTH:
        said.append(
            f"what the deep layers say of a user is worth {deep.auc_lost:.4f} of validation AUC, less than"
            f" {WORTH}: try `model: {{deep: false}}`, which trains and serves without them at a"
            " fraction of the cost."
        )
    best = max(history, key=lambda row: row.validation_auc)
    if len(history) == config.epochs and best.epoch == config.epochs:
        said.append(
            f"the last of the {config.epochs} allowed epochs was the best on validation: raise"
            " training.epochs."
        )
    return said
