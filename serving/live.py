"""Behaviors sent to a running service: the user's next answer takes them into account.

A service started with `--live` holds the shallow layers as well. A behavior sent to it is written to the
home's push log before it is answered, and every worker of the home reads it there. For a user with such
behaviors a worker makes a `UserState` from the lake, encodes and appends them, and keeps it while it is
used: a cache, which any worker can make anew. What the log has by now is not appended again, and a behavior
is let go when the published vector contains it. The log still has to receive the same behaviors: this
bridges the time between two publishes and does not replace ingest.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import torch

from bahe_core.errors import BadInput, NotReady, UnknownEntity, clipped
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_models import Artifact, AtomicEncoder, UserState, encoder_version, load_backbone
from feast_ducklake.online.rows import Vectors
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import home_dataset
from materialize.ingest.atoms import ATOM_ID, NORMAL_TEXT
from materialize.ingest.channel_windows import PAIR_FIRST, PAIR_LAST, pair_counts
from materialize.vectors.encoder_versions import recorded_settings
from materialize.vectors.timelines import read_user
from serving.lookup import Identifier, OnlineLookup, UserFeatures
from serving.push_log import Pushed, PushLog
from serving.request_log import RequestLog

STATES = 256
"""Users whose states are kept; with SmolLM2 a full window of 512 behaviors takes about 3 MB."""
ATOMS = 10_000
"""Atoms whose vectors are kept, 23 MB with SmolLM2."""
AGAIN = 512
"""Latest behaviors of a channel in which one that is sent again, or was ingested since, is sought."""
AHEAD = timedelta(minutes=5)
"""How far a sender's clock may be ahead. A behavior of the far future would refuse all after it."""
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
    taken: int = 0
    """How many of the pushed behaviors are in the state, or were passed over."""
    acts: tuple[_Act, ...] = ()
    """Those in the state, as they came."""


@dataclass(frozen=True)
class _Act:
    """What a user did with some items."""

    item_ids: frozenset[str]
    """One, or all of the behavior's very text where it names none."""
    named: bool
    """Whether it named the item; only such an item counts as seen, as in the log."""
    channel: str
    time_us: int


