"""What of a home is behind what, and which command comes next; asks the lake, loads no model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import duckdb
import yaml

from bahe import daily
from bahe_core.errors import BaheError, NotReady
from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.connection import connect, damaged_files_named
from materialize import gate as gates
from materialize.ingest.ingest import is_current
from materialize.release import lag, pointer
from materialize.release.quality import JOB as QUALITY

Latest = Mapping[str, runs.Run]
"""The latest run of each job."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part of the home."""

    part: str
    stale: bool
    says: str
    next: str | None = None
    """The command that helps."""


@dataclass(kw_only=True)
class Status:
    """The parts in the order in which they depend on each other."""

    home: str
    live: str | None = None
    busy: bool = False
    """Another job is writing now, so that what is said here may change."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def next(self) -> str | None:
        """The command to run next; None when everything is up to date."""
        return next((f.next for f in self.findings if f.stale and f.next), None)

    def as_json(self) -> str:
        """The status as one JSON object."""
        return json.dumps(
            {
                "home": self.home,
                "live": self.live,
                "busy": self.busy,
                "next": self.next,
                "findings": [vars(finding) for finding in self.findings],
            }
        )

    def _repr_html_(self) -> str:
        """A row for each part, and what to run next, as Jupyter asks for it."""
        rows = "".join(
            f"<tr><td>{escape(part.part)}</td><td>{'stale' if part.stale else 'ok'}</td>"
            f"<td>{escape(part.says)}</td></tr>"
            for part in self.findings
        )
        advice = f"next: {escape(self.next)}" if self.next else "everything is up to date"
        return f"<table>{rows}</table><p>{advice}</p>"

    def add(self, part: str, problem: str | None, command: str | None = None, *, fine: str) -> None:
        """One more part: its problem and the way out, or what to say where there is none."""
        stale = problem is not None
        command = command if stale else None
        self.findings.append(Finding(part=part, stale=stale, says=problem or fine, next=command))


def status(home: Home) -> Status:
    """Look at every part of the home."""
    found = Status(home=str(home.root), busy=home.busy())
    try:
        connected = connect(home)
    except NotReady:
        found.add("log", "nothing is ingested yet", "bahe ingest dataset.yaml", fine="")
        return found
    with contextlib.closing(connected) as connection, damaged_files_named(home):
        found.live = pointer.live(connection)
        _day(found, home)
        latest = runs.latest(connection)
        _log(found, connection, latest)
        _atoms(found, connection, latest)
        refused = _refusal(latest)
        if not _only_refreshed(home):
            _frame(found, home, latest)
            _model(found, home, latest)
            found.add("quality", refused, "bahe daily --retrain never", fine="nothing is refused")
        _vectors(found, connection, latest, None if refused else latest.get("train"))
        _online(found, home, latest)
    return found


def _day(found: Status, home: Home) -> None:
    try:
        known = daily.days(home)
    except BaheError as error:
        found.add("daily", str(error), fine="")
        return
    if not known:
        return
    last = known[0]
    if last.finished:
        found.add("daily", None, fine=f"{last.date} is done")
        return
    step = last.stopped_at or "the end"
    reason = last.steps[step].reason if step in last.steps else None
    words = f"{last.date} stopped at {step}" + (f": {reason}" if reason else "")
    if found.busy:
        found.add("daily", None, fine=f"{last.date} is at {step}")
    else:
        kept = f" --retrain {last.retrain}" if last.retrain != "warm" else ""
        found.add("daily", words, f"bahe daily {last.dataset} --date {last.date}{kept}", fine="")


def _only_refreshed(home: Home) -> bool:
    """Whether the daily run keeps its model, so that frame and model are meant to be older than the log."""
    with contextlib.suppress(BaheError):
        return next((day.retrain == "never" for day in daily.days(home)), False)
    return False


def _log(found: Status, connection: duckdb.DuckDBPyConnection, latest: Latest) -> None:
    ingested = latest.get("ingest")
    source = ingested.facts.get("source") if ingested else None
    command = f"bahe ingest {source or 'dataset.yaml'}"
    problem = "nothing is ingested yet" if ingested is None else gates.refusal(latest, "ingest")
    if ingested is not None and source is not None:
        try:
            if not is_current(connection, Path(source)):
                problem = f"{source} has sources that are not ingested"
        except BaheError as error:
            problem = str(error)
    when = f", at {ingested.finished:%Y-%m-%d %H:%M}" if ingested else ""
    found.add("log", problem, command, fine=f"ingested{when}")


def _atoms(found: Status, connection: duckdb.DuckDBPyConnection, latest: Latest) -> None:
    encoded = latest.get("encode")
    problem = gates.refusal(latest, "encode")
    missing = 0
    if encoded is None:
        problem = "no atom has a vector yet"
    else:
        missing = lag.atoms_without_vectors(connection, encoded.facts["encoder_version"])
    if missing:
        problem = f"{missing:,} atoms have no vector"
    version = encoded.facts["encoder_version"] if encoded else ""
    found.add("atoms", problem, "bahe encode", fine=f"all have a vector under {version}")


def _frame(found: Status, home: Home, latest: Latest) -> None:
    framed, ingested = latest.get("frame"), latest.get("ingest")
    problem = gates.refusal(latest, "frame")
    if framed is None:
        problem = "there is no training frame yet"
    elif not (home.frames / framed.fingerprint / "frame.parquet").is_file():
        problem = f"frame {framed.fingerprint} is gone from {home.frames}"
    elif ingested is not None and ingested.snapshot_read > framed.snapshot_read:
        problem = "the log is newer than the training frame"
    command = "bahe frame" if home.registry.is_file() else "bahe apply && bahe frame"
    found.add("frame", problem, command, fine=f"{framed.fingerprint if framed else ''}")


def _model(found: Status, home: Home, latest: Latest) -> None:
    framed, trained = latest.get("frame"), latest.get("train")
    waiting = sorted(path.stem for path in home.models.glob("*.checkpoint"))
    problem = None
    if waiting:
        problem = f"the training of {waiting[0]} was stopped; its checkpoint waits"
    elif trained is None:
        problem = "no model is trained yet"
    elif framed is not None and framed.snapshot_read > trained.snapshot_read:
        problem = f"the training frame is newer than {trained.fingerprint}"
    found.add("model", problem, "bahe train", fine=trained.fingerprint if trained else "")


def _refusal(latest: Latest) -> str | None:
    """Why the quality gate refused the model that was trained last; None when it did not."""
    judged, trained = latest.get(QUALITY), latest.get("train")
    if judged is None or trained is None or judged.facts["model_version"] != trained.fingerprint:
        return None
    return None if judged.facts["passed"] else f"{trained.fingerprint}: {judged.facts['failures'][0]}"


def _vectors(
    found: Status,
    connection: duckdb.DuckDBPyConnection,
    latest: Latest,
    trained: runs.Run | None,
) -> None:
    embedded = latest.get("embed")
    problem, command = gates.refusal(latest, "embed"), "bahe embed"
    version = None
    if embedded is not None:
        version = str(embedded.facts["model_version"])
        users = lag.users_behind(connection, version)
        items = lag.items_behind(connection, version)
        if users or items:
            problem = f"{users:,} users and {items:,} items have no vector, or one that is behind the log"
            if trained is None or version != trained.fingerprint:
                command = f"bahe embed --model {version}"
        elif trained is not None and trained.snapshot_read > embedded.snapshot_read:
            problem = f"{trained.fingerprint} is trained and not embedded"
    elif trained is not None:
        problem = "no user or item has a vector yet"
    if version is not None or problem is not None:
        found.add("vectors", problem, command, fine=f"of all users and items under {version}")


def _online(found: Status, home: Home, latest: Latest) -> None:
    embedded, published, ingested = (latest.get(job) for job in ("embed", "publish", "ingest"))
    if embedded is None or ingested is None:
        return
    problem = None
    if published is None:
        problem = "nothing is published yet"
    elif _is_lost(home):
        problem = f"the online store {home.online_store} is gone"
    elif published.fingerprint != lag.publish_fingerprint(embedded, ingested):
        problem = "the online store is behind the vectors and statistics"
    rolled_back = latest.get("rollback")
    newer = (
        rolled_back is not None
        and published is not None
        and (rolled_back.snapshot_read > published.snapshot_read)
    )
    back = f", rolled back from {rolled_back.facts['left_version']}" if newer and rolled_back else ""
    found.add("online", problem, "bahe publish", fine=f"{found.live} is live{back}")


def _is_lost(home: Home) -> bool:
    """Whether the online store is a file, and not there."""
    try:
        settings = yaml.safe_load(home.feature_store_yaml.read_text())
    except (OSError, yaml.YAMLError):
        return False
    return "path" in settings.get("online_store", {}) and not home.online_store.is_file()
