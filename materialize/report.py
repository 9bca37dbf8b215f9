"""The training report: one HTML page with the results table and the training curves."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from bahe_models.loop import Epoch

NAMES = {"floor": "Floor", "id_only": "ID-only network", "bahe": "BAHE"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 3rem auto;
   padding: 0 1rem; color: #1b1f24; }}
 table {{ border-collapse: collapse; width: 100%; margin: 1.5rem 0; }}
 th, td {{ padding: .45rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; }}
 th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
 tr.best td {{ font-weight: 600; background: #eef6ff; }}
 .quiet {{ color: #57606a; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>{title}</h1>
<p class="quiet">model_version {version}, {when}</p>
<table><thead><tr><th>Model</th><th>Split</th><th>AUC</th><th>GAUC</th><th>Training, s</th>
<th>Peak memory, MiB</th></tr></thead><tbody>{rows}</tbody></table>
{figure}
<p class="quiet">AUC: area under the ROC curve. GAUC: AUC within each user, weighted by impressions.
Floor: logit of the item's click rate plus logit of the user's, both strictly before the impression.
Peak memory is that of the whole process while the model trained. The splits follow each other in time.</p>
</body></html>
"""


def write_report(
    path: Path,
    dataset: str,
    version: str,
    results: list[dict[str, Any]],
    histories: dict[str, list[Epoch]],
) -> None:
    """Write the page; it needs no other file and no network."""
    best = {
        split: max(row["auc"] for row in results if row["split"] == split)
        for split in {row["split"] for row in results}
    }
    rows = "".join(
        f"<tr{' class=best' if row['auc'] == best[row['split']] else ''}>"
        f"<td>{NAMES[row['model']]}</td><td>{row['split']}</td><td>{row['auc']:.4f}</td>"
        f"<td>{row['gauc']:.4f}</td><td>{row['train_seconds']:.1f}</td>"
        f"<td>{row['peak_memory_mb']:.0f}</td></tr>"
        for row in results
    )
    floor = next(r["auc"] for r in results if r["model"] == "floor" and r["split"] == "validation")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _PAGE.format(
            title=f"BAHE on {escape(dataset)}",
            version=version,
            when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            rows=rows,
            figure=_curves(histories, floor),
        )
    )


def _curves(histories: dict[str, list[Epoch]], floor: float) -> str:
    """Training loss and validation AUC by epoch, as inline SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    for name, history in histories.items():
        epochs = [row.epoch for row in history]
        loss.plot(epochs, [row.train_loss for row in history], marker="o", label=NAMES[name])
        quality.plot(epochs, [row.validation_auc for row in history], marker="o", label=NAMES[name])
    quality.axhline(floor, color="grey", linestyle="--", label=NAMES["floor"])
    loss.set(xlabel="epoch", ylabel="training loss (log loss)")
    quality.set(xlabel="epoch", ylabel="validation AUC")
    for axes in (loss, quality):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
