"""Pre-training of the aggregator on timelines alone: predict the next behavior.

Logs of behaviors are much larger than logs of impressions, and need no clicks. The state at position
k scores the atoms of the step as candidates for behavior k + 1 (sampled softmax with the step's own
atoms as negatives, corrected for how often each occurs: Yi et al., RecSys 2019).

Shape letters: W windows, L positions, P predicted positions, M distinct atoms of a step, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from bahe_models.data import TrainingData
from bahe_models.model import BaheModel
from bahe_models.timelines import Int64, WindowConfig, plan_steps, window_batch

TEMPERATURE = 0.1


class NextAtom(nn.Module):
    """Scores of candidate atoms as the next behavior; thrown away after pre-training."""

    def __init__(self, width: int, space: int = 64) -> None:
        super().__init__()
        self.state = nn.Linear(width, space)
        self.atom = nn.Linear(width, space)

    def forward(self, states_PD: torch.Tensor, atoms_MD: torch.Tensor) -> torch.Tensor:
        """Logits [P, M]: cosine of the projections, over a temperature."""
        states = nn.functional.normalize(self.state(states_PD), dim=1)
        atoms = nn.functional.normalize(self.atom(atoms_MD), dim=1)
        return states @ atoms.T / TEMPERATURE


def known_lengths(data: TrainingData) -> tuple[Int64, Int64]:
    """Users of the training split, and how much of their timelines it knows [users, C].

    What follows a user's last training impression belongs to validation or test and is not read.
    """
    train = data.splits["train"]
    lengths_UC = np.zeros_like(data.timelines.lengths())
    np.maximum.at(lengths_UC, train.user_N, train.length_NC)
    users = np.flatnonzero(lengths_UC.sum(axis=1))
    return users, lengths_UC[users]


def pretrain(
    model: BaheModel,
    data: TrainingData,
    window: WindowConfig,
    *,
    epochs: int,
    learning_rate: float,
    users_per_step: int = 16,
    seed: int = 0,
    bfloat16: bool = False,
    on_step: Callable[[int, float], None] = lambda users, loss: None,
) -> list[float]:
    """Train the model's deep layers in place on the training part of the timelines.

    Of a timeline longer than a window, its last window is read. Returns the mean loss of each epoch.
    """
    device = model.user_projection.weight.device
    atoms_AD = torch.from_numpy(data.atoms_AD).to(device)
    users, lengths_UC = known_lengths(data)
    head = NextAtom(atoms_AD.shape[1]).to(device)
    trained = [*model.aggregator.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.aggregator.parameters()), "lr": learning_rate},
            {"params": list(head.parameters()), "lr": 10 * learning_rate},
        ]
    )
    rng = np.random.default_rng(seed)
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        total, predicted = 0.0, 0
        for rows in plan_steps(users, lengths_UC, impressions_per_step=users_per_step, rng=rng):
            batch = window_batch(data.timelines, users[rows], lengths_UC[rows], window)
            states, targets = [], []
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                for block in batch.blocks:
                    rows_WL = torch.from_numpy(block.atoms_WL).to(device)
                    states_WLD = model.aggregator(atoms_AD[rows_WL.clamp_min(0)])
                    following_WL = rows_WL[:, 1:]
                    present_WL = following_WL >= 0
                    states.append(states_WLD[:, :-1][present_WL])
                    targets.append(following_WL[present_WL])
                distinct_M, target_P, count_M = torch.unique(
                    torch.cat(targets), return_inverse=True, return_counts=True
                )
                vectors_MD = _standard(model, atoms_AD[distinct_M])
                logits_PM = head(torch.cat(states), vectors_MD).float()
            # Atoms that occur often are negatives often; without this they would be pushed away.
            logits_PM = logits_PM - (count_M / count_M.sum()).log()
            loss = nn.functional.cross_entropy(logits_PM, target_P)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            total += loss.item() * len(target_P)
            predicted += len(target_P)
            on_step(len(rows), total / predicted)
        losses.append(total / predicted)
    return losses


def _standard(model: BaheModel, atoms_MD: torch.Tensor) -> torch.Tensor:
    profile = model.profile
    return (atoms_MD - profile.behavior_mean_D) / profile.behavior_deviation_D
