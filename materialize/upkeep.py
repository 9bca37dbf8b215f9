"""Upkeep of the lake for years of nights: few large files instead of many small ones, and an end to the past.

Every night appends a small file to each table and deletes rows that a late event has changed. `compact`
merges what is small, rewrites files of which much is deleted, forgets snapshots that are older than asked,
and removes the files that no snapshot needs any more. Each step is a transaction of DuckLake's own, so a
kill between or within them leaves a whole lake, and the next call does the rest.

Readers are never harmed: files leave only after they have been out of use for GRACE, so a job that began
before the compaction still finds what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.progress import progress
from materialize.lake import LAKE, lake, quoted, scalar

GRACE = timedelta(days=1)
"""How long a file that is no longer needed stays for the readers that began before."""

DELETED_SHARE = 0.3
"""Files of which more than this share of the rows is deleted are written anew."""


@dataclass(frozen=True)
class Compacted:
    """What a run of `compact` did."""

    files_before: int
    """Data files of the newest snapshot."""
    files_after: int
    snapshots_forgotten: int
    oldest_snapshot: int
    """The oldest one that `--as-of` can still name."""
    files_removed: int
    """Files that nothing needed any more."""


def compact(home: Home, *, keep_days: float) -> Compacted:
    """Merge small files and forget snapshots older than `keep_days`; raises NotReady without a lake.

    Frames and stores that read the lake as of a forgotten snapshot fail afterwards; the newest one stays.
    """
    if keep_days < 0:
        raise BadInput(f"--keep-days is {keep_days:g}; give 0 or more days.")
    with home.exclusive(), lake(home) as connection:
        files_before, snapshots = _files(connection), _snapshots(connection)
        steps = (
            # Rows that DuckLake keeps in its catalogue stay there: a table whose rows are written out and then
            # rewritten answers wrongly of its past (DuckLake 1.0).
            f"CALL ducklake_rewrite_data_files('{LAKE}', delete_threshold => {DELETED_SHARE})",
            f"CALL ducklake_merge_adjacent_files('{LAKE}')",
            f"CALL ducklake_expire_snapshots('{LAKE}', older_than => now() - {_interval(timedelta(keep_days))})",
            f"CALL ducklake_cleanup_old_files('{LAKE}', older_than => now() - {_interval(GRACE)})",
            # Files that a killed job wrote and never committed.
            f"CALL ducklake_delete_orphaned_files('{LAKE}', older_than => now() - {_interval(GRACE)})",
        )
        removed = 0
        with progress("compacting", len(steps)) as advance:
            for step in steps:
                rows = connection.execute(step).fetchall()
                if "cleanup" in step or "orphaned" in step:
                    removed += len(rows)
                advance()
        oldest = scalar(connection, f"SELECT min(snapshot_id) FROM {LAKE}.snapshots()")
        return Compacted(
            files_before,
            _files(connection),
            max(0, snapshots - _snapshots(connection)),
            oldest,
            removed,
        )


def _interval(length: timedelta) -> str:
    return f"INTERVAL {quoted(f'{round(length.total_seconds())} seconds')}"


def _files(connection: duckdb.DuckDBPyConnection) -> int:
    return scalar(connection, f"SELECT coalesce(sum(file_count), 0) FROM ducklake_table_info('{LAKE}')")


def _snapshots(connection: duckdb.DuckDBPyConnection) -> int:
    return scalar(connection, f"SELECT count(*) FROM {LAKE}.snapshots()")
