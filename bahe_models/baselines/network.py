"""What the baseline networks share: their settings, and training on shuffled impressions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bahe_models.config import TrainingConfig
from bahe_models.metrics import auc
from bahe_models.timelines import Int64
from bahe_models.trainer.ctr_training import Scores
from bahe_models.trainer.impressions import Impressions, TrainingData
from bahe_models.trainer.training_loop import Epoch, Task, Trained, fit, shuffled


def own_settings(config: TrainingConfig, *, epochs: int, impressions_per_step: int) -> TrainingConfig:
    """BAHE's learning rate, weight decay and seed, with steps and patience that suit a small network."""
    return TrainingConfig(
        epochs=epochs,
        patience=2,
        impressions_per_step=impressions_per_step,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )


def fit_shuffled(
    model: nn.Module,
    data: TrainingData,
    config: TrainingConfig,
    *,
    logits: Callable[[Int64], torch.Tensor],
    score: Callable[[Impressions], Scores],
    on_epoch: Callable[[Epoch], None],
) -> Trained:
    """Train in place on `logits` of training rows, stopped early by `score` on the validation split."""
    train, validation = data.splits["train"], data.splits["validation"]
    task = Task(
        model=model,
        groups=[(list(model.parameters()), config.learning_rate)],
        plan=shuffled(len(train), config.impressions_per_step),
        logits=logits,
        user_N=train.user_N,
        clicked_N=torch.from_numpy(train.clicked_N),
        validate=lambda: auc(validation.clicked_N, score(validation)),
    )
    return fit(task, config, on_epoch=on_epoch)
