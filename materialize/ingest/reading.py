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
from bahe_lake.catalogue import columns, scalar, tables
from bahe_lake.connection import damaged_files_named
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.dataset import Dataset
from materialize.ingest import quarantine, sources
from materialize.ingest.atoms import ATOM_ID, NORMAL_TEXT
from materialize.ingest.contract import IDS, UNKNOWN_ITEM, Projection, Rule, broken, project
from materialize.ingest.sources import File, Source
from validation.suites import CLOCK_TOLERANCE

TABLES = ("items", "users", "behaviors", "impressions")
"""In the order in which they are read: impressions need the items."""

KEYS = {
    "items": ("item_id",),
    "users": ("user_id", "event_timestamp"),
    "impressions": ("impression_id",),
    "behaviors": ("user_id", "channel", "atom_id", "event_timestamp"),
}

SAME = {"items": ("atom_id",), "impressions": ("user_id", "item_id", "event_timestamp", "clicked")}
"""What two rows of one key must agree in."""


@dataclass(frozen=True)
class Opened:
    """Files of a source whose columns are known to fit."""

    source: Source
    files: list[File]
    projection: Projection
    text_columns: list[str]

    def rows(self, file: File | None = None) -> str:
        """SQL of the source's rows: of all files, or of one."""
        if file is None:
            return sources.relation(self.source, self.files, self.text_columns)
        return sources.of_file(self.source, file, self.files, self.text_columns)


@dataclass(frozen=True)
class Read:
    """Rows in the temporary table `raw_<table>`, all of which keep the contract."""

    opened: Opened
    rows: int
    """Rows of the source, those that were set aside included."""
    quarantined: int
    broken: int
    """Rows that were set aside and count towards the share that is too much."""


def read_new(
    home: Home, connection: duckdb.DuckDBPyConnection, dataset: Dataset, found: Mapping[str, Source]
) -> dict[str, Read]:
    """Read the files that are new, or hold rows that may enter only now."""
    latest = datetime.now(UTC) + CLOCK_TOLERANCE
    # Columns first, of every table, so that a wrong one is found before much has been read.
    opened = {
        table: _open(connection, dataset, source, list(source.unread), latest)
        for table, source in found.items()
        if source.unread
    }
    _check_ids(connection, opened)
    quarantine.prepare(connection)
    reads: dict[str, Read] = {}
    for table, source in found.items():
        again = quarantine.released(connection, table, latest, new_items="items" in reads)
        files = [f for f in source.files if f in source.unread or f.path in again]
        if not files:
            continue
        if table not in opened or len(files) > len(opened[table].files):
            opened[table] = _open(connection, dataset, source, files, latest)
            _check_ids(connection, opened)
        many = f" ({len(files)} of {len(source.files)} files)" if len(source.files) > 1 else ""
        say(f"  reading {table}{many}")
        try:
            with damaged_files_named(home):
                reads[table] = _read(connection, dataset, opened[table], new_items="items" in reads)
        except duckdb.Error as error:
            raise sources.unreadable(connection, source, error) from None
    return reads


def _open(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    source: Source,
    files: list[File],
    latest: datetime,
) -> Opened:
    """Look at the columns of these files. Raises BadInput when they are not what the table needs."""
    sources.run_query(connection, source)
    table = source.table
    known = tables(connection)
    held = columns(connection, table) if table in known else {}
    text_columns: list[str] = []
    try:
        there = columns(connection, sources.relation(source, files))
        if source.csv:
            # Ids are what the lake has: 007 is not 7 where ids are strings.
            given = {target: source.section.columns.get(target, target) for target in IDS}
            text_columns = [
                column
                for target, column in given.items()
                if isinstance(column, str) and held.get(target) == "VARCHAR" and column in there
            ]
            there = columns(connection, sources.relation(source, files, text_columns))
    except duckdb.Error as error:
        raise sources.unreadable(connection, source, error) from None
    there.pop(sources.FILE, None)
    projection = project(
        table,
        source.section,
        there,
        what=source.what,
        csv=source.csv,
        context=dataset.impressions.context if table == "impressions" else (),
        channels=dataset.channels,
        held=held,
        item_type=columns(connection, "items")["item_id"] if "items" in known else None,
        latest=latest,
    )
    return Opened(source, files, projection, text_columns)


