"""What the files in deploy/ say, read without Docker or a cluster."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
OF_OTHERS = {"HOME", "HF_HOME", "PATH", "PGPASSWORD", "PYTHONDONTWRITEBYTECODE", "REDIS_PASSWORD"}
"""Environment variables that are not bahe's: of Python, Hugging Face, PostgreSQL, and online_store.yaml."""


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile, its continued lines joined."""

    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """The JSON form where it has one, as CMD; otherwise the words as a shell splits them."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


def stages(dockerfile: Path) -> list[list[Instruction]]:
    """The instructions of each stage, its FROM first."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: list[list[Instruction]] = []
    for line in filter(None, text.splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, rest))
    return found


def environment(stage: list[Instruction]) -> dict[str, str]:
    """Variables that a stage sets."""
    words = [word for one in stage if one.name == "ENV" for word in one.words]
    return dict(word.split("=", 1) for word in words)


def documents(path: Path) -> list[dict[str, Any]]:
    """Of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def project() -> dict[str, Any]:
    """The section of that name in pyproject.toml."""
    facts: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return facts


def require_known(variables: set[str]) -> None:
    """Raises AssertionError on a variable that neither docs/environment.md has nor others heed."""
    page = (REPOSITORY / "docs" / "environment.md").read_text()
    assert variables <= set(re.findall(r"^\| `(BAHE_[A-Z_]+)` \|", page, re.MULTILINE)) | OF_OTHERS
