"""RMS normalisation in two passes over bfloat16, where transformers' own takes six over float32.

On a CPU these passes are limited by memory and together cost as much as a third of the layers' matrix
products. Elsewhere, and in other precisions, torch's fused kernel is used.

Shape letters: ... positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RootMeanSquareNorm(nn.Module):
    """The class that `fuse_norms` gives to transformers' norm modules; it is never constructed."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x over its root mean square, times the weight [..., D]."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            normal: torch.Tensor = _Bfloat16.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
            return normal
        weight = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, weight.shape, weight, self.variance_epsilon)


def fuse_norms(half: nn.Module) -> None:
    """Make the RMS norms of a language model's half compute as defined here.

    Norms with another formula (Gemma's weights count from 1) are left alone; they name their epsilon
    differently.
    """
    for module in half.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            # Keeps parameters, hooks and the place in the model; a wrapper would rename the weights.
            module.__class__ = RootMeanSquareNorm


class _Bfloat16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(epsilon))
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale.to(x.dtype)).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        x_PD, gradient_PD = x.reshape(-1, width), gradient.reshape(-1, width).to(x.dtype)
        scale_P1 = scale.reshape(-1, 1)
        product_PD, weight = gradient_PD * x_PD, weight_D.to(x.dtype)
        # Sums over positions and over the width are products, which accumulate in float32.
        weight_gradient_D = torch.mv(product_PD.T, scale_P1[:, 0].to(x.dtype))
        along_P1 = torch.mv(product_PD, weight).float()[:, None] * scale_P1**3 / width
        x_gradient_PD = torch.addcmul(
            (gradient_PD * weight).mul_(scale_P1.to(x.dtype)), x_PD, along_P1.to(x.dtype), value=-1
        )
        return x_gradient_PD.view_as(x), weight_gradient_D.to(weight_D.dtype), None
