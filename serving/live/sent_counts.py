"""Impressions and clicks that were sent and no publish counts yet: counted, and added to the statistics."""

from __future__ import annotations

import heapq
import time
from array import array
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from materialize.ingest.statistics import WINDOW_DAYS, log_rate, rate_before, smoothed_rate
from materialize.release.counted import Counted
from serving.live.published_impressions import Impression, InLog
from serving.lookup.identifiers import Identifier

Columns = dict[str, list[Any]]

_WINDOWS = ("", *(f"_{days}d" for days in WINDOW_DAYS))
_ENTITIES = ("user", "item")


@dataclass(slots=True)
class _Counts:
    """Of a user or an item, beyond the publish."""

    shown: int = 0
    clicks: int = 0
    last_shown_us: int | None = None
    latest_us: int = 0
    """The latest event: a smoothed rate starts from the log's rate at that moment."""


@dataclass
class SentCounts:
    """For one thread at a time."""

    impressions: dict[Identifier, Impression] = field(default_factory=dict)
    clicked_items: defaultdict[Identifier, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By user."""
    _of: dict[str, defaultdict[Identifier, _Counts]] = field(
        default_factory=lambda: {entity: defaultdict(_Counts) for entity in _ENTITIES}
    )
    _shown_us: array[int] = field(default_factory=lambda: array("q"))
    _clicked_us: array[int] = field(default_factory=lambda: array("q"))
    """Times of all impressions, and of all clicks, in order."""
    _later: list[tuple[int, str, Impression]] = field(default_factory=list)
    """A heap of the clicks that are not known yet, by when they will be."""

    def take(self, sent: Impression, in_log: InLog | None, base: Counted) -> None:
        """Count an impression, and its click, unless the publish counts it, or it is here."""
        kept = self.impressions.get(sent.impression_id)
        if kept is None:
            if in_log is not None and (sent.clicked_us is None or not in_log.lacks_click(base)):
                return
            self.impressions[sent.impression_id] = kept = sent
            if in_log is None:
                self._count(kept, kept.shown_us, click=False)
        elif kept.clicked_us is None and sent.clicked_us is not None:
            kept.clicked_us = sent.clicked_us
        else:
            return
        if kept.clicked_us is not None:
            self.clicked_items[kept.user_id].add(str(kept.item_id))
            moment_us = base.known_us(kept.shown_us, kept.clicked_us)
            heapq.heappush(self._later, (moment_us, str(kept.impression_id), kept))
            self.pass_time()

    def pass_time(self) -> None:
        """Count the clicks that are known by now."""
        while self._later and self._later[0][0] <= time.time_ns() // 1000:
            moment_us, _, one = heapq.heappop(self._later)
            self._count(one, moment_us, click=True)

    def _count(self, one: Impression, moment_us: int, *, click: bool) -> None:
        insort(self._clicked_us if click else self._shown_us, moment_us)
        for entity, identifier in zip(_ENTITIES, (one.user_id, one.item_id), strict=True):
            counts = self._of[entity][identifier]
            counts.latest_us = max(counts.latest_us, moment_us)
            if click:
                counts.clicks += 1
            else:
                counts.shown += 1
                counts.last_shown_us = max(counts.last_shown_us or moment_us, moment_us)

    def add_to(
        self, values: Columns, entity: str, identifiers: Sequence[Identifier], base: Counted
    ) -> None:
        """Add what was sent of `user`s or `item`s to their statistics, by column, in place.

        These are what the online store says, with the impressions and clicks beside each click rate.
        """
        of = self._of[entity]
        if not of:
            return
        places = [place for place, identifier in enumerate(identifiers) if identifier in of]
        for window in _WINDOWS if places else ():
            self._add_in_window(values, entity, identifiers, base, places, window)
        last = values.get(f"{entity}_last_impression_us")
        if last is not None:
            for place in places:
                sent_us = of[identifiers[place]].last_shown_us
                if sent_us is not None:
                    last[place] = max(sent_us, last[place] or sent_us)

    def _add_in_window(
        self,
        values: Columns,
        entity: str,
        identifiers: Sequence[Identifier],
        base: Counted,
        places: Sequence[int],
        window: str,
    ) -> None:
        shown, clicks, rate = (
            values.get(f"{entity}_{kind}{window}") for kind in ("impressions", "clicks", "click_rate")
        )
        for place in places:
            counts = self._of[entity][identifiers[place]]
            if rate is not None and shown is not None and clicks is not None:
                before = clicks[place] or 0, shown[place] or 0
                if counts.latest_us > base.log_end_us or rate[place] is None:
                    start = log_rate(
                        base.clicks + bisect_right(self._clicked_us, counts.latest_us),
                        base.impressions + bisect_right(self._shown_us, counts.latest_us),
                    )
                else:
                    start = rate_before(rate[place], *before)
                rate[place] = smoothed_rate(before[0] + counts.clicks, before[1] + counts.shown, start)
            for column, came in ((shown, counts.shown), (clicks, counts.clicks)):
                if column is not None:
                    column[place] = (column[place] or 0) + came


def counts_beside(references: Sequence[str]) -> list[str]:
    """The counts that the click rates among the features (`view:feature`) are made of."""
    beside = []
    for entity in _ENTITIES:
        for window in _WINDOWS:
            view = f"{entity}_stats{window}"
            if f"{view}:{entity}_click_rate{window}" in references:
                beside += [f"{view}:{entity}_{count}{window}" for count in ("impressions", "clicks")]
    return beside
