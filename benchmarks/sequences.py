"""When deep layers pay: what each model finds of preferences that only the order of behaviors tells.

Synthetic logs (`bahe synth`) with nothing planted but interests, and with one kind of errand each: what a
user did last, in which order, in which combination of channels. On each: the floor, BAHE without deep
layers, that with sums in which earlier behaviors fade, with deep layers, and with these over one timeline
of all channels. The best possible AUC is known, so each is reported as its share of the way from the floor
to there. On the validation split; nothing is chosen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row, main

if TYPE_CHECKING:
    import bahe

LOGITS = 2.0
"""As much as a topic that is half of a user's interest adds."""

SHAPE = {"users": 1_000, "items": 500, "behaviors": 100_000, "impressions": 50_000, "atoms": 5_000}
LARGE = SHAPE | {"users": 5_000, "behaviors": 200_000, "impressions": 200_000}
QUICK = {"users": 300, "items": 200, "behaviors": 20_000, "impressions": 10_000, "atoms": 2_000}
LOGS: dict[str, dict[str, Any]] = {
    "interests only": SHAPE,
    "recency": SHAPE | {"recency": LOGITS},
    "order": SHAPE | {"order": LOGITS},
    "combination": SHAPE | {"combination": LOGITS},
    "recency, 200,000 impressions": LARGE | {"recency": LOGITS},
}
VARIANTS: dict[str, tuple[dict[str, Any], Sequence[int]]] = {
    "without deep layers": ({"deep": False}, (0, 1, 2)),
    "without deep layers, with fading sums": ({"deep": False, "recent": [2]}, (0, 1, 2)),
    "with deep layers": ({"deep": True}, (0,)),
    "with deep layers, channels merged": ({"deep": True, "channels": "merged"}, (0,)),
}
"""Changes to the default model, and the seeds of the whole form: deep layers take several times as long."""


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Three seeds of what trains in seconds, one of deep layers; `quick`: one, on logs of 10,000."""
    with tempfile.TemporaryDirectory(prefix="bahe-sequences-") as temporary:
        for number, (name, given) in enumerate(LOGS.items()):
            if quick and given["impressions"] > SHAPE["impressions"]:
                continue  # it would be the same log as a smaller one
            yield from _log(Path(temporary) / str(number), name, given | QUICK if quick else given, quick)


def _log(folder: Path, name: str, given: dict[str, Any], quick: bool) -> Iterable[Row]:
    import bahe
    from bahe.variation import with_settings
    from bahe_synth.log import synth
    from materialize.config.dataset import home_dataset

    log = synth(folder / "log", **given)
    project = bahe.open(folder / "home")
    project.ingest(log.dataset)
    project.encode()
    project.apply()
    project.frame()
    dataset = home_dataset(project.home)
    model, training = vars(dataset.model), vars(dataset.training)
    best, floor = _best_auc(project, folder / "log"), None
    for variant, (change, seeds) in VARIANTS.items():
        aucs, seconds = [], []
        for seed in seeds[:1] if quick else seeds:
            with with_settings(project, model=model | change, training=training | {"seed": seed}) as copy:
                results = copy.train(tracker="none").results
            of = {row["model"]: row for row in results if row["split"] == "validation"}
            aucs.append(of["bahe"]["auc"])
            seconds.append(of["bahe"]["train_seconds"])
        if floor is None:
            floor = of["floor"]["auc"]
            yield Row(metric=f"{name}: validation AUC of the truth", value=best, unit="")
            yield Row(metric=f"{name}: validation AUC of the floor", value=floor, unit="")
        spread = f"{len(aucs)} seeds, {min(aucs):.4f} to {max(aucs):.4f}" if len(aucs) > 1 else "one seed"
        yield Row(metric=f"{name}: validation AUC {variant}", value=mean(aucs), unit=spread)
        share = 100 * (mean(aucs) - floor) / (best - floor)
        yield Row(metric=f"{name}: of the way from floor to truth {variant}", value=share, unit="%")
        yield Row(metric=f"{name}: training {variant}", value=mean(seconds), unit="s")


def _best_auc(project: bahe.Project, log: Path) -> float:
    """AUC of the true click probabilities over the validation split of the last frame."""
    import duckdb

    from bahe_models import auc
    from materialize.frames.frame import latest_frame

    frame = latest_frame(project.home).path
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"""SELECT clicked, click_probability
                FROM read_parquet('{log}/truth/*.parquet') SEMI JOIN
                (SELECT impression_id FROM read_parquet('{frame}') WHERE split = 'validation')
                USING (impression_id)"""
        ).fetchnumpy()
    return auc(rows["clicked"], rows["click_probability"])


if __name__ == "__main__":
    main("sequences", __doc__ or "", measure)
