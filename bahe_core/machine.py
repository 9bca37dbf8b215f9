"""Threads, devices and memory of this process; every entry point sets the threads here."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from bahe_core.errors import BadInput, clipped

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",  # of every OpenMP runtime, GNU's in torch's wheels included
    "KMP_BLOCKTIME": "0",  # Intel's and LLVM's, in milliseconds
    "TOKENIZERS_PARALLELISM": "false",  # a thread pool beside ours
}
"""Settings with which idle threads sleep rather than spin, unless the user has set others."""


def usable_cores() -> int:
    """Cores that this process may run on (respects taskset and cgroup cpusets)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int:
    """Threads for numerical work: BAHE_THREADS when set, else one per usable core."""
    return max(1, int(os.environ.get("BAHE_THREADS", usable_cores())))


def memory_limit() -> str | None:
    """How much memory a DuckDB connection may use before it spills to disk: BAHE_MEMORY (such as `4GB`)."""
    return os.environ.get("BAHE_MEMORY") or None


def configure_threads() -> int:
    """Give every numerical library the same thread count, and let idle threads sleep.

    Call before importing torch: its OpenMP runtime reads the environment once, when it is loaded. Child
    processes inherit it. Oversubscribed threads made one training epoch twenty times
    slower on two cores, because torch and the OpenMP runtimes of other libraries each start one thread per
    *visible* core; threads that spin while they wait made it as slow beside another busy process
    (`python -m benchmarks.neighbour`).
    """
    count = threads()
    for name in _THREAD_VARIABLES:
        os.environ[name] = str(count)
    for name, value in _WAITING.items():
        os.environ.setdefault(name, value)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
    return count


def is_first_process() -> bool:
    """Whether this is torchrun's rank 0, or the only process: only it prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def device(name: str | None = None) -> torch.device:
    """The torch device to compute on: the given one, else CUDA, else Apple's MPS, else CPU.

    Raises BadInput on a name that torch does not know.
    """
    import torch

    if name is not None:
        try:
            return torch.device(name)
        except RuntimeError:
            raise BadInput(
                f"device {clipped(name)} is not known; write cpu, cuda, cuda:1 or mps."
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, which must not be None; a thread prefetches the next one."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = reader.submit(next, items, None)
            yield item


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
