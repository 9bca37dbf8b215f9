"""Vectors of the texts of behaviors that were sent: the lake's where it has them, else encoded here."""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import duckdb
import numpy as np

from bahe_core.errors import BaheError
from bahe_models import Artifact
from feast_ducklake import open_lake
from materialize.vectors.stored_atoms import vectors_of
from serving.live.push_log import Pushed
from serving.lookup.catalogue import Catalogue
from serving.lookup.identifiers import Identifier
from serving.lookup.lake_pause import LakePause
from serving.lookup.text_encoder import TextEncoder

if TYPE_CHECKING:
    from feast import FeatureStore

ATOMS = 10_000
"""Atoms whose vectors are kept, 23 MB with SmolLM2."""


class AtomVectors:
    """For one thread at a time."""

    def __init__(
        self,
        texts: TextEncoder,
        store: FeatureStore,
        catalogue: Catalogue,
        artifact: Artifact,
        pause: LakePause,
    ) -> None:
        """`artifact` is the live model's, whose encoder is loaded; during `pause` the lake is not read.

        Raises NotReady when that encoder is not here.
        """
        self._texts, self._store, self._catalogue, self._pause = texts, store, catalogue, pause
        self._feast_pause = LakePause()
        """Of the lake that Feast keeps attached."""
        self._stored: dict[int, np.ndarray] = {}
        """Vectors of the lake, the newest last."""
        self._encoded_here: dict[int, np.ndarray] = {}
        """Of texts that the lake did not have."""
        self._encoded_under: Mapping[Identifier, str] = {}
        """The catalogue of that time, another one after a publish."""
        self._encoder_version = ""
        self.use_encoder_of(artifact)

    def of(self, behaviors: Sequence[Pushed], artifact: Artifact) -> dict[int, np.ndarray]:
        """Vectors by atom, of the model whose encoder is in use.

        Those of late are kept, since many people do the same things. Those of the lake, from which a model
        has learned, come first. What is encoded here answers until the next publish: in half precision some
        processors (Intel's AMX) give a text that is encoded alone other numbers than beside others.
        """
        catalogue = self._catalogue.texts()
        if self._encoded_under is not catalogue:  # since another publish the lake may have them
            self._encoded_under, self._encoded_here = catalogue, {}
        known = ChainMap(self._stored, self._encoded_here)
        new = {one.atom_id: one for one in behaviors if one.atom_id not in known}
        if new:
            stored = self._read_stored(list(new))
            self._stored |= stored
            new = {atom: one for atom, one in new.items() if atom not in stored}
        if new:
            channels, texts = [o.channel for o in new.values()], [o.text for o in new.values()]
            vectors = self._texts.encode(artifact, channels, texts)
            self._encoded_here |= dict(zip(new, vectors, strict=True))
        found = {one.atom_id: known[one.atom_id] for one in behaviors}
        for kept in known.maps:
            while len(kept) > ATOMS:
                del kept[next(iter(kept))]
        return found

    def _read_stored(self, atoms: Sequence[int]) -> dict[int, np.ndarray]:
        """The lake's vectors of those of these atoms that it has; of none while it cannot be read."""
        if self._feast_pause.on or self._pause.on:
            return {}
        begun = time.monotonic()
        try:
            with open_lake(self._store.config) as connection:
                return vectors_of(connection, self._encoder_version, atoms)
        except (BaheError, duckdb.Error):
            self._feast_pause.begin(time.monotonic() - begun)
            return {}

    def use_encoder_of(self, artifact: Artifact) -> None:
        """Load the live model's encoder when a publish has changed it. Raises as `TextEncoder.load`."""
        if self._encoder_version != artifact.encoder_version:
            self._texts.load(artifact)
            self._stored, self._encoded_here = {}, {}
            self._encoder_version = artifact.encoder_version
