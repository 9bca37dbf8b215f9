from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import (
    Artifact,
    Batches,
    TrainingConfig,
    TrainingData,
    auc,
    load,
    train,
)
from bahe_models.baselines import train_id_only
from bahe_models.trainer.training_loop import seeded
from tests.support.toy import at_moments, toy_artifact, toy_batches, toy_config, toy_data


def fit_toy(
    data: TrainingData, backbone: Path, shape: dict[str, Any] | None = None, **settings: Any
) -> tuple[Batches, list[float], Artifact]:
    config = toy_config(**settings)
    with seeded(config.seed):
        batches = toy_batches(data, backbone, **(shape or {}))
        trained = train(batches, config)
    return batches, [row.train_loss for row in trained.history], toy_artifact(batches)


# What the toy run came to when it was written. A change that moves it has to say so.
GOLDEN_LOSSES = [0.6917, 0.5560, 0.5407]


def test_the_toy_run_learns_and_repeats_itself(tiny_backbone: Path) -> None:
    data = toy_data()
    batches, losses, _ = fit_toy(data, tiny_backbone)
    _, again, _ = fit_toy(data, tiny_backbone)
    assert losses == again
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, atol=2e-3)
    test = data.splits["test"]
    assert auc(test.clicked_N, batches.predict(test)) > 0.75
    assert auc(test.clicked_N, batches.dense.floor(test.columns)) < 0.6


def test_the_best_epoch_is_kept(tiny_backbone: Path) -> None:
    batches, losses, _ = fit_toy(toy_data(), tiny_backbone, epochs=8, learning_rate=0.05, patience=2)
    validation = batches.data.splits["validation"]
    reached = auc(validation.clicked_N, batches.predict(validation))
    assert len(losses) < 8
    assert reached > 0.7


def test_a_saved_artifact_scores_as_the_model_did(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    batches, _, artifact = fit_toy(data, tiny_backbone)
    artifact.save(tmp_path / "bahe-toy")
    loaded = load(tmp_path / "bahe-toy")
    split = data.splits["test"]
    rows = np.arange(len(split))
    user = loaded.user_vectors(
        torch.from_numpy(data.atoms_AD), data.atom_ids, data.timelines, split.user_N, split.length_NC
    )
    item = loaded.item_vectors(
        torch.from_numpy(data.atoms_AD[data.item_atom_I[split.item_N]]), split.item_N.tolist()
    )
    scores = loaded.score(user, item, split.columns, split.length_NC, split.time_us_N)
    logits = batches.predict(split)
    np.testing.assert_allclose(np.log(scores / (1 - scores)), logits[rows], atol=1e-4)
    assert loaded.model_version == "bahe-toy"
    # The user vector knows nothing of the candidate item (invariant 7), and an unseen item has text only.
    unseen = loaded.item_vectors(torch.from_numpy(data.atoms_AD[:1]), ["never seen"])
    assert np.isfinite(unseen).all()


@pytest.mark.parametrize("shape", [{"channels": "merged", "time_gaps": True}, {"time_gaps": True}])
def test_other_ways_to_read_timelines_train_and_are_saved(
    shape: dict[str, Any], tiny_backbone: Path, tmp_path: Path
) -> None:
    data = at_moments(toy_data())
    batches, _, artifact = fit_toy(data, tiny_backbone, shape)
    test = data.splits["test"]
    assert auc(test.clicked_N, batches.predict(test)) > 0.75
    assert all(embedding.any() for embedding in batches.model.behaviors.parameters())  # they have learned
    artifact.save(tmp_path / "bahe-toy")
    loaded = load(tmp_path / "bahe-toy")
    assert loaded.model.config == batches.model.config
    request = torch.from_numpy(data.atoms_AD), data.atom_ids, data.timelines, test.user_N, test.length_NC
    np.testing.assert_allclose(loaded.user_vectors(*request), artifact.user_vectors(*request), atol=1e-5)


def test_merged_channels_need_lengths_of_one_moment(tiny_backbone: Path) -> None:
    with pytest.raises(BadInput, match="pull the frame again"):
        fit_toy(toy_data(), tiny_backbone, {"channels": "merged"}, epochs=1)


def test_an_artifact_of_before_these_options_is_read_as_it_was_meant(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    artifact = toy_artifact(toy_batches(toy_data(), tiny_backbone))
    artifact.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for name in ("channels", "time_gaps"):
        del config["model"][name]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "m").model.config == artifact.model.config


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", lambda p: p.write_text("{")),
        ("model.safetensors", lambda p: p.write_bytes(b"short")),
        ("item_ids.json", lambda p: p.unlink()),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"format": 1', '"format": 99'))),
    ],
)
def test_a_damaged_artifact_is_refused(
    name: str, damage: Callable[[Path], object], tiny_backbone: Path, tmp_path: Path
) -> None:
    _, _, artifact = fit_toy(toy_data(), tiny_backbone, epochs=1)
    artifact.save(tmp_path / "m")
    damage(tmp_path / "m" / name)
    with pytest.raises(BadInput, match="train again"):
        load(tmp_path / "m")


def test_the_id_only_network_learns_which_items_are_good() -> None:
    data = toy_data()
    train_split = data.splits["train"]
    good = (np.arange(20) < 10).astype(np.float32)
    splits = {
        name: replace(part, clicked_N=good[part.item_N])
        for name, part in {**data.splits, "train": train_split}.items()
    }
    data = replace(data, splits=splits)
    score, trained = train_id_only(data, TrainingConfig(learning_rate=1e-2))
    assert auc(splits["test"].clicked_N, score(splits["test"])) > 0.95
    assert trained.seconds > 0