def _check_ids(connection: duckdb.DuckDBPyConnection, opened: Mapping[str, Opened]) -> None:
    """Ids must be of one type in all tables, and in the lake."""
    known = tables(connection)
    held = {table: columns(connection, table) for table in TABLES if table in known}
    new = {table: one.projection.types for table, one in opened.items()}
    for table, types in new.items():
        for column, kind in types.items():
            old = held.get(table, {}).get(column, kind)
            if old != kind and _any_row(connection, opened[table]):
                raise BadInput(
                    f"{table}: {column} is {kind}, but the lake holds {old}; keep one type of id."
                )
    for column, left, right in (
        ("user_id", "impressions", "behaviors"),
        ("item_id", "impressions", "items"),
    ):
        kinds = [new.get(table, held.get(table, {})).get(column) for table in (left, right)]
        if None not in kinds and kinds[0] != kinds[1]:
            empty = [t for t in (left, right) if t in opened and not _any_row(connection, opened[t])]
            if not empty:
                raise BadInput(
                    f"{left}.{column} is {kinds[0]} but {right}.{column} is {kinds[1]}; make them one type."
                )


def _any_row(connection: duckdb.DuckDBPyConnection, opened: Opened) -> bool:
    """A CSV file of a header alone has columns of text, and says nothing about types."""
    return scalar(connection, f"SELECT count(*) FROM (SELECT 1 FROM {opened.rows()} LIMIT 1)") > 0


def _read(
    connection: duckdb.DuckDBPyConnection, dataset: Dataset, opened: Opened, *, new_items: bool
) -> Read:
    """Fill `raw_<table>` with the rows that keep the contract, and hold the others."""
    table, projection = opened.projection.table, opened.projection
    query = projection.query(opened.rows())
    if table == "behaviors":
        _read_behaviors(connection, query, projection, dataset.channels)
    else:
        given = [sql_identifier(column) for column in projection.columns if column != "text"]
        given.append(f"({broken(projection.rules)}) AS _bad")
        made = "*"
        if table == "items":
            given.append(f"{NORMAL_TEXT.format(text='text')} AS text")
            made += f", {ATOM_ID.format(channel=sql_literal('item'), text='text')} AS atom_id"
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE raw_{table} AS"
            f" SELECT {made} FROM (SELECT {', '.join(given)} FROM {query})"
        )
    raw = f"raw_{table}"
    rows = scalar(connection, f"SELECT count(*) FROM {raw}")
    if not rows and table != "behaviors" and table not in tables(connection):
        raise BadInput(f"{table}: the source has no rows; check its path or query.")
    rules = _rules_of_many(connection, table, new_items=new_items)
    breaks = f"_bad OR {broken(rules)}"
    bad = scalar(connection, f"SELECT count(*) FROM {raw} WHERE {breaks}")
    counted = 0
    if bad:
        counting = broken([rule for rule in rules if rule.counts])
        counted = scalar(connection, f"SELECT count(*) FROM {raw} WHERE _bad OR {counting}")
        quarantine.hold(
            connection,
            opened.source,
            opened.files,
            projection,
            [*projection.rules, *rules],
            opened.rows,
            count=counted,
            read=rows,
            max_share=dataset.quarantine.max_share,
        )
        connection.execute(f"DELETE FROM {raw} WHERE {breaks}")
    return Read(opened, rows, bad, counted)


