"""What was once read wrong in silence, each with the right value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
import yaml

from bahe_core.errors import BadInput, GateFailed
from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.ingest import repair, sources
from materialize.ingest.ingest import ingest
from materialize.ingest.quarantine import quarantined
from tests.support.logs import small_log, write_dataset

Log = dict[str, pd.DataFrame]
SAMPLED = 20_480
"""Rows from which DuckDB would guess the types of a CSV file."""


def answer(home: Home, query: str) -> list[tuple[Any, ...]]:
    with lake(home) as connection:
        return connection.execute(query).fetchall()


def edit(path: Path, **sections: dict[str, object]) -> None:
    spec = yaml.safe_load(path.read_text())
    for name, section in sections.items():
        spec[name] = spec.get(name, {}) | section
        if "sql" in section:
            del spec[name]["files"]
    path.write_text(yaml.safe_dump(spec))


def as_csv(path: Path, table: str, rows: pd.DataFrame, encoding: str = "utf-8", **section: object) -> None:
    rows.to_csv(path.parent / f"{table}.csv", index=False, encoding=encoding)
    edit(path, **{table: {"files": f"{table}.csv", **section}})


@pytest.fixture
def log() -> Log:
    return small_log(rows=80, users=6, items=8)


def test_a_text_of_one_tab_is_no_text(tmp_path: Path, home: Home, log: Log) -> None:
    log["behaviors"].loc[:3, "text"] = ["\t", "\u200b", "\u00a0\ufeff", "\u2003\n"]
    log["behaviors"]["user_id"] = log["behaviors"]["user_id"].where(log["behaviors"].index != 9, " ")
    path = write_dataset(tmp_path / "log", log, quarantine={"max_share": 0.2})
    assert ingest(home, path).quarantined == {"behaviors": 5}
    assert {(held.rule, held.rows) for held in quarantined(home)} == {("no text", 4), ("no user_id", 1)}


def test_a_home_that_its_gate_refused_is_repaired(
    tmp_path: Path, home: Home, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version left it: the tab let in, the gate against it, and every night refused."""
    log["behaviors"].loc[3, "text"] = "\t"
    path = write_dataset(tmp_path / "log", log)
    with monkeypatch.context() as patch:
        for module in ("contract", "reading"):
            patch.setattr(f"materialize.ingest.{module}.blank", lambda text: f"({text} = '')")
        with pytest.raises(GateFailed, match="blank"):
            ingest(home, path)
    log["behaviors"].loc[3, "text"] = "corrected"
    write_dataset(tmp_path / "log", log)
    ingest(home, path)
    whole = Home.at(tmp_path / "whole")
    ingest(whole, path)
    for query in (
        "FROM behaviors ORDER BY ALL",
        "FROM atoms ORDER BY ALL",
        "FROM user_timeline ORDER BY ALL",
    ):
        assert answer(home, query) == answer(whole, query)
    (moved,) = quarantined(home)
    assert (moved.rule, moved.examples[0]["source"]) == ("no text", repair.SOURCE)


def test_a_zone_in_one_row_moves_no_other(tmp_path: Path, home: Home, log: Log) -> None:
    shown = log["impressions"]
    shown["event_timestamp"] = "2024-01-05 10:00"
    shown.loc[7, "event_timestamp"] = "2024-01-05 10:00 Asia/Tokyo"
    ingest(home, write_dataset(tmp_path / "log", log))
    assert answer(
        home, "SELECT event_timestamp::VARCHAR, count(*) FROM impressions GROUP BY 1 ORDER BY 1"
    ) == [("2024-01-05 01:00:00+00", 1), ("2024-01-05 10:00:00+00", 79)]


