"""What a spiking linear layer says of itself."""

from __future__ import annotations

import math

from torch import Tensor

from spikellm.neurons import SoftResetNeuron
from spikellm.nn.buffer_kinds import BufferKind, places_columns
from spikellm.nn.formats import WeightFormat
from spikellm.nn.formats.base import LayerShape
from spikellm.nn.layout import Layout, make_layout
from spikellm.nn.prepared import PreparedModule
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.thresholds import Threshold, share_of
from spikellm.recipe import LinearRecipe


class LinearFacts(PreparedModule):
    """Neuron, steps, shares, sizes and layout of a :class:`spikellm.nn.linear.SpikingLinear`, read
    from its settings and buffers.
    """

    weight_scale: Tensor
    channel_group: Tensor
    group_steps: Tensor
    settings: LinearRecipe
    shape: LayerShape
    format: WeightFormat
    _layout: Layout | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """What decides the shapes of buffers beyond the settings."""
        return self.shape.sizes

    @property
    def neuron(self) -> SoftResetNeuron | None:
        """The neuron that codes the inputs; None where inputs are not coded."""
        activations = self.settings.activations
        return activations.make_neuron(self.price) if activations.spiking else None

    @property
    def price(self) -> float:
        """λ, see :mod:`spikellm.neurons.price`; 0 where spikes have no price."""
        price = self._buffers.get("spike_price")
        return 0.0 if price is None else float(price)

    @property
    def range_share(self) -> int:
        """See :func:`spikellm.quantization.thresholds.coded_range`."""
        searched = self._buffers.get("input_range")
        return self.settings.activations.range_share if searched is None else int(searched)

    @property
    def common_share(self) -> float:
        """:attr:`range_share` as :func:`spikellm.quantization.thresholds.coded_range` takes it."""
        return share_of(self.range_share, self.settings.activations.threshold_from)

    @property
    def shares(self) -> Tensor | None:
        """The part of its range that each activation group codes, float32 ``(groups,)``, where that
        was trained; None where all code :attr:`range_share`.
        """
        return self._buffers.get("group_share")

    @property
    def fixed(self) -> Threshold | None:
        """θ and z of each activation group, float32 ``(groups,)``, where they are constants; None
        where every token has its own.
        """
        if not self.settings.activations.static:
            return None
        return Threshold(self.get_buffer("group_threshold"), self.get_buffer("group_baseline"))

    @property
    def salient(self) -> Tensor:
        """Channels that were chosen to be salient, bool ``(in,)``."""
        if self.settings.activations.clusters > 1:
            return self.channel_steps > self.settings.activations.steps
        return self.channel_group > 0

    @property
    def own_range(self) -> Tensor:
        """Salient channels with a range of their own, bool ``(in,)``."""
        return (self.channel_group >= 2) & (self.settings.activations.clusters == 1)

    @property
    def massive(self) -> MassiveTokens | None:
        """Tokens that take more steps; None where the calibration text had none."""
        found = self._buffers.get("token_threshold")
        if found is None or (beyond := float(found)) == math.inf:
            return None
        share = float(self.get_buffer("token_share"))
        return MassiveTokens(self.settings.activations.token_steps, beyond, share)

    @property
    def channel_steps(self) -> Tensor:
        """Steps T of every input channel, ``(in,)``, in ordinary tokens."""
        return self.group_steps[self.channel_group.long()]

    @property
    def salient_columns(self) -> int:
        """Columns whose weights take ``weights.salient_steps``."""
        return self.format.salient_columns(self.shape)

    @property
    def weight_steps(self) -> Tensor | None:
        """Steps T of the weights of every column, ``(in,)``; None where all take one."""
        return self.format.column_steps(self)

    @property
    def additive_share(self) -> float:
        """Share of products that are additions or subtractions: what the format says of its
        weights, else all where inputs are one-bit spikes.
        """
        share = self.format.additive_share(self)
        if share is not None:
            return share
        return 1.0 if self.neuron is not None and self.neuron.levels == 1 else 0.0

    @property
    def average_steps(self) -> float:
        """Mean over the columns of input steps times weight steps, unless the format counts
        otherwise; with as many massive tokens as the calibration text had.

        An input or weight that takes one step, or is not coded, counts 1.
        """
        own = self.format.average_steps(self)
        if own is not None:
            return own
        steps, massive = self.channel_steps.float(), self.massive
        if massive is not None:
            steps = steps + massive.share * (massive.steps - steps)
        return self.mean_steps(self.stored(steps))

    def mean_steps(self, steps: Tensor) -> float:
        """Mean of input steps, ``(..., in)`` in stored order, times weight steps."""
        weight_steps = self.weight_steps
        if weight_steps is not None:
            steps = steps * self.stored(weight_steps)
        else:
            steps = steps * max(self.format.planes_by_group(self), default=1)
        return float(steps.float().mean())

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything that replaces the dense weight: codes, scales, zero-points, groups
        and steps.
        """
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def buffer_kinds(self) -> dict[str, BufferKind]:
        """What the bits of each buffer are for; what its format does not name is for coding the
        inputs, unless it says in which order or group columns are stored.
        """
        found = {one.name: one.stored_as for one in self.format.buffers(self.shape)}
        for name, buffer in self.named_buffers(recurse=False):
            found.setdefault(name, "indices" if places_columns(name, buffer.dtype) else "inputs")
        return found

    @property
    def qweight(self) -> Tensor:
        """A tensor that stands for the weight where peft asks for its device: the scales."""
        return self.weight_scale

    def layout(self) -> Layout:
        """Order of stored columns and the segments they form.

        Derived from ``channel_group`` once.
        """
        self.forget_if_written()
        if self._layout is None:
            self._layout = make_layout(self.channel_group, self.weight_steps, self.settings)
        return self._layout

    def stored(self, of_channels: Tensor) -> Tensor:
        """What belongs to every channel, ``(in,)``, in the order in which columns are stored."""
        order = self.layout().order
        return of_channels if order is None else of_channels[order]
