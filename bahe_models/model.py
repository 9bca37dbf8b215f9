"""The BAHE model: user aggregator (deep layers), item tower and CTR head.

A user vector has three parts. The *deep* part is the deep layers' state, as in the paper. The *profile*
part is a running sum of projected atoms, each weighted by a learned gate; its inner product with the
item's projected text says how similar the item is to what the user liked. The *collaborative* part does
the same with ID embeddings in place of texts (see `bahe_models.collaborative`). With `model.recent` there
are further profile parts, sums in which earlier behaviors fade. The sums are causal, so
all parts come from one pass, and none sees the candidate item, so all can be stored (invariant 7).
Profile and collaborative part are our own additions: on small logs the deep layers alone learn poorly
what these parts express.

With the `target` head the candidate also attends to the raw history; the vectors are the same, but no
longer enough for a score.

Shape letters: N impressions, C channels, S sequences (C, or 1 where the channels are merged), P
positions of all windows, A atoms, D backbone width, V deep part of a vector, K its sums (profile, recent
and collaborative parts), B what a behavior adds to them (profile and collaborative part), F dense
features, X context columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bahe_models.behaviors import BehaviorInput
from bahe_models.collaborative import Collaborative
from bahe_models.config import ModelConfig
from bahe_models.context import ContextEmbedding
from bahe_models.heads import Head
from bahe_models.norms import fuse_norms
from bahe_models.packing import Packing, attend_within, read_packed
from bahe_models.target import TargetAttention, recent_behaviors
from bahe_models.timelines import Int64, Timelines, WindowBatch
from bahe_models.vector_features import VectorFeatures


class UserAggregator(nn.Module):
    """Deep layers over sequences of atom vectors, causal, one pass for all of them; None has no state."""

    def __init__(self, deep: nn.Module | None, width: int) -> None:
        super().__init__()
        if deep is not None:
            attend_within(deep)
            fuse_norms(deep)
        self.deep = deep
        self.start_D = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, inputs_PD: torch.Tensor, packing: Packing) -> torch.Tensor:
        """States [P, D]: at a sequence's position k, the state after its first k behaviors.

        The input at position 0 is replaced with a learned start vector.
        """
        if self.deep is None:
            return torch.zeros_like(inputs_PD)
        start_P1 = (packing.position_P == 0)[:, None]
        return read_packed(self.deep, torch.where(start_P1, self.start_D, inputs_PD), packing)


class Profile(nn.Module):
    """Gated running sums of projected atoms, and the same projection for item texts."""

    def __init__(self, width: int, channels: int, profile_width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, profile_width, bias=False)
        self.gate = nn.Linear(width, channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.behavior_mean_D: torch.Tensor
        self.behavior_deviation_D: torch.Tensor
        self.item_mean_D: torch.Tensor
        self.item_deviation_D: torch.Tensor
        for kind in ("behavior", "item"):
            self.register_buffer(f"{kind}_mean_D", torch.zeros(width))
            self.register_buffer(f"{kind}_deviation_D", torch.ones(width))

    @torch.no_grad()
    def fit(self, behavior_AD: torch.Tensor, item_ID: torch.Tensor, lift_C: torch.Tensor) -> None:
        """Initialise from data: standardisation, the items' principal axes, and each channel's sign.

        Language-model states have a few huge coordinates that carry little information; without
        standardisation they drown the rest. `lift_C` is how much more often than average a channel's users
        click.
        """
        for kind, vectors in (("behavior", behavior_AD), ("item", item_ID)):
            deviation_D, mean_D = torch.std_mean(vectors, dim=0, correction=0)
            getattr(self, f"{kind}_mean_D").copy_(mean_D)
            getattr(self, f"{kind}_deviation_D").copy_(deviation_D.clamp_min(1e-6))
        standard_ID = self.standard_items(item_ID)
        rank = self.projection.out_features
        axes_RD = torch.linalg.svd(standard_ID, full_matrices=False).Vh[:rank]
        scale = (standard_ID @ axes_RD.T).norm(dim=1).mean().clamp_min(1e-6)
        self.projection.weight.zero_()
        self.projection.weight[: len(axes_RD)] = axes_RD / scale
        self.gate.bias.copy_(lift_C)

    def standard_items(self, item_ND: torch.Tensor) -> torch.Tensor:
        """Item atoms [N, D], standardised."""
        return (item_ND - self.item_mean_D) / self.item_deviation_D

    def standard_behaviors(self, atoms: torch.Tensor) -> torch.Tensor:
        """Behaviors' atoms [..., D], standardised."""
        return (atoms - self.behavior_mean_D) / self.behavior_deviation_D

    def items(self, standard_ND: torch.Tensor) -> torch.Tensor:
        """Profile part of item vectors [N, K]."""
        projected: torch.Tensor = self.projection(standard_ND)
        return projected

    def forward(
        self, atoms_PD: torch.Tensor, present_P: torch.Tensor, channel_P: torch.Tensor
    ) -> torch.Tensor:
        """What each behavior adds to its user's sums [P, K]; zero where there is none."""
        standard_PD = self.standard_behaviors(atoms_PD)
        gates_PC = self.gate(standard_PD)
        gate_P1 = gates_PC.gather(1, channel_P[:, None]) * present_P[:, None]
        added_PK: torch.Tensor = self.projection(standard_PD) * gate_P1
        return added_PK


