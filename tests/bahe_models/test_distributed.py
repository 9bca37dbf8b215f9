"""N processes take the steps that one would take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bahe_core.errors import BadInput
from bahe_models.config import POSITIONS_PER_PASS
from bahe_models.trainer.distributed import Processes
from bahe_models.trainer.sharding import shard
from tests.support import REPOSITORY
from tests.support.toy import CPU, toy_batches, toy_data

# Run by torchrun, or alone: trains the toy model and leaves the first process's weights and history.
CHILD = """
import sys, torch
from pathlib import Path
from bahe_models import Checkpoint, train
from bahe_models.trainer.distributed import processes
from bahe_models.trainer.training_loop import seeded
from bahe_models.trainer.sharding import gathered, shard
from tests.support.toy import CPU, toy_batches, toy_config, toy_data

backbone, out, stop, mode = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
positions = int(sys.argv[5])
updates = 0
def on_step(impressions, loss):
    global updates
    updates += 1
    if updates == stop:
        raise KeyboardInterrupt

with processes(CPU) as here, seeded(0):
    # Some steps hold one user alone, so that a process gets no rows.
    config = toy_config(
        epochs=2,
        impressions_per_step=40,
        accumulate=2,
        negative_rate=0.8,
        positions_per_pass=positions,
    )
    batches = toy_batches(toy_data(), backbone, dropout=0.0, item_id_dropout=0.0)
    model, left = batches.model, {}
    if mode == "shard":
        whole = sum(p.numel() for p in model.aggregator.deep.parameters())
        shard(model, CPU)
        mine = sum(p.to_local().numel() for p in model.aggregator.deep.parameters())
        left["share"] = mine / whole
    left["before"] = torch.from_numpy(batches.predict(batches.data.splits["test"]))
    try:
        trained = train(batches, config, checkpoint=Checkpoint(out / "c", "toy"), on_step=on_step)
    except KeyboardInterrupt:
        sys.exit(0)
    scores = batches.predict(batches.data.splits["test"])
    history = [(row.train_loss, row.validation_auc) for row in trained.history]
    if mode == "shard":
        model = gathered(model)
    left |= {"weights": model.state_dict(), "history": history, "scores": torch.from_numpy(scores)}
    torch.save(left, out / f"{here.rank}.pt")
"""


def launch(
    folder: Path,
    backbone: Path,
    processes: int,
    stop: int = 0,
    mode: str = "whole",
    positions: int = POSITIONS_PER_PASS,
) -> list[dict[str, object]]:
    folder.mkdir(exist_ok=True)
    child = folder / "child.py"
    child.write_text(CHILD)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [
            sys.executable,
            *(start if processes > 1 else []),
            child,
            backbone,
            folder,
            *map(str, (stop, mode, positions)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(path) for path in sorted(folder.glob("[0-9].pt"))]


@pytest.fixture(scope="module")
def alone(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What one process leaves."""
    (left,) = launch(tmp_path_factory.mktemp("distributed") / "one", tiny_backbone, 1)
    return left


def assert_same(other: dict[str, object], alone: dict[str, object]) -> None:
    torch.testing.assert_close(other["weights"], alone["weights"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(other["history"], alone["history"], atol=1e-4)  # type: ignore[arg-type]
    for scores in ("before", "scores"):
        torch.testing.assert_close(other[scores], alone[scores], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_end_as_one(alone: dict[str, object], tiny_backbone: Path, tmp_path: Path) -> None:
    together = launch(tmp_path / "two", tiny_backbone, 2)
    assert len(together) == 2
    for other in together:
        assert_same(other, alone)
    first, second = together
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)

    # Stopped and resumed, they end as they did undisturbed.
    assert launch(tmp_path / "again", tiny_backbone, 2, stop=11) == []
    resumed = launch(tmp_path / "again", tiny_backbone, 2)
    torch.testing.assert_close(resumed[0]["weights"], first["weights"], rtol=0, atol=0)
    assert resumed[0]["history"] == first["history"]


@pytest.mark.slow
def test_two_processes_that_share_a_backbone_end_as_one(
    alone: dict[str, object], tiny_backbone: Path, tmp_path: Path
) -> None:
    together = launch(tmp_path / "two", tiny_backbone, 2, mode="shard")
    assert len(together) == 2
    for other in together:
        assert_same(other, alone)
        assert other["share"] == pytest.approx(0.5)
    first = together[0]

    # Stopped and resumed, they end as they did undisturbed; and a process may hold all from then on.
    assert launch(tmp_path / "again", tiny_backbone, 2, stop=11, mode="shard") == []
    shutil.copytree(tmp_path / "again", tmp_path / "whole")
    resumed = launch(tmp_path / "again", tiny_backbone, 2, mode="shard")
    torch.testing.assert_close(resumed[0]["weights"], first["weights"], rtol=0, atol=0)
    assert resumed[0]["history"] == first["history"]
    assert_same(launch(tmp_path / "whole", tiny_backbone, 2)[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "shard"])
def test_two_processes_whose_shares_take_unlike_numbers_of_passes_end_as_one(
    mode: str, alone: dict[str, object], tiny_backbone: Path, tmp_path: Path
) -> None:
    # A user reads up to 26 positions, so that most passes hold a user or a part of one.
    together = launch(tmp_path / "two", tiny_backbone, 2, mode=mode, positions=20)
    for other in together:
        assert_same(other, alone)


def test_one_process_cannot_share_a_backbone(tiny_backbone: Path) -> None:
    with pytest.raises(BadInput, match="start them with torchrun"):
        shard(toy_batches(toy_data(), tiny_backbone).model, CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_make_up_the_step_and_hold_whole_users(size: int) -> None:
    rng = np.random.default_rng(size)
    user = np.repeat(rng.permutation(40), rng.integers(1, 30, 40))
    rows = np.arange(len(user))[np.argsort(user, kind="stable")][: len(user) // 2]
    shares = [Processes(rank, size).share(rows, user) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(shares), rows)
    for i, share in enumerate(shares):
        for other in shares[i + 1 :]:
            assert not set(user[share]) & set(user[other])
    assert max(map(len, shares)) <= len(rows) / size + 30
    one_user = rows[user[rows] == user[rows[0]]]
    assert sum(len(Processes(rank, size).share(one_user, user)) > 0 for rank in range(size)) == 1
