"""Invariant 5: killed at any instant, the next run converges to what an undisturbed one writes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bahe_core.home import Home
from serving.lookup.online_lookup import OnlineLookup
from tests.support import REPOSITORY
from tests.support.cli import call
from tests.support.home_contents import contents, differences
from tests.support.logs import small_log, write_dataset

# A child process that kills itself with SIGKILL at the n-th call of a function.
CHILD = """
import functools, importlib, os, signal, sys
from materialize.vectors import chunks, encode
chunks.ATOMS_PER_CHUNK = encode.ATOMS_PER_COMMIT = 16
chunks.AtomicEncoder = functools.partial(chunks.AtomicEncoder, tokens_per_batch=120)
module, function, nth, *arguments = sys.argv[1:]
module, calls = importlib.import_module(module), 0
original = getattr(module, function)
def counting(*a, **k):
    global calls
    calls += 1
    if calls == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*a, **k)
setattr(module, function, counting)
from bahe import cli
cli.app(arguments)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Home, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    dataset = write_dataset(folder / "log", small_log(rows=400), tiny_backbone)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home, dataset


KILLS = [
    ("materialize.vectors.encode", "_store", 3),
    # Half a minute each.
    *(
        pytest.param(*kill, marks=pytest.mark.slow)
        for kill in [
            ("materialize.ingest.ingest", "transact", 1),
            ("materialize.frames.frame", "_write", 1),
            ("materialize.training.train", "write_report", 1),
            ("materialize.vectors.embed", "_replace", 2),
            ("materialize.release.publish", "_not_reading_back", 1),
        ]
    ),
]


@pytest.mark.parametrize(("module", "function", "nth"), KILLS)
def test_a_killed_run_is_finished_by_the_next(
    module: str, function: str, nth: int, undisturbed: tuple[Home, Path], tmp_path: Path
) -> None:
    reference, dataset = undisturbed
    home = Home.at(tmp_path / "home")
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD,
            module,
            function,
            str(nth),
            "run",
            str(dataset),
            "--home",
            str(home.root),
            "--tracker",
            "none",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    call("run", dataset, "--tracker", "none", home=home)
    assert differences(contents(home), contents(reference)) == []
    mine, theirs = (OnlineLookup(h).score("u1", list(range(25))) for h in (home, reference))
    assert [(s.item_id, pytest.approx(s.probability, abs=1e-5)) for s in mine.scores] == [
        (s.item_id, s.probability) for s in theirs.scores
    ]
    assert not list(home.root.rglob("*.part"))
