"""Ids of users, items and impressions: exactly what they are in the log, integers or texts."""

from __future__ import annotations

import operator
import re

Identifier = str | int
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
"""As an integer is written by everyone: no sign, blank, underscore or zero that it can do without."""


def id_as(value: Identifier, *, integer: bool) -> Identifier | None:
    """An id as an integer or a text; None when it cannot be one.

    An id is exactly what it is: 10 is written "10" or 10, not "1_0", " 10 ", "010" or true.
    """
    if isinstance(value, bool):
        return None
    if integer:
        if isinstance(value, str):
            if len(value) > 20 or not _INTEGER.fullmatch(value):
                return None
            value = int(value)
        number = operator.index(value)  # an int, also of numpy's
        return number if -(2**63) <= number < 2**63 else None
    text = str(value)
    return text if text.isascii() or _encodable(text) else None


def _encodable(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
