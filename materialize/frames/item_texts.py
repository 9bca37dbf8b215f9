"""Which text an item had when an impression showed it."""

from __future__ import annotations

from bahe_lake.sql import known_until


def item_texts_shown(relation: str, key: str, freshness: str) -> str:
    """SQL of the text (atom_id, null for an unknown item) that each impression's item had at the time.

    `relation` has item_id, event_timestamp and the column `key`, which tells its rows apart; the answer has
    `key`, item_id and atom_id. The text is that of the last version that serving had then (`freshness`); an
    item that was shown before its first version has that one's.
    """
    known = known_until(freshness, "f.event_timestamp")
    return f"""
        SELECT f.{key}, f.item_id, coalesce(v.atom_id, first.atom_id) AS atom_id
        FROM {relation} f
        ASOF LEFT JOIN items v ON v.item_id = f.item_id AND v.event_timestamp < {known}
        LEFT JOIN (
            SELECT item_id, arg_min(atom_id, event_timestamp) AS atom_id FROM items GROUP BY item_id
        ) first ON first.item_id = f.item_id"""
