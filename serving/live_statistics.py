"""Impressions and clicks sent to a running service: statistics count them until a publish has them.

A publish writes the statistics of the log as it found it, and says what they count. What is sent afterwards
is written to the home's journal before it is answered, and every worker adds it to what the store says: to
the counts of the user and of the item, to their smoothed click rates, and to the time of the latest
impression. What the next publish counts is let go of. The log still has to receive the same impressions and
clicks.
"""

from __future__ import annotations

import heapq
import logging
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

from bahe_core.errors import BaheError, NotReady, one_line
from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.config.dataset import CLICKED_AT
from materialize.ingest.statistics import WINDOW_DAYS, log_rate, rate_before, smoothed_rate
from materialize.release import counted
from materialize.release.counted import Counted
from serving.journal import Journal

Identifier = str | int
Columns = dict[str, list[Any]]

KEEP = timedelta(days=7)
"""The shortest window of statistics: what is counted here is counted in each of them. What no publish has
so long after it was sent, the log never got."""
MARGIN = timedelta(minutes=5)
"""How much later than in the log an impression may be said to have been shown."""
REST = 5.0
"""Seconds, at least, that the lake is left alone after it could not say what the publish has."""
_WINDOWS = ("", *(f"_{days}d" for days in WINDOW_DAYS))
_ENTITIES = ("user", "item")
_NOT_SENT = "is neither published nor sent; send it first"
_BEFORE = "was shown after that click; correct the time"
OLD = f"is of more than {KEEP.days} days before the log's end; leave it to the next ingest"
_FINAL = "is published as not clicked, which only a log with clicked_timestamp can correct"
_log = logging.getLogger(__name__)


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
class _InLog:
    """An impression as the publish has it."""

    shown: Impression
    click_counted: bool

    def lacks_click(self, base: Counted) -> bool:
        """Whether a click of it is still to count: the log tells of one later only by its time."""
        return not self.click_counted and (base.click_times or self.shown.clicked_us is not None)


@dataclass(slots=True)
class _Counts:
    """Of a user or an item, beyond the publish."""

    shown: int = 0
    clicks: int = 0
    last_shown_us: int | None = None
    latest_us: int = 0
    """The latest event: a smoothed rate starts from the log's rate at that moment."""


@dataclass(frozen=True)
class _Edition:
    """Which publish this is beyond, and by which rules."""

    file: tuple[int, int]
    """Inode and time of the file that says so."""
    counted: Counted
    day: str
    """What was sent long before is let go of once a day."""


@dataclass
class _Sent:
    """What was sent and the publish does not count, counted."""

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

    def take(self, sent: Impression, in_log: _InLog | None, base: Counted) -> None:
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
            heapq.heappush(self.later, (moment_us, str(kept.impression_id), kept))
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
                counts.last_shown_us = max(counts.last_shown_us or moment_us, moment_us)


