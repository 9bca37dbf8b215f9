"""Impressions and clicks sent to a service: statistics say at once what the log will say later."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from bahe_core.errors import Busy, NotReady, Unreachable
from bahe_core.home import Home
from materialize.release import counted
from serving.audit.audit import audit
from serving.http.api import create_app
from serving.live.journal import Journal
from serving.live.live_lookup import Clicked, LiveLookup, Shown
from serving.lookup.lake_pause import LakePause
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset

NUMERIC = [
    "user_stats_7d:user_click_rate_7d",
    "item_stats_7d:item_click_rate_7d",
    "item_stats_7d:item_clicks_7d",
    "item_stats_30d:item_impressions_30d",
]
RULES: dict[str, dict[str, Any]] = {
    "at once": {},
    "an hour later": {"label_delay": "1h"},
    "when it happened": {"columns": {"clicked_timestamp": "click_time"}},
}


def recent_log(now: datetime) -> dict[str, pd.DataFrame]:
    """Three days that end three hours ago, so that no window lets go of anything."""
    log = small_log()
    newest = log["impressions"]["event_timestamp"].max()
    for table in ("impressions", "behaviors"):
        ago = (newest - log[table]["event_timestamp"]) / 30
        log[table]["event_timestamp"] = (pd.Timestamp(now) - pd.Timedelta("3h") - ago).dt.floor("s")
    for table in ("users", "items"):
        log[table]["event_timestamp"] = pd.Timestamp(now) - pd.Timedelta("9D")
    shown = log["impressions"]
    late = shown["event_timestamp"] + pd.Timedelta("90s")
    shown["click_time"] = late.where(shown["clicked"] == 1)
    return log


@pytest.fixture(scope="module")
def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(
    scope="module",
    params=["at once", "when it happened", pytest.param("an hour later", marks=pytest.mark.slow)],
)
def filled(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_backbone: Path,
    now: datetime,
) -> tuple[Home, Path, str]:
    folder = tmp_path_factory.mktemp("impressions")
    dataset = write_dataset(
        folder / "log",
        recent_log(now),
        tiny_backbone,
        impressions={"files": "impressions.parquet", **RULES[request.param]},
        features={"numeric": NUMERIC},
    )
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home, dataset, request.param


def sent_rows(now: datetime) -> pd.DataFrame:
    """Two hours of impressions, the last just now, of old users and of one that nobody knows."""
    rng = np.random.default_rng(1)
    users = rng.choice(["u0", "u1", "u2", "u3", "u_new"], 41)
    minutes = np.linspace(120, 0, 41)
    shown = pd.Timestamp(now) - pd.to_timedelta(np.floor(minutes * 60), unit="s")
    clicked = rng.integers(2, size=41)
    return pd.DataFrame(
        {
            "impression_id": 10_000 + np.arange(41),
            "user_id": users,
            "item_id": rng.integers(6, size=41),
            "event_timestamp": shown,
            "clicked": clicked,
            "click_time": pd.Series(shown + pd.Timedelta("20s")).where(clicked == 1),
        }
    ).assign(click_time=lambda rows: rows["click_time"].clip(upper=pd.Timestamp(now)))


def as_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    shown = rows[["impression_id", "user_id", "item_id", "event_timestamp"]]
    return shown.assign(event_timestamp=shown["event_timestamp"].map(pd.Timestamp.isoformat)).to_dict(
        "records"
    )


def as_clicks(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"impression_id": one.impression_id, "event_timestamp": one.click_time.isoformat()}
        for one in rows[rows["clicked"] == 1].itertuples()
    ]


def test_statistics_are_what_the_log_will_say(
    filled: tuple[Home, Path, str], tmp_path: Path, now: datetime
) -> None:
    home, rule = copy_of(filled[0], tmp_path), filled[2]
    client = TestClient(create_app(home, live=True))
    sent, log = sent_rows(now), recent_log(now)
    late = log["impressions"].query("clicked == 0").iloc[-3:]
    late = late.assign(clicked=1, click_time=pd.Timestamp(now) - pd.Timedelta("30min"))

    before = client.post("/v1/score", json={"user_id": "u1", "item_ids": [1, 2]}).json()
    assert client.post("/v1/clicks", json={"clicks": as_clicks(sent)}).json()["new"] == 0
    answer = client.post("/v1/impressions", json={"impressions": as_rows(sent)})
    assert answer.json() == {"new": 41, "known": 0, "refused": []}
    if rule != "when it happened":  # such a log says once whether an impression was clicked
        refused = client.post("/v1/clicks", json={"clicks": as_clicks(late)}).json()["refused"]
        assert [one["row"] for one in refused] == [0, 1, 2]
        assert "only a log with clicked_timestamp" in refused[0]["detail"]
        late = late[:0]
    clicks = as_clicks(pd.concat([sent, late]))
    assert client.post("/v1/clicks", json={"clicks": clicks}).json() == {
        "new": len(clicks),
        "known": 0,
        "refused": [],
    }
    after = client.post("/v1/score", json={"user_id": "u1", "item_ids": [1, 2]}).json()
    assert [one["probability"] for one in after["items"]] != [one["probability"] for one in before["items"]]
    live = LiveLookup(home, RequestLog(home))  # another worker
    for user in ("u0", "u1", "u2", "u3", "u4", *late["user_id"]):
        live.score(user, range(25))
    of_new = live.user_or_empty("u_new")
    assert of_new.statistics["user_impressions"] == (sent["user_id"] == "u_new").sum()
    recommended = client.post("/v1/recommend", json={"user_id": "u_new", "k": 25}).json()["scores"]
    clicked_of_new = set(sent.query("user_id == 'u_new' and clicked == 1")["item_id"])
    assert {one["item_id"] for one in recommended} == set(range(25)) - clicked_of_new

    # The log gets them.
    dataset = tmp_path / "log" / "dataset.yaml"
    shutil.copytree(filled[1].parent, dataset.parent)
    shown = log["impressions"].set_index("impression_id")
    shown.update(late.set_index("impression_id")[["clicked", "click_time"]])
    shown = shown.reset_index().astype({"clicked": int})
    pd.concat([shown, sent]).to_parquet(dataset.parent / "impressions.parquet")
    call("ingest", dataset, home=home)
    found = audit(home, requests=True)
    assert found.rows >= 125
    assert {f.feature: f.examples for f in found.features if f.differing} == {}
    assert {"item_stats_7d:item_click_rate_7d", "user_stats_7d:user_click_rate_7d"} <= {
        f.feature for f in found.features
    }

    # A publish has them, and the services let go of theirs.
    said = {user: live.user(user).statistics for user in ("u0", "u1", "u4")}
    for job in ("encode", "embed", "publish"):
        call(job, home=home)
    stored = OnlineLookup(home)
    for service in (live, LiveLookup(home)):
        for user, statistics in said.items():
            assert service.user(user).statistics == pytest.approx(statistics)
        waiting = rule == "an hour later"
        left = service._impressions._sent.impressions
        assert (len(left) > 0) == waiting, "clicks that the log waits with"
        assert all(one.clicked_us is not None for one in left.values())
    published = stored.user("u_new").statistics
    assert published["user_click_rate"] == pytest.approx(of_new.statistics["user_click_rate"])
    again = client.post("/v1/impressions", json={"impressions": as_rows(sent)}).json()
    assert again == {"new": 0, "known": 41, "refused": []}
    for user, statistics in said.items():
        assert live.user(user).statistics == pytest.approx(statistics), "sent again, they count once"
    if rule != "at once":
        return

    # Another model and back: windows are of the same log as all else, whatever was ingested since.
    dataset.write_text(dataset.read_text().replace("epochs: 2", "epochs: 1"))
    for job in (("ingest", dataset), ("frame",), ("train", "--tracker", "none"), ("embed",), ("publish",)):
        call(*job, home=home)
    one_more = sent.tail(1).assign(impression_id=20_000, user_id="u1")
    assert client.post("/v1/impressions", json={"impressions": as_rows(one_more)}).json()["new"] == 1
    said_of_u1 = live.user("u1").statistics
    pd.concat([shown, sent, one_more]).to_parquet(dataset.parent / "impressions.parquet")
    for job in (("ingest", dataset), ("publish", "--rollback")):
        call(*job, home=home)
    assert live.live_version() == before["model_version"]
    assert live.user("u1").statistics == pytest.approx(said_of_u1)


@pytest.fixture
def service(served: Home, tmp_path: Path) -> LiveLookup:
    return LiveLookup(copy_of(served, tmp_path))


def test_each_row_is_refused_by_itself(service: LiveLookup, now: datetime) -> None:
    client = TestClient(create_app(service._home, live=True))
    row = {"impression_id": 1_000_000, "user_id": "u1", "item_id": 3, "event_timestamp": now.isoformat()}
    rows = [
        row,
        row | {"impression_id": 1_000_001, "item_id": 999},
        row | {"impression_id": "1_0"},
        row | {"impression_id": 1_000_002, "event_timestamp": (now + timedelta(days=1)).isoformat()},
        row,
        row | {"impression_id": "1000003", "item_id": "4"},
    ]
    answer = client.post("/v1/impressions", json={"impressions": rows}).json()
    assert (answer["new"], answer["known"]) == (2, 1)
    assert [one["row"] for one in answer["refused"]] == [1, 2, 3]
    words = "".join(one["detail"] for one in answer["refused"])
    for word in ("item 999 is not among the items", "1_0 is no id", "has not happened yet"):
        assert word in words
    clicks = [
        {"impression_id": 1_000_000, "event_timestamp": now.isoformat()},
        {"impression_id": 7_777_777, "event_timestamp": now.isoformat()},
        {"impression_id": "1000003", "event_timestamp": (now - timedelta(hours=1)).isoformat()},
        {"impression_id": 1_000_000, "event_timestamp": now.isoformat()},
    ]
    clicks += [clicks[1], clicks[2] | {"event_timestamp": now.isoformat()}]
    answer = client.post("/v1/clicks", json={"clicks": clicks}).json()
    assert (answer["new"], answer["known"]) == (1, 1)
    assert [one["row"] for one in answer["refused"]] == [1, 2, 4, 5], "all of an impression alike"
    for body in (
        {"impressions": []},
        {"impressions": [row | {"more": 1}]},
        {"impressions": [row] * 1001},
        {"impressions": [row | {"impression_id": 2**63}]},
        {"impressions": [row | {"user_id": True}]},
    ):
        refused = client.post("/v1/impressions", json=body)
        assert refused.status_code == 422
        assert len(refused.text) < 300
    text = client.get("/metrics").text
    assert "bahe_impressions_pushed_total 2\n" in text
    assert "bahe_clicks_pushed_total 1\n" in text


def end_of(service: LiveLookup) -> datetime:
    """The last instant of the log."""
    return datetime.fromtimestamp(service._impressions.published().log_end_us / 1e6, UTC)


def impressions_of(service: LiveLookup, user_id: str = "u1") -> float:
    count = service.user(user_id).statistics["user_impressions"]
    assert isinstance(count, (int, float))
    return count


def test_what_was_sent_is_counted_also_while_the_lake_is_away(
    service: LiveLookup, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    def away(_: object) -> None:
        raise Unreachable("no lake today.")

    before = impressions_of(service)
    assert service.show([Shown(impression_id=20_000, user_id="u1", item_id=1, at=now)]).new == 1
    monkeypatch.setattr("serving.live.published_impressions.lake", away)
    # This one the publish may have, and those after it need not wait for the lake to say so.
    in_question = Shown(impression_id=20_001, user_id="u1", item_id=1, at=end_of(service))
    assert service.show([in_question]).new == 1
    assert service.show([Shown(impression_id=20_002, user_id="u1", item_id=1, at=now)]).new == 1
    assert impressions_of(service) == before + 2
    assert service.click([Clicked(impression_id=20_002, at=now)]).new == 1
    for _ in range(2):  # the second time without waiting for the lake to fail again
        with pytest.raises(NotReady, match="failed a moment ago"):
            service.click([Clicked(impression_id=5, at=now)])
    other = LiveLookup(service._home)
    assert impressions_of(other) == before + 2, "also by a worker that starts meanwhile"
    monkeypatch.undo()
    for one in (service, other):
        one._impressions._in_log.pause = LakePause()
        assert impressions_of(one) == before + 3


def test_a_lake_that_was_compacted_under_a_service_is_read_as_it_is_now(
    service: LiveLookup, now: datetime
) -> None:
    home, before = service._home, impressions_of(service)
    counted.write(home, replace(service._impressions.published(), snapshot=999_999))
    assert impressions_of(service) == before
    assert service._impressions.published().snapshot == 999_999
    rows = [Shown(impression_id=i, user_id="u1", item_id=1, at=end_of(service)) for i in (1, 20_000)]
    taken = service.show(rows)
    assert (taken.new, taken.known) == (1, 1)
    assert impressions_of(service) == before + 1


def test_no_failure_reaches_an_answer(
    service: LiveLookup, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    home, before = service._home, impressions_of(service)
    row = {
        "impression_id": "of another type",
        "user_id": "u1",
        "item_id": 1,
        "shown_us": 1,
        "received": "2026",
    }
    (home.pushed / "impressions" / f"{now:%Y-%m-%d}.jsonl").write_text(json.dumps(row) + "\n{}\n[]\n7\n")
    assert impressions_of(service) == before
    home.counted.write_text("{}")
    assert impressions_of(service) == before
    with pytest.raises(NotReady, match="run `bahe publish`"):
        LiveLookup(home).show([Shown(impression_id=20_000, user_id="u1", item_id=1, at=now)])
    assert impressions_of(LiveLookup(home)) == before


def test_the_log_may_have_other_fractions_of_a_second(service: LiveLookup) -> None:
    """An impression that is published counts once, also where it was sent with a later time."""
    before, later = impressions_of(service), end_of(service) + timedelta(seconds=2)
    rows = [Shown(impression_id=i, user_id="u1", item_id=1, at=later) for i in (399, 20_000)]
    taken = service.show(rows)
    assert (taken.new, taken.known) == (1, 1)
    assert impressions_of(service) == impressions_of(LiveLookup(service._home)) == before + 1


def test_times_of_before_the_shortest_window_are_left_to_the_log(service: LiveLookup) -> None:
    at = end_of(service) - timedelta(days=6, hours=23)
    before = impressions_of(service)
    shown = [Shown(impression_id=20_000 + i, user_id="u1", item_id=1, at=at) for i in range(2)]
    old = Shown(impression_id=20_003, user_id="u1", item_id=1, at=at - timedelta(hours=2))
    first = Shown(impression_id=20_004, user_id="u1", item_id=1, at=datetime(1, 1, 1))
    taken = service.show([*shown, old, first])
    assert taken.new == 2
    assert list(taken.refused) == [2, 3]
    assert "leave it to the next ingest" in taken.refused[2]
    assert impressions_of(service) == before + 2


def test_what_was_sent_long_ago_is_dropped_with_its_file(service: LiveLookup, now: datetime) -> None:
    folder, before = service._home.pushed / "impressions", impressions_of(service)
    service.show([Shown(impression_id=20_000, user_id="u1", item_id=1, at=now)])
    (today,) = folder.glob("*.jsonl")
    line = json.loads(today.read_text())
    for number, days in enumerate((9, 5), start=1):
        day = f"{now - timedelta(days=days):%Y-%m-%d}"
        sent = line | {"impression_id": 20_000 + number, "received": day}
        (folder / f"{day}.jsonl").write_text(json.dumps(sent) + "\n")
    for one in (service, LiveLookup(service._home)):
        one._impressions._edition = replace(one._impressions._edition, day="yesterday")
        assert impressions_of(one) == before + 2
    assert len([*folder.glob("*.jsonl")]) == 2
    # Another worker's file is cut back: what could not be synced is not counted.
    today.write_text("")
    assert impressions_of(service) == before + 1


def test_a_worker_that_was_stopped_holds_up_no_answer(
    service: LiveLookup, monkeypatch: pytest.MonkeyPatch, now: datetime
) -> None:
    monkeypatch.setattr("serving.live.journal.PATIENCE", 5.0)
    one = Shown(impression_id=20_000, user_id="u1", item_id=1, at=now)
    with ThreadPoolExecutor(1) as pool:
        with Journal(service._home.pushed / "impressions").exclusive():
            waiting = pool.submit(service.show, [one])
            start = time.monotonic()
            before = service.user("u1").statistics["user_impressions"]
            assert time.monotonic() - start < 4
            assert not waiting.done()
        assert waiting.result().new == 1
    assert service.user("u1").statistics["user_impressions"] == (before or 0) + 1
    monkeypatch.setattr("serving.live.journal.PATIENCE", 0.05)
    with (
        Journal(service._home.pushed / "impressions").exclusive(),
        pytest.raises(Busy, match="send it again"),
    ):
        service.show([one])
