"""Warm start from yesterday's model: its weights, standardisation and ID embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from bahe_core.errors import BadInput
from bahe_models.artifact import Artifact
from bahe_models.config import ModelConfig
from bahe_models.heads import silence
from bahe_models.timelines import Int64
from bahe_models.trainer.ctr_training import Batches, table_ids

_ATOM_IDS = "collaborative.atom_ids_B"
_ID_TABLES = (_ATOM_IDS, "item_id.weight", "collaborative.item.weight", "collaborative.behavior.weight")
_SHAPE_FIELDS = (
    "head",
    "deep",
    "deep_width",
    "profile_width",
    "recent",
    "head_width",
    "channels",
    "behavior_ids",
    "item_ids",
    "id_width",
)
_CONTEXT_FIELDS = ("context_buckets", "context_width")

_AFRESH = "train afresh, without --warm-start (for a night: --retrain fresh)"


def known_items(artifact: Artifact, item_ids: Sequence[str | int]) -> Int64:
    """Positions of the items that the artifact has ID embeddings for.

    With these in the new ID table, an item absent from today's training rows keeps what was learned.
    """
    embedded = set(artifact.item_ids)
    return np.flatnonzero([item in embedded for item in item_ids]).astype(np.int64)


def known_behaviors(artifact: Artifact, atom_ids: Int64) -> Int64:
    """Positions of the atoms that the artifact's collaborative part knows."""
    return np.flatnonzero(artifact.model.behavior_rows(torch.tensor(atom_ids)).numpy())


def require_fit(
    artifact: Artifact,
    *,
    encoder_version: str,
    channels: Sequence[str],
    context: Sequence[str],
    numeric: Sequence[str],
    vectors: Mapping[str, int],
    config: ModelConfig,
) -> None:
    """Raises BadInput when a model of this configuration cannot start from the artifact."""
    if artifact.encoder_version != encoder_version:
        raise BadInput(
            f"{artifact.model_version} reads vectors of {artifact.encoder_version}, but these are of"
            f" {encoder_version}; {_AFRESH}."
        )
    for kind, theirs, ours in (
        ("channels", artifact.dense.channels, channels),
        ("context columns", artifact.context_columns, context),
        ("numeric features", artifact.dense.numeric, numeric),
        ("vectors", _described(artifact.vectors), _described(vectors)),
    ):
        if tuple(theirs) != tuple(ours):
            raise BadInput(
                f"{artifact.model_version} has the {kind} {', '.join(theirs) or 'none'}, not"
                f" {', '.join(ours) or 'none'}; {_AFRESH}."
            )
    if artifact.model.config.time_gaps and not config.time_gaps:
        raise BadInput(
            f"{artifact.model_version} reads time gaps; set model.time_gaps to true, or {_AFRESH}."
        )
    if artifact.model.config.facts_width not in (0, config.facts_width):
        raise BadInput(
            f"{artifact.model_version} has model.facts_width {artifact.model.config.facts_width}, not"
            f" {config.facts_width}; set it back, or {_AFRESH}."
        )
    of_head = ("cross_layers",) if config.head == "dcn" else ()
    for name in (*_SHAPE_FIELDS, *of_head, *(_CONTEXT_FIELDS if context else ())):
        their_value, our_value = (getattr(c, name) for c in (artifact.model.config, config))
        if their_value != our_value:
            raise BadInput(
                f"{artifact.model_version} has model.{name} {their_value}, not {our_value}; set it back, or"
                f" {_AFRESH}."
            )


def _described(vectors: Mapping[str, int]) -> list[str]:
    return [f"{name} of {width} numbers" for name, width in vectors.items()]


@torch.no_grad()
def start_from(artifact: Artifact, batches: Batches, *, encoder_version: str) -> None:
    """Make a fresh model predict what the artifact does, before its first step.

    Weights are copied where their shapes agree. Rows of the ID tables are matched by id; a new item or
    behavior starts at zero, like the artifact's row for unseen ones; so do embeddings of time gaps, and
    what a network on the facts alone says, that the artifact does not have. The dense features take the
    artifact's standardisation, which its weights depend on. Raises BadInput when the two do not fit
    together.
    """
    require_fit(
        artifact,
        encoder_version=encoder_version,
        channels=batches.data.timelines.channels,
        context=batches.data.context,
        numeric=batches.data.numeric,
        vectors=batches.data.vectors,
        config=batches.model.config,
    )
    own = batches.model.state_dict()
    theirs = artifact.model.state_dict()
    for name, value in theirs.items():
        if name not in _ID_TABLES and name in own and own[name].shape == value.shape:
            own[name].copy_(value)
    ids = table_ids(batches.item_row_I.cpu().numpy(), batches.data.item_ids)
    item_rows = artifact.id_table_rows(ids)
    rows = {"item_id.weight": item_rows, "collaborative.item.weight": item_rows}
    if _ATOM_IDS in own:
        rows["collaborative.behavior.weight"] = artifact.model.behavior_rows(own[_ATOM_IDS].cpu())
    for name in own.keys() & rows.keys():
        # Row 0, for unseen ids, is zero; ids that the artifact has not seen start from it.
        with_unseen = torch.cat([torch.zeros(1, dtype=torch.long), rows[name]])
        own[name].copy_(theirs[name].cpu()[with_unseen])
    if artifact.model.head.alone is None and batches.model.head.alone is not None:
        silence(batches.model.head.alone)
    batches.dense = artifact.dense
    batches.logit_shift = artifact.logit_shift
