"""Feast plug-ins for any project: offline store over DuckLake, guarded online stores, engine, registry.

feature_store.yaml names them by class path, as `type: feast_ducklake.DuckLakeOfflineStore`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_HOMES = {
    "ArrowEngine": "engine",
    "ArrowEngineConfig": "engine",
    "AtomicRegistryStore": "registry",
    "DuckLakeLoggingDestination": "offline.source",
    "DuckLakeOfflineStore": "offline.store",
    "DuckLakeOfflineStoreConfig": "offline.store",
    "DuckLakeSource": "offline.source",
    "GuardedRedisOnlineStore": "online.redis",
    "GuardedRedisOnlineStoreConfig": "online.redis",
    "GuardedSqliteOnlineStore": "online.sqlite",
    "GuardedSqliteOnlineStoreConfig": "online.sqlite",
    "SavedDatasetDuckLakeStorage": "offline.source",
    "VectorReader": "online.vectors",
}
__all__ = sorted(_HOMES)

# Registries name the data source by its class path; those written before 0.2 have this one.
sys.modules.setdefault("materialize.feast_offline", sys.modules[__name__])


def __getattr__(name: str) -> Any:
    """Imported when asked for: a process that reads online needs neither DuckDB nor the engine."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
