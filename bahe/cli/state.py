"""Commands that say what was done and what is stale."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import bahe
from bahe.cli.options import (
    HomeOption,
    JsonFlag,
)
from bahe.cli.printing import print_table
from bahe.cli.program import app


@app.command()
def runs(
    home: HomeOption = None,
    job: Annotated[
        str | None, typer.Option("--job", help="Only this job, as `embed` or `gate embed`.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """What was done: when, for how long, rows, snapshot of the lake, versions, and what the gates said."""
    finished = bahe.open(home).runs(job, limit)
    if as_json:
        for run in finished:
            shown = {**vars(run), "seconds": run.seconds, "versions": run.versions}
            typer.echo(json.dumps(shown, default=str))
        return
    print_table(
        ("finished, UTC", "job", "seconds", "read", "written", "snapshot", ""),
        [
            (
                f"{run.finished:%Y-%m-%d %H:%M}",
                run.job,
                f"{run.seconds:.1f}",
                "" if run.rows_read is None else f"{run.rows_read:,}",
                "" if run.rows_written is None else f"{run.rows_written:,}",
                str(run.snapshot_read),
                run.says,
            )
            for run in finished
        ],
        plain=True,
    )


@app.command()
def status(home: HomeOption = None, as_json: JsonFlag = False) -> None:
    """What is behind what, and which command to run next. Loads no model."""
    state = bahe.open(home).status()
    if as_json:
        typer.echo(state.as_json())
        return
    print_table(
        ("part", "state", ""),
        [(part.part, "behind" if part.stale else "ok", part.says) for part in state.findings],
        plain=True,
    )
    if state.busy:
        typer.echo("another job is writing now")
    typer.echo(f"next: {state.next}" if state.next else "everything is up to date")
