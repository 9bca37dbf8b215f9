"""Invariant 4: the states of one pass per user equal those of one pass per impression."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bahe_core.errors import BadInput
from bahe_models import (
    BackboneConfig,
    BaheModel,
    ModelConfig,
    Timelines,
    WindowConfig,
    load_backbone,
    window_batch,
)
from bahe_models.packing import Packing
from bahe_models.timelines import GAP_BUCKETS, Int64, gap_buckets, plan_steps, window_start
from tests.support.toy import know_behaviors

SECOND = 10**6
Channels = Literal["parallel", "merged"]
MODES = [(channels, gaps) for channels in ("parallel", "merged") for gaps in (False, True)]


def random_timelines(
    rng: np.random.Generator, users: int, atoms: int, longest: int, channels: int = 2
) -> Timelines:
    """Behaviors within a few instants, so that many share theirs, with gaps of seconds up to a year."""
    instants = np.cumsum(SECOND * 4 ** rng.integers(0, 14, longest))
    offsets, rows, times = [], [], []
    for _ in range(channels):
        counts = rng.integers(0, longest + 1, users)
        offsets.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        rows.append(rng.integers(0, atoms, counts.sum()).astype(np.int64))
        times.append(np.concatenate([np.sort(rng.choice(instants, count)) for count in counts]))
    return Timelines(tuple("abc"[:channels]), tuple(offsets), tuple(rows), tuple(times))


def impressions_of(
    rng: np.random.Generator, timelines: Timelines, count: int
) -> tuple[np.ndarray, np.ndarray]:
    user = rng.integers(0, timelines.users, count)
    length = rng.integers(0, timelines.lengths()[user] + 1)
    return user.astype(np.int64), length.astype(np.int64)


def at_moments(rng: np.random.Generator, timelines: Timelines, count: int) -> tuple[Int64, Int64, Int64]:
    """Users, lengths and moments of impressions, each with the behaviors strictly before its moment."""
    user = rng.integers(0, timelines.users, count)
    moment = rng.choice(np.concatenate(timelines.time_us), count) + rng.integers(0, 2, count)
    length = [
        [
            int((times[offset[u] : offset[u + 1]] < t).sum())
            for offset, times in zip(timelines.offsets, timelines.time_us, strict=True)
        ]
        for u, t in zip(user, moment, strict=True)
    ]
    return user.astype(np.int64), np.array(length), moment


def build(
    deep: torch.nn.Module, width: int, channels: Channels = "parallel", time_gaps: bool = False
) -> BaheModel:
    torch.manual_seed(1)
    config = ModelConfig(
        deep_width=8, profile_width=8, recent=(2, 6), head_width=8, channels=channels, time_gaps=time_gaps
    )
    model = BaheModel(deep, width=width, channels=2, items=5, dense_features=3, config=config, behaviors=30)
    know_behaviors(model, np.arange(30))
    torch.nn.init.normal_(model.profile.gate.weight, std=0.1)
    for embedding in model.behaviors.parameters():
        torch.nn.init.normal_(embedding)
    return model.eval()


@pytest.mark.parametrize("window", [WindowConfig(size=64, overlap=0), WindowConfig(size=8, overlap=5)])
@pytest.mark.parametrize(("channels", "time_gaps"), MODES)
def test_one_pass_equals_per_impression(
    tiny_backbone: Path, window: WindowConfig, channels: Channels, time_gaps: bool
) -> None:
    halves = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))
    rng = np.random.default_rng(0)
    timelines = random_timelines(rng, users=7, atoms=40, longest=30)
    merged = channels == "merged"
    if merged:
        user, length, _ = at_moments(rng, timelines, 60)
    else:
        user, length = impressions_of(rng, timelines, 60)
    user, length = np.append(user, 0), np.append(length, [[0, 0]], axis=0)  # and one without history
    atoms = torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32))
    model = build(halves.deep, 32, channels, time_gaps)
    with torch.inference_mode():
        one_pass, reference = (
            model.user_vectors(
                atoms,
                window_batch(timelines, user, length, window, share=share, merged=merged),
                model.behavior_rows(torch.arange(40)),
            )
            for share in (True, False)
        )
    torch.testing.assert_close(one_pass, reference, atol=1e-4, rtol=0)
    assert one_pass.std(dim=0).min() > 1e-4  # the comparison is not one of constants
    assert model.user_projection.in_features == (32 if merged else 64)


@pytest.mark.slow
def test_one_pass_equals_per_impression_on_the_real_model() -> None:
    from materialize.config.fetch import DOWNLOADS, fetch

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


@pytest.mark.parametrize("what", ["atoms", "times"])
@pytest.mark.parametrize(("channels", "time_gaps"), MODES)
def test_later_behaviors_change_no_earlier_state(
    tiny_backbone: Path, channels: Channels, time_gaps: bool, what: str
) -> None:
    halves = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))
    model = build(halves.deep, 32, channels, time_gaps)
    rng = np.random.default_rng(3)
    timelines = random_timelines(rng, users=6, atoms=40, longest=20)
    user = np.arange(6)
    # Each user's moment is that of some behavior; it and all later ones change.
    moment = np.array([np.median(times_of(timelines, u)) for u in user]).astype(np.int64)
    length = np.array([[(part < moment[u]).sum() for part in parts_of(timelines, u)] for u in user])
    later = [
        np.concatenate([part >= moment[u] for u, part in enumerate(parts)])
        for parts in zip(*(parts_of(timelines, u) for u in user), strict=True)
    ]
    if what == "atoms":
        changed = replace(
            timelines,
            atoms=tuple(np.where(m, (a + 1) % 40, a) for a, m in zip(timelines.atoms, later, strict=True)),
        )
    else:  # the last channel's later behaviors move far away, past those of the other
        far = int(np.concatenate(timelines.time_us).max())
        moved = timelines.time_us[1] + far * later[1]
        changed = replace(timelines, time_us=(timelines.time_us[0], moved))
    atoms = torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32))
    # All impressions of a user in one pass that also reads the later behaviors.
    users, lengths = np.concatenate([user, user]), np.concatenate([length, timelines.lengths()])
    assert (length.sum(axis=1) > 0).any()
    with torch.inference_mode():
        before, after = (
            model.user_vectors(
                atoms,
                window_batch(lines, users, lengths, WindowConfig(), merged=channels == "merged"),
                model.behavior_rows(torch.arange(40)),
            )
            for lines in (timelines, changed)
        )
    torch.testing.assert_close(before[:6], after[:6], atol=1e-5, rtol=0)
    if what == "times" and channels == "parallel" and not time_gaps:
        assert torch.equal(before, after)  # time is not read at all
    else:
        assert not torch.allclose(before[6:], after[6:], atol=1e-3)


def parts_of(timelines: Timelines, user: int) -> list[Int64]:
    """One user's times, per channel."""
    return [
        times[offset[user] : offset[user + 1]]
        for offset, times in zip(timelines.offsets, timelines.time_us, strict=True)
    ]


