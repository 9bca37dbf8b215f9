"""What `bahe init` sees in a log's files: their columns, how values look, and what each may be for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from bahe_core.errors import BadInput, one_line
from bahe_lake.sql import sql_identifier, sql_literal

SAMPLE = 50_000
"""Rows that are looked at of each file."""

NAMES = {
    "user_id": "user_id user uid userid customer_id customer member_id member visitor_id visitor"
    " household_id household client_id client buyer_id account_id reader_id viewer_id",
    "item_id": "item_id item iid itemid product_id product movie_id movie article_id article sku asin"
    " isbn content_id video_id song_id track_id book_id news_id ad_id offer_id post_id",
    "event_timestamp": "event_timestamp timestamp event_time datetime time ts created_at created"
    " occurred_at date at when day unix_timestamp event_date released release_date published_at added_at",
    "clicked": "clicked click is_click is_clicked label converted purchased bought target",
    "rating": "rating ratings stars score grade",
    "impression_id": "impression_id impression request_id exposure_id",
    "channel": "channel event_type event action behavior behaviour behavior_type kind type activity",
    "text": "text title item_title movie_title product_name description name query headline sentence words"
    " caption summary comment review",
}
"""Names that a column of each kind often has, the likeliest first."""
CONTEXT = {
    "app",
    "browser",
    "device",
    "hour",
    "locale",
    "os",
    "page",
    "placement",
    "platform",
    "position",
    "slot",
}
"""Names of columns that are known before the answer to an impression is."""

_SECONDS = (3.2e8, 4.1e9)  # 1980 to 2099
UNITS = {"s": 1, "ms": 1e3, "us": 1e6}
"""How many of each are a second."""
_CHANNELS = 20
_ISO = re.compile(r"%Y-%m-%d([ T]%H:%M(:%S(\.%[fgn])?)?)?(%z|Z)?|")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column, as its first rows show it."""

    name: str
    kind: str
    """DuckDB's type; of CSV the one that its text looks like."""
    distinct: int
    low: str | None
    high: str | None
    words: float
    """Mean number of words in a value."""

    @property
    def numeric(self) -> bool:
        """Whether values are numbers."""
        return self.kind.endswith("INT") or self.kind.startswith(("INTEGER", "DOUBLE", "FLOAT", "DECIMAL"))

    @property
    def is_time(self) -> bool:
        """Whether the type says so itself."""
        return self.kind.startswith("TIMESTAMP") or self.kind == "DATE"

    @property
    def plain_name(self) -> str:
        """`userId`, `User ID` and `user-id` are all user_id."""
        parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.name)
        return re.sub(r"[^a-z0-9]+", "_", parted.lower()).strip("_")

    @property
    def time_unit(self) -> str | None:
        """The unit with which all values are times between 1980 and 2099; None for other columns."""
        if not self.numeric or self.low is None or self.high is None:
            return None
        for unit, factor in UNITS.items():
            if _SECONDS[0] * factor <= float(self.low) and float(self.high) <= _SECONDS[1] * factor:
                return unit
        return None


@dataclass(frozen=True, kw_only=True)
class Role:
    """A column that may be one of bahe's, and why."""

    column: Column
    reason: str


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """A file, or several with the same columns."""

    pattern: str
    """Path or glob as dataset.yaml names it."""
    paths: tuple[Path, ...]
    rows: int
    """Of the sample."""
    columns: tuple[Column, ...]
    delimiter: str | None = None
    """CSV's."""
    time_format: str | None = None
    """Of times written otherwise than in ISO 8601."""
    roles: dict[str, Role] = field(default_factory=dict)

    @property
    def parquet(self) -> bool:
        """Whether it is Parquet rather than CSV."""
        return self.delimiter is None

    @property
    def relation(self) -> str:
        """SQL that reads it, with the types that an ingest sees."""
        path = sql_literal(self.pattern)
        if self.delimiter is None:
            return f"read_parquet({path})"
        return f"read_csv({path}, header = true, all_varchar = true, delim = {sql_literal(self.delimiter)})"

    @property
    def seen(self) -> str:
        """SQL that reads all of it, with the types that text looks like."""
        paths = "[" + ", ".join(sql_literal(str(path)) for path in self.paths) + "]"
        return f"read_parquet({paths})" if self.parquet else f"read_csv({paths}, header = true)"

    def has(self, *roles: str) -> bool:
        """Whether there is a column for each."""
        return all(role in self.roles for role in roles)

    def sql(self, role: str) -> str:
        """The role's column as a SQL identifier."""
        return sql_identifier(self.roles[role].column.name)

    def is_key(self, role: str) -> bool:
        """Whether no value of the role's column comes twice."""
        return self.has(role) and self.roles[role].column.distinct == self.rows > 0


def look(connection: duckdb.DuckDBPyConnection, paths: Sequence[Path], folder: Path) -> list[LogFile]:
    """The files by their columns, as a dataset.yaml in `folder` would name them.

    Raises BadInput on a file that cannot be read, or is neither Parquet nor CSV.
    """
    groups: dict[tuple[object, ...], list[Path]] = {}
    for path in dict.fromkeys(paths):
        if not path.is_file():
            raise BadInput(f"{path} is no file; name the Parquet or CSV files of the log.")
        if suffix(path) not in ("parquet", "csv", "tsv", "txt"):
            raise BadInput(f"{path} is neither CSV nor Parquet; convert it.")
        try:
            names = tuple(connection.sql(f"SELECT * FROM {_sniffed(path)} LIMIT 0").columns)
        except duckdb.Error as error:
            raise BadInput(f"{path} cannot be read: {one_line(error)}.") from None
        groups.setdefault((path.resolve().parent, suffix(path), names), []).append(path)
    return [_look(connection, group, folder) for group in groups.values()]


