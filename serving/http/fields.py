"""Fields of requests of the HTTP API, with their limits."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    GetPydanticSchema,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError, core_schema

IDS = 10_000
"""Items of one request to be scored, of all its users together."""
ROWS = 1_000
"""Entities of one request of features, or users of one of scores."""
FEATURES = 200
"""References of one request of features."""
PUSHED = 1_000
"""Impressions or clicks of one request."""
K = 1_000
"""Recommendations, or items, users or behaviors like one, of one request."""
SOUGHT = 1_000
"""Characters of a text that is searched for."""

_YEAR_FIRST = re.compile(r"\d{4}-", re.ASCII)


def _one_refusal(sentence: str) -> GetPydanticSchema:
    """What is wrong with a value of several types: else the first type's complaint would stand for all."""
    return GetPydanticSchema(
        lambda source, handler: core_schema.custom_error_schema(
            handler(source), custom_error_type="not_of_its_types", custom_error_message=sentence
        )
    )


def _written_out(value: Any) -> Any:
    """Raises on a time that is a number: whether of seconds or milliseconds would have to be guessed."""
    if isinstance(value, datetime) or (isinstance(value, str) and _YEAR_FIRST.match(value)):
        return value
    raise PydanticCustomError("no_moment", "give a time in ISO 8601, as 2026-05-01T12:00:00Z")


Id = Annotated[
    Annotated[StrictStr, Field(min_length=1, max_length=256)]
    | Annotated[StrictInt, Field(ge=-(2**63), lt=2**63, json_schema_extra={"format": "int64"})],
    Field(
        description='An id as the log has it; where ids are integers, 10 and "10" are, and "010" is none.'
    ),
    _one_refusal("an id is a text of 1 to 256 characters of Unicode, or an integer of 64 bits"),
]
Ids = Annotated[list[Id], Field(min_length=1, max_length=IDS)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Text = Annotated[StrictStr, Field(min_length=1, max_length=10_000)]
Moment = Annotated[datetime, BeforeValidator(_written_out)]
"""UTC unless it says otherwise."""
Context = Annotated[
    dict[
        Name,
        Annotated[
            Annotated[StrictStr, Field(max_length=1000)] | StrictBool | StrictInt | StrictFloat | None,
            _one_refusal(
                "a value of context is a text of at most 1,000 characters, a number, true, false or null"
            ),
        ],
    ],
    Field(
        max_length=100,
        default_factory=dict,
        description="Values of the model's context columns; one that is left out counts as unknown.",
    ),
]
At = Annotated[
    Moment | None,
    Field(
        description="Moment of the request (default: now; UTC unless it says otherwise). It ages features,"
        " since the time since the last impression is one. It replays nothing: what happened after it is"
        " known all the same."
    ),
]
