"""Every executor does the same work with the same results, also when a worker is killed at it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bahe_core.errors import BadInput, BaheError, NotReady
from feast_ducklake.offline.sharding import merged
from materialize.executors import Executor, ExecutorConfig, start
from tests.support import REPOSITORY
from tests.support.services import RAY_WORKERS

EXECUTORS = {"local": ExecutorConfig(), "ray": ExecutorConfig(kind="ray", actors=RAY_WORKERS)}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    with start(EXECUTORS[request.param]) as started:
        yield started


def make_double(fail_at: int | None = None) -> Callable[[int], tuple[int, np.ndarray, str]]:
    """Work that knows which model it was made with, and leaves at one task with an error."""
    model = os.urandom(8).hex()

    def double(task: int) -> tuple[int, np.ndarray, str]:
        if task == fail_at:
            raise NotReady(f"task {task} is not ready; wait.")
        return task, np.full(1000, 2 * task), model

    return double


def make_mortal(marker: Path) -> Callable[[int], tuple[int, np.ndarray, str]]:
    """Work whose process dies once, at the seventh task."""
    double = make_double()

    def work(task: int) -> tuple[int, np.ndarray, str]:
        die_once(marker, task == 7)
        return double(task)

    return work


def die_once(marker: Path, now: bool) -> None:
    if now and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_map_brings_every_result_back_with_its_key(executor: Executor) -> None:
    results = list(executor.map(make_double, range(20)))
    assert sorted(task for task, _, _ in results) == list(range(20))
    assert all((vector == 2 * task).all() for task, vector, _ in results)
    assert 1 <= len({model for _, _, model in results}) <= executor.workers, "more models than workers"


def test_map_of_nothing_makes_no_model(executor: Executor) -> None:
    assert list(executor.map(partial(pytest.fail, "a model was made"), [])) == []


def test_an_error_of_the_work_is_the_jobs(executor: Executor) -> None:
    with pytest.raises(NotReady, match=r"^task 3 is not ready; wait\.$"):
        list(executor.map(partial(make_double, 3), range(6)))


def make_nothing() -> Callable[[int], int]:
    raise NotReady("the model is not there; train it.")


def test_an_error_of_making_the_model_is_the_jobs(executor: Executor) -> None:
    with pytest.raises(NotReady, match=r"^the model is not there; train it\.$"):
        list(executor.map(make_nothing, range(3)))


def numbers(index: int, marker: Path | None = None) -> Iterator[pa.RecordBatch]:
    """Every third number from its own on."""
    for first in range(1 + index, 300, 30):
        if marker is not None:
            die_once(marker, index == 1 and first > 100)
        yield pa.record_batch({"row": np.arange(first, min(first + 30, 301), 3)})


def test_streams_are_each_in_order(executor: Executor) -> None:
    streams = executor.streams(numbers, 3)
    rows = pa.Table.from_batches(list(merged([with_number(stream) for stream in streams], 64)))["row"]
    assert rows.to_pylist() == list(range(1, 301))


def with_number(stream: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    return (batch.append_column("number", batch["row"]) for batch in stream)


def test_a_killed_worker_costs_no_result(ray_cluster: None, tmp_path: Path) -> None:
    with start(EXECUTORS["ray"]) as executor:
        results = list(executor.map(partial(make_mortal, tmp_path / "a"), range(20)))
        assert sorted(task for task, _, _ in results) == list(range(20))
        streams = executor.streams(partial(numbers, marker=tmp_path / "b"), 3)
        rows = pa.Table.from_batches(list(merged([with_number(stream) for stream in streams], 64)))["row"]
    assert rows.to_pylist() == list(range(1, 301))
    assert (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=200), st.integers(1, 50), st.integers(1, 20), st.data()
)
def test_merged_streams_are_the_whole_in_order(
    shard_of: list[int], rows: int, longest: int, data: st.DataObject
) -> None:
    whole = np.arange(1, len(shard_of) + 1)
    streams = []
    for shard in range(4):
        mine = whole[np.array(shard_of) == shard]
        cuts = data.draw(st.lists(st.integers(0, len(mine)), max_size=longest).map(sorted))
        batches = [pa.record_batch({"value": part * 10, "number": part}) for part in np.split(mine, cuts)]
        streams.append(iter(batches))
    merged_batches = list(merged(streams, rows))
    assert pa.Table.from_batches(merged_batches)["value"].to_pylist() == (whole * 10).tolist()
    assert all(batch.num_rows == rows for batch in merged_batches[:-1])


@pytest.mark.parametrize("numbers", [[1, 2, 2, 3], [1, 3], [2, 3]])
def test_shards_that_do_not_fit_together_are_refused(numbers: list[int]) -> None:
    batch = pa.record_batch({"value": numbers, "number": numbers})
    with pytest.raises(BaheError, match="do not fit together"):
        list(merged([iter([batch])], 10))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": 2}, "--num-actors needs --executor ray"),
        ({"address": "auto"}, "--ray-address needs --executor ray"),
        ({"gpus_per_actor": 1}, "--num-gpus-per-actor needs --executor ray"),
        ({"kind": "ray", "actors": 0}, "at least 1"),
        ({"kind": "ray", "gpus_per_actor": -1}, "0 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        ExecutorConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": RAY_WORKERS + 1}, "room for 2 actors with a core each, not for 3"),
        ({"gpus_per_actor": 1}, "room for 0 actors with a core and 1 GPUs each, not for 1"),
    ],
)
def test_a_cluster_without_room_is_refused(
    options: dict[str, object], words: str, ray_cluster: None
) -> None:
    with pytest.raises(BadInput, match=words), start(ExecutorConfig(kind="ray", **options)):  # type: ignore[arg-type]
        pass


ELSEWHERE = """
import sys
import materialize.executors.ray_executor
materialize.executors.ray_executor.PROBE_SECONDS = 0.5
from materialize.executors import ExecutorConfig, start
from bahe_core.errors import BaheError
for address in sys.argv[1:]:
    try:
        with start(ExecutorConfig(kind="ray", address=address)): pass
    except BaheError as error:
        print(type(error).__name__, error)
"""


def test_a_cluster_that_does_not_answer_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # somebody answers who is no Ray
        addresses = [f"127.0.0.1:{mute.getsockname()[1]}", "no-such-host.invalid:6379", "nonsense", "a:b"]
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, *addresses],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    lines = done.stdout.splitlines()
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["Unreachable", "Unreachable", "BadInput", "BadInput"], done.stderr
    assert all("ray" in line and line.endswith(".") for line in lines), lines


def test_without_ray_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'bahe\[ray\]'"), start(EXECUTORS["ray"]):
        pass


def test_the_local_executor_does_not_import_ray() -> None:
    code = "import sys, bahe.cli, materialize.vectors.encode; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
