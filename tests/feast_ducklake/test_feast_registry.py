from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from feast.infra.registry.file import FileRegistryStore
from feast.infra.registry.registry import get_registry_store_class_from_type
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.repo_config import RegistryConfig

from feature_repo.store import TEMPLATE


def store(path: Path) -> FileRegistryStore:
    name = "feast_ducklake.AtomicRegistryStore"
    assert name in TEMPLATE.read_text()
    kind: type[FileRegistryStore] = get_registry_store_class_from_type(name)
    return kind(RegistryConfig(path=str(path)), path.parent)


def test_a_write_that_fails_leaves_the_registry_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "registry.db"
    store(path).update_registry_proto(Registry(registry_schema_version="1"))
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        store(path).update_registry_proto(Registry(registry_schema_version="2"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f"registry.db.{gone.pid}.part").write_bytes(b"half")
    alive = tmp_path / f"registry.db.{os.getppid()}.part"
    alive.write_bytes(b"being written")
    store(path).update_registry_proto(Registry(registry_schema_version="1"))
    assert sorted(tmp_path.iterdir()) == [path, alive]
    assert store(path).get_registry_proto().registry_schema_version == "1"
