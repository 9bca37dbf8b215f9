"""What the rows of a log must be: how a source's columns become bahe's, and the rules a row may break."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from bahe_core.errors import BadInput
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.dataset import ClickRule, Table, context_column

REQUIRED = {
    "behaviors": ("user_id", "channel", "text", "event_timestamp"),
    "impressions": ("impression_id", "user_id", "item_id", "event_timestamp", "clicked"),
    "items": ("item_id", "text", "event_timestamp"),
    "users": ("user_id", "event_timestamp"),
}
IDS = ("impression_id", "user_id", "item_id")
EARLIEST = 1980
"""A time before this year is a broken clock or a wrong unit."""

UNKNOWN_ITEM, FUTURE = "unknown item", "time in the future"
"""Names of the rules that a row may come to keep without a change of its own."""

_FRACTIONS = ("DOUBLE", "FLOAT", "DECIMAL")
_NO_CATEGORY = ("STRUCT", "MAP", "UNION", "BLOB")
_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that a row must not be."""

    name: str
    """The reason in two words, by which the quarantine is counted."""
    breaks: str
    """SQL predicate over a projection's columns; null means that the row keeps the rule."""
    reason: str
    """The reason in a sentence, with `{}` for the value."""
    value: str = "NULL"
    """SQL of the value that is to blame, as text."""
    counts: bool = True
    """Whether such rows count towards the share that is too much: a row that contradicts the lake is set
    aside, as the lake keeps what it has, but is no defect of the file."""

    @property
    def sentence(self) -> str:
        """SQL of the reason with the value in its place."""
        before, found, after = self.reason.partition("{}")
        value = f"coalesce(({self.value})::VARCHAR, 'None')"
        return (
            f"{sql_literal(before)} || {value} || {sql_literal(after)}"
            if found
            else sql_literal(self.reason)
        )


@dataclass
class Projection:
    """How a source's rows become rows of a table. Columns that start with `_` are for reasons only."""

    table: str
    columns: dict[str, str] = field(default_factory=dict)
    """SQL of each column, over the source's."""
    extra: dict[str, str] = field(default_factory=dict)
    """SQL of the columns that only reasons read."""
    rules: list[Rule] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    """Types of the ids."""

    def query(self, relation: str, more: str = "") -> str:
        """SQL of the table's rows and the reasons' columns."""
        both = self.columns | self.extra
        listed = ", ".join(
            f"{expression} AS {sql_identifier(column)}" for column, expression in both.items()
        )
        return f"(SELECT {listed}{more} FROM {relation} AS _row_of_source)"


def broken(rules: Sequence[Rule]) -> str:
    """SQL predicate, never null: the row breaks one of the rules."""
    return " OR ".join(f"coalesce({rule.breaks}, false)" for rule in rules) or "false"


def project(
    table: str,
    section: Table,
    found: Mapping[str, str],
    *,
    what: str,
    csv: bool,
    context: Sequence[str],
    channels: Sequence[str],
    held: Mapping[str, str],
    item_type: str | None,
    latest: datetime,
) -> Projection:
    """The projection of a source with the columns `found` (and their types) into a table.

    `held` are the columns that the lake's table has, and `item_type` is the type of its
    item ids. Raises BadInput when a column that is needed is missing or of a type that cannot be.
    """
    mapping = dict(section.columns)
    if table == "behaviors" and section.channel is not None:
        if "channel" in mapping:
            raise BadInput("behaviors: give `channel` or `columns.channel`, not both.")
    else:
        section = section.model_copy(update={"channel": None})
    made = Projection(table)
    used: set[str] = set()
    required = {_source_column(mapping.get(target, target)): target for target in REQUIRED[table]}
    for target in dict.fromkeys((*REQUIRED[table], *mapping, *context)):
        if target == "channel" and section.channel is not None:
            made.columns[target] = sql_literal(section.channel)
            continue
        rule = mapping.get(target, target)
        column = _source_column(rule)
        if target in context and column in required:
            raise BadInput(
                f"{table}.context: {column} of {what} is already read as {required[column]}; take"
                f" {target} out of the list."
            )
        stored = context_column(target) if target in context else target
        if column not in found:
            if target not in REQUIRED[table] and stored in held:
                continue  # the log no longer has it, so new rows lack it
            also = f", or take {target} out of {table}.context" if target in context else ""
            raise BadInput(
                f"{table}: {what} has no column {column} (for {target}); it has"
                f" {', '.join(found)}; map it under {table}.columns{also}."
            )
        used.add(column)
        if target in context:
            made.columns[stored] = category(what, column, sql_identifier(column), found[column])
        elif target in IDS:
            wanted = held.get(target) if csv else None
            _take_id(made, table, what, target, column, found[column], wanted)
        elif target in REQUIRED[table]:
            made.columns[target] = _expression(table, target, rule, found[column], section)
        else:
            _take_optional(made, target, column, found[column], held)
    for column, kind in found.items():
        if column in used or column in made.columns:
            continue
        if table == "behaviors":
            if column == "item_id":
                _take_optional(made, column, column, kind, {"item_id": item_type} if item_type else {})
        elif column in IDS:
            made.columns[column] = _id(sql_identifier(column), kind)
        else:
            _take_optional(made, column, column, kind, held)
    if table == "behaviors":
        made.columns.setdefault("item_id", f"NULL::{item_type or 'BIGINT'}")
    raw_time = mapping.get("event_timestamp", "event_timestamp")
    assert isinstance(raw_time, str)
    made.extra["_time"] = f"{sql_identifier(raw_time)}::VARCHAR"
    made.rules += _rules(table, channels, latest)
    return made


def category(what: str, column: str, expression: str, kind: str) -> str:
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


