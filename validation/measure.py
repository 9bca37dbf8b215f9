"""Count, by SQL inside DuckDB, the rows that break each rule of a gate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from bahe_core.errors import GateFailed, NotReady
from validation.checks import Check, missing_columns
from validation.suites import SUITES, required

_QUOTED_OR_TABLE = re.compile(r"""'[^']*'|"[^"]*"|\$(\w+)""")

LONGEST_EXAMPLE = 80
"""Characters of an example value, which may be a whole text, that a sentence shows."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check and what the data showed."""

    check: Check
    count: int
    outcome: str
    """The count in words, with an example of what broke the rule."""

    @property
    def holds(self) -> bool:
        """Whether the count is one that the check allows."""
        high = self.check.high
        return self.check.low <= self.count and (high is None or self.count <= high)

    @property
    def sentence(self) -> str:
        """The rule and what was found instead."""
        return f"{self.check.title}, but {self.outcome}."


def measure(
    connection: duckdb.DuckDBPyConnection,
    gate: str,
    tables: Mapping[str, str],
    parameters: Mapping[str, Any],
) -> list[Finding]:
    """Every check of the gate with what was found; arguments and errors are those of `run_gate`.

    Where a column is missing, only the checks that all columns exist are made.
    """
    needed = required(gate, parameters)
    absent = [name for name in needed if name not in tables]
    if absent:
        raise ValueError(f"the {gate} gate also needs the tables {', '.join(absent)}")
    columns = {name: _columns(connection, gate, name, tables[name]) for name in needed}
    checks = [missing_columns(name, needed[name], columns[name]) for name in needed]
    counts = _count(connection, gate, checks, tables)
    if not any(counts):
        rules = SUITES[gate](parameters, columns)
        counts += _count(connection, gate, rules, tables)
        checks += rules
    return [
        Finding(check=check, count=count, outcome=_outcome(connection, check, count, tables))
        for check, count in zip(checks, counts, strict=True)
    ]


def _columns(connection: duckdb.DuckDBPyConnection, gate: str, name: str, relation: str) -> frozenset[str]:
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    except duckdb.Error as error:
        raise NotReady(
            f"The {gate} gate cannot read {name} at {relation} ({_first_line(error)}): "
            "run the job that writes it first."
        ) from error
    return frozenset(row[0] for row in described)


def _count(
    connection: duckdb.DuckDBPyConnection,
    gate: str,
    checks: Sequence[Check],
    tables: Mapping[str, str],
) -> list[int]:
    """The number of rows that each check counts; one query, so one scan, per source."""
    counts = [0] * len(checks)
    by_source: dict[str, list[int]] = {}
    for index, check in enumerate(checks):
        by_source.setdefault(check.source, []).append(index)
    for source, members in by_source.items():
        selected = ", ".join(f"count(*) FILTER (WHERE {checks[i].counted})" for i in members)
        try:
            row = connection.execute(_sql(f"SELECT {selected} FROM {source}", tables)).fetchone()
        except duckdb.Error as error:
            raise GateFailed(
                f"The {gate} gate cannot check {checks[members[0]].title}: {_first_line(error)}."
            ) from error
        assert row is not None  # an aggregate without GROUP BY always has one row
        for i, count in zip(members, row, strict=True):
            counts[i] = int(count)
    return counts


def _outcome(
    connection: duckdb.DuckDBPyConnection, check: Check, count: int, tables: Mapping[str, str]
) -> str:
    """What was found, in words, with the first offender in sort order as the example."""
    if check.low > 0:
        return f"{count:,} {'row was' if count == 1 else 'rows were'} found"
    broken = f"{count:,} {'row breaks' if count == 1 else 'rows break'} this rule"
    if count == 0 or not check.example:
        return broken
    # Only a failed check pays for this query.
    fields = ", ".join(f"({name})::VARCHAR" for name in check.example)
    query = f"SELECT {fields} FROM {check.source} WHERE {check.counted} ORDER BY ALL LIMIT 1"
    row = connection.execute(_sql(query, tables)).fetchone()
    assert row is not None
    shown = [
        f"{name.strip(chr(34))} {'null' if value is None else _short(value)}"
        for name, value in zip(check.example, row, strict=True)
    ]
    return f"{broken}, for example {', '.join(shown)}"


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= LONGEST_EXAMPLE else f"{line[:LONGEST_EXAMPLE]}…"


def _sql(text: str, tables: Mapping[str, str]) -> str:
    """The SQL with `$name` replaced by the relation of the table `name`, except inside quotes."""
    return _QUOTED_OR_TABLE.sub(lambda match: tables[match[1]] if match[1] else match[0], text)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
