"""The command line: one job a command. Heavy imports stay inside the commands, so help is instant."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bahe_core.errors import BadInput, BaheError, NotServable, storage_problem
from bahe_core.home import Home
from bahe_core.machine import configure_threads
from bahe_core.progress import job as job_of_lines
from bahe_core.progress import json_log, say, use_log_format, write_json

app = typer.Typer(
    name="bahe",
    help=(
        "From long logs of what people do, in words, to click predictions with a language model.\n\n"
        "Start with `bahe demo`, or `bahe run dataset.yaml` for a log of your own. `run` calls, in"
        " this order, the commands that also work alone: ingest, encode, apply, frame, train, embed,"
        " publish. `daily` is one night of it, `status` says what is behind, `runs` what was done. Each"
        " does only what is new; killed anywhere, the next call goes on.\n\nExit codes: 0 done, 1 a defect"
        " of bahe's, 2 bad input, a failed gate or a busy home, 130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130

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
LogFormatOption = Annotated[
    Literal["text", "json"],
    typer.Option(
        "--log-format",
        envvar="BAHE_LOG",
        help="Lines on standard error: for people, or a JSON object each.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def options(context: typer.Context, log_format: LogFormatOption = "text") -> None:
    """What holds for every command."""
    use_log_format(log_format)
    context.with_resource(job_of_lines(context.invoked_subcommand or ""))


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(help="movielens-100k or smollm2-135m.")],
) -> None:
    """Download the demo's log or its language model into the cache, and print where it is."""
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
    seed: Annotated[int | None, typer.Option(help="Another seed, another log.", show_default="0")] = None,
    start: Annotated[
        str | None, typer.Option(help="The first day, UTC.", show_default="2024-01-01")
    ] = None,
    format: Annotated[str | None, typer.Option(help="parquet or csv.", show_default="parquet")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a synthetic log with planted preferences, and print the best AUC that there can be.

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
def ingest(dataset: DatasetArgument, home: HomeOption = None) -> None:
    """Read a log into the lake: atoms, timelines, point-in-time statistics. Then the ingest gate."""
    from materialize.gate import gate
    from materialize.ingest.ingest import ingest as job

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

    from materialize.ingest.quarantine import quarantined

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
    from materialize.executors import ExecutorConfig
    from materialize.gate import gate
    from materialize.vectors.encode import encode as job

    where = Home.at(home)
    workers = ExecutorConfig(
        kind=executor, address=ray_address, actors=num_actors, gpus_per_actor=num_gpus_per_actor
    )
    done = job(where, device_name=device, processes=processes, compile=compiled, where=workers)
    say(f"  {done.encoder_version}: {done.added:,} atoms encoded, {done.total:,} in all")
    gate(where, "encode")


@app.command()
def apply(home: HomeOption = None) -> None:
    """Register entities, views and services of feature_repo/ with Feast, for this home."""
    from feature_repo.store import apply as job

    say("  registered " + job(Home.at(home)))


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
    from materialize.executors import ExecutorConfig
    from materialize.frames.frame import frame as job
    from materialize.gate import gate

    where = Home.at(home)
    workers = ExecutorConfig(kind=executor, address=ray_address, actors=num_actors)
    done = job(where, service=service, as_of=as_of, where=workers)
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
    from materialize.training.train import train_models as job

    done = job(Home.at(home), device_name=device, tracker=tracker, warm_start=warm_start, shard=shard)
    if int(os.environ.get("RANK", "0")):
        return  # of torchrun's processes, the first one speaks
    version = done.model_version
    say(
        f"  {version}" + (" (unchanged)" if done.skipped else ""),
        model_version=version,
        results=done.results,
    )
    _print_results(done.results)
    say(f"  report: {done.report}")


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
    from materialize.executors import ExecutorConfig
    from materialize.gate import gate
    from materialize.vectors.embed import embed as job

    where = Home.at(home)
    workers = ExecutorConfig(
        kind=executor, address=ray_address, actors=num_actors, gpus_per_actor=num_gpus_per_actor
    )
    done = job(where, model_version=model, device_name=device, where=workers)
    say(
        f"  {done.model_version}: {done.users_added:,} of {done.users:,} users and"
        f" {done.items_added:,} of {done.items:,} items embedded"
    )
    gate(where, "embed")


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
    from materialize.release import publish as job

    if to is not None and not rollback:
        raise BadInput(f"--to {to} says where a rollback goes; add --rollback.")
    done = job.rollback(Home.at(home), to) if rollback else job.publish(Home.at(home))
    wrote = "" if rollback or done.skipped else f", {done.rows:,} rows written online"
    say(f"  live: {done.model_version}{wrote}" + (" (unchanged)" if done.skipped else ""))


@app.command()
def compact(
    home: HomeOption = None,
    keep_days: Annotated[float, typer.Option(help="Forget snapshots that are older than this.")] = 90,
) -> None:
    """Merge the lake's small files, forget old snapshots, and remove files that nothing needs any more.

    `bahe frame --as-of` and offline stores with `as_of` can then no longer read what those snapshots saw;
    frames that were written stay. Files leave a day after their last use, so readers are not disturbed.
    """
    from materialize.upkeep.compact import compact as job

    done = job(Home.at(home), keep_days=keep_days)
    say(
        f"  {done.files_before:,} data files became {done.files_after:,};"
        f" {done.snapshots_forgotten:,} snapshots forgotten, the oldest is {done.oldest_snapshot};"
        f" {done.files_removed:,} files removed"
    )


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
    from materialize.upkeep.prune import prune as job

    done = job(Home.at(home), keep=keep, older_than=older_than, dry_run=dry_run)
    would = "would go" if dry_run else "gone"
    say(f"  models kept: {', '.join(done.kept) or 'none'}")
    for what, names in (
        ("models", done.models),
        ("encoder versions", done.encoder_versions),
        ("frames", done.frames),
        ("checkpoints", done.checkpoints),
    ):
        say(f"  {what} {would}: {', '.join(names) or 'none'}")
    rows = ", ".join(f"{count:,} of {table}" for table, count in done.rows.items())
    say(f"  rows {would}: {rows}, {done.online_rows:,} online")
    if not dry_run:
        say(f"  {done.freed / 2**20:,.1f} MiB freed")


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
    for name, step in _steps(dataset, home, device, tracker).items():
        start = time.perf_counter()
        say(f"[bold]bahe {name}[/bold]")
        with job_of_lines(name):
            try:
                step()
            except NotServable as error:
                say(f"  {error}")
                return
        say(f"  [dim]{time.perf_counter() - start:.1f} s[/dim]")


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
        typer.Option(help="How far the new model's validation AUC may be below the live model's."),
    ] = 0.005,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for another job on this home to end.")
    ] = 0,
    device: DeviceOption = None,
    tracker: TrackerOption = "mlflow",
) -> None:
    """One night: everything that `run` does, with a quality gate before a new model goes live.

    Keeps a manifest in HOME/daily/DATE.json: killed anywhere, the same call goes on with the step that was
    not finished; a date that is done is done. A failed gate ends it with exit code 2 and leaves the live
    model as it is.
    """
    from bahe.daily import Day, run_day, today, trained_on_latest_frame

    where = Home.at(home)

    def do(name: str, **more: Any) -> Any:
        return lambda day: _steps(Path(day.dataset), home, device, tracker, **more)[name]()

    def training(day: Day) -> dict[str, str] | None:
        live = day.live_before if day.retrain == "warm" else None
        if live is not None and trained_on_latest_frame(where, live):
            say(f"  {live} has been trained on this frame")
            return {"model_version": live}
        try:
            do("train", warm_start=live)(day)
        except BadInput as error:
            raise BadInput(
                str(error).replace("train without --warm-start", "give --retrain fresh")
            ) from None
        return None

    def quality(day: Day) -> None:
        from materialize.release.quality import judge

        if day.live_before is None or day.trained is None or day.trained == day.live_before:
            say("  there is no other model to compare with")
            return
        facts = judge(where, day.trained, day.live_before, tolerance, device).facts
        say(
            f"  gate quality: passed, validation AUC {facts['auc']:.4f} against {facts['live_auc']:.4f} of"
            f" {day.live_before}",
            **facts,
        )

    steps: dict[str, Any] = {name: do(name) for name in ("ingest", "encode", "apply", "frame", "publish")}
    steps |= {
        "train": training,
        "quality": quality,
        "embed": lambda day: do("embed", model=day.trained or day.live_before)(day),
    }
    run_day(
        where,
        date.date() if date else today(),
        None if dataset is None else str(dataset.resolve()),
        retrain,
        steps,
        wait=wait,
    )


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
    from bahe_lake.connection import lake
    from bahe_lake.runs import history

    with lake(Home.at(home)) as connection:
        found = history(connection, job, limit)
    if as_json:
        for one in found:
            shown = {**vars(one), "seconds": one.seconds, "versions": one.versions}
            typer.echo(json.dumps(shown, default=str))
        return
    _print_table(
        ("finished, UTC", "job", "seconds", "read", "written", "snapshot", ""),
        [
            (
                f"{one.finished:%Y-%m-%d %H:%M}",
                one.job,
                f"{one.seconds:.1f}",
                "" if one.rows_read is None else f"{one.rows_read:,}",
                "" if one.rows_written is None else f"{one.rows_written:,}",
                str(one.snapshot_read),
                one.says,
            )
            for one in found
        ],
        plain=True,
    )


