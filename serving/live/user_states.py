"""States of users with the behaviors that were sent: a cache, which any worker can make anew.

A state is made from the lake, and what was sent is appended to it, but for what the lake has by now. It is
kept while it is used, and until a publish overtakes it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bahe_core.errors import Busy, Damaged, NotReady, NotWritable, Unreachable
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_models import Artifact, UserState
from materialize.vectors.timelines import read_user
from serving.live.atom_vectors import AtomVectors
from serving.live.live_counts import Act, LiveCounts
from serving.live.push_log import Pushed, PushLog
from serving.lookup.answers import UserFeatures
from serving.lookup.identifiers import Identifier
from serving.lookup.lake_pause import LakePause
from serving.lookup.published_models import PublishedModels
from serving.lookup.tolerances import in_turn

AGAIN = 512
"""Latest behaviors of a channel in which one that is sent again, or was ingested since, is sought."""
_LAKE_FAILS = (Unreachable, Damaged, NotWritable)
NOT_NOW = (NotReady, Busy, *_LAKE_FAILS)
"""Why a state cannot be had for a while: the lake is being written to, is away, or has another encoder's
vectors, or other requests keep the states."""


@dataclass(frozen=True)
class LiveState:
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
    acts: tuple[Act, ...] = ()
    """Those of them that the online store does not have, as they came."""


class UserStates:
    """Safe to use from several threads; one at a time moves states on."""

    def __init__(
        self,
        home: Home,
        models: PublishedModels,
        pushes: PushLog,
        atoms: AtomVectors,
        counts: LiveCounts,
        pause: LakePause,
        *,
        most: int,
    ) -> None:
        """`most` is of how many users states are kept; `pause` begins when the lake cannot be read."""
        self._home, self._models, self._pushes = home, models, pushes
        self._atoms, self._counts, self._pause, self._most = atoms, counts, pause, most
        self._kept: OrderedDict[Identifier, LiveState] = OrderedDict()
        self._lock = threading.Lock()
        """Of the states that are kept."""
        self._moving = threading.RLock()  # a state belongs to one thread at a time

    def kept(self, user_id: Identifier) -> LiveState | None:
        """The user's state as it was asked for last, of whatever model; None where it is not here."""
        with self._lock:
            return self._kept.get(user_id)

    def drop(self, user_id: Identifier) -> None:
        """Let go of a user's state, which the publish has overtaken."""
        with self._lock:
            self._kept.pop(user_id, None)

    def up_to_date(self, stored: UserFeatures) -> LiveState:
        """The user's state with all that was pushed; `stored` are the published features.

        Raises Busy when other requests keep the states, and NotReady, Unreachable, Damaged or NotWritable
        when it has to be made and the lake cannot be read.
        """
        live = self._current(stored)
        if live is not None and live.taken == self._pushes.of_user(stored.user_id):
            return live
        with in_turn(self._moving, "the users' states"):
            artifact = self._models.artifact(stored.model_version)
            # Looked at again: another thread may have let go of some meanwhile.
            pushed, live = self._pushes.of_user(stored.user_id), self._current(stored)
            if live is None or live.taken != pushed[: len(live.taken)]:
                live = self._from_lake(stored, artifact)
            return self._keep(stored.user_id, self._advanced(live, pushed, artifact))

    def _keep(self, user_id: Identifier, live: LiveState) -> LiveState:
        with self._lock:
            self._kept[user_id] = live
            self._kept.move_to_end(user_id)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return live

    def _current(self, stored: UserFeatures) -> LiveState | None:
        """The user's state, unless a publish has overtaken it."""
        with self._lock:
            live = self._kept.get(stored.user_id)
            if live is None:
                return None
            if live.model_version != stored.model_version:
                self._kept.clear()  # all are of a model that is live no more
                return None
            if live.stored_behaviors != stored.behaviors:
                del self._kept[stored.user_id]
                return None
            self._kept.move_to_end(stored.user_id)
            return live

    def _advanced(self, live: LiveState, pushed: Sequence[Pushed], artifact: Artifact) -> LiveState:
        """The state with the behaviors that it does not have yet."""
        self._atoms.use_encoder_of(artifact)
        channels, acts = artifact.dense.channels, list(live.acts)
        new = [one for one in pushed[len(live.taken) :] if one.channel in channels]
        acts += [self._counts.act(one, live.model_version) for one in new if one.key in live.unpublished]
        lacking = [one for one in new if one.key not in live.in_lake]
        # All of them before the state is touched, which a failure must not leave half done.
        atoms = self._atoms.of(lacking, artifact)
        of_lacking = [self._counts.act(one, live.model_version) for one in lacking]
        for one, act in zip(lacking, of_lacking, strict=True):
            number = channels.index(one.channel)
            # In order when it came, but the log has got later ones since: an ingest puts it in its place.
            if not live.state.takes(number, one.time_us):
                continue
            live.state.append(number, torch.from_numpy(atoms[one.atom_id]), one.time_us, one.atom_id)
            acts.append(act)
        return replace(
            live,
            lengths=live.state.lengths,
            vector=live.state.vector().cpu().numpy(),
            taken=tuple(pushed),
            acts=tuple(acts),
        )

    def _from_lake(self, stored: UserFeatures, artifact: Artifact) -> LiveState:
        self._atoms.use_encoder_of(artifact)
        channels = artifact.dense.channels
        self._pause.require_off(self._home)
        try:
            with lake(self._home) as connection:
                atoms_CLD, time_us_CL, atom_ids_CL = read_user(
                    connection, artifact.encoder_version, stored.user_id, channels
                )
        except _LAKE_FAILS:
            self._pause.begin()
            raise
        width = artifact.model.aggregator.start_D.numel()
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
        return LiveState(
            state=state,
            model_version=stored.model_version,
            stored_behaviors=stored.behaviors,
            lengths=state.lengths,
            vector=stored.vector,
            in_lake=frozenset(in_lake),
            unpublished=frozenset(unpublished),
        )
