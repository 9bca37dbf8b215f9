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
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Self

import httpx

from bahe_core.errors import BadInput, BaheError, UnknownEntity, Unreachable, one_line
from serving import client_calls as calls
from serving.client_calls import Answer, Call, Context, Identifier, Rows, UnknownUser
from serving.http.messages import (
    BehaviorAnswer,
    ColumnsAnswer,
    ScoreAnswer,
    ScoreBatchAnswer,
    ScoreItemsAnswer,
    SimilarAtomsAnswer,
    SimilarItemsAnswer,
    SimilarToTextAnswer,
    SimilarUsersAnswer,
    TakenInAnswer,
    UserAnswer,
)

if TYPE_CHECKING:
    import pyarrow as pa

Verify = ssl.SSLContext | bool

SECONDS = 2.0
"""For a request, all tries together."""
FIRST_PAUSE = 0.05
"""Seconds before the second try, at most; twice as many before each that follows."""
_AGAIN = frozenset({408, 429, 502, 503, 504})


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

    def _read(self, call: Call[Answer], answer: httpx.Response) -> Answer | None:
        """What was answered; None where it may be another one next time. Raises as the methods."""
        if answer.status_code in _AGAIN:
            return None
        if answer.is_success:
            try:
                return call.read(answer.content)
            except ValueError:
                raise Unreachable(f"{self._url} answers as no service of this version does.") from None
        if answer.is_server_error:
            raise Unreachable(f"{self._url} failed ({_reason(answer)}).")
        raise (UnknownEntity if answer.status_code == 404 else BadInput)(_reason(answer))

    def _lost(
        self, error: httpx.RequestError, before: httpx.Response | Exception | None
    ) -> httpx.Response | Exception:
        """What to say of the tries so far, the last of which failed where another may go better.

        Raises Unreachable on a certificate: with that none would.
        """
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise Unreachable(f"{self._url} shows a certificate that is not trusted ({one_line(error)}).")
        # The last try may have had no time left: what was answered before says more.
        return before if isinstance(error, httpx.TimeoutException) and before is not None else error

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
    and that each may take to connect, to send and for each part of the answer. A certificate of an
    authority of one's own is trusted with `verify=ssl.create_default_context(cafile="authority.pem")`.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, seconds: float = SECONDS, verify: Verify = True
    ) -> None:
        super().__init__(url, api_key, seconds)
        self._http = httpx.Client(base_url=self._url, headers=self._headers, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
        return self._send(calls.score(user_id, item_ids, at=at, context=context, unknown_user=unknown_user))

    def score_batch(self, requests: Rows) -> ScoreBatchAnswer:
        """`score` of many users: rows of user_id, item_ids and, where needed, at, context, unknown_user."""
        return self._send(calls.score_batch(requests))

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
            calls.recommend(
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
        return self._send(calls.features(features, entities, full_feature_names=full_feature_names))

    def features_table(
        self,
        features: Sequence[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        *,
        full_feature_names: bool = False,
    ) -> pa.Table:
        """`features` as an Arrow table of registered types; the model_version is in its metadata."""
        return self._send(calls.features_table(features, entities, full_feature_names=full_feature_names))

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
        return self._send(calls.behavior(user_id, channel, text, at=at, item_id=item_id, event_id=event_id))

    def user(self, user_id: Identifier) -> UserAnswer:
        """A user's vector, statistics and history under the live model."""
        return self._send(calls.user(user_id))

    def similar_items(self, item_id: Identifier, k: int = 10) -> SimilarItemsAnswer:
        """The k items most alike to one under the live model."""
        return self._send(calls.similar_items(item_id, k))

    def similar_users(self, user_id: Identifier, k: int = 10) -> SimilarUsersAnswer:
        """The k users most alike to one under the live model."""
        return self._send(calls.similar_users(user_id, k))

    def similar_atoms(self, atom_id: int, k: int = 10) -> SimilarAtomsAnswer:
        """The k atomic behaviors whose texts are most alike to one's."""
        return self._send(calls.similar_atoms(atom_id, k))

    def similar_to_text(self, text: str, k: int = 10) -> SimilarToTextAnswer:
        """The k items and atomic behaviors whose texts are most alike to a text, by a live service."""
        return self._send(calls.similar_to_text(text, k))

    def impressions(self, rows: Rows) -> TakenInAnswer:
        """Send what was shown: rows of impression_id, user_id, item_id and event_timestamp."""
        return self._send(calls.impressions(rows))

    def clicks(self, rows: Rows) -> TakenInAnswer:
        """Send what was clicked: rows of impression_id and event_timestamp."""
        return self._send(calls.clicks(rows))

    def _send(self, call: Call[Answer]) -> Answer:
        last: httpx.Response | Exception | None = None
        for pause, seconds in self._pauses():
            time.sleep(pause)
            try:
                last = self._http.request(
                    call.method,
                    call.path,
                    content=call.content,
                    headers={"Accept": call.accept},
                    timeout=seconds,
                )
                answer = self._read(call, last)
            except httpx.RequestError as error:
                last, answer = self._lost(error, last), None
            if answer is not None:
                return answer
        raise self._given_up(last)


class AsyncClient(_Tries):
    """`Client`, whose methods are awaited."""

    def __init__(
        self, url: str, *, api_key: str | None = None, seconds: float = SECONDS, verify: Verify = True
    ) -> None:
        super().__init__(url, api_key, seconds)
        self._http = httpx.AsyncClient(base_url=self._url, headers=self._headers, verify=verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
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
            calls.score(user_id, item_ids, at=at, context=context, unknown_user=unknown_user)
        )

    async def score_batch(self, requests: Rows) -> ScoreBatchAnswer:
        """`score` of many users: rows of user_id, item_ids and, where needed, at, context, unknown_user."""
        return await self._send(calls.score_batch(requests))

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
            calls.recommend(
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
        return await self._send(calls.features(features, entities, full_feature_names=full_feature_names))

    async def features_table(
        self,
        features: Sequence[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        *,
        full_feature_names: bool = False,
    ) -> pa.Table:
        """`features` as an Arrow table of registered types; the model_version is in its metadata."""
        return await self._send(
            calls.features_table(features, entities, full_feature_names=full_feature_names)
        )

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
            calls.behavior(user_id, channel, text, at=at, item_id=item_id, event_id=event_id)
        )

    async def user(self, user_id: Identifier) -> UserAnswer:
        """A user's vector, statistics and history under the live model."""
        return await self._send(calls.user(user_id))

    async def similar_items(self, item_id: Identifier, k: int = 10) -> SimilarItemsAnswer:
        """The k items most alike to one under the live model."""
        return await self._send(calls.similar_items(item_id, k))

    async def similar_users(self, user_id: Identifier, k: int = 10) -> SimilarUsersAnswer:
        """The k users most alike to one under the live model."""
        return await self._send(calls.similar_users(user_id, k))

    async def similar_atoms(self, atom_id: int, k: int = 10) -> SimilarAtomsAnswer:
        """The k atomic behaviors whose texts are most alike to one's."""
        return await self._send(calls.similar_atoms(atom_id, k))

    async def similar_to_text(self, text: str, k: int = 10) -> SimilarToTextAnswer:
        """The k items and atomic behaviors whose texts are most alike to a text, by a live service."""
        return await self._send(calls.similar_to_text(text, k))

    async def impressions(self, rows: Rows) -> TakenInAnswer:
        """Send what was shown: rows of impression_id, user_id, item_id and event_timestamp."""
        return await self._send(calls.impressions(rows))

    async def clicks(self, rows: Rows) -> TakenInAnswer:
        """Send what was clicked: rows of impression_id and event_timestamp."""
        return await self._send(calls.clicks(rows))

    async def _send(self, call: Call[Answer]) -> Answer:
        last: httpx.Response | Exception | None = None
        for pause, seconds in self._pauses():
            await asyncio.sleep(pause)
            try:
                last = await self._http.request(
                    call.method,
                    call.path,
                    content=call.content,
                    headers={"Accept": call.accept},
                    timeout=seconds,
                )
                answer = self._read(call, last)
            except httpx.RequestError as error:
                last, answer = self._lost(error, last), None
            if answer is not None:
                return answer
        raise self._given_up(last)
