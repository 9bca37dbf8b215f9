"""API keys: made once, kept as hashes in the home, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from filelock import FileLock

from bahe_core.errors import BadInput, Damaged, one_line
from bahe_core.files import replace_atomically
from bahe_core.home import Home
from serving.http.guards import NOTHING_HERE, NOWHERE, Refused
from serving.http.work import RETRY_AFTER

_LOG = logging.getLogger(__name__)

SCOPES = ("read", "score", "write")
"""What a key may be for: features and state; scores and recommendations; sending behaviors and features."""
_NO_KEY = "give an API key of this service, as `Authorization: Bearer KEY`."


@dataclass(frozen=True, kw_only=True)
class _Key:
    name: str
    scopes: tuple[str, ...]
    sha256: str
    """Of the key. It is random and long, so a fast hash without salt is as good as a slow one."""
    created: str


def new_key(home: Home, name: str, scopes: Sequence[str] = ("read", "score")) -> str:
    """Make a key and return it; it can be read nowhere afterwards.

    Raises BadInput on an unknown scope, or a name that another key has.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise BadInput(f"a key's scope is one or more of {', '.join(SCOPES)}; correct it.")
    with _exclusive(home):
        return _added(home, name, scopes)


def _added(home: Home, name: str, scopes: Sequence[str]) -> str:
    keys = _read(home)
    if not name or any(key.name == name for key in keys):
        raise BadInput(f"a key needs a name of its own, and {name!r} is none; revoke the other one first.")
    token = f"bahe_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    made = _Key(name=name, scopes=tuple(dict.fromkeys(scopes)), sha256=_hash(token), created=created)
    _write(home, [*keys, made])
    return token


def revoke_key(home: Home, name: str) -> None:
    """Forget a key; running services refuse it from their next request on.

    Raises BadInput when there is none of that name.
    """
    with _exclusive(home):
        keys = _read(home)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise BadInput(
                f"no key is named {name!r}; there are {', '.join(key.name for key in keys) or 'none'}."
            )
        _write(home, left)


def has_keys(home: Home) -> bool:
    """Whether anyone could be let in."""
    return bool(_read(home))


class ApiKeys:
    """A home's keys as a service checks them, read again when they change."""

    def __init__(self, home: Home, *, required: bool = True) -> None:
        """Unless they are `required` anyhow, they are from when the home has one."""
        self._home, self._lock = home, threading.Lock()
        self._keys: list[_Key] = []
        self._changed = -1
        self._required = required

    def check(self, token: str, scope: str) -> None:
        """Raises Refused: 401 without a key of the home, 403 when it is not for this, 404 when none is."""
        keys = self._current()
        if not self._from_now_on(keys):
            return
        given = _hash(token)
        found: _Key | None = None
        for key in keys:  # all of them, however early one is found
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None:
            raise Refused(401, _NO_KEY, {"WWW-Authenticate": "Bearer"})
        if scope == NOWHERE:
            raise Refused(404, NOTHING_HERE)
        if scope not in found.scopes:
            raise Refused(403, f"this API key is not for the scope {scope}; use one that is.")

    @property
    def required(self) -> bool:
        """Whether a request needs a key by now; so it is also where they cannot be read."""
        try:
            return self._from_now_on(self._current())
        except Refused:
            return True

    def _from_now_on(self, keys: list[_Key]) -> bool:
        # For good: to revoke the last one lets nobody in.
        self._required = self._required or bool(keys)
        return self._required

    def _current(self) -> list[_Key]:
        try:
            changed = self._home.api_keys.stat().st_mtime_ns
            with self._lock:
                if changed != self._changed:
                    self._keys, self._changed = _read(self._home), changed
                return self._keys
        except FileNotFoundError:
            return []
        except (OSError, Damaged) as error:
            _LOG.error("%s", error)
            raise Refused(
                503, "the service cannot read its API keys; its log says why.", RETRY_AFTER
            ) from None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(home: Home) -> list[_Key]:
    try:
        rows = json.loads(home.api_keys.read_text())
        return [_Key(**{**row, "scopes": tuple(row["scopes"])}) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(
            f"{home.api_keys} cannot be read ({one_line(error)}); delete it and make new keys."
        ) from None


def _exclusive(home: Home) -> FileLock:
    """Nobody else changes the keys meanwhile: a key that was revoked would be written back."""
    home.create()
    return FileLock(home.api_keys.with_name(".api_keys.lock"))


def _write(home: Home, keys: list[_Key]) -> None:
    with replace_atomically(home.api_keys) as part:
        part.unlink(missing_ok=True)  # what a kill left may have another mode
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps([asdict(key) for key in keys], indent=1) + "\n")
