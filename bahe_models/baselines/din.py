"""Deep Interest Network (Zhou et al., KDD 2018, arXiv 1706.06978) on IDs, with the same statistics and
context as BAHE.

Shape letters: N impressions, H behaviors of a history, V width of an ID embedding, F dense features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from bahe_models.baselines.network import fit_shuffled, own_settings
from bahe_models.config import ModelConfig, TrainingConfig
from bahe_models.features import DenseFeatures
from bahe_models.model import context_embedding
from bahe_models.target import recent_behaviors
from bahe_models.timelines import Int64
from bahe_models.trainer.ctr_training import Scores, context_rows, id_rows, item_id_rows
from bahe_models.trainer.impressions import Impressions, TrainingData
from bahe_models.trainer.training_loop import Epoch, Trained, seeded

HISTORY = 50
"""Latest behaviors of each channel that the network attends to."""


class Din(nn.Module):
    """Target attention of the candidate's ID over behavior IDs, then a DNN with the statistics.

    An atom (a distinct behavior, channel included) is the ID of a behavior. Row 0 of each table
    stands for ids unseen in training. Context columns are embedded as BAHE embeds them.
    """

    def __init__(
        self,
        behaviors: int,
        items: int,
        dense_features: int,
        config: ModelConfig,
        context: Sequence[str] = (),
        width: int = 32,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.context = context_embedding(context, config)
        context_width = 0 if self.context is None else self.context.width
        self.behavior = nn.Embedding(behaviors + 1, width)
        self.item = nn.Embedding(items + 1, width)
        for table in (self.behavior, self.item):
            nn.init.normal_(table.weight, std=0.1)
        # The activation unit reads behavior, candidate, difference and product. The difference is a
        # linear combination of the first two, so one layer over three parts is the same function.
        self.of_behavior = nn.Linear(width, width)
        self.of_item = nn.Linear(width, width, bias=False)
        self.of_product = nn.Linear(width, width, bias=False)
        self.weight = nn.Linear(width, 1)
        self.head = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(3 * width + dense_features + context_width, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )
        self.wide = nn.Linear(dense_features, 1)
        nn.init.zeros_(self.wide.weight)

    def forward(
        self,
        behavior_NH: torch.Tensor,
        present_NH: torch.Tensor,
        item_N: torch.Tensor,
        dense_NF: torch.Tensor,
        context_NX: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Click logits [N] from rows of the ID tables, dense features and hashed context."""
        behavior_NHV, item_NV = self.behavior(behavior_NH), self.item(item_N)
        unit_NHV = nn.functional.silu(
            self.of_behavior(behavior_NHV)
            + self.of_item(item_NV)[:, None]
            + self.of_product(behavior_NHV * item_NV[:, None])
        )
        # No softmax, as in the paper: the sum keeps the strength of the interest. Our scaling by the
        # square root of the count keeps long histories from drowning the head.
        weight_NH = self.weight(unit_NHV).squeeze(-1) * present_NH
        count_N1 = present_NH.sum(dim=1, keepdim=True)
        interest_NV = torch.einsum("nh,nhv->nv", weight_NH, behavior_NHV) / (count_N1 + 1).sqrt()
        parts = [interest_NV, item_NV, interest_NV * item_NV, dense_NF]
        if self.context is not None:
            parts.append(self.context(context_NX))
        logits: torch.Tensor = self.head(torch.cat(parts, dim=1)) + self.wide(dense_NF)
        return logits.squeeze(-1)


def train_din(
    data: TrainingData,
    dense: DenseFeatures,
    config: TrainingConfig,
    *,
    model_config: ModelConfig | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[Callable[[Impressions], Scores], Trained]:
    """Train DIN on shuffled impressions; returns its scoring function and its history.

    Like BAHE it starts from the floor and is stopped early, with step size and patience that suit it.
    Context is embedded as `model_config` says.
    """
    config = own_settings(config, epochs=8, impressions_per_step=512)
    split = data.splits["train"]
    seen = recent_behaviors(data.timelines, split.user_N, split.length_NC, HISTORY)
    behaviors = id_rows(seen[seen >= 0], len(data.atoms_AD))
    items = item_id_rows(split.item_N, data.item_ids)
    with seeded(config.seed):
        model = Din(
            int(behaviors.max(initial=0)),
            int(items.max()),
            len(dense.names),
            model_config or ModelConfig(),
            data.context,
        )
        with torch.no_grad():
            model.wide.weight[0, 0] = dense.deviation[0]
            model.wide.bias[0] = dense.mean[0]

        def features(part: Impressions) -> torch.Tensor:
            return torch.from_numpy(dense.transform(part.columns, part.length_NC, part.time_us_N))

        def logits(
            part: Impressions, dense_NF: torch.Tensor, rows: Int64, *, hide: float = 0.0
        ) -> torch.Tensor:
            recent = recent_behaviors(data.timelines, part.user_N[rows], part.length_NC[rows], HISTORY)
            item_N = torch.from_numpy(items[part.item_N[rows]])
            if hide:  # so that row 0 is trained, and unseen items are not random noise
                item_N = item_N.masked_fill(torch.rand(len(rows)) < hide, 0)
            result: torch.Tensor = model(
                torch.from_numpy(behaviors[np.maximum(recent, 0)]),
                torch.from_numpy(recent >= 0),
                item_N,
                dense_NF[torch.from_numpy(rows)],
                context_rows(part, rows, dense_NF.device),
            )
            return result

        dense_NF = features(split)

        @torch.inference_mode()
        def score(part: Impressions) -> Scores:
            model.eval()
            part_NF = features(part)
            scores = [
                logits(part, part_NF, rows).numpy().astype(np.float64)
                for rows in np.array_split(np.arange(len(part)), max(1, len(part) // 2048))
            ]
            return np.concatenate(scores)

        trained = fit_shuffled(
            model,
            data,
            config,
            logits=lambda rows: logits(split, dense_NF, rows, hide=0.1),
            score=score,
            on_epoch=on_epoch,
        )
    return score, trained
