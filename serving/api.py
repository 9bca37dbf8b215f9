"""The HTTP API: its routes, and how errors become answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from bahe_core.errors import (
    BaheError,
    Busy,
    Damaged,
    NotReady,
    NotWritable,
    UnknownEntity,
    Unreachable,
    clipped,
    one_line,
    storage_problem,
)
from bahe_core.home import Home
from serving.guards import NOWHERE, Guard, Limits, Refused
from serving.keys import ApiKeys
from serving.live import Clicked, LiveLookup, Shown, TakenIn
from serving.lookup import Answer, OnlineLookup, UserFeatures, parsed_context
from serving.messages import (
    BehaviorAnswer,
    BehaviorRequest,
    ClicksRequest,
    ColumnsAnswer,
    FeastRequest,
    FeaturesAnswer,
    FeaturesRequest,
    Id,
    ImpressionsRequest,
    ItemAnswer,
    K,
    RecommendRequest,
    Refusal,
    RefusedRow,
    ScoreAnswer,
    ScoredItem,
    ScoreItemsAnswer,
    ScoreItemsRequest,
    ScoreRequest,
    SimilarItemAnswer,
    SimilarItemsAnswer,
    TakenInAnswer,
    UserAnswer,
)
from serving.metrics import Metrics
from serving.page import page
from serving.request_log import RequestLog
from serving.work import RETRY_AFTER, Work

T = TypeVar("T")

_STATUS = {
    UnknownEntity: 404,
    NotReady: 503,
    Damaged: 503,
    Unreachable: 503,
    NotWritable: 503,
    Busy: 503,
}
"""HTTP status by error; any other error of bahe's is the request's fault (400)."""

_OPEN = {"/healthz", "/readyz", "/docs", "/openapi.json"}
"""Probes, and what is the same for every service of this version."""
_SCOPES = {
    "/v1/score": "score",
    "/v1/recommend": "score",
    "/v1/features": "read",
    "/v1/behaviors": "write",
    "/v1/impressions": "write",
    "/v1/clicks": "write",
    "/get-online-features": "read",
    "/metrics": "read",
    "/health": "read",
    "/features": "read",
    "/score": "score",
    "/recommend": "score",
    "/behaviors": "write",
}
"""Scope that a path asks of an API key."""
_SCOPES_BY_PREFIX = {"/v1/users/": "read", "/v1/similar/items/": "score"}
"""Of routes whose path ends with an id."""

_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,()'\"]+/)+([^\s/:;,()'\"]*)")
"""An absolute path of files, of which an answer shows the last part."""

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal} for status in (400, 401, 403, 404, 413, 422, 503)
}


class _Service:
    """What the routes share: the lookup, and the threads that ask it."""

    def __init__(self, lookup: OnlineLookup, limits: Limits) -> None:
        self.lookup, self.metrics = lookup, Metrics()
        self._work = Work("work", threads=limits.threads, waiting=limits.waiting, seconds=limits.seconds)
        # Of its own, so that a service with much to do is still seen to be ready.
        self._probe = Work("probe", threads=1, waiting=8, seconds=min(3.0, limits.seconds))
        self.metrics.watch(lambda: self._work.admitted)

    async def ask(self, function: Callable[[], T]) -> T:
        """What the lookup says, from a thread."""
        return await self._work.run(function)

    async def write(self, function: Callable[[], T]) -> T:
        """`ask` of what is not given up because its sender went away."""
        return await asyncio.shield(asyncio.ensure_future(self.ask(function)))

    async def health(self) -> dict[str, Any]:
        """Whether the store answers, and which model is live."""

        def look() -> dict[str, Any]:
            version = self.lookup.live_version()
            encoder = self.lookup.artifact(version).encoder_version
            return {"status": "ok", "model_version": version, "encoder_version": encoder}

        return await self._probe.run(look)

    async def freshness(self) -> tuple[str, dict[str, float]]:
        """The live model, and the age in seconds of the views that it reads."""

        def look() -> tuple[str, dict[str, float]]:
            version = self.lookup.live_version()
            return version, self.lookup.freshness(version)

        return await self._probe.run(look)

    def _warm(self) -> None:
        self.lookup.items(list(self.lookup.catalogue())[:1], self.lookup.live_version())

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Reads the items, so that no request waits for it; lets go of the threads in the end."""
        with suppress(BaheError):  # then requests say so
            await self.ask(self._warm)
        yield
        self._work.close()
        self._probe.close()


