"""Values as files have them, each with what must become of it, by Python's own datetime and decimal.

Shares no code with the program: a cell is made from its value, never the value from the cell.
"""

from __future__ import annotations

import csv
import io
import zoneinfo
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

REFUSED = object()
"""What becomes of a value that cannot be kept: its row is set aside."""


@dataclass(frozen=True)
class Cell:
    """A text in a file, and the value that it stands for."""

    written: str
    value: Any


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ZONES = ("Asia/Tokyo", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe")

instants = st.datetimes(datetime(1981, 1, 1), datetime(2024, 12, 31)).map(lambda t: t.replace(tzinfo=UTC))
separators = st.sampled_from("T ")


def _clock(local: datetime, separator: str, digits: int) -> tuple[datetime, str]:
    """A local time cut to some digits (-1: no seconds), and how ISO 8601 writes that."""
    if digits < 0:
        local = local.replace(second=0, microsecond=0)
        return local, local.strftime(f"%Y-%m-%d{separator}%H:%M")
    local = local.replace(microsecond=local.microsecond // 10 ** (6 - digits) * 10 ** (6 - digits))
    text = local.strftime(f"%Y-%m-%d{separator}%H:%M:%S")
    return local, text + (f".{local.microsecond:06d}"[: digits + 1] if digits else "")


@st.composite
def iso_times(draw: st.DrawFn) -> Cell:
    """ISO 8601 without a zone, with one by letter, offset or name."""
    local, text = _clock(draw(instants).replace(tzinfo=None), draw(separators), draw(st.integers(-1, 6)))
    form = draw(st.sampled_from(["none", "date", "utc", "offset", "name"]))
    if form == "date":
        return Cell(
            f"{local:%Y-%m-%d}", local.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
        )
    if form == "utc":
        return Cell(
            text + draw(st.sampled_from(["Z", " Z", " UTC", "UTC", " GMT"])), local.replace(tzinfo=UTC)
        )
    if form == "offset":
        minutes = draw(st.integers(-14 * 60, 14 * 60))
        sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
        written = f"{sign}{hours:02d}{draw(st.sampled_from([':', '']))}{rest:02d}"
        if rest == 0 and draw(st.booleans()):
            written = f"{sign}{hours:02d}"
        aware = local.replace(tzinfo=timezone(timedelta(minutes=minutes)))
        return Cell(text + draw(st.sampled_from(["", " "])) + written, aware.astimezone(UTC))
    if form == "name":
        zone = zoneinfo.ZoneInfo(draw(st.sampled_from(ZONES)))
        first, second = (local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        # Not while clocks are set back (two instants) or forward (none).
        one = first == second and first.astimezone(zone).replace(tzinfo=None) == local
        return Cell(f"{text} {zone.key}", first if one else REFUSED)
    return Cell(text, local.replace(tzinfo=UTC))


@st.composite
def epoch_times(draw: st.DrawFn) -> Cell:
    """Seconds since 1970, with up to nine decimals; finer than a microsecond is refused."""
    instant = draw(instants)
    seconds = Decimal((instant - EPOCH) // timedelta(microseconds=1)) / 1_000_000
    if draw(st.booleans()):
        return Cell(str(int(seconds)), EPOCH + timedelta(seconds=int(seconds)))
    extra = draw(st.sampled_from(["", "0", "000", "1", "001"]))
    return Cell(f"{seconds:.6f}{extra}", instant if not extra.strip("0") else REFUSED)


bad_times = st.sampled_from(
    [
        "",
        " ",
        "yesterday",
        "01/05/2024",
        "2024/01/05",
        "2024-1-5",
        "2024-02-30",
        "2024-01-05 24:00:00",
        "2024-01-05 10:00:60",
        "2024-01-05T10:00:00.1234567",
        "2024-01-05 10:00 EST",
        "2024-01-05 10:00 Nowhere/Here",
        "2024-01-05 10:00+25:00",
        "2024-01-05Z",
        "2024-W01-5",
        "20240105",
        "1e9",
        "0x65",
        "infinity",
        "2199-01-01",
        "1979-12-31",
        "-5",
    ]
).map(lambda text: Cell(text, REFUSED))
times = st.one_of(iso_times(), iso_times(), epoch_times(), bad_times)

clicks = st.sampled_from(
    [Cell(w, 1) for w in ("1", "1.0", "true", "True", "TRUE")]
    + [Cell(w, 0) for w in ("0", "0.0", "false", "False")]
    + [Cell(w, REFUSED) for w in ("", "0.6", "2", "t", "yes", "-1", "1e0", "01", " 1")]
)

INVISIBLE = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\u200d\u2060\ufeff\u00ad\u180e"
"""White space and zero-width characters, some of which Python's str.strip leaves."""

blanks = st.text(INVISIBLE, max_size=4)
lookalikes = st.sampled_from(
    ["7", "7.0", "7e0", "007", "1_0", "10", "true", "True", "t", "NULL", "nan", "7 ", " 7"]
)
words = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs", "Cn", "Co", "Zs", "Zl", "Zp", "Cc", "Cf", "Mn"]),
        st.sampled_from("ab;,\"'\n\t |\\"),
    ),
    min_size=1,
    max_size=8,
).map(lambda text: f"x{text}")


def users() -> st.SearchStrategy[Cell]:
    """Ids of text: whatever shows anything is an id of its own."""
    shown = st.one_of(lookalikes, words).map(lambda text: Cell(text, text))
    return st.one_of(shown, shown, shown, blanks.map(lambda text: Cell(text, REFUSED)))


def csv_bytes(
    header: list[str], rows: list[list[str]], *, encoding: str, delimiter: str, line_end: str, quoting: int
) -> bytes:
    """A CSV file by Python's own writer."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue().encode(encoding)
