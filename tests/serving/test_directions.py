"""Searching many vectors by direction: what a comparison of all says, standardised, in double precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from serving.lookup import directions as module
from serving.lookup.directions import Directions


def log_like(rows: int, width: int = 12, seed: int = 0) -> npt.NDArray[np.float32]:
    """Vectors as a language model has them: a huge coordinate, and one that is the same in all."""
    vectors = np.random.default_rng(seed).normal(size=(rows, width))
    vectors[:, 0] = 500 + 20 * vectors[:, 0]
    vectors[:, 1] = 0.1
    return vectors.astype(np.float32)


def standardised(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    deviation = vectors.std(axis=0, dtype=np.float64)
    deviation[1] = np.inf
    centred = (vectors - vectors.mean(axis=0, dtype=np.float64)) / deviation
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


@pytest.mark.parametrize("part", [7, 100, 1000])
def test_the_nearest_are_those_of_a_full_comparison(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)
    vectors = log_like(500)
    kept = Directions.of(vectors[start : start + part] for start in range(0, 500, part))
    unit = standardised(vectors)
    for row in (0, 63, 64, 499):
        cosine = unit @ unit[row]
        for direction in (kept.at(row), kept.to(vectors[row])):
            found = kept.nearest(direction, 10)
            assert found[0][0] == row
            np.testing.assert_allclose([c for _, c in found], np.sort(cosine)[::-1][:10], atol=2e-3)
            np.testing.assert_allclose([c for _, c in found], cosine[[r for r, _ in found]], atol=2e-3)
    assert len(kept.nearest(kept.at(0), 1000)) == 500


def test_a_coordinate_that_is_always_the_same_does_not_decide() -> None:
    """A user's pushed behaviors, or a text, may move what is the same in all that are kept."""
    vectors = log_like(100)
    kept, moved = Directions.of([vectors]), vectors[5].copy()
    moved[1] += 1000
    np.testing.assert_array_equal(kept.to(moved), kept.to(vectors[5]))


def test_what_comes_after_the_sample_is_standardised_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 100)
    vectors = log_like(300)
    kept, first = Directions.of([vectors[:150], vectors[150:]]), Directions.of([vectors[:150]])
    np.testing.assert_array_equal(kept.mean_V, first.mean_V)
    for row in (149, 150, 299):
        assert kept.nearest(kept.to(vectors[row]), 1)[0][0] == row


def test_equal_vectors_come_in_their_order() -> None:
    vectors = np.repeat(log_like(2), 4, axis=0)
    kept = Directions.of([vectors])
    assert [row for row, _ in kept.nearest(kept.at(1), 4)] == [0, 1, 2, 3]


def test_nothing_is_near_where_there_is_nothing() -> None:
    kept = Directions.of([])
    assert kept.nearest(kept.to(log_like(1)[0]), 3) == []
    alone = Directions.of([log_like(1)])
    assert alone.nearest(alone.at(0), 3) == [(0, 0.0)]
