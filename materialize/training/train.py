"""Train BAHE and its baselines on the latest frame; write artifact, results, report and MLflow run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_core.machine import PeakMemory, device, threads
from bahe_core.progress import progress, say
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from bahe_models import baselines
from bahe_models.artifact import FORMAT, Artifact, load
from bahe_models.backbone import load_backbone
from bahe_models.checkpoint import Checkpoint
from bahe_models.config import ModelConfig, TrainingConfig, WindowConfig
from bahe_models.ctr_training import (
    Batches,
    Scores,
    build_model,
    fit_dense,
    id_rows,
    precision,
    require_fit,
    table_ids,
    train,
)
from bahe_models.distributed import own_device, processes
from bahe_models.encoder import encoder_version
from bahe_models.evaluation import SplitEvaluation, evaluate
from bahe_models.impressions import TrainingData
from bahe_models.sharding import gathered, require_processes
from bahe_models.sharding import shard as shard_deep_layers
from bahe_models.training_loop import Epoch, seeded
from bahe_models.warm_start import known_behaviors, known_items, start_from
from bahe_models.warm_start import require_fit as warm_start_fits
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import Dataset, home_dataset
from materialize.frames.frame import Frame, latest_frame
from materialize.gate import require_gates
from materialize.training import tracking
from materialize.training.lake_data import read_training_data
from materialize.training.report import results_table, write_report
from materialize.vectors.encode import recorded_settings, versions
from materialize.vectors.stored_atoms import current_encoder

JOB = "train"
EVALUATED = ("validation", "test")


@dataclass(frozen=True)
class TrainingOutcome(Result):
    """What a run of `train` left behind."""

    model_version: str
    artifact: Path
    results: list[dict[str, Any]]
    """Rows of the results table: model, split, the metrics of `Quality.row`, train_seconds and
    peak_memory_mb; None where a metric is undefined."""
    report: Path
    skipped: bool

    @property
    def summary(self) -> list[str]:
        """The version; the results are a table of their own."""
        return [self.model_version + (" (unchanged)" if self.skipped else "")]

    def _repr_html_(self) -> str:
        """The results table, as in the report."""
        return f"<p>{self.model_version}</p>{results_table(self.results)}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a dataset.yaml moves a trained model."""

    model: ModelConfig
    window: WindowConfig
    training: TrainingConfig

    @classmethod
    def of(cls, dataset: Dataset) -> Settings:
        """The dataset's."""
        return cls(
            model=dataset.model,
            window=dataset.window,
            training=dataset.training,
        )

    def fields_affecting_weights(self) -> list[dict[str, Any]]:
        """What a model_version is made from; how often a checkpoint is written is not in it."""
        return [asdict(self.model), asdict(self.window), self.training.fields_affecting_weights()]


@dataclass(frozen=True)
class _Scored:
    """A model's logits by split, and what getting them cost."""

    logits: dict[str, Scores]
    seconds: float
    mebibytes: float


def train_models(
    home: Home,
    *,
    device_name: str | None = None,
    tracker: tracking.Tracker = "mlflow",
    warm_start: str | None = None,
    shard: bool = False,
) -> TrainingOutcome:
    """Train on the latest frame; does nothing when frame, encoder and settings are unchanged.

    A killed run goes on from its checkpoint. `warm_start` names the model_version to start from. Under
    torchrun all processes train, and the first one alone writes; with `shard` each holds a share of the
    deep layers. Raises BadInput when there is nothing to share them with.
    """
    dataset = home_dataset(home)
    settings = Settings.of(dataset)
    frame = latest_frame(home)
    where = own_device(device(device_name))
    with (
        processes(where) as here,
        nullcontext() if here.rank else home.exclusive(),
        lake(home) as connection,
    ):
        if shard:
            require_processes()
        encoder = current_encoder(connection, home)
        require_gates(connection, "embed")
        backbone, encoder_config = encoder_settings(dataset)
        identity = json.dumps(
            [
                FORMAT,
                frame.frame_id,
                encoder,
                backbone.deep_layers,
                *settings.fields_affecting_weights(),
                warm_start,
            ]
        )
        version = "bahe-" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        artifact_path = home.models / version
        report = home.reports / "training.html"
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == version and artifact_path.is_dir():
            return TrainingOutcome(version, artifact_path, last.facts["results"], report, skipped=True)

        earlier = None if warm_start is None else _earlier_model(home, warm_start)
        if earlier is not None:
            warm_start_fits(
                earlier,
                encoder_version=encoder,
                channels=dataset.channels,
                context=dataset.impressions.context,
                config=settings.model,
            )
        checkpoint = Checkpoint(home.checkpoint(version), version)
        checkpoint.check()
        data = read_training_data(connection, frame, encoder, dataset.channels)
        halves = load_backbone(backbone)
        wanted = encoder_version(halves, encoder_config, backbone.shallow_layers)
        if wanted != encoder:
            older = recorded_settings(connection, encoder)
            if older is None or wanted not in {v.encoder_version for v in versions(connection)}:
                raise NotReady(
                    f"the atoms are encoded by {encoder} and dataset.yaml asks for {wanted}; run `bahe"
                    " encode` first."
                )
            say(f"  {wanted} is not complete yet; this model reads the vectors of {encoder}")
            halves = load_backbone(replace(older[0], deep_layers=backbone.deep_layers))
        require_fit(halves.deep, data, settings.window)
        do_train = partial(
            train_all,
            data,
            halves,
            settings,
            str(where),
            encoder,
            version,
            checkpoint=checkpoint,
            warm_start=earlier,
            shard=shard,
        )
        if here.rank:
            _, results, *_ = do_train(tracking.Log())
            return TrainingOutcome(version, artifact_path, results, report, skipped=False)
        with runs.record(connection, JOB, version) as run:
            with tracking.run(home, tracker, dataset.name, version) as log:
                log.parameters(
                    {"encoder_version": encoder, "frame_id": frame.frame_id, "threads": threads()}
                )
                log.parameters({k: v for part in vars(settings).values() for k, v in asdict(part).items()})
                artifact, results, histories, evaluations = do_train(log)
                artifact.facts = _facts(dataset, frame, results)
                if not artifact_path.is_dir():
                    artifact.save(artifact_path)
                checkpoint.delete()  # not before: a kill between the two would cost the whole training
                write_report(report, dataset.name, version, results, histories, evaluations)
                log.results(results)
                log.files([artifact_path, report])
            learned = {"results": results, "encoder_version": encoder, "frame_id": frame.frame_id}
            commit(connection, [run.statement(learned, rows_read=sum(frame.rows.values()))])
    return TrainingOutcome(version, artifact_path, results, report, skipped=False)


