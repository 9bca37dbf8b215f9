"""How well BAHE ranks over several seeds: against floor, ID-only, our DIN, and FuxiCTR's networks.

On features as fresh as the home says and as a nightly publish has them, and with more of them; every
network reads the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from bahe_core.home import Home
from benchmarks import fuxi
from benchmarks.harness import Row, against, main

METRICS = ("auc", "gauc")
SEEDS = (0, 1, 2)
GOAL = 0.760
"""Mean test AUC that BAHE should reach on MovieLens-100k."""


WINDOWS = [
    *(f"{entity}_stats_{days}d" for entity in ("user", "item") for days in (7, 30)),
    *(f"{entity}_behaviors_{days}d" for entity in ("user", "item") for days in (7, 30)),
    "item_behaviors",
]
ATTRIBUTES = {
    "numeric": ["user_attributes:age"],
    "categorical": ["user_attributes:gender", "user_attributes:occupation", "item_attributes:genres"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", nightly": {"freshness": "nightly"},
    ", nightly with windows": {"freshness": "nightly", "features": {"numeric": WINDOWS}},
    ", nightly with windows and attributes": {
        "freshness": "nightly",
        "features": {**ATTRIBUTES, "numeric": [*WINDOWS, *ATTRIBUTES["numeric"]]},
    },
}
"""Sections of dataset.yaml under which everything is measured; the first is the home's own."""


@dataclass
class Measured:
    """Metrics of every model and split, one value a seed."""

    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    """By model, split and metric."""
    gains: list[dict[str, float | None]] = field(default_factory=list)
    """Of BAHE over the floor on the test split, with its interval."""


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Train each network with one seed, on the home's own features (quick), or three, on all `VARIANTS`."""
    import bahe
    from bahe.variation import with_settings

    project = bahe.open(home_path)
    for name, sections in VARIANTS.items():
        if quick and sections:
            continue
        with with_settings(project, **sections) as varied:
            varied.frame()
            measured = _trained(varied.home, (0,) if quick else SEEDS)
        yield from _rows(name, measured)


def _trained(home: Home, seeds: Sequence[int]) -> Measured:
    """Every network on the home's latest frame; same data, threads and run."""
    from bahe_lake.connection import lake
    from bahe_models import auc, gauc, load_backbone
    from bahe_models.baselines import train_din
    from materialize.config.backbone import encoder_settings
    from materialize.config.dataset import home_dataset
    from materialize.frames.frame import latest_frame
    from materialize.training import tracking
    from materialize.training.train_with_baselines import Settings, train_with_baselines
    from materialize.training.training_data import read_training_data
    from materialize.vectors.stored_atoms import current_encoder

    dataset = home_dataset(home)
    with lake(home) as connection:
        encoder = current_encoder(connection, home)
        data = read_training_data(connection, latest_frame(home), encoder, dataset.channels)
        item_A = fuxi.behavior_items(connection, data)
    settings = Settings.of(dataset)
    backbone, _ = encoder_settings(dataset)
    found = Measured()
    for seed in seeds:
        seeded = replace(settings, training=replace(settings.training, seed=seed))
        halves = load_backbone(backbone)
        done = train_with_baselines(data, halves, seeded, None, encoder, f"seed-{seed}", tracking.Log())
        artifact, results = done.artifact, done.results
        found.gains.append(done.evaluations["test"].quality["floor"].row())
        # Not part of `bahe train`: every run would have to wait for them.
        score, _ = train_din(data, artifact.dense, seeded.training, model_config=seeded.model)
        scorers = {"din": score}
        for network, setting in (fuxi.TUNED if fuxi.installed() else {}).items():
            scorers[f"FuxiCTR {network}"] = fuxi.train_fuxi(network, data, item_A, setting, seed=seed)
        for model, score in scorers.items():
            for name in ("validation", "test"):
                part, scores = data.splits[name], score(data.splits[name])
                results.append(
                    {
                        "model": model,
                        "split": name,
                        "auc": auc(part.clicked_N, scores),
                        "gauc": gauc(part.clicked_N, scores, part.user_N),
                    }
                )
        for row in results:
            for metric in METRICS:
                # GAUC is undefined where no user has both classes; then it is for every seed.
                if row[metric] is not None:
                    found.values.setdefault((row["model"], row["split"], metric), []).append(row[metric])
    return found


def _rows(variant: str, found: Measured) -> Iterator[Row]:
    """BAHE against each peer; on the home's own features also the goals that are figures."""
    fuxi_settings = fuxi.TUNED if fuxi.installed() else {}
    measured, gains = found.values, found.gains
    peers = ["floor", "id_only", "din"]
    seeds = f"mean of {len(gains)} seeds"
    for split in ("validation", "test"):
        for metric in METRICS:
            if ("bahe", split, metric) not in measured:
                continue
            names = (*peers, *(f"FuxiCTR {network}" for network in fuxi_settings))
            yield from against(
                f"{split} {metric.upper()} of BAHE{variant}",
                mean(measured["bahe", split, metric]),
                seeds,
                {peer: mean(measured[peer, split, metric]) for peer in names},
            )
    if not fuxi_settings:
        yield Row(
            metric="FuxiCTR's networks that were measured",
            value=0,
            unit=f"of {len(fuxi.TUNED)}: FuxiCTR is not installed; {fuxi.INSTALL} adds it",
            goal="all",
            holds=False,
        )
    if variant:
        return
    bahe = mean(measured["bahe", "test", "auc"])
    yield Row(
        metric="test AUC of BAHE",
        value=bahe,
        unit=seeds,
        goal=f"at least {GOAL:.3f}",
        holds=bahe >= GOAL,
    )
    # The lowest and highest ends over all seeds. Undefined for a single user.
    low, high = ([g[f"bahe_gain_{end}"] for g in gains] for end in ("low", "high"))
    lows, highs = [v for v in low if v is not None], [v for v in high if v is not None]
    if lows and highs:
        yield Row(
            metric="test AUC of BAHE minus floor, 95 % from",
            value=min(lows),
            unit=f"lowest of {len(gains)} seeds, paired bootstrap over users",
            goal="above 0",
            holds=min(lows) > 0,
        )
        yield Row(
            metric="test AUC of BAHE minus floor, 95 % to",
            value=max(highs),
            unit=f"highest of {len(gains)} seeds, paired bootstrap over users",
        )


if __name__ == "__main__":
    main("accuracy", __doc__ or "", measure)
