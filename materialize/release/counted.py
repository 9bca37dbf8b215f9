"""What the statistics that are online count: a file of the home, which a publish writes right after them.

A service that takes impressions and clicks in adds to these statistics what is not counted in them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import duckdb

from bahe_core.files import replace_atomically
from bahe_core.home import Home
from bahe_lake.catalogue import columns
from materialize.config.dataset import CLICKED_AT, ImpressionTable


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of the log as the publish found it."""

    snapshot: int
    impressions: int
    clicks: int
    """Those that were known at the log's end."""
    log_end_us: int
    """The log's last instant: nothing later is counted."""
    integer_ids: bool
    """Whether impression ids are integers."""
    click_times: bool
    """Whether the log says when each click happened."""
    label_delay_us: int
    label_time: str
    """SQL of the instant at which an impression's click is known."""

    def known_us(self, shown_us: int, clicked_us: int) -> int:
        """When a click is known, as ingest has it."""
        return clicked_us if self.click_times else shown_us + self.label_delay_us


def count(connection: duckdb.DuckDBPyConnection, rules: ImpressionTable, snapshot: int) -> Counted:
    """What statistics count, of the lake as it is: that of the snapshot."""
    times = ["event_timestamp", *([CLICKED_AT] if rules.click_times else [])]
    moments = [f"SELECT max({column}) AS moment FROM impressions" for column in times]
    row = connection.execute(
        f"""
        WITH log AS (
            SELECT epoch_us(max(moment)) AS end_us
            FROM ({" UNION ALL ".join(moments)} UNION ALL SELECT max(event_timestamp) FROM behaviors)
        )
        SELECT
            count(*),
            count(*) FILTER (clicked = 1 AND epoch_us({rules.label_time}) <= end_us),
            (SELECT end_us FROM log)
        FROM impressions, log
        """
    ).fetchone()
    assert row is not None
    return Counted(
        snapshot=snapshot,
        impressions=row[0],
        clicks=row[1],
        log_end_us=row[2] or 0,
        integer_ids=columns(connection, "impressions")["impression_id"] == "BIGINT",
        click_times=rules.click_times,
        label_delay_us=rules.label_delay_us,
        label_time=rules.label_time,
    )


def write(home: Home, counted: Counted) -> None:
    """Say what the statistics that are online count."""
    with replace_atomically(home.counted) as part:
        part.write_text(json.dumps(asdict(counted)))


def read(home: Home) -> Counted | None:
    """What they count; None where no publish of this release said so, or it cannot be read any more."""
    try:
        return Counted(**json.loads(home.counted.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
