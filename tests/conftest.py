"""Models and texts that the tests share.

Nothing here is copied from outside: folders beside the project are read where they are.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is loaded: what these small models compute is far less work than threads that wait
# for each other. Tests of several threads ask for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import spikellm
from budget import THOROUGH

PROJECT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SPIKELLM_SHARED", PROJECT.parent / "shared"))
BUNDLED = PROJECT / "src" / "spikellm" / "assets" / "stdlib-2m"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder of shared models and texts is not beside the project"
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """Few examples, unless ``--hypothesis-profile=thorough`` asks for many."""
    settings.register_profile("quick", deadline=None, max_examples=10, derandomize=True)
    settings.register_profile(
        "thorough", deadline=None, max_examples=THOROUGH, derandomize=bool(os.environ.get("CI"))
    )
    settings.load_profile("quick")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand tokens of real prose."""
    from spikellm.data.stdlib import stdlib_docstrings

    path = tmp_path_factory.mktemp("text") / "docs.txt"
    path.write_text(stdlib_docstrings("evaluation")[:60_000], encoding="utf-8")
    return path


@pytest.fixture
def bundled() -> tuple[Any, Any]:
    """The bundled model and its tokenizer, freshly loaded."""
    return spikellm.load(BUNDLED)


def first_blocks(count: int = 2, **keywords: Any) -> tuple[Any, Any]:
    """The bundled model without its later blocks, where those would only repeat the same, and its
    tokenizer.
    """
    model, tokenizer = spikellm.load(BUNDLED, **keywords)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    return model, tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """The bundled tokenizer, made to put its BOS token in front of every text."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    found = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    start = found.bos_token
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, 0)]
    )
    return found


@pytest.fixture(scope="session")
def converted_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The bundled model converted with ``w4a4-t2`` and saved."""
    model, tokenizer = spikellm.load(BUNDLED)
    spikellm.convert(model, tokenizer, "w4a4-t2", str(text_file), samples=2, seqlen=64)
    return spikellm.save(model, tokenizer, tmp_path_factory.mktemp("converted") / "w4a4-t2")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium that shows no window."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((found for name in names if (found := shutil.which(name))), None)
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with what an installation says of the package: its entry points for torch."""
    declared = re.search(
        r'entry-points\."(torch\.backends)"\]\n(\w+) = "(\S+)"',
        (PROJECT / "pyproject.toml").read_text(),
    )
    assert declared
    metadata = tmp_path / "site" / "spikellm-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: spikellm\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{declared[1]}]\n{declared[2]} = {declared[3]}\n")
    return metadata.parent


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 2000, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def native_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Native kernels or an error, looked for anew."""
    from native import forget

    monkeypatch.setenv("SPIKELLM_KERNELS", "native")
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture(params=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every set of instructions that this processor bears."""
    from native import best_level, forget
    from spikellm.core.errors import DependencyError
    from spikellm.kernels.native import build

    name = str(request.param)
    monkeypatch.setenv("SPIKELLM_KERNELS_LEVEL", name)
    forget()
    if build.compiler() is None or build.LEVELS.index(name) > best_level():
        with pytest.raises(DependencyError):
            build.load_library()
        name = ""
    return name
