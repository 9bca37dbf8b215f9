"""What each of the four gates checks, table by table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from datetime import timedelta
from typing import Any

from bahe_lake.blank import blank
from bahe_lake.sql import AT_ONCE, sql_identifier, sql_literal
from validation.checks import (
    Check,
    each_present,
    exists,
    no_nulls,
    one_of,
    row_count,
    unique,
)
from validation.leaks import history_leaks, label_leaks

Parameters = Mapping[str, Any]

Columns = Mapping[str, AbstractSet[str]]
"""The columns that each logical table has."""

CLOCK_TOLERANCE = timedelta(days=1)
"""How far ahead of this machine's clock an event may be."""


_INGEST_COLUMNS = {
    "behaviors": ("user_id", "channel", "atom_id", "event_timestamp"),
    "impressions": ("impression_id", "user_id", "item_id", "event_timestamp", "clicked"),
    "items": ("item_id", "atom_id", "text", "event_timestamp"),
    "atoms": ("atom_id", "channel", "text", "first_seen"),
    "user_timeline": ("user_id", "channel", "position", "atom_id", "event_timestamp"),
    **{
        f"{entity}_stats": (
            f"{entity}_id",
            "event_timestamp",
            *(f"{entity}_{what}" for what in ("impressions", "clicks", "click_rate")),
        )
        for entity in ("user", "item")
    },
}

_FRAME_KEYS = ("impression_id", "user_id", "item_id", "event_timestamp", "clicked", "split")

_VECTOR_COLUMNS = ("embedding", "event_timestamp", "created_timestamp")


def required(gate: str, parameters: Parameters) -> dict[str, tuple[str, ...]]:
    """The logical tables that a gate reads, and the columns that each must have."""
    if gate == "ingest":
        return {**_INGEST_COLUMNS, "ingested": ("table_name", "read", "broken")}
    if gate == "encode":
        vectors = ("atom_id", "encoder_version", *_VECTOR_COLUMNS)
        return {"atoms": ("atom_id",), "atomic_behavior_embedding": vectors}
    if gate == "frame":
        lengths = tuple(f"length_{channel}" for channel in parameters["channels"])
        return {
            "frame": (*_FRAME_KEYS, "user_impressions", *lengths),
            "impressions": _INGEST_COLUMNS["impressions"],
            "user_timeline": ("user_id", "channel", "event_timestamp"),
        }
    if gate == "embed":
        return {
            f"{entity}_embedding": (f"{entity}_id", "model_version", *_VECTOR_COLUMNS)
            for entity in ("user", "item")
        }
    raise ValueError(f"no gate is called {gate!r}: use one of {', '.join(SUITES)}")


def _ingest(parameters: Parameters, _: Columns) -> list[Check]:
    def rule(table: str, column: str, text: str, counted: str, key: str, why: str) -> Check:
        example = tuple(dict.fromkeys((key, *column.split(", "))))
        return Check(
            table=table,
            column=column,
            rule=text,
            source=f"${table}",
            counted=counted,
            example=example,
            why=why,
        )

    latest = parameters["latest"]
    checks: list[Check] = []
    for table, names in _INGEST_COLUMNS.items():
        key, time = names[0], "first_seen" if table == "atoms" else "event_timestamp"
        others = [name for name in names if name not in {key, "text"} and "_click" not in name]
        identity = (key, time)
        checks += [row_count(table), *no_nulls(table, [key, *others], key=identity)]
        checks.append(
            rule(
                table,
                time,
                f"must lie between 1970-01-02 and {latest:%Y-%m-%d %H:%M}",
                f"{time} < TIMESTAMPTZ '1970-01-02 00:00:00+00' OR {time} > {sql_literal(latest)}",
                key,
                "Seconds read as milliseconds, or the reverse, put events in 1970 or far ahead.",
            )
        )
    # An item's rows are its versions in time.
    for table, unique_key in (
        ("impressions", ["impression_id"]),
        ("items", ["item_id", "event_timestamp"]),
        ("atoms", ["atom_id"]),
    ):
        checks.append(unique(table, unique_key))
    for table, key in (("items", "item_id"), ("atoms", "atom_id")):
        no_text = f"text IS NULL OR {blank('text')}"
        why = "The model reads text; a blank gives it nothing to tell one item from another."
        checks.append(rule(table, "text", "must not be blank", no_text, key, why))
    for table in ("behaviors", "atoms", "user_timeline"):
        key = _INGEST_COLUMNS[table][0]
        # The texts of items are atoms too, in a channel of their own.
        allowed = [*parameters["channels"], *(["item"] if table == "atoms" else [])]
        checks.append(one_of(table, "channel", dict.fromkeys(allowed), key))
    checks += [
        unique("atoms", ["channel", "text"], rule="must belong to one atom per channel"),
        one_of("impressions", "clicked", (0, 1), "impression_id"),
        *each_present("impressions", "clicked", (0, 1)),
        exists("behaviors", "atom_id", "atoms"),
        exists("items", "atom_id", "atoms"),
        exists("user_timeline", "atom_id", "atoms"),
        exists("impressions", "item_id", "items"),
        _quarantine(parameters["max_share"]),
        *_timeline(),
    ]
    for entity in ("user", "item"):
        table, key = f"{entity}_stats", f"{entity}_id"
        clicks, shown, rate = f"{entity}_clicks", f"{entity}_impressions", f"{entity}_click_rate"
        impossible = f"{clicks} IS NULL OR {clicks} < 0 OR {clicks} > {shown}"
        outside = f"{rate} IS NULL OR NOT ({rate} > 0 AND {rate} < 1)"
        text = f"must lie between 0 and {shown}"
        checks += [
            rule(table, clicks, text, impossible, key, "Nobody clicks what was not shown."),
            rule(
                table,
                rate,
                "must lie strictly between 0 and 1",
                outside,
                key,
                "The rate enters the model as a logit, which is infinite at 0 and at 1.",
            ),
        ]
    return checks


