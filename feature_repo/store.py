"""Opening a home's Feast store, and registering the definitions in it."""

from __future__ import annotations

import copy
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bahe_core.errors import BadInput, Busy, Damaged, NotReady, one_line, storage_problem
from bahe_core.files import replace_atomically
from bahe_core.home import Home
from bahe_core.lake_location import bound_postgres_wait
from bahe_lake.catalogue import columns, tables
from bahe_lake.connection import lake, require_catalogue
from feast_ducklake.quick_import import import_feast
from feature_repo.by_item_columns import views_by_item_columns
from feature_repo.references import sources_of, view_of
from feature_repo.team import team_objects

if TYPE_CHECKING:
    from feast import FeatureStore

# Feast says that the setting does nothing with a registry in a file; without it a view cannot be read while
# it is materialized.
logging.getLogger("feast.repo_config").addFilter(
    lambda record: "serve_features_while_materializing" not in record.getMessage()
)

FOLDER = Path(__file__).resolve().parent
TEMPLATE = FOLDER / "feature_store.yaml"
TARGETS = FOLDER / "targets.yaml"

_LEGACY_CLASS = re.compile(r"^materialize\.feast_(?:engine|offline|redis|registry|sqlite)\.(\w+)$")
"""Where version 0.1 had the plug-ins."""


def configuration(home: Home, target: str | None = None) -> dict[str, Any]:
    """Feast's settings for this home: the target's, or without one those that the home keeps.

    A target is a name in targets.yaml, or the path of a file that holds a section `online_store` or a whole
    feature_store.yaml. A home without settings gets the default, SQLite. Raises BadInput on an unknown or
    unreadable target, Damaged when the home's own settings cannot be read.
    """
    settings = _mapping(TEMPLATE)
    if target is not None:
        settings |= _target(target)
    elif home.feature_store_yaml.is_file():
        try:
            settings |= _current_names(_mapping(home.feature_store_yaml))
        except (OSError, ValueError) as error:
            raise Damaged(
                f"{home.feature_store_yaml} cannot be read ({one_line(error)}); delete it and run `bahe"
                " apply`, with the --target that holds this home's online values."
            ) from None
    settings["registry"]["path"] = str(home.registry)
    if "path" in settings["online_store"]:  # a file; a server is where it is
        settings["online_store"]["path"] = str(home.online_store)
    settings["offline_store"]["home"] = str(home.root)
    return settings


def write_configuration(home: Home, target: str | None = None) -> Path:
    """Write `configuration` to the home's feature_store.yaml, whole or not at all, where it differs.

    The home may have been moved, and its paths with it.
    """
    text = _text(configuration(home, target))
    path = home.feature_store_yaml
    if not path.is_file() or path.read_text() != text:
        # A name of this process: services that start side by side may all find that the home was moved.
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(text)
        part.replace(path)
    return path


def _text(settings: dict[str, Any]) -> str:
    header = "# Written by `bahe apply`; `bahe apply --target NAME` changes the online store.\n"
    return header + yaml.safe_dump(settings, sort_keys=False)


def _mapping(path: Path) -> dict[str, Any]:
    """What a file of settings holds. Raises OSError or ValueError where it is none."""
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    sections = ("registry", "online_store", "offline_store")
    if not isinstance(settings, dict) or any(not isinstance(settings.get(s, {}), dict) for s in sections):
        raise ValueError("it holds no settings of Feast")
    return settings


def _target(target: str) -> dict[str, Any]:
    named = _mapping(TARGETS)
    if target in named:
        return {"online_store": named[target]}
    path = Path(target).expanduser()
    try:
        settings = _mapping(path)
        if "online_store" not in settings:
            raise ValueError("it has no section `online_store`")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the target {target} is not one of {', '.join(named)}, and no file with a section"
            f" `online_store` ({one_line(error)}); correct --target or BAHE_FEATURE_STORE."
        ) from None
    return settings


def _current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the plug-ins under the names that they have now; others are returned as they are."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(inner) for key, inner in value.items()}
        return _LEGACY_CLASS.sub(r"feast_ducklake.\1", value) if isinstance(value, str) else value

    current: dict[str, Any] = renamed(settings)
    if current != settings and current.get("provider") == "local":
        del current["provider"]  # version 0.1 had no other
    return current


def open_store(home: Home) -> FeatureStore:
    """The home's feature store. Raises NotReady before the first `bahe apply`."""
    if not home.registry.is_file():
        raise NotReady(f"{home.root} has no feature store yet; run `bahe apply` first.")
    if not home.feature_store_yaml.is_file():
        raise Damaged(
            f"{home.feature_store_yaml} is gone, and with it which online store this home uses; run `bahe"
            " apply`, with --target unless that was SQLite."
        )
    bound_postgres_wait()  # an online store there, whose own settings have no limit
    import_feast()
    from feast import FeatureStore
    from google.protobuf.message import DecodeError

    try:
        store = FeatureStore(fs_yaml_file=write_configuration(home))
        store.list_projects()
    except DecodeError:
        raise Damaged(
            f"the registry {home.registry} cannot be read; delete it and run `bahe apply` and"
            " `bahe publish`."
        ) from None
    return store


