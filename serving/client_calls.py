"""The requests that a client sends: one function for each route, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from bahe_core.errors import BadInput
from serving.http.messages import (
    BehaviorAnswer,
    BehaviorRequest,
    ClicksRequest,
    ColumnsAnswer,
    FeaturesRequest,
    ImpressionsRequest,
    RecommendRequest,
    ScoreAnswer,
    ScoreBatchAnswer,
    ScoreBatchRequest,
    ScoreItemsAnswer,
    ScoreItemsRequest,
    SimilarAtomsAnswer,
    SimilarItemsAnswer,
    SimilarToTextAnswer,
    SimilarToTextRequest,
    SimilarUsersAnswer,
    TakenInAnswer,
    UserAnswer,
)

if TYPE_CHECKING:
    import pyarrow as pa

Identifier = str | int
Rows = Sequence[Mapping[str, object]]
Context = Mapping[str, str | bool | int | float | None]
UnknownUser = Literal["empty", "refuse"]
Answer = TypeVar("Answer")
Request = TypeVar("Request", bound=BaseModel)


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A request, and what it is answered with."""

    path: str
    body: BaseModel | None
    read: Callable[[bytes], Answer]
    """Of the answer's content. Raises ValueError where it is none."""
    accept: str = "application/json"

    @property
    def method(self) -> str:
        """HTTP's."""
        return "GET" if self.body is None else "POST"

    @property
    def content(self) -> str | None:
        """The body as JSON, without what was not said."""
        return None if self.body is None else self.body.model_dump_json(exclude_unset=True)


def _checked(kind: type[Request], /, **values: object) -> Request:
    """A request, without what is None. Raises BadInput, before anything is sent, where a service would."""
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise BadInput(f"{where}: {first['msg']}; correct it.") from None


def _said(rows: Rows) -> list[dict[str, object]]:
    """Rows without what is None."""
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def score(
    user_id: Identifier,
    item_ids: Sequence[Identifier],
    *,
    at: datetime | None = None,
    context: Context | None = None,
    unknown_user: UnknownUser = "empty",
) -> Call[ScoreItemsAnswer]:
    """Of `POST /v1/score`."""
    body = _checked(
        ScoreItemsRequest,
        user_id=user_id,
        item_ids=list(item_ids),
        at=at,
        context=context,
        unknown_user=unknown_user,
    )
    return Call("/v1/score", body, ScoreItemsAnswer.model_validate_json)


def score_batch(requests: Rows) -> Call[ScoreBatchAnswer]:
    """Of `POST /v1/score/batch`."""
    body = _checked(ScoreBatchRequest, requests=_said(requests))
    return Call("/v1/score/batch", body, ScoreBatchAnswer.model_validate_json)


def recommend(
    user_id: Identifier,
    k: int = 10,
    *,
    at: datetime | None = None,
    context: Context | None = None,
    include_seen: bool = False,
    unknown_user: UnknownUser = "empty",
) -> Call[ScoreAnswer]:
    """Of `POST /v1/recommend`."""
    body = _checked(
        RecommendRequest,
        user_id=user_id,
        k=k,
        at=at,
        context=context,
        include_seen=include_seen,
        unknown_user=unknown_user,
    )
    return Call("/v1/recommend", body, ScoreAnswer.model_validate_json)


def features(
    features: Sequence[str] | str,
    entities: Mapping[str, Sequence[Identifier]],
    *,
    full_feature_names: bool = False,
) -> Call[ColumnsAnswer]:
    """Of `POST /v1/features`."""
    body = _features_request(features, entities, full_feature_names)
    return Call("/v1/features", body, ColumnsAnswer.model_validate_json)


def features_table(
    features: Sequence[str] | str,
    entities: Mapping[str, Sequence[Identifier]],
    *,
    full_feature_names: bool = False,
) -> Call[pa.Table]:
    """The same as a table."""
    from serving.http.arrow_stream import ARROW, table_of  # other methods do without Arrow

    return Call("/v1/features", _features_request(features, entities, full_feature_names), table_of, ARROW)


def _features_request(
    features: Sequence[str] | str,
    entities: Mapping[str, Sequence[Identifier]],
    full_feature_names: bool,
) -> FeaturesRequest:
    return _checked(
        FeaturesRequest,
        features=None if isinstance(features, str) else list(features),
        feature_service=features if isinstance(features, str) else None,
        entities={key: list(column) for key, column in entities.items()},
        full_feature_names=full_feature_names,
    )


def behavior(
    user_id: Identifier,
    channel: str,
    text: str,
    *,
    at: datetime | None = None,
    item_id: Identifier | None = None,
    event_id: str | None = None,
) -> Call[BehaviorAnswer]:
    """Of `POST /v1/behaviors`."""
    body = _checked(
        BehaviorRequest,
        user_id=user_id,
        channel=channel,
        text=text,
        event_timestamp=at or datetime.now(UTC),
        item_id=item_id,
        event_id=event_id,
    )
    return Call("/v1/behaviors", body, BehaviorAnswer.model_validate_json)


def user(user_id: Identifier) -> Call[UserAnswer]:
    """Of `GET /v1/users`."""
    return Call(f"/v1/users/{quote(str(user_id), safe='')}", None, UserAnswer.model_validate_json)


def similar_items(item_id: Identifier, k: int) -> Call[SimilarItemsAnswer]:
    """Of `GET /v1/similar/items`."""
    return Call(
        f"/v1/similar/items/{quote(str(item_id), safe='')}?k={k:d}",
        None,
        SimilarItemsAnswer.model_validate_json,
    )


def similar_users(user_id: Identifier, k: int) -> Call[SimilarUsersAnswer]:
    """Of `GET /v1/similar/users`."""
    return Call(
        f"/v1/similar/users/{quote(str(user_id), safe='')}?k={k:d}",
        None,
        SimilarUsersAnswer.model_validate_json,
    )


def similar_atoms(atom_id: int, k: int) -> Call[SimilarAtomsAnswer]:
    """Of `GET /v1/similar/atoms`."""
    return Call(f"/v1/similar/atoms/{atom_id:d}?k={k:d}", None, SimilarAtomsAnswer.model_validate_json)


def similar_to_text(text: str, k: int) -> Call[SimilarToTextAnswer]:
    """Of `POST /v1/similar/text`."""
    return Call(
        "/v1/similar/text",
        _checked(SimilarToTextRequest, text=text, k=k),
        SimilarToTextAnswer.model_validate_json,
    )


def impressions(rows: Rows) -> Call[TakenInAnswer]:
    """Of `POST /v1/impressions`."""
    body = _checked(ImpressionsRequest, impressions=_said(rows))
    return Call("/v1/impressions", body, TakenInAnswer.model_validate_json)


def clicks(rows: Rows) -> Call[TakenInAnswer]:
    """Of `POST /v1/clicks`."""
    body = _checked(ClicksRequest, clicks=_said(rows))
    return Call("/v1/clicks", body, TakenInAnswer.model_validate_json)
