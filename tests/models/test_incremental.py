"""A state that grows by one behavior at a time equals the pass over the whole timelines."""

from __future__ import annotations

from typing import Any

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
from tests.families import SETTINGS, tiny_model

ATOMS = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32))


def build(family: str) -> BaheModel:
    halves = cut(tiny_model(family), None, BackboneConfig(path=family, shallow_layers=1, deep_layers=2))
    torch.manual_seed(1)
    config = ModelConfig(deep_width=8, profile_width=8, head_width=8)
    model = BaheModel(halves.deep, width=32, channels=2, items=5, dense_features=3, config=config)
    torch.nn.init.normal_(model.profile.gate.weight, std=0.1)
    torch.nn.init.normal_(model.profile.gate.bias)
    return model.eval()


def full_pass(
    model: BaheModel, window: WindowConfig, timelines: list[list[int]], atoms: torch.Tensor = ATOMS
) -> torch.Tensor:
    one_user = Timelines(
        ("a", "b"),
        tuple(np.array([0, len(rows)]) for rows in timelines),
        tuple(np.array(rows, dtype=np.int64) for rows in timelines),
    )
    length = np.array([[len(rows) for rows in timelines]])
    with torch.inference_mode():
        return model.user_vectors(atoms, window_batch(one_user, np.array([0]), length, window))[0]


class Counted:
    """Positions that the deep layers have read, call by call."""

    def __init__(self, model: BaheModel) -> None:
        self.positions: list[int] = []
        model.aggregator.deep.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self.positions.append(kwargs["inputs_embeds"].shape[1])


@pytest.mark.parametrize("family", SETTINGS)
def test_every_append_equals_a_full_pass_and_costs_one_position(family: str) -> None:
    model = build(family)
    window = WindowConfig(size=9, overlap=4)
    state = UserState.empty(model, window)
    timelines: list[list[int]] = [[], []]
    torch.testing.assert_close(state.vector(), full_pass(model, window, timelines), atol=1e-4, rtol=0)
    counted = Counted(model)
    rng = np.random.default_rng(2)
    moves = 0
    for _ in range(40):
        channel, row = int(rng.integers(2)), int(rng.integers(40))
        counted.positions.clear()
        state.append(channel, ATOMS[row])
        timelines[channel].append(row)
        length = len(timelines[channel])
        start, before = window_start(np.array([length, length - 1]), window)
        if start == before:
            assert counted.positions == [1]
        else:
            moves += 1
            assert counted.positions == [1 + length - start]
        expected = full_pass(model, window, timelines)
        torch.testing.assert_close(state.vector(), expected, atol=1e-4, rtol=0)
        assert state.lengths == tuple(map(len, timelines))
    assert moves >= 4


MODEL = build("llama")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(1, 8))
def test_where_a_state_begins_changes_nothing(data: st.DataObject, size: int) -> None:
    """Read at once, appended from nothing, or half and half: the same user."""
    window = WindowConfig(size=size, overlap=data.draw(st.integers(0, size - 1)))
    behaviors = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 39)), max_size=25))
    first = data.draw(st.integers(0, len(behaviors)))
    early: list[list[int]] = [[row for c, row in behaviors[:first] if c == channel] for channel in (0, 1)]
    late = [[row for c, row in behaviors if c == channel] for channel in (0, 1)]
    state = UserState(MODEL, window, [ATOMS[rows] for rows in early])
    for channel, row in behaviors[first:]:
        reused = ATOMS[row].clone()
        state.append(channel, reused)
        reused.zero_()  # the caller's memory is the caller's
    torch.testing.assert_close(state.vector(), full_pass(MODEL, window, late), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_an_append_equals_a_full_pass_on_the_real_model() -> None:
    """With real atoms, whose few huge coordinates are the hard case for rounding."""
    from materialize.fetch import DOWNLOADS, fetch

    path = fetch("smollm2-135m") / DOWNLOADS["smollm2-135m"].names[0]
    halves = load_backbone(BackboneConfig(path=str(path), shallow_layers=8, deep_layers=2))
    texts = [f"liked the film number {n}, from {1950 + n}" for n in range(40)]
    atoms = torch.from_numpy(
        AtomicEncoder(halves, EncoderConfig(), bfloat16=False).encode(["a"] * 40, texts)
    )
    torch.manual_seed(1)
    model = BaheModel(
        halves.deep, width=halves.width, channels=2, items=5, dense_features=3, config=ModelConfig()
    )
    model.profile.fit(atoms, atoms, torch.tensor([1.0, -1.0]))
    window = WindowConfig(size=24, overlap=12)
    state = UserState.empty(model, window)
    timelines: list[list[int]] = [[], []]
    rng = np.random.default_rng(4)
    for _ in range(60):
        channel, row = int(rng.integers(2)), int(rng.integers(40))
        state.append(channel, atoms[row])
        timelines[channel].append(row)
        expected = full_pass(model, window, timelines, atoms)
        torch.testing.assert_close(state.vector(), expected, atol=1e-4, rtol=0)


def test_what_does_not_fit_the_model_is_refused() -> None:
    window = WindowConfig()
    state = UserState.empty(MODEL, window)
    before = state.vector()
    for channel in (-1, 2):
        with pytest.raises(ValueError, match=f"channel {channel} is not one of the model's 2"):
            state.append(channel, ATOMS[0])
    with pytest.raises(ValueError, match=r"shape \(31,\)"):
        state.append(0, ATOMS[0, :31])
    with pytest.raises(ValueError, match="1 timelines were given"):
        UserState(MODEL, window, [ATOMS])
    assert torch.equal(state.vector(), before)
    assert state.lengths == (0, 0)
