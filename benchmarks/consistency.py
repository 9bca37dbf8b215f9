"""Whether training sees what serving returns: the audit on MovieLens-100k, and skews that it has to find.

Nightly: a home of the log up to some nights before its end; each night the next day is ingested, embedded
and published, and that day's impressions are asked for, each at its moment; once the log is complete the
logged requests are audited. Live: impressions, clicks and behaviors are sent to a service, which answers
after each; the log then gets them, and the requests are audited. Skews: requests with the very features
that training sees, and the same with one kind of skew each, which the audit has to find in the right
features, name, and find nowhere else. Random cases: `benchmarks.random_cases`, which also runs by itself
and needs no home.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import yaml

import bahe
from bahe_core.errors import UnknownEntity
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_models import column_of
from benchmarks import random_cases
from benchmarks.harness import Row, main
from feature_repo.store import open_store
from materialize.config.dataset import home_dataset
from serving.audit.audit import audit
from serving.audit.audit_result import Audit
from serving.audit.offline_truth import OfflineTruth, Vectors, lengths_of
from serving.audit.skew import (
    NOT_LOOKED_AT,
    OTHER_DEFAULT,
    OTHER_VERSION,
    SHIFTED,
    STALE,
    WRONG_ENCODER,
    lost,
)
from serving.lookup.online_lookup import OnlineLookup
from serving.lookup.request_log import RequestLog, ServedRequest

NIGHTS = {True: 2, False: 5}
REQUESTS = {True: 300, False: 2_000}
"""Requests a day, by whether the run is quick."""
PUSHED = {True: 400, False: 4_000}
PAIRS = 100_000
MOST_SECONDS = 60
OTHER = "other"
USER_VECTOR, ITEM_VECTOR = "user_embedding:embedding", "item_embedding:embedding"


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Everything of the log, published; nights; a live service; planted skews; random cases."""
    start = time.perf_counter()
    whole = bahe.open(home_path).audit(last=PAIRS)
    seconds = time.perf_counter() - start
    yield Row(
        metric=f"audit of {whole.rows:,} impressions as published",
        value=seconds,
        unit="s",
        goal=f"<= {MOST_SECONDS}",
        holds=seconds <= MOST_SECONDS,
    )
    yield equal_row("as published", whole)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables = tables_of(home_path)
        days = last_days(tables, NIGHTS[quick])
        home = nightly_home(home_path, folder, tables, days[0])
        found, unknown = nights(home, folder, tables, days, REQUESTS[quick])
        yield equal_row(f"{found.rows:,} requests over {NIGHTS[quick]} nights, nightly", found)
        yield Row(metric="requests of users who were not published yet, nightly", value=unknown, unit="")
        what = f"after {PUSHED[quick]:,} behaviors, impressions and clicks sent, live"
        yield equal_row(what, live(home, folder, PUSHED[quick]))
        yield from skews(home_path, folder)
    yield from random_cases.measure(quick, home_path)


def equal_row(what: str, found: Audit) -> Row:
    """Share of values that are equal."""
    differing = sum(feature.differing for feature in found.features)
    values = sum(feature.rows for feature in found.features)
    for feature in found.features:
        if feature.differing:
            print(f"  {what}: {feature.feature} differs in {feature.differing} rows: {feature.causes}")
    return Row(
        metric=f"features equal, {what}",
        value=100 * (1 - differing / values),
        unit=f"% of {values:,} values of {len(found.features)} features",
        goal="100 %",
        holds=differing == 0,
    )


def tables_of(home_path: Path) -> dict[str, pd.DataFrame]:
    """The demo's log as tables."""
    with bahe.open(home_path).lake() as connection:
        return {
            "behaviors": connection.execute(
                """
                SELECT user_id, b.channel, text, event_timestamp, item_id
                FROM behaviors b JOIN atoms USING (atom_id)
                """
            ).df(),
            "impressions": connection.execute(
                "SELECT impression_id, user_id, item_id, event_timestamp, clicked FROM impressions"
            ).df(),
            "items": connection.execute("SELECT item_id, text, event_timestamp FROM items").df(),
            "users": connection.execute("SELECT user_id, event_timestamp FROM users").df(),
        }


def write_until(folder: Path, tables: dict[str, pd.DataFrame], until: datetime | None) -> None:
    """The log's files, with what happened before a moment."""
    for name, rows in tables.items():
        kept = rows if until is None or name == "users" else rows[rows["event_timestamp"] < until]
        kept.to_parquet(folder / f"{name}.parquet")


def last_days(tables: dict[str, pd.DataFrame], nights: int) -> list[datetime]:
    """The starts of the last days that have impressions, the earliest first."""
    days = tables["impressions"]["event_timestamp"].dt.floor("D").drop_duplicates().sort_values()
    found: list[datetime] = days.iloc[-nights:].tolist()
    return found


