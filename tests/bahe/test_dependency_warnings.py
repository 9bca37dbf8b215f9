"""The command line silences the warnings that it names, and no other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from bahe.cli.dependency_warnings import silence_dependencies, silenced

INSTALLED = "/venv/lib/python3.11/site-packages"


class Announced(DeprecationWarning):
    """As SQLAlchemy's SADeprecationWarning, which MLflow brings about."""


@pytest.fixture
def shown() -> Iterator[list[str]]:
    """What a person sees, with the filters that Feast puts before all others."""
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: lines.append(str(message))
        silence_dependencies()
        warnings.simplefilter("always")
        yield lines


def warn(category: type[Warning], filename: str) -> None:
    warnings.warn_explicit("something changes", category, filename, 1)


def test_a_named_warning_is_not_shown_whatever_filters_come_later(shown: list[str]) -> None:
    warn(Announced, f"{INSTALLED}/mlflow/store/tracking/sqlalchemy_store.py")
    warn(RuntimeWarning, f"{INSTALLED}/feast/repo_config.py")
    assert shown == []


@pytest.mark.parametrize(
    ("category", "filename"),
    [
        (RuntimeWarning, f"{INSTALLED}/mlflow/tracking.py"),
        (DeprecationWarning, f"{INSTALLED}/feastlike/a.py"),
        (UserWarning, "/srv/repository/feast/definitions.py"),
        (RuntimeWarning, "/srv/repository/bahe_models/features.py"),
    ],
)
def test_other_warnings_are_shown(category: type[Warning], filename: str, shown: list[str]) -> None:
    assert not silenced(category, filename)
    warn(category, filename)
    assert shown == ["something changes"]
