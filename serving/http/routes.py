"""The routes of the HTTP API: those under /v1, and those that probes, Prometheus and Feast expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response
from pydantic_core import to_json

from bahe_core.errors import BadInput, clipped
from serving.http.arrow_stream import ARROW, stream_of
from serving.http.fields import Id, K
from serving.http.guards import Refused
from serving.http.messages import (
    BehaviorAnswer,
    BehaviorRequest,
    ClicksRequest,
    ColumnsAnswer,
    FeastAnswer,
    FeastRequest,
    FeaturesRequest,
    ImpressionsRequest,
    ItemAnswer,
    PushRequest,
    RecommendRequest,
    RefusedRow,
    ScoreAnswer,
    ScoreBatchAnswer,
    ScoreBatchRequest,
    ScoredItem,
    ScoreItemsAnswer,
    ScoreItemsRequest,
    SimilarAtomsAnswer,
    SimilarItemsAnswer,
    SimilarToTextAnswer,
    SimilarToTextRequest,
    SimilarUsersAnswer,
    TakenInAnswer,
    UserAnswer,
    UserScores,
    WriteRequest,
)
from serving.http.service import Service
from serving.live.live_lookup import Clicked, LiveLookup, Shown
from serving.lookup.answers import Answer, ItemScores, TakenIn, UserFeatures
from serving.lookup.candidates import ItemsOfUser
from serving.lookup.identifiers import Identifier

HowMany = Annotated[int, Query(ge=1, le=K)]


def probes(service: Service) -> APIRouter:
    """Whether the service lives, whether it is ready, and what it measures."""
    router = APIRouter(tags=["probes"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process is alive. No store is looked at: one that is away is no reason to kill it."""
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """Whether the store answers, and which model is live; 503 where requests would be in vain."""
        return await service.health()

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Latency by route, answers by status, requests in work, age of the features: for Prometheus.

        What the store has to say is left out while it is away.
        """
        return Response(await service.measured(), media_type=service.metrics.content_type)

    return router


def version_1(service: Service) -> APIRouter:
    """Those under /v1; what takes behaviors, impressions and clicks in only of a live service."""
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
        return ScoreItemsAnswer(model_version=found.model_version, **vars(_user_scores(found)))

    @router.post("/score/batch")
    async def score_batch(request: ScoreBatchRequest) -> ScoreBatchAnswer:
        """/v1/score of many users, in their order, by one model; where one is refused, all are."""
        asked = [ItemsOfUser(**dict(one)) for one in request.requests]
        found = await service.ask(partial(lookup.score_batch, asked))
        return ScoreBatchAnswer(
            model_version=found[0].model_version, answers=list(map(_user_scores, found))
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
        return score_answer(answer)

    @router.post("/features", response_model=ColumnsAnswer, responses={200: {"content": {ARROW: {}}}})
    async def features(
        request: FeaturesRequest, accept: Annotated[str, Header(include_in_schema=False)] = ""
    ) -> Response:
        """Any features of the online store, of many entities; without what was pushed to a live service.

        With `Accept: application/vnd.apache.arrow.stream` a table in Arrow's IPC format, each column in its
        feature's type; the model_version is in the metadata of its schema.
        """
        as_arrow = ARROW in accept.lower()

        def read() -> bytes:
            version, asked = lookup.live_version(), request.features or request.feature_service or []
            columns = lookup.online.features(asked, request.entities, version, request.full_feature_names)
            keys = {*request.entities, "model_version"}
            values = {name: column for name, column in columns.items() if name not in keys}
            if as_arrow:
                table = lookup.online.arrow_table(asked, values, request.full_feature_names)
                return stream_of(table.replace_schema_metadata({"model_version": version}))
            answer = {"model_version": version, "columns": values}
            return to_json(answer, inf_nan_mode="null", bytes_mode="base64")

        return Response(await service.ask(read), media_type=ARROW if as_arrow else "application/json")

    @router.get("/users/{user_id:path}")
    async def user(user_id: Id) -> UserAnswer:
        """A user's state under the live model, with what was pushed to this service."""
        found = await service.ask(partial(lookup.user, user_id))
        return UserAnswer(**user_fields(found), seen_items=sorted(found.seen_items))

    _add_similar(router, service)
    if isinstance(lookup, LiveLookup):
        router.post("/behaviors")(taking_in(service, lookup))
        _add_impressions(router, service, lookup)
    return router


