"""Several processes train one model, each on its share of every step (torchrun).

Every process plans the same global steps from the same seed and computes its share of each. A share's
loss is weighted by its part of the step's rows, so the *sum* of the processes' gradients is the gradient
of the global step: N processes take the same steps as one. torch's DistributedDataParallel averages over
processes instead, regardless of their numbers of rows, and hangs on a process without any; so gradients
are summed explicitly here.
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
    """Rank and world size."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Processes:
        """Those of torch's process group; a single process when there is none."""
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
        """Broadcast rank 0's parameters and buffers."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                if not isinstance(tensor, DTensor):  # each process has its own shard
                    dist.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient with its sum over the processes; one without rows adds nothing.

        Gradients of sharded parameters are left alone: FSDP sums them in the backward pass.
        """
        if self.size == 1:
            return
        pending = []
        for parameter in parameters:
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            work.wait()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The values, summed in place over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join torchrun's process group for a block; without torchrun, a single process."""
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
    """The device for this process: under torchrun each process on a machine gets its own GPU."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
