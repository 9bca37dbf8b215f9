from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from bahe_core.errors import BadInput, Busy
from bahe_core.home import Home
from bahe_models import auc
from bahe_synth import rows as synth_rows
from bahe_synth.log import counted_auc, synth
from bahe_synth.rows import Settings
from bahe_synth.words import SENTENCES, STYLES, TOPICS, behavior_texts, compose
from bahe_synth.world import World, zipf_rank
from materialize.gate import gate
from materialize.ingest.ingest import ingest
from tests.support import REPOSITORY
from tests.support.cli import call

SMALL = {"users": 300, "items": 200, "behaviors": 20_000, "impressions": 20_000, "atoms": 2_000}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "log"
    synth(folder, days=10, **SMALL)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def query(folder: Path, text: str) -> list[tuple[object, ...]]:
    """SQL in which {behaviors} stands for the files of that table."""
    tables = ("behaviors", "impressions", "items", "users", "truth")
    known = {table: f"read_parquet('{folder}/{table}/*.parquet')" for table in tables}
    with duckdb.connect() as connection:
        return connection.execute(text.format_map(known)).fetchall()


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_ingest_takes_it_and_its_gate_passes(kind: str, tmp_path: Path) -> None:
    done = synth(
        tmp_path / "log", days=3, **{**SMALL, "behaviors": 3_000, "impressions": 2_000}, format=kind
    )
    home = Home.at(tmp_path / "home")
    found = ingest(home, done.dataset)
    assert not found.duplicates
    assert {t: found.totals[t] for t in done.rows} == done.rows
    gate(home, "ingest")


def test_a_seed_gives_the_same_bytes_and_another_seed_another_log(log: Path, tmp_path: Path) -> None:
    synth(tmp_path / "again", days=10, **SMALL)
    assert digests(tmp_path / "again") == digests(log)
    synth(tmp_path / "other", days=10, **SMALL, seed=1)
    other, first = digests(tmp_path / "other"), digests(log)
    same = {name for name in first if other.get(name) == first[name]}
    assert same == {"dataset.yaml"}


