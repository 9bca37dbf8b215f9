"""Where a training run is logged: MLflow's local store, TensorBoard's files, or nowhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from bahe_core.errors import NotReady
from bahe_core.home import Home
from bahe_models import Epoch

Tracker = Literal["mlflow", "tensorboard", "none"]


class Log:
    """Logs nothing; the base of those that do."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Settings of the run."""

    def epoch(self, row: Epoch) -> None:
        """One epoch of BAHE."""

    def results(self, rows: list[dict[str, Any]]) -> None:
        """The results table."""

    def files(self, paths: list[Path]) -> None:
        """Artifact folder and report."""


_set_here: str | None = None
"""The last home's store: MLflow puts what it is told into the environment, where another home of this
process would take it for the user's choice."""

# What the results table says beside the quality of a model on a split.
_NOT_QUALITY = ("model", "split", "train_seconds", "peak_memory_mb")


def _quality(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row; trackers hold numbers only, so an undefined metric is not there."""
    return {name: v for name, v in row.items() if name not in _NOT_QUALITY and v is not None}


class _MlflowLog(Log):
    def parameters(self, values: Mapping[str, Any]) -> None:
        import mlflow

        mlflow.log_params(dict(values))

    def epoch(self, row: Epoch) -> None:
        import mlflow

        values = {k: float(v) for k, v in asdict(row).items() if k != "epoch"}
        mlflow.log_metrics(values, step=row.epoch)

    def results(self, rows: list[dict[str, Any]]) -> None:
        import mlflow

        for row in rows:
            for metric, value in _quality(row).items():
                mlflow.log_metric(f"{row['split']}_{metric}_{row['model']}", value)
            mlflow.log_metric(f"train_seconds_{row['model']}", row["train_seconds"])

    def files(self, paths: list[Path]) -> None:
        import mlflow

        for path in paths:
            if path.is_dir():
                mlflow.log_artifacts(str(path), artifact_path=path.name)
            else:
                mlflow.log_artifact(str(path))


class _TensorboardLog(Log):
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise NotReady(
                "--tracker tensorboard needs the package tensorboard; install it with"
                " `pip install 'bahe[tensorboard]'`."
            ) from None
        self.writer: Any = SummaryWriter(str(folder))

    def parameters(self, values: Mapping[str, Any]) -> None:
        lines = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{lines}")

    def epoch(self, row: Epoch) -> None:
        for name, value in asdict(row).items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row.epoch)

    def results(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for metric, value in _quality(row).items():
                self.writer.add_scalar(f"{row['split']}_{metric}/{row['model']}", value)


@contextmanager
def run(home: Home, tracker: Tracker, experiment: str, name: str) -> Iterator[Log]:
    """A tracked run. MLFLOW_TRACKING_URI, when set, names another store than the home's own.

    Raises NotReady when the tracker's package is not installed.
    """
    if tracker == "none":
        yield Log()
        return
    if tracker == "tensorboard":
        log = _TensorboardLog(home.tensorboard / name)
        try:
            yield log
        finally:
            log.writer.close()
        return
    import os

    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    global _set_here
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri != _set_here:
        mlflow.set_tracking_uri(uri)  # it may have been told of another before
    else:
        _set_here = f"sqlite:///{home.tracking / 'mlflow.db'}"
        mlflow.set_tracking_uri(_set_here)
        if mlflow.get_experiment_by_name(experiment) is None:
            where = (home.tracking / "artifacts").as_uri()
            mlflow.create_experiment(experiment, artifact_location=where)
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name=name, log_system_metrics=False):
        yield _MlflowLog()