def test_what_follows_the_sampled_rows_is_read_as_written(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=SAMPLED + 40, users=6, items=8)
    shown = log["impressions"].astype({"clicked": object}).rename(columns={"clicked": "stars"})
    shown["user_id"] = "7"
    shown["stars"] = np.where(shown.index % 2 == 0, "5", "1")
    for row, (user, stars) in enumerate(
        [("0007", "3.6"), ("7.4", "3.99"), ("1_0", "4.0"), ("7.0", "4e0"), ("7e0", "x"), ("7", "5")],
        SAMPLED + 10,
    ):
        shown.loc[row, ["user_id", "stars"]] = [user, stars]
    shown["event_timestamp"] = shown["event_timestamp"].dt.strftime("%Y-%m-%d")
    shown.loc[SAMPLED + 20, "event_timestamp"] = "2024-03-01 13:45:10"
    path = write_dataset(tmp_path / "log", log)
    as_csv(path, "impressions", shown, columns={"clicked": {"column": "stars", "at_least": 4}})
    assert ingest(home, path).quarantined == {"impressions": 1}
    assert answer(
        home,
        f"SELECT user_id, clicked FROM impressions WHERE impression_id::INTEGER BETWEEN {SAMPLED + 10}"
        f" AND {SAMPLED + 15} ORDER BY impression_id::INTEGER",
    ) == [("0007", 0), ("7.4", 0), ("1_0", 1), ("7.0", 1), ("7", 1)]
    assert answer(
        home, f"SELECT event_timestamp::VARCHAR FROM impressions WHERE impression_id = '{SAMPLED + 20}'"
    ) == [("2024-03-01 13:45:10+00",)]


def test_day_and_month_are_stated_or_refused(tmp_path: Path, home: Home, log: Log) -> None:
    log["behaviors"]["event_timestamp"] = [f"{1 + i % 10:02d}/05/2024" for i in range(80)]
    path = write_dataset(tmp_path / "log", log)
    with pytest.raises(
        BadInput, match=r"behaviors, row 1: event_timestamp 01/05/2024 is not .*timestamp_format"
    ):
        ingest(home, path)
    edit(path, behaviors={"timestamp_format": "%d/%m/%Y"})
    ingest(home, path)
    assert answer(
        home,
        "SELECT min(event_timestamp)::DATE::VARCHAR, max(event_timestamp)::DATE::VARCHAR FROM behaviors",
    ) == [("2024-05-01", "2024-05-10")]
    edit(path, behaviors={"timestamp_format": "%d/%m %H:%M"})
    with pytest.raises(BadInput, match=r"behaviors.timestamp_format: %d/%m %H:%M lacks the year"):
        ingest(home, path)


def text_users(log: Log) -> None:
    log["users"]["user_id"] = range(len(log["users"]))


def text_items_of_behaviors(log: Log) -> None:
    log["behaviors"]["item_id"] = log["behaviors"]["item_id"].astype(str)


def items_with_gaps_against_text(log: Log) -> None:
    log["items"]["item_id"] = log["items"]["item_id"].astype(str)
    log["impressions"]["item_id"] = log["impressions"]["item_id"].astype(str)
    log["behaviors"]["item_id"] = (
        log["behaviors"]["item_id"].astype(float).where(log["behaviors"].index > 3)
    )


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (text_users, "user_id"),
        (text_items_of_behaviors, "item_id"),
        (items_with_gaps_against_text, "item_id"),
    ],
)
def test_an_id_has_one_type_in_all_tables(
    change: Callable[[Log], None], column: str, tmp_path: Path, home: Home, log: Log
) -> None:
    change(log)
    with pytest.raises(BadInput, match=rf"{column} .* give {column} one type in all tables"):
        ingest(home, write_dataset(tmp_path / "log", log))
    assert not (home.root / "dataset.yaml").exists()


def test_integers_with_gaps_are_integers(tmp_path: Path, home: Home, log: Log) -> None:
    wanted = log["behaviors"]["item_id"].where(log["behaviors"].index > 3).tolist()
    log["behaviors"]["item_id"] = wanted  # floats, as pandas has them
    log["items"]["item_id"] = log["items"]["item_id"].astype(float)
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)
    assert answer(home, "SELECT count(item_id), typeof(any_value(item_id)) FROM behaviors") == [
        (76, "BIGINT")
    ]
    assert answer(home, "SELECT count(*) FROM behaviors SEMI JOIN items USING (item_id)") == [(76,)]
    log["behaviors"].loc[9, "item_id"] = 2.5
    log["behaviors"].loc[9, "text"] = "half an item"
    edit(write_dataset(tmp_path / "log", log), quarantine={"max_share": 0.1})
    ingest(home, path)
    (held,) = quarantined(home)
    assert held.examples[0]["reason"] == "item_id 2.5 is not exactly BIGINT, as the lake has it"


