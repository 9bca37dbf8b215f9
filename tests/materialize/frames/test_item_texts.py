"""Which text an item had when it was shown, by brute force."""

from __future__ import annotations

import duckdb
from hypothesis import given, settings
from hypothesis import strategies as st

from materialize.frames.item_texts import item_texts_shown

SECONDS = st.integers(0, 6)  # few, so that ties are the rule


@settings(max_examples=60, deadline=None)
@given(
    versions=st.dictionaries(st.tuples(st.integers(0, 3), SECONDS), st.integers(0, 9), max_size=12),
    shown=st.lists(st.tuples(st.integers(0, 4), SECONDS), min_size=1, max_size=12),
)
def test_the_text_is_of_the_version_before(
    versions: dict[tuple[int, int], int], shown: list[tuple[int, int]]
) -> None:
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE items (item_id BIGINT, event_timestamp TIMESTAMPTZ, atom_id BIGINT)"
        )
        connection.execute(
            "CREATE TABLE shown (number BIGINT, item_id BIGINT, event_timestamp TIMESTAMPTZ)"
        )
        for (item, second), atom in versions.items():
            connection.execute("INSERT INTO items VALUES (?, to_timestamp(?), ?)", [item, second, atom])
        for number, (item, second) in enumerate(shown):
            connection.execute("INSERT INTO shown VALUES (?, ?, to_timestamp(?))", [number, item, second])
        found = connection.execute(
            f"SELECT number, item_id, atom_id FROM ({item_texts_shown('shown', 'number', 'live')})"
            " ORDER BY number"
        ).fetchall()
    for (number, item_id, atom_id), (item, moment) in zip(found, shown, strict=True):
        of_item = {second: atom for (i, second), atom in versions.items() if i == item}
        before = [second for second in of_item if second < moment]
        wanted = of_item[max(before) if before else min(of_item)] if of_item else None
        assert (item_id, atom_id) == (item, wanted), number
