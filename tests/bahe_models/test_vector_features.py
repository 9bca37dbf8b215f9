"""Vectors of the feature store: what the head reads of them, and a model that learns from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import Batches, TrainingData, auc, load, seeded, train
from bahe_models.trainer.importance import permutation_importance
from bahe_models.trainer.saved_model import logits_of
from bahe_models.trainer.warm_start import require_fit, start_from
from bahe_models.vector_features import PROJECTED, VectorFeatures, VectorInput
from tests.support.toy import CPU, toy_artifact, toy_batches, toy_config, toy_data

NARROW, WIDE = "taste:vector", "picture:vector"
WIDTHS = {NARROW: 3, WIDE: PROJECTED + 5}


def with_vectors(data: TrainingData) -> TrainingData:
    """One tells the click in its second coordinate, wherever it is known; the other is noise."""
    rng = np.random.default_rng(3)
    splits = {}
    for name, split in data.splits.items():
        vectors = {
            one: rng.normal(5, 2, (len(split), width)).astype(np.float32) for one, width in WIDTHS.items()
        }
        vectors[NARROW][:, 1] = 3 * split.clicked_N + rng.normal(size=len(split))
        vectors[NARROW][::4] = np.nan
        splits[name] = replace(split, vectors=vectors)
    return replace(data, splits=splits, vectors=WIDTHS)


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path) -> Batches:
    return trained_on(with_vectors(toy_data()), tiny_backbone)


def trained_on(data: TrainingData, backbone: Path) -> Batches:
    with seeded(0):
        batches = toy_batches(data, backbone)
        train(batches, toy_config())
    return batches


def test_a_vector_is_standardised_on_what_is_known() -> None:
    known_ND = torch.from_numpy(np.random.default_rng(0).normal(7, 3, (500, 4)).astype(np.float32))
    known_ND[:, 2] = 1.5
    vectors_ND = torch.cat([known_ND, torch.full((100, 4), torch.nan)])
    one = VectorInput(4)
    one.fit(vectors_ND)
    read_NG = one(vectors_ND)
    torch.testing.assert_close(read_NG[:500, :2].mean(dim=0), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(read_NG[:500, :2].std(dim=0), torch.ones(2), atol=0.05, rtol=0)
    assert not read_NG[:500, 2].any()  # constant
    assert not read_NG[500:].any()
    assert read_NG[:500, 4].all()
    far_away = one(torch.full((1, 4), 1e6))
    assert far_away.abs().max() <= 4


def test_a_wide_vector_is_projected() -> None:
    both = VectorFeatures(WIDTHS)
    read_NG = both([torch.randn(6, width) for width in WIDTHS.values()])
    assert read_NG.shape == (6, both.width) == (6, 3 + 1 + PROJECTED + 1)


def test_without_any_known_vector_there_is_nothing_to_learn() -> None:
    one = VectorInput(3)
    one.fit(torch.full((5, 3), torch.nan))
    assert not one(torch.full((5, 3), torch.nan)).any()


def test_a_model_learns_from_them(trained: Batches, tiny_backbone: Path) -> None:
    without = trained_on(toy_data(), tiny_backbone)
    scores = {}
    for name, batches in (("with", trained), ("without", without)):
        split = batches.data.splits["test"]
        scores[name] = auc(split.clicked_N, batches.predict(split))
    assert scores["with"] > scores["without"] + 0.05


def test_a_vector_is_one_feature_of_the_importance(trained: Batches) -> None:
    found = {one.name: one for one in permutation_importance(trained, trained.data.splits["validation"])}
    assert found[NARROW].features == 1
    assert found[NARROW].missing == pytest.approx(0.25, abs=0.01)
    assert found[NARROW].auc_lost > 0.05
    assert abs(found[WIDE].auc_lost) < 0.03


@pytest.mark.parametrize(("value", "words"), [(np.nan, "has no value at all"), (2.0, "is constant")])
def test_a_suspicious_vector_is_named(trained: Batches, value: float, words: str) -> None:
    split = trained.data.splits["validation"]
    same = np.full_like(split.vectors[WIDE], value)
    split = replace(split, vectors={**split.vectors, WIDE: same})
    found = {one.name: one for one in permutation_importance(trained, split)}
    assert found[WIDE].warning == words


def test_a_saved_artifact_scores_as_the_model_did(trained: Batches, tmp_path: Path) -> None:
    split = trained.data.splits["test"]
    toy_artifact(trained).save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.vectors == WIDTHS
    np.testing.assert_allclose(
        logits_of(loaded, trained.data, split, CPU), trained.predict(split), atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NARROW: None}, "the vectors of taste:vector are missing"),
        ({NARROW: np.zeros((2, 4), np.float32)}, r"taste:vector have the shape \[2, 4\], but .* \[2, 3\]"),
    ],
)
def test_other_vectors_are_refused(trained: Batches, change: dict[str, np.ndarray], words: str) -> None:
    artifact, split = toy_artifact(trained), trained.data.splits["test"].take(np.arange(2))
    given = {name: values for name, values in {**split.vectors, **change}.items() if values is not None}
    vectors = np.zeros((2, artifact.vector_width), np.float32)
    with pytest.raises(BadInput, match=words):
        artifact.score(vectors, vectors, split.columns, split.length_NC, split.time_us_N, vectors=given)
    data = replace(trained.data, splits={**trained.data.splits, "test": replace(split, vectors=given)})
    with pytest.raises(BadInput, match=words):
        data.check()


def test_a_refit_reads_those_of_every_split(trained: Batches) -> None:
    splits = trained.data.splits
    every = trained.data.all_to_train_on().splits["train"]
    for name in WIDTHS:
        expected = np.concatenate([splits[part].vectors[name] for part in ("train", "validation", "test")])
        np.testing.assert_array_equal(every.vectors[name], expected)


def test_a_warm_start_takes_their_standardisation(trained: Batches, tiny_backbone: Path) -> None:
    artifact = toy_artifact(trained)
    later = with_vectors(toy_data(seed=1))
    batches = toy_batches(later, tiny_backbone)
    start_from(artifact, batches, encoder_version="enc-toy")
    split = later.splits["test"]
    np.testing.assert_allclose(logits_of(artifact, later, split, CPU), batches.predict(split), atol=1e-4)
    with pytest.raises(BadInput, match=r"has the vectors taste:vector of 3 numbers.*not taste:vector of 4"):
        require_fit(
            artifact,
            encoder_version="enc-toy",
            channels=later.timelines.channels,
            context=(),
            numeric=(),
            vectors={**WIDTHS, NARROW: 4},
            config=batches.model.config,
        )
