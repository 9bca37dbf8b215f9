"""The command that writes a first dataset.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import bahe
from bahe.cli.program import app


@app.command()
def init(
    files: Annotated[list[Path], typer.Argument(help="Parquet or CSV files of the log.", metavar="FILES…")],
    output: Annotated[
        Path, typer.Option(help="Where to write; nothing that exists is overwritten.")
    ] = Path("dataset.yaml"),
) -> None:
    """Look at a log's files and write a commented dataset.yaml; then say what `bahe check` says of it.

    Tables, columns, time units, clicks or ratings, and channels are guessed, each with its reason; what
    cannot be guessed is marked TODO.
    """
    from materialize.config.proposal import propose

    propose(files, output)
    typer.echo(f"wrote {output}; read its comments, as it is made of guesses")
    for line in bahe.check(output).summary:
        typer.echo(line)
