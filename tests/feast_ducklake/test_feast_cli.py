"""`feast` on a small repository over the lake shows its sources in words."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from click.testing import CliRunner
from feast.cli.cli import cli

from bahe_core.home import Home
from tests.feast_ducklake.test_offline_store import tables
from tests.support.feast_lake import write_tables

DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, ValueType
from feast.types import Int64
from feast_ducklake.offline.source import DuckLakeSource

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
clicks = FeatureView(
    name="clicks", entities=[user], ttl=timedelta(0), schema=[Field(name="count", dtype=Int64)],
    source=DuckLakeSource(name="click_counts", table="clicks", description="Clicks so far.", owner="us"),
)
"""


def test_feast_lists_and_describes_the_sources(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    write_tables(home, tables())
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "definitions.py").write_text(DEFINITIONS)
    settings = {
        "project": "small",
        "provider": "local",
        "registry": "registry.db",
        "online_store": {
            "type": "feast_ducklake.GuardedSqliteOnlineStore",
            "path": str(repository / "online.db"),
        },
        "batch_engine": {"type": "feast_ducklake.ArrowEngine"},
        "offline_store": {"type": "feast_ducklake.DuckLakeOfflineStore", "home": "../home"},
        "entity_key_serialization_version": 3,
    }
    (repository / "feature_store.yaml").write_text(yaml.safe_dump(settings))

    def feast(*words: str) -> str:
        result = CliRunner().invoke(cli, ["-c", str(repository), *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    known = set(sys.modules)
    try:
        assert "Created feature view clicks" in feast("plan")
        assert "click_counts" not in feast("data-sources", "list")
        feast("apply")
        assert "No changes to registry" in feast("plan")
        listed = feast("data-sources", "list")
        assert "click_counts" in listed
        assert "DuckLakeSource" in listed
        described = feast("data-sources", "describe", "click_counts")
        for words in (
            "Clicks so far.",
            "timestampField: event_timestamp",
            "table: clicks",
            "dataSourceClassType: feast_ducklake.DuckLakeSource",
            "owner: us",
        ):
            assert words in described
        # A view that was materialized is no other view.
        feast("materialize", "2024-01-01T00:00:00", "2024-02-01T00:00:00")
        assert "No changes to registry" in feast("plan")
        changed = DEFINITIONS.replace('table="clicks"', 'query="FROM lake.main.clicks WHERE count > 1"')
        (repository / "definitions.py").write_text(changed)
        sys.modules.pop("definitions")
        planned = feast("plan")
        assert "Updated feature view clicks" in planned
        assert 'table: "clicks"' in planned
        assert 'query: "FROM lake.main.clicks WHERE count > 1"' in planned
        assert "seconds:" not in planned  # times of loading would say nothing
    finally:
        for module in set(sys.modules) - known:  # the definitions, which `feast` imports by their bare name
            if module == "definitions":
                del sys.modules[module]
