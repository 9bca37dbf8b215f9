"""Kills, full disks and read-only folders: a disturbed job, run again, must end like any other.

A small synthetic log and a tiny language model. Each job is killed with SIGKILL at random instants of its
run and run again: every table must equal the undisturbed run's row for row (vectors to 1e-4, since another
batch size changes their last bits), and so must the frame, the model and what the online store answers.
While `publish` is killed, a reader polls the online store: it may only ever see one whole version. Full
disks are real file systems of limited size, and read-only ones real mounts, which needs root on Linux.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from bahe_core.home import Home
from bahe_core.progress import say
from benchmarks.harness import Row, main
from benchmarks.mounts import CannotMount, mount_with, mounted
from tests.support.backbone import write_backbone
from tests.support.home_contents import TOLERANCE, Contents, artifacts, contents, differences

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

JOBS = ("ingest", "encode", "frame", "train", "embed", "publish")
KILLS = (20, 3)
"""Kills of each job, full and quick."""

ROOM = ((0.0, 0.25, 0.5, 0.75), (0.25,))
"""How much of what a job adds to the home fits on the full disk, by default and with `--quick`."""


LOG = {"users": 60, "items": 40, "behaviors": 3_000, "impressions": 1_500, "atoms": 720, "days": 10}


PRELOAD = [
    "bahe.cli",
    "feature_repo.store",
    "materialize.gate",
    "materialize.ingest.ingest",
    "materialize.vectors.encode",
    "materialize.frames.frame",
    "materialize.training.train",
    "materialize.vectors.embed",
    "materialize.release.publish",
    "serving.lookup.online_lookup",
    "validation",
    "great_expectations",
    "transformers",
]

# ---- running a job


def online(home: Home) -> dict[str, np.ndarray]:
    """What the online store answers for each user: vector, statistics, and the score of every item."""
    from serving.lookup.online_lookup import OnlineLookup

    lookup, items = OnlineLookup(home), list(range(1, LOG["items"] + 1))
    answers = {}
    for user in range(1, LOG["users"] + 1):
        features = lookup.user(user)
        scores = lookup.score(user, items, datetime(2024, 2, 1, tzinfo=UTC)).scores
        by_item = sorted((int(score.item_id), score.probability) for score in scores)
        statistics = [value or 0.0 for value in features.statistics.values()]
        answers[f"{features.model_version}, user {user}"] = np.array(
            [*features.vector, *statistics, *(probability for _, probability in by_item)]
        )
    return answers


@dataclass(frozen=True)
class Ran:
    """How a job ended."""

    code: int
    """Exit code; minus the signal when it was killed."""
    seconds: float
    errors: str
    """Standard error."""


class Runner:
    """Runs jobs in separate processes, forked from one that has imported everything and done nothing."""

    def __init__(self, folder: Path) -> None:
        self._errors = folder / "stderr"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        first = self._context.Process(target=int)  # so that no job's time includes the imports
        first.start()
        first.join()

    def job(self, home: Path, *arguments: str, kill_after: float | None = None) -> Ran:
        """`bahe ARGUMENTS --home HOME`, killed after so many seconds when asked to."""
        command = [*arguments, "--home", str(home)]
        if arguments[0] == "train":
            command += ["--tracker", "none"]
        process = self._context.Process(target=_command, args=(command, self._errors))
        start = time.perf_counter()
        process.start()
        process.join(kill_after)
        if kill_after is not None and process.is_alive():
            process.kill()
        process.join()
        assert process.exitcode is not None
        return Ran(process.exitcode, time.perf_counter() - start, self._errors.read_text())

    def whole(self, home: Path, *arguments: str) -> float:
        """Seconds of a job that must succeed."""
        done = self.job(home, *arguments)
        if done.code:
            raise RuntimeError(f"bahe {' '.join(arguments)} ended with {done.code}: {done.errors[-2000:]}")
        return done.seconds

    @contextmanager
    def reading(self, home: Path, expected: Versions) -> Iterator[Readings]:
        """A reader that polls the online store throughout the block."""
        stop = self._context.Event()
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=_read_on, args=(home, expected, stop, theirs))
        process.start()
        readings = Readings()
        if not (mine.poll(120) and mine.recv() == "reading"):
            raise RuntimeError("the reader did not begin")
        try:
            yield readings
        finally:
            stop.set()
            if mine.poll(120):
                readings.count, readings.versions, readings.wrong = mine.recv()
            else:
                readings.wrong = ["the reader died"]
            process.join()


def _command(arguments: list[str], errors: Path) -> None:
    with errors.open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    from bahe import cli

    sys.argv = ["bahe", *arguments]
    cli.main()


# ---- the reader beside a publish

Versions = dict[str, dict[str, np.ndarray]]
"""User vectors of each complete version, in order of publication, by user."""


@dataclass
class Readings:
    """What a reader saw."""

    count: int = 0
    versions: tuple[str, ...] = ()
    """In the order they were seen, without immediate repetitions."""
    wrong: list[str] | None = None


def _read_on(root: Path, expected: Versions, stop: Event, answers: Any) -> None:
    from serving.lookup.online_lookup import OnlineLookup

    lookup, count, versions, wrong = OnlineLookup(Home.at(root)), 0, list[str](), list[str]()
    users = sorted(next(iter(expected.values())))
    items = list(range(1, LOG["items"] + 1))
    last = False
    while not last:
        last = stop.is_set()  # one more time after the end
        user = users[count % len(users)]
        try:
            features = lookup.user(user)
            vectors = expected.get(features.model_version)
            if vectors is None:
                wrong.append(f"{features.model_version} answers, which is not a complete version")
            elif not np.allclose(features.vector, vectors[user], rtol=0, atol=TOLERANCE):
                wrong.append(f"the vector of user {user} is not that of {features.model_version}")
            scored = lookup.score(user, items)
            if len(scored.scores) != len(items) or not all(0 < s.probability < 1 for s in scored.scores):
                wrong.append(f"{scored.model_version} does not score every item")
            if not versions or versions[-1] != features.model_version:
                versions.append(features.model_version)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        if not count:
            answers.send("reading")
        count += 1
    answers.send((count, tuple(versions), wrong))


# ---- the undisturbed run


@dataclass(frozen=True)
class Stage:
    """A job, with the home before it and the contents after it."""

    job: str
    arguments: tuple[str, ...]
    before: Path
    after: Contents
    files: dict[str, Any]
    online: dict[str, np.ndarray]
    """What the online store answers after `publish`."""
    seconds: float
    added: int
    """Bytes by which the home grew."""


def stages(folder: Path, runner: Runner) -> tuple[list[Stage], Versions]:
    """Each job once, undisturbed. `publish` publishes a second model while the first is live."""
    from bahe_lake.connection import lake
    from bahe_synth.log import synth

    log, home = folder / "log", folder / "home"
    dataset = synth(log, **LOG).dataset
    words = re.findall(r"\w+", " ".join(_texts(log)))
    write_backbone(folder / "backbone", words)
    sections = yaml.safe_load(dataset.read_text())
    sections["backbone"] = {"path": str(folder / "backbone"), "shallow_layers": 2, "deep_layers": 2}
    sections["model"] = {"deep_width": 8, "profile_width": 8, "head_width": 16}
    sections["training"] = {"epochs": 2, "impressions_per_step": 200, "checkpoint_seconds": 0.2}
    dataset.write_text(yaml.safe_dump(sections))
    second = log / "second.yaml"
    second.write_text(yaml.safe_dump({**sections, "training": {**sections["training"], "seed": 1}}))

    by_job = {}
    for job in ("ingest", "encode", "apply", "frame", "train", "embed", "publish"):
        arguments = (job, str(dataset)) if job == "ingest" else (job,)
        if job == "publish":  # the first model goes live; the stage is the publish of a second
            for more in (arguments, ("ingest", str(second)), ("train",), ("embed",)):
                runner.whole(home, *more)
        before = folder / f"before-{job}"
        if home.exists():
            shutil.copytree(home, before)
        seconds = runner.whole(home, *arguments)
        grown = _size(home) - (_size(before) if before.exists() else 0)
        opened = Home.at(home)
        answers = online(opened) if job == "publish" else {}
        by_job[job] = Stage(
            job, arguments, before, contents(opened), artifacts(opened), answers, seconds, max(grown, 0)
        )
    with lake(Home.at(home)) as connection:
        vectors: Versions = {}
        for version, user, vector in connection.execute(
            "SELECT model_version, user_id, embedding FROM user_embedding"
            " JOIN publications ON model_version = live_model_version ORDER BY publications.event_timestamp"
        ).fetchall():
            vectors.setdefault(version, {})[user] = np.array(vector, dtype=np.float32)
    assert len(vectors) == 2, "two versions, to tell one from the other"
    return [by_job[job] for job in JOBS], vectors


def _texts(log: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [
        text for table in ("behaviors", "items") for text in pq.read_table(log / table)["text"].to_pylist()
    ]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def finished(stage: Stage, home: Path, runner: Runner) -> list[str]:
    """Run the job to completion, twice, and compare with the undisturbed run."""
    for _ in range(2):
        done = runner.job(home, *stage.arguments)
        if done.code:
            return [f"the next run ended with {done.code}: {done.errors[-1500:]}"]
    opened = Home.at(home)
    wrong = differences(contents(opened), stage.after)
    files = artifacts(opened)
    if files != stage.files:
        names = sorted(n for n in files.keys() | stage.files.keys() if files.get(n) != stage.files.get(n))
        wrong.append(f"other files: {', '.join(names)}")
    wrong += [f"{path.name} was left behind" for path in opened.root.rglob("*.part")]
    if stage.online:
        answers = online(opened)
        wrong += [
            f"{who}: the answer differs"
            for who, numbers in stage.online.items()
            if who not in answers or not np.allclose(answers[who], numbers, rtol=0, atol=TOLERANCE)
        ]
    return wrong


# ---- the rows


def measure(quick: bool, _: Path) -> Iterable[Row]:
    """All rows of the benchmark."""
    os.environ.setdefault("BAHE_THREADS", "1")  # the same order of sums in every run
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' progress bars
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner = Runner(folder)
        all_stages, versions = stages(folder, runner)
        reads, torn = 0, list[str]()
        for stage in all_stages:
            say(f"killing {stage.job}, which takes {stage.seconds:.1f} s")
            wrong: list[str] = []
            landed = 0
            for kill in range(KILLS[quick]):
                home = fresh(stage, folder / "hurt")
                instant = float(rng.uniform(0, stage.seconds))
                if stage.job == "publish":
                    with runner.reading(home, versions) as readings:
                        landed += runner.job(home, *stage.arguments, kill_after=instant).code == -9
                        wrong += finished(stage, home, runner)
                    reads += readings.count
                    torn += [*(readings.wrong or []), *not_in_order(readings.versions, versions)]
                else:
                    landed += runner.job(home, *stage.arguments, kill_after=instant).code == -9
                    problems = finished(stage, home, runner)
                    wrong += [f"kill {kill} after {instant:.2f} s: {problem}" for problem in problems]
            yield verdict(f"{stage.job} killed {KILLS[quick]} times: differences after", wrong)
            yield Row(metric=f"{stage.job}: kills that met it alive", value=landed, unit="kills")
        yield Row(metric="online reads while publish was killed", value=reads, unit="reads")
        yield verdict("reads that were not of one whole version", torn)
        for stage in all_stages:
            for kind, hurt in (("full disk", full_disk), ("read-only folder", read_only)):
                yield from hurt_rows(f"{stage.job} on a {kind}", hurt, stage, folder, runner, ROOM[quick])


def not_in_order(seen: tuple[str, ...], versions: Versions) -> list[str]:
    """A reader may see the first version, then the second; at the end it must see the second."""
    first, second = versions
    if seen in ((second,), (first, second)):
        return []
    return [f"the versions that answered were, in this order, {', '.join(seen) or 'none'}"]


def fresh(stage: Stage, home: Path) -> Path:
    """A fresh copy of the home before the job."""
    shutil.rmtree(home, ignore_errors=True)
    if stage.before.exists():
        shutil.copytree(stage.before, home)
    return home


def verdict(metric: str, wrong: list[str]) -> Row:
    """How many things went wrong, which must be none; each is printed."""
    for problem in wrong:
        say(f"  {metric}: {problem}")
    return Row(metric=metric, value=len(wrong), unit="wrong", goal="= 0", holds=not wrong)


def hurt_rows(
    metric: str,
    hurt: Callable[[Stage, Path, Runner, float], tuple[list[str], bool]],
    stage: Stage,
    folder: Path,
    runner: Runner,
    rooms: tuple[float, ...],
) -> Iterable[Row]:
    """Runs that must fail with one sentence and exit code 2, or succeed all the same; then run again."""
    say(metric)
    wrong: list[str] = []
    refused = 0
    for room in rooms if hurt is full_disk else (0.0,):
        try:
            problems, failed = hurt(stage, folder / "mounted", runner, room)
        except CannotMount as error:
            say(f"  {metric} is left out: {error}")
            return
        wrong += problems
        refused += failed
    yield verdict(f"{metric}: wrong", wrong)
    yield Row(metric=f"{metric}: refused in one sentence", value=refused, unit="runs")


def one_sentence(done: Ran) -> list[str]:
    """What is wrong with the way a job failed."""
    messages = [line for line in done.errors.splitlines() if line.startswith("bahe: ")]
    if done.code == 2 and len(messages) == 1 and "Traceback" not in done.errors:
        return [] if re.search("full|written to", messages[0]) else [f"unexpected error: {messages[0]}"]
    return [f"exit code {done.code}: {done.errors[-1500:]}"]


def full_disk(stage: Stage, mount: Path, runner: Runner, room: float) -> tuple[list[str], bool]:
    """The job on a file system that fills up; then again with free space."""
    mount.mkdir(exist_ok=True)
    page = os.sysconf("SC_PAGE_SIZE")
    with mounted(["-t", "tmpfs", "-o", "size=1g", "tmpfs", str(mount)], mount):
        home = fresh(stage, mount / "home")
        usage = shutil.disk_usage(mount)
        full = (usage.used + int(room * stage.added)) // page * page + page
        mount_with(["-o", f"remount,size={full}", str(mount)])
        done = runner.job(home, *stage.arguments)
        wrong = one_sentence(done) if done.code else []
        mount_with(["-o", "remount,size=1g", str(mount)])
        wrong += finished(stage, home, runner)
    return wrong, done.code == 2


def read_only(stage: Stage, mount: Path, runner: Runner, _: float) -> tuple[list[str], bool]:
    """The job in a read-only folder; then again in a writable one."""
    mount.mkdir(exist_ok=True)
    home = fresh(stage, mount)
    home.mkdir(exist_ok=True)
    before = {path: path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}
    with mounted(["--bind", str(mount), str(mount)], mount):
        mount_with(["-o", "remount,bind,ro", str(mount)])
        done = runner.job(home, *stage.arguments)
    wrong = one_sentence(done)
    if before != {path: path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}:
        wrong.append("the read-only folder has changed")
    wrong += finished(stage, home, runner)
    return wrong, done.code == 2


if __name__ == "__main__":
    main("crash", __doc__ or "", measure)
