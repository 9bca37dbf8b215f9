"""`bahe publish`: what is new only, everything where it has to be, and the way back."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import redis
import yaml
from feast import FeatureView

from bahe_core.errors import BadInput, BaheError, Damaged, NotReady
from bahe_core.home import Home
from bahe_lake.catalogue import written_since
from bahe_lake.connection import lake
from bahe_lake.runs import last
from feast_ducklake.online.sqlite import GuardedSqliteOnlineStore
from feature_repo.store import TARGETS, TEMPLATE, open_store
from materialize.release import pointer
from materialize.release.publish import publish
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset
from tests.support.services import require_service

USERS = 31
ITEMS = 25


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Home, Path]:
    """A home with one published version, and its dataset.yaml."""
    folder = tmp_path_factory.mktemp("publish")
    training = {"epochs": 1, "impressions_per_step": 200}
    dataset = write_dataset(folder / "log", small_log(rows=300), tiny_backbone, training=training)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home, dataset


@pytest.fixture(scope="module")
def twice(filled: tuple[Home, Path], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A copy with a second version, published later."""
    folder = tmp_path_factory.mktemp("twice")
    home = copy_of(filled[0], folder)
    call("train", "--warm-start", OnlineLookup(home).live_version(), "--tracker", "none", home=home)
    call("embed", home=home)
    call("publish", home=home)
    return home


def grown(dataset: Path, folder: Path, *, user: str, at: pd.Timestamp, backbone: Path) -> Path:
    """The log with one more behavior and impression of a user, at some moment."""
    log = {path.stem: pd.read_parquet(path) for path in dataset.parent.glob("*.parquet")}
    for table in ("behaviors", "impressions"):
        row = log[table].head(1).assign(user_id=user, event_timestamp=at)
        if table == "impressions":
            row["impression_id"] = 999_000
        log[table] = pd.concat([log[table], row], ignore_index=True)
    return write_dataset(folder, log, backbone, training={"epochs": 1, "impressions_per_step": 200})


def published(home: Home) -> dict[str, int | None]:
    with lake(home) as connection:
        run = last(connection, "publish")
    assert run is not None
    return {"written": run.rows_written, "since": run.facts["since"]}


def online(home: Home, user: str) -> tuple[list[float], int, int]:
    found = open_store(home).get_online_features(
        ["user_embedding:embedding", "user_embedding:behaviors", "user_stats:user_impressions"],
        [{"user_id": user, "model_version": OnlineLookup(home).live_version()}],
    )
    values = found.to_dict()
    return values["embedding"][0], values["behaviors"][0], values["user_impressions"][0]


def offline(home: Home, user: str) -> tuple[list[float], int, int]:
    with lake(home) as connection:
        row = connection.execute(
            "SELECT embedding, behaviors, (SELECT count(*) FROM impressions WHERE user_id = $1)"
            " FROM user_embedding WHERE user_id = $1 AND model_version = $2",
            [user, pointer.live(connection)],
        ).fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("late", [False, True])
def test_one_more_event_of_one_user(
    late: bool, filled: tuple[Home, Path], tmp_path: Path, tiny_backbone: Path
) -> None:
    """Also one that comes late, of which no row has the latest time: its user's rows are replaced."""
    home = copy_of(filled[0], tmp_path)
    times = small_log(rows=300)["behaviors"]["event_timestamp"]
    at = times.min() + timedelta(seconds=1) if late else times.max() + timedelta(days=1)
    dataset = grown(filled[1], tmp_path / "log", user="u7", at=at, backbone=tiny_backbone)
    before = online(home, "u7")
    call("ingest", dataset, home=home)
    with pytest.raises(NotReady, match=r"vectors of 1 users and 0 items under .* are behind the log"):
        call("publish", home=home)
    call("embed", home=home)
    call("publish", home=home)
    after = online(home, "u7")
    assert (after[1], after[2]) == (before[1] + 1, before[2] + 1)
    assert after == offline(home, "u7")
    seen = published(home)
    assert seen["since"] is not None
    # Statistics and lengths may be derived anew as a whole; vectors, the bulk of it, never are.
    with lake(home) as connection:
        changed = {
            view: connection.execute(
                f"SELECT count(DISTINCT user_id) FROM {written_since(connection, view, int(seen['since']))}"
            ).fetchone()
            for view in ("user_embedding", "user_stats", "timeline_length")
        }
    assert changed["user_embedding"] == (1,)
    assert seen["written"] is not None
    assert seen["written"] < 3 * USERS + ITEMS + 5  # no other vectors, and no items