@app.command()
def status(home: HomeOption = None, as_json: JsonFlag = False) -> None:
    """What is behind what, and which command to run next. Loads no model."""
    from bahe.status import as_json as in_json
    from bahe.status import status as job

    found = job(Home.at(home))
    if as_json:
        typer.echo(in_json(found))
        return
    _print_table(
        ("part", "state", ""),
        [(f.part, "behind" if f.stale else "ok", f.says) for f in found.findings],
        plain=True,
    )
    if found.busy:
        typer.echo("another job is writing now")
    typer.echo(f"next: {found.next}" if found.next else "everything is up to date")


@app.command()
def demo(
    home: HomeOption = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results table to this file.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """The main job on MovieLens-100k with SmolLM2-135M, from download to scores for one user."""
    from materialize.config.fetch import fetch as download
    from materialize.training.train import train_models

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


def _steps(
    dataset: Path,
    home: Path | None,
    device: str | None,
    tracker: Literal["mlflow", "tensorboard", "none"],
    *,
    warm_start: str | None = None,
    model: str | None = None,
) -> dict[str, Callable[[], None]]:
    """The commands from the log to online scores, in their order: what `run` and `daily` call."""
    return {
        "ingest": lambda: ingest(dataset, home),
        "encode": lambda: encode(home, device),
        "apply": lambda: apply(home),
        "frame": lambda: frame_quietly(home),
        "train": lambda: train(home, device, tracker, warm_start),
        "embed": lambda: embed(home, device, model),
        "publish": lambda: publish(home),
    }


def frame_quietly(home: Path | None) -> None:
    """The frame step within `run` and `daily`, where its path is no answer to print."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        frame(home)


def _print_results(results: list[dict[str, Any]]) -> None:
    from materialize.training.report import shown, shown_auc

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


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, plain: bool = False) -> None:
    """A framed table; a plain one is as wide as its rows, so that grep finds them whole."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Where nobody looks at it, a plain table is not folded into 80 columns.
    console = Console(width=1000 if plain and not sys.stdout.isatty() else None)
    table = Table(*header, box=None, pad_edge=False) if plain else Table(*header)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


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
        _say_error(str(error), error, error.exit_code)
        sys.exit(error.exit_code)
    except SystemExit as error:
        if error.code == INTERRUPTED:  # Typer's own answer to Ctrl-C
            _say_error("interrupted; what was committed is kept, run it again to go on", error, INTERRUPTED)
        raise
    except Exception as error:
        problem = storage_problem(error)
        if problem is not None:
            _say_error(str(problem), problem, problem.exit_code)
            sys.exit(problem.exit_code)
        if not json_log():
            raise
        _say_error(str(error), error, 1, traceback=traceback.format_exc())
        sys.exit(1)


def _say_error(message: str, error: BaseException, exit_code: int, **fields: Any) -> None:
    if json_log():
        write_json("error", message, {"error": type(error).__name__, "exit_code": exit_code, **fields})
    else:
        print(f"bahe: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
