"""Behaviors, impressions and clicks sent to a running service: the next answers take them into account.

A service started with `--live` holds the shallow layers as well. A behavior sent to it is written to the
home's push log before it is answered, and every worker of the home reads it there. For a user with such
behaviors a worker makes a `UserState` from the lake and appends them, encoding the texts that the lake has
no vector of. It keeps the state while it is used: a cache, which any worker can make anew. What the log has
by now is not appended again, and a behavior is let go when the published vector contains it. The log still
has to receive the same behaviors: this bridges the time between two publishes and does not replace ingest.
Impressions and clicks move statistics (serving.live_statistics).
"""

from __future__ import annotations

import threading
import time
from collections import ChainMap, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import torch

from bahe_core.errors import (
    BadInput,
    BaheError,
    Busy,
    Damaged,
    NotReady,
    NotWritable,
    UnknownEntity,
    Unreachable,
    clipped,
)
from bahe_core.home import Home
from bahe_core.results import Result
from bahe_lake.connection import lake
from bahe_models import Artifact, AtomicEncoder, UserState, encoder_version, load_backbone
from feast_ducklake import open_lake
from feast_ducklake.online.rows import Vectors
from feature_repo.behavior_counts import PAIR, counts_with, first_and_last
from feature_repo.by_item_columns import columns_counted
from feature_repo.item_keys import reference_of
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import home_dataset
from materialize.ingest.atoms import ATOM_ID, NORMAL_TEXT
from materialize.vectors.encoder_versions import recorded_settings
from materialize.vectors.stored_atoms import vectors_of
from materialize.vectors.timelines import read_user
from serving.journal import PATIENCE
from serving.live_statistics import MARGIN, OLD, REST, Impression, LiveStatistics, counts_beside, too_old
from serving.lookup import Identifier, OnlineLookup, UserFeatures, id_as
from serving.push_log import Pushed, PushLog
from serving.request_log import RequestLog

STATES = 256
"""Users whose states are kept; with SmolLM2 a full window of 512 behaviors takes about 3 MB."""
ATOMS = 10_000
"""Atoms whose vectors are kept, 23 MB with SmolLM2."""
AGAIN = 512
"""Latest behaviors of a channel in which one that is sent again, or was ingested since, is sought."""
AHEAD = MARGIN
"""How far a sender's clock may be ahead. A behavior of the far future would refuse all after it."""
_LAKE_FAILS = (Unreachable, Damaged, NotWritable)
_NO_ID = "impression {} is no id of this log's impressions."
_AHEAD = "{what} at {at} has not happened yet; correct its time."
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class _Fresh:
    """A user's state and the features read from it."""

    state: UserState
    model_version: str
    stored_behaviors: int
    """Behaviors in the stored vector when the state was built."""
    lengths: tuple[int, ...]
    vector: np.ndarray
    in_lake: frozenset[tuple[str, int, int]]
    """Channel, atom and time of the lake's behaviors that may be sent again: the latest of the timeline."""
    unpublished: frozenset[tuple[str, int, int]]
    """Those of them that were ingested since the publish: what came in order is at the timeline's end."""
    taken: tuple[Pushed, ...] = ()
    """The pushed behaviors that are in the state, or were passed over."""
    acts: tuple[_Act, ...] = ()
    """Those of them that the online store does not have, as they came."""


@dataclass(frozen=True)
class _Act:
    """What a user did with some items."""

    of: Mapping[str, frozenset[Any]]
    """PAIR: the item, or all of the behavior's very text where it names none; by column of items that the
    model's counts are by, what these have there."""
    channel: str
    time_us: int


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