def test_prices_are_versions_in_time(tmp_path: Path, home: Home, log: Log) -> None:
    later = pd.Timestamp("2024-02-01", tz="UTC")
    items = log["items"].assign(price=1.0)
    log["items"] = pd.concat(
        [items, items.head(1).assign(price=2.0, event_timestamp=later)], ignore_index=True
    )
    path = write_dataset(tmp_path / "log", log, quarantine={"max_share": 0.5})
    ingest(home, path)
    at_night = items.head(1).assign(price=3.0, text="renamed", event_timestamp=later + pd.Timedelta("1D"))
    log["items"] = pd.concat([log["items"], at_night], ignore_index=True)
    # Two prices of one time: both are set aside, and both are shown.
    torn = items.iloc[[1, 1]].assign(price=[7.0, 8.0], event_timestamp=later)
    log["items"] = pd.concat([log["items"], torn], ignore_index=True)
    # A price that the lake has otherwise.
    log["items"].loc[2, "price"] = 9.0
    write_dataset(tmp_path / "log", log, quarantine={"max_share": 0.5})
    assert ingest(home, path).quarantined == {"items": 3}
    assert answer(home, "SELECT price FROM items WHERE item_id = 0 ORDER BY event_timestamp") == [
        (1.0,),
        (2.0,),
        (3.0,),
    ]
    assert answer(home, "SELECT price FROM items WHERE item_id IN (1, 2)") == [(1.0,), (1.0,)]
    reasons = answer(home, "SELECT rule, reason, (row->>'price')::DOUBLE FROM quarantine ORDER BY ALL")
    assert [(rule, price) for rule, _, price in reasons] == [
        ("item_id changed", 9.0),
        ("item_id twice", 7.0),
        ("item_id twice", 8.0),
    ]
    assert '"price":1.0' in reasons[0][1]


def test_a_frame_joins_the_version_of_its_moment(tmp_path: Path, home: Home, log: Log) -> None:
    from feature_repo.store import apply, open_store

    days = [pd.Timestamp(f"2024-02-0{day}", tz="UTC") for day in (1, 3)]
    first = log["items"].head(1).assign(price=1.0)
    later = [
        first.assign(price=price, event_timestamp=day) for price, day in zip((2.0, 3.0), days, strict=True)
    ]
    log["items"] = pd.concat([first, *later, log["items"].tail(7).assign(price=0.5)], ignore_index=True)
    ingest(home, write_dataset(tmp_path / "log", log))
    moments = [days[0] - pd.Timedelta("1h"), days[0] + pd.Timedelta("1h"), days[1] + pd.Timedelta("1h")]
    asked = pd.DataFrame({"item_id": [0, 0, 0], "event_timestamp": moments})
    apply(home)
    frame = open_store(home).get_historical_features(asked, ["item_attributes:price"]).to_df()
    assert frame["price"].tolist() == [1.0, 2.0, 3.0]


def latin(path: Path, log: Log) -> None:
    as_csv(path, "behaviors", log["behaviors"].assign(text="caf\u00e9"), encoding="latin-1")


def utf16(path: Path, log: Log) -> None:
    as_csv(path, "behaviors", log["behaviors"], encoding="utf-16")


def semicolons(path: Path, log: Log) -> None:
    log["behaviors"].to_csv(path.parent / "behaviors.csv", index=False, sep=";")
    edit(path, behaviors={"files": "behaviors.csv"})


def a_value_more(path: Path, log: Log) -> None:
    as_csv(path, "behaviors", log["behaviors"])
    lines = (path.parent / "behaviors.csv").read_text().splitlines()
    lines[9] += ",more"
    (path.parent / "behaviors.csv").write_text("\n".join(lines))


