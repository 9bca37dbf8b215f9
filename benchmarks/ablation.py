"""What each part of the model is worth: validation AUC without it, or with another choice in its place.

Every row is the default model with one change, trained on the same frame. The test split is not used. The
default's range over three seeds shows how much of a difference is chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from bahe_core.home import Home
from bahe_core.progress import progress
from benchmarks.harness import Row, main

if TYPE_CHECKING:
    from bahe_models import Backbone, BackboneConfig, BaheModel, EncoderConfig, TrainingData
    from materialize.training.train_with_baselines import Settings


DEFAULT = "the default"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change to the default."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    data: Callable[[TrainingData], TrainingData] = lambda data: data
    built: Callable[[BaheModel], None] = lambda model: None
    quick: bool = False
    """Whether `--quick` measures it too: only what trains in seconds."""


def without_statistics(data: TrainingData) -> TrainingData:
    """Every statistic unknown; the lengths of the timelines stay."""
    splits = {
        name: replace(split, columns={c: np.full(len(split), np.nan) for c in split.columns})
        for name, split in data.splits.items()
    }
    return replace(data, splits=splits)


def with_fresh_deep_layers(model: BaheModel) -> None:
    """Deep layers of the same shape with random weights."""
    from bahe_models.backbone import deep_from_config

    deep: Any = model.aggregator.deep
    model.aggregator.deep = deep_from_config(deep.config.to_dict())


def without_profile(model: BaheModel) -> None:
    """A profile part that stays zero."""
    for parameter in model.profile.parameters():
        parameter.data.zero_()
        parameter.requires_grad_(False)


def variants() -> list[Variant]:
    """The default first."""
    no_ids = {"behavior_ids": False, "item_ids": False}
    return [
        Variant(name=DEFAULT),
        Variant(name="without deep layers", model={"deep": False}, quick=True),
        Variant(
            name="without deep layers and behavior IDs",
            model={"deep": False, "behavior_ids": False},
            quick=True,
        ),
        Variant(name="without deep layers and any IDs", model={"deep": False, **no_ids}, quick=True),
        Variant(name="without statistics", data=without_statistics),
        Variant(name="without behavior IDs", model={"behavior_ids": False}),
        Variant(name="without item IDs", model={"item_ids": False}),
        Variant(name="without profile", built=without_profile),
        Variant(name="without profile and any IDs", model=no_ids, built=without_profile),
        Variant(name="without dropout", model={"dropout": 0.0, "item_id_dropout": 0.0}),
        Variant(name="deep layers frozen", training={"deep_learning_rate": 0.0}),
        Variant(name="deep layers fresh, not from the language model", built=with_fresh_deep_layers),
        Variant(name="next-atom pre-training, 2 passes", training={"pretraining_epochs": 2}),
        Variant(name="4 shallow layers", backbone={"shallow_layers": 4}),
        Variant(name="16 shallow layers", backbone={"shallow_layers": 16}),
        Variant(name="4 deep layers", backbone={"deep_layers": 4}),
        Variant(name="head dcn", model={"head": "dcn"}),
        Variant(name="head target", model={"head": "target"}),
        Variant(name="channels merged", model={"channels": "merged"}),
        Variant(name="time gaps", model={"time_gaps": True}),
    ]


@dataclass(frozen=True)
class Scene:
    """What every variant starts from."""

    data: TrainingData
    settings: Settings
    backbone: BackboneConfig
    encoder: EncoderConfig
    texts: list[str]
    """Text of each atom, in the order of the vectors."""
    channels: list[str]
    """Channel of each atom, likewise."""


def read_scene(home: Home) -> Scene:
    """Training data and texts of a home filled by `bahe demo`."""
    from bahe_lake.connection import lake
    from materialize.config.backbone import encoder_settings
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training.train_with_baselines import Settings
    from materialize.training.training_data import read_training_data
    from materialize.vectors.stored_atoms import current_encoder

    dataset = home_dataset(home)
    with lake(home) as connection:
        version = current_encoder(connection, home)
        data = read_training_data(connection, latest_frame(home), version, dataset.channels)
        atoms = connection.execute("SELECT atom_id, channel, text FROM atoms").to_arrow_table()
    place = {atom_id: row for row, atom_id in enumerate(atoms["atom_id"].to_pylist())}
    order = [place[atom_id] for atom_id in data.atom_ids.tolist()]
    taken = atoms.take(order)
    return Scene(
        data,
        Settings.of(dataset),
        *encoder_settings(dataset),
        taken["text"].to_pylist(),
        taken["channel"].to_pylist(),
    )


class Encodings:
    """Halves of the backbone and atom vectors for each cut, computed once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._vectors = {scene.backbone.shallow_layers: scene.data.atoms_AD}

    def cut(self, change: dict[str, Any]) -> tuple[Backbone, np.ndarray]:
        """Freshly loaded halves, and the atom vectors that they give."""
        from bahe_models import AtomicEncoder, load_backbone

        config = replace(self.scene.backbone, **change)
        halves = load_backbone(config)
        if config.shallow_layers not in self._vectors:
            encoder = AtomicEncoder(halves, self.scene.encoder)
            self._vectors[config.shallow_layers] = encoder.encode(self.scene.channels, self.scene.texts)
        return halves, self._vectors[config.shallow_layers]


def validation_auc(scene: Scene, encodings: Encodings, variant: Variant, seed: int) -> float:
    """Validation AUC of the best epoch, which early stopping keeps."""
    import torch

    from bahe_models import Batches, build_model, fit_dense, item_id_rows, seeded, train
    from bahe_models.trainer.ctr_training import precision

    halves, vectors = encodings.cut(variant.backbone)
    data = variant.data(replace(scene.data, atoms_AD=vectors))
    config = replace(scene.settings.training, **variant.training, seed=seed)
    item_row_I = item_id_rows(data.splits["train"].item_N, data.item_ids)
    dense, cpu = fit_dense(data), torch.device("cpu")
    with seeded(seed):
        model = build_model(
            halves.deep, data, dense, replace(scene.settings.model, **variant.model), item_row_I
        )
        variant.built(model)
        batches = Batches(
            model,
            data,
            dense,
            scene.settings.window,
            item_row_I=item_row_I,
            device=cpu,
            bfloat16=precision(config, cpu),
        )
        trained = train(batches, config)
    return max(row.validation_auc for row in trained.history)


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """One seed of every variant, three of the default; `quick`: only those without deep layers."""
    scene = read_scene(Home.at(home_path))
    encodings = Encodings(scene)
    planned = [
        (variant, seed)
        for variant in variants()
        if variant.quick or not quick
        for seed in range(3 if variant.name == DEFAULT else 1)
    ]
    aucs: dict[str, list[float]] = {}
    with progress("ablation", len(planned)) as advance:
        for variant, seed in planned:
            auc = validation_auc(scene, encodings, variant, seed)
            aucs.setdefault(variant.name, []).append(auc)
            advance(1, note=f"{variant.name}: {auc:.4f}")
    for name, values in aucs.items():
        reference = None if name == DEFAULT or quick else mean(aucs[DEFAULT])
        yield Row(
            metric=f"validation AUC, {name}",
            value=mean(values),
            unit=f"{len(values)} seeds, {min(values):.4f} to {max(values):.4f}"
            if len(values) > 1
            else "one seed",
            peer=None if reference is None else DEFAULT,
            peer_value=reference,
        )


if __name__ == "__main__":
    main("ablation", __doc__ or "", measure)
