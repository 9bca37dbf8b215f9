"""Which items a user is said to have seen."""

from __future__ import annotations

import random

import duckdb
import pyarrow as pa

from materialize.vectors.user_embedder import SEEN_ITEMS, latest_items


def test_they_are_the_latest_ones() -> None:
    rng = random.Random(0)
    done = [
        (user, rng.randrange(3 * SEEN_ITEMS), moment) for user in "ab" for moment in range(9 * SEEN_ITEMS)
    ]
    done += [("a", None, 99 * SEEN_ITEMS), ("c", None, 0)]
    rng.shuffle(done)
    with duckdb.connect() as connection:
        table = pa.table(dict(zip(("user_id", "item_id", "second"), zip(*done, strict=True), strict=True)))
        connection.register("done", table)
        # Some of it is known from behaviors, some from clicks; what was shown and not clicked was not seen.
        connection.execute(
            "CREATE TABLE behaviors AS SELECT user_id, item_id, to_timestamp(second) AS event_timestamp"
            " FROM done WHERE second % 3 > 0"
        )
        connection.execute(
            "CREATE TABLE impressions AS"
            " SELECT user_id, item_id, to_timestamp(second) AS event_timestamp, 1 AS clicked"
            " FROM done WHERE second % 3 = 0 AND item_id IS NOT NULL"
            " UNION ALL"
            " SELECT user_id, -1 - item_id, to_timestamp(second + 1), 0 FROM done WHERE item_id IS NOT NULL"
        )
        found = latest_items(connection, pa.table({"user_id": ["a", "b", "c", "d"]})).to_pylist()
    for user, items in zip("ab", found, strict=False):
        latest: dict[int, int] = {}
        for who, item, moment in done:
            if who == user and item is not None:
                latest[item] = max(moment, latest.get(item, -1))
        wanted = sorted(latest, key=lambda item: -latest[item])[:SEEN_ITEMS]
        assert items == [str(item) for item in wanted]
    assert found[2:] == [None, None]
