"""Growth: synthetic logs of 5 to 50 million behaviors through `bahe ingest`, and what follows.

For 50 million behaviors there are 1 million users, 500,000 atoms and 5 million impressions, and in
proportion for fewer. Each step runs in a process of its own, whose memory is measured; ingest is timed from
after its imports. DuckDB may use less memory than the process, and spills the rest to disk (TMPDIR needs
tens of GB). Encoding is measured on a sample and extrapolated.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bahe_core.home import Home
from bahe_core.machine import PeakMemory, configure_threads
from bahe_core.progress import say
from benchmarks.harness import Row, main

SIZES = (5_000_000, 15_000_000, 50_000_000)
"""Behaviors; a tenth of them with `--quick`."""

DAYS = 30
SAMPLES = ((1_000, 5_000), (360, 1_500))
"""Atoms encoded, by default and with `--quick`; two sizes, so that loading the model cancels out."""

ALL_ATOMS = 500_000
DUCKDB_MEMORY = "5GB"
MOST_MIB, MOST_SECONDS, MOST_SLOPE, MOST_IDLE_SECONDS, MOST_SYNTH_MIB = 8192, 900, 1.1, 5, 2048


@dataclass(frozen=True)
class Step:
    """What one step took, in a process of its own."""

    seconds: float
    mebibytes: float
    answer: Any


def measure(quick: bool, _: Path) -> Iterable[Row]:
    """All rows of the benchmark."""
    sizes = [size // 10 for size in SIZES] if quick else list(SIZES)
    seconds: list[float] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            yield from size_rows(Path(folder), size, seconds, whole=not quick, last=size == sizes[-1])
    steepness = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    yield Row(
        metric=f"ingest time against rows, {sizes[0]:,} to {sizes[-1]:,}",
        value=steepness,
        unit="log-log slope",
        goal=f"<= {MOST_SLOPE}",
        holds=steepness <= MOST_SLOPE,
    )
    yield from encode_rows(SAMPLES[quick])


def size_rows(folder: Path, size: int, seconds: list[float], *, whole: bool, last: bool) -> Iterable[Row]:
    """One size of log; appends ingest's seconds to the list. The largest is also run again and extended."""
    log, home = folder / "log", folder / "home"
    say(f"{size:,} behaviors")
    written = alone(make_log, log, size, DAYS)
    whole_log = alone(ingest, log, home)
    seconds.append(whole_log.seconds)
    what = f"ingest of {size:,} behaviors"
    has_goal = last and whole
    yield Row(
        metric=what,
        value=whole_log.seconds,
        unit="s",
        goal=f"< {MOST_SECONDS}" if has_goal else None,
        holds=whole_log.seconds < MOST_SECONDS if has_goal else None,
    )
    yield at_most(f"memory, {what}", whole_log.mebibytes, "MiB", MOST_MIB)
    if not last:
        return
    yield Row(metric=f"rows a second, {what}", value=size / whole_log.seconds, unit="rows/s")
    yield Row(metric="bytes of lake a behavior", value=bytes_of(home / "lake") / size, unit="bytes")
    yield Row(metric="bytes of log a behavior", value=bytes_of(log) / size, unit="bytes")
    yield Row(metric=f"synth of {size:,} behaviors", value=size / written.seconds, unit="rows/s")
    yield at_most(f"memory, synth of {size:,} behaviors", written.mebibytes, "MiB", MOST_SYNTH_MIB)
    again = alone(ingest, log, home)
    assert again.answer["skipped"], "the second run had something to do"
    yield at_most("ingest with nothing new", again.seconds, "s", MOST_IDLE_SECONDS)
    alone(make_log, log, size, DAYS + 1)
    day = alone(ingest, log, home)
    assert day.answer["added"]["behaviors"], "the further day brought nothing"
    yield Row(
        metric=f"ingest of one further day, {day.answer['added']['behaviors']:,} behaviors",
        value=day.seconds,
        unit="s",
        peer="the whole before it",
        peer_value=whole_log.seconds,
    )
    yield at_most("memory, ingest of one further day", day.mebibytes, "MiB", MOST_MIB)


def encode_rows(atoms: tuple[int, int]) -> Iterable[Row]:
    """Time to encode a sample of atoms, and from it the time of all of them."""
    counts, seconds = [], []
    for count in atoms:
        with tempfile.TemporaryDirectory() as folder:
            log, home = Path(folder) / "log", Path(folder) / "home"
            alone(make_log, log, count * 100, 1, count)
            alone(ingest, log, home)
            done = alone(encode, log, home)
            counts.append(done.answer)
            seconds.append(done.seconds)
    measured = counts[1] - counts[0]
    rate = measured / (seconds[1] - seconds[0])
    yield Row(metric=f"atoms encoded, measured on {measured:,}", value=rate, unit="atoms/s")
    yield Row(
        metric=f"encoding {ALL_ATOMS:,} atoms, extrapolated from {measured:,}",
        value=ALL_ATOMS / rate,
        unit="s",
    )


def at_most(metric: str, value: float, unit: str, most: float) -> Row:
    """A figure with an upper bound."""
    return Row(metric=metric, value=value, unit=unit, goal=f"<= {most:,}", holds=value <= most)


def bytes_of(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def alone(step: Callable[..., Callable[[], Any]], *arguments: Any) -> Step:
    """Prepare a step and time it, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_timed, step, arguments).result()


def _timed(step: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> Step:
    configure_threads()
    os.environ["BAHE_MEMORY"] = DUCKDB_MEMORY
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars
    run = step(*arguments)
    with PeakMemory() as peak:
        start = time.perf_counter()
        answer = run()
        seconds = time.perf_counter() - start
    return Step(seconds, peak.mebibytes, answer)


def make_log(log: Path, size: int, days: int, atoms: int | None = None) -> Callable[[], Any]:
    """A log of `size` behaviors over the first 30 days, with everything else in proportion."""
    from bahe_synth.log import synth

    if log.exists():
        return lambda: synth(log, days=days)
    return lambda: synth(
        log,
        users=size // 50,
        items=max(20, size // 500),
        behaviors=size,
        impressions=size // 10,
        atoms=atoms or size // 100,
        days=days,
    )


def ingest(log: Path, home: Path) -> Callable[[], dict[str, Any]]:
    """`bahe ingest`, with its gate."""
    from materialize.ingest.ingest import ingest as job

    return lambda: dict(vars(job(Home.at(home), log / "dataset.yaml")))


def encode(_: Path, home: Path) -> Callable[[], int]:
    """`bahe encode`, with its gate; the number of atoms encoded."""
    from materialize.vectors.encode import encode as job

    return lambda: int(job(Home.at(home)).added)


if __name__ == "__main__":
    main("scale", __doc__ or "", measure)
