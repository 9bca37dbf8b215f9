"""The command line: one job a command. Heavy imports stay inside the commands, so help is instant."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bahe_core.errors import BaheError, NotServable
from bahe_core.home import Home
from bahe_core.machine import configure_threads
from bahe_core.progress import say

app = typer.Typer(
    name="bahe",
    help=(
        "From long logs of what people do, in words, to click predictions with a language model.\n\n"
        "Start with `bahe demo`, or `bahe run dataset.yaml` for a log of your own. `run` calls, in"
        " this order, the commands that also work alone: ingest, encode, apply, frame, train, embed,"
        " publish. Each does only what is new; killed anywhere, the next call goes on. Exit codes:"
        " 0 done, 1 a defect of bahe's, 2 bad input, a failed gate or a busy home."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
TrackerOption = Annotated[
    Literal["mlflow", "tensorboard", "none"], typer.Option(help="Where to log training.")
]
UserOption = Annotated[str, typer.Option("--user", help="A user_id of the log.")]
AtOption = Annotated[
    datetime | None,
    typer.Option(
        help="Moment of the request, UTC; features know how long ago things were.",
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
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(help="movielens-100k or smollm2-135m.")],
) -> None:
    """Download the demo's log or its language model into the cache, and print where it is."""
    from materialize.fetch import fetch as job

    typer.echo(job(what))


@app.command()
def ingest(dataset: DatasetArgument, home: HomeOption = None) -> None:
    """Read a log into the lake: atoms, timelines, point-in-time statistics. Then the ingest gate."""
    from materialize.gates import gate
    from materialize.ingest import ingest as job

    where = Home.at(home)
    done = job(where, dataset)
    totals = ", ".join(f"{count:,} {table}" for table, count in done.totals.items())
    say(f"  lake holds {totals}" + (" (unchanged)" if done.skipped else ""))
    if done.duplicates:
        say("  left out as duplicates: " + ", ".join(f"{n:,} {t}" for t, n in done.duplicates.items()))
    if done.quarantined:
        aside = ", ".join(f"{n:,} {t}" for t, n in done.quarantined.items())
        say(f"  set aside: {aside}; `bahe quarantine` shows them and why")
    gate(where, "ingest")


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
    from dataclasses import asdict

    from materialize.quarantine import quarantined

    held = quarantined(Home.at(home), table=table, examples=rows)
    if as_json:
        typer.echo(json.dumps([asdict(group) for group in held], default=str))
        return
    if not held:
        say("  nothing is in quarantine")
        return
    shown: list[tuple[str, ...]] = []
    for group in held:
        for index, row in enumerate(group.examples):
            first = (group.table, group.rule, f"{group.rows:,}") if index == 0 else ("", "", "")
            shown.append((*first, f"{Path(row['source']).name}, row {row['row_number']}: {row['reason']}"))
    _print_table(("table", "rule", "rows", "for example"), shown)


@app.command()
def encode(home: HomeOption = None, device: DeviceOption = None) -> None:
    """Encode atoms that have no vector yet with the frozen shallow layers. Then the encode gate."""
    from materialize.encode import encode as job
    from materialize.gates import gate

    where = Home.at(home)
    done = job(where, device_name=device)
    say(f"  {done.encoder_version}: {done.added:,} atoms encoded, {done.total:,} in all")
    gate(where, "encode")


@app.command()
def apply(home: HomeOption = None) -> None:
    """Register entities, views and services of feature_repo/ with Feast, for this home."""
    from materialize.feature_store import apply as job

    say("  registered " + job(Home.at(home)))


