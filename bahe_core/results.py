"""What a job returns: a frozen dataclass, shown as a table in a notebook."""

from __future__ import annotations

from dataclasses import fields
from html import escape
from typing import Any


class Result:
    """Base of the jobs' results, each a frozen dataclass."""

    @property
    def summary(self) -> list[str]:
        """Lines for people, printed when the job ends."""
        return []

    def _repr_html_(self) -> str:
        """A table of the fields, as Jupyter asks for it."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(_shown(getattr(self, name)))}</td></tr>"
            for name in names
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value) or "none"
    return "none" if value is None else str(value)
