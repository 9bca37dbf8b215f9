"""User timelines by reference, and the plan that lets many impressions share one forward pass.

The deep layers are causal, so the state after a user's first k behaviors is the hidden state at
position k of one pass over the whole timeline (position 0 is the empty state). Every impression
therefore only names a position. Timelines longer than a window are cut into overlapping windows by a
rule that depends on k alone, so that training, the per-impression reference and serving agree.

Shape letters: N impressions, C channels, W windows, L positions of a block's longest window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

_LIKE = 0.8
"""Windows at least this long, relative to the longest of their block, are padded to it."""
_LEAST_POSITIONS = 512
"""A block takes shorter windows too until it has this many positions."""


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How much of a timeline one pass reads."""

    size: int = 512
    """Most behaviors in one window (per channel)."""
    overlap: int = 256
    """Every impression of a longer timeline sees at least this many behaviors."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"window.overlap is {self.overlap}; it must be in [0, {self.size}).")


@dataclass(frozen=True)
class Timelines:
    """Each user's behaviors in time order, per channel, as rows of the atom table (CSR layout)."""

    channels: tuple[str, ...]
    offsets: tuple[Int64, ...]
    """Per channel, [users + 1]: user u's behaviors are `atoms[offsets[u]:offsets[u + 1]]`."""
    atoms: tuple[Int64, ...]
    """Per channel, [behaviors]: row of the atom table."""

    @property
    def users(self) -> int:
        """How many users there are, those without behaviors included."""
        return len(self.offsets[0]) - 1

    def lengths(self) -> Int64:
        """Behaviors per user and channel, [users, C]."""
        return np.stack([np.diff(offset) for offset in self.offsets], axis=1)


@dataclass(frozen=True)
class Block:
    """Windows of like length, padded to the longest."""

    atoms_WL: Int64
    """Atom rows; position 0 is the start position and, like padding, holds -1."""
    channel_W: Int64
    """Channel of each window."""


EMPTY_BLOCK = Block(np.full((1, 1), -1), np.zeros(1, dtype=np.int64))
"""One window of nothing but the start position."""


@dataclass(frozen=True)
class WindowBatch:
    """The windows that a set of impressions needs, and where each impression reads."""

    blocks: tuple[Block, ...]
    state_NC: Int64
    """Where each impression reads, per channel: a row of all blocks' states, flattened in order."""
    position_NC: Int64
    """Behaviors of that window before the impression."""

    @property
    def positions(self) -> int:
        """Positions that carry a behavior or a start, without padding."""
        return sum(int((b.atoms_WL >= 0).sum()) + len(b.atoms_WL) for b in self.blocks)


def window_start(length: Int64, config: WindowConfig) -> Int64:
    """First behavior of the window that a prefix of `length` behaviors is read from."""
    stride = config.size - config.overlap
    beyond = np.maximum(length - config.size, 0)
    return -(-beyond // stride) * stride


def window_batch(
    timelines: Timelines,
    user_N: Int64,
    length_NC: Int64,
    config: WindowConfig,
    *,
    share: bool = True,
) -> WindowBatch:
    """Plan the pass for some impressions: which windows, and which state each impression reads.

    With `share` all impressions of a user read from the same pass; without it every impression gets
    a pass of its own over its own prefix (the per-impression reference).
    """
    begins, counts, channels, windows_of, positions = [], [], [], [], []
    windows = 0
    for channel in range(len(timelines.channels)):
        length_N = length_NC[:, channel]
        start_N = window_start(length_N, config)
        if share:
            key_N = user_N * (1 + int(start_N.max(initial=0))) + start_N
            _, first_W, window_N = np.unique(key_N, return_index=True, return_inverse=True)
        else:
            first_W = window_N = np.arange(len(user_N))
        count_W = np.zeros(len(first_W), dtype=np.int64)
        np.maximum.at(count_W, window_N, length_N - start_N)
        begins.append(timelines.offsets[channel][user_N[first_W]] + start_N[first_W])
        counts.append(count_W)
        channels.append(np.full(len(first_W), channel))
        windows_of.append(window_N + windows)
        positions.append(length_N - start_N)
        windows += len(first_W)

    begin_W, count_W, channel_W = map(np.concatenate, (begins, counts, channels))
    blocks, row_W = [], np.empty(windows, dtype=np.int64)  # row_W: each window's first state
    offset = 0
    for members in like_lengths(count_W):
        longest = int(count_W[members].max())
        atoms_WL = np.full((len(members), longest + 1), -1, dtype=np.int64)
        column_L = np.arange(longest)
        valid = column_L < count_W[members, None]
        # Channels keep their behaviors in arrays of their own.
        for channel, atoms in enumerate(timelines.atoms):
            here = valid & (channel_W[members] == channel)[:, None]
            source = begin_W[members, None] + column_L
            atoms_WL[:, 1:][here] = atoms[source[here]]
        blocks.append(Block(atoms_WL, channel_W[members]))
        row_W[members] = offset + np.arange(len(members)) * (longest + 1)
        offset += atoms_WL.size
    position_NC = np.stack(positions, axis=1)
    return WindowBatch(
        blocks=tuple(blocks),
        state_NC=row_W[np.stack(windows_of, axis=1)] + position_NC,
        position_NC=position_NC,
    )


def like_lengths(count_W: Int64) -> Iterator[Int64]:
    """Windows in groups of like length: little padding, yet enough work in each pass."""
    order = np.argsort(-count_W, kind="stable")
    start = 0
    while start < len(order):
        longest = count_W[order[start]] + 1
        stop = start + 1
        while stop < len(order) and (
            count_W[order[stop]] + 1 >= _LIKE * longest or (stop - start) * longest < _LEAST_POSITIONS
        ):
            stop += 1
        yield order[start:stop]
        start = stop


def plan_steps(
    user_N: Int64,
    length_NC: Int64,
    *,
    impressions_per_step: int,
    rng: np.random.Generator | None,
) -> Iterator[Int64]:
    """Indices of the impressions of each step: whole users, users of like length together.

    A user with more impressions than a step holds is cut in time order. With `rng` the order of
    steps, and which users meet, is random; without it the order is by length.
    """
    order = np.lexsort((length_NC.sum(axis=1), user_N))
    boundaries = np.flatnonzero(np.diff(user_N[order])) + 1
    pieces = [
        piece[start : start + impressions_per_step]
        for piece in np.split(order, boundaries)
        for start in range(0, len(piece), impressions_per_step)
    ]
    longest = np.array([length_NC[piece].max() for piece in pieces], dtype=np.float64)
    if rng is not None:
        longest *= rng.uniform(0.8, 1.25, len(longest))
    steps: list[list[Int64]] = [[]]
    room = impressions_per_step
    for index in np.argsort(longest, kind="stable"):
        piece = pieces[index]
        if len(piece) > room and steps[-1]:
            steps.append([])
            room = impressions_per_step
        steps[-1].append(piece)
        room -= len(piece)
    sequence = np.arange(len(steps)) if rng is None else rng.permutation(len(steps))
    for index in sequence:
        yield np.concatenate(steps[index])
