"""How a source's value becomes a value of the lake: one set of rules for CSV, Parquet and queries.

Each function returns SQL for the value, or for null where the source's value cannot be kept exactly as it
is written; the contract then sets the row aside. Nothing here rounds; no value depends on another row.

`expression` is SQL of the source's value and `kind` its DuckDB type. CSV is text (VARCHAR), and text in
Parquet goes through the same rules.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal, localcontext

import duckdb

from bahe_core.errors import BadInput
from bahe_lake.sql import sql_literal
from materialize.config.dataset import Table

INTEGERS = frozenset({"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"})
WIDE_INTEGERS = frozenset({"UBIGINT", "HUGEINT", "UHUGEINT"})
"""Integers of which not all fit the lake's 64 bits."""

NAMED_TYPES = {
    "text": "VARCHAR",
    "integer": "BIGINT",
    "number": "DOUBLE",
    "boolean": "BOOLEAN",
    "time": "TIMESTAMP WITH TIME ZONE",
}
"""What `types` in dataset.yaml calls the lake's types."""

_LARGEST_WHOLE = {"DOUBLE": 2**53, "FLOAT": 2**24}
"""From here on neighbours are more than 1 apart."""

_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_SUBUNIT_DIGITS = {"s": 6, "ms": 3, "us": 0}
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 9_223_372_036_000_000_000  # year 1 to what DuckDB can say

_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,6}0*)?)?"
_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_LOCAL = f"{_DATE}([ T]{_CLOCK})?"
_UTC = f"{_DATE}[ T]{_CLOCK} ?(Z|UTC|GMT)"
_OFFSET = f"{_DATE}[ T]{_CLOCK} ?[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?"
_NAMED = f"{_DATE}[ T]{_CLOCK} [A-Za-z_]+(/[A-Za-z0-9_+-]+)+"
_PLAIN_NUMBER = "[+-]?[0-9]{1,20}([.][0-9]{1,18})?"
_NUMBER = "[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]{1,3})?"

