"""The log that is made of The Complete Journey's files, over a small shop with the same columns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import bahe
from bahe.cli.pipeline import DEMOS, demo
from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.config import fetch
from materialize.config.dataset import Table, load_dataset
from materialize.frames.frame import frame
from materialize.ingest.ingest import ingest
from tests.support.cli import call

YAML = Path(fetch.__file__).with_name("complete-journey.yaml")
DEPARTMENTS = {
    "GROCERY": "grocery",
    "DRUG GM": "drug_gm",
    "PRODUCE": "produce",
    "MEAT": "meat",
    "SEAFOOD-PCKGD": "meat",
    "DELI": "other",
}
WEEKS = 6
PRODUCTS = 60
NEVER_PROMOTED, UNKNOWN = 10_060, 99_999
"""A product that is only bought, and one that the shop's list of products lacks."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six households, sixty products and a shelf of forty of them in each of two stores and six weeks."""
    folder, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    product_ids = 10_001 + np.arange(PRODUCTS)
    pd.DataFrame(
        {
            "product_id": product_ids,
            "manufacturer_id": product_ids % 7,
            "department": [list(DEPARTMENTS)[i % len(DEPARTMENTS)] for i in product_ids],
            "brand": np.where(product_ids % 3 == 0, "Private", "National"),
            "product_category": [None if i % 20 == 0 else f"CATEGORY {i % 5}" for i in product_ids],
            "product_type": [None if i % 20 == 0 else f"TYPE {i % 10}" for i in product_ids],
            "package_size": [None if i % 4 == 0 else f"{i % 3} OZ" for i in product_ids],
        }
    ).to_parquet(folder / "products.parquet")
    promoted = [
        {
            "product_id": product,
            "store_id": store,
            "display_location": rng.choice(list("0123A")),
            "mailer_location": "A",
            "week": week,
        }
        for store in (1, 2)
        for week in range(WEEKS)
        for product in rng.choice(product_ids[:-1], 40, replace=False)
    ]
    twice = promoted[0] | {"display_location": "9", "mailer_location": "D"}
    pd.DataFrame([*promoted, twice]).sample(frac=1, random_state=1).to_parquet(
        folder / "promotions.parquet"
    )
    bought = []
    for basket in range(120):
        week = basket * WEEKS // 120
        time = pd.Timestamp("2017-01-02 05:00:00") + pd.Timedelta(7 * week, "D")
        time += pd.Timedelta(int(rng.integers(6 * 24 * 3600)), "s")
        drawn = rng.choice(product_ids, int(rng.integers(1, 7)), replace=False)
        for product in (*drawn, *([UNKNOWN] if basket % 10 == 0 else [])):
            bought.append(
                {
                    "household_id": basket % 6 + 1,
                    "store_id": basket % 2 + 1,
                    "basket_id": 31_198_570_044 + basket,
                    "product_id": product,
                    "quantity": 1,
                    "week": week,
                    "transaction_timestamp": time,
                }
            )
    pd.DataFrame(bought).sample(frac=1, random_state=2).to_parquet(folder / "transactions.parquet")
    pd.DataFrame(
        {
            "household_id": [1, 2],
            "age": ["65+", "35-44"],
            "income": ["35-49K", None],
            "home_ownership": ["Homeowner", None],
            "marital_status": ["Married", "Unmarried"],
            "household_size": ["2", "5+"],
            "household_comp": ["2 Adults No Kids", "2 Adults Kids"],
            "kids_count": ["0", "3+"],
        }
    ).to_parquet(folder / "demographics.parquet")
    # All baskets instead of 4 %, of which there would be a handful.
    text = YAML.read_text()
    assert text.count("% 1000 < 40\n") == 1
    (folder / "complete-journey.yaml").write_text(text.replace("% 1000 < 40\n", "% 1000 < 1000\n"))
    return folder


