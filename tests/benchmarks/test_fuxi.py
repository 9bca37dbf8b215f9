from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from bahe_models import auc
from benchmarks.fuxi import FIRST, PADDING, TUNED, UNKNOWN, Batches, Encoder, Network, Setting, train_fuxi
from tests.support.toy import at_moments, toy_data

ALL = Setting(history=5, behavior=("item", "channel", "atom"))
needs_fuxictr = pytest.mark.skipif(
    importlib.util.find_spec("fuxictr") is None, reason="FuxiCTR is not installed (extra `bench`)"
)


def test_sequences_end_strictly_before_the_impression() -> None:
    """No behavior at or after the impression; of those before it the latest of each channel, old to new."""
    data = at_moments(toy_data())
    # Every behavior an atom of its own, whose row then tells which one it is.
    total = sum(len(atoms) for atoms in data.timelines.atoms)
    first, atoms = 0, []
    for channel in data.timelines.atoms:
        atoms.append(first + np.arange(len(channel)))
        first += len(channel)
    lines = replace(data.timelines, atoms=tuple(atoms))
    data = replace(data, timelines=lines, atoms_AD=np.zeros((total, 1), dtype=np.float32))
    time_us, channel_of = np.concatenate(lines.time_us), np.repeat([0, 1], [len(a) for a in lines.atoms])
    encoder = Encoder(data, np.arange(total) % len(data.item_ids), ALL)
    # Atoms unseen in training share a row; so all are made known.
    encoder._atom = FIRST + np.arange(total)
    for split in data.splits.values():
        rows, present_NH = encoder.sequences(split)
        for n in range(0, len(split), 7):
            there = present_NH[n]
            found = rows["atom"][n, :-1][there] - FIRST
            want = []
            for channel, (offset, times) in enumerate(zip(lines.offsets, lines.time_us, strict=True)):
                begin = offset[split.user_N[n]]
                end = begin + split.length_NC[n, channel]
                want += lines.atoms[channel][max(begin, end - 5) : end].tolist()
                inside = found[channel_of[found] == channel]
                if end < offset[split.user_N[n] + 1]:
                    assert (time_us[inside] < times[end]).all()
            assert found.tolist() == want
            assert (rows["channel"][n, :-1][there] == FIRST + channel_of[found]).all()
            assert all((ids[n, :-1][~there] == PADDING).all() for ids in rows.values())


def test_candidate_shares_the_table_of_the_behaviors_items() -> None:
    data = toy_data()
    encoder = Encoder(data, np.arange(20), ALL)
    split = data.splits["train"]
    rows, present_NH = encoder.sequences(split)
    # In this log an atom's row is its item's.
    assert (rows["item"][:, :-1][present_NH] == rows["atom"][:, :-1][present_NH]).all()
    assert len(np.unique(rows["item"][:, -1])) == len(np.unique(split.item_N))
    assert (rows["item"][:, -1] >= FIRST).all()


def test_what_training_never_saw_is_unknown() -> None:
    data = toy_data()
    train = data.splits["train"]
    seen = np.flatnonzero((train.user_N < 30) & (train.item_N < 15))
    part = replace(
        train,
        user_N=train.user_N[seen],
        item_N=train.item_N[seen],
        length_NC=np.zeros((len(seen), 2), dtype=np.int64),
        time_us_N=train.time_us_N[seen],
        clicked_N=train.clicked_N[seen],
        columns={name: values[seen] for name, values in train.columns.items()},
        context_NX=train.item_N[seen, None] % 3,
    )
    test = replace(data.splits["test"], context_NX=data.splits["test"].item_N[:, None] % 5)
    data = replace(data, context=("slot",), splits=data.splits | {"train": part, "test": test})
    encoder = Encoder(data, np.full(20, -1), ALL)
    columns, (rows, present_NH) = encoder.columns(test), encoder.sequences(test)
    assert ((columns["user"] == UNKNOWN) == (test.user_N >= 30)).all()
    assert ((rows["item"][:, -1] == UNKNOWN) == (test.item_N >= 15)).all()
    assert (rows["item"][:, :-1][present_NH] == UNKNOWN).all()
    assert ((columns["context_slot"] == UNKNOWN) == (test.item_N % 5 >= 3)).all()


@needs_fuxictr
@pytest.mark.parametrize("network", ["DIN", "DCNv2"])
def test_fuxictr_learns_who_likes_what(network: Network) -> None:
    data = toy_data(rows=4000, train=3000)
    setting = replace(TUNED[network], batch_size=128, learning_rate=1e-2, evaluations=1)
    score = train_fuxi(network, data, np.arange(20), setting, seed=0, epochs=4)
    test = data.splits["test"]
    assert auc(test.clicked_N, score(test)) > 0.7
    again = train_fuxi(network, data, np.arange(20), setting, seed=0, epochs=4)
    assert np.array_equal(again(test), score(test))


@needs_fuxictr
def test_batches_hold_each_impression_once() -> None:
    data = toy_data()
    encoder = Encoder(data, np.arange(20), replace(ALL, batch_size=300))
    split = data.splits["train"]
    batches = Batches(encoder, split, rng=np.random.default_rng(0))
    users = np.concatenate([columns["user"] for columns, _, _ in batches])
    assert len(batches) == 4
    assert sorted(users.tolist()) == sorted(encoder.columns(split)["user"].tolist())
    for columns, items, mask in batches:
        assert len(items["item"]) == len(columns["user"]) * (mask.shape[1] + 1)
