"""Fake quantization with straight-through gradients (OmniQuant, LSQ).

These are autograd functions, since a chain of elementwise operations would keep six tensors of a
weight's size for its backward pass. Masks are floats, since torch is several times slower on bool
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spikellm.quantization.affine import AffineWeights, code_in_range, codes_in_range, weight_range


def pass_through(x: Tensor, coded: Tensor, passes: Tensor | None = None) -> Tensor:
    """``coded`` with the gradient of ``x``, times ``passes`` (0 or 1) where that is given."""
    return cast(Tensor, _PassThrough.apply(x, coded, passes))  # type: ignore[no-untyped-call]


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coded: Tensor, passes: Tensor | None) -> Tensor:
        ctx.save_for_backward(passes)
        return coded.view_as(coded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return (gradient if passes is None else gradient * passes), None, None


def through_share(
    x: Tensor,
    coded: Tensor,
    share: Tensor,
    ends: tuple[Tensor, Tensor],
    *,
    stops: bool = False,
) -> Tensor:
    """``coded`` with the gradient of ``x``, and one for the part of their ranges that values are
    coded in, see :func:`share_gradient`.

    Args:
        share: one number, float32 ``(1,)``.
        ends: of whole ranges, which broadcast to ``x``.
        stops: whether values beyond what is coded get no gradient.
    """
    return cast(Tensor, _ThroughShare.apply(x, coded, share, ends, stops))  # type: ignore[no-untyped-call]


class _ThroughShare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        coded: Tensor,
        share: Tensor,
        ends: tuple[Tensor, Tensor],
        stops: bool,
    ) -> Tensor:
        ctx.stops = stops
        ctx.save_for_backward(x, coded, share, *ends)
        return coded.view_as(coded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, coded, share, low, high = ctx.saved_tensors
        found = share_gradient(x.float(), coded, gradient, share, (low, high)).sum()
        if ctx.stops:
            gradient = gradient * within_share(x.float(), share, (low, high))
        return gradient.to(x.dtype), None, found.reshape(share.shape), None, None


def share_gradient(
    x: Tensor, coded: Tensor, gradient: Tensor, share: Tensor | float, ends: tuple[Tensor, Tensor]
) -> Tensor:
    """What every value adds to the gradient of the part of its range that is coded: one within it
    by its rounding error, one beyond it by the end that it is clipped to. So a learned step size
    gets it (LSQ, Esser et al., ICLR 2020).
    """
    return (coded - x * within_share(x, share, ends)) * gradient / share


def within_share(x: Tensor, share: Tensor | float, ends: tuple[Tensor, Tensor]) -> Tensor:
    """Which values lie within the part of their range that is coded, bool."""
    low, high = ends
    return (x >= low * share) & (x <= high * share)


def through_weight(x: Tensor, y: Tensor, weight: Callable[[], Tensor]) -> Tensor:
    """``y``, the output of a layer that codes its input ``x``, with the gradient of an uncoded one.

    Args:
        x: ``(..., in)``.
        y: ``(..., out)``.
        weight: makes the matrix ``(out, in)``; called in the backward pass, so that no matrix is
            kept until then.
    """
    return cast(Tensor, _ThroughWeight.apply(x, y, weight))  # type: ignore[no-untyped-call]


class _ThroughWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix = ctx.weight()
        return (gradient.to(matrix.dtype) @ matrix).to(ctx.dtype), gradient, None


@dataclass(frozen=True)
class WeightCoding:
    """How a weight matrix is coded.

    Attributes:
        tops: largest code of each group.
        symmetric: see :func:`spikellm.quantization.affine.code_in_range`.
        groups: ``(start, stop)`` of the stored columns of each group.
        order: channel of each stored column, None where columns are stored in their own order.
    """

    tops: list[int]
    symmetric: bool
    groups: list[tuple[int, int]]
    order: Tensor | None

    def stored(self, weight: Tensor) -> Tensor:
        """Columns in stored order."""
        return weight if self.order is None else weight.index_select(1, self.order)

    def unstored(self, values: Tensor) -> Tensor:
        """Inverse of :meth:`stored`."""
        return (
            values
            if self.order is None
            else torch.empty_like(values).index_copy_(1, self.order, values)
        )

    def code(self, weight: Tensor, clip: tuple[Tensor, Tensor] | None) -> AffineWeights:
        """Integer codes, columns in stored order; ``clip`` as for :func:`fake_quantize_weight`."""
        stored = self.stored(weight)
        low, high = weight_range(stored, self.groups)
        if clip is not None:
            low, high = torch.sigmoid(clip[1]) * low, torch.sigmoid(clip[0]) * high
        return code_in_range(stored, self.tops, self.groups, low, high, symmetric=self.symmetric)


def fake_quantize_weight(
    weight: Tensor,
    coding: WeightCoding,
    clip: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Values of the codes of ``rows · weight · columns``, columns in their own order.

    Differentiable in clip, rows and columns (straight through the rounding; a clipped weight passes
    its gradient to the range that clipped it); equal to decoding :meth:`WeightCoding.code`.

    Args:
        weight: float32, ``(out, in)``; a constant.
        clip: logits γ and β, ``(out, groups)`` each: the range is ``sigmoid(β)·min …
            sigmoid(γ)·max``; None for the whole range.
        rows, columns: factors ``(out,)`` and ``(in,)``; None for 1.
    """
    gamma, beta = (None, None) if clip is None else clip
    return cast(Tensor, _FakeCode.apply(weight, coding, gamma, beta, rows, columns))  # type: ignore[no-untyped-call]


