"""Sequences end to end in one row: matrix products see no padding, and attention sees no neighbour.

Everything in a transformer but attention works on each position by itself, so sequences of any lengths
can share one row. Only attention separates them: sequences of similar length form a *group*, which is
padded to its longest.

Shape letters: P packed positions, W sequences of a group, L positions of its longest, H query heads, J
key and value heads, E width of a head; K keys, or features of a packed row; B = W * J products of
R = H / J * L rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bahe_models.timelines import Int64, like_lengths

ATTENTION = "bahe_packed"
"""The name under which transformers finds `attention`."""

_SHORT = 1024
"""Sequences up to this length can afford their full matrix of attention probabilities."""


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences of similar length."""

    start: int
    stop: int
    """Their rows of P."""
    sequences: int
    longest: int
    place_P: torch.Tensor | None
    """Index of each of these rows among the W * L padded ones; None where nothing is padded."""

    def padded(self, x_PK: torch.Tensor) -> torch.Tensor:
        """The group's rows as [W, L, ...], zeros on the right of the shorter ones."""
        own_PK = x_PK[self.start : self.stop]
        if self.place_P is not None:
            empty = own_PK.new_zeros(self.sequences * self.longest, *own_PK.shape[1:])
            own_PK = empty.index_copy(0, self.place_P, own_PK)
        return own_PK.reshape(self.sequences, self.longest, *own_PK.shape[1:])

    def packed(self, x_WLK: torch.Tensor) -> torch.Tensor:
        """Back from [W, L, ...] to the group's rows."""
        flat = x_WLK.flatten(0, 1)
        return flat if self.place_P is None else flat.index_select(0, self.place_P)


@dataclass(frozen=True)
class Packing:
    """How the rows of P are divided into sequences, the longest ones first."""

    groups: tuple[Group, ...]
    position_P: torch.Tensor
    """Each row's place in its own sequence."""

    @classmethod
    def of(cls, length_W: Int64, device: torch.device) -> Packing:
        """The packing of sequences of these lengths, which must be at least 1 and in descending order."""
        begin_W = np.cumsum(length_W) - length_W
        position_P = np.arange(length_W.sum()) - np.repeat(begin_W, length_W)
        return cls(tuple(_groups(length_W, device)), torch.from_numpy(position_P).to(device))

    def running_sums(self, x_PK: torch.Tensor) -> torch.Tensor:
        """Cumulative sums within each sequence [P, K]."""
        return torch.cat([group.packed(group.padded(x_PK).cumsum(dim=1)) for group in self.groups])

    def fading_sums(self, x_PK: torch.Tensor, half_life: int) -> torch.Tensor:
        """As `running_sums`, but a row's weight in them halves every `half_life` rows after it [P, K]."""
        parts = []
        for group in self.groups:
            age_LL = torch.arange(group.longest, device=x_PK.device)
            age_LL = age_LL[:, None] - age_LL
            weight_LL = torch.where(age_LL >= 0, 0.5 ** (age_LL.clamp_min(0) / half_life), 0.0)
            with torch.autocast(x_PK.device.type, enabled=False):
                parts.append(group.packed(weight_LL.to(x_PK.dtype) @ group.padded(x_PK)))
        return torch.cat(parts)


def _groups(length_W: Int64, device: torch.device) -> Iterator[Group]:
    start = 0
    for members in like_lengths(length_W):
        lengths, longest = length_W[members], int(length_W[members[0]])
        rows = int(lengths.sum())
        place_P = None
        if rows < len(members) * longest:
            present_WL = np.arange(longest) < lengths[:, None]
            place_P = torch.from_numpy(np.flatnonzero(present_WL)).to(device)
        yield Group(start, start + rows, len(members), longest, place_P)
        start += rows


