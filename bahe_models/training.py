"""The trainer: one pass per user timeline, AdamW, early stopping on validation AUC."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bahe_core.errors import BadInput
from bahe_models.backbone import longest_input
from bahe_models.data import Impressions, TrainingData
from bahe_models.encoder import hardware_has_bfloat16
from bahe_models.features import DenseFeatures
from bahe_models.metrics import auc
from bahe_models.model import BaheModel, ModelConfig
from bahe_models.timelines import Int64, WindowConfig, plan_steps, window_batch

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How the model is trained."""

    epochs: int = 4
    """Most passes over the training impressions."""
    patience: int = 1
    """Epochs without a better validation AUC before training stops."""
    impressions_per_step: int = 1000
    learning_rate: float = 1e-3
    """Peak rate of everything but the deep layers."""
    deep_learning_rate: float = 1e-4
    """Peak rate of the deep layers."""
    weight_decay: float = 0.01
    warm_up: float = 0.1
    """Share of the steps in which the rates rise; they fall as a cosine afterwards."""
    gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    bfloat16: bool | None = None
    """Mixed precision; by default where the hardware multiplies bfloat16 matrices itself."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.impressions_per_step < 1:
            raise ValueError("`epochs` and `impressions_per_step` must be at least 1")


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training impressions came to."""

    epoch: int
    train_loss: float
    validation_auc: float
    seconds: float
    """Training alone, without evaluation."""


@dataclass
class Trained:
    """A trained network with its history; the weights are those of the best epoch."""

    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0
    """Training, without evaluation, over all epochs."""


def id_rows(seen: Int64, count: int) -> Int64:
    """Row of an ID table for each of `count` ids: 1.. for those seen in training, 0 for the others."""
    distinct = np.unique(seen)
    rows = np.zeros(count, dtype=np.int64)
    rows[distinct] = np.arange(1, len(distinct) + 1)
    return rows


