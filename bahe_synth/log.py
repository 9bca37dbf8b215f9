"""`bahe synth`: a log of any size, drawn from a planted world, with the best possible AUC known.

One file per day and table; a day's files have temporary names until all are complete. The truth about each
impression (its click probability) is kept apart in `truth/`, which no job reads. The log is a function of
the settings: the same numpy, pyarrow and kind of processor write the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from bahe_core.errors import BadInput, Busy
from bahe_core.progress import progress
from bahe_core.results import Result
from bahe_synth import rows as synth_rows
from bahe_synth.errands import KINDS
from bahe_synth.rows import Settings
from bahe_synth.words import TOPICS

SETTINGS_FILE = "synth.json"

MOST_LOGITS = 20.0
"""More makes no click likelier."""


@dataclass(frozen=True)
class Synthesized(Result):
    """A synthetic log on disk."""

    dataset: Path
    days: int
    """Days in the folder."""
    days_written: int
    """Days that this run wrote."""
    rows: dict[str, int]
    """Rows of each table over all days."""
    bayes_auc: float
    """AUC of the true click probabilities: no model can be expected to do better."""
    popularity_auc: float
    """AUC of the items' appeal to everyone: what is possible without knowing the user."""


def synth(folder: Path, *, days: int | None = None, **given: Any) -> Synthesized:
    """Write the days that the folder does not have yet.

    A new folder takes `Settings` as given, with its defaults for the rest. A folder that has a synthetic
    log keeps its settings; a larger `days` adds days and leaves existing ones alone. Raises BadInput on
    settings that are invalid or not those of the folder, Busy when another process writes to it.
    """
    from filelock import FileLock, Timeout

    settings = _settings(folder, days, given)
    total_days = settings.days if days is None else days
    _check_end(settings, total_days)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            _write_atomically(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=2) + "\n")
            missing = [day for day in range(total_days) if not _is_complete(folder, settings, day)]
            rows = sum(
                len(settings.rows(settings.behaviors, day))
                + settings.errand_rows(day)
                + len(settings.rows(settings.impressions, day))
                for day in missing
            )
            if missing:
                with progress("behaviors and impressions", rows) as advance:
                    for day in missing:
                        _write_day(folder, settings, day, advance)
            dataset = folder / "dataset.yaml"
            if not dataset.is_file():  # last, so that an incomplete log cannot be read
                _write_atomically(dataset, _dataset_yaml(settings))
            return _summary(folder, settings, len(missing))
    except Timeout:
        raise Busy(f"another `bahe synth` is writing to {folder}; wait for it to end.") from None


def _settings(folder: Path, days: int | None, given: dict[str, Any]) -> Settings:
    """The folder's settings, else new ones. Raises BadInput when they do not fit together."""
    path = folder / SETTINGS_FILE
    if path.is_file():
        try:
            stored = json.loads(path.read_text())
            settings = Settings(**{**stored, "channels": tuple(stored["channels"])})
        except (ValueError, TypeError, KeyError):
            raise BadInput(f"{path} is damaged; delete {folder} and write the log again.") from None
        for option, value in given.items():
            if value != getattr(settings, option):
                raise BadInput(
                    f"{folder} holds a log with --{option} {_shown(getattr(settings, option))}, not"
                    f" {_shown(value)}; leave the option out to add days, or name another folder."
                )
        if days is not None and days < 1:
            raise BadInput(f"--days is {days}; it must be at least 1.")
        return settings
    if folder.exists() and (not folder.is_dir() or any(f.name != ".lock" for f in folder.iterdir())):
        raise BadInput(f"{folder} exists already and holds no synthetic log; name a new folder.")
    settings = Settings(**given) if days is None else Settings(**given, days=days)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    invalid = [channel for channel in settings.channels if not re.fullmatch(r"[a-z][a-z0-9_]*", channel)]
    if invalid or not settings.channels:
        shown = repr(invalid[0]) if invalid else "empty"
        raise BadInput(f"--channels: {shown} is not a valid name; use lower-case letters, digits and _.")
    if len(set(settings.channels)) != len(settings.channels) or "item" in settings.channels:
        raise BadInput("--channels: names must differ, and `item` is reserved for item texts.")
    minimums = {
        "seed": 0,
        "days": 1,
        "users": 1,
        "items": len(TOPICS),
        "atoms": settings.world().blocks,
        "behaviors": settings.days,
        "impressions": settings.days,
    }
    reasons = {
        "items": "one per topic",
        "atoms": "one per channel, topic and style",
        "behaviors": "one per day",
        "impressions": "one per day",
    }
    for option, minimum in minimums.items():
        value = getattr(settings, option)
        if value < minimum:
            reason = f", {reasons[option]}" if option in reasons else ""
            raise BadInput(f"--{option} is {value:,}; it must be at least {minimum:,}{reason}.")
    for kind in KINDS:
        strength = getattr(settings, kind.name)
        if not 0 <= strength <= MOST_LOGITS:
            raise BadInput(
                f"--{kind.name} is {strength}; it is in logits, from 0 (nothing planted) to {MOST_LOGITS}."
            )
        if strength and len(settings.channels) < kind.channels:
            raise BadInput(f"--{kind.name} needs {kind.channels} --channels or more.")
    if settings.format not in ("parquet", "csv"):
        raise BadInput(f"--format is {settings.format}; it must be parquet or csv.")
    try:
        date.fromisoformat(settings.start)
    except ValueError:
        raise BadInput(f"--start is {settings.start}; write a date such as 2024-01-31.") from None


