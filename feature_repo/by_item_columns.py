"""What a user did with the items that share a column with the candidate: its category, brand, very text.

There is a view for each column of items that `features` of dataset.yaml names so; `user_category_behaviors`
is of the column `category`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feature_repo.behavior_counts import PAIR, SPANS, with_items_of_a_column
from feature_repo.references import view_of

if TYPE_CHECKING:
    from feast import Entity, FeatureStore, FeatureView

_NAME = re.compile(rf"user_(\w+)_behaviors({'|'.join(SPANS)})")
_KEY_TYPES = {
    "VARCHAR": "STRING",
    **dict.fromkeys(("TINYINT", "SMALLINT", "INTEGER", "UTINYINT", "USMALLINT"), "INT32"),
    **dict.fromkeys(("BIGINT", "UINTEGER"), "INT64"),
}
"""Types of columns that a view can be keyed by, in the lake and for Feast."""
_NO_KEYS = {"item_id", "atom_id", "user_id", PAIR}
"""Keys of other views, and the name by which features of pairs begin."""
_TAG = {"bahe": "by_item_column"}


def views_by_item_columns(
    named: Iterable[str], columns: Mapping[str, str], others: Sequence[Any]
) -> list[Entity | FeatureView]:
    """Definitions of those of the named views that are of a column of items and not among `others`, and of
    the entities that these lack.

    `columns` are those of the lake's items, with their types.
    """
    from feast import Entity, FeatureView, ValueType

    from feast_ducklake.offline.source import DuckLakeSource
    from feature_repo.definitions import FOREVER

    by_key = {thing.join_key: thing for thing in others if isinstance(thing, Entity)}
    entities = {thing.name for thing in by_key.values()}
    taken = {thing.name for thing in others if not isinstance(thing, Entity)}
    made: list[Entity | FeatureView] = []
    for view in sorted(set(named) - taken):
        column, span = column_and_span(view)
        if column in _NO_KEYS or columns.get(column) not in _KEY_TYPES:
            continue
        if column not in by_key:
            name = f"item_{column}"
            by_key[column] = Entity(
                name=f"bahe_{name}" if name in entities else name,
                join_keys=[column],
                value_type=ValueType[_KEY_TYPES[columns[column]]],
                description=f"The {column} of items.",
            )
            made.append(by_key[column])
        window = f"last {span.removeprefix('_')}" if span else "so far"
        made.append(
            FeatureView(
                name=view,
                entities=[by_key["user_id"], by_key[column]],
                ttl=FOREVER,
                source=DuckLakeSource(name=view, query=with_items_of_a_column(column, span)),
                online=False,
                tags=_TAG,
                description=f"Behaviors of the user with items of that {column}, {window}.",
            )
        )
    return made


def column_and_span(view: str) -> tuple[str, str]:
    """What the name of such a view says; empty of another's."""
    match = _NAME.fullmatch(view)
    return (match[1], match[2]) if match else ("", "")


def is_by_item_column(view: FeatureView) -> bool:
    """Whether a registered view is one of these, and not a team's of such a name."""
    return bool(view.tags.items() >= _TAG.items())


def columns_counted(store: FeatureStore, references: Iterable[str]) -> list[str]:
    """The columns of items that such views are of, among references (`view:feature`)."""
    named = set(map(view_of, references))
    ours = [view for view in store.list_feature_views() if view.name in named and is_by_item_column(view)]
    return sorted({column.name for view in ours for column in view.entity_columns} - {"user_id"})
