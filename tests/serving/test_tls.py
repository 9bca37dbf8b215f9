"""`bahe serve --tls-certificate --tls-key`: asked over HTTPS by whoever trusts it, or one sentence."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import bahe
from bahe_core.errors import BadInput, Unreachable
from bahe_core.home import Home
from serving.client import AsyncClient, Client
from tests.support.certificates import Pair, self_signed
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.service_process import Running, running


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def service(served: Home, tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tls")
    home = copy_of(served, folder)
    with running(home, folder / "log.txt", *pair.options, trusting=pair.trusting) as service:
        yield service


def test_the_client_asks_over_tls_whom_it_trusts(service: Running, pair: Pair) -> None:
    url = f"https://127.0.0.1:{service.port}"
    with Client(url, seconds=20, verify=pair.trusting) as trusting:
        assert trusting.score("u1", [3]).items[0].status == "ok"

    async def ask() -> str:
        async with AsyncClient(url, seconds=20, verify=pair.trusting) as trusting:
            return (await trusting.score("u1", [3])).items[0].status

    assert asyncio.run(ask()) == "ok"
    with (
        Client(url, seconds=20) as stranger,
        pytest.raises(Unreachable, match=r"a certificate that is not trusted .*self-signed"),
    ):
        stranger.score("u1", [3])


def test_answers_say_to_stay_with_tls_and_the_page_has_its_address(service: Running, pair: Pair) -> None:
    connection = http.client.HTTPSConnection("127.0.0.1", service.port, context=pair.trusting)
    connection.request("GET", "/docs")
    answer = connection.getresponse()
    assert answer.getheader("strict-transport-security") == "max-age=31536000"
    assert f"https://127.0.0.1:{service.port}/v1/score" in answer.read().decode()
    connection.close()


def test_who_asks_without_tls_gets_no_answer_and_leaves_no_trace(service: Running) -> None:
    before = service.log.read_text()
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    assert service.ask("GET", "/healthz")[0] == 200
    assert service.log.read_text() == before


@pytest.mark.slow
def test_workers_have_it_too(served: Home, tmp_path: Path, pair: Pair) -> None:
    home, options = copy_of(served, tmp_path), ("--workers", "2", *pair.options)
    with running(home, tmp_path / "log.txt", *options, trusting=pair.trusting) as service:
        assert {service.ask("GET", "/readyz")[0] for _ in range(8)} == {200}


def test_a_pair_that_cannot_be_served_is_one_sentence(tmp_path: Path, served: Home, pair: Pair) -> None:
    other, locked = self_signed(tmp_path / "other"), self_signed(tmp_path / "locked", passphrase="one")
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    for certificate, key, said in (
        (pair.certificate, None, "give both --tls-certificate and --tls-key"),
        (None, pair.key, "give both --tls-certificate and --tls-key"),
        (tmp_path / "none.pem", pair.key, r"none.pem cannot be read \(No such file"),
        (pair.certificate, tmp_path, r"cannot be read \(Is a directory"),
        (pair.certificate, other.key, "is not the key of"),
        (pair.certificate, locked.key, "needs a passphrase"),
        (junk, pair.key, "junk.pem is no certificate in PEM format"),
        (pair.key, pair.certificate, "key.pem is no certificate in PEM format"),
        (pair.certificate, junk, "cannot be served with .*junk.pem"),
    ):
        for count in (1, 2):
            with pytest.raises(BadInput, match=said) as refused:
                bahe.open(served.root).serve(workers=count, tls_certificate=certificate, tls_key=key)
            assert "\n" not in str(refused.value)


def test_the_command_line_says_it_too(served: Home, pair: Pair) -> None:
    with pytest.raises(BadInput, match="give both --tls-certificate and --tls-key"):
        call("serve", "--tls-certificate", pair.certificate, home=served)
