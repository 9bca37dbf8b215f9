"""Training beside other processes: the cost of letting idle threads sleep, and of a busy neighbour.

Each measurement is a process of its own that trains some steps of the demo's model, since an OpenMP runtime
reads its settings once, when it is loaded. Threads either sleep while they wait (as bahe sets them) or spin
(the runtime's default). The neighbour is a process that computes without pause. The four cases are measured
in turn, so that a drift of the machine's speed affects all of them alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

from bahe_core.errors import BaheError
from bahe_core.home import Home
from bahe_core.machine import configure_threads
from benchmarks.harness import Row, main

WARM_UP = 3
STEPS = (30, 12)
"""Steps timed in each process, by default and with `--quick`."""
ROUNDS = (5, 3)

_CHILD = """
import sys
from pathlib import Path
from benchmarks.neighbour import seconds_per_step
print(seconds_per_step(Path(sys.argv[1]), int(sys.argv[2]), sleeping=sys.argv[3] == "sleeping"))
"""


def seconds_per_step(home: Path, steps: int, *, sleeping: bool) -> float:
    """Median seconds of a training step in this process, which must not have loaded torch yet."""
    configure_threads()
    if not sleeping:
        for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
            del os.environ[name]
    from benchmarks.training_steps import bahe_batches, bahe_step, planned, read_scene, stepper

    scene = read_scene(Home.at(home))
    batches = bahe_batches(scene)
    run = stepper(bahe_step(batches, share=True), batches.model, scene)
    import numpy as np

    among = np.arange(len(scene.split.clicked_N))
    plan = planned(scene, among, scene.settings.training.impressions_per_step)
    times = [run(rows) for rows in plan[: WARM_UP + steps]]
    return median(times[WARM_UP:])


@contextmanager
def busy() -> Iterator[None]:
    """A neighbour that computes without pause on one core, wherever the kernel puts it."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10_000))"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _measured(home: Path, steps: int, *, sleeping: bool, beside: bool) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    how = "sleeping" if sleeping else "spinning"
    with busy() if beside else nullcontext():
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(home), str(steps), how],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise BaheError(f"a measuring process ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(done.stdout.strip().splitlines()[-1])


def measure(quick: bool, home: Path) -> Iterable[Row]:
    """Rows of this benchmark."""
    rounds, steps = ROUNDS[quick], STEPS[quick]
    kinds = [(sleeping, beside) for beside in (False, True) for sleeping in (True, False)]
    times: dict[tuple[bool, bool], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for sleeping, beside in kinds:
            times[sleeping, beside].append(_measured(home, steps, sleeping=sleeping, beside=beside))

    def ratio(upper: tuple[bool, bool], lower: tuple[bool, bool]) -> float:
        pairs = zip(times[upper], times[lower], strict=True)
        return median(above / below for above, below in pairs)

    cost = ratio((True, False), (False, False)) - 1
    kept, spinning = ratio((True, False), (True, True)), ratio((False, False), (False, True))
    yield Row(
        metric="a training step, alone",
        value=median(times[True, False]) * 1000,
        unit="ms",
        peer="threads spin",
        peer_value=median(times[False, False]) * 1000,
    )
    yield Row(
        metric="what sleeping threads cost alone",
        value=cost * 100,
        unit="%",
        goal="at most 5",
        holds=cost <= 0.05,
    )
    yield Row(
        metric="speed kept beside a busy process",
        value=kept,
        unit="of its speed alone",
        peer="threads spin",
        peer_value=spinning,
        goal="at least 0.4",
        holds=kept >= 0.4,
    )


if __name__ == "__main__":
    main("neighbour", __doc__ or "", measure)
