"""Permutation importance: what is used is missed, what is not is not, and what is suspicious is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_models import Batches, train
from bahe_models.trainer.importance import DEEP, HISTORY, ITEM, permutation_importance
from tests.support.toy import toy_batches, toy_config, toy_data

USED, UNUSED, CLICKS, EMPTY, CONSTANT = (
    "shop:used",
    "shop:unused",
    "leak:clicks",
    "shop:empty",
    "shop:constant",
)


@pytest.fixture(scope="module")
def batches(tiny_backbone: Path) -> Batches:
    """A model whose head reads one of several further features, and nothing else."""
    data = toy_data()
    rng = np.random.default_rng(0)
    splits = {}
    for name, split in data.splits.items():
        count = len(split)
        columns = {
            "used": split.clicked_N + rng.normal(size=count),
            "unused": rng.normal(size=count),
            "clicks": split.clicked_N * 2.0,
            "empty": np.full(count, np.nan),
            "constant": np.full(count, 3.0),
        }
        splits[name] = replace(split, columns={**split.columns, **columns})
    data = replace(data, splits=splits, numeric=(USED, UNUSED, CLICKS, EMPTY, CONSTANT))
    made = toy_batches(data, tiny_backbone)
    place = made.dense.names.index("log_used")
    with torch.no_grad():
        for parameter in made.model.head.parameters():
            parameter.zero_()
        made.model.head.wide.weight[0, place] = 2.0
    return made


def test_what_the_model_reads_is_missed(batches: Batches) -> None:
    split = batches.data.splits["validation"]
    found = permutation_importance(batches, split)
    by_name = {one.name: one for one in found}
    assert found[0].name == USED
    assert by_name[USED].auc_lost > 0.1
    assert by_name[UNUSED].auc_lost == pytest.approx(0, abs=0.03)
    assert {HISTORY, ITEM, "user_stats:user_click_rate"} <= set(by_name)
    assert by_name["shop"].features == 4
    assert by_name["shop"].auc_lost == pytest.approx(by_name[USED].auc_lost, abs=0.1)


def test_what_is_suspicious_is_named(batches: Batches) -> None:
    found = permutation_importance(batches, batches.data.splits["validation"])
    warnings = {one.name: one.warning for one in found if one.warning is not None}
    assert warnings.pop(CLICKS) == "ranks clicks alone with AUC 1.000: does it know them?"
    assert warnings.pop(EMPTY) == "has no value at all"
    assert warnings.pop(CONSTANT) == "is constant"
    assert {name.partition(":")[0] for name in warnings} <= {"user_stats", "item_stats"}


def test_the_deep_part_of_a_history_is_told_apart(tiny_backbone: Path) -> None:
    """Of two models one reads only the deep part of the user vector, one only its sums."""
    found = {}
    for part in ("deep", "sums"):
        made = toy_batches(toy_data(), tiny_backbone)
        train(made, toy_config())
        width, head = made.model.config.deep_width, made.model.head
        with torch.no_grad():
            if part == "deep":
                head.wide.weight[0, len(made.dense.names) :] = 0  # the inner products of the sums
            else:
                first = head.hidden[0]
                assert isinstance(first, torch.nn.Linear)
                first.weight[:, :width] = 0
                first.weight[:, 2 * width : 3 * width] = 0
        rows = permutation_importance(made, made.data.splits["validation"])
        found[part] = {one.name: one.auc_lost for one in rows}
    assert found["sums"][DEEP] == pytest.approx(0, abs=1e-12)
    assert found["sums"][HISTORY] > 0.01
    assert found["deep"][DEEP] != 0
    without = toy_batches(toy_data(), tiny_backbone, deep=False)
    assert DEEP not in {one.name for one in permutation_importance(without, without.data.splits["test"])}
