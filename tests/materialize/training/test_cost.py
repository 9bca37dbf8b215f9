"""What a training is said to cost."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bahe_core.machine import PeakMemory
from bahe_models import ModelConfig, WindowConfig, window_batch
from bahe_models.timelines import plan_steps
from materialize.training.cost import MEASURED_STEPS, WARM_UP_STEPS, CostEstimate, positions_per_epoch
from tests.support.toy import at_moments, toy_config, toy_data


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("window", [WindowConfig(), WindowConfig(size=6, overlap=3)])
def test_positions_are_those_of_the_steps(merged: bool, window: WindowConfig) -> None:
    data = at_moments(toy_data())
    split = data.splits["train"]
    steps = plan_steps(
        split.user_N, split.length_NC, impressions_per_step=200, rng=np.random.default_rng(0), merged=merged
    )
    read = sum(
        len(
            window_batch(
                data.timelines, split.user_N[rows], split.length_NC[rows], window, merged=merged
            ).atoms_P
        )
        for rows in steps
    )
    assert positions_per_epoch(split, window, merged=merged) == read


def test_cost_is_said_before_and_after_the_first_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAHE_LOG", "json")
    now = 0.0
    split = toy_data().splits["train"]
    memory = PeakMemory()
    memory.mebibytes = 512.0
    cost = CostEstimate(
        split,
        ModelConfig(),
        WindowConfig(),
        toy_config(epochs=4, impressions_per_step=50),
        memory,
        clock=lambda: now,
    )
    cost.announce()
    cost.resume(1000)
    for step in range(1, 40):
        now += 30.0 if step <= WARM_UP_STEPS else 2.0
        cost.step(50)
    before, measured = map(json.loads, capsys.readouterr().err.splitlines())
    assert (before["steps"], before["impressions"]) == (80, 4000)
    left = 4000 - 1000 - 50 * (WARM_UP_STEPS + MEASURED_STEPS)
    assert measured["expected_seconds"] == left / 50 * 2.0
    assert measured["memory_mib"] == 512


def test_a_training_that_ends_with_its_first_steps_is_not_estimated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAHE_LOG", "json")
    split = toy_data().splits["train"]
    config = toy_config(epochs=1, impressions_per_step=200)
    cost = CostEstimate(split, ModelConfig(), WindowConfig(), config, PeakMemory())
    for _ in range(5):
        cost.step(200)
    assert capsys.readouterr().err == ""
