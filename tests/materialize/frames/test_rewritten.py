"""Features that change after the fact, between two frames of the same impressions."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from materialize.frames.rewritten import LEAST, rewritten


def test_what_differs_beyond_rounding_and_lateness_is_named(tmp_path: Path) -> None:
    rows = 200
    before = pd.DataFrame(
        {
            "impression_id": range(rows),
            "event_timestamp": pd.date_range("2024-01-01", periods=rows, freq="h", tz="UTC"),
            "rate": 0.25,
            "price": 1.0,
            "late": range(rows),
            "kind": ["a"] * rows,
            "typed": range(rows),
        }
    )
    after = before.assign(
        rate=0.2501,  # smoothed by a log of which one row came late
        price=np.where(np.arange(rows) % 2, 1.0, np.nan),
        late=[n + (n < 5) for n in range(rows)],
        kind=["b"] * 20 + ["a"] * (rows - 20),
        typed=list(map(str, range(rows))),  # another feature, of the same name
    )
    features = ["rate", "price", "late", "kind", "typed", "gone"]
    assert found(tmp_path, before, after, features) == {"price": 0.5, "kind": 0.1}
    assert found(tmp_path, before.head(LEAST - 1), after, features) == {}
    assert found(tmp_path, before, after, ["typed"]) == {}


def found(folder: Path, before: pd.DataFrame, after: pd.DataFrame, features: list[str]) -> dict[str, float]:
    paths = folder / "before.parquet", folder / "after.parquet"
    for frame, path in zip((before, after), paths, strict=True):
        frame.to_parquet(path)
    with duckdb.connect() as connection:
        return rewritten(connection, *paths, features)
