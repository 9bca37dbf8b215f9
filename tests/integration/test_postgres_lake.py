"""A lake whose catalogue is in PostgreSQL, shared by homes and machines."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import psycopg
import pytest
import yaml

from bahe_core.errors import BadInput, Busy, NotReady, Unreachable
from bahe_core.home import Home
from bahe_core.lake_location import LakeConfig
from bahe_lake.catalogue import scalar
from bahe_lake.connection import connect, lake
from bahe_lake.transactions import commit
from materialize.ingest.ingest import ingest
from serving.lookup.online_lookup import OnlineLookup
from tests.support import REPOSITORY
from tests.support.cli import call
from tests.support.logs import small_log, write_dataset
from tests.support.services import POSTGRES


@pytest.fixture
def config(tmp_path: Path, postgres_schema: str) -> LakeConfig:
    """A schema of the test's own."""
    # The name of its sessions is how a test finds them.
    url = f"{POSTGRES}?application_name={postgres_schema}"
    return LakeConfig(catalogue=url, schema=postgres_schema, data=str(tmp_path / "shared"))


def placed(root: Path, config: LakeConfig) -> Home:
    home = Home.at(root)
    home.place_lake(config)
    return home


@pytest.fixture
def filled(config: LakeConfig, tmp_path: Path) -> Home:
    """A home whose lake has two tables of a thousand rows."""
    home = placed(tmp_path / "home", config)
    with lake(home, create=True) as connection:
        commit(connection, [f"CREATE TABLE {t} AS SELECT range AS x FROM range(1000)" for t in "ab"])
    return home


def end_sessions(config: LakeConfig) -> None:
    with psycopg.connect(POSTGRES, autocommit=True) as session:
        session.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            [config.schema],
        )


@pytest.mark.slow
def test_from_log_to_scores_as_with_sqlite(config: LakeConfig, tiny_backbone: Path, tmp_path: Path) -> None:
    log = small_log(rows=400)
    here = {"catalogue": config.catalogue, "schema": config.schema, "data": "../shared"}
    embedded = Home.at(tmp_path / "embedded")
    shared = Home.at(tmp_path / "home")
    dataset = write_dataset(tmp_path / "log", log, tiny_backbone)
    call("ingest", str(dataset), "--home", str(embedded.root))
    call("encode", "--home", str(embedded.root))
    dataset = write_dataset(tmp_path / "log", log, tiny_backbone, lake=here)
    call("run", str(dataset), "--home", str(shared.root), "--tracker", "none")
    assert not (shared.root / "lake" / "catalogue.sqlite").exists()
    assert list((tmp_path / "shared").rglob("*.parquet"))
    for query in (
        "SELECT * FROM user_timeline ORDER BY ALL",
        "SELECT * EXCLUDE (created_timestamp) FROM item_stats ORDER BY ALL",
    ):
        with lake(embedded) as one, lake(shared) as other:
            assert one.execute(query).fetchall() == other.execute(query).fetchall()
    vectors = []
    for home in (embedded, shared):
        with lake(home) as connection:
            rows = connection.execute(
                "SELECT embedding FROM atomic_behavior_embedding ORDER BY atom_id"
            ).fetchall()
            vectors.append(np.array([row[0] for row in rows]))
    np.testing.assert_allclose(*vectors, atol=1e-5)
    assert len(OnlineLookup(shared).score("u1", list(range(25))).scores) == 25
    # Again: nothing is new. From another home: the lake is there already.
    with lake(shared) as connection:
        before = scalar(connection, "SELECT count(*) FROM runs")
    call("ingest", str(dataset), "--home", str(shared.root))
    call("encode", "--home", str(shared.root))
    second = Home.at(tmp_path / "second machine")
    done = ingest(second, dataset)
    assert done.skipped
    with lake(second) as connection:
        assert scalar(connection, "SELECT count(*) FROM runs") == before


