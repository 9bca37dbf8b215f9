"""A log that grows: only what is new is read, and what is bad is set aside until it is corrected."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
import yaml

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.catalogue import columns, scalar
from bahe_lake.connection import lake
from materialize.config.dataset import load_dataset
from materialize.ingest import rewind
from materialize.ingest.ingest import ingest
from materialize.ingest.quarantine import quarantined, released
from materialize.ingest.sources import find_sources
from tests.support.cli import call
from tests.support.logs import small_log, write_dataset

Log = dict[str, pd.DataFrame]


def write_days(folder: Path, days: list[Log], **more: object) -> Path:
    """Each day a file of each table, under one glob; a file that is there stays as it is."""
    for day, log in enumerate(days):
        for table, rows in log.items():
            (folder / table).mkdir(parents=True, exist_ok=True)
            if not (folder / table / f"{day}.parquet").exists():
                rows.to_parquet(folder / table / f"{day}.parquet")
    tables = {table: {"files": f"{table}/*.parquet"} for table in days[0]}
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "channels": ["liked", "disliked"], **tables, **more}))
    return path


def edit(path: Path, **more: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | more))


def contents(home: Home) -> dict[str, list[tuple[Any, ...]]]:
    """Every table of the log and what is derived from it, but not when it was."""
    found = {}
    with lake(home) as connection:
        for (table,) in connection.execute("SHOW TABLES").fetchall():
            if table not in ("runs", "sources"):
                names = ", ".join(sorted(columns(connection, table).keys() - {"created_timestamp"}))
                found[table] = connection.execute(f"SELECT {names} FROM {table} ORDER BY ALL").fetchall()
    return found


def facts(home: Home) -> runs.Run:
    with lake(home) as connection:
        last = runs.last(connection, "ingest")
    assert last is not None
    return last


def answer(home: Home, query: str) -> list[tuple[Any, ...]]:
    with lake(home) as connection:
        return connection.execute(query).fetchall()


def in_days(log: Log, cuts: list[int]) -> list[Log]:
    """Behaviors and impressions cut by row; items and users are known from the first day."""
    days = []
    for low, high in zip([0, *cuts], [*cuts, len(log["impressions"])], strict=True):
        part = {t: log[t].iloc[low:high] for t in ("behaviors", "impressions")}
        days.append(part | {t: log[t].head(None if low == 0 else 0) for t in ("items", "users")})
    return days


@pytest.mark.slow
def test_days_in_any_order_make_the_same_lake(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = small_log(rows=300, users=6)
    days = in_days(log, [100, 150, 200])
    # The second day comes last, and with it much of the first one again.
    late = {t: pd.concat([days[0][t].tail(40), days[1][t]]) for t in ("behaviors", "impressions")}
    days = [days[0], days[2], days[3], days[1] | late]
    with monkeypatch.context() as patch:
        patch.setattr(rewind, "PART_ROWS", 100)  # several parts, each of which may delete and add
        for night in range(4):
            done = ingest(home, write_days(tmp_path / "log", days[: night + 1]))
    assert done.added == {
        "behaviors": 50,
        "impressions": 50,
        "items": 0,
        "users": 0,
        "atoms": done.added["atoms"],
    }
    assert done.duplicates == {"behaviors": 40, "impressions": 40}
    whole = Home.at(tmp_path / "whole")
    ingest(whole, write_dataset(tmp_path / "at_once", log))
    assert contents(home) == contents(whole)


def test_only_new_files_are_read(tmp_path: Path, home: Home) -> None:
    days = in_days(small_log(rows=300), [100, 200])
    path = write_days(tmp_path / "log", days[:2])
    ingest(home, path)
    read = facts(home)
    old = tmp_path / "log" / "behaviors" / "0.parquet"
    os.utime(old)
    assert not ingest(home, path).skipped  # it may be another, so it is read: nothing in it is new
    assert facts(home).fingerprint == read.fingerprint  # and no job has to act on it
    stat = old.stat()
    old.write_bytes(b"x" * stat.st_size)  # unreadable, and looks as it did
    os.utime(old, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ingest(home, path).skipped
    for table, rows in days[2].items():
        rows.to_parquet(tmp_path / "log" / table / "2.parquet")
    assert ingest(home, path).added["behaviors"] == 100
    assert facts(home).facts["read"] == {"items": 0, "users": 0, "behaviors": 100, "impressions": 100}
    assert facts(home).fingerprint != read.fingerprint


def test_a_corrupt_file_in_the_middle_is_named(tmp_path: Path, home: Home) -> None:
    days = in_days(small_log(rows=300), [100, 200])
    path = write_days(tmp_path / "log", days)
    middle = tmp_path / "log" / "impressions" / "1.parquet"
    good = middle.read_bytes()
    middle.write_bytes(good[: len(good) // 2])
    with pytest.raises(BadInput, match=r"impressions: .*/impressions/1.parquet cannot be read"):
        ingest(home, path)
    # A page is damaged, the footer is whole.
    middle.write_bytes(good[:4] + bytes(b ^ 0xFF for b in good[4:400]) + good[400:])
    with pytest.raises(BadInput, match=r"impressions: .*/impressions/1.parquet cannot be read"):
        ingest(home, path)
    assert not (home.root / "dataset.yaml").exists()
    middle.write_bytes(good)
    assert ingest(home, path).totals["impressions"] == 300


def test_columns_come_and_go(tmp_path: Path, home: Home) -> None:
    days = in_days(small_log(rows=300), [100, 200])
    days[0]["items"] = days[0]["items"].assign(shelf=7)
    # Integers with a gap, which pandas writes as floats.
    more = days[0]["items"].head(2).assign(item_id=[77, 79], price=2.5, shelf=[8.0, None])
    days[1]["items"] = more
    days[1]["users"] = days[0]["users"].head(1).assign(user_id="u77", city="Lyon")
    days[1]["impressions"] = days[1]["impressions"].assign(device="tv")
    days[2]["items"] = days[0]["items"].head(1).assign(item_id=78).drop(columns="shelf")
    ingest(home, write_days(tmp_path / "log", days[:1]))
    impressions = {"files": "impressions/*.parquet", "context": ["device"]}
    ingest(home, write_days(tmp_path / "log", days[:2], impressions=impressions))
    ingest(home, write_days(tmp_path / "log", days, impressions=impressions))
    assert answer(
        home, "SELECT item_id, shelf, price FROM items WHERE price IS NOT NULL OR item_id > 70 ORDER BY 1"
    ) == [
        (77, 8, 2.5),
        (78, None, None),
        (79, None, 2.5),
    ]
    assert answer(home, "SELECT count(*), count(city) FROM users") == [(32, 1)]
    assert answer(
        home, "SELECT context_device, count(*) FROM impressions GROUP BY 1 ORDER BY 1 NULLS LAST"
    ) == [
        ("tv", 100),
        (None, 200),
    ]
    whole = Home.at(tmp_path / "whole")
    ingest(whole, tmp_path / "log" / "dataset.yaml")
    assert contents(whole) == contents(home)


def spoil(log: Log, changes: dict[tuple[str, int, str], object]) -> Log:
    spoilt = dict(log)
    for (table, row, column), value in changes.items():
        frame = spoilt[table].astype({column: object}) if value is None else spoilt[table].copy()
        frame.loc[row, column] = value  # type: ignore[index, assignment]
        spoilt[table] = frame
    return spoilt


def test_bad_rows_are_set_aside_until_they_are_corrected(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=600)
    bad = spoil(
        log,
        {
            ("behaviors", 5, "text"): "  ",
            ("behaviors", 6, "channel"): "loved",
            ("behaviors", 7, "event_timestamp"): pd.Timestamp("1970-01-20", tz="UTC"),
            ("impressions", 8, "event_timestamp"): pd.Timestamp.now("UTC") + pd.Timedelta(days=2),
            ("impressions", 9, "clicked"): 7,
            ("impressions", 10, "item_id"): 999,
            ("impressions", 11, "impression_id"): 12,
        },
    )
    path = write_dataset(tmp_path / "log", bad)
    with pytest.raises(
        BadInput, match=r"behaviors, row 6: text is missing.*; 3 of 600 rows break the contract"
    ):
        ingest(home, path)
    assert not (home.root / "dataset.yaml").exists()
    edit(path, quarantine={"max_share": 0.02})
    said = call("ingest", path, home=home)
    assert "set aside: 3 behaviors, 5 impressions; `bahe quarantine` shows them" in said.output
    assert "gate ingest: passed" in said.output
    assert answer(home, "SELECT count(*) FROM behaviors") == [(597,)]
    assert answer(home, "SELECT count(*) FROM impressions") == [(595,)]
    told = {(held.table, held.rule): held for held in quarantined(home)}
    assert {key: held.rows for key, held in told.items()} == {
        ("behaviors", "no text"): 1,
        ("behaviors", "unknown channel"): 1,
        ("behaviors", "time too early"): 1,
        ("impressions", "time in the future"): 1,
        ("impressions", "no click value"): 1,
        ("impressions", "unknown item"): 1,
        ("impressions", "impression_id twice"): 2,
    }
    (example,) = told["impressions", "unknown item"].examples
    assert example["source"] == str(tmp_path / "log" / "impressions.parquet")
    assert (example["row_number"], example["row"]["item_id"]) == (11, 999)
    assert example["reason"] == "item_id 999 is not in items; add it there with a text"
    shown = call("quarantine", home=home)
    assert "unknown item" in shown.output
    as_json = json.loads(call("quarantine", "--json", home=home).stdout)
    assert sum(group["rows"] for group in as_json) == 8
    assert ingest(home, path).skipped
    # The item becomes known: its impression enters, though its file is as it was.
    another = log["items"].tail(1).assign(item_id=999)
    log["items"] = pd.concat([log["items"], another], ignore_index=True)
    log["items"].to_parquet(tmp_path / "log" / "items.parquet")
    assert ingest(home, path).added["impressions"] == 1
    assert answer(home, "SELECT item_id FROM impressions WHERE impression_id = 10") == [(999,)]
    # The rest is corrected.
    log["impressions"].loc[10, "item_id"] = 999
    write_dataset(tmp_path / "log", log)
    assert ingest(home, path).totals["impressions"] == 600
    assert quarantined(home) == []
    whole = Home.at(tmp_path / "whole")
    ingest(whole, path)
    assert contents(home) == contents(whole)


def test_a_row_that_contradicts_the_lake_is_set_aside(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=300)
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)
    before = contents(home)
    changed = spoil(log, {("impressions", 3, "clicked"): 1 - log["impressions"].loc[3, "clicked"]})
    changed = spoil(changed, {("items", 4, "text"): "another title"})
    write_dataset(tmp_path / "log", changed)
    done = ingest(home, path)
    assert done.quarantined == {"items": 1, "impressions": 1}
    after = contents(home)
    after.pop("quarantine")
    (of_impression, of_item) = answer(home, "SELECT rule, reason, row FROM quarantine ORDER BY ALL")
    assert of_impression[0] == "impression_id changed"
    assert of_impression[1].startswith("impression_id 3 is in the lake already with other values: {")
    # Both are shown: the lake's row in the reason, the file's beside it.
    assert (
        json.loads(of_impression[1].partition(": ")[2])["clicked"] == log["impressions"].loc[3, "clicked"]
    )
    assert json.loads(of_impression[2])["clicked"] == 1 - log["impressions"].loc[3, "clicked"]
    assert of_item[0] == "item_id changed"
    assert json.loads(of_item[1].partition(": ")[2])["text"] == log["items"].loc[4, "text"]
    before.pop("quarantine")
    assert after == before


@pytest.mark.parametrize("unit", ["s", "us"])
def test_a_wrong_unit_is_a_clock_that_jumps(unit: str, tmp_path: Path, home: Home) -> None:
    log = small_log(rows=300)
    for table in ("behaviors", "impressions", "items", "users"):
        log[table]["event_timestamp"] = (
            log[table]["event_timestamp"].astype("datetime64[ms, UTC]").astype("int64")
        )
    path = write_dataset(tmp_path / "log", log)
    spec = yaml.safe_load(path.read_text())
    for table in log:
        spec[table]["timestamp_unit"] = unit
    path.write_text(yaml.safe_dump(spec))
    words = "lies in the future" if unit == "s" else "lies before 1980"
    with pytest.raises(BadInput, match=rf"items, row 1: event_timestamp \d+ {words}.*timestamp_unit"):
        ingest(home, path)


def test_csv_ids_are_what_the_lake_has(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=300, users=8)
    for table in ("behaviors", "impressions"):
        log[table]["user_id"] = "00" + log[table]["user_id"].str[1:]
    del log["users"]
    log["behaviors"].loc[0, "user_id"] = "x1"  # so that the first file's users are strings
    log["impressions"].loc[0, "user_id"] = "x1"
    folder = tmp_path / "log"
    path = write_dataset(folder, log)
    for table in ("behaviors", "impressions"):
        log[table].to_csv(folder / f"{table}-0.csv", index=False)
        edit(path, **{table: {"files": f"{table}-*.csv"}})
    ingest(home, path)
    more = log["behaviors"].tail(3).assign(user_id="007", item_id=["1", "2", "many"], text="new")
    more.to_csv(folder / "behaviors-1.csv", index=False)
    log["impressions"].head(0).to_csv(folder / "impressions-1.csv", index=False)  # a day without any
    edit(path, quarantine={"max_share": 0.5})
    done = ingest(home, path)
    assert (done.added["behaviors"], done.quarantined) == (2, {"behaviors": 1})
    assert answer(home, "SELECT user_id FROM behaviors JOIN atoms USING (atom_id) WHERE text = 'new'") == [
        ("007",),
        ("007",),
    ]
    (held,) = quarantined(home)
    assert held.examples[0]["reason"] == "item_id many is not exactly BIGINT, as the lake has it"


@pytest.mark.parametrize("form", ["seconds", "text"])
def test_a_time_in_the_future_leaves_quarantine_when_it_has_come(
    form: str, tmp_path: Path, home: Home
) -> None:
    log = small_log(rows=100)
    moment = pd.Timestamp.now("UTC").floor("s") + pd.Timedelta("30D")
    log["behaviors"].loc[3, "event_timestamp"] = moment
    if form == "seconds":
        log["behaviors"]["event_timestamp"] = (
            log["behaviors"]["event_timestamp"].dt.as_unit("s").astype("int64")
        )
    else:
        log["behaviors"]["event_timestamp"] = log["behaviors"]["event_timestamp"].astype(str)
    path = write_dataset(tmp_path / "log", log, quarantine={"max_share": 0.1})
    assert ingest(home, path).quarantined == {"behaviors": 1}
    with lake(home) as connection:
        files = [
            released(
                connection, "behaviors", (moment + pd.Timedelta(days, "D")).to_pydatetime(), new_items=False
            )
            for days in (-1, 1)
        ]
    assert files == [set(), {str(tmp_path / "log" / "behaviors.parquet")}]


@pytest.mark.parametrize(
    ("query", "is_the_same"),
    [
        ("SELECT * FROM 'items.parquet' JOIN read_csv('more.csv') USING (item_id), range(3)", True),
        (
            "SELECT 'from postgres_scan(' || now_at AS text FROM read_parquet('items.parquet') -- now()",
            True,
        ),
        ("SELECT * FROM postgres_scan('dbname=shop', 'public', 'items')", False),
        ("SELECT * FROM 'items.parquet' JOIN sqlite_query('shop.db', 'SELECT 1') USING (item_id)", False),
        ("SELECT *, now() AS event_timestamp FROM 'items.parquet'", False),
        ("SELECT * FROM 'items.parquet' WHERE since < CURRENT_DATE", False),
        ("SELECT gen_random_uuid() AS item_id, * FROM 'items.parquet'", False),
        ("SELECT * FROM 's3://shop/items.parquet'", False),
    ],
)
def test_a_query_of_which_files_do_not_tell_is_read_every_time(
    query: str, is_the_same: bool, tmp_path: Path
) -> None:
    path = write_dataset(tmp_path / "log", small_log(rows=50))
    edit(path, items={"sql": query})
    sections = {"items": load_dataset(path).items}
    with duckdb.connect() as connection:
        first, second = (find_sources(connection, sections, path.parent)["items"].spec for _ in range(2))
    assert (first == second) == is_the_same


def test_a_query_is_read_whole_when_its_files_change(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=300)
    path = write_dataset(tmp_path / "log", log)
    (tmp_path / "elsewhere").mkdir()
    elsewhere = tmp_path / "elsewhere" / "behaviors.parquet"
    log["behaviors"].head(200).to_parquet(elsewhere)
    # A slash that is no path does no harm.
    edit(path, behaviors={"sql": f"SELECT * FROM '{elsewhere}' WHERE split_part(text, '/', 1) <> './'"})
    assert ingest(home, path).added["behaviors"] == 200
    assert ingest(home, path).skipped
    log["behaviors"].to_parquet(elsewhere)
    done = ingest(home, path)
    assert (done.added["behaviors"], done.duplicates) == (100, {"behaviors": 200})
    edit(path, behaviors={"sql": "SELECT * FROM nowhere"})
    with pytest.raises(BadInput, match=r"behaviors: behaviors.sql cannot be read: Catalog Error"):
        ingest(home, path)


def test_an_old_lake_is_derived_anew(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dataset(tmp_path / "log", small_log(rows=300))
    ingest(home, path)
    before = contents(home)
    with lake(home) as connection:
        connection.execute("UPDATE user_stats SET user_clicks = 0")
        assert scalar(connection, "SELECT sum(user_clicks) FROM user_stats") == 0
    assert ingest(home, path).skipped
    monkeypatch.setattr("materialize.ingest.derive.VERSION", 99)
    done = ingest(home, path)
    assert not done.skipped
    assert set(done.added.values()) == {0}
    assert contents(home) == before