def nightly_home(home_path: Path, folder: Path, tables: dict[str, pd.DataFrame], first: datetime) -> Home:
    """A home of the log before the first night, published."""
    write_until(folder, tables, first)
    settings = yaml.safe_load((home_path / "dataset.yaml").read_text())
    settings |= {name: {"files": f"{name}.parquet"} for name in tables}
    settings["freshness"] = "nightly"
    settings["training"] = settings.get("training", {}) | {"epochs": 1}
    (folder / "dataset.yaml").write_text(yaml.safe_dump(settings))
    project = bahe.open(folder / "home")
    project.run(folder / "dataset.yaml", tracker="none")
    return project.home


def refresh(home: Home, folder: Path) -> None:
    """A night that keeps the model."""
    project = bahe.open(home.root)
    project.ingest(folder / "dataset.yaml")
    project.encode()
    project.embed(model_version=OnlineLookup(home).live_version())
    project.publish()


def nights(
    home: Home, folder: Path, tables: dict[str, pd.DataFrame], days: list[datetime], requests: int
) -> tuple[Audit, int]:
    """Ask for each day's impressions after the night before; the audit, and requests of unknown users."""
    unknown = 0
    shown = tables["impressions"]
    for day in days:
        write_until(folder, tables, day)
        refresh(home, folder)
        lookup = OnlineLookup(home, RequestLog(home))
        of_day = shown[(shown["event_timestamp"] >= day) & (shown["event_timestamp"] < day + timedelta(1))]
        asked = of_day.sample(min(requests, len(of_day)), random_state=0)
        for user, item, moment in asked[["user_id", "item_id", "event_timestamp"]].to_numpy().tolist():
            try:
                lookup.score(user, [item], moment.to_pydatetime())
            except UnknownEntity:
                unknown += 1
    write_until(folder, tables, None)
    project = bahe.open(home.root)
    project.ingest(folder / "dataset.yaml")
    project.encode()
    return audit(home, requests=True, last=10**9), unknown


def live(home: Home, folder: Path, count: int) -> Audit:
    """Send behaviors, each after an impression, to a service, and ask after each; then the log has all."""
    from serving.live.live_lookup import Clicked, LiveLookup, Shown

    refresh(home, folder)
    shutil.rmtree(home.requests)
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"freshness": "live"}))
    rng = np.random.default_rng(0)
    behaviors = pd.read_parquet(folder / "behaviors.parquet")
    service = LiveLookup(home, RequestLog(home))
    sent = behaviors.sample(count, random_state=1)
    sent["user_id"] = rng.choice(rng.choice(behaviors["user_id"].unique(), 200), count)
    later = behaviors["event_timestamp"].max() + pd.Timedelta("1D")
    sent["event_timestamp"] = later + pd.to_timedelta(7 * np.arange(count), unit="s")
    impressions = pd.read_parquet(folder / "impressions.parquet")
    shown = pd.DataFrame(
        {
            "impression_id": impressions["impression_id"].max() + 1 + np.arange(count),
            "user_id": sent["user_id"].to_numpy(),
            "item_id": rng.choice(impressions["item_id"].unique(), count),
            "event_timestamp": (sent["event_timestamp"] - pd.Timedelta("2s")).to_list(),
            "clicked": rng.integers(2, size=count),
        }
    )
    for event, one in zip(sent.to_dict("records"), shown.to_dict("records"), strict=True):
        moment = event["event_timestamp"].to_pydatetime()
        user, item, impression = event["user_id"], event["item_id"], one["impression_id"]
        at = one["event_timestamp"].to_pydatetime()
        service.show([Shown(impression_id=impression, user_id=user, item_id=one["item_id"], at=at)])
        if one["clicked"]:
            service.click([Clicked(impression_id=impression, at=at + timedelta(seconds=1))])
        service.append(user, event["channel"], event["text"], moment, item)
        service.score(user, [item, one["item_id"]], moment + timedelta(seconds=1))
    pd.concat([behaviors, sent]).to_parquet(folder / "behaviors.parquet")
    pd.concat([impressions, shown]).to_parquet(folder / "impressions.parquet")
    project = bahe.open(home.root)
    project.ingest(path)
    project.encode()
    return audit(home, requests=True, last=10**9)


def skews(home_path: Path, folder: Path) -> Iterator[Row]:
    """Requests as training would have seen them, and the same with each kind of skew: found and named."""
    copy = Home(folder / "skews")
    shutil.copytree(home_path, copy.root)
    with served_as_training_sees(copy) as planted:
        for cause, features, request in planted:
            shutil.rmtree(copy.requests, ignore_errors=True)
            log = RequestLog(copy)
            for one in request:
                log.append(one)
            found = {f.feature: f for f in audit(copy, requests=True).features if f.differing}
            looked_at = {name: set(feature.causes) - {NOT_LOOKED_AT} for name, feature in found.items()}
            named = {name for name in features if looked_at.get(name) == {cause}}
            accused = set(found) - features
            for feature in found.values():
                if feature.feature not in named:
                    print(f"  planted {cause}: {feature.feature} is said to be {feature.causes}")
            yield Row(
                metric=f"planted and named: {cause or 'nothing'}",
                value=len(named),
                unit=f"of {len(features)} features, {len(accused)} others accused",
                goal="all, no other",
                holds=named == features and not accused,
            )


