"""The home folder: all state of one dataset, so that two datasets never mix."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bahe_core.errors import BadInput, Busy

if TYPE_CHECKING:
    from bahe_core.lake_location import LakeConfig, LakeLocation

_LOOKING = 0.5
"""Seconds, far more than `busy` takes."""

DEFAULT_HOME = Path(".bahe")


@dataclass(frozen=True)
class Home:
    """The paths of each part of the state. Nothing is created until `create` is called."""

    root: Path
    known_lake: LakeLocation | None = None
    """The lake's location, on a machine that can reach the lake but not the home."""

    @classmethod
    def at(cls, folder: Path | str | None = None) -> Home:
        """The given folder, else BAHE_HOME, else `.bahe` in the working directory."""
        chosen = folder or os.environ.get("BAHE_HOME") or DEFAULT_HOME
        return cls(Path(chosen).expanduser().resolve())

    @property
    def lake(self) -> LakeLocation:
        """Where the catalogue and the Parquet files are. Raises Damaged when lake.yaml cannot be read."""
        if self.known_lake is not None:
            return self.known_lake
        # Not at the top: it imports yaml, which `bahe --help` does without.
        from bahe_core.lake_location import LakeLocation, read_lake_config

        config = read_lake_config(self._lake_yaml)
        return LakeLocation(
            catalogue=config.catalogue or str(self.root / "lake" / "catalogue.sqlite"),
            schema=config.schema if config.catalogue else None,
            data=config.data or str(self.root / "lake" / "data"),
            moves=config.data is None,
        )

    def elsewhere(self) -> Home:
        """The home to give to a worker on another machine: it carries its lake's location."""
        return Home(self.root, self.lake)

    @property
    def _lake_yaml(self) -> Path:
        return self.root / "lake.yaml"

    def place_lake(self, config: LakeConfig) -> None:
        """Record the lake's location before it is first opened. Raises BadInput when the home holds a
        dataset and its lake is elsewhere."""
        from bahe_core.lake_location import read_lake_config, write_lake_config

        if config == read_lake_config(self._lake_yaml):
            return
        if (self.root / "dataset.yaml").is_file():
            raise BadInput(
                f"`lake` in dataset.yaml is not where the lake of {self.root} is ({self.lake}); change it"
                " back, or ingest into a new --home."
            )
        self.create()
        write_lake_config(config, self._lake_yaml)

    @property
    def spill(self) -> Path:
        """Where DuckDB spills what exceeds its memory; exists only while it is needed."""
        if self.known_lake is not None and not self.root.is_dir():
            return Path(tempfile.gettempdir()) / "bahe-spill"
        return self.root / "lake" / "spill"

    @property
    def registry(self) -> Path:
        """Feast's registry."""
        return self.root / "registry.db"

    @property
    def online_store(self) -> Path:
        """Feast's embedded online store (SQLite)."""
        return self.root / "online.db"

    @property
    def feature_store_yaml(self) -> Path:
        """Feast's configuration of this home; `FeatureStore(fs_yaml_file=...)` opens it."""
        return self.root / "feature_store.yaml"

    @property
    def frames(self) -> Path:
        """Training frames, one folder each."""
        return self.root / "frames"

    @property
    def models(self) -> Path:
        """Model artifacts, one folder per model_version."""
        return self.root / "models"

    def checkpoint(self, model_version: str) -> Path:
        """State of the unfinished training of a model_version; gone when the artifact is written."""
        return self.models / f"{model_version}.checkpoint"

    @property
    def tracking(self) -> Path:
        """MLflow's local store."""
        return self.root / "mlflow"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, one folder per run."""
        return self.root / "tensorboard"

    @property
    def catalogue_of_items(self) -> Path:
        """Ids and texts of the items that can be recommended (Parquet), written by `publish`."""
        return self.root / "items.parquet"

    @property
    def counted(self) -> Path:
        """What the statistics that are online count (JSON), written by `publish`."""
        return self.root / "counted.json"

    @property
    def requests(self) -> Path:
        """What services answered with, as JSON lines."""
        return self.root / "requests"

    @property
    def pushed(self) -> Path:
        """Behaviors, impressions and clicks that live services took in, as JSON lines."""
        return self.root / "pushed"

    @property
    def api_keys(self) -> Path:
        """Hashes of the service's API keys."""
        return self.root / "api_keys.json"

    @property
    def reports(self) -> Path:
        """Data Docs and training reports."""
        return self.root / "reports"

    @property
    def compared(self) -> Path:
        """What the models of comparisons predicted, one file each."""
        return self.root / "compared"

    @property
    def days(self) -> Path:
        """What each daily run did and how far it got, one JSON file per date."""
        return self.root / "daily"

    def create(self) -> Home:
        """Create the folders; returns itself."""
        for folder in (self.spill.parent, self.frames, self.models, self.tracking, self.reports):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    @contextmanager
    def exclusive(self, wait: float = 0) -> Iterator[None]:
        """Hold the home's lock while a job writes; within a thread it is reentrant.

        Raises Busy when another process still holds it after `wait` seconds. The lock belongs to the
        process (flock), so a killed job leaves no stale lock behind. With a catalogue in PostgreSQL it
        also keeps out jobs of other homes and machines.
        """
        from filelock import FileLock, Timeout

        self.create()
        lock = FileLock(self.root / ".lock", is_singleton=True)
        if lock.is_locked:  # by this thread
            yield
            return
        try:
            # At least a moment: `busy` holds the lock while it looks.
            lock.acquire(timeout=max(wait, _LOOKING), poll_interval=0.02)
        except Timeout:
            advice = "wait for it to end" if not wait else f"it did not end within {wait:g} s; try later"
            raise Busy(
                f"another bahe job is writing to {self.root}; {advice}, or use another --home."
            ) from None
        try:
            with self.lake.exclusive(wait):
                yield
        finally:
            lock.release()

    def busy(self) -> bool:
        """Whether another process holds the lock."""
        from filelock import FileLock, Timeout

        if not self.root.is_dir():
            return False
        lock = FileLock(self.root / ".lock", is_singleton=True)
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True


def cache_folder() -> Path:
    """Downloads shared by all homes: BAHE_CACHE, else the user's cache directory."""
    chosen = os.environ.get("BAHE_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bahe"
