from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bahe_models import auc, fit_dense
from bahe_models.baselines import gradient_boosting, train_gradient_boosting
from bahe_models.baselines.gradient_boosting import SETTINGS, _facts, _Texts
from tests.support.toy import toy_data


def test_likeness_of_texts_is_what_the_toy_log_can_be_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_boosting, "ROUNDS", 30)
    fits: list[float] = []
    data = toy_data()
    score = train_gradient_boosting(data, fit_dense(data), on_fit=fits.append)
    validation = data.splits["validation"]
    assert len(fits) == SETTINGS
    assert auc(validation.clicked_N, score(validation)) == pytest.approx(max(fits))
    assert max(fits[2:]) > max(fits[:2]) + 0.1  # the last two were offered the texts


def test_cosines_and_components_are_those_of_the_behaviors_before_the_impression() -> None:
    data = toy_data()
    train = data.splits["train"].take(np.arange(50))
    lengths = train.length_NC.copy()
    lengths[0] = 0  # who has done nothing yet
    lengths[1, 0] = 0
    train = replace(train, length_NC=lengths)
    texts = _Texts(data)
    found_NF = texts.columns(train)

    atoms_AD = (data.atoms_AD - texts._mean) / texts._deviation
    for row in range(50):
        candidate = atoms_AD[data.item_atom_I[train.item_N[row]]]
        every = []
        for channel in range(2):
            begin = data.timelines.offsets[channel][train.user_N[row]]
            history = atoms_AD[data.timelines.atoms[channel][begin : begin + lengths[row, channel]]]
            every.append(history)
            if not len(history):
                assert np.isnan(found_NF[row, channel])
                continue
            mean = history.mean(axis=0)
            cosine = mean @ candidate / np.linalg.norm(mean) / np.linalg.norm(candidate)
            assert found_NF[row, channel] == pytest.approx(cosine, abs=1e-4)
        components = texts._components_KD
        width, behaviors = len(components), np.concatenate(every)
        if len(behaviors):
            of_user = behaviors.mean(axis=0) @ components.T
            np.testing.assert_allclose(found_NF[row, 2 : 2 + width], of_user, atol=1e-3)
        else:
            assert np.isnan(found_NF[row, 2 : 2 + width]).all()
        np.testing.assert_allclose(found_NF[row, 2 + width :], candidate @ components.T, atol=1e-3)


def test_categories_unseen_in_training_are_unknown() -> None:
    data = toy_data()
    shown = {name: np.zeros((len(split), 1), dtype=np.int64) for name, split in data.splits.items()}
    shown["train"][::2] = 7
    shown["test"][:] = 5
    splits = {name: replace(split, context_NX=shown[name]) for name, split in data.splits.items()}
    data = replace(data, splits=splits, context=("device",))
    assert set(_facts(data, fit_dense(data), data.splits["train"])[:, -1]) == {0.0, 1.0}
    assert np.isnan(_facts(data, fit_dense(data), data.splits["test"])[:, -1]).all()
