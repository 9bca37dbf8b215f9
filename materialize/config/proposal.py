"""A first dataset.yaml for files that nobody has described: `bahe init`. Each guess says its reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import yaml

from bahe_core.errors import BadInput
from bahe_core.machine import threads
from bahe_lake.sql import sql_literal
from materialize.config.log_files import CONTEXT, UNITS, LogFile, look

SCHEMA = Path(__file__).with_name("dataset.schema.json")
TODO = "TODO"
"""Stands where a person has to say it; no column or file is called so, so that `bahe check` finds it."""

_NEEDED = {
    "behaviors": ("user_id", "text", "event_timestamp"),
    "impressions": ("user_id", "item_id", "event_timestamp"),
    "items": ("item_id", "text", "event_timestamp"),
    "users": ("user_id", "event_timestamp"),
}
_CHANNEL = re.compile(r"[a-z][a-z0-9_]*")
_CLICKED, _LIKED, _DISLIKED = "clicked", "liked", "disliked"


@dataclass
class _Proposal:
    """The tables as they are found, and what is said of them."""

    sections: dict[str, list[str]] = field(default_factory=dict)
    """Lines of each table's section."""
    channels: list[str] = field(default_factory=list)
    channels_reason: str = ""


def propose(paths: Sequence[Path], output: Path) -> None:
    """Write a dataset.yaml for these Parquet or CSV files. Raises BadInput where the output exists, or on a
    file that cannot be read; what cannot be guessed is marked TODO in what is written.
    """
    if output.exists():
        raise BadInput(f"{output} exists already and stays as it is; name another with --output.")
    folder = output.resolve().parent
    if not folder.is_dir():
        raise BadInput(f"{folder} does not exist; make it, or name another --output.")
    with duckdb.connect(config={"threads": threads()}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        files = look(connection, paths, folder)
        text = _document(connection, files, folder)
    with output.open("x", encoding="utf-8") as file:
        file.write(text)


def _document(connection: duckdb.DuckDBPyConnection, files: Sequence[LogFile], folder: Path) -> str:
    tables = _tables(files)
    made = _Proposal()
    shown = tables.get("impressions")
    start = _before(connection, shown or tables.get("behaviors"))
    if "behaviors" in tables:
        _behaviors(connection, made, tables["behaviors"])
    else:
        _derived_behaviors(made, shown, tables.get("items"))
    _impressions(made, shown)
    _items(made, tables.get("items"), shown, start)
    if "users" in tables:
        _plain_or_dated(made, "users", tables["users"], start)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.name).strip("-._") or "my-log"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA.as_uri()}",
        f"# Written by `bahe init` from {', '.join(file.pattern for file in files)}.",
        "# Every guess says why; correct what is wrong, then: bahe check, and bahe run.",
        f"name: {_scalar(name)}  # a home folder holds one dataset",
        f"channels: [{', '.join(made.channels)}]  # {made.channels_reason}",
    ]
    used = {file.pattern for file in tables.values()}
    lines += [
        f"# {file.pattern} is not used: none of the tables can be made of its columns ({_names(file)})."
        for file in files
        if file.pattern not in used
    ]
    for table in ("behaviors", "impressions", "items", "users"):
        if table in made.sections:
            lines += ["", f"{table}:", *(f"  {line}" for line in made.sections[table])]
    lines += ["", "freshness: nightly  # how old serving's features are: nightly, hourly, or live"]
    return "\n".join(lines) + "\n"


def _tables(files: Sequence[LogFile]) -> dict[str, LogFile]:
    """Which table is which, by the columns there are. A file's name decides between several."""
    tables: dict[str, LogFile] = {}

    def choose(table: str, candidates: list[LogFile]) -> None:
        free = [file for file in candidates if file not in tables.values()]
        free.sort(key=lambda file: table.rstrip("s") not in file.pattern.lower())
        if free:
            tables[table] = free[0]

    def answered(file: LogFile) -> bool:
        return file.has("clicked") or file.has("rating")

    choose(
        "impressions",
        [f for f in files if f.has("user_id", "item_id", "event_timestamp") and answered(f)],
    )
    choose("behaviors", [f for f in files if f.has("user_id", "text", "event_timestamp")])
    choose("items", [f for f in files if f.has("item_id", "text") and not f.has("user_id")])
    choose("users", [f for f in files if f.is_key("user_id") and not f.has("item_id")])
    return tables


