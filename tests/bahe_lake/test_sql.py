"""Quoting: what goes into a query comes out of it unchanged."""

from __future__ import annotations

from datetime import UTC, datetime

import duckdb
from hypothesis import given
from hypothesis import strategies as st

from bahe_lake.sql import known_until, sql_identifier, sql_literal

# DuckDB refuses NUL within a query.
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(text)
def test_a_literal_is_the_text(value: str) -> None:
    assert duckdb.sql(f"SELECT {sql_literal(value)}").fetchone() == (value,)


@given(text)
def test_an_identifier_names_the_column(name: str) -> None:
    assert duckdb.sql(f"SELECT 1 AS {sql_identifier(name)}").columns == [name]


def test_a_time_without_a_zone_is_utc() -> None:
    naive, aware = datetime(2026, 1, 2, 3, 4), datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    assert duckdb.sql(f"SELECT {sql_literal(naive)} = {sql_literal(aware)}").fetchone() == (True,)


def test_freshness_cuts_time_where_serving_was_last_renewed() -> None:
    time = "TIMESTAMP '2026-01-02 03:04:05'"
    known = [
        duckdb.sql(f"SELECT {known_until(freshness, time)}").fetchone()
        for freshness in ("live", "hourly", "nightly", "nightly 03:04", "nightly 03:05")
    ]
    assert known == [
        (datetime(2026, 1, 2, 3, 4, 5),),
        (datetime(2026, 1, 2, 3),),
        (datetime(2026, 1, 2),),
        (datetime(2026, 1, 2, 3, 4),),
        (datetime(2026, 1, 1, 3, 5),),
    ]
