"""The catalogue's vectors and features in memory, for as long as nobody writes to their views.

A service reads the same items again and again, and most of a request's time went into that. Our online
stores keep a token for each view that changes with every write to it: a request asks for the tokens, and
reads the items only where one of them is another. Writes by other clients than ours leave the token as it
is; such a store has to be served without a table.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feast_ducklake.online.rows import Vectors
from feast_ducklake.online.store import GuardedOnlineStore

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

    from serving.lookup.identifiers import Identifier

MOST_BYTES = 2**30
"""Of vectors in the table; of more items each request reads its own."""
_REST = 10
"""For how many times the time of reading them all the items are not read again for a request of a few:
while a publish writes, every look finds another token."""

Read = Callable[[Sequence["Identifier"], str], tuple[Vectors, dict[str, list[Any]]]]


@dataclass(frozen=True, kw_only=True)
class _Items:
    model_version: str
    tokens: tuple[str | None, ...]
    catalogue: Mapping[Identifier, str]
    """Compared by identity: another publish, another one."""
    row_of: Mapping[Identifier, int]
    vectors: Vectors
    values: dict[str, list[Any]]


class ItemTable:
    """Vectors and features of items by id, of one model_version."""

    def __init__(self, store: FeatureStore, read: Read) -> None:
        """`read` gives vectors and features of items, by column, from the store."""
        self._store, self._online, self._read = store, store.provider.online_store, read
        self._views: tuple[tuple[str, ...], list[FeatureView] | None] = ((), None)
        self._items: _Items | None = None
        self._reading = threading.Lock()
        self._not_before = 0.0

    def of(
        self,
        items: Sequence[Identifier],
        version: str,
        catalogue: Mapping[Identifier, str],
        view_names: Sequence[str],
    ) -> tuple[Vectors, dict[str, list[Any]]] | None:
        """Vectors and features of some items; None when they have to be read from the store.

        `view_names` are the views that they come from.
        """
        views = self._cacheable(tuple(view_names))
        if views is None:
            return None
        tokens = tuple(self._online.versions(self._store.config, views))
        if None in tokens:  # nothing was written, or a server short of memory let go of the token
            return None
        kept = self._items
        if (
            kept is None
            or kept.model_version != version
            or kept.tokens != tokens
            or kept.catalogue is not catalogue
        ):
            kept = self._read_anew(
                version, tokens, catalogue, views, even_now=len(items) > len(catalogue) / 2
            )
        if kept is None or not all(item in kept.row_of for item in items):
            return None
        return _chosen(kept, items)

    def _cacheable(self, names: tuple[str, ...]) -> list[FeatureView] | None:
        """The views, where a token tells all about them: none is computed on demand or has a ttl, and the
        server lets go of no key by itself."""
        if self._views[0] != names:
            views: list[FeatureView] | None = None
            expire = getattr(self._store.config.online_store, "key_ttl_seconds", 0)
            if isinstance(self._online, GuardedOnlineStore) and not expire:
                stored = {view.name: view for view in self._store.list_feature_views()}
                if all(name in stored and not stored[name].ttl for name in names):
                    views = [stored[name] for name in names]
            self._views = names, views
        return self._views[1]

    def _read_anew(
        self,
        version: str,
        tokens: tuple[str | None, ...],
        catalogue: Mapping[Identifier, str],
        views: list[FeatureView],
        *,
        even_now: bool,
    ) -> _Items | None:
        """All items, unless another request is at it, or has just been and these are few."""
        if not even_now and time.monotonic() < self._not_before:
            return None
        if not self._reading.acquire(blocking=False):
            return None
        try:
            start = time.monotonic()
            ids = list(catalogue)
            if not ids:
                return None
            width = self._read(ids[:1], version)[0].vectors_ND.shape[1]
            if 4 * width * len(ids) > MOST_BYTES:
                self._not_before = start + 60
                return None
            vectors, values = self._read(ids, version)
            self._not_before = time.monotonic() + _REST * (time.monotonic() - start)
            items = _Items(
                model_version=version,
                tokens=tokens,
                catalogue=catalogue,
                row_of={item: row for row, item in enumerate(ids)},
                vectors=vectors,
                values=values,
            )
            # Values of between two writes are for this request only.
            if tuple(self._online.versions(self._store.config, views)) == tokens:
                self._items = items
            return items
        finally:
            self._reading.release()


def _chosen(kept: _Items, items: Sequence[Identifier]) -> tuple[Vectors, dict[str, list[Any]]]:
    rows = [kept.row_of[item] for item in items]
    if len(rows) == len(kept.row_of) and rows == list(range(len(rows))):
        # Lists of their own, since a live service writes into them.
        return kept.vectors, {name: list(values) for name, values in kept.values.items()}
    chosen = {name: [values[row] for row in rows] for name, values in kept.values.items()}
    return kept.vectors.of_rows(rows), chosen
