"""Features of a team's own views, sent to the service: from the next answer on they are what is stored.

The lake is not written to, since it has one writer at a time. What is sent here has to reach the view's
source as well, with the same times, for training to see it. A publish in between leaves it as it is: the
stores keep the later of two values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from bahe_core.errors import BadInput, clipped
from bahe_core.home import Home
from feast_ducklake.conversion import arrow_table, arrow_type, converted_table
from feature_repo.store import online_errors
from feature_repo.team import is_of_team
from serving.lookup.published_models import PublishedModels
from serving.lookup.tolerances import MARGIN

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

Columns = Mapping[str, Sequence[Any]]
"""As JSON has them."""
_EVENT, _CREATED = "event_timestamp", "created"
"""What Feast's remote online store calls the times of a row, whatever the source calls them."""
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_800
"""Since 1970: the years 1 to 9999, of which Python can say a moment."""
_OURS = (
    "is bahe's own, and `bahe publish` writes it; send what happened to v1/behaviors, v1/impressions and"
    " v1/clicks of `bahe serve --live`."
)


class FeatureWrites:
    """Writes to the online store through Feast. Safe to use from several threads.

    Rows are columns of JSON: the join keys, the features and the times that the view's source has, in ISO
    8601; a row without a time of creation was created now. Raises BadInput, and writes nothing, where a
    column is missing, or a value is not exactly of its type, is not finite, is of a time to come, or is a
    vector of another width than the live model reads.
    """

    def __init__(self, home: Home, store: FeatureStore, models: PublishedModels) -> None:
        self._home, self._store, self._models = home, store, models

    def push(self, source: str, columns: Columns, *, allow_registry_cache: bool) -> int:
        """Write rows to every view that a push source feeds; how many. Raises BadInput also on a source
        that no view has."""
        from feast import PushSource

        views = self._views(allow_registry_cache)
        fed = {
            view.name: view.stream_source.name
            for view in views
            if isinstance(view.stream_source, PushSource)
        }
        frames = [self._frame(view, columns) for view in views if fed.get(view.name) == source]
        if not frames:
            ours = {view.batch_source.name for view in views if not is_of_team(view)}
            if source in ours | {view.name for view in views if not is_of_team(view)}:
                raise BadInput(f"{clipped(source)} {_OURS}")
            known = ", ".join(sorted(set(fed.values()))) or "none"
            raise BadInput(
                f"no push source is named {clipped(source)}; there are {clipped(known, 300)} (`bahe apply`"
                " registers those of `feature_repo`)."
            )
        frame = frames[0]
        for other in frames[1:]:  # views of one source may have other features
            frame = frame.assign(**{name: other[name] for name in other.columns.difference(frame.columns)})
        with online_errors(self._home):
            self._store.push(source, frame, allow_registry_cache)
        return len(frame)

    def write(self, view_name: str, columns: Columns, *, allow_registry_cache: bool) -> int:
        """Write rows to a view; how many. Raises BadInput also on one that is bahe's, or not stored."""
        views = {view.name: view for view in self._views(allow_registry_cache)}
        if view_name not in views:
            known = ", ".join(name for name, view in views.items() if is_of_team(view)) or "none"
            raise BadInput(
                f"no stored view of your own is named {clipped(view_name)}; there are {clipped(known, 300)}"
                " (`bahe apply` registers those of `feature_repo`)."
            )
        frame = self._frame(views[view_name], columns)
        with online_errors(self._home):
            self._store.write_to_online_store(view_name, frame, allow_registry_cache=allow_registry_cache)
        return len(frame)

    def _views(self, allow_cache: bool) -> list[FeatureView]:
        views = [
            *self._store.list_feature_views(allow_cache=allow_cache),
            *self._store.list_stream_feature_views(allow_cache=allow_cache),
        ]
        return sorted((view for view in views if view.online), key=lambda view: view.name)

    def _frame(self, view: FeatureView, columns: Columns) -> pd.DataFrame:
        """The rows as Feast takes them, in the view's types."""
        if not is_of_team(view):
            raise BadInput(f"{view.name} {_OURS}")
        source, what = view.batch_source, f"rows for view {view.name}"
        given = {source.field_mapping.get(name, name): column for name, column in columns.items()}
        types = _types(view)
        missing = [name for name in types if name not in given]
        if not {source.timestamp_field, _EVENT} & columns.keys():
            missing.append(source.timestamp_field)
        if missing:
            raise BadInput(f"{what} have no {clipped(', '.join(missing), 300)}; give each a column of df.")
        for name in types:
            _check_alike(given[name], f"{what}: column {name}")
        frame = pd.DataFrame({name: pd.Series(given[name], dtype=object) for name in types})
        table = converted_table(arrow_table(frame, what), types, what)
        for name, kind in types.items():
            if table.schema.field(name).type != kind:
                raise BadInput(f"{what}: column {name} is no column of {kind}; convert it.")
        keys = [column.name for column in view.entity_columns]
        for name in keys:
            if table[name].null_count:
                raise BadInput(f"{what}: {name} is null in a row, and is its key; give each row one.")
        features = [name for name in types if name not in keys]
        if all(table[name].null_count == len(table) for name in features):
            raise BadInput(f"{what} have no value at all, and Feast writes no such rows; leave them out.")
        self._check_numbers(view, table, features)
        now = datetime.now(UTC)
        for name, other, default in (
            (source.timestamp_field, _EVENT, None),
            (source.created_timestamp_column, _CREATED, now),
        ):
            if name:
                moments = _moments(columns.get(name, columns.get(other)), len(table), default, what, name)
                table = table.append_column(name, pa.array(moments, pa.timestamp("us", tz="UTC")))
        rows: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
        return rows

    def _check_numbers(self, view: FeatureView, table: pa.Table, features: Sequence[str]) -> None:
        """Raises BadInput on what is not finite, and on a vector that the live model could not read."""
        from feast import ValueType

        widths = self._models.artifact(self._models.live_version()).vectors
        kinds = {field.name: field.dtype.to_value_type() for field in view.features}
        for name in features:
            column, what = table[name], f"rows for view {view.name}: column {name}"
            if kinds[name] == ValueType.UNIX_TIMESTAMP and not all(
                _FIRST_SECOND <= second < _LAST_SECOND for second in column.drop_null().to_pylist()
            ):
                raise BadInput(f"{what} has seconds since 1970 that are of no time; correct them.")
            if pa.types.is_list(column.type):
                width = widths.get(f"{view.name}:{name}")
                lengths = pc.list_value_length(column).drop_null()
                if width is not None and pc.any(pc.not_equal(lengths, width)).as_py():
                    raise BadInput(
                        f"{what} has a vector of another width than the live model reads; give it {width}"
                        " numbers, or null as a whole."
                    )
                column = pc.list_flatten(column)
                if column.null_count:
                    raise BadInput(f"{what} has a list with a null in it; give null as a whole.")
            if pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column.drop_null())).as_py():
                raise BadInput(f"{what} has a number that is not finite; give null where it is not known.")


