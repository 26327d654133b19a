"""A spiking layer while it is trained: what it computes, with gradients to the scales of its
weights, to the shares of its ranges and to its bias.

Codes of weights, steps, zero-points and groups are constants. The gradient of a scale is exact;
those of inputs and shares pass straight through the coding (:mod:`spikellm.kernels.coding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from spikellm.kernels.coding import InputCoding
from spikellm.kernels.spec import LinearSpec
from spikellm.nn.formats.base import Stored, WeightFormat

_precision: ContextVar[torch.dtype] = ContextVar("spikellm_product", default=torch.float32)
Groups = list[tuple[int, int]]  # columns of weight groups


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """While this holds, layers that are trained take their products in this type."""
    token = _precision.set(dtype)
    try:
        yield
    finally:
        _precision.reset(token)


class Trained(Stored, Protocol):
    """What of a layer is trained, and what is constant."""

    bias: Any
    format: WeightFormat

    def dense_weight(self) -> Tensor: ...

    @property
    def shares(self) -> Tensor | None: ...

    @property
    def coding(self) -> InputCoding | None: ...

    def spec(self) -> LinearSpec: ...

    def integer_weights(self) -> Tensor: ...


def trained_output(layer: Trained, x: Tensor) -> Tensor:
    """``(..., in)`` → ``(..., out)`` in the type of ``x``: what the layer gives, up to the order of
    sums and the type of products (:func:`products_in`).
    """
    precision, tokens = _precision.get(), x.reshape(-1, x.shape[-1])
    coding, layout = layer.coding, layer.layout()
    if coding is not None:
        shares = layer.shares
        if shares is None:
            spec = layer.spec()
            shares = x.new_tensor([spec.share(group) for group in range(len(spec.steps))]).float()
        tokens = _Coded.apply(tokens, shares, coding, precision)  # type: ignore[no-untyped-call]
    elif layout.order is not None:
        tokens = _Reordered.apply(tokens, layout.order, precision)  # type: ignore[no-untyped-call]
    if layer.format.has_integers:
        weight = _Scaled.apply(  # type: ignore[no-untyped-call]
            layer.weight_scale, layer.integer_weights, layout.weight_groups, precision
        )
    else:  # a constant
        weight = layer.dense_weight().to(precision)
        weight = weight if layout.order is None else weight.index_select(1, layout.order)
    bias = None if layer.bias is None else layer.bias.to(precision)
    y = torch.nn.functional.linear(tokens.to(precision), weight, bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


class _Coded(torch.autograd.Function):
    """Values of coded inputs, columns in stored order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shares: Tensor, coding: InputCoding, precision: torch.dtype
    ) -> Tensor:
        ctx.coding = coding
        ctx.save_for_backward(x, shares)
        return coding.values(x, shares, precision)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shares = ctx.saved_tensors
        found = ctx.coding.gradients(x, gradient, shares)
        return found.inputs, found.shares, None, None


class _Reordered(torch.autograd.Function):
    """Inputs that are not coded, columns in stored order. Their gradients are gathered by the
    inverse order, which takes a part of the time that adding them where they belong does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, precision: torch.dtype) -> Tensor:
        ctx.order, ctx.dtype = order, x.dtype
        return x.index_select(1, order).to(precision)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inverse = torch.argsort(ctx.order)
        return gradient.to(ctx.dtype).index_select(1, inverse), None, None


class _Scaled(torch.autograd.Function):
    """Weights in stored order, ``(out, in)``; integers are made anew for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        integers: Callable[[], Tensor],
        groups: Groups,
        precision: torch.dtype,
    ) -> Tensor:
        ctx.integers, ctx.groups, ctx.shape = integers, groups, scale.shape
        weight = integers().float()
        for group, (start, stop) in enumerate(groups):
            weight[:, start:stop] *= scale[:, group : group + 1]
        return weight.to(precision)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        product = gradient.float().mul_(ctx.integers())
        found = product.new_zeros(ctx.shape)
        for group, (start, stop) in enumerate(ctx.groups):
            found[:, group] = product[:, start:stop].sum(1)
        return found, None, None, None
