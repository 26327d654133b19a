"""Calls of the native kernels with awkward sizes, and what they have to write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heads import coder_and_heads
from layers import fit
from native import additive, partly_binary
from spikellm.kernels import RowSpec, select
from spikellm.kernels.native import build, ops
from spikellm.kernels.native.backend import NativeHeads
from spikellm.kernels.native.rotation import NativeRotation
from spikellm.kernels.native.weight_only_plan import make_weight_only_plan
from spikellm.nn.linear import SpikingLinear
from spikellm.nn.packed_kv import PackedKV
from spikellm.quantization import hadamard
from spikellm.recipe import ActivationRecipe, LinearRecipe


class In(NamedTuple):
    """An array that a kernel reads."""

    array: Tensor


class Out(NamedTuple):
    """An array that a kernel writes, as it has to be afterwards."""

    array: Tensor


Call = tuple[str, list[Any]]


def linear_calls() -> Iterator[Call]:
    """Layers of awkward sizes: function, then its arguments without the number of threads."""
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (1, 1, 1, 2),
        (65, 33, 1, 3),
        (65, 33, 7, 3),
        (130, 5, 1, 4),
        (129, 64, 6, 4),
        (257, 31, 1, 8),
        (257, 31, 13, 8),
        (77, 9, 3, 5),
        (300, 40, 1, 2),
        (130, 70, 33, 4),
        (257, 31, 40, 8),
    ]
    for columns, outputs, tokens, bits in sizes:
        activations = ActivationRecipe(bits=4, salient_rate=0.2, salient_steps=2, saliency="rms")
        recipe = LinearRecipe(weights={"bits": bits}, activations=activations)
        layer = fit(
            nn.Linear(columns, outputs),
            recipe,
            sample=torch.randn(30, columns, generator=generator),
        )
        x = torch.randn(tokens, columns, generator=generator)
        yield from calls_of("spikellm_spike_linear", layer, x)
    for columns, outputs, tokens in [
        (1, 1, 1),
        (19, 65, 2),
        (90, 64, 1),
        (55, 130, 3),
        (55, 130, 37),
    ]:
        layer = additive(
            columns,
            outputs,
            torch.randint(1, 4, (columns,), generator=generator).to(torch.uint8),
            generator,
            bias=True,
        )
        x = torch.randint(-9, 9, (tokens, columns), generator=generator).float()
        yield from calls_of("spikellm_additive_linear", layer, x)


def weight_only_calls() -> Iterator[Call]:
    """Weights on inputs that are not coded, of every width: sums, strips, and rows."""
    generator = torch.Generator().manual_seed(1)
    for bits, (columns, outputs, tokens) in itertools.product(
        range(2, 9), [(1, 1, 1), (77, 35, 5), (129, 9, 1)]
    ):
        weights = {"bits": bits, "group_size": 50}
        recipe = LinearRecipe(weights=weights, activations=ActivationRecipe(bits=16))
        layer = fit(nn.Linear(columns, outputs), recipe)
        x = torch.randn(tokens, columns, generator=generator)
        yield from calls_of("spikellm_weight_only_linear", layer, x)
        assert layer._kernels is not None
        plan, codes, scale, zero, _ = layer._kernels.chosen.operands
        stored = [In(plan), In(codes), In(scale), In(zero)]
        spec = RowSpec(layer.spec())
        rows = torch.randint(0, outputs, (4,), generator=generator)
        for kind, dtype in enumerate((torch.float32, torch.bfloat16)):
            found = select(spec, "cpu").prepare_rows(spec, layer)(rows, dtype)
            yield "spikellm_weight_only_rows", [In(rows), 4, *stored, Out(found), kind]
        places = make_weight_only_plan(layer.spec()).order
        k, strip = torch.empty(outputs, len(places)), build.load_library()
        pointers = [plan.data_ptr(), codes.data_ptr(), None, zero.data_ptr()]
        strip.spikellm_weight_only_strip(*pointers, 0, outputs, k.data_ptr(), 1)
        real = places < columns  # at others inputs are zero
        assert torch.equal(k[:, real], layer.integer_weights().float()[:, places[real]])
        yield "spikellm_weight_only_strip", [*stored[:2], None, stored[3], 0, outputs, Out(k)]


def partly_binary_calls() -> Iterator[Call]:
    """Partly binary weights: sums and strips."""
    for columns, outputs, tokens, group in [(1, 1, 1, None), (77, 35, 5, 17), (129, 9, 1, 50)]:
        layer = partly_binary(columns, outputs, 0.3, group, seed=columns)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns))
        yield from calls_of("spikellm_partly_binary_linear", layer, x)
        assert layer._kernels is not None
        stored = [In(one) for one in layer._kernels.chosen.operands[:-1]]
        rows = torch.nn.functional.pad(layer.dense_weight(), (0, -columns % 16))
        yield "spikellm_partly_binary_strip", [*stored, 0, outputs, Out(rows)]


def calls_of(function: str, layer: SpikingLinear, x: Tensor) -> Iterator[Call]:
    """A layer's call with inputs of either type."""
    for kind, dtype in enumerate((torch.float32, torch.bfloat16)):
        values = x.to(dtype)
        y, counts = layer(values), []
        assert layer._kernels is not None
        operands = list(map(In, layer._kernels.chosen.operands))
        if function == "spikellm_spike_linear":
            shown = len(layer.spec().bounds)
            found = ops.spike_linear(values, *layer._kernels.chosen.operands, shown)
            counts = [Out(one) for one in found[1:]]
            plan = layer._kernels.chosen.operands[0]
            size = build.load_library().spikellm_coded_bytes(plan.data_ptr(), len(x))
            memory = [In(torch.full((size,), 255, dtype=torch.uint8)), 0]
            counts += [None, 0]
            whole = layer.integer_weights().to(torch.int32)
            sums = torch.stack([whole[:, s.start : s.stop].sum(1) for s in layer.spec().segments])
            packed = [operands[0], operands[1], operands[3]]
            yield "spikellm_column_sums", [*packed, Out(sums.to(torch.int32))]
            shared = [In(values), len(x), *operands, Out(y.detach()), None, None, *memory, kind]
            yield function, shared
        yield function, [In(values), len(x), *operands, Out(y.detach()), *counts, kind]


