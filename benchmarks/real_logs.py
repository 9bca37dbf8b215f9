"""What pays on a log of repeated purchases, of a home that `bahe demo complete-journey` filled.

BAHE as the log's dataset.yaml has it, without what a user did with an item, and with deep layers; beside
them gradient boosting on the same features. Choices are made by the validation split; the test split is
reported for what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row, main

if TYPE_CHECKING:
    import bahe
    from bahe_models import Impressions, TrainingData

PAIRS = "user_item_"
SEEDS = (0, 1, 2)
CATEGORIES = 250
"""Categories of more values are left out: gradient boosting bins no more."""


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """One seed and no deep layers (quick), or three seeds."""
    import bahe
    from bahe.variation import with_settings
    from materialize.config.dataset import home_dataset

    project = bahe.open(home_path)
    dataset = home_dataset(project.home)
    features = dataset.features.model_dump()
    without = [name for name in features["numeric"] if not name.startswith(PAIRS)]
    training, model = vars(dataset.training), vars(dataset.model)
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", without what a user did with the item": {"features": features | {"numeric": without}},
    }
    if not quick:
        variants[", with deep layers"] = {"model": model | {"deep": True}}
    for name, sections in variants.items():
        found: dict[tuple[str, str], list[float]] = {}
        for seed in SEEDS[:1] if quick else SEEDS:
            with with_settings(project, **sections, training=training | {"seed": seed}) as varied:
                varied.frame()
                for row in varied.train(tracker="none").results:
                    found.setdefault((row["model"], row["split"]), []).append(row["auc"])
                if seed == SEEDS[0]:
                    boosted = _boosted(varied)
        seeds = f"mean of {len(found['bahe', 'test'])} seeds"
        for split in ("validation", "test") if not name else ("validation",):
            value = mean(found["bahe", split])
            peers = {"floor": mean(found["floor", split]), "gradient boosting": boosted[split]}
            for peer, theirs in peers.items():
                yield Row(
                    metric=f"{split} AUC of BAHE{name}",
                    value=value,
                    unit=seeds,
                    peer=peer,
                    peer_value=theirs,
                    goal=f"above {peer}",
                    holds=value > theirs,
                )


def _boosted(project: bahe.Project) -> dict[str, float]:
    """AUC by split of scikit-learn's HistGradientBoostingClassifier on the features of the last frame.

    Its number of trees is that of the best validation AUC.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    from bahe_lake.connection import lake
    from bahe_models import auc
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training.training_data import read_training_data
    from materialize.vectors.stored_atoms import current_encoder

    home = project.home
    with lake(home) as connection:
        encoder = current_encoder(connection, home)
        channels = home_dataset(home).channels
        data = read_training_data(connection, latest_frame(home), encoder, channels)
    table = {name: _table(data, split) for name, split in data.splits.items()}
    fitted = HistGradientBoostingClassifier(
        max_iter=400, learning_rate=0.05, early_stopping=False, random_state=0
    ).fit(table["train"], data.splits["train"].clicked_N)
    aucs = {
        name: [
            auc(data.splits[name].clicked_N, scores[:, 1])
            for scores in fitted.staged_predict_proba(table[name])
        ]
        for name in ("validation", "test")
    }
    best = int(np.argmax(aucs["validation"]))
    return {name: values[best] for name, values in aucs.items()}


def _table(data: TrainingData, split: Impressions) -> npt.NDArray[np.float64]:
    """Dense features and codes of the categories, NaN where a category is rare or unknown [N, F]."""
    from bahe_models import fit_dense

    dense_NF = fit_dense(data).transform(split.columns, split.length_NC, split.time_us_N)
    columns: list[npt.NDArray[Any]] = list(dense_NF.T)
    train = data.splits["train"]
    if train.context_NX is not None and split.context_NX is not None:
        for known_N, hash_N in zip(train.context_NX.T, split.context_NX.T, strict=True):
            known = np.unique(known_N)
            if len(known) <= CATEGORIES:
                place_N = np.minimum(np.searchsorted(known, hash_N), len(known) - 1)
                columns.append(np.where(known[place_N] == hash_N, place_N, np.nan))
    return np.column_stack(columns)


if __name__ == "__main__":
    main("real_logs", __doc__ or "", measure)
