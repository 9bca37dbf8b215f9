"""A check: a rule in words, and the SQL that counts the rows that break it.

In the SQL, `$name` stands for the relation of the logical table `name`. Every check comes down to
one number, so a table of any size is read by DuckDB alone; checks that share a source share a scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from bahe_lake.sql import sql_literal


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule about one column: how many rows of `source` satisfy `counted`, and how many may."""

    table: str
    column: str
    rule: str
    """Completes the sentence that starts with table and column: "must not be null"."""
    source: str
    """A FROM clause."""
    counted: str
    """A SQL predicate; null means not counted."""
    example: tuple[str, ...] = ()
    """Columns of `source` that identify a counted row to a person."""
    low: int = 0
    high: int | None = 0
    why: str

    @property
    def title(self) -> str:
        """The rule as a phrase; the name of the check in Data Docs, so unique within a gate."""
        return f"{self.table}.{self.column} {self.rule}"


def missing_columns(table: str, needed: Sequence[str], found: AbstractSet[str]) -> Check:
    """The check that comes first: a table without a column cannot be asked about it."""
    missing = [name for name in needed if name not in found]
    listed = ", ".join(sql_literal(name) for name in missing)
    return Check(
        table=table,
        column=missing[0] if missing else "columns",
        rule="must exist" if missing else "must all exist",
        source=f"(SELECT unnest([{listed}]::VARCHAR[]) AS missing_column)",
        counted="true",
        example=("missing_column",),
        why="A missing column means that another version of the job wrote this table.",
    )


def row_count(table: str, *, rows: int | None = None, source: str | None = None) -> Check:
    """At least one row, or exactly `rows`."""
    return Check(
        table=table,
        column="rows",
        rule="must not be empty" if rows is None else f"must number exactly {rows:,}",
        source=source or f"${table}",
        counted="true",
        low=1 if rows is None else rows,
        high=rows,
        why="A job that lost rows, or wrote none, must not pass for one that worked.",
    )


def no_nulls(
    table: str, columns: Iterable[str], *, key: Sequence[str] = (), source: str | None = None
) -> list[Check]:
    """One check per column; `key` names the columns that show which row it was."""
    return [
        Check(
            table=table,
            column=column,
            rule="must not be null",
            source=source or f"${table}",
            counted=f"{column} IS NULL",
            example=tuple(key),
            why="A row without its key or time drops out of every join without a word.",
        )
        for column in columns
    ]


def unique(
    table: str, columns: Sequence[str], *, source: str | None = None, rule: str | None = None
) -> Check:
    """No two rows agree in all of `columns`; the check goes under the last of them."""
    # GROUP BY, unlike count(DISTINCT), spills to disk when the table outgrows memory.
    keys = ", ".join(columns)
    return Check(
        table=table,
        column=columns[-1],
        rule=rule or "must be unique",
        source=f"(SELECT {keys}, count(*) AS copies FROM {source or f'${table}'} GROUP BY {keys})",
        counted="copies > 1",
        example=(*columns, "copies"),
        why="A key that appears twice multiplies rows in every join that uses it.",
    )


def exists(table: str, column: str, other: str) -> Check:
    """Every value of `column`, but null, is in the column of the same name in `other`."""
    return Check(
        table=table,
        column=column,
        rule=f"must exist in {other}",
        source=f"(SELECT {column} FROM ${table} ANTI JOIN ${other} USING ({column}))",
        counted=f"{column} IS NOT NULL",
        example=(column,),
        why=f"What is absent from {other} has no text, so it can never get a vector.",
    )


def one_of(table: str, column: str, allowed: Iterable[str | int], key: str) -> Check:
    """Every value of `column`, but null, is `allowed`; `key` shows which row it was."""
    values = list(allowed)
    return Check(
        table=table,
        column=column,
        rule=f"must be one of {', '.join(map(str, values))}",
        source=f"${table}",
        counted=f"{column} NOT IN ({', '.join(map(sql_literal, values))})",
        example=tuple(dict.fromkeys((key, column))),
        why="Any other value is read wrongly, or not at all, by the jobs that follow.",
    )


def each_present(table: str, column: str, values: Iterable[str | int]) -> list[Check]:
    """Each of `values` occurs."""
    return [
        Check(
            table=table,
            column=column,
            rule=f"must be {value} in at least one row",
            source=f"${table}",
            counted=f"{column} = {sql_literal(value)}",
            low=1,
            high=None,
            why="Without it, there is nothing to learn from or nothing to measure on.",
        )
        for value in values
    ]
