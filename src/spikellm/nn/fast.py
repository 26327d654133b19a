"""The native way through a spiking layer: when it is taken, and what it keeps of the layer beside
its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from spikellm.kernels.native import ops
from spikellm.kernels.native.additive_plan import OUTPUTS, TernarySegment, make_additive_plan
from spikellm.kernels.native.linear_plan import Part, Shape, fits, make_plan
from spikellm.nn.hooks import SpikeTrain, spike_observer
from spikellm.quantization.packing import pack

if TYPE_CHECKING:
    from spikellm.nn.linear import SpikingLinear


_CHUNK = 1 << 21  # weights that are unpacked at a time


class Prepared(NamedTuple):
    """What kernels need of a layer; never a dense copy of the weights.

    Attributes:
        kernel: ``"integer"`` or ``"additive"``; None where no kernel fits the layer.
        plan: see :mod:`spikellm.kernels.native.linear_plan` and
            :mod:`spikellm.kernels.native.additive_plan`.
        beside: sums of integer weights, int32 ``(segments, out)``, or the words of the additive
            kernel.
        codes, zero: packed weight codes of one width and their zero-points: the layer's own buffers
            where they are so, else made of them.
        made_from: identity and version of the buffers that it was made from.
    """

    kernel: str | None
    plan: Tensor
    beside: Tensor
    codes: Tensor
    zero: Tensor
    made_from: tuple[tuple[int, int], ...]


def run(layer: SpikingLinear, tokens: Tensor) -> Tensor | None:
    """Output of a layer, float32 ``(tokens, out)``, bias included.

    None where the torch path has to be taken.

    The torch path runs in stepped and binary form, where a gradient is asked for, on other devices
    than the CPU, while a model is compiled, and where no kernel fits.

    Args:
        tokens: ``(tokens, in)``.
    """
    if layer.form != "merged" or tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if (torch.is_grad_enabled() and tokens.requires_grad) or not ops.native():
        return None
    prepared = prepare(layer)
    if prepared.kernel is None:
        return None
    bias = None if layer.bias is None else layer.bias.float()
    x, scale = tokens.float(), layer.weight_scale
    if prepared.kernel == "additive":
        return cast(Tensor, ops.additive_linear(x, prepared.plan, prepared.beside, scale, bias))
    observer = spike_observer()
    y, counts = ops.spike_linear(
        x,
        prepared.plan,
        prepared.codes,
        scale,
        prepared.zero,
        prepared.beside,
        bias,
        observer is not None,
    )
    if observer is not None:
        neuron, steps = layer.neuron, layer.stored(layer.channel_steps)
        assert neuron is not None
        codes = (
            counts.to(torch.int32) - neuron.levels * steps.int()
            if neuron.signed
            else counts.to(torch.int32)
        )
        observer(SpikeTrain(layer, "input", codes, steps, neuron))
    return cast(Tensor, y)


def prepare(layer: SpikingLinear) -> Prepared:
    """What kernels need of a layer; made once, and anew where its buffers changed."""
    made_from = tuple(
        (buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version)
        for buffer in layer._buffers.values()
        if buffer is not None
    )  # tensors made under inference mode count no versions
    if layer._prepared is None or layer._prepared.made_from != made_from:
        layer._prepared = _look_at(layer, made_from)
    return layer._prepared


@torch.no_grad()
def _look_at(layer: SpikingLinear, made_from: tuple[tuple[int, int], ...]) -> Prepared:
    nothing, code = torch.empty(0, dtype=torch.int32), layer.settings.weights.code
    if code == "ternary" and layer.neuron is None:
        layout = layer.layout()
        segments = [
            TernarySegment(s.start, s.stop, s.weight_group, layout.weight_steps[s.weight_group])
            for s in layout.segments
        ]
        made = [
            make_additive_plan(weights, segments, layer.weight_scale.shape[1], layout.order)
            for weights in _chunks(layer)
        ]
        plan = made[0][0]
        plan[1] = layer.out_features
        return Prepared(
            "additive", plan, torch.cat([words for _, words in made]), nothing, nothing, made_from
        )
    shape = _shape_of(layer)
    if shape is None or not fits(shape):
        return Prepared(None, nothing, nothing, nothing, nothing, made_from)
    sums = [
        torch.stack([part[:, s.start : s.stop].sum(1, dtype=torch.int32) for s in shape.parts])
        for part in _chunks(layer)
    ]
    codes, zero = _codes(layer, shape.bits)
    return Prepared(
        "integer", make_plan(shape), torch.cat(sums, 1).contiguous(), codes, zero, made_from
    )


def _chunks(layer: SpikingLinear) -> Iterator[Tensor]:
    """Integer weights, some outputs at a time: a multiple of the additive kernel's blocks."""
    rows = max(1, _CHUNK // max(1, layer.in_features) // OUTPUTS) * OUTPUTS
    return (
        layer.integer_weights(slice(start, start + rows))
        for start in range(0, layer.out_features, rows)
    )


def _codes(layer: SpikingLinear, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of one width for all columns, and their zero-points."""
    if layer.settings.weights.code == "affine" and not layer.salient_columns:
        return layer.weight_codes, layer.weight_zero
    layout = layer.layout()
    if layer.settings.weights.code == "ternary":
        zero = torch.full(layer.weight_scale.shape, max(layout.weight_steps), dtype=torch.uint8)
    else:
        zero = layer.weight_zero
    of_column = torch.empty(layer.in_features, dtype=torch.long)
    for group, (start, stop) in enumerate(layout.weight_groups):
        of_column[start:stop] = group
    packed, row = [], 0
    for part in _chunks(layer):
        packed.append(pack(part + zero[row : row + len(part), of_column].to(torch.int16), bits))
        row += len(part)
    return torch.cat(packed), zero


def _shape_of(layer: SpikingLinear) -> Shape | None:
    """The layer as the integer kernel sees it.

    None where inputs are not coded, or weights have no integer form.
    """
    settings, neuron = layer.settings, layer.neuron
    if settings.weights.code == "partly-binary" or neuron is None:
        return None
    layout = layer.layout()
    if settings.weights.code == "ternary":
        bits = max(2, (2 * max(layout.weight_steps)).bit_length())
    else:
        bits = settings.weights.salient_bits if layer.salient_columns else settings.weights.bits
    mode = (
        "signed"
        if neuron.signed
        else "symmetric"
        if settings.activations.symmetric
        else "asymmetric"
    )
    spans = list(dict.fromkeys(layout.ranges))
    return Shape(
        layer.in_features,
        layer.out_features,
        bits,
        mode,
        [int(neuron.top(steps)) for steps in layout.steps],
        list(pairwise(layout.bounds)),
        spans,
        [spans.index(span) for span in layout.ranges],
        [Part(*segment) for segment in layout.segments],
        layer.weight_scale.shape[1],
        layout.order,
    )
