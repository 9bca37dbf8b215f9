"""Raw log to lake: read, check, turn text into atoms, derive timelines and statistics. All or nothing.

Every check runs on temporary tables before the first write, so a bad log leaves no trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from bahe_core.errors import BadInput, one_line
from bahe_core.home import Home
from bahe_core.progress import say
from materialize import derive, runs
from materialize.dataset import (
    ClickRule,
    Dataset,
    Table,
    context_column,
    load_dataset,
    save_dataset,
)
from materialize.lake import columns, commit, lake, name, quoted, scalar, tables

JOB = "ingest"
REQUIRED = {
    "behaviors": ("user_id", "channel", "text", "event_timestamp"),
    "impressions": ("impression_id", "user_id", "item_id", "event_timestamp", "clicked"),
    "items": ("item_id", "text", "event_timestamp"),
    "users": ("user_id", "event_timestamp"),
}
IDS = ("impression_id", "user_id", "item_id")
_FRACTIONS = ("DOUBLE", "FLOAT", "DECIMAL")
_NO_CATEGORY = ("STRUCT", "MAP", "UNION", "BLOB")
_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}

# Equal texts must give equal atoms for ever, so the hash is MD5 of text normalised here, not DuckDB's
# own hash, which may change between versions. UBIGINT is shifted into Feast's signed Int64.
NORMAL_TEXT = r"nfc_normalize(trim(regexp_replace({text}, '\s+', ' ', 'g')))"
ATOM_ID = "(md5_number_lower({channel} || chr(31) || {text})::HUGEINT - 9223372036854775808)::BIGINT"


@dataclass(frozen=True)
class Ingested:
    """What a run of `ingest` did."""

    skipped: bool
    """True when the sources are those of the last run."""
    added: dict[str, int]
    """Rows added, by table."""
    totals: dict[str, int]
    """Rows now in the lake, by table."""
    duplicates: dict[str, int]
    """Rows of the sources that came twice and were left out, by table."""


def ingest(home: Home, dataset_path: Path) -> Ingested:
    """Read the dataset into the lake; does nothing when neither files nor dataset.yaml changed.

    Raises BadInput on a source that cannot be read or breaks the contract; nothing is written then.
    """
    started = datetime.now(UTC)
    dataset = load_dataset(dataset_path)
    folder = dataset_path.resolve().parent
    with home.exclusive():
        check_same_dataset(home, dataset, dataset_path)
        with lake(home, create=True) as connection:
            fingerprint = _fingerprint(dataset, folder)
            last = runs.last(connection, JOB)
            if last is not None and last.fingerprint == fingerprint:
                save_dataset(dataset, home.root / "dataset.yaml")  # model settings may have changed
                return Ingested(True, {}, _totals(connection), {})
            connection.execute(f"SET file_search_path = {quoted(str(folder))}")
            sections: dict[str, Table] = {
                "behaviors": dataset.behaviors,
                "impressions": dataset.impressions,
                "items": dataset.items,
            }
            if dataset.users is not None:
                sections["users"] = dataset.users
            for table, section in sections.items():
                say(f"  reading {table}")
                context = dataset.impressions.context if table == "impressions" else ()
                _read(connection, table, section, context)
            _check(connection, dataset, users="users" in sections)
            _check_ids_match_lake(connection, list(sections))
            say("  writing atoms, timelines and statistics")
            before = _totals(connection)
            with runs.record(connection, JOB, fingerprint, started=started) as run:
                statements = _write(connection, list(sections), dataset.impressions.context)
                statements += derive.statements(dataset.channels)
                facts = {"dataset": dataset.name, "source": str(dataset_path.resolve())}
                read = sum(scalar(connection, f"SELECT count(*) FROM raw_{table}") for table in sections)
                statements.append(run.statement(facts, rows_read=read))
                commit(connection, statements)
            duplicates = _duplicates(connection, list(sections))
            totals = _totals(connection)
        save_dataset(dataset, home.root / "dataset.yaml")
    added = {table: count - before.get(table, 0) for table, count in totals.items()}
    return Ingested(False, added, totals, duplicates)


def home_dataset(home: Home) -> Dataset:
    """The dataset that the home was filled from. Raises NotReady before the first ingest."""
    from bahe_core.errors import NotReady

    path = home.root / "dataset.yaml"
    if not path.is_file():
        raise NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")
    return load_dataset(path)


def check_same_dataset(home: Home, dataset: Dataset, path: Path) -> None:
    """Refuse to mix two datasets, or two sets of channels, in one home."""
    known = home.root / "dataset.yaml"
    if not known.is_file():
        return
    held = load_dataset(known)
    if held.name != dataset.name:
        raise BadInput(
            f"{path}: dataset {dataset.name} cannot enter {home.root}, which holds {held.name};"
            " give it a --home of its own."
        )
    if held.channels != dataset.channels:
        raise BadInput(
            f"{path}: `channels` is {dataset.channels}, but {home.root} was filled with"
            f" {held.channels}; use a new --home to change channels."
        )


def _fingerprint(dataset: Dataset, folder: Path) -> str:
    """Of what ingest reads: dataset.yaml's tables and channels, and the files' sizes and times.

    A query's files are not known, so everything beside dataset.yaml counts for a query.
    """
    facts: list[object] = [dataset.name, dataset.channels, derive.VERSION]
    for table in (dataset.behaviors, dataset.impressions, dataset.items, dataset.users):
        if table is None:
            continue
        facts.append(table.model_dump(mode="json", exclude={"context"}))
        paths = folder.glob("*") if table.files is None else _expand(folder, table.files)
        for path in sorted(paths):
            if path.is_file() and path.suffix not in (".yaml", ".yml"):
                stat = path.stat()
                facts.append([path.name, stat.st_size, stat.st_mtime_ns])
    if dataset.impressions.context:  # a log without is what it was before there was context
        facts.append(dataset.impressions.context)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _expand(folder: Path, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_absolute():
        return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return sorted(folder.glob(pattern))


def _source(table: str, section: Table, folder: Path) -> str:
    if section.sql is not None:
        return f"({section.sql.rstrip().rstrip(';')})"
    assert section.files is not None
    found = _expand(folder, section.files)
    if not found:
        raise BadInput(f"{table}.files: nothing matches {section.files} in {folder}; correct it.")
    listed = "[" + ", ".join(quoted(str(path)) for path in found) + "]"
    suffix = found[0].name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if suffix == "parquet":
        return f"read_parquet({listed}, union_by_name = true)"
    if suffix in ("csv", "tsv", "txt"):
        return f"read_csv({listed}, union_by_name = true)"
    raise BadInput(f"{table}.files: {found[0].name} is neither CSV nor Parquet; convert it.")


def _read(
    connection: duckdb.DuckDBPyConnection, table: str, section: Table, context: Sequence[str] = ()
) -> None:
    """Fill the temporary table `raw_<table>` with bahe's column names, types and row numbers.

    Columns of `context` become text under a name of their own.
    """
    setting = connection.execute("SELECT current_setting('file_search_path')").fetchone()
    assert setting is not None
    source = _source(table, section, Path(setting[0]))
    what = section.files or f"{table}.sql"
    try:
        found = columns(connection, source)
    except duckdb.Error as error:
        raise BadInput(f"{table}: {what} cannot be read: {one_line(error)}.") from None
    mapping = dict(section.columns)
    if table == "behaviors" and section.channel is not None:
        if "channel" in mapping:
            raise BadInput("behaviors: give `channel` or `columns.channel`, not both.")
    else:
        section = section.model_copy(update={"channel": None})
    selected: dict[str, str] = {}
    used: set[str] = set()
    required = {_source_column(mapping.get(target, target)): target for target in REQUIRED[table]}
    for target in dict.fromkeys((*REQUIRED[table], *mapping, *context)):
        if target == "channel" and section.channel is not None:
            selected[target] = quoted(section.channel)
            continue
        rule = mapping.get(target, target)
        column = _source_column(rule)
        if target in context and column in required:
            raise BadInput(
                f"{table}.context: {column} of {what} is already read as {required[column]}; take"
                f" {target} out of the list."
            )
        if column not in found:
            also = f", or take {target} out of {table}.context" if target in context else ""
            raise BadInput(
                f"{table}: {what} has no column {column} (for {target}); it has"
                f" {', '.join(found)}; map it under {table}.columns{also}."
            )
        used.add(column)
        expression = _expression(table, target, rule, found[column], section)
        if target in context:
            selected[context_column(target)] = _category(what, column, expression, found[column])
        else:
            selected[target] = expression
    optional = [c for c in found if c not in used and c not in selected]
    if table == "behaviors":
        optional = [c for c in optional if c == "item_id"]
    for column in optional:
        ids = column in IDS
        selected[column] = _id(name(column), found[column]) if ids else name(column)
    if table == "behaviors":
        selected.setdefault("item_id", "NULL")
    projection = ", ".join(f"{expression} AS {name(c)}" for c, expression in selected.items())
    raw_time = mapping.get("event_timestamp", "event_timestamp")
    assert isinstance(raw_time, str)
    try:
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE raw_{table} AS SELECT {projection},"
            f" row_number() OVER () AS _row, {name(raw_time)}::VARCHAR AS _time FROM {source}"
        )
    except duckdb.Error as error:
        raise BadInput(f"{table}: {what} cannot be read: {one_line(error)}.") from None


def _source_column(rule: str | ClickRule) -> str:
    return rule.column if isinstance(rule, ClickRule) else rule


def _category(what: str, column: str, expression: str, kind: str) -> str:
    """A context column as text, numbers as `bahe_models.context` writes those of a request."""
    if kind.endswith("]") or kind.startswith(_NO_CATEGORY):
        raise BadInput(
            f"impressions.context: {column} of {what} is {kind}; context is text, numbers or booleans, so"
            " convert it or take it out of the list."
        )
    if not kind.startswith(_FRACTIONS):
        return f"{expression}::VARCHAR"
    # A column of integers with gaps often comes as DOUBLE.
    number = f"{expression}::DOUBLE"
    whole = f"{number} = trunc({number}) AND abs({number}) < 1e16"
    shown = number if kind.startswith("DECIMAL") else expression  # 0.50 is 0.5
    return (
        f"CASE WHEN isnan({number}) THEN NULL WHEN {whole} THEN {number}::BIGINT::VARCHAR"
        f" ELSE {shown}::VARCHAR END"
    )


def _expression(table: str, target: str, rule: str | ClickRule, kind: str, section: Table) -> str:
    column = name(rule.column if isinstance(rule, ClickRule) else rule)
    if isinstance(rule, ClickRule):
        if target != "clicked":
            raise BadInput(f"{table}.columns.{target}: `at_least` is for `clicked` only.")
        number = f"TRY_CAST({column} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN ({number} >= {rule.at_least})::INTEGER END"
    if target == "event_timestamp":
        if kind in _INTEGERS or kind in ("DOUBLE", "FLOAT", "HUGEINT") or kind.startswith("DECIMAL"):
            micros = {"s": 1_000_000, "ms": 1_000, "us": 1}[section.timestamp_unit]
            return f"make_timestamptz(TRY_CAST({column} * {micros} AS BIGINT))"
        return f"TRY_CAST({column} AS TIMESTAMPTZ)"
    if target in IDS:
        return _id(column, kind)
    if target == "clicked":
        # Whatever is not exactly 0 or 1 becomes NULL here and is reported with its row.
        number = f"TRY_CAST({column} AS DOUBLE)"
        return f"CASE WHEN {number} IN (0, 1) THEN {number}::INTEGER END"
    if target in ("text", "channel"):
        return f"{column}::VARCHAR"
    return column


def _id(column: str, kind: str) -> str:
    """Ids are integers or strings; anything else is taken as a string."""
    return f"{column}::BIGINT" if kind in _INTEGERS else f"{column}::VARCHAR"


def _check(connection: duckdb.DuckDBPyConnection, dataset: Dataset, *, users: bool) -> None:
    """The contract, one sentence for the first row that breaks it."""
    for table in ("behaviors", "impressions", "items", *(["users"] if users else [])):
        raw = f"raw_{table}"
        if table != "behaviors" and not scalar(connection, f"SELECT count(*) FROM {raw}"):
            raise BadInput(f"{table}: the source has no rows; check its path or query.")
        for column in REQUIRED[table]:
            if column == "event_timestamp":
                problem = "event_timestamp {_time} is not a time; use ISO 8601 or seconds since 1970"
            elif column == "clicked":
                problem = "clicked is missing or not 0 or 1; correct it, or map it with `at_least`"
            elif column == "text":
                problem = "text is missing; every row needs words"
            else:
                problem = f"{column} is missing"
            blank = f" OR trim({column}) = ''" if column in ("text", "channel") else ""
            _refuse(connection, table, f"{column} IS NULL{blank}", problem)
        ids = {"impressions": "impression_id", "items": "item_id", "users": "user_id"}.get(table)
        if ids in ("impression_id", "item_id"):
            # A row that comes twice is one row; two different rows under one id are an error.
            rest = ", ".join(name(c) for c in columns(connection, raw) if c not in (ids, "_row", "_time"))
            again = (
                f"{ids} IN (SELECT {ids} FROM raw_{table} GROUP BY {ids}"
                f" HAVING count(DISTINCT ({rest})) > 1)"
            )
            _refuse(connection, table, again, f"{ids} {{{ids}}} stands for two different rows")
    listed = ", ".join(quoted(channel) for channel in dataset.channels)
    _refuse(
        connection,
        "behaviors",
        f"channel NOT IN ({listed})",
        f"channel {{channel}} is not one of `channels` {dataset.channels}; add it or map it",
    )
    kinds = {t: columns(connection, f"raw_{t}") for t in ("behaviors", "impressions", "items")}
    for column, left, right in (
        ("user_id", "impressions", "behaviors"),
        ("item_id", "impressions", "items"),
    ):
        if kinds[left][column] != kinds[right][column]:
            raise BadInput(
                f"{left}.{column} is {kinds[left][column]} but {right}.{column} is"
                f" {kinds[right][column]}; make them one type."
            )
    _refuse(
        connection,
        "impressions",
        "item_id NOT IN (SELECT item_id FROM raw_items)",
        "item_id {item_id} is not in items; add it there with a text",
    )
    classes = scalar(connection, "SELECT count(DISTINCT clicked) FROM raw_impressions")
    if classes < 2:
        raise BadInput("impressions: clicked is the same in every row; both 0 and 1 are needed.")


def _refuse(connection: duckdb.DuckDBPyConnection, table: str, condition: str, problem: str) -> None:
    found = connection.execute(
        f"SELECT *, count(*) OVER () AS _count FROM raw_{table} WHERE {condition} ORDER BY _row LIMIT 1"
    )
    row = found.fetchone()
    if row is None:
        return
    assert found.description is not None
    values = {column[0]: value for column, value in zip(found.description, row, strict=True)}
    more = f" ({values['_count']} such rows)" if values["_count"] > 1 else ""
    raise BadInput(f"{table}, row {values['_row']}: {problem.format_map(values)}{more}.")


def _check_ids_match_lake(connection: duckdb.DuckDBPyConnection, sections: list[str]) -> None:
    existing = tables(connection)
    for table in sections:
        if table not in existing:
            continue
        old, new = columns(connection, table), columns(connection, f"raw_{table}")
        for column in IDS:
            if column in old and column in new and old[column] != new[column]:
                if table == "behaviors" and column == "item_id":
                    continue  # a log without item ids carries an untyped NULL
                raise BadInput(
                    f"{table}: {column} is {new[column]}, but the lake holds {old[column]};"
                    " keep one type of id."
                )


def _write(connection: duckdb.DuckDBPyConnection, sections: list[str], context: Sequence[str]) -> list[str]:
    """Statements that add what the lake does not have yet; created on first use."""
    item_id = columns(connection, "raw_items")["item_id"]
    text = NORMAL_TEXT.format(text="text")
    prepared = {
        "behaviors": (
            f"SELECT user_id, channel, {ATOM_ID.format(channel='channel', text=text)} AS atom_id,"
            f" event_timestamp, item_id::{item_id} AS item_id, {text} AS text FROM raw_behaviors",
            ("user_id", "channel", "atom_id", "event_timestamp"),
        ),
        "impressions": ("SELECT * EXCLUDE (_row, _time) FROM raw_impressions", ("impression_id",)),
        "items": (
            f"SELECT * EXCLUDE (_row, _time, text), {text} AS text,"
            f" {ATOM_ID.format(channel=quoted('item'), text=text)} AS atom_id FROM raw_items",
            ("item_id",),
        ),
        "users": (
            "SELECT * EXCLUDE (_row, _time) FROM raw_users",
            ("user_id", "event_timestamp"),
        ),
    }
    statements: list[str] = []
    existing = tables(connection)
    for table in sections:
        query, key = prepared[table]
        listed = ", ".join(key)
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE new_{table} AS"
            f" SELECT DISTINCT ON ({listed}) * FROM ({query}) ORDER BY ALL"
        )
        kept = "* EXCLUDE (text)" if table == "behaviors" else "*"
        if table not in existing:
            statements.append(f"CREATE TABLE {table} AS SELECT {kept} FROM new_{table} LIMIT 0")
        elif table == "impressions":
            statements += _widen(connection, context)
        statements.append(
            f"INSERT INTO {table} BY NAME SELECT {kept} FROM new_{table} ANTI JOIN {table} USING ({listed})"
        )
    if "atoms" not in existing:
        statements.append(
            "CREATE TABLE atoms (atom_id BIGINT, channel VARCHAR, text VARCHAR, first_seen TIMESTAMPTZ)"
        )
    statements += _output_tables(connection)
    statements.append(
        "INSERT INTO atoms SELECT atom_id, channel, text, min(event_timestamp) FROM ("
        " SELECT atom_id, channel, text, event_timestamp FROM new_behaviors UNION ALL"
        " SELECT atom_id, 'item', text, event_timestamp FROM new_items"
        ") ANTI JOIN atoms USING (atom_id) GROUP BY ALL ORDER BY atom_id"
    )
    return statements


def _widen(connection: duckdb.DuckDBPyConnection, context: Sequence[str]) -> list[str]:
    """Statements for a log whose impressions are described by more columns than before.

    Impressions that the lake already has get the context that it lacks of them.
    """
    held, new = columns(connection, "impressions"), columns(connection, "new_impressions")
    statements = [
        f"ALTER TABLE impressions ADD COLUMN {name(column)} {kind}"
        for column, kind in new.items()
        if column not in held
    ]
    for column in (name(context_column(c)) for c in context):
        statements.append(
            f"UPDATE impressions SET {column} = n.{column} FROM new_impressions n WHERE"
            f" impressions.impression_id = n.impression_id AND impressions.{column} IS NULL"
            f" AND n.{column} IS NOT NULL"
        )
    return statements


def _output_tables(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Tables that later jobs fill; there from the start so that Feast can register their views."""
    user = columns(connection, "raw_impressions")["user_id"]
    item = columns(connection, "raw_items")["item_id"]
    stamps = "event_timestamp TIMESTAMPTZ, created_timestamp TIMESTAMPTZ"
    layouts = {
        "atomic_behavior_embedding": "atom_id BIGINT, encoder_version VARCHAR, embedding FLOAT[]",
        "user_embedding": (
            f"user_id {user}, model_version VARCHAR, embedding FLOAT[], behaviors BIGINT,"
            " seen_items VARCHAR[]"
        ),
        "item_embedding": f"item_id {item}, model_version VARCHAR, embedding FLOAT[]",
        "publications": "deployment VARCHAR, live_model_version VARCHAR",
    }
    return [f"CREATE TABLE IF NOT EXISTS {table} ({layout}, {stamps})" for table, layout in layouts.items()]


def _duplicates(connection: duckdb.DuckDBPyConnection, sections: list[str]) -> dict[str, int]:
    count = {
        table: scalar(connection, f"SELECT (SELECT count(*) FROM raw_{table}) - count(*) FROM new_{table}")
        for table in sections
    }
    return {table: rows for table, rows in count.items() if rows}


def _totals(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    known = tables(connection)
    wanted = ("behaviors", "impressions", "items", "users", "atoms")
    return {t: scalar(connection, f"SELECT count(*) FROM {t}") for t in wanted if t in known}


def is_current(connection: duckdb.DuckDBPyConnection, path: Path) -> bool:
    """Whether the last ingest read this dataset.yaml's sources as they are now. Raises BadInput."""
    last = runs.last(connection, JOB)
    dataset = load_dataset(path)
    return last is not None and last.fingerprint == _fingerprint(dataset, path.resolve().parent)
