"""The Python interface: open a home and run its jobs; what a run and a night decide.

`bahe.open(home)` gives a project whose methods are the jobs:

    project = bahe.open(".my-shop")
    project.run("dataset.yaml")
    project.recommend(4711, k=10)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bahe.project import Project, check, open
from bahe_core.errors import (
    BadInput,
    BaheError,
    Busy,
    Damaged,
    GateFailed,
    NotReady,
    NotServable,
    NotWritable,
    UnknownEntity,
    Unreachable,
)

if TYPE_CHECKING:
    from bahe.daily import Day
    from bahe.run import PipelineRun
    from bahe.status import Status
    from bahe_lake.runs import Run
    from materialize.executors import ExecutorConfig
    from materialize.frames.frame import Frame
    from materialize.frames.frame_dataset import FrameDataset
    from materialize.ingest.check import Checked
    from materialize.ingest.ingest import Ingested
    from materialize.ingest.quarantine import Held
    from materialize.release.publish import Published
    from materialize.training.comparison import Comparison
    from materialize.training.train import TrainingOutcome
    from materialize.upkeep.compact import Compacted
    from materialize.upkeep.prune import Pruned
    from materialize.vectors.embed import Embedded
    from materialize.vectors.encode import Encoded
    from materialize.vectors.stored_atoms import Atoms
    from serving.lookup.answers import (
        Answer,
        ItemScores,
        SimilarAtoms,
        SimilarItems,
        SimilarToText,
        SimilarUsers,
        UserFeatures,
    )
    from serving.lookup.candidates import ItemsOfUser

_RESULTS = {
    "Answer": "serving.lookup.answers",
    "Atoms": "materialize.vectors.stored_atoms",
    "Checked": "materialize.ingest.check",
    "Compacted": "materialize.upkeep.compact",
    "Comparison": "materialize.training.comparison",
    "Day": "bahe.daily",
    "Embedded": "materialize.vectors.embed",
    "Encoded": "materialize.vectors.encode",
    "ExecutorConfig": "materialize.executors",
    "Frame": "materialize.frames.frame",
    "FrameDataset": "materialize.frames.frame_dataset",
    "Held": "materialize.ingest.quarantine",
    "Ingested": "materialize.ingest.ingest",
    "ItemScores": "serving.lookup.answers",
    "ItemsOfUser": "serving.lookup.candidates",
    "PipelineRun": "bahe.run",
    "Pruned": "materialize.upkeep.prune",
    "Published": "materialize.release.publish",
    "Run": "bahe_lake.runs",
    "SimilarAtoms": "serving.lookup.answers",
    "SimilarItems": "serving.lookup.answers",
    "SimilarToText": "serving.lookup.answers",
    "SimilarUsers": "serving.lookup.answers",
    "Status": "bahe.status",
    "TrainingOutcome": "materialize.training.train",
    "UserFeatures": "serving.lookup.answers",
}
"""What the jobs take and return, imported when asked for: `import bahe` loads neither torch nor DuckDB nor
Feast."""

__all__ = [
    "Answer",
    "Atoms",
    "BadInput",
    "BaheError",
    "Busy",
    "Checked",
    "Compacted",
    "Comparison",
    "Damaged",
    "Day",
    "Embedded",
    "Encoded",
    "ExecutorConfig",
    "Frame",
    "FrameDataset",
    "GateFailed",
    "Held",
    "Ingested",
    "ItemScores",
    "ItemsOfUser",
    "NotReady",
    "NotServable",
    "NotWritable",
    "PipelineRun",
    "Project",
    "Pruned",
    "Published",
    "Run",
    "SimilarAtoms",
    "SimilarItems",
    "SimilarToText",
    "SimilarUsers",
    "Status",
    "TrainingOutcome",
    "UnknownEntity",
    "Unreachable",
    "UserFeatures",
    "__version__",
    "check",
    "open",
]


if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _RESULTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_RESULTS[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bahe")
    except PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"
