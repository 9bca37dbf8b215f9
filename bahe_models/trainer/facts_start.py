"""The head's network on dense features, fitted to them before anything else is trained.

What a user did with an item, how often and how long ago, takes a network many passes to learn, and costs
next to nothing to read. Vectors and categories cost most of a step, and a network that reads them knows
its training rows by heart after two or three passes. So the first is learned to the end before the second
begins. Shape letters: N impressions, F dense features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

EPOCHS = 10
IMPRESSIONS_PER_STEP = (32, 500)
"""At least and at most; in between, a hundred steps an epoch: a small log would see too few steps else."""
LEARNING_RATE = 1e-3
WARM_UP = 0.1


def fit_to_facts(
    network: nn.Module,
    dense_NF: npt.NDArray[np.float32],
    clicked_N: npt.NDArray[np.float32],
    *,
    on_step: Callable[[int], object] = lambda impressions: None,
) -> None:
    """Train a network of click logits [N, 1] in place; its random numbers are torch's.

    `on_step` is called after each step with its number of impressions, EPOCHS * N in all.

    Always all epochs, down to a learning rate of 0, so that a refit, which has nothing to stop early by,
    does the same.
    """
    facts_NF, target_N = torch.from_numpy(dense_NF), torch.from_numpy(clicked_N)
    least, most = IMPRESSIONS_PER_STEP
    size = min(max(least, len(target_N) // 100), most)
    steps = EPOCHS * -(-len(target_N) // size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP
    )
    network.train()
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(target_N)), size):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.binary_cross_entropy_with_logits(
                network(facts_NF[rows]).squeeze(-1), target_N[rows]
            )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            on_step(len(rows))
    network.eval()
