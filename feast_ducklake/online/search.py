"""The nearest stored vectors, from an index in memory that is built on first use and after each write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from feast import FeatureView, Field

from bahe_core.errors import BadInput
from bahe_core.machine import threads
from feast_ducklake.online.rows import NO_TIME, StoredValues, Vectors, as_vectors, within_ttl

EXACT_UP_TO = 20_000
"""Vectors; more are searched approximately (HNSW), which takes longer to build and less to search."""

# Feast's names, usearch's, and from usearch's distance to the one that Feast's other stores give.
_METRICS: dict[str, tuple[str, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]]] = {
    "L2": ("l2sq", np.sqrt),
    "cosine": ("cos", lambda distance: distance),
    "inner_product": ("ip", lambda distance: distance - 1),
}


@dataclass(frozen=True)
class _Index:
    version: str
    keys: list[bytes]
    stored: Vectors
    graph: Any
    """usearch's index, or none where all vectors are compared."""


class VectorSearch:
    """Indexes of the views of one online store, one for each view and metric."""

    def __init__(self) -> None:
        self._indexes: dict[tuple[str, str], _Index] = {}
        self._lock = threading.Lock()

    def nearest(
        self,
        view: FeatureView,
        embedding: Sequence[float],
        top_k: int,
        metric: str | None,
        *,
        version: str | None,
        scan: Callable[[str], tuple[list[bytes], StoredValues]],
    ) -> dict[bytes, float]:
        """Entity keys and distances of the nearest vectors that have not outlived their ttl.

        `version` tells whether the index is current, `scan` reads all vectors of a feature. The metric is
        the field's own, else the one given, else L2.
        Raises BadInput when the view has no vectors, or the query or metric does not fit them.
        """
        field = _vector_field(view)
        name = field.vector_search_metric or metric or "L2"
        if name not in _METRICS:
            raise BadInput(f"metric {name} is not known; use one of {', '.join(_METRICS)}.")
        if version is None:
            return {}
        with self._lock:
            index = self._indexes.get((view.name, name))
            if index is None or index.version != version:
                index = _build(view, field, name, version, *scan(field.name))
                self._indexes[view.name, name] = index
        query = np.asarray(embedding, dtype=np.float32)
        width = index.stored.vectors_ND.shape[1]
        if not index.keys:
            return {}
        if query.shape != (width,):
            raise BadInput(
                f"the query has {len(embedding)} numbers; vectors of {view.name}:{field.name} have {width}."
            )
        return _search(view, index, query, top_k, name)


def _vector_field(view: FeatureView) -> Field:
    fields = [field for field in view.features if field.vector_index]
    if len(fields) != 1:
        raise BadInput(
            f"view {view.name} has {len(fields)} fields with vector_index=True; search needs exactly one."
        )
    return fields[0]


def _build(
    view: FeatureView,
    field: Field,
    metric: str,
    version: str,
    keys: list[bytes],
    stored_values: StoredValues,
) -> _Index:
    stored = as_vectors(view, field.name, stored_values)
    there = np.flatnonzero(stored.found_N)
    vectors_ND = stored.vectors_ND[there]
    stored = Vectors(vectors_ND, stored.found_N[there], stored.event_us_N[there])
    graph = None
    if len(there) > EXACT_UP_TO:
        from usearch.index import Index

        graph = Index(ndim=vectors_ND.shape[1], metric=_METRICS[metric][0], dtype="f32")
        graph.add(np.arange(len(there)), vectors_ND, threads=threads())
    return _Index(version, [keys[i] for i in there.tolist()], stored, graph)


def _search(
    view: FeatureView, index: _Index, query_D: npt.NDArray[np.float32], top_k: int, metric: str
) -> dict[bytes, float]:
    from usearch.index import search

    name, distance = _METRICS[metric]
    fresh_N = within_ttl(view, StoredValues({}, index.stored.event_us_N)).event_us != NO_TIME
    count = top_k
    while True:
        count = min(count, len(index.keys))
        if index.graph is None:
            matches = search(index.stored.vectors_ND, query_D, count, name, exact=True, threads=threads())
        else:
            matches = index.graph.search(query_D, count, threads=threads())
        kept = [i for i, row in enumerate(matches.keys.tolist()) if fresh_N[row]][:top_k]
        if len(kept) == top_k or count == len(index.keys):
            break
        count *= 4  # some of the nearest have outlived their ttl
    distances = distance(np.maximum(matches.distances, 0) if metric == "L2" else matches.distances)
    return {index.keys[int(matches.keys[i])]: float(distances[i]) for i in kept}
