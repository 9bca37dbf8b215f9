"""The figures of the reports, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bahe_models import Epoch, SplitEvaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from materialize.training.comparison import Compared

NAMES = {"floor": "Floor", "id_only": "ID-only network", "bahe": "BAHE"}
"""How a report calls the models."""

_COLOURS = {"floor": "#8c959f", "id_only": "#bc4c00", "bahe": "#0969da"}


def training_curves(histories: Mapping[str, list[Epoch]], floor: float) -> str:
    """Training loss and validation AUC by epoch; `floor` is the floor's validation AUC."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    for name, history in histories.items():
        style = {"marker": "o", "color": _COLOURS[name], "label": NAMES[name]}
        epochs = [row.epoch for row in history]
        loss.plot(epochs, [row.train_loss for row in history], **style)
        quality.plot(epochs, [row.validation_auc for row in history], **style)
    quality.axhline(floor, color=_COLOURS["floor"], linestyle="--", label=NAMES["floor"])
    loss.set(xlabel="epoch", ylabel="training loss (log loss)")
    quality.set(xlabel="epoch", ylabel="validation AUC")
    for axes in (loss, quality):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return _svg(figure, "Training loss and validation AUC by epoch")


def reliability_plot(evaluations: Mapping[str, SplitEvaluation]) -> str:
    """Click rate against predicted probability for BAHE and the floor, one panel a split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, len(evaluations), squeeze=False)[0]
    for axes, (split, evaluation) in zip(panels, evaluations.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="#d0d7de", linewidth=1, label="perfectly calibrated")
        for name in ("floor", "bahe"):
            curve = evaluation.reliability[name]
            axes.plot(
                curve.predicted_B,
                curve.clicked_B,
                marker="o",
                markersize=4,
                color=_COLOURS[name],
                label=NAMES[name],
            )
        axes.set(title=split, xlabel="predicted click probability", ylabel="share clicked")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
    return _svg(figure, "Share clicked against predicted click probability, by split")


def differences_plot(rows: Sequence[Compared], reference: str) -> str:
    """How far each model is from the reference, with its interval; and AUC against seconds of training."""
    from matplotlib.figure import Figure

    others = [row for row in reversed(rows) if row.gain is not None and row.gain.known]
    figure = Figure(figsize=(10, 2 + 0.4 * len(rows)), layout="constrained")
    gains, cost = figure.subplots(1, 2)
    gains.axvline(0, color="#d0d7de", linewidth=1)
    for place, row in enumerate(others):
        assert row.gain is not None
        # A percentile interval need not hold the estimate.
        ends = [[max(0.0, row.gain.value - row.gain.low)], [max(0.0, row.gain.high - row.gain.value)]]
        colour = _COLOURS["bahe" if row.gain.certain else "floor"]
        gains.errorbar([row.gain.value], [place], xerr=ends, fmt="o", color=colour, capsize=3)
    gains.set_yticks(range(len(others)), [_label(row.title) for row in others])
    gains.margins(y=0.15)
    gains.set(xlabel=f"AUC of {_label(reference)} minus the model's")
    ranked = sorted(rows, key=lambda row: -row.auc)
    for place, row in enumerate(ranked):
        seconds = max(row.train_seconds, 0.1)  # the floor learns nothing
        cost.plot([seconds], [row.auc], "o", color=_COLOURS["bahe" if row.gain is None else "id_only"])
        # Below its dot where the next better model is as good: the names would lie on each other.
        alike = place > 0 and ranked[place - 1].auc - row.auc < 0.05 * (ranked[0].auc - ranked[-1].auc)
        beside = (-6, -12 if alike else 5)
        at = (seconds, row.auc)
        cost.annotate(
            _label(row.title), at, xytext=beside, textcoords="offset points", fontsize=8, ha="right"
        )
    cost.set(xlabel="seconds of training", ylabel="AUC", xscale="log")
    cost.margins(x=0.1, y=0.15)
    cost.set_xlim(left=0.001)
    for axes in (gains, cost):
        axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, "Differences in AUC with their intervals, and AUC against training time")


def _label(title: str) -> str:
    return title if len(title) <= 28 else f"{title[:27]}…"


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
