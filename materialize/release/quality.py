"""The quality gate: a new model against the live one, on the same impressions, before it is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from bahe_core.errors import GateFailed
from bahe_core.home import Home
from bahe_lake import runs
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from materialize.config.dataset import home_dataset
from materialize.frames.frame import Frame, latest_frame

if TYPE_CHECKING:
    from bahe_models import Artifact, Impressions, TrainingData

JOB = "gate quality"
SPLIT = "test"
"""Neither model chose its epoch by these impressions."""
LEAST = 100
"""Fewer impressions than these do not tell one model from another; validation is taken then."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found."""

    passed: bool
    facts: dict[str, Any]
    """model_version, live_version, auc, live_auc, gain with its 95 % interval, tolerance, measured."""


def judge(
    home: Home, model_version: str, live_version: str, tolerance: float, device_name: str | None = None
) -> Verdict:
    """Compare two models on the test split of the latest frame, and remember the verdict.

    Of it the impressions after those that either was trained on or chose its epoch by; where these are too
    few, the validation split. A live model that was refitted is stood in for by the measured one. One that
    reads other vectors, channels or context than the frame has is compared by the AUC that it was
    trained with. Raises GateFailed when the new one's AUC is more than the tolerance below.
    """
    frame = latest_frame(home)
    fingerprint = f"{model_version} {live_version} {frame.frame_id} {tolerance}"
    with home.exclusive(), lake(home) as connection:
        last = runs.last(connection, JOB)
        if last is not None and last.fingerprint == fingerprint:
            verdict = Verdict(passed=last.facts["passed"], facts=last.facts)
        else:
            with runs.record(connection, JOB, fingerprint) as run:
                facts = _compared(home, connection, frame, model_version, live_version, device_name)
                lost = facts["gain"] is not None and facts["gain"] < -tolerance
                facts |= {"passed": not lost, "checks": 1, "tolerance": tolerance}
                facts["failures"] = [_sentence(facts)] if lost else []
                commit(connection, [run.statement(facts)])
            verdict = Verdict(passed=not lost, facts=facts)
    if not verdict.passed:
        raise GateFailed(
            f"the quality gate refused {model_version}: {verdict.facts['failures'][0]}; the live model was"
            " left as it is, and `bahe daily --retrain never` refreshes it."
        )
    return verdict


def require_quality(connection: duckdb.DuckDBPyConnection, model_version: str) -> None:
    """Raises GateFailed when the model's last verdict was a refusal."""
    last = next(
        (r for r in runs.history(connection, JOB) if r.facts["model_version"] == model_version), None
    )
    if last is not None and not last.facts["passed"]:
        raise GateFailed(
            f"the quality gate refused {model_version}: {last.facts['failures'][0]}; train another, or"
            " judge it again by `bahe daily` with another --tolerance."
        )


def _sentence(facts: dict[str, Any]) -> str:
    return (
        f"its {facts['split']} AUC is {facts['auc']:.4f}, more than {facts['tolerance']:g} below the"
        f" {facts['live_auc']:.4f} of {facts['live_version']}, which is live"
    )


def _compared(
    home: Home,
    connection: duckdb.DuckDBPyConnection,
    frame: Frame,
    model_version: str,
    live_version: str,
    device_name: str | None,
) -> dict[str, Any]:
    from bahe_core.machine import device
    from bahe_models import evaluate, load
    from bahe_models.trainer.saved_model import logits_of
    from materialize.training.refit import measured_model
    from materialize.training.training_data import read_training_data

    standing_in = measured_model(home, live_version)
    new, live = load(home.models / model_version), load(home.models / standing_in)
    channels = home_dataset(home).channels
    data = read_training_data(connection, frame, new.encoder_version, channels)
    name, split = _unseen(data, new, live)
    logits = {"bahe": logits_of(new, data, split, device(device_name))}
    alike = (
        live.encoder_version == new.encoder_version
        and live.context_columns == new.context_columns
        and live.dense.channels == new.dense.channels
        and live.dense.numeric == new.dense.numeric
        and live.vectors == new.vectors
    )
    if alike:
        logits["live"] = logits_of(live, data, split, device(device_name))
    quality = evaluate(split, logits).quality
    auc, interval = quality["bahe"].auc, {}
    if alike:
        compared = quality["live"]
        live_auc: float | None = compared.auc
        row = compared.row()  # without NaN, which JSON does not know
        interval = {"gain_low": row["bahe_gain_low"], "gain_high": row["bahe_gain_high"]}
    else:
        results = live.facts.get("results", [])
        live_auc = next((r["auc"] for r in results if (r["model"], r["split"]) == ("bahe", name)), None)
    way = f"on the same {len(split):,} impressions" if alike else "by the AUC that it was trained with"
    return {
        "model_version": model_version,
        "live_version": live_version,
        "live_measured": standing_in,
        "split": name,
        "frame_id": frame.frame_id,
        "auc": auc,
        "live_auc": live_auc,
        "gain": None if live_auc is None else auc - live_auc,
        **interval,
        "measured": way,
    }


def _read_until_us(model: Artifact) -> int:
    """When the last impression was shown that the model was trained on, or chosen by."""
    until = model.trained_until  # older artifacts know only when its click was known
    known = 0 if until is None else int(until.timestamp() * 1e6)
    return int(model.facts.get("read_until_us", known))


def _unseen(data: TrainingData, new: Artifact, live: Artifact) -> tuple[str, Impressions]:
    """The split to compare on, and its impressions that neither model was chosen by."""
    test = data.splits[SPLIT]
    later = test.take(np.flatnonzero(test.time_us_N > max(_read_until_us(new), _read_until_us(live))))
    if len(later) >= LEAST and len(np.unique(later.clicked_N)) == 2:
        return SPLIT, later
    return "validation", data.splits["validation"]