@contextmanager
def online_errors(home: Home) -> Iterator[None]:
    """Turns what a lost or broken online store says into one sentence, as Damaged or NotReady; Busy where
    another process writes to it for too long, NotWritable where the disk is full."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if "database is locked" in str(error):
            raise Busy(
                f"others have been writing to the online store {home.online_store} for too long; try again."
            ) from None
        problem = storage_problem(error)
        if problem is not None:
            raise problem from None
        raise Damaged(
            f"the online store {home.online_store} cannot be read ({error}); delete it and run"
            " `bahe publish`."
        ) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("redis", "psycopg"):
            raise
        raise NotReady(
            f"the online store of {home.feature_store_yaml} does not answer ({one_line(error)}); start it"
            " and run this again."
        ) from None


def apply(
    home: Home, target: str | None = None, *, online: Collection[str] = (), team: Path | None = None
) -> str:
    """Register feature_repo's definitions in the home's registry; returns what is registered, in words.

    `team` is a folder with definitions of the team's own, which are registered beside ours. Views named by
    `online` (`view` or `view:feature`) can be published, whatever the definitions say.
    `target`, else BAHE_FEATURE_STORE, says where online values shall lie from now on (see `configuration`);
    else they stay where they are. The home keeps the choice once Feast has registered all with it. Raises
    NotReady before the first ingest, since Feast infers types from the lake.
    """
    require_catalogue(home)
    from feast import Entity, FeatureService, FeatureStore, FeatureView, OnDemandFeatureView

    with warnings.catch_warnings():
        # Feast wants entities to name their type; ours is the log's, so Feast infers it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from feature_repo import definitions

    # Copies: Feast writes the columns that it finds in this home's lake into the objects it is given, and
    # the next home of this process may have others.
    objects = copy.deepcopy(
        [
            thing
            for thing in vars(definitions).values()
            if isinstance(thing, Entity | FeatureView | FeatureService)
        ]
    )
    with lake(home) as connection:
        there = tables(connection)
        if "users" not in there:  # a lake of before; its next ingest makes the table
            objects = [thing for thing in objects if getattr(thing, "name", "") != "user_attributes"]
        item_columns = columns(connection, "items") if "items" in there else {}
    if team is not None:
        objects += _of_team(team, objects)
    views = {view_of(reference) for reference in online}
    objects += views_by_item_columns(views, item_columns, objects)
    for view in objects:
        if isinstance(view, OnDemandFeatureView) and view.name in views:
            views = views | sources_of(view)
    for view in objects:
        if isinstance(view, FeatureView) and view.name in views:
            view.online = True
    with home.exclusive():
        before = configuration(home)["online_store"] if home.feature_store_yaml.is_file() else None
        settings = configuration(home, target or os.environ.get("BAHE_FEATURE_STORE") or None)
        with replace_atomically(home.feature_store_yaml) as candidate, online_errors(home):
            candidate.write_text(_text(settings))
            FeatureStore(fs_yaml_file=candidate).apply(objects)
    entities, registered, services = (
        sum(isinstance(thing, kind) for thing in objects)
        for kind in (Entity, FeatureView | OnDemandFeatureView, FeatureService)
    )
    moved = before is not None and before != settings["online_store"]
    also = "; the online store is another one now, so run `bahe publish`" if moved else ""
    return f"{entities} entities, {registered} feature views, {services} feature services{also}"


def _of_team(folder: Path, ours: list[Any]) -> list[Any]:
    """What a team's folder defines beside ours. Raises BadInput where it takes one of our names."""
    from feature_repo import definitions

    names = {(_kind(thing), thing.name): thing for thing in ours}
    imported = {id(thing) for thing in vars(definitions).values()}
    theirs = []
    for thing in team_objects(folder):
        if id(thing) in imported:
            continue
        same = names.get((_kind(thing), thing.name))
        if same is None:
            theirs.append(thing)
        elif _kind(thing) != "entity" or thing.join_key != same.join_key:
            raise BadInput(
                f"feature_repo: {folder} defines the {_kind(thing)} {thing.name}, which bahe has; rename"
                " it."
            )
    return theirs


def _kind(thing: Any) -> str:
    from feast import Entity, FeatureService

    if isinstance(thing, Entity):
        return "entity"
    return "service" if isinstance(thing, FeatureService) else "view"
