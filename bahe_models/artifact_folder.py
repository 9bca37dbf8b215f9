"""The folder of a model artifact, as far as it is text: what it says of itself. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bahe_core.errors import BadInput, NotServable
from bahe_models.config import ModelConfig

FORMAT = 1


def require_servable(folder: Path) -> None:
    """Raises NotServable when scores of the folder's artifact need more than stored vectors.

    Raises BadInput when the folder is no artifact. Weights are not read.
    """
    config = read_config(folder)
    require_vectors_suffice(config["model_version"], ModelConfig(**config["model"]))


def require_vectors_suffice(model_version: str, config: ModelConfig) -> None:
    """Raises NotServable when scores need more than stored vectors."""
    if not config.vectors_suffice:
        raise NotServable(
            f"{model_version} has the {config.head} head, which reads the user's history anew for each"
            " item, so that stored vectors do not suffice to score; to serve, set model.head to dnn or"
            " dcn and train again."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Its config.json. Raises BadInput when the folder is no artifact, or one of another format."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise no_artifact(folder, error) from None
    if config.get("format") != FORMAT:
        raise BadInput(
            f"{folder} has artifact format {config.get('format')}, this bahe reads {FORMAT}; train again."
        )
    config["model"].setdefault("behavior_ids", False)  # artifacts of before have no collaborative part
    return config


def no_artifact(folder: Path, error: Exception) -> BadInput:
    """The error for a folder that cannot be read as one."""
    return BadInput(f"{folder} is not a model artifact ({error}); train again.")
