"""What the rows of a log must be: how a source's columns become bahe's, and the rules a row may break."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from bahe_core.errors import BadInput
from bahe_lake.blank import blank
from bahe_lake.sql import sql_identifier, sql_literal
from materialize.config.dataset import CLICKED_AT, ClickRule, Table, context_column
from materialize.ingest import values
from materialize.ingest.column_types import KEYS, ColumnTypes, source_column
from materialize.ingest.layouts import Layout

REQUIRED = {
    "behaviors": ("user_id", "channel", "text", "event_timestamp"),
    "impressions": ("impression_id", "user_id", "item_id", "event_timestamp", "clicked"),
    "items": ("item_id", "text", "event_timestamp"),
    "users": ("user_id", "event_timestamp"),
}
EARLIEST = 1980
"""A time before this year is a broken clock or a wrong unit."""

UNKNOWN_ITEM, FUTURE = "unknown item", "time in the future"
"""Names of the rules that a row may come to keep without a change of its own."""

_UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}


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
    shown: str | None = None
    """SQL of what the sentence shows in the value's place, where that is something else."""
    counts: bool = True
    """Whether such rows count towards the share that is too much: a row that contradicts the lake is set
    aside, as the lake keeps what it has, but is no defect of the file."""

    @property
    def sentence(self) -> str:
        """SQL of the reason with the value in its place."""
        before, place, after = self.reason.partition("{}")
        value = f"coalesce(({self.shown or self.value})::VARCHAR, 'None')"
        return (
            f"{sql_literal(before)} || {value} || {sql_literal(after)}"
            if place
            else sql_literal(self.reason)
        )


@dataclass
class Projection:
    """How the rows of one layout become rows of a table. Columns that begin with `_` serve reasons only."""

    table: str
    columns: dict[str, str] = field(default_factory=dict)
    """SQL of each column, over the source's."""
    extra: dict[str, str] = field(default_factory=dict)
    """SQL of the columns that only reasons read."""
    rules: list[Rule] = field(default_factory=list)

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
    layout: Layout,
    types: ColumnTypes,
    *,
    others: Collection[str],
    context: Sequence[str],
    channels: Sequence[str],
    latest: datetime,
) -> Projection:
    """The projection of a layout's rows into a table.

    A column that is not required may be missing where the `others`, columns of further files, have it.

    Raises BadInput when a column that is needed is missing or of a type that cannot be.
    """
    section = layout.source.section
    if table == "behaviors" and section.channel is not None and "channel" in section.columns:
        raise BadInput("behaviors: give `channel` or `columns.channel`, not both.")
    _check_context(table, layout, context)
    _check_click_times(table, layout, types)
    held = types.lake[table]
    made = Projection(table)
    conversions: list[Rule] = []
    used: set[str] = set()
    for target in dict.fromkeys((*REQUIRED[table], *section.columns, *context)):
        if table == "behaviors" and target == "channel" and section.channel is not None:
            made.columns[target] = sql_literal(section.channel)
            continue
        column = source_column(section, target)
        stored = context_column(target) if target in context else target
        if column not in layout.columns:
            if target not in REQUIRED[table] and (stored in held or column in others):
                continue  # other rows have it, and these lack it
            raise _missing(table, layout, target, column, context)
        used.add(column)
        if not _has_type(table, types, target, context):
            continue
        made.columns[stored] = _value(table, layout, types, target, column, context)
        conversions += _conversion(made, layout, types, target, column, context)
    for column in layout.columns:
        if column in used or column in made.columns or (table == "behaviors" and column != "item_id"):
            continue
        if not _has_type(table, types, column, context):
            continue
        made.columns[column] = _value(table, layout, types, column, column, ())
        conversions += _conversion(made, layout, types, column, column, ())
    if table == "behaviors":
        made.columns.setdefault("item_id", f"NULL::{types.keys['item_id']}")
    made.extra["_time"] = f"{sql_identifier(source_column(section, 'event_timestamp'))}::VARCHAR"
    made.rules += conversions + _rules(table, section, channels, latest)
    if CLICKED_AT in made.columns and section.click_times:
        made.rules += _rules_of_clicks(latest)
    return made


def _check_context(table: str, layout: Layout, context: Sequence[str]) -> None:
    section = layout.source.section
    required = {source_column(section, target): target for target in REQUIRED[table]}
    for target in context:
        column = source_column(section, target)
        if column in required:
            raise BadInput(
                f"{table}.context: {column} of {layout.what} is already read as {required[column]}; take"
                f" {target} out of the list."
            )


