"""A state that grows by one behavior at a time equals the pass over the whole timelines."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bahe_models import (
    AtomicEncoder,
    BackboneConfig,
    BaheModel,
    EncoderConfig,
    ModelConfig,
    Timelines,
    UserState,
    WindowConfig,
    load_backbone,
    window_batch,
)
from bahe_models.backbone import cut
from bahe_models.timelines import window_start
from tests.support.families import SETTINGS, tiny_model
from tests.support.toy import know_behaviors

Behavior = tuple[int, int, int]
"""Channel, atom and time of one behavior."""
CHANNELS: tuple[Literal["parallel", "merged"], ...] = ("parallel", "merged")
MODES = [(channels, gaps) for channels in CHANNELS for gaps in (False, True)]
ATOM_IDS = np.arange(40) + 100
"""The collaborative part knows the first thirty."""
ATOMS = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32))


def build(
    family: str, channels: Literal["parallel", "merged"] = "parallel", time_gaps: bool = False
) -> BaheModel:
    halves = cut(tiny_model(family), None, BackboneConfig(path=family, shallow_layers=1, deep_layers=2))
    torch.manual_seed(1)
    config = ModelConfig(
        deep_width=8, profile_width=8, recent=(2, 6), head_width=8, channels=channels, time_gaps=time_gaps
    )
    model = BaheModel(
        halves.deep, width=32, channels=2, items=5, dense_features=3, config=config, behaviors=30
    )
    know_behaviors(model, ATOM_IDS[:30])
    torch.nn.init.normal_(model.profile.gate.weight, std=0.1)
    torch.nn.init.normal_(model.profile.gate.bias)
    for embedding in model.behaviors.parameters():
        torch.nn.init.normal_(embedding)
    return model.eval()


def of_channels(behaviors: list[Behavior]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Atoms and times, per channel."""
    table = np.array(behaviors, dtype=np.int64).reshape(-1, 3)
    parts = [table[table[:, 0] == channel] for channel in (0, 1)]
    return [part[:, 1] for part in parts], [part[:, 2] for part in parts]


def read_at_once(model: BaheModel, window: WindowConfig, behaviors: list[Behavior]) -> UserState:
    rows, times = of_channels(behaviors)
    return UserState(
        model, window, [ATOMS[part] for part in rows], times, [ATOM_IDS[part] for part in rows]
    )


def full_pass(
    model: BaheModel, window: WindowConfig, behaviors: list[Behavior], atoms: torch.Tensor = ATOMS
) -> torch.Tensor:
    rows, times = of_channels(behaviors)
    one_user = Timelines(
        ("a", "b"), tuple(np.array([0, len(part)]) for part in rows), tuple(rows), tuple(times)
    )
    merged = model.config.merged
    batch = window_batch(one_user, np.array([0]), one_user.lengths(), window, merged=merged)
    with torch.inference_mode():
        return model.user_vectors(atoms, batch, model.behavior_rows(torch.from_numpy(ATOM_IDS)))[0]


def next_time(rng: np.random.Generator, time_us: int) -> int:
    """Some seconds up to years later."""
    return time_us + int(10**6 * 4.0 ** rng.uniform(0, 14))


class Counted:
    """Positions that the deep layers have read, call by call."""

    def __init__(self, model: BaheModel) -> None:
        self.positions: list[int] = []
        model.aggregator.deep.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.positions.append(kwargs["inputs_embeds"].shape[1])


@pytest.mark.parametrize(
    ("family", "channels", "time_gaps"),
    [(family, "parallel", False) for family in SETTINGS]
    + [(family, *mode) for family in ("gpt2", "llama", "qwen3-sliding") for mode in MODES[1:]],
)
def test_every_append_equals_a_full_pass_and_costs_one_position(
    family: str, channels: Literal["parallel", "merged"], time_gaps: bool
) -> None:
    model = build(family, channels, time_gaps)
    window = WindowConfig(size=9, overlap=4)
    state = UserState.empty(model, window)
    behaviors: list[Behavior] = []
    torch.testing.assert_close(state.vector(), full_pass(model, window, behaviors), atol=1e-4, rtol=0)
    counted = Counted(model)
    rng = np.random.default_rng(2)
    moves = time_us = 0
    for _ in range(40):
        channel, row = int(rng.integers(2)), int(rng.integers(40))
        time_us = next_time(rng, time_us)
        counted.positions.clear()
        state.append(channel, ATOMS[row], time_us, ATOM_IDS[row])
        behaviors.append((channel, row, time_us))
        length = len(behaviors) if model.config.merged else state.lengths[channel]
        start, before = window_start(np.array([length, length - 1]), window)
        if start == before:
            assert counted.positions == [1]
        else:
            moves += 1
            assert counted.positions == [1 + length - start]
        expected = full_pass(model, window, behaviors)
        torch.testing.assert_close(state.vector(), expected, atol=1e-4, rtol=0)
        assert state.lengths == tuple(map(len, of_channels(behaviors)[0]))
    assert moves >= 4


