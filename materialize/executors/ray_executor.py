"""The executor on a Ray cluster: Ray Data with an actor pool for models, Ray tasks for shards of SQL."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bahe_core.errors import BadInput, BaheError, Unreachable, last_line
from bahe_core.machine import configure_threads, usable_cores

if TYPE_CHECKING:
    from types import ModuleType

    from materialize.executors.executor import ExecutorConfig, Result, Task

RETRIES = 5
"""Retries of a task or shard whose worker died; bounded, since a task may kill every worker it gets."""
PROBE_SECONDS = 5.0


class RayExecutor:
    """Workers of a Ray cluster that this process has joined."""

    def __init__(self, ray: ModuleType, *, workers: int, gpus_per_actor: float) -> None:
        self._ray = ray
        self._gpus = gpus_per_actor
        self.workers = workers

    def map(self, make: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task]) -> Iterator[Result]:
        """As Executor says. What waits is in Ray's object store, which goes to disk beyond its memory."""
        data = self._ray.data
        blocks = [_block(task) for task in tasks]
        if not blocks:
            return
        results = data.from_blocks(blocks).map_batches(
            _Actor,
            fn_constructor_args=(make,),
            compute=data.ActorPoolStrategy(size=min(self.workers, len(blocks))),
            batch_size=None,  # a block is a task, and stays one
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=self._gpus,
            ray_remote_args_fn=_restarts,
        )
        with _bahe_errors(self._ray):
            for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for result in block[_COLUMN]:
                    value = pickle.loads(result.as_buffer())
                    if isinstance(value, BaheError):
                        raise value
                    yield value

    def streams(
        self, shard: Callable[[int], Iterator[pa.RecordBatch]], count: int
    ) -> list[Iterator[pa.RecordBatch]]:
        """As Executor says. What is not read yet waits in the object store, and no shard for another."""
        task = self._ray.remote(_shard).options(
            num_returns="streaming", num_cpus=1, max_retries=RETRIES, retry_exceptions=False
        )
        shared = self._ray.put(shard)
        return [self._read(task.remote(shared, index)) for index in range(count)]

    def _read(self, references: Iterator[Any]) -> Iterator[pa.RecordBatch]:
        with _bahe_errors(self._ray):
            for reference in references:
                yield self._ray.get(reference)


_COLUMN = "pickled"


def _restarts() -> dict[str, Any]:
    return {"max_restarts": -1, "max_task_retries": RETRIES}


def _block(value: object) -> pa.Table:
    """Any value as a Ray Data block of one pickled row, which Ray Data does not split."""
    return pa.table({_COLUMN: pa.array([pickle.dumps(value, protocol=5)], pa.large_binary())})


class _Actor:
    """One worker of the pool: makes its model when it starts."""

    def __init__(self, make: Callable[[], Callable[[Any], object]]) -> None:
        _one_thread()
        try:
            self._work = make()
        except BaheError as error:  # else Ray would start the worker again and again
            self._failed: BaheError | None = error
        else:
            self._failed = None

    def __call__(self, block: pa.Table) -> pa.Table:
        if self._failed is not None:
            return _block(self._failed)
        try:
            return _block(self._work(pickle.loads(block[_COLUMN][0].as_buffer())))
        except BaheError as error:  # as a result, since Ray Data passes errors on as text
            return _block(error)


def _shard(shard: Callable[[int], Iterator[pa.RecordBatch]], index: int) -> Iterator[pa.RecordBatch]:
    _one_thread()
    yield from shard(index)


def _one_thread() -> None:
    """Limit this worker to one thread: there is one worker per core of the cluster."""
    os.environ["BAHE_THREADS"] = "1"
    configure_threads()


@contextmanager
def ray_executor(config: ExecutorConfig) -> Iterator[RayExecutor]:
    """Join the cluster, or start one on this machine, and leave it at the end.

    Raises BadInput when Ray is not installed or the cluster is too small, Unreachable when it does not
    answer.
    """
    # Read when Ray is imported: nothing is sent to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise BadInput("--executor ray needs Ray: pip install 'bahe[ray]'.") from None
    joined = not ray.is_initialized()
    if joined:
        _join(ray, config)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # bahe shows its own
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised
        resources: dict[str, float] = ray.cluster_resources()
        yield RayExecutor(ray, workers=_workers(resources, config), gpus_per_actor=config.gpus_per_actor)
    finally:
        if joined:
            ray.shutdown()


def _join(ray: ModuleType, config: ExecutorConfig) -> None:
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = config.address
    if address is None:
        cores = max(usable_cores(), config.actors or 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quietly)
        return
    way_out = "start the cluster (`ray start`), correct --ray-address, or leave it out"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise BadInput(f"--ray-address is {address}; give host:port of the cluster's head, or auto.")
        if not _speaks_grpc(address):  # Ray itself would try for ever
            raise Unreachable(f"no Ray cluster answers at {address}; {way_out}.")
    try:
        ray.init(address=address, **quietly)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = last_line(error)
        raise Unreachable(f"the Ray cluster {address} cannot be joined ({reason}); {way_out}.") from None


def _speaks_grpc(address: str) -> bool:
    """Whether a gRPC server, such as the head of a Ray cluster, answers there."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0") == "1":
        return True  # its certificates are Ray's business
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=PROBE_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


def _workers(resources: dict[str, float], config: ExecutorConfig) -> int:
    """Number of workers asked for, else as many as fit. Raises BadInput when they do not fit."""
    room = int(resources.get("CPU", 0))
    needs = "a core"
    if config.gpus_per_actor:
        room = min(room, int(resources.get("GPU", 0) / config.gpus_per_actor))
        needs += f" and {config.gpus_per_actor:g} GPUs"
    workers = config.actors or room
    if not room or workers > room:
        raise BadInput(
            f"the Ray cluster has room for {room} actors with {needs} each, not for {max(workers, 1)};"
            " lower --num-actors or --num-gpus-per-actor, or add nodes."
        )
    return workers


@contextmanager
def _bahe_errors(ray: ModuleType) -> Iterator[None]:
    """Turns lost workers into one sentence, and unwraps a shard's own error from Ray's."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BaheError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise BaheError(
            f"workers of the Ray cluster were lost again and again ({type(error).__name__}; killed, or out"
            " of memory?); what was committed is kept, so run it again."
        ) from error
