"""What `features` of dataset.yaml lists reaches the frame, the model, the online store and a request."""

from __future__ import annotations

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
from serving.lookup.online_lookup import OnlineLookup
from tests.support.logs import small_log, write_dataset

NUMERIC = [
    "item_attributes:price",
    "user_attributes:age",
    "user_stats",  # some of which the model reads anyway
    "user_timeline",
    "user_stats_7d",
    "item_behaviors_30d",
    "user_item_behaviors",
    "user_item_channels",
    "user_item_channels_30d:pair_behaviors_liked_30d",
]
CATEGORICAL = ["item_attributes:genre", "item_attributes:fresh", "user_attributes:job"]
COLUMNS = {
    "genre",
    "job",
    "price",
    "age",
    "fresh",
    *(f"user_{kind}_7d" for kind in ("impressions", "clicks", "click_rate")),
    *(f"item_behaviors_{channel}_30d" for channel in ("liked", "disliked")),
    *(f"pair_{kind}" for kind in ("behaviors", "behaviors_liked", "first_us", "last_us")),
    "pair_behaviors_liked_30d",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> bahe.Project:
    folder = tmp_path_factory.mktemp("features")
    log = small_log(rows=400, users=12)
    # Until an hour ago, so that windows hold something when a request comes.
    later = (
        pd.Timestamp.now("UTC").floor("s") - pd.Timedelta("1h") - log["behaviors"]["event_timestamp"].max()
    )
    for rows in log.values():
        rows["event_timestamp"] += later
    items = log["items"]
    items["price"] = np.where(items["item_id"] % 3 == 0, np.nan, items["item_id"] * 1.5)
    items["fresh"] = items["item_id"] % 2 == 0
    items["genre"] = np.array(["drama", "western", None])[items["item_id"] % 3]
    log["users"]["age"] = np.arange(len(log["users"])) + 20
    log["users"]["job"] = "clerk"
    log["impressions"]["device"] = np.where(log["impressions"]["clicked"] == 1, "phone", "desk")
    dataset = write_dataset(
        folder / "log",
        log,
        tiny_backbone,
        features={"numeric": NUMERIC, "categorical": CATEGORICAL},
        impressions={"files": "impressions.parquet", "context": ["device"]},
    )
    project = bahe.open(folder / "home")
    project.run(dataset)
    return project


def test_the_frame_and_the_model_have_them(project: bahe.Project) -> None:
    frame = latest_frame(project.home)
    assert set(pq.read_schema(frame.path).names) >= COLUMNS
    assert frame.facts["numeric"][0] == "item_attributes:price"
    lookup = OnlineLookup(project.home)
    artifact = lookup.artifact(lookup.live_version())
    dense = artifact.dense
    assert set(dense.columns) >= COLUMNS - {"genre", "fresh", "job"}
    assert artifact.context_columns == ("device", "genre", "fresh", "job")
    assert artifact.model.context is not None
    assert artifact.model.context.weight.any()  # learned from them
    rows = pq.read_table(frame.path).to_pandas()
    training = rows[rows["split"] == "train"]
    logs = np.sign(training["price"]) * np.log1p(np.abs(training["price"]))
    assert dense.mean[dense.names.index("log_price")] == pytest.approx(logs.mean())


def test_a_request_reads_what_training_would_have_seen(project: bahe.Project) -> None:
    """At a moment after the log's end, the probability is that of the offline features of that moment."""
    lookup, store = OnlineLookup(project.home), open_store(project.home)
    artifact = lookup.artifact(lookup.live_version())
    now = pd.Timestamp.now("UTC")
    items = list(range(10))
    answer = {
        score.item_id: score.probability
        for score in lookup.score("u1", items, now.to_pydatetime(), context={"device": "phone"}).scores
    }
    asked = pd.DataFrame({"user_id": "u1", "item_id": items, "event_timestamp": now})
    asked["model_version"] = artifact.model_version
    references = [
        *artifact.dense.numeric,
        *CATEGORICAL,
        *(f"user_timeline:length_{channel}" for channel in artifact.dense.channels),
        *(
            f"{e}_stats:{e}_{k}"
            for e in ("user", "item")
            for k in ("impressions", "click_rate", "last_impression_us")
        ),
    ]
    offline = store.get_historical_features(asked, list(dict.fromkeys(references))).to_df()
    vectors = store.get_historical_features(asked, ["item_embedding:embedding"]).to_df()["embedding"]
    genres = offline["genre"].astype(object).where(offline["genre"].notna(), None).tolist()
    expected = artifact.score(
        np.tile(lookup.user("u1").vector, (len(items), 1)),
        np.stack(vectors.to_list()).astype(np.float32),
        {c: offline[c].to_numpy(dtype=np.float64, na_value=np.nan) for c in artifact.dense.columns},
        offline[[f"length_{c}" for c in artifact.dense.channels]].fillna(0).to_numpy(dtype=np.int64),
        np.full(len(items), now.value // 1000, dtype=np.int64),
        {
            "device": ["phone"] * len(items),
            "genre": genres,
            "fresh": offline["fresh"].tolist(),
            "job": ["clerk"] * len(items),
        },
    )
    with pytest.raises(BadInput, match="genre is not a context column"):
        lookup.score("u1", items, context={"genre": "drama"})
    assert offline["price"].isna().any()
    assert offline["user_impressions_7d"].min() > 0
    assert offline["item_behaviors_liked_30d"].max() > 0
    assert offline["pair_behaviors"].max() > 0
    assert offline["pair_behaviors"].isna().any()
    assert [answer[item] for item in items] == pytest.approx(expected.tolist(), abs=1e-6)
    statistics = lookup.user("u1").statistics
    assert (statistics["age"], statistics["job"]) == (21, "clerk")
    assert "user_click_rate_7d" in statistics


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("item_prices", r"item_prices is of no registered view; .* or choose from .*item_attributes"),
        ("item_attributes:prise", r"item_attributes:prise is not there; item_attributes has .*price"),
        ("item_attributes:genre", r"item_attributes:genre is String, no number"),
        ("atomic_behavior_embedding", r"keyed by atom_id, encoder_version; the model reads features of a"),
    ],
)
def test_what_cannot_be_a_feature_is_refused(reference: str, words: str, project: bahe.Project) -> None:
    path = project.home.root / "dataset.yaml"
    before = path.read_text()
    try:
        path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"features": {"numeric": [reference]}}))
        with pytest.raises(BadInput, match=words):
            project.frame()
    finally:
        path.write_text(before)
