"""`feast` on a small repository over the lake: sources in words, and values online night after night."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from feast import FeatureStore
from feast.cli.cli import cli

from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from tests.support.feast_lake import write_tables

DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, ValueType
from feast.types import Int64
from feast_ducklake import DuckLakeSource

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
clicks = FeatureView(
    name="clicks", entities=[user], ttl=timedelta(0), schema=[Field(name="count", dtype=Int64)],
    source=DuckLakeSource(name="click_counts", table="clicks", description="Clicks so far.", owner="us"),
)
"""


@pytest.fixture
def repository(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Feast repository whose lake has the clicks of one night, from 2019."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # `feast` adds the repository
    rows = pd.DataFrame(
        {"user_id": ["a", "b"], "event_timestamp": pd.to_datetime(["2019-05-01"] * 2), "count": [1, 2]}
    )
    rows["event_timestamp"] = rows["event_timestamp"].dt.tz_localize("UTC")
    write_tables(home, {"clicks": rows})
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "definitions.py").write_text(DEFINITIONS)
    settings = {
        "project": "small",
        "provider": "feast_ducklake.StrictProvider",
        "registry": "registry.db",
        "online_store": {
            "type": "feast_ducklake.GuardedSqliteOnlineStore",
            "path": str(folder / "online.db"),
        },
        "batch_engine": {"type": "feast_ducklake.ArrowEngine"},
        "offline_store": {"type": "feast_ducklake.DuckLakeOfflineStore", "home": "../home"},
        "entity_key_serialization_version": 3,
    }
    (folder / "feature_store.yaml").write_text(yaml.safe_dump(settings))
    yield folder
    sys.modules.pop("definitions", None)  # imported from there, by its bare name


def feast(repository: Path, *words: str) -> tuple[str, list[str]]:
    """What the command printed, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = CliRunner().invoke(cli, ["-c", str(repository), *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def add(home: Home, user: str, date: str, count: int) -> None:
    with lake(home) as connection:
        commit(
            connection, [f"INSERT INTO clicks VALUES ('{user}', TIMESTAMPTZ '{date} 00:00:00+00', {count})"]
        )


def online(repository: Path) -> list[int | None]:
    """The counts of users a, b and c."""
    entities = {"user_id": ["a", "b", "c"]}
    counts: list[int | None] = (
        FeatureStore(str(repository)).get_online_features(["clicks:count"], entities).to_dict()["count"]
    )
    return counts


def test_feast_lists_and_describes_the_sources(repository: Path) -> None:
    assert "Created feature view clicks" in feast(repository, "plan")[0]
    assert "click_counts" not in feast(repository, "data-sources", "list")[0]
    feast(repository, "apply")
    assert "No changes to registry" in feast(repository, "plan")[0]
    listed, _ = feast(repository, "data-sources", "list")
    assert "click_counts" in listed
    assert "DuckLakeSource" in listed
    described, _ = feast(repository, "data-sources", "describe", "click_counts")
    for words in (
        "Clicks so far.",
        "timestampField: event_timestamp",
        "table: clicks",
        "dataSourceClassType: feast_ducklake.DuckLakeSource",
        "owner: us",
    ):
        assert words in described
    # A view that was materialized is no other view.
    feast(repository, "materialize", "2019-01-01T00:00:00", "2019-12-01T00:00:00")
    assert "No changes to registry" in feast(repository, "plan")[0]
    changed = DEFINITIONS.replace('table="clicks"', 'query="FROM lake.main.clicks WHERE count > 1"')
    (repository / "definitions.py").write_text(changed)
    sys.modules.pop("definitions")
    planned, _ = feast(repository, "plan")
    assert "Updated feature view clicks" in planned
    assert 'table: "clicks"' in planned
    assert 'query: "FROM lake.main.clicks WHERE count > 1"' in planned
    assert "seconds:" not in planned  # times of loading would say nothing


def test_three_nights_come_online(repository: Path, home: Home) -> None:
    every_night = ("materialize", "--disable-event-timestamp")
    feast(repository, "apply")
    assert feast(repository, *every_night)[1] == []  # a log from years ago, all the same
    assert online(repository) == [1, 2, None]
    add(home, "a", "2019-05-02", 10)
    feast(repository, *every_night)
    assert online(repository) == [10, 2, None]
    add(home, "c", "2019-04-01", 3)  # late: from before the first night
    add(home, "b", "2019-04-01", 99)  # older than what is online
    feast(repository, *every_night)
    assert online(repository) == [10, 2, 3]


def test_the_trap_of_an_interval_that_ends_in_the_future_is_named(repository: Path, home: Home) -> None:
    incremental = ("materialize-incremental", "2130-01-01T00:00:00")
    feast(repository, "apply")
    _, said = feast(repository, *incremental)
    assert online(repository) == [None, None, None]
    assert len(said) == 2
    assert "clicks is materialized up to 2130-01-01 00:00, which is in the future" in said[0]
    assert "clicks: nothing was materialized, since all its rows are from before" in said[1]
    add(home, "a", "2019-05-02", 10)
    _, said = feast(repository, *incremental)
    assert online(repository) == [None, None, None]
    assert len(said) == 1
    assert "clicks was materialized up to 2130-01-01 00:00, which is in the future" in said[0]
    assert "`feast materialize --disable-event-timestamp`" in said[0]
    assert feast(repository, "materialize", "--disable-event-timestamp")[1] == []
    assert online(repository) == [10, 2, None]