def scope_of(path: str) -> str | None:
    """The scope that a route's path asks of an API key; None where it asks for no key, NOWHERE where there
    is no such route."""
    if path in _OPEN:
        return None
    by_prefix = (scope for prefix, scope in _SCOPES_BY_PREFIX.items() if path.startswith(prefix))
    return _SCOPES.get(path) or next(by_prefix, NOWHERE)


def create_app(
    home: Home,
    *,
    live: bool = False,
    log_requests: float = 0,
    limits: Limits | None = None,
    require_keys: bool = False,
) -> FastAPI:
    """The application for one home; `live` adds /v1/behaviors, /v1/impressions and /v1/clicks, which need
    the shallow layers in memory.

    `log_requests` is the share of users whose requests are kept for `bahe audit`. Once the home has an API
    key every request needs one; with `require_keys` also before. Raises NotReady before the first publish.
    """
    limits = limits or Limits()
    log = RequestLog(home, log_requests) if log_requests else None
    lookup = (LiveLookup if live else OnlineLookup)(home, log, keep_items=True)
    lookup.artifact(lookup.live_version())
    service = _Service(lookup, limits)
    app = FastAPI(
        title="bahe",
        summary="Click predictions from long logs of what people do, in words.",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
        responses=_REFUSALS,
    )
    app.add_middleware(
        Guard,
        limits=limits,
        metrics=service.metrics,
        scope_of=scope_of,
        keys=ApiKeys(home, required=require_keys),
    )
    _add_errors(app, home)
    app.include_router(_probes(service))
    app.include_router(_version_1(service))
    app.include_router(_feast(service))
    app.include_router(_deprecated(service))

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi(), clipped(str(request.base_url).rstrip("/"))))

    return app


