"""The command line as a whole: what holds for every command, and how errors end it."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

import bahe
from bahe.cli.dependency_warnings import silence_dependencies
from bahe.cli.options import LogFormatOption
from bahe_core.errors import BaheError, storage_problem
from bahe_core.lake_location import bound_postgres_wait
from bahe_core.machine import configure_threads
from bahe_core.progress import job as job_of_lines
from bahe_core.progress import json_log, use_log_format, write_json

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
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bahe {bahe.__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
]


@app.callback()
def options(
    context: typer.Context, log_format: LogFormatOption = "text", version: VersionOption = False
) -> None:
    """What holds for every command."""
    use_log_format(log_format)
    context.with_resource(job_of_lines(context.invoked_subcommand or ""))


def main() -> None:
    """Entry point: errors that bahe raises on purpose become one sentence and exit code 2."""
    configure_threads()
    bound_postgres_wait()
    # Libraries' own bars stay off: bahe shows one bar a step. Read by tqdm when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    silence_dependencies()
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
