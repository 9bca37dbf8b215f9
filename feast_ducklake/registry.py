"""Feast's registry file, replaced atomically, so that it can be read at any instant.

Feast's own file store empties the file and then writes it, at every materialization: a reader beside it, or
the run after a kill, would find half a registry.
"""

from __future__ import annotations

import os
import uuid
from datetime import UTC, datetime

import psutil
from feast.infra.registry.file import FileRegistryStore
from feast.protos.feast.core.Registry_pb2 import Registry


class AtomicRegistryStore(FileRegistryStore):
    """A `registry_store_type` of feature_store.yaml."""

    def _write_registry(self, registry_proto: Registry) -> None:
        registry_proto.version_id = str(uuid.uuid4())
        registry_proto.last_updated.FromDatetime(datetime.now(UTC))
        path = self._filepath
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as sink:
                sink.write(registry_proto.SerializeToString())
                sink.flush()
                os.fsync(sink.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        for leftover in path.parent.glob(f"{path.name}.*.part"):
            if not psutil.pid_exists(int(leftover.suffixes[-2][1:])):  # of a process that was killed
                leftover.unlink(missing_ok=True)
