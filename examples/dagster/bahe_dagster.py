"""`bahe daily` in Dagster: an asset with a partition for each day, and a schedule for the night.

dagster dev -f examples/dagster/bahe_dagster.py, with BAHE_DATASET and BAHE_HOME set.
"""

import json
import os
import subprocess
from pathlib import Path

import dagster as dg

DAYS = dg.DailyPartitionsDefinition(start_date=os.environ.get("BAHE_FIRST_DAY", "2024-01-01"))


class Night(dg.Config):
    """How `bahe daily` is called."""

    dataset: str = os.environ.get("BAHE_DATASET", "dataset.yaml")
    home: str = os.environ.get("BAHE_HOME", ".bahe")
    command: list[str] = ["bahe"]  # noqa: RUF012 - pydantic copies it
    options: list[str] = ["--retrain", "warm", "--wait", "3600"]  # noqa: RUF012


# The home's lock keeps nights apart; killed ones go on where they stopped, so trying again is right.
@dg.asset(partitions_def=DAYS, retry_policy=dg.RetryPolicy(max_retries=2, delay=60))
def live_model(context: dg.AssetExecutionContext, config: Night) -> dg.MaterializeResult:
    """The model that answers, refreshed with everything the log has got."""
    day = context.partition_key
    command = [*config.command, "--log-format", "json", "daily", config.dataset]
    command += ["--home", config.home, "--date", day, *config.options]
    message = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            try:
                said = json.loads(line)
            except ValueError:  # from before the log was set up
                said = {"level": "warning", "job": "bahe", "message": line.strip()}
            message = said["message"]
            getattr(context.log, said["level"])(f"{said['job']}: {message}")
    if process.returncode:
        # 2: bad input, a failed gate or a busy home, which another try does not mend.
        raise dg.Failure(
            description=message,
            metadata={"exit_code": process.returncode},
            allow_retries=process.returncode != 2,
        )
    manifest = json.loads((Path(config.home) / "daily" / f"{day}.json").read_text())
    seconds = {f"{name} (s)": step["seconds"] for name, step in manifest["steps"].items()}
    return dg.MaterializeResult(metadata={"model_version": manifest["model_version"], **seconds})


nightly = dg.define_asset_job("bahe_nightly", selection=[live_model])
defs = dg.Definitions(
    assets=[live_model],
    jobs=[nightly],
    schedules=[dg.build_schedule_from_partitioned_job(nightly, hour_of_day=1, minute_of_hour=30)],
)
