"""Building a configuration dataclass from plain values, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bahe_core.errors import BadInput

Config = TypeVar("Config")


def build(kind: type[Config], values: Mapping[str, Any], section: str) -> Config:
    """An instance of the dataclass. Raises BadInput on an unknown field or a wrong value."""
    known = getattr(kind, "__dataclass_fields__", {})
    for field in values:
        if field not in known:
            raise BadInput(f"`{section}.{field}` is not a known field; choose from {', '.join(known)}.")
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        where = f"{section}.{field}" if field else section
        raise BadInput(f"`{where}`: {first['msg'].removeprefix('Value error, ')}.") from None
