from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import (
    Artifact,
    BackboneConfig,
    Batches,
    DenseFeatures,
    Impressions,
    ModelConfig,
    Timelines,
    TrainingConfig,
    TrainingData,
    WindowConfig,
    auc,
    load,
    load_backbone,
    train,
)
from bahe_models.baselines import train_id_only
from bahe_models.features import needed_columns
from bahe_models.training import build_model, id_rows, seeded

CPU = torch.device("cpu")
SHAPE = ModelConfig(deep_width=8, profile_width=8, head_width=16)


def toy_data(seed: int = 0, users: int = 40, items: int = 20, rows: int = 1500) -> TrainingData:
    """Two kinds of item; a user clicks on the kind that fills their `liked` channel."""
    rng = np.random.default_rng(seed)
    kind = np.arange(items) % 2
    atoms = (rng.normal(size=(items, 32)) + 2 * kind[:, None]).astype(np.float32)
    atoms[:, 0] = 100  # the huge coordinate that language models have
    taste = rng.integers(2, size=users)
    timelines = []
    for channel in range(2):
        pool = [np.flatnonzero(kind == (taste[u] ^ channel)) for u in range(users)]
        timelines.append([rng.choice(pool[u], 12) for u in range(users)])
    offsets = tuple(np.arange(0, 12 * users + 1, 12, dtype=np.int64) for _ in range(2))
    user, item = rng.integers(users, size=rows), rng.integers(items, size=rows)
    clicked = (rng.random(rows) < np.where(taste[user] == kind[item], 0.8, 0.2)).astype(np.float32)
    length = rng.integers(2, 13, (rows, 2))

    def part(begin: int, end: int) -> Impressions:
        nothing = {name: np.full(end - begin, np.nan) for name in needed_columns()}
        nothing |= {
            "user_click_rate": np.full(end - begin, 0.5),
            "item_click_rate": rng.uniform(0.4, 0.6, end - begin),
        }
        return Impressions(
            user_N=user[begin:end],
            item_N=item[begin:end],
            length_NC=length[begin:end],
            time_us_N=np.arange(begin, end) * 10**6,
            clicked_N=clicked[begin:end],
            columns=nothing,
        )

    return TrainingData(
        atoms_AD=atoms,
        timelines=Timelines(("liked", "disliked"), offsets, tuple(np.concatenate(t) for t in timelines)),
        item_atom_I=np.arange(items),
        item_ids=tuple(range(items)),
        splits={"train": part(0, 1000), "validation": part(1000, 1250), "test": part(1250, rows)},
    )


def fit_toy(
    data: TrainingData, backbone: Path, shape: ModelConfig = SHAPE, **settings: object
) -> tuple[Batches, list[float], Artifact]:
    config = TrainingConfig(
        impressions_per_step=100, bfloat16=False, **{"epochs": 3, "learning_rate": 1e-2, **settings}
    )  # type: ignore[arg-type]
    split = data.splits["train"]
    dense = DenseFeatures.fit(
        split.columns, split.length_NC, split.time_us_N, channels=("liked", "disliked"), click_rate=0.5
    )
    halves = load_backbone(BackboneConfig(path=str(backbone), shallow_layers=2, deep_layers=2))
    rows = id_rows(split.item_N, 20)
    with seeded(config.seed):
        model = build_model(halves.deep, data, dense, shape, rows)
        batches = Batches(model, data, dense, WindowConfig(), item_row_I=rows, device=CPU, bfloat16=False)
        trained = train(batches, config)
    artifact = Artifact(
        model=model,
        model_version="bahe-toy",
        encoder_version="enc-toy",
        deep_config=halves.deep.config.to_dict(),
        window=WindowConfig(),
        dense=dense,
        item_ids=tuple(np.flatnonzero(rows).tolist()),
        facts={},
    )
    return batches, [row.train_loss for row in trained.history], artifact


# What the toy run came to when it was written. A change that moves it has to say so.
GOLDEN_LOSSES = [0.7136, 0.5695, 0.5377]


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
        torch.from_numpy(data.atoms_AD), data.timelines, split.user_N, split.length_NC
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


def test_data_that_cannot_be_trained_on_is_refused() -> None:
    data = toy_data()
    data.check()
    holes = data.atoms_AD.copy()
    holes[3, 4] = np.nan
    clicked = data.splits["train"].clicked_N
    cases = {
        "1 atom vectors hold NaN": replace(data, atoms_AD=holes),
        "only one class": broken(data, clicked_N=np.zeros_like(clicked)),
        "not 0 or 1": broken(data, clicked_N=clicked + 0.5),
        "beyond a timeline's end": broken(data, length_NC=data.splits["train"].length_NC + 20),
        "no column user_impressions": broken(data, columns={}),
    }
    for words, bad in cases.items():
        with pytest.raises(BadInput, match=words):
            bad.check()


def test_cross_layers_and_models_without_item_ids(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    test = data.splits["test"]
    crossed, _, artifact = fit_toy(data, tiny_backbone, replace(SHAPE, head="dcn"))
    assert auc(test.clicked_N, crossed.predict(test)) > 0.75
    artifact.save(tmp_path / "dcn")
    assert len(load(tmp_path / "dcn").model.head.crosses) == 2
    _, _, by_text = fit_toy(data, tiny_backbone, replace(SHAPE, item_ids=False))
    atoms = torch.from_numpy(data.atoms_AD[:1])
    known, unseen = (by_text.item_vectors(atoms, [item]) for item in (0, "never seen"))
    np.testing.assert_array_equal(known, unseen)
