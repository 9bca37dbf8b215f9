"""Columns of the log's own that come late, that a file lacks, or that have no value or another type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import lake
from feature_repo.store import apply, open_store
from materialize.ingest.ingest import ingest
from materialize.ingest.quarantine import quarantined
from tests.support.logs import small_log, write_dataset

Log = dict[str, pd.DataFrame]


def answer(home: Home, query: str) -> list[tuple[Any, ...]]:
    with lake(home) as connection:
        return connection.execute(query).fetchall()


def edit(path: Path, table: str, **section: object) -> None:
    spec = yaml.safe_load(path.read_text())
    spec[table] = {**spec[table], **section}
    path.write_text(yaml.safe_dump(spec))


@pytest.fixture
def log() -> Log:
    return small_log(rows=80, users=6, items=8)


def test_context_of_a_csv_is_what_a_request_says(tmp_path: Path, home: Home, log: Log) -> None:
    """pandas writes 7 as `7.0` where others are missing, and true as `True`; requests have 7 and true."""
    written = ["7.0", "7", "0.50", "True", "true", "007", "1.0.0", "7e0", "x", ""] * 8
    log["impressions"]["slot"] = written
    path = write_dataset(tmp_path / "log", log)
    log["impressions"].to_csv(tmp_path / "log" / "impressions.csv", index=False)
    edit(path, "impressions", files="impressions.csv", context=["slot"])
    edit(path, "impressions", types={"impression_id": "integer"})
    ingest(home, path)
    query = "SELECT context_slot FROM impressions WHERE impression_id < 10 ORDER BY impression_id"
    seen = ["7", "7", "0.50", "true", "true", "007", "1.0.0", "7e0", "x", None]
    assert [value for (value,) in answer(home, query)] == seen
    as_text = Home.at(tmp_path / "as-text")
    edit(path, "impressions", types={"impression_id": "integer", "slot": "text"})
    ingest(as_text, path)
    assert [value for (value,) in answer(as_text, query)] == [*written[:9], None]


def test_doubles_that_are_to_be_text_are_integers(tmp_path: Path, home: Home, log: Log) -> None:
    for table in ("items", "impressions"):
        log[table]["item_id"] = log[table]["item_id"].astype(str)
    log["behaviors"]["item_id"] = log["behaviors"]["item_id"].where(log["behaviors"].index > 3)
    path = write_dataset(tmp_path / "log", log)
    edit(path, "behaviors", types={"item_id": "text"})
    ingest(home, path)
    assert answer(home, "SELECT count(item_id) FROM behaviors SEMI JOIN items USING (item_id)") == [(76,)]


@pytest.mark.parametrize("late_first", [False, True])
def test_an_attribute_that_comes_late_is_filled_in(
    late_first: bool, tmp_path: Path, home: Home, log: Log
) -> None:
    """Whichever file comes first, and in one night as in two."""
    priced = log["items"].assign(price=1.5)
    some = priced.assign(price=priced["price"].where(priced.index > 4))
    nights = [log["items"], some, priced]
    for number, items in enumerate(nights[::-1] if late_first else nights):
        path = write_dataset(tmp_path / "log", log)
        items.to_parquet(tmp_path / "log" / f"night-{number}.parquet")
        edit(path, "items", files="night-*.parquet")
        assert not ingest(home, path).quarantined
    together = Home.at(tmp_path / "together")
    assert not ingest(together, path).quarantined
    for one in (home, together):
        assert answer(one, "SELECT price, count(*) FROM items GROUP BY 1") == [(1.5, 8)]


def test_two_values_of_one_row_are_two_rows(tmp_path: Path, home: Home, log: Log) -> None:
    first = log["items"].assign(price=1.0, shelf=[None, *"abcdefg"])
    second = log["items"].head(2).assign(price=2.0)
    path = write_dataset(tmp_path / "log", log, quarantine={"max_share": 0.5})
    first.to_parquet(tmp_path / "log" / "night-0.parquet")
    second.to_parquet(tmp_path / "log" / "night-1.parquet")
    edit(path, "items", files="night-*.parquet")
    assert ingest(home, path).quarantined["items"] == 4
    assert {held.rule for held in quarantined(home, table="items")} == {"item_id twice"}


def test_a_column_without_values_waits_for_the_first(tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    for number, shelf in enumerate((None, float("nan"), "oak")):
        log["items"].assign(shelf=shelf).to_parquet(tmp_path / "log" / f"night-{number}.parquet")
        edit(path, "items", files="night-*.parquet")
        assert not ingest(home, path).quarantined
    assert answer(home, "SELECT shelf, count(*) FROM items GROUP BY 1") == [("oak", 8)]


def test_a_type_that_the_lake_has_otherwise_is_refused(tmp_path: Path, home: Home, log: Log) -> None:
    """As in a lake for which an earlier version guessed that zip codes are integers."""
    log["items"]["zip"] = range(8)
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)
    log["items"]["zip"] = [f"0123{digit}" for digit in range(8)]
    log["items"].to_csv(tmp_path / "log" / "items.csv", index=False)
    edit(path, "items", files="items.csv", types={"item_id": "integer", "zip": "text"})
    with pytest.raises(BadInput, match=r"items.types: the lake has zip as BIGINT, not as text; .*zip_text"):
        ingest(home, path)
    types = {"item_id": "integer", "zip_text": "text"}
    edit(path, "items", files="items.csv", types=types, columns={"zip_text": "zip"})
    assert not ingest(home, path).quarantined
    found = answer(home, "SELECT min(zip), max(zip), min(zip_text), max(zip_text) FROM items")
    assert found == [(0, 7, "01230", "01237")]


def test_dates_that_the_lake_has_are_read_by_their_format(tmp_path: Path, home: Home, log: Log) -> None:
    log["items"]["since"] = pd.Timestamp("2024-01-02").date()
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)
    more = log["items"].head(1).assign(item_id=70, since="03/02/2024", event_timestamp="01/02/2024")
    more.to_csv(tmp_path / "log" / "items.csv", index=False)
    edit(path, "items", files="items.csv", timestamp_format="%d/%m/%Y")
    assert not ingest(home, path).quarantined
    assert answer(home, "SELECT since::VARCHAR FROM items WHERE item_id = 70") == [("2024-02-03",)]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252", "gb18030", "utf-8-sig"])
def test_words_of_any_encoding(encoding: str, tmp_path: Path, home: Home, log: Log) -> None:
    of_all = {
        "utf-16": "🐷 𠑗",
        "latin-1": "é\x85",
        "cp1252": "€ “x”",
        "gb18030": "汉字 🐷",
        "utf-8-sig": "é🐷",
    }
    text = of_all[encoding]
    path = write_dataset(tmp_path / "log", log)
    rows = log["behaviors"].assign(text=[f"{text}\r\n{number}" for number in range(80)])
    for number in range(2):
        part = tmp_path / "log" / f"behaviors-{number}.csv"
        rows.iloc[number::2].to_csv(part, index=False, encoding=encoding)
    edit(path, "behaviors", files="behaviors-*.csv", csv={"encoding": encoding})
    assert not ingest(home, path).quarantined
    found = answer(home, "SELECT text FROM atoms WHERE channel <> 'item'")
    assert {value for (value,) in found} == {f"{text} {number}" for number in range(80)}
    assert not list((home.root / "lake" / "spill").rglob("*"))


def test_utf_16_without_a_mark(tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    rows = log["behaviors"].assign(text=[f"\U0001f437 {number}" for number in range(80)])
    rows.to_csv(tmp_path / "log" / "behaviors.csv", index=False, encoding="utf-16-le")
    edit(path, "behaviors", files="behaviors.csv", csv={"encoding": "utf-16"})
    assert not ingest(home, path).quarantined


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_damaged_archive_is_named(encoding: str, tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    archive = tmp_path / "log" / "behaviors.csv.gz"
    log["behaviors"].to_csv(archive, index=False, encoding=encoding)
    edit(path, "behaviors", files="behaviors.csv.gz", csv={"encoding": encoding})
    for damaged in (archive.read_bytes()[:200], b"no archive"):
        archive.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"behaviors.csv.gz cannot be read"):
            ingest(home, path)


def test_a_name_in_another_case_is_refused(tmp_path: Path, home: Home, log: Log) -> None:
    log["items"]["price"] = 1.0
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)
    log["items"].head(1).rename(columns={"price": "Price"}).assign(item_id=70).to_parquet(
        tmp_path / "log" / "items.parquet"
    )
    with pytest.raises(BadInput, match=r"items: the column Price is price in the lake"):
        ingest(home, path)


def test_rows_of_a_file_in_utf_16_are_set_aside_with_its_name(tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log, quarantine={"max_share": 0.2})
    rows = log["behaviors"].assign(channel=["liked"] * 79 + ["unheard of"])
    for number in range(2):
        part = tmp_path / "log" / f"behaviors-{number}.csv"
        rows.iloc[number * 40 :][:40].to_csv(part, index=False, encoding="utf-16")
    edit(path, "behaviors", files="behaviors-*.csv", csv={"encoding": "utf-16"})
    ingest(home, path)
    (held,) = quarantined(home)
    assert held.examples[0]["source"] == str(tmp_path / "log" / "behaviors-1.csv")
    assert held.examples[0]["row_number"] == 40


def test_homes_of_one_process_have_their_own_columns(tmp_path: Path, log: Log) -> None:
    """Feast writes the columns that it finds into the objects that it is given."""
    for name, items in (("priced", log["items"].assign(price=1.0)), ("plain", log["items"])):
        home = Home.at(tmp_path / name)
        ingest(home, write_dataset(tmp_path / f"{name}-log", log | {"items": items}))
        apply(home)
        features = [field.name for field in open_store(home).get_feature_view("item_attributes").features]
        assert ("price" in features) == (name == "priced")


def test_no_encoding_of_text_is_refused(tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    edit(path, "behaviors", csv={"encoding": "zip"})
    with pytest.raises(BadInput, match=r"`behaviors.csv.encoding`: zip is no encoding of text"):
        ingest(home, path)


def test_one_text_of_two_items_is_two_behaviors(tmp_path: Path, home: Home, log: Log) -> None:
    """And a behavior without an item is one of which another file, before or after it, names the item."""
    moment = pd.Timestamp("2024-05-01", tz="UTC")
    milk = log["behaviors"].head(1).assign(text="milk", event_timestamp=moment, user_id="u1")
    nights = [[None], [3, 5], [5, None, 3], [4]]
    for number, items in enumerate(nights):
        path = write_dataset(tmp_path / "log", log)
        rows = pd.concat([milk.assign(item_id=item) for item in items], ignore_index=True)
        rows["item_id"] = rows["item_id"].astype("Int64")
        rows.to_parquet(tmp_path / "log" / f"more-{number}.parquet")
        log["behaviors"].to_parquet(tmp_path / "log" / "more-log.parquet")
        edit(path, "behaviors", files="more-*.parquet")
        ingest(home, path)
    together = Home.at(tmp_path / "together")
    ingest(together, path)
    query = "SELECT item_id FROM behaviors JOIN atoms USING (atom_id) WHERE text = 'milk' ORDER BY 1"
    for one in (home, together):
        assert answer(one, query) == [(3,), (4,), (5,)]
        lengths = "SELECT max(length_liked + length_disliked) FROM timeline_length WHERE user_id = 'u1'"
        ((length,),) = answer(one, lengths)
        assert length == int((log["behaviors"]["user_id"] == "u1").sum()) + 3
    for rows in (
        "FROM behaviors",
        "FROM user_timeline",
        "SELECT * EXCLUDE (created_timestamp) FROM timeline_length",
    ):
        assert answer(home, f"{rows} ORDER BY ALL") == answer(together, f"{rows} ORDER BY ALL")