def _quarantine(max_share: float) -> Check:
    return Check(
        table="ingested",
        column="broken",
        rule=f"must be at most the share {max_share:g} of the rows read of a table",
        source="$ingested",
        counted=f"broken > {max_share} * read",
        example=("table_name", "broken", "read"),
        why="A few bad rows are set aside; many mean that the log is not what it was.",
    )


def _timeline() -> list[Check]:
    lane = ("user_id", "channel")
    why = "A length in a training frame is a pointer into the timeline: the k first positions."
    bounds = """(
        SELECT
            user_id,
            channel,
            count(*) AS entries,
            min(position) AS first_position,
            max(position) AS last_position
        FROM $user_timeline
        GROUP BY user_id, channel
    )"""
    order = """(
        SELECT
            user_id,
            channel,
            position,
            event_timestamp,
            lag(event_timestamp) OVER (PARTITION BY user_id, channel ORDER BY position) AS previous
        FROM $user_timeline
    )"""
    counts = """(
        SELECT
            user_id, channel, coalesce(behaviors, 0) AS behaviors, coalesce(entries, 0) AS entries
        FROM (SELECT user_id, channel, count(*) AS behaviors FROM $behaviors GROUP BY ALL)
        FULL JOIN (SELECT user_id, channel, count(*) AS entries FROM $user_timeline GROUP BY ALL)
            USING (user_id, channel)
    )"""

    def rule(column: str, text: str, source: str, counted: str, *example: str) -> Check:
        return Check(
            table="user_timeline",
            column=column,
            rule=text,
            source=source,
            counted=counted,
            example=(*lane, *example),
            why=why,
        )

    return [
        rule(
            "position",
            "must run from 0 without a gap for each user and channel",
            bounds,
            "first_position <> 0 OR last_position <> entries - 1",
            "entries",
            "first_position",
            "last_position",
        ),
        unique("user_timeline", [*lane, "position"]),
        rule(
            "event_timestamp",
            "must not fall as position grows",
            order,
            "event_timestamp < previous",
            "position",
            "event_timestamp",
        ),
        rule(
            "rows",
            "must equal the rows of behaviors for each user and channel",
            counts,
            "behaviors <> entries",
            "behaviors",
            "entries",
        ),
    ]


def _encode(parameters: Parameters, _: Columns) -> list[Check]:
    version = sql_literal(parameters["encoder_version"])
    encoded = f"(SELECT atom_id FROM $atomic_behavior_embedding WHERE encoder_version = {version})"
    return [
        row_count("atoms"),
        Check(
            table="atoms",
            column="atom_id",
            rule="must have a vector under this encoder_version",
            source=f"(SELECT atom_id FROM $atoms ANTI JOIN {encoded} USING (atom_id))",
            counted="true",
            example=("atom_id",),
            why="An atom without a vector leaves a hole in every timeline that mentions it.",
        ),
        *_vectors("atomic_behavior_embedding", "atom_id", "encoder_version", parameters),
    ]


