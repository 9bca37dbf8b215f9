from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from bahe_models import Impressions, auc, evaluate, expected_calibration_error, gauc, log_loss
from bahe_models.evaluation import (
    SEGMENTS,
    Ranking,
    history_segments,
    interval,
    resampled_aucs,
    resampled_gaucs,
    resampled_users,
)
from bahe_models.metrics import probability, reliability

Float = np.ndarray


def noisy(rng: np.random.Generator, rows: int, users: int) -> tuple[Float, Float, Float]:
    """Clicks, coarse logits (so that many are tied) and users, with a taste of each user's own."""
    user = rng.integers(users, size=rows)
    logit = np.round(rng.normal(size=rows) + rng.normal(size=users)[user], 1)
    clicked = (rng.random(rows) < probability(logit)).astype(np.float32)
    return clicked, logit, user


def split_of(clicked: Float, user: Float, length: Float) -> Impressions:
    return Impressions(
        user_N=user,
        item_N=np.zeros(len(user), dtype=np.int64),
        length_NC=length,
        time_us_N=np.arange(len(user)),
        clicked_N=clicked,
        columns={},
    )


@st.composite
def weighted_rows(draw: st.DrawFn) -> tuple[Float, Float, Float]:
    """Clicked, score and weight; few distinct scores, and some weights of 0."""
    rows = draw(st.integers(2, 30))
    clicked = draw(arrays.arrays(np.float32, rows, elements=st.sampled_from([0.0, 1.0])))
    score = draw(arrays.arrays(np.float64, rows, elements=st.integers(-3, 3).map(float)))
    weight = draw(arrays.arrays(np.float64, rows, elements=st.integers(0, 4).map(float)))
    return clicked, score, weight


@given(weighted_rows())
def test_weighted_auc_with_ties_is_that_of_sklearn(given_rows: tuple[Float, Float, Float]) -> None:
    clicked, score, weight = given_rows
    found = Ranking(clicked, score, np.arange(len(score))).auc(weight[:, None])[0]
    if weight @ clicked == 0 or weight @ (1 - clicked) == 0:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(clicked, score, sample_weight=weight))


@given(weighted_rows())
def test_turning_the_scores_round_turns_auc_round(given_rows: tuple[Float, Float, Float]) -> None:
    clicked, score, weight = given_rows
    group, weights = np.arange(len(score)), weight[:, None]
    ahead, back = (Ranking(clicked, s, group).auc(weights)[0] for s in (score, -score))
    np.testing.assert_allclose(ahead, 1 - back)


@given(weighted_rows())
def test_gauc_is_the_mean_of_the_users_aucs(given_rows: tuple[Float, Float, Float]) -> None:
    clicked, score, user = given_rows
    parts = [np.flatnonzero(user == u) for u in np.unique(user)]
    found = [(auc(clicked[rows], score[rows]), len(rows)) for rows in parts]
    defined = [(value, weight) for value, weight in found if not np.isnan(value)]
    if defined:
        assert gauc(clicked, score, user) == pytest.approx(
            np.average([value for value, _ in defined], weights=[weight for _, weight in defined])
        )
    else:
        assert np.isnan(gauc(clicked, score, user))


def test_resampled_auc_is_that_of_the_repeated_rows() -> None:
    clicked, logit, user = noisy(np.random.default_rng(0), rows=300, users=12)
    fast = resampled_aucs(clicked, {"m": logit}, user, replicates=50, seed=3)["m"]
    distinct, row = np.unique(user, return_inverse=True)
    times = np.concatenate(list(resampled_users(len(distinct), 50, seed=3)), axis=1)
    assert (times.sum(axis=0) == len(distinct)).all()
    slow = [
        roc_auc_score(np.repeat(clicked, count[row]), np.repeat(logit, count[row]))
        for count in times.T.astype(int)
    ]
    np.testing.assert_allclose(fast, slow)


def test_resampled_gauc_is_that_of_the_repeated_users() -> None:
    clicked, logit, user = noisy(np.random.default_rng(0), rows=300, users=12)
    clicked[user == user[0]] = 1  # one class only
    fast = resampled_gaucs(clicked, {"m": logit}, user, replicates=20, seed=3)["m"]
    distinct, row = np.unique(user, return_inverse=True)
    times = np.concatenate(list(resampled_users(len(distinct), 20, seed=3)), axis=1)
    slow = []
    for count in times.T.astype(int):
        copies = [
            (np.flatnonzero(row == u), copy) for u in range(len(distinct)) for copy in range(count[u])
        ]
        rows = np.concatenate([at for at, _ in copies])
        names = np.concatenate([np.full(len(at), f"{row[at[0]]}/{copy}") for at, copy in copies])
        slow.append(gauc(clicked[rows], logit[rows], names))
    np.testing.assert_allclose(fast, slow)
    assert np.isnan(resampled_gaucs(clicked, {"m": logit}, np.zeros(300))["m"]).all()


