"""What the matrix products alone would take: the bound that steps and encoding are measured against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def matmul_rate(
    shapes: Sequence[tuple[int, int]], positions: int, dtype: torch.dtype, *, backward: bool = True
) -> float:
    """FLOP/s of the matrix products of linear layers of these inputs and outputs, on `positions` rows.

    Forward, and with `backward` the gradients of the input and of the weight too.
    """
    import torch

    operands = [
        (
            torch.randn(positions, i, dtype=dtype),
            torch.randn(o, i, dtype=dtype),
            torch.randn(positions, o, dtype=dtype),
        )
        for i, o in shapes
    ]
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        for x_PI, weight_OI, gradient_PO in operands:
            torch.nn.functional.linear(x_PI, weight_OI)
            if backward:
                gradient_PO @ weight_OI
                gradient_PO.T @ x_PI
        taken.append(time.perf_counter() - start)
    products = 3 if backward else 1
    return 2 * products * positions * sum(i * o for i, o in shapes) / median(taken)
