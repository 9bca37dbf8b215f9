"""Commands about the log: get one, read it, see what was set aside."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import bahe
from bahe.cli.options import (
    DatasetArgument,
    HomeOption,
    JsonFlag,
)
from bahe.cli.printing import print_table
from bahe.cli.program import app
from bahe_core.progress import say


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(help="movielens-100k, complete-journey or smollm2-135m.")],
) -> None:
    """Download a demo's log or the language model into the cache, and print where it is.

    A log is a folder with its files and a commented dataset.yaml, to be copied and changed.
    """
    from materialize.config.fetch import fetch as job

    typer.echo(job(what))


@app.command()
def synth(
    folder: Annotated[
        Path, typer.Argument(help="Where to write the log; a new folder, or one to add days to.")
    ],
    users: Annotated[int | None, typer.Option(help="People in the log.", show_default="1000")] = None,
    items: Annotated[int | None, typer.Option(help="Things that can be shown.", show_default="500")] = None,
    behaviors: Annotated[
        int | None, typer.Option(help="What people did, over the first --days.", show_default="100000")
    ] = None,
    impressions: Annotated[
        int | None, typer.Option(help="What was shown, over the first --days.", show_default="50000")
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="Kinds of behavior, separated by commas.",
            show_default="bills,searches,visits,mini_programs,services,coupons",
        ),
    ] = None,
    atoms: Annotated[
        int | None, typer.Option(help="Distinct texts that behaviors can have.", show_default="10000")
    ] = None,
    days: Annotated[
        int | None, typer.Option(help="Days of the log; more than there are adds days.", show_default="30")
    ] = None,
    recency: Annotated[
        float | None,
        typer.Option(
            help="Logits a click gains of a topic that the user last cared about.", show_default="0"
        ),
    ] = None,
    order: Annotated[
        float | None,
        typer.Option(
            help="Logits a click gains of a topic searched for after it was paid for; else it loses them.",
            show_default="0",
        ),
    ] = None,
    combination: Annotated[
        float | None,
        typer.Option(
            help="Logits a click gains of a topic met in both last channels; of one in one, it loses them.",
            show_default="0",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed, another log.", show_default="0")] = None,
    start: Annotated[
        str | None, typer.Option(help="The first day, UTC.", show_default="2024-01-01")
    ] = None,
    format: Annotated[str | None, typer.Option(help="parquet or csv.", show_default="parquet")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a synthetic log with planted preferences, and print the best AUC that there can be.

    --recency, --order and --combination plant what only the sequence of a user's behaviors tells.
    A killed run is finished by the next. To add a day to a log of 30: bahe synth FOLDER --days 31.
    """
    from bahe_synth.log import synth as job

    options = {
        "users": users,
        "items": items,
        "behaviors": behaviors,
        "impressions": impressions,
        "channels": None if channels is None else tuple(part.strip() for part in channels.split(",")),
        "atoms": atoms,
        "recency": recency,
        "order": order,
        "combination": combination,
        "seed": seed,
        "start": start,
        "format": format,
    }
    done = job(folder, days=days, **{name: value for name, value in options.items() if value is not None})
    if as_json:
        typer.echo(json.dumps({**vars(done), "dataset": str(done.dataset)}))
        return
    rows = ", ".join(f"{count:,} {table}" for table, count in done.rows.items())
    say(f"  {rows}; {done.days_written} of {done.days} days written now")
    say(
        f"  Bayes-optimal AUC {done.bayes_auc:.4f}; knowing only how popular an item is"
        f" {done.popularity_auc:.4f}"
    )
    typer.echo(done.dataset)


@app.command()
def check(dataset: DatasetArgument) -> None:
    """Look for everything that is wrong with a dataset.yaml, its files and columns; count rows, read none.

    Names every problem with its line. What single values are is looked at by `bahe ingest`.
    """
    for line in bahe.check(dataset).summary:
        typer.echo(line)


@app.command()
def ingest(dataset: DatasetArgument, home: HomeOption = None) -> None:
    """Read a log into the lake: atoms, timelines, point-in-time statistics. Then the ingest gate."""
    bahe.open(home).ingest(dataset)


@app.command()
def quarantine(
    home: HomeOption = None,
    table: Annotated[str | None, typer.Option(help="Only of this table.", show_default="all")] = None,
    rows: Annotated[int, typer.Option(help="How many rows to show for each reason.", min=1)] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Show the rows of the log that `bahe ingest` set aside: how many, why, and where they stand.

    They enter once their file is corrected and ingested again. In SQL: the lake's table quarantine.
    """
    groups = bahe.open(home).quarantine(table, examples=rows)
    if as_json:
        typer.echo(json.dumps([asdict(group) for group in groups], default=str))
        return
    if not groups:
        say("  nothing is in quarantine")
        return
    shown: list[tuple[str, ...]] = []
    for group in groups:
        for index, row in enumerate(group.examples):
            first = (group.table, group.rule, f"{group.rows:,}") if index == 0 else ("", "", "")
            shown.append((*first, f"{Path(row['source']).name}, row {row['row_number']}: {row['reason']}"))
    print_table(("table", "rule", "rows", "for example"), shown)
