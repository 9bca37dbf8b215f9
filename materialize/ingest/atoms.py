"""Text to atom: normalised, and named by a hash that stays the same for ever."""

from __future__ import annotations

# Equal texts must give equal atoms for ever, so the hash is MD5 of text normalised here, not DuckDB's
# own hash, which may change between versions. UBIGINT is shifted into Feast's signed Int64.
NORMAL_TEXT = r"nfc_normalize(trim(regexp_replace({text}, '\s+', ' ', 'g')))"
ATOM_ID = "(md5_number_lower({channel} || chr(31) || {text})::HUGEINT - 9223372036854775808)::BIGINT"
