"""Drops what nobody needs any more: old models with their vectors, atom vectors that no kept model reads,
frames and abandoned checkpoints. The lake's own history is `upkeep.compact`'s to forget, and so is the
room that dropped rows still take there.

Never dropped: the live model and the one published before it (what a rollback goes to), the last trained
and the last embedded one, what these read, and an encoder_version that is being built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_lake.sql import sql_literal
from bahe_lake.transactions import commit
from bahe_models import encoder_version, load_backbone
from feature_repo.store import open_store
from materialize.config.backbone import encoder_settings
from materialize.config.dataset import home_dataset
from materialize.training.refit import MEASURED

JOB = "prune"
_VECTORS = {
    "atomic_behavior_embedding": "encoder_version",
    "user_embedding": "model_version",
    "item_embedding": "model_version",
}
_KEYS_PER_CALL = 10_000


@dataclass(frozen=True)
class Pruned(Result):
    """What a run of `prune` dropped, or would drop."""

    models: tuple[str, ...]
    """Model versions: their folders, and their vectors offline and online."""
    kept: tuple[str, ...]
    """Model versions that stay, the newest first."""
    encoder_versions: tuple[str, ...]
    frames: tuple[str, ...]
    checkpoints: tuple[str, ...]
    rows: dict[str, int]
    """Rows of the lake, by table."""
    online_rows: int
    """Rows of an online store that cannot forget single rows are not counted, and stay."""
    freed: int
    """Bytes of models and frames; 0 in a dry run. The lake's are freed by `compact`."""
    dry_run: bool = False

    @property
    def summary(self) -> list[str]:
        """What is gone, or would go, by kind."""
        gone = "would go" if self.dry_run else "gone"
        kinds = {
            "models": self.models,
            "encoder versions": self.encoder_versions,
            "frames": self.frames,
            "checkpoints": self.checkpoints,
        }
        rows = ", ".join(f"{count:,} of {table}" for table, count in self.rows.items())
        return [
            f"models kept: {', '.join(self.kept) or 'none'}",
            *(f"{kind} {gone}: {', '.join(names) or 'none'}" for kind, names in kinds.items()),
            f"rows {gone}: {rows}, {self.online_rows:,} online",
            *([] if self.dry_run else [f"{self.freed / 2**20:,.1f} MiB freed"]),
        ]


