"""The gates between jobs: run the expectations, remember the verdict, refuse what failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import duckdb
import pyarrow.parquet as pq

from bahe_core.errors import GateFailed, NotReady
from bahe_core.home import Home
from bahe_core.progress import say
from bahe_core.results import Result
from bahe_lake import runs
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_lake.sql import AT_ONCE, old_enough, sql_literal
from bahe_lake.transactions import commit
from materialize.config.dataset import Dataset, home_dataset
from validation.suites import CLOCK_TOLERANCE

ORDER = ("ingest", "encode", "frame", "embed")

Options = ParamSpec("Options")
Done = TypeVar("Done", bound=Result)


def gated(
    job: str,
) -> Callable[[Callable[Concatenate[Home, Options], Done]], Callable[Concatenate[Home, Options], Done]]:
    """Makes a job report what it did and pass its gate, whoever calls it; it may then raise GateFailed."""

    def decorate(
        run: Callable[Concatenate[Home, Options], Done],
    ) -> Callable[Concatenate[Home, Options], Done]:
        @wraps(run)
        def passing(home: Home, /, *args: Options.args, **options: Options.kwargs) -> Done:
            done = run(home, *args, **options)
            for line in done.summary:
                say(f"  {line}")
            gate(home, job)
            return done

        return passing

    return decorate


def gate(home: Home, job: str) -> None:
    """Validate what the job's last run wrote, unless that run has already passed.

    Data Docs go to reports/data_docs. When an expectation does not hold, this raises GateFailed and every
    later job refuses to run.
    """
    from validation import require, run_gate

    dataset = home_dataset(home)
    with home.exclusive(), lake(home) as connection:
        latest = runs.latest(connection)
        last, verdict = latest.get(job), latest.get(_name(job))
        if last is None:
            raise NotReady(f"the {job} gate has nothing to check yet; run `bahe {job}` first.")
        docs = home.reports / "data_docs"
        stamp = _stamp(last)
        if verdict is not None and verdict.fingerprint == stamp and verdict.facts["passed"]:
            checks = verdict.facts["checks"]
            say(f"  gate {job}: passed ({checks} checks, unchanged)", passed=True, checks=checks)
            return
        tables, parameters = _scope(connection, job, last, dataset, home)
        with runs.record(connection, _name(job), stamp) as run:
            result = run_gate(connection, job, tables=tables, parameters=parameters, docs=docs)
            facts = {"passed": result.passed, "checks": result.checks, "failures": result.failures}
            commit(connection, [run.statement(facts)])
    if result.passed:
        say(f"  gate {job}: passed ({result.checks} checks)", passed=True, checks=result.checks)
    require(result)


def require_gates(connection: duckdb.DuckDBPyConnection, before: str) -> None:
    """Raises GateFailed when an earlier job's output has not passed its gate."""
    latest = runs.latest(connection)
    for job in ORDER[: ORDER.index(before)] if before in ORDER else ORDER:
        problem = refusal(latest, job)
        if problem is not None:
            raise GateFailed(problem)


def refusal(latest: Mapping[str, runs.Run], job: str) -> str | None:
    """Why the job's last output may not be used; None when it may, or when there is none yet.

    `latest` are the latest runs (`runs.latest`).
    """
    last, verdict = latest.get(job), latest.get(_name(job))
    if last is None:
        return None  # the job itself says what is missing
    if verdict is None or verdict.fingerprint != _stamp(last):
        return f"what `bahe {job}` wrote last has not been checked; run `bahe {job}` again."
    if not verdict.facts["passed"]:
        first = verdict.facts["failures"][0]
        return f"the {job} gate failed ({first}); correct that and run it again."
    return None


def _name(job: str) -> str:
    return f"gate {job}"


def _stamp(last: runs.Run) -> str:
    """Identifies one run of a job, so that its verdict is never taken for another run's."""
    return f"{last.fingerprint} {last.finished.isoformat()}"


def _scope(
    connection: duckdb.DuckDBPyConnection,
    job: str,
    last: runs.Run,
    dataset: Dataset,
    home: Home,
) -> tuple[dict[str, str], dict[str, Any]]:
    """The arguments `tables` and `parameters` of `validation.run_gate` for a gate."""

    def of_lake(*names: str) -> dict[str, str]:
        return {name: f"lake.main.{name}" for name in names}

    channels = dataset.channels
    if job == "ingest":
        tables = of_lake(
            "behaviors",
            "impressions",
            "items",
            "atoms",
            "user_timeline",
            "user_stats",
            "item_stats",
        )
        read, bad = last.facts.get("read", {}), last.facts.get("broken", {})
        counts = [f"({sql_literal(table)}, {rows}, {bad[table]})" for table, rows in read.items()]
        rows_read = ", ".join(counts or ["('nothing', 0, 0)"])
        tables["ingested"] = f"(SELECT * FROM (VALUES {rows_read}) t(table_name, read, broken))"
        return tables, {
            "channels": channels,
            "latest": datetime.now(UTC) + CLOCK_TOLERANCE + timedelta(hours=1),
            "max_share": dataset.quarantine.max_share,
        }
    if job == "encode":
        facts = {k: last.facts[k] for k in ("encoder_version", "width")}
        return of_lake("atoms", "atomic_behavior_embedding"), facts
    if job == "frame":
        path = home.frames / last.fingerprint / "frame.parquet"
        about = json.loads(pq.read_schema(path).metadata[b"bahe"])
        # Against the log as the frame saw it, which may be an older snapshot.
        then = f"AT (VERSION => {about['snapshot']})"
        tables = {
            name: f"(SELECT * FROM {relation} {then})"
            for name, relation in of_lake("impressions", "user_timeline").items()
        }
        tables["frame"] = f"read_parquet({sql_literal(str(path))})"
        shown = old_enough(about.get("label_delay_us", 0), tables["impressions"])
        return tables, {
            "channels": channels,
            "rows": scalar(connection, f"SELECT count(*) FROM {shown}"),
            "freshness": about.get("freshness", "live"),
            "label_time": about.get("label_time", AT_ONCE),
        }
    return of_lake("user_embedding", "item_embedding"), dict(last.facts)
