"""The language model that a dataset asks for, and how it is to be read."""

from __future__ import annotations

from dataclasses import replace

from bahe_models import BackboneConfig, EncoderConfig
from bahe_models.config import DEFAULT_BACKBONE
from materialize.config.dataset import Dataset
from materialize.config.fetch import DOWNLOADS, fetch

Settings = tuple[BackboneConfig, EncoderConfig]


def backbone_config(dataset: Dataset) -> BackboneConfig:
    """The dataset's backbone; the default one, SmolLM2-135M-Instruct, is fetched when needed."""
    if dataset.backbone.path != DEFAULT_BACKBONE:
        return dataset.backbone
    folder = fetch(DEFAULT_BACKBONE)
    return replace(dataset.backbone, path=str(folder / DOWNLOADS[DEFAULT_BACKBONE].names[0]))


def encoder_settings(dataset: Dataset) -> Settings:
    """Backbone and encoder of a dataset."""
    return backbone_config(dataset), dataset.encoder
