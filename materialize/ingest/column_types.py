"""Which type each column gets: the lake's, else what dataset.yaml states, else the typed sources' own.

CSV alone says nothing, and is text; neither do files and columns without any value.

A key (user_id, item_id, impression_id) has one type over all tables and nights, BIGINT or VARCHAR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb

from bahe_core.errors import BadInput
from bahe_lake.catalogue import columns, tables
from bahe_lake.sql import sql_identifier
from materialize.config.dataset import (
    CLICKED_AT,
    ClickRule,
    NamedType,
    Table,
    context_column,
)
from materialize.ingest import values
from materialize.ingest.layouts import Layout, unreadable

TABLES = ("items", "users", "behaviors", "impressions")
"""In the order in which they are read: impressions need the items."""

KEYS = ("impression_id", "user_id", "item_id")


@dataclass(frozen=True, kw_only=True)
class ColumnTypes:
    """Types of the columns that the log is free in."""

    keys: Mapping[str, str]
    attributes: Mapping[str, Mapping[str, str]]
    """Of each table, the columns that are its own."""
    lake: Mapping[str, Mapping[str, str]]
    """Of each table, all columns that the lake has."""


def source_column(section: Table, target: str) -> str:
    """What a column is called in the source."""
    rule = section.columns.get(target, target)
    return rule.column if isinstance(rule, ClickRule) else rule


def column_types(
    connection: duckdb.DuckDBPyConnection,
    sections: Mapping[str, Table],
    opened: Mapping[str, Sequence[Layout]],
) -> ColumnTypes:
    """The types. Raises BadInput where two sources, or a source and the lake, contradict each other."""
    there = tables(connection)
    lake = {table: columns(connection, table) if table in there else {} for table in TABLES}
    return ColumnTypes(
        keys={key: _key_type(connection, key, sections, opened, lake) for key in KEYS},
        attributes={
            table: _attributes(connection, sections[table], of_table, lake[table])
            for table, of_table in opened.items()
        },
        lake=lake,
    )


def _key_type(
    connection: duckdb.DuckDBPyConnection,
    key: str,
    sections: Mapping[str, Table],
    opened: Mapping[str, Sequence[Layout]],
    lake: Mapping[str, Mapping[str, str]],
) -> str:
    held = {f"the lake's {table}": lake[table][key] for table in reversed(TABLES) if key in lake[table]}
    if (
        key == "item_id"
    ):  # behaviors have a column of the items' type whether or not the log names items there
        held = {where: kind for where, kind in held.items() if "behaviors" not in where}
    stated = {
        f"{table}.types": values.NAMED_TYPES[section.types[key]]
        for table, section in sections.items()
        if key in section.types
    }
    typed: dict[str, str] = {}
    layout_of: dict[str, Layout] = {}
    for table, of_table in opened.items():
        column = source_column(sections[table], key)
        if key not in _keys_of(table):
            continue
        for layout in of_table:
            if (
                layout.typed
                and not layout.empty
                and column in layout.columns
                and key not in sections[table].types
            ):
                where = f"{table}.{key} of {layout.what}"
                typed[where], layout_of[where] = (
                    _family(table, key, layout, layout.columns[column]),
                    layout,
                )
    typed = {where: kind for where, kind in typed.items() if kind != "either"}
    if len(set((held | stated | typed).values())) > 1:
        typed = {
            where: kind
            for where, kind in typed.items()
            if _holds_values(connection, layout_of[where], _column_of(sections, where, key))
        }
    claims = held | stated | typed
    if not claims:
        return "VARCHAR"
    (first, kind), *others = claims.items()
    for where, other in others:
        if other != kind and where not in held:
            raise BadInput(
                f"{where} is {_word(other)}, but {first} is {_word(kind)}; give {key} one type in all"
                f" tables, or state it as `types: {{{key}: text}}`."
            )
    if kind not in ("BIGINT", "VARCHAR"):
        raise BadInput(f"{first}: {key} is {kind}; ids are integers or text.")
    return kind


def _column_of(sections: Mapping[str, Table], where: str, key: str) -> str:
    return source_column(sections[where.split(".", 1)[0]], key)


def _holds_values(connection: duckdb.DuckDBPyConnection, layout: Layout, column: str) -> bool:
    """Whether a column has any value: writers give one without values a type that says nothing."""
    name = sql_identifier(column)
    number = "" if layout.columns[column] not in ("DOUBLE", "FLOAT") else f" AND NOT isnan({name})"
    query = f"SELECT 1 FROM {layout.relation} WHERE {name} IS NOT NULL{number} LIMIT 1"
    try:
        return connection.execute(query).fetchone() is not None
    except duckdb.Error as error:
        raise unreadable(connection, layout.source, layout.files, error) from None


def _keys_of(table: str) -> tuple[str, ...]:
    return {
        "items": ("item_id",),
        "users": ("user_id",),
        "behaviors": ("user_id", "item_id"),
        "impressions": KEYS,
    }[table]


def _family(table: str, key: str, layout: Layout, kind: str) -> str:
    """BIGINT, VARCHAR, or `either` for integers beyond 64 bits, which are exact as text."""
    if kind in values.WIDE_INTEGERS:
        return "either"
    if values.is_number(kind):
        return "BIGINT"
    if values.is_text(kind) or kind == "UUID":
        return "VARCHAR"
    raise BadInput(
        f"{table}: {source_column(layout.source.section, key)} of {layout.what} is {kind}; ids are integers"
        " or text, so convert it, for example with `sql:`."
    )


def _word(kind: str) -> str:
    return {"BIGINT": "an integer", "VARCHAR": "text"}.get(kind, kind)


def _attributes(
    connection: duckdb.DuckDBPyConnection,
    section: Table,
    of_table: Sequence[Layout],
    held: Mapping[str, str],
) -> dict[str, str]:
    """Type of every column that is read under its own name, or a name that dataset.yaml gives it."""
    renamed = {rule: target for target, rule in section.columns.items() if isinstance(rule, str)}
    said: dict[str, list[Layout]] = {}
    for layout in of_table:
        for column in layout.columns:
            target = renamed.get(column, column)
            # A column that dataset.yaml takes from elsewhere is not read under its own name.
            if not layout.empty and source_column(section, target) == column:
                said.setdefault(target, []).append(layout)
    types = dict(held)
    stated: dict[str, NamedType] = dict(section.types)
    if section.click_times:
        stated[CLICKED_AT] = "time"
    for target, named in stated.items():
        there = dict.fromkeys(column for layout in of_table for column in layout.columns)
        in_lake = target in held or context_column(target) in held
        if not in_lake and source_column(section, target) not in there:
            raise BadInput(
                f"{of_table[0].source.table}.types: {target} is no column of {of_table[0].what}, which has"
                f" {', '.join(there)}; correct it."
            )
        if target in held and not _may_be_stated(held[target], named):
            if target == CLICKED_AT:
                raise BadInput(
                    f"impressions.columns: the lake has {target} as {held[target]}, from before it meant"
                    " when a click happened; ingest into a new home, or give the time another name."
                )
            new = f"{target}_{named}"
            raise BadInput(
                f"{of_table[0].source.table}.types: the lake has {target} as {held[target]}, not as"
                f" {named}; take it out of `types`, or read it as a column of its own:"
                f" `columns: {{{new}: {source_column(section, target)}}}` and `types: {{{new}: {named}}}`."
            )
        types.setdefault(target, values.NAMED_TYPES[named])
    for target, members in said.items():
        if target in types:
            continue
        column = source_column(section, target)
        telling = [m for m in members if m.source.csv or _holds_values(connection, m, column)]
        kinds = dict.fromkeys(layout.columns[column] for layout in telling)
        if kinds:
            types[target] = _common(connection, telling, column, list(kinds))
    return types


def _may_be_stated(held: str, named: str) -> bool:
    """Whether the lake's type, which stays, is of the kind that `types` states."""
    if named == "integer":
        return held in values.INTEGERS or held in values.WIDE_INTEGERS
    if named == "number":
        return values.is_number(held)
    if named == "time":
        return held.startswith("TIMESTAMP") or held == "DATE"
    return held == values.NAMED_TYPES[named]


def _common(
    connection: duckdb.DuckDBPyConnection, members: Sequence[Layout], column: str, kinds: Sequence[str]
) -> str:
    """The one type of a column, or what numbers of several types are together."""
    if len(kinds) == 1:
        return kinds[0]
    if all(values.is_number(kind) for kind in kinds):
        parts = " UNION ALL ".join(f"SELECT NULL::{kind} AS value" for kind in kinds)
        return columns(connection, f"({parts})")["value"]
    one, other = (next(m for m in members if m.columns[column] == kind) for kind in kinds[:2])
    raise BadInput(
        f"{one.source.table}: {column} is {kinds[0]} in {one.what} and {kinds[1]} in {other.what};"
        f" make them one type, or state it as `types: {{{column}: text}}`."
    )
