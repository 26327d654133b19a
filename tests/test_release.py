"""What is released: a wheel and a source archive that hold all they need, and work where there is
nothing but Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from conftest import PROJECT
from spikellm.core.version import __version__

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
JOB = (
    "set -eu; spikellm doctor --json doctor.json; spikellm convert MODEL out --recipe w4a4-t2"
    " --calibration stdlib --samples 2 --seqlen 32; spikellm generate out 'Return' --json -"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def wheel_of(folder: Path) -> Path:
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_all_that_is_not_python(built: Path) -> None:
    """Presets, energy tables, kernels in C, the page and the bundled model; nothing compiled."""
    assert wheel_of(built).name == f"spikellm-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    source = PROJECT / "src"
    own = {
        str(path.relative_to(source))
        for path in (source / "spikellm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert own <= names
    assert {Path(name).suffix for name in names - own} <= {".txt", "", ".dist-info"}
    assert not any(name.endswith((".so", ".pyc", ".o")) for name in names)


@pytest.mark.slow
def test_archive_is_what_the_wheel_is_made_of(built: Path, tmp_path: Path) -> None:
    """A wheel made from the unpacked archive holds the same files."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.iterdir())
    for name in ("LICENSE", "NOTICE", "constraints.txt", "tests/conftest.py", "docs/start.md"):
        assert (unpacked / name).is_file(), name
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", str(unpacked)]
    subprocess.run(command, capture_output=True, check=True)
    with (
        zipfile.ZipFile(wheel_of(unpacked / "dist")) as one,
        zipfile.ZipFile(wheel_of(built)) as other,
    ):
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }


def environment_of(python: str, folder: Path) -> Path:
    """A new virtual environment; gives the folder of its programs."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True, capture_output=True)
    return folder / "bin"


def do_the_job(programs: Path, work: Path, path: str) -> str:
    """Convert the model that was installed, and let it speak."""
    bare = {
        "PATH": f"{programs}:{path}".removesuffix(":"),
        "HOME": str(work),
        "HF_HUB_OFFLINE": "1",
    }
    model = subprocess.run(
        [programs / "python", "-c", "import spikellm; print(spikellm.__path__[0])"],
        check=True,
        capture_output=True,
        text=True,
        cwd=work,
        env=bare,
    ).stdout.strip()
    assert str(programs.parent) in model, "it is the installed one"
    (work / "MODEL").symlink_to(Path(model) / "assets" / "stdlib-2m")
    done = subprocess.run(
        ["/bin/sh", "-c", JOB], cwd=work, env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"text": "Return' in done.stdout
    return (work / "doctor.json").read_text()


@pytest.mark.slow
def test_installed_wheel_works_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """In a new environment that sees the dependencies of this one, but neither a checkout nor a
    compiler.
    """
    programs = environment_of(sys.executable, tmp_path / "environment")
    subprocess.run(
        [programs / "python", "-m", "pip", "install", "-q", "--no-deps", wheel_of(built)],
        check=True,
        capture_output=True,
    )
    site = next((tmp_path / "environment" / "lib").glob("python*")) / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    work = tmp_path / "work"
    work.mkdir()
    doctor = do_the_job(programs, work, "")
    assert '"compiler": "none"' in doctor


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_clean_installation(built: Path, tmp_path: Path, version: str) -> None:
    """All dependencies, at the documented versions, in an environment of their own."""
    found = shutil.which(f"python{version}")
    own = f"{sys.version_info[0]}.{sys.version_info[1]}" == version
    if found is None and not own:
        pytest.skip(f"there is no python{version} here")
    programs = environment_of(found or sys.executable, tmp_path / "environment")
    subprocess.run(
        [
            programs / "python",
            "-m",
            "pip",
            "install",
            "-q",
            "-c",
            "constraints.txt",
            wheel_of(built),
        ],
        check=True,
        cwd=PROJECT,
        env={**os.environ},
    )
    work = tmp_path / "work"
    work.mkdir()
    do_the_job(programs, work, os.environ["PATH"])


def test_citation_names_this_version() -> None:
    found = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert found["version"] == __version__
    declared = re.search(r'^license = "(.*)"$', (PROJECT / "pyproject.toml").read_text(), re.M)
    assert declared
    assert found["license"] == declared[1]


@pytest.mark.parametrize(
    "path", sorted((PROJECT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem
)
def test_issue_templates_are_forms(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(found)
    identifiers = [part["id"] for part in found["body"]]
    assert len(set(identifiers)) == len(identifiers)