class LiveLookup(OnlineLookup):
    """A lookup that also takes behaviors in. Raises NotReady when the live model's encoder is not here."""

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
        self._pushes = PushLog(home)
        self._atoms: dict[int, np.ndarray] = {}
        """Vectors of the encoder, the newest last."""
        self._by_text: tuple[dict[Identifier, str], dict[str, list[Identifier]]] = ({}, {})
        """A catalogue, and the items of each of its texts."""
        self._sql = duckdb.connect()
        self._encoder, self._encoder_version = self._load_encoder(self.artifact(self.live_version()))
        self._check_encoder(self.artifact(self.live_version()))

    def user(self, user_id: Identifier) -> UserFeatures:
        """A user's features, with the behaviors sent here. Raises UnknownEntity as `OnlineLookup.user`."""
        stored = super().user(user_id)
        pushed = self._pushes.of_user(stored.user_id)
        if not pushed:
            return stored
        try:
            fresh = self._fresh_of(stored, pushed)
        except (
            NotReady
        ):  # the lake is being written to, or reads another encoder: what is published answers
            return stored
        return stored if fresh is None else self._with(stored, fresh)

    def _with(self, stored: UserFeatures, fresh: _Fresh) -> UserFeatures:
        channels = self.artifact(stored.model_version).dense.channels
        named = {f"length_{channel}": float(n) for channel, n in zip(channels, fresh.lengths, strict=True)}
        return replace(
            stored,
            cold=False,
            behaviors=sum(fresh.lengths),
            vector=fresh.vector,
            statistics={**stored.statistics, **named},
            seen_items=stored.seen_items.union(*(act.item_ids for act in fresh.acts if act.named)),
        )

    def items(
        self, items: Sequence[Identifier], version: str, user_id: Identifier | None = None
    ) -> tuple[Vectors, dict[str, list[Any]]]:
        """Those of `OnlineLookup.items`; the pairs' with what the user did since the publish.

        All of that counts in every window: a service is published to more often than once in the shortest.
        """
        vectors, values = super().items(items, version, user_id)
        with self._fresh_lock:
            fresh = None if user_id is None else self._fresh.get(user_id)
        if fresh is None or fresh.model_version != version:
            return vectors, values
        counts = pair_counts(self.artifact(version).dense.channels)
        with_item: dict[str, list[_Act]] = {}
        for act in fresh.acts:
            for item in act.item_ids:
                with_item.setdefault(item, []).append(act)
        for place, item in enumerate(map(str, items)):
            acts = with_item.get(item)
            if acts is None:
                continue
            for column, channel in counts.items():
                if column in values:
                    came = sum(channel in (None, act.channel) for act in acts)
                    values[column][place] = (values[column][place] or 0) + came
            # Channels that are read apart may come out of order.
            times = [act.time_us for act in acts]
            for column, chosen in ((PAIR_FIRST, min), (PAIR_LAST, max)):
                if column in values:
                    stored = values[column][place]
                    values[column][place] = chosen(times if stored is None else [stored, *times])
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
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        if at > datetime.now(UTC) + AHEAD:
            raise BadInput(f"a behavior at {at.isoformat()} has not happened yet; correct its time.")
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
        with self._appending, self._pushes.exclusive():
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
                time_us=(at - _EPOCH) // timedelta(microseconds=1),
                item_id=item_id,
                event_id=event_id,
            )
            pushed = self._pushes.of_user(stored.user_id)
            fresh = self._fresh_of(stored, pushed) or self._keep(stored, self._from_lake(stored, artifact))
            again = (channel, atom_id, behavior.time_us) in fresh.in_lake
            if not again and not any(behavior.repeats(one) for one in pushed):
                if not fresh.state.takes(channels.index(channel), behavior.time_us):
                    raise BadInput(
                        f"a behavior at {at.isoformat()} does not follow the latest of user"
                        f" {clipped(user_id)}, and a service takes them in order only; leave it to the next"
                        " ingest."
                    )
                self._pushes.append(behavior)
        return self.user(user_id)

    def _fresh_of(self, stored: UserFeatures, pushed: Sequence[Pushed]) -> _Fresh | None:
        """The user's state with all that was pushed; None when the published vector has all of it."""
        if not pushed:
            return None
        fresh = self._kept(stored)
        if fresh is not None and fresh.taken == len(pushed):
            return fresh
        with self._appending:
            artifact = self.artifact(stored.model_version)
            fresh = self._kept(stored) or self._from_lake(stored, artifact)
            fresh = self._advanced(fresh, pushed, artifact)
            if not fresh.acts and sum(fresh.lengths) == stored.behaviors:
                self._pushes.drop(stored.user_id, fresh.taken)
                with self._fresh_lock:
                    self._fresh.pop(stored.user_id, None)
                return None
            return self._keep(stored, fresh)

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
        lacking = [
            one
            for one in pushed[fresh.taken :]
            if one.channel in channels and (one.channel, one.atom_id, one.time_us) not in fresh.in_lake
        ]
        # All of them before the state is touched, which a failure must not leave half done.
        atoms = self._encoded(lacking)
        for one in lacking:
            number = channels.index(one.channel)
            # In order when it came, but the log has got later ones since: an ingest puts it in its place.
            if not fresh.state.takes(number, one.time_us):
                continue
            fresh.state.append(number, torch.from_numpy(atoms[one.atom_id]), one.time_us, one.atom_id)
            items = [one.item_id] if one.item_id is not None else self._items_of(one.text)
            acts.append(_Act(frozenset(map(str, items)), one.item_id is not None, one.channel, one.time_us))
        return replace(
            fresh,
            lengths=fresh.state.lengths,
            vector=fresh.state.vector().cpu().numpy(),
            taken=len(pushed),
            acts=tuple(acts),
        )

    def _encoded(self, behaviors: Sequence[Pushed]) -> dict[int, np.ndarray]:
        """Vectors by atom; those of late are kept, since many people do the same things."""
        new = {one.atom_id: one for one in behaviors if one.atom_id not in self._atoms}
        if new:
            channels, texts = [o.channel for o in new.values()], [o.text for o in new.values()]
            self._atoms |= dict(zip(new, self._encoder.encode(channels, texts), strict=True))
        found = {one.atom_id: self._atoms[one.atom_id] for one in behaviors}
        for atom in list(self._atoms)[:-ATOMS]:
            del self._atoms[atom]
        return found

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
        with lake(self._home) as connection:
            atoms_CLD, time_us_CL, atom_ids_CL = read_user(
                connection, artifact.encoder_version, stored.user_id, channels
            )
        width = self._encoder.width
        state = UserState(
            artifact.model,
            artifact.window,
            [torch.from_numpy(vectors.reshape(-1, width)) for vectors in atoms_CLD],
            time_us_CL,
            atom_ids_CL,
        )
        in_lake = frozenset(
            (channel, int(atom), int(time_us))
            for channel, atom_ids_L, time_us_L in zip(channels, atom_ids_CL, time_us_CL, strict=True)
            for atom, time_us in zip(atom_ids_L[-AGAIN:], time_us_L[-AGAIN:], strict=True)
        )
        return _Fresh(state, stored.model_version, stored.behaviors, state.lengths, stored.vector, in_lake)

    def _atom(self, channel: str, text: str) -> tuple[str, int]:
        """The text as ingest keeps it, and the id that ingest gives it in this channel."""
        normal = NORMAL_TEXT.format(text="$text")
        row = self._sql.execute(
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
            self._atoms = {}
        if self._encoder_version != artifact.encoder_version:
            raise NotReady(
                f"{artifact.model_version} reads vectors of {artifact.encoder_version}, but"
                f" {self._home.root}/dataset.yaml now describes {self._encoder_version}; publish a model"
                " of it, or serve without --live."
            )
