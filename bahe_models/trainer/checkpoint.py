"""An unfinished training run as one file, from which it resumes bit for bit."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bahe_core.errors import BadInput
from bahe_core.files import part_of, replace_atomically


@dataclass(frozen=True)
class Checkpoint:
    """Where a run's state is kept, and which run it belongs to."""

    path: Path
    identity: str
    """Identifies data and settings, as a model_version does; another run's state is never resumed."""

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file with this state (tensors and plain values); a kill leaves the old or the new."""
        with replace_atomically(self.path) as part, part.open("wb") as file:
            torch.save({"identity": self.identity, "state": state}, file)

    def load(self) -> dict[str, Any] | None:
        """The state on the CPU, or None without a file.

        Raises BadInput when the file is damaged or belongs to another run.
        """
        return self._read(mmap=False)

    def check(self) -> None:
        """Raises BadInput as `load` would, without reading the tensors."""
        self._read(mmap=True)

    def _read(self, *, mmap: bool) -> dict[str, Any] | None:
        if not self.path.is_file():
            return None
        try:
            # Only tensors and plain values are unpickled: a file can run no code.
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
            identity, state = content["identity"], content["state"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            raise BadInput(
                f"{self.path} is not a training checkpoint; delete it to train from the start."
            ) from None
        if identity != self.identity:
            raise BadInput(
                f"{self.path} is the checkpoint of {identity}, not of {self.identity}; go back to that"
                " configuration, or delete it to train from the start."
            )
        result: dict[str, Any] = state
        return result

    def delete(self) -> None:
        """Remove the file, and any part that a kill left while writing it."""
        for path in (self.path, part_of(self.path)):
            path.unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """State of torch's random generators in this process."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore torch's random generators from a `random_state`."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
