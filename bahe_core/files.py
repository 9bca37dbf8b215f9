"""Files and folders that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def part_of(path: Path) -> Path:
    """Where `path` is written before it takes its name; what a killed process left is written over."""
    return path.with_name(path.name + ".part")


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; at the end of the block it is on disk and replaces `path`.

    A block that raises leaves `path` as it was. One process may write a path at a time. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; at the end of the block it is on disk and takes that name.

    A block that raises leaves nothing. Raises OSError when `folder` exists and is not empty.
    """
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.rglob("*"):
            _flush(path)
        _flush(part)
        part.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk: a new name must not outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
