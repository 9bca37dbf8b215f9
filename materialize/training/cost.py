"""What a training costs, said before it starts and again when its first steps have been measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bahe_core.machine import PeakMemory, is_first_process
from bahe_core.progress import say
from bahe_models import Impressions, ModelConfig, TrainingConfig, WindowConfig
from bahe_models.passes import positions_read
from bahe_models.trainer.training_loop import impressions_per_epoch

WARM_UP_STEPS, MEASURED_STEPS = 2, 8
"""The first steps allocate memory and choose kernels, so they are not measured."""


def positions_per_epoch(split: Impressions, window: WindowConfig, *, merged: bool) -> int:
    """About how many positions the deep layers read in an epoch: each window of a user once.

    A user whose impressions fill more than a step, or whose windows more than a pass, is read once for each
    of them; that is left out.
    """
    return int(positions_read(split.user_N, split.length_NC, window, merged=merged).sum())


class CostEstimate:
    """Steps, impressions and positions of a training; then its time and memory, from its first steps."""

    def __init__(
        self,
        split: Impressions,
        model: ModelConfig,
        window: WindowConfig,
        training: TrainingConfig,
        memory: PeakMemory,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        drawn = impressions_per_epoch(torch.from_numpy(split.clicked_N), training)
        self.impressions = drawn * training.epochs
        self.steps = -(-drawn // training.impressions_per_step) * training.epochs
        self.positions = positions_per_epoch(split, window, merged=model.merged) * training.epochs
        self._epochs, self._memory, self._clock = training.epochs, memory, clock
        self._left, self._seen, self._steps = self.impressions, 0, 0
        self._start = 0.0

    def announce(self) -> None:
        """Say what is ahead, as far as it is known without a step; the first process says it."""
        if not is_first_process():
            return
        epochs = f"{self._epochs} epoch{'s' if self._epochs != 1 else ''}"
        say(
            f"  training BAHE: about {self.steps:,} steps in {epochs}, {self.impressions:,} impressions,"
            f" about {self.positions:,} positions",
            steps=self.steps,
            impressions=self.impressions,
            positions=self.positions,
        )

    def resume(self, impressions: int) -> None:
        """So many are behind an interrupted run."""
        self._left -= impressions

    def step(self, impressions: int) -> None:
        """Count a step; with the last measured one, say what the rest is expected to take."""
        self._steps += 1
        self._left -= impressions
        if self._steps == WARM_UP_STEPS:
            self._start = self._clock()
        elif WARM_UP_STEPS < self._steps <= WARM_UP_STEPS + MEASURED_STEPS:
            self._seen += impressions
        measured = self._steps == WARM_UP_STEPS + MEASURED_STEPS
        if measured and self._left > 0 and is_first_process():
            seconds = (self._clock() - self._start) * self._left / self._seen
            say(
                f"  training BAHE: about {_duration(seconds)} to go, without validation, and"
                f" {self._memory.mebibytes:,.0f} MiB of memory so far, from {MEASURED_STEPS} steps",
                expected_seconds=round(seconds, 1),
                memory_mib=round(self._memory.mebibytes),
            )


def _duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
