"""Requests and answers of the HTTP API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from serving.http.fields import (
    FEATURES,
    IDS,
    PUSHED,
    ROWS,
    SOUGHT,
    At,
    Context,
    Id,
    Ids,
    K,
    Moment,
    Name,
    Text,
)


class Asked(BaseModel):
    """A request of /v1: a field that it does not have is refused, since it was meant to do something."""

    model_config = ConfigDict(extra="forbid")


class ScoreRequest(BaseModel):
    """Which items to score for which user."""

    user_id: Id
    item_ids: Ids
    at: At = None
    context: Context


class ScoredItem(BaseModel):
    """One item of an answer."""

    item_id: str | int
    text: str
    probability: float


class ScoreAnswer(BaseModel):
    """Scores, best first."""

    user_id: str | int
    model_version: str
    cold: bool
    """The user has no history; the empty state answered."""
    scores: list[ScoredItem]


class BehaviorRequest(BaseModel):
    """One thing that a user did, as a row of the log's behaviors."""

    user_id: Id
    channel: Name
    text: Text
    event_timestamp: Moment
    """UTC unless it says otherwise; not before the user's latest behavior, nor in the future."""
    item_id: Id | None = None
    """The item acted on, which is then recommended no more."""
    event_id: Name | None = None
    """The sender's name for the event. Sent again, it counts once; so does one of the same content."""


class BehaviorAnswer(BaseModel):
    """The user after the behavior."""

    user_id: str | int
    model_version: str
    behaviors: int


class ImpressionRow(Asked):
    """An item that was shown to a user, as a row of the log's impressions."""

    impression_id: Id
    """As the log will have it: sent again, it counts once."""
    user_id: Id
    item_id: Id
    event_timestamp: Moment
    """UTC unless it says otherwise."""


class ImpressionsRequest(Asked):
    """Impressions, such as those of one page."""

    impressions: Annotated[list[ImpressionRow], Field(min_length=1, max_length=PUSHED)]


class ClickRow(Asked):
    """A click on an impression that was sent or is published."""

    impression_id: Id
    event_timestamp: Moment
    """When it was clicked; UTC unless it says otherwise."""


class ClicksRequest(Asked):
    """Clicks."""

    clicks: Annotated[list[ClickRow], Field(min_length=1, max_length=PUSHED)]


class RefusedRow(BaseModel):
    """A row that was not taken in."""

    row: int
    """Its place in the request, from 0."""
    detail: str


class TakenInAnswer(BaseModel):
    """What became of the rows; those that are refused leave the others as they are."""

    new: int
    known: int
    """Sent before, or published: they count once."""
    refused: list[RefusedRow]


class FeaturesAnswer(BaseModel):
    """What the online store holds of a user."""

    user_id: str | int
    model_version: str
    cold: bool
    behaviors: int
    statistics: dict[str, float | str | None]
    vectors: dict[str, list[float] | None]
    """Those of `features.vectors` that are the user's, by `view:feature`."""
    embedding: list[float]


class ScoreItemsRequest(Asked):
    """Which items to score for which user."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 1, "item_ids": [10, 11], "context": {}}]}
    )

    user_id: Id
    item_ids: Ids
    at: At = None
    context: Context
    unknown_user: Annotated[
        Literal["empty", "refuse"],
        Field(
            description="A user who is not known is one without history (`empty`), or gets 404 (`refuse`)."
        ),
    ] = "empty"


class ItemAnswer(BaseModel):
    """One item of the request."""

    item_id: str | int
    status: Literal["ok", "unknown"]
    probability: float | None


class UserScores(BaseModel):
    """A user's scores by item, in the order of the request."""

    user_id: str | int
    cold: bool
    """The user has no history, or is not known; the empty state answered."""
    items: list[ItemAnswer]


class ScoreItemsAnswer(UserScores):
    """The scores, and the model that they are of."""

    model_version: str


class ScoreBatchRequest(Asked):
    """Which items to score for which users."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"requests": [{"user_id": 1, "item_ids": [10, 11]}, {"user_id": 2, "item_ids": [11]}]}
            ]
        }
    )

    requests: Annotated[
        list[ScoreItemsRequest],
        Field(
            min_length=1,
            max_length=ROWS,
            description=f"Each as /v1/score takes it; together at most {IDS:,} items.",
        ),
    ]

    @model_validator(mode="after")
    def _not_too_many(self) -> ScoreBatchRequest:
        pairs = sum(len(one.item_ids) for one in self.requests)
        if pairs > IDS:
            raise ValueError(f"{pairs:,} items are asked for together, and {IDS:,} are the most")
        return self


class ScoreBatchAnswer(BaseModel):
    """Scores of each request, in their order, all of one model."""

    model_version: str
    answers: list[UserScores]


class RecommendRequest(Asked):
    """How many items to recommend to which user."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"user_id": 1, "k": 10, "context": {}}]})

    user_id: Id
    k: Annotated[StrictInt, Field(ge=1, le=K)] = 10
    include_seen: StrictBool = False
    """Also items that the user has acted on."""
    at: At = None
    context: Context
    unknown_user: Literal["empty", "refuse"] = "empty"


