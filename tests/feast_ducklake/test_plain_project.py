"""The plug-ins in a Feast project that has nothing else of bahe: the example, and its settings."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from feast import Entity, FeatureStore, FeatureView, Field, ValueType
from feast.types import Int64

import feast_ducklake

EXAMPLE = Path(__file__).parents[2] / "examples" / "feast"
ALONE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (
            "bahe", "bahe_models", "bahe_synth", "benchmarks", "feature_repo", "materialize", "serving",
            "torch", "transformers", "validation",
        ):
            raise ImportError(f"{name} is not for a plain Feast project")

sys.meta_path.insert(0, Refuse())
runpy.run_path(sys.argv[1], run_name="__main__")
"""
SHARED = {"catalogue": "postgresql://postgres@127.0.0.1:5432/test"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example, without what a run of it may have left."""
    ignored = shutil.ignore_patterns("data", "__pycache__")
    return Path(shutil.copytree(EXAMPLE, tmp_path / "project", ignore=ignored))


def configure(project: Path, **offline: Any) -> FeatureStore:
    """The project's store with these settings of the offline store, its lake's place left out."""
    path = project / "feature_store.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["offline_store"] = {"type": "feast_ducklake.DuckLakeOfflineStore", **offline}
    path.write_text(yaml.safe_dump(settings))
    return FeatureStore(str(project))


def test_the_example_needs_no_other_room(project: Path) -> None:
    words = [sys.executable, "-c", ALONE, str(project / "rides.py")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert printed[1].split()[-2:] == ["4", "30.0"]  # strictly before noon: 0, 3, 6 and 9 o'clock
    assert printed[3].split()[-2:] == ["<NA>", "NaN"]
    assert printed[-1] == "{'driver_id': [1], 'rides': [10]}"
    assert len([line for line in (EXAMPLE / "rides.py").read_text().splitlines() if line]) <= 36


@pytest.mark.parametrize("place", ["file", "postgres"])
def test_a_lake_is_named_by_catalogue_and_data(
    place: str, project: Path, request: pytest.FixtureRequest
) -> None:
    catalogue = {"catalogue": "lake/catalogue.sqlite"}
    if place == "postgres":
        catalogue = {**SHARED, "schema": request.getfixturevalue("postgres_schema")}
    store = configure(project, **catalogue, data="lake/files")
    with pytest.raises(
        Exception, match=r"there is no lake in .* yet; make one with feast_ducklake.open_lake"
    ):
        with feast_ducklake.open_lake(store.config):
            pass
    with feast_ducklake.open_lake(store.config, create=True) as lake:
        lake.execute("CREATE TABLE counts AS SELECT 1 AS user_id, now() AS event_timestamp, 7 AS count")
        lake.execute("INSERT INTO counts SELECT i, now(), i FROM range(100) AS t(i)")  # not inlined
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = feast_ducklake.DuckLakeSource(name="counts", table="counts")
    view = FeatureView(name="v", entities=[user], schema=[Field(name="count", dtype=Int64)], source=source)
    store.apply([user, view])
    asked = pd.DataFrame({"user_id": [5], "event_timestamp": [datetime(2100, 1, 1, tzinfo=UTC)]})
    assert store.get_historical_features(asked, ["v:count"]).to_df()["count"].tolist() == [5]
    assert list((project / "lake" / "files").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("offline", "words"),
    [
        ({}, "give `catalogue` and `data`, or the `home`"),
        ({"catalogue": "lake.sqlite"}, "give `catalogue` and `data`, or the `home`"),
        ({"home": "h", "catalogue": "c", "data": "d"}, "give `catalogue` and `data`, or the `home`"),
        ({"catalogue": "postgresql://u:secret@host/db", "data": "d"}, "holds a password"),
        ({"catalogue": "mysql://host/db", "data": "d"}, "not of the form postgresql://"),
    ],
)
def test_settings_that_name_no_lake_are_refused(offline: dict[str, str], words: str, project: Path) -> None:
    with pytest.raises(Exception, match=words) as refused:
        configure(project, **offline)
    assert "secret" not in str(refused.value).split("input_value")[0]


@pytest.mark.slow
def test_a_project_of_version_0_1_still_opens(project: Path) -> None:
    """Its settings and its registry name the classes by the modules that they were in."""
    subprocess.run([sys.executable, project / "rides.py"], check=True, capture_output=True, cwd=project)
    path = project / "feature_store.yaml"
    settings = path.read_text()
    for now, before in {
        "feast_ducklake.AtomicRegistryStore": "materialize.feast_registry.AtomicRegistryStore",
        "feast_ducklake.DuckLakeOfflineStore": "materialize.feast_offline.DuckLakeOfflineStore",
        "feast_ducklake.GuardedSqliteOnlineStore": "materialize.feast_sqlite.GuardedSqliteOnlineStore",
        "feast_ducklake.ArrowEngine": "materialize.feast_engine.ArrowEngine",
        "feast_ducklake.StrictProvider": "local",
    }.items():
        assert now in settings
        settings = settings.replace(now, before)
    path.write_text(settings)
    registry = FeatureStore(str(project)).registry.proto()
    for view in registry.feature_views:
        view.spec.batch_source.data_source_class_type = "materialize.feast_offline.DuckLakeSource"
    for source in registry.data_sources:
        source.data_source_class_type = "materialize.feast_offline.DuckLakeSource"
    (project / "data" / "registry.db").write_bytes(registry.SerializeToString())
    feast = Path(sys.executable).with_name("feast")
    for words in (["data-sources", "list"], ["materialize", "--disable-event-timestamp"], ["apply"]):
        done = subprocess.run([feast, "-c", project, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    answer = FeatureStore(str(project)).get_online_features(["earnings:rides"], [{"driver_id": 1}])
    assert answer.to_dict()["rides"] == [10]
