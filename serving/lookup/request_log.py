"""What requests were answered with, one JSON line for each, for `bahe audit --requests`.

A line has the user's features and those of the items in the answer, as the model read them, so that they
can be compared with what training would have seen at that moment. Users are sampled by a hash of their id,
so that those who are logged are logged whole. Each process writes files of its own, one a day; a line that
a kill cut off is left out when they are read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.progress import say

_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class ServedRequest:
    """One answer: a user, n items, and the features that they were scored with."""

    served_at: datetime
    at: datetime
    """The moment that was asked about."""
    model_version: str
    user_id: str | int
    user: Mapping[str, Any]
    """Features of the user, by column; vectors by `view:feature`, as arrays or lists."""
    user_vector: npt.NDArray[np.float32]
    """[V]."""
    item_ids: Sequence[str | int]
    items: Mapping[str, Sequence[Any]]
    """Features of the items, likewise; each of length n."""
    item_vectors: npt.NDArray[np.float32]
    """[n, V]."""


def in_sample(user_id: str | int, share: float) -> bool:
    """Whether a user is in a sample of this share, which is the same users in every process."""
    digest = hashlib.blake2b(str(user_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class RequestLog:
    """Appends requests to the home's `requests/`; safe to use from several threads."""

    def __init__(self, home: Home, share: float = 1.0) -> None:
        """Of a share of the users. Raises BadInput when it is not in (0, 1]."""
        if not 0 < share <= 1:
            raise BadInput(f"the share of users to log is {share:g}; it must be above 0 and at most 1.")
        self._folder, self._share = home.requests, share
        self._lock, self._failed = threading.Lock(), False
        self._folder.mkdir(parents=True, exist_ok=True)

    def wants(self, user_id: str | int) -> bool:
        """Whether this user's requests are logged."""
        return in_sample(user_id, self._share)

    def append(self, request: ServedRequest) -> None:
        """Add a line to the file of today."""
        line = json.dumps(_plain(request), default=np.ndarray.tolist) + "\n"
        path = self._folder / f"{request.served_at:%Y-%m-%d}.{os.getpid()}.jsonl"
        try:
            with self._lock, path.open("a") as file:
                file.write(line)
        except OSError as error:  # the answer counts more than its log
            if not self._failed:
                say(f"  requests are not logged: {error}")
            self._failed = True


def read_requests(home: Home, last: int | None = None) -> Iterator[ServedRequest]:
    """Logged requests until `last` pairs of user and item are read.

    The file that was written to last comes first, and of each file its last line.
    """
    pairs = 0
    files = sorted(home.requests.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        for line in _lines_from_the_end(path):
            if last is not None and pairs >= last:
                return
            request = _parsed(line)
            if request is not None:
                pairs += len(request.item_ids)
                yield request


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """A file's lines, the last one first; few are in memory at a time."""
    with path.open("rb") as file:
        left, end = b"", file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            left, *lines = (file.read(end - start) + left).split(b"\n")
            yield from reversed(lines)
            end = start
        yield left


def _plain(request: ServedRequest) -> dict[str, Any]:
    return {
        **vars(request),
        "served_at": request.served_at.isoformat(),
        "at": request.at.isoformat(),
        "user_vector": _packed(request.user_vector),
        "item_vectors": _packed(request.item_vectors),
    }


def _parsed(line: bytes) -> ServedRequest | None:
    """None for a line that is not whole."""
    try:
        raw = json.loads(line)
        user_vector = _unpacked(raw["user_vector"])
        return ServedRequest(
            **{
                **raw,
                "served_at": datetime.fromisoformat(raw["served_at"]).astimezone(UTC),
                "at": datetime.fromisoformat(raw["at"]).astimezone(UTC),
                "user_vector": user_vector,
                "item_vectors": _unpacked(raw["item_vectors"]).reshape(-1, len(user_vector)),
            }
        )
    except (ValueError, KeyError, TypeError):
        return None


def _packed(vectors: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode()


def _unpacked(text: str) -> npt.NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
