"""Keep the lake small over years of nightly runs: merge small files, forget old snapshots.

Every night appends a small file to each table and deletes rows that a late event has changed. `compact`
merges small files, rewrites files with many deleted rows, forgets snapshots older than asked, and removes
files that no snapshot needs. Each step is one DuckLake transaction, so a kill between or within steps
leaves the lake whole, and the next call does the rest.

Readers are never harmed: a snapshot is forgotten only when another took its place more than GRACE ago, and
files leave only after they have been out of use for as long, so a job that began before the compaction
still finds what it reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta

import duckdb
import pyarrow.parquet as pq

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.progress import progress
from bahe_core.results import Result
from bahe_lake.catalogue import scalar
from bahe_lake.connection import LAKE, lake
from bahe_lake.sql import sql_literal

GRACE = timedelta(days=1)
"""How long a file that is no longer needed stays for the readers that began before."""

DELETED_SHARE = 0.3
"""Files of which more than this share of the rows is deleted are written anew."""


@dataclass(frozen=True)
class Compacted(Result):
    """What a run of `compact` did."""

    files_before: int
    """Data files of the newest snapshot."""
    files_after: int
    snapshots_forgotten: int
    oldest_snapshot: int
    """The oldest one that `--as-of` can still name."""
    files_removed: int
    """Files that nothing needed any more."""

    @property
    def summary(self) -> list[str]:
        """Files and snapshots, before and after."""
        return [
            f"{self.files_before:,} data files became {self.files_after:,};"
            f" {self.snapshots_forgotten:,} snapshots forgotten, the oldest is {self.oldest_snapshot};"
            f" {self.files_removed:,} files removed"
        ]


def compact(home: Home, *, keep_days: float) -> Compacted:
    """Merge small files, and forget what the lake was more than `keep_days` (or GRACE) ago.

    What the home's frames were pulled from is kept. Other frames and stores that read the lake as of a
    forgotten snapshot fail afterwards. Raises NotReady without a lake.
    """
    if keep_days < 0:
        raise BadInput(f"--keep-days is {keep_days:g}; give 0 or more days.")
    with home.exclusive(), lake(home) as connection:
        files_before, forgotten, removed = _files(connection), 0, 0
        steps = [
            # Rows that DuckLake keeps in its catalogue stay there: a table whose rows are written out and
            # then rewritten answers wrongly of its past (DuckLake 1.0).
            f"CALL ducklake_rewrite_data_files('{LAKE}', delete_threshold => {DELETED_SHARE})",
            f"CALL ducklake_merge_adjacent_files('{LAKE}')",
            *_forget(connection, max(timedelta(keep_days), GRACE), _pulled(home)),
            f"CALL ducklake_cleanup_old_files('{LAKE}', older_than => now() - {_interval(GRACE)})",
            # Files that a killed job wrote and never committed.
            f"CALL ducklake_delete_orphaned_files('{LAKE}', older_than => now() - {_interval(GRACE)})",
        ]
        with progress("compacting", len(steps)) as advance:
            for step in steps:
                rows = connection.execute(step).fetchall()
                if "expire" in step:
                    forgotten = len(rows)
                elif "cleanup" in step or "orphaned" in step:
                    removed += len(rows)
                advance()
        oldest = scalar(connection, f"SELECT min(snapshot_id) FROM {LAKE}.snapshots()")
        return Compacted(files_before, _files(connection), forgotten, oldest, removed)


def _pulled(home: Home) -> set[int]:
    """Snapshots that frames of the home were pulled at."""
    metadata = (pq.read_schema(path).metadata or {} for path in home.frames.glob("*/frame.parquet"))
    return {json.loads(facts[b"bahe"])["snapshot"] for facts in metadata if b"bahe" in facts}


def _forget(connection: duckdb.DuckDBPyConnection, age: timedelta, needed: set[int]) -> list[str]:
    """The statement, if any, that forgets snapshots which others replaced longer than `age` ago."""
    rows = connection.execute(
        f"""
        SELECT snapshot_id
        FROM (
            SELECT snapshot_id, lead(snapshot_time) OVER (ORDER BY snapshot_id) AS replaced
            FROM {LAKE}.snapshots()
        )
        WHERE replaced < now() - {_interval(age)}
        """
    ).fetchall()
    old = [str(number) for (number,) in rows if number not in needed]
    return [f"CALL ducklake_expire_snapshots('{LAKE}', versions => [{', '.join(old)}])"] if old else []


def _interval(length: timedelta) -> str:
    return f"INTERVAL {sql_literal(f'{round(length.total_seconds())} seconds')}"


def _files(connection: duckdb.DuckDBPyConnection) -> int:
    return scalar(connection, f"SELECT coalesce(sum(file_count), 0) FROM ducklake_table_info('{LAKE}')")