Planted = tuple[str, set[str], list[ServedRequest]]


@contextlib.contextmanager
def served_as_training_sees(home: Home, requests: int = 1_000) -> Iterator[Iterator[Planted]]:
    """For each skew its name, the features that it is planted in, and the requests."""
    lookup = OnlineLookup(home)
    version = lookup.live_version()
    artifact, references = lookup.artifact(version), lookup.models.inputs(version).references
    channels = artifact.dense.channels
    names = {entity: [column_of(r) for r in listed] for entity, listed in references.items()}
    listed = [*references["user"], *references["item"]]
    with lake(home) as connection:
        copy_atoms_and_vectors(connection, version)
        pairs = connection.execute(
            f"""
            SELECT user_id, item_id, event_timestamp AS moment FROM impressions
            ORDER BY hash(impression_id) LIMIT {requests}
            """
        ).to_arrow_table()
        truth = OfflineTruth(home, open_store(home), connection, pairs, home_dataset(home).freshness, {})
        everyone = np.arange(requests)
        rows = pairs.to_pylist()
        values = truth.values(listed)
        lengths = lengths_of(values, channels, requests)
        users, items = (
            truth.user_vectors(artifact, lengths, everyone),
            truth.item_vectors(artifact, everyone),
        )

        def served(
            values: dict[str, list[Any]] = values,
            users: Vectors = users,
            items: Vectors = items,
        ) -> list[ServedRequest]:
            by_name = {column_of(reference): column for reference, column in values.items()}
            return [
                ServedRequest(
                    served_at=datetime.now(UTC),
                    at=row["moment"],
                    model_version=version,
                    user_id=row["user_id"],
                    user={name: by_name[name][i] for name in names["user"]},
                    user_vector=users[i],
                    item_ids=[row["item_id"]],
                    items={name: [by_name[name][i]] for name in names["item"]},
                    item_vectors=items[i : i + 1],
                )
                for i, row in enumerate(rows)
            ]

        def planted() -> Iterator[Planted]:
            yield "", set(), served()
            late = truth.values(listed, shift_us=1_000_000)
            at_once = {r for r in listed if late[r] != values[r]}
            yield SHIFTED, at_once, served(late)
            day = {
                r: column if r.startswith("item") else values[r]
                for r, column in truth.values(listed, shift_us=-86_400_000_000).items()
            }
            yield STALE, {r for r in listed if day[r] != values[r]}, served(day)
            rate = "item_stats:item_click_rate"
            default = {rate: [-1.0 if v is None else v for v in values[rate]]}
            yield OTHER_DEFAULT, {rate}, served(values | default)
            liked = f"user_timeline:length_{channels[0]}"
            without = lengths.copy()
            without[:, 0] = 0
            yield (
                lost(channels[0]),
                {liked, USER_VECTOR},
                served(values | {liked: [0] * requests}, truth.user_vectors(artifact, without, everyone)),
            )
            both = {USER_VECTOR, ITEM_VECTOR}
            yield OTHER_VERSION, both, served(values, *of_other_model(connection, rows))
            yield (
                WRONG_ENCODER,
                both,
                served(
                    values,
                    truth.user_vectors(artifact, lengths, everyone, encoder_version=OTHER),
                    truth.item_vectors(artifact, everyone, encoder_version=OTHER),
                ),
            )

        yield planted()


def copy_atoms_and_vectors(connection: duckdb.DuckDBPyConnection, version: str) -> None:
    """Another encoder's atoms and another model's vectors: the same numbers, the other way round."""
    for table, column in (
        ("atomic_behavior_embedding", "encoder_version"),
        ("user_embedding", "model_version"),
        ("item_embedding", "model_version"),
    ):
        own = "" if column == "encoder_version" else f"WHERE model_version = '{version}'"
        connection.execute(
            f"""
            INSERT INTO {table} BY NAME
            SELECT * REPLACE (list_reverse(embedding) AS embedding, '{OTHER}' AS {column})
            FROM {table} {own}
            """
        )


def of_other_model(connection: duckdb.DuckDBPyConnection, rows: list[dict[str, Any]]) -> list[Vectors]:
    """The other model's vectors of these users, and of these items."""
    vectors = []
    for entity in ("user", "item"):
        found = connection.execute(
            f"SELECT {entity}_id, embedding FROM {entity}_embedding WHERE model_version = '{OTHER}'"
        ).fetchall()
        of_key = dict(found)
        vectors.append(np.array([of_key[row[f"{entity}_id"]] for row in rows], dtype=np.float32))
    return vectors


if __name__ == "__main__":
    main("consistency", __doc__, measure)
