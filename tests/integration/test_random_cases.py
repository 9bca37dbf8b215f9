"""Random logs told over several nights: what frames and the online store say, against brute force.

`benchmarks.random_cases` does the same with more of them, with models, their publishes and their audits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bahe_core.home import Home
from feature_repo.store import apply
from materialize.frames import frame as frames
from materialize.ingest.ingest import ingest
from tests.support.brute_force import Impression
from tests.support.night_cases import (
    LISTED,
    Cases,
    frame_cases,
    online_cases,
    publish_statistics,
    write_night,
)
from tests.support.random_logs import DELAYS, RandomLog, random_log

FRESHNESS = ("live", "nightly", "hourly")
LONE = 999
"""A user of whom the log says nothing else."""


def test_random_nights_equal_brute_force(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nights, each with another freshness; without gates, each of which runs another copy."""
    monkeypatch.setattr(frames, "require_gates", lambda *_: None)
    log = random_log(100, users=50, items=25, impressions=400, behaviors=400)
    take_a_click_back(log)
    cases, since = Cases(), None
    for night, (now, freshness) in enumerate(zip(log.nights, FRESHNESS, strict=True)):
        dataset = write_night(tmp_path / "log", log, night, freshness)
        ingest.__wrapped__(home, dataset)  # type: ignore[attr-defined]
        if not night:
            apply(home, online=LISTED)
        made = frames.frame.__wrapped__(home)  # type: ignore[attr-defined]
        cases.add(frame_cases(home, made.path, log, night, freshness))
        since = publish_statistics(home, now.night, since)
        cases.add(online_cases(home, log, night))
    assert not cases.wrong, cases.examples[:5]
    assert all(cases.right[f"impressions, {freshness}"] > 150 for freshness in FRESHNESS), cases.right
    assert (cases.right["users online"], cases.right["items online"]) == (153, 75)


def take_a_click_back(log: RandomLog) -> None:
    """The latest moment of a user is when a click was presumed, until the click's time is told.

    The row online is then of a moment that is no more, and later than an impression that also came late.
    """
    delay = DELAYS[log.delay]
    presumed = Impression(9000, LONE, 0, log.nights[0].night - 2 * delay, clicked=True)
    late = Impression(9001, LONE, 0, presumed.shown + delay // 2)
    log.users.append(LONE)
    log.nights[0].impressions.append(presumed)
    for night in log.nights[1:]:
        night.impressions.extend([replace(presumed, clicked_at=presumed.shown + delay // 3), late])


def test_random_logs_are_late() -> None:
    """Behaviors, impressions, clicks and clicks' times are told after the night that they belong to."""
    log = random_log(100)
    before, after = log.nights[:2]
    assert any(b.time < before.night for b in set(after.behaviors) - set(before.behaviors))
    earlier = {i.number: i for i in before.impressions}
    assert any(i.shown < before.night for i in after.impressions if i.number not in earlier)
    changed = [(earlier[i.number], i) for i in after.impressions if earlier.get(i.number, i) != i]
    assert any(not then.clicked and (now.clicked_at or 0) < before.night for then, now in changed)
    assert any(then.clicked and then.clicked_at is None for then, _ in changed)
