"""A team's own Feast definitions reach the frame, the model, the online store, requests and the audit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

import bahe
from bahe_core.errors import BadInput
from bahe_lake import runs
from bahe_lake.connection import lake
from feature_repo.team import team_objects
from materialize.frames.frame import latest_frame
from serving.audit.audit import audit
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog
from tests.support.logs import small_log, write_dataset

DEFINITIONS = """
from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

from feast_ducklake import DuckLakeSource
from feature_repo.definitions import item, user
from scale import SCALE

credit = FeatureView(
    name="credit",
    entities=[user],
    ttl=timedelta(0),
    schema=[Field(name="limit", dtype=Float64), Field(name="tier", dtype=String)],
    source=FileSource(name="credit", path="credit.parquet", timestamp_field="event_timestamp"),
)
shelf = FeatureView(
    name="shelf",
    entities=[item],
    ttl=timedelta(0),
    schema=[Field(name="text_length", dtype=Int64)],
    source=DuckLakeSource(
        name="shelf",
        query="SELECT item_id, event_timestamp, len(text) AS text_length FROM lake.main.items",
    ),
)
affinity = FeatureView(
    name="affinity",
    entities=[user, item],
    ttl=timedelta(0),
    schema=[Field(name="visits", dtype=Int64)],
    source=FileSource(name="affinity", path="affinity.parquet", timestamp_field="event_timestamp"),
)


@on_demand_feature_view(sources=[credit], schema=[Field(name="limit_scaled", dtype=Float64)])
def scaled(inputs):
    import pandas as pd

    frame = pd.DataFrame()
    frame["limit_scaled"] = inputs["limit"] / 1000
    return frame


