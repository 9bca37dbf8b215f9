"""Items as they are now: the table `items` has a row for each version in time of an item."""

from __future__ import annotations

LATEST_ITEMS = """(SELECT * FROM items
    QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY event_timestamp DESC) = 1)"""
"""SQL of one row for each item, the latest."""
