"""Items that a service keeps in memory: never older than the store, and not read again without need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bahe_core.home import Home
from feast_ducklake.online.rows import Vectors
from feature_repo.store import open_store
from serving.lookup.identifiers import Identifier
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    folder = tmp_path_factory.mktemp("items")
    features = {"numeric": ["user_item_behaviors", "item_stats_7d"]}
    dataset = write_dataset(folder / "log", small_log(users=12, rows=400), tiny_backbone, features=features)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home


class Counted(OnlineLookup):
    """Counts items that are read from the store."""

    read_items = 0

    def _read_items(
        self, items: Sequence[Identifier], version: str
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        self.read_items += len(items)
        return super()._read_items(items, version)


def same(one: tuple[Vectors, dict[str, list[Any]]], other: tuple[Vectors, dict[str, list[Any]]]) -> None:
    np.testing.assert_array_equal(one[0].vectors_ND, other[0].vectors_ND)
    np.testing.assert_array_equal(one[0].found_N, other[0].found_N)
    assert one[1] == other[1]


def test_kept_items_are_those_of_the_store_and_read_once(published: Home) -> None:
    plain, keeping = OnlineLookup(published), Counted(published, keep_items=True)
    version = plain.live_version()
    every = list(plain.catalogue())
    for items in ([3], [5, 4, 3], every, every[::-1], [7, 7]):
        same(keeping.items(items, version, "u1"), plain.items(items, version, "u1"))
    assert keeping.read_items == len(every) + 1, "one to see how wide they are, then all"
    # Not in the catalogue: the store is asked.
    same(keeping.items([3, 999], version), plain.items([3, 999], version))


def test_what_is_written_to_the_store_is_in_the_next_answer(published: Home, tmp_path: Path) -> None:
    home = copy_of(published, tmp_path)
    keeping = Counted(home, keep_items=True)
    version = keeping.live_version()
    every = list(keeping.catalogue())
    before = keeping.items(every, version)[1]["item_click_rate"]
    row = {"item_id": 3, "item_impressions": 1000, "item_clicks": 999, "item_click_rate": 0.9}
    times = {"event_timestamp": pd.Timestamp.now("UTC"), "created_timestamp": pd.Timestamp.now("UTC")}
    rows = pd.DataFrame([{**row, "item_last_impression_us": 0, **times}])
    open_store(home).write_to_online_store("item_stats", rows)
    for items in ([3], every):
        same(keeping.items(items, version), OnlineLookup(home).items(items, version))
    after = keeping.items(every, version)[1]["item_click_rate"]
    assert [i for i, a, b in zip(every, before, after, strict=True) if a != b] == [3]


def test_items_that_the_server_may_let_go_of_are_not_kept(
    published: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis drops keys by `key_ttl_seconds` without a word: the tokens stay."""
    keeping = Counted(published, keep_items=True)
    settings = type(keeping._store.config.online_store)
    monkeypatch.setattr(settings, "key_ttl_seconds", 60, raising=False)
    version = keeping.live_version()
    for _ in range(2):
        keeping.items([3, 4], version)
    assert keeping.read_items == 4


def test_a_token_that_is_gone_is_no_token(published: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lost tokens are alike, and what they stood for need not be."""
    keeping = Counted(published, keep_items=True)
    assert keeping._table is not None
    monkeypatch.setattr(keeping._table._online, "versions", lambda config, views: [None for _ in views])
    version = keeping.live_version()
    for _ in range(2):
        keeping.items([3, 4], version)
    assert keeping.read_items == 4


def test_while_a_store_is_written_to_a_few_items_are_read_by_themselves(
    published: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look finds another token: the whole catalogue is not read for each request."""
    keeping = Counted(published, keep_items=True)
    version, every = keeping.live_version(), list(keeping.catalogue())
    tokens = iter(range(10**6))
    assert keeping._table is not None
    monkeypatch.setattr(
        keeping._table._online, "versions", lambda config, views: [str(next(tokens)) for _ in views]
    )
    monkeypatch.setattr("serving.lookup.item_table._REST", 10**9)
    for _ in range(5):
        keeping.items([3, 4], version)
    assert keeping.read_items <= len(every) + 1 + 5 * 2
