"""A random log told night by night to a real home, and all that comes of it held against brute force.

A case is the whole row of one impression in a frame, or of one user or item in the online store.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bahe_core.home import Home
from bahe_lake.catalogue import snapshot
from bahe_lake.connection import lake
from feature_repo.store import open_store
from materialize.release import publish
from tests.support.brute_force import WINDOWS, BruteForce, Identifier, Values, cut_of
from tests.support.logs import write_dataset
from tests.support.random_logs import CHANNELS, DELAYS, RandomLog

STORED = ("user_stats", "item_stats", "user_timeline", "user_recent_atoms")
"""Views that are always online."""
LISTED = (
    *(f"{entity}_stats_{days}d" for entity in ("user", "item") for days in WINDOWS),
    *(f"{entity}_behaviors_{days}d" for entity in ("user", "item") for days in WINDOWS),
    "item_behaviors",
)
"""Views that are online because `features` in dataset.yaml lists them."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Cases:
    """What was compared, and what was wrong."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    values: int = 0
    examples: list[str] = field(default_factory=list)

    def compare(self, kind: str, what: str, said: Mapping[str, Any], wanted: Values) -> None:
        """One case: every wanted value against what was said."""
        self.values += len(wanted)
        off = {n: (said.get(n), v) for n, v in wanted.items() if n not in said or not equal(said[n], v)}
        (self.wrong if off else self.right)[kind] += 1
        if off:
            named = ", ".join(f"{name} is {a}, not {b}" for name, (a, b) in sorted(off.items()))
            self.examples.append(f"{kind}, {what}: {named}")

    def add(self, others: Cases) -> None:
        """These and the others together."""
        self.right += others.right
        self.wrong += others.wrong
        self.values += others.values
        self.examples += others.examples


def equal(said: Any, wanted: Any) -> bool:
    """Whether two values are the same; rates may differ in their last bits."""
    if isinstance(said, float) and isinstance(wanted, float):
        return math.isclose(said, wanted, rel_tol=1e-9)
    return bool(said == wanted)


@contextmanager
def clock_at(moment: datetime) -> Iterator[None]:
    """Publishing and auditing take it to be this moment."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return moment.astimezone(tz)

    with patch("materialize.release.publish.datetime", Clock), patch("serving.audit.audit.datetime", Clock):
        yield


def at(microseconds: int) -> datetime:
    """The time so many microseconds after 1970."""
    return EPOCH + timedelta(microseconds=microseconds)


def atom_ids(home: Home) -> dict[tuple[str, str], int]:
    """The atom of each channel and text; what an atom is called is not what is looked at here."""
    with lake(home) as connection:
        rows = connection.execute("SELECT channel, text, atom_id FROM atoms").fetchall()
    return {(channel, text): atom for channel, text, atom in rows}


def oracle(home: Home, log: RandomLog, night: int) -> BruteForce:
    """Brute force over the log as it was told on a night."""
    told = log.nights[night]
    return BruteForce(told.impressions, told.behaviors, CHANNELS, DELAYS[log.delay], atom_ids(home))


def frame_cases(home: Home, path: Path, log: RandomLog, night: int, freshness: str) -> Cases:
    """Every row of a frame, and that it has every impression that is old enough, in order."""
    cases, truth = Cases(), oracle(home, log, night)
    told = log.nights[night].impressions
    last = max(i.shown for i in told) - DELAYS[log.delay]
    young = {i.number for i in told if i.shown > last}
    wanted = sorted((i for i in told if i.number not in young), key=lambda i: (i.shown, i.number))
    kind = f"impressions, {freshness}"
    rows = pq.read_table(path)
    # Atoms are in no frame; Feast gives them for the frame's impressions at the same moments.
    cuts = [at(cut_of(freshness, i.shown)) for i in wanted]
    entities = pa.table(
        {
            "user_id": [i.user for i in wanted],
            "event_timestamp": pa.array(cuts, pa.timestamp("us", "UTC")),
        }
    )
    job = open_store(home).get_historical_features(
        entity_df=entities, features=["user_recent_atoms:recent_atoms"]
    )
    atoms = job.to_arrow()["recent_atoms"].to_pylist()
    if rows["impression_id"].to_pylist() != [i.number for i in wanted]:
        cases.wrong[f"{kind}: rows"] += 1
        cases.examples.append(f"{kind}: {len(rows)} rows, or in another order, for {len(wanted)}")
        return cases
    times = pc.cast(rows["event_timestamp"], pa.int64()).to_pylist()
    for row, time, recent, one in zip(rows.to_pylist(), times, atoms, wanted, strict=True):
        cut = cut_of(freshness, one.shown)
        expected = truth.user(one.user, cut) | truth.item(one.item, cut)
        expected |= {"event_timestamp": one.shown, "clicked": int(one.clicked)}
        expected |= {"user_id": one.user, "item_id": one.item}
        said = {**row, "event_timestamp": time, "recent_atoms": recent}
        cases.compare(kind, f"night {night}, impression {one.number}", said, expected)
    return cases


def online_cases(home: Home, log: RandomLog, night: int) -> Cases:
    """Every user and item in the online store, as published at the start of a night."""
    cases, truth, cut = Cases(), oracle(home, log, night), log.nights[night].night
    store = open_store(home)
    names = {
        view.name: [f"{view.name}:{f.name}" for f in view.features] for view in store.list_feature_views()
    }
    ids: dict[str, Sequence[Identifier]] = {"user": log.users, "item": log.items}
    for entity, keys in ids.items():
        views = [view for view in (*STORED, *LISTED) if view.startswith(entity)]
        references = [reference for view in views for reference in names[view]]
        rows = [{f"{entity}_id": key} for key in keys]
        said = store.get_online_features(references, entity_rows=rows).to_dict()
        of = truth.user if entity == "user" else truth.item
        for place, key in enumerate(keys):
            row = {name: column[place] for name, column in said.items()}
            cases.compare(f"{entity}s online", f"night {night}, {entity} {key}", row, of(key, cut))
    return cases


def publish_statistics(home: Home, night: int, since: int | None) -> int:
    """Write online, by the function of `publish`, all but vectors, at a moment; the lake's snapshot."""
    store = open_store(home)
    with lake(home) as connection, clock_at(at(night)), patch.object(publish, "VIEWS", STORED):
        read = snapshot(connection)
        publish._write_online(store, connection, since, LISTED)
    return read


def write_night(
    folder: Path, log: RandomLog, night: int, freshness: str, backbone: Path | None = None
) -> Path:
    """A night's files with their dataset.yaml; returns its path."""
    section = {
        "files": "impressions.parquet",
        "label_delay": log.delay,
        "columns": {"clicked_timestamp": "clicked_timestamp"},
    }
    return write_dataset(
        folder,
        log.tables(night),
        backbone,
        freshness=freshness,
        channels=list(CHANNELS),
        impressions=section,
        features={"numeric": list(LISTED)},
        training={"epochs": 1, "impressions_per_step": 200},
    )
