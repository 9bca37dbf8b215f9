"""The new files of a log, read into temporary tables in which every row keeps the contract.

What breaks it is held for the quarantine. Nothing here writes to the lake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.progress import say
from bahe_lake.blank import blank
from bahe_lake.catalogue import scalar, tables
from bahe_lake.connection import damaged_files_named
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.dataset import Dataset, Table
from materialize.ingest import quarantine, values
from materialize.ingest.atoms import ATOM_ID, NORMAL_TEXT
from materialize.ingest.column_types import ColumnTypes, column_types
from materialize.ingest.conflicts import rules_of_many
from materialize.ingest.contract import Projection, broken, project
from materialize.ingest.layouts import Layout, check_nanoseconds, layouts, unreadable
from materialize.ingest.sources import File, Source
from validation.suites import CLOCK_TOLERANCE


@dataclass(frozen=True)
class Read:
    """Rows in the temporary table `raw_<table>`, all of which keep the contract; without rows, no table."""

    source: Source
    files: list[File]
    rows: int
    """Rows of the source, those that were set aside included."""
    quarantined: int = 0
    broken: int = 0
    """Rows that were set aside and count towards the share that is too much."""


def read_new(
    home: Home, connection: duckdb.DuckDBPyConnection, dataset: Dataset, sources: Mapping[str, Source]
) -> dict[str, Read]:
    """Read the files that are new, or hold rows that may enter only now."""
    values.prepare(connection)
    quarantine.prepare(connection)
    latest = datetime.now(UTC) + CLOCK_TOLERANCE
    sections: dict[str, Table] = {table: source.section for table, source in sources.items()}
    # Columns first, of every table, so that a wrong one is found before much has been read.
    opened: dict[str, list[Layout]] = {}
    for table, source in sources.items():
        values.check_timestamp_format(connection, table, source.section)
        if source.unread:
            opened[table] = layouts(connection, source, source.unread)
            for layout in opened[table]:
                check_nanoseconds(layout)
    types = column_types(connection, sections, opened)
    by_table = {table: projections(dataset, table, opened[table], types, latest) for table in opened}
    reads: dict[str, Read] = {}
    for table, source in sources.items():
        again = quarantine.released(connection, table, latest, new_items=_has_rows(reads, "items"))
        files = [f for f in source.files if f in source.unread or f.path in again]
        if not files:
            continue
        if len(files) > len(source.unread):
            opened[table] = layouts(connection, source, files)
            types = column_types(connection, sections, opened)
            by_table[table] = projections(dataset, table, opened[table], types, latest)
        many = f" ({len(files)} of {len(source.files)} files)" if len(source.files) > 1 else ""
        say(f"  reading {table}{many}")
        try:
            with damaged_files_named(home):
                reads[table] = _read(
                    connection,
                    dataset,
                    source,
                    files,
                    by_table[table],
                    new_items=_has_rows(reads, "items"),
                )
        except duckdb.Error as error:
            raise unreadable(connection, source, files, error) from None
    return reads


def _has_rows(reads: Mapping[str, Read], table: str) -> bool:
    return table in reads and reads[table].rows > 0


def projections(
    dataset: Dataset, table: str, of_table: Sequence[Layout], types: ColumnTypes, latest: datetime
) -> list[tuple[Layout, Projection]]:
    """How each layout becomes the table; those without rows are left out."""
    context = dataset.impressions.context if table == "impressions" else ()
    all_columns = {column for layout in of_table for column in layout.columns}

    def of(layout: Layout) -> Projection:
        return project(
            table,
            layout,
            types,
            others=all_columns,
            context=context,
            channels=dataset.channels,
            latest=latest,
        )

    return [(layout, of(layout)) for layout in of_table if not layout.empty]


def _read(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    source: Source,
    files: list[File],
    parts: Sequence[tuple[Layout, Projection]],
    *,
    new_items: bool,
) -> Read:
    """Fill `raw_<table>` with the rows that keep the contract, and hold the others."""
    table = source.table
    raw = f"raw_{table}"
    rows = 0
    if parts:
        if table == "behaviors":
            _read_behaviors(connection, _judged(parts), dataset.channels)
        else:
            _read_others(connection, table, _judged(parts))
        rows = scalar(connection, f"SELECT count(*) FROM {raw}")
    if not rows:
        if table not in tables(connection):
            raise BadInput(f"{table}: the source has no rows; check its path or query.")
        return Read(source, files, 0)
    rules = rules_of_many(
        connection, table, new_items=new_items, click_times=dataset.impressions.click_times
    )
    breaks = f"_bad OR {broken(rules)}"
    bad = scalar(connection, f"SELECT count(*) FROM {raw} AS _row WHERE {breaks}")
    counted = 0
    if bad:
        counting = broken([rule for rule in rules if rule.counts])
        counted = scalar(connection, f"SELECT count(*) FROM {raw} WHERE _bad OR {counting}")
        quarantine.hold(
            connection,
            parts,
            rules,
            count=counted,
            read=rows,
            max_share=dataset.quarantine.max_share,
        )
        connection.execute(f"DELETE FROM {raw} AS _row WHERE {breaks}")
    return Read(source, files, rows, bad, counted)


def _judged(parts: Sequence[tuple[Layout, Projection]]) -> str:
    """SQL of the rows of all layouts, with `_bad` where a row breaks a rule by itself."""
    of_each = []
    for layout, projection in parts:
        listed = ", ".join(map(sql_identifier, projection.columns))
        bad, rows = broken(projection.rules), projection.query(layout.relation)
        of_each.append(f"SELECT {listed}, ({bad}) AS _bad FROM {rows}")
    return f"({' UNION ALL BY NAME '.join(of_each)})"


def _read_others(connection: duckdb.DuckDBPyConnection, table: str, rows: str) -> None:
    if table == "items":
        text = NORMAL_TEXT.format(text="text")
        atom = ATOM_ID.format(channel=sql_literal("item"), text="text")
        rows = f"(SELECT *, {atom} AS atom_id FROM (SELECT * REPLACE ({text} AS text) FROM {rows}))"
    connection.execute(f"CREATE OR REPLACE TEMP TABLE raw_{table} AS SELECT * FROM {rows}")


def _read_behaviors(connection: duckdb.DuckDBPyConnection, rows: str, channels: Sequence[str]) -> None:
    """The source twice: first its distinct texts, which are few and alone become atoms, then its rows."""
    listed = ", ".join(sql_literal(channel) for channel in channels)
    atom, text = ATOM_ID.format(channel="channel", text="normal"), NORMAL_TEXT.format(text="text")
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE raw_texts AS
            SELECT *, {atom} AS atom_id
            FROM (SELECT channel, text, {text} AS normal
                  FROM (SELECT DISTINCT channel, text FROM {rows} WHERE channel IN ({listed}))
                  WHERE NOT {blank("text")})"""
    )
    # An ENUM is a byte instead of a string in each of many rows.
    connection.execute(
        f"""CREATE OR REPLACE TEMP TABLE raw_behaviors AS
            SELECT user_id, TRY_CAST(channel AS ENUM ({listed})) AS channel, atom_id, event_timestamp,
                item_id, _bad
            FROM {rows} LEFT JOIN raw_texts USING (channel, text)"""
    )
    if scalar(connection, "SELECT count(*) FROM raw_behaviors WHERE NOT _bad AND atom_id IS NULL"):
        raise BadInput("behaviors: the source changed while it was read; run `bahe ingest` again.")


def check_rows(connection: duckdb.DuckDBPyConnection, reads: Mapping[str, Read]) -> None:
    """Raises BadInput when there would be nothing to learn from, which the gate would refuse."""
    parts = ["SELECT clicked FROM raw_impressions"] if _has_rows(reads, "impressions") else []
    parts += ["SELECT clicked FROM impressions"] if "impressions" in tables(connection) else []
    if parts and scalar(connection, f"SELECT count(DISTINCT clicked) FROM ({' UNION '.join(parts)})") < 2:
        raise BadInput("impressions: clicked is the same in every row; both 0 and 1 are needed.")
    for table in ("items", "behaviors"):
        kept = f"SELECT count(*) FROM raw_{table}" if _has_rows(reads, table) else None
        if table not in tables(connection) and (kept is None or not scalar(connection, kept)):
            raise BadInput(f"{table}: no row keeps the contract; `bahe ingest` shows the first reason.")
