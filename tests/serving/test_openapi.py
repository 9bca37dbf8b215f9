"""What /openapi.json tells a stranger beside the fields: keys and their scopes, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from bahe_core.home import Home
from serving.http.api import create_app, scope_of
from serving.http.keys import new_key, revoke_key
from tests.support.home_contents import copy_of


@pytest.fixture
def home(served: Home, tmp_path: Path) -> Home:
    return copy_of(served, tmp_path)


def operations(client: TestClient) -> dict[str, Any]:
    """By method and path."""
    paths = client.get("/openapi.json").json()["paths"]
    return {f"{method} {path}": one for path, methods in paths.items() for method, one in methods.items()}


def test_each_route_says_which_scope_of_a_key_it_asks_for(home: Home) -> None:
    client = TestClient(create_app(home, live=True))
    for route, operation in operations(client).items():
        scope = scope_of(route.partition(" ")[2])
        assert ("401" in operation["responses"]) == (scope is not None)
        wanted = None if scope is None else [{}, {"bearer": [scope]}, {"header": [scope]}]
        assert operation.get("security") == wanted, route


def test_a_key_is_asked_for_from_when_there_is_one(home: Home) -> None:
    client = TestClient(create_app(home))

    def asked_for() -> bool:
        (one,) = {{} not in one["security"] for one in operations(client).values() if "security" in one}
        return one

    assert not asked_for()
    new_key(home, "first")
    assert asked_for()
    assert "securitySchemes" in client.get("/openapi.json").json()["components"]
    revoke_key(home, "first")
    assert asked_for()
    home.api_keys.write_text("no json")
    assert asked_for()


def test_each_refusal_is_described(home: Home) -> None:
    for route, operation in operations(TestClient(create_app(home, live=True))).items():
        assert {"400", "404", "408", "413", "414", "422", "431", "503"} <= operation["responses"].keys(), (
            route
        )
        assert operation["responses"]["503"]["headers"]["Retry-After"]["required"]


@pytest.mark.parametrize("path", ["/nowhere", "/v1/score", "/V1/score/"])
def test_an_address_that_is_none_is_refused_in_a_sentence(home: Home, path: str) -> None:
    refused = TestClient(create_app(home)).get(path)
    assert refused.status_code in (404, 405)
    assert refused.json()["detail"].endswith("/docs tells of every route.")
