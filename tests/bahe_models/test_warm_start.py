"""A model that starts from yesterday's predicts what yesterday's did, and keeps what it knew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import Artifact, Batches, TrainingData, auc, train
from bahe_models.trainer.training_loop import seeded
from bahe_models.trainer.warm_start import known_items, start_from
from tests.support.toy import toy_artifact, toy_batches, toy_config, toy_data


@pytest.fixture(scope="module")
def yesterday(tiny_backbone: Path) -> tuple[Artifact, Batches]:
    config = toy_config(negative_rate=0.5)
    with seeded(0):
        batches = toy_batches(toy_data(), tiny_backbone)
        train(batches, config)
    return toy_artifact(batches), batches


def tomorrow() -> TrainingData:
    """Two items are new and come first, so every row of the tables moves; one is shown no more."""
    data = toy_data()

    def moved(name: str) -> object:
        part = data.splits[name]
        item = part.item_N + 2
        if name == "train":
            item[item == 7] = 8  # id 5 is shown no more
            item[:40] = np.arange(40) % 2
        return replace(part, item_N=item)

    return replace(
        data,
        item_ids=(101, 102, *data.item_ids),
        item_atom_I=np.concatenate([[0, 1], data.item_atom_I]),
        splits={name: moved(name) for name in data.splits},  # type: ignore[misc]
    )


def test_it_starts_where_the_artifact_ended(
    yesterday: tuple[Artifact, Batches], tiny_backbone: Path
) -> None:
    artifact, before = yesterday
    data = tomorrow()
    test = data.splits["test"]
    with seeded(1):
        batches = toy_batches(data, tiny_backbone, known=known_items(artifact, data.item_ids))
        cold = auc(test.clicked_N, batches.predict(test))
        start_from(artifact, batches, encoder_version="enc-toy")
        reached = batches.predict(test)
        expected = before.predict(before.data.splits["test"])
        np.testing.assert_allclose(reached, expected, atol=1e-5)
        assert auc(test.clicked_N, reached) == auc(test.clicked_N, expected)
        assert auc(test.clicked_N, reached) > cold + 0.1

        ids = toy_artifact(batches).item_ids
        table = batches.model.item_id.weight.detach()
        old = artifact.model.item_id.weight.detach()
        for item in (101, 102):
            assert not table[1 + ids.index(item)].any(), "a new item starts at zero"
        for item in (0, 5, 19):
            assert torch.equal(table[1 + ids.index(item)], old[1 + artifact.item_ids.index(item)])

        # Another sampling than yesterday's moves the model's own logits, never the predictions.
        still = toy_config(epochs=1, learning_rate=1e-9, deep_learning_rate=1e-9, negative_rate=0.8)
        train(batches, still)
        np.testing.assert_allclose(batches.predict(test), expected, atol=1e-4)


def test_what_does_not_fit_is_refused(yesterday: tuple[Artifact, Batches], tiny_backbone: Path) -> None:
    artifact, _ = yesterday
    data = toy_data()
    with pytest.raises(BadInput, match=r"enc-toy.*enc-other"):
        start_from(artifact, toy_batches(data, tiny_backbone), encoder_version="enc-other")
    lines = data.timelines
    renamed = replace(data, timelines=replace(lines, channels=("bought", "searched")))
    with pytest.raises(BadInput, match="liked, disliked, not bought, searched"):
        start_from(artifact, toy_batches(renamed, tiny_backbone), encoder_version="enc-toy")
    with pytest.raises(BadInput, match=r"model\.head_width 16, not 32"):
        start_from(artifact, toy_batches(data, tiny_backbone, head_width=32), encoder_version="enc-toy")
    with pytest.raises(BadInput, match=r"model\.head dnn, not target"):
        start_from(artifact, toy_batches(data, tiny_backbone, head="target"), encoder_version="enc-toy")
    with pytest.raises(BadInput, match=r"model\.channels parallel, not merged"):
        start_from(artifact, toy_batches(data, tiny_backbone, channels="merged"), encoder_version="enc-toy")
    crossed = toy_artifact(toy_batches(data, tiny_backbone, head="dcn", cross_layers=1))
    more = toy_batches(data, tiny_backbone, head="dcn", cross_layers=2)
    with pytest.raises(BadInput, match=r"model\.cross_layers 1, not 2"):
        start_from(crossed, more, encoder_version="enc-toy")
    timed = toy_artifact(toy_batches(data, tiny_backbone, time_gaps=True))
    with pytest.raises(BadInput, match=r"set model\.time_gaps to true"):
        start_from(timed, toy_batches(data, tiny_backbone), encoder_version="enc-toy")


@pytest.mark.parametrize("theirs", [{}, {"time_gaps": True}])
def test_time_gaps_may_join_and_are_kept(theirs: dict[str, bool], tiny_backbone: Path) -> None:
    data = toy_data()
    before = toy_batches(data, tiny_backbone, **theirs)
    if before.model.behaviors.gap_GD is not None:
        torch.nn.init.normal_(before.model.behaviors.gap_GD)
    batches = toy_batches(data, tiny_backbone, time_gaps=True)
    start_from(toy_artifact(before), batches, encoder_version="enc-toy")
    test = data.splits["test"]
    np.testing.assert_allclose(batches.predict(test), before.predict(test), atol=1e-5)
