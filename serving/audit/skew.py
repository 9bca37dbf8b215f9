"""How served values differ from those that training would have seen, and why they probably do.

Each cause is a way to compute what training did not see: earlier, a second off, by another model, without a
channel. Where it gives the value that was served, it is the likely cause.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bahe_core.errors import BadInput, NotReady
from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.connection import lake
from materialize.vectors.vector_columns import vector_matrix
from serving.audit.offline_truth import OfflineTruth, lengths_of

if TYPE_CHECKING:
    from bahe_models import Artifact

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]

FLOAT_TOLERANCE = 1e-4
"""Of the numbers of a vector, which depend in their last digits on what is computed beside it."""
PUBLISHES = 5
"""How many publishes before a request its values may be from to be recognised as stale."""
MOST_PUBLISHES = 20
"""Of all requests together, the newest."""
VECTORS = 200
"""Vectors that differ whose cause is looked for, of each entity."""
LOOKED_AT = 5_000
"""Rows with other values that differ whose cause is looked for."""
SHIFTS_US = (1_000_000, -1_000_000, 1)
"""A second late, a second early, and the instant itself included."""
EARLIER_US = tuple(-hours * 3_600_000_000 for hours in (1, 24, 48, 168))

STALE, FRESHER, SHIFTED = "stale", "fresher than training", "shifted by a second"
OTHER_VERSION, OTHER_DEFAULT = "other version", "other default"
MISSING, EXTRA, UNKNOWN = "missing online", "extra online", "unknown"
WRONG_ENCODER, NOT_LOOKED_AT = "wrong encoder", "not looked at"


def lost(channel: str) -> str:
    """The cause that behaviors of a channel do not arrive."""
    return f"channel {channel} lost"


@dataclass(frozen=True)
class Cause:
    """Values that would be served if this were so."""

    name: str
    values: dict[str, list[Any]]
    """By `view:feature`, for the rows under suspicion."""
    applies: npt.NDArray[np.bool_]
    """To which of these rows."""


def equal_values(served: Any, offline: Any) -> bool:
    """Exactly; NaN and None are both no value."""
    if _none(served) or _none(offline):
        return _none(served) and _none(offline)
    return bool(served == offline)


def equal_vectors(served_NV: Vectors, offline_NV: Vectors) -> npt.NDArray[np.bool_]:
    """Which rows are equal within FLOAT_TOLERANCE; a row with NaN equals only such a row [N]."""
    close = np.isclose(served_NV, offline_NV, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE, equal_nan=True)
    return np.asarray(close.all(axis=1), dtype=np.bool_)


def largest_difference(served: Sequence[Any], offline: Sequence[Any]) -> float | None:
    """Of numbers, and of the numbers of vectors; None where there are no two to compare."""
    pairs = _numbers(served, offline)
    for a, b in zip(served, offline, strict=True):
        if _vector(a) and _vector(b) and len(a) == len(b):
            pairs += _numbers(a, b)
    return max((abs(a - b) for a, b in pairs), default=None)


def smape(served: Sequence[Any], offline: Sequence[Any]) -> float | None:
    """Symmetric mean absolute percentage error: mean of |a - b| / ((|a| + |b|) / 2), 0 to 2."""
    pairs = _numbers(served, offline)
    if not pairs:
        return None
    return sum(0.0 if a == b else 2 * abs(a - b) / (abs(a) + abs(b)) for a, b in pairs) / len(pairs)


def edit_distance(served: Sequence[Any], offline: Sequence[Any]) -> int:
    """Levenshtein's: behaviors to add, drop or change to make one history the other."""
    row = list(range(len(offline) + 1))
    for i, one in enumerate(served, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(offline, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def value_causes(
    truth: OfflineTruth,
    references: Sequence[str],
    rows: Rows,
    served_at: Sequence[datetime],
    published: Sequence[runs.Run],
) -> list[Cause]:
    """What would have been served to these rows for each reason that the lake can tell, likeliest first.

    Rows are few (LOOKED_AT), since each reason is a join of its own. `published` are runs of publish, the
    newest first.
    """
    everyone = np.ones(len(rows), dtype=np.bool_)
    causes = [
        Cause(SHIFTED, truth.values(references, rows, shift_us=shift), everyone) for shift in SHIFTS_US
    ]
    moments = [served_at[i] for i in rows]
    for run in published_before(moments, published):
        applies = np.array([run.finished <= moment for moment in moments])
        try:
            then = truth.values(references, rows, as_of=run.snapshot_read)
            causes.append(Cause(STALE, then, applies))
            whole = truth.values(references, rows, as_of=run.snapshot_read, all_of_it=True)
        except (BadInput, NotReady, duckdb.BinderException, duckdb.CatalogException):
            # That snapshot has been forgotten, or lacks a column that views are keyed by.
            continue
        causes.append(Cause(FRESHER, whole, applies))
    for shift in EARLIER_US:
        causes.append(Cause(STALE, truth.values(references, rows, shift_us=shift), everyone))
    return causes


def likely_causes(
    reference: str,
    served: Sequence[Any],
    offline: Sequence[Any],
    rows: Rows,
    suspects: Rows,
    causes: Sequence[Cause],
) -> list[str]:
    """The likely cause for each of the rows in which a feature differs."""
    place = {row: position for position, row in enumerate(suspects.tolist())}
    view, _, feature = reference.partition(":")
    channel = feature.removeprefix("length_") if view == "user_timeline" else None
    # One value wherever training has none is a default.
    extra = [served[i] for i in rows.tolist() if _none(offline[i]) and not isinstance(served[i], list)]
    one_default = len(extra) > 1 and len(set(extra)) == 1
    # A channel is lost where nobody, of rows that are equal either, has any behavior of it.
    gone = channel is not None and not any(served) and any(value == 0 for value in served)
    named = []
    for row in rows.tolist():
        said, position = served[row], place.get(row)
        if position is None:
            named.append(NOT_LOOKED_AT)
        elif gone and not _none(said):
            named.append(lost(str(channel)))
        else:
            fitting = (
                cause.name
                for cause in causes
                if cause.applies[position] and equal_values(said, cause.values[reference][position])
            )
            named.append(next(fitting, "") or _without_cause(said, offline[row], one_default))
    return named


def _without_cause(served: Any, offline: Any, one_default: bool) -> str:
    if _none(offline):
        return OTHER_DEFAULT if one_default else EXTRA
    return MISSING if _none(served) else UNKNOWN


def vector_causes(served_NV: Vectors, would_be: Iterable[tuple[str, Vectors]]) -> list[str]:
    """The likely cause for each of some vectors [N, V] that differ, the first that gives what was served.

    `would_be` has the causes with the vectors that they would give; it is read as far as it is needed.
    """
    named = np.where(np.isnan(served_NV).any(axis=1), MISSING, UNKNOWN).astype(object)
    for cause, vectors_NV in would_be:
        named[equal_vectors(served_NV, vectors_NV) & (named == UNKNOWN)] = cause
        if not (named == UNKNOWN).any():
            break
    return [str(cause) for cause in named]


def user_vectors_if(
    home: Home,
    connection: duckdb.DuckDBPyConnection,
    truth: OfflineTruth,
    artifact: Artifact,
    length_NC: npt.NDArray[np.int64],
    rows: Rows,
    published: Sequence[runs.Run],
) -> Iterator[tuple[str, Vectors]]:
    """Vectors of the users of these rows for each cause, the likeliest first.

    `length_NC` are the lengths that training sees, of these rows; `published` the publishes before them.
    """
    channels = artifact.dense.channels
    yield from _of_other_versions(connection, truth, artifact, "user", rows)
    for place, channel in enumerate(channels if len(channels) > 1 else ()):
        without = length_NC.copy()
        without[:, place] = 0
        yield lost(channel), truth.user_vectors(artifact, without, rows)
    references = [f"user_timeline:length_{channel}" for channel in channels]
    for run in published:
        try:
            for cause, whole in ((STALE, False), (FRESHER, True)):
                known = truth.values(references, rows, as_of=run.snapshot_read, all_of_it=whole)
                with lake(home, as_of=run.snapshot_read) as then:
                    lengths = lengths_of(known, channels, len(rows))
                    yield cause, truth.user_vectors(artifact, lengths, rows, connection=then)
        except (BadInput, NotReady):  # that snapshot has been forgotten
            continue
    for shift in EARLIER_US:
        known = truth.values(references, rows, shift_us=shift)
        yield STALE, truth.user_vectors(artifact, lengths_of(known, channels, len(rows)), rows)
    for encoder in _other_encoders(connection, artifact):
        with suppress(BadInput, NotReady):  # of another width, or not complete
            yield (
                WRONG_ENCODER,
                truth.user_vectors(artifact, length_NC, rows, encoder_version=encoder),
            )


def item_vectors_if(
    connection: duckdb.DuckDBPyConnection, truth: OfflineTruth, artifact: Artifact, rows: Rows
) -> Iterator[tuple[str, Vectors]]:
    """Vectors of the items of these rows for each cause, the likeliest first."""
    yield from _of_other_versions(connection, truth, artifact, "item", rows)
    yield FRESHER, truth.item_vectors(artifact, rows, latest_text=True)
    for encoder in _other_encoders(connection, artifact):
        with suppress(BadInput, NotReady):
            yield WRONG_ENCODER, truth.item_vectors(artifact, rows, encoder_version=encoder)


def _other_encoders(connection: duckdb.DuckDBPyConnection, artifact: Artifact) -> list[str]:
    rows = connection.execute(
        "SELECT DISTINCT encoder_version FROM atomic_behavior_embedding WHERE encoder_version <> ?",
        [artifact.encoder_version],
    ).fetchall()
    return [row[0] for row in rows]


def _of_other_versions(
    connection: duckdb.DuckDBPyConnection,
    truth: OfflineTruth,
    artifact: Artifact,
    entity: str,
    rows: Rows,
) -> Iterator[tuple[str, Vectors]]:
    """The lake's vectors of these rows' users or items under each other model; NaN where there is none."""
    width = artifact.vector_width
    table = f"{entity}_embedding"
    versions = connection.execute(
        f"SELECT DISTINCT model_version FROM {table} WHERE model_version <> ?", [artifact.model_version]
    ).fetchall()
    keys = pa.table({"key": truth.keys(entity, rows), "number": np.arange(len(rows), dtype=np.int64)})
    for (version,) in versions:
        connection.register("audited", keys)
        found = connection.execute(
            f"""
            SELECT number, embedding
            FROM audited JOIN {table} e ON e.{entity}_id = audited.key
            WHERE model_version = ? AND len(embedding) = {width}
            """,
            [version],
        ).to_arrow_table()
        connection.unregister("audited")
        if len(found):
            vectors: Vectors = np.full((len(rows), width), np.nan, dtype=np.float32)
            vectors[found["number"].to_numpy()] = vector_matrix(found["embedding"])
            yield OTHER_VERSION, vectors


def published_before(moments: Sequence[datetime], published: Sequence[runs.Run]) -> list[runs.Run]:
    """The last PUBLISHES before each moment; of all together the MOST_PUBLISHES newest, newest first."""
    finished = [run.finished for run in published][::-1]
    counts = {bisect_right(finished, moment) for moment in moments}
    wanted = {count - back for count in counts for back in range(PUBLISHES)}
    newest_first = sorted((count for count in wanted if count > 0), reverse=True)
    return [published[len(published) - count] for count in newest_first[:MOST_PUBLISHES]]


def _numbers(served: Sequence[Any], offline: Sequence[Any]) -> list[tuple[float, float]]:
    return [
        (float(a), float(b))
        for a, b in zip(served, offline, strict=True)
        if isinstance(a, int | float)
        and isinstance(b, int | float)
        and not (math.isnan(a) or math.isnan(b))
    ]


def _vector(value: Any) -> bool:
    """A history is a list of whole numbers."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], float)


def _none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
