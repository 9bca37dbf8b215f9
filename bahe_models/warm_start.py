"""Going on from yesterday's model: its weights, its standardisation and what it knows of each item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bahe_core.errors import BadInput
from bahe_models.artifact import Artifact
from bahe_models.model import ModelConfig
from bahe_models.timelines import Int64
from bahe_models.training import Batches, table_ids

_ID_TABLE = "item_id.weight"
_WIDTHS = ("deep_width", "profile_width", "head_width")


def known_items(artifact: Artifact, item_ids: Sequence[str | int]) -> Int64:
    """Which of these items the artifact has an ID embedding for, as positions.

    With them in the new ID table, an item that today's training rows lack keeps what was learned.
    """
    known = set(artifact.item_ids)
    return np.flatnonzero([item in known for item in item_ids]).astype(np.int64)


def require_fit(
    artifact: Artifact, *, encoder_version: str, channels: Sequence[str], config: ModelConfig
) -> None:
    """Raises BadInput when a model of this configuration cannot start from the artifact."""
    if artifact.encoder_version != encoder_version:
        raise BadInput(
            f"{artifact.model_version} reads vectors of {artifact.encoder_version}, and these are of"
            f" {encoder_version}; train without --warm-start."
        )
    if tuple(artifact.dense.channels) != tuple(channels):
        raise BadInput(
            f"{artifact.model_version} knows the channels {', '.join(artifact.dense.channels)}, not"
            f" {', '.join(channels)}; train without --warm-start."
        )
    for name in _WIDTHS:
        theirs, ours = (getattr(c, name) for c in (artifact.model.config, config))
        if theirs != ours:
            raise BadInput(
                f"{artifact.model_version} has model.{name} {theirs}, not {ours}; set it back, or train"
                " without --warm-start."
            )


@torch.no_grad()
def start_from(artifact: Artifact, batches: Batches, *, encoder_version: str) -> None:
    """Let a fresh model predict what the artifact does, before its first step.

    Weights are taken where their shapes agree. Rows of the ID table go by item id; an item that is new
    starts at zero, as the artifact's row for unseen items is. The dense features take the artifact's
    standardisation, which its weights belong to. Raises BadInput when the two do not fit together.
    """
    require_fit(
        artifact,
        encoder_version=encoder_version,
        channels=batches.data.timelines.channels,
        config=batches.model.config,
    )
    own = batches.model.state_dict()
    theirs = artifact.model.state_dict()
    for name, value in theirs.items():
        if name != _ID_TABLE and name in own and own[name].shape == value.shape:
            own[name].copy_(value)
    ids = table_ids(batches.item_row_I.cpu().numpy(), batches.data.item_ids)
    # Row 0, of unseen items, is zero; so is what an item starts from that the artifact has not seen.
    rows = torch.cat([torch.zeros(1, dtype=torch.long), artifact.id_table_rows(ids)])
    own[_ID_TABLE].copy_(theirs[_ID_TABLE].cpu()[rows])
    batches.dense = artifact.dense
    batches.logit_shift = artifact.logit_shift
