"""The spiking linear layer: packed integer weights, inputs coded as spikes on the fly, one integer
product for all steps.

    y[n, o] = Σ_segments θ_a[n] · s_w[o] · (Σ_c q[n, c]·k[o, c] − z_a[n]·Σ_c k[o, c])  +  bias[o]

``q`` are spike counts, ``k`` integer weights. A *segment* is a run of columns with one activation
group a and one weight group w; the baseline's charge is taken off over the columns of the segment
alone. Columns are stored sorted by activation group (stable), so groups are contiguous, and weight
groups are formed in that order, never across the boundary of two ranges: outlier channels, whose
weights are small, keep a scale of their own.

How weights are stored is the business of the layer's format (:mod:`spikellm.nn.formats`), how the
sum is taken that of a kernel backend (:mod:`spikellm.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError
from spikellm.kernels.base import REFERENCE, backends, select
from spikellm.kernels.coding import InputCoding
from spikellm.kernels.planes import prepare_layer
from spikellm.kernels.prepared import LinearWeights, PackedCodes, PreparedLinear, by_column
from spikellm.kernels.spec import ExecutionMode, LinearSpec
from spikellm.kernels.torch.linear import encode
from spikellm.neurons.price import whole_price
from spikellm.nn.coding_buffers import FIXED, coding_buffers
from spikellm.nn.formats import WeightFormat, format_of
from spikellm.nn.formats.base import LayerShape
from spikellm.nn.hooks import SpikeTrain, spike_observer
from spikellm.nn.linear_facts import LinearFacts
from spikellm.nn.linear_spec import linear_spec
from spikellm.nn.trained import trained_output
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.ste import through_weight
from spikellm.quantization.thresholds import FULL_RANGE, Threshold
from spikellm.recipe import LinearRecipe


class _Kernels(NamedTuple):
    """What runs a layer: the chosen backend's state, and the reference's; what both were made
    from; steps of every stored column for whoever observes.
    """

    chosen: PreparedLinear
    reference: PreparedLinear
    spec: LinearSpec
    steps: Tensor


class SpikingLinear(LinearFacts):
    """A linear layer whose weights are integer codes and whose inputs are spikes.

    Persistent state, all named buffers: those of the weight format, ``channel_group`` (uint8,
    ``(in,)``: activation group of every channel) and ``group_steps`` (uint8, ``(groups,)``: steps T
    of each group); what :func:`spikellm.nn.coding_buffers.coding_buffers` names; ``bias`` as it
    was.

    Kernels are chosen and prepared at the first call, and forgotten as
    :class:`spikellm.nn.prepared.PreparedModule` says.

    Args:
        sizes: what decides the shapes of buffers beyond the settings, see
            :meth:`spikellm.nn.formats.WeightFormat.sizes_of`.
        factory: ``dtype`` (of the bias) and ``device``.
    """

    bias: nn.Parameter | None
    prepared = ("_layout", "_kernels", "_coding")
    watched = ("bias", "execution_mode")
    _kernels: _Kernels | None
    _coding: InputCoding | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: LinearRecipe,
        *,
        bias: bool = True,
        sizes: tuple[int, ...] = (),
        **factory: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.settings = in_features, out_features, settings
        self.shape = LayerShape(in_features, out_features, settings, sizes)
        self.format: WeightFormat = format_of(settings.weights)
        self.execution_mode: ExecutionMode = "merged"
        device = factory.get("device")
        for name, shape, dtype, fill, _ in self.format.buffers(self.shape):
            self.register_buffer(name, torch.full(shape, fill, dtype=dtype, device=device))
        group = torch.zeros(in_features, dtype=torch.uint8, device=device)
        self.register_buffer("channel_group", group)
        steps = torch.tensor(settings.activations.group_steps, dtype=torch.uint8, device=device)
        self.register_buffer("group_steps", steps)
        for name, size, dtype, value in coding_buffers(settings.activations):
            self.register_buffer(name, torch.full((size,), value, dtype=dtype, device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, **factory), requires_grad=False)
            if bias
            else None
        )

    # its weights

    @torch.no_grad()
    def set_weights(self, weights: Any) -> None:
        """Take over weights as the format codes them, columns in stored order (see
        :meth:`layout`).
        """
        self.format.write(self, weights)
        self.forget()

    @torch.no_grad()
    def set_groups(
        self,
        channel_group: Tensor,
        column_steps: Tensor | None = None,
        range_share: int = FULL_RANGE,
        massive: MassiveTokens | None = None,
        price: float = 0.0,
        fixed: Threshold | None = None,
    ) -> None:
        """Set the activation group of every channel, where weights take several steps, the steps of
        every column, ``(in,)`` each, where it is searched, the share of the range, the tokens that
        take more steps, the price of a spike, where it has one, and θ and z where they are
        constants.
        """
        self.channel_group.copy_(channel_group)
        for name, value in zip(FIXED, fixed or (), strict=False):
            self.get_buffer(name).copy_(value)
        if self.settings.activations.searches_share:
            self.get_buffer("input_range").fill_(range_share)
        if massive is not None:
            self.get_buffer("token_threshold").fill_(massive.beyond)
            self.get_buffer("token_share").fill_(massive.share)
        if self.settings.activations.spikes:
            self.get_buffer("spike_price").fill_(whole_price(price))
        if column_steps is not None and "column_steps" in self._buffers:  # else all take one
            self.get_buffer("column_steps").copy_(column_steps)
        self.forget()

    def integer_weights(self, rows: slice = slice(None)) -> Tensor:
        """Integer weights ``k`` of some outputs: int16, ``(out, in)``, columns in stored order.

        Raises:
            RequestError: the format has no integer form.
        """
        return self.format.integer_weights(self, rows)

    def planes(self) -> Sequence[LinearWeights]:
        """Planes of which the weights are the sum; the layer itself where there is one."""
        return self.format.as_planes(self) or [self]

    def packed_codes(self) -> PackedCodes:
        """Codes of one width for all columns."""
        return self.format.packed_codes(self)

    def release_codes(self) -> None:
        """Say that the buffers of weights are not needed for a while."""
        self.format.release(self)

    def dense_weight(self) -> Tensor:
        """What the codes stand for, float32, ``(out, in)``, columns in their original order."""
        return self.format.dense_weight(self)

    def validation_error(self) -> str | None:
        """What in the stored weights no conversion writes; None if all is well."""
        return self.format.validation_error(self)

    # how it runs

    def spec(self) -> LinearSpec:
        """The layer as kernels see it.

        Raises:
            RequestError: spikes are to be unrolled, and nothing in the layer spikes.
        """
        return linear_spec(self)

    def encode(self, x: Tensor) -> tuple[Tensor, list[Threshold]]:
        """Spike counts of inputs.

        Args:
            x: ``(tokens, in)``.

        Returns:
            ``(codes, thresholds)``: int32 ``(tokens, in)`` with columns in stored order, and θ, z
            ``(tokens, 1)`` of each activation group.

        Raises:
            RequestError: the layer does not code its inputs.
        """
        if self.neuron is None:
            raise RequestError(
                "this layer does not code its inputs (activations.bits is 16), so it has no input"
                " spikes"
            )
        return encode(self.spec(), x)

    def steps_of(self, x: Tensor) -> Tensor:
        """Steps T of every channel in stored order, int64 ``(in,)``; where some tokens take more,
        of every token too, ``(tokens, in)``.

        Args:
            x: ``(..., in)``.
        """
        return self._with_massive(x, self.stored(self.channel_steps).long(), self.massive)

    def _with_massive(self, x: Tensor, steps: Tensor, massive: MassiveTokens | None) -> Tensor:
        if massive is None:
            return steps
        tokens = x.detach().reshape(-1, self.in_features).float()
        return torch.maximum(steps, massive.steps_of(tokens, 0))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``, in the type of ``x``.

        Sums are exact integers, scaled in float32. Where a gradient is asked for it passes straight
        through the coding of ``x``, to the weights that the codes stand for. The reference runs
        while the model is being compiled or the bias is trained.
        """
        if torch.is_grad_enabled() and self.trains:
            return trained_output(self, x)
        if torch.is_grad_enabled() and x.requires_grad:
            return through_weight(x, self._output(x.detach()), self.dense_weight)
        return self._output(x)

    @property
    def trains(self) -> bool:
        """Whether scales or shares of ranges ask for gradients."""
        asked = self.weight_scale, self.shares
        return any(one is not None and one.requires_grad for one in asked)

    @property
    def coding(self) -> InputCoding | None:
        """How inputs are coded while the layer is trained; None where they are not coded."""
        if self.neuron is None:
            return None
        self.forget_if_written()
        if self._coding is None:
            self._coding = InputCoding(self.spec())
        return self._coding

    def share_ranges(self) -> None:
        """Let every activation group code a share of its range of its own, now the same for all."""
        device = self.weight_scale.device
        share = 1.0 if device.type == "meta" else self.common_share
        shares = torch.full_like(self.group_steps, share, dtype=torch.float32, device=device)
        self.register_buffer("group_share", shares)

    def _output(self, x: Tensor) -> Tensor:
        kernels = self._kernels
        if kernels is None or self.written():
            kernels = self._prepare()
        run = kernels.chosen
        trains_bias = self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled()
        if torch.compiler.is_compiling() or trains_bias:
            run = kernels.reference
        observer = spike_observer()
        if observer is None:
            return run(x)
        y, codes, z = run.observed(x)
        spec = kernels.spec
        if codes is not None and spec.neuron is not None:
            if z is None:
                thresholds = self.encode(x.reshape(-1, self.in_features))[1]
                z = by_column([one.flatten() for _, one in thresholds], spec.bounds)
            steps = self._with_massive(x, kernels.steps, spec.massive)
            observer(SpikeTrain(self, "input", codes, z, steps, spec.neuron))
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _prepare(self) -> _Kernels:
        spec = self.spec()
        reference = prepare_layer(backends[REFERENCE], spec, self)
        chosen, own = select(spec, self.weight_scale.device), reference
        if chosen.name != REFERENCE:
            own = prepare_layer(chosen, spec, self)
        steps = self.stored(self.channel_steps).long()
        self._kernels = _Kernels(own, reference, spec, steps)
        return self._kernels

    def extra_repr(self) -> str:
        weights, activations = self.settings.weights, self.settings.activations
        spikes = (
            f"{activations.neuron} {activations.bits}-bit spikes"
            if activations.spiking
            else "inputs not coded"
        )
        return (
            f"in={self.in_features}, out={self.out_features}, weights {weights.bits}-bit, {spikes},"
            f" bias={self.bias is not None}"
        )
