"""A spiking linear layer as kernels see it."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from torch import Tensor

from spikellm.core.errors import RequestError
from spikellm.kernels.spec import ExecutionMode, LinearSpec
from spikellm.neurons import SoftResetNeuron
from spikellm.nn.formats import WeightFormat
from spikellm.nn.formats.base import Stored
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.thresholds import Threshold


class Described(Stored, Protocol):
    """What of a layer decides how it runs."""

    format: WeightFormat
    execution_mode: ExecutionMode

    @property
    def range_share(self) -> int: ...

    @property
    def shares(self) -> Tensor | None: ...

    @property
    def fixed(self) -> Threshold | None: ...

    @property
    def massive(self) -> MassiveTokens | None: ...

    @property
    def neuron(self) -> SoftResetNeuron | None: ...


def linear_spec(layer: Described) -> LinearSpec:
    """What a layer says of itself to kernel backends.

    Raises:
        RequestError: spikes are to be unrolled, and nothing in the layer spikes.
    """
    shape, layout, neuron = layer.shape, layer.layout(), layer.neuron
    if layer.execution_mode != "merged" and neuron is None and not layer.format.unrolls:
        raise RequestError(
            f"execution mode {layer.execution_mode!r} unrolls input spikes, and this layer does not"
            " code its inputs (activations.bits is 16); use 'merged'"
        )
    weights, fixed = shape.settings.weights, layer.fixed
    return LinearSpec(
        columns=shape.columns,
        rows=shape.rows,
        weights=layer.format.integer_form,
        weight_bits=layer.format.kernel_bits(layer),
        scales=layer.weight_scale.shape[1],
        planes=layer.format.planes_by_group(layer),
        scale_terms=weights.scale_terms,
        weight_steps=tuple(layout.weight_steps),
        weight_tops=tuple(weights.top(steps) for steps in layout.weight_steps),
        neuron=neuron,
        symmetric=shape.settings.activations.symmetric,
        steps=tuple(layout.steps),
        bounds=tuple(pairwise(layout.bounds)),
        ranges=tuple(layout.ranges),
        segments=tuple(layout.segments),
        order=layout.order,
        execution=layer.execution_mode,
        range_share=layer.range_share,
        massive=layer.massive,
        shares=() if layer.shares is None else tuple(layer.shares.tolist()),
        threshold_source=shape.settings.activations.threshold_from,
        fixed=() if fixed is None else tuple(zip(*(one.tolist() for one in fixed), strict=True)),
    )
