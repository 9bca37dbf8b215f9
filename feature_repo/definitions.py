"""Entities, feature views and feature services.

Where a view gives no schema, Feast infers it from the lake: ids are integers or strings as the log
has them, and `user_timeline` has one length for each channel of the log.

Versions are join keys, so that vectors of two versions can never meet in one answer.
"""

from __future__ import annotations

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, ValueType
from feast.types import Array, Float32, Float64, Int64, String

from feast_ducklake.offline.source import DuckLakeSource

FOREVER = timedelta(0)


def _source(table: str, created: str = "created_timestamp") -> DuckLakeSource:
    return DuckLakeSource(name=table, table=table, created_timestamp_column=created)


# Ids are what the log has: Feast infers their type from the lake (and warns that it does).
user = Entity(name="user", join_keys=["user_id"], description="Who acts.")
item = Entity(name="item", join_keys=["item_id"], description="What is shown.")
atom = Entity(
    name="atom",
    join_keys=["atom_id"],
    value_type=ValueType.INT64,
    description="A distinct text of a channel (64-bit hash).",
)
encoder = Entity(
    name="encoder",
    join_keys=["encoder_version"],
    value_type=ValueType.STRING,
    description="Frozen weights, cut, pooling and template: one vector space.",
)
model = Entity(
    name="model",
    join_keys=["model_version"],
    value_type=ValueType.STRING,
    description="A training run: one vector space.",
)
deployment = Entity(
    name="deployment",
    join_keys=["deployment"],
    value_type=ValueType.STRING,
    description="Whatever asks which model answers.",
)

atomic_behavior_embedding = FeatureView(
    name="atomic_behavior_embedding",
    entities=[atom, encoder],
    ttl=FOREVER,
    schema=[Field(name="embedding", dtype=Array(Float32))],
    source=_source("atomic_behavior_embedding"),
    online=False,
    description="Pooled output of the frozen shallow layers, once per atom and encoder.",
)
user_timeline = FeatureView(
    name="user_timeline",
    entities=[user],
    ttl=FOREVER,
    source=DuckLakeSource(
        name="timeline_length",
        query="SELECT * EXCLUDE (recent_atoms) FROM lake.main.timeline_length",
        created_timestamp_column="created_timestamp",
    ),
    description="Behaviors so far, one length per channel: a pointer into the timeline.",
)
user_recent_atoms = FeatureView(
    name="user_recent_atoms",
    entities=[user],
    ttl=FOREVER,
    schema=[Field(name="recent_atoms", dtype=Array(Int64))],
    source=DuckLakeSource(
        name="recent_atoms",
        table="timeline_length",
        created_timestamp_column="created_timestamp",
    ),
    description="The latest atoms inline, for services that want them without the lake.",
)
user_stats = FeatureView(
    name="user_stats",
    entities=[user],
    ttl=FOREVER,
    schema=[
        Field(name="user_impressions", dtype=Int64),
        Field(name="user_clicks", dtype=Int64),
        Field(name="user_click_rate", dtype=Float64),
        Field(name="user_last_impression_us", dtype=Int64),
    ],
    source=_source("user_stats"),
    description="Impressions, clicks and smoothed click rate of the user so far.",
)
item_stats = FeatureView(
    name="item_stats",
    entities=[item],
    ttl=FOREVER,
    schema=[
        Field(name="item_impressions", dtype=Int64),
        Field(name="item_clicks", dtype=Int64),
        Field(name="item_click_rate", dtype=Float64),
        Field(name="item_last_impression_us", dtype=Int64),
    ],
    source=_source("item_stats"),
    description="Impressions (popularity), clicks and smoothed click rate of the item so far.",
)


def _window(entity: Entity, days: int) -> FeatureView:
    return FeatureView(
        name=f"{entity.name}_stats_{days}d",
        entities=[entity],
        ttl=FOREVER,
        schema=[
            Field(name=f"{entity.name}_impressions_{days}d", dtype=Int64),
            Field(name=f"{entity.name}_clicks_{days}d", dtype=Int64),
            Field(name=f"{entity.name}_click_rate_{days}d", dtype=Float64),
        ],
        source=_source(f"{entity.name}_stats_{days}d"),
        online=False,
        description=f"Impressions, clicks and smoothed click rate of the {entity.name}'s last {days} days.",
    )