def _embed(parameters: Parameters, _: Columns) -> list[Check]:
    checks: list[Check] = []
    version = sql_literal(parameters["model_version"])
    for entity, expected in (("user", "users"), ("item", "items")):
        table = f"{entity}_embedding"
        rows = f"(SELECT 1 AS one FROM ${table} WHERE model_version = {version})"
        checks += [
            row_count(table, rows=int(parameters[expected]), source=rows),
            *_vectors(table, f"{entity}_id", "model_version", parameters),
        ]
    return checks


def _vectors(table: str, key: str, version: str, parameters: Parameters) -> list[Check]:
    width, version_value = int(parameters["width"]), sql_literal(parameters[version])
    of_version = f"""(
        SELECT {key}, embedding::FLOAT[] AS embedding FROM ${table} WHERE {version} = {version_value}
    )"""
    # A dot product is the fastest pass over a vector, and shows NaN, infinity and zero alike. It
    # refuses nulls, so a vector that is or holds a null has no norm here.
    rows = f"""(
        SELECT
            *,
            CASE
                WHEN list_position(embedding, NULL) IS NULL THEN list_dot_product(embedding, embedding)
            END AS squared_norm
        FROM {of_version}
    )"""
    compared = f"""(
        SELECT
            (SELECT count(*) FROM {of_version}) AS vectors,
            EXISTS (
                SELECT 1
                FROM {of_version}, (SELECT embedding AS first FROM {of_version} LIMIT 1)
                WHERE embedding <> first
            ) AS varied
    )"""

    def rule(text: str, counted: str, *example: str, source: str = rows) -> Check:
        return Check(
            table=table,
            column="embedding",
            rule=text,
            source=source,
            counted=counted,
            example=example,
            why="A broken vector turns the loss, or every score it enters, into nonsense.",
        )

    short = f"len(embedding) <> {width} OR squared_norm IS NULL"
    return [
        *no_nulls(table, [key], source=rows),
        unique(table, [key], source=of_version, rule=f"must appear once under this {version}"),
        rule(f"must hold {width} numbers", short, key, "len(embedding)"),
        rule("must be finite", "NOT isfinite(squared_norm)", key),
        rule("must have a norm above 0", "squared_norm = 0", key),
        rule(
            "must not be the same in every row",
            "vectors > 1 AND NOT varied",
            "vectors",
            source=compared,
        ),
    ]


def _frame(parameters: Parameters, columns: Columns) -> list[Check]:
    bounded = """(
        SELECT *
        FROM $frame
        CROSS JOIN (
            SELECT
                min(event_timestamp) FILTER (WHERE split = 'validation') AS first_validation,
                min(event_timestamp) FILTER (WHERE split = 'test') AS first_test
            FROM $frame
        )
    )"""
    key = ("impression_id", "event_timestamp")
    checks = [
        row_count("frame", rows=int(parameters["rows"])),
        *no_nulls("frame", _FRAME_KEYS, key=key),
        unique("frame", ["impression_id"]),
        one_of("frame", "clicked", (0, 1), "impression_id"),
        one_of("frame", "split", ("train", "validation", "test"), "impression_id"),
        *each_present("frame", "split", ("train", "validation", "test")),
    ]
    for earlier, later in (("train", "validation"), ("validation", "test")):
        checks.append(
            Check(
                table="frame",
                column="event_timestamp",
                rule=f"must not be later in {earlier} than the first row of {later}",
                source=bounded,
                counted=f"split = '{earlier}' AND event_timestamp > first_{later}",
                example=(*key, f"first_{later}"),
                why="A model that trained on the future is measured on what it has already seen.",
            )
        )
    for channel in parameters["channels"]:
        length = sql_identifier(f"length_{channel}")
        checks.append(
            Check(
                table="frame",
                column=f"length_{channel}",
                rule="must be null or at least 0",
                source="$frame",
                counted=f"{length} < 0",
                example=("impression_id", length),
                why="Null says no history; a negative length points before the timeline.",
            )
        )
    freshness = parameters.get("freshness", "live")
    return [
        *checks,
        *history_leaks(parameters["channels"], freshness),
        *label_leaks(columns["frame"], freshness, parameters.get("label_time", AT_ONCE)),
    ]


SUITES: dict[str, Callable[[Parameters, Columns], list[Check]]] = {
    "ingest": _ingest,
    "encode": _encode,
    "frame": _frame,
    "embed": _embed,
}
