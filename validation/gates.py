"""Run a gate: Great Expectations judges what DuckDB counted, and Data Docs show it to people."""

from __future__ import annotations

import html
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from bahe_core.errors import GateFailed
from validation.measure import Finding, measure
from validation.summary import write_summary

# Where a page cannot be written it logs a traceback and goes on; our own page, written next, then says why.
logging.getLogger("great_expectations.render.renderer.site_builder").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class GateResult:
    """What a gate found."""

    gate: str
    """"ingest", "encode", "frame" or "embed"."""
    passed: bool
    checks: int
    """Expectations evaluated."""
    failures: tuple[str, ...]
    """One sentence for each expectation that failed: the column, the rule, how many rows."""
    docs: Path | None
    """A page with every check; Data Docs lie beside it."""


def run_gate(
    connection: duckdb.DuckDBPyConnection,
    gate: str,
    *,
    tables: Mapping[str, str],
    parameters: Mapping[str, Any],
    docs: Path,
) -> GateResult:
    """Check `tables` (logical name to SQL relation) against the rules of `gate`.

    The Data Docs under `docs` hold the latest result of every gate that ran there.

    Raises:
        ValueError: the gate is unknown, or `tables` or `parameters` lacks a name it needs.
        NotReady: a table cannot be read.
        GateFailed: a table cannot be compared at all, for example for its column types.
    """
    findings = measure(connection, gate, tables, parameters)
    verdicts = _judge(gate, findings, docs)
    failures = tuple(
        finding.sentence for finding, passed in zip(findings, verdicts, strict=True) if not passed
    )
    page = write_summary(gate, findings, verdicts, docs)
    return GateResult(gate, not failures, len(findings), failures, page)


def require(result: GateResult) -> None:
    """Return if the gate passed.

    Raises:
        GateFailed: it did not; the sentence names the first failure and where to read the rest.
    """
    if result.passed:
        return
    first = result.failures[0].rstrip(".")
    more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
    where = f"; see {result.docs}" if result.docs else ""
    raise GateFailed(f"The {result.gate} gate refused the hand-over: {first}{more}{where}.")


def _judge(gate: str, findings: Sequence[Finding], docs: Path) -> list[bool]:
    """Great Expectations' verdict on each finding, as one suite per table; Data Docs on the side.

    Great Expectations sees one row per table with a column for each check. Its names and texts
    are what a person reads in Data Docs: the column is the rule, the description what was found.
    """
    # Imported here because it takes seconds, which a command that runs no gate should not pay.
    import great_expectations as gx
    import pandas as pd
    from great_expectations.expectations.core.expect_column_max_to_be_between import (
        ExpectColumnMaxToBeBetween,
    )

    context = _context(docs)
    for folder in (docs, docs / ".results"):
        for section in ("expectations", "validations"):
            shutil.rmtree(folder / section / gate, ignore_errors=True)
    source = context.data_sources.add_pandas("DuckDB")
    run = gx.RunIdentifier(run_name="latest")
    verdicts: dict[str, bool] = {}
    for table in dict.fromkeys(finding.check.table for finding in findings):
        members = [finding for finding in findings if finding.check.table == table]
        suite = gx.ExpectationSuite(
            name=f"{gate}.{table}",
            expectations=[
                ExpectColumnMaxToBeBetween(
                    column=finding.check.title,
                    min_value=finding.check.low,
                    max_value=finding.check.high,
                    description=_description(finding),
                    notes=finding.check.why,
                )
                for finding in members
            ],
        )
        validation = context.validation_definitions.add(
            gx.ValidationDefinition(
                name=f"{gate}.{table}",
                data=source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all"),
                suite=context.suites.add_or_update(suite),
            )
        )
        frame = pd.DataFrame({finding.check.title: [finding.count] for finding in members})
        result = validation.run(batch_parameters={"dataframe": frame}, run_id=run)
        for verdict in result.results:
            verdicts[verdict.expectation_config.kwargs["column"]] = bool(verdict.success)
    # The pages of other gates are there; writing them again took half of a gate's time.
    suites = [key for key in context.expectations_store.list_keys() if key.name.startswith(f"{gate}.")]
    results = [
        key
        for key in context.validation_results_store.list_keys()
        if key.expectation_suite_identifier in suites
    ]
    context.build_data_docs(resource_identifiers=[*suites, *results])
    return [verdicts[finding.check.title] for finding in findings]


def _description(finding: Finding) -> str:
    check = finding.check
    if not finding.holds:
        # The example is a user's data, and Great Expectations puts it into the page unescaped.
        return html.escape(f"FAILED: {finding.outcome}.")
    if check.high == 0:
        return "Rows that break this rule: none allowed."
    return f"Rows expected: {check.low:,}{' or more' if check.high is None else ''}."


def _context(docs: Path) -> Any:
    """A Great Expectations context that keeps results and pages under `docs`, and phones nobody."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig, ProgressBarsConfig

    from validation.pages import site

    def files(folder: Path) -> dict[str, str]:
        return {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder)}

    memory = {"class_name": "InMemoryStoreBackend"}
    results = docs.absolute() / ".results"
    stores = {
        "ExpectationsStore": files(results / "expectations"),
        "ValidationResultsStore": files(results / "validations"),
        "ValidationDefinitionStore": memory,
        "CheckpointStore": memory,
    }
    names = {
        "ExpectationsStore": "expectations_store",
        "ValidationResultsStore": "validation_results_store",
        "ValidationDefinitionStore": "validation_definition_store",
        "CheckpointStore": "checkpoint_store",
    }
    config = DataContextConfig(
        stores={
            names[kind]: {"class_name": kind, "store_backend": backend} for kind, backend in stores.items()
        },
        expectations_store_name="expectations_store",
        validation_results_store_name="validation_results_store",
        checkpoint_store_name="checkpoint_store",
        data_docs_sites={
            "bahe": site(files(docs.absolute())),
        },
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
    )
    return gx.get_context(project_config=config, mode="ephemeral")