def attend_within(half: nn.Module) -> None:
    """Let a half of a language model read packed rows (see `attention`); others are read as before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    hf_half: Any = half
    hf_half.set_attn_implementation(ATTENTION)


def read_packed(half: nn.Module, inputs_PD: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Last hidden states [P, D] of a half that `attend_within` has prepared."""
    device = inputs_PD.device.type
    if torch.is_autocast_enabled(device):
        # Otherwise every sum and norm between two products would move twice as many bytes.
        inputs_PD = inputs_PD.to(torch.get_autocast_dtype(device))
    states: torch.Tensor = half(
        inputs_embeds=inputs_PD[None],
        position_ids=packing.position_P[None],
        # transformers builds no mask when it is given one with four dimensions; `attention` does.
        attention_mask=inputs_PD.new_zeros(1, 1, 1, 1),
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]
    return states


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence, as transformers calls it: [1, H, P, E] to [1, P, H, E].

    Without a `packing`, as when a model reads on from its cache, the mask applies, the same for every
    sequence.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is None:
        if attention_mask is None:
            mask = _causal(query.shape[2], key.shape[2], sliding_window, query.device)
        else:
            mask = attention_mask[0, 0]
        return _by_products(query, key, value, mask, scale, softcap).transpose(1, 2), None
    parts = []
    query_PHE, key_PJE, value_PJE = (part[0].transpose(0, 1) for part in (query, key, value))
    # Rotary angles turn queries and keys into float32; products are in the precision of the rest.
    query_PHE, key_PJE = query_PHE.to(value.dtype), key_PJE.to(value.dtype)
    for group in packing.groups:
        padded = [group.padded(part).transpose(1, 2) for part in (query_PHE, key_PJE, value_PJE)]
        longest = group.longest
        window = None if sliding_window is None or sliding_window >= longest else sliding_window
        if softcap is None and window is None and not _products_pay(value, longest):
            out = nn.functional.scaled_dot_product_attention(
                padded[0], padded[1], padded[2], is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            mask = _causal(longest, longest, window, query.device)
            out = _by_products(padded[0], padded[1], padded[2], mask, scale, softcap)
        parts.append(group.packed(out.transpose(1, 2)))
    return torch.cat(parts)[None], None


def _products_pay(value: torch.Tensor, longest: int) -> bool:
    """Whether plain products beat torch's fused kernel.

    In bfloat16 on a CPU they are two to four times faster, forward and backward, at window lengths (60 to
    512); float32 gains nothing.
    """
    return value.device.type == "cpu" and value.dtype == torch.bfloat16 and longest <= _SHORT


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys each query sees [L, K]; the last query is at the last key's position."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _by_products(
    query_WHLE: torch.Tensor,
    key_WJKE: torch.Tensor,
    value_WJKE: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention [W, H, L, E] as two products around a softmax, all in the inputs' precision."""
    sequences, heads, longest, _ = query_WHLE.shape
    shared, keys = key_WJKE.shape[1:3]
    # Queries that share keys are rows of one product, so that no key is copied for them.
    query_BRE = query_WHLE.reshape(sequences * shared, heads // shared * longest, -1)
    key_BEK = key_WJKE.flatten(0, 1).transpose(1, 2)
    if mask.dtype == torch.bool:
        hidden = torch.zeros(mask.shape, dtype=query_WHLE.dtype, device=mask.device)
        mask = hidden.masked_fill(~mask, torch.finfo(hidden.dtype).min)
    with torch.autocast(query_WHLE.device.type, enabled=False):
        if softcap is None:
            mask_RK = mask.expand(heads // shared, longest, keys).reshape(-1, keys)
            scores_BRK = torch.baddbmm(mask_RK[None], query_BRE, key_BEK, alpha=scale)
        else:
            scores_BRK = softcap * torch.tanh(torch.bmm(query_BRE, key_BEK) * (scale / softcap))
            scores_BRK = scores_BRK + mask.expand(heads // shared, longest, keys).reshape(-1, keys)
        out_BRE = torch.bmm(scores_BRK.softmax(dim=-1), value_WJKE.flatten(0, 1))
    return out_BRE.reshape(sequences, heads, longest, -1)
