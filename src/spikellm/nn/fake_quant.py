"""A linear layer for training: inputs coded as the spiking layer will code them, gradients passed
straight through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spikellm.neurons.base import Steps
from spikellm.quantization.massive_tokens import MassiveTokens
from spikellm.quantization.ste import pass_through
from spikellm.quantization.thresholds import (
    Threshold,
    coded_range,
    held,
    share_of,
    threshold_for_range,
)
from spikellm.recipe import ActivationRecipe


class InputCoder:
    """Values of a layer's inputs after coding.

    Layers that read the same tensor share one, and the tensor is coded once.

    Args:
        settings: how inputs are coded.
        channel_group: uint8 ``(in,)``, group of every channel (see
            ``ActivationRecipe.group_ranges``).
        range_share: see :func:`spikellm.quantization.thresholds.share_of`; that of the settings by
            default.
        massive: tokens that take more steps.
        price: of a spike, see :mod:`spikellm.neurons.price`.
        fixed: θ and z of every group, ``(groups,)``, where the settings say that they are
            constants.
    """

    def __init__(
        self,
        settings: ActivationRecipe,
        channel_group: Tensor,
        range_share: int | None = None,
        massive: MassiveTokens | None = None,
        price: float = 0.0,
        fixed: Threshold | None = None,
    ) -> None:
        if settings.static != (fixed is not None):
            raise ValueError("thresholds are given where, and only where, they are constants")
        self.range_share = settings.range_share if range_share is None else range_share
        self.massive, self.fixed = massive, fixed
        self.settings, self.neuron = settings, settings.make_neuron(price)
        self._columns = [
            (channel_group == group).nonzero().squeeze(1)
            for group in range(len(settings.group_ranges))
        ]
        self._last: tuple[Tensor, int, Tensor] | None = None  # input, its version, its coded form

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., in)`` coded, float32, with the gradient of ``x`` where the neuron passes it."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            with torch.no_grad():
                plain = x.detach().float()
                coded = self.values(plain)
                passes = self._within(plain) if self.neuron.stops_gradients else None
            self._last = x, x._version, pass_through(x, coded, passes)
        return self._last[2]

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def values(self, x: Tensor) -> Tensor:
        """Values after coding, ``(..., in)`` float32."""
        return self._coded(x, self.neuron.fake_quantize)

    def counts(self, x: Tensor) -> Tensor:
        """Counts that trains are made of (see ``SoftResetNeuron.fired``), ``(..., in)``, whole
        numbers, float32.
        """

        def count(x: Tensor, theta: Tensor, baseline: Tensor, steps: Steps) -> Tensor:
            return self.neuron.fired(
                self.neuron.encode(x, theta, baseline, steps), baseline
            ).float()

        return self._coded(x, count)

    def _within(self, x: Tensor) -> Tensor:
        """1 where values are within the range that is coded, else 0, in the shape of ``x``."""

        def within(x: Tensor, theta: Tensor, baseline: Tensor, steps: Steps) -> Tensor:
            top = self.neuron.top(steps)
            low = -top if self.neuron.signed else -baseline
            return ((x >= low * theta) & (x <= (top - baseline) * theta)).float()

        return self._coded(x, within)

    def _coded(self, x: Tensor, code: Callable[[Tensor, Tensor, Tensor, Steps], Tensor]) -> Tensor:
        ranges, steps = self.settings.group_ranges, self.settings.group_steps
        least = None if self.massive is None else self.massive.steps_of(x, 0)
        if self.settings.clusters > 1 or self.fixed is not None:
            return self._by_group(x, code, least)
        own = [
            columns
            for columns, of in zip(self._columns, ranges, strict=True)
            if of > 0 and len(columns)
        ]
        common = x
        for columns in own:
            common = common.index_fill(-1, columns, 0.0)  # every range includes zero
        within = self._range_of(common, x.shape[-1] - sum(map(len, own)))
        coded = self._in_range(code, common, within, _at_least(least, steps[0]))
        for columns, of, count in list(zip(self._columns, ranges, steps, strict=True))[1:]:
            if len(columns) and (of > 0 or count != steps[0]):
                part = x.index_select(-1, columns)
                coded.index_copy_(
                    -1,
                    columns,
                    self._in_range(
                        code,
                        part,
                        self._range_of(part, len(columns)) if of > 0 else within,
                        _at_least(least, count),
                    ),
                )
        return coded

    def _by_group(
        self,
        x: Tensor,
        code: Callable[[Tensor, Tensor, Tensor, Steps], Tensor],
        least: Tensor | None,
    ) -> Tensor:
        """The same where every range is that of a group, or of two, or thresholds are constants."""
        coded, constants = torch.empty_like(x), self.fixed and held(self.fixed, x)
        ranges, steps = self.settings.group_ranges, self.settings.group_steps
        for group, (columns, of) in enumerate(zip(self._columns, ranges, strict=True)):
            if not len(columns):
                continue
            part, count = x.index_select(-1, columns), _at_least(least, steps[group])
            if constants is not None:
                theta, baseline = (one[..., group : group + 1] for one in constants)
                coded.index_copy_(-1, columns, code(part, theta, baseline, count))
                continue
            same = [one for one, r in zip(self._columns, ranges, strict=True) if r == of]
            shared = part if len(same) == 1 else x.index_select(-1, torch.cat(same))
            within = self._range_of(shared, shared.shape[-1])
            coded.index_copy_(-1, columns, self._in_range(code, part, within, count))
        return coded

    def _range_of(self, x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        source = self.settings.threshold_from
        return coded_range(x, share_of(self.range_share, source), source, max(channels, 1))

    def _in_range(
        self,
        code: Callable[[Tensor, Tensor, Tensor, Steps], Tensor],
        x: Tensor,
        within: tuple[Tensor, Tensor],
        steps: Steps,
    ) -> Tensor:
        theta, baseline = threshold_for_range(
            *within,
            self.neuron.top(steps),
            symmetric=self.settings.symmetric,
            signed=self.neuron.signed,
        )
        return code(x, theta, baseline, steps)


def _at_least(least: Tensor | None, steps: int) -> Steps:
    return steps if least is None else least.clamp(min=steps)


class FakeQuantLinear(nn.Module):
    """Stands in for a linear layer inside a copy of its block.

    Parameters have the names of the layer's own.

    Args:
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.
        precision: type of the product; its result is float32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.precision = precision
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )
        self.coder: InputCoder | None = None  # None: inputs as they are

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` → ``(..., out)``."""
        if self.coder is not None:
            x = self.coder(x)
        if self.precision == torch.float32:
            return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
        y = nn.functional.linear(x.to(self.precision), self.weight.to(self.precision)).float()
        return y if self.bias is None else y + self.bias
