"""What `import bahe` offers, and a whole project from Python: results, gates inside, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bahe
from bahe_lake.connection import lake
from bahe_lake.transactions import commit
from tests.support import REPOSITORY
from tests.support.logs import small_log, write_dataset

PUBLIC = [
    "Answer",
    "Atoms",
    "BadInput",
    "BaheError",
    "Busy",
    "Checked",
    "Compacted",
    "Comparison",
    "Damaged",
    "Day",
    "Embedded",
    "Encoded",
    "ExecutorConfig",
    "Frame",
    "FrameDataset",
    "GateFailed",
    "Held",
    "Ingested",
    "ItemScores",
    "ItemsOfUser",
    "NotReady",
    "NotServable",
    "NotWritable",
    "PipelineRun",
    "Project",
    "Pruned",
    "Published",
    "Run",
    "SimilarAtoms",
    "SimilarItems",
    "SimilarToText",
    "SimilarUsers",
    "Status",
    "TrainingOutcome",
    "UnknownEntity",
    "Unreachable",
    "UserFeatures",
    "__version__",
    "check",
    "open",
]
METHODS = [
    "apply",
    "atoms",
    "audit",
    "compact",
    "compare",
    "daily",
    "embed",
    "encode",
    "feature_store",
    "frame",
    "home",
    "ingest",
    "lake",
    "lookup",
    "new_api_key",
    "prune",
    "publish",
    "quarantine",
    "recommend",
    "refit",
    "revoke_api_key",
    "rollback",
    "run",
    "runs",
    "score",
    "score_batch",
    "serve",
    "similar_atoms",
    "similar_items",
    "similar_to_text",
    "similar_users",
    "status",
    "train",
]


def test_the_public_surface_is_this() -> None:
    assert bahe.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(bahe, name) is not None
    project = bahe.open("nowhere")
    assert [name for name in dir(project) if not name.startswith("_")] == METHODS


def test_an_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "duckdb", "feast", "pandas", "pyarrow", "transformers"}
    code = f"import sys, bahe; bahe.open('nowhere'); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> bahe.Project:
    """A project that `run` has filled."""
    folder = tmp_path_factory.mktemp("python")
    dataset = write_dataset(folder / "log", small_log(), tiny_backbone)
    project = bahe.open(folder / "home")
    done = project.run(dataset, tracker="none")
    assert isinstance(done, bahe.PipelineRun)
    assert done.published is not None
    assert done.published.model_version == done.training.model_version
    assert list(done.seconds) == ["ingest", "encode", "apply", "frame", "train", "embed", "publish"]
    return project


def test_jobs_return_what_they_did_and_pass_their_gates(project: bahe.Project) -> None:
    dataset = project.home.root.parent / "log" / "dataset.yaml"
    ingested, encoded, frame = project.ingest(dataset), project.encode(), project.frame()
    assert isinstance(ingested, bahe.Ingested)
    assert ingested.skipped
    assert isinstance(encoded, bahe.Encoded)
    assert encoded.added == 0
    assert isinstance(frame, bahe.Frame)
    assert frame.skipped
    gates = {run.job for run in project.runs(limit=None) if run.job.startswith("gate ")}
    assert gates >= {"gate ingest", "gate encode", "gate frame", "gate embed"}
    assert all(run.facts["passed"] for run in project.runs("gate ingest"))


def test_results_show_as_tables_in_a_notebook(project: bahe.Project) -> None:
    dataset = project.home.root.parent / "log" / "dataset.yaml"
    assert "900 behaviors" not in repr(project)
    assert "<table>" in project.ingest(dataset)._repr_html_()
    shown = project.train(tracker="none")._repr_html_()
    assert "BAHE" in shown
    assert "validation" in shown
    assert "everything is up to date" in project.status()._repr_html_()


def test_online_answers_come_as_objects(project: bahe.Project) -> None:
    user = project.lookup("u1")
    assert user.behaviors > 0
    answer = project.recommend("u1", 3)
    assert isinstance(answer, bahe.Answer)
    assert len(answer.scores) == 3
    again = project.score("u1", [score.item_id for score in answer.scores])
    assert [score.item_id for score in again.scores] == [score.item_id for score in answer.scores]
    alike = project.similar_items(0, 2)
    assert isinstance(alike, bahe.SimilarItems)
    assert len(alike.items) == 2
    assert isinstance(project.similar_users("u1", 2), bahe.SimilarUsers)
    found = project.similar_to_text("liked word1", 2)
    assert isinstance(found, bahe.SimilarToText)
    assert (len(found.items), len(found.atoms)) == (2, 2)
    assert isinstance(project.similar_atoms(found.atoms[0].atom_id, 2), bahe.SimilarAtoms)
    with pytest.raises(bahe.UnknownEntity, match="user nobody"):
        project.lookup("nobody")


def test_a_lookup_loads_no_model(project: bahe.Project) -> None:
    heavy = {"torch", "transformers", "great_expectations", "materialize.training.train"}
    code = (
        f"import sys, bahe; bahe.open({str(project.home.root)!r}).lookup('u1');"
        f" print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_job_from_python_is_refused_like_a_command(tmp_path: Path, tiny_backbone: Path) -> None:
    empty = bahe.open(tmp_path / "home")
    with pytest.raises(bahe.NotReady, match="bahe ingest"):
        empty.encode()
    with pytest.raises(bahe.BadInput, match=r"dataset\.yaml does not exist"):
        empty.ingest(tmp_path / "dataset.yaml")


def test_a_failed_gate_stops_a_job_from_python(tmp_path: Path, tiny_backbone: Path) -> None:
    dataset = write_dataset(tmp_path / "log", small_log(rows=200), tiny_backbone)
    project = bahe.open(tmp_path / "home")
    project.ingest(dataset)
    project.encode()
    table = "atomic_behavior_embedding"
    with lake(project.home) as connection:  # one vector is gone, and another is no vector any more
        commit(
            connection,
            [
                f"DELETE FROM {table} WHERE atom_id = (SELECT min(atom_id) FROM {table})",
                f"UPDATE {table} SET embedding = [1, 2] WHERE atom_id = (SELECT max(atom_id) FROM {table})",
            ],
        )
    with pytest.raises(bahe.GateFailed, match="encode gate"):
        project.encode()
    project.apply()
    with pytest.raises(bahe.GateFailed, match="encode gate failed"):
        project.frame()
