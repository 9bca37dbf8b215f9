"""The trainer of BAHE: one pass per user timeline, and the model and batches it starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bahe_core.errors import BadInput
from bahe_models.backbone import longest_input, recompute_activations
from bahe_models.config import POSITIONS_PER_PASS, ModelConfig, TrainingConfig, WindowConfig
from bahe_models.encoder import hardware_has_bfloat16
from bahe_models.features import DenseFeatures
from bahe_models.heads import silence
from bahe_models.metrics import auc
from bahe_models.model import BaheModel
from bahe_models.passes import bounded_passes, plan_passes
from bahe_models.sampling import sampled_rows
from bahe_models.timelines import Int64, plan_steps, window_batch
from bahe_models.trainer.checkpoint import Checkpoint
from bahe_models.trainer.distributed import Processes
from bahe_models.trainer.facts_start import fit_to_facts
from bahe_models.trainer.impressions import Impressions, TrainingData
from bahe_models.trainer.pretraining import pretrain
from bahe_models.trainer.sharding import is_sharded
from bahe_models.trainer.training_loop import Epoch, Task, Trained, fit

Scores = npt.NDArray[np.float64]

IMPRESSIONS_PER_PASS = 4000
"""At most, where nothing is trained; `Batches.positions_per_pass` bounds them too."""


def id_rows(seen: Int64, count: int) -> Int64:
    """Row of an ID table for each of `count` ids: 1.. for those seen in training, 0 for the others."""
    distinct = np.unique(seen)
    rows = np.zeros(count, dtype=np.int64)
    rows[distinct] = np.arange(1, len(distinct) + 1)
    return rows


def item_id_rows(seen: Int64, item_ids: Sequence[str | int]) -> Int64:
    """Row of the ID table [I] of each item row: 1.. for items of the rows `seen`, 0 for the others.

    Rows of one item, which are adjacent in `item_ids`, share an ID.
    """
    is_new = [a != b for a, b in pairwise(item_ids)]
    item_I = np.concatenate([[0], np.cumsum(is_new, dtype=np.int64)])[: len(item_ids)]
    rows_I: Int64 = id_rows(item_I[seen], len(item_ids))[item_I]
    return rows_I


def table_ids(item_row_I: Int64, item_ids: Sequence[str | int]) -> tuple[str | int, ...]:
    """The ids of an ID table's rows 1, 2, ...; `item_row_I` comes from `item_id_rows`."""
    id_of_row = dict(zip(item_row_I.tolist(), item_ids, strict=True))
    return tuple(id_of_row[row] for row in sorted(id_of_row) if row)


def seen_atoms(data: TrainingData) -> Int64:
    """Rows of the atoms in the timelines of the training impressions."""
    timelines = data.timelines
    seen = []
    for longest_U, offsets, atoms in zip(
        data.known_lengths().T, timelines.offsets, timelines.atoms, strict=True
    ):
        position_B = np.arange(len(atoms)) - np.repeat(offsets[:-1], np.diff(offsets))
        seen.append(atoms[position_B < np.repeat(longest_U, np.diff(offsets))])
    return np.unique(np.concatenate(seen))


def context_rows(split: Impressions, rows: Int64, device: torch.device) -> torch.Tensor | None:
    """Hashed context [n, X] of some impressions; None if the log has none."""
    if split.context_NX is None:
        return None
    return torch.from_numpy(split.context_NX[rows]).to(device)


def fit_dense(data: TrainingData) -> DenseFeatures:
    """Dense features standardised on the training rows."""
    train = data.splits["train"]
    return DenseFeatures.fit(
        train.columns,
        train.length_NC,
        train.time_us_N,
        channels=data.timelines.channels,
        click_rate=float(train.clicked_N.mean()),
        numeric=data.numeric,
    )


