"""Train BAHE and its baselines on the latest frame; write artifact, results, report and MLflow run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_core.machine import device, threads
from bahe_core.progress import say
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.sql import sql_literal
from bahe_lake.transactions import commit
from bahe_models import (
    Artifact,
    Backbone,
    BackboneConfig,
    Checkpoint,
    TrainingData,
    encoder_version,
    load,
    load_backbone,
)
from bahe_models.artifact_folder import FORMAT
from bahe_models.trainer.ctr_training import refuse_deep, require_fit
from bahe_models.trainer.distributed import own_device, processes
from bahe_models.trainer.importance import REQUEST, Importance
from bahe_models.trainer.sharding import require_processes
from bahe_models.trainer.warm_start import require_fit as warm_start_fits
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import Dataset, context_column, home_dataset
from materialize.frames.frame import JOB as FRAME
from materialize.frames.frame import REWRITTEN, latest_frame
from materialize.gate import require_gates
from materialize.training import tracking
from materialize.training.advice import advice
from materialize.training.report import results_table, write_report
from materialize.training.train_with_baselines import Outcome, Settings, train_with_baselines
from materialize.training.training_data import context_of, read_training_data
from materialize.vectors.encoder_versions import recorded_settings, versions
from materialize.vectors.stored_atoms import current_encoder

JOB = "train"
READ = ("train", "validation")
"""The splits that a training reads: validation chooses the epoch."""


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


def train_models(
    home: Home,
    *,
    device_name: str | None = None,
    tracker: tracking.Tracker = "mlflow",
    warm_start: str | None = None,
    shard: bool = False,
) -> TrainingOutcome:
    """Train on the latest frame; does nothing when frame, encoder and settings are unchanged.

    A killed run resumes from its checkpoint. `warm_start` names the model_version to start from. Under
    torchrun all processes train and only the first one writes; with `shard` each holds a share of the deep
    layers. Raises BadInput when `shard` is asked of a single process.
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
        if not settings.model.deep:
            refuse_deep(settings.training, shard=shard)
        encoder = current_encoder(connection, home)
        require_gates(connection, "embed")
        backbone, _ = encoder_settings(dataset)
        version = version_of(
            [
                FORMAT,
                frame.frame_id,
                encoder,
                backbone.deep_layers,
                *settings.fields_affecting_weights(),
                warm_start,
            ]
        )
        artifact_path = home.models / version
        report = home.reports / "training.html"
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == version and artifact_path.is_dir():
            return TrainingOutcome(version, artifact_path, last.facts["results"], report, skipped=True)

        about = frame.facts
        earlier = None if warm_start is None else _earlier_model(home, warm_start)
        if earlier is not None:
            warm_start_fits(
                earlier,
                encoder_version=encoder,
                channels=dataset.channels,
                context=context_of(about),
                numeric=about.get("numeric", ()),
                vectors=about.get("vectors", {}),
                config=settings.model,
            )
        checkpoint = Checkpoint(home.checkpoint(version), version)
        checkpoint.check()
        data = read_training_data(connection, frame, encoder, dataset.channels)
        _, halves = backbone_of(connection, dataset, encoder)
        if settings.model.deep:
            require_fit(halves.deep, data, settings.window)
        do_train = partial(
            train_with_baselines,
            data,
            halves,
            settings,
            str(where),
            encoder,
            version,
            checkpoint=checkpoint,
            warm_start=earlier,
            shard=shard,
            categorical=about.get("categorical", ()),
        )
        if here.rank:
            results = do_train(tracking.Log()).results
            return TrainingOutcome(version, artifact_path, results, report, skipped=False)
        with runs.record(connection, JOB, version) as run:
            with tracking.run(home, tracker, dataset.name, version) as log:
                log.parameters(
                    {"encoder_version": encoder, "frame_id": frame.frame_id, "threads": threads()}
                )
                log.parameters({k: v for part in vars(settings).values() for k, v in asdict(part).items()})
                done = do_train(log)
                artifact, results = done.artifact, done.results
                artifact.facts |= {
                    "dataset": dataset.name,
                    "frame_id": frame.frame_id,
                    "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "settings": [*settings.fields_affecting_weights(), backbone.deep_layers],
                    "categorical": about.get("categorical", []),
                    "read_until_us": read_until_us(data, READ),
                    "trained_until": known_until_of(connection, dataset, data, READ).isoformat(),
                    "results": results,
                }
                if not artifact_path.is_dir():
                    artifact.save(artifact_path)
                checkpoint.delete()  # not before: a kill between the two would cost the whole training
                done = _with_rewritten(done, runs.last(connection, FRAME))
                said = advice(results, done.histories["bahe"], done.importance, settings.training)
                write_report(report, dataset.name, version, done, said)
                for one in done.importance:
                    if one.warning is not None:
                        say(f"  feature {one.name} {one.warning}", feature=one.name)
                for sentence in said:
                    say(f"  {sentence}")
                log.results(results)
                log.files([artifact_path, report])
            learned = {"results": results, "encoder_version": encoder, "frame_id": frame.frame_id}
            commit(connection, [run.statement(learned, rows_read=sum(frame.rows.values()))])
    return TrainingOutcome(version, artifact_path, results, report, skipped=False)


