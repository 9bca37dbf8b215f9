"""What is said while a job works, as text and as JSON, and the codes that a command exits with."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import typer

from bahe import cli
from bahe.cli import program
from bahe_core import progress as lines
from bahe_core.errors import Busy, GateFailed
from bahe_core.progress import job, progress, say
from tests.support.cli import attempt

INTERRUPTED = "interrupted; what was committed is kept, run it again to go on"


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAHE_LOG", "json")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`bahe.main` sets what holds for a process."""
    monkeypatch.setenv("BAHE_LOG", "text")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    handlers, level = logging.root.handlers[:], logging.root.level
    with warnings.catch_warnings():
        yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


@pytest.mark.usefixtures("as_json")
def test_a_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    with job("encode"):
        say('  [bold]two "words"[/bold]\n', rows=3)
        with job("daily"):
            say("within")
    say("without")
    first, within, without = said(capsys)
    assert first["message"] == 'two "words"'
    assert (first["job"], first["level"], first["rows"]) == ("encode", "info", 3)
    assert (within["job"], without["job"]) == ("daily", None)


@pytest.mark.usefixtures("as_json")
def test_progress_is_objects_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress("encoding atoms", 4) as advance:
        advance(1)
        advance(1, note="half")
        monkeypatch.setattr(lines, "REPORT_SECONDS", 0.0)
        advance(1)
        monkeypatch.setattr(lines, "REPORT_SECONDS", 1e9)
        advance(1)
    between, end = said(capsys)
    assert (between["done"], between["total"], between["note"]) == (3, 4, "half")
    assert (end["done"], end["step"]) == (4, "encoding atoms")
    with progress("nothing to do", 0):
        pass
    assert said(capsys) == []


def test_progress_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAHE_LOG", "text")
    with progress("encoding atoms", 2048) as advance:
        advance(2048, note="well")
    captured = capsys.readouterr().err
    assert captured.startswith("  encoding atoms: 2,048 of 2,048, ")
    assert captured.endswith(" s, well\n")
    assert "\x1b" not in captured


def main_of(error: BaseException | None, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The code that the process exits with when a command raises."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(program.options)

    @app.command()
    def work() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(program, "app", app)
    monkeypatch.setattr("sys.argv", ["bahe", *arguments, "work"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (GateFailed("the gate failed; do this."), 2, "bahe: the gate failed; do this.\n"),
        (Busy("busy; wait."), 2, "bahe: busy; wait.\n"),
        (
            KeyboardInterrupt(),
            130,
            "bahe: interrupted; what was committed is kept, run it again to go on\n",
        ),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main_of(error, monkeypatch) == code
    assert capsys.readouterr().err.lstrip("\n") == words
    assert main_of(error, monkeypatch, "--log-format", "json") == code
    told = said(capsys) if error else []
    assert [line["exit_code"] for line in told] == ([code] if error else [])
    assert all(line["level"] == "error" for line in told)


@pytest.mark.usefixtures("clean")
def test_a_defect_exits_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError):  # Python prints the traceback and exits with 1
        main_of(ZeroDivisionError("no"), monkeypatch)
    assert main_of(ZeroDivisionError("no"), monkeypatch, "--log-format", "json") == 1
    (line,) = said(capsys)
    assert (line["error"], line["message"]) == ("ZeroDivisionError", "no")
    assert "Traceback" in str(line["traceback"])


@pytest.mark.usefixtures("clean")
def test_what_libraries_log_comes_as_objects_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(None, monkeypatch, "--log-format", "json") == 0
    logging.getLogger("some.library").warning("careful with %s", "this")
    logging.getLogger("some.library").info("not this")
    (line,) = said(capsys)
    assert (line["level"], line["logger"], line["message"]) == (
        "warning",
        "some.library",
        "careful with this",
    )


def test_help_says_the_codes_and_formats() -> None:
    text = " ".join(attempt("--help").stdout.split())
    assert "0 done, 1 a defect" in text
    assert "130 interrupted" in text
    assert "--log-format" in text
    wrong = attempt("--log-format", "xml", "status")
    assert wrong.exit_code == 2
