"""Routes of the HTTP API that those under /v1 replace."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query

from serving.http.fields import At, Id, K
from serving.http.messages import FeaturesAnswer, ScoreAnswer, ScoreRequest
from serving.http.routes import score_answer, taking_in, user_fields
from serving.http.service import Service
from serving.live.live_lookup import LiveLookup
from serving.lookup.context import parsed_context


def deprecated(service: Service) -> APIRouter:
    """Routes that /v1 replaces."""
    router, lookup = APIRouter(deprecated=True, tags=["deprecated"]), service.lookup

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """See /readyz."""
        return await service.health()

    @router.get("/features")
    async def features(user_id: Annotated[Id, Query()]) -> FeaturesAnswer:
        """See /v1/users."""
        return FeaturesAnswer(**user_fields(await service.ask(partial(lookup.user, user_id))))

    @router.post("/score")
    async def score(request: ScoreRequest) -> ScoreAnswer:
        """See /v1/score. Here one unknown item refuses them all, and answers are best first."""
        asked = partial(
            lookup.score, request.user_id, request.item_ids, request.at, context=request.context
        )
        return score_answer(await service.ask(asked))

    @router.get("/recommend")
    async def recommend(
        user_id: Annotated[Id, Query()],
        k: Annotated[int, Query(ge=1, le=K)] = 10,
        include_seen: bool = False,
        at: At = None,
        context: Annotated[list[str] | None, Query(description="device=phone; may be repeated")] = None,
    ) -> ScoreAnswer:
        """See /v1/recommend."""
        values = parsed_context(context or ())
        asked = partial(lookup.recommend, user_id, k, at, include_seen=include_seen, context=values)
        return score_answer(await service.ask(asked))

    if isinstance(lookup, LiveLookup):
        router.post("/behaviors")(taking_in(service, lookup))
    return router
