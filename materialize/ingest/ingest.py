"""Raw log to lake: read what is new, set aside what breaks the contract, add the rest, and derive from it.

All or nothing: files are read and checked into temporary tables; then one transaction adds the rows, what
follows from them (`derive.py`), the quarantine, which files were read, and the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.catalogue import scalar, tables
from bahe_lake.connection import lake
from bahe_lake.sql import AT_ONCE, sql_literal
from bahe_lake.transactions import transact
from materialize.config.dataset import Dataset, load_dataset, save_dataset
from materialize.gate import gated
from materialize.ingest import derive, quarantine, repair, sources
from materialize.ingest.adding import add
from materialize.ingest.reading import Read, check_rows, read_new
from materialize.ingest.text_encoding import utf8_copies

JOB = "ingest"


@dataclass(frozen=True)
class Ingested(Result):
    """What a run of `ingest` did."""

    skipped: bool
    """True when no file has changed since the last run."""
    added: dict[str, int]
    """Rows added, by table."""
    totals: dict[str, int]
    """Rows now in the lake, by table."""
    duplicates: dict[str, int]
    """Rows read that the lake had already or that came twice, by table."""
    quarantined: dict[str, int]
    """Rows read that were set aside, by table."""

    @property
    def summary(self) -> list[str]:
        """What the lake holds now, and what was left out of it."""

        def listed(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{count:,} {table}" for table, count in counts.items())

        lines = [f"lake holds {listed(self.totals)}" + (" (unchanged)" if self.skipped else "")]
        if self.duplicates:
            lines.append(f"left out as duplicates: {listed(self.duplicates)}")
        if self.quarantined:
            lines.append(f"set aside: {listed(self.quarantined)}; `bahe quarantine` shows them and why")
        return lines


@gated("ingest")
def ingest(home: Home, dataset_path: Path) -> Ingested:
    """Read what is new of the dataset into the lake; does nothing when no file has changed.

    Raises BadInput on a source that cannot be read, lacks a column, or breaks the contract in more rows
    than `quarantine.max_share` allows; nothing is written then. Raises GateFailed when what was
    written does not pass the ingest gate.
    """
    started = datetime.now(UTC)
    dataset = load_dataset(dataset_path)
    folder = dataset_path.resolve().parent
    home.place_lake(dataset.lake)
    with home.exclusive():
        check_same_dataset(home, dataset, dataset_path)
        with lake(home, create=True, others_queries=True) as connection:
            connection.execute(f"SET file_search_path = {sql_literal(str(folder))}")
            found = sources.find_sources(connection, dataset.sections, folder)
            latest = runs.latest(connection)
            last = latest.get(JOB)
            _check_same_lake(home, dataset, last)
            repaired = repair.due(connection, last, latest.get(f"gate {JOB}"))
            if repaired:
                # By itself and first: what is read is compared with the lake as it then is.
                _write(connection, dataset, {}, last, started, dataset_path, anew=True, mend=True)
                last = runs.last(connection, JOB)
            anew = (
                last is None
                or last.facts.get("derived") != derive.VERSION
                or last.facts.get("label_time", AT_ONCE) != dataset.impressions.label_time
            )
            with utf8_copies(connection):
                reads = read_new(home, connection, dataset, found)
            if not reads and not anew:
                save_dataset(dataset, home.root / "dataset.yaml")  # model settings may have changed
                return Ingested(not repaired, {}, _totals(connection), {}, {})
            check_rows(connection, reads)
            before = _totals(connection)
            _write(connection, dataset, reads, last, started, dataset_path, anew=anew)
            totals = _totals(connection)
        save_dataset(dataset, home.root / "dataset.yaml")
    added = {table: count - before.get(table, 0) for table, count in totals.items()}
    aside = {table: read.quarantined for table, read in reads.items() if read.quarantined}
    again = {table: read.rows - read.quarantined - added[table] for table, read in reads.items()}
    return Ingested(False, added, totals, {t: n for t, n in again.items() if n}, aside)


def check_same_dataset(home: Home, dataset: Dataset, path: Path) -> None:
    """Refuse to mix two datasets, or two sets of channels, in one home."""
    known = home.root / "dataset.yaml"
    if not known.is_file():
        return
    held = load_dataset(known)
    if held.name != dataset.name:
        raise BadInput(
            f"{path}: dataset {dataset.name} cannot enter {home.root}, which holds {held.name};"
            " give it a --home of its own."
        )
    if held.channels != dataset.channels:
        raise BadInput(
            f"{path}: `channels` is {dataset.channels}, but {home.root} was filled with"
            f" {held.channels}; use a new --home to change channels."
        )


def _check_same_lake(home: Home, dataset: Dataset, last: runs.Run | None) -> None:
    """Refuse a lake that another home has filled from another dataset, or with other channels."""
    if last is None:
        return
    for what, wanted in (("dataset", dataset.name), ("channels", dataset.channels)):
        if last.facts.get(what, wanted) != wanted:
            raise BadInput(
                f"the lake {home.lake} holds {what} {last.facts[what]}, not {wanted}; give each dataset a"
                " `lake.schema` (and `lake.data`) of its own."
            )


def _write(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    reads: Mapping[str, Read],
    last: runs.Run | None,
    started: datetime,
    dataset_path: Path,
    *,
    anew: bool,
    mend: bool = False,
) -> None:
    """Everything that an ingest leaves in the lake, as one transaction; with `mend`, after a repair."""
    fingerprint = _fingerprint(dataset, reads, last)
    label_time = dataset.impressions.label_time
    facts = {
        "dataset": dataset.name,
        "channels": dataset.channels,
        "source": str(dataset_path.resolve()),
        "derived": derive.VERSION,
        "label_time": label_time,
        "contract": repair.VERSION,
        "read": {table: read.rows for table, read in reads.items()},
        "broken": {table: read.broken for table, read in reads.items()},
    }
    with runs.record(connection, JOB, fingerprint, started=started) as run:

        def work() -> None:
            if mend:
                repair.repair(connection, fingerprint)
            changed = add(connection, reads, label_time)
            end = None
            if label_time != AT_ONCE:
                facts["log_end"] = end = derive.log_end(connection, label_time)
                if changed and last is not None and "log_end" in last.facts:
                    # Clicks that were not known yet at the end of the log of before.
                    connection.execute(f"INSERT INTO changed_impressions VALUES ({last.facts['log_end']})")
            derive.derive(connection, dataset.channels, anew=anew, label_time=label_time, end=end)
            for statement in quarantine.statements(
                [(read.source, read.files) for read in reads.values()], fingerprint
            ):
                connection.execute(statement)
            for read in reads.values():
                for statement in sources.remember(read.source, read.files):
                    connection.execute(statement)
            # What did not change the log must not look like a new log to the jobs that read it.
            known = last is not None and not changed and not anew
            kept = dataclasses.replace(run, fingerprint=last.fingerprint) if known and last else run
            rows = sum(read.rows for read in reads.values())
            connection.execute(kept.statement(facts, rows_read=rows))

        transact(connection, work)


def _fingerprint(dataset: Dataset, reads: Mapping[str, Read], last: runs.Run | None) -> str:
    """Of what the lake holds after this run: what it held before, and the files that were read."""
    facts: list[object] = [last.fingerprint if last else "", dataset.name, dataset.channels, derive.VERSION]
    for table, read in reads.items():
        files = [[Path(f.path).name, f.size, f.modified_us] for f in read.files]
        facts.append([table, read.source.spec, files])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _totals(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    known = tables(connection)
    wanted = ("behaviors", "impressions", "items", "users", "atoms")
    counts = {t: scalar(connection, f"SELECT count(*) FROM {t}") for t in wanted if t in known}
    return {t: count for t, count in counts.items() if count or t != "users"}  # a log may have none


def is_current(connection: duckdb.DuckDBPyConnection, path: Path) -> bool:
    """Whether the lake has all of this dataset.yaml's sources as they are now. Raises BadInput."""
    dataset = load_dataset(path)
    found = sources.find_sources(connection, dataset.sections, path.resolve().parent)
    return not any(source.unread for source in found.values())
