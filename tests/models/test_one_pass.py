"""Invariant 4: the states of one pass per user equal those of one pass per impression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bahe_models import (
    BackboneConfig,
    BaheModel,
    ModelConfig,
    Timelines,
    WindowConfig,
    load_backbone,
    window_batch,
)
from bahe_models.timelines import plan_steps, window_start


def random_timelines(rng: np.random.Generator, users: int, atoms: int, longest: int) -> Timelines:
    offsets, rows = [], []
    for _ in range(2):
        counts = rng.integers(0, longest + 1, users)
        offsets.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        rows.append(rng.integers(0, atoms, counts.sum()).astype(np.int64))
    return Timelines(("a", "b"), tuple(offsets), tuple(rows))


def impressions_of(
    rng: np.random.Generator, timelines: Timelines, count: int
) -> tuple[np.ndarray, np.ndarray]:
    user = rng.integers(0, timelines.users, count)
    length = rng.integers(0, timelines.lengths()[user] + 1)
    return user.astype(np.int64), length.astype(np.int64)


def build(deep: torch.nn.Module, width: int) -> BaheModel:
    torch.manual_seed(1)
    config = ModelConfig(deep_width=8, profile_width=8, head_width=8)
    model = BaheModel(deep, width=width, channels=2, items=5, dense_features=3, config=config)
    torch.nn.init.normal_(model.profile.gate.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("window", [WindowConfig(size=64, overlap=0), WindowConfig(size=8, overlap=5)])
def test_one_pass_equals_per_impression(tiny_backbone: Path, window: WindowConfig) -> None:
    halves = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))
    rng = np.random.default_rng(0)
    timelines = random_timelines(rng, users=7, atoms=40, longest=30)
    user, length = impressions_of(rng, timelines, 60)
    atoms = torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32))
    model = build(halves.deep, 32)
    with torch.inference_mode():
        one_pass = model.user_vectors(atoms, window_batch(timelines, user, length, window))
        reference = model.user_vectors(atoms, window_batch(timelines, user, length, window, share=False))
    torch.testing.assert_close(one_pass, reference, atol=1e-4, rtol=0)
    assert one_pass.std(dim=0).min() > 1e-4  # the comparison is not one of constants


@pytest.mark.slow
def test_one_pass_equals_per_impression_on_the_real_model() -> None:
    from materialize.fetch import DOWNLOADS, fetch

    path = fetch("smollm2-135m") / DOWNLOADS["smollm2-135m"].names[0]
    halves = load_backbone(BackboneConfig(path=str(path), shallow_layers=8, deep_layers=2))
    rng = np.random.default_rng(0)
    timelines = random_timelines(rng, users=4, atoms=100, longest=60)
    user, length = impressions_of(rng, timelines, 24)
    atoms = torch.from_numpy(rng.normal(size=(100, halves.width)).astype(np.float32))
    model = build(halves.deep, halves.width)
    window = WindowConfig()
    with torch.inference_mode():
        one_pass = model.user_vectors(atoms, window_batch(timelines, user, length, window))
        reference = model.user_vectors(atoms, window_batch(timelines, user, length, window, share=False))
    torch.testing.assert_close(one_pass, reference, atol=1e-4, rtol=0)


def test_later_behaviors_change_no_earlier_state(tiny_backbone: Path) -> None:
    halves = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))
    model = build(halves.deep, 32)
    rng = np.random.default_rng(3)
    timelines = random_timelines(rng, users=3, atoms=40, longest=20)
    changed = Timelines(
        timelines.channels,
        timelines.offsets,
        tuple(np.concatenate([a[:-1], [(a[-1] + 1) % 40]]) for a in timelines.atoms),
    )
    user = np.array([0, 1, 2, 2])
    length = np.maximum(timelines.lengths()[user] - 1, 0)
    atoms = torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32))
    full = timelines.lengths()[user]
    with torch.inference_mode():
        # All impressions of a user in one pass that also reads the last, changed behavior.
        users, lengths = np.concatenate([user, user]), np.concatenate([length, full])
        before = model.user_vectors(atoms, window_batch(timelines, users, lengths, WindowConfig()))
        after = model.user_vectors(atoms, window_batch(changed, users, lengths, WindowConfig()))
    torch.testing.assert_close(before[:4], after[:4], atol=1e-5, rtol=0)
    assert not torch.allclose(before[6:], after[6:], atol=1e-3)


@given(size=st.integers(1, 50), data=st.data(), length=st.integers(0, 500))
def test_every_window_shows_the_configured_context(size: int, data: st.DataObject, length: int) -> None:
    config = WindowConfig(size=size, overlap=data.draw(st.integers(0, size - 1)))
    seen = length - int(window_start(np.array([length]), config)[0])
    assert min(length, config.overlap) <= seen <= size


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), step=st.integers(1, 40), shuffled=st.booleans())
def test_a_plan_holds_every_impression_once(seed: int, step: int, shuffled: bool) -> None:
    rng = np.random.default_rng(seed)
    user, length = rng.integers(0, 6, 50), rng.integers(0, 20, (50, 2))
    steps = list(plan_steps(user, length, impressions_per_step=step, rng=rng if shuffled else None))
    assert sorted(np.concatenate(steps).tolist()) == list(range(50))
    assert max(map(len, steps)) <= step


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_impression_reads_the_end_of_its_own_prefix(seed: int) -> None:
    rng = np.random.default_rng(seed)
    timelines = random_timelines(rng, users=4, atoms=1000, longest=25)
    user, length = impressions_of(rng, timelines, 20)
    config = WindowConfig(size=10, overlap=4)
    batch = window_batch(timelines, user, length, config)
    flat = np.concatenate([block.atoms_WL.ravel() for block in batch.blocks])
    for n in range(20):
        for channel in range(2):
            row, count = batch.state_NC[n, channel], batch.position_NC[n, channel]
            end = timelines.offsets[channel][user[n]] + length[n, channel]
            expected = timelines.atoms[channel][end - count : end]
            np.testing.assert_array_equal(flat[row - count + 1 : row + 1], expected)
            assert flat[row - count] == -1  # the start position