def _read_behaviors(
    connection: duckdb.DuckDBPyConnection, query: str, projection: Projection, channels: Sequence[str]
) -> None:
    """The source twice: first its distinct texts, which are few and alone become atoms, then its rows."""
    listed = ", ".join(sql_literal(channel) for channel in channels)
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE raw_texts AS"
        f" SELECT *, {ATOM_ID.format(channel='channel', text='normal')} AS atom_id FROM ("
        f" SELECT channel, text, {NORMAL_TEXT.format(text='text')} AS normal"
        f" FROM (SELECT DISTINCT channel, text FROM {query}"
        f" WHERE trim(text) <> '' AND channel IN ({listed})))"
    )
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE raw_behaviors AS SELECT user_id,"
        # A byte instead of a string in each of many rows.
        f" TRY_CAST(channel AS ENUM ({listed})) AS channel, atom_id, event_timestamp, item_id, _bad"
        f" FROM (SELECT *, ({broken(projection.rules)}) AS _bad FROM {query})"
        " LEFT JOIN raw_texts USING (channel, text)"
    )
    if scalar(connection, "SELECT count(*) FROM raw_behaviors WHERE NOT _bad AND atom_id IS NULL"):
        raise BadInput("behaviors: the source changed while it was read; run `bahe ingest` again.")


def _rules_of_many(connection: duckdb.DuckDBPyConnection, table: str, *, new_items: bool) -> list[Rule]:
    """Rules that a row breaks because of other rows: of this read, or of the lake."""
    rules: list[Rule] = []
    known = tables(connection)
    if table != "behaviors":
        key, context = (
            KEYS[table],
            [c for c in columns(connection, f"raw_{table}") if c.startswith("context_")],
        )
        same = ", ".join(
            [*SAME.get(table, key), *(map(sql_identifier, context) if table == "impressions" else ())]
        )
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE repeated_{table} AS SELECT {', '.join(key)},"
            f" min(hash({same})) <> max(hash({same})) AS clashes"
            f" FROM raw_{table} WHERE NOT _bad GROUP BY ALL HAVING count(*) > 1"
        )
    if table in SAME:
        (key_column,) = KEYS[table]
        rules.append(
            Rule(
                name=f"{key_column} twice",
                breaks=f"{key_column} IN (SELECT {key_column} FROM repeated_{table} WHERE clashes)",
                value=key_column,
                reason=f"{key_column} {{}} stands for two different rows",
            )
        )
        if table in known:
            differ = " OR ".join(f"n.{c} IS DISTINCT FROM o.{c}" for c in SAME[table])
            connection.execute(
                f"CREATE OR REPLACE TEMP TABLE changed_{table} AS SELECT DISTINCT {key_column}"
                f" FROM (SELECT * FROM raw_{table} WHERE NOT _bad) n JOIN {table} o USING ({key_column})"
                f" WHERE {differ}"
            )
            what = "another text" if table == "items" else "other values"
            rules.append(
                Rule(
                    name=f"{key_column} changed",
                    breaks=f"{key_column} IN (SELECT {key_column} FROM changed_{table})",
                    value=key_column,
                    reason=f"{key_column} {{}} is in the lake already with {what}",
                    counts=False,
                )
            )
    if table == "impressions":
        parts = ["SELECT item_id FROM raw_items"] if new_items else []
        parts += ["SELECT item_id FROM items"] if "items" in known else []
        connection.execute(f"CREATE OR REPLACE TEMP TABLE known_items AS {' UNION '.join(parts)}")
        rules.append(
            Rule(
                name=UNKNOWN_ITEM,
                breaks="item_id NOT IN (SELECT item_id FROM known_items)",
                value="item_id",
                reason="item_id {} is not in items; add it there with a text",
            )
        )
    return rules


def check_clicks(connection: duckdb.DuckDBPyConnection, reads: Mapping[str, Read]) -> None:
    """Raises BadInput when there would be nothing to learn from."""
    parts = ["SELECT clicked FROM raw_impressions"] if "impressions" in reads else []
    parts += ["SELECT clicked FROM impressions"] if "impressions" in tables(connection) else []
    if parts and scalar(connection, f"SELECT count(DISTINCT clicked) FROM ({' UNION '.join(parts)})") < 2:
        raise BadInput("impressions: clicked is the same in every row; both 0 and 1 are needed.")
