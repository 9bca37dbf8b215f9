"""Target attention: the candidate item attends to the raw history (DIN: Zhou et al., KDD 2018).

The result depends on the pair, so it cannot be stored as a user vector can.

Shape letters: N impressions, C channels, H latest behaviors of a channel, B = C * H, M distinct atoms,
D backbone width, K profile width, X width of item vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from bahe_models.timelines import Int64, Timelines


def recent_behaviors(timelines: Timelines, user_N: Int64, length_NC: Int64, count: int) -> Int64:
    """Atom rows [N, C * count] of each channel's latest behaviors of a prefix; -1 as padding."""
    recent = np.full((len(user_N), len(timelines.channels), count), -1, dtype=np.int64)
    for channel, (offsets, atoms) in enumerate(zip(timelines.offsets, timelines.atoms, strict=True)):
        position_NH = length_NC[:, channel, None] - 1 - np.arange(count)
        present = position_NH >= 0
        source_NH = offsets[user_N][:, None] + position_NH
        recent[:, channel][present] = atoms[source_NH[present]]
    return recent.reshape(len(user_N), -1)


class TargetAttention(nn.Module):
    """The candidate's interest: behaviors weighted by an activation unit that reads the pair.

    The unit reads the behavior's channel and projected atom, the item's vector, and the product of the
    two in the profile's space, where a behavior and an item of similar text lie close.
    """

    def __init__(self, *, channels: int, profile_width: int, item_width: int) -> None:
        super().__init__()
        self.of_channel = nn.Embedding(channels, profile_width)
        self.of_behavior = nn.Linear(profile_width, profile_width, bias=False)
        self.of_item = nn.Linear(item_width, profile_width, bias=False)
        self.of_product = nn.Linear(profile_width, profile_width, bias=False)
        self.weight = nn.Linear(profile_width, 1)

    def forward(
        self,
        atoms_AD: torch.Tensor,
        recent_NB: torch.Tensor,
        item_NX: torch.Tensor,
        profile_NK: torch.Tensor,
        *,
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Interests, and their products with `profile_NK`, the profile part of the items [N, 2 K].

        `recent_NB` comes from `recent_behaviors`, `project` the profile's projection of atoms [M, D] to
        [M, K].
        """
        # Many impressions share a behavior; each distinct one is projected once.
        distinct_M, place_NB = torch.unique(recent_NB.clamp_min(0), return_inverse=True)
        behavior_MK = project(atoms_AD[distinct_M])
        behavior_NBK = behavior_MK[place_NB]
        channel_BK = self.of_channel.weight.repeat_interleave(
            recent_NB.shape[1] // self.of_channel.num_embeddings, dim=0
        )
        unit_NBK = nn.functional.silu(
            self.of_behavior(behavior_MK)[place_NB]
            + channel_BK
            + self.of_item(item_NX)[:, None]
            + self.of_product(behavior_NBK * profile_NK[:, None])
        )
        # No softmax, as in the paper: the sum keeps the strength of the interest. Our scaling by the
        # square root of the count keeps long histories from drowning the head.
        present_NB = recent_NB >= 0
        weight_NB = self.weight(unit_NBK).squeeze(-1) * present_NB
        count_N1 = present_NB.sum(dim=1, keepdim=True)
        interest_NK = torch.einsum("nb,nbk->nk", weight_NB, behavior_NBK) / (count_N1 + 1).sqrt()
        return torch.cat([interest_NK, interest_NK * profile_NK], dim=1)
