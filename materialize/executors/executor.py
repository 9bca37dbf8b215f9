"""What an executor does, and the local one; wherever work runs, its results are the same.

`map` is for models: tasks through a model that each worker builds once. `streams` is for SQL: shards of a
query, each a stream in its own order. An executor never writes. Results come back to the job, which commits
them, so a killed worker loses only its current task and a killed job only what it had not committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import pyarrow as pa

from bahe_core.errors import BadInput

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Runs work on one or more workers.

    Whatever it is given must be picklable and find its files on any node.
    """

    @property
    def workers(self) -> int:
        """How many pieces of work run at once."""
        ...

    def map(self, make: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task]) -> Iterator[Result]:
        """The result of each task, in any order, so a result has to name its task.

        Each worker calls `make` once. A task whose worker is lost goes to another one, so a task must give
        the same result each time.
        """
        ...

    def streams(
        self, shard: Callable[[int], Iterator[pa.RecordBatch]], count: int
    ) -> list[Iterator[pa.RecordBatch]]:
        """The streams of `shard(0)` to `shard(count - 1)`, each in its own order.

        The shard of a lost worker is read again from its start, so it must give the same batches each time.
        """
        ...


class LocalExecutor:
    """This process, one task after the other; the model and DuckDB use its threads."""

    workers = 1

    def map(self, make: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task]) -> Iterator[Result]:
        """As Executor says; nothing is made when there are no tasks."""
        work = None
        for task in tasks:
            work = work or make()
            yield work(task)

    def streams(
        self, shard: Callable[[int], Iterator[pa.RecordBatch]], count: int
    ) -> list[Iterator[pa.RecordBatch]]:
        """As Executor says."""
        return [iter(shard(index)) for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Where to run, as given on the command line. Raises BadInput when options contradict each other."""

    kind: Literal["local", "ray"] = "local"
    address: str | None = None
    """host:port of a Ray cluster's head, or `auto` for the cluster this machine belongs to; without it, a
    cluster on this machine is started for the duration of the job."""
    actors: int | None = None
    """Number of workers; by default one per core of the cluster (per GPU share when they use GPUs)."""
    gpus_per_actor: float = 0

    def __post_init__(self) -> None:
        if self.kind == "local":
            for option, value in (
                ("--ray-address", self.address),
                ("--num-actors", self.actors),
                ("--num-gpus-per-actor", self.gpus_per_actor),
            ):
                if value:
                    raise BadInput(f"{option} needs --executor ray.")
        if self.actors is not None and self.actors < 1:
            raise BadInput(f"--num-actors is {self.actors}; give at least 1.")
        if self.gpus_per_actor < 0:
            raise BadInput(f"--num-gpus-per-actor is {self.gpus_per_actor}; give 0 or more.")


LOCAL = ExecutorConfig()
