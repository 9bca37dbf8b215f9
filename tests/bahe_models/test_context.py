"""Context columns: one hash everywhere, a start without them, learned, saved, and gone on from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import (
    Artifact,
    Batches,
    Impressions,
    ModelConfig,
    TrainingConfig,
    TrainingData,
    auc,
    load,
    train,
)
from bahe_models.baselines import train_din, train_id_only
from bahe_models.context import MISSING, ContextEmbedding, hash_context, hash_values
from bahe_models.trainer.ctr_training import fit_dense
from bahe_models.trainer.training_loop import seeded
from bahe_models.trainer.warm_start import start_from
from tests.support.toy import toy_artifact, toy_batches, toy_config, toy_data

COLUMNS = ("slot", "device")
SLOTS: tuple[str | None, ...] = ("top", "side", None)
RATES = np.array([0.9, 0.1, 0.5])

# Models know values by these hashes: they may never change.
GOLDEN = [1129918021492571374, -2571219601531375960]


def context_data(**size: int) -> tuple[TrainingData, dict[str, dict[str, list[object]]]]:
    """The toy log, clicked as the slot decides and nothing else; `device` says nothing. And the values."""
    data = toy_data(**size)
    rng = np.random.default_rng(1)
    values: dict[str, dict[str, list[object]]] = {}

    def part(name: str) -> Impressions:
        split = data.splits[name]
        slot = rng.integers(3, size=len(split))
        given: dict[str, list[object]] = {
            "slot": [SLOTS[s] for s in slot],
            "device": rng.integers(2, size=len(split)).tolist(),
        }
        values[name] = given
        return replace(
            split,
            clicked_N=(rng.random(len(split)) < RATES[slot]).astype(np.float32),
            context_NX=hash_context(COLUMNS, given, len(split)),
        )

    return replace(data, splits={name: part(name) for name in data.splits}, context=COLUMNS), values


@pytest.fixture(scope="module")
def trained(tiny_backbone: Path) -> tuple[Artifact, Batches]:
    with seeded(0):
        batches = toy_batches(context_data()[0], tiny_backbone)
        train(batches, toy_config())
    return toy_artifact(batches), batches


def score(artifact: Artifact, data: TrainingData, context: object) -> np.ndarray:
    split = data.splits["test"]
    user = artifact.user_vectors(
        torch.from_numpy(data.atoms_AD), data.atom_ids, data.timelines, split.user_N, split.length_NC
    )
    item = artifact.item_vectors(
        torch.from_numpy(data.atoms_AD[data.item_atom_I[split.item_N]]), split.item_N.tolist()
    )
    return artifact.score(
        user,
        item,
        split.columns,
        split.length_NC,
        split.time_us_N,
        context,  # type: ignore[arg-type]
    )


def test_hashes_never_change() -> None:
    assert hash_values("device", ["phone", "tablet"]).tolist() == GOLDEN
    # Of another process, whose own hash() is salted differently.
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "from bahe_models.context import hash_values as h;print(h('device', ['phone']).item())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) == GOLDEN[0]


@pytest.mark.parametrize(
    "same",
    [
        (None, "", "  ", float("nan"), np.float32("nan")),
        (13, 13.0, "13", " 13 ", np.int32(13), np.float64(13)),
        (True, "true", np.bool_(True)),
        (0.5, "0.5", np.float64(0.5)),
        ("Zürich", "Zürich ", np.str_("Zürich")),
    ],
)
def test_a_value_is_its_text(same: Sequence[object]) -> None:
    assert len(set(hash_values("column", same).tolist())) == 1
    assert (hash_values("column", same)[0] == MISSING) == (same[0] is None)


def test_values_and_columns_are_told_apart() -> None:
    hashed = np.concatenate([hash_values(c, ["a", "b", "A", 1, 1.5, True]) for c in ("x", "y")])
    assert len(set(hashed.tolist())) == 12


def test_each_column_has_rows_of_its_own() -> None:
    table = ContextEmbedding(COLUMNS, buckets=50, width=3, dropout=0.0)
    values = list(range(500))
    hashed = torch.from_numpy(hash_context(COLUMNS, {"slot": values, "device": values}, 500))
    hashed[:2] = MISSING
    rows = table.rows(hashed)
    assert table.weight.shape == (102, 3)
    assert (rows[:2] == torch.tensor([0, 51])).all()  # a row that no value shares
    for column, first in enumerate((1, 52)):
        assert set(rows[2:, column].tolist()) == set(range(first, first + 50))
    with torch.no_grad():
        table.weight[:, 0] = torch.arange(102)
    assert torch.equal(table(hashed)[:, [0, 3]], rows.float())


def test_hidden_values_are_missing_ones() -> None:
    table = ContextEmbedding(("slot",), buckets=50, width=1, dropout=0.3)
    with torch.no_grad():
        table.weight[0] = 1.0
    hashed = torch.from_numpy(hash_context(("slot",), {"slot": ["top"] * 2000}, 2000))
    with seeded(0):
        assert table.train()(hashed).mean().item() == pytest.approx(0.3, abs=0.05)
    assert not table.eval()(hashed).any()


@pytest.mark.parametrize("head", ["dnn", "dcn"])
def test_the_first_predictions_are_those_without_context(head: str, tiny_backbone: Path) -> None:
    data, _ = context_data()
    with seeded(0):
        batches = toy_batches(data, tiny_backbone, head=head)
    split = data.splits["test"]
    other = replace(split, context_NX=np.zeros_like(split.context_NX))
    np.testing.assert_array_equal(batches.predict(split), batches.predict(other))
    wide = batches.dense.floor(split.columns)
    assert np.corrcoef(batches.predict(split), wide)[0, 1] > 0.5
    assert np.abs(batches.predict(split) - wide).mean() < 0.5


@pytest.mark.parametrize("head", ["dnn", "dcn"])
def test_a_column_that_decides_the_click_is_learned(head: str, tiny_backbone: Path) -> None:
    data, _ = context_data()
    with seeded(0):
        batches = toy_batches(data, tiny_backbone, head=head)
        train(batches, toy_config())
    test = data.splits["test"]
    assert test.context_NX is not None
    assert auc(test.clicked_N, batches.dense.floor(test.columns)) < 0.6
    assert auc(test.clicked_N, batches.predict(test)) > 0.8
    # A missing value is one more value: its rate lies between those of the others.
    logits = batches.predict(test)
    slots = [test.context_NX[:, 0] == h for h in hash_values("slot", SLOTS)]
    top, side, missing = (logits[rows].mean() for rows in slots)
    assert top - 0.5 > missing > side + 0.5


def test_baselines_learn_it_too() -> None:
    data, _ = context_data(rows=2500, train=2000)
    test = data.splits["test"]
    config = TrainingConfig(learning_rate=3e-2)
    settings = ModelConfig(context_buckets=100, context_width=4)
    by_id, _ = train_id_only(data, config, model_config=settings)
    by_din, _ = train_din(data, fit_dense(data), config, model_config=settings)
    for baseline in (by_id, by_din):
        assert auc(test.clicked_N, baseline(test)) > 0.8


def test_a_saved_artifact_scores_as_the_model_did(
    trained: tuple[Artifact, Batches], tmp_path: Path
) -> None:
    artifact, batches = trained
    data, values = context_data()
    artifact.save(tmp_path / "bahe-toy")
    assert json.loads((tmp_path / "bahe-toy" / "config.json").read_text())["context"] == list(COLUMNS)
    loaded = load(tmp_path / "bahe-toy")
    assert loaded.context_columns == COLUMNS
    scores = score(loaded, data, values["test"])
    np.testing.assert_allclose(
        np.log(scores / (1 - scores)), batches.predict(data.splits["test"]), atol=1e-4
    )
    np.testing.assert_array_equal(score(loaded, data, data.splits["test"].context_NX), scores)
    unknown: dict[str, list[object]] = {"slot": [None] * len(scores), "device": [None] * len(scores)}
    assert np.abs(score(loaded, data, unknown) - scores).max() > 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("slot"), "context column slot is missing"),
        (lambda v: v.update(hour=v["slot"]), "hour is not a context column .* slot, device"),
        (lambda v: v.update(slot=["top"]), "context column slot has 1 values, not 250"),
        (lambda v: v.update(slot=[["top"]] * 250), "context column slot has a value of type list"),
    ],
)
def test_context_that_does_not_fit_is_refused(
    change: object, words: str, trained: tuple[Artifact, Batches]
) -> None:
    data, values = context_data()
    change(values["test"])  # type: ignore[operator]
    with pytest.raises(BadInput, match=words):
        score(trained[0], data, values["test"])
    with pytest.raises(BadInput, match="context column slot is missing"):
        score(trained[0], data, None)
    with pytest.raises(BadInput, match=r"shape \[250, 1\], not \[250, 2\]"):
        score(trained[0], data, data.splits["test"].item_N[:, None])


def test_without_context_a_model_is_what_it_was(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    batches = toy_batches(data, tiny_backbone)
    assert not [name for name in batches.model.state_dict() if "context" in name]
    artifact = toy_artifact(batches)
    artifact.save(tmp_path / "bahe-toy")
    # As it was written before there was context.
    path = tmp_path / "bahe-toy" / "config.json"
    config = json.loads(path.read_text())
    del config["context"]
    config["model"] = {k: v for k, v in config["model"].items() if not k.startswith("context_")}
    path.write_text(json.dumps(config))
    loaded = load(tmp_path / "bahe-toy")
    np.testing.assert_array_equal(score(loaded, data, None), score(artifact, data, {}))
    with pytest.raises(BadInput, match="the model has none"):
        score(loaded, data, {"device": ["phone"] * 250})


def test_a_warm_start_keeps_what_was_learned(
    trained: tuple[Artifact, Batches], tiny_backbone: Path
) -> None:
    artifact, before = trained
    data, _ = context_data()
    test = data.splits["test"]
    with seeded(1):
        batches = toy_batches(data, tiny_backbone)
        start_from(artifact, batches, encoder_version="enc-toy")
    np.testing.assert_allclose(batches.predict(test), before.predict(test), atol=1e-5)
    for other, words in (
        (toy_batches(toy_data(), tiny_backbone), "context columns slot, device, not none"),
        (toy_batches(data, tiny_backbone, context_buckets=7), r"model\.context_buckets 16384, not 7"),
        (toy_batches(data, tiny_backbone, context_width=3), r"model\.context_width 8, not 3"),
    ):
        with pytest.raises(BadInput, match=words):
            start_from(artifact, other, encoder_version="enc-toy")


def test_wrong_settings_and_frames_are_refused() -> None:
    for setting in ({"context_buckets": 0}, {"context_width": 0}, {"context_dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            ModelConfig(**setting)  # type: ignore[arg-type]
    data, _ = context_data()
    with pytest.raises(BadInput, match="0 context columns, not 2"):
        replace(data, splits=toy_data().splits).check()
