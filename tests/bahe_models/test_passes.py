"""A step of any histories is read in passes of bounded size, and is still one step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bahe_models import Batches, TrainingConfig, WindowConfig, train, window_batch
from bahe_models.config import POSITIONS_PER_PASS
from bahe_models.model import UserAggregator
from bahe_models.passes import bounded_passes, plan_passes, positions_read
from bahe_models.timelines import Int64, Timelines
from bahe_models.trainer import training_loop
from bahe_models.trainer.importance import permutation_importance
from bahe_models.trainer.impressions import Impressions, TrainingData
from bahe_models.trainer.training_loop import seeded
from tests.support.toy import at_moments, toy_artifact, toy_batches, toy_config, toy_data

STILL: dict[str, Any] = {"dropout": 0.0, "item_id_dropout": 0.0}
"""A model without random draws."""
BOUND = 150


def one_impression_each(users: int = 300, behaviors: int = 60) -> TrainingData:
    """Many users, each with long timelines and one impression: positions are not those of impressions."""
    data, rng = toy_data(rows=users + 100, train=users), np.random.default_rng(0)
    rows = users * behaviors
    offsets = (np.arange(0, rows + 1, behaviors, dtype=np.int64),) * 2
    atoms = tuple(rng.integers(0, len(data.atoms_AD), rows) for _ in range(2))
    time_us = (np.tile(np.arange(behaviors, dtype=np.int64), users),) * 2
    lines = Timelines(data.timelines.channels, offsets, atoms, time_us)

    def part(split: Impressions) -> Impressions:
        lengths = rng.integers(behaviors // 2, behaviors + 1, (len(split), 2))
        return replace(split, user_N=np.arange(len(split)), length_NC=lengths)

    return replace(data, timelines=lines, splits={name: part(s) for name, s in data.splits.items()})


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of every pass through the deep layers."""
    seen: list[int] = []
    forward = UserAggregator.forward

    def watched(self: UserAggregator, inputs_PD: torch.Tensor, packing: Any) -> torch.Tensor:
        seen.append(len(inputs_PD))
        return forward(self, inputs_PD, packing)

    monkeypatch.setattr(UserAggregator, "forward", watched)
    return seen


def test_no_pass_of_a_training_is_larger_than_the_bound(tiny_backbone: Path, widths: list[int]) -> None:
    batches = toy_batches(one_impression_each(), tiny_backbone)
    steps: list[int] = []
    train(
        batches,
        toy_config(epochs=1, positions_per_pass=BOUND),
        on_step=lambda impressions, loss: steps.append(impressions),
    )
    permutation_importance(batches, batches.data.splits["validation"])
    assert steps == [100, 100, 100], "a step is the same impressions, whatever it takes to read them"
    assert len(widths) > 100
    assert max(widths) <= BOUND


