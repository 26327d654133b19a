"""Kernels compiled for three kinds of GPUs, without one: products of spikes use integer tensor
cores and round no sum otherwise, and those that only add multiply nothing but by scales.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from interpreted import skip_unless_interpreted

skip_unless_interpreted()

POINTERS = {
    "code_inputs": {
        **dict.fromkeys(("thetas", "shares"), "*fp32"),
        **{"x": "*bf16", "counts": "*i8", "massive_beyond": "fp32"},
    },
    "spike_product": {
        **dict.fromkeys(("thetas", "scales", "bias"), "*fp32"),
        **{"counts": "*i8", "weights": "*u8", "zeros": "*u8", "y": "*bf16"},
    },
    "weight_product": {
        **dict.fromkeys(("scales", "bias"), "*fp32"),
        **{"x": "*bf16", "weights": "*u8", "zeros": "*u8", "y": "*bf16"},
    },
    "code_heads": {
        **dict.fromkeys(("x", "fineness", "values", "thetas", "baselines"), "*fp32"),
        **{"codes": "*u8", "share": "fp32", "top": "fp32"},
    },
    "weight_product of float32": {
        **dict.fromkeys(("x", "y", "scales", "bias"), "*fp32"),
        **{"weights": "*u8", "zeros": "*u8"},
    },
    "key_scores": {
        **dict.fromkeys(("query", "scores"), "*fp32"),
        **{"rows": "*u8", "top": "fp32"},
    },
    "value_sums": {
        **dict.fromkeys(("weights", "sums"), "*fp32"),
        **{"rows": "*u8", "top": "fp32"},
    },
    "walsh": {**dict.fromkeys(("x", "y", "signs"), "*fp32"), "root": "fp32"},
}
"""Types of arguments other than ``*i32`` for arrays and ``i32`` for numbers."""
NUMBERS = {
    *("columns", "width", "group_count", "segment_count", "massive_top", "lift"),
    *("tokens", "rows", "row_bytes", "scale_count"),
    *("heads", "channels", "plan_heads", "size", "offset"),
    *("own_heads", "queries", "codes_bytes", "part"),
}
TO_ROUNDING = {"weight_product", "weight_product of float32", "key_scores", "value_sums"}
"""Kernels that sum floats."""
SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spikellm.kernels.triton.jit import coding, heads, mixing, products, rows

for name, constants, pointers, numbers, warps, capability in json.loads(sys.argv[1]):
    name = name.split(" ")[0]
    modules = coding, heads, mixing, products, rows
    kernel = next(getattr(one, name) for one in modules if hasattr(one, name))
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(
            argument, "i32" if argument in numbers else "*i32"
        )
        for argument in kernel.arg_names
    }
    divisible = {  # as pointers and most sizes are at a launch
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument] not in ("constexpr", "fp32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {"enable_fp_fusion": False, "num_warps": warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(json.dumps({"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}))
"""
Variant = tuple[str, dict[str, int | bool], int]


def product(bits: int, tokens: int, rows: int) -> dict[str, int | bool]:
    fields = 8 // bits if bits in (2, 4) else 1
    tile = {"BLOCK_TOKENS": tokens, "BLOCK_ROWS": rows}
    return {"BITS": bits, "FIELDS": fields, "HAS_BIAS": True, **tile}


def spikes(bits: int, tokens: int, rows: int) -> dict[str, int | bool]:
    return {**product(bits, tokens, rows), "HAS_LIFT": bits == 8}


def compiled(capability: int, variants: list[Variant]) -> list[dict[str, str | int]]:
    told = [
        (name, constants, POINTERS[name], sorted(NUMBERS), warps, capability)
        for name, constants, warps in variants
    ]
    surroundings = {name: value for name, value in os.environ.items() if "TRITON_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(told)],
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory of a program, by compute capability."""


@pytest.mark.parametrize(("capability", "most_shared"), list(SHARED.items()))
def test_kernels_compile(capability: int, most_shared: int) -> None:
    tiles = [(16, 32, 4), (64, 64, 4), (128, 128, 8)]
    variants: list[Variant] = [
        ("code_inputs", {"HAS_MASSIVE": massive, "MODE": mode, "BLOCK": 1024}, 4)
        for mode, massive in ((0, False), (1, True), (2, False))
    ]
    variants += [
        ("spike_product", spikes(bits, *tile[:2]), tile[2])
        for bits in (2, 3, 4, 8)
        for tile in tiles
    ]
    variants += [
        ("weight_product", {**product(4, *tile[:2]), "ADDITIVE": False}, tile[2]) for tile in tiles
    ]
    variants += [
        ("weight_product of float32", {**product(4, *tile[:2]), "ADDITIVE": False}, tile[2])
        for tile in tiles[:2]
    ]
    variants += [("weight_product", {**product(2, 1, 32), "ADDITIVE": True}, 4)]
    variants += [
        ("code_heads", {"RANGES": ranges, "MODE": mode, "VALUES": values, "BLOCK": 64}, 1)
        for ranges, mode, values in ((1, 0, True), (2, 0, False), (2, 1, True), (1, 2, False))
    ]
    tile = {"BLOCK_QUERIES": 16, "BLOCK_TOKENS": 32, "BLOCK": 128}
    variants += [
        (name, {"RANGES": ranges, "SIGNED": ranges == 1, **tile}, 4)
        for name in ("key_scores", "value_sums")
        for ranges in (1, 2)
    ]
    variants += [
        ("walsh", {"SIGNED": signed, "POWER": 512, "STAGES": 9}, 4) for signed in (False, True)
    ]
    found = compiled(capability, variants)
    assert len(found) == len(variants)
    for (name, constants, _), one in zip(variants, found, strict=True):
        ptx = str(one["ptx"])
        assert int(one["shared"]) <= most_shared, (name, constants)
        assert "fma.rn.f32" not in ptx or name in TO_ROUNDING, "sums would round otherwise"
        if name == "spike_product":
            assert "mma" in ptx
            assert "s8" in ptx
        if constants.get("ADDITIVE"):
            assert "mma" not in ptx
            products = ptx.count("mul.f32") + ptx.count("mul.rn.f32") + ptx.count("fma.rn.f32")
            assert products <= 8, "a scale for each output of a program"
