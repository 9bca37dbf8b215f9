"""The push log by itself: files that others write to, cut back, replace or tidy away."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bahe_core.home import Home
from serving.live.push_log import Pushed, PushLog


def pushed(number: int, user_id: str = "u1", event_id: str | None = None) -> Pushed:
    return Pushed(
        user_id=user_id,
        channel="liked",
        text="liked it",
        atom_id=number,
        time_us=number,
        item_id=None,
        event_id=event_id,
    )


@pytest.fixture
def log(home: Home) -> PushLog:
    home.create()
    return PushLog(home)


def file_of(home: Home) -> Path:
    (path,) = home.pushed.glob("*.jsonl")
    return path


def test_a_line_that_lost_only_its_end_counts_once_when_it_is_sent_again(home: Home, log: PushLog) -> None:
    log.append(pushed(1))
    path = file_of(home)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert not log.has(pushed(1)), "it was not acknowledged"
    log.append(pushed(1))
    log.append(pushed(2))
    for one in (log, PushLog(home)):
        assert one.of_user("u1") == (pushed(1), pushed(2))


def test_the_senders_name_and_the_content_each_make_it_the_same(home: Home, log: PushLog) -> None:
    for one in (pushed(1, event_id="a"), pushed(2, event_id="a"), pushed(1, event_id="b"), pushed(3)):
        log.append(one)
    log.append(pushed(1, user_id="u2", event_id="a"))
    assert log.of_user("u1") == (pushed(1, event_id="a"), pushed(3))
    assert log.of_user("u2") == (pushed(1, user_id="u2", event_id="a"),)
    log.drop("u1", log.of_user("u1")[:1])
    assert log.of_user("u1") == (pushed(3),)
    assert not log.has(pushed(1))


def test_what_could_not_be_synced_is_not_there(
    home: Home, log: PushLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append(pushed(1))
    other, kept = PushLog(home), file_of(home).read_bytes()

    def fails(_: int) -> None:
        assert other.has(pushed(2)), "another worker may read it meanwhile"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="No space"):
            log.append(pushed(2))
    assert file_of(home).read_bytes() == kept
    log.append(pushed(1_000_000))  # longer than what was cut off
    for one in (log, other, PushLog(home)):
        assert one.of_user("u1") == (pushed(1), pushed(1_000_000))
    assert not other.has(pushed(2))


@pytest.mark.parametrize("again", [1, 5])
def test_a_file_made_anew_is_read_from_its_start(home: Home, log: PushLog, again: int) -> None:
    for number in range(3):
        log.append(pushed(number))
    assert len(log.of_user("u1")) == 3
    path = file_of(home)
    lines = path.read_text().splitlines(keepends=True)
    path.rename(home.root / "kept")
    for number in range(10, 10 + again):
        log.append(pushed(number))
    assert log.of_user("u1") == tuple(pushed(number) for number in range(10, 10 + again))
    # The same file, cut back.
    os.truncate(path, 0)
    assert log.of_user("u1") == ()
    with path.open("a") as file:
        file.write(lines[0])
    assert log.of_user("u1") == (pushed(0),)
