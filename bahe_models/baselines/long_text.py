"""What BAHE replaces: the user's history as one long text through the same layers of the same LLM.

Two forms that compute the same function. *Per impression*, as in BAHE's paper: the latest behaviors
that fit, one prompt and one pass for each impression. *Packed*, which is not in the paper but fairer to
this peer: the history as one token stream, one causal pass for many impressions, each reading
the state at the last token before it.

The user state is the last token's, because a causal pass has it for every prefix (a mean over tokens
would also let text at the far end of the history count as much as the latest). There is no profile
part: it sums atom vectors, which this model does not have, so those columns are zero. The rest
is BAHE's own head; item vectors come from the items' stored atoms, which saves the peer their tokens.

Shape letters: N impressions, W windows, S tokens, D backbone width, V deep part of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bahe_models.config import WindowConfig
from bahe_models.model import BaheModel
from bahe_models.timelines import Int64, like_lengths, window_start


@dataclass(frozen=True)
class TokenTimelines:
    """Each user's behaviors over all channels in time order, as tokens (two nested CSR layouts)."""

    tokens: Int64
    starts: Int64
    """[behaviors + 1]: behavior b is `tokens[starts[b]:starts[b + 1]]`."""
    offsets: Int64
    """[users + 1]: user u's behaviors are `offsets[u]` up to `offsets[u + 1]`."""
    start_token: int
    """Begins every prompt; a user without behaviors is this token alone."""

    def spans(
        self, user_N: Int64, length_N: Int64, max_tokens: int, *, packed: bool
    ) -> tuple[Int64, Int64]:
        """Begin and end in `tokens` of the span that each impression reads, without the start token.

        Spans end where the first `length_N` behaviors do, begin with a whole behavior and, with the
        start token, hold at most `max_tokens`. Per impression they begin as early as fits. Packed
        they begin where BAHE's windows would (half of a window overlaps), so that many share a beginning.
        """
        first_N = self.starts[self.offsets[user_N]]
        end_N = self.starts[self.offsets[user_N] + length_N]
        if packed:
            config = WindowConfig(size=max_tokens - 1, overlap=(max_tokens - 1) // 2)
            earliest_N = first_N + window_start(end_N - first_N, config)
        else:
            earliest_N = np.maximum(first_N, end_N - (max_tokens - 1))
        begin_N = self.starts[np.searchsorted(self.starts, earliest_N)]
        return np.minimum(begin_N, end_N), end_N  # one behavior may be longer than a window


def token_timelines(
    tokenizer: Any, texts: Sequence[str], atom_B: Int64, offsets: Int64, max_tokens: int = 128
) -> TokenTimelines:
    """Tokenise `texts` (one per atom) once and lay them out as behaviors `atom_B`, one line each."""
    lines: list[list[int]] = tokenizer(
        [f"{text}\n" for text in texts],
        truncation=True,
        max_length=max_tokens,
        add_special_tokens=False,
        split_special_tokens=True,  # a text is data, as in AtomicEncoder.tokenize
    )["input_ids"]
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    lines = [line or [start] for line in lines]
    size_A = np.array([len(line) for line in lines], dtype=np.int64)
    first_A = np.cumsum(size_A) - size_A
    starts = np.concatenate([[0], np.cumsum(size_A[atom_B])]).astype(np.int64)
    flat = np.array([token for line in lines for token in line], dtype=np.int64)
    shift_B = first_A[atom_B] - starts[:-1]
    return TokenTimelines(
        tokens=flat[np.arange(starts[-1]) + np.repeat(shift_B, size_A[atom_B])],
        starts=starts,
        offsets=offsets,
        start_token=int(start),
    )


class LongText(nn.Module):
    """Frozen shallow and trainable deep layers over text, with BAHE's projection and head."""

    def __init__(self, shallow: nn.Module, head: BaheModel) -> None:
        """`head` is a model of one channel; its aggregator's deep layers are trained."""
        super().__init__()
        self.shallow = shallow
        self.head = head

    def train(self, mode: bool = True) -> LongText:
        """Set the mode; the shallow layers are frozen and stay as they are."""
        super().train(mode)
        self.shallow.eval()
        return self

    def user_vectors(
        self,
        timelines: TokenTimelines,
        user_N: Int64,
        length_N: Int64,
        max_tokens: int,
        *,
        packed: bool,
        tokens_per_pass: int = 16_384,
    ) -> torch.Tensor:
        """User vectors [N, V + K] after the first `length_N` behaviors, with zero sums."""
        head = self.head
        device = head.user_projection.weight.device
        begin_N, end_N = timelines.spans(user_N, length_N, max_tokens, packed=packed)
        if packed:
            # Empty spans may begin where another user's first one does; the user tells them apart.
            _, first_W, window_N = np.unique(
                np.stack([user_N, begin_N]), axis=1, return_index=True, return_inverse=True
            )
        else:
            first_W = window_N = np.arange(len(user_N))
        begin_W = begin_N[first_W]
        count_W = np.zeros(len(first_W), dtype=np.int64)
        np.maximum.at(count_W, window_N, end_N - begin_N)
        states, row_W, offset = [], np.empty(len(first_W), dtype=np.int64), 0
        for group in like_lengths(count_W + 1):
            longest = int(count_W[group].max()) + 1
            windows_per_pass = max(1, tokens_per_pass // longest)
            for members in (
                group[i : i + windows_per_pass] for i in range(0, len(group), windows_per_pass)
            ):
                column_S = np.arange(longest - 1)
                present = column_S < count_W[members, None]
                # Right padding: a causal layer's earlier positions never see it.
                ids_WS = np.full((len(members), longest), timelines.start_token, dtype=np.int64)
                ids_WS[:, 1:][present] = timelines.tokens[(begin_W[members, None] + column_S)[present]]
                states.append(self._states(torch.from_numpy(ids_WS).to(device)).flatten(0, 1))
                row_W[members] = offset + np.arange(len(members)) * longest
                offset += ids_WS.size
        read_N = torch.from_numpy(row_W[window_N] + end_N - begin_N).to(device)
        state_ND = torch.cat(states)[read_N].float()
        deep_NV = head.user_projection(head.dropout(head.user_norm(state_ND))).float()
        return nn.functional.pad(deep_NV, (0, head.config.vector_width - head.config.deep_width))

    def _states(self, ids_WS: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden_WSD = self.shallow(input_ids=ids_WS, use_cache=False).last_hidden_state
        deep: Any = self.head.aggregator.deep
        states: torch.Tensor = deep(inputs_embeds=hidden_WSD, use_cache=False).last_hidden_state
        return states