def train_all(
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
) -> tuple[Artifact, list[dict[str, Any]], dict[str, list[Epoch]], dict[str, SplitEvaluation]]:
    """Floor, ID-only and BAHE on one data set.

    The BAHE artifact, the results table, each network's history and each split's evaluation.
    """
    where = device(device_name)
    split = data.splits["train"]
    dense = fit_dense(data)
    scored: dict[str, _Scored] = {}
    with PeakMemory() as memory:
        scores = {name: baselines.floor_scores(dense, data.splits[name]) for name in EVALUATED}
    scored["floor"] = _Scored(scores, 0.0, memory.mebibytes)

    with progress("training ID-only", 20) as advance, PeakMemory() as memory:
        score, id_only = baselines.train_id_only(
            data,
            settings.training,
            model_config=settings.model,
            on_epoch=lambda e: advance(1, note=f"validation AUC {e.validation_auc:.4f}"),
        )
    scores = {name: score(data.splits[name]) for name in EVALUATED}
    scored["id_only"] = _Scored(scores, id_only.seconds, memory.mebibytes)

    config = settings.training
    seen, also_known = split.item_N, None
    if warm_start is not None:
        also_known = known_behaviors(warm_start, data.atom_ids)
        seen = np.union1d(seen, known_items(warm_start, data.item_ids))
    item_row_I = id_rows(seen, len(data.item_ids))
    with seeded(config.seed):
        model = build_model(halves.deep, data, dense, settings.model, item_row_I, also_known=also_known)
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
        total = len(split) * config.epochs
        with progress("training BAHE", total) as advance, PeakMemory() as memory:
            note = ""

            def on_epoch(row: Epoch) -> None:
                nonlocal note
                note = f"epoch {row.epoch}: validation AUC {row.validation_auc:.4f}"
                advance(0, note=note)
                log.epoch(row)

            trained = train(
                batches,
                config,
                checkpoint=checkpoint,
                on_step=lambda n, loss: advance(n, note=f"loss {loss:.4f}  {note}"),
                on_epoch=on_epoch,
                on_pretraining=lambda n, loss: advance(0, note=f"pre-training, loss {loss:.3f}"),
            )
    scores = {name: batches.predict(data.splits[name]) for name in EVALUATED}
    scored["bahe"] = _Scored(scores, trained.seconds, memory.mebibytes)
    evaluations = {
        name: evaluate(data.splits[name], {model: s.logits[name] for model, s in scored.items()})
        for name in EVALUATED
    }
    artifact = Artifact(
        model=gathered(model) if shard else model.cpu(),
        model_version=version,
        encoder_version=encoder,
        deep_config=halves.deep.config.to_dict(),
        window=settings.window,
        dense=batches.dense,
        item_ids=table_ids(item_row_I, data.item_ids),
        facts={},
        logit_shift=batches.logit_shift,
    )
    histories = {"id_only": id_only.history, "bahe": trained.history}
    return artifact, _rows(scored, evaluations), histories, evaluations


def _earlier_model(home: Home, version: str) -> Artifact:
    """The artifact to start from. Raises BadInput when the home has no such model."""
    folder = home.models / version
    if not folder.is_dir():
        known = sorted(path.name for path in home.models.glob("bahe-*") if path.is_dir())
        raise BadInput(
            f"--warm-start {version} is no model of {home.root}; choose from"
            f" {', '.join(known) or 'none: train one first'}."
        )
    return load(folder)


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


def _facts(dataset: Dataset, frame: Frame, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "dataset": dataset.name,
        "frame_id": frame.frame_id,
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": results,
    }
