from __future__ import annotations

import sys

import pytest

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_models import Epoch
from materialize.training import tracking

RESULT = {"model": "bahe", "split": "test", "auc": 0.75, "gauc": 0.7, "train_seconds": 1.0}


def test_tensorboard_gets_settings_epochs_and_results(home: Home) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking.run(home, "tensorboard", "shop", "bahe-1") as log:
        log.parameters({"epochs": 2})
        for epoch in (1, 2):
            log.epoch(Epoch(epoch, 0.7 / epoch, 0.6, 1.0))
        log.results([RESULT])
    events = EventAccumulator(str(home.tensorboard / "bahe-1")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train_loss")] == [(1, 0.7), (2, 0.35)]
    assert events.Scalars("test_auc/bahe")[0].value == 0.75
    assert "settings/text_summary" in events.Tags()["tensors"]


def test_tensorboard_leaves_out_what_is_undefined(home: Home) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking.run(home, "tensorboard", "shop", "bahe-1") as log:
        log.results([{**RESULT, "gauc": None, "ece": 0.02}])
    scalars = EventAccumulator(str(home.tensorboard / "bahe-1")).Reload().Tags()["scalars"]
    assert sorted(scalars) == ["test_auc/bahe", "test_ece/bahe"]


def test_a_missing_tensorboard_is_one_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with (
        pytest.raises(NotReady, match=r"pip install 'bahe\[tensorboard\]'"),
        tracking.run(home, "tensorboard", "shop", "bahe-1"),
    ):
        pass
    assert not home.tensorboard.exists()
