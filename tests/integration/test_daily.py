"""`bahe daily`: killed in any step, twice, two at once, refused by a gate; and what `status` says then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import Result

from bahe.daily import STEPS, _begin, days, today
from bahe.status import status
from bahe_core.errors import BadInput, Damaged, GateFailed, NotReady
from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_lake.runs import history, last
from bahe_models import load
from materialize.release.quality import judge
from materialize.training.refit import measured_model, refit
from materialize.upkeep.prune import prune
from materialize.vectors import encode
from serving.lookup.online_lookup import OnlineLookup
from tests.support import REPOSITORY
from tests.support.cli import attempt, call
from tests.support.home_contents import contents, differences
from tests.support.logs import small_log, write_dataset
from tests.support.nights import KILLS

pytestmark = pytest.mark.slow

FIRST, SECOND = "2024-04-01", "2024-04-02"


def daily(home: Home, *arguments: object) -> Result:
    return call("daily", *arguments, "--tracker", "none", home=home)


def next_command(home: Home) -> str | None:
    return status(home).next


def stale(home: Home) -> list[str]:
    return [finding.part for finding in status(home).findings if finding.stale]


@pytest.fixture(scope="module")
def nights(
    tmp_path_factory: pytest.TempPathFactory, first_day: tuple[Home, Path]
) -> tuple[Path, dict[str, Any]]:
    """What `tests.support.nights` saw on the log of `first_day`, and its folder."""
    folder, dataset = tmp_path_factory.mktemp("nights"), first_day[1]
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from tests.support.nights import main; main()"),
            *(str(folder), str(dataset)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "BAHE_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "seen.json").read_text())


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Home, Path]:
    """A home after its first night, undisturbed, and its dataset.yaml."""
    folder = tmp_path_factory.mktemp("daily")
    dataset = write_dataset(folder / "log", small_log(rows=400), tiny_backbone)
    home = Home.at(folder / "home")
    assert next_command(home) == "bahe ingest dataset.yaml"
    daily(home, dataset, "--date", FIRST)
    return home, dataset


@pytest.fixture
def second_morning(first_day: tuple[Home, Path], tmp_path: Path, tiny_backbone: Path) -> tuple[Home, Path]:
    """A copy of it, and a log that has grown since."""
    home = Home(Path(shutil.copytree(first_day[0].root, tmp_path / "home")))
    log = small_log(rows=400)
    for table in ("behaviors", "impressions"):
        late = log[table].tail(3).assign(event_timestamp=lambda t: t["event_timestamp"] + timedelta(days=1))
        if table == "impressions":
            late["impression_id"] += 1000
        log[table] = pd.concat([log[table], late], ignore_index=True)
    return home, write_dataset(tmp_path / "log", log, tiny_backbone)


def test_killed_in_every_step_it_goes_on_with_that_step(
    nights: tuple[Path, dict[str, Any]], first_day: tuple[Home, Path]
) -> None:
    folder, seen = nights
    before: dict[str, Any] = {}
    for name, *_ in KILLS:
        code, steps = seen[name]["code"], seen[name]["manifest"]["steps"]
        assert code == -signal.SIGKILL, (name, (folder / f"{name}.err").read_text())
        running = [step for step, facts in steps.items() if facts["state"] == "running"]
        assert running == ([] if name == "after" else [name])
        for step, facts in before.items():
            if facts["state"] == "done":
                assert steps[step] == facts, "a finished step is not taken again"
        before = steps
    assert seen["last"]["code"] == 0, (folder / "last.err").read_text()
    assert list(seen["last"]["manifest"]["steps"]) == list(STEPS)
    home, reference = Home.at(folder / "before_two"), first_day[0]
    assert differences(contents(home), contents(reference)) == []
    mine, theirs = (OnlineLookup(h).score("u1", list(range(25))) for h in (home, reference))
    assert [(s.item_id, pytest.approx(s.probability, abs=1e-5)) for s in mine.scores] == [
        (s.item_id, s.probability) for s in theirs.scores
    ]
    assert not list(home.root.rglob("*.part"))


def test_a_date_twice_does_nothing(nights: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = nights
    assert seen["again"]["code"] == 0
    assert seen["again"]["manifest"] == seen["last"]["manifest"]
    assert "2024-04-01 is done" in (folder / "again.err").read_text()
    with lake(Home.at(folder / "before_two")) as connection:
        assert len(history(connection, "daily")) == 1
        assert len(history(connection, "publish")) == 1


def test_two_at_once(nights: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = nights
    assert seen["refused"] == 2
    said = (folder / "refused.err").read_text().strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("bahe: another bahe job is writing to")
    assert (seen["one"], seen["waiting"]) == (0, 0)
    assert "2024-04-02 is done" in (folder / "waiting.err").read_text()
    assert "bahe ingest" in (folder / "one.err").read_text()
    assert "bahe ingest" not in (folder / "waiting.err").read_text()


def test_a_log_for_machines(nights: tuple[Path, dict[str, Any]]) -> None:
    """Every line on standard error is an object, whatever library wrote it."""
    logs = [(nights[0] / f"{name}.err").read_text() for name in (*(name for name, *_ in KILLS), "last")]
    lines = [json.loads(line) for line in "".join(logs).splitlines()]
    for line in lines:
        assert {"time", "level", "job", "message"} <= line.keys()
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert "[bold]" not in line["message"]
    assert {line["level"] for line in lines} <= {"info", "warning"}
    assert {line["job"] for line in lines} >= set(STEPS)
    assert lines[-1]["model_version"].startswith("bahe-")


def test_the_first_night_leaves_everything_up_to_date(first_day: tuple[Home, Path]) -> None:
    home, dataset = first_day
    (day,) = days(home)
    assert day.finished
    assert day.model_version == OnlineLookup(home).live_version()
    assert day.dataset == str(dataset.resolve())
    assert {name: step.state for name, step in day.steps.items()} == dict.fromkeys(STEPS, "done")
    assert day.steps["frame"].rows_written == 400
    assert day.steps["refit"].versions["model_version"] == day.model_version
    assert {name for name, step in day.steps.items() if step.gate} == {"ingest", "encode", "frame", "embed"}
    assert next_command(home) is None
    assert stale(home) == []
    printed = attempt("status", "--json", home=home)
    assert json.loads(printed.stdout)["live"] == day.model_version
    assert "everything is up to date" in attempt("status", home=home).stdout


def test_status_needs_no_model_library(first_day: tuple[Home, Path]) -> None:
    code = (
        "import sys; sys.argv[1:] = ['status', '--home', sys.argv[1]]; from bahe import cli\n"
        "try: cli.app()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'feast', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(first_day[0].root)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_warm_night_then_nothing_new(second_morning: tuple[Home, Path]) -> None:
    home, dataset = second_morning
    with lake(home) as connection:
        connection.execute(
            "UPDATE runs SET facts = json_merge_patch(facts, json_object('source', ?))"
            " WHERE job = 'ingest'",
            [str(dataset)],
        )
    assert stale(home) == ["log"]
    assert next_command(home) == f"bahe ingest {dataset}"
    cold = OnlineLookup(home).live_version()
    daily(home, dataset, "--date", SECOND, "--tolerance", "1")
    warm = OnlineLookup(home).live_version()
    assert warm != cold
    day = days(home)[0]
    assert (day.live_before, day.model_version) == (cold, warm)
    with lake(home) as connection:
        verdict = last(connection, "gate quality")
    assert verdict is not None
    assert verdict.facts["passed"]
    assert verdict.facts["measured"] == "on the same 40 impressions"
    assert verdict.facts["live_measured"] == measured_model(home, cold) != cold
    assert verdict.facts["gain"] == pytest.approx(verdict.facts["auc"] - verdict.facts["live_auc"])
    daily(home, "--date", "2024-04-03")  # the dataset.yaml of the last night; nothing new
    assert OnlineLookup(home).live_version() == warm
    assert [name for name, step in days(home)[0].steps.items() if not step.unchanged] == [
        "apply",
        "quality",
    ]
    result = daily(home, "--date", FIRST)
    assert "2024-04-03 is done, and so is 2024-04-01 with it" in result.stderr


def test_the_same_model_is_as_good_as_itself(first_day: tuple[Home, Path], tmp_path: Path) -> None:
    home = Home(Path(shutil.copytree(first_day[0].root, tmp_path / "home")))
    measured = measured_model(home, OnlineLookup(home).live_version())
    facts = judge(home, measured, measured, tolerance=0).facts
    assert facts["gain"] == facts["gain_low"] == facts["gain_high"] == 0
    with lake(home) as connection:
        trained = last(connection, "train")
    assert trained is not None
    (auc,) = (
        r["auc"] for r in trained.facts["results"] if (r["model"], r["split"]) == ("bahe", "validation")
    )
    assert facts["auc"] == pytest.approx(auc, abs=0.02)  # training predicts in another precision


def test_what_is_published_has_seen_everything(second_morning: tuple[Home, Path]) -> None:
    home, dataset = second_morning
    live = load(home.models / OnlineLookup(home).live_version())
    measured = load(home.models / measured_model(home, live.model_version))
    with lake(home) as connection:
        latest = scalar(connection, "SELECT epoch_us(max(event_timestamp)) FROM impressions")
    assert measured.trained_until is not None
    assert live.trained_until is not None
    assert measured.trained_until < live.trained_until
    assert live.trained_until.timestamp() * 1e6 == pytest.approx(latest)
    assert live.facts["results"] == measured.facts["results"]
    assert live.facts["epochs"] == measured.facts["epochs"]
    assert set(live.item_ids) >= set(measured.item_ids)
    # The measured one is kept, for the next night's comparison.
    assert measured.model_version in call("prune", "--keep", "0", "--dry-run", home=home).stderr
    assert measured.model_version not in prune(home, keep=0, dry_run=True).models
    daily(home, dataset, "--date", SECOND, "--tolerance", "1", "--no-refit", "--retrain", "fresh")
    day = days(home)[0]
    assert day.model_version == day.trained
    assert refit(home, model_version=day.trained).model_version != day.trained
    assert refit(home, model_version=day.trained).skipped
    with pytest.raises(BadInput, match="refitted already"):
        refit(home, model_version=live.model_version)
    with pytest.raises(NotReady, match="trained on another frame"):
        refit(home, model_version=measured.model_version)


def test_a_worse_model_is_not_published(second_morning: tuple[Home, Path]) -> None:
    home, dataset = second_morning
    live = OnlineLookup(home).live_version()
    before = OnlineLookup(home).user("u1")
    with pytest.raises(GateFailed, match=r"quality gate refused.*more than -0\.99 below"):
        daily(home, dataset, "--date", SECOND, "--tolerance", "-0.99")
    assert OnlineLookup(home).live_version() == live
    np.testing.assert_array_equal(OnlineLookup(home).user("u1").vector, before.vector)
    day = days(home)[0]
    assert (day.stopped_at, day.finished) == ("quality", None)
    assert "AUC" in str(day.steps["quality"].reason)
    assert "embed" not in day.steps
    refused = attempt("runs", "--job", "gate quality", "--limit", "1", home=home)
    assert "FAILED: its validation AUC is" in refused.stdout
    assert {"daily", "quality"} <= set(stale(home))
    # By hand it does not get through either.
    call("embed", home=home)
    assert isinstance(attempt("publish", home=home).exception, GateFailed)
    # The live model is refreshed instead: its changed users only, and the statistics with them.
    daily(home, "--date", SECOND, "--retrain", "never")
    lookup = OnlineLookup(home)
    assert lookup.live_version() == live
    day = days(home)[0]
    assert day.finished
    assert day.steps["embed"].rows_written is not None
    assert 1 <= day.steps["embed"].rows_written <= 3
    changed = small_log(rows=400)["behaviors"]["user_id"].tail(3)
    for user in set(changed):
        found = lookup.user(user)
        assert found.behaviors == sum(
            int(found.statistics[f"length_{c}"] or 0) for c in ("liked", "disliked")
        )
    assert stale(home) == []


def test_a_failed_gate_ends_the_night(second_morning: tuple[Home, Path], monkeypatch: Any) -> None:
    home, dataset = second_morning
    live = OnlineLookup(home).live_version()
    write = encode._store

    def damaged(connection: Any, parts: Any, version: str) -> None:
        write(connection, [replace(part, vectors=part.vectors * np.nan) for part in parts], version)

    path = dataset.parent / "items.parquet"
    items = pd.read_parquet(path)
    new = items.head(1).assign(item_id=777, text="word1 word2 word3 word4 word5")
    pd.concat([items, new], ignore_index=True).to_parquet(path)
    monkeypatch.setattr(encode, "_store", damaged)
    with pytest.raises(GateFailed):
        daily(home, dataset, "--date", SECOND)
    assert OnlineLookup(home).live_version() == live
    day = days(home)[0]
    assert day.stopped_at == "encode"
    assert day.steps["encode"].gate is not None
    assert not day.steps["encode"].gate["passed"]
    assert {"daily", "atoms"} <= set(stale(home))
    assert str(next_command(home)).startswith("bahe daily")


def test_status_after_each_job(second_morning: tuple[Home, Path]) -> None:
    home, dataset = second_morning
    seen = []
    for command in (
        ("ingest", dataset),
        ("encode",),
        ("frame",),
        ("train", "--tracker", "none"),
        ("embed",),
        ("publish",),
    ):
        call(*command, home=home)
        seen.append((command[0], stale(home)))
    assert seen == [
        ("ingest", ["frame", "vectors", "online"]),
        ("encode", ["frame", "vectors", "online"]),
        ("frame", ["model", "vectors", "online"]),
        ("train", ["vectors", "online"]),
        ("embed", ["online"]),
        ("publish", []),
    ]
    home.checkpoint("bahe-x").write_bytes(b"")
    assert stale(home) == ["model"]
    home.checkpoint("bahe-x").unlink()
    home.online_store.unlink()
    assert stale(home) == ["online"]


def test_what_a_daily_run_refuses(tmp_path: Path, home: Home, first_day: tuple[Home, Path]) -> None:
    with pytest.raises(BadInput, match=r"no daily run .* is known yet; name its dataset.yaml"):
        daily(home)
    with pytest.raises(NotReady, match="no live model to refresh"):
        daily(home, first_day[1], "--retrain", "never")
    with pytest.raises(BadInput, match="lies in the future"):
        daily(home, first_day[1], "--date", today() + timedelta(days=3))
    assert attempt("daily", "--date", "yesterday", home=home).exit_code == 2
    assert not home.days.exists()
    broken = Home(Path(shutil.copytree(first_day[0].root, tmp_path / "broken")))
    (broken.days / f"{FIRST}.json").write_text("{}")
    with pytest.raises(Damaged, match="delete it and run again"):
        daily(broken, "--date", SECOND)
    assert "cannot be read" in status(broken).findings[0].says


def test_a_rollback_meanwhile_is_respected(first_day: tuple[Home, Path], tmp_path: Path) -> None:
    home = Home(Path(shutil.copytree(first_day[0].root, tmp_path / "home")))
    manifest = home.days / f"{SECOND}.json"
    began = json.loads((home.days / f"{FIRST}.json").read_text())
    began |= {"date": SECOND, "finished": None, "live_before": "bahe-that-was-left"}
    del began["steps"]["publish"]
    for step in ("train", "refit"):
        began["steps"][step]["versions"]["model_version"] = f"bahe-{step}-from-it"
    manifest.write_text(json.dumps(began))
    day = _begin(home, date.fromisoformat(SECOND), None, "warm", days(home))
    assert day.live_before == OnlineLookup(home).live_version()
    assert list(day.steps) == ["ingest", "encode", "apply", "frame"]
    # What the night itself made live before it was killed is no rollback.
    began["steps"]["refit"]["versions"]["model_version"] = day.live_before
    manifest.write_text(json.dumps(began))
    day = _begin(home, date.fromisoformat(SECOND), None, "warm", days(home))
    assert day.live_before == "bahe-that-was-left"
    assert "embed" in day.steps


def test_runs_of_a_lake_from_before(first_day: tuple[Home, Path], tmp_path: Path) -> None:
    """Lakes whose table has no rows_read and rows_written are read, and get them by their next run."""
    home = Home(Path(shutil.copytree(first_day[0].root, tmp_path / "home")))
    with lake(home) as connection:
        for column in ("rows_read", "rows_written"):
            connection.execute(f"ALTER TABLE runs DROP COLUMN {column}")
        assert last(connection, "embed") is not None
    lines = [json.loads(line) for line in attempt("runs", "--json", home=home).stdout.splitlines()]
    assert {line["rows_written"] for line in lines} == {None}
    (live,) = {line["versions"]["model_version"] for line in lines if line["job"] == "publish"}
    assert live == OnlineLookup(home).live_version()
    assert all(line["seconds"] >= 0 for line in lines)
    home.online_store.unlink()
    call("publish", home=home)
    (line,) = attempt("runs", "--job", "publish", "--limit", "1", "--json", home=home).stdout.splitlines()
    assert json.loads(line)["rows_written"] > 100
