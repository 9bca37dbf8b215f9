"""How answers look on a terminal and in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer

from bahe_core.progress import say


def print_results(results: list[dict[str, Any]]) -> None:
    """The results table, narrow enough for 80 columns, the width of a pipe: log loss, seconds of training.

    Peak memory is in the report.
    """
    from materialize.training.report import shown, shown_auc

    names = {"floor": "floor", "id_only": "ID-only", "bahe": "BAHE"}
    print_table(
        ("model", "split", "AUC [95 %]", "GAUC", "loss", "ECE", "s"),
        [
            (
                names[row["model"]],
                row["split"],
                shown_auc(row),
                shown(row["gauc"]),
                shown(row.get("log_loss")),
                shown(row.get("ece"), 3),
                f"{row['train_seconds']:.0f}",
            )
            for row in results
        ],
    )


def print_comparison(rows: Sequence[Any]) -> None:
    """A table a split, for 80 columns; a difference is the reference's AUC minus the model's."""
    from materialize.training.comparison_report import shown_gain
    from materialize.training.report import shown

    for split in dict.fromkeys(row.split for row in rows):
        print_table(
            (split, "AUC", "difference [95 %]", "GAUC", "s"),
            [
                (
                    row.model,
                    shown(row.auc),
                    shown_gain(row.gain),
                    shown(row.gauc),
                    f"{row.train_seconds:.0f}",
                )
                for row in rows
                if row.split == split
            ],
        )


def print_answer(answer: Any, as_json: bool) -> None:
    """Items with their click probabilities, best first."""
    if as_json:
        scores = [vars(score) for score in answer.scores]
        typer.echo(json.dumps({**vars(answer), "scores": scores}))
        return
    if answer.cold:
        say(f"  user {answer.user_id} is cold: no history yet, so the empty state answers")
    print_table(
        ("item", "click probability", "text"),
        [(str(s.item_id), f"{s.probability:.4f}", s.text) for s in answer.scores],
    )


_SIMILAR: dict[str, tuple[str, ...]] = {"item": ("text",), "user": (), "atom": ("channel", "text")}
"""Further columns of what is alike, by kind."""


def print_similar(found: Any, as_json: bool) -> None:
    """What is alike, a table for each kind, or all as JSON."""
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    for kind, columns in _SIMILAR.items():
        alike = getattr(found, f"{kind}s", None)
        if alike is not None:
            rows = [
                (str(getattr(one, f"{kind}_id")), f"{one.cosine:.4f}", *(getattr(one, c) for c in columns))
                for one in alike
            ]
            print_table((kind, "cosine", *columns), rows)


def print_audit(found: Any) -> None:
    """A line for each feature, then the rows that differ."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    print_table(
        ("feature", "equal", "missing", "extra", "largest difference", "SMAPE", "edits", "likely causes"),
        [
            (
                one.feature,
                f"{100 * one.equal:.2f} %",
                f"{one.missing:,}",
                f"{one.extra:,}",
                shown(one.largest_difference),
                shown(one.smape),
                shown(one.edit_distance),
                ", ".join(f"{cause}: {count:,}" for cause, count in one.causes.items()),
            )
            for one in found.features
        ],
        plain=True,
    )
    examples = [(one.feature, example) for one in found.features for example in one.examples[:2]]
    if examples:
        say("")
        print_table(
            ("feature", "user", "item", "at", "served", "training sees", "likely cause"),
            [
                (
                    feature,
                    str(example.user_id),
                    str(example.item_id),
                    f"{example.moment:%Y-%m-%d %H:%M:%S}",
                    str(example.served)[:40],
                    str(example.offline)[:40],
                    example.cause,
                )
                for feature, example in examples
            ],
            plain=True,
        )


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, plain: bool = False) -> None:
    """A framed table; a plain one is as wide as its rows, so that grep finds them whole."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Where nobody looks at it, a plain table is not folded into 80 columns.
    console = Console(width=1000 if plain and not sys.stdout.isatty() else None)
    table = Table(*header, box=None, pad_edge=False) if plain else Table(*header)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