@app.command()
def frame(
    home: HomeOption = None,
    service: Annotated[str, typer.Option(help="The feature service to pull.")] = "ctr_training",
    as_of: Annotated[
        int | None,
        typer.Option(help="Read the lake as it was at this snapshot.", show_default="the newest"),
    ] = None,
) -> None:
    """Pull the point-in-time training frame through Feast and split it by time. Then its gate."""
    from materialize.frame import frame as job
    from materialize.gates import gate

    where = Home.at(home)
    done = job(where, service=service, as_of=as_of)
    rows = ", ".join(f"{count:,} {name}" for name, count in done.rows.items())
    snapshot = done.facts["snapshot"]
    say(f"  frame {done.frame_id}, snapshot {snapshot}: {rows}" + (" (unchanged)" if done.skipped else ""))
    gate(where, "frame")
    typer.echo(done.path)


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
    from materialize.train import train_models as job

    done = job(Home.at(home), device_name=device, tracker=tracker, warm_start=warm_start, shard=shard)
    if int(os.environ.get("RANK", "0")):
        return  # of torchrun's processes, the first one speaks
    say(f"  {done.model_version}" + (" (unchanged)" if done.skipped else ""))
    _print_results(done.results)
    say(f"  report: {done.report}")


@app.command()
def embed(home: HomeOption = None, device: DeviceOption = None) -> None:
    """Compute user and item vectors of the trained model where they changed. Then the embed gate."""
    from materialize.embed import embed as job
    from materialize.gates import gate

    where = Home.at(home)
    done = job(where, device_name=device)
    say(
        f"  {done.model_version}: {done.users_added:,} of {done.users:,} users and"
        f" {done.items_added:,} of {done.items:,} items embedded"
    )
    gate(where, "embed")


@app.command()
def publish(home: HomeOption = None) -> None:
    """Write vectors and statistics to the online store and make the embedded model the live one."""
    from materialize.publish import publish as job

    done = job(Home.at(home))
    say(f"  live: {done.model_version}" + (" (unchanged)" if done.skipped else ""))


@app.command()
def compact(
    home: HomeOption = None,
    keep_days: Annotated[float, typer.Option(help="Forget snapshots that are older than this.")] = 90,
) -> None:
    """Merge the lake's small files, forget old snapshots, and remove files that nothing needs any more.

    `bahe frame --as-of` and offline stores with `as_of` can then no longer read what those snapshots saw;
    frames that were written stay. Files leave a day after their last use, so readers are not disturbed.
    """
    from materialize.upkeep import compact as job

    done = job(Home.at(home), keep_days=keep_days)
    say(
        f"  {done.files_before:,} data files became {done.files_after:,};"
        f" {done.snapshots_forgotten:,} snapshots forgotten, the oldest is {done.oldest_snapshot};"
        f" {done.files_removed:,} files removed"
    )


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
    steps: list[tuple[str, Any]] = [
        (f"ingest {dataset}", lambda: ingest(dataset, home)),
        ("encode", lambda: encode(home, device)),
        ("apply", lambda: apply(home)),
        ("frame", lambda: frame_quietly(home)),
        ("train", lambda: train(home, device, tracker)),
        ("embed", lambda: embed(home, device)),
        ("publish", lambda: publish(home)),
    ]
    for name, step in steps:
        start = time.perf_counter()
        say(f"[bold]bahe {name}[/bold]")
        try:
            step()
        except NotServable as error:
            say(f"  {error}")
            return
        say(f"  [dim]{time.perf_counter() - start:.1f} s[/dim]")


