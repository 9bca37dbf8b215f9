"""A model without deep layers is one that can be trained, saved, served and grown like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models import UserState, auc, load, train
from bahe_models.trainer.saved_model import logits_of
from bahe_models.trainer.training_loop import seeded
from bahe_models.trainer.warm_start import start_from
from tests.support.toy import toy_artifact, toy_batches, toy_config, toy_data


def test_it_learns_is_saved_and_grows(tiny_backbone: Path, tmp_path: Path) -> None:
    data = toy_data()
    with seeded(0):
        batches = toy_batches(data, tiny_backbone, deep=False)
        assert not [name for name, _ in batches.model.named_parameters() if "aggregator.deep" in name]
        train(batches, toy_config(recompute=True))
    test = data.splits["test"]
    assert auc(test.clicked_N, batches.predict(test)) > 0.6

    toy_artifact(batches).save(tmp_path / "model")
    artifact = load(tmp_path / "model")
    np.testing.assert_allclose(
        logits_of(artifact, data, test, torch.device("cpu")), batches.predict(test), atol=1e-4
    )

    atoms, lines = torch.from_numpy(data.atoms_AD), data.timelines
    lengths = lines.lengths()[:1]
    vector = artifact.user_vectors(atoms, data.atom_ids, lines, np.array([0]), lengths)[0]
    rows = [part[: offset[1]] for part, offset in zip(lines.atoms, lines.offsets, strict=True)]
    times = [part[: offset[1]] for part, offset in zip(lines.time_us, lines.offsets, strict=True)]
    state = UserState(
        artifact.model,
        artifact.window,
        [atoms[rows[0]], atoms[rows[1][:-1]]],
        [times[0], times[1][:-1]],
        [data.atom_ids[rows[0]], data.atom_ids[rows[1][:-1]]],
    )
    state.append(1, atoms[rows[1][-1]], int(times[1][-1]), int(data.atom_ids[rows[1][-1]]))
    np.testing.assert_allclose(state.vector().numpy(), vector, atol=1e-5)


def test_what_is_of_the_deep_layers_is_refused(tiny_backbone: Path) -> None:
    data = toy_data()
    batches = toy_batches(data, tiny_backbone, deep=False)
    with pytest.raises(BadInput, match="pretraining_epochs is of the deep layers"):
        train(batches, toy_config(pretraining_epochs=1))
    deep = toy_batches(data, tiny_backbone)
    with pytest.raises(BadInput, match=r"has model\.deep True, not False"):
        start_from(toy_artifact(deep), batches, encoder_version="enc-toy")
