"""File systems of limited size or without write access, mounted temporarily; needs root on Linux."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CannotMount(Exception):
    """This process may not mount file systems."""


@contextmanager
def mounted(arguments: list[str], mount: Path) -> Iterator[None]:
    """Mount for a block. Raises CannotMount when that is not possible."""
    mount_with(arguments)
    try:
        yield
    finally:
        # Lazily, since a store that was read in this process keeps its file open.
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def mount_with(arguments: list[str]) -> None:
    """`mount ARGUMENTS`. Raises CannotMount."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMount(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
