"""DuckDB's extensions, and access to object storage."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from urllib.parse import urlsplit

import duckdb

from bahe_core.errors import BadInput, one_line
from bahe_lake.sql import sql_literal


def load_extension(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Load an extension from the wheel that carries it or, without that wheel, from DuckDB's repository.

    `connection` may take unsigned ones: pip has checked a wheel when it was installed. What comes from the
    repository, which is read without encryption, has its signature checked here.
    """
    package = importlib.util.find_spec(f"duckdb_extension_{name}")
    if package is not None and package.submodule_search_locations:
        root = Path(package.submodule_search_locations[0])
        carried = root / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if carried.is_file():
            connection.execute(f"LOAD {sql_literal(str(carried))}")
            return
    with duckdb.connect() as checking:
        checking.execute(f"INSTALL {name}")
        checking.execute(f"LOAD {name}")
    connection.execute(f"LOAD {name}")


def open_object_storage(connection: duckdb.DuckDBPyConnection) -> None:
    """Let this connection read `s3://`, `http://` and `https://`, and write to S3.

    Credentials come from where every AWS client looks (environment, profile, role) and are neither stored
    nor shown; public buckets need none. AWS_ENDPOINT_URL names an object store other than Amazon's.
    Raises BadInput when DuckDB's extensions for it are missing.
    """
    try:
        for extension in ("httpfs", "aws"):
            load_extension(connection, extension)
    except duckdb.Error as error:
        raise BadInput(
            f"URLs need DuckDB's extensions httpfs and aws ({one_line(error)}); pip install 'bahe[s3]'."
        ) from None
    options = ["TYPE s3", "PROVIDER credential_chain", "VALIDATION 'none'"]
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", ""))
    if endpoint.netloc:
        secure = str(endpoint.scheme == "https").lower()
        options += [f"ENDPOINT {sql_literal(endpoint.netloc)}", f"USE_SSL {secure}", "URL_STYLE 'path'"]
    connection.execute(f"CREATE OR REPLACE SECRET object_storage ({', '.join(options)})")
