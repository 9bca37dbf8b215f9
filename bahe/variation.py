"""A project with other settings, to see what they would change."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bahe_core.errors import BadInput

if TYPE_CHECKING:
    from bahe.project import Project

_LEFT_BEHIND = ("models", "mlflow", "reports", "online.db")


@contextmanager
def with_settings(project: Project, **sections: Any) -> Iterator[Project]:
    """A copy of the project, without its models, whose dataset.yaml has other sections; gone afterwards.

    Its log stays what it was, so the sections must be of what comes after ingest: `freshness`, `features`,
    `model`, `training` … Raises BadInput when the lake is not in the home, since a copy would write to it.
    """
    from bahe.project import open as open_project

    if project.home.lake.postgres or not project.home.lake.moves:
        raise BadInput(f"the lake of {project.home.root} lies elsewhere, so that no copy can be tried out.")
    with tempfile.TemporaryDirectory(prefix="bahe-variation-") as temporary:
        copy = Path(temporary) / "home"
        shutil.copytree(project.home.root, copy, ignore=shutil.ignore_patterns(*_LEFT_BEHIND))
        settings = yaml.safe_load((copy / "dataset.yaml").read_text())
        (copy / "dataset.yaml").write_text(yaml.safe_dump(settings | sections, sort_keys=False))
        yield open_project(copy)
