"""Requests of a running service: features, scores and recommendations, against Feast's own call.

The peer is the same lookup on the same home, reading features with `get_online_features` where ours reads
them by the column from the store's bytes (item vectors come by `VectorReader` in both); in turn, with the
same threads. Scores and recommendations are measured as each request reads its items, and as a service has
them, with the items in memory. Then over HTTP, by one client that keeps
its connection: what the bare function call takes, and what HTTP adds.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from bahe_core.errors import Unreachable
from bahe_core.home import Home
from benchmarks.harness import Row, main
from feast_ducklake.online.features import FeatureReader
from feature_repo.store import open_store
from serving.lookup.identifiers import Identifier
from serving.lookup.online_lookup import OnlineLookup

if TYPE_CHECKING:
    from feast import FeatureService

CANDIDATES = 100
CLIENTS = 8
SCORE_P50, SCORE_P99 = 3.0, 10.0
"""Milliseconds over HTTP."""
PUSH_P50 = 10.0
SENT = 100_000
"""Impressions that a service has in memory."""
PEER = "get_online_features"


class FeastReader(FeatureReader):
    """Feast's own call in place of the reader of bytes."""

    def read(
        self,
        features: list[str] | FeatureService,
        entities: Mapping[str, Sequence[Any]],
        full_feature_names: bool = False,
    ) -> dict[str, list[Any]]:
        """`get_online_features`, as it is called by everyone."""
        return self._by_feast(features, entities, full_feature_names)


def by_feast(home: Home) -> OnlineLookup:
    """The lookup as it was: features come through Feast's own call, item vectors by `VectorReader`."""
    lookup = OnlineLookup(home)
    lookup.online.reader = FeastReader(open_store(home))
    return lookup


