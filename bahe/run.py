"""What `run` and `daily` do: which jobs, in which order, and what a night decides about its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bahe.daily import Day, Retrain, Step, run_day, today, trained_on_latest_frame
from bahe_core.errors import NotReady, NotServable
from bahe_core.progress import say
from bahe_core.results import Result

if TYPE_CHECKING:
    from bahe.project import Project
    from materialize.release.publish import Published
    from materialize.training.tracking import Tracker
    from materialize.training.train import TrainingOutcome


Done = TypeVar("Done")


@dataclass(frozen=True, kw_only=True)
class PipelineRun(Result):
    """What a `run` from the log to online scores did."""

    training: TrainingOutcome
    published: Published | None
    """None when the model can only be used offline (`model.head: target`)."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each job took."""

    def _repr_html_(self) -> str:
        """The results table, and what is live."""
        live = "" if self.published is None else f"<p>live: {self.published.model_version}</p>"
        return self.training._repr_html_() + live


def run(project: Project, dataset: Path, *, device: str | None, tracker: Tracker) -> PipelineRun:
    """Every job in its order. Each says its name before and its time after."""
    seconds = to_frame(project, dataset, device=device)
    training = _timed("train", lambda: project.train(device=device, tracker=tracker), seconds)
    try:
        _timed("embed", lambda: project.embed(device=device), seconds)
    except NotServable as error:
        say(f"  {error}")
        return PipelineRun(training=training, published=None, seconds=seconds)
    published = _timed("publish", project.publish, seconds)
    return PipelineRun(training=training, published=published, seconds=seconds)


def to_frame(project: Project, dataset: Path, *, device: str | None) -> dict[str, float]:
    """The jobs from the log to the training frame, and how many seconds each took."""
    seconds: dict[str, float] = {}
    _timed("ingest", lambda: project.ingest(dataset), seconds)
    _timed("encode", lambda: project.encode(device=device), seconds)
    _timed("apply", project.apply, seconds)
    _timed("frame", project.frame, seconds)
    return seconds


def _timed(name: str, job: Callable[[], Done], seconds: dict[str, float]) -> Done:
    start = time.perf_counter()
    say(f"[bold]bahe {name}[/bold]")
    done = job()
    seconds[name] = round(time.perf_counter() - start, 1)
    say(f"  [dim]{seconds[name]:.1f} s[/dim]")
    return done


def daily(
    project: Project,
    dataset: Path | None,
    *,
    date: Date | None,
    retrain: Retrain,
    tolerance: float,
    wait: float,
    refit: bool,
    device: str | None,
    tracker: Tracker,
) -> Day:
    """One night: the jobs of `run`, and what is decided about the model on the way."""

    def train(day: Day) -> dict[str, str] | None:
        """Warm from the model that was live when the night began, unless that has seen this very frame.

        From the one that was measured in place of a refitted one, which has seen what the new model is
        validated on.
        """
        live = day.live_before if day.retrain == "warm" else None
        if live is not None and trained_on_latest_frame(project.home, live):
            say(f"  {live} has been trained on this frame")
            return {"model_version": live}
        from materialize.training.refit import measured_model

        start = None if live is None else measured_model(project.home, live)
        project.train(device=device, tracker=tracker, warm_start=start)
        return None

    def quality(day: Day) -> None:
        """The new model against the one that is live, on the same impressions."""
        from materialize.release.quality import judge

        if day.live_before is None or day.trained is None or day.trained == day.live_before:
            say("  there is no other model to compare with")
            return
        facts = judge(project.home, day.trained, day.live_before, tolerance, device).facts
        say(
            f"  gate quality: passed, {facts['split']} AUC {facts['auc']:.4f} against"
            f" {facts['live_auc']:.4f} of {day.live_before}",
            **facts,
        )

    def train_on_everything(day: Day) -> dict[str, str] | None:
        """The model that passed, once more on all impressions, unless it was live before."""
        if not refit or day.trained is None or day.trained == day.live_before:
            return {"model_version": day.trained or day.live_before or ""}
        warm = day.live_before if day.retrain == "warm" else None
        try:
            done = project.refit(model_version=day.trained, warm_start=warm, device=device)
        except NotReady as error:  # the frame or dataset.yaml has changed since the night began
            say(f"  not refitted, so the measured model is published: {error}")
            return {"model_version": day.trained}
        return {"model_version": done.model_version}

    steps: dict[str, Step] = {
        "ingest": lambda day: _only(project.ingest(day.dataset)),
        "encode": lambda day: _only(project.encode(device=device)),
        "apply": lambda day: _only(project.apply()),
        "frame": lambda day: _only(project.frame()),
        "train": train,
        "quality": quality,
        "refit": train_on_everything,
        # A refreshed model is the live one, which an aborted night may have trained a successor of.
        "embed": lambda day: _only(project.embed(model_version=day.chosen, device=device)),
        "publish": lambda day: _only(project.publish()),
    }
    named = None if dataset is None else str(dataset.resolve())
    return run_day(project.home, date or today(), named, retrain, steps, wait=wait)


def _only(_: object) -> None:
    """The table `runs` tells what the step wrote."""