_FOLDS = (30, 60, 120)
"""Minutes by which clocks are set back."""


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Give the connection what the expressions refer to: the names of the time zones that it has."""
    connection.execute(
        "SET VARIABLE zone_names = (SELECT list(name ORDER BY name) FROM pg_timezone_names()"
        " WHERE contains(name, '/'))"
    )


def is_fraction(kind: str) -> bool:
    """Whether numbers of this type may have decimals."""
    return kind in ("DOUBLE", "FLOAT") or kind.startswith("DECIMAL")


def is_number(kind: str) -> bool:
    """Whether the type is a number."""
    return kind in INTEGERS or kind in WIDE_INTEGERS or is_fraction(kind)


def is_text(kind: str) -> bool:
    """Whether values of the type are read by the rules for text."""
    return kind == "VARCHAR" or kind.startswith("ENUM")


def text(expression: str, kind: str) -> str:
    """Words as they are written. Raises BadInput for bytes and nested values, which are none."""
    if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION", "BLOB", "BIT")):
        raise BadInput(f"is {kind}, which is no text; convert it, for example with `sql:`")
    return expression if kind == "VARCHAR" else f"{expression}::VARCHAR"


def integer(expression: str, kind: str, section: Table) -> str:
    """BIGINT, of whole numbers that are certainly exact: `7`, `7.0`; not `007`, `7e0` or `7.5`."""
    if kind in INTEGERS:
        return f"{expression}::BIGINT"
    if kind in WIDE_INTEGERS:
        return f"TRY_CAST({expression} AS BIGINT)"
    if kind in ("DOUBLE", "FLOAT"):
        return f"(CASE WHEN {_is_whole(expression, kind)} THEN {expression}::BIGINT END)"
    if kind.startswith("DECIMAL"):
        return f"(CASE WHEN {expression} = trunc({expression}) THEN TRY_CAST({expression} AS BIGINT) END)"
    if is_text(kind):
        written = text(expression, kind)
        pattern = f"(0|-?[1-9][0-9]*)([{section.csv.decimal}]0+)?"
        return f"""(CASE WHEN regexp_full_match({written}, '{pattern}')
                    THEN TRY_CAST(split_part({written}, '{section.csv.decimal}', 1) AS BIGINT) END)"""
    return _exact_cast(expression, kind, "BIGINT")


def number(expression: str, kind: str, section: Table) -> str:
    """DOUBLE, of numbers with no more digits than it keeps."""
    if not is_text(kind):
        return _exact_cast(expression, kind, "DOUBLE")
    written = _with_point(text(expression, kind), section)
    digits = f"regexp_replace(regexp_extract({written}, '^[^eE]*'), '^[^1-9]*|[^0-9]', '', 'g')"
    value = f"TRY_CAST({written} AS DOUBLE)"
    return f"""(CASE WHEN regexp_full_match({written}, '{_NUMBER}') AND length({digits}) <= 17
                AND isfinite({value}) THEN {value} END)"""


def boolean(expression: str, kind: str) -> str:
    """BOOLEAN, of `true`, `false` (in any case), 1 and 0."""
    if not is_text(kind):
        return _exact_cast(expression, kind, "BOOLEAN")
    written = text(expression, kind)
    return f"""(CASE WHEN lower({written}) IN ('true', '1') THEN true
                WHEN lower({written}) IN ('false', '0') THEN false END)"""


def clicked(expression: str, kind: str, section: Table) -> str:
    """INTEGER 0 or 1, of 0, 1, false and true. Raises BadInput for types that cannot say so."""
    if kind == "BOOLEAN":
        return f"{expression}::INTEGER"
    if is_number(kind):
        return f"(CASE WHEN {expression} IN (0, 1) THEN {expression}::INTEGER END)"
    if is_text(kind):
        written = text(expression, kind)
        return f"""(CASE WHEN regexp_full_match({written}, '[01]([{section.csv.decimal}]0+)?')
                    THEN left({written}, 1)::INTEGER
                    WHEN lower({written}) = 'true' THEN 1 WHEN lower({written}) = 'false' THEN 0 END)"""
    raise BadInput(f"is {kind}; clicks are 0 and 1, or numbers with `at_least`")


def at_least(expression: str, kind: str, threshold: float, section: Table) -> str:
    """INTEGER 1 where a rating reaches the threshold, 0 where it does not; compared digit by digit."""
    exact = Decimal(repr(threshold))
    if kind in INTEGERS or kind in WIDE_INTEGERS:
        reached = f"{expression}::HUGEINT >= {math.ceil(exact)}::HUGEINT"
        return f"(CASE WHEN {expression} IS NOT NULL THEN ({reached})::INTEGER END)"
    if kind in ("DOUBLE", "FLOAT"):
        # A FLOAT of 3.6 is not the DOUBLE of 3.6, though both are written so.
        return f"""(CASE WHEN isfinite({expression})
                    THEN ({expression} >= {threshold!r}::{kind})::INTEGER END)"""
    if kind.startswith("DECIMAL"):
        width, scale = (int(part) for part in kind.removeprefix("DECIMAL(").rstrip(")").split(","))
        with localcontext(prec=80):  # DECIMAL has up to 38 digits, Python's default 28
            bound = exact.quantize(Decimal(1).scaleb(-scale), rounding=ROUND_CEILING)
        if len(bound.as_tuple().digits) > width:
            reached = "false" if bound > 0 else "true"
        else:
            reached = f"{expression} >= CAST({sql_literal(format(bound, 'f'))} AS {kind})"
        return f"(CASE WHEN {expression} IS NOT NULL THEN ({reached})::INTEGER END)"
    if is_text(kind):
        written = _with_point(text(expression, kind), section)
        return f"""(CASE WHEN regexp_full_match({written}, '{_PLAIN_NUMBER}')
                    THEN (TRY_CAST({written} AS DECIMAL(38, 18)) >= {format(exact, "f")})::INTEGER
                    ELSE ({number(expression, kind, section)} >= {threshold!r}::DOUBLE)::INTEGER END)"""
    raise BadInput(f"is {kind}; `at_least` is for numbers")


def moment(expression: str, kind: str, section: Table) -> str:
    """TIMESTAMPTZ, of the forms that docs/growing-logs.md lists. Raises BadInput for types of no time."""
    unit = _MICROSECONDS[section.timestamp_unit]
    if kind == "TIMESTAMP WITH TIME ZONE":
        return expression
    if kind in ("TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "DATE"):
        return _utc(f"{expression}::TIMESTAMP")
    if kind == "TIMESTAMP_NS":
        return f"(CASE WHEN epoch_ns({expression}) % 1000 = 0 THEN {_utc(f'{expression}::TIMESTAMP')} END)"
    if kind in INTEGERS or kind in WIDE_INTEGERS:
        return _of_microseconds(f"TRY_CAST({expression} AS BIGINT)::HUGEINT * {unit}")
    if kind in ("DOUBLE", "FLOAT"):
        # Exact where the number is the one that is nearest to a whole count of microseconds.
        double = f"{expression}::DOUBLE"
        counted = f"round({double} * {unit})"
        return f"""(CASE WHEN abs({double} * {unit}) <= {_LAST_US} AND {counted} / {unit} = {double}
                    THEN {_of_microseconds(f"{counted}::HUGEINT")} END)"""
    if kind.startswith("DECIMAL"):
        return _since_1970(f"{expression}::VARCHAR", section)
    if is_text(kind):
        return _written_moment(text(expression, kind), section)
    raise BadInput(f"is {kind}, which is no time; give times, text or numbers since 1970")


def check_timestamp_format(connection: duckdb.DuckDBPyConnection, table: str, section: Table) -> None:
    """Raises BadInput when `timestamp_format` cannot be used, or leaves a part of the date open."""
    form = section.timestamp_format
    if form is None:
        return
    try:
        connection.execute(f"SELECT try_strptime('', {sql_literal(form)})")
    except duckdb.Error:
        raise BadInput(
            f"{table}.timestamp_format: {form} is no format; write one such as `%d/%m/%Y %H:%M:%S`."
        ) from None
    lacks = [
        part
        for part, codes in (
            ("year (%Y)", ("%Y",)),
            ("month (%m)", ("%m", "%-m", "%b", "%B")),
            ("day (%d)", ("%d", "%-d")),
        )
        if not any(code in form for code in codes)
    ]
    if lacks or "%Z" in form:
        why = f"lacks the {lacks[0]}" if lacks else "has %Z, names of zones; use %z"
        raise BadInput(f"{table}.timestamp_format: {form} {why}.")


def convert(expression: str, kind: str, wanted: str, section: Table) -> str:
    """A column that is kept as the lake's type `wanted`."""
    if kind == wanted:
        return expression
    if wanted == "VARCHAR":
        return _number_as_text(expression, kind) if kind in ("DOUBLE", "FLOAT") else text(expression, kind)
    if wanted == "BIGINT":
        return integer(expression, kind, section)
    if not is_text(kind):
        return _exact_cast(expression, kind, wanted)
    if wanted in INTEGERS or wanted in WIDE_INTEGERS:
        return f"TRY_CAST({integer(expression, kind, section)} AS {wanted})"
    if wanted in ("DOUBLE", "FLOAT"):
        return f"{number(expression, kind, section)}::{wanted}"
    if wanted.startswith("DECIMAL"):
        written = _with_point(text(expression, kind), section)
        return f"""(CASE WHEN regexp_full_match({written}, '{_PLAIN_NUMBER}')
                    AND TRY_CAST({written} AS {wanted}) = TRY_CAST({written} AS DECIMAL(38, 18))
                    THEN TRY_CAST({written} AS {wanted}) END)"""
    if wanted == "BOOLEAN":
        return boolean(expression, kind)
    if wanted.startswith("TIMESTAMP"):
        return f"{moment(expression, kind, section)}::{wanted}"
    if wanted == "DATE" and section.timestamp_format is not None:
        instant = moment(expression, kind, section)
        return f"(CASE WHEN date_trunc('day', {instant}) = {instant} THEN {instant}::DATE END)"
    return _exact_cast(expression, kind, wanted)


