"""How good BAHE's ranking is, over several seeds, against floor, ID-only and DIN on the same frame."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import mean

from bahe_core.home import Home
from benchmarks.harness import Row, main

METRICS = ("auc", "gauc")


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Train each network with one seed (quick) or three; same data, threads and run."""
    from bahe_models.backbone import load_backbone
    from bahe_models.baselines import train_din
    from bahe_models.metrics import auc, gauc
    from materialize import tracking
    from materialize.encode import encoder_settings
    from materialize.frame import latest_frame
    from materialize.ingest import home_dataset
    from materialize.lake import lake
    from materialize.train import Settings, train_all
    from materialize.training_data import current_encoder, read_training_data

    home = Home.at(home_path)
    dataset = home_dataset(home)
    with lake(home) as connection:
        encoder = current_encoder(connection, home)
        data = read_training_data(connection, latest_frame(home), encoder, dataset.channels)
    settings = Settings.of(dataset)
    backbone, _ = encoder_settings(dataset)
    reached: dict[tuple[str, str, str], list[float]] = {}
    for seed in range(1 if quick else 3):
        seeded = replace(settings, training=replace(settings.training, seed=seed))
        halves = load_backbone(backbone)
        artifact, results, *_ = train_all(
            data, halves, seeded, None, encoder, f"seed-{seed}", tracking.Log()
        )
        # Not part of `bahe train`, whose every run would wait for it.
        score, _ = train_din(data, artifact.dense, seeded.training, model_config=seeded.model)
        for name in ("validation", "test"):
            part, scores = data.splits[name], score(data.splits[name])
            results.append(
                {
                    "model": "din",
                    "split": name,
                    "auc": auc(part.clicked_N, scores),
                    "gauc": gauc(part.clicked_N, scores, part.user_N),
                }
            )
        for row in results:
            for metric in METRICS:
                # GAUC is undefined where no user has both classes; then it is so with every seed.
                if row[metric] is None:
                    continue
                reached.setdefault((row["model"], row["split"], metric), []).append(row[metric])
    for split in ("validation", "test"):
        for metric in METRICS:
            if ("bahe", split, metric) not in reached:
                continue
            bahe = mean(reached["bahe", split, metric])
            for peer in ("floor", "id_only", "din"):
                value = mean(reached[peer, split, metric])
                yield Row(
                    metric=f"{split} {metric.upper()} of BAHE",
                    value=bahe,
                    unit=f"mean of {len(reached['bahe', split, metric])} seeds",
                    peer=peer,
                    peer_value=value,
                    goal=f"above {peer}",
                    holds=bahe > value,
                )


if __name__ == "__main__":
    main("accuracy", __doc__ or "", measure)
