"""The examples of docs/extending.md, installed as a plugin: each is used from a recipe, through
save and reload, without any change to the package.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spikellm
from conftest import BUNDLED, PROJECT

PAGE = (PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
CONVERT = """
import sys
import torch
import spikellm
model, tokenizer = spikellm.load(sys.argv[1])
spikellm.convert(model, tokenizer, sys.argv[2], sys.argv[3], samples=2, seqlen=32)
spikellm.save(model, tokenizer, "out")
tokens = torch.arange(3, 35).unsqueeze(0)
with torch.no_grad():
    torch.save(model(tokens).logits, "logits.pt")
"""
RELOAD = """
import json
import torch
import spikellm
from spikellm.kernels.base import select
from spikellm.nn.execution import spiking_linears
model, tokenizer = spikellm.load("out")
tokens = torch.arange(3, 35).unsqueeze(0)
with torch.no_grad():
    equal = torch.equal(model(tokens).logits, torch.load("logits.pt"))
layers = spiking_linears(model)
uncoded = layers["model.layers.0.mlp.down_proj"]
coded = layers["model.layers.0.self_attn.q_proj"]
print(json.dumps({
    "equal": equal,
    "levels": coded.neuron.levels,
    "steps": sorted(set(coded.channel_steps.tolist())),
    "format": coded.settings.weights.format,
    "buffers": sorted(name for name, _ in coded.named_buffers()),
    "trained": model.config.quantization_config.record["training"]["trained"],
    "backends": [select(one.spec(), "cpu").name for one in (uncoded, coded)],
}))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the distribution that the page describes."""
    blocks = re.findall(r"```python\n# my_parts/(\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
    package, metadata = tmp_path / "my_parts", tmp_path / "my_parts-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    for name, code in blocks:
        (package / f"{name}.py").write_text(code, encoding="utf-8")
    imports = "".join(f"import my_parts.{name}\n" for name, _ in blocks)
    (package / "__init__.py").write_text(imports, encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    declared = re.search(r'"spikellm\.plugins"\]\n(\S+) = "(\w+)"', PAGE)
    assert declared
    (metadata / "entry_points.txt").write_text(
        f"[spikellm.plugins]\n{declared[1]} = {declared[2]}\n"
    )
    return tmp_path


@pytest.mark.slow
def test_every_example_works_as_a_plugin(site: Path, text_file: Path, tmp_path: Path) -> None:
    preset = re.search(r"```yaml\n(name: my-parts\n.*?)```", PAGE, re.DOTALL)
    assert preset
    (tmp_path / "mine.yaml").write_text(preset[1], encoding="utf-8")

    def run(*command: str) -> str:
        paths = os.pathsep.join([str(site), str(PROJECT / "src")])
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-c", CONVERT, str(BUNDLED), "mine.yaml", str(text_file))
    found = json.loads(run("-c", RELOAD).splitlines()[-1])
    assert found["equal"]
    assert found["levels"] == 2
    assert found["steps"] == [2, 4]
    assert found["format"] == "signed"
    assert "signed_codes" in found["buffers"]
    assert found["trained"] == sum(
        one.numel() for name, one in spikellm.load(BUNDLED)[0].named_parameters() if "norm" in name
    )
    assert found["backends"][0] == "dense"
    assert found["backends"][1] != "dense"
    run("-m", "spikellm", "export", "out", "steps", "--format", "steps")
    steps = json.loads((tmp_path / "steps" / "steps.json").read_text(encoding="utf-8"))
    assert set(steps["model.layers.0.self_attn.q_proj"]) == {2, 4}
