"""A process that is forked for every `bahe` command, so that imports are paid for once.

python -c 'from tests.support.nights import main; main()' FOLDER DATASET: kills a daily run in every
step and lets it finish, with JSON logs, then starts two at once. Leaves what was seen in FOLDER/seen.json.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from validation import gates
from validation.checks import Check
from validation.measure import Finding

# Imported before any fork; none of them starts a thread.
MODULES = (
    "feast",
    "feature_repo.definitions",
    "great_expectations",
    "great_expectations.expectations.core",
    "feast_ducklake.engine",
    "feast_ducklake.online.sqlite",
    "torch._dynamo",  # by torch's optimisers
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "sklearn.metrics",
    "pandas",
    "materialize.ingest.ingest",
    "materialize.vectors.encode",
    "materialize.frames.frame",
    "materialize.training.train",
    "materialize.release.quality",
    "materialize.vectors.embed",
    "materialize.release.publish",
    "bahe.daily",
)
KILLS = [
    ("ingest", "materialize.ingest.ingest", "transact", 1),
    ("encode", "materialize.vectors.encode", "_store", 2),
    ("frame", "materialize.frames.frame", "_write", 1),
    ("train", "materialize.training.train", "write_report", 1),
    ("embed", "materialize.vectors.embed", "_replace", 2),
    # The pointer is flipped, and the lake not told.
    ("publish", "materialize.release.pointer", "commit", 1),
    ("after", "bahe.daily", "_finish", 1),
]


def main() -> None:
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, which cli.main comes before
    from bahe import cli

    for module in MODULES:
        importlib.import_module(module)
    encode = importlib.import_module("materialize.vectors.encode")
    encode.ATOMS_PER_COMMIT = 16  # type: ignore[attr-defined]
    chunks = importlib.import_module("materialize.vectors.chunks")
    chunks.ATOMS_PER_CHUNK = 16  # type: ignore[attr-defined]
    chunks.AtomicEncoder = functools.partial(chunks.AtomicEncoder, tokens_per_batch=120)  # type: ignore
    folder, dataset = Path(sys.argv[1]), sys.argv[2]
    # Great Expectations imports most of itself when it is first used.
    check = Check(table="t", column="c", rule="r", source="t", counted="true", why="")
    gates._judge("none", [Finding(check=check, count=0, outcome="")], folder / "none")
    home = folder / "home"
    manifest = home / "daily" / "2024-04-01.json"

    def command(*more: str, form: str = "text") -> list[str]:
        return ["bahe", "--log-format", form, "daily", *more, "--tracker", "none", "--home", str(home)]

    def start(arguments: list[str], log: str, prepare: Callable[[], None]) -> int:
        process = os.fork()
        if process:
            return process
        os.dup2(os.open(folder / f"{log}.err", os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open(folder / f"{log}.out", os.O_CREAT | os.O_WRONLY), 1)
        code = 70
        try:
            prepare()
            sys.argv = arguments
            cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def ended(process: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    seen: dict[str, object] = {}
    first_day = ["--date", "2024-04-01"]
    for name, module, function, nth in KILLS:
        kill = functools.partial(
            at_call, module, function, nth, lambda: os.kill(os.getpid(), signal.SIGKILL)
        )
        code = ended(start(command(dataset, *first_day, form="json"), name, kill))
        seen[name] = {"code": code, "manifest": json.loads(manifest.read_text())}
    last = start(command(dataset, *first_day, form="json"), "last", lambda: None)
    seen["last"] = {"code": ended(last), "manifest": json.loads(manifest.read_text())}
    again = start(command(*first_day), "again", lambda: None)
    seen["again"] = {"code": ended(again), "manifest": json.loads(manifest.read_text())}

    # Two at once: one stops within its first step until it is told to go on.
    shutil.copytree(home, folder / "before_two")
    here, there = os.pipe(), os.pipe()

    def meet() -> None:
        os.write(here[1], b"!")
        os.read(there[0], 1)

    second_day = ["--date", "2024-04-02", "--retrain", "never"]
    one = start(
        command(*second_day),
        "one",
        functools.partial(at_call, "bahe.daily", "_take", 1, meet),
    )
    os.read(here[0], 1)
    refused = start(command(*second_day), "refused", lambda: None)
    seen["refused"] = ended(refused)

    def go_on() -> None:  # when the other one is known to wait
        os.write(there[1], b"!")

    waiting = start(
        command(*second_day, "--wait", "600"),
        "waiting",
        functools.partial(at_call, "bahe.daily", "say", 1, go_on),
    )
    seen["one"], seen["waiting"] = ended(one), ended(waiting)
    (folder / "seen.json").write_text(json.dumps(seen))


def at_call(module_name: str, function: str, nth: int, act: Callable[[], None]) -> None:
    """Let something happen just before the n-th call of a function."""
    module, calls = importlib.import_module(module_name), 0
    original = getattr(module, function)

    def counting(*given: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            act()
        return original(*given, **named)

    setattr(module, function, counting)