def broken(data: TrainingData, **changes: object) -> TrainingData:
    train_split = replace(data.splits["train"], **changes)  # type: ignore[arg-type]
    return replace(data, splits={**data.splits, "train": train_split})


def with_timelines(data: TrainingData, row: int) -> TrainingData:
    atoms = tuple(channel.copy() for channel in data.timelines.atoms)
    atoms[1][7] = row
    return replace(data, timelines=replace(data.timelines, atoms=atoms))


def with_hole(data: TrainingData, value: float) -> TrainingData:
    holes = data.atoms_AD.copy()
    holes[3, 4] = value
    return replace(data, atoms_AD=holes)


def with_first(data: TrainingData, field: str, value: float) -> TrainingData:
    """The training split with one wrong value."""
    values = getattr(data.splits["train"], field).copy()
    values[0] = value
    return broken(data, **{field: values})


def with_statistic(data: TrainingData, value: float) -> TrainingData:
    columns = dict(data.splits["train"].columns)
    columns["user_impressions"] = np.full_like(columns["user_impressions"], value)
    return broken(data, columns=columns)


BAD_DATA: dict[str, Callable[[TrainingData], TrainingData]] = {
    "1 atom vectors hold NaN": lambda d: with_hole(d, np.nan),
    "1 atom vectors hold NaN or infinity": lambda d: with_hole(d, -np.inf),
    r"1 rows of the disliked timelines point to atoms .* \(row 20, of 20\)": lambda d: with_timelines(
        d, 20
    ),
    r"the disliked timelines point to atoms .* \(row -1, of 20\)": lambda d: with_timelines(d, -1),
    "the items' texts point to atoms": lambda d: replace(d, item_atom_I=d.item_atom_I + 1),
    "the train split point to items": lambda d: with_first(d, "item_N", 20),
    "the train split point to users": lambda d: with_first(d, "user_N", -1),
    "only one class": lambda d: broken(d, clicked_N=np.zeros(len(d.splits["train"]), dtype=np.float32)),
    "not 0 or 1": lambda d: with_first(d, "clicked_N", 0.5),
    "clicked is not 0 or 1 everywhere in the train": lambda d: with_first(d, "clicked_N", np.nan),
    "beyond a timeline's end": lambda d: with_first(d, "length_NC", 13),
    "negative timeline lengths": lambda d: with_first(d, "length_NC", -1),
    "no column user_impressions": lambda d: broken(d, columns={}),
    "user_impressions is infinite in the train": lambda d: with_statistic(d, np.inf),
}


@pytest.mark.parametrize("words", BAD_DATA)
def test_data_that_cannot_be_trained_on_is_refused(words: str) -> None:
    with pytest.raises(BadInput, match=words):
        BAD_DATA[words](toy_data()).check()


def test_unknown_statistics_can_be_trained_on() -> None:
    with_statistic(toy_data(), np.nan).check()


def test_training_refuses_bad_data_before_any_step(tiny_backbone: Path) -> None:
    batches = toy_batches(toy_data(), tiny_backbone)
    batches.data = with_first(batches.data, "clicked_N", np.nan)
    before = {name: value.clone() for name, value in batches.model.state_dict().items()}
    with pytest.raises(BadInput, match="not 0 or 1"):
        train(batches, toy_config())
    assert all(torch.equal(value, before[name]) for name, value in batches.model.state_dict().items())


def test_vectors_of_another_width_are_refused(tiny_backbone: Path) -> None:
    data = toy_data()
    artifact = toy_artifact(toy_batches(data, tiny_backbone))
    narrow = data.atoms_AD[:, :16]
    with pytest.raises(BadInput, match="width 16, but the backbone reads 32"):
        toy_batches(replace(data, atoms_AD=narrow), tiny_backbone)
    atoms, test = torch.from_numpy(narrow), data.splits["test"]
    with pytest.raises(BadInput, match="bahe-toy reads 32; give it those of enc-toy"):
        artifact.user_vectors(atoms, data.atom_ids, data.timelines, test.user_N, test.length_NC)
    with pytest.raises(BadInput, match="bahe-toy reads 32; give it those of enc-toy"):
        artifact.item_vectors(atoms, list(data.item_ids))


def test_cross_layers_and_models_without_ids(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    test = data.splits["test"]
    crossed, _, artifact = fit_toy(data, tiny_backbone, {"head": "dcn"})
    assert auc(test.clicked_N, crossed.predict(test)) > 0.75
    artifact.save(tmp_path / "dcn")
    assert len(load(tmp_path / "dcn").model.head.crosses) == 2
    _, _, by_text = fit_toy(data, tiny_backbone, {"item_ids": False, "behavior_ids": False})
    atoms = torch.from_numpy(data.atoms_AD[:1])
    known, unseen = (by_text.item_vectors(atoms, [item]) for item in (0, "never seen"))
    np.testing.assert_array_equal(known, unseen)


def test_recomputed_activations_give_the_same_weights(tiny_backbone: Path) -> None:
    data = toy_data()
    kept, _, _ = fit_toy(data, tiny_backbone, epochs=1)
    again, _, _ = fit_toy(data, tiny_backbone, epochs=1, recompute=True)
    for name, value in kept.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, atol=1e-6, rtol=0)
    assert toy_config(recompute=True).fields_affecting_weights() == toy_config().fields_affecting_weights()
