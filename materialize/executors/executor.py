"""Where heavy work runs: in this process, or on a Ray cluster. The same work, the same results.

`map` is for models: pieces of work through a model that each worker makes once. `streams` is for SQL:
shards of a query, each a stream in an order of its own. An executor never writes: results come back to the
job, which commits them, so that a killed worker costs the piece it had, and a killed job what it had not
committed yet.
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
    """Runs work on one or more workers. What it is given must be picklable, and find its files anywhere."""

    @property
    def workers(self) -> int:
        """How many pieces of work run at once."""
        ...

    def map(self, make: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task]) -> Iterator[Result]:
        """The result of each task, in any order, so it has to say whose it is. A worker calls `make` once.

        A task whose worker is lost is given to another, so a task must give the same result each time.
        """
        ...

    def streams(
        self, shard: Callable[[int], Iterator[pa.RecordBatch]], count: int
    ) -> list[Iterator[pa.RecordBatch]]:
        """The streams of `shard(0)` to `shard(count - 1)`, each in its own order.

        A worker that is lost begins its shard again, so a shard must give the same batches each time.
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
    """What the command line says of where to run. Raises BadInput when its parts do not fit together."""

    kind: Literal["local", "ray"] = "local"
    address: str | None = None
    """host:port of a Ray cluster's head, or `auto` for the one this machine is part of; a cluster on this
    machine alone, for the time of the job, when left out."""
    actors: int | None = None
    """Workers; as many as the cluster has cores (or GPUs, when they take any)."""
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
