"""Warnings of dependencies that are not for a user to act on, by category and package; others are shown."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TextIO

SILENCED: tuple[tuple[type[Warning], str], ...] = (
    # Changes that a package announces to itself or that another one's version brings about. Python hides
    # them by default, but Feast shows all once it is imported.
    (DeprecationWarning, "alembic"),
    (DeprecationWarning, "feast"),
    (DeprecationWarning, "google"),
    (DeprecationWarning, "great_expectations"),
    (DeprecationWarning, "marshmallow"),
    (DeprecationWarning, "mlflow"),  # SQLAlchemy's SADeprecationWarning among them
    (DeprecationWarning, "pandas"),
    (DeprecationWarning, "pydantic"),
    (DeprecationWarning, "ray"),
    (DeprecationWarning, "sqlalchemy"),
    (DeprecationWarning, "torch"),
    (DeprecationWarning, "transformers"),
    (FutureWarning, "mlflow"),  # its file store is to go; ours is in SQLite
    (FutureWarning, "ray"),
    (FutureWarning, "torch"),
    (FutureWarning, "transformers"),
    (RuntimeWarning, "feast"),  # "... is an experimental feature"
    (UserWarning, "feast"),
)


def silence_dependencies() -> None:
    """Show no warning that is in `SILENCED`.

    By the hook that shows warnings, not by a filter: Feast puts filters of its own before every other one
    whenever one of its modules is imported.
    """
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not silenced(category, filename):
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def silenced(category: type[Warning], filename: str) -> bool:
    """Whether a warning of this category, from this file, is one of `SILENCED`."""
    parts = Path(filename).parts
    if "site-packages" not in parts:
        return False
    package = parts[parts.index("site-packages") + 1]
    return any(issubclass(category, kind) and package == name for kind, name in SILENCED)
