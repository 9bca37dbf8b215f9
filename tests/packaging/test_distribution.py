"""The wheel and the sdist: whole, importable without the checkout, and able to run the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = (
    "bahe",
    "bahe_core",
    "bahe_lake",
    "bahe_models",
    "bahe_synth",
    "feast_ducklake",
    "feature_repo",
    "materialize",
    "serving",
    "validation",
)


@dataclass(frozen=True, kw_only=True)
class Distribution:
    wheel: Path
    sdist: Path


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What the command printed; an AssertionError with all it said where it failed."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked_files() -> list[str]:
    """Paths that git knows or would add, so that build outputs of the checkout stay out."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=CHECKOUT)
    return [path for path in listed.splitlines() if (CHECKOUT / path).is_file()]


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """An sdist of the tracked files, and the wheel that is built from that sdist alone."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((CHECKOUT / path).read_bytes())
    built = tmp_path_factory.mktemp("built")
    # Without isolation, since setuptools is installed here and a build should not need a network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source, folder=built)
    return Distribution(wheel=next(built.glob("*.whl")), sdist=next(built.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def unpacked(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs and nothing else."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(distribution.wheel) as archive:
        archive.extractall(folder)
    return folder


def metadata(unpacked: Path) -> Message:
    return message_from_string(next(unpacked.glob("*.dist-info/METADATA")).read_text())


def test_the_wheel_holds_every_file_of_the_rooms_and_no_other(unpacked: Path) -> None:
    installed = {
        path.relative_to(unpacked).as_posix()
        for path in unpacked.rglob("*")
        if path.is_file() and ".dist-info" not in path.parts[len(unpacked.parts)]
    }
    assert installed == {path for path in tracked_files() if path.split("/")[0] in ROOMS}


def test_every_room_tells_type_checkers_that_it_is_typed(unpacked: Path) -> None:
    assert [room for room in ROOMS if not (unpacked / room / "py.typed").is_file()] == []


def test_the_sdist_carries_what_a_build_and_a_reader_need(distribution: Distribution) -> None:
    with tarfile.open(distribution.sdist) as archive:
        paths = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "bahe/py.typed"} <= paths


def test_metadata_names_licence_python_and_extras(unpacked: Path) -> None:
    facts = metadata(unpacked)
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Requires-Python"] == "<3.13,>=3.11"
    extras = {"redis", "postgres", "s3", "ray", "notebook", "tensorboard", "all", "bench", "dev"}
    assert set(facts.get_all("Provides-Extra", [])) == extras


def test_the_unpacked_wheel_works_without_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    """In a folder with nothing in it: data files are found as resources of their packages."""
    script = """
import importlib, json, pathlib, sys
rooms = {name: str(pathlib.Path(importlib.import_module(name).__file__).parent) for name in sys.argv[1:]}
from bahe_core.home import Home
from feature_repo.store import write_configuration
home = Home.at("home")
home.root.mkdir()
print(json.dumps({"rooms": rooms, "configuration": write_configuration(home).read_text()}))
"""
    said = json.loads(
        run(sys.executable, "-c", script, *ROOMS, folder=tmp_path, PYTHONPATH=str(unpacked)).splitlines()[
            -1
        ]
    )
    assert said["rooms"] == {room: str(unpacked / room) for room in ROOMS}
    assert "feast_ducklake" in said["configuration"]
    described = run(sys.executable, "-m", "bahe", "--help", folder=tmp_path, PYTHONPATH=str(unpacked))
    assert "recommend" in described


@pytest.fixture(scope="module")
def alone(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment into which only the wheel, with what it requires, was installed."""
    folder = tmp_path_factory.mktemp("alone")
    probe = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder / "probe"),
    ]
    if subprocess.run([*probe, "iniconfig"], check=False, capture_output=True).returncode:
        pytest.skip("no package index can be reached, and installing the wheel needs one")
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    programs = folder / "venv" / "bin"
    pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--constraint", CHECKOUT / "constraints.txt", distribution.wheel, folder=folder)
    return programs


@pytest.mark.slow
@pytest.mark.timeout(3600)  # installs 2.9 GB, then runs the whole demo
def test_the_demo_runs_from_an_installed_wheel(alone: Path, tmp_path: Path) -> None:
    run(alone / "bahe", "demo", "--home", "home", "--json", "results.json", folder=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    test_auc = {result["model"]: result["auc"] for result in results if result["split"] == "test"}
    assert test_auc["bahe"] > test_auc["floor"] > 0.7

    # Any Feast user may go on from the home, whose configuration names classes of the wheel.
    views = run(alone / "feast", "-c", "home", "feature-views", "list", folder=tmp_path)
    assert "user_stats" in views
