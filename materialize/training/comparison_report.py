"""The page of a comparison: table, differences, what the models cost, segments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from bahe_models.evaluation import LEVEL, REPLICATES
from materialize.training.comparison import Compared, Gain, rounded
from materialize.training.page import write_page
from materialize.training.plots import differences_plot
from materialize.training.report import shown

_BODY = """<p class="quiet">Frame {frame}, features {freshness}, {when}. Models are compared with
{reference}.</p>
<ul>{findings}</ul>
{parts}
<p class="quiet">AUC: area under the ROC curve. GAUC: AUC within each user, weighted by impressions.
Log loss: mean negative log-likelihood of the clicks; lower is better. ECE: expected calibration error.
All are means over the seeds, whose range is in brackets. Difference: {reference} minus the model, with the
{level:.0%} interval of {replicates} bootstrap resamples of users, the same for all models; it holds for
these seeds. Every model reads the same frame; its epoch, or number of trees, is that of its best validation
AUC, which flatters each on that split. Probabilities are calibrated on the validation split. The splits
follow each other in time; look at the test split once, when the choice is made.</p>"""


def write_comparison(
    path: Path,
    dataset: str,
    frame: str,
    freshness: str,
    rows: Sequence[Compared],
    segments: Mapping[str, Mapping[str, int]],
    findings: Sequence[str],
) -> None:
    """Write the page; `segments` are the impressions of each, by split."""
    reference = next(row.title for row in rows if row.gain is None)
    parts = []
    for split in dict.fromkeys(row.split for row in rows):
        of_split = [row for row in rows if row.split == split]
        parts.append(
            f"<h2>On the {split} split</h2>{table(of_split)}{differences_plot(of_split, reference)}"
            f"<h2>AUC by segment, {split} split</h2>{_segments(of_split, segments[split])}"
        )
    body = _BODY.format(
        frame=escape(frame),
        freshness=escape(freshness),
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        reference=escape(reference),
        findings="".join(f"<li>{escape(one[0].upper() + one[1:])}</li>" for one in findings),
        parts="".join(parts),
        level=LEVEL,
        replicates=REPLICATES,
    )
    write_page(path, f"Models compared on {dataset}", body)


def table(rows: Sequence[Compared]) -> str:
    """The models on one split, a row each, the best AUC marked; HTML that stands alone."""
    best = max((row.auc for row in rows if not math.isnan(row.auc)), default=None)
    columns = ("AUC", "Difference", "GAUC", "Difference in GAUC", "Log loss", "ECE", "Training, s")
    header = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        f"<tr{' class=best' if row.auc == best else ''}><td>{escape(row.title)}</td>"
        f"<td>{_estimate(shown(row.auc), shown_range(row))}</td><td>{_difference(row.gain)}</td>"
        f"<td>{shown(row.gauc)}</td><td>{_difference(row.gauc_gain)}</td><td>{shown(row.log_loss)}</td>"
        f"<td>{shown(row.ece)}</td><td>{row.train_seconds:.1f}</td></tr>"
        for row in rows
    )
    split = f"{rows[0].split.capitalize()} split"
    return (
        f'<table class="segments"><thead><tr><th>{split}</th>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def shown_range(row: Compared) -> str:
    """The least and most AUC of the seeds; empty for one seed."""
    return f"[{row.auc_least:.4f}, {row.auc_most:.4f}]" if row.seeds > 1 else ""


def shown_gain(gain: Gain | None) -> str:
    """A difference and its interval as text, such as +0.0096 [+0.002, +0.017]; empty for None, n/a where it
    is undefined."""
    if gain is None:
        return ""
    if math.isnan(gain.value):
        return "n/a"
    ends = f" [{rounded(gain.low, 3)}, {rounded(gain.high, 3)}]" if gain.known else ""
    return rounded(gain.value) + ends


def _difference(gain: Gain | None) -> str:
    value, _, ends = shown_gain(gain).partition(" ")
    return _estimate(value, ends)


def _estimate(value: str, ends: str) -> str:
    """A figure, and below it its range or interval."""
    return f"{value}<br><span>{ends}</span>" if ends else value


def _segments(rows: Sequence[Compared], impressions: Mapping[str, int]) -> str:
    """One row a segment, one column a model."""
    header = "".join(f"<th>{escape(row.title)}</th>" for row in rows)
    body = "".join(
        f"<tr><td>{escape(segment)}</td><td>{count:,}</td>"
        + "".join(f"<td>{shown(row.segments[segment])}</td>" for row in rows)
        + "</tr>"
        for segment, count in impressions.items()
    )
    return (
        '<table class="segments"><thead><tr><th>Segment</th><th>Impressions</th>'
        f"{header}</tr></thead><tbody>{body}</tbody></table>"
    )
