"""The point-in-time join against brute force in numpy, on random tables full of ties."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from feast import FeatureStore
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bahe_core.home import Home
from tests.support.feast_lake import repository, write_tables
from tests.support.random_tables import definitions, differences, random_tables

ROWS = 1_250  # of one entity frame
EXAMPLES = (
    3  # each row is asked of four views, with and without the cut-off; benchmarks.correctness asks more
)


@pytest.fixture(scope="module")
def stores() -> Iterator[dict[bool, FeatureStore]]:
    """A store for each of the two joins, over one lake, by whether it is strict."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home.at(Path(folder) / "home")
        write_tables(home, random_tables(0, 10, 10, 10)[0])
        yield {
            True: repository(home, *definitions(), join="strict"),
            False: repository(home, join="inclusive"),
        }


# A seed cannot be made smaller, so there is nothing to shrink.
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    ticks=st.integers(1, 60),
    rows=st.integers(1, 300),
    strict=st.booleans(),
    large=st.booleans(),
)
def test_the_join_equals_brute_force(
    seed: int, ticks: int, rows: int, strict: bool, large: bool, stores: dict[bool, FeatureStore]
) -> None:
    tables, frame = random_tables(seed, ticks, rows, ROWS)
    store = stores[strict]
    write_tables(Home.at(store.config.offline_store.home), tables)
    with pytest.MonkeyPatch.context() as patch:
        if large:  # take the way of large frames
            patch.setattr("feast_ducklake.offline.point_in_time.FEW_ROWS", 0)
        for cut_off in (False, True):
            assert not differences(store, tables, frame, strict=strict, cut_off=cut_off)