def _behaviors(connection: duckdb.DuckDBPyConnection, made: _Proposal, file: LogFile) -> None:
    if not file.has("channel"):
        stem = re.sub(r"[^a-z0-9]+", "_", file.paths[0].stem.split(".")[0].lower()).strip("_")
        made.channels = [stem if _CHANNEL.fullmatch(stem) and stem != "item" else "behavior"]
        made.channels_reason = "no column names kinds of behavior, so there is one"
        lines = _source(file, "behaviors")
        made.sections["behaviors"] = [*lines, f"channel: {made.channels[0]}  # of every row"]
        return
    column = file.sql("channel")
    rows = connection.execute(
        f"SELECT {column}::VARCHAR FROM {file.seen} WHERE {column} IS NOT NULL"
        " GROUP BY ALL ORDER BY count(*) DESC, 1"
    ).fetchall()
    values = [value for (value,) in rows]
    kinds = list(dict.fromkeys(re.sub(r"[^a-z0-9]+", "_", value.lower()).strip("_") for value in values))
    made.channels = [kind if _CHANNEL.fullmatch(kind) else f"kind_{kind}" for kind in kinds]
    made.channels_reason = f"the values of {file.roles['channel'].column.name}, the most frequent first"
    if made.channels == values:
        made.sections["behaviors"] = _source(file, "behaviors")
        return
    cases = " ".join(
        f"WHEN {sql_literal(value)} THEN {sql_literal(channel)}"
        for value, channel in zip(values, made.channels, strict=False)
    )
    made.sections["behaviors"] = _query(
        "behaviors",
        file,
        f"SELECT * REPLACE (CASE {column} {cases} END AS {column})",
        f"FROM {file.relation}",
        reason="channels are small letters, digits and _",
    )


def _derived_behaviors(made: _Proposal, shown: LogFile | None, items: LogFile | None) -> None:
    """What people did, out of what they were shown and how they answered."""
    words = shown if shown is not None and shown.has("text") else items
    if shown is None or words is None:
        made.channels, made.channels_reason = ["behavior"], "one kind, until a file says otherwise"
        why = "no file has users, times and words"
        made.sections["behaviors"] = _missing("behaviors", why, "channel: behavior")
        return
    answer = shown.sql("clicked" if shown.has("clicked") else "rating")
    least = None if shown.has("clicked") else _threshold(shown)[0]
    time, item = f"r.{shown.sql('event_timestamp')}", f"r.{shown.sql('item_id')}"
    if words is shown:
        text, join = f"r.{shown.sql('text')}", ""
    else:
        text = f"i.{words.sql('text')}"
        join = f"JOIN {words.relation} i ON i.{words.sql('item_id')}::VARCHAR = {item}::VARCHAR"
    if least is None:
        made.channels, made.channels_reason = [_CLICKED], "what was clicked is what people did"
        channel, only = sql_literal(_CLICKED), f"WHERE TRY_CAST(r.{answer} AS DOUBLE) = 1"
        if shown.roles["clicked"].column.kind == "BOOLEAN":
            only = f"WHERE r.{answer}"
    else:
        made.channels = [_LIKED, _DISLIKED]
        made.channels_reason = f"a rating of {least:g} or more, or less"
        likes = f"TRY_CAST(r.{answer} AS DOUBLE) >= {least:g}"
        channel, only = f"CASE WHEN {likes} THEN '{_LIKED}' ELSE '{_DISLIKED}' END", ""
    section = [
        "# No file says in words what people did, so every answer to an impression is a behavior, in the"
        " words of its item.",
        "sql: |",
        f"  SELECT r.{shown.sql('user_id')} AS user_id, {item} AS item_id, {time} AS event_timestamp,",
        f"         {channel} AS channel, {text} AS text",
        f"  FROM {shown.relation} r",
    ]
    section += [f"  {line}" for line in (join, only) if line]
    made.sections["behaviors"] = [*section, *_times(shown)]


def _impressions(made: _Proposal, shown: LogFile | None) -> None:
    if shown is None:
        why = "no file has users, items, times and clicks or ratings"
        made.sections["impressions"] = _missing("impressions", why)
        return
    if shown.is_key("impression_id"):
        lines = _source(shown, "impressions", "impression_id")
    else:
        parts = ", ".join(shown.sql(role) for role in ("user_id", "item_id", "event_timestamp"))
        lines = _query(
            "impressions",
            shown,
            _with(shown, "impression_id", f"md5(concat_ws('|', {parts}))"),
            f"FROM {shown.relation}",
            reason="no column tells impressions apart, so user, item and time do",
        )
    names = [
        column.plain_name
        for column in shown.columns
        if column.plain_name in CONTEXT and column.name == column.plain_name
    ]
    if names:
        lines.append(f"context: [{', '.join(names)}]  # by their names; only what is known when asked")
    made.sections["impressions"] = lines


def _items(made: _Proposal, items: LogFile | None, shown: LogFile | None, start: str | None) -> None:
    if items is not None:
        _plain_or_dated(made, "items", items, start)
    elif shown is not None and shown.has("text") and start is not None:
        made.sections["items"] = [
            f"# No file of items: those of {shown.pattern}, known since before the log begins.",
            "sql: |",
            f"  SELECT {shown.sql('item_id')} AS item_id, min({shown.sql('text')}) AS text,",
            f"         TIMESTAMP '{start}' AS event_timestamp",
            f"  FROM {shown.relation} GROUP BY ALL",
        ]
    else:
        made.sections["items"] = _missing("items", "no file has items with words")


