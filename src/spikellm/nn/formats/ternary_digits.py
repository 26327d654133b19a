"""Ternary weights stored as the integers that their trains sum to: a column of T steps holds digits
of base 2T + 1, packed as :mod:`spikellm.quantization.digits` says.

That is 1.6 bits a weight for T = 1, about 2.33 for T = 2 and 2.82 for T = 3, where planes of
spikes take 2, 4 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spikellm.nn.formats.base import LayerShape
from spikellm.nn.formats.ternary_options import TernaryOptions
from spikellm.nn.layout import most_weight_groups
from spikellm.quantization.affine import column_groups
from spikellm.quantization.digits import are_digits, digits_length, pack_digits, unpack_digits
from spikellm.recipe.base import WeightOptions


def as_digits(weights: WeightOptions) -> bool:
    """Whether a recipe stores ternary codes as digits."""
    return isinstance(weights, TernaryOptions) and weights.packing == "digits"


def stores_steps(weights: WeightOptions) -> bool:
    """Whether steps of columns are stored: not where codes are digits and each column takes one."""
    return not as_digits(weights) or weights.budget not in (None, 1) or weights.salient_rate > 0


def row_bytes(sizes: tuple[int, ...]) -> int:
    """Bytes of the digits of one output.

    Args:
        sizes: columns that take at least 1, 2, … steps.
    """
    return sum(digits_length(count, 2 * steps + 1) for steps, count in _classes(sizes))


def scale_groups(shape: LayerShape, sizes: tuple[int, ...]) -> int:
    """Scales of one output: as many as there are groups, where activations have one range."""
    weights, ranges = shape.settings.weights, shape.settings.activations.group_ranges
    if len(ranges) > 1:
        return most_weight_groups(shape.columns, shape.settings, max(2, len(sizes)))
    return sum(len(column_groups(count, weights.group_size)) for _, count in _classes(sizes))


def pack_codes(codes: Tensor, steps: Tensor) -> Tensor:
    """Codes ``−T … T`` as bytes, uint8 ``(out, bytes)``: classes of rising steps one after another.

    Args:
        codes: ``(out, in)``, columns in stored order.
        steps: T of every column, ``(in,)``.
    """
    return torch.cat(
        [
            pack_digits(codes[:, steps == t].to(torch.int16) + t, 2 * t + 1)
            for t in sorted(set(steps.tolist()))
        ],
        dim=1,
    )


def unpack_codes(packed: Tensor, steps: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack_codes`, int16."""
    codes = packed.new_empty(len(packed), len(steps), dtype=torch.int16)
    for t, count, part in _parts(packed, sizes):
        codes[:, steps == t] = unpack_digits(part, 2 * t + 1, count).to(torch.int16) - t
    return codes


def codes_error(packed: Tensor, sizes: tuple[int, ...]) -> str | None:
    """What in stored bytes no conversion writes; None if all is well."""
    for t, count, part in _parts(packed, sizes):
        if not are_digits(part, 2 * t + 1, count):
            return f"spike_digits holds bytes that are no digits of base {2 * t + 1}"
    return None


def _classes(sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Steps of every class that has columns, and how many it has."""
    for steps, (least, more) in enumerate(zip(sizes, (*sizes[1:], 0), strict=True), 1):
        if least > more:
            yield steps, least - more


def _parts(packed: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    start = 0
    for steps, count in _classes(sizes):
        length = digits_length(count, 2 * steps + 1)
        yield steps, count, packed[:, start : start + length]
        start += length
