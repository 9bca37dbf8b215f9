"""The models that `compare` trains beside each other on one frame: BAHE, variants of it, and its peers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from bahe_core.errors import BadInput, clipped
from bahe_core.progress import progress
from bahe_models import (
    BackboneConfig,
    Checkpoint,
    DenseFeatures,
    Impressions,
    TrainingData,
    baselines,
    load_backbone,
)
from bahe_models.baselines.gradient_boosting import SETTINGS
from bahe_models.trainer.ctr_training import Scores, refuse_deep
from materialize.config.dataset import Dataset
from materialize.config.problems import problems_of
from materialize.training import tracking
from materialize.training.train_with_baselines import EVALUATED, Settings, fit_bahe

BAHE = "bahe"
WITH_DEEP, WITHOUT_DEEP = "bahe-deep", "bahe-no-deep"
TITLES = {
    "floor": "Floor",
    "id-only": "ID-only network",
    "din": "DIN",
    "gradient-boosting": "Gradient boosting",
    WITHOUT_DEEP: "BAHE without deep layers",
    WITH_DEEP: "BAHE with deep layers",
    BAHE: "BAHE",
}
"""The models by name, as tables and plots call them."""
SECTIONS = ("model", "window", "training")
"""Sections of dataset.yaml that a variant may change: the frame and the vectors stay the same."""


@dataclass(frozen=True)
class Scene:
    """What every contender starts from."""

    data: TrainingData
    dense: DenseFeatures
    backbone: BackboneConfig
    encoder: str
    """The encoder_version of the atoms' vectors."""
    device: torch.device


@dataclass(frozen=True)
class Fit:
    """A trained contender's click logits of each of `EVALUATED`, and the seconds that it took: choosing the
    epoch, or among settings, included."""

    logits: Mapping[str, Scores]
    seconds: float


