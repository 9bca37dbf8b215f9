"""A client of a running service, for Python: `Client`, and `AsyncClient` with the same methods to await.

    from serving.client import Client

    with Client("http://127.0.0.1:8000", api_key="...") as service:
        for item in service.score(405, [50, 181, 258]).items:
            print(item.item_id, item.probability)

A request that a service could not take (503, 429, no connection) is sent again, each time after a longer
pause of random length, until the time for it is over. That is safe for all of them: whatever is pushed
counts once however often it is sent.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from bahe_core.errors import BadInput, BaheError, UnknownEntity, Unreachable
from serving.messages import (
    BehaviorAnswer,
    BehaviorRequest,
    ClickRow,
    ClicksRequest,
    ColumnsAnswer,
    FeaturesRequest,
    ImpressionRow,
    ImpressionsRequest,
    RecommendRequest,
    ScoreAnswer,
    ScoreItemsAnswer,
    ScoreItemsRequest,
    SimilarItemsAnswer,
    TakenInAnswer,
    UserAnswer,
)

Identifier = str | int
Rows = Sequence[Mapping[str, object]]
Context = Mapping[str, str | bool | int | float | None]
UnknownUser = Literal["empty", "refuse"]
Answer = TypeVar("Answer", bound=BaseModel)
Request = TypeVar("Request", bound=BaseModel)

SECONDS = 2.0
"""For a request, all tries together."""
FIRST_PAUSE = 0.05
"""Seconds before the second try, at most; twice as many before each that follows."""
_AGAIN = frozenset({408, 429, 502, 503, 504})


@dataclass(frozen=True)
class _Call(Generic[Answer]):
    path: str
    body: BaseModel | None
    answer: type[Answer]

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    @property
    def content(self) -> str | None:
        return None if self.body is None else self.body.model_dump_json(exclude_unset=True)


def _checked(kind: type[Request], **values: object) -> Request:
    """A request, without what is None. Raises BadInput, before anything is sent, where a service would."""
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise BadInput(f"{where}: {first['msg']}; correct it.") from None


def _score(
    user_id: Identifier,
    item_ids: Sequence[Identifier],
    *,
    at: datetime | None = None,
    context: Context | None = None,
    unknown_user: UnknownUser = "empty",
) -> _Call[ScoreItemsAnswer]:
    body = _checked(
        ScoreItemsRequest,
        user_id=user_id,
        item_ids=list(item_ids),
        at=at,
        context=context,
        unknown_user=unknown_user,
    )
    return _Call("/v1/score", body, ScoreItemsAnswer)


def _recommend(
    user_id: Identifier,
    k: int = 10,
    *,
    at: datetime | None = None,
    context: Context | None = None,
    include_seen: bool = False,
    unknown_user: UnknownUser = "empty",
) -> _Call[ScoreAnswer]:
    body = _checked(
        RecommendRequest,
        user_id=user_id,
        k=k,
        at=at,
        context=context,
        include_seen=include_seen,
        unknown_user=unknown_user,
    )
    return _Call("/v1/recommend", body, ScoreAnswer)


def _features(
    features: Sequence[str] | str,
    entities: Mapping[str, Sequence[Identifier]],
    *,
    full_feature_names: bool = False,
) -> _Call[ColumnsAnswer]:
    body = _checked(
        FeaturesRequest,
        features=None if isinstance(features, str) else list(features),
        feature_service=features if isinstance(features, str) else None,
        entities={key: list(column) for key, column in entities.items()},
        full_feature_names=full_feature_names,
    )
    return _Call("/v1/features", body, ColumnsAnswer)


def _behavior(
    user_id: Identifier,
    channel: str,
    text: str,
    *,
    at: datetime | None = None,
    item_id: Identifier | None = None,
    event_id: str | None = None,
) -> _Call[BehaviorAnswer]:
    body = _checked(
        BehaviorRequest,
        user_id=user_id,
        channel=channel,
        text=text,
        event_timestamp=at or datetime.now(UTC),
        item_id=item_id,
        event_id=event_id,
    )
    return _Call("/v1/behaviors", body, BehaviorAnswer)


def _user(user_id: Identifier) -> _Call[UserAnswer]:
    return _Call(f"/v1/users/{quote(str(user_id), safe='')}", None, UserAnswer)


def _similar_items(item_id: Identifier, k: int) -> _Call[SimilarItemsAnswer]:
    return _Call(f"/v1/similar/items/{quote(str(item_id), safe='')}?k={k:d}", None, SimilarItemsAnswer)


def _impressions(rows: Rows) -> _Call[TakenInAnswer]:
    body = _checked(ImpressionsRequest, impressions=[_checked(ImpressionRow, **row) for row in rows])
    return _Call("/v1/impressions", body, TakenInAnswer)


def _clicks(rows: Rows) -> _Call[TakenInAnswer]:
    body = _checked(ClicksRequest, clicks=[_checked(ClickRow, **row) for row in rows])
    return _Call("/v1/clicks", body, TakenInAnswer)


class _Tries:
    """How often a request is sent, and what becomes of its answers."""

    def __init__(self, url: str, api_key: str | None, seconds: float) -> None:
        self._url, self._seconds = url.rstrip("/"), seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def _pauses(self) -> Iterator[tuple[float, float]]:
        """For each try the pause before it and the time that it has, in seconds."""
        end = time.monotonic() + self._seconds
        pause, longest = 0.0, FIRST_PAUSE
        while (left := end - time.monotonic() - pause) > 0:
            yield pause, left
            pause, longest = random.uniform(0, longest), 2 * longest

    def _read(self, call: _Call[Answer], answer: httpx.Response) -> Answer | None:
        """What was answered; None where it may be another one next time. Raises as the methods."""
        if answer.status_code in _AGAIN:
            return None
        if answer.is_success:
            try:
                return call.answer.model_validate_json(answer.content)
            except ValidationError:
                raise Unreachable(f"{self._url} answers as no service of this version does.") from None
        if answer.is_server_error:
            raise Unreachable(f"{self._url} failed ({_reason(answer)}).")
        raise (UnknownEntity if answer.status_code == 404 else BadInput)(_reason(answer))

    def _given_up(self, last: httpx.Response | Exception | None) -> BaheError:
        reason = _reason(last) if isinstance(last, httpx.Response) else type(last).__name__
        return Unreachable(f"{self._url} did not answer within {self._seconds:g} s ({reason}).")


def _reason(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        return f"{body['detail']} [request {body['request_id']}]"
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


class Client(_Tries):
    """Safe to use from several threads; connections are kept.

    Every method raises BadInput on what the service refuses, UnknownEntity on what it does not have (404),
    and Unreachable when it fails, or no try was answered within `seconds`: the time in which tries begin,
    and that each may take to connect, to send and for each part of the answer.
    """

    def __init__(self, url: str, *, api_key: str | None = None, seconds: float = SECONDS) -> None:
        super().__init__(url, api_key, seconds)
        self._http = httpx.Client(base_url=self._url, headers=self._headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def score(
        self,
        user_id: Identifier,
        item_ids: Sequence[Identifier],
        *,
        at: datetime | None = None,
        context: Context | None = None,
        unknown_user: UnknownUser = "empty",
    ) -> ScoreItemsAnswer:
        """Click probabilities of items for a user, in their order."""
        return self._send(_score(user_id, item_ids, at=at, context=context, unknown_user=unknown_user))

    def recommend(
        self,
        user_id: Identifier,
        k: int = 10,
        *,
        at: datetime | None = None,
        context: Context | None = None,
        include_seen: bool = False,
        unknown_user: UnknownUser = "empty",
    ) -> ScoreAnswer:
        """The k items that the user will most likely click, best first."""
        return self._send(
            _recommend(
                user_id, k, at=at, context=context, include_seen=include_seen, unknown_user=unknown_user
            )
        )

    def features(
        self,
        features: Sequence[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        *,
        full_feature_names: bool = False,
    ) -> ColumnsAnswer:
        """Features (`view:feature`, or a feature service by name) of entities, by join key."""
        return self._send(_features(features, entities, full_feature_names=full_feature_names))

    def behavior(
        self,
        user_id: Identifier,
        channel: str,
        text: str,
        *,
        at: datetime | None = None,
        item_id: Identifier | None = None,
        event_id: str | None = None,
    ) -> BehaviorAnswer:
        """Send what a user did (default: now)."""
        return self._send(_behavior(user_id, channel, text, at=at, item_id=item_id, event_id=event_id))

    def user(self, user_id: Identifier) -> UserAnswer:
        """A user's vector, statistics and history under the live model."""
        return self._send(_user(user_id))

    def similar_items(self, item_id: Identifier, k: int = 10) -> SimilarItemsAnswer:
        """The k items most alike to one under the live model."""
        return self._send(_similar_items(item_id, k))

    def impressions(self, rows: Rows) -> TakenInAnswer:
        """Send what was shown: rows of impression_id, user_id, item_id and event_timestamp."""
        return self._send(_impressions(rows))

    def clicks(self, rows: Rows) -> TakenInAnswer:
        """Send what was clicked: rows of impression_id and event_timestamp."""
        return self._send(_clicks(rows))

    def _send(self, call: _Call[Answer]) -> Answer:
        last: httpx.Response | Exception | None = None
        for pause, seconds in self._pauses():
            time.sleep(pause)
            try:
                last = self._http.request(call.method, call.path, content=call.content, timeout=seconds)
                answer = self._read(call, last)
            except httpx.RequestError as error:
                last, answer = error, None
            if answer is not None:
                return answer
        raise self._given_up(last)


