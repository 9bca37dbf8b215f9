"""deploy/compose.yaml: what it starts, where it listens, what it waits for."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bahe_core.home import Home
from feature_repo.store import configuration
from tests.deploy.test_image import IMAGE, the
from tests.support.cli import require_accepted
from tests.support.deployment import DEPLOY, documents, environment, project, require_known

(COMPOSE,) = documents(DEPLOY / "compose.yaml")
OURS = ("serve", "daily")
INTERPOLATED = re.compile(r"(?<!\$)\$\{([A-Z_]+)(:\?)?")


def services() -> dict[str, Any]:
    found: dict[str, Any] = COMPOSE["services"]
    return found


@pytest.mark.parametrize("name", OURS)
def test_each_is_the_image_with_a_command_of_bahe(name: str) -> None:
    service = services()[name]
    assert service["image"] == f"bahe:{project()['version']}"
    build = service["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    require_accepted(service["command"])
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    require_known(set(service["environment"]))


def test_the_host_lets_only_itself_ask() -> None:
    service = services()["serve"]
    options = dict(zip(service["command"][1::2], service["command"][2::2], strict=False))
    assert options["--host"] == "0.0.0.0", "of the container; with it bahe asks for an API key"
    assert options["--port"] == the("EXPOSE").rest
    assert service["ports"] == [f"127.0.0.1:8000:{options['--port']}"]
    assert [name for name, one in services().items() if "ports" in one] == ["serve"]


@pytest.mark.parametrize("name", OURS)
def test_what_is_mounted_is_what_the_image_and_the_commands_read(name: str) -> None:
    service = services()[name]
    mounts = dict(re.fullmatch(r"(.*?):(/[^:]+)(?::ro)?", one).groups() for one in service["volumes"])  # type: ignore[union-attr]
    places = set(mounts.values())
    assert mounts["data"] == the("WORKDIR").rest
    assert Path(environment(IMAGE)["BAHE_HOME"]).is_relative_to(mounts["data"])
    assert service["environment"]["BAHE_FEATURE_STORE"] == mounts["./online_store.yaml"]
    assert (DEPLOY / "online_store.yaml").is_file()
    for word in service["command"]:
        assert not word.startswith("/") or str(Path(word).parent) in places
    assert {name for name in mounts if not name.startswith((".", "$"))} <= set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", OURS)
def test_it_waits_for_servers_that_say_when_they_are_ready(name: str) -> None:
    for server, wanted in services()[name]["depends_on"].items():
        assert wanted == {"condition": "service_healthy"}
        kind, line = services()[server]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        assert shlex.split(line)[0] == {"redis": "redis-cli", "postgres": "pg_isready"}[server]


def test_the_night_is_not_started_by_up_and_answers_nobody() -> None:
    daily = services()["daily"]
    assert daily["profiles"]
    assert daily["restart"] == "no"
    assert daily["healthcheck"] == {"disable": True}


def test_no_password_is_in_it_and_none_may_be_left_out() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    found = INTERPOLATED.findall(text)
    assert {name for name, _ in found} == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "LOG_FOLDER"}
    assert {required for _, required in found} == {":?"}
    for service in services().values():
        for name, value in service.get("environment", {}).items():
            assert value.startswith("${") == ("PASSWORD" in name or "AUTH" in name)


def test_the_online_store_is_one_that_a_home_takes(tmp_path: Path) -> None:
    store = configuration(Home.at(tmp_path), str(DEPLOY / "online_store.yaml"))["online_store"]
    assert store["type"] == "feast_ducklake.GuardedRedisOnlineStore"
    assert store["url"] == "redis://:${REDIS_PASSWORD}@redis:6379/0"
    assert "redis" in services()
