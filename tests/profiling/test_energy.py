from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.core.errors import RequestError
from spikellm.profiling.counts import Counts, Operations
from spikellm.profiling.energy import estimate, layer_energy, load_table
from spikellm.profiling.operations import count_operations

TOKENS = torch.randint(2, 2000, (2, 12), generator=torch.Generator().manual_seed(0))


def test_each_kind_of_layer_by_hand() -> None:
    table = load_table()
    assert "Horowitz" in table.source
    dense = Operations(100, Counter({(16, 16): 100}))
    assert (
        layer_energy(dense, table, "merged")
        == layer_energy(dense, table, "binary")
        == pytest.approx(100 * (1.1 + 0.4))
    )
    spiking = Operations(
        100,
        Counter({(4, 4): 110}),
        0,
        Counter(merged=60, stepped=66, binary=400, phase=120),
        11,
        Counter(stepped=6),
    )
    assert layer_energy(spiking, table, "merged") == pytest.approx(110 * (0.2 * 16 / 64 + 0.1))
    assert layer_energy(spiking, table, "stepped") == pytest.approx(66 * (0.2 * 16 / 64 + 0.1))
    assert layer_energy(spiking, table, "binary") == pytest.approx(400 * 0.1)
    assert layer_energy(spiking, table, "phase") == pytest.approx(120 * (0.1 + 0.024))
    ternary = Operations(
        100, Counter({(16, 2): 140}), 140, Counter(merged=60, stepped=90, binary=90, phase=90)
    )
    assert layer_energy(ternary, table, "merged") == pytest.approx(60 * 1.5), (
        "a multiply by an integer that is not zero"
    )
    assert (
        layer_energy(ternary, table, "stepped")
        == layer_energy(ternary, table, "binary")
        == layer_energy(ternary, table, "phase")
        == pytest.approx(90 * 0.4)
    )
    both = Operations(
        100,
        Counter({(8, 2): 140}),
        140,
        Counter(merged=60, stepped=90, binary=900),
        11,
        Counter(stepped=6),
    )
    assert layer_energy(both, table, "stepped") == pytest.approx(90 * 0.1)
    partly = Operations(100, Counter({(16, 1): 90, (16, 8): 10}), 90)
    assert layer_energy(partly, table, "merged") == pytest.approx(90 * 0.4 + 10 * 1.5)
    whole = estimate(
        Counts(1, {"a": dense, "b": spiking}, {"a": "linear", "b": "linear"}),
        table,
        weight_bytes=1000,
        passes=3,
    )
    assert whole.dense == pytest.approx(200 * 1.5)
    assert whole.binary == pytest.approx(150 + 40)
    assert whole.weight_traffic == pytest.approx(3 * 1000 * 162.5)


def test_additions_take_less_than_the_original(text_file: Path) -> None:
    model, tokenizer = first_blocks()
    spikellm.convert(model, tokenizer, "ternary-1.4", str(text_file), samples=4, seqlen=64)
    counts = count_operations(model, [TOKENS])["prefill"]
    energy = estimate(counts, load_table())
    assert energy.stepped == energy.binary < energy.dense
    head = counts.total("head").macs + counts.total("attention").macs
    assert energy.stepped == pytest.approx(
        head * 1.5 + counts.total("linear").sops["stepped"] * 0.4
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"the file: .*expected name, source and picojoules"),
        (
            "name: a\nsource: b\npicojoules: {fp16_add: 1}\n",
            r"picojoules\.fp16_multiply: Field required",
        ),
        (
            (
                "name: a\nsource: b\npicojoules: {fp16_multiply: -1, fp16_add: 1, int8_multiply: 1,"
                " int32_add: 1, dram_byte: 1}\n"
            ),
            r"greater than 0",
        ),
        (
            (
                "name: a\nsource: b\npicojoules: {fp16_multiply: .inf, fp16_add: 1, int8_multiply:"
                " 1, int32_add: 1, dram_byte: 1}\n"
            ),
            r"finite number",
        ),
        ("a: [", r"not YAML"),
        (None, r"no such file, and no built-in table of that name \(horowitz-45nm\)"),
    ],
)
def test_a_wrong_table_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=message):
        load_table(path)


def test_a_table_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsource: a chip\npicojoules: {fp16_multiply: 1, fp16_add: 2, int8_multiply: 64,"
        " int32_add: 3, dram_byte: 4}\n"
    )
    table = load_table(path)
    assert table.multiply_accumulate(2, 4) == 8 + 3
    assert table.multiply_accumulate(16, 4) == 3
    assert (table.addition(16), table.addition(4)) == (2, 3)
    assert (table.shift_and_add(16), table.shift_and_add(4)) == (2, 6), "a shift as an addition"
