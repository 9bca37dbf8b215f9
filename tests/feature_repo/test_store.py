"""Which online store a home uses: chosen by `bahe apply`, kept in the home, read from there by all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from feast.repo_config import load_repo_config

from bahe_core.errors import BadInput, Damaged, NotReady
from bahe_core.home import Home
from feature_repo.store import FOLDER, TARGETS, TEMPLATE, open_store, write_configuration

TYPES = {
    "sqlite": "feast_ducklake.GuardedSqliteOnlineStore",
    "redis": "feast_ducklake.GuardedRedisOnlineStore",
    "postgres": "postgres",
}

WRITTEN_BY_0_1 = """\
# Written by `bahe apply`; settings come from redis.yaml.
project: bahe
provider: local
registry:
  path: /elsewhere/registry.db
  registry_store_type: materialize.feast_registry.AtomicRegistryStore
  serve_features_while_materializing: true
online_store:
  type: materialize.feast_redis.GuardedRedisOnlineStore
  url: redis://cache:6379/0
offline_store:
  type: materialize.feast_offline.DuckLakeOfflineStore
  home: /elsewhere
batch_engine:
  type: materialize.feast_engine.ArrowEngine
entity_key_serialization_version: 3
materialization:
  pull_latest_features: true
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home.at(tmp_path / "home")
    made.root.mkdir()
    return made


def settings(home: Home) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(home.feature_store_yaml.read_text())
    return read


def test_targets_are_the_online_stores_that_are_tested() -> None:
    targets = yaml.safe_load(TARGETS.read_text())
    assert {name: section["type"] for name, section in targets.items()} == TYPES
    assert targets["sqlite"] == yaml.safe_load(TEMPLATE.read_text())["online_store"]


@pytest.mark.parametrize("target", TYPES)
def test_a_target_changes_the_online_store_only(
    target: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAHE_POSTGRES_PASSWORD", "secret")
    write_configuration(home)
    default = settings(home)
    write_configuration(home, target)
    chosen = settings(home)
    assert default | {"online_store": chosen["online_store"]} == chosen
    assert load_repo_config(FOLDER, home.feature_store_yaml).online_store.type == TYPES[target]
    assert "secret" not in home.feature_store_yaml.read_text()


def test_the_home_keeps_its_store_and_its_paths_follow_it(home: Home, tmp_path: Path) -> None:
    write_configuration(home, "redis")
    edited = settings(home)
    edited["online_store"]["url"] = "redis://cache:6379/1"
    home.feature_store_yaml.write_text(yaml.safe_dump(edited))
    home.root.rename(tmp_path / "moved")
    moved = Home.at(tmp_path / "moved")
    write_configuration(moved)
    assert settings(moved)["online_store"] == edited["online_store"]
    assert settings(moved)["offline_store"]["home"] == str(moved.root)
    assert settings(moved)["registry"]["path"] == str(moved.registry)
    assert [path.name for path in moved.root.iterdir()] == ["feature_store.yaml"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_of_the_users_own(whole: bool, home: Home, tmp_path: Path) -> None:
    own = {"online_store": {"type": "redis", "connection_string": "cache:6379"}}
    if whole:
        own = yaml.safe_load(TEMPLATE.read_text()) | own | {"project": "shop"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    write_configuration(home, str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").unlink()
    write_configuration(home)
    kept = settings(home)
    assert kept["online_store"] == own["online_store"]
    assert kept["project"] == ("shop" if whole else "bahe")
    assert kept["offline_store"]["home"] == str(home.root)


@pytest.mark.parametrize("text", [None, "", "a: [", "project: bahe", "online_store: redis"])
def test_a_target_that_is_none_changes_nothing(text: str | None, home: Home, tmp_path: Path) -> None:
    write_configuration(home, "redis")
    before = home.feature_store_yaml.read_bytes()
    target = tmp_path / "own.yaml"
    if text is not None:
        target.write_text(text)
    with pytest.raises(BadInput, match=r"own\.yaml is not one of sqlite, redis, postgres, and no file"):
        write_configuration(home, str(target))
    assert home.feature_store_yaml.read_bytes() == before


def test_settings_written_by_version_0_1_get_the_current_names(home: Home) -> None:
    home.feature_store_yaml.write_text(WRITTEN_BY_0_1)
    write_configuration(home)
    now = settings(home)
    assert now["online_store"] == {"type": TYPES["redis"], "url": "redis://cache:6379/0"}
    assert now["provider"] == yaml.safe_load(TEMPLATE.read_text())["provider"]
    assert "materialize." not in home.feature_store_yaml.read_text()


def test_a_home_whose_settings_are_lost_does_not_fall_back_to_sqlite(home: Home) -> None:
    with pytest.raises(NotReady, match="run `bahe apply` first"):
        open_store(home)
    home.registry.touch()
    with pytest.raises(Damaged, match=r"feature_store\.yaml is gone"):
        open_store(home)
    home.feature_store_yaml.write_text("online_store: [")
    with pytest.raises(Damaged, match=r"feature_store\.yaml cannot be read"):
        open_store(home)
    assert home.feature_store_yaml.read_text() == "online_store: ["
