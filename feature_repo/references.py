"""What `view:feature` stands for in a home's feature store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bahe_core.errors import BadInput

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView, OnDemandFeatureView

_ENTITIES = {("user_id",): "user", ("item_id",): "item", ("item_id", "user_id"): "pair"}
_TYPES = {
    "numeric": {"Int32", "Int64", "Float32", "Float64", "Bool"},
    "categorical": {"String", "Int32", "Int64", "Bool"},
    "vectors": {"Array(Float32)", "Array(Float64)"},
}
ITEM_COLUMNS = "item_attributes"
"""The view of the columns of items, which views of a team's may be keyed by."""
_KEY_TYPES = {"String", "Int32", "Int64"}
_WHAT = {"numeric": "number", "categorical": "category", "vectors": "vector of floats"}
_HASHES = {"atom_id"}
"""Numbers that count nothing."""


@dataclass(frozen=True)
class FeatureReference:
    """A feature of a user, an item, a pair of both, or of columns of items (with a user or without)."""

    view: str
    feature: str
    entity: str
    """`user`, `item` or `pair`; `attribute` of a view that is keyed by columns of items."""
    keys: tuple[str, ...]
    """The view's join keys, in order of the alphabet."""

    def __str__(self) -> str:
        return f"{self.view}:{self.feature}"


def view_of(reference: str) -> str:
    """The view of `view:feature`, or of a whole `view`."""
    return reference.partition(":")[0]


def feature_references(store: FeatureStore, kind: str, references: Sequence[str]) -> list[FeatureReference]:
    """The features that `features.<kind>` of dataset.yaml lists, as `view:feature` or a whole `view`.

    `kind` is `numeric`, `categorical` or `vectors`; of a whole view those of a type that can be it. Raises
    BadInput on a view or feature that is not registered, has another type, or is not of a user, an item or
    both, and on a view without any feature of such a type.
    """
    from feast import OnDemandFeatureView

    found: dict[str, FeatureReference] = {}
    for reference in references:
        name, _, feature = reference.partition(":")
        view = _view(store, kind, reference, name)
        keys = _keys(store, kind, reference, view)
        if kind == "vectors" and isinstance(view, OnDemandFeatureView):
            raise BadInput(
                f"features.vectors: {reference} is of a view on demand; keep its vectors in a view that is"
                " stored."
            )
        entity = _entity_of(store, keys)
        if entity is None:
            raise BadInput(
                f"features.{kind}: {reference} is keyed by {', '.join(keys) or 'nothing'}; the model reads"
                " features of a user_id, an item_id or both, or of columns of items."
            )
        if kind == "vectors" and entity == "attribute":
            raise BadInput(
                f"features.vectors: {reference} is keyed by {', '.join(keys)}; vectors are of a user_id, an"
                " item_id or both."
            )
        types = {field.name: str(field.dtype) for field in view.features if field.name not in _HASHES}
        fitting = [one for one, its in types.items() if its in _TYPES[kind]]
        if feature not in fitting and (feature or not fitting):
            raise BadInput(f"features.{kind}: {reference} {_misfit(kind, name, feature, types, fitting)}.")
        for one in [feature] if feature else fitting:
            made = FeatureReference(view=name, feature=one, entity=entity, keys=keys)
            other = found.setdefault(one, made)
            if other != made:
                raise BadInput(f"features.{kind}: {other} and {made} have one name; list one of them.")
    return list(found.values())


def stored_views(store: FeatureStore, references: Iterable[str]) -> set[str]:
    """The views whose stored values these references (`view:feature`, or `view`) are made of.

    Of a view on demand, those that it computes from.
    """
    on_demand = {view.name: view for view in store.list_on_demand_feature_views()}
    names: set[str] = set()
    for reference in references:
        name = view_of(reference)
        names |= sources_of(on_demand[name]) if name in on_demand else {name}
    return names


def sources_of(view: OnDemandFeatureView) -> set[str]:
    """The stored views that a view on demand computes from."""
    return {projection.name for projection in view.source_feature_view_projections.values()}


def _entity_of(store: FeatureStore, keys: tuple[str, ...]) -> str | None:
    """Whose features a view with these join keys has; None where an impression does not have them."""
    others = set(keys) - {"user_id", "item_id"}
    if not others:
        return _ENTITIES.get(keys)
    types = {field.name: str(field.dtype) for field in store.get_feature_view(ITEM_COLUMNS).features}
    known = {name for name, its in types.items() if its in _KEY_TYPES and name not in _HASHES}
    return "attribute" if others <= known else None


def _misfit(kind: str, view: str, feature: str, types: Mapping[str, str], fitting: Sequence[str]) -> str:
    """Why a feature of a view, or a whole view, cannot be of this kind; `types` are of its features."""
    its = types.get(feature)
    if its is not None:
        other = next((other for other, kinds in _TYPES.items() if its in kinds), None)
        way_out = "" if other is None else f"; list it under features.{other}"
        return f"is {its}, no {_WHAT[kind]}{way_out}"
    if feature:
        return f"is not there; {view} has {', '.join(fitting or types)}"
    there = ", ".join(f"{name} ({its})" for name, its in types.items())
    return f"has no {_WHAT[kind]}; it has {there or 'none'}"


def _view(store: FeatureStore, kind: str, reference: str, name: str) -> FeatureView | OnDemandFeatureView:
    stored, on_demand = store.list_feature_views(), store.list_on_demand_feature_views()
    by_name: dict[str, FeatureView | OnDemandFeatureView] = {v.name: v for v in (*stored, *on_demand)}
    if name not in by_name:
        raise BadInput(
            f"features.{kind}: {reference} is of no registered view; run `bahe apply` if it is new here, or"
            f" choose from {', '.join(sorted(by_name))}."
        )
    return by_name[name]


def _keys(
    store: FeatureStore, kind: str, reference: str, view: FeatureView | OnDemandFeatureView
) -> tuple[str, ...]:
    from feast import OnDemandFeatureView

    if not isinstance(view, OnDemandFeatureView):
        return tuple(sorted(column.name for column in view.entity_columns))
    if view.source_request_sources:
        raise BadInput(
            f"features.{kind}: {reference} needs values of the request; give them as impressions.context."
        )
    of_sources = (store.get_feature_view(name).entity_columns for name in sources_of(view))
    return tuple(sorted({column.name for columns in of_sources for column in columns}))
