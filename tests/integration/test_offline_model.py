"""A model whose scores need the raw history is trained, and goes no further."""

from __future__ import annotations

from pathlib import Path

import pytest

from bahe_core.errors import NotServable
from bahe_core.home import Home
from bahe_lake.catalogue import scalar
from bahe_lake.connection import lake
from bahe_models import load
from tests.support.cli import attempt
from tests.support.logs import small_log, write_dataset


def jobs(home: Home) -> list[str]:
    with lake(home) as connection:
        assert not scalar(connection, "SELECT count(*) FROM user_embedding")
        assert not scalar(connection, "SELECT count(*) FROM publications")
        rows = connection.execute("SELECT job FROM runs ORDER BY finished").fetchall()
    return [row[0] for row in rows]


def test_a_target_model_is_trained_and_not_served(tmp_path: Path, tiny_backbone: Path) -> None:
    home = Home.at(tmp_path / "home")
    dataset = write_dataset(
        tmp_path / "log",
        small_log(rows=600),
        tiny_backbone,
        model={"deep_width": 8, "profile_width": 8, "head_width": 16, "head": "target"},
    )
    result = attempt("run", dataset, "--tracker", "none", home=home)
    assert result.exit_code == 0, result.output
    assert "has the target head" in result.output
    assert "bahe publish" not in result.output
    (folder,) = home.models.glob("bahe-*")
    assert not load(folder).vectors_suffice
    before = jobs(home)
    assert before[-1] == "train"
    for job in ("embed", "publish"):
        refused = attempt(job, home=home)
        assert isinstance(refused.exception, NotServable)
        assert refused.exception.exit_code == 2
        assert "set model.head to dnn or dcn and train again" in str(refused.exception)
    assert jobs(home) == before
    assert not home.catalogue_of_items.exists()


@pytest.mark.parametrize("field", ["target_history: 0", "head: din"])
def test_a_wrong_setting_is_named(field: str, tmp_path: Path, tiny_backbone: Path) -> None:
    name, value = field.split(": ")
    model = {name: int(value) if value.isdigit() else value}
    dataset = write_dataset(tmp_path / "log", small_log(rows=100), tiny_backbone, model=model)
    result = attempt("run", dataset, home=Home.at(tmp_path / "home"))
    assert result.exception is not None
    assert name in str(result.exception)
