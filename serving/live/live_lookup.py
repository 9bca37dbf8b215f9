"""Behaviors, impressions and clicks sent to a running service: the next answers take them into account.

A service started with `--live` holds the shallow layers as well. A behavior sent to it is written to the
home's push log before it is answered, and every worker of the home reads it there. It is appended to the
user's state (`user_states`), counted (`live_counts`), and let go when the published vector contains it. The
log still has to receive the same behaviors: this bridges the time between two publishes and does not
replace ingest. Impressions and clicks move statistics (`live_statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from bahe_core.errors import BadInput, NotReady, UnknownEntity, clipped
from bahe_core.home import Home
from feast_ducklake.online.rows import Vectors
from serving.live.atom_vectors import AtomVectors
from serving.live.live_counts import LiveCounts
from serving.live.live_statistics import OLD, LiveStatistics, too_old
from serving.live.published_impressions import Impression
from serving.live.push_log import Pushed, PushLog
from serving.live.sent_counts import counts_beside
from serving.live.user_states import NOT_NOW, LiveState, UserStates
from serving.lookup.answers import TakenIn, UserFeatures
from serving.lookup.identifiers import Identifier, id_as
from serving.lookup.lake_pause import LakePause
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog
from serving.lookup.tolerances import MARGIN

STATES = 256
"""Users whose states are kept; with SmolLM2 a full window of 512 behaviors takes about 3 MB."""
AHEAD = MARGIN
"""How far a sender's clock may be ahead. A behavior of the far future would refuse all after it."""
_NO_ID = "impression {} is no id of this log's impressions."
_AHEAD = "{what} at {at} has not happened yet; correct its time."
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An item that was shown to a user."""

    impression_id: Identifier
    """As the log will have it."""
    user_id: Identifier
    item_id: Identifier
    at: datetime
    """UTC unless it says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Clicked:
    """A click on an impression."""

    impression_id: Identifier
    at: datetime
    """UTC unless it says otherwise."""


