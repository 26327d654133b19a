"""The native way through a spiking layer: when it is taken, and what it keeps of the layer beside its buffers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from spikellm.kernels import dispatch
from spikellm.kernels.additive_plan import TernarySegment, make_additive_plan
from spikellm.kernels.plan import Part, Shape, fits, make_plan
from spikellm.modeling.watching import SpikeTrain, spike_observer

if TYPE_CHECKING:
    from spikellm.modeling.linear import SpikingLinear


class Prepared(NamedTuple):
    """What kernels need beside the buffers; never a dense copy of the weights.

    Attributes:
        kernel: ``"integer"`` or ``"additive"``; None where no kernel fits the layer.
        plan: see :mod:`spikellm.kernels.plan` and :mod:`spikellm.kernels.additive_plan`.
        beside: sums of integer weights, int32 ``(segments, out)``, or the words of the additive kernel.
        made_from: identity and version of the buffers that it was made from.
    """

    kernel: str | None
    plan: Tensor
    beside: Tensor
    made_from: tuple[tuple[int, int], ...]


def run(layer: SpikingLinear, tokens: Tensor) -> Tensor | None:
    """Output of a layer, float32 ``(tokens, out)``, bias included; None where the torch path has to be taken.

    The torch path runs in stepped and binary form, where a gradient is asked for, on other devices than the CPU, while a model is compiled,
    and where no kernel fits.

    Args:
        tokens: ``(tokens, in)``.
    """
    if layer.form != "merged" or tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if (torch.is_grad_enabled() and tokens.requires_grad) or not dispatch.native():
        return None
    prepared = prepare(layer)
    if prepared.kernel is None:
        return None
    bias = None if layer.bias is None else layer.bias.float()
    x, scale = tokens.float(), layer.weight_scale
    if prepared.kernel == "additive":
        return cast(Tensor, dispatch.additive_linear(x, prepared.plan, prepared.beside, scale, bias))
    observer = spike_observer()
    y, counts = dispatch.spike_linear(
        x, prepared.plan, layer.weight_codes, scale, layer.weight_zero, prepared.beside, bias, observer is not None
    )
    if observer is not None:
        neuron, steps = layer.neuron, layer.stored(layer.channel_steps)
        assert neuron is not None
        codes = counts.to(torch.int32) - neuron.levels * steps.int() if neuron.signed else counts.to(torch.int32)
        observer(SpikeTrain(layer, "input", codes, steps, neuron))
    return cast(Tensor, y)


def prepare(layer: SpikingLinear) -> Prepared:
    """What kernels need of a layer; made once, and anew where its buffers changed."""
    made_from = tuple(
        (buffer.data_ptr(), 0 if buffer.is_inference() else buffer._version) for buffer in layer._buffers.values() if buffer is not None
    )  # tensors made under inference mode count no versions
    if layer._prepared is None or layer._prepared.made_from != made_from:
        layer._prepared = _look_at(layer, made_from)
    return layer._prepared


@torch.no_grad()
def _look_at(layer: SpikingLinear, made_from: tuple[tuple[int, int], ...]) -> Prepared:
    nothing, code = torch.empty(0, dtype=torch.int32), layer.settings.weights.code
    if code == "ternary" and layer.neuron is None:
        layout = layer.layout()
        segments = [TernarySegment(s.start, s.stop, s.weight_group, layout.weight_steps[s.weight_group]) for s in layout.segments]
        return Prepared(
            "additive", *make_additive_plan(layer.integer_weights(), segments, layer.weight_scale.shape[1], layout.order), made_from
        )
    shape = _shape_of(layer)
    if shape is None or not fits(shape):
        return Prepared(None, nothing, nothing, made_from)
    weights = layer.integer_weights()
    sums = [weights[:, part.start : part.stop].sum(1, dtype=torch.int32) for part in shape.parts]
    return Prepared("integer", make_plan(shape), torch.stack(sums).contiguous(), made_from)


def _shape_of(layer: SpikingLinear) -> Shape | None:
    """The layer as the integer kernel sees it; None where weights have several steps or another code, or inputs are not coded."""
    settings, neuron = layer.settings, layer.neuron
    if settings.weights.code != "affine" or layer.salient_columns or neuron is None:
        return None
    layout = layer.layout()
    mode = "signed" if neuron.signed else "symmetric" if settings.activations.symmetric else "asymmetric"
    spans = list(dict.fromkeys(layout.ranges))
    return Shape(
        layer.in_features, layer.out_features, settings.weights.bits, mode, [int(neuron.top(steps)) for steps in layout.steps], list(pairwise(layout.bounds)), spans,
        [spans.index(span) for span in layout.ranges], [Part(*segment) for segment in layout.segments], layer.weight_scale.shape[1], layout.order,
    )  # fmt: skip
