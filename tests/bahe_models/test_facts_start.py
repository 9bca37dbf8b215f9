"""The head's network on dense features: what the first predictions know, and where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import ModelConfig, TrainingData, auc, load
from bahe_models.trainer.warm_start import start_from
from tests.support.toy import toy_artifact, toy_batches, toy_data

TWO = ("shop:left", "shop:right")


def with_a_corner(data: TrainingData) -> TrainingData:
    """Clicks come where both of two features are large or both small: no sum of the two tells them."""
    rng = np.random.default_rng(1)
    splits = {}
    for name, split in data.splits.items():
        left, right = rng.normal(size=(2, len(split)))
        clicked = (left * right + 0.1 * rng.normal(size=len(split)) > 0).astype(np.float32)
        columns = {**split.columns, "left": left, "right": right}
        splits[name] = replace(split, columns=columns, clicked_N=clicked)
    return replace(data, splits=splits, numeric=TWO)


def test_the_first_predictions_know_what_features_say_together(tiny_backbone: Path) -> None:
    data = with_a_corner(toy_data(rows=4000, train=3000))
    batches = toy_batches(data, tiny_backbone)
    split = data.splits["validation"]
    assert auc(split.clicked_N, batches.predict(split)) > 0.9
    head = batches.model.head
    assert head.alone is not None
    with torch.no_grad():
        alone_N = head.alone(batches.dense_features(split)).squeeze(-1).numpy()
    # The rest adds the similarities of the vectors at first, and no more.
    assert np.corrcoef(alone_N, batches.predict(split))[0, 1] > 0.95


def test_a_log_without_such_features_starts_from_its_floor(tiny_backbone: Path) -> None:
    batches = toy_batches(toy_data(), tiny_backbone)
    assert batches.model.head.alone is None
    assert batches.model.config.facts_width == 0
    assert batches.model.head.wide.weight[0, 0].item() == pytest.approx(batches.dense.deviation[0])


def test_zero_does_without(tiny_backbone: Path) -> None:
    batches = toy_batches(with_a_corner(toy_data()), tiny_backbone, facts_width=0)
    assert batches.model.head.alone is None
    assert "facts_width" not in ModelConfig(facts_width=0).fields_affecting_weights()
    assert ModelConfig().fields_affecting_weights()["facts_width"] == ModelConfig.facts_width
    with pytest.raises(ValueError, match="must not be negative"):
        ModelConfig(facts_width=-1)


def test_an_artifact_keeps_it_and_an_older_one_has_none(tiny_backbone: Path, tmp_path: Path) -> None:
    data = with_a_corner(toy_data())
    batches = toy_batches(data, tiny_backbone)
    toy_artifact(batches).save(tmp_path / "new")
    loaded = load(tmp_path / "new")
    split = data.splits["test"]
    expected = batches.predict(split)
    again = toy_batches(data, tiny_backbone)
    again.model.load_state_dict(loaded.model.state_dict())
    np.testing.assert_allclose(again.predict(split), expected, atol=1e-5)

    older = toy_batches(data, tiny_backbone, facts_width=0)
    toy_artifact(older).save(tmp_path / "older")
    path = tmp_path / "older" / "config.json"
    config = json.loads(path.read_text())
    del config["model"]["facts_width"]  # as it was written before there was one
    path.write_text(json.dumps(config))
    artifact = load(tmp_path / "older")
    assert artifact.model.head.alone is None

    # A night after the upgrade starts from it, and predicts what it did until it has learned more.
    night = toy_batches(data, tiny_backbone)
    start_from(artifact, night, encoder_version=artifact.encoder_version)
    assert night.model.head.alone is not None
    np.testing.assert_allclose(night.predict(split), older.predict(split), atol=1e-5)


def test_a_network_of_another_width_is_no_start(tiny_backbone: Path) -> None:
    data = with_a_corner(toy_data())
    artifact = toy_artifact(toy_batches(data, tiny_backbone))
    for width in (0, 64):
        other = toy_batches(data, tiny_backbone, facts_width=width)
        with pytest.raises(BadInput, match=rf"model\.facts_width 128, not {width}; .* train afresh"):
            start_from(artifact, other, encoder_version=artifact.encoder_version)
