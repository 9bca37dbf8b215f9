from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bahe_core.errors import BadInput
from benchmarks import capacity
from benchmarks.capacity import Assumptions, Rates, needs, read_rates, table
from benchmarks.harness import around, put

BEGIN, END = "<!-- computed by benchmarks.capacity -->", "<!-- end -->"

FILES = {
    "scale": [
        ("rows a second, ingest of 50,000,000 behaviors", 100_000),
        ("memory, ingest of 5,000,000 behaviors", 1024),
        ("memory, ingest of 50,000,000 behaviors", 4096),
        ("bytes of lake a behavior", 80),
        ("ingest of one further day, 1,000,000 behaviors", 20),
        ("atoms encoded, measured on 4,000", 150),
    ],
    "encode": [("ours", 6_000), ("theirs", 3_000)],
    "training_cost": [("training step, one pass per user", 0.5)],
}


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, rows in FILES.items():
        paths[name] = tmp_path / f"{name}.json"
        content = {"name": name, "hardware": "a machine", "threads": 2, "date": "2026-01-01"}
        unit = "tokens/s" if name == "encode" else "any"
        content["rows"] = [{"metric": metric, "value": value, "unit": unit} for metric, value in rows]
        paths[name].write_text(json.dumps(content))
    return paths


def rates(measured: dict[str, Path]) -> Rates:
    return read_rates(measured["scale"], None, measured["training_cost"], 20)


def values(records: float, found: Rates, given: Assumptions) -> dict[str, float]:
    return {need.what: need.value for need in needs(records, found, given)}


def test_rates_are_read_by_their_names(measured: dict[str, Path]) -> None:
    found = rates(measured)
    assert (found.ingest_rows, found.day_seconds, found.lake_bytes) == (100_000, 2e-5, 80)
    assert (found.ingest_memory, found.atoms, found.train_seconds) == (4096 * 2**20, 150, 5e-4)


def test_tokens_become_atoms(measured: dict[str, Path]) -> None:
    found = read_rates(measured["scale"], measured["encode"], measured["training_cost"], 20)
    assert found.atoms == 300


def test_needs_follow_their_formulas(measured: dict[str, Path]) -> None:
    day = values(3.6e8, rates(measured), Assumptions())
    assert day["ingest, first load of so many"] == pytest.approx(1.0)
    assert day["ingest, that day added to a log"] == pytest.approx(2.0)
    assert day["encode new atoms"] == pytest.approx(3.6e6 / 150 / 3600)
    assert day["train, one pass per user"] == pytest.approx(50.0)
    assert day["lake without vectors"] == pytest.approx(3.6e8 * 90 * 80 / 1e9)
    # 8 layers of 3,538,944 parameters, twice, for 20 tokens of 3.6 million atoms, on 35 % of an A100.
    assert day["encode new atoms, SmolLM2-135M"] == pytest.approx(
        3.6e6 * 20 * 2 * 8 * 3_538_944 / (312e12 * 0.35) / 3600
    )


def test_what_a_record_costs_grows_with_records_and_memory_does_not(measured: dict[str, Path]) -> None:
    found, given = rates(measured), Assumptions()
    small, large = values(1e6, found, given), values(1e7, found, given)
    for what in small:
        assert large[what] == pytest.approx(small[what] * (1 if what == "ingest's memory" else 10))
    fewer = values(1e6, found, replace(given, new_share=given.new_share / 2))
    assert fewer["encode new atoms"] == pytest.approx(small["encode new atoms"] / 2)


def test_the_table_goes_between_the_marks(measured: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    computed = table(rates(measured), Assumptions())
    for _ in range(2):
        put(page, "capacity", computed)
        assert page.read_text() == f"before\n{BEGIN}\n\n{computed}\n\n{END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(BadInput, match="lacks the lines"):
        put(page, "capacity", computed)


def test_the_page_of_the_docs_has_the_marks() -> None:
    before, after = around(capacity.PAGE, "capacity")
    assert before.endswith(BEGIN)
    assert after.startswith(END)


def test_other_files_are_refused(measured: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"of benchmarks\.training_cost, not benchmarks\.scale"):
        read_rates(measured["training_cost"], None, measured["training_cost"], 20)
    with pytest.raises(BadInput, match="is not a benchmark's JSON"):
        read_rates(tmp_path / "none.json", None, measured["training_cost"], 20)
    content = json.loads(measured["scale"].read_text())
    measured["scale"].write_text(json.dumps({**content, "rows": content["rows"][1:]}))
    with pytest.raises(BadInput, match="has no row `rows a second, ingest"):
        rates(measured)
