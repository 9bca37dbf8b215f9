"""Ingest: one sentence for bad input and nothing written; twice is once; growth is added."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from filelock import FileLock

from bahe_core.errors import BadInput, Busy, NotReady
from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import connect, lake
from materialize.ingest.ingest import ingest
from tests.support.logs import small_log, write_dataset

Log = dict[str, pd.DataFrame]


def put(table: str, column: str, value: object) -> Callable[[Log], None]:
    def change(log: Log) -> None:
        frame = log[table].astype({column: object})
        frame.loc[5, column] = value
        log[table] = frame

    return change


def drop(table: str, column: str) -> Callable[[Log], None]:
    return lambda log: log.update({table: log[table].drop(columns=column)})


def empty(table: str) -> Callable[[Log], None]:
    return lambda log: log.update({table: log[table].head(0)})


def texts(log: Log) -> None:
    log["behaviors"]["event_timestamp"] = log["behaviors"]["event_timestamp"].astype(str)
    log["behaviors"].loc[7, "event_timestamp"] = "next Tuesday"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("impressions", "user_id"), "impressions: impressions.parquet has no column user_id"),
        (drop("behaviors", "text"), "behaviors: behaviors.parquet has no column text"),
        (texts, "behaviors, row 8: event_timestamp next Tuesday is not a time"),
        (put("impressions", "clicked", np.nan), "impressions, row 6: clicked is missing or not 0 or 1"),
        (put("impressions", "clicked", 2), "impressions, row 6: clicked is missing or not 0 or 1"),
        (put("impressions", "clicked", 0.5), "impressions, row 6: clicked is missing or not 0 or 1"),
        (put("impressions", "item_id", 999), "impressions, row 6: item_id 999 is not in items"),
        (
            put("impressions", "event_timestamp", None),
            "impressions, row 6: event_timestamp None is not a time",
        ),
        (put("items", "text", None), "items, row 6: text is missing"),
        (put("items", "text", "   "), "items, row 6: text is missing"),
        (put("items", "item_id", 4), "items, row 5: item_id 4 stands for two different rows"),
        (put("behaviors", "channel", "loved"), "behaviors, row 6: channel loved is not one of `channels`"),
        (put("impressions", "impression_id", 4), "impression_id 4 stands for two different rows"),
        (empty("impressions"), "impressions: the source has no rows"),
        (empty("items"), "items: the source has no rows"),
        (lambda log: log["impressions"].__setitem__("clicked", 1), "clicked is the same in every row"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    change: Callable[[Log], None], words: str, tmp_path: Path, home: Home
) -> None:
    log = small_log()
    change(log)
    path = write_dataset(tmp_path / "log", log)
    with pytest.raises(BadInput) as caught:
        ingest(home, path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (home.root / "dataset.yaml").exists()
    with lake(home, create=True) as connection:
        assert connection.execute(
            "SELECT count(*) FROM duckdb_tables() WHERE database_name = 'lake'"
        ).fetchone() == (0,)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda d: d.update(chanels=[]), "`chanels` is not a known field"),
        (lambda d: d["impressions"].update(file="x"), "`impressions.file` is not a known field"),
        (lambda d: d.pop("items"), "`items` is missing"),
        (lambda d: d.update(name="a/b"), "`name`"),
        (lambda d: d.update(channels=["liked", "liked"]), "names one channel twice"),
        (lambda d: d["items"].pop("files"), "give either `files` or `sql`"),
        (lambda d: d["items"].update(files="nothing-*.parquet"), "nothing matches nothing-*.parquet"),
        (lambda d: d["items"].update(files="dataset.yaml"), "neither CSV nor Parquet"),
        (lambda d: d.update(split={"validation": 0.6, "test": 0.6}), "must be below 1"),
    ],
)
def test_a_wrong_dataset_yaml_is_one_sentence(
    edit: Callable[[dict], object], words: str, tmp_path: Path, home: Home
) -> None:
    path = write_dataset(tmp_path / "log", small_log())
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput) as caught:
        ingest(home, path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file(tmp_path: Path, home: Home) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        ingest(home, tmp_path / "dataset.yaml")
    (tmp_path / "dataset.yaml").write_text("name: [unclosed")
    with pytest.raises(BadInput, match="not valid YAML"):
        ingest(home, tmp_path / "dataset.yaml")
    path = write_dataset(tmp_path / "log", small_log())
    (tmp_path / "log" / "behaviors.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    with pytest.raises(BadInput, match=r"behaviors.parquet cannot be read"):
        ingest(home, path)


def test_twice_is_once_and_growth_is_added(tmp_path: Path, home: Home) -> None:
    log = small_log()
    early = {t: rows.head(600) if t in ("behaviors", "impressions") else rows for t, rows in log.items()}
    path = write_dataset(tmp_path / "log", early)
    assert ingest(home, path).totals["impressions"] == 600
    assert ingest(home, path).skipped
    write_dataset(tmp_path / "log", log)
    grown = ingest(home, path)
    assert (grown.added["impressions"], grown.added["items"]) == (300, 0)
    # A home filled in two steps holds what a home filled at once does.
    whole = Home.at(tmp_path / "whole")
    ingest(whole, path)
    for table in ("behaviors", "impressions", "items", "users", "atoms", "user_timeline"):
        rows = []
        for one in (home, whole):
            with lake(one) as connection:
                rows.append(connection.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall())
        assert rows[0] == rows[1], table
    for table in ("user_stats", "item_stats", "timeline_length"):
        rows = []
        for one in (home, whole):
            with lake(one) as connection:
                rows.append(
                    connection.execute(
                        f"SELECT * EXCLUDE (created_timestamp) FROM {table} ORDER BY ALL"
                    ).fetchall()
                )
        assert rows[0] == rows[1], table


def test_equal_texts_are_one_atom(tmp_path: Path, home: Home) -> None:
    log = small_log()
    log["behaviors"].loc[:1, "text"] = ["  caf\u00e9   con  leche ", "cafe\u0301 con leche"]
    log["behaviors"].loc[:1, "channel"] = "liked"
    ingest(home, write_dataset(tmp_path / "log", log))
    with lake(home) as connection:
        assert scalar(connection, "SELECT count(*) FROM atoms WHERE text = 'caf\u00e9 con leche'") == 1


def test_atom_ids_never_change() -> None:
    import duckdb

    from materialize.ingest.atoms import ATOM_ID, NORMAL_TEXT

    text = NORMAL_TEXT.format(text="'  Toy   Story '")
    query = f"SELECT {ATOM_ID.format(channel=repr('item'), text=text)}"
    assert duckdb.execute(query).fetchone() == (-3747420683847740447,)


def test_another_dataset_is_kept_out(tmp_path: Path, home: Home) -> None:
    ingest(home, write_dataset(tmp_path / "one", small_log()))
    with pytest.raises(BadInput, match="holds small"):
        ingest(home, write_dataset(tmp_path / "two", small_log(), name="other"))
    with pytest.raises(BadInput, match="channels"):
        ingest(home, write_dataset(tmp_path / "three", small_log(), channels=["disliked", "liked"]))


def test_a_rating_becomes_a_click_and_numbers_become_times(tmp_path: Path, home: Home) -> None:
    log = small_log()
    shown = log["impressions"]
    shown["stars"] = shown["clicked"] * 4 + 1
    shown["seconds"] = shown["event_timestamp"].astype("int64") // 10**9
    log["impressions"] = shown.drop(columns=["clicked", "event_timestamp"])
    path = write_dataset(tmp_path / "log", log)
    content = yaml.safe_load(path.read_text())
    content["impressions"]["columns"] = {
        "clicked": {"column": "stars", "at_least": 4},
        "event_timestamp": "seconds",
    }
    path.write_text(yaml.safe_dump(content))
    ingest(home, path)
    with lake(home) as connection:
        rows = connection.execute(
            "SELECT epoch_us(event_timestamp) // 1000000, clicked FROM impressions ORDER BY impression_id"
        ).fetchall()
    assert rows == list(zip(shown["seconds"], shown["clicked"], strict=True))


def test_csv_and_integer_users_work_too(tmp_path: Path, home: Home) -> None:
    log = small_log()
    for table in ("impressions", "behaviors"):
        log[table]["user_id"] = log[table]["user_id"].str[1:].astype(int)
    del log["users"]
    path = write_dataset(tmp_path / "log", log)
    log["behaviors"].to_csv(tmp_path / "log" / "behaviors.csv", index=False)
    path.write_text(path.read_text().replace("behaviors.parquet", "behaviors.csv"))
    assert ingest(home, path).totals["impressions"] == 900
    with lake(home) as connection:
        assert scalar(connection, "SELECT min(user_id) FROM user_timeline") == 0


def test_a_busy_home_is_left_alone(tmp_path: Path, home: Home) -> None:
    path = write_dataset(tmp_path / "log", small_log())

    def elsewhere() -> None:
        with pytest.raises(Busy, match="another bahe job"):
            ingest(home, path)

    with home.exclusive(), home.exclusive(), ThreadPoolExecutor(1) as pool:  # twice: a job within a job
        pool.submit(elsewhere).result()
        assert pool.submit(home.busy).result()
    assert not home.busy()
    ingest(home, path)


def test_looking_whether_a_home_is_busy_makes_no_job_fail(home: Home) -> None:
    """Who looks holds the lock for a moment."""
    home.create()
    looking, lock = Event(), FileLock(home.root / ".lock")

    def look() -> None:
        with lock:
            looking.set()
            Event().wait(0.1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        looking.wait()
        with home.exclusive():
            pass


def test_an_empty_home_says_what_to_do(home: Home) -> None:
    with pytest.raises(NotReady, match="bahe ingest"):
        connect(home)


def context_of(home: Home) -> list[tuple[object, ...]]:
    with lake(home) as connection:
        return connection.execute(
            "SELECT context_device, context_hour FROM impressions ORDER BY impression_id"
        ).fetchall()


def with_context(path: Path, *context: str, **columns: str) -> None:
    content = yaml.safe_load(path.read_text())
    content["impressions"] |= {"context": list(context), "columns": columns}
    path.write_text(yaml.safe_dump(content))


def shown_on_devices() -> Log:
    log = small_log()
    shown = log["impressions"]
    shown["dev"] = np.where(shown.index % 3 == 0, None, np.where(shown.index % 3 == 1, "phone", "tv"))
    # Integers with gaps, which pandas writes as floats.
    shown["hour"] = (shown.index % 24).to_series().where(shown.index % 5 > 0).to_numpy()
    return log


def test_context_is_text_and_its_gaps_stay(tmp_path: Path, home: Home) -> None:
    log = shown_on_devices()
    path = write_dataset(tmp_path / "log", log)
    ingest(home, path)  # of before anyone thought of context
    with_context(path, "device", "hour", device="dev")
    assert not ingest(home, path).skipped
    wanted = [
        (None if i % 3 == 0 else "phone" if i % 3 == 1 else "tv", None if i % 5 == 0 else str(i % 24))
        for i in range(len(log["impressions"]))
    ]
    assert context_of(home) == wanted
    assert ingest(home, path).skipped
    whole = Home.at(tmp_path / "whole")
    ingest(whole, path)
    assert context_of(whole) == wanted
    # Without it again: the lake keeps what it has, and takes in what comes.
    with_context(path, device="dev")
    more = log["impressions"].tail(1).assign(impression_id=10_000)
    log["impressions"] = pd.concat([log["impressions"], more])
    log["impressions"].to_parquet(tmp_path / "log" / "impressions.parquet")
    assert ingest(whole, path).added["impressions"] == 1
    assert context_of(whole) == [*wanted, (None, None)]


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (["device"], "impressions.parquet has no column device (for device); it has impression_id"),
        (["device"], "map it under impressions.columns, or take device out of impressions.context"),
        (["clicked"], "clicked of impressions.parquet is already read as clicked"),
        (["user_id"], "take user_id out of the list"),
        (["dev", "dev"], "`context` names one column twice"),
        (["a b"], "`impressions.context.0`"),
        (["tags"], "tags of impressions.parquet is VARCHAR[]; context is text, numbers or booleans"),
    ],
)
def test_wrong_context_is_one_sentence(context: list[str], words: str, tmp_path: Path, home: Home) -> None:
    log = shown_on_devices()
    log["impressions"]["tags"] = [["new"]] * len(log["impressions"])
    path = write_dataset(tmp_path / "log", log)
    with_context(path, *context)
    with pytest.raises(BadInput) as caught:
        ingest(home, path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (home.root / "dataset.yaml").exists()


def test_what_becomes_the_click_is_no_context(tmp_path: Path, home: Home) -> None:
    log = small_log()
    log["impressions"] = log["impressions"].rename(columns={"clicked": "stars"})
    path = write_dataset(tmp_path / "log", log)
    with_context(path, "stars", clicked="stars")
    with pytest.raises(BadInput, match=r"stars of impressions.parquet is already read as clicked"):
        ingest(home, path)
    with_context(write_dataset(tmp_path / "log", small_log()), "device")
    content = yaml.safe_load(path.read_text())
    content["items"]["context"] = ["colour"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match=r"`items.context` is not a known field"):
        ingest(home, path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("DOUBLE", [0.1, 13.0, 1.5e15, 9999999999999998.0, 1e16, 1e300, 1e-5, -0.0, 1234567.125]),
        ("DOUBLE", [float("nan"), float("inf"), None]),
        ("FLOAT", [0.1, 2.0]),
        ("DECIMAL(10, 2)", [13.5, 13.0, 0.07]),
        ("BIGINT", [-(2**63), 7]),
        ("BOOLEAN", [True, False]),
        ("VARCHAR", ["phone", "", " tv "]),
    ],
)
def test_the_log_writes_values_as_a_request_does(kind: str, values: list[Any]) -> None:
    """What a model learned of a value in the log is what it knows of that value in a request."""
    import duckdb

    from bahe_models.context import hash_values
    from materialize.ingest.contract import category

    for value in values:
        query = f"SELECT {category('v', kind)} FROM (SELECT ?::{kind} AS v)"
        row = duckdb.execute(query, [value]).fetchone()
        assert row is not None
        assert hash_values("c", row)[0] == hash_values("c", [value])[0], value
