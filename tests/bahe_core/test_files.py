"""A file or folder is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from bahe_core.files import new_folder, part_of, replace_atomically


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "page.html"
    for text in ("old", "new"):
        before = path.read_text() if path.exists() else None
        with replace_atomically(path) as part:
            part.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def half_a_page(file: Path) -> None:
        file.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace_atomically(path) as part:
        half_a_page(part)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_differ_in_their_ending_alone_are_written_side_by_side(tmp_path: Path) -> None:
    with replace_atomically(tmp_path / "a.json") as one, replace_atomically(tmp_path / "a.yaml") as two:
        one.write_text("json")
        two.write_text("yaml")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.json": "json", "a.yaml": "yaml"}


def test_a_folder_appears_whole_without_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    left = part_of(folder)
    left.mkdir()
    (left / "half").write_text("")
    with new_folder(folder) as part:
        (part / "inner").mkdir()
        (part / "inner" / "config.json").write_text("{}")
        assert not folder.exists()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "model",
        "model/inner",
        "model/inner/config.json",
    ]


def test_a_folder_that_fails_or_is_there_already_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), new_folder(folder):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "mine").write_text("")
    with pytest.raises(OSError, match="not empty"), new_folder(folder) as part:
        (part / "other").write_text("")
    assert [p.name for p in folder.iterdir()] == ["mine"]
