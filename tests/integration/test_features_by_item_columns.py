"""Views keyed by a user and a column of items reach the frame, the model, requests and the audit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

import bahe
from bahe_core.errors import BadInput
from feature_repo.store import open_store
from materialize.frames.frame import latest_frame
from serving.audit.audit import audit
from serving.lookup.candidates import ItemsOfUser
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset

DEFINITIONS = """
from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float32, Float64, Int64

from feature_repo.definitions import user

category = Entity(name="category", join_keys=["category"], value_type=ValueType.STRING)
shelf = Entity(name="shelf", join_keys=["shelf"], value_type=ValueType.INT64)
country = Entity(name="country", join_keys=["country"], value_type=ValueType.STRING)


def view(name, entities, *fields):
    return FeatureView(
        name=name,
        entities=entities,
        ttl=timedelta(0),
        schema=list(fields),
        source=FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp"),
    )


habit = view("habit", [user, category], Field(name="visits", dtype=Int64))
rent = view("rent", [shelf], Field(name="cost", dtype=Float64))
abroad = view("abroad", [country], Field(name="distance", dtype=Int64))
mood = view("mood", [category], Field(name="tone", dtype=Array(Float32)))


@on_demand_feature_view(sources=[habit], schema=[Field(name="seldom", dtype=Float64)])
def seldom(inputs):
    import pandas as pd

    frame = pd.DataFrame()
    frame["seldom"] = 1.0 / (1.0 + pd.to_numeric(inputs["visits"]).fillna(0.0).astype(float))
    return frame
