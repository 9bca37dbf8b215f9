"""What the benchmarks share: arguments, the machine's description, and the JSON and pages they write."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bahe_core.errors import BadInput, BaheError
from bahe_core.files import replace_atomically
from bahe_core.machine import configure_threads, usable_cores

LIBRARIES = ("torch", "transformers", "feast", "duckdb", "numpy")
PEERS = ("fuxictr", "sentence-transformers")
"""Their versions are reported if they are installed."""

DOCS = Path(__file__).parent.parent / "docs"
MEASUREMENTS = DOCS / "measurements.md"
"""The page of all figures; each benchmark has its own section."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure, with what it is measured against."""

    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    goal: str | None = None
    holds: bool | None = None


def main(name: str, description: str, measure: Callable[[bool, Path], Iterable[Row]]) -> None:
    """Run `measure(quick, home)`, print each row when it is there, and write them as JSON when asked to.

    The JSON of a run that is stopped has the rows so far, and `--from` puts them on the page.
    """
    threads = configure_threads()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="measure less of the same")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {MEASUREMENTS.name}")
    parser.add_argument("--home", type=Path, default=Path(".bahe"), help="a home filled by `bahe demo`")
    parser.add_argument(
        "--from", type=Path, dest="earlier", help="measure nothing: the figures of this JSON"
    )
    arguments = parser.parse_args()
    try:
        if arguments.write:
            around(MEASUREMENTS, name)  # before hours of measuring, not after
        if arguments.earlier is not None:
            content = _read(arguments.earlier, name)
        else:
            content = {
                "name": name,
                "quick": arguments.quick,
                "whole": False,
                "date": datetime.now(UTC).date().isoformat(),
                "commit": _commit(),
                "hardware": f"{_processor()}, {usable_cores()} cores",
                "threads": threads,
                "versions": _versions(),
                "rows": [],
            }
            for row in measure(arguments.quick, arguments.home):
                print(_line(row), flush=True)
                content["rows"].append(asdict(row))
                _save(content, arguments.json)
            content["whole"] = True
            _save(content, arguments.json)
    except BaheError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    if arguments.write:
        put(MEASUREMENTS, name, section(content))


def _line(row: Row) -> str:
    against = f"  ({row.peer}: {row.peer_value:.4g})" if row.peer_value is not None else ""
    goal = f"  goal {row.goal}: {'holds' if row.holds else 'MISSED'}" if row.goal else ""
    return f"{row.metric:<48} {row.value:>10.4g} {row.unit}{against}{goal}"


def _save(content: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        with replace_atomically(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")


def _read(path: Path, name: str) -> dict[str, Any]:
    """The JSON of an earlier run. Raises BadInput when it is none of this benchmark."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["name"] == name:
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BadInput(f"{path} is no JSON of benchmarks.{name}; name what its --json wrote.")


def against(metric: str, value: float, unit: str, peers: Mapping[str, float]) -> Iterator[Row]:
    """A figure beside each peer's, which it should be above."""
    for peer, theirs in peers.items():
        yield Row(
            metric=metric,
            value=value,
            unit=unit,
            peer=peer,
            peer_value=theirs,
            goal=f"above {peer}",
            holds=value > theirs,
        )


def section(content: dict[str, Any]) -> str:
    """A benchmark's JSON in Markdown."""
    command = f"python -m benchmarks.{content['name']}{' --quick' if content['quick'] else ''}"
    threads = "1 thread" if content["threads"] == 1 else f"{content['threads']} threads"
    lines = [
        f"`{command}`, {content['date']}, {content['hardware']}, {threads}, commit {content['commit']}"
        f"{'' if content.get('whole', True) else '; stopped before its end'}.",
        "",
        "| | Measured | Against | Goal |",
        "|---|---|---|---|",
    ]
    for row in content["rows"]:
        against = "" if row["peer"] is None else f"{row['peer']}: {_shown(row['peer_value'])}"
        goal = "" if row["goal"] is None else f"{row['goal']}: {'holds' if row['holds'] else '**missed**'}"
        cells = [row["metric"], f"{_shown(row['value'])} {row['unit']}", against, goal]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def around(page: Path, name: str) -> tuple[str, str]:
    """A page's text before and after a benchmark's figures. Raises BadInput when it has no markers."""
    begin, end = f"<!-- computed by benchmarks.{name} -->", "<!-- end -->"
    before, has_begin, rest = (page.read_text() if page.is_file() else "").partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise BadInput(f"{page} lacks the lines {begin} and {end}; put them where the figures belong.")
    return before + begin, end + after


def put(page: Path, name: str, text: str) -> None:
    """Put a text between a benchmark's markers on a page. Raises BadInput when it has none."""
    before, after = around(page, name)
    page.write_text(f"{before}\n\n{text}\n\n{after}")


def _versions() -> dict[str, str]:
    versions = {library: version(library) for library in LIBRARIES}
    for peer in PEERS:
        with suppress(PackageNotFoundError):
            versions[peer] = version(peer)
    return versions


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
