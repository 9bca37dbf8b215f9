"""Vectors of the feature store (`features.vectors` of dataset.yaml) as inputs of the head.

Each is standardised by coordinate on the training rows, projected where it is wide, and comes with whether
there is one; what is not known is the training mean. Shape letters: N impressions, D width of a vector, G
width of all that the head reads of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bahe_models.features import LARGEST
from bahe_models.given_vectors import Matrix

PROJECTED = 32
"""Wider vectors are projected to this width: the head's weights grow with the square of what it reads, and
most of the coordinates of a language model's or an image's vector say the same."""


class VectorInput(nn.Module):
    """One of them. A row with a value that is not finite stands for a vector that is not known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean_D: torch.Tensor
        self.deviation_D: torch.Tensor
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("deviation_D", torch.ones(width))
        self.projection = nn.Linear(width, PROJECTED, bias=False) if width > PROJECTED else None

    @torch.no_grad()
    def fit(self, vectors_ND: torch.Tensor) -> None:
        """Learn the standardisation; without any known vector it stays as it is."""
        known_MD = vectors_ND[vectors_ND.isfinite().all(dim=1)]
        if len(known_MD):
            deviation_D, mean_D = torch.std_mean(known_MD.double(), dim=0, correction=0)
            self.mean_D.copy_(mean_D)
            self.deviation_D.copy_(torch.where(deviation_D > 1e-6, deviation_D, 1.0))

    def forward(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Standardised and projected, and 1 or 0 for whether there is one."""
        known_N1 = vectors_ND.isfinite().all(dim=1, keepdim=True)
        scaled_ND = ((vectors_ND - self.mean_D) / self.deviation_D).clamp(-LARGEST, LARGEST)
        scaled_ND = torch.where(known_N1, scaled_ND, 0.0)
        if self.projection is not None:
            scaled_ND = self.projection(scaled_ND)
        return torch.cat([scaled_ND, known_N1.to(scaled_ND.dtype)], dim=1)


class VectorFeatures(nn.Module):
    """All of them, side by side."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        """`widths` are by `view:feature`, in the order in which `forward` takes them."""
        super().__init__()
        self.widths = dict(widths)
        self.inputs = nn.ModuleList(VectorInput(width) for width in widths.values())

    @property
    def width(self) -> int:
        """Width of what `forward` returns."""
        return sum(1 + min(width, PROJECTED) for width in self.widths.values())

    def fit(self, vectors: Mapping[str, Matrix]) -> None:
        """Learn the standardisation of each from the training rows."""
        for name, one in zip(self.widths, self.inputs, strict=True):
            assert isinstance(one, VectorInput)
            one.fit(torch.from_numpy(vectors[name]))

    def forward(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the head reads [N, G] of a tensor [N, D] for each."""
        return torch.cat([one(its_ND) for one, its_ND in zip(self.inputs, vectors, strict=True)], dim=1)
