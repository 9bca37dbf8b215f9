"""`bahe train`, killed, started warm, or run by several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bahe_core.errors import BadInput
from bahe_core.home import Home
from bahe_models import Checkpoint, load
from tests.support import REPOSITORY
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset

# A child process that kills itself with SIGKILL where it would write its n-th checkpoint.
CHILD = """
import os, signal, sys
from bahe_core.files import part_of
from bahe_models.trainer.checkpoint import Checkpoint
nth, *arguments = sys.argv[1:]
original, calls = Checkpoint.save, 0
def counting(self, state):
    global calls
    calls += 1
    if calls == int(nth):
        part_of(self.path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, state)
Checkpoint.save = counting
from bahe import cli
cli.app(arguments)
"""


def child(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def versions(home: Home) -> list[str]:
    return sorted(path.name for path in home.models.iterdir())


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    """A home with everything that training needs, and no model."""
    folder = tmp_path_factory.mktemp("ready")
    training = {"epochs": 2, "impressions_per_step": 100, "checkpoint_seconds": 0}
    dataset = write_dataset(folder / "log", small_log(rows=600), tiny_backbone, training=training)
    home = Home.at(folder / "home")
    call("ingest", dataset, home=home)
    for step in ("encode", "apply", "frame"):
        call(step, home=home)
    return home


@pytest.fixture(scope="module")
def undisturbed(ready: Home, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, int]:
    """A trained home, and how many checkpoints its training wrote."""
    home = copy_of(ready, tmp_path_factory.mktemp("undisturbed"))
    return home, counted_training(home)


def counted_training(home: Home, *more: str) -> int:
    written = []
    original = Checkpoint.save

    def counting(self: Checkpoint, state: dict[str, object]) -> None:
        written.append(self.path)
        original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "save", counting)
        call("train", "--tracker", "none", *more, home=home)
    return len(written)


@pytest.mark.parametrize("nth", [pytest.param(2, marks=pytest.mark.slow), 9])
def test_a_killed_training_goes_on_where_it_stopped(
    nth: int, ready: Home, undisturbed: tuple[Home, int], tmp_path: Path
) -> None:
    reference, steps = undisturbed
    assert steps > 9
    (version,) = versions(reference)
    home = copy_of(ready, tmp_path)
    killed = child("-c", CHILD, str(nth), "train", "--tracker", "none", "--home", home.root)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert home.checkpoint(version).is_file()
    assert counted_training(home) == steps - (nth - 1)
    assert versions(home) == [version], "neither checkpoint nor .part is left"
    for name in ("model.safetensors", "item_ids.json"):
        mine, theirs = ((h.models / version / name).read_bytes() for h in (home, reference))
        assert mine == theirs, name


def test_a_warm_start_is_a_model_of_its_own(undisturbed: tuple[Home, int], tmp_path: Path) -> None:
    home = copy_of(undisturbed[0], tmp_path)
    (cold,) = versions(home)
    assert counted_training(home, "--warm-start", cold) > 0
    (warm,) = set(versions(home)) - {cold}
    assert load(home.models / warm).item_ids == load(home.models / cold).item_ids
    assert counted_training(home, "--warm-start", cold) == 0, "the same again is nothing new"
    with pytest.raises(BadInput, match=f"--warm-start bahe-none is no model.*{cold}"):
        call("train", "--warm-start", "bahe-none", home=home)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_bahe_train_runs_under_torchrun(
    more: tuple[str, ...], ready: Home, undisturbed: tuple[Home, int], tmp_path: Path
) -> None:
    home = copy_of(ready, tmp_path)
    done = child(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "bahe", "train", "--tracker", "none", "--home", home.root, *more),
    )
    assert done.returncode == 0, done.stderr
    assert versions(home) == versions(undisturbed[0])
    (version,) = versions(home)
    weights, whole = (load_file(h.models / version / "model.safetensors") for h in (home, undisturbed[0]))
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in whole.items()
    }
    assert all(value.isfinite().all() for value in weights.values())
    assert load(home.models / version).vectors_suffice
    assert done.stderr.count("report:") == 1, "one process speaks"
    assert counted_training(home) == 0


def test_a_process_alone_cannot_shard(ready: Home, tmp_path: Path) -> None:
    home = copy_of(ready, tmp_path)
    with pytest.raises(BadInput, match="start them with torchrun"):
        call("train", "--tracker", "none", "--shard", home=home)
    assert not home.models.exists() or not versions(home)
