"""Context of a request as people write it: `column=value`."""

from __future__ import annotations

from collections.abc import Sequence

from bahe_core.errors import BadInput, clipped


def parsed_context(given: Sequence[str]) -> dict[str, str]:
    """Context written as `column=value`, once each. Raises BadInput on anything else."""
    context: dict[str, str] = {}
    for one in given:
        column, equals, value = one.partition("=")
        if not equals or column in context:
            raise BadInput(f"context {clipped(one)} is refused; give each column once, as device=phone.")
        context[column] = value
    return context
