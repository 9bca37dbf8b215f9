"""Vectors in a home that goes on: logs that change, encoders that change, models that grow old."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from bahe_core.errors import BadInput, BaheError, NotReady
from bahe_core.home import Home
from bahe_lake.catalogue import scalar, snapshot
from bahe_lake.connection import LAKE, lake
from bahe_lake.transactions import commit, transact
from feature_repo.store import open_store
from materialize.ingest import derive
from materialize.training import train
from materialize.upkeep.prune import prune
from materialize.vectors import chunks, encode
from materialize.vectors import embed as embedding
from materialize.vectors.embed import embed
from materialize.vectors.encoder_versions import versions
from materialize.vectors.stored_atoms import current_encoder
from tests.support.cli import call
from tests.support.home_contents import copy_of
from tests.support.logs import small_log, write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    folder = tmp_path_factory.mktemp("over_time")
    dataset = write_dataset(folder / "log", small_log(rows=300), tiny_backbone)
    home = Home.at(folder / "home")
    call("run", dataset, "--tracker", "none", home=home)
    return home


@pytest.fixture
def home(filled: Home, tmp_path: Path) -> Home:
    """A copy that the test may change."""
    return copy_of(filled, tmp_path)


def user_vectors(home: Home) -> dict[str, np.ndarray]:
    with lake(home) as connection:
        rows = connection.execute("SELECT user_id, embedding FROM user_embedding").fetchall()
    return {user: np.array(vector) for user, vector in rows}


def change_log(home: Home, *statements: str) -> None:
    """Change the log as an ingest does: with its derived tables, in one commit."""
    with lake(home) as connection:

        def work() -> None:
            for statement in statements:
                connection.execute(statement)
            derive.prepare(connection)
            derive.derive(connection, ["liked", "disliked"], anew=True)

        transact(connection, work)


def from_nothing(home: Home) -> dict[str, np.ndarray]:
    """What `embed` makes when it has to make all."""
    with lake(home) as connection:
        commit(connection, ["DELETE FROM user_embedding", "DELETE FROM item_embedding"])
        connection.execute("DELETE FROM runs WHERE job = 'embed'")
    embed(home)
    return user_vectors(home)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for user, vector in found.items():
        np.testing.assert_allclose(vector, expected[user], atol=1e-5, err_msg=user)


REPLACED = (
    # As many behaviors as before, the latest where it was; another text in the middle of the timeline.
    "UPDATE behaviors SET atom_id = (SELECT max(atom_id) FROM atoms WHERE channel = behaviors.channel)"
    " WHERE user_id = 'u1' AND event_timestamp = (SELECT min(event_timestamp) FROM behaviors"
    " WHERE user_id = 'u1')"
)


def test_nothing_new_loads_no_model_and_commits_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(embedding, "load", never)
    monkeypatch.setattr(encode, "load_backbone", never)
    with lake(home) as connection:
        before = snapshot(connection)
    assert embed(home).users_added == 0
    assert encode.encode(home).added == 0
    with lake(home) as connection:
        assert snapshot(connection) == before


@pytest.mark.parametrize("feed", ["change feed", "expired snapshots"])
def test_only_what_changed_is_embedded_again(feed: str, home: Home) -> None:
    late = (
        "INSERT INTO behaviors BY NAME SELECT * REPLACE (event_timestamp - INTERVAL 1 SECOND AS"
        " event_timestamp) FROM behaviors WHERE user_id = 'u2' ORDER BY event_timestamp LIMIT 1"
    )
    gone = "DELETE FROM {} WHERE user_id = 'u3'"
    change_log(
        home,
        REPLACED,
        late,
        *(gone.format(table) for table in ("behaviors", "impressions", "users")),
        "UPDATE items SET atom_id = (SELECT max(atom_id) FROM atoms WHERE channel = 'item')"
        " WHERE item_id = 4",
    )
    if feed == "expired snapshots":
        with lake(home) as connection:
            listed = connection.execute(f"SELECT list(snapshot_id) FROM {LAKE}.snapshots()").fetchone()
            assert listed is not None
            old = [number for number in listed[0] if number != snapshot(connection)]
            connection.execute(f"CALL ducklake_expire_snapshots('{LAKE}', versions => {old})")
    done = embed(home)
    assert (done.users_added, done.items_added) == (2, 1)
    found = user_vectors(home)
    assert "u3" not in found
    assert len(found) == done.users
    assert (embed(home).users_added, embed(home).items_added) == (0, 0)
    assert_same(found, from_nothing(home))


def test_only_a_click_on_another_item_changes_what_a_known_user_has_seen(home: Home) -> None:
    with lake(home) as connection:
        row = connection.execute(
            """
            SELECT user_id, item_id
            FROM impressions
            GROUP BY ALL
            HAVING max(clicked) = 0
            ORDER BY ALL
            LIMIT 1
            """
        ).fetchone()
    assert row is not None
    user, item = row
    before = user_vectors(home)[user]
    shown = (
        "INSERT INTO impressions BY NAME SELECT * REPLACE (impression_id + 300000 AS impression_id,"
        f" {{clicked}} AS clicked) FROM impressions WHERE user_id = '{user}' AND item_id = {item} LIMIT 1"
    )
    change_log(home, shown.format(clicked=0))
    assert embed(home).users_added == 0
    change_log(home, shown.format(clicked=1).replace("300000", "400000"))
    assert embed(home).users_added == 1
    np.testing.assert_allclose(user_vectors(home)[user], before, atol=1e-6)  # computed beside fewer users
    with lake(home) as connection:
        seen = connection.execute("SELECT seen_items FROM user_embedding WHERE user_id = ?", [user])
        assert str(item) in (seen.fetchone() or ([],))[0]


def test_impressions_of_known_users_change_no_vector(home: Home) -> None:
    shown = (
        "INSERT INTO impressions BY NAME SELECT * REPLACE (impression_id + 100000 AS impression_id)"
        " FROM impressions LIMIT 5"
    )
    change_log(home, shown)
    assert embed(home).users_added == 0
    change_log(home, shown.replace("(imp", "('newcomer' AS user_id, imp").replace("100000", "200000"))
    done = embed(home)
    assert (done.users_added, done.users) == (1, 32)


def test_small_batches_make_the_same_vectors(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = user_vectors(home)
    monkeypatch.setattr(embedding, "BEHAVIORS_PER_BATCH", 40)
    monkeypatch.setattr(embedding, "USERS_PER_BATCH", 7)
    monkeypatch.setattr(embedding, "ITEMS_PER_BATCH", 9)
    assert_same(from_nothing(home), expected)
    assert not list(home.spill.glob("*"))


def atom_vectors(home: Home) -> list[tuple[int, str, list[float]]]:
    with lake(home) as connection:
        return connection.execute(
            "SELECT atom_id, encoder_version, embedding FROM atomic_behavior_embedding ORDER BY 1, 2"
        ).fetchall()


def test_processes_make_what_one_makes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = atom_vectors(home)
    with lake(home) as connection:
        commit(connection, ["DELETE FROM atomic_behavior_embedding"])
    monkeypatch.setattr(chunks, "ATOMS_PER_CHUNK", 16)
    done = encode.encode(home, processes=2)
    found = atom_vectors(home)
    assert done.added == len(expected)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], atol=1e-2)


def test_a_process_that_dies_is_one_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with lake(home) as connection:
        commit(connection, ["DELETE FROM atomic_behavior_embedding"])
    monkeypatch.setattr(chunks, "_begin", _die)
    with pytest.raises(BaheError, match="died"):
        encode.encode(home, processes=2)


def _die(*_: object) -> None:
    os._exit(1)


def test_no_processes_are_refused(home: Home) -> None:
    with pytest.raises(BadInput, match="--processes is 0"):
        encode.encode(home, processes=0)


def change_dataset(home: Home, **sections: object) -> None:
    path = home.root / "dataset.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))


def test_a_new_encoder_is_built_beside_and_used_when_complete(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lake(home) as connection:
        old = current_encoder(connection, home)
    change_dataset(home, encoder={"pooling": "last", "storage": "float16"}, training={"epochs": 1})
    with pytest.raises(NotReady, match="run `bahe encode` first"):
        train.train_models(home, tracker="none")

    class Killed(BaseException):
        pass

    class Dying(chunks.ChunkEncoder):
        def encode(self, texts: chunks.Texts, *more: object) -> chunks.Encodings:
            if texts.atoms["atom_id"][0].as_py() > 0:
                raise Killed
            return super().encode(texts)

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "ATOMS_PER_CHUNK", 8)
        patch.setattr(encode, "ATOMS_PER_COMMIT", 8)
        patch.setattr(encode, "ChunkEncoder", Dying)
        with pytest.raises(Killed):
            encode.encode(home)
    with lake(home) as connection:
        assert current_encoder(connection, home) == old
        by_name = {v.encoder_version: v for v in versions(connection)}
        (new,) = by_name.keys() - {old}
        assert by_name[old].complete
        assert by_name[old].current
        assert 0 < by_name[new].encoded < by_name[new].atoms
    # Until it is complete, everything goes on with the old one, and prune leaves both alone.
    call("frame", home=home)
    trained = train.train_models(home, tracker="none")
    config = json.loads((trained.artifact / "config.json").read_text())
    assert config["encoder_version"] == old
    call("embed", home=home)
    assert prune(home, keep=0, dry_run=True).encoder_versions == ()

    # An atom that comes meanwhile gets a vector of both.
    arrived = (
        "INSERT INTO atoms SELECT 77, 'liked', 'liked word1 word59', first_seen FROM atoms LIMIT 1",
        "INSERT INTO behaviors BY NAME SELECT * REPLACE (77 AS atom_id, event_timestamp + INTERVAL 1 SECOND"
        " AS event_timestamp, 'liked' AS channel) FROM behaviors WHERE user_id = 'u5' LIMIT 1",
    )
    change_log(home, *arrived)
    assert f"{old}, which a model in use reads: 1 atoms encoded" in call("encode", home=home).output
    with lake(home) as connection:
        assert current_encoder(connection, home) == new
        assert {v.encoder_version: (v.complete, v.current) for v in versions(connection)} == {
            old: (True, False),
            new: (True, True),
        }
        stored = connection.execute(
            "SELECT list(DISTINCT x) FROM (SELECT unnest(embedding) AS x FROM atomic_behavior_embedding"
            " WHERE encoder_version = ?)",
            [new],
        ).fetchone()
    assert stored is not None
    numbers = np.array(stored[0], dtype=np.float32)
    np.testing.assert_array_equal(numbers, numbers.astype(np.float16).astype(np.float32))
    assert embed(home).users_added == 1  # the live model reads the old ones, and finds the new atom there


def test_prune_keeps_what_is_needed_and_drops_the_rest(home: Home) -> None:
    call("publish", home=home)
    (first,) = (path.name for path in home.models.glob("bahe-*"))
    names = [first]
    for epochs in (1, 3):
        change_dataset(home, training={"epochs": epochs, "impressions_per_step": 200})
        for command in (("train", "--tracker", "none"), ("embed",), ("publish",)):
            call(*command, home=home)
        names.append(train.train_models(home, tracker="none").model_version)
    (home.models / "bahe-abandoned.checkpoint").write_bytes(b"x")
    os.utime(home.models / "bahe-abandoned.checkpoint", (0, 0))
    (home.frames / "old").mkdir()
    store = open_store(home)

    def online() -> list[bool]:
        rows = [{"user_id": "u1", "model_version": name} for name in names]
        answer = store.get_online_features(["user_embedding:embedding"], rows).to_dict()
        return [vector is not None for vector in answer["embedding"]]

    assert online() == [True] * 3
    told = prune(home, keep=1, dry_run=True)
    assert told.models == (first,)
    assert online() == [True] * 3
    done = prune(home, keep=1)
    assert (done.models, set(done.kept)) == ((first,), set(names[1:]))
    assert done.rows == {"atomic_behavior_embedding": 0, "user_embedding": 31, "item_embedding": 25}
    assert (done.frames, done.checkpoints) == (("old",), ("bahe-abandoned.checkpoint",))
    assert done.online_rows == 31 + 25
    assert done.freed > 0
    assert online() == [False, True, True]
    assert not (home.models / first).exists()
    with lake(home) as connection:
        assert scalar(connection, "SELECT count(DISTINCT model_version) FROM user_embedding") == 2
    # Whatever follows finds what it needs, and there is nothing left to drop.
    again = prune(home, keep=1)
    assert (again.models, again.frames, sum(again.rows.values())) == ((), (), 0)
    assert embed(home).users_added == 0
    change_log(home, REPLACED)
    assert embed(home).users_added == 1
    call("embed", home=home)  # with its gate
    call("publish", home=home)
    frame = next(home.frames.glob("*/frame.parquet"))
    call("frame", home=home)
    assert frame.is_file()


@pytest.mark.parametrize("option", ["keep", "older_than"])
def test_prune_refuses_negative_numbers(option: str, home: Home) -> None:
    with pytest.raises(BadInput, match="at least 0"):
        prune(home, **{option: -1})  # type: ignore[arg-type]
