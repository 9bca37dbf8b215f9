"""Behaviors sent to a running service: the user's next answer takes them into account.

A service started with `--live` holds the shallow layers as well. It encodes a behavior sent to it and
appends it to the user's `UserState`, which it builds from the lake for the user's first one. The states
live in this process only: they bridge the time between two publishes and do not replace ingest. A user's
state is dropped when another model goes live, when a publish brings a vector of other behaviors than the
one it started from, and when too many other users were active since.
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

from bahe_core.errors import BadInput, NotReady
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
from serving.request_log import RequestLog

STATES = 256
"""Users whose states are kept; with SmolLM2 a full window of 512 behaviors takes about 3 MB."""
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
    acts: tuple[_Act, ...] = ()
    """Behaviors sent here that are with an item, as they came."""


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

    def __init__(self, home: Home, log: RequestLog | None = None, *, states: int = STATES) -> None:
        super().__init__(home, log)
        self._most = states
        self._fresh: OrderedDict[Identifier, _Fresh] = OrderedDict()
        self._fresh_lock = threading.Lock()
        self._appending = threading.Lock()  # a state belongs to one thread at a time
        self._sql = duckdb.connect()
        self._encoder, self._encoder_version = self._load_encoder(self.artifact(self.live_version()))
        self._check_encoder(self.artifact(self.live_version()))

    def user(self, user_id: Identifier) -> UserFeatures:
        """A user's features, with the behaviors sent here. Raises UnknownEntity as `OnlineLookup.user`."""
        stored = super().user(user_id)
        fresh = self._fresh_of(stored)
        if fresh is None:
            return stored
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
        """Append a behavior (sent twice, it counts twice); returns the user's features with it.

        `at` is UTC unless it says otherwise. Raises UnknownEntity when the user is not in the online
        store, and BadInput on an unknown channel, an empty text or a time before the user's latest.
        """
        with self._appending:
            stored = super().user(user_id)
            artifact = self.artifact(stored.model_version)
            channels = artifact.dense.channels
            if channel not in channels:
                raise BadInput(f"channel {channel} is not known; choose from {', '.join(channels)}.")
            normal, atom_id = self._atom(channel, text)
            if not normal:
                raise BadInput(f"the text of user {user_id}'s behavior is empty; say what the user did.")
            self._check_encoder(artifact)
            fresh = self._fresh_of(stored) or self._from_lake(stored, artifact)
            atom_D = torch.from_numpy(self._encoder.encode([channel], [normal])[0])
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
            try:
                time_us = (at - _EPOCH) // timedelta(microseconds=1)
                fresh.state.append(channels.index(channel), atom_D, time_us, atom_id)
            except ValueError:
                raise BadInput(
                    f"a behavior at {at.isoformat()} does not follow the latest of user {user_id}, and a"
                    " service takes them in order only; leave it to the next ingest."
                ) from None
            with_items = [item_id] if item_id is not None else self._items_of(normal)
            act = _Act(frozenset(map(str, with_items)), item_id is not None, channel, time_us)
            with self._fresh_lock:
                self._fresh[stored.user_id] = replace(
                    fresh,
                    lengths=fresh.state.lengths,
                    vector=fresh.state.vector().cpu().numpy(),
                    acts=(*fresh.acts, act),
                )
                self._fresh.move_to_end(stored.user_id)
                while len(self._fresh) > self._most:
                    self._fresh.popitem(last=False)
        return self.user(user_id)

    def _fresh_of(self, stored: UserFeatures) -> _Fresh | None:
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

    def _items_of(self, text: str) -> list[Identifier]:
        return [item for item, its in self.catalogue().items() if its == text]

    def _from_lake(self, stored: UserFeatures, artifact: Artifact) -> _Fresh:
        with lake(self._home) as connection:
            atoms_CLD, time_us_CL, atom_ids_CL = read_user(
                connection, artifact.encoder_version, stored.user_id, artifact.dense.channels
            )
        width = self._encoder.width
        state = UserState(
            artifact.model,
            artifact.window,
            [torch.from_numpy(vectors.reshape(-1, width)) for vectors in atoms_CLD],
            time_us_CL,
            atom_ids_CL,
        )
        return _Fresh(state, stored.model_version, stored.behaviors, state.lengths, stored.vector)

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
        if self._encoder_version != artifact.encoder_version:
            raise NotReady(
                f"{artifact.model_version} reads vectors of {artifact.encoder_version}, but"
                f" {self._home.root}/dataset.yaml now describes {self._encoder_version}; publish a model"
                " of it, or serve without --live."
            )
