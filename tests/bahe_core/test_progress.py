"""How far a step is: said once, and going on where an interrupted run was."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from bahe_core import progress as lines
from bahe_core.progress import progress, say


@pytest.fixture
def every_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAHE_LOG", "json")
    monkeypatch.setattr(lines, "REPORT_SECONDS", 0.0)


def said(capsys: pytest.CaptureFixture[str]) -> list[tuple[float, str | None]]:
    objects = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [(line["done"], line.get("note")) for line in objects]


@pytest.mark.usefixtures("every_step_is_said")
def test_the_last_line_of_a_step_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("embedding users", 943) as advance:
        advance(900)
        advance(43, note="loss 0.5")
        advance(0, note="epoch 1")
    assert said(capsys) == [(900, None), (943, "epoch 1")]


@pytest.mark.usefixtures("every_step_is_said")
@pytest.mark.parametrize("total", [None, 10])
def test_a_step_that_ends_early_does_not_repeat_its_last_line(
    total: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("training", total) as advance:
        advance(3)
        advance(4, note="stopped early")
    assert said(capsys) == [(3, None), (7, "stopped early")]


@pytest.mark.usefixtures("every_step_is_said")
def test_a_resumed_step_starts_where_the_interrupted_one_was(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 100) as advance:
        advance(60, earlier=True)
        advance(40)
    first, last = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["done"], first["earlier"]) == (60, 60)
    assert (last["done"], last["earlier"]) == (100, 60)
    assert "100 of 100 (60 by an earlier run)" in last["message"]


def test_a_bar_reckons_the_time_left_without_what_an_earlier_run_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BAHE_LOG", "text")
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(lines, "console", lambda: terminal)
    with progress("training", 1000) as advance:
        advance(990, earlier=True)
    resumed = [line for line in screen.getvalue().splitlines() if "990/1000" in line]
    assert "-:--:--" in resumed[-1], "this run has done nothing yet, so no rate is known"


def test_a_line_that_is_said_beside_a_bar_goes_to_the_bars_console(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BAHE_LOG", "text")
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    with progress("training", 10) as advance:
        advance(1)
        say("  about 40 s to go")
        advance(9)
    shown = screen.getvalue()
    assert shown.count("about 40 s to go") == 1
    assert "10/10" in shown
