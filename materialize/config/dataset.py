"""`dataset.yaml`: which files hold the log, what their columns mean, and how to model them."""

from __future__ import annotations

import codecs
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bahe_core.errors import NotReady
from bahe_core.files import replace_atomically
from bahe_core.home import Home
from bahe_core.lake_location import LakeConfig
from bahe_lake.sql import AT_ONCE
from bahe_models import BackboneConfig, EncoderConfig, ModelConfig, TrainingConfig, WindowConfig
from materialize.config.problems import Place, problems_of, read_yaml, refusal


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClickRule(_Section):
    """Turns a rating (or any number) into a click."""

    column: str
    at_least: Annotated[float, Field(allow_inf_nan=False)]


NamedType = Literal["text", "integer", "number", "boolean", "time"]

FRESHNESS = r"nightly( ([01]\d|2[0-3]):[0-5]\d)?|hourly|live"


def _freshness(value: object) -> object:
    """Version 0.1 said daily and event. Raises ValueError when it is none."""
    if not isinstance(value, str):
        return value
    value = {"daily": "nightly", "event": "live"}.get(value, value)
    value = "nightly" if value == "nightly 00:00" else value
    if not re.fullmatch(FRESHNESS, value):
        raise ValueError(
            f"{value} is none; write nightly, nightly with the time of the publish in UTC (nightly 02:30),"
            " hourly or live"
        )
    return value


def _text_encoding(name: str) -> str:
    try:
        codecs.getincrementaldecoder(name)
        "a".encode(name)  # not of those that turn bytes into bytes, such as zip
    except LookupError:
        raise ValueError(
            f"{name} is no encoding of text; write utf-8, utf-16, latin-1, cp1252, gb18030 or another that"
            " Python knows"
        ) from None
    return "utf-8" if codecs.lookup(name).name == "utf-8" else name


class CsvFormat(_Section):
    """How CSV files are written. Nothing of it is guessed from what the files look like."""

    encoding: Annotated[str, AfterValidator(_text_encoding)] = "utf-8"
    """utf-8, utf-16, latin-1, cp1252, shift_jis, gb18030 or another that Python's codecs know."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Between two values; a comma unless given, a tab in .tsv files."""
    quote: Annotated[str, Field(min_length=1, max_length=1)] = '"'
    """Around a value that holds a delimiter or a line end; doubled, it stands for itself."""
    decimal: Literal[".", ","] = "."
    """The decimal mark of numbers."""


class Table(_Section):
    """One input table: files or a query, and the names its columns have there."""

    files: str | None = None
    """Path or glob of CSV or Parquet files, relative to dataset.yaml."""
    sql: str | None = None
    """A DuckDB query; file names in it are relative to dataset.yaml."""
    columns: dict[str, str | ClickRule] = Field(default_factory=dict)
    """bahe's column name: the name in the source. Only columns named differently need an entry."""
    timestamp_unit: Literal["s", "ms", "us"] = "s"
    """Unit of numeric timestamps (since 1970, UTC). Text and datetime columns need none."""
    channel: str | None = None
    """Behaviors only: the channel of every row, for a source without a channel column."""
    timestamp_format: str | None = None
    """How times are written in text when not in ISO 8601: `%d/%m/%Y %H:%M` and the like (UTC unless it has
    `%z`)."""
    csv: CsvFormat = CsvFormat()
    types: dict[str, NamedType] = Field(default_factory=dict)
    """Of columns (by bahe's names) whose source does not say: CSV is text unless stated here."""

    @property
    def click_times(self) -> bool:
        """Whether the table says when each click happened."""
        return False

    @model_validator(mode="after")
    def _one_source(self) -> Table:
        if (self.files is None) == (self.sql is None):
            raise ValueError("give either `files` or `sql`")
        return self


CLICKED_AT = "clicked_timestamp"


class ImpressionTable(Table):
    """The impressions, and which of their columns are context: known when the impression is asked for."""

    context: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]] = Field(default_factory=list)
    """Categorical columns (device, slot, hour), in the order of the model's inputs."""
    label_delay: Annotated[str, Field(pattern=r"^[0-9]+ ?(s|m|h|d)$")] = "0s"
    """How long after an impression its click may come, as `24h`: a click is known that much later, unless
    `columns.clicked_timestamp` says when, and younger impressions are neither trained nor evaluated on."""

    @model_validator(mode="after")
    def _distinct(self) -> ImpressionTable:
        if len(set(self.context)) != len(self.context):
            raise ValueError("`context` names one column twice")
        return self

    @property
    def label_delay_us(self) -> int:
        """The label delay in microseconds."""
        seconds = {"s": 1, "m": 60, "h": 3600, "d": 86_400}[self.label_delay[-1]]
        return int(self.label_delay[:-1]) * seconds * 1_000_000

    @property
    def click_times(self) -> bool:
        """Whether the table says when each click happened."""
        return CLICKED_AT in self.columns

    @property
    def label_time(self) -> str:
        """SQL of the instant at which an impression's click is known, over the lake's columns."""
        later = f"event_timestamp + to_microseconds({self.label_delay_us})"
        known = later if self.label_delay_us else AT_ONCE
        return f"coalesce({CLICKED_AT}, {known})" if self.click_times else known


def context_column(context: str) -> str:
    """What a context column is called in the lake and in a frame, where features have names too."""
    return f"context_{context}"


class QuarantineRule(_Section):
    """What happens to rows that break the contract."""

    max_share: Annotated[float, Field(ge=0, lt=1)] = 0.001
    """Up to this share of the rows read of a table, they are set aside in the table `quarantine`; above it,
    the whole ingest is refused."""


