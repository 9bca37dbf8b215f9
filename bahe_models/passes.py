"""Passes of bounded size: memory grows with the positions that a pass reads, not with its impressions.

A user with one impression and a long history costs as many positions as one with hundreds, so a step of a
fixed number of impressions has no bound of its own. Shape letters are those of `bahe_models.timelines`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bahe_models.config import WindowConfig
from bahe_models.timelines import Int64, plan_steps, sequence_lengths, window_start


def positions_read(user_N: Int64, length_NC: Int64, config: WindowConfig, *, merged: bool = False) -> Int64:
    """Positions of each user's windows when one pass reads them for all these impressions [1 + last user].

    Start positions are counted; each window is as long as its longest prefix, as in `window_batch`.
    """
    read_U = np.zeros(1 + user_N.max(initial=-1), dtype=np.int64)
    for length_N in sequence_lengths(length_NC, merged).T:
        start_N = window_start(length_N, config)
        order_N = np.lexsort((length_N, start_N, user_N))
        users_N, starts_N = user_N[order_N], start_N[order_N]
        # The last row of each user and window is the longest prefix, which holds the others.
        last_N = np.append((np.diff(users_N) != 0) | (np.diff(starts_N) != 0), True)[: len(users_N)]
        np.add.at(read_U, users_N[last_N], (length_N[order_N] - starts_N + 1)[last_N])
    return read_U


def bounded_passes(
    user_N: Int64, length_NC: Int64, config: WindowConfig, *, positions: int, merged: bool = False
) -> list[Int64]:
    """Indices of the impressions of each pass of at most `positions` positions, in the impressions' order.

    The impressions of a user must stand together. One pass if they fit; else users are whole where they
    fit by themselves, and others are cut between impressions. A pass has at least one impression, and
    so up to `config.size` + 1 positions for each sequence, whatever the bound.
    """
    run_N = np.cumsum(np.diff(user_N, prepend=user_N[:1]) != 0)
    read_R = positions_read(run_N, length_NC, config, merged=merged)
    every_N = np.arange(len(user_N))
    if read_R.sum() <= positions:
        return [every_N]
    begin_R = np.flatnonzero(np.diff(run_N, prepend=-1))
    length_NS = sequence_lengths(length_NC, merged)
    firsts: list[int] = []
    held = positions  # full, so that the first user begins the first pass
    for begin, end, read in zip(begin_R, [*begin_R[1:], len(run_N)], read_R.tolist(), strict=True):
        pieces = [(0, read)] if read <= positions else _pieces(length_NS[begin:end], config, positions)
        for first, added in pieces:
            if held + added > positions:
                firsts.append(int(begin) + first)
                held = 0
            held += added
    return np.split(every_N, firsts[1:])


def _pieces(length_NS: Int64, config: WindowConfig, positions: int) -> Iterator[tuple[int, int]]:
    """First impression and positions of each piece of one user, as long as the bound allows."""
    first = read = 0
    longest: dict[tuple[int, int], int] = {}  # positions of each sequence's windows in the piece, by start
    starts_and_lengths = zip(window_start(length_NS, config).tolist(), length_NS.tolist(), strict=True)
    for row, (starts, lengths) in enumerate(starts_and_lengths):
        needed = {
            (sequence, start): length - start + 1
            for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True))
        }
        added = sum(max(0, count - longest.get(window, 0)) for window, count in needed.items())
        if row > first and read + added > positions:
            yield first, read
            first, read, longest, added = row, 0, {}, sum(needed.values())
        read += added
        for window, count in needed.items():
            longest[window] = max(count, longest.get(window, 0))
    yield first, read


def plan_passes(
    user_N: Int64,
    length_NC: Int64,
    config: WindowConfig,
    *,
    impressions: int,
    positions: int,
    merged: bool = False,
) -> Iterator[Int64]:
    """Indices of the impressions of each pass, where nothing is trained: bounded both ways.

    The passes of `bounded_passes` of the steps of `plan_steps`, in order of length.
    """
    for rows in plan_steps(user_N, length_NC, impressions_per_step=impressions, rng=None, merged=merged):
        for part in bounded_passes(
            user_N[rows], length_NC[rows], config, positions=positions, merged=merged
        ):
            yield rows[part]