@dataclass(frozen=True)
class TakenIn(Result):
    """What became of impressions or clicks that were sent."""

    new: int
    known: int
    """Sent before, or published; they count once."""
    refused: dict[int, str]
    """Why, by place."""


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
        self._most = states
        self._fresh: OrderedDict[Identifier, _Fresh] = OrderedDict()
        self._fresh_lock = threading.Lock()
        self._appending = threading.RLock()  # a state belongs to one thread at a time
        self._lake_from = 0.0
        """When the lake may be read again, by the monotonic clock."""
        self._vectors_from = 0.0
        """The same of the lake that Feast keeps attached."""
        self._pushes = PushLog(home)
        self._impressions = LiveStatistics(home)
        with suppress(NotReady):  # requests that need it say so
            self._impressions.published()
        self._atoms: dict[int, np.ndarray] = {}
        """Vectors of the lake, the newest last."""
        self._encoded_here: dict[int, np.ndarray] = {}
        """Of texts that the lake did not have."""
        self._encoded_under: dict[Identifier, str] = {}
        """The catalogue of that time, another one after a publish."""
        self._by_text: tuple[dict[Identifier, str], dict[str, list[Identifier]]] = ({}, {})
        """A catalogue, and the items of each of its texts."""
        self._columns: tuple[str, Sequence[str]] = ("", ())
        """A model_version, and the columns of items by which it reads what a user did."""
        self._sql = duckdb.connect()
        self._encoder, self._encoder_version = self._load_encoder(self.artifact(self.live_version()))
        self._check_encoder(self.artifact(self.live_version()))

    def user(self, user_id: Identifier) -> UserFeatures:
        """A user's features, with the behaviors sent here. Raises UnknownEntity as `OnlineLookup.user`."""
        stored = self._with_impressions(super().user(user_id))
        pushed = self._pushes.of_user(stored.user_id)
        if not pushed:
            return stored
        # Whatever the lake says: it may have them already, and the store not yet.
        named = {str(one.item_id) for one in pushed if one.item_id is not None}
        stored = replace(stored, seen_items=stored.seen_items | named)
        try:
            fresh = self._up_to_date(stored)
        except (NotReady, Busy, *_LAKE_FAILS):
            # The lake is being written to, is away, or reads another encoder: what is published answers.
            return stored
        if self._published(stored, fresh):
            self._pushes.drop(stored.user_id, fresh.taken)
            with self._fresh_lock:
                self._fresh.pop(stored.user_id, None)
            return stored
        return self._with(stored, fresh)

    def empty_user(self, user_id: Identifier) -> UserFeatures:
        """`OnlineLookup.empty_user`, with the impressions sent here."""
        return self._with_impressions(super().empty_user(user_id))

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

    def _published(self, stored: UserFeatures, fresh: _Fresh) -> bool:
        """Whether the published vector has all that was pushed."""
        channels = self.artifact(stored.model_version).dense.channels
        return sum(fresh.lengths) == stored.behaviors and all(
            one.channel not in channels or _key(one) in fresh.in_lake for one in fresh.taken
        )

    def _with(self, stored: UserFeatures, fresh: _Fresh) -> UserFeatures:
        channels = self.artifact(stored.model_version).dense.channels
        named = {f"length_{channel}": float(n) for channel, n in zip(channels, fresh.lengths, strict=True)}
        return replace(
            stored,
            cold=False,
            behaviors=sum(fresh.lengths),
            vector=fresh.vector,
            statistics={**stored.statistics, **named},
        )

    def items(
        self, items: Sequence[Identifier], version: str, user_id: Identifier | None = None
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """Those of `OnlineLookup.items`, with the impressions that were sent; those of what a user did
        with what the user did since the publish.

        All of that counts in every window: a service is published to more often than once in the shortest.
        A behavior that names no item is with the items that have its text now.
        """
        vectors, values = super().items(items, version, user_id)
        self._impressions.move("item", items, values)
        with self._fresh_lock:
            fresh = None if user_id is None else self._fresh.get(user_id)
        if not items or fresh is None or fresh.model_version != version:
            return vectors, values
        channels = self.artifact(version).dense.channels
        _count(fresh.acts, PAIR, list(map(str, items)), channels, values)
        for column in self._columns_counted(version):
            _count(fresh.acts, column, values[column], (), values)
        return vectors, values

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
        stored = super().user(user_id)
        artifact = self.artifact(stored.model_version)
        channels = artifact.dense.channels
        if channel not in channels:
            raise BadInput(f"channel {clipped(channel)} is not known; choose from {', '.join(channels)}.")
        if item_id is not None:
            item_id = self._as_stored("item_embedding", "item_id", item_id)
            if item_id not in self.catalogue():
                raise UnknownEntity(
                    f"item {clipped(item_id)} is not among the items; leave it out, or publish it first."
                )
        normal, atom_id = self._atom(channel, text)
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
        self._up_to_date(stored)  # the lake is not read while all other workers wait
        with self._pushes.exclusive():
            fresh = self._up_to_date(stored)
            if _key(behavior) not in fresh.in_lake and not self._pushes.has(behavior):
                if not fresh.state.takes(channels.index(channel), behavior.time_us):
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
            user_id = self._stored_id("user_embedding", "user_id", one.user_id)
            item_id = self._stored_id("item_embedding", "item_id", one.item_id)
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

    def _up_to_date(self, stored: UserFeatures) -> _Fresh:
        """The user's state with all that was pushed.

        Raises Busy when other requests keep the states, and NotReady, Unreachable, Damaged or NotWritable
        when it has to be made and the lake cannot be read.
        """
        fresh = self._kept(stored)
        if fresh is not None and fresh.taken == self._pushes.of_user(stored.user_id):
            return fresh
        with self._in_turn():
            artifact = self.artifact(stored.model_version)
            # Looked at again: another thread may have let go of some meanwhile.
            pushed, fresh = self._pushes.of_user(stored.user_id), self._kept(stored)
            if fresh is None or fresh.taken != pushed[: len(fresh.taken)]:
                fresh = self._from_lake(stored, artifact)
            return self._keep(stored, self._advanced(fresh, pushed, artifact))

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._appending.acquire(timeout=PATIENCE):
            raise Busy(f"other requests have kept the users' states for {PATIENCE:g} s; try again.")
        try:
            yield
        finally:
            self._appending.release()

    def _keep(self, stored: UserFeatures, fresh: _Fresh) -> _Fresh:
        with self._fresh_lock:
            self._fresh[stored.user_id] = fresh
            self._fresh.move_to_end(stored.user_id)
            while len(self._fresh) > self._most:
                self._fresh.popitem(last=False)
        return fresh

    def _kept(self, stored: UserFeatures) -> _Fresh | None:
        """The user's state, unless a publish has overtaken it."""
        with self._fresh_lock:
            fresh = self._fresh.get(stored.user_id)
            if fresh is None:
                return None
            if fresh.model_version != stored.model_version:
                self._fresh.clear()  # all are of a model that is live no more
                return None
            if fresh.stored_behaviors != stored.behaviors:
                del self._fresh[stored.user_id]
                return None
            self._fresh.move_to_end(stored.user_id)
            return fresh

    def _advanced(self, fresh: _Fresh, pushed: Sequence[Pushed], artifact: Artifact) -> _Fresh:
        """The state with the behaviors that it does not have yet."""
        self._check_encoder(artifact)
        channels, acts = artifact.dense.channels, list(fresh.acts)
        new = [one for one in pushed[len(fresh.taken) :] if one.channel in channels]
        acts += [self._act(one, fresh.model_version) for one in new if _key(one) in fresh.unpublished]
        lacking = [one for one in new if _key(one) not in fresh.in_lake]
        # All of them before the state is touched, which a failure must not leave half done.
        atoms = self._encoded(lacking)
        of_lacking = [self._act(one, fresh.model_version) for one in lacking]
        for one, act in zip(lacking, of_lacking, strict=True):
            number = channels.index(one.channel)
            # In order when it came, but the log has got later ones since: an ingest puts it in its place.
            if not fresh.state.takes(number, one.time_us):
                continue
            fresh.state.append(number, torch.from_numpy(atoms[one.atom_id]), one.time_us, one.atom_id)
            acts.append(act)
        return replace(
            fresh,
            lengths=fresh.state.lengths,
            vector=fresh.state.vector().cpu().numpy(),
            taken=tuple(pushed),
            acts=tuple(acts),
        )

    def _act(self, behavior: Pushed, version: str) -> _Act:
        named = behavior.item_id
        items = [named] if named is not None else self._items_of(behavior.text)
        of = {PAIR: frozenset(map(str, items))}
        columns = self._columns_counted(version)
        if items and columns:
            values = self.read(list(map(reference_of, columns)), {"item_id": items})
            of |= {column: frozenset(values[column]) - {None} for column in columns}
        return _Act(of, behavior.channel, behavior.time_us)

    def _columns_counted(self, version: str) -> Sequence[str]:
        """Columns of items by which the model reads what a user did."""
        known = self._columns  # another request may put another version's in its place
        if known[0] != version:
            known = version, columns_counted(self._store, self.references(version)["attribute"])
            self._columns = known
        return known[1]

    def _encoded(self, behaviors: Sequence[Pushed]) -> dict[int, np.ndarray]:
        """Vectors by atom; those of late are kept, since many people do the same things.

        Those of the lake, from which a model has learned. What is encoded here answers until the next
        publish: in half precision some processors (Intel's AMX) give a text that is encoded alone other
        numbers than beside others.
        """
        catalogue = self.catalogue()
        if self._encoded_under is not catalogue:  # since another publish the lake may have them
            self._encoded_under, self._encoded_here = catalogue, {}
        known = ChainMap(self._atoms, self._encoded_here)
        new = {one.atom_id: one for one in behaviors if one.atom_id not in known}
        if new:
            stored = self._stored_vectors(list(new))
            self._atoms |= stored
            new = {atom: one for atom, one in new.items() if atom not in stored}
        if new:
            channels, texts = [o.channel for o in new.values()], [o.text for o in new.values()]
            self._encoded_here |= dict(zip(new, self._encoder.encode(channels, texts), strict=True))
        found = {one.atom_id: known[one.atom_id] for one in behaviors}
        for kept in known.maps:
            while len(kept) > ATOMS:
                del kept[next(iter(kept))]
        return found

    def _stored_vectors(self, atoms: Sequence[int]) -> dict[int, np.ndarray]:
        """The lake's vectors of those of these atoms that it has; of none while it cannot be read."""
        begun = time.monotonic()
        if begun < max(self._vectors_from, self._lake_from):
            return {}
        try:
            with open_lake(self._store.config) as connection:
                return vectors_of(connection, self._encoder_version, atoms)
        except (BaheError, duckdb.Error):
            # Others wait meanwhile: what failed slowly is tried seldom.
            now = time.monotonic()
            self._vectors_from = now + max(REST, 10 * (now - begun))
            return {}

    def _items_of(self, text: str) -> list[Identifier]:
        catalogue = self.catalogue()
        if self._by_text[0] is not catalogue:
            by_text: dict[str, list[Identifier]] = {}
            for item, its in catalogue.items():
                by_text.setdefault(its, []).append(item)
            self._by_text = catalogue, by_text
        return self._by_text[1].get(text, [])

    def _from_lake(self, stored: UserFeatures, artifact: Artifact) -> _Fresh:
        self._check_encoder(artifact)
        channels = artifact.dense.channels
        if time.monotonic() < self._lake_from:
            raise NotReady(f"the lake of {self._home.root} failed a moment ago; try again in {REST:g} s.")
        try:
            with lake(self._home) as connection:
                atoms_CLD, time_us_CL, atom_ids_CL = read_user(
                    connection, artifact.encoder_version, stored.user_id, channels
                )
        except _LAKE_FAILS:
            self._lake_from = time.monotonic() + REST
            raise
        width = self._encoder.width
        state = UserState(
            artifact.model,
            artifact.window,
            [torch.from_numpy(vectors.reshape(-1, width)) for vectors in atoms_CLD],
            time_us_CL,
            atom_ids_CL,
        )
        in_lake: set[tuple[str, int, int]] = set()
        unpublished: set[tuple[str, int, int]] = set()
        for channel, atom_ids_L, time_us_L in zip(channels, atom_ids_CL, time_us_CL, strict=True):
            latest = [
                (channel, int(atom), int(time_us))
                for atom, time_us in zip(atom_ids_L[-AGAIN:], time_us_L[-AGAIN:], strict=True)
            ]
            since = len(atom_ids_L) - int(stored.statistics[f"length_{channel}"] or 0)
            in_lake.update(latest)
            unpublished.update(latest[-since:] if since > 0 else ())
        return _Fresh(
            state=state,
            model_version=stored.model_version,
            stored_behaviors=stored.behaviors,
            lengths=state.lengths,
            vector=stored.vector,
            in_lake=frozenset(in_lake),
            unpublished=frozenset(unpublished),
        )

    def _atom(self, channel: str, text: str) -> tuple[str, int]:
        """The text as ingest keeps it, and the id that ingest gives it in this channel."""
        normal = NORMAL_TEXT.format(text="$text")
        cursor = self._sql.cursor()  # a connection is for one thread at a time
        row = cursor.execute(
            f"SELECT {normal}, {ATOM_ID.format(channel='$channel', text=normal)}",
            {"text": text, "channel": channel},
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    def _load_encoder(self, artifact: Artifact) -> tuple[AtomicEncoder, str]:
        """The encoder of the vectors that the model reads, which dataset.yaml may no longer describe."""
        with lake(self._home) as connection:
            recorded = recorded_settings(connection, artifact.encoder_version)
        backbone, settings = recorded or encoder_settings(home_dataset(self._home))
        halves = load_backbone(backbone)
        version = encoder_version(halves, settings, backbone.shallow_layers)
        return AtomicEncoder(halves, settings), version

    def _check_encoder(self, artifact: Artifact) -> None:
        """Load the live model's encoder when a publish has changed it."""
        if self._encoder_version != artifact.encoder_version:
            self._encoder, self._encoder_version = self._load_encoder(artifact)
            self._atoms, self._encoded_here = {}, {}
        if self._encoder_version != artifact.encoder_version:
            raise NotReady(
                f"{artifact.model_version} reads vectors of {artifact.encoder_version}, but"
                f" {self._home.root}/dataset.yaml now describes {self._encoder_version}; publish a model"
                " of it, or serve without --live."
            )


def _count(
    acts: Iterable[_Act],
    of: str,
    candidates: Sequence[Any],
    channels: Sequence[str],
    values: Mapping[str, list[Any]],
) -> None:
    """Add to each candidate's columns of `values` the acts that it shares: those `of` the same thing.

    `channels` are those that are counted each by itself, too.
    """
    counts = counts_with(of, channels)
    shared: dict[Any, list[_Act]] = {}
    for act in acts:
        for one in act.of.get(of, ()):
            shared.setdefault(one, []).append(act)
    for place, candidate in enumerate(candidates):
        its = shared.get(candidate)
        if its is None:
            continue
        for column, channel in counts.items():
            if column in values:
                came = sum(channel in (None, act.channel) for act in its)
                values[column][place] = (values[column][place] or 0) + came
        # Channels that are read apart may come out of order.
        times = [act.time_us for act in its]
        for column, chosen in zip(first_and_last(of), (min, max), strict=True):
            if column in values:
                stored = values[column][place]
                values[column][place] = chosen(times if stored is None else [stored, *times])


def _aware(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _key(behavior: Pushed) -> tuple[str, int, int]:
    return behavior.channel, behavior.atom_id, behavior.time_us