class SimilarItemAnswer(BaseModel):
    """An item like the one asked about."""

    item_id: str | int
    text: str
    cosine: float
    """Of the two item vectors under the live model; of the two texts' where a text was asked about."""


class SimilarItemsAnswer(BaseModel):
    """Items like one, most alike first."""

    item_id: str | int
    model_version: str
    items: list[SimilarItemAnswer]


class SimilarUserAnswer(BaseModel):
    """A user like the one asked about."""

    user_id: str | int
    cosine: float
    """Of the two user vectors under the live model, standardised."""


class SimilarUsersAnswer(BaseModel):
    """Users like one, most alike first."""

    user_id: str | int
    model_version: str
    users: list[SimilarUserAnswer]


class SimilarAtomAnswer(BaseModel):
    """An atomic behavior like what was asked about."""

    atom_id: int
    channel: str
    text: str
    cosine: float
    """Of the two texts' vectors by the live model's encoder, standardised."""


class SimilarAtomsAnswer(BaseModel):
    """Atomic behaviors like one, most alike first."""

    atom_id: int
    model_version: str
    atoms: list[SimilarAtomAnswer]


class SimilarToTextRequest(Asked):
    """Which text to look for."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "Star Wars (1977), Action, Sci-Fi", "k": 10}]}
    )

    text: Annotated[StrictStr, Field(min_length=1, max_length=SOUGHT)]
    """In the words of the log's texts; beyond `encoder.max_tokens` it is not read."""
    k: Annotated[StrictInt, Field(ge=1, le=K)] = 10
    """So many items, and so many behaviors."""


class SimilarToTextAnswer(BaseModel):
    """Items and atomic behaviors whose texts are like one, most alike first."""

    model_version: str
    items: list[SimilarItemAnswer]
    atoms: list[SimilarAtomAnswer]


class FeaturesRequest(Asked):
    """Which features of which entities, as Feast's /get-online-features has it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"features": ["item_stats:item_click_rate"], "entities": {"item_id": [10, 11]}}]
        },
    )

    features: Annotated[list[Name], Field(min_length=1, max_length=FEATURES)] | None = None
    """As `view:feature`."""
    feature_service: Name | None = None
    entities: Annotated[
        dict[Name, Annotated[list[Id], Field(min_length=1, max_length=ROWS)]],
        Field(min_length=1, max_length=20),
    ]
    """A column for each join key; `model_version` is the live one where it is needed and left out."""
    full_feature_names: StrictBool = False

    @model_validator(mode="after")
    def _whole(self) -> FeaturesRequest:
        if (self.features is None) == (self.feature_service is None):
            raise ValueError("give either `features` or `feature_service`")
        if len({len(column) for column in self.entities.values()}) > 1:
            raise ValueError("the columns of `entities` differ in length")
        return self


class FeastRequest(FeaturesRequest):
    """The same from Feast's clients, which send further fields."""

    model_config = ConfigDict(extra="ignore")


class FeatureRows(BaseModel):
    """Rows of features, as Feast's clients send them; further fields of theirs do nothing here."""

    df: Annotated[
        dict[Name, Annotated[list[Any], Field(min_length=1, max_length=ROWS)]],
        Field(
            min_length=1,
            max_length=FEATURES,
            description="A column for each join key, feature and time of the view; times are in ISO 8601.",
        ),
    ]
    allow_registry_cache: StrictBool = True
    """False reads the registry anew, whatever its file's time says."""

    @model_validator(mode="after")
    def _whole(self) -> FeatureRows:
        if len({len(column) for column in self.df.values()}) > 1:
            raise ValueError("the columns of `df` differ in length")
        return self


class PushRequest(FeatureRows):
    """What to push to which of the team's push sources."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "push_source_name": "basket_pushed",
                    "df": {
                        "user_id": [1],
                        "basket_value": [25.5],
                        "event_timestamp": ["2026-05-01T12:00:00Z"],
                    },
                }
            ]
        }
    )

    push_source_name: Name
    to: Annotated[
        Literal["online", "offline", "online_and_offline"],
        Field(description="Only `online` is taken: a service does not write to the lake."),
    ] = "online"


class WriteRequest(FeatureRows):
    """What to write to which of the team's views."""

    feature_view_name: Name


class ColumnsAnswer(BaseModel):
    """Features by column, in the order of the entities; null where nothing is stored."""

    model_version: str
    """The live one."""
    columns: dict[str, list[Any]]
    """Of the features; the join keys are those of the request."""


class FeastNames(BaseModel):
    """Which features an answer of Feast's is of."""

    feature_names: list[str]
    """Join keys first."""


class FeastColumn(BaseModel):
    """One of them, in the order of the entities."""

    values: list[Any]
    statuses: list[str]
    """Feast's `FieldStatus`: PRESENT, NOT_FOUND, NULL_VALUE …"""
    event_timestamps: list[str]


class FeastAnswer(BaseModel):
    """Features as `feast serve` has them."""

    metadata: FeastNames
    results: list[FeastColumn]


class UserAnswer(FeaturesAnswer):
    """A user's state under the live model."""

    seen_items: list[str]
    """Items that are recommended only on request."""


class Refusal(BaseModel):
    """Why there is no answer, in one sentence."""

    detail: str
    request_id: str
