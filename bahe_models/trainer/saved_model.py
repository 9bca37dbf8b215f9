"""What a saved model says of impressions that are in memory."""

from __future__ import annotations

import numpy as np
import torch

from bahe_models.artifact import Artifact
from bahe_models.metrics import Float
from bahe_models.trainer.impressions import Impressions, TrainingData


def logits_of(artifact: Artifact, data: TrainingData, split: Impressions, where: torch.device) -> Float:
    """A saved model's calibrated logits [N] of some impressions of `data`, which is of its encoder."""
    artifact.model.to(where)
    clicks_N = artifact.score_timelines(
        torch.from_numpy(data.atoms_AD).to(where),
        data.atom_ids,
        data.timelines,
        split.user_N,
        split.length_NC,
        data.item_atom_I[split.item_N],
        [data.item_ids[i] for i in split.item_N.tolist()],
        split.columns,
        split.time_us_N,
        split.context_NX,
        split.vectors,
    )
    clipped = np.clip(clicks_N, 1e-12, 1 - 1e-12)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