def head_calls() -> Iterator[Call]:
    """Coders of awkward sizes."""
    for bits, extra in [
        (4, {}),
        (4, {"thresholds": "split"}),
        (3, {"thresholds": "shared"}),
        (8, {}),
    ]:
        for channels in (2, 35, 70):
            chosen = (
                {"salient_rate": 0.3, "salient_steps": 2, "saliency": "rms", **extra}
                if extra
                else {}
            )
            coder, x, _ = coder_and_heads(
                ActivationRecipe.model_validate({"bits": bits, **chosen}), channels, 7
            )
            query, weights = torch.randn(2, 6, 3, channels), torch.rand(2, 6, 3, 5)
            kernels = coder.chosen()
            assert isinstance(kernels, NativeHeads)
            plan, cached = kernels.plan, PackedKV(coder.to_rows(x), kernels, channels)
            sizes, shared = (
                (2, 3, 5),
                (
                    2,
                    3,
                    2,
                    3,
                ),
            )  # batch, heads, tokens; batch, heads, query heads to each, queries
            yield "spikellm_code_heads", [In(x), *sizes, In(plan), Out(cached.rows), None]
            yield (
                "spikellm_code_heads",
                [
                    In(x),
                    *sizes,
                    In(plan),
                    None,
                    Out(coder.fake_quantize(x)),
                ],
            )
            yield (
                "spikellm_key_scores",
                [
                    In(query),
                    *shared,
                    In(cached.rows),
                    5,
                    In(plan),
                    Out(cached.scores(query)),
                ],
            )
            yield (
                "spikellm_value_sums",
                [
                    In(weights),
                    *shared,
                    In(cached.rows),
                    5,
                    In(plan),
                    Out(cached.sums(weights)),
                ],
            )


def rotation_calls() -> Iterator[Call]:
    """Inputs of either type, with and without what is taken away."""
    generator = torch.Generator().manual_seed(3)
    for channels, tokens, dtype in [(1, 1, torch.float32), (70, 3, torch.bfloat16)]:
        signs, offset = torch.ones(channels), torch.randn(channels, generator=generator)
        x = torch.randn(tokens, channels, generator=generator).to(dtype)
        power = hadamard.largest_power(channels)
        for taken in (None, offset):
            yield (
                "spikellm_rotate",
                [
                    *(In(x), tokens, channels, power, math.sqrt(power)),
                    *(In(hadamard.shapiro(power)), In(signs)),
                    None if taken is None else In(taken),
                    Out(NativeRotation(signs, taken)(x)),
                    ops.TYPES[dtype],
                ],
            )


def kernel_calls() -> list[Call]:
    """All of them."""
    uncoded = (*weight_only_calls(), *partly_binary_calls())
    return [*linear_calls(), *uncoded, *head_calls(), *rotation_calls()]


def array_of(argument: In | Out) -> Any:
    """Of numpy, which has no bfloat16."""
    array = argument.array
    return (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
