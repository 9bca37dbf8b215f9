"""What freshness costs: floor, ID-only and BAHE, each trained and measured on features as old as serving's.

The home's log as a service would see it that is told of every event at once (`live`), every hour, or every
night. Every freshness has a frame and models of its own, in a copy of the home.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.harness import Row, against, main

FRESHNESSES = ("live", "hourly", "nightly")
SEEDS = (0, 1, 2)


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Train with one seed (quick: live and nightly only) or three for each freshness."""
    import bahe
    from bahe.variation import with_settings
    from materialize.config.dataset import home_dataset

    project = bahe.open(home_path)
    training = vars(home_dataset(project.home).training)
    seeds = SEEDS[:1] if quick else SEEDS
    for freshness in FRESHNESSES if not quick else ("live", "nightly"):
        found: dict[tuple[str, str], list[float]] = {}
        with with_settings(project, freshness=freshness) as framed:
            framed.frame()
            for seed in seeds:
                with with_settings(framed, training=training | {"seed": seed}) as copy:
                    for row in copy.train(tracker="none").results:
                        found.setdefault((row["model"], row["split"]), []).append(row["auc"])
        for split in ("validation", "test"):
            yield from against(
                f"{split} AUC of BAHE, {freshness}",
                mean(found["bahe", split]),
                f"mean of {len(seeds)} seeds",
                {peer: mean(found[peer, split]) for peer in ("floor", "id_only")},
            )


if __name__ == "__main__":
    main("freshness", __doc__, measure)
