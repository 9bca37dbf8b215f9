"""The jobs from the lake to online scores, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import bahe
from bahe.cli.options import (
    ActorsOption,
    DeviceOption,
    ExecutorOption,
    GpusOption,
    HomeOption,
    RayAddressOption,
    TrackerOption,
)
from bahe.cli.printing import print_comparison, print_results
from bahe.cli.program import app
from bahe_core.errors import BadInput
from bahe_core.machine import is_first_process
from bahe_core.progress import say


@app.command()
def encode(
    home: HomeOption = None,
    device: DeviceOption = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes that encode side by side.", show_default="one for each GPU, else one"),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse the layers' operations by torch.compile first.")
    ] = False,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    num_actors: ActorsOption = None,
    num_gpus_per_actor: GpusOption = 0,
) -> None:
    """Encode atoms that have no vector yet with the frozen shallow layers. Then the encode gate.

    A changed `encoder:` or `backbone:` is built beside the vectors in use, and used when it is complete.
    """
    workers = bahe.ExecutorConfig(
        kind=executor, address=ray_address, actors=num_actors, gpus_per_actor=num_gpus_per_actor
    )
    bahe.open(home).encode(device=device, processes=processes, compile=compiled, executor=workers)


@app.command()
def apply(
    home: HomeOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Where online values lie from now on: sqlite, redis, postgres, or a file of settings.",
            envvar="BAHE_FEATURE_STORE",
            show_default="where they are; sqlite in a new home",
        ),
    ] = None,
) -> None:
    """Register entities, views and services of feature_repo/ with Feast, for this home.

    The home keeps the target, so no other command has to be told.
    """
    bahe.open(home).apply(target)


@app.command()
def frame(
    home: HomeOption = None,
    service: Annotated[str, typer.Option(help="The feature service to pull.")] = "ctr_training",
    as_of: Annotated[
        int | None,
        typer.Option(help="Read the lake as it was at this snapshot.", show_default="the newest"),
    ] = None,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    num_actors: ActorsOption = None,
) -> None:
    """Pull the point-in-time training frame through Feast and split it by time. Then its gate."""
    workers = bahe.ExecutorConfig(kind=executor, address=ray_address, actors=num_actors)
    typer.echo(bahe.open(home).frame(service=service, as_of=as_of, executor=workers).path)


@app.command()
def train(
    home: HomeOption = None,
    device: DeviceOption = None,
    tracker: TrackerOption = "mlflow",
    warm_start: Annotated[
        str | None, typer.Option(help="A model_version to start from, as yesterday's.", metavar="VERSION")
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: each process holds a share of the deep layers.")
    ] = False,
) -> None:
    """Train BAHE, the ID-only network and the floor on the last frame; print the results table.

    A killed run goes on where it stopped. Several processes: torchrun --no-python bahe train.
    """
    done = bahe.open(home).train(device=device, tracker=tracker, warm_start=warm_start, shard=shard)
    if is_first_process():
        print_results(done.results)
        say(f"  report: {done.report}")


@app.command()
def refit(
    home: HomeOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The measured model_version.", show_default="the last one")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Train a measured model once more, on every impression, validation and test included.

    As many epochs as its best was; nothing is left to measure the result by, so the measured model stays
    beside it. `bahe embed --model VERSION` and `bahe publish` put it online; `bahe daily` does all of it.
    """
    bahe.open(home).refit(model_version=model, device=device)


@app.command()
def compare(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            help="dataset.yaml, which is ingested, encoded and framed first.", show_default="the last frame"
        ),
    ] = None,
    home: HomeOption = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Of floor, id-only, din, gradient-boosting, bahe, bahe-deep, bahe-no-deep, with commas.",
            show_default="all that differ",
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="BAHE with other settings, as 'model.deep=true training.epochs=6'; may be repeated.",
            metavar="SETTINGS",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings of each model that chance has a part in.")
    ] = 3,
    test: Annotated[
        bool, typer.Option("--test", help="Compare on the test split too: once, when the choice is made.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Train BAHE and its peers on one frame; tell which is better, by how much, and whether it is chance.

    They are compared on the validation split, on the same resamples of users.
    Writes a page, HOME/reports/comparison.html, and the same as JSON; nothing is put online. What a model
    predicted is kept: killed, the same call goes on, and a model that is added is all that is trained.
    """
    names = None if models is None else [name.strip() for name in models.split(",") if name.strip()]
    done = bahe.open(home).compare(
        dataset, models=names, variants=variant or (), seeds=seeds, test=test, device=device
    )
    print_comparison(done.rows)


@app.command()
def embed(
    home: HomeOption = None,
    device: DeviceOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model_version of this home.", show_default="the last trained one"),
    ] = None,
    executor: ExecutorOption = "local",
    ray_address: RayAddressOption = None,
    num_actors: ActorsOption = None,
    num_gpus_per_actor: GpusOption = 0,
) -> None:
    """Compute user and item vectors of a model where they changed. Then the embed gate."""
    workers = bahe.ExecutorConfig(
        kind=executor, address=ray_address, actors=num_actors, gpus_per_actor=num_gpus_per_actor
    )
    bahe.open(home).embed(model_version=model, device=device, executor=workers)


@app.command()
def publish(
    home: HomeOption = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the version that was live before live again, at once.")
    ] = False,
    to: Annotated[
        str | None, typer.Option(help="With --rollback: which version.", metavar="MODEL_VERSION")
    ] = None,
) -> None:
    """Write what is new to the online store, check it, and make the embedded model the live one.

    --rollback only moves the pointer, to vectors that are still online, and back when repeated.
    """
    if to is not None and not rollback:
        raise BadInput(f"--to {to} says where a rollback goes; add --rollback.")
    project = bahe.open(home)
    if rollback:
        project.rollback(to)
    else:
        project.publish()