class BaheModel(nn.Module):
    """User vectors from timelines, item vectors from text and ID, and the head on the pair."""

    def __init__(
        self,
        deep: nn.Module,
        *,
        width: int,
        channels: int,
        items: int,
        dense_features: int,
        config: ModelConfig,
        context: Sequence[str] = (),
        vectors: Mapping[str, int] | None = None,
        behaviors: int = 0,
    ) -> None:
        """`items` and `behaviors` are the numbers of ids seen in training.

        `context` names the context columns, in the order of `score`; without any there is no table.
        `vectors` are the widths of vectors of the feature store, by `view:feature`, in that order too.
        """
        super().__init__()
        vector, profile = config.deep_width, config.profile_width
        sequences = 1 if config.merged else channels
        self.config = config
        self.behaviors = BehaviorInput(
            width, channels=channels if config.merged else None, gaps=config.time_gaps
        )
        self.aggregator = UserAggregator(deep if config.deep else None, width)
        self.profile = Profile(width, channels, profile)
        self.user_norm = nn.LayerNorm(sequences * width)
        self.user_projection = nn.Linear(sequences * width, vector)
        self.item_projection = nn.Sequential(nn.Linear(width, vector), nn.GELU(), nn.Linear(vector, vector))
        # Row 0 stands for every item that training has not seen.
        self.item_id = nn.Embedding(items + 1, vector, padding_idx=0)
        nn.init.normal_(self.item_id.weight, std=0.01)
        with torch.no_grad():
            self.item_id.weight[0] = 0
        self.collaborative = (
            Collaborative(behaviors, items, config.id_width) if config.behavior_ids else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.context = context_embedding(context, config)
        self.vectors = VectorFeatures(vectors) if vectors else None
        self.head = Head(
            config.head,
            vector=vector,
            facts=dense_features + len(config.sum_widths),
            hidden=config.head_width,
            dropout=config.dropout,
            crosses=config.cross_layers,
            dense=dense_features,
            alone=config.facts_width,
            extra=(0 if self.context is None else self.context.width)
            + (0 if self.vectors is None else self.vectors.width)
            + (0 if config.vectors_suffice else 2 * profile),
        )
        self.target: TargetAttention | None = None
        if not config.vectors_suffice:
            self.target = TargetAttention(
                channels=channels, profile_width=profile, item_width=config.vector_width
            )

    def behavior_rows(self, atom_ids_A: torch.Tensor) -> torch.Tensor:
        """Each atom's row in the collaborative part [A], for `user_vectors`; 0 if it is unknown."""
        if self.collaborative is None:
            return torch.zeros_like(atom_ids_A)
        return self.collaborative.rows(atom_ids_A)

    def user_vectors(
        self, atoms_AD: torch.Tensor, batch: WindowBatch, id_row_A: torch.Tensor | None = None
    ) -> torch.Tensor:
        """User vectors [N, V + K] of the impressions of a batch planned with the model's `merged`.

        `id_row_A` is each atom's row of the collaborative part (`Collaborative.rows`); without it all
        behaviors count as unseen in training.
        """
        device = self.user_projection.weight.device
        rows_P, channel_P, gap_P = (
            torch.from_numpy(part).to(device) for part in (batch.atoms_P, batch.channel_P, batch.gap_P)
        )
        packing = Packing.of(batch.length_W, device)
        present_P, atom_P = rows_P >= 0, rows_P.clamp_min(0)
        atoms_PD = atoms_AD[atom_P]
        id_row_P = torch.zeros_like(rows_P) if id_row_A is None else id_row_A[atom_P] * present_P
        states_PD = self.aggregator(self.behaviors(atoms_PD, channel_P, gap_P), packing)
        added_PB = self.added(atoms_PD, present_P, channel_P, id_row_P)
        width = self.config.profile_width
        fading = [packing.fading_sums(added_PB[:, :width], half_life) for half_life in self.config.recent]
        sums_PK = joined(packing.running_sums(added_PB), fading, width)
        state_NS = torch.from_numpy(batch.state_NS).to(device)
        behaviors_N = torch.from_numpy(batch.position_NS).to(device).sum(dim=1)
        return self.join_sequences(states_PD[state_NS].float(), sums_PK[state_NS].sum(dim=1), behaviors_N)

    def added(
        self,
        atoms_PD: torch.Tensor,
        present_P: torch.Tensor,
        channel_P: torch.Tensor,
        id_row_P: torch.Tensor,
    ) -> torch.Tensor:
        """What each behavior adds to the sums of profile and collaborative part [P, B]."""
        profile_PB: torch.Tensor = self.profile(atoms_PD, present_P, channel_P).float()
        if self.collaborative is None:
            return profile_PB
        return torch.cat([profile_PB, self.collaborative(id_row_P)], dim=1)

    def join_sequences(
        self, states_NSD: torch.Tensor, sum_NK: torch.Tensor, behaviors_N: torch.Tensor
    ) -> torch.Tensor:
        """User vectors [N, V + K] from the sequences' states, sums and counts of behaviors."""
        deep_NV = self.user_projection(self.dropout(self.user_norm(states_NSD.flatten(1))))
        # A fading sum is of so many behaviors at the most.
        most = [1 / (1 - 0.5 ** (1 / half_life)) for half_life in self.config.recent]
        counts = [behaviors_N, *(behaviors_N.clamp_max(count) for count in most), behaviors_N]
        parts = torch.split(sum_NK, self.config.sum_widths, dim=1)
        scaled = [
            part / (count_N[:, None] + 5).sqrt() for part, count_N in zip(parts, counts, strict=False)
        ]
        return torch.cat([deep_NV.float(), *scaled], dim=1)

    def item_vectors(self, atoms_ND: torch.Tensor, item_N: torch.Tensor) -> torch.Tensor:
        """Item vectors [N, V + K] from the item texts' atoms and rows of the ID table (0: unseen)."""
        standard_ND = self.profile.standard_items(atoms_ND)
        profile_NK = self.profile.items(standard_ND)
        sums = [profile_NK] * (1 + len(self.config.recent))
        if self.collaborative is not None:
            sums.append(self.collaborative.item(item_N))
        if not self.config.item_ids:
            item_N = torch.zeros_like(item_N)
        elif self.training and self.config.item_id_dropout:
            hidden = torch.rand(len(item_N), device=item_N.device) < self.config.item_id_dropout
            item_N = item_N.masked_fill(hidden, 0)
        deep_NV = self.item_projection(standard_ND) + self.item_id(item_N)
        return torch.cat([deep_NV, *sums], dim=1)

    def interests(
        self,
        atoms_AD: torch.Tensor,
        timelines: Timelines,
        user_N: Int64,
        length_NC: Int64,
        item_NV: torch.Tensor,
    ) -> torch.Tensor | None:
        """Target attention of the items to the users' first `length_NC` behaviors [N, 2 K].

        For `score`; None unless the head is `target`.
        """
        if self.target is None:
            return None
        recent_NB = recent_behaviors(timelines, user_N, length_NC, self.config.target_history)
        deep, profile = self.config.deep_width, self.config.profile_width
        interest_NT: torch.Tensor = self.target(
            atoms_AD,
            torch.from_numpy(recent_NB).to(item_NV.device),
            item_NV,
            item_NV[:, deep : deep + profile],
            project=lambda atoms_MD: self.profile.projection(self.profile.standard_behaviors(atoms_MD)),
        )
        return interest_NT

    def score(
        self,
        user_NV: torch.Tensor,
        item_NV: torch.Tensor,
        dense_NF: torch.Tensor,
        context_NX: torch.Tensor | None = None,
        interest_NT: torch.Tensor | None = None,
        vectors: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Click logits [N] of pairs of vectors, dense features, hashed context if any, and `interests`.

        `vectors` are those of the feature store, NaN where unknown.
        """
        width = self.config.deep_width
        products_NK = user_NV[:, width:] * item_NV[:, width:]
        parts = torch.split(products_NK, self.config.sum_widths, dim=1)
        similarities = [part.sum(dim=1, keepdim=True) for part in parts]
        facts = torch.cat([dense_NF, *similarities], dim=1)
        extra = [] if interest_NT is None else [interest_NT]
        if self.context is not None:
            extra.append(self.context(context_NX))
        if self.vectors is not None:
            extra.append(self.vectors(vectors))
        logits: torch.Tensor = self.head(user_NV[:, :width], item_NV[:, :width], facts, extra)
        return logits


def joined(sums_PB: torch.Tensor, fading: Sequence[torch.Tensor], profile_width: int) -> torch.Tensor:
    """The sums of a vector in their order [P, K]: profile, fading, collaborative."""
    profile_PB, collaborative_PB = sums_PB.tensor_split([profile_width], dim=1)
    return torch.cat([profile_PB, *fading, collaborative_PB], dim=1)


def context_embedding(columns: Sequence[str], config: ModelConfig) -> ContextEmbedding | None:
    """The embedding table of these context columns, or None without columns."""
    if not columns:
        return None
    return ContextEmbedding(
        columns,
        buckets=config.context_buckets,
        width=config.context_width,
        dropout=config.context_dropout,
    )
