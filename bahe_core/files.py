"""Files and folders that are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def part_of(path: Path) -> Path:
    """Where `path` is written before it is renamed; what a killed process left there is overwritten."""
    return path.with_name(path.name + ".part")


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """A temporary file to write; at the end of the block it is flushed to disk and replaces `path`.

    A block that raises leaves `path` as it was. Only one process at a time may write a path. Missing parent
    folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; at the end of the block it is flushed to disk and renamed to `folder`.

    A block that raises leaves nothing. Raises OSError when `folder` exists and is not empty.
    """
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.rglob("*"):
            flush(path)
        flush(part)
        part.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file's bytes or a folder's entries: a crash must not leave a name without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
