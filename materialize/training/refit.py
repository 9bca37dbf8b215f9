"""Train a measured model once more on every impression, so that what is published has seen the newest ones.

The measured model keeps its place: it tells what the refitted one, which nothing is left to measure by, is
worth, and it is what the next night's model is compared with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import torch

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from bahe_models import Artifact, Checkpoint, Impressions, TrainingData, load, load_backbone
from bahe_models.artifact_folder import read_config
from bahe_models.calibration import AS_IT_IS, Calibration, fit_calibration
from bahe_models.trainer.saved_model import logits_of
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import home_dataset
from materialize.frames.frame import latest_frame
from materialize.training import tracking
from materialize.training.train import known_until_of, read_until_us, version_of
from materialize.training.train_with_baselines import Settings, fit_bahe
from materialize.training.training_data import read_training_data
from materialize.vectors.encoder_versions import recorded_settings

JOB = "refit"
CALIBRATED_ON = 10_000
"""The newest impressions that a refitted model is calibrated on, at most."""
MEASURED = "measured"
"""The fact of a refitted artifact that names the model that was measured."""


@dataclass(frozen=True)
class Refitted(Result):
    """What a run of `refit` left behind."""

    model_version: str
    measured: str
    """The model whose settings and number of epochs these are."""
    epochs: int
    skipped: bool

    @property
    def summary(self) -> list[str]:
        """The version, and what it repeats."""
        again = " (unchanged)" if self.skipped else ""
        epochs = f"{self.epochs} epoch" + ("s" if self.epochs != 1 else "")
        return [f"{self.model_version}: {self.measured} again, {epochs} on every impression{again}"]


def measured_model(home: Home, model_version: str) -> str:
    """The model that was measured in place of a refitted one; any other model is its own.

    So is a refitted one whose measured model is gone. Raises BadInput when the model is not in the home.
    """
    measured = str(read_config(home.models / model_version)["facts"].get(MEASURED, model_version))
    return measured if (home.models / measured).is_dir() else model_version


def refit(
    home: Home,
    *,
    model_version: str | None = None,
    warm_start: str | None = None,
    device_name: str | None = None,
) -> Refitted:
    """Train a model (the last trained one) anew on train, validation and test, as many epochs as its best.

    It must have been trained on the latest frame. `warm_start` is the model_version to start from. Does
    nothing when it is done; a killed run resumes from its checkpoint. Raises BadInput on an unknown model,
    NotReady when the frame is another one by now, or the model does not say how many epochs it took.
    """
    if model_version is None:
        with lake(home) as connection:
            trained = runs.last(connection, "train")
        if trained is None:
            raise NotReady(f"{home.root} has no trained model yet; run `bahe train` first.")
        model_version = trained.fingerprint
    facts = read_config(home.models / model_version)["facts"]
    if MEASURED in facts:
        raise BadInput(f"{model_version} is {facts[MEASURED]} refitted already; name that one, or train.")
    frame = latest_frame(home)
    epochs = facts.get("epochs")
    if facts["frame_id"] != frame.frame_id or epochs is None:
        raise NotReady(
            f"{model_version} was trained on another frame, or by an earlier version of bahe; run `bahe"
            " train` first."
        )
    version = version_of(["refit", model_version, warm_start])
    with home.exclusive(), lake(home) as connection:
        if (home.models / version).is_dir():
            home.checkpoint(version).unlink(missing_ok=True)  # killed after the artifact was whole
            return Refitted(version, model_version, epochs, skipped=True)
        measured, dataset = load(home.models / model_version), home_dataset(home)
        encoder = measured.encoder_version
        data = read_training_data(connection, frame, encoder, list(measured.dense.channels))
        recorded = recorded_settings(connection, encoder)
        backbone, _ = encoder_settings(dataset)
        if recorded is not None:
            backbone = replace(recorded[0], deep_layers=backbone.deep_layers)
        checkpoint = Checkpoint(home.checkpoint(version), version)
        checkpoint.check()
        settings = Settings.of(dataset)
        described = [*settings.fields_affecting_weights(), backbone.deep_layers]
        if facts.get("settings") != json.loads(json.dumps(described)):
            raise NotReady(f"dataset.yaml describes another model than {model_version}; run `bahe train`.")
        calibration = _newest_calibration(measured, data, device(device_name))
        data = data.all_to_train_on()
        with runs.record(connection, JOB, version) as run:
            fitted = fit_bahe(
                data,
                load_backbone(backbone),
                settings,
                device(device_name),
                encoder,
                version,
                tracking.Log(),
                checkpoint=checkpoint,
                warm_start=None if warm_start is None else load(home.models / warm_start),
                stop_after=epochs,
            )
            artifact = replace(fitted.artifact(), calibration=calibration)
            artifact.facts = facts | {
                MEASURED: model_version,
                "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "read_until_us": read_until_us(data, ["train"]),
                "trained_until": known_until_of(connection, dataset, data, ["train"]).isoformat(),
            }
            artifact.save(home.models / version)
            checkpoint.delete()
            done = {"measured": model_version, "encoder_version": encoder, "model_version": version}
            commit(connection, [run.statement(done, rows_read=len(data.splits["train"]))])
    return Refitted(version, model_version, epochs, skipped=False)


def _newest_calibration(measured: Artifact, data: TrainingData, where: torch.device) -> Calibration:
    """The measured model's, on the newest impressions that it did not learn from.

    The refitted one has learned from all there are, so nothing is left to calibrate it on; it is as sure of
    itself as the model that it repeats.
    """
    held_out = Impressions.together([data.splits["validation"], data.splits["test"]])
    newest = held_out.take(np.arange(max(0, len(held_out) - CALIBRATED_ON), len(held_out)))
    uncalibrated = replace(measured, calibration=AS_IT_IS)
    return fit_calibration(newest.clicked_N, logits_of(uncalibrated, data, newest, where))
