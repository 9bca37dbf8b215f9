"""The training loop that BAHE and its baselines share: AdamW, one-cycle learning rates, early stopping.

It can be stopped anywhere and resume from a checkpoint, bit for bit, and it runs in one process or in
several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from bahe_core.errors import BadInput
from bahe_models.config import TrainingConfig
from bahe_models.timelines import Int64
from bahe_models.trainer.checkpoint import Checkpoint, random_state, set_random_state
from bahe_models.trainer.distributed import Processes
from bahe_models.trainer.sharding import (
    clip_gradients,
    is_sharded,
    load_optimizer,
    load_weights,
    sharded_weights,
    whole_tensors,
)


@dataclass(frozen=True)
class Epoch:
    """The result of one pass over the training impressions."""

    epoch: int
    train_loss: float
    validation_auc: float
    """NaN where nothing is validated."""
    seconds: float
    """Training alone, without evaluation."""


@dataclass
class Trained:
    """A trained network with its history; the weights are those of the best epoch."""

    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0
    """Training, without evaluation, over all epochs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the loop trains, and on what."""

    model: nn.Module
    groups: list[tuple[list[nn.Parameter], float]]
    """Parameters with their peak learning rate."""
    plan: Callable[[np.random.Generator], Iterable[Int64]]
    """Rows of each step of one epoch; a function of the generator's state, so that it can be replayed."""
    logits: Callable[[Int64], torch.Tensor]
    """Click logits of some rows."""
    passes: Callable[[Int64], list[Int64]] = lambda rows: [rows]
    """Cuts the rows of a step into passes that fit in memory; their gradients add up."""
    user_N: Int64
    clicked_N: torch.Tensor
    validate: Callable[[], float]
    """Validation AUC of the model as it is; a collective call."""


