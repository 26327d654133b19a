from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import BUNDLED
from spikellm.__main__ import main
from spikellm.commands.bench import row_of, show
from spikellm.commands.support.timing import Run, Work, run_once


@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str], converted_folder: Path) -> None:
    arguments = [
        "bench",
        str(converted_folder),
        "--original",
        str(BUNDLED),
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "4",
        "--repeat",
        "1",
        "--energy",
    ]
    assert main([*arguments, "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    spiking, original = result["rows"]
    assert (spiking["model"], original["model"]) == (str(converted_folder), str(BUNDLED))
    assert (spiking["converted"], original["converted"]) == (True, False)
    assert spiking["disk_bytes"] < original["disk_bytes"]
    assert result["ratio"]["disk_bytes"] == spiking["disk_bytes"] / original["disk_bytes"]
    for row in result["rows"]:
        assert (
            min(row["first_token_seconds"], row["decode_tokens_per_second"], row["peak_memory"]) > 0
        )
    measured = spiking["decode_joules_per_token"] is not None
    assert measured == (result["energy_meter"] == "powercap"), (
        "joules where there is a counter; where there is none it is said"
    )


def test_rates_are_medians_of_the_turns() -> None:
    runs = [
        Run("Model", first, decode, 100, "torch", 3.0, None)
        for first, decode in ((1.0, 9.0), (2.0, 8.0), (30.0, 70.0))
    ]
    row = row_of("nowhere", runs, Work(10, 18, None, "bfloat16", energy=True), Path("nowhere"))
    assert row["prefill_tokens_per_second"] == 5
    assert row["decode_tokens_per_second"] == 2
    assert row["prefill_joules_per_token"] == pytest.approx(0.3)
    assert row["decode_joules_per_token"] is None
    assert row["disk_bytes"] is None


def test_one_turn_in_this_process() -> None:
    run = run_once(str(BUNDLED), Work(4, 2, None, "float32", energy=False, device="cpu"))
    assert min(run.first_token, run.decode) > 0
    assert run.prefill_joules is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-tokens", "0"], "at least 1"),
        (["--threads", "0"], "threads 0: expected at least 1"),
        (["--original", f"{BUNDLED}/."], "is given twice"),
        (["--dtype", "int8"], "expected bfloat16"),
        (["--device", "nowhere"], "device 'nowhere' is not available"),
        pytest.param(["--prompt-tokens", "100000"], "exceed the maximum", marks=pytest.mark.slow),
        pytest.param(["--original", "./missing/model/here"], "missing", marks=pytest.mark.slow),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["bench", str(BUNDLED), "--new-tokens", "1", "--repeat", "1", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_is_of_the_cpu_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikellm.core.devices.find_device", torch.device)
    for asked in (["--energy"], ["--llama-bench", "llama-bench"]):
        assert main(["bench", str(BUNDLED), "--device", "cuda:0", *asked]) == 2
        assert "are for the CPU" in capsys.readouterr().err


def test_a_type_is_of_originals_alone(
    capsys: pytest.CaptureFixture[str], converted_folder: Path
) -> None:
    assert main(["bench", str(converted_folder), "--dtype", "float32"]) == 2
    assert "dtype float32 has no effect" in capsys.readouterr().err
    row = {
        "model": "m",
        "first_token_seconds": 1.0,
        "prefill_tokens_per_second": 1.0,
        "decode_tokens_per_second": 1.0,
        "peak_memory": 1,
        "disk_bytes": 1,
    }
    for converted in (False, True):
        show(
            {
                "work": Work(1, 1, None, "float32", energy=False)._asdict(),
                "energy_meter": None,
                "rows": [{**row, "kernels": "torch", "converted": converted, "kind": "Model"}],
            }
        )
        assert ("an original in float32" in capsys.readouterr().out) != converted
