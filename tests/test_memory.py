"""Memory of a model whose vocabulary is most of it: a random one of the shape of Gemma 3 270M."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

BESIDE = 1_500_000_000  # bytes that may be held beside the model
SCRIPT = """
import sys
from spikellm.__main__ import main
from spikellm.core.memory import peak_memory
status = main(sys.argv[1:])
print(f"peak {peak_memory()}")
sys.exit(status)
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="of Linux")]


@pytest.fixture(scope="module")
def large_vocabulary(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        dtype=torch.bfloat16,
    )
    folder = tmp_path_factory.mktemp("large") / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def peak_of(*arguments: object) -> tuple[int, int, str]:
    """Exit status, peak memory and what was said, of a command line."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    peak = next(line for line in found.stdout.splitlines() if line.startswith("peak "))
    return found.returncode, int(peak.split()[1]), found.stderr


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_perplexity_holds_few_logits(large_vocabulary: Path, text_file: Path) -> None:
    status, peak, _ = peak_of(
        "eval", large_vocabulary, "--perplexity", text_file, "--seqlen", 256, "--limit", 3
    )
    assert status == 0
    assert peak <= size_of(large_vocabulary) + BESIDE


@pytest.mark.parametrize("recipe", ["w4a4-t2", pytest.param("best-w4a4", marks=pytest.mark.long)])
def test_conversion_holds_the_model_and_little_more(
    large_vocabulary: Path, text_file: Path, tmp_path: Path, recipe: str
) -> None:
    status, peak, said = peak_of(
        *("convert", large_vocabulary, tmp_path / "out", "--recipe", recipe),
        *("--calibration", text_file, "--samples", 4, "--seqlen", 128),
    )
    assert peak <= size_of(large_vocabulary) + BESIDE, said
    assert status == 0 or "puts a norm" in said, said
