"""A log small enough to learn in seconds, and a model for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bahe_models import (
    Artifact,
    BackboneConfig,
    BaheModel,
    Batches,
    DenseFeatures,
    Impressions,
    Int64,
    ModelConfig,
    Timelines,
    TrainingConfig,
    TrainingData,
    WindowConfig,
    build_model,
    item_id_rows,
    load_backbone,
    needed_columns,
    table_ids,
)

CPU = torch.device("cpu")


def toy_data(
    seed: int = 0, users: int = 40, items: int = 20, rows: int = 1500, train: int = 1000
) -> TrainingData:
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
    clock = np.random.default_rng([seed, 1])  # of its own, so that times move no other draw
    hours = [np.sort(clock.integers(0, 30, (users, 12)), axis=1) for _ in range(2)]
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
        atom_ids=np.arange(items) + 1000,
        timelines=Timelines(
            ("liked", "disliked"),
            offsets,
            tuple(np.concatenate(t) for t in timelines),
            tuple(h.ravel() * 3600 * 10**6 for h in hours),
        ),
        item_atom_I=np.arange(items),
        item_ids=tuple(range(items)),
        splits={
            "train": part(0, train),
            "validation": part(train, (train + rows) // 2),
            "test": part((train + rows) // 2, rows),
        },
    )


def at_moments(data: TrainingData) -> TrainingData:
    """The same impressions, each with the behaviors before some moment, as a frame has them."""
    lines, clock = data.timelines, np.random.default_rng(5)

    def part(split: Impressions) -> Impressions:
        moments = clock.integers(10, 31, len(split)) * 3600 * 10**6
        length = [
            [
                np.searchsorted(times[offset[user] : offset[user + 1]], moment)
                for times, offset in zip(lines.time_us, lines.offsets, strict=True)
            ]
            for user, moment in zip(split.user_N, moments, strict=True)
        ]
        return replace(split, length_NC=np.array(length))

    return replace(data, splits={name: part(split) for name, split in data.splits.items()})


def toy_config(**settings: Any) -> TrainingConfig:
    """Ten steps an epoch, three epochs."""
    return TrainingConfig(
        **{
            "epochs": 3,
            "impressions_per_step": 100,
            "learning_rate": 1e-2,
            "bfloat16": False,
            "checkpoint_seconds": 0,
            **settings,
        }
    )


def toy_batches(data: TrainingData, backbone: Path, *, known: Int64 | None = None, **model: Any) -> Batches:
    """A fresh small model with batches of the data; `known` items get an ID row beside those trained."""
    split = data.splits["train"]
    dense = DenseFeatures.fit(
        split.columns,
        split.length_NC,
        split.time_us_N,
        channels=data.timelines.channels,
        click_rate=0.5,
        numeric=data.numeric,
    )
    halves = load_backbone(BackboneConfig(path=str(backbone), shallow_layers=2, deep_layers=2))
    seen = split.item_N if known is None else np.union1d(split.item_N, known)
    rows = item_id_rows(seen, data.item_ids)
    config = replace(ModelConfig(deep_width=8, profile_width=8, head_width=16), **model)
    return Batches(
        build_model(halves.deep, data, dense, config, rows),
        data,
        dense,
        WindowConfig(),
        item_row_I=rows,
        device=CPU,
        bfloat16=False,
    )


def toy_artifact(batches: Batches) -> Artifact:
    """The batches' model with what is needed to use it."""
    deep: Any = batches.model.aggregator.deep
    return Artifact(
        model=batches.model,
        model_version="bahe-toy",
        encoder_version="enc-toy",
        deep_config={} if deep is None else deep.config.to_dict(),
        window=batches.window,
        dense=batches.dense,
        item_ids=table_ids(batches.item_row_I.numpy(), batches.data.item_ids),
        facts={},
        logit_shift=batches.logit_shift,
    )


def know_behaviors(model: BaheModel, atom_ids: Int64) -> None:
    """Give the collaborative part these behaviors, with embeddings as large as trained ones."""
    assert model.collaborative is not None
    model.collaborative.atom_ids_B.copy_(torch.from_numpy(atom_ids))
    for table in (model.collaborative.behavior, model.collaborative.item):
        torch.nn.init.normal_(table.weight[1:])
