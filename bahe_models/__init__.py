"""What is learned: backbone split, atomic encoder, user aggregator, CTR head, trainer, baselines.

Knows torch and transformers, and nothing of Feast, DuckDB or any file beyond its own artifacts.
"""

from bahe_models.artifact import Artifact, load
from bahe_models.backbone import Backbone, BackboneConfig, load_backbone
from bahe_models.checkpoint import Checkpoint
from bahe_models.ctr_training import Batches, train
from bahe_models.encoder import AtomicEncoder, EncoderConfig, encoder_version
from bahe_models.evaluation import evaluate
from bahe_models.features import DenseFeatures
from bahe_models.impressions import Impressions, TrainingData
from bahe_models.incremental import UserState
from bahe_models.metrics import auc, expected_calibration_error, gauc, log_loss
from bahe_models.model import BaheModel, ModelConfig
from bahe_models.timelines import Timelines, WindowConfig, window_batch
from bahe_models.training_loop import TrainingConfig

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
    "Impressions",
    "ModelConfig",
    "Timelines",
    "TrainingConfig",
    "TrainingData",
    "UserState",
    "WindowConfig",
    "auc",
    "encoder_version",
    "evaluate",
    "expected_calibration_error",
    "gauc",
    "load",
    "load_backbone",
    "log_loss",
    "train",
    "window_batch",
]