@pytest.fixture(scope="module")
def home(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home.at(tmp_path_factory.mktemp("journey") / "home")
    ingest(home, shop / "complete-journey.yaml")
    return home


def answer(shop: Path, table: Table, threads: int = 2) -> pd.DataFrame:
    assert table.sql is not None
    with duckdb.connect() as connection:
        connection.execute(f"SET file_search_path = '{shop}'; SET threads = {threads}")
        return connection.sql(table.sql).to_df()


def rows_of(home: Home, query: str) -> pd.DataFrame:
    with lake(home) as connection:
        return connection.sql(query).to_df()


@pytest.fixture(scope="module")
def purchases(shop: Path) -> pd.DataFrame:
    return pd.read_parquet(shop / "transactions.parquet")


@pytest.fixture(scope="module")
def shown(home: Home) -> pd.DataFrame:
    """The lake's impressions with their basket, store and week."""
    rows = rows_of(home, "FROM impressions")
    rows["basket_id"] = rows["impression_id"].str.split("-").str[0].astype("int64")
    return rows


def test_clicked_is_what_was_promoted_and_bought(
    shop: Path, shown: pd.DataFrame, purchases: pd.DataFrame
) -> None:
    promotions = pd.read_parquet(shop / "promotions.parquet")
    places = promotions.groupby(["store_id", "week", "product_id"])[["display_location", "mailer_location"]]
    where_promoted = places.max().to_dict("index")
    shelves = promotions.groupby(["store_id", "week"])["product_id"].agg(set)
    expected_baskets = 0
    for basket, rows in purchases.groupby("basket_id"):
        store, week = rows["store_id"].iloc[0], rows["week"].iloc[0]
        bought, shelf = set(rows["product_id"]), shelves[store, week]
        mine = shown[shown["basket_id"] == basket]
        assert set(mine.loc[mine["clicked"] == 1, "item_id"]) == bought & shelf
        others = mine.loc[mine["clicked"] == 0, "item_id"]
        assert len(others) == others.nunique() == 4 * len(bought & shelf)
        assert set(others) <= shelf - bought
        assert set(mine["user_id"]) <= set(rows["household_id"])
        for row in mine.itertuples():
            place = where_promoted[store, week, row.item_id]
            assert row.context_display == place["display_location"]
            assert row.context_mailer == place["mailer_location"]
        expected_baskets += bool(bought & shelf)
    assert shown["basket_id"].nunique() == expected_baskets > 100


def test_every_product_of_a_shelf_is_drawn_alike(shown: pd.DataFrame) -> None:
    drawn = Counter(shown.loc[shown["clicked"] == 0, "item_id"])
    assert len(drawn) == PRODUCTS - 1  # all but the one that is never promoted
    assert max(drawn.values()) < 3 * np.mean(list(drawn.values()))


def test_nothing_of_a_basket_is_in_its_history(
    home: Home, shown: pd.DataFrame, purchases: pd.DataFrame
) -> None:
    behaviors = rows_of(home, "FROM behaviors")
    pairs = shown[["basket_id", "user_id", "event_timestamp"]].drop_duplicates()
    of_basket = purchases[["basket_id", "product_id", "transaction_timestamp"]].merge(pairs, on="basket_id")
    times = of_basket["transaction_timestamp"].dt.tz_localize("UTC")
    assert (times == of_basket["event_timestamp"]).all()
    # A frame is joined strictly before: it has what was bought in earlier baskets, and no more.
    bahe.open(home.root).apply()
    rows = pq.read_table(frame(home).path).to_pandas()
    for key, pattern in (("user_id", "^length_"), ("item_id", "^item_behaviors_")):
        counts = rows.filter(regex=pattern).fillna(0)
        assert counts.shape[1] == 5
        for count, id, at in zip(counts.sum(axis=1), rows[key], rows["event_timestamp"], strict=True):
            assert count == ((behaviors[key] == id) & (behaviors["event_timestamp"] < at)).sum()
    for column in ("category", "type"):
        values = behaviors["item_id"].map(rows_of(home, "FROM items").set_index("item_id")[column])
        assert rows[f"{column}_behaviors"].max() > 1
        for count, user, value, at in zip(
            rows[f"{column}_behaviors"].fillna(0),
            rows["user_id"],
            rows[column],
            rows["event_timestamp"],
            strict=True,
        ):
            before = (behaviors["user_id"] == user) & (behaviors["event_timestamp"] < at)
            assert count == (before & (values == value)).sum()


def test_a_purchase_reads_like_the_product(home: Home, shop: Path, purchases: pd.DataFrame) -> None:
    dataset = load_dataset(shop / "complete-journey.yaml")
    behaviors, items = answer(shop, dataset.behaviors), answer(shop, dataset.items)
    assert (
        len(behaviors) == len(rows_of(home, "FROM behaviors")) == (purchases["product_id"] != UNKNOWN).sum()
    )
    assert set(behaviors["item_id"]) - set(items["item_id"]) == {NEVER_PROMOTED}
    both = behaviors.merge(items, on="item_id", suffixes=("", "_of_item"))
    assert (both["text"] == both["text_of_item"]).all()
    assert (both["department"].map(DEPARTMENTS) == both["channel"]).all()
    texts = items.set_index("item_id")["text"]
    assert texts[10_001] == "category 1, type 1, 2 oz, national brand"
    assert texts[10_020] == "grocery, private brand"  # no category, no type, no size


def test_the_log_is_the_same_each_time(shop: Path, tmp_path: Path) -> None:
    dataset = load_dataset(shop / "complete-journey.yaml")
    again = tmp_path / "again"
    again.mkdir()
    for path in shop.glob("*.parquet"):
        pd.read_parquet(path).sample(frac=1, random_state=7).to_parquet(again / path.name)
    key = ["impression_id"]
    first = answer(shop, dataset.impressions).sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(
        first, answer(again, dataset.impressions, threads=1).sort_values(key, ignore_index=True)
    )
    # A smaller share is a part of the baskets, and what they were shown does not change.
    part = answer(shop, load_dataset(YAML).impressions)
    assert 0 < len(part) < len(first) / 4
    merged = part.merge(first)
    assert len(merged) == len(part)


def test_each_demo_is_a_download_with_a_dataset() -> None:
    (choices, *_) = get_args(get_type_hints(demo, include_extras=True)["log"])
    assert set(get_args(choices)) == set(DEMOS)
    for name in DEMOS:
        extra = fetch.DOWNLOADS[name].extra
        assert extra == f"{name}.yaml"
        assert load_dataset(YAML.with_name(extra)).name == name


def test_the_demo_ends_with_scores(
    shop: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for path in shop.glob("*.parquet"):
        (folder / path.name).symlink_to(path)
    small = f"""
backbone: {{path: {tiny_backbone}, shallow_layers: 2, deep_layers: 2}}
model: {{deep_width: 8, profile_width: 8, head_width: 16}}
training: {{epochs: 1, impressions_per_step: 200}}
"""
    (folder / "complete-journey.yaml").write_text((shop / "complete-journey.yaml").read_text() + small)
    fetched: list[str] = []

    def from_here(what: str) -> Path:
        fetched.append(what)
        return folder

    monkeypatch.setattr(fetch, "fetch", from_here)
    done = call("demo", "complete-journey", "--json", tmp_path / "results.json", home=tmp_path / "home")
    assert fetched == ["complete-journey", "smollm2-135m"]
    assert "bahe recommend --user 1 -k 5 --at 2018-01-02" in done.output
    assert "is cold" not in done.output
    assert '"model": "bahe"' in (tmp_path / "results.json").read_text()


@pytest.mark.slow
def test_the_files_are_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAHE_CACHE", str(tmp_path))
    folder = fetch.fetch("complete-journey")
    rows = {path.stem: pq.read_metadata(path).num_rows for path in folder.glob("*.parquet")}
    assert rows == {
        "transactions": 1_469_307,
        "products": 92_331,
        "promotions": 20_940_529,
        "demographics": 801,
    }
    found = answer(folder, load_dataset(folder / "complete-journey.yaml").impressions)
    assert (len(found), found["clicked"].sum()) == (64_085, 12_817)
