from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from bahe_core.errors import BadInput
from benchmarks import harness
from benchmarks.harness import DOCS, MEASUREMENTS, Row, main, put, section

CONTENT = {
    "name": "reads",
    "quick": True,
    "date": "2026-01-02",
    "commit": "abc",
    "hardware": "a machine, 2 cores",
    "threads": 2,
    "rows": [
        asdict(Row(metric="read", value=1234.5, unit="ms", peer="bare, ms", peer_value=2.0)),
        asdict(Row(metric="wrong", value=3, unit="rows", goal="0", holds=False)),
    ],
}
BEGIN, END = "<!-- computed by benchmarks.reads -->", "<!-- end -->"


def test_a_section_names_command_machine_and_missed_goals() -> None:
    text = section(CONTENT)
    assert "`python -m benchmarks.reads --quick`, 2026-01-02, a machine, 2 cores, 2 threads" in text
    assert "| read | 1,234 ms | bare, ms: 2 |  |" in text
    assert "| wrong | 3 rows |  | 0: **missed** |" in text


def test_a_stopped_run_leaves_its_rows_which_can_be_put_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, saved = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(harness, "MEASUREMENTS", page)

    def run(*arguments: str, stopped: bool = False) -> None:
        def measure(quick: bool, home: Path) -> Iterator[Row]:
            yield Row(metric="first", value=1, unit="s")
            if stopped:
                raise KeyboardInterrupt
            yield Row(metric="second", value=2, unit="s")

        monkeypatch.setattr("sys.argv", ["reads", *arguments])
        main("reads", "", measure)

    with pytest.raises(KeyboardInterrupt):
        run("--json", str(saved), "--write", stopped=True)
    assert "first" in capsys.readouterr().out
    assert "first" not in page.read_text()
    run("--from", str(saved), "--write")
    assert "stopped before its end" in page.read_text()
    assert "| first | 1 s |" in page.read_text()
    assert "second" not in page.read_text()
    run("--json", str(saved), "--write")
    assert "stopped" not in page.read_text()
    assert "| second | 2 s |" in page.read_text()
    for content in ('{"name": "encode", "rows": []}', "[]", "no JSON"):
        saved.write_text(content)
        with pytest.raises(SystemExit) as refused:
            run("--from", str(saved), "--write")
        assert refused.value.code == 2
        assert "is no JSON of benchmarks.reads" in capsys.readouterr().err
    assert "| second | 2 s |" in page.read_text()


def test_figures_go_between_their_own_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    others = f"<!-- computed by benchmarks.other -->\nkept\n{END}"
    page.write_text(f"{others}\n{BEGIN}\nold\n{END}\nafter {END}\n")
    for _ in range(2):
        put(page, "reads", "new")
        assert page.read_text() == f"{others}\n{BEGIN}\n\nnew\n\n{END}\nafter {END}\n"
    page.write_text(END)
    with pytest.raises(BadInput, match="lacks the lines"):
        put(page, "reads", "new")
    assert page.read_text() == END


@pytest.mark.parametrize("page", [MEASUREMENTS, DOCS / "capacity.md"])
def test_every_mark_of_the_docs_is_a_benchmark_and_closed(page: Path) -> None:
    parts = page.read_text().split("<!-- computed by benchmarks.")[1:]
    assert parts
    for part in parts:
        name, _, rest = part.partition(" -->")
        assert (Path(__file__).parents[2] / "benchmarks" / f"{name}.py").is_file()
        assert END in rest