def test_vectors_and_scores_are_read_in_bounded_passes(
    tiny_backbone: Path, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = one_impression_each()
    artifact = toy_artifact(toy_batches(data, tiny_backbone))
    split, atoms_AD = data.splits["train"], torch.from_numpy(data.atoms_AD)

    def read() -> tuple[np.ndarray, np.ndarray]:
        history = (atoms_AD, data.atom_ids, data.timelines, split.user_N, split.length_NC)
        items = (data.item_atom_I[split.item_N], split.item_N.tolist())
        scores = artifact.score_timelines(*history, *items, split.columns, split.time_us_N)
        return artifact.user_vectors(*history), scores

    whole = read()
    assert BOUND < max(widths) <= POSITIONS_PER_PASS
    widths.clear()
    monkeypatch.setattr("bahe_models.artifact.POSITIONS_PER_PASS", BOUND)
    for cut, uncut in zip(read(), whole, strict=True):
        np.testing.assert_allclose(cut, uncut, atol=1e-5)
    assert max(widths) <= BOUND


def gradients(batches: Batches, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of a training's first update, before they are clipped."""
    found: dict[str, Any] = {}

    class Found(Exception):
        pass

    def clip(parameters: Any, largest: float) -> None:
        found.update({n: p.grad.clone() for n, p in batches.model.named_parameters() if p.grad is not None})
        raise Found

    monkeypatch.setattr(training_loop, "clip_gradients", clip)
    with seeded(0), pytest.raises(Found):
        train(batches, config)
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("data", [at_moments(toy_data()), one_impression_each()], ids=["toy", "long"])
@pytest.mark.parametrize("channels", ["parallel", "merged"])
def test_passes_have_the_gradient_of_the_whole_step(
    channels: str,
    data: TrainingData,
    accumulate: int,
    tiny_backbone: Path,
    widths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if channels == "merged":
        data = at_one_moment(data)
    found = []
    for bound in (10**6, 70):
        with seeded(0):
            batches = toy_batches(data, tiny_backbone, channels=channels, **STILL)
        batches.window = WindowConfig(size=16, overlap=8)
        config = toy_config(accumulate=accumulate, positions_per_pass=bound)
        found.append(gradients(batches, config, monkeypatch))
    assert max(widths[accumulate:]) <= 70 < max(widths[:accumulate])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)
    assert found[0].keys() == found[1].keys()


def at_one_moment(data: TrainingData) -> TrainingData:
    """The same with as many behaviors of each channel, where both channels share their times."""

    def part(split: Impressions) -> Impressions:
        return replace(split, length_NC=np.repeat(split.length_NC[:, :1], 2, axis=1))

    if all(np.array_equal(times, data.timelines.time_us[0]) for times in data.timelines.time_us):
        return replace(data, splits={name: part(split) for name, split in data.splits.items()})
    return data


def test_a_step_that_fits_is_taken_as_it_was(tiny_backbone: Path) -> None:
    weights = []
    for bound in (POSITIONS_PER_PASS, 10**9):
        with seeded(0):
            batches = toy_batches(toy_data(), tiny_backbone)
            train(batches, toy_config(epochs=1, positions_per_pass=bound))
        weights.append(batches.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def test_the_bound_names_another_model_only_where_it_is_not_the_default() -> None:
    fields = TrainingConfig().fields_affecting_weights()
    assert "positions_per_pass" not in fields, "models from before the bound keep their names"
    smaller = TrainingConfig(positions_per_pass=100).fields_affecting_weights()
    assert smaller == {**fields, "positions_per_pass": 100}, "its dropout draws are others"


def read_by(
    timelines: Timelines, user_N: Int64, length_NC: Int64, window: WindowConfig, merged: bool
) -> int:
    return int(window_batch(timelines, user_N, length_NC, window, merged=merged).length_W.sum())


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    merged=st.booleans(),
    bound=st.integers(1, 120),
    impressions=st.integers(1, 40),
    window=st.sampled_from(
        [WindowConfig(), WindowConfig(size=6, overlap=3), WindowConfig(size=5, overlap=0)]
    ),
)
def test_a_pass_holds_as_much_as_the_bound_allows(
    seed: int, merged: bool, bound: int, impressions: int, window: WindowConfig
) -> None:
    """Every impression once; within the bound, unless it is one impression; and one pass if all fit."""
    data = at_moments(toy_data(seed=seed % 20, users=6, rows=80, train=60))
    lines, split = data.timelines, data.splits["train"]
    user_N, length_NC = split.user_N, split.length_NC
    everyone = positions_read(user_N, length_NC, window, merged=merged)
    assert everyone.sum() == read_by(lines, user_N, length_NC, window, merged)
    plan = list(
        plan_passes(user_N, length_NC, window, impressions=impressions, positions=bound, merged=merged)
    )
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(split)))
    for rows in plan:
        read = read_by(lines, user_N[rows], length_NC[rows], window, merged)
        assert len(rows) <= impressions
        assert read <= bound or len(rows) == 1
    order = np.lexsort((length_NC.sum(axis=1), user_N))
    parts = bounded_passes(user_N[order], length_NC[order], window, positions=bound, merged=merged)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(len(order)))
    assert (len(parts) == 1) == (everyone.sum() <= bound)


def test_users_stay_whole_where_they_fit() -> None:
    user_N = np.repeat([4, 1, 7], [3, 2, 4])
    length_NC = np.array([[1], [5], [9], [3], [4], [1], [2], [19], [24]])
    parts = bounded_passes(user_N, length_NC, WindowConfig(size=8, overlap=4), positions=17)
    # User 4 reads windows of 6 and 6 positions, user 1 one of 5, and user 7 some of 3, 8 and 9.
    assert [user_N[part].tolist() for part in parts] == [[4, 4, 4, 1, 1], [7, 7, 7], [7]]


def test_no_impressions_are_one_empty_pass() -> None:
    empty = np.empty(0, dtype=np.int64)
    (only,) = bounded_passes(empty, empty.reshape(0, 2), WindowConfig(), positions=10)
    assert not len(only)
