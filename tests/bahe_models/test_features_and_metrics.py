from __future__ import annotations

import numpy as np
import pytest

from bahe_models import DenseFeatures, auc, gauc
from bahe_models.features import logit, needed_columns


def columns(rows: int, **known: list[float]) -> dict[str, np.ndarray]:
    return {name: np.array(known.get(name, [np.nan] * rows)) for name in needed_columns()}


def test_unknown_statistics_are_the_training_mean() -> None:
    lengths, now = np.array([[1, 2], [3, 0], [0, 0]]), np.array([10, 20, 30]) * 10**6
    known = {
        "user_click_rate": [0.2, 0.6, 0.4],
        "item_click_rate": [0.5, 0.5, 0.9],
        "user_impressions": [1, 5, 9],
        "item_impressions": [7, 7, 7],
        "user_last_impression_us": [1e6, 2e6, 3e6],
        "item_last_impression_us": [1e6, 2e6, 3e6],
    }
    dense = DenseFeatures.fit(columns(3, **known), lengths, now, channels=("a", "b"), click_rate=0.5)
    scaled = dense.transform(columns(3, **known), lengths, now)
    assert scaled.shape == (3, len(dense.names))
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    cold = dict(zip(dense.names, dense.transform(columns(1), np.array([[0, 0]]), now[:1])[0], strict=True))
    assert cold["user_log_age"] == cold["item_log_age"] == 0
    assert np.isfinite(list(cold.values())).all()
    # Without statistics the floor is the log's own click rate.
    np.testing.assert_allclose(dense.floor(columns(1)), logit(np.array([0.5])))


def test_a_request_far_from_the_log_stays_in_range() -> None:
    known = {name: [1.0, 2.0] for name in needed_columns()} | {"user_click_rate": [0.1, 0.9]}
    known["item_click_rate"] = [0.4, 0.5]
    lengths, now = np.array([[1], [2]]), np.array([5, 9]) * 10**6
    dense = DenseFeatures.fit(columns(2, **known), lengths, now, channels=("a",), click_rate=0.5)
    late = dense.transform(columns(2, **known), lengths, now + 10**15)
    assert np.abs(late).max() <= 4


def test_further_numbers_are_signed_logarithms_and_unknown_ones_the_mean() -> None:
    known = columns(4) | {"price": np.array([0.0, -3.0, np.nan, 1e6])}
    lengths, now = np.zeros((4, 1), dtype=np.int64), np.full(4, 10**6)
    settings = {"channels": ("a",), "click_rate": 0.5}
    dense = DenseFeatures.fit(known, lengths, now, **settings, numeric=("item_attributes:price",))
    assert (dense.columns[-1], dense.names[-2:]) == ("price", ["log_price", "has_price"])
    logs = np.array([0.0, -np.log1p(3), np.log1p(1e6)])
    expected = (logs - logs.mean()) / logs.std()
    got = dense.transform(known, lengths, now)
    np.testing.assert_allclose(got[[0, 1, 3], -2], expected, atol=1e-6)
    assert got[2, -2] == 0
    assert got[2, -1] < 0 < got[0, -1] == got[1, -1] == got[3, -1]
    without = DenseFeatures.fit(columns(4), lengths, now, **settings)
    assert without.names == dense.names[:-2]
    np.testing.assert_array_equal(without.transform(columns(4), lengths, now), got[:, :-2])


def test_of_a_moment_the_time_since_is_a_feature() -> None:
    seconds = np.array([0.0, 9.0, np.nan, 99.0])
    now = np.full(4, 17 * 10**14)
    known = columns(4) | {"pair_last_us": 1.7e15 - seconds * 1e6}
    settings = {"channels": ("a",), "click_rate": 0.5, "numeric": ("user_item_behaviors:pair_last_us",)}
    dense = DenseFeatures.fit(known, np.zeros((4, 1), dtype=np.int64), now, **settings)
    ages = np.log1p(seconds[[0, 1, 3]])
    place = dense.names.index("log_pair_last_us")
    got = dense.transform(known, np.zeros((4, 1), dtype=np.int64), now)[:, place]
    np.testing.assert_allclose(got[[0, 1, 3]], (ages - ages.mean()) / ages.std(), atol=1e-6)
    assert got[2] == 0


def test_a_count_that_is_only_called_like_a_moment_stays_a_count() -> None:
    known = columns(3) | {"item_behaviors_contact_us": np.array([1.0, 10.0, np.nan])}
    settings = {
        "channels": ("a",),
        "click_rate": 0.5,
        "numeric": ("item_behaviors:item_behaviors_contact_us",),
    }
    dense = DenseFeatures.fit(known, np.zeros((3, 1), dtype=np.int64), np.full(3, 10**15), **settings)
    assert dense.moments == ()
    assert dense.gaps == settings["numeric"]


def test_artifacts_of_before_read_their_features_as_then() -> None:
    """Without moments and gaps among their constants."""
    old = DenseFeatures(
        channels=("a",), click_rate=0.5, mean=(0.0,) * 9, deviation=(1.0,) * 9, numeric=("v:last_us",)
    )
    value = np.array([50.0])
    got = old.transform(columns(1) | {"last_us": value}, np.zeros((1, 1), dtype=np.int64), np.array([99]))
    assert got.shape == (1, 9)
    assert got[0, -1] == pytest.approx(min(np.log1p(50.0), 4))


def test_auc_counts_ties_half() -> None:
    assert auc([0, 1], [0.1, 0.2]) == 1
    assert auc([0, 1, 0, 1], [1, 1, 1, 1]) == 0.5
    assert np.isnan(auc([1, 1], [0.1, 0.2]))


def test_gauc_weighs_users_by_impressions_and_leaves_out_one_sided_ones() -> None:
    user = np.array(["a", "a", "b", "b", "b", "b", "c", "c"])
    clicked = np.array([0, 1, 0, 1, 1, 0, 1, 1])
    score = np.array([0.1, 0.9, 0.9, 0.1, 0.2, 0.3, 0.5, 0.4])
    assert gauc(clicked, score, user) == pytest.approx((2 * 1.0 + 4 * 0.0) / 6)
    assert np.isnan(gauc(np.array([1, 1]), np.array([0.1, 0.2]), np.array([1, 1])))