class Split(_Section):
    """Training, validation and test by time."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the impressions, after the training ones in time."""
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the impressions, the latest ones."""
    validation_from: datetime | None = None
    """Explicit cut-off instead of shares; needs test_from too."""
    test_from: datetime | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Split:
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("give both `validation_from` and `test_from`, or neither")
        if self.validation_from and self.test_from and self.validation_from >= self.test_from:
            raise ValueError("`validation_from` must lie before `test_from`")
        if self.validation + self.test >= 1:
            raise ValueError("`validation` + `test` must be below 1")
        return self


Reference = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(:[A-Za-z_][A-Za-z0-9_]*)?$")]


class FeaturesConfig(_Section):
    """What the CTR model reads beside vectors, history and the statistics that it always reads."""

    numeric: list[Reference] = Field(default_factory=list)
    """Numbers of a user, an item or a pair of both, as `view:feature` or a whole `view` of the feature
    store: attributes (`item_attributes:price`), statistics of windows (`user_stats_7d`), behaviors by
    channel, what a user did with an item (`user_item_behaviors`) or with those that share a column of items
    (`user_category_behaviors`), and views of `feature_repo`, which may be keyed by such columns, too."""
    categorical: list[Reference] = Field(default_factory=list)
    """Categories of a user or an item (`item_attributes:genre`), as texts, integers or booleans; hashed."""
    vectors: list[Reference] = Field(default_factory=list)
    """Vectors of a user, an item or a pair of both: arrays of floats, each feature's of one width, from
    views of `feature_repo` or columns of items and users. They are standardised, and projected where they
    are wide."""


class Dataset(_Section):
    """A whole dataset.yaml."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    behaviors: Table
    impressions: ImpressionTable
    items: Table
    users: Table | None = None
    channels: Annotated[list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]], Field(min_length=1)]
    """Behavior channels, in the order of the model's inputs."""
    quarantine: QuarantineRule = QuarantineRule()
    split: Split = Split()
    lake: LakeConfig = LakeConfig()
    """Where the lake lies, when not in the home."""
    freshness: Annotated[
        str, BeforeValidator(_freshness), Field(json_schema_extra={"pattern": f"^({FRESHNESS})$"})
    ] = "nightly"
    """How fresh the features are that serving reads. An impression of a training frame sees what was known
    strictly before the start of its day (UTC), as when `bahe daily` publishes every night, or the last
    02:30 (`nightly 02:30`); before the start of its hour; or, with `live`, before its own instant, as when
    a service is told of every behavior at once."""
    features: FeaturesConfig = FeaturesConfig()
    """What the model reads from the feature store beside what it always reads."""
    feature_repo: str | None = None
    """A folder with Feast definitions of your own (entities, feature views, views on demand, services),
    relative to dataset.yaml; `bahe apply` registers them beside bahe's, and `features` can list them."""
    backbone: BackboneConfig = BackboneConfig()
    """Which language model; a `path` that exists beside dataset.yaml is a folder or a .gguf file."""
    encoder: EncoderConfig = EncoderConfig()
    window: WindowConfig = WindowConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def sections(self) -> dict[str, Table]:
        """The tables that there are, in the order in which they are read."""
        given = {
            "items": self.items,
            "users": self.users,
            "behaviors": self.behaviors,
            "impressions": self.impressions,
        }
        return {table: section for table, section in given.items() if section is not None}

    @field_validator("channels")
    @classmethod
    def _distinct_channels(cls, channels: list[str]) -> list[str]:
        if len(set(channels)) != len(channels):
            raise ValueError("names one channel twice")
        if "item" in channels:
            raise ValueError("`item` is reserved for item texts; rename that channel")
        return channels

    @model_validator(mode="after")
    def _known_channel(self) -> Dataset:
        if self.behaviors.channel is not None and self.behaviors.channel not in self.channels:
            raise ValueError(f"`behaviors.channel` is {self.behaviors.channel}, not in `channels`")
        return self


def load_dataset(path: Path) -> Dataset:
    """Read and check a dataset.yaml. Raises BadInput with every problem in it, each with its line."""
    dataset, _ = dataset_and_lines(path)
    return dataset


def dataset_and_lines(path: Path) -> tuple[Dataset, dict[Place, int]]:
    """`load_dataset`, and the line of each key and list entry, for whoever finds further problems."""
    raw, lines = read_yaml(path)
    lake = raw.get("lake")
    if isinstance(lake, dict) and isinstance(lake.get("data"), str) and "://" not in lake["data"]:
        lake["data"] = str((path.parent / Path(lake["data"]).expanduser()).resolve())
    if isinstance(raw.get("feature_repo"), str):
        raw["feature_repo"] = str((path.parent / Path(raw["feature_repo"]).expanduser()).resolve())
    backbone = raw.get("backbone")
    if isinstance(backbone, dict) and isinstance(backbone.get("path"), str):
        beside = path.parent / backbone["path"]
        if beside.exists():  # anything else is a name on the hub
            backbone["path"] = str(beside.resolve())
    try:
        return Dataset.model_validate(raw), lines
    except ValidationError:
        raise refusal(path, problems_of(Dataset, raw, lines)) from None


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write a dataset.yaml, whole or not at all."""
    with replace_atomically(path) as part:
        part.write_text(
            yaml.safe_dump(dataset.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
        )


def home_dataset(home: Home) -> Dataset:
    """The dataset that the home was filled from. Raises NotReady before the first ingest."""
    path = home.root / "dataset.yaml"
    if not path.is_file():
        raise NotReady(f"{home.root} holds no data yet; run `bahe ingest dataset.yaml` first.")
    return load_dataset(path)


def json_schema() -> dict[str, object]:
    """What `dataset.schema.json` holds, for editors: `make schema` writes it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dataset.yaml of bahe",
        **Dataset.model_json_schema(),
    }
