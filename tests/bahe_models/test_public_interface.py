"""What `import bahe_models` offers, and what of it is had without torch."""

from __future__ import annotations

import subprocess
import sys

import bahe_models
from tests.support import REPOSITORY

PUBLIC = [
    "Artifact",
    "AtomicEncoder",
    "Backbone",
    "BackboneConfig",
    "BaheModel",
    "Batches",
    "Checkpoint",
    "DenseFeatures",
    "EncoderConfig",
    "Epoch",
    "Impressions",
    "Int64",
    "ModelConfig",
    "SplitEvaluation",
    "Timelines",
    "Trained",
    "TrainingConfig",
    "TrainingData",
    "UserState",
    "WindowConfig",
    "auc",
    "build_model",
    "column_of",
    "encoder_version",
    "evaluate",
    "expected_calibration_error",
    "fit_dense",
    "gauc",
    "item_id_rows",
    "load",
    "load_backbone",
    "log_loss",
    "logit",
    "needed_columns",
    "require_servable",
    "seeded",
    "table_ids",
    "train",
    "window_batch",
]
WITHOUT_TORCH = [
    "BackboneConfig",
    "DenseFeatures",
    "EncoderConfig",
    "Impressions",
    "Int64",
    "ModelConfig",
    "SplitEvaluation",
    "Timelines",
    "TrainingConfig",
    "TrainingData",
    "WindowConfig",
    "auc",
    "column_of",
    "evaluate",
    "expected_calibration_error",
    "gauc",
    "log_loss",
    "logit",
    "needed_columns",
    "require_servable",
    "window_batch",
]


def test_the_public_surface_is_this() -> None:
    assert bahe_models.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(bahe_models, name) is not None


def test_what_needs_no_torch_loads_none() -> None:
    heavy = {"torch", "transformers"}
    code = (
        f"import sys; from bahe_models import {', '.join(WITHOUT_TORCH)};"
        f" print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