def _has_type(table: str, types: ColumnTypes, target: str, context: Sequence[str]) -> bool:
    """False for a column of the log's own in which no row has a value: it comes with the first."""
    is_own = target not in REQUIRED[table] and target not in KEYS and target not in context
    return not is_own or target in types.attributes[table]


def _check_click_times(table: str, layout: Layout, types: ColumnTypes) -> None:
    """Raises BadInput when the log may say when clicks happened, and dataset.yaml does not say whether."""
    here = table == "impressions" and CLICKED_AT in layout.columns and CLICKED_AT not in types.lake[table]
    if here and CLICKED_AT not in layout.source.section.columns:
        raise BadInput(
            f"{table}: {layout.what} has the column {CLICKED_AT}; if it is when a click happened, set"
            f" `columns: {{{CLICKED_AT}: {CLICKED_AT}}}`, and if not, rename it."
        )


def _missing(table: str, layout: Layout, target: str, column: str, context: Sequence[str]) -> BadInput:
    also = f", or take {target} out of {table}.context" if target in context else ""
    if layout.source.csv and len(layout.columns) == 1:
        also = "; if values are parted by something else, set `csv: {delimiter: …}`"
    return BadInput(
        f"{table}: {layout.what} has no column {column} (for {target}); it has"
        f" {', '.join(layout.columns)}; map it under {table}.columns{also}."
    )


def _value(
    table: str, layout: Layout, types: ColumnTypes, target: str, column: str, context: Sequence[str]
) -> str:
    """SQL of one column of the table."""
    section, kind, raw = layout.source.section, layout.columns[column], sql_identifier(column)
    rule = section.columns.get(target, target)
    if isinstance(rule, ClickRule) and target != "clicked":
        raise BadInput(f"{table}.columns.{target}: `at_least` is for `clicked` only.")
    try:
        if target in context:
            if target in section.types:
                named = values.NAMED_TYPES[section.types[target]]
                return category(values.convert(raw, kind, named, section), named)
            return _written_category(raw) if layout.source.csv else category(raw, kind)
        if target in KEYS and (target in REQUIRED[table] or table == "behaviors"):
            return _key(raw, kind, types.keys[target], section)
        if target == "event_timestamp" or (target == CLICKED_AT and section.click_times):
            return values.moment(raw, kind, section)
        if target == "clicked" and table == "impressions":
            if isinstance(rule, ClickRule):
                return values.at_least(raw, kind, rule.at_least, section)
            return values.clicked(raw, kind, section)
        if target in REQUIRED[table]:
            return values.text(raw, kind)
        return values.convert(raw, kind, types.attributes[table].get(target, kind), section)
    except BadInput as error:
        raise BadInput(f"{table}: {column} of {layout.what} {error}.") from None


def _key(raw: str, kind: str, wanted: str, section: Table) -> str:
    """An id; one that shows nothing is none."""
    value = values.convert(raw, kind, wanted, section)
    return f"(CASE WHEN NOT {blank(value)} THEN {value} END)" if wanted == "VARCHAR" else value


def _conversion(
    made: Projection, layout: Layout, types: ColumnTypes, target: str, column: str, context: Sequence[str]
) -> list[Rule]:
    """The rule that a value which is there must not be lost on its way to the column's type."""
    section, kind, raw = layout.source.section, layout.columns[column], sql_identifier(column)
    is_key = target in KEYS and (target in REQUIRED[made.table] or made.table == "behaviors")
    if target in context:
        if target not in section.types:
            return []
        wanted = values.NAMED_TYPES[section.types[target]]
    elif target in REQUIRED[made.table] and not is_key:
        return []  # has rules of its own
    else:
        wanted = types.keys[target] if is_key else types.attributes[made.table].get(target, kind)
    if kind == wanted or wanted == "VARCHAR":
        return []
    stored = context_column(target) if target in context else target
    there = f"NOT isnan({raw})" if kind in ("DOUBLE", "FLOAT") else f"{raw} IS NOT NULL"
    if values.is_text(kind):
        there = f"NOT {blank(values.text(raw, kind))}"
    made.extra[f"_raw_{stored}"] = f"(CASE WHEN {there} THEN {raw}::VARCHAR END)"
    source = "the lake" if stored in types.lake[made.table] else "the log"
    return [
        Rule(
            name=f"no {wanted.lower()} in {stored}",
            breaks=f"{sql_identifier(stored)} IS NULL AND {sql_identifier(f'_raw_{stored}')} IS NOT NULL",
            value=sql_identifier(f"_raw_{stored}"),
            reason=f"{target} {{}} is not exactly {wanted}, as {source} has it",
        )
    ]


