"""A team's own Feast definitions, from the folder that `feature_repo` of dataset.yaml names."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import linecache
import sys
import traceback
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from bahe_core.errors import BadInput, one_line
from feature_repo.by_item_columns import is_by_item_column
from feature_repo.references import stored_views, view_of

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView


def team_objects(folder: Path) -> list[Any]:
    """Entities, feature views (also on demand) and services of the folder's Python files.

    Files see one another as modules, and may import ours (`from feature_repo.definitions import user,
    item`). A relative path of a Parquet source is relative to the folder. Raises BadInput when the folder
    is not there, a file fails, or nothing is defined.
    """
    from feast import Entity, FeatureService, FeatureView, FileSource, OnDemandFeatureView

    files = sorted(path for path in folder.rglob("*.py") if _is_source(path.relative_to(folder)))
    if not files:
        raise BadInput(
            f"feature_repo: {folder} is no folder with Python files; correct it in dataset.yaml."
        )
    linecache.clearcache()  # Feast keeps the text of functions, which this process may have read before
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    found: dict[int, Any] = {}
    try:
        for path in files:
            for thing in vars(_module(path, folder)).values():
                if isinstance(thing, Entity | FeatureView | FeatureService | OnDemandFeatureView):
                    found[id(thing)] = thing
    finally:
        sys.path.remove(str(folder))
        # Another home's folder may have files of the same names.
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[name]
    if not found:
        raise BadInput(f"feature_repo: {folder} defines no entity, view or service of Feast.")
    for thing in found.values():
        source = getattr(thing, "batch_source", None)
        if isinstance(source, FileSource) and "://" not in source.path:
            source.file_options.uri = str((folder / Path(source.path).expanduser()).resolve())
    return list(found.values())


def team_content(store: FeatureStore, references: Iterable[str]) -> str | None:
    """A hash of what those references that are not bahe's own stand for; None without any.

    Of their rows, and of how they are defined: bahe's tables change with an ingest, a team's whenever it
    writes them, and a definition or a function whenever it is applied. Raises BadInput when a source cannot
    be read.
    """
    from feast_ducklake import open_lake
    from feast_ducklake.offline.source import relation_of

    ours, references = _names_of_ours(), list(references)
    on_demand = {view.name: view for view in store.list_on_demand_feature_views()}
    content: list[object] = []
    for name in sorted({view_of(reference) for reference in references} & on_demand.keys()):
        view = on_demand[name]
        definition = view.feature_transformation.udf_string or str(view.to_proto().spec)
        content.append([name, definition, [str(field) for field in view.features]])
    for name in sorted(stored_views(store, references) - ours):
        stored = store.get_feature_view(name)
        if is_by_item_column(stored):
            continue
        source = stored.batch_source
        relation = relation_of(source, store.config)
        with open_lake(store.config) as connection:
            try:
                row = connection.execute(
                    f"SELECT count(*), sum(hash(t)::HUGEINT) FROM {relation} t"
                ).fetchone()
            except duckdb.Error as error:
                raise BadInput(
                    f"the source of the feature view {name} cannot be read ({one_line(error)}); correct it"
                    " in feature_repo, then run `bahe apply`."
                ) from None
        joined_by = [source.timestamp_field, source.created_timestamp_column, dict(source.field_mapping)]
        fields = [str(field) for field in stored.features]
        content.append([name, str(row), str(stored.ttl), joined_by, fields])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12] if content else None


def is_of_team(view: FeatureView) -> bool:
    """Whether a registered view is a team's own, none of bahe's."""
    return view.name not in _names_of_ours() and not is_by_item_column(view)


@cache
def _names_of_ours() -> frozenset[str | None]:
    with warnings.catch_warnings():
        # Feast wants entities to name their type; ours is the log's.
        warnings.simplefilter("ignore", DeprecationWarning)
        from feature_repo import definitions

    return frozenset(getattr(thing, "name", None) for thing in vars(definitions).values())


def _is_source(path: Path) -> bool:
    """Not in a hidden folder, as those of notebooks and virtual environments."""
    return not any(part.startswith((".", "__")) for part in path.parts[:-1])


def _module(path: Path, folder: Path) -> Any:
    """The file's module, once, under the name by which other files import it.

    Raises BadInput with the line at which it fails.
    """
    parts = path.relative_to(folder).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or folder.name
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if loaded is not None:  # of something else, which stays what it is
        name = "team_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), 1)
        raise BadInput(
            f"feature_repo: {path}, line {line}, fails ({one_line(error)}); correct it."
        ) from None
    return module
