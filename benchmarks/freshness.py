"""What freshness costs: floor, ID-only and BAHE, each trained and measured on features as old as serving's.

The home's log as a service would see it that is told of every event at once (`live`), every hour, or every
night. Every freshness has a frame and models of its own, in a copy of the home.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.harness import Row, main

FRESHNESSES = ("live", "hourly", "nightly")
SEEDS = (0, 1, 2)


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Train with one seed (quick: live and nightly only) or three for each freshness."""
    import bahe
    from bahe.variation import with_settings
    from materialize.config.dataset import home_dataset

    project = bahe.open(home_path)
    training = home_dataset(project.home).training
    seeds = SEEDS[:1] if quick else SEEDS
    for freshness in FRESHNESSES if not quick else ("live", "nightly"):
        found: dict[tuple[str, str], list[float]] = {}
        for seed in seeds:
            with with_settings(
                project, freshness=freshness, training=vars(training) | {"seed": seed}
            ) as copy:
                copy.frame()
                for row in copy.train(tracker="none").results:
                    found.setdefault((row["model"], row["split"]), []).append(row["auc"])
        for split in ("validation", "test"):
            bahe_auc = mean(found["bahe", split])
            for peer in ("floor", "id_only"):
                yield Row(
                    metric=f"{split} AUC of BAHE, {freshness}",
                    value=bahe_auc,
                    unit=f"mean of {len(seeds)} seeds",
                    peer=peer,
                    peer_value=mean(found[peer, split]),
                    goal=f"above {peer}",
                    holds=bahe_auc > mean(found[peer, split]),
                )


if __name__ == "__main__":
    main("freshness", __doc__, measure)
