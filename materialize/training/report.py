"""The training report: one HTML page with results, intervals, calibration, segments and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from bahe_models import SplitEvaluation
from bahe_models.evaluation import LEVEL, REPLICATES
from bahe_models.trainer.importance import REPEATS, Importance
from materialize.training.page import write_page
from materialize.training.plots import NAMES, reliability_plot, training_curves
from materialize.training.train_with_baselines import Outcome

_BODY = """<p class="quiet">model_version {version}, {when}</p>
<table class="results"><thead><tr><th>Model</th><th>Split</th><th>AUC</th><th>GAUC</th><th>Log loss</th>
<th>ECE</th><th>Training, s</th><th>Peak memory, MiB</th></tr></thead><tbody>{rows}</tbody></table>
<h2>Is BAHE better?</h2>
<ul>{differences}{advice}</ul>
<h2>By length of the user's history, test split</h2>
{segments}
<h2>What the features are worth, validation split</h2>
{importance}
<h2>Calibration</h2>
{reliability}
<h2>Training</h2>
{curves}
<p class="quiet">AUC: area under the ROC curve. GAUC: AUC within each user, weighted by impressions.
Log loss: mean negative log-likelihood of the clicks; lower is better. ECE: expected calibration error,
the mean distance between predicted probability and share clicked over bins of equal count.
In brackets: {level:.0%} intervals from {replicates} bootstrap resamples of users, the same for all models;
they hold for one trained model, and do not tell how much training again with another seed would move it.
n/a: undefined, because only one class or one user is there.
History: behaviors before the impression, in all channels.
AUC lost: mean over {repeats} shuffles of the feature's values among the impressions; features that say
the same stand in for each other. A view's features are shuffled together.
Floor: logit of the item's click rate plus logit of the user's, both strictly before the impression;
its probability is the sigmoid of that sum.
Peak memory is that of the whole process while the model trained. The splits follow each other in
time.</p>"""


def shown(value: float | None, digits: int = 4) -> str:
    """A metric as text; n/a where it is undefined."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def shown_interval(low: float | None, high: float | None) -> str:
    """An interval as text, such as [0.748, 0.774]; empty where it is undefined."""
    ends = [shown(low, 3), shown(high, 3)]
    return "" if "n/a" in ends else f"[{', '.join(ends)}]"


def shown_auc(row: Mapping[str, Any]) -> str:
    """AUC and interval of a row of the results table, such as 0.7616 [0.748, 0.774]."""
    # Rows that an earlier version recorded in the lake have no interval.
    return f"{shown(row['auc'])} {shown_interval(row.get('auc_low'), row.get('auc_high'))}".strip()


def results_table(results: list[dict[str, Any]]) -> str:
    """The results table as HTML that stands alone, for a notebook."""
    header = "".join(
        f"<th>{column}</th>" for column in ("Model", "Split", "AUC", "GAUC", "Log loss", "ECE")
    )
    rows = "".join(
        f"<tr><td>{NAMES[row['model']]}</td><td>{row['split']}</td><td>{shown_auc(row)}</td>"
        f"<td>{shown(row['gauc'])}</td><td>{shown(row['log_loss'])}</td><td>{shown(row['ece'])}</td></tr>"
        for row in results
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"


def write_report(
    path: Path,
    dataset: str,
    version: str,
    outcome: Outcome,
    advice: Sequence[str] = (),
) -> None:
    """Write the page; it needs no other file and no network. `advice` is that of `advice.advice`."""
    results, evaluations = outcome.results, outcome.evaluations
    floor = next(r["auc"] for r in results if r["model"] == "floor" and r["split"] == "validation")
    body = _BODY.format(
        version=version,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=_results(results),
        differences="".join(f"<li>{_difference(row)}</li>" for row in results if "bahe_gain" in row),
        advice="".join(f"<li>{escape(one[0].upper() + one[1:])}</li>" for one in advice),
        segments=_segments(evaluations["test"]),
        reliability=reliability_plot(evaluations),
        curves=training_curves(outcome.histories, floor),
        importance=_importance(outcome.importance),
        level=LEVEL,
        replicates=REPLICATES,
        repeats=REPEATS,
    )
    write_page(path, f"BAHE on {dataset}", body)


def _results(results: list[dict[str, Any]]) -> str:
    best = {
        split: max(row["auc"] for row in results if row["split"] == split)
        for split in {row["split"] for row in results}
    }
    return "".join(
        f"<tr{' class=best' if row['auc'] == best[row['split']] else ''}>"
        f"<td>{NAMES[row['model']]}</td><td>{row['split']}</td>"
        f"<td>{_estimate(row['auc'], row['auc_low'], row['auc_high'])}</td>"
        f"<td>{shown(row['gauc'])}</td><td>{shown(row['log_loss'])}</td><td>{shown(row['ece'])}</td>"
        f"<td>{row['train_seconds']:.1f}</td><td>{row['peak_memory_mb']:.0f}</td></tr>"
        for row in results
    )


def _estimate(value: float | None, low: float | None, high: float | None) -> str:
    return f"{shown(value)} <span>{shown_interval(low, high)}</span>"


def _difference(row: Mapping[str, Any]) -> str:
    """BAHE against one baseline on one split, as a sentence."""
    gain, low, high = row["bahe_gain"], row["bahe_gain_low"], row["bahe_gain_high"]
    rival = {"floor": "the floor's", "id_only": "that of the ID-only network"}[row["model"]]
    where = f"On the {row['split']} split BAHE's AUC"
    said = f"{where} is {abs(gain):.4f} {'above' if gain >= 0 else 'below'} {rival}"
    if low is None or high is None:
        return f"{said}; how sure that is cannot be told from this split."
    between = f"the {LEVEL:.0%} interval of the difference is {low:+.4f} to {high:+.4f}"
    if low <= 0 <= high:
        return f"{said}, but {between}: these data do not tell the two apart."
    return f"{said}; {between}, so it is more than chance."


def _importance(found: list[Importance]) -> str:
    """One row a feature, then one row a view."""
    if not found:
        return '<p class="quiet">Not measured: several processes trained.</p>'
    rows = "".join(
        f"<tr><td>{escape(one.name)}{' (view)' if one.features > 1 else ''}</td>"
        f"<td>{one.auc_lost:+.4f}</td><td>{'' if one.alone is None else shown(one.alone, 3)}</td>"
        f"<td>{100 * one.missing:.1f} %</td><td>{escape(one.warning or '')}</td></tr>"
        for one in found
    )
    return (
        '<table class="segments"><thead><tr><th>Feature</th><th>AUC lost without it</th><th>AUC alone</th>'
        f"<th>Missing</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _segments(evaluation: SplitEvaluation) -> str:
    """One row a segment, one column a model."""
    models = list(evaluation.quality)
    header = "".join(f"<th>{NAMES[model]}, AUC</th>" for model in models)
    rows = []
    for segment in dict.fromkeys(row.segment for row in evaluation.segments):
        found = {row.model: row for row in evaluation.segments if row.segment == segment}
        cells = "".join(
            f"<td>{_estimate(found[m].auc, found[m].auc_low, found[m].auc_high)}</td>" for m in models
        )
        impressions = found[models[0]].impressions
        rows.append(f"<tr><td>{segment}</td><td>{impressions:,}</td>{cells}</tr>")
    return (
        '<table class="segments"><thead><tr><th>Behaviors before</th><th>Impressions</th>'
        f"{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
