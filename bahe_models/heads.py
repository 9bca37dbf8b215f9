"""CTR heads: click logits from a user vector, an item vector and dense facts.

Every head adds a linear part on the facts, which starts as the floor, or a network on the dense features
alone, which starts fitted to them: the rest learns what the statistics do not say. Shape letters: N
impressions, V vector width, F facts, D dense features (the first of the facts), E width of the extra
inputs, X input width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bahe_models.config import HeadName


class Cross(nn.Module):
    """One cross layer of DCN-V2 (Wang et al., WWW 2021, eq. 1): x0 * (W x + b) + x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, first_NX: torch.Tensor, x_NX: torch.Tensor) -> torch.Tensor:
        """The next layer's input [N, X]."""
        crossed: torch.Tensor = first_NX * self.linear(x_NX) + x_NX
        return crossed


def facts_network(dense: int, hidden: int, dropout: float) -> nn.Sequential:
    """Click logits [N, 1] from dense features [N, D]: two hidden layers."""
    return nn.Sequential(
        nn.Linear(dense, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, 1),
    )


@torch.no_grad()
def silence(network: nn.Sequential) -> None:
    """Let a network answer 0 until it has learned something."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    last.weight.zero_()
    last.bias.zero_()


class Head(nn.Module):
    """A DNN on user, item, their product and the facts (`dnn`), after cross layers with `dcn`.

    `extra` is the width of optional inputs: embedded context and, for `target` (otherwise a DNN), the
    result of target attention. `alone` is the width of a network on the first `dense` facts; 0 for none.
    """

    def __init__(
        self,
        name: HeadName,
        *,
        vector: int,
        facts: int,
        hidden: int,
        dropout: float,
        crosses: int,
        extra: int = 0,
        dense: int = 0,
        alone: int = 0,
    ) -> None:
        super().__init__()
        width = 3 * vector + facts + extra
        self.crosses = nn.ModuleList(Cross(width) for _ in range(crosses if name == "dcn" else 0))
        self.hidden = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )
        self.wide = nn.Linear(facts, 1)
        nn.init.zeros_(self.wide.weight)
        self.dense = dense
        self.alone = facts_network(dense, alone, dropout) if alone else None

    @torch.no_grad()
    def start_from(self, weights_F: torch.Tensor, bias: float) -> None:
        """Set the linear part, which then dominates the first predictions."""
        self.wide.weight[0] = weights_F
        self.wide.bias.fill_(bias)

    def forward(
        self,
        user_NV: torch.Tensor,
        item_NV: torch.Tensor,
        facts_NF: torch.Tensor,
        extra_NE: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Click logits [N]; the tensors of `extra_NE` together have the width of `extra`."""
        first_NX = torch.cat([user_NV, item_NV, user_NV * item_NV, facts_NF, *extra_NE], dim=1)
        x_NX = first_NX
        for cross in self.crosses:
            x_NX = cross(first_NX, x_NX)
        logits: torch.Tensor = self.hidden(x_NX) + self.wide(facts_NF)
        if self.alone is not None:
            logits = logits + self.alone(facts_NF[:, : self.dense])
        return logits.squeeze(-1)
