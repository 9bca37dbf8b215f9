"""Impressions and clicks as the lake has them that the live publish was made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from bahe_core.errors import BaheError, NotReady, one_line
from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.config.dataset import CLICKED_AT
from materialize.release.counted import Counted
from serving.lookup.identifiers import Identifier
from serving.lookup.lake_pause import LakePause


@dataclass(slots=True)
class Impression:
    """An impression, and when it was clicked."""

    impression_id: Identifier
    user_id: Identifier
    item_id: Identifier
    shown_us: int
    clicked_us: int | None = None
    received: str = ""
    """The day, UTC, on which this was sent."""


@dataclass(frozen=True)
class InLog:
    """An impression as the publish has it."""

    shown: Impression
    click_counted: bool

    def lacks_click(self, base: Counted) -> bool:
        """Whether a click of it is still to count: the log tells of one later only by its time."""
        return not self.click_counted and (base.click_times or self.shown.clicked_us is not None)


class PublishedImpressions:
    """Reads the lake for whoever asks, and leaves it alone for a while after it failed."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self.pause = LakePause()

    def of(self, base: Counted, impression_ids: Sequence[Identifier]) -> dict[Identifier, InLog]:
        """Those of the impressions that the publish has. Raises NotReady as `clicks_waiting`."""
        if not impression_ids:
            return {}
        condition = "impression_id IN (SELECT impression_id FROM asked)"
        return {one.shown.impression_id: one for one in self._read(base, condition, impression_ids)}

    def clicks_waiting(self, base: Counted) -> list[InLog]:
        """Clicks that the publish has and does not count, as they were not known yet at the log's end.

        Raises NotReady where the lake failed a moment ago, or fails now; also Unreachable, Damaged or
        NotWritable.
        """
        if not base.label_delay_us:
            return []
        return self._read(base, f"clicked = 1 AND epoch_us({base.label_time}) > {base.log_end_us}")

    def _read(self, base: Counted, condition: str, asked: Sequence[Identifier] = ()) -> list[InLog]:
        if self.pause.on:
            raise NotReady(f"the lake of {self._home.root} failed a moment ago; send it again.")
        start = time.monotonic()
        late = f"epoch_us({CLICKED_AT})" if base.click_times else "NULL"
        query = f"""
            SELECT
                impression_id,
                user_id,
                item_id,
                epoch_us(event_timestamp),
                CASE WHEN clicked = 1 THEN coalesce({late}, epoch_us(event_timestamp)) END,
                clicked = 1 AND epoch_us({base.label_time}) <= {base.log_end_us}
            FROM impressions {{at}}
            WHERE {condition}
            """
        ids = pa.array(asked, pa.int64() if base.integer_ids else pa.string())
        try:
            with lake(self._home) as connection:
                connection.register("asked", pa.table({"impression_id": ids}))
                try:
                    version = f"AT (VERSION => {base.snapshot})"
                    rows = connection.execute(query.format(at=version)).fetchall()
                except duckdb.InvalidInputException as error:
                    if "No snapshot found" not in str(error):
                        raise
                    # Compacted away: as it is now.
                    rows = connection.execute(query.format(at="")).fetchall()
                connection.unregister("asked")
        except (BaheError, duckdb.Error) as error:
            self.pause.begin(time.monotonic() - start)
            if isinstance(error, BaheError):
                raise
            raise NotReady(f"the lake of {self._home.root} cannot be read ({one_line(error)}).") from None
        return [InLog(Impression(*row[:5]), row[5]) for row in rows]
