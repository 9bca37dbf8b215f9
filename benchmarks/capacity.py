"""From measured rates to hours, disk and memory for 50 million and for 1 billion records a day.

Reads the JSON files of `benchmarks.scale`, `benchmarks.encode` and `benchmarks.training_cost`, and computes
the table of docs/capacity.md; `--write` puts it there. No figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bahe_core.errors import BadInput, BaheError
from benchmarks.harness import DOCS, put

RECORDS = (50_000_000, 1_000_000_000)
"""Per day: the paper's (on 8 A100), and twenty times that."""

PAGE = DOCS / "capacity.md"


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A language model as far as capacity depends on it: parameters of one layer, and its width."""

    name: str
    layer: int
    width: int


# Llama's layers: attention (queries, keys, values, output) and three products with the intermediate width.
BACKBONES = (
    Backbone(
        name="SmolLM2-135M", layer=2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536, width=576
    ),  # 3 of 9 heads have keys and values
    Backbone(name="Llama-2-7B", layer=4 * 4096 * 4096 + 3 * 4096 * 11008, width=4096),
)


def _assumed(value: float, meaning: str) -> float:
    assumption: float = field(default=value, metadata={"help": meaning})
    return assumption


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is not measured. Each is an option of the command."""

    behaviors: float = _assumed(1.0, "behaviors per record (an impression)")
    new_share: float = _assumed(0.01, "share of the behaviors whose text is new")
    tokens: float = _assumed(20.0, "tokens per atom")
    days: float = _assumed(90.0, "days of log kept")
    impressions_a_user: float = _assumed(10.0, "impressions per active user and day")
    timeline: float = _assumed(200.0, "behaviors that one pass over a user reads")
    epochs: float = _assumed(1.0, "epochs of a daily training over the day's impressions")
    shallow_layers: float = _assumed(8.0, "layers that encode atoms")
    deep_layers: float = _assumed(2.0, "layers that read timelines")
    user_width: float = _assumed(256.0, "width of a user vector")
    gpu_flops: float = _assumed(312e12, "dense bfloat16 FLOP/s of a GPU at its peak (A100)")
    utilisation: float = _assumed(0.35, "share of that peak that is achieved")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured, and on what."""

    ingest_rows: float
    """Behaviors a second through ingest."""
    day_seconds: float
    """Seconds per behavior to ingest a further day."""
    lake_bytes: float
    """Bytes of lake per behavior, without vectors."""
    ingest_memory: float
    """Bytes."""
    atoms: float
    """Atoms a second through the shallow layers."""
    train_seconds: float
    """Seconds per impression in training."""
    hardware: str


def read_rates(scale: Path, encode: Path | None, training: Path, tokens: float) -> Rates:
    """Rates from the benchmarks' JSON; encoding's tokens a second become atoms of `tokens` tokens each.

    Raises BadInput when a file is not from its benchmark.
    """
    grown, trained = _Rows(scale, "scale"), _Rows(training, "training_cost")
    further = grown.one("ingest of one further day")
    if encode is None:
        atoms = grown.one("atoms encoded")["value"]
    else:
        atoms = _Rows(encode, "encode").one("", unit="tokens/s")["value"] / tokens
    return Rates(
        ingest_rows=grown.one("rows a second, ingest")["value"],
        day_seconds=further["value"] / _count(further["metric"]),
        lake_bytes=grown.one("bytes of lake a behavior")["value"],
        ingest_memory=grown.one("memory, ingest of", last=True)["value"] * 2**20,
        atoms=atoms,
        train_seconds=trained.one("training step, one pass per user")["value"] / 1e3,
        hardware=grown.hardware,
    )


class _Rows:
    """The rows of one benchmark's file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        try:
            content = json.loads(path.read_text())
            benchmark = content["name"]
            self._rows: list[dict[str, Any]] = content["rows"]
            self.hardware = f"{content['hardware']}, {content['threads']} threads, {content['date']}"
        except (OSError, ValueError, KeyError, TypeError):
            raise BadInput(f"{path} is not a benchmark's JSON; {self._how_to_write()}.") from None
        if benchmark != name:
            raise BadInput(
                f"{path} is of benchmarks.{benchmark}, not benchmarks.{name}; {self._how_to_write()}."
            )

    def one(self, begins: str, *, unit: str | None = None, last: bool = False) -> dict[str, Any]:
        """The first (or last) row whose metric begins with `begins`, in this unit."""
        matches = [
            row for row in self._rows if row["metric"].startswith(begins) and unit in (None, row["unit"])
        ]
        if not matches:
            description = f"`{begins} …`" if unit is None else f"in {unit}"
            raise BadInput(f"{self._path} has no row {description}; {self._how_to_write()}.")
        return matches[-1 if last else 0]

    def _how_to_write(self) -> str:
        return f"write it with `python -m benchmarks.{self._name} --json {self._path}`"