def _look(connection: duckdb.DuckDBPyConnection, paths: list[Path], folder: Path) -> LogFile:
    first = paths[0]
    relation = f"(SELECT * FROM {_sniffed(first)} LIMIT {SAMPLE})"
    described = connection.sql(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    columns = []
    for name, kind, *_ in described:
        quoted = sql_identifier(name)
        words = f"avg(len(string_split(trim({quoted}), ' ')))" if kind == "VARCHAR" else "0"
        flat = not kind.endswith("]") and not kind.startswith(("STRUCT", "MAP", "UNION", "BLOB"))
        least, most = (f"min({quoted})::VARCHAR", f"max({quoted})::VARCHAR") if flat else ("NULL", "NULL")
        row = connection.execute(
            f"SELECT count(DISTINCT {quoted}), {least}, {most}, {words} FROM {relation}"
        ).fetchone()
        assert row is not None
        columns.append(
            Column(name=name, kind=kind, distinct=row[0], low=row[1], high=row[2], words=row[3] or 0.0)
        )
    count = connection.execute(f"SELECT count(*) FROM {relation}").fetchone()
    assert count is not None
    delimiter, time_format = None, None
    if suffix(first) != "parquet":
        sniffed = connection.execute(
            f"SELECT Delimiter, TimestampFormat, DateFormat FROM sniff_csv({sql_literal(str(first))})"
        ).fetchone()
        assert sniffed is not None
        delimiter = sniffed[0]
        time_format = next((form for form in sniffed[1:] if form and not _ISO.fullmatch(form)), None)
    return LogFile(
        pattern=_pattern(paths, folder),
        paths=tuple(paths),
        rows=count[0],
        columns=tuple(columns),
        delimiter=delimiter,
        time_format=time_format,
        roles=_roles(columns, count[0]),
    )


def _roles(columns: Sequence[Column], rows: int) -> dict[str, Role]:
    """What each column may be for: by its name, where values do not speak against it, else by values."""
    roles: dict[str, Role] = {}
    taken: set[str] = set()

    def take(role: str, column: Column, reason: str) -> None:
        roles[role] = Role(column=column, reason=reason)
        taken.add(column.name)

    for role, names in NAMES.items():
        by_name = {column.plain_name: column for column in reversed(columns)}
        for name in names.split():
            column = by_name.get(name)
            if column is not None and column.name not in taken and _fits(role, column):
                take(role, column, "by its name" + _seen(role, column))
                break
    free = [column for column in columns if column.name not in taken]
    if "event_timestamp" not in roles:
        times = [column for column in free if column.is_time or column.time_unit]
        if len(times) == 1:
            take("event_timestamp", times[0], "the only column of times" + _seen("time", times[0]))
    if "text" not in roles:
        worded = sorted((c for c in free if c.kind == "VARCHAR" and c.words >= 1.5), key=lambda c: c.words)
        if worded:
            take("text", worded[-1], f"the wordiest column, {worded[-1].words:.1f} words a value")
    if "clicked" not in roles and "rating" not in roles:
        binary = [c for c in columns if c.name not in taken and _fits("clicked", c) and c.distinct == 2]
        if len(binary) == 1:
            take("clicked", binary[0], "the only column of 0 and 1")
    for role, ending in (("user_id", "user"), ("item_id", "item")):
        if role not in roles:
            named = [c for c in columns if c.name not in taken and ending in c.plain_name.split("_")]
            if len(named) == 1 and named[0].words < 1.5 and not named[0].is_time:
                take(role, named[0], f"its name has the word {ending}")
    return roles


def _fits(role: str, column: Column) -> bool:
    """Whether the values are not against it."""
    if role == "event_timestamp":
        return column.is_time or column.time_unit is not None
    if role == "clicked":
        values = {column.low, column.high}
        return column.kind == "BOOLEAN" or (
            column.numeric and {float(v) for v in values if v} <= {0.0, 1.0}
        )
    if role == "rating":
        return column.numeric and column.distinct > 1
    if role == "channel":
        return column.kind == "VARCHAR" and column.distinct <= _CHANNELS
    if role == "text":
        return column.kind == "VARCHAR"
    return not column.is_time and column.kind not in ("DOUBLE", "FLOAT", "BOOLEAN")


def _seen(role: str, column: Column) -> str:
    if column.time_unit and role in ("event_timestamp", "time"):
        return f"; numbers that are times in {column.time_unit} since 1970"
    if role in ("clicked", "rating"):
        return f"; values from {column.low} to {column.high}"
    return ""


def _sniffed(path: Path) -> str:
    listed = sql_literal(str(path))
    if suffix(path) == "parquet":
        return f"read_parquet({listed})"
    return f"read_csv({listed}, header = true, sample_size = {SAMPLE})"


def _pattern(paths: Sequence[Path], folder: Path) -> str:
    """One path, or the glob that matches these files and no others."""
    shown = [
        path.resolve().relative_to(folder) if path.resolve().is_relative_to(folder) else path.resolve()
        for path in paths
    ]
    if len(shown) == 1:
        return shown[0].as_posix()
    names = [path.name for path in shown]
    start = next(i for i, letters in enumerate(zip(*names, strict=False)) if len(set(letters)) > 1)
    pattern = names[0][:start] + "*" + "".join(shown[0].suffixes[-1:])
    matched = {path.name for path in paths[0].resolve().parent.glob(pattern)}
    if matched != set(names):
        raise BadInput(
            f"{', '.join(names)} have the same columns, but {pattern} matches others too; put them into a"
            " folder of their own."
        )
    return (shown[0].parent / pattern).as_posix()


def suffix(path: str | Path) -> str:
    """The ending that tells a file's format; compression does not."""
    return str(path).removesuffix(".gz").rsplit(".", 1)[-1].lower()
