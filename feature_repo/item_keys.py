"""Views keyed by columns of items, as what a user did in a category: the keys of an impression's item."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from bahe_lake.sql import sql_identifier, sql_literal
from feature_repo.references import ITEM_COLUMNS, FeatureReference

if TYPE_CHECKING:
    from feast import FeatureStore

UNKNOWN: dict[str, str | int] = {"String": "\x1f", "Int32": -(2**31), "Int64": -(2**63)}
"""The key of an item whose column is not known, by the column's type: keys cannot be null. Ingest takes a
text of separators alone for blank, so that no item has it."""

ItemKeys = dict[str, str | int]
"""Columns of items, each with its key where it is not known."""


def item_keys(store: FeatureStore, references: Iterable[FeatureReference]) -> ItemKeys:
    """The columns of items that the views of these features are keyed by."""
    names = sorted({key for one in references for key in one.keys if one.entity == "attribute"})
    names = [name for name in names if name not in ("user_id", "item_id")]
    if not names:
        return {}
    types = {field.name: str(field.dtype) for field in store.get_feature_view(ITEM_COLUMNS).features}
    return {name: UNKNOWN[types[name]] for name in names}


def without_unknown(values: pa.Array | pa.ChunkedArray, unknown: str | int | None) -> Any:
    """A column of such keys with null where they are unknown; any other column as it is."""
    return values if unknown is None else pc.if_else(pc.equal(values, unknown), None, values)


def reference_of(column: str) -> str:
    """The feature that such a column is."""
    return f"{ITEM_COLUMNS}:{column}"


def with_item_keys(rows: str, keys: ItemKeys, *, as_of: int | None = None) -> str:
    """SQL of rows with an item_id and event_timestamp, and beside them the columns of their items.

    They are those of the item's last version strictly before. `as_of` reads the items of that snapshot of
    the lake. The order of the rows is lost.
    """
    if not keys:
        return rows
    version = "" if as_of is None else f"AT (VERSION => {as_of})"
    columns = ", ".join(
        f"coalesce(v.{sql_identifier(name)}, {sql_literal(unknown)}) AS {sql_identifier(name)}"
        for name, unknown in keys.items()
    )
    return f"""
        SELECT e.*, {columns}
        FROM ({rows}) e
        ASOF LEFT JOIN (SELECT * FROM items {version}) v
            ON v.item_id = e.item_id AND v.event_timestamp < e.event_timestamp"""