def _behaviors(
    entities: list[Entity], window: str, description: str, what: str = "behaviors"
) -> FeatureView:
    view = "_".join([*(entity.name for entity in entities), what]) + (f"_{window}" if window else "")
    return FeatureView(
        name=view,
        entities=entities,
        ttl=FOREVER,
        source=_source(view, created=""),
        online=False,
        description=f"{description}, {f'last {window}' if window else 'so far'}.",
    )


def _by_channel(entity: Entity, window: str) -> FeatureView:
    return _behaviors([entity], window, f"Behaviors of the {entity.name} by channel")


def _of_pair(window: str) -> FeatureView:
    return _behaviors([user, item], window, "Behaviors of the user with the item")


def _of_pair_by_channel(window: str) -> FeatureView:
    return _behaviors([user, item], window, "Behaviors of the user with the item by channel", "channels")


user_stats_7d = _window(user, 7)
user_stats_30d = _window(user, 30)
item_stats_7d = _window(item, 7)
item_stats_30d = _window(item, 30)
# A user's behaviors of all time are the lengths in user_timeline.
user_behaviors_7d = _by_channel(user, "7d")
user_behaviors_30d = _by_channel(user, "30d")
item_behaviors = _by_channel(item, "")
item_behaviors_7d = _by_channel(item, "7d")
item_behaviors_30d = _by_channel(item, "30d")
user_item_behaviors = _of_pair("")
user_item_behaviors_7d = _of_pair("7d")
user_item_behaviors_30d = _of_pair("30d")
user_item_behaviors_90d = _of_pair("90d")
user_item_channels = _of_pair_by_channel("")
user_item_channels_7d = _of_pair_by_channel("7d")
user_item_channels_30d = _of_pair_by_channel("30d")
user_item_channels_90d = _of_pair_by_channel("90d")
item_attributes = FeatureView(
    name="item_attributes",
    entities=[item],
    ttl=FOREVER,
    source=_source("items", created=""),
    description="The item's text, atom and whatever other columns the log has.",
)
user_attributes = FeatureView(
    name="user_attributes",
    entities=[user],
    ttl=FOREVER,
    # A log without users has the table, empty and without further columns; Feast wants one to infer.
    source=DuckLakeSource(
        name="users",
        query="SELECT *, true AS user_listed FROM lake.main.users",
        created_timestamp_column="",
    ),
    online=False,
    description="Whatever columns the log's users have.",
)
user_embedding = FeatureView(
    name="user_embedding",
    entities=[user, model],
    ttl=FOREVER,
    schema=[
        Field(name="embedding", dtype=Array(Float32)),
        Field(name="behaviors", dtype=Int64),
        Field(name="seen_items", dtype=Array(String)),
    ],
    source=_source("user_embedding"),
    description="User vector from the deep layers; behaviors = 0 marks a user without history.",
)
item_embedding = FeatureView(
    name="item_embedding",
    entities=[item, model],
    ttl=FOREVER,
    schema=[Field(name="embedding", dtype=Array(Float32))],
    source=_source("item_embedding"),
    description="Item vector from text and ID.",
)
live_model = FeatureView(
    name="live_model",
    entities=[deployment],
    ttl=FOREVER,
    schema=[Field(name="live_model_version", dtype=String)],
    source=_source("publications"),
    description="The pointer: which model_version answers. Publishing flips it, all or nothing.",
)

ctr_training = FeatureService(
    name="ctr_training",
    features=[user_timeline, user_stats, item_stats],
    description="Point-in-time statistics and timeline lengths of an impression.",
)
ctr_training_windows = FeatureService(
    name="ctr_training_windows",
    features=[
        user_timeline,
        user_stats,
        item_stats,
        user_stats_7d,
        user_stats_30d,
        item_stats_7d,
        item_stats_30d,
        user_behaviors_7d,
        user_behaviors_30d,
        item_behaviors,
        item_behaviors_7d,
        item_behaviors_30d,
    ],
    description=(
        "The same, with statistics of the last 7 and 30 days and behaviors by channel; models of your own"
        " can read them."
    ),
)
ctr_online = FeatureService(
    name="ctr_online",
    features=[user_embedding, item_embedding[["embedding"]], user_stats, item_stats],
    description="What scoring a pair needs at request time.",
)
