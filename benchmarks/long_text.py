"""BAHE's ranking beside that of the long-text LLM it replaces, on a sample that both can afford.

Both train the same deep layers with the same head, statistics, optimiser, steps and early stopping on
random whole users. The peer reads 2,048 tokens of history in its packed form, one pass per user; BAHE reads
the same behaviors as atoms. `--quick` takes a smaller sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bahe_core.home import Home
from bahe_core.progress import progress
from benchmarks.ablation import without_profile
from benchmarks.harness import Row, main
from benchmarks.training_steps import (
    LONGEST,
    Scene,
    bahe_batches,
    long_text,
    long_text_step,
    planned,
    read_scene,
)

if TYPE_CHECKING:
    from bahe_models import TrainingConfig, TrainingData

Scores = npt.NDArray[np.float64]
Contender = Callable[[Scene, "TrainingConfig"], tuple[Scores, float]]
"""Trains on a scene; returns logits of its test split, and the seconds of all that."""

EPOCHS = 3
IMPRESSIONS_PER_STEP = 200


def sampled(data: TrainingData, count: int) -> TrainingData:
    """A sample of whole users, which the packed form needs: `count` training impressions or slightly more,
    and half as many in the later splits."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, split in data.splits.items():
        users = rng.permutation(np.unique(split.user_N))
        sizes = np.bincount(split.user_N)[users]
        target = count if name == "train" else count // 2
        taken = users[: int(np.searchsorted(np.cumsum(sizes), target)) + 1]
        splits[name] = split.take(np.flatnonzero(np.isin(split.user_N, taken)))
    return replace(data, splits=splits)


def bahe(scene: Scene, config: TrainingConfig, *, alone: bool = False) -> tuple[Scores, float]:
    """BAHE; with `alone` only its deep layers, without profile and collaborative part."""
    from bahe_models import seeded, train

    with seeded(config.seed):
        batches = bahe_batches(scene, **({"behavior_ids": False} if alone else {}))
        if alone:
            without_profile(batches.model)
        start = time.perf_counter()
        train(batches, config)
    return batches.predict(scene.data.splits["test"]), time.perf_counter() - start


def text(scene: Scene, config: TrainingConfig) -> tuple[Scores, float]:
    """The long-text LLM in its packed form."""
    import torch

    from bahe_models import auc, seeded
    from bahe_models.trainer.training_loop import Task, fit

    splits = scene.data.splits
    train, validation = splits["train"], splits["validation"]
    with seeded(config.seed):
        model = long_text(scene, "sdpa")
        steps = {
            name: long_text_step(model, scene, LONGEST, packed=True, split_name=name) for name in splits
        }

        @torch.inference_mode()
        def score(name: str) -> Scores:
            model.eval()
            scores = np.zeros(len(splits[name]))
            for rows in planned(scene, np.arange(len(scores)), IMPRESSIONS_PER_STEP, split_name=name):
                scores[rows] = steps[name](rows).numpy()
            return scores

        whole_users = planned(scene, np.arange(len(train)), IMPRESSIONS_PER_STEP)
        layers = model.head.aggregator.deep
        assert layers is not None
        deep = list(layers.parameters())
        in_deep = set(map(id, deep))
        rest = [p for p in model.head.parameters() if id(p) not in in_deep]
        start = time.perf_counter()
        with progress("long text", config.epochs * len(train)) as advance:
            fit(
                Task(
                    model=model,
                    groups=[(deep, config.deep_learning_rate), (rest, config.learning_rate)],
                    plan=lambda rng: [whole_users[i] for i in rng.permutation(len(whole_users))],
                    logits=steps["train"],
                    user_N=train.user_N,
                    clicked_N=torch.from_numpy(train.clicked_N),
                    validate=lambda: auc(validation.clicked_N, score("validation")),
                ),
                config,
                on_step=lambda n, loss: advance(n, note=f"loss {loss:.4f}"),
            )
        return score("test"), time.perf_counter() - start


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Test AUC of each on the same sample, and what training cost."""
    from bahe_models import evaluate, fit_dense, item_id_rows

    whole = read_scene(Home.at(home_path))
    data = sampled(whole.data, 1000 if quick else 8000)
    # Whatever is fitted on training data is fitted on the sample alone.
    scene = replace(
        whole,
        data=data,
        dense=fit_dense(data),
        item_row_I=item_id_rows(data.splits["train"].item_N, data.item_ids),
    )
    config = replace(scene.settings.training, epochs=EPOCHS, impressions_per_step=IMPRESSIONS_PER_STEP)
    contenders: dict[str, Contender] = {
        "bahe": bahe,
        "bahe, deep layers alone": lambda scene, config: bahe(scene, config, alone=True),
        "long text": text,
    }
    test = data.splits["test"]
    scores: dict[str, Scores] = {"floor": scene.dense.floor(test.columns)}
    seconds: dict[str, float] = {}
    for name, contender in contenders.items():
        scores[name], seconds[name] = contender(scene, config)
    quality = evaluate(test, scores).quality
    theirs = quality["long text"]
    for name in ("floor", "bahe, deep layers alone", "bahe"):
        ours = quality[name].auc
        goal = name == "bahe"
        yield Row(
            metric=f"test AUC of {name}, {len(data.splits['train']):,} training impressions",
            value=ours,
            unit=f"on {len(test):,}",
            peer=f"long text, {LONGEST:,} tokens",
            peer_value=theirs.auc,
            goal="not lower" if goal else None,
            holds=ours >= theirs.auc if goal else None,
        )
    yield Row(
        metric="gain of BAHE over long text, test AUC",
        value=theirs.bahe_gain or 0.0,
        unit=f"95 % from {theirs.bahe_gain_low:.4f} to {theirs.bahe_gain_high:.4f}",
    )
    for name in ("bahe, deep layers alone", "bahe"):
        yield Row(
            metric=f"training, validating and scoring the test split, {name}",
            value=seconds[name],
            unit="s",
            peer="long text packed",
            peer_value=seconds["long text"],
        )


if __name__ == "__main__":
    main("long_text", __doc__ or "", measure)
