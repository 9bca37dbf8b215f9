"""Pre-training of the deep layers on timelines alone: predict the next behavior.

Logs of behaviors are much larger than logs of impressions, and need no clicks. The state at position
k scores the step's atoms as candidates for behavior k + 1: sampled softmax with in-batch negatives,
corrected for how often each occurs in the step (Yi et al., RecSys 2019).

Shape letters: P positions, those predicted among them, M distinct atoms of a step, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from bahe_models.config import TrainingConfig, WindowConfig
from bahe_models.model import BaheModel
from bahe_models.packing import Packing
from bahe_models.timelines import plan_steps, window_batch
from bahe_models.trainer.impressions import TrainingData

TEMPERATURE = 0.1
SPACE = 64
"""Width of the space in which states and atoms are compared."""
POSITIONS_PER_STEP = 2000
HEAD_RATE = 10.0
"""The projections learn this many times faster than the deep layers, which are already trained."""


class NextAtom(nn.Module):
    """Scores candidate atoms as the next behavior; discarded after pre-training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = nn.Linear(width, SPACE)
        self.atom = nn.Linear(width, SPACE)

    def forward(self, states_PD: torch.Tensor, atoms_MD: torch.Tensor) -> torch.Tensor:
        """Logits [P, M]: cosine of the projections, over a temperature."""
        states = nn.functional.normalize(self.state(states_PD), dim=1)
        atoms = nn.functional.normalize(self.atom(atoms_MD), dim=1)
        return states @ atoms.T / TEMPERATURE


def pretrain(
    model: BaheModel,
    data: TrainingData,
    window: WindowConfig,
    config: TrainingConfig,
    *,
    bfloat16: bool,
    on_step: Callable[[int, float], None] = lambda behaviors, loss: None,
) -> list[float]:
    """Train the model's deep layers in place on the training part of the timelines.

    Takes `pretraining_epochs` passes over them; of a timeline longer than a window it reads the last
    window. Returns the mean loss of each pass; `on_step` gets each step's number of predicted behaviors
    and the pass's mean loss so far. Deterministic given `config.seed` and torch's generator.
    """
    device = model.user_projection.weight.device
    atoms_AD = torch.from_numpy(data.atoms_AD).to(device)
    lengths_UC = data.known_lengths()
    users = np.flatnonzero(lengths_UC.sum(axis=1))
    lengths_UC = lengths_UC[users]
    head = NextAtom(atoms_AD.shape[1]).to(device)
    trained = [*model.behaviors.parameters(), *model.aggregator.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": trained, "lr": config.deep_learning_rate},
            {"params": list(head.parameters()), "lr": HEAD_RATE * config.deep_learning_rate},
        ]
    )
    rng = np.random.default_rng(config.seed)
    merged = model.config.merged
    per_user = max(1.0, float(lengths_UC.sum(axis=1).mean()))
    model.train()
    losses: list[float] = []
    for _ in range(config.pretraining_epochs):
        total, count = 0.0, 0
        for rows in plan_steps(
            users,
            lengths_UC,
            impressions_per_step=max(1, round(POSITIONS_PER_STEP / per_user)),
            rng=rng,
            merged=merged,
        ):
            batch = window_batch(data.timelines, users[rows], lengths_UC[rows], window, merged=merged)
            rows_P, channel_P, gap_P = (
                torch.from_numpy(part).to(device) for part in (batch.atoms_P, batch.channel_P, batch.gap_P)
            )
            # A behavior is predicted from the state before it, which is one row up; -1 begins a window.
            predicted = torch.nonzero(rows_P >= 0).squeeze(1)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                inputs_PD = model.behaviors(atoms_AD[rows_P.clamp_min(0)], channel_P, gap_P)
                states_PD = model.aggregator(inputs_PD, Packing.of(batch.length_W, device))
                distinct_M, target_P, count_M = torch.unique(
                    rows_P[predicted], return_inverse=True, return_counts=True
                )
                standard_MD = model.profile.standard_behaviors(atoms_AD[distinct_M])
                logits_PM = head(states_PD[predicted - 1], standard_MD).float()
            # Frequent atoms are often negatives; uncorrected, they would be pushed away.
            logits_PM = logits_PM - (count_M / count_M.sum()).log()
            loss = nn.functional.cross_entropy(logits_PM, target_P)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([*trained, *head.parameters()], config.gradient_norm)
            optimizer.step()
            total += loss.item() * len(target_P)
            count += len(target_P)
            on_step(len(target_P), total / count)
        losses.append(total / max(count, 1))
    return losses
