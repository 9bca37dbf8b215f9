"""Opening a home's Feast store, and registering the definitions in it."""

from __future__ import annotations

import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bahe_core.errors import BadInput, Damaged, NotReady, one_line
from bahe_core.home import Home
from bahe_lake.connection import require_catalogue

if TYPE_CHECKING:
    from feast import FeatureStore

# Feast says that the setting does nothing with a registry in a file; without it a view cannot be read while
# it is materialized.
logging.getLogger("feast.repo_config").addFilter(
    lambda record: "serve_features_while_materializing" not in record.getMessage()
)

TEMPLATE = Path(__file__).resolve().parent / "feature_store.yaml"


def write_configuration(home: Home) -> Path:
    """The settings of the template with this home's paths, written to the home.

    The template is BAHE_FEATURE_STORE, which may name another online store, else
    feature_repo/feature_store.yaml. Raises BadInput when it cannot be read.
    """
    template = Path(os.environ.get("BAHE_FEATURE_STORE") or TEMPLATE).expanduser()
    try:
        settings = yaml.safe_load(template.read_text())
        settings["registry"]["path"] = str(home.registry)
        if "path" in settings["online_store"]:  # a file; a server is where it is
            settings["online_store"]["path"] = str(home.online_store)
        settings["offline_store"]["home"] = str(home.root)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise BadInput(
            f"BAHE_FEATURE_STORE is {template}, which is no such file as feature_repo/profiles/redis.yaml"
            f" ({one_line(error)}); correct it or unset it."
        ) from None
    text = f"# Written by `bahe apply`; settings come from {template.name}.\n"
    text += yaml.safe_dump(settings, sort_keys=False)
    if not home.feature_store_yaml.is_file() or home.feature_store_yaml.read_text() != text:
        home.feature_store_yaml.write_text(text)
    return home.feature_store_yaml


def open_store(home: Home) -> FeatureStore:
    """The home's feature store. Raises NotReady before the first `bahe apply`."""
    if not home.registry.is_file():
        raise NotReady(f"{home.root} has no feature store yet; run `bahe apply` first.")
    from feast import FeatureStore
    from google.protobuf.message import DecodeError

    try:
        # Written anew, since the home may have been moved since.
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
    """Turns what a lost or broken online store says into one sentence, as Damaged or NotReady."""
    try:
        yield
    except sqlite3.DatabaseError as error:
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


def apply(home: Home) -> str:
    """Register feature_repo's definitions in the home's registry; returns what is registered, in words.

    Raises NotReady before the first ingest, since Feast infers types from the lake.
    """
    require_catalogue(home)
    from feast import Entity, FeatureService, FeatureStore, FeatureView

    with warnings.catch_warnings():
        # Feast wants entities to name their type; ours is the log's, so Feast infers it.
        warnings.simplefilter("ignore", DeprecationWarning)
        from feature_repo import definitions

    with home.exclusive():
        store = FeatureStore(fs_yaml_file=write_configuration(home))
        found = [
            thing
            for thing in vars(definitions).values()
            if isinstance(thing, Entity | FeatureView | FeatureService)
        ]
        with online_errors(home):
            store.apply(found)
    count = {
        kind: sum(isinstance(t, kind) for t in found) for kind in (Entity, FeatureView, FeatureService)
    }
    entities, views, services = count.values()
    return f"{entities} entities, {views} feature views, {services} feature services"
