"""What pays on a log of repeated purchases, of a home that `bahe demo complete-journey` filled.

BAHE as the log's dataset.yaml has it, without what a user did with the items like a candidate (of its
category, type, very text), without that and what the user did with the candidate itself, without a network
on the features alone, with embeddings of IDs, and with deep layers; beside them gradient boosting on the
same features. Choices are made by the validation split; the test split is reported for what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Row, against, main

if TYPE_CHECKING:
    import bahe
    from bahe_models import Impressions, TrainingData

PAIRS = "user_item_"
WITHOUT = ", without what a user did with"
SEEDS = (0, 1, 2)
CATEGORIES = 250
"""Categories of more values are left out: gradient boosting bins no more."""


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """One seed of the first three (quick), or three seeds of all, of deep layers one."""
    import bahe
    from bahe.variation import with_settings
    from feature_repo.by_item_columns import column_and_span
    from feature_repo.references import view_of
    from materialize.config.dataset import home_dataset

    project = bahe.open(home_path)
    dataset = home_dataset(project.home)
    features = dataset.features.model_dump()
    pairs_only = [
        name
        for name in features["numeric"]
        if name.startswith(PAIRS) or not column_and_span(view_of(name))[0]
    ]
    neither = [name for name in pairs_only if not name.startswith(PAIRS)]
    training, model = vars(dataset.training), vars(dataset.model)
    seeds = SEEDS[:1] if quick else SEEDS
    variants: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
        "": ({}, seeds),
        f"{WITHOUT} items like it": ({"features": features | {"numeric": pairs_only}}, seeds),
        f"{WITHOUT} it or items like it": ({"features": features | {"numeric": neither}}, seeds),
    }
    if not quick:
        without_it, ids = {"facts_width": 0}, {"behavior_ids": True, "item_ids": True}
        variants[", without a network on the features alone"] = ({"model": model | without_it}, seeds)
        variants[", with embeddings of IDs"] = ({"model": model | ids}, seeds)
        # They take ten times as long.
        variants[", with deep layers"] = ({"model": model | {"deep": True}}, SEEDS[:1])
    for name, (sections, of_variant) in variants.items():
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        with with_settings(project, **sections) as framed:
            framed.apply()
            framed.frame()
            boosted = _boosted(framed)
            for seed in of_variant:
                with with_settings(framed, training=training | {"seed": seed}) as copy:
                    for row in copy.train(tracker="none").results:
                        found.setdefault((row["model"], row["split"]), []).append(row)
        unit = f"mean of {len(of_variant)} seeds"
        for split in ("validation", "test") if not name else ("validation",):
            peers = {"floor": mean(row["auc"] for row in found["floor", split])}
            peers["gradient boosting"] = boosted[split]
            value = mean(row["auc"] for row in found["bahe", split])
            yield from against(f"{split} AUC of BAHE{name}", value, unit, peers)
        for metric, of_metric in (("log_loss", "test log loss"), ("ece", "test calibration error (ECE)")):
            if not name:
                yield Row(
                    metric=f"{of_metric} of BAHE",
                    value=mean(row[metric] for row in found["bahe", "test"]),
                    unit=unit,
                )
        seconds = mean(row["train_seconds"] for row in found["bahe", "validation"])
        yield Row(metric=f"training of BAHE{name}", value=seconds, unit=f"s, {unit}")


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