@app.command()
def demo(
    home: HomeOption = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results table to this file.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """The main job on MovieLens-100k with SmolLM2-135M, from download to scores for one user."""
    from materialize.fetch import fetch as download
    from materialize.train import train_models

    start = time.perf_counter()
    where = Home.at(home)
    say("[bold]bahe fetch movielens-100k, bahe fetch smollm2-135m[/bold]")
    dataset = download("movielens-100k") / "movielens-100k.yaml"
    download("smollm2-135m")
    run(dataset, home, device)
    results = train_models(where, device_name=device).results
    if json_path is not None:
        json_path.write_text(json.dumps({"results": results}, indent=2) + "\n")
    say("[bold]bahe recommend --user 1 -k 5 --at 1998-04-23[/bold]")
    # The log ends in April 1998; asked of today, every statistic would look decades old.
    recommend(user="1", k=5, at=datetime(1998, 4, 23), include_seen=False, home=home, as_json=False)
    say("[bold]Results[/bold]")
    _print_results(results)
    say(f"  report: {where.reports / 'training.html'}")
    say(f"  gates: {where.reports / 'data_docs' / 'gates.html'}")
    say(f"[bold]done in {time.perf_counter() - start:.0f} s[/bold]; next: bahe serve, bahe --help")


@app.command()
def lookup(user: UserOption, home: HomeOption = None, as_json: JsonFlag = False) -> None:
    """Show what the online store holds of a user under the live model."""
    from serving.lookup import OnlineLookup

    found = OnlineLookup(Home.at(home)).user(user)
    facts: dict[str, Any] = {
        "user_id": found.user_id,
        "model_version": found.model_version,
        "cold": found.cold,
        "behaviors": found.behaviors,
        **found.statistics,
    }
    if as_json:
        typer.echo(json.dumps({**facts, "embedding": found.vector.tolist()}))
        return
    shown = " ".join(f"{value:+.3f}" for value in found.vector[:6])
    facts["embedding"] = f"[{shown} …] ({len(found.vector)} numbers)"
    _print_table(("feature", "value"), [(k, "" if v is None else str(v)) for k, v in facts.items()])


@app.command()
def score(
    user: UserOption,
    items: Annotated[list[str], typer.Option("--items", help="Item ids, separated by commas.")],
    home: HomeOption = None,
    at: AtOption = None,
    context: ContextOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Click probabilities of some items for a user, best first."""
    from serving.lookup import OnlineLookup, parsed_context

    wanted = [part.strip() for given in items for part in given.split(",") if part.strip()]
    known = parsed_context(context or ())
    _print_answer(OnlineLookup(Home.at(home)).score(user, wanted, at, context=known), as_json)


@app.command()
def recommend(
    user: UserOption,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    home: HomeOption = None,
    at: AtOption = None,
    context: ContextOption = None,
    include_seen: Annotated[bool, typer.Option(help="Also items the user has acted on before.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """The k items that the user will most likely click."""
    from serving.lookup import OnlineLookup, parsed_context

    known = parsed_context(context or ())
    answer = OnlineLookup(Home.at(home)).recommend(user, k, at, include_seen=include_seen, context=known)
    _print_answer(answer, as_json)


@app.command()
def serve(
    home: HomeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    live: Annotated[
        bool, typer.Option("--live", help="Also take behaviors at /behaviors; loads the language model.")
    ] = False,
) -> None:
    """Serve the live model over HTTP: /health, /features, /score, /recommend, and /docs to try them."""
    import uvicorn

    from serving.api import create_app

    application = create_app(Home.at(home), live=live)
    say(f"  http://{host}:{port}/docs")
    uvicorn.run(application, host=host, port=port, log_level="warning")


def frame_quietly(home: Path | None) -> None:
    """The frame step within `run`, where its path is no answer to print."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        frame(home)


def _print_results(results: list[dict[str, Any]]) -> None:
    from materialize.report import shown, shown_auc

    names = {"floor": "floor", "id_only": "ID-only", "bahe": "BAHE"}
    # Narrow enough for 80 columns, the width of a pipe; log loss and calibration are in the report.
    _print_table(
        ("model", "split", "AUC [95 %]", "GAUC", "train s", "peak MiB"),
        [
            (
                names[row["model"]],
                row["split"],
                shown_auc(row),
                shown(row["gauc"]),
                f"{row['train_seconds']:.1f}",
                f"{row['peak_memory_mb']:.0f}",
            )
            for row in results
        ],
    )


def _print_answer(answer: Any, as_json: bool) -> None:
    if as_json:
        scores = [vars(score) for score in answer.scores]
        typer.echo(json.dumps({**vars(answer), "scores": scores}))
        return
    if answer.cold:
        say(f"  user {answer.user_id} is cold: no history yet, so the empty state answers")
    _print_table(
        ("item", "click probability", "text"),
        [(str(s.item_id), f"{s.probability:.4f}", s.text) for s in answer.scores],
    )


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Entry point: errors that bahe raises on purpose become one sentence and exit code 2."""
    configure_threads()
    # Libraries' own bars stay off: bahe shows one bar a step. Read by tqdm when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Feast and transformers announce future changes of their own; none is for a user to act on.
    warnings.filterwarnings("ignore")
    try:
        app()
    except BaheError as error:
        print(f"bahe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("bahe: interrupted; what was committed is kept, run it again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
