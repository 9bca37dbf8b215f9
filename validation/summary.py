"""The front page of the gates: every check of every gate on one page that needs no network.

Great Expectations' own index fills itself from the network and is empty without one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from bahe_core.files import replace_atomically
from validation.measure import Finding
from validation.suites import SUITES

PAGE = "gates.html"

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Gates</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem;
   color: #1b1f24; }}
 .passed {{ color: #1a7f37; }} .failed {{ color: #cf222e; }} .quiet {{ color: #57606a; }}
 summary {{ cursor: pointer; padding: .25rem 0; }} details {{ margin-left: 1rem; }}
 table {{ border-collapse: collapse; width: 100%; margin: .4rem 0 1rem; font-size: .9rem; }}
 td {{ padding: .3rem .6rem; border-bottom: 1px solid #d8dee4; vertical-align: top; }}
</style></head><body>
<h1>Gates</h1>
<p class="quiet">What had to hold before each hand-over, and what was found. The same results in Great
Expectations' own form: <a href="index.html">Data Docs</a> (its index needs a network).</p>
{gates}
</body></html>
"""


def write_summary(gate: str, findings: Sequence[Finding], verdicts: Sequence[bool], docs: Path) -> Path:
    """Replace the gate's section of the page, and leave those of the other gates; returns the page."""
    results = docs / ".results"
    results.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "table": finding.check.table,
            "rule": finding.check.title,
            "why": finding.check.why,
            "found": finding.outcome if not passed else "",
            "passed": passed,
        }
        for finding, passed in zip(findings, verdicts, strict=True)
    ]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    (results / f"{gate}.json").write_text(json.dumps({"gate": gate, "when": when, "checks": rows}))
    gate_files = [results / f"{name}.json" for name in SUITES]
    sections = [json.loads(path.read_text()) for path in gate_files if path.is_file()]
    page = docs / PAGE
    with replace_atomically(page) as part:
        part.write_text(_FRAME.format(gates="".join(map(_section, sections))))
    return page


def _section(section: dict[str, Any]) -> str:
    checks = section["checks"]
    failed = sum(not check["passed"] for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed" if failed else f"passed, {len(checks)} checks"
    colour = "failed" if failed else "passed"
    tables = "".join(
        _table(table, list(members))
        for table, members in groupby(
            sorted(checks, key=lambda check: check["table"]), lambda check: check["table"]
        )
    )
    return (
        f'<h2>{escape(section["gate"])} <span class="{colour}">{verdict}</span></h2>'
        f'<p class="quiet">{section["when"]}</p>{tables}'
    )


def _table(table: str, checks: list[dict[str, Any]]) -> str:
    failed = sum(not check["passed"] for check in checks)
    rows = "".join(
        f"<tr><td class={'passed' if check['passed'] else 'failed'}>{'✓' if check['passed'] else '✗'}</td>"
        f"<td>{escape(check['rule'])}"
        + (f"<br><b class=failed>{escape(check['found'])}</b>" if check["found"] else "")
        + f"</td><td class=quiet>{escape(check['why'])}</td></tr>"
        for check in checks
    )
    note = f"{failed} failed" if failed else f"{len(checks)} checks"
    return (
        f"<details{' open' if failed else ''}><summary><b>{escape(table)}</b> "
        f"<span class=quiet>{note}</span></summary><table>{rows}</table></details>"
    )
