"""The encoder_versions of a lake: how each was made, how far it is, and which are in use."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import duckdb

from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.catalogue import scalar
from bahe_models import BackboneConfig, EncoderConfig
from materialize.config.backbone import Settings


@dataclass(frozen=True)
class VersionProgress:
    """How much of the log an encoder_version covers."""

    encoder_version: str
    encoded: int
    """Atoms of the lake that have its vector."""
    atoms: int
    """Atoms of the lake."""
    current: bool
    """Whether it is the one that jobs use."""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.encoded == self.atoms


def recorded_settings(connection: duckdb.DuckDBPyConnection, version: str) -> Settings | None:
    """What a version was made with; None when no run recorded it, as in older homes."""
    run = connection.execute(
        """
        SELECT facts FROM runs
        WHERE job = 'encode' AND (facts->>'encoder_version') = ?
        ORDER BY finished DESC
        """,
        [version],
    ).fetchone()
    settings = None if run is None else json.loads(run[0]).get("settings")
    if settings is None:
        return None
    return BackboneConfig(**settings["backbone"]), EncoderConfig(**settings["encoder"])


def versions(connection: duckdb.DuckDBPyConnection) -> list[VersionProgress]:
    """Every encoder_version of the lake, the fullest first, half-built ones included."""
    last = runs.last(connection, "encode")
    current = None if last is None else last.facts["encoder_version"]
    atoms = scalar(connection, "SELECT count(*) FROM atoms")
    rows = connection.execute(
        """
        SELECT encoder_version, count(*)
        FROM atomic_behavior_embedding SEMI JOIN atoms USING (atom_id)
        GROUP BY encoder_version
        ORDER BY count(*) DESC, encoder_version
        """
    ).fetchall()
    return [VersionProgress(name, count, atoms, name == current) for name, count in rows]


def vector_identity(backbone: BackboneConfig, encoder: EncoderConfig) -> str:
    """The settings that vectors depend on, as JSON that `recorded_settings` reads."""
    cut = {"path": backbone.path, "shallow_layers": backbone.shallow_layers}
    of_vectors = {k: v for k, v in asdict(encoder).items() if k not in ("bfloat16", "compile")}
    return json.dumps({"backbone": cut, "encoder": of_vectors}, sort_keys=True)


def other_versions_in_use(
    connection: duckdb.DuckDBPyConnection, home: Home, identity: str
) -> dict[str, Settings]:
    """Versions that jobs or models use, other than the one of these settings, where it is known how they
    were made."""
    latest = runs.latest(connection)
    if "encode" not in latest:
        return {}
    used = [latest["encode"].facts["encoder_version"]]
    models = [latest[job].fingerprint for job in ("train", "embed") if job in latest]
    for config in (home.models / model / "config.json" for model in models):
        if config.is_file():
            used.append(json.loads(config.read_text())["encoder_version"])
    recorded = {version: recorded_settings(connection, version) for version in dict.fromkeys(used)}
    return {
        version: settings
        for version, settings in recorded.items()
        if settings is not None and vector_identity(*settings) != identity
    }