@dataclass(frozen=True)
class Contender:
    """One model of a comparison, whatever the seed."""

    name: str
    title: str
    settings: Settings
    """Of BAHE's variants all, of the peers the step size, weight decay, seed and width of context."""

    @property
    def is_bahe(self) -> bool:
        """Whether it is BAHE or a variant of it."""
        return self.name not in ("floor", "id-only", "din", "gradient-boosting")

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another model."""
        return self.name not in ("floor", "gradient-boosting")

    def with_seed(self, seed: int) -> Contender:
        """The same, trained with another seed."""
        training = replace(self.settings.training, seed=seed)
        return replace(self, settings=replace(self.settings, training=training))

    def identity(self, backbone: BackboneConfig) -> list[object]:
        """What its logits depend on, beside the frame and the vectors."""
        model, training = self.settings.model, self.settings.training
        if self.is_bahe:
            return [BAHE, backbone.deep_layers, *self.settings.fields_affecting_weights()]
        shape = [model.context_buckets, model.context_width, model.context_dropout]
        random = [training.seed, training.learning_rate, training.weight_decay, *shape]
        return [self.name, *(random if self.is_random else ())]

    def train(self, scene: Scene, checkpoint: Checkpoint) -> Fit:
        """Train it; what was killed goes on from the checkpoint, where the model has one."""
        if self.is_bahe:
            return self._bahe(scene, checkpoint)
        start = time.perf_counter()
        score = self._peer(scene)
        seconds = time.perf_counter() - start
        return Fit({name: score(scene.data.splits[name]) for name in EVALUATED}, seconds)

    def _bahe(self, scene: Scene, checkpoint: Checkpoint) -> Fit:
        halves = load_backbone(scene.backbone)  # training changes the deep layers
        start = time.perf_counter()
        fitted = fit_bahe(
            scene.data,
            halves,
            self.settings,
            scene.device,
            scene.encoder,
            checkpoint.identity,
            tracking.Log(),
            checkpoint=checkpoint,
        )
        # The former is more where the training was resumed.
        seconds = max(fitted.trained.seconds, time.perf_counter() - start)
        logits = {name: fitted.batches.predict(scene.data.splits[name]) for name in EVALUATED}
        return Fit(logits, seconds)

    def _peer(self, scene: Scene) -> Callable[[Impressions], Scores]:
        data, dense, settings = scene.data, scene.dense, self.settings
        if self.name == "floor":
            return lambda part: baselines.floor_scores(dense, part)
        if self.name == "gradient-boosting":
            with progress(f"training {self.title}", SETTINGS) as advance:
                return baselines.train_gradient_boosting(
                    data, dense, on_fit=lambda auc: advance(1, note=f"validation AUC {auc:.4f}")
                )
        train: Any = (
            baselines.train_id_only if self.name == "id-only" else partial(baselines.train_din, dense=dense)
        )
        with progress(f"training {self.title}", None) as advance:
            score, _ = train(
                data,
                config=settings.training,
                model_config=settings.model,
                on_epoch=lambda e: advance(1, note=f"validation AUC {e.validation_auc:.4f}"),
            )
        return score  # type: ignore[no-any-return]


def contenders(
    dataset: Dataset, names: Sequence[str] | None, variants: Sequence[str] = ()
) -> list[Contender]:
    """The models of these names (all that differ when None), then BAHE with each variant's settings.

    A variant is written `model.deep=true training.epochs=6`. Raises BadInput on an unknown name, on
    settings that dataset.yaml or a training would refuse, and where two are the same model.
    """
    configured = WITH_DEEP if dataset.model.deep else WITHOUT_DEEP
    chosen = [name for name in TITLES if name != configured] if names is None else list(names)
    unknown = [name for name in chosen if name not in TITLES]
    if unknown:
        raise BadInput(f"model {clipped(unknown[0])} is not known; choose from {', '.join(TITLES)}.")
    found = []
    for name in dict.fromkeys(chosen):
        deep = {WITH_DEEP: True, WITHOUT_DEEP: False}.get(name, dataset.model.deep)
        training = dataset.training if deep else replace(dataset.training, pretraining_epochs=0)
        model = replace(dataset.model, deep=deep)
        settings = Settings.of(dataset.model_copy(update={"model": model, "training": training}))
        found.append(Contender(name, TITLES[name], settings))
    for variant in dict.fromkeys(variants):
        found.append(Contender(variant, f"BAHE, {variant}", Settings.of(_changed(dataset, variant))))
    if not found:
        raise BadInput(f"there is no model to compare; choose from {', '.join(TITLES)}.")
    for place, one in enumerate(found):
        if not one.is_bahe:
            continue
        if not one.settings.model.deep:
            refuse_deep(one.settings.training)
        same = next(
            (other for other in found[:place] if other.settings == one.settings and other.is_bahe), None
        )
        if same is not None:
            raise BadInput(f"{same.name} and {one.name} are the same model here; leave one out.")
    return found


def _changed(dataset: Dataset, variant: str) -> Dataset:
    """The dataset with a variant's settings."""
    raw = dataset.model_dump(mode="json") | {
        section: asdict(getattr(dataset, section)) for section in SECTIONS
    }
    for setting in re.split(rf"\s+(?=(?:{'|'.join(SECTIONS)})\.)", variant.strip()):
        path, equals, value = setting.partition("=")
        section, _, field = path.strip().partition(".")
        if (section, field) == ("training", "seed"):
            raise BadInput(
                f"variant {clipped(variant)} is refused: `--seeds` says how many seeds there are."
            )
        if not equals or not field or section not in SECTIONS:
            raise BadInput(
                f"variant {clipped(variant)} is refused: write SECTION.FIELD=VALUE, as model.deep=true,"
                f" with a section of {', '.join(SECTIONS)}."
            )
        try:
            raw[section][field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise BadInput(
                f"variant {clipped(variant)} is refused: {clipped(value)} is not YAML."
            ) from None
    try:
        return Dataset.model_validate(raw)
    except ValidationError:
        sentences = [problem.sentence for problem in problems_of(Dataset, raw, {})]
        raise BadInput(f"variant {clipped(variant)} is refused: {'; '.join(sentences)}.") from None
