"""A dataset.yaml and its files, looked at without reading a row: what `bahe check` says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import duckdb

from bahe_core.errors import BadInput
from bahe_core.machine import threads
from bahe_core.results import Result
from bahe_lake.catalogue import scalar
from materialize.config.dataset import Dataset, Table, dataset_and_lines
from materialize.config.problems import Place, Problem, line_of, refusal
from materialize.ingest import values
from materialize.ingest.column_types import column_types
from materialize.ingest.layouts import Layout, check_nanoseconds, layouts
from materialize.ingest.reading import projections
from materialize.ingest.sources import Source, find_sources
from validation.suites import CLOCK_TOLERANCE

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Checked(Result):
    """A dataset.yaml in which nothing is wrong, and what an ingest into an empty home would read."""

    dataset: str
    files: dict[str, int]
    """By table; a query counts as one."""
    rows: dict[str, int]
    """By table, before any of them is looked at."""

    @property
    def summary(self) -> list[str]:
        """Rows and files of each table."""
        tables = ", ".join(
            f"{rows:,} {table} in {self.files[table]:,} {'file' if self.files[table] == 1 else 'files'}"
            for table, rows in self.rows.items()
        )
        return [f"{self.dataset} is in order: {tables}"]


def check(path: Path) -> Checked:
    """Look for everything that is wrong with a dataset.yaml, its files and their columns.

    Values are not looked at: that is the ingest's to do, which sets wrong rows aside. Raises BadInput with
    all problems at once, each with its line.
    """
    dataset, lines = dataset_and_lines(path)
    problems: list[Problem] = []

    def attempt(place: Place, step: Callable[[], Found]) -> Found | None:
        try:
            return step()
        except BadInput as error:
            sentence = str(error).removesuffix(".")
            problems.append(Problem(line=line_of(place, lines), sentence=sentence))
            return None

    if dataset.feature_repo is not None:
        attempt(("feature_repo",), partial(_definitions, Path(dataset.feature_repo)))
    with (
        tempfile.TemporaryDirectory(prefix="bahe-check-") as temporary,
        duckdb.connect(config={"threads": threads(), "temp_directory": temporary}) as connection,
    ):
        folder = path.resolve().parent
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET file_search_path = ?", [str(folder)])
        values.prepare(connection)
        opened: dict[str, list[Layout]] = {}
        sources: dict[str, Source] = {}
        for table, section in dataset.sections.items():
            place: Place = (table, "sql" if section.files is None else "files")
            found = attempt(place, lambda t=table, s=section: _open(connection, t, s, folder))  # type: ignore[misc]
            if found is not None:
                sources[table], opened[table] = found
        if not problems:
            _columns(connection, dataset, opened, attempt)
        if problems:
            raise refusal(path, problems)
        rows = {
            table: sum(scalar(connection, f"SELECT count(*) FROM {layout.relation}") for layout in of_table)
            for table, of_table in opened.items()
        }
    return Checked(
        dataset=dataset.name,
        files={table: len(source.files) for table, source in sources.items()},
        rows=rows,
    )


def _definitions(folder: Path) -> None:
    """The team's definitions can be read. Feast is imported only where there are some."""
    from feature_repo.team import team_objects

    team_objects(folder)


def _open(
    connection: duckdb.DuckDBPyConnection, table: str, section: Table, folder: Path
) -> tuple[Source, list[Layout]]:
    source = find_sources(connection, {table: section}, folder)[table]
    values.check_timestamp_format(connection, table, section)
    of_table = layouts(connection, source, source.files)
    for layout in of_table:
        check_nanoseconds(layout)
    return source, of_table


def _columns(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    opened: dict[str, list[Layout]],
    attempt: Callable[[Place, Callable[[], object]], object],
) -> None:
    """Every column that is read must be there, and keys must have one type over all tables."""
    latest = datetime.now(UTC) + CLOCK_TOLERANCE
    types = attempt((), lambda: column_types(connection, dataset.sections, opened))
    if types is None:
        return
    for table, of_table in opened.items():
        attempt(
            (table, "columns"),
            lambda t=table, o=of_table: projections(dataset, t, o, types, latest),  # type: ignore[misc,arg-type]
        )
