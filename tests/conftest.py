"""A small log, a small language model with random weights, and homes filled from them."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

# One thread for each of the test processes that run side by side; a lone one may have two.
os.environ.setdefault("BAHE_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

from bahe_core.machine import configure_threads

configure_threads()

import numpy as np
import pandas as pd
import pytest
import yaml

from bahe_core.home import Home
from benchmarks.tiny import write_backbone

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers and width 32 with random weights, in Hugging Face's folder form."""
    return write_backbone(tmp_path_factory.mktemp("backbone"), ["liked", "disliked", *WORDS])


def small_log(seed: int = 0, users: int = 30, items: int = 25, rows: int = 900) -> dict[str, pd.DataFrame]:
    """Behaviors, impressions and items in which users like the items of one half of the words."""
    rng = np.random.default_rng(seed)
    text = {i: " ".join(rng.choice(WORDS[:30] if i % 2 else WORDS[30:], 4)) for i in range(items)}
    user, item = rng.integers(users, size=rows), rng.integers(items, size=rows)
    time = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(
        np.sort(rng.integers(0, 90 * 24 * 3600, rows)), unit="s"
    )
    like = rng.random(rows) < np.where(user % 2 == item % 2, 0.8, 0.25)
    return {
        "impressions": pd.DataFrame(
            {
                "impression_id": np.arange(rows),
                "user_id": [f"u{u}" for u in user],
                "item_id": item,
                "event_timestamp": time,
                "clicked": like.astype(int),
            }
        ),
        "behaviors": pd.DataFrame(
            {
                "user_id": [f"u{u}" for u in user],
                "channel": np.where(like, "liked", "disliked"),
                "text": [
                    f"{'liked' if ok else 'disliked'} {text[i]}" for ok, i in zip(like, item, strict=True)
                ],
                "event_timestamp": time,
                "item_id": item,
            }
        ),
        "items": pd.DataFrame(
            {
                "item_id": range(items),
                "text": [text[i] for i in range(items)],
                "event_timestamp": pd.Timestamp("2023-12-01", tz="UTC"),
            }
        ),
        # u_cold is known, and never did anything.
        "users": pd.DataFrame(
            {
                "user_id": [*(f"u{u}" for u in range(users)), "u_cold"],
                "event_timestamp": pd.Timestamp("2023-12-01", tz="UTC"),
            }
        ),
    }


def write_dataset(
    folder: Path, log: dict[str, pd.DataFrame], backbone: Path | None = None, **more: object
) -> Path:
    """The log as Parquet files with a dataset.yaml beside them; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, object] = {"name": "small", "channels": ["liked", "disliked"]}
    for table, rows in log.items():
        rows.to_parquet(folder / f"{table}.parquet")
        sections[table] = {"files": f"{table}.parquet"}
    if backbone is not None:
        sections["backbone"] = {"path": str(backbone), "shallow_layers": 2, "deep_layers": 2}
    sections["model"] = {"deep_width": 8, "profile_width": 8, "head_width": 16}
    sections["training"] = {"epochs": 2, "impressions_per_step": 200}
    sections.update(more)
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


SERVICES = {"redis": 6379, "postgres": 5432}
"""Ports on this machine."""


def require_service(name: str) -> None:
    """Skip the test where the service does not answer, and fail where BAHE_REQUIRE_SERVICES names it."""
    port = SERVICES[name]
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            return
    if name in os.environ.get("BAHE_REQUIRE_SERVICES", "").split():
        pytest.fail(f"{name} does not answer on port {port}, and BAHE_REQUIRE_SERVICES wants it: start it")
    pytest.skip(f"{name} does not answer on port {port}")


RAY_WORKERS = 2


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


POSTGRES = "postgresql://postgres@127.0.0.1/test"


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
