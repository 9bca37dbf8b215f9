"""No room left: one sentence, exit code 2, nothing lost, and the next run goes on."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from bahe_core.home import Home
from materialize.ingest.ingest import ingest
from tests.support import REPOSITORY
from tests.support.home_contents import contents, differences
from tests.support.logs import small_log, write_dataset


def limited(most: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`bahe ARGUMENTS` in a process whose files may not grow beyond so many bytes."""
    return subprocess.run(
        [sys.executable, "-m", "bahe", *arguments],
        cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_ingest_without_room(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "log", small_log(rows=400))
    home = Home.at(tmp_path / "home")
    failed = limited(60_000, "ingest", str(dataset), "--home", str(home.root))
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("bahe: the disk is full or fails (")
    assert "Traceback" not in failed.stderr
    ingest(home, dataset)
    undisturbed = Home.at(tmp_path / "undisturbed")
    ingest(undisturbed, dataset)
    assert differences(contents(home), contents(undisturbed)) == []


def test_synth_without_room(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    failed = limited(20_000, "synth", str(folder), "--days", "2")
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith("bahe: the disk is full or fails (")
    assert not (folder / "dataset.yaml").exists()
