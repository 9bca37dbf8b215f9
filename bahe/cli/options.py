"""Options that several commands have."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        help="Folder with all state of one dataset.",
        envvar="BAHE_HOME",
        show_default=".bahe",
    ),
]
DatasetArgument = Annotated[Path, typer.Argument(help="dataset.yaml: see the README.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; chosen when left out.")
]
ExecutorOption = Annotated[
    Literal["local", "ray"], typer.Option("--executor", help="This machine, or a Ray cluster.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        help="host:port of the Ray cluster's head, or auto for the one this machine belongs to.",
        show_default="a cluster on this machine, for the time of the job",
    ),
]
ActorsOption = Annotated[
    int | None,
    typer.Option(
        "--num-actors", help="Ray: workers side by side.", show_default="one for each core or GPU"
    ),
]
GpusOption = Annotated[
    float, typer.Option("--num-gpus-per-actor", help="Ray: GPUs that each worker gets, as 1 or 0.5.")
]
TrackerOption = Annotated[
    Literal["mlflow", "tensorboard", "none"], typer.Option(help="Where to log training.")
]
UserOption = Annotated[str, typer.Option("--user", help="A user_id of the log.")]
AtOption = Annotated[
    datetime | None,
    typer.Option(
        help="Moment of the request, UTC: features know how long ago things were. Nothing is replayed; what"
        " happened after it is known all the same.",
        show_default="now",
    ),
]
ContextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        help="A context column's value, as device=phone; may be repeated.",
        metavar="COLUMN=VALUE",
        show_default="unknown",
    ),
]
LogFormatOption = Annotated[
    Literal["text", "json"],
    typer.Option(
        "--log-format",
        envvar="BAHE_LOG",
        help="Lines on standard error: for people, or a JSON object each.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
