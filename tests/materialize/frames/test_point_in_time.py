"""Invariant 1, by brute force: nothing at or after an impression's instant enters its row."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bahe_core.errors import BadInput
from bahe_core.home import Home
from feature_repo.store import apply, open_store
from materialize.frames.frame import Frame, frame, latest_frame
from materialize.gate import gate
from materialize.ingest.ingest import ingest
from materialize.ingest.statistics import PRIOR_STRENGTH
from tests.support.logs import small_log, write_dataset

START = pd.Timestamp("2024-01-01", tz="UTC")
SECONDS = st.integers(0, 6)  # few distinct instants, so that ties are the rule

impression = st.tuples(st.integers(0, 3), st.integers(0, 3), SECONDS, st.booleans())
behavior = st.tuples(st.integers(0, 3), st.sampled_from(["liked", "disliked"]), st.integers(0, 2), SECONDS)


def frames(impressions: list[tuple], behaviors: list[tuple]) -> dict[str, pd.DataFrame]:
    def time(seconds: pd.Series) -> pd.Series:
        return START + pd.to_timedelta(seconds, unit="s")

    shown = pd.DataFrame(impressions, columns=["user_id", "item_id", "t", "clicked"])
    done = pd.DataFrame(behaviors, columns=["user_id", "channel", "text", "t"])
    return {
        "impressions": shown.assign(
            impression_id=range(len(shown)),
            event_timestamp=time(shown["t"]),
            clicked=shown["clicked"].astype(int),
        ).drop(columns="t"),
        "behaviors": done.assign(
            event_timestamp=time(done["t"]), text="text " + done["text"].astype(str)
        ).drop(columns="t"),
        "items": pd.DataFrame(
            {"item_id": range(4), "text": [f"item {i}" for i in range(4)], "event_timestamp": START}
        ),
    }


def moments(days_and_us: Iterable[tuple[int, int]]) -> list[pd.Timestamp]:
    """So many days and microseconds after the start."""
    return [START + pd.Timedelta(days, "D") + pd.Timedelta(us, "us") for days, us in days_and_us]


def over_days(
    *, channels: st.SearchStrategy[str], items: int
) -> st.SearchStrategy[list[tuple[int, str, str, tuple[int, int], int | None]]]:
    """Behaviors of two users within a hundred days, of which some name an item up to `items`."""
    row = st.tuples(
        st.integers(0, 1),
        channels,
        st.sampled_from(["item 0", "item 1", "something else"]),
        st.tuples(st.integers(0, 100), st.sampled_from([-1, 0, 1])),
        st.none() | st.integers(0, items),
    )
    return st.lists(row, min_size=30, max_size=80, unique_by=lambda one: one[:4])


@contextmanager
def a_home(log: dict[str, pd.DataFrame], *features: str) -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as folder:
        home = Home.at(Path(folder) / "home")
        # Without its gate, of which every example would run another copy.
        ingest.__wrapped__(home, write_dataset(Path(folder) / "log", log))  # type: ignore[attr-defined]
        apply(home, online=features)
        yield home


def brute_force(log: dict[str, pd.DataFrame], row: pd.Series) -> dict[str, float | None]:
    shown, done = log["impressions"], log["behaviors"].drop_duplicates()
    before = shown[shown["event_timestamp"] < row["event_timestamp"]]
    past = done[(done["event_timestamp"] < row["event_timestamp"]) & (done["user_id"] == row["user_id"])]
    expected: dict[str, float | None] = {}
    for entity in ("user", "item"):
        mine = before[before[f"{entity}_id"] == row[f"{entity}_id"]]
        if mine.empty:
            expected |= {f"{entity}_{k}": None for k in ("impressions", "clicks", "click_rate")}
            continue
        last = mine["event_timestamp"].max()
        log_so_far = shown[shown["event_timestamp"] <= last]
        prior = (log_so_far["clicked"].sum() + 1) / (len(log_so_far) + 2)
        clicks = mine["clicked"].sum()
        expected[f"{entity}_impressions"] = len(mine)
        expected[f"{entity}_clicks"] = clicks
        expected[f"{entity}_click_rate"] = (clicks + PRIOR_STRENGTH * prior) / (len(mine) + PRIOR_STRENGTH)
    for channel in ("liked", "disliked"):
        expected[f"length_{channel}"] = (past["channel"] == channel).sum() if len(past) else None
    return expected


@settings(max_examples=9, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    impressions=st.lists(impression, min_size=2, max_size=25).filter(lambda r: len({x[3] for x in r}) == 2),
    behaviors=st.lists(behavior, min_size=1, max_size=25),
)
def test_the_frame_equals_brute_force(impressions: list[tuple], behaviors: list[tuple]) -> None:
    log = frames(impressions, behaviors)
    with a_home(log) as home:
        store = open_store(home)
        # In an order of its own, with a user and an item that the log has never seen.
        entities = log["impressions"].sample(frac=1, random_state=0)
        unseen = entities.head(1).assign(user_id=99, item_id=98)
        entities = pd.concat([entities, unseen], ignore_index=True)
        got = store.get_historical_features(entities, store.get_feature_service("ctr_training")).to_df()
    assert got["impression_id"].tolist() == entities["impression_id"].tolist()
    for index, row in entities.iterrows():
        for column, expected in brute_force(log, row).items():
            value = got.loc[index, column]
            if expected is None:
                assert pd.isna(value), (column, row.to_dict())
            else:
                assert value == pytest.approx(expected), (column, row.to_dict())


def windows_by_brute_force(log: dict[str, pd.DataFrame], row: pd.Series) -> dict[str, float]:
    """0 stands for an entity without history, which has no row."""
    shown, moment = log["impressions"], row["event_timestamp"]
    expected = {}
    for entity in ("user", "item"):
        mine = shown[(shown[f"{entity}_id"] == row[f"{entity}_id"]) & (shown["event_timestamp"] < moment)]
        for days in (7, 30):
            window = mine[mine["event_timestamp"] >= moment - pd.Timedelta(days, "D")]
            expected[f"{entity}_impressions_{days}d"] = len(window)
            expected[f"{entity}_clicks_{days}d"] = window["clicked"].sum()
    return expected


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 2),
            # Multiples of a day, so that impressions are exactly 7 or 30 days apart, and some just beside.
            st.tuples(st.integers(0, 45), st.sampled_from([-1, 0, 1])),
            st.booleans(),
        ),
        min_size=20,
        max_size=120,
    ).filter(lambda rows: len({row[3] for row in rows}) == 2)
)
def test_windows_equal_brute_force(rows: list[tuple]) -> None:
    log = frames([(user, item, 0, clicked) for user, item, _, clicked in rows], [(0, "liked", 0, 0)])
    log["impressions"]["event_timestamp"] = moments([moment for _, _, moment, _ in rows])
    with a_home(log) as home:
        store = open_store(home)
        service = store.get_feature_service("ctr_training_windows")
        got = store.get_historical_features(log["impressions"], service).to_df()
    for index, row in log["impressions"].iterrows():
        for column, expected in windows_by_brute_force(log, row).items():
            value = got.loc[index, column]
            assert (0 if pd.isna(value) else value) == expected, (column, row.to_dict())
        last = got.loc[index]
        if not pd.isna(last["user_click_rate_7d"]):
            strength = last["user_impressions_7d"] + PRIOR_STRENGTH
            prior = (last["user_click_rate_7d"] * strength - last["user_clicks_7d"]) / PRIOR_STRENGTH
            assert 0 < prior < 1


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["liked", "disliked"]),
            st.integers(0, 3),
            st.tuples(st.integers(0, 45), st.sampled_from([-1, 0, 1])),
            st.none() | st.integers(0, 2),
        ),
        min_size=20,
        max_size=80,
    )
)
def test_behaviors_by_channel_equal_brute_force(rows: list[tuple]) -> None:
    log = frames(
        [(n % 3, n % 4, 0, n % 2 == 0) for n in range(60)],
        [(user, channel, text, 0) for user, channel, text, _, _ in rows],
    )
    done, shown = log["behaviors"], log["impressions"]
    done["event_timestamp"] = moments([moment for *_, moment, _ in rows])
    done["item_id"] = pd.array([row[-1] for row in rows], "Int64")
    shown["event_timestamp"] = [START + pd.Timedelta(n, "D") for n in range(60)]
    done = done.drop_duplicates(["user_id", "channel", "text", "event_timestamp"], keep=False)
    assume(len(done))
    log["behaviors"] = done  # the same of two items would be told apart by the item alone
    with a_home(log) as home:
        store = open_store(home)
        service = store.get_feature_service("ctr_training_windows")
        got = store.get_historical_features(shown, service).to_df()
    for index, row in shown.iterrows():
        moment = row["event_timestamp"]
        for entity, days in product(("user", "item"), (7, 30, None)):
            if (entity, days) == ("user", None):
                continue  # the lengths of its timeline
            past = done[(done[f"{entity}_id"] == row[f"{entity}_id"]) & (done["event_timestamp"] < moment)]
            if days is not None:
                past = past[past["event_timestamp"] >= moment - pd.Timedelta(days, "D")]
            for channel in ("liked", "disliked"):
                column = f"{entity}_behaviors_{channel}" + (f"_{days}d" if days else "")
                value = got.loc[index, column]
                wanted = (past["channel"] == channel).sum()
                assert (0 if pd.isna(value) else value) == wanted, (column, row.to_dict())


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=over_days(channels=st.sampled_from(["liked", "disliked"]), items=2))
def test_what_a_user_did_with_an_item_equals_brute_force(rows: list[tuple]) -> None:
    """By the item that a behavior names, else by text; items 0 and 3 have one, item 3 only from day 50."""
    log = frames([(n % 2, n // 2 % 4, 0, n % 3 == 0) for n in range(110)], [(0, "liked", 0, 0)])
    log["items"]["text"] = ["item 0", "item 1", "item 2", "item 0"]
    since = pd.Series([START, START, START, START + pd.Timedelta(50, "D")])
    log["items"]["event_timestamp"] = since
    shown, texts = log["impressions"], log["items"].set_index("item_id")["text"]
    shown["event_timestamp"] = [START + pd.Timedelta(n, "D") for n in range(110)]
    log["behaviors"] = done = pd.DataFrame(rows, columns=["user_id", "channel", "text", "t", "item_id"])
    done["event_timestamp"] = moments(done.pop("t"))
    done["item_id"] = done["item_id"].astype("Int64")
    with a_home(log) as home:
        store = open_store(home)
        views = [
            f"user_item_{what}{span}"
            for what in ("behaviors", "channels")
            for span in ("", "_7d", "_30d", "_90d")
        ]
        features = [f"{v}:{c.name}" for v in views for c in store.get_feature_view(v).features]
        got = store.get_historical_features(shown, features).to_df()
    for index, row in shown.iterrows():
        moment, item = row["event_timestamp"], row["item_id"]
        with_item = (done["item_id"] == item).fillna(done["text"] == texts[item]).astype(bool)
        known = done["event_timestamp"].where(
            done["item_id"].notna(), done["event_timestamp"].clip(since[item])
        )
        of_pair = done.assign(event_timestamp=known)[with_item & (done["user_id"] == row["user_id"])]
        past = of_pair[of_pair["event_timestamp"] < moment]
        for days, channel in product((None, 7, 30, 90), (None, "liked", "disliked")):
            counted = past if channel is None else past[past["channel"] == channel]
            if days is not None:
                counted = counted[counted["event_timestamp"] >= moment - pd.Timedelta(days, "D")]
            ending = (f"_{channel}" if channel else "") + (f"_{days}d" if days else "")
            value = got.loc[index, f"pair_behaviors{ending}"]
            assert (0 if pd.isna(value) else value) == len(counted), (ending, row.to_dict())
        for column, time in (
            ("pair_first_us", past["event_timestamp"].min()),
            ("pair_last_us", past["event_timestamp"].max()),
        ):
            value = got.loc[index, column]
            assert pd.isna(value) == past.empty
            assert past.empty or value == time.value // 1000


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=over_days(channels=st.just("liked"), items=4))
def test_what_a_user_did_with_items_of_a_column_equals_brute_force(rows: list[tuple]) -> None:
    """Item 0 changes its genre on day 50, item 2 has none before, item 3 is there from then, 4 never."""
    log = frames([(0, n, 0, n == 0) for n in range(4)], [(0, "liked", 0, 0)])
    later = START + pd.Timedelta(50, "D")
    versions = [
        (0, "item 0", START, "a"),
        (0, "item 0", later, "b"),
        (1, "item 1", START, "b"),
        (2, "item 2", START, None),
        (2, "item 2", later, "a"),
        (3, "item 0", later, "c"),
    ]
    log["items"] = pd.DataFrame(versions, columns=["item_id", "text", "event_timestamp", "genre"])
    log["behaviors"] = done = pd.DataFrame(rows, columns=["user_id", "channel", "text", "t", "item_id"])
    done["event_timestamp"] = moments(done.pop("t"))
    done["item_id"] = done["item_id"].astype("Int64")
    spans = {"": None, "_7d": 7, "_30d": 30, "_90d": 90}
    views = [f"user_genre_behaviors{span}" for span in spans]
    asked = pd.DataFrame(
        [(u, g, START + pd.Timedelta(t, "D")) for u, g, t in product((0, 1), "abc", range(0, 110, 7))],
        columns=["user_id", "genre", "event_timestamp"],
    )
    with a_home(log, *views, "user_price_behaviors") as home:
        store = open_store(home)
        features = [f"{v}:{c.name}" for v in views for c in store.get_feature_view(v).features]
        got = store.get_historical_features(asked, features).to_df()
    known: list[tuple[int, str, pd.Timestamp]] = []
    for row in done.itertuples():
        if pd.isna(row.item_id):
            first = {genre: at for _, text, at, genre in reversed(versions) if text == row.text and genre}
        else:
            its = [(at, genre) for item, _, at, genre in versions if item == row.item_id]
            before = [one for one in its if one[0] <= row.event_timestamp] or its[:1]
            first = {genre: at for at, genre in before[-1:] if genre}
        known += [(row.user_id, genre, max(at, row.event_timestamp)) for genre, at in first.items()]
    assert known
    for index, one in asked.iterrows():
        moment = one["event_timestamp"]
        past = [
            t for user, genre, t in known if (user, genre) == (one["user_id"], one["genre"]) and t < moment
        ]
        for span, days in spans.items():
            counted = [t for t in past if days is None or t >= moment - pd.Timedelta(days, "D")]
            value = got.loc[index, f"genre_behaviors{span}"]
            assert (0 if pd.isna(value) else value) == len(counted), (span, one.to_dict())
        for column, chosen in (("genre_first_us", min), ("genre_last_us", max)):
            value = got.loc[index, column]
            assert pd.isna(value) == (not past)
            assert not past or value == chosen(past).value // 1000


def test_the_order_and_the_rows_of_the_entity_frame_are_kept() -> None:
    log = frames([(0, 0, 1, True), (0, 1, 2, False), (1, 0, 3, True)], [(0, "liked", 0, 0)])
    with a_home(log) as home:
        store = open_store(home)
        rows = pd.DataFrame(
            {
                "user_id": [1, 0, 0, 1],
                "event_timestamp": [START + pd.Timedelta(s, "s") for s in (9, 1, 0, 9)],
            }
        )
        got = store.get_historical_features(
            rows, ["user_timeline:length_liked", "user_stats:user_impressions"]
        )
        table = got.to_arrow()
        full = store.get_historical_features(
            rows, ["user_timeline:length_liked"], full_feature_names=True
        ).to_df()
    assert table["user_id"].to_pylist() == [1, 0, 0, 1]
    # The behavior at second 0 is history for second 1, and not for its own instant.
    assert table["length_liked"].to_pylist() == [None, 1, None, None]
    assert table["user_impressions"].to_pylist() == [1, None, None, 1]
    assert "user_timeline__length_liked" in full.columns


@pytest.mark.parametrize(
    ("freshness", "unit", "after"),
    [("hourly", "h", "0h"), ("nightly", "D", "0h"), ("nightly 02:30", "D", "2h30min")],
)
def test_a_frame_knows_nothing_from_after_serving_was_refreshed(
    freshness: str, unit: str, after: str, tmp_path: Path
) -> None:
    log = small_log(rows=400, users=8)
    for table in ("impressions", "behaviors"):  # within two days, so that an hour holds several of a user
        since = log[table]["event_timestamp"] - START
        log[table]["event_timestamp"] = START + (since / 45).dt.floor("s")
    home = Home.at(tmp_path / "home")
    ingest(home, write_dataset(tmp_path / "log", log, freshness=freshness))
    gate(home, "ingest")
    apply(home)
    made = frame(home)
    gate(home, "frame")
    assert made.facts["freshness"] == freshness
    found = pq.read_table(made.path).to_pandas().set_index("impression_id")
    shown, done = log["impressions"], log["behaviors"].drop_duplicates()
    assert found["event_timestamp"].sort_index().tolist() == shown["event_timestamp"].tolist()
    fewer = 0
    for _, row in shown.sample(60, random_state=0).iterrows():
        moment = (row["event_timestamp"] - pd.Timedelta(after)).floor(unit) + pd.Timedelta(after)
        before = shown[(shown["user_id"] == row["user_id"]) & (shown["event_timestamp"] < moment)]
        past = done[(done["user_id"] == row["user_id"]) & (done["event_timestamp"] < moment)]
        got = found.loc[row["impression_id"]].fillna(0)
        assert got["user_impressions"] == len(before)
        assert got["user_clicks"] == before["clicked"].sum()
        assert got["length_liked"] == (past["channel"] == "liked").sum()
        assert got["user_last_impression_us"] < moment.value // 1000
        fewer += (
            (shown["user_id"] == row["user_id"])
            & (shown["event_timestamp"] >= moment)
            & (shown["event_timestamp"] < row["event_timestamp"])
        ).any()
    assert fewer > 0  # the cut was met


def test_a_frame_with_other_context_is_another_frame(tmp_path: Path) -> None:
    log, home = small_log(rows=200), Home.at(tmp_path / "home")
    log["impressions"]["device"] = "phone"
    made = []
    for context in ([], ["device"], []):
        section = {"files": "impressions.parquet", "context": context}
        ingest(home, write_dataset(tmp_path / "log", log, impressions=section))
        apply(home)
        made.append(frame(home))
        assert ("context_device" in pq.read_schema(made[-1].path).names) == bool(context)
    assert made[1].frame_id not in (made[0].frame_id, made[2].frame_id)


def test_a_frame_of_an_old_snapshot_comes_back(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")

    def fill(rows: int) -> Frame:
        ingest(home, write_dataset(tmp_path / "log", small_log(rows=rows)))
        gate(home, "ingest")
        apply(home)
        return frame(home)

    first = fill(300)
    before, facts = pq.read_table(first.path), first.facts
    later = fill(400)
    assert later.frame_id != first.frame_id
    shutil.rmtree(first.path.parent)
    again = frame(home, as_of=facts["snapshot"])
    gate(home, "frame")
    assert (again.frame_id, again.facts) == (first.frame_id, facts)
    assert pq.read_table(again.path).equals(before, check_metadata=True)
    assert latest_frame(home).frame_id == first.frame_id
    with pytest.raises(BadInput, match="no snapshot 9999"):
        frame(home, as_of=9999)