"""
NUMERIC = ["habit", "rent:cost", "seldom", "user_category_behaviors", "user_shelf_behaviors_30d"]
CATEGORIES = ["drama", "western", "crime"]


def with_columns(log: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Items have a category and a shelf, which for many change in the middle of the log; some have none."""
    rng = np.random.default_rng(5)
    items, times = log["items"], log["impressions"]["event_timestamp"]

    def versions(rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows.copy()
        rows["category"] = rng.choice(np.array([*CATEGORIES, None], dtype=object), len(rows))
        rows["shelf"] = pd.array(rng.integers(1, 4, len(rows)), dtype="Int64")
        rows.loc[rng.random(len(rows)) < 0.2, "shelf"] = pd.NA
        return rows

    later = items.sample(frac=0.6, random_state=1).copy()
    span = (times.max() - times.min()) * 0.9
    drawn = pd.Series(rng.random(len(later)), index=later.index)
    later["event_timestamp"] = (times.min() + span * drawn).dt.floor("us")
    # At the very instant of an impression of the item, which does not know of it yet.
    shown = log["impressions"].drop_duplicates("item_id").set_index("item_id")["event_timestamp"]
    later["event_timestamp"] = later["event_timestamp"].where(
        rng.random(len(later)) < 0.5, later["item_id"].map(shown).fillna(times.min())
    )
    return {**log, "items": pd.concat([versions(items), versions(later)], ignore_index=True)}


def write_views(folder: Path, log: dict[str, pd.DataFrame]) -> None:
    folder.mkdir(parents=True)
    (folder / "definitions.py").write_text(DEFINITIONS)
    rng = np.random.default_rng(9)
    times = log["impressions"]["event_timestamp"]

    def write(name: str, keys: pd.DataFrame, **values: object) -> None:
        rows = keys.loc[keys.index.repeat(4)].reset_index(drop=True)
        moments = times.to_numpy()[rng.integers(0, len(times), len(rows))]
        rows["event_timestamp"] = pd.to_datetime(moments, utc=True)
        rows = rows.drop_duplicates([*keys.columns, "event_timestamp"])
        rows.assign(**{k: make(len(rows)) for k, make in values.items()}).to_parquet(
            folder / f"{name}.parquet"
        )

    users = pd.DataFrame({"user_id": sorted(log["users"]["user_id"])})
    pairs = users.merge(pd.DataFrame({"category": CATEGORIES}), how="cross")
    write("habit", pairs.sample(frac=0.8, random_state=2), visits=lambda n: rng.integers(0, 50, n))
    write("rent", pd.DataFrame({"shelf": [1, 2]}), cost=lambda n: rng.random(n) * 100)
    write("abroad", pd.DataFrame({"country": ["x"]}), distance=lambda n: np.ones(n, int))
    write("mood", pd.DataFrame({"category": ["drama"]}), tone=lambda n: [[1.0, 2.0]] * n)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> bahe.Project:
    folder = tmp_path_factory.mktemp("by_columns")
    log = with_columns(small_log(rows=500, users=12))
    write_views(folder / "log" / "features", log)
    dataset = write_dataset(
        folder / "log",
        log,
        tiny_backbone,
        feature_repo="features",
        features={"numeric": NUMERIC, "categorical": ["item_attributes:category"]},
    )
    project = bahe.open(folder / "home")
    project.run(dataset, tracker="none")
    return project


@contextmanager
def _changed(project: bahe.Project, **sections: object) -> Iterator[None]:
    """Another dataset.yaml in the home."""
    path = project.home.root / "dataset.yaml"
    before = path.read_text()
    try:
        path.write_text(yaml.safe_dump(yaml.safe_load(before) | sections))
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize("freshness", ["nightly", "live"])
def test_they_are_joined_by_the_item_of_the_moment(freshness: str, project: bahe.Project) -> None:
    """Each row against brute force: the item's last version strictly before, then the key's last value."""
    with _changed(project, freshness=freshness):
        project.frame()
    log = Path(yaml.safe_load((project.home.root / "dataset.yaml").read_text())["feature_repo"]).parent
    items = pd.read_parquet(log / "items.parquet")
    views = {name: pd.read_parquet(log / "features" / f"{name}.parquet") for name in ("habit", "rent")}

    def last_before(rows: pd.DataFrame, moment: pd.Timestamp, **keys: object) -> pd.Series | None:
        for name, value in keys.items():
            if value is None or pd.isna(value):
                return None
            rows = rows[rows[name] == value]
        rows = rows[rows["event_timestamp"] < moment].sort_values("event_timestamp")
        return None if rows.empty else rows.iloc[-1]

    frame = pq.read_table(latest_frame(project.home).path).to_pandas()
    assert "shelf" not in frame  # a key that no list names
    known = {"visits": 0, "cost": 0, "category": 0}
    for row in frame.to_dict("records"):
        moment = row["event_timestamp"].floor("D") if freshness == "nightly" else row["event_timestamp"]
        item = last_before(items, moment, item_id=row["item_id"])
        category, shelf = (None, None) if item is None else (item["category"], item["shelf"])
        habit = last_before(views["habit"], moment, user_id=row["user_id"], category=category)
        rent = last_before(views["rent"], moment, shelf=shelf)
        expected = {
            "category": category,
            "visits": None if habit is None else habit["visits"],
            "cost": None if rent is None else rent["cost"],
        }
        for name, value in expected.items():
            if value is None:
                assert row[name] is None or np.isnan(row[name])
            else:
                known[name] += 1
                assert row[name] == value
        assert row["seldom"] == 1 / (1 + (expected["visits"] or 0))
    assert min(known.values()) > 50
    assert max(known.values()) < len(frame)


def test_a_request_reads_what_training_sees(project: bahe.Project) -> None:
    lookup = OnlineLookup(project.home, RequestLog(project.home))
    version = lookup.live_version()
    references = lookup.models.inputs(version).references
    counted = [f"user_category_behaviors:category_{kind}" for kind in ("behaviors", "first_us", "last_us")]
    counted.append("user_shelf_behaviors_30d:shelf_behaviors_30d")
    assert set(references["attribute"]) == {"habit:visits", "rent:cost", "seldom:seldom", *counted}
    _, values = lookup.items(list(range(25)), version, "u1")
    assert None in values["category"]
    assert any(value is not None for value in values["visits"])
    lookup.score("u1", list(range(25)))
    lookup.recommend("u2", 5)
    for found in (audit(project.home, requests=True), audit(project.home, last=300)):
        assert found.consistent, [(one.feature, one.causes) for one in found.features if one.differing]
        assert {*references["attribute"], "item_attributes:category"} <= {
            one.feature for one in found.features
        }


def test_a_batch_of_users_reads_the_same_features(project: bahe.Project) -> None:
    lookup, at = OnlineLookup(project.home), datetime(2030, 1, 1, tzinfo=UTC)
    asked = [ItemsOfUser(user_id=f"u{n}", item_ids=range(n, n + 9), at=at) for n in range(12)]
    for one, found in zip(asked, lookup.score_batch(asked), strict=True):
        scores = lookup.score(one.user_id, one.item_ids, at).scores
        alone = {score.item_id: score.probability for score in scores}
        batch = dict(zip(found.item_ids, found.probabilities, strict=True))
        assert batch == pytest.approx(alone, abs=1e-6)


def test_a_user_whose_id_is_none_has_what_is_of_the_items(project: bahe.Project) -> None:
    lookup = OnlineLookup(project.home)
    items, nobody = list(range(25)), "\ud800"  # no text
    user = lookup.user_or_empty(nobody)
    _, values = lookup._items_for(user, items)
    _, of_new = lookup._items_for(lookup.user_or_empty("never seen"), items)
    assert values == of_new
    assert values["visits"] == [None] * 25
    assert any(value is not None for value in values["cost"])
    assert None not in lookup.score_each(nobody, items).probabilities


def test_the_online_values_are_those_of_the_items_now(project: bahe.Project) -> None:
    """Without bahe's own reading: Feast's answer for the category that each item has by now."""
    store = open_store(project.home)
    lookup = OnlineLookup(project.home)
    _, values = lookup.items(list(range(25)), lookup.live_version(), "u1")
    asked = [{"user_id": "u1", "category": one or "none"} for one in values["category"]]
    assert values["visits"] == store.get_online_features(["habit:visits"], asked).to_dict()["visits"]


def test_a_key_that_no_list_names_is_no_column(project: bahe.Project) -> None:
    listed = pq.read_table(latest_frame(project.home).path)
    with _changed(project, features={"numeric": ["habit"]}):
        project.frame()
        frame = pq.read_table(latest_frame(project.home).path)
    project.frame()
    assert "category" not in frame.column_names
    assert frame["visits"].equals(listed["visits"])
    assert frame["impression_id"].equals(listed["impression_id"])


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"numeric": ["abroad"]}, r"abroad is keyed by country; .* or of columns of items"),
        ({"vectors": ["mood"]}, r"mood is keyed by category; vectors are of a user_id, an item_id or both"),
    ],
)
def test_other_keys_are_refused(features: dict[str, list[str]], words: str, project: bahe.Project) -> None:
    with _changed(project, features=features), pytest.raises(BadInput, match=words):
        project.frame()


