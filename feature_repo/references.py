"""What `view:feature` stands for in a home's feature store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bahe_core.errors import BadInput

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

ENTITY_KEYS = {"user_id": "user", "item_id": "item"}
_TYPES = {
    "numeric": {"Int32", "Int64", "Float32", "Float64", "Bool"},
    "categorical": {"String", "Int32", "Int64", "Bool"},
}
_WHAT = {"numeric": "number", "categorical": "category"}
_HASHES = {"atom_id"}
"""Numbers that count nothing."""


@dataclass(frozen=True)
class FeatureReference:
    """A feature of a user or an item."""

    view: str
    feature: str
    entity: str
    """`user` or `item`."""

    def __str__(self) -> str:
        return f"{self.view}:{self.feature}"


def view_of(reference: str) -> str:
    """The view of `view:feature`, or of a whole `view`."""
    return reference.partition(":")[0]


def feature_references(store: FeatureStore, kind: str, references: Sequence[str]) -> list[FeatureReference]:
    """The features that `features.<kind>` of dataset.yaml lists, as `view:feature` or a whole `view`.

    `kind` is `numeric` or `categorical`; of a whole view those of a type that can be it. Raises BadInput on
    a view or feature that is not registered, has another type, or is of neither a user nor an item.
    """
    found: dict[str, FeatureReference] = {}
    for reference in references:
        name, _, feature = reference.partition(":")
        view = _view(store, kind, reference, name)
        keys = [column.name for column in view.entity_columns]
        if len(keys) != 1 or keys[0] not in ENTITY_KEYS:
            raise BadInput(
                f"features.{kind}: {reference} is keyed by {', '.join(keys)}; the model reads features of"
                " a user_id or an item_id."
            )
        types = {field.name: str(field.dtype) for field in view.features if field.name not in _HASHES}
        fitting = [one for one, its in types.items() if its in _TYPES[kind]]
        if feature and feature not in fitting:
            its = types.get(feature)
            problem = f"is not there; {name} has {', '.join(fitting)}"
            if its is not None:
                problem = f"is {its}, no {_WHAT[kind]}"
            raise BadInput(f"features.{kind}: {reference} {problem}.")
        for one in [feature] if feature else fitting:
            made = FeatureReference(view=name, feature=one, entity=ENTITY_KEYS[keys[0]])
            other = found.setdefault(one, made)
            if other != made:
                raise BadInput(f"features.{kind}: {other} and {made} have one name; list one of them.")
    return list(found.values())


def _view(store: FeatureStore, kind: str, reference: str, name: str) -> FeatureView:
    from feast.errors import FeatureViewNotFoundException

    try:
        return store.get_feature_view(name)
    except FeatureViewNotFoundException:
        views = ", ".join(sorted(view.name for view in store.list_feature_views()))
        raise BadInput(
            f"features.{kind}: {reference} is of no registered view; choose from {views}."
        ) from None