def an_open_quote(path: Path, log: Log) -> None:
    as_csv(path, "behaviors", log["behaviors"])
    lines = (path.parent / "behaviors.csv").read_text().splitlines()
    lines[9] = lines[9].replace("liked", '"liked', 1)
    (path.parent / "behaviors.csv").write_text("\n".join(lines))


def a_type_of_nothing(path: Path, log: Log) -> None:
    edit(path, items={"types": {"prize": "number"}})


def a_list(path: Path, log: Log) -> None:
    log["behaviors"].assign(event_timestamp=[[1]] * 80).to_parquet(path.parent / "behaviors.parquet")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (latin, r"behaviors.csv, line 2, character \d+ is not utf-8; set `csv: \{encoding: latin-1\}`"),
        (utf16, r"behaviors.csv is UTF-16, not utf-8; set `csv: \{encoding: utf-16\}`"),
        (semicolons, r"behaviors.csv has no column user_id .*set `csv: \{delimiter: …\}`"),
        (a_value_more, r"behaviors.csv, line 10 has 6 values where the first line names 5 columns"),
        (an_open_quote, r"behaviors.csv, line 10 has a quote \" that does not end"),
        (a_type_of_nothing, r"items.types: prize is no column of items.parquet, which has item_id, text"),
        (a_list, r"behaviors: event_timestamp of behaviors.parquet is BIGINT\[\], which is no time"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_to_do(
    spoil: Callable[[Path, Log], None], words: str, tmp_path: Path, home: Home, log: Log
) -> None:
    path = write_dataset(tmp_path / "log", log)
    spoil(path, log)
    with pytest.raises(BadInput, match=words) as caught:
        ingest(home, path)
    assert "\n" not in str(caught.value)


def test_csv_options_say_how_files_are_written(tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    words = log["behaviors"].assign(text="caf\u00e9; 'cr\u00e8me'", number=np.arange(80) / 4)
    words.to_csv(
        path.parent / "behaviors.csv", index=False, sep=";", quotechar="'", encoding="latin-1", decimal=","
    )
    shown = log["impressions"].assign(stars=log["impressions"]["clicked"] * 2.5 + 1.4)
    shown.drop(columns="clicked").to_csv(
        path.parent / "impressions.csv", index=False, sep="\t", decimal=","
    )
    edit(
        path,
        behaviors={
            "files": "behaviors.csv",
            "csv": {"encoding": "latin-1", "delimiter": ";", "quote": "'", "decimal": ","},
        },
        impressions={
            "files": "impressions.csv",
            "csv": {"delimiter": "\t", "decimal": ","},
            "columns": {"clicked": {"column": "stars", "at_least": 3.9}},
        },
    )
    ingest(home, path)
    assert answer(home, "SELECT DISTINCT text FROM atoms WHERE channel <> 'item'") == [
        ("caf\u00e9; 'cr\u00e8me'",)
    ]
    assert answer(home, "SELECT sum(clicked) FROM impressions") == [
        (int(log["impressions"]["clicked"].sum()),)
    ]


def test_an_empty_file_says_nothing_of_types(tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)
    log["impressions"].head(0).astype({"item_id": float, "user_id": float}).to_parquet(
        tmp_path / "log" / "impressions-1.parquet"
    )
    edit(path, impressions={"files": "impressions*.parquet"})
    assert ingest(home, path).totals["impressions"] == 80


@pytest.mark.parametrize("end", [" -- done", "; -- done", ";\n", " /* done */"])
def test_a_query_may_end_in_a_comment(end: str, tmp_path: Path, home: Home, log: Log) -> None:
    path = write_dataset(tmp_path / "log", log)
    edit(path, items={"sql": f"SELECT * FROM 'items.parquet'{end}"})
    assert ingest(home, path).totals["items"] == 8


def test_times_finer_than_a_microsecond_are_refused(tmp_path: Path, home: Home, log: Log) -> None:
    log["behaviors"]["event_timestamp"] += pd.Timedelta("1ns")
    with pytest.raises(
        BadInput, match=r"behaviors.parquet has times finer than a microsecond in event_timestamp"
    ):
        ingest(home, write_dataset(tmp_path / "log", log))


def test_the_same_log_in_any_form_and_order_is_the_same_lake(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=120, users=6, items=8)
    log["items"]["price"] = [None, 2.5, 0.1, 3.0, 1e-7, 4.0, 5.0, 6.0]
    lakes = []
    for form, files in (("parquet", 1), ("csv", 20), ("sql", 1), ("parquet", 20), ("csv", 1)):
        folder = tmp_path / f"{form}{files}"
        path = write_dataset(folder, log)
        for table, rows in log.items():
            for index in range(files):
                part, name = rows.iloc[index::files], f"{table}-{(index * 7) % 20:02d}"
                if form == "csv":
                    part.to_csv(folder / f"{name}.csv", index=False)
                else:
                    part.to_parquet(folder / f"{name}.parquet")
            pattern = f"{table}-*.{'csv' if form == 'csv' else 'parquet'}"
            edit(
                path,
                **{table: {"sql": f"SELECT * FROM '{pattern}'"} if form == "sql" else {"files": pattern}},
            )
        if form == "csv":
            edit(
                path,
                items={"types": {"item_id": "integer", "price": "number"}},
                impressions={"types": {"impression_id": "integer"}},
            )
        one = Home.at(tmp_path / f"home-{form}{files}")
        ingest(one, path)
        lakes.append(
            [
                answer(one, f"SELECT * FROM {table} ORDER BY ALL")
                for table in ("items", "users", "impressions", "behaviors", "atoms", "user_timeline")
            ]
        )
    assert all(one == lakes[0] for one in lakes)


def test_older_lakes_know_their_files_again(tmp_path: Path, log: Log) -> None:
    """A section without the newer options has the description that earlier versions wrote."""
    from materialize.config.dataset import load_dataset

    path = write_dataset(tmp_path / "log", log)
    with duckdb.connect() as connection:
        sections = {"items": load_dataset(path).items}
        (source,) = sources.find_sources(connection, sections, path.parent).values()
    assert source.spec == "f197c53f44d3f35d010d89ed53541452e0463e4e42be42bf0665e59cc7bb5d5f"


def test_a_key_without_any_value_has_no_type(tmp_path: Path, home: Home) -> None:
    """Writers give a column of nulls alone a type, which says nothing of the ids."""
    log = small_log(rows=60)
    log["items"]["item_id"] = [f"i{i}" for i in log["items"]["item_id"]]
    log["impressions"]["item_id"] = [f"i{i}" for i in log["impressions"]["item_id"]]
    log["behaviors"]["item_id"] = [f"i{i}" for i in log["behaviors"]["item_id"]]
    path = write_dataset(tmp_path / "log", log)
    content = yaml.safe_load(path.read_text())
    content["behaviors"]["files"] = "behaviors*.parquet"
    path.write_text(yaml.safe_dump(content))
    ingest(home, path)
    for number, nothing in enumerate((None, float("nan"))):
        more = (
            log["behaviors"]
            .head(3)
            .assign(item_id=nothing, event_timestamp=pd.Timestamp(f"2024-05-0{number + 1}", tz="UTC"))
        )
        more.to_parquet(tmp_path / "log" / f"behaviors{number}.parquet")
        done = ingest(home, path)
        assert done.added["behaviors"] > 0
        assert not done.quarantined


def test_a_small_memory_limit_reads_csv(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAHE_MEMORY", "500MB")
    path = write_dataset(tmp_path / "log", small_log(rows=60))
    content = yaml.safe_load(path.read_text())
    pd.read_parquet(tmp_path / "log" / "behaviors.parquet").to_csv(
        tmp_path / "log" / "behaviors.csv", index=False
    )
    content["behaviors"] = {"files": "behaviors.csv", "types": {"item_id": "integer"}}
    path.write_text(yaml.safe_dump(content))
    assert ingest(home, path).added["behaviors"] == 60
