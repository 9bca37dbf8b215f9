"""BAHE beside its baselines on one data set: the floor, ID-only, then BAHE, scored on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from bahe_core.machine import PeakMemory, device
from bahe_core.progress import progress
from bahe_models import (
    Artifact,
    Batches,
    Checkpoint,
    Epoch,
    Int64,
    ModelConfig,
    SplitEvaluation,
    Trained,
    TrainingConfig,
    TrainingData,
    WindowConfig,
    baselines,
    build_model,
    evaluate,
    fit_dense,
    item_id_rows,
    seeded,
    table_ids,
    train,
)
from bahe_models.calibration import Calibration, fit_calibration
from bahe_models.trainer.ctr_training import Scores, precision
from bahe_models.trainer.distributed import Processes
from bahe_models.trainer.facts_start import EPOCHS as FACTS_EPOCHS
from bahe_models.trainer.importance import Importance, permutation_importance
from bahe_models.trainer.sharding import gathered
from bahe_models.trainer.sharding import shard as shard_deep_layers
from bahe_models.trainer.warm_start import known_behaviors, known_items, require_fit, start_from
from materialize.config.dataset import Dataset
from materialize.training import tracking
from materialize.training.cost import CostEstimate

EVALUATED = ("validation", "test")
CALIBRATED_ON = "validation"
"""It chose the epoch, but no weight was learned from it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a dataset.yaml that a trained model depends on."""

    model: ModelConfig
    window: WindowConfig
    training: TrainingConfig

    @classmethod
    def of(cls, dataset: Dataset) -> Settings:
        """Those of a dataset; without numeric features of its own there is no network on facts alone."""
        model = dataset.model if dataset.features.numeric else replace(dataset.model, facts_width=0)
        return cls(model=model, window=dataset.window, training=dataset.training)

    def fields_affecting_weights(self) -> list[dict[str, Any]]:
        """The settings that make a model_version; how often a checkpoint is written is not among them."""
        return [
            self.model.fields_affecting_weights(),
            asdict(self.window),
            self.training.fields_affecting_weights(),
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trained model beside its baselines."""

    artifact: Artifact
    results: list[dict[str, Any]]
    """Rows of the results table."""
    histories: dict[str, list[Epoch]]
    """Of each network."""
    evaluations: dict[str, SplitEvaluation]
    """By split."""
    importance: list[Importance]
    """What the features are worth on validation; empty where several processes trained."""


@dataclass(frozen=True)
class _Scored:
    """A model's logits by split, and what getting them cost."""

    logits: dict[str, Scores]
    seconds: float
    mebibytes: float


