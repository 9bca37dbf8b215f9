from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_models import TrainingData, train
from bahe_models.trainer.checkpoint import Checkpoint
from bahe_models.trainer.pretraining import pretrain
from bahe_models.trainer.training_loop import seeded
from tests.support.toy import at_moments, toy_batches, toy_config, toy_data


def cycles() -> TrainingData:
    """The toy log with timelines in which every atom is followed by the next one."""
    data = toy_data()
    atoms = tuple(
        (np.arange(len(old)) + np.repeat(offset[:-1], np.diff(offset)) // 12) % 20
        for old, offset in zip(data.timelines.atoms, data.timelines.offsets, strict=True)
    )
    return replace(data, timelines=replace(data.timelines, atoms=atoms))


@pytest.mark.parametrize("channels", ["parallel", "merged"])
def test_it_learns_what_follows_what(tiny_backbone: Path, channels: str) -> None:
    data = at_moments(cycles())
    with seeded(0):
        batches = toy_batches(data, tiny_backbone, channels=channels)
        config = toy_config(pretraining_epochs=40, deep_learning_rate=5e-3)
        heard: list[int] = []
        losses = pretrain(
            batches.model,
            data,
            batches.window,
            config,
            bfloat16=False,
            on_step=lambda behaviors, loss: heard.append(behaviors),
        )
    # Merged, the next behavior is often of the other channel, whose cycle is another.
    assert losses[-1] < (0.7 if channels == "parallel" else 0.9) * losses[0]
    assert sum(heard) == 40 * data.known_lengths().sum()


def test_behaviors_after_the_last_training_impression_are_not_read(tiny_backbone: Path) -> None:
    data = toy_data()
    known = data.known_lengths()
    changed = []
    for lengths, offsets, atoms in zip(known.T, data.timelines.offsets, data.timelines.atoms, strict=True):
        later = np.arange(len(atoms)) - np.repeat(offsets[:-1], 12) >= np.repeat(lengths, 12)
        assert later.any()
        changed.append(np.where(later, (atoms + 1) % 20, atoms))
    other = replace(data, timelines=replace(data.timelines, atoms=tuple(changed)))
    config = toy_config(pretraining_epochs=1)
    losses = []
    for version in (data, other):
        with seeded(0):
            batches = toy_batches(data, tiny_backbone)
            losses.append(pretrain(batches.model, version, batches.window, config, bfloat16=False))
    assert losses[0] == losses[1]


def test_a_resumed_run_does_not_repeat_it(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    config = toy_config(pretraining_epochs=1, epochs=2)

    def run(
        checkpoint: Checkpoint, kill_after: int | None = None
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        updates: list[int] = []
        pretrained: list[int] = []

        def on_step(impressions: int, loss: float) -> None:
            updates.append(impressions)
            if len(updates) == kill_after:
                raise KeyboardInterrupt

        with seeded(0):
            batches = toy_batches(data, tiny_backbone)
            train(
                batches,
                config,
                checkpoint=checkpoint,
                on_step=on_step,
                on_pretraining=lambda behaviors, loss: pretrained.append(behaviors),
            )
        return batches.model.state_dict(), pretrained

    undisturbed, pretrained = run(Checkpoint(tmp_path / "a.pt", "toy"))
    assert sum(pretrained) == data.known_lengths().sum()
    resumed = Checkpoint(tmp_path / "b.pt", "toy")
    with pytest.raises(KeyboardInterrupt):
        run(resumed, kill_after=7)
    weights, pretrained = run(resumed)
    assert not pretrained
    for name, value in undisturbed.items():
        assert torch.equal(value, weights[name]), name
