"""The errors a user of bahe can meet. Each message is one sentence: what, where, what to do."""

from __future__ import annotations


class BaheError(Exception):
    """Base of every error that bahe raises on purpose. The command line exits with `exit_code`."""

    exit_code = 2


class BadInput(BaheError):
    """The user's data, file or option is wrong; nothing was written."""


class NotServable(BadInput):
    """A model whose scores need more than stored vectors was asked to be stored or served."""


class NotReady(BaheError):
    """A job was asked for before the job whose output it needs."""


class UnknownEntity(BaheError):
    """A user or item that the online store has never seen."""


class GateFailed(BaheError):
    """A Great Expectations gate refused a hand-over; what it guards was not passed on."""


class Damaged(BaheError):
    """A file of the home cannot be read any more."""


class Busy(BaheError):
    """Another process holds this home folder; nothing was done."""


class Unreachable(BaheError):
    """A server that the home is configured with (PostgreSQL, Ray) does not answer, or not as it should."""


def one_line(error: Exception) -> str:
    """The first line of a library's error message, without a full stop, for use in one of ours."""
    message = str(error).strip() or type(error).__name__
    return " ".join(message.split("\n", 1)[0].split()).rstrip(".")


def last_line(error: Exception) -> str:
    """The last line of a library's error message that says something, where the first is its context."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    return " ".join(lines[-1].split()).rstrip(".") if lines else type(error).__name__
