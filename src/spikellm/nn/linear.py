"""The spiking linear layer: packed integer weights, inputs coded as spikes on the fly, one integer
product for all steps.

    y[n, o] = Σ_segments θ_a[n] · s_w[o] · (Σ_c q[n, c]·k[o, c] − z_a[n]·Σ_c k[o, c])  +  bias[o]

``q`` are spike counts, ``k = code − zero`` integer weights. A *segment* is a run of columns with
one activation group a and one weight group w; the baseline's charge is taken off over the columns
of the segment alone. Columns are stored sorted by activation group (stable), so
groups are contiguous, and weight groups are formed in that order, never across the boundary of two
    ranges: outlier channels, whose weights are
small, keep a scale of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from spikellm.core.errors import RequestError
from spikellm.core.registry import Registry
from spikellm.kernels.torch.product import integer_product
from spikellm.neurons import SoftResetNeuron, make_neuron
from spikellm.nn import fast
from spikellm.nn.hooks import SpikeTrain, spike_observer
from spikellm.nn.layout import Layout, make_layout, most_weight_groups
from spikellm.quantization.affine import AffineWeights
from spikellm.quantization.packing import pack, packed_length, unpack
from spikellm.quantization.thresholds import Threshold, threshold_for_range, token_range
from spikellm.recipe import LinearRecipe
from spikellm.saliency import salient_count

ExecutionMode = Literal["merged", "stepped", "binary"]


layer_kinds: Registry[Callable[..., SpikingLinear]] = Registry("weights.code")


@layer_kinds.register("affine")
class SpikingLinear(nn.Module):
    """A linear layer whose weights are integer codes and whose inputs are spikes.

    Persistent state, all named buffers: ``weight_codes`` (uint8, packed, ``(out, bytes)``),
    ``weight_scale`` (float32, ``(out, weight groups)``), ``weight_zero`` (uint8, the same shape),
    ``channel_group`` (uint8, ``(in,)``: activation group of every channel), ``group_steps`` (uint8,
    ``(groups,)``: steps T of each group); ``bias`` as the layer had it.

    Attributes:
        form: how spikes are summed: ``"merged"`` (one product of counts), ``"stepped"`` (T
            products) or ``"binary"`` (T·L products of {0, 1}, or {−1, 0, 1}). All give the same
            integers, so the same output bit for bit.
        sizes: what decides the shapes of buffers beyond the settings; empty here, see the layers of
            other codes.
    """

    unrolls_weights = False  # whether forms unroll weights where inputs are not coded

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    channel_group: Tensor
    group_steps: Tensor
    salient_codes: Tensor
    column_steps: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        settings: LinearRecipe,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        sizes: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.settings, self.sizes = (
            in_features,
            out_features,
            settings,
            sizes,
        )
        self.form: ExecutionMode = "merged"
        self._register_weights(device)
        self.register_buffer(
            "channel_group", torch.zeros(in_features, dtype=torch.uint8, device=device)
        )
        self.register_buffer(
            "group_steps",
            torch.tensor(settings.activations.group_steps, dtype=torch.uint8, device=device),
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None
        )
        self._layout: Layout | None = None
        self._prepared: fast.Prepared | None = None

    def _register_weights(self, device: torch.device | str | None) -> None:
        """Buffers that hold the weights."""
        weights, salient = self.settings.weights, self.salient_columns
        packed = packed_length(self.in_features - salient, weights.bits)
        self.register_buffer(
            "weight_codes", torch.zeros(self.out_features, packed, dtype=torch.uint8, device=device)
        )
        if salient:
            packed = packed_length(salient, weights.salient_bits)
            self.register_buffer(
                "salient_codes",
                torch.zeros(self.out_features, packed, dtype=torch.uint8, device=device),
            )
            self.register_buffer(
                "column_steps", torch.ones(self.in_features, dtype=torch.uint8, device=device)
            )
        groups = most_weight_groups(
            self.in_features, self.settings, 2 if salient else 1
        )  # unused ones stay 1 and 0
        self.register_buffer(
            "weight_scale",
            torch.ones(self.out_features, groups, dtype=torch.float32, device=device),
        )
        self.register_buffer(
            "weight_zero", torch.zeros(self.out_features, groups, dtype=torch.uint8, device=device)
        )

    @classmethod
    def sizes_of(cls, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``sizes`` of the layer with these buffers."""
        return ()

    @property
    def neuron(self) -> SoftResetNeuron | None:
        """The neuron that codes the inputs; None where inputs are not coded."""
        activations = self.settings.activations
        return make_neuron(activations.neuron, activations.bits) if activations.spiking else None

    @property
    def channel_steps(self) -> Tensor:
        """Steps T of every input channel, ``(in,)``."""
        return self.group_steps[self.channel_group.long()]

    @property
    def salient_columns(self) -> int:
        """Columns whose weights take ``salient_steps``."""
        return (
            salient_count(self.settings.weights.salient_rate, self.in_features)
            if self.settings.weights.code == "affine"
            else 0
        )

    @property
    def weight_steps(self) -> Tensor | None:
        """Steps T of the weights of every column, ``(in,)``; None where all take one."""
        return self._buffers.get("column_steps")

    @property
    def additive_share(self) -> float:
        """Share of products that are additions or subtractions: all where weights are ternary or
        inputs are one-bit spikes, else none.
        """
        return 1.0 if self.neuron is not None and self.neuron.levels == 1 else 0.0

    @property
    def average_steps(self) -> float:
        """Mean over the columns of input steps times weight steps.

        An input or weight that takes one step, or is not coded, counts 1.
        """
        steps = self.channel_steps.float()
        return float(
            (steps if self.weight_steps is None else steps * self.weight_steps.float()).mean()
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of everything that replaces the dense weight: codes, scales, zero-points, groups
        and steps.
        """
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpikingLinear:
        """Moves as any module does, but scales stay float32: casting a model must not change its
        integers' meaning.
        """
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._layout = self._prepared = None
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._layout = self._prepared = None

    def layout(self) -> Layout:
        """Order of stored columns and the segments they form.

        Derived from ``channel_group`` once.
        """
        if self._layout is None:
            self._layout = make_layout(self.channel_group, self.weight_steps, self.settings)
        return self._layout

    def stored(self, of_channels: Tensor) -> Tensor:
        """What belongs to every channel, ``(in,)``, in the order in which columns are stored."""
        order = self.layout().order
        return of_channels if order is None else of_channels[order]

    @torch.no_grad()
    def set_weights(self, weights: AffineWeights) -> None:
        """Take over integer weights whose columns are in stored order (see :meth:`layout`)."""
        fine = self._fine_columns()
        bits = self.settings.weights
        if fine is None:
            self.weight_codes.copy_(pack(weights.codes, bits.bits))
        else:
            self.weight_codes.copy_(pack(weights.codes[:, ~fine], bits.bits))
            self.salient_codes.copy_(pack(weights.codes[:, fine], bits.salient_bits))
        used = weights.scale.shape[1]
        self.weight_scale[:, :used] = weights.scale
        self.weight_zero[:, :used] = weights.zero

    @torch.no_grad()
    def set_groups(self, channel_group: Tensor, column_steps: Tensor | None = None) -> None:
        """Set the activation group of every channel and, where weights take several steps, the
        steps of every column; ``(in,)`` each.
        """
        self.channel_group.copy_(channel_group)
        if column_steps is not None:
            self.column_steps.copy_(column_steps)
        self._layout = None

    def integer_weights(self, rows: slice = slice(None)) -> Tensor:
        """Integer weights ``k = code − zero`` of some outputs, all by default: int16, ``(out,
        in)``, columns in stored order.
        """
        settings, fine = self.settings.weights, self._fine_columns()
        codes = unpack(
            self.weight_codes[rows], settings.bits, self.in_features - self.salient_columns
        ).to(torch.int16)
        if fine is not None:
            ordinary, codes = codes, codes.new_empty(len(codes), self.in_features)
            codes[:, ~fine] = ordinary
            codes[:, fine] = unpack(
                self.salient_codes[rows], settings.salient_bits, self.salient_columns
            ).to(torch.int16)
        for group, (start, stop) in enumerate(self.layout().weight_groups):
            codes[:, start:stop] -= self.weight_zero[rows, group : group + 1]
        return codes

    def _fine_columns(self) -> Tensor | None:
        """Mask of stored columns whose weights take several steps; None if there are none."""
        if not self.salient_columns:
            return None
        order = self.layout().order
        fine = self.column_steps > 1
        return fine if order is None else fine[order]

    def dense_weight(self) -> Tensor:
        """The weight that the codes stand for, float32, ``(out, in)``, columns in their original
        order.
        """
        weight = self.integer_weights().float()
        for group, (start, stop) in enumerate(self.layout().weight_groups):
            weight[:, start:stop] *= self.weight_scale[:, group : group + 1]
        order = self.layout().order
        return weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)

    def validation_error(self) -> str | None:
        """What in the stored weights no conversion writes; None if all is well."""
        weights = self.settings.weights
        if (
            self.salient_columns
            and int((self.column_steps == weights.salient_steps).sum()) != self.salient_columns
        ):
            return (
                f"column_steps does not give {self.salient_columns} columns {weights.salient_steps}"
                " steps, as the recipe says"
            )
        top = weights.top(weights.salient_steps)
        return (
            f"weight_zero exceeds the largest code, {top}"
            if int(self.weight_zero.max()) > top
            else None
        )

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
        neuron = self.neuron
        if neuron is None:
            raise RequestError(
                "this layer does not code its inputs (activations.bits is 16), so it has no input"
                " spikes"
            )
        layout, activations = self.layout(), self.settings.activations
        x = x.float() if layout.order is None else x.float().index_select(1, layout.order)
        codes, thresholds = [], []
        for group, steps in enumerate(layout.steps):
            part = x[:, layout.bounds[group] : layout.bounds[group + 1]]
            low, high = token_range(x[:, layout.ranges[group][0] : layout.ranges[group][1]])
            threshold = threshold_for_range(
                low, high, neuron.top(steps), symmetric=activations.symmetric, signed=neuron.signed
            )
            codes.append(neuron.encode(part, *threshold, steps))
            thresholds.append(threshold)
        return torch.cat(codes, dim=1), thresholds

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``, in the type of ``x``.

        Sums are exact integers, scaled in float32.
        """
        tokens = x.reshape(-1, self.in_features)
        y = fast.run(self, tokens)
        if y is None:
            weights = self.integer_weights()
            y = (
                self._spiking(tokens, weights)
                if self.settings.activations.spiking
                else self._weight_only(tokens, weights)
            )
            if self.bias is not None:
                y = y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _spiking(self, tokens: Tensor, weights: Tensor) -> Tensor:
        neuron = cast(SoftResetNeuron, self.neuron)
        codes, thresholds = self.encode(tokens)
        layout = self.layout()
        if (observer := spike_observer()) is not None:
            observer(SpikeTrain(self, "input", codes, self.stored(self.channel_steps), neuron))
        y = torch.zeros(
            tokens.shape[0], self.out_features, dtype=torch.float32, device=tokens.device
        )
        for start, stop, group, weight_group in layout.segments:
            steps, (theta, baseline), k = (
                layout.steps[group],
                thresholds[group],
                weights[:, start:stop],
            )
            largest = (
                2
                * int(neuron.top(steps))
                * self.settings.weights.top(layout.weight_steps[weight_group])
                * (stop - start)
            )
            planes = spikes_of(codes[:, start:stop], neuron, steps, self.form)
            charge = cast(Tensor, sum(integer_product(plane, k, largest) for plane in planes))
            charge -= baseline.to(charge.dtype) * k.sum(1, dtype=torch.int32).to(charge.dtype)
            y += charge.float() * theta * self.weight_scale[:, weight_group]
        return y

    def _weight_only(self, tokens: Tensor, weights: Tensor) -> Tensor:
        if self.form != "merged" and not self.unrolls_weights:
            raise RequestError(
                f"form {self.form!r} unrolls input spikes, and this layer does not code its inputs"
                " (activations.bits is 16); use 'merged'"
            )
        order = self.layout().order
        tokens = tokens.float() if order is None else tokens.float().index_select(1, order)
        with torch.autocast(tokens.device.type, enabled=False):
            return self._sum_of_segments(tokens, weights)

    def _sum_of_segments(self, tokens: Tensor, weights: Tensor) -> Tensor:
        parts = [
            tokens[:, s.start : s.stop]
            @ weights[:, s.start : s.stop].float().T
            * self.weight_scale[:, s.weight_group]
            for s in self.layout().segments
        ]
        return cast(Tensor, sum(parts))

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


def spikes_of(
    codes: Tensor, neuron: SoftResetNeuron, steps: int, form: ExecutionMode
) -> Iterator[Tensor]:
    """The spikes of a train in one of its three forms, slice by slice; they sum to the codes."""
    if form == "merged":
        return iter((codes,))
    return (
        neuron.iterate_stepped(codes, steps)
        if form == "stepped"
        else neuron.iterate_binary(codes, steps)
    )
