"""What `bahe synth --recency, --order, --combination` plant, and that the log and its truth both say it."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest

from bahe_core.errors import BadInput
from bahe_synth.errands import ERRAND_DAYS, KINDS, SPAN_US, Errands, Kind
from bahe_synth.log import synth
from bahe_synth.rows import Settings
from bahe_synth.world import DAY_US
from tests.support.cli import call

SMALL = {"users": 300, "items": 200, "behaviors": 10_000, "impressions": 30_000, "atoms": 2_000, "days": 12}
BY_NAME = {kind.name: kind for kind in KINDS}


def planted(kind: Kind, **given: object) -> Errands:
    (errand,) = Settings(**{**SMALL, kind.name: 3.0, **given}).errands()  # type: ignore[arg-type]
    return errand


@pytest.mark.parametrize("kind", KINDS, ids=list(BY_NAME))
def test_a_wish_is_that_of_the_last_errand_before_the_day(kind: Kind) -> None:
    errand, everyone = planted(kind), np.arange(SMALL["users"])
    last = dict.fromkeys(everyone.tolist(), -1)
    met = 0
    for day in range(SMALL["days"]):
        assert errand.topics(everyone, day).tolist() == list(last.values())
        user_N, channel_N, topic_N, time_N = errand.behaviors(day, 0, 1)
        assert ((time_N >= 0) & (time_N < DAY_US)).all()
        for user, topics, times in zip(
            user_N.reshape(-1, kind.length)[:, 0].tolist(),
            topic_N.reshape(-1, kind.length),
            time_N.reshape(-1, kind.length),
            strict=True,
        ):
            last[user] = int(topics[-1])
            assert (np.diff(times) > 0).all(), "what happens in an order has different times"
            assert np.ptp(times) < SPAN_US
            met += 1
        assert channel_N.max() < 6
    assert met == pytest.approx(SMALL["users"] * SMALL["days"] / ERRAND_DAYS, rel=0.2)


def test_order_leaves_the_same_bag_whatever_it_says() -> None:
    errand = planted(BY_NAME["order"])
    user_N, channel_N, topic_N, _ = errand.behaviors(4, 0, 1)
    user_U, channel_UB, topic_UB = user_N[::2], channel_N.reshape(-1, 2), topic_N.reshape(-1, 2)
    assert (np.sort(channel_UB, axis=1) == [0, 1]).all()
    assert (topic_UB[:, 0] == topic_UB[:, 1]).all()
    logit_U = errand.logit(user_U, topic_UB[:, 0], 5)
    assert np.where(channel_UB[:, 0] == 0, 3.0, -3.0).tolist() == logit_U.tolist()
    assert 0.3 < (logit_U > 0).mean() < 0.7


def test_a_combination_says_yes_where_both_channels_agree() -> None:
    errand = planted(BY_NAME["combination"])
    user_N, channel_N, topic_N, _ = errand.behaviors(4, 0, 1)
    topic_UB = topic_N.reshape(-1, 2)
    assert (channel_N.reshape(-1, 2) == [4, 5]).all()
    agree_U = topic_UB[:, 0] == topic_UB[:, 1]
    assert np.where(agree_U, 3.0, -3.0).tolist() == errand.logit(user_N[::2], topic_UB[:, 1], 5).tolist()
    assert 0.3 < agree_U.mean() < 0.7


def test_the_chunks_of_a_day_hold_every_errand_once() -> None:
    errand = planted(BY_NAME["recency"])
    whole = np.stack(errand.behaviors(3, 0, 1), axis=1)
    parts = np.concatenate([np.stack(errand.behaviors(3, chunk, 4), axis=1) for chunk in range(4)])
    assert sorted(whole.tolist()) == sorted(parts.tolist())


@pytest.mark.parametrize("kind", KINDS, ids=list(BY_NAME))
def test_the_log_says_it_and_clicks_follow_it(kind: Kind, tmp_path: Path) -> None:
    done = synth(tmp_path / "log", **SMALL, **{kind.name: 3.0})
    plain = synth(tmp_path / "plain", **SMALL)
    with duckdb.connect() as connection:
        files = tmp_path / "log" / "behaviors" / "*.parquet"
        counted = connection.execute(f"SELECT count(*) FROM read_parquet('{files}')").fetchall()[0][0]
    assert (
        done.rows["behaviors"]
        == counted
        == plain.rows["behaviors"]
        + sum(len(planted(kind).starters(day)) * kind.length for day in range(SMALL["days"]))
    )
    assert done.bayes_auc > plain.bayes_auc + 0.02
    settings = Settings(**{**SMALL, kind.name: 3.0})  # type: ignore[arg-type]
    world, (errand,) = settings.world(), settings.errands()
    with duckdb.connect() as connection:
        impressions = tmp_path / "log" / "impressions" / "*.parquet"
        rows = connection.execute(
            f"SELECT user_id, item_id, event_timestamp::DATE - DATE '2024-01-01' AS day, clicked"
            f" FROM read_parquet('{impressions}')"
        ).fetchnumpy()
    number_of_user = {int(i): n for n, i in enumerate(world.user_ids(np.arange(settings.users)))}
    number_of_item = {int(i): n for n, i in enumerate(world.item_ids(np.arange(settings.items)))}
    user_N = np.array([number_of_user[int(i)] for i in rows["user_id"]])
    item_N = np.array([number_of_item[int(i)] for i in rows["item_id"]])
    logit_N = np.zeros(len(user_N))
    for day in range(SMALL["days"]):
        on = rows["day"].astype(int) == day
        logit_N[on] = errand.logit(user_N[on], world.item_topic(item_N[on]), day)
    rate = {sign: rows["clicked"][np.sign(logit_N) == sign].mean() for sign in np.unique(np.sign(logit_N))}
    assert rate[1.0] > rate[0.0] + 0.2
    assert rate.get(-1.0, 0.0) < rate[0.0]


def test_days_added_later_go_on_with_the_errands(tmp_path: Path) -> None:
    shorter = SMALL | {"days": 6}
    synth(tmp_path / "log", **shorter, order=2.0)
    first = (tmp_path / "log" / "behaviors" / "2024-01-06.parquet").read_bytes()
    done = synth(tmp_path / "log", days=8)
    assert done.days_written == 2
    assert (tmp_path / "log" / "behaviors" / "2024-01-06.parquet").read_bytes() == first
    with pytest.raises(BadInput, match=r"holds a log with --order 2\.0, not 1\.0"):
        synth(tmp_path / "log", order=1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recency": -1.0}, "--recency is -1.0; it is in logits, from 0"),
        ({"combination": float("nan")}, "--combination is nan"),
        ({"order": 21.0}, "--order is 21.0"),
        ({"order": 1.0, "channels": ("bills",)}, "--order needs 2 --channels or more"),
    ],
)
def test_bad_strengths_get_one_sentence(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        synth(tmp_path / "log", **given)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not (tmp_path / "log").exists()


def test_the_options(tmp_path: Path) -> None:
    options = ("--users", 50, "--behaviors", 100, "--impressions", 100, "--days", 3, "--channels", "walks")
    call("synth", tmp_path / "log", *options, "--recency", "1.5", "--json")
    assert '"recency": 1.5' in (tmp_path / "log" / "synth.json").read_text()
