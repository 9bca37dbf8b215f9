"""What is derived night by night is what is derived at once, and a row that stays keeps its date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from materialize.ingest import derive, rewind

CHANNELS = ["seen", "bought"]
START = datetime(2024, 1, 1, tzinfo=UTC)
TABLES = {
    "user_timeline": "user_id, channel, position",
    "timeline_length": "user_id, event_timestamp",
    **{
        f"{entity}_stats{suffix}": f"{entity}_id, event_timestamp"
        for entity in ("user", "item")
        for suffix in ("", "_7d", "_30d")
    },
}
Rows = dict[tuple[Any, ...], object]

# Few users and instants, so that batches meet at one instant; days that are exactly a window apart.
user, item = st.integers(0, 3), st.integers(0, 2)
moment = st.builds(
    lambda day, offset: START + timedelta(days=day, microseconds=offset),
    st.sampled_from([0, 1, 2, 7, 8, 9, 30, 31, 37, 60]),
    st.sampled_from([-1, 0, 0, 1]),
)
behavior = st.tuples(user, st.sampled_from(CHANNELS), st.integers(0, 30), moment)
impression = st.tuples(user, item, moment, st.integers(0, 1))
batch = st.tuples(st.lists(behavior, max_size=30), st.lists(impression, max_size=12))


@contextmanager
def log() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(
            "CREATE TABLE behaviors (user_id BIGINT, channel VARCHAR, atom_id BIGINT,"
            " event_timestamp TIMESTAMPTZ, item_id BIGINT)"
        )
        connection.execute(
            "CREATE TABLE impressions (impression_id BIGINT, user_id BIGINT, item_id BIGINT,"
            " event_timestamp TIMESTAMPTZ, clicked INTEGER)"
        )
        connection.execute("CREATE TABLE items (item_id BIGINT, text VARCHAR, event_timestamp TIMESTAMPTZ)")
        connection.execute("CREATE TABLE atoms (atom_id BIGINT, text VARCHAR)")
        yield connection


def add(
    connection: duckdb.DuckDBPyConnection, behaviors: list[tuple], impressions: list[tuple], *, anew: bool
) -> None:
    """Add what is not there yet, note it as `ingest` does, and derive, in one transaction."""
    connection.execute("BEGIN")
    derive.prepare(connection)
    have = set(
        connection.execute("SELECT user_id, channel, atom_id, event_timestamp FROM behaviors").fetchall()
    )
    new = [row for row in dict.fromkeys(behaviors) if row not in have]
    if new:
        connection.executemany("INSERT INTO behaviors VALUES (?, ?, ?, ?, NULL)", new)
        since = {u: min(row[3] for row in new if row[0] == u) for u, *_ in new}
        connection.executemany("INSERT INTO changed_users VALUES (?, ?)", list(since.items()))
    if impressions:
        first = connection.execute("SELECT count(*) FROM impressions").fetchall()[0][0]
        connection.executemany(
            "INSERT INTO impressions VALUES (?, ?, ?, ?, ?)",
            [(first + i, *row) for i, row in enumerate(impressions)],
        )
        connection.execute(
            "INSERT INTO changed_impressions VALUES (?)", [min(row[2] for row in impressions)]
        )
    derive.derive(connection, CHANNELS, anew=anew)
    connection.execute("COMMIT")


def contents(connection: duckdb.DuckDBPyConnection) -> dict[str, Rows]:
    """Of each table the rows, each with the date of its making."""
    found = {}
    for table, key in TABLES.items():
        made = "NULL" if table == "user_timeline" else "created_timestamp"
        shown = "*" if table == "user_timeline" else "* EXCLUDE (created_timestamp)"
        rows = connection.execute(f"SELECT {made}, {shown} FROM {table} ORDER BY {key}").fetchall()
        found[table] = {
            tuple(tuple(v) if isinstance(v, list) else v for v in row[1:]): row[0] for row in rows
        }
        assert len(found[table]) == len(rows)
    return found


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewind, "PART_ROWS", 15)


@settings(max_examples=14, deadline=None, suppress_health_check=list(HealthCheck))
@given(batches=st.lists(batch, min_size=2, max_size=4), repeat=st.integers(0, 3))
def test_night_by_night_is_at_once(batches: list[tuple[list, list]], repeat: int) -> None:
    # Behaviors of an earlier batch come again in the last one.
    batches = [*batches, (batches[repeat % len(batches)][0], [])]
    with log() as by_night, log() as at_once:
        before: dict[str, Rows] | None = None
        for index, (behaviors, impressions) in enumerate(batches):
            add(by_night, behaviors, impressions, anew=index == 0)
            now = contents(by_night)
            for table, rows in (before or {}).items():
                stayed = rows.keys() & now[table].keys()
                assert {row: rows[row] for row in stayed} == {row: now[table][row] for row in stayed}, table
            before = now
        add(
            at_once,
            [row for behaviors, _ in batches for row in behaviors],
            [row for _, impressions in batches for row in impressions],
            anew=True,
        )
        wanted = contents(at_once)
        for table in TABLES:
            assert list(now[table]) == list(wanted[table]), table


def test_a_late_event_moves_only_what_follows_it() -> None:
    def at(day: int) -> datetime:
        return START + timedelta(days=day)

    with log() as connection:
        old = [(u, channel, day, at(day)) for u in (0, 1) for channel in CHANNELS for day in (1, 3, 5)]
        add(connection, old, [(0, 0, at(2), 1), (1, 1, at(4), 0)], anew=True)
        before = contents(connection)
        add(connection, [(0, "seen", 9, at(2))], [], anew=False)
        after = contents(connection)
        gone = {table: sorted(before[table].keys() - after[table].keys()) for table in TABLES}
        assert gone["user_timeline"] == [(0, "seen", 1, 3, at(3)), (0, "seen", 2, 5, at(5))]
        assert len(gone["timeline_length"]) == 2
        assert not any(rows for table, rows in gone.items() if "stats" in table)
        made = {*before["timeline_length"].values()}
        assert len(made) == 1
        assert sum(when in made for when in after["timeline_length"].values()) == 4


def test_a_new_day_touches_nothing_of_before() -> None:
    with log() as connection:
        add(
            connection,
            [(0, "seen", 1, START)],
            [(0, 0, START, 1), (1, 1, START + timedelta(days=1), 0)],
            anew=True,
        )
        before = contents(connection)
        later = START + timedelta(days=2)
        add(connection, [(0, "seen", 2, later)], [(0, 1, later, 1)], anew=False)
        after = contents(connection)
        for table in ("user_timeline", "timeline_length", "user_stats", "item_stats"):
            assert before[table].items() <= after[table].items(), table
        # A window's end that was foreseen changes, for who was shown something since.
        gone = before["user_stats_7d"].keys() - after["user_stats_7d"].keys()
        assert {row[0] for row in gone} == {0}