class LiveLookup(OnlineLookup):
    """A lookup that also takes behaviors, impressions and clicks in.

    Raises NotReady when the live model's encoder is not here.
    """

    def __init__(
        self,
        home: Home,
        log: RequestLog | None = None,
        *,
        keep_items: bool = False,
        states: int = STATES,
    ) -> None:
        super().__init__(home, log, keep_items=keep_items)
        self._pushes = PushLog(home)
        self._impressions = LiveStatistics(home)
        with suppress(NotReady):  # requests that need it say so
            self._impressions.published()
        pause, artifact = LakePause(), self.artifact(self.live_version())
        self._atoms = AtomVectors(self.texts, self._store, self._catalogue, artifact, pause)
        self._counts = LiveCounts(self._store, self.online, self.models, self._catalogue)
        self._states = UserStates(
            home, self.models, self._pushes, self._atoms, self._counts, pause, most=states
        )

    def _up_to_date(self, user: UserFeatures) -> UserFeatures:
        """The user with the behaviors, impressions and clicks sent here."""
        stored = self._with_impressions(user)
        pushed = self._pushes.of_user(stored.user_id) if stored.known else ()
        if not pushed:
            return stored
        # Whatever the lake says: it may have them already, and the store not yet.
        named = {str(one.item_id) for one in pushed if one.item_id is not None}
        stored = replace(stored, seen_items=stored.seen_items | named)
        try:
            live = self._states.up_to_date(stored)
        except NOT_NOW:
            # The lake is being written to, is away, or reads another encoder: what is published answers.
            return stored
        if self._published(stored, live):
            self._pushes.drop(stored.user_id, live.taken)
            self._states.drop(stored.user_id)
            return stored
        return self._with(stored, live)

    def _with_impressions(self, stored: UserFeatures) -> UserFeatures:
        moved = {column: [value] for column, value in stored.statistics.items()}
        self._impressions.move("user", [stored.user_id], moved)
        return replace(
            stored,
            statistics={column: value for column, (value,) in moved.items()},
            seen_items=stored.seen_items | self._impressions.clicked_items(stored.user_id),
        )

    def _read_beside(self, references: Sequence[str]) -> list[str]:
        return counts_beside(references)

    def _published(self, stored: UserFeatures, live: LiveState) -> bool:
        """Whether the published vector has all that was pushed."""
        channels = self.artifact(stored.model_version).dense.channels
        return sum(live.lengths) == stored.behaviors and all(
            one.channel not in channels or one.key in live.in_lake for one in live.taken
        )

    def _with(self, stored: UserFeatures, live: LiveState) -> UserFeatures:
        channels = self.artifact(stored.model_version).dense.channels
        named = {f"length_{channel}": float(n) for channel, n in zip(channels, live.lengths, strict=True)}
        return replace(
            stored,
            cold=False,
            behaviors=sum(live.lengths),
            vector=live.vector,
            statistics={**stored.statistics, **named},
        )

    def _items_alone(
        self, items: Sequence[Identifier], version: str
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """Those of `OnlineLookup`, with the impressions that were sent."""
        vectors, values = super()._items_alone(items, version)
        self._impressions.move("item", items, values)
        return vectors, values

    def _add_sent(
        self,
        values: dict[str, list[Any]],
        items: Sequence[Identifier],
        version: str,
        user_id: Identifier,
    ) -> None:
        """A behavior that names no item is with the items that have its text now."""
        live = self._states.kept(user_id)
        if items and live is not None and live.model_version == version:
            self._counts.add_to(values, items, live.acts, version)

    def append(
        self,
        user_id: Identifier,
        channel: str,
        text: str,
        at: datetime,
        item_id: Identifier | None = None,
        *,
        event_id: str | None = None,
    ) -> UserFeatures:
        """Append a behavior, once however often it is sent; returns the user's features with it.

        It is on disk when this returns. `at` is UTC unless it says otherwise. `event_id` is the sender's
        name for it: the same one, or the same content, is the same behavior. Raises UnknownEntity when the
        user or item is not in the online store, and BadInput on an unknown channel, an empty text, or a
        time before the user's latest or in the future.
        """
        at = _aware(at)
        if at > datetime.now(UTC) + AHEAD:
            raise BadInput(_AHEAD.format(what="a behavior", at=at.isoformat()))
        stored = self._stored_user(user_id, "refuse")
        artifact = self.artifact(stored.model_version)
        channels = artifact.dense.channels
        if channel not in channels:
            raise BadInput(f"channel {clipped(channel)} is not known; choose from {', '.join(channels)}.")
        if item_id is not None:
            item_id = self.online.as_stored("item_embedding", "item_id", item_id)
            if item_id not in self.catalogue():
                raise UnknownEntity(
                    f"item {clipped(item_id)} is not among the items; leave it out, or publish it first."
                )
        normal, atom_id = self.texts.atom(channel, text)
        if not normal:
            raise BadInput(
                f"the text of user {clipped(user_id)}'s behavior is empty; say what the user did."
            )
        behavior = Pushed(
            user_id=stored.user_id,
            channel=channel,
            text=normal,
            atom_id=atom_id,
            time_us=_microseconds(at),
            item_id=item_id,
            event_id=event_id,
        )
        self._states.up_to_date(stored)  # the lake is not read while all other workers wait
        with self._pushes.exclusive():
            live = self._states.up_to_date(stored)
            if behavior.key not in live.in_lake and not self._pushes.has(behavior):
                if not live.state.takes(channels.index(channel), behavior.time_us):
                    raise BadInput(
                        f"a behavior at {at.isoformat()} does not follow the latest of user"
                        f" {clipped(user_id)}, and a service takes them in order only; leave it to the next"
                        " ingest."
                    )
                self._pushes.append(behavior)
        return self.user(user_id)

    def show(self, impressions: Sequence[Shown]) -> TakenIn:
        """Take impressions in: from the next answer on they count in the statistics of user and item.

        They are on disk when this returns. Those that are refused leave the others as they are.
        """
        refused: dict[int, str] = {}
        taken: list[Impression] = []
        catalogue, base, now = self.catalogue(), self._impressions.published(), datetime.now(UTC)
        for place, one in enumerate(impressions):
            impression_id = id_as(one.impression_id, integer=base.integer_ids)
            user_id = self.online.stored_id("user_embedding", "user_id", one.user_id)
            item_id = self.online.stored_id("item_embedding", "item_id", one.item_id)
            at = _aware(one.at)
            if impression_id is None:
                refused[place] = _NO_ID.format(clipped(one.impression_id))
            elif user_id is None:
                refused[place] = f"user {clipped(one.user_id)} is no id of this log's users."
            elif item_id is None or item_id not in catalogue:
                refused[place] = f"item {clipped(one.item_id)} is not among the items; publish it first."
            elif at > now + AHEAD:
                refused[place] = _AHEAD.format(what="an impression", at=at.isoformat())
            elif too_old(_microseconds(at), base):
                refused[place] = f"an impression at {at.isoformat()} {OLD}."
            else:
                taken.append(Impression(impression_id, user_id, item_id, _microseconds(at)))
        new = self._impressions.show(taken)
        return TakenIn(new, len(taken) - new, refused)

    def click(self, clicks: Sequence[Clicked]) -> TakenIn:
        """Take clicks on impressions in that were sent or are published, as `show`.

        A click counts from when the log would know it (`impressions.label_delay`), and an item that was
        clicked is recommended no more. Raises NotReady, Unreachable, Damaged or NotWritable while the lake
        cannot be asked for the impressions that were not sent.
        """
        refused: dict[int, str] = {}
        places: dict[Identifier, list[int]] = {}
        moments: dict[Identifier, int] = {}
        base, now = self._impressions.published(), datetime.now(UTC)
        for place, one in enumerate(clicks):
            impression_id, at = id_as(one.impression_id, integer=base.integer_ids), _aware(one.at)
            if impression_id is None:
                refused[place] = _NO_ID.format(clipped(one.impression_id))
            elif at > now + AHEAD:
                refused[place] = _AHEAD.format(what="a click", at=at.isoformat())
            else:
                places.setdefault(impression_id, []).append(place)
                moments.setdefault(impression_id, _microseconds(at))
        new, others = self._impressions.click(moments)
        for impression_id, reason in others.items():
            sentence = f"impression {clipped(impression_id)} {reason}."
            refused |= dict.fromkeys(places[impression_id], sentence)
        return TakenIn(new, len(clicks) - new - len(refused), dict(sorted(refused.items())))


def _aware(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)