def category(expression: str, kind: str) -> str:
    """A context column as text, numbers as `bahe_models.context` writes those of a request."""
    if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION", "BLOB")):
        raise BadInput(
            f"is {kind}; context is text, numbers or booleans, so convert it or take it out of the list"
        )
    if not values.is_fraction(kind):
        return f"{expression}::VARCHAR"
    # A column of integers with gaps often comes as DOUBLE.
    number = f"{expression}::DOUBLE"
    whole = f"{number} = trunc({number}) AND abs({number}) < 1e16"
    shown = number if kind.startswith("DECIMAL") else expression  # 0.50 is 0.5
    return f"""(CASE WHEN isnan({number}) THEN NULL WHEN {whole} THEN {number}::BIGINT::VARCHAR
                ELSE {shown}::VARCHAR END)"""


def _written_category(raw: str) -> str:
    """A context column of a CSV file, where pandas writes 7 as `7.0` and true as `True`: as requests do."""
    whole = f"regexp_full_match({raw}, '-?(0|[1-9][0-9]*)[.]0+')"
    return f"""(CASE WHEN {whole} THEN split_part({raw}, '.', 1)
                WHEN {raw} IN ('True', 'TRUE', 'False', 'FALSE') THEN lower({raw}) ELSE {raw} END)"""


def _rules(table: str, section: Table, channels: Sequence[str], latest: datetime) -> list[Rule]:
    rules = []
    for column in REQUIRED[table]:
        if column == "event_timestamp":
            rules += _rules_of_time(section, latest)
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
                    breaks=f"text IS NULL OR {blank('text')}",
                    reason="text is missing; every row needs words",
                )
            )
        else:
            shows_nothing = f" OR {blank('channel')}" if column == "channel" else ""
            rules.append(
                Rule(
                    name=f"no {column}",
                    breaks=f"{column} IS NULL{shows_nothing}",
                    reason=f"{column} is missing",
                )
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


def _rules_of_clicks(latest: datetime) -> list[Rule]:
    return [
        Rule(
            name="click before its impression",
            breaks=f"{CLICKED_AT} < event_timestamp",
            value=CLICKED_AT,
            reason=f"{CLICKED_AT} {{}} lies before the impression's event_timestamp; correct one of them",
        ),
        Rule(
            name="time of no click",
            breaks=f"clicked = 0 AND {CLICKED_AT} IS NOT NULL",
            value=CLICKED_AT,
            reason=f"{CLICKED_AT} is {{}} where clicked is 0; correct one of them",
        ),
        Rule(
            name=FUTURE,
            breaks=f"{CLICKED_AT} > TIMESTAMPTZ {sql_literal(latest.isoformat())}",
            value=CLICKED_AT,
            reason=f"{CLICKED_AT} {{}} lies in the future; correct the clock, or set `timestamp_unit`",
        ),
    ]


def _rules_of_time(section: Table, latest: datetime) -> list[Rule]:
    column = source_column(section, "event_timestamp")
    called = "event_timestamp" if column == "event_timestamp" else f"event_timestamp (column {column})"
    form = section.timestamp_format
    ways = (
        f"it must be written as `timestamp_format` says, {form}"
        if form is not None
        else f"write ISO 8601 or {_UNITS[section.timestamp_unit]} since 1970, no finer than a microsecond,"
        " or say how it is written by `timestamp_format`"
    )
    return [
        Rule(
            name="no time",
            breaks="event_timestamp IS NULL",
            value="_time",
            reason=f"{called} {{}} is not a time that has one meaning; {ways}",
        ),
        Rule(
            name="time too early",
            breaks=f"event_timestamp < TIMESTAMPTZ '{EARLIEST}-01-01 00:00:00+00'",
            value="_time",
            reason=f"{called} {{}} lies before {EARLIEST}; correct the clock, or set `timestamp_unit`",
        ),
        Rule(
            name=FUTURE,
            breaks=f"event_timestamp > TIMESTAMPTZ {sql_literal(latest.isoformat())}",
            value="event_timestamp",
            shown="_time",
            reason=f"{called} {{}} lies in the future; correct the clock, or set `timestamp_unit`",
        ),
    ]