def shuffled(count: int, impressions_per_step: int) -> Callable[[np.random.Generator], list[Int64]]:
    """A plan of steps in random order, for networks that gain nothing from whole users."""
    steps = max(1, count // impressions_per_step)
    return lambda rng: np.array_split(rng.permutation(count), steps)


@dataclass
class _Progress:
    """How far a run has come, apart from weights, optimiser and random generators."""

    epoch: int = 1
    updates: int = 0
    """Completed in this epoch."""
    losses: float = 0.0
    """Sum over this epoch's impressions so far."""
    seen: int = 0
    """This epoch's impressions so far."""
    seconds: float = 0.0
    """Of training in this epoch so far."""
    best: float = -np.inf
    waited: int = 0
    history: list[Epoch] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the best epoch."""


def fit(
    task: Task,
    config: TrainingConfig,
    *,
    checkpoint: Checkpoint | None = None,
    stop_after: int | None = None,
    on_step: Callable[[int, float], None] = lambda impressions, loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_resume: Callable[[int], None] = lambda impressions: None,
) -> Trained:
    """Train the task's model in place and leave it with the weights of its best epoch.

    With `stop_after`, after that epoch and with its weights, whatever they are worth: nothing is validated,
    and the learning rates are those of a training that may go on to `config.epochs`.

    Every network gets the same optimiser, schedule, clipping and early stopping. With a `checkpoint` the
    state is saved every `checkpoint_seconds`; when its file exists, the run resumes from it, and `on_epoch`
    is called for the earlier epochs as well. The file stays when training ends: the caller deletes it when
    the weights are safe elsewhere. Raises BadInput when it belongs to another run.

    `on_step` is called after each update with its number of impressions and the epoch's mean loss so far;
    `on_resume` once, when a run resumes, with the number of impressions already trained on.
    """
    model, processes = task.model, Processes.here()
    groups = [(parameters, rate) for parameters, rate in task.groups if parameters]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for parameters, rate in groups],
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [rate for _, rate in groups],
        total_steps=_expected_updates(task.clicked_N, config),
        pct_start=config.warm_up,
    )
    rng = np.random.default_rng(config.seed)
    progress = _Progress()
    saved_state = checkpoint.load() if checkpoint is not None else None
    if processes.size > 1:
        processes.broadcast(model)
        torch.manual_seed(config.seed + processes.rank)  # each process has its own dropout
    if saved_state is not None:
        progress = _restore(saved_state, model, optimizer, schedule, rng, processes)
        for row in progress.history:
            on_epoch(row)
        on_resume(len(progress.history) * impressions_per_epoch(task.clicked_N, config) + progress.seen)
    last_saved = time.monotonic()
    while progress.epoch <= (stop_after or config.epochs):
        rng_at_start = rng.bit_generator.state
        model.train()
        seconds_before, start = progress.seconds, time.perf_counter()
        for steps in islice(_updates(task.plan(rng), config.accumulate), progress.updates, None):
            impressions = sum(map(len, steps))
            optimizer.zero_grad(set_to_none=True)
            parts = _backward(task, config, steps, processes)
            processes.sum_gradients(model.parameters())
            clip_gradients(model.parameters(), config.gradient_norm)
            optimizer.step()
            # Users are not split evenly, so there may be more updates than planned.
            if schedule.last_epoch < schedule.total_steps - 1:
                schedule.step()
            losses = sum(loss.item() * rows for loss, rows in parts)
            due = float(
                checkpoint is not None and time.monotonic() - last_saved >= config.checkpoint_seconds
            )
            if processes.size > 1:  # one process's clock decides, or some would wait for the others
                mine = torch.tensor([losses, due if processes.rank == 0 else 0.0])
                losses, due = processes.sum(mine.to(task.clicked_N.device)).tolist()
            progress.losses += losses
            progress.seen += impressions
            progress.updates += 1
            progress.seconds = seconds_before + time.perf_counter() - start
            if due and checkpoint is not None:
                state = _state(progress, model, optimizer, schedule, rng_at_start, processes)
                if processes.rank == 0:
                    checkpoint.save(state)
                last_saved = time.monotonic()
            on_step(impressions, progress.losses / progress.seen)
        measured = task.validate() if stop_after is None else float("nan")
        row = Epoch(progress.epoch, progress.losses / progress.seen, measured, progress.seconds)
        progress.history.append(row)
        on_epoch(row)
        if stop_after is not None:
            progress.weights = model.state_dict()
        elif row.validation_auc > progress.best:
            progress.best, progress.waited = row.validation_auc, 0
            progress.weights = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            progress.waited += 1
            if progress.waited >= config.patience:
                break
        progress.epoch += 1
        progress.updates = progress.seen = 0
        progress.losses = progress.seconds = 0.0
    model.load_state_dict(progress.weights)
    model.eval()
    return Trained(progress.history, sum(row.seconds for row in progress.history))


def impressions_per_epoch(clicked_N: torch.Tensor, config: TrainingConfig) -> int:
    """How many impressions an epoch draws: all clicked ones, and `negative_rate` of the others."""
    return round(_drawn_rows(clicked_N, config))


def _drawn_rows(clicked_N: torch.Tensor, config: TrainingConfig) -> float:
    clicks = int(clicked_N.sum())
    return clicks + config.negative_rate * (len(clicked_N) - clicks)


def _expected_updates(clicked_N: torch.Tensor, config: TrainingConfig) -> int:
    """Length of the schedule; an epoch has a few steps more or less than its rows would fill."""
    rows = _drawn_rows(clicked_N, config)
    steps = int(-(-rows // config.impressions_per_step))
    return int(-(-steps // config.accumulate) * config.epochs * 1.5) + 10


def _updates(plan: Iterable[Int64], accumulate: int) -> Iterator[list[Int64]]:
    """The plan's steps, grouped by update; the last group may have fewer."""
    steps = iter(plan)
    while update := list(islice(steps, accumulate)):
        yield update


def _backward(
    task: Task, config: TrainingConfig, steps: list[Int64], processes: Processes
) -> list[tuple[torch.Tensor, int]]:
    """Add this process's part of an update's gradient; returns its mean losses with their rows."""
    device, sharded = task.clicked_N.device, is_sharded(task.model)
    weight = None if config.positive_weight == 1 else torch.tensor(config.positive_weight, device=device)
    impressions = sum(map(len, steps))
    parts = []
    for step in steps:
        passes = task.passes(processes.share(step, task.user_N))
        if sharded:  # the others wait for this process in every layer
            most = max(processes.gather(len(passes)))
            passes += [step[:0]] * (most - len(passes))
        for rows in passes:
            if not len(rows):
                if sharded:
                    task.logits(rows).sum().backward()  # type: ignore[no-untyped-call]
                continue
            target_N = task.clicked_N[torch.from_numpy(rows).to(device)]
            loss = nn.functional.binary_cross_entropy_with_logits(
                task.logits(rows), target_N, pos_weight=weight
            )
            # Weighted by rows: the sum over passes and processes is the mean over the whole update.
            (loss * (len(rows) / impressions)).backward()  # type: ignore[no-untyped-call]
            parts.append((loss.detach(), len(rows)))
    return parts


def _state(
    progress: _Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rng_at_start: Any,
    processes: Processes,
) -> dict[str, Any]:
    """Everything that a run needs to resume, as tensors and plain values.

    A collective call; only rank 0 gets sharded tensors, whole.
    """
    state = {
        # Not asdict, which would copy the weights once more.
        "standing": {**vars(progress), "history": [asdict(row) for row in progress.history]},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rng_at_start": rng_at_start,
        "generators": processes.gather(random_state()),
    }
    whole: dict[str, Any] = whole_tensors(state, keep=processes.rank == 0)
    return whole


def _restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rng: np.random.Generator,
    processes: Processes,
) -> _Progress:
    """Restore everything from a `_state`."""
    generators = state["generators"]
    if len(generators) != processes.size:
        raise BadInput(
            f"the checkpoint was written by {len(generators)} processes, but this run has"
            f" {processes.size}; start {len(generators)} again, or delete it to train from the start."
        )
    load_weights(model, state["model"])
    load_optimizer(optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    rng.bit_generator.state = state["rng_at_start"]
    set_random_state(generators[processes.rank])
    standing = dict(state["standing"])
    standing["history"] = [Epoch(**row) for row in standing["history"]]
    standing["weights"] = sharded_weights(model, standing["weights"])
    return _Progress(**standing)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random generators for a block, and restore them after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
