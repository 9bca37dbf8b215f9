"""What calibration changes: log loss and calibration error of BAHE's click probabilities, before and after.

As a model is saved: fitted on the validation split, measured on the test split. And what the choice was
made by: fitted on the first half of validation, measured on the second.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Row, main

if TYPE_CHECKING:
    from bahe_models import Impressions
    from bahe_models.metrics import Float

SEEDS = (0, 1, 2)


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """One seed (quick) or three."""
    from dataclasses import replace

    import bahe
    from bahe.variation import with_settings
    from bahe_core.machine import device
    from bahe_lake.connection import lake
    from bahe_models import load
    from bahe_models.calibration import AS_IT_IS
    from bahe_models.trainer.saved_model import logits_of
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training.training_data import read_training_data

    project = bahe.open(home_path)
    dataset = home_dataset(project.home)
    for seed in SEEDS[:1] if quick else SEEDS:
        with with_settings(project, training=vars(dataset.training) | {"seed": seed}) as varied:
            artifact = load(varied.train(tracker="none").artifact)
            with lake(varied.home) as connection:
                frame = latest_frame(varied.home)
                data = read_training_data(connection, frame, artifact.encoder_version, dataset.channels)
        raw = replace(artifact, calibration=AS_IT_IS)
        splits = {name: data.splits[name] for name in ("validation", "test")}
        logits = {name: logits_of(raw, data, split, device(None)) for name, split in splits.items()}
        half = len(splits["validation"]) // 2
        early, late = np.arange(half), np.arange(half, len(splits["validation"]))
        validation, of_validation = splits["validation"], logits["validation"]
        yield Row(
            metric=f"slope, seed {seed}", value=artifact.calibration.slope, unit="fitted on validation"
        )
        yield from _compared(
            f"second half of validation, seed {seed}",
            (validation.take(early), of_validation[early]),
            (validation.take(late), of_validation[late]),
        )
        yield from _compared(
            f"test, seed {seed}", (validation, of_validation), (splits["test"], logits["test"])
        )


def _compared(
    what: str, fitted_on: tuple[Impressions, Float], measured_on: tuple[Impressions, Float]
) -> Iterable[Row]:
    from bahe_models.calibration import fit_calibration
    from bahe_models.metrics import expected_calibration_error, log_loss, probability

    (fitted, its), (split, raw_N) = fitted_on, measured_on
    calibrated_N = fit_calibration(fitted.clicked_N, its).apply(raw_N)
    clicked_N, both = split.clicked_N, (raw_N, calibrated_N)
    metrics = {
        "log loss": [log_loss(clicked_N, z) for z in both],
        "calibration error (ECE)": [expected_calibration_error(clicked_N, probability(z)) for z in both],
    }
    for name, (before, after) in metrics.items():
        yield Row(
            metric=f"{name} on {what}",
            value=after,
            unit="calibrated",
            peer="as trained",
            peer_value=before,
            goal="not above as trained",
            holds=after <= before,
        )


if __name__ == "__main__":
    main("calibration", __doc__ or "", measure)
