"""Values of typed columns, against Python's decimal and datetime; the files are Arrow's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bahe_lake.blank import blank
from bahe_lake.versions import LATEST_ITEMS
from materialize.config.dataset import Table
from materialize.ingest import values
from tests.support.written_values import EPOCH, INVISIBLE, blanks, words

FIRST, LAST = datetime(1981, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}
cases = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute("SET TimeZone = 'UTC'")
        values.prepare(opened)
        yield opened


def through_parquet(
    connection: duckdb.DuckDBPyConnection, folder: Path, column: pa.Array, rule: Any, *more: Any
) -> list[Any]:
    """What a rule makes of a column, read from a Parquet file; times as microseconds since 1970."""
    path = folder / f"{uuid.uuid4().hex}.parquet"  # DuckDB knows a file again by its path and second
    pq.write_table(pa.table({"v": column}), path)
    ((_, kind, *_),) = connection.execute(f"DESCRIBE SELECT v FROM '{path}'").fetchall()
    sql = rule("v", kind, *more)
    shown = f"epoch_us({sql})" if rule is values.moment else sql
    return [value for (value,) in connection.execute(f"SELECT {shown} FROM '{path}'").fetchall()]


def micros(seconds: Decimal | None) -> int | None:
    """Whole microseconds of an exact number of seconds; none where it is finer, or no time."""
    if seconds is None or not seconds.is_finite():
        return None
    count = seconds * 1_000_000
    return int(count) if count == count.to_integral_value() else None


@cases
@given(
    unit=st.sampled_from(["s", "ms", "us"]),
    kind=st.sampled_from(
        [pa.int32(), pa.int64(), pa.uint32(), pa.uint64(), pa.float64(), pa.decimal128(24, 7), pa.string()]
    ),
    instants=st.lists(
        st.one_of(st.none(), st.datetimes(FIRST.replace(tzinfo=None), LAST.replace(tzinfo=None))),
        min_size=10,
    ),
    finer=st.lists(st.sampled_from(["0", "0.5", "0.25", "0.1"]), min_size=1),
)
def test_numbers_are_times_since_1970(
    unit: str,
    kind: pa.DataType,
    instants: list[datetime | None],
    finer: list[str],
    connection: duckdb.DuckDBPyConnection,
    tmp_path: Path,
) -> None:
    counted: list[Any] = []
    wanted: list[int | None] = []
    for index, instant in enumerate(instants):
        if instant is None:
            counted, wanted = [*counted, None], [*wanted, None]
            continue
        whole = (instant.replace(tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
        number = Decimal(whole) * UNITS[unit] / 1_000_000
        if pa.types.is_integer(kind):
            number = Decimal(int(number))
            if kind in (pa.int32(), pa.uint32()):
                number %= 2**31
        elif pa.types.is_floating(kind):
            number = Decimal(repr(float(number)))  # what is written is the shortest text of the double
        else:
            number = number.quantize(Decimal("1e-6")) + Decimal(finer[index % len(finer)])
        wanted.append(micros(number / UNITS[unit]))
        written: Any = int(number) if pa.types.is_integer(kind) else number
        if pa.types.is_floating(kind):
            written = float(number)
        counted.append(str(number) if kind == pa.string() else written)
    section = Table(files="x.parquet", timestamp_unit=unit)
    got = through_parquet(connection, tmp_path, pa.array(counted, kind), values.moment, section)
    assert got == wanted


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_times_of_every_unit(
    unit: str, zone: str | None, connection: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    counts = [1_704_448_800 * scale, None, 0, 1_704_448_800 * scale + scale // 2]
    column = pa.array(counts, pa.timestamp(unit, zone))
    got = through_parquet(connection, tmp_path, column, values.moment, Table(files="x.parquet"))
    assert got == [None if count is None else count * 10**6 // scale for count in counts]


def test_dates_are_midnights_and_single_nanoseconds_are_refused(
    connection: duckdb.DuckDBPyConnection, tmp_path: Path
) -> None:
    section = Table(files="x.parquet")
    days = pa.array([date(2024, 1, 5), None], pa.date32())
    assert through_parquet(connection, tmp_path, days, values.moment, section) == [
        1_704_412_800_000_000,
        None,
    ]
    fine = pa.array([1_704_448_800_000_000_001, 1_704_448_800_000_001_000], pa.timestamp("ns"))
    assert through_parquet(connection, tmp_path, fine, values.moment, section) == [
        None,
        1_704_448_800_000_001,
    ]


@cases
@given(
    kind=st.sampled_from(
        [pa.int8(), pa.int64(), pa.uint16(), pa.uint64(), pa.float64(), pa.decimal128(30, 2)]
    ),
    numbers=st.lists(
        st.one_of(
            st.none(),
            st.integers(-(2**64), 2**64).map(Decimal),
            st.integers(-(2**55), 2**55).map(Decimal),
            st.integers(-1000, 1000).map(lambda number: Decimal(number) / 4),
        ),
        min_size=15,
    ),
)
def test_ids_are_integers_that_are_certainly_exact(
    kind: pa.DataType,
    numbers: list[Decimal | None],
    connection: duckdb.DuckDBPyConnection,
    tmp_path: Path,
) -> None:
    written: list[Any] = []
    wanted: list[int | None] = []
    for number in numbers:
        value = number
        if value is not None and pa.types.is_integer(kind):
            low = 0 if pa.types.is_unsigned_integer(kind) else -(2 ** (kind.bit_width - 1))
            value = Decimal(low + int(value) % 2**kind.bit_width)
        elif value is not None and pa.types.is_floating(kind):
            value = Decimal(float(value))
        whole = value is not None and value == value.to_integral_value()
        sure = not pa.types.is_floating(kind) or (value is not None and abs(value) < 2**53)
        fits = value is not None and -(2**63) <= value < 2**63
        wanted.append(int(value) if value is not None and whole and sure and fits else None)
        written.append(
            None
            if value is None
            else int(value)
            if pa.types.is_integer(kind)
            else float(value)
            if pa.types.is_floating(kind)
            else value
        )
    section = Table(files="x.parquet")
    assert through_parquet(connection, tmp_path, pa.array(written, kind), values.integer, section) == wanted


@cases
@given(
    threshold=st.sampled_from([4, 3.6, 0.5, -1, 1000.0]),
    kind=st.sampled_from([pa.int8(), pa.float32(), pa.float64(), pa.decimal128(5, 2), pa.string()]),
    stars=st.lists(
        st.one_of(st.none(), st.integers(-50, 500).map(lambda n: Decimal(n) / 100)), min_size=20
    ),
)
def test_a_rating_is_compared_as_it_is_written(
    threshold: float,
    kind: pa.DataType,
    stars: list[Decimal | None],
    connection: duckdb.DuckDBPyConnection,
    tmp_path: Path,
) -> None:
    if kind == pa.int8():
        stars = [None if star is None else Decimal(int(star)) for star in stars]
    convert = {pa.int8(): int, pa.float32(): float, pa.float64(): float, pa.string(): str}.get(
        kind, Decimal
    )
    column = pa.array([None if star is None else convert(star) for star in stars], kind)
    got = through_parquet(
        connection, tmp_path, column, values.at_least, float(threshold), Table(files="x.parquet")
    )
    assert got == [None if star is None else int(star >= Decimal(str(threshold))) for star in stars]


@given(st.one_of(blanks, words))
def test_blank_is_what_shows_nothing(text: str) -> None:
    row = duckdb.execute(f"SELECT {blank('t')} FROM (SELECT ?::VARCHAR AS t)", [text]).fetchone()
    assert row == (all(character in INVISIBLE for character in text),)


def test_the_latest_version_of_an_item_is_how_it_is_now() -> None:
    with duckdb.connect() as opened:
        opened.execute(
            "CREATE TABLE items AS FROM (VALUES (1, DATE '2024-01-01', 'a'), (1, DATE '2024-01-03', 'c'),"
            " (2, DATE '2024-01-02', 'b'), (1, DATE '2024-01-02', 'x')) t(item_id, event_timestamp, text)"
        )
        rows = opened.execute(f"SELECT item_id, text FROM {LATEST_ITEMS} ORDER BY item_id").fetchall()
    assert rows == [(1, "c"), (2, "b")]
