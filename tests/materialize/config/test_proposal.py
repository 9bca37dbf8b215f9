"""`bahe init`: what it makes of files of several shapes can be ingested, and says its reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.config.dataset import Dataset, load_dataset
from materialize.config.proposal import propose
from materialize.ingest.check import check
from materialize.ingest.ingest import ingest
from tests.support.cli import attempt
from tests.support.logs import small_log

ROWS = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "my log"
    made.mkdir()
    return made


def ratings() -> pd.DataFrame:
    """Like MovieLens: no id of a rating, seconds, five stars."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "userId": rng.integers(1, 20, ROWS),
            "movieId": rng.integers(1, 30, ROWS),
            "rating": np.arange(ROWS) % 5 + 1,
            "timestamp": 880_000_000 + np.arange(ROWS) * 60,
        }
    )


def movies() -> pd.DataFrame:
    rows = range(1, 30)
    return pd.DataFrame({"movieId": rows, "title": [f"Film No {i} ({i + 1960})" for i in rows]})


def write(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def proposed(folder: Path, *paths: Path) -> Dataset:
    propose(paths, folder / "dataset.yaml")
    return load_dataset(folder / "dataset.yaml")


def ingested(folder: Path) -> dict[str, int]:
    return ingest(Home.at(folder / "home"), folder / "dataset.yaml").totals


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_ratings_and_films_become_behaviors_impressions_and_items(suffix: str, folder: Path) -> None:
    dataset = proposed(
        folder,
        write(ratings(), folder / f"ratings{suffix}"),
        write(movies(), folder / f"movies{suffix}"),
    )
    assert dataset.name == "my-log"
    assert dataset.channels == ["liked", "disliked"]
    assert dataset.impressions.timestamp_unit == "s"
    assert check(folder / "dataset.yaml").rows == {"items": 29, "behaviors": ROWS, "impressions": ROWS}
    ingested(folder)
    with lake(Home.at(folder / "home")) as connection:
        clicks = connection.execute("SELECT sum(clicked), count(*) FROM impressions").fetchone()
        first = connection.execute(
            "SELECT min(event_timestamp) > (SELECT max(event_timestamp) FROM items) FROM impressions"
        ).fetchone()
    assert clicks == ((ratings()["rating"] >= 4).sum(), ROWS)
    assert first == (True,)


def test_tables_with_bahes_own_names_need_no_mapping(folder: Path) -> None:
    paths = [write(table, folder / f"{name}.parquet") for name, table in small_log(rows=ROWS).items()]
    dataset = proposed(folder, *paths)
    assert set(dataset.channels) == {"liked", "disliked"}
    for table in (dataset.behaviors, dataset.impressions, dataset.items):
        assert table.columns == {}
        assert table.sql is None
    assert check(folder / "dataset.yaml").rows["impressions"] == ROWS


def test_unusual_names_are_told_by_what_is_in_the_columns(folder: Path) -> None:
    log = small_log(rows=ROWS)
    shown = log["impressions"]
    shown = pd.DataFrame(
        {
            "impression_id": shown["impression_id"],
            "Customer ID": shown["user_id"],
            "theItem": shown["item_id"],
            "moment": shown["event_timestamp"].astype("int64") // 1_000_000,
            "outcome": shown["clicked"],
            "device": np.where(shown["clicked"], "phone", "desk"),
        }
    )
    items = log["items"].rename(columns={"item_id": "theItem", "text": "blurb"})
    dataset = proposed(
        folder, write(shown, folder / "a.parquet"), write(items.iloc[:, :2], folder / "b.parquet")
    )
    assert dataset.impressions.columns == {
        "user_id": "Customer ID",
        "item_id": "theItem",
        "event_timestamp": "moment",
        "clicked": "outcome",
    }
    assert dataset.impressions.timestamp_unit == "ms"
    assert dataset.impressions.context == ["device"]
    assert dataset.items.columns == {"item_id": "theItem", "text": "blurb"}
    assert dataset.channels == ["clicked"]
    said = (folder / "dataset.yaml").read_text()
    assert "text: blurb  # the wordiest column, 4.0 words a value" in said
    assert "clicked: outcome  # the only column of 0 and 1" in said
    assert check(folder / "dataset.yaml").rows["behaviors"] == shown["outcome"].sum()
    assert ingested(folder)["impressions"] == ROWS


def test_items_are_known_before_the_log_begins_wherever_its_first_row_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("materialize.config.log_files.SAMPLE", 10)
    late_first = ratings().assign(timestamp=880_000_000 - np.arange(ROWS) * 86_400)
    proposed(
        folder, write(late_first, folder / "ratings.parquet"), write(movies(), folder / "movies.parquet")
    )
    assert "TIMESTAMP '1997-07-23'" in (folder / "dataset.yaml").read_text()


def test_one_file_with_everything(folder: Path) -> None:
    whole = ratings().merge(movies(), on="movieId")
    dataset = proposed(folder, write(whole, folder / "everything.csv"))
    assert dataset.channels == ["liked", "disliked"]
    totals = ingested(folder)
    assert totals["impressions"] == ROWS
    assert totals["items"] == ratings()["movieId"].nunique()


def test_files_with_the_same_columns_are_one_table(folder: Path) -> None:
    (folder / "days").mkdir()
    paths = [
        write(part, folder / "days" / f"ratings-{day}.csv")
        for day, part in enumerate(ratings().iloc[start : start + 40] for start in (0, 40, 80))
    ]
    proposed(folder, *paths, write(movies(), folder / "movies.csv"))
    assert "'days/ratings-*.csv'" in (folder / "dataset.yaml").read_text()
    assert check(folder / "dataset.yaml").rows["impressions"] == ROWS


def test_channels_are_renamed_where_they_cannot_be_names(folder: Path) -> None:
    log = small_log(rows=ROWS)
    log["behaviors"]["channel"] = log["behaviors"]["channel"].map(
        {"liked": "Add To Cart", "disliked": "View"}
    )
    paths = [write(table, folder / f"{name}.csv") for name, table in log.items()]
    dataset = proposed(folder, *paths)
    assert set(dataset.channels) == {"add_to_cart", "view"}
    ingested(folder)
    with lake(Home.at(folder / "home")) as connection:
        kinds = connection.execute("SELECT DISTINCT channel FROM behaviors").fetchall()
    assert {kind for (kind,) in kinds} == {"add_to_cart", "view"}


def test_what_cannot_be_known_is_marked_and_checked(folder: Path) -> None:
    shown = small_log(rows=ROWS)["impressions"]
    write(shown, folder / "shown.parquet")
    result = attempt("init", folder / "shown.parquet", "--output", folder / "dataset.yaml")
    assert isinstance(result.exception, BadInput)
    assert "behaviors.files: nothing matches TODO-behaviors.parquet" in str(result.exception)
    assert "items.files: nothing matches TODO-items.parquet" in str(result.exception)
    said = (folder / "dataset.yaml").read_text()
    assert "# TODO: no file has users, times and words" in said
    assert yaml.safe_load(said)["impressions"] == {"files": "shown.parquet"}


def test_a_file_that_fits_nowhere_is_named(folder: Path) -> None:
    prices = pd.DataFrame({"price": [1.5, 2.5], "currency": ["EUR", "USD"]})
    propose(
        [
            write(ratings(), folder / "ratings.csv"),
            write(movies(), folder / "movies.csv"),
            write(prices, folder / "prices.csv"),
        ],
        folder / "dataset.yaml",
    )
    assert "# prices.csv is not used: none of the tables" in (folder / "dataset.yaml").read_text()
    assert check(folder / "dataset.yaml").rows["items"] == 29


def test_nothing_is_overwritten_and_bad_files_are_refused(folder: Path) -> None:
    path = write(ratings(), folder / "ratings.csv")
    output = folder / "dataset.yaml"
    output.write_text("mine")
    with pytest.raises(BadInput, match="exists already and stays as it is"):
        propose([path], output)
    assert output.read_text() == "mine"
    other = folder / "other.yaml"
    with pytest.raises(BadInput, match="is no file"):
        propose([folder / "nothing.csv"], other)
    (folder / "log.inter").write_text("a\n")
    with pytest.raises(BadInput, match="neither CSV nor Parquet"):
        propose([folder / "log.inter"], other)
    (folder / "broken.parquet").write_text("no Parquet")
    with pytest.raises(BadInput, match="cannot be read"):
        propose([folder / "broken.parquet"], other)
    assert not other.exists()


def test_the_command_ends_with_what_check_says(folder: Path) -> None:
    files = [write(ratings(), folder / "ratings.csv"), write(movies(), folder / "movies.csv")]
    result = attempt("init", *files, "--output", folder / "dataset.yaml")
    assert result.exit_code == 0
    assert f"{ROWS} impressions in 1 file" in result.stdout
