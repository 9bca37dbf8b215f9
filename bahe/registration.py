"""Registering with Feast: which features must be online, for the models that may go live."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bahe_core.errors import BadInput
from bahe_core.home import Home


def register(home: Home, target: str | None) -> str:
    """Register entities, views and services; returns how many, in words.

    `target` says where online values lie from now on, None where they are.
    """
    from bahe_models.artifact_folder import further_features, read_config
    from feature_repo.store import apply
    from materialize.config.dataset import home_dataset

    dataset = home_dataset(home)
    features = dataset.features
    online = {*features.numeric, *features.categorical, *features.vectors}
    for artifact in home.models.glob("*/config.json"):  # any of them may be live again
        with suppress(BadInput):
            online.update(*further_features(read_config(artifact.parent)).values())
    team = None if dataset.feature_repo is None else Path(dataset.feature_repo)
    return apply(home, target, online=online, team=team)
