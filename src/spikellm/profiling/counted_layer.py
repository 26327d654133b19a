"""What counting needs to know of a spiking layer, whatever runs through it."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from spikellm.kernels.spec import Segment
from spikellm.nn.layout import Layout
from spikellm.nn.linear import SpikingLinear
from spikellm.profiling.fan_out import fan_out
from spikellm.profiling.linear_products import products_of
from spikellm.profiling.shifts import doublings
from spikellm.profiling.work import Coder, coder_of


class CountedLayer(NamedTuple):
    """What stays as it is from token to token.

    Attributes:
        layout: of its columns.
        reach: see :func:`spikellm.profiling.fan_out.fan_out`.
        products: see :func:`spikellm.profiling.linear_products.products_of`, with massive tokens as
            the calibration text had them.
        average_steps: see :meth:`spikellm.nn.formats.WeightFormat.average_steps`.
        additive_share: of products.
        coder: how inputs are coded; None where they are not.
        accumulators: segments of one output, once for each plane of weights that has scales of its
            own.
        doublings: of one output's accumulators in phase execution, in an ordinary token.
        massive: whether some tokens take more steps.
    """

    layout: Layout
    reach: Tensor
    products: dict[tuple[int, int], float]
    average_steps: float | None
    additive_share: float
    coder: Coder | None
    accumulators: tuple[Segment, ...]
    doublings: int
    massive: bool


_found: weakref.WeakKeyDictionary[SpikingLinear, CountedLayer] = weakref.WeakKeyDictionary()


def counted_layer(layer: SpikingLinear) -> CountedLayer:
    """The facts of a layer, found once, until it is written into."""
    layout = layer.layout()  # made anew whenever the layer is
    known = _found.get(layer)
    if known is None or known.layout is not layout:
        known = _found[layer] = _facts_of(layer, layout)
    return known


def _facts_of(layer: SpikingLinear, layout: Layout) -> CountedLayer:
    neuron, coder, doubled = layer.neuron, None, 0
    planes = layer.format.planes_by_group(layer) or (1,) * len(layout.weight_groups)
    sums = tuple(part for part in layout.segments for _ in range(planes[part.weight_group]))
    if neuron is not None:
        activations = layer.settings.activations
        coder = coder_of(
            neuron,
            sum(start < stop for start, stop in pairwise(layout.bounds)),
            symmetric=activations.symmetric,
            shared=activations.searches_share,
            source=activations.threshold_from,
        )
        steps = layer.stored(layer.channel_steps).long()
        doubled = int(doublings(neuron, steps, sums))
    return CountedLayer(
        layout=layout,
        reach=fan_out(layer),
        products=products_of(layer),
        average_steps=layer.format.average_steps(layer),
        additive_share=layer.additive_share,
        coder=coder,
        accumulators=sums,
        doublings=doubled,
        massive=layer.massive is not None,
    )
