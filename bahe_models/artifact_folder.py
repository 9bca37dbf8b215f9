"""The config.json of a model artifact: what can be known without its weights. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bahe_core.errors import BadInput, BaheError, NotServable, storage_problem
from bahe_models.config import ModelConfig

FORMAT = 1


def require_servable(folder: Path) -> None:
    """Raises NotServable when the folder's model needs more than stored vectors to score.

    Raises BadInput when the folder is not an artifact. Weights are not read.
    """
    config = read_config(folder)
    require_vectors_suffice(config["model_version"], ModelConfig(**config["model"]))


def require_vectors_suffice(model_version: str, config: ModelConfig) -> None:
    """Raises NotServable when the model needs more than stored vectors to score."""
    if not config.vectors_suffice:
        raise NotServable(
            f"{model_version} has the {config.head} head, which reads the user's raw history for each"
            " item, so stored vectors are not enough to score; set model.head to dnn or dcn and train"
            " again to serve it."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The config. Raises BadInput when the folder is no artifact of this format, NotWritable when it may
    not be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise no_artifact(folder, error) from None
    if config.get("format") != FORMAT:
        raise BadInput(
            f"{folder} has artifact format {config.get('format')}, but this version of bahe reads {FORMAT};"
            " train again."
        )
    config["model"].setdefault("behavior_ids", False)  # older artifacts have no collaborative part
    return config


def further_features(config: dict[str, Any]) -> dict[str, list[str]]:
    """What `features` of dataset.yaml listed for the model, by kind, as `view:feature`.

    `config` is what `read_config` gives.
    """
    return {
        "numeric": list(config["dense"].get("numeric", ())),
        "categorical": list(config["facts"].get("categorical", ())),
        "vectors": list(vector_widths_of(config)),
    }


def vector_widths_of(config: dict[str, Any]) -> dict[str, int]:
    """Widths of the vectors that `features` of dataset.yaml listed for the model, by `view:feature`.

    `config` is what `read_config` gives.
    """
    return dict(config.get("vectors", {}))  # older artifacts have none


def no_artifact(folder: Path, error: Exception) -> BaheError:
    """The error for a folder that cannot be read as an artifact: NotWritable where it is not allowed to."""
    return storage_problem(error) or BadInput(f"{folder} is not a model artifact ({error}); train again.")
