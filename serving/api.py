"""The HTTP API: health, features, score, recommend, and behaviors where the service is live."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from bahe_core.errors import BaheError, Damaged, NotReady, UnknownEntity, Unreachable
from bahe_core.home import Home
from bahe_models.context import Value
from serving.live import LiveLookup
from serving.lookup import Answer, Identifier, OnlineLookup, parsed_context
from serving.request_log import RequestLog

_STATUS = {UnknownEntity: 404, NotReady: 503, Damaged: 503, Unreachable: 503}
"""HTTP status by error; any other error of bahe's is the request's fault (400)."""


class ScoreRequest(BaseModel):
    """Which items to score for which user."""

    user_id: Identifier
    item_ids: Annotated[list[Identifier], Field(min_length=1, max_length=10_000)]
    at: datetime | None = None
    """Moment of the request; now when left out."""
    context: dict[str, Value] = Field(default_factory=dict)
    """Values of the model's context columns; one that is left out counts as unknown."""


class ScoredItem(BaseModel):
    """One item of an answer."""

    item_id: Identifier
    text: str
    probability: float


class ScoreAnswer(BaseModel):
    """Scores, best first."""

    user_id: Identifier
    model_version: str
    cold: bool
    """The user has no history; the empty state answered."""
    scores: list[ScoredItem]


class BehaviorRequest(BaseModel):
    """One thing that a user did, as a row of the log's behaviors."""

    user_id: Identifier
    channel: str
    text: str
    event_timestamp: datetime
    """UTC unless it says otherwise; not before the user's latest behavior."""
    item_id: Identifier | None = None
    """The item acted on, which is then recommended no more."""


class BehaviorAnswer(BaseModel):
    """The user after the behavior."""

    user_id: Identifier
    model_version: str
    behaviors: int


class FeaturesAnswer(BaseModel):
    """What the online store holds of a user."""

    user_id: Identifier
    model_version: str
    cold: bool
    behaviors: int
    statistics: dict[str, float | str | None]
    vectors: dict[str, list[float] | None]
    """Those of `features.vectors` that are the user's, by `view:feature`."""
    embedding: list[float]


def create_app(home: Home, *, live: bool = False, log_requests: float = 0) -> FastAPI:
    """The application for one home; `live` adds /behaviors, which needs the shallow layers in memory.

    `log_requests` is the share of users whose requests are kept for `bahe audit`. Raises NotReady before
    the first publish.
    """
    log = RequestLog(home, log_requests) if log_requests else None
    lookup = LiveLookup(home, log) if live else OnlineLookup(home, log)
    lookup.artifact(lookup.live_version())
    app = FastAPI(
        title="bahe",
        summary="Click predictions from long logs of what people do, in words.",
    )

    @app.exception_handler(BaheError)
    def refused(request: Request, error: BaheError) -> JSONResponse:
        status = _STATUS.get(type(error), 400)
        return JSONResponse({"detail": str(error)}, status_code=status)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether the store answers, and which model is live."""
        version = lookup.live_version()
        encoder = lookup.artifact(version).encoder_version
        return {"status": "ok", "model_version": version, "encoder_version": encoder}

    @app.get("/features")
    def features(user_id: Identifier) -> FeaturesAnswer:
        """A user's vector and statistics under the live model."""
        user = lookup.user(user_id)
        return FeaturesAnswer(
            user_id=user.user_id,
            model_version=user.model_version,
            cold=user.cold,
            behaviors=user.behaviors,
            statistics=user.statistics,
            vectors={
                reference: None if vector is None else vector.tolist()
                for reference, vector in user.vectors.items()
            },
            embedding=user.vector.tolist(),
        )

    @app.post("/score")
    def score(request: ScoreRequest) -> ScoreAnswer:
        """Click probabilities of the items for the user."""
        return _answer(lookup.score(request.user_id, request.item_ids, request.at, context=request.context))

    @app.get("/recommend")
    def recommend(
        user_id: Identifier,
        k: Annotated[int, Query(ge=1, le=1000)] = 10,
        include_seen: bool = False,
        at: datetime | None = None,
        context: Annotated[list[str] | None, Query(description="device=phone; may be repeated")] = None,
    ) -> ScoreAnswer:
        """The k items that the user will most likely click."""
        values = parsed_context(context or ())
        return _answer(lookup.recommend(user_id, k, at, include_seen=include_seen, context=values))

    if isinstance(lookup, LiveLookup):
        _add_behaviors(app, lookup)
    return app


def _add_behaviors(app: FastAPI, lookup: LiveLookup) -> None:
    @app.post("/behaviors")
    def behaviors(request: BehaviorRequest) -> BehaviorAnswer:
        """Take in what a user just did: until the next publish, this process answers with it."""
        user = lookup.append(
            request.user_id, request.channel, request.text, request.event_timestamp, request.item_id
        )
        return BehaviorAnswer(
            user_id=user.user_id, model_version=user.model_version, behaviors=user.behaviors
        )


def _answer(answer: Answer) -> ScoreAnswer:
    return ScoreAnswer(
        user_id=answer.user_id,
        model_version=answer.model_version,
        cold=answer.cold,
        scores=[ScoredItem(**vars(score)) for score in answer.scores],
    )
