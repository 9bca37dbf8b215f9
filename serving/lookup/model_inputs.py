"""Which features of the online store a model reads, as the configuration in its artifact lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bahe_core.errors import BadInput, Damaged
from bahe_models import needed_columns
from bahe_models.artifact_folder import further_features, read_config
from feast_ducklake.online.vectors import VectorReader
from feature_repo.item_keys import ItemKeys, item_keys, reference_of
from feature_repo.references import feature_references, view_of

if TYPE_CHECKING:
    from feast import FeatureStore


@dataclass(frozen=True)
class ModelInputs:
    """What a model reads of the online store beside the vectors of users and items."""

    references: Mapping[str, list[str]]
    """Features of `user`, `item`, a `pair` of both and by `attribute` of items, as `view:feature`."""
    categories: tuple[str, ...]
    """Columns of those that are categories; the model's other categories come with the request."""
    vectors: Mapping[str, Mapping[str, VectorReader]]
    """Of each entity, what reads its vectors (`features.vectors`), by `view:feature`; they are not among
    `references`."""
    item_keys: ItemKeys
    """Columns of items that views of `attribute` are keyed by."""
    by_keys: Mapping[tuple[str, ...], list[str]]
    """The features of `attribute`, by their join keys."""

    @property
    def views(self) -> set[str]:
        """The views that a score is made of."""
        read = {view_of(one) for listed in self.references.values() for one in listed}
        read |= {view_of(one) for readers in self.vectors.values() for one in readers}
        return read | {"user_embedding", "item_embedding"}


@contextmanager
def the_servers_fault() -> Iterator[None]:
    """Reading the live model: that it is not there (yet) is the server's state, not the request's."""
    try:
        yield
    except BadInput as error:
        raise Damaged(f"the live model cannot be read: {error}") from None


def model_inputs(
    store: FeatureStore, artifact: Path, read_beside: Callable[[Sequence[str]], list[str]]
) -> ModelInputs:
    """What the model in a folder reads, without reading its weights.

    `read_beside` says of references which others are read with them although the model does not. Raises
    Damaged when the folder, or what it lists, is not there.
    """
    with the_servers_fault():
        config = read_config(artifact)
        listed = {
            kind: feature_references(store, kind, references)
            for kind, references in further_features(config).items()
        }
    vectors = listed.pop("vectors")
    further = [reference for found in listed.values() for reference in found]
    of_entity = {
        entity: [f"{entity}_stats:{c}" for c in needed_columns() if c.startswith(f"{entity}_")]
        for entity in ("user", "item")
    }
    of_entity["pair"], of_entity["attribute"] = [], []
    by_keys: dict[tuple[str, ...], list[str]] = {}
    of_entity["user"] += [f"user_timeline:length_{channel}" for channel in config["dense"]["channels"]]
    for one in further:
        if str(one) not in of_entity[one.entity]:
            of_entity[one.entity].append(str(one))
            if one.entity == "attribute":
                by_keys.setdefault(one.keys, []).append(str(one))
    for entity in ("user", "item"):
        beside = read_beside(of_entity[entity])
        of_entity[entity] += [one for one in beside if one not in of_entity[entity]]
    keys = item_keys(store, further)
    of_keys = map(reference_of, keys)
    of_entity["item"] += [one for one in of_keys if one not in of_entity["item"]]
    readers: dict[str, dict[str, VectorReader]] = {entity: {} for entity in of_entity}
    for one in vectors:
        readers[one.entity][str(one)] = VectorReader(store, one.view, one.feature)
    return ModelInputs(
        references=of_entity,
        categories=tuple(reference.feature for reference in listed["categorical"]),
        vectors=readers,
        item_keys=keys,
        by_keys=by_keys,
    )
