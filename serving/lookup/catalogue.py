"""The items that can be recommended, with their texts, as the last publish wrote them."""

from __future__ import annotations

import threading

import pyarrow.parquet as pq

from bahe_core.errors import NotReady
from bahe_core.home import Home
from serving.lookup.identifiers import Identifier


class Catalogue:
    """Kept in memory until another publish writes the file anew."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._texts: dict[Identifier, str] = {}
        self._changed = -1
        self._by_text: tuple[dict[Identifier, str], dict[str, list[Identifier]]] = ({}, {})
        """A catalogue, and the items of each of its texts."""
        self._lock = threading.Lock()

    def texts(self) -> dict[Identifier, str]:
        """Text of every item, by id: another object after each publish, and the same one until then.

        Raises NotReady before the first publish.
        """
        path = self._home.catalogue_of_items
        if not path.is_file():
            raise NotReady(f"{self._home.root} has nothing published; run `bahe publish` first.")
        changed = path.stat().st_mtime_ns
        with self._lock:
            if self._changed != changed:
                table = pq.read_table(path)
                ids, texts = table["item_id"].to_pylist(), table["text"].to_pylist()
                self._texts = dict(zip(ids, texts, strict=True))
                self._changed = changed
            return self._texts

    def with_text(self, text: str) -> list[Identifier]:
        """The items that have this very text now."""
        texts = self.texts()
        if self._by_text[0] is not texts:
            by_text: dict[str, list[Identifier]] = {}
            for item, its in texts.items():
                by_text.setdefault(its, []).append(item)
            self._by_text = texts, by_text
        return self._by_text[1].get(text, [])
