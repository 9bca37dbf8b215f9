"""Threads and devices: set once, here, by every entry point."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def usable_cores() -> int:
    """Cores that this process may run on (respects taskset and cgroup cpusets)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int:
    """Threads for numerical work: BAHE_THREADS when set, else one per usable core."""
    return max(1, int(os.environ.get("BAHE_THREADS", usable_cores())))


def memory_limit() -> str | None:
    """How much memory a DuckDB connection may take before it spills to disk: BAHE_MEMORY (as `4GB`)."""
    return os.environ.get("BAHE_MEMORY") or None


def configure_threads() -> int:
    """Give every numerical library the same thread count; call before importing torch.

    Oversubscribed threads made one training epoch twenty times slower on two cores, because torch
    and the OpenMP runtimes of other libraries each start one thread per *visible* core.
    """
    count = threads()
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(count)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    return count


def is_first_process() -> bool:
    """Whether this is torchrun's first process, or the only one: of several, it alone speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def device(name: str | None = None) -> torch.device:
    """The torch device to compute on: the one named, else CUDA, else Apple's MPS, else CPU."""
    import torch

    if name is not None:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class PeakMemory:
    """Largest resident memory of this process within a `with` block, in MiB, sampled by a thread."""

    def __init__(self, interval: float = 0.05) -> None:
        self.mebibytes = 0.0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample(self) -> None:
        import psutil

        resident = psutil.Process().memory_info().rss / 2**20
        self.mebibytes = max(self.mebibytes, resident)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()
