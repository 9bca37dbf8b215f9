"""DuckDB's extensions, and what they need to reach files that are not on this machine's disks."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from urllib.parse import urlsplit

import duckdb

from bahe_core.errors import BadInput, one_line


def load_extension(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Load from the wheel that carries the extension; without it, from DuckDB's own repository."""
    package = importlib.util.find_spec(f"duckdb_extension_{name}")
    if package is not None and package.submodule_search_locations:
        root = Path(package.submodule_search_locations[0])
        found = root / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if found.is_file():
            connection.execute(f"LOAD '{found}'")
            return
    connection.execute(f"INSTALL {name}")
    connection.execute(f"LOAD {name}")


def open_object_storage(connection: duckdb.DuckDBPyConnection) -> None:
    """Let this connection read `s3://`, `http://` and `https://`, and write to S3.

    Credentials are found as every AWS client finds them (environment, profile, role); none is kept or
    shown, and public buckets need none. AWS_ENDPOINT_URL names an object store that is not Amazon's.
    Raises BadInput where DuckDB's extensions for it are missing.
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
        options += [f"ENDPOINT '{endpoint.netloc}'", f"USE_SSL {secure}", "URL_STYLE 'path'"]
    connection.execute(f"CREATE OR REPLACE SECRET object_storage ({', '.join(options)})")