@given(st.integers(0, 1000))
def test_an_interval_holds_the_estimate_and_repeats_itself(seed: int) -> None:
    clicked, logit, user = noisy(np.random.default_rng(seed), rows=400, users=40)
    draws = resampled_aucs(clicked, {"m": logit}, user, replicates=100)["m"]
    low, high = interval(draws)
    assert low < auc(clicked, logit) < high
    np.testing.assert_array_equal(draws, resampled_aucs(clicked, {"m": logit}, user, replicates=100)["m"])


def test_impressions_of_one_user_are_no_independent_evidence() -> None:
    clicked, logit, user = noisy(np.random.default_rng(1), rows=400, users=40)
    once = interval(resampled_aucs(clicked, {"m": logit}, user)["m"])
    five = [np.tile(values, 5) for values in (clicked, logit, user)]
    copied = interval(resampled_aucs(five[0], {"m": five[1]}, five[2])["m"])
    np.testing.assert_allclose(once, copied)


def test_equal_models_differ_by_nothing_and_noise_loses_to_the_truth() -> None:
    rng = np.random.default_rng(2)
    clicked, logit, user = noisy(rng, rows=2000, users=80)
    scores = {"bahe": logit, "floor": 3 * logit + 1, "id_only": rng.normal(size=2000)}
    found = evaluate(split_of(clicked, user, np.zeros((2000, 1), dtype=np.int64)), scores)
    same, noise = found.quality["floor"], found.quality["id_only"]
    # Only the order of the scores counts for AUC.
    assert same.bahe_gain == same.bahe_gain_low == same.bahe_gain_high == 0
    assert noise.bahe_gain_low is not None
    assert noise.bahe_gain_low > 0.1
    assert not any(name.startswith("bahe_gain") for name in found.quality["bahe"].row())
    assert same.log_loss > found.quality["bahe"].log_loss


def test_what_is_undefined_is_null_in_json() -> None:
    # Each user has one class only, and there is no second user with a history.
    split = split_of(
        np.array([0, 0, 1, 1], dtype=np.float32), np.array([0, 0, 1, 1]), np.array([[0], [0], [0], [5]])
    )
    logit = np.array([0.1, 0.4, 0.3, 0.9])
    found = evaluate(split, {"floor": logit, "bahe": logit})
    row = found.quality["floor"].row()
    assert row["gauc"] is None
    assert row["auc"] == 0.75
    json.dumps(row, allow_nan=False)
    segments = {(s.segment, s.model): s for s in found.segments}
    assert segments["0 (cold)", "bahe"].auc == 0.5
    assert np.isnan(segments["1 to 9", "bahe"].auc)
    assert segments["50 and more", "floor"].impressions == 0
    one_user = resampled_aucs(split.clicked_N, {"m": logit}, np.zeros(4))["m"]
    assert np.isnan(interval(one_user)).all()


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(0, 40), st.integers(1, 3)), elements=st.integers(0, 60))
)
def test_segments_part_the_rows(length: Float) -> None:
    found = history_segments(length)
    assert list(found) == list(SEGMENTS)
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(len(length)))
    assert (length[found["0 (cold)"]].sum(axis=1) == 0).all()
    ranges = {"1 to 9": (1, 9), "10 to 49": (10, 49), "50 and more": (50, 10**9)}
    for name, (low, high) in ranges.items():
        total = length[found[name]].sum(axis=1)
        assert ((low <= total) & (total <= high)).all()


@given(
    arrays.arrays(np.float64, 20, elements=st.floats(-15, 15)),
    arrays.arrays(np.float64, 20, elements=st.sampled_from([0.0, 1.0])),
)
def test_log_loss_is_that_of_sklearn(logit: Float, clicked: Float) -> None:
    expected = sklearn_log_loss(clicked, probability(logit), labels=[0, 1])
    assert log_loss(clicked, logit) == pytest.approx(expected, abs=1e-6)


def test_a_sure_and_wrong_prediction_costs_its_logit() -> None:
    assert log_loss([0.0], [800.0]) == 800
    assert log_loss([1.0], [800.0]) == 0
    assert np.isnan(log_loss([], []))


def test_calibration_of_a_true_and_a_shifted_predictor() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0.2, 0.7, 200_000)
    clicked = rng.random(200_000) < predicted
    assert expected_calibration_error(clicked, predicted) < 0.006
    assert expected_calibration_error(clicked, predicted + 0.1) == pytest.approx(0.1, abs=0.003)
    assert expected_calibration_error([0, 1, 1, 0], [0.5] * 4) == 0
    assert np.isnan(expected_calibration_error([], []))


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9])), min_size=1, max_size=60
    ),
    st.integers(1, 8),
)
def test_bins_hold_every_row_once_in_any_order(rows: list[tuple[bool, float]], bins: int) -> None:
    clicked, predicted = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    curve = reliability(clicked, predicted, bins)
    assert curve.count_B.sum() == len(rows)
    assert 1 <= len(curve.count_B) <= bins
    assert (np.diff(curve.predicted_B) > 0).all()
    assert curve.clicked_B @ curve.count_B == pytest.approx(clicked.sum())
    error = expected_calibration_error(clicked, predicted, bins)
    assert 0 <= error <= 1
    order = np.argsort(clicked, kind="stable")
    assert expected_calibration_error(clicked[order], predicted[order], bins) == pytest.approx(error)
