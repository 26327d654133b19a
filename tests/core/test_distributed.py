"""Conversions on several processes: the same bytes as on one, or a clear refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BUNDLED
from families import build
from interruptions import bytes_of
from spikellm.core import distributed
from spikellm.core.errors import RequestError
from spikellm.data.shards import shard_windows

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


_QUICK = ("--set", "omniquant.accumulate=2", "--set", "omniquant.epochs=2")

_LEARNED = (
    "--set",
    "algorithm={name: block-ap, start: {name: gptq, compensate: true}, accumulate: 2, epochs: 1}",
)


def launched(
    out: Path,
    text: Path,
    recipe: str,
    processes: int,
    *more: str,
    script: str = "",
    model: Path = BUNDLED,
) -> subprocess.CompletedProcess[str]:
    """``spikellm convert`` on so many processes; ``script`` runs in each before it."""
    run = ["-m", "spikellm"]
    if script:
        place = out.parent / "before.py"
        place.write_text(
            f"import os, sys\n{script}\nfrom spikellm.__main__ import main\nsys.exit(main())\n"
        )
        run = [str(place)]
    start = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        if processes > 1
        else [sys.executable]
    )
    arguments = [
        "convert",
        str(model),
        str(out),
        "--recipe",
        recipe,
        "--calibration",
        str(text),
        "--samples",
        "20",
        "--seqlen",
        "256",
        *more,
    ]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*start, *run, *arguments],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        pytest.param("w4a4-t2", (), marks=pytest.mark.long),
        ("gptq-w4a16", ()),
        pytest.param("ternary-1.4", (), marks=pytest.mark.long),
        pytest.param("bcq-2", (), marks=pytest.mark.long),
        pytest.param("billm", (), marks=pytest.mark.long),
        pytest.param("static-w4a8", (), marks=pytest.mark.long),
        pytest.param("sparse-50-w4a16", (), marks=pytest.mark.long),
        pytest.param("spike-w4a4-t2", ("--samples", "32", *_QUICK), marks=pytest.mark.long),
        pytest.param("best-w4a4-1.10", (), marks=pytest.mark.long),
        pytest.param("rtn-w2a16", ("--samples", "32", *_LEARNED), marks=pytest.mark.long),
    ],
)
def test_two_processes_give_the_same_bytes(
    recipe: str, more: tuple[str, ...], text_file: Path, tmp_path: Path
) -> None:
    for processes, name in ((1, "one"), (2, "two")):
        done = launched(tmp_path / name, text_file, recipe, processes, *more)
        assert done.returncode == 0, done.stderr[-1500:]
        assert done.stdout.count("spiking layers") == 1, "one rank speaks"
    one, two = (bytes_of(tmp_path / name) for name in ("one", "two"))
    assert one["model.safetensors"] == two["model.safetensors"]
    told = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["record"][
            "blocks"
        ]
        for name in ("one", "two")
    ]
    for block, other in zip(*told, strict=True):
        assert block["loss"] == pytest.approx(other["loss"], rel=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
@pytest.mark.long
def test_the_output_projection_is_fitted_once(
    tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    """Every rank sees the whole text there, so nothing is summed."""
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        more = ("--seqlen", "32", "--samples", "200", "--set", "lm_head=true")
        done = launched(out, text_file, "gptq-w4a16", processes, *more, model=tmp_path / "model")
        assert done.returncode == 0, done.stderr[-1500:]
        found.append(
            (
                out,
                json.loads((out / "config.json").read_text())["quantization_config"]["record"][
                    "blocks"
                ][-1],
            )
        )
    (one, record), (two, other) = found
    assert record["name"] == other["name"] == "lm_head"
    assert record["loss"] == pytest.approx(other["loss"], rel=1e-12)
    assert bytes_of(one)["model.safetensors"] == bytes_of(two)["model.safetensors"]


@pytest.mark.slow
@pytest.mark.long
def test_a_rank_that_dies_ends_the_run_which_goes_on_later(text_file: Path, tmp_path: Path) -> None:
    dies = "\n".join(
        [
            "from spikellm.core import distributed",
            "if os.environ['RANK'] == '1':",
            "    real, calls = distributed.all_reduce, []",
            "    def summed(tensor):",
            "        calls.append(1)",
            "        if len(calls) == 30: os._exit(9)",
            "        return real(tensor)",
            "    distributed.all_reduce = summed",
        ]
    )
    done = launched(tmp_path / "out", text_file, "gptq-w4a16", 2, script=dies)
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "manifest.json").exists()
    done = launched(tmp_path / "out", text_file, "gptq-w4a16", 2, "--resume")
    assert done.returncode == 0, done.stderr[-1500:]
    whole = launched(tmp_path / "whole", text_file, "gptq-w4a16", 1)
    assert whole.returncode == 0
    assert (
        bytes_of(tmp_path / "out")["model.safetensors"]
        == bytes_of(tmp_path / "whole")["model.safetensors"]
    )


@pytest.mark.slow
@pytest.mark.long
def test_what_cannot_be_shared_is_refused(text_file: Path, tmp_path: Path) -> None:
    done = launched(tmp_path / "out", text_file, "spike-w4a4-t2", 2, "--samples", "32")
    assert done.returncode != 0
    assert (
        "spikellm: error (rank 0): algorithm.accumulate is 1: 2 ranks share the batches of"
        " each step" in done.stderr
    )
    assert "(rank 1)" in done.stderr, "each says what stopped it"
    done = launched(tmp_path / "out", text_file, "spike-w4a4-t2", 2, "--samples", "24", *_QUICK)
    assert "ranks would learn from 4, 8 batches of 2 windows" in done.stderr
    done = launched(tmp_path / "out", text_file, "w4a4-t2", 2, "--samples", "4")
    assert "2 ranks cannot share" in done.stderr


def test_windows_are_shared_in_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = torch.arange(11 * 4).reshape(11, 4)
    for count in (1, 2, 3, 4):
        monkeypatch.setattr(distributed, "world_size", lambda count=count: count)
        parts = []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            part = shard_windows(windows, 3)
            assert part.before == sum(before.windows.numel() for before in parts)
            assert part.whole == windows.numel()
            parts.append(part)
        assert torch.equal(torch.cat([part.windows for part in parts]), windows)
    monkeypatch.setattr(distributed, "world_size", lambda: 5)
    with pytest.raises(RequestError, match="5 ranks cannot share"):
        shard_windows(windows, 3)


def test_the_largest_work_is_dealt_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert distributed.assign({"q": 2.0, "down": 9.0, "k": 2.0, "up": 5.0}) == {
        "down": 0,
        "up": 1,
        "k": 1,
        "q": 1,
    }