WRITER = """
import sys
from pathlib import Path
from bahe_core.home import Home
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
table, root = sys.argv[1:]
with lake(Home.at(root)) as connection:
    for i in range(15):
        commit(connection, [
            f"DELETE FROM {table} WHERE x = {i}",
            f"INSERT INTO {table} SELECT {i} - 1000 FROM range(100)",
        ])
"""


def test_two_processes_write_two_tables_while_readers_read(filled: Home) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, table, str(filled.root)],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
        )
        for table in "ab"
    ]
    seen = []
    with lake(filled) as reader:
        while any(writer.poll() is None for writer in writers):
            row = reader.execute("SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)").fetchone()
            assert row is not None
            seen.append(row)
        final = reader.execute("SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)").fetchone()
    errors = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert final == (2485, 2485)
    assert {(count - 1000) % 99 for pair in seen for count in pair} == {0}, "a commit was seen in part"


def test_writers_of_one_table_try_again(filled: Home) -> None:
    failures: list[Exception] = []

    def write(start: int) -> None:
        try:
            with lake(filled) as connection:
                for i in range(start, start + 5):
                    commit(
                        connection,
                        [f"DELETE FROM a WHERE x = {i}", f"INSERT INTO a SELECT {-i} FROM range(100)"],
                    )
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(start,)) for start in (1, 6, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with lake(filled) as connection:
        assert scalar(connection, "SELECT count(*) FROM a") == 1000 + 15 * 99


def test_an_older_snapshot_is_read_and_never_written(filled: Home) -> None:
    with lake(filled) as connection:
        past = scalar(connection, "FROM lake.current_snapshot()")
        commit(connection, ["DELETE FROM a"])
    with lake(filled, as_of=past) as connection:
        assert scalar(connection, "SELECT count(*) FROM a") == 1000
        with pytest.raises(duckdb.Error):
            connection.execute("DELETE FROM a")
    with pytest.raises(BadInput, match="no snapshot 999"):
        connect(filled, as_of=999)


def test_jobs_of_two_homes_keep_each_other_out(filled: Home, config: LakeConfig, tmp_path: Path) -> None:
    other = placed(tmp_path / "second machine", config)
    with filled.exclusive(), pytest.raises(Busy, match="another home or machine"), other.exclusive():
        pass
    hold = (
        "import sys; from bahe_core.home import Home\n"
        f"with Home.at({str(other.root)!r}).exclusive():\n print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy), filled.exclusive():
            pass
        holder.send_signal(signal.SIGKILL)
    while True:  # until PostgreSQL has seen the connection go
        try:
            with filled.exclusive():
                break
        except Busy:
            continue
    # Another schema is another lake.
    apart = placed(tmp_path / "apart", replace(config, schema=f"{config.schema}_b"))
    with filled.exclusive(), apart.exclusive():
        pass


def test_a_lost_lock_is_told(filled: Home, config: LakeConfig) -> None:
    with pytest.raises(Busy, match="lost during the job"), filled.exclusive():
        end_sessions(config)


def write_while_it_restarts(home: Home, config: LakeConfig) -> None:
    with lake(home) as writer:
        writer.execute("BEGIN")
        writer.execute("DELETE FROM a WHERE x < 500")
        end_sessions(config)
        writer.execute("COMMIT")


def test_a_reader_survives_a_restart_of_the_server(filled: Home, config: LakeConfig) -> None:
    with lake(filled) as connection:
        end_sessions(config)
        assert scalar(connection, "SELECT count(*) FROM a") == 1000
        with pytest.raises(Unreachable, match="cannot be reached"):
            write_while_it_restarts(filled, config)
        assert scalar(connection, "SELECT count(*) FROM a") == 1000


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://postgres@127.0.0.1:1/test", "Connection refused"),
        ("postgresql://postgres@127.0.0.1/bahe_no_such_database", "does not exist"),
        ("postgresql://postgres@no-such-host.invalid/test", "not known"),
    ],
)
def test_a_server_that_does_not_answer(
    url: str, words: str, config: LakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "sesame" if "no-such-host" in url else "postgres")
    dataset = write_dataset(
        tmp_path / "log", small_log(rows=50), lake=asdict(replace(config, catalogue=url))
    )
    for reach in (
        lambda: ingest(Home.at(tmp_path / "home"), dataset),
        lambda: connect(Home.at(tmp_path / "home")),
    ):
        with pytest.raises(Unreachable, match=words) as error:
            reach()
        assert "\n" not in str(error.value)
        assert "sesame" not in str(error.value)


