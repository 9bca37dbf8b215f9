"""A night of bahe in Dagster: an asset with a partition for each day, and a schedule for the night.

dagster dev -f examples/dagster/bahe_dagster.py, with BAHE_DATASET and BAHE_HOME set.
"""

import os
from datetime import date
from typing import Literal

import dagster as dg

import bahe

DAYS = dg.DailyPartitionsDefinition(start_date=os.environ.get("BAHE_FIRST_DAY", "2024-01-01"))


class Night(dg.Config):
    """The options of `Project.daily`."""

    dataset: str = os.environ.get("BAHE_DATASET", "dataset.yaml")
    home: str = os.environ.get("BAHE_HOME", ".bahe")
    retrain: Literal["warm", "fresh", "never"] = "warm"
    wait: float = 3600
    tracker: Literal["mlflow", "tensorboard", "none"] = "mlflow"


# The home's lock keeps nights apart; killed ones go on where they stopped, so trying again is right.
@dg.asset(partitions_def=DAYS, retry_policy=dg.RetryPolicy(max_retries=2, delay=60))
def live_model(context: dg.AssetExecutionContext, config: Night) -> dg.MaterializeResult:
    """The model that answers, refreshed with everything the log has got."""
    project = bahe.open(config.home)
    try:
        day = project.daily(
            config.dataset,
            date=date.fromisoformat(context.partition_key),
            retrain=config.retrain,
            wait=config.wait,
            tracker=config.tracker,
        )
    except bahe.BaheError as error:
        # Bad input, a failed gate or a busy home, which another try does not mend.
        raise dg.Failure(description=str(error), allow_retries=False) from error
    seconds = {f"{name} (s)": step.seconds for name, step in day.steps.items()}
    return dg.MaterializeResult(metadata={"model_version": day.model_version, **seconds})


nightly = dg.define_asset_job("bahe_nightly", selection=[live_model])
defs = dg.Definitions(
    assets=[live_model],
    jobs=[nightly],
    schedules=[dg.build_schedule_from_partitioned_job(nightly, hour_of_day=1, minute_of_hour=30)],
)