def too_old(moment_us: int, base: Counted) -> bool:
    """Whether something would not count in each window."""
    return moment_us < base.log_end_us - KEEP // timedelta(microseconds=1)


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

    One thread at a time reads the lake, and meanwhile the others answer with what is counted. No failure of
    it reaches a reader.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._journal = Journal(home.pushed / "impressions")
        self._lock = threading.Lock()
        """Of what follows; held for no longer than it takes to count."""
        self._edition: _Edition | None = None
        self._sent = _Sent()
        self._in_question: list[Impression] = []
        """Read, and perhaps counted by the publish."""
        self._waiting: list[_InLog] | None = None
        """Clicks of the publish that it does not count yet; None until they are read."""
        self._settling = threading.Lock()
        self._not_before = 0.0
        """When the lake may be read again, by the monotonic clock."""

    def move(self, entity: str, identifiers: Sequence[Identifier], values: Columns) -> None:
        """Add to the statistics of `user`s or `item`s what was sent of them.

        `values` are what the online store says, by column, with the impressions and clicks beside each
        click rate; they are changed in place.
        """
        self._bring_up_to_date()
        with self._lock:
            of, edition = self._sent.of[entity], self._edition
            if not of or edition is None:
                return
            places = [place for place, identifier in enumerate(identifiers) if identifier in of]
            for window in _WINDOWS if places else ():
                self._move_window(edition.counted, places, identifiers, values, entity, window)
            last = values.get(f"{entity}_last_impression_us")
            if last is not None:
                for place in places:
                    sent_us = of[identifiers[place]].last_shown_us
                    if sent_us is not None:
                        last[place] = max(sent_us, last[place] or sent_us)

    def _move_window(
        self,
        base: Counted,
        places: Sequence[int],
        identifiers: Sequence[Identifier],
        values: Columns,
        entity: str,
        window: str,
    ) -> None:
        shown, clicks, rate = (
            values.get(f"{entity}_{kind}{window}") for kind in ("impressions", "clicks", "click_rate")
        )
        of, sent = self._sent.of[entity], self._sent
        for place in places:
            counts = of[identifiers[place]]
            if rate is not None and shown is not None and clicks is not None:
                before = clicks[place] or 0, shown[place] or 0
                if counts.latest_us > base.log_end_us or rate[place] is None:
                    start = log_rate(
                        base.clicks + bisect_right(sent.clicked_us, counts.latest_us),
                        base.impressions + bisect_right(sent.shown_us, counts.latest_us),
                    )
                else:
                    start = rate_before(rate[place], *before)
                rate[place] = smoothed_rate(before[0] + counts.clicks, before[1] + counts.shown, start)
            for column, came in ((shown, counts.shown), (clicks, counts.clicks)):
                if column is not None:
                    column[place] = (column[place] or 0) + came

    def clicked_items(self, user_id: Identifier) -> frozenset[str]:
        """Items that the user clicked, of the clicks that were sent before the last `move`."""
        with self._lock:
            return frozenset(self._sent.clicked_items.get(user_id, ()))

    def published(self) -> Counted:
        """What the statistics that are online count. Raises NotReady when nobody can say."""
        self._bring_up_to_date()
        if self._edition is None:
            raise NotReady(
                f"what the statistics online of {self._home.root} count is not known; run `bahe publish`."
            )
        return self._edition.counted

    def show(self, impressions: Sequence[Impression]) -> int:
        """Take impressions in; how many are new. They are on disk when this returns.

        Raises NotReady as `published`, and Busy when another worker does not let go of the journal.
        """
        base = self.published()
        try:
            in_log = self._of_publish(
                [one.impression_id for one in impressions if _may_be_published(one, base)]
            )
        except BaheError:
            in_log = {}  # they are compared later
        with self._journal.exclusive():
            here = self._here([one.impression_id for one in impressions]).keys() | in_log.keys()
            new = {one.impression_id: one for one in impressions if one.impression_id not in here}
            self._write(new.values())
            return len(new)

    def click(self, clicks: Mapping[Identifier, int]) -> tuple[int, dict[Identifier, str]]:
        """Take in when impressions were clicked; how many clicks are new, and why others are refused.

        Raises NotReady, Unreachable, Damaged or NotWritable while it cannot be said what the publish has,
        and Busy as `show`.
        """
        base = self.published()
        before = self._here(clicks)
        in_log = self._of_publish([one for one in clicks if one not in before])
        with self._journal.exclusive():
            here = before | self._here(clicks)  # a publish may have let go of some meanwhile
            known = {i: one.shown for i, one in in_log.items()} | here
            refused = dict.fromkeys(clicks.keys() - known.keys(), _NOT_SENT)
            new = []
            for i, one in known.items():
                if clicks[i] < one.shown_us:
                    refused[i] = _BEFORE
                elif too_old(base.known_us(one.shown_us, clicks[i]), base):
                    refused[i] = OLD
                elif i not in here and one.clicked_us is None and not base.click_times:
                    refused[i] = _FINAL
                elif here[i].clicked_us is None if i in here else in_log[i].lacks_click(base):
                    new.append(replace(one, clicked_us=clicks[i]))
            self._write(new)
            return len(new), refused

    def _here(self, asked: Iterable[Identifier]) -> dict[Identifier, Impression]:
        """Those of the impressions that were sent, and that the publish does not have all of."""
        with self._lock:
            self._read_on()
            # Of two lines of one the later has the click.
            here = {one.impression_id: one for one in self._in_question}
            found = ((one, here.get(one) or self._sent.impressions.get(one)) for one in asked)
            return {one: impression for one, impression in found if impression is not None}

    def _write(self, impressions: Iterable[Impression]) -> None:
        lines = [asdict(one) | {"received": _today()} for one in impressions]
        if lines:
            self._journal.append(lines)

    def _read_on(self) -> None:
        """Count what came, unless the publish may count it; under the lock."""
        anew, lines = self._journal.read_on()
        if anew:
            self._begin()
        for one in filter(None, map(_impression, lines)):
            self._sort_in(one)
        self._sent.pass_time()

    def _begin(self) -> None:
        self._sent, self._in_question = _Sent(), []
        if self._edition is not None:
            for click in self._waiting or ():
                self._sent.take(click.shown, click, self._edition.counted)

    def _sort_in(self, one: Impression) -> None:
        base = self._edition.counted if self._edition else None
        if base is None:
            self._in_question.append(one)
        elif isinstance(one.impression_id, int) != base.integer_ids:
            return  # sent to another log that the home had
        elif one.impression_id in self._sent.impressions or not _may_be_published(one, base):
            self._sent.take(one, None, base)
        else:
            self._in_question.append(one)

    def _bring_up_to_date(self) -> None:
        with self._lock:
            self._read_on()
            settled = not self._in_question and self._waiting is not None and self._is_of_today()
        if settled or time.monotonic() < self._not_before or not self._settling.acquire(blocking=False):
            return
        try:
            self._settle()
        except Exception as error:  # whatever it is, what is counted answers
            self._not_before = max(self._not_before, time.monotonic() + REST)
            reason = error if isinstance(error, BaheError) else type(error).__name__
            _log.warning("impressions that were sent are not compared with the publish: %s", reason)
        finally:
            self._settling.release()

    def _is_of_today(self) -> bool:
        edition = self._edition
        return edition is not None and edition.file == self._file() and edition.day == _today()

    def _file(self) -> tuple[int, int] | None:
        try:
            stat = self._home.counted.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _settle(self) -> None:
        """Begin anew beyond another publish, and ask the lake about what is in question."""
        if not self._is_of_today():
            file, base = self._file(), counted.read(self._home)
            if file is None or base is None:
                self._not_before = time.monotonic() + REST
                return
            self._journal.tidy(_kept_for(base))
            with self._lock:
                self._adopt(_Edition(file, base, _today()))
        edition = self._edition
        assert edition is not None
        if self._waiting is None:
            waiting = self._clicks_waiting(edition)
            with self._lock:
                self._waiting = waiting
                for click in waiting:
                    self._sent.take(click.shown, click, edition.counted)
        with self._lock:
            asked = list(self._in_question)
        in_log = self._of_publish([one.impression_id for one in asked])
        with self._lock:
            # What came meanwhile, or came again after a cut, is asked about next.
            done = set(map(id, asked))
            self._in_question = [one for one in self._in_question if id(one) not in done]
            for one in asked:
                self._sent.take(one, in_log.get(one.impression_id), edition.counted)

    def _adopt(self, edition: _Edition) -> None:
        """Count what was sent beyond an edition; of a day that only began, let go of what is too old."""
        before, self._edition = self._edition, edition
        oldest = f"{datetime.now(UTC) - _kept_for(edition.counted):%Y-%m-%d}"
        every = [one for one in self._sent.impressions.values() if one.received] + self._in_question
        kept = [one for one in every if one.received >= oldest]
        if before is not None and before.file == edition.file and len(kept) == len(every):
            return
        if before is None or before.file != edition.file:
            self._waiting = None
        self._begin()
        for one in kept:
            self._sort_in(one)

    def _of_publish(self, impression_ids: Sequence[Identifier]) -> dict[Identifier, _InLog]:
        """Those of the impressions that the publish has."""
        edition = self._edition
        if not impression_ids or edition is None:
            return {}
        condition = "impression_id IN (SELECT impression_id FROM asked)"
        return {one.shown.impression_id: one for one in self._read_log(edition, condition, impression_ids)}

    def _clicks_waiting(self, edition: _Edition) -> list[_InLog]:
        """Clicks that the publish has and does not count, as they were not known yet at the log's end."""
        base = edition.counted
        if not base.label_delay_us:
            return []
        return self._read_log(edition, f"clicked = 1 AND epoch_us({base.label_time}) > {base.log_end_us}")

    def _read_log(
        self, edition: _Edition, condition: str, asked: Sequence[Identifier] = ()
    ) -> list[_InLog]:
        """Impressions of the publish. Raises NotReady where the lake failed a moment ago, or fails now."""
        if time.monotonic() < self._not_before:
            raise NotReady(f"the lake of {self._home.root} failed a moment ago; send it again.")
        base, start = edition.counted, time.monotonic()
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
                    rows = connection.execute(
                        query.format(at=f"AT (VERSION => {base.snapshot})")
                    ).fetchall()
                except duckdb.InvalidInputException as error:
                    if "No snapshot found" not in str(error):
                        raise
                    rows = connection.execute(
                        query.format(at="")
                    ).fetchall()  # compacted away: as it is now
                connection.unregister("asked")
        except (BaheError, duckdb.Error) as error:
            # A server that is away takes long to say so, and must not keep more than one thread of many.
            taken = time.monotonic() - start
            self._not_before = time.monotonic() + max(REST, 10 * taken)
            if isinstance(error, BaheError):
                raise
            raise NotReady(f"the lake of {self._home.root} cannot be read ({one_line(error)}).") from None
        return [_InLog(Impression(*row[:5]), row[5]) for row in rows]


def _may_be_published(one: Impression, base: Counted) -> bool:
    """Whether the publish may have it: clocks differ, and the log may have other fractions of a second."""
    return one.shown_us <= base.log_end_us + MARGIN // timedelta(microseconds=1)


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


def _kept_for(base: Counted) -> timedelta:
    return KEEP + timedelta(microseconds=base.label_delay_us)


def _impression(line: dict[str, Any]) -> Impression | None:
    """None for a line of something else."""
    try:
        return Impression(**line)
    except TypeError:
        return None