def prune(
    home: Home,
    *,
    keep: int = 3,
    older_than: float | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Keep the newest `keep` models, of these none `older_than` so many days.

    Killed anywhere, the next run finishes. Raises BadInput on a negative number.
    """
    for option, value in (("--keep", keep), ("--older-than", older_than or 0)):
        if value < 0:
            raise BadInput(f"{option} is {value}; it must be at least 0.")
    home_dataset(home)
    with home.exclusive(), lake(home) as connection:
        kept, dropped = _models(connection, home, keep, older_than)
        encoders = _encoders(connection, home, kept)
        frames = _frames(connection, home, kept)
        checkpoints = _checkpoints(connection, home)
        values = {"encoder_version": encoders, "model_version": dropped}
        rows = {
            table: scalar(
                connection, f"SELECT count(*) FROM {table} WHERE {_among(column, values[column])}"
            )
            for table, column in _VECTORS.items()
        }
        before = _size(home)
        online = _forget_online(connection, home, dropped, dry_run=dry_run)
        plan = Pruned(
            models=dropped,
            kept=kept,
            encoder_versions=encoders,
            frames=tuple(path.name for path in frames),
            checkpoints=tuple(path.name for path in checkpoints),
            rows=rows,
            online_rows=online,
            freed=0,
            dry_run=dry_run,
        )
        if dry_run:
            return plan
        if any(rows.values()):
            with runs.record(connection, JOB, datetime.now(UTC).isoformat()) as run:
                deletes = [
                    f"DELETE FROM {table} WHERE {_among(column, values[column])}"
                    for table, column in _VECTORS.items()
                    if rows[table]
                ]
                commit(connection, [*deletes, run.statement(asdict(plan))])
        for path in (*(home.models / version for version in dropped), *frames, *checkpoints):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return replace(plan, freed=max(0, before - _size(home)))


def _models(
    connection: duckdb.DuckDBPyConnection, home: Home, keep: int, older_than: float | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Model versions to keep and to drop, each the newest first."""
    versions = {path.parent.name for path in home.models.glob("*/config.json")}
    for table in ("user_embedding", "item_embedding"):
        query = f"SELECT DISTINCT model_version FROM {table}"
        versions.update(row[0] for row in connection.execute(query).fetchall())
    made = {version: _made(connection, home, version) for version in versions}
    newest_first = sorted(versions, key=lambda version: (made[version], version), reverse=True)
    oldest = datetime.min.replace(tzinfo=UTC)
    if older_than is not None:
        oldest = datetime.now(UTC) - timedelta(days=older_than)
    keeping = {version for version in newest_first[:keep] if made[version] >= oldest}
    keeping |= _needed_models(connection)
    # The next night's model is compared with the one that was measured in place of a refitted one.
    keeping |= {_config(home, one).get("facts", {}).get(MEASURED, one) for one in keeping} & versions
    kept = tuple(version for version in newest_first if version in keeping)
    return kept, tuple(version for version in newest_first if version not in keeping)


def _needed_models(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """The live model, the one published before it, the last trained and the last embedded one."""
    published = connection.execute(
        """
        SELECT live_model_version, max(event_timestamp)
        FROM publications
        GROUP BY deployment, live_model_version
        QUALIFY row_number() OVER (PARTITION BY deployment ORDER BY max(event_timestamp) DESC) <= 2
        """
    ).fetchall()
    latest = runs.latest(connection)
    return {row[0] for row in published} | {
        latest[j].fingerprint for j in ("train", "embed") if j in latest
    }


def _made(connection: duckdb.DuckDBPyConnection, home: Home, version: str) -> datetime:
    config = _config(home, version)
    if "trained_at" in config.get("facts", {}):
        return datetime.fromisoformat(config["facts"]["trained_at"])
    row = connection.execute(
        """
        SELECT min(created_timestamp)
        FROM (
            SELECT model_version, created_timestamp FROM user_embedding
            UNION ALL
            SELECT model_version, created_timestamp FROM item_embedding
        )
        WHERE model_version = ?
        """,
        [version],
    ).fetchone()
    assert row is not None
    made: datetime = row[0] or datetime.min.replace(tzinfo=UTC)
    return made


def _config(home: Home, version: str) -> dict[str, Any]:
    path = home.models / version / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return config


def _encoders(connection: duckdb.DuckDBPyConnection, home: Home, kept: Sequence[str]) -> tuple[str, ...]:
    """Encoder versions that no kept model reads, and that are neither in use nor being built."""
    rows = connection.execute("SELECT DISTINCT encoder_version FROM atomic_behavior_embedding").fetchall()
    needed = {_config(home, version).get("encoder_version") for version in kept}
    last = runs.last(connection, "encode")
    if last is not None:
        needed.add(last.facts["encoder_version"])
    unneeded = {row[0] for row in rows} - needed
    finished = connection.execute(
        "SELECT DISTINCT facts->>'encoder_version' FROM runs WHERE job = 'encode'"
    ).fetchall()
    if unneeded - {row[0] for row in finished}:
        # An unfinished version may be the one dataset.yaml asks for; only the weights can tell.
        backbone, encoder = encoder_settings(home_dataset(home))
        unneeded.discard(encoder_version(load_backbone(backbone), encoder, backbone.shallow_layers))
    return tuple(sorted(unneeded))


def _frames(connection: duckdb.DuckDBPyConnection, home: Home, kept: Sequence[str]) -> list[Path]:
    """Folders of frames that are neither the latest nor a kept model's."""
    needed = {_config(home, version).get("facts", {}).get("frame_id") for version in kept}
    last = runs.last(connection, "frame")
    if last is not None:
        needed.add(last.fingerprint)
    return sorted(path for path in home.frames.iterdir() if path.name not in needed)


def _checkpoints(connection: duckdb.DuckDBPyConnection, home: Home) -> list[Path]:
    """Checkpoints of trainings that a later one has overtaken; the newest may still be resumed."""
    last = runs.last(connection, "train")
    oldest_first = sorted(home.models.glob("*.checkpoint"), key=lambda path: path.stat().st_mtime)
    if oldest_first and (last is None or oldest_first[-1].stat().st_mtime > last.finished.timestamp()):
        oldest_first.pop()
    return oldest_first


def _among(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({', '.join(map(sql_literal, values))})" if values else "false"


def _forget_online(
    connection: duckdb.DuckDBPyConnection, home: Home, dropped: Sequence[str], *, dry_run: bool
) -> int:
    """Remove the dropped models' vectors from the online store; how many there were in the lake."""
    from feast_ducklake.online.store import GuardedOnlineStore
    from feast_ducklake.online.vectors import view_keys

    if not dropped or not home.registry.is_file():
        return 0
    store = open_store(home)
    online = store.provider.online_store
    if not isinstance(online, GuardedOnlineStore):
        return 0
    count = 0
    for table, key in (("user_embedding", "user_id"), ("item_embedding", "item_id")):
        view = store.get_feature_view(table)
        for rows in _keys(connection, table, key, dropped):
            count += len(rows["model_version"])
            if not dry_run:
                online.forget(store.config, view, view_keys(view, rows))
    return count


def _keys(
    connection: duckdb.DuckDBPyConnection, table: str, key: str, versions: Sequence[str]
) -> Iterator[dict[str, list[Any]]]:
    reader = connection.execute(
        f"SELECT {key}, model_version FROM {table} WHERE {_among('model_version', versions)}"
    ).to_arrow_reader(_KEYS_PER_CALL)
    for batch in reader:
        yield batch.to_pydict()


def _size(home: Home) -> int:
    folders = (home.models, home.frames)
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
