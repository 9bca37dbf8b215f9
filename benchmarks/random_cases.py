"""10,000 random cases of late clicks, late behaviors and several publishes, against brute force.

Random logs are told to real homes over three nights; each night ingests, pulls a frame and publishes at its
start. A case is the whole row of an impression in a frame, or of a user or item in the online store: all
statistics, windows, behaviors by channel, lengths and last atoms. Half of the homes have a model, publish
it by `bahe publish` and are audited; the others write statistics and lengths by its function.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import bahe
from benchmarks.harness import Row, main
from tests.support.backbone import write_backbone
from tests.support.logs import WORDS
from tests.support.night_cases import (
    Cases,
    at,
    clock_at,
    frame_cases,
    online_cases,
    publish_statistics,
    write_night,
)
from tests.support.random_logs import CHANNELS, random_log

LOGS = (
    (0, "nightly", True),
    (1, "hourly", True),
    (2, "live", True),
    (3, "hourly", False),
    (4, "live", False),
    (5, "nightly", False),
)
"""Seed, freshness, and whether there is a model. The seed also says which label delay."""
QUICK = LOGS[1:3] + LOGS[5:]
ASKED_AFTER = {"nightly": timedelta(hours=7), "hourly": timedelta(minutes=20), "live": timedelta(0)}
"""How long after a publish the audit asks, while training's cut is still that of the publish."""
SHOWN = 10


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Cases of each kind, and what audits found."""
    logs = QUICK if quick else LOGS
    cases = Cases()
    audited, differing = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        backbone = write_backbone(folder / "backbone", [*CHANNELS, *WORDS])
        for seed, freshness, model in logs:
            found, values, off = tell(folder / str(seed), backbone, seed, freshness, model=model)
            cases.add(found)
            audited, differing = audited + values, differing + off
    for example in cases.examples[:SHOWN]:
        print(f"  {example}")
    for kind in sorted(cases.right | cases.wrong):
        yield wrong_row(f"random cases, {kind}: wrong", cases.wrong[kind], cases.right[kind])
    seeds = ", ".join(str(seed) for seed, *_ in logs)
    wrong, right = cases.wrong.total(), cases.right.total()
    goal = 5_000 if quick else 10_000
    yield Row(
        metric=f"{goal:,} random cases: wrong",
        value=wrong,
        unit=f"of {wrong + right:,} ({cases.values:,} values; seeds {seeds})",
        goal="0",
        holds=wrong == 0 and right >= goal,
    )
    yield Row(
        metric="audits after each of their publishes: values that differ",
        value=differing,
        unit=f"of {audited:,}",
        goal="0",
        holds=differing == 0 and audited > 0,
    )


def wrong_row(metric: str, wrong: int, right: int) -> Row:
    """How many were wrong."""
    return Row(metric=metric, value=wrong, unit=f"of {wrong + right:,}", goal="0", holds=wrong == 0)


def tell(folder: Path, backbone: Path, seed: int, freshness: str, *, model: bool) -> tuple[Cases, int, int]:
    """All nights of one log: the cases, and how many values audits compared and found to differ."""
    log, project = random_log(seed), bahe.open(folder / "home")
    cases = Cases()
    audited, differing, version, since = 0, 0, "", None
    for night, told in enumerate(log.nights):
        dataset = write_night(folder / "log", log, night, freshness, backbone)
        project.ingest(dataset)
        if not night:
            project.apply()
        made = project.frame()
        cases.add(frame_cases(project.home, made.path, log, night, freshness))
        if model:
            project.encode()
            version = version or project.train(tracker="none").model_version
            project.embed(model_version=version)
            with clock_at(at(told.night)):
                project.publish()
        else:
            since = publish_statistics(project.home, told.night, since)
        cases.add(online_cases(project.home, log, night))
        if model:
            with clock_at(at(told.night) + ASKED_AFTER[freshness]):
                found = project.audit()
            audited += sum(feature.rows for feature in found.features)
            differing += sum(feature.differing for feature in found.features)
            for feature in found.features:
                if feature.differing:
                    print(f"  seed {seed}, night {night}: {feature.feature} differs: {feature.causes}")
    return cases, audited, differing


if __name__ == "__main__":
    main("random_cases", __doc__ or "", measure)
