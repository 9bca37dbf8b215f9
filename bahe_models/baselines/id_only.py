"""A network on the IDs of user and item alone, and the context of the impression if the log has any."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from bahe_models.baselines.network import fit_shuffled, own_settings
from bahe_models.config import ModelConfig, TrainingConfig
from bahe_models.model import context_embedding
from bahe_models.timelines import Int64
from bahe_models.trainer.ctr_training import Scores, context_rows, id_rows, item_id_rows
from bahe_models.trainer.impressions import Impressions, TrainingData
from bahe_models.trainer.training_loop import Epoch, Trained, seeded


class IdOnly(nn.Module):
    """Embeddings of user and item ID and a DNN; row 0 stands for ids unseen in training.

    Context columns are embedded as BAHE embeds them.
    """

    def __init__(
        self,
        users: int,
        items: int,
        config: ModelConfig,
        context: Sequence[str] = (),
        width: int = 32,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.context = context_embedding(context, config)
        context_width = 0 if self.context is None else self.context.width
        self.user = nn.Embedding(users + 1, width)
        self.item = nn.Embedding(items + 1, width)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.01)
        self.head = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(3 * width + context_width, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(
        self, user_N: torch.Tensor, item_N: torch.Tensor, context_NX: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Click logits [N] from rows of the two ID tables and hashed context."""
        user_NV, item_NV = self.user(user_N), self.item(item_N)
        parts = [user_NV, item_NV, user_NV * item_NV]
        if self.context is not None:
            parts.append(self.context(context_NX))
        logits: torch.Tensor = self.head(torch.cat(parts, dim=1))
        return logits.squeeze(-1)


def train_id_only(
    data: TrainingData,
    config: TrainingConfig,
    *,
    model_config: ModelConfig | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[Callable[[Impressions], Scores], Trained]:
    """Train the ID-only network; returns its scoring function and its history.

    Its settings suit a small network: shuffled impressions, smaller steps and more epochs than BAHE,
    and early stopping likewise. Context is embedded as `model_config` says.
    """
    config = own_settings(config, epochs=20, impressions_per_step=256)
    split = data.splits["train"]
    users = id_rows(split.user_N, data.timelines.users)
    items = item_id_rows(split.item_N, data.item_ids)
    with seeded(config.seed):
        model = IdOnly(int(users.max()), int(items.max()), model_config or ModelConfig(), data.context)

        def logits(part: Impressions, rows: Int64, *, hide: bool) -> torch.Tensor:
            user_N = torch.from_numpy(users[part.user_N[rows]])
            item_N = torch.from_numpy(items[part.item_N[rows]])
            if hide:  # so that row 0 is trained, and unseen users are not random noise
                user_N = user_N.masked_fill(torch.rand(len(rows)) < 0.2, 0)
                item_N = item_N.masked_fill(torch.rand(len(rows)) < 0.1, 0)
            context_NX = context_rows(part, rows, user_N.device)
            result: torch.Tensor = model(user_N, item_N, context_NX)
            return result

        @torch.inference_mode()
        def score(part: Impressions) -> Scores:
            model.eval()
            return logits(part, np.arange(len(part)), hide=False).numpy().astype(np.float64)

        trained = fit_shuffled(
            model,
            data,
            config,
            logits=lambda rows: logits(split, rows, hide=True),
            score=score,
            on_epoch=on_epoch,
        )
    return score, trained