def train_with_baselines(
    data: TrainingData,
    halves: Any,
    settings: Settings,
    device_name: str | None,
    encoder: str,
    version: str,
    log: tracking.Log,
    *,
    checkpoint: Checkpoint | None = None,
    warm_start: Artifact | None = None,
    shard: bool = False,
    categorical: Sequence[str] = (),
) -> Outcome:
    """Fit the floor, the ID-only network and BAHE on one data set, and evaluate them on the same rows.

    `categorical` are the features behind the last context columns, as `view:feature`.
    """
    where = device(device_name)
    dense = fit_dense(data)
    scored: dict[str, _Scored] = {}
    calibrations: dict[str, Calibration] = {}

    def keep(model: str, scores: dict[str, Scores], seconds: float, memory: PeakMemory) -> None:
        """A model's logits, calibrated, each as every other, on what it has not learned from."""
        fitted = fit_calibration(data.splits[CALIBRATED_ON].clicked_N, scores[CALIBRATED_ON])
        calibrations[model] = fitted
        calibrated = {name: fitted.apply(logit_N) for name, logit_N in scores.items()}
        scored[model] = _Scored(calibrated, seconds, memory.mebibytes)

    with PeakMemory() as memory:
        scores = {name: baselines.floor_scores(dense, data.splits[name]) for name in EVALUATED}
    keep("floor", scores, 0.0, memory)

    with progress("training ID-only", 20) as advance, PeakMemory() as memory:
        score, id_only = baselines.train_id_only(
            data,
            settings.training,
            model_config=settings.model,
            on_epoch=lambda e: advance(1, note=f"validation AUC {e.validation_auc:.4f}"),
        )
    keep("id_only", {name: score(data.splits[name]) for name in EVALUATED}, id_only.seconds, memory)

    fitted = fit_bahe(
        data,
        halves,
        settings,
        where,
        encoder,
        version,
        log,
        checkpoint=checkpoint,
        warm_start=warm_start,
        shard=shard,
    )
    scores = {name: fitted.batches.predict(data.splits[name]) for name in EVALUATED}
    keep("bahe", scores, fitted.trained.seconds, fitted.memory)
    evaluations = {
        name: evaluate(data.splits[name], {model: s.logits[name] for model, s in scored.items()})
        for name in EVALUATED
    }
    histories = {"id_only": id_only.history, "bahe": fitted.trained.history}
    importance = []
    if Processes.here().size == 1:  # several would have to take every step together
        importance = permutation_importance(fitted.batches, data.splits["validation"], categorical)
    return Outcome(
        artifact=replace(fitted.artifact(), calibration=calibrations["bahe"]),
        results=_rows(scored, evaluations),
        histories=histories,
        evaluations=evaluations,
        importance=importance,
    )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained BAHE model."""

    batches: Batches
    trained: Trained
    memory: PeakMemory
    """Of the training."""
    halves: Any
    encoder: str
    version: str
    item_row_I: Int64
    shard: bool

    def artifact(self) -> Artifact:
        """The model with all that it needs to score, on the CPU; a collective call when it is sharded."""
        model = self.batches.model
        return Artifact(
            model=gathered(model) if self.shard else model.cpu(),
            model_version=self.version,
            encoder_version=self.encoder,
            deep_config=self.halves.deep.config.to_dict(),
            window=self.batches.window,
            dense=self.batches.dense,
            item_ids=table_ids(self.item_row_I, self.batches.data.item_ids),
            facts={"epochs": best_epoch(self.trained.history)},
            logit_shift=self.batches.logit_shift,
        )


def best_epoch(history: Sequence[Epoch]) -> int:
    """The epoch whose weights were kept; the last where nothing was validated."""
    measured = [row for row in history if not np.isnan(row.validation_auc)]
    return max(measured, key=lambda row: row.validation_auc).epoch if measured else history[-1].epoch


def fit_bahe(
    data: TrainingData,
    halves: Any,
    settings: Settings,
    where: torch.device,
    encoder: str,
    version: str,
    log: tracking.Log,
    *,
    checkpoint: Checkpoint | None = None,
    warm_start: Artifact | None = None,
    shard: bool = False,
    stop_after: int | None = None,
) -> Fitted:
    """Train BAHE alone on the split `train`; with `stop_after` so many epochs, without validation."""
    split, config = data.splits["train"], settings.training
    if warm_start is not None:
        require_fit(
            warm_start,
            encoder_version=encoder,
            channels=data.timelines.channels,
            context=data.context,
            numeric=data.numeric,
            vectors=data.vectors,
            config=settings.model,
        )
    # A warm start keeps the standardisation that its weights depend on.
    dense = fit_dense(data) if warm_start is None else warm_start.dense
    seen, also_known = split.item_N, None
    if warm_start is not None:
        also_known = known_behaviors(warm_start, data.atom_ids)
        seen = np.union1d(seen, known_items(warm_start, data.item_ids))
    item_row_I = item_id_rows(seen, data.item_ids)
    bar: AbstractContextManager[Callable[[int], object]] = nullcontext(lambda impressions: None)
    if warm_start is None and dense.numeric and settings.model.facts_width:
        bar = progress("fitting features", FACTS_EPOCHS * len(split))
    with seeded(config.seed):
        with bar as on_facts:
            model = build_model(
                halves.deep,
                data,
                dense,
                settings.model,
                item_row_I,
                also_known=also_known,
                on_facts=on_facts,
            )
        batches = Batches(
            model,
            data,
            dense,
            settings.window,
            item_row_I=item_row_I,
            device=where,
            bfloat16=precision(config, where),
        )
        if warm_start is not None:
            start_from(warm_start, batches, encoder_version=encoder)
        if shard:
            shard_deep_layers(model, where)
        model.to(where)
        with PeakMemory() as memory:
            run = config if stop_after is None else replace(config, epochs=stop_after)
            cost = CostEstimate(split, settings.model, settings.window, run, memory)
            cost.announce()
            trained = _train_visibly(batches, config, checkpoint, cost, log, stop_after)
    return Fitted(
        batches=batches,
        trained=trained,
        memory=memory,
        halves=halves,
        encoder=encoder,
        version=version,
        item_row_I=item_row_I,
        shard=shard,
    )


def _train_visibly(
    batches: Batches,
    config: TrainingConfig,
    checkpoint: Checkpoint | None,
    cost: CostEstimate,
    log: tracking.Log,
    stop_after: int | None,
) -> Trained:
    """`train` with a bar, which a resumed run starts where the interrupted one was, and the run's log."""
    note = ""
    with progress("training BAHE", cost.impressions) as advance:

        def on_step(impressions: int, loss: float) -> None:
            cost.step(impressions)
            advance(impressions, note=f"loss {loss:.4f}  {note}")

        def on_epoch(row: Epoch) -> None:
            nonlocal note
            validated = stop_after is None
            measured = f": validation AUC {row.validation_auc:.4f}" if validated else " done"
            note = f"epoch {row.epoch}{measured}"
            advance(0, note=note)
            log.epoch(row)

        def on_resume(impressions: int) -> None:
            cost.resume(impressions)
            advance(impressions, earlier=True)

        return train(
            batches,
            config,
            checkpoint=checkpoint,
            stop_after=stop_after,
            on_step=on_step,
            on_epoch=on_epoch,
            on_resume=on_resume,
            on_pretraining=lambda behaviors, loss: advance(0, note=f"pre-training, loss {loss:.3f}"),
        )


def _rows(
    scored: Mapping[str, _Scored], evaluations: Mapping[str, SplitEvaluation]
) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "split": name,
            **evaluations[name].quality[model].row(),
            "train_seconds": round(facts.seconds, 2),
            "peak_memory_mb": round(facts.mebibytes, 1),
        }
        for model, facts in scored.items()
        for name in EVALUATED
    ]
