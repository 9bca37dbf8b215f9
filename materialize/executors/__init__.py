"""Where heavy work runs: in this process, or on a Ray cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from materialize.executors.executor import LOCAL, Executor, ExecutorConfig, LocalExecutor

__all__ = ["LOCAL", "Executor", "ExecutorConfig", "start"]


def start(config: ExecutorConfig) -> AbstractContextManager[Executor]:
    """The executor, for as long as it is needed. Raises BadInput, Unreachable."""
    if config.kind == "local":
        return nullcontext(LocalExecutor())
    from materialize.executors.ray_executor import ray_executor

    return ray_executor(config)
