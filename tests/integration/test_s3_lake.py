"""A lake whose files lie in S3 (a server in this process), its catalogue in SQLite or PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bahe_core.home import Home
from serving.lookup.online_lookup import OnlineLookup
from tests.support.cli import call
from tests.support.home_contents import artifacts, contents, differences
from tests.support.logs import small_log, write_dataset
from tests.support.services import POSTGRES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("catalogue", ["sqlite", "postgres"])
def test_two_nights_as_with_a_local_lake(
    catalogue: str,
    bucket: object,
    tiny_backbone: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    place = {"data": "s3://shop/lake"}
    if catalogue == "postgres":
        place |= {"catalogue": POSTGRES, "schema": request.getfixturevalue("postgres_schema")}
    log = small_log(rows=500)
    first = {
        table: rows[rows["event_timestamp"] < rows["event_timestamp"].quantile(0.8)]
        if table in ("behaviors", "impressions")
        else rows
        for table, rows in log.items()
    }
    homes = {"local": Home.at(tmp_path / "local"), "s3": Home.at(tmp_path / "s3")}
    for night in (first, log):
        dataset = write_dataset(tmp_path / "log", night, tiny_backbone)
        call("run", str(dataset), "--home", str(homes["local"].root), "--tracker", "none")
        elsewhere = dataset.with_name("elsewhere.yaml")
        elsewhere.write_text(yaml.safe_dump(yaml.safe_load(dataset.read_text()) | {"lake": place}))
        call("run", str(elsewhere), "--home", str(homes["s3"].root), "--tracker", "none")
    assert bucket.list_objects_v2(Bucket="shop", Prefix="lake/")["KeyCount"] > 10  # type: ignore[attr-defined]
    assert not list(homes["s3"].root.rglob("ducklake-*.parquet"))
    call("compact", "--home", str(homes["s3"].root))
    local, s3 = (contents(home) for home in homes.values())
    assert differences(s3, local) == []
    assert artifacts(homes["s3"]) == artifacts(homes["local"])
    mine, theirs = (OnlineLookup(home).score("u1", list(range(25))).scores for home in homes.values())
    assert [(s.item_id, pytest.approx(s.probability, abs=1e-5)) for s in mine] == [
        (s.item_id, s.probability) for s in theirs
    ]
