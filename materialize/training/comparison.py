"""What a comparison of models found: means over seeds, paired intervals, and what they say in sentences.

Shape letters: N impressions, R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from bahe_core.results import Result
from bahe_models import (
    Impressions,
    Int64,
    TrainingData,
    auc,
    expected_calibration_error,
    gauc,
    item_id_rows,
    log_loss,
)
from bahe_models.calibration import fit_calibration
from bahe_models.evaluation import (
    LEVEL,
    history_segments,
    interval,
    resampled_aucs,
    resampled_gaucs,
)
from bahe_models.metrics import Float, probability
from materialize.training.contenders import BAHE, WITH_DEEP, WITHOUT_DEEP, Contender, Fit
from materialize.training.train_with_baselines import CALIBRATED_ON

CHOSEN_BY = "validation"
NEW_ITEMS = "items unseen in training"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much a metric of the reference is above another model's, with the interval of that."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there are users and classes enough for an interval."""
        return not math.isnan(self.low + self.value + self.high)

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def turned(self) -> Gain:
        """The same, seen from the other model."""
        return Gain(value=-self.value, low=-self.high, high=-self.low)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One model on one split: means over its seeds, NaN where a metric is undefined."""

    model: str
    title: str
    split: str
    seeds: int
    auc: float
    auc_least: float
    """Of the seeds."""
    auc_most: float
    gauc: float
    log_loss: float
    ece: float
    """Expected calibration error."""
    gain: Gain | None
    """Of the reference, in AUC; None for the reference itself."""
    gauc_gain: Gain | None
    segments: Mapping[str, float]
    """AUC by segment: length of the history, items unseen in training."""
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """What `compare` found."""

    reference: str
    """Title of the model that the others are compared with."""
    rows: list[Compared]
    """Models in the order that they were asked for, split by split."""
    segments: Mapping[str, Mapping[str, int]]
    """Impressions of each segment, by split."""
    findings: list[str]
    """What the table says, in sentences."""
    report: Path
    """The same as a page, with plots."""
    data: Path
    """The same as JSON."""

    @property
    def summary(self) -> list[str]:
        """The findings, and where the page is."""
        return [*self.findings, f"report: {self.report}"]

    def _repr_html_(self) -> str:
        """The table and the findings, as in the report."""
        from materialize.training.comparison_report import table

        splits = dict.fromkeys(row.split for row in self.rows)
        tables = [table([row for row in self.rows if row.split == split]) for split in splits]
        return "".join(tables) + "".join(f"<p>{escape(finding)}</p>" for finding in self.findings)


def compared(
    data: TrainingData,
    names: Sequence[str],
    fits: Mapping[str, Sequence[Fit]],
    titles: Mapping[str, str],
    reference: str,
) -> list[Compared]:
    """Each model on each of the splits of these names; `fits` by model, one for each seed.

    The interval of a difference is that of the means over the seeds on the same resamples of users. It does
    not hold how much other seeds would move it: for that there is the range of the seeds.
    """
    rows = []
    for name in names:
        split = data.splits[name]
        quality = {model: [_quality(data, name, fit) for fit in each] for model, each in fits.items()}
        mean = {
            model: {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}
            for model, each in quality.items()
        }
        draws = _draws(split, {model: [fit.logits[name] for fit in each] for model, each in fits.items()})
        segments = segments_of(data, split)
        for model, each in fits.items():
            gains: dict[str, Gain | None] = {"auc": None, "gauc": None}
            if model != reference:
                for metric, of_metric in draws.items():
                    low, high = interval(of_metric[reference] - of_metric[model])
                    value = mean[reference][metric] - mean[model][metric]
                    gains[metric] = Gain(value=value, low=low, high=high)
            rows.append(
                Compared(
                    model=model,
                    title=titles[model],
                    split=name,
                    seeds=len(each),
                    auc_least=min(one["auc"] for one in quality[model]),
                    auc_most=max(one["auc"] for one in quality[model]),
                    gain=gains["auc"],
                    gauc_gain=gains["gauc"],
                    segments={
                        segment: float(
                            np.mean([auc(split.clicked_N[at], fit.logits[name][at]) for fit in each])
                        )
                        for segment, at in segments.items()
                    },
                    train_seconds=float(np.mean([fit.seconds for fit in each])),
                    **mean[model],
                )
            )
    return rows


def segments_of(data: TrainingData, split: Impressions) -> dict[str, Int64]:
    """Rows of the segments that have any: by behaviors before the impression, and of unseen items."""
    found = {f"{name} behaviors before": rows for name, rows in history_segments(split.length_NC).items()}
    seen_I = item_id_rows(data.splits["train"].item_N, data.item_ids)
    found[NEW_ITEMS] = np.flatnonzero(seen_I[split.item_N] == 0)
    return {name: rows for name, rows in found.items() if len(rows)}


def _quality(data: TrainingData, name: str, fit: Fit) -> dict[str, float]:
    """One fit on one split, calibrated as every other on what it has not learned from."""
    split, logit_N = data.splits[name], fit.logits[name]
    calibration = fit_calibration(data.splits[CALIBRATED_ON].clicked_N, fit.logits[CALIBRATED_ON])
    calibrated_N = calibration.apply(logit_N)
    return {
        "auc": auc(split.clicked_N, logit_N),
        "gauc": gauc(split.clicked_N, logit_N, split.user_N),
        "log_loss": log_loss(split.clicked_N, calibrated_N),
        "ece": expected_calibration_error(split.clicked_N, probability(calibrated_N)),
    }


def _draws(split: Impressions, logits: Mapping[str, Sequence[Float]]) -> dict[str, dict[str, Float]]:
    """By metric and model, the means over seeds on each resample of users [R]."""
    single = {f"{model}/{n}": one for model, each in logits.items() for n, one in enumerate(each)}
    drawn = {
        "auc": resampled_aucs(split.clicked_N, single, split.user_N),
        "gauc": resampled_gaucs(split.clicked_N, single, split.user_N),
    }
    return {
        metric: {
            model: np.mean([of_metric[f"{model}/{n}"] for n in range(len(each))], axis=0)
            for model, each in logits.items()
        }
        for metric, of_metric in drawn.items()
    }


def findings(rows: Sequence[Compared], contenders: Sequence[Contender], reference: str) -> list[str]:
    """What the rows say: who is better on each split, by how much; and by validation, on which choices are
    made, whether deep layers pay."""
    said = []
    for split in dict.fromkeys(row.split for row in rows):
        by_model = {row.model: row for row in rows if row.split == split}
        said += _on_split(split, by_model, reference)
        if split == CHOSEN_BY:
            said += _about_deep_layers(by_model, contenders, reference)
    return said


def _on_split(split: str, by_model: Mapping[str, Compared], reference: str) -> list[str]:
    one = by_model[reference]
    others = [(row, row.gain) for row in by_model.values() if row.gain is not None]
    known = [(row, gain) for row, gain in others if gain.known]
    groups = {
        "is below, by more than chance": [(row, gain) for row, gain in known if gain.high < 0],
        "is above, by more than chance": [(row, gain) for row, gain in known if gain.low > 0],
        "cannot be told from": [(row, gain) for row, gain in known if not gain.certain],
    }
    said = []
    for verdict, group in groups.items():
        if group:
            named = ", ".join(f"{row.title} ({_signed(gain)})" for row, gain in group)
            said.append(f"on the {split} split {one.title} {verdict}: {named}.")
    if len(known) < len(others):
        said.append(f"the {split} split has too few users or clicks to tell how sure a difference is.")
    alike = [row for row, _ in groups["cannot be told from"] if row.train_seconds * 2 < one.train_seconds]
    if alike and split == CHOSEN_BY:
        least = min(alike, key=lambda row: row.train_seconds)
        said.append(
            f"{least.title} trains in {least.train_seconds:.0f} s, {one.title} in {one.train_seconds:.0f}."
        )
    return said


def _about_deep_layers(
    by_model: Mapping[str, Compared], contenders: Sequence[Contender], reference: str
) -> list[str]:
    """Of the reference and the model that is the same but for them."""
    deep = {
        one.name: one.settings.model.deep
        for one in contenders
        if one.name in (BAHE, WITH_DEEP, WITHOUT_DEEP)
    }
    other = next((name for name in deep if deep[name] != deep.get(reference)), None)
    gain = None if reference not in deep or other is None else by_model[other].gain
    if gain is None or other is None or not gain.known:
        return []
    with_deep, without = by_model[reference], by_model[other]
    if not deep[reference]:
        gain, with_deep, without = gain.turned(), without, with_deep
    times = with_deep.train_seconds / max(without.train_seconds, 0.01)
    advice = (
        "they pay: `model: {deep: true}`"
        if gain.low > 0
        else "no gain beyond chance, so `model: {deep: false}` is the better choice"
    )
    return [f"the deep layers bring {_signed(gain)}, for {times:.1f} times the training time: {advice}."]


def _signed(gain: Gain) -> str:
    return f"{rounded(gain.value)}, {LEVEL:.0%} interval {rounded(gain.low)} to {rounded(gain.high)}"


def rounded(value: float, digits: int = 4) -> str:
    """A difference with its sign, which zero has none of but plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"
