"""Train models beside each other on the latest frame, and tell which is better and whether that is chance.

What a model predicted is kept by what it depends on, so that a killed comparison goes on where it was, and
a model that is added is all that is trained.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bahe_core.errors import BadInput, Busy
from bahe_core.files import replace_atomically
from bahe_core.home import Home
from bahe_core.machine import device
from bahe_core.progress import say
from bahe_lake.connection import lake
from bahe_models import Checkpoint, auc, fit_dense
from bahe_models.trainer.ctr_training import require_fit
from materialize.config.dataset import Dataset, home_dataset, load_dataset
from materialize.frames.frame import latest_frame
from materialize.gate import require_gates
from materialize.training.comparison import Compared, Comparison, compared, findings, segments_of
from materialize.training.comparison_report import write_comparison
from materialize.training.contenders import BAHE, Contender, Fit, Scene, contenders
from materialize.training.train import backbone_of
from materialize.training.train_with_baselines import EVALUATED
from materialize.training.training_data import read_training_data
from materialize.vectors.stored_atoms import current_encoder

_FORMAT = 2
"""Of what is kept of a model: raised when a peer's own settings change, so that it is trained again."""


def compare(
    home: Home,
    *,
    models: Sequence[str] | None = None,
    variants: Sequence[str] = (),
    seeds: int = 3,
    test: bool = False,
    device_name: str | None = None,
) -> Comparison:
    """Train these models with so many seeds; compare them on validation, with `test` on the test split too.

    `models` are names of `contenders.TITLES`, all that differ when None; `variants` are settings of BAHE,
    each a model of its own, such as `model.deep=true training.epochs=6`. The others are compared with
    `bahe`, or where that is not among them with the first that is one of BAHE, else the first. Raises
    BadInput on unknown names and settings, NotReady before `frame`, Busy while another comparison runs on
    the home.
    """
    where = device(device_name)
    dataset, frame = home_dataset(home), latest_frame(home)
    chosen = _asked_for(dataset, models, variants, seeds)
    first = dataset.training.seed
    with _exclusive(home):
        with lake(home) as connection:
            require_gates(connection, "embed")
            encoder = current_encoder(connection, home)
            data = read_training_data(connection, frame, encoder, dataset.channels)
            backbone, halves = backbone_of(connection, dataset, encoder)
        for contender in chosen:
            if contender.is_bahe and contender.settings.model.deep:
                require_fit(halves.deep, data, contender.settings.window)
        del halves
        scene = Scene(data, fit_dense(data), backbone, encoder, where)
        runs = [
            (one, seed) for one in chosen for seed in range(first, first + (seeds if one.is_random else 1))
        ]
        kept = [
            _Kept(home, frame.frame_id, [encoder, *one.with_seed(seed).identity(backbone)])
            for one, seed in runs
        ]
        _forget(home)
        fits: dict[str, list[Fit]] = {}
        for place, ((one, seed), store) in enumerate(zip(runs, kept, strict=True), 1):
            named = one.title + (f", seed {seed}" if one.is_random and seeds > 1 else "")
            say(f"[bold]{named}[/bold] ({place} of {len(runs)})")
            fit = store.read()
            if fit is None:
                fit = one.with_seed(seed).train(scene, store.checkpoint)
                store.write(fit)
                done = f"{fit.seconds:.1f} s"
            else:
                done = "trained before"
            reached = auc(data.splits["validation"].clicked_N, fit.logits["validation"])
            say(
                f"  validation AUC {reached:.4f}, {done}", model=one.name, seed=seed, validation_auc=reached
            )
            fits.setdefault(one.name, []).append(fit)
        names = EVALUATED if test else EVALUATED[:1]
        reference = min(chosen, key=lambda one: (one.name != BAHE, not one.is_bahe)).name
        titles = {one.name: one.title for one in chosen}
        rows = compared(data, names, fits, titles, reference)
        said = findings(rows, chosen, reference)
        segments = {
            name: {segment: len(at) for segment, at in segments_of(data, data.splits[name]).items()}
            for name in names
        }
        freshness = frame.facts.get("freshness", "live")
        page = home.reports / "comparison.html"
        write_comparison(page, dataset.name, frame.frame_id, freshness, rows, segments, said)
        table = page.with_suffix(".json")
        about = {
            "dataset": dataset.name,
            "reference": reference,
            "frame_id": frame.frame_id,
            "freshness": freshness,
            "encoder_version": encoder,
            "segments": segments,
        }
        _write_json(table, about, rows, said)
    return Comparison(
        reference=titles[reference],
        rows=rows,
        segments=segments,
        findings=said,
        report=page,
        data=table,
    )


def check_asked(dataset: Path, models: Sequence[str] | None, variants: Sequence[str], seeds: int) -> None:
    """Raises BadInput as `compare` does on a dataset.yaml, without reading a log."""
    _asked_for(load_dataset(dataset), models, variants, seeds)


def _asked_for(
    dataset: Dataset, models: Sequence[str] | None, variants: Sequence[str], seeds: int
) -> list[Contender]:
    if seeds < 1:
        raise BadInput(f"{seeds} seeds are too few; give at least 1.")
    return contenders(dataset, models, variants)


class _Kept:
    """What is kept of one model with one seed: its logits, and while it trains its checkpoint."""

    def __init__(self, home: Home, frame_id: str, identity: list[object]) -> None:
        described = json.dumps([_FORMAT, *identity]).encode()
        key = f"{frame_id}-{hashlib.sha256(described).hexdigest()[:16]}"
        self.path = home.compared / f"{key}.npz"
        self.checkpoint = Checkpoint(home.compared / f"{key}.checkpoint", key)

    def read(self) -> Fit | None:
        """None when there is nothing, or nothing whole."""
        try:
            with np.load(self.path) as stored:
                fit = Fit({name: stored[name] for name in EVALUATED}, float(stored["seconds"]))
            self.checkpoint.delete()  # a kill may have left it
            return fit
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, fit: Fit) -> None:
        with replace_atomically(self.path) as part, part.open("wb") as file:
            arrays: dict[str, Any] = {"seconds": fit.seconds, **fit.logits}
            np.savez(file, **arrays)
        self.checkpoint.delete()  # not before: a kill between the two would cost the whole training


def _forget(home: Home) -> None:
    """Delete what was kept of frames that are gone."""
    for path in home.compared.glob("*-*"):
        if not (home.frames / path.name.partition("-")[0]).exists():
            path.unlink()


@contextmanager
def _exclusive(home: Home) -> Iterator[None]:
    """One comparison at a time; other jobs go on, since it reads the lake once, at its start."""
    from filelock import FileLock, Timeout

    home.compared.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home.compared / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(f"another comparison runs on {home.root}; wait for it to end.") from None
    try:
        yield
    finally:
        lock.release()


def _write_json(path: Path, facts: dict[str, Any], rows: Sequence[Compared], said: Sequence[str]) -> None:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "when": when,
        **facts,
        "findings": list(said),
        "rows": [_without_nan(asdict(r)) for r in rows],
    }
    with replace_atomically(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """For JSON, which has no NaN: None where a metric is undefined."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