def _add_errors(app: FastAPI, home: Home) -> None:
    def refusal(
        request: Request, status: int, detail: str, headers: dict[str, str] | None = None
    ) -> Response:
        detail = _PATH.sub(r"\1", detail.replace(str(home.root), "the home"))
        request.state.reason = detail
        answer = Refusal(detail=detail, request_id=request.state.request_id)
        return JSONResponse(answer.model_dump(), status_code=status, headers=headers)

    @app.exception_handler(BaheError)
    async def of_ours(request: Request, error: BaheError) -> Response:
        if isinstance(error, Refused):
            return refusal(request, error.status, str(error), error.headers)
        status = _STATUS.get(type(error), 400)
        return refusal(request, status, str(error), RETRY_AFTER if status == 503 else None)

    @app.exception_handler(RequestValidationError)
    async def not_as_it_should_be(request: Request, error: RequestValidationError) -> Response:
        # The first one, and without the input, which may be anything.
        first = error.errors()[0]
        where = clipped(".".join(str(part) for part in first["loc"] if part != "body") or "the body")
        return refusal(request, 422, f"{where}: {first['msg']}; correct it.")

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        return refusal(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(OSError)
    async def of_the_system(request: Request, error: OSError) -> Response:
        problem = storage_problem(error)
        if problem is None:
            raise error
        return refusal(request, 503, one_line(problem), RETRY_AFTER)


def _probes(service: _Service) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process is alive. No store is looked at: one that is away is no reason to kill it."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """Whether the store answers, and which model is live; 503 where requests would be in vain."""
        return await service.health()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Latency by route, answers by status, requests in work, age of the features: for Prometheus.

        What the store has to say is left out while it is away.
        """
        live = None
        with suppress(BaheError, OSError):
            live = await service.freshness()
        return Response(service.metrics.text(live), media_type=service.metrics.content_type)

    return router


def _version_1(service: _Service) -> APIRouter:
    router, lookup = APIRouter(prefix="/v1", tags=["v1"]), service.lookup

    @router.post("/score")
    async def score(request: ScoreItemsRequest) -> ScoreItemsAnswer:
        """Click probabilities of the items for the user, each with its status, in the order asked for."""
        found = await service.ask(
            partial(
                lookup.score_each,
                request.user_id,
                request.item_ids,
                request.at,
                context=request.context,
                unknown_user=request.unknown_user,
            )
        )
        return ScoreItemsAnswer(
            user_id=_echoed(found.user_id, found.known),
            model_version=found.model_version,
            cold=found.cold,
            items=[
                ItemAnswer(item_id=_echoed(item, False), status="unknown", probability=None)
                if probability is None
                else ItemAnswer(item_id=item, status="ok", probability=probability)
                for item, probability in zip(found.item_ids, found.probabilities, strict=True)
            ],
        )

    @router.post("/recommend")
    async def recommend(request: RecommendRequest) -> ScoreAnswer:
        """The k items that the user will most likely click, best first."""
        answer = await service.ask(
            partial(
                lookup.recommend,
                request.user_id,
                request.k,
                request.at,
                include_seen=request.include_seen,
                context=request.context,
                unknown_user=request.unknown_user,
            )
        )
        return _scores(answer)

    @router.post("/features", response_model=ColumnsAnswer)
    async def features(request: FeaturesRequest) -> Response:
        """Any features of the online store, of many entities; without what was pushed to a live service."""

        def read() -> bytes:
            version = lookup.live_version()
            columns = lookup.features(
                request.features or request.feature_service or [],
                request.entities,
                version,
                request.full_feature_names,
            )
            keys = {*request.entities, "model_version"}
            values = {name: column for name, column in columns.items() if name not in keys}
            answer = {"model_version": version, "columns": values}
            return to_json(answer, inf_nan_mode="null", bytes_mode="base64")

        return Response(await service.ask(read), media_type="application/json")

    @router.get("/users/{user_id:path}")
    async def user(user_id: Id) -> UserAnswer:
        """A user's state under the live model, with what was pushed to this service."""
        found = await service.ask(partial(lookup.user, user_id))
        return UserAnswer(**_features(found), seen_items=sorted(found.seen_items))

    @router.get("/similar/items/{item_id:path}")
    async def similar_items(item_id: Id, k: Annotated[int, Query(ge=1, le=K)] = 10) -> SimilarItemsAnswer:
        """The k items whose vectors under the live model are most alike to the item's, without itself."""
        found = await service.ask(partial(lookup.similar_items, item_id, k))
        return SimilarItemsAnswer(
            item_id=found.item_id,
            model_version=found.model_version,
            items=[SimilarItemAnswer(**vars(one)) for one in found.items],
        )

    if isinstance(lookup, LiveLookup):
        router.post("/behaviors")(_taking_in(service, lookup))
        _add_impressions(router, service, lookup)
    return router


def _add_impressions(router: APIRouter, service: _Service, lookup: LiveLookup) -> None:
    @router.post("/impressions")
    async def impressions(request: ImpressionsRequest) -> TakenInAnswer:
        """Take in what was shown: on disk before the answer, and in the statistics of every worker."""
        shown = [
            Shown(
                impression_id=row.impression_id,
                user_id=row.user_id,
                item_id=row.item_id,
                at=row.event_timestamp,
            )
            for row in request.impressions
        ]
        return _taken(service, "impressions", await service.write(partial(lookup.show, shown)))

    @router.post("/clicks")
    async def clicks(request: ClicksRequest) -> TakenInAnswer:
        """Take in what was clicked, as /v1/impressions what was shown."""
        clicked = [
            Clicked(impression_id=row.impression_id, at=row.event_timestamp) for row in request.clicks
        ]
        return _taken(service, "clicks", await service.write(partial(lookup.click, clicked)))


def _taken(service: _Service, what: str, taken: TakenIn) -> TakenInAnswer:
    service.metrics.pushed(what, taken.new)
    return TakenInAnswer(
        new=taken.new,
        known=taken.known,
        refused=[RefusedRow(row=row, detail=reason) for row, reason in taken.refused.items()],
    )


def _feast(service: _Service) -> APIRouter:
    router = APIRouter(tags=["Feast"])

    @router.post("/get-online-features", response_class=Response)
    async def get_online_features(request: FeastRequest) -> Response:
        """As `feast serve` has it, so that Feast's remote online store can read here."""

        def read() -> bytes:
            asked = request.features or request.feature_service or []
            answer = service.lookup.feast_response(asked, request.entities, request.full_feature_names)
            return to_json(answer, inf_nan_mode="null", bytes_mode="base64")

        return Response(await service.ask(read), media_type="application/json")

    return router


def _deprecated(service: _Service) -> APIRouter:
    """Routes that /v1 replaces."""
    router, lookup = APIRouter(deprecated=True, tags=["deprecated"]), service.lookup

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """See /readyz."""
        return await service.health()

    @router.get("/features")
    async def features(user_id: Annotated[Id, Query()]) -> FeaturesAnswer:
        """See /v1/users."""
        return FeaturesAnswer(**_features(await service.ask(partial(lookup.user, user_id))))

    @router.post("/score")
    async def score(request: ScoreRequest) -> ScoreAnswer:
        """See /v1/score. Here one unknown item refuses them all, and answers are best first."""
        asked = partial(
            lookup.score, request.user_id, request.item_ids, request.at, context=request.context
        )
        return _scores(await service.ask(asked))

    @router.get("/recommend")
    async def recommend(
        user_id: Annotated[Id, Query()],
        k: Annotated[int, Query(ge=1, le=K)] = 10,
        include_seen: bool = False,
        at: datetime | None = None,
        context: Annotated[list[str] | None, Query(description="device=phone; may be repeated")] = None,
    ) -> ScoreAnswer:
        """See /v1/recommend."""
        values = parsed_context(context or ())
        asked = partial(lookup.recommend, user_id, k, at, include_seen=include_seen, context=values)
        return _scores(await service.ask(asked))

    if isinstance(lookup, LiveLookup):
        router.post("/behaviors")(_taking_in(service, lookup))
    return router


def _taking_in(service: _Service, lookup: LiveLookup) -> Callable[..., Any]:
    async def behaviors(request: BehaviorRequest) -> BehaviorAnswer:
        """Take in what a user just did: on disk before the answer, and in the answers of every worker."""
        take = partial(
            lookup.append,
            request.user_id,
            request.channel,
            request.text,
            request.event_timestamp,
            request.item_id,
            event_id=request.event_id,
        )
        user = await service.write(take)
        service.metrics.pushed("behaviors")
        return BehaviorAnswer(
            user_id=user.user_id, model_version=user.model_version, behaviors=user.behaviors
        )

    return behaviors


def _features(user: UserFeatures) -> dict[str, Any]:
    return {
        "user_id": user.user_id,
        "model_version": user.model_version,
        "cold": user.cold,
        "behaviors": user.behaviors,
        "statistics": user.statistics,
        "vectors": {
            reference: None if vector is None else vector.tolist()
            for reference, vector in user.vectors.items()
        },
        "embedding": user.vector.tolist(),
    }


def _scores(answer: Answer) -> ScoreAnswer:
    return ScoreAnswer(
        user_id=_echoed(answer.user_id, answer.known),
        model_version=answer.model_version,
        cold=answer.cold,
        scores=[ScoredItem(**vars(score)) for score in answer.scores],
    )


def _echoed(identifier: str | int, known: bool) -> str | int:
    """An id as an answer has it; of one that is not known not more than any answer repeats."""
    return identifier if known or isinstance(identifier, int) else clipped(identifier)
