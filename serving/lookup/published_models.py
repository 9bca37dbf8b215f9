"""The models that were published: which is live, their artifacts, and what they read of the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_models import column_of
from feature_repo.store import online_errors
from materialize.release.pointer import DEPLOYMENT
from serving.lookup.answers import Vector
from serving.lookup.identifiers import Identifier
from serving.lookup.model_inputs import ModelInputs, model_inputs, the_servers_fault
from serving.lookup.online_features import OnlineFeatures

if TYPE_CHECKING:
    from feast import FeatureStore

    from bahe_models import Artifact


class PublishedModels:
    """Safe to use from several threads."""

    def __init__(
        self,
        home: Home,
        store: FeatureStore,
        online: OnlineFeatures,
        read_beside: Callable[[Sequence[str]], list[str]],
    ) -> None:
        """`read_beside` is that of `model_inputs`."""
        self._home, self._store, self._online, self._read_beside = home, store, online, read_beside
        self._artifacts: dict[str, Artifact] = {}
        self._inputs: tuple[str, ModelInputs | None] = ("", None)
        """Of the last model_version asked for."""
        self._empty: tuple[str, Vector | None] = ("", None)
        """A model_version, and its vector of a user who has done nothing."""
        self._lock = threading.Lock()

    def live_version(self) -> str:
        """The model_version that answers now. Raises NotReady before the first publish."""
        values = self._online.read(["live_model:live_model_version"], {"deployment": [DEPLOYMENT]})
        version = values["live_model_version"][0]
        if version is None:
            raise NotReady(f"{self._home.root} has nothing published; run `bahe publish` first.")
        return str(version)

    def artifact(self, version: str) -> Artifact:
        """The artifact of a model_version, kept in memory, with that of the version before.

        Raises Damaged when the models folder does not have it whole, as before it has been copied there.
        """
        from bahe_models import load  # torch, which a lookup does without

        with self._lock:
            if version not in self._artifacts:
                with the_servers_fault():
                    self._artifacts[version] = load(self._home.models / version)
                # Requests in flight may still need the one before; no one needs those before that.
                for earlier in list(self._artifacts)[:-2]:
                    del self._artifacts[earlier]
            return self._artifacts[version]

    def empty_vector(self, version: str) -> Vector:
        """The vector of a user who has done nothing."""
        from bahe_models import UserState  # torch, which a lookup does without

        artifact = self.artifact(version)
        with self._lock:
            known, vector = self._empty
            if vector is None or known != version:
                vector = UserState.empty(artifact.model, artifact.window).vector().cpu().numpy()
                self._empty = version, vector
            return vector

    def inputs(self, version: str) -> ModelInputs:
        """What a model reads, without reading its weights. Raises Damaged as `artifact`."""
        known, inputs = self._inputs  # another request may put another version's in its place
        if inputs is None or known != version:
            inputs = model_inputs(self._store, self._home.models / version, self._read_beside)
            self._inputs = version, inputs
        return inputs

    def freshness(self, version: str) -> dict[str, float]:
        """For how many seconds nothing was written of each view that a model's scores are made of.

        By publishing (or Feast's materialization), of this or another process; what was pushed is newer.
        """
        read = self.inputs(version).views
        with online_errors(self._home):
            views = self._store.registry.list_feature_views(self._store.project, allow_cache=False)
        now = datetime.now(UTC)
        return {
            view.name: max(0.0, (now - view.most_recent_end_time).total_seconds())
            for view in sorted(views, key=lambda view: view.name)
            if view.name in read and view.most_recent_end_time is not None
        }

    def read_by_attributes(
        self, version: str, columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[Any]]:
        """The model's features of views keyed by columns of items, by column, a value a row.

        `columns` have the user_id, item_id and those columns of the items. Each key is read once.
        """
        inputs, found = self.inputs(version), {}
        for names, references in inputs.by_keys.items():
            given = [
                [inputs.item_keys[name] if value is None else value for value in columns[name]]
                if name in inputs.item_keys
                else columns[name]
                for name in names
            ]
            rows = list(zip(*given, strict=True))
            place = {row: number for number, row in enumerate(dict.fromkeys(rows))}
            distinct = dict(zip(names, map(list, zip(*place, strict=True)), strict=True))
            values = self._online.read(references, distinct)
            for column in map(column_of, references):
                found[column] = [values[column][place[row]] for row in rows]
        return found

    def read_vectors(
        self, entity: str, version: str, keys: Mapping[str, Sequence[Identifier]]
    ) -> dict[str, list[Vector | None]]:
        """The model's `features.vectors` of a `user`, `item` or `pair`, by `view:feature`, one a row."""
        found: dict[str, list[Vector | None]] = {}
        with online_errors(self._home), the_servers_fault():
            for reference, reader in self.inputs(version).vectors[entity].items():
                stored = reader.read(keys)
                found[reference] = [
                    vector if there else None
                    for vector, there in zip(stored.vectors_ND, stored.found_N.tolist(), strict=True)
                ]
        return found