def _count(metric: str) -> int:
    """The number of behaviors in a metric's name."""
    return int(metric.rsplit(", ", 1)[1].split()[0].replace(",", ""))


# ---- the model


@dataclass(frozen=True)
class Need:
    """One line of the table."""

    what: str
    unit: str
    value: float
    formula: str


def needs(records: float, rates: Rates, given: Assumptions) -> list[Need]:
    """Everything needed for a day of `records` records."""
    behaviors = records * given.behaviors
    atoms = behaviors * given.new_share
    users = records / given.impressions_a_user
    machine, gpu_hour = "h, measured machine", given.gpu_flops * given.utilisation * 3600
    result = [
        Need(
            "ingest, first load of so many",
            machine,
            behaviors / rates.ingest_rows / 3600,
            "behaviors / rows a second",
        ),
        Need(
            "ingest, that day added to a log",
            machine,
            behaviors * rates.day_seconds / 3600,
            "behaviors x seconds a behavior of a further day",
        ),
        Need(
            "encode new atoms",
            machine,
            atoms / rates.atoms / 3600,
            "new atoms / atoms a second",
        ),
        Need(
            "train, one pass per user",
            machine,
            records * given.epochs * rates.train_seconds / 3600,
            "records x epochs x seconds an impression",
        ),
    ]
    for model in BACKBONES:
        shallow, deep = given.shallow_layers * model.layer, given.deep_layers * model.layer
        passes = 6 * given.epochs + 2
        result += [
            Need(
                f"encode new atoms, {model.name}",
                "GPU h",
                atoms * given.tokens * 2 * shallow / gpu_hour,
                "new atoms x tokens x 2 x shallow parameters / GPU speed",
            ),
            Need(
                f"train and embed, {model.name}",
                "GPU h",
                users * given.timeline * passes * deep / gpu_hour,
                "active users x timeline x (6 x epochs + 2) x deep parameters / GPU speed",
            ),
            Need(
                f"atom vectors kept, {model.name}",
                "GB of disk, and of memory in training",
                atoms * given.days * model.width * 4 / 1e9,
                "new atoms x days x width x 4 bytes",
            ),
        ]
    return [
        *result,
        Need(
            "lake without vectors",
            "GB of disk",
            behaviors * given.days * rates.lake_bytes / 1e9,
            "behaviors x days x bytes of lake a behavior",
        ),
        Need(
            "user vectors online",
            "GB of store",
            users * given.user_width * 4 / 1e9,
            "active users x user_width x 4 bytes",
        ),
        Need(
            "ingest's memory",
            "GB of memory",
            rates.ingest_memory / 1e9,
            "as measured; DuckDB spills to disk what exceeds BAHE_MEMORY",
        ),
    ]


def table(rates: Rates, given: Assumptions) -> str:
    """The page's section in Markdown."""
    lines = [
        f"Measured on: {rates.hardware}.",
        "",
        "| A day | " + " | ".join(f"{records:,} records" for records in RECORDS) + " | Unit | Formula |",
        "|---|" + "---:|" * len(RECORDS) + "---|---|",
    ]
    for line in zip(*(needs(records, rates, given) for records in RECORDS), strict=True):
        values = " | ".join(_shown(need.value) for need in line)
        lines.append(f"| {line[0].what} | {values} | {line[0].unit} | {line[0].formula} |")
    measured = {
        "rows a second": f"{rates.ingest_rows:,.0f}",
        "seconds a behavior of a further day": f"{rates.day_seconds:.2e}",
        "bytes of lake a behavior": f"{rates.lake_bytes:,.1f}",
        "atoms a second": f"{rates.atoms:,.1f}",
        "seconds an impression": f"{rates.train_seconds:.2e}",
    }
    lines += ["", "Measured: " + "; ".join(f"{name} {value}" for name, value in measured.items()) + "."]
    assumed = "; ".join(f"`{f.name}` {getattr(given, f.name):,.4g}" for f in fields(given))
    return "\n".join([*lines, "", f"Assumed: {assumed}."])


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--scale", type=Path, required=True, help="JSON of `benchmarks.scale --json`")
    parser.add_argument(
        "--encode", type=Path, help="JSON of `benchmarks.encode --json`; by default scale's sample"
    )
    parser.add_argument(
        "--training", type=Path, required=True, help="JSON of `benchmarks.training_cost --json`"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    for assumption in fields(Assumptions):
        option = "--" + assumption.name.replace("_", "-")
        meaning = f"{assumption.metadata['help']} ({assumption.default:g})"
        parser.add_argument(option, type=float, default=assumption.default, help=meaning)
    arguments = parser.parse_args()
    given = Assumptions(
        **{assumption.name: getattr(arguments, assumption.name) for assumption in fields(Assumptions)}
    )
    try:
        rates = read_rates(arguments.scale, arguments.encode, arguments.training, given.tokens)
        computed = table(rates, given)
        if arguments.write:
            put(PAGE, "capacity", computed)
    except BaheError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    print(computed)


if __name__ == "__main__":
    main()