def _plain_or_dated(made: _Proposal, table: str, file: LogFile, start: str | None) -> None:
    """Items and users; where they have no time of their own, they were known before the log begins."""
    if file.has("event_timestamp") or start is None:
        made.sections[table] = _source(file, table)
        return
    made.sections[table] = _query(
        table,
        file,
        _with(file, "event_timestamp", f"TIMESTAMP '{start}'"),
        f"FROM {file.relation}",
        reason="no column says since when, so they were known before the log begins",
        dated=True,
    )


def _source(file: LogFile, table: str, *more: str) -> list[str]:
    """A section that reads the file as it is."""
    lines = [f"files: {_scalar(file.pattern)}", *_columns(file, table, more), *_times(file)]
    if file.delimiter not in (None, "\t" if file.pattern.endswith((".tsv", ".tsv.gz")) else ","):
        lines.append(f"csv: {{delimiter: {_scalar(str(file.delimiter))}}}")
    return lines


def _query(
    table: str,
    file: LogFile,
    *query: str,
    reason: str,
    dated: bool = False,
) -> list[str]:
    """A section that reads the file by a query."""
    columns = _columns(file, table, made="event_timestamp" if dated else None)
    times = [] if dated else _times(file)
    return [
        f"# {reason[0].upper()}{reason[1:]}.",
        "sql: |",
        *(f"  {line}" for line in query),
        *columns,
        *times,
    ]


def _with(file: LogFile, column: str, expression: str) -> str:
    """SELECT of all columns and this one, in place of the file's own where it has one of that name."""
    if any(each.name == column for each in file.columns):
        return f"SELECT * REPLACE ({expression} AS {column})"
    return f"SELECT *, {expression} AS {column}"


def _columns(file: LogFile, table: str, more: Sequence[str] = (), *, made: str | None = None) -> list[str]:
    """The mapping, each line with its reason; a column that bears the name already needs none."""
    roles = [*_NEEDED[table], *more]
    if table == "behaviors" and file.has("channel"):
        roles.append("channel")
    if table == "behaviors" and file.has("item_id"):
        roles.append("item_id")
    lines = []
    for role in roles:
        if role == made or (role == "clicked" and table == "impressions"):
            continue
        if not file.has(role):
            lines.append(f"  {role}: {TODO}  # {TODO}: name the column, of {_names(file)}")
            continue
        found = file.roles[role]
        if found.column.name != role:
            lines.append(f"  {role}: {_scalar(found.column.name)}  # {found.reason}")
    if table == "impressions":
        lines += _click(file)
    return ["columns:", *lines] if lines else []


def _click(file: LogFile) -> list[str]:
    if file.has("clicked"):
        found = file.roles["clicked"]
        return (
            []
            if found.column.name == "clicked"
            else [f"  clicked: {_scalar(found.column.name)}  # {found.reason}"]
        )
    least, why = _threshold(file)
    found = file.roles["rating"]
    rule = f"{{column: {_scalar(found.column.name)}, at_least: {least:g}}}"
    return [f"  clicked: {rule}  # {found.reason}; {why}"]


def _threshold(file: LogFile) -> tuple[float, str]:
    """From which rating on it counts as a click."""
    column = file.roles["rating"].column
    low, high = float(column.low or 0), float(column.high or 0)
    if high == 5:
        return 4.0, "4 of 5 and more count as a click"
    least = low + 0.75 * (high - low)
    return least, f"the upper quarter of the scale counts as a click: {least:g} and more"


def _times(file: LogFile) -> list[str]:
    """How numeric or unusual times are to be read."""
    if not file.has("event_timestamp"):
        return []
    column = file.roles["event_timestamp"].column
    if column.time_unit:
        shown = _moment(float(column.low or 0), column.time_unit)
        return [f"timestamp_unit: {column.time_unit}  # with which {column.name} begins at {shown}"]
    if file.time_format and not file.parquet:
        return [
            f"timestamp_format: {_scalar(file.time_format)}  # as {column.name} looks; see that day and"
            " month are not the other way round"
        ]
    return []


def _missing(table: str, why: str, *more: str) -> list[str]:
    needed = ", ".join(_NEEDED[table])
    return [
        f"# {TODO}: {why}; name one with {needed}.",
        f"files: {TODO}-{table}.parquet",
        *more,
    ]


def _before(connection: duckdb.DuckDBPyConnection, log: LogFile | None) -> str | None:
    """The day before the log begins, of all its rows; None where that is not known."""
    if log is None or not log.has("event_timestamp"):
        return None
    column = log.roles["event_timestamp"].column
    row = connection.execute(
        f"SELECT min({log.sql('event_timestamp')})::VARCHAR FROM {log.seen}"
    ).fetchone()
    if row is None or row[0] is None:
        return None
    day = _moment(float(row[0]), column.time_unit) if column.time_unit else row[0][:10]
    return f"{datetime.fromisoformat(day) - timedelta(days=1):%Y-%m-%d}"


def _moment(number: float, unit: str) -> str:
    seconds = number / UNITS[unit]
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"


def _names(file: LogFile) -> str:
    return ", ".join(column.name for column in file.columns)


def _scalar(value: str) -> str:
    """A string as YAML writes it, in one line."""
    return yaml.safe_dump(value, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
