"""The artifact as files: who may read them, and that what it was configured with comes back."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bahe_models import load
from tests.support import REPOSITORY
from tests.support.toy import toy_artifact, toy_batches, toy_data

READ_AS_NOBODY = """
import os, sys
from contextlib import suppress
from pathlib import Path
from bahe_core.errors import BaheError
from bahe_models import load
with suppress(BaheError):
    load(Path(sys.argv[1]))  # imports what nobody may have no right to see
if os.geteuid() == 0:
    os.setuid(65534)
try:
    print(load(Path(sys.argv[1])).model_version)
except BaheError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that everyone may look into, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="bahe-anyones-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def read_as_nobody(folder: Path) -> str:
    """What another user is told who reads the artifact (who is this user, where that is not root)."""
    command = [sys.executable, "-c", READ_AS_NOBODY, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_files_follow_the_umask_so_that_another_user_may_serve(tiny_backbone: Path, anyones: Path) -> None:
    artifact = toy_artifact(toy_batches(toy_data(), tiny_backbone))
    for umask, mode in ((0o027, 0o640), (0o022, 0o644)):
        folder, before = anyones / f"{mode:o}", os.umask(umask)
        try:
            artifact.save(folder)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}
    assert read_as_nobody(folder) == artifact.model_version


@pytest.mark.parametrize("name", ["config.json", "item_ids.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_called_so(name: str, tiny_backbone: Path, anyones: Path) -> None:
    folder = anyones / "model"
    toy_artifact(toy_batches(toy_data(), tiny_backbone)).save(folder)
    (folder / name).chmod(0)
    said = read_as_nobody(folder)
    assert said.startswith("NotWritable a file or folder may not be read or written to")
    assert "train again" not in said


def test_recent_parts_come_back(tiny_backbone: Path, tmp_path: Path) -> None:
    artifact = toy_artifact(toy_batches(toy_data(), tiny_backbone, recent=(2, 6)))
    artifact.save(tmp_path / "m")
    assert load(tmp_path / "m").model.config == artifact.model.config
