"""The figures of the training report, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bahe_models import Epoch, SplitEvaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
