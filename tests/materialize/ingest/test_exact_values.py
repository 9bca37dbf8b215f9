"""Every value of the lake is the one that the file says, or its row is in the quarantine."""

from __future__ import annotations

import csv
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.ingest.ingest import ingest
from tests.support.written_values import (
    REFUSED,
    Cell,
    blanks,
    clicks,
    csv_bytes,
    times,
    users,
    words,
)

Row = dict[str, Cell]
SLOW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
FAST = settings(
    max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)

CHANNELS = (
    Cell("liked", "liked"),
    Cell("liked", "liked"),
    Cell(" liked", REFUSED),
    Cell("Liked", REFUSED),
    Cell("\u200b", REFUSED),
)
texts = st.one_of(words.map(lambda text: Cell(text, text)), blanks.map(lambda text: Cell(text, REFUSED)))
ROWS = 250
"""Of each table in an ingest, which takes a second whatever it reads."""


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Impressions and behaviors whose cells are drawn from few, which are combined at random."""
    random = draw(st.randoms(use_true_random=False))
    pools = {
        "user_id": draw(st.lists(users(), min_size=10, max_size=20)),
        "event_timestamp": draw(st.lists(times, min_size=15, max_size=30)),
        "clicked": draw(st.lists(clicks, min_size=4, max_size=9)),
        "channel": list(CHANNELS),
        "text": draw(st.lists(texts, min_size=5, max_size=10)),
    }
    made = [{column: random.choice(pools[column]) for column in pools} for _ in range(2 * ROWS)]
    shown = [{c: row[c] for c in ("user_id", "event_timestamp", "clicked")} for row in made[:ROWS]]
    done = [{c: row[c] for c in ("user_id", "event_timestamp", "channel", "text")} for row in made[ROWS:]]
    return shown, done


@dataclass(frozen=True)
class Layout:
    """How a table is written."""

    kind: str
    encoding: str
    delimiter: str
    line_end: str
    files: int


layouts = st.builds(
    Layout,
    kind=st.sampled_from(["csv", "csv", "parquet"]),
    encoding=st.sampled_from(["utf-8", "utf-16"]),
    delimiter=st.sampled_from([",", ";", "|"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    files=st.integers(1, 3),
)


def write(folder: Path, table: str, rows: list[Row], layout: Layout) -> dict[str, Any]:
    """The rows, with their number as `number`, in some files; returns the table's section."""
    folder.mkdir(parents=True, exist_ok=True)
    header = ["number", *rows[0]]
    lines = [[f"n{number}", *(cell.written for cell in row.values())] for number, row in enumerate(rows)]
    for index in range(layout.files):
        part = lines[index :: layout.files]
        name = f"{table}-{(index * 7) % 5}"
        if layout.kind == "parquet":
            columns = [list(column) for column in zip(*part, strict=True)] or [[] for _ in header]
            pq.write_table(pa.table(dict(zip(header, columns, strict=True))), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.csv").write_bytes(
                csv_bytes(
                    header,
                    part,
                    encoding=layout.encoding,
                    delimiter=layout.delimiter,
                    line_end=layout.line_end,
                    quoting=csv.QUOTE_ALL,
                )
            )
    section: dict[str, Any] = {"files": f"{table}-*.{layout.kind}"}
    if layout.kind == "csv":
        section["csv"] = {"encoding": layout.encoding, "delimiter": layout.delimiter}
    return section


def lake_equals_the_files(shown: list[Row], done: list[Row], layout: Layout) -> None:
    anchors = [
        {"user_id": Cell("u", "u"), "event_timestamp": Cell("1990-01-01", datetime(1990, 1, 1, tzinfo=UTC))}
        | {"clicked": Cell(str(label), label)}
        for label in (0, 1)
    ]
    shown = [*anchors, *shown]
    done = [anchors[0] | {"channel": Cell("liked", "liked"), "text": Cell("x", "x")}, *done]
    done[0].pop("clicked")
    folder = Path(tempfile.mkdtemp())
    try:
        home = Home.at(folder / "home")
        sections = {
            "impressions": write(
                folder, "impressions", [row | {"item_id": Cell("i", "i")} for row in shown], layout
            ),
            "behaviors": write(folder, "behaviors", done, layout),
        }
        sections["impressions"]["columns"] = {"impression_id": "number"}
        sections["behaviors"]["columns"] = {"item_id": "number"}
        pq.write_table(
            pa.table({"item_id": ["i"], "text": ["an item"], "event_timestamp": [datetime(1980, 1, 2)]}),
            folder / "items.parquet",
        )
        spec = {
            "name": "log",
            "channels": ["liked"],
            "items": {"files": "items.parquet"},
            "quarantine": {"max_share": 0.999},
            **sections,
        }
        (folder / "dataset.yaml").write_text(yaml.safe_dump(spec))
        ingest(home, folder / "dataset.yaml")  # and its gate refuses nothing that was let in
        with lake(home) as connection:
            of_impressions = connection.execute(
                "SELECT impression_id, user_id, event_timestamp, clicked FROM impressions"
            ).fetchall()
            of_behaviors = connection.execute(
                "SELECT item_id, user_id, b.event_timestamp, b.channel, a.text FROM behaviors b"
                " JOIN atoms a USING (atom_id)"
            ).fetchall()
            aside = connection.execute(
                "SELECT table_name, row->>'number', reason FROM quarantine"
            ).fetchall()
    finally:
        shutil.rmtree(folder)
    held = {(table, number) for table, number, _ in aside}
    assert all(reason for _, _, reason in aside)
    in_lake = {number: values for number, *values in of_impressions}
    for number, row in enumerate(shown):
        name, values = f"n{number}", [cell.value for cell in row.values()]
        if any(value is REFUSED for value in values):
            assert name not in in_lake, row
            assert ("impressions", name) in held, row
        else:
            assert in_lake[name] == values, row
    there = {number: values for number, *values in of_behaviors}
    for number, row in enumerate(done):
        name, values = f"n{number}", [cell.value for cell in row.values()]
        if any(value is REFUSED for value in values):
            assert name not in there, row
            assert ("behaviors", name) in held, row
        elif name in there:  # of two equal behaviors the lake keeps one
            assert there[name][:3] == values[:3], row


@FAST
@given(tables(), layouts)
def test_every_value_is_as_written_or_its_row_is_set_aside(
    log: tuple[list[Row], list[Row]], layout: Layout
) -> None:
    lake_equals_the_files(*log, layout)


@pytest.mark.slow
@SLOW
@given(tables(), layouts)
def test_ten_thousand_rows_are_as_written(log: tuple[list[Row], list[Row]], layout: Layout) -> None:
    lake_equals_the_files(*log, layout)
