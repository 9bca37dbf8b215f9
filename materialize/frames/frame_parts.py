"""Which rows of a frame each reader takes: parts of row groups, shared by ranks and workers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from bahe_core.errors import BadInput

LEAST_PART = 1_024
"""Rows below which a row group is not cut further, since each part reads the whole group."""


@dataclass(frozen=True)
class Part:
    """A range among a row group's rows of the split."""

    group: int
    start: int
    stop: int


def rank_and_world_size(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """Rank and world size: those given, else torch.distributed's, else torchrun's, else 0 and 1."""
    if (rank is None) != (ranks is None):
        raise BadInput("give both `rank` and `ranks`, or neither.")
    if rank is None or ranks is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, ranks = (int(os.environ.get(name, one)) for name, one in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < ranks:
        raise BadInput(f"rank {rank} of {ranks} ranks: ranks are numbered from 0.")
    return rank, ranks


def split_counts(file: pq.ParquetFile, split: str | None) -> list[int]:
    """Rows that each row group has of a split."""
    groups = range(file.num_row_groups)
    if split is None:
        return [file.metadata.row_group(g).num_rows for g in groups]
    return [
        int(pc.sum(pc.equal(file.read_row_group(g, ["split"])["split"], split)).as_py() or 0)
        for g in groups
    ]


def rows_between(parts: list[Part], start: int, stop: int) -> list[Part]:
    """The parts that make up rows `start` to `stop` of these parts laid end to end."""
    selected, before = [], 0
    for part in parts:
        first = max(part.start, part.start + start - before)
        last = min(part.stop, part.start + stop - before)
        if first < last:
            selected.append(Part(part.group, first, last))
        before += part.stop - part.start
    return selected
