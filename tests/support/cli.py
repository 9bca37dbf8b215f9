"""The command line, called inside this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

from bahe import cli
from bahe_core.home import Home


def attempt(*arguments: object, home: Home | Path | None = None) -> Result:
    """What `bahe ARGUMENTS --home HOME` answers, whether or not it succeeds.

    An error that bahe raises on purpose is the result's `exception`; `main` makes its sentence of it.
    """
    words = [str(argument) for argument in arguments]
    if home is not None:
        words += ["--home", str(home.root if isinstance(home, Home) else home)]
    return CliRunner().invoke(cli.app, words)


def call(*arguments: object, home: Home | Path | None = None) -> Result:
    """The same where it has to succeed: raises what the command raised, AssertionError on an exit code."""
    result = attempt(*arguments, home=home)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def require_accepted(arguments: Sequence[str]) -> None:
    """Raises when bahe's own parser does not know the command, an option or an argument; nothing is run."""
    group: Any = typer.main.get_command(cli.app)
    place = next((place for place, word in enumerate(arguments) if word in group.commands), len(arguments))
    context = group.make_context("bahe", [*arguments[: place + 1]])
    name, *rest = arguments[place:]
    group.commands[name].make_context(name, rest, parent=context)
