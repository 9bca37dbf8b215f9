"""Feast plug-ins for any project: offline store over DuckLake, guarded online stores, engine, registry.

feature_store.yaml names them by class path, as `type: feast_ducklake.DuckLakeOfflineStore`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_MODULES = {
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
    "StrictProvider": "provider",
    "VectorReader": "online.vectors",
    "open_lake": "offline.lakes",
}
__all__ = sorted(_MODULES)

# Registries and feature_store.yaml files written by version 0.1 name the classes by these modules.
for _name in ("feast_engine", "feast_offline", "feast_redis", "feast_registry", "feast_sqlite"):
    sys.modules.setdefault(f"materialize.{_name}", sys.modules[__name__])


def __getattr__(name: str) -> Any:
    """Imported when asked for: a process that reads online needs neither DuckDB nor the engine."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