MODELS = {mode: build("llama", *mode) for mode in MODES}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(1, 8), mode=st.sampled_from(MODES))
def test_where_a_state_begins_changes_nothing(
    data: st.DataObject, size: int, mode: tuple[Literal["parallel", "merged"], bool]
) -> None:
    """Read at once, appended from nothing, or half and half: the same user."""
    model = MODELS[mode]
    window = WindowConfig(size=size, overlap=data.draw(st.integers(0, size - 1)))
    drawn = data.draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1), st.integers(0, 39)), max_size=25)
    )
    # Ten moments for up to 25 behaviors: many share one.
    behaviors = [(channel, row, 10**6 * 4**moment) for moment, channel, row in sorted(drawn)]
    first = data.draw(st.integers(0, len(behaviors)))
    state = read_at_once(model, window, behaviors[:first])
    for channel, row, time_us in behaviors[first:]:
        reused = ATOMS[row].clone()
        state.append(channel, reused, time_us, ATOM_IDS[row])
        reused.zero_()  # the caller's memory is the caller's
    torch.testing.assert_close(state.vector(), full_pass(model, window, behaviors), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "time_gaps"), [MODES[0], MODES[3]])
def test_an_append_equals_a_full_pass_on_the_real_model(
    channels: Literal["parallel", "merged"], time_gaps: bool
) -> None:
    """With real atoms, whose few huge coordinates are the hard case for rounding."""
    from materialize.config.fetch import DOWNLOADS, fetch

    path = fetch("smollm2-135m") / DOWNLOADS["smollm2-135m"].names[0]
    halves = load_backbone(BackboneConfig(path=str(path), shallow_layers=8, deep_layers=2))
    texts = [f"liked the film number {n}, from {1950 + n}" for n in range(40)]
    atoms = torch.from_numpy(
        AtomicEncoder(halves, EncoderConfig(), bfloat16=False).encode(["a"] * 40, texts)
    )
    torch.manual_seed(1)
    model = BaheModel(
        halves.deep,
        width=halves.width,
        channels=2,
        items=5,
        dense_features=3,
        config=ModelConfig(channels=channels, time_gaps=time_gaps),
    )
    for embedding in model.behaviors.parameters():
        torch.nn.init.normal_(embedding)
    model.profile.fit(atoms, atoms, torch.tensor([1.0, -1.0]))
    window = WindowConfig(size=24, overlap=12)
    state = UserState.empty(model, window)
    behaviors: list[Behavior] = []
    rng = np.random.default_rng(4)
    time_us = 0
    for _ in range(60):
        channel, row = int(rng.integers(2)), int(rng.integers(40))
        time_us = next_time(rng, time_us)
        state.append(channel, atoms[row], time_us, ATOM_IDS[row])
        behaviors.append((channel, row, time_us))
        expected = full_pass(model, window, behaviors, atoms)
        torch.testing.assert_close(state.vector(), expected, atol=1e-4, rtol=0)


def test_what_does_not_fit_the_model_is_refused() -> None:
    window = WindowConfig()
    model = MODELS["parallel", False]
    state = UserState.empty(model, window)
    before = state.vector()
    for channel in (-1, 2):
        with pytest.raises(ValueError, match=f"channel {channel} is not one of the model's 2"):
            state.append(channel, ATOMS[0], 0, ATOM_IDS[0])
    with pytest.raises(ValueError, match=r"shape \(31,\)"):
        state.append(0, ATOMS[0, :31], 0, ATOM_IDS[0])
    times = np.arange(40)
    with pytest.raises(ValueError, match="timelines of 1 channels were given"):
        UserState(model, window, [ATOMS], [times], [ATOM_IDS])
    with pytest.raises(ValueError, match="times of 1 channels were given"):
        UserState(model, window, [ATOMS, ATOMS], [times], [ATOM_IDS] * 2)
    with pytest.raises(ValueError, match="atom ids of 1 channels were given"):
        UserState(model, window, [ATOMS, ATOMS], [times] * 2, [ATOM_IDS])
    with pytest.raises(ValueError, match="as many times"):
        UserState(model, window, [ATOMS, ATOMS], [times, times[1:]], [ATOM_IDS] * 2)
    with pytest.raises(ValueError, match="as many times and atom ids"):
        UserState(model, window, [ATOMS, ATOMS], [times, times], [ATOM_IDS, ATOM_IDS[1:]])
    with pytest.raises(ValueError, match=r"shape \(31,\)"):
        UserState(model, window, [ATOMS, ATOMS[:, :31]], [times, times], [ATOM_IDS] * 2)
    with pytest.raises(ValueError, match="time goes back"):
        UserState(model, window, [ATOMS, ATOMS], [times, times[::-1]], [ATOM_IDS] * 2)
    assert torch.equal(state.vector(), before)
    assert state.lengths == (0, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("read", [False, True])
def test_a_behavior_that_does_not_come_last_is_refused(
    mode: tuple[Literal["parallel", "merged"], bool], read: bool
) -> None:
    model, window = MODELS[mode], WindowConfig()
    seen: list[Behavior] = [(0, 1, 3), (1, 2, 5)]
    state = read_at_once(model, window, seen if read else [])
    for channel, row, time_us in [] if read else seen:
        state.append(channel, ATOMS[row], time_us, ATOM_IDS[row])
    before = state.vector()
    late = [(1, 4)] if mode[0] == "parallel" else [(1, 4), (0, 4), (0, 5)]
    for channel, time_us in late:
        with pytest.raises(ValueError, match=f"channel {channel} at {time_us} was appended after"):
            state.append(channel, ATOMS[0], time_us, ATOM_IDS[0])
    assert torch.equal(state.vector(), before)
    assert state.lengths == (1, 1)
    for channel, time_us in [(0, 4), (1, 5)] if mode[0] == "parallel" else [(1, 5), (0, 6)]:
        state.append(channel, ATOMS[0], time_us, ATOM_IDS[0])
        seen.append((channel, 0, time_us))
    torch.testing.assert_close(state.vector(), full_pass(model, window, seen), atol=1e-4, rtol=0)