def in_turn(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in random order within a turn; the first turns warm the caches."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    rng = np.random.default_rng(0)
    for turn in range(turns + 3):
        for name in rng.permutation(list(calls)).tolist():
            start = time.perf_counter()
            calls[name]()
            if turn >= 3:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def compared(metric: str, ours: Callable[[], object], feast: Callable[[], object], turns: int) -> Row:
    """Our milliseconds beside Feast's."""
    taken = in_turn({"ours": ours, "feast": feast}, turns)
    return Row(
        metric=metric,
        value=median(taken["ours"]),
        unit="ms",
        peer=f"{PEER}, ms",
        peer_value=median(taken["feast"]),
    )


@contextmanager
def served(home: Home, workers: int = 1) -> Iterator[http.client.HTTPConnection]:
    """A service of the home in processes of its own, and a connection to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bahe", "serve", "--home", str(home.root), "--port", str(port)]
    process = subprocess.Popen([*command, "--workers", str(workers)], stderr=subprocess.DEVNULL)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        for _ in range(600):
            try:
                connection.request("GET", "/readyz")
                connection.getresponse().read()
                break
            except OSError:
                connection.close()
                time.sleep(0.1)
        else:
            raise Unreachable(f"the service on port {port} does not answer; see `bahe serve`.")
        yield connection
    finally:
        connection.close()
        process.terminate()
        process.wait()


def over_http(home: Home, user: Identifier, items: list[Identifier], turns: int) -> Iterable[Row]:
    """Percentiles of what one client sees."""
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        f"POST /v1/score, {len(items)} candidates": ("/v1/score", {"user_id": user, "item_ids": items}),
        "POST /v1/recommend, 10 of all items": ("/v1/recommend", {"user_id": user, "k": 10}),
        "POST /v1/features, 4 of 1 item": (
            "/v1/features",
            {"features": STATISTICS, "entities": {"item_id": items[:1]}},
        ),
        f"POST /v1/features, 4 of {len(items)} items": (
            "/v1/features",
            {"features": STATISTICS, "entities": {"item_id": items}},
        ),
    }
    with served(home) as connection:

        def call(path: str, body: dict[str, Any]) -> None:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content

        for metric, (path, body) in asked.items():
            taken = in_turn({"": partial(call, path, body)}, turns)[""]
            for name, value, goal in (
                ("p50", float(np.percentile(taken, 50)), SCORE_P50),
                ("p99", float(np.percentile(taken, 99)), SCORE_P99),
            ):
                goals = path == "/v1/score"
                yield Row(
                    metric=f"{metric}, {name}",
                    value=value,
                    unit="ms",
                    goal=f"at most {goal:g} ms" if goals else None,
                    holds=value <= goal if goals else None,
                )


def by_workers(home: Home, user: Identifier, items: list[Identifier], seconds: float) -> Iterable[Row]:
    """Scores a second that clients get of one process and of two, the clients on the same cores."""
    body = json.dumps({"user_id": user, "item_ids": items})
    rates: dict[int, float] = {}
    for workers in (1, 2):
        with served(home, workers) as connection:
            time.sleep(10)  # the other worker may begin later
            until = time.monotonic() + seconds

            def ask(address: tuple[str, int], until: float = until) -> int:
                client, answers = http.client.HTTPConnection(*address, timeout=30), 0
                while time.monotonic() < until:
                    client.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
                    answer = client.getresponse()
                    content = answer.read()
                    assert answer.status == 200, content
                    answers += 1
                client.close()
                return answers

            with ThreadPoolExecutor(CLIENTS) as clients:
                asked = [clients.submit(ask, (connection.host, connection.port)) for _ in range(CLIENTS)]
            rates[workers] = sum(one.result() for one in asked) / seconds
    yield Row(
        metric=f"POST /v1/score, {len(items)} candidates, {CLIENTS} clients, two workers",
        value=rates[2],
        unit="answers/s",
        peer="one worker, answers/s",
        peer_value=rates[1],
    )


def pushed(home: Home, user: Identifier, count: int, kind: str, text: Callable[[int], str]) -> Row:
    """A behavior taken in: on the disk, encoded, and in the user's vector; on a copy of the home."""
    from serving.live.live_lookup import LiveLookup

    with tempfile.TemporaryDirectory() as folder:
        copy = Home(Path(shutil.copytree(home.root, Path(folder) / "home")))
        lookup = LiveLookup(copy, keep_items=True)
        (channel, *_) = lookup.artifact(lookup.live_version()).dense.channels
        at, taken = datetime.now(UTC) - timedelta(days=1), list[float]()
        behaviors = lookup.user(user).behaviors
        for number in range(count + 3):
            start = time.perf_counter()
            lookup.append(user, channel, text(number), at + timedelta(seconds=number))
            if number >= 3:
                taken.append((time.perf_counter() - start) * 1e3)
    return Row(
        metric=f"{kind} pushed, durable, to a user of {behaviors:,}, p50",
        value=median(taken),
        unit="ms",
        goal=f"at most {PUSH_P50:g} ms",
        holds=median(taken) <= PUSH_P50,
    )


def impressions(home: Home, pages: int) -> Iterator[Row]:
    """Impressions taken in by pages of ten, clicked by one in ten, on a copy of the home; then by 1,000."""
    from serving.live.live_lookup import Clicked, LiveLookup, Shown
    from serving.live.live_statistics import LiveStatistics

    with tempfile.TemporaryDirectory() as folder:
        copy = Home(Path(shutil.copytree(home.root, Path(folder) / "home")))
        lookup = LiveLookup(copy, keep_items=True)
        items, users = list(lookup.catalogue()), _users(home)
        now, number = datetime.now(UTC), 1_000_000_000

        def page(length: int) -> list[Shown]:
            nonlocal number
            number += length
            return [
                Shown(
                    impression_id=number + place,
                    user_id=users[number % len(users)],
                    item_id=items[(number + 7 * place) % len(items)],
                    at=now,
                )
                for place in range(length)
            ]

        taken: dict[str, list[float]] = {"impressions": [], "click": [], "score": []}
        for _ in range(pages + 3):
            shown = page(10)
            calls: dict[str, Callable[[], object]] = {
                "impressions": partial(lookup.show, shown),
                "click": partial(lookup.click, [Clicked(impression_id=shown[0].impression_id, at=now)]),
                "score": partial(lookup.score, shown[0].user_id, [one.item_id for one in shown]),
            }
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - start) * 1e3)
        for name, metric in (
            ("impressions", "10 impressions taken in, durable, p50"),
            ("click", "a click taken in, durable, p50"),
            ("score", "score 10 candidates after them, p50"),
        ):
            yield Row(metric=metric, value=median(taken[name][3:]), unit="ms")
        before = psutil.Process().memory_info().rss
        for _ in range(SENT // 1_000):
            lookup.show(page(1_000))
            lookup.user(users[0])
        grown = psutil.Process().memory_info().rss - before
        yield Row(metric=f"memory of an impression, of {SENT:,} taken in", value=grown / SENT, unit="bytes")
        start = time.perf_counter()
        LiveStatistics(copy).published()
        yield Row(
            metric=f"another service's reading of them, {SENT:,} taken in",
            value=time.perf_counter() - start,
            unit="s",
        )


STATISTICS = [
    f"item_stats:item_{name}" for name in ("impressions", "clicks", "click_rate", "last_impression_us")
]


def measure(quick: bool, home_path: Path) -> Iterable[Row]:
    """Milliseconds; `quick` repeats less."""
    home, turns = Home.at(home_path), 30 if quick else 200
    ours, feast = OnlineLookup(home), by_feast(home)
    service = OnlineLookup(home, keep_items=True)
    every = list(ours.catalogue())
    user = _users(home)[0]
    rng = np.random.default_rng(0)
    some = [every[i] for i in rng.choice(len(every), CANDIDATES, replace=False).tolist()]
    for items in (some[:1], some, every):
        asked = {"item_id": items}
        assert ours.online.read(STATISTICS, asked) == feast.online.read(STATISTICS, asked)
        yield compared(
            f"4 statistics of {len(items):,} items",
            partial(ours.online.read, STATISTICS, asked),
            partial(feast.online.read, STATISTICS, asked),
            turns,
        )
    yield compared("a user's features", partial(ours.user, user), partial(feast.user, user), turns)
    for how, lookup in (("read by each request", ours), ("in memory", service)):
        yield compared(
            f"score {CANDIDATES} candidates, items {how}",
            partial(lookup.score, user, some),
            partial(feast.score, user, some),
            turns,
        )
        yield compared(
            f"recommend 10 of {len(every):,}, items {how}",
            partial(lookup.recommend, user, 10),
            partial(feast.recommend, user, 10),
            turns,
        )
    yield from over_http(home, user, some, 4 * turns)
    yield from by_workers(home, user, some, 5 if quick else 20)
    yield pushed(home, user, turns, "a new text", lambda number: f"something new, {number}")
    yield pushed(home, user, turns, "a known text", lambda _: "the same again")
    yield from impressions(home, turns)


def _users(home: Home) -> list[Identifier]:
    """Those with most impressions, whose histories are long, first."""
    from bahe_lake.connection import lake

    with lake(home) as connection:
        rows = connection.execute(
            "SELECT user_id FROM impressions GROUP BY user_id ORDER BY count(*) DESC, user_id"
        ).fetchall()
    return [row[0] for row in rows]


if __name__ == "__main__":
    main("serving", __doc__ or "", measure)
