"""Whoever reads a converted model without this package is told so, and gets no random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import spikellm
from conftest import PROJECT
from spikellm.checkpoint.notice import KEY, NOTICE


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model library as it is where nobody has imported this package."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "spikellm")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "spikellm")


@pytest.mark.usefixtures("unknown")
def test_plain_library_refuses_in_one_line(converted_folder: Path) -> None:
    with pytest.raises(ValueError, match="import spikellm") as caught:
        AutoModelForCausalLM.from_pretrained(converted_folder)
    assert "\n" not in str(caught.value)


def test_folders_that_the_library_saves_are_guarded_too(
    converted_folder: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted_folder)
    assert not hasattr(model.config, KEY)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[KEY] == NOTICE
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_folders_saved_earlier_load(
    converted_folder: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model, tokenizer = spikellm.load(converted_folder)
    spikellm.save(model, tokenizer, tmp_path / "earlier")
    file = tmp_path / "earlier" / "config.json"
    data = json.loads(file.read_text())
    assert data.pop(KEY) == NOTICE
    file.write_text(json.dumps(data))
    with torch.no_grad():
        assert torch.equal(
            spikellm.load(tmp_path / "earlier")[0](tokens).logits, model(tokens).logits
        )


def test_ordinary_models_are_not_guarded(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    bundled[0].save_pretrained(tmp_path)
    assert KEY not in json.loads((tmp_path / "config.json").read_text())


FIRST = {
    "models": "from transformers import AutoModelForCausalLM",
    "quantizers": "import transformers.quantizers.auto",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "autoload"), [("models", "1"), ("quantizers", "1"), ("models", "0")]
)
def test_fresh_process_without_an_import(
    converted_folder: Path, installed: Path, tmp_path: Path, first: str, autoload: str
) -> None:
    """With the package installed, torch imports it, whatever is imported first; where that is
    switched off, loading is refused.
    """
    script = f"""
import sys
{FIRST[first]}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(converted_folder)],
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(installed), str(PROJECT / "src")]),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload,
        },
        capture_output=True,
        text=True,
    )
    if autoload == "1":
        assert done.stdout.strip() == "SpikingLinear", done.stderr
    else:
        assert done.returncode == 1
        assert NOTICE in done.stderr.strip().splitlines()[-1]
