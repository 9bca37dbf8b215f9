"""Where a home's lake is: its catalogue in SQLite or PostgreSQL, its data in a folder or on S3."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import yaml

from bahe_core.errors import BadInput, Busy, Damaged, Unreachable, last_line
from bahe_core.files import replace_atomically

if TYPE_CHECKING:
    import psycopg


def bound_postgres_wait() -> None:
    """Make connections to PostgreSQL, including DuckDB's and Feast's, time out after 10 s unless the user
    has set another limit; libpq, which reads this variable, would otherwise wait for minutes."""
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")


@dataclass(frozen=True, kw_only=True)
class LakeConfig:
    """The `lake` section of dataset.yaml. What is left out is in the home."""

    catalogue: str | None = None
    """`postgresql://user@host:port/database`, without the password, which comes from PGPASSWORD or
    ~/.pgpass, as for every PostgreSQL client. Left out: SQLite, for one machine."""
    schema: str = "bahe"
    """The catalogue's schema in that database, created by the first ingest; one for each dataset."""
    data: str | None = None
    """Folder of the Parquet files (relative to dataset.yaml), or `s3://bucket/prefix`."""

    def __post_init__(self) -> None:
        if self.catalogue is not None:
            _check_url(self.catalogue)
            if self.data is None:
                raise ValueError(
                    "`data` is missing; name a folder or s3://bucket/prefix that every machine which uses"
                    " this catalogue can reach"
                )
        if not re.fullmatch(r"(?!pg_)[a-z_][a-z0-9_]{0,62}", self.schema):
            raise ValueError(
                f"`schema` is {self.schema}; use lower-case letters, digits and _, not starting with pg_"
            )
        if self.data is not None and "://" in self.data and not re.match(r"s3://[^/]", self.data):
            raise ValueError(f"`data` is {self.data}; give a folder or s3://bucket/prefix")


def _check_url(url: str) -> None:
    """Raises ValueError, which does not show the URL, since that may hold a password."""
    try:
        parts = urlsplit(url)
        password = parts.password or "password" in dict(parse_qsl(parts.query))
        complete = parts.scheme in ("postgresql", "postgres") and len(parts.path) > 1
    except ValueError:
        password, complete = None, False
    if password:
        raise ValueError("`catalogue` holds a password; remove it, and set PGPASSWORD or use ~/.pgpass")
    if not complete:
        raise ValueError("`catalogue` is not of the form postgresql://user@host:port/database")


@dataclass(frozen=True, kw_only=True)
class LakeLocation:
    """A lake's full location; with a PostgreSQL catalogue it is the same on every machine."""

    catalogue: str
    """A PostgreSQL URL, or the path of an SQLite file."""
    data: str
    schema: str | None = None
    """The schema in PostgreSQL; None with SQLite."""
    moves: bool = True
    """Whether the data is beside the catalogue, and may be moved or copied together with it."""

    @property
    def postgres(self) -> bool:
        """Whether the catalogue is in PostgreSQL."""
        return self.schema is not None

    def __str__(self) -> str:
        """The name used in errors."""
        return f"{self.catalogue} (schema {self.schema})" if self.postgres else self.catalogue

    @contextmanager
    def exclusive(self, wait: float = 0) -> Iterator[None]:
        """Keep writers on all machines out while a job writes.

        Raises Busy when another job is still writing after `wait` seconds.

        This is an advisory lock of PostgreSQL, released with the connection, so a killed job leaves none
        behind. With SQLite there is nothing to do: its writers all hold the home's own lock.
        """
        if not self.postgres:
            yield
            return
        with self._session() as session:
            key = f"bahe lake {self.schema}"
            if not _locked(session, key, wait):
                raise Busy(
                    f"a bahe job of another home or machine is writing to the lake {self}; wait for it to"
                    " end."
                )
            yield
            try:
                still_held = _single(session, "SELECT pg_advisory_unlock(hashtextextended(%s, 0))", key)
            except _psycopg().OperationalError:
                still_held = False
            if not still_held:
                raise Busy(
                    f"the connection to {self} was lost during the job, and with it the lock, so another"
                    " job may have written at the same time; what was committed is kept, run it again."
                )

    @contextmanager
    def _session(self) -> Iterator[psycopg.Connection]:
        library = _psycopg()
        bound_postgres_wait()
        try:
            # Kept alive, or a firewall drops the silent connection of a long job, and the lock with it.
            session = library.connect(
                self.catalogue, autocommit=True, keepalives_idle=30, fallback_application_name="bahe lock"
            )
        except library.Error as error:
            raise self.unreachable(error) from None
        try:
            yield session
        finally:
            session.close()

    def unreachable(self, error: Exception) -> Unreachable:
        """The error for a server that does not answer, or answers with an error."""
        return Unreachable(
            f"the lake's catalogue {self} cannot be reached ({last_line(error)}); start the server, create"
            " the database, or correct `lake.catalogue` (the password comes from PGPASSWORD or ~/.pgpass)."
        )


def _locked(session: psycopg.Connection, key: str, wait: float) -> bool:
    """Take the advisory lock of this key; False if it is still held after `wait` seconds."""
    if not wait:
        return bool(_single(session, "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", key))
    session.execute(f"SET lock_timeout = {round(wait * 1000)}")
    try:
        session.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [key])
    except _psycopg().errors.LockNotAvailable:
        return False
    session.execute("RESET lock_timeout")
    return True


def _single(session: psycopg.Connection, query: str, value: str) -> object:
    row = session.execute(query, [value]).fetchone()
    assert row is not None
    return row[0]


def _psycopg() -> ModuleType:
    try:
        import psycopg
    except ImportError:
        raise BadInput(
            "`lake.catalogue` is in PostgreSQL, which needs another package: pip install 'bahe[postgres]'."
        ) from None
    return psycopg


def read_lake_config(path: Path) -> LakeConfig:
    """The home's lake.yaml; the default if there is none. Raises Damaged."""
    if not path.is_file():
        return LakeConfig()
    try:
        return LakeConfig(**yaml.safe_load(path.read_text()))
    except (TypeError, ValueError, UnicodeDecodeError, yaml.YAMLError):
        raise Damaged(
            f"{path} cannot be read; write the `lake` section of dataset.yaml into it again."
        ) from None


def write_lake_config(config: LakeConfig, path: Path) -> None:
    """Write lake.yaml atomically; the default has no file."""
    if config == LakeConfig():
        path.unlink(missing_ok=True)
        return
    text = "# Where the lake of this home is; written by the first `bahe ingest`.\n"
    with replace_atomically(path) as part:
        part.write_text(text + yaml.safe_dump(asdict(config), sort_keys=False))
