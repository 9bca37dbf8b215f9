"""The errors a user of bahe can meet. Each message is one sentence: what, where, what to do."""

from __future__ import annotations

import re


class BaheError(Exception):
    """Base of every error that bahe raises on purpose. The command line exits with `exit_code`."""

    exit_code = 2


class BadInput(BaheError):
    """The user's data, file or option is wrong; nothing was written."""


class NotServable(BadInput):
    """A model that needs more than stored vectors to score was to be embedded or served."""


class NotReady(BaheError):
    """A job was started before the job whose output it needs."""


class UnknownEntity(BaheError):
    """A user or item that the online store has never seen."""


class GateFailed(BaheError):
    """A Great Expectations gate refused a hand-over; what it guards was not passed on."""


class Damaged(BaheError):
    """A file in the home can no longer be read."""


class NotWritable(BaheError):
    """The disk is full, or permission to read or write a file is missing; earlier commits are kept."""


class Busy(BaheError):
    """Another process holds this home folder; nothing was done."""


class Unreachable(BaheError):
    """A server that the home uses (PostgreSQL, Ray) does not answer, or answers with an error."""


# The last one is DuckLake's, for an SQLite catalogue: SQLite rolls back by itself when it cannot write.
_FULL = re.compile(
    "no space left on device|disk is full|disk quota exceeded|file too large|disk i/o error"
    "|max_temp_directory_size|cannot rollback - no transaction is active",
    re.I,
)
_FORBIDDEN = re.compile(
    "read-only file system|readonly database|permission denied|operation not permitted"
    "|unable to open database file",
    re.I,
)


def storage_problem(error: BaseException) -> NotWritable | None:
    """The NotWritable for a library's error; None when the error is about something else.

    Libraries report a full disk in their own types of error (DuckDB, SQLite, safetensors, Arrow), some with
    the operating system's error as cause, but all in its words.
    """
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, BaheError):
            if _FULL.search(str(cause)):
                return NotWritable(
                    f"the disk is full or fails ({one_line(cause)}); what was committed before is kept, so"
                    " free some space and run it again."
                )
            if _FORBIDDEN.search(str(cause)):
                return NotWritable(
                    f"a file or folder may not be read or written to ({one_line(cause)}); what was"
                    " committed before is kept, so grant permission or choose another folder, and run it"
                    " again."
                )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def one_line(error: BaseException) -> str:
    """The first line of a library's error message, without a full stop, for use in one of ours."""
    message = str(error).strip() or type(error).__name__
    return " ".join(message.split("\n", 1)[0].split()).rstrip(".")


def clipped(value: object, most: int = 100) -> str:
    """A value as a message repeats it: not longer than `most` characters, whatever was sent."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def last_line(error: Exception) -> str:
    """The last non-blank line of a library's error message, where the first is only context."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(lines[-1].split()).rstrip(".") if lines else type(error).__name__
