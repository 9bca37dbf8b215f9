"""User timelines by reference, and the plan that lets many impressions share one forward pass.

The deep layers are causal, so the state after a user's first k behaviors is the hidden state at
position k of one pass over the whole timeline (position 0 is the empty state). An impression therefore
only names a position. Timelines longer than a window are cut into overlapping windows by a
rule that depends on k alone, so that training, the per-impression reference and serving agree.

A pass reads *sequences*: each channel's timeline by itself (as in the paper), or all channels
merged into one in time order.

Shape letters: N impressions, C channels, S sequences (C, or 1 where merged), B behaviors, W windows, P
positions of all windows, end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bahe_core.errors import BadInput
from bahe_models.config import WindowConfig

Int64 = npt.NDArray[np.int64]
"""Rows, ids, lengths and microseconds."""
Int16 = npt.NDArray[np.int16]

GAP_STARTS_US = 10**6 * 4 ** np.arange(13, dtype=np.int64)
"""Where the buckets of `gap_buckets` begin, from bucket 2 on: 1 s, 4 s, 16 s, ... 194 days."""
GAP_BUCKETS = len(GAP_STARTS_US) + 2

_LIKE = 0.8
"""Sequences at least this long, relative to the longest of their group, are padded to it."""
_LEAST_POSITIONS = 512
"""Until it has this many positions, a group takes shorter sequences too."""


def gap_buckets(gap_us: Int64) -> Int16:
    """Logarithmic bucket of the time between a behavior and the previous one.

    Bucket 0 is for first behaviors, which have no previous one, and is never returned. Bucket 1 is for
    less than a second, bucket 2 + i for 4 ** i seconds and more; the last begins at 4 ** 12 s, 194 days.
    """
    return (np.searchsorted(GAP_STARTS_US, gap_us, side="right") + 1).astype(np.int16)


@dataclass(frozen=True)
class Sequences:
    """The behaviors of all users, in the order in which the deep layers read them."""

    offsets: tuple[Int64, ...]
    """Per sequence, [users + 1]: user u's behaviors in it are `offsets[u]` to `offsets[u + 1]` of B."""
    atom_B: Int64
    """Row of the atom table."""
    channel_B: Int16
    """Channel of each behavior."""
    gap_B: Int16
    """`gap_buckets` of the time since the previous behavior in the sequence; 0 for the first."""


@dataclass(frozen=True)
class Timelines:
    """Each user's behaviors in time order, per channel, as rows of the atom table (CSR layout).

    Raises ValueError when time goes backwards within a user's channel.
    """

    channels: tuple[str, ...]
    offsets: tuple[Int64, ...]
    """Per channel, [users + 1]: user u's behaviors are `atoms[offsets[u]:offsets[u + 1]]`."""
    atoms: tuple[Int64, ...]
    """Per channel, [behaviors]: row of the atom table."""
    time_us: tuple[Int64, ...]
    """Per channel, [behaviors]: when it happened, in microseconds since 1970."""

    def __post_init__(self) -> None:
        for channel, offset, time_us in zip(self.channels, self.offsets, self.time_us, strict=True):
            back = np.flatnonzero(np.diff(time_us) < 0) + 1
            if not np.isin(back, offset).all():
                raise ValueError(f"time goes back within a user's behaviors of channel {channel}")

    @property
    def users(self) -> int:
        """Number of users, including those without behaviors."""
        return len(self.offsets[0]) - 1

    def lengths(self) -> Int64:
        """Behaviors per user and channel, [users, C]."""
        return np.stack([np.diff(offset) for offset in self.offsets], axis=1)

    @cached_property
    def parallel(self) -> Sequences:
        """Each channel as a sequence of its own."""
        before = np.cumsum([0, *(len(atoms) for atoms in self.atoms[:-1])])
        offsets = tuple(offset + start for offset, start in zip(self.offsets, before, strict=True))
        time_B = np.concatenate(self.time_us)
        return Sequences(offsets, np.concatenate(self.atoms), self._channel_B(), _gaps(time_B, offsets))

    @cached_property
    def merged(self) -> Sequences:
        """All channels as one sequence by time; ties are ordered by channel, then by position.

        The behaviors before a moment are therefore a prefix, as long as the channels' prefixes together.
        """
        counts_U = self.lengths().sum(axis=1)
        offset = np.concatenate([[0], np.cumsum(counts_U)]).astype(np.int64)
        user_B = np.concatenate([np.repeat(np.arange(self.users), np.diff(o)) for o in self.offsets])
        time_B = np.concatenate(self.time_us)
        order_B = np.lexsort((time_B, user_B))  # stable: ties stay in the order of channel and position
        return Sequences(
            (offset,),
            np.concatenate(self.atoms)[order_B],
            self._channel_B()[order_B],
            _gaps(time_B[order_B], (offset,)),
        )

    def _channel_B(self) -> Int16:
        counts = [len(atoms) for atoms in self.atoms]
        return np.repeat(np.arange(len(counts), dtype=np.int16), counts)


def _gaps(time_B: Int64, offsets: tuple[Int64, ...]) -> Int16:
    gap_B = gap_buckets(np.diff(time_B, prepend=time_B[:1]))
    for offset in offsets:
        gap_B[offset[:-1][np.diff(offset) > 0]] = 0
    return gap_B


