"""deploy/Dockerfile: its steps, run in folders of their own where no Docker is, and what it starts."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bahe_core.home import Home
from tests.docs.test_houses import ROOMS
from tests.support import REPOSITORY
from tests.support.cli import require_accepted
from tests.support.deployment import DEPLOY, Instruction, environment, project, require_known, stages

BUILD, IMAGE = stages(DEPLOY / "Dockerfile")


def the(name: str, stage: list[Instruction] = IMAGE) -> Instruction:
    """The only instruction of that name."""
    (found,) = (one for one in stage if one.name == name)
    return found


def let_in() -> set[str]:
    """Files and folders that .dockerignore leaves to a build."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "what is not named stays out"
    return {line[1:] for line in lines if line.startswith("!")}


def start(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the image would run, with the bahe of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*the("ENTRYPOINT").words, *command],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_both_stages_have_a_python_that_bahe_is_for() -> None:
    images = {stage[0].words[0] for stage in (BUILD, IMAGE)}
    assert images == {"python:3.11-slim-bookworm"}
    assert project()["requires-python"].startswith(">=3.11")


def test_a_build_sees_the_rooms_and_what_packs_them_and_no_home_or_key() -> None:
    facts = project()
    files = {"pyproject.toml", "constraints.txt", facts["readme"], *facts["license-files"]}
    assert let_in() == {*ROOMS, *files}
    for copied in (word for one in BUILD if one.name == "COPY" for word in one.words[:-1]):
        assert copied == "." or copied in let_in()


def test_it_runs_as_a_user_without_rights_and_carries_no_secret() -> None:
    user = the("USER").rest
    uid, gid = user.split(":")
    assert int(uid) >= 10_000
    (made,) = (one.rest for one in IMAGE if one.name == "RUN")
    assert f"--gid {gid} " in made
    assert f"--uid {uid} " in made
    said = [one.rest for one in (*BUILD, *IMAGE) if one.name in ("ENV", "ARG")]
    assert not [
        text for text in said if any(word in text for word in ("PASSWORD", "KEY", "TOKEN", "SECRET"))
    ]
    variables = environment(IMAGE)
    require_known(set(variables))
    assert Home.at(variables["BAHE_HOME"]).root.is_relative_to(the("WORKDIR").rest)


def test_what_it_starts_is_a_command_of_bahe_on_the_port_it_names() -> None:
    command = the("CMD").words
    require_accepted(command)
    require_accepted([*command, "--port", the("EXPOSE").rest])
    with pytest.raises(Exception, match="No such option"):
        require_accepted([*command, "--never-heard-of"])


def test_without_a_key_it_refuses_to_be_reached_by_others(tmp_path: Path) -> None:
    done = start(*the("CMD").words, BAHE_HOME=str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    assert "needs API keys" in done.stderr


def test_what_it_writes_is_for_its_user_and_group(tmp_path: Path) -> None:
    done = start("api-key", "ranking", "--scope", "score", BAHE_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bahe_")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o750


def health_check(port: int) -> list[str]:
    """The image's, of a service on another port."""
    words = the("HEALTHCHECK").rest.partition("CMD ")[2]
    program, *arguments = Instruction("CMD", words).words
    assert program == "python"
    address = f"http://127.0.0.1:{the('EXPOSE').rest}/"
    assert f"{address}healthz" in arguments[-1]
    return [sys.executable, *(one.replace(address, f"http://127.0.0.1:{port}/") for one in arguments)]


def of_pip(name: str) -> str:
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return os.environ.get(name) or done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it installs everything, without pip's cache
def test_the_steps_of_the_build_make_a_bahe_that_starts(tmp_path: Path) -> None:
    """Each RUN and COPY of the first stage, with folders of the test for those of the image.

    PyTorch's index may be out of reach: torch comes from pip's own, which is not the image's build of it.
    """
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    if subprocess.run([*download, "iniconfig"], check=False, capture_output=True).returncode:
        pytest.skip("no package index can be reached, and the image's steps need one")
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables = {**kept, **environment(BUILD), "TORCH_INDEX": of_pip("PIP_INDEX_URL")}
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    place = tmp_path
    for one in BUILD[1:]:
        if one.name == "WORKDIR":
            place = tmp_path / one.rest.removeprefix("/")
            place.mkdir()
        elif one.name == "COPY":
            sources = let_in() if one.words[0] == "." else one.words[:-1]
            for source in sources:
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(
                        REPOSITORY / source, place / source, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(REPOSITORY / source, place / source)
        elif one.name == "RUN":
            step = one.rest.replace("/opt/bahe", str(tmp_path / "opt/bahe"))
            done = subprocess.run(
                ["sh", "-c", step], cwd=place, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
        else:
            assert one.name in ("ARG", "ENV")
    bahe = tmp_path / "opt/bahe/bin/bahe"
    command = [bahe, *the("CMD").words, "--home", tmp_path / "home"]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "needs API keys" in done.stderr
    needed = "import feast_ducklake, psycopg, redis, torch; print(torch.version.cuda)"
    subprocess.run([bahe.parent / "python", "-c", needed], env=kept, check=True, cwd=tmp_path)