class AsyncClient(_Tries):
    """`Client`, whose methods are awaited."""

    def __init__(self, url: str, *, api_key: str | None = None, seconds: float = SECONDS) -> None:
        super().__init__(url, api_key, seconds)
        self._http = httpx.AsyncClient(base_url=self._url, headers=self._headers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def score(
        self,
        user_id: Identifier,
        item_ids: Sequence[Identifier],
        *,
        at: datetime | None = None,
        context: Context | None = None,
        unknown_user: UnknownUser = "empty",
    ) -> ScoreItemsAnswer:
        """Click probabilities of items for a user, in their order."""
        return await self._send(
            _score(user_id, item_ids, at=at, context=context, unknown_user=unknown_user)
        )

    async def recommend(
        self,
        user_id: Identifier,
        k: int = 10,
        *,
        at: datetime | None = None,
        context: Context | None = None,
        include_seen: bool = False,
        unknown_user: UnknownUser = "empty",
    ) -> ScoreAnswer:
        """The k items that the user will most likely click, best first."""
        return await self._send(
            _recommend(
                user_id, k, at=at, context=context, include_seen=include_seen, unknown_user=unknown_user
            )
        )

    async def features(
        self,
        features: Sequence[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        *,
        full_feature_names: bool = False,
    ) -> ColumnsAnswer:
        """Features (`view:feature`, or a feature service by name) of entities, by join key."""
        return await self._send(_features(features, entities, full_feature_names=full_feature_names))

    async def behavior(
        self,
        user_id: Identifier,
        channel: str,
        text: str,
        *,
        at: datetime | None = None,
        item_id: Identifier | None = None,
        event_id: str | None = None,
    ) -> BehaviorAnswer:
        """Send what a user did (default: now)."""
        return await self._send(
            _behavior(user_id, channel, text, at=at, item_id=item_id, event_id=event_id)
        )

    async def user(self, user_id: Identifier) -> UserAnswer:
        """A user's vector, statistics and history under the live model."""
        return await self._send(_user(user_id))

    async def similar_items(self, item_id: Identifier, k: int = 10) -> SimilarItemsAnswer:
        """The k items most alike to one under the live model."""
        return await self._send(_similar_items(item_id, k))

    async def impressions(self, rows: Rows) -> TakenInAnswer:
        """Send what was shown: rows of impression_id, user_id, item_id and event_timestamp."""
        return await self._send(_impressions(rows))

    async def clicks(self, rows: Rows) -> TakenInAnswer:
        """Send what was clicked: rows of impression_id and event_timestamp."""
        return await self._send(_clicks(rows))

    async def _send(self, call: _Call[Answer]) -> Answer:
        last: httpx.Response | Exception | None = None
        for pause, seconds in self._pauses():
            await asyncio.sleep(pause)
            try:
                last = await self._http.request(
                    call.method, call.path, content=call.content, timeout=seconds
                )
                answer = self._read(call, last)
            except httpx.RequestError as error:
                last, answer = error, None
            if answer is not None:
                return answer
        raise self._given_up(last)
