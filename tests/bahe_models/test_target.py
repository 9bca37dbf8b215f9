"""The `target` head: the candidate item's attention over the raw history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bahe_core.errors import NotServable
from bahe_models import (
    Artifact,
    Batches,
    Impressions,
    ModelConfig,
    Timelines,
    TrainingData,
    auc,
    load,
    train,
)
from bahe_models.target import TargetAttention
from bahe_models.trainer.training_loop import seeded
from tests.support.toy import toy_artifact, toy_batches, toy_config, toy_data

HISTORY = 5


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path) -> Batches:
    with seeded(0):
        batches = toy_batches(toy_data(), tiny_backbone, head="target", target_history=HISTORY)
        train(batches, toy_config(epochs=1))
    return batches


def scores(
    artifact: Artifact, data: TrainingData, part: Impressions, timelines: Timelines | None = None
) -> np.ndarray:
    return artifact.score_timelines(
        torch.from_numpy(data.atoms_AD),
        data.atom_ids,
        timelines or data.timelines,
        part.user_N,
        part.length_NC,
        data.item_atom_I[part.item_N],
        part.item_N.tolist(),
        part.columns,
        part.time_us_N,
    )


def test_the_projected_atoms_of_absent_behaviors_weigh_nothing() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(channels=2, profile_width=3, item_width=7)
    atoms, item = torch.randn(9, 4), torch.randn(1, 7)
    project = torch.nn.Linear(4, 3, bias=False)

    def interest(rows: list[int]) -> torch.Tensor:
        found: torch.Tensor = attention(atoms, torch.tensor([rows]), item, item[:, 2:5], project=project)
        return found

    torch.testing.assert_close(interest([4, 2, 7, -1]), interest([4, 2, -1, -1, 7, -1, -1, -1]))
    assert not interest([-1] * 4).any()
    # A channel's behaviors are a set: their order says nothing, their channel does.
    torch.testing.assert_close(interest([4, 2, 7, -1]), interest([2, 4, -1, 7]))
    assert not torch.allclose(interest([4, 2, 7, -1]), interest([7, -1, 4, 2]))


def test_the_unit_is_the_formula_of_the_paper() -> None:
    torch.manual_seed(0)
    unit = TargetAttention(channels=1, profile_width=3, item_width=5)
    atoms, item = torch.randn(4, 3), torch.randn(2, 5)
    rows = torch.tensor([[2, 0, -1], [3, -1, -1]])
    found = unit(atoms, rows, item, item[:, 1:4], project=lambda atoms_MD: atoms_MD)
    for n in range(2):
        total = torch.zeros(3)
        present = [int(r) for r in rows[n] if r >= 0]
        for behavior in atoms[present]:
            hidden = unit.of_behavior(behavior) + unit.of_item(item[n]) + unit.of_channel.weight[0]
            hidden = hidden + unit.of_product(behavior * item[n, 1:4])
            total = total + unit.weight(torch.nn.functional.silu(hidden)) * behavior
        total = total / (len(present) + 1) ** 0.5
        torch.testing.assert_close(found[n], torch.cat([total, total * item[n, 1:4]]))


def test_behaviors_at_or_after_the_prefix_change_no_score(trained: Batches) -> None:
    data, artifact = trained.data, toy_artifact(trained)
    test = data.splits["test"]
    part = replace(test, length_NC=np.minimum(test.length_NC, 9))
    rng = np.random.default_rng(0)
    position = np.arange(12 * data.timelines.users) % 12

    def changed(where: np.ndarray) -> Timelines:
        atoms = tuple(np.where(where, rng.integers(20, size=len(a)), a) for a in data.timelines.atoms)
        return replace(data.timelines, atoms=atoms)

    before = scores(artifact, data, part)
    np.testing.assert_allclose(scores(artifact, data, part, changed(position >= 9)), before, atol=1e-6)
    assert np.abs(scores(artifact, data, part, changed(position == 1)) - before).max() > 1e-3


def test_an_impression_alone_scores_as_in_a_batch(trained: Batches) -> None:
    data, artifact = trained.data, toy_artifact(trained)
    test = data.splits["test"]
    together = scores(artifact, data, test)
    logits = trained.predict(test)
    np.testing.assert_allclose(np.log(together / (1 - together)), logits, atol=1e-4)
    for n in range(0, len(test), 50):
        rows = slice(n, n + 1)
        one = replace(
            test,
            **{f: getattr(test, f)[rows] for f in ("user_N", "item_N", "length_NC", "time_us_N")},
            columns={name: values[rows] for name, values in test.columns.items()},
        )
        np.testing.assert_allclose(scores(artifact, data, one), together[rows], atol=1e-5)


def test_an_artifact_scores_from_timelines_and_not_from_vectors(trained: Batches, tmp_path: Path) -> None:
    data, artifact = trained.data, toy_artifact(trained)
    test = data.splits["test"]
    artifact.save(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert not loaded.vectors_suffice
    assert loaded.model.config == artifact.model.config
    np.testing.assert_array_equal(scores(loaded, data, test), scores(artifact, data, test))
    atoms = torch.from_numpy(data.atoms_AD)
    user = loaded.user_vectors(atoms, data.atom_ids, data.timelines, test.user_N, test.length_NC)
    item = loaded.item_vectors(atoms[data.item_atom_I[test.item_N]], test.item_N.tolist())
    with pytest.raises(NotServable, match=r"bahe-toy has the target head.*dnn or dcn"):
        loaded.score(user, item, test.columns, test.length_NC, test.time_us_N)


def test_scores_from_timelines_are_those_from_vectors_where_these_suffice(tiny_backbone: Path) -> None:
    data = toy_data()
    with seeded(0):
        artifact = toy_artifact(toy_batches(data, tiny_backbone))
    test = data.splits["test"]
    atoms = torch.from_numpy(data.atoms_AD)
    assert artifact.vectors_suffice
    from_vectors = artifact.score(
        artifact.user_vectors(atoms, data.atom_ids, data.timelines, test.user_N, test.length_NC),
        artifact.item_vectors(atoms[data.item_atom_I[test.item_N]], test.item_N.tolist()),
        test.columns,
        test.length_NC,
        test.time_us_N,
    )
    np.testing.assert_allclose(scores(artifact, data, test), from_vectors, atol=1e-6)


def repeated_interests() -> TrainingData:
    """A user clicks what they did before, item by item: too much to say in a narrow user vector."""
    data = toy_data(users=60, items=60, rows=6000, train=4000)
    rng = np.random.default_rng(1)
    done = rng.permuted(np.tile(np.arange(60), (60, 1)), axis=1)[:, :24].reshape(60, 2, 12)
    atoms = rng.normal(size=(60, 32)).astype(np.float32)

    def part(split: Impressions) -> Impressions:
        full = np.full_like(split.length_NC, 12)
        # Half of the impressions show what the user did in a channel; only `liked` makes a click.
        user, count = split.user_N, len(split)
        kind = rng.integers(2, size=count)
        item = done[user, kind, rng.integers(12, size=count)]
        clicked = (rng.random(count) < np.where(kind == 0, 0.95, 0.05)).astype(np.float32)
        return replace(split, item_N=item, length_NC=full, clicked_N=clicked)

    timelines = replace(data.timelines, atoms=tuple(done[:, channel].ravel() for channel in range(2)))
    splits = {name: part(split) for name, split in data.splits.items()}
    return replace(data, atoms_AD=atoms, timelines=timelines, splits=splits)


@pytest.mark.parametrize(
    "parts",
    [{"behavior_ids": False}, {"behavior_ids": True, "recent": (4,)}],
    ids=["alone", "beside others"],
)
def test_it_learns_what_a_narrow_vector_cannot_say(tiny_backbone: Path, parts: dict[str, Any]) -> None:
    data = repeated_interests()
    test = data.splits["test"]
    reached = {}
    for head in ("dnn", "target"):
        with seeded(0):
            batches = toy_batches(data, tiny_backbone, head=head, deep_width=4, dropout=0.0, **parts)
            train(batches, toy_config(epochs=3, impressions_per_step=250, learning_rate=2e-2))
        reached[head] = auc(test.clicked_N, batches.predict(test))
    assert reached["target"] > reached["dnn"] + 0.05


def test_a_history_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="target_history"):
        ModelConfig(head="target", target_history=0)
