"""One definition of a blank text, for what enters the lake and for the gate that checks what is in it."""

from __future__ import annotations

# White space of every script, control and format characters (zero-width ones, marks of direction, the byte
# order mark), variation selectors, and letters that show nothing (fillers, the empty Braille pattern).
_INVISIBLE = (
    r"[\p{Z}\p{Cc}\p{Cf}\x{34F}\x{115F}\x{1160}\x{17B4}\x{17B5}\x{180B}-\x{180F}\x{2800}\x{3164}"
    r"\x{FE00}-\x{FE0F}\x{FFA0}]*"
)


def blank(text: str) -> str:
    """SQL predicate: the text (a SQL expression) shows nothing; null when it is null."""
    # Nearly every text begins with a printable ASCII character, which is told without a pattern.
    return f"""(CASE WHEN {text} >= '!' AND {text} < chr(127) THEN false
                ELSE regexp_full_match({text}, '{_INVISIBLE}') END)"""
