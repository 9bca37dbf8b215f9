"""Several processes that train one model on shares of the same steps (torchrun).

Every process plans the same global steps from the same seed and computes its share of each. A share's
loss is weighted by its rows of the whole step, so the *sum* of the processes' gradients is the gradient
of the global step: N processes take the steps that one would take. torch's DistributedDataParallel
averages processes instead, whatever each one's number of rows, and waits forever for a process that got
none; so the gradients are summed here, explicitly.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from bahe_models.timelines import Int64


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Of torch's process group; alone when there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, rows: Int64, user_N: Int64) -> Int64:
        """This process's part of a step's rows: whole users, about as many rows for each process.

        The parts of all processes are disjoint and make up the step; a part may be empty.
        """
        if self.size == 1:
            return rows
        begin = np.concatenate([[0], np.flatnonzero(np.diff(user_N[rows])) + 1])
        end = np.append(begin[1:], len(rows))
        owner = (begin + end) * self.size // (2 * len(rows))
        part: Int64 = rows[np.repeat(owner, end - begin) == self.rank]
        return part

    def broadcast(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                if not isinstance(tensor, DTensor):  # no process but its own has a share
                    dist.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; one without rows adds nothing.

        Gradients of sharded parameters are left alone: they are summed as they arise.
        """
        if self.size == 1:
            return
        waiting = []
        for parameter in parameters:
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values, summed in place over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started, for a block; without torchrun, be alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes.here()
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device for this process: under torchrun each process of a machine gets a GPU of its own."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
