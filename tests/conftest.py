"""A small log, a small language model with random weights, and homes filled from them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

# One thread for each of the test processes that run side by side; a lone one may have two.
os.environ.setdefault("BAHE_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

from bahe_core.machine import configure_threads

configure_threads()

import pytest

from bahe_core.home import Home
from tests.support.backbone import write_backbone
from tests.support.logs import WORDS
from tests.support.services import POSTGRES, RAY_WORKERS, require_service


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers and width 32 with random weights, in Hugging Face's folder form."""
    return write_backbone(tmp_path_factory.mktemp("backbone"), ["liked", "disliked", *WORDS])


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # 15 by default, with which workers starve beside other tests.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's spelling
    import ray

    ray.init(address="local", num_cpus=RAY_WORKERS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(ray_session: None, request: pytest.FixtureRequest) -> None:
    """A real Ray cluster of two workers on this machine; executors that are started join it."""
    import ray

    ray.cloudpickle.register_pickle_by_value(request.module)  # workers cannot import a test's module


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.at(tmp_path / "home")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A client of an S3 server that is ours alone, which the usual variables point to."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="shop")
    yield client
    server.stop()


@pytest.fixture
def postgres_schema(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a schema of the test's own, for the catalogue of a lake; it is gone afterwards."""
    require_service("postgres")
    import psycopg

    monkeypatch.setenv("PGPASSWORD", "postgres")
    schema = f"bahe_test_{uuid.uuid4().hex[:12]}"
    yield schema
    with psycopg.connect(POSTGRES, autocommit=True) as session:
        session.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
