"""A comparison from a log's files to its page; killed, it goes on; nothing else of the home changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

import bahe
from bahe_core.errors import BadInput, Busy, NotReady
from bahe_core.home import Home
from materialize.training import contenders
from materialize.training.contenders import Contender
from tests.support.cli import attempt, call
from tests.support.logs import small_log, write_dataset

MODELS = ["floor", "bahe", "bahe-no-deep"]
WORDS = ("--models", ", ".join(MODELS), "--seeds", "2")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Home:
    """A home that nothing but `bahe compare dataset.yaml` was called on. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("compare")
    small = {"deep_width": 8, "profile_width": 8, "head_width": 16}
    dataset = write_dataset(folder / "log", small_log(rows=600), tiny_backbone, model=small)
    result = call("compare", dataset, *WORDS, home=folder / "home")
    assert "validation AUC" in result.output
    for model in MODELS:
        assert model in result.stdout
    return Home.at(folder / "home")


@pytest.fixture
def home(compared: Home, tmp_path: Path) -> Home:
    return Home.at(shutil.copytree(compared.root, tmp_path / "home"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and seed of what is trained from now on."""
    seen: list[tuple[str, int]] = []
    train = Contender.train

    def watched(self: Contender, *arguments: object) -> contenders.Fit:
        seen.append((self.name, self.settings.training.seed))
        return train(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Contender, "train", watched)
    return seen


def test_the_page_and_its_json_say_what_python_returns(home: Home) -> None:
    done = bahe.open(home.root).compare(models=MODELS, seeds=2, test=True)
    assert [(row.model, row.split, row.seeds) for row in done.rows] == [
        (model, split, 1 if model == "floor" else 2) for split in ("validation", "test") for model in MODELS
    ]
    assert done.reference == "BAHE"
    stored = json.loads(done.data.read_text())
    assert [row["auc"] for row in stored["rows"]] == [row.auc for row in done.rows]
    assert stored["findings"] == done.findings
    page = done.report.read_text()
    assert "On the test split" in page
    assert "BAHE without deep layers" in page
    assert "BAHE without deep layers" in done._repr_html_()
    assert not list(home.models.glob("*"))  # nothing is put online, nor offered to be
    with bahe.open(home.root).lake() as connection:
        assert ("train",) not in connection.execute("SELECT job FROM runs").fetchall()


def test_only_what_is_not_there_is_trained(home: Home, trained: list[tuple[str, int]]) -> None:
    call("compare", *WORDS, home=home)
    assert trained == []
    result = call("compare", "--models", "bahe", "--seeds", "3", home=home)
    assert trained == [("bahe", 2)]
    assert "trained before" in result.output
    call("compare", "--models", "bahe", "--seeds", "1", "--variant", "model.dropout=0.5", home=home)
    assert trained == [("bahe", 2), ("model.dropout=0.5", 0)]


def test_a_killed_comparison_goes_on_and_gives_the_same(
    home: Home, compared: Home, trained: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(home.compared)
    write = contenders.Contender._bahe
    calls = []

    def killed(self: Contender, *arguments: object) -> contenders.Fit:
        calls.append(self.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Contender, "_bahe", killed)
    assert attempt("compare", *WORDS, home=home).exit_code != 0
    call("compare", *WORDS, home=home)
    assert trained == [
        ("floor", 0),
        ("bahe", 0),
        ("bahe", 1),
        ("bahe", 1),
        *[("bahe-no-deep", s) for s in (0, 1)],
    ]

    def aucs(of: Home) -> list[float]:
        return [row["auc"] for row in json.loads((of.reports / "comparison.json").read_text())["rows"]]

    assert aucs(home) == aucs(compared)
    assert not list(home.compared.glob("*.checkpoint"))


@pytest.mark.parametrize("content", [b"", b"this is not what it was"])
def test_a_damaged_file_is_made_again(content: bytes, home: Home, trained: list[tuple[str, int]]) -> None:
    for path in home.compared.glob("*.npz"):
        path.write_bytes(content)
    call("compare", *WORDS, home=home)
    assert len(trained) == 5


def test_what_was_kept_of_a_frame_that_is_gone_goes_too(home: Home) -> None:
    old = home.compared / "0123456789ab-0123456789abcdef.npz"
    old.write_bytes(b"")
    call("compare", *WORDS, home=home)
    assert not old.exists()
    assert len(list(home.compared.glob("*.npz"))) == 5


def test_one_comparison_at_a_time(home: Home) -> None:
    with FileLock(home.compared / ".lock"):
        refused = attempt("compare", *WORDS, home=home)
    assert isinstance(refused.exception, Busy)
    with home.exclusive():  # other jobs do not stand in its way
        call("compare", *WORDS, home=home)


def test_bad_input_is_one_sentence(home: Home, tmp_path: Path) -> None:
    for words, said in (
        (("--models", "xgboost"), "model xgboost is not known"),
        (("--models", ","), "no model to compare"),
        (("--variant", "model.deap=1"), "`deep` is the nearest"),
        (("--device", "abacus"), "device abacus is not known"),
    ):
        refused = attempt("compare", *words, home=home)
        assert isinstance(refused.exception, BadInput)
        assert said in str(refused.exception)
    with pytest.raises(BadInput, match="too few"):
        bahe.open(home.root).compare(seeds=0)
    dataset = home.root / "dataset.yaml"
    early = attempt("compare", dataset, "--models", "xgboost", home=tmp_path / "nothing")
    assert "model xgboost is not known" in str(early.exception)  # and nothing was ingested
    empty = attempt("compare", home=tmp_path / "nothing")
    assert isinstance(empty.exception, NotReady)
    assert not (tmp_path / "nothing").exists()
