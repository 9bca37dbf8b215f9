"""Impressions and clicks sent to a running service: statistics count them until a publish has them.

A publish writes the statistics of the log as it found it, and says what they count. What is sent afterwards
is written to the home's journal before it is answered, and every worker adds it to what the store says: to
the counts of the user and of the item, to their smoothed click rates, and to the time of the latest
impression. What the next publish counts is let go of. The log still has to receive the same impressions and
clicks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bahe_core.errors import BaheError, NotReady
from bahe_core.home import Home
from materialize.release import counted
from materialize.release.counted import Counted
from serving.live.journal import Journal
from serving.live.published_impressions import Impression, InLog, PublishedImpressions
from serving.live.sent_counts import Columns, SentCounts
from serving.lookup.identifiers import Identifier
from serving.lookup.tolerances import MARGIN

KEEP = timedelta(days=7)
"""The shortest window of statistics: what is counted here is counted in each of them. What no publish has
so long after it was sent, the log never got."""
_NOT_SENT = "is neither published nor sent; send it first"
_BEFORE = "was shown after that click; correct the time"
OLD = f"is of more than {KEEP.days} days before the log's end; leave it to the next ingest"
_FINAL = "is published as not clicked, which only a log with clicked_timestamp can correct"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Edition:
    """Which publish this is beyond, and by which rules."""

    file: tuple[int, int]
    """Inode and time of the file that says so."""
    counted: Counted
    day: str
    """What was sent long before is let go of once a day."""


def too_old(moment_us: int, base: Counted) -> bool:
    """Whether something would not count in each window."""
    return moment_us < base.log_end_us - KEEP // timedelta(microseconds=1)


class LiveStatistics:
    """Safe to use from several threads; each worker of a home has its own.

    One thread at a time reads the lake, and meanwhile the others answer with what is counted. No failure of
    it reaches a reader.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._journal = Journal(home.pushed / "impressions")
        self._in_log = PublishedImpressions(home)
        self._lock = threading.Lock()
        """Of what follows; held for no longer than it takes to count."""
        self._edition: _Edition | None = None
        self._sent = SentCounts()
        self._in_question: list[Impression] = []
        """Read, and perhaps counted by the publish."""
        self._waiting: list[InLog] | None = None
        """Clicks of the publish that it does not count yet; None until they are read."""
        self._settling = threading.Lock()

    def move(self, entity: str, identifiers: Sequence[Identifier], values: Columns) -> None:
        """Add to the statistics of `user`s or `item`s what was sent of them.

        `values` are what the online store says, by column, with the impressions and clicks beside each
        click rate; they are changed in place.
        """
        self._bring_up_to_date()
        with self._lock:
            if self._edition is not None:
                self._sent.add_to(values, entity, identifiers, self._edition.counted)

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
        self._sent, self._in_question = SentCounts(), []
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
        if settled or self._in_log.pause.on or not self._settling.acquire(blocking=False):
            return
        try:
            self._settle()
        except Exception as error:  # whatever it is, what is counted answers
            self._in_log.pause.begin()
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
                self._in_log.pause.begin()
                return
            self._journal.tidy(_kept_for(base))
            with self._lock:
                self._adopt(_Edition(file, base, _today()))
        edition = self._edition
        assert edition is not None
        if self._waiting is None:
            waiting = self._in_log.clicks_waiting(edition.counted)
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

    def _of_publish(self, impression_ids: Sequence[Identifier]) -> dict[Identifier, InLog]:
        """Those of the impressions that the publish has."""
        edition = self._edition
        return {} if edition is None else self._in_log.of(edition.counted, impression_ids)


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
