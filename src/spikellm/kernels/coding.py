"""Values that the inputs of a layer are coded to, and their gradients, as training needs them: by
native kernels where there are any that can, else in torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spikellm.kernels.base import choice, plain
from spikellm.kernels.native import backend, build
from spikellm.kernels.native.linear_plan import make_plan, misfit
from spikellm.kernels.native.ops import TYPES, unless
from spikellm.kernels.spec import LinearSpec
from spikellm.kernels.torch.linear import encode
from spikellm.quantization.ste import share_gradient, within_share
from spikellm.quantization.thresholds import coded_range


class CodedGradients(NamedTuple):
    """Gradients of inputs, ``(tokens, in)`` in their own order and type, and of the shares of
    ranges, float32 ``(groups,)``.
    """

    inputs: Tensor
    shares: Tensor


class InputCoding:
    """How a layer codes its inputs, for any shares of ranges.

    Args:
        spec: of a layer that codes its inputs; its own shares are not used.
    """

    def __init__(self, spec: LinearSpec) -> None:
        self._spec = spec
        able = misfit(spec) is None and not spec.fixed
        native = choice() != "torch" and able and backend.problem() is None
        self._plan = make_plan(spec) if native else None
        self._order = spec.order

    def values(self, x: Tensor, shares: Tensor, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, ``(tokens, in)`` with columns in stored order.

        Args:
            x: ``(tokens, in)``.
            shares: part of its range that each activation group codes, float32 ``(groups,)``.
            dtype: of the values.
        """
        if not self._runs_native(x, dtype):
            return self._values(x, shares).to(dtype)
        assert self._plan is not None
        x, shares, found = x.contiguous(), shares.contiguous(), x.new_empty(x.shape, dtype=dtype)
        failed = build.load_library().spikellm_code_values(
            x.data_ptr(),
            len(x),
            self._plan.data_ptr(),
            shares.data_ptr(),
            found.data_ptr(),
            TYPES[x.dtype],
            TYPES[dtype],
            torch.get_num_threads(),
        )
        return unless(failed, found)

    def gradients(self, x: Tensor, gradient: Tensor, shares: Tensor) -> CodedGradients:
        """Gradients, from that of the values, ``(tokens, in)`` in stored order.

        Inputs get the gradient of what they are coded to, none beyond the range where the neuron
        stops it there. That of a share is that of a learned step
        size (LSQ, Esser et al., ICLR 2020): a value within the part of its range that is coded
        moves it by its rounding error, one beyond it by the end that it is clipped to.
        """
        if not self._runs_native(x, gradient.dtype):
            return self._gradients(x, gradient, shares)
        assert self._plan is not None
        x, gradient, shares = x.contiguous(), gradient.contiguous(), shares.contiguous()
        by_input, by_share = torch.empty_like(x), shares.new_empty(len(x), len(shares))
        failed = build.load_library().spikellm_code_gradients(
            x.data_ptr(),
            gradient.data_ptr(),
            len(x),
            self._plan.data_ptr(),
            shares.data_ptr(),
            by_input.data_ptr(),
            by_share.data_ptr(),
            TYPES[x.dtype],
            TYPES[gradient.dtype],
            torch.get_num_threads(),
        )
        return CodedGradients(unless(failed, by_input), by_share.sum(0))

    def _runs_native(self, x: Tensor, dtype: torch.dtype) -> bool:
        known = x.dtype in TYPES and dtype in TYPES
        return self._plan is not None and known and x.is_cpu and plain(x)

    def _values(self, x: Tensor, shares: Tensor) -> Tensor:
        spec = replace(self._spec, shares=tuple(shares.tolist()))
        codes, thresholds = encode(spec, x)
        parts = [
            (codes[:, start:stop] - z) * theta
            for (theta, z), (start, stop) in zip(thresholds, spec.bounds, strict=True)
        ]
        return torch.cat(parts, 1)

    def _gradients(self, x: Tensor, gradient: Tensor, shares: Tensor) -> CodedGradients:
        values, ordered, spec = self._values(x, shares), x.float(), self._spec
        stops = spec.neuron is not None and spec.neuron.stops_gradients
        if self._order is not None:
            ordered = ordered.index_select(1, self._order)
        by_input, by_share = gradient.clone(), []
        if spec.fixed:
            if stops:
                by_input *= self._within_constants(ordered)
            return CodedGradients(self._unordered(by_input).to(x.dtype), torch.zeros_like(shares))
        for (start, stop), (first, last), share in zip(
            spec.bounds, spec.ranges, shares.tolist(), strict=True
        ):
            low, high = coded_range(ordered[:, first:last], 1.0, spec.threshold_source)
            if spec.thresholds != "asymmetric":
                high = torch.maximum(high, -low)
                low = -high
            part, ends = slice(start, stop), (low, high)
            one = share_gradient(ordered[:, part], values[:, part], gradient[:, part], share, ends)
            by_share.append(one.sum())
            if stops:
                by_input[:, part] *= within_share(ordered[:, part], share, ends)
        return CodedGradients(self._unordered(by_input).to(x.dtype), torch.stack(by_share))

    def _within_constants(self, ordered: Tensor) -> Tensor:
        """1 where values lie in the range of thresholds that are constants, else 0."""
        spec, found = self._spec, torch.zeros_like(ordered)
        for (theta, z), top, (start, stop) in zip(spec.fixed, spec.tops, spec.bounds, strict=True):
            low = top if spec.thresholds == "signed" else z
            part = ordered[:, start:stop]
            found[:, start:stop] = (part >= -low * theta) & (part <= (top - z) * theta)
        return found

    def _unordered(self, values: Tensor) -> Tensor:
        if self._order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self._order, values)