def test_a_version_of_an_item_that_comes_late_moves_what_is_online(
    project: bahe.Project, tmp_path: Path
) -> None:
    """What it counts for is another category, of which the store has later rows."""
    log = Path(yaml.safe_load((project.home.root / "dataset.yaml").read_text())["feature_repo"]).parent
    shutil.copytree(log, tmp_path / "log")
    items = pd.read_parquet(log / "items.parquet")
    late = items[items["category"].isin(CATEGORIES)].drop_duplicates("item_id")[::2].copy()
    late["event_timestamp"] += pd.Timedelta("40D")
    late["category"] = late["category"].map(dict(zip(CATEGORIES, [*CATEGORIES[1:], "opera"], strict=True)))
    pd.concat([items, late]).drop_duplicates(["item_id", "event_timestamp"]).to_parquet(
        tmp_path / "log" / "items.parquet"
    )
    moved = bahe.open(copy_of(project.home, tmp_path).root)
    keys = [
        {"user_id": f"u{u}", "category": category} for u in range(12) for category in [*CATEGORIES, "opera"]
    ]

    def counts() -> tuple[list[float], list[float]]:
        store, features = moved.feature_store(), ["user_category_behaviors:category_behaviors"]
        online = store.get_online_features(features, keys).to_dict()["category_behaviors"]
        now = pd.DataFrame(keys).assign(event_timestamp=pd.Timestamp.now("UTC"))
        offline = store.get_historical_features(now, features).to_df()["category_behaviors"]
        return [one or 0 for one in online], offline.fillna(0).tolist()

    before, expected = counts()
    assert before == expected
    moved.ingest(tmp_path / "log" / "dataset.yaml")
    moved.encode()
    moved.embed()
    moved.publish()
    online, expected = counts()
    assert online == expected
    assert online != before
