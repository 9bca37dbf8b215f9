"""Compacting changes no answer: not of now, not of a snapshot that is kept, not of a reader in between."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import connect, lake
from materialize.ingest.ingest import ingest
from materialize.upkeep import compact as upkeep
from materialize.upkeep.compact import compact
from tests.support import REPOSITORY
from tests.support.logs import small_log, write_dataset

Contents = dict[str, list[tuple[object, ...]]]

# Dies at the n-th statement of the compaction.
CHILD = """
import os, signal, sys
from pathlib import Path
from bahe_core.home import Home
from materialize.upkeep import compact as upkeep
from datetime import timedelta
upkeep.GRACE = timedelta(0)
lake = upkeep.lake
class Dying:
    def __init__(self, connection): self.connection, self.calls = connection, 0
    def execute(self, query, *more):
        if query.startswith("CALL"):
            self.calls += 1
            if self.calls == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
        return self.connection.execute(query, *more)
from contextlib import contextmanager
@contextmanager
def dying(home):
    with lake(home) as connection: yield Dying(connection)
upkeep.lake = dying
upkeep.compact(Home.at(sys.argv[1]), keep_days=0)
"""


def nights(folder: Path, home: Home) -> None:
    """Four ingests, of which the third brings late events."""
    log = small_log(rows=240, users=8)
    order = [*range(80), *range(120, 160), *range(80, 120), *range(160, 240)]
    for rows in (80, 120, 160, 240):
        part = {t: r.iloc[order[:rows]] if len(r) == 240 else r for t, r in log.items()}
        ingest(home, write_dataset(folder / "log", part))


def contents(home: Home, snapshot: int | None = None) -> Contents:
    with lake(home, as_of=snapshot) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall()
            for (table,) in connection.execute("SHOW TABLES").fetchall()
        }


def snapshots(home: Home) -> list[int]:
    with lake(home) as connection:
        rows = connection.execute("SELECT snapshot_id FROM lake.snapshots() ORDER BY 1").fetchall()
    return [number for (number,) in rows]


@pytest.fixture
def filled(tmp_path: Path, home: Home) -> Home:
    nights(tmp_path, home)
    return home


@pytest.mark.slow
def test_what_is_kept_answers_as_before(filled: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = snapshots(filled)
    before = {number: contents(filled, number) for number in kept}
    reader = connect(filled, as_of=kept[-1])
    first = compact(filled, keep_days=90)
    assert first.files_after < first.files_before
    assert (first.snapshots_forgotten, first.oldest_snapshot) == (0, kept[0])
    assert {number: contents(filled, number) for number in kept} == before
    # Nothing leaves under a reader that began before, not even its snapshot.
    second = compact(filled, keep_days=0)
    assert (second.snapshots_forgotten, second.files_removed) == (0, 0)
    assert scalar(reader, "SELECT count(*) FROM user_timeline") == len(before[kept[-1]]["user_timeline"])
    reader.close()
    assert contents(filled) == before[kept[-1]]
    monkeypatch.setattr(upkeep, "GRACE", timedelta(0))
    files = len(list((filled.root / "lake" / "data").rglob("*.parquet")))
    third = compact(filled, keep_days=0)
    assert third.files_removed > 0
    assert len(list((filled.root / "lake" / "data").rglob("*.parquet"))) == files - third.files_removed
    assert contents(filled) == before[kept[-1]]
    with pytest.raises(BadInput, match=f"no snapshot {kept[1]}"):
        connect(filled, as_of=kept[1])
    assert compact(filled, keep_days=0).files_removed == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_killed_in_the_middle_it_is_finished_by_the_next(
    step: int, filled: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, newest = contents(filled), snapshots(filled)[-1]
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, str(filled.root), str(step)],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert contents(filled) == before
    monkeypatch.setattr(upkeep, "GRACE", timedelta(0))
    compact(filled, keep_days=0)
    assert contents(filled) == before
    assert snapshots(filled)[0] >= newest


def test_nothing_to_compact_and_nonsense(home: Home, tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="bahe ingest"):
        compact(home, keep_days=1)
    with pytest.raises(BadInput, match="0 or more days"):
        compact(home, keep_days=-1)
