"""The language model that a dataset asks for, and how it is to be read."""

from __future__ import annotations

from bahe_models.config import BackboneConfig, EncoderConfig
from materialize.config.dataset import Dataset
from materialize.config.fetch import DOWNLOADS, fetch

Settings = tuple[BackboneConfig, EncoderConfig]


def backbone_config(dataset: Dataset) -> BackboneConfig:
    """The dataset's backbone; without a `path`, SmolLM2-135M-Instruct, fetched when needed."""
    from bahe_models.options import build

    settings = dict(dataset.backbone)
    if "path" not in settings:
        folder = fetch("smollm2-135m")
        settings["path"] = str(folder / DOWNLOADS["smollm2-135m"].names[0])
    return build(BackboneConfig, settings, "backbone")


def encoder_settings(dataset: Dataset) -> Settings:
    """Backbone and encoder of a dataset, checked."""
    from bahe_models.options import build

    return backbone_config(dataset), build(EncoderConfig, dataset.encoder, "encoder")
