"""What training would have seen at the moment of a request, computed anew from the lake and the model.

Statistics, attributes and timeline lengths come from Feast's point-in-time join. Vectors are not read from
the lake, which keeps the newest of each model: the model reads the timelines again, up to those lengths.

Shape letters: N pairs of a user and an item, C channels, V width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from bahe_core.home import Home
from bahe_lake.sql import known_until
from bahe_models import column_of
from feature_repo.item_keys import ItemKeys, reference_of, with_item_keys, without_unknown
from materialize.frames.item_texts import item_texts_shown
from materialize.vectors.timelines import read_timelines
from materialize.vectors.user_embedder import NO_ITEMS, atoms_needed, device_of

if TYPE_CHECKING:
    from feast import FeatureStore

    from bahe_models import Artifact

Vectors = npt.NDArray[np.float32]
EVER = "TIMESTAMPTZ '2200-01-01'"
"""SQL of a moment after everything."""


class OfflineTruth:
    """Offline features of pairs of a user and an item, each at a moment of its own."""

    def __init__(
        self,
        home: Home,
        store: FeatureStore,
        connection: duckdb.DuckDBPyConnection,
        pairs: pa.Table,
        freshness: str,
        keys: ItemKeys,
    ) -> None:
        """`pairs` has user_id, item_id and `moment` [N], the moments in UTC that were asked about.

        `keys` are the columns of items that the features' views are keyed by.
        """
        self._keys = keys
        self._home, self._store, self._connection = home, store, connection
        self._freshness = freshness
        self._pairs = pairs.append_column("number", pa.array(np.arange(len(pairs), dtype=np.int64)))

    def keys(self, entity: str, rows: npt.NDArray[np.int64]) -> pa.ChunkedArray:
        """Ids of the `user`s or `item`s of some pairs."""
        return self._pairs[f"{entity}_id"].take(pa.array(rows))

    def values(
        self,
        references: Sequence[str],
        rows: npt.NDArray[np.int64] | None = None,
        *,
        as_of: int | None = None,
        shift_us: int = 0,
        all_of_it: bool = False,
    ) -> dict[str, list[Any]]:
        """Values of features of users and items (`view:feature`), by reference, of all pairs or some rows.

        `as_of` reads the lake of that snapshot. The moment is moved by `shift_us`; `all_of_it` takes
        everything that is known, whenever it happened.
        """
        if not references:
            return {}
        pairs = self._pairs if rows is None else self._pairs.take(rows)
        self._connection.register("audited", pairs)
        known = f"{known_until(self._freshness, 'moment')} + to_microseconds({shift_us})"
        if all_of_it:
            known = EVER
        rows_of = f"SELECT number, user_id, item_id, {known} AS event_timestamp FROM audited"
        entities = self._connection.execute(
            f"SELECT * EXCLUDE (number) FROM ({with_item_keys(rows_of, self._keys, as_of=as_of)})"
            " ORDER BY number"
        ).to_arrow_table()
        self._connection.unregister("audited")
        of_keys = set(map(reference_of, self._keys))  # columns of the entity frame
        asked = [reference for reference in references if reference not in of_keys]
        offline = self._store.config.offline_store
        before, offline.as_of = offline.as_of, as_of
        try:
            table = entities
            if asked:
                job = self._store.get_historical_features(entity_df=entities, features=asked)
                table = job.to_arrow()
        finally:
            offline.as_of = before
        unknown = {reference_of(name): key for name, key in self._keys.items()}
        return {
            reference: _plain(without_unknown(table[column_of(reference)], unknown.get(reference)))
            for reference in references
        }

    def user_vectors(
        self,
        artifact: Artifact,
        length_NC: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        *,
        encoder_version: str | None = None,
        connection: duckdb.DuckDBPyConnection | None = None,
    ) -> Vectors:
        """Vectors [N, V] of the pairs' users after so many behaviors of each channel.

        `encoder_version` reads the atoms of another encoder than the model's, `connection` the timelines of
        another lake, such as an earlier snapshot.
        """
        connection = connection or self._connection
        pairs = self._pairs.take(rows)
        coded = pairs["user_id"].combine_chunks().dictionary_encode()
        users, user_N = coded.dictionary, coded.indices.to_numpy().astype(np.int64)
        # Many pairs are of one user at one length.
        keys, first, inverse = np.unique(
            np.column_stack([user_N, length_NC]), axis=0, return_index=True, return_inverse=True
        )
        with atoms_needed(
            connection,
            self._home,
            artifact,
            pa.table({"user_id": users}),
            NO_ITEMS,
            encoder_version=encoder_version,
        ) as atoms:
            timelines = read_timelines(connection, atoms, users, list(artifact.dense.channels))
            longest = timelines.lengths()[keys[:, 0]]
            vectors = artifact.user_vectors(
                _tensor(artifact, atoms.vectors),
                atoms.ids,
                timelines,
                user_N[first],
                np.minimum(length_NC[first], longest),
            )
        return vectors[inverse.reshape(-1)]

    def item_vectors(
        self,
        artifact: Artifact,
        rows: npt.NDArray[np.int64],
        *,
        encoder_version: str | None = None,
        latest_text: bool = False,
    ) -> Vectors:
        """Vectors [N, V] of the pairs' items with the text that they had; NaN for an unknown item.

        `latest_text` takes the text that they have now.
        """
        self._connection.register("audited", self._pairs.take(rows))
        moment = EVER if latest_text else "moment"
        texts = item_texts_shown(
            f"(SELECT number, item_id, {moment} AS event_timestamp FROM audited)", "number", self._freshness
        )
        shown = self._connection.execute(
            f"SELECT item_id, atom_id FROM ({texts}) ORDER BY number"
        ).to_arrow_table()
        self._connection.unregister("audited")
        known = shown["atom_id"].is_valid().to_numpy()
        answer: Vectors = np.full((len(shown), artifact.vector_width), np.nan, dtype=np.float32)
        if not known.any():
            return answer
        found = shown.filter(pa.array(known))
        nobody = self._pairs.select(["user_id"])[:0]
        with atoms_needed(
            self._connection, self._home, artifact, nobody, found, encoder_version=encoder_version
        ) as atoms:
            answer[known] = artifact.item_vectors(
                _tensor(artifact, atoms.vectors[atoms.rows(found["atom_id"])]), found["item_id"].to_pylist()
            )
        return answer


def _tensor(artifact: Artifact, vectors: Vectors) -> torch.Tensor:
    return torch.from_numpy(np.array(vectors)).to(device_of(artifact))


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column; vectors in the precision that models read."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_floating(kind.value_type):
        column = column.cast(pa.list_(pa.float32()))
    values: list[Any] = column.to_pylist()
    return values


def lengths_of(values: dict[str, list[Any]], channels: Sequence[str], count: int) -> npt.NDArray[np.int64]:
    """Lengths [N, C] from the values of `user_timeline:length_<channel>`; 0 where there is none."""
    columns = [[int(v or 0) for v in values[f"user_timeline:length_{c}"]] for c in channels]
    lengths: npt.NDArray[np.int64] = np.array(columns, dtype=np.int64).T.reshape(count, len(channels))
    return lengths
