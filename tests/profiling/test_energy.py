from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import spikellm
from conftest import first_blocks
from spikellm.core.errors import RequestError
from spikellm.profiling.counts import DENSE, EXECUTION_MODES, Counts, Operations
from spikellm.profiling.elementary import Work
from spikellm.profiling.energy import (
    PRODUCTS,
    Energy,
    bytes_read,
    energies,
    estimate,
    layer_energy,
)
from spikellm.profiling.energy_table import load_table
from spikellm.profiling.operations import count_operations
from spikellm.profiling.work import ROWS

TOKENS = torch.randint(2, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
DENSE_LAYER = Operations(100, Counter({(16, 16): 100}), operands=20)
SPIKING = Operations(
    100,
    Counter({(4, 4): 110}),
    0,
    Counter(merged=60, stepped=66, binary=400, phase=120),
    11,
    Counter(stepped=6),
    operands=20,
    shifts=30,
)
TWO = Counts(1, {"a": DENSE_LAYER, "b": SPIKING}, {"a": "head", "b": "linear"})


def test_each_kind_of_layer_by_hand() -> None:
    table = load_table()
    assert "Horowitz" in table.source
    dense, spiking = DENSE_LAYER, SPIKING
    assert (
        layer_energy(dense, table, "merged")
        == layer_energy(dense, table, "binary")
        == pytest.approx(100 * (1.1 + 0.4))
    )
    assert layer_energy(spiking, table, "merged") == pytest.approx(110 * (0.2 * 16 / 64 + 0.1))
    assert layer_energy(spiking, table, "stepped") == pytest.approx(66 * (0.2 * 16 / 64 + 0.1))
    assert layer_energy(spiking, table, "binary") == pytest.approx(400 * 0.1)
    assert layer_energy(spiking, table, "phase") == pytest.approx(120 * 0.1 + 30 * 0.1)
    assert layer_energy(spiking, table, DENSE) == pytest.approx(100 * 1.5)
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


def test_the_whole_by_hand() -> None:
    """Products, and on the chip 20 weights for a call or one for each spike and synapse."""
    whole = estimate(TWO, load_table(), weight_bytes=1000, passes=3)
    assert whole.dense == pytest.approx(200 * 1.5 + 2 * 20 * 2 * 1.25)
    assert whole.modes["merged"] == pytest.approx(
        150 + 110 * 0.15 + 20 * 2 * 1.25 + 20 * 0.5 * 1.25
    )
    assert whole.modes["binary"] == pytest.approx(150 + 40 + 20 * 2 * 1.25 + 400 * 0.5 * 1.25)
    assert whole.weight_traffic == pytest.approx(3 * 1000 * 162.5)
    arithmetic = estimate(TWO, load_table(), without=["memory"])
    assert arithmetic.modes["binary"] == pytest.approx(150 + 40)
    assert arithmetic.ratio("binary") == pytest.approx(190 / 300)
    assert Energy.from_data(whole.to_data()) == whole
    with pytest.raises(RequestError, match=r"'norm' is no row .*norms"):
        estimate(TWO, load_table(), without=["norm"])


@pytest.mark.parametrize(
    ("name", "dense", "binary", "merged"),
    [
        ("horowitz-45nm", 1.5, 0.1, 0.15),
        ("jouppi-7nm", 0.5, 0.03, 0.0475),
        ("seneca-22nm", 2.8, 2.8, None),
        ("loihi-14nm", None, 23.6, None),
    ],
)
def test_built_in_tables_by_hand(
    name: str, dense: float, binary: float, merged: float | None
) -> None:
    table = load_table(name)
    assert table.name == name
    assert table.multiply_accumulate(16, 16) == (dense and pytest.approx(dense))
    assert table.event("binary", 4, 4, additive=False) == pytest.approx(binary)
    assert table.multiply_accumulate(4, 4) == (merged and pytest.approx(merged))
    assert table.event("merged", 4, 4, additive=False) == (merged and pytest.approx(merged))


def test_a_phase_spike_is_added_and_accumulators_double() -> None:
    """A doubling is a shift where the table has one, else an addition of the sum to itself."""
    for name, event, doubling in (
        ("horowitz-45nm", 0.1, 0.1),
        ("jouppi-7nm", 0.03, 0.03),
        ("seneca-22nm", 2.8, 1.2),
        ("loihi-14nm", 23.6, None),
    ):
        table = load_table(name)
        assert table.event("phase", 4, 4, additive=False) == pytest.approx(event)
        assert table.event("phase", 4, 4, additive=True) == pytest.approx(event)
        assert table.doubling(4) == (doubling and pytest.approx(doubling))
        energy = layer_energy(SPIKING, table, "phase")
        assert energy == (doubling and pytest.approx(120 * event + 30 * doubling))
    assert load_table("seneca-22nm").doubling(16) == 1.4, "of floating point, an addition"


def test_what_a_table_does_not_know_is_not_made_up() -> None:
    found = energies(TWO, load_table("loihi-14nm"))
    assert found["linear"].modes == {
        **dict.fromkeys(EXECUTION_MODES),
        "binary": pytest.approx(400 * 23.6),
    }
    assert found["head"].dense is None
    assert found["whole"].modes["binary"] is None, "the head is not known, so no sum is"
    assert found["whole"].ratio("binary") is None
    routed = Counts(1, {"b": SPIKING}, {"b": "linear"})
    routed.add_work("routing", Work(spike=400), "binary")
    routed.add_work("firing", Work(update=400, idle=200), "binary")
    on_chip = energies(routed, load_table("loihi-14nm"))
    assert on_chip["routing"].modes["binary"] == pytest.approx(400 * (1.7 + 3.5))
    assert on_chip["firing"].modes["binary"] == pytest.approx(400 * 81 + 200 * 52)
    assert on_chip["memory"].modes["binary"] == 0, "reading the synapse is in its operation"
    assert on_chip["whole"].modes["binary"] == pytest.approx(
        400 * (23.6 + 1.7 + 3.5 + 81) + 200 * 52
    )
    elsewhere = energies(routed, load_table())
    assert elsewhere["routing"].modes["binary"] is None
    assert elsewhere["firing"].modes["binary"] == pytest.approx(400 * 0.2 + 200 * 0.1)
    whole = elsewhere["whole"]
    assert whole.unknown == {"binary": ("routing",)}
    assert whole.modes["binary"] == pytest.approx(40 + 80 + 20 + 400 * 0.5 * 1.25)
    assert not estimate(routed, load_table(), without=["routing"]).unknown
    assert Energy.from_data(whole.to_data()) == whole


def test_bytes_that_are_read() -> None:
    table = load_table()
    read = {mode: bytes_read(SPIKING, table, mode) for mode in (DENSE, "merged", "stepped")}
    assert read == {DENSE: 40, "merged": 10, "stepped": 33}
    values = Operations(  # what spikes is in the cache, and meets probabilities of 16 bits
        100, Counter({(16, 4): 100}), 0, Counter(binary=300), 11, operands=20
    )
    assert bytes_read(values, table, "merged") == 10
    assert bytes_read(values, table, "binary") == 600
    assert bytes_read(values, load_table("seneca-22nm"), "binary") == 600


def test_elementary_operations_by_hand() -> None:
    table = load_table()
    assert table.elementary("compare") == 0.1
    assert table.elementary("round") == 0.4
    assert table.elementary("exp") == pytest.approx(4 * 1.1 + 4 * 0.4 + 0.4)
    assert table.elementary("divide") == pytest.approx(6 * 1.1 + 3 * 0.4)
    assert table.elementary("root") == pytest.approx(7 * 1.1 + 3 * 0.4)
    assert table.elementary("spike") is None
    own = table.model_copy(update={"picojoules": table.picojoules.model_copy(update={"exp": 2.0})})
    assert own.elementary("exp") == 2
    assert load_table("loihi-14nm").elementary("exp") is None


def test_additions_take_less_than_the_original(text_file: Path) -> None:
    model, tokenizer = first_blocks()
    spikellm.convert(model, tokenizer, "ternary-1.4", str(text_file), samples=4, seqlen=64)
    counts = count_operations(model, [TOKENS])["prefill"]
    energy = estimate(counts, load_table(), without=list(ROWS))
    assert energy.dense is not None
    assert energy.modes["stepped"] == energy.modes["binary"]
    assert energy.ratio("stepped") < 1  # type: ignore[operator]
    head = counts.total("head").macs + counts.total("attention").macs
    assert energy.modes["stepped"] == pytest.approx(
        head * 1.5 + counts.total("linear").sops["stepped"] * 0.4
    )
    rows = energies(counts, load_table())
    assert list(rows) == [*PRODUCTS, *ROWS, "whole"]
    for mode in EXECUTION_MODES:
        parts = [row.modes[mode] for name, row in rows.items() if name != "whole"]
        assert rows["whole"].modes[mode] == pytest.approx(sum(part or 0 for part in parts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"the file: .*expected name, source and picojoules"),
        (
            "name: a\nsource: b\npicojoules: {fp17_add: 1}\n",
            r"picojoules\.fp17_add: Extra inputs .* fp16_add, ",
        ),
        ("name: a\npicojoules: {fp16_add: 1}\n", r"source: Field required"),
        ("name: a\nsource: b\npicojoules: {fp16_multiply: -1}\n", r"greater than 0"),
        ("name: a\nsource: b\nhops: 0.5\npicojoules: {}\n", r"hops: .*greater than or equal to 1"),
        ("name: a\nsource: b\npicojoules: {fp16_multiply: .inf}\n", r"finite number"),
        ("name: a\nsource: b\npicojoules: {fp16_add: true}\n", r"fp16_add: .*not true or false"),
        (
            "name: a\nsource: b\npicojoules: {fp16_add: 1e308}\n",
            r"than or equal to 1000000000",
        ),
        ('name: "a\\e[31m"\nsource: b\npicojoules: {}\n', r"name: .*cannot be printed"),
        (f"name: {'a' * 101}\nsource: b\npicojoules: {{}}\n", r"name: .*at most 100"),
        ("a: [", r"not YAML"),
        (
            None,
            r"no such file, and no built-in table of that name \(horowitz-45nm, jouppi-7nm,"
            r" loihi-14nm, seneca-22nm\)",
        ),
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
        "name: mine\nsource: a chip\nhops: 3\npicojoules: {fp16_multiply: 1, fp16_add: 2,"
        " int8_multiply: 64, int32_add: 3, dram_byte: 4, spike_hop: 5}\n"
    )
    table = load_table(path)
    assert table.multiply_accumulate(2, 4) == 8 + 3
    assert table.multiply_accumulate(16, 4) == 3
    assert (table.addition(16), table.addition(4)) == (2, 3)
    assert table.elementary("spike") == 15
    assert (table.doubling(16), table.doubling(4)) == (2, 3)