def test_nothing_new_writes_nothing(twice: Home, tmp_path: Path) -> None:
    home = copy_of(twice, tmp_path)
    before = published(home)
    assert "(unchanged)" in call("publish", home=home).stderr
    assert published(home) == before
    # The second version's own publish took only what that version brought.
    assert before["written"] == USERS + ITEMS


def test_a_lost_or_foreign_store_is_filled_again(
    twice: Home, filled: tuple[Home, Path], tmp_path: Path
) -> None:
    home = copy_of(twice, tmp_path)
    wanted = online(home, "u3")
    for path in home.root.glob("online.db*"):
        path.unlink()
    call("publish", home=home)
    assert published(home)["since"] is None
    assert online(home, "u3") == wanted
    call("publish", "--rollback", home=home)  # both versions are there again
    call("publish", home=home)
    assert published(home)["written"] == 0
    # An older copy of the store, as from a backup, says so by its pointer.
    for path in home.root.glob("online.db*"):
        path.unlink()
    shutil.copy(filled[0].online_store, home.online_store)
    call("publish", home=home)
    assert published(home)["since"] is None
    assert online(home, "u3") == wanted


def test_a_store_lost_after_a_rollback_gets_back_what_was_live(twice: Home, tmp_path: Path) -> None:
    home = copy_of(twice, tmp_path)
    second = OnlineLookup(home).live_version()
    call("publish", "--rollback", home=home)
    first = OnlineLookup(home).live_version()
    wanted = online(home, "u3")
    for path in home.root.glob("online.db*"):
        path.unlink()
    assert f"live: {first}" in call("publish", home=home).stderr
    assert OnlineLookup(home).live_version() == first
    assert online(home, "u3") == wanted
    with lake(home) as connection:
        run = last(connection, "rollback")
    assert run is not None
    assert run.facts == {"model_version": first, "left_version": second}
    for path in home.root.glob("online.db*"):  # once more
        path.unlink()
    call("publish", home=home)
    assert OnlineLookup(home).live_version() == first
    # The store is the home's again, so this goes forward.
    call("publish", home=home)
    assert OnlineLookup(home).live_version() == second
    assert online(home, "u3") == offline(home, "u3")
    for path in home.root.glob("online.db*"):
        path.unlink()
    call("publish", home=home)  # what was rolled back from is live since
    assert OnlineLookup(home).live_version() == second


