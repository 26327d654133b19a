"""The site is built from the docs without a warning, and the commands of its first page run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROJECT

COMMANDS = re.findall(
    r"^```bash\n(.*?)^```", (PROJECT / "docs" / "start.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a network."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [*command, str(folder)],
        check=False,
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    return folder


@pytest.mark.slow
def test_site_is_built_without_a_warning(site: Path) -> None:
    pages = {path.parent.name for path in site.rglob("index.html")}
    assert {"start", "cli", "api", "glossary", "serve"} <= pages
    commands = (site / "reference" / "cli" / "index.html").read_text()
    assert "spikellm serve" in commands
    assert "--max-new-tokens" in commands
    functions = (site / "reference" / "api" / "index.html").read_text()
    assert "Turn a causal language model into a spike-driven one" in functions
    assert ":func:" not in functions


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """Links may lead anywhere; scripts, styles, fonts and pictures lie in the site."""
    loaded = re.compile(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(https?:[^\s\">]+)")
    found = {
        address
        for path in site.rglob("*.html")
        for address in loaded.findall(path.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.slow
def test_commands_of_the_first_page_run(tmp_path: Path) -> None:
    assert len(COMMANDS) >= 5
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", "\n".join(COMMANDS)],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "first.html").is_file()
    assert (tmp_path / "out" / "trace" / "trace.json").is_file()


def test_every_page_is_reached() -> None:
    """What lies in the folder stands in the navigation, and README names every guide."""
    navigation = (PROJECT / "mkdocs.yml").read_text()
    readme = (PROJECT / "README.md").read_text()
    for path in (PROJECT / "docs").glob("*.md"):
        assert f" {path.name}" in navigation, f"{path.name} is not in mkdocs.yml"
        if path.name not in ("index.md", "notebooks.md"):
            assert f"docs/{path.name}" in readme, f"{path.name} is not in README.md"


@pytest.mark.parametrize("path", sorted((PROJECT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_options_in_examples_exist(path: Path) -> None:
    """Commands of examples have options that exist."""
    import spikellm.cli  # noqa: F401  enters every verb
    from spikellm.commands.support.verb import Verb, verbs
    from spikellm.recipe.load import preset_names

    shared = {"--json", "--table", "--debug", "--help"}
    for line in re.findall(r"^spikellm (\w+)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        name, rest = line[0], line[1].split(" #")[0]
        assert name in verbs.names(), f"spikellm {name}"
        known = {one.option for one in Verb(name).parameters} | shared
        for names in re.findall(r"--recipes? ([a-z0-9.,-]+)(?!\S)", rest):
            for recipe in names.split(","):
                assert recipe.endswith(".yaml") or recipe in preset_names(), recipe
        for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", rest):
            assert option in known, f"spikellm {name} has no {option}"
