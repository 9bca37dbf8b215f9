"""What the deep layers read of one behavior: its atom's vector, marked with its channel and its time.

Both marks are learned, optional and start at zero, so that training begins with the atoms alone. Time is
the gap since the previous behavior, never that to an impression: a mark is final when its behavior
happens, and stored states of a timeline stay valid whenever they are read.

Shape letters: P positions, D backbone width, C channels, G gap buckets.
"""

from __future__ import annotations

import torch
from torch import nn

from bahe_models.timelines import GAP_BUCKETS


class BehaviorInput(nn.Module):
    """Adds to atom vectors an embedding of the channel, one of the time gap, both, or neither."""

    def __init__(self, width: int, *, channels: int | None, gaps: bool) -> None:
        """`channels` is how many there are to tell apart; None when each sequence holds only one."""
        super().__init__()
        self.channel_CD = nn.Parameter(torch.zeros(channels, width)) if channels else None
        self.gap_GD = nn.Parameter(torch.zeros(GAP_BUCKETS, width)) if gaps else None

    def forward(self, atoms_PD: torch.Tensor, channel_P: torch.Tensor, gap_P: torch.Tensor) -> torch.Tensor:
        """Inputs [P, D] from atom vectors, channels and `timelines.gap_buckets`."""
        if self.channel_CD is not None:
            atoms_PD = atoms_PD + nn.functional.embedding(channel_P, self.channel_CD)
        if self.gap_GD is not None:
            atoms_PD = atoms_PD + nn.functional.embedding(gap_P, self.gap_GD)
        return atoms_PD
