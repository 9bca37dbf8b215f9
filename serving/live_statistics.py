"""Impressions and clicks sent to a running service: statistics count them until a publish has them.

A publish writes the statistics of the log as it found it. What is sent afterwards is written to the home's
journal before it is answered, and every worker adds it to what the store says: to the counts of the user
and of the item, to their smoothed click rates, and to the time of the latest impression. What the next
publish has is let go of. The log still has to receive the same impressions and clicks. While a publish
writes, for seconds, what it brings may be counted twice.
"""

from __future__ import annotations

import heapq
import threading
import time
from array import array
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa

from bahe_core.errors import Damaged, NotReady, NotWritable, Unreachable
from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.catalogue import columns
from bahe_lake.connection import lake
from materialize.config.dataset import CLICKED_AT, ImpressionTable, home_dataset
from materialize.ingest.statistics import WINDOW_DAYS, log_rate, rate_before, smoothed_rate
from materialize.release.publish import JOB as PUBLISH
from serving.journal import Journal

Identifier = str | int

KEEP = timedelta(days=7)
"""What no publish has so long after it was sent, the log never got. Also the shortest window of statistics:
what is counted here is counted in each of them."""
REST = 5.0
"""Seconds that the lake is left alone after it could not say what the publish has."""
SOON = 0.5
"""Seconds until it is asked again which publish is the last, where it is the one that is known."""
LAKE_FAILS = (Unreachable, Damaged, NotWritable)
_WINDOWS = ("", *(f"_{days}d" for days in WINDOW_DAYS))
_ENTITIES = ("user", "item")


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


@dataclass(slots=True)
class _Counts:
    """Of a user or an item, beyond the publish."""

    shown: int = 0
    clicks: int = 0
    shown_us: int | None = None
    """The latest impression."""
    latest_us: int = 0
    """The latest event: a smoothed rate starts from the log's rate at that moment."""


@dataclass(frozen=True, kw_only=True)
class _Published:
    """What the last publish counted."""

    snapshot: int | None
    """None where the lake has forgotten it, and is read as it is now."""
    shown: int
    clicks: int
    end_us: int
    """The log's last instant: nothing later is in the publish."""
    rules: ImpressionTable


