"""Two numbers that set right how sure a model is of itself; the order stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_models import load
from bahe_models.calibration import AS_IT_IS, LEAST, Calibration, fit_calibration
from bahe_models.metrics import expected_calibration_error, probability
from bahe_models.trainer.saved_model import logits_of
from tests.support.toy import toy_artifact, toy_batches, toy_data


def overconfident(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clicks, and logits that are twice what they should be, and 0.4 too high."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1.0, 1.0, rows)
    return (rng.random(rows) < probability(truth)).astype(np.float32), 2 * truth + 0.4


def test_what_is_too_sure_is_set_right_on_later_clicks() -> None:
    fitted = fit_calibration(*overconfident(20_000, 0))
    assert fitted.slope == pytest.approx(0.5, abs=0.03)
    assert fitted.offset == pytest.approx(-0.2, abs=0.05)
    clicked, logit = overconfident(20_000, 1)
    assert expected_calibration_error(clicked, probability(logit)) > 0.05
    assert expected_calibration_error(clicked, probability(fitted.apply(logit))) < 0.02


def test_too_few_clicks_or_a_wrong_order_change_nothing() -> None:
    clicked, logit = overconfident(LEAST, 0)
    assert fit_calibration(clicked, logit) != AS_IT_IS
    assert fit_calibration(clicked[1:], logit[1:]) == AS_IT_IS
    assert fit_calibration(clicked, -logit) == AS_IT_IS
    assert fit_calibration(np.arange(LEAST) < 9, logit) == AS_IT_IS
    assert fit_calibration(np.zeros(LEAST), logit) == AS_IT_IS


def test_an_artifact_answers_with_it_in_every_way_and_one_of_before_has_none(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    data = toy_data()
    test = data.splits["test"]
    plain = toy_artifact(toy_batches(data, tiny_backbone))
    replace(plain, calibration=Calibration(0.5, 0.25)).save(tmp_path / "model")
    artifact = load(tmp_path / "model")
    cpu = torch.device("cpu")
    before = logits_of(plain, data, test, cpu)
    np.testing.assert_allclose(logits_of(artifact, data, test, cpu), before / 2 + 0.25, atol=1e-4)
    user = artifact.user_vectors(
        torch.from_numpy(data.atoms_AD), data.atom_ids, data.timelines, test.user_N, test.length_NC
    )
    item = artifact.item_vectors(
        torch.from_numpy(data.atoms_AD[data.item_atom_I[test.item_N]]),
        [data.item_ids[i] for i in test.item_N],
    )
    scores = artifact.score(user, item, test.columns, test.length_NC, test.time_us_N)
    np.testing.assert_allclose(scores, probability(before / 2 + 0.25), atol=1e-4)

    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["calibration"]
    path.write_text(json.dumps(config))
    assert load(tmp_path / "model").calibration == AS_IT_IS
