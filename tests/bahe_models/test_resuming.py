"""A training run that is stopped anywhere ends as an undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import Checkpoint, TrainingConfig, train
from bahe_models.trainer.training_loop import Task, Trained, fit, seeded
from tests.support.toy import toy_batches, toy_config, toy_data


class Stopped(Exception):
    pass


def run(
    backbone: Path,
    config: TrainingConfig,
    checkpoint: Checkpoint | None = None,
    stop_after: int | None = None,
) -> tuple[Trained, dict[str, torch.Tensor], list[float], list[int]]:
    """Trained, its weights, the running loss after each update, and the epochs heard of."""
    losses: list[float] = []
    epochs: list[int] = []

    def on_step(impressions: int, loss: float) -> None:
        losses.append(loss)
        if len(losses) == stop_after:
            raise Stopped

    with seeded(config.seed):
        batches = toy_batches(toy_data(), backbone)
        trained = train(
            batches,
            config,
            checkpoint=checkpoint,
            on_step=on_step,
            on_epoch=lambda row: epochs.append(row.epoch),
        )
    return trained, batches.model.state_dict(), losses, epochs


def results(trained: Trained) -> list[tuple[int, float, float]]:
    return [(row.epoch, row.train_loss, row.validation_auc) for row in trained.history]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"negative_rate": 0.6, "positive_weight": 1.5},
    "accumulated": {"accumulate": 3},
    "in passes": {"accumulate": 2, "positions_per_pass": 30},
    "impatient": {"epochs": 8, "learning_rate": 0.05, "patience": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_run_ends_as_an_undisturbed_one(name: str, tiny_backbone: Path, tmp_path: Path) -> None:
    config = toy_config(**SETTINGS[name])
    whole, weights, losses, epochs = run(tiny_backbone, config)
    per_epoch = losses.index(next(v for v in losses if v == whole.history[0].train_loss)) + 1
    random = int(np.random.default_rng(len(name)).integers(per_epoch + 1, len(losses)))
    checkpoint = Checkpoint(tmp_path / "run.checkpoint", "toy")
    for stop in {1, per_epoch, random, len(losses)}:
        checkpoint.delete()
        with pytest.raises(Stopped):
            run(tiny_backbone, config, checkpoint, stop)
        again, resumed, rest, heard = run(tiny_backbone, config, checkpoint)
        assert rest == losses[stop:], "goes on after the last completed step"
        assert results(again) == results(whole)
        assert heard == epochs
        for parameter, value in weights.items():
            assert torch.equal(resumed[parameter], value), (stop, parameter)


def test_a_run_may_be_stopped_many_times(tiny_backbone: Path, tmp_path: Path) -> None:
    config = toy_config(epochs=2)
    _, weights, losses, _ = run(tiny_backbone, config)
    checkpoint = Checkpoint(tmp_path / "run.checkpoint", "toy")
    done = 0
    while done + 7 < len(losses):
        with pytest.raises(Stopped):
            run(tiny_backbone, config, checkpoint, 7)
        done += 7
    _, resumed, rest, _ = run(tiny_backbone, config, checkpoint)
    assert rest == losses[done:]
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_another_runs_checkpoint_is_refused_before_any_step(tiny_backbone: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    with pytest.raises(Stopped):
        run(tiny_backbone, toy_config(), Checkpoint(path, "bahe-one"), 2)
    with pytest.raises(BadInput, match="checkpoint of bahe-one, not of bahe-two"):
        run(tiny_backbone, toy_config(), Checkpoint(path, "bahe-two"), 1)  # Stopped would come first
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="delete it"):
        run(tiny_backbone, toy_config(), Checkpoint(path, "bahe-one"), 1)


def test_a_checkpoint_is_written_when_it_is_due_only(tiny_backbone: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run.checkpoint", "toy")
    run(tiny_backbone, toy_config(epochs=1, checkpoint_seconds=3600), checkpoint)
    assert checkpoint.load() is None
    checkpoint.save({"half": torch.ones(1)})
    checkpoint.path.with_name("run.checkpoint.part").write_bytes(b"left by a kill")
    checkpoint.delete()
    assert not list(tmp_path.iterdir())


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))


def test_more_updates_than_planned_are_trained_at_the_last_rate() -> None:
    model = Line()
    updates: list[int] = []
    facts = torch.ones(4000, 3)
    task = Task(
        model=model,
        groups=[([model.weight], 1e-2)],
        # Ten times as many steps as 4000 impressions would fill.
        plan=lambda _: np.array_split(np.arange(4000), 40),
        logits=lambda rows: facts[torch.from_numpy(rows)] @ model.weight,
        user_N=np.arange(4000),
        clicked_N=torch.ones(4000),
        validate=lambda: 0.5,
    )
    fit(task, TrainingConfig(epochs=1), on_step=lambda impressions, loss: updates.append(impressions))
    assert len(updates) == 40


@pytest.mark.parametrize("positive_weight", [1.0, 3.0])
def test_accumulated_steps_have_the_gradient_of_one_large_step(positive_weight: float) -> None:
    rng = np.random.default_rng(0)
    facts = torch.from_numpy(rng.normal(size=(100, 3)).astype(np.float32))
    clicked = torch.from_numpy((rng.random(100) < 0.3).astype(np.float32))
    order = rng.permutation(100)

    def update(parts: list[np.ndarray], accumulate: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        model = Line()
        task = Task(
            model=model,
            groups=[([model.weight], 1e-2)],
            plan=lambda _: parts,
            logits=lambda rows: facts[torch.from_numpy(rows)] @ model.weight,
            user_N=np.arange(100),
            clicked_N=clicked,
            validate=lambda: 0.5,
        )
        updates: list[int] = []
        trained = fit(
            task,
            TrainingConfig(epochs=1, accumulate=accumulate, positive_weight=positive_weight),
            on_step=lambda impressions, loss: updates.append(impressions),
        )
        assert updates == [100]
        assert model.weight.grad is not None
        return model.weight.grad, model.weight.detach(), trained.history[0].train_loss

    # Unequal parts: a mean of the parts' means would be another gradient.
    small = update([order[:15], order[15:70], order[70:]], 3)
    large = update([order], 1)
    torch.testing.assert_close(small[0], large[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(small[1], large[1], rtol=1e-5, atol=1e-6)
    assert small[2] == pytest.approx(large[2], abs=1e-6)


@pytest.mark.parametrize("stop_after", [4, 14])
def test_a_resumed_run_says_how_much_is_behind_it(
    stop_after: int, tiny_backbone: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "run.checkpoint", "one")
    heard: list[int] = []
    steps: list[int] = []

    def train_once(on_step: Callable[[int, float], None]) -> None:
        with seeded(0):
            train(
                toy_batches(toy_data(), tiny_backbone),
                toy_config(epochs=2),
                checkpoint=checkpoint,
                on_step=on_step,
                on_resume=heard.append,
            )

    def stopping(impressions: int, loss: float) -> None:
        steps.append(impressions)
        if len(steps) == stop_after:
            raise Stopped

    with pytest.raises(Stopped):
        train_once(stopping)
    assert heard == []
    train_once(lambda impressions, loss: None)
    assert heard == [sum(steps)]
