"""Progress of a job on standard error: lines and bars for people, JSON for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("text", "json")
REPORT_SECONDS = 15.0
"""How often a long step reports its progress where there is no terminal for a bar."""

_job: ContextVar[str | None] = ContextVar("job", default=None)
_bar_console: ContextVar[Console | None] = ContextVar("bar_console", default=None)
"""The console of the current bar; lines printed meanwhile go above it."""


def json_log() -> bool:
    """Whether lines are JSON objects: BAHE_LOG=json, or `bahe --log-format json`, which sets it."""
    return os.environ.get("BAHE_LOG", "text") == "json"


def use_log_format(name: str) -> None:
    """Log as `text` or `json` from now on, in this process and those that it starts."""
    os.environ["BAHE_LOG"] = name
    if name == "json":
        # Otherwise libraries' messages would appear between the objects as plain text.
        logging.basicConfig(handlers=[_JsonHandler()], level=logging.WARNING, force=True)


@contextmanager
def job(name: str) -> Iterator[None]:
    """Lines logged within the block belong to this job."""
    token = _job.set(name)
    try:
        yield
    finally:
        _job.reset(token)


def console() -> Console:
    """Standard error, so that a command's output can be piped."""
    from rich.console import Console

    return _bar_console.get() or Console(stderr=True, highlight=False)


def say(message: str, **fields: Any) -> None:
    """One line of progress; the fields are for machines, so the message should tell a person the same."""
    if json_log():
        from rich.text import Text

        write_json("info", Text.from_markup(message).plain.strip(), fields)
    else:
        console().print(message, soft_wrap=True)


def write_json(level: str, message: str, fields: dict[str, Any]) -> None:
    """One JSON object a line: time (UTC), level, job, message, and the fields."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "job": _job.get(),
        "message": message,
        **fields,
    }
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Show a step's progress; yields `advance(amount=1, note=None, earlier=False)`.

    A total of None is unknown. `earlier` marks a part that an interrupted run did: it counts as done, but
    the time left is estimated without it. On a terminal this is a bar with the time left, else a line every
    `REPORT_SECONDS` and one at the end.
    """
    if json_log() or not console().is_terminal:
        yield from _lines(description, total)
    else:
        yield from _bar(description, total)


def _lines(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    done, done_earlier, last_note = 0.0, 0.0, ""
    reported: tuple[float, str] | None = None

    def advance(amount: float = 1, note: str | None = None, earlier: bool = False) -> None:
        nonlocal done, done_earlier, last_note, last
        done += amount
        done_earlier += amount if earlier else 0
        last_note = last_note if note is None else note
        # A complete step is reported at the end.
        if done != total and time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            report()

    def report() -> None:
        nonlocal reported
        reported = (done, last_note)
        of = "" if total is None else f" of {total:,.0f}"
        seconds = round(time.monotonic() - start, 1)
        of += f" ({done_earlier:,.0f} by an earlier run)" if done_earlier else ""
        note = f", {last_note}" if last_note else ""
        message = f"  {description}: {done:,.0f}{of}, {seconds} s{note}"
        fields: dict[str, Any] = {"step": description, "done": done, "total": total, "seconds": seconds}
        fields |= {"earlier": done_earlier} if done_earlier else {}
        say(message, **fields, **({"note": last_note} if last_note else {}))

    yield advance
    if done and reported != (done, last_note):
        report()


@contextmanager
def _lines_above(shared: Console) -> Iterator[None]:
    token = _bar_console.set(shared)
    try:
        yield
    finally:
        _bar_console.reset(token)


def _bar(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    shared = console()
    with Progress(*columns, console=shared) as bar, _lines_above(shared):
        task = bar.add_task(description, total=total, note="")

        def advance(amount: float = 1, note: str | None = None, earlier: bool = False) -> None:
            if earlier:  # restarts the clock, so that the rate is this run's
                bar.reset(task, completed=int(bar.tasks[task].completed + amount))
            else:
                bar.advance(task, amount)
            if note is not None:
                bar.update(task, note=note)

        yield advance


class _JsonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        write_json(record.levelname.lower(), record.getMessage(), {"logger": record.name})