def test_further_days_leave_the_days_before_alone(log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    shutil.copytree(log, folder)
    before = digests(folder)
    done = synth(folder, days=12)
    assert (done.days, done.days_written) == (12, 2)
    after = digests(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2 * 3  # nobody new comes after the first days
    assert done.rows["behaviors"] == 24_000
    assert query(folder, "SELECT count(*), count(DISTINCT impression_id) FROM {impressions}") == [
        (24_000,) * 2
    ]
    assert synth(folder).days_written == 0


def test_a_killed_run_is_finished_by_the_next(log: Path, tmp_path: Path) -> None:
    child = """
import os, signal, sys
from pathlib import Path
from bahe_synth import log as synth
calls, replace = 0, Path.replace
def counting(self, target):
    global calls
    calls += 1
    if calls == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = counting
synth.synth(Path(sys.argv[1]), days=10, **eval(sys.argv[2]))
"""
    folder = tmp_path / "log"
    command = [sys.executable, "-c", child, str(folder), repr(SMALL)]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (folder / "dataset.yaml").exists()
    assert list(folder.rglob("*.part"))
    synth(folder, days=10, **SMALL)
    assert digests(folder) == digests(log)


def test_two_at_once(tmp_path: Path) -> None:
    from filelock import FileLock

    synth(tmp_path / "log", days=1, **SMALL)
    with FileLock(tmp_path / "log" / ".lock"), pytest.raises(Busy, match="wait for it"):
        synth(tmp_path / "log", days=2)


def test_the_log_is_drawn_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth_rows, "CHUNK", 300)
    settings = Settings(**SMALL, days=10)
    chunks = list(synth_rows.behaviors(settings, 4))
    assert sum(chunk.num_rows for chunk in chunks) == 2_000
    assert max(chunk.num_rows for chunk in chunks) <= 300
    people = [row for day in range(10) for t in synth_rows.users(settings, day) for row in t["user_id"]]
    assert len(set(people)) == len(people) == 300


def test_the_planted_signal_is_what_the_truth_says(log: Path, tmp_path: Path) -> None:
    truth = pq.read_table(log / "truth")
    clicked, probability = truth["clicked"].to_numpy(), truth["click_probability"].to_numpy()
    done = synth(log)
    assert done.bayes_auc == pytest.approx(auc(clicked, probability), abs=1e-4)
    assert done.popularity_auc == pytest.approx(auc(clicked, truth["item_appeal"].to_numpy()), abs=1e-4)
    assert done.bayes_auc > done.popularity_auc + 0.1
    # Calibrated: of impressions with some probability, that share was clicked.
    for low in np.arange(0.0, 0.8, 0.2):
        here = (probability >= low) & (probability < low + 0.2)
        spread = 4 * np.sqrt(0.25 / here.sum())
        assert abs(clicked[here].mean() - probability[here].mean()) < spread
    assert query(log, "SELECT count(*) FROM {truth} JOIN {impressions} USING (impression_id, clicked)") == [
        (20_000,)
    ]


def test_behaviors_say_what_a_user_will_click(log: Path) -> None:
    """The share of a user's behaviors whose text is about the item's topic beats popularity."""
    things = ", ".join(f"('{thing}', '{t}')" for t, names in TOPICS.items() for thing in names)
    by_text = query(
        log,
        f"WITH things(thing, topic) AS (VALUES {things}),"
        " done AS (SELECT user_id, topic, count(*) AS n FROM {behaviors} JOIN things"
        "   ON contains(text, thing) GROUP BY ALL),"
        " liked AS (SELECT user_id, topic, n / sum(n) OVER (PARTITION BY user_id) AS share FROM done),"
        " shown AS (SELECT item_id, any_value(topic) AS topic FROM {items} JOIN things"
        "   ON contains(text, thing) GROUP BY item_id)"
        " SELECT clicked, coalesce(share, 0) FROM {impressions} JOIN shown USING (item_id)"
        " LEFT JOIN liked USING (user_id, topic)",
    )
    clicked, share = zip(*by_text, strict=True)
    done = synth(log)
    assert done.popularity_auc + 0.05 < auc(clicked, share) < done.bayes_auc


def test_popularity_follows_zipfs_law() -> None:
    counts = np.bincount(zipf_rank(np.random.default_rng(0).random(400_000), 1_000))
    expected = np.log((np.arange(1_000) + 2) / (np.arange(1_000) + 1)) / np.log(1_001)
    assert np.abs(counts / 400_000 - expected).max() < 0.002
    # A whole log has one such law for each topic and style; past their heads it is one law again.
    settings = Settings(users=500, behaviors=200_000, atoms=30_000, channels=("bills",), days=1)
    (texts,) = (chunk["text"] for chunk in synth_rows.behaviors(settings, 0))
    seen = np.sort(texts.value_counts().field("counts").to_numpy())[::-1].astype(float)
    ranks = np.arange(200, 4_000)
    slope = np.polyfit(np.log(ranks), np.log(seen[ranks]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)


def test_no_impression_or_behavior_names_what_is_not_known_yet(log: Path) -> None:
    for table, key, known in (
        ("impressions", "item_id", "items"),
        ("impressions", "user_id", "users"),
        ("behaviors", "user_id", "users"),
    ):
        early = query(
            log,
            f"SELECT count(*) FILTER (k.event_timestamp IS NULL OR k.event_timestamp >= t.event_timestamp),"
            f" count(*) FILTER (k.event_timestamp >= (SELECT min(event_timestamp) FROM {{{table}}}))"
            f" FROM {{{table}}} t LEFT JOIN {{{known}}} k USING ({key})",
        )
        assert early[0][0] == 0
        assert early[0][1] > 0, f"{known} that come later are named too"


def test_each_day_has_its_file_and_times_of_that_day(log: Path) -> None:
    for table in ("behaviors", "impressions"):
        files = sorted((log / table).iterdir())
        assert [path.stem for path in files] == [str(Settings().date(day)) for day in range(10)]
        for path in files:
            times = pq.read_table(path)["event_timestamp"].to_pandas()
            assert (times.dt.strftime("%Y-%m-%d") == path.stem).all()
            assert times.is_monotonic_increasing
            assert len(times) == 2_000


def test_interests_drift_and_one_stays() -> None:
    world = World(seed=3, users=5_000, items=100, atoms=1_000, channels=1, days=30)
    everyone = np.arange(5_000)
    early, late = world.favourites(everyone, 0), world.favourites(everyone, 60)
    changed = [float((a != b).mean()) for a, b in zip(early, late, strict=True)]
    assert changed[0] == 0
    assert min(changed[1:]) > 0.9
    next_day = [float((a != b).mean()) for a, b in zip(early, world.favourites(everyone, 1), strict=True)]
    assert 0 < next_day[1] < next_day[2] < 0.2


def test_no_two_atoms_read_alike() -> None:
    world = World(seed=0, users=1, items=20, atoms=400_000, channels=1, days=1)
    kinds = world.atom_kind(np.arange(400_000))
    assert len(behavior_texts(["bills"], *kinds).unique()) == 400_000
    zero = np.zeros(200_000, dtype=np.int64)
    assert len(compose(SENTENCES["searches"], zero, zero, np.arange(200_000)).unique()) == 200_000


def test_words_belong_to_one_topic_and_style() -> None:
    for groups in (TOPICS, STYLES):
        words = [word for group in groups.values() for word in group]
        assert len(set(words)) == len(words)
        assert len({len(group) for group in groups.values()}) == 1


def test_ids_are_a_permutation() -> None:
    for size in (1, 2, 3, 20, 997, 1_000):
        world = World(seed=0, users=size, items=20, atoms=400, channels=1, days=1)
        assert sorted(world.user_ids(np.arange(size))) == list(range(1, size + 1))


def test_counted_auc_counts_ties_half() -> None:
    rng = np.random.default_rng(0)
    clicked, score = rng.integers(0, 2, 500), rng.integers(0, 20, 500)
    counts = np.array(
        [np.bincount(score[clicked == outcome], minlength=20) for outcome in (0, 1)], dtype=float
    )
    assert counted_auc(counts) == pytest.approx(auc(clicked, score), abs=1e-12)
    assert np.isnan(counted_auc(np.zeros((2, 3))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"atoms": 5}, "--atoms is 5; it must be at least 360"),
        ({"items": 3}, "--items is 3; it must be at least 20"),
        ({"users": 0}, "--users is 0"),
        ({"behaviors": 5}, "--behaviors is 5; it must be at least 10, one per day"),
        ({"impressions": 5}, "--impressions is 5"),
        ({"seed": -1}, "--seed is -1"),
        ({"channels": ("Bills",)}, "'Bills' is not a valid name"),
        ({"channels": ("bills", "bills")}, "names must differ"),
        ({"channels": ("item",)}, "reserved"),
        ({"format": "orc"}, "--format is orc"),
        ({"start": "yesterday"}, "--start is yesterday"),
        ({"start": "2900-01-01"}, "events must lie between"),
        ({"days": 0}, "--days is 0"),
        ({"days": 10**9}, "--behaviors is 100,000"),
    ],
)
def test_bad_arguments_get_one_sentence_and_leave_nothing(
    given: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput) as caught:
        synth(tmp_path / "log", **{"days": 10, **given})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not (tmp_path / "log").exists()