@dataclass(frozen=True)
class WindowBatch:
    """The windows that a set of impressions needs, end to end, and where each impression reads.

    There is always at least one window, if only a start position: the processes of a sharded model must
    call its layers equally often.
    """

    length_W: Int64
    """Positions of each window, its start position included; the longest comes first."""
    atoms_P: Int64
    """Atom rows; a window's first position is the start position and holds -1."""
    channel_P: Int64
    """Channel of each behavior; 0 at a start."""
    gap_P: Int64
    """`gap_buckets` of each behavior; 0 at a start."""
    state_NS: Int64
    """Where each impression reads, per sequence: a row of P."""
    position_NS: Int64
    """Behaviors of that window before the impression."""


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
    merged: bool = False,
) -> WindowBatch:
    """Plan the pass for some impressions: which windows, and which state each impression reads.

    With `share` all impressions of a user read from the same pass; without it every impression gets
    a pass of its own over its own prefix (the per-impression reference). With `merged` the channels
    make one sequence; raises BadInput when an impression's lengths are not those of one moment.
    """
    sequences = timelines.merged if merged else timelines.parallel
    length_NS = sequence_lengths(length_NC, merged)
    if merged:
        _check_one_moment(timelines, user_N, length_NC)
    begins, counts, windows_of, positions = [], [], [], []
    windows = 0
    for offset_U, length_N in zip(sequences.offsets, length_NS.T, strict=True):
        start_N = window_start(length_N, config)
        if share:
            key_N = user_N * (1 + int(start_N.max(initial=0))) + start_N
            _, first_W, window_N = np.unique(key_N, return_index=True, return_inverse=True)
        else:
            first_W = window_N = np.arange(len(user_N))
        count_W = np.zeros(len(first_W), dtype=np.int64)
        np.maximum.at(count_W, window_N, length_N - start_N)
        begins.append(offset_U[user_N[first_W]] + start_N[first_W])
        counts.append(count_W)
        windows_of.append(window_N + windows)
        positions.append(length_N - start_N)
        windows += len(first_W)

    begin_W, count_W = np.concatenate(begins), np.concatenate(counts)
    if not windows:
        begin_W = count_W = np.zeros(1, dtype=np.int64)
    order_W = np.argsort(-count_W, kind="stable")
    length_W = count_W[order_W] + 1
    first_W = np.cumsum(length_W) - length_W
    behavior_P = np.ones(length_W.sum(), dtype=bool)
    behavior_P[first_W] = False
    atoms_P = np.where(behavior_P, 0, -1)
    channel_P, gap_P = np.zeros_like(atoms_P), np.zeros_like(atoms_P)
    # A window's second position holds the behavior it begins with.
    source = (np.arange(len(atoms_P)) + np.repeat(begin_W[order_W] - first_W - 1, length_W))[behavior_P]
    atoms_P[behavior_P] = sequences.atom_B[source]
    channel_P[behavior_P] = sequences.channel_B[source]
    gap_P[behavior_P] = sequences.gap_B[source]
    row_W = np.empty_like(first_W)  # each window's first position, in the order of `begin_W`
    row_W[order_W] = first_W
    position_NS = np.stack(positions, axis=1)
    return WindowBatch(
        length_W=length_W,
        atoms_P=atoms_P,
        channel_P=channel_P,
        gap_P=gap_P,
        state_NS=row_W[np.stack(windows_of, axis=1)] + position_NS,
        position_NS=position_NS,
    )


def sequence_lengths(length_NC: Int64, merged: bool) -> Int64:
    """Behaviors of each sequence, [N, S], from those of each channel."""
    return length_NC.sum(axis=1, keepdims=True) if merged else length_NC


def _check_one_moment(timelines: Timelines, user_N: Int64, length_NC: Int64) -> None:
    """Raises BadInput when lengths are not those of one moment, so that no merged prefix matches them."""
    latest_N = np.full(len(user_N), np.iinfo(np.int64).min)
    next_N = np.full(len(user_N), np.iinfo(np.int64).max)
    for offset, time_us, length_N in zip(timelines.offsets, timelines.time_us, length_NC.T, strict=True):
        end_N = offset[user_N] + length_N
        past, future = length_N > 0, end_N < offset[user_N + 1]
        latest_N[past] = np.maximum(latest_N[past], time_us[end_N[past] - 1])
        next_N[future] = np.minimum(next_N[future], time_us[end_N[future]])
    wrong = np.flatnonzero(latest_N >= next_N)
    if len(wrong):
        raise BadInput(
            f"the lengths {length_NC[wrong[0]].tolist()} of an impression of user row {user_N[wrong[0]]}"
            " are not those of one moment, so the merged timeline has no such prefix; pull the frame again."
        )


def like_lengths(length_W: Int64) -> Iterator[Int64]:
    """Groups of sequences of similar length, longest first: little padding, yet enough work in each."""
    order = np.argsort(-length_W, kind="stable")
    start = 0
    while start < len(order):
        longest = length_W[order[start]]
        stop = start + 1
        while stop < len(order) and (
            length_W[order[stop]] >= _LIKE * longest or (stop - start) * longest < _LEAST_POSITIONS
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
    merged: bool = False,
) -> Iterator[Int64]:
    """Indices of the impressions of each step: whole users, users of similar length together.

    A user with more impressions than a step holds is split in time order. With `rng` the order of
    steps, and which users share one, is random; without it the order is by length.
    """
    order = np.lexsort((length_NC.sum(axis=1), user_N))
    boundaries = np.flatnonzero(np.diff(user_N[order])) + 1
    pieces = [
        piece[start : start + impressions_per_step]
        for piece in np.split(order, boundaries)
        for start in range(0, len(piece), impressions_per_step)
    ]
    length_NS = sequence_lengths(length_NC, merged)
    longest = np.array([length_NS[piece].max() for piece in pieces], dtype=np.float64)
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
    step_order = np.arange(len(steps)) if rng is None else rng.permutation(len(steps))
    for index in step_order:
        yield np.concatenate(steps[index])
