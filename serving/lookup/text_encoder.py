"""Texts to vectors, by the shallow layers that the live model's vectors come from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import duckdb

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_lake.connection import lake
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import home_dataset
from materialize.ingest.atoms import ATOM_ID, NORMAL_TEXT
from materialize.vectors.encoder_versions import recorded_settings
from serving.lookup.answers import Vector
from serving.lookup.tolerances import in_turn

if TYPE_CHECKING:
    from bahe_models import Artifact, AtomicEncoder


class TextEncoder:
    """Loaded when it is first used. Safe to use from several threads; one at a time encodes."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._loaded: tuple[str, AtomicEncoder] | None = None
        """An encoder_version, and its encoder."""
        self._lock = threading.Lock()

    @cached_property
    def _sql(self) -> duckdb.DuckDBPyConnection:
        return duckdb.connect()

    def atom(self, channel: str, text: str) -> tuple[str, int]:
        """The text as ingest keeps it, and the id that ingest gives it in this channel."""
        normal = NORMAL_TEXT.format(text="$text")
        cursor = self._sql.cursor()  # a connection is for one thread at a time
        row = cursor.execute(
            f"SELECT {normal}, {ATOM_ID.format(channel='$channel', text=normal)}",
            {"text": text, "channel": channel},
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    def encode(self, artifact: Artifact, channels: Sequence[str], texts: Sequence[str]) -> Vector:
        """Vectors [texts, width] by the encoder of the model's vectors, which a publish may have changed.

        Raises NotReady when that encoder is not here, Busy while other requests keep it.
        """
        with self._encoder_of(artifact) as encoder:
            return encoder.encode(channels, texts)

    def load(self, artifact: Artifact) -> None:
        """Make ready for `encode`. Raises as it."""
        with self._encoder_of(artifact):
            pass

    @contextmanager
    def _encoder_of(self, artifact: Artifact) -> Iterator[AtomicEncoder]:
        with in_turn(self._lock, "the language model"):
            if self._loaded is None or self._loaded[0] != artifact.encoder_version:
                self._loaded = self._read(artifact)
            version, encoder = self._loaded
            if version != artifact.encoder_version:
                raise NotReady(
                    f"{artifact.model_version} reads vectors of {artifact.encoder_version}, but"
                    f" {self._home.root}/dataset.yaml now describes {version}; publish a model of it, or"
                    " serve without --live."
                )
            yield encoder

    def _read(self, artifact: Artifact) -> tuple[str, AtomicEncoder]:
        """The encoder of the vectors that the model reads, which dataset.yaml may no longer describe."""
        from bahe_models import AtomicEncoder, encoder_version, load_backbone  # torch

        with lake(self._home) as connection:
            recorded = recorded_settings(connection, artifact.encoder_version)
        backbone, settings = recorded or encoder_settings(home_dataset(self._home))
        halves = load_backbone(backbone)
        version = encoder_version(halves, settings, backbone.shallow_layers)
        return version, AtomicEncoder(halves, settings)
