"""What is wrong with a dataset.yaml: every problem at once, each with its line and the way out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bahe_core.errors import BadInput

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")

Place = tuple[str | int, ...]
"""The keys and list indices that lead to a value: ("training", "epochs")."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    line: int | None
    """Counted from 1; None where the file does not say it."""
    sentence: str
    """What, where and what to do, without the full stop."""


def refusal(path: Path, problems: Sequence[Problem]) -> BadInput:
    """The error that names them all, in the order of the file."""
    ordered = sorted(problems, key=lambda problem: problem.line or 0)
    lines = [
        problem.sentence if problem.line is None else f"line {problem.line}: {problem.sentence}"
        for problem in ordered
    ]
    if len(lines) == 1:
        return BadInput(f"{path}, {lines[0]}." if ordered[0].line else f"{path}: {lines[0]}.")
    listed = "".join(f"\n  {line}." for line in lines)
    return BadInput(f"{path} has {len(lines)} problems; correct them and run it again:{listed}")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The file's mapping, and the line of each key and list entry. Raises BadInput when it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise BadInput(
            f"{path} does not exist; write one (README, 'Your own log'), let `bahe init` write it, or run"
            " `bahe fetch`."
        ) from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder; name the dataset.yaml in it.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise BadInput(f"{path}{line} is not valid YAML; correct it.") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path} must hold a mapping with `name`, `behaviors`, `impressions`, `items`.")
    return raw, _lines(root)


def _lines(node: yaml.Node | None, place: Place = ()) -> dict[Place, int]:
    lines: dict[Place, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            lines[inner] = key.start_mark.line + 1
            lines |= _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*place, index)
            lines[inner] = value.start_mark.line + 1
            lines |= _lines(value, inner)
    return lines


def problems_of(model: type[BaseModel], raw: dict[str, Any], lines: dict[Place, int]) -> list[Problem]:
    """Everything that keeps `raw` from being the model, as sentences.

    Validated again without the unknown keys, which hide what else is wrong in their section.
    """
    found: dict[tuple[Place, str], Problem] = {}
    raw = copy.deepcopy(raw)
    while True:
        unknown: list[Place] = []
        try:
            model.model_validate(raw)
        except ValidationError as error:
            for one in error.errors():
                if one["loc"][-1] == "str" and isinstance(one["input"], dict):
                    continue  # of `text or rule` the rule is meant, and has errors of its own
                # A union's own members are no keys of the file.
                place = tuple(part for part in one["loc"] if part not in ("ClickRule", "str"))
                problem = Problem(line=line_of(place, lines), sentence=_sentence(one, place, model))
                found.setdefault((place, one["type"]), problem)
                if one["type"] in _UNKNOWN:
                    unknown.append(place)
        if not unknown:
            return list(found.values())
        for place in unknown:
            section: Any = raw
            for key in place[:-1]:
                section = section[key]
            section.pop(place[-1], None)


def line_of(place: Place, lines: dict[Place, int]) -> int | None:
    """The line of the key itself, or of the nearest section around it."""
    for end in range(len(place), 0, -1):
        if place[:end] in lines:
            return lines[place[:end]]
    return None


def _sentence(error: Any, place: Place, model: type[BaseModel]) -> str:
    field = ".".join(map(str, place)) or "the file"
    if error["type"] in _UNKNOWN:
        known = _fields_at(model, place[:-1])
        near = get_close_matches(str(place[-1]), known, n=1, cutoff=0.6)
        advice = f"`{near[0]}` is the nearest" if near else f"choose from {', '.join(known)}"
        return f"`{field}` is not a known field; {advice}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"`{field}` is missing; add it"
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    return f"`{field}`: {message}"


def _fields_at(model: Any, place: Place) -> list[str]:
    """Names of the fields of the section at a place."""
    kind: Any = model
    for key in place:
        kind = _inner(kind, key)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    if is_dataclass(kind):
        return [field.name for field in fields(kind)]
    return []


def _inner(kind: Any, key: str | int) -> Any:
    if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
        kind = kind.model_fields[str(key)].annotation
    elif get_origin(kind) is dict:
        kind = get_args(kind)[1]
    else:
        return None
    if get_origin(kind) in (Union, UnionType):
        return next(part for part in get_args(kind) if part not in (type(None), str))
    return kind