def times_of(timelines: Timelines, user: int) -> Int64:
    return np.concatenate(parts_of(timelines, user))


def test_of_one_channel_merged_is_parallel(tiny_backbone: Path) -> None:
    halves = load_backbone(BackboneConfig(path=str(tiny_backbone), shallow_layers=2, deep_layers=2))
    rng = np.random.default_rng(1)
    timelines = random_timelines(rng, users=5, atoms=40, longest=20, channels=1)
    user, length, _ = at_moments(rng, timelines, 20)
    atoms = torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32))
    vectors = []
    for channels in ("parallel", "merged"):
        torch.manual_seed(1)
        config = ModelConfig(deep_width=8, profile_width=8, head_width=8, channels=channels)
        model = BaheModel(halves.deep, width=32, channels=1, items=5, dense_features=3, config=config)
        batch = window_batch(timelines, user, length, WindowConfig(size=8, overlap=3), merged=config.merged)
        with torch.inference_mode():
            vectors.append(model.eval().user_vectors(atoms, batch))
    # The channel embedding starts at nought, and no option moves another's random start.
    assert torch.equal(*vectors)


def test_gaps_fall_into_buckets_by_powers_of_four_seconds() -> None:
    day = 86_400
    seconds = np.array([0, 0.999999, 1, 3.999999, 4, 16, 3600, day, 7 * day, 365 * day, 40 * 365 * day])
    buckets = gap_buckets(np.round(seconds * SECOND).astype(np.int64))
    assert buckets.tolist() == [1, 1, 2, 2, 3, 4, 7, 10, 11, 14, 14]
    assert GAP_BUCKETS == 15


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