def _check_end(settings: Settings, days: int) -> None:
    today = datetime.now(UTC).date()
    try:
        last = settings.date(days - 1)
    except OverflowError:
        last = date.max
    if last > today or settings.date(0) < date(1970, 1, 3):
        raise BadInput(
            f"--start {settings.start} with --days {days:,} spans {settings.start} to {last}; events"
            f" must lie between 1970-01-03 and today ({today}), so choose another start or fewer days."
        )


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


# ---- one day


def _write_day(folder: Path, settings: Settings, day: int, advance: Callable[..., None]) -> None:
    """Write a day's files, then rename them; the truth comes last, which marks the day as complete."""
    written: list[Path] = []
    makers: dict[str, Callable[[], Iterator[pa.Table]]] = {
        "users": lambda: synth_rows.users(settings, day),
        "items": lambda: synth_rows.items(settings, day),
        "behaviors": lambda: synth_rows.behaviors(settings, day),
    }
    for table, make in makers.items():
        path = _path(folder, settings, table, day)
        with _Writer(path) as writer:
            for chunk in make():
                writer.write(chunk)
                if table == "behaviors":
                    advance(chunk.num_rows, note=str(settings.date(day)))
        if writer.rows:
            written.append(path)
    log, truth = (_path(folder, settings, table, day) for table in ("impressions", "truth"))
    with _Writer(log) as log_writer, _Writer(truth) as truth_writer:
        for log_rows, truth_rows in synth_rows.impressions(settings, day):
            log_writer.write(log_rows)
            truth_writer.write(truth_rows)
            advance(log_rows.num_rows)
    for path in (*written, log, truth):
        _part(path).replace(path)


# ---- files


class _Writer:
    """Writes chunks to one temporary file, Parquet or CSV; no file when there are no rows."""

    def __init__(self, path: Path) -> None:
        self._path, self.rows = _part(path), 0
        self._sink: Any = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, chunk: pa.Table) -> None:
        """Append a chunk; in Parquet, a row group."""
        if self._sink is None:
            self._path.parent.mkdir(exist_ok=True)
            if self._path.name.endswith(".csv.part"):
                self._sink = pyarrow.csv.CSVWriter(self._path, chunk.schema)
            else:
                self._sink = pq.ParquetWriter(self._path, chunk.schema, compression="zstd")
        self._sink.write_table(chunk)
        self.rows += chunk.num_rows

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.close()


def _path(folder: Path, settings: Settings, table: str, day: int) -> Path:
    suffix = "parquet" if table == "truth" else settings.format
    return folder / table / f"{settings.date(day)}.{suffix}"


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _is_complete(folder: Path, settings: Settings, day: int) -> bool:
    tables = ("behaviors", "impressions", "truth")
    return all(_path(folder, settings, table, day).is_file() for table in tables)


def _write_atomically(path: Path, text: str) -> None:
    part = _part(path)
    part.write_text(text)
    part.replace(path)


_KEYS = {
    "behaviors": ("user_id",),
    "impressions": ("impression_id", "user_id", "item_id"),
    "items": ("item_id",),
    "users": ("user_id",),
}


def _dataset_yaml(settings: Settings) -> str:
    sections: dict[str, Any] = {"name": "synthetic", "channels": list(settings.channels)}
    for table in ("behaviors", "impressions", "items", "users"):
        sections[table] = {"files": f"{table}/*.{settings.format}"}
        if settings.format == "csv":  # which has no types
            sections[table]["types"] = dict.fromkeys(_KEYS[table], "integer")
    return (
        "# Written by `bahe synth` (synth.json has its settings); `truth/` is not part of the dataset.\n"
        + yaml.safe_dump(sections, sort_keys=False)
    )


# ---- what is known about it


def _summary(folder: Path, settings: Settings, written: int) -> Synthesized:
    """Rows and best AUCs over all days in the folder."""
    bins = 1 << 16
    counts = {score: np.zeros((2, bins)) for score in ("click_probability", "item_appeal")}
    days = 0
    while _is_complete(folder, settings, days):
        path = _path(folder, settings, "truth", days)
        try:
            truth = pq.ParquetFile(path)
        except pa.ArrowInvalid:
            raise BadInput(
                f"{path} is damaged; delete it and run again, which rewrites that day."
            ) from None
        for group in range(truth.num_row_groups):
            table = truth.read_row_group(group)
            clicked = table["clicked"].to_numpy()
            for score, count in counts.items():
                value = table[score].to_numpy()
                probability = value if score == "click_probability" else 1 / (1 + np.exp(-value))
                bin_index = (probability * bins).astype(np.int64)
                for outcome in (0, 1):
                    count[outcome] += np.bincount(bin_index[clicked == outcome], minlength=bins)
        days += 1
    rows = {
        "behaviors": settings.rows(settings.behaviors, days).start
        + sum(settings.errand_rows(day) for day in range(days)),
        "impressions": settings.rows(settings.impressions, days).start,
        "users": settings.users,
        "items": settings.items,
    }
    return Synthesized(
        folder / "dataset.yaml",
        days,
        written,
        rows,
        counted_auc(counts["click_probability"]),
        counted_auc(counts["item_appeal"]),
    )


def counted_auc(counts_2B: npt.NDArray[np.float64]) -> float:
    """AUC from the counts of unclicked (row 0) and clicked (row 1) impressions in each bin of the score.

    Two scores in one bin are a tie. NaN unless both classes are present.
    """
    unclicked_B, clicked_B = counts_2B
    pairs = unclicked_B.sum() * clicked_B.sum()
    below_B = np.cumsum(unclicked_B) - unclicked_B
    return float((clicked_B * (below_B + unclicked_B / 2)).sum() / pairs) if pairs else float("nan")
