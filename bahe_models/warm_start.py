"""Going on from yesterday's model: its weights, its standardisation and what it knows of each id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bahe_core.errors import BadInput
from bahe_models.artifact import Artifact
from bahe_models.config import ModelConfig
from bahe_models.ctr_training import Batches, table_ids
from bahe_models.timelines import Int64

_ATOM_IDS = "collaborative.atom_ids_B"
_OF_IDS = (_ATOM_IDS, "item_id.weight", "collaborative.item.weight", "collaborative.behavior.weight")
_SHAPES = ("head", "deep_width", "profile_width", "head_width", "channels", "behavior_ids", "id_width")
_OF_CONTEXT = ("context_buckets", "context_width")


_AFRESH = "train afresh, without --warm-start (a night: --retrain fresh)"


def known_items(artifact: Artifact, item_ids: Sequence[str | int]) -> Int64:
    """Which of these items the artifact has an ID embedding for, as positions.

    With them in the new ID table, an item that today's training rows lack keeps what was learned.
    """
    known = set(artifact.item_ids)
    return np.flatnonzero([item in known for item in item_ids]).astype(np.int64)


def known_behaviors(artifact: Artifact, atom_ids: Int64) -> Int64:
    """Which of these atoms the artifact's collaborative part knows, as positions."""
    return np.flatnonzero(artifact.model.behavior_rows(torch.tensor(atom_ids)).numpy())


def require_fit(
    artifact: Artifact,
    *,
    encoder_version: str,
    channels: Sequence[str],
    context: Sequence[str],
    config: ModelConfig,
) -> None:
    """Raises BadInput when a model of this configuration cannot start from the artifact."""
    if artifact.encoder_version != encoder_version:
        raise BadInput(
            f"{artifact.model_version} reads vectors of {artifact.encoder_version}, and these are of"
            f" {encoder_version}; {_AFRESH}."
        )
    for what, known, wanted in (
        ("channels", artifact.dense.channels, channels),
        ("context columns", artifact.context_columns, context),
    ):
        if tuple(known) != tuple(wanted):
            raise BadInput(
                f"{artifact.model_version} knows the {what} {', '.join(known) or 'none'}, not"
                f" {', '.join(wanted) or 'none'}; {_AFRESH}."
            )
    if artifact.model.config.time_gaps and not config.time_gaps:
        raise BadInput(
            f"{artifact.model_version} reads time gaps; set model.time_gaps to true, or {_AFRESH}."
        )
    for name in (*_SHAPES, *(_OF_CONTEXT if context else ())):
        theirs, ours = (getattr(c, name) for c in (artifact.model.config, config))
        if theirs != ours:
            raise BadInput(
                f"{artifact.model_version} has model.{name} {theirs}, not {ours}; set it back, or"
                f" {_AFRESH}."
            )


@torch.no_grad()
def start_from(artifact: Artifact, batches: Batches, *, encoder_version: str) -> None:
    """Let a fresh model predict what the artifact does, before its first step.

    Weights are taken where their shapes agree. Rows of the ID tables go by id; an item or behavior that
    is new starts at zero, as the artifact's row for unseen ones is; so do embeddings of time gaps that
    the artifact does not have. The dense features take the artifact's standardisation, which its
    weights belong to. Raises BadInput when the two do not fit together.
    """
    require_fit(
        artifact,
        encoder_version=encoder_version,
        channels=batches.data.timelines.channels,
        context=batches.data.context,
        config=batches.model.config,
    )
    own = batches.model.state_dict()
    theirs = artifact.model.state_dict()
    for name, value in theirs.items():
        if name not in _OF_IDS and name in own and own[name].shape == value.shape:
            own[name].copy_(value)
    ids = table_ids(batches.item_row_I.cpu().numpy(), batches.data.item_ids)
    of_items = artifact.id_table_rows(ids)
    rows = {"item_id.weight": of_items, "collaborative.item.weight": of_items}
    if _ATOM_IDS in own:
        rows["collaborative.behavior.weight"] = artifact.model.behavior_rows(own[_ATOM_IDS].cpu())
    for name in own.keys() & rows.keys():
        # Row 0, of unseen ids, is zero; so is what an id starts from that the artifact has not seen.
        with_unseen = torch.cat([torch.zeros(1, dtype=torch.long), rows[name]])
        own[name].copy_(theirs[name].cpu()[with_unseen])
    batches.dense = artifact.dense
    batches.logit_shift = artifact.logit_shift
