"""The house itself: imports point one way, importing it is light, files stay short, family names stay in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import PROJECT

SOURCE = PROJECT / "src" / "spikellm"
# From the bottom up; a module may import what stands before it, or its own layer.
LAYERS = [
    ["errors", "registry", "files", "extras", "plain_data", "settings", "streams"],
    ["quantization"],
    ["neurons"],
    ["saliency"],
    ["recipe"],
    ["presets"],
    ["kernels"],
    ["modeling"],
    ["transforms"],
    ["profiling"],
    ["checkpoint"],
    ["calibration", "pipelines"],
    ["evaluation"],
    ["api"],
    ["console"],
    ["inputs", "resources", "workflow", "doctor", "tracing"],
    ["measuring"],
    ["comparison", "sweep_folder", "sweep", "bench"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(SOURCE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in FILES if path != SOURCE / "__init__.py"], ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = (
            [node.module]
            if isinstance(node, ast.ImportFrom) and node.module
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        if modules == ["spikellm"] and isinstance(node, ast.ImportFrom):
            modules = [f"spikellm.{alias.name}" for alias in node.names]
        for module in modules:
            if module.startswith("spikellm."):
                other = module.split(".")[1]
                assert RANK[other] <= RANK[own], f"{own} imports {other}, which stands above it"


def test_package_is_light_to_import() -> None:
    script = "import sys, spikellm; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'typer', 'rich'}))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_files_are_short() -> None:
    long = {str(path.relative_to(SOURCE)): lines for path in FILES if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 300}
    assert not long


def test_family_names_stay_in_one_place() -> None:
    names = re.compile(r"\b(llama|qwen\d?|mistral|mixtral|gemma|gpt_neox|gpt2|opt|bloom|phi)\b", re.IGNORECASE)
    for path in FILES:
        if path != SOURCE / "modeling" / "families.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 40:
                    assert not names.search(node.value), (path, node.value)
                if isinstance(node, (ast.Name, ast.Attribute)):
                    assert not names.fullmatch(node.id if isinstance(node, ast.Name) else node.attr), path


def test_unknown_attribute() -> None:
    import spikellm

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        spikellm.nothing  # noqa: B018
    assert set(spikellm.__all__) == set(dir(spikellm))