class Batches:
    """Feeds a model with planned batches of one data set.

    Raises BadInput when a window is longer than the backbone has positions for.
    """

    def __init__(
        self,
        model: BaheModel,
        data: TrainingData,
        dense: DenseFeatures,
        window: WindowConfig,
        *,
        item_row_I: Int64,
        device: torch.device,
        bfloat16: bool,
    ) -> None:
        limit = longest_input(model.aggregator.deep)
        if limit is not None and window.size >= limit:
            raise BadInput(
                f"window.size is {window.size}, but the backbone reads at most {limit - 1} behaviors"
                " after the start position; lower it."
            )
        self.model, self.data, self.dense, self.window = model, data, dense, window
        self.device, self.bfloat16 = device, bfloat16
        self.atoms_AD = torch.from_numpy(data.atoms_AD).to(device)
        self.item_row_I = torch.from_numpy(item_row_I).to(device)
        self.item_atom_I = torch.from_numpy(data.item_atom_I).to(device)

    def dense_features(self, split: Impressions) -> torch.Tensor:
        """Dense features [N, F] of a whole split."""
        values = self.dense.transform(split.columns, split.length_NC, split.time_us_N)
        return torch.from_numpy(values).to(self.device)

    def logits(
        self, split: Impressions, dense_NF: torch.Tensor, rows: Int64, *, share: bool = True
    ) -> torch.Tensor:
        """Click logits of some impressions, by one pass over their users' timelines."""
        batch = window_batch(
            self.data.timelines, split.user_N[rows], split.length_NC[rows], self.window, share=share
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            user_NV = self.model.user_vectors(self.atoms_AD, batch)
        item_N = torch.from_numpy(split.item_N[rows]).to(self.device)
        # Many impressions of a step share an item; each distinct one is projected once.
        distinct_M, place_N = torch.unique(item_N, return_inverse=True)
        item_MV = self.model.item_vectors(
            self.atoms_AD[self.item_atom_I[distinct_M]], self.item_row_I[distinct_M]
        )
        return self.model.score(
            user_NV.float(), item_MV[place_N], dense_NF[torch.from_numpy(rows).to(self.device)]
        )

    @torch.inference_mode()
    def predict(self, split: Impressions, impressions_per_step: int = 4000) -> Scores:
        """Click logits [N] of a split, in its order."""
        self.model.eval()
        dense_NF = self.dense_features(split)
        scores = np.empty(len(split), dtype=np.float64)
        for rows in plan_steps(
            split.user_N, split.length_NC, impressions_per_step=impressions_per_step, rng=None
        ):
            scores[rows] = self.logits(split, dense_NF, rows).cpu().numpy()
        return scores


def build_model(
    deep: nn.Module,
    data: TrainingData,
    dense: DenseFeatures,
    config: ModelConfig,
    item_row_I: Int64,
) -> BaheModel:
    """A fresh model whose profile and wide part start from the training data."""
    train = data.splits["train"]
    model = BaheModel(
        deep,
        width=data.atoms_AD.shape[1],
        channels=len(data.timelines.channels),
        items=int(item_row_I.max()),
        dense_features=len(dense.names),
        config=config,
    )
    used = [np.unique(atoms) for atoms in data.timelines.atoms]
    behaviors = torch.from_numpy(data.atoms_AD[np.unique(np.concatenate(used))])
    items = torch.from_numpy(data.atoms_AD[data.item_atom_I])
    model.profile.fit(behaviors, items, _channel_lift(train))
    # The first prediction is close to the floor itself; training learns what is left to know.
    weights_F = torch.zeros(len(dense.names) + 1)
    weights_F[0], weights_F[-1] = dense.deviation[0], 0.1
    model.head.start_from(weights_F, dense.mean[0])
    return model


def _channel_lift(train: Impressions) -> torch.Tensor:
    """Sign and size with which each channel's behaviors first enter the profile, [C].

    A channel counts by how the share of a user's behaviors in it goes with the user's clicks; at
    least a little, so that every channel's gate gets a gradient.
    """
    share_NC = train.length_NC / np.maximum(train.length_NC.sum(axis=1, keepdims=True), 1)
    centred_NC = share_NC - share_NC.mean(axis=0)
    clicked_N = train.clicked_N - train.clicked_N.mean()
    lift_C = (centred_NC * clicked_N[:, None]).mean(axis=0)
    spread = np.abs(lift_C).max()
    lift_C = lift_C / spread if spread > 0 else np.ones_like(lift_C)
    small = np.where(lift_C < 0, -0.1, 0.1)
    lift_C = np.where(np.abs(lift_C) < 0.1, small, lift_C)
    return torch.from_numpy(lift_C.astype(np.float32))


def train(
    batches: Batches,
    config: TrainingConfig,
    *,
    on_step: Callable[[int, float], None] = lambda impressions, loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Train the model of `batches` in place and leave it with the weights of its best epoch."""
    model, data = batches.model, batches.data
    split = data.splits["train"]
    dense_NF = batches.dense_features(split)
    rng = np.random.default_rng(config.seed)

    def steps() -> Iterator[tuple[Int64, torch.Tensor]]:
        for rows in plan_steps(
            split.user_N, split.length_NC, impressions_per_step=config.impressions_per_step, rng=rng
        ):
            yield rows, batches.logits(split, dense_NF, rows)

    deep = list(model.aggregator.deep.parameters())
    in_deep = {id(parameter) for parameter in deep}
    rest = [p for p in model.parameters() if id(p) not in in_deep]
    groups = [(deep, config.deep_learning_rate), (rest, config.learning_rate)]

    def validate() -> float:
        return auc(data.splits["validation"].clicked_N, batches.predict(data.splits["validation"]))

    return fit(
        model,
        groups,
        steps,
        torch.from_numpy(split.clicked_N).to(batches.device),
        validate,
        config,
        on_step=on_step,
        on_epoch=on_epoch,
    )


def fit(
    model: nn.Module,
    groups: list[tuple[list[nn.Parameter], float]],
    steps: Callable[[], Iterator[tuple[Int64, torch.Tensor]]],
    clicked_N: torch.Tensor,
    validate: Callable[[], float],
    config: TrainingConfig,
    *,
    on_step: Callable[[int, float], None] = lambda impressions, loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """The loop that BAHE and the baselines share; `steps()` yields (rows, logits) for one epoch.

    Every network gets the same optimiser, schedule, clipping and early stopping.
    """
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters],
        weight_decay=config.weight_decay,
    )
    per_epoch = -(-len(clicked_N) // config.impressions_per_step)
    # Users are not split evenly, so an epoch has a few steps more or less than this.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [rate for parameters, rate in groups if parameters],
        total_steps=int(per_epoch * config.epochs * 1.5) + 10,
        pct_start=config.warm_up,
    )
    result, best, waited = Trained(), -np.inf, 0
    weights: dict[str, torch.Tensor] = {}
    for epoch in range(1, config.epochs + 1):
        model.train()
        losses, seen, start = 0.0, 0, time.perf_counter()
        for rows, logits_N in steps():
            target_N = clicked_N[torch.from_numpy(rows).to(clicked_N.device)]
            loss = nn.functional.binary_cross_entropy_with_logits(logits_N, target_N)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_norm)
            optimizer.step()
            schedule.step()
            losses += loss.item() * len(rows)
            seen += len(rows)
            on_step(len(rows), losses / seen)
        seconds = time.perf_counter() - start
        row = Epoch(epoch, losses / seen, validate(), seconds)
        result.history.append(row)
        result.seconds += seconds
        on_epoch(row)
        if row.validation_auc > best:
            best, waited = row.validation_auc, 0
            weights = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            waited += 1
            if waited >= config.patience:
                break
    model.load_state_dict(weights)
    model.eval()
    return result


def precision(config: TrainingConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16 on this device."""
    return hardware_has_bfloat16(device) if config.bfloat16 is None else config.bfloat16


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set for a block, and put back after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
