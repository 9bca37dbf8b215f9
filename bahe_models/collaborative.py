"""The collaborative part of user and item vectors: what users of a behavior click on, whatever its text.

Behaviors and items have ID embeddings. A user's part is the running sum of the behaviors' embeddings;
its inner product with the item's is item-based collaborative filtering with learned factors (FISM:
Kabbur, Ning and Karypis, KDD 2013). The sum is causal and does not see the candidate, so it is stored
with the rest of the vector. Behaviors and items that training has not seen add nothing.

Shape letters: P positions, A atoms, N impressions, C width of this part.
"""

from __future__ import annotations

import torch
from torch import nn

_SPREAD = 0.02
"""Standard deviation of fresh embeddings: small, since each is learned from few impressions."""


class Collaborative(nn.Module):
    """ID embeddings of behaviors and items; row 0 of each stands for all unknown ids."""

    def __init__(self, behaviors: int, items: int, width: int) -> None:
        super().__init__()
        self.atom_ids_B: torch.Tensor
        # Saved with the weights, so that an artifact knows which atom a row belongs to.
        self.register_buffer("atom_ids_B", torch.zeros(behaviors, dtype=torch.int64))
        self.behavior = nn.Embedding(behaviors + 1, width, padding_idx=0)
        self.item = nn.Embedding(items + 1, width, padding_idx=0)
        for table in (self.behavior, self.item):
            nn.init.normal_(table.weight, std=_SPREAD)
            with torch.no_grad():
                table.weight[0] = 0

    @property
    def width(self) -> int:
        """Width of this part of the vectors."""
        return self.item.embedding_dim

    def rows(self, atom_ids_A: torch.Tensor) -> torch.Tensor:
        """Row of each atom id's embedding [A]; 0 for ids unseen in training."""
        ids_B = self.atom_ids_B.to(atom_ids_A.device)
        if not len(ids_B):
            return torch.zeros_like(atom_ids_A)
        place_A = torch.searchsorted(ids_B, atom_ids_A).clamp_max(len(ids_B) - 1)
        return torch.where(ids_B[place_A] == atom_ids_A, place_A + 1, 0)

    def forward(self, row_P: torch.Tensor) -> torch.Tensor:
        """What each behavior of these rows adds [P, C]; row 0 adds nothing."""
        added_PC: torch.Tensor = self.behavior(row_P)
        return added_PC