def test_a_folder_of_something_else_is_left_alone(log: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(BadInput, match="holds no synthetic log"):
        synth(tmp_path)
    with pytest.raises(BadInput, match="holds a log with --users 300, not 5"):
        synth(log, users=5)
    damaged = tmp_path / "damaged"
    shutil.copytree(log, damaged)
    (damaged / "synth.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        synth(damaged)


def test_a_damaged_day_is_named_and_written_anew(log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    shutil.copytree(log, folder)
    broken = folder / "truth" / "2024-01-03.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="2024-01-03"):
        synth(folder)
    broken.unlink()
    assert synth(folder).days_written == 1
    assert digests(folder) == digests(log)


def test_the_command(tmp_path: Path) -> None:
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    shape = ("--days", 2, "--channels", "bills, walks")
    answer = json.loads(call("synth", tmp_path / "log", *options, *shape, "--json").stdout)
    assert answer["rows"]["behaviors"] == 20_000
    texts = query(tmp_path / "log", "SELECT DISTINCT channel, split_part(text, ' ', 1) FROM {behaviors}")
    assert sorted(texts) == [("bills", "Paid"), ("walks", "walks:")]
    times = query(tmp_path / "log", "SELECT max(event_timestamp) - min(event_timestamp) FROM {behaviors}")
    assert times[0][0] < timedelta(days=2)  # type: ignore[operator]