def scale_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``rows · weight · columns``."""
    if rows is not None:
        weight = weight * rows.unsqueeze(1)
    return weight if columns is None else weight * columns


class _FakeCode(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  autograd differentiates only tensors that it is given one by one
        ctx: Any,
        weight: Tensor,
        coding: WeightCoding,
        gamma: Tensor | None,
        beta: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        scaled = coding.stored(scale_weight(weight, rows, columns))
        low, high = weight_range(scaled, coding.groups)
        narrow_low, narrow_high = (
            (low, high)
            if gamma is None or beta is None
            else (torch.sigmoid(beta) * low, torch.sigmoid(gamma) * high)
        )
        levels, scale, zero = codes_in_range(
            scaled, coding.tops, coding.groups, narrow_low, narrow_high, symmetric=coding.symmetric
        )
        for group, (start, stop) in enumerate(coding.groups):
            levels[:, start:stop] -= zero[:, group : group + 1]
        ctx.coding = coding
        ctx.save_for_backward(weight, scaled, levels, scale, low, high, gamma, beta, rows, columns)
        return coding.unstored(_by_group(levels, scale, coding))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coding: WeightCoding = ctx.coding
        weight, scaled, levels, scale, low, high, _, _, rows, columns = ctx.saved_tensors
        gradient = coding.stored(gradient)
        position = torch.empty_like(scaled)  # w / scale
        for group, (start, stop) in enumerate(coding.groups):
            torch.div(
                scaled[:, start:stop], scale[:, group : group + 1], out=position[:, start:stop]
            )
        inside = (levels - position).abs_().le_(0.5 + 1e-3)  # the others are clipped
        through = inside.mul_(gradient)
        wanted_low, wanted_high, by_low, by_high = _range_gradients(
            ctx, (gradient * levels).sub_(position.mul_(through))
        )
        factors: list[Tensor | None] = [None, None]
        if rows is not None or columns is not None:
            for extreme, wanted in ((low, wanted_low), (high, wanted_high)):
                _add_at(through, scaled, extreme, wanted, coding)
            factors = _factor_gradients(coding.unstored(through), weight, rows, columns)
        return None, None, by_high, by_low, *factors


def _range_gradients(
    ctx: Any, by_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the extreme weights ``(low, high)`` and of the logits ``(β, γ)``.

    All are ``(out, groups)``.
    """
    coding: WeightCoding = ctx.coding
    _, _, _, _, low, high, gamma, beta, _, _ = ctx.saved_tensors
    total = torch.stack([by_scale[:, start:stop].sum(1) for start, stop in coding.groups], 1)
    clip_low, clip_high = (
        (torch.ones_like(low),) * 2
        if gamma is None
        else (torch.sigmoid(beta), torch.sigmoid(gamma))
    )
    top = torch.tensor(coding.tops, dtype=total.dtype, device=total.device)
    if coding.symmetric:
        total = total / torch.floor(top / 2)
        # Share of the upper end; half where both ends are equally far from zero.
        share = 0.5 + 0.5 * torch.sign(clip_high * high + clip_low * low)
        by_low, by_high = (share - 1) * total, share * total
    else:
        total = total / top
        by_low, by_high = -total, total
    if gamma is None:
        return by_low, by_high, None, None
    slope_low, slope_high = clip_low * (1 - clip_low), clip_high * (1 - clip_high)
    return (
        by_low * clip_low,
        by_high * clip_high,
        by_low * low * slope_low,
        by_high * high * slope_high,
    )


def _add_at(
    through: Tensor, scaled: Tensor, extreme: Tensor, wanted: Tensor, coding: WeightCoding
) -> None:
    """Add a gradient at the extreme weight of each row and group, unless it is 0, which every range
    includes.
    """
    wanted = torch.where(extreme == 0, 0.0, wanted)
    for group, (start, stop) in enumerate(coding.groups):
        part, end = scaled[:, start:stop], extreme[:, group : group + 1]
        there = (part - end).eq_(0)
        through[:, start:stop].addcmul_(
            there, wanted[:, group : group + 1] / there.sum(1, keepdim=True).clamp(min=1)
        )


def _factor_gradients(
    by_scaled: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None
) -> list[Tensor | None]:
    product = by_scaled * weight
    by_rows = None if rows is None else (product.sum(1) if columns is None else product @ columns)
    by_columns = None if columns is None else (product.sum(0) if rows is None else rows @ product)
    return [by_rows, by_columns]


def _by_group(values: Tensor, factor: Tensor, coding: WeightCoding) -> Tensor:
    parts = [
        values[:, start:stop] * factor[:, group : group + 1]
        for group, (start, stop) in enumerate(coding.groups)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