def test_a_publish_after_a_rollback_that_is_killed_half_way_is_finished(
    twice: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(twice, tmp_path)
    second = OnlineLookup(home).live_version()
    call("publish", "--rollback", home=home)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pointer, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(home)
    assert OnlineLookup(home).live_version() == second  # the store knows, the lake does not
    call("publish", home=home)
    assert OnlineLookup(home).live_version() == second


def test_values_that_the_store_lost_are_found_by_the_sample(twice: Home, tmp_path: Path) -> None:
    home = copy_of(twice, tmp_path)
    call("publish", "--rollback", home=home)  # so that there is something to do
    with sqlite3.connect(home.online_store) as connection:
        connection.execute('DELETE FROM "bahe_user_embedding"')
    assert "written anew" in call("publish", home=home).stderr
    assert online(home, "u3") == offline(home, "u3")


def test_what_does_not_read_back_is_not_made_live(
    twice: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = copy_of(twice, tmp_path)
    call("publish", "--rollback", home=home)
    live = OnlineLookup(home).live_version()
    with sqlite3.connect(home.online_store) as connection:
        connection.execute("DELETE FROM bahe_user_stats")
    write = GuardedSqliteOnlineStore.write_rows

    def forgetful(store: Any, config: Any, view: FeatureView, rows: Any) -> None:
        if view.name != "user_stats":
            write(store, config, view, rows)

    monkeypatch.setattr(GuardedSqliteOnlineStore, "write_rows", forgetful)
    with pytest.raises(BaheError, match=r"user u\d+ does not read back"):
        call("publish", home=home)
    assert OnlineLookup(home).live_version() == live


def test_back_and_forth(twice: Home, tmp_path: Path) -> None:
    home = copy_of(twice, tmp_path)
    lookup = OnlineLookup(home)  # a service that runs all the while
    second, scores = lookup.live_version(), lookup.score("u1", [1, 2, 3])
    call("publish", "--rollback", home=home)
    first = lookup.live_version()
    assert first != second
    assert lookup.score("u1", [1, 2, 3]).model_version == first
    call("publish", "--rollback", home=home)
    assert lookup.live_version() == second
    assert lookup.score("u1", [1, 2, 3]).scores == scores.scores
    call("publish", "--rollback", "--to", first, home=home)
    assert "(unchanged)" in call("publish", "--rollback", "--to", first, home=home).stderr
    with lake(home) as connection:
        assert [p.model_version for p in pointer.recorded(connection)] == [
            first,
            second,
            first,
            second,
            first,
        ]
        run = last(connection, "rollback")
    assert run is not None
    assert run.facts == {"model_version": first, "left_version": second}


def test_a_clock_that_was_set_back_holds_nothing_up(twice: Home, tmp_path: Path) -> None:
    home = copy_of(twice, tmp_path)
    store = open_store(home)
    ahead = pd.Timestamp.now("UTC") + timedelta(days=400)
    live = OnlineLookup(home).live_version()
    row = {"deployment": ["default"], "live_model_version": [live], "event_timestamp": [ahead]}
    store.write_to_online_store("live_model", pd.DataFrame({**row, "created_timestamp": [ahead]}))
    with lake(home) as connection:
        connection.execute(
            "UPDATE publications SET event_timestamp = ? WHERE live_model_version = ?",
            [ahead.to_pydatetime(), live],
        )
    call("publish", "--rollback", home=home)
    assert OnlineLookup(home).live_version() != live


def test_refused_rollbacks(filled: tuple[Home, Path], twice: Home, tmp_path: Path) -> None:
    alone, home = filled[0], copy_of(twice, tmp_path)
    lookup = OnlineLookup(home)
    live = lookup.live_version()
    with lake(home) as connection:
        first = pointer.recorded(connection)[-1].model_version
    with pytest.raises(BadInput, match="is the only version that was ever live"):
        call("publish", "--rollback", home=alone)
    with pytest.raises(BadInput, match=r"--to nothing was never live; choose from bahe-\w+, bahe-"):
        call("publish", "--rollback", "--to", "nothing", home=home)
    with pytest.raises(BadInput, match="add --rollback"):
        call("publish", "--to", first, home=home)
    with sqlite3.connect(home.online_store) as connection:
        connection.execute('CREATE TABLE kept AS SELECT * FROM "bahe_item_embedding"')
        connection.execute('DELETE FROM "bahe_item_embedding"')
    with pytest.raises(NotReady, match="are no longer in the online store"):
        call("publish", "--rollback", home=home)
    with sqlite3.connect(home.online_store) as connection:
        connection.execute('INSERT INTO "bahe_item_embedding" SELECT * FROM kept')
    (home.models / first).rename(home.models / "elsewhere")
    with pytest.raises(BadInput, match=f"the artifact of {first} is no longer in"):
        call("publish", "--rollback", home=home)
    assert lookup.live_version() == live
    for path in home.root.glob("online.db*"):
        path.write_bytes(b"this is not what it was" * 100)
    with pytest.raises(Damaged, match="delete it and run `bahe publish`"):
        call("publish", home=home)
    empty = Home.at(tmp_path / "empty")
    with pytest.raises(NotReady, match="run `bahe apply` first"):
        call("publish", "--rollback", home=empty)


@pytest.fixture
def in_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A project of its own in Redis, for every feature store that is opened meanwhile."""
    require_service("redis")
    settings = yaml.safe_load(TEMPLATE.read_text())
    settings["online_store"] = yaml.safe_load(TARGETS.read_text())["redis"]
    settings["project"] = project = f"test{tmp_path.stat().st_ino}"
    (tmp_path / "redis.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("BAHE_FEATURE_STORE", str(tmp_path / "redis.yaml"))
    yield
    client = redis.Redis.from_url(settings["online_store"]["url"])
    for key in client.scan_iter(f"*{project}*"):
        client.delete(key)


@pytest.mark.usefixtures("in_redis")
def test_a_store_in_redis(twice: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = copy_of(twice, tmp_path)
    before = home.online_store.read_bytes()
    assert "run `bahe publish`" in call("apply", home=home).stderr
    monkeypatch.delenv("BAHE_FEATURE_STORE")  # another shell: the home knows
    call("publish", home=home)  # to a store that has nothing yet
    assert published(home)["since"] is None
    assert online(home, "u3") == offline(home, "u3")
    assert "(unchanged)" in call("publish", home=home).stderr
    call("publish", "--rollback", home=home)
    call("publish", home=home)
    assert published(home) == {"written": 0, "since": published(home)["since"]}
    assert home.online_store.read_bytes() == before


def test_a_store_that_does_not_answer(twice: Home, tmp_path: Path) -> None:
    home = copy_of(twice, tmp_path)
    section = yaml.safe_load(TARGETS.read_text())["redis"] | {"url": "redis://127.0.0.1:9/0"}
    (tmp_path / "redis.yaml").write_text(yaml.safe_dump({"online_store": section}))
    call("apply", "--target", tmp_path / "redis.yaml", home=home)
    with pytest.raises(NotReady, match="does not answer"):
        call("publish", home=home)