@dataclass
class _Sent:
    """What was sent and the publish does not have, counted."""

    impressions: dict[Identifier, Impression] = field(default_factory=dict)
    of: dict[str, defaultdict[Identifier, _Counts]] = field(
        default_factory=lambda: {entity: defaultdict(_Counts) for entity in _ENTITIES}
    )
    clicked_items: defaultdict[Identifier, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By user."""
    shown_us: array[int] = field(default_factory=lambda: array("q"))
    clicked_us: array[int] = field(default_factory=lambda: array("q"))
    """Times of all impressions, and of all clicks, in order."""
    later: list[tuple[int, str, Impression]] = field(default_factory=list)
    """A heap of the clicks that are not known yet, by when they will be."""

    def take(self, sent: Impression, counted: Impression | None, rules: ImpressionTable) -> None:
        """Count an impression, and its click, unless the publish has `counted` it, or it is here."""
        kept = self.impressions.get(sent.impression_id)
        if kept is None:
            if counted is not None and (sent.clicked_us is None or counted.clicked_us is not None):
                return
            self.impressions[sent.impression_id] = kept = sent
            if counted is None:
                self._count(kept, kept.shown_us, click=False)
        elif kept.clicked_us is None and sent.clicked_us is not None:
            kept.clicked_us = sent.clicked_us
        else:
            return
        if kept.clicked_us is not None:
            self.clicked_items[kept.user_id].add(str(kept.item_id))
            heapq.heappush(self.later, (known_us(kept, rules), str(kept.impression_id), kept))
            self.pass_time()

    def pass_time(self) -> None:
        """Count the clicks that are known by now."""
        while self.later and self.later[0][0] <= time.time_ns() // 1000:
            moment_us, _, one = heapq.heappop(self.later)
            self._count(one, moment_us, click=True)

    def _count(self, one: Impression, moment_us: int, *, click: bool) -> None:
        insort(self.clicked_us if click else self.shown_us, moment_us)
        for entity, identifier in zip(_ENTITIES, (one.user_id, one.item_id), strict=True):
            counts = self.of[entity][identifier]
            counts.latest_us = max(counts.latest_us, moment_us)
            if click:
                counts.clicks += 1
            else:
                counts.shown += 1
                counts.shown_us = max(counts.shown_us or moment_us, moment_us)


def known_us(clicked: Impression, rules: ImpressionTable) -> int:
    """When a click is known, as ingest has it."""
    if rules.click_times and clicked.clicked_us is not None:
        return clicked.clicked_us
    return clicked.shown_us + rules.label_delay_us


def counts_beside(references: Sequence[str]) -> list[str]:
    """The counts that the click rates among the features (`view:feature`) are made of."""
    beside = []
    for entity in _ENTITIES:
        for window in _WINDOWS:
            view = f"{entity}_stats{window}"
            if f"{view}:{entity}_click_rate{window}" in references:
                beside += [f"{view}:{entity}_{count}{window}" for count in ("impressions", "clicks")]
    return beside


class LiveStatistics:
    """Safe to use from several threads; each worker of a home has its own.

    `edition` is an object that is another one after each publish.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._journal = Journal(home.pushed / "impressions")
        self._lock = threading.RLock()
        self._sent = _Sent()
        self._unsettled: list[Impression] = []
        """Read, and not yet compared with what the publish has."""
        self._published: _Published | None = None
        self._edition: object = None
        self._not_before = 0.0
        """When the lake may be read again, by the monotonic clock."""

    def touched(self, item_ids: Iterable[Identifier], edition: object) -> list[int]:
        """Places of those of the items that have statistics to be `moved`."""
        with self._lock:
            self._bring_up_to_date(edition)
            of = self._sent.of["item"]
            return [place for place, one in enumerate(item_ids) if one in of] if of else []

    def moved(self, entity: str, identifier: Identifier, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a `user`'s or `item`'s statistics, by column, that what was sent has changed.

        `stored` is what the online store says, with the impressions and clicks beside each click rate.
        """
        with self._lock:
            published, counts = self._published, self._sent.of[entity].get(identifier)
            if published is None or counts is None:
                return {}
            moved: dict[str, Any] = {}
            for window in _WINDOWS:
                shown, clicks, rate = (
                    f"{entity}_{kind}{window}" for kind in ("impressions", "clicks", "click_rate")
                )
                before = stored.get(clicks) or 0, stored.get(shown) or 0
                moved[clicks], moved[shown] = before[0] + counts.clicks, before[1] + counts.shown
                if counts.latest_us > published.end_us or stored.get(rate) is None:
                    start = log_rate(
                        published.clicks + bisect_right(self._sent.clicked_us, counts.latest_us),
                        published.shown + bisect_right(self._sent.shown_us, counts.latest_us),
                    )
                else:
                    start = rate_before(stored[rate], *before)
                moved[rate] = smoothed_rate(moved[clicks], moved[shown], start)
            if counts.shown_us is not None:
                last = f"{entity}_last_impression_us"
                moved[last] = max(counts.shown_us, stored.get(last) or counts.shown_us)
            return {column: value for column, value in moved.items() if column in stored}

    def clicked_items(self, user_id: Identifier, edition: object) -> frozenset[str]:
        """Items that the user clicked, of the clicks that were sent."""
        with self._lock:
            self._bring_up_to_date(edition)
            return frozenset(self._sent.clicked_items.get(user_id, ()))

    def show(self, impressions: Sequence[Impression], edition: object) -> int:
        """Take impressions in; how many are new. They are on disk when this returns."""
        with self._journal.exclusive():
            here = self._here([one.impression_id for one in impressions], edition)
            new = {one.impression_id: one for one in impressions if one.impression_id not in here}
            self._write(new.values())
            return len(new)

    def click(self, clicks: Mapping[Identifier, int], edition: object) -> tuple[int, dict[Identifier, str]]:
        """Take in when impressions were clicked; how many clicks are new, and why others are refused.

        Raises NotReady, Unreachable, Damaged or NotWritable while it cannot be said what the publish has.
        """
        with self._journal.exclusive():
            here = self._here(clicks, edition)
            others = [one for one in clicks if one not in here]
            if others:
                here |= self._of_publish(self._published or self._read_publish(), others)
            refused = dict.fromkeys(clicks.keys() - here, "is neither published nor sent; send it first")
            refused |= {
                i: "was shown after that click; correct the time"
                for i, one in here.items()
                if clicks[i] < one.shown_us
            }
            new = [
                replace(one, clicked_us=clicks[i])
                for i, one in here.items()
                if one.clicked_us is None and i not in refused
            ]
            self._write(new)
            return len(new), refused

    def id_type(self) -> str:
        """The DuckDB type of the log's impression ids. Raises as `click`."""
        with lake(self._home) as connection:
            return columns(connection, "impressions")["impression_id"]

    def _here(self, asked: Iterable[Identifier], edition: object) -> dict[Identifier, Impression]:
        """Those of the impressions that were sent, and that the publish does not have all of."""
        with self._lock:
            self._bring_up_to_date(edition)
            unsettled = {one.impression_id: one for one in self._unsettled}
            found = ((one, self._sent.impressions.get(one) or unsettled.get(one)) for one in asked)
            return {one: impression for one, impression in found if impression is not None}

    def _write(self, impressions: Iterable[Impression]) -> None:
        received = f"{datetime.now(UTC):%Y-%m-%d}"
        lines = [asdict(one) | {"received": received} for one in impressions]
        if lines:
            self._journal.append(lines)

    def _bring_up_to_date(self, edition: object) -> None:
        anew, lines = self._journal.read_on()
        if anew:
            self._sent, self._unsettled = _Sent(), []
        self._unsettled += filter(None, map(_impression, lines))
        if (self._unsettled or self._edition is not edition) and time.monotonic() >= self._not_before:
            try:
                self._settle(edition)
            except (NotReady, *LAKE_FAILS):
                # What was counted stays right until it is published.
                self._not_before = time.monotonic() + REST
        self._sent.pass_time()

    def _settle(self, edition: object) -> None:
        """Counts what the publish does not have: of what came, or of all where the publish is another."""
        published, sent, new = self._published, self._sent, self._unsettled
        if published is None or self._edition is not edition:
            published = self._read_publish()
            if published == self._published:
                # Its items are written a moment before its run is recorded.
                edition, self._not_before = self._edition, time.monotonic() + SOON
            else:
                self._journal.tidy(KEEP)
                oldest = f"{datetime.now(UTC) - KEEP:%Y-%m-%d}"
                all_of_it = [*sent.impressions.values(), *new]
                sent, new = _Sent(), [one for one in all_of_it if one.received >= oldest]
        in_question = [one.impression_id for one in new if one.shown_us <= published.end_us]
        counted = self._of_publish(published, in_question) if in_question else {}
        for one in new:
            sent.take(one, counted.get(one.impression_id), published.rules)
        self._published, self._sent, self._unsettled, self._edition = published, sent, [], edition

    def _read_publish(self) -> _Published:
        """What the last publish counted. Raises NotReady before the first."""
        rules = home_dataset(self._home).impressions
        with lake(self._home) as connection:
            publish = runs.last(connection, PUBLISH)
            if publish is None:
                raise NotReady(f"{self._home.root} has nothing published; run `bahe publish` first.")
            times = ["event_timestamp", *([CLICKED_AT] if rules.click_times else [])]
            moments = [f"SELECT max({column}) AS moment FROM impressions {{at}}" for column in times]
            query = f"""
                WITH log AS (
                    SELECT epoch_us(max(moment)) AS end_us
                    FROM (
                        {" UNION ALL ".join(moments)}
                        UNION ALL SELECT max(event_timestamp) FROM behaviors {{at}}
                    )
                )
                SELECT
                    count(*),
                    count(*) FILTER (clicked = 1 AND epoch_us({rules.label_time}) <= end_us),
                    any_value(end_us)
                FROM impressions {{at}}, log
                """
            snapshot: int | None = publish.snapshot_read
            try:
                row = connection.execute(query.format(at=_at(snapshot))).fetchone()
            except duckdb.Error:  # compacted away
                snapshot = None
                row = connection.execute(query.format(at="")).fetchone()
        assert row is not None
        return _Published(snapshot=snapshot, shown=row[0], clicks=row[1], end_us=row[2] or 0, rules=rules)

    def _of_publish(
        self, published: _Published, impression_ids: Sequence[Identifier]
    ) -> dict[Identifier, Impression]:
        """Those of the impressions that the publish has; with `clicked_us` where it counted the click."""
        with lake(self._home) as connection:
            connection.register("asked", pa.table({"impression_id": list(impression_ids)}))
            late = CLICKED_AT if published.rules.click_times else "NULL"
            rows = connection.execute(
                f"""
                SELECT
                    impression_id,
                    user_id,
                    item_id,
                    epoch_us(event_timestamp),
                    CASE WHEN clicked = 1
                        THEN coalesce(epoch_us({late}::TIMESTAMPTZ), epoch_us(event_timestamp)) END
                FROM impressions {_at(published.snapshot)}
                SEMI JOIN asked USING (impression_id)
                """
            ).fetchall()
            connection.unregister("asked")
        found = {row[0]: Impression(*row) for row in rows}
        for one in found.values():
            if one.clicked_us is not None and known_us(one, published.rules) > published.end_us:
                one.clicked_us = None  # the log has it, and waits with it
        return found


def _at(snapshot: int | None) -> str:
    return "" if snapshot is None else f"AT (VERSION => {snapshot})"


def _impression(line: dict[str, Any]) -> Impression | None:
    """None for a line of something else."""
    try:
        return Impression(**line)
    except TypeError:
        return None