def _is_whole(expression: str, kind: str) -> str:
    return f"(abs({expression}) < {_LARGEST_WHOLE[kind]} AND {expression} = trunc({expression}))"


def _number_as_text(expression: str, kind: str) -> str:
    """An integer's digits where it is whole: pandas has a column of integers with gaps as doubles."""
    return f"""(CASE WHEN {_is_whole(expression, kind)} THEN {expression}::BIGINT::VARCHAR
                WHEN NOT isnan({expression}) THEN {expression}::VARCHAR END)"""


def _exact_cast(expression: str, kind: str, wanted: str) -> str:
    """The value as another type, where the way back leads to the same value."""
    cast = f"TRY_CAST({expression} AS {wanted})"
    return f"(CASE WHEN TRY_CAST({cast} AS {kind}) = {expression} THEN {cast} END)"


def _with_point(written: str, section: Table) -> str:
    """The text of a number with a point as its decimal mark; a point of its own makes it none."""
    if section.csv.decimal == ".":
        return written
    return f"translate({written}, '.,', '?.')"


def _utc(local: str) -> str:
    """A TIMESTAMP as the instant that it is in UTC; a cast says the same, thirty times slower."""
    return f"(CASE WHEN isfinite({local}) THEN make_timestamptz(epoch_us({local})) END)"


