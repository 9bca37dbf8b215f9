"""Progress bars for long steps, and plain lines for short ones; all on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Standard error, so that what a command prints as its answer can be piped."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """One line of progress."""
    console().print(message, soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left; yields `advance(amount, note="")`. A total of None is unknown."""
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
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: float = 1, note: str | None = None) -> None:
            bar.advance(task, amount)
            if note is not None:
                bar.update(task, note=note)

        yield advance
