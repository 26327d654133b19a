"""The house itself: imports point down, without a circle; importing it is light; files stay short;
family names stay in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import PROJECT

SOURCE = PROJECT / "src" / "spikellm"
# From the bottom up, one rank a folder; a file may import what stands below its own folder, and
# files of its own folder.
RANKS = (
    "core",
    "quantization",
    "neurons",
    "kernels",
    "saliency",
    "recipe",
    "nn",
    "models",
    "data",
    "runtime",
    "observers",
    "transforms",
    "algorithms",
    "conversion",
    "training",
    "checkpoint",
    "profiling",
    "evaluation",
    "export",
    "serving",
    "api",
    "commands",
    "cli",
    "__main__",
)
# Who may import transformers: modules within it, and the names that it gives to everyone.
INTERNALS = {"models", "checkpoint", "runtime"}
PUBLIC = INTERNALS | {"conversion"}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in within]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "spikellm")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module in imported(path):
        other = [*module.split("."), ""][1]
        assert other in RANKS, f"{own} imports {module}, which has no rank"
        assert RANKS.index(other) <= RANKS.index(own), f"{own} imports {module}, which is above it"


def test_no_circle_of_files() -> None:
    graph = {name: {one for one in imported(path) if one != name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_packages_only_hand_names_on() -> None:
    for path in SOURCE.rglob("__init__.py"):
        if path != SOURCE / "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
            assert all(isinstance(node, allowed) for node in body), path


def test_package_is_light_to_import() -> None:
    script = (
        "import sys, spikellm; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch',"
        " 'transformers', 'datasets', 'numpy', 'pydantic', 'typer', 'rich'}))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(SOURCE)): lines
        for path in FILES
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not long


def test_family_names_stay_in_one_place() -> None:
    names = re.compile(  # llama.cpp and its llama-bench are programs
        r"\b(llama(?!\.cpp|-bench)|qwen\d?|mistral|mixtral|gemma|gpt_neox|gpt2|opt|bloom|phi)\b",
        re.IGNORECASE,
    )
    for path in FILES:
        if path != SOURCE / "models" / "families.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and len(node.value) < 40
                ):
                    assert not names.search(node.value), (path, node.value)
                if isinstance(node, (ast.Name, ast.Attribute)):
                    assert not names.fullmatch(
                        node.id if isinstance(node, ast.Name) else node.attr
                    ), path


def test_the_model_library_stays_in_few_places() -> None:
    for path in FILES:
        room = path.relative_to(SOURCE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                if name.split(".")[0] == "transformers":
                    assert room in (INTERNALS if "." in name else PUBLIC), f"{path} imports {name}"


def test_unknown_attribute() -> None:
    import spikellm

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        spikellm.nothing  # noqa: B018
    assert set(spikellm.__all__) == set(dir(spikellm))
