"""Commands that call every job: once, every night, on a demo's log."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

import bahe
from bahe.cli.options import (
    DatasetArgument,
    DeviceOption,
    HomeOption,
    TrackerOption,
)
from bahe.cli.printing import print_answer, print_results
from bahe.cli.program import app
from bahe.variation import with_settings
from bahe_core.progress import say


@app.command()
def run(
    dataset: DatasetArgument,
    home: HomeOption = None,
    device: DeviceOption = None,
    tracker: TrackerOption = "mlflow",
) -> None:
    """Everything from the log to online scores: ingest, encode, apply, frame, train, embed, publish.

    Ends after training when the model can only be used offline (model.head: target).
    """
    done = bahe.open(home).run(dataset, device=device, tracker=tracker)
    print_results(done.training.results)
    say(f"  report: {done.training.report}")


@app.command()
def daily(
    dataset: Annotated[
        Path | None, typer.Argument(help="dataset.yaml; that of the last daily run when left out.")
    ] = None,
    home: HomeOption = None,
    date: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="What the run is called.", show_default="today, UTC"),
    ] = None,
    retrain: Annotated[
        Literal["warm", "fresh", "never"],
        typer.Option(
            help="Train on from the live model, train anew, or keep the live model and refresh its vectors."
        ),
    ] = "warm",
    tolerance: Annotated[
        float,
        typer.Option(help="How far the new model's AUC may be below the live model's."),
    ] = 0.005,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for another job on this home to end.")
    ] = 0,
    refit: Annotated[
        bool,
        typer.Option(
            help="Train a model that passes once more, on every impression, and publish that one."
        ),
    ] = True,
    device: DeviceOption = None,
    tracker: TrackerOption = "mlflow",
) -> None:
    """One night: everything that `run` does, with a quality gate before a new model goes live.

    Keeps a manifest in HOME/daily/DATE.json: killed anywhere, the same call goes on with the step that was
    not finished; a date that is done is done. A failed gate ends it with exit code 2 and leaves the live
    model as it is.
    """
    bahe.open(home).daily(
        dataset,
        date=date.date() if date else None,
        retrain=retrain,
        tolerance=tolerance,
        wait=wait,
        refit=refit,
        device=device,
        tracker=tracker,
    )


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Whom a demo recommends to, and when: asked of today, every statistic would look years old."""

    user: int
    at: datetime
    """Just after the log's end."""
    nightly: bool
    """Whether it also tells what a service that is told of nothing between two nights would be worth."""


DEMOS = {
    "movielens-100k": Demo(user=1, at=datetime(1998, 4, 23), nightly=True),
    "complete-journey": Demo(user=1, at=datetime(2018, 1, 2), nightly=False),  # it takes long enough
}


@app.command()
def demo(
    log: Annotated[
        Literal["movielens-100k", "complete-journey"],
        typer.Argument(
            help="movielens-100k: 100,000 ratings of films. complete-journey: a year of 2,469 households'"
            " shopping, with long histories and promotions; give it a --home of its own."
        ),
    ] = "movielens-100k",
    home: HomeOption = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results table to this file.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """The main job on a public log with SmolLM2-135M, from download to scores for one user."""
    from materialize.config.fetch import fetch as download

    start = time.perf_counter()
    project = bahe.open(home)
    say(f"[bold]bahe fetch {log}, bahe fetch smollm2-135m[/bold]")
    dataset = download(log) / f"{log}.yaml"
    download("smollm2-135m")
    shown = DEMOS[log]
    training = project.run(dataset, device=device).training
    results = {"results": training.results}
    if shown.nightly:
        say("[bold]bahe frame, bahe train, with features as old as a nightly publish leaves them[/bold]")
        with with_settings(project, freshness="nightly") as nightly:
            nightly.frame()
            results["nightly"] = nightly.train(device=device, tracker="none").results
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    say(f"[bold]bahe recommend --user {shown.user} -k 5 --at {shown.at:%Y-%m-%d}[/bold]")
    print_answer(project.recommend(shown.user, 5, at=shown.at), as_json=False)
    if shown.nightly:
        say("[bold]Results of a nightly service[/bold] (`freshness: nightly`): features of last midnight")
        print_results(results["nightly"])
    say("[bold]Results of a live service[/bold] (`freshness: live`): features of the very moment")
    print_results(training.results)
    say(f"  report: {training.report}")
    say(f"  gates: {project.home.reports / 'data_docs' / 'gates.html'}")
    say(f"[bold]done in {time.perf_counter() - start:.0f} s[/bold]; next: bahe serve, bahe --help")
