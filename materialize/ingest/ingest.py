"""Raw log to lake: read what is new, set aside what breaks the contract, add the rest, and derive from it.

All or nothing: files are read and checked into temporary tables; then one transaction adds the rows, what
follows from them (`derive.py`), the quarantine, which files were read, and the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.progress import progress
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.catalogue import columns, scalar, tables
from bahe_lake.connection import lake
from bahe_lake.sql import sql_identifier, sql_literal
from bahe_lake.transactions import transact
from materialize.config.dataset import Dataset, Table, context_column, load_dataset, save_dataset
from materialize.gate import gated
from materialize.ingest import derive, quarantine, sources
from materialize.ingest.reading import KEYS, TABLES, Read, check_clicks, read_new

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
        with lake(home, create=True) as connection:
            connection.execute(f"SET file_search_path = {sql_literal(str(folder))}")
            found = sources.find_sources(connection, _sections(dataset), folder)
            last = runs.last(connection, JOB)
            _check_same_lake(home, dataset, last)
            anew = last is None or last.facts.get("derived") != derive.VERSION
            reads = read_new(home, connection, dataset, found)
            if not reads and not anew:
                save_dataset(dataset, home.root / "dataset.yaml")  # model settings may have changed
                return Ingested(True, {}, _totals(connection), {}, {})
            check_clicks(connection, reads)
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


def _sections(dataset: Dataset) -> dict[str, Table]:
    given = {table: getattr(dataset, table) for table in TABLES}
    return {table: section for table, section in given.items() if section is not None}


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
) -> None:
    """Everything that an ingest leaves in the lake, as one transaction."""
    fingerprint = _fingerprint(dataset, reads, last)
    facts = {
        "dataset": dataset.name,
        "channels": dataset.channels,
        "source": str(dataset_path.resolve()),
        "derived": derive.VERSION,
        "read": {table: read.rows for table, read in reads.items()},
        "broken": {table: read.broken for table, read in reads.items()},
    }
    with runs.record(connection, JOB, fingerprint, started=started) as run:

        def work() -> None:
            changed = _add(connection, dataset, reads)
            derive.derive(connection, dataset.channels, anew=anew)
            for statement in quarantine.statements(
                [(read.opened.source, read.opened.files) for read in reads.values()], fingerprint
            ):
                connection.execute(statement)
            for read in reads.values():
                for statement in sources.remember(read.opened.source, read.opened.files):
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
        files = [[Path(f.path).name, f.size, f.modified_us] for f in read.opened.files]
        facts.append([table, read.opened.source.spec, files])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _add(connection: duckdb.DuckDBPyConnection, dataset: Dataset, reads: Mapping[str, Read]) -> bool:
    """Add what the lake does not have, and note for `derive` what that is. True when anything was."""
    connection.execute(quarantine.CREATE)
    connection.execute(sources.CREATE)
    changed = False
    for table in ("items", "users", "impressions"):
        if table in reads:
            _new_rows(connection, table)
            changed |= _make_room(connection, table, f"new_{table}")
            connection.execute(
                f"INSERT INTO {table} BY NAME SELECT * FROM new_{table}"
                f" ORDER BY event_timestamp, {KEYS[table][0]}"
            )
            changed |= scalar(connection, f"SELECT count(*) FROM new_{table}") > 0
    if "impressions" in reads:
        changed |= _fill_context(connection, dataset.impressions.context)
    item_type = columns(connection, "items")["item_id"]
    connection.execute("CREATE OR REPLACE TEMP TABLE seen_atoms (atom_id BIGINT, first_seen TIMESTAMPTZ)")
    _create_others(connection)
    derive.prepare(connection)
    if "impressions" in reads:
        connection.execute(
            "INSERT INTO changed_impressions SELECT min(event_timestamp) FROM new_impressions"
            " HAVING count(*) > 0"
        )
    if "behaviors" in reads:
        changed |= _add_behaviors(connection, item_type)
    _add_atoms(connection, reads)
    return changed


def _new_rows(connection: duckdb.DuckDBPyConnection, table: str) -> None:
    """`new_<table>`: each of the rows read once, without those that the lake has."""
    key = ", ".join(KEYS[table])
    raw = f"(SELECT * EXCLUDE (_bad) FROM raw_{table})"
    lacks = f" ANTI JOIN {table} USING ({key})" if table in tables(connection) else ""
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE new_{table} AS"
        f" SELECT * FROM {raw} ANTI JOIN repeated_{table} USING ({key}){lacks} UNION ALL BY NAME"
        f" SELECT * FROM (SELECT DISTINCT ON ({key}) * FROM {raw} r"
        f" SEMI JOIN repeated_{table} USING ({key}) ORDER BY {key}, event_timestamp, r::VARCHAR){lacks}"
    )


def _make_room(connection: duckdb.DuckDBPyConnection, table: str, like: str) -> bool:
    """The table, with every column that is now known. True when a column was added."""
    if table not in tables(connection):
        connection.execute(f"CREATE TABLE {table} AS SELECT * FROM {like} LIMIT 0")
        return True
    held = columns(connection, table)
    new = {c: kind for c, kind in columns(connection, like).items() if c not in held}
    for column, kind in new.items():
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {sql_identifier(column)} {kind}")
    return bool(new)


def _fill_context(connection: duckdb.DuckDBPyConnection, context: Sequence[str]) -> bool:
    """Impressions that the lake already has get the context that it lacks of them."""
    filled = 0
    there = columns(connection, "raw_impressions")
    for column in (sql_identifier(context_column(c)) for c in context if context_column(c) in there):
        source = "raw_impressions n WHERE i.impression_id = n.impression_id"
        lacking = f"i.{column} IS NULL AND n.{column} IS NOT NULL"
        count = scalar(connection, f"SELECT count(*) FROM impressions i, {source} AND {lacking}")
        if count:
            connection.execute(
                f"UPDATE impressions i SET {column} = n.{column} FROM {source} AND {lacking}"
            )
        filled += count
    return filled > 0


def _create_others(connection: duckdb.DuckDBPyConnection) -> None:
    """Tables that are there from the start, also those that later jobs fill, for Feast to register."""
    user = columns(connection, "impressions")["user_id"]
    item = columns(connection, "items")["item_id"]
    stamps = "event_timestamp TIMESTAMPTZ, created_timestamp TIMESTAMPTZ"
    layouts = {
        "behaviors": (
            f"user_id {user}, channel VARCHAR, atom_id BIGINT, event_timestamp TIMESTAMPTZ, item_id {item}"
        ),
        "atoms": "atom_id BIGINT, channel VARCHAR, text VARCHAR, first_seen TIMESTAMPTZ",
        "atomic_behavior_embedding": (
            f"atom_id BIGINT, encoder_version VARCHAR, embedding FLOAT[], {stamps}"
        ),
        "user_embedding": (
            f"user_id {user}, model_version VARCHAR, embedding FLOAT[], behaviors BIGINT,"
            f" seen_items VARCHAR[], {stamps}"
        ),
        "item_embedding": f"item_id {item}, model_version VARCHAR, embedding FLOAT[], {stamps}",
        "publications": f"deployment VARCHAR, live_model_version VARCHAR, {stamps}",
    }
    for table, layout in layouts.items():
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({layout})")


def _add_behaviors(connection: duckdb.DuckDBPyConnection, item_type: str) -> bool:
    """Part by part of the users, in the order of time within each, so that memory is bounded."""
    parts = derive.ranges(connection, "raw_behaviors", "user_id")
    key = ", ".join(KEYS["behaviors"])
    added = 0
    with progress("adding behaviors", len(parts)) as advance:
        for part in parts:
            connection.execute(
                "CREATE OR REPLACE TEMP TABLE part_behaviors AS"
                f" SELECT user_id, channel::VARCHAR AS channel, atom_id, event_timestamp,"
                f" min(item_id)::{item_type} AS item_id FROM raw_behaviors"
                f" WHERE {part} GROUP BY ALL"
            )
            bounds = connection.execute(
                "SELECT min(event_timestamp), max(event_timestamp) FROM part_behaviors"
            ).fetchone()
            assert bounds is not None
            if bounds[0] is not None:
                low, high = (sql_literal(moment.isoformat()) for moment in bounds)
                # Bounds by which whole files can be left out.
                old = (
                    f"SELECT {key} FROM behaviors WHERE event_timestamp BETWEEN {low} AND {high} AND {part}"
                )
                connection.execute(
                    "CREATE OR REPLACE TEMP TABLE new_behaviors AS"
                    f" SELECT * FROM part_behaviors ANTI JOIN ({old}) USING ({key})"
                )
                connection.execute(
                    "INSERT INTO behaviors BY NAME SELECT * FROM new_behaviors"
                    f" ORDER BY event_timestamp, {key}"
                )
                connection.execute(
                    "INSERT INTO changed_users SELECT user_id, min(event_timestamp) FROM new_behaviors"
                    " GROUP BY user_id"
                )
                connection.execute(
                    "INSERT INTO seen_atoms SELECT atom_id, min(event_timestamp) FROM new_behaviors"
                    " GROUP BY atom_id"
                )
                added += scalar(connection, "SELECT count(*) FROM new_behaviors")
            advance()
    for table in ("part_behaviors", "new_behaviors"):
        connection.execute(f"DROP TABLE IF EXISTS temp.{table}")
    return added > 0


def _add_atoms(connection: duckdb.DuckDBPyConnection, reads: Mapping[str, Read]) -> None:
    """Atoms that are new, and an earlier first time of those that are not."""
    parts = []
    if "behaviors" in reads:
        parts.append(
            "SELECT atom_id, channel, any_value(normal) AS text, any_value(first_seen) AS first_seen"
            " FROM raw_texts JOIN (SELECT atom_id, min(first_seen) AS first_seen FROM seen_atoms"
            " GROUP BY atom_id) USING (atom_id) GROUP BY ALL"
        )
    if "items" in reads:
        parts.append(
            "SELECT atom_id, 'item' AS channel, any_value(text) AS text, min(event_timestamp) AS first_seen"
            " FROM new_items GROUP BY atom_id"
        )
    if not parts:
        return
    connection.execute(f"CREATE OR REPLACE TEMP TABLE new_atoms AS {' UNION ALL '.join(parts)}")
    earlier = "FROM new_atoms n WHERE n.atom_id = a.atom_id AND n.first_seen < a.first_seen"
    if scalar(connection, f"SELECT count(*) FROM atoms a, {earlier.removeprefix('FROM ')}"):
        connection.execute(f"UPDATE atoms a SET first_seen = n.first_seen {earlier}")
    connection.execute(
        "INSERT INTO atoms SELECT * FROM new_atoms ANTI JOIN atoms USING (atom_id) ORDER BY atom_id"
    )


def _totals(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    known = tables(connection)
    wanted = ("behaviors", "impressions", "items", "users", "atoms")
    return {t: scalar(connection, f"SELECT count(*) FROM {t}") for t in wanted if t in known}


def is_current(connection: duckdb.DuckDBPyConnection, path: Path) -> bool:
    """Whether the lake has all of this dataset.yaml's sources as they are now. Raises BadInput."""
    dataset = load_dataset(path)
    found = sources.find_sources(connection, _sections(dataset), path.resolve().parent)
    return not any(source.unread for source in found.values())
