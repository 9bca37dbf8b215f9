"""Encoding, embedding and frames on a real Ray cluster of two workers, one of which is killed at it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from feast_ducklake.offline import retrieval
from feast_ducklake.offline.sharding import ShardReader
from materialize.vectors import chunks, embed
from tests.support import REPOSITORY
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset

pytestmark = pytest.mark.slow

ON_RAY = ("--executor", "ray", "--num-actors", "2")
VECTORS = {
    "atomic_behavior_embedding": "atom_id, encoder_version",
    "user_embedding": "user_id, model_version",
    "item_embedding": "item_id, model_version",
}


def vectors(home: Home, table: str) -> np.ndarray:
    with lake(home) as connection:
        rows = connection.execute(f"SELECT embedding FROM {table} ORDER BY {VECTORS[table]}").fetchall()
    return np.array([row[0] for row in rows])


def frame_of(home: Home) -> pa.Table:
    (path,) = home.frames.glob("*/frame.parquet")
    return pq.read_table(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Iterator[Home]:
    """A home filled by the local executor, in chunks and batches small enough to share out."""
    folder = tmp_path_factory.mktemp("ray")
    dataset = write_dataset(folder / "log", small_log(rows=400), tiny_backbone)
    home = Home.at(folder / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ATOMS_PER_CHUNK", 8)
        patch.setattr(embed, "USERS_PER_BATCH", 5)
        call("ingest", str(dataset), home=home)
        for job in ("encode", "apply", "frame"):
            call(job, home=home)
        call("train", "--tracker", "none", home=home)
        call("embed", home=home)
        yield home


@pytest.fixture
def copy(reference: Home, tmp_path: Path, ray_cluster: None) -> Home:
    return copy_of(reference, tmp_path)


def die_once(marker: Path) -> None:
    """Kill the process the second time that it comes here, if none was killed before."""
    mine = marker.with_name(f"{marker.name}.{os.getpid()}")
    if mine.exists() and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    mine.touch()


def mortal(make: Callable[..., Callable[[Any], Any]], marker: Path) -> Callable[..., Callable[[Any], Any]]:
    """`make` whose work kills the first worker that comes to its second task."""

    def made(*arguments: Any) -> Callable[[Any], Any]:
        work = make(*arguments)

        def dying(task: Any) -> Any:
            die_once(marker)
            return work(task)

        return dying

    return made


def test_encoding_survives_a_killed_actor(
    copy: Home, reference: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lake(copy) as connection:
        commit(connection, ["DELETE FROM atomic_behavior_embedding"])
    marker = tmp_path / "killed"
    monkeypatch.setattr(chunks, "_encode_chunk", mortal(chunks._encode_chunk, marker))
    call("encode", *ON_RAY, home=copy)
    assert marker.exists(), "no actor was killed"
    table = "atomic_behavior_embedding"
    np.testing.assert_allclose(vectors(copy, table), vectors(reference, table), atol=1e-5)
    call("encode", *ON_RAY, home=copy)  # nothing is new
    assert len(vectors(copy, table)) == len(vectors(reference, table))


def test_embedding_survives_a_killed_actor(
    copy: Home, reference: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lake(copy) as connection:
        # Without a last run everyone is asked about.
        emptied = ("user_embedding", "item_embedding", "runs WHERE job = 'embed'")
        commit(connection, [f"DELETE FROM {rows}" for rows in emptied])
    marker = tmp_path / "killed"
    monkeypatch.setattr(embed, "user_embedder", mortal(embed.user_embedder, marker))
    call("embed", *ON_RAY, home=copy)
    assert marker.exists(), "no actor was killed"
    for table in ("user_embedding", "item_embedding"):
        np.testing.assert_allclose(vectors(copy, table), vectors(reference, table), atol=1e-5)


class MortalShardReader(ShardReader):
    """Kills its process once, in the middle of a shard."""

    def __call__(self, index: int) -> Iterator[pa.RecordBatch]:
        for batch in super().__call__(index):
            for start in range(0, batch.num_rows, 20):
                die_once(self.home.root / "killed")
                yield batch.slice(start, 20)


@pytest.mark.parametrize("freshness", ["live", "nightly"])
def test_a_frame_in_shards_is_the_frame(
    freshness: str, copy: Home, reference: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = (copy.root / "dataset.yaml").read_text()
    (copy.root / "dataset.yaml").write_text(spec.replace("freshness: live", f"freshness: {freshness}"))
    shutil.rmtree(copy.frames)
    call("frame", home=copy)
    expected = frame_of(copy)
    if freshness == "live":
        assert expected.equals(frame_of(reference))
    shutil.rmtree(copy.frames)
    monkeypatch.setattr(retrieval, "ShardReader", MortalShardReader)
    call("frame", *ON_RAY, home=copy)
    assert (copy.root / "killed").exists(), "no worker was killed"
    assert frame_of(copy).equals(expected)
    assert frame_of(copy)["event_timestamp"].to_pylist() == sorted(expected["event_timestamp"].to_pylist())


# A driver that kills itself with SIGKILL at its third commit of vectors.
DRIVER = """
import os, signal, sys
from materialize.vectors import chunks, encode
chunks.ATOMS_PER_CHUNK = encode.ATOMS_PER_COMMIT = 8
store, calls = encode._store, 0
def counting(*arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    store(*arguments)
encode._store = counting
from bahe import cli
cli.app(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_driver_loses_one_batch_and_leaves_nothing_running(
    copy: Home, reference: Home, tmp_path: Path
) -> None:
    with lake(copy) as connection:
        commit(connection, ["DELETE FROM atomic_behavior_embedding"])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "encode", "--home", str(copy.root), *ON_RAY],
        cwd=REPOSITORY,
        # Ray's agents first try to tell the cluster's head, which is gone, that they end: 60 s by default.
        env=os.environ
        | {"BAHE_TEST_DRIVER": str(tmp_path), "RAY_gcs_rpc_server_reconnect_timeout_s": "10"},
        stderr=subprocess.PIPE,
    )
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors.decode()
    table = "atomic_behavior_embedding"
    done = len(vectors(copy, table))
    assert 0 < done < len(vectors(reference, table))
    psutil.wait_procs(list(processes_of(str(tmp_path))), timeout=180)
    assert not list(processes_of(str(tmp_path)))
    call("encode", home=copy)
    np.testing.assert_allclose(vectors(copy, table), vectors(reference, table), atol=1e-5)


def processes_of(mark: str) -> Iterator[psutil.Process]:
    """Those that were started by the driver, however they are related to it now."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("BAHE_TEST_DRIVER") == mark:
                yield process
        except psutil.Error:
            continue