def require_fit(deep: nn.Module, data: TrainingData, window: WindowConfig) -> None:
    """Raises BadInput when the deep layers cannot read these atoms, or windows of this size."""
    hf_deep: Any = deep
    width, expected = data.atoms_AD.shape[1], int(hf_deep.config.hidden_size)
    if width != expected:
        raise BadInput(
            f"the atom vectors have width {width}, but the backbone reads {expected}; encode them with the"
            " same backbone."
        )
    limit = longest_input(deep)
    if limit is not None and window.size >= limit:
        raise BadInput(
            f"window.size is {window.size}, but the backbone reads at most {limit - 1} behaviors"
            " after the start position; lower it."
        )


def refuse_deep(config: TrainingConfig, *, shard: bool = False) -> None:
    """Raises BadInput on what is of the deep layers, for a model without them."""
    if config.pretraining_epochs:
        raise BadInput(
            "training.pretraining_epochs is of the deep layers, and model.deep is false; set it to 0, or"
            " model.deep to true."
        )
    if shard:
        raise BadInput("--shard is of the deep layers, and model.deep is false; leave one of them out.")


class Batches:
    """Feeds a model with planned batches of one data set.

    Raises BadInput when the model's deep layers cannot read the data; see `require_fit`.
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
        if model.aggregator.deep is not None:
            require_fit(model.aggregator.deep, data, window)
        self.model, self.data, self.dense, self.window = model, data, dense, window
        self.device, self.bfloat16 = device, bfloat16
        self.logit_shift = 0.0
        """Corrects the model's logits for sampling and weights; `train` sets it."""
        self.positions_per_pass = POSITIONS_PER_PASS
        """Most positions that the deep layers read at once; `train` sets it."""
        self.atoms_AD = torch.from_numpy(data.atoms_AD).to(device)
        self.item_row_I = torch.from_numpy(item_row_I).to(device)
        self.item_atom_I = torch.from_numpy(data.item_atom_I).to(device)
        self.id_row_A = model.behavior_rows(torch.tensor(data.atom_ids, device=device))

    def dense_features(self, split: Impressions) -> torch.Tensor:
        """Dense features [N, F] of a whole split."""
        values = self.dense.transform(split.columns, split.length_NC, split.time_us_N)
        return torch.from_numpy(values).to(self.device)

    def passes(self, split: Impressions, rows: Int64) -> list[Int64]:
        """The rows of a step in passes of at most `positions_per_pass` positions; see `bounded_passes`."""
        parts = bounded_passes(
            split.user_N[rows],
            split.length_NC[rows],
            self.window,
            positions=self.positions_per_pass,
            merged=self.model.config.merged,
        )
        return [rows[part] for part in parts]

    def plan(self, split: Impressions) -> Iterator[Int64]:
        """The rows of each pass over a whole split, where nothing is trained."""
        return plan_passes(
            split.user_N,
            split.length_NC,
            self.window,
            impressions=IMPRESSIONS_PER_PASS,
            positions=self.positions_per_pass,
            merged=self.model.config.merged,
        )

    def logits(
        self, split: Impressions, dense_NF: torch.Tensor, rows: Int64, *, share: bool = True
    ) -> torch.Tensor:
        """The model's uncorrected logits of some impressions, by one pass over their users' timelines."""
        user_NV, item_NV, interest_NT = self.pair_vectors(split, rows, share=share)
        dense_NF = dense_NF[torch.from_numpy(rows).to(self.device)]
        return self.model.score(
            user_NV,
            item_NV,
            dense_NF,
            context_rows(split, rows, self.device),
            interest_NT,
            self.given_vectors(split, rows),
        )

    def given_vectors(self, split: Impressions, rows: Int64) -> list[torch.Tensor]:
        """The feature store's vectors of some impressions, [n, D] each, in the order of the model's."""
        return [torch.from_numpy(split.vectors[name][rows]).to(self.device) for name in self.data.vectors]

    def pair_vectors(
        self, split: Impressions, rows: Int64, *, share: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the head reads of some impressions beside features: user and item vectors, `interests`."""
        batch = window_batch(
            self.data.timelines,
            split.user_N[rows],
            split.length_NC[rows],
            self.window,
            share=share,
            merged=self.model.config.merged,
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            user_NV = self.model.user_vectors(self.atoms_AD, batch, self.id_row_A)
        item_N = torch.from_numpy(split.item_N[rows]).to(self.device)
        # Many impressions of a step share an item; each distinct one is projected once.
        distinct_M, place_N = torch.unique(item_N, return_inverse=True)
        item_MV = self.model.item_vectors(
            self.atoms_AD[self.item_atom_I[distinct_M]], self.item_row_I[distinct_M]
        )
        item_NV = item_MV[place_N]
        interest_NT = self.model.interests(
            self.atoms_AD, self.data.timelines, split.user_N[rows], split.length_NC[rows], item_NV
        )
        return user_NV.float(), item_NV, interest_NT

    @torch.no_grad()  # in inference mode FSDP would keep tensors that cannot be trained on afterwards
    def predict(self, split: Impressions) -> Scores:
        """Click logits [N] of a split, in its order, corrected for sampling and weights.

        With several processes each computes some of the passes, and all get every score. With a sharded
        model all take equally many passes, some without rows.
        """
        self.model.eval()
        processes = Processes.here()
        dense_NF = self.dense_features(split)
        scores = np.zeros(len(split), dtype=np.float64)
        passes = list(self.plan(split))
        if is_sharded(self.model):
            passes += [np.empty(0, dtype=np.int64)] * (-len(passes) % processes.size)
        for rows in passes[processes.rank :: processes.size]:
            scores[rows] = self.logits(split, dense_NF, rows).cpu().numpy()
        if processes.size > 1:
            scores = processes.sum(torch.from_numpy(scores).to(self.device)).cpu().numpy()
        return scores + self.logit_shift


def build_model(
    deep: nn.Module,
    data: TrainingData,
    dense: DenseFeatures,
    config: ModelConfig,
    item_row_I: Int64,
    *,
    also_known: Int64 | None = None,
    on_facts: Callable[[int], object] = lambda impressions: None,
) -> BaheModel:
    """A fresh model whose profile and wide part start from the training data.

    Its collaborative part knows the behaviors before the training impressions, and the atoms in the
    rows `also_known`, which a warm start brings; it brings the head's weights as well. `on_facts` is the
    `on_step` of `fit_to_facts`.
    """
    train = data.splits["train"]
    if not dense.numeric:
        config = replace(config, facts_width=0)
    seen = seen_atoms(data)
    if also_known is not None:
        seen = np.union1d(seen, also_known)
    model = BaheModel(
        deep,
        width=data.atoms_AD.shape[1],
        channels=len(data.timelines.channels),
        items=int(item_row_I.max()),
        dense_features=len(dense.names),
        config=config,
        context=data.context,
        vectors=data.vectors,
        behaviors=len(seen),
    )
    if model.vectors is not None:
        model.vectors.fit(train.vectors)
    if model.collaborative is not None:
        model.collaborative.atom_ids_B.copy_(torch.from_numpy(np.sort(data.atom_ids[seen])))
    used = [np.unique(atoms) for atoms in data.timelines.atoms]
    behaviors = torch.from_numpy(data.atoms_AD[np.unique(np.concatenate(used))])
    items = torch.from_numpy(data.atoms_AD[data.item_atom_I])
    model.profile.fit(behaviors, items, _channel_lift(train))
    # The first predictions are close to the floor itself, or to what the dense features say by themselves;
    # training learns the rest.
    weights_F = torch.zeros(model.head.wide.in_features)
    weights_F[len(dense.names) :] = 0.1
    if model.collaborative is not None:
        weights_F[-1] = 0.3
    if model.head.alone is None:
        weights_F[0] = dense.deviation[0]
        model.head.start_from(weights_F, dense.mean[0])
        return model
    model.head.start_from(weights_F, 0.0)
    silence(model.head.hidden)  # what it reads at random would drown what is fitted
    if also_known is None:  # else the weights come from an earlier model
        values_NF = dense.transform(train.columns, train.length_NC, train.time_us_N)
        fit_to_facts(model.head.alone, values_NF, train.clicked_N, on_step=on_facts)
    return model


def _channel_lift(train: Impressions) -> torch.Tensor:
    """The weight with which each channel's behaviors first enter the profile, [C].

    It is the covariance of clicks with the channel's share of a user's behaviors, scaled to at most 1; at
    least 0.1 in size, so that every channel's gate gets a gradient.
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
    checkpoint: Checkpoint | None = None,
    stop_after: int | None = None,
    on_step: Callable[[int, float], None] = lambda impressions, loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_resume: Callable[[int], None] = lambda impressions: None,
    on_pretraining: Callable[[int, float], None] = lambda behaviors, loss: None,
) -> Trained:
    """Train the model of `batches` in place and leave it with the weights of its best epoch.

    Under torchrun every process calls this with the same arguments; see `bahe_models.trainer.distributed`.
    `checkpoint`, `stop_after`, `on_step`, `on_epoch` and `on_resume` are those of `fit`, `on_pretraining`
    is `pretrain`'s `on_step`. A run killed during pre-training starts it again. Raises BadInput before any
    step when the data cannot be trained on, or the checkpoint belongs to another run.
    """
    model, data = batches.model, batches.data
    data.check()
    if model.aggregator.deep is None:
        refuse_deep(config)
    if config.pretraining_epochs and is_sharded(model):
        raise BadInput(
            "training.pretraining_epochs does not work with --shard; train with it once without --shard,"
            " then --warm-start from that model."
        )
    if config.pretraining_epochs and (checkpoint is None or not checkpoint.path.is_file()):
        pretrain(model, data, batches.window, config, bfloat16=batches.bfloat16, on_step=on_pretraining)
    batches.positions_per_pass = config.positions_per_pass
    split = data.splits["train"]
    dense_NF = batches.dense_features(split)
    with torch.no_grad():
        # Keeps the first predictions as they are: subtracts what `predict` will add from now on.
        model.head.wide.bias.add_(batches.logit_shift - config.logit_shift)
    batches.logit_shift = config.logit_shift

    def plan(rng: np.random.Generator) -> Iterator[Int64]:
        kept = sampled_rows(split.clicked_N, config.negative_rate, rng)
        for rows in plan_steps(
            split.user_N[kept],
            split.length_NC[kept],
            impressions_per_step=config.impressions_per_step,
            rng=rng,
            merged=model.config.merged,
        ):
            yield kept[rows]

    layers = model.aggregator.deep
    deep = [] if layers is None else list(layers.parameters())
    in_deep = {id(parameter) for parameter in deep}
    rest = [p for p in model.parameters() if id(p) not in in_deep]
    task = Task(
        model=model,
        groups=[(deep, config.deep_learning_rate), (rest, config.learning_rate)],
        plan=plan,
        passes=lambda rows: batches.passes(split, rows),
        logits=lambda rows: batches.logits(split, dense_NF, rows),
        user_N=split.user_N,
        clicked_N=torch.from_numpy(split.clicked_N).to(batches.device),
        validate=lambda: auc(
            data.splits["validation"].clicked_N, batches.predict(data.splits["validation"])
        ),
    )
    if config.recompute and layers is not None:
        recompute_activations(layers, True)
    try:
        return fit(
            task,
            config,
            checkpoint=checkpoint,
            stop_after=stop_after,
            on_step=on_step,
            on_epoch=on_epoch,
            on_resume=on_resume,
        )
    finally:
        if config.recompute and layers is not None:
            recompute_activations(layers, False)


def precision(config: TrainingConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16 on this device."""
    return hardware_has_bfloat16(device) if config.bfloat16 is None else config.bfloat16
