"""Two ranks share the windows of every update."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spikellm
from conftest import BUNDLED

pytestmark = [
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="this torch has no torch.distributed"
    ),
    pytest.mark.slow,
]
SMALL = ("seqlen=32", "batch=3", "held_out=3", "check_every=2", "products=float32")


def launched(folder: Path, out: Path, text: Path, processes: int) -> None:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    given = ["--original", str(BUNDLED), "--calibration", str(text), "--steps", "3"]
    options = [word for one in SMALL for word in ("--set", f"training.{one}")]
    subprocess.run(
        [*start, "-m", "spikellm", "train", str(folder), str(out), *given, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=500,
    )


def test_two_ranks_train_as_one_does(
    converted_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for processes in (1, 2):
        launched(converted_folder, tmp_path / str(processes), text_file, processes)
    one, two = (spikellm.load(tmp_path / name)[0] for name in ("1", "2"))
    records = [model.config.quantization_config.record["training"] for model in (one, two)]
    # sums come in another order, and codes of values on an edge with them
    assert records[1]["losses"] == pytest.approx(records[0]["losses"], rel=0.1)
    assert records[1]["losses"][0] == pytest.approx(records[0]["losses"][0], rel=1e-4)
    assert records[0]["sha256"] == records[1]["sha256"]
    states = one.state_dict(), two.state_dict()
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            assert torch.equal(states[1][name], tensor), name
