"""One published home for the tests of the service that need no features of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bahe_core.home import Home
from tests.support.cli import call
from tests.support.logs import LONG, small_log, write_dataset


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    """Users are u1 … and one of a long id, items are integers; the model reads the device of an impression.

    A test that writes to it takes a copy.
    """
    folder = tmp_path_factory.mktemp("served")
    log = small_log(users=12, rows=400)
    for table in ("impressions", "behaviors", "users"):
        log[table]["user_id"] = log[table]["user_id"].replace("u11", LONG)
    log["impressions"]["device"] = np.where(log["impressions"]["clicked"] == 1, "phone", "desk")
    impressions = {"files": "impressions.parquet", "context": ["device"]}
    dataset = write_dataset(folder / "log", log, tiny_backbone, impressions=impressions)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home
