"""What pays on a log of repeated purchases, of a home that `bahe demo complete-journey` filled.

BAHE as the log's dataset.yaml has it, without what a user did with the items like a candidate (of its
category, type, very text), without that and what the user did with the candidate itself, without a network
on the features alone, with embeddings of IDs, with fading sums over the behaviors, and with deep layers;
beside them gradient boosting on the same features and on likeness of texts. Choices are made by the
validation split; the test split is reported for what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row, against, main

if TYPE_CHECKING:
    import bahe

PAIRS = "user_item_"
WITHOUT = ", without what a user did with"
SEEDS = (0, 1, 2)


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
        variants[", with fading sums"] = ({"model": model | {"recent": [8, 64]}}, seeds)
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
    """AUC by split of gradient boosting on the last frame, as good as the validation split makes it."""
    from bahe_lake.connection import lake
    from bahe_models import auc, fit_dense
    from bahe_models.baselines import train_gradient_boosting
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training.training_data import read_training_data
    from materialize.vectors.stored_atoms import current_encoder

    home = project.home
    with lake(home) as connection:
        encoder = current_encoder(connection, home)
        channels = home_dataset(home).channels
        data = read_training_data(connection, latest_frame(home), encoder, channels)
    score = train_gradient_boosting(data, fit_dense(data))
    splits = {name: data.splits[name] for name in ("validation", "test")}
    return {name: auc(split.clicked_N, score(split)) for name, split in splits.items()}


if __name__ == "__main__":
    main("real_logs", __doc__ or "", measure)