def _of_microseconds(count: str) -> str:
    return f"""(CASE WHEN {count} BETWEEN {_FIRST_US} AND {_LAST_US}
                THEN make_timestamptz(({count})::BIGINT) END)"""


def _since_1970(written: str, section: Table) -> str:
    digits = _SUBUNIT_DIGITS[section.timestamp_unit]
    count = f"(TRY_CAST({written} AS DECIMAL(38, 6)) * {_MICROSECONDS[section.timestamp_unit]})::HUGEINT"
    return f"""(CASE WHEN regexp_full_match({written}, '-?[0-9]{{1,18}}([.][0-9]{{0,{digits}}}0*)?')
                THEN {_of_microseconds(count)} END)"""


def _written_moment(written: str, section: Table) -> str:
    if section.timestamp_format is not None:
        parsed = f"try_strptime({written}, {sql_literal(section.timestamp_format)})"
        return parsed if "%z" in section.timestamp_format else _utc(parsed)
    # Never a cast to TIMESTAMPTZ: a zone named in one row would hold for the rows after it as well.
    local = f"TRY_CAST(regexp_extract({written}, '^{_LOCAL}') AS TIMESTAMP)"
    offset = f"regexp_extract({written}, '[+-][0-9]{{2}}:?([0-9]{{2}})?$')"
    past_the_hour = f"TRY_CAST(regexp_extract({offset}, '^.[0-9]{{2}}:?([0-9]{{2}})$', 1) AS INTEGER)"
    minutes = f"(60 * substr({offset}, 2, 2)::INTEGER + coalesce({past_the_hour}, 0))"
    east = f"(CASE WHEN left({offset}, 1) = '-' THEN -1 ELSE 1 END * {minutes})"
    return f"""(CASE
        WHEN regexp_full_match({written}, '{_LOCAL}') THEN {_utc(f"TRY_CAST({written} AS TIMESTAMP)")}
        WHEN regexp_full_match({written}, '{_UTC}') THEN {_utc(local)}
        WHEN regexp_full_match({written}, '{_OFFSET}') THEN {_utc(f"({local} - to_minutes({east}))")}
        WHEN regexp_full_match({written}, '{_NAMED}') THEN {_in_zone(written, local)}
        ELSE {_since_1970(_with_point(written, section), section)} END)"""


def _in_zone(written: str, local: str) -> str:
    """A local time where the named zone has it exactly once: not while clocks are set forward or back."""
    zone = f"split_part({written}, ' ', -1)"
    instant = f"timezone({zone}, {local})"
    again = " AND ".join(
        f"timezone({zone}, {instant} {sign} to_minutes({minutes})) <> {local}"
        for minutes in _FOLDS
        for sign in "+-"
    )
    return f"""(CASE WHEN list_contains(getvariable('zone_names'), {zone})
                AND timezone({zone}, {instant}) = {local} AND {again} THEN {instant} END)"""
