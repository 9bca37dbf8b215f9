"""Any features of the online store, read through Feast, and ids in the type that the store has them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bahe_core.errors import BadInput, UnknownEntity, clipped, one_line
from bahe_core.home import Home
from feast_ducklake.conversion import arrow_type
from feast_ducklake.online.features import FeatureReader
from feature_repo.references import view_of
from feature_repo.store import online_errors
from serving.lookup.identifiers import Identifier, id_as

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, ValueType


@contextmanager
def _the_requests_fault() -> Iterator[None]:
    """Reading features that a request chose: what Feast does not answer, in one sentence."""
    from feast.errors import FeatureNameCollisionError, RequestDataNotFoundInEntityRowsException

    try:
        yield
    except FeatureNameCollisionError:
        raise BadInput(
            "two of the features have the same name; give each once, and `full_feature_names` where views"
            " share a name."
        ) from None
    except RequestDataNotFoundInEntityRowsException as error:
        raise BadInput(
            "a feature that is computed on demand needs a value that the request does not have"
            f" ({clipped(one_line(error), 200)}); give it among `entities`."
        ) from None


def _arrow_type(kind: ValueType) -> pa.DataType | None:
    """None for what Arrow has to tell by its values."""
    from feast import ValueType

    others = {
        ValueType.UNIX_TIMESTAMP: pa.timestamp("us", tz="UTC"),
        ValueType.BYTES: pa.binary(),
    }
    return others.get(kind) or arrow_type(kind)


class OnlineFeatures:
    """What a home's online store has of entities, whatever model is live."""

    def __init__(self, home: Home, store: FeatureStore) -> None:
        self._home, self._store = home, store

    def read(
        self, features: list[str] | FeatureService, entities: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[Any]]:
        """Any features (`view:feature`) of entities, given as a column for each join key, by column.

        As the online store has them; None where it has nothing.
        """
        with online_errors(self._home):
            return self.reader.read(features, entities)

    def features(
        self,
        asked: list[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        version: str,
        full_feature_names: bool = False,
    ) -> dict[str, list[Any]]:
        """`read` of references, or of a feature service by name; `version` where a view wants a model's.

        Raises BadInput on what is not registered.
        """
        features = self._registered(asked)
        columns = self._with_version(features, entities, version)
        with online_errors(self._home), _the_requests_fault():
            return self.reader.read(features, columns, full_feature_names)

    def arrow_table(
        self, asked: list[str] | str, columns: Mapping[str, Sequence[Any]], full_feature_names: bool = False
    ) -> pa.Table:
        """Columns of `features`, asked for in the same way, in the types that are registered.

        Maps and the like, for which Feast has no Arrow type, are as their values are.
        """
        registered = self._registered(asked)
        if isinstance(registered, list):
            kinds = [
                (view_of(one), feature, self._view_columns[view_of(one)]["features"][feature])
                for one in registered
                for feature in [one.partition(":")[2]]
            ]
        else:
            kinds = [
                (projection.name_to_use(), field.name, field.dtype.to_value_type())
                for projection in registered.feature_view_projections
                for field in projection.features
            ]
        types = {
            f"{view}__{feature}" if full_feature_names else feature: _arrow_type(kind)
            for view, feature, kind in kinds
        }
        return pa.table({name: pa.array(column, type=types[name]) for name, column in columns.items()})

    def feast_response(
        self,
        asked: list[str] | str,
        entities: Mapping[str, Sequence[Identifier]],
        full_feature_names: bool = False,
    ) -> dict[str, Any]:
        """What `feast serve` answers. Raises BadInput on what is not registered."""
        from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

        features = self._registered(asked)
        with online_errors(self._home), _the_requests_fault():
            response = self._store.get_online_features(features, entities, full_feature_names)
        columns, names = response.to_dict(), list(response.proto.metadata.feature_names.val)
        return {
            "metadata": {"feature_names": names},
            "results": [
                {
                    "values": columns[name],
                    "statuses": [FieldStatus.Name(status) for status in result.statuses],
                    "event_timestamps": [moment.ToJsonString() for moment in result.event_timestamps],
                }
                for name, result in zip(names, response.proto.results, strict=True)
            ],
        }

    def _registered(self, asked: list[str] | str) -> list[str] | FeatureService:
        """References that the store has, or the service of that name."""
        if isinstance(asked, str):
            service = {one.name: one for one in self._store.list_feature_services()}.get(asked)
            if service is None:
                raise BadInput(f"no feature service is named {clipped(asked)}; correct it.")
            return service
        for reference in asked:
            view, _, feature = reference.partition(":")
            if feature not in self._view_columns.get(view, {}).get("features", ()):
                raise BadInput(
                    f"{clipped(reference)} is no feature of the store; give each as `view:feature`."
                )
        return asked

    def _with_version(
        self,
        features: list[str] | FeatureService,
        entities: Mapping[str, Sequence[Identifier]],
        version: str,
    ) -> Mapping[str, Sequence[Identifier]]:
        """The entities, with the model's version where a view is keyed by one and none is given."""
        names = (
            list(map(view_of, features))
            if isinstance(features, list)
            else [projection.name for projection in features.feature_view_projections]
        )
        keyed = any("model_version" in self._view_columns.get(name, {}).get("keys", ()) for name in names)
        if not keyed or "model_version" in entities:
            return entities
        rows = len(next(iter(entities.values())))
        return {**entities, "model_version": [version] * rows}

    @cached_property
    def _view_columns(self) -> dict[str, dict[str, dict[str, ValueType]]]:
        """Types of the `features` and `keys` of each view, by name."""
        views = [*self._store.list_feature_views(), *self._store.list_on_demand_feature_views()]
        return {
            view.name: {
                "features": {field.name: field.dtype.to_value_type() for field in view.features},
                # A view on demand has none.
                "keys": {
                    column.name: column.dtype.to_value_type()
                    for column in getattr(view, "entity_columns", ())
                },
            }
            for view in views
        }

    @cached_property
    def reader(self) -> FeatureReader:
        """Reads what is registered, from stored bytes where the store is one of ours."""
        return FeatureReader(self._store)

    def as_stored(self, view: str, key: str, value: Identifier) -> Identifier:
        """The id in the type it has in the log. Raises UnknownEntity when it cannot be one of them."""
        stored = self.stored_id(view, key, value)
        if stored is None:
            kind = key.removesuffix("_id")
            raise UnknownEntity(
                f"{kind} {clipped(value)} is not an integer, as the {kind} ids of this log are."
                if self.key_types[view, key] == "Int64"
                else f"{kind} {clipped(ascii(value))} is no id."
            )
        return stored

    def stored_id(self, view: str, key: str, value: Identifier) -> Identifier | None:
        """The id in the type it has in the log; None when it cannot be one of them."""
        return id_as(value, integer=self.key_types[view, key] == "Int64")

    @cached_property
    def key_types(self) -> dict[tuple[str, str], str]:
        """Types of the join keys of the vectors of users and items, by view and column."""
        return {
            (view, column.name): str(column.dtype)
            for view in ("user_embedding", "item_embedding")
            for column in self._store.get_feature_view(view).entity_columns
        }
