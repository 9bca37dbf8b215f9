"""What a publish writes where the log goes beyond the cut of `freshness`, up to which training sees."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

import bahe
from serving.audit.audit import audit
from serving.audit.audit_result import Audit
from serving.audit.skew import FRESHER, NOT_LOOKED_AT
from tests.support.logs import small_log, write_dataset

LATE = 25
"""Rows of the log that are from after the cut."""


def test_they_differ_in_what_came_after_the_cut_alone(tmp_path: Path, tiny_backbone: Path) -> None:
    """A log that ends an hour ago, published now: served is what serving three hours ago did not know.

    Of users and items that nothing happened to in between, everything is equal; of all, when the cut lies
    after the log's end, as it does where nights say when they publish.
    """
    now = pd.Timestamp.now("UTC").floor("min")
    log = small_log(rows=400, users=20, items=40)
    cut, end = now - timedelta(hours=3), now - timedelta(hours=1)
    for name in ("behaviors", "impressions"):
        times = log[name]["event_timestamp"].copy()
        times += (cut - timedelta(hours=1)) - times.max()
        times.iloc[-LATE:] = pd.date_range(cut + timedelta(minutes=1), end, LATE)
        log[name]["event_timestamp"] = times
    for name in ("items", "users"):
        log[name]["event_timestamp"] = log["impressions"]["event_timestamp"].min() - timedelta(days=1)
    dataset = write_dataset(tmp_path / "log", log, tiny_backbone, freshness=f"nightly {cut:%H:%M}")
    project = bahe.open(tmp_path / "home")
    project.run(dataset, tracker="none")

    found = audit(project.home, last=400)
    shown = log["impressions"]
    late = shown.tail(LATE)
    expected = {
        "user": np.isin(shown["user_id"], late["user_id"]).sum(),
        "item": np.isin(shown["item_id"], late["item_id"]).sum(),
    }
    assert max(expected.values()) < len(shown)
    by_view = _differing(found)
    assert by_view.pop("user_timeline") <= expected["user"]  # a behavior is in one channel of two
    assert by_view == {
        "user_stats": expected["user"],
        "item_stats": expected["item"],
        "user_recent_atoms": expected["user"],
        "user_embedding": expected["user"],
    }
    assert {cause for one in found.features for cause in one.causes} - {NOT_LOOKED_AT} == {FRESHER}

    settings = yaml.safe_load((project.home.root / "dataset.yaml").read_text())
    settings["freshness"] = f"nightly {end + timedelta(minutes=1):%H:%M}"
    (project.home.root / "dataset.yaml").write_text(yaml.safe_dump(settings))
    assert audit(project.home, last=400).consistent


def _differing(found: Audit) -> dict[str, int]:
    """The most rows that differ in a feature of each view that has any."""
    most: dict[str, int] = {}
    for one in found.features:
        if one.differing:
            view = one.feature.partition(":")[0]
            most[view] = max(most.get(view, 0), one.differing)
    return most