def backbone_of(
    connection: duckdb.DuckDBPyConnection, dataset: Dataset, encoder: str
) -> tuple[BackboneConfig, Backbone]:
    """The backbone that vectors were made with, which a dataset.yaml may have changed since.

    Raises NotReady when that is not known, or the changed one has encoded nothing yet.
    """
    backbone, encoder_config = encoder_settings(dataset)
    halves = load_backbone(backbone)
    configured = encoder_version(halves, encoder_config, backbone.shallow_layers)
    if configured == encoder:
        return backbone, halves
    older = recorded_settings(connection, encoder)
    if older is None or configured not in {v.encoder_version for v in versions(connection)}:
        raise NotReady(
            f"the atoms are encoded by {encoder} and dataset.yaml asks for {configured}; run `bahe"
            " encode` first."
        )
    say(f"  {configured} is not complete yet; this model reads the vectors of {encoder}")
    backbone = replace(older[0], deep_layers=backbone.deep_layers)
    return backbone, load_backbone(backbone)


def _with_rewritten(done: Outcome, framed: runs.Run | None) -> Outcome:
    """The outcome with a warning of features that changed after the fact, as the frame's run tells."""
    changed = framed.facts.get(REWRITTEN, {}) if framed is not None else {}

    def warned(one: Importance) -> Importance:
        view, _, name = one.name.partition(":")
        share = changed.get(context_column(name) if view == REQUEST else name)
        if share is None or one.warning is not None:
            return one
        said = f"had another value in the frame before for {share:.0%} of the same impressions"
        return replace(one, warning=said)

    return replace(done, importance=list(map(warned, done.importance)))


def _earlier_model(home: Home, version: str) -> Artifact:
    """The artifact to start from. Raises BadInput when the home has no such model."""
    folder = home.models / version
    if not folder.is_dir():
        models = sorted(path.name for path in home.models.glob("bahe-*") if path.is_dir())
        raise BadInput(
            f"--warm-start {version} is no model of {home.root}; choose from"
            f" {', '.join(models) or 'none: train one first'}."
        )
    return load(folder)


def version_of(identity: list[object]) -> str:
    """The model_version of what a model's weights depend on."""
    return "bahe-" + hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def read_until_us(data: TrainingData, splits: Sequence[str]) -> int:
    """When the last impression of these splits was shown, in microseconds."""
    return max(int(data.splits[name].time_us_N.max()) for name in splits)


def known_until_of(
    connection: duckdb.DuckDBPyConnection, dataset: Dataset, data: TrainingData, splits: Sequence[str]
) -> datetime:
    """When the last thing was known that training read of these splits: an impression or its click."""
    last = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=read_until_us(data, splits))
    row = connection.execute(
        f"""
        SELECT max({dataset.impressions.label_time})
        FROM impressions
        WHERE event_timestamp <= {sql_literal(last)} AND clicked = 1
        """
    ).fetchone()
    assert row is not None
    return last if row[0] is None else max(last, row[0])