def test_a_lake_of_another_dataset_is_refused(config: LakeConfig, tmp_path: Path) -> None:
    log = small_log(rows=50)
    lake_section = asdict(config)
    ingest(Home.at(tmp_path / "a"), write_dataset(tmp_path / "log", log, lake=lake_section))
    other = write_dataset(tmp_path / "log2", log, lake=lake_section, name="other")
    with pytest.raises(BadInput, match="holds dataset small, not other"):
        ingest(Home.at(tmp_path / "b"), other)
    other = write_dataset(tmp_path / "log2", log, lake=lake_section, channels=["disliked", "liked"])
    with pytest.raises(BadInput, match="holds channels"):
        ingest(Home.at(tmp_path / "b"), other)
    elsewhere = write_dataset(tmp_path / "log2", log, lake=lake_section | {"data": "elsewhere"})
    with pytest.raises(BadInput, match="keeps its data in"):
        ingest(Home.at(tmp_path / "c"), elsewhere)
    # A home that was refused, and never filled, may be placed elsewhere; a filled one may not.
    ingest(Home.at(tmp_path / "c"), write_dataset(tmp_path / "log3", log))
    with pytest.raises(BadInput, match="is not where the lake of"):
        ingest(Home.at(tmp_path / "c"), write_dataset(tmp_path / "log", log, lake=lake_section))


def test_a_schema_without_a_lake_holds_no_data_yet(config: LakeConfig, tmp_path: Path) -> None:
    home = placed(tmp_path / "home", config)
    for as_of in (None, 3):
        with pytest.raises(NotReady, match="bahe ingest"):
            connect(home, as_of=as_of)
    with psycopg.connect(POSTGRES) as session:
        made = session.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [config.schema]).fetchone()
    assert made is None


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"catalogue": "postgresql://me:sesame@host/db", "data": "/d"}, "holds a password"),
        ({"catalogue": "postgresql://me@host/db?password=sesame", "data": "/d"}, "holds a password"),
        ({"catalogue": "mysql://me@host/db", "data": "/d"}, "not of the form"),
        ({"catalogue": "postgresql://me@host", "data": "/d"}, "not of the form"),
        ({"catalogue": "postgresql://me@host/db"}, "`data` is missing"),
        ({"catalogue": "postgresql://me@host/db", "data": "ftp://d"}, "s3://bucket/prefix"),
        ({"catalogue": "postgresql://me@host/db", "data": "/d", "schema": "A b"}, "lower-case letters"),
        ({"catalog": "postgresql://me@host/db"}, "not a known field"),
    ],
)
def test_a_wrong_lake_section_is_refused(section: dict[str, str], words: str, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "log", small_log(rows=50), lake=section)
    with pytest.raises(BadInput, match=words) as error:
        ingest(Home.at(tmp_path / "home"), dataset)
    assert "sesame" not in str(error.value)
    assert not (tmp_path / "home").exists()


def test_the_data_alone_may_lie_elsewhere(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "log", small_log(rows=50), lake={"data": "../big disk"})
    home = Home.at(tmp_path / "home")
    ingest(home, dataset)
    assert list((tmp_path / "big disk").rglob("*.parquet"))
    assert yaml.safe_load((home.root / "lake.yaml").read_text())["data"] == str(tmp_path / "big disk")
    with lake(home) as connection:
        assert scalar(connection, "SELECT count(*) FROM impressions") == 50
