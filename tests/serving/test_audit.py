"""The audit: what is served equals what training sees, and each planted skew is found and named."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import bahe
from bahe.cli import app
from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from serving.audit.audit import audit
from serving.audit.audit_result import Audit
from serving.audit.skew import edit_distance, likely_causes, smape
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog, ServedRequest, in_sample, read_requests
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset
from tests.support.skews import rewrite_online

FEATURES = {
    "numeric": ["item_attributes:price", "user_stats_7d", "item_behaviors_30d", "user_attributes:age"],
    "categorical": ["item_attributes:genre"],
}


def recent_log() -> dict[str, pd.DataFrame]:
    """A log that ended yesterday, with attributes."""
    log = small_log(rows=400, users=12)
    end = pd.Timestamp.now("UTC").floor("D") - pd.Timedelta("20h")
    later = end - log["behaviors"]["event_timestamp"].max()
    for rows in log.values():
        rows["event_timestamp"] += later
    items = log["items"]
    items["price"] = np.where(items["item_id"] % 3 == 0, np.nan, items["item_id"] * 1.5)
    items["genre"] = np.array(["drama", "western", None])[items["item_id"] % 3]
    log["users"]["age"] = np.arange(len(log["users"])) + 20
    return log


def dataset_of(folder: Path, log: dict[str, pd.DataFrame], backbone: Path, **more: Any) -> Path:
    return write_dataset(folder, log, backbone, features=FEATURES, **more)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    folder = tmp_path_factory.mktemp("audit")
    project = bahe.open(folder / "home")
    project.run(dataset_of(folder / "log", recent_log(), tiny_backbone), tracker="none")
    return project.home


@pytest.fixture
def home(published: Home, tmp_path: Path) -> Home:
    return copy_of(published, tmp_path)


def causes(found: Audit) -> dict[str, set[str]]:
    return {one.feature: set(one.causes) for one in found.features if one.differing}


def test_everything_that_was_published_is_equal(home: Home) -> None:
    found = bahe.open(home.root).audit(last=100)
    assert found.consistent, causes(found)
    assert found.rows == 100
    named = {one.feature for one in found.features}
    assert named >= {
        "user_embedding:embedding",
        "item_embedding:embedding",
        "user_recent_atoms:recent_atoms",
        "user_stats:user_click_rate",
        "item_attributes:price",
        "item_attributes:genre",
        "user_stats_7d:user_clicks_7d",
    }
    assert 0 < found.staleness_p50_s < 600


def test_requests_that_were_logged_are_equal(home: Home) -> None:
    lookup = OnlineLookup(home, RequestLog(home))
    for user in ("u1", "u2", "u3"):
        lookup.score(user, [1, 2, 3])
        lookup.recommend(user, 5)
    found = audit(home, requests=True)
    assert found.rows == 24
    assert found.consistent, causes(found)
    # A line that a kill cut off is left out.
    (path,) = home.requests.glob("*.jsonl")
    path.write_text(path.read_text()[:-40])
    assert audit(home, requests=True).rows == 19


def test_an_online_store_behind_the_lake_is_stale(home: Home, tmp_path: Path, tiny_backbone: Path) -> None:
    lookup = OnlineLookup(home, RequestLog(home))
    log = recent_log()
    more = {
        name: rows.tail(60).copy() for name, rows in log.items() if name in ("behaviors", "impressions")
    }
    for rows in more.values():
        rows["event_timestamp"] += timedelta(hours=3)
    more["impressions"]["impression_id"] = np.arange(60) + 10_000
    log = {name: pd.concat([rows, more[name]]) if name in more else rows for name, rows in log.items()}
    bahe.open(home.root).ingest(dataset_of(tmp_path / "more", log, tiny_backbone))
    for user in sorted(set(more["behaviors"]["user_id"])):
        lookup.score(user, [1, 2, 3])
    for found in (audit(home, last=60), audit(home, requests=True)):
        named = causes(found)
        assert named["user_stats:user_impressions"] == {"stale"}
        assert named["user_embedding:embedding"] == {"stale"}
        assert {cause for causes in named.values() for cause in causes} == {"stale"}
        assert all(one.equal < 1 for one in found.features if one.feature in named)
    history = next(one for one in audit(home, last=60).features if "recent_atoms" in one.feature)
    assert history.edit_distance is not None
    assert history.edit_distance > 0


def test_a_request_a_second_late_is_shifted(home: Home) -> None:
    """Served with what happened at the very moment asked about, as an inclusive join would."""
    project = bahe.open(home.root)
    with project.lake() as connection:
        user, item, moment = connection.execute(
            "SELECT user_id, item_id, event_timestamp FROM impressions"
            " ORDER BY event_timestamp DESC LIMIT 1"
        ).fetchone()  # type: ignore[misc]
    lookup = OnlineLookup(home, RequestLog(home))
    lookup.score(user, [item], moment)
    named = causes(audit(home, requests=True))
    assert named["user_stats:user_impressions"] == {"shifted by a second"}


def test_another_model_another_default_and_a_lost_channel_are_named(home: Home) -> None:
    rewrite_online(home, "item_attributes", lambda rows: rows.assign(price=rows["price"].fillna(-1.0)))
    rewrite_online(home, "user_timeline", lambda rows: rows.assign(length_liked=0))
    named = causes(audit(home, last=100))
    assert named["item_attributes:price"] == {"other default"}
    assert named["user_timeline:length_liked"] == {"channel liked lost"}
    assert set(named) == {"item_attributes:price", "user_timeline:length_liked"}


def test_vectors_of_another_model_and_of_a_lost_channel_are_named(home: Home, tmp_path: Path) -> None:
    project = bahe.open(home.root)
    version = OnlineLookup(home).live_version()
    text = (home.root / "dataset.yaml").read_text()
    (home.root / "dataset.yaml").write_text(text.replace("epochs: 2", "epochs: 2\n  seed: 1"))
    other = project.train(tracker="none").model_version
    assert other != version
    project.embed()

    def of_the_other(rows: pd.DataFrame) -> pd.DataFrame:
        return rows[rows["model_version"] == other].assign(model_version=version)

    rewrite_online(home, "item_embedding", of_the_other)
    rewrite_online(home, "user_embedding", of_the_other)
    found = audit(home, last=50)
    assert causes(found) == {
        "user_embedding:embedding": {"other version"},
        "item_embedding:embedding": {"other version"},
    }


def test_the_command_says_what_differs_and_exits_with_three(home: Home) -> None:
    run = CliRunner().invoke(app, ["audit", "--home", str(home.root), "--last", "50"])
    assert run.exit_code == 0, run.output
    assert "100.00 %" in run.output
    rewrite_online(home, "user_stats", lambda rows: rows.assign(user_clicks=rows["user_clicks"] + 7.0))
    rewrite_online(
        home, "user_stats_7d", lambda rows: rows.assign(user_clicks_7d=rows["user_clicks_7d"] + 7)
    )
    command = ["audit", "--home", str(home.root), "--last", "50", "--json"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 3
    found = json.loads(run.stdout)
    feature = next(f for f in found["features"] if f["feature"] == "user_stats_7d:user_clicks_7d")
    assert (feature["equal"], feature["largest_difference"]) == (0, 7)
    assert feature["causes"] == {"unknown": 50}
    assert CliRunner().invoke(app, [*command, "--tolerance", "1"]).exit_code == 0


def test_what_cannot_be_audited_is_refused(home: Home) -> None:
    with pytest.raises(NotReady, match="no logged requests; start the service with"):
        audit(home, requests=True)
    with pytest.raises(BadInput, match="at least one row"):
        audit(home, last=0)
    with pytest.raises(BadInput, match="share of users to log is 2"):
        RequestLog(home, 2)
    shutil.rmtree(home.root / "online.db", ignore_errors=True)


def test_a_log_keeps_every_number_and_the_same_users(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    moment = pd.Timestamp("2024-01-01", tz="UTC").to_pydatetime()
    request = ServedRequest(
        served_at=moment,
        at=moment,
        model_version="m",
        user_id=7,
        user={"a": 0.1, "b": None, "c": "x"},
        user_vector=np.array([0.1, -2], dtype=np.float32),
        item_ids=["x", "y"],
        items={"d": [1, None]},
        item_vectors=np.array([[1, 2], [3, 0.7]], dtype=np.float32),
    )
    RequestLog(home).append(request)
    (read,) = read_requests(home)
    assert (read.user, read.items, read.user_id, read.at) == (request.user, request.items, 7, moment)
    np.testing.assert_array_equal(read.item_vectors, request.item_vectors)
    share = np.mean([in_sample(user, 0.3) for user in range(4000)])
    assert share == pytest.approx(0.3, abs=0.03)
    assert [in_sample("u", 1.0), in_sample("u", 0.0)] == [True, False]


def test_one_user_without_history_offline_is_extra_and_no_channel_is_lost() -> None:
    """A list where training has none is no default; a channel is lost only where nobody has any of it."""
    rows = np.array([0, 1])
    history = "user_recent_atoms:recent_atoms"
    found = likely_causes(history, [[1], [2]], [None, None], rows, rows, [])
    assert found == ["extra online"] * 2
    liked = "user_timeline:length_liked"
    assert likely_causes(liked, [0, 0, 4], [2, 3, 4], rows, rows, []) == ["unknown"] * 2
    assert likely_causes(liked, [0, 0, 0], [2, 3, 0], rows, rows, []) == ["channel liked lost"] * 2
    assert likely_causes(liked, [None, None], [2, 3], rows, rows, []) == ["missing online"] * 2


def test_requests_of_a_model_that_is_gone_are_left_out(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    lookup = OnlineLookup(home, RequestLog(home))
    lookup.score("u1", [1, 2])
    (path,) = home.requests.glob("*.jsonl")
    line = path.read_text()
    path.write_text(line.replace(lookup.live_version(), "bahe-gone") + line)
    found = audit(home, requests=True)
    assert (found.rows, found.consistent) == (2, True)
    assert "left out: 2 pairs of bahe-gone" in capfd.readouterr().err
    path.write_text(line.replace(lookup.live_version(), "bahe-gone"))
    with pytest.raises(NotReady, match="nothing could be audited"):
        audit(home, requests=True)


def test_a_log_that_cannot_be_written_does_not_cost_the_answer(home: Home) -> None:
    lookup = OnlineLookup(home, RequestLog(home))
    shutil.rmtree(home.requests)
    assert len(lookup.score("u1", [1, 2]).scores) == 2


def test_measures_of_difference() -> None:
    assert edit_distance([1, 2, 3], [2, 3, 4]) == 2
    assert edit_distance([], [1, 2]) == 2
    assert smape([1.0, None, 0], [3.0, 2.0, 0]) == pytest.approx(0.5)
    assert smape(["a"], ["b"]) is None
