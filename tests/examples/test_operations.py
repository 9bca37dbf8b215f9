"""The examples that run `bahe daily` every night, run."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import dagster as dg
import pytest

from bahe.daily import days, today
from bahe_core.home import Home
from serving.lookup.online_lookup import OnlineLookup
from tests.support import REPOSITORY
from tests.support.logs import small_log, write_dataset

EXAMPLES = REPOSITORY / "examples"
DAY = "2024-04-01"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bahe_dagster", EXAMPLES / "dagster" / "bahe_dagster.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["bahe_dagster"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def materialize(
    module: ModuleType, home: Home, dataset: Path, raise_on_error: bool = True
) -> dg.ExecuteInProcessResult:
    night = module.Night(
        dataset=str(dataset),
        home=str(home.root),
        tracker="none",
    )
    return dg.materialize(
        [module.live_model],
        partition_key=DAY,
        run_config=dg.RunConfig(ops={"live_model": night}),
        raise_on_error=raise_on_error,
    )


@pytest.fixture(scope="module")
def night(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, module: ModuleType
) -> tuple[Home, Path, dg.ExecuteInProcessResult]:
    folder = tmp_path_factory.mktemp("dagster")
    training = {"epochs": 1, "impressions_per_step": 200}
    dataset = write_dataset(folder / "log", small_log(rows=300), tiny_backbone, training=training)
    home = Home.at(folder / "home")
    return home, dataset, materialize(module, home, dataset)


@pytest.mark.slow
def test_dagster_runs_a_night(night: tuple[Home, Path, dg.ExecuteInProcessResult]) -> None:
    home, _, result = night
    assert result.success
    (made,) = result.asset_materializations_for_node("live_model")
    live = OnlineLookup(home).live_version()
    assert made.metadata["model_version"].value == live
    (day,) = days(home)
    assert (day.date, day.model_version) == (DAY, live)
    assert day.finished


def test_dagster_tells_a_refusal_and_does_not_try_again(module: ModuleType, tmp_path: Path) -> None:
    result = materialize(module, Home.at(tmp_path / "home"), tmp_path / "none.yaml", raise_on_error=False)
    assert not result.success
    (failed,) = result.get_step_failure_events()
    assert "none.yaml does not exist" in str(failed.step_failure_data.user_failure_data)
    assert not [e for e in result.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]


def test_dagster_knows_a_job_and_a_schedule(module: ModuleType) -> None:
    repository = module.defs.get_repository_def()
    assert repository.has_job("bahe_nightly")
    (schedule,) = repository.schedule_defs
    assert schedule.cron_schedule == "30 1 * * *"


@pytest.mark.slow
def test_cron_runs_a_night(night: tuple[Home, Path, dg.ExecuteInProcessResult], tmp_path: Path) -> None:
    """A date that is done is quiet; a refusal is told, once, with its exit code."""
    home, dataset, _ = night
    (manifest,) = home.days.glob("*.json")
    (home.days / f"{today()}.json").write_text(manifest.read_text().replace(DAY, str(today())))

    def nightly(*arguments: object, at: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(EXAMPLES / "cron" / "nightly.sh"), *map(str, arguments)],
            env={**os.environ, "BAHE_HOME": str(at), "BAHE": f"{sys.executable} -m bahe"},
            cwd=EXAMPLES.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    quiet = nightly(dataset, at=home.root)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    (log,) = (home.root / "logs").iterdir()
    assert "is done" in json.loads(log.read_text().splitlines()[-1])["message"]
    (home.days / f"{today()}.json").unlink()
    loud = nightly(tmp_path / "none.yaml", at=tmp_path / "home")
    assert loud.returncode == 2
    assert "ended with 2 after 1 tries" in loud.stderr
    assert "none.yaml does not exist" in loud.stderr


def test_the_crontab_calls_the_script() -> None:
    lines = [
        line
        for line in (EXAMPLES / "cron" / "crontab").read_text().splitlines()
        if line[:1] not in ("#", "")
    ]
    settings = [line for line in lines if "=" in line.split()[0]]
    (entry,) = [line for line in lines if line not in settings]
    *when, user, script, dataset = shlex.split(entry)
    assert len(when) == 5
    assert user == "bahe"
    assert script.endswith("examples/cron/nightly.sh")
    assert dataset.endswith("dataset.yaml")
    assert os.access(EXAMPLES / "cron" / "nightly.sh", os.X_OK)
