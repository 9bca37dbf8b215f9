"""The judge of the crash benchmark has to see what a crash could do."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.crash import Ran, not_in_order, one_sentence
from tests.support.home_contents import Contents, differences

SOUND: Contents = {
    "atoms": ([(1, "a"), (2, "b")], np.zeros((2, 0))),
    "user_embedding": ([("u", "v1")], np.array([[0.5, 0.25]])),
}


@pytest.mark.parametrize(
    ("table", "hurt"),
    [
        ("atoms", ([(1, "a")], np.zeros((1, 0)))),
        ("atoms", ([(1, "a"), (2, "b"), (2, "b")], np.zeros((3, 0)))),
        ("atoms", ([(1, "a"), (2, "c")], np.zeros((2, 0)))),
        ("user_embedding", ([("u", "v1")], np.array([[0.5, 0.2502]]))),
    ],
    ids=["a row lost", "a row twice", "another row", "another vector"],
)
def test_differences_are_seen(table: str, hurt: tuple[list[tuple[object, ...]], np.ndarray]) -> None:
    (problem,) = differences({**SOUND, table: hurt}, SOUND)
    assert problem.startswith(table)


def test_a_missing_table_is_seen_and_last_bits_are_not() -> None:
    assert differences({"atoms": SOUND["atoms"]}, SOUND)
    moved = (SOUND["user_embedding"][0], SOUND["user_embedding"][1] + 1e-6)
    assert differences({**SOUND, "user_embedding": moved}, SOUND) == []


def test_a_reader_may_not_see_the_first_version_again() -> None:
    versions = {"v1": {}, "v2": {}}
    assert not_in_order(("v1", "v2"), versions) == []
    assert not_in_order(("v2",), versions) == []
    for seen in (("v1", "v2", "v1"), ("v2", "v1"), ("v1", "v3"), ("v1",), ()):
        assert not_in_order(seen, versions)


def test_a_traceback_is_not_one_sentence() -> None:
    said = "bahe: the disk is full (No space left on device); make room.\n"
    assert one_sentence(Ran(2, 0.1, said)) == []
    for done in (
        Ran(1, 0.1, said),
        Ran(2, 0.1, "Traceback\n" + said),
        Ran(2, 0.1, "bahe: no model yet.\n"),
    ):
        assert one_sentence(done)
