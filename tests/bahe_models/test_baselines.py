from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_models import (
    BackboneConfig,
    BaheModel,
    DenseFeatures,
    ModelConfig,
    TrainingConfig,
    auc,
    load_backbone,
)
from bahe_models.baselines import LongText, TokenTimelines, token_timelines, train_din
from bahe_models.target import recent_behaviors
from tests.support.toy import toy_data


def test_recent_behaviors_are_the_latest_of_the_prefix() -> None:
    data = toy_data()
    split = data.splits["train"]
    recent = recent_behaviors(data.timelines, split.user_N, split.length_NC, 5)
    for n in range(0, len(split), 37):
        for channel in range(2):
            begin = data.timelines.offsets[channel][split.user_N[n]]
            prefix = data.timelines.atoms[channel][begin : begin + split.length_NC[n, channel]]
            found = recent[n, channel * 5 : channel * 5 + 5]
            assert found[found >= 0].tolist() == prefix[::-1][:5].tolist()


def test_din_learns_who_likes_what() -> None:
    data = toy_data(rows=12_000)
    data = replace(data, splits=data.splits | {"train": data.splits["test"], "test": data.splits["train"]})
    split = data.splits["train"]
    dense = DenseFeatures.fit(
        split.columns, split.length_NC, split.time_us_N, channels=("liked", "disliked"), click_rate=0.5
    )
    score, trained = train_din(data, dense, TrainingConfig(learning_rate=1e-2))
    test = data.splits["test"]
    assert auc(test.clicked_N, score(test)) > 0.7
    assert trained.seconds > 0


def long_text(tiny_backbone: Path) -> tuple[LongText, TokenTimelines]:
    halves = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{w}" for w in rng.integers(60, size=rng.integers(1, 6))) for _ in range(30)]
    counts = np.array([12, 0, 20, 1, 0, 9])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    timelines = token_timelines(halves.tokenizer, texts, rng.integers(30, size=counts.sum()), offsets)
    torch.manual_seed(1)
    config = ModelConfig(deep_width=8, profile_width=8, head_width=8)
    head = BaheModel(halves.deep, width=32, channels=1, items=5, dense_features=3, config=config)
    return LongText(halves.shallow, head).eval(), timelines


@pytest.mark.parametrize("tokens_per_pass", [64, 16_384])
def test_packed_equals_per_impression_when_the_history_fits(
    tiny_backbone: Path, tokens_per_pass: int
) -> None:
    model, timelines = long_text(tiny_backbone)
    user = np.random.default_rng(1).integers(6, size=50)
    length = np.random.default_rng(2).integers(0, np.diff(timelines.offsets)[user] + 1)
    with torch.inference_mode():
        packed, reference = (
            model.user_vectors(timelines, user, length, 200, packed=packed, tokens_per_pass=tokens_per_pass)
            for packed in (True, False)
        )
    torch.testing.assert_close(packed, reference, atol=1e-4, rtol=0)
    assert packed[:, :8].std(dim=0).min() > 1e-4  # the comparison is not one of constants


def test_prompts_hold_whole_behaviors_before_the_impression(tiny_backbone: Path) -> None:
    _, timelines = long_text(tiny_backbone)
    user = np.repeat(np.arange(6), np.diff(timelines.offsets) + 1)
    length = np.concatenate([np.arange(n + 1) for n in np.diff(timelines.offsets)])
    first = timelines.starts[timelines.offsets[user]]
    for packed in (False, True):
        begin, end = timelines.spans(user, length, 16, packed=packed)
        assert (begin >= first).all()
        assert (begin <= end).all()
        assert (end - begin <= 15).all()
        assert np.isin(begin, timelines.starts).all()
        np.testing.assert_array_equal(end, timelines.starts[timelines.offsets[user] + length])
    # Per impression, one more behavior in front would not fit.
    begin, end = timelines.spans(user, length, 16, packed=False)
    cut = begin > first
    before = timelines.starts[np.searchsorted(timelines.starts, begin[cut]) - 1]
    assert cut.any()
    assert (end[cut] - before > 15).all()


def test_only_the_shallow_layers_are_frozen(tiny_backbone: Path) -> None:
    model, timelines = long_text(tiny_backbone)
    model.train()
    user, length = np.array([0, 2]), np.array([12, 20])
    model.user_vectors(timelines, user, length, 64, packed=False).sum().backward()
    assert all(p.grad is None for p in model.shallow.parameters())
    assert all(p.grad is not None for p in model.head.aggregator.deep.parameters())
