from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bahe_core.home import Home
from bahe_models import Epoch, Impressions, evaluate
from bahe_models.metrics import probability
from bahe_models.trainer.importance import Importance
from materialize.training import tracking
from materialize.training.report import shown, shown_auc, shown_interval, write_report
from materialize.training.train_with_baselines import EVALUATED, Outcome, _rows, _Scored


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report in which BAHE beats the floor, equals the ID-only network, and meets nobody cold."""
    rng = np.random.default_rng(0)
    user, truth = rng.integers(60, size=1500), rng.normal(size=1500)
    split = Impressions(
        user_N=user,
        item_N=user,
        length_NC=rng.integers(1, 9, (1500, 2)),
        time_us_N=np.arange(1500),
        clicked_N=(rng.random(1500) < probability(truth)).astype(np.float32),
        columns={},
    )
    logits = {"floor": rng.normal(size=1500), "id_only": truth, "bahe": truth}
    evaluations = {name: evaluate(split, logits) for name in EVALUATED}
    results = _rows({model: _Scored(logits, 1.0, 100.0) for model in logits}, evaluations)
    path = tmp_path_factory.mktemp("report") / "training.html"
    history = [Epoch(1, 0.69, 0.6, 1.0), Epoch(2, 0.68, 0.7, 1.0)]
    worth = Importance(
        name="shop:price<", features=1, auc_lost=0.0123, alone=0.61, missing=0.25, warning="is constant"
    )
    outcome = Outcome(
        artifact=None,  # type: ignore[arg-type]  # the page does not read it
        results=results,
        histories={"id_only": history, "bahe": history},
        evaluations=evaluations,
        importance=[worth, replace(worth, name="shop", features=2, alone=None, warning=None)],
    )
    write_report(path, "a <shop>", "bahe-1", outcome, ["raise <epochs>."])
    return path.read_text()


def test_differences_are_told_in_words(report: str) -> None:
    sentences = report.split("<ul>")[1].split("</ul>")[0]
    assert "0.0000 above that of the ID-only network, but" in sentences
    assert sentences.count("do not tell the two apart") == 2
    assert sentences.count("so it is more than chance") == 2
    assert sentences.endswith("<li>Raise &lt;epochs&gt;.</li>")


def test_the_page_has_its_parts(report: str) -> None:
    assert "a &lt;shop&gt;" in report
    assert report.count("<svg") == 2
    assert report.count("perfectly calibrated") >= 2
    assert "<tr><td>0 (cold)</td><td>0</td><td>n/a" in report
    segments = report.split('class="segments"')[1].split("</table>")[0]
    assert segments.count("<tr>") == 1 + 4


def test_features_have_their_worth(report: str) -> None:
    assert "shop:price&lt;</td><td>+0.0123</td><td>0.610</td><td>25.0 %</td><td>is constant" in report
    assert "<td>shop (view)</td><td>+0.0123</td><td></td>" in report


def test_metrics_as_text() -> None:
    assert shown(None) == shown(float("nan")) == "n/a"
    assert shown_interval(0.7481, 0.7739) == "[0.748, 0.774]"
    assert shown_interval(None, None) == ""
    assert shown_auc({"auc": 0.76161}) == "0.7616"  # recorded before there were intervals


def test_each_home_of_a_process_keeps_its_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "report.html"
    report.write_text("told")
    for name in ("first", "second"):
        home = Home.at(tmp_path / name)
        home.tracking.mkdir(parents=True)
        with tracking.run(home, "mlflow", f"log of {name}", "bahe-1") as log:
            log.files([report])
        assert [
            run.info.run_name
            for run in mlflow.search_runs(output_format="list", search_all_experiments=True)
        ] == ["bahe-1"]
        assert len(list(home.tracking.rglob("report.html"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "report.html", "second"]
    # What the user says goes for every home.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    with tracking.run(Home.at(tmp_path / "first"), "mlflow", "shared", "bahe-2"):
        pass
    assert (tmp_path / "shared.db").is_file()


def test_mlflow_gets_every_defined_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.at(tmp_path)
    home.tracking.mkdir(parents=True, exist_ok=True)
    row = {"model": "floor", "split": "test", "auc": 0.7, "gauc": None, "ece": 0.02, "bahe_gain_low": -0.01}
    with tracking.run(home, "mlflow", "small", "bahe-1") as log:
        log.results([{**row, "train_seconds": 2.5, "peak_memory_mb": 100.0}])
    (run,) = mlflow.search_runs(experiment_names=["small"], output_format="list")
    assert run.data.metrics == {
        "test_auc_floor": 0.7,
        "test_ece_floor": 0.02,
        "test_bahe_gain_low_floor": -0.01,
        "train_seconds_floor": 2.5,
    }
