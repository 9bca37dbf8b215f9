"""A click is known when it happens: statistics by brute force, late clicks, impressions too young."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_lake.connection import lake
from feature_repo.store import apply, open_store
from materialize.frames.frame import frame
from materialize.ingest.ingest import ingest
from materialize.ingest.quarantine import quarantined
from materialize.ingest.statistics import PRIOR_STRENGTH
from tests.support.logs import small_log, write_dataset

START = pd.Timestamp("2024-01-01", tz="UTC")
Log = dict[str, pd.DataFrame]

shown = st.tuples(
    st.integers(0, 2), st.integers(0, 2), st.integers(0, 8), st.none() | st.integers(0, 5), st.booleans()
)
"""User, item, second, seconds until its click, and whether the log says when that was."""


def log_of(rows: list[tuple], until: int = 99, times: bool = True) -> Log:
    """The log as it is known at some second: clicks that came later are not told yet, nor their times."""
    made = []
    for number, (user, item, second, later, told) in enumerate(rows):
        clicked = later is not None and (not told or second + later <= until)
        made.append(
            {
                "impression_id": number,
                "user_id": user,
                "item_id": item,
                "event_timestamp": START + pd.Timedelta(second, "s"),
                "clicked": int(clicked),
                "clicked_timestamp": START + pd.Timedelta(second + later, "s")
                if clicked and told and times
                else None,
            }
        )
    impressions = pd.DataFrame(made).astype({"clicked_timestamp": "datetime64[us, UTC]"})
    return {
        "impressions": impressions[impressions["event_timestamp"] <= START + pd.Timedelta(until, "s")],
        "behaviors": pd.DataFrame(
            {"user_id": [0], "channel": ["liked"], "text": ["x"], "event_timestamp": [START]}
        ),
        "items": pd.DataFrame(
            {"item_id": range(3), "text": [f"item {i}" for i in range(3)], "event_timestamp": START}
        ),
    }


def ingested(home: Home, folder: Path, log: Log, delay: int) -> None:
    section = {
        "files": "impressions.parquet",
        "label_delay": f"{delay}s",
        "columns": {"clicked_timestamp": "clicked_timestamp"},
    }
    # Without its gate, of which every example would run another copy.
    ingest.__wrapped__(home, write_dataset(folder, log, impressions=section))  # type: ignore[attr-defined]


def statistics(home: Home) -> list[Any]:
    tables = [f"{entity}_stats{window}" for entity in ("user", "item") for window in ("", "_7d", "_30d")]
    with lake(home) as connection:
        return [
            connection.execute(f"SELECT * EXCLUDE (created_timestamp) FROM {table} ORDER BY ALL").fetchall()
            for table in tables
        ]


def brute_force(log: Log, row: pd.Series, delay: int) -> dict[str, float | None]:
    rows = log["impressions"]
    label = rows["clicked_timestamp"].fillna(rows["event_timestamp"] + pd.Timedelta(delay, "s"))
    label = label.where(rows["clicked"] == 1)
    end = max(rows["event_timestamp"].max(), rows["clicked_timestamp"].max())
    label = label.where(label <= end)
    expected: dict[str, float | None] = {}
    for entity in ("user", "item"):
        is_mine = rows[f"{entity}_id"] == row[f"{entity}_id"]
        came = is_mine & (rows["event_timestamp"] < row["event_timestamp"])
        clicked = is_mine & (label < row["event_timestamp"])
        if not came.any():
            expected |= {f"{entity}_{k}": None for k in ("impressions", "clicks", "last_impression_us")}
            continue
        last = max(
            rows.loc[came, "event_timestamp"].max(), label[clicked].max() if clicked.any() else START
        )
        prior = ((label <= last).sum() + 1) / ((rows["event_timestamp"] <= last).sum() + 2)
        expected[f"{entity}_impressions"] = came.sum()
        expected[f"{entity}_clicks"] = clicked.sum()
        expected[f"{entity}_last_impression_us"] = rows.loc[came, "event_timestamp"].max().value // 1000
        expected[f"{entity}_click_rate"] = (clicked.sum() + PRIOR_STRENGTH * prior) / (
            came.sum() + PRIOR_STRENGTH
        )
    return expected


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(shown, min_size=6, max_size=25).filter(
        lambda rows: (
            {True, False} == {r[3] is not None for r in rows if r[2] <= 4}
            # A night before the first click would have nothing to learn from.
            and any(r[3] is not None and (not r[4] or r[2] + r[3] <= 4) for r in rows if r[2] <= 4)
            and any(r[3] is None or (r[4] and r[2] + r[3] > 4) for r in rows if r[2] <= 4)
        )
    ),
    delay=st.sampled_from([0, 0, 2]),
    times=st.booleans(),
)
def test_statistics_know_a_click_when_it_is_known(rows: list[tuple], delay: int, times: bool) -> None:
    whole = log_of(rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        home = Home.at(folder / "home")
        ingested(home, folder / "log", log_of(rows, until=4, times=times), delay)
        ingested(home, folder / "log", whole, delay)  # and the clicks that came late
        at_once = Home.at(folder / "at-once")
        ingested(at_once, folder / "log", whole, delay)
        assert statistics(home) == statistics(at_once)
        apply(home)
        store = open_store(home)
        got = store.get_historical_features(
            whole["impressions"], store.get_feature_service("ctr_training")
        ).to_df()
    for index, row in whole["impressions"].iterrows():
        for column, expected in brute_force(whole, row, delay).items():
            value = got.loc[index, column]
            if expected is None:
                assert pd.isna(value), (column, row.to_dict())
            else:
                assert value == pytest.approx(expected), (column, row.to_dict())


@pytest.mark.parametrize("freshness", ["live", "nightly"])
def test_what_is_too_young_is_in_no_frame(freshness: str, tmp_path: Path) -> None:
    log, home = small_log(rows=400, users=8), Home.at(tmp_path / "home")
    section = {"files": "impressions.parquet", "label_delay": "2d"}
    path = write_dataset(tmp_path / "log", log, impressions=section, freshness=freshness)
    ingest(home, path)
    apply(home)
    made = frame(home)  # whose gate counts the clicks again
    shown = log["impressions"]
    last = shown["event_timestamp"].max() - pd.Timedelta("2D")
    expected = shown[shown["event_timestamp"] <= last]
    found = pq.read_table(made.path).to_pandas().set_index("impression_id")
    assert set(found.index) == set(expected["impression_id"])
    for _, row in expected.sample(40, random_state=0).iterrows():
        moment = row["event_timestamp"].floor("D") if freshness == "nightly" else row["event_timestamp"]
        mine = shown[(shown["user_id"] == row["user_id"]) & (shown["clicked"] == 1)]
        known = mine["event_timestamp"] + pd.Timedelta("2D") < moment
        clicks = found.loc[row["impression_id"], "user_clicks"]
        assert (0 if pd.isna(clicks) else clicks) == known.sum()
    spec = yaml.safe_load(path.read_text())
    spec["impressions"]["label_delay"] = "200d"
    path.write_text(yaml.safe_dump(spec))
    ingest(home, path)
    with pytest.raises(BadInput, match=r"no impression is older than `impressions.label_delay`"):
        frame(home)


def test_a_column_of_click_times_is_named_or_refused(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=100)
    log["impressions"]["clicked_timestamp"] = log["impressions"]["event_timestamp"]
    with pytest.raises(BadInput, match=r"has the column clicked_timestamp; if it is when a click happened"):
        ingest(home, write_dataset(tmp_path / "log", log))


def test_clicks_that_cannot_be_are_set_aside(tmp_path: Path, home: Home) -> None:
    log = small_log(rows=100)
    shown = log["impressions"]
    second = pd.Timedelta("1s")
    shown["clicked_at"] = (shown["event_timestamp"] + second).where(shown["clicked"] == 1)
    clicked, other = shown.index[shown["clicked"] == 1], shown.index[shown["clicked"] == 0]
    shown.loc[clicked[0], "clicked_at"] -= 2 * second
    shown.loc[other[0], "clicked_at"] = shown.loc[other[0], "event_timestamp"] + second
    shown.loc[clicked[1], "clicked_at"] = pd.Timestamp.now("UTC") + pd.Timedelta("30D")
    section = {"files": "impressions.parquet", "columns": {"clicked_timestamp": "clicked_at"}}
    path = write_dataset(tmp_path / "log", log, impressions=section, quarantine={"max_share": 0.1})
    assert ingest(home, path).quarantined == {"impressions": 3}
    rules = {held.rule for held in quarantined(home)}
    assert rules == {"click before its impression", "time of no click", "time in the future"}


def test_a_click_without_its_time_still_contradicts(tmp_path: Path, home: Home) -> None:
    rows = [(0, 0, 0, None, True), (1, 1, 1, 0, True), (2, 2, 2, None, True)]
    ingested(home, tmp_path / "log", log_of(rows), 0)
    changed = log_of(rows)
    changed["impressions"].loc[0, "clicked"] = 1
    ingested(home, tmp_path / "log", changed, 0)
    (held,) = quarantined(home)
    assert (held.rule, held.rows) == ("impression_id changed", 1)
