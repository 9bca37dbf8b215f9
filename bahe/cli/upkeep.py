"""Commands that keep a home small."""

from __future__ import annotations

from typing import Annotated

import typer

import bahe
from bahe.cli.options import (
    HomeOption,
)
from bahe.cli.program import app


@app.command()
def compact(
    home: HomeOption = None,
    keep_days: Annotated[float, typer.Option(help="Forget snapshots that are older than this.")] = 90,
) -> None:
    """Merge the lake's small files, forget old snapshots, and remove files that nothing needs any more.

    `bahe frame --as-of` and offline stores with `as_of` can then no longer read what those snapshots saw;
    frames that were written stay. Files leave a day after their last use, so readers are not disturbed.
    """
    bahe.open(home).compact(keep_days=keep_days)


@app.command()
def prune(
    home: HomeOption = None,
    keep: Annotated[int, typer.Option(help="How many of the newest models stay.")] = 3,
    older_than: Annotated[
        float | None,
        typer.Option(help="Of these, drop what was trained more days ago.", show_default="no limit"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and drop nothing.")
    ] = False,
) -> None:
    """Drop old models and their vectors, frames and abandoned checkpoints. `bahe compact` then makes room.

    The live model, the one published before it (for a rollback), the last trained and the last embedded one
    stay, with the atom vectors and frames that they read, and so does an encoder that is being built.
    """
    bahe.open(home).prune(keep=keep, older_than=older_than, dry_run=dry_run)