def _rules(table: str, channels: Sequence[str], latest: datetime) -> list[Rule]:
    rules = []
    for column in REQUIRED[table]:
        if column == "event_timestamp":
            rules += [
                Rule(
                    name="no time",
                    breaks="event_timestamp IS NULL",
                    value="_time",
                    reason="event_timestamp {} is not a time; use ISO 8601 or seconds since 1970",
                ),
                Rule(
                    name="time too early",
                    breaks=f"event_timestamp < TIMESTAMPTZ '{EARLIEST}-01-01 00:00:00+00'",
                    value="_time",
                    reason=f"event_timestamp {{}} lies before {EARLIEST}; correct the clock, or set"
                    " `timestamp_unit`",
                ),
                Rule(
                    name=FUTURE,
                    breaks=f"event_timestamp > TIMESTAMPTZ {sql_literal(latest.isoformat())}",
                    value="_time",
                    reason="event_timestamp {} lies in the future; correct the clock, or set"
                    " `timestamp_unit`",
                ),
            ]
        elif column == "clicked":
            rules.append(
                Rule(
                    name="no click value",
                    breaks="clicked IS NULL",
                    reason="clicked is missing or not 0 or 1; correct it, or map it with `at_least`",
                )
            )
        elif column == "text":
            rules.append(
                Rule(
                    name="no text",
                    breaks="text IS NULL OR trim(text) = ''",
                    reason="text is missing; every row needs words",
                )
            )
        else:
            blank = " OR trim(channel) = ''" if column == "channel" else ""
            rules.append(
                Rule(name=f"no {column}", breaks=f"{column} IS NULL{blank}", reason=f"{column} is missing")
            )
    if table == "behaviors":
        listed = ", ".join(sql_literal(channel) for channel in channels)
        rules.append(
            Rule(
                name="unknown channel",
                breaks=f"channel NOT IN ({listed})",
                value="channel",
                reason=f"channel {{}} is not one of `channels` {list(channels)}; add it or map it",
            )
        )
    return rules


def _source_column(rule: str | ClickRule) -> str:
    return rule.column if isinstance(rule, ClickRule) else rule


def _expression(table: str, target: str, rule: str | ClickRule, kind: str, section: Table) -> str:
    column = sql_identifier(_source_column(rule))
    if isinstance(rule, ClickRule):
        if target != "clicked":
            raise BadInput(f"{table}.columns.{target}: `at_least` is for `clicked` only.")
        number = f"TRY_CAST({column} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN ({number} >= {rule.at_least})::INTEGER END"
    if target == "event_timestamp":
        if kind in _INTEGERS or kind in ("DOUBLE", "FLOAT", "HUGEINT") or kind.startswith("DECIMAL"):
            micros = {"s": 1_000_000, "ms": 1_000, "us": 1}[section.timestamp_unit]
            number = f"{column}::HUGEINT" if kind in _INTEGERS else column
            return f"make_timestamptz(TRY_CAST({number} * {micros} AS BIGINT))"
        return f"TRY_CAST({column} AS TIMESTAMPTZ)"
    if target == "clicked":
        # Whatever is not exactly 0 or 1 becomes NULL here and is reported with its row.
        number = f"TRY_CAST({column} AS DOUBLE)"
        return f"CASE WHEN {number} IN (0, 1) THEN {number}::INTEGER END"
    return f"{column}::VARCHAR"  # text and channel


def _id(column: str, kind: str) -> str:
    """Ids are integers or strings; anything else is taken as a string."""
    return f"{column}::{id_type(kind)}"


def id_type(kind: str) -> str:
    """What an id of this type becomes."""
    return "BIGINT" if kind in _INTEGERS else "VARCHAR"


def _take_id(
    made: Projection, table: str, what: str, target: str, column: str, kind: str, wanted: str | None
) -> None:
    """An id; of CSV, whose types are guessed, as the type that the lake has."""
    made.types[target] = id_type(kind)
    if wanted == "BIGINT" and made.types[target] == "VARCHAR":
        made.types[target] = wanted
        made.columns[target] = f"TRY_CAST({sql_identifier(column)} AS BIGINT)"
        _note_wrong_type(made, target, sql_identifier(column), wanted)
    else:
        made.columns[target] = _id(sql_identifier(column), kind)


def _take_optional(
    made: Projection, target: str, column: str, kind: str, held: Mapping[str, str | None]
) -> None:
    """A column that a log may have, as the type that the lake holds it in."""
    wanted = held.get(target)
    if wanted is None or wanted == kind:
        made.columns[target] = sql_identifier(column)
        return
    value = sql_identifier(column)
    if kind.startswith(_FRACTIONS):
        value = f"CASE WHEN NOT isnan({value}::DOUBLE) THEN {value} END"  # integers with gaps
    made.columns[target] = f"TRY_CAST({value} AS {wanted})"
    if kind.startswith(_FRACTIONS) and wanted in _INTEGERS:
        made.columns[target] = f"CASE WHEN {value} = round({value}) THEN TRY_CAST({value} AS {wanted}) END"
    _note_wrong_type(made, target, value, wanted)


def _note_wrong_type(made: Projection, target: str, raw: str, wanted: str) -> None:
    made.extra[f"_raw_{target}"] = f"({raw})::VARCHAR"
    made.rules.append(
        Rule(
            name=f"no {wanted.lower()} in {target}",
            breaks=f"{sql_identifier(target)} IS NULL AND {sql_identifier(f'_raw_{target}')} IS NOT NULL",
            value=sql_identifier(f"_raw_{target}"),
            reason=f"{target} {{}} is not {wanted}, as the lake has it",
        )
    )