def _types(view: FeatureView) -> dict[str, pa.DataType]:
    """Types of a view's join keys and features. Raises BadInput on one that JSON does not say exactly."""
    from feast import ValueType

    types: dict[str, pa.DataType] = {}
    for field in [*view.entity_columns, *view.features]:
        kind = field.dtype.to_value_type()
        # Feast's clients send the seconds since 1970.
        types[field.name] = pa.int64() if kind == ValueType.UNIX_TIMESTAMP else arrow_type(kind)
        if types[field.name] is None:
            raise BadInput(
                f"{view.name}:{field.name} is {field.dtype}, which this service does not take; write it in"
                " Python, with `store.push` of the home's feature store."
            )
    return types


def _check_alike(values: Sequence[Any], what: str) -> None:
    """Raises BadInput unless all are numbers, texts, truth values, or lists of one of these.

    Before Arrow looks, whose complaint repeats the value.
    """
    given = {type(value) for value in values if value is not None}
    if given == {list}:
        elements = chain.from_iterable(value for value in values if value is not None)
        given = {type(value) for value in elements if value is not None}
    if not any(given <= kinds for kinds in ({int, float}, {str}, {bool})):
        raise BadInput(f"{what} has values that are not of one type; make them alike.")


def _moments(
    values: Sequence[Any] | None, count: int, default: datetime | None, what: str, name: str
) -> list[datetime]:
    """Times in UTC; `default` stands for one that is not given. Raises BadInput."""
    moments: list[datetime] = []
    latest = datetime.now(UTC) + MARGIN
    for row, value in enumerate([None] * count if values is None else values):
        if value is None and default is not None:
            moments.append(default)
            continue
        try:
            at = datetime.fromisoformat(value)
            at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
        except (TypeError, ValueError, OverflowError):
            raise BadInput(
                f"{what}: {name} of row {row} is no time; give it in ISO 8601, as 2026-05-01T12:00:00Z."
            ) from None
        if at > latest:
            # Nothing could replace such a value until then.
            raise BadInput(f"{what}: {name} of row {row} has not happened yet; correct the time.")
        moments.append(at)
    return moments