credit_service = FeatureService(name="credit_service", features=[credit], description=f"{SCALE}")
"""
NUMERIC = ["credit:limit", "shelf", "affinity:visits", "scaled:limit_scaled"]


def team_folder(folder: Path, log: dict[str, pd.DataFrame]) -> Path:
    """Definitions with their data: limits that rise, and visits that come in the middle of the log."""
    folder.mkdir(parents=True)
    (folder / "definitions.py").write_text(DEFINITIONS)
    (folder / "scale.py").write_text("SCALE = 1000.0\n")
    shown = log["impressions"]
    users, start = sorted(log["users"]["user_id"]), shown["event_timestamp"].min()
    credit = pd.DataFrame({"user_id": users * 2, "event_timestamp": start})
    credit["limit"] = np.arange(len(credit)) * 10.0
    credit["tier"] = np.where(credit["limit"] > 100, "gold", "grey")
    credit.loc[len(users) :, "event_timestamp"] += pd.Timedelta("40d")
    credit.to_parquet(folder / "credit.parquet")
    pairs = shown.drop_duplicates(["user_id", "item_id"])[["user_id", "item_id", "event_timestamp"]]
    pairs.assign(visits=np.arange(len(pairs))).to_parquet(folder / "affinity.parquet")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> bahe.Project:
    folder = tmp_path_factory.mktemp("team")
    log = small_log(rows=400, users=12)
    team_folder(folder / "log" / "features", log)
    dataset = write_dataset(
        folder / "log",
        log,
        tiny_backbone,
        feature_repo="features",
        features={"numeric": NUMERIC, "categorical": ["credit:tier"]},
    )
    project = bahe.open(folder / "home")
    project.run(dataset, tracker="none")
    return project


def test_they_are_joined_point_in_time(project: bahe.Project) -> None:
    rows = pq.read_table(latest_frame(project.home).path).to_pandas()
    folder = Path(yaml.safe_load((project.home.root / "dataset.yaml").read_text())["feature_repo"])
    credit = pd.read_parquet(folder / "credit.parquet")
    affinity = pd.read_parquet(folder / "affinity.parquet").set_index(["user_id", "item_id"])
    for row in rows.to_dict("records"):
        before = credit[
            (credit.user_id == row["user_id"]) & (credit.event_timestamp < row["event_timestamp"])
        ]
        limit = before["limit"].iloc[-1] if len(before) else np.nan
        np.testing.assert_equal(row["limit"], limit)
        np.testing.assert_equal(row["limit_scaled"], limit / 1000)
        pair = affinity.loc[(row["user_id"], row["item_id"])]
        seen = pair["visits"] if pair["event_timestamp"] < row["event_timestamp"] else np.nan
        np.testing.assert_equal(row["visits"], seen)
    assert rows["visits"].notna().any()
    assert rows["visits"].isna().any()
    assert rows["tier"].nunique() == 2


def test_a_request_reads_what_training_sees(project: bahe.Project) -> None:
    lookup = OnlineLookup(project.home, RequestLog(project.home))
    references = lookup.models.inputs(lookup.live_version()).references
    assert references["pair"] == ["affinity:visits"]
    assert {"credit:limit", "scaled:limit_scaled", "credit:tier"} <= set(references["user"])
    lookup.score("u1", list(range(10)))
    lookup.recommend("u2", 5)
    for found in (audit(project.home, requests=True), audit(project.home, last=100)):
        assert found.consistent, [(one.feature, one.causes) for one in found.features if one.differing]
        assert {"affinity:visits", "scaled:limit_scaled"} <= {one.feature for one in found.features}
    (request,) = project.home.requests.glob("*.jsonl")
    assert '"visits"' in request.read_text()


def test_changed_values_are_a_new_frame_and_are_published(project: bahe.Project) -> None:
    assert project.frame().skipped
    assert project.publish().skipped
    folder = Path(yaml.safe_load((project.home.root / "dataset.yaml").read_text())["feature_repo"])
    path = folder / "credit.parquet"
    before = pd.read_parquet(path)
    last = before.tail(13).assign(limit=np.arange(13) + 5.0)
    last["event_timestamp"] += pd.Timedelta("1d")
    try:
        pd.concat([before, last]).to_parquet(path)
        assert not audit(project.home, last=50).consistent
        assert not project.publish().skipped
        assert audit(project.home, last=50).consistent
        assert not project.frame().skipped
        # Stamped with a time before many impressions, of which the last frame said something else.
        assert set(_rewritten(project)) == {"limit", "limit_scaled"}
        assert min(_rewritten(project).values()) > 0.5
        project.train(tracker="none")
        report = (project.home.reports / "training.html").read_text()
        assert "had another value in the frame before for" in report
    finally:
        before.to_parquet(path)


def _rewritten(project: bahe.Project) -> dict[str, float]:
    with lake(project.home) as connection:
        last = runs.last(connection, "frame")
    assert last is not None
    return last.facts["rewritten"]


def test_check_names_its_line(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, small_log(rows=40), feature_repo="nowhere")
    line = next(n for n, text in enumerate(dataset.read_text().splitlines(), 1) if "feature_repo" in text)
    with pytest.raises(BadInput, match=rf"line {line}.*nowhere is no folder with Python files"):
        bahe.check(dataset)


def test_files_import_one_another_and_ours(tmp_path: Path) -> None:
    """Each file runs once, whoever imports it, and what it imports of bahe is not registered twice."""
    (tmp_path / "views.py").write_text(
        DEFINITIONS.replace("from scale import SCALE", "SCALE = 1.0")
        + "from feature_repo.definitions import user_stats\n"
    )
    (tmp_path / "a_service.py").write_text(
        "from feast import FeatureService\nfrom views import credit, user_stats\n"
        "both = FeatureService(name='both', features=[credit, user_stats])\n"
    )
    hidden = tmp_path / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "views.py").write_text("1 / 0")
    names = sorted(type(thing).__name__ + " " + thing.name for thing in team_objects(tmp_path))
    assert names.count("FeatureView credit") == 1
    assert "FeatureService both" in names
    assert "views" not in sys.modules


def test_a_changed_function_is_a_new_frame(project: bahe.Project) -> None:
    path = project.home.root / "dataset.yaml"
    folder = Path(yaml.safe_load(path.read_text())["feature_repo"])
    before = (folder / "definitions.py").read_text()
    project.frame()
    try:
        (folder / "definitions.py").write_text(before.replace("/ 1000", "/ 100"))
        project.apply()
        assert not project.frame().skipped
    finally:
        (folder / "definitions.py").write_text(before)
        project.apply()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1 +", r"definitions.py, line 1, fails .*invalid syntax"),
        ("import feast\n\nfeast.nothing", r"definitions.py, line 3, fails"),
        ("x = 1", r"defines no entity, view or service"),
    ],
)
def test_definitions_that_fail_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "definitions.py").write_text(text)
    with pytest.raises(BadInput, match=words):
        team_objects(tmp_path)


def test_a_name_that_bahe_has_and_a_folder_that_is_not_there_are_refused(
    project: bahe.Project, tmp_path: Path
) -> None:
    path = project.home.root / "dataset.yaml"
    before = path.read_text()
    (tmp_path / "own.py").write_text(DEFINITIONS.replace('name="credit",', 'name="user_stats",', 1))
    (tmp_path / "scale.py").write_text("SCALE = 1.0\n")
    try:
        for folder, words in (
            (tmp_path, "the view user_stats, which bahe has"),
            (tmp_path / "no", "is no"),
        ):
            path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"feature_repo": str(folder)}))
            with pytest.raises(BadInput, match=words):
                project.apply()
    finally:
        path.write_text(before)
