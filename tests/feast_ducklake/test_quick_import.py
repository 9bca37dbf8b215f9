"""Feast without torch and type checks: the same Feast, and torch when somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import typeguard
from feast_ducklake.quick_import import import_feast

checked = typeguard.typechecked
import_feast()
assert typeguard.typechecked is checked
assert "torch" not in sys.modules
import_feast()
from feast import Entity, FeatureStore
from feast.infra.offline_stores.offline_store import get_torch

assert Entity(name="user", join_keys=["user_id"]).join_key == "user_id"
assert get_torch().tensor([1]).tolist() == [1]
import feast.torch_wrapper

assert feast.torch_wrapper.TORCH_AVAILABLE
print("done")
"""


def test_torch_comes_when_asked_for() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr
