"""Fewer negatives and heavier clicks move the learned odds; predictions are corrected for both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bahe_models import TrainingConfig, load, train
from bahe_models.sampling import logit_shift, sampled_rows
from bahe_models.trainer.training_loop import seeded
from tests.support.toy import toy_artifact, toy_batches, toy_config, toy_data


def rate(logits: np.ndarray) -> float:
    return float((1 / (1 + np.exp(-logits))).mean())


@pytest.mark.parametrize(
    "settings", [{"negative_rate": 0.25}, {"positive_weight": 4.0}], ids=lambda s: next(iter(s))
)
def test_predictions_keep_the_logs_click_rate(
    settings: dict[str, Any], tiny_backbone: Path, tmp_path: Path
) -> None:
    data = toy_data(rows=9000, train=6000)  # an estimate from fewer is off by chance alone
    config = toy_config(learning_rate=3e-3, epochs=2, checkpoint_seconds=60, **settings)
    with seeded(0):
        batches = toy_batches(data, tiny_backbone)
        before = batches.predict(data.splits["test"])
        train(batches, replace(config, epochs=1, learning_rate=1e-9, deep_learning_rate=1e-9))
        np.testing.assert_allclose(batches.predict(data.splits["test"]), before, atol=1e-4)
        train(batches, config)
    test = data.splits["test"]
    logits = batches.predict(test)
    clicks = float(test.clicked_N.mean())
    assert rate(logits) == pytest.approx(clicks, abs=0.03)
    assert abs(rate(logits - config.logit_shift) - clicks) > 0.1, "the correction has something to correct"

    toy_artifact(batches).save(tmp_path / "model")
    artifact = load(tmp_path / "model")
    user = artifact.user_vectors(
        torch.from_numpy(data.atoms_AD), data.atom_ids, data.timelines, test.user_N, test.length_NC
    )
    item = artifact.item_vectors(
        torch.from_numpy(data.atoms_AD[data.item_atom_I[test.item_N]]), test.item_N.tolist()
    )
    scores = artifact.score(user, item, test.columns, test.length_NC, test.time_us_N)
    assert float(scores.mean()) == pytest.approx(rate(logits), abs=1e-5)


def test_an_artifact_without_a_correction_is_read(tiny_backbone: Path, tmp_path: Path) -> None:
    toy_artifact(toy_batches(toy_data(), tiny_backbone)).save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    assert '  "logit_shift": 0.0,\n' in config.read_text()
    config.write_text(config.read_text().replace('  "logit_shift": 0.0,\n', ""))
    assert load(tmp_path / "model").logit_shift == 0


def test_the_correction_is_that_of_he_et_al() -> None:
    p, w = 0.4, 0.25
    corrected = 1 / (1 + np.exp(-(np.log(p / (1 - p)) + logit_shift(w, 1.0))))
    assert corrected == pytest.approx(p / (p + (1 - p) / w))
    assert logit_shift(1.0, 1.0) == 0


def test_every_click_and_a_share_of_the_rest_is_drawn() -> None:
    clicked = (np.random.default_rng(0).random(20_000) < 0.2).astype(np.float32)
    first, again, other = (sampled_rows(clicked, 0.1, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert len(first) != len(other) or (first != other).any()
    assert clicked[first].sum() == clicked.sum()
    assert (1 - clicked[first]).sum() == pytest.approx(0.1 * (1 - clicked).sum(), rel=0.1)
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(sampled_rows(clicked, 1.0, rng), np.arange(len(clicked)))
    assert rng.random() == np.random.default_rng(3).random(), "without sampling nothing is drawn"


@pytest.mark.parametrize(
    "wrong",
    [
        {"negative_rate": 0},
        {"negative_rate": 1.5},
        {"positive_weight": 0},
        {"accumulate": 0},
        {"checkpoint_seconds": -1},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)