def _add_similar(router: APIRouter, service: Service) -> None:
    lookup, similar = service.lookup, service.lookup.similar

    @router.get("/similar/items/{item_id:path}")
    async def similar_items(item_id: Id, k: HowMany = 10) -> SimilarItemsAnswer:
        """The k items whose vectors under the live model are most alike to the item's, without itself."""
        found = await service.ask(partial(similar.items, item_id, k))
        return SimilarItemsAnswer(**asdict(found))

    @router.get("/similar/users/{user_id:path}")
    async def similar_users(user_id: Id, k: HowMany = 10) -> SimilarUsersAnswer:
        """The k users whose vectors under the live model are most alike to the user's, without these."""
        found = await service.ask(partial(similar.users, user_id, k))
        return SimilarUsersAnswer(**asdict(found))

    @router.get("/similar/atoms/{atom_id:path}")
    async def similar_atoms(atom_id: Id, k: HowMany = 10) -> SimilarAtomsAnswer:
        """The k atomic behaviors whose texts are most alike to an atom's to the live model's encoder."""
        found = await service.ask(partial(similar.atoms, atom_id, k))
        return SimilarAtomsAnswer(**asdict(found))

    @router.post("/similar/text")
    async def similar_to_text(request: SimilarToTextRequest) -> SimilarToTextAnswer:
        """The k items and atomic behaviors whose texts are most alike to a text; of a live service only."""
        if not isinstance(lookup, LiveLookup):
            raise Refused(
                404,
                "this service encodes no texts, which takes the language model in memory; start it with"
                " `bahe serve --live`.",
            )
        found = await service.ask(partial(similar.to_text, request.text, request.k))
        return SimilarToTextAnswer(**asdict(found))


def _add_impressions(router: APIRouter, service: Service, lookup: LiveLookup) -> None:
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


def _user_scores(found: ItemScores) -> UserScores:
    return UserScores(
        user_id=_echoed(found.user_id, found.known),
        cold=found.cold,
        items=[
            ItemAnswer(item_id=_echoed(item, False), status="unknown", probability=None)
            if probability is None
            else ItemAnswer(item_id=item, status="ok", probability=probability)
            for item, probability in zip(found.item_ids, found.probabilities, strict=True)
        ],
    )


def _taken(service: Service, what: str, taken: TakenIn) -> TakenInAnswer:
    service.metrics.pushed(what, taken.new)
    return TakenInAnswer(
        new=taken.new,
        known=taken.known,
        refused=[RefusedRow(row=row, detail=reason) for row, reason in taken.refused.items()],
    )


def feast(service: Service) -> APIRouter:
    """What a feature server of Feast answers."""
    router = APIRouter(tags=["Feast"])

    @router.post("/get-online-features", response_model=FeastAnswer)
    async def get_online_features(request: FeastRequest) -> Response:
        """As `feast serve` has it, so that Feast's remote online store can read here."""

        def read() -> bytes:
            asked = request.features or request.feature_service or []
            answer = service.lookup.online.feast_response(
                asked, request.entities, request.full_feature_names
            )
            return to_json(answer, inf_nan_mode="null", bytes_mode="base64")

        return Response(await service.ask(read), media_type="application/json")

    @router.post("/push", response_class=Response)
    async def push(request: PushRequest) -> Response:
        """As `feast serve` has it: rows of a team's push source, online before the answer."""
        if request.to != "online":
            raise BadInput(
                f"a service does not write to the lake, so it pushes nothing `{request.to}`; push `online`"
                " here, and write the rows to the view's source by a job, with the same times."
            )
        writes = service.lookup.feature_writes
        rows = await service.write_features(
            partial(
                writes.push,
                request.push_source_name,
                request.df,
                allow_registry_cache=request.allow_registry_cache,
            )
        )
        service.metrics.pushed("features", rows)
        return Response()

    @router.post("/write-to-online-store")
    async def write_to_online_store(request: WriteRequest) -> None:
        """As `feast serve` has it, so that Feast's remote online store can write here, and push."""
        writes = service.lookup.feature_writes
        rows = await service.write_features(
            partial(
                writes.write,
                request.feature_view_name,
                request.df,
                allow_registry_cache=request.allow_registry_cache,
            )
        )
        service.metrics.pushed("features", rows)

    return router


def taking_in(service: Service, lookup: LiveLookup) -> Callable[..., Any]:
    """The route that takes behaviors in."""

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


def user_fields(user: UserFeatures) -> dict[str, Any]:
    """A user's features as an answer has them."""
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


def score_answer(answer: Answer) -> ScoreAnswer:
    """Scores of a user as an answer has them."""
    return ScoreAnswer(
        user_id=_echoed(answer.user_id, answer.known),
        model_version=answer.model_version,
        cold=answer.cold,
        scores=[ScoredItem(**vars(score)) for score in answer.scores],
    )


def _echoed(identifier: Identifier, known: bool) -> Identifier:
    """An id as an answer has it; of one that is not known not more than any answer repeats."""
    return identifier if known or isinstance(identifier, int) else clipped(identifier)
