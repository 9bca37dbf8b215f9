"""How well BAHE ranks over several seeds: against floor, ID-only, our DIN, and FuxiCTR's networks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean

from bahe_core.home import Home
from benchmarks import fuxi
from benchmarks.harness import Row, main

METRICS = ("auc", "gauc")
GOAL = 0.760
"""Mean test AUC that BAHE should reach on MovieLens-100k."""


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Train each network with one seed (quick) or three; same data, threads and run."""
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

    home = Home.at(home_path)
    dataset = home_dataset(home)
    with lake(home) as connection:
        encoder = current_encoder(connection, home)
        data = read_training_data(connection, latest_frame(home), encoder, dataset.channels)
        item_A = fuxi.behavior_items(connection, data)
    settings = Settings.of(dataset)
    backbone, _ = encoder_settings(dataset)
    peers = ["floor", "id_only", "din"]
    fuxi_settings = fuxi.TUNED if fuxi.installed() else {}
    measured: dict[tuple[str, str, str], list[float]] = {}
    gains: list[dict[str, float | None]] = []
    for seed in range(1 if quick else 3):
        seeded = replace(settings, training=replace(settings.training, seed=seed))
        halves = load_backbone(backbone)
        done = train_with_baselines(data, halves, seeded, None, encoder, f"seed-{seed}", tracking.Log())
        artifact, results = done.artifact, done.results
        gains.append(done.evaluations["test"].quality["floor"].row())
        # Not part of `bahe train`: every run would have to wait for them.
        score, _ = train_din(data, artifact.dense, seeded.training, model_config=seeded.model)
        scorers = {"din": score}
        for network, setting in fuxi_settings.items():
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
                if row[metric] is None:
                    continue
                measured.setdefault((row["model"], row["split"], metric), []).append(row[metric])
    seeds = f"mean of {len(gains)} seeds"
    for split in ("validation", "test"):
        for metric in METRICS:
            if ("bahe", split, metric) not in measured:
                continue
            bahe = mean(measured["bahe", split, metric])
            for peer in (*peers, *(f"FuxiCTR {network}" for network in fuxi_settings)):
                value = mean(measured[peer, split, metric])
                yield Row(
                    metric=f"{split} {metric.upper()} of BAHE",
                    value=bahe,
                    unit=seeds,
                    peer=peer,
                    peer_value=value,
                    goal=f"above {peer}",
                    holds=bahe > value,
                )
    if not fuxi_settings:
        yield Row(
            metric="FuxiCTR's networks that were measured",
            value=0,
            unit=f"of {len(fuxi.TUNED)}: FuxiCTR is not installed; {fuxi.INSTALL} adds it",
            goal="all",
            holds=False,
        )
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
