"""What is learned: backbone split, atomic encoder, user aggregator, CTR head, trainer, baselines.

Depends on torch and transformers; knows nothing of Feast, DuckDB or any file but its own artifacts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bahe_models.config import BackboneConfig, EncoderConfig, ModelConfig, TrainingConfig, WindowConfig

if TYPE_CHECKING:
    from bahe_models.artifact import Artifact, load
    from bahe_models.artifact_folder import require_servable
    from bahe_models.backbone import Backbone, load_backbone
    from bahe_models.encoder import AtomicEncoder, encoder_version
    from bahe_models.evaluation import SplitEvaluation, evaluate
    from bahe_models.features import DenseFeatures, column_of, logit, needed_columns
    from bahe_models.incremental import UserState
    from bahe_models.metrics import auc, expected_calibration_error, gauc, log_loss
    from bahe_models.model import BaheModel
    from bahe_models.timelines import Int64, Timelines, window_batch
    from bahe_models.trainer.checkpoint import Checkpoint
    from bahe_models.trainer.ctr_training import (
        Batches,
        build_model,
        fit_dense,
        item_id_rows,
        table_ids,
        train,
    )
    from bahe_models.trainer.impressions import Impressions, TrainingData
    from bahe_models.trainer.training_loop import Epoch, Trained, seeded

_MODULES = {
    "Artifact": "artifact",
    "AtomicEncoder": "encoder",
    "auc": "metrics",
    "Backbone": "backbone",
    "BaheModel": "model",
    "Batches": "trainer.ctr_training",
    "build_model": "trainer.ctr_training",
    "Checkpoint": "trainer.checkpoint",
    "DenseFeatures": "features",
    "encoder_version": "encoder",
    "Epoch": "trainer.training_loop",
    "evaluate": "evaluation",
    "expected_calibration_error": "metrics",
    "fit_dense": "trainer.ctr_training",
    "gauc": "metrics",
    "Impressions": "trainer.impressions",
    "Int64": "timelines",
    "item_id_rows": "trainer.ctr_training",
    "load": "artifact",
    "load_backbone": "backbone",
    "log_loss": "metrics",
    "logit": "features",
    "column_of": "features",
    "needed_columns": "features",
    "require_servable": "artifact_folder",
    "seeded": "trainer.training_loop",
    "SplitEvaluation": "evaluation",
    "table_ids": "trainer.ctr_training",
    "Timelines": "timelines",
    "train": "trainer.ctr_training",
    "Trained": "trainer.training_loop",
    "TrainingData": "trainer.impressions",
    "UserState": "incremental",
    "window_batch": "timelines",
}
"""Imported lazily, so that reading a configuration loads neither torch nor transformers."""

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