def behaviors_of(timelines: Timelines, user: int, channels: list[int]) -> list[tuple[int, int, int, int]]:
    """Time, channel, position and atom of a user's behaviors, in order."""
    found = []
    for channel in channels:
        begin, end = timelines.offsets[channel][user : user + 2]
        for position, row in enumerate(range(begin, end)):
            time_us, atom = timelines.time_us[channel][row], timelines.atoms[channel][row]
            found.append((int(time_us), channel, position, int(atom)))
    return sorted(found)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), merged=st.booleans(), channels=st.integers(1, 3))
def test_every_impression_reads_the_end_of_its_own_prefix(seed: int, merged: bool, channels: int) -> None:
    """Of the merged timeline too: what lies before a moment comes first, however many share an instant."""
    rng = np.random.default_rng(seed)
    timelines = random_timelines(rng, users=4, atoms=1000, longest=25, channels=channels)
    if not sum(map(len, timelines.atoms)):
        return
    user, length, moment = at_moments(rng, timelines, 20)
    batch = window_batch(timelines, user, length, WindowConfig(size=10, overlap=4), merged=merged)
    atoms, channel_of, gaps = batch.atoms_P, batch.channel_P, batch.gap_P
    assert len(atoms) == batch.length_W.sum()
    assert (np.diff(batch.length_W) <= 0).all()
    sequences = [list(range(channels))] if merged else [[channel] for channel in range(channels)]
    assert batch.state_NS.shape == (20, len(sequences))
    for n in range(20):
        for s, held in enumerate(sequences):
            row, count = batch.state_NS[n, s], batch.position_NS[n, s]
            whole = behaviors_of(timelines, user[n], held)
            before = [behavior for behavior in whole if behavior[0] < moment[n]]
            assert whole[: len(before)] == before
            read = slice(row - count + 1, row + 1)
            expected = before[len(before) - count :]
            assert atoms[read].tolist() == [atom for _, _, _, atom in expected]
            assert channel_of[read].tolist() == [channel for _, channel, _, _ in expected]
            times = np.array([time for time, _, _, _ in before], dtype=np.int64)
            buckets = [0, *gap_buckets(np.diff(times)).tolist()][len(before) - count : len(before)]
            assert gaps[read].tolist() == buckets
            assert atoms[row - count] == -1  # the start position


def test_what_has_no_order_is_refused() -> None:
    offsets, atoms = (np.array([0, 2, 3]),) * 2, (np.arange(3),) * 2
    # The second user's clock starts again; that is no going back.
    timelines = Timelines(("a", "b"), offsets, atoms, (np.array([3, 8, 1]), np.array([5, 8, 1])))
    user = np.array([1, 0])
    for right in ([0, 0], [1, 0], [1, 1], [2, 2]):
        window_batch(timelines, user, np.array([[1, 1], right]), WindowConfig(), merged=True)
    for wrong in ([0, 1], [2, 1], [1, 2], [2, 0]):  # [2, 1] would cut an instant in two
        with pytest.raises(BadInput, match=rf"\[{wrong[0]}, {wrong[1]}\] .* user row 0 .* pull"):
            window_batch(timelines, user, np.array([[1, 1], wrong]), WindowConfig(), merged=True)
    with pytest.raises(ValueError, match=r"time goes back .* channel b"):
        replace(timelines, time_us=(np.array([3, 8, 1]), np.array([5, 4, 1])))


def test_fading_sums_are_those_of_a_loop() -> None:
    lengths = np.array([9, 4, 4, 1])
    packing = Packing.of(lengths, torch.device("cpu"))
    rows = torch.randn(lengths.sum(), 3)
    expected = []
    for part in rows.split(lengths.tolist()):  # type: ignore[no-untyped-call]
        total = torch.zeros(3)
        for row in part:
            total = total / 2 ** (1 / 3) + row
            expected.append(total)
    torch.testing.assert_close(packing.fading_sums(rows, 3), torch.stack(expected))
