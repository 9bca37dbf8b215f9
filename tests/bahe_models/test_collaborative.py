from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bahe_models import TrainingData, auc, load, train
from bahe_models.collaborative import Collaborative
from bahe_models.trainer.ctr_training import seen_atoms
from bahe_models.trainer.training_loop import seeded
from bahe_models.trainer.warm_start import known_behaviors, start_from
from tests.support.toy import toy_artifact, toy_batches, toy_config, toy_data


def without_words() -> TrainingData:
    """The toy log with texts that say nothing: only what goes with what is left to learn."""
    data = toy_data()
    noise = np.random.default_rng(7).normal(size=data.atoms_AD.shape).astype(np.float32)
    return replace(data, atoms_AD=noise)


def vectors(folder: Path, data: TrainingData, order: np.ndarray) -> np.ndarray:
    """User vectors of a saved model, from an atom table in another order."""
    place = np.argsort(order)
    test = data.splits["test"]
    timelines = replace(data.timelines, atoms=tuple(place[atoms] for atoms in data.timelines.atoms))
    return load(folder).user_vectors(
        torch.from_numpy(data.atoms_AD[order]),
        data.atom_ids[order],
        timelines,
        test.user_N,
        test.length_NC,
    )


def test_rows_go_by_atom_id_and_what_is_unknown_adds_nothing() -> None:
    part = Collaborative(behaviors=3, items=2, width=4)
    part.atom_ids_B.copy_(torch.tensor([-5, 7, 2**62]))
    rows = part.rows(torch.tensor([7, 8, -5, 2**62, -(2**62), 2**63 - 1]))
    assert rows.tolist() == [2, 0, 1, 3, 0, 0]
    added = part(torch.tensor([0, 2, 0, 1]))
    table = part.behavior.weight
    torch.testing.assert_close(added, torch.stack([table[0] * 0, table[2], table[0] * 0, table[1]]))
    assert Collaborative(behaviors=0, items=0, width=4).rows(torch.tensor([1, 2])).tolist() == [0, 0]


def test_only_behaviors_before_training_impressions_are_known() -> None:
    data = toy_data()
    train_ = data.splits["train"]
    expected = set()
    for user, lengths in zip(train_.user_N, train_.length_NC, strict=True):
        for offsets, atoms, length in zip(
            data.timelines.offsets, data.timelines.atoms, lengths, strict=True
        ):
            expected.update(atoms[offsets[user] : offsets[user] + length].tolist())
    assert set(seen_atoms(data).tolist()) == expected
    first = replace(train_, length_NC=np.minimum(train_.length_NC, [[1, 0]]))
    few = seen_atoms(replace(data, splits={**data.splits, "train": first}))
    assert 0 < len(few) < len(expected)


def test_it_learns_what_goes_with_what_where_texts_say_nothing(tiny_backbone: Path) -> None:
    data = without_words()
    test = data.splits["test"]
    reached = {}
    for ids in (True, False):
        with seeded(0):
            batches = toy_batches(data, tiny_backbone, behavior_ids=ids, item_ids=False)
            train(batches, toy_config(epochs=4))
        reached[ids] = auc(test.clicked_N, batches.predict(test))
    assert reached[True] > reached[False] + 0.03


def test_a_saved_model_knows_its_behaviors_in_any_order(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    with seeded(0):
        artifact = toy_artifact(toy_batches(data, tiny_backbone))
    artifact.save(tmp_path / "m")
    as_is = np.arange(len(data.atom_ids))
    shuffled = np.random.default_rng(3).permutation(len(data.atom_ids))
    expected = vectors(tmp_path / "m", data, as_is)
    assert expected[:, -16:].std() > 1e-3
    np.testing.assert_allclose(vectors(tmp_path / "m", data, shuffled), expected, atol=1e-5)
    strangers = replace(data, atom_ids=data.atom_ids + 10**6)
    assert not vectors(tmp_path / "m", strangers, as_is)[:, -16:].any()


def test_a_model_saved_before_there_was_such_a_part_is_read(tiny_backbone: Path, tmp_path: Path) -> None:
    batches = toy_batches(toy_data(), tiny_backbone, behavior_ids=False)
    toy_artifact(batches).save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    del config["model"]["behavior_ids"], config["model"]["id_width"]
    path.write_text(json.dumps(config))
    assert load(tmp_path / "m").model.collaborative is None


def test_a_warm_start_keeps_what_is_known_of_each_behavior(tiny_backbone: Path) -> None:
    data = toy_data()
    earlier = toy_batches(data, tiny_backbone)
    artifact = toy_artifact(earlier)
    # Today's log has other atoms besides, in another order.
    more = np.random.default_rng(1).permutation(np.arange(990, 1010))
    place = np.empty(2000, dtype=np.int64)
    place[more] = np.arange(len(more))
    known = known_behaviors(artifact, more)
    assert {int(more[row]) for row in known} <= set(data.atom_ids.tolist())
    today = replace(data, atom_ids=more)
    batches = toy_batches(today, tiny_backbone)
    start_from(artifact, batches, encoder_version="enc-toy")
    ours, theirs = batches.model.collaborative, artifact.model.collaborative
    assert ours is not None
    assert theirs is not None
    for row, atom_id in enumerate(ours.atom_ids_B, start=1):
        expected = theirs.behavior.weight[int(theirs.rows(atom_id[None]))]
        torch.testing.assert_close(ours.behavior.weight[row], expected)
    assert ours.behavior.weight[1:].any(dim=1).any()
    assert not ours.behavior.weight[1:].any(dim=1).all()  # of new atoms nothing is known
