"""Homes that a test may change, and what a home holds, as two homes can be compared by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bahe_core.home import Home

TOLERANCE = 1e-4
"""Of vectors: atoms in batches of another size differ in their last bits."""


STAMPS = ("created_timestamp", "ingested_at", "quarantined_at")
"""Columns that tell when a row was written."""


COMPARED = {"runs": ("job",), "publications": ("deployment", "live_model_version")}
"""Tables of which only some columns are the same in every run; how much a run found left to do is not."""


Contents = dict[str, tuple[list[tuple[object, ...]], np.ndarray]]


def copy_of(home: Home, folder: Path) -> Home:
    """The home once more, as `home` in the folder."""
    return Home(Path(shutil.copytree(home.root, folder / "home")))


def contents(home: Home) -> Contents:
    """Every table of the lake in an order of its own: rows without stamps and vectors, and the vectors."""
    from bahe_lake.catalogue import columns, tables
    from bahe_lake.connection import lake
    from bahe_lake.sql import sql_identifier

    found: Contents = {}
    with lake(home) as connection:
        for table in sorted(tables(connection)):
            known = columns(connection, table)
            shown = [c for c in COMPARED.get(table, known) if c not in (*STAMPS, "embedding")]
            # Keys are among the rows, which put the vectors into an order.
            vector = "embedding" if "embedding" in known else "[]::FLOAT[]"
            rows = connection.execute(
                f"SELECT {', '.join(sql_identifier(c) for c in shown)}, {vector} FROM {table}"
                f" ORDER BY {', '.join(sql_identifier(c) for c in shown)}"
            ).fetchall()
            found[table] = ([row[:-1] for row in rows], np.array([row[-1] for row in rows], dtype=float))
    return found


def differences(found: Contents, expected: Contents) -> list[str]:
    """Tables that are not as they should be, in words; empty when all are."""
    wrong = [f"table {table} is there in one of them only" for table in found.keys() ^ expected.keys()]
    for table in sorted(found.keys() & expected.keys()):
        rows, vectors = found[table]
        expected_rows, expected_vectors = expected[table]
        if rows != expected_rows:
            differ = len(set(rows) ^ set(expected_rows)) if rows and _hashable(rows[0]) else "some"
            wrong.append(f"{table}: {len(rows)} rows for {len(expected_rows)}, {differ} of them others")
        elif not np.allclose(vectors, expected_vectors, rtol=0, atol=TOLERANCE):
            wrong.append(f"{table}: vectors differ")
    return wrong


def _hashable(row: tuple[object, ...]) -> bool:
    return not any(isinstance(value, list) for value in row)


def artifacts(home: Home) -> dict[str, Any]:
    """Tables of the frames and bytes of the models, by path; not what tells when or of which snapshot."""
    import pyarrow.parquet as pq

    found: dict[str, Any] = {}
    for path in sorted(home.frames.rglob("*.parquet")):
        found[str(path.relative_to(home.root))] = pq.read_table(path).replace_schema_metadata(None)
    for path in sorted(home.models.rglob("*")):
        if path.name in ("model.safetensors", "item_ids.json"):
            found[str(path.relative_to(home.root))] = path.read_bytes()
    return found
